"""Checks and conversions that every metric needs: maps, masks, cells, and a classifier as a callable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from finecf.explainers.result import upsample

Classify = Callable[[Tensor], Tensor]
Bound = float | Sequence[float] | Tensor
ImageRange = tuple[Bound, Bound]
"""(least, largest) value of the images, each a number or one a channel."""


def as_maps(maps: Tensor, name: str = "maps", *, non_negative: bool = False) -> Tensor:
    """Maps as finite floating [B,H,W]; [H,W] becomes a batch of one and [B,1,H,W] loses its channel."""
    if not isinstance(maps, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(maps).__name__}; convert it with torch.as_tensor.")
    shape = tuple(maps.shape)
    if maps.ndim == 4 and maps.shape[1] == 1:
        maps = maps[:, 0]
    elif maps.ndim == 2:
        maps = maps[None]
    if maps.ndim != 3 or 0 in maps.shape[1:]:
        raise ValueError(f"{name} must be [H,W], [B,H,W] or [B,1,H,W] with at least one cell, got {list(shape)}.")
    maps = maps.detach()
    maps = maps if maps.dtype == torch.float64 else maps.float()
    if not torch.isfinite(maps).all():
        raise ValueError(f"{name} holds NaN or infinite values; a map must be finite (a constant map is zeros).")
    if non_negative and maps.numel() and float(maps.min()) < 0:
        raise ValueError(
            f"{name} has negative values (smallest {float(maps.min()):.4g}); this score weighs a map's mass: "
            "keep one sign first, for example with maps.clamp_min(0)."
        )
    return maps


def as_masks(masks: Tensor, maps: Tensor, name: str = "masks") -> Tensor:
    """Masks as bool [B,H,W] of the maps' batch and size, each with at least one pixel."""
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        found = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"{name} must be a bool tensor, got {found}.")
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.shape != maps.shape:
        raise ValueError(
            f"{name} must have the maps' shape {list(maps.shape)}, got {list(masks.shape)}; "
            "bring the maps to image size with finecf.metrics.resize_maps."
        )
    empty = (~masks.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{name} {empty[:8]} hold no pixel, so there is nothing to find; leave those images out.")
    return masks.to(maps.device)


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear maps at image size: [B,h,w] (or [h,w], [B,1,h,w]) to [B,H,W]; unchanged when the size fits already."""
    maps = as_maps(maps)
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return upsample(maps, size)


def as_images(images: Tensor, name: str = "images") -> Tensor:
    """Images as finite floating [B,C,H,W]; [C,H,W] becomes a batch of one."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(images).__name__}.")
    shape = list(images.shape)
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"{name} must be floating [B,C,H,W] or [C,H,W], got {images.dtype} {shape}.")
    if not torch.isfinite(images).all():
        raise ValueError(f"{name} hold NaN or infinite values; check how they were read and normalised.")
    return images.detach()


RANGE_ADVICE = "give the range that the model takes"


def as_targets(target: Tensor | int, batch: int, device: torch.device) -> Tensor:
    """Classes as int64 [B,K]: an int or [B] gives K = 1."""
    target = torch.as_tensor(target, device=device)
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"target must hold class indices (integers), got {target.dtype}.")
    target = target.expand(batch) if target.ndim == 0 else target
    if target.ndim not in (1, 2) or target.shape[0] != batch:
        raise ValueError(f"target must be an int, [B] or [B,K] with B = {batch}, got {list(target.shape)}.")
    return target.long().reshape(batch, 1 if target.ndim == 1 else target.shape[1])


def as_classes(target: Tensor | int, batch: int, device: torch.device, name: str = "target") -> Tensor:
    """One class an image as int64 [B], from an int or [B]."""
    classes = as_targets(target, batch, device)
    if classes.shape[1] != 1:
        raise ValueError(f"{name} must be one class an image, an int or [B], got {list(classes.shape)}.")
    return classes[:, 0]


def as_counterfactuals(
    counterfactuals: Tensor, images: Tensor, found: Tensor | Sequence[bool] | None
) -> tuple[Tensor, Tensor]:
    """Counterfactuals like `images` [B,C,H,W], and which images have one, bool [B].

    Rows without one become the image itself, so that they may hold anything, NaN included.
    """
    if not isinstance(counterfactuals, Tensor):
        raise TypeError(f"counterfactuals must be a tensor, got {type(counterfactuals).__name__}.")
    batched = counterfactuals[None] if counterfactuals.ndim == 3 else counterfactuals
    if batched.shape != images.shape:
        raise ValueError(
            f"there must be one counterfactual an image, of its size: got {list(batched.shape)} for images "
            f"{list(images.shape)}."
        )
    has = torch.ones(len(images), dtype=torch.bool) if found is None else torch.as_tensor(found)
    if has.dtype != torch.bool or has.shape != (len(images),):
        raise ValueError(f"found must be bool [{len(images)}], got {has.dtype} {list(has.shape)}.")
    has = has.to(images.device)
    filled = torch.where(has[:, None, None, None], batched.detach().to(images), images)
    return as_images(filled, "counterfactuals"), has


def as_bounds(image_range: ImageRange, images: Tensor) -> tuple[Tensor, Tensor]:
    """(least, largest) as (least, largest - least), [1,C,1,1] each, like `images` [B,C,H,W]."""
    channels = images.shape[1]
    bounds = []
    for value in image_range:
        bound = torch.as_tensor(value, dtype=torch.float64).flatten()
        if len(bound) not in (1, channels):
            raise ValueError(f"image_range must be two numbers, or two lists of {channels}; got {image_range}.")
        bounds.append(bound.expand(channels).to(images).view(1, channels, 1, 1))
    low, high = bounds
    if not bool((low < high).all()):
        raise ValueError(f"image_range must be (least, largest) with least < largest; got {image_range}.")
    return low, high - low


@contextmanager
def evaluating(classifier: Any) -> Iterator[Classify]:
    """`images -> logits` without gradients: a `finecf.wrap` classifier in its eval mode, or any callable as it is.

    A classifier's logits come back to where the images are: explanations hold theirs on the CPU.
    """
    with torch.no_grad():
        if hasattr(classifier, "eval_mode"):
            with classifier.eval_mode():
                yield lambda images: classifier.logits(images).to(images.device)
        elif callable(classifier):
            yield classifier
        else:
            raise TypeError(
                "expected a finecf.wrap classifier or a callable from images to logits, "
                f"got {type(classifier).__name__}."
            )


def checked_logits(logits: Tensor, batch: int, target: Tensor) -> Tensor:
    """Logits [N,C] in float64; refused where not finite, not of `batch` images, or without the target classes."""
    if logits.ndim != 2 or logits.shape[0] != batch:
        raise ValueError(f"the classifier must return logits [{batch}, classes], got {list(logits.shape)}.")
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < logits.shape[1]:
        raise ValueError(
            f"target classes must lie in 0..{logits.shape[1] - 1}, got {int(target.min())}..{int(target.max())}."
        )
    if not torch.isfinite(logits).all():
        raise ValueError("the classifier returned NaN or infinite logits; check its weights and preprocessing.")
    return logits.double()


def logits_of(classify: Classify, images: Tensor, target: Tensor) -> Tensor:
    """The logits [N,C] of images [N,Ch,H,W] in float64, checked."""
    return checked_logits(classify(images), len(images), target)


def probabilities(classify: Classify, images: Tensor, target: Tensor) -> Tensor:
    """softmax(logits) of the target classes: images [N,C,H,W] and target [N,K] to [N,K] in float64."""
    return logits_of(classify, images, target).softmax(1).gather(1, target)


def rows_per_batch(images: Tensor, batch_size: int, memory_budget: int | None) -> int:
    """How many composed images are made at a time: `batch_size`, or fewer under `memory_budget` bytes.

    Composing holds about four images a row: the image and the baseline gathered, their mixture, the ranks.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if memory_budget is None:
        return batch_size
    least = 4 * images.shape[1:].numel() * images.element_size()
    if memory_budget < least:
        raise ValueError(f"memory_budget is {memory_budget} bytes; one composed image needs {least}: give that much.")
    return min(batch_size, memory_budget // least)
