"""What `finecf demo` runs: the small shipped nets, explained by all three methods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import rich
import torch
from rich.markup import escape
from torch import Tensor
from torch.utils.data import DataLoader

from finecf.cli._runs import MIRROR_STEPS, about_mirror, explain_all
from finecf.data import Digits, SyntheticBirds, digits
from finecf.explainers import FGVCE, SMDL, FGVCEExplanation, MirrorCFE
from finecf.metrics import area_before, dilate_masks, share_on_mask, visible_parts
from finecf.metrics.evaluate import Mistake, find_mistakes
from finecf.models import CandidateBank, Classifier, wrap
from finecf.report import Run, Truth
from finecf.report.run import ASKED
from finecf.training import load_birds_net, load_digits_net, shipped_decoder, shipped_painter
from finecf.training.mirror import DIGIT_PAIRS

REFERENCES = 800
"""Birds that the bank is made of."""
CHOICE = 3
"""So many times as many mistakes are looked for as are shown, so that these are of various classes."""
EDITS = 10
RANKED = 4
"""So many of the demo's mistakes are also explained by SMDL, which takes a second or two for each."""
BIRDS_MIRRORED = 2
SURE = 0.9
"""The demo mirrors birds of whose class the network is at least so sure."""
BIRDS_LOOKED_AT = 40
"""So many test birds are looked through for those that the demo mirrors."""


def bird_runs(n: int) -> list[Run]:
    """`n` mistakes on drawn birds, whose differing parts are known."""
    net, _ = load_birds_net()
    # Labels of the training split are flipped here and there, on purpose; those of the validation split are not.
    references = SyntheticBirds("val", n=REFERENCES)
    test = SyntheticBirds("test")
    classifier = wrap(net, class_names=test.class_names)
    weights = sum(parameter.numel() for parameter in net.parameters())
    rich.print(f"A network of {weights:,} weights tells {len(test.classes)} kinds of drawn birds apart.")
    rich.print(f"Bank: the cells of {len(references)} reference images, those that the network gets right.")
    bank = CandidateBank.from_loader(
        classifier, DataLoader(references.tensors(), batch_size=64), keep_images=True, progress=None
    )
    rich.print(f"Looking for {n} test images that it really gets wrong ...")
    found, looked_at = find_mistakes(classifier, test, CHOICE * n)
    mistakes = _varied([mistake for mistake in found if mistake.visible])[:n]
    run = Run(
        "Why did the network take one bird for another?",
        "A small network, trained on drawn birds, makes real mistakes on test images that it never saw. Each figure "
        "shows which cells of its last feature map FG-VCE replaced by cells of other images of the true class until "
        "the network gave the right answer. The generator knows which parts tell the two classes apart; the column "
        "'on parts' says how many of the replacements fall on them.",
        FGVCE(classifier, bank, max_edits=EDITS, minimal=True),
    )
    ranking = Run(
        "Which regions speak for the true class?",
        "Some of these mistakes, seen by another method. SMDL divides the image "
        "into regions and puts them into the order in which they speak for the true class; regions that are left out "
        "are blurred. The column 'parts at' says how much of the image stands before the parts that really tell the "
        "two classes apart.",
        SMDL(classifier, search="window", baseline="blur"),
    )
    for mistake in mistakes:
        item = mistake.item
        (result,) = run.explain(item.tensor[None], [mistake.target], [item.source])
        differing = torch.from_numpy(item.mask(mistake.visible))
        run.truths.append(Truth(differing, " and ".join(mistake.visible)))
        assert isinstance(result, FGVCEExplanation)
        grown = dilate_masks(differing, result.grid)
        run.grades.append(share_on_mask([edit.cell for edit in result.edits], grown, result.grid))
    ranking.truths = run.truths[:RANKED]
    tensors = ((m.item.tensor[None], [m.target], [m.item.source]) for m in mistakes[:RANKED])
    explain_all(ranking, tensors, len(ranking.truths), "ranking regions")
    for result, truth in zip(ranking.results, ranking.truths, strict=False):  # after Ctrl-C there are fewer results
        ranking.grades += area_before(result.maps["saliency"][None], truth.mask[None]).tolist()
    run.totals["test images looked at"] = str(looked_at)
    return [run, ranking, *_mirrored("birds", classifier, lambda mirror: look_alikes(mirror, test, n))]


def _varied(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """The mistakes, the first of every pair of classes before the second of any."""
    seen: Counter[tuple[int, int]] = Counter()
    ranked = []
    for mistake in mistakes:
        pair = (mistake.predicted, mistake.target)
        ranked.append((seen[pair], mistake))
        seen[pair] += 1
    return [mistake for _, mistake in sorted(ranked, key=lambda entry: entry[0])]


def digit_runs(n: int) -> list[Run]:
    """`n` mistakes on handwritten digits."""
    net, _ = load_digits_net()
    references, test = digits("train"), digits("test")
    classifier = wrap(net, class_names=test.class_names)
    rich.print(f"Bank: the cells of {len(references)} handwritten digits, those that the network gets right.")
    bank = CandidateBank.from_loader(
        classifier, DataLoader(references, batch_size=128), keep_images=True, progress=None
    )
    wrong = (classifier.logits(test.batch()).argmax(1) != torch.from_numpy(test.labels)).nonzero()[:, 0].tolist()
    rich.print(f"The network gets {len(wrong)} of {len(test)} test digits wrong; {min(n, len(wrong))} are explained.")
    run = Run(
        "Why did the network take one digit for another?",
        "A small network, trained on handwritten digits, makes a few real mistakes on test digits. Each figure shows "
        "which cells of its last feature map FG-VCE replaced by cells of other digits of the true class until the "
        "network gave the right answer.",
        FGVCE(classifier, bank, max_edits=EDITS, minimal=True),
    )
    ranking = Run(
        "Which regions speak for the true digit?",
        "Some of these mistakes, seen by another method. SMDL divides the image into regions and puts them into the "
        "order in which they speak for the true class; regions that are left out are black, like the ground.",
        SMDL(classifier, "grid", region_count=16),
    )
    for i in wrong[:n]:
        image, label, source = test[i]
        run.explain(image[None], [label], [source])
    some = [test[i] for i in wrong[: min(n, RANKED)]]
    explain_all(ranking, ((x[None], [label], [source]) for x, label, source in some), len(some), "ranking regions")
    run.totals["test images looked at"] = str(len(test))
    return [run, ranking, *_mirrored("digits", classifier, lambda _: _digit_pairs(classifier, test, n))]


class _ToMirror(NamedTuple):
    """A correctly classified image that the demo leads to another class."""

    image: Tensor
    target: int
    source: str
    truth: Truth | None = None


def _mirrored(name: str, classifier: Classifier, choose: Callable[[MirrorCFE], Sequence[_ToMirror]]) -> list[Run]:
    """Mirror-CFE on a few images, where its decoder ships with finecf; else a line that says that it does not."""
    try:
        path = shipped_decoder(name)
    except FileNotFoundError as missing:
        rich.print(f"Mirror-CFE is left out: {escape(str(missing))}.")
        return []
    explainer = MirrorCFE(classifier, path, repainter=_painter(name))
    chosen = choose(explainer)
    run = Run(
        "How must an image change to be taken for something else?",
        f"Some {name} that the network gets right. {about_mirror()}",
        explainer,
        names=ASKED,
        options={"steps": MIRROR_STEPS, "trim": True},
    )
    run.truths = [each.truth for each in chosen if each.truth is not None]
    explain_all(run, ((x[None], [to], [source]) for x, to, source, _ in chosen), len(chosen), "mirroring")
    if run.truths:
        for result, truth in zip(run.results, run.truths, strict=False):  # after Ctrl-C there are fewer results
            run.grades += area_before(result.maps["change"][None], truth.mask[None]).tolist()
    return [run]


def _painter(name: str) -> Path | None:
    """The file of what the trimmed images start from, where one ships."""
    try:
        return shipped_painter(name)
    except FileNotFoundError:
        return None


def _digit_pairs(classifier: Classifier, test: Digits, n: int) -> list[_ToMirror]:
    """For each pair the first test digit that the network gets right."""
    predicted, labels = classifier.logits(test.batch()).argmax(1), torch.from_numpy(test.labels)
    chosen = []
    for label, other in DIGIT_PAIRS[:n]:
        for index in ((predicted == label) & (labels == label)).nonzero()[:1, 0].tolist():
            image, _, source = test[index]
            chosen.append(_ToMirror(image, other, source))
    return chosen


def look_alikes(mirror: MirrorCFE, test: SyntheticBirds, n: int) -> list[_ToMirror]:
    """Birds of different families that the network gets right, each to be led to the nearest class of its family."""
    items = [test[index] for index in range(min(BIRDS_LOOKED_AT, len(test)))]
    images = torch.stack([item.tensor for item in items])
    distances = mirror.class_distances(images)
    sure = (mirror.classifier.logits(mirror.classifier.prepare(images)).softmax(1).amax(1) >= SURE).tolist()
    families: set[int] = set()
    chosen: list[_ToMirror] = []
    for item, source, distance, certain in zip(items, distances.source.tolist(), distances.distance, sure, strict=True):
        family = test.family_of(item.label)
        enough = len(chosen) == min(n, BIRDS_MIRRORED)
        if source != item.label or not certain or family in families or enough:
            continue
        others = [label for label in test.families[family] if label != item.label]
        target = min(others, key=lambda label: float(distance[label]))
        redrawn = test.redraw(item, target)
        shown = visible_parts(item.part_masks, test.differing_parts(item.label, target))
        if not shown:
            continue
        families.add(family)
        differing = torch.from_numpy(item.mask(shown) | redrawn.mask(shown))
        truth = Truth(differing, " and ".join(shown), redrawn.tensor)
        chosen.append(_ToMirror(item.tensor, target, item.source, truth))
    return chosen
