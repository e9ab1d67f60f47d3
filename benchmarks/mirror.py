"""Mirror-CFE's images in numbers, beside targeted PGD and a plain latent interpolation decoded by the same network.

    python benchmarks/mirror.py --on digits [--decoder FILE] [--images N] [--markdown FILE]
    python benchmarks/mirror.py --on fashion --data FOLDER --classifier FILE --decoder FILE
    python benchmarks/mirror.py --ablation FOLDER
    python benchmarks/mirror.py --on birds --ablation FOLDER [--without PART ...] [--steps N]

Held-out images that the classifier recognises, with the other class of their pair as target (birds: the next one of
the family). Each method is scored at its first image that is called the target, and at its end: k = 1, or PGD driven on
until source and target have swapped their logits' distance. "denoised": after a Gaussian blur of sigma 1, kernel 7.
Latent error: mean over channels of |z - Fe(x)|, z being the latent that the image was drawn from; for PGD, real and
trimmed images, which have none, the one of Mirror-CFE's path at which source and target are as far apart as in the
image. "PGD l2" keeps to a ball of the Euclidean norm, "PGD" to one of the largest change of a pixel; "PGD blur" is done
only when the blurred image is the target as well. "nearest real image": of those among which the interpolation looks
for its end, the one of the target class that is nearest in pixels; its FID compares real images with a set that holds
them. The interpolation is not corrected; --corrections 0 draws Mirror-CFE's images once.

"trimmed": a part of the change to Mirror-CFE's image of k = 1, or to another method's, that suffices
(`finecf.explainers.trim`), also where it is blurred; "by map cells", "by pixels": with a mask so coarse or so fine,
"evenly": with a mask of one cell. "on PGD's terms": by pixels, and no blur need be stood, as plain PGD need stand none;
a tenth of the lead is kept still. What all these stand that they were not made for (a blur of 1.5 pixels, a shift by
one round the edge, noise of 0.1) is in a table of its own, as shares of those found.

--ablation trains what is not in the folder yet: the recipe as it is, and without each of its parts, and says what each
part is worth, image by image; without --on digits without the losses and birds without the spatial prior, each image
drawn once. Its column "triangulation" is that loss, of the strips of held-out images. --validation
takes images that no other run grades, for choosing settings: birds of the validation split, garments that the 600 leave
over.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import rich
import torch
from torch import Tensor

import finecf
from finecf.data import SyntheticBirds
from finecf.data.birds import BirdItem
from finecf.explainers import LatentPath, MirrorExplanation, trim
from finecf.explainers._mirror_losses import distance_ratio, triangulation
from finecf.explainers.mirror_cfe import CORRECTIONS, REFLECTIONS
from finecf.metrics import (
    CounterfactualScores,
    bootstrap_mean,
    counterfactual_scores,
    cout,
    feature_distances,
    latent_interpolation,
    nearest_unlike_neighbour,
    paired_bootstrap,
    pgd,
    redraw_distances,
)
from finecf.metrics.bootstrap import Interval
from finecf.metrics.redraw import RedrawScores
from finecf.metrics.tables import Table
from finecf.models import Classifier
from finecf.regions.baseline import gaussian_blur
from finecf.training import mirror_classifier, mirror_data, mirror_recipe, shipped_decoder, train_mirror

REFERENCES = 2_000
"""Training images at most, among which the interpolation looks for the nearest of the target class."""
PARTS: dict[str, dict[str, Any]] = {
    "triangulation": {"weights": {"triangulation": 0.0}},
    "feature": {"weights": {"feature": 0.0}},
    "spatial-prior": {"spatial_prior": False},
}
"""What an ablation can leave out, as `train_mirror` is told it."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "digits": {"without": ["triangulation", "feature"], "corrections": 0},
    "birds": {"without": ["spatial-prior"], "corrections": 0, "soften": 0.0, "images": 120},
}
"""The ablations of docs/results.md, as options."""
PARTIAL = (
    "Mirror-CFE, k = 1",
    "Mirror-CFE, evenly",
    "PGD, first",
    "PGD l2, first",
    "PGD blur, first",
    "nearest real image",
)
"""What trimmed images are held against."""
TRIMMED = ("Mirror-CFE, trimmed", "PGD blur, trimmed", "nearest real image, trimmed")
FINER = ("Mirror-CFE, by map cells", "Mirror-CFE, by pixels", "PGD blur, by pixels")
TERMS = ("Mirror-CFE, on PGD's terms", "PGD, on its own terms", "PGD l2, on its own terms")
"""Trimmed by pixels, and no blur need be stood."""
ATTACKS = ("PGD, first", "PGD l2, first", "interpolation, first", "map interpolation, first")
"""What Mirror-CFE is held against on PGD's terms."""
DIFFERENCES = {"L1": "l1", "denoised L1": "denoised_l1", "latent error": "latent_error"}
"""What is compared image by image, and the scores' names of it."""
GRADED = 600
"""Garments in the table of docs/results.md."""
BLURS = (0.7, 1.0, 1.5)
"""Standard deviations, in pixels, under which images are looked at; 1 is that of "denoised"."""


Scores = dict[str, CounterfactualScores]


def logits_of(classifier: Classifier, images: Tensor) -> Tensor:
    """Logits [B,C], a few images at a time."""
    return torch.cat([classifier.logits(part) for part in images.split(64)])


@dataclass
class Images:
    """What one method gives: images [B,Ch,H,W], whether each was found, and the latents they stand for."""

    images: Tensor
    found: Tensor
    latents: Tensor


def split_of(on: str, options: argparse.Namespace) -> str:
    """The split of which images are taken."""
    return "val" if options.validation and on == "birds" else "test"


def spread(numbers: Tensor, count: int) -> Tensor:
    """So many of them, evenly; all where there are fewer."""
    return numbers if len(numbers) <= count else numbers[torch.arange(count) * len(numbers) // count]


def left_over(numbers: Tensor, graded: int) -> Tensor:
    """Those that are not among so many, evenly spread, that are graded."""
    return numbers[~torch.isin(numbers, spread(numbers, graded))]


def chosen_images(
    on: str, classifier: Classifier, pairs: tuple[tuple[int, int], ...], options: argparse.Namespace
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers in the split, images and targets: those that the classifier recognises."""
    count = options.images
    pictures, labels = mirror_data(
        on, split_of(on, options), classifier, options.data, count if on == "birds" else None
    )
    partner: dict[int, int] = {}
    for p, q in sorted(pairs):  # the next one of the family; the last one's is the first
        partner.setdefault(p, q)
    for p, q in sorted(pairs):
        partner.setdefault(q, p)
    predicted = logits_of(classifier, pictures).argmax(1)
    known = torch.tensor([int(label) in partner for label in labels])
    numbers = ((predicted == labels) & known).nonzero()[:, 0]
    if options.validation and on == "fashion":
        numbers = left_over(numbers, GRADED)
    numbers = spread(numbers, count)
    return numbers, pictures[numbers], torch.tensor([partner[int(label)] for label in labels[numbers]])


def row_of(
    classifier: Classifier, x: Tensor, target: Tensor, own: Images, each: CounterfactualScores, real: Tensor
) -> dict[str, Any]:
    """All scores of one method; `each`: those that are image by image."""
    scores = each.means()
    blurred = gaussian_blur(own.images, 1.0)
    features = torch.cat([classifier.features(part).mean((2, 3)) for part in blurred.split(64)])
    denoised = (features - own.latents.to(features)).abs().mean(1)[own.found]
    kept = own.found.nonzero()[:, 0]
    curves = cout(classifier, x[kept], own.images[kept], target[kept])
    distances = feature_distances(classifier, x, own.images, real, found=own.found).means()
    return {
        "found": float(own.found.double().mean()),
        "valid": scores["valid"],
        "denoised valid": scores["denoised_valid"],
        "L1": scores["l1"],
        "denoised L1": scores["denoised_l1"],
        "latent error": scores["latent_error"],
        "denoised latent error": float(denoised.mean()),
        "COUT": float(curves.score.mean()),
        **distances,
    }


def mirrored(found: list[MirrorExplanation], path: LatentPath) -> list[Images]:
    """Mirror-CFE's first counterfactuals and mirror images, of a path from k = 0 to 1."""
    k = torch.tensor([1.0 if each.first_k is None else each.first_k for each in found], dtype=torch.float64)
    start, end = path.latents[:, 0].double(), path.latents[:, -1].double()
    first = Images(
        torch.stack([each.counterfactual for each in found]),
        torch.tensor([each.first_k is not None for each in found]),
        start + k[:, None] * (end - start),
    )
    mirror = Images(torch.stack([each.mirror_image for each in found]), torch.ones(len(found), dtype=torch.bool), end)
    return [first, mirror]


def along(path: LatentPath, logits: Tensor) -> Tensor:
    """The latents [B,D] of a path from k = 0 to 1 where source and target are as far apart as in logits [B,C]."""
    pair = torch.stack([path.source, path.target], 1)
    ends = path.logits[:, [0, -1]].gather(2, pair[:, None].expand(-1, 2, -1)).diff(dim=2)[..., 0]
    lead = logits.to(ends).gather(1, pair).diff(dim=1)[:, 0]
    k = ((lead - ends[:, 0]) / (ends[:, 1] - ends[:, 0])).clamp(0, 1)
    start, end = path.latents[:, 0].double(), path.latents[:, -1].double()
    return start + k[:, None] * (end - start)


def placed(classifier: Classifier, path: LatentPath, images: Tensor, found: Tensor) -> Images:
    """Images of no latent, with that of their place on the path."""
    return Images(images, found, along(path, logits_of(classifier, images)))


def scores_of(classifier: Classifier, x: Tensor, target: Tensor, rows: dict[str, Images]) -> Scores:
    """Every method's scores, image by image."""
    return {
        name: counterfactual_scores(classifier, x, own.images, target, found=own.found, latents=own.latents.to(x.dtype))
        for name, own in rows.items()
    }


def standing(classifier: Classifier, own: Images, wanted: Tensor) -> dict[str, float]:
    """Of those found, the share that is called what it should be after small changes."""
    noise = torch.randn(own.images.shape, generator=torch.Generator().manual_seed(0))  # the same for every method
    shown = {
        "blur 1": gaussian_blur(own.images, 1.0),
        "blur 1.5": gaussian_blur(own.images, 1.5),
        "shift 1": own.images.roll(1, 3),
        "noise 0.1": own.images + 0.1 * noise,
    }
    shares = {}
    for name, images in shown.items():
        said = logits_of(classifier, images).argmax(1)
        shares[name] = float((said == wanted)[own.found].double().mean())
    return shares


def beside(title: str, own: str, others: list[str], rows: dict[str, Images], scores: Scores) -> Table:
    """One method's images against others', on those for which there are both."""
    table = Table(title, [])
    for name in others:
        both = rows[own].found & rows[name].found
        table.rows[name] = {"images": int(both.sum())}
        for column, score in DIFFERENCES.items():
            if both.any():
                table.rows[name][column] = paired_bootstrap(
                    getattr(scores[own], score)[both], getattr(scores[name], score)[both]
                )
    table.columns = ["images", *DIFFERENCES]
    return table


def kept(classifier: Classifier, images: Tensor, wanted: Tensor, sigma: float) -> float:
    """The share of images that are called what they should be, blurred."""
    said = logits_of(classifier, gaussian_blur(images, sigma)).argmax(1)
    return float((said == wanted).double().mean())


def doubles(values: Iterable[float]) -> Tensor:
    """float64 [n]."""
    return torch.tensor(list(values), dtype=torch.float64)


def strayed(
    mirror: finecf.MirrorCFE,
    found: list[MirrorExplanation],
    x: Tensor,
    target: Tensor,
    references: Tensor,
    encoded: Tensor,
    members: dict[int, Tensor],
) -> Tensor:
    """The triangulation loss [B] of the strips behind k = 0, against references (with their latents, and their numbers
    for every class) drawn as in training: one of the target from k = 1/2 on, before it one of the source.
    """
    k = found[0].k
    path = mirror.latent_path(x, target, steps=k)
    source = path.logits[:, 0].argmax(1)
    draws = torch.Generator().manual_seed(0)
    values = []
    for row, each in enumerate(found):
        ends = []
        for label in (source[row], target[row]):
            own = members[int(label)]
            ends.append(int(own[int(torch.randint(len(own), (), generator=draws))]))
        drawn = [number for number, place in enumerate(k) if place > 0]
        numbers = torch.tensor([ends[int(k[number] >= 0.5)] for number in drawn])
        images, latents = each.images[drawn], path.latents[row, drawn]
        beta = distance_ratio(latents, encoded[numbers].to(latents), path.latents[row, :1].expand_as(latents))
        away = (images - references[numbers]).abs().mean((1, 2, 3)), (images - x[row]).abs().mean((1, 2, 3))
        values.append(float(triangulation(beta.to(images), *away)))
    return doubles(values)


def score(on: str, mirror: finecf.MirrorCFE, options: argparse.Namespace) -> tuple[list[Table], dict[str, Tensor]]:
    """The tables of one decoder, and what an ablation shows of it, image by image (NaN: there is none)."""
    classifier = mirror.classifier
    recipe = mirror_recipe(on)
    numbers, x, target = chosen_images(on, classifier, recipe.pairs, options)
    references, labels = mirror_data(on, "train", classifier, options.data, REFERENCES)
    started = time.perf_counter()
    found = mirror.explain(x, target)
    seconds = (time.perf_counter() - started) / len(x)
    path = mirror.latent_path(x, target, steps=2)
    start = path.latents[:, 0].double()
    first, end = mirrored(found, path)
    logits = logits_of(classifier, x)
    gaps = logits.max(1).values - logits.gather(1, target[:, None])[:, 0]
    quick = pgd(classifier, x, target)
    far = pgd(classifier, x, target, margin=float(gaps.median()))
    lines = {
        name: latent_interpolation(mirror, x, target, references, 2, labels=labels, space=space)
        for name, space in (("interpolation", "latent"), ("map interpolation", "map"))
    }
    read = [classifier.features_and_logits(part) for part in references.split(64)]
    encoded = torch.cat([maps.mean((2, 3)) for maps, _ in read])
    recognised = torch.cat([said.argmax(1) for _, said in read]) == labels
    toward = encoded[lines["interpolation"].reference].double()
    euclidean = pgd(classifier, x, target, norm="l2")
    robust = pgd(classifier, x, target, blur=1.0)
    real = nearest_unlike_neighbour(classifier, x, target, references, labels=labels)
    everywhere = torch.ones(len(x), dtype=torch.bool)
    place = partial(placed, classifier, path)
    alike = {
        "PGD blur": place(robust.images, robust.found),
        "nearest real image": place(real.images, everywhere),
    }
    started = time.perf_counter()
    less = {"Mirror-CFE, trimmed": trim(classifier, x, end.images, target)}
    trimming = (time.perf_counter() - started) / len(x)
    less["Mirror-CFE, evenly"] = trim(classifier, x, end.images, target, grid=(1, 1))
    less |= {f"{name}, trimmed": trim(classifier, x, own.images, target) for name, own in alike.items()}
    cells, pixels = ((each.shape[-2], each.shape[-1]) for each in (classifier.features(x[:1]), x))
    for name, images, grid in zip(FINER, (end.images, end.images, robust.images), (cells, pixels, pixels), strict=True):
        less[name] = trim(classifier, x, images, target, grid=grid)
    for name, images in zip(TERMS, (end.images, quick.images, euclidean.images), strict=True):
        less[name] = trim(classifier, x, images, target, grid=pixels, blur=0.0)
    smaller = {name: place(each.images, each.found) for name, each in less.items()}
    rows = {
        "Mirror-CFE, first": first,
        "Mirror-CFE, k = 1": end,
        "Mirror-CFE, trimmed": smaller["Mirror-CFE, trimmed"],
        "PGD, first": place(quick.images, quick.found),
        "PGD, driven on": place(far.images, far.found),
        "PGD l2, first": place(euclidean.images, euclidean.found),
        "PGD blur, first": alike["PGD blur"],
    }
    for name, line in lines.items():
        way = line.k.nan_to_num(1.0)[:, None] * (toward - start)
        rows[f"{name}, first"] = Images(line.images, line.found, start + way)
        rows[f"{name}, k = 1"] = Images(line.strip[:, -1], everywhere, toward)
    rows["nearest real image"] = alike["nearest real image"]
    others = [name for name in rows if not name.startswith("Mirror-CFE") and not name.endswith(("k = 1", "driven on"))]
    every = rows | smaller
    of_targets = references[torch.isin(labels, target.unique())]
    table = Table(f"{on}: {len(x)} held-out images", [])
    scores = scores_of(classifier, x, target, every)
    for name, own in rows.items():
        table.rows[name] = row_of(classifier, x, target, own, scores[name], of_targets)
    table.columns = list(next(iter(table.rows.values())))
    faithful = Table(f"{on}: from latent to image, over k", ["mean", "95 % interval"])
    over_k = {
        "confidence gap": doubles(each.confidence_gap for each in found),
        "latent error": doubles(float(each.latent_error.mean()) for each in found),
        "reconstruction L1": doubles(float((each.reconstruction - each.prepared).abs().mean()) for each in found),
    }
    flips = doubles(each.first_k for each in found if each.first_k is not None)
    for name, values in {**over_k, "k of the first counterfactual": flips}.items():
        if not len(values):  # none was found
            continue
        mean = bootstrap_mean(values)
        faithful.rows[name] = {"mean": mean.mean, "95 % interval": f"[{mean.low:.3f}, {mean.high:.3f}]"}
    table.notes.append(
        f"{seconds * 1e3:.0f} ms an image for strip, first counterfactual and mirror image; {trimming * 1e3:.0f} more "
        "to trim."
    )
    parts = Table(f"{on}: a part of the change that suffices", [])
    for name in (*PARTIAL, *TRIMMED, *FINER, *TERMS):
        means = scores[name].means()
        parts.rows[name] = {
            "found": float(every[name].found.double().mean()),
            **{column: means[score] for column, score in DIFFERENCES.items()},
            **standing(classifier, every[name], target),
        }
    parts.columns = list(parts.rows["Mirror-CFE, trimmed"])
    called = logits_of(classifier, x).argmax(1)
    blurred = Table(f"{on}: share of images that keep their class under a blur", [])
    for name, images, wanted in (("the images themselves", x, called), ("Mirror-CFE, k = 1", end.images, target)):
        blurred.rows[name] = {f"{sigma:g} pixels": kept(classifier, images, wanted, sigma) for sigma in BLURS}
    blurred.columns = list(blurred.rows["Mirror-CFE, k = 1"])
    versus = (
        (f"{on}: Mirror-CFE's first counterfactual minus another's, of the same images", "Mirror-CFE, first", others),
        (f"{on}: Mirror-CFE's trimmed images minus others, of the same images", TRIMMED[0], [*PARTIAL, *TRIMMED[1:]]),
        (f"{on}: Mirror-CFE on PGD's terms minus others, of the same images", TERMS[0], [*ATTACKS, *TERMS[1:]]),
    )
    tables = [table, *(beside(*names, every, scores) for names in versus), parts, faithful, blurred]
    members = {int(label): ((labels == label) & recognised).nonzero()[:, 0] for label in labels.unique()}
    one, last = scores["Mirror-CFE, first"], scores["Mirror-CFE, k = 1"]
    summary = {
        "first found": first.found.double(),
        "valid, k = 1": last.valid,
        "denoised valid, k = 1": last.denoised_valid,
        "L1, first": one.l1,
        **over_k,
        "triangulation": strayed(mirror, found, x, target, references, encoded, members),
    }
    if on == "birds":
        own = {
            name: every[f"Mirror-CFE, {name}"] for name in ("first", "k = 1", "trimmed", "by map cells", "by pixels")
        }
        own["first"] = replace(first, found=everywhere)  # where there is none, the image of k = 1
        attacks = ("PGD, first", "PGD l2, first", "PGD blur, trimmed", "PGD blur, by pixels")
        drawn = own | {name: every[name] for name in attacks}
        tables.append(redrawn(classifier, numbers, x, target, drawn, options, summary))
    return tables, summary


def redrawn_birds(
    numbers: Tensor, target: Tensor, options: argparse.Namespace
) -> tuple[SyntheticBirds, list[BirdItem], Tensor]:
    """The set, the birds of these numbers, and what the generator draws of them for the target: float [B,3,H,W]."""
    birds = SyntheticBirds(split_of("birds", options), n=options.images)
    items = [birds[int(number)] for number in numbers]
    true = torch.stack([birds.redraw(item, int(label)).tensor for item, label in zip(items, target, strict=True)])
    return birds, items, true


def nearer(scores: RedrawScores, seen: Tensor) -> dict[str, Interval]:
    """How much further from the redrawn bird than the image itself, inside and outside the parts that differ."""
    return {
        "inside": paired_bootstrap(scores.inside[seen], scores.source_inside[seen]),
        "outside": paired_bootstrap(scores.outside[seen], scores.source_outside[seen]),
    }


def birds_options(description: str | None, files: Iterable[str] = (), **more: int) -> argparse.Namespace:
    """Options of a benchmark on birds alone, with the threads set; `more`: further numbers with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**more, "images": 120, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in files:
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    options.data = None
    torch.set_num_threads(options.threads)
    return options


def redrawn(
    classifier: Classifier,
    numbers: Tensor,
    x: Tensor,
    target: Tensor,
    drawn: dict[str, Images],
    options: argparse.Namespace,
    summary: dict[str, Tensor],
) -> Table:
    """How far the images are from the ground-truth counterfactual, which the generator draws."""
    birds, items, true = redrawn_birds(numbers, target, options)
    differing = float(redraw_distances(birds, items, x, true, target).differing.nanmean())
    recognised = logits_of(classifier, true).argmax(1) == target
    table = Table("birds: against the redrawn counterfactual", [])
    for name, own in drawn.items():
        scores = redraw_distances(birds, items, x, own.images, target, own.found)
        grown = redraw_distances(birds, items, x, own.images, target, own.found, grid=(8, 8))
        seen = scores.graded
        energy, area = scores.energy[seen].mean(), scores.area[seen].mean()
        if name in ("first", "k = 1"):
            summary[f"energy to area, {name}"] = scores.energy.where(seen, torch.nan) / area
            summary[f"inside, {name}"] = (scores.inside - scores.source_inside).where(seen, torch.nan)
        table.rows[name] = {"birds": int(seen.sum())}
        if not bool(seen.any()):
            continue
        beyond = paired_bootstrap(scores.energy[seen], 3 * scores.area[seen])
        table.rows[name] |= {
            "energy on parts": float(energy),
            "times their area": float(energy / area),
            "energy - 3 x area": beyond,
            "on grown parts": float(grown.energy[seen].mean()),
            "times the grown area": float(grown.energy[seen].mean() / grown.area[seen].mean()),
            **nearer(scores, seen),
        }
    table.columns = list(max(table.rows.values(), key=len))
    table.notes.append(
        "Energy: share of the change that lies on the visible parts that differ; grown: by half a cell of the map. "
        "Inside, outside: L1 to the redrawn bird minus that of the image itself, paired; negative is closer. "
        f"{differing:.1%} of the pixels inside differ between image and redrawn bird by more than a level of 255 (mean "
        "over birds). "
        f"The classifier calls {float(recognised.double().mean()):.1%} of the truly redrawn birds the target."
    )
    return table


def ablated(options: argparse.Namespace) -> list[tuple[str, Path]]:
    """Decoders with and without each part of the method, trained where their files are not there."""
    parts = options.without or [part for part in PARTS if part != "spatial-prior" or options.on == "birds"]
    files = []
    for name, settings in {"all of it": {}, **{f"without {part}": PARTS[part] for part in parts}}.items():
        file = options.ablation / f"{options.on} {name}.safetensors".replace(" ", "_")
        if not file.is_file():
            train_mirror(
                options.on,
                file,
                options.data,
                options.classifier,
                options.steps,
                precision="bfloat16",
                threads=options.threads,
                progress=True,
                **settings,
            )
        files.append((name, file))
    return files


def worth(on: str, summaries: dict[str, dict[str, Tensor]]) -> list[Table]:
    """What each decoder reaches, and what leaving a part out changes on the same images."""
    whole, *parts = summaries
    columns = list(summaries[whole])
    means = {name: {column: float(own[column].nanmean()) for column in columns} for name, own in summaries.items()}
    apart: dict[str, dict[str, Any]] = {}
    for name in parts:
        pairs = {column: (summaries[name][column], summaries[whole][column]) for column in columns}
        both = {column: ~(own.isnan() | other.isnan()) for column, (own, other) in pairs.items()}
        apart[name] = {
            column: paired_bootstrap(own[both[column]], other[both[column]])
            for column, (own, other) in pairs.items()
            if both[column].any()
        }
    return [
        Table(f"{on}: what the parts are worth", columns, means),
        Table(f"{on}: what leaving a part out changes", columns, apart),
    ]


def publish(tables: list[Table], markdown: Path | None) -> None:
    """Print the tables, and write them to a file where one is named."""
    for table in tables:
        rich.print(table)
    if markdown is not None:
        markdown.write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=["digits", "birds", "fashion"], help="default: digits")
    parser.add_argument("--decoder", type=Path, help="default: the shipped one")
    parser.add_argument("--classifier", type=Path, help="the classifier's file, for fashion")
    parser.add_argument("--data", type=Path, help="where fashion_mnist.npz is")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--corrections", type=int, default=CORRECTIONS)
    parser.add_argument("--correction-blur", type=float, default=0.0)
    parser.add_argument("--reflection", choices=REFLECTIONS, help="default: as the decoder's file says")
    parser.add_argument("--soften", type=float, help="in pixels, for decoders of changes; default: as their file says")
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ablation", type=Path, metavar="FOLDER", help="where the decoders are, or are to be")
    parser.add_argument("--without", nargs="+", choices=list(PARTS), help="the parts to leave out in turn")
    parser.add_argument("--steps", type=int, help="of the decoders that are trained; default: the recipe's")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = [options]
    if options.ablation and options.on is None:
        runs = []
        for on, own in ABLATIONS.items():  # what stands on the command line goes before these
            parser.set_defaults(on=on, **own)
            runs.append(parser.parse_args())
    options.on = options.on or "digits"
    if any(each.validation and each.on == "digits" for each in runs):
        parser.error("--validation: the digits have no images beside those that are trained on and graded")
    tables = [table for each in runs for table in graded(each)]
    publish(tables, options.markdown)


def graded(options: argparse.Namespace) -> list[Table]:
    """The tables of one set."""
    classifier = mirror_classifier(options.on, options.classifier)
    settings: dict[str, Any] = {"corrections": options.corrections, "correction_blur": options.correction_blur}
    settings |= {"soften": options.soften, "reflection": options.reflection}
    if options.ablation:
        summaries = {
            name: score(options.on, finecf.MirrorCFE(classifier, file, **settings), options)[1]
            for name, file in ablated(options)
        }
        return worth(options.on, summaries)
    file = options.decoder or shipped_decoder(options.on)
    return score(options.on, finecf.MirrorCFE(classifier, file, **settings), options)[0]


if __name__ == "__main__":
    main()
