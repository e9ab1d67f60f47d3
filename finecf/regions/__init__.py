"""Dividing an image into regions (a label map int32 [H,W], labels 0 to m-1), and what stands where they are removed."""

from finecf.regions.baseline import baseline_images
from finecf.regions.divide import METHODS, from_masks, grid, saliency_patches, slico
from finecf.regions.labels import check_labels, region_sizes

__all__ = [
    "METHODS",
    "baseline_images",
    "check_labels",
    "from_masks",
    "grid",
    "region_sizes",
    "saliency_patches",
    "slico",
]
