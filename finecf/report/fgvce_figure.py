"""The figure of an FG-VCE explanation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec, SubplotSpec
from matplotlib.patches import ConnectionPatch

from finecf.explainers import Explanation, FGVCEExplanation
from finecf.explainers.result import cell_box
from finecf.report.drawing import (
    MARK,
    QUIET,
    RIGHT,
    WRONG,
    Truth,
    bare_chart,
    blank_figure,
    displayable,
    frame_box,
    headline,
    outline_truth,
    plain,
    plot_area,
    short_name,
    show,
    write_caption,
    write_title,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

PART_COLOURS: Final = ("#ffd23f", "#4cc9f0", "#f72585", "#80ed99", "#f8961e", "#b5838d")

SHOWN_EDITS: Final = 6
SWAPS_A_ROW: Final = 3
POOLED: Final = "What comes in matters, not where: this network averages over positions."
FAINT: Final = 0.2
"""A difference of two maps in [0,1] that is nowhere larger is called faint in its caption."""


def draw_fgvce(explanation: FGVCEExplanation, truth: Truth | None) -> Figure:
    """Draw the figure: the image, the maps, the probabilities, and each replaced cell beside what took its place."""
    edits = explanation.edits[:SHOWN_EDITS]
    swap_rows = -(-len(edits) // SWAPS_A_ROW)
    heights = [3.05, *[2.2] * swap_rows, 3.05]
    # Sizes in inches: each row is its pictures' height and the room for the words above and below them.
    figure = blank_figure(sum(heights) + 2)
    top, bottom = 1 - 1.05 / figure.get_figheight(), 0.45 / figure.get_figheight()
    grid = GridSpec(
        len(heights), 12, figure, left=0.02, right=0.98, bottom=bottom, top=top, height_ratios=heights, hspace=0.36
    )
    _headline(figure, explanation)
    picture = displayable(explanation.image)

    _where(figure.add_subplot(grid[0, 0:3]), explanation, picture, truth)
    _heat(
        figure.add_subplot(grid[0, 3:6]),
        explanation,
        picture,
        "contribution",
        "What made it say so",
        f"brighter: more {plain(explanation.predicted_name)}",
    )
    _parts(figure.add_subplot(grid[0, 6:9]), explanation, picture)
    _path(figure.add_subplot(plot_area(grid[0, 9:12])), explanation)

    for number, _ in enumerate(edits):
        row, place = 1 + number // SWAPS_A_ROW, number % SWAPS_A_ROW
        replaced = _swap(figure, grid[row, 4 * place : 4 * place + 4], explanation, picture, number)
        if place == 0 and row == swap_rows and _pooled(explanation):
            write_caption(replaced, POOLED, QUIET, line=2, fit=False)

    last = len(heights) - 1
    panels = (
        ("before", "Before the edits", f"counts for {plain(explanation.predicted_name)}"),
        ("after", "After the edits", f"counts for {plain(explanation.target_name)}"),
        ("dominant", "What the repair brought", "dominant region: after minus before"),
        ("invariant", "What the mistake stood on", "invariant region: before minus after"),
    )
    for place, (name, title, caption) in enumerate(panels):
        _heat(figure.add_subplot(grid[last, 3 * place : 3 * place + 3]), explanation, picture, name, title, caption)
    return figure


def _headline(figure: Figure, explanation: FGVCEExplanation) -> None:
    wrong, right = plain(explanation.predicted_name), plain(explanation.target_name)
    cells, count = explanation.grid[0] * explanation.grid[1], len(explanation.edits)
    swapped = f"{count} of the {cells} cells" if count != 1 else f"1 of the {cells} cells"
    if explanation.flipped:
        text = f"With {swapped} of its feature map replaced by cells of real {right} images, it does."
        if len(explanation.minimal_edits) < count:
            text += f" ({len(explanation.minimal_edits)} of them are enough.)"
    else:
        text = f"Even with {swapped} of its feature map replaced by cells of real {right} images, it does not."
    if count > SHOWN_EDITS:
        text += f" The first {SHOWN_EDITS} are shown."
    headline(figure, explanation, f"The model says {wrong}. What would make it say {right}?", text)


def _where(axes: Axes, explanation: FGVCEExplanation, picture: NDArray[np.float32], truth: Truth | None) -> None:
    show(axes, picture)
    outline_truth(axes, truth)
    for number, edit in enumerate(explanation.edits[:SHOWN_EDITS], 1):
        _box(axes, explanation.cell_box(edit.cell), number, picture.shape)
    write_title(axes, "The image and the cells replaced", "")
    before = explanation.probabilities_before
    write_caption(axes, f"says {plain(explanation.predicted_name)}", WRONG, end=f" ({before.predicted:.0%})")
    write_caption(axes, f"wanted: {plain(explanation.target_name)}", RIGHT, line=1, end=f" ({before.target:.0%})")


def _heat(
    axes: Axes,
    explanation: FGVCEExplanation,
    picture: NDArray[np.float32],
    name: str,
    title: str,
    caption: str,
) -> None:
    values = explanation.upsampled(name).float().cpu().numpy()
    grey = picture.mean(2, keepdims=True).repeat(3, 2) * 0.75
    show(axes, grey)
    # Weak values stay transparent, so that the photograph shows where nothing happens.
    axes.imshow(values, cmap="inferno", vmin=0, vmax=1, alpha=np.clip(values * 1.6, 0, 0.8), interpolation="bilinear")
    if not values.any():
        axes.text(0.5, 0.5, "nothing", transform=axes.transAxes, ha="center", color="white", fontsize=12)
    if name in ("dominant", "invariant", "after"):
        for edit in explanation.edits[:SHOWN_EDITS]:
            frame_box(axes, explanation.cell_box(edit.cell), MARK, 1.2)
    write_title(axes, title, caption)
    strength = _difference(explanation, name)
    if 0 < strength < FAINT:
        write_caption(axes, f"faint: drawn {1 / strength:.0f} times as strong as it is", QUIET, line=1)


def _difference(explanation: FGVCEExplanation, name: str) -> float:
    """How far the map "dominant" or "invariant" reached before it was stretched to 1; 0 for other maps, or unknown."""
    if name not in ("dominant", "invariant"):
        return 0.0
    drawn = explanation.maps[name].double()
    # Some parities take the class map in place of "after"; the one that gives the map drawn is the one it came from.
    for reached in ("after", "cam_target"):
        raw = explanation.maps[reached].double() - explanation.maps["before"].double()
        raw = (raw if name == "dominant" else -raw).relu()
        spread = float(raw.amax() - raw.amin())
        if spread > 0 and torch.allclose((raw - raw.amin()) / spread, drawn, atol=1e-3):
            return spread
    return 0.0


def _pooled(explanation: Explanation) -> bool:
    """Whether the head averages over the cells; of every other head a note says how it was scored."""
    return not any(note.startswith("the head was scored as") for note in explanation.notes)


def _parts(axes: Axes, explanation: FGVCEExplanation, picture: NDArray[np.float32]) -> None:
    labels = explanation.maps["part_labels"].cpu().numpy()
    inside = explanation.maps["object_mask"].cpu().numpy()
    shaded = picture * np.where((labels > 0)[..., None], 1.0, np.where(inside[..., None], 0.6, 0.3))
    show(axes, shaded.astype(np.float32))
    parts = explanation.parts[: len(PART_COLOURS)]
    for number, (part, colour) in enumerate(zip(parts, PART_COLOURS, strict=False), 1):
        axes.contour(labels == number, levels=[0.5], colors=[colour], linewidths=2)
        left, top, right, bottom = part.box
        axes.text(
            (left + right) / 2,
            (top + bottom) / 2,
            chr(ord("A") + number - 1),
            color="black",
            fontsize=10,
            fontweight="bold",
            ha="center",
            va="center",
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": colour, "edgecolor": "none"},
        )
    write_title(axes, "Parts behind the mistake", "outlined, on the object it looked at")


def _path(axes: Axes, explanation: FGVCEExplanation) -> None:
    path = explanation.logits_path.softmax(1).cpu().numpy()
    steps = np.arange(len(path))
    for index, name, colour in (
        (explanation.predicted, explanation.predicted_name, WRONG),
        (explanation.target, explanation.target_name, RIGHT),
    ):
        axes.plot(steps, path[:, index], "-o", color=colour, linewidth=2, markersize=5, label=short_name(name))
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(-0.3, max(len(path) - 1, 1) + 0.3)
    axes.set_xticks(steps if len(steps) <= 12 else steps[:: len(steps) // 8])
    bare_chart(axes, "Probability, edit by edit", "cells replaced")
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=1)


def _swap(
    figure: Figure, place: SubplotSpec, explanation: FGVCEExplanation, picture: NDArray[np.float32], number: int
) -> Axes:
    """One replacement: the cell in its surroundings, and the reference image with the cell that took its place.

    Returns the axes of the first.
    """
    edit = explanation.edits[number]
    inner = place.subgridspec(1, 2, wspace=0.22)
    left, right = figure.add_subplot(inner[0, 0]), figure.add_subplot(inner[0, 1])
    here = explanation.cell_box(edit.cell)
    show(left, picture)
    _box(left, here, number + 1, picture.shape)
    _zoom(left, here, picture.shape)
    reference = edit.reference_image
    if reference is None:
        right.text(0.5, 0.5, "reference image\nnot kept", ha="center", va="center", fontsize=9, color=QUIET)
        right.set_axis_off()
    else:
        shown = displayable(reference)
        there = cell_box(edit.reference_cell, edit.reference_grid, shown.shape[:2])
        show(right, shown)
        frame_box(right, there, RIGHT, 2.5)
        _zoom(right, there, shown.shape)
    arrow = ConnectionPatch(
        (0.0, 0.5), (1.0, 0.5), "axes fraction", "axes fraction", axesA=right, axesB=left, arrowstyle="-|>", color=RIGHT
    )
    arrow.set_linewidth(2)
    figure.add_artist(arrow)
    before = float(explanation.logits_path[number].softmax(0)[explanation.target])
    left.set_title(f"{number + 1}. replaced", fontsize=9.5, fontweight="bold", loc="left", pad=4)
    right.set_title("by a real cell of", fontsize=9.5, fontweight="bold", loc="left", pad=4)
    write_caption(right, plain(edit.reference_class), RIGHT)
    write_caption(left, "wanted class", "black", end=f" {before:.0%} → {edit.target_probability:.0%}")
    write_caption(left, f"cosine of the two cells {edit.similarity:.2f}", QUIET, line=1)
    return left


def _zoom(axes: Axes, box: tuple[int, int, int, int], shape: tuple[int, ...]) -> None:
    """Show a cell with one and a half cells around it, moved so that no empty border is seen."""
    left, top, right, bottom = box
    limits = []
    for low, high, size in ((left, right, shape[1]), (top, bottom, shape[0])):
        span = min(4 * (high - low), size)
        start = min(max((low + high - span) / 2, 0), size - span)
        limits.append((start - 0.5, start + span - 0.5))
    axes.set_xlim(*limits[0])
    axes.set_ylim(*limits[1][::-1])


def _box(axes: Axes, box: tuple[int, int, int, int], number: int, shape: tuple[int, ...]) -> None:
    """A numbered frame; the number stands in the frame's corner."""
    frame_box(axes, box, MARK, 2)
    inset = 0.03 * shape[1]
    axes.text(
        box[0] + inset,
        box[1] + inset,
        str(number),
        fontsize=8,
        fontweight="bold",
        ha="center",
        va="center",
        clip_on=True,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": MARK, "edgecolor": "black", "linewidth": 0.6},
    )
