"""What every CUDA kernel takes of a multiprocessor: registers, static and dynamic shared memory, stack, spills.

registers.json holds it, and its "note" says how each number is obtained. Run with FINECF_UPDATE_REGISTERS=1, and with
`-m "slow or not slow"`, to write that file anew after a change of the kernels or of nvcc.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sizes
from emulation import sanitized_cases, test_emulated_regions, test_emulated_replacement, test_emulated_shapley
from emulation import test_emulated_submodular as submodular

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TABLE = HERE / "registers.json"
ARCHITECTURES = ("80", "90", "100", "120")
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*/*_cuda.cu"))
MOST_REGISTERS = 168
"""The limit for any kernel: at it, three blocks of 128 threads fit the 65,536 registers of a multiprocessor."""
COLUMNS = ["registers", "static shared", "stack", "spill stores", "spill loads"]
SHARED_LIMITS = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024, "120": 99 * 1024}
"""Bytes of shared memory that a block may have, by NVIDIA's table of compute capabilities."""
NOTE = [
    "kernels: per kernel and target, the columns as ptxas -v reports them; all but registers are in bytes.",
    "dynamic_shared: per launch and target, the bytes that the driver asks for, as the launcher of the host emulation",
    "notes them (Plan(only_plan=True), told the target's limit of shared memory) at the sizes of the file, the most of",
    "any value, version and number of cells. Sizes: B images, P cells, C classes, M masks and permutations, N",
    "candidates, D channels, K nearest, m regions, H = W pixels a side.",
]
SIZES = {"B": 8, "P": [49, 196], "C": 200, "M": 256, "N": 5994, "D": 512, "K": 2048, "m": 49, "H": 224}

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
    """Compile one file, warnings being errors; {kernel: {architecture: the columns}}."""
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
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        spilled = [int(entry[key]) for key in ("stack", "stores", "loads")]
        columns = [int(entry["registers"]), int(shared[1]) if shared else 0, *spilled]
        found.setdefault(name, {})[entry["arch"]] = columns
    return found


def read_table() -> dict[str, Any]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write_table(table: dict[str, Any]) -> None:
    """One kernel a line."""

    def rows(of_kernel: dict[str, Any], indent: int) -> str:
        pad = " " * indent
        lines = {name: dict(sorted(row.items(), key=lambda item: int(item[0]))) for name, row in of_kernel.items()}
        return ",\n".join(f"{pad} {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(lines.items()))

    files = ",\n".join(
        f"  {json.dumps(file)}: {{\n{rows(of_kernel, 2)}\n  }}" for file, of_kernel in sorted(table["kernels"].items())
    )
    head = {"note": NOTE, "nvcc": table["nvcc"], "most_registers": MOST_REGISTERS, "columns": COLUMNS}
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    parts.append(f' "kernels": {{\n{files}\n }}')
    parts.append(f' "sizes": {json.dumps(SIZES)}')
    parts.append(f' "dynamic_shared": {{\n{rows(table["dynamic_shared"], 1)}\n }}')
    TABLE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


updating = os.environ.get("FINECF_UPDATE_REGISTERS") == "1"


def asked_for(emulated: ModuleType) -> dict[str, dict[str, int]]:
    """{launch: {architecture: the most bytes of dynamic shared memory}} at the sizes of the table."""
    most: dict[str, dict[str, int]] = {}

    def ask(operator: str, arguments: dict[str, Any]) -> None:
        for arch, limit in SHARED_LIMITS.items():
            for version in ("naive", "fast"):
                plan = emulated.Plan(version=version, shared_limit=limit, only_plan=True)
                getattr(emulated, operator)(**arguments, plan=plan)
                for kernel, _, _, dynamic in emulated.launches():
                    of_kernel = most.setdefault(kernel, {})
                    of_kernel[arch] = max(dynamic, of_kernel.get(arch, 0))

    images, classes, rows = SIZES["B"], SIZES["C"], SIZES["N"]
    for cells in SIZES["P"]:
        g = test_emulated_shapley.game(images, cells, classes, SIZES["M"])
        both = {name: g[name] for name in ("cell_logits", "base_logits", "target")}
        for value in sizes.VALUES:
            ask("masked_class_scores", both | {"masks": g["masks"], "value": value})
            walks = {"permutations": g["permutations"], "value": value, "antithetic": True}
            ask("permutation_shapley_tiles", both | walks)
    # One walk an image is too few to stage.
    ask("permutation_shapley_tiles", both | walks | {"permutations": g["permutations"][:1], "value": "prob"})
    rng = np.random.default_rng(0)
    query, bank = (rng.random((n, SIZES["D"]), dtype=np.float32) for n in (SIZES["P"][0], rows))
    for k in (SIZES["K"], SIZES["K"] + 1):
        ask("nearest_candidates", {"query": query, "bank": bank, "k": k})
    p = test_emulated_replacement.problem(images, SIZES["P"][0], classes, rows)
    base, logits = test_emulated_replacement.start_logits(p)
    for listed in (None, np.zeros((images, SIZES["P"][0], 10), np.int64)):
        p |= {"shortlist": listed}
        allowed = np.ones((images, SIZES["P"][0]), bool)
        ask("best_replacement", p | {"logits": logits, "allowed": allowed, "used": None})
        search = {"base_logits": base, "cell_scores": allowed, "top_cells": 20, "max_edits": 2}
        ask("replace_until_flip", p | search | {"reuse_candidates": False})
    ask("submodular_gains", submodular.problem(SIZES["m"] * images, images, SIZES["m"], classes))
    pictures = (2 * SIZES["m"], images, 3, SIZES["H"], SIZES["H"])
    composition = test_emulated_regions.composition(*pictures, SIZES["m"])
    ask("compose_regions", composition | {"complement": True, "channels_last": False})
    ask("rank_masks", test_emulated_regions.masking(*pictures) | {"insert": True})
    return most


def test_dynamic_shared_memory(emulated: ModuleType) -> None:
    found, table = asked_for(emulated), read_table()
    assert found.keys() == sanitized_cases.launched_kernels()
    for launch, of_arch in found.items():
        of_kernel = [
            by_arch
            for of_file in table["kernels"].values()
            for name, by_arch in of_file.items()
            if name.split("<")[0] == launch.split()[0]
        ]
        assert of_kernel, f"{launch} is not among the kernels of {TABLE.name}"
        for arch, dynamic in of_arch.items():
            static = max(by_arch[arch][1] for by_arch in of_kernel)
            assert dynamic + static <= SHARED_LIMITS[arch], f"{launch} on sm_{arch}: {dynamic} + {static} bytes"
    if updating:
        write_table(table | {"dynamic_shared": found})
        return
    assert table["sizes"] == SIZES
    assert table["dynamic_shared"] == found


def test_the_table_is_within_the_limits() -> None:
    """What is checked in has no stack, no spill, and no kernel past the limit of registers."""
    table = read_table()
    assert table["columns"] == COLUMNS
    assert table["most_registers"] == MOST_REGISTERS
    assert sorted(table["kernels"]) == SOURCES
    for of_file in table["kernels"].values():
        for name, of_arch in of_file.items():
            assert sorted(of_arch) == sorted(ARCHITECTURES), name
            for registers, _, *spilled in of_arch.values():
                assert registers <= MOST_REGISTERS, name
                assert spilled == [0, 0, 0], name


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_registers_spills_and_static_shared_memory(source: str, tmp_path: Path) -> None:
    tools = located()
    if not tools["NVCC"] or not shutil.which("c++filt"):
        pytest.skip(f"no nvcc or no c++filt: {tools['NVCC_NOTE'] or 'install binutils'}")
    found = measure(source, tools, tmp_path)
    assert found
    for name, of_arch in found.items():
        assert sorted(of_arch) == sorted(ARCHITECTURES), name
        for arch, (registers, _, *spilled) in of_arch.items():
            assert spilled == [0, 0, 0], f"{name} on sm_{arch}: {COLUMNS[2:]} = {spilled} bytes"
            assert registers <= MOST_REGISTERS, f"{name} on sm_{arch}: {registers} registers"
    table = read_table()
    if updating:
        kernels = table.get("kernels", {}) | {source: found}
        write_table({"dynamic_shared": {}} | table | {"nvcc": tools["NVCC_VERSION"], "kernels": kernels})
        return
    assert table["kernels"][source].keys() == found.keys()
    if table["nvcc"] == tools["NVCC_VERSION"]:  # another compiler may well choose otherwise, within the limits above
        assert table["kernels"][source] == found
