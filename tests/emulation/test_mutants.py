"""Faults put into the real kernels must be caught by the emulation. A mutant that survives fails the test; so does a
mutation whose text is no longer in the source.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from emulation import sanitizer

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SEEDS = range(3)

SCORES, REPLACEMENT, WALKS, GAINS, COMPOSITION = 1, 2, 3, 4, 5
"""The operator that mutant_main.cpp runs."""


class Mutant(NamedTuple):
    """A change of one line of a kernel, and how the emulation must notice it."""

    file: str
    line: str
    change: str
    case: int
    caught_as: str


BARRIER = "__syncthreads();  // the slab is whole"

MUTANTS = {
    "removed barrier": Mutant("simt/tile.cuh", BARRIER, "", SCORES, "wrong"),
    "removed second barrier": Mutant(
        "simt/tile.cuh", "__syncthreads();  // nobody reads the slab any more", "", SCORES, "wrong"
    ),
    "removed barrier after staging": Mutant(
        "shapley/shapley_kernel.cuh", "__syncthreads();  // the game is staged", "", WALKS, "wrong"
    ),
    "divergent barrier": Mutant(
        "simt/tile.cuh",
        BARRIER,
        "if (threadIdx.x < 64) { __syncthreads(); } else {\n __syncthreads(); }",
        SCORES,
        "fault",
    ),
    "barrier for some threads": Mutant(
        "replacement/replacement_kernel.cuh",
        "__syncthreads();  // the next tile overwrites the losses",
        "if (warp != 0) __syncthreads();",
        REPLACEMENT,
        "fault",
    ),
    "out-of-bounds read": Mutant(
        "shapley/shapley_kernel.cuh",
        "return first + column < classes && p < cells ?",
        "return first + column < classes ?",
        SCORES,
        "fault",
    ),
    "off-by-one index": Mutant(
        "simt/tile.cuh", "fetch(from + kTileDepth);", "fetch(from + kTileDepth - 1);", SCORES, "wrong"
    ),
    "wrong shuffle width": Mutant(
        "shapley/shapley_kernel.cuh", "for (int offset = 8; offset", "for (int offset = 4; offset", SCORES, "wrong"
    ),
    "a lane too few in a mask": Mutant(
        "simt/reduce.cuh",
        "__shfl_xor_sync(kAllLanes, best.cell, offset)",
        "__shfl_xor_sync(kAllLanes >> 1, best.cell, offset)",
        REPLACEMENT,
        "fault",
    ),
    "tie to the highest index": Mutant(
        "simt/reduce.cuh", "a.candidate < b.candidate", "a.candidate > b.candidate", REPLACEMENT, "wrong"
    ),
    "last partial tile dropped": Mutant(
        "simt/tile.cuh", "from < depth; from +=", "from + kTileDepth <= depth; from +=", SCORES, "wrong"
    ),
    "guard dropped": Mutant(
        "replacement/replacement_kernel.cuh",
        "static_cast<double>(mine) <= bar)",
        "static_cast<double>(mine) < least)",
        REPLACEMENT,
        "wrong",
    ),
    "removed barrier after staging a choice": Mutant(
        "regions/regions_kernel.cuh", "__syncthreads();  // the choice of output i is staged", "", COMPOSITION, "wrong"
    ),
    "choice of the output before": Mutant(
        "regions/regions_kernel.cuh",
        "chosen[s] = keep[i * regions + s];",
        "chosen[s] = keep[(i > 0 ? i - 1 : 0) * regions + s];",
        COMPOSITION,
        "wrong",
    ),
    "pixels beyond the last": Mutant(
        "regions/regions_kernel.cuh", "if (pixel < p.pixels) {", "if (pixel <= p.pixels) {", COMPOSITION, "fault"
    ),
    "complement at the wrong place": Mutant(
        "regions/regions_kernel.cuh",
        "write_pixel(p, b, outputs + i, pixel, !kept);",
        "write_pixel(p, b, outputs + i, pixel, kept);",
        COMPOSITION,
        "wrong",
    ),
    "tie to the highest candidate": Mutant("simt/reduce.cuh", "a.cell < b.cell :", "a.cell > b.cell :", GAINS, "wrong"),
    "the candidate's own distance dropped": Mutant(
        "submodular/submodular_kernel.cuh",
        "if (warp_sum(others) != 0) effectiveness",
        "if (warp_sum(others) < 0) effectiveness",
        GAINS,
        "wrong",
    ),
    "maximum of a lane alone": Mutant("submodular/submodular_kernel.cuh", "peak = warp_max(peak);", "", GAINS, "wrong"),
    "every second row dropped": Mutant(
        "submodular/submodular_kernel.cuh",
        "for (int64_t r = lane; r < rows; r += kWarp) {",
        "for (int64_t r = lane; r < rows; r += 2 * kWarp) {",
        GAINS,
        "wrong",
    ),
}


SEEN_BY_SANITIZERS = {
    "a score too many": Mutant(
        "shapley/shapley_kernel.cuh",
        "i < images * count; i += step) {\n    const int64_t b = i / count, m = i % count;\n    LogSum total",
        "i <= images * count; i += step) {\n    const int64_t b = i / count, m = i % count;\n    LogSum total",
        SCORES,
        "AddressSanitizer: use-after-poison",
    ),
    "a bit for the thread, not for the lane": Mutant(
        "simt/tile.cuh",
        BARRIER,
        "volatile unsigned bit = 1u << threadIdx.x; (void) bit; __syncthreads();",
        SCORES,
        "runtime error: shift exponent",
    ),
    "an index that wraps": Mutant(
        "simt/tile.cuh",
        BARRIER,
        "volatile int index = 0x7fffffff; index = index + int(threadIdx.x); __syncthreads();",
        SCORES,
        "runtime error: signed integer overflow",
    ),
}
"""Faults within the padding of arrays, or without effect on this processor: the plain emulation finds nothing."""


def mutated(folder: Path, mutant: Mutant) -> Path:
    """The sources in `folder` with the change in them."""
    tree = folder / "csrc"
    shutil.copytree(CSRC, tree, ignore=shutil.ignore_patterns("*.cpp", "*.cu", "common", "emulation"))
    source = (tree / mutant.file).read_text()
    assert source.count(mutant.line) == 1, f"{mutant.file} must hold {mutant.line!r} once: adapt the mutation"
    (tree / mutant.file).write_text(source.replace(mutant.line, mutant.change))
    return tree


def compiled(build, tree: Path, case: int, *flags: str) -> Path:
    return build(HERE / "mutant_main.cpp", "mutant", *flags, "-Wno-unused", f"-DFINECF_CASE={case}", csrc=tree)


def outcomes(build, tree: Path, case: int) -> list[str]:
    program = compiled(build, tree, case, "-O0")
    runs = []
    for seed in SEEDS:
        done = subprocess.run([program, str(seed)], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
        runs.append(done.stdout.strip())
    return runs


@pytest.mark.parametrize("case", [SCORES, REPLACEMENT, WALKS, GAINS, COMPOSITION])
def test_the_kernels_as_they_are_pass(build, case: int) -> None:
    assert outcomes(build, CSRC, case) == ["right"] * len(SEEDS)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(build, tmp_path: Path, name: str) -> None:
    mutant = MUTANTS[name]
    caught = [said.split()[0] for said in outcomes(build, mutated(tmp_path, mutant), mutant.case)]
    assert mutant.caught_as in caught, f"{name}: survived with {caught}"


def sanitized(build, compiler: str, tree: Path, case: int) -> subprocess.CompletedProcess[str]:
    surroundings = sanitizer.environment(compiler)
    program = compiled(build, tree, case, *sanitizer.FLAGS, "-O0")
    return subprocess.run([program, "0"], env=surroundings, capture_output=True, text=True, timeout=120, check=False)


def test_the_sanitizers_find_nothing_in_the_kernels_as_they_are(build, compiler: str) -> None:
    done = sanitized(build, compiler, CSRC, SCORES)
    assert (done.returncode, done.stdout.strip()) == (0, "right"), done.stderr


@pytest.mark.parametrize("name", SEEN_BY_SANITIZERS)
def test_a_mutant_is_caught_by_the_sanitizers(build, compiler: str, tmp_path: Path, name: str) -> None:
    mutant = SEEN_BY_SANITIZERS[name]
    tree = mutated(tmp_path, mutant)
    done = sanitized(build, compiler, tree, mutant.case)
    assert done.returncode != 0
    assert mutant.caught_as in done.stderr
    assert f"{Path(mutant.file).name}:" in done.stderr
    assert outcomes(build, tree, mutant.case) == ["right"] * len(SEEDS), "needs no sanitizer: put it with the others"
