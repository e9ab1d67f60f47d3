"""SLICO superpixels, grids, saliency-prior patches, and masks of the user's."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finecf.regions.labels import check_labels

METHODS: Final = ("slico", "grid", "saliency")
"""Names of the divisions that `finecf.SMDL` makes by itself."""

_SMOOTHING = 1.0
_ITERATIONS = 20
_NAMED = 3


def slico(image: Tensor, regions: int = 49) -> Tensor:
    """SLICO superpixels (Achanta et al. 2012, the zero-parameter variant), by scikit-image.

    Args:
        image: [Ch,H,W], any range: it is brought to 0..1 by its own least and largest value. Three channels are taken
            as RGB and compared in Lab.
        regions: how many are asked for; the number that comes out may differ.

    Returns:
        int32 [H,W] on the CPU, labels 0..m-1.

    Raises:
        ValueError: fewer than two regions asked for, or more than there are pixels.
    """
    from skimage.segmentation import slic

    channels, height, width = image.shape
    _check_count(regions, height * width)
    plain = image.detach().to("cpu", torch.float64)
    low, high = torch.aminmax(plain)
    scaled = (plain - low) / (high - low) if high > low else torch.zeros_like(plain)
    found = slic(
        np.ascontiguousarray(scaled.permute(1, 2, 0).numpy()),
        n_segments=regions,
        slic_zero=True,
        max_num_iter=_ITERATIONS,
        sigma=_SMOOTHING if min(height, width) > 32 else 0,
        start_label=0,
        convert2lab=channels == 3,
        channel_axis=-1,
    )
    labels = torch.unique(torch.from_numpy(found), return_inverse=True)[1]
    if int(labels.max()) == 0:  # a flat image may end as one superpixel
        return grid(height, width, regions)
    return labels.to(torch.int32)


def grid(height: int, width: int, regions: int = 49) -> Tensor:
    """Rectangles as square as the image allows: rows x columns, their number nearest to the one asked for.

    Returns:
        int32 [H,W], labels in reading order.

    Raises:
        ValueError: fewer than two regions asked for, or more than there are pixels.
    """
    _check_count(regions, height * width)
    rows = min(max(1, round((regions * height / width) ** 0.5)), height)
    columns = min(max(1, round(regions / rows)), width)
    if rows * columns < 2:
        rows, columns = (1, 2) if width > 1 else (2, 1)
    down = torch.arange(height) * rows // height
    across = torch.arange(width) * columns // width
    return (down[:, None] * columns + across).to(torch.int32)


def saliency_patches(saliency: Tensor, size: tuple[int, int], side: int = 10, per_region: int = 4) -> Tensor:
    """Regions of equally salient patches (Chen et al. 2024, sec. 4.1, for a prior saliency map).

    The map is resized to side x side; the patches, in falling order of saliency, form regions of `per_region` in a row.
    What is left over when `per_region` does not divide side^2 joins the last region (ours: the released code loses it).

    Args:
        saliency: [h,w], real.
        size: (height, width) of the image.
        side: N, patches along each side; 28 with 8 a region for faces (98 regions), 10 with 4 for CUB (25).
        per_region: d.

    Returns:
        int32 [H,W]; region 0 is the most salient.

    Raises:
        ValueError: NaN or inf, a side that the image is smaller than, or fewer than two regions.
    """
    if saliency.ndim != 2 or not bool(torch.isfinite(saliency).all()):
        raise ValueError(f"saliency must be a finite map [h,w]; got {list(saliency.shape)}, or NaN or inf in it")
    if not 1 <= side <= min(size):
        raise ValueError(f"side must be from 1 to {min(size)}, the shorter side of the image; got {side}")
    if per_region < 1 or side * side // per_region < 2:
        raise ValueError(f"side^2 / per_region must give at least two regions; got {side}^2 / {per_region}")
    small = F.interpolate(saliency[None, None].float().cpu(), size=(side, side), mode="area")[0, 0].flatten()
    order = small.argsort(descending=True, stable=True)
    region = torch.empty(side * side, dtype=torch.int64)
    region[order] = (torch.arange(side * side) // per_region).clamp(max=side * side // per_region - 1)
    down, across = (torch.arange(length) * side // length for length in size)
    return region.view(side, side)[down][:, across].to(torch.int32)


def from_masks(masks: object, overlaps: str = "smallest") -> Tensor:
    """A label map from masks, e.g. those of Segment Anything; what no mask covers becomes a region of its own.

    Args:
        masks: bool [n,H,W] (tensor, array or list of [H,W]).
        overlaps: "smallest": a pixel belongs to the smallest mask that covers it, of equal ones to the first (ours);
            "refuse": overlapping masks are an error.

    Returns:
        int32 [H,W]. Labels follow the order of the masks; masks that nothing is left of are dropped, and the remainder
        has the last label.

    Raises:
        TypeError: masks that are not boolean.
        ValueError: a wrong shape, overlaps that are not allowed, or fewer than two regions.
    """
    stack = torch.stack([torch.as_tensor(each) for each in masks]) if isinstance(masks, list | tuple) else masks
    stack = torch.as_tensor(stack).cpu()
    if stack.dtype != torch.bool:
        raise TypeError(f"masks must be boolean [n,H,W]; got {stack.dtype}: compare them with a threshold first")
    if stack.ndim != 3 or stack.numel() == 0:
        raise ValueError(f"masks must be boolean [n,H,W] with n at least 1; got {list(stack.shape)}")
    if overlaps not in ("smallest", "refuse"):
        raise ValueError(f"overlaps must be 'smallest' or 'refuse'; got {overlaps!r}")
    covered = stack.sum(0)
    if overlaps == "refuse" and bool((covered > 1).any()):
        flat = stack.flatten(1).double()
        both = (flat @ flat.T).triu(1).nonzero().tolist()
        named = ", ".join(f"{one} and {two}" for one, two in both[:_NAMED]) + (", ..." if len(both) > _NAMED else "")
        raise ValueError(
            f"masks overlap in {int((covered > 1).sum())} pixels: {named}; give each pixel to one mask, or pass "
            "overlaps='smallest'"
        )
    labels = torch.full(stack.shape[1:], len(stack), dtype=torch.int64)
    # From the largest to the smallest, so that the smallest is painted last; of equal ones the first.
    for index in stack.flatten(1).sum(1).flip(0).argsort(descending=True, stable=True).tolist():
        mask = len(stack) - 1 - index
        labels[stack[mask]] = mask
    return check_labels(torch.unique(labels, return_inverse=True)[1], (stack.shape[1], stack.shape[2]))


def _check_count(regions: int, pixels: int) -> None:
    if not 2 <= regions <= pixels:
        raise ValueError(f"regions must be from 2 to the number of pixels, {pixels}; got {regions}")
