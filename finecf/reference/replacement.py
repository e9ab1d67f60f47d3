"""Nearest bank cells, the best single replacement, and replacement until the class flips, in plain torch.

B images, P cells, C classes, D channels, N bank rows. Replacing cell p by bank row n turns the logits l into
`l - L_p + K_n` (L = cell_logits, K = candidate_logits) and costs

    loss(p, n) = weight_sim * (1 - similarity[p, n]) + weight_cls * -log softmax(l - L_p + K_n)[target].
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 1 << 20
"""Numbers that one intermediate may hold: a few megabytes, whatever P, N and C are."""


class _Search(NamedTuple):
    """One image's part of a search; everything but the logits stays as it is from edit to edit."""

    cell_logits: Tensor  # [P,C]
    candidate_logits: Tensor  # [N,C]
    similarity: Tensor  # [P,N]
    target: int
    start: int
    stop: int
    shortlist: Tensor | None  # [P,K], ascending
    weight_sim: float
    weight_cls: float


class _Best(NamedTuple):
    cell: int
    candidate: int
    loss: float


_NOTHING = _Best(-1, -1, math.inf)


def nearest_candidates(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k bank rows of highest cosine for each query row, falling: query [P,D], bank [N,D] -> [P,k] and int64 [P,k].

    A zero row has cosine 0 with everything. Of equal cosines the lower index comes first.
    """
    cosine = query.new_empty(query.shape[0], k)
    index = torch.empty(query.shape[0], k, dtype=torch.int64, device=query.device)
    if k == 0:
        return cosine, index
    directions = _unit(bank)
    rows = max(1, _CHUNK // bank.shape[0])
    for first in range(0, query.shape[0], rows):
        block = (_unit(query[first : first + rows]) @ directions.T).clamp_(-1, 1)  # rounding may pass 1
        kth = block.topk(k, dim=1).values[:, -1:]
        for row, scores in enumerate(block, start=first):
            # topk leaves open which of equal values it takes, so take all from the k-th value up, in index order.
            enough = (scores >= kth[row - first]).nonzero().squeeze(1)
            falling = scores[enough].sort(descending=True, stable=True)
            cosine[row] = falling.values[:k]
            index[row] = enough[falling.indices[:k]]
    return cosine, index


def _unit(rows: Tensor) -> Tensor:
    """Rows [.,D] divided by their length; zero rows stay zero."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / length.where(length > 0, 1)


def _loss(search: _Search, logits: Tensor, similarity: Tensor) -> Tensor:
    """Loss of replacements that lead to `logits` [..., C] from pairs of `similarity` [...]."""
    wanted = torch.log_softmax(logits, dim=-1)[..., search.target]
    return search.weight_sim * (1 - similarity) - search.weight_cls * wanted


def _best_direct(search: _Search, logits: Tensor, cells: Tensor, used: Tensor | None) -> _Best:
    """The best pair among `cells` (ascending) and the candidates not `used`, every pair by its own log-sum-exp."""
    if cells.numel() == 0 or search.start >= search.stop:
        return _NOTHING
    if search.shortlist is None:
        rows = torch.arange(search.start, search.stop, device=logits.device)[None]
    else:
        rows = search.shortlist[cells]
    if rows.shape[1] == 0:
        return _NOTHING
    rest = logits - search.cell_logits[cells]
    lowest = rest.new_full((cells.numel(),), math.inf)
    lowest_row = torch.full_like(cells, -1)
    for block in rows.split(max(1, _CHUNK // rest.numel()), dim=1):
        allowed = (block >= search.start) & (block < search.stop)
        block = block.where(allowed, search.start)
        if used is not None:
            allowed = allowed & ~used[block]
        pairs = block.expand(cells.numel(), -1)
        after = rest[:, None] + search.candidate_logits[block]
        loss = _loss(search, after, search.similarity[cells[:, None], pairs]).masked_fill(~allowed, math.inf)
        # argmin takes the first of equal values and later blocks hold higher rows, so ties go to the lowest row.
        best = loss.argmin(dim=1, keepdim=True)
        value = loss.gather(1, best).squeeze(1)
        better = value < lowest
        lowest = value.where(better, lowest)
        lowest_row = pairs.gather(1, best).squeeze(1).where(better, lowest_row)
    first = int(lowest.argmin())
    if int(lowest_row[first]) < 0:
        return _NOTHING
    return _Best(int(cells[first]), int(lowest_row[first]), float(lowest[first]))


def _best_factorised(
    search: _Search, logits: Tensor, cells: Tensor, used: Tensor | None, exponentials: Tensor
) -> _Best:
    """As `_best_direct` without a shortlist: one matrix product for the sums over classes, then a second look.

    With `A = exp(l - L_p - m_p)` and `B = exp(K_n - n_n)` (`exponentials`; m, n: the row maxima) the sum over classes
    is `(A B^T)_pn exp(m_p + n_n)`. It may have lost its small terms, or its last digits to cancellation: pairs below
    C * 2^-106 and pairs that come close to the minimum are therefore evaluated directly, in float64, and that decides.
    """
    candidates = search.candidate_logits[search.start : search.stop]
    if cells.numel() == 0 or candidates.shape[0] == 0:
        return _NOTHING
    rest = logits - search.cell_logits[cells]
    peak = rest.amax(dim=1, keepdim=True)
    row_peak = candidates.amax(dim=1)
    product = (rest - peak).exp() @ exponentials.T
    wanted = rest[:, search.target, None] + candidates[:, search.target]
    similarity = search.similarity[cells, search.start : search.stop]
    allowed = torch.ones_like(product, dtype=torch.bool)
    if used is not None:
        allowed &= ~used[search.start : search.stop]
    trusted = allowed & (product >= logits.shape[0] * 2.0**-106)
    loss = search.weight_sim * (1 - similarity) + search.weight_cls * (peak + row_peak + product.log() - wanted)
    loss = loss.masked_fill(~trusted, math.inf)
    minimum = loss.amin()
    # The rounding of the shifted sum grows with the logits, not only with what is left of them in the loss.
    size = search.weight_cls * (rest.abs().amax() + candidates.abs().amax())
    margin = 1e-5 * torch.maximum(minimum.abs(), size).clamp_min(1)
    near = trusted & (loss <= minimum + margin)
    best = _NOTHING
    for pairs in (near | (allowed & ~trusted)).nonzero().split(max(1, _CHUNK // logits.shape[0])):
        if pairs.shape[0] == 0:
            continue
        cell, row = pairs.unbind(dim=1)
        after = logits.double() - search.cell_logits[cells[cell]].double() + candidates[row].double()
        exact = _loss(search, after, similarity[cell, row].double())
        first = int(exact.argmin())
        if float(exact[first]) < best.loss:
            best = _Best(int(cells[cell[first]]), search.start + int(row[first]), float(exact[first]))
    return best


def _searches(
    cell_logits: Tensor,
    candidate_logits: Tensor,
    similarity: Tensor,
    target: Tensor,
    candidate_range: Tensor,
    shortlist: Tensor | None,
    weight_sim: float,
    weight_cls: float,
) -> list[_Search]:
    ranges = candidate_range.tolist()
    return [
        _Search(
            cell_logits[image],
            candidate_logits,
            similarity[image],
            wanted,
            ranges[image][0],
            ranges[image][1],
            None if shortlist is None else shortlist[image].long().sort(dim=1).values,
            weight_sim,
            weight_cls,
        )
        for image, wanted in enumerate(target.tolist())
    ]


def best_replacement(
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
    """The pair of least loss in each image: cell int64 [B], candidate int64 [B], loss [B]; (-1, -1, +inf) if none.

    cell_logits [B,P,C], candidate_logits [N,C], similarity [B,P,N], logits [B,C] (the current ones), target [B],
    allowed bool [B,P], candidate_range [B,2] (first and past-the-last row), shortlist [B,P,K] (rows outside the range
    do not count), used bool [B,N]. Ties: lowest cell, then lowest candidate.
    """
    cell = torch.full_like(target, -1)
    candidate = torch.full_like(target, -1)
    loss = logits.new_full(target.shape, math.inf)
    searches = _searches(
        cell_logits, candidate_logits, similarity, target, candidate_range, shortlist, weight_sim, weight_cls
    )
    for image, search in enumerate(searches):
        cells = allowed[image].nonzero().squeeze(1)
        best = _best_direct(search, logits[image], cells, None if used is None else used[image])
        cell[image], candidate[image], loss[image] = best
    return cell, candidate, loss


def replace_until_flip(
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
    """Best replacement after best replacement until the target has the highest logit (ties: lowest class).

    Shapes as in `best_replacement`, with base_logits [B,C] and cell_scores [B,P]. An edit chooses among the `top_cells`
    cells of highest score (ties: lowest index) that are not edited yet, and among the candidates that the image has not
    used yet, unless `reuse_candidates`. It ends early when nothing is left to choose.

    Returns, with T = max_edits: cells and candidates int64 [B,T] (-1 where no edit), losses [B,T] (+inf where no edit),
    logits [B,T+1,C] (before the first and after each edit; the last repeats), n_edits int64 [B], flipped bool [B].
    """
    return _replace(
        cell_logits,
        base_logits,
        cell_scores,
        _searches(
            cell_logits, candidate_logits, similarity, target, candidate_range, shortlist, weight_sim, weight_cls
        ),
        top_cells,
        max_edits,
        reuse_candidates,
        factorised=False,
    )


def replace_until_flip_factorised(
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
    """`replace_until_flip` with (P+N)*C exponentials and one matrix product an edit instead of P*N*C exponentials.

    The same result: what decides is evaluated directly (see `_best_factorised`). About a hundred times faster on a bank
    of some thousand rows, so it is what `finecf.ops` falls back to. A shortlist is searched directly.
    """
    return _replace(
        cell_logits,
        base_logits,
        cell_scores,
        _searches(
            cell_logits, candidate_logits, similarity, target, candidate_range, shortlist, weight_sim, weight_cls
        ),
        top_cells,
        max_edits,
        reuse_candidates,
        factorised=shortlist is None,
    )


def _replace(
    cell_logits: Tensor,
    base_logits: Tensor,
    cell_scores: Tensor,
    searches: list[_Search],
    top_cells: int,
    max_edits: int,
    reuse_candidates: bool,
    factorised: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, cells, _ = cell_logits.shape
    device = cell_logits.device
    cell = torch.full((batch, max_edits), -1, dtype=torch.int64, device=device)
    candidate = torch.full_like(cell, -1)
    loss = cell_logits.new_full((batch, max_edits), math.inf)
    logits = (base_logits + cell_logits.sum(dim=1))[:, None].repeat(1, max_edits + 1, 1)
    n_edits = torch.zeros(batch, dtype=torch.int64, device=device)
    flipped = torch.zeros(batch, dtype=torch.bool, device=device)
    for image, search in enumerate(searches):
        order = cell_scores[image].sort(descending=True, stable=True).indices
        edited = torch.zeros(cells, dtype=torch.bool, device=device)
        used = torch.zeros(search.candidate_logits.shape[0], dtype=torch.bool, device=device)
        exponentials = _row_exponentials(search) if factorised else None
        current = logits[image, 0]
        for edit in range(max_edits):
            if int(current.argmax()) == search.target:
                break
            allowed = order[~edited[order]][:top_cells].sort().values
            if exponentials is None:
                best = _best_direct(search, current, allowed, used)
            else:
                best = _best_factorised(search, current, allowed, used, exponentials)
            if best.cell < 0:
                break
            current = current - search.cell_logits[best.cell] + search.candidate_logits[best.candidate]
            cell[image, edit], candidate[image, edit], loss[image, edit] = best
            logits[image, edit + 1 :] = current
            n_edits[image] = edit + 1
            edited[best.cell] = True
            used[best.candidate] = not reuse_candidates
        flipped[image] = int(current.argmax()) == search.target
    return cell, candidate, loss, logits, n_edits, flipped


def _row_exponentials(search: _Search) -> Tensor:
    """`B` of the factorised search, [stop - start, C]: it does not change from edit to edit."""
    candidates = search.candidate_logits[search.start : search.stop]
    return candidates.sub(candidates.amax(dim=1, keepdim=True)).exp_() if candidates.shape[0] else candidates
