"""FG-VCE on the real mistakes of a pretrained bird classifier: flips, edits, time apart from the trunk, and curves.

    python benchmarks/real_birds.py [--limit N] [--threads N] [--no-curves] [--compile] [--cache DIR] [--markdown FILE]

The folder of photographs, model and weights is found at FINECF_REALDATA, else at ../shared/realdata. Every mistake of
the model on the 1,725 photographs is explained with the bank of all cells of all correctly classified ones.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import rich
import torch
from torch import Tensor

import finecf
from finecf.data import ImageFolderDataset
from finecf.metrics import (
    centred_gaussian,
    compactness,
    grad_cam,
    insertion_deletion,
    occlusion,
    paired_bootstrap,
    random_maps,
    resize_maps,
)
from finecf.metrics.evaluate import EQUAL_WEIGHTS, VARIANTS
from finecf.metrics.tables import Table

SETTINGS: dict[str, dict[str, Any]] = {
    "fgvce": {},
    EQUAL_WEIGHTS: VARIANTS[EQUAL_WEIGHTS],
    **{name: {"preset": name} for name in ("exhaustive", "goyal", "vandenhende", "paper")},
}
MAX_EDITS = 10
BATCH = 16


class Stopwatch:
    """Adds up the wall and processor time spent inside what it measures."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._start[0]
        self.processor += time.process_time() - self._start[1]

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return timed

    def without(self, *others: Stopwatch) -> dict[str, float]:
        """The two columns of a table, what the others measured meanwhile taken off."""
        return {
            "seconds": self.wall - sum(other.wall for other in others),
            "processor seconds": self.processor - sum(other.processor for other in others),
        }


def real_data() -> Path:
    """The folder of photographs, models and weights; ends the program where it is not there."""
    root = Path(os.environ.get("FINECF_REALDATA", Path(__file__).parents[2] / "shared" / "realdata"))
    if not (root / "mobilenet_v2.py").is_file():
        sys.exit(f"no real data at {root}: set FINECF_REALDATA to the folder that holds mobilenet_v2.py and birds/")
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="explain only the first N mistakes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-curves", action="store_true", help="leave out insertion and deletion (the long part)")
    parser.add_argument("--compile", action="store_true", help="run the curves through torch.compile (some 1e-6 apart)")
    parser.add_argument("--cache", type=Path, help="keep finished curves here, and go on from there")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    root = real_data()
    photographs = ImageFolderDataset(root / "birds" / "images", size=224)
    clf = finecf.wrap(load_model(root / "mobilenet_v2.py"), class_names=photographs.class_names)

    trunk, reading = Stopwatch(), Stopwatch()
    predicted: list[Tensor] = []
    forward = clf.features_and_logits

    def remembering(x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = forward(x)
        predicted.append(logits.argmax(1))
        return features, logits

    clf.features_and_logits = trunk.wrap(remembering)  # type: ignore[method-assign]

    @reading.wrap
    def read(first: int) -> tuple[Tensor, Tensor, list[str]]:
        batch = [photographs[i] for i in range(first, min(first + BATCH, len(photographs)))]
        return torch.stack([b[0] for b in batch]), torch.tensor([b[1] for b in batch]), [b[2] for b in batch]

    loader = (read(first) for first in range(0, len(photographs), BATCH))
    building = Stopwatch()
    with building:
        bank = finecf.CandidateBank.from_loader(clf, loader, progress=False)
    cost = building.without(trunk, reading)
    bank_trunk = trunk.wall

    labels = torch.tensor(photographs.labels)
    answers = torch.cat(predicted)[: len(labels)]
    wrong = (answers != labels).nonzero().flatten()
    images = photographs.images(wrong[: arguments.limit].tolist())
    target, taken_for = labels[wrong[: len(images)]], answers[wrong[: len(images)]]
    table = Table(
        f"FG-VCE on {len(images)} of the {len(wrong)} real mistakes",
        ["flipped", "edits", "most edits", "cosine", "p target after", "seconds", "processor seconds", "trunk seconds"],
    )
    table.rows["bank"] = {**cost, "trunk seconds": bank_trunk}
    trunk.wall = trunk.processor = 0.0
    features = torch.cat([clf.features(chunk) for chunk in images.split(BATCH)])
    explained = {}
    for name, settings in SETTINGS.items():
        explained[name], table.rows[name] = explain(clf, bank, settings, images, features, target)
        table.rows[name]["trunk seconds"] = trunk.wall
    both = {key: float(table.rows["fgvce"][key]) + value for key, value in cost.items()}
    table.rows["bank + fgvce"] = both
    table.notes = [
        f"Bank of {len(bank):,} cells. Seconds are wall time beside the trunk's forwards and the reading of files; "
        f"processor seconds are the same, free of what else the machine does. At most {MAX_EDITS} edits, batches of "
        f"{BATCH}. {machine()}"
    ]
    tables = [table]
    if not arguments.no_curves:
        runs: Any = clf
        if arguments.compile:
            runs = torch.compile(clf.model.to(memory_format=torch.channels_last), dynamic=False)
        tables.append(curves(clf, runs, images, target, taken_for, explained["fgvce"], arguments.cache))
    for each in tables:
        rich.print(each)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(each.markdown() for each in tables))
    if arguments.json:
        arguments.json.write_text(json.dumps([each.to_dict() for each in tables], indent=1))


def load_model(path: Path) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("mobilenet_v2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_model()


def explain(
    clf: finecf.Classifier,
    bank: finecf.CandidateBank,
    settings: dict[str, Any],
    images: Tensor,
    features: Tensor,
    target: Tensor,
) -> tuple[list[finecf.FGVCEExplanation], dict[str, Any]]:
    whole = Stopwatch()
    with whole:
        explainer = finecf.FGVCE(clf, bank, max_edits=MAX_EDITS, **settings)
        results = explainer.explain(images, target, features=features)
    edits = [len(r.edits) if r.flipped else MAX_EDITS for r in results]
    return results, {
        "flipped": f"{sum(r.flipped for r in results)}/{len(results)}",
        "edits": fmean(edits),
        "most edits": max(edits),
        "cosine": fmean(edit.similarity for r in results for edit in r.edits),
        "p target after": fmean(r.probabilities_after.target for r in results),
        **whole.without(),
    }


def curves(
    clf: finecf.Classifier,
    runs: Any,
    images: Tensor,
    target: Tensor,
    taken_for: Tensor,
    explained: list[finecf.FGVCEExplanation],
    cache: Path | None,
) -> Table:
    """Insertion and deletion of both classes, for FG-VCE's maps and the maps to compare with."""
    grid = explained[0].grid
    cell = images.shape[-1] // grid[1]
    rest = {"mean_colour": images.mean((0, 2, 3)), "batch_size": BATCH}
    chunks = [slice(first, first + BATCH) for first in range(0, len(images), BATCH)]
    classes = torch.stack([taken_for, target], 1)

    def occluded(chunk: slice) -> Tensor:
        return occlusion(runs, images[chunk], taken_for[chunk], window=2 * cell, stride=cell, **rest)

    def areas(chosen: Tensor) -> Tensor:
        """[B,4]: insertion and deletion of the predicted class, then of the true class."""
        parts = [insertion_deletion(runs, images[c], chosen[c], classes[c], **rest) for c in chunks]
        return torch.cat([torch.stack([p.insertion_auc, p.deletion_auc], 2).flatten(1) for p in parts])

    maps = {
        "dominant map": torch.stack([r.maps["dominant"] for r in explained]),
        "contribution map": torch.stack([r.maps["contribution"] for r in explained]),
        "before map": torch.stack([r.maps["before"] for r in explained]),
        "Grad-CAM": torch.cat([grad_cam(clf, images[c], taken_for[c]) for c in chunks]),
        "occlusion": kept(cache, (images, taken_for), lambda: torch.cat([occluded(c) for c in chunks])),
        "centred Gaussian": centred_gaussian(len(images), grid),
        "random": random_maps(len(images), grid),
    }
    columns = ["insertion, predicted", "deletion, predicted", "insertion, true", "deletion, true"]
    scores = {}
    for name, chosen in maps.items():
        found = kept(cache, (images, classes, chosen), lambda chosen=chosen: areas(chosen))  # type: ignore[misc]
        scores[name] = dict(zip(columns, found.unbind(1), strict=True))
        print(f"curves of {name}: done", file=sys.stderr, flush=True)
    table = Table("Insertion and deletion on the same mistakes", [*columns, "compactness", "at zero"])
    for name, values in scores.items():
        row: dict[str, Any] = {column: float(v.mean()) for column, v in values.items()}
        if name != "dominant map":
            for column, ours in scores["dominant map"].items():
                row[column] = f"{row[column]:.3f} ({_signed(paired_bootstrap(ours, values[column]))})"
        positive = resize_maps(maps[name].clamp_min(0), (images.shape[2], images.shape[3]))
        peak = positive.amax((1, 2), keepdim=True)
        row["compactness"] = float(compactness(torch.where(peak > 0, positive / peak, 0).clamp(0, 1)).mean())
        row["at zero"] = float((resize_maps(maps[name], (images.shape[2], images.shape[3])) == 0).double().mean())
        table.rows[name] = row
    table.notes = [
        "Area under the curve of the probability of the predicted (wrong) and of the true class; 3 % of the pixels a "
        "step in falling order of the map, baseline the mean colour of these photographs. In brackets: the dominant "
        "map minus this row, 95 % paired bootstrap. Grad-CAM and occlusion are those of the predicted class; "
        "maps are brought bilinearly from the cells to image size; occlusion: window 2 cells, stride "
        "1 cell. At zero: share of the pixels where the map is exactly zero; they come in reading order."
    ]
    return table


def kept(cache: Path | None, depends_on: tuple[Tensor, ...], compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` gives, read from `cache` where the same tensors led to it before: an interrupted run goes on."""
    if cache is None:
        return compute()
    digest = hashlib.sha256()
    for tensor in depends_on:
        digest.update(tensor.contiguous().numpy().tobytes())
    file = cache / f"{digest.hexdigest()[:24]}.npy"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        np.save(file, compute().numpy())
    return torch.from_numpy(np.load(file))


def _signed(interval: Any) -> str:
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def machine() -> str:
    return f"{torch.get_num_threads()} thread(s), {platform.machine()}, torch {torch.__version__}."


if __name__ == "__main__":
    main()
