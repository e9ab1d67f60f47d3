"""Print where the compiled layer finds what it is built from, as KEY=VALUE lines that CMakeLists.txt reads.

Run with the interpreter whose torch is to be built against. torch is located, not imported: that takes seconds.

    TORCH_VERSION, TORCH_CUDA    "2.15.0+cu132", "13.2" (empty: a torch without CUDA)
    TORCH_INCLUDE, TORCH_LIB     folders
    NVCC, NVCC_VERSION           compiler and "13.2", or empty
    NVCC_NOTE                    why there is no NVCC
    PYTHON_INCLUDE, PYBIND11_INCLUDE, MODULE_SUFFIX    for the test-only emulation module; empty when not installed
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SYSTEM_NVCC = Path("/usr/local/cuda/bin/nvcc")


def package_dir(name: str) -> Path | None:
    """Return the folder of an installed package, or None."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def nvcc_version(nvcc: Path) -> str:
    """Return "major.minor" of an nvcc, or an empty string when it does not run."""
    try:
        text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else ""


def find_nvcc(torch_cuda: str) -> tuple[str, str, str]:
    """Return path and version of the nvcc that suits torch, and a note that is not empty when there is none.

    CUDACXX decides when it is set. Otherwise the nvcc that PyPI brings is tried first, then those of the system; one of
    exactly torch's version is preferred to one that shares only its major version.
    """
    if not torch_cuda:
        return "", "", "torch is a build without CUDA"
    chosen = os.environ.get("CUDACXX")
    if chosen:
        candidates = [Path(shutil.which(chosen) or chosen)]
        if not candidates[0].exists():
            return "", "", f"CUDACXX names {chosen}, which does not exist"
    else:
        nvidia = package_dir("nvidia")
        folders = [nvidia / f"cu{torch_cuda.split('.')[0]}" / "bin"] if nvidia else []
        home = os.environ.get("CUDA_HOME")
        if home:
            folders.append(Path(home) / "bin")
        candidates = [folder / "nvcc" for folder in folders]
        on_path = shutil.which("nvcc")
        if on_path:
            candidates.append(Path(on_path))
        candidates.append(SYSTEM_NVCC)
    versions = [(path, nvcc_version(path)) for path in candidates if path.exists()]
    same_major = [(path, v) for path, v in versions if v.split(".")[0] == torch_cuda.split(".")[0]]
    if same_major:
        path, version = next(((p, v) for p, v in same_major if v == torch_cuda), same_major[0])
        return str(path), version, ""
    if versions:
        others = ", ".join(f"{path} is {version or 'not runnable'}" for path, version in versions)
        return "", "", f"torch uses CUDA {torch_cuda}, but {others}"
    return "", "", f"no nvcc was found; install cuda-toolkit[nvcc,cudart,cccl]=={torch_cuda}.* or set CUDACXX"


def main() -> int:
    """Print the lines; fail with a sentence when there is no torch."""
    torch = package_dir("torch")
    if torch is None:
        print(f"torch is not installed for {sys.executable}: install it first", file=sys.stderr)
        return 1
    version = runpy.run_path(str(torch / "version.py"))
    torch_cuda = version.get("cuda") or ""
    nvcc, nvcc_ver, nvcc_note = find_nvcc(torch_cuda)
    pybind11 = package_dir("pybind11")
    values = {
        "TORCH_VERSION": version["__version__"],
        "TORCH_CUDA": torch_cuda,
        "TORCH_INCLUDE": torch / "include",
        "TORCH_LIB": torch / "lib",
        "NVCC": nvcc,
        "NVCC_VERSION": nvcc_ver,
        "NVCC_NOTE": nvcc_note,
        "PYTHON_INCLUDE": sysconfig.get_paths()["include"],
        "PYBIND11_INCLUDE": pybind11 / "include" if pybind11 else "",
        "MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
    }
    for key, value in values.items():
        print(f"{key}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
