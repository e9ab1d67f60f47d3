"""Compactness of a map in three forms.

The FG-VCE paper names a compactness score xi without a public formula: all three definitions here are ours.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from finecf.metrics._inputs import as_maps


def compactness(maps: Tensor, form: Literal["ratio", "area", "width"] = "ratio", threshold: float = 0.5) -> Tensor:
    """Compactness of maps [B,H,W] (or [H,W], [B,1,H,W]) with values in [0,1]: [B] float64, larger is more compact.

    With R = {m > threshold}, of |R| of the HW cells:

    - "ratio": `(sum_R m / sum m) / (|R| / HW)`, how much denser the mass is inside R than over the map; at least 1
      where R is not empty.
    - "area": `1 - |R| / HW`, in [0,1].
    - "width": `1 - sqrt(tr Cov_m / tr Cov_uniform)`, the spread of the mass in both axes against a constant map: 1 for
      a single cell, 0 for a constant map, negative for mass driven to the corners. The threshold plays no part.

    An all-zero map scores 0 in every form, and so does an empty R in "ratio". Raises ValueError on values outside
    [0,1], NaN, or an unknown form.
    """
    maps = as_maps(maps, non_negative=True).double()
    if maps.numel() and float(maps.max()) > 1:
        raise ValueError(f"maps must lie in [0,1], got values up to {float(maps.max()):.4g}; divide by the maximum.")
    flat = maps.flatten(1)
    mass = flat.sum(1)
    region = flat > threshold
    share = region.double().mean(1)
    if form == "ratio":
        score = (flat * region).sum(1) / mass / share
    elif form == "area":
        score = 1 - share
    elif form == "width":
        score = 1 - (_variance(maps) / _variance(torch.ones_like(maps))).sqrt()
    else:
        raise ValueError(f'form must be "ratio", "area" or "width", got {form!r}.')
    # 0/0 arises exactly where the map is all zero, R is empty, or the grid is a single cell.
    return torch.where(mass > 0, score, 0.0).nan_to_num(nan=0.0)


def _variance(maps: Tensor) -> Tensor:
    """Trace of the covariance of the cells' positions under the map's mass, [B], in squared cells."""
    mass = maps.sum((1, 2)).clamp_min(torch.finfo(maps.dtype).tiny)
    total = torch.zeros_like(mass)
    for axis in (1, 2):
        marginal = maps.sum(3 - axis) / mass[:, None]
        position = torch.arange(maps.shape[axis], dtype=maps.dtype, device=maps.device)
        mean = (marginal * position).sum(1, keepdim=True)
        total += (marginal * (position - mean) ** 2).sum(1)
    return total
