"""Gradients of masked images by their regions: one backward says something of every candidate at once.

At a set of regions itself the gradient says little of an image that is mostly baseline. So the regions that are not
chosen are shown a little (ours), and the derivative by how far each of them is shown is taken there.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from finecf import ops
from finecf.explainers._evaluation import Group, Terms
from finecf.explainers._memory import graph_bytes
from finecf.explainers._subset import AskSlopes, Slopes
from finecf.models.runner import Runner
from finecf.reference.submodular import confidence_of

SHOWN: Final = 0.2
"""How far the regions that are not chosen are shown (with the chosen ones removed: how far they are taken away)."""


class RegionSlopes:
    """Slopes for the sets of several images' searches, in common batches.

    Args:
        runner: the model.
        terms: which of the slopes are needed.
        micro_batch: how many images go through the model at a time at most.
        budget: bytes that graphs may hold (one image's is taken at least).

    Attributes:
        refusal: why there are no slopes; None while there are.
    """

    def __init__(self, runner: Runner, terms: Terms, micro_batch: int, budget: int) -> None:
        self.refusal: str | None = None
        self._runner, self._confidence = runner, terms.confidence
        self._confidence_counts, _, self._kept_counts, self._removed_counts = (terms.weights != 0).tolist()
        self._most, self._budget = micro_batch, budget
        self._graph = 0

    def __call__(self, group: Group, asks: dict[int, AskSlopes]) -> dict[int, Slopes | None]:
        """Slopes for the sets asked about, by the images' places in the group; None where the model gives none."""
        if self.refusal is None:
            try:
                return self._take(group, asks)
            except RuntimeError as error:  # what torch raises for layers that have no derivative
                self.refusal = str(error).strip().splitlines()[0]
        return dict.fromkeys(asks)

    def _take(self, group: Group, asks: dict[int, AskSlopes]) -> dict[int, Slopes | None]:
        device = group.images.device
        active = list(asks)
        places = torch.tensor(active, device=device)
        chosen = torch.zeros(len(active), group.most, dtype=torch.bool)
        for row, ask in enumerate(asks.values()):
            chosen[row, : len(ask.chosen.selected)] = ask.chosen.selected
        chosen = chosen.to(device)
        # The first image of all goes alone, and tells how large a graph is.
        first = 0 if self._graph else 1
        parts = [self._of_some(group, places[:first], chosen[:first])] if first else []
        at_once = max(1, min(self._most, self._budget // self._graph))
        parts += [
            self._of_some(group, *part)
            for part in zip(places[first:].split(at_once), chosen[first:].split(at_once), strict=True)
            if len(part[0])
        ]
        # One transfer a round.
        slopes = torch.cat([values for values, _ in parts], dim=1).cpu()
        for b in active:
            group.forwards[b] += parts[0][1]
        return {b: Slopes(*slopes[:, row, : group.regions[b]]) for row, b in enumerate(active)}

    def _of_some(self, group: Group, places: Tensor, chosen: Tensor) -> tuple[Tensor, int]:
        """Slopes, float64 [3,n,M], and the forwards and backwards that each image cost."""
        composed = ops.compose_regions(
            group.images,
            group.labels,
            places,
            chosen,
            group.baseline,
            complement=self._removed_counts,
            channels_last=self._runner.channels_last,
        )
        kept, removed = composed[: len(places)], composed[len(places) :]
        whole = group.images[places]
        blank = group.baseline[:, None, None] if group.baseline.ndim == 1 else group.baseline[places]
        target = group.target[places]
        slopes = torch.zeros(3, *chosen.shape, dtype=torch.float64, device=whole.device)
        cost = 0

        def by_region(pixels: Tensor) -> Tensor:
            per_pixel = (pixels * (whole - blank)).sum(1).double()
            row = torch.arange(len(places), device=whole.device)[:, None, None] * chosen.shape[1]
            sums = torch.zeros(chosen.numel(), dtype=torch.float64, device=whole.device)
            sums.index_add_(0, (row + group.labels[places]).flatten(), per_pixel.flatten())
            return sums.view(chosen.shape).nan_to_num(0, 0, 0)

        with self._runner.frozen():
            if self._confidence_counts or self._kept_counts:
                x = kept.lerp(whole, SHOWN).requires_grad_()
                logits = self._logits(x)
                cost += 1
                if self._kept_counts:
                    odds = log_odds(logits, target).sum()
                    slopes[1] = by_region(torch.autograd.grad(odds, x, retain_graph=self._confidence_counts)[0])
                    cost += 1
                if self._confidence_counts:
                    confidence = confidence_of(logits, self._confidence).sum()
                    slopes[0] = by_region(torch.autograd.grad(confidence, x)[0])
                    cost += 1
            if self._removed_counts:
                x = removed.lerp(blank.expand_as(removed), SHOWN).requires_grad_()
                odds = log_odds(self._logits(x), target).sum()
                slopes[2] = -by_region(torch.autograd.grad(odds, x)[0])
                cost += 2
        return slopes, cost

    def _logits(self, x: Tensor) -> Tensor:
        """Logits with their graph, whose size is noted."""
        with graph_bytes(self._runner.model) as held:
            logits = self._runner.with_graph(x)
        self._graph = max(self._graph, sum(held.values()) // len(x), 1)
        return logits


def log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """Of the class `target` [B] against all others, from logits [B,C], float64 [B]."""
    exact = logits.double()
    own = torch.nn.functional.one_hot(target, logits.shape[1]).bool()
    return exact[own] - exact.masked_fill(own, -torch.inf).logsumexp(1)
