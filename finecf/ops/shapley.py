"""Class values of coalitions of cells, and sampled Shapley values with standard errors.

B images, P cells, C >= 2 classes, M coalitions or permutations. The logits of a coalition are base_logits plus the sum
of its cells' cell_logits; it is worth, for the target class t,

    prob      softmax(logits)_t
    log_prob  log softmax(logits)_t
    log_odds  logits_t - logsumexp over the other classes
    logit     logits_t
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from finecf.ops._checks import Arguments, values_visible
from finecf.ops._dispatch import fake, result_dtype, run, working_precision
from finecf.reference import shapley as reference
from finecf.reference.shapley import TILE, VALUES


class ShapleyState(NamedTuple):
    """Where a sampling of Shapley values stands; pass it back to `permutation_shapley` to go on."""

    mean: Tensor
    """float64 [B,P]: mean of the samples so far."""
    squares: Tensor
    """float64 [B,P]: sum of their squared deviations from it."""
    count: int  # type: ignore[assignment]  # hides tuple.count, of no use here
    """Number of samples."""


class PermutationShapley(NamedTuple):
    """Sampled Shapley values of the cells."""

    mean: Tensor
    """[B,P], in the precision of the inputs (at least float32)."""
    stderr: Tensor
    """[B,P]: standard error of the mean; +inf with fewer than two samples."""
    count: int  # type: ignore[assignment]  # hides tuple.count, of no use here
    """Number of samples; an antithetic pair of permutations is one."""
    state: ShapleyState
    """What a later call continues from."""


def masked_class_scores(
    cell_logits: Tensor, base_logits: Tensor, masks: Tensor, target: Tensor, value: str = "prob"
) -> Tensor:
    """The target's value under every mask: `base_logits + sum_p masks[m,p] * cell_logits[:,p]`, read by `value`.

    Args:
        cell_logits: [B,P,C], what each cell adds to the logits.
        base_logits: [B,C], the logits without any cell.
        masks: [M,P], any reals: 0 and 1 for coalitions, or soft masks. Shared by the images.
        target: integers [B] in 0..C-1.
        value: "prob" (in 0..1), "log_prob", "log_odds" or "logit".

    Returns:
        [B,M], finite.

    Raises:
        TypeError: an argument is not a tensor, or not of floating-point numbers or integers as asked.
        ValueError: shapes or devices that do not fit together, fewer than two classes, a target out of range, an
            unknown value, NaN or infinity, logits so large that their sums overflow, or inputs that require grad.
    """
    args = Arguments("masked_class_scores")
    args.real("cell_logits", cell_logits, "BPC")
    args.real("base_logits", base_logits, "BC")
    args.real("masks", masks, "MP")
    args.at_least("C", 2, "classes")
    target = args.target(target)
    args.choice("value", value, VALUES)
    cell_logits, base_logits, masks = working_precision(cell_logits, base_logits, masks)
    strength = max(1.0, args.finite("masks", masks)) * args.finite("cell_logits", cell_logits)
    reach = args.finite("base_logits", base_logits) + masks.shape[1] * strength
    args.headroom(reach, "cell_logits")
    scores: Tensor = run(
        "masked_class_scores", reference.masked_class_scores, cell_logits, base_logits, masks, target, value
    )
    return scores


def permutation_shapley_tiles(
    cell_logits: Tensor,
    base_logits: Tensor,
    permutations: Tensor,
    target: Tensor,
    value: str = "prob",
    antithetic: bool = True,
) -> tuple[Tensor, Tensor]:
    """Moments of sampled Shapley values over fixed tiles of 32 permutations; see `permutation_shapley`.

    Args:
        cell_logits: [B,P,C].
        base_logits: [B,C].
        permutations: integers [M,P], each row an order of the cells 0..P-1.
        target: integers [B] in 0..C-1.
        value: as in `masked_class_scores`.
        antithetic: whether each permutation is paired with its reverse, the pair's mean being one sample.

    Returns:
        Two float64 tensors [B, ceil(M/32), P]: the mean of a tile's samples, and the sum of their squared deviations
        from it.

    Raises:
        TypeError, ValueError: as `masked_class_scores`, and where a row of permutations is none.
    """
    args = Arguments("permutation_shapley_tiles")
    cell_logits, base_logits, permutations, target = _check_walk(
        args, cell_logits, base_logits, permutations, target, value
    )
    return _tiles(cell_logits, base_logits, permutations, target, value, antithetic)


def permutation_shapley(
    cell_logits: Tensor,
    base_logits: Tensor,
    permutations: Tensor,
    target: Tensor,
    value: str = "prob",
    antithetic: bool = True,
    state: ShapleyState | None = None,
) -> PermutationShapley:
    """Shapley values of the cells, sampled along permutations (Castro et al. 2009; Mitchell et al. 2022 for pairs).

    Each permutation is walked from the empty to the full coalition; a cell's marginal is the value after it joined
    minus the value before, so the marginals of one permutation sum to value(full) - value(empty). Samples are merged in
    float64 over tiles of 32 permutations in a fixed order (Chan et al. 1979): calls that continue from `state` with
    multiples of 32 permutations give the same bits as one call with all of them. "logit" is additive: its Shapley value
    is cell_logits[:, :, t] itself, so it is returned without a walk and with a standard error of 0.

    Args:
        cell_logits: [B,P,C].
        base_logits: [B,C].
        permutations: integers [M,P], each row an order of the cells 0..P-1. Shared by the images.
        target: integers [B] in 0..C-1.
        value: as in `masked_class_scores`.
        antithetic: whether each permutation is paired with its reverse, the pair's mean being one sample.
        state: the `state` of an earlier result on the same logits, to add more samples to.

    Returns:
        mean [B,P], stderr [B,P] (+inf with fewer than two samples), count, and the state to continue from.

    Raises:
        TypeError, ValueError: as `masked_class_scores`; also where a row of permutations is none, where there is
            neither a permutation nor a state, or where the state is of another shape.
    """
    args = Arguments("permutation_shapley")
    cell_logits, base_logits, permutations, target = _check_walk(
        args, cell_logits, base_logits, permutations, target, value
    )
    if state is not None:
        if not isinstance(state, ShapleyState):
            raise TypeError(
                f"finecf.ops.permutation_shapley: state must be the state of an earlier result, "
                f"got {type(state).__name__}; pass result.state, or None to start"
            )
        args.real("state.mean", state.mean, "BP")
        args.real("state.squares", state.squares, "BP")
    elif permutations.shape[0] == 0:
        args.refuse("permutations must hold at least one row, got 0; draw some, or pass the state of an earlier result")
    samples = permutations.shape[0]
    if value == "logit":
        chosen = target.view(-1, 1, 1).expand(-1, cell_logits.shape[1], 1)
        exact = cell_logits.gather(2, chosen).squeeze(2).double()
        parts = [(exact, torch.zeros_like(exact), samples)] if samples else []
    else:
        means, squares = _tiles(cell_logits, base_logits, permutations, target, value, antithetic)
        parts = [(means[:, tile], squares[:, tile], min(TILE, samples - tile * TILE)) for tile in range(means.shape[1])]
    if state is None:
        nothing = torch.zeros(cell_logits.shape[:2], dtype=torch.float64, device=cell_logits.device)
        state = ShapleyState(nothing, nothing, 0)
    for mean, deviations, count in parts:
        state = _merge(state, mean, deviations, count)
    if state.count < 2:
        stderr = torch.full_like(state.mean, math.inf)
    else:
        stderr = (state.squares / (state.count * (state.count - 1))).sqrt()
    dtype = result_dtype(cell_logits.dtype)
    return PermutationShapley(state.mean.to(dtype), stderr.to(dtype), state.count, state)


def _merge(state: ShapleyState, mean: Tensor, squares: Tensor, count: int) -> ShapleyState:
    """Moments of the union of two sets of samples (Chan, Golub, LeVeque 1979)."""
    total = state.count + count
    difference = mean - state.mean
    return ShapleyState(
        state.mean + difference * (count / total),
        state.squares + squares + difference * difference * (state.count * count / total),
        total,
    )


def _check_walk(
    args: Arguments, cell_logits: Tensor, base_logits: Tensor, permutations: Tensor, target: Tensor, value: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args.real("cell_logits", cell_logits, "BPC")
    args.real("base_logits", base_logits, "BC")
    permutations = args.integer("permutations", permutations, "MP", torch.int32)
    args.at_least("C", 2, "classes")
    args.at_least("P", 1, "cells")
    target = args.target(target)
    args.choice("value", value, VALUES)
    cells = permutations.shape[1]
    if values_visible() and permutations.numel():
        seen = torch.zeros(permutations.shape, dtype=torch.bool, device=permutations.device)
        seen.scatter_(1, permutations.clamp(0, cells - 1).long(), True)
        # P values that all lie in 0..P-1 and reach every one of them are an order; clamping must not have helped.
        low, high = torch.aminmax(permutations)
        if not (bool(seen.all()) and int(low) == 0 and int(high) == cells - 1):
            args.refuse(
                f"permutations must hold each cell 0..{cells - 1} once in every row, got a row that does not; "
                "draw them with torch.randperm"
            )
    cell_logits, base_logits = working_precision(cell_logits, base_logits)
    reach = args.finite("base_logits", base_logits) + cells * args.finite("cell_logits", cell_logits)
    args.headroom(reach, "cell_logits")
    return cell_logits, base_logits, permutations, target


def _tiles(
    cell_logits: Tensor, base_logits: Tensor, permutations: Tensor, target: Tensor, value: str, antithetic: bool
) -> tuple[Tensor, Tensor]:
    mean, squares = run(
        "permutation_shapley_tiles",
        reference.permutation_shapley_tiles,
        cell_logits,
        base_logits,
        permutations,
        target,
        value,
        antithetic,
    )
    return mean, squares


@fake("masked_class_scores")
def _masked_class_scores(cell_logits: Tensor, base_logits: Tensor, masks: Tensor, target: Tensor, value: str) -> Tensor:
    return cell_logits.new_empty(cell_logits.shape[0], masks.shape[0], dtype=result_dtype(cell_logits.dtype))


@fake("permutation_shapley_tiles")
def _permutation_shapley_tiles(
    cell_logits: Tensor, base_logits: Tensor, permutations: Tensor, target: Tensor, value: str, antithetic: bool
) -> tuple[Tensor, Tensor]:
    tiles = (permutations.shape[0] + TILE - 1) // TILE
    mean = cell_logits.new_empty(cell_logits.shape[0], tiles, cell_logits.shape[1], dtype=torch.float64)
    return mean, torch.empty_like(mean)
