"""Maps to compare with: random, a centred Gaussian, occlusion, Grad-CAM.

An explainer that does not beat a centred blob is not yet useful; every table grades these beside ours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finecf.metrics._inputs import (
    as_images,
    as_targets,
    evaluating,
    probabilities,
    rows_per_batch,
)
from finecf.regions import baseline_images


def random_maps(batch: int, size: tuple[int, int], *, generator: torch.Generator | None = None) -> Tensor:
    """Uniform values in [0,1), [batch,h,w] float32; give a cell grid as `size` for a map as coarse as an explainer's.

    `generator` None is a fresh one with seed 0.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return torch.rand(batch, *size, generator=generator)


def centred_gaussian(batch: int, size: tuple[int, int], *, sigma: float = 0.25) -> Tensor:
    """The same centred Gaussian for every image, [batch,h,w] float32, `sigma` as a share of each side (ours: 1/4)."""
    if not sigma > 0:
        raise ValueError(f"sigma is a share of the side and must be above 0, got {sigma}.")
    offsets = [(torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5 for n in size]
    squared = offsets[0][:, None] ** 2 + offsets[1] ** 2
    return torch.exp(-squared / (2 * sigma**2)).float().expand(batch, -1, -1)


def occlusion(
    classifier: Any,
    images: Tensor,
    target: Tensor | int,
    *,
    window: int | None = None,
    stride: int | None = None,
    baseline: str | Tensor = "mean",
    mean_colour: Tensor | None = None,
    batch_size: int = 64,
    memory_budget: int | None = None,
) -> Tensor:
    """Occlusion maps (Zeiler and Fergus 2014): [B,H,W] float32, the drop of the class's probability under a window.

    A square `window` of pixels (default: 1/4 of the shorter side) moves by `stride` (default: half the window); it is
    laid over `baseline` as in `insertion_deletion`, the last position of each axis touching the border. A pixel's value
    is the mean drop of the windows over it (signed: negative where covering helps). `images` [B,C,H,W], `target` an int
    or [B].
    """
    images = as_images(images)
    batch, _, height, width = images.shape
    target = as_targets(target, batch, images.device)
    if target.shape[1] != 1:
        raise ValueError(f"occlusion maps one class an image: target must be an int or [B], got {list(target.shape)}.")
    base = baseline_images(baseline, images, mean_colour)
    window = max(1, min(height, width) // 4) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= window <= min(height, width) or not 1 <= stride <= window:
        raise ValueError(
            f"occlusion needs 1 <= stride <= window <= {min(height, width)} pixels, "
            f"got window {window}, stride {stride}."
        )
    down = _windows(height, window, stride).to(images.device)
    across = _windows(width, window, stride).to(images.device)
    places = len(down) * len(across)
    rows = rows_per_batch(images, batch_size, memory_budget)
    total = torch.zeros(batch, height, width, dtype=torch.float64, device=images.device)
    with evaluating(classifier) as classify:
        whole = torch.cat(
            [probabilities(classify, images[i : i + rows], target[i : i + rows]) for i in range(0, batch, rows)]
            or [total.new_empty(0, 1)]
        )
        for start in range(0, batch * places, rows):
            job = torch.arange(start, min(start + rows, batch * places), device=images.device)
            image, place = job // places, job % places
            mask = down[place // len(across), :, None] & across[place % len(across), None, :]
            composed = torch.where(mask[:, None], base[image], images[image])
            drop = whole[image] - probabilities(classify, composed, target[image])
            # One row at a time keeps the order of the sum, hence its bits, free of the batch size.
            for i, row in enumerate(image.tolist()):
                total[row] += mask[i] * drop[i]
    return (total / (down.sum(0)[:, None] * across.sum(0))).float()


def grad_cam(classifier: Any, images: Tensor, target: Tensor | int) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) of the classifier's cells, [B,h,w]: relu of the gradient-weighted channels.

    `classifier` from `finecf.wrap`; `images` [B,C,H,W]; `target` an int or [B]. For global average pooling and a linear
    head this is the CAM, up to scale.
    """
    images = as_images(images)
    target = as_targets(target, images.shape[0], images.device)
    if target.shape[1] != 1:
        raise ValueError(f"grad_cam maps one class an image: target must be an int or [B], got {list(target.shape)}.")
    with classifier.eval_mode():
        return classifier.cam(classifier.features(images), target[:, 0])


def rise(
    classifier: Any,
    images: Tensor,
    target: Tensor | int,
    *,
    masks: int = 500,
    cells: int = 7,
    share: float = 0.5,
    baseline: str | Tensor = "mean",
    mean_colour: Tensor | None = None,
    batch_size: int = 64,
    memory_budget: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """RISE maps (Petsiuk et al. 2018, eq. 6): [B,H,W] float32, the mean probability under the random masks that show a
    pixel.

    Each of `masks` draws a grid of `cells` x `cells` places, every place shown with probability `share`, enlarged
    bilinearly and shifted at random; the same masks serve all images. What is masked shows `baseline` (the paper:
    black). `generator` None is a fresh one with seed 0.
    """
    images = as_images(images)
    batch, _, height, width = images.shape
    target = as_targets(target, batch, images.device)
    if target.shape[1] != 1:
        raise ValueError(f"RISE maps one class an image: target must be an int or [B], got {list(target.shape)}.")
    if masks < 1 or not 1 <= cells <= min(height, width) or not 0 < share < 1:
        raise ValueError(
            f"RISE needs masks >= 1, cells in 1..{min(height, width)} and a share in (0, 1), "
            f"got {masks}, {cells} and {share}."
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    base = baseline_images(baseline, images, mean_colour)
    rows = rows_per_batch(images, batch_size, memory_budget)
    total = torch.zeros(batch, height, width, dtype=torch.float64, device=images.device)
    down, across = -(-height // cells), -(-width // cells)  # the size of one place in pixels
    with evaluating(classifier) as classify:
        for _ in range(masks):
            grid = (torch.rand(1, 1, cells, cells, generator=generator) < share).float()
            size = ((cells + 1) * down, (cells + 1) * across)
            large = F.interpolate(grid, size=size, mode="bilinear", align_corners=False)[0, 0]
            top = int(torch.randint(0, down, (), generator=generator))
            left = int(torch.randint(0, across, (), generator=generator))
            mask = large[top : top + height, left : left + width].to(images)
            for start in range(0, batch, rows):
                own = slice(start, start + rows)
                shown = base[own] + mask * (images[own] - base[own])
                total[own] += probabilities(classify, shown, target[own])[:, :, None] * mask
    return (total / (masks * share)).float()


def _windows(length: int, window: int, stride: int) -> Tensor:
    """Which pixels each window covers along an axis, bool [windows,length]; the last window ends at the border."""
    starts = torch.tensor([*range(0, length - window, stride), length - window])[:, None]
    pixels = torch.arange(length)
    return (pixels >= starts) & (pixels < starts + window)
