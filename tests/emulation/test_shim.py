"""The host emulation itself: right programs run in any thread order, wrong ones end with a message that says where."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from emulation import sanitizer

SOURCE = Path(__file__).with_name("shim_cases.cpp")
SWITCHES = ["own", "ucontext"] if platform.machine() in ("x86_64", "aarch64") else ["ucontext"]

FAULTS = {
    "divergent_barrier": "divergent __syncthreads(): thread",
    "barrier_after_return": "return",
    "mask_without_caller": "__shfl_sync with mask 0x0000ffff, which lacks the calling lane",
    "returned_lane": "return",
    "missing_lane": "lane 20 does not exist in this block",
    "reads_outside_mask": "reads lane 16, which is outside the mask 0x0000ffff",
    "two_collectives": "waits for this lane in __a",
    "warp_barrier_without_caller": "__syncwarp with mask 0x0000ffff, which lacks the calling lane",
    "warp_barrier_after_return": "return",
    "differing_masks": "in __any_sync",
    "deadlock": "deadlock; thread",
    "bad_width": "shuffle width 12 is not a power of two up to 32",
    "past_dynamic_shared": "wrote past the end of dynamic shared memory",
    "far_past_dynamic_shared": "outside every array of this launch and the thread's own stack",
    "past_static_shared": "wrote past the end of the static shared array of",
    "too_much_shared": "static shared memory of 65536 bytes; 49152 is the limit",
    "past_array": "outside every array of this launch and the thread's own stack",
    "before_array": "outside every array of this launch and the thread's own stack",
    "endless_stack": "outside every array of this launch and the thread's own stack",
    "too_many_threads": "a block has 1 to 1024 threads, not 1025",
}
NAMES_THREAD_AND_LINE = {
    "divergent_barrier",
    "barrier_after_return",
    "mask_without_caller",
    "returned_lane",
    "missing_lane",
    "reads_outside_mask",
    "two_collectives",
    "warp_barrier_without_caller",
    "warp_barrier_after_return",
    "differing_masks",
    "deadlock",
    "bad_width",
}


@pytest.fixture(scope="module", params=SWITCHES)
def program(request: pytest.FixtureRequest, build) -> Path:
    """The cases with the context switch of this processor, and with the portable one."""
    flags = ["-DSIMT_UCONTEXT=1"] if request.param == "ucontext" else []
    return build(SOURCE, f"shim_cases-{request.param}", "-O1", *flags)


def outcome(program: Path, case: str, seed: int = 0) -> str:
    done = subprocess.run([program, case, str(seed)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{case}: status {done.returncode}, {done.stderr}"
    return done.stdout.strip()


@pytest.mark.parametrize("seed", range(4))
def test_a_right_kernel_is_right_in_any_order(program: Path, seed: int) -> None:
    sums, order = outcome(program, "sum_block", seed).removeprefix("ok").split("|")
    numbers = [float(i % 7) for i in range(1024)]
    assert [float(x) for x in sums.split()] == [sum(numbers[i : i + 256]) for i in range(0, 1024, 256)]
    threads = [int(x) for x in order.split()]
    for start in range(0, 1024, 256):
        assert sorted(threads[start : start + 256]) == list(range(256))
        assert threads[start : start + 256] != list(range(256))


def test_the_seed_decides_the_order(program: Path) -> None:
    assert outcome(program, "sum_block", 1) == outcome(program, "sum_block", 1)
    assert outcome(program, "sum_block", 1) != outcome(program, "sum_block", 2)


def test_shuffles_and_votes(program: Path) -> None:
    values = [int(x) for x in outcome(program, "shuffle_all_ways").split()[1:]]
    for lane in range(32):
        first, place = lane // 8 * 8, lane % 8
        assert values[8 * lane : 8 * lane + 8] == [
            3,
            first + 3,
            lane - 2 if place >= 2 else lane,
            lane + 2 if place < 6 else lane,
            first + (place ^ 5),
            0xAAAAAAAA - 2**32,
            0,
            1,
        ]


def test_parts_of_a_warp_under_their_own_masks(program: Path) -> None:
    values = [int(x) for x in outcome(program, "halves").split()[1:33]]
    assert values == [lane ^ 1 if lane < 16 else lane ^ 2 for lane in range(32)]


def test_shuffles_carry_64_bits(program: Path) -> None:
    values = [float(x) for x in outcome(program, "shuffle_wide").split()[1:]]
    assert values[:32] == [lane ^ 1 for lane in range(32)]
    assert values[32:] == [min(lane + 3, lane if lane > 28 else 31) for lane in range(32)]


@pytest.mark.parametrize("seed", range(4))
def test_a_warp_barrier_of_some_lanes(program: Path, seed: int) -> None:
    values = [int(x) for x in outcome(program, "meet_in_part", seed).split()[1:]]
    assert values[:24] == [7 - lane if lane < 8 else 31 - lane for lane in range(24)]
    assert values[24:32] == [-7] * 8


def test_threads_and_blocks_on_three_axes(program: Path) -> None:
    values = [int(x) for x in outcome(program, "three_axes", 3).split()[1:]]
    assert values == [100 * block + thread for block in range(24) for thread in range(30)]


@pytest.mark.parametrize("seed", range(3))
def test_atomics(program: Path, seed: int) -> None:
    total = 255 * 128
    values = [int(x) for x in outcome(program, "atomics", seed).split()[1:]]
    assert values == [total, -total, -100, 255, 255, ~255, 0, 512, 1, 1]


def test_shared_memory_is_poisoned_for_every_block(program: Path) -> None:
    values = outcome(program, "leftovers", 1).split()[1:]
    assert len(values) == 96
    assert all("nan" in value for value in values)


def test_shared_memory_is_nan_until_written(program: Path) -> None:
    values = outcome(program, "unwritten_shared").split()[1:]
    assert "nan" in values[0]
    assert values[1:] == ["2"] * 63


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_named(program: Path, case: str) -> None:
    for seed in range(3):
        said = outcome(program, case, seed)
        assert said.startswith("fault ")
        assert FAULTS[case] in said
        assert f"kernel {case}" in said
        if case in NAMES_THREAD_AND_LINE:
            assert "block (0,0,0)" in said
            assert "thread (" in said
            assert "shim_cases.cpp:" in said


# Of an endless stack it depends on the addresses whether it is reported as such or as a bad access.
SANITIZER_FINDS = {
    "past_array": "AddressSanitizer: SEGV",
    "into_padding": "AddressSanitizer: use-after-poison",
    "past_static_shared": "AddressSanitizer: use-after-poison",
    "past_dynamic_shared": "AddressSanitizer: use-after-poison",
    "endless_stack": "AddressSanitizer: ",
    "shift_too_far": "runtime error: shift exponent 32 is too large",
    "overflow": "runtime error: signed integer overflow",
}


@pytest.fixture(scope="module")
def sanitized(build, compiler: str) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """The cases with the sanitizers: fibers and their stacks must not confuse these."""
    surroundings = sanitizer.environment(compiler)
    program = build(SOURCE, "shim_cases-sanitized", *sanitizer.FLAGS)

    def run(case: str) -> subprocess.CompletedProcess[str]:
        command = [program, case, "1"]
        return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=60, check=False)

    return run


@pytest.mark.parametrize("case", SANITIZER_FINDS)
def test_sanitizers_name_the_line(sanitized: Callable[[str], subprocess.CompletedProcess[str]], case: str) -> None:
    done = sanitized(case)
    assert done.returncode != 0
    assert SANITIZER_FINDS[case] in done.stderr
    assert "shim_cases.cpp:" in done.stderr


@pytest.mark.parametrize("case", ["sum_block", "halves", "meet_in_part", "atomics", "leftovers", "shuffle_wide"])
def test_sanitizers_are_silent_about_right_kernels(
    sanitized: Callable[[str], subprocess.CompletedProcess[str]], program: Path, case: str
) -> None:
    done = sanitized(case)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, outcome(program, case, 1), "")


@pytest.mark.parametrize("case", ["divergent_barrier", "returned_lane", "deadlock"])
def test_faults_are_named_under_the_sanitizers(
    sanitized: Callable[[str], subprocess.CompletedProcess[str]], case: str
) -> None:
    done = sanitized(case)
    assert done.returncode == 0
    assert FAULTS[case] in done.stdout
