"""Dividing an image into regions: a label map int32 [H,W] whose labels run from 0 to m-1."""

from finecf.regions.divide import METHODS, from_masks, grid, saliency_patches, slico
from finecf.regions.labels import check_labels, region_sizes

__all__ = [
    "METHODS",
    "check_labels",
    "from_masks",
    "grid",
    "region_sizes",
    "saliency_patches",
    "slico",
]
