"""The CUDA kernels of `submodular_gains`, on the host, against float64 sets."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sizes
from emulation import float64
from emulation.unmapped import unmapped_entry

VERSIONS = ["naive", "fast"]
CONFIDENCES = ["entropy", "evidential"]
IMAGES = (1, 3, 4, 5)
"""Below, at and above the border of a block, which picks the best of 4 images."""


def problem(rows: int, images: int, regions: int, classes: int, scale: float = 3.0, seed: int = 0) -> dict[str, Any]:
    """The last of several images has no row and the first no selected region; the diagonal is not to be read."""
    rng = np.random.default_rng(seed)
    distance = rng.uniform(0.1, 1, (images, regions, regions))
    distance[:, np.arange(regions), np.arange(regions)] = -1e9
    selected = rng.random((images, regions)) < 0.5
    selected[0] = False
    return {
        "insertion_logits": (rng.normal(size=(rows, classes)) * scale).astype(np.float32),
        "deletion_logits": (rng.normal(size=(rows, classes)) * scale).astype(np.float32),
        "image": rng.integers(0, max(images - 1, 1), rows),
        "candidate": rng.integers(0, regions, rows),
        "distance": distance,
        "running_min": nearest(distance, selected),
        "selected": selected,
        "target": rng.integers(0, classes, images),
        "weights": np.array([1.0, 2.0, 3.0, 0.5]),
        "confidence": "entropy",
        "consistency": None,
        "collaboration": None,
        "largest": True,
    }


def nearest(distance: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """The least distance [B, m] from each region to another selected one."""
    others = selected[:, None] & ~np.eye(distance.shape[1], dtype=bool)
    return np.where(others, distance, np.inf).min(2)


def run(emulated: ModuleType, p: dict[str, Any], **plan: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return emulated.submodular_gains(*p.values(), emulated.Plan(**plan))


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def expected_scores(p: dict[str, Any]) -> np.ndarray:
    """The terms [R, 4] by their definitions over whole sets."""
    logits = float64.widen(p["insertion_logits"])
    rows, classes = logits.shape
    wanted = (np.arange(rows), p["target"][p["image"]])
    kept = softmax(logits)
    scores = np.zeros((rows, 4))
    if p["confidence"] == "entropy":
        scores[:, 0] = 1 + (kept * np.log(kept + 1e-7)).sum(1) / math.log(classes)
    else:
        scores[:, 0] = 1 - classes / (np.exp(logits.clip(-10, 10)) + 1).sum(1)
    for row, (image, candidate) in enumerate(zip(p["image"], p["candidate"], strict=True)):
        members = {*np.flatnonzero(p["selected"][image]), candidate}
        for i in members if len(members) > 1 else ():
            scores[row, 1] += min(p["distance"][image, i, j] for j in members - {i})
    scores[:, 2] = kept[wanted] if p["consistency"] is None else p["consistency"]
    if p["collaboration"] is not None:
        scores[:, 3] = p["collaboration"]
    elif p["deletion_logits"] is not None:
        scores[:, 3] = 1 - softmax(float64.widen(p["deletion_logits"]))[wanted]
    return scores


def expected_best(p: dict[str, Any], totals: np.ndarray) -> list[int]:
    """By these totals: ties to the lowest candidate, then to the lowest row."""
    best = []
    for image in range(len(p["target"])):
        own = np.flatnonzero(p["image"] == image)
        sign = -1 if p["largest"] else 1
        keys = [(sign * totals[row], p["candidate"][row], row) for row in own]
        best.append(min(keys)[2] if keys else -1)
    return best


def check(emulated: ModuleType, p: dict[str, Any], **plan: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, total, best = run(emulated, p, **plan)
    np.testing.assert_allclose(scores, expected_scores(p), rtol=1e-12, atol=1e-13)
    counted = p["weights"] != 0
    np.testing.assert_allclose(total, scores[:, counted] @ p["weights"][counted], rtol=1e-14, atol=1e-15)
    assert best.tolist() == expected_best(p, total)
    return scores, total, best


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("size", sizes.SUBMODULAR, ids=sizes.names(sizes.SUBMODULAR))
def test_gains_against_float64(emulated: ModuleType, size: sizes.Gains, confidence: str, version: str) -> None:
    rows, regions, classes = size
    for images in IMAGES:
        p = problem(rows, images, regions, classes) | {"confidence": confidence}
        for seed in sizes.SEEDS:
            _, _, best = check(emulated, p | {"largest": seed != 1}, version=version, seed=seed)
            assert images == 1 or best[-1] == -1
    names = {"naive": ["score_rows_naive", "pick_best_naive"], "fast": ["score_rows", "pick_best"]}
    assert emulated.kernels() == names[version][rows == 0 :]


@pytest.mark.parametrize("version", VERSIONS)
def test_numbers_that_are_given_and_logits_that_are_not(emulated: ModuleType, version: str) -> None:
    p = problem(9, 3, 7, 33)
    rng = np.random.default_rng(1)
    without = p | {"deletion_logits": None}
    assert not check(emulated, without, version=version)[0][:, 3].any()
    given = {name: rng.normal(size=9) for name in ("consistency", "collaboration")}
    for name, numbers in given.items():
        check(emulated, p | {name: numbers}, version=version)
    both = check(emulated, without | given, version=version)[0]
    np.testing.assert_array_equal(both[:, 2:], np.stack([*given.values()], 1))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("rows", [2, 33, 100])
def test_ties_go_to_the_lowest_candidate_then_row(emulated: ModuleType, rows: int, version: str) -> None:
    for seed in sizes.SEEDS:
        rng = np.random.default_rng(seed)
        p = problem(rows, 3, 33, 2, seed=seed) | {"weights": np.array([0.0, 0.0, 1.0, 0.0]), "largest": seed != 1}
        p["consistency"] = rng.integers(0, 2, rows) / 4
        check(emulated, p, version=version, seed=seed)
        p["consistency"] = p["consistency"] * 0
        check(emulated, p, version=version, seed=seed)
        p["candidate"] = p["candidate"] * 0 + 3
        _, _, best = check(emulated, p, version=version, seed=seed)
        images = p["image"].tolist()
        assert best.tolist() == [images.index(b) if b in images else -1 for b in range(3)]


@pytest.mark.parametrize("version", VERSIONS)
def test_infinite_distances(emulated: ModuleType, version: str) -> None:
    """With a weight every total is +inf, a tie; without one the term is left out of the sum."""
    p = problem(9, 2, 7, 5)
    p["image"][:] = 1
    p["selected"][1] = np.arange(7) < 3
    p["distance"][:] = np.inf
    p["running_min"][:] = np.inf
    for largest in (True, False):
        _, total, best = run(emulated, p | {"largest": largest}, version=version)
        assert np.isposinf(total).all()
        assert best.tolist() == [-1, min(range(9), key=lambda row: (p["candidate"][row], row))]
    scores, total, _ = run(emulated, p | {"weights": np.array([1.0, 0.0, 1.0, 1.0])}, version=version)
    assert np.isposinf(scores[:, 1]).all()
    assert np.isfinite(total).all()


@pytest.mark.parametrize("version", VERSIONS)
def test_sets_of_one_and_candidates_that_are_selected(emulated: ModuleType, version: str) -> None:
    p = problem(14, 2, 7, 5)
    p["image"], p["candidate"] = np.arange(14) // 7, np.arange(14) % 7
    p["selected"][0], p["selected"][1] = np.arange(7) == 2, True
    p["running_min"] = nearest(p["distance"], p["selected"])
    scores, _, _ = check(emulated, p, version=version)
    assert scores[2, 1] == 0
    np.testing.assert_allclose(scores[7:, 1], scores[7, 1], rtol=1e-14)
    p["selected"][:] = False
    p["running_min"][:] = 5  # not looked at
    assert not check(emulated, p, version=version)[0][:, 1].any()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("size", [200.0, 1e30])
def test_extreme_logits(emulated: ModuleType, size: float, confidence: str, version: str) -> None:
    for classes in (2, 33):
        p = problem(9, 3, 7, classes) | {"confidence": confidence}
        for name in ("insertion_logits", "deletion_logits"):
            p[name] = np.where(p[name] > 0, size, -size).astype(np.float32)
        p["insertion_logits"][0] = -size
        scores, _, _ = check(emulated, p, version=version)
        assert np.isfinite(scores).all()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("convert", [np.float16, float64.bfloat16_bits], ids=["float16", "bfloat16"])
def test_half_precision_logits(emulated: ModuleType, convert: Any, version: str) -> None:
    """Exactly as the values that they hold."""
    p = problem(9, 3, 7, 33)
    p |= {name: convert(p[name]) for name in ("insertion_logits", "deletion_logits")}
    for confidence in CONFIDENCES:
        check(emulated, p | {"confidence": confidence}, version=version)


def test_thread_order_and_company_do_not_show(emulated: ModuleType) -> None:
    p = problem(33, 5, 40, 65)
    whole = run(emulated, p)
    for seed in (1, 2, 3):
        for one, other in zip(whole, run(emulated, p, seed=seed), strict=True):
            np.testing.assert_array_equal(one, other)
    for start in range(0, 33, 7):
        rows = slice(start, start + 7)
        part = p | {name: p[name][rows] for name in ("insertion_logits", "deletion_logits", "image", "candidate")}
        scores, total, _ = run(emulated, part)
        np.testing.assert_array_equal(scores, whole[0][rows])
        np.testing.assert_array_equal(total, whole[1][rows])


@pytest.mark.parametrize("version", VERSIONS)
def test_no_rows(emulated: ModuleType, version: str) -> None:
    scores, total, best = run(emulated, problem(0, 3, 7, 5), version=version)
    assert scores.shape == (0, 4)
    assert total.shape == (0,)
    assert best.tolist() == [-1, -1, -1]
    assert emulated.kernels() == ["pick_best" + ("_naive" if version == "naive" else "")]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["image", "candidate"])
def test_a_bad_access_is_an_error_that_says_where(emulated: ModuleType, name: str, version: str) -> None:
    p = problem(9, 3, 7, 5)
    p["selected"][:] = True
    p[name][5] = unmapped_entry(p[name])
    with pytest.raises(RuntimeError, match=r"kernel score_rows.*, block .*, thread .*: access to .* outside every arr"):
        run(emulated, p, version=version)
    check(emulated, problem(9, 3, 7, 5), version=version)


def test_arrays_that_do_not_fit_are_refused(emulated: ModuleType) -> None:
    p = problem(9, 3, 7, 5)
    with pytest.raises(ValueError, match=r"running_min must have shape \[3, 7\], got \[3, 6\]"):
        run(emulated, p | {"running_min": p["running_min"][:, 1:]})
    with pytest.raises(RuntimeError, match='confidence must be "entropy" or "evidential", got "margin"'):
        run(emulated, p | {"confidence": "margin"})
