"""Drawing moved feature maps of a batch of images, whoever moved them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import SupportsIndex

import torch
from torch import Tensor

from finecf.models import Classifier
from finecf.models.decoder import MirrorDecoder, activation_prior, contrast_prior
from finecf.regions.baseline import gaussian_blur

Steps = int | Sequence[float] | Tensor


def least_change(short: Tensor, slope: Tensor, longest: Tensor) -> Tensor:
    """The smallest step of maps that makes up, to first order, for what they are short of: [B,D,h,w] (O; the step of
    DeepFool, Moosavi-Dezfooli et al., CVPR 2016, algorithm 1, in the space of maps).

    `short` [B], `slope` [B,D,h,w]: its gradient by the map; `longest` [B]: the largest norm of a step. No step where
    nothing depends on the map, or the gradient is not finite.
    """
    norm = slope.flatten(1).norm(dim=1).to(short.dtype)
    length = (short / norm).clamp(-longest, longest) / norm
    known = ((norm > 0) & norm.isfinite())[:, None, None, None]
    return torch.where(known, -length[:, None, None, None].to(slope.dtype) * slope, 0.0)


@dataclass(frozen=True, eq=False)
class Canvas:
    """Source images [B,Ch,H,W] with all that drawing them with other maps needs.

    `features` [B,D,h,w] are the maps of the images themselves, `skips` their shallower ones, and `prepared` what the
    decoder's editors made of these; `source` and `target` int64 [B]. `soften` is the standard deviation, in pixels, of
    a blur of what a decoder of changes adds to an image.
    """

    classifier: Classifier
    decoder: MirrorDecoder
    images: Tensor
    features: Tensor
    source: Tensor
    target: Tensor
    skips: list[Tensor]
    prepared: list[Tensor]
    soften: float = 0.0

    @staticmethod
    def of(
        classifier: Classifier,
        decoder: MirrorDecoder,
        images: Tensor,
        features: Tensor,
        source: Tensor,
        target: Tensor,
        skips: Sequence[Tensor],
        soften: float = 0.0,
    ) -> Canvas:
        """Prepare the images."""
        prepared = decoder.prepare(skips)
        return Canvas(classifier, decoder, images, features, source, target, list(skips), prepared, soften)

    def prior(self, rows: Tensor, maps: Tensor, k: Tensor) -> Tensor | None:
        """The spatial prior [n,h,w] of some rows with maps [n,D,h,w] that were moved by k [n], if there is one."""
        if not self.decoder.masks:
            return None
        classes = self.source[rows], self.target[rows]
        return prior_of(self.classifier, self.decoder, self.features[rows], maps, *classes, k.to(maps.dtype))

    def draw(self, rows: Tensor, maps: Tensor, prior: Tensor | None) -> Tensor:
        """Images of some rows with these maps [n,D,h,w] and that prior."""
        start = self.features[rows]
        skips, prepared = ([each[rows] for each in several] for several in (self.skips, self.prepared))
        drawn = self.decoder(maps, skips, prepared, prior)
        if not self.decoder.changes:
            return drawn
        first = self.decoder(start, skips, prepared, prior) if self.decoder.skips else self._first[rows]
        if self.soften:
            drawn = first + gaussian_blur(drawn - first, self.soften)
        return self.decoder.shown(self.images[rows], drawn, first, prior)

    @cached_property
    def _first(self) -> Tensor:
        """What is drawn of the images' own maps; with skips it depends on k."""
        drawn: Tensor = self.decoder(self.features)
        return drawn


def prior_of(
    classifier: Classifier,
    decoder: MirrorDecoder,
    features: Tensor,
    moved: Tensor,
    source: Tensor,
    target: Tensor,
    k: Tensor,
) -> Tensor:
    """The spatial prior, float [B,h,w], of the images' own maps and of the moved ones, [B,D,h,w]."""
    read = (features if decoder.contrasts else moved).detach()
    activations = classifier.cam(read, source), classifier.cam(read, target)
    return (contrast_prior if decoder.contrasts else activation_prior)(*activations, k, decoder.prior_range)


def draw_pair(
    classifier: Classifier,
    decoder: MirrorDecoder,
    images: Tensor,
    maps: tuple[Tensor, Tensor],
    skips: Sequence[Tensor],
    classes: tuple[Tensor, Tensor],
    k: Tensor,
    decode: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """With their graph, the images at k and what is drawn at 0: one batch, so that batch norms see both.

    The image at 0 is drawn under the prior of k, so that the editor learns to leave alone what it may change (O).

    Args:
        classifier: what the maps are of.
        decoder: what draws them.
        images: the source images [B,Ch,H,W].
        maps: moved ones and the images' own, [B,D,h,w] each.
        skips: the source's maps at the skip levels.
        classes: source and target, int64 [B] each.
        k: [B].
        decode: what is called in the decoder's place: the decoder compiled.
    """
    moved, features = maps
    prior = both = None
    if decoder.masks:
        named = *classes, k.to(features.dtype)
        prior = prior_of(classifier, decoder, features, moved, *named)
        # What is subtracted is drawn as what it is subtracted from.
        own = prior if decoder.changes else prior_of(classifier, decoder, features, features, *named)
        both = torch.cat([prior, own])
    twice = [[torch.cat([each, each]) for each in several] for several in (skips, decoder.prepare(skips))]
    draw = decoder if decode is None else decode  # a compiled module has no truth value
    drawn, start = draw(torch.cat([moved, features]), *twice, both).float().chunk(2)
    return decoder.shown(images, drawn, start, prior), start


def places_of(name: str, steps: Steps, device: torch.device) -> Tensor:
    """The k of a path, float64 [K]; `name` is that of the argument, for messages."""
    if isinstance(steps, SupportsIndex) and not hasattr(steps, "__len__"):  # arrays have an __index__ too
        count = operator.index(steps)
        if count < 2:
            raise ValueError(f"{name} must be at least 2, from k = 0 to k = 1, or the k themselves; got {count}")
        return torch.linspace(0, 1, count, dtype=torch.float64, device=device)
    k = torch.as_tensor(steps, dtype=torch.float64, device=device)
    if k.ndim != 1 or len(k) == 0 or not bool(((k >= 0) & (k <= 1)).all()):
        raise ValueError(f"{name} must be a number, or k between 0 and 1; got {steps}")
    return k
