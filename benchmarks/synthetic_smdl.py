"""SMDL on SyntheticBirds: the four searches, and how early the parts that tell two kinds apart are covered.

    python benchmarks/synthetic_smdl.py [--images 100] [--validation] [--data-seed N] [--wider F ...] [--threads N]
                                        [--markdown FILE]

Half of the images are classified correctly, half are mistakes inside a family (target: the true class). What is removed
shows the mean colour of the images, in the search and in the evaluator alike. "mean F" is the score along the order, in
the mean over its sets; "share" is that of greedy's images. With --wider: the window search alone, with its windows F
times as wide, against greedy. With --validation: on birds of the split that settings were chosen on.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import rich
import torch
from torch import Tensor

import finecf
from finecf.data import SyntheticBirds
from finecf.explainers import _subset
from finecf.metrics import area_before, grad_cam, insertion_deletion, paired_bootstrap
from finecf.metrics.evaluate import INSIDE, find_mistakes
from finecf.metrics.tables import Table
from finecf.training import load_birds_net

SEARCHES = ("greedy", "bidirectional", "window", "lazy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--wider", type=float, nargs="+", metavar="F")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    net, _ = load_birds_net()
    drawn = SyntheticBirds("val" if arguments.validation else "test", seed=arguments.data_seed, n=20_000)
    clf = finecf.wrap(net, class_names=drawn.class_names)
    half = arguments.images // 2
    found, looked = find_mistakes(clf, drawn, half)
    mistakes = [each for each in found if each.group == INSIDE and each.visible][:half]
    wrong = {each.item.source for each in found}
    right = [item for item in (drawn[i] for i in range(looked)) if item.source not in wrong][: len(mistakes)]
    items = [*right, *(each.item for each in mistakes)]
    images = torch.stack([torch.from_numpy(item.image).permute(2, 0, 1).float() / 255 for item in items])
    target = torch.tensor([item.label for item in right] + [each.target for each in mistakes])
    colour = images.mean((0, 2, 3))
    labels = [finecf.regions.slico(image, 49) for image in images]

    table = Table(f"SMDL on SyntheticBirds: {len(right)} right, {len(mistakes)} mistakes", [])
    table.columns = [
        "images",
        "share",
        "seconds",
        "insertion",
        "deletion",
        "mean F",
        "best F",
        "grown gains",
    ]
    compared = ("insertion", "deletion", "mean F")
    differ = Table("each search minus greedy, 95 % paired bootstrap", list(compared))
    maps: dict[str, Tensor] = {}
    scores: dict[str, tuple[list[float], ...]] = {}
    factors = {f"window x {factor:g}": factor for factor in arguments.wider or ()}
    for search in ("greedy", *factors) if factors else SEARCHES:
        if search in factors:
            _subset.SEARCHES["window"] = functools.partial(_subset.window, wider=factors[search])
        explainer = finecf.SMDL(clf, search="window" if search in factors else search, baseline=colour)
        explainer.explain(images[:1], int(target[0]), regions=labels[:1])  # warm; chooses the micro-batch
        started = time.perf_counter()
        results = explainer.explain(images, target, regions=labels)
        seconds = time.perf_counter() - started
        maps[search] = torch.stack([each.maps["saliency"] for each in results]).float()
        curves = insertion_deletion(clf, images, maps[search], target, baseline=colour)
        areas = (curves.insertion_auc[:, 0].tolist(), curves.deletion_auc[:, 0].tolist())
        scores[search] = (*areas, [float(each.total.mean()) for each in results])
        row: dict[str, Any] = {
            "images": round(fmean(each.evaluations for each in results)),
            "seconds": seconds / len(results),
            **{column: fmean(values) for column, values in zip(compared, scores[search], strict=True)},
            "best F": fmean(float(each.total.max()) for each in results),
            "grown gains": fmean(each.violation_rate or 0.0 for each in results),
        }
        row["share"] = row["images"] / table.rows["greedy"]["images"] if table.rows else 1.0
        table.rows[search] = row
        if search != "greedy":
            differ.rows[search] = {
                column: paired_bootstrap(scores[search][k], scores["greedy"][k]) for k, column in enumerate(compared)
            }
    if factors:
        _show([table, differ], arguments.markdown)
        return

    parts = torch.from_numpy(np.stack([each.item.mask(each.visible) for each in mistakes]))
    birds = torch.from_numpy(np.stack([item.part_map > 0 for item in items]))
    generator = torch.Generator().manual_seed(0)
    shuffled = [torch.randperm(int(each.max()) + 1, generator=generator).float()[each.long()] for each in labels]
    maps |= {
        "random order": torch.stack(shuffled),
        "Grad-CAM": finecf.metrics.resize_maps(grad_cam(clf, images, target), (images.shape[2], images.shape[3])),
    }
    oracle_parts = torch.stack([_by_region(mask, each) for mask, each in zip(parts, labels[len(right) :], strict=True)])
    oracle_birds = torch.stack([_by_region(mask, each) for mask, each in zip(birds, labels, strict=True)])
    early = Table(
        "share of the image ranked before the pixels looked for", ["differing parts", "object", "object, right"]
    )
    for name, map_ in maps.items():
        early.rows[name] = _early(map_, map_, parts, birds, len(right))
    early.rows["oracle: regions by their share of the mask"] = _early(
        oracle_parts, oracle_birds, parts, birds, len(right)
    )
    early.notes = [
        "0.5 is chance. Differing parts: of the mistakes, with the true class as target. The oracle knows the masks "
        "and orders the same regions."
    ]
    closer = Table("greedy minus the other orders, same images, 95 % paired bootstrap", ["differing parts", "object"])
    own = area_before(maps["greedy"][len(right) :], parts).tolist(), area_before(maps["greedy"], birds).tolist()
    for name in ("random order", "Grad-CAM"):
        other = area_before(maps[name][len(right) :], parts).tolist(), area_before(maps[name], birds).tolist()
        closer.rows[name] = {
            column: paired_bootstrap(own[k], other[k]) for k, column in enumerate(("differing parts", "object"))
        }
    _show([table, differ, early, closer], arguments.markdown)


def _show(tables: Sequence[Table], markdown: Path | None) -> None:
    for shown in tables:
        rich.print(shown)
    if markdown:
        markdown.write_text("\n".join(each.markdown() for each in tables))


def _early(map_parts: Tensor, map_birds: Tensor, parts: Tensor, birds: Tensor, right: int) -> dict[str, Any]:
    of_parts = map_parts if len(map_parts) == len(parts) else map_parts[right:]
    whole = area_before(map_birds, birds)
    return {
        "differing parts": float(area_before(of_parts, parts).mean()),
        "object": float(whole.mean()),
        "object, right": float(whole[:right].mean()),
    }


def _by_region(mask: Tensor, labels: Tensor) -> Tensor:
    """Each region's share of pixels in the mask, as a map."""
    flat = labels.flatten().long()
    inside = torch.bincount(flat, weights=mask.flatten().double())
    return (inside / torch.bincount(flat))[labels.long()].float()


if __name__ == "__main__":
    main()
