"""Class values of coalitions of cells, and sampled Shapley values, in plain torch.

B images, P cells, C classes, M coalitions or permutations. Cell p adds `cell_logits[p]` to the logits, so the logits
of a coalition are the base plus a sum, and the game's value is one number read off them.
"""

import torch
from torch import Tensor

VALUES = ("prob", "log_prob", "log_odds", "logit")
"""What of the target class a coalition is worth."""

TILE = 32
"""Permutations whose samples are reduced together; chunks in multiples of it give the same bits."""

_CHUNK = 1 << 20
"""Numbers that one intermediate may hold: a few megabytes, whatever P, C and M are."""


def class_value(logits: Tensor, target: int, value: str) -> Tensor:
    """Value of the class `target` under `logits` [..., C]; returns [...]."""
    wanted = logits[..., target]
    if value == "logit":
        return wanted
    if value == "prob":
        return torch.softmax(logits, dim=-1)[..., target]
    if value == "log_prob":
        return torch.log_softmax(logits, dim=-1)[..., target]
    others = torch.cat([logits[..., :target], logits[..., target + 1 :]], dim=-1)
    return wanted - torch.logsumexp(others, dim=-1)


def masked_class_scores(cell_logits: Tensor, base_logits: Tensor, masks: Tensor, target: Tensor, value: str) -> Tensor:
    """Value of every mask: cell_logits [B,P,C], base_logits [B,C], masks [M,P] of any reals, target [B] -> [B,M]."""
    scores = cell_logits.new_empty(cell_logits.shape[0], masks.shape[0])
    rows = max(1, _CHUNK // cell_logits.shape[2])
    for image, wanted in enumerate(target.tolist()):
        for chunk, out in zip(masks.split(rows), scores[image].split(rows), strict=True):
            logits = base_logits[image] + chunk @ cell_logits[image]
            out.copy_(class_value(logits, wanted, value))
    return scores


def _marginals(cell_logits: Tensor, base_logits: Tensor, order: Tensor, target: int, value: str) -> Tensor:
    """Marginal contribution of every cell along each `order` [m,P], walked from the empty to the full coalition."""
    start = base_logits.expand(order.shape[0], 1, -1)
    path = torch.cat([start, cell_logits[order]], dim=1).cumsum(dim=1)
    steps = class_value(path, target, value).diff(dim=1)
    return torch.empty_like(steps).scatter_(1, order, steps)


def permutation_shapley_tiles(
    cell_logits: Tensor, base_logits: Tensor, permutations: Tensor, target: Tensor, value: str, antithetic: bool
) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of the samples in each tile of 32 permutations, float64 [B, ceil(M/32), P].

    A sample is a permutation's marginals; if `antithetic`, the mean of its marginals and of those of its reverse.
    """
    batch, cells, classes = cell_logits.shape
    tiles = permutations.long().split(TILE) if permutations.shape[0] else ()
    mean = cell_logits.new_empty(batch, len(tiles), cells, dtype=torch.float64)
    squares = torch.empty_like(mean)
    rows = max(1, _CHUNK // ((cells + 1) * classes))
    for image, wanted in enumerate(target.tolist()):
        game = cell_logits[image], base_logits[image]
        for number, tile in enumerate(tiles):
            chunks = []
            for order in tile.split(rows):
                sample = _marginals(*game, order, wanted, value).double()
                if antithetic:
                    sample = (sample + _marginals(*game, order.flip(1), wanted, value).double()) / 2
                chunks.append(sample)
            samples = torch.cat(chunks)
            mean[image, number] = samples.mean(dim=0)
            squares[image, number] = (samples - mean[image, number]).square().sum(dim=0)
    return mean, squares
