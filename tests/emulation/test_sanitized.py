"""Every emulated kernel under the address and the undefined-behaviour sanitizer, in a process of its own; and proof
that such a run can fail. Faults that only a sanitizer sees are put into kernels in test_mutants.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import sizes
from emulation import float64, sanitized_cases, sanitizer, test_emulated_shapley
from emulation.sanitized_cases import Call

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"

Run = Callable[[Sequence[tuple[str, Call]], Sequence[int]], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(build, compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Calls in a process with a sanitized `_finecf_emulated`."""
    surroundings = sanitizer.environment(compiler)
    pybind11 = pytest.importorskip("pybind11", reason="the emulation module needs pybind11 to be built")
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    shared = ("-fPIC", "-shared", "-fvisibility=hidden", *includes)
    name = "_finecf_emulated" + sysconfig.get_config_var("EXT_SUFFIX")
    module = build(CSRC / "emulation" / "module.cpp", name, *sanitizer.FLAGS, *shared)

    def run_calls(calls: Sequence[tuple[str, Call]], seeds: Sequence[int]) -> subprocess.CompletedProcess[str]:
        path = tmp_path_factory.mktemp("calls") / "calls.npz"
        sanitized_cases.write(path, calls, seeds)
        command = [sys.executable, "-P", str(HERE / "sanitized_run.py"), str(module), str(path)]
        return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300, check=False)

    return run_calls


def test_every_kernel_is_clean_and_right(run: Run, emulated: ModuleType) -> None:
    exposed = {name for name in dir(emulated) if name[0] != "_"} - {"Plan", "kernels", "launches"}
    assert set(sanitized_cases.OPERATORS) == exposed
    calls = [(name, call) for name, make in sanitized_cases.OPERATORS.items() for call in make()]
    done = run(calls, sizes.SEEDS)
    assert done.returncode == 0, done.stderr[-6000:]
    assert set(json.loads(done.stdout)) == sanitized_cases.launched_kernels()


def one_game(classes: int = 5) -> dict[str, np.ndarray]:
    g = test_emulated_shapley.game(1, 7, classes, 3)
    return {name: g[name] for name in ("cell_logits", "base_logits", "masks", "target")}


def test_a_wrong_result_ends_the_run(run: Run) -> None:
    g = one_game()
    expected = float64.masked_class_scores(**g, value="prob")
    right = Call(g | {"value": "prob"}, [expected], [1e-5], {})
    done = run([("masked_class_scores", right)], [0])
    assert done.returncode == 0, done.stderr
    expected = expected.copy()
    expected[0, 2] += 1e-3
    done = run([("masked_class_scores", right), ("masked_class_scores", right._replace(expected=[expected]))], [0])
    assert done.returncode == 1
    assert "masked_class_scores, naive, seed 0: result 0 of call 1 is off" in done.stderr


def test_a_read_into_the_padding_of_an_array_is_reported(run: Run, emulated: ModuleType) -> None:
    """Past the last of 35 floats, before the guard page: the plain emulation reads NaN there and goes on."""
    g = one_game() | {"target": np.array([5])}
    emulated.masked_class_scores(**g, value="prob", plan=emulated.Plan())
    done = run([("masked_class_scores", Call(g | {"value": "prob"}, [None], [0], {}))], [0])
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr
    assert "shapley_kernel.cuh:" in done.stderr
