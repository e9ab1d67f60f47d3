"""Runs the tests in the three states that a user's machine can be in, and prints the totals in plain words.

1. as built: the whole suite (without what is marked slow);
2. FINECF_BACKEND=reference: operators and explainers on the plain-torch twins by choice;
3. no shared objects: operators and explainers on a copy of the package that has none, as after FINECF_BUILD=0.
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
TWICE = ("tests/ops", "tests/explainers")


def run(name: str, folder: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> tuple[str, bool]:
    """Run pytest in a folder; return a line of totals and whether everything passed."""
    print(f"== {name}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-P", "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
        # PYTHONPATH comes before the folder that the editable install adds: the copy under test is the one imported.
        inherited = os.environ | {"PYTHONPATH": str(folder)} | environment
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
    results.append(run("reference backend", ROOT, (*TWICE, *extra), {"FINECF_BACKEND": "reference"}))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy_without_libraries(folder)
        realdata = os.environ.get("FINECF_REALDATA") or str(ROOT.parent / "shared" / "realdata")
        arguments = (*TWICE, "tests/test_native.py", *extra)
        results.append(run("no shared objects", folder, arguments, {"FINECF_REALDATA": realdata}))
    print("\n== totals", *(line for line, _ in results), sep="\n")
    return 0 if all(passed for _, passed in results) else 1


if __name__ == "__main__":
    sys.exit(main())
