"""Mirror-CFE with its decoder: training that repeats and resumes to the bit, and explanations that say what was
drawn.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from explainers.mirror_nets import (
    DEVICE,
    SIDE,
    GapNet,
    Painter,
    coloured,
    mosaic,
    others,
    pictures,
    wrapped,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import finecf
from finecf.explainers import Interrupted, TrainingStopped, _mirror_losses
from finecf.explainers._mirror_draw import least_change
from finecf.explainers._mirror_fit import LOSSES, Pool, Recipe, Trainer
from finecf.explainers._mirror_train import interrupted_after
from finecf.explainers._reflection import GapHead
from finecf.metrics import redraw_distances
from finecf.models.checkpoints import load_tensors
from finecf.models.decoder import MirrorDecoder, Shape, activation_prior, shape_of
from finecf.regions.baseline import gaussian_blur
from finecf.training import load_birds_net, load_digits_net, mirror_recipe, shipped_decoder

TINY: dict[str, Any] = {
    "steps": 6,
    "batch": 5,
    "decoder": {"width": 4, "most": 8, "inner": 4},
    "discriminator": (4, 8),
}
PAIRS = [(0, 1), (1, 2)]
EVERYTHING: dict[str, Any] = {"skips": True, "augment": 1, "blend": 0.3, "noise": 0.1, "warm_up": 4}
EVERYTHING |= {"blur": 1.0, "unsure": 3.0, "conditional": True}
"""What makes a step harder to repeat."""
CHANGE: dict[str, Any] = {
    "skips": True,
    "decoder": TINY["decoder"] | {"output": "change", "prior": "contrast", "pooled": True, "subpixel": 2},
}
"""A decoder that draws changes of the image."""


MADE = ("shift", "reflection", "progress", "corrections", "soften")
"""What `fitted` gives the explainer."""


def data(count: int = 60) -> Tensor:
    return pictures(count, seed=2)


def fitted(classifier: finecf.Classifier | None = None, **options: Any) -> tuple[finecf.MirrorCFE, list[dict]]:
    made = {name: options.pop(name) for name in MADE if name in options}
    mirror = finecf.MirrorCFE(classifier or wrapped(), **made)
    images = options.pop("data", None)
    return mirror, mirror.fit(data() if images is None else images, **{"pairs": PAIRS} | TINY | options)


def weights(mirror: finecf.MirrorCFE) -> dict[str, Tensor]:
    assert mirror.decoder is not None
    return {name: value.clone() for name, value in mirror.decoder.state_dict().items()}


def same_bits(one: finecf.MirrorCFE, two: finecf.MirrorCFE) -> bool:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def stop_at(step: int) -> Callable[[int, finecf.MirrorCFE], None]:
    def preview(done: int, _: finecf.MirrorCFE) -> None:
        if done == step:
            raise KeyboardInterrupt

    return preview


# ---- training


@pytest.mark.parametrize(
    "options", [{}, EVERYTHING, {"shift": "per_cell"}, CHANGE], ids=["plain", "everything", "per cell", "change"]
)
def test_a_seed_gives_the_same_bits(options: dict[str, Any]) -> None:
    state = torch.random.get_rng_state()
    one, losses = fitted(**options)
    torch.rand(3)  # the global generator takes no part ...
    state_between = torch.random.get_rng_state()
    two, again = fitted(**options)
    assert torch.equal(torch.random.get_rng_state(), state_between)  # ... and is left alone
    torch.random.set_rng_state(state)
    assert same_bits(one, two)
    assert losses == again
    assert len(losses) == 6
    assert all(math.isfinite(value) for each in losses for value in each.values())
    other, _ = fitted(seed=1, **options)
    assert not same_bits(one, other)
    assert not one.decoder.training
    assert not any(parameter.requires_grad for parameter in one.decoder.parameters())


def test_training_lowers_the_reconstruction_loss() -> None:
    alone = dict.fromkeys(LOSSES, 0.0) | {"reconstruction": 1.0}
    _, losses = fitted(steps=60, batch=16, learning_rate=2e-2, weights=alone)
    early, late = (sum(each["reconstruction"] for each in part) / 5 for part in (losses[:5], losses[-5:]))
    assert late < 0.7 * early


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_an_interrupted_training_goes_on_to_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    whole, losses = fitted(checkpoint=tmp_path / "whole.safetensors", **options)
    out = tmp_path / "d.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fitted(checkpoint=out, preview=stop_at(4), preview_every=1, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors.resume", "whole.safetensors"]
    assert load_tensors(out.with_name("d.safetensors.resume"))[1]["step"] == 4
    seen: list[int] = []
    resumed, again = fitted(checkpoint=out, preview=lambda done, _: seen.append(done), preview_every=1, **options)
    assert seen == [5, 6]
    assert same_bits(whole, resumed)
    assert again == losses
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors", "whole.safetensors"]
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_killed_training_goes_on_from_its_last_state_to_the_same_bits(tmp_path: Path) -> None:
    """What lies on the disk at any moment is enough."""
    out, kept = tmp_path / "d.safetensors", tmp_path / "killed.safetensors.resume"

    def keep(done: int, _: finecf.MirrorCFE) -> None:
        if done == 5:
            shutil.copy(tmp_path / "d.safetensors.resume", kept)

    whole, losses = fitted(checkpoint=out, save_every=2, preview=keep, preview_every=1, **EVERYTHING)
    assert load_tensors(kept)[1]["step"] == 4
    resumed, again = fitted(checkpoint=tmp_path / "killed.safetensors", **EVERYTHING)
    assert same_bits(whole, resumed)
    assert again == losses


class Counting(GapNet):
    """Does something at one of its forwards."""

    left = -1
    action: Callable[[], object] = staticmethod(lambda: None)

    def forward(self, x: Tensor) -> Tensor:
        Counting.left -= 1
        if Counting.left == 0:
            Counting.action()
        return super().forward(x)


def counted(forwards: int, action: Callable[[], object]) -> None:
    Counting.left, Counting.action = forwards, staticmethod(action)


def forwards_of_a_training(**options: Any) -> int:
    counted(10**9, lambda: None)
    fitted(wrapped(Counting()), **options)
    return 10**9 - Counting.left


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler of SIGINT, also where the tests run in the background and the shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("how", ["signal", "exception"])
def test_ctrl_c_in_the_middle_of_a_step_tears_no_state(how: str, place: int, ctrl_c: None, tmp_path: Path) -> None:
    """Between the discriminator's update and the decoder's, say. A signal waits for the step's end; where something
    raises KeyboardInterrupt by itself the last whole state stays.
    """
    whole, losses = fitted(wrapped(Counting()), checkpoint=tmp_path / "whole.safetensors")
    steps_done = 3
    looking = forwards_of_a_training(steps=1)
    in_a_step = (forwards_of_a_training(steps=3) - looking) // 2
    assert in_a_step == 3  # the images, the references, what was drawn
    before = looking - in_a_step

    def interrupt() -> None:
        if how == "signal":
            signal.raise_signal(signal.SIGINT)
        else:
            raise KeyboardInterrupt

    counted(before + steps_done * in_a_step + place, interrupt)
    out = tmp_path / "d.safetensors"
    mirror = finecf.MirrorCFE(wrapped(Counting()))
    with pytest.raises(KeyboardInterrupt):
        mirror.fit(data(), PAIRS, checkpoint=out, save_every=2, **TINY)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not mirror.decoder.training
    state = load_tensors(tmp_path / "d.safetensors.resume")[1]
    assert state["step"] == len(state["history"]) == (4 if how == "signal" else 2)
    resumed, again = fitted(wrapped(Counting()), checkpoint=out)
    assert same_bits(whole, resumed)
    assert again == losses


def test_ctrl_c_twice_does_not_wait(ctrl_c: None) -> None:
    reached: list[str] = []

    def press() -> None:
        with interrupted_after():
            for times in ("once", "twice"):
                signal.raise_signal(signal.SIGINT)
                reached.append(times)

    with pytest.raises(KeyboardInterrupt):
        press()
    assert reached == ["once"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_own_stays(ctrl_c: None) -> None:
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    with interrupted_after():
        signal.raise_signal(signal.SIGINT)
        assert pressed == [signal.SIGINT]
    histories: list[list[dict]] = []
    thread = threading.Thread(target=lambda: histories.append(fitted()[1]))  # where no handler can be set
    thread.start()
    thread.join()
    assert [len(history) for history in histories] == [6]


def test_the_users_model_stays_as_it_is() -> None:
    net = GapNet()
    net.train()
    net.stem[1].eval()  # frozen by its owner
    net.fc.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def state() -> tuple[object, ...]:
        modes = [module.training for module in net.modules()]
        gradients = [(parameter.requires_grad, parameter.grad is None) for parameter in net.parameters()]
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules())
        return modes, gradients, hooks, torch.is_grad_enabled()

    flags = state()

    def fail(*_: object) -> None:
        raise RuntimeError("a fault in the preview")

    with pytest.warns(UserWarning, match="train mode"):
        fitted(wrapped(net), **EVERYTHING)
    for error, options in (
        (KeyboardInterrupt, {"preview": stop_at(2)}),
        (RuntimeError, {"preview": fail}),
        (TrainingStopped, {"learning_rate": 1e30}),
    ):
        with pytest.warns(UserWarning, match="train mode"), pytest.raises(error):
            fitted(wrapped(net), preview_every=1, **options)
        assert state() == flags
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_after_any_exception_the_decoder_is_in_eval_mode() -> None:
    mirror = finecf.MirrorCFE(wrapped())

    def fail(*_: object) -> None:
        mirror.decoder.train()
        raise RuntimeError("a fault in the preview")

    with pytest.raises(RuntimeError, match="a fault in the preview"):
        mirror.fit(data(), PAIRS, preview=fail, preview_every=1, **TINY)
    assert not mirror.decoder.training
    assert not any(parameter.requires_grad for parameter in mirror.decoder.parameters())


def test_without_its_weight_no_discriminator_takes_part(tmp_path: Path) -> None:
    out = tmp_path / "d.safetensors"

    def without(**options: Any) -> tuple[finecf.MirrorCFE, list[dict]]:
        return fitted(weights={"adversarial": 0.0}, **options)

    one, losses = without(discriminator=(4, 8))
    two, _ = without(discriminator=(16,))
    assert same_bits(one, two)
    assert all(set(each) == set(LOSSES) - {"adversarial"} for each in losses)
    with_it, with_losses = fitted()
    assert not same_bits(one, with_it)
    assert all(set(each) == set(LOSSES) for each in with_losses)
    with pytest.raises(KeyboardInterrupt):
        without(checkpoint=out, preview=stop_at(3), preview_every=1)
    names = load_tensors(out.with_name("d.safetensors.resume"))[0]
    assert not any(name.startswith("adam-discriminator") for name in names)
    resumed, _ = without(checkpoint=out)
    assert same_bits(one, resumed)


def test_bfloat16_trains_the_same_decoder_less_exactly() -> None:
    half, losses = fitted(precision="bfloat16", skips=True)
    whole, exact = fitted(skips=True)
    assert not same_bits(half, whole)
    assert all(value.dtype == torch.float32 for value in weights(half).values() if value.is_floating_point())
    for name in LOSSES:
        assert losses[0][name] == pytest.approx(exact[0][name], rel=0.1, abs=0.02)
        assert losses[0][name] != exact[0][name]


def test_weights_alpha_and_the_order_of_kl_count() -> None:
    plain, exact = fitted(steps=2)
    for options in (
        {"weights": {"feature": 3}},
        {"weights": {"triangulation": 0}},
        {"alpha": 0.9},
        {"kl_order": "latent"},
    ):
        other, losses = fitted(steps=2, **options)
        assert not same_bits(plain, other)
        same = {name for name in LOSSES if losses[0][name] == exact[0][name]}
        changed = {"alpha": {"triangulation"}, "kl_order": {"classification"}}.get(next(iter(options)), set())
        assert same == set(LOSSES) - changed


def test_epochs_are_passes_over_the_images_of_the_pairs() -> None:
    classifier, x = wrapped(), data()
    predicted = classifier.logits(x).argmax(1)
    count = int((predicted <= 2).sum())
    assert count < len(x)
    options = {name: value for name, value in TINY.items() if name != "steps"}
    losses = finecf.MirrorCFE(classifier).fit(x, PAIRS, 2, **options)
    assert len(losses) == 2 * (count // 5)
    assert len(finecf.MirrorCFE(classifier).fit(x, PAIRS, 2, **options | {"batch": 1000})) == 2


# ---- what a step is made of


def trainer(skips: bool = False, drawn: dict[str, Any] | None = None, **options: Any) -> Trainer:
    classifier, x = wrapped(), data()
    settings: dict[str, Any] = {
        "steps": 10,
        "batch": 7,
        "learning_rate": 1e-3,
        "betas": (0.5, 0.999),
        "seed": 0,
        "weights": dict.fromkeys(LOSSES, 1.0),
        "alpha": 0.2,
        "kl_order": "image",
        "precision": "float32",
        "reflection": "closed_form",
        "shift": "uniform",
        "discriminator": (4, 8),
        "augment": 0,
        "blend": 0.0,
        "warm_up": 0,
        "noise": 0.0,
        "unsure": 0.0,
        "conditional": False,
        "blur": 0.0,
    }
    head = GapHead.linear(classifier.model.fc.weight, classifier.model.fc.bias)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = shape_of(classifier, x[0], skips)
        net = MirrorDecoder(shape, width=4, most=8, editor="replace", prior_range=(0.4, 0.7), **drawn or {})
    return Trainer(classifier, head, net, Pool(classifier, x), PAIRS, Recipe(**settings | options))


def test_what_a_step_is_drawn_from() -> None:
    own = trainer()
    x, predicted = data(), own.classifier.logits(data()).argmax(1)
    number_of = {image.cpu().numpy().tobytes(): number for number, image in enumerate(x)}
    partners = {0: {1}, 1: {0, 2}, 2: {1}}
    per_epoch = int((predicted <= 2).sum()) // 7
    seen: list[int] = []
    targets: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for step in range(2 * per_epoch):
        sample = own.draw(step)
        numbers = [number_of[image.cpu().numpy().tobytes()] for image in sample.images]
        assert predicted[numbers].tolist() == sample.source.tolist()
        for number, shown, s, t, k in zip(
            numbers, sample.references, sample.source.tolist(), sample.target.tolist(), sample.k.tolist(), strict=True
        ):
            reference = number_of[shown.cpu().numpy().tobytes()]
            assert t in partners[s]
            assert 0 <= k < 1
            assert int(predicted[reference]) == (t if k >= 0.5 else s)  # of the target beyond the boundary
            assert reference != number
            targets[s].add(t)
        seen += numbers
        again = own.draw(step)
        for one, two in zip(sample, again, strict=True):
            assert torch.equal(one, two) if isinstance(one, Tensor) else one == two
    assert targets == partners
    assert len({tuple(own.draw(step).k.tolist()) for step in range(4)}) == 4
    for epoch in (seen[: 7 * per_epoch], seen[7 * per_epoch :]):
        assert len(set(epoch)) == len(epoch)  # no image twice in a pass
    assert seen[: 7 * per_epoch] != seen[7 * per_epoch :]


def test_unsure_images_are_drawn_more_often() -> None:
    own = trainer(unsure=50.0)
    confidence = own.classifier.logits(data()).double().softmax(1).amax(1)
    torch.testing.assert_close(own.classes.said["confidence"], confidence.cpu())
    counts = torch.zeros(len(own.sources))
    for epoch in range(400):
        counts += torch.bincount(own._order(torch.Generator().manual_seed(epoch)), minlength=len(counts))
    wanted = 1 + 50 * (1 - confidence.cpu()[own.sources])
    torch.testing.assert_close(counts.double() / counts.sum(), wanted / wanted.sum(), rtol=0.3, atol=0)
    drawn = own.draw(0).images.flatten(1)
    alike = (torch.cdist(torch.cat([own.draw(step).images.flatten(1) for step in range(3)]), drawn) == 0).sum()
    assert int(alike) > 7  # an epoch holds some images more than once
    plain = trainer()._order(torch.Generator().manual_seed(0))
    assert torch.equal(plain.sort().values, torch.arange(len(plain)))


def test_moved_blended_and_noisy_images() -> None:
    still = trainer().draw(3)
    moved = trainer(augment=2).draw(3)
    padded = nn.functional.pad(still.images, (2, 2, 2, 2), mode="replicate")
    offsets = []
    for image, source in zip(moved.images, padded, strict=True):
        fits = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if torch.equal(image, source[:, row : row + SIDE, column : column + SIDE])
        ]
        assert len(fits) == 1
        offsets += fits
    assert len(set(offsets)) > 1
    blended = trainer(blend=0.4).draw(3)
    changed = [not torch.equal(one, two) for one, two in zip(blended.images, still.images, strict=True)]
    assert 0 < sum(changed) < 7
    assert torch.equal(blended.references, still.references)
    for image, source in zip(blended.images, still.images, strict=True):
        # On the line from the source to another image of the batch, less than 0.4 of the way.
        shares = []
        for other in still.images:
            way = other - source
            share = float(((image - source) * way).sum() / way.square().sum().clamp_min(1e-9))
            if torch.allclose(image, source + share * way, atol=1e-6):
                shares.append(share)
        assert any(0 <= share < 0.4 for share in shares)
    noisy = trainer(noise=0.1).draw(3)
    spread = noisy.noise.flatten(1).std(1)
    assert 0 < int((spread > 0).sum()) < 7
    assert spread[spread > 0].tolist() == pytest.approx([0.1] * int((spread > 0).sum()), rel=0.15)
    assert float(still.noise.abs().max()) == 0


def test_every_second_drawn_image_is_blurred_before_the_classifier_sees_it() -> None:
    samples = [trainer(blur=2.0).draw(step) for step in range(40)]
    sigmas = torch.tensor([sample.sigma for sample in samples])
    assert 0 < float(sigmas.min()) < 0.4 < 1.6 < float(sigmas.max()) < 2
    drawn = pictures(7, seed=5)
    seen = samples[0].seen(drawn)
    assert torch.equal(seen[::2], drawn[::2])
    torch.testing.assert_close(seen[1::2], gaussian_blur(drawn[1::2], samples[0].sigma))
    assert torch.equal(trainer().draw(0).seen(drawn), drawn)
    assert torch.equal(samples[0].images, trainer().draw(0).images)


def test_a_conditional_discriminator_is_told_what_an_image_is_to_show() -> None:
    own = trainer(conditional=True)
    before = own.discriminator.of_class.weight.clone()
    told: list[Tensor] = []
    own.discriminator.register_forward_pre_hook(lambda _, inputs: told.append(inputs[1]))
    sample = own.draw(0)
    own.advance()
    wanted = torch.where(sample.k >= 0.5, sample.target, sample.source)
    assert len(told) == 3  # real, drawn, and drawn for the decoder
    assert all(torch.equal(each, wanted) for each in told)
    assert not torch.equal(own.discriminator.of_class.weight, before)
    assert trainer().discriminator.of_class is None
    known = own.classifier.logits(sample.references).argmax(1)
    assert torch.equal(known, wanted)  # what the real images are


def test_the_classifier_sees_the_noise_and_the_other_losses_do_not() -> None:
    silent, noisy = fitted(steps=1)[1][0], fitted(steps=1, noise=0.2)[1][0]
    assert {name for name in LOSSES if silent[name] != noisy[name]} == {"classification", "feature"}


def test_the_rate_falls_along_a_cosine() -> None:
    own = trainer(steps=4, learning_rate=0.2)
    rates = []
    for _ in range(4):
        own.advance()
        rates.append([optimiser.param_groups[0]["lr"] for optimiser in own.optimisers.values()])
    half = math.sqrt(0.5)
    wanted = [0.2 * (0.01 + 0.99 * share) for share in (1, (1 + half) / 2, 0.5, (1 - half) / 2)]
    assert rates == [[pytest.approx(rate)] * 2 for rate in wanted]


def test_the_weights_rise_in_the_second_half_of_the_warm_up() -> None:
    recipe = trainer(warm_up=8, weights=dict.fromkeys(LOSSES, 2.0)).recipe
    assert [recipe.weight_of("feature", step) for step in range(10)] == [0, 0, 0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert {recipe.weight_of("reconstruction", step) for step in range(10)} == {2.0}
    _, losses = fitted(warm_up=4, steps=5)
    assert ["adversarial" in each for each in losses] == [False, False, False, True, True]


@pytest.mark.parametrize("shift", ["uniform", "per_cell"])
@pytest.mark.parametrize("prior", ["activation", "contrast"])
def test_training_draws_what_explaining_draws(prior: str, shift: str) -> None:
    own = trainer(True, {"output": "change", "prior": prior}, shift=shift)
    own.decoder.eval()
    nn.init.normal_(own.decoder.to_image.weight, std=30.0)  # an untrained decoder hardly sees what it is given
    sample = own.draw(0)
    predicted = own.classifier.logits(sample.images).argmax(1)
    assert torch.equal(predicted, sample.source)
    with torch.no_grad():
        *skips, features = own.classifier.pyramid(sample.images)
        found = own.head.reflect(features.mean((2, 3)), sample.source, sample.target, "closed_form")
        trained, _ = own._decode_pair(features, skips, found, sample)
        mirror = finecf.MirrorCFE(own.classifier, own.decoder, shift=shift, corrections=0)
        drawing = mirror._drawing(own.decoder, sample.images, predicted, sample.target)
        drawn, _, _ = drawing.at(torch.arange(7, device=DEVICE), sample.k)
    torch.testing.assert_close(trained, drawn, rtol=0, atol=1e-4)
    assert float((drawn - sample.images).abs().max()) > 1e-3


@pytest.mark.parametrize("output", ["image", "change"])
@pytest.mark.parametrize("skips", [False, True])
def test_the_losses_of_a_step_are_those_of_their_formulas(skips: bool, output: str) -> None:
    own = trainer(skips, {"output": output}, kl_order="latent")
    sample = own.draw(0)
    clf, head = own.classifier, own.head
    latents = clf.features(sample.images).mean((2, 3)).double()
    found = head.reflect(latents, sample.source, sample.target, "closed_form")
    wanted = latents + sample.k[:, None] * found.step
    with torch.no_grad():
        *shallow, features = clf.pyramid(sample.images)
        maps = torch.cat([features + (wanted - latents).float()[:, :, None, None], features])
        cams = (clf.cam(maps, each.repeat(2)) for each in (sample.source, sample.target))
        prior = activation_prior(*cams, sample.k.repeat(2), (0.4, 0.7))  # that of k, for both images
        if output == "change":  # what is subtracted is drawn under the same one
            prior = prior[:7].repeat(2, 1, 1)
        assert 0 < float(prior.mean()) < 1
        if skips:
            prepared = [each.repeat(2, 1, 1, 1) for each in own.decoder.prepare(shallow)]
            both = own.decoder(maps, [each.repeat(2, 1, 1, 1) for each in shallow], prepared, prior)
        else:
            both = own.decoder(maps)
    moved, start = both[:7].double(), both[7:].double()
    if output == "change":
        mask = nn.functional.interpolate(prior[:7, None], SIDE, mode="bilinear").double() if skips else 1
        moved = (sample.images.double() + mask * (moved - start)).clamp(0, 1)
    own = trainer(skips, {"output": output}, kl_order="latent")  # with the batch norms as they were
    named = own.advance()
    latent_logits, logits = head.logits(wanted).log_softmax(1), clf.logits(moved.float()).double().log_softmax(1)
    kl = (latent_logits.exp() * (latent_logits - logits)).sum(1).mean()
    encoded = clf.features(moved.float()).mean((2, 3)).double()
    x, references = sample.images.double(), sample.references.double()
    beta = (wanted - clf.features(sample.references).mean((2, 3))).norm(dim=1) / (wanted - latents).norm(dim=1)
    a, d = (moved - references).abs().mean((1, 2, 3)), (x - moved).abs().mean((1, 2, 3))
    band = (0.8 * a / beta - d).relu() + (d - 1.2 * a / beta).relu()
    assert named["classification"] == pytest.approx(float(kl), rel=1e-4)
    assert named["reconstruction"] == pytest.approx(float((x - start).abs().mean()), rel=1e-4)
    assert named["feature"] == pytest.approx(float((wanted - encoded).norm(dim=1).mean()) / 12**0.5, rel=1e-4)
    assert named["triangulation"] == pytest.approx(float(band.mean()), rel=1e-4)
    with torch.no_grad():  # by the discriminator that this step has updated
        scores = own.discriminator(moved.float())
    assert named["adversarial"] == pytest.approx(float(nn.functional.softplus(-scores).mean()), rel=1e-4)


# ---- what goes wrong in training


@pytest.mark.parametrize("loss", [*LOSSES, "discriminator"])
def test_a_loss_that_is_nan_stops_the_training_at_once(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, losses = fitted()
    name = {"adversarial": "generator_adversarial", "discriminator": "discriminator_adversarial"}.get(loss, loss)
    function = getattr(_mirror_losses, name)
    calls: list[int] = []

    def broken(*arguments: Any) -> Tensor:
        calls.append(1)
        return function(*arguments) * (math.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(_mirror_losses, name, broken)
    out = tmp_path / "d.safetensors"
    with pytest.raises(
        TrainingStopped,
        match=rf"the {loss} loss became nan at step 4: training stopped; the last good state is in .*d\.safetensors\.r",
    ) as caught:
        fitted(checkpoint=out, save_every=3)
    assert (caught.value.loss, caught.value.step, len(calls)) == (loss, 4, 5)
    assert math.isnan(caught.value.value)
    assert not out.exists()
    tensors, meta = load_tensors(out.with_name("d.safetensors.resume"))
    assert meta["step"] == 3
    assert all(torch.isfinite(value).all() for value in tensors.values())
    monkeypatch.undo()
    resumed, again = fitted(checkpoint=out)
    assert same_bits(whole, resumed)
    assert again == losses


def test_a_training_that_diverges_is_stopped() -> None:
    with pytest.raises(TrainingStopped, match=r"loss became (nan|inf) at step [0-5].*no state was kept") as caught:
        fitted(learning_rate=1e30)
    assert caught.value.loss in {*LOSSES, "discriminator"}
    assert isinstance(caught.value, FloatingPointError)


def test_a_training_that_diverges_leaves_the_decoder_as_it_was() -> None:
    mirror, _ = fitted(soften=0.0)
    decoder, meta, bits = mirror.decoder, dict(mirror.meta), weights(mirror)
    with pytest.raises(TrainingStopped):
        mirror.fit(data(), **{"pairs": PAIRS[:1]} | TINY | {"learning_rate": 1e30})
    assert mirror.decoder is decoder
    assert mirror.meta == meta
    assert all(torch.equal(value, bits[name]) for name, value in weights(mirror).items())


def test_a_stop_before_the_first_save_says_that_nothing_was_kept(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match=r"no state was kept yet \(save_every=200\)"):
        fitted(learning_rate=1e30, checkpoint=tmp_path / "d.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"steps": 7},
        {"pairs": [(0, 1)]},
        {"data": pictures(59, seed=2)},
        {"decoder": {"width": 5, "most": 8}},
        {"weights": {"feature": 2.0}},
        {"skips": True},
        {"classifier": 1},
    ],
    ids=lambda each: next(iter(each)),
)
def test_the_state_of_another_training_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "d.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fitted(checkpoint=out, preview=stop_at(2), preview_every=1)
    classifier = wrapped(seed=options.pop("classifier")) if "classifier" in options else None
    kept = (tmp_path / "d.safetensors.resume").read_bytes()
    with pytest.raises(
        ValueError,
        match=r"d\.safetensors\.resume is the state of a training with other settings, data or classifier \(.* there, "
        r".* here\); delete it, or pass resume=False",
    ):
        fitted(classifier, checkpoint=out, **options)
    assert (tmp_path / "d.safetensors.resume").read_bytes() == kept
    _, losses = fitted(classifier, checkpoint=out, resume=False, **options)
    assert len(losses) == options.get("steps", 6)
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


def test_a_truncated_state_is_refused(tmp_path: Path) -> None:
    out, state = tmp_path / "d.safetensors", tmp_path / "d.safetensors.resume"
    with pytest.raises(KeyboardInterrupt):
        fitted(checkpoint=out, preview=stop_at(2), preview_every=1)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"d\.safetensors\.resume \(\d+ bytes\) is truncated"):
        fitted(checkpoint=out)


def test_a_refused_state_leaves_the_decoder_that_was_there(tmp_path: Path) -> None:
    out = tmp_path / "d.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fitted(checkpoint=out, preview=stop_at(2), preview_every=1)
    mirror, _ = fitted(pairs=[(0, 1)])
    decoder, meta = mirror.decoder, mirror.meta
    with pytest.raises(ValueError, match="other settings"):
        mirror.fit(data(), PAIRS, checkpoint=out, seed=1, **TINY)
    assert mirror.decoder is decoder
    assert mirror.meta == meta


# ---- data and pairs


class Pictures(Dataset):
    """Images alone, or with a label and a name."""

    def __init__(self, x: Tensor, labels: Tensor | None = None) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] if self.labels is None else (self.x[index], int(self.labels[index]), f"{index}.png")


def test_all_kinds_of_data_train_the_same() -> None:
    x = data()
    labels = wrapped().logits(x).argmax(1)
    wanted, _ = fitted(data=x)
    for kind in (
        (x, labels),
        (x, labels.tolist()),
        TensorDataset(x, labels),
        DataLoader(TensorDataset(x, labels), batch_size=3, shuffle=True),
        Pictures(x),
        Pictures(x, labels),
        list(x),
    ):
        assert same_bits(fitted(data=kind)[0], wanted)


def test_preprocess_is_applied_to_the_training_images() -> None:
    net = GapNet()
    classifier = finecf.wrap(net, layer="block", preprocess=lambda image: image.float() / 255)
    x = (data() * 255).round()
    small = fitted(wrapped(net), data=x / 255)[0]
    assert same_bits(fitted(classifier, data=x.to(torch.uint8))[0], small)
    assert same_bits(fitted(classifier, data=TensorDataset(x.to(torch.uint8)))[0], small)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_images_of_another_precision(dtype: torch.dtype) -> None:
    classifier, x = wrapped(), data().to(dtype)
    mirror, losses = fitted(classifier, data=x, **EVERYTHING)
    assert all(math.isfinite(value) for each in losses for value in each.values())
    (found,) = mirror.explain(x[:1], others(classifier, x[:1]), steps=3)
    assert torch.isfinite(found.images).all()


def test_a_model_in_double_precision() -> None:
    classifier, x = wrapped(GapNet().double()), data()
    mirror, losses = fitted(classifier, data=x, **EVERYTHING)
    single, wanted = fitted(data=x, **EVERYTHING)
    for one, two in zip(losses, wanted, strict=True):
        assert one == pytest.approx(two, rel=0.05, abs=0.02)
    (found,) = mirror.explain(x[:1], others(classifier, x[:1]), steps=3)
    (exact,) = single.explain(x[:1], others(classifier, x[:1]), steps=3)
    torch.testing.assert_close(found.images.float(), exact.images, rtol=0, atol=0.05)


def test_images_that_are_not_recognised_as_their_label_are_left_out() -> None:
    classifier, x = wrapped(), data()
    labels = classifier.logits(x).argmax(1)
    wrong = (labels + 1) % 3
    some = torch.where(torch.arange(60, device=DEVICE) % 4 == 0, wrong, labels)
    kept = some == labels
    assert same_bits(fitted(data=(x[kept], labels[kept]))[0], fitted(data=(x, some))[0])
    with pytest.raises(ValueError, match=r"class 'class 0' of the pairs has 0 training images that the classifier rec"):
        fitted(data=(x, wrong))


def test_pairs_by_name_by_index_and_in_any_order() -> None:
    wanted, _ = fitted()
    for pairs in ([("class 0", "class 1"), ("class 1", "class 2")], [(2, 1), (1, 0)], [(0, "class 1"), [1, 2], (1, 0)]):
        assert same_bits(fitted(pairs=pairs)[0], wanted)
    assert wanted.meta["pairs"] == [(0, 1), (1, 2)]
    assert wanted.meta["classes"] == ["class 0", "class 1", "class 2"]
    every, _ = fitted(pairs=None)
    assert every.meta["pairs"] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pairs": [("class 0", "class 9")]}, ValueError, r"unknown class 'class 9': did you mean"),
        ({"pairs": [(0, 4)]}, ValueError, r"class index 4 is out of range; the classifier has classes 0\.\.3"),
        ({"pairs": [(1, "class 1")]}, ValueError, r"the pair \(class 1, class 1\) holds one class twice"),
        ({"pairs": []}, ValueError, r"pairs is empty: name at least one pair of classes"),
        ({"pairs": (0, 1)}, ValueError, r"pairs=\[\(p, q\), \.\.\.\]; got 0 among them"),
        ({"pairs": ["ab"]}, ValueError, r"pairs=\[\(p, q\), \.\.\.\]; got 'ab' among them"),
        ({"pairs": [(0, 1, 2)]}, ValueError, r"pairs=\[\(p, q\), \.\.\.\]; got \(0, 1, 2\) among them"),
        (
            {"data": data() * 2},
            ValueError,
            r"the images reach from 0 to 2, beyond the decoder's image_range \(0 to 1\): train with",
        ),
        (
            {"data": data() - 0.5},
            ValueError,
            r"beyond the decoder's image_range.*train with decoder=.'image_range': .least",
        ),
        ({"data": data(0)}, ValueError, r"the training data is empty"),
        ({"data": (data(), torch.zeros(59))}, ValueError, r"60 training images and 59 labels"),
        ({"data": (data(),)}, ValueError, r"training data in a tuple is \(images, labels\); got 1 parts"),
        ({"data": 7}, TypeError, r"the training data is a int; expected a Dataset with a length"),
        ({"data": (data() * 255).to(torch.uint8)}, TypeError, r"dtype torch\.uint8; expected float"),
        ({"data": [*data(40), *pictures(20, side=20)]}, ValueError, r"the training images have different sizes"),
        (
            {"data": [*data(64), *pictures(20, side=20)]},
            ValueError,
            r"the training images have different sizes, \[3, 16, 16\] and \[3, 20, 20\]",
        ),
        ({"precision": "float16"}, ValueError, r"precision must be one of float32, bfloat16; got 'float16'"),
        ({"kl_order": "both"}, ValueError, r"kl_order must be one of image, latent; got 'both'"),
        ({"steps": 0}, ValueError, r"steps must be at least 1; got 0"),
        ({"steps": None, "epochs": 0}, ValueError, r"epochs must be at least 1; got 0"),
        ({"batch": 0}, ValueError, r"batch must be at least 1; got 0"),
        ({"learning_rate": 0.0}, ValueError, r"learning_rate must be positive; got 0"),
        ({"learning_rate": math.nan}, ValueError, r"learning_rate must be positive; got nan"),
        ({"alpha": 1.0}, ValueError, r"alpha is half the width of a band and must lie in \[0, 1\); got 1"),
        ({"alpha": -0.1}, ValueError, r"must lie in \[0, 1\); got -0\.1"),
        ({"augment": -1}, ValueError, r"augment is a number of pixels, at least 0; got -1"),
        ({"blend": 0.5}, ValueError, r"must lie in \[0, 0\.5\); got 0\.5"),
        ({"warm_up": -1}, ValueError, r"warm_up is a number of steps, at least 0; got -1"),
        ({"noise": -0.1}, ValueError, r"noise is a standard deviation, at least 0; got -0\.1"),
        ({"blur": -0.1}, ValueError, r"blur is a standard deviation in pixels, at least 0; got -0\.1"),
        ({"unsure": math.inf}, ValueError, "unsure is a number of at least 0; got inf"),
        ({"weights": {"beauty": 1}}, ValueError, r"unknown loss 'beauty'; there are classification, adversarial, rec"),
        ({"weights": {"feature": -1}}, ValueError, r"the weight of the feature loss must be a number of at least 0"),
        ({"weights": {"feature": math.inf}}, ValueError, r"the weight of the feature loss must be a number"),
        ({"save_every": 0}, ValueError, r"save_every is a number of steps, at least 1; got 0"),
        ({"preview_every": 0}, ValueError, r"preview_every is a number of steps, at least 1; got 0"),
        ({"decoder": {"image_range": (1, 0)}}, ValueError, r"image_range must be \(least, largest\)"),
    ],
)
def test_bad_training(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fitted(**options)


def test_a_stream_of_data_is_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(data())

    for kind in (Stream(), DataLoader(Stream())):
        with pytest.raises(TypeError, match=r"the training data is a Stream; expected a Dataset with a length"):
            fitted(data=kind)


def test_a_class_without_images_is_named() -> None:
    classifier, x = wrapped(), data()
    x = x[classifier.logits(x).argmax(1) != 2]
    with pytest.raises(ValueError, match=r"class 'class 2' of the pairs has 0 training images.*at least 2 are needed"):
        fitted(classifier, data=x)


def test_too_many_classes_need_named_pairs() -> None:
    with pytest.raises(ValueError, match=r"30 classes have 435 pairs: name those that the decoder shall lead between"):
        fitted(wrapped(GapNet(classes=30)), pairs=None)


def test_a_range_of_the_models_own() -> None:
    """Images as a normalising preprocess gives them."""
    net = GapNet()
    classifier = finecf.wrap(net, layer="block", preprocess=lambda image: image * 1.5 - 0.25)
    mirror = finecf.MirrorCFE(classifier)
    options = TINY | {"decoder": TINY["decoder"] | {"image_range": (-0.25, 1.25)}}
    predicted = classifier.logits(classifier.prepare(data())).argmax(1)
    common = predicted.bincount().argsort(descending=True)[:2].tolist()
    mirror.fit(data(), [tuple(common)], **options)
    x = data()[predicted == common[0]][:1]
    (found,) = mirror.explain(x, common[1])
    assert torch.equal(found.image, x[0])
    assert torch.equal(found.prepared, (x[0] * 1.5 - 0.25).cpu())
    assert float(found.images.min()) >= -0.25
    assert float(found.images.max()) <= 1.25
    with pytest.raises(ValueError, match=r"beyond the decoder's image_range \(-0\.25 to 1\.25\): give images"):
        mirror.explain(x * 2, common[1])


def test_a_head_that_is_not_linear_is_trained_with_lbfgs() -> None:
    with pytest.raises(ValueError, match=r'needs a linear head behind the pooling.*use reflection="lbfgs"'):
        fitted(wrapped(GapNet(hidden=10)))
    mirror, losses = fitted(wrapped(GapNet(hidden=10)), reflection="lbfgs", steps=2, batch=3, skips=True, pairs=None)
    assert len(losses) == 2
    x = data(4)
    found = mirror.explain(x, others(mirror.classifier, x), steps=3)
    assert max(each.residual for each in found) < 1e-2
    assert all(each.reflection == "lbfgs" for each in found)


def test_a_model_without_average_pooling_is_not_trained_for() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            net = GapNet()
            self.block, self.fc = nn.Sequential(net.stem, net.block), nn.Linear(12 * 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.block(x).flatten(1))

    for reflection in ("closed_form", "lbfgs"):
        with pytest.raises(
            ValueError, match=r"global average pooling.*finecf\.FGVCE and finecf\.SMDL explain this one"
        ):
            fitted(finecf.wrap(Flat().eval().to(DEVICE), layer="block"), reflection=reflection)


def test_the_progress_bar_counts_steps(capsys: pytest.CaptureFixture[str]) -> None:
    mirror, _ = fitted(progress=True, pairs=None)
    said = capsys.readouterr().err
    assert "6/6" in said
    last = said.split("\r")[-1].rstrip()
    assert len(last) <= 80
    for name in LOSSES:
        assert f" {name[:3]} " in last
    x = data(3)
    mirror.explain(x, others(mirror.classifier, x), steps=2)
    assert "3/3" in capsys.readouterr().err


# ---- explaining: a decoder that draws exactly what the map says


COLOURS = (
    (0.6, 0.3, 0.2),  # red; green wins from 1/2 on
    (0.6, 0.3, 0.5),  # blue wins from 1/3 to 2/3
    (0.3, 0.2, 0.7),  # blue: from red to green, blue wins everywhere
)


def painting(**options: Any) -> finecf.MirrorCFE:
    return finecf.MirrorCFE(mosaic(), Painter(), **options)


def test_the_fields_of_an_explanation() -> None:
    mirror, x = painting(), coloured(*COLOURS)
    found = mirror.explain(x, "green", steps=[0.0, 0.4, 0.5, 1.0], source="red", sources=["a.png", "b.png", "c.png"])
    first = [0.52, 0.68, None]  # the first places of a grid of 0.02 beyond 1/2 and 2/3
    for b, each in enumerate(found):
        red, green, blue = COLOURS[b]
        assert isinstance(each, finecf.MirrorExplanation)
        assert torch.equal(each.image, x[b])
        assert torch.equal(each.prepared, x[b].cpu())
        assert each.source == f"{'abc'[b]}.png"
        assert (each.origin, each.target, each.target_name) == (0, 1, "green")
        assert each.predicted == (2 if b == 2 else 0)
        assert each.predicted_name == ("blue" if b == 2 else "red")
        assert each.reflection == "closed_form"
        assert each.seed is None
        assert each.k.tolist() == [0.0, 0.4, 0.5, 1.0]
        assert each.first_k == (None if first[b] is None else pytest.approx(first[b]))
        assert each.residual < 1e-6
        assert {"finecf", "torch", "device"} <= set(each.versions)
        # Along k red falls to green's value and green rises to red's; the pattern inside a cell is the decoder's loss.
        drawn = lambda k, colour=(red, green, blue): torch.tensor(  # noqa: E731
            [colour[0] - k * (colour[0] - colour[1]), colour[1] + k * (colour[0] - colour[1]), colour[2]]
        )
        for place, k in enumerate((0.0, 0.4, 0.5, 1.0)):
            torch.testing.assert_close(each.images[place].mean((1, 2)), drawn(k), rtol=0, atol=1e-6)
            torch.testing.assert_close(each.latent_logits[place].float(), 8 * drawn(k), rtol=0, atol=1e-5)
        torch.testing.assert_close(each.image_logits, each.latent_logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(each.mirror_image, each.images[3])
        torch.testing.assert_close(each.reconstruction, each.images[0])
        assert float(each.latent_error.max()) < 1e-6
        assert each.confidence_gap < 1e-6
        wanted = (8 * drawn(0.4)).double().softmax(0)[:2]
        torch.testing.assert_close(each.confidences()[1], wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(each.confidences(latent=True)[1], wanted, rtol=0, atol=1e-6)
        before = (8 * torch.tensor(COLOURS[b])).double().softmax(0)
        after = (8 * drawn(1.0 if first[b] is None else first[b])).double().softmax(0)
        assert each.probabilities_before == pytest.approx((float(before[each.predicted]), float(before[1])), abs=1e-6)
        assert each.probabilities_after == pytest.approx((float(after[each.predicted]), float(after[1])), abs=1e-6)
        shown = each.mirror_image if first[b] is None else each.first_image
        assert torch.equal(each.counterfactual, shown)
        torch.testing.assert_close(shown.mean((1, 2)), drawn(first[b] or 1.0), rtol=0, atol=1e-6)
        torch.testing.assert_close(each.maps["difference"].cpu(), (shown - x[b].cpu()).abs().mean(0))
        torch.testing.assert_close(each.maps["change"].cpu(), (shown - each.reconstruction).abs().mean(0))
    assert [each.mirror_valid for each in found] == [True, True, False]
    assert [each.latent_first_k for each in found] == [
        pytest.approx(0.5, abs=1e-5),
        pytest.approx(2 / 3, abs=1e-5),
        None,
    ]
    assert found[2].first_image is None
    assert ["the source red is not the predicted class" in " ".join(each.notes) for each in found] == [
        False,
        False,
        True,
    ]


def test_the_words_of_a_summary() -> None:
    easy, _, never = painting().explain(coloured(*COLOURS), "green", source="red", sources=["a", "b", "c"])
    assert repr(easy) == "<MirrorExplanation 'a': red -> green, first counterfactual at k = 0.52>"
    assert repr(never) == "<MirrorExplanation 'c': blue -> green, no counterfactual image>"
    text = easy.summary()
    assert "first counterfactual image at k = 0.52 (of the latent: k = 0.500)" in text
    assert "the image of k = 1 is classified as the target" in text
    assert "(that image)" in text
    text = never.summary()
    assert "no image on the path is classified as the target (of the latent: none)" in text
    assert "the image of k = 1 is not classified as the target" in text
    assert "(the image of k = 1)" in text
    assert "note: the source red is not the predicted class" in text


def test_what_is_found_on_the_way_may_be_lost_at_the_end() -> None:
    class Shy(Painter):
        """Draws no image that is more green than 0.55."""

        def forward(self, features: Tensor, *rest: Any) -> Tensor:
            shown = torch.where(features[:, 1:2].mean((2, 3), keepdim=True) > 0.55, features[:, [1, 0, 2]], features)
            return super().forward(shown, *rest)

    (found,) = finecf.MirrorCFE(mosaic(), Shy(), corrections=0).explain(coloured(COLOURS[0]), "green")
    assert found.first_k == pytest.approx(0.52)
    assert not found.mirror_valid
    assert "the image of k = 1 is not classified as the target" in found.summary()


@pytest.mark.parametrize("corrections", [0, 2])
@pytest.mark.parametrize("resolution", [0.02, 0.05, 0.2, 0.3, 0.5])
def test_the_search_stops_each_image_at_its_first_counterfactual(resolution: float, corrections: int) -> None:
    """The first k is the smallest of the grid beyond 1/2 whose image is the target; nothing is drawn beyond it."""
    mirror, x = painting(resolution=resolution, corrections=corrections), coloured(*COLOURS)
    number = math.ceil(0.5 / resolution - 1e-9)
    assert 0.5 / number <= resolution + 1e-9
    grid = [0.5 + 0.5 * place / number for place in range(1, number + 1)]
    every = mirror.explain(x, "green", steps=grid, source="red")
    assert isinstance(mirror.decoder, Painter)
    mirror.decoder.images = 0
    found = mirror.explain(x, "green", steps=2, source="red")
    tried = 0
    for each, whole in zip(found, every, strict=True):
        won = [place for place, logits in enumerate(whole.image_logits) if int(logits.argmax()) == 1]
        own = won[0] + 1 if won else number
        assert each.first_k == (pytest.approx(grid[won[0]]) if won else None)
        # The image, twice, and its drawing at k = 0, which is not corrected; one that is costs a drawing for its slope.
        least, most = 3 + (1 + own), 3 + (1 + own) * (2 + corrections)
        assert least <= each.evaluations <= most
        assert corrections or each.evaluations == least
        if won:
            torch.testing.assert_close(each.first_image, whole.images[won[0]])
        tried += each.evaluations - 2
    assert mirror.decoder.images == tried


# ---- explaining: trained decoders


@pytest.fixture(scope="module", params=["plain", "skips", "per cell", "change"])
def mirror(request: pytest.FixtureRequest) -> finecf.MirrorCFE:
    options = {"plain": {}, "skips": {"skips": True}, "per cell": {"shift": "per_cell"}, "change": CHANGE}[
        request.param
    ]
    return fitted(steps=20, batch=16, learning_rate=1e-2, pairs=None, **options)[0]


def targets(mirror: finecf.MirrorCFE, x: Tensor) -> Tensor:
    return others(mirror.classifier, x)


def test_k_0_is_the_reconstruction(mirror: finecf.MirrorCFE) -> None:
    x = data(5)
    found = mirror.explain(x, targets(mirror, x), steps=[1.0, 0.0])
    for each in found:
        assert torch.equal(each.images[1], each.reconstruction)
        assert torch.equal(each.images[0], each.mirror_image)
        assert each.mirror_valid == (int(each.image_logits[0].argmax()) == each.target)
        if mirror.decoder.changes:
            assert torch.equal(each.reconstruction, each.prepared)
    assert max(float((each.images[0] - each.images[1]).abs().max()) for each in found) > 0.01


def test_what_the_classifier_says_is_what_it_says_of_the_images(mirror: finecf.MirrorCFE) -> None:
    x = data(4)
    classifier = mirror.classifier
    path = mirror.latent_path(x, targets(mirror, x), steps=5)
    for b, each in enumerate(mirror.explain(x, targets(mirror, x), steps=5)):
        features, logits = classifier.features_and_logits(each.images)
        torch.testing.assert_close(each.image_logits.float(), logits.cpu(), rtol=0, atol=1e-4)
        error = (features.mean((2, 3)) - path.latents[b]).abs().mean(1).cpu()
        torch.testing.assert_close(each.latent_error.float(), error, rtol=0, atol=1e-5)
        torch.testing.assert_close(each.latent_logits, path.logits[b].cpu(), rtol=0, atol=1e-5)
        wanted = each.latent_logits.softmax(1)[:, each.target] - each.image_logits.softmax(1)[:, each.target]
        assert each.confidence_gap == pytest.approx(float(wanted.abs().mean()))


def test_an_image_alone_is_explained_as_among_others(mirror: finecf.MirrorCFE) -> None:
    x = data(5)
    together = mirror.explain(x, targets(mirror, x), steps=4)
    parts = finecf.MirrorCFE(mirror.classifier, mirror.decoder, shift=mirror.shift, micro_batch=2)
    tight = finecf.MirrorCFE(mirror.classifier, mirror.decoder, shift=mirror.shift, memory_budget=1)
    for own in (parts.explain(x, targets(mirror, x), steps=4), tight.explain(x, targets(mirror, x), steps=4)):
        assert len(own) == 5
        for one, other in zip(own, together, strict=True):
            same_explanation(one, other)
    for b in range(5):
        (alone,) = mirror.explain(x[b], int(targets(mirror, x)[b]), steps=4)
        same_explanation(alone, together[b])


def same_explanation(one: finecf.MirrorExplanation, other: finecf.MirrorExplanation) -> None:
    assert (one.predicted, one.target, one.origin) == (other.predicted, other.target, other.origin)
    if one.first_k != other.first_k:  # only rounding may say so, of an image that stands on the boundary itself
        place = one.k.tolist().index(min(k for k in (one.first_k, other.first_k) if k is not None))
        others = one.image_logits[place].clone()
        others[one.target] = -torch.inf
        assert float((one.image_logits[place, one.target] - others.max()).abs()) < 1e-5
    for name in ("images", "reconstruction", "mirror_image", "image_logits", "latent_logits", "latent_error"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=1e-4)


def test_trained_decoders_stop_at_the_first_counterfactual_too(mirror: finecf.MirrorCFE) -> None:
    x = pictures(12, seed=3)
    grid = [0.5 + 0.02 * place for place in range(1, 26)]
    every = mirror.explain(x, targets(mirror, x), steps=grid)
    for each, whole in zip(mirror.explain(x, targets(mirror, x), steps=2), every, strict=True):
        won = [k for k, logits in zip(grid, whole.image_logits, strict=True) if int(logits.argmax()) == whole.target]
        assert each.first_k == (pytest.approx(won[0]) if won else None)


def test_per_cell_and_uniform_shifts_have_the_same_latents_and_other_images() -> None:
    trained, _ = fitted(steps=20, learning_rate=1e-2, pairs=None, corrections=0)
    x = data(4)
    own = finecf.MirrorCFE(trained.classifier, trained.decoder, shift="per_cell", corrections=0)
    for one, two in zip(
        own.explain(x, targets(own, x), steps=3), trained.explain(x, targets(own, x), steps=3), strict=True
    ):
        torch.testing.assert_close(one.latent_logits, two.latent_logits)
        assert torch.equal(one.reconstruction, two.reconstruction)
        assert float((one.mirror_image - two.mirror_image).abs().max()) > 1e-4


def test_the_skips_are_edited_under_the_prior_alone() -> None:
    """With a prior that marks nothing, the image hears of k through the deepest map alone."""
    trained, _ = fitted(skips=True, pairs=None, corrections=0)
    x = data(3)
    with torch.no_grad():
        for editor in trained.decoder.editors:
            editor.draw.bias.fill_(3.0)
        found = trained.explain(x, targets(trained, x), steps=[0.3])
        *skips, features = trained.classifier.pyramid(x)
        path = trained.latent_path(x, targets(trained, x), steps=[0.3])
        moved = features + (path.latents[:, 0] - features.mean((2, 3)))[:, :, None, None]
        logits = [trained.classifier.cam(moved, which) for which in (path.source, path.target)]
        masks = [
            cam > 0.5 * cam.amax((1, 2), keepdim=True) for cam in logits
        ]  # k = 0.3: the threshold is at its largest
        mask = (masks[0] | masks[1]).float()
        assert 0 < float(mask.mean()) < 1
        wanted = trained.decoder(moved, skips, trained.decoder.prepare(skips), mask)
        free = trained.decoder(moved, skips, trained.decoder.prepare(skips))
    drawn = torch.stack([each.images[0] for each in found]).to(DEVICE)
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-5)
    assert float((drawn - free).abs().max()) > 1e-3


def test_a_model_in_train_mode_is_explained_as_in_eval_mode(mirror: finecf.MirrorCFE) -> None:
    net, x = GapNet(), data(3)
    wanted = mirror.explain(x, targets(mirror, x), steps=3)
    net.train()
    classifier = wrapped(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.warns(UserWarning, match="train mode"):
        found = finecf.MirrorCFE(classifier, mirror.decoder, shift=mirror.shift).explain(x, targets(mirror, x), steps=3)
    for one, other in zip(found, wanted, strict=True):
        same_explanation(one, other)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    assert not any(parameter.grad is not None for parameter in net.parameters())


def test_attribute_has_one_map_for_each_image(mirror: finecf.MirrorCFE) -> None:
    x = data(3)
    found = mirror.attribute(x, targets(mirror, x))
    assert found.shape == (3, 1, SIDE, SIDE)
    for map_, each in zip(found, mirror.explain(x, targets(mirror, x)), strict=True):
        torch.testing.assert_close(map_[0], each.maps["change"])
        torch.testing.assert_close(map_[0].cpu(), (each.counterfactual - each.reconstruction).abs().mean(0))
    assert mirror.attribute(x[0], int(targets(mirror, x)[0])).shape == (1, 1, SIDE, SIDE)
    assert mirror.attribute(x[:0], 0).shape == (0, 1, SIDE, SIDE)
    assert mirror.explain(x[:0], 0) == []


def test_the_preview_sees_a_decoder_that_explains() -> None:
    x = data(2)
    seen: list[tuple[int, bool]] = []

    def preview(done: int, own: finecf.MirrorCFE) -> None:
        own.explain(x, targets(own, x), steps=2)
        seen.append((done, own.decoder.training))

    with_it, _ = fitted(preview=preview, preview_every=2, pairs=None)
    assert seen == [(2, False), (4, False), (6, False)]
    assert same_bits(with_it, fitted(pairs=None)[0])


def drawing_of(on: str) -> tuple[str, str, float]:
    """What the recipe says of how a set is drawn."""
    recipe = mirror_recipe(on)
    return recipe.reflection, recipe.shift, recipe.soften


def assert_made_by_the_recipe(own: finecf.MirrorCFE, on: str) -> None:
    """The decoder of a shipped file is built, and was trained, as the recipe of today says."""
    settings = dict(mirror_recipe(on).settings)
    assert own.decoder is not None
    shape = own.decoder.shape
    assert own.decoder.settings == MirrorDecoder(shape, **settings.pop("decoder", {})).settings
    trained = own.meta["recipe"]
    weights = settings.pop("weights")
    assert {name: trained["weights"][name] for name in weights} == weights
    assert {name: trained[name] for name in settings} == json.loads(json.dumps(settings))


def test_the_decoder_that_ships_leads_between_its_digits() -> None:
    """On digits that neither it nor the net has seen."""
    net, meta = load_digits_net()
    classifier = finecf.wrap(net.to(DEVICE), class_names=meta["classes"])
    own = finecf.MirrorCFE(classifier, shipped_decoder("digits"), untrained_pairs="refuse")
    assert (own.reflection, own.shift, own.soften) == drawing_of("digits") == ("two_class", "uniform", 0.0)
    assert_made_by_the_recipe(own, "digits")
    held_out = finecf.data.digits("test")
    x = held_out.batch().to(DEVICE)
    predicted = classifier.logits(x).argmax(1)
    partner = {p: q for pair in own.meta["pairs"] for p, q in (pair, pair[::-1])}
    right = [number for number, label in enumerate(held_out.labels) if int(predicted[number]) == label in partner][:24]
    goals = [partner[int(predicted[number])] for number in right]
    found = own.explain(x[right], goals, steps=5)
    assert sum(each.first_k is not None for each in found) >= 23
    assert sum(each.mirror_valid for each in found) >= 23
    assert all(torch.equal(each.reconstruction, each.prepared) for each in found)
    assert sum(each.confidence_gap for each in found) / 24 < 0.05
    changes = [float(each.maps["change"].mean()) for each in found]
    assert max(changes) < 0.3
    assert sum(changes) / 24 < 0.15


def test_the_decoder_that_ships_changes_the_birds_where_they_differ() -> None:
    net, meta = load_birds_net()
    classifier = finecf.wrap(net.to(DEVICE), class_names=meta["classes"])
    own = finecf.MirrorCFE(classifier, shipped_decoder("birds"), untrained_pairs="refuse")
    assert (own.reflection, own.shift, own.soften) == drawing_of("birds") == ("closed_form", "per_cell", 1.5)
    assert_made_by_the_recipe(own, "birds")
    birds = finecf.data.SyntheticBirds("test", n=40)
    partner = dict(reversed(own.meta["pairs"]))
    items = [item for item in birds if item.drawn_label in partner]
    x = torch.stack([item.tensor for item in items]).to(DEVICE)
    predicted = classifier.logits(x).argmax(1).tolist()
    right = [number for number, item in enumerate(items) if predicted[number] == item.drawn_label][:16]
    assert len(right) == 16
    goals = torch.tensor([partner[predicted[number]] for number in right])
    found = own.explain(x[right], goals.tolist(), steps=3)
    assert sum(each.first_k is not None for each in found) >= 15
    assert all(torch.equal(each.reconstruction, each.prepared) for each in found)
    drawn = torch.stack([each.mirror_image for each in found])
    scores = redraw_distances(birds, [items[number] for number in right], x[right].cpu(), drawn, goals)
    assert scores.means()["energy"] > 3 * scores.means()["area"]


# ---- files


def test_an_explanation_comes_back_from_its_file(tmp_path: Path) -> None:
    for number, each in enumerate(
        painting().explain(coloured(*COLOURS), "green", source="red", sources=["a", "b", "c"])
    ):
        assert (each.first_image is None) == (number == 2)
        again = finecf.load(each.save(tmp_path / f"{number}.safetensors"))
        assert isinstance(again, finecf.MirrorExplanation)
        assert again.summary() == each.summary()
        assert repr(again) == repr(each)
        for name in finecf.MirrorExplanation.__dataclass_fields__:
            one, two = getattr(each, name), getattr(again, name)
            if isinstance(one, Tensor):
                assert torch.equal(one.cpu(), two)
                assert one.dtype == two.dtype
            elif name == "maps":
                assert set(one) == set(two) == {"difference", "change"}
                assert all(torch.equal(one[key].cpu(), two[key]) for key in one)
            else:
                assert one == two, name


def test_a_fitted_decoder_comes_back_from_its_file(tmp_path: Path) -> None:
    out = tmp_path / "d.safetensors"
    trained, _ = fitted(checkpoint=out, skips=True)
    x = data(4)
    for path in (out, str(out)):
        again = finecf.MirrorCFE(wrapped(), path)
        assert again.meta["pairs"] == [[0, 1], [1, 2]]
        assert again.meta["recipe"]["steps"] == 6
        with pytest.warns(UserWarning, match="was not trained on the pair"):
            found = again.explain(x, targets(again, x), steps=3)
        with pytest.warns(UserWarning, match="was not trained on the pair"):
            wanted = trained.explain(x, targets(again, x), steps=3)
        for one, two in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.images, two.images, rtol=0, atol=5e-3)  # weights in float16
    again.save(tmp_path / "second.safetensors", note="copied")
    assert finecf.MirrorCFE(wrapped(), tmp_path / "second.safetensors").meta["note"] == "copied"
    with pytest.raises(ValueError, match=r"made for another classifier"):
        finecf.MirrorCFE(wrapped(seed=1), out)
    with pytest.raises(ValueError, match=r"there is no decoder to save: fit one first"):
        finecf.MirrorCFE(wrapped()).save(tmp_path / "none.safetensors")


# ---- corrections


class Part(nn.Module):
    """Draws a share of what a map has moved by, where the map is the image itself."""

    changes, masks, skips = True, False, False
    low: Tensor
    high: Tensor

    def __init__(self, share: float, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.share, self.shape = share, Shape(size, size, ())
        for name, value in (("low", -9.0), ("high", 9.0)):
            self.register_buffer(name, torch.full((1, size[0], 1, 1), value))

    def prepare(self, skips: Sequence[Tensor]) -> list[Tensor]:
        return []

    def forward(self, features: Tensor, *_: object) -> Tensor:
        return self.share * features

    def shown(self, image: Tensor, moved: Tensor, start: Tensor, prior: Tensor | None = None) -> Tensor:
        assert prior is None
        return image + moved - start


def corrected(corrections: int, share: float = 0.4, hidden: bool = False, **settings: Any) -> Any:
    """Margins of images and of the latents they are drawn from at k = 0, 0.25, ... 1, both [B,K]; what was found; the
    classifier.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = {"map": nn.Identity(), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(3, 4)}
        if hidden:
            layers["fc"] = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 4))
    classifier = finecf.wrap(nn.Sequential(OrderedDict(layers)).to(DEVICE).eval(), layer="map")
    x = torch.rand(5, 3, 6, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mirror = finecf.MirrorCFE(classifier, corrections=corrections, **settings)
    mirror.decoder = Part(share, (3, 6, 7)).to(DEVICE)  # type: ignore[assignment]
    wanted = (classifier.logits(x).argmax(1) + 1) % 4
    found = mirror.explain(x, wanted, steps=5)
    said, goal = (
        torch.stack([logits[:, each.origin] - logits[:, each.target] for each, logits in zip(found, own, strict=True)])
        for own in ([each.image_logits for each in found], [each.latent_logits for each in found])
    )
    return said.double(), goal.double(), found, classifier


def left_over(found: list[finecf.MirrorExplanation]) -> Tensor:
    """What images are short of, as a share of the way between their classes: float64 [B,K]."""
    rows = []
    for each in found:
        image, latent = (behind(logits, each.origin, each.target) for logits in (each.image_logits, each.latent_logits))
        rows.append((image - latent).amax(1) / (latent[0, 0] - latent[-1, 0]).abs())
    return torch.stack(rows)


@pytest.mark.parametrize("shift", ["uniform", "per_cell"])
def test_a_correction_makes_up_for_what_is_missing_where_all_is_linear(shift: str) -> None:
    """A decoder that draws nine tenths of what it is told is short of a tenth of k, and after a correction of nothing,
    but where a third class comes up.
    """
    before, after, at_last = (left_over(corrected(number, share=0.9, shift=shift)[2])[:, 1:] for number in (0, 1, 4))
    assert float(before.min()) > 0.02
    assert float(after.min()) > -1e-4
    assert bool((after < before).all())
    assert int((after < 1e-4).sum()) >= 10
    assert float(at_last.abs().max()) < 0.02
    found = corrected(1, share=0.9, shift=shift)[2]
    for each in found:
        assert each.corrections == 1
        torch.testing.assert_close(each.images[0], each.prepared, rtol=0, atol=1e-6)
        drawn = 4 + round((each.first_k - 0.5) / 0.02)  # the strip's four beyond k = 0, the search
        assert each.evaluations == 3 + 3 * drawn


def test_no_smaller_change_would_do() -> None:
    """With a head that is linear the change that a correction adds is the difference of the classes' weights."""
    once, again = (corrected(corrections, share=0.9)[2:] for corrections in (0, 1))
    weight = again[1].model.fc.weight.detach().cpu()
    for before, after in zip(once[0], again[0], strict=True):
        said, latent = (
            behind(logits, after.origin, after.target) for logits in (before.image_logits, after.latent_logits)
        )
        rivals = before.image_logits.clone()
        rivals[:, after.target] = -math.inf
        for number in range(1, 5):
            by_source, by_best = (said - latent)[number].tolist()
            rival = after.origin if by_source >= by_best else int(rivals[number].argmax())
            direction = (weight[after.target] - weight[rival]) / (weight[after.target] - weight[rival]).square().sum()
            wanted = max(by_source, by_best) * direction.double()[:, None, None]
            added = (after.images[number] - before.images[number]).double()
            torch.testing.assert_close(added, wanted.expand_as(added), rtol=1e-3, atol=1e-5)


def test_corrections_leave_less_and_less() -> None:
    worst = []
    for corrections in (0, 1, 2, 4, 8):
        short = left_over(corrected(corrections, share=0.4)[2])
        worst.append(float(short.abs().max()))
        torch.testing.assert_close(short[:, 0], torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-4)
    assert worst == sorted(worst, reverse=True)
    assert worst[0] > 0.5
    assert worst[-1] < 0.02


def test_what_falls_short_of_the_boundary_is_brought_across_it() -> None:
    """40 % of the way to the mirror image ends before the boundary."""
    assert [each.first_k for each in corrected(0)[2]] == [None] * 5
    assert all(each.first_k is not None and each.mirror_valid for each in corrected(8)[2])


def test_a_decoder_that_draws_too_much_is_brought_back() -> None:
    assert float(left_over(corrected(0, share=1.5)[2])[:, 1:].max()) < -0.1
    assert float(left_over(corrected(8, share=1.5)[2]).abs().max()) < 0.02


def test_the_least_change() -> None:
    slope = torch.zeros(4, 2, 1, 1)
    slope[:3, 0, 0, 0], slope[:3, 1, 0, 0] = 3.0, 4.0
    short = torch.tensor([10.0, -10.0, 1.0, 5.0], dtype=torch.float64)
    found = least_change(short, slope, torch.tensor([9.0, 1.0, 9.0, 9.0], dtype=torch.float64))
    wanted = torch.tensor([[-1.2, -1.6], [0.6, 0.8], [-0.12, -0.16], [0.0, 0.0]])  # norms 2, 1 (the longest), 0.2
    torch.testing.assert_close(found[:, :, 0, 0], wanted)


@pytest.mark.parametrize("shift", ["uniform", "per_cell"])
def test_no_correction_is_longer_than_a_quarter_of_the_way(shift: str) -> None:
    """A decoder that draws a twentieth of what it is told is short of more than a quarter of the way makes up for."""
    before, after = (corrected(number, share=0.05, shift=shift)[2] for number in (0, 1))
    for one, two in zip(before, after, strict=True):
        way = (one.images[-1] - one.prepared).norm()  # k = 1
        for number in range(1, 5):
            assert float((two.images[number] - one.images[number]).norm() / way) == pytest.approx(0.25, rel=1e-3)


def test_graphs_of_corrections_keep_to_the_memory_budget() -> None:
    """As many images share a graph as fit in; it makes no difference to what is drawn."""
    trained, _ = fitted(**CHANGE)
    clf, x = trained.classifier, data(6)
    wanted = others(clf, x)
    most: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pairs that were not trained
        drawn = {}
        for budget in (1, 1 << 30):
            mirror = finecf.MirrorCFE(clf, trained.decoder, memory_budget=1 << 30)
            drawing = dataclasses.replace(
                mirror._drawing(trained.decoder, clf.prepare(x), clf.logits(x).argmax(1), wanted), budget=budget
            )
            sizes: list[int] = []
            hook = clf.model.register_forward_pre_hook(
                lambda _, inputs, sizes=sizes: sizes.append(len(inputs[0]) if inputs[0].requires_grad else 0)
            )
            k = torch.full((6,), 0.9, dtype=torch.float64, device=DEVICE)
            with torch.no_grad():
                drawn[budget] = drawing.at(torch.arange(6, device=DEVICE), k)[0]
            hook.remove()
            most[budget] = max(sizes)
            assert drawing.counts.graph > 4 * x[0].numel()
    assert most[1] == 1
    assert most[1 << 30] > 1
    torch.testing.assert_close(drawn[1], drawn[1 << 30], rtol=0, atol=1e-3)


def test_a_model_without_gradients_is_told_of() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return x * 1.0

    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.pool, self.flat, self.fc = Plain(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.flat(self.pool(self.map(x))))

    classifier = finecf.wrap(Still().to(DEVICE).eval(), layer="map")
    x = torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wanted = (classifier.logits(x).argmax(1) + 1) % 4
    for corrections in (0, 1):
        mirror = finecf.MirrorCFE(classifier, corrections=corrections)
        mirror.decoder = Part(0.5, (3, 6, 7)).to(DEVICE)  # type: ignore[assignment]
        if corrections:
            with pytest.raises(ValueError, match=r"this model gives none .*: corrections=0 draws every image once"):
                mirror.explain(x, wanted)
        else:
            assert len(mirror.explain(x, wanted)) == 2


def test_heads_that_are_not_linear_are_corrected_for_their_own_margins() -> None:
    errors = []
    for corrections in (0, 1, 4):
        said, goal, _, _ = corrected(corrections, share=0.7, hidden=True, reflection="lbfgs")
        errors.append(float((said - goal).abs().max()))
    assert errors[2] < 0.05 * errors[0] < errors[1] < 0.6 * errors[0]


def behind(logits: Tensor, source: int, target: int) -> Tensor:
    """By how much the target is behind the source, and behind the best other class, [K,2]."""
    others = [index for index in range(logits.shape[1]) if index != target]
    return torch.stack([logits[:, source], logits[:, others].amax(1)], 1).double() - logits[:, target, None].double()


def test_a_corrected_blur_is_corrected_for_half() -> None:
    """What the image and the blurred one are short of on average, whatever is more, comes to nothing."""
    _, goal, found, classifier = corrected(12, share=0.7, correction_blur=1.5, shift="per_cell")
    scale, sharp = float(goal.abs().max()), []
    for each in found:
        blurred = classifier.logits(gaussian_blur(each.images.to(DEVICE), 1.5)).cpu()
        image, smooth, latent = (
            behind(logits, each.origin, each.target) for logits in (each.image_logits, blurred, each.latent_logits)
        )
        way = float((latent[0, 0] - latent[-1, 0]).abs())
        short = ((image + smooth) / 2 - latent).amax(1)[1:]
        torch.testing.assert_close(short, torch.zeros_like(short), rtol=0, atol=0.0201 * way)
        sharp.append(float((image - latent).amax(1)[1:].abs().max()))
        assert each.evaluations % 2  # the image, twice, its drawing at k = 0, and all others sharp and blurred
    assert max(sharp) > 3e-3 * scale
    for each in corrected(1, share=0.4, correction_blur=1.5, shift="per_cell")[2]:
        drawn = 4 + (25 if each.first_k is None else round((each.first_k - 0.5) / 0.02))
        assert each.evaluations == 3 + 6 * drawn  # once, for its slope, and corrected; each time sharp and blurred


def test_corrections_see_the_softened_image() -> None:
    sharp, once, again = (
        corrected(corrections, soften=soften, shift="per_cell")[2]
        for corrections, soften in ((0, 0.0), (0, 1.5), (8, 1.5))
    )
    assert float((left_over(once) - left_over(sharp)).abs().max()) > 1e-3  # the borders make the mean another
    assert float(left_over(once).max()) > 0.3
    assert float(left_over(again).abs().max()) < 0.0201


@pytest.mark.parametrize("soften", [0.0, 1.2])
def test_a_row_at_zero_stays_whatever_others_do(soften: float) -> None:
    trained, _ = fitted(**CHANGE)
    clf, x = trained.classifier, data(3)
    mirror = finecf.MirrorCFE(clf, trained.decoder, corrections=3, correction_blur=1.0, soften=soften)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pairs that were not trained
        drawing = mirror._drawing(trained.decoder, clf.prepare(x), clf.logits(x).argmax(1), others(clf, x))
        k = torch.tensor([0.0, 0.7, 0.0], dtype=torch.float64, device=DEVICE)
        images, _, _ = drawing.at(torch.arange(3, device=DEVICE), k)
    torch.testing.assert_close(images[[0, 2]], x[[0, 2]], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrections": -1}, r"corrections is a whole number of at least 0; got -1"),
        ({"corrections": 1.5}, r"corrections is a whole number of at least 0; got 1\.5"),
        ({"correction_blur": -0.5}, r"correction_blur is a standard deviation in pixels, at least 0; got -0\.5"),
        ({"correction_blur": math.nan}, r"correction_blur is a standard deviation in pixels, at least 0; got nan"),
        ({"soften": -1}, r"soften is a standard deviation in pixels, at least 0; got -1"),
        ({"soften": math.inf}, r"soften is a standard deviation in pixels, at least 0; got inf"),
    ],
)
def test_bad_settings_of_drawing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finecf.MirrorCFE(wrapped(), **options)


# ---- softening


def changing(**options: Any) -> tuple[finecf.Classifier, MirrorDecoder]:
    """A decoder that draws large changes, which are not trained."""
    clf = wrapped()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        decoder = MirrorDecoder(shape_of(clf, data(1)[0], options.pop("skips", False)), 4, 8, 4, **options)
        nn.init.normal_(decoder.to_image.weight, std=40.0)  # an untrained decoder hardly sees what it is given
    return clf, decoder.to(DEVICE).eval()


def test_softened_is_the_change_and_not_the_image() -> None:
    clf, decoder = changing(output="change")
    x = 0.3 + 0.4 * data(4)  # so that no pixel reaches an end of the range
    target = others(clf, x)
    sharp, soft = (
        finecf.MirrorCFE(clf, decoder, corrections=0, soften=sigma).explain(x, target, 3) for sigma in (0.0, 1.2)
    )
    for one, two, image in zip(sharp, soft, x.cpu(), strict=True):
        assert float((one.images[2] - image).abs().max()) > 2e-3
        assert (one.soften, two.soften) == (0.0, 1.2)
        torch.testing.assert_close(two.images, image + gaussian_blur(one.images - image, 1.2), rtol=0, atol=1e-5)
        torch.testing.assert_close(two.images[0], image, rtol=0, atol=0)
        assert float((two.images[2] - one.images[2]).abs().max()) > 1e-4


def test_a_softened_change_stays_within_the_prior() -> None:
    clf, decoder = changing(output="change", prior="contrast", skips=True)
    nn.init.normal_(decoder.editors[0].draw.weight, std=0.3)
    x = 0.3 + 0.4 * data(6)
    source, target = clf.logits(x).argmax(1), others(clf, x)
    k = torch.full((6,), 0.6, dtype=torch.float64, device=DEVICE)
    rows = torch.arange(6, device=DEVICE)
    changed = []
    for sigma in (0.0, 1.2):
        with torch.no_grad():
            drawing = finecf.MirrorCFE(clf, decoder, corrections=0, soften=sigma)._drawing(decoder, x, source, target)
            images, _, _ = drawing.at(rows, k)
            prior = drawing.canvas.prior(rows, drawing.canvas.features, k)
        assert prior is not None
        outside = nn.functional.interpolate(prior[:, None], SIDE, mode="bilinear") == 0
        assert 0 < float(outside.float().mean()) < 1
        changed.append(images)
        assert torch.equal(images[outside.expand_as(x)], x[outside.expand_as(x)])
    assert float((changed[1] - changed[0]).abs().max()) > 1e-4


def test_softening_leaves_training_alone_and_goes_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    sharp, losses = fitted(**CHANGE)
    soft, again = fitted(soften=1.5, checkpoint=file, **CHANGE)
    assert same_bits(sharp, soft)
    assert losses == again
    clf = soft.classifier
    assert finecf.MirrorCFE(clf, file).soften == 1.5
    assert finecf.MirrorCFE(clf, file, soften=0).soften == 0.0
    other = finecf.MirrorCFE(clf, file, soften=0.5)
    assert other.meta["soften"] == 0.5
    other.save(tmp_path / "other.safetensors")
    assert finecf.MirrorCFE(clf, tmp_path / "other.safetensors").soften == 0.5
    assert finecf.MirrorCFE(clf, soft.decoder).soften == 0.0  # a decoder that is no file says nothing


def softened(file: Path) -> tuple[finecf.Classifier, Path]:
    """A classifier, and a file of a decoder whose changes are softened."""
    return fitted(soften=1.5, checkpoint=file, **CHANGE)[0].classifier, file


@pytest.mark.parametrize("value", [-1.0, math.nan, "2", None])
def test_a_file_with_a_wrong_softening_is_refused(tmp_path: Path, value: object) -> None:
    clf, file = softened(tmp_path / "d.safetensors")
    finecf.MirrorCFE(clf, file).save(tmp_path / "wrong.safetensors", soften=value)
    with pytest.raises(ValueError, match="soften is a standard deviation in pixels, at least 0; got"):
        finecf.MirrorCFE(clf, tmp_path / "wrong.safetensors")
    assert finecf.MirrorCFE(clf, tmp_path / "wrong.safetensors", soften=1).soften == 1.0


def test_the_reflection_that_explains_goes_with_the_file(tmp_path: Path) -> None:
    file, other = tmp_path / "d.safetensors", tmp_path / "other.safetensors"
    clf = fitted(checkpoint=file)[0].classifier
    assert finecf.MirrorCFE(clf, file).reflection == "closed_form"
    finecf.MirrorCFE(clf, file, reflection="two_class").save(other)
    read = finecf.MirrorCFE(clf, other)
    assert read.reflection == read.meta["reflection"] == "two_class"
    assert read.meta["recipe"]["reflection"] == "closed_form"  # how it was trained stays on record
    assert finecf.MirrorCFE(clf, other, reflection="closed_form").reflection == "closed_form"
    read.fit(data(), PAIRS, **TINY)  # it trains as that one was trained
    assert read.reflection == read.meta["reflection"] == read.meta["recipe"]["reflection"] == "closed_form"
    unnamed = finecf.MirrorCFE(clf, read.decoder, reflection="two_class")
    unnamed.save(other)
    assert finecf.MirrorCFE(clf, other).reflection == "two_class"


def test_a_decoder_of_whole_images_is_not_softened(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    whole, _ = fitted(checkpoint=file)
    for decoder in (whole.decoder, file):
        with pytest.raises(ValueError, match=r"soften=1\.5 blurs what is added .* draws whole images: leave it at 0"):
            finecf.MirrorCFE(whole.classifier, decoder, soften=1.5)
        assert finecf.MirrorCFE(whole.classifier, decoder, soften=0.0).soften == 0.0
    # A softening that a file brought along says nothing of the next decoder.
    bringing = finecf.MirrorCFE(*softened(tmp_path / "soft.safetensors"))
    assert bringing.soften == 1.5
    bringing.fit(data(), PAIRS, **TINY)
    assert bringing.soften == bringing.meta["soften"] == 0.0
    untrained = finecf.MirrorCFE(whole.classifier, soften=1.5)
    with pytest.raises(ValueError, match=r"draws whole images"):
        untrained.fit(data(), PAIRS, **TINY)
    assert untrained.decoder is None


# ---- bad input to explain


def test_a_decoder_is_used_with_the_shift_that_it_was_trained_with(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    trained, _ = fitted(shift="per_cell", checkpoint=file, corrections=0)
    clf = trained.classifier
    assert finecf.MirrorCFE(clf, decoder=file).shift == "per_cell"
    assert finecf.MirrorCFE(clf, decoder=file, shift="uniform").shift == "uniform"
    assert finecf.MirrorCFE(clf).shift == "uniform"
    with pytest.raises(ValueError, match='shift="per_cell" needs a reflection'):
        finecf.MirrorCFE(clf, decoder=file, reflection="lbfgs")
    finecf.MirrorCFE(clf, trained.decoder, shift="per_cell").save(tmp_path / "again.safetensors")
    assert finecf.MirrorCFE(clf, tmp_path / "again.safetensors").shift == "per_cell"
    x = data(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pairs that were not trained
        again = finecf.MirrorCFE(clf, decoder=file, corrections=0).explain(x, others(clf, x))
        wrong = finecf.MirrorCFE(clf, decoder=file, shift="uniform", corrections=0).explain(x, others(clf, x))
        assert (
            max(float((a.mirror_image - b.mirror_image).abs().max()) for a, b in zip(again, wrong, strict=True)) > 2e-3
        )
        for one, two in zip(trained.explain(x, others(clf, x)), again, strict=True):
            torch.testing.assert_close(one.mirror_image, two.mirror_image, rtol=0, atol=1e-3)  # stored in half


def test_an_untrained_pair_is_warned_of_or_refused() -> None:
    trained, _ = fitted(pairs=[(0, 1)])
    x = data()
    predicted = trained.classifier.logits(x).argmax(1)
    known, unknown = x[predicted == 0][:1], x[predicted == 2][:1]
    words = (
        r"not trained on the pair class 2 -> class 1 \(it knows class 0-class 1\): the images may be of neither class"
    )
    with pytest.warns(UserWarning, match=words) as caught:
        (found,) = trained.explain(unknown, 1)
    assert [warning.filename for warning in caught] == [__file__]
    assert "the decoder was not trained on this pair" in found.notes
    assert trained.explain(known, 1)[0].notes == []
    refusing = finecf.MirrorCFE(trained.classifier, trained.decoder, untrained_pairs="refuse")
    refusing.meta = trained.meta
    with pytest.raises(ValueError, match=words):
        refusing.explain(unknown, 1)
    assert refusing.explain(known, 1)[0].notes == []


def test_a_same_target_is_named_by_its_place_in_the_whole_batch() -> None:
    with pytest.raises(ValueError, match=r"target and predicted class of image 2 are the same, 'blue'"):
        painting(micro_batch=1).explain(coloured(*COLOURS), [1, 1, 2])
    with pytest.raises(ValueError, match=r"target and source of image 1 are the same, 'green'"):
        painting(micro_batch=1).explain(coloured(*COLOURS), 1, source=[0, 1, 0])


@pytest.mark.parametrize(
    ("images", "arguments", "error", "message"),
    [
        (coloured(*COLOURS), {"target": "violet"}, ValueError, r"unknown class 'violet'"),
        (coloured(*COLOURS), {"target": 5}, ValueError, r"class index 5 is out of range"),
        (coloured(*COLOURS), {"target": [1, 1]}, ValueError, r"one for each of the 3 images; got 2"),
        (coloured(*COLOURS), {"target": 1, "sources": ["a"]}, ValueError, r"sources must name each of the 3 images"),
        (coloured(*COLOURS), {"target": 1, "steps": 1}, ValueError, r"steps must be at least 2"),
        (coloured(*COLOURS) + 1, {"target": 1}, ValueError, r"the images reach from 1\.\d+ to 1\.\d+, beyond the deco"),
        (coloured(*COLOURS) * math.nan, {"target": 1}, ValueError, r"images holds NaN or inf"),
        (
            torch.rand(2, 3, 20, 20),
            {"target": 1},
            ValueError,
            r"images are \[3, 20, 20\], and the decoder draws \[3, 16",
        ),
        (torch.rand(2, 16, 16), {"target": 1}, ValueError, r"images are \[2, 16, 16\], and the decoder draws"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), {"target": 1}, TypeError, r"dtype torch\.uint8; expected float"),
    ],
)
def test_bad_images_and_classes(
    images: Tensor, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        painting().explain(images.to(DEVICE), **arguments)


def test_without_a_decoder_there_is_nothing_to_draw_with() -> None:
    for call in (finecf.MirrorCFE(mosaic()).explain, finecf.MirrorCFE(mosaic()).attribute):
        with pytest.raises(
            ValueError, match=r"there is no decoder yet: call fit\(data, pairs=\.\.\.\), or give MirrorCFE"
        ):
            call(coloured(*COLOURS), "green")


def test_a_decoder_for_other_maps_is_refused() -> None:
    classifier, x = wrapped(GapNet(width=10)), data(2)
    made, _ = fitted()
    with pytest.raises(
        ValueError,
        match=r"the decoder reads maps \[12, 4, 4\] and the classifier gives \[10, 4, 4\]: .*another classifier",
    ):
        finecf.MirrorCFE(classifier, made.decoder).explain(x, others(classifier, x))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on CUDA large batches are faster")
def test_large_images_are_drawn_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, sizes = coloured(*COLOURS), []
    monkeypatch.setattr("finecf.explainers.mirror_cfe._PIXELS", 2 * x[0, 0].numel() + 1)
    of_a_batch = finecf.MirrorCFE._explain

    def counted(own: finecf.MirrorCFE, decoder: Any, images: Tensor, *rest: Any) -> list[Any]:
        sizes.append(len(images))
        return of_a_batch(own, decoder, images, *rest)

    monkeypatch.setattr(finecf.MirrorCFE, "_explain", counted)
    for settings, wanted in (({}, [2, 1]), ({"micro_batch": 3}, [3]), ({"micro_batch": 1}, [1, 1, 1])):
        sizes.clear()
        assert len(painting(**settings).explain(x, "green", source="red")) == 3
        assert sizes == wanted
    monkeypatch.setattr("finecf.explainers.mirror_cfe._PIXELS", 1)
    sizes.clear()
    painting().explain(x, "green", source="red")
    assert sizes == [1, 1, 1]


def test_ctrl_c_keeps_what_is_explained() -> None:
    class Slow(Painter):
        calls = 0

        def forward(self, features: Tensor, *rest: Any) -> Tensor:
            Slow.calls += 1
            if Slow.calls > 70:
                raise KeyboardInterrupt
            return super().forward(features, *rest)

    x = coloured(*COLOURS)
    wanted = painting().explain(x, "green", source="red")
    with pytest.raises(Interrupted, match=r"interrupted after 2 of 3 images; they are in \.explanations") as caught:
        finecf.MirrorCFE(mosaic(), Slow(), micro_batch=1, corrections=0).explain(x, "green", source="red", steps=20)
    assert [each.first_k for each in caught.value.explanations] == [each.first_k for each in wanted[:2]]
