"""Small networks with random weights for the explainers' tests, one for each kind of head."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

import finecf

DEVICE = torch.device(os.environ.get("FINECF_TEST_DEVICE", "cpu"))
"""Where networks and images are: `make gpu-check` sets it to "cuda"."""

CLASSES = 5
WIDTH = 12
GRID = (4, 4)
SIZE = 32


class SmallNet(nn.Module):
    """[B,3,32,32] -> `trunk` [B,12,4,4] -> head -> [B,5]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, WIDTH, 3, 2, 1), nn.ReLU(), nn.AvgPool2d(2), nn.ReLU()
        )
        self.kind = kind
        if kind == "linear":
            self.fc = nn.Linear(WIDTH, CLASSES)
        elif kind == "first_linear":
            self.hidden = nn.Linear(WIDTH * GRID[0] * GRID[1], 24)
            self.fc = nn.Linear(24, CLASSES)
        else:
            self.norm = nn.LayerNorm(WIDTH)
            self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.trunk(x)
        if self.kind == "linear":
            return self.fc(maps.mean((2, 3)))
        if self.kind == "first_linear":
            return self.fc(self.hidden(maps.flatten(1)).relu())
        return self.fc(self.norm(maps.amax((2, 3))))


def network(kind: str = "linear", seed: int = 0) -> SmallNet:
    """A network whose classes are far enough apart for searches to be interesting, and close enough to flip."""
    torch.manual_seed(seed)
    net = SmallNet(kind)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0 if parameter.ndim > 1 else 0.1)
        # Every class is predicted for some images: logits of zero mean and a spread of one over a sample of them.
        logits = net(images(200, seed=3).cpu())
        net.fc.weight.mul_(1 / logits.std(0, keepdim=True).T)
        net.fc.bias.copy_((net.fc.bias - logits.mean(0)) / logits.std(0))
    return net.eval().to(DEVICE)


def images(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, SIZE, mode="bicubic").clamp(0, 1).to(DEVICE)


def setting(kind: str = "linear", references: int = 60) -> tuple[finecf.Classifier, finecf.CandidateBank]:
    """A wrapped network and a bank in which every reference image has the class that the network gives it."""
    classifier = finecf.wrap(network(kind), layer="trunk", class_names=[f"class {i}" for i in range(CLASSES)])
    x = images(references, seed=2)
    labels = classifier.logits(x).argmax(1)
    return classifier, finecf.CandidateBank.from_loader(classifier, [(x, labels)], progress=False)


def other_classes(
    classifier: finecf.Classifier, bank: finecf.CandidateBank, x: Tensor, *, far: bool = False
) -> list[int]:
    """For each image the most (far: the least) probable class that is not predicted and that the bank holds."""
    order = classifier.logits(x).argsort(1, descending=True)[:, 1:].tolist()
    held = {c for c in bank.classes if bank.class_range(c)[1] > bank.class_range(c)[0]}
    return [next(c for c in (reversed(row) if far else row) if c in held) for row in order]


def stretch(values: Tensor) -> Tensor:
    """A map with its range stretched to [0,1]; zeros where it is constant."""
    span = values.amax() - values.amin()
    return (values - values.amin()) / span if span > 0 else torch.zeros_like(values)
