"""FG-VCE graded on SyntheticBirds with the shipped net: the tables of docs/results.md.

    python benchmarks/synthetic_birds.py [--mistakes N] [--checkpoint FILE] [--threads N] [--markdown FILE] [--json FILE]

`finecf evaluate` runs the same (finecf/metrics/evaluate.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import rich
import torch
from torch.utils.data import DataLoader

import finecf
from finecf.data import SyntheticBirds
from finecf.metrics.evaluate import PRESETS, evaluate_birds
from finecf.training.nets import load_birds_net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mistakes", type=int, default=300, help="in-family mistakes to grade")
    parser.add_argument("--images", type=int, default=20_000, help="test images to look at, at most")
    parser.add_argument(
        "--references", type=int, default=1_000, help="images of the val split that the bank is made of"
    )
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--checkpoint", type=Path, help="another net than the shipped one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    net, _ = load_birds_net(arguments.checkpoint)
    # Not the training split: a share of its labels is flipped, so that its cells may be those of another class.
    references = SyntheticBirds("val", n=arguments.references)
    clf = finecf.wrap(net, class_names=references.class_names)
    bank = finecf.CandidateBank.from_loader(clf, DataLoader(references.tensors(), batch_size=64))
    birds = SyntheticBirds("test", n=arguments.images)
    result = evaluate_birds(
        clf, bank, birds, references, mistakes=arguments.mistakes, presets=arguments.presets, progress=True
    )
    for table in result.tables():
        rich.print(table.rich())
    if arguments.markdown:
        arguments.markdown.write_text(result.markdown())
    if arguments.json:
        arguments.json.write_text(json.dumps(result.to_dict(), indent=1))


if __name__ == "__main__":
    main()
