"""Object-level and part-level partition of an image from its class map and contribution map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from finecf.explainers._contributions import minmax
from finecf.explainers.result import Part, upsample

THRESHOLD = 0.5


def object_mask(cam: Tensor, size: tuple[int, int]) -> Tensor:
    """Where, bool [h,w], the class map [H,W], enlarged and stretched to [0,1], is above one half."""
    return _stretched(upsample(cam, size)) > THRESHOLD


def parts(cam: Tensor, contribution: Tensor, size: tuple[int, int]) -> tuple[Tensor, list[Part]]:
    """Label map [h,w] (0: no part) and the parts, by falling summed contribution.

    A part is a connected region (8 neighbours) of the enlarged product of both maps [H,W] above one half of its range.
    """
    product = _stretched(upsample(cam * contribution, size))
    components = label(product > THRESHOLD)
    contributions = upsample(contribution, size)
    rows, columns = contribution.shape
    cell_area = size[0] * size[1] / (rows * columns)
    count = int(components.amax()) if components.numel() else 0
    scores = torch.zeros(count + 1, dtype=torch.float64, device=cam.device)
    scores.index_add_(0, components.flatten(), contributions.flatten().double())
    order = scores[1:].argsort(descending=True, stable=True) + 1
    rank = torch.zeros(count + 1, dtype=torch.int64, device=cam.device)
    rank[order] = torch.arange(1, count + 1, device=cam.device)
    labels = rank[components]
    centres = labels[_centres(rows, size[0], cam.device)][:, _centres(columns, size[1], cam.device)]
    found = []
    for number in range(1, count + 1):
        inside = labels == number
        y, x = inside.nonzero(as_tuple=True)
        peak = int(product.where(inside, -1).argmax())
        cells = set(map(tuple, (centres == number).nonzero().tolist()))
        # A region may be too thin to hold a cell's centre; the cell under its peak always belongs to it.
        cells.add((peak // size[1] * rows // size[0], peak % size[1] * columns // size[1]))
        box = (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
        found.append(Part(tuple(sorted((r, c) for r, c in cells)), box, float(scores[order[number - 1]]) / cell_area))
    return labels, found


def label(mask: Tensor) -> Tensor:
    """Number the connected regions (8 neighbours) of a bool [h,w] mask from 1 in reading order; 0 elsewhere."""
    height, width = mask.shape
    # Every pixel takes the greatest index among its neighbours, then the one that pixel points at: chains halve.
    index = torch.arange(1, height * width + 1, device=mask.device, dtype=torch.float64).view(height, width)
    current = torch.where(mask, index, 0)
    while True:
        spread = F.max_pool2d(current[None, None], 3, stride=1, padding=1)[0, 0]
        flat = torch.cat([current.new_zeros(1), torch.where(mask, spread, 0).flatten()])
        flat = flat[flat.long()]
        flat = flat[flat.long()]
        following = flat[1:].view(height, width)
        if torch.equal(following, current):
            break
        current = following
    roots, number = torch.unique(current.long(), return_inverse=True)
    if bool(mask.all()):
        return number + 1
    first = torch.full((len(roots),), height * width, dtype=torch.int64, device=mask.device)
    first.scatter_reduce_(0, number.flatten(), torch.arange(height * width, device=mask.device), "amin")
    first[0] = -1
    return first.argsort().argsort()[number]


def _stretched(image: Tensor) -> Tensor:
    return minmax(image.flatten()).view_as(image)


def _centres(cells: int, pixels: int, device: torch.device) -> Tensor:
    """The pixel that holds the centre of each cell along one axis."""
    return ((2 * torch.arange(cells, device=device) + 1) * pixels // (2 * cells)).clamp_max(pixels - 1)
