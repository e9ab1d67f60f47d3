"""Mirror-CFE at its edges: models that are built otherwise, trainings that go wrong, and what must not be lost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explainers.mirror_nets import DEVICE, GapNet, Mosaic, Painter, coloured, mosaic, others, pictures, wrapped
from explainers.test_mirror import PAIRS, TINY, data, fitted, same_bits, stop_at
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import finecf
from finecf.explainers import TrainingStopped, _mirror_losses
from finecf.explainers._mirror_fit import Pool
from finecf.metrics import pgd
from finecf.models.checkpoints import load_tensors


class ConvHead(GapNet):
    """Its head is a convolution of 1, from which no number of classes can be read."""

    def __init__(self) -> None:
        super().__init__()
        head = nn.Conv2d(12, 4, 1)
        with torch.no_grad():
            head.weight.copy_(self.fc.weight[:, :, None, None])
            head.bias.copy_(self.fc.bias)
        self.fc = head.to(DEVICE).eval()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.fc, nn.Linear):  # while it is built
            return super().forward(x)
        return self.fc(self.block(self.stem(x)).mean((2, 3), keepdim=True)).flatten(1)


class Projecting(GapNet):
    """Has a layer behind the head that classifies nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(12, width).to(DEVICE)


@pytest.mark.parametrize("make", [ConvHead, lambda: Projecting(64), lambda: Projecting(3)], ids=["conv", "64", "3"])
def test_the_number_of_classes_is_that_of_the_logits(make: Any, tmp_path: Path) -> None:
    """Before the first forward it is a guess, by which nothing is refused."""
    file, net = tmp_path / "d.safetensors", make()
    mirror = finecf.MirrorCFE(finecf.wrap(net, layer="block"))
    mirror.fit(data(), None, checkpoint=file, **TINY)
    assert mirror.meta["pairs"] == [(p, q) for p in range(4) for q in range(p + 1, 4)]
    finecf.MirrorCFE(finecf.wrap(net, layer="block")).fit(data(), [(0, 3)], **TINY)
    again = finecf.MirrorCFE(finecf.wrap(net, layer="block"), file)
    assert same_bits_in_half(mirror, again)
    with pytest.raises(ValueError, match="made for another classifier"):
        finecf.MirrorCFE(finecf.wrap(type(net)(5) if isinstance(net, Projecting) else GapNet(), layer="block"), file)


def same_bits_in_half(fresh: finecf.MirrorCFE, read: finecf.MirrorCFE) -> bool:
    assert fresh.decoder is not None
    assert read.decoder is not None
    there = read.decoder.state_dict()
    return all(torch.equal(value.half(), there[name].half()) for name, value in fresh.decoder.state_dict().items())


# ---- models that work in place


class InPlace(Mosaic):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.1
        return super().forward(x)


class Lighter(Painter):
    """What `InPlace` takes away is drawn on top."""

    def forward(self, features: Tensor, skips: Any = (), prepared: Any = (), prior: Any = None) -> Tensor:
        return super().forward(features) + 0.1


def test_a_model_that_works_in_place_gets_a_copy() -> None:
    clf, x = finecf.wrap(InPlace(), layer="block"), coloured((0.6, 0.3, 0.2))
    before = x.clone()
    (found,) = finecf.MirrorCFE(clf, Lighter(), corrections=0).explain(x, 1, steps=[0.0, 1.0])
    assert torch.equal(x, before)
    torch.testing.assert_close(found.mirror_image.mean((1, 2)), torch.tensor([0.3, 0.6, 0.2]))
    with torch.no_grad():
        said = clf.model(found.images.clone().to(DEVICE)).cpu().double()
    torch.testing.assert_close(found.image_logits, said, rtol=0, atol=1e-5)
    attack = pgd(clf, x, 1)
    assert bool(attack.found.all())
    assert torch.equal(x, before)


# ---- trainings that go wrong


def nan_in_the_fifth_step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the fifth reconstruction loss NaN; the list grows with every one."""
    function, calls = _mirror_losses.reconstruction, []

    def broken(*arguments: Any) -> Tensor:
        calls.append(1)
        return function(*arguments) * (math.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(_mirror_losses, "reconstruction", broken)
    return calls


@pytest.mark.parametrize("changed", [{"learning_rate": 1e-4}, {"precision": "bfloat16"}], ids=["rate", "precision"])
def test_after_a_nan_the_advice_can_be_followed(
    changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "d.safetensors", nan_in_the_fifth_step(monkeypatch)
    with pytest.raises(TrainingStopped, match=r"a state may be gone on from with these two changed"):
        fitted(checkpoint=out, save_every=3)
    mirror, losses = fitted(checkpoint=out, **changed)
    assert len(losses) == 6
    assert len(calls) == 5 + 3  # three of the six steps were those of the state
    assert {name: mirror.meta["recipe"][name] for name in changed} == changed


def test_a_state_of_which_the_next_step_diverges_does_not_replace_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "d.safetensors", nan_in_the_fifth_step(monkeypatch)
    with pytest.raises(TrainingStopped, match=r"the last good state is in .*\.resume"):
        fitted(checkpoint=out, save_every=2)
    assert len(calls) == 5
    assert load_tensors(tmp_path / "d.safetensors.resume")[1]["step"] == 2  # that of step 4 gave the NaN
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors.resume"]


def test_what_a_preview_raises_costs_no_state(tmp_path: Path) -> None:
    def broken(done: int, _: finecf.MirrorCFE) -> None:
        if done == 4:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        fitted(checkpoint=tmp_path / "d.safetensors", save_every=4, preview=broken, preview_every=1)
    assert load_tensors(tmp_path / "d.safetensors.resume")[1]["step"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors.resume"]


class Frozen(GapNet):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            maps = self.block(self.stem(x))
        return self.fc(maps.mean((2, 3)))


def test_a_trunk_without_gradients_is_not_trained_for() -> None:
    with pytest.raises(ValueError, match="the decoder learns by the classifier's gradients, and this model gives none"):
        fitted(wrapped(Frozen()))


def test_the_users_inference_mode_changes_nothing() -> None:
    clf, x = wrapped(), data(6)
    wanted = others(clf, x)
    whole, losses = fitted(clf)
    path = finecf.MirrorCFE(clf, reflection="lbfgs").latent_path(x, wanted)
    attack = pgd(clf, x, wanted)
    with torch.inference_mode():
        inside, again = fitted(clf)
        x = x.clone()
        assert torch.equal(finecf.MirrorCFE(clf, reflection="lbfgs").latent_path(x, wanted).logits, path.logits)
        assert torch.equal(pgd(clf, x, wanted).images, attack.images)
    assert same_bits(whole, inside)
    assert losses == again


# ---- data loaders


def test_a_loader_trains_on_what_its_sampler_is_confined_to() -> None:
    clf, everyone = wrapped(), TensorDataset(data())
    chosen = list(range(0, 60, 2))
    for loader in (
        DataLoader(everyone, batch_size=5, sampler=SubsetRandomSampler(chosen)),
        DataLoader(everyone, batch_sampler=BatchSampler(SubsetRandomSampler(chosen), 5, False)),
        DataLoader(Subset(everyone, chosen), batch_size=5, shuffle=True),
    ):
        pool = Pool(clf, loader)
        assert len(pool) == 30
        assert torch.equal(pool.take(torch.tensor([3])), data()[6:7])
    for loader in (
        DataLoader(everyone, batch_size=5),
        DataLoader(everyone, batch_size=None, shuffle=True),
        DataLoader(everyone, batch_sampler=BatchSampler(RandomSampler(everyone), 5, True)),
    ):
        assert len(Pool(clf, loader)) == 60


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"sampler": WeightedRandomSampler([1.0] * 60, 60)}, "WeightedRandomSampler"),
        ({"sampler": SequentialSampler(range(30))}, "SequentialSampler"),
        ({"batch_sampler": [[0, 1], [2]]}, "list"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_loader_that_chooses_otherwise_is_refused(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"draws by a {name}, and fit draws by its own seed: give the data set, or a"):
        Pool(wrapped(), DataLoader(TensorDataset(data()), **arguments))


# ---- explaining


def test_a_target_that_cannot_be_asked_for_is_refused_before_anything_is_drawn() -> None:
    painter = Painter()
    x = coloured(*[(0.6, 0.3, 0.2)] * 12)
    with pytest.raises(ValueError, match="of image 11 are the same, 'red'"):
        finecf.MirrorCFE(mosaic(), painter, corrections=0, micro_batch=4).explain(x, [1] * 11 + [0])
    assert painter.images == 0


class Green(Painter):
    """Draws the same whatever it is given."""

    def forward(self, features: Tensor, skips: Any = (), prepared: Any = (), prior: Any = None) -> Tensor:
        return torch.zeros_like(super().forward(features)) + torch.tensor([0.2, 0.9, 0.1], device=DEVICE)[:, None, None]


def test_a_decoder_that_draws_the_target_whatever_it_is_given_is_told_of() -> None:
    x = coloured((0.6, 0.3, 0.2))
    (found,) = finecf.MirrorCFE(mosaic(), Green(), corrections=0).explain(x, "green", steps=3)
    assert found.taken_at_once
    text = found.summary()
    assert "redrawn at k = 0, with nothing changed, it is already taken for green" in text
    apart = float((found.reconstruction - x[0].cpu()).abs().mean())
    assert f"mean pixel change 0.000 from what is redrawn at k = 0, {apart:.3f} from the image itself" in text
    (good,) = finecf.MirrorCFE(mosaic(), Painter(), corrections=0).explain(x, "green", steps=3)
    assert not good.taken_at_once
    assert "already taken" not in good.summary()


@pytest.mark.parametrize("explainer", [finecf.MirrorCFE, finecf.SMDL])
def test_a_model_that_is_not_wrapped_is_told_apart(explainer: Any) -> None:
    with pytest.raises(TypeError, match=r"classifier is a Mosaic; expected what finecf\.wrap\(model\) returns"):
        explainer(Mosaic())


def test_a_target_must_be_given() -> None:
    with pytest.raises(TypeError, match="target is None; expected a class"):
        finecf.MirrorCFE(mosaic(), Painter()).explain(coloured((0.6, 0.3, 0.2)), None)
    with pytest.raises(TypeError, match="target is None; expected a class"):
        finecf.MirrorCFE(mosaic()).latent_path(coloured((0.6, 0.3, 0.2)), None)


# ---- what is written with a decoder


def test_names_in_another_order_than_the_outputs_are_warned_of(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    file = tmp_path / "d.safetensors"
    net = GapNet()
    names = ["auk", "bee-eater", "crow", "dunnock"]
    finecf.MirrorCFE(finecf.wrap(net, layer="block", class_names=names)).fit(data(), PAIRS, checkpoint=file, **TINY)
    finecf.MirrorCFE(finecf.wrap(net, layer="block", class_names=names), file)
    finecf.MirrorCFE(finecf.wrap(net, layer="block"), file)
    assert not recwarn
    with pytest.warns(
        UserWarning, match=r"output 0 is 'auk' in .* and 'dunnock' in class_names \(3 of 3 classes differ"
    ):
        finecf.MirrorCFE(finecf.wrap(net, layer="block", class_names=names[::-1]), file)
    finecf.MirrorCFE(finecf.wrap(net, layer="block")).fit(data(), PAIRS, checkpoint=file, **TINY)
    finecf.MirrorCFE(finecf.wrap(net, layer="block", class_names=names), file)  # it was trained without names
    assert not recwarn


def test_ctrl_c_says_where_the_training_goes_on(tmp_path: Path) -> None:
    with pytest.raises(
        KeyboardInterrupt, match=r"after 2 of 6 steps; the same call goes on from the state in .*\.resume"
    ):
        fitted(checkpoint=tmp_path / "d.safetensors", preview=stop_at(2), preview_every=1)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted after 2 of 6 steps; no state was written"):
        fitted(preview=stop_at(2), preview_every=1)


def test_files_of_another_kind_are_told_apart(tmp_path: Path) -> None:
    clf = mosaic()
    (found,) = finecf.MirrorCFE(clf, Painter(), corrections=0).explain(coloured((0.6, 0.3, 0.2)), 1, steps=2)
    found.save(tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match="was written by finecf, and holds no weights"):
        finecf.MirrorCFE(clf, tmp_path / "e.safetensors")
    with pytest.raises(FileNotFoundError, match="found a folder"):
        finecf.MirrorCFE(clf, tmp_path)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    made = {"steps": np.int64(6), "batch": np.int32(5), "seed": np.int64(3), "learning_rate": np.float32(1e-3)}
    decoder = {"width": np.int64(4), "most": np.int64(8), "image_range": (np.float32(0), np.int64(1))}
    mirror, _ = fitted(**made, decoder=decoder, checkpoint=tmp_path / "d.safetensors", save_every=2)
    plain, _ = fitted(seed=3, learning_rate=float(np.float32(1e-3)), decoder={"width": 4, "most": 8})
    assert same_bits(mirror, plain)
    assert finecf.MirrorCFE(mirror.classifier, tmp_path / "d.safetensors").meta["recipe"]["steps"] == 6


@pytest.mark.parametrize("options", [{"steps": 6.0}, {"batch": "5"}, {"discriminator": (4, 8.0)}])
def test_numbers_that_are_not_whole_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="are whole numbers; got"):
        fitted(**options)


def test_a_decoder_says_how_many_steps_it_has_had(tmp_path: Path) -> None:
    mirror = finecf.MirrorCFE(wrapped())
    with pytest.raises(KeyboardInterrupt):
        mirror.fit(data(), PAIRS, **TINY, preview=stop_at(2), preview_every=1)
    mirror.save(tmp_path / "d.safetensors")
    meta = finecf.MirrorCFE(mirror.classifier, tmp_path / "d.safetensors").meta
    assert (meta["recipe"]["steps"], meta["steps_done"]) == (6, 2)
    assert fitted()[0].meta["steps_done"] == 6


def test_a_decoder_is_used_with_the_reflection_that_it_was_trained_with(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    mirror, _ = fitted(reflection="two_class", checkpoint=file)
    assert finecf.MirrorCFE(mirror.classifier, file).reflection == "two_class"
    assert finecf.MirrorCFE(mirror.classifier, file, reflection="closed_form").reflection == "closed_form"
    assert finecf.MirrorCFE(mirror.classifier).reflection == "closed_form"
    fitted(reflection="lbfgs", checkpoint=file)
    with pytest.raises(ValueError, match="per_cell"):
        finecf.MirrorCFE(mirror.classifier, file, shift="per_cell")


def test_fit_seeds_no_generator_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    clf, seeded = wrapped(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    fitted(clf, seed=7)
    assert seeded == []
    assert torch.equal(torch.get_rng_state(), before)


def test_class_activation_is_computed_without_autocast() -> None:
    clf = wrapped()
    maps = clf.features(pictures(4))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = clf.cam(maps, 1)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, clf.cam(maps, 1))


@pytest.mark.realdata
def test_photographs_under_a_real_net(realdata: Path, tmp_path: Path) -> None:
    """Waxwings at 224 pixels under a MobileNetV2: where the classes lie, and a decoder by the recipe for them."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("realdata_model", realdata / "mobilenet_v2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ["Bohemian_Waxwing", "Cedar_Waxwing"]
    folder = finecf.data.ImageFolderDataset(realdata / "birds" / "images", classes=names)
    everyone = finecf.data.ImageFolderDataset(realdata / "birds" / "images").class_names
    classifier = finecf.wrap(module.build_model(), class_names=everyone)
    numbers = [i for i, label in enumerate(folder.labels) if folder.labels[:i].count(label) < 5]
    x = folder.images(numbers)
    labels = torch.tensor([everyone.index(names[folder.labels[i]]) for i in numbers])
    taken_for = classifier.logits(x).argmax(1)
    wrong = (taken_for != labels).nonzero()[:, 0]
    assert 0 < len(wrong) < 5
    assert set(labels[wrong].tolist()) == {everyone.index(names[0])}

    mirror = finecf.MirrorCFE(classifier)
    assert mirror.class_distances(x[wrong]).nearest(1)[:, 0].tolist() == labels[wrong].tolist()
    path = mirror.latent_path(x[wrong], names[0], steps=200)  # none at 1/2, where rounding decides
    assert float(path.residual.max()) < 1e-9
    assert bool(((path.first_flip - path.k_star) >= 0).all())
    assert bool(((path.first_flip - path.k_star) <= 1 / 199).all())

    file = tmp_path / "waxwings.safetensors"
    own = finecf.training.train_decoder(classifier, (x, labels), [names], file, steps=2)
    assert own.decoder.shape.features == (1280, 7, 7)
    assert [each[1:] for each in own.decoder.shape.skips] == [(112, 112), (56, 56), (28, 28), (14, 14)]
    assert own.decoder.settings["editor"] == "local"
    (found,) = finecf.MirrorCFE(classifier, file, corrections=0).explain(x[wrong[:1]], names[0], steps=3)
    assert found.images.shape == (3, 3, 224, 224)
    assert torch.equal(found.images[0], x[wrong[0]])  # what is added is nothing at k = 0
    assert found.predicted_name == names[1]
