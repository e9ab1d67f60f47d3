"""What bad input gets: a sentence that says what was expected, what came and what to do."""

from __future__ import annotations

import pytest
import torch
from explainers.nets import CLASSES, DEVICE, images, other_classes, setting
from hypothesis import given, settings
from hypothesis import strategies as st

import finecf


@pytest.fixture(scope="module")
def ready() -> tuple[finecf.Classifier, finecf.CandidateBank, finecf.FGVCE]:
    classifier, bank = setting()
    return classifier, bank, finecf.FGVCE(classifier, bank)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "best"}, "preset must be one of fgvce, paper"),
        ({"contribution": "lime"}, "contribution must be one of"),
        ({"contribution_class": "both"}, "contribution_class must be one of"),
        ({"value": "entropy"}, "value must be one of"),
        ({"sigma": 0.0}, "sigma must be a positive number, got 0"),
        ({"sigma": float("nan")}, "sigma must be a positive number"),
        ({"weight_sim": -1.0}, "weight_sim must be a finite number of at least 0"),
        ({"weight_cls": float("inf")}, "weight_cls must be a finite number"),
        ({"weight_sim": "equal"}, "weight_sim must be one of balanced"),
        ({"top_cells": 0}, "top_cells must be a whole number of at least 1"),
        ({"top_candidates": "many"}, "top_candidates must be a whole number"),
        ({"max_edits": -2}, "max_edits must be a whole number"),
        ({"refresh_contributions": 0}, "refresh_contributions must be a whole number"),
        ({"permutations": 0}, "permutations must be a positive number"),
        ({"candidate_classes": "some"}, "candidate_classes must be one of target, all"),
        ({"candidate_classes": ["class 1", "classs 2"]}, "unknown class 'classs 2'"),
        ({"parity": ["script"]}, "parity must be one of before_target"),
        ({"memory_budget": 0}, "memory_budget must be a positive number of bytes"),
    ],
)
def test_settings_are_refused(ready, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finecf.FGVCE(ready[0], ready[1], **arguments)


def test_targets_are_refused(ready) -> None:
    classifier, _, explainer = ready
    x = images(2)
    predicted = classifier.logits(x).argmax(1)
    with pytest.raises(ValueError, match=r"image 0 is already classified as its target 'class \d'"):
        explainer.explain(x, predicted)
    with pytest.raises(ValueError, match="unknown class 'Class 1'"):
        explainer.explain(x, "Class 1")
    with pytest.raises(ValueError, match="one for each of the 2 images; got 3"):
        explainer.explain(x, [0, 1, 2])
    with pytest.raises(ValueError, match="sources must name each of the 2 images"):
        explainer.explain(x, 1, sources=["one"])
    with pytest.raises(ValueError, match=r"features must be \[2,D,H,W\]"):
        explainer.explain(x, 1, features=classifier.features(x[:1]))


@given(st.one_of(st.integers(-1000, -1), st.integers(CLASSES, 1000)))
@settings(max_examples=20, deadline=None)
def test_a_target_out_of_range_is_refused(target: int) -> None:
    classifier, bank = setting(references=20)
    with pytest.raises(ValueError, match=r"out of range; the classifier has classes 0\.\.4"):
        finecf.FGVCE(classifier, bank).explain(images(1), target)


@given(st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.integers(0, 2 * 3 * 32 * 32 - 1))
@settings(max_examples=20, deadline=None)
def test_an_image_with_nan_or_inf_is_refused(value: float, where: int) -> None:
    classifier, bank = setting(references=20)
    x = images(2)
    x.view(-1)[where] = value
    with pytest.raises(ValueError, match="NaN or inf"):
        finecf.FGVCE(classifier, bank).explain(x, 0)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_images_of_a_wrong_shape_are_refused(shape: list[int]) -> None:
    classifier, bank = setting(references=20)
    if len(shape) in (3, 4) and shape[-3] == 3:
        shape[-3] = 4
    with pytest.raises(ValueError, match=r"images has"):
        finecf.FGVCE(classifier, bank).explain(torch.rand(shape), 0)


def test_other_images_are_refused(ready) -> None:
    explainer = ready[2]
    with pytest.raises(ValueError, match=r"requires grad.*images.detach"):
        explainer.explain(images(1).requires_grad_(), 0)
    with pytest.raises(TypeError, match=r"dtype torch\.uint8"):
        explainer.explain((images(1) * 255).byte(), 0)
    with pytest.raises(TypeError, match="expected a float tensor"):
        explainer.explain("bird.png", 0)


def test_features_with_nan_are_refused(ready) -> None:
    classifier, _, explainer = ready
    x = images(1)
    features = classifier.features(x)
    features[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or inf"):
        explainer.explain(x, 0, features=features)


def test_a_bank_without_the_class_is_refused() -> None:
    classifier, bank = setting()
    x = images(8)
    start, stop = bank.class_range(0)
    only = finecf.CandidateBank(bank.rows(start, stop), [0] * ((stop - start) // bank.cells), bank.grid)
    wanted = [i for i, c in enumerate(classifier.logits(x).argmax(1).tolist()) if c != 1][:1]
    with pytest.raises(ValueError, match="the bank holds no cells of class 1"):
        finecf.FGVCE(classifier, only).explain(x[wanted], 1)
    empty = finecf.CandidateBank(
        bank.rows(start, stop), [0] * ((stop - start) // bank.cells), bank.grid, classes=[0, 1]
    )
    with pytest.raises(ValueError, match=r"no cell of class 'class 1'.*extend the bank"):
        finecf.FGVCE(classifier, empty).explain(x[wanted], 1)


def test_a_bank_of_another_width_or_model_is_refused() -> None:
    classifier, bank = setting()
    x = images(1)
    targets = other_classes(classifier, bank, x)
    narrow = finecf.CandidateBank(bank.rows()[:, :7].contiguous(), bank.labels, bank.grid)
    with pytest.raises(ValueError, match="7 features"):
        finecf.FGVCE(classifier, narrow).explain(x, targets)
    other, _ = setting("generic")
    with pytest.raises(ValueError, match="build"):
        finecf.FGVCE(other, bank)


def test_a_budget_too_small_for_one_coalition_names_the_least_that_works() -> None:
    classifier, bank = setting("generic")
    x = images(1)
    targets = other_classes(classifier, bank, x)
    with pytest.raises(
        ValueError, match=r"too small for one coalition; the least that works .* is ([\d,]+) bytes"
    ) as caught:
        finecf.FGVCE(classifier, bank, memory_budget=100).explain(x, targets)
    least = int(str(caught.value).rsplit(" is ", 1)[1].split(" ")[0].replace(",", ""))
    assert finecf.FGVCE(classifier, bank, memory_budget=least).explain(x, targets)[0].edits
    with pytest.raises(ValueError, match="too small"):
        finecf.FGVCE(classifier, bank, memory_budget=least - 1).explain(x, targets)


def test_exact_contributions_of_many_cells_are_refused() -> None:
    classifier, bank = setting()
    explainer = finecf.FGVCE(classifier, bank, contribution="exact")
    large = torch.nn.functional.interpolate(images(1), 64)
    with pytest.raises(ValueError, match=r'takes at most 16 cells, got 64; use "permutation"'):
        explainer.contribution_map(large)
    phi = finecf.FGVCE(classifier, bank, contribution="exact", value="logit").contribution_map(large)
    assert phi.shape == (1, 8, 8)


def test_an_empty_batch_gives_an_empty_list(ready) -> None:
    assert ready[2].explain(images(1)[:0], 1) == []


def test_autocast_and_half_precision_do_not_matter(ready) -> None:
    classifier, bank, explainer = ready
    x = images(2)
    targets = other_classes(classifier, bank, x)
    plain = explainer.explain(x, targets)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        cast = explainer.explain(x, targets)
    assert [r.logits_path.dtype for r in cast] == [torch.float32] * 2
    for one, other in zip(plain, cast, strict=True):
        assert torch.allclose(one.logits_path, other.logits_path, atol=1e-4)
    half, half_bank = setting()
    half.model.half()
    kept = finecf.CandidateBank(half_bank.rows().half(), half_bank.labels, half_bank.grid)
    (result,) = finecf.FGVCE(half, kept).explain(x[:1], other_classes(half, half_bank, x[:1]))
    assert result.logits_path.dtype == torch.float32
    assert bool(result.logits_path.isfinite().all())
