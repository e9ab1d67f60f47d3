"""Scores of counterfactual images: by hand, against slow transcriptions, and against what Mirror-CFE says itself."""

import math

import numpy as np
import pytest
import torch
from explainers.nets import CLASSES, SmallNet, images, network
from scipy.linalg import sqrtm  # scikit-image brings scipy
from torch import Tensor, nn

import finecf
from finecf.data import SyntheticBirds
from finecf.metrics import (
    VISIBLE_PIXELS,
    counterfactual_scores,
    cout,
    dilate_masks,
    feature_distances,
    frechet_distance,
    redraw_distances,
    visible_parts,
)
from finecf.models.decoder import MirrorDecoder, shape_of


def brightness(x: Tensor) -> Tensor:
    """Logits of two classes: the first wins where the image is brighter than 1/2 on average."""
    return torch.stack([8 * x.mean((1, 2, 3)) - 4, torch.zeros(len(x))], 1)


def flicker(x: Tensor) -> Tensor:
    """Logits of two classes: the second wins where neighbours in a row differ."""
    return torch.stack([torch.ones(len(x)), 10 * (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))], 1)


def wrapped() -> finecf.Classifier:
    return finecf.wrap(network(), layer="trunk")


def slowly_blurred(image: Tensor) -> Tensor:
    """[H,W] under a 7 x 7 Gaussian of sigma 1 over the image with its border repeated."""
    weights = {
        (y, x): math.exp(-(y * y + x * x) / 2) for y in range(-3, 4) for x in range(-3, 4)
    }  # normalised below, as a kernel of its own
    height, width = image.shape
    out = torch.zeros(height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            for (y, x), weight in weights.items():
                near = image[min(max(row + y, 0), height - 1), min(max(column + x, 0), width - 1)]
                out[row, column] += weight * float(near)
    return out / sum(weights.values())


# Scores


def test_scores_by_hand():
    x = torch.full((3, 1, 2, 2), 0.25)
    drawn = torch.stack([torch.full((1, 2, 2), value) for value in (0.75, 0.375, 0.25)])
    scores = counterfactual_scores(brightness, x, drawn, 0)
    assert scores.valid.tolist() == scores.denoised_valid.tolist() == [1, 0, 0]
    assert scores.failed.tolist() == [0, 1, 1]  # nothing is known of the search: an image that is not valid failed
    assert scores.l1.tolist() == [0.5, 0.125, 0]
    torch.testing.assert_close(scores.denoised_l1, scores.l1, rtol=0, atol=1e-6)  # a blur leaves constant images alone
    wanted = torch.tensor([2.0, -1.0, -2.0]).double().sigmoid()
    torch.testing.assert_close(scores.target_probability, wanted)
    torch.testing.assert_close(scores.source_probability, 1 - wanted)
    assert scores.means() == pytest.approx(
        {
            "valid": 1 / 3,
            "failed": 2 / 3,
            "l1": 0.625 / 3,
            "denoised_valid": 1 / 3,
            "denoised_l1": 0.625 / 3,
            "target_probability": float(wanted.mean()),
            "source_probability": float(1 - wanted.mean()),
        }
    )
    assert {each.dtype for each in vars(scores).values() if each is not None} == {torch.float64}


def test_an_image_without_a_counterfactual_is_invalid_and_has_no_distance():
    x = torch.full((3, 1, 2, 2), 0.25)
    drawn = torch.full_like(x, 0.75)
    drawn[1] = math.nan
    scores = counterfactual_scores(brightness, x, drawn, 0, found=torch.tensor([True, False, True]))
    assert scores.valid.tolist() == scores.denoised_valid.tolist() == [1, 0, 1]
    assert scores.failed.tolist() == [0, 1, 0]
    for values in (scores.l1, scores.denoised_l1, scores.target_probability, scores.source_probability):
        assert values.isnan().tolist() == [False, True, False]
    means = scores.means()
    assert (means["valid"], means["failed"], means["l1"]) == pytest.approx((2 / 3, 1 / 3, 0.5))
    # Found and valid are two things: what was found may have been changed (8 bits of a file) before it is scored.
    lost = counterfactual_scores(brightness, x, x, 0, found=[True, True, False])
    assert (lost.valid.tolist(), lost.failed.tolist()) == ([0, 0, 0], [0, 0, 1])
    nothing = counterfactual_scores(brightness, x, drawn, 0, found=[False] * 3).means()
    assert (nothing["valid"], nothing["failed"]) == (0, 1)
    assert math.isnan(nothing["l1"])


def test_what_only_noise_achieves_is_lost_in_the_blur():
    grid = torch.arange(8)
    noise = ((grid[:, None] + grid) % 2).float() * 0.4
    x = torch.full((2, 1, 8, 8), 0.3)
    x[1, 0, 2:5, 6:] = 0.6
    drawn = x.clone()
    drawn[0, 0] += noise
    drawn[1, 0, :, 4:] = 0.9
    drawn[1, 0, :, ::3] = 0.0
    scores = counterfactual_scores(flicker, x, drawn, 1)
    assert scores.valid.tolist() == [1, 1]
    assert scores.denoised_valid.tolist() == [0, 1]
    for b in range(2):
        expected = (slowly_blurred(drawn[b, 0]) - slowly_blurred(x[b, 0])).abs().mean()
        assert float(scores.denoised_l1[b]) == pytest.approx(float(expected), abs=1e-6)
    blurred = torch.stack([slowly_blurred(each[0]) for each in drawn])[:, None]
    assert flicker(blurred).argmax(1).tolist() == scores.denoised_valid.tolist()


def test_distances_are_shares_of_the_range():
    x, drawn = torch.rand(2, 3, 6, 6), torch.rand(2, 3, 6, 6)
    mean, deviation = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.3, 0.25])[:, None, None]
    flat = counterfactual_scores(brightness, x, drawn, 0)
    scaled = counterfactual_scores(
        lambda each: brightness(each * deviation + mean),
        (x - mean) / deviation,
        (drawn - mean) / deviation,
        0,
        image_range=(((0 - mean) / deviation).flatten(), ((1 - mean) / deviation).flatten()),
    )
    for name in ("l1", "denoised_l1", "target_probability"):
        torch.testing.assert_close(getattr(flat, name), getattr(scaled, name), rtol=0, atol=1e-6)
    twice = counterfactual_scores(brightness, x, drawn, 0, image_range=(0, 2))
    torch.testing.assert_close(2 * twice.l1, flat.l1)


def test_the_batch_size_changes_nothing_and_the_source_is_what_is_predicted():
    classifier, x, drawn = wrapped(), images(7), images(7, seed=5)
    target, predicted = torch.arange(7) % CLASSES, classifier.logits(x).argmax(1)
    latents = torch.rand(7, 12, generator=torch.Generator().manual_seed(0))
    at_once = counterfactual_scores(classifier, x, drawn, target, latents=latents)
    in_parts = counterfactual_scores(classifier, x, drawn, target, predicted, latents=latents, batch_size=3)
    for name in ("valid", "l1", "denoised_l1", "target_probability", "source_probability", "latent_error"):
        torch.testing.assert_close(getattr(at_once, name), getattr(in_parts, name), rtol=0, atol=1e-6)
    said = classifier.logits(drawn).double().softmax(1).cpu()
    torch.testing.assert_close(at_once.source_probability, said[torch.arange(7), predicted.cpu()])


@pytest.fixture(scope="module")
def mirror() -> finecf.MirrorCFE:
    classifier = wrapped()
    torch.manual_seed(1)
    decoder = MirrorDecoder(shape_of(classifier, images(1)[0]), width=8)
    return finecf.MirrorCFE(classifier, decoder, untrained_pairs="refuse")


def test_latent_scores_are_those_of_the_explanation(mirror):
    x = images(4)
    predicted = mirror.classifier.logits(x).argmax(1)
    target = (predicted + 1) % CLASSES
    found = mirror.explain(x, target, steps=[0.7])
    path = mirror.latent_path(x, target, steps=[0.7])
    drawn = torch.stack([each.images[0] for each in found])
    scores = counterfactual_scores(
        mirror.classifier, x, drawn, target, latents=path.latents[:, 0], latent_logits=path.logits[:, 0]
    )
    for b, each in enumerate(found):
        assert float(scores.latent_error[b]) == pytest.approx(float(each.latent_error[0]), abs=1e-6)
        assert float(scores.confidence_gap[b]) == pytest.approx(each.confidence_gap, abs=1e-5)
    torch.testing.assert_close(scores.latent_distance, 12 * scores.latent_error)
    assert float(scores.latent_error.min()) > 0
    assert set(scores.means()) >= {"latent_error", "latent_distance", "confidence_gap"}


def test_no_images_at_all():
    scores = counterfactual_scores(brightness, torch.empty(0, 1, 4, 4), torch.empty(0, 1, 4, 4), 0)
    assert scores.valid.shape == scores.l1.shape == scores.failed.shape == (0,)
    assert math.isnan(scores.means()["valid"])
    curves = cout(brightness, torch.empty(0, 1, 4, 4), torch.empty(0, 1, 4, 4), 0)
    assert curves.score.shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"counterfactuals": torch.rand(1, 1, 4, 4)}, ValueError, r"got \[1, 1, 4, 4\] for images \[2, 1, 4, 4\]"),
        ({"counterfactuals": [[0.0]]}, TypeError, "counterfactuals must be a tensor, got list"),
        ({"counterfactuals": torch.full((2, 1, 4, 4), math.nan)}, ValueError, "counterfactuals hold NaN or infinite"),
        ({"images": torch.full((2, 1, 4, 4), math.inf)}, ValueError, "images hold NaN or infinite"),
        ({"images": torch.full((2, 1, 4, 4), 255.0)}, ValueError, r"the images reach from 255 to 255, beyond image_ra"),
        (
            {"counterfactuals": torch.full((2, 1, 4, 4), -1.0)},
            ValueError,
            "counterfactuals reach from -1 to -1, beyond",
        ),
        ({"image_range": (0.5, 1.0)}, ValueError, "beyond image_range"),
        ({"images": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}, ValueError, r"floating \[B,C,H,W\]"),
        ({"target": 2}, ValueError, r"target classes must lie in 0\.\.1, got 2\.\.2"),
        ({"target": -1}, ValueError, r"target classes must lie in 0\.\.1, got -1"),
        ({"target": torch.tensor([[0, 1], [0, 1]])}, ValueError, r"target must be one class an image"),
        ({"target": 0.5}, TypeError, "class indices"),
        ({"source": 7}, ValueError, r"source classes must lie in 0\.\.1, got 7\.\.7"),
        ({"source": torch.tensor([0, 1, 0])}, ValueError, "with B = 2"),
        ({"found": torch.ones(3, dtype=torch.bool)}, ValueError, r"found must be bool \[2\], got torch.bool \[3\]"),
        ({"found": torch.ones(2)}, ValueError, r"found must be bool \[2\], got torch.float32"),
        ({"image_range": (1, 0)}, ValueError, "least < largest"),
        ({"image_range": ([0, 0, 0], [1, 1, 1])}, ValueError, "two lists of 1"),
        ({"latents": torch.rand(2, 3)}, TypeError, "a function has none: give a finecf.wrap classifier"),
        ({"latent_logits": torch.rand(3, 2)}, ValueError, r"latent_logits must be one row an image, \[2,n\]"),
        ({"latent_logits": torch.rand(2, 3)}, ValueError, r"latent_logits must be \[2,2\], got \[2, 3\]"),
        ({"latent_logits": torch.full((2, 2), math.nan)}, ValueError, "latent_logits holds NaN"),
        ({"latent_logits": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "latent_logits must be a floating tensor"),
        ({"classifier": 3}, TypeError, "a finecf.wrap classifier or a callable"),
        ({"classifier": lambda x: x}, ValueError, r"must return logits \[2, classes\]"),
        ({"classifier": lambda x: brightness(x) * math.inf}, ValueError, "NaN or infinite logits"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ],
)
def test_bad_scores_get_a_sentence(change, error, sentence):
    arguments = {
        "classifier": brightness,
        "images": torch.full((2, 1, 4, 4), 0.25),
        "counterfactuals": torch.full((2, 1, 4, 4), 0.75),
        "target": 0,
    }
    with pytest.raises(error, match=sentence):
        counterfactual_scores(**{**arguments, **change})


def test_latents_of_another_width_get_a_sentence():
    with pytest.raises(ValueError, match=r"latents must be \[2,12\]"):
        counterfactual_scores(wrapped(), images(2), images(2, seed=3), 0, latents=torch.rand(2, 5))


# COUT


def weighted(x: Tensor) -> Tensor:
    """Logits of three classes, each with a weight of its own for every pixel of 10 x 10."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(3, x.shape[1], 10, 10, generator=generator) / 3
    return torch.einsum("bchw,kchw->bk", x, weight)


def test_cout_by_hand():
    x, drawn = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.25, 1.0], [0.0, 0.5]]]])
    sums = [0.0, 1.0, 1.5, 1.75, 1.75]  # the second pixel first, then the fourth, the first, and the third
    curves = cout(lambda each: torch.stack([each.sum((1, 2, 3)) - 1, -each.sum((1, 2, 3))], 1), x, drawn, 0, 1)
    target = torch.tensor([2 * each - 1 for each in sums]).double().sigmoid()
    torch.testing.assert_close(curves.share, torch.tensor([0, 0.25, 0.5, 0.75, 1]).double())
    torch.testing.assert_close(curves.target[0], target)
    torch.testing.assert_close(curves.source[0], 1 - target)
    area = float(((target[1:] + target[:-1]) / 2).mean())
    assert float(curves.target_auc) == pytest.approx(area)
    assert float(curves.source_auc) == pytest.approx(1 - area)
    assert float(curves.score) == pytest.approx(2 * area - 1)


def released(x: Tensor, drawn: Tensor, source: int, target: int, steps: int) -> float:
    """COUT of one grey image, step by step as the authors' release computes it."""
    mask = (drawn - x).abs().flatten()
    order = mask.argsort(descending=True, stable=True)
    move = max(1, len(mask) // steps)
    now, probabilities = x.clone().flatten(), [weighted(x[None]).double().softmax(1)[0]]
    for place in range(0, len(mask), move):
        now[order[place : place + move]] = drawn.flatten()[order[place : place + move]]
        probabilities.append(weighted(now.view_as(x)[None]).double().softmax(1)[0])
    areas = []
    for label in (target, source):
        curve = [float(each[label]) for each in probabilities]
        areas.append((curve[0] / 2 + sum(curve[1:-1]) + curve[-1] / 2) * move / len(mask))
    return areas[0] - areas[1]


@pytest.mark.parametrize("steps", [10, 50, 100, 1000])
def test_cout_is_the_released_one_where_the_steps_are_even(steps):
    generator = torch.Generator().manual_seed(0)
    x, drawn = (torch.rand(3, 1, 10, 10, generator=generator) for _ in range(2))
    source, target = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    found = cout(weighted, x, drawn, target, source, steps=steps, batch_size=7).score
    for b in range(3):
        expected = released(x[b], drawn[b], int(source[b]), int(target[b]), steps)
        assert float(found[b]) == pytest.approx(expected, abs=1e-6)


def test_cout_of_colour_moves_whole_pixels_by_their_summed_difference():
    generator = torch.Generator().manual_seed(1)
    x, drawn = (torch.rand(2, 3, 10, 10, generator=generator) for _ in range(2))
    order = (drawn - x).abs().sum(1)
    curves = cout(weighted, x, drawn, 1, 0, steps=4)
    given = cout(weighted, x, drawn, 1, 0, steps=4, maps=order)
    assert torch.equal(curves.score, given.score)
    for b in range(2):
        half = torch.zeros(100, dtype=torch.bool)
        half[order[b].flatten().argsort(descending=True)[:50]] = True
        mixed = torch.where(half.view(10, 10), drawn[b], x[b])
        assert float(curves.target[b, 2]) == pytest.approx(float(weighted(mixed[None]).softmax(1)[0, 1]), abs=1e-6)


def test_cout_lies_between_its_bounds_and_prefers_sparse_changes():
    x = torch.zeros(1, 1, 10, 10)
    drawn = torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(2)) * 0.01
    drawn[0, 0, 5, 5] = 1.0
    one_pixel = lambda each: torch.stack([60 * each[:, 0, 5, 5] - 30, torch.zeros(len(each))], 1)  # noqa: E731
    assert float(cout(one_pixel, x, drawn, 0, steps=100).score) == pytest.approx(0.99, abs=1e-6)
    worst = torch.ones(1, 10, 10)
    worst[0, 5, 5] = 0
    assert float(cout(one_pixel, x, drawn, 0, maps=worst, steps=100).score) == pytest.approx(-0.99, abs=1e-6)
    unchanged = cout(one_pixel, x, x, 0)
    assert float(unchanged.score) == pytest.approx(-1, abs=1e-6)  # the source is what is predicted: class 1
    torch.testing.assert_close(unchanged.source, torch.ones(1, 51).double())


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"maps": torch.rand(1, 5, 5)}, ValueError, r"maps must be one order an image, \[1, 10, 10\]"),
        ({"maps": torch.full((1, 10, 10), math.nan)}, ValueError, "maps holds NaN"),
        ({"counterfactuals": torch.rand(1, 1, 5, 5)}, ValueError, r"for images \[1, 1, 10, 10\]"),
        ({"counterfactuals": torch.full((1, 1, 10, 10), math.nan)}, ValueError, "counterfactuals hold NaN"),
        ({"target": 3}, ValueError, r"target classes must lie in 0\.\.2"),
        ({"source": 3}, ValueError, r"source classes must lie in 0\.\.2, got 3"),
        ({"memory_budget": 10}, ValueError, "one composed image needs"),
    ],
)
def test_bad_cout_gets_a_sentence(change, error, sentence):
    arguments = {"images": torch.rand(1, 1, 10, 10), "counterfactuals": torch.rand(1, 1, 10, 10), "target": 0}
    with pytest.raises(error, match=sentence):
        cout(weighted, **{**arguments, **change})


# Distances between features


def gaussian(count: int, mean: Tensor, covariance: Tensor, seed: int = 0) -> Tensor:
    """Rows whose mean and covariance are exactly those."""
    raw = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    raw -= raw.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(raw.T)).T, raw, upper=True, left=False)
    return mean + white @ torch.linalg.cholesky(covariance).T


def test_frechet_distance_is_the_closed_form_of_gaussians():
    mean, other = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
    first, second = torch.tensor([4.0, 1.0, 0.25]).double(), torch.tensor([1.0, 9.0, 0.25]).double()
    found = frechet_distance(gaussian(50, mean, first.diag()), gaussian(80, other, second.diag(), seed=1))
    expected = (mean - other).square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    assert found == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("count", [200, 9])
def test_frechet_distance_agrees_with_scipy(count):
    """Also where there are fewer images than dimensions, and the covariances are singular."""
    generator = torch.Generator().manual_seed(count)
    first = torch.rand(count, 16, generator=generator).double()
    second = (torch.rand(count + 3, 16, generator=generator).double() ** 2) @ torch.rand(
        16, 16, generator=generator
    ).double()
    covariances = [np.cov(values.numpy().T) for values in (first, second)]
    expected = float((first.mean(0) - second.mean(0)).square().sum()) + np.trace(
        covariances[0] + covariances[1] - 2 * np.real(sqrtm(covariances[0] @ covariances[1]))
    )
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(second, first) == pytest.approx(frechet_distance(first, second), rel=1e-12)
    assert frechet_distance(first, first.flip(0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (torch.rand(1, 4), r"n of at least 2, got \[1, 4\]"),
        (torch.rand(4), r"got \[4\]"),
        ([[0.0]], "got list"),
        (torch.rand(5, 3), "4 and 3 dimensions"),
        (torch.full((5, 4), math.nan), "NaN or infinite"),
    ],
)
def test_bad_features_get_a_sentence(second, sentence):
    with pytest.raises(ValueError, match=sentence):
        frechet_distance(torch.rand(5, 4), second)


def test_distances_in_the_classifiers_own_features():
    classifier = wrapped()
    x, drawn, real = images(5), images(5, seed=4), images(9, seed=6)
    found = feature_distances(classifier, x, drawn, real, batch_size=2)
    assert (found.lpips_name, found.fid_name, found.counts) == ("classifier LPIPS-like", "classifier FID", (5, 9))
    pairs = list(zip(classifier.pyramid(x), classifier.pyramid(drawn), strict=True))
    assert len(pairs) == 3
    for b in range(5):
        levels = []
        for one, other in pairs:
            cells = []
            for row in range(one.shape[2]):
                for column in range(one.shape[3]):
                    a, c = one[b, :, row, column].double(), other[b, :, row, column].double()
                    a, c = (each / each.norm() if float(each.norm()) else each for each in (a, c))
                    cells.append(float((a - c).square().sum()))
            levels.append(sum(cells) / len(cells))
        assert float(found.lpips[b]) == pytest.approx(sum(levels) / 3, abs=1e-6)
    pooled = [classifier.features(each).mean((2, 3)) for each in (drawn, real)]
    assert found.fid == pytest.approx(frechet_distance(*pooled), rel=1e-6)
    assert found.means() == {"classifier LPIPS-like": float(found.lpips.mean()), "classifier FID": found.fid}
    same = feature_distances(classifier, x, x)
    assert same.lpips.tolist() == [0] * 5
    assert same.fid == pytest.approx(0, abs=1e-9)


def test_distances_with_what_the_user_gives():
    x, drawn = images(4), images(4, seed=4)
    each = lambda a, b: (a - b).square().mean((1, 2, 3), keepdim=True)  # noqa: E731
    extract = lambda a: torch.cat([a.mean((2, 3)), a.std((2, 3))], 1)  # noqa: E731
    found = feature_distances(None, x, drawn, lpips=each, fid_extractor=extract)
    assert (found.lpips_name, found.fid_name, found.counts) == ("LPIPS", "FID", (4, 4))
    expected = (x - drawn).square().mean((1, 2, 3)).double().cpu()
    torch.testing.assert_close(found.lpips, expected)
    assert found.fid == pytest.approx(frechet_distance(extract(drawn), extract(x)), rel=1e-9)
    mean = feature_distances(None, x, drawn, lpips=lambda a, b: each(a, b).mean(), fid_extractor=extract)
    torch.testing.assert_close(mean.lpips, expected)
    own = feature_distances(wrapped(), x, drawn, lpips=each)
    assert (own.lpips_name, own.fid_name) == ("LPIPS", "classifier FID")


def test_images_without_a_counterfactual_count_in_neither_distance():
    classifier, x, drawn = wrapped(), images(5), images(5, seed=4)
    drawn[[1, 3]] = math.nan
    has = torch.tensor([True, False, True, False, True])
    found = feature_distances(classifier, x, drawn, found=has)
    assert torch.equal(~found.lpips.isnan(), has)
    assert found.counts == (3, 5)
    three = feature_distances(classifier, x[[0, 2, 4]], drawn[[0, 2, 4]], x)
    assert found.means() == pytest.approx(three.means(), rel=1e-6)
    one = feature_distances(classifier, x, drawn, found=[True, False, False, False, False])
    assert one.counts == (1, 5)
    assert math.isnan(one.fid)
    none = feature_distances(classifier, x, drawn, found=[False] * 5)
    assert none.counts == (0, 5)
    assert math.isnan(none.means()["classifier LPIPS-like"])


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({}, TypeError, "a function has none: give a finecf.wrap classifier, or both callables"),
        ({"lpips": lambda a, b: a.mean((2, 3))}, ValueError, r"one number a pair, \[2\] here, got \[2, 3\]"),
        ({"lpips": lambda a, b: a.mean((1, 2, 3)) * math.nan}, ValueError, "lpips returned NaN"),
        ({"fid_extractor": lambda a: a}, ValueError, r"features \[2,D\], got \[2, 3, 32, 32\]"),
        ({"fid_extractor": lambda a: None}, ValueError, "got NoneType"),
        ({"real": torch.full((2, 3, 32, 32), math.nan)}, ValueError, "real hold NaN"),
    ],
)
def test_bad_distances_get_a_sentence(options, error, sentence):
    defaults = {"lpips": lambda a, b: a.mean((1, 2, 3)), "fid_extractor": lambda a: a.mean((2, 3))} if options else {}
    with pytest.raises(error, match=sentence):
        feature_distances(brightness, images(2), images(2, seed=4), **{**defaults, **options})


# Drawn birds


@pytest.fixture(scope="module")
def birds() -> SyntheticBirds:
    return SyntheticBirds("test", size=64, n=24, classes=8)


def in_family(birds: SyntheticBirds, label: int) -> int:
    """Another class of a label's family."""
    family = birds.families[birds.family_of(label)]
    return family[(family.index(label) + 1) % len(family)]


def test_the_true_counterfactual_is_at_no_distance_and_changes_the_right_parts(birds):
    items = [birds[i] for i in range(8)]
    target = torch.tensor([in_family(birds, item.label) for item in items])
    x = torch.stack([item.tensor for item in items])
    true = torch.stack([birds.redraw(item, int(q)).tensor for item, q in zip(items, target, strict=True)])
    scores = redraw_distances(birds, items, x, true, target)
    assert scores.graded.sum() == 8 - scores.hidden > 4
    kept = scores.graded
    assert scores.inside[kept].abs().max() == scores.outside[kept].abs().max() == 0
    assert (scores.source_inside[kept] > 5 * scores.source_outside[kept]).all()
    means = scores.means()
    assert means["energy"] > 0.8 > 8 * means["area"]
    assert means["inside"] == 0


def test_redraw_distances_by_a_slow_transcription(birds):
    items = [birds[i] for i in range(6)]
    target = torch.tensor([in_family(birds, item.label) for item in items])
    x = torch.stack([item.tensor for item in items])
    drawn = (x + 0.3 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    drawn[2] = math.nan
    has = [True, True, False, True, True, True]
    scores = redraw_distances(birds, items, x, drawn, target, has, grid=(8, 8))
    plain = redraw_distances(birds, items, x, drawn, target, has)
    hidden = 0
    for b, item in enumerate(items):
        true = birds.redraw(item, int(target[b]))
        inside = np.zeros((64, 64), dtype=bool)
        shown = []
        for part in birds.differing_parts(item.label, int(target[b])):
            both = item.part_masks[part] | true.part_masks[part]
            if both.sum() >= VISIBLE_PIXELS:
                shown.append(part)
                inside |= both
        assert scores.parts[b] == tuple(shown)
        hidden += not shown
        if not shown or not has[b]:
            assert math.isnan(float(scores.inside[b]))
            continue
        apart = np.abs(drawn[b].numpy().astype(float) - true.tensor.numpy()).mean(0)
        before = np.abs(x[b].numpy().astype(float) - true.tensor.numpy()).mean(0)
        assert float(scores.inside[b]) == pytest.approx(apart[inside].mean(), abs=1e-6)
        assert float(scores.outside[b]) == pytest.approx(apart[~inside].mean(), abs=1e-6)
        assert float(scores.source_inside[b]) == pytest.approx(before[inside].mean(), abs=1e-6)
        assert float(scores.source_outside[b]) == pytest.approx(before[~inside].mean(), abs=1e-6)
        levels = np.rint(255 * np.abs(x[b].numpy().astype(float) - true.tensor.numpy())).max(0)
        assert float(scores.differing[b]) == pytest.approx((levels >= 2)[inside].mean())
        assert 0 < float(scores.differing[b]) <= 1
        change = np.abs(drawn[b].numpy().astype(float) - x[b].numpy()).mean(0)
        for found, mask in (
            (plain, inside),
            (scores, dilate_masks(torch.from_numpy(inside), (8, 8)).numpy()),
        ):
            assert float(found.energy[b]) == pytest.approx(change[mask].sum() / change.sum(), abs=1e-6)
            assert float(found.area[b]) == pytest.approx(mask.mean())
    assert (scores.hidden, scores.missing) == (hidden, 1)
    assert scores.graded.sum() < 6


def test_changing_nothing_scores_what_the_source_does(birds):
    item = next(birds[i] for i in range(8) if visible_parts(birds[i].part_masks, ["wing"]))
    q = next(q for q in range(8) if "wing" in birds.differing_parts(item.label, q))
    scores = redraw_distances(birds, [item], item.tensor, item.tensor, q)
    assert torch.equal(scores.inside, scores.source_inside)
    assert torch.equal(scores.outside, scores.source_outside)
    assert scores.energy.tolist() == [0]
    assert float(scores.inside) > 0


def test_a_part_shows_with_so_many_pixels():
    masks = {name: np.arange(64).reshape(8, 8) < count for name, count in (("tail", 19), ("wing", 20), ("beak", 40))}
    assert VISIBLE_PIXELS == 20
    assert visible_parts(masks, ["beak", "tail", "wing"]) == ("beak", "wing")


def test_parts_that_do_not_show_leave_the_picture_out(birds, monkeypatch):
    item = birds[0]
    monkeypatch.setattr("finecf.metrics.localisation.VISIBLE_PIXELS", 64 * 64)
    scores = redraw_distances(birds, [item], item.tensor, item.tensor, in_family(birds, item.label))
    assert (scores.parts, scores.hidden, scores.missing) == ([()], 1, 0)
    assert not scores.graded.any()
    assert all(math.isnan(value) for value in scores.means().values())


def test_bad_redraws_get_a_sentence(birds):
    item = birds[0]
    x, q = item.tensor[None], in_family(birds, item.label)
    for arguments, sentence in (
        (([item, item], x, x, q), "got 2 items for 1 images"),
        (([item], x[..., :32], x[..., :32], q), r"images must be \[3, 64, 64\]"),
        (([item], x, 2 * x - 1, q), r"counterfactuals reach from .* undo the scaling"),
        (([item], 255 * x, x, q), r"images reach from .* undo the scaling"),
        (([item], x, x * math.nan, q), "counterfactuals hold NaN"),
        (([item], x, x, 8), "expected a label from 0 to 7, got 8"),
        (([item], x, x, item.label), "redrawn it would be the image itself"),
    ):
        with pytest.raises(ValueError, match=sentence):
            redraw_distances(birds, *arguments)


def test_nothing_is_left_of_a_classifier_in_another_mode():
    """Scores are those of eval mode, and the mode is put back."""
    net = SmallNet("linear")
    net.trunk.append(nn.Dropout(0.9))
    classifier = finecf.wrap(net.train(), layer="trunk.4")
    with pytest.warns(UserWarning, match="in train mode"):
        first = counterfactual_scores(classifier, images(3).cpu(), images(3, seed=2).cpu(), 0)
    assert net.training
    second = counterfactual_scores(classifier, images(3).cpu(), images(3, seed=2).cpu(), 0)
    assert torch.equal(first.target_probability, second.target_probability)
