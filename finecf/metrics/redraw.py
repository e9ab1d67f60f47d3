"""Counterfactual images of drawn birds against the true one: the same bird drawn with the target's parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finecf.metrics._inputs import as_classes, as_counterfactuals, as_images
from finecf.metrics.localisation import dilate_masks, energy_share, visible_parts

if TYPE_CHECKING:
    from finecf.data import BirdItem, SyntheticBirds

_RANGE = 1e-3
"""How far pictures may leave [0,1], from rounding."""


@dataclass(frozen=True, eq=False)
class RedrawScores:
    """Distances of B pictures to the true counterfactual; float64 [B] on the CPU, NaN where a picture is left out.

    "Inside" are the visible pixels, before or after redrawing, of the parts that tell the two classes apart; "outside"
    are all others. Distances are mean absolute differences over pixels and channels.

    Attributes:
        inside, outside: of the counterfactual.
        source_inside, source_outside: of the image it was made from: what changing nothing scores.
        energy: share of the change, |counterfactual - image|, that lies inside; 0 where nothing changed.
        area: share of the picture that is inside: what a change spread evenly scores.
        differing: share of what is inside at which image and redrawn picture differ by more than one level of 255 in
            some channel. Elsewhere inside, a change of more than two levels moves away from the redrawn picture,
            whatever its sign. Says nothing of images that a decoder has made.
        parts: the parts graded of each picture.
        hidden: pictures left out since no differing part shows enough pixels.
        missing: pictures left out since no counterfactual was found.
    """

    inside: Tensor
    outside: Tensor
    source_inside: Tensor
    source_outside: Tensor
    energy: Tensor
    area: Tensor
    differing: Tensor
    parts: list[tuple[str, ...]]
    hidden: int
    missing: int

    @property
    def graded(self) -> Tensor:
        """Which pictures are graded, bool [B]."""
        return ~self.area.isnan()

    def means(self) -> dict[str, float]:
        """Mean of every score over the graded pictures; NaN where there are none."""
        names = ("inside", "outside", "source_inside", "source_outside", "energy", "area", "differing")
        return {name: float(getattr(self, name).nanmean()) for name in names}


def redraw_distances(
    birds: SyntheticBirds,
    items: Sequence[BirdItem],
    images: Tensor,
    counterfactuals: Tensor,
    target: Tensor | int,
    found: Tensor | Sequence[bool] | None = None,
    *,
    grid: tuple[int, int] | None = None,
) -> RedrawScores:
    """How far counterfactual pictures of drawn birds are from `birds.redraw(item, target)` (O; `docs/data.md`).

    A differing part counts where it shows at least `VISIBLE_PIXELS` pixels in the picture or in the redrawn one, since
    what must change may be missing from the picture (a longer beak). Meant for pictures that the classifier recognises:
    of a mistake, the target is the true class, and the redrawn picture is the picture itself.

    Args:
        birds: what the items are of; its size is that of the pictures.
        items: B birds.
        images: [B,3,H,W] or [3,H,W] in [0,1], what the counterfactuals were made from: `item.tensor`, or what a decoder
            makes of it.
        counterfactuals: [B,3,H,W] in [0,1]; rows without one may hold anything.
        target: class wanted, an int or int64 [B].
        found: bool [B], whether there is a counterfactual; None: everywhere. The others are left out and counted.
        grid: rows and columns of an explainer's cells: for the energy and its area the parts are grown by half a cell.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: wrong shapes, values beyond [0,1], NaN or inf, or a target that is unknown or what is drawn.
    """
    images = as_images(images).cpu()
    counterfactuals, has = as_counterfactuals(counterfactuals, images, found)
    if len(items) != len(images):
        raise ValueError(f"there must be one bird an image: got {len(items)} items for {len(images)} images.")
    if tuple(images.shape[1:]) != (3, birds.size, birds.size):
        raise ValueError(
            f"images must be {[3, birds.size, birds.size]} as the birds are, got {list(images.shape[1:])}."
        )
    for name, each in (("images", images), ("counterfactuals", counterfactuals)):
        if each.numel() and not -_RANGE <= float(each.min()) <= float(each.max()) <= 1 + _RANGE:
            raise ValueError(
                f"{name} reach from {float(each.min()):.3g} to {float(each.max()):.3g}; the birds are drawn in [0,1]: "
                "undo the scaling first."
            )
    wanted = [birds.class_index(int(label)) for label in as_classes(target, len(images), images.device)]
    names = ("inside", "outside", "source_inside", "source_outside", "energy", "area", "differing")
    scores = {name: torch.full((len(items),), math.nan, dtype=torch.float64) for name in names}
    parts: list[tuple[str, ...]] = []
    hidden = 0
    for b, (item, label) in enumerate(zip(items, wanted, strict=True)):
        if label == item.drawn_label:
            raise ValueError(
                f"target of image {b} is the class that is drawn, {birds.class_names[label]!r}: redrawn it would be "
                "the image itself; give another target."
            )
        true = birds.redraw(item, label)
        masks = {part: item.mask([part]) | true.mask([part]) for part in birds.differing_parts(item.drawn_label, label)}
        shown = visible_parts(masks, masks)
        parts.append(shown)
        hidden += not shown
        if not shown or not bool(has[b]):
            continue
        inside = torch.from_numpy(np.logical_or.reduce([masks[part] for part in shown]))
        for name, picture in (("", counterfactuals[b]), ("source_", images[b])):
            apart = (picture - true.tensor).abs().double().mean(0)
            scores[f"{name}inside"][b] = apart[inside].mean()
            scores[f"{name}outside"][b] = apart[~inside].mean()
        grown = inside if grid is None else dilate_masks(inside, grid)
        scores["energy"][b] = energy_share((counterfactuals[b] - images[b]).abs().mean(0)[None], grown[None])[0]
        differs = ((images[b] - true.tensor).abs() > 1.5 / 255).any(0)
        scores["differing"][b] = differs[inside].double().mean()
        scores["area"][b] = grown.double().mean()
    return RedrawScores(**scores, parts=parts, hidden=hidden, missing=int((~has).sum()))
