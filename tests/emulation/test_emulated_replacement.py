"""The CUDA kernels of the `replacement` operators, on the host, against float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sizes
from emulation import float64

IMAGES = 2
each_size = pytest.mark.parametrize("size", sizes.REPLACEMENT, ids=sizes.names(sizes.REPLACEMENT))
VERSIONS = pytest.mark.parametrize("version", ["naive", "fast"])


def assert_same_bits(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- nearest_candidates ---------------------------------------------------------------------------------------------


def whole_numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Small integers: equal cosines are equal in float32 too, so that ties are ties."""
    return np.random.default_rng(seed).integers(-2, 3, size=shape).astype(np.float32)


def expected_neighbours(query: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    cosine = float64.cosines(query, bank).round(12)
    index = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosine, index, 1), index


@VERSIONS
@pytest.mark.parametrize("size", sizes.NEAREST, ids=sizes.names(sizes.NEAREST))
def test_nearest_against_float64(emulated: ModuleType, size: sizes.Nearest, version: str) -> None:
    query, bank = whole_numbers(size.cells, size.channels), whole_numbers(size.rows, size.channels, seed=1)
    bank[size.rows // 2] = 0
    exact = float64.cosines(query, bank)
    for k in sizes.kept(size.rows):
        want, _ = expected_neighbours(query, bank, k)
        first: tuple[np.ndarray, ...] = ()
        for seed in sizes.SEEDS:
            cosine, index = got = emulated.nearest_candidates(query, bank, k, emulated.Plan(version=version, seed=seed))
            if first:
                assert_same_bits(first, got)
                continue
            first = got
            np.testing.assert_allclose(cosine, want, rtol=0, atol=1e-6)
            # Rounding may order near-equal cosines differently: what counts is the value at the index, and that all
            # differ.
            np.testing.assert_allclose(np.take_along_axis(exact, index, 1), cosine, rtol=0, atol=1e-6)
            assert all(len(set(row)) == k for row in index.tolist())


@VERSIONS
def test_nearest_ties_go_to_the_lowest_row(emulated: ModuleType, version: str) -> None:
    bank = np.tile(np.eye(4, dtype=np.float32), (40, 1))
    bank[7] = 0
    query = np.eye(4, dtype=np.float32)[[1, 3]]
    _, index = emulated.nearest_candidates(query, bank, 50, emulated.Plan(version=version, seed=4))
    for chosen, row in zip(([1, 3]), index.tolist(), strict=True):
        alike = [n for n in range(160) if n % 4 == chosen and n != 7]
        rest = [n for n in range(160) if n not in alike]
        assert row == (alike + rest)[:50]


@VERSIONS
def test_zero_rows_have_cosine_zero(emulated: ModuleType, version: str) -> None:
    query = np.array([[0, 0], [1, 0]], np.float32)
    bank = np.array([[-1, 0], [0, 0], [-2, 0]], np.float32)
    cosine, index = emulated.nearest_candidates(query, bank, 3, emulated.Plan(version=version))
    np.testing.assert_array_equal(cosine, np.array([[0, 0, 0], [0, -1, -1]], np.float32))
    np.testing.assert_array_equal(index, [[0, 1, 2], [1, 0, 2]])


@pytest.mark.parametrize("k", [1, 40])
def test_chunks_of_the_bank_do_not_show(emulated: ModuleType, k: int) -> None:
    rng = np.random.default_rng(3)
    query, bank = (rng.normal(size=(rows, 20)).astype(np.float32) for rows in (5, 200))
    whole = emulated.nearest_candidates(query, bank, k, emulated.Plan())
    parts = emulated.nearest_candidates(query, bank, k, emulated.Plan(scratch=1, seed=9))
    assert emulated.kernels().count("cosine_tiles") == 4
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("convert", [np.float16, float64.bfloat16_bits], ids=["float16", "bfloat16"])
def test_nearest_in_half_precision(emulated: ModuleType, convert: Any) -> None:
    rng = np.random.default_rng(3)
    query, bank = (convert(rng.normal(size=(rows, 40)).astype(np.float32)) for rows in (5, 70))
    cosine, index = emulated.nearest_candidates(query, bank, 9, emulated.Plan())
    want = float64.cosines(query, bank)
    np.testing.assert_allclose(cosine, -np.sort(-want, axis=1)[:, :9], rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(want, index, 1), cosine, rtol=0, atol=1e-6)


# ---- the search -----------------------------------------------------------------------------------------------------


def problem(images: int, cells: int, classes: int, rows: int, scale: float = 1.0, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    start = rng.integers(0, rows // 4 + 1, images)
    return {
        "cell_logits": (rng.normal(size=(images, cells, classes)) * scale).astype(np.float32),
        "candidate_logits": (rng.normal(size=(rows, classes)) * scale).astype(np.float32),
        "similarity": rng.random((images, cells, rows)).astype(np.float32),
        "target": rng.integers(0, classes, images),
        "candidate_range": np.stack([start, rows - start // 2], 1),
        "shortlist": None,
        "weight_sim": 1.0,
        "weight_cls": 1.0,
    }


def start_logits(arguments: dict[str, Any], seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Base logits, and the logits before any edit."""
    cells = float64.widen(arguments["cell_logits"])
    base = np.random.default_rng(seed).normal(size=(cells.shape[0], cells.shape[2])).astype(np.float32)
    return base, (base + cells.sum(1)).astype(np.float32)


def best(
    emulated: ModuleType,
    arguments: dict[str, Any],
    logits: np.ndarray,
    allowed: np.ndarray,
    used: Any = None,
    **plan: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return emulated.best_replacement(**arguments, logits=logits, allowed=allowed, used=used, plan=emulated.Plan(**plan))


def check_choice(
    arguments: dict[str, Any], image: int, logits: np.ndarray, allowed: np.ndarray, used: Any, got: tuple[Any, ...]
) -> None:
    """The pair is allowed, its loss is right, and none is better by more than float32 shows."""
    cell, candidate, loss = (int(got[0]), int(got[1]), float(got[2]))
    exact = float64.losses(arguments, image, logits)
    exact[~allowed] = np.inf
    if used is not None:
        exact[:, used] = np.inf
    if not np.isfinite(exact).any():
        assert (cell, candidate, loss) == (-1, -1, np.inf)
        return
    # Decided in float64 from the same float32 inputs: only the order of the additions differs.
    assert exact[cell, candidate] == pytest.approx(exact.min(), rel=1e-12, abs=1e-12)
    assert loss == pytest.approx(exact[cell, candidate], rel=1e-6, abs=1e-6)


def check_best(emulated: ModuleType, arguments: dict[str, Any], version: str) -> None:
    """With and without candidates that are used up, and cells that are not allowed; the same bits in any order."""
    _, logits = start_logits(arguments)
    rng = np.random.default_rng(1)
    images, cells, rows = arguments["similarity"].shape
    allowed = rng.random((images, cells)) < 0.7
    allowed[0] = True
    for spent in (None, rng.random((images, rows)) < 0.2):
        got = best(emulated, arguments, logits, allowed, spent, version=version)
        for b in range(images):
            check_choice(arguments, b, logits[b], allowed[b], None if spent is None else spent[b], [x[b] for x in got])
        for seed in sizes.SEEDS[1:]:
            assert_same_bits(got, best(emulated, arguments, logits, allowed, spent, version=version, seed=seed))


@VERSIONS
@each_size
def test_best_against_float64(emulated: ModuleType, size: sizes.Replacement, version: str) -> None:
    check_best(emulated, problem(IMAGES, *size), version)


@VERSIONS
@pytest.mark.parametrize("scale", sizes.SPREADS)
def test_best_at_any_spread(emulated: ModuleType, scale: float, version: str) -> None:
    check_best(emulated, problem(3, 7, 33, 97, scale=scale), version)


@VERSIONS
@pytest.mark.parametrize("listed", [0, 1, 9])
def test_shortlist(emulated: ModuleType, listed: int, version: str) -> None:
    """Entries outside the range, negative or doubled are ignored; an empty list allows nothing."""
    arguments = problem(3, 7, 33, 40)
    arguments["shortlist"] = np.random.default_rng(2).integers(-3, 60, (3, 7, listed))
    _, logits = start_logits(arguments)
    allowed = np.ones((3, 7), bool)
    got = best(emulated, arguments, logits, allowed, version=version)
    assert ("score_shortlist" if version == "fast" else "score_pairs_naive") in emulated.kernels()
    for b in range(3):
        check_choice(arguments, b, logits[b], allowed[b], None, [x[b] for x in got])


@VERSIONS
def test_ties_go_to_the_lowest_cell_and_candidate(emulated: ModuleType, version: str) -> None:
    """All pairs alike, over several tiles; then all but the first ones taken away."""
    arguments = problem(1, 40, 33, 200)
    arguments["cell_logits"][:] = arguments["cell_logits"][:, :1]
    arguments["candidate_logits"][:] = arguments["candidate_logits"][:1]
    arguments["similarity"][:] = 0.5
    arguments["candidate_range"] = np.array([[3, 198]])
    _, logits = start_logits(arguments)
    for seed in range(3):
        allowed, used = np.ones((1, 40), bool), np.zeros((1, 200), bool)
        cell, candidate, _ = best(emulated, arguments, logits, allowed, used, version=version, seed=seed)
        assert (cell[0], candidate[0]) == (0, 3)
        allowed[:, :35], used[:, :150] = False, True
        cell, candidate, _ = best(emulated, arguments, logits, allowed, used, version=version, seed=seed)
        assert (cell[0], candidate[0]) == (35, 150)


def test_versions_agree_to_the_last_bit(emulated: ModuleType) -> None:
    """The factorised form rules out, it decides nothing: the fast version must find the very pair of the naive one."""
    for scale in (0.1, 3.0, 27.0, 90.0):
        for seed in range(4):
            arguments = problem(2, 33, 40, 100, scale=scale, seed=seed)
            _, logits = start_logits(arguments, seed)
            allowed = np.ones((2, 33), bool)
            naive = best(emulated, arguments, logits, allowed, version="naive")
            fast = best(emulated, arguments, logits, allowed, version="fast", seed=seed)
            for a, b in zip(naive, fast, strict=True):
                np.testing.assert_array_equal(a, b)


@VERSIONS
def test_nothing_allowed(emulated: ModuleType, version: str) -> None:
    arguments = problem(3, 7, 5, 20)
    arguments["candidate_range"][1] = [9, 9]
    _, logits = start_logits(arguments)
    allowed, used = np.ones((3, 7), bool), np.zeros((3, 20), bool)
    allowed[0], used[2] = False, True
    cell, candidate, loss = best(emulated, arguments, logits, allowed, used, version=version)
    assert cell.tolist() == candidate.tolist() == [-1, -1, -1]
    assert (loss == np.inf).all()


@VERSIONS
@pytest.mark.parametrize("weights", sizes.WEIGHTS, ids=str)
def test_weights(emulated: ModuleType, weights: tuple[float, float], version: str) -> None:
    chosen = dict(zip(("weight_sim", "weight_cls"), weights, strict=True))
    check_best(emulated, problem(1, 33, 12, 70, scale=20) | chosen, version)


@VERSIONS
@pytest.mark.parametrize("convert", [np.float16, float64.bfloat16_bits], ids=["float16", "bfloat16"])
def test_best_in_half_precision(emulated: ModuleType, convert: Any, version: str) -> None:
    arguments = problem(2, 7, 33, 70)
    for name in ("cell_logits", "candidate_logits", "similarity"):
        arguments[name] = convert(arguments[name])
    _, logits = start_logits(arguments)
    allowed = np.ones((2, 7), bool)
    got = best(emulated, arguments, logits, allowed, version=version)
    for b in range(2):
        check_choice(arguments, b, logits[b], allowed[b], None, [x[b] for x in got])


# ---- replace_until_flip ---------------------------------------------------------------------------------------------


def search(
    emulated: ModuleType, arguments: dict[str, Any], scores: np.ndarray, top: int, edits: int, reuse: bool, **plan: Any
) -> tuple[np.ndarray, ...]:
    base, _ = start_logits(arguments)
    return emulated.replace_until_flip(
        **arguments,
        base_logits=base,
        cell_scores=scores,
        top_cells=top,
        max_edits=edits,
        reuse_candidates=reuse,
        plan=emulated.Plan(**plan),
    )


def check_search(arguments: dict[str, Any], scores: np.ndarray, top: int, edits: int, reuse: bool, got: Any) -> None:
    """Every edit is the best given those before it, and the search ends where it must."""
    cells, candidates, losses, path, n_edits, flipped = got
    cell_logits, candidate_logits = (
        float64.widen(arguments["cell_logits"]),
        float64.widen(arguments["candidate_logits"]),
    )
    _, start = start_logits(arguments)
    for b in range(path.shape[0]):
        np.testing.assert_allclose(path[b, 0], start[b], rtol=2e-6, atol=1e-5)
        order = np.argsort(-scores[b], kind="stable")
        used = np.zeros(candidate_logits.shape[0], bool)
        edited: list[int] = []
        for t in range(int(n_edits[b])):
            assert path[b, t].argmax() != arguments["target"][b]
            allowed = np.zeros(cell_logits.shape[1], bool)
            allowed[[p for p in order if p not in edited][:top]] = True
            choice = cells[b, t], candidates[b, t], losses[b, t]
            assert choice[0] >= 0
            check_choice(arguments, b, path[b, t], allowed, None if reuse else used, choice)
            edited.append(int(choice[0]))
            used[choice[1]] = True
            after = path[b, t] - cell_logits[b, choice[0]] + candidate_logits[choice[1]]
            np.testing.assert_allclose(path[b, t + 1], after, rtol=1e-6, atol=1e-6 * (1 + np.abs(path[b]).max()))
        end = int(n_edits[b])
        assert flipped[b] == (path[b, end].argmax() == arguments["target"][b])
        assert (path[b, end:] == path[b, end]).all()
        assert (cells[b, end:] == -1).all()
        assert (candidates[b, end:] == -1).all()
        assert (losses[b, end:] == np.inf).all()
        if end < edits and not flipped[b]:
            left = [p for p in order if p not in edited][:top]
            exact = float64.losses(arguments, b, path[b, end])[left]
            assert not np.isfinite(exact[:, ~used] if not reuse else exact).any()


def check_searches(
    emulated: ModuleType, arguments: dict[str, Any], top: int, edits: int, reuse: bool, version: str
) -> None:
    """Scores with ties; the same bits in any order of threads."""
    scores = np.random.default_rng(4).integers(0, 5, arguments["similarity"].shape[:2]).astype(np.float32)
    got = search(emulated, arguments, scores, top, edits, reuse, version=version)
    check_search(arguments, scores, top, edits, reuse, got)
    for seed in sizes.SEEDS[1:]:
        again = search(emulated, arguments, scores, top, edits, reuse, version=version, seed=seed)
        assert_same_bits(got, again)


@VERSIONS
@each_size
def test_search_against_float64(emulated: ModuleType, size: sizes.Replacement, version: str) -> None:
    arguments = problem(IMAGES, *size, scale=2 / size.cells**0.5, seed=sum(size))
    check_searches(emulated, arguments, min(20, size.cells), min(4, size.cells), False, version)


@VERSIONS
@pytest.mark.parametrize("options", sizes.SEARCH_OPTIONS, ids=str)
def test_search_options(emulated: ModuleType, options: dict[str, Any], version: str) -> None:
    arguments = problem(4, 17, 20, 150, scale=0.5, seed=1)
    arguments |= {name: value for name, value in options.items() if name.startswith("weight")}
    arguments["candidate_range"] = np.array([[0, 150], [10, 80], [55, 58], [150, 150]])
    top, edits = (min(17, options.get(name, 17)) for name in ("top_cells", "max_edits"))
    check_searches(emulated, arguments, top, edits, options.get("reuse_candidates", False), version)


@VERSIONS
def test_more_edits_than_candidates(emulated: ModuleType, version: str) -> None:
    check_searches(emulated, problem(4, 7, 5, 3, scale=0.5), 2, 7, False, version)


def test_search_with_shortlist(emulated: ModuleType) -> None:
    arguments = problem(2, 7, 12, 30, scale=0.5)
    arguments["shortlist"] = np.random.default_rng(2).integers(-3, 40, (2, 7, 6))
    scores = np.zeros((2, 7), np.float32)
    check_search(arguments, scores, 7, 6, False, search(emulated, arguments, scores, 7, 6, False))


def test_already_the_target(emulated: ModuleType) -> None:
    arguments = problem(2, 7, 12, 30)
    _, start = start_logits(arguments)
    arguments["target"] = start.argmax(1)
    _, _, _, path, n_edits, flipped = search(emulated, arguments, np.zeros((2, 7), np.float32), 7, 3, False)
    assert n_edits.tolist() == [0, 0]
    assert flipped.all()
    assert (path == path[:, :1]).all()


def test_equal_logits_are_the_lowest_class(emulated: ModuleType) -> None:
    """With all classes alike the prediction is class 0: an image that wants 0 has it, one that wants 1 has not."""
    arguments = problem(2, 3, 300, 5)
    arguments["cell_logits"][:] = 0
    arguments["candidate_logits"][:] = 0
    arguments["target"] = np.array([0, 1])
    base = np.zeros((2, 300), np.float32)
    options = {"top_cells": 3, "max_edits": 2, "reuse_candidates": True}
    scores = np.zeros((2, 3), np.float32)
    got = emulated.replace_until_flip(
        **arguments, base_logits=base, cell_scores=scores, **options, plan=emulated.Plan()
    )
    assert got[4].tolist() == [0, 2]
    assert got[5].tolist() == [True, False]


def test_thread_order_and_grid_do_not_show(emulated: ModuleType) -> None:
    arguments = problem(3, 33, 33, 130, scale=0.7)
    scores = np.random.default_rng(4).random((3, 33)).astype(np.float32)
    first = search(emulated, arguments, scores, 20, 4, False)
    for plan in ({"seed": 1}, {"seed": 2, "processors": 1}, {"seed": 3, "processors": 100}, {"version": "naive"}):
        for a, b in zip(first, search(emulated, arguments, scores, 20, 4, False, **plan), strict=True):
            np.testing.assert_array_equal(a, b)
