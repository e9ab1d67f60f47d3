"""The figure of a Mirror-CFE explanation."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from finecf.explainers import MirrorExplanation
from finecf.regions.baseline import gaussian_blur
from finecf.report.drawing import (
    GAP,
    QUIET,
    RIGHT,
    WIDTH,
    WRONG,
    Truth,
    bare_chart,
    blank_figure,
    fit_text,
    headline,
    mark,
    outline_truth,
    plain,
    short_name,
    show,
    star,
    write_caption,
    write_title,
)
from finecf.report.mirror_path import SIDES, Place, Shown, places, shown_as

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN_PLACES: Final = 11
"""So many images of the path are shown, and the first counterfactual one among them."""
_FAINT: Final = 0.05
"""Changes that are all smaller than this, as a share of the image's range, do not shine."""
MARGIN: Final = 0.24
"""Inches left free at both sides."""
BETWEEN: Final = 0.07
"""Inches between two images of the strip."""
LARGEST: Final = 1.5
"""Inches that an image of a short strip is wide at most."""
PICTURES_WIDTH: Final = {3: 7.6, 4: 8.2, 5: 8.4}
"""Inches that the pictures of the lower row take together, by their number."""
SMALL_PRINT: Final = (
    "k moves the features that the model reads along a straight line: from those of the image (0) over the boundary "
    "between the two classes (0.5) to their mirror image (1), where the lead of one class over the other has changed "
    "sides. Each image is drawn from the features of its k and put through the model again."
)
WAYS: Final = {"closed_form": "the closed form", "lbfgs": "L-BFGS", "two_class": "the reflection of two classes"}
LINE_LENGTH: Final = 190


def draw_mirror(explanation: MirrorExplanation, truth: Truth | None) -> Figure:
    """Draw the figure: the images along k, what changed, and the probabilities of both classes on the way."""
    path = places(explanation, SHOWN_PLACES)
    shown = shown_as(explanation)
    picture = shown(explanation.prepared)
    truth = _resized(truth, picture)
    shape = min(2.0, max(0.4, picture.shape[0] / picture.shape[1]))
    count = len(path) + 1
    cell = min(LARGEST, (WIDTH - 2 * MARGIN - (count - 1) * BETWEEN) / count)
    pictures = 3 + (truth is not None and truth.redrawn is not None) + (explanation.trimmed_image is not None)
    large = min(PICTURES_WIDTH[pictures] / pictures - 2 * GAP, 2.9 / shape)
    tall = max(large * shape, 2.0)
    small = _small_print(explanation, len(path) - sum(place.first for place in path))

    # Sizes in inches, from the top down: headline, strip with its words, the larger row with its words, small print.
    strip = 1.4
    row = strip + cell * shape + 0.88
    figure = blank_figure(row + tall + 1.0 + 0.35 + 0.17 * len(small))
    height = figure.get_figheight()
    _headline(figure, explanation)

    def axes(left: float, top: float, width: float, high: float) -> Axes:
        return figure.add_axes((left / WIDTH, 1 - (top + high) / height, width / WIDTH, high / height))

    _strip_title(figure, explanation)
    _image_of_strip(axes(MARGIN, strip, cell, cell * shape), explanation, picture)
    for number, place in enumerate(path, 1):
        _place(axes(MARGIN + number * (cell + BETWEEN), strip, cell, cell * shape), place)

    step = large + 2 * GAP
    lower = [axes(MARGIN + number * step, row, large, tall) for number in range(pictures)]
    for each in lower:
        each.set_anchor("NW")
    _image(lower[0], explanation, picture, truth)
    _counterfactual(lower[1], explanation, shown)
    if explanation.trimmed_image is not None:
        _trimmed(lower[2], explanation, shown, explanation.trimmed_image)
    if truth is not None and truth.redrawn is not None:
        _redrawn(lower[-2], explanation, truth.redrawn)
    _change(lower[-1], explanation, picture, truth)
    left = MARGIN + pictures * step + 0.45
    _confidences(axes(left, row, WIDTH - MARGIN - left, tall - 0.12), explanation)
    foot = 0.29 + 0.17 * len(small)
    figure.text(MARGIN / WIDTH, foot / height, "\n".join(small), fontsize=8, color=QUIET, va="top", linespacing=1.25)
    return figure


def origin_name(explanation: MirrorExplanation) -> str:
    """The name of the class that the path leads away from, as words."""
    if explanation.origin == explanation.predicted:
        return plain(explanation.predicted_name)
    name = explanation.origin_name
    return f"class {explanation.origin}" if name is None else plain(name)


def _headline(figure: Figure, explanation: MirrorExplanation) -> None:
    said, asked = plain(explanation.predicted_name), plain(explanation.target_name)
    if explanation.taken_at_once:
        answer = (
            f"Redrawn at k = 0, with nothing changed, it is already taken for {asked}: what the "
            "decoder cannot draw decides."
        )
    elif explanation.lost_at_once:
        answer = (
            f"Redrawn at k = 0, with nothing changed, it is taken for {plain(str(explanation.redrawn_name))}: the "
            "decoder does not draw what the model sees."
        )
    elif explanation.first_k is not None:
        answer = (
            f"At k = {explanation.first_k:.2f} it is first taken for {asked}, on the way from "
            f"{origin_name(explanation)} (k = 0) to its mirror image (k = 1)."
        )
    else:
        answer = f"On the whole way to its mirror image (k = 1) it is never taken for {asked}"
        latent = explanation.latent_first_k
        answer += "." if latent is None else f"; the features it is drawn from are, from k = {latent:.2f} on."
    headline(figure, explanation, f"The model says {said}. What would it have to look like to be {asked}?", answer)


def _strip_title(figure: Figure, explanation: MirrorExplanation) -> None:
    """What the strip shows, and what the colours of its frames mean."""
    top = 1 - 0.86 / figure.get_figheight()
    handles = [Patch(facecolor="white", edgecolor=colour, linewidth=2.5, label=name) for name, colour in SIDES.values()]
    key = figure.legend(
        handles=handles,
        loc="upper right",
        bbox_to_anchor=(1 - MARGIN / WIDTH, top + 0.07 / figure.get_figheight()),
        ncols=3,
        fontsize=8.5,
        frameon=False,
        borderaxespad=0,
        columnspacing=1.4,
        handlelength=1.4,
    )
    start = key.get_window_extent().x0 / figure.bbox.width
    text = f"Below each image: how sure the model is of {plain(explanation.target_name)}"
    fit_text(figure.text(MARGIN / WIDTH, top, text, fontsize=10, fontweight="bold", va="top"), start - GAP / WIDTH)


def _image_of_strip(axes: Axes, explanation: MirrorExplanation, picture: NDArray[np.float32]) -> None:
    show(axes, picture)
    _label(axes, "image", "black", 0)
    _label(axes, _percent(explanation.probabilities_before.target), QUIET, 1)


def _place(axes: Axes, place: Place) -> None:
    """One image of the strip, framed in the colour of its side; the first counterfactual one is marked."""
    show(axes, place.picture)
    colour = SIDES[place.side][1]
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_edgecolor(colour)
        spine.set_linewidth(2.5)
    if place.first:
        axes.set_title("★ first", fontsize=9, fontweight="bold", pad=4)
    _label(axes, "k = " + (f"{place.k:.2f}".rstrip("0").rstrip(".")), "black", 0, bold=place.first)
    _label(axes, _percent(place.target), RIGHT if place.named else QUIET, 1, bold=place.named)


def _label(axes: Axes, text: str, colour: str, line: int, bold: bool = False) -> None:
    """A centred line under an image of the strip."""
    axes.annotate(
        text,
        (0.5, 0),
        (0, -5 - 12 * line),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color=colour,
        fontweight="bold" if bold else "normal",
        ha="center",
        va="top",
    )


def _image(axes: Axes, explanation: MirrorExplanation, picture: NDArray[np.float32], truth: Truth | None) -> None:
    show(axes, picture)
    outline_truth(axes, truth, "they differ")
    write_title(axes, "The image", "")
    before = explanation.probabilities_before
    write_caption(axes, f"says {plain(explanation.predicted_name)}", WRONG, end=f" ({before.predicted:.0%})")
    write_caption(axes, f"wanted: {plain(explanation.target_name)}", RIGHT, line=1, end=f" ({before.target:.0%})")


def _counterfactual(axes: Axes, explanation: MirrorExplanation, shown: Shown) -> None:
    show(axes, shown(explanation.counterfactual))
    target, after = plain(explanation.target_name), explanation.probabilities_after.target
    if explanation.first_k is None:
        write_title(axes, "Its mirror image, k = 1", "")
        write_caption(axes, f"not taken for {target}", WRONG)
        write_caption(axes, f"only {after:.0%} sure of it", QUIET, line=1)
        return
    write_title(axes, f"First taken: k = {explanation.first_k:.2f}", "")
    write_caption(axes, f"says {target}", RIGHT, end=f" ({after:.0%})")
    write_caption(axes, "at k = 1 too" if explanation.mirror_valid else "not at k = 1", QUIET, line=1)


def _trimmed(axes: Axes, explanation: MirrorExplanation, shown: Shown, image: Tensor) -> None:
    show(axes, shown(image))
    _outline(axes, explanation.prepared, image)
    share = f"{explanation.trimmed_share:.1%} of the change to k = 1"
    write_title(axes, "Enough of it", "on top of the repainted image" if explanation.trimmed_upon_repainted else share)
    blur = f"blurred {explanation.trimmed_blur:g} px"
    blurred = f", {blur} too" if explanation.trimmed_stands else f", not {blur}" if explanation.trimmed_blur else ""
    write_caption(axes, f"says {plain(explanation.target_name)}", RIGHT, line=1, end=blurred)


def _outline(axes: Axes, before: Tensor, after: Tensor) -> None:
    """A line round what changed, at some distance: it may be a few pixels of many. None where it is everywhere."""
    change = (after - before).detach().float().cpu().abs().mean(0)
    near = gaussian_blur(change[None, None], max(change.shape) / 64)[0, 0].numpy()
    if near.max() > 10 * near.min() and min(near.shape) > 1:
        for colour, width in (("white", 1.8), ("black", 0.7)):
            axes.contour(near / near.max(), levels=[0.1], colors=[colour], linewidths=width)


def _redrawn(axes: Axes, explanation: MirrorExplanation, image: Tensor) -> None:
    show(axes, image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3).numpy())
    write_title(axes, "Truly redrawn", f"as {plain(explanation.target_name)}")


def _change(axes: Axes, explanation: MirrorExplanation, picture: NDArray[np.float32], truth: Truth | None) -> None:
    values = explanation.maps["change"].detach().float().cpu().numpy()
    span = float(explanation.prepared.max() - explanation.prepared.min())
    largest = max(float(values.max()), _FAINT * span)
    show(axes, picture.mean(2, keepdims=True).repeat(3, 2) * 0.75)
    if values.any():
        # Weak values stay transparent, so that the image shows where nothing happens.
        strength = values / largest
        axes.imshow(
            strength, cmap="inferno", vmin=0, vmax=1, alpha=np.clip(strength * 1.6, 0, 0.9), interpolation="nearest"
        )
    else:
        axes.text(0.5, 0.5, "nothing", transform=axes.transAxes, ha="center", color="white", fontsize=12)
    if truth is not None:
        axes.contour(truth.mask.cpu().numpy(), levels=[0.5], colors=["white"], linewidths=1, linestyles="dashed")
    write_title(axes, "What changed", "brighter: more, from k = 0 on")
    write_caption(axes, f"mean {values.mean():.3f}, largest {values.max():.3f}", QUIET, line=1)


def _confidences(axes: Axes, explanation: MirrorExplanation) -> None:
    """Probabilities of both classes along k: of the images (solid) and of the features that they are drawn from."""
    order = explanation.k.argsort(stable=True)
    k = explanation.k[order].numpy()
    images, latents = (explanation.confidences(latent)[order].numpy() for latent in (False, True))
    classes = ((origin_name(explanation), WRONG), (plain(explanation.target_name), RIGHT))
    for column, (name, colour) in enumerate(classes):
        axes.plot(k, images[:, column], "-o", color=colour, linewidth=2, markersize=3.5, label=short_name(name))
        axes.plot(k, latents[:, column], "--", color=colour, linewidth=1.4)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.03, 1.25)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.axvspan(-0.02, 0.5, color=WRONG, alpha=0.05, linewidth=0)
    axes.axvspan(0.5, 1.02, color=RIGHT, alpha=0.05, linewidth=0)
    if explanation.latent_first_k is not None:
        mark(axes, explanation.latent_first_k, f"features: {explanation.latent_first_k:.2f}", QUIET, 0.955, True)
    if explanation.first_k is not None:
        mark(axes, explanation.first_k, f"image: {explanation.first_k:.2f}", "black", 0.875, explanation.first_k > 0.75)
        star(axes, explanation.first_k, explanation.probabilities_after.target)
    bare_chart(axes, "How sure the model is", "k")
    axes.plot([], [], "--", color=QUIET, linewidth=1.4, label="dashed: of the features it is drawn from")
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=1, labelspacing=0.2)


def _apart(explanation: MirrorExplanation) -> str:
    """How far apart the two classes' scores were, which is what the swap is to be measured by; "" where unknown."""
    apart = (explanation.latent_logits[:, explanation.origin] - explanation.latent_logits[:, explanation.target]).abs()
    away = (1 - 2 * explanation.k).abs()  # along k their distance falls to 0 at 1/2, and grows again
    place = int(away.argmax())
    if float(away[place]) == 0:
        return ""
    return f" (the two classes were {float(apart[place] / away[place]):.1g} apart)"


def _small_print(explanation: MirrorExplanation, shown: int) -> list[str]:
    """What stands behind the figure, as lines of equal length."""
    facts = [
        *(f"{note[0].upper()}{note[1:]}." for note in explanation.notes),
        SMALL_PRINT,
        "Where solid and dashed lines lie together the images say what the features do: here they are "
        f"{explanation.confidence_gap:.1%} apart on average for {plain(explanation.target_name)}.",
        f"The features are mirrored by {WAYS[explanation.reflection]}; at k = 1 the scores are within "
        f"{explanation.residual:.1g} of the swapped ones{_apart(explanation)}.",
    ]
    if explanation.corrections:
        times = "once" if explanation.corrections == 1 else f"up to {explanation.corrections} times"
        facts.append(f"What an image was short of was corrected {times}, along the model's gradient.")
    if explanation.soften:
        facts.append(f"What is drawn into the image is softened by a blur of {explanation.soften:g} pixels.")
    if explanation.trimmed_image is not None:
        upon = (
            "the image, with marks of the other class painted in where the model sees them, and"
            if explanation.trimmed_upon_repainted
            else "the image with"
        )
        facts.append(
            f"Enough of it: {upon} a part of its change to k = 1, chosen by the model's gradient so that it "
            "suffices with little change; a blend of the two that no decoder drew. Lines run round most of it."
        )
    if shown < len(explanation.k):
        facts.append(f"{shown} of the {len(explanation.k)} images that were drawn are shown.")
    return textwrap.wrap(" ".join(facts), LINE_LENGTH)


def _resized(truth: Truth | None, picture: NDArray[np.float32]) -> Truth | None:
    """The truth at the size at which the model takes the image."""
    if truth is None or tuple(truth.mask.shape) == picture.shape[:2]:
        return truth
    mask = F.interpolate(truth.mask[None, None].float(), size=picture.shape[:2], mode="nearest")[0, 0] > 0.5
    return truth._replace(mask=mask)


def _percent(share: float) -> str:
    return f"{share:.0%}"
