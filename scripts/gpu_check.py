"""What only a GPU can show, in one command: build, tests, compute-sanitizer and benchmarks on the GPU of this machine.

    make gpu-check                       or    python scripts/gpu_check.py [--out DIR]

Runs with the interpreter that it is started with: no virtual environment, no network, nothing installed. The libraries
are built for this GPU alone into build/gpu. Results go to benchmarks/results/<gpu>.json, which is written anew after
every step, so that a run that is stopped leaves what it has done; logs lie in build/gpu/logs. docs/gpu.md says more.

Exit status: 0 all passed, 1 something failed, 2 there is no GPU, 3 a package or a tool is missing.

    --stage build|tests|sanitizer|benchmarks     only these (may be repeated)
    --allow-no-gpu                               try the stages on the CPU where they can; writes to build/gpu alone
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
LOGS = BUILD / "logs"
RESULTS = ROOT / "benchmarks" / "results"

STAGES = ("build", "tests", "sanitizer", "benchmarks")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")

LIMIT = 585
"""Seconds for everything: a runner that stops a command after ten minutes must find the results written."""

LIMITS = {"build": 180, "tests": 300, "sanitizer": 160, "benchmarks": 120}
"""Seconds that a stage may take; less where the stages after it would not get their LEAST."""

LEAST = {"build": 60, "tests": 120, "sanitizer": 60, "benchmarks": 60}

# Module -> the package that brings it. pyproject.toml states the versions; tests/test_gpu_check.py compares the names.
MODULES = {
    "torch": "torch",
    "numpy": "numpy",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "rich": "rich",
    "safetensors": "safetensors",
    "skimage": "scikit-image",
    "tqdm": "tqdm",
    "typer": "typer",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
    "pybind11": "pybind11",
}
OPTIONAL = {"torchvision": "torchvision", "sklearn": "scikit-learn", "scipy": "scipy", "captum": "captum"}
"""Tests that need these are skipped, with the reason, where they are missing."""

# Groups of tests that run side by side where there are cores enough. What is in none of the first two is in the last.
GROUPS: dict[str, tuple[str, ...]] = {
    "operators": ("ops",),
    "library": ("explainers", "metrics", "models"),
    "the rest": (),
}
CORES_FOR_GROUPS = 8

PROBE = """
import json, platform, torch
found = {"python": platform.python_version(), "torch": torch.__version__, "torch_cuda": torch.version.cuda}
if torch.version.cuda is None:
    found["no_gpu"] = f"torch {torch.__version__} is a build without CUDA"
elif not torch.cuda.is_available():
    found["no_gpu"] = "torch sees no CUDA device"
else:
    properties = torch.cuda.get_device_properties(0)
    found |= {
        "gpu": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
    }
print("PROBE " + json.dumps(found))
"""

Outcome = dict[str, Any]


# ---- what is there ---------------------------------------------------------------------------------------------------


def missing_modules(names: Mapping[str, str]) -> list[str]:
    """The packages that this interpreter does not have, of those that bring the modules `names`."""
    return [package for module, package in names.items() if importlib.util.find_spec(module) is None]


def tool(name: str) -> str | None:
    """Path of a build tool: the one beside this interpreter, else the one on PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def missing_tools() -> list[str]:
    """The programs and headers that the build needs and that are not there."""
    absent = [name for name in ("cmake", "ninja") if tool(name) is None]
    if not (os.environ.get("CXX") or shutil.which("c++")):
        absent.append("a C++17 compiler (c++)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        absent.append("Python.h (the headers of this Python)")
    return absent


def output_of(command: Sequence[str], limit: float = 60) -> str:
    """What a command prints, or an empty string where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def probe() -> dict[str, Any]:
    """Versions and the GPU as torch sees them; `no_gpu` holds the reason where there is none.

    In a process of its own: this one must not hold a CUDA context, nor memory of the GPU, while others measure.
    """
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("PROBE "):
            found: dict[str, Any] = json.loads(line.removeprefix("PROBE "))
            return found
    reason = (done.stderr.strip().splitlines() or [f"python ended with status {done.returncode}"])[-1]
    return {"no_gpu": f"torch could not be asked: {reason}"}


def located() -> dict[str, str]:
    """What the build compiles with: see cmake/locate.py."""
    text = output_of([sys.executable, str(ROOT / "cmake" / "locate.py")])
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def sanitizer_path(nvcc: str) -> str | None:
    """compute-sanitizer beside nvcc, in the toolkit's folder of that name, or on PATH."""
    if nvcc:
        toolkit = Path(nvcc).resolve().parent.parent
        for folder in ("bin", "compute-sanitizer"):
            candidate = toolkit / folder / "compute-sanitizer"
            if candidate.is_file() and os.access(candidate, os.X_OK):
                return str(candidate)
    return shutil.which("compute-sanitizer")


def driver_version() -> str | None:
    """Version of the NVIDIA driver, or None where nvidia-smi does not tell."""
    lines = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()
    return lines[0].strip() if lines else None


def commit() -> dict[str, Any]:
    """The commit that is checked out and whether files differ from it, results of this script apart.

    FINECF_COMMIT names it where the sources came without their history.
    """
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    head = output_of([*git, "rev-parse", "HEAD"])
    if not head:
        return {"commit": os.environ.get("FINECF_COMMIT") or None, "dirty": None}
    changes = output_of([*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"])
    return {"commit": head, "dirty": bool(changes)}


# ---- results ---------------------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """A GPU's name as a file name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


@dataclass
class Report:
    """The results so far, and the files that hold them."""

    files: list[Path]
    values: dict[str, Any] = field(default_factory=dict)

    def put(self, key: str, value: Any) -> None:
        """Add a result and write all files anew; a reader finds the old file or the new one, never half of one."""
        self.values[key] = value
        text = json.dumps(self.values, indent=1) + "\n"
        for file in self.files:
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(file.name + ".part")
            unfinished.write_text(text)
            unfinished.replace(file)


def passed(outcome: Outcome) -> bool:
    """Whether a stage or a tool did not fail; one that could not run did not fail, and the table says so."""
    return outcome["state"] in ("passed", "refused", "absent")


# ---- running ---------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A command, what it prints going to a log, and how it ended (status None: stopped at its time limit)."""

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    status: int | None = None
    seconds: float = 0.0

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def run_all(jobs: Sequence[Job], limit: float, side_by_side: bool = False) -> None:
    """Run commands, one after the other or at once, within `limit` seconds altogether; stop what is left then."""
    deadline = time.monotonic() + limit
    waves = [list(jobs)] if side_by_side else [[job] for job in jobs]
    for wave in waves:
        with contextlib.ExitStack() as stack:
            running = []
            for job in wave:
                job.log.parent.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(job.log.open("w"))
                # A session of its own, so that at the limit the children of the command end with it.
                process = subprocess.Popen(
                    job.command, stdout=log, stderr=log, cwd=ROOT, env=dict(job.environment), start_new_session=True
                )
                running.append((job, process, time.monotonic()))
            try:
                for job, process, began in running:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        job.status = process.wait(max(0.1, deadline - time.monotonic()))
                    job.seconds = time.monotonic() - began
            finally:
                for _, process, _ in running:
                    if process.poll() is None:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(process.pid, signal.SIGKILL)
                        process.wait()


def run_one(name: str, command: Sequence[str], environment: Mapping[str, str], limit: float) -> Job:
    """Run one command with its log in build/gpu/logs."""
    job = Job(command, LOGS / f"{name}.log", environment)
    run_all([job], limit)
    return job


def environment(device: str) -> dict[str, str]:
    """The environment of tests and benchmarks: what was built here, and none of the switches of someone's shell."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FINECF_") or k == "FINECF_REALDATA"}
    return inherited | {"PYTHONPATH": str(SITE), "FINECF_TEST_DEVICE": device}


def last_lines(text: str, count: int = 3) -> str:
    """The end of a log on one line."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[-count:])[-500:]


# ---- build -----------------------------------------------------------------------------------------------------------


def architecture(machine: Mapping[str, Any]) -> str:
    """The targets to compile for: FINECF_CUDA_ARCHS, else this GPU's own."""
    chosen = os.environ.get("FINECF_CUDA_ARCHS")
    if chosen:
        return chosen
    major, minor = machine.get("capability", (9, 0))
    return f"{major}{minor}"


def build(machine: Mapping[str, Any], limit: float) -> Outcome:
    """Build with CMake into build/gpu/cmake; put the libraries and a copy of the Python files into build/gpu/site."""
    folder = BUILD / "cmake"
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "FINECF_PYTHON": sys.executable,
        "FINECF_CUDA": "1",
        "FINECF_CUDA_ARCHS": architecture(machine),
        "FINECF_BUILD_EMULATION": "1",
    }
    cmake = tool("cmake") or "cmake"
    jobs = str(min(16, len(os.sched_getaffinity(0))))
    commands = {
        "configure": [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        + [f"-D{key}={value}" for key, value in settings.items()],
        "compile": [cmake, "--build", str(folder), "--parallel", jobs],
        "install": [cmake, "--install", str(folder), "--prefix", str(SITE)],
    }
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(ROOT / "finecf", SITE / "finecf", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    began = time.monotonic()
    flags = " ".join(filter(None, (os.environ.get("NVCC_APPEND_FLAGS"), "-lineinfo")))  # lines for compute-sanitizer
    for name, command in commands.items():
        left = limit - (time.monotonic() - began)
        job = run_one(f"build-{name}", command, os.environ | {"NVCC_APPEND_FLAGS": flags}, left)
        if job.status != 0:
            how = "took too long" if job.status is None else f"ended with status {job.status}"
            return {"state": "failed", "detail": f"{name} {how}: {last_lines(job.text)}"}
    # A library that does not load would leave the tests to plain torch, and they would pass.
    question = "import json, finecf; print('INFO ' + json.dumps(finecf.build_info()))"
    job = run_one("build-load", [sys.executable, "-P", "-c", question], environment("cuda"), 60)
    answers = [line.removeprefix("INFO ") for line in job.text.splitlines() if line.startswith("INFO ")]
    if not answers:
        return {"state": "failed", "detail": f"finecf cannot be imported: {last_lines(job.text)}"}
    info = json.loads(answers[0])
    for half in ("cpu", "cuda"):
        if not info[half]["loaded"]:
            return {"state": "failed", "detail": f"the {half} library does not load: {info[half]['reason']}"}
    warnings = len(re.findall(r"\bwarning\b", (LOGS / "build-compile.log").read_text(errors="replace")))
    return {
        "state": "passed",
        "detail": f"for {settings['FINECF_CUDA_ARCHS']}, {warnings} warnings",
        "archs": settings["FINECF_CUDA_ARCHS"],
        "warnings": warnings,
        "isa": info["cpu"]["isa"],
    }


# ---- tests -----------------------------------------------------------------------------------------------------------


def test_groups(folder: Path) -> dict[str, list[str]]:
    """The tests of each group: folders and files, none of them twice and none left out."""
    named = {name for names in GROUPS.values() for name in names}
    entries = sorted(path for path in folder.iterdir() if path.is_dir() or path.name.startswith("test_"))
    rest = [path for path in entries if path.name not in named and (path.is_file() or any(path.glob("test_*.py")))]
    return {
        group: [str(folder / name) for name in names if (folder / name).is_dir()] if names else [str(p) for p in rest]
        for group, names in GROUPS.items()
    }


def junit_totals(report: Path) -> Outcome | None:
    """Totals of a JUnit file, the failures with their first lines, and how many tests ran a CUDA kernel by name."""
    try:
        suites = list(ET.parse(report).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        return None
    totals: dict[str, Any] = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0, "cuda": 0}
    failures, reasons = [], dict[str, int]()
    for case in (case for suite in suites for case in suite.iter("testcase")):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if problem is not None:
            totals["failed" if problem.tag == "failure" else "errors"] += 1
            message = (problem.get("message") or problem.text or "").strip().splitlines()
            failures.append(f"{name}: {message[0][:300] if message else problem.tag}")
        elif skipped is not None:
            totals["skipped"] += 1
            reason = (skipped.get("message") or "no reason given").strip()
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            totals["passed"] += 1
            totals["cuda"] += bool(re.search(r"[\[-]cuda[\]-]", name))
    return totals | {"failures": failures[:50], "skip_reasons": reasons}


def tests(device: str, limit: float) -> Outcome:
    """Run the whole suite with FINECF_TEST_DEVICE; every group has a report of its own."""
    groups = test_groups(ROOT / "tests")
    jobs = {}
    for group, paths in groups.items():
        name = group.replace(" ", "-")
        report = LOGS / f"tests-{name}.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-P", "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={report}", *paths]
        jobs[group] = Job(command, LOGS / f"tests-{name}.log", environment(device))
    run_all(list(jobs.values()), limit, side_by_side=len(os.sched_getaffinity(0)) >= CORES_FOR_GROUPS)
    totals: dict[str, Any] = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0, "cuda": 0}
    problems: list[str] = []
    states: dict[str, Any] = {}
    for group, job in jobs.items():
        found = junit_totals(LOGS / f"tests-{group.replace(' ', '-')}.xml")
        states[group] = {"seconds": round(job.seconds, 1), **(found or {})}
        if found is None or job.status is None:
            how = "stopped at the time limit" if job.status is None else f"ended with status {job.status}, no report"
            problems.append(f"{group}: {how}: {last_lines(job.text, 1)}")
        elif job.status != 0 or found["failed"] or found["errors"]:
            problems.append(f"{group}: status {job.status}, {found['failed']} failed, {found['errors']} errors")
        for key in totals:
            totals[key] += found[key] if found else 0
    if device == "cuda" and totals["cuda"] == 0:
        problems.append("no test ran the CUDA kernels")
    line = ", ".join(f"{totals[key]} {key}" for key in ("passed", "failed", "errors", "skipped"))
    detail = f"{line}; {totals['cuda']} of them name the CUDA kernels" + "".join(f"; {each}" for each in problems)
    return {"state": "failed" if problems else "passed", "detail": detail, "totals": totals, "groups": states}


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------

# The tool's own errors that say that this machine does not let it work; a program that fails is none of them.
REFUSALS = re.compile(
    r"^(?:internal |sanitizer )*(?:error|warning)\b.*(?:(?:device|driver|gpu|environment) (?:is )?not supported|"
    r"unsupported (?:device|driver|gpu|environment)|insufficient (?:\w+ )?permissions)",
    re.IGNORECASE,
)
SUMMARY = re.compile(
    r"ERROR SUMMARY: (?P<errors>\d+) errors?\b|RACECHECK SUMMARY: (?P<hazards>\d+) hazards? displayed", re.IGNORECASE
)
DONE = re.compile(r"^finecf: (?P<calls>\d+) calls on cuda\b", re.MULTILINE)


def sanitizer_verdict(text: str, status: int | None, done: re.Pattern[str] = DONE) -> Outcome:
    """What a run of compute-sanitizer shows: "passed", "refused" with the reason, or "failed" with what it found.

    It passed only where it says so itself, and where the program under it says that it did all of its work: a tool that
    stops before the first kernel also counts no errors.
    """
    own = [line.lstrip("= ").strip() for line in text.splitlines() if line.startswith("=========")]
    refusal = next((line for line in own if REFUSALS.search(line)), None)
    if refusal:
        return {"state": "refused", "detail": f"refused: {refusal}"}
    counts = [int(found["errors"] or found["hazards"] or 0) for found in SUMMARY.finditer(text)]
    findings = [line for line in own if line and not line.startswith(("COMPUTE-SANITIZER", "Saved host", "Host Frame"))]
    if any(counts):
        return {"state": "failed", "errors": max(counts), "detail": f"{max(counts)} errors: {findings[0]}"}
    if status is None:
        return {"state": "failed", "detail": f"stopped at the time limit: {last_lines(text, 1)}"}
    if status != 0:
        return {"state": "failed", "detail": f"ended with status {status}: {last_lines(text)}"}
    if not counts:
        return {"state": "failed", "detail": f"printed no summary: {last_lines(text)}"}
    finished = done.search(text)
    if not finished:
        return {"state": "failed", "detail": "the cases did not run to their end"}
    calls = finished.groupdict().get("calls")
    return {"state": "passed", "errors": 0, "detail": f"0 errors in {calls} calls" if calls else "0 errors"}


def sanitizer_command(program: str, name: str) -> list[str]:
    """A tool over the kernels of this project alone: PyTorch's own would only make it slow."""
    command = [program, "--tool", name, "--kernel-name", "kns=finecf", "--error-exitcode", "86", "--print-limit", "20"]
    # Calls that fail raise in Python; torch itself asks CUDA what it may not have.
    return [*command, "--report-api-errors", "no"] if name == "memcheck" else command


def build_planted(nvcc: str, arch: str, limit: float) -> tuple[Path, str]:
    """Compile scripts/planted_faults.cu; return the program and, where it was not made, the reason."""
    program = BUILD / "planted_faults"
    program.unlink(missing_ok=True)
    toolkit = Path(nvcc).resolve().parent.parent
    folders = [f"-L{toolkit / name}" for name in ("lib64", "lib") if (toolkit / name).is_dir()]
    source = str(ROOT / "scripts" / "planted_faults.cu")
    command = [nvcc, "-O1", "-lineinfo", f"-arch=sm_{arch}", *folders, source, "-o", str(program)]
    job = run_one("sanitizer-planted-build", command, os.environ, limit)
    return program, "" if job.status == 0 else f"the planted faults do not compile: {last_lines(job.text)}"


def sanitizer(machine: Mapping[str, Any], tools: Mapping[str, str], limit: float) -> Outcome:
    """Each tool over the smallest cases of every operator, after it has found a fault planted for it."""
    program = sanitizer_path(tools.get("NVCC", ""))
    if program is None:
        return {"state": "absent", "detail": "compute-sanitizer is neither beside nvcc nor on PATH", "tools": {}}
    deadline = time.monotonic() + limit
    arch = architecture(machine).split(",")[-1]
    planted, problem = build_planted(tools["NVCC"], arch, min(60, limit))
    if problem:
        return {"state": "failed", "detail": problem, "tools": {}}
    # Without torch's cache every tensor is an allocation of its own, whose end the tools know.
    surroundings = environment("cpu") | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    cases = [sys.executable, "-P", str(ROOT / "scripts" / "sanitizer_cases.py")]
    outcomes: dict[str, Outcome] = {}
    for number, name in enumerate(TOOLS):
        began = time.monotonic()
        share = max(1.0, (deadline - began) / (len(TOOLS) - number))
        command = sanitizer_command(program, name)
        job = run_one(f"sanitizer-{name}-planted", [*command, str(planted), name], surroundings, share / 3)
        check = sanitizer_verdict(job.text, job.status, re.compile("planted"))
        if check["state"] == "refused":
            outcomes[name] = check
        elif not check.get("errors"):
            detail = f"did not find the fault planted for it, so it shows nothing here ({check['detail']})"
            outcomes[name] = {"state": "failed", "detail": detail}
        else:
            left = began + share - time.monotonic()
            job = run_one(f"sanitizer-{name}", [*command, *cases], surroundings, left)
            outcomes[name] = sanitizer_verdict(job.text, job.status)
        outcomes[name]["seconds"] = round(time.monotonic() - began, 1)
        print(f"   {name}: {outcomes[name]['detail'][:200]}", flush=True)
    states = [outcome["state"] for outcome in outcomes.values()]
    state = "failed" if "failed" in states else "refused" if set(states) == {"refused"} else "passed"
    counts = ", ".join(f"{states.count(each)} {each}" for each in ("passed", "refused", "failed") if each in states)
    return {"state": state, "detail": f"{counts} of {len(TOOLS)} tools", "tools": outcomes}


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def benchmarks(device: str, limit: float, note: Callable[[Outcome], None]) -> Outcome:
    """benchmarks/bench_cuda.py in a process of its own; what it wrote before a time limit counts."""
    rows = LOGS / "benchmarks.json"
    rows.unlink(missing_ok=True)
    script = str(ROOT / "benchmarks" / "bench_cuda.py")
    command = [sys.executable, "-P", script, "--device", device, "--json", str(rows), "--seconds", str(limit - 15)]
    if device == "cpu":
        command.append("--quick")
    job = run_one("benchmarks", command, environment(device), limit)
    try:
        found: dict[str, Any] = json.loads(rows.read_text())
    except (OSError, json.JSONDecodeError):
        found = {"rows": []}
    note(found)
    wrong = [row for row in found["rows"] if row.get("state") != "passed"]
    measured = [row for row in found["rows"] if row.get("state") == "passed"]
    problems = [f"{row['operator']} {row['shape']}: {row.get('detail', row.get('state'))}" for row in wrong]
    if job.status is None:
        problems.append("stopped at the time limit")
    elif job.status != 0 and not problems:
        problems.append(f"ended with status {job.status}: {last_lines(job.text)}")
    if not measured:
        problems.append("nothing was measured")
    detail = f"{len(measured)} cases measured" + "".join(f"; {each}" for each in problems[:5])
    left_out = found.get("left_out", [])
    if left_out:
        detail += f"; {len(left_out)} left out"
    return {"state": "failed" if problems else "passed", "detail": detail, **found}


# ---- the table -------------------------------------------------------------------------------------------------------


def wrapped(text: str, indent: int, width: int = 80) -> list[str]:
    """A text in lines of at most `width` columns, all but the first behind `indent` blanks."""
    lines, line = [], ""
    for word in text.split():
        while len(word) > width - indent:
            lines.append((line + " " if line else "") + word[: width - indent - len(line) - bool(line)])
            word, line = word[width - indent - len(line) - bool(line) :], ""
        if line and len(line) + 1 + len(word) > width - indent:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line] if line or not lines else lines


def table(values: Mapping[str, Any]) -> str:
    """The results at 80 columns."""
    machine = values.get("machine", {})
    head = f"{machine.get('gpu', 'no GPU')}, driver {machine.get('driver')}, torch {machine.get('torch')}"
    head += f", nvcc {machine.get('nvcc')}, Python {machine.get('python')}, commit {str(machine.get('commit'))[:9]}"
    lines = [*wrapped(head + (" with changes" if machine.get("dirty") else ""), 0), "-" * 80]
    for stage in STAGES:
        outcome = values.get(stage)
        if outcome is None:
            continue
        first, *more = wrapped(outcome["detail"], 30)
        lines.append(f"{stage:<11}{outcome['state']:<9}{outcome.get('seconds', 0):>6.0f} s  {first}")
        lines += [" " * 30 + line for line in more]
        for name, each in outcome.get("tools", {}).items():
            first, *more = wrapped(each["detail"], 30)
            lines.append(f"  {name:<9}{each['state']:<9}{each.get('seconds', 0):>6.0f} s  {first}")
            lines += [" " * 30 + line for line in more]
    for failure in [f for g in values.get("tests", {}).get("groups", {}).values() for f in g.get("failures", [])][:10]:
        lines += wrapped(f"! {failure}", 0)
    rows = [row for row in values.get("benchmarks", {}).get("rows", []) if row.get("state") == "passed"]
    if rows:
        lines += ["-" * 80, f"{'median ms':<42}{'ours':>9}{'torch':>10}{'ratio':>8}{'roofline':>10}"]
        for row in rows:
            shape, plain = row["shape"], row.get("plain_ms")
            torch_ms = f"{plain['median']:.4g}" if plain else "-"
            ratio = f"{plain['median'] / row['ours_ms']['median']:.3g}x" if plain else "-"
            share = f"{100 * row['share']:.2g} %" if row.get("share") is not None else "-"
            lines.append(row["operator"])
            lines.append(f"  {shape:<40.40}{row['ours_ms']['median']:>9.4g}{torch_ms:>10}{ratio:>8}{share:>10}")
        peaks = values["benchmarks"].get("peaks", {})
        lines += wrapped("peaks: " + ", ".join(f"{k} {v:.3g}" for k, v in peaks.items() if v is not None), 0)
    return "\n".join(lines)


# ---- main ------------------------------------------------------------------------------------------------------------


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="Build, test, check and measure finecf on the GPU of this machine.")
    parser.add_argument("--out", default=os.environ.get("FINECF_GPU_OUT"), help="a folder for a copy of the results")
    parser.add_argument("--stage", action="append", choices=STAGES, help="only this stage (may be repeated)")
    parser.add_argument("--allow-no-gpu", action="store_true", help="try on the CPU what can be tried there")
    return parser.parse_args(given)


def allowance(stage: str, chosen: Sequence[str], left: float) -> float:
    """Seconds for a stage: its limit, or what is left when the stages after it keep their least."""
    later = sum(LEAST[each] for each in chosen[chosen.index(stage) + 1 :])
    return max(10.0, min(LIMITS[stage], left - later))


def main(given: Sequence[str] | None = None) -> int:
    """Run the stages."""
    began = time.monotonic()
    options = arguments(given)
    absent = missing_modules(MODULES)
    if "torch" in absent:
        print(f"finecf: gpu-check needs packages that {sys.executable} lacks: {', '.join(absent)}", file=sys.stderr)
        return 3
    machine = probe()
    no_gpu = machine.pop("no_gpu", None)
    if no_gpu and not options.allow_no_gpu:
        print(f"finecf: gpu-check needs a GPU: {no_gpu}", file=sys.stderr)
        return 2
    tools = located()
    absent += missing_tools()
    if not tools.get("NVCC"):
        absent.append(f"nvcc ({tools.get('NVCC_NOTE') or 'cmake/locate.py does not answer'})")
    if absent:
        print(f"finecf: gpu-check lacks here: {', '.join(absent)}", file=sys.stderr)
        return 3
    device = "cpu" if no_gpu else "cuda"
    name = slug(str(machine.get("gpu", "no gpu")))
    files = [(BUILD if no_gpu else RESULTS) / f"{name}.json"]
    if options.out:
        files.append(Path(options.out) / f"{name}.json")
    report = Report(files)
    machine |= {"driver": driver_version(), "nvcc": tools.get("NVCC_VERSION"), "cores": len(os.sched_getaffinity(0))}
    machine |= commit()
    without = missing_modules(OPTIONAL)
    if without:
        print(f"finecf: without {', '.join(without)} the tests that need them are skipped")
    report.put("date", datetime.datetime.now(datetime.UTC).date().isoformat())
    report.put("machine", machine | {"not_installed": without})
    chosen = [stage for stage in STAGES if not options.stage or stage in options.stage]
    if chosen != ["build"] and "build" not in chosen and not (SITE / "finecf" / "_C.so").exists():
        chosen.insert(0, "build")
    for stage in chosen:
        limit = allowance(stage, chosen, LIMIT - (time.monotonic() - began))
        print(f"== {stage} (at most {limit:.0f} s)", flush=True)
        start = time.monotonic()
        if stage == "build":
            outcome = build(machine, limit)
        elif stage == "tests":
            outcome = tests(device, limit)
        elif stage == "sanitizer" and no_gpu:
            outcome = {"state": "absent", "detail": "there is no GPU", "tools": {}}
        elif stage == "sanitizer":
            outcome = sanitizer(machine, tools, limit)
        else:
            outcome = benchmarks(device, limit, lambda found: report.put("benchmarks", {"state": "running", **found}))
        outcome["seconds"] = round(time.monotonic() - start, 1)
        report.put(stage, outcome)
        print(f"   {outcome['state']}, {outcome['seconds']:.0f} s: {outcome['detail'][:400]}", flush=True)
        if stage == "build" and not passed(outcome):
            break
    good = all(passed(report.values[stage]) for stage in chosen if stage in report.values)
    report.put("passed", good and all(stage in report.values for stage in chosen))
    report.put("seconds", round(time.monotonic() - began, 1))
    if options.out:
        for log in LOGS.glob("*.log"):
            shutil.copy(log, options.out)
    print(f"\n{table(report.values)}\n{'-' * 80}")
    print(f"{'passed' if report.values['passed'] else 'FAILED'} in {report.values['seconds']:.0f} s; {files[0]}")
    return 0 if report.values["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
