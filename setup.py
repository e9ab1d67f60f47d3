"""Builds the compiled layer with CMakeLists.txt and puts it beside the package.

FINECF_BUILD=0               install the Python files alone; no compiler is needed
FINECF_CUDA=0|1|auto         without nvcc: no CUDA library | an error | a printed note (default: auto)
FINECF_CUDA_ARCHS=90,120     targets of the CUDA library
FINECF_BUILD_EMULATION=1     also `_finecf_emulated`, the host emulation of the CUDA kernels (tests only)
FINECF_EMULATION_SANITIZE=1  the same with ASan and UBSan, left in build/cmake/sanitized/
MAX_JOBS                     compiler processes at a time (default: the cores, at most 8)
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cmake"
EMULATION = "_finecf_emulated"


def switch(name: str, default: str, *allowed: str) -> str:
    """Return the value of an environment switch; stop with a sentence when it is none of those allowed."""
    value = os.environ.get(name) or default
    if value not in allowed:
        raise SystemExit(f"finecf: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def tool(name: str) -> str:
    """Return the path of a build tool: the one beside this interpreter, else the one on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        raise SystemExit(f"finecf: {name} was not found: pip install {name}, or set FINECF_BUILD=0")
    return found


def step(*command: str) -> None:
    """Print a command and run it; stop when it fails."""
    print(" ".join(command), flush=True)
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise SystemExit(
            f"finecf: building the compiled layer failed ({Path(command[0]).name} ended with status {status}; the "
            "reason stands above). FINECF_BUILD=0 installs without compiled operators"
        )


class BuildNative(build_ext):
    """Runs CMake and puts the libraries it made where setuptools expects extension modules."""

    def build_extensions(self) -> None:
        """Configure, build and install into `build_lib`; remove libraries of an earlier build that are not made now."""
        if importlib.util.find_spec("torch") is None:
            raise SystemExit(
                "finecf: torch is not installed here, and the compiled layer is built against it. Install torch first "
                "and use pip's --no-build-isolation, or set FINECF_BUILD=0 to install without compiled operators"
            )
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "FINECF_PYTHON": sys.executable,
            "FINECF_CUDA": switch("FINECF_CUDA", "auto", "0", "1", "auto"),
            "FINECF_CUDA_ARCHS": os.environ.get("FINECF_CUDA_ARCHS", ""),
            "FINECF_BUILD_EMULATION": switch("FINECF_BUILD_EMULATION", "0", "0", "1"),
            "FINECF_EMULATION_SANITIZE": switch("FINECF_EMULATION_SANITIZE", "0", "0", "1"),
        }
        cmake = tool("cmake")
        jobs = os.environ.get("MAX_JOBS") or str(min(8, len(os.sched_getaffinity(0))))
        step(cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *(f"-D{k}={v}" for k, v in settings.items()))
        step(cmake, "--build", str(BUILD), "--parallel", jobs)
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        step(cmake, "--install", str(BUILD), "--prefix", str(Path(self.build_lib).resolve()))

    def copy_extensions_to_source(self) -> None:
        """Put the libraries beside the Python files of an editable install, and none that was not built now."""
        build_py = self.get_finalized_command("build_py")
        for extension in self.extensions:
            Path(self._get_inplace_equivalent(build_py, extension)[0]).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def get_ext_filename(self, fullname: str) -> str:
        """Name the plain libraries without the interpreter's tag: they do not depend on it."""
        if fullname.endswith(EMULATION):
            return super().get_ext_filename(fullname)
        return str(Path(*fullname.split("."))) + ".so"


class PlainLibraryWheel(bdist_wheel):
    """A wheel that depends on the platform, but not on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag py3-none-PLATFORM where the compiled layer is inside."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def extensions() -> list[Extension]:
    """Return what is to be built; optional ones may turn out not to be (no nvcc)."""
    if switch("FINECF_BUILD", "1", "0", "1") == "0":
        return []
    modules = [Extension("finecf._C", []), Extension("finecf._C_cuda", [], optional=True)]
    if switch("FINECF_BUILD_EMULATION", "0", "0", "1") == "1":
        modules.append(Extension(EMULATION, []))
    return modules


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": PlainLibraryWheel})
