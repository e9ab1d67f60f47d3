"""The README's examples run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import finecf

README = Path(__file__).resolve().parent.parent / "README.md"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).mean((2, 3)))


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the tests (a copy of the package alone)")
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(examples) == 3
    torch.manual_seed(0)
    model = Small()
    images = torch.rand(60, 3, 32, 32)
    with torch.no_grad():
        model.fc.weight.mul_(50)
        model.fc.bias.sub_(model(images).mean(0))  # no class wins everywhere
        predicted = model(images).argmax(1)
    assert set(predicted.tolist()) == {0, 1, 2}
    names = ["Bohemian Waxwing", "Cedar Waxwing", "Elegant Trogon"]
    given = {
        "model": model,
        "names": names,
        "train_loader": [(images, predicted)],
        "train_data": TensorDataset(images, predicted),
        "image": images[(predicted == 0).nonzero()[0, 0]],
    }
    monkeypatch.chdir(tmp_path)
    exec("".join(examples), given)
    assert (tmp_path / "why.png").stat().st_size > 10_000
    assert (tmp_path / "regions.png").stat().st_size > 10_000
    assert (tmp_path / "mirror.png").stat().st_size > 10_000
    assert (tmp_path / "mirror.gif").stat().st_size > 1_000
    assert (tmp_path / "why.safetensors").exists()
    assert finecf.MirrorCFE(given["clf"], decoder=tmp_path / "waxwings.safetensors").decoder is not None
