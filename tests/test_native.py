"""The compiled layer as Python sees it: what loads, what falls back, and what is said about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finecf
import finecf.ops  # registers the fake kernels
from finecf import _native

PACKAGE = Path(_native.__file__).parent
CPU_LIBRARY = PACKAGE / "_C.so"
CUDA_LIBRARY = PACKAGE / "_C_cuda.so"
LOADED = finecf.build_info()["cpu"]["loaded"]

needs_library = pytest.mark.skipif(not LOADED, reason=f"_C.so is not loaded: {finecf.build_info()['cpu']['reason']}")


@pytest.fixture
def bare_package(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with a finecf that has the loader, but neither shared object."""
    package = tmp_path / "finecf"
    package.mkdir()
    for name in ("__init__.py", "_native.py", "_version.py"):
        shutil.copy(PACKAGE / name, package)
    return tmp_path


def run_python(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FINECF_")}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(
        command,
        env=inherited | {"PYTHONPATH": str(folder)} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_build_info_is_plain_and_complete() -> None:
    info = finecf.build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["finecf"] == finecf.__version__
    assert info["torch"] == str(torch.__version__)
    assert info["torch_cuda"] == torch.version.cuda
    assert info["backend"] in _native.BACKENDS
    for device in ("cpu", "cuda"):
        assert info[device]["loaded"] == (info[device]["reason"] is None)


@needs_library
def test_build_info_names_the_instruction_set() -> None:
    cpu = finecf.build_info()["cpu"]
    assert cpu["isa"] in cpu["isa_levels"]
    assert cpu["isa_levels"][0] in ("baseline", "neon")


@needs_library
def test_every_level_can_be_chosen_and_an_unknown_one_is_refused() -> None:
    before = _native.cpu_isa()
    assert before is not None
    try:
        for level in _native.cpu_isa_levels():
            _native.set_cpu_isa(level)
            assert _native.cpu_isa() == level
        with pytest.raises(ValueError, match=r"must be one of .* on this machine, got 'mmx'"):
            _native.set_cpu_isa("mmx")
        assert _native.cpu_isa() == _native.cpu_isa_levels()[-1]
    finally:
        _native.set_cpu_isa(before)


@needs_library
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is a build without CUDA")
def test_cuda_library_loads_without_a_device() -> None:
    if not (Path(_native.__file__).parent / "_C_cuda.so").exists():
        pytest.skip("_C_cuda.so was not built")
    info = finecf.build_info()["cuda"]
    assert info["loaded"], info["reason"]


@needs_library
@pytest.mark.parametrize("name", _native.OPERATORS)
def test_every_schema_has_a_kernel_on_every_loaded_device_and_a_fake_one(name: str) -> None:
    """What the fake kernels give is checked by opcheck, in tests/ops/test_compiled.py."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"finecf::{name}", "Meta")
    assert has_kernel(f"finecf::{name}", "CPU")
    if finecf.build_info()["cuda"]["loaded"]:
        assert has_kernel(f"finecf::{name}", "CUDA")


@needs_library
def test_operators_are_exactly_the_schemas() -> None:
    registered = {name.removeprefix("finecf::") for name in torch._C._dispatch_get_all_op_names() if "finecf::" in name}
    assert registered == set(_native.OPERATORS)


def test_unknown_backend_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="must be one of auto, native, reference, got 'gpu'"):
        _native.set_backend("gpu")


def test_reference_backend_never_uses_the_library(reference_backend: None, recwarn: pytest.WarningsRecorder) -> None:
    assert not _native.has_native("cpu")
    assert not _native.has_native("cuda")
    assert len(recwarn) == 0


def test_device_without_kernels_is_refused_under_native(restore_backend: None) -> None:
    _native.set_backend("native")
    with pytest.raises(RuntimeError, match=r"for mps cannot be used: .* cpu and cuda only"):
        _native.has_native("mps")


def test_missing_library_falls_back_with_one_warning(bare_package: Path) -> None:
    code = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import finecf
    from finecf import _native
    at_import = len(caught)
    answers = [_native.has_native("cpu") for _ in range(3)]
ours = [str(w.message) for w in caught if "finecf" in str(w.message)]
try:
    _native.set_backend("native")
    _native.has_native("cpu")
    refused = ""
except RuntimeError as error:
    refused = str(error)
print(json.dumps(dict(at_import=at_import, answers=answers, ours=ours, refused=refused, info=finecf.build_info())))
"""
    done = run_python(bare_package, code)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["at_import"] == 0
    assert said["answers"] == [False, False, False]
    assert len(said["ours"]) == 1
    assert "plain torch serves instead" in said["ours"][0]
    assert "_C.so was not built" in said["ours"][0]
    assert "_C.so was not built" in said["info"]["cpu"]["reason"]
    assert said["info"]["cpu"]["isa"] is None
    assert "FINECF_BACKEND=native, but the compiled operators for cpu cannot be used" in said["refused"]


def test_library_that_does_not_load_keeps_its_reason(bare_package: Path) -> None:
    (bare_package / "finecf" / "_C.so").write_bytes(b"\x7fELF cut short")
    (bare_package / "finecf" / "_C_cuda.so").write_bytes(b"finecf_cuda_version=0.1\0")
    done = run_python(bare_package, "import finecf, json; print(json.dumps(finecf.build_info()))")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert "_C.so does not load: " in info["cpu"]["reason"]
    assert info["cuda"]["cuda_version"] == "0.1"
    assert not info["cuda"]["loaded"]


@needs_library
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is a build without CUDA")
def test_library_of_another_cuda_is_not_loaded(bare_package: Path) -> None:
    shutil.copy(CPU_LIBRARY, bare_package / "finecf")
    (bare_package / "finecf" / "_C_cuda.so").write_bytes(b"\x7fELF finecf_cuda_version=9.2\0")
    done = run_python(bare_package, "import finecf, json; print(json.dumps(finecf.build_info()))")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["cpu"]["loaded"]
    assert "built with CUDA 9.2, but torch" in info["cuda"]["reason"]


@pytest.mark.parametrize(("built", "torch_cuda", "refused"), [("13.0", "13.2", False), ("12.9", "13.2", True)])
def test_only_the_major_version_of_cuda_must_match(built: str, torch_cuda: str, refused: bool) -> None:
    assert bool(_native._cuda_mismatch(built, torch_cuda)) == refused


def test_library_without_a_cuda_mark_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "_C_cuda.so"
    for content in (b"", b"\x7fELF no mark here"):
        path.write_bytes(content)
        assert _native.cuda_version_of(path) is None
    assert "build finecf again" in _native._cuda_mismatch(None, "13.2")


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("FINECF_BACKEND", "fast", "FINECF_BACKEND must be one of auto, native, reference, got 'fast'"),
        pytest.param(
            "FINECF_CPU_ISA", "mmx", "FINECF_CPU_ISA must be one of", marks=needs_library, id="FINECF_CPU_ISA"
        ),
    ],
)
def test_bad_environment_gets_a_sentence(variable: str, value: str, sentence: str) -> None:
    done = run_python(PACKAGE.parent, "import finecf", **{variable: value})
    assert done.returncode != 0
    assert f"ValueError: {sentence}" in done.stderr


@needs_library
def test_environment_forces_the_plainest_instruction_set() -> None:
    level = _native.cpu_isa_levels()[0]
    code = "import finecf; print(finecf.build_info()['cpu']['isa'])"
    done = run_python(PACKAGE.parent, code, FINECF_CPU_ISA=level, FINECF_BACKEND="native")
    assert done.stdout.strip() == level, done.stderr


def test_import_needs_torch_and_numpy_alone() -> None:
    lazy = "matplotlib PIL safetensors skimage sklearn rich jinja2 typer torchvision scipy"
    code = f"import sys, finecf; print([m for m in {lazy.split()} if m in sys.modules])"
    done = run_python(PACKAGE.parent, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    for name in finecf.__all__:
        assert getattr(finecf, name) is not None
    assert set(finecf.__all__) <= set(dir(finecf))
    with pytest.raises(AttributeError, match="no attribute 'missing_name'"):
        _ = finecf.missing_name
