"""Small classifiers with the quirks of users' models."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEVICE = torch.device(os.environ.get("FINECF_TEST_DEVICE", "cpu"))
"""Where networks and images are: `make gpu-check` sets it to "cuda"."""


class PooledNet(nn.Module):
    """Two convolutions, global average pooling, dropout and a linear layer; functional where users like it."""

    def __init__(self, classes: int = 5, width: int = 12, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, width, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.fc = nn.Linear(width, classes)

    def trunk(self, x: Tensor) -> Tensor:
        return self.body(F.relu(self.norm(self.stem(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.dropout(self.trunk(x).mean((2, 3)), 0.5, self.training))


class ControlFlow(PooledNet):
    """A forward that torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        f = self.trunk(x)
        if float(f.sum()) == float("inf"):
            raise RuntimeError("never")
        return self.fc(f.mean((2, 3)))


class Around(PooledNet):
    """The image reaches the logits by a second way, around `body`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x).mean((2, 3)) + x.mean((1, 2, 3))[:, None])


class ReadsBatchSize(PooledNet):
    """The head reads the input's shape."""

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        return self.fc(self.trunk(x).mean((2, 3)).view(batch, -1))


class Twice(PooledNet):
    """`body` is not called once."""

    def __init__(self) -> None:
        super().__init__(width=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.trunk(x)).mean((2, 3)))


class Flat(PooledNet):
    """Flatten and one linear layer: each cell has weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x).flatten(1))


class ReluBehind(PooledNet):
    """As DenseNet: a functional, in-place ReLU between the layer and the pooling."""

    def __init__(self, classes: int = 5, width: int = 12) -> None:
        super().__init__(classes, width)
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, stride=4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.features(x), inplace=True).mean((2, 3)))


class InPlace(PooledNet):
    """The head works in place on the map."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x).sub_(0.1).abs_().mean((2, 3)))


class InPlaceControlFlow(InPlace):
    """The same, and torch.fx cannot trace it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if float(x.sum()) < float("inf") else 0)


class Tokens(nn.Module):
    """A mean-pooled transformer-like net: `block` gives tokens [B,N,D]."""

    def __init__(self, classes: int = 5, width: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, stride=8)
        self.block = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


def seeded(net: type[nn.Module], seed: int = 0, **arguments: int) -> nn.Module:
    """The net in eval mode, the same at every call."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        return net(**arguments).eval().to(DEVICE)
    finally:
        torch.set_rng_state(state)


def images(count: int, side: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    """Images in [0,1]."""
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
