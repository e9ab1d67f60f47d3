"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from finecf import _native

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    # The same examples in every run: what fails once fails again, and a green build stays green.
    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")
    # Threads of small tensors wait for each other, twenty times as long as they work where cores are shared.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    if os.environ.get("FINECF_TEST_DEVICE", "cpu").startswith("cuda"):
        # Networks in full precision and the same at every call, as on the CPU: what is compared is this library's part.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a CUDA device where there is none."""
    no_device = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_device)


@pytest.fixture
def realdata() -> Path:
    """The folder of real images: FINECF_REALDATA, else ../shared/realdata beside the checkout."""
    path = Path(os.environ.get("FINECF_REALDATA") or ROOT.parent / "shared" / "realdata")
    if not path.is_dir():
        pytest.skip(f"no real images: {path} is not a folder (set FINECF_REALDATA)")
    return path


@pytest.fixture
def restore_backend() -> Iterator[None]:
    """Put back the backend that was chosen before the test."""
    before = _native.backend()
    yield
    _native.set_backend(before)


@pytest.fixture
def reference_backend(restore_backend: None) -> None:
    """Run the test with the plain-torch twins."""
    _native.set_backend("reference")


@pytest.fixture
def native_backend(restore_backend: None) -> None:
    """Run the test with the compiled operators; skip it, with the reason, where they are not loaded."""
    info = _native.build_info()["cpu"]
    if not info["loaded"]:
        pytest.skip(f"the compiled operators are not loaded: {info['reason']}")
    _native.set_backend("native")
