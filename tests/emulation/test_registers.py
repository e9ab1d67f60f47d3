"""What nvcc makes of every CUDA kernel: no spills, no stack, and the registers and shared memory of registers.json.

Run with FINECF_UPDATE_REGISTERS=1 to write that file anew after a change of the kernels or of nvcc.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TABLE = HERE / "registers.json"
ARCHITECTURES = ("80", "90", "100", "120")
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*/*_cuda.cu"))
MOST_REGISTERS = 168
"""Three blocks of 128 threads fit a multiprocessor's 65,536 registers at this many a thread."""

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def located() -> dict[str, str]:
    """What the build compiles with: see cmake/locate.py."""
    found = subprocess.run([sys.executable, ROOT / "cmake" / "locate.py"], capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in found.stdout.splitlines())


def plain_name(symbol: str) -> str:
    """`finecf::cosine_tiles<float>(...)` as cosine_tiles<float>."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\((?:int|bool)\)", "", name).split("(")[0]
    return name.removeprefix("void ").removeprefix("finecf::")


def measure(source: str, tools: dict[str, str], folder: Path) -> dict[str, dict[str, list[int]]]:
    """Compile one file, warnings being errors; {kernel: {architecture: [registers, bytes of static shared memory]}}."""
    include = tools["TORCH_INCLUDE"]
    command = [tools["NVCC"], "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-DUSE_CUDA"]
    command += [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
        f"-I{ROOT}/csrc",
    ]
    command += ["-isystem", include, "-isystem", f"{include}/torch/csrc/api/include", "-Xcompiler", "-fPIC"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command += ["-c", str(ROOT / source), "-o", str(folder / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    found: dict[str, dict[str, list[int]]] = {}
    for entry in ENTRY.finditer(done.stdout + done.stderr):
        name = plain_name(entry["name"])
        if "EmptyKernel" in name:  # CUB's, in every file that includes it
            continue
        spilled = [int(entry[key]) for key in ("stack", "stores", "loads")]
        assert spilled == [0, 0, 0], f"{name} on sm_{entry['arch']}: stack, spill stores, spill loads = {spilled} bytes"
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        found.setdefault(name, {})[entry["arch"]] = [int(entry["registers"]), int(shared[1]) if shared else 0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_registers_and_shared_memory(source: str, tmp_path: Path) -> None:
    tools = located()
    if not tools["NVCC"] or not shutil.which("c++filt"):
        pytest.skip(f"no nvcc or no c++filt: {tools['NVCC_NOTE'] or 'install binutils'}")
    found = measure(source, tools, tmp_path)
    assert found
    for name, of_arch in found.items():
        assert sorted(of_arch) == sorted(ARCHITECTURES), name
        assert max(registers for registers, _ in of_arch.values()) <= MOST_REGISTERS, f"{name}: {of_arch}"
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if os.environ.get("FINECF_UPDATE_REGISTERS") == "1":
        kernels = table.get("kernels", {}) | {source: dict(sorted(found.items()))}
        lines = []
        for file, rows in sorted(kernels.items()):
            row = ",\n".join(f"   {json.dumps(name)}: {json.dumps(values)}" for name, values in rows.items())
            lines.append(f"  {json.dumps(file)}: {{\n{row}\n  }}")
        TABLE.write_text(f'{{\n "nvcc": "{tools["NVCC_VERSION"]}",\n "kernels": {{\n' + ",\n".join(lines) + "\n }\n}\n")
        return
    assert table["kernels"][source].keys() == found.keys()
    if table["nvcc"] == tools["NVCC_VERSION"]:  # another compiler may well choose otherwise, within the limit above
        assert table["kernels"][source] == found
