"""FG-VCE graded on SyntheticBirds with the shipped net: the tables of docs/results.md.

    python benchmarks/synthetic_birds.py [--mistakes N] [--checkpoint FILE] [--markdown FILE] [--json FILE]

`finecf evaluate` prints the same scores (finecf/metrics/evaluate.py); here they are also kept as JSON, and beside them
stands where the net's own evidence lies, the yardstick for the share of edits on the differing parts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import rich
import torch
from torch.utils.data import DataLoader

import finecf
from finecf.data import SyntheticBirds
from finecf.metrics import bootstrap_mean, cells_on_mask, dilate_masks
from finecf.metrics.evaluate import INSIDE, PRESETS, evaluate_birds, find_mistakes
from finecf.metrics.tables import Table
from finecf.training import load_birds_net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mistakes", type=int, default=300, help="in-family mistakes to grade")
    parser.add_argument("--images", type=int, default=20_000, help="test images to look at, at most")
    parser.add_argument("--references", type=int, default=1_000, help="images of the val split to make the bank of")
    parser.add_argument("--data-seed", type=int, default=0, help="other pictures of the same classes")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--checkpoint", type=Path, help="another net than the shipped one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    net, _ = load_birds_net(arguments.checkpoint)
    # Not the training split: a share of its labels is flipped, so that its cells may be those of another class.
    references = SyntheticBirds("val", n=arguments.references, seed=arguments.data_seed)
    clf = finecf.wrap(net, class_names=references.class_names)
    bank = finecf.CandidateBank.from_loader(clf, DataLoader(references.tensors(), batch_size=64))
    birds = SyntheticBirds("test", n=arguments.images, seed=arguments.data_seed)
    result = evaluate_birds(
        clf, bank, birds, references, mistakes=arguments.mistakes, presets=arguments.presets, progress=True
    )
    own = evidence(clf, birds, arguments.mistakes)
    for table in [*result.tables(), own]:
        rich.print(table)
    if arguments.markdown:
        arguments.markdown.write_text(f"{result.markdown()}\n{own.markdown()}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result.to_dict() | {"evidence": own.to_dict()}, indent=1))


def evidence(clf: finecf.Classifier, birds: SyntheticBirds, mistakes: int) -> Table:
    """How much of what the net itself sees in favour of the wrong class lies on the parts that differ."""
    found, _ = find_mistakes(clf, birds, mistakes)
    kept = [m for m in found if m.group == INSIDE and m.visible]
    predicted = torch.tensor([m.predicted for m in kept])
    target = torch.tensor([m.target for m in kept])

    def margins(images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """What each cell adds to the logit of the predicted over that of the true class, [B,P]."""
        features = torch.cat([clf.features(chunk) for chunk in images.split(64)])
        fold = clf.fold(features[:1])
        if fold is None or fold.kind != "linear":
            raise ValueError(f"expected a net whose head is linear in the cells; {clf.fold_reason}")
        cells = fold.cell_logits(features)
        rows = torch.arange(len(kept))
        return cells[rows, :, predicted] - cells[rows, :, target], (features.shape[2], features.shape[3])

    before, grid = margins(torch.stack([m.item.tensor for m in kept]))
    after, _ = margins(torch.stack([birds.redraw(m.item, m.predicted).tensor for m in kept]))
    grown = dilate_masks(torch.from_numpy(np.stack([m.item.mask(m.visible) for m in kept])), grid)
    on_parts = torch.stack([cells_on_mask(mask, grid) for mask in grown]).flatten(1)

    def share(weight: torch.Tensor) -> torch.Tensor:
        return (weight * on_parts).sum(1) / weight.sum(1)

    table = Table(f"Where the net's own evidence lies, {len(kept)} mistakes inside a family", ["on parts"])
    rows = {
        "evidence for the predicted over the true class": share(before.relu()),
        "the cell with most of it": on_parts.gather(1, before.argmax(1, keepdim=True))[:, 0].double(),
        "change of evidence when the bird is redrawn as the predicted class": share((after - before).abs()),
        "share of the cells": on_parts.double().mean(1),
    }
    table.rows = {name: {"on parts": bootstrap_mean(values)} for name, values in rows.items()}
    table.notes = [
        "Cells on the differing parts as above. The redrawn bird differs in these parts alone: what its change spreads "
        "over other cells is the net's receptive field, and bounds what any explanation by cells can put on the parts."
    ]
    return table


if __name__ == "__main__":
    main()
