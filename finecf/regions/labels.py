"""The one inner form of a division: a label map."""

from __future__ import annotations

import torch
from torch import Tensor

_NAMED = 5


def check_labels(labels: object, size: tuple[int, int]) -> Tensor:
    """A label map as int32 [H,W], refused in a sentence where it is none.

    Args:
        labels: integers [H,W] (tensor or array), every value from 0 to m-1 used at least once.
        size: (height, width) of the image that it divides.

    Raises:
        TypeError: not a map of integers.
        ValueError: another size, negative labels, labels that are missing, or a single region.
    """
    map_ = torch.as_tensor(labels)
    if map_.is_floating_point() or map_.is_complex() or map_.dtype == torch.bool:
        hint = "; divide by masks with finecf.regions.from_masks" if map_.dtype == torch.bool else ""
        raise TypeError(f"a label map must hold integers, one label for each pixel; got {map_.dtype}{hint}")
    if map_.ndim == 3 and map_.shape[0] == 1:
        map_ = map_[0]
    if tuple(map_.shape) != tuple(size):
        hint = "; resize it with nearest-neighbour interpolation" if map_.ndim == 2 else ""
        raise ValueError(f"a label map must have the image's size {list(size)}; got {list(map_.shape)}{hint}")
    low, high = (int(bound) for bound in torch.aminmax(map_))
    if low < 0:
        count = int((map_ < 0).sum())
        raise ValueError(
            f"labels must run from 0 to m-1; {count} pixels have negative labels, the lowest {low}: "
            "give what is left over a label of its own (finecf.regions.from_masks does)"
        )
    if high >= map_.numel():
        raise ValueError(f"labels must run from 0 to m-1 without gaps; label {high} is above the number of pixels")
    missing = (torch.bincount(map_.flatten().long(), minlength=high + 1) == 0).nonzero()[:, 0].tolist()
    if missing:
        named = ", ".join(map(str, missing[:_NAMED])) + (", ..." if len(missing) > _NAMED else "")
        raise ValueError(
            f"labels must run from 0 to m-1 without gaps; of 0..{high} no pixel has {named}: "
            "renumber them with torch.unique(labels, return_inverse=True)[1]"
        )
    if high == 0:
        raise ValueError("the label map holds one region; a ranking needs at least two")
    return map_.to(torch.int32).contiguous()


def region_sizes(labels: Tensor, regions: int) -> Tensor:
    """Pixels of each region, int64 [m]."""
    return torch.bincount(labels.flatten().long(), minlength=regions)
