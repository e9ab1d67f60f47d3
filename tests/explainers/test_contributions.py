"""Contribution maps and the partition made from them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from explainers.nets import CLASSES, DEVICE, GRID, images, other_classes, setting, stretch
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from torch import Tensor

import finecf
from finecf.explainers._contributions import exact, gaussian_coalitions, minmax, permutation
from finecf.explainers._games import Game, Head, LinearGame, play
from finecf.explainers._partition import label, object_mask, parts

KINDS = ("linear", "first_linear", "generic")


def small_game(cells: int = 4, batch: int = 2, seed: int = 0) -> LinearGame:
    """A linear game of a few cells on made-up logits."""
    generator = torch.Generator().manual_seed(seed)
    classifier, _ = setting()
    cell_logits = torch.randn(batch, cells, CLASSES, generator=generator)
    features = torch.zeros(batch, 12, 1, cells)
    head = Head(classifier, None, 1 << 20)
    return LinearGame(head, features, cell_logits, torch.randn(batch, CLASSES, generator=generator))


def by_definition(game: Game, classes: Tensor, value: str) -> Tensor:
    """Shapley values as the mean marginal over all orders."""
    cells = game.cells
    total = torch.zeros(len(classes), cells, dtype=torch.float64)
    orders = list(itertools.permutations(range(cells)))
    for order in orders:
        mask = torch.zeros(cells)
        before = game.masked_scores(mask[None], classes, value).double()
        for cell in order:
            mask[cell] = 1
            after = game.masked_scores(mask[None], classes, value).double()
            total[:, cell] += (after - before)[:, 0]
            before = after
    return total / len(orders)


@pytest.mark.parametrize("value", ["prob", "log_prob", "log_odds", "logit"])
def test_exact_values_are_the_mean_over_all_orders(value: str) -> None:
    game = small_game()
    classes = torch.tensor([1, 3])
    assert torch.allclose(exact(game, classes, value).raw.double(), by_definition(game, classes, value), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_and_sampled_values_agree_for_every_head(kind: str) -> None:
    classifier, _ = setting(kind)
    features, logits = classifier.features_and_logits(images(2))
    game = play(Head(classifier, classifier.fold(features), 1 << 24), features, logits)
    classes = game.logits.argmax(1)
    whole = exact(game, classes, "prob")
    generator = torch.Generator().manual_seed(3)
    sampled = permutation(game, classes, "prob", 48, 0.0, generator)
    assert sampled.samples == 48
    assert bool((sampled.stderr > 0).any())
    assert bool(((sampled.raw - whole.raw).abs() <= 5 * sampled.stderr + 1e-5).all())
    ends = game.masked_scores(torch.tensor([[0.0], [1.0]], device=DEVICE).expand(2, game.cells), classes, "prob")
    for values in (whole, sampled):
        assert torch.allclose(values.raw.sum(1), ends[:, 1] - ends[:, 0], atol=1e-4)


def test_sampling_stops_at_the_tolerance_and_repeats_with_its_generator() -> None:
    game = small_game(cells=8)
    classes = torch.tensor([0, 2])
    loose = permutation(game, classes, "prob", 4096, 0.01, torch.Generator().manual_seed(0))
    assert loose.samples < 4096
    assert float(loose.stderr.amax()) <= 0.01
    again = permutation(game, classes, "prob", 4096, 0.01, torch.Generator().manual_seed(0))
    assert torch.equal(loose.raw, again.raw)
    other = permutation(game, classes, "prob", 4096, 0.01, torch.Generator().manual_seed(1))
    assert not torch.equal(loose.raw, other.raw)


def test_one_sample_has_no_finite_error() -> None:
    classifier, _ = setting("generic")
    features, logits = classifier.features_and_logits(images(1))
    game = play(Head(classifier, None, 1 << 24), features, logits)
    result = permutation(game, game.logits.argmax(1), "prob", 1, 0.0, torch.Generator().manual_seed(0))
    assert math.isinf(float(result.stderr.amin()))
    assert bool(result.raw.isfinite().all())


def test_gaussian_coalitions_leave_out_a_gaussian() -> None:
    masks = gaussian_coalitions((3, 4), 0.8, torch.device("cpu"), torch.float64)[1:]
    assert masks.shape == (12, 12)
    for cell, other in itertools.product(range(12), repeat=2):
        (i, j), (u, v) = divmod(cell, 4), divmod(other, 4)
        expected = 1 - math.exp(-((u - i) ** 2 + (v - j) ** 2) / (2 * 0.8**2))
        assert float(masks[cell, other]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("method", ["gaussian", "permutation", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_in_range_and_have_the_captum_shape(kind: str, method: str) -> None:
    classifier, bank = setting(kind)
    x = images(3)
    explainer = finecf.FGVCE(classifier, bank, permutations=8, tolerance=0.0)
    phi = explainer.contribution_map(x, None, method)
    assert phi.shape == (3, *GRID)
    assert float(phi.amin()) >= 0
    assert float(phi.amax()) == pytest.approx(1)
    large = explainer.attribute(x, None, method)
    assert large.shape == (3, 1, *x.shape[2:])
    assert float(large.amin()) >= 0
    assert float(large.amax()) <= 1 + 1e-6
    predicted = classifier.logits(x).argmax(1)
    each = torch.cat([explainer.contribution_map(one, int(c), method) for one, c in zip(x, predicted, strict=True)])
    assert torch.allclose(each, phi, atol=1e-3)


def test_sampled_explanations_carry_errors_and_seed() -> None:
    classifier, bank = setting()
    x = images(2)
    targets = other_classes(classifier, bank, x)
    explainer = finecf.FGVCE(
        classifier,
        bank,
        contribution="permutation",
        permutations=40,
        tolerance=0.0,
        generator=torch.Generator().manual_seed(7),
    )
    for result in explainer.explain(x, targets):
        assert result.seed == 7
        assert result.maps["contribution_stderr"].shape == GRID
        assert bool(result.maps["contribution_stderr"].isfinite().all())
    assert finecf.FGVCE(classifier, bank).explain(x, targets)[0].seed is None


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30))
@example_settings(max_examples=100, deadline=None)
def test_minmax_is_in_range_and_never_nan(values: list[float]) -> None:
    stretched = minmax(torch.tensor(values))
    assert bool(stretched.isfinite().all())
    assert float(stretched.amin()) >= 0
    assert float(stretched.amax()) <= 1


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.5, 1e30])
def test_a_constant_map_gives_zeros(constant: float) -> None:
    assert torch.equal(minmax(torch.full((2, 49), constant)), torch.zeros(2, 49))


def test_an_image_that_lights_no_cell_gives_zeros_and_no_nan() -> None:
    classifier, bank = setting()
    with torch.no_grad():
        for parameter in classifier.model.trunk.parameters():
            parameter.zero_()
    x = images(1)
    (result,) = finecf.FGVCE(classifier, bank_of(classifier, bank), max_edits=2).explain(
        x, other_classes(classifier, bank, x)
    )
    assert torch.equal(result.maps["contribution"], torch.zeros(GRID, device=DEVICE))
    assert all(
        bool(result.maps[name].isfinite().all()) for name in result.maps if result.maps[name].is_floating_point()
    )
    assert result.parts == []
    assert not result.maps["object_mask"].any()


def bank_of(classifier: finecf.Classifier, bank: finecf.CandidateBank) -> finecf.CandidateBank:
    """The same rows, not tied to the weights that they came from."""
    return finecf.CandidateBank(bank.rows(), bank.labels, bank.grid, class_names=classifier.class_names)


def test_regions_are_numbered_with_eight_neighbours() -> None:
    mask = torch.tensor(
        [[1, 0, 0, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [1, 0, 0, 1, 0], [1, 1, 0, 0, 1]], dtype=torch.bool
    )
    expected = [[1, 0, 0, 2, 2], [0, 1, 0, 0, 0], [0, 0, 0, 3, 0], [4, 0, 0, 3, 0], [4, 4, 0, 0, 3]]
    assert label(mask).tolist() == expected


@given(st.integers(0, 10_000), st.integers(1, 24), st.integers(1, 24), st.sampled_from([0.2, 0.5, 0.8]))
@example_settings(max_examples=60, deadline=None)
def test_regions_agree_with_a_flood_fill(seed: int, height: int, width: int, share: float) -> None:
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < share
    found = label(mask)
    expected = torch.zeros_like(found)
    count = 0
    for start in mask.nonzero().tolist():
        if expected[start[0], start[1]]:
            continue
        count += 1
        stack = [tuple(start)]
        while stack:
            r, c = stack.pop()
            if 0 <= r < height and 0 <= c < width and mask[r, c] and not expected[r, c]:
                expected[r, c] = count
                stack += [(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert torch.equal(found, expected)


def test_parts_are_sorted_by_contribution_and_know_cells_and_box() -> None:
    cam = torch.zeros(7, 7)
    cam[1, 1] = cam[1, 2] = 1.0
    cam[5, 5] = 0.9
    contribution = torch.zeros(7, 7)
    contribution[1, 1] = contribution[1, 2] = 0.8
    contribution[5, 5] = 1.0
    labels, found = parts(cam, contribution, (70, 70))
    assert len(found) == 2
    assert found[0].cells == ((1, 1), (1, 2))
    assert found[1].cells == ((5, 5),)
    assert found[0].score > found[1].score
    assert int(labels[15, 20]) == 1
    assert int(labels[55, 55]) == 2
    for number, part in enumerate(found, 1):
        left, top, right, bottom = part.box
        inside = (labels == number).nonzero()
        assert (top, left) == tuple(inside.amin(0).tolist())
        assert (bottom - 1, right - 1) == tuple(inside.amax(0).tolist())
    mask = object_mask(cam, (70, 70))
    assert mask.dtype == torch.bool
    assert bool(mask[15, 15])
    assert not bool(mask[35, 35])
    assert torch.equal(stretch(cam) > 0.5, cam > 0.5)
