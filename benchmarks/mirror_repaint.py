"""Whether counterfactual birds end nearer to the redrawn bird when they start from a repainted one (O).

A decoder of Mirror-CFE is asked to cross the classifier's boundary, and what crosses it need not look like the other
class. A painter is asked for looks alone: real birds are spoiled where the classifier's evidence for their class
against a look-alike lies, and a small U-net that is told the class mends them. No pair of bird and redrawn bird is seen
in training, and no gradient of the classifier. A bird is repainted by adding what the painter mends for the target
minus what it mends for the source, from the same spoiled bird, so that what it does not know cancels. Mirror-CFE's
change comes on top, and of it what suffices (`finecf.explainers.trim`) is kept.

    python benchmarks/mirror_repaint.py --steps 8000 --images 500 --threads 2

trains for about 20 minutes of two cores. Columns are those of `benchmarks/mirror.py`.
"""

from __future__ import annotations

from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from mirror import birds_options, chosen_images, logits_of, nearer, publish, redrawn_birds
from torch import Tensor, nn
from tqdm import trange

import finecf
from finecf.data.birds import SyntheticBirds
from finecf.explainers import trim
from finecf.explainers._mirror_fit import partners_of
from finecf.metrics import redraw_distances
from finecf.metrics.bootstrap import paired_bootstrap
from finecf.metrics.tables import Table
from finecf.models import Classifier
from finecf.models.decoder import activation_prior
from finecf.training import mirror_classifier, mirror_recipe, shipped_decoder

BATCH = 32
RATE = 1.5e-3
WINDOW = 64
"""Pixels a side that the painter sees, around what is to be mended."""
COARSE = 8
"""Pixels a side of the squares whose mean colours are all that is left where a bird is spoiled."""
CAST, GRAIN = 0.15, 0.08
"""Standard deviations by which these are off: the gain of each channel, and its offset and each square's colour."""
SHARES = (0.25, 0.8)
"""In training, marks are where the evidence is above such a share of its largest."""
SHARE = 0.5
"""The same when birds are repainted."""
DRAWS = 3
"""Spoiled birds over which a repainted one is a mean."""
ROUNDS = 2


class Block(nn.Module):
    """Two convolutions; what follows the first is scaled and shifted by the class (Perez et al., AAAI 2018)."""

    def __init__(self, channels: int, width: int, told: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, width), nn.GroupNorm(8, width)])
        self.film = nn.Linear(told, 2 * width)
        self.past: nn.Module = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        gain, offset = self.film(told)[:, :, None, None].chunk(2, 1)
        seen = F.silu(self.norms[0](self.first(x)) * (1 + gain) + offset)
        mended: Tensor = self.past(x) + F.silu(self.norms[1](self.second(seen)))
        return mended


class Painter(nn.Module):
    """Spoiled images [B,3,S,S], S a multiple of 32, where they are spoiled [B,1,S,S], and classes [B] -> mended."""

    def __init__(self, classes: int, widths: tuple[int, ...] = (32, 48, 96, 128, 128), told: int = 64) -> None:
        super().__init__()
        self.told = nn.Embedding(classes, told)
        self.stem = nn.Conv2d(16, widths[0], 3, padding=1)
        self.down = nn.ModuleList([Block(widths[max(n - 1, 0)], width, told) for n, width in enumerate(widths)])
        self.middle = Block(widths[-1], widths[-1], told)
        self.up = nn.ModuleList([Block(widths[n + 1] + widths[n], widths[n], told) for n in range(len(widths) - 1)])
        self.out = nn.Conv2d(widths[0], 12, 3, padding=1)

    def forward(self, spoiled: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
        told = self.told(classes)
        x = self.stem(F.pixel_unshuffle(torch.cat([spoiled, mask], 1), 2))
        seen = []
        for number, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if number else x, told)
            seen.append(x)
        x = self.middle(x, told)
        for number in reversed(range(len(self.up))):
            x = self.up[number](torch.cat([F.interpolate(x, scale_factor=2), seen[number]], 1), told)
        return F.pixel_shuffle(self.out(x), 2)


def spoil(images: Tensor, mask: Tensor, draws: torch.Generator) -> Tensor:
    """Images of which, inside a mask [B,1,S,S], only coarse colours are left, and these are off."""
    coarse = F.avg_pool2d(images, COARSE)
    each = (len(images), 3, 1, 1)
    coarse = coarse * (1 + CAST * torch.randn(each, generator=draws)) + GRAIN * torch.randn(each, generator=draws)
    coarse = coarse + GRAIN * torch.randn(coarse.shape, generator=draws)
    coarse = F.interpolate(coarse, scale_factor=COARSE, mode="bilinear", align_corners=False)
    return images * (1 - mask) + coarse * mask


def marks_of(weight: Tensor, maps: Tensor, source: Tensor, target: Tensor, share: Tensor) -> Tensor:
    """Where the evidence for either class against the other is above a share [B] of its largest: float [B,1,h,w]."""
    evidence = ((weight[source] - weight[target])[:, :, None, None] * maps).sum(1)
    return activation_prior(evidence, -evidence, 1 - share, (0.0, 1.0))[:, None]


class Windows:
    """Squares of images, with their upper left corners [B,2]."""

    def __init__(self, corners: Tensor, side: int) -> None:
        self.corners = corners.clamp(0, side - WINDOW).tolist()

    def cut(self, images: Tensor) -> Tensor:
        cut = [each[:, r : r + WINDOW, c : c + WINDOW] for each, (r, c) in zip(images, self.corners, strict=True)]
        return torch.stack(cut)

    def put_back(self, squares: Tensor, like: Tensor) -> Tensor:
        """Squares where they were cut out, zero elsewhere: [B,Ch,H,W]."""
        images = squares.new_zeros(len(squares), squares.shape[1], *like.shape[2:])
        for each, square, (r, c) in zip(images, squares, self.corners, strict=True):
            each[:, r : r + WINDOW, c : c + WINDOW] = square
        return images


class Known:
    """Training birds that the classifier recognises: uint8 images [N,3,H,W], labels [N] and maps [N,D,h,w]."""

    def __init__(self, classifier: Classifier, count: int) -> None:
        birds = SyntheticBirds("train", n=count)
        images = torch.from_numpy(np.array(birds.images())).permute(0, 3, 1, 2)
        read = [classifier.features_and_logits(part.float() / 255) for part in images.split(64)]
        labels = torch.from_numpy(birds.labels)
        rows = (torch.cat([logits for _, logits in read]).argmax(1) == labels).nonzero()[:, 0]
        self.images, self.labels = images[rows], labels[rows]
        self.maps = torch.cat([maps.half() for maps, _ in read])[rows]

    def spoilable(self, weight: Tensor, partners: dict[int, list[int]], draws: torch.Generator) -> tuple[Tensor, ...]:
        """Windows of some birds, where they are to be spoiled, and their classes."""

        def below(high: int) -> int:
            return int(torch.randint(high, (), generator=draws))

        rows = torch.randint(len(self.images), (BATCH,), generator=draws)
        source = self.labels[rows]
        others = [partners[int(label)] for label in source]
        target = torch.tensor([each[below(len(each))] for each in others])
        share = SHARES[0] + (SHARES[1] - SHARES[0]) * torch.rand(BATCH, generator=draws)
        marks = marks_of(weight, self.maps[rows].float(), source, target, share)
        masks = F.interpolate(marks, self.images.shape[-2:])
        corners = []
        for mask in masks:
            places = mask[0].nonzero()
            jitter = torch.randint(-20, 21, (2,), generator=draws)
            corners.append(places[below(len(places))] + jitter - WINDOW // 2)
        windows = Windows(torch.stack(corners), self.images.shape[-1])
        masks = windows.cut(masks)
        for mask in masks:  # other places too, so that the painter learns birds as well as their marks
            if mask.mean() < 0.04 or below(5) == 0:
                top, left, height, width = below(WINDOW - 14), below(WINDOW - 14), 14 + below(22), 14 + below(22)
                mask[:, top : top + height, left : left + width] = 1
        images = windows.cut(self.images[rows]).float() / 255
        if below(2):
            images, masks = images.flip(3), masks.flip(3)
        return images, masks, source


def taught(weight: Tensor, known: Known, steps: int) -> Painter:
    """A painter that has learned to mend, by the L1 distance where a bird was spoiled."""
    partners = partners_of(mirror_recipe("birds").pairs)
    torch.manual_seed(0)
    painter = Painter(len(weight)).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(painter.parameters(), lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    draws = torch.Generator().manual_seed(0)
    off: list[float] = []
    for _ in (bar := trange(steps, desc="teaching", mininterval=10)):
        images, mask, labels = known.spoilable(weight, partners, draws)
        spoiled = spoil(images, mask, draws).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mended = painter(spoiled, mask, labels)
        loss = ((mended.float() - images).abs() * mask).sum() / (3 * mask.sum())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(painter.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        off.append(float(loss.detach()))
        bar.set_postfix(off=f"{fmean(off[-200:]):.4f}")
    return painter.eval().requires_grad_(False)


def repainted(painter: Painter, images: Tensor, marks: Tensor, source: Tensor, target: Tensor, rounds: int) -> Tensor:
    """Images [B,3,H,W] of which the marks [B,1,h,w] look more like the target: what is mended for it minus what is
    mended for the source, added as often as there are rounds.
    """
    masks = F.interpolate(marks, images.shape[2:])
    middle = torch.stack([mask[0].nonzero().float().mean(0).round().long() for mask in masks])
    windows = Windows(middle - WINDOW // 2, images.shape[-1])
    mask = windows.cut(masks)
    draws = torch.Generator().manual_seed(0)
    shown = images
    for _ in range(rounds):
        change = torch.zeros_like(images)
        for _ in range(DRAWS):
            spoiled = spoil(windows.cut(shown), mask, draws)
            apart = mask * (painter(spoiled, mask, target) - painter(spoiled, mask, source))
            change += windows.put_back(apart, images) / DRAWS
        shown = (shown + change).clamp(0, 1)
    return shown


def main() -> None:
    options = birds_options(__doc__, steps=8000, birds=16_000)
    classifier = mirror_classifier("birds")
    numbers, x, target = chosen_images("birds", classifier, mirror_recipe("birds").pairs, options)
    birds, items, _ = redrawn_birds(numbers, target, options)
    maps = classifier.features(x)
    fold = classifier.fold(maps)
    assert fold is not None
    weight = fold.weight.float()
    painter = taught(weight, Known(classifier, options.birds), options.steps)
    source = logits_of(classifier, x).argmax(1)
    marks = marks_of(weight, maps, source, target, torch.full((len(x),), SHARE))
    drawn = finecf.MirrorCFE(classifier, shipped_decoder("birds")).explain(x, target, steps=[0.0, 1.0])
    change = torch.stack([each.mirror_image for each in drawn]) - x
    table = Table(f"birds: {len(x)} held-out images, repainted", [])

    def enter(name: str, images: Tensor) -> Tensor:
        """A row over all birds, and the distances inside, [B]."""
        scores = redraw_distances(birds, items, x, images, target)
        seen = scores.graded
        found = logits_of(classifier, images).argmax(1) == target
        table.rows[name] = {
            "found": float(found.double().mean()),
            "L1": float((images - x).abs().mean()),
            "birds": int(seen.sum()),
            "times their area": float(scores.energy[seen].mean() / scores.area[seen].mean()),
            **nearer(scores, seen),
        }
        return scores.inside

    def trimmed(start: Tensor) -> Tensor:
        return trim(classifier, start, (start + change).clamp(0, 1), target).images

    alone = enter("trimmed", trimmed(x))
    for rounds in range(1, ROUNDS + 1):
        start = repainted(painter, x, marks, source, target, rounds)
        enter(f"repainted {rounds} x", start)
        inside = enter(f"repainted {rounds} x, and trimmed", trimmed(start))
        seen = ~inside.isnan()
        less = paired_bootstrap(inside[seen], alone[seen])
        table.notes.append(f"Repainted {rounds} x and trimmed, inside, minus trimmed alone: {less}.")
    table.columns = list(table.rows["trimmed"])
    table.notes.append("Scored on all birds, found or not. Inside, outside: negative is closer.")
    publish([table], options.markdown)


if __name__ == "__main__":
    main()
