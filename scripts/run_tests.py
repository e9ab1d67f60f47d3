"""Runs the tests in the three states that a user's machine can be in, and prints the totals in plain words.

1. as built: the whole suite (without what is marked slow);
2. FINECF_BACKEND=reference: operators and the explainers that call them on the plain-torch twins by choice;
3. no shared objects: the same on a copy of the package that has none, as after FINECF_BUILD=0.

The files of tests are shared among as many processes as there are cores, up to MOST; `-n 0` runs them in one. Torch has
one thread in each, unless OMP_NUM_THREADS says otherwise: more would wait for each other at every small tensor. Tests
that are about threads set their number themselves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Mirror-CFE calls no operator.
THRICE = ("tests/ops", "tests/explainers", "--ignore-glob=*/test_mirror*.py")
MOST = 4


def run(name: str, folder: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> tuple[str, bool]:
    """Run pytest in a folder; return a line of totals and whether everything passed."""
    print(f"== {name}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        # By file, since modules have fixtures that are dear.
        shared = ("-n", str(min(MOST, os.cpu_count() or 1)), "--dist", "loadfile")
        command = [sys.executable, "-P", "-m", "pytest", "-q", f"--junitxml={report}", *shared, *arguments]
        # PYTHONPATH comes before the folder that the editable install adds: the copy under test is the one imported.
        inherited = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(folder)} | environment
        status = subprocess.run(command, cwd=folder, env=inherited, check=False).returncode
        suite = ET.parse(report).getroot().find("testsuite") if report.exists() else None
    seconds = time.monotonic() - began
    if suite is None:
        return f"{name}: no report, pytest ended with status {status}", False
    total, failed, errors, skipped = (int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped"))
    line = (
        f"{name}: {total - failed - errors - skipped} passed, {failed} failed, {errors} errors, {skipped} skipped, "
        f"{seconds:.0f} s"
    )
    return line, status == 0 and total > 0


def copy_without_libraries(folder: Path) -> None:
    """Copy the package and the tests, but no shared object."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("finecf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)


def main() -> int:
    """Run all three; extra arguments go to pytest in each."""
    extra = tuple(sys.argv[1:])
    results = [run("as built", ROOT, extra, {})]
    results.append(run("reference backend", ROOT, (*THRICE, *extra), {"FINECF_BACKEND": "reference"}))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy_without_libraries(folder)
        realdata = os.environ.get("FINECF_REALDATA") or str(ROOT.parent / "shared" / "realdata")
        arguments = (*THRICE, "tests/test_native.py", *extra)
        results.append(run("no shared objects", folder, arguments, {"FINECF_REALDATA": realdata}))
    print("\n== totals", *(line for line, _ in results), sep="\n")
    return 0 if all(passed for _, passed in results) else 1


if __name__ == "__main__":
    sys.exit(main())
