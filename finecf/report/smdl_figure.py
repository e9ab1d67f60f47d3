"""The figure of an SMDL explanation."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from finecf.explainers import SMDLExplanation
from finecf.report.drawing import (
    MARK,
    QUIET,
    RIGHT,
    WRONG,
    Truth,
    bare_chart,
    blank_figure,
    displayable,
    headline,
    mark,
    outline_truth,
    plain,
    show,
    star,
    write_caption,
    write_title,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

FIRST: Final = 5
"""So many regions have a number that catches the eye."""
NUMBERED: Final = 60
"""So many regions are numbered at all: more numbers hide the image."""
PICTURE: Final = 3.4
"""Inches that a picture is wide, and high if it is square."""
HIDDEN: Final = 0.93
"""The grey of what is not shown to the model."""
TERM_COLOURS: Final = {
    "confidence": "#8d6cab",
    "effectiveness": "#b08d57",
    "consistency": RIGHT,
    "collaboration": "#3f7fb5",
}
SCORE: Final = (
    "The score adds up four terms, each times its weight: how sure the model is when only these regions are shown "
    "(confidence), how little they repeat one another (effectiveness), how far they alone speak for the class "
    "(consistency), and how far the class is lost without them (collaboration)."
)
LINE_LENGTH: Final = 190


def draw_smdl(explanation: SMDLExplanation, truth: Truth | None) -> Figure:
    """Draw the figure: the regions in their order, the least set that is enough, the curves, the score."""
    labels = explanation.maps["regions"].cpu().numpy()
    small = _small_print(explanation)
    # Sizes in inches: pictures, charts, and the room for the words above, between and below them.
    pictures = PICTURE * min(1, max(0.4, labels.shape[0] / labels.shape[1]))
    charts, foot = 2.3, 0.35 + 0.17 * len(small)
    figure = blank_figure(1.05 + pictures + 1.0 + charts + 0.75 + foot)
    height = figure.get_figheight()
    _headline(figure, explanation)
    picture = _picture(explanation, labels.shape)

    top = GridSpec(1, 3, figure, left=0.02, right=0.98, top=1 - 1.05 / height, bottom=1 - (1.05 + pictures) / height)
    _image(figure.add_subplot(top[0]), explanation, picture, truth)
    _order(figure.add_subplot(top[1]), explanation, picture, labels)
    _alone(figure.add_subplot(top[2]), explanation, picture, labels)
    base = (foot + 0.75) / height
    bottom = GridSpec(1, 2, figure, left=0.055, right=0.975, top=base + charts / height, bottom=base, wspace=0.16)
    _curves(figure.add_subplot(bottom[0]), explanation)
    _score(figure.add_subplot(bottom[1]), explanation)
    figure.text(0.02, (foot - 0.06) / height, "\n".join(small), fontsize=8, color=QUIET, va="top", linespacing=1.25)
    return figure


def shown_prefix(explanation: SMDLExplanation) -> int:
    """How many first regions are shown alone: the least that are enough, else those of the best score."""
    return explanation.sufficient_prefix or explanation.best_prefix


def _headline(figure: Figure, explanation: SMDLExplanation) -> None:
    said, asked = plain(explanation.predicted_name), plain(explanation.target_name)
    same = explanation.predicted == explanation.target
    question = f"The model says {said}. " + ("Which regions make it say so?" if same else f"What speaks for {asked}?")
    ranked, count = len(explanation.order), explanation.region_count
    enough = explanation.sufficient_prefix
    answer = "" if ranked == count else f"Of {count} regions {ranked} were ranked. "
    if enough is None:
        which = f"its {count} regions" if ranked == count else "these"
        answer += f"However many of {which} are shown alone, the first ones first, they are not taken for {asked}."
    else:
        answer += (
            f"{_first(enough).capitalize()} of its {count} regions, shown alone ({explanation.area(enough):.0%} of the "
            f"image), {'is' if enough == 1 else 'are'} {'still' if same else 'already'} taken for {asked}."
        )
    headline(figure, explanation, question, answer)


def _image(axes: Axes, explanation: SMDLExplanation, picture: NDArray[np.float32], truth: Truth | None) -> None:
    show(axes, picture)
    outline_truth(axes, truth)
    write_title(axes, "The image", "")
    before = explanation.probabilities_before
    said, asked = plain(explanation.predicted_name), plain(explanation.target_name)
    if explanation.predicted == explanation.target:
        write_caption(axes, f"says {said}", RIGHT, end=f" ({before.predicted:.0%})")
        write_caption(axes, "explained: what makes it say so", QUIET, line=1)
    else:
        write_caption(axes, f"says {said}", WRONG, end=f" ({before.predicted:.0%})")
        write_caption(axes, f"explained: what speaks for {asked}", RIGHT, line=1, end=f" ({before.target:.0%})")


def _order(axes: Axes, explanation: SMDLExplanation, picture: NDArray[np.float32], labels: NDArray[np.int32]) -> None:
    """The regions: brighter where earlier, with borders and numbers; the set shown alone has a border of its own."""
    ranked = len(explanation.order)
    strength = np.zeros(explanation.region_count)
    strength[explanation.order] = 1 - np.arange(ranked) / ranked
    grey = picture.mean(2, keepdims=True).repeat(3, 2)
    tint = colormaps["inferno"](0.15 + 0.7 * strength[labels])[..., :3]
    # The first regions take most of the tint, so that the eye goes there.
    share = (0.15 + 0.5 * strength[labels] ** 2)[..., None]
    show(axes, ((1 - share) * grey + share * tint).astype(np.float32))
    _borders(axes, labels, "white", 0.6)
    inside = explanation.shown(shown_prefix(explanation)).cpu().numpy()
    _borders(axes, inside.astype(np.int32), "black", 3.2)
    _borders(axes, inside.astype(np.int32), MARK, 1.8)
    for number, region in reversed([*enumerate(explanation.order[:NUMBERED], 1)]):
        for row, column in _centres(labels == region):
            _number(axes, row, column, number)
    write_title(axes, "The regions, the one that matters most first", "brighter: earlier in the order")
    set_shown = "enough alone" if explanation.sufficient_prefix else "best score"
    # Where the set takes most of the image, what its border surrounds is the rest.
    rest = "what is left by " if inside.mean() > 0.5 else ""
    write_caption(axes, f"yellow border: {rest}{_first(shown_prefix(explanation))}, {set_shown}", QUIET, line=1)
    if ranked > NUMBERED:
        write_caption(axes, f"the first {NUMBERED} of {ranked} are numbered", QUIET, line=2)


def _alone(axes: Axes, explanation: SMDLExplanation, picture: NDArray[np.float32], labels: NDArray[np.int32]) -> None:
    count = shown_prefix(explanation)
    inside = explanation.shown(count).cpu().numpy()
    show(axes, np.where(inside[..., None], picture, np.float32(HIDDEN)))
    _borders(axes, np.where(inside, labels, -1), "black", 0.5)
    asked = plain(explanation.target_name)
    if explanation.sufficient_prefix is None:
        write_title(axes, f"Nothing is enough; the best score: {_first(count)}", "")
        verdict, colour = f"alone not taken for {asked} ({float(explanation.insertion[count]):.0%})", WRONG
    else:
        write_title(axes, f"Enough alone: {_first(count)}", "")
        verdict, colour = f"alone taken for {asked} ({float(explanation.insertion[count]):.0%})", RIGHT
    write_caption(axes, verdict, colour)
    write_caption(axes, f"{explanation.area(count):.0%} of the image; grey: hidden from the model", QUIET, line=1)


def _curves(axes: Axes, explanation: SMDLExplanation) -> None:
    shares = explanation.shares.numpy()
    inserted, deleted = explanation.insertion.cpu().numpy(), explanation.deletion.cpu().numpy()
    best, enough = explanation.best_prefix, explanation.sufficient_prefix
    # Both ends are known, also where not all regions were ranked: all of the image shown, and all of it hidden.
    for curve, end, colour, label in (
        (inserted, deleted[0], RIGHT, f"only the first regions shown (area {explanation.insertion_area:.2f})"),
        (deleted, inserted[0], WRONG, f"the first regions hidden (area {explanation.deletion_area:.2f})"),
    ):
        axes.plot(shares, curve, "-o", color=colour, linewidth=2, markersize=3, label=label)
        axes.plot([shares[-1], 1], [curve[-1], end], color=colour, linewidth=1, linestyle=":")
        star(axes, float(shares[best]), float(curve[best]))
    axes.set_xlim(-0.01, 1.02)
    axes.set_ylim(-0.03, 1.03)
    mark(axes, float(shares[best]), f"best score: {best}", "black", 0.94)
    if enough is not None:
        mark(axes, float(shares[enough]), f"enough: {enough}", QUIET, 0.86)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    across = "share of the image that the first regions cover"
    if shares[-1] < 1 - 1e-9:
        across += " (dotted: not ranked)"
    bare_chart(axes, f"Probability of {plain(explanation.target_name)}", across)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def _score(axes: Axes, explanation: SMDLExplanation) -> None:
    steps = np.arange(1, len(explanation.order) + 1)
    total, best = explanation.total.cpu().numpy(), explanation.best_prefix
    for name, values in zip(TERM_COLOURS, explanation.scores.cpu().numpy().T, strict=True):
        weight = explanation.weights[name]
        if weight:
            label = name if weight == 1 else f"{name} x {weight:g}"
            axes.plot(steps, weight * values, color=TERM_COLOURS[name], linewidth=1.2, label=label)
    axes.plot(steps, total, color="black", linewidth=2, label="score")
    star(axes, best, float(total[best - 1]))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.2 * (high - low))  # room for the name of the best
    axes.set_xlim(0.5, len(steps) + max(0.5, 0.02 * len(steps)))
    mark(axes, best, f"best score: {best}", "black", 0.94)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    bare_chart(axes, "Score of the first regions", "number of first regions")
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=5, columnspacing=1.2)


_GRADIENTS = {"window": " (a gradient counted as one)"}


def _small_print(explanation: SMDLExplanation) -> list[str]:
    """What stands behind the figure, as lines of equal length."""
    asked = "" if explanation.region_count == explanation.regions_asked else f" ({explanation.regions_asked} asked for)"
    facts = [
        f"{explanation.region_count} regions{asked}, {explanation.search} search: {explanation.guarantee}.",
        f"{explanation.evaluations:,} images went through the model{_GRADIENTS.get(explanation.search, '')}.",
        *(f"{note[0].upper()}{note[1:]}." for note in explanation.notes),
    ]
    return [*textwrap.wrap(SCORE, LINE_LENGTH), *textwrap.wrap(" ".join(facts), LINE_LENGTH)]


def _picture(explanation: SMDLExplanation, size: tuple[int, ...]) -> NDArray[np.float32]:
    """The image at the size of its regions: a classifier's own preprocessing may have resized it."""
    image = explanation.image
    if tuple(image.shape[-2:]) != size and image.is_floating_point():
        image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    return displayable(image)


def _borders(axes: Axes, labels: NDArray[np.int32], colour: str, width: float) -> None:
    """Lines along the edges of pixels between which the label changes."""
    across = _runs(labels[1:] != labels[:-1])
    down = _runs((labels[:, 1:] != labels[:, :-1]).T)[..., ::-1]
    lines = [*across, *down]
    axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, capstyle="projecting"))


def _runs(changes: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Where a row of changes runs on, as one line [n,2,2] of (x, y): short lines would be drawn as beads."""
    steps = np.diff(changes.astype(np.int8), axis=1, prepend=0, append=0)
    (rows, starts), (_, ends) = (steps == 1).nonzero(), (steps == -1).nonzero()
    return np.stack([starts - 0.5, rows + 0.5, ends - 0.5, rows + 0.5], 1).reshape(-1, 2, 2)


def _centres(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """A pixel deep inside each piece of a region; pieces much smaller than the largest are left out."""
    from scipy import ndimage  # comes with scikit-image

    pieces, count = ndimage.label(mask)
    sizes = ndimage.sum_labels(mask, pieces, range(1, count + 1))
    found = []
    for piece in range(1, count + 1):
        if sizes[piece - 1] >= 0.5 * sizes.max():
            depth = ndimage.distance_transform_edt(np.pad(pieces == piece, 1))[1:-1, 1:-1]
            # Of all pixels of (nearly) the greatest depth the one in their middle: the outer ones look off centre.
            deepest = np.argwhere(depth >= 0.9 * depth.max())
            middle = deepest[np.abs(deepest - deepest.mean(0)).sum(1).argmin()]
            found.append((int(middle[0]), int(middle[1])))
    return found


def _number(axes: Axes, row: int, column: int, number: int) -> None:
    place: dict[str, Any] = {"ha": "center", "va": "center_baseline", "clip_on": True}
    if number <= FIRST:
        axes.text(
            column,
            row,
            str(number),
            fontsize=9.5,
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": MARK, "edgecolor": "black", "linewidth": 0.6},
            **place,
        )
    else:
        dark = [withStroke(linewidth=1.8, foreground="black")]
        axes.text(column, row, str(number), fontsize=7.5, color="white", path_effects=dark, **place)


def _first(count: int) -> str:
    return "the first one" if count == 1 else f"the first {count}"
