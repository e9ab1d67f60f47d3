"""Scores of explanations: curves, compactness, localisation, swaps, counterfactual images, intervals, and baselines."""

from finecf.metrics._inputs import resize_maps
from finecf.metrics.baselines import centred_gaussian, grad_cam, occlusion, random_maps, rise
from finecf.metrics.bootstrap import Interval, bootstrap_mean, paired_bootstrap
from finecf.metrics.compactness import compactness
from finecf.metrics.counterfactual import CounterfactualScores, CoutCurves, counterfactual_scores, cout
from finecf.metrics.counterfactual_baselines import (
    Attack,
    Interpolation,
    Neighbour,
    latent_interpolation,
    nearest_unlike_neighbour,
    pgd,
)
from finecf.metrics.curves import Curves, highest_confidence, insertion_deletion
from finecf.metrics.distances import FeatureDistances, feature_distances, frechet_distance
from finecf.metrics.fidelity import mu_fidelity
from finecf.metrics.localisation import (
    VISIBLE_PIXELS,
    area_before,
    auprc,
    dilate_masks,
    energy_share,
    max_hit,
    visible_parts,
)
from finecf.metrics.redraw import RedrawScores, redraw_distances
from finecf.metrics.swaps import (
    SwapScores,
    cells_on_mask,
    keypoint_scores,
    parts_in_cell,
    share_on_mask,
)

__all__ = [
    "VISIBLE_PIXELS",
    "Attack",
    "CounterfactualScores",
    "CoutCurves",
    "Curves",
    "FeatureDistances",
    "Interpolation",
    "Interval",
    "Neighbour",
    "RedrawScores",
    "SwapScores",
    "area_before",
    "auprc",
    "bootstrap_mean",
    "cells_on_mask",
    "centred_gaussian",
    "compactness",
    "counterfactual_scores",
    "cout",
    "dilate_masks",
    "energy_share",
    "feature_distances",
    "frechet_distance",
    "grad_cam",
    "highest_confidence",
    "insertion_deletion",
    "keypoint_scores",
    "latent_interpolation",
    "max_hit",
    "mu_fidelity",
    "nearest_unlike_neighbour",
    "occlusion",
    "paired_bootstrap",
    "parts_in_cell",
    "pgd",
    "random_maps",
    "redraw_distances",
    "resize_maps",
    "rise",
    "share_on_mask",
    "visible_parts",
]
