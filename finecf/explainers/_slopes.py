"""Gradients of masked images by their regions: one backward says something of every candidate at once.

At a set of regions itself the gradient says little of an image that is mostly baseline. So the regions that are not
chosen are shown a little (ours), and the derivative by how far each of them is shown is taken there.
"""

from __future__ import annotations

from collections.abc import Callable
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
        if self.refusal is None and (self._confidence_counts or self._kept_counts or self._removed_counts):
            try:
                return self._take(group, asks)
            except _NoGradient as error:
                cause = error.__cause__
                self.refusal = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        return dict.fromkeys(asks)

    def _take(self, group: Group, asks: dict[int, AskSlopes]) -> dict[int, Slopes | None]:
        active = list(asks)
        chosen = torch.zeros(len(active), group.most, dtype=torch.bool)
        for row, ask in enumerate(asks.values()):
            chosen[row, : len(ask.chosen.selected)] = ask.chosen.selected
        # The first image of all goes alone, and tells how large a graph is.
        first = 0 if self._graph else 1
        parts = [self._of_some(group, active[:first], chosen[:first])] if first else []
        at_once = max(1, min(self._most, self._budget // self._graph))
        for start in range(first, len(active), at_once):
            own = slice(start, start + at_once)
            parts.append(self._of_some(group, active[own], chosen[own]))
        slopes = torch.cat(parts, dim=1).cpu()  # one transfer a round
        return {b: Slopes(*slopes[:, row, : group.regions[b]]) for row, b in enumerate(active)}

    def _of_some(self, group: Group, active: list[int], chosen: Tensor) -> Tensor:
        """Slopes of the sets `chosen` bool [n,M] of some images, float64 [3,n,M]."""
        places = torch.tensor(active, device=group.images.device)
        chosen = chosen.to(places.device)
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
        place = torch.arange(len(places), device=places.device)[:, None, None] * chosen.shape[1] + group.labels[places]

        def by_region(pixels: Tensor) -> Tensor:
            sums = torch.zeros(chosen.numel(), dtype=torch.float64, device=pixels.device)
            sums.index_add_(0, place.flatten(), (pixels * (whole - blank)).sum(1).double().flatten())
            return sums.view(chosen.shape).nan_to_num(torch.nan, torch.nan, torch.nan)

        def confidence(logits: Tensor) -> Tensor:
            return confidence_of(logits, self._confidence)

        def odds(logits: Tensor) -> Tensor:
            return log_odds(logits, target)

        slopes = torch.zeros(3, *chosen.shape, dtype=torch.float64, device=places.device)
        asked = [(0, confidence)] * self._confidence_counts + [(1, odds)] * self._kept_counts
        if asked:
            found = self._gradients(group, active, kept.lerp(whole, SHOWN), [value for _, value in asked])
            for (row, _), pixels in zip(asked, found, strict=True):
                slopes[row] = by_region(pixels)
        if self._removed_counts:
            (pixels,) = self._gradients(group, active, removed.lerp(blank.expand_as(removed), SHOWN), [odds])
            slopes[2] = -by_region(pixels)
        return slopes

    def _gradients(
        self, group: Group, active: list[int], x: Tensor, values: list[Callable[[Tensor], Tensor]]
    ) -> list[Tensor]:
        """Gradients by images `x` [n,Ch,H,W] of some values [n] of their logits; each counts as one more image."""
        for b in active:
            group.forwards[b] += 1 + len(values)
        with self._runner.frozen(), graph_bytes(self._runner.model) as held:
            x.requires_grad_()
            try:
                logits = self._runner.with_graph(x)
                self._graph = max(self._graph, sum(held.values()) // len(x), 1)
                return [
                    torch.autograd.grad(value(logits).sum(), x, retain_graph=number < len(values))[0]
                    for number, value in enumerate(values, 1)
                ]
            except RuntimeError as error:  # what torch raises for layers that have no derivative, or for want of memory
                raise _NoGradient from error


class _NoGradient(Exception):
    """The model gives no gradient; the cause says why."""


def log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """Of the class `target` [B] against all others, from logits [B,C], float64 [B]."""
    exact = logits.double()
    own = torch.nn.functional.one_hot(target, logits.shape[1]).bool()
    return exact[own] - exact.masked_fill(own, -torch.inf).logsumexp(1)
