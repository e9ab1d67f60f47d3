"""Images of which only some regions, or only the pixels of some ranks, are shown."""

from __future__ import annotations

import torch
from torch import Tensor

from finecf.ops._checks import Arguments
from finecf.ops._dispatch import fake, run
from finecf.reference import regions as reference


def compose_regions(
    images: Tensor,
    labels: Tensor,
    image: Tensor,
    keep: Tensor,
    baseline: Tensor,
    complement: bool = False,
    channels_last: bool = False,
) -> Tensor:
    """Masked images straight from a label map: the regions to keep from the image, the rest from the baseline.

    Pixels are copied, never computed, so any dtype is taken and every backend gives the same bits.

    Args:
        images: [B,Ch,H,W].
        labels: integers [B,H,W] in 0..m-1: the region of each pixel.
        image: integers [n] in 0..B-1: the image that each output is made from.
        keep: bool [n,m].
        baseline: [B,Ch,H,W], or [Ch] for one colour; of the images' dtype.
        complement: whether n further outputs follow, with the choice reversed.
        channels_last: whether the result is laid out channels last (torch.channels_last); fastest where images and
            baseline are so too.

    Returns:
        [n,Ch,H,W], or [2n,Ch,H,W] with `complement`.

    Raises:
        TypeError: an argument is not a tensor, or not of the kind asked for.
        ValueError: shapes, dtypes or devices that do not fit together, or values out of range.
    """
    args = Arguments("compose_regions")
    args.pixels("images", images, "BKHW")
    labels = args.integer("labels", labels, "BHW", torch.int32)
    image = args.below("image", args.integer("image", image, "N"), "B", "images")
    args.boolean("keep", keep, "NM")
    args.below("labels", labels, "M", "regions (columns of keep)")
    args.pixels("baseline", baseline, "K" if isinstance(baseline, Tensor) and baseline.ndim == 1 else "BKHW", images)
    composed: Tensor = run(
        "compose_regions", reference.compose_regions, images, labels, image, keep, baseline, complement, channels_last
    )
    return composed


def rank_masks(
    images: Tensor, rank: Tensor, image: Tensor, threshold: Tensor, baseline: Tensor, insert: bool = True
) -> Tensor:
    """Images of an insertion or deletion curve: shown where (rank < threshold) == insert, else the baseline.

    Args:
        images: [B,Ch,H,W], of any dtype.
        rank: integers [B,H,W]: the place of each pixel in the order.
        image: integers [n] in 0..B-1.
        threshold: integers [n]: how many pixels have gone in (out).
        baseline: [B,Ch,H,W], or [Ch] for one colour; of the images' dtype.
        insert: True: pixels go in, False: pixels go out.

    Returns:
        [n,Ch,H,W].

    Raises:
        TypeError, ValueError: as `compose_regions`.
    """
    args = Arguments("rank_masks")
    args.pixels("images", images, "BKHW")
    rank = args.integer("rank", rank, "BHW", torch.int32)
    image = args.below("image", args.integer("image", image, "N"), "B", "images")
    threshold = args.integer("threshold", threshold, "N", torch.int32)
    args.pixels("baseline", baseline, "K" if isinstance(baseline, Tensor) and baseline.ndim == 1 else "BKHW", images)
    masked: Tensor = run("rank_masks", reference.rank_masks, images, rank, image, threshold, baseline, insert)
    return masked


@fake("compose_regions")
def _compose_regions(
    images: Tensor,
    labels: Tensor,
    image: Tensor,
    keep: Tensor,
    baseline: Tensor,
    complement: bool,
    channels_last: bool,
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = ((2 if complement else 1) * image.shape[0], *images.shape[1:])
    return torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=layout)


@fake("rank_masks")
def _rank_masks(
    images: Tensor, rank: Tensor, image: Tensor, threshold: Tensor, baseline: Tensor, insert: bool
) -> Tensor:
    return images.new_empty(image.shape[0], *images.shape[1:])
