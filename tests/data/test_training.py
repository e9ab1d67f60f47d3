"""Training is repeatable and resumable, checkpoints are checked when they are read, and the shipped ones are what
they say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finecf.data import SyntheticBirds, config_hash, digits
from finecf.models.checkpoints import SHIPPED
from finecf.regions.baseline import gaussian_blur
from finecf.training import (
    BirdsNet,
    load_birds_net,
    load_checkpoint,
    load_digits_net,
    predict,
    train_birds,
    train_digits,
)
from finecf.training.nets import DigitsNet
from finecf.training.train import _fit, _Recipe, _softened

TINY: dict[str, Any] = {"epochs": 3, "images": 96, "test_images": 40, "size": 32, "batch": 32}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "birds.safetensors"
    train_birds(out, **TINY)
    return out


def test_training_is_repeatable_and_describes_itself(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    state = torch.random.get_rng_state()
    meta = train_birds(tmp_path / "b.safetensors", progress=lambda *report: seen.append(report), **TINY)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (tmp_path / "b.safetensors").read_bytes() == tiny.read_bytes()
    assert meta["classes"] == SyntheticBirds(n=1).class_names
    assert meta["config_hash"] == config_hash()
    assert meta["command"] == "finecf train birds --images 96 --epochs 3 --seed 0 --precision float32"
    assert 0 <= meta["mistakes_in_family"] <= meta["mistakes"] <= 40
    assert meta["accuracy"] == pytest.approx(1 - meta["mistakes"] / 40, abs=1e-4)
    assert seen[-1] == ("train", 9, 9)
    assert {stage for stage, _, _ in seen} == {"draw train", "draw test", "train"}
    assert not list(tmp_path.glob("*.resume"))


def test_an_interrupted_run_is_resumed_to_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "birds.safetensors"

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == 5:  # in the middle of the second epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_birds(out, progress=interrupt, **TINY)
    assert not out.exists()
    steps: list[int] = []
    train_birds(out, progress=lambda stage, done, total: steps.append(done) if stage == "train" else None, **TINY)
    assert steps == [4, 5, 6, 7, 8, 9]
    assert out.read_bytes() == tiny.read_bytes()


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "birds.safetensors"

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_birds(out, progress=interrupt, **TINY)
    with pytest.raises(ValueError, match=r"resume: .*birds.safetensors.resume is of a run with other settings"):
        train_birds(out, **{**TINY, "epochs": 4})
    state = out.with_name(out.name + ".resume")
    state.write_bytes(state.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"resume: .*birds.safetensors.resume is truncated"):
        train_birds(out, **TINY)
    train_birds(out, resume=False, **{**TINY, "epochs": 1})
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs: expected a whole number from 1 on, got 0"),
        ({"images": 8}, r"images: expected at least one batch \(32\), got 8"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"precision": "float16"}, "precision: expected 'float32' or 'bfloat16'"),
    ],
)
def test_bad_settings_get_a_sentence(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_birds(tmp_path / "b.safetensors", **{**TINY, **arguments})


def test_bfloat16_and_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = train_birds(tmp_path / "b.safetensors", precision="bfloat16", progress=True, **{**TINY, "epochs": 1})
    assert meta["recipe"]["precision"] == "bfloat16"
    assert "draw train: 100%" in capsys.readouterr().err
    meta = train_digits(tmp_path / "d.safetensors", epochs=2)
    assert meta["accuracy"] > 0.7
    net, read = load_digits_net(tmp_path / "d.safetensors")
    assert read == meta
    assert predict(net, digits("test").batch()[:5]).shape == (5,)


def test_a_checkpoint_reads_back(tiny: Path) -> None:
    net, meta = load_birds_net(tiny)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert meta["recipe"]["epochs"] == 3


def test_broken_checkpoints_get_a_sentence(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    broken = tmp_path / "broken.safetensors"
    for length in (0, 5, 200, len(content) // 2, len(content) - 1):
        broken.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"broken.safetensors \({length} bytes\) is truncated or not"):
            load_birds_net(broken)
    flipped = bytearray(content)
    flipped[-1000] ^= 1
    broken.write_bytes(flipped)
    with pytest.raises(ValueError, match="are not those that were saved"):
        load_birds_net(broken)
    save_file(load_file(tiny), broken)
    with pytest.raises(ValueError, match="expected a description under 'finecf'"):
        load_birds_net(broken)
    with pytest.raises(ValueError, match=r"expected a DigitsNet in .*, got 'BirdsNet'"):
        load_digits_net(tiny)
    with pytest.raises(FileNotFoundError, match=r"expected a file at .*none.safetensors, found none"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_the_last_map_is_8_by_8() -> None:
    net = BirdsNet().eval()
    maps: list[torch.Tensor] = []
    handle = net.layer3.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.no_grad():
        logits = net(torch.rand(2, 3, 128, 128))
    handle.remove()
    assert maps[0].shape == (2, 128, 8, 8)
    assert torch.allclose(logits, net.fc(maps[0].mean((2, 3))), atol=1e-5)


def test_the_shipped_birds_net() -> None:
    assert (SHIPPED / "birds.safetensors").stat().st_size <= 5_000_000
    net, meta = load_birds_net()
    assert meta["config_hash"] == config_hash()
    birds = SyntheticBirds("test", n=400, size=meta["size"])
    assert meta["classes"] == birds.class_names
    predicted = predict(net, torch.from_numpy(birds.images()).permute(0, 3, 1, 2)).numpy()
    wrong = predicted != birds.labels
    assert abs((1 - wrong.mean()) - meta["accuracy"]) < 0.06
    assert (predicted // 4 == birds.labels // 4)[wrong].mean() > 0.8
    assert meta["mistakes_in_family"] >= 300


def test_the_shipped_digits_net() -> None:
    net, meta = load_digits_net()
    test = digits("test")
    wrong = int((predict(net, test.batch()).numpy() != np.asarray(test.labels)).sum())
    assert abs(wrong - meta["mistakes"]) <= 1  # another processor may round a close call the other way
    assert meta["accuracy"] >= 0.97


def test_every_second_picture_is_blurred_and_a_net_is_trained_on_that(tmp_path: Path) -> None:
    pictures = torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    softened = _softened(pictures, 2.0, torch.Generator().manual_seed(1))
    sigma = 2.0 * float(torch.rand((), generator=torch.Generator().manual_seed(1)))
    assert torch.equal(softened[1::2], pictures[1::2])
    torch.testing.assert_close(softened[::2], gaussian_blur(pictures[::2], sigma))
    trained = []
    for blur in (0.0, 1.0):
        recipe = _Recipe(4, 5, 1e-2, 0.0, 0, "float32", augment=False, blur=blur)
        assert recipe.told().get("blur") == (blur or None)
        torch.manual_seed(0)
        net = DigitsNet(2, width=4, channels=1)
        state = tmp_path / f"{blur}.resume"
        _fit(net, pictures, torch.tensor([0, 1, 0, 1, 0]), recipe, {}, state, False, lambda *_: None)
        trained.append(net.fc.weight.detach())
    assert not torch.equal(*trained)
