"""Repainting: what is spoiled and what is not, a painter that learns what is known, its states and files, and
Mirror-CFE's trimming on top."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from explainers.mirror_nets import DEVICE, SIDE, GapNet, Mosaic, mosaic, others, pictures, wrapped
from explainers.test_mirror import CHANGE, PAIRS, fitted
from torch import Tensor

import finecf
from finecf.explainers import Repainted, Repainter, TrainingStopped
from finecf.explainers._repaint_fit import PainterRecipe
from finecf.explainers._spoiling import Windows, marks_of, middles_of, spoil
from finecf.metrics import redraw_distances
from finecf.metrics.bootstrap import paired_bootstrap
from finecf.models import Classifier
from finecf.models.checkpoints import load_tensors
from finecf.models.decoder import MirrorDecoder, Shape
from finecf.models.painter import Painter, load_painter, save_painter
from finecf.training import load_birds_net, mirror_recipe, shipped_painter
from finecf.training.repaint import BIRDS, STEPS

STAMP = slice(4, 12)
"""Rows and columns of an image's coloured square."""
TINY: dict[str, Any] = {"pairs": [("red", "blue")], "steps": 6, "batch": 4, "window": SIDE, "widths": (8, 8)}


def stamped(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Grey images with a square that is red or blue, more or less, and the class of each."""
    draws = torch.Generator().manual_seed(seed)
    images = 0.2 + 0.3 * torch.rand(count, 1, 2, 2, generator=draws)
    images = torch.nn.functional.interpolate(images, SIDE, mode="bilinear").expand(-1, 3, -1, -1).clone()
    labels = torch.arange(count) % 2 * 2
    strength = 0.5 + 0.4 * torch.rand(count, generator=draws)
    images[:, :, STAMP, STAMP] = 0.15
    images[torch.arange(count), labels, STAMP, STAMP] = strength[:, None, None]
    return images.to(DEVICE), labels.to(DEVICE)


def swapped(images: Tensor) -> Tensor:
    """The same with the other colour."""
    return images.flip(1)


def taught(classifier: Classifier | None = None, **options: Any) -> tuple[Repainter, list[dict[str, float]]]:
    repainter = Repainter(classifier or mosaic())
    return repainter, repainter.fit(stamped(40), **TINY | options)


def weights(repainter: Repainter) -> dict[str, Tensor]:
    assert repainter.painter is not None
    return {name: value.clone() for name, value in repainter.painter.state_dict().items()}


def same_bits(one: Repainter, two: Repainter) -> bool:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def painted() -> Repainter:
    """One that has learned red and blue."""
    repainter = Repainter(mosaic(), rounds=1)
    with torch.inference_mode(False):
        repainter.fit(stamped(400), **TINY | {"steps": 400, "batch": 16, "widths": (16, 16), "learning_rate": 5e-3})
    return repainter


# ---- what is spoiled


def test_only_what_is_marked_is_spoiled() -> None:
    x, _ = stamped(3)
    mask = torch.zeros(3, 1, SIDE, SIDE, device=DEVICE)
    mask[:, :, 2:7, 3:9] = 1
    for square in (0, 2, 4):
        bad = spoil(x, mask, square, torch.Generator().manual_seed(0))
        inside = mask.expand_as(x) > 0
        assert torch.equal(bad[~inside], x[~inside])
        assert not torch.equal(bad[inside], x[inside])
    assert float(spoil(x, mask, 0, torch.Generator())[inside].abs().max()) == 0


def test_what_is_left_are_the_colours_of_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finecf.explainers._spoiling.CAST", 0.0)
    monkeypatch.setattr("finecf.explainers._spoiling.GRAIN", 0.0)
    x = pictures(2)
    bad = spoil(x, torch.ones(2, 1, SIDE, SIDE, device=DEVICE), 4, torch.Generator())
    means = torch.nn.functional.avg_pool2d(x, 4)
    wanted = torch.nn.functional.interpolate(means, SIDE, mode="bilinear", align_corners=False)
    torch.testing.assert_close(bad, wanted)


def test_alike_an_image_is_spoiled_the_same_beside_any_others() -> None:
    x, _ = stamped(4)
    mask = torch.ones(4, 1, SIDE, SIDE, device=DEVICE)
    both, one = (spoil(x[rows], mask[rows], 2, torch.Generator().manual_seed(3), alike=True) for rows in ([1, 2], [2]))
    assert torch.equal(both[1:], one)
    other = spoil(x[[1, 2]], mask[:2], 2, torch.Generator().manual_seed(3))
    assert not torch.equal(other[1:], one)


def test_marks_are_where_either_class_has_much_of_its_evidence() -> None:
    evidence = torch.tensor([[[4.0, 1.9, 2.1], [-1.0, -0.6, -0.4]], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    marks = marks_of(evidence, torch.tensor([0.5, 0.5]))
    assert marks.shape == (2, 1, 2, 3)
    assert marks[0, 0].tolist() == [[1, 0, 1], [1, 1, 0]]
    assert not marks[1].any()


def test_windows_are_put_back_where_they_were_cut_out() -> None:
    x = pictures(3)
    windows = Windows(torch.tensor([[0, 0], [8, 9], [15, 15]]), 8, (SIDE, SIDE))
    cut = windows.cut(x)
    assert torch.equal(cut[0], x[0, :, :8, :8])
    assert torch.equal(cut[1], x[1, :, 4:12, 5:13])
    assert torch.equal(cut[2], x[2, :, 8:, 8:])
    back = windows.put_back(cut)
    there = windows.put_back(torch.ones_like(cut)) > 0
    assert int(there.sum()) == cut.numel()
    assert torch.equal(back[there], x[there])
    assert not back[~there].any()


def test_the_middle_of_no_mark_is_the_images() -> None:
    masks = torch.zeros(2, 1, 8, 6)
    masks[0, 0, 1:4, 2] = 1
    assert middles_of(masks).tolist() == [[2, 2], [4, 3]]


# ---- what is learned, and painted


def test_a_painter_learns_what_tells_classes_apart(painted: Repainter) -> None:
    x, labels = stamped(30, seed=7)
    done = painted.repaint(x, 2 - labels)
    true = swapped(x)
    inside = (slice(None), slice(None), STAMP, STAMP)
    left = (done.images - true)[inside].abs().mean((1, 2, 3)) / (x - true)[inside].abs().mean((1, 2, 3))
    assert float(left.max()) < 0.6
    assert float(left.mean()) < 0.35
    assert bool(done.found.all())
    assert torch.equal(painted.classifier.logits(done.images).argmax(1), 2 - labels)
    kept = ~done.mask.expand_as(x)
    assert torch.equal(done.images[kept], x[kept])
    assert 0.2 < float(done.mask.float().mean()) < 0.35  # the square is a quarter of the image


def test_learning_lowers_the_loss() -> None:
    _, losses = taught(steps=80, batch=8, learning_rate=5e-3)
    early, late = (sum(each["mending"] for each in part) / 16 for part in (losses[:16], losses[-16:]))
    assert late < 0.7 * early


def test_an_image_is_painted_the_same_beside_any_others(painted: Repainter) -> None:
    x, labels = stamped(5, seed=8)
    together = painted.repaint(x, 2 - labels).images
    few = Repainter(painted.classifier, painted.painter, rounds=1, micro_batch=2)
    torch.testing.assert_close(few.repaint(x, 2 - labels).images, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(painted.repaint(x[3], 2 - labels[3:4]).images, together[3:4], rtol=0, atol=1e-5)
    assert torch.equal(painted.repaint(x, 2 - labels).images, together)
    with torch.inference_mode():
        assert torch.equal(painted.repaint(x.clone(), 2 - labels).images, together)


def test_rounds_end_where_the_target_is_reached(painted: Repainter) -> None:
    x, labels = stamped(6, seed=9)
    more = Repainter(painted.classifier, painted.painter, rounds=4)
    once, often = painted.repaint(x, 2 - labels), more.repaint(x, 2 - labels)
    assert once.found.all()
    assert often.rounds.tolist() == [1] * 6
    assert torch.equal(once.images, often.images)
    # Green has no painter's knowledge behind it, so no round leads there.
    green = more.repaint(x, "green")
    assert not green.found.any()
    assert green.rounds.tolist() == [4] * 6


def test_small_changes_are_left_out_and_others_shortened(painted: Repainter) -> None:
    x, labels = stamped(6, seed=10)
    images = 0.3 + 0.4 * x  # so that nothing leaves the range

    def change(threshold: float) -> Tensor:
        repainter = Repainter(painted.classifier, painted.painter, rounds=1, threshold=threshold)
        return repainter.repaint(images, 2 - labels).images - images

    whole = change(0.0)
    size = whole.abs().mean(1, keepdim=True)
    middle = float(size[size > 0].median())
    inside = ((images + whole > 0) & (images + whole < 1)).all(1, keepdim=True) & (size > 0)
    less = change(middle)
    wanted = whole * ((size - middle) / size.clamp_min(1e-9)).clamp_min(0)
    assert int(inside.sum()) > 50
    torch.testing.assert_close(less[inside.expand_as(less)], wanted[inside.expand_as(less)], rtol=0, atol=1e-5)
    assert bool((less.abs().amax(1, keepdim=True)[inside] > 0.01).any())
    assert bool((less.abs().amax(1, keepdim=True)[inside] == 0).any())


def test_no_images_give_none(painted: Repainter) -> None:
    x, _ = stamped(2)
    done = painted.repaint(x[:0], "blue")
    assert done.images.shape == (0, 3, SIDE, SIDE)
    assert done.mask.shape == (0, 1, SIDE, SIDE)
    assert len(done.source) == len(done.target) == len(done.rounds) == len(done.found) == len(done.evaluations) == 0
    assert repr(done) == "Repainted(0 images, 0 called the target)"


def test_images_of_another_range_are_painted_in_it() -> None:
    """As if they were of [0,1]."""
    net = Mosaic()
    net.fc.weight.data /= 100
    net.fc.bias.data -= net.fc.weight.data.sum(1) * -50
    shifted = finecf.wrap(net, layer="block", class_names=["red", "green", "blue"])
    plain, scaled = Repainter(mosaic(), rounds=1), Repainter(shifted, rounds=1)
    (x, labels), options = stamped(40), TINY | {"steps": 20, "learning_rate": 5e-3}
    plain.fit((x, labels), **options)
    with pytest.raises(ValueError, match=r"beyond image_range \(0 to 1\)"):
        scaled.fit((100 * x - 50, labels), **options)
    scaled.fit((100 * x - 50, labels), image_range=(-50.0, 50.0), **options)
    one, other = plain.repaint(x, 2 - labels), scaled.repaint(100 * x - 50, 2 - labels)
    torch.testing.assert_close((other.images + 50) / 100, one.images, rtol=0, atol=1e-2)
    assert float((one.images - x).abs().max()) > 0.02


# ---- trainings, states and files


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_seed_gives_the_same_bits(precision: str) -> None:
    classifier = mosaic()
    one, losses = taught(classifier, precision=precision)
    state = torch.random.get_rng_state()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):  # a user's own changes nothing
        two, again = taught(classifier, precision=precision)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same_bits(one, two)
    assert losses == again
    assert not same_bits(one, taught(precision=precision, seed=1)[0])
    assert not one.painter.training
    assert not any(parameter.requires_grad for parameter in one.painter.parameters())


def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, losses = taught(checkpoint=tmp_path / "whole.safetensors")
    out = tmp_path / "p.safetensors"
    interrupted(out, monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.safetensors.resume", "whole.safetensors"]
    assert load_tensors(tmp_path / "p.safetensors.resume")[1]["step"] == 4
    with pytest.raises(ValueError, match=r"of a training with other settings.* \(steps: 6 there, 8 here\)"):
        taught(checkpoint=out, steps=8)
    resumed, again = taught(checkpoint=out)
    assert same_bits(whole, resumed)
    assert again == losses
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not (tmp_path / "p.safetensors.resume").exists()


def test_a_training_that_diverges_stops_and_leaves_the_painter_as_it_was(tmp_path: Path) -> None:
    repainter, _ = taught(steps=2)
    painter, meta = repainter.painter, dict(repainter.meta)
    for before in (repainter, Repainter(mosaic())):
        kept = before.painter
        with pytest.raises(TrainingStopped, match=r"the mending loss became (nan|inf) at step \d+: training stopped"):
            before.fit(stamped(40), **TINY | {"learning_rate": 1e30}, checkpoint=tmp_path / "p.safetensors")
        assert not (tmp_path / "p.safetensors").exists()
        assert before.painter is kept
    assert repainter.painter is painter
    assert repainter.meta == meta


def interrupted(out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A state of four steps."""
    advance = finecf.explainers._repaint_fit.PainterTrainer.advance

    def stopping(self: Any) -> dict[str, float]:
        if self.step == 4:
            raise KeyboardInterrupt
        return advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(finecf.explainers._repaint_fit.PainterTrainer, "advance", stopping)
        with pytest.raises(KeyboardInterrupt, match=r"after 4 of 6 steps; the same call goes on from"):
            taught(checkpoint=out, **options)


def test_a_state_of_other_images_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "p.safetensors"
    interrupted(out, monkeypatch)
    with pytest.warns(UserWarning, match="is the state of a training on other images.* the painter will have") as said:
        Repainter(mosaic()).fit(stamped(40, seed=1), **TINY, checkpoint=out)
    assert [each.filename for each in said] == [__file__]


@pytest.mark.parametrize(("side", "window"), [(16, 16), (28, 16), (56, 16), (72, 32)])
def test_windows_hold_whole_squares_at_any_size_of_the_images(side: int, window: int) -> None:
    images, labels = stamped(12)
    images = torch.nn.functional.interpolate(images, side, mode="bilinear")
    repainter = Repainter(mosaic())
    repainter.fit((images, labels), **TINY | {"window": None})
    assert repainter.painter.window == window
    done = repainter.repaint(images, 2 - labels)
    assert bool(done.rounds.all())
    assert done.images.shape == images.shape


def test_images_are_mirrored_unless_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    flips: list[int] = []
    flip = Tensor.flip
    monkeypatch.setattr(Tensor, "flip", lambda self, *dims: (flips.append(*dims), flip(self, *dims))[1])
    mirrored, _ = taught(steps=12)
    assert 0 < flips.count(3) < 24
    assert mirrored.meta["recipe"]["flip"] is True
    flips.clear()
    taught(steps=12, flip=False)
    assert 3 not in flips


@pytest.mark.parametrize("scale", [2.0**-24, 2.0**24])
def test_what_is_learned_hangs_on_no_scale_of_the_evidence(scale: float) -> None:
    """Half precision holds neither such evidence as it is."""
    net = Mosaic()
    net.fc.weight.data *= scale
    net.fc.bias.data *= scale
    scaled, losses = taught(finecf.wrap(net, layer="block", class_names=["red", "green", "blue"]))
    plain, wanted = taught()
    assert same_bits(scaled, plain)
    assert losses == wanted


def test_the_classifier_is_run_as_often_as_is_said(painted: Repainter) -> None:
    x, _ = stamped(2, seed=4)
    x[1] = x[0].roll(1, 0)  # green, which the painter does not know
    several = Repainter(painted.classifier, painted.painter, rounds=3, share=0.9, threshold=0.9)  # changes nothing
    several.meta = painted.meta
    calls: list[int] = []
    hook = painted.classifier.model.block.register_forward_hook(lambda *_: calls.append(1))
    known = several.repaint(x[0], "blue")
    assert (known.rounds.tolist(), known.evaluations.tolist()) == ([3], [len(calls)])
    calls.clear()
    with pytest.warns(UserWarning, match="not trained on green"):
        unknown = several.repaint(x[1], "blue")
    assert (unknown.rounds.tolist(), unknown.evaluations.tolist()) == ([0], [len(calls)])
    hook.remove()


def test_the_rate_rises_and_falls() -> None:
    recipe = PainterRecipe(100, 1, 2.0, 0, "float32", True)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[9] == pytest.approx(2.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert 0 < PainterRecipe(1, 1, 2.0, 0, "float32", True).rate(0) <= 2.0


def test_a_saved_painter_paints_the_same(painted: Repainter, tmp_path: Path) -> None:
    x, labels = stamped(4, seed=5)
    file = tmp_path / "p.safetensors"
    painted.save(file, command="a test")
    again = Repainter(painted.classifier, file, rounds=1)
    assert again.meta["command"] == "a test"
    assert again.meta["pairs"] == [[0, 2]]
    assert again.meta["classes"] == ["red", "blue"]
    assert again.meta["steps_done"] == 400
    torch.testing.assert_close(
        again.repaint(x, 2 - labels).images, painted.repaint(x, 2 - labels).images, rtol=0, atol=5e-3
    )
    with pytest.raises(ValueError, match=r"the painter in .* was made for another classifier: Mosaic"):
        Repainter(wrapped(), file)
    with pytest.raises(ValueError, match="holds no mirror decoder"):
        finecf.MirrorCFE(painted.classifier, file)
    mirror, _ = fitted()
    mirror.save(file)
    with pytest.raises(ValueError, match="holds no painter"):
        Repainter(mirror.classifier, file)


def test_a_painters_file_keeps_its_range(tmp_path: Path) -> None:
    most = [2.2489083, 2.4285715, 2.64]
    for image_range in ((-2.1179039, most), (torch.tensor(-2.1), torch.tensor(most)), torch.tensor([-1.0, 1.0])):
        painter = Painter(2, 3, 8, (8, 8), image_range=image_range)
        save_painter(tmp_path / "p.safetensors", painter, {})
        again, _ = load_painter(tmp_path / "p.safetensors")
        assert torch.equal(again.low, painter.low)
        assert torch.equal(again.high, painter.high)
        assert again.settings == painter.settings


# ---- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 0.0}, r"share is one of the largest evidence and must lie in \(0, 1\); got 0"),
        ({"share": 1.0}, r"share is one of the largest"),
        ({"threshold": -0.1}, r"threshold is a share of the image range and must lie in \[0, 1\); got -0.1"),
        ({"threshold": 1.0}, "threshold is a share"),
        ({"draws": 0}, "draws is a whole number of at least 1; got 0"),
        ({"rounds": 1.5}, "rounds is a whole number of at least 1; got 1.5"),
        ({"micro_batch": 0}, "micro_batch"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Repainter(mosaic(), **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"precision": "int8"}, "precision must be one of float32, bfloat16"),
        ({"save_every": 0}, "save_every is a number of steps, at least 1"),
        ({"window": 10}, "window is a number of pixels, a multiple of 16 here; got 10"),
        ({"window": 8}, "window is a number of pixels, a multiple of 16 here; got 8"),
        ({"window": 64}, "the images have 16 pixels a side, and the painter sees 64: enlarge them"),
        ({"widths": (8, 12)}, r"widths are channels of the painter's stages, multiples of 8; got \[8, 12\]"),
        ({"widths": ()}, "widths are channels"),
        ({"window": None, "widths": (8,) * 5}, "the images have 16 pixels a side, and the painter sees 32"),
        ({"pairs": [("red", "red")]}, "holds one class twice"),
        ({"pairs": [("red", "green")]}, "class 'green' of the pairs has no training image"),
        ({"image_range": (1.0, 0.0)}, "image_range must be"),
        ({"image_range": (0.5, 1.0)}, r"beyond image_range \(0.5 to 1\): fit with image_range="),
    ],
)
def test_trainings_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        taught(**options)


def test_a_head_that_is_not_linear_is_refused() -> None:
    classifier = wrapped(hidden=6)
    with pytest.raises(ValueError, match="needs a linear head behind global average pooling; the one of this model is"):
        Repainter(classifier).fit(pictures(20), [(0, 1)], steps=1, window=SIDE, widths=(8, 8))


def test_what_cannot_be_painted_is_refused(painted: Repainter) -> None:
    x, _ = stamped(2)
    with pytest.raises(ValueError, match="there is no painter yet"):
        Repainter(mosaic()).repaint(x, "blue")
    with pytest.raises(ValueError, match="there is no painter yet"):
        Repainter(mosaic()).save("nowhere.safetensors")
    with pytest.raises(ValueError, match="target and predicted class of image 0 are the same, 'red'"):
        painted.repaint(x, "red")
    with pytest.raises(ValueError, match=r"reach from .* beyond image_range"):
        painted.repaint(x * 3, "blue")
    with pytest.raises(ValueError, match=r"3 channels and at least 16 pixels a side; got \[3, 12, 16\]"):
        painted.repaint(x[:, :, :12], "blue")
    with pytest.raises(TypeError, match="wrap it first"):
        Repainter(Mosaic())  # type: ignore[arg-type]


def test_classes_that_the_painter_was_not_trained_on_are_left_alone(painted: Repainter) -> None:
    x, _ = stamped(4)
    x[1] = x[1].roll(1, 0)
    predicted = painted.classifier.logits(x).argmax(1)
    target = torch.tensor([2, 1, 1, 0], device=DEVICE)
    assert predicted.tolist() == [0, 0, 0, 2]
    with pytest.warns(UserWarning, match=r"was not trained on green \(it knows red, blue\):") as said:
        found = painted.repaint(x, target)
    assert [each.filename for each in said] == [__file__]
    assert found.source.tolist() == predicted.tolist()
    assert found.target.tolist() == target.tolist()
    assert found.rounds.tolist() == [1, 0, 0, 1]
    assert found.mask.flatten(1).any(1).tolist() == [True, False, False, True]
    assert torch.equal(found.images[1:3], x[1:3])
    assert found.found.tolist()[1:3] == [False, False]
    alone = painted.repaint(x[:1], "blue")
    torch.testing.assert_close(found.images[:1], alone.images, rtol=0, atol=1e-5)


def test_a_painter_whose_window_holds_no_whole_squares_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window has 8 pixels a side; .* must be a multiple of 16"):
        Repainter(mosaic(), Painter(3, 3, 8, (8, 8)))


def test_a_painter_of_other_classes_is_refused() -> None:
    repainter = Repainter(mosaic(), Painter(7, 3, SIDE, (8, 8)))
    with pytest.raises(ValueError, match="the painter knows 7 classes and the classifier has 3"):
        repainter.repaint(stamped(1)[0], "blue")


def test_what_it_is_called() -> None:
    assert repr(Repainter(mosaic())).endswith("no painter yet)")
    assert repr(taught(steps=1)[0]).endswith("a painter of 16-pixel windows)")


# ---- Mirror-CFE on top


@pytest.fixture(scope="module")
def both() -> tuple[finecf.MirrorCFE, Repainter]:
    with torch.inference_mode(False):
        mirror, _ = fitted(steps=40, **CHANGE)
        repainter = Repainter(mirror.classifier)
        repainter.fit(pictures(60, seed=2), PAIRS, steps=30, window=SIDE, widths=(8, 8))
    return mirror, repainter


def test_what_suffices_comes_on_top_of_the_repainted_image(both: tuple[finecf.MirrorCFE, Repainter]) -> None:
    mirror, repainter = both
    x = pictures(16, seed=3)
    target = others(mirror.classifier, x)
    upon = finecf.MirrorCFE(mirror.classifier, mirror.decoder, repainter=repainter)
    alone = finecf.MirrorCFE(mirror.classifier, mirror.decoder)
    found, before = (each.explain(x, target, steps=3, trim=True) for each in (upon, alone))
    painted = repainter.repaint(x, target)
    assert {each.trimmed_upon_repainted for each in found} >= {True}
    for row, (one, other) in enumerate(zip(found, before, strict=True)):
        assert one.repainted_image is not None
        assert torch.equal(one.repainted_image, painted.images[row].cpu())
        assert one.repainted_valid == bool(painted.found[row])
        assert torch.equal(one.mirror_image, other.mirror_image)  # the images along k are as they were
        assert one.first_k == other.first_k
        if other.trimmed_image is not None:
            assert one.trimmed_image is not None
        if one.trimmed_image is None:
            assert one.trimmed_upon_repainted is None
            continue
        said = mirror.classifier.logits(one.trimmed_image[None].to(DEVICE))
        assert int(said.argmax()) == one.target
        start = one.repainted_image if one.trimmed_upon_repainted else one.prepared
        end = (start + one.mirror_image - one.prepared).clamp(0, 1)
        low, high = torch.minimum(start, end), torch.maximum(start, end)
        assert bool(((one.trimmed_image >= low - 1e-5) & (one.trimmed_image <= high + 1e-5)).all())
        assert one.evaluations > other.evaluations
        assert ("repainted, with what suffices" in one.summary()) == one.trimmed_upon_repainted
        assert "repainted alone it is" in one.summary()
        assert other.repainted_image is None
        assert other.trimmed_upon_repainted is None


def test_where_the_repainted_image_does_not_lead_there_the_image_itself_is_taken(
    both: tuple[finecf.MirrorCFE, Repainter], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, repainter = both
    x = pictures(8, seed=3)
    target = others(mirror.classifier, x)
    plain = mirror.explain(x, target, steps=2, trim=True)

    def elsewhere(images: Tensor, target: Tensor, *, source: Tensor) -> Repainted:
        """What no change makes up for."""
        far = torch.zeros_like(images) + torch.arange(len(images), device=images.device)[:, None, None, None] % 2
        none = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        once = 1 + none.long()
        mask = none[:, None, None, None].expand_as(images[:, :1])
        return Repainted(far, source, target, mask, once, none, 2 + once)

    monkeypatch.setattr(repainter, "repaint_prepared", elsewhere)
    upon = finecf.MirrorCFE(mirror.classifier, mirror.decoder, repainter=repainter)
    found = upon.explain(x, target, steps=2, trim=True)
    taken = [(one, other) for one, other in zip(found, plain, strict=True) if one.trimmed_upon_repainted is False]
    assert taken
    for one, other in taken:
        assert torch.equal(one.trimmed_image, other.trimmed_image)


def test_an_image_that_is_not_repainted_is_trimmed_as_without_a_repainter() -> None:
    mirror, _ = fitted(steps=40, **CHANGE)
    x = pictures(8, seed=3)
    target = others(mirror.classifier, x)
    repainter = Repainter(mirror.classifier, Painter(mirror.classifier.num_classes or 0, 3, SIDE, (8, 8)))
    repainter.meta = {"pairs": [[0, 1]]}
    upon = finecf.MirrorCFE(mirror.classifier, mirror.decoder, repainter=repainter, micro_batch=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = upon.explain(x, target, steps=2, trim=True)
    (once,) = [each for each in said if "the painter was not trained on" in str(each.message)]
    assert once.filename == __file__
    left = [each for each in found if not {each.origin, each.target} <= {0, 1}]
    assert left
    for one, other in zip(found, mirror.explain(x, target, steps=2, trim=True), strict=True):
        if {one.origin, one.target} <= {0, 1}:
            continue
        assert torch.equal(one.repainted_image, one.prepared)
        assert "the painter was not trained on both classes: the image was not repainted" in one.notes
        assert not one.trimmed_upon_repainted
        assert (one.trimmed_image is None) == (other.trimmed_image is None)
        if one.trimmed_image is not None:
            assert torch.equal(one.trimmed_image, other.trimmed_image)


def test_what_the_repainter_refuses_is_refused_before_anything_is_drawn(
    both: tuple[finecf.MirrorCFE, Repainter], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, _ = both
    x = pictures(2, seed=3)
    target = others(mirror.classifier, x)
    own = Painter(4, 3, SIDE, (8, 8))
    for repainter, said in (
        (Repainter(mirror.classifier), "there is no painter yet"),
        (Repainter(mirror.classifier, Painter(7, 3, SIDE, (8, 8))), "the painter knows 7 classes and the"),
        (Repainter(mirror.classifier, Painter(4, 1, SIDE, (8, 8))), "the painter takes images of 1 channels"),
    ):
        upon = finecf.MirrorCFE(mirror.classifier, mirror.decoder, repainter=repainter)
        monkeypatch.setattr(upon, "_explain", lambda *given: pytest.fail("it drew"))
        with pytest.raises(ValueError, match=said):
            upon.explain(x, target)
    bent = wrapped(hidden=6)
    drawer = MirrorDecoder(Shape((12, 4, 4), (3, SIDE, SIDE), ()), width=4, most=8)
    upon = finecf.MirrorCFE(bent, drawer, reflection="lbfgs", repainter=Repainter(bent, own))
    monkeypatch.setattr(upon, "_explain", lambda *given: pytest.fail("it drew"))
    with pytest.raises(ValueError, match="needs a linear head behind global average pooling"):
        upon.explain(x, others(bent, x))
    upon = finecf.MirrorCFE(mirror.classifier, mirror.decoder, repainter=Repainter(mirror.classifier, own))
    monkeypatch.setattr(upon.repainter, "classifier", SimpleNamespace(device=torch.device("meta")))
    with pytest.raises(ValueError, match=r"the repainter's model is on meta and this one on .*: give both one"):
        upon.explain(x, target)


def test_images_are_preprocessed_once() -> None:
    """By Mirror-CFE, and not by its repainter again."""
    mirror, _ = fitted(steps=4, **CHANGE)
    made = Repainter(mirror.classifier)
    made.fit(pictures(60, seed=2), PAIRS, steps=4, window=SIDE, widths=(8, 8))
    halved = finecf.wrap(mirror.classifier.model, layer="block", preprocess=lambda images: images / 2)
    upon = finecf.MirrorCFE(halved, mirror.decoder, repainter=Repainter(halved, made.painter, threshold=0.0))
    x = pictures(4, seed=3)
    target = others(mirror.classifier, x)
    for one, image, wanted in zip(upon.explain(2 * x, target, steps=2), x, target, strict=True):
        plain = Repainter(mirror.classifier, made.painter, threshold=0.0).repaint(image, wanted[None])
        assert torch.equal(one.prepared, image.cpu())
        torch.testing.assert_close(one.repainted_image, plain.images[0].cpu(), rtol=0, atol=1e-5)
        assert not torch.equal(one.repainted_image, one.prepared)
    torch.testing.assert_close(
        upon.repainter.repaint(2 * x, target).images,
        Repainter(mirror.classifier, made.painter, threshold=0.0).repaint(x, target).images,
    )


def test_a_repainted_explanation_is_kept_and_drawn(both: tuple[finecf.MirrorCFE, Repainter], tmp_path: Path) -> None:
    mirror, repainter = both
    upon = finecf.MirrorCFE(mirror.classifier, mirror.decoder, repainter=repainter)
    x = pictures(16, seed=3)
    found = upon.explain(x, others(mirror.classifier, x), steps=3, trim=True)
    (one, *_) = [each for each in found if each.trimmed_upon_repainted]
    one.save(tmp_path / "e.safetensors")
    again = finecf.load(tmp_path / "e.safetensors")
    assert torch.equal(again.repainted_image, one.repainted_image)
    assert again.repainted_valid == one.repainted_valid
    assert again.trimmed_upon_repainted is True
    assert again.summary() == one.summary()
    one.plot(tmp_path / "e.png")
    assert (tmp_path / "e.png").stat().st_size > 10_000
    (untrimmed,) = upon.explain(x[:1], others(mirror.classifier, x)[:1], steps=2)
    assert untrimmed.repainted_image is not None
    assert untrimmed.trimmed_upon_repainted is None


def test_a_repainter_is_read_from_its_file(both: tuple[finecf.MirrorCFE, Repainter], tmp_path: Path) -> None:
    mirror, repainter = both
    repainter.save(tmp_path / "p.safetensors")
    upon = finecf.MirrorCFE(mirror.classifier, mirror.decoder, repainter=tmp_path / "p.safetensors")
    assert isinstance(upon.repainter, Repainter)
    with pytest.raises(ValueError, match="the repainter was made for another classifier"):
        finecf.MirrorCFE(wrapped(GapNet(seed=5)), repainter=repainter)


# ---- what ships


def test_the_painter_that_ships_brings_birds_nearer_to_the_redrawn_ones() -> None:
    """On birds that neither it nor the net has seen; no change that is led by the classifier does."""
    net, meta = load_birds_net()
    classifier = finecf.wrap(net.to(DEVICE), class_names=meta["classes"])
    repainter = Repainter(classifier, shipped_painter("birds"))
    recipe = repainter.meta["recipe"]
    assert (recipe["steps"], repainter.meta["images"]) == (STEPS, BIRDS)
    assert [tuple(pair) for pair in repainter.meta["pairs"]] == list(mirror_recipe("birds").pairs)
    birds = finecf.data.SyntheticBirds("test", n=120)
    items = list(birds)
    x = torch.stack([item.tensor for item in items]).to(DEVICE)
    predicted = torch.cat([classifier.logits(part).argmax(1) for part in x.split(32)]).tolist()
    partner = dict(reversed(repainter.meta["pairs"])) | {q: p for p, q in repainter.meta["pairs"]}
    right = [number for number, item in enumerate(items) if predicted[number] == item.drawn_label]
    goals = torch.tensor([partner[predicted[number]] for number in right])
    done = repainter.repaint(x[right], goals)
    scores = redraw_distances(birds, [items[number] for number in right], x[right].cpu(), done.images.cpu(), goals)
    seen = scores.graded
    assert int(seen.sum()) > 80
    assert paired_bootstrap(scores.inside[seen], scores.source_inside[seen]).high < 0
    assert float(scores.energy[seen].mean()) > 10 * float(scores.area[seen].mean())
