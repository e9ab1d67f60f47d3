"""Small calls of every operator with what they must give, for the sanitized run of the emulated kernels.

The sizes are the small ones of the shared list (tests/sizes.py); together the calls reach every kernel. A new operator
adds a function with its name here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sizes
from emulation import float64
from emulation import test_emulated_regions as regions
from emulation import test_emulated_replacement as replacement
from emulation import test_emulated_shapley as shapley
from emulation import test_emulated_submodular as submodular


class Call(NamedTuple):
    """Arguments without the plan; expected results, None for any; by how much each may be off; changes of the plan."""

    arguments: dict[str, Any]
    expected: Sequence[Any]
    tolerances: Sequence[float]
    plan: dict[str, int]


CSRC = Path(__file__).resolve().parents[2] / "csrc"

OPERATORS: dict[str, Callable[[], Iterator[Call]]] = {}
HALVES: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda values: values,
    lambda values: values.astype(np.float16),
    float64.bfloat16_bits,
)
"""The types that the kernels read, from float32."""


def launched_kernels() -> set[str]:
    """The names under which the drivers of all families launch their kernels."""
    text = "".join(path.read_text() for path in CSRC.glob("*/*_kernel.cuh"))
    return set(re.findall(r'launcher\.run\(\s*"([^"]+)"', text))


def operator(calls: Callable[[], Iterator[Call]]) -> Callable[[], Iterator[Call]]:
    OPERATORS[calls.__name__] = calls
    return calls


def small(all_sizes: Sequence[Any], limit: int) -> list[Any]:
    """The sizes whose product is at most the limit: the sanitizers cost a factor of three."""
    return [size for size in all_sizes if np.prod([max(1, n) for n in size]) <= limit]


def games() -> Iterator[tuple[dict[str, Any], str]]:
    """Every small size, values by turns; then every value in every type at one size."""
    for number, size in enumerate(small(sizes.SHAPLEY, 25_000)):
        yield shapley.game(1, *size), sizes.VALUES[number % len(sizes.VALUES)]
    for value in sizes.VALUES:
        for convert in HALVES:
            g = shapley.game(*shapley.SMALL)
            yield g | {"cell_logits": convert(g["cell_logits"])}, value


@operator
def masked_class_scores() -> Iterator[Call]:
    for g, value in games():
        arguments = {name: g[name] for name in ("cell_logits", "base_logits", "masks", "target")}
        expected = shapley.expected_scores(g, value)
        yield Call(arguments | {"value": value}, [expected], [4e-6 * shapley.largest(g)], {})


@operator
def permutation_shapley_tiles() -> Iterator[Call]:
    for g, value in games():
        arguments = {name: g[name] for name in ("cell_logits", "base_logits", "permutations", "target")}
        expected = shapley.expected_tiles(g, value)
        error = 2e-6 * shapley.largest(g)
        tolerances = [error, 2 * error * np.sqrt(expected[1].max() * 32) + 32 * error**2]
        for plan in ({}, {"processors": 1}, {"shared_limit": 0, "scratch": 1}):
            yield Call(arguments | {"value": value, "antithetic": True}, expected, tolerances, plan)


@operator
def nearest_candidates() -> Iterator[Call]:
    rng = np.random.default_rng(0)
    for number, size in enumerate(small(sizes.NEAREST, 12_000)):
        query, bank = (
            HALVES[number % len(HALVES)](rng.normal(size=(rows, size.channels)).astype(np.float32))
            for rows in (size.cells, size.rows)
        )
        if size.channels == 1:
            continue  # every cosine is 1 or -1: ties are another test's
        cosine = float64.cosines(query, bank)
        for k in sizes.kept(size.rows)[-2:]:
            # Near-equal cosines may come in any order, so the indices are not compared.
            expected = [-np.sort(-cosine, axis=1)[:, :k], None]
            yield Call({"query": query, "bank": bank, "k": k}, expected, [1e-6, 0], {"scratch": 4096})


def searches() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Arguments that both searches take, and base logits: every small size, types by turns; then with a shortlist."""
    for number, size in enumerate(small(sizes.REPLACEMENT, 80_000)):
        p = replacement.problem(1, *size, scale=2 / size.cells**0.5, seed=number)
        for name in ("cell_logits", "candidate_logits", "similarity"):
            p[name] = HALVES[number % len(HALVES)](p[name])
        yield p, replacement.start_logits(p)[0]
    for convert in HALVES:
        p = replacement.problem(2, 7, 33, 40, scale=0.5, seed=1)
        p["shortlist"] = np.random.default_rng(2).integers(-3, 60, (2, 7, 9))
        for name in ("cell_logits", "candidate_logits", "similarity"):
            p[name] = convert(p[name])
        yield p, replacement.start_logits(p)[0]


@operator
def best_replacement() -> Iterator[Call]:
    for p, base in searches():
        logits = (base + float64.widen(p["cell_logits"]).sum(1)).astype(np.float32)
        exact = np.stack([float64.losses(p, b, row) for b, row in enumerate(logits)])
        allowed, used = np.ones(exact.shape[:2], bool), np.zeros((len(exact), exact.shape[2]), bool)
        allowed[:, 1::3], used[:, 2::5] = False, True
        exact = np.where(allowed[:, :, None] & ~used[:, None], exact, np.inf).reshape(len(exact), -1)
        least = exact.argmin(1)
        if exact.shape[1] > 1:
            assert (np.partition(exact, 1, 1)[:, 1] - exact.min(1) > 1e-9).all(), "a tie: take another seed"
        expected = [*np.divmod(least, p["similarity"].shape[2]), exact.min(1)]
        arguments = p | {"logits": logits, "allowed": allowed, "used": used}
        yield Call(arguments, expected, [0, 0, 1e-5], {})


@operator
def replace_until_flip() -> Iterator[Call]:
    for p, base in searches():
        cells = p["similarity"].shape[1]
        scores = np.random.default_rng(4).integers(0, 5, (len(base), cells)).astype(np.float32)
        top, edits = min(20, cells), min(3, cells)
        expected, margin = float64.search(p, base, scores, top, edits, False)
        assert margin > 2e-5, "float32 may decide otherwise: take another seed"
        arguments = p | {"base_logits": base, "cell_scores": scores}
        arguments |= {"top_cells": top, "max_edits": edits, "reuse_candidates": False}
        yield Call(arguments, expected, [0, 0, 1e-4, 1e-4, 0, 0], {})


@operator
def submodular_gains() -> Iterator[Call]:
    for number, size in enumerate(small(sizes.SUBMODULAR, 10_000)):
        p = submodular.problem(size.candidates, 3, size.regions, size.classes)
        p["confidence"] = ("entropy", "evidential")[number % 2]
        for name in ("insertion_logits", "deletion_logits"):
            p[name] = HALVES[number % len(HALVES)](p[name])
        scores = submodular.expected_scores(p)
        total = scores @ p["weights"]
        best = submodular.expected_best(p, total)
        yield Call(p, [scores, total, best], [1e-10, 1e-10, 0], {})


@operator
def compose_regions() -> Iterator[Call]:
    for number, size in enumerate(small(sizes.REGIONS, 1_000_000)):
        p = regions.composition(*size, (np.uint8, np.uint16, np.int32, np.int64)[number % 4])
        complement = number % 2 == 0
        expected = regions.expected_composition(p, complement)
        yield Call(p | {"complement": complement, "channels_last": False}, [expected], [0], {})


@operator
def rank_masks() -> Iterator[Call]:
    for number, size in enumerate(small(sizes.REGIONS, 1_000_000)):
        p = regions.masking(*size[:5], (np.uint8, np.uint16, np.int32, np.int64)[number % 4])
        insert = number % 2 == 0
        yield Call(p | {"insert": insert}, [regions.expected_masks(p, insert)], [0], {})


def write(path: Path, calls: Sequence[tuple[str, Call]], seeds: Sequence[int]) -> None:
    """A file for sanitized_run.py."""
    arrays: dict[str, Any] = {}
    listed = []
    for number, (name, call) in enumerate(calls):
        given = {key: value for key, value in call.arguments.items() if isinstance(value, np.ndarray)}
        arrays |= {f"{number}.argument.{key}": value for key, value in given.items()}
        expected = {which: np.asarray(value) for which, value in enumerate(call.expected) if value is not None}
        arrays |= {f"{number}.expected.{which}": value for which, value in expected.items()}
        listed.append(
            {
                "operator": name,
                "arrays": list(given),
                "others": {key: value for key, value in call.arguments.items() if key not in given},
                "tolerances": {which: float(call.tolerances[which]) for which in expected},
                "plan": call.plan,
                "seeds": list(seeds),
            }
        )
    np.savez(path, calls=np.array(json.dumps(listed)), **arrays)
