"""Calls every operator's CUDA kernels on the smallest inputs that reach every kernel and every tile border.

compute-sanitizer runs this (scripts/gpu_check.py). The inputs are the samples of tests/ops/test_compiled.py, which hold
every operator, and those of MORE below; each again in half precision where HALF names the arguments that take it.

Inputs are made on the CPU, in their final type, and copied: no kernel but those under test runs on the device, so that
initcheck, which follows only these, knows everything else to be written.

    python scripts/sanitizer_cases.py [--device cpu]      the CPU kernels instead, to try the cases out
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
os.environ["FINECF_TEST_DEVICE"] = "cpu"  # where tests/cases.py makes its tensors
sys.path.insert(0, str(TESTS))

import cases  # noqa: E402
import torch  # noqa: E402

from finecf import _native  # noqa: E402

Arguments = tuple[Any, ...]

HALF = {
    "masked_class_scores": (0,),
    "permutation_shapley_tiles": (0,),
    "nearest_candidates": (0, 1),
    "best_replacement": (0, 1, 2),
    "replace_until_flip": (0, 1, 2),
    "submodular_gains": (0, 1),
    "compose_regions": (0, 4),
    "rank_masks": (0, 4),
}
"""Operator -> positions of the arguments that may be float16 or bfloat16; small operands stay float32."""

MORE: dict[str, Callable[[], list[Arguments]]] = {}


def more(operator: Callable[[], list[Arguments]]) -> Callable[[], list[Arguments]]:
    """Add arguments of the operator that a function is named after."""
    MORE[operator.__name__] = operator
    return operator


@more
def masked_class_scores() -> list[Arguments]:
    """Past one tile of masks, of cells, and of classes."""
    game = cases.game(2, 35, 300)
    masks = torch.rand(33, 35, generator=cases.generator(0))
    return [(game["cell_logits"], game["base_logits"], masks, game["target"], value) for value in cases.VALUES]


@more
def permutation_shapley_tiles() -> list[Arguments]:
    """A kernel for every number of classes a lane, two class tiles, and walks enough for the staged form."""
    found = []
    for count, cells, classes in [(3, 3, c) for c in (31, 33, 65, 129, 257, 513, 1030)] + [(3300, 2, 2)]:
        game = cases.game(1, cells, classes)
        orders = cases.permutations(count, cells)
        for value in ("prob", "log_odds"):
            found.append((game["cell_logits"], game["base_logits"], orders, game["target"], value, True))
    return found


@more
def nearest_candidates() -> list[Arguments]:
    """Past one tile of queries, rows and channels; more neighbours than one selection finds."""
    rng = cases.generator(0)
    tiles = (cases.normal(rng, 33, 37), cases.normal(rng, 130, 37))
    many = (cases.normal(rng, 2, 3), cases.normal(rng, 2100, 3))
    return [(*tiles, 5), (*tiles, 130), (*many, 2100)]


@more
def best_replacement() -> list[Arguments]:
    """Past one tile of cells, candidates and classes; ranges inside the bank; a shortlist of nothing."""
    found = []
    for listed in (None, 3, 0):
        given = cases.single(cases.search(2, 33, 70, 130))
        given["candidate_range"] = torch.tensor([[5, 77], [0, 130]])
        shortlist = None if listed is None else cases.integers(cases.generator(1), 130, 2, 33, listed)
        used = cases.integers(cases.generator(2), 2, 2, 130).bool()
        names = ("cell_logits", "candidate_logits", "similarity", "logits", "target", "allowed", "candidate_range")
        found.append((*(given[name] for name in names), shortlist, used, 1.0, 1.0))
    return found


@more
def replace_until_flip() -> list[Arguments]:
    """The same through three edits, with candidates used once and again; classes that are far apart."""
    found = []
    for scale, reuse in ((0.3, False), (0.3, True), (300.0, False)):
        given = cases.search(2, 33, 70, 130, scale=scale)
        given["candidate_range"] = torch.tensor([[5, 77], [0, 130]])
        found.append((*given.values(), None, 9, 3, reuse, 1.0, 0.5))
    return found


def samples() -> dict[str, Callable[[], list[Arguments]]]:
    """The samples of tests/ops/test_compiled.py."""
    spec = importlib.util.spec_from_file_location("test_compiled", TESTS / "ops" / "test_compiled.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Callable[[], list[Arguments]]] = module.SAMPLES
    return found


def in_half(operator: str, arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same arguments, those that HALF names in `dtype`."""
    places = HALF[operator]
    return tuple(
        each.to(dtype) if place in places and isinstance(each, torch.Tensor) else each
        for place, each in enumerate(arguments)
    )


def all_cases(device: str) -> Iterator[tuple[str, Arguments]]:
    """Operators and arguments on the CPU; half precision for CUDA alone, whose kernels read it."""
    first = samples()
    for operator in _native.OPERATORS:
        given = first[operator]() + (MORE[operator]() if operator in MORE else [])
        for arguments in given:
            yield operator, arguments
            if device == "cuda" and operator in HALF:
                for dtype in (torch.float16, torch.bfloat16):
                    yield operator, in_half(operator, arguments, dtype)


def moved(value: Any, device: str) -> Any:
    """A tensor as a contiguous one on the device; anything else as it is."""
    return value.contiguous().to(device) if isinstance(value, torch.Tensor) else value


def run(device: str) -> int:
    """Call all of them and bring the results back; return how many calls there were."""
    count = 0
    for operator, arguments in all_cases(device):
        result = getattr(torch.ops.finecf, operator)(*(moved(each, device) for each in arguments))
        for part in result if isinstance(result, tuple) else (result,):
            part.cpu()
        count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return count


def main() -> int:
    """Run; the last line says that all was done."""
    parser = argparse.ArgumentParser(description="Call every operator on its smallest inputs.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args().device
    half = _native.build_info()[device]
    if not half["loaded"]:
        print(f"finecf: the compiled operators for {device} are not loaded: {half['reason']}", file=sys.stderr)
        return 1
    print(f"finecf: {run(device)} calls on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
