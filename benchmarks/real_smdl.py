"""SMDL on photographs: insertion, deletion and highest confidence beside other maps, by one evaluator.

    python benchmarks/real_smdl.py --out FILE.json [--part I/N] [--right 100] [--greedy K] [--threads N]
    python benchmarks/real_smdl.py --tables FILE.json [FILE.json ...] [--markdown FILE]

The folder of photographs, models and weights is found at FINECF_REALDATA, else at ../shared/realdata: `--right` bird
photographs that the model gets right, all that it gets wrong (target: the true class), and the ImageNet photographs of
dogs (target: the predicted class). `--part 1/2` takes every second image, for two processes side by side; what is
finished is kept in the file, and a second call goes on from there. `--again` makes the rows of the window search anew;
the others, which do not depend on it, stay. `--precision bfloat16` makes the maps with forwards in half precision; the
curves are always of the model as it is. What is removed shows the mean colour of the photographs, in SMDL and in the
evaluator alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import rich
import torch
from real_birds import real_data
from torch import Tensor

import finecf
from finecf.data import ImageFolderDataset
from finecf.metrics import grad_cam, highest_confidence, insertion_deletion, occlusion, paired_bootstrap, rise
from finecf.metrics.tables import Table
from finecf.models.runner import Runner

PUBLISHED = {"confidence": 0.05, "effectiveness": 0.05, "consistency": 20.0, "collaboration": 5.0}
"""The weights of the published scripts (methods page)."""
SHARES = (0.25, 0.5, 0.75, 1.0)
RISE_MASKS = 200
WINDOW, EQUAL = "SMDL window", "SMDL window, weights 1"
GROUPS = {"right": "birds, right", "wrong": "birds, wrong (target: the true class)", "dogs": "ImageNet dogs"}


def load(path: Path, builder: str, **options: Any) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("realdata_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, builder)(**options).eval()


def photographs(root: Path, right: int) -> dict[str, tuple[Any, Tensor, Tensor]]:
    """For each group: the classifier, the images, the target classes."""
    birds = ImageFolderDataset(root / "birds" / "images", size=224)
    clf = finecf.wrap(load(root / "mobilenet_v2.py", "build_model"), class_names=birds.class_names)
    labels = torch.tensor(birds.labels)
    predicted = torch.cat(
        [clf.logits(birds.images(list(range(i, min(i + 16, len(birds)))))).argmax(1) for i in range(0, len(birds), 16)]
    )
    wrong = (predicted != labels).nonzero()[:, 0]
    chosen = (predicted == labels).nonzero()[:, 0]
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:right]]
    groups = {
        "right": (clf, birds.images(chosen.tolist()), labels[chosen]),
        "wrong": (clf, birds.images(wrong.tolist()), labels[wrong]),
    }
    dogs = finecf.wrap(load(root / "mobilenet_v2.py", "build_imagenet"))
    files = sorted((root / "photos").glob("*.[Jj][Pp]*[Gg]"))
    pictures = finecf.data.LabelledImages(files, [0] * len(files), ["photograph"], 224).images()
    groups["dogs"] = (dogs, pictures, dogs.logits(pictures).argmax(1))
    return groups


def evaluate(
    clf: Any,
    runners: tuple[Runner, Runner],
    image: Tensor,
    target: int,
    colour: Tensor,
    greedy: bool,
    precision: str,
    known: dict[str, Any],
) -> dict[str, Any]:
    """All scores of one image, those that are known with them; the first runner reads curves, the second makes maps."""
    x, wanted = image[None], torch.tensor([target])
    classify, explore = (lambda images, run=run: run(run.layout(images)) for run in runners)

    labels = finecf.regions.slico(image, 49)
    order = torch.randperm(int(labels.max()) + 1, generator=torch.Generator().manual_seed(0)).float()
    spent: dict[str, dict[str, float]] = {}

    def smdl(name: str, search: str, weights: dict[str, float] | None) -> Tensor:
        explainer = finecf.SMDL(
            clf, search=search, weights=weights, baseline=colour, micro_batch=8, precision=precision
        )
        started = time.perf_counter()
        (found,) = explainer.explain(image, target, regions=labels)
        spent[name] = {"seconds": time.perf_counter() - started, "forwards": found.evaluations}
        return found.maps["saliency"].float()

    makers: dict[str, Callable[[], Tensor]] = {
        WINDOW: lambda: smdl(WINDOW, "window", PUBLISHED),
        "Grad-CAM": lambda: grad_cam(clf, x, wanted)[0],
        "occlusion": lambda: occlusion(explore, x, wanted, baseline=colour, batch_size=8)[0],
        f"RISE, {RISE_MASKS} masks": lambda: rise(explore, x, wanted, masks=RISE_MASKS, baseline=colour)[0],
        "random order": lambda: order[labels.long()],
    }
    if greedy:
        makers["SMDL greedy"] = lambda: smdl("SMDL greedy", "greedy", PUBLISHED)
        makers[EQUAL] = lambda: smdl(EQUAL, "window", None)
    scores = dict(known)
    for name in [name for name in makers if name not in known]:
        curves = insertion_deletion(classify, x, makers[name]()[None], wanted, baseline=colour, batch_size=8)
        scores[name] = {
            "insertion": float(curves.insertion_auc[0, 0]),
            "deletion": float(curves.deletion_auc[0, 0]),
            "highest": highest_confidence(curves, SHARES)[0, 0].tolist(),
        }
        scores[name] |= spent.get(name, {})
    return scores


def run(arguments: argparse.Namespace) -> None:
    root = real_data()
    part, parts = (int(number) for number in arguments.part.split("/"))
    done = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if arguments.again:
        done = {
            key: {name: row for name, row in rows.items() if name not in (WINDOW, EQUAL)} for key, rows in done.items()
        }
    groups = photographs(root, arguments.right)
    colour = groups["right"][1].mean((0, 2, 3))
    runners = {}
    for group, (clf, images, _) in groups.items():
        runners[group] = Runner(clf, channels_last=True), Runner(clf, arguments.precision, channels_last=True)
        for runner in runners[group]:
            runner.verify(images[:1])
    most = max(len(images) for _, images, _ in groups.values())
    for i in range(part - 1, most, parts):  # across the groups, so that a run that is cut has some of each
        for group, (clf, images, target) in groups.items():
            known = done.get(f"{group} {i}", {})
            if i < len(images) and WINDOW not in known:
                greedy = i < arguments.greedy
                done[f"{group} {i}"] = evaluate(
                    clf, runners[group], images[i], int(target[i]), colour, greedy, arguments.precision, known
                )
                arguments.out.write_text(json.dumps(done))


def tables(files: list[Path]) -> list[Table]:
    done: dict[str, Any] = {}
    for file in files:
        done |= json.loads(file.read_text())
    found = []
    for group, title in GROUPS.items():
        rows = [scores for key, scores in sorted(done.items()) if key.split()[0] == group]
        if not rows:
            continue
        shown = Table(f"{title}: {len(rows)} images", ["insertion", "deletion", *(f"highest, {s:.0%}" for s in SHARES)])
        differ = Table(f"{WINDOW} minus each other row, 95 % paired bootstrap, {title}", ["insertion", "deletion"])
        differ.columns.append("highest, 100%")
        for name in sorted(
            {name for row in rows for name in row}, key=lambda name: (not name.startswith("SMDL"), name)
        ):
            own = [row for row in rows if name in row]
            label = name if len(own) == len(rows) else f"{name}, {len(own)} images"
            mean: dict[str, Any] = {key: fmean(row[name][key] for row in own) for key in ("insertion", "deletion")}
            for k, share in enumerate(SHARES):
                mean[f"highest, {share:.0%}"] = fmean(row[name]["highest"][k] for row in own)
            if "forwards" in own[0][name]:
                mean["forwards"] = fmean(row[name]["forwards"] for row in own)
                mean["seconds"] = fmean(row[name]["seconds"] for row in own)
            shown.rows[label] = mean
            if name != WINDOW:
                ours = [row[WINDOW] for row in own]
                differ.rows[label] = {
                    key: paired_bootstrap([each[key] for each in ours], [row[name][key] for row in own])
                    for key in ("insertion", "deletion")
                } | {
                    "highest, 100%": paired_bootstrap(
                        [each["highest"][-1] for each in ours], [row[name]["highest"][-1] for row in own]
                    )
                }
        shown.columns += ["forwards", "seconds"]
        found += [shown, differ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the scores go, image by image")
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--right", type=int, default=100)
    parser.add_argument(
        "--greedy",
        type=int,
        default=0,
        help="on the first K images of each group also the exact search, and weights of 1",
    )
    parser.add_argument("--precision", default="float32", help="of the forwards that make the maps")
    parser.add_argument("--again", action="store_true", help="drop the window searches' rows, and make them anew")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", type=Path, nargs="+", help="print the tables of these files")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.out:
        run(arguments)
    for table in tables(arguments.tables or []):
        rich.print(table)
        if arguments.markdown:
            with arguments.markdown.open("a") as file:
                file.write(table.markdown() + "\n")


if __name__ == "__main__":
    main()
