"""Drawing images at any k so that the classifier says of them what their latents say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from finecf.explainers._memory import graph_bytes
from finecf.explainers._mirror_draw import Canvas, least_change
from finecf.explainers._reflection import GapHead, Reflected, shifted_maps
from finecf.explainers._shared import lead_of
from finecf.regions.baseline import gaussian_blur

_LONGEST: Final = 0.25
"""No correction moves a map by more than this share of its whole way."""
_SETTLED: Final = 0.02
"""An image that is short of less than this share of the way between its two classes is not corrected."""


@dataclass
class Counts:
    """What drawing a batch has taken so far.

    Attributes:
        seen: int64 [B], images that the classifier has seen for each.
        graph: bytes that the graph of one drawing holds; 0 before the first.
    """

    seen: Tensor
    graph: int = 0


@dataclass(frozen=True, eq=False)
class Drawing:
    """A batch of images with all that drawing them at any k needs."""

    canvas: Canvas
    head: GapHead
    logits: Tensor
    reflected: Reflected
    steps: Tensor
    """What `map_steps` gave."""
    corrections: int
    blur: float
    budget: int
    """Bytes for the graphs of corrections."""
    counts: Counts

    def at(self, rows: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images of some rows at their k [n], and the map and logits that the classifier makes of them.

        Where an image is short of what its latent says, its map is moved by the least change that makes up for it, and
        drawn anew; the drawing that is short of least stays.
        """
        maps = shifted_maps(self.canvas.features[rows], self.steps[rows], k)
        prior = self.canvas.prior(rows, maps, k)  # that of k, wherever corrections move the map
        images, features, logits = self._draw(rows, maps, prior)
        if not self.corrections or not bool(k.any()):
            return images, features, logits
        start, step = self.reflected.start[rows], self.reflected.step[rows]
        before, wanted, end = (self._behind(rows, self.head.logits(start + part * step)) for part in (0, k[:, None], 1))
        least = self._short(rows, logits, self._blurred(images), wanted).abs()
        settled = torch.where(k == 0, math.inf, _SETTLED * (before - end)[:, 0].abs())
        steps = self.steps[rows]
        cells = maps[0].numel() // steps[0].numel()  # a uniform step stands once for all cells
        longest = _LONGEST * math.sqrt(cells) * steps.double().flatten(1).norm(dim=1)
        images, logits = images.clone(), logits.clone()  # they may be the model's own
        open_rows = (least > settled).nonzero()[:, 0]
        for left in reversed(range(self.corrections + 1)):
            if len(open_rows) == 0:
                break
            own, own_maps, own_wanted = rows[open_rows], maps[open_rows], wanted[open_rows]
            own_prior = None if prior is None else prior[open_rows]
            if left:
                *again, short, slope = self._slope(own, own_maps, own_prior, own_wanted)
            else:
                again = [*self._draw(own, own_maps, own_prior)]
                short = self._short(own, again[2], self._blurred(again[0]), own_wanted)
            better = short.abs() < least[open_rows]
            chosen = open_rows[better]
            least[chosen] = short.abs()[better]
            for kept, new in zip((images, features, logits), again, strict=True):
                kept[chosen] = new[better].to(kept.dtype)
            if left:
                change = least_change(short, slope, longest[open_rows])
                maps[open_rows] = own_maps + change
                more = (least[open_rows] > settled[open_rows]) & (change != 0).flatten(1).any(1)
                open_rows = open_rows[more]
        return images, features, logits

    def _draw(self, rows: Tensor, maps: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """As `at`, of these maps [n,D,h,w]."""
        self.counts.seen[rows] += 1
        images = self.canvas.draw(rows, maps, prior)
        return images, *self.canvas.classifier.features_and_logits(images)

    def _blurred(self, images: Tensor) -> Tensor | None:
        """The logits of blurred images, where these count."""
        return self.canvas.classifier.logits(gaussian_blur(images, self.blur)) if self.blur else None

    def _slope(self, rows: Tensor, maps: Tensor, prior: Tensor | None, wanted: Tensor) -> tuple[Tensor, ...]:
        """As `_draw`, what they are short of, and its gradient by the maps; as many at once as the budget lets."""
        if not self.counts.graph:  # the first image tells how large a graph is; what it gives is not used
            seen = self.counts.seen.clone()
            with graph_bytes(self.canvas.classifier.model, self.canvas.decoder) as held:
                self._slope_at_once(rows[:1], maps[:1], None if prior is None else prior[:1], wanted[:1])
            self.counts.graph, self.counts.seen = max(1, sum(held.values())), seen
        parts = [
            self._slope_at_once(rows[own], maps[own], None if prior is None else prior[own], wanted[own])
            for own in torch.arange(len(rows), device=rows.device).split(max(1, self.budget // self.counts.graph))
        ]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    def _slope_at_once(self, rows: Tensor, maps: Tensor, prior: Tensor | None, wanted: Tensor) -> tuple[Tensor, ...]:
        classifier = self.canvas.classifier
        self.counts.seen[rows] += 1
        with classifier.frozen():
            maps = maps.detach().clone().requires_grad_()  # a copy: the graph holds its whole storage
            images = self.canvas.draw(rows, maps, prior)
            features, logits = classifier.encode(images)
            blurred = classifier.encode(gaussian_blur(images, self.blur))[1] if self.blur else None
            short = self._short(rows, logits, blurred, wanted)
            if not short.requires_grad:
                raise ValueError(
                    "images are corrected along the classifier's gradient, and this model gives none (frozen by "
                    "torch.jit, quantised, or run without gradients): corrections=0 draws every image once"
                )
            (slope,) = torch.autograd.grad(short.sum(), maps, allow_unused=True, materialize_grads=True)
        return *(each.detach() for each in (images, features, logits, short)), slope

    def _short(self, rows: Tensor, logits: Tensor, blurred: Tensor | None, wanted: Tensor) -> Tensor:
        """By how much more than wanted [n,2] the target is behind source or best other class, whichever is more; of
        images, or of the mean of them and of blurred ones.
        """
        said = self._behind(rows, logits)
        if blurred is not None:
            self.counts.seen[rows] += 1
            said = (said + self._behind(rows, blurred)) / 2
        return (said - wanted).amax(1)

    def _behind(self, rows: Tensor, logits: Tensor) -> Tensor:
        """How far the target is behind the source, and behind the best of all other classes: float64 [n,2]."""
        source, target = self.canvas.source[rows], self.canvas.target[rows]
        logits = logits.double()
        of_source = (logits.gather(1, source[:, None]) - logits.gather(1, target[:, None]))[:, 0]
        return torch.stack([of_source, -lead_of(logits, target)], 1)


def first_counterfactual(drawing: Drawing, resolution: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The first k beyond 1/2, in steps of `resolution`, at which each image is called the target (float64 [B], NaN:
    none), that image, and its logits.
    """
    count = len(drawing.canvas.source)
    device = drawing.canvas.source.device
    found = torch.full((count,), math.nan, dtype=torch.float64, device=device)
    nothing = drawing.canvas.features.new_empty(0)
    images, logits = [nothing] * count, [nothing] * count
    open_rows = torch.arange(count, device=device)
    number = math.ceil(0.5 / resolution - 1e-9)
    for place in range(1, number + 1):
        k = 0.5 + 0.5 * place / number
        image, _, said = drawing.at(open_rows, torch.full((len(open_rows),), k, dtype=torch.float64, device=device))
        won = said.argmax(1) == drawing.canvas.target[open_rows]
        for position, row in enumerate(open_rows.tolist()):
            if won[position]:
                found[row], images[row], logits[row] = k, image[position], said[position]
        open_rows = open_rows[~won]
        if len(open_rows) == 0:
            break
    return found, images, logits
