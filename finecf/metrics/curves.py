"""Insertion and deletion curves: one evaluator for every method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from finecf.metrics._inputs import (
    as_images,
    as_targets,
    baseline_images,
    evaluating,
    probabilities,
    resize_maps,
    rows_per_batch,
)


@dataclass(frozen=True)
class Curves:
    """Insertion and deletion curves of B images for K classes, float64 on the CPU.

    `share` [B,S]: share of the pixels inserted or deleted, in [0,1]; `insertion`, `deletion` [B,S,K]: probability of
    each class after that share; `insertion_auc`, `deletion_auc` [B,K]: the trapezoid over `share`, in [0,1]. Curves
    shorter than S (raster order) repeat their last point, which adds nothing to the trapezoid.
    """

    share: Tensor
    insertion: Tensor
    deletion: Tensor
    insertion_auc: Tensor
    deletion_auc: Tensor


def insertion_deletion(
    classifier: Any,
    images: Tensor,
    maps: Tensor,
    target: Tensor | int,
    *,
    baseline: str | Tensor = "mean",
    mean_colour: Tensor | None = None,
    step: float | None = None,
    order: Literal["falling", "raster"] = "falling",
    threshold: float | None = None,
    batch_size: int = 64,
    memory_budget: int | None = None,
) -> Curves:
    """Insertion and deletion curves (Petsiuk et al. 2018, RISE; this project's fixed form).

    Pixels go in falling order of the map, ties in reading order, `step` (default 0.03) of the image at a time;
    insertion starts at the baseline and ends at the image, deletion the reverse; the probability of the class is read
    after each step, end points included. Good maps have a high insertion and a low deletion area.

    `classifier`: a `finecf.wrap` classifier or a callable from images to logits. `images` [B,C,H,W] or [C,H,W] as the
    classifier takes them. `maps` [B,h,w], [h,w] or [B,1,h,w]: any real values, bilinearly brought to image size.
    `target`: class indices, an int, [B], or [B,K] to read K classes in the same forwards. `baseline`: "mean"
    (`mean_colour` [C]: give the data set's; without it the mean colour of `images`), "black", "blur", or a tensor [C],
    [C,H,W] or [B,C,H,W], in the space of `images`. At most `batch_size` composed images exist at a time, fewer where
    `memory_budget` bytes hold fewer.

    `order="raster"` with `threshold` (default 0.5) repeats the released script of FG-VCE (methods page, section 5):
    only pixels whose map value exceeds the threshold, in reading order, by default one at a time; the script's baseline
    is zeros in normalised space, `baseline="black"` for images that are normalised already. `share` is then the share
    of the visited pixels (ours: the script's axis is not described), so that areas of regions of different size
    compare.

    Raises ValueError or TypeError on wrong shapes, non-finite values, classes out of range or a budget below one image.
    """
    images = as_images(images)
    maps = resize_maps(maps, (images.shape[2], images.shape[3])).to(images.device)
    if maps.shape[0] != images.shape[0]:
        raise ValueError(f"there must be one map an image: got {maps.shape[0]} maps for {images.shape[0]} images.")
    target = as_targets(target, images.shape[0], images.device)
    base = baseline_images(baseline, images, mean_colour)
    rank, visited = _ranks(maps, order, threshold)
    rows = rows_per_batch(images, batch_size, memory_budget)

    counts = [_counts(int(v), _step(step, order, int(v))) for v in visited]
    # When every pixel is visited, the two curves share their end points (image and baseline): those are run once.
    shared = order == "falling"
    # A job is (image, pixels done so far, whether the image goes in).
    jobs = [(b, n, True) for b, steps in enumerate(counts) for n in steps]
    jobs += [(b, n, False) for b, steps in enumerate(counts) for n in (steps[1:-1] if shared else steps)]
    values = torch.empty(len(jobs), target.shape[1], dtype=torch.float64)
    with evaluating(classifier) as classify:
        for start in range(0, len(jobs), rows):
            chunk = jobs[start : start + rows]
            image = torch.tensor([job[0] for job in chunk], device=images.device)
            reached = torch.tensor([job[1] for job in chunk], device=images.device)
            insert = torch.tensor([job[2] for job in chunk], device=images.device)
            keep = (rank[image] < reached[:, None, None]) == insert[:, None, None]
            composed = torch.where(keep[:, None], images[image], base[image])
            values[start : start + len(chunk)] = probabilities(classify, composed, target[image]).cpu()
    return _assemble(counts, values, shared)


def _ranks(maps: Tensor, order: str, threshold: float | None) -> tuple[Tensor, Tensor]:
    """Position of every pixel in its image's order, [B,H,W] int64, and how many pixels are visited, [B]."""
    flat = maps.flatten(1)
    pixels = flat.shape[1]
    if order == "falling":
        if threshold is not None:
            raise ValueError('threshold belongs to order="raster"; order="falling" visits every pixel.')
        sequence = flat.argsort(dim=1, descending=True, stable=True)
        visited = torch.full((len(flat),), pixels)
    elif order == "raster":
        above = flat > (0.5 if threshold is None else threshold)
        sequence = above.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        visited = above.sum(1).cpu()
    else:
        raise ValueError(f'order must be "falling" or "raster", got {order!r}.')
    rank = torch.empty_like(sequence)
    rank.scatter_(1, sequence, torch.arange(pixels, device=maps.device).expand_as(sequence))
    return rank.view(maps.shape), visited


def _step(step: float | None, order: str, visited: int) -> float:
    if step is None:
        return 0.03 if order == "falling" else 1 / max(visited, 1)
    if not 0 < step <= 1:
        raise ValueError(f"step is a share of the image and must lie in (0, 1], got {step}.")
    return step


def _counts(visited: int, step: float) -> list[int]:
    """How many pixels are done after each step: 0, then whole multiples of the step, then all of them."""
    steps = math.ceil(1 / step - 1e-9)
    inner = (round(k * step * visited) for k in range(1, steps))
    return [0, *(n for n in dict.fromkeys(inner) if 0 < n < visited), visited]


def _assemble(counts: list[list[int]], values: Tensor, shared: bool) -> Curves:
    length = max((len(steps) for steps in counts), default=0)
    share = torch.ones(len(counts), length, dtype=torch.float64)
    insertion = torch.empty(len(counts), length, values.shape[1], dtype=torch.float64)
    deletion = torch.empty_like(insertion)
    sizes = [len(steps) for steps in counts]
    sizes += [n - 2 if shared else n for n in sizes]
    pieces = values.split(sizes)
    for b, steps in enumerate(counts):
        n = len(steps)
        # An empty region has the counts [0, 0]: its last share stays 1, so that its area is the value itself.
        share[b, : n - 1] = torch.tensor(steps[:-1], dtype=torch.float64) / max(steps[-1], 1)
        rising, falling = pieces[b], pieces[len(counts) + b]
        if shared:
            falling = torch.cat([rising[-1:], falling, rising[:1]])
        insertion[b, :n], insertion[b, n:] = rising, rising[-1]
        deletion[b, :n], deletion[b, n:] = falling, falling[-1]
    return Curves(share, insertion, deletion, _area(share, insertion), _area(share, deletion))


def _area(share: Tensor, curve: Tensor) -> Tensor:
    return torch.trapezoid(curve, share[..., None].expand_as(curve), dim=1)
