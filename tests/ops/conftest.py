from __future__ import annotations

from collections.abc import Iterator

import cases
import pytest
import torch

from finecf import _native

# Where nothing compiled can be tested, what is about the compiled operators alone is not collected.
collect_ignore = ["test_compiled.py"] if cases.implementations() == ["reference"] else []


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with one implementation: the one it is parametrised with, else what the environment asks for."""
    backend, level, threads = _native.backend(), _native.cpu_isa(), torch.get_num_threads()
    name: str = getattr(request, "param", "as it is")
    if name == "reference":
        _native.set_backend("reference")
    elif name != "as it is":
        _native.set_backend("native")
        if name.startswith("cpu-"):
            _native.set_cpu_isa(name.removeprefix("cpu-"))
    yield name
    _native.set_backend(backend)
    if level is not None:
        _native.set_cpu_isa(level)
    torch.set_num_threads(threads)
