"""The CUDA kernels of the `shapley` operators, on the host, against float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sizes
from emulation import float64
from emulation.unmapped import unmapped_entry
from sizes import VALUES

IMAGES = 2
each_size = pytest.mark.parametrize("size", sizes.SHAPLEY, ids=sizes.names(sizes.SHAPLEY))
VERSIONS = pytest.mark.parametrize("version", ["naive", "fast"])

SMALL = (2, 7, 33, 35)


def game(images: int, cells: int, classes: int, count: int, scale: float = 1.0, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "cell_logits": (rng.normal(size=(images, cells, classes)) * 3 * scale / cells**0.5).astype(np.float32),
        "base_logits": (rng.normal(size=(images, classes)) * scale).astype(np.float32),
        "target": rng.integers(0, classes, images),
        "masks": rng.normal(size=(count, cells)).astype(np.float32),
        "permutations": np.stack([rng.permutation(cells) for _ in range(count)]).astype(np.int32),
    }


def scores(emulated: ModuleType, g: dict[str, Any], value: str, **plan: Any) -> np.ndarray:
    arguments = (g["cell_logits"], g["base_logits"], g["masks"], g["target"], value)
    return emulated.masked_class_scores(*arguments, emulated.Plan(**plan))


def walk(
    emulated: ModuleType, g: dict[str, Any], value: str, antithetic: bool = True, **plan: Any
) -> tuple[np.ndarray, np.ndarray]:
    arguments = (g["cell_logits"], g["base_logits"], g["permutations"], g["target"], value, antithetic)
    return emulated.permutation_shapley_tiles(*arguments, emulated.Plan(**plan))


def expected_tiles(g: dict[str, Any], value: str, antithetic: bool = True) -> tuple[np.ndarray, np.ndarray]:
    arguments = (g["cell_logits"], g["base_logits"], g["permutations"], g["target"], value, antithetic)
    return float64.tiles(float64.samples(*arguments))


def expected_scores(g: dict[str, Any], value: str) -> np.ndarray:
    return float64.masked_class_scores(g["cell_logits"], g["base_logits"], g["masks"], g["target"], value)


def largest(g: dict[str, Any]) -> float:
    """Magnitude of the largest partial sum: what float32 rounding is relative to."""
    return 1 + np.abs(float64.widen(g["base_logits"])).max() + np.abs(float64.widen(g["cell_logits"])).sum(1).max()


@VERSIONS
@pytest.mark.parametrize("value", VALUES)
@each_size
def test_scores_against_float64(emulated: ModuleType, size: sizes.Shapley, value: str, version: str) -> None:
    g = game(IMAGES, *size)
    want = expected_scores(g, value)
    tolerance = 2e-6 if value == "prob" else 2e-6 * largest(g)
    for seed in sizes.SEEDS:
        got = scores(emulated, g, value, version=version, seed=seed)
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=tolerance)


@VERSIONS
@pytest.mark.parametrize("value", VALUES)
@each_size
def test_walks_against_float64(emulated: ModuleType, size: sizes.Shapley, value: str, version: str) -> None:
    g = game(IMAGES, *size)
    want_mean, want_m2 = expected_tiles(g, value)
    error = 2e-6 if value == "prob" else 1e-6 * largest(g)
    spread = np.sqrt(want_m2.max() * 32)
    for seed in sizes.SEEDS:
        mean, m2 = walk(emulated, g, value, version=version, seed=seed)
        np.testing.assert_allclose(mean, want_mean, rtol=0, atol=error)
        np.testing.assert_allclose(m2, want_m2, rtol=0, atol=2 * error * spread + 32 * error**2)


@pytest.mark.parametrize("value", VALUES)
def test_walks_without_antithetic_pairs(emulated: ModuleType, value: str) -> None:
    g = game(*SMALL)
    mean, m2 = walk(emulated, g, value, antithetic=False)
    want_mean, want_m2 = expected_tiles(g, value, antithetic=False)
    np.testing.assert_allclose(mean, want_mean, rtol=0, atol=1e-5)
    np.testing.assert_allclose(m2, want_m2, rtol=0, atol=1e-4)


@VERSIONS
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("classes", [2, 33, 1025])
def test_extreme_logits(emulated: ModuleType, classes: int, value: str, version: str) -> None:
    """Single logits of +-200, sums of hundreds: exact 0 and 1 are right for prob, NaN and inf never."""
    g = game(1, 7, classes, 3, seed=5)
    g["cell_logits"] = np.where(g["cell_logits"] > 0, 200, -200).astype(np.float32)
    g["masks"] = np.abs(np.sign(g["masks"] - 0.3))
    got, (mean, m2) = scores(emulated, g, value, version=version), walk(emulated, g, value, version=version)
    assert np.isfinite(got).all()
    assert np.isfinite(mean).all()
    assert np.isfinite(m2).all()
    tolerance = 1e-4 if value == "prob" else 1e-3
    np.testing.assert_allclose(got, expected_scores(g, value), rtol=1e-6, atol=tolerance)
    np.testing.assert_allclose(mean, expected_tiles(g, value)[0], rtol=1e-6, atol=tolerance)


def test_marginals_add_up_to_the_whole(emulated: ModuleType) -> None:
    g = game(2, 49, 65, 33)
    g["masks"] = np.stack([np.zeros(49), np.ones(49)]).astype(np.float32)
    for value in VALUES:
        ends = scores(emulated, g, value)
        mean, _ = walk(emulated, g, value)
        whole = np.broadcast_to((ends[:, 1] - ends[:, 0])[:, None], mean.shape[:2])
        np.testing.assert_allclose(mean.sum(2), whole, rtol=0, atol=2e-5)


def test_thread_order_does_not_show(emulated: ModuleType) -> None:
    g = game(2, 7, 300, 35)
    for value in ("prob", "log_odds"):
        first = scores(emulated, g, value), *walk(emulated, g, value)
        for seed in (1, 2, 3):
            for a, b in zip(
                first, (scores(emulated, g, value, seed=seed), *walk(emulated, g, value, seed=seed)), strict=True
            ):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", ["prob", "log_prob"])
def test_staging_and_chunks_do_not_show(emulated: ModuleType, value: str) -> None:
    """The same bits from shared memory or through L2, and with work cut into chunks."""
    g = game(1, 7, 40, 70)
    staged = walk(emulated, g, value, processors=1)
    assert "walk_permutations (staged)" in emulated.kernels()
    unstaged = walk(emulated, g, value, processors=1, shared_limit=8 * 40 * 4 - 1)
    assert "walk_permutations" in emulated.kernels()
    chunked = walk(emulated, g, value, scratch=1)
    assert emulated.kernels().count("reduce_marginals") == 3
    for mean, m2 in (unstaged, chunked):
        np.testing.assert_array_equal(mean, staged[0])
        np.testing.assert_array_equal(m2, staged[1])


def test_a_split_of_masks_does_not_show(emulated: ModuleType) -> None:
    g = game(2, 7, 33, 70)
    whole = scores(emulated, g, "prob")
    parts = [scores(emulated, g | {"masks": g["masks"][i : i + 11]}, "prob") for i in range(0, 70, 11)]
    np.testing.assert_array_equal(whole, np.concatenate(parts, 1))


@VERSIONS
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("convert", [np.float16, float64.bfloat16_bits], ids=["float16", "bfloat16"])
def test_half_precision_inputs(emulated: ModuleType, convert: Any, value: str, version: str) -> None:
    """Accumulated in float32: as exact as float32, of the values that the inputs hold."""
    g = game(*SMALL)
    g["cell_logits"] = convert(g["cell_logits"])
    got, (mean, _) = scores(emulated, g, value, version=version), walk(emulated, g, value, version=version)
    np.testing.assert_allclose(got, expected_scores(g, value), rtol=2e-6, atol=1e-5)
    np.testing.assert_allclose(mean, expected_tiles(g, value)[0], rtol=0, atol=1e-5)


def test_unknown_value_is_refused(emulated: ModuleType) -> None:
    with pytest.raises(RuntimeError, match='value must be "prob", "log_prob", "log_odds" or "logit", got "odds"'):
        scores(emulated, game(*SMALL), "odds")


def test_a_bad_access_is_an_error_that_says_where(emulated: ModuleType) -> None:
    g = game(*SMALL)
    g["permutations"][3, 2] = unmapped_entry(g["permutations"])
    where = r"kernel walk_permutations.*, block .*, thread .*: access to .* outside every array"
    with pytest.raises(RuntimeError, match=where):
        walk(emulated, g, "prob")
    assert np.isfinite(walk(emulated, game(*SMALL), "prob")[0]).all()
