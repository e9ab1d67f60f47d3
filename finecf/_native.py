"""Finds and loads the compiled operators, and says what was loaded and why not.

Two plain shared libraries lie beside this file when the package was built with a compiler: `_C.so` holds the operator
schemas and their CPU kernels, `_C_cuda.so` the CUDA kernels. Neither is a Python module: torch loads them, and a few C
functions that they export are read through ctypes. Where one is missing or does not load, the plain-torch twins in
`finecf.reference` serve in its place, and `build_info` holds the reason.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch

from finecf._version import __version__

Backend = Literal["auto", "native", "reference"]

BACKENDS: Final = ("auto", "native", "reference")
OPERATORS: Final = (
    "masked_class_scores",
    "permutation_shapley_tiles",
    "nearest_candidates",
    "best_replacement",
    "replace_until_flip",
    "submodular_gains",
    "compose_regions",
    "rank_masks",
)

_CUDA_MARKER: Final = b"finecf_cuda_version="
_HERE: Final = Path(__file__).resolve().parent


@dataclass
class _Library:
    """One of the two shared libraries: where it is expected, whether it serves, and the reason when it does not."""

    path: Path
    loaded: bool = False
    reason: str = "not loaded yet"
    warned: bool = False


_libraries: dict[str, _Library] = {
    "cpu": _Library(_HERE / "_C.so"),
    "cuda": _Library(_HERE / "_C_cuda.so"),
}
_cpu_handle: ctypes.CDLL | None = None
_backend: Backend = "auto"
_done = False


def load() -> None:
    """Load the compiled operators once; later calls do nothing.

    A library that is missing or does not load is no error here: the reason is kept for `build_info` and for the
    warning that `has_native` gives on the first fallback.

    Raises:
        ValueError: FINECF_BACKEND or FINECF_CPU_ISA names something that does not exist or cannot run here.
    """
    global _done
    if _done:
        return
    set_backend(os.environ.get("FINECF_BACKEND") or "auto")
    _load_cpu(_libraries["cpu"])
    _load_cuda(_libraries["cuda"])
    _done = True


def _load_cpu(library: _Library) -> None:
    global _cpu_handle
    if not library.path.exists():
        library.reason = (
            f"{library.path.name} was not built (installed with FINECF_BUILD=0, or from source files alone)"
        )
        return
    library.reason = _open(library.path, "CPU")
    if library.reason:
        return
    handle = ctypes.CDLL(str(library.path))
    handle.finecf_cpu_isa.restype = ctypes.c_char_p
    handle.finecf_cpu_isa_levels.restype = ctypes.c_char_p
    handle.finecf_set_cpu_isa.argtypes = [ctypes.c_char_p]
    handle.finecf_set_cpu_isa.restype = ctypes.c_int
    _cpu_handle = handle
    library.loaded = True
    wanted = os.environ.get("FINECF_CPU_ISA")
    if wanted:
        set_cpu_isa(wanted, source="FINECF_CPU_ISA")


def _load_cuda(library: _Library) -> None:
    torch_cuda = torch.version.cuda
    if torch_cuda is None:
        library.reason = f"torch {torch.__version__} is a build without CUDA"
    elif not library.path.exists():
        library.reason = f"{library.path.name} was not built (FINECF_CUDA=0, or no nvcc was found when it was built)"
    elif not _libraries["cpu"].loaded:
        library.reason = "it needs the operator schemas of _C.so, which is not loaded"
    else:
        library.reason = _cuda_mismatch(cuda_version_of(library.path), torch_cuda) or _open(library.path, "CUDA")
        library.loaded = not library.reason


def _open(path: Path, dispatch_key: str) -> str:
    """Load a library into torch; return the reason when it does not serve, else an empty string."""
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} does not load: {error}"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    try:
        absent = [name for name in OPERATORS if not has_kernel(f"finecf::{name}", dispatch_key)]
    except RuntimeError as error:
        return f"{path.name} was built from other sources than this version of finecf: build it again ({error})"
    if absent:
        return f"{path.name} was built from other sources, it has no kernel for {', '.join(absent)}: build it again"
    return ""


def cuda_version_of(path: Path) -> str | None:
    """Return the CUDA version ("13.2") that a `_C_cuda.so` was compiled with, or None where it holds no such mark.

    The mark is read from the file, not by loading it: a library that is loaded registers its kernels at once.
    """
    if path.stat().st_size == 0:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(_CUDA_MARKER)
        if start < 0:
            return None
        start += len(_CUDA_MARKER)
        return data[start : data.find(b"\0", start)].decode("ascii")


def _cuda_mismatch(built: str | None, torch_cuda: str) -> str:
    """Return why a library built with one CUDA version cannot serve a torch built with another, or an empty string."""
    if built is None:
        return "_C_cuda.so does not say which CUDA it was built with: build finecf again"
    if built.split(".")[0] != torch_cuda.split(".")[0]:
        return (
            f"_C_cuda.so was built with CUDA {built}, but torch {torch.__version__} uses CUDA {torch_cuda}: "
            f"both must have the same major version; build finecf again with nvcc {torch_cuda}"
        )
    return ""


def backend() -> Backend:
    """Return the backend in use: "auto" (compiled where possible), "native" (compiled or an error) or "reference"."""
    return _backend


def set_backend(name: str) -> None:
    """Choose the backend for this process, as FINECF_BACKEND does when finecf is imported.

    Raises:
        ValueError: the name is not one of `BACKENDS`.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"FINECF_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    _backend = cast(Backend, name)


def has_native(device_type: str) -> bool:
    """Say whether the compiled operators serve tensors on a device of this type ("cpu" or "cuda").

    Under "auto" the first call that has to answer no for a device type warns and says why; under "reference" the answer
    is always no, without a warning, since it was asked for.

    Raises:
        RuntimeError: the backend is "native" and the library is not loaded, or has no kernels for this device type.
    """
    if _backend == "reference":
        return False
    library = _libraries.get(device_type)
    if library is not None and library.loaded:
        return True
    reason = library.reason if library is not None else "finecf has compiled operators for cpu and cuda only"
    if _backend == "native":
        raise RuntimeError(
            f"FINECF_BACKEND=native, but the compiled operators for {device_type} cannot be used: {reason}. "
            "Build finecf with a C++ compiler, or set FINECF_BACKEND=auto to let plain torch serve"
        )
    if library is None:
        library = _libraries.setdefault(device_type, _Library(_HERE, reason=reason))
    if not library.warned:
        library.warned = True
        warnings.warn(
            f"finecf: the compiled operators for {device_type} cannot be used, plain torch serves instead (slower): "
            f"{reason}. Set FINECF_BACKEND=reference to choose this without a warning",
            RuntimeWarning,
            stacklevel=3,
        )
    return False


def cpu_isa() -> str | None:
    """Return the instruction set that the CPU kernels use ("baseline", "avx2", "avx512", "neon"); None: not loaded."""
    return None if _cpu_handle is None else cast(bytes, _cpu_handle.finecf_cpu_isa()).decode("ascii")


def cpu_isa_levels() -> tuple[str, ...]:
    """Return the instruction sets that were compiled and that this machine can run, slowest first."""
    if _cpu_handle is None:
        return ()
    return tuple(cast(bytes, _cpu_handle.finecf_cpu_isa_levels()).decode("ascii").split(","))


def set_cpu_isa(name: str, source: str = "the instruction set") -> None:
    """Choose the instruction set of the CPU kernels for this process, as FINECF_CPU_ISA does at import.

    Raises:
        RuntimeError: the compiled operators are not loaded.
        ValueError: this machine cannot run the level, or it was not compiled.
    """
    if _cpu_handle is None:
        raise RuntimeError(f"{source} cannot be chosen: {_libraries['cpu'].reason}")
    if _cpu_handle.finecf_set_cpu_isa(name.encode()) != 0:
        raise ValueError(f"{source} must be one of {', '.join(cpu_isa_levels())} on this machine, got {name!r}")


def build_info() -> dict[str, Any]:
    """Return what is compiled, what is loaded, and why not.

    Returns:
        A dict of plain values: `finecf`, `torch`, `torch_cuda` and `python` (versions), `backend`, `operators` (their
        names), and for "cpu" and "cuda" a dict with `loaded`, `path`, `reason` (None when loaded) and, for the CPU,
        `isa` and `isa_levels`, for CUDA `cuda_version` (of the compiler, None when not built).
    """
    cpu, cuda = _libraries["cpu"], _libraries["cuda"]
    return {
        "finecf": __version__,
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "backend": _backend,
        "operators": list(OPERATORS),
        "cpu": {
            "loaded": cpu.loaded,
            "path": str(cpu.path),
            "reason": cpu.reason or None,
            "isa": cpu_isa(),
            "isa_levels": list(cpu_isa_levels()),
        },
        "cuda": {
            "loaded": cuda.loaded,
            "path": str(cuda.path),
            "reason": cuda.reason or None,
            "cuda_version": cuda_version_of(cuda.path) if cuda.path.exists() else None,
        },
    }
