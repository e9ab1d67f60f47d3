"""Masked images from label maps and from pixel ranks, in plain torch."""

import torch
from torch import Tensor


def compose_regions(
    images: Tensor,
    labels: Tensor,
    image: Tensor,
    keep: Tensor,
    baseline: Tensor,
    complement: bool,
    channels_last: bool,
) -> Tensor:
    """Images [n or 2n,Ch,H,W] that show the regions `keep` [n,m] of image[i], and the baseline elsewhere.

    With `complement` the opposite choices follow; with `channels_last` the result is laid out so in memory.
    """
    size = labels.shape[1:].numel()
    pixels = labels[image].reshape(len(image), size).long()
    if size and keep.shape[1]:
        kept = keep.gather(1, pixels)
    else:  # gather refuses to look into nothing
        kept = torch.zeros(pixels.shape, dtype=torch.bool, device=keep.device)
    kept = kept.view(len(image), 1, *labels.shape[1:])
    inside, outside = images[image], _baseline(baseline, image)
    shown = torch.where(kept, inside, outside)
    if complement:
        shown = torch.cat([shown, torch.where(kept, outside, inside)])
    return shown.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def rank_masks(
    images: Tensor, rank: Tensor, image: Tensor, threshold: Tensor, baseline: Tensor, insert: bool
) -> Tensor:
    """Images [n,Ch,H,W] that show image[i] where (rank < threshold[i]) == insert, and the baseline elsewhere."""
    kept = (rank[image] < threshold[:, None, None]) == insert
    return torch.where(kept[:, None], images[image], _baseline(baseline, image))


def _baseline(baseline: Tensor, image: Tensor) -> Tensor:
    """The baseline of each output, or one colour that broadcasts over them."""
    return baseline[image] if baseline.ndim > 1 else baseline[:, None, None]
