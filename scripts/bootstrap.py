"""Makes the virtual environment that `make demo` and `make test` run in, and builds finecf into it.

Runs with the system's Python and its standard library alone. What is missing on the machine is named first, one line
for each. A stamp in the environment remembers what was installed from which files, so that a second run is quick.

Environment: VENV (default .venv), FINECF_CUDA=0|1|auto, FINECF_BUILD=0, CXX.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / os.environ.get("VENV", ".venv")
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "finecf-setup.json"
CUDA = os.environ.get("FINECF_CUDA") or "auto"
BUILD = (os.environ.get("FINECF_BUILD") or "1") != "0"
EMULATION = os.environ.get("FINECF_BUILD_EMULATION") or "1"  # the tests run it
DISK_GB = 10

PACKAGE_INPUTS = ("pyproject.toml", "constraints.txt", "scripts/bootstrap.py")
BUILD_INPUTS = ("setup.py", "CMakeLists.txt", "cmake", "csrc")
SWITCHES = ("FINECF_BUILD", "FINECF_CUDA", "FINECF_CUDA_ARCHS", "FINECF_EMULATION_SANITIZE", "CXX", "CUDACXX")


def venv_maker() -> list[str] | None:
    """Return the command that makes an environment: venv with ensurepip, else virtualenv, else uv."""
    if importlib.util.find_spec("ensurepip") is not None:
        return [sys.executable, "-m", "venv"]
    if importlib.util.find_spec("virtualenv") is not None:
        return [sys.executable, "-m", "virtualenv"]
    if shutil.which("virtualenv"):
        return ["virtualenv", "-p", sys.executable]
    if shutil.which("uv"):
        return ["uv", "venv", "--seed", "--python", sys.executable]
    return None


def compiler() -> str | None:
    """Return the C++ compiler, or None when there is none that understands C++17."""
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        path = shutil.which(name)
        if path is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("#include <optional>\nint main() { return std::optional<int>(0).value(); }\n")
            command = [path, "-std=c++17", "-fsyntax-only", str(source)]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return path
    return None


def missing() -> list[str]:
    """Return one line for each thing that this machine lacks."""
    lines = []
    if sys.version_info < (3, 11):  # noqa: UP036 - this file also runs with what it must refuse
        lines.append(f"Python 3.11 or later is needed, {sys.executable} is {sys.version.split()[0]} (set PYTHON=...)")
    if not PYTHON.exists() and venv_maker() is None:
        lines.append("no ensurepip, virtualenv or uv: install one (Debian, Ubuntu: apt install python3-venv)")
    if BUILD and not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        lines.append("no Python.h: install Python's headers (Debian, Ubuntu: apt install python3-dev)")
    if BUILD and compiler() is None:
        lines.append("no C++17 compiler: install g++ or clang++, or set CXX (Debian, Ubuntu: apt install g++)")
    free = shutil.disk_usage(ROOT).free / 1e9
    if not STAMP.exists() and free < DISK_GB:
        lines.append(f"{DISK_GB} GB of free disk are needed at {ROOT}, {free:.1f} GB are free")
    return lines


def digest(names: tuple[str, ...]) -> str:
    """Return a hash of files, and of all files in folders, by path and content."""
    total = hashlib.sha256()
    for name in names:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                total.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


def wanted_state() -> dict[str, str]:
    """Return what the environment is to be made from."""
    switches = {name: os.environ.get(name, "") for name in SWITCHES}
    return {
        "packages": digest(PACKAGE_INPUTS) + f" CUDA={CUDA} BUILD={BUILD}",
        "build": digest(BUILD_INPUTS) + json.dumps(switches, sort_keys=True),
    }


def step(what: str, *command: str, fatal: bool = True) -> bool:
    """Say what is done and do it; stop the set-up when a command that must succeed fails."""
    print(f"-- {what}", flush=True)
    began = time.monotonic()
    environment = os.environ | {"FINECF_CUDA": CUDA, "FINECF_BUILD_EMULATION": EMULATION}
    status = subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
    if status == 0:
        print(f"   {time.monotonic() - began:.0f} s", flush=True)
    elif fatal:
        raise SystemExit(f"finecf: set-up stopped: {what}: {' '.join(command)} ended with status {status}")
    return status == 0


def pip(what: str, *arguments: str, fatal: bool = True) -> bool:
    """Install with the environment's pip, under constraints.txt."""
    command = (str(PYTHON), "-m", "pip", "install", "-q", "-c", "constraints.txt", *arguments)
    return step(what, *command, fatal=fatal)


def ask(code: str) -> str:
    """Return what the environment's Python prints."""
    return subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def install_packages() -> None:
    """Install what the build needs: tools, torch, and nvcc in the version of the CUDA that torch uses."""
    pip("build tools", "setuptools", "wheel", "cmake", "ninja", "pybind11", "numpy")
    pip("torch and torchvision (some GB)", "torch", "torchvision")
    torch_cuda = ask("import torch; print(torch.version.cuda or '')")
    if not torch_cuda or CUDA == "0" or not BUILD:
        return
    toolkit = ask(
        "from importlib import metadata as m\n"
        "print(next((d.version for d in m.distributions() if d.metadata['Name'] == 'cuda-toolkit'), ''))"
    )
    package = f"cuda-toolkit[nvcc,cudart,cccl]=={toolkit or torch_cuda + '.*'}"
    if not pip("nvcc for the CUDA of torch", package, fatal=CUDA == "1"):
        print(f"   {package} could not be installed: the CUDA kernels are built only if another nvcc is found")


def main() -> int:
    """Set the environment up, as far as it is not already."""
    lines = missing()
    if CUDA not in ("0", "1", "auto"):
        lines.append(f"FINECF_CUDA must be 0, 1 or auto, got {CUDA!r}")
    if lines:
        print("finecf: this machine lacks:", *lines, sep="\n  ", file=sys.stderr)
        return 1
    wanted = wanted_state()
    present = json.loads(STAMP.read_text()) if STAMP.exists() and PYTHON.exists() else {}
    if BUILD and not (ROOT / "finecf" / "_C.so").exists():
        present.pop("build", None)
    if present == wanted:
        return 0
    if not PYTHON.exists():
        maker = venv_maker()
        assert maker is not None  # missing() has looked
        step(f"virtual environment in {VENV}", *maker, str(VENV))
    if present.get("packages") != wanted["packages"]:
        STAMP.unlink(missing_ok=True)
        install_packages()
        pip("finecf: compiled layer, and what it runs and is tested with", "--no-build-isolation", "-e", ".[test]")
    else:
        STAMP.write_text(json.dumps({"packages": wanted["packages"]}))  # what stays true when the build fails
        pip("finecf: compiled layer", "--no-build-isolation", "--no-deps", "-e", ".")
    STAMP.write_text(json.dumps(wanted, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
