"""Spoiling images where the evidence for one class against another lies, and the windows in which that is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from finecf.models.decoder import activation_prior
from finecf.models.painter import multiple

CAST: Final = 0.15
"""Standard deviation by which the gain of each channel is off."""
GRAIN: Final = 0.08
"""Standard deviation by which each channel, and each square of it, is off, as a share of the image range."""
SQUARES: Final = 8
"""Squares along a window's side whose mean colours are all that is left of it."""
LEVELS: Final = (1, 1, 2, 0)
"""Sides of the squares that are left in training, step by step, in those of `SQUARES`; 0: nothing but the class is
told.
"""


def window_step(widths: Sequence[int]) -> int:
    """What a window must be a multiple of: its painter halves it, and squares of every level must fill it."""
    return math.lcm(multiple(widths), SQUARES * max(LEVELS))


def marks_of(evidence: Tensor, share: Tensor) -> Tensor:
    """Where evidence [B,h,w] for either class against the other is above a share [B] of its largest, float [B,1,h,w].

    Two look-alikes differ where their evidence does, and the class that is not shown has evidence of its own.
    """
    return activation_prior(evidence, -evidence, 1 - share, (0.0, 1.0))[:, None]


def spoil(images: Tensor, mask: Tensor, square: int, draws: torch.Generator, alike: bool = False) -> Tensor:
    """Images of which, inside a mask, only the mean colours of squares are left, and these are off.

    Args:
        images: [B,Ch,S,S], scaled to [0,1].
        mask: [B,1,S,S] of 0 and 1.
        square: pixels a side, a divisor of S; 0: nothing is left, not even colours.
        draws: on the CPU, whatever the images are on.
        alike: whether all images are spoiled by the same draws, so that none depends on those beside it.
    """
    if not square:
        return images * (1 - mask)
    coarse = F.avg_pool2d(images, square)
    count = 1 if alike else len(images)

    def noise(scale: float, *size: int) -> Tensor:
        return scale * torch.randn(count, *size, generator=draws).to(images)

    channels, *grid = coarse.shape[1:]
    coarse = coarse * (1 + noise(CAST, channels, 1, 1)) + noise(GRAIN, channels, 1, 1) + noise(GRAIN, channels, *grid)
    coarse = F.interpolate(coarse, scale_factor=square, mode="bilinear", align_corners=False)
    return images * (1 - mask) + coarse * mask


class Windows:
    """Squares of `side` pixels around middles [B,2] (row, column), moved into images of this size."""

    def __init__(self, middles: Tensor, side: int, size: Sequence[int]) -> None:
        most = torch.tensor([each - side for each in size])
        self._corners = torch.minimum((middles - side // 2).clamp_min(0), most).tolist()
        self._side, self._size = side, tuple(size)

    def cut(self, images: Tensor) -> Tensor:
        """Images [B,Ch,H,W] -> [B,Ch,side,side]."""
        cut = [
            each[:, row : row + self._side, column : column + self._side]
            for each, (row, column) in zip(images, self._corners, strict=True)
        ]
        return torch.stack(cut)

    def put_back(self, squares: Tensor) -> Tensor:
        """Squares [B,Ch,side,side] where they were cut out, zero elsewhere: [B,Ch,H,W]."""
        images = squares.new_zeros(len(squares), squares.shape[1], *self._size)
        for each, square, (row, column) in zip(images, squares, self._corners, strict=True):
            each[:, row : row + self._side, column : column + self._side] = square
        return images


def middles_of(masks: Tensor) -> Tensor:
    """The middle of what is marked in each of masks [B,1,H,W], int64 [B,2]; of the mask itself where nothing is."""
    size = torch.tensor(masks.shape[2:])
    places = [mask[0].nonzero().cpu() for mask in masks]
    return torch.stack([each.float().mean(0).round().long() if len(each) else size // 2 for each in places])
