"""How near the redrawn bird a decoder of Mirror-CFE comes that is taught it: what a decoder could do, not what it may.

`finecf train mirror --on birds` learns from images and the classifier alone. Here a decoder of the same build is taught
what the generator draws for the other class, on training birds, and graded on held-out ones by the tables of
`benchmarks/mirror.py`. No such pairs exist outside drawn data, and no decoder that ships has seen any. What it draws is
not softened: it was taught to draw it.

    python benchmarks/mirror_limit.py --steps 600 --images 120
"""

from __future__ import annotations

from statistics import fmean

import rich
import torch
from mirror import birds_options, score
from torch import Tensor
from tqdm import trange

import finecf
from finecf.data.birds import SyntheticBirds
from finecf.explainers._mirror_draw import draw_pair
from finecf.explainers._mirror_fit import partners_of
from finecf.explainers._reflection import GapHead, map_steps, shifted_maps
from finecf.models import Classifier
from finecf.models.decoder import MirrorDecoder, shape_of
from finecf.training import mirror_classifier, mirror_recipe
from finecf.training.mirror import BIRDS, KNOWN_BIRDS

BATCH = 16
RATE = 1.5e-3


def taught_pairs(classifier: Classifier, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Birds uint8 [N,3,H,W] that the classifier recognises, their classes, other ones, and the birds redrawn so."""
    birds = SyntheticBirds("train", n=KNOWN_BIRDS + count)
    partners = partners_of(mirror_recipe("birds").pairs)
    draws = torch.Generator().manual_seed(0)
    rows = []
    for number in range(KNOWN_BIRDS, KNOWN_BIRDS + count):
        item = birds[number]
        others = partners.get(item.label, [])
        if others and int(classifier.logits(item.tensor[None]).argmax()) == item.label == item.drawn_label:
            target = others[int(torch.randint(len(others), (), generator=draws))]
            pictures = [(each.tensor * 255).round().to(torch.uint8) for each in (item, birds.redraw(item, target))]
            rows.append((pictures[0], item.label, target, pictures[1]))
    images, source, target, redrawn = zip(*rows, strict=True)
    return torch.stack(images), torch.tensor(source), torch.tensor(target), torch.stack(redrawn)


def drawn(
    classifier: Classifier, head: GapHead, decoder: MirrorDecoder, x: Tensor, source: Tensor, target: Tensor, k: Tensor
) -> Tensor:
    """The images at k [B], with their graph."""
    *skips, features = classifier.pyramid(x)
    reflected = head.reflect(features.mean((2, 3)), source, target, "closed_form")
    moved = shifted_maps(features, map_steps(head, reflected, features, source, target, "per_cell"), k)
    return draw_pair(classifier, decoder, x, (moved, features), skips, (source, target), k)[0]


def teach(classifier: Classifier, steps: int, count: int) -> MirrorDecoder:
    """A decoder of the recipe's build, taught the redrawn birds by the L1 distance over what differs, and over all."""
    images, source, target, redrawn = taught_pairs(classifier, count)
    fold = classifier.fold(classifier.features(images[:2].float() / 255))
    assert fold is not None
    head = GapHead.linear(fold.weight, fold.bias)
    torch.manual_seed(0)
    decoder = MirrorDecoder(shape_of(classifier, images[0].float() / 255), **mirror_recipe("birds").settings["decoder"])
    decoder.train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=RATE, betas=(0.5, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=RATE / 100)
    draws = torch.Generator().manual_seed(0)
    apart: list[float] = []
    for _ in (bar := trange(steps, desc="teaching")):
        rows = torch.randint(len(images), (BATCH,), generator=draws)
        k = 0.5 + 0.5 * torch.rand(BATCH, generator=draws, dtype=torch.float64)
        x, true = images[rows].float() / 255, redrawn[rows].float() / 255
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = drawn(classifier, head, decoder, x, source[rows], target[rows], k)
        distance = (found - true).abs().mean(1)
        differs = (true - x).abs().amax(1) > 1.5 / 255
        there = distance[differs].mean()
        optimiser.zero_grad()
        (there + 5 * distance.mean()).backward()
        optimiser.step()
        schedule.step()
        apart.append(float(there.detach()))
        bar.set_postfix(apart=f"{fmean(apart[-100:]):.4f}")
    return decoder.eval().requires_grad_(False)


def main() -> None:
    options = birds_options(__doc__, steps=600, birds=BIRDS)
    classifier = mirror_classifier("birds")
    decoder = teach(classifier, options.steps, options.birds)
    written = []
    for corrections in (0, 8):
        tables, _ = score(
            "birds", finecf.MirrorCFE(classifier, decoder, shift="per_cell", corrections=corrections), options
        )
        for table in tables:
            table.title += f", taught the redrawn birds, {corrections} corrections"
            rich.print(table)
            written.append(table.markdown())
        if options.markdown is not None:
            options.markdown.write_text("\n".join(written), encoding="utf-8")


if __name__ == "__main__":
    main()
