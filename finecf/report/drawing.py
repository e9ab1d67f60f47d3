"""What the figures of all methods share: colours, sizes, pictures, and texts that end before the next panel."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from torch import Tensor

from finecf.explainers import Explanation

if TYPE_CHECKING:
    from numpy.typing import NDArray

WRONG: Final = "#c8443c"
RIGHT: Final = "#1b7f79"
MARK: Final = "#ffd23f"
QUIET: Final = "#666666"

WIDTH: Final = 12  # inches
DPI: Final = 100
SMALLEST_TYPE: Final = 6.5
GAP: Final = 0.12  # inches that stay free between a text and the next panel


class Truth(NamedTuple):
    """What really tells two classes apart in an image: a bool [H,W] mask, and its name; and where it is known what the
    image would be as the other class, [C,H,W].
    """

    mask: Tensor
    name: str
    redrawn: Tensor | None = None


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


def show(axes: Axes, picture: NDArray[np.float32]) -> None:
    """An image without axes; a small one is not smoothed."""
    small = min(picture.shape[:2]) < 64
    axes.imshow(picture, interpolation="nearest" if small else "antialiased", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def frame_box(axes: Axes, box: tuple[int, int, int, int], colour: str, width: float) -> None:
    """A coloured frame, visible on any ground."""
    left, top, right, bottom = box
    # A dark line under the coloured one keeps the frame visible on any ground.
    for edge, line in (("black", width + 1.5), (colour, width)):
        corner = (left - 0.5, top - 0.5)
        axes.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=edge, linewidth=line))


def write_title(axes: Axes, title: str, caption: str) -> None:
    """The title of a panel and, if there is one, the first line under it."""
    fit_text(axes.set_title(title, fontsize=10, fontweight="bold", loc="left", pad=5), _right_end(axes))
    if caption:
        write_caption(axes, caption, QUIET)


def write_caption(axes: Axes, text: str, colour: str, line: int = 0, fit: bool = True, end: str = "") -> None:
    """A line of text under a panel, with its `end`; with `fit` it ends before the next panel, and keeps that."""
    written = axes.annotate(
        text + end,
        (0, 0),
        (0, -4 - 12 * line),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color=colour,
        va="top",
    )
    if fit:
        fit_text(written, _right_end(axes), end)


def _right_end(axes: Axes) -> float:
    """How far to the right (of the figure, 0 to 1) a text of these axes may go."""
    # An image that is not square leaves a part of its place empty: the place counts, not the image.
    return float(axes.get_position(original=True).x1) + GAP / WIDTH


def fit_text(text: Text, right: float, end: str = "") -> None:
    """Make a text stop at `right` (of the figure's width, 0 to 1): smaller type, and if need be fewer letters, of those
    before its `end`.
    """
    if text.axes is not None:
        text.axes.apply_aspect()  # else the text is measured from where the panel stood before it took its shape
    limit = right * WIDTH * DPI
    box, size = text.get_window_extent(), float(text.get_fontsize())
    if box.x1 <= limit:
        return
    size *= (limit - box.x0) / box.width
    while size > SMALLEST_TYPE:
        text.set_fontsize(size)
        if text.get_window_extent().x1 <= limit:
            return
        size *= 0.98  # hinted letters do not shrink exactly with their size
    text.set_fontsize(SMALLEST_TYPE)
    words = text.get_text().removesuffix(end)
    while words and text.get_window_extent().x1 > limit:
        words = words[:-1]
        text.set_text(words.rstrip() + "…" + end)


def plot_area(place: SubplotSpec) -> SubplotSpec:
    """The middle of a grid cell, for axes that carry tick labels."""
    return place.subgridspec(3, 3, width_ratios=[0.12, 1, 0.02], height_ratios=[0.02, 1, 0.35])[1, 1]


def plain(name: str) -> str:
    """A class name as words."""
    return name.replace("_", " ")


def short_name(name: str) -> str:
    """A class name as words, cut where it is long."""
    return textwrap.shorten(plain(name), 36, placeholder="…")


def blank_figure(height: float) -> Figure:
    """A white figure of the common width; `height` in inches."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def headline(figure: Figure, explanation: Explanation, question: str, answer: str) -> None:
    """The two lines at the top, and the image's name at the foot."""
    height = figure.get_figheight()
    fit_text(figure.text(0.02, 1 - 0.12 / height, question, fontsize=16, fontweight="bold", va="top"), 0.98)
    fit_text(figure.text(0.02, 1 - 0.48 / height, answer, fontsize=12, color=QUIET, va="top"), 0.98)
    if explanation.source:
        figure.text(0.98, 0.08 / height, short_source(explanation), fontsize=8, color=QUIET, ha="right")


def outline_truth(axes: Axes, truth: Truth | None, what: str = "the difference to see") -> None:
    """Where the right answer is known: its outline, and its name on the third line under the image."""
    if truth is None:
        return
    axes.contour(truth.mask.cpu().numpy(), levels=[0.5], colors=["white"], linewidths=2.5)
    axes.contour(truth.mask.cpu().numpy(), levels=[0.5], colors=["black"], linewidths=1, linestyles="dashed")
    write_caption(axes, f"dashed: {what} ({truth.name})", QUIET, line=2)


def bare_chart(axes: Axes, title: str, across: str) -> None:
    """A chart's title, the name of its horizontal axis, and no more lines than needed."""
    axes.tick_params(labelsize=8)
    axes.set_xlabel(across, fontsize=9)
    fit_text(axes.set_title(title, fontsize=10.5, fontweight="bold", loc="left"), _right_end(axes))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def star(axes: Axes, across: float, height: float) -> None:
    """A star at a point of a chart."""
    axes.plot(across, height, "*", color=MARK, markeredgecolor="black", markersize=13, zorder=3)


def mark(axes: Axes, at: float, text: str, colour: str, height: float, left: bool | None = None) -> None:
    """A vertical line with its name beside it: on its left, its right, or (None) where there is more room."""
    axes.axvline(at, color=colour, linewidth=1, linestyle="--", zorder=0)
    left = at > sum(axes.get_xlim()) / 2 if left is None else left
    axes.annotate(
        text,
        (at, height),
        (-5 if left else 5, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        fontsize=8,
        color=colour,
        bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )
