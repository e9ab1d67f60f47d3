"""What a table, its totals and a report say of the explanations of one method; `run.py` and `html.py` do the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Final

from finecf.explainers import Explanation, FGVCEExplanation, Maps, MirrorExplanation, SMDLExplanation


@dataclass(frozen=True)
class Method:
    """The part of a run's presentation that depends on the method.

    Attributes:
        columns: of the table, after the names of image and classes.
        grade: the column among them that holds how well an image was graded; left out where nothing was.
        secondary: columns that a narrow terminal leaves out, the first of them first; files have them all.
        row: the values of the columns, but for the grade.
        totals: what there is to say of all explanations (at least one).
        graded: the name of the total over the grades, and what they are a share of.
        guide: how to read a figure.
        light: the explanation without images that row and totals do not need.
    """

    columns: tuple[str, ...]
    grade: str
    secondary: tuple[str, ...]
    row: Callable[[Any], dict[str, str]]
    totals: Callable[[Sequence[Any]], dict[str, str]]
    graded: tuple[str, str]
    guide: str
    light: Callable[[Any], Any] = lambda result: result


def _fgvce_row(result: FGVCEExplanation) -> dict[str, str]:
    return {
        "flip": "yes" if result.flipped else "no",
        "edits": str(len(result.edits)),
        "ms": f"{1000 * result.seconds:.0f}",
    }


def _fgvce_totals(results: Sequence[FGVCEExplanation]) -> dict[str, str]:
    edits = [len(result.edits) for result in results]
    totals = {
        "flipped": f"{sum(result.flipped for result in results)} of {len(results)}",
        "edits": f"{fmean(edits):.2f} on average, at most {max(edits)}",
        "needed": f"{fmean(len(result.minimal_edits) for result in results):.2f} on average",
        "seconds": f"{sum(result.seconds for result in results):.2f} for all, the network's forwards apart",
    }
    cosines = [edit.similarity for result in results for edit in result.edits]
    if cosines:
        totals["cosine"] = f"{fmean(cosines):.2f} on average between a cell and its replacement"
    return totals


def _smdl_row(result: SMDLExplanation) -> dict[str, str]:
    enough = result.sufficient_prefix
    return {
        "regions": f"{result.best_prefix} of {result.region_count}",
        "area": f"{result.area():.0%}",
        "enough": "none" if enough is None else str(enough),
        "whole": f"{result.probabilities_before.target:.0%}",
        "alone": f"{result.probabilities_after.target:.0%}",
        "insertion": f"{result.insertion_area:.2f}",
        "deletion": f"{result.deletion_area:.2f}",
        "forwards": str(result.evaluations),
    }


def _smdl_totals(results: Sequence[SMDLExplanation]) -> dict[str, str]:
    enough = [result for result in results if result.sufficient_prefix is not None]
    named = f"{len(enough)} of {len(results)}"
    if enough:
        areas = [result.area(result.sufficient_prefix) for result in enough]
        counts = [result.sufficient_prefix or 0 for result in enough]
        named += f"; in these {fmean(counts):.1f} regions ({fmean(areas):.0%} of the image) on average"
    return {
        "enough alone": named,
        "alone": f"{fmean(result.probabilities_after.target for result in results):.0%} on average, "
        f"and {fmean(result.probabilities_before.target for result in results):.0%} for the whole image",
        "insertion": f"{fmean(result.insertion_area for result in results):.2f} on average",
        "deletion": f"{fmean(result.deletion_area for result in results):.2f} on average",
        "forwards": f"{sum(result.evaluations for result in results):,} for all",
        "seconds": f"{sum(result.seconds for result in results):.1f} for all",
    }


def _mirror_row(result: MirrorExplanation) -> dict[str, str]:
    return {
        "first k": "none" if result.first_k is None else f"{result.first_k:.2f}",
        "k*": "none" if result.latent_first_k is None else f"{result.latent_first_k:.2f}",
        "k = 1": "yes" if result.mirror_valid else "no",
        "at k = 0": "wanted" if result.taken_at_once else "another" if result.lost_at_once else "",
        "trained": "no" if _untrained(result) else "yes",
        "change": f"{float(result.maps['change'].mean()):.3f}",
        "gap": f"{result.confidence_gap:.2f}",
        "latent error": f"{float(result.latent_error.mean()):.2f}",
    }


def _mirror_totals(results: Sequence[MirrorExplanation]) -> dict[str, str]:
    first = [result.first_k for result in results if result.first_k is not None]
    reached = f"{len(first)} of {len(results)}"
    if first:
        reached += f"; in these at k = {fmean(first):.2f} on average"
    at_once = sum(result.taken_at_once for result in results)
    lost = sum(result.lost_at_once for result in results)
    untrained = sum(map(_untrained, results))
    change, from_image = (
        f"{fmean(float(result.maps[name].mean()) for result in results):.3f}" for name in ("change", "difference")
    )
    totals = {
        "first k": reached,
        "k = 1": f"{sum(result.mirror_valid for result in results)} of {len(results)}",
        # Where the image at k = 0 is the image itself, both are the same.
        "change": f"{change} on average"
        + ("" if change == from_image else f", and {from_image} against the image itself"),
        "gap": f"{fmean(result.confidence_gap for result in results):.3f} on average",
        "latent error": f"{fmean(float(result.latent_error.mean()) for result in results):.2f} on average",
        "seconds": f"{sum(result.seconds for result in results):.1f} for all",
    }
    shares = [result.trimmed_share for result in results if result.trimmed_share is not None]
    if shares:
        totals["enough of the change"] = f"{fmean(shares):.1%} on average, in {len(shares)} of {len(results)}"
    if at_once:
        totals["already at k = 0"] = f"{at_once} of {len(results)}"
    if lost:
        totals["another class at k = 0"] = f"{lost} of {len(results)}"
    if untrained:
        totals["untrained pairs"] = f"{untrained} of {len(results)}"
    return totals


def _untrained(result: MirrorExplanation) -> bool:
    return any("not trained on this pair" in note for note in result.notes)


def _mirror_light(result: MirrorExplanation) -> MirrorExplanation:
    means = {name: values.mean(dim=(0, 1), keepdim=True) for name, values in result.maps.items()}
    blank = result.prepared.new_zeros(len(result.prepared), 1, 1)
    return replace(
        result,
        image=blank,
        maps=Maps(means),
        images=blank[None].expand(len(result.k), -1, -1, -1),
        prepared=blank,
        reconstruction=blank,
        first_image=None if result.first_image is None else blank,
        mirror_image=blank,
        trimmed_image=None,
        trimmed_mask=None,
        repainted_image=None,
    )


METHODS: Final[dict[type[Explanation], Method]] = {
    FGVCEExplanation: Method(
        columns=("flip", "edits", "on parts", "ms"),
        grade="on parts",
        secondary=(),
        row=_fgvce_row,
        totals=_fgvce_totals,
        graded=("on differing parts", "of the edits"),
        guide="The network sees an image as a coarse grid of cells. The explanation changes some of them until the "
        "answer is the wanted class: the true one, or the one asked for. In the top row are the image with the cells "
        "that were replaced (numbered in their order), what made the network answer as it did, the parts of the object "
        "behind that answer, and how the probabilities of both classes move with every replacement. Below, each "
        "replaced cell stands beside the cell of a real image of the wanted class that took its place; the arrow "
        "points to where it went. In the last row are the places that counted for the first answer before the edits "
        "and for the wanted class after them, and their difference: what the repair brought, and what the mistake "
        "stood on. Each of these maps is stretched to its own full range, so brightness can be compared within a map "
        "and not between two.",
    ),
    SMDLExplanation: Method(
        columns=("regions", "area", "enough", "whole", "alone", "parts at", "insertion", "deletion", "forwards"),
        grade="parts at",
        secondary=("forwards", "deletion", "insertion", "area", "whole"),
        row=_smdl_row,
        totals=_smdl_totals,
        graded=("parts at", "of the image on average; 50% is chance"),
        guide="The image is divided into regions, and these are put into an order: first the one that, shown alone, "
        "says most for the class explained, then whichever adds most to those before it. Left is the image, in the "
        "middle the regions with their place in that order (earlier ones are brighter, and the first five have yellow "
        "numbers), and right what the network saw when it first named the class: as few of the first regions as are "
        "enough. Where no number of them is enough, the regions of the best score are shown instead, and the title "
        "says so. Below are two charts. In the left one the probability of the class rises as only the first regions "
        "are shown, and falls as they are hidden from the whole image; an order is good where the first happens early "
        "and the second too. In the right one is the score that the search made as large as it could with every "
        "region, with its four terms; a star marks its best. The small print says how the search was made and what "
        "can be relied on.",
    ),
    MirrorExplanation: Method(
        columns=("first k", "k*", "k = 1", "change", "parts at", "gap", "latent error", "at k = 0", "trained"),
        grade="parts at",
        secondary=("trained", "at k = 0", "latent error", "k*", "gap"),
        row=_mirror_row,
        totals=_mirror_totals,
        graded=("parts at", "of the image on average; 50% is chance"),
        guide="The network reads an image as a list of features, and two classes have a boundary between them in the "
        "space of these features. The explanation moves the features straight through that boundary to their "
        "mirror image on the other side, where the two classes have changed places, and draws the image that "
        "belongs to each step. The strip at the top shows the way: k = 0 is the image itself as it is redrawn, k "
        "= 0.5 the boundary, k = 1 the mirror image. Semifactual images (red frames) have changed and should "
        "still be what the network said, counterfactual ones (green frames) should be what was asked for; the "
        "first that the network really takes for it has a star. Below are the image, that first image, and where "
        "the two differ; where it was looked for there is also the image with a part of its change that is enough, "
        "and where the right answer is known the true picture of the other class. The "
        "chart shows how sure the network is of both classes: of the drawn images (solid) and of the features "
        "that they were drawn from (dashed). Where these lie apart, the images do not say what the features do. "
        "The animation under each figure goes the whole way there and back.",
        light=_mirror_light,
    ),
}
"""By the kind of their explanations."""
