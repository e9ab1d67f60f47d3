"""Whether a map says how much hiding pixels will change the answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finecf.metrics._inputs import as_images, as_targets, evaluating, probabilities, resize_maps, rows_per_batch
from finecf.ops import compose_regions
from finecf.regions import baseline_images, grid


def mu_fidelity(
    classifier: Any,
    images: Tensor,
    maps: Tensor,
    target: Tensor | int,
    *,
    subsets: int = 200,
    share: float = 0.2,
    cells: int = 9,
    rank: bool = False,
    baseline: str | Tensor = "mean",
    mean_colour: Tensor | None = None,
    batch_size: int = 64,
    memory_budget: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """mu-fidelity (Bhatt, Weller, Moura 2020, eq. 1): float64 [B] in [-1,1], higher is better.

    The correlation, over random subsets of the image, of the sum of the map in the subset with the drop of the class's
    probability when the subset shows the baseline. Subsets are drawn from about `cells`^2 rectangles, `share` of them
    at a time, since single pixels change nothing (ours, as other implementations do); the same subsets serve all
    images. 0 where the map or the drop is constant.

    `images` [B,C,H,W]; `maps` [B,h,w], [h,w] or [B,1,h,w], bilinearly brought to image size; `target` an int or [B];
    `rank`: Spearman's correlation instead of Pearson's; `baseline` as in `insertion_deletion`; `generator` None is a
    fresh one with seed 0.

    Raises ValueError or TypeError on wrong shapes, non-finite values, classes or settings out of range.
    """
    images = as_images(images)
    batch, _, height, width = images.shape
    maps = resize_maps(maps, (height, width)).to(images.device).double()
    if maps.shape[0] != batch:
        raise ValueError(f"there must be one map an image: got {maps.shape[0]} maps for {batch} images.")
    target = as_targets(target, batch, images.device)
    if target.shape[1] != 1:
        raise ValueError(
            f"mu-fidelity reads one class an image: target must be an int or [B], got {list(target.shape)}."
        )
    if subsets < 2 or not 0 < share < 1 or not 2 <= cells <= min(height, width):
        raise ValueError(
            f"mu-fidelity needs subsets >= 2, a share in (0, 1) and cells in 2..{min(height, width)}, "
            f"got {subsets}, {share} and {cells}."
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    labels = grid(height, width, cells * cells).to(images.device)
    places = int(labels.max()) + 1
    hidden = max(1, round(share * places))
    order = torch.rand(subsets, places, generator=generator).argsort(1)
    chosen = (order < hidden).to(images.device)  # [subsets, places], `hidden` of them true
    flat = labels.flatten().long().expand(batch, -1)
    mass = torch.zeros(batch, places, dtype=torch.float64, device=images.device)
    mass.scatter_add_(1, flat, maps.flatten(1))
    sums = mass @ chosen.double().T

    base = baseline_images(baseline, images, mean_colour)
    rows = rows_per_batch(images, batch_size, memory_budget)
    drops = torch.empty(batch * subsets, dtype=torch.float64)
    everyone = labels.expand(batch, -1, -1)
    with evaluating(classifier) as classify:
        whole = torch.cat(
            [probabilities(classify, images[i : i + rows], target[i : i + rows]) for i in range(0, batch, rows)]
            or [sums.new_empty(0, 1)]
        )
        for start in range(0, batch * subsets, rows):
            job = torch.arange(start, min(start + rows, batch * subsets), device=images.device)
            image, subset = job // subsets, job % subsets
            composed = compose_regions(images, everyone, image, ~chosen[subset], base)
            drop = whole[image] - probabilities(classify, composed, target[image])
            drops[start : start + len(job)] = drop[:, 0].cpu()
    return _correlation(sums.cpu(), drops.view(batch, subsets), rank)


def _correlation(a: Tensor, b: Tensor, rank: bool) -> Tensor:
    """Pearson's (Spearman's) correlation of the rows of two [B,n] tensors; 0 where a row is constant."""
    if rank:
        a, b = _mean_ranks(a), _mean_ranks(b)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    scale = a.norm(dim=1) * b.norm(dim=1)
    correlation: Tensor = torch.where(scale > 0, (a * b).sum(1) / scale, 0.0)
    return correlation.clamp(-1, 1)


def _mean_ranks(values: Tensor) -> Tensor:
    """Ranks of each row, equal values sharing the mean of theirs."""
    ranks = torch.empty_like(values)
    for row, out in zip(values, ranks, strict=True):
        _, inverse, counts = row.unique(return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).double()
        out.copy_((ends - (counts - 1) / 2)[inverse])
    return ranks
