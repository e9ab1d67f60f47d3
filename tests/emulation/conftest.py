"""Builds what the emulation tests run: the module `_finecf_emulated`, and small programs against the shim."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulation"
FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")

Build = Callable[..., Path]


@pytest.fixture(scope="session")
def compiler() -> str:
    """The C++ compiler: CXX, else the system's."""
    for name in (os.environ.get("CXX"), "c++", "g++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    pytest.skip("the emulation tests compile CUDA kernels for the host, and there is no C++ compiler (c++, g++ or CXX)")


def _headers(tree: Path) -> list[Path]:
    """What an emulated kernel may include; common/ is torch's side."""
    found = [path for path in tree.rglob("*") if path.suffix in (".cuh", ".h")]
    return sorted(path for path in found if path.parent.name != "common")


@pytest.fixture(scope="session")
def build(compiler: str) -> Build:
    """Compile one file against a csrc tree, unless the same was compiled before: build(source, name, *flags, csrc)."""

    def run(source: Path, name: str, *flags: str, csrc: Path = CSRC) -> Path:
        arguments = [*FLAGS, *flags]
        content = hashlib.sha256("\0".join([compiler, sys.version, *arguments]).encode())
        for path in [source, *_headers(csrc)]:
            content.update(path.read_bytes())
        target = CACHE / content.hexdigest()[:16] / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            # Under another name until it is whole: two test runs may build at the same time.
            unfinished = target.with_name(f"{os.getpid()}-{name}")
            command = [compiler, *arguments, f"-I{csrc}", str(source), "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"
            unfinished.rename(target)
        return target

    return run


@pytest.fixture(scope="session")
def emulated(build: Build) -> ModuleType:
    """The installed `_finecf_emulated` if it is newer than its sources, else one built for this run."""
    name = "_finecf_emulated"
    installed = importlib.util.find_spec(name)
    source = CSRC / "emulation" / "module.cpp"
    newest = max(path.stat().st_mtime for path in [source, *_headers(CSRC)])
    if installed and installed.origin and Path(installed.origin).stat().st_mtime > newest:
        location = Path(installed.origin)
    else:
        pybind11 = pytest.importorskip("pybind11", reason="the emulation module needs pybind11 to be built")
        includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        shared = ("-O1", "-fPIC", "-shared", "-fvisibility=hidden")
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        location = build(source, name + suffix, *shared, *includes)
    spec = importlib.util.spec_from_file_location(name, location)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
