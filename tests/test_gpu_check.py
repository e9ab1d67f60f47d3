"""`make gpu-check` where there is no GPU: how it ends, what it writes, and how it reads what others print."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from finecf import _native

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="no scripts beside the tests")


def load(path: str) -> ModuleType:
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return load("scripts/gpu_check.py")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load("benchmarks/bench_cuda.py")


# ---- without a GPU ---------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_in_one_line_and_fails() -> None:
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=hidden, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert re.fullmatch(r"finecf: gpu-check needs a GPU: torch .*\n", done.stderr)
    assert done.stdout == ""


def test_missing_packages_are_named_in_one_line(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(check.MODULES, "no_such_module", "no-such-package")
    monkeypatch.setattr(check, "probe", lambda: {"gpu": "Some GPU"})
    monkeypatch.setattr(check, "build", lambda *_: pytest.fail("it built although a package is missing"))
    assert check.main([]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no-such-package" in error


def test_every_dependency_is_looked_for(check: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [
        line for line in project["optional-dependencies"]["test"] if "finecf[" not in line
    ]
    names = {re.split(r"[><=\[ ]", line)[0] for line in lines}
    programs = {"cmake", "ninja"}  # found as programs
    optional = set(check.OPTIONAL.values())  # what needs them is skipped without them
    assert names - programs - optional - {"pytest-benchmark", "pytest-xdist"} == set(check.MODULES.values())


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA GeForce RTX 4090 (24GB)", "nvidia-geforce-rtx-4090-24gb"),
        ("?", "unknown"),
    ],
)
def test_a_gpu_is_a_file_name(check: ModuleType, name: str, expected: str) -> None:
    assert check.slug(name) == expected


def test_results_are_on_disk_after_every_step(check: ModuleType, tmp_path: Path) -> None:
    report = check.Report([tmp_path / "a" / "gpu.json", tmp_path / "b" / "gpu.json"])
    for number, key in enumerate(("machine", "build"), 1):
        report.put(key, {"state": "passed"})
        for folder in ("a", "b"):
            assert len(json.loads((tmp_path / folder / "gpu.json").read_text())) == number
            assert len(list((tmp_path / folder).iterdir())) == 1


def stub(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **outcomes: dict) -> Path:
    """Replace what needs a GPU by given outcomes; return the file of the results."""
    monkeypatch.setattr(check, "probe", lambda: {"gpu": "Some GPU", "capability": [9, 0]})
    monkeypatch.setattr(check, "located", lambda: {"NVCC": "/no/nvcc", "NVCC_VERSION": "13.0"})
    monkeypatch.setattr(check, "missing_tools", list)
    monkeypatch.setattr(check, "RESULTS", tmp_path)
    good = {"state": "passed", "detail": "well"}
    for stage in check.STAGES:
        monkeypatch.setattr(check, stage, lambda *_, stage=stage: dict(outcomes.get(stage, good)))
    return tmp_path / "some-gpu.json"


def test_all_passed_is_status_zero(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = stub(check, monkeypatch, tmp_path)
    assert check.main([]) == 0
    found = json.loads(file.read_text())
    assert found["passed"] is True
    assert [found[stage]["state"] for stage in check.STAGES] == ["passed"] * 4
    assert {"gpu", "driver", "nvcc", "commit", "dirty"} <= set(found["machine"])


@pytest.mark.parametrize("stage", ["build", "tests", "sanitizer", "benchmarks"])
def test_one_failure_is_a_failure(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    file = stub(check, monkeypatch, tmp_path, **{stage: {"state": "failed", "detail": "badly"}})
    assert check.main([]) == 1
    found = json.loads(file.read_text())
    assert found["passed"] is False
    assert found[stage]["state"] == "failed"
    assert ("tests" in found) == (stage != "build")  # nothing is tested that was not built


def test_a_refusal_is_recorded_and_is_no_failure(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stub(check, monkeypatch, tmp_path, sanitizer={"state": "refused", "detail": "refused: Device not supported"})
    assert check.main(["--out", str(tmp_path / "copy")]) == 0
    assert json.loads(file.read_text())["sanitizer"]["state"] == "refused"
    assert (tmp_path / "copy" / "some-gpu.json").read_text() == file.read_text()
    assert "refused" in capsys.readouterr().out


def test_later_stages_keep_their_least(check: ModuleType) -> None:
    stages = check.STAGES
    assert check.allowance("build", stages, check.LIMIT) == check.LIMITS["build"]
    left = check.LIMIT - check.LIMITS["build"]
    spent = check.allowance("tests", stages, left)
    assert left - spent >= check.LEAST["sanitizer"] + check.LEAST["benchmarks"]
    assert check.allowance("benchmarks", stages, 20) == 20
    assert check.LIMIT < 600


# ---- tests -----------------------------------------------------------------------------------------------------------

JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" tests="5">
<testcase classname="tests.ops.test_a" name="test_one[float32-cuda]"/>
<testcase classname="tests.ops.test_a" name="test_one[reference]"/>
<testcase classname="tests.ops.test_a" name="test_two[cuda]">
<failure message="assert 1 == 2&#10;more">trace</failure></testcase>
<testcase classname="tests.ops.test_a" name="test_three"><error message="boom">trace</error></testcase>
<testcase classname="tests.ops.test_a" name="test_four"><skipped message="no real images"/></testcase>
</testsuite></testsuites>"""


def test_totals_of_a_test_report(check: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(JUNIT)
    found = check.junit_totals(report)
    assert [found[key] for key in ("passed", "failed", "errors", "skipped", "cuda")] == [2, 1, 1, 1, 1]
    assert found["failures"] == [
        "tests.ops.test_a::test_two[cuda]: assert 1 == 2",
        "tests.ops.test_a::test_three: boom",
    ]
    assert found["skip_reasons"] == {"no real images": 1}
    report.write_text(JUNIT[:200])
    assert check.junit_totals(report) is None
    assert check.junit_totals(tmp_path / "none.xml") is None


def test_groups_hold_every_test_once(check: ModuleType) -> None:
    groups = check.test_groups(ROOT / "tests")
    paths = [Path(path) for each in groups.values() for path in each]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
    assert sorted(files) == sorted((ROOT / "tests").rglob("test_*.py"))


def fake_pytest(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, xml: str, status: int) -> dict:
    """Run the stage with a pytest that writes this report and ends so."""
    monkeypatch.setattr(check, "LOGS", tmp_path)
    monkeypatch.setattr(check, "GROUPS", {"operators": ("ops",)})
    monkeypatch.setattr(check, "test_groups", lambda _: {"operators": ["tests/ops"]})

    def run_all(jobs: list, limit: float, side_by_side: bool) -> None:
        (tmp_path / "tests-operators.xml").write_text(xml)
        jobs[0].status = status

    monkeypatch.setattr(check, "run_all", run_all)
    return check.tests("cuda", 60)


def test_tests_that_run_no_cuda_kernel_prove_nothing(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = '<testsuites><testsuite><testcase classname="a" name="test_one[{}]"/></testsuite></testsuites>'
    assert fake_pytest(check, monkeypatch, tmp_path, case.format("cuda"), 0)["state"] == "passed"
    without = fake_pytest(check, monkeypatch, tmp_path, case.format("reference"), 0)
    assert without["state"] == "failed"
    assert "no test ran the CUDA kernels" in without["detail"]
    assert fake_pytest(check, monkeypatch, tmp_path, case.format("cuda"), 1)["state"] == "failed"
    assert fake_pytest(check, monkeypatch, tmp_path, JUNIT, 1)["totals"]["failed"] == 1


def test_a_command_is_stopped_at_its_limit_with_its_children(check: ModuleType, tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\nchild.wait()"
    )
    job = check.Job([sys.executable, "-c", code], tmp_path / "log", os.environ)
    check.run_all([job], 5)
    assert job.status is None
    child = Path(f"/proc/{int(job.text)}")
    for _ in range(100):  # the system takes a moment to end it
        if not child.exists() or "State:\tZ" in (child / "status").read_text():
            return
        time.sleep(0.1)
    pytest.fail("the child of the command still runs")


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------

CLEAN = "========= COMPUTE-SANITIZER\nfinecf: 120 calls on cuda\n========= ERROR SUMMARY: 0 errors\n"
RACE_CLEAN = (
    "========= COMPUTE-SANITIZER\nfinecf: 120 calls on cuda\n"
    "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
)
OUT_OF_BOUNDS = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at finecf::planted_memcheck(int *)+0x80 in planted_faults.cu:20
=========     by thread (63,0,0) in block (0,0,0)
=========     Address 0x7f0000000100 is out of bounds
========= ERROR SUMMARY: 1 error
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at finecf::f(int *)+0x70 and Read access at finecf::f(int *)+0xa0
finecf: 120 calls on cuda
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
=========
cudaMalloc failed: unknown error
========= ERROR SUMMARY: 1 error
"""
NEVER_BEGAN = """========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
"""


@pytest.mark.parametrize(
    ("text", "status", "state", "said"),
    [
        (CLEAN, 0, "passed", "0 errors in 120 calls"),
        (RACE_CLEAN, 0, "passed", "0 errors in 120 calls"),
        (OUT_OF_BOUNDS, 86, "failed", "Invalid __global__ write"),
        (RACE, 86, "failed", "Race reported"),
        (RACE, 0, "failed", "Race reported"),
        (REFUSED, 1, "refused", "Device not supported"),
        (NEVER_BEGAN, 255, "failed", "Target application terminated"),
        (CLEAN, 1, "failed", "status 1"),
        (CLEAN, None, "failed", "time limit"),
        (CLEAN.replace("finecf: 120 calls on cuda\n", ""), 0, "failed", "did not run to their end"),
        ("finecf: 120 calls on cuda\n", 0, "failed", "no summary"),
        ("", 0, "failed", "no summary"),
    ],
)
def test_what_a_sanitizer_says_is_understood(
    check: ModuleType, text: str, status: int | None, state: str, said: str
) -> None:
    verdict = check.sanitizer_verdict(text, status)
    assert verdict["state"] == state
    assert said in verdict["detail"]


def fake_sanitizer(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, planted: str, real: str) -> dict:
    """Run the stage with a tool that prints `planted` over the planted fault and `real` over the cases."""
    monkeypatch.setattr(check, "LOGS", tmp_path)
    monkeypatch.setattr(check, "sanitizer_path", lambda nvcc: "/no/compute-sanitizer")
    monkeypatch.setattr(check, "build_planted", lambda *_: (tmp_path / "planted", ""))

    def run_one(name: str, command: list[str], environment: dict[str, str], limit: float) -> object:
        assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        text = planted if name.endswith("planted") else real
        (tmp_path / name).write_text(text)
        return check.Job(command, tmp_path / name, environment, status=86 if " 1 error" in text else 0)

    monkeypatch.setattr(check, "run_one", run_one)
    return check.sanitizer({"capability": [9, 0]}, {"NVCC": "/no/nvcc"}, 100)


def test_a_tool_must_find_the_fault_planted_for_it(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blind = fake_sanitizer(check, monkeypatch, tmp_path, CLEAN + "planted: no error", CLEAN)
    assert blind["state"] == "failed"
    assert "did not find the fault planted for it" in blind["tools"]["memcheck"]["detail"]
    good = fake_sanitizer(check, monkeypatch, tmp_path, OUT_OF_BOUNDS, CLEAN)
    assert good["state"] == "passed"
    assert [good["tools"][name]["state"] for name in check.TOOLS] == ["passed"] * 4
    assert fake_sanitizer(check, monkeypatch, tmp_path, OUT_OF_BOUNDS, OUT_OF_BOUNDS)["state"] == "failed"
    assert fake_sanitizer(check, monkeypatch, tmp_path, REFUSED, CLEAN)["state"] == "refused"


def test_the_filter_lets_the_planted_faults_through(check: ModuleType) -> None:
    """One fault for each tool, in the namespace that the filter names, as are the kernels of the project."""
    text = (ROOT / "scripts" / "planted_faults.cu").read_text()
    command = check.sanitizer_command("tool", "racecheck")
    assert command[command.index("--kernel-name") + 1] == "kns=finecf"
    for tool in check.TOOLS:
        assert f"__global__ void planted_{tool}(" in text
    for source in [ROOT / "scripts" / "planted_faults.cu", *(ROOT / "csrc").glob("*/*_kernel.cuh")]:
        assert source.read_text().index("namespace finecf {") < source.read_text().index("__global__")


def test_every_operator_is_run_under_the_sanitizer() -> None:
    script = ROOT / "scripts" / "sanitizer_cases.py"
    if not _native.cpu_isa_levels():
        pytest.skip("the compiled operators are not loaded")
    code = (
        f"import sys, runpy; sys.argv = ['x', '--device', 'cpu']; cases = runpy.run_path({str(script)!r})\n"
        "from finecf import _native\n"
        "seen = {name for name, _ in cases['all_cases']('cuda')}\n"
        "assert seen == set(_native.OPERATORS) == set(cases['HALF']), seen\n"
        "print(cases['run']('cpu'))"
    )
    inherited = os.environ | {"PYTHONPATH": str(Path(_native.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=inherited, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 40


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def test_every_operator_has_cases_and_one_that_a_cpu_can_try(bench: ModuleType) -> None:
    assert set(bench.CASES) == set(_native.OPERATORS)
    for name, cases in bench.CASES.items():
        found = list(cases())
        assert {case.operator for case in found} == {name}
        assert any(case.quick for case in found), name
        assert all(case.amounts.bytes > 0 for case in found)


def test_the_roofline_is_the_slowest_of_its_terms(bench: ModuleType) -> None:
    peaks = {"copy_bytes_per_s": 4e12, "gemm_flops_per_s": 5e13, "exps_per_s": None}
    times = bench.Amounts(bytes=4e9, flops=1e11, exps=1e12).times(peaks)
    assert times == {"memory": pytest.approx(1.0), "arithmetic": pytest.approx(2.0)}
    (case, *_) = bench.CASES["best_replacement"]()
    assert case.shape == "49 cells x 3,000 x 200"
    assert case.amounts.flops == 2 * 49 * 3000 * 200
    assert case.amounts.bytes == 4 * (49 * 200 + 3000 * 200 + 49 * 3000)
    assert case.amounts.exps == 3049 * 200


def test_bytes_count_every_input_once(bench: ModuleType) -> None:
    """The inputs alone are no more than what a case says it must move; a large output comes on top."""
    for cases in bench.CASES.values():
        for case in cases():
            if case.quick:
                inputs = bench.tensor_bytes(case.inputs(bench.Random(torch.device("cpu"))))
                assert case.amounts.bytes >= 0.9 * inputs, case


def test_copies_exceed_twice_the_cache(bench: ModuleType) -> None:
    assert bench.copies_for(10 << 20, 60 << 20) * (10 << 20) > 2 * (60 << 20)
    assert bench.copies_for(10 << 30, 60 << 20) == 1
    assert bench.copies_for(1, 60 << 20) == bench.MOST_COPIES


def test_sides_take_turns_on_rotated_inputs(bench: ModuleType) -> None:
    calls: list[tuple[str, int]] = []
    clock = iter(range(1000))

    def sample(work) -> float:
        work()
        return float(next(clock))

    sides = {
        "ours": lambda given: calls.append(("ours", given[0])),
        "plain": lambda given: calls.append(("plain", given[0])),
    }
    times = bench.measure(sides, [(0,), (1,), (2,)], {"ours": sample, "plain": sample}, repeats=6, seconds=math.inf)
    measured = calls[6:]  # three calls of each side warm up
    assert [side for side, _ in measured] == ["ours", "plain"] * 6
    assert [given for _, given in measured] == [0, 1, 2] * 4
    assert times["ours"] == {"median": 5.0, "q1": 2.5, "q3": 7.5, "count": 6}
    assert times["plain"]["median"] == 6.0


def test_a_wrong_result_is_not_timed(bench: ModuleType) -> None:
    case = bench.Case(
        "operator",
        "shape",
        inputs=lambda rng: (rng.normal(3),),
        ours=lambda x: x + 1,
        call=lambda x: pytest.fail("it was timed"),
        plain=lambda x: x,
        amounts=bench.Amounts(1.0),
        agree=bench.difference(0.5),
    )
    row = bench.run_case(case, torch.device("cpu"), bench.HostClock(), {"copy_bytes_per_s": 1.0}, 0, True)
    assert row["state"] == "failed"
    assert "2 times what is allowed" in row["detail"]


@pytest.mark.skipif(not _native.cpu_isa_levels(), reason="the compiled operators are not loaded")
def test_the_harness_runs_on_the_cpu(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"copy_bytes_per_s": 1e10, "gemm_flops_per_s": 1e11, "exps_per_s": 1e9, "launch_ms": 0.001}
    monkeypatch.setattr(bench, "measure_peaks", lambda *_: peaks)
    file = tmp_path / "rows.json"
    precision = torch.backends.cuda.matmul.fp32_precision
    try:
        assert bench.run(torch.device("cpu"), True, "masked_class_scores", file, 600) == 0
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    (row,) = json.loads(file.read_text())["rows"]
    assert row["state"] == "passed"
    assert row["difference"] <= 1
    assert row["share"] == pytest.approx(row["roofline_ms"] / row["ours_ms"]["median"])
    assert row["bound"] in ("memory", "arithmetic", "exponentials")


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_fits_eighty_columns(check: ModuleType) -> None:
    spread = {"median": 1.23456, "q1": 1.0, "q3": 2.0, "count": 9}
    row = {
        "operator": "FGVCE.explain, after the trunk",
        "shape": "2048 x 7 x 7, 200 classes, 2989 candidates, 10 edits",
        "state": "passed",
        "ours_ms": spread,
        "plain_ms": spread | {"median": 123456.0},
        "share": 0.123,
    }
    values = {
        "machine": {
            "gpu": "NVIDIA H200",
            "driver": "580.1",
            "torch": "2.11.0+cu130",
            "commit": "a" * 40,
            "dirty": True,
        },
        "build": {"state": "passed", "detail": "word " * 60, "seconds": 12.0},
        "tests": {
            "state": "failed",
            "detail": "x" * 300,
            "seconds": 100.0,
            "groups": {"operators": {"failures": ["tests::test_" + "y" * 200 + ": assert"]}},
        },
        "sanitizer": {
            "state": "passed",
            "detail": "4 passed",
            "tools": {"memcheck": {"state": "passed", "detail": "0"}},
        },
        "benchmarks": {"state": "passed", "detail": "9", "rows": [row], "peaks": {"copy_bytes_per_s": 4.2e12}},
    }
    text = check.table(values)
    assert max(len(line) for line in text.splitlines()) <= 80
    for word in ("nvidia h200", "memcheck", "1.235", "1e+05x", "12 %", "with changes"):
        assert word in text.lower()
    assert text.count("x") >= 300  # nothing is cut off but the shapes
    assert text.count("y") >= 200
