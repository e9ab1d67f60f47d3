"""What moving latents to their mirror images gives: their path, and how far each class is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from finecf.explainers._reflection import GapHead, Reflected

_MISSED: Final = 1e-3
"""Logits that miss the swapped ones by less than this share of the classes' gap count as swapped."""


@dataclass(frozen=True, eq=False)
class LatentPath:
    """Latents and what the head says of them, from the image (k = 0) over the boundary (1/2) to its mirror image (1).

    Attributes:
        k: float64 [K].
        source, target: int64 [B].
        latents: [B,K,D], in the dtype of the features.
        logits: float64 [B,K,C].
        k_star: float64 [B]: the first counterfactual, the smallest k in [0,1] from which the target is the class of
            largest logit (just beyond the boundary); NaN where there is none.
        residual: float64 [B]: largest difference at k = 1 from the logits with source and target swapped.
        reflection: "closed_form", "lbfgs" or "two_class".
        notes: what a reader must know.
    """

    k: Tensor
    source: Tensor
    target: Tensor
    latents: Tensor
    logits: Tensor
    k_star: Tensor
    residual: Tensor
    reflection: str
    notes: list[str]

    def __repr__(self) -> str:
        images, places, width = self.latents.shape
        noted = f", {len(self.notes)} notes" if self.notes else ""
        return f"LatentPath({images} images x {places} k x {width}, {self.reflection!r}{noted})"

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits, float64 [B,K,C]."""
        return self.logits.softmax(-1)

    @property
    def confidences(self) -> Tensor:
        """Probabilities of source and target, float64 [B,K,2]."""
        pair = torch.stack([self.source, self.target], 1)[:, None].expand(-1, len(self.k), -1)
        return self.probabilities.gather(-1, pair)

    @property
    def first_flip(self) -> Tensor:
        """The first of the given k at which the target wins, float64 [B]; NaN: at none of them."""
        won = self.logits.argmax(-1) == self.target[:, None]
        first = self.k[won.int().argmax(1)]
        return torch.where(won.any(1), first, math.nan)


@dataclass(frozen=True, eq=False)
class ClassDistances:
    """How far images are from each class.

    Attributes:
        distance: float64 [B,C]: Euclidean distance in feature space to the first counterfactual of each class; inf
            where there is none, 0 for the source.
        k_star: float64 [B,C]; NaN where there is none, and for the source.
        source: int64 [B].
    """

    distance: Tensor
    k_star: Tensor
    source: Tensor

    def __repr__(self) -> str:
        return f"ClassDistances({self.distance.shape[0]} images x {self.distance.shape[1]} classes)"

    def nearest(self, count: int = 5) -> Tensor:
        """The `count` nearest classes but the source, at most all, nearest first, int64; ties to the lowest index."""
        own = self.distance.clone()
        own.scatter_(1, self.source[:, None], math.nan)  # sorted behind all others
        return own.argsort(dim=1, stable=True)[:, : min(count, own.shape[1] - 1)]


def path_of(
    head: GapHead, reflected: Reflected, own: Tensor, wanted: Tensor, k: Tensor, dtype: torch.dtype, reflection: str
) -> LatentPath:
    """The path of reflected latents at `k`, with source and target classes int64 [B]; latents in `dtype`."""
    classes = reflected.logits.shape[1]
    moved = reflected.start[:, None] + k[:, None] * reflected.step[:, None]
    if reflected.slope is None:
        logits = head.logits(moved.flatten(0, 1)).double().view(len(own), len(k), classes)
        end = head.logits(reflected.start + reflected.step).double()
    else:
        logits = reflected.logits[:, None] + k[:, None] * reflected.slope[:, None]
        end = reflected.logits + reflected.slope
    rows = torch.arange(len(own), device=own.device)
    swapped = reflected.logits.clone()
    swapped[rows, own], swapped[rows, wanted] = reflected.logits[rows, wanted], reflected.logits[rows, own]
    residual = (end - swapped).abs().amax(1)
    star = head.first_flip(reflected, wanted)
    notes = []
    gap = (reflected.logits[rows, own] - reflected.logits[rows, wanted]).abs()
    # Along two classes the others move along anyway.
    if reflection != "two_class" and len(own) and float(residual.max()) > _MISSED * max(float(gap.max()), 1e-6):
        why, advice = "the search did not arrive", ""
        if head.weight is not None and head.rank < classes:
            why = f"the head's weight has rank {head.rank} for {classes} classes"
            advice = '. reflection="two_class" crosses the boundary of any two classes'
        notes.append(
            f"{why}: the logits cannot all be kept, and at k = 1 they miss the swapped ones by up to "
            f"{float(residual.max()):.2g}; {int(star.isnan().sum())} of {len(own)} latents become no counterfactual"
            f"{advice}"
        )
    return LatentPath(k, own, wanted, moved.to(dtype), logits, star, residual, reflection, notes)
