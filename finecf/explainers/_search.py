"""Replacing cells until the class flips, and undoing what was not needed.

B images, P cells, C classes, N candidates. Cells are numbered in reading order, candidates as the pool numbers them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from finecf import ops
from finecf.explainers._games import Game, LinearGame
from finecf.explainers._pool import Pool

FIRST_EDITS = 10
"""Edits that are tried before the cells ranked lower are looked at: nearly every search ends within them."""

NOISE_FACTOR = 10


@dataclass(frozen=True)
class Rules:
    """What an edit may choose from and what it costs; None: no limit.

    `temperature`: the similarity is log-softmax(cosine / temperature) over the candidates in place of the cosine.
    `refresh`: edits after which the contributions are computed again.
    """

    top_cells: int | None
    top_candidates: int | None
    max_edits: int | None
    reuse_candidates: bool
    weight_sim: float
    weight_cls: float
    temperature: float | None = None
    refresh: int | None = None


@dataclass
class Trace:
    """The edits of one image, and `logits` [T+1,C] before the first and after each.

    `ties` gives the edits (from 1) for which another pair came within the noise of the best one; a search that is one
    operator call does not see them, so they are looked for when they are asked for.
    """

    logits: Tensor
    cells: list[int] = field(default_factory=list)
    candidates: list[int] = field(default_factory=list)
    similarities: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    ties: Callable[[], list[int]] = list
    evaluations: int = 0

    @property
    def edits(self) -> int:
        """T."""
        return len(self.cells)


Rescore = Callable[[Game], Tensor]


def replace_until_flip(
    game: Game,
    pool: Pool,
    target: Tensor,
    scores: Tensor,
    rules: Rules,
    rescore: Rescore,
    excluded: Tensor | None = None,
) -> list[Trace]:
    """Replace cells until `target` [B] has the highest logit, choosing among the cells of highest `scores` [B,P].

    `rescore` gives the scores of an edited game (for `rules.refresh`); `excluded` bool [B,N] bars candidates.
    """
    per_image = 3 * 4 * game.cells * pool.size
    chunk = max(1, game.head.budget // max(1, per_image))
    traces: list[Trace] = []
    for images in torch.arange(len(target), device=target.device).split(chunk):
        own = game.select(images) if len(images) < len(target) else game
        bars = None if excluded is None else excluded[images]
        plain = bars is None and rules.refresh is None and pool.logits.nbytes <= game.head.budget // 8
        if isinstance(own, LinearGame) and plain:
            traces += _whole_search(own, pool, target[images], scores[images], rules)
        else:
            traces += _edit_by_edit(own, pool, target[images], scores[images], rules, rescore, bars)
    return traces


def _whole_search(game: LinearGame, pool: Pool, target: Tensor, scores: Tensor, rules: Rules) -> list[Trace]:
    """The search as one operator call; images that need many edits are searched once more, with all cells."""
    limit = game.cells if rules.max_edits is None else min(rules.max_edits, game.cells)
    traces = _operator_search(game, pool, target, scores, rules, min(limit, FIRST_EDITS))
    short = [i for i, trace in enumerate(traces) if FIRST_EDITS == trace.edits < limit and not _won(trace, target[i])]
    if short:
        again = torch.tensor(short, device=target.device)
        longer = _operator_search(game.select(again), pool, target[again], scores[again], rules, limit)
        for i, trace in zip(short, longer, strict=True):
            traces[i] = trace
    return traces


def _operator_search(
    game: LinearGame, pool: Pool, target: Tensor, scores: Tensor, rules: Rules, limit: int
) -> list[Trace]:
    visited = _visited(scores, rules.top_cells, limit)
    cell_logits = game.cell_logits.gather(1, visited[..., None].expand(-1, -1, game.logits.shape[1]))
    cosine, similarity, shortlist = _similarity(game, pool, visited, rules)
    result = ops.replace_until_flip(
        cell_logits,
        pool.logits,
        similarity,
        game.logits - cell_logits.sum(1),
        target,
        scores.gather(1, visited),
        _whole_range(pool.size, target),
        shortlist,
        rules.top_cells,
        limit,
        rules.reuse_candidates,
        rules.weight_sim,
        rules.weight_cls,
    )
    traces = []
    choices = (pool.size if shortlist is None else shortlist.shape[2]) * min(rules.top_cells or game.cells, game.cells)
    wanted = target.tolist()
    for i, edits in enumerate(result.n_edits.tolist()):
        at, rows = result.cells[i, :edits], result.candidates[i, :edits]
        trace = Trace(
            result.logits[i, : edits + 1],
            visited[i, at].tolist(),
            rows.tolist(),
            cosine[i, at, rows].tolist(),
            result.losses[i, :edits].tolist(),
            evaluations=edits * choices,
        )
        if edits and shortlist is None:
            own = (cell_logits[i], similarity[i], scores[i].gather(0, visited[i]), wanted[i])
            trace.ties = partial(_near_ties, *own, pool, trace, at, rules, game.head.noise)
        traces.append(trace)
    return traces


def _edit_by_edit(
    game: Game,
    pool: Pool,
    target: Tensor,
    scores: Tensor,
    rules: Rules,
    rescore: Rescore,
    excluded: Tensor | None,
) -> list[Trace]:
    """The search as the method states it, for any head and any rule."""
    limit = game.cells if rules.max_edits is None else min(rules.max_edits, game.cells)
    visited = _visited(scores, None if rules.refresh else rules.top_cells, limit)
    cosine, similarity, shortlist = _similarity(game, pool, visited, rules, excluded)
    used = torch.zeros(len(target), pool.size, dtype=torch.bool, device=target.device)
    used = used if excluded is None else used | excluded
    free = torch.ones_like(visited, dtype=torch.bool)
    logits = [game.logits]
    traces = [Trace(game.logits[:0]) for _ in target]
    ties: list[list[int]] = [[] for _ in target]
    for edit in range(limit):
        if rules.refresh and edit and edit % rules.refresh == 0:
            scores = rescore(game)
        open_ = logits[-1].argmax(1) != target
        allowed = _best_cells(scores.gather(1, visited), free, rules.top_cells) & open_[:, None]
        found = _best_pairs(game, pool, visited, similarity, shortlist, target, allowed, used, rules)
        images = (found.cell >= 0).nonzero()[:, 0]
        if not len(images):
            break
        at, rows = found.cell[images], found.candidate[images]
        game = game.edited(images, visited[images, at], pool, rows)
        logits.append(game.logits)
        free[images, at] = False
        if not rules.reuse_candidates:
            used[images, rows] = True
        for i, cell, row in zip(images.tolist(), at.tolist(), rows.tolist(), strict=True):
            trace = traces[i]
            trace.cells.append(int(visited[i, cell]))
            trace.candidates.append(row)
            trace.similarities.append(float(cosine[i, cell, row]))
            trace.losses.append(float(found.loss[i]))
            if float(found.gap[i]) <= NOISE_FACTOR * game.head.noise:
                ties[i].append(edit + 1)
            trace.evaluations += int(allowed[i].sum()) * (pool.size if shortlist is None else shortlist.shape[2])
    for i, trace in enumerate(traces):
        # An image that was finished earlier kept its logits while others went on.
        trace.logits = torch.stack([step[i] for step in logits[: trace.edits + 1]])
        trace.ties = ties[i].copy
    return traces


@dataclass
class _Found:
    """The best pair of each image, [B] each: -1, -1, +inf where nothing is allowed; gap: to the second best."""

    cell: Tensor
    candidate: Tensor
    loss: Tensor
    gap: Tensor


def _best_pairs(
    game: Game,
    pool: Pool,
    visited: Tensor,
    similarity: Tensor,
    shortlist: Tensor | None,
    target: Tensor,
    allowed: Tensor,
    used: Tensor,
    rules: Rules,
) -> _Found:
    if isinstance(game, LinearGame):
        return _best_linear(game, pool, visited, similarity, shortlist, target, allowed, used, rules)
    if shortlist is None:
        raise ValueError("a head that is not linear needs a shortlist of candidates; pass top_candidates")
    count = len(target)
    found = _Found(
        torch.full((count,), -1, device=target.device),
        torch.full((count,), -1, device=target.device),
        similarity.new_full((count,), math.inf),
        similarity.new_full((count,), math.inf),
    )
    for i in allowed.any(1).nonzero()[:, 0].tolist():
        at = allowed[i].nonzero()[:, 0]
        rows = shortlist[i, at]
        logits = game.swap_logits(i, visited[i, at], pool, rows)
        wanted = torch.log_softmax(logits, dim=-1)[..., int(target[i])]
        loss = rules.weight_sim * (1 - similarity[i, at[:, None], rows]) - rules.weight_cls * wanted
        loss = loss.masked_fill(used[i, rows], math.inf)
        best = loss.amin()
        if not bool(best.isfinite()):
            continue
        cell = int((loss == best).any(1).nonzero()[0])
        found.cell[i], found.loss[i] = at[cell], best
        found.candidate[i] = rows[cell][loss[cell] == best].amin()
        if loss.numel() > 1:
            found.gap[i] = loss.flatten().topk(2, largest=False).values.diff()[0]
    return found


def _best_linear(
    game: LinearGame,
    pool: Pool,
    visited: Tensor,
    similarity: Tensor,
    shortlist: Tensor | None,
    target: Tensor,
    allowed: Tensor,
    used: Tensor,
    rules: Rules,
) -> _Found:
    """Through the operator, in slices of the pool that the memory budget allows."""
    cell_logits = game.cell_logits.gather(1, visited[..., None].expand(-1, -1, game.logits.shape[1]))
    width = game.logits.shape[1] + 2 * allowed.shape[1]
    step = max(1024, game.head.budget // (32 * width))

    def best(allowed: Tensor, used: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cell, candidate = torch.full_like(target, -1), torch.full_like(target, -1)
        loss = game.logits.new_full(target.shape, math.inf)
        for first in range(0, pool.size, step):
            own = slice(first, min(first + step, pool.size))
            found = ops.best_replacement(
                cell_logits,
                pool.logits[own],
                similarity[..., own],
                game.logits,
                target,
                allowed,
                _whole_range(own.stop - first, target),
                None if shortlist is None else shortlist - first,
                used[:, own],
                rules.weight_sim,
                rules.weight_cls,
            )
            # Of equal slices the first wins, as the lowest candidate of the lowest cell must: compare cells too.
            better = (found.loss < loss) | ((found.loss == loss) & (found.cell < cell) & (found.cell >= 0))
            cell = torch.where(better, found.cell, cell)
            candidate = torch.where(better, found.candidate + first, candidate)
            loss = torch.where(better, found.loss, loss)
        return cell, candidate, loss

    cell, candidate, loss = best(allowed, used)
    # Any other pair differs in its cell or in its candidate, so the second best is the better of these two.
    images = (cell >= 0).nonzero()[:, 0]
    elsewhere, others = allowed.clone(), used.clone()
    elsewhere[images, cell[images]] = False
    others[images, candidate[images]] = True
    second = torch.minimum(best(elsewhere, used)[2], best(allowed, others)[2])
    return _Found(cell, candidate, loss, second - loss)


def _near_ties(
    cell_logits: Tensor,
    similarity: Tensor,
    scores: Tensor,
    target: int,
    pool: Pool,
    trace: Trace,
    at: Tensor,
    rules: Rules,
    noise: float,
) -> list[int]:
    """The edits of a finished search for which another pair came within the noise of the best one."""
    edits = trace.edits
    free = torch.ones(edits, len(scores), dtype=torch.bool, device=scores.device)
    for done in range(edits - 1):
        free[done + 1 :, at[done]] = False
    edit, cell = _best_cells(scores.expand(edits, -1), free, rules.top_cells).nonzero(as_tuple=True)
    rest = trace.logits[edit] - cell_logits[cell]
    peak = rest.amax(1, keepdim=True)
    sums = (rest - peak).exp_() @ pool.exponentials.T
    wanted = rest[:, target, None] + pool.logits[:, target]
    loss = sums.log_().add_(peak).add_(pool.peaks).sub_(wanted).mul_(rules.weight_cls)
    loss += rules.weight_sim * (1 - similarity[cell])
    if not rules.reuse_candidates:
        for done, row in enumerate(trace.candidates):
            loss[edit > done, row] = math.inf
    best = torch.tensor(trace.losses, device=loss.device, dtype=loss.dtype)
    near = (loss <= (best[edit] + NOISE_FACTOR * noise)[:, None]).sum(1)
    counts = torch.zeros(edits, dtype=near.dtype, device=near.device).index_add_(0, edit, near)
    return [number for number, count in enumerate(counts.tolist(), 1) if count > 1]


def _visited(scores: Tensor, top_cells: int | None, limit: int) -> Tensor:
    """The cells [B,n] that a search can come to, ascending: one slides into the choice after each edit."""
    cells = scores.shape[1]
    count = cells if top_cells is None else min(cells, top_cells + max(limit, 1) - 1)
    if count == cells:
        return torch.arange(cells, device=scores.device).expand(len(scores), cells)
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


def _best_cells(scores: Tensor, free: Tensor, top_cells: int | None) -> Tensor:
    """Which of the free cells [B,n] are among the `top_cells` of highest score."""
    if top_cells is None or top_cells >= scores.shape[1]:
        return free
    order = scores.masked_fill(~free, -math.inf).sort(dim=1, descending=True, stable=True).indices[:, :top_cells]
    return torch.zeros_like(free).scatter_(1, order, True) & free


def _similarity(
    game: Game, pool: Pool, visited: Tensor, rules: Rules, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cosine [B,n,N], the similarity that the loss uses, and the shortlist [B,n,K] of most similar candidates."""
    cosine = pool.similarity(game.vectors(visited).flatten(0, 1)).unflatten(0, visited.shape)
    similarity = cosine
    if rules.temperature is not None:
        similarity = torch.log_softmax(cosine / rules.temperature, dim=-1)
    if rules.top_candidates is None or rules.top_candidates >= pool.size:
        every = torch.arange(pool.size, device=visited.device).expand(*visited.shape, -1)
        return cosine, similarity, None if isinstance(game, LinearGame) else every
    ranked = cosine if excluded is None else cosine.masked_fill(excluded[:, None], -math.inf)
    return cosine, similarity, _most_similar(ranked, rules.top_candidates)


def _most_similar(cosine: Tensor, count: int) -> Tensor:
    """Indices [...,K] of the highest values, ties to the lowest index."""
    top = cosine.topk(count, dim=-1)
    edge = top.values[..., -1:]
    if bool(((cosine >= edge).sum(-1) == count).all()):
        return top.indices
    # topk leaves open which of the values equal to the last one it takes.
    return cosine.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _whole_range(count: int, target: Tensor) -> Tensor:
    """The candidate range [B,2] of images that may all use the same `count` candidates."""
    return torch.tensor([[0, count]], device=target.device).expand(len(target), 2)


def _won(trace: Trace, target: Tensor) -> bool:
    return int(trace.logits[-1].argmax()) == int(target)


def needed_edits(game: Game, image: int, pool: Pool, trace: Trace, target: int) -> tuple[list[int], Tensor]:
    """Backward elimination: undo edits as long as the class stays flipped, each time the one that is missed least.

    Returns the positions of the edits kept, in order, and the logits [C] with them alone. No edit that is kept can be
    undone alone; a smaller set of other edits may exist.
    """
    kept = list(range(trace.edits))
    logits = trace.logits[-1]
    cells = torch.tensor(trace.cells, device=game.logits.device)
    rows = torch.tensor(trace.candidates, device=game.logits.device)
    while kept:
        keep = torch.zeros(len(kept), trace.edits, dtype=torch.bool, device=logits.device)
        keep[:, kept] = True
        keep[torch.arange(len(kept)), kept] = False
        without = game.subset_logits(image, cells, pool, rows, keep)
        others = without.clone()
        others[:, target] = -math.inf
        margin = (without[:, target] - others.amax(1)).masked_fill(without.argmax(1) != target, -math.inf)
        best = int(margin.argmax())
        if not math.isfinite(float(margin[best])):
            break
        logits = without[best]
        del kept[best]
    return kept, logits
