"""The drop-in face of SMDL against a transcription of the described classes that works image by image."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageOps
from torch import Tensor, nn

import finecf
from finecf.compat.smdl_attribution import (
    BlackBoxSingleModalSubModularExplanation,
    BlackBoxSingleModalSubModularExplanationEfficient,
    MultiModalSubModularExplanation,
    MultiModalSubModularExplanationEfficientV2,
)
from finecf.explainers._subset import NOISE_FACTOR

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "smdl_transcription.py"
pytestmark = pytest.mark.skipif(
    not SCRIPT.exists(), reason="benchmarks/ is not beside the tests (a copy of the package alone)"
)
transforms = pytest.importorskip("torchvision.transforms")

SIZE, FEATURES, CLASSES = 12, 8, 5
LISTS = ("consistency_score", "collaboration_score", "confidence_score", "effectiveness_score", "smdl_score")
WEIGHTS = {
    "ones": {},
    "as the scripts": {"confidence": 0.05, "effectiveness": 0.05, "consistency": 20.0, "collaboration": 5.0},
    "no effectiveness": {"effectiveness": 0.0},
    "consistency alone": {"confidence": 0.0, "effectiveness": 0.0, "collaboration": 0.0},
}


@pytest.fixture(scope="module")
def transcription() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smdl_transcription", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Net(nn.Module):
    """Features of a small convolutional net for images of any size; it casts, so that float64 can be tested."""

    def __init__(self, seed: int = 0, outputs: int = FEATURES, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, outputs, 3, stride=2)
            )
            for part in self.body[::3]:
                nn.init.normal_(part.weight, std=0.4)
            nn.init.normal_(self.body[1].running_mean, std=0.3)
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.to(self.body[0].weight.dtype)).tanh().mean((2, 3))


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def semantic(seed: int = 0) -> Tensor:
    return torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


def regions_of(count: int = 9, seed: int = 0, size: int = SIZE) -> list[np.ndarray]:
    """Region images of a random image; some pixels are black, also within regions."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    image[rng.random((size, size)) < 0.1] = 0
    labels = finecf.regions.grid(size, size, count).numpy() if count > 1 else np.zeros((size, size), dtype=int)
    return [np.where((labels == region)[:, :, None], image, 0).astype(np.uint8) for region in range(count)]


plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])])


def of_array(picture: np.ndarray) -> Tensor:
    """A function that takes arrays alone, and swaps the channels as OpenCV's users do."""
    return torch.from_numpy(picture[:, :, ::-1].copy()).permute(2, 0, 1).double() / 255 - 0.45


PREPROCESSING: dict[str, tuple[Any, bool]] = {
    "normalise": (plain, True),
    "of arrays": (of_array, True),
    "resize": (transforms.Compose([transforms.Resize(17), plain]), False),
    "resize to the same size": (transforms.Compose([transforms.Resize(SIZE), plain]), True),
    "crop": (transforms.Compose([transforms.CenterCrop(9), plain]), True),
    "pad and mirror": (transforms.Compose([transforms.Pad(2), transforms.RandomHorizontalFlip(1.0), plain]), True),
    "nearest": (transforms.Compose([transforms.Resize(24, transforms.InterpolationMode.NEAREST), plain]), True),
    "blur": (transforms.Compose([transforms.GaussianBlur(3, 1.0), plain]), False),
    "stretch": (transforms.Compose([ImageOps.autocontrast, plain]), False),
    "standardise": (
        lambda picture: (lambda x: (x - x.mean()) / (x.std() + 0.1))(transforms.ToTensor()(picture)),
        False,
    ),
    "batch of one": (lambda picture: plain(picture)[None], True),
}


def check(found: tuple[Any, ...], expected: tuple[Any, ...], order: list[int], tolerance: float = 1e-5) -> None:
    """The triple of the face against that of the transcription."""
    merged, ranked, scores = found
    assert merged.dtype == ranked.dtype == np.uint8
    assert np.array_equal(ranked, expected[1])
    assert np.array_equal(merged, expected[0])
    assert set(scores) == set(expected[2])
    for name, value in expected[2].items():
        assert type(scores[name]) is type(value), name
        assert scores[name] == pytest.approx(value, abs=tolerance), name
    assert len(order) == len(ranked) == scores["sub-k"]
    json.dumps(scores)


# ---- against the transcription


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy(transcription: ModuleType, weights: dict[str, float], seed: int) -> None:
    net, images = Net(seed), regions_of(9, seed)
    slow = transcription.SlowSMDL(net, plain, semantic(seed), weights=weights)
    expected = slow(images, 3)
    assert min(slow.gaps) > 1e-9  # no tie in these data: the orders must agree to the last rank
    explainer = MultiModalSubModularExplanation(net, semantic(seed), plain, weights=weights)
    found = explainer(images, 3)
    assert explainer.report is not None
    assert explainer.report.order == slow.order
    assert explainer.report.tied_steps == []
    assert explainer.report.preprocessed_once
    check(found, expected, slow.order, tolerance=1e-9)
    assert found[2]["smdl_score"] == pytest.approx(
        [sum(found[2][f"{n}_score"][i] * w for n, w in explainer.weights.items()) for i in range(9)]
    )


@pytest.mark.parametrize("pending", [1, 3, 8, 20])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_from_both_ends(transcription: ModuleType, weights: dict[str, float], pending: int) -> None:
    net, images = Net(2), regions_of(16, 2)
    slow = transcription.SlowSMDL(net, plain, semantic(2), weights=weights, pending=pending)
    expected = slow(images, 1)
    assert min(slow.gaps) > 1e-9
    explainer = MultiModalSubModularExplanationEfficientV2(
        net, semantic(2), plain, pending_samples=pending, weights=weights
    )
    found = explainer(images, 1)
    assert explainer.report is not None
    assert explainer.report.order == slow.order
    check(found, expected, slow.order, tolerance=1e-9)


def test_the_ends_matter() -> None:
    """The two searches do not give the same order here, so that one cannot stand in for the other."""
    net, images = Net(2), regions_of(16, 2)
    greedy = MultiModalSubModularExplanation(net, semantic(2), plain)
    both = MultiModalSubModularExplanationEfficientV2(net, semantic(2), plain, pending_samples=3)
    assert not np.array_equal(greedy(images, 1)[1], both(images, 1)[1])
    assert greedy.report is not None
    assert both.report is not None
    assert both.report.evaluations < 0.8 * greedy.report.evaluations


@pytest.mark.parametrize(("preprocess", "once"), PREPROCESSING.values(), ids=PREPROCESSING)
@pytest.mark.parametrize("seed", [0, 1])
def test_any_preprocessing(transcription: ModuleType, preprocess: Any, once: bool, seed: int) -> None:
    net, images = Net(seed), regions_of(6, seed)
    slow = transcription.SlowSMDL(
        net,
        lambda picture: (lambda x: x[0] if x.ndim == 4 else x)(preprocess(picture)),
        semantic(seed),
        arrays=preprocess is of_array,
    )
    expected = slow(images)
    assert min(slow.gaps) > 1e-9
    explainer = MultiModalSubModularExplanation(net, semantic(seed), preprocess)
    check(explainer(images), expected, slow.order, tolerance=1e-9)
    assert explainer.report is not None
    assert explainer.report.preprocessed_once == once


@pytest.mark.parametrize("pending", [None, 3])
@pytest.mark.parametrize(("probabilities", "sharpness"), [(False, 1.0), (True, 1.0), (True, 12.0)])
def test_black_boxes(transcription: ModuleType, probabilities: bool, sharpness: float, pending: int | None) -> None:
    net, images = Net(5, CLASSES), regions_of(9, 5)
    model = nn.Sequential(net, Times(sharpness), nn.Softmax(1)) if probabilities else net
    slow = transcription.SlowSMDL(model, plain, pending=pending, probabilities=probabilities)
    expected = slow(images, 2)
    assert min(slow.gaps) > 1e-9
    for outputs in ("auto", "probabilities" if probabilities else "logits"):
        explainer: Any
        if pending is None:
            explainer = BlackBoxSingleModalSubModularExplanation(model, plain, outputs=outputs)
        else:
            explainer = BlackBoxSingleModalSubModularExplanationEfficient(
                model, plain, pending_samples=pending, outputs=outputs
            )
        check(explainer(images, 2), expected, slow.order, tolerance=1e-9)


def test_probabilities_of_zero() -> None:
    """They underflow in float32, and have no logarithm."""
    model = nn.Sequential(Net(5, CLASSES, torch.float32), Times(2000.0), nn.Softmax(1))
    assert float(model(plain(sum(regions_of(9)))[None]).detach().min()) == 0
    _, _, scores = BlackBoxSingleModalSubModularExplanation(model, plain)(regions_of(9))
    assert all(math.isfinite(x) for name in LISTS for x in scores[name])
    assert 0 <= min(scores["consistency_score"]) <= max(scores["consistency_score"]) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_float32_models(transcription: ModuleType, seed: int) -> None:
    net, images, matrix = Net(seed, dtype=torch.float32), regions_of(9, seed), semantic(seed).float()
    slow = transcription.SlowSMDL(net, plain, matrix)
    _, ranked, expected = slow(images)
    explainer = MultiModalSubModularExplanation(net, matrix, plain, micro_batch=5)
    _, own, scores = explainer(images)
    assert explainer.report is not None
    assert explainer.report.noise < 1e-5
    close = [i for i, gap in enumerate(slow.gaps) if gap <= NOISE_FACTOR * explainer.report.noise]
    end = close[0] if close else 9
    assert end > 3
    assert np.array_equal(own[:end], ranked[:end])
    for name in LISTS:
        assert scores[name][:end] == pytest.approx(expected[name][:end], abs=1e-5)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda), "cpu"])
def test_devices(device: str) -> None:
    net, images = Net(1), regions_of(9, 1)
    expected = MultiModalSubModularExplanation(net, semantic(1), plain)(images)
    resize = transforms.Compose([transforms.Resize(SIZE), plain])
    for preprocess in (plain, resize):
        found = MultiModalSubModularExplanation(net.to(device), semantic(1), preprocess, device=device)(images)
        check(found, expected, [0] * 9)


# ---- the triple


def test_shapes_and_types() -> None:
    images = regions_of(9)
    merged, ranked, scores = MultiModalSubModularExplanation(Net(), semantic(), plain, 4)(images)
    assert merged.shape == (SIZE, SIZE, 3)
    assert ranked.shape == (4, SIZE, SIZE, 3)
    assert set(scores) == {*LISTS, "lambda1", "lambda2", "lambda3", "lambda4", "sub-k"}
    assert all(len(scores[name]) == 4 and all(type(x) is float for x in scores[name]) for name in LISTS)
    best = int(np.argmax(scores["smdl_score"])) + 1
    assert np.array_equal(merged, ranked[:best].sum(0))
    assert scores["sub-k"] == 4


@pytest.mark.parametrize("kind", [MultiModalSubModularExplanation, MultiModalSubModularExplanationEfficientV2])
@pytest.mark.parametrize("k", [1, 3, 15])
def test_a_smaller_k_is_a_prefix(transcription: ModuleType, kind: Any, k: int) -> None:
    net, images = Net(3), regions_of(16, 3)
    whole, few = kind(net, semantic(3), plain), kind(net, semantic(3), plain, k=k)
    all_scores, scores = whole(images, 0)[2], few(images, 0)[2]
    assert few.report.order == whole.report.order[:k]
    assert len(whole.report.order) == 16  # the default k of 40 is more than there are
    for name in LISTS:
        assert scores[name] == pytest.approx(all_scores[name][:k], abs=1e-12)
    assert few.report.evaluations < whole.report.evaluations or k == 15
    slow = transcription.SlowSMDL(net, plain, semantic(3), k=k, pending=None if "V2" not in kind.__name__ else 8)
    check(few(images, 0), slow(images, 0), slow.order, tolerance=1e-9)


def test_no_class_means_the_predicted_one() -> None:
    net, images = Net(4), regions_of(9, 4)
    predicted = int((net(plain(sum(images))[None]) @ semantic(4).T).argmax())
    explainer = MultiModalSubModularExplanation(net, semantic(4), plain)
    scores = explainer(images)[2]
    assert explainer.report is not None
    assert explainer.report.target == predicted
    assert scores == explainer(images, predicted)[2] == explainer(images, id=torch.tensor(predicted))[2]
    assert scores != explainer(images, (predicted + 1) % CLASSES)[2]


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("kind", [MultiModalSubModularExplanation, MultiModalSubModularExplanationEfficientV2])
def test_few_regions(transcription: ModuleType, m: int, kind: Any) -> None:
    net, images = Net(), regions_of(m)
    slow = transcription.SlowSMDL(net, plain, semantic())
    check(kind(net, semantic(), plain)(images), slow(images), slow.order, tolerance=1e-9)


def test_black_pixels_regions_and_images(transcription: ModuleType) -> None:
    net = Net(6)
    for preprocess in (plain, PREPROCESSING["resize"][0]):
        black = [np.zeros((SIZE, SIZE, 3), dtype=np.uint8)] * 3
        _, ranked, scores = MultiModalSubModularExplanation(net, semantic(), preprocess)(black)
        assert ranked.shape[0] == 3
        assert not ranked.any()
        assert all(math.isfinite(x) for name in LISTS for x in scores[name])
        images = regions_of(6, 6)
        images[2] = np.zeros_like(images[2])
        slow = transcription.SlowSMDL(net, preprocess, semantic())
        expected = slow(images)
        explainer = MultiModalSubModularExplanation(net, semantic(), preprocess)
        check(explainer(images), expected, slow.order, tolerance=1e-9)
        assert explainer.report is not None
        assert sorted(explainer.report.order) == list(range(6))


def test_an_image_black_all_over_keeps_the_given_order() -> None:
    black = [np.zeros((SIZE, SIZE, 3), dtype=np.uint8)] * 4
    explainer = MultiModalSubModularExplanation(Net(), semantic(), plain)
    explainer(black)
    assert explainer.report is not None
    assert explainer.report.order == [0, 1, 2, 3]
    assert explainer.report.tied_steps == [1, 2, 3]


def test_batches_do_not_show() -> None:
    images = regions_of(9)
    for preprocess in (plain, PREPROCESSING["resize"][0]):
        alone = MultiModalSubModularExplanation(Net(), semantic(), preprocess, micro_batch=1)(images)
        for size in (7, 64):
            check(
                MultiModalSubModularExplanation(Net(), semantic(), preprocess, micro_batch=size)(images),
                alone,
                [0] * 9,
                tolerance=1e-12,
            )


def test_random_preprocessing_is_noise_and_not_an_order() -> None:
    noisy = transforms.Compose([plain, lambda x: x + torch.rand(()) * 0.1])
    explainer = MultiModalSubModularExplanation(Net(), semantic(), noisy)
    explainer(regions_of(6))
    assert explainer.report is not None
    assert not explainer.report.preprocessed_once
    assert explainer.report.noise > 1e-5
    assert explainer.report.tied_steps


# ---- the model and the settings


class Seen(Net):
    """Counts images, and whether each forward was in eval mode."""

    count = 0
    training_forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += len(x)
        self.training_forwards += self.training or self.body[1].training
        return super().forward(x)


def test_the_users_model_is_not_changed() -> None:
    net = Seen().train()
    net.body[0].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    explainer = MultiModalSubModularExplanation(net, semantic().requires_grad_(), plain)
    explainer(regions_of(9))
    assert explainer.report is not None
    assert net.count == explainer.report.evaluations
    assert net.count <= 9 * 10 + 9 + 1 + 16 + 1
    assert net.training_forwards == 0
    assert net.training
    assert net.body[1].training
    assert not net.body[0].training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match="overlap"):
        explainer([regions_of(1)[0]] * 2)
    assert net.training


def test_a_function_is_a_model_too() -> None:
    net, images = Net(), regions_of(4)
    found = MultiModalSubModularExplanation(lambda x: net(x), semantic(), plain)(images)
    check(found, MultiModalSubModularExplanation(net, semantic(), plain)(images), [0] * 4, tolerance=0)


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        (MultiModalSubModularExplanation, ["model", "semantic_feature", "preproccessing_function"]),
        (MultiModalSubModularExplanationEfficientV2, ["model", "semantic_feature", "preproccessing_function"]),
        (BlackBoxSingleModalSubModularExplanation, ["model", "preproccessing_function"]),
        (BlackBoxSingleModalSubModularExplanationEfficient, ["model", "preproccessing_function"]),
    ],
)
def test_numbered_weights(kind: Any, first: list[str]) -> None:
    efficient = ["pending_samples"] if "Efficient" in kind.__name__ else []
    positional = [
        name for name, each in inspect.signature(kind).parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    assert positional == [*first, "k", "lambda1", "lambda2", "lambda3", "lambda4", "device", *efficient]
    arguments = [Net(1, CLASSES), semantic()[:, :CLASSES], plain] if len(first) == 3 else [Net(1, CLASSES), plain]
    with pytest.warns(UserWarning, match=r"lambda1 = 0\.5 weighs confidence, lambda2 = 2 .*lambda4 = 4 ") as caught:
        numbered = kind(*arguments, 40, 0.5, 2, 3, 4)
    assert [Path(each.filename).name for each in caught] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(*arguments)
        kind(*arguments, 40, 2, 2, 2, 2)
        named = kind(*arguments, weights={"collaboration": 4, "consistency": 3, "effectiveness": 2, "confidence": 0.5})
    scores = numbered(regions_of(4))[2]
    assert [scores[f"lambda{i}"] for i in range(1, 5)] == [0.5, 2, 3, 4]
    assert scores == named(regions_of(4))[2]
    with pytest.raises(ValueError, match=r"by number .* or by name .*not both"):
        kind(*arguments, lambda2=3, weights={"confidence": 1})
    if efficient:
        assert kind(*arguments, 40, 1, 1, 1, 1, "cpu", 2)._pending == 2
        with pytest.raises(ValueError, match="pending_samples must be at least 1, got 0"):
            kind(*arguments, pending_samples=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k must be at least 1"),
        ({"micro_batch": 0}, r"micro_batch must be at least 1"),
        ({"weights": {"consistancy": 1}}, r"unknown weight 'consistancy': did you mean 'consistency'"),
        ({"weights": {"confidence": -1}}, r"weight 'confidence' must be a number of at least 0"),
        ({"semantic_feature": torch.ones(3)}, r"semantic_feature must be a matrix .*got \[3\]"),
        (
            {"semantic_feature": torch.ones(3, 2, dtype=torch.int64)},
            r"matrix .* of real numbers; got \[3, 2\] of torch",
        ),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    arguments = {"model": Net(), "semantic_feature": semantic(), "preproccessing_function": plain} | options
    with pytest.raises(ValueError, match=message):
        MultiModalSubModularExplanation(**arguments)


def test_bad_images() -> None:
    explainer, images = MultiModalSubModularExplanation(Net(), semantic(), plain), regions_of(9)
    images[5] = images[5].copy()
    images[5][0, :2] = 7  # in region 0, which is black at some pixels
    with pytest.raises(ValueError, match=r"regions 0 and 5 overlap: [12] pixels are other than black in both"):
        explainer(images)
    with pytest.raises(ValueError, match="image_set is empty"):
        explainer([])
    with pytest.raises(TypeError, match="image 1 is float64"):
        explainer([images[0], images[1] / 255.0])
    with pytest.raises(ValueError, match=r"of one size; image 1 is \[11, 12, 3\], image 0 is \[12, 12, 3\]"):
        explainer([images[0], images[1][1:]])
    with pytest.raises(ValueError, match=r"RGB images \[H,W,3\] of one size; image 0 is \[12, 12\]"):
        explainer([images[0][:, :, 0]])
    for wrong in (-1, CLASSES):
        with pytest.raises(ValueError, match=rf"id must be a class in 0\.\.{CLASSES - 1}.*got {wrong}"):
            explainer(regions_of(4), wrong)


def test_bad_models_and_preprocessing() -> None:
    images = regions_of(4)

    def refuse(picture: Any) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(TypeError, match=r"given a PIL image it raised .*; given an array it raised RuntimeError: no"):
        MultiModalSubModularExplanation(Net(), semantic(), refuse)(images)
    with pytest.raises(TypeError, match=r"it gave a ndarray, not a tensor"):
        MultiModalSubModularExplanation(Net(), semantic(), np.asarray)(images)
    with pytest.raises(ValueError, match=r"\[5,8\] does not fit the model's features, which are \[n,6\]"):
        MultiModalSubModularExplanation(Net(0, 6), semantic(), plain)(images)
    with pytest.raises(TypeError, match=r"model must give a tensor \[n,d\]; it gave a tuple"):
        MultiModalSubModularExplanation(lambda x: (x,), semantic(), plain)(images)
    with pytest.raises(ValueError, match=r"tensor \[n,d\] for n images; it gave \[1, 3, 12, 12\]"):
        MultiModalSubModularExplanation(lambda x: x, semantic(), plain)(images)
    with pytest.raises(ValueError, match=r"NaN or inf for the whole image"):
        MultiModalSubModularExplanation(lambda x: x.flatten(1)[:, :8] / 0, semantic(), plain)(images)
    with pytest.raises(ValueError, match=r"give one class"):
        MultiModalSubModularExplanation(Net(), semantic()[:1], plain)(images)
