"""Scores of explanations: curves, compactness, localisation, swaps, intervals, and the maps to compare with."""

from finecf.metrics._inputs import resize_maps
from finecf.metrics.baselines import centred_gaussian, grad_cam, occlusion, random_maps, rise
from finecf.metrics.bootstrap import Interval, bootstrap_mean, paired_bootstrap
from finecf.metrics.compactness import compactness
from finecf.metrics.curves import Curves, highest_confidence, insertion_deletion
from finecf.metrics.fidelity import mu_fidelity
from finecf.metrics.localisation import VISIBLE_PIXELS, area_before, auprc, dilate_masks, energy_share, max_hit
from finecf.metrics.swaps import (
    SwapScores,
    cells_on_mask,
    keypoint_scores,
    parts_in_cell,
    share_on_mask,
)

__all__ = [
    "VISIBLE_PIXELS",
    "Curves",
    "Interval",
    "SwapScores",
    "area_before",
    "auprc",
    "bootstrap_mean",
    "cells_on_mask",
    "centred_gaussian",
    "compactness",
    "dilate_masks",
    "energy_share",
    "grad_cam",
    "highest_confidence",
    "insertion_deletion",
    "keypoint_scores",
    "max_hit",
    "mu_fidelity",
    "occlusion",
    "paired_bootstrap",
    "parts_in_cell",
    "random_maps",
    "resize_maps",
    "rise",
    "share_on_mask",
]
