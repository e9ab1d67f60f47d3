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
"""How far above the numeric noise a gap must be not to count as a tie."""

BALANCE = 0.5
"""What the span of the cosine costs, as a share of the largest gain that one replacement brings (see `_balance`)."""


@dataclass(frozen=True)
class Rules:
    """What an edit may choose from and what it costs; None: no limit.

    `weight_sim`: None stands for a weight that is found for each image (see `_balance`).
    `temperature`: the similarity is log-softmax(cosine / temperature) over the candidates in place of the cosine.
    `refresh`: edits after which the contributions are computed again.
    """

    top_cells: int | None
    top_candidates: int | None
    max_edits: int | None
    reuse_candidates: bool
    weight_sim: float | None
    weight_cls: float
    temperature: float | None = None
    refresh: int | None = None


@dataclass
class Trace:
    """The edits of one image, and `logits` [T+1,C] before the first and after each.

    `weight_sim` is the weight that the similarity had in the losses.
    `ties` gives the edits (from 1) for which another pair came within the noise of the best one; a search that is one
    operator call does not see them, so they are looked for when they are asked for.
    """

    logits: Tensor
    weight_sim: float
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
        plain = bars is None and rules.refresh is None and pool.light(game.head.budget)
        if isinstance(own, LinearGame) and plain:
            traces += _whole_search(own, pool, target[images], scores[images], rules)
        else:
            traces += _edit_by_edit(own, pool, target[images], scores[images], rules, rescore, bars)
    return traces


def _whole_search(game: LinearGame, pool: Pool, target: Tensor, scores: Tensor, rules: Rules) -> list[Trace]:
    """The search as one operator call; images that need many edits are searched once more, with all cells."""
    limit = _limit(game, rules)
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
    choice = _choice(game, pool, target, scores, rules, _visited(scores, rules.top_cells, limit))
    cell_logits = choice.cell_logits(game)
    visited_scores = scores.gather(1, choice.visited)
    result = ops.replace_until_flip(
        cell_logits,
        pool.logits,
        choice.similarity,
        game.logits - cell_logits.sum(1),
        target,
        visited_scores,
        _whole_range(pool.size, target),
        choice.shortlist,
        rules.top_cells,
        limit,
        rules.reuse_candidates,
        1.0,
        rules.weight_cls,
    )
    traces = []
    wanted, weights = target.tolist(), choice.weight_sim.tolist()
    for i, edits in enumerate(result.n_edits.tolist()):
        at, rows = result.cells[i, :edits], result.candidates[i, :edits]
        trace = Trace(
            result.logits[i, : edits + 1],
            weights[i],
            choice.visited[i, at].tolist(),
            rows.tolist(),
            choice.cosine[i, at, rows].tolist(),
            result.losses[i, :edits].tolist(),
            evaluations=edits * choice.candidates * min(rules.top_cells or game.cells, game.cells),
        )
        if edits and choice.shortlist is None:
            own = cell_logits[i], choice.similarity[i], visited_scores[i], wanted[i]
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
    limit = _limit(game, rules)
    visited = _visited(scores, None if rules.refresh else rules.top_cells, limit)
    choice = _choice(game, pool, target, scores, rules, visited, excluded)
    used = choice.barred.clone()
    free = torch.ones_like(visited, dtype=torch.bool)
    logits = [game.logits]
    traces = [Trace(game.logits[:0], weight) for weight in choice.weight_sim.tolist()]
    ties: list[list[int]] = [[] for _ in traces]
    for edit in range(limit):
        if rules.refresh and edit and edit % rules.refresh == 0:
            scores = rescore(game)
        open_ = logits[-1].argmax(1) != target
        allowed = _best_cells(scores.gather(1, visited), free, rules.top_cells) & open_[:, None]
        found = _best(game, choice, allowed, used, 1.0, rules.weight_cls)
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
            trace.similarities.append(float(choice.cosine[i, cell, row]))
            trace.losses.append(float(found.loss[i]))
            if float(found.gap[i]) <= NOISE_FACTOR * game.head.noise:
                ties[i].append(edit + 1)
            trace.evaluations += int(allowed[i].sum()) * choice.candidates
    for i, trace in enumerate(traces):
        # An image that was finished earlier kept its logits while others went on.
        trace.logits = torch.stack([step[i] for step in logits[: trace.edits + 1]])
        trace.ties = ties[i].copy
    return traces


@dataclass
class _Choice:
    """What the edits of a search choose from: the pairs of a cell of `visited` [B,n] and a candidate of the pool.

    cosine [B,n,N]; similarity [B,n,N], into which the weights weight_sim [B] have gone, so that the operators, which
    take one weight for all images, are given 1; shortlist [B,n,K] of the most similar candidates (None: all N); barred
    bool [B,N].
    """

    pool: Pool
    target: Tensor
    visited: Tensor
    cosine: Tensor
    similarity: Tensor
    shortlist: Tensor | None
    barred: Tensor
    weight_sim: Tensor

    @property
    def candidates(self) -> int:
        """How many candidates each cell has."""
        return self.pool.size if self.shortlist is None else self.shortlist.shape[2]

    def rows(self, image: int, at: Tensor) -> Tensor:
        """Candidates [S,K] of some of the visited cells of an image."""
        if self.shortlist is None:
            return torch.arange(self.pool.size, device=at.device).expand(len(at), -1)
        return self.shortlist[image, at]

    def cell_logits(self, game: LinearGame) -> Tensor:
        """Cell logits [B,n,C] of the visited cells."""
        return game.cell_logits.gather(1, self.visited[..., None].expand(-1, -1, game.logits.shape[1]))


def _choice(
    game: Game,
    pool: Pool,
    target: Tensor,
    scores: Tensor,
    rules: Rules,
    visited: Tensor,
    excluded: Tensor | None = None,
) -> _Choice:
    cosine = pool.similarity(game.vectors(visited).flatten(0, 1)).unflatten(0, visited.shape)
    similarity = cosine
    if rules.temperature is not None:
        similarity = torch.log_softmax(cosine / rules.temperature, dim=-1)
    barred = torch.zeros(len(target), pool.size, dtype=torch.bool, device=target.device)
    barred = barred if excluded is None else excluded
    count = pool.size if rules.top_candidates is None else min(rules.top_candidates, pool.size)
    shortlist = None
    if count < pool.size or not isinstance(game, LinearGame):
        shortlist = _most_similar(cosine if excluded is None else cosine.masked_fill(barred[:, None], -2), count)
    choice = _Choice(pool, target, visited, cosine, similarity, shortlist, barred, similarity.new_ones(len(target)))
    if rules.weight_sim is None:
        choice.weight_sim = _balance(game, choice, scores, rules)
    else:
        choice.weight_sim *= rules.weight_sim
    choice.similarity = 1 - choice.weight_sim[:, None, None] * (1 - similarity)
    return choice


def _balance(game: Game, choice: _Choice, scores: Tensor, rules: Rules) -> Tensor:
    """The weight [B] that makes the two losses comparable over the pairs of the first edit.

    The span of the cosine then costs half of what the best single replacement takes off the class loss: a replacement
    is never so dear that nearly identical cells, which change nothing, are preferred to one that repairs the mistake.
    """
    first = _best_cells(
        scores.gather(1, choice.visited), torch.ones_like(choice.visited, dtype=torch.bool), rules.top_cells
    )
    best = _least_class_loss(game, choice, first)
    now = -game.logits.log_softmax(1).gather(1, choice.target[:, None])[:, 0]
    low, high = choice.similarity[first].view(len(first), -1).aminmax(dim=1)
    span = (high - low).clamp_min(torch.finfo(low.dtype).eps)
    gain = torch.where(best.isfinite(), now - best, 0).clamp_min(0)
    return rules.weight_cls * BALANCE * gain / span


def _least_class_loss(game: Game, choice: _Choice, cells: Tensor) -> Tensor:
    """The least -log p(target) [B] that one replacement in `cells` bool [B,n] leads to; +inf where there is none."""
    pool = choice.pool
    if not isinstance(game, LinearGame) or choice.shortlist is not None or not pool.light(game.head.budget):
        return _least(game, choice, cells, choice.barred, 0.0, 1.0).loss
    cell_logits = choice.cell_logits(game)
    least = []
    for i, target in enumerate(choice.target.tolist()):
        losses = _class_losses(game.logits[i] - cell_logits[i, cells[i]], target, pool)
        least.append(losses.amin(0).masked_fill(choice.barred[i], math.inf).amin())
    return torch.stack(least)


@dataclass
class _Found:
    """The best pair of each image, [B] each: -1, -1, +inf where nothing is allowed; gap: how much worse the next is."""

    cell: Tensor
    candidate: Tensor
    loss: Tensor
    gap: Tensor

    @staticmethod
    def nothing(like: Tensor) -> _Found:
        """No pair for any image; `like` [B,...] gives batch, type and device of the losses."""
        none = torch.full((len(like),), -1, device=like.device)
        return _Found(none, none.clone(), like.new_full((len(like),), math.inf), like.new_full((len(like),), math.inf))


def _best(game: Game, choice: _Choice, allowed: Tensor, used: Tensor, weight_sim: float, weight_cls: float) -> _Found:
    """The pair of least loss among the allowed cells [B,n] and the candidates that are not used [B,N], and the gap."""
    best = _least(game, choice, allowed, used, weight_sim, weight_cls)
    if not isinstance(game, LinearGame):
        return best
    images = (best.cell >= 0).nonzero()[:, 0]
    # Any other pair differs in its cell or in its candidate, so the second best is the better of these two.
    elsewhere, others = allowed.clone(), used.clone()
    elsewhere[images, best.cell[images]] = False
    others[images, best.candidate[images]] = True
    left = _least_linear(game, choice, elsewhere, used, weight_sim, weight_cls)
    right = _least_linear(game, choice, allowed, others, weight_sim, weight_cls)
    best.gap[images] = (torch.minimum(left.loss, right.loss) - best.loss)[images]
    return best


def _least(game: Game, choice: _Choice, allowed: Tensor, used: Tensor, weight_sim: float, weight_cls: float) -> _Found:
    """As `_best`; the gap is found only where it costs nothing."""
    if isinstance(game, LinearGame):
        return _least_linear(game, choice, allowed, used, weight_sim, weight_cls)
    return _least_scored(game, choice, allowed, used, weight_sim, weight_cls)


def _least_linear(
    game: LinearGame, choice: _Choice, allowed: Tensor, used: Tensor, weight_sim: float, weight_cls: float
) -> _Found:
    """Through the operator, in slices of the pool that the memory budget allows."""
    cell_logits, pool = choice.cell_logits(game), choice.pool
    step = max(1024, game.head.budget // (32 * (game.logits.shape[1] + 2 * allowed.shape[1])))
    best = _Found.nothing(game.logits)
    for first in range(0, pool.size, step):
        own = slice(first, min(first + step, pool.size))
        found = ops.best_replacement(
            cell_logits,
            pool.logits[own],
            choice.similarity[..., own],
            game.logits,
            choice.target,
            allowed,
            _whole_range(own.stop - first, choice.target),
            None if choice.shortlist is None else choice.shortlist - first,
            used[:, own],
            weight_sim,
            weight_cls,
        )
        # Of equal pairs the lowest cell wins, then the lowest candidate, which the earlier slice holds.
        better = (found.loss < best.loss) | ((found.loss == best.loss) & (found.cell >= 0) & (found.cell < best.cell))
        best = _Found(
            torch.where(better, found.cell, best.cell),
            torch.where(better, found.candidate + first, best.candidate),
            torch.where(better, found.loss, best.loss),
            best.gap,
        )
    return best


def _least_scored(
    game: Game, choice: _Choice, allowed: Tensor, used: Tensor, weight_sim: float, weight_cls: float
) -> _Found:
    """Through the head itself, which scores every cell with every candidate of its shortlist."""
    best = _Found.nothing(game.logits)
    for i in allowed.any(1).nonzero()[:, 0].tolist():
        at = allowed[i].nonzero()[:, 0]
        rows = choice.rows(i, at)
        logits = game.swap_logits(i, choice.visited[i, at], choice.pool, rows)
        wanted = torch.log_softmax(logits, dim=-1)[..., int(choice.target[i])]
        loss = weight_sim * (1 - choice.similarity[i, at[:, None], rows]) - weight_cls * wanted
        loss = loss.masked_fill(used[i, rows], math.inf)
        least = loss.amin()
        if bool(least.isfinite()):
            cell = int((loss == least).any(1).nonzero()[0])
            best.cell[i], best.loss[i] = at[cell], least
            best.candidate[i] = rows[cell][loss[cell] == least].amin()
            best.gap[i] = loss.flatten().sort().values[:2].diff().sum() if loss.numel() > 1 else math.inf
    return best


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
    loss = _class_losses(trace.logits[edit] - cell_logits[cell], target, pool).mul_(rules.weight_cls)
    loss += 1 - similarity[cell]
    if not rules.reuse_candidates:
        for done, row in enumerate(trace.candidates):
            loss[edit > done, row] = math.inf
    best = torch.tensor(trace.losses, device=loss.device, dtype=loss.dtype)
    near = (loss <= (best[edit] + NOISE_FACTOR * noise)[:, None]).sum(1)
    counts = torch.zeros(edits, dtype=near.dtype, device=near.device).index_add_(0, edit, near)
    return [number for number, count in enumerate(counts.tolist(), 1) if count > 1]


def _class_losses(rest: Tensor, target: int, pool: Pool) -> Tensor:
    """-log softmax(rest [S,C] + K_n)[target] for every candidate, [S,N], by one matrix product.

    Right to rounding where the sum does not underflow, and too high where it does: good to judge, not to decide by.
    """
    peak = rest.amax(1, keepdim=True)
    sums = ((rest - peak).exp_() @ pool.exponentials.T).clamp_min_(torch.finfo(rest.dtype).tiny)
    return sums.log_().add_(peak - rest[:, target, None]).add_(pool.peaks - pool.logits[:, target])


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


def _limit(game: Game, rules: Rules) -> int:
    return game.cells if rules.max_edits is None else min(rules.max_edits, game.cells)


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
