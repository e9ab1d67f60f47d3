"""Mirror-CFE in surroundings of its user's: compiled, in half precision, inside autocast or inference mode, with heads
that have not full rank, and with states and files that are not what they seem."""

from __future__ import annotations

import functools
import gc
import math
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explainers.mirror_nets import DEVICE, GapNet, Painter, coloured, mosaic, others, pictures, wrapped
from explainers.test_mirror import PAIRS, TINY, data, fitted, same_bits, stop_at
from torch import Tensor, nn

import finecf
from finecf.explainers import TrainingStopped
from finecf.explainers._mirror_fit import Trainer
from finecf.report.mirror_figure import origin_name

# ---- compiled, and in half precision


def test_compiled_nets_learn_what_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    _, plain = fitted(steps=3)
    _, compiled = fitted(steps=3, compile=True)
    for one, two in zip(plain, compiled, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("cpu", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_half_precision_learns_what_single_does(device: str, compiled: bool) -> None:
    """Compiled by what a user has: Inductor."""
    net, images = wrapped(GapNet().to(device)), data().to(device)
    _, plain = fitted(net, data=images, steps=2)
    _, half = fitted(net, data=images, steps=2, precision="bfloat16", compile=compiled)
    assert half[0].keys() == plain[0].keys()
    for name, value in plain[0].items():  # before the first update
        assert half[0][name] == pytest.approx(value, rel=0.1, abs=0.02)
    assert all(math.isfinite(value) for value in half[1].values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_users_autocast_changes_nothing(precision: str) -> None:
    classifier = wrapped()
    alone, losses = fitted(classifier, precision=precision)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside, same = fitted(classifier, precision=precision)
    assert same_bits(alone, inside)
    assert losses == same


def test_a_drawing_is_judged_by_the_discriminator_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast keeps weights in half precision until its outermost context is left."""
    judged, wanted = [], []
    made = Trainer.__post_init__

    def watched(self: Trainer) -> None:
        made(self)
        judge = self._judge

        def spy(*arguments: Any) -> Tensor:
            scores = judge(*arguments)
            judged.append(scores.detach().clone())
            with torch.no_grad(), torch.autocast(DEVICE.type, dtype=torch.bfloat16, cache_enabled=False):
                wanted.append(self.discriminator(*arguments))
            return scores

        self._judge = spy

    monkeypatch.setattr(Trainer, "__post_init__", watched)
    fitted(precision="bfloat16", steps=3, learning_rate=0.05)
    assert len(judged) == 9  # real, drawn, and drawn again for the decoder
    for scores, fresh in zip(judged, wanted, strict=True):
        assert torch.equal(scores, fresh)


# ---- the user's inference mode


def test_a_decoder_that_is_read_in_inference_mode_explains(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    fitted(checkpoint=file)
    clf = wrapped()
    x = data()[clf.logits(data()).argmax(1) < 3][:4]
    target = torch.tensor([1, 0, 1])[clf.logits(x).argmax(1).cpu()]
    with torch.inference_mode():
        inside = finecf.MirrorCFE(clf, file).explain(x, target, steps=3)
    outside = finecf.MirrorCFE(clf, file).explain(x, target, steps=3)
    for one, two in zip(inside, outside, strict=True):
        assert torch.equal(one.images, two.images)


def test_a_model_that_was_made_in_inference_mode_is_told_of() -> None:
    mirror, _ = fitted()
    with torch.inference_mode():
        clf = wrapped(GapNet())
    x, wanted = data(2), others(clf, data(2))
    for ask in (
        lambda: finecf.MirrorCFE(clf, mirror.decoder).explain(x, wanted),
        lambda: finecf.MirrorCFE(clf).fit(data(), PAIRS, **TINY),
    ):
        with pytest.raises(ValueError, match="its weights were made in inference mode, which gives none"):
            ask()
    assert len(finecf.MirrorCFE(clf, mirror.decoder, corrections=0).explain(x, wanted, steps=2)) == 2


def test_reading_a_decoder_draws_nothing_from_the_users_generator(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    fitted(checkpoint=file)
    before = torch.random.get_rng_state()
    finecf.MirrorCFE(wrapped(), file)
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- heads of less than full rank


class Binary(GapNet):
    """Two logits of which the first is always 0."""

    def __init__(self) -> None:
        super().__init__(classes=2)
        with torch.no_grad():
            self.fc.weight[0] = 0
            self.fc.bias[0] = 0


@pytest.mark.parametrize("reflection", ["closed_form", "lbfgs"])
def test_where_logits_cannot_be_swapped_another_reflection_is_named(reflection: str) -> None:
    classifier, x = wrapped(Binary().double()), pictures(6).double()
    target = others(classifier, x)
    path = finecf.MirrorCFE(classifier, reflection=reflection).latent_path(x, target)
    (note,) = path.notes
    assert note.startswith("the head's weight has rank 1 for 2 classes: the logits cannot all be kept")
    assert f"{int(path.k_star.isnan().sum())} of 6 latents become no counterfactual" in note
    assert note.endswith('reflection="two_class" crosses the boundary of any two classes')
    crossing = finecf.MirrorCFE(classifier, reflection="two_class").latent_path(x, target)
    assert not crossing.notes
    assert not crossing.k_star.isnan().any()


@pytest.mark.parametrize("reflection", ["closed_form", "lbfgs"])
def test_a_rank_that_costs_nothing_is_not_told(reflection: str) -> None:
    """Rows whose mean is zero: one is missing to full rank, and the logits are swapped all the same."""
    net = GapNet(classes=4).double()
    with torch.no_grad():
        net.fc.weight -= net.fc.weight.mean(0)
    classifier, x = wrapped(net), pictures(5).double()
    path = finecf.MirrorCFE(classifier, reflection=reflection).latent_path(x, others(classifier, x))
    assert path.notes == []
    assert float(path.residual.max()) < 1e-4


def test_a_training_along_a_way_that_crosses_nothing_warns() -> None:
    classifier = wrapped(Binary())
    with pytest.warns(
        UserWarning, match=r"no image becomes the other class in 1 of 1 pairs \(class 0 - class 1\)"
    ) as said:
        fitted(classifier, pairs=[(0, 1)])
    assert Path(said[0].filename).name == "test_mirror.py"  # where `fit` is called
    for ways in ({"classifier": classifier, "pairs": [(0, 1)], "reflection": "two_class"}, {}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fitted(**ways)


# ---- states and files


def test_a_folder_in_place_of_the_file_is_told_before_the_training(tmp_path: Path) -> None:
    seen: list[int] = []
    with pytest.raises(
        ValueError, match=r"checkpoint is a file for the decoder, and .* is a folder: name a file in it"
    ):
        fitted(checkpoint=tmp_path, preview=lambda step, _: seen.append(step), preview_every=1)
    assert seen == []
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    mirror, _ = fitted()
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError, match="there"):
        mirror.save(tmp_path / "there")
    assert [each.name for each in tmp_path.iterdir()] == ["there"]


def test_a_state_of_other_images_is_told_of(tmp_path: Path) -> None:
    out = tmp_path / "d.safetensors"
    for images, message in ((data(), None), (pictures(60, seed=777), "is the state of a training on other images")):
        with pytest.raises(KeyboardInterrupt):
            fitted(checkpoint=out, preview=stop_at(4), preview_every=1)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            _, losses = fitted(data=images, checkpoint=out)
        assert len(losses) == 6
        assert len(said) == (message is not None)
        assert all(message in str(each.message) for each in said)
        assert all(Path(each.filename).name == "test_mirror.py" for each in said)  # where `fit` is called


def test_a_last_step_that_breaks_the_weights_writes_no_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, gradients = tmp_path / "d.safetensors", torch.autograd.grad
    descend = Trainer._descend

    def broken(self: Trainer, which: str, total: Tensor, terms: Any) -> None:
        if which == "decoder" and self.step == 5:
            monkeypatch.setattr(
                torch.autograd, "grad", lambda *a, **k: [each * math.nan for each in gradients(*a, **k)]
            )
        descend(self, which, total, terms)
        monkeypatch.setattr(torch.autograd, "grad", gradients)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_descend", broken)
        with pytest.raises(TrainingStopped, match=r"a weight became nan at step 5: .*d\.safetensors\.r") as caught:
            fitted(checkpoint=out, save_every=3)
    assert (caught.value.loss, caught.value.step) == ("weights", 5)
    assert not out.exists()
    whole, _ = fitted()
    again, losses = fitted(checkpoint=out)
    assert len(losses) == 6
    assert same_bits(whole, again)


# ---- explanations


class Green(Painter):
    """Draws the same whatever it is given."""

    def forward(self, features: Tensor, skips: Any = (), prepared: Any = (), prior: Any = None) -> Tensor:
        return torch.zeros_like(super().forward(features)) + torch.tensor([0.2, 0.9, 0.1], device=DEVICE)[:, None, None]


@pytest.mark.parametrize("steps", [[0.0, 1.0], [0.5, 1.0]])
def test_what_is_taken_at_once_is_known_whatever_the_strip(steps: list[float], tmp_path: Path) -> None:
    x = coloured((0.6, 0.3, 0.2))
    (found,) = finecf.MirrorCFE(mosaic(), Green(), corrections=0).explain(x, "green", steps=steps)
    assert found.taken_at_once
    found.save(tmp_path / "found.safetensors")
    assert finecf.load(tmp_path / "found.safetensors").taken_at_once
    (good,) = finecf.MirrorCFE(mosaic(), Painter(), corrections=0).explain(x, "green", steps=steps)
    assert not good.taken_at_once


def test_numbers_of_numpy_are_numbers() -> None:
    x = coloured((0.6, 0.3, 0.2))
    mirror = finecf.MirrorCFE(mosaic(), Painter(), corrections=np.int64(2))
    (found,) = mirror.explain(x, 1, steps=np.int64(5))
    assert found.corrections == 2
    assert found.k.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert mirror.latent_path(x, 1, np.array([0.5, 1.0])).k.tolist() == [0.5, 1]
    with pytest.raises(ValueError, match=r"corrections is a whole number of at least 0; got 2\.5"):
        finecf.MirrorCFE(mosaic(), Painter(), corrections=2.5)


def test_the_class_that_the_path_leads_away_from_has_its_name(tmp_path: Path) -> None:
    x = coloured((0.6, 0.3, 0.2))
    (found,) = finecf.MirrorCFE(mosaic(), Painter(), corrections=0).explain(x, "green", steps=2, source="blue")
    assert found.origin_name == origin_name(found) == "blue"
    found.save(tmp_path / "found.safetensors")
    assert origin_name(finecf.load(tmp_path / "found.safetensors")) == "blue"


def test_an_explanation_says_how_many_images_went_at_once() -> None:
    (found,) = finecf.MirrorCFE(mosaic(), Painter(), micro_batch=3).explain(coloured((0.6, 0.3, 0.2)), 1, steps=2)
    assert found.versions["micro_batch"] == "3"


def test_the_latents_are_as_exact_as_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of less precision than the model's maps do not round them."""
    x = coloured((0.6, 0.3, 0.2)).bfloat16()

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = mosaic().model
            self.block, self.fc, self.inner = inner.block, inner.fc, [inner]

        def forward(self, images: Tensor) -> Tensor:
            return self.inner[0](images.float())

    clf = finecf.wrap(Takes().eval(), layer="block", class_names=["red", "green", "blue"])
    (found,) = finecf.MirrorCFE(clf, Painter(), corrections=0).explain(x, "green", steps=3)
    path = finecf.MirrorCFE(clf).latent_path(x, "green", 3)
    assert path.latents.dtype == torch.float32
    maps = torch.stack([clf.features(image[None].to(DEVICE)).mean((2, 3))[0] for image in found.images])
    torch.testing.assert_close(found.latent_error, (maps - path.latents[0]).abs().mean(1).double().cpu())


# ---- what is kept between calls


def test_no_maps_are_kept_for_a_head_that_is_searched() -> None:
    mirror = finecf.MirrorCFE(wrapped(GapNet(hidden=10)), reflection="lbfgs")
    read, kept = mirror.classifier.features_and_logits, []

    def spy(x: Tensor) -> tuple[Tensor, Tensor]:
        maps, logits = read(x)
        kept.append(weakref.ref(maps))
        return maps, logits

    mirror.classifier.features_and_logits = spy
    x = pictures(3)
    mirror.latent_path(x, others(mirror.classifier, x))
    gc.collect()
    assert kept
    assert all(each() is None for each in kept)


@pytest.mark.cuda
def test_a_model_that_moves_takes_its_head_and_decoder_along() -> None:
    net = GapNet().cpu()
    clf = wrapped(net)
    mirror = finecf.MirrorCFE(clf)
    mirror.fit(data().cpu(), PAIRS, **TINY)
    target = (clf.logits(data(2).cpu()).argmax(1) + 1) % 3
    here = mirror.explain(data(2).cpu(), target, steps=3)
    net.cuda()
    there = mirror.explain(data(2).cuda(), target, steps=3)
    for one, two in zip(here, there, strict=True):
        torch.testing.assert_close(one.latent_logits, two.latent_logits, rtol=1e-4, atol=1e-4)


# ---- data to train on


def test_images_of_many_sizes_are_trained_on_after_preprocessing() -> None:
    net = GapNet()
    clf = finecf.wrap(
        net,
        layer="block",
        preprocess=lambda x: nn.functional.interpolate(x[None] if x.ndim == 3 else x, 16, mode="bilinear"),
    )
    images = [nn.functional.interpolate(x[None], 16 + 2 * (n % 3))[0].cpu() for n, x in enumerate(data())]
    mirror = finecf.MirrorCFE(clf)
    assert len(mirror.fit(images, PAIRS, **TINY)) == 6


def test_labels_may_be_names() -> None:
    clf, x = wrapped(), data()
    guesses = clf.logits(x).argmax(1).tolist()
    numbers, names = ([(x[n], label(guess)) for n, guess in enumerate(guesses)] for label in (int, "class {}".format))
    one, two = finecf.MirrorCFE(clf), finecf.MirrorCFE(clf)
    assert one.fit(numbers, PAIRS, **TINY) == two.fit(names, PAIRS, **TINY)
    wrong = [(image, "class 3" if name == "class 0" else name) for image, name in names]
    with pytest.raises(
        ValueError, match="class 'class 0' of the pairs has 0 training images that the classifier recog"
    ):
        two.fit(wrong, PAIRS, **TINY)


# ---- what is wrong is named


def test_a_state_of_other_settings_names_them(tmp_path: Path) -> None:
    out = tmp_path / "d.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fitted(checkpoint=out, preview=stop_at(2), preview_every=1)
    with pytest.raises(ValueError, match=r"classifier \(seed: 0 there, 4 here, steps: 6 there, 9 here\); delete it"):
        fitted(checkpoint=out, steps=9, seed=4)


def test_images_of_another_range_get_the_advice_for_explaining() -> None:
    mirror, _ = fitted()
    with pytest.raises(ValueError, match=r"image_range \(0 to 1\): give images scaled as those it was trained on"):
        mirror.explain(255 * data(2), 1, source=0)


def test_too_few_names_are_told(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    fitted(checkpoint=file)
    clf = finecf.wrap(GapNet(), layer="block", class_names=["one", "two"])
    with pytest.raises(ValueError, match="2 class_names were given, and class 2 has none of them"):
        finecf.MirrorCFE(clf, file)


@pytest.mark.parametrize(("names", "warned"), [("3210", True), ("0123", False), (["a", "b", "c", "d"], False)])
def test_classes_that_are_called_by_digits_are_compared(names: Any, warned: bool, tmp_path: Path) -> None:
    """A decoder for a classifier without names calls its classes by their numbers: no other name is another one."""
    file = tmp_path / "d.safetensors"
    fitted(finecf.wrap(GapNet(), layer="block"), checkpoint=file)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mirror = finecf.MirrorCFE(finecf.wrap(GapNet(), layer="block", class_names=list(names)), file)
    assert bool(mirror.otherwise_named()) == bool(said) == warned


# ---- what a user sees


def test_what_is_shown_at_the_prompt_is_one_line() -> None:
    mirror, _ = fitted()
    x = data(3)
    path = mirror.latent_path(x, others(mirror.classifier, x), steps=5)
    assert repr(path) == "LatentPath(3 images x 5 k x 12, 'closed_form')"
    assert repr(mirror.class_distances(x)) == "ClassDistances(3 images x 4 classes)"
    assert repr(finecf.MirrorCFE(mirror.classifier)) == (
        "MirrorCFE(Classifier(GapNet, layer='block', 4 classes), 'closed_form', no decoder yet)"
    )
    assert repr(mirror).endswith("a decoder of 2 pairs)")
    trimmed = finecf.explainers.trim(mirror.classifier, x, x, others(mirror.classifier, x))
    assert repr(trimmed) == "Trimmed(0 of 3 images, 0 stand the blur)"


def test_arguments_that_a_decoder_does_not_have_are_named() -> None:
    with pytest.raises(ValueError, match=r"decoder holds 'depth'; MirrorDecoder takes width, most, .*image_range"):
        fitted(decoder={"depth": 3})
