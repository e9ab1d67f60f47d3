"""The promise of same bits, for every compiled operator: however the work is cut into calls, on any number of threads.

The whole is one call on one thread. A cut is what a caller may split: masks, tiles of permutations, queries, the bank,
candidate rows, masked images, or the images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from finecf import _native, ops

pytestmark = cases.compiled_implementations

Results = tuple[Tensor, ...]
Cut = tuple[Callable[[], Results], dict[str, Callable[[], Results]]]
CUTS: dict[str, Callable[[torch.dtype], list[Cut]]] = {}
"""Operator -> for a type, the whole and the cuts that must equal it, of one or several sets of arguments."""

FLOATS = (torch.float32,) if cases.DEVICE.type == "cuda" else (torch.float32, torch.float64)


def cuts(function: Callable[[torch.dtype], list[Cut]]) -> Callable[[torch.dtype], list[Cut]]:
    CUTS[function.__name__] = function
    return function


def joined(parts: list[Any], dim: int = 0) -> Results:
    """The results of several calls, one after the other."""
    tuples = [part if isinstance(part, tuple) else (part,) for part in parts]
    return tuple(torch.cat(same, dim) for same in zip(*tuples, strict=True))


def image_by_image(function: Callable[..., Any], arguments: dict[str, Any], shared: tuple[str, ...]) -> Results:
    def of(image: int) -> dict[str, Any]:
        return {
            name: each[image : image + 1] if isinstance(each, Tensor) and name not in shared else each
            for name, each in arguments.items()
        }

    return joined([function(**of(image)) for image in range(len(arguments["target"]))])


@cuts
def masked_class_scores(dtype: torch.dtype) -> list[Cut]:
    game = cases.game(3, 49, 65, dtype)
    masks = torch.rand(200, 49, generator=cases.generator(0), dtype=torch.float64).to(cases.DEVICE, dtype)

    def by(value: str, rows: int) -> Results:
        return joined([ops.masked_class_scores(**game, masks=part, value=value) for part in masks.split(rows)], 1)

    def alone(value: str) -> Results:
        return image_by_image(ops.masked_class_scores, game | {"masks": masks, "value": value}, ("masks",))

    return [
        (
            lambda value=value: (ops.masked_class_scores(**game, masks=masks, value=value),),
            {f"masks by {rows}": lambda value=value, rows=rows: by(value, rows) for rows in (7, 64)}
            | {"image by image": lambda value=value: alone(value)},
        )
        for value in cases.VALUES
    ]


@cuts
def permutation_shapley_tiles(dtype: torch.dtype) -> list[Cut]:
    game = cases.game(2, 25, 65, dtype)
    orders = cases.permutations(100, 25)

    def by(value: str, rows: int) -> Results:
        return joined(
            [ops.permutation_shapley_tiles(**game, permutations=part, value=value) for part in orders.split(rows)], 1
        )

    def alone(value: str) -> Results:
        given = game | {"permutations": orders, "value": value}
        return image_by_image(ops.permutation_shapley_tiles, given, ("permutations",))

    return [
        (
            lambda value=value: ops.permutation_shapley_tiles(**game, permutations=orders, value=value),
            {f"permutations by {rows}": lambda value=value, rows=rows: by(value, rows) for rows in (32, 96)}
            | {"image by image": lambda value=value: alone(value)},
        )
        for value in cases.VALUES
    ]


@cuts
def nearest_candidates(dtype: torch.dtype) -> list[Cut]:
    """Every second row is there twice, so that equal cosines must come in the same order as well."""
    rng = cases.generator(0)
    query, bank = cases.normal(rng, 9, 33, dtype=dtype), cases.normal(rng, 2500, 33, dtype=dtype)
    bank = torch.cat([bank, bank])

    def bank_by(rows: int) -> Results:
        """Merged as a search over a bank on disk would: by falling cosine, then by row."""
        parts = [ops.nearest_candidates(query, part, 6) for part in bank.split(rows)]
        cosine = torch.cat([part.cosine for part in parts], 1)
        index = torch.cat([part.index + number * rows for number, part in enumerate(parts)], 1)
        falling = cosine.sort(dim=1, descending=True, stable=True).indices[:, :6]
        return cosine.gather(1, falling), index.gather(1, falling)

    def queries_by(rows: int) -> Results:
        return joined([ops.nearest_candidates(part, bank, 6) for part in query.split(rows)])

    return [
        (
            lambda: ops.nearest_candidates(query, bank, 6),
            {"queries by 1": lambda: queries_by(1), "queries by 5": lambda: queries_by(5)}
            | {f"bank by {rows}": lambda rows=rows: bank_by(rows) for rows in (700, 1234)},
        )
    ]


@cuts
def best_replacement(dtype: torch.dtype) -> list[Cut]:
    arguments = cases.single(cases.search(3, 49, 33, 700, dtype=dtype))
    arguments["used"] = cases.integers(cases.generator(1), 2, 3, 700).bool()
    listed = arguments | {"shortlist": cases.integers(cases.generator(2), 700, 3, 49, 90)}

    def bank_by(given: dict[str, Any], rows: int) -> Results:
        """The best of the parts' best: of equal losses the lowest cell, then the lowest candidate."""
        parts = []
        for start in range(0, 700, rows):
            part = torch.tensor([[start, min(start + rows, 700)]] * 3, device=cases.DEVICE)
            parts.append([each.tolist() for each in ops.best_replacement(**given | {"candidate_range": part})])
        best = [min((p[2][image], p[0][image], p[1][image]) for p in parts) for image in range(3)]
        losses, cells, rows_of = zip(*best, strict=True)
        indices = (torch.tensor(each, device=cases.DEVICE) for each in (cells, rows_of))
        return *indices, torch.tensor(losses, dtype=dtype, device=cases.DEVICE)

    return [
        (
            lambda given=given: ops.best_replacement(**given),
            {f"bank by {rows}": lambda given=given, rows=rows: bank_by(given, rows) for rows in (50, 300)}
            | {
                "image by image": lambda given=given: image_by_image(ops.best_replacement, given, ("candidate_logits",))
            },
        )
        for given in (arguments, listed)
    ]


@cuts
def replace_until_flip(dtype: torch.dtype) -> list[Cut]:
    arguments = cases.search(3, 49, 33, 700, scale=0.5, dtype=dtype) | {"max_edits": 4}
    listed = arguments | {"shortlist": cases.integers(cases.generator(2), 700, 3, 49, 90), "top_cells": 9}
    return [
        (
            lambda given=given: ops.replace_until_flip(**given),
            {
                "image by image": lambda given=given: image_by_image(
                    ops.replace_until_flip, given, ("candidate_logits",)
                )
            },
        )
        for given in (arguments, listed)
    ]


@cuts
def submodular_gains(dtype: torch.dtype) -> list[Cut]:
    """`best` is a choice among all rows of an image, so the scores alone are cut, and `best` only on threads."""
    gains = cases.gains(300, 3, 49, 65, dtype)
    of_rows = ("insertion_logits", "deletion_logits", "image", "candidate")

    def by(rows: int, confidence: str) -> Results:
        parts = []
        for start in range(0, 300, rows):
            part = {name: each[start : start + rows] if name in of_rows else each for name, each in gains.items()}
            parts.append(tuple(ops.submodular_gains(**part, confidence=confidence))[:2])
        return joined(parts)

    return [
        *(
            (
                lambda confidence=confidence: tuple(ops.submodular_gains(**gains, confidence=confidence))[:2],
                {f"rows by {rows}": lambda rows=rows, confidence=confidence: by(rows, confidence) for rows in (1, 64)},
            )
            for confidence in ("entropy", "evidential")
        ),
        (lambda: ops.submodular_gains(**gains), {}),
    ]


@cuts
def compose_regions(dtype: torch.dtype) -> list[Cut]:
    given = cases.composition(40, 3, height=33, width=65, dtype=dtype)

    def by(outputs: int) -> Results:
        parts = [
            ops.compose_regions(**given | {"image": image, "keep": keep})
            for image, keep in zip(given["image"].split(outputs), given["keep"].split(outputs), strict=True)
        ]
        return joined(parts)

    return [(lambda: (ops.compose_regions(**given),), {f"outputs by {n}": lambda n=n: by(n) for n in (1, 7)})]


@cuts
def rank_masks(dtype: torch.dtype) -> list[Cut]:
    rng = cases.generator(0)
    given = cases.composition(40, 3, height=33, width=65, dtype=dtype)
    given = {name: given[name] for name in ("images", "image", "baseline")}
    given |= {"rank": cases.integers(rng, 2145, 3, 33, 65).int(), "threshold": cases.integers(rng, 2145, 40).int()}

    def by(outputs: int) -> Results:
        parts = [
            ops.rank_masks(**given | {"image": image, "threshold": threshold})
            for image, threshold in zip(given["image"].split(outputs), given["threshold"].split(outputs), strict=True)
        ]
        return joined(parts)

    return [(lambda: (ops.rank_masks(**given),), {f"outputs by {n}": lambda n=n: by(n) for n in (1, 7)})]


def test_every_operator_has_cuts() -> None:
    assert set(CUTS) == set(_native.OPERATORS)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_same_bits(name: str, dtype: torch.dtype) -> None:
    for number, (whole, parts) in enumerate(CUTS[name](dtype)):
        torch.set_num_threads(1)
        expected = whole()
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for cut, work in {"whole": whole, **parts}.items():
                for one, two in zip(expected, work(), strict=True):
                    assert torch.equal(one, two), f"arguments {number}, {cut}, {threads} threads"
