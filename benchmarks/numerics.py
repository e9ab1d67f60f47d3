"""The largest error of every operator against an oracle of more digits: by quantity, input type and backend.

    python benchmarks/numerics.py                                  # print the tables
    python benchmarks/numerics.py --markdown docs/numerics.md      # and write them between the markers of that file
    python benchmarks/numerics.py --device cuda                    # the CUDA kernels, where there is a device
    python benchmarks/numerics.py --quick                          # three small cases, some seconds

The oracle is numpy's `longdouble` (64 bits of mantissa on x86-64, 113 on arm64), each formula as it is defined and on
the very values that the operator was given: the inputs are rounded to the tested type first, then widened exactly.

An error is stated as it is, and scaled, in units in the last place of the largest logit: divided by eps * S, where eps
is that of the type computed in (float32 for half-precision inputs) and S the largest magnitude among the case's logits,
their partial sums and the results, at least 1. Rounding a logit of that size costs half a unit, so a sound evaluation
stays at a few units whatever the spread, and an error of hundreds is no rounding.

A choice (an index) has no error of its own, since two pairs may tie: its regret is measured, by how much the chosen
pair is worse than the best one by the oracle.

An operator is added to OPERATORS by two functions, one that makes its arguments from a case and one that holds a result
against the oracle, and a bound for each quantity that the second returns.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from finecf import _native, ops

Array = NDArray[Any]
Arguments = dict[str, Any]
Errors = dict[str, tuple[Any, Any]]
"""Quantity -> (largest absolute error, S)."""
Compare = Callable[[tuple[Array, ...]], Errors]

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}
VALUES = ("prob", "log_prob", "log_odds", "logit")
FLOAT32_ON_DEVICE = ("base_logits", "masks", "logits", "cell_scores")
"""What the CUDA launches, and so the emulated kernels, take in float32 beside half-precision maps."""


class Case(NamedTuple):
    """Sizes and magnitudes that the arguments of every operator are made from."""

    name: str
    cells: int
    classes: int
    rows: int
    spread: float
    """Standard deviation of what one cell, or one candidate, adds to a logit."""
    channels: int = 64
    drift: float = 0.0
    """Standard deviation of what all cells add alike, so that partial sums grow without cancelling."""
    signs: bool = False
    """Every contribution is +spread or -spread (and a little, so that sums are not exact)."""


CASES = (
    Case("ordinary", cells=49, classes=200, rows=96, spread=3 / 7, channels=2048),
    Case("large map", cells=196, classes=200, rows=24, spread=3 / 14, channels=512),
    Case("one cell", cells=1, classes=33, rows=97, spread=2.0, channels=1),
    Case("2 classes", cells=49, classes=2, rows=97, spread=3 / 7, channels=33),
    Case("1,000 classes", cells=13, classes=1000, rows=48, spread=1.0),
    Case("10,000 classes", cells=7, classes=10_000, rows=24, spread=1.0),
    Case("drift", cells=49, classes=33, rows=96, spread=0.3, drift=0.6),
    Case("strong cells", cells=49, classes=33, rows=96, spread=3.0),
    Case("wide", cells=25, classes=33, rows=97, spread=27.0),
    Case("extreme", cells=49, classes=33, rows=96, spread=200.0, signs=True),
)
"""Wide: from a spread of about 25 on, products of shifted exponentials underflow. Extreme: each cell adds +-200."""
QUICK = tuple(
    case._replace(cells=min(case.cells, 9), classes=min(case.classes, 33), rows=min(case.rows, 40))
    for case in CASES
    if case.name in ("ordinary", "wide", "extreme")
)


class Operator(NamedTuple):
    """How one operator is measured."""

    arguments: Callable[[Case, np.random.Generator], list[tuple[str, Arguments]]]
    """Labelled argument sets of a case; quantities of equal label are one row of the table."""
    oracle: Callable[[Arguments], Compare]
    """Takes arguments in longdouble; what it returns holds a result against them, and is used for every backend."""
    bounds: Mapping[str, float]
    """Largest scaled error of each quantity that may be called rounding; docs/numerics.md states and explains them."""
    bounds_cuda: Mapping[str, float] = MappingProxyType({})
    """Those that are others for the CUDA kernels, emulated or not."""
    keep: tuple[str, ...] = ()
    """Floating-point arguments that stay float64 whatever type is measured."""
    in_float64: bool = False
    """Whether it computes in float64 whatever the type of its inputs."""


class Row(NamedTuple):
    """The largest errors of one quantity over the cases; the two may be those of different cases."""

    operator: str
    quantity: str
    dtype: str
    backend: str
    absolute: float
    scaled: float
    case: str
    """Where the scaled error is largest."""


# ---- the oracle ------------------------------------------------------------------------------------------------------


def wide(values: Array) -> Array:
    return np.asarray(values).astype(np.longdouble)


def largest(*arrays: Array) -> Any:
    return max((np.abs(each).max() for each in arrays if each.size), default=np.longdouble(0))


def size(*arrays: Array) -> Any:
    """S of the module's text."""
    return max(np.longdouble(1), largest(*arrays))


def logsumexp(logits: Array) -> Array:
    peak = logits.max(axis=-1, keepdims=True)
    return (peak + np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True)))[..., 0]


def class_value(logits: Array, target: int, value: str) -> Array:
    """Value of the class under logits [..., C]."""
    wanted = logits[..., target]
    if value == "logit":
        return wanted
    if value == "log_odds":
        return wanted - logsumexp(np.delete(logits, target, axis=-1))
    log_prob = wanted - logsumexp(logits)
    return np.exp(log_prob) if value == "prob" else log_prob


# ---- shapley ---------------------------------------------------------------------------------------------------------


def contributions(case: Case, rng: np.random.Generator, *shape: int) -> Array:
    """What cells or candidates add to the logits."""
    if case.signs:
        return rng.choice([-case.spread, case.spread], shape) + rng.normal(size=shape)
    return rng.normal(size=shape) * case.spread


def maps(case: Case, rng: np.random.Generator) -> Arguments:
    """Two images: one asks for any class, the other for its second highest (a probability that is not nearly 0)."""
    cells = contributions(case, rng, 2, case.cells, case.classes)
    cells += case.drift * rng.normal(size=(2, 1, case.classes))
    base = contributions(case, rng, 2, case.classes)
    target = rng.integers(0, case.classes, 2)
    target[1] = np.argsort((base + cells.sum(1))[1])[-2]
    return {"cell_logits": cells, "base_logits": base, "target": target}


def score_arguments(case: Case, rng: np.random.Generator) -> list[tuple[str, Arguments]]:
    """Half of the masks are coalitions, half are soft."""
    masks = rng.random((32, case.cells))
    masks[:16] = masks[:16] < 0.5
    shared = maps(case, rng) | {"masks": masks}
    return [(value, shared | {"value": value}) for value in VALUES]


def score_oracle(given: Arguments) -> Compare:
    cells, base = given["cell_logits"], given["base_logits"]
    logits = base[:, None] + given["masks"] @ cells
    exact = np.stack([class_value(image, t, given["value"]) for image, t in zip(logits, given["target"], strict=True)])
    scale = size(cells, base, logits, exact)
    return lambda result: {"": (largest(result[0] - exact), scale)}


def walk_arguments(case: Case, rng: np.random.Generator) -> list[tuple[str, Arguments]]:
    """33 permutations: a tile and one more."""
    orders = np.stack([rng.permutation(case.cells) for _ in range(33)]).astype(np.int32)
    shared = maps(case, rng) | {"permutations": orders, "antithetic": True}
    return [(value, shared | {"value": value}) for value in VALUES]


def walk_oracle(given: Arguments) -> Compare:
    cells, base, orders = given["cell_logits"], given["base_logits"], given["permutations"]
    images, count = base.shape[0], orders.shape[0]
    samples = np.zeros((images, *orders.shape), np.longdouble)
    scale = size(cells, base)
    for image, target in enumerate(given["target"]):
        for m, row in enumerate(orders):
            for order in (row, row[::-1]):
                walk = np.concatenate([base[image, None], cells[image, order]]).cumsum(0)
                values = class_value(walk, target, given["value"])
                samples[image, m, order] += np.diff(values) / 2
                scale = max(scale, largest(walk, values))
    tiles = [samples[:, first : first + 32] for first in range(0, count, 32)]
    mean = np.stack([tile.mean(1) for tile in tiles], 1)
    spread = np.stack([tile.std(1) for tile in tiles], 1)
    counts = wide(np.array([tile.shape[1] for tile in tiles]))[:, None]

    def compare(result: tuple[Array, ...]) -> Errors:
        # The root mean square deviation, not its square: it moves by no more than the samples do.
        deviation = np.sqrt(result[1] / counts)
        return {"mean": (largest(result[0] - mean), scale), "spread": (largest(deviation - spread), scale)}

    return compare


# ---- replacement -----------------------------------------------------------------------------------------------------


def nearest_arguments(case: Case, rng: np.random.Generator) -> list[tuple[str, Arguments]]:
    """Rows of many lengths; the second bank holds near-copies of the queries, whose cosines nearly tie.

    Lengths stay within what the wrapper passes on unscaled, since the emulated kernels are called without it.
    """
    shape = case.cells, case.channels
    query = np.abs(contributions(case, rng, *shape))
    bank = np.abs(contributions(case, rng, case.rows, case.channels)) * 10 ** rng.uniform(-2, 2, (case.rows, 1))
    copies = query[rng.integers(0, case.cells, case.rows)] * (1 + 1e-3 * rng.normal(size=(case.rows, case.channels)))
    k = min(10, case.rows)
    return [("", {"query": query, "bank": bank, "k": k}), ("", {"query": query, "bank": copies, "k": k})]


def nearest_oracle(given: Arguments) -> Compare:
    def unit(rows: Array) -> Array:
        length = np.sqrt((rows * rows).sum(1, keepdims=True))
        return rows / np.where(length == 0, 1, length)

    cosines = unit(given["query"]) @ unit(given["bank"]).T
    best = -np.sort(-cosines, axis=1)[:, : given["k"]]

    def compare(result: tuple[Array, ...]) -> Errors:
        cosine, index = result
        chosen = np.take_along_axis(cosines, index, 1)
        twice = any(np.unique(row).size < row.size for row in index)
        regret = np.inf if twice else largest(np.maximum(best - chosen, 0))
        return {"cosine": (largest(cosine - chosen), 1), "regret": (regret, 1)}

    return compare


class Losses:
    """Losses of all pairs of one image, by the formula, for any logits that edits lead to."""

    def __init__(self, given: Arguments, image: int) -> None:
        self.cells: Array = given["cell_logits"][image]
        self.candidates: Array = given["candidate_logits"]
        self.similarity: Array = given["similarity"][image]
        self.target = int(given["target"][image])
        self.weights = given["weight_sim"], given["weight_cls"]
        rows = self.candidates.shape[0]
        start, stop = given["candidate_range"][image]
        self.permitted = np.broadcast_to((np.arange(rows) >= start) & (np.arange(rows) < stop), (len(self.cells), rows))
        if given["shortlist"] is not None:
            listed = np.zeros(self.permitted.shape, bool)
            np.put_along_axis(listed, given["shortlist"][image], True, 1)
            self.permitted = self.permitted & listed
        self._known: dict[tuple[tuple[int, int], ...], tuple[Array, Array]] = {}

    def of(self, start: Array, edits: tuple[tuple[int, int], ...], cells: Sequence[int]) -> tuple[Array, Array]:
        """Logits after the edits, and the losses [P,N] of one more: +inf where it is not permitted or not in `cells`.

        They are remembered, since backends make mostly the same edits.
        """
        if edits not in self._known:
            logits = start + sum((self.candidates[row] - self.cells[cell] for cell, row in edits), np.longdouble(0))
            losses = np.full(self.similarity.shape, np.longdouble(np.inf))
            for cell in cells:
                after = logits - self.cells[cell] + self.candidates
                unlikely = logsumexp(after) - after[:, self.target]
                losses[cell] = self.weights[0] * (1 - self.similarity[cell]) + self.weights[1] * unlikely
            self._known[edits] = logits, np.where(self.permitted, losses, np.inf)
        return self._known[edits]


def finite_size(losses: Array, *arrays: Array) -> Any:
    return size(losses[np.isfinite(losses)], *arrays)


def pair_arguments(case: Case, rng: np.random.Generator) -> Arguments:
    """Both images may use most of the bank; an edit moves the logits as much as a cell does.

    The second half of the bank holds near-copies of the first, so that the best pair of each image has a rival that is
    worse by 1e-16 to 1e-5 of itself: a tie in one type and not in the next.
    """
    given = maps(case, rng)
    half = case.rows // 2
    candidates = contributions(case, rng, case.rows, case.classes) + case.drift * rng.normal(size=case.classes)
    candidates[-half:] = candidates[:half] * (1 + 10 ** rng.uniform(-16, -5, (half, 1)) * rng.normal(size=(half, 1)))
    similarity = rng.random((2, case.cells, case.rows))
    similarity[..., -half:] = similarity[..., :half]
    return given | {
        "candidate_logits": candidates,
        "similarity": similarity,
        "candidate_range": np.array([[0, case.rows], [1, case.rows]]),
        "shortlist": None,
        "weight_sim": 1.0,
        "weight_cls": 1.0,
    }


def best_arguments(case: Case, rng: np.random.Generator) -> list[tuple[str, Arguments]]:
    given = pair_arguments(case, rng)
    given["logits"] = given.pop("base_logits") + given["cell_logits"].sum(1)
    given |= {"allowed": rng.random((2, case.cells)) < 0.9, "used": rng.random((2, case.rows)) < 0.1}
    given["allowed"][:, 0] = True
    shortlist = rng.integers(0, case.rows, (2, case.cells, 12))
    return [("", given), ("", given | {"shortlist": shortlist, "used": None})]


def best_oracle(given: Arguments) -> Compare:
    tables = []
    for image, logits in enumerate(given["logits"]):
        _, losses = Losses(given, image).of(logits, (), np.flatnonzero(given["allowed"][image]))
        tables.append(losses if given["used"] is None else np.where(given["used"][image], np.inf, losses))
    scale = max(
        finite_size(losses, given["logits"], given["cell_logits"], given["candidate_logits"]) for losses in tables
    )

    def compare(result: tuple[Array, ...]) -> Errors:
        error = regret = np.longdouble(0)
        for losses, cell, row, loss in zip(tables, *result, strict=True):
            error = max(error, abs(loss - losses[cell, row]))
            regret = max(regret, losses[cell, row] - losses.min())
        return {"loss": (error, scale), "regret": (regret, scale)}

    return compare


def flip_arguments(case: Case, rng: np.random.Generator) -> list[tuple[str, Arguments]]:
    """In the second set an image starts with its target a hair before or behind the highest class."""
    given = pair_arguments(case, rng) | {"cell_scores": rng.random((2, case.cells)), "reuse_candidates": False}
    given |= {"top_cells": min(12, case.cells), "max_edits": min(4, case.cells)}
    start = (given["base_logits"] + given["cell_logits"].sum(1))[1]
    near = given["base_logits"].copy()
    target = given["target"][1]
    near[1, target] += np.delete(start, target).max() - start[target]
    return [("", given), ("", given | {"base_logits": near})]


def flip_oracle(given: Arguments) -> Compare:
    """Follows the edits that a result made, from logits that are exact: rounding along the path counts as error."""
    images = [Losses(given, image) for image in range(len(given["target"]))]
    start = given["base_logits"] + given["cell_logits"].sum(1)
    order = np.argsort(-given["cell_scores"], axis=1, kind="stable")
    inputs = given["cell_logits"], given["candidate_logits"]

    def follow(image: int, result: tuple[Array, ...]) -> tuple[Any, Any, Any, Any, Any]:
        table, target = images[image], images[image].target
        cells, rows, reported, path, count, flipped = (part[image] for part in result)
        edits: tuple[tuple[int, int], ...] = ()
        error = regret = drift = stopping = np.longdouble(0)
        scale = size(*inputs)
        for step in range(int(count) + 1):
            done = [cell for cell, _ in edits]
            open_cells = [cell for cell in order[image] if cell not in done][: given["top_cells"]]
            logits, losses = table.of(start[image], edits, open_cells)
            losses = losses.copy()
            losses[:, [row for _, row in edits]] = np.inf
            scale = max(scale, finite_size(losses, logits))
            drift = max(drift, largest(path[step] - logits))
            # By how much the target leads: what a wrong decision to stop, or to go on, has to be measured by.
            lead = logits[target] - np.delete(logits, target).max()
            if step == count:
                stopping = max(stopping, -lead if flipped else lead)
                if not flipped and count < given["max_edits"] and np.isfinite(losses).any():
                    stopping = np.longdouble(np.inf)
                break
            stopping = max(stopping, lead)
            cell, row = int(cells[step]), int(rows[step])
            error = max(error, abs(reported[step] - losses[cell, row]))
            regret = max(regret, losses[cell, row] - losses.min())
            edits = (*edits, (cell, row))
        return error, regret, drift, stopping, scale

    def compare(result: tuple[Array, ...]) -> Errors:
        followed = [follow(image, result) for image in range(len(images))]
        error, regret, drift, stopping, scale = map(max, zip(*followed, strict=True))
        return {
            "losses": (error, scale),
            "regret": (regret, scale),
            "logits": (drift, scale),
            "stop": (stopping, scale),
        }

    return compare


# ---- submodular and regions ------------------------------------------------------------------------------------------


def gain_arguments(case: Case, rng: np.random.Generator) -> list[tuple[str, Arguments]]:
    """Every open region of two images is a candidate: one has regions selected already, the other none."""
    regions = case.cells
    selected = np.stack([rng.random(regions) < 0.3, np.zeros(regions, bool)])
    selected[:, 0] = False
    image, candidate = np.nonzero(~selected)
    distance = rng.random((2, regions, regions))
    distance = (distance + distance.transpose(0, 2, 1)) / 2
    others = selected[:, None] & ~np.eye(regions, dtype=bool)
    # The logits of a kept set are those of some of its cells, so they spread as the whole map's do.
    logits = contributions(case, rng, 2, len(image), case.classes) * case.cells**0.5
    shared: Arguments = {
        "insertion_logits": logits[0],
        "deletion_logits": logits[1],
        "image": image,
        "candidate": candidate,
        "distance": distance,
        "running_min": np.where(others, distance, np.inf).min(2),
        "selected": selected,
        "target": rng.integers(0, case.classes, 2),
        "weights": np.ones(4),
        "consistency": None,
        "collaboration": None,
        "largest": True,
    }
    return [("", shared | {"confidence": "entropy"}), ("evidential", shared | {"confidence": "evidential"})]


def gain_oracle(given: Arguments) -> Compare:
    """The terms by their definition, without the running minima."""
    kept, removed = given["insertion_logits"], given["deletion_logits"]
    wanted = given["target"][given["image"]]
    rows = np.arange(len(wanted))
    exact = np.zeros((len(wanted), 4), np.longdouble)
    shares = np.exp(kept - logsumexp(kept)[:, None])
    if given["confidence"] == "entropy":
        floored = np.log(shares + np.longdouble(1e-7))
        exact[:, 0] = 1 + (shares * floored).sum(1) / np.log(np.longdouble(kept.shape[1]))
    else:
        exact[:, 0] = 1 - kept.shape[1] / (np.exp(np.clip(kept, -10, 10)) + 1).sum(1)
    for row, (image, added) in enumerate(zip(given["image"], given["candidate"], strict=True)):
        members = np.append(np.flatnonzero(given["selected"][image]), added)
        between = given["distance"][image][np.ix_(members, members)].copy()
        np.fill_diagonal(between, np.inf)
        exact[row, 1] = between.min(1).sum() if len(members) > 1 else 0
    exact[:, 2] = shares[rows, wanted]
    exact[:, 3] = 1 - np.exp(removed[rows, wanted] - logsumexp(removed))
    total = exact @ given["weights"]
    scale = size(kept, removed, total)

    def compare(result: tuple[Array, ...]) -> Errors:
        scores, sums, best = result
        regret = max(total[given["image"] == image].max() - total[row] for image, row in enumerate(best))
        names = ("confidence", "effectiveness", "consistency", "collaboration")
        errors: Errors = {name: (largest(scores[:, k] - exact[:, k]), scale) for k, name in enumerate(names)}
        errors |= {"total": (largest(sums - total), scale), "regret": (regret, scale)}
        # With the other confidence only what depends on it is new.
        return {"confidence": errors["confidence"]} if given["confidence"] == "evidential" else errors

    return compare


def picture_arguments(case: Case, rng: np.random.Generator) -> Arguments:
    images = rng.normal(size=(2, 3, 9, 17)) * case.spread
    return {"images": images, "image": rng.integers(0, 2, 5), "baseline": rng.normal(size=images.shape)}


def compose_arguments(case: Case, rng: np.random.Generator) -> list[tuple[str, Arguments]]:
    labels = rng.integers(0, case.cells, (2, 9, 17)).astype(np.int32)
    keep = rng.random((5, case.cells)) < 0.5
    more = {"labels": labels, "keep": keep, "complement": True, "channels_last": False}
    return [("", picture_arguments(case, rng) | more)]


def rank_arguments(case: Case, rng: np.random.Generator) -> list[tuple[str, Arguments]]:
    rank = rng.permuted(np.arange(2 * 9 * 17).reshape(2, 9, 17) % 153, axis=2).astype(np.int32)
    more = {"rank": rank, "threshold": rng.integers(0, 154, 5).astype(np.int32), "insert": True}
    return [("", picture_arguments(case, rng) | more)]


def pixel_oracle(kept_of: Callable[[Arguments], Array]) -> Callable[[Arguments], Compare]:
    """Pixels are copied: any error is a wrong pixel."""

    def oracle(given: Arguments) -> Compare:
        kept = kept_of(given)[:, None]
        inside, outside = given["images"][given["image"]], given["baseline"][given["image"]]
        shown = np.where(kept, inside, outside)
        if given.get("complement"):
            shown = np.concatenate([shown, np.where(kept, outside, inside)])
        return lambda result: {"pixel": (largest(result[0] - shown), 1)}

    return oracle


def kept_by_regions(given: Arguments) -> Array:
    return np.stack([keep[given["labels"][image]] for keep, image in zip(given["keep"], given["image"], strict=True)])


def kept_by_rank(given: Arguments) -> Array:
    return (given["rank"][given["image"]] < given["threshold"][:, None, None]) == given["insert"]


# ---- the registry ----------------------------------------------------------------------------------------------------

WALK_BOUNDS = {"prob": 0.5, "log_prob": 4, "log_odds": 4, "logit": 1}

OPERATORS: dict[str, Operator] = {
    "masked_class_scores": Operator(
        score_arguments, score_oracle, {"prob": 1, "log_prob": 8, "log_odds": 8, "logit": 8}
    ),
    "permutation_shapley_tiles": Operator(
        walk_arguments,
        walk_oracle,
        {f"{value} {moment}": bound for value, bound in WALK_BOUNDS.items() for moment in ("mean", "spread")},
    ),
    "nearest_candidates": Operator(
        nearest_arguments,
        nearest_oracle,
        {"cosine": 32, "regret": 16},
        bounds_cuda={"cosine": 128, "regret": 32},
    ),
    "best_replacement": Operator(best_arguments, best_oracle, {"loss": 2, "regret": 2}),
    "replace_until_flip": Operator(flip_arguments, flip_oracle, {"losses": 8, "regret": 8, "logits": 16, "stop": 16}),
    "submodular_gains": Operator(
        gain_arguments,
        gain_oracle,
        {"confidence": 4, "evidential confidence": 1, "effectiveness": 4, "consistency": 1}
        | {"collaboration": 1, "total": 4, "regret": 4},
        keep=("distance", "running_min", "weights"),
        in_float64=True,
    ),
    "compose_regions": Operator(compose_arguments, pixel_oracle(kept_by_regions), {"pixel": 0}),
    "rank_masks": Operator(rank_arguments, pixel_oracle(kept_by_rank), {"pixel": 0}),
}


# ---- the backends ----------------------------------------------------------------------------------------------------


def emulation() -> ModuleType | None:
    try:
        return importlib.import_module("_finecf_emulated")
    except ImportError:
        return None


def backends(device: str = "cpu") -> list[str]:
    """What can be measured on this machine."""
    if device == "cuda":
        return ["plain torch", "CUDA"]
    compiled = [f"CPU {level}" for level in _native.cpu_isa_levels()]
    return ["plain torch", *compiled, *(["CUDA, emulated"] if emulation() else [])]


@contextmanager
def chosen(backend: str) -> Iterator[None]:
    """Let the public operators run with one backend."""
    before, level = _native.backend(), _native.cpu_isa()
    _native.set_backend("reference" if backend == "plain torch" else "native")
    if backend.startswith("CPU "):
        _native.set_cpu_isa(backend.removeprefix("CPU "))
    try:
        yield
    finally:
        _native.set_backend(before)
        if level is not None:
            _native.set_cpu_isa(level)


def has_kernel(name: str, backend: str, dtype: str) -> bool:
    """Whether the backend has a kernel of its own: float64 on CUDA runs in plain torch, and a build may be older."""
    if backend == "CUDA, emulated":
        return dtype != "float64" and hasattr(emulation(), name)
    return not (backend == "CUDA" and dtype == "float64")


def rounded(given: Arguments, dtype: torch.dtype, keep: tuple[str, ...]) -> Arguments:
    """The arguments as tensors, real ones of the type; plain numbers, words and None as they are."""
    tensors = {name: torch.as_tensor(each) if isinstance(each, np.ndarray) else each for name, each in given.items()}
    return {
        name: each.to(dtype)
        if isinstance(each, torch.Tensor) and each.is_floating_point() and name not in keep
        else each
        for name, each in tensors.items()
    }


def widened(given: Arguments) -> Arguments:
    """The same arguments in numpy, real ones in longdouble."""
    arrays = {name: as_numpy(each) if isinstance(each, torch.Tensor) else each for name, each in given.items()}
    return {name: wide(each) if is_real(each) else each for name, each in arrays.items()}


def is_real(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def as_numpy(value: torch.Tensor) -> Array:
    return (value.double() if value.is_floating_point() else value).cpu().numpy()


def emulator_array(name: str, value: torch.Tensor) -> Array:
    if value.is_floating_point() and name in FLOAT32_ON_DEVICE:
        return value.float().numpy()
    return value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.numpy()


def from_emulator(part: Array) -> Array:
    """bfloat16 goes in and comes out as its bits, in uint16."""
    if part.dtype != np.uint16:
        return part
    return torch.from_numpy(part.view(np.int16)).view(torch.bfloat16).double().numpy()


def run(name: str, backend: str, given: Arguments, device: str) -> tuple[Array, ...]:
    """The operator's results in numpy, real ones in longdouble."""
    module = emulation()
    if backend == "CUDA, emulated" and module is not None:
        arrays = {key: emulator_array(key, each) if torch.is_tensor(each) else each for key, each in given.items()}
        result = getattr(module, name)(**arrays, plan=module.Plan())
        result = tuple(map(from_emulator, result)) if isinstance(result, tuple) else from_emulator(result)
    else:
        tensors = {key: each.to(device) if torch.is_tensor(each) else each for key, each in given.items()}
        with chosen(backend):
            result = getattr(ops, name)(**tensors)
    parts = result if isinstance(result, tuple) else (result,)
    arrays = tuple(as_numpy(part) if torch.is_tensor(part) else part for part in parts)
    return tuple(wide(part) if is_real(part) else part for part in arrays)


def measure(cases: Sequence[Case] = CASES, device: str = "cpu", operators: Sequence[str] = ()) -> list[Row]:
    """The largest errors over the cases, a row for each operator, quantity, type and backend.

    An error that is not a number counts as infinite.
    """
    if np.finfo(np.longdouble).nmant <= 52:
        raise SystemExit("numerics: longdouble is no wider than float64 on this platform, so there is no oracle here")
    rows: dict[tuple[str, str, str, str], Row] = {}
    for name in operators or OPERATORS:
        operator = OPERATORS[name]
        for number, case in enumerate(cases):
            for label, given in operator.arguments(case, np.random.default_rng([number, *name.encode()])):
                for dtype, torch_dtype in DTYPES.items():
                    tensors = rounded(given, torch_dtype, operator.keep)
                    compare = operator.oracle(widened(tensors))
                    computed = torch.float64 if dtype == "float64" or operator.in_float64 else torch.float32
                    eps = torch.finfo(computed).eps
                    for backend in backends(device):
                        if not has_kernel(name, backend, dtype):
                            continue
                        for quantity, (error, scale) in compare(run(name, backend, tensors, device)).items():
                            absolute = float(error) if np.isfinite(error) else np.inf
                            scaled = float(absolute / (eps * scale))
                            key = (name, f"{label} {quantity}".strip(), dtype, backend)
                            before = rows.get(key, Row(*key, 0.0, -1.0, ""))
                            rows[key] = before._replace(
                                absolute=max(absolute, before.absolute),
                                scaled=max(scaled, before.scaled),
                                case=case.name if scaled > before.scaled else before.case,
                            )
    return list(rows.values())


def bound_of(row: Row) -> float:
    operator = OPERATORS[row.operator]
    special = operator.bounds_cuda if row.backend.startswith("CUDA") else {}
    return special.get(row.quantity, operator.bounds[row.quantity])


def beyond(rows: Sequence[Row]) -> list[str]:
    """The errors that rounding does not explain, in sentences."""
    return [
        f"{row.operator}, {row.quantity}, {row.dtype}, {row.backend}: {row.scaled:.3g} units in case {row.case!r}, "
        f"the bound is {bound_of(row):g}"
        for row in rows
        if not row.scaled <= bound_of(row)
    ]


PAGE_COLUMNS = ("plain", "CPU", "CUDA,")
"""How the backends begin that a page written on a CPU has to show, lest a library that does not load empties it."""


# ---- the tables ------------------------------------------------------------------------------------------------------


def surroundings(device: str) -> str:
    """What the figures depend on: versions and the processor."""
    parts = [f"torch {torch.__version__}", f"numpy {np.__version__}"]
    library = Path(_native.build_info()["cpu"]["path"])
    found = (
        re.search(rb"GCC: \([^)\0]*\) [\d.]+|clang version [\d.]+", library.read_bytes()) if library.exists() else None
    )
    if found:
        parts.append(f"kernels compiled by {found[0].decode()}")
    if device == "cuda":
        parts.append(torch.cuda.get_device_name())
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        parts.append(model[1] if model else platform.machine())
    digits = np.finfo(np.longdouble).nmant + 1
    return textwrap.fill(f"{'; '.join(parts)}; the oracle has {digits} bits.", 120)


def tables(rows: Sequence[Row], device: str) -> str:
    """Markdown: for each operator a line for each quantity and type, a column for each backend."""
    columns = [backend for backend in backends(device) if any(row.backend == backend for row in rows)]
    lines = [surroundings(device), ""]
    for name, operator in OPERATORS.items():
        own = {(row.quantity, row.dtype, row.backend): row for row in rows if row.operator == name}
        if not own:
            continue
        lines += [f"### `{name}`", "", "| quantity | type | bound | " + " | ".join(columns) + " | largest in |"]
        lines += ["|---|---|---:|" + "---:|" * len(columns) + "---|"]
        for quantity, bound in operator.bounds.items():
            on_cuda = operator.bounds_cuda.get(quantity)
            stated = f"{bound:g}" if on_cuda is None else f"{bound:g} (CUDA {on_cuda:g})"
            for dtype in DTYPES:
                found = [own.get((quantity, dtype, backend)) for backend in columns]
                worst = max((row for row in found if row), key=lambda row: row.scaled)
                cells = [
                    f"{row.absolute:.1e} ({row.scaled:.2f})" if row and row.absolute else "0" if row else "–"
                    for row in found
                ]
                cells.append(worst.case if worst.absolute else "")
                lines.append(f"| {quantity} | {dtype} | {stated} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def write(path: Path, device: str, text: str) -> None:
    """Put the text between the markers of the device; what stands around them is kept."""
    first, last = f"<!-- numerics {device} -->", f"<!-- end of numerics {device} -->"
    page = path.read_text()
    if page.count(first) != 1 or page.count(last) != 1:
        raise SystemExit(f"numerics: {path.name} must hold the lines {first} and {last} once each")
    before, rest = page.split(first)
    path.write_text(f"{before}{first}\n{text.strip()}\n{last}{rest.split(last)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The largest error of every operator, by type and backend.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables between this file's markers")
    parser.add_argument("--quick", action="store_true", help="three small cases")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("numerics: torch sees no CUDA device")
    absent = set(PAGE_COLUMNS) - {backend.split()[0] for backend in backends()}
    if options.markdown and options.device == "cpu" and absent:
        reason = _native.build_info()["cpu"]["reason"] or "_finecf_emulated is not built"
        raise SystemExit(f"numerics: the page needs every backend, and there is no {' and no '.join(absent)}: {reason}")
    torch.set_num_threads(1)  # plain torch adds in another order with more; the compiled operators do not
    rows = measure(QUICK if options.quick else CASES, options.device)
    text = tables(rows, options.device)
    print(text)
    if options.markdown:
        write(options.markdown, options.device, text)
    if found := beyond(rows):
        sys.exit("\n".join(["numerics: errors that rounding does not explain:", *found]))


if __name__ == "__main__":
    main()
