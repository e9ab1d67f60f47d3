"""Wrapping a model: the layer, the head behind it, and that the model is left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models.small_nets import (
    DEVICE,
    Around,
    ControlFlow,
    InPlace,
    InPlaceControlFlow,
    PooledNet,
    ReadsBatchSize,
    ReluBehind,
    Tokens,
    Twice,
    images,
    seeded,
)
from torch import Tensor, nn

import finecf
from finecf.models import Classifier
from finecf.models.layers import Layout


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in model.modules()
    )


def state(model: nn.Module) -> tuple[object, ...]:
    modes = [m.training for m in model.modules()]
    grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return modes, grads, hooks(model), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("net", "layer"), [(PooledNet, "body"), (ControlFlow, "body"), (ReadsBatchSize, "body"), (ReluBehind, "features")]
)
def test_layer_is_found_and_the_head_gives_the_real_logits(net: type[nn.Module], layer: str) -> None:
    model = seeded(net)
    clf = finecf.wrap(model)
    x = images(3)
    assert clf.layer_name == layer
    features, logits = clf.features_and_logits(x)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x))
    torch.testing.assert_close(clf.logits_from(features), logits)
    torch.testing.assert_close(clf.logits(x), logits)
    assert clf.head_error is not None
    assert clf.head_error < 1e-5
    assert clf.num_classes == 5
    assert not features.requires_grad


def test_head_runs_without_the_trunk_where_it_can_be_traced() -> None:
    model = seeded(PooledNet)
    clf = finecf.wrap(model)
    features = clf.features(images(2))
    calls: list[int] = []
    handle = model.stem.register_forward_hook(lambda *_: calls.append(1))
    clf.logits_from(features)
    handle.remove()
    assert calls == []
    assert clf.head_route == "the layers behind 'body'"


def test_head_that_cannot_be_traced_says_so() -> None:
    clf = finecf.wrap(seeded(ControlFlow), layer="body")
    assert "cannot be traced" in clf.head_route


def test_logits_from_other_maps_than_the_models_own() -> None:
    """The untraced route, the traced one and the formula agree on maps that no image gives, at any batch size."""
    traced, untraced = (finecf.wrap(seeded(net), layer="body") for net in (PooledNet, ControlFlow))
    x = images(2)
    for clf in (traced, untraced):
        clf.features(x)
    maps = torch.randn(5, 12, 8, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    fc = traced.model.fc
    want = maps.mean((2, 3)) @ fc.weight.T + fc.bias
    torch.testing.assert_close(traced.logits_from(maps), want.detach())
    torch.testing.assert_close(untraced.logits_from(maps), want.detach())


def test_what_goes_around_the_layer_is_refused() -> None:
    clf = finecf.wrap(seeded(Around), layer="body")
    with pytest.raises(ValueError, match="goes around the layer"):
        clf.features(images(2))
    # The failed check must not count as passed the second time.
    with pytest.raises(ValueError, match="goes around the layer"):
        clf.features(images(2))


def test_layer_called_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="called 2 times"):
        finecf.wrap(seeded(Twice), layer="body")


def test_relu_behind_the_layer_belongs_to_the_map() -> None:
    clf = finecf.wrap(seeded(ReluBehind))
    features = clf.features(images(2))
    assert float(features.min()) == 0
    fold = clf.fold(features)
    assert fold is not None
    assert fold.kind == "linear"


@pytest.mark.parametrize("net", [InPlace, InPlaceControlFlow])
def test_heads_that_work_in_place_leave_the_map_alone(net: type[nn.Module]) -> None:
    model = seeded(net)
    clf = finecf.wrap(model, layer="body")
    x = images(2)
    features, logits = clf.features_and_logits(x)
    with torch.no_grad():
        assert torch.equal(features, model.trunk(x))
    before = features.clone()
    torch.testing.assert_close(clf.logits_from(features), logits)
    assert clf.fold(features) is None
    assert clf.cam(features, 0).shape == (2, 8, 8)
    assert torch.equal(features, before)
    torch.testing.assert_close(clf.logits_from(features), logits)


def test_unknown_layer_lists_close_names() -> None:
    with pytest.raises(ValueError, match=r"'bodi'.*did you mean 'body'"):
        finecf.wrap(seeded(PooledNet), layer="bodi")


def test_layer_may_be_the_module_itself() -> None:
    model = seeded(PooledNet)
    assert finecf.wrap(model, layer=model.body).layer_name == "body"
    with pytest.raises(ValueError, match="not a submodule"):
        finecf.wrap(model, layer=nn.ReLU())


def test_layer_without_a_map_is_refused() -> None:
    clf = finecf.wrap(seeded(PooledNet), layer="fc")
    with pytest.raises(ValueError, match=r"'fc' gives a tensor of shape \[2, 5\]"):
        clf.features(images(2))


def test_model_without_a_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no layer of Sequential was found that gives a map of cells.*layer="):
        finecf.wrap(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)))
    with pytest.raises(ValueError, match=r"zero images were refused: 8 px: RuntimeError"):
        finecf.wrap(nn.Sequential(nn.Flatten(), nn.Linear(11, 4)))


def test_lazy_model_is_refused() -> None:
    with pytest.raises(ValueError, match="lazy layers that were never run"):
        finecf.wrap(nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(4)))


def test_unused_layer_is_refused() -> None:
    model = seeded(PooledNet)
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="never called"):
        finecf.wrap(model, layer="spare")


def test_tokens_become_a_grid() -> None:
    model = seeded(Tokens)
    clf = finecf.wrap(model, layer="block")
    x = images(2)
    features = clf.features(x)
    assert features.shape == (2, 12, 4, 4)
    torch.testing.assert_close(clf.logits_from(features), clf.logits(x))
    fold = clf.fold(features)
    assert fold is not None
    assert fold.kind == "linear"


def test_head_given_as_a_function() -> None:
    model = seeded(PooledNet)
    clf = finecf.wrap(model, layer="body", head=lambda f: model.fc(f.mean((2, 3))))
    x = images(2)
    torch.testing.assert_close(clf.logits_from(clf.features(x)), clf.logits(x))
    wrong = finecf.wrap(model, layer="body", head=lambda f: model.fc(f.amax((2, 3))))
    with pytest.raises(ValueError, match="the head function given"):
        wrong.features(x)


def test_parallel_wrapper_is_taken_off_and_scripts_are_refused() -> None:
    model = seeded(PooledNet)
    assert finecf.wrap(nn.DataParallel(model)).model is model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(model, images(1))
    with pytest.raises(TypeError, match="TorchScript"):
        finecf.wrap(script)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        finecf.wrap("resnet50")


def test_model_is_left_as_it_was() -> None:
    model = seeded(PooledNet)
    model.train()
    model.norm.eval()  # frozen by its owner
    model.fc.weight.requires_grad_(False)
    before = state(model)
    statistics = model.norm.running_mean.clone()
    x = images(2)
    clf = finecf.wrap(model)
    with pytest.warns(UserWarning, match="train mode"):
        features = clf.features(x)
    clf.pyramid(x)
    clf.logits_from(features)
    clf.fold(features)
    clf.cam(features, torch.tensor([0, 1]))
    with pytest.warns(UserWarning, match="train mode"):
        finecf.wrap(model, head=lambda f: model.fc(f.mean((2, 3)))).cam(features, 1)
    assert state(model) == before
    torch.testing.assert_close(model.norm.running_mean, statistics)


def test_train_mode_gives_what_eval_mode_gives() -> None:
    model = seeded(PooledNet)
    want = finecf.wrap(model).logits(images(2))
    model.train()
    with pytest.warns(UserWarning, match="train mode"):
        torch.testing.assert_close(finecf.wrap(model).logits(images(2)), want)


@pytest.mark.parametrize("where", ["body", "fc"])
def test_model_is_left_as_it_was_after_an_exception(where: str) -> None:
    model = seeded(PooledNet)
    clf = finecf.wrap(model)
    features = clf.features(images(2))
    model.train()

    def fail(*_: object) -> None:
        raise RuntimeError("a fault in the user's model")

    handle = model.get_submodule(where).register_forward_pre_hook(fail)
    before = state(model)
    calls: list[Callable[[], object]] = [
        lambda: clf.features(images(2)),
        lambda: clf.pyramid(images(2, 48)),
        lambda: finecf.wrap(model),
    ]
    if where == "fc":
        calls += [lambda: clf.logits_from(features), lambda: clf._gradient(features, torch.tensor([0, 1]))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in calls:
            with pytest.raises((RuntimeError, ValueError), match="a fault in the user's model"):
                call()
            assert state(model) == before
    handle.remove()


def test_autocast_is_off_inside() -> None:
    clf = finecf.wrap(seeded(PooledNet))
    x = images(2)
    want = clf.logits(x)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = clf.logits(x)
        assert clf.logits_from(clf.features(x)).dtype == torch.float32
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_model_in_half_precision(dtype: torch.dtype) -> None:
    want = finecf.wrap(seeded(PooledNet)).logits(images(2))
    clf = finecf.wrap(seeded(PooledNet).to(dtype))
    features, logits = clf.features_and_logits(images(2))
    assert features.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, want, atol=0.05, rtol=0.05)
    fold = clf.fold(features)
    assert fold is not None
    assert fold.weight.dtype == torch.float32


def test_double_precision_stays() -> None:
    clf = finecf.wrap(seeded(PooledNet).double())
    features = clf.features(images(2))
    fold = clf.fold(features)
    assert fold is not None
    assert features.dtype == fold.weight.dtype == torch.float64
    assert fold.max_error < 1e-12


def test_works_inside_inference_mode() -> None:
    clf = finecf.wrap(seeded(PooledNet), head=None)
    classes = torch.tensor([0, 1], device=DEVICE)
    want = clf.cam(clf.features(images(2)), classes)
    with torch.inference_mode():
        features = clf.features(images(2))
        torch.testing.assert_close(clf.cam(features, classes), want)
        torch.testing.assert_close(clf._gradient(features, classes).mean((2, 3)), clf.model.fc.weight[classes] / 64)


# Images


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (torch.full((1, 3, 32, 32), float("nan")), ValueError, "NaN or inf .image 0 "),
        (torch.cat([torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), float("inf"))]), ValueError, "image 1 "),
        (torch.zeros(3, 3, 32, 32, 1), ValueError, r"expected \[B,Ch,H,W\]"),
        (torch.zeros(32, 32), ValueError, r"shape \[32, 32\]; expected"),
        (torch.zeros(2, 4, 32, 32), ValueError, "4 channels .*takes 3"),
        (torch.zeros(2, 32, 32, 3), ValueError, r"permute\(0, 3, 1, 2\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, r"uint8; expected float.*/ 255"),
        (torch.zeros(2, 3, 32, 32, requires_grad=True), ValueError, r"images\.detach"),
        ("bird.jpg", TypeError, "images is a str; expected a float tensor"),
        ([], ValueError, "list of images is empty"),
    ],
)
def test_bad_images_get_a_sentence(bad: object, error: type[Exception], words: str) -> None:
    clf = finecf.wrap(seeded(PooledNet))
    with pytest.raises(error, match=words):
        clf.prepare(bad)


def test_prepare() -> None:
    seen: list[tuple[int, ...]] = []

    def halve(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x[..., ::2, ::2] - 0.5

    clf = finecf.wrap(seeded(PooledNet), preprocess=halve)
    assert clf.prepare(images(1, 64)[0]).shape == (1, 3, 32, 32)
    assert clf.prepare(list(images(3, 64))).shape == (3, 3, 32, 32)
    assert seen == [(3, 64, 64)] * 4
    # What prepare gives is not preprocessed again.
    clf.features(clf.prepare(images(1, 64)))
    assert len(seen) == 5
    with pytest.raises(ValueError, match="different sizes"):
        clf.prepare([images(1, 64)[0], images(1, 32)[0]])


@settings(deadline=None, max_examples=20)
@given(
    batch=st.integers(0, 3), height=st.integers(4, 40), width=st.integers(4, 40), channels=st.sampled_from([1, 2, 3])
)
def test_any_size_and_batch(batch: int, height: int, width: int, channels: int) -> None:
    clf = finecf.wrap(seeded(PooledNet, channels=channels), layer="body")
    x = torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(height * 41 + width))
    features, logits = clf.features_and_logits(x)
    assert features.shape == (batch, 12, -(-height // 4), -(-width // 4))
    assert logits.shape == (batch, 5)
    torch.testing.assert_close(clf.logits_from(features), logits)
    if batch == 0:
        with pytest.raises(ValueError, match="empty batch"):
            clf.fold(features)
        return
    fold = clf.fold(features)
    assert fold is not None
    torch.testing.assert_close(fold.base_logits(batch) + fold.cell_logits(features).sum(1), logits)


def test_nan_in_the_network_names_the_layer() -> None:
    model = seeded(PooledNet)
    clf = finecf.wrap(model)
    features = clf.features(images(2))
    with pytest.raises(ValueError, match="features holds NaN or inf behind layer 'body'"):
        clf.logits_from(features * float("nan"))
    with pytest.raises(ValueError, match="features of layer 'body' holds NaN"):
        clf.fold(features * float("inf"))
    with torch.no_grad():
        model.fc.bias[0] = float("inf")
    with pytest.raises(ValueError, match="head behind layer 'body' gives NaN or inf"):
        clf.features(images(2))
    with torch.no_grad():
        model.stem.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 'body' gives NaN or inf .image 0"):
        clf.features(images(2))


def test_features_that_require_grad_are_refused() -> None:
    clf = finecf.wrap(seeded(PooledNet))
    with pytest.raises(ValueError, match=r"features\.detach"):
        clf.logits_from(clf.features(images(1)).requires_grad_())


def test_output_that_is_not_logits() -> None:
    class Wrong(PooledNet):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": super().forward(x)}

    class OneLogit(PooledNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :1]

    with pytest.raises(TypeError, match=r"gives a dict; expected logits \[B,C\]"):
        finecf.wrap(seeded(Wrong), layer="body").features(images(1))
    with pytest.raises(ValueError, match="C >= 2"):
        finecf.wrap(seeded(OneLogit), layer="body").features(images(1))


# Classes


def test_classes_by_name_and_index() -> None:
    names = ["waxwing", "oriole", "grebe", "tanager", "bunting"]
    clf = finecf.wrap(seeded(PooledNet), class_names=names)
    assert clf.class_index("grebe") == 2
    assert clf.class_index(torch.tensor(3)) == 3
    assert clf.class_name(1) == "oriole"
    with pytest.raises(ValueError, match=r"unknown class 'gerbe'.*'grebe'"):
        clf.class_index("gerbe")
    for index in (-1, 5):
        with pytest.raises(ValueError, match=r"out of range; the classifier has classes 0\.\.4"):
            clf.class_index(index)
    with pytest.raises(TypeError, match="expected its index or its name"):
        clf.class_index(1.5)
    with pytest.raises(ValueError, match="no class_names"):
        finecf.wrap(seeded(PooledNet)).class_index("grebe")
    with pytest.raises(ValueError, match="2 class_names were given, and the model has 5"):
        finecf.wrap(seeded(PooledNet), class_names=["a", "b"]).logits(images(1))


def test_fingerprint_tells_weights_apart() -> None:
    clf = finecf.wrap(seeded(PooledNet))
    same, other = finecf.wrap(seeded(PooledNet)), finecf.wrap(seeded(PooledNet, seed=1))
    assert clf.fingerprint() == same.fingerprint()
    assert clf.fingerprint()["weights"] != other.fingerprint()["weights"]


# Grad-CAM and the pyramid


def test_cam_without_backward_is_cam_with_backward() -> None:
    model = seeded(PooledNet)
    x, classes = images(3), torch.tensor([4, 0, 2])
    folded, generic = finecf.wrap(model), finecf.wrap(model, head=lambda f: model.fc(f.mean((2, 3))))
    features = folded.features(x)
    generic.features(x)
    want = generic.cam(features, classes)
    torch.testing.assert_close(folded.cam(features, classes), want)
    assert want.shape == (3, 8, 8)
    assert float(want.min()) >= 0
    assert all(p.grad is None for p in model.parameters())


def test_cam_of_a_head_that_cuts_the_gradient() -> None:
    model = seeded(PooledNet)
    clf = finecf.wrap(model, layer="body", head=lambda f: model.fc(f.detach().mean((2, 3))))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="cuts the gradient"):
        clf.cam(clf.features(images(1)), 0)


def test_pyramid_goes_from_shallow_to_deep() -> None:
    clf = finecf.wrap(seeded(PooledNet))
    x = images(2)
    maps = clf.pyramid(x)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 16, 16), (2, 12, 8, 8)]
    torch.testing.assert_close(maps[-1], clf.features(x))


class Wide(nn.Module):
    """Maps of as many channels as rows, for images twice as wide as high: [B,8,8,16], then `body` [B,12,4,8]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 12, 2, 2), nn.ReLU())
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


def test_as_many_channels_as_rows_are_channels_all_the_same() -> None:
    model = seeded(Wide)
    clf = finecf.wrap(model, layer="body")
    x = torch.rand(2, 3, 32, 64, device=DEVICE)
    with torch.no_grad():
        stem = model.stem(x)
        body = model.body(stem)
    first, last = clf.pyramid(x)
    assert torch.equal(first, stem)
    assert torch.equal(last, body)
    assert [tuple(each.shape) for each in finecf.wrap(model, layer="stem").pyramid(x)] == [(2, 8, 8, 16)]


@pytest.mark.parametrize(
    ("shape", "image", "layout"),
    [
        ((1, 64, 64, 128), (128, 256), ("nchw", 64, 128)),
        ((1, 64, 64, 64), (256, 256), ("nchw", 64, 64)),
        ((1, 7, 7, 768), (224, 224), ("nhwc", 7, 7)),
        ((1, 7, 14, 768), (224, 448), ("nhwc", 7, 14)),
        ((1, 14, 7, 768), (448, 224), ("nhwc", 14, 7)),
        ((1, 8, 10, 96), (250, 300), ("nhwc", 8, 10)),
        ((1, 512, 8, 10), (250, 300), ("nchw", 8, 10)),
        ((1, 512, 7, 7), (224, 448), ("nchw", 7, 7)),  # pooled to a fixed size
        ((1, 8, 16, 16), (64, 128), ("nchw", 16, 16)),  # likewise; 16 channels would be no more than cells a row
        ((1, 6, 6, 32), (100, 300), ("nhwc", 6, 6)),
    ],
    ids=str,
)
def test_the_cells_are_laid_out_as_the_image_is(
    shape: tuple[int, ...], image: tuple[int, int], layout: tuple[str, int, int]
) -> None:
    assert Layout.of(torch.empty(shape), "layer", image) == Layout(*layout)


class Channelled(Wide):
    """Its map is [B,H,W,D]."""

    def __init__(self) -> None:
        super().__init__()
        self.last = Last()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.body(self.stem(x))).mean((1, 2)))


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def test_channels_may_come_last_in_wide_images() -> None:
    clf = finecf.wrap(seeded(Channelled), layer="last")
    x = torch.rand(2, 3, 32, 64, device=DEVICE)
    features, logits = clf.features_and_logits(x)
    assert tuple(features.shape) == (2, 12, 4, 8)
    torch.testing.assert_close(clf.logits_from(features), logits)


# Losses through the model


def encoded_as_checked(clf: Classifier, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images with a gradient, and the map and logits of `encode`, which are the bits of `features_and_logits`."""
    features, logits = clf.features_and_logits(x)
    leaf = x.clone().requires_grad_()
    encoded, said = clf.encode(leaf)
    assert torch.equal(encoded, features)
    assert torch.equal(said, logits)
    return leaf, encoded, said


def test_encode_and_head_give_what_the_checked_methods_give_with_their_graph() -> None:
    model = seeded(PooledNet)
    clf = finecf.wrap(model)
    with clf.frozen():
        leaf, encoded, said = encoded_as_checked(clf, images(3))
        again = clf.head(encoded)
        torch.testing.assert_close(again, said)
        by_map, by_logits, by_head = (
            torch.autograd.grad(value.square().sum(), leaf, retain_graph=True)[0] for value in (encoded, said, again)
        )
    leaf = images(3).requires_grad_()
    maps = model.trunk(leaf)
    (wanted,) = torch.autograd.grad(maps.square().sum(), leaf, retain_graph=True)
    torch.testing.assert_close(by_map, wanted)
    (wanted,) = torch.autograd.grad(model.fc(maps.mean((2, 3))).square().sum(), leaf)
    torch.testing.assert_close(by_logits, wanted)
    torch.testing.assert_close(by_head, wanted)
    assert float(wanted.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_model_is_left_as_it_was() -> None:
    model = seeded(PooledNet)
    model.train()
    model.norm.eval()  # frozen by its owner
    model.fc.weight.requires_grad_(False)
    clf = finecf.wrap(model)
    before, statistics = state(model), model.norm.running_mean.clone()

    def use() -> Tensor:
        with clf.frozen():
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert torch.is_grad_enabled()
            x = images(4).requires_grad_()
            (gradient,) = torch.autograd.grad(clf.encode(x)[1].sum(), x)
        return gradient

    with pytest.warns(UserWarning, match="train mode"):
        first = use()
    assert state(model) == before
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        second = use()
        assert not torch.is_grad_enabled()
    assert torch.equal(first, second)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16), clf.frozen():
        assert clf.encode(images(1))[0].dtype == torch.float32
    with pytest.raises(RuntimeError, match="in the middle"), clf.frozen():
        raise RuntimeError("in the middle")
    assert state(model) == before
    assert torch.equal(model.norm.running_mean, statistics)


def test_frozen_inside_frozen() -> None:
    model = seeded(PooledNet)
    clf = finecf.wrap(model)
    with clf.frozen():
        with clf.frozen():
            pass
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("net", [InPlace, InPlaceControlFlow])
def test_encode_gives_the_map_before_layers_that_work_in_place(net: type[nn.Module]) -> None:
    model = seeded(net)
    clf = finecf.wrap(model, layer="body")
    x = images(2)
    clf.features(x)  # a head that cannot be traced must know the image's shape
    with clf.frozen():
        features, logits = clf.encode(x)
        assert torch.equal(features, model.trunk(x))
        torch.testing.assert_close(clf.head(features), logits)
    assert hooks(model) == 0


def test_encode_leaves_no_hook_after_an_exception() -> None:
    model = seeded(PooledNet)
    clf = finecf.wrap(model)
    with clf.frozen(), pytest.raises(RuntimeError, match="channels"):
        clf.encode(torch.zeros(1, 5, 32, 32, device=DEVICE))
    assert hooks(model) == 0


def test_encode_refuses_a_layer_that_is_not_called_once() -> None:
    class Sometimes(ControlFlow):
        """The layer runs twice for bright images."""

        def forward(self, x: Tensor) -> Tensor:
            f = self.body(F.relu(self.norm(self.stem(x))))
            if float(x.mean()) > 1:
                self.body(F.relu(self.norm(self.stem(x))))
            return self.fc(f.mean((2, 3)))

    model = seeded(Sometimes)
    clf = finecf.wrap(model, layer="body")
    assert clf.encode(images(1))[0].shape == (1, 12, 8, 8)
    with pytest.raises(ValueError, match=r"layer 'body' was called 2 times in one forward; expected once"):
        clf.encode(images(1) + 2)
    assert hooks(model) == 0


@pytest.mark.parametrize("net", [Tokens, ReluBehind])
def test_encode_gives_the_same_cells_as_features(net: type[nn.Module]) -> None:
    clf = finecf.wrap(seeded(net), layer="block" if net is Tokens else None)
    with clf.frozen():
        leaf, encoded, said = encoded_as_checked(clf, images(2))
        torch.testing.assert_close(clf.head(encoded), said)
        assert float(torch.autograd.grad(clf.head(encoded)[:, 0].sum(), leaf)[0].abs().sum()) > 0


def test_head_refuses_what_is_no_map() -> None:
    clf = finecf.wrap(seeded(PooledNet))
    with pytest.raises(ValueError, match=r"features has shape \[2, 12\]; expected \[B,D,H,W\]"):
        clf.head(torch.zeros(2, 12, device=DEVICE))
