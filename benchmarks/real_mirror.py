"""Mirror-CFE on photographs of look-alike birds, for a classifier that nobody here trained.

    python benchmarks/real_mirror.py --decoder FILE [--images N] [--mistakes N] [--steps N] [--markdown FILE]

The folder of photographs, model and weights is found at FINECF_REALDATA, else at ../shared/realdata. A decoder is
trained on the training photographs, for all pairs of one group, where FILE is not there yet. Led to another class are
test photographs that the classifier recognises, to the class of their group whose boundary is nearest, and mistakes
within a group, of both splits (none was trained on: a decoder learns on what is recognised), to their true class. The
columns are those of benchmarks/mirror.py; --validation takes photographs that the 40 of each kind leave over, for
choosing settings.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from mirror import beside, left_over, logits_of, mirrored, placed, publish, scores_of, spread
from real_birds import load_model, real_data
from torch import Tensor

import finecf
from finecf.data import ImageFolderDataset
from finecf.explainers import ClassDistances
from finecf.explainers.mirror_cfe import CORRECTIONS
from finecf.metrics import pgd
from finecf.metrics.tables import Table
from finecf.training import train_decoder

BATCH = 32
GRADED = 40
"""Photographs of a kind in the tables of docs/results.md."""


def look_alikes(root: Path, names: list[str]) -> Tensor:
    """Whether two classes are of one group, bool [C,C]; a class is none with itself."""
    classes = json.loads((root / "birds" / "classes.json").read_text(encoding="utf-8"))
    group = {each["folder"]: each["group"] for each in classes}
    alike = torch.tensor([[group[p] == group[q] for q in names] for p in names])
    return alike.fill_diagonal_(False)


def some(numbers: Tensor, count: int, validation: bool) -> Tensor:
    """So many of them, evenly; for validation of those that are not graded."""
    return spread(left_over(numbers, GRADED) if validation else numbers, count)


def distances(mirror: finecf.MirrorCFE, images: Tensor) -> ClassDistances:
    """How far each image is from every class, a few images at a time."""
    parts = [mirror.class_distances(part) for part in images.split(BATCH)]
    return ClassDistances(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(ClassDistances)))


def ranked(mirror: finecf.MirrorCFE, wrong: Tensor, truth: Tensor, logits: Tensor) -> Table:
    """How near the true class of mistakes lies, among all others, by the way to its boundary and by its logit."""
    table = Table("photographs: where the true class of the mistakes stands", [])
    said = logits.clone()
    said.scatter_(1, logits.argmax(1, keepdim=True), -torch.inf)
    orders = {
        "way to its boundary": distances(mirror, wrong).nearest(logits.shape[1] - 1),
        "logit": said.argsort(1, descending=True),
    }
    for name, order in orders.items():
        place = (order == truth[:, None]).int().argmax(1)
        table.rows[name] = {f"first {n}": float((place < n).double().mean()) for n in (1, 2, 3, 5)}
    table.columns = list(table.rows["logit"])
    return table


def graded(mirror: finecf.MirrorCFE, what: str, x: Tensor, target: Tensor) -> list[Table]:
    """Mirror-CFE's images beside PGD's, and the differences on the same images."""
    classifier = mirror.classifier
    started = time.perf_counter()
    found = mirror.explain(x, target, trim=True)
    seconds = (time.perf_counter() - started) / len(x)
    path = mirror.latent_path(x, target, steps=2)
    first, end = mirrored(found, path)
    cut = torch.tensor([each.trimmed_image is not None for each in found])
    less = [each.mirror_image if each.trimmed_image is None else each.trimmed_image for each in found]
    rows = {"Mirror-CFE, first": first, "Mirror-CFE, k = 1": end}
    attacks = {
        "PGD, first": pgd(classifier, x, target),
        "PGD l2, first": pgd(classifier, x, target, norm="l2"),
        "PGD blur, first": pgd(classifier, x, target, blur=1.0),
    }
    others = {"Mirror-CFE, trimmed": (torch.stack(less), cut)}
    others |= {name: (attack.images, attack.found) for name, attack in attacks.items()}
    for name, (images, done) in others.items():
        rows[name] = placed(classifier, path, images, done)
    scores = scores_of(classifier, x, target, rows)
    table = Table(f"photographs: {what}", [])
    for name, own in scores.items():
        means = own.means()
        table.rows[name] = {
            "found": float(rows[name].found.double().mean()),
            "valid": means["valid"],
            "denoised valid": means["denoised_valid"],
            "L1": means["l1"],
            "latent error": means["latent_error"],
        }
    table.columns = list(table.rows["PGD, first"])
    table.notes.append(f"{seconds:.0f} s an image for strip, first counterfactual, mirror image and trimming.")
    title = f"photographs: Mirror-CFE's first counterfactual minus another's; {what}"
    return [table, beside(title, "Mirror-CFE, first", list(attacks), rows, scores)]


class Photographs(NamedTuple):
    """The photographs [N,3,224,224] of each split, what they show, and the classifier."""

    classifier: finecf.Classifier
    pairs: list[tuple[int, int]]
    alike: Tensor
    read: dict[str, Tensor]
    truth: dict[str, Tensor]
    logits: dict[str, Tensor]

    @classmethod
    def load(cls) -> Photographs:
        """From the folder of photographs."""
        root = real_data()
        photographs = {
            split: ImageFolderDataset(root / "birds" / "images", root / "birds" / "split.txt", split, size=224)
            for split in ("train", "test")
        }
        names = photographs["train"].class_names
        classifier = finecf.wrap(load_model(root / "mobilenet_v2.py"), class_names=names)
        alike = look_alikes(root, names)
        pairs = [(int(p), int(q)) for p, q in alike.nonzero() if p < q]
        read = {split: photos.images() for split, photos in photographs.items()}
        truth = {split: torch.tensor(photos.labels) for split, photos in photographs.items()}
        return cls(classifier, pairs, alike, read, truth, {s: logits_of(classifier, each) for s, each in read.items()})

    def wrong(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mistakes of both splits, what they show, and their logits."""
        mistaken = {split: self.logits[split].argmax(1) != self.truth[split] for split in self.read}
        return tuple(torch.cat([own[s][mistaken[s]] for s in own]) for own in (self.read, self.truth, self.logits))

    def led(self, images: int, mistakes: int, validation: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """Photographs and the classes that they are led to, by what they are: so many of each kind."""
        led = {}
        if images:
            known = some((self.logits["test"].argmax(1) == self.truth["test"]).nonzero()[:, 0], images, validation)
            x = self.read["test"][known]
            way = distances(finecf.MirrorCFE(self.classifier), x).distance
            away = way.masked_fill(~self.alike[self.truth["test"][known]], torch.inf)
            assert bool(away.isfinite().any(1).all()), "an image is led to none of its look-alikes"
            led[f"{len(x)} held-out images, led to the nearest look-alike"] = x, away.argmin(1)
        if mistakes:
            wrong, labels, said = self.wrong()
            within = some(self.alike[said.argmax(1), labels].nonzero()[:, 0], mistakes, validation)
            led[f"{len(within)} mistakes, led to their true class"] = wrong[within], labels[within]
        return led


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", type=Path, required=True, help="where it is, or is to be")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--mistakes", type=int, default=40)
    parser.add_argument("--steps", type=int, help="of the training; default: the recipe's")
    parser.add_argument("--corrections", type=int, default=CORRECTIONS)
    parser.add_argument("--correction-blur", type=float, default=0.0)
    parser.add_argument("--soften", type=float, help="in pixels; default: as the decoder's file says")
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--previews", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    photographs = Photographs.load()
    classifier = photographs.classifier
    notes: list[str] = []
    if not options.decoder.is_file():
        started = time.perf_counter()
        train_decoder(
            classifier,
            (photographs.read["train"], photographs.truth["train"]),
            photographs.pairs,
            options.decoder,
            steps=options.steps,
            precision="bfloat16",
            progress=True,
            previews=options.previews,
            preview_images=(photographs.read["test"][::60], photographs.truth["test"][::60]),
            preview_every=250,
        )
        notes.append(f"Trained in {(time.perf_counter() - started) / 60:.0f} minutes.")
    mirror = finecf.MirrorCFE(
        classifier,
        options.decoder,
        corrections=options.corrections,
        correction_blur=options.correction_blur,
        soften=options.soften,
        progress=True,
    )
    tables = [ranked(mirror, *photographs.wrong())]
    led = photographs.led(options.images, options.mistakes, options.validation)
    for what, (images, target) in led.items():
        tables += graded(mirror, what, images, target)
    tables[0].notes += notes
    publish(tables, options.markdown)


if __name__ == "__main__":
    main()
