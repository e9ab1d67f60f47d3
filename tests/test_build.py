"""What the build makes: the symbols it needs, what stays out of it, its switches, and the checks of the set-up."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from finecf import _native

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(_native.__file__).parent
LIBRARIES = [path for path in (PACKAGE / "_C.so", PACKAGE / "_C_cuda.so") if path.exists()]
WHEEL_LIMIT = 5_000_000

# The copy of the tree on which the tests run without shared objects has no build files either.
needs_source = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="no build files beside the tests")
needs_libraries = pytest.mark.skipif(not LIBRARIES, reason="the compiled layer was not built")


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(library: Path, which: str) -> set[str]:
    return {line.split()[-1].split("@")[0] for line in output_of("nm", "-D", which, str(library)).splitlines()}


def load_script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clean_environment(**changes: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FINECF_") and k != "CUDACXX"}
    return inherited | changes


# ---- the libraries ---------------------------------------------------------------------------------------------------


@needs_libraries
def test_only_the_stable_interface_of_torch_2_11_is_used() -> None:
    known = set((ROOT / "tests" / "torch_2_11_symbols.txt").read_text().splitlines())
    for library in LIBRARIES:
        wanted = symbols(library, "--undefined-only")
        of_torch = {name for name in wanted if re.match(r"(aoti_)?torch_", name)}
        assert of_torch
        assert of_torch <= known
        # Nothing of torch's C++ interface or of Python's: neither stays the same from one version to the next.
        assert not [name for name in wanted if re.search(r"c10|2at\d|5torch|^_?Py", name)]


@needs_libraries
def test_only_c_functions_are_exported() -> None:
    expected = {
        "_C.so": {"finecf_cpu_isa", "finecf_cpu_isa_levels", "finecf_set_cpu_isa", "finecf_set_packed_limit"},
        "_C_cuda.so": {"finecf_cuda_version"},
    }
    for library in LIBRARIES:
        assert symbols(library, "--defined-only") == expected[library.name]


@needs_libraries
def test_no_path_of_the_build_machine_is_inside() -> None:
    for library in LIBRARIES:
        content = library.read_bytes()
        for folder in {str(PACKAGE.parent), str(Path(torch.__file__).parent)}:
            assert folder.encode() not in content


@pytest.mark.skipif(len(LIBRARIES) < 2, reason="_C_cuda.so was not built")
def test_cuda_library_brings_its_own_runtime() -> None:
    needed = re.findall(r"NEEDED.*\[(.+)\]", output_of("readelf", "-d", str(LIBRARIES[1])))
    assert "libtorch_cuda.so" in needed
    assert not [name for name in needed if "cudart" in name]


# ---- what is written twice must agree --------------------------------------------------------------------------------


@needs_source
def test_schemas_of_the_bindings_are_the_operators() -> None:
    text = (ROOT / "csrc" / "bindings.cpp").read_text()
    assert tuple(re.findall(r'm\.def\(\s*"(\w+)\(', text)) == _native.OPERATORS


# ---- wheels ----------------------------------------------------------------------------------------------------------


@needs_source
def test_wheel_without_compiler_is_pure_and_with_libraries_stays_small(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "finecf", tmp_path / "finecf", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=tmp_path,
        env=clean_environment(FINECF_BUILD="0", CXX="/nonexistent"),
        capture_output=True,
        timeout=120,
        check=True,
    )
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        size = sum(info.compress_size for info in archive.infolist() if "/checkpoints/" not in info.filename)
    assert "finecf/py.typed" in names
    assert not [name for name in names if name.endswith(".so")]
    packed = tmp_path / "libraries.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for library in LIBRARIES:
            archive.write(library, library.name)
    assert size + packed.stat().st_size < WHEEL_LIMIT


@needs_source
@pytest.mark.parametrize("switch", ["FINECF_BUILD", "FINECF_BUILD_EMULATION"])
def test_bad_switch_of_setup_gets_a_sentence(switch: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=clean_environment(**{switch: "maybe"}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert f"{switch} must be one of 0, 1, got 'maybe'" in done.stderr


# ---- CMake -----------------------------------------------------------------------------------------------------------


def configure(build: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Configure, not build, with the settings given in the environment."""
    tools = Path(sys.executable).parent
    cmake = shutil.which("cmake", path=str(tools)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    command = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DFINECF_PYTHON={sys.executable}"]
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        env=clean_environment(PATH=path, **environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@needs_source
def test_missing_nvcc_is_a_note_under_auto_and_an_error_under_1(tmp_path: Path) -> None:
    reason = "torch is a build without CUDA" if torch.version.cuda is None else "CUDACXX names /no/nvcc"
    auto = configure(tmp_path, FINECF_CUDA="auto", CUDACXX="/no/nvcc")
    assert auto.returncode == 0, auto.stderr
    assert f"no _C_cuda.so: {reason}" in auto.stdout
    forced = configure(tmp_path, FINECF_CUDA="1", CUDACXX="/no/nvcc")
    assert forced.returncode != 0
    assert f"FINECF_CUDA=1, but {reason}" in " ".join(forced.stderr.split())
    off = configure(tmp_path, FINECF_CUDA="0")
    assert "no _C_cuda.so: FINECF_CUDA=0" in off.stdout
    wrong = configure(tmp_path, FINECF_CUDA="2")
    assert wrong.returncode != 0
    assert "FINECF_CUDA must be 0, 1 or auto, got '2'" in wrong.stderr


@needs_source
def test_nvcc_is_taken_by_the_version_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locate = load_script("cmake/locate.py")
    for folder, version in (("old", "12.9"), ("other", "13.0"), ("same", "13.2")):
        nvcc = tmp_path / folder / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
        nvcc.chmod(0o755)
    monkeypatch.setattr(locate, "package_dir", lambda name: None)
    monkeypatch.setattr(locate, "SYSTEM_NVCC", tmp_path / "none")
    monkeypatch.delenv("CUDACXX", raising=False)

    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "other"))
    monkeypatch.setenv("PATH", str(tmp_path / "same" / "bin"))
    assert locate.find_nvcc("13.2")[1] == "13.2"
    assert locate.find_nvcc("13.1")[1] == "13.0"
    assert locate.find_nvcc("12.6")[0] == ""
    assert "torch uses CUDA 12.6, but" in locate.find_nvcc("12.6")[2]
    assert locate.find_nvcc("") == ("", "", "torch is a build without CUDA")

    monkeypatch.setenv("CUDACXX", str(tmp_path / "old" / "bin" / "nvcc"))
    assert "is 12.9" in locate.find_nvcc("13.2")[2]
    assert locate.find_nvcc("12.6")[1] == "12.9"


# ---- the set-up ------------------------------------------------------------------------------------------------------


@needs_source
def test_setup_names_what_is_missing_in_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap = load_script("scripts/bootstrap.py")
    monkeypatch.setattr(bootstrap, "PYTHON", tmp_path / "python")
    monkeypatch.setattr(bootstrap, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(bootstrap, "venv_maker", lambda: None)
    monkeypatch.setattr(bootstrap, "compiler", lambda: None)
    monkeypatch.setattr(bootstrap, "DISK_GB", 10**9)
    monkeypatch.setattr(bootstrap.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    lines = bootstrap.missing()
    assert len(lines) == 4
    assert all("\n" not in line for line in lines)
    for line, word in zip(lines, ("ensurepip", "Python.h", "C++17 compiler", "free disk"), strict=True):
        assert word in line
    assert bootstrap.main() == 1


@needs_source
def test_compiler_that_cannot_compile_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap = load_script("scripts/bootstrap.py")
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert bootstrap.compiler() is None


@needs_source
def test_stamp_follows_the_files_it_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap = load_script("scripts/bootstrap.py")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    for name in (*bootstrap.PACKAGE_INPUTS, "setup.py", "CMakeLists.txt", "csrc/a.h", "cmake/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    first = bootstrap.wanted_state()
    assert bootstrap.wanted_state() == first
    (tmp_path / "csrc/a.h").write_text("2")
    second = bootstrap.wanted_state()
    assert second["packages"] == first["packages"]
    assert second["build"] != first["build"]
    (tmp_path / "constraints.txt").write_text("2")
    assert bootstrap.wanted_state()["packages"] != first["packages"]
