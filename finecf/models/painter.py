"""A network that mends spoiled parts of images of a class that it is told (ours).

A U-net (Ronneberger et al., MICCAI 2015) on blocks of 2 x 2 pixels, whose blocks are scaled and shifted by the class
(FiLM, Perez et al., AAAI 2018).
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finecf.models.checkpoints import load_checkpoint, save_checkpoint
from finecf.models.decoder import Range, bounds_of, plain_range

KIND: Final = "painter"
WIDTHS: Final = (32, 48, 96, 128, 128)
_GROUPS = 8


class _Block(nn.Module):
    """Two convolutions; what follows the first is scaled and shifted by the class."""

    def __init__(self, channels: int, width: int, told: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(_GROUPS, width), nn.GroupNorm(_GROUPS, width)])
        self.film = nn.Linear(told, 2 * width)
        self.past: nn.Module = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        gain, offset = self.film(told)[:, :, None, None].chunk(2, 1)
        seen = F.silu(self.norms[0](self.first(x)) * (1 + gain) + offset)
        mended: Tensor = self.past(x) + F.silu(self.norms[1](self.second(seen)))
        return mended


class Painter(nn.Module):
    """Windows of images, spoiled where a mask says so, and classes -> the windows mended.

    Args:
        classes: of the classifier.
        channels: of the images.
        window: pixels a side of the windows, a multiple of `multiple(widths)`.
        widths: channels of the stages, from half the window's resolution down, multiples of 8.
        told: numbers that a class is described by.
        image_range: (least, largest) value of the images, a number or one per channel.

    Raises:
        ValueError: a window or widths that do not fit, or an image range that is none.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        window: int = 64,
        widths: Sequence[int] = WIDTHS,
        told: int = 64,
        image_range: Range = (0.0, 1.0),
    ) -> None:
        super().__init__()
        classes, channels, window, told = (operator.index(each) for each in (classes, channels, window, told))
        widths = [operator.index(each) for each in widths]
        if not widths or any(width < _GROUPS or width % _GROUPS for width in widths):
            raise ValueError(f"widths are channels of the painter's stages, multiples of {_GROUPS}; got {widths}")
        if window < 1 or window % multiple(widths):
            raise ValueError(f"window is a number of pixels, a multiple of {multiple(widths)} here; got {window}")
        for name, bound in zip(("low", "high"), bounds_of(image_range, channels), strict=True):
            self.register_buffer(name, bound)
        self.window = window
        self.settings: dict[str, Any] = {
            "classes": classes,
            "channels": channels,
            "window": window,
            "widths": widths,
            "told": told,
            "image_range": plain_range(image_range),
        }
        self.told = nn.Embedding(classes, told)
        self.stem = nn.Conv2d(4 * (channels + 1), widths[0], 3, padding=1)
        self.down = nn.ModuleList([_Block(widths[max(n - 1, 0)], width, told) for n, width in enumerate(widths)])
        self.middle = _Block(widths[-1], widths[-1], told)
        self.up = nn.ModuleList([_Block(widths[n + 1] + widths[n], widths[n], told) for n in range(len(widths) - 1)])
        self.out = nn.Conv2d(widths[0], 4 * channels, 3, padding=1)

    def forward(self, spoiled: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
        """Windows [B,Ch,S,S] scaled to [0,1], where they are spoiled float [B,1,S,S] of 0 and 1, and int64 [B] ->
        [B,Ch,S,S]; what it gives outside the mask says nothing.
        """
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


def multiple(widths: Sequence[int] = WIDTHS) -> int:
    """What a window must be a multiple of: it is halved once, and once more for every stage but the first."""
    return int(2 ** len(widths))


def save_painter(path: str | os.PathLike[str], painter: Painter, meta: Mapping[str, Any]) -> None:
    """Write a painter (float16) and what is known of it to one safetensors file."""
    save_checkpoint(path, painter, {**meta, "kind": KIND, "settings": painter.settings})


@torch.inference_mode(False)  # the user's own must not make weights that no gradient passes
def load_painter(path: str | os.PathLike[str]) -> tuple[Painter, dict[str, Any]]:
    """A painter in eval mode, without gradients, and its description.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is truncated, changed, or holds something else.
    """
    weights, meta = load_checkpoint(path)
    if meta.get("kind") != KIND:
        raise ValueError(
            f"{path} holds no {KIND}; expected a file that `finecf train repainter` or Repainter.save wrote"
        )
    with torch.random.fork_rng(devices=[]):  # weights are drawn, and replaced at once
        painter = Painter(**meta["settings"])
    # The range is that of the settings: float16 would round it.
    painter.load_state_dict({**weights, "low": painter.low, "high": painter.high})
    return painter.eval().requires_grad_(False), meta
