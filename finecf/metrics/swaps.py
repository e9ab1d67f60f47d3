"""Scores of cell swaps: which parts a swapped cell and its replacement hold, and where the edits fall."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finecf.explainers.result import cell_box

Cell = tuple[int, int]


@dataclass(frozen=True)
class SwapScores:
    """Near-KP and Same-KP over `swaps` swaps, as shares in [0,1] (0 where there are no swaps)."""

    near: float
    same: float
    swaps: int


def parts_in_cell(
    cell: Cell,
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    keypoints: Mapping[str, tuple[float, float] | None] | None = None,
    part_masks: Mapping[str, np.ndarray] | None = None,
) -> set[str]:
    """Names of the parts that a cell holds: those whose key point or any mask pixel lies in it.

    `cell` (row, column) of `grid` (rows, columns), over an image of `size` (H, W); masks are bool [H,W]. Key points are
    (x, y) in pixels, None where hidden. Give key points, masks, or both (their union).
    """
    if keypoints is None and part_masks is None:
        raise ValueError("parts_in_cell needs keypoints= or part_masks=; neither was given.")
    _check_cell(cell, grid)
    left, top, right, bottom = cell_box(cell, grid, size)
    found = set()
    for name, point in (keypoints or {}).items():
        if point is not None and left <= point[0] < right and top <= point[1] < bottom:
            found.add(name)
    for name, mask in (part_masks or {}).items():
        if mask.shape != tuple(size):
            raise ValueError(f"the mask of {name!r} must be {list(size)} like its image, got {list(mask.shape)}.")
        if mask[top:bottom, left:right].any():
            found.add(name)
    return found


def keypoint_scores(query_parts: Sequence[Iterable[str]], reference_parts: Sequence[Iterable[str]]) -> SwapScores:
    """Near-KP and Same-KP (Goyal et al. 2019, Vandenhende et al. 2022) of swaps.

    Entry i of each argument names the parts held by swap i's cell in the image explained, and in the reference that its
    replacement comes from (`parts_in_cell`). Near-KP: both hold a part. Same-KP: both hold the same part.
    """
    if len(query_parts) != len(reference_parts):
        raise ValueError(
            f"a swap has two sides: got {len(query_parts)} swapped cells and {len(reference_parts)} replacements."
        )
    pairs = [(set(query), set(reference)) for query, reference in zip(query_parts, reference_parts, strict=True)]
    if not pairs:
        return SwapScores(0.0, 0.0, 0)
    near = sum(bool(query) and bool(reference) for query, reference in pairs)
    same = sum(bool(query & reference) for query, reference in pairs)
    return SwapScores(near / len(pairs), same / len(pairs), len(pairs))


def cells_on_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which cells lie on a mask: bool [rows, columns], true where the cell's centre pixel does.

    `mask` bool [H,W], dilated first for the tolerance of half a cell. The share of true cells is what an edit at a
    random cell scores, the level that a share of edits has to beat.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
        found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor [H,W], got {found}.")
    centres = [
        torch.tensor([(2 * i + 1) * pixels // (2 * cells) for i in range(cells)], device=mask.device)
        for pixels, cells in zip(mask.shape, grid, strict=True)
    ]
    return mask[centres[0][:, None], centres[1]]


def share_on_mask(cells: Sequence[Cell], mask: Tensor, grid: tuple[int, int]) -> float:
    """Share of the edited cells (row, column) that lie on a mask as `cells_on_mask` has it; no edits score 0."""
    inside = cells_on_mask(mask, grid)
    if not len(cells):
        return 0.0
    for cell in cells:
        _check_cell(cell, grid)
    return float(np.mean([bool(inside[row, column]) for row, column in cells]))


def _check_cell(cell: Cell, grid: tuple[int, int]) -> None:
    if not (0 <= cell[0] < grid[0] and 0 <= cell[1] < grid[1]):
        raise ValueError(f"cell {tuple(cell)} lies outside the grid of {grid[0]} x {grid[1]} cells.")
