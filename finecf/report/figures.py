"""Figures that a person can read who has never heard of the method.

They are drawn without pyplot, so that no window, backend or global setting is touched.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec, SubplotSpec
from matplotlib.patches import ConnectionPatch, Rectangle
from matplotlib.text import Text
from torch import Tensor

from finecf.explainers import Explanation, FGVCEExplanation
from finecf.explainers.result import cell_box

if TYPE_CHECKING:
    from numpy.typing import NDArray

WRONG: Final = "#c8443c"
RIGHT: Final = "#1b7f79"
MARK: Final = "#ffd23f"
QUIET: Final = "#666666"
PART_COLOURS: Final = ("#ffd23f", "#4cc9f0", "#f72585", "#80ed99", "#f8961e", "#b5838d")

SHOWN_EDITS: Final = 6
SWAPS_A_ROW: Final = 3
WIDTH: Final = 12  # inches
DPI: Final = 100
SMALLEST_TYPE: Final = 6.5
GAP: Final = 0.12  # inches that stay free between a text and the next panel
POOLED: Final = "What comes in matters, not where: this network averages over positions."
FAINT: Final = 0.2
"""A difference of two maps in [0,1] that is nowhere larger is called faint in its caption."""


class Truth(NamedTuple):
    """What really tells two classes apart in an image: a bool [H,W] mask, and its name."""

    mask: Tensor
    name: str


def plot(explanation: Explanation, path: str | Path | None = None, truth: Truth | None = None) -> Figure:
    """Draw the figure of an explanation; with `path` it is also written there (the suffix gives the format).

    Where the right answer is known, `truth` outlines it in the image.

    Raises:
        TypeError: there is no figure for this kind of explanation.
    """
    if not isinstance(explanation, FGVCEExplanation):
        raise TypeError(f"there is a figure for FGVCEExplanation, not for {type(explanation).__name__}")
    figure = _fgvce(explanation, truth)
    if path is not None:
        figure.savefig(path, dpi=DPI)
    return figure


def displayable(image: Tensor) -> NDArray[np.float32]:
    """An image [C,H,W] (any range, 1 or 3 channels) or uint8 [H,W,3] as float RGB [H,W,3] in [0,1].

    Values outside [0,1] are those of a normalised image: its range is stretched to [0,1].
    """
    if image.dtype == torch.uint8:
        return (image.float() / 255).cpu().numpy()
    shown = image.detach().float().cpu()
    low, high = float(shown.amin()), float(shown.amax())
    if low < 0 or high > 1:
        shown = (shown - low) / max(high - low, 1e-12)
    return shown.permute(1, 2, 0).expand(-1, -1, 3).numpy()


def short_source(explanation: Explanation) -> str:
    """The image's name: of a file its folder and name, else all of it."""
    source = explanation.source or "image"
    return "/".join(Path(source).parts[-2:]) if Path(source).is_absolute() or Path(source).is_file() else source


def _fgvce(explanation: FGVCEExplanation, truth: Truth | None) -> Figure:
    edits = explanation.edits[:SHOWN_EDITS]
    swap_rows = -(-len(edits) // SWAPS_A_ROW)
    heights = [3.05, *[2.2] * swap_rows, 3.05]
    # Sizes in inches: each row is its pictures' height and the room for the words above and below them.
    figure = Figure(figsize=(WIDTH, sum(heights) + 2), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
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
        f"brighter: more {_words(explanation.predicted_name)}",
    )
    _parts(figure.add_subplot(grid[0, 6:9]), explanation, picture)
    _path(figure.add_subplot(_inset(grid[0, 9:12])), explanation)

    for number, _ in enumerate(edits):
        row, place = 1 + number // SWAPS_A_ROW, number % SWAPS_A_ROW
        replaced = _swap(figure, grid[row, 4 * place : 4 * place + 4], explanation, picture, number)
        if place == 0 and row == swap_rows and _pooled(explanation):
            _caption(replaced, POOLED, QUIET, line=2, fit=False)

    last = len(heights) - 1
    panels = (
        ("before", "Before the edits", f"counts for {_words(explanation.predicted_name)}"),
        ("after", "After the edits", f"counts for {_words(explanation.target_name)}"),
        ("dominant", "What the repair brought", "dominant region: after minus before"),
        ("invariant", "What the mistake stood on", "invariant region: before minus after"),
    )
    for place, (name, title, caption) in enumerate(panels):
        _heat(figure.add_subplot(grid[last, 3 * place : 3 * place + 3]), explanation, picture, name, title, caption)
    return figure


def _headline(figure: Figure, explanation: FGVCEExplanation) -> None:
    height = figure.get_figheight()
    wrong, right = _words(explanation.predicted_name), _words(explanation.target_name)
    says = f"The model says {wrong}. What would make it say {right}?"
    _fit(figure.text(0.02, 1 - 0.12 / height, says, fontsize=16, fontweight="bold", va="top"), 0.98)
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
    _fit(figure.text(0.02, 1 - 0.48 / height, text, fontsize=12, color=QUIET, va="top"), 0.98)
    if explanation.source:
        figure.text(0.98, 0.08 / height, short_source(explanation), fontsize=8, color=QUIET, ha="right")


def _where(axes: Axes, explanation: FGVCEExplanation, picture: NDArray[np.float32], truth: Truth | None) -> None:
    _show(axes, picture)
    if truth is not None:
        axes.contour(truth.mask.cpu().numpy(), levels=[0.5], colors=["white"], linewidths=2.5)
        axes.contour(truth.mask.cpu().numpy(), levels=[0.5], colors=["black"], linewidths=1, linestyles="dashed")
        _caption(axes, f"dashed: the difference to see ({truth.name})", QUIET, line=2)
    for number, edit in enumerate(explanation.edits[:SHOWN_EDITS], 1):
        _box(axes, explanation.cell_box(edit.cell), number, picture.shape)
    _title(axes, "The image and the cells replaced", "")
    before = explanation.probabilities_before
    _caption(axes, f"says {_words(explanation.predicted_name)} ({before.predicted:.0%})", WRONG)
    _caption(axes, f"wanted: {_words(explanation.target_name)} ({before.target:.0%})", RIGHT, line=1)


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
    _show(axes, grey)
    # Weak values stay transparent, so that the photograph shows where nothing happens.
    axes.imshow(values, cmap="inferno", vmin=0, vmax=1, alpha=np.clip(values * 1.6, 0, 0.8), interpolation="bilinear")
    if not values.any():
        axes.text(0.5, 0.5, "nothing", transform=axes.transAxes, ha="center", color="white", fontsize=12)
    if name in ("dominant", "invariant", "after"):
        for edit in explanation.edits[:SHOWN_EDITS]:
            _frame(axes, explanation.cell_box(edit.cell), MARK, 1.2)
    _title(axes, title, caption)
    strength = _difference(explanation, name)
    if 0 < strength < FAINT:
        _caption(axes, f"faint: drawn {1 / strength:.0f} times as strong as it is", QUIET, line=1)


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
    _show(axes, shaded.astype(np.float32))
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
    _title(axes, "Parts behind the mistake", "outlined, on the object it looked at")


def _path(axes: Axes, explanation: FGVCEExplanation) -> None:
    path = explanation.logits_path.softmax(1).cpu().numpy()
    steps = np.arange(len(path))
    for index, name, colour in (
        (explanation.predicted, explanation.predicted_name, WRONG),
        (explanation.target, explanation.target_name, RIGHT),
    ):
        axes.plot(steps, path[:, index], "-o", color=colour, linewidth=2, markersize=5, label=_short(name))
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(-0.3, max(len(path) - 1, 1) + 0.3)
    axes.set_xticks(steps if len(steps) <= 12 else steps[:: len(steps) // 8])
    axes.tick_params(labelsize=8)
    axes.set_xlabel("cells replaced", fontsize=9)
    axes.set_title("Probability, edit by edit", fontsize=10.5, fontweight="bold", loc="left")
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


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
    _show(left, picture)
    _box(left, here, number + 1, picture.shape)
    _zoom(left, here, picture.shape)
    reference = edit.reference_image
    if reference is None:
        right.text(0.5, 0.5, "reference image\nnot kept", ha="center", va="center", fontsize=9, color=QUIET)
        right.set_axis_off()
    else:
        shown = displayable(reference)
        there = cell_box(edit.reference_cell, edit.reference_grid, shown.shape[:2])
        _show(right, shown)
        _frame(right, there, RIGHT, 2.5)
        _zoom(right, there, shown.shape)
    arrow = ConnectionPatch(
        (0.0, 0.5), (1.0, 0.5), "axes fraction", "axes fraction", axesA=right, axesB=left, arrowstyle="-|>", color=RIGHT
    )
    arrow.set_linewidth(2)
    figure.add_artist(arrow)
    before = float(explanation.logits_path[number].softmax(0)[explanation.target])
    left.set_title(f"{number + 1}. replaced", fontsize=9.5, fontweight="bold", loc="left", pad=4)
    right.set_title("by a real cell of", fontsize=9.5, fontweight="bold", loc="left", pad=4)
    _caption(right, _words(edit.reference_class), RIGHT)
    _caption(left, f"wanted class {before:.0%} → {edit.target_probability:.0%}", "black")
    _caption(left, f"cosine of the two cells {edit.similarity:.2f}", QUIET, line=1)
    return left


def _show(axes: Axes, picture: NDArray[np.float32]) -> None:
    small = min(picture.shape[:2]) < 64
    axes.imshow(picture, interpolation="nearest" if small else "antialiased", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


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


def _frame(axes: Axes, box: tuple[int, int, int, int], colour: str, width: float) -> None:
    left, top, right, bottom = box
    # A dark line under the coloured one keeps the frame visible on any ground.
    for edge, line in (("black", width + 1.5), (colour, width)):
        corner = (left - 0.5, top - 0.5)
        axes.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=edge, linewidth=line))


def _box(axes: Axes, box: tuple[int, int, int, int], number: int, shape: tuple[int, ...]) -> None:
    """A numbered frame; the number stands in the frame's corner."""
    _frame(axes, box, MARK, 2)
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


def _title(axes: Axes, title: str, caption: str) -> None:
    _fit(axes.set_title(title, fontsize=10, fontweight="bold", loc="left", pad=5), _right_end(axes))
    if caption:
        _caption(axes, caption, QUIET)


def _caption(axes: Axes, text: str, colour: str, line: int = 0, fit: bool = True) -> None:
    """A line of text under a panel; with `fit` it ends before the next panel."""
    written = axes.annotate(
        text,
        (0, 0),
        (0, -4 - 12 * line),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color=colour,
        va="top",
    )
    if fit:
        _fit(written, _right_end(axes))


def _right_end(axes: Axes) -> float:
    """How far to the right (of the figure, 0 to 1) a text of these axes may go."""
    # An image that is not square leaves a part of its place empty: the place counts, not the image.
    return float(axes.get_position(original=True).x1) + GAP / WIDTH


def _fit(text: Text, end: float) -> None:
    """Make a text end at `end` (of the figure's width, 0 to 1): smaller type, and if need be fewer letters."""
    if text.axes is not None:
        text.axes.apply_aspect()  # else the text is measured from where the panel stood before it took its shape
    box, limit = text.get_window_extent(), end * WIDTH * DPI
    if box.x1 <= limit:
        return
    # Hinted letters do not shrink exactly with their size.
    text.set_fontsize(max(SMALLEST_TYPE, 0.98 * float(text.get_fontsize()) * (limit - box.x0) / box.width))
    words = text.get_text()
    while words and text.get_window_extent().x1 > limit:
        words = words[:-1]
        text.set_text(words.rstrip() + "…")


def _inset(place: SubplotSpec) -> SubplotSpec:
    """The middle of a grid cell, for axes that carry tick labels."""
    return place.subgridspec(3, 3, width_ratios=[0.12, 1, 0.02], height_ratios=[0.02, 1, 0.35])[1, 1]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _short(name: str) -> str:
    return textwrap.shorten(_words(name), 36, placeholder="…")
