"""The compiled layer as Python sees it: what loads, what falls back, and what is said about it."""

from __future__ import annotations

import pytest

from finecf import _native


def test_unknown_backend_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="must be one of auto, native, reference, got 'gpu'"):
        _native.set_backend("gpu")
