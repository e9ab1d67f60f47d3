"""What a repainter does to photographs of look-alike birds, for a classifier that nobody here trained (O).

    python benchmarks/real_repaint.py --painter FILE [--steps N] [--rounds N] [--images N] [--mistakes N]

A painter is trained on the training photographs, for all pairs of one group, where FILE is not there yet. Classifier,
photographs and what they are led to are those of benchmarks/real_mirror.py. No redrawn bird tells what is right here,
so the classifier is asked: by how much more the target's logit rises than the source's, and, as a control, by how much
more those of the other look-alikes do, whose marks were not asked for.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from mirror import logits_of, publish
from real_mirror import GRADED, Photographs

from finecf.explainers import Repainter
from finecf.explainers.repaint import ROUNDS, THRESHOLD
from finecf.metrics.bootstrap import paired_bootstrap
from finecf.metrics.tables import Table
from finecf.training import train_painter

STEPS = 3_000
"""17 minutes of two shared cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--painter", type=Path, required=True, help="where it is, or is to be")
    parser.add_argument("--images", type=int, default=GRADED)
    parser.add_argument("--mistakes", type=int, default=GRADED)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the training")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    if not options.images and not options.mistakes:
        parser.error("nothing to repaint: give --images or --mistakes")
    torch.set_num_threads(options.threads)
    photographs = Photographs.load()
    classifier, notes = photographs.classifier, []
    if not options.painter.is_file():
        started = time.perf_counter()
        data = photographs.read["train"], photographs.truth["train"]
        train_painter(
            classifier,
            data,
            photographs.pairs,
            options.painter,
            steps=options.steps,
            precision="bfloat16",
            progress=True,
        )
        notes.append(f"Trained in {(time.perf_counter() - started) / 60:.0f} minutes.")
    tables: list[Table] = []
    for what, (x, target) in photographs.led(options.images, options.mistakes, options.validation).items():
        table = Table(f"photographs, repainted up to {options.rounds} times: {what}", [])
        before = logits_of(classifier, x)
        rows, own = torch.arange(len(x)), before.argmax(1)
        others = photographs.alike[own].clone()
        others[rows, target] = False
        some = others.any(1)
        for threshold in (THRESHOLD, 0.0):
            repainter = Repainter(classifier, options.painter, rounds=options.rounds, threshold=threshold)
            done = repainter.repaint(x, target)
            rise = logits_of(classifier, done.images) - before
            asked = rise[rows, target] - rise[rows, own]
            control = (rise * others).sum(1) / others.sum(1).clamp_min(1) - rise[rows, own]
            table.rows[f"threshold {threshold:g}"] = {
                "called the target": float(done.found.double().mean()),
                "L1": float((done.images - x).abs().mean()),
                "behind by": float((before[rows, own] - before[rows, target]).mean()),
                "target rises by": paired_bootstrap(asked, torch.zeros_like(asked)),
                "others rise by": paired_bootstrap(control[some], torch.zeros_like(control[some])),
                "target above others": paired_bootstrap(asked[some], control[some]),
            }
            table.columns = list(table.rows[f"threshold {threshold:g}"])
        tables.append(table)
    tables[0].notes += notes
    publish(tables, options.markdown)


if __name__ == "__main__":
    main()
