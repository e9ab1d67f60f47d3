"""The small networks that ship with finecf, and how their checkpoints are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finecf.models.checkpoints import SHIPPED, load_checkpoint

BIRDS_WIDTHS = (16, 32, 64, 128)
DIGITS_WIDTH = 32


def _halving(c_in: int, c_out: int) -> nn.Conv2d:
    """A strided convolution whose outputs are centred on the four pixels they stand for.

    A kernel of 3 is centred on the first of them; four such layers in a row shift the map by half a cell, and every
    cell would look beside the place where it is drawn.
    """
    return nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut (He et al., CVPR 2016): [B,c_in,H,W] to [B,c_out,H/stride,W/stride], stride 1
    or 2.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False) if stride == 1 else _halving(c_in, c_out)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride), nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class BirdsNet(nn.Module):
    """A compact residual net with global average pooling and a linear head.

    Input: float [B,3,H,W], RGB in [0,1] (the scaling is inside); at 128 x 128 the last map (`layer3`) is
    [B,widths[-1],8,8]. Output: float [B,num_classes] logits.
    """

    def __init__(self, num_classes: int = 20, widths: tuple[int, int, int, int] = BIRDS_WIDTHS) -> None:
        super().__init__()
        self.widths = tuple(widths)
        first, second, third, fourth = self.widths
        # Two strided convolutions bring 128 pixels to 32 at once: most of the work is then done on small maps.
        self.stem = nn.Sequential(
            _halving(3, first),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            _halving(first, second),
            nn.BatchNorm2d(second),
            nn.ReLU(),
        )
        self.layer1 = ResidualBlock(second, second)
        self.layer2 = nn.Sequential(ResidualBlock(second, third, 2), ResidualBlock(third, third))
        self.layer3 = ResidualBlock(third, fourth, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(fourth, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem((x - 0.5) * 4.0)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.pool(x).flatten(1))


class DigitsNet(nn.Module):
    """A small residual net for small pictures: [B,channels,32,32] in [0,1] to [B,10] logits; the last map (`layer3`)
    is [B,width,8,8], and [B,width,7,7] for 28 pixels.
    """

    def __init__(self, num_classes: int = 10, width: int = DIGITS_WIDTH, channels: int = 3) -> None:
        super().__init__()
        self.width, self.channels = width, channels
        half = width // 2
        self.layer1 = nn.Sequential(_halving(channels, half), nn.BatchNorm2d(half), nn.ReLU())
        self.layer2 = ResidualBlock(half, width, 2)
        self.layer3 = ResidualBlock(width, width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1((x - 0.5) * 2.0)))
        return self.fc(self.pool(x).flatten(1))


def _load(path: str | os.PathLike[str], architecture: type[nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    weights, meta = load_checkpoint(path)
    if meta.get("architecture") != architecture.__name__:
        raise ValueError(f"checkpoint: expected a {architecture.__name__} in {path}, got {meta.get('architecture')!r}")
    net = architecture(len(meta["classes"]), **meta["arguments"])
    net.load_state_dict(weights)
    net.requires_grad_(False)
    return net.eval(), meta


def load_birds_net(path: str | os.PathLike[str] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The trained birds net (eval mode, no gradients) and its description; default: the checkpoint that ships with
    finecf.

    The description holds `classes` (names), `size` (pixels), `config_hash` (of the generator it was trained on),
    `command`, `accuracy`, `mistakes`, `torch` and the settings of the training. Errors as in `load_checkpoint`.
    """
    return _load(SHIPPED / "birds.safetensors" if path is None else path, BirdsNet)


def load_fashion_net(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """A net that `finecf train fashion` wrote (eval mode, no gradients) and its description; none ships with finecf."""
    return _load(path, DigitsNet)


def load_digits_net(path: str | os.PathLike[str] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The trained digits net (eval mode, no gradients) and its description; default: the checkpoint that ships with
    finecf.
    """
    return _load(SHIPPED / "digits.safetensors" if path is None else path, DigitsNet)


def shipped_decoder(name: str) -> Path:
    """The file of the Mirror-CFE decoder that ships with finecf for the "digits" or the "birds" net.

    Raises FileNotFoundError where none ships.
    """
    return _shipped(f"mirror_{name}", f"Mirror-CFE decoder for {name!r}", f"mirror --on {name}")


def shipped_painter(name: str) -> Path:
    """The file of the `Repainter` that ships with finecf for the "birds" net.

    Raises FileNotFoundError where none ships.
    """
    return _shipped(f"repainter_{name}", f"painter for {name!r}", f"repainter --on {name}")


def _shipped(name: str, what: str, command: str) -> Path:
    file = SHIPPED / f"{name}.safetensors"
    if not file.is_file():
        raise FileNotFoundError(
            f"no {what} ships with finecf (there is no {file.name}); train one with `finecf train {command}`"
        )
    return file
