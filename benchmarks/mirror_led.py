"""Whether the birds' classifier leads an image towards the redrawn bird, when nothing has to be learned.

A decoder of Mirror-CFE follows the classifier's gradients. Here images are changed by these gradients themselves, each
until the classifier calls it the target: by pixels, by recolouring (a bilateral grid of affine maps of the colours, so
that edges stay edges: Chen et al., SIGGRAPH 2016), by warping (Xiao et al., ICLR 2018: marks of look-alikes are also
matters of outline), or by both. Each goes anywhere, and then only where it is told that the redrawn bird differs (by
more than a level of 255, or within 4 pixels of that), which no explainer knows. Beside them, blends of the image with
the redrawn bird. Columns are those of `benchmarks/mirror.py`.

    python benchmarks/mirror_led.py --images 120
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from mirror import birds_options, chosen_images, logits_of, nearer, publish, redrawn_birds
from torch import Tensor

from finecf.explainers._shared import lead_of
from finecf.metrics import redraw_distances
from finecf.metrics.tables import Table
from finecf.models import Classifier
from finecf.training import mirror_classifier, mirror_recipe

CELLS = 16
"""Nodes a side of the grids by which images are recoloured and warped."""
LEVELS = 8
"""Nodes over brightness of the grid of recolourings."""
REACH = 4
"""Pixels around what differs where a change that is told its place may go."""
RATES = {"pixels": 1e-3, "recolouring": 3e-3, "warping": 2e-3}
"""Of Adam: shares of the range, entries of the affine maps, and halves of the image's side."""

Change = Callable[[list[Tensor], Tensor, Tensor], Tensor]
"""Parameters with one row for each image, images and where they may change -> changed images."""


def by_pixels(parameters: list[Tensor], images: Tensor, place: Tensor) -> Tensor:
    """Images plus [B,3,H,W]."""
    return images + place * parameters[0]


def by_recolouring(parameters: list[Tensor], images: Tensor, place: Tensor) -> Tensor:
    """Images plus an affine map of their colours, read from [B,12,levels,cells,cells] at place and brightness."""
    grid = _places(images)
    at = torch.cat([grid, 2 * images.mean(1)[..., None] - 1], 3)[:, None]
    found = F.grid_sample(parameters[0], at, align_corners=True, padding_mode="border")[:, :, 0]
    matrix, offset = found[:, :9].unflatten(1, (3, 3)), found[:, 9:]
    return images + place * (torch.einsum("bijhw,bjhw->bihw", matrix, images) + offset)


def by_warping(parameters: list[Tensor], images: Tensor, place: Tensor) -> Tensor:
    """Images read elsewhere, by [B,2,cells,cells] in halves of their side."""
    shift = F.interpolate(parameters[0], size=images.shape[-2:], mode="bicubic", align_corners=True)
    at = _places(images) + (place * shift).permute(0, 2, 3, 1)
    return F.grid_sample(images, at, align_corners=True, padding_mode="border")


def by_both(parameters: list[Tensor], images: Tensor, place: Tensor) -> Tensor:
    """Warped, then recoloured."""
    return by_recolouring(parameters[1:], by_warping(parameters[:1], images, place), place)


def _places(images: Tensor) -> Tensor:
    """[B,H,W,2] in [-1,1], as grid_sample reads them."""
    count, _, height, width = images.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([x, y], 2).expand(count, height, width, 2)


def changes(shape: torch.Size) -> dict[str, tuple[Change, list[tuple[tuple[int, ...], float]]]]:
    """Each kind of change with the shapes of its parameters and their rates."""
    pixels = (tuple(shape[1:]), RATES["pixels"])
    recolouring = ((12, LEVELS, CELLS, CELLS), RATES["recolouring"])
    warping = ((2, CELLS, CELLS), RATES["warping"])
    return {
        "pixels": (by_pixels, [pixels]),
        "recolouring": (by_recolouring, [recolouring]),
        "warping": (by_warping, [warping]),
        "warping and recolouring": (by_both, [warping, recolouring]),
    }


def lead(
    classifier: Classifier, images: Tensor, target: Tensor, place: Tensor, kind: str, steps: int
) -> tuple[Tensor, Tensor]:
    """The first changed image that is called the target, and whether there is one."""
    change, kinds = changes(images.shape)[kind]
    parameters = [torch.zeros(len(images), *size, requires_grad=True) for size, _ in kinds]
    rates = [rate for _, rate in kinds]
    adam = torch.optim.Adam([{"params": [own], "lr": rate} for own, rate in zip(parameters, rates, strict=True)])
    found, led = torch.zeros(len(images), dtype=torch.bool), images.clone()
    for number in range(steps + 1):
        rows = (~found).nonzero()[:, 0]
        if not len(rows):
            break
        changed = change([own[rows] for own in parameters], images[rows], place[rows]).clamp(0, 1)
        with classifier.frozen():
            _, logits = classifier.encode(changed)
        short = -lead_of(logits, target[rows])
        over = short.detach() < 0
        led[rows[over]], found[rows[over]] = changed.detach()[over], True
        if number == steps:
            break
        adam.zero_grad()
        short.sum().backward()
        adam.step()
    return led, found


def main() -> None:
    options = birds_options(__doc__, steps=200)
    classifier = mirror_classifier("birds")
    numbers, x, target = chosen_images("birds", classifier, mirror_recipe("birds").pairs, options)
    birds, items, true = redrawn_birds(numbers, target, options)
    table = Table(f"birds: {len(x)} held-out images, led without a decoder", [])

    def enter(name: str, led: Tensor, found: Tensor) -> None:
        scores = redraw_distances(birds, items, x, led, target)
        seen = scores.graded & found
        table.rows[name] = {"found": float(found.double().mean())}
        if not seen.any():
            return
        table.rows[name] |= {
            "L1": float((led - x).abs().mean((1, 2, 3))[found].mean()),
            "birds": int(seen.sum()),
            "times their area": float(scores.energy[seen].mean() / scores.area[seen].mean()),
            **nearer(scores, seen),
        }

    for share in (0.25, 0.5, 0.75, 1.0):
        blended = x.lerp(true, share)
        said = logits_of(classifier, blended).argmax(1)
        enter(f"{share:g} of the way to the redrawn bird", blended, said == target)
    differs = ((true - x).abs().amax(1, keepdim=True) > 1.5 / 255).float()
    told = F.max_pool2d(differs, 2 * REACH + 1, 1, REACH)
    for where, place in (("anywhere", torch.ones_like(told)), ("told where", told)):
        for kind in changes(x.shape):
            enter(f"{kind}, {where}", *lead(classifier, x, target, place, kind, options.steps))
    table.columns = list(max(table.rows.values(), key=len))
    table.notes.append("Scored on those that are called the target. Inside, outside: negative is closer.")
    publish([table], options.markdown)


if __name__ == "__main__":
    main()
