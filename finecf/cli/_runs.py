"""Runs of an explainer under a progress bar, and what their reports say of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from finecf.report import Run

MIRROR_STEPS = 21
"""Images of a strip, from k = 0 to 1."""
INTERRUPTED = "interrupted"
"""The total that says so; such a run is written like any other, and ends with code 130."""


def explain_all(
    run: Run,
    batches: Iterable[tuple[Tensor, Sequence[int | str] | None, Sequence[str]]],
    count: int,
    doing: str = "explaining",
) -> None:
    """Explain batch by batch under a progress bar; after Ctrl-C the run holds, and says, what was finished."""
    with progress_bar() as bar:
        task = bar.add_task(doing, total=count)
        try:
            for batch, targets, sources in batches:
                run.explain(batch, targets, sources)
                bar.advance(task, len(sources))
        except KeyboardInterrupt:
            if not run.results:
                raise
            run.totals[INTERRUPTED] = f"{len(run.results)} of {count} images explained"


def progress_bar() -> Progress:
    """A bar that is seen to be alive also while one image takes minutes, and that leaves nothing behind."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(SpinnerColumn(), TextColumn("{task.description}"), *columns, transient=True)


def title(method: str, preset: str, data: Path, image: Path | None, target: str | None) -> str:
    """What a report asks."""
    if method == "fgvce":
        return f"{preset} on {data}" if target is None else f"What would make it {target}?"
    if method == "mirror":
        asked = "its true class" if target is None or image is None else target
        return f"What would it have to look like to be {asked}?" + (f" mirror on {data}" if image is None else "")
    if image is not None:
        return "Which regions make the model say so?" if target is None else f"What speaks for {target}?"
    return f"Which regions speak for the true class? smdl on {data}"


def about_smdl(baseline: str, asked: str | None, mistakes: bool) -> str:
    """What SMDL's report says first."""
    what = "the true class" if mistakes else "the class that the network named" if asked is None else asked
    hidden = {"black": "black", "mean": "the image's mean colour", "blur": "blurred"}[baseline]
    return (
        "SMDL divides an image into regions and puts them into an order: first the one that, shown alone, speaks most "
        f"for {what}, then whichever adds most to those before it. Regions that are left out are {hidden}. Each figure "
        "shows the order, the few first regions that are enough for the network to name the class, and how the "
        "network's probability moves as regions are shown and hidden."
    )


def about_mirror() -> str:
    """What Mirror-CFE's report says first."""
    return (
        "Mirror-CFE mirrors the network's own features of an image at the boundary between two classes, step by step "
        "(k from 0 to 1), and a decoder draws the image that belongs to each step. Each figure shows the way from the "
        "class that the network named to the other one: which images should still be the first, which the second, "
        "which of them the network really takes for the second, and what changed until then."
    )


def about_fgvce(preset: str, asked: str | None) -> str:
    """What FG-VCE's report says first."""
    whose, answer = ("the true class", "gave the right answer") if asked is None else (asked, f"said {asked}")
    return (
        f"Each figure shows which cells of the network's last feature map FG-VCE (preset {preset!r}) replaced by cells "
        f"of real images of {whose} until the network {answer}."
    )
