"""How much every cell adds to a class: the contribution maps of FG-VCE's saliency partition."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from finecf import ops
from finecf.explainers._games import Game, LinearGame

METHODS = ("gaussian", "permutation", "exact")
CHUNK = 32
"""Permutations between two looks at the stopping tolerance (the tile of `finecf.ops.permutation_shapley`)."""

EXACT_CELLS = 16


class Contributions(NamedTuple):
    """Contributions of the cells of a batch.

    raw [B,P] signed, in units of the game's value; stderr [B,P] of them where sampled; evaluations: feature maps scored
    per image; samples: permutations drawn per image.
    """

    raw: Tensor
    stderr: Tensor | None
    evaluations: int
    samples: int

    @property
    def map(self) -> Tensor:
        """The map phi [B,P] in [0,1]: the positive contributions, each image's range stretched to [0,1]."""
        return minmax(self.raw.relu())


def minmax(maps: Tensor) -> Tensor:
    """Stretch every map [...,P] to [0,1]; a map that is constant up to rounding becomes zeros."""
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    spread = high - low
    flat = spread <= 8 * torch.finfo(maps.dtype).eps * high.abs()
    return torch.where(flat, 0, (maps - low) / torch.where(flat, 1, spread))


@lru_cache(maxsize=16)
def gaussian_coalitions(grid: tuple[int, int], sigma: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Masks [1+P,P]: the whole map, then for each cell what 1 - G leaves, G a Gaussian of `sigma` cells around it."""
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], device=device, dtype=dtype),
        torch.arange(grid[1], device=device, dtype=dtype),
        indexing="ij",
    )
    at = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    left = 1 - torch.exp(-torch.cdist(at, at).square() / (2 * sigma**2))
    return torch.cat([torch.ones_like(left[:1]), left])


def gaussian(game: Game, classes: Tensor, value: str, sigma: float) -> Contributions:
    """What the class loses when a soft Gaussian around each cell is taken out: phi_raw = v(F) - v(F (1 - G))."""
    masks = gaussian_coalitions(game.grid, sigma, game.logits.device, game.logits.dtype)
    scores = game.masked_scores(masks, classes, value)
    return Contributions(scores[:, :1] - scores[:, 1:], None, game.cells + 1, 0)


def permutation(
    game: Game, classes: Tensor, value: str, samples: int, tolerance: float, generator: torch.Generator
) -> Contributions:
    """Shapley values from random orders of the cells, each order walked forth and back (antithetic pairs).

    Stops after `samples` orders, or when no cell's standard error is above `tolerance` in any image.
    """
    draw = (
        _OperatorSamples(game, classes, value) if isinstance(game, LinearGame) else _MaskSamples(game, classes, value)
    )
    count = 0
    while count < samples:
        orders = torch.stack(
            [torch.randperm(game.cells, generator=generator) for _ in range(min(CHUNK, samples - count))]
        )
        mean, stderr = draw(orders.to(game.logits.device))
        count += len(orders)
        if tolerance > 0 and float(stderr.amax()) <= tolerance:
            break
    return Contributions(mean.to(game.logits.dtype), stderr.to(game.logits.dtype), 2 * count * (game.cells + 1), count)


class _OperatorSamples:
    """Running mean and standard error [B,P] through the compiled operator."""

    def __init__(self, game: LinearGame, classes: Tensor, value: str) -> None:
        self._arguments = game.cell_logits, game.base_logits
        self._classes, self._value = classes, value
        self._state: ops.ShapleyState | None = None

    def __call__(self, orders: Tensor) -> tuple[Tensor, Tensor]:
        result = ops.permutation_shapley(*self._arguments, orders, self._classes, self._value, state=self._state)
        self._state = result.state
        return result.mean, result.stderr


class _MaskSamples:
    """The same for heads that must score every prefix of every order as a masked map."""

    def __init__(self, game: Game, classes: Tensor, value: str) -> None:
        self._game, self._classes, self._value = game, classes, value
        shape = (game.logits.shape[0], game.cells)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=game.logits.device)
        self._squares = torch.zeros_like(self._sum)
        self._count = 0

    def __call__(self, orders: Tensor) -> tuple[Tensor, Tensor]:
        for order in orders:
            sample = (self._walk(order) + self._walk(order.flip(0))) / 2
            self._count += 1
            # Squares are summed about the first sample, so that they do not cancel where the spread is small.
            if self._count == 1:
                self._origin = sample
            self._sum += sample - self._origin
            self._squares += (sample - self._origin).square()
        mean = self._sum / self._count
        if self._count < 2:
            return self._origin + mean, torch.full_like(mean, math.inf)
        variance = (self._squares / self._count - mean.square()).clamp_min(0) * self._count / (self._count - 1)
        return self._origin + mean, (variance / self._count).sqrt()

    def _walk(self, order: Tensor) -> Tensor:
        """Marginals [B,P] along one order, from no cell to all."""
        position = order.argsort()
        steps = torch.arange(len(order) + 1, device=order.device)
        masks = (position < steps[:, None]).to(self._game.logits.dtype)
        marginals = self._game.masked_scores(masks, self._classes, self._value).double().diff(dim=1)
        return marginals[:, position]


def exact(game: Game, classes: Tensor, value: str) -> Contributions:
    """Exact Shapley values: in closed form where the game is additive, else from all 2^P coalitions.

    Raises:
        ValueError: the game is not additive and there are more than 16 cells.
    """
    if value == "logit" and isinstance(game, LinearGame):
        raw = game.cell_logits.gather(2, classes[:, None, None].expand(-1, game.cells, 1))[..., 0]
        return Contributions(raw, None, 1, 0)
    if game.cells > EXACT_CELLS:
        raise ValueError(
            f'contribution "exact" scores 2^P coalitions and takes at most {EXACT_CELLS} cells, got {game.cells}; '
            'use "permutation", or value="logit" with a linear head, whose values have a closed form'
        )
    cells = game.cells
    members = torch.arange(cells, device=game.logits.device)
    coalitions = torch.arange(1 << cells, device=game.logits.device)
    masks = (coalitions[:, None] >> members & 1).to(game.logits.dtype)
    scores = game.masked_scores(masks, classes, value).double()
    sizes = masks.sum(1).long()
    weight = torch.tensor(
        [1 / (cells * math.comb(cells - 1, size)) for size in range(cells)], dtype=torch.float64, device=scores.device
    )
    raw = torch.empty(len(scores), cells, dtype=torch.float64, device=scores.device)
    for cell in range(cells):
        without = coalitions[(coalitions >> cell & 1) == 0]
        gain = scores[:, without | (1 << cell)] - scores[:, without]
        raw[:, cell] = gain @ weight[sizes[without]]
    return Contributions(raw.to(game.logits.dtype), None, 1 << cells, 0)
