"""Nearest bank cells, the best single replacement, and replacement until the class flips.

B images, P cells, C >= 2 classes, D channels, N bank rows; rows of one class lie together, so that a class is a range
of rows. Replacing cell p by row n turns the logits l into `after = l - cell_logits[p] + candidate_logits[n]` and costs

    loss(p, n) = weight_sim * (1 - similarity[p, n]) + weight_cls * -log softmax(after)_t

Ties go to the lowest cell, then to the lowest candidate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finecf.ops._checks import Arguments
from finecf.ops._dispatch import fake, result_dtype, run, working_precision
from finecf.reference import replacement as reference


class Nearest(NamedTuple):
    """Bank rows nearest to each query."""

    cosine: Tensor
    """[P,k], falling, in -1..1."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, of no use here
    """int64 [P,k]: rows of the bank."""


class Replacement(NamedTuple):
    """The best replacement in each image; -1, -1 and +inf where nothing is allowed."""

    cell: Tensor
    """int64 [B]."""
    candidate: Tensor
    """int64 [B]: row of candidate_logits."""
    loss: Tensor
    """[B]."""


class Replacements(NamedTuple):
    """The edits of each image, in order; T = max_edits."""

    cells: Tensor
    """int64 [B,T], padded with -1."""
    candidates: Tensor
    """int64 [B,T]: rows of candidate_logits, padded with -1."""
    losses: Tensor
    """[B,T], padded with +inf."""
    logits: Tensor
    """[B,T+1,C]: before the first edit and after each; rows after the last edit repeat it."""
    n_edits: Tensor
    """int64 [B]."""
    flipped: Tensor
    """bool [B]: whether the last logits have their maximum (ties: lowest class) at the target."""


def nearest_candidates(query: Tensor, bank: Tensor, k: int) -> Nearest:
    """The k bank rows of highest cosine with each query row. A zero row has cosine 0 with everything.

    Args:
        query: [P,D].
        bank: [N,D].
        k: how many, 1..N.

    Returns:
        cosine [P,k], falling (ties: lowest row), and index int64 [P,k].

    Raises:
        TypeError: an argument is not a tensor of floating-point numbers, or k is not a whole number.
        ValueError: shapes or devices that do not fit together, k outside 1..N, NaN or infinity, inputs that require
            grad.
    """
    args = Arguments("nearest_candidates")
    args.real("query", query, "PD")
    args.real("bank", bank, "ND")
    args.at_least("D", 1, "channels")
    args.at_least("N", 1, "rows")
    k = args.number("k", k, int, 1, bank.shape[0])
    query, bank = working_precision(query, bank)
    query = _bounded(query, args.finite("query", query))
    bank = _bounded(bank, args.finite("bank", bank))
    return Nearest(*run("nearest_candidates", reference.nearest_candidates, query, bank, k))


def best_replacement(
    cell_logits: Tensor,
    candidate_logits: Tensor,
    similarity: Tensor,
    logits: Tensor,
    target: Tensor,
    allowed: Tensor,
    candidate_range: Tensor,
    shortlist: Tensor | None = None,
    used: Tensor | None = None,
    weight_sim: float = 1.0,
    weight_cls: float = 1.0,
) -> Replacement:
    """The pair (cell, candidate) of least loss in each image.

    Args:
        cell_logits: [B,P,C], what each cell adds to the logits now.
        candidate_logits: [N,C], what each bank row would add in its place (divided by P already).
        similarity: [B,P,N], any reals; cosines as a rule.
        logits: [B,C], the current logits.
        target: integers [B] in 0..C-1.
        allowed: bool [B,P], cells that may be replaced.
        candidate_range: integers [B,2], the first row and the row past the last that may replace.
        shortlist: integers [B,P,K], the only rows that may replace each cell; entries outside the range count for none.
        used: bool [B,N], rows that may not be used (again).
        weight_sim: weight of the dissimilarity, >= 0.
        weight_cls: weight of the target's negative log-probability, >= 0.

    Returns:
        cell int64 [B], candidate int64 [B], loss [B]; -1, -1, +inf where nothing is allowed.

    Raises:
        TypeError: an argument is not a tensor, or not of the kind of number asked for.
        ValueError: shapes or devices that do not fit together, fewer than two classes, a target or a range out of
            bounds, a negative weight, NaN or infinity, or inputs that require grad.
    """
    args = Arguments("best_replacement")
    args.real("cell_logits", cell_logits, "BPC")
    args.real("candidate_logits", candidate_logits, "NC")
    args.real("similarity", similarity, "BPN")
    args.real("logits", logits, "BC")
    allowed = args.boolean("allowed", allowed, "BP")
    if used is not None:
        used = args.boolean("used", used, "BN")
    target, candidate_range, shortlist, weight_sim, weight_cls = _check_search(
        args, target, candidate_range, shortlist, weight_sim, weight_cls
    )
    cell_logits, candidate_logits, similarity, logits = working_precision(
        cell_logits, candidate_logits, similarity, logits
    )
    reach = args.finite("logits", logits)
    reach += args.finite("cell_logits", cell_logits) + args.finite("candidate_logits", candidate_logits)
    _check_loss(args, similarity, reach, weight_sim, weight_cls)
    return Replacement(
        *run(
            "best_replacement",
            reference.best_replacement,
            cell_logits,
            candidate_logits,
            similarity,
            logits,
            target,
            allowed,
            candidate_range,
            shortlist,
            used,
            weight_sim,
            weight_cls,
        )
    )


def replace_until_flip(
    cell_logits: Tensor,
    candidate_logits: Tensor,
    similarity: Tensor,
    base_logits: Tensor,
    target: Tensor,
    cell_scores: Tensor,
    candidate_range: Tensor,
    shortlist: Tensor | None = None,
    top_cells: int | None = None,
    max_edits: int | None = None,
    reuse_candidates: bool = False,
    weight_sim: float = 1.0,
    weight_cls: float = 1.0,
) -> Replacements:
    """Best replacement after best replacement until the target has the highest logit (ties: lowest class).

    Starts from base_logits + the sum of cell_logits. Each edit takes the pair of least loss among the `top_cells` cells
    of highest score that are not edited yet (ties: lowest cell) and the candidates that this image has not used yet. It
    stops at the flip, when nothing is left to choose, or after `max_edits`; an image already of the target class has no
    edit and counts as flipped.

    Args:
        cell_logits: [B,P,C].
        candidate_logits: [N,C] (divided by P already).
        similarity: [B,P,N], any reals; cosines as a rule.
        base_logits: [B,C], the logits without any cell.
        target: integers [B] in 0..C-1.
        cell_scores: [B,P], which cells to try first.
        candidate_range: integers [B,2], the first row and the row past the last that may replace.
        shortlist: integers [B,P,K], the only rows that may replace each cell; entries outside the range count for none.
        top_cells: how many cells an edit chooses among; None, or P and more: all.
        max_edits: most edits, T below; None: P.
        reuse_candidates: whether one row may serve several edits of an image.
        weight_sim: weight of the dissimilarity, >= 0.
        weight_cls: weight of the target's negative log-probability, >= 0.

    Returns:
        cells and candidates int64 [B,T] padded with -1, losses [B,T] padded with +inf, logits [B,T+1,C], n_edits
        int64 [B], flipped bool [B].

    Raises:
        TypeError, ValueError: as `best_replacement`; also top_cells < 1 or max_edits < 0.
    """
    args = Arguments("replace_until_flip")
    args.real("cell_logits", cell_logits, "BPC")
    args.real("candidate_logits", candidate_logits, "NC")
    args.real("similarity", similarity, "BPN")
    args.real("base_logits", base_logits, "BC")
    args.real("cell_scores", cell_scores, "BP")
    target, candidate_range, shortlist, weight_sim, weight_cls = _check_search(
        args, target, candidate_range, shortlist, weight_sim, weight_cls
    )
    cells = cell_logits.shape[1]
    top_cells = cells if top_cells is None else min(cells, args.number("top_cells", top_cells, int, 1))
    max_edits = cells if max_edits is None else args.number("max_edits", max_edits, int, 0)
    cell_logits, candidate_logits, similarity, base_logits, cell_scores = working_precision(
        cell_logits, candidate_logits, similarity, base_logits, cell_scores
    )
    args.finite("cell_scores", cell_scores)
    # Every sum over cells, with any of them replaced, and the one exchange that is being tried.
    largest = args.finite("cell_logits", cell_logits) + args.finite("candidate_logits", candidate_logits)
    reach = args.finite("base_logits", base_logits) + (cells + 1) * largest
    _check_loss(args, similarity, reach, weight_sim, weight_cls)
    return Replacements(
        *run(
            "replace_until_flip",
            reference.replace_until_flip_factorised,
            cell_logits,
            candidate_logits,
            similarity,
            base_logits,
            target,
            cell_scores,
            candidate_range,
            shortlist,
            top_cells,
            max_edits,
            bool(reuse_candidates),
            weight_sim,
            weight_cls,
        )
    )


def _check_search(
    args: Arguments,
    target: Tensor,
    candidate_range: Tensor,
    shortlist: Tensor | None,
    weight_sim: float,
    weight_cls: float,
) -> tuple[Tensor, Tensor, Tensor | None, float, float]:
    args.at_least("C", 2, "classes")
    args.at_least("P", 1, "cells")
    if shortlist is not None:
        shortlist = args.integer("shortlist", shortlist, "BPK")
        if shortlist.shape[2] == 0:
            # Without an element it has no address, which a kernel would take for no shortlist: list a row that is none.
            shortlist = shortlist.new_full((*shortlist.shape[:2], 1), -1)
    return (
        args.target(target),
        args.candidate_range(candidate_range),
        shortlist,
        float(args.number("weight_sim", weight_sim, float, 0.0)),
        float(args.number("weight_cls", weight_cls, float, 0.0)),
    )


def _check_loss(args: Arguments, similarity: Tensor, reach: float, weight_sim: float, weight_cls: float) -> None:
    largest = max(reach, weight_sim * (1 + args.finite("similarity", similarity)) + weight_cls * 2 * reach)
    args.headroom(largest, "logits and weighted losses")


def _bounded(rows: Tensor, largest: float) -> Tensor:
    """Rows whose squares neither overflow nor vanish; a cosine does not depend on the length of a row."""
    if largest == 0 or 1e-8 <= largest <= 1e8:
        return rows
    scale = rows.abs().amax(dim=1, keepdim=True)
    return rows / scale.where(scale > 0, 1)


@fake("nearest_candidates")
def _nearest_candidates(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    cosine = query.new_empty(query.shape[0], k, dtype=result_dtype(query.dtype))
    return cosine, torch.empty_like(cosine, dtype=torch.int64)


@fake("best_replacement")
def _best_replacement(
    cell_logits: Tensor,
    candidate_logits: Tensor,
    similarity: Tensor,
    logits: Tensor,
    target: Tensor,
    allowed: Tensor,
    candidate_range: Tensor,
    shortlist: Tensor | None,
    used: Tensor | None,
    weight_sim: float,
    weight_cls: float,
) -> tuple[Tensor, Tensor, Tensor]:
    cell = target.new_empty(target.shape[0])
    return cell, torch.empty_like(cell), logits.new_empty(target.shape[0], dtype=result_dtype(logits.dtype))


@fake("replace_until_flip")
def _replace_until_flip(
    cell_logits: Tensor,
    candidate_logits: Tensor,
    similarity: Tensor,
    base_logits: Tensor,
    target: Tensor,
    cell_scores: Tensor,
    candidate_range: Tensor,
    shortlist: Tensor | None,
    top_cells: int,
    max_edits: int,
    reuse_candidates: bool,
    weight_sim: float,
    weight_cls: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, classes = cell_logits.shape
    dtype = result_dtype(cell_logits.dtype)
    cells = target.new_empty(batch, max_edits)
    losses = cell_logits.new_empty(batch, max_edits, dtype=dtype)
    logits = cell_logits.new_empty(batch, max_edits + 1, classes, dtype=dtype)
    n_edits = target.new_empty(batch)
    return cells, torch.empty_like(cells), losses, logits, n_edits, torch.empty_like(n_edits, dtype=torch.bool)
