"""Values of coalitions and sampled Shapley values, of every implementation, against exact answers and the axioms."""

from __future__ import annotations

import itertools
import math

import cases
import pytest
import sizes
import torch
from torch import Tensor

from finecf import ops
from finecf.reference import shapley as twin

pytestmark = cases.every_implementation

FLOATS = (torch.float32, torch.float64)
each_size = pytest.mark.parametrize(("cells", "classes", "count"), sizes.SHAPLEY, ids=sizes.names(sizes.SHAPLEY))


def tolerance(game: dict, dtype: torch.dtype, value: str) -> float:
    """Rounding of a running sum over the cells, whose size bounds the logits; a probability moves by less than that."""
    cells = game["cell_logits"].shape[1]
    size = float(game["base_logits"].abs().max()) + cells**0.5 * float(game["cell_logits"].abs().max())
    return (4 if value == "prob" else 8) * torch.finfo(dtype).eps * max(1.0, size)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_size
def test_scores_match_their_definition(cells: int, classes: int, count: int, dtype: torch.dtype) -> None:
    game = cases.game(2, cells, classes, dtype)
    masks = torch.rand(count, cells, generator=cases.generator(1)).to(cases.DEVICE, dtype)
    for value in cases.VALUES:
        scores = ops.masked_class_scores(**game, masks=masks, value=value)
        exact = cases.exact_scores(**game, masks=masks, value=value)
        assert scores.dtype == dtype
        torch.testing.assert_close(scores.double(), exact, rtol=0, atol=tolerance(game, dtype, value))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("antithetic", [False, True], ids=["single", "pairs"])
@each_size
def test_tiles_match_the_twin_in_float64(
    cells: int, classes: int, count: int, antithetic: bool, dtype: torch.dtype
) -> None:
    game = cases.game(2, cells, classes, dtype)
    orders = cases.permutations(count, cells)
    exact_game = {name: each.double() if each.is_floating_point() else each for name, each in game.items()}
    for value in cases.VALUES:
        mean, squares = ops.permutation_shapley_tiles(**game, permutations=orders, value=value, antithetic=antithetic)
        exact, exact_squares = twin.permutation_shapley_tiles(
            **exact_game, permutations=orders, value=value, antithetic=antithetic
        )
        assert mean.shape == (2, math.ceil(count / 32), cells)
        assert mean.dtype == squares.dtype == torch.float64
        bound = tolerance(game, dtype, value)
        torch.testing.assert_close(mean, exact, rtol=0, atol=bound)
        # Each of at most 32 deviations is off by the bound at most, on both sides of the square.
        torch.testing.assert_close(squares.sqrt(), exact_squares.sqrt(), rtol=0, atol=bound * 32**0.5)


def test_twin_walks_as_told() -> None:
    """The oracle itself: marginals from the definition, one coalition at a time."""
    game = cases.game(1, 4, 3, torch.float64)
    orders = cases.permutations(5, 4)
    for value in cases.VALUES:
        samples = []
        for order in orders.tolist():
            walked = []
            for walk in (order, order[::-1]):
                masks = torch.tensor([[float(cell in walk[:steps]) for cell in range(4)] for steps in range(5)])
                steps = cases.exact_scores(**game, masks=masks.to(cases.DEVICE), value=value)[0].diff()
                walked.append(torch.stack([steps[walk.index(cell)] for cell in range(4)]))
            samples.append(torch.stack(walked).mean(0))
        result = ops.permutation_shapley(**game, permutations=orders, value=value)
        every = torch.stack(samples)
        torch.testing.assert_close(result.mean[0], every.mean(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(result.stderr[0], every.std(0) / 5**0.5, rtol=0, atol=1e-12)
        assert result.count == 5


def exact_shapley(game: dict, value: str) -> Tensor:
    """Shapley values [B,P] by the sum over all subsets, float64."""
    cells = game["cell_logits"].shape[1]
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=cells)), dtype=torch.float64, device=cases.DEVICE)
    scores = cases.exact_scores(**game, masks=masks, value=value)
    result = torch.zeros(game["cell_logits"].shape[:2], dtype=torch.float64, device=cases.DEVICE)
    for cell in range(cells):
        without = (masks[:, cell] == 0).nonzero().squeeze(1)
        joined = without + 2 ** (cells - 1 - cell)
        size = masks[without].sum(1)
        # |S|! (P - |S| - 1)! / P!
        weight = ((size + 1).lgamma() + (cells - size).lgamma() - math.lgamma(cells + 1)).exp()
        result[:, cell] = ((scores[:, joined] - scores[:, without]) * weight).sum(1)
    return result


@pytest.mark.parametrize("value", cases.VALUES)
@pytest.mark.parametrize("cells", [1, 2, 3, 6])
def test_all_permutations_give_the_exact_values(cells: int, value: str) -> None:
    game = cases.game(2, cells, 4, torch.float64)
    orders = torch.tensor(list(itertools.permutations(range(cells))), device=cases.DEVICE)
    result = ops.permutation_shapley(**game, permutations=orders, value=value, antithetic=False)
    torch.testing.assert_close(result.mean, exact_shapley(game, value), rtol=0, atol=1e-11)


def test_all_permutations_of_eight_cells() -> None:
    game = cases.game(1, 8, 3)
    orders = torch.tensor(list(itertools.permutations(range(8))), device=cases.DEVICE)
    half = orders[orders[:, 0] < orders[:, -1]]  # their reverses are the other half
    result = ops.permutation_shapley(**game, permutations=half)
    assert result.count == math.factorial(8) // 2
    torch.testing.assert_close(result.mean.double(), exact_shapley(game, "prob"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", cases.VALUES)
def test_efficiency_of_each_permutation(value: str) -> None:
    game = cases.game(3, 49, 33)
    ends = torch.stack([torch.zeros(49), torch.ones(49)]).to(cases.DEVICE)
    gain = cases.exact_scores(**game, masks=ends, value=value).diff(dim=1).squeeze(1)
    for order in cases.permutations(5, 49).split(1):
        mean, squares = ops.permutation_shapley_tiles(**game, permutations=order, value=value, antithetic=False)
        torch.testing.assert_close(mean[:, 0].sum(1), gain, rtol=0, atol=49 * tolerance(game, torch.float32, value))
        assert squares.count_nonzero() == 0


def test_equal_cells_share_equally() -> None:
    game = cases.game(2, 9, 20)
    game["cell_logits"][:, 6] = game["cell_logits"][:, 2]
    orders = cases.permutations(40, 9)
    swap = torch.arange(9, device=cases.DEVICE, dtype=torch.int32)
    swap[[2, 6]] = swap[[6, 2]]
    for value in cases.VALUES:
        both = torch.cat([orders, swap[orders.long()]])
        mean = ops.permutation_shapley(**game, permutations=both, value=value).mean
        torch.testing.assert_close(mean[:, 2], mean[:, 6], rtol=0, atol=tolerance(game, torch.float32, value))


def test_a_cell_that_changes_nothing_gets_nothing() -> None:
    game = cases.game(2, 9, 20)
    game["cell_logits"][:, 4] = 0
    for value in cases.VALUES:
        result = ops.permutation_shapley(**game, permutations=cases.permutations(33, 9), value=value)
        assert result.mean[:, 4].abs().max() <= tolerance(game, torch.float32, value)
        assert result.stderr[:, 4].abs().max() <= tolerance(game, torch.float32, value)


def test_additivity_over_classes() -> None:
    """The probabilities of all classes sum to 1, so their games sum to a constant one, whose values are 0."""
    game = cases.game(1, 9, 12)
    every = {name: each.expand(12, *each.shape[1:]) for name, each in game.items()}
    every["target"] = torch.arange(12, device=cases.DEVICE)
    mean = ops.permutation_shapley(**every, permutations=cases.permutations(33, 9)).mean
    assert mean.sum(0).abs().max() < 1e-6
    assert mean.abs().max() > 1e-2


def test_additive_games_have_their_closed_form() -> None:
    orders = cases.permutations(40, 49)
    game = cases.game(2, 49, 33)
    own = torch.stack([game["cell_logits"][image, :, target] for image, target in enumerate(game["target"])])
    closed = ops.permutation_shapley(**game, permutations=orders, value="logit")
    assert torch.equal(closed.mean, own)
    assert closed.stderr.count_nonzero() == 0
    walked, squares = ops.permutation_shapley_tiles(**game, permutations=orders, value="logit")
    bound = tolerance(game, torch.float32, "logit")
    torch.testing.assert_close(walked, own.double()[:, None].expand_as(walked), rtol=0, atol=bound)
    assert squares.max() <= 32 * bound**2
    # With two classes, log_odds is the difference of their logits.
    two = cases.game(2, 49, 2)
    difference = two["cell_logits"].diff(dim=2).squeeze(2) * (2 * two["target"][:, None] - 1)
    result = ops.permutation_shapley(**two, permutations=orders, value="log_odds")
    torch.testing.assert_close(result.mean, difference, rtol=0, atol=tolerance(two, torch.float32, "log_odds"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", cases.VALUES)
def test_logits_of_two_hundred(value: str, dtype: torch.dtype) -> None:
    """Whole numbers, so that every sum is exact and only the value itself can go wrong."""
    rng = cases.generator(3)
    game = {
        "cell_logits": (cases.integers(rng, 3, 4, 49, 33).to(dtype) - 1) * 200,
        "base_logits": (cases.integers(rng, 3, 4, 33).to(dtype) - 1) * 200,
        "target": torch.tensor([0, 5, 31, 32], device=cases.DEVICE),
    }
    orders = cases.permutations(33, 49)
    masks = cases.integers(rng, 2, 40, 49).to(dtype)
    scores = ops.masked_class_scores(**game, masks=masks, value=value)
    exact = cases.exact_scores(**game, masks=masks, value=value)
    # A log-sum-exp is off by its own last place where it cancels the target's logit; a probability has no such term.
    near = 1e-30 if value == "prob" else 4 * torch.finfo(dtype).eps * 49 * 200
    torch.testing.assert_close(scores.double(), exact, rtol=1e-6, atol=near)
    result = ops.permutation_shapley(**game, permutations=orders, value=value)
    full = {name: each.double() if each.is_floating_point() else each for name, each in game.items()}
    mean, _ = twin.permutation_shapley_tiles(**full, permutations=orders, value=value, antithetic=True)
    wanted = (mean[:, 0] * 32 + mean[:, 1]) / 33
    torch.testing.assert_close(result.mean.double(), wanted, rtol=2e-6, atol=max(near, 2e-7))
    assert result.stderr.isfinite().all()


@pytest.mark.parametrize("size", [200.0, 1e4, 1e25], ids=str)
@pytest.mark.parametrize("value", cases.VALUES)
def test_no_nan_at_any_size(value: str, size: float) -> None:
    rng = cases.generator(4)
    for classes in (2, 33):
        game = {
            "cell_logits": cases.normal(rng, 4, 7, classes, scale=size),
            "base_logits": cases.normal(rng, 4, classes, scale=size),
            "target": cases.integers(rng, classes, 4),
        }
        game["cell_logits"][0], game["base_logits"][0] = size, -size
        scores = ops.masked_class_scores(**game, masks=cases.integers(rng, 2, 9, 7).float(), value=value)
        result = ops.permutation_shapley(**game, permutations=cases.permutations(3, 7), value=value)
        assert scores.isfinite().all()
        assert result.mean.isfinite().all()
        assert result.stderr.isfinite().all()
        if value == "prob":
            assert scores.min() >= 0
            assert scores.max() <= 1


def test_a_class_that_is_hopeless_and_then_certain() -> None:
    """The target's log-odds go from -300 to +300 in the middle of the walk, and back: nothing may be lost."""
    cells = torch.zeros(1, 6, 3, device=cases.DEVICE)
    cells[0, 2, 1], cells[0, 4, 1] = 600.0, -600.0
    base = torch.tensor([[0.0, -300.0, 0.0]], device=cases.DEVICE)
    order = torch.tensor([[0, 1, 2, 3, 4, 5]], device=cases.DEVICE)
    target = torch.tensor([1], device=cases.DEVICE)
    mean, _ = ops.permutation_shapley_tiles(cells, base, order, target, "prob", False)
    assert mean[0, 0].tolist() == [0, 0, 1, 0, -1, 0]
    mean, _ = ops.permutation_shapley_tiles(cells, base, order, target, "log_prob", False)
    assert mean[0, 0].tolist() == pytest.approx([0, 0, 300 + math.log(2), 0, -300 - math.log(2), 0], abs=1e-4)


@pytest.mark.parametrize(
    ("dtype", "base", "first", "second"),
    [
        (torch.float32, -4.1, 89.0, -80.8),
        (torch.float32, 2.6, -87.3, 82.3),
        (torch.float64, -15.0, 714.0, -684.0),
        (torch.float64, 9.0, -708.5, 690.0),
    ],
)
def test_one_cell_moves_a_class_further_than_exp_reaches(
    dtype: torch.dtype, base: float, first: float, second: float
) -> None:
    """Every partial sum has an exponential, yet that of one cell alone over- or underflows: products of them must not
    be trusted."""
    game = {
        "cell_logits": torch.tensor([[[0.0, first], [0.0, second]]], dtype=dtype, device=cases.DEVICE),
        "base_logits": torch.tensor([[0.0, base]], dtype=dtype, device=cases.DEVICE),
        "target": torch.zeros(1, dtype=torch.int64, device=cases.DEVICE),
    }
    orders = torch.tensor([[0, 1], [1, 0]], device=cases.DEVICE)
    result = ops.permutation_shapley(**game, permutations=orders, antithetic=False)
    bound = 64 * torch.finfo(dtype).eps if dtype == torch.float64 else 1e-6  # the logits round to 4e-6
    torch.testing.assert_close(result.mean.double(), exact_shapley(game, "prob"), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    game = cases.game(3, 7, 33, dtype)
    orders = cases.permutations(33, 7)
    masks = torch.rand(5, 7, generator=cases.generator(1)).to(cases.DEVICE, dtype)
    views = {name: cases.strided(each) for name, each in game.items()}
    for value in cases.VALUES:
        plain = ops.masked_class_scores(**game, masks=masks, value=value)
        assert torch.equal(plain, ops.masked_class_scores(**views, masks=cases.strided(masks), value=value))
        plain = ops.permutation_shapley(**game, permutations=orders, value=value)
        other = ops.permutation_shapley(**views, permutations=cases.strided(orders), value=value)
        assert torch.equal(plain.mean, other.mean)
        assert torch.equal(plain.stderr, other.stderr)
    # One image, repeated without being copied.
    once = cases.game(1, 7, 33, dtype)
    repeated = {name: each.expand(3, *each.shape[1:]) for name, each in once.items()}
    one = ops.masked_class_scores(**once, masks=masks)
    assert torch.equal(ops.masked_class_scores(**repeated, masks=masks), one.expand(3, -1))


def test_images_do_not_mix() -> None:
    game = cases.game(5, 7, 33)
    orders = cases.permutations(33, 7)
    masks = torch.rand(5, 7, generator=cases.generator(1)).to(cases.DEVICE)
    scores = ops.masked_class_scores(**game, masks=masks)
    result = ops.permutation_shapley(**game, permutations=orders)
    for image in range(5):
        alone = {name: each[image : image + 1] for name, each in game.items()}
        assert torch.equal(scores[image], ops.masked_class_scores(**alone, masks=masks)[0])
        assert torch.equal(result.mean[image], ops.permutation_shapley(**alone, permutations=orders).mean[0])


@pytest.mark.parametrize("value", cases.VALUES)
def test_chunks_and_threads_give_the_same_bits(value: str) -> None:
    game = cases.game(2, 49, 33)
    orders = cases.permutations(100, 49)
    whole = ops.permutation_shapley(**game, permutations=orders, value=value)
    for threads, chunks in ((1, (64, 36)), (2, (32, 32, 36)), (3, (96, 4))):
        torch.set_num_threads(threads)
        state = None
        for chunk in orders.split(chunks):
            part = ops.permutation_shapley(**game, permutations=chunk, value=value, state=state)
            state = part.state
        assert torch.equal(part.mean, whole.mean)
        assert torch.equal(part.stderr, whole.stderr)
        assert part.count == whole.count == 100
        assert torch.equal(part.state.mean, whole.state.mean)
        assert torch.equal(part.state.squares, whole.state.squares)


def test_sampling_goes_on_at_any_count() -> None:
    game = cases.game(2, 9, 12, torch.float64)
    orders = cases.permutations(50, 9)
    whole = ops.permutation_shapley(**game, permutations=orders)
    first = ops.permutation_shapley(**game, permutations=orders[:7])
    rest = ops.permutation_shapley(**game, permutations=orders[7:], state=first.state)
    assert rest.count == 50
    torch.testing.assert_close(rest.mean, whole.mean, rtol=0, atol=1e-13)
    torch.testing.assert_close(rest.stderr, whole.stderr, rtol=0, atol=1e-13)
    nothing = ops.permutation_shapley(**game, permutations=orders[:0], state=whole.state)
    assert torch.equal(nothing.mean, whole.mean)
    assert nothing.count == 50


def test_standard_errors_tell_the_scatter() -> None:
    """Of 200 runs, about two thirds lie within one standard error of the exact value, and almost all within three."""
    game = cases.game(1, 6, 5)
    exact = exact_shapley(game, "prob")
    distance = []
    for seed in range(200):
        result = ops.permutation_shapley(**game, permutations=cases.permutations(40, 6, seed), antithetic=seed % 2 == 0)
        distance.append((result.mean - exact).abs() / result.stderr)
    within = torch.cat(distance)
    assert 0.6 < (within < 1).double().mean() < 0.76
    assert (within < 3).double().mean() > 0.985


@pytest.mark.parametrize("value", cases.VALUES)
def test_one_sample_has_no_standard_error(value: str) -> None:
    game = cases.game(2, 7, 5)
    result = ops.permutation_shapley(**game, permutations=cases.permutations(1, 7), value=value)
    assert result.count == 1
    assert torch.equal(result.stderr, torch.full((2, 7), math.inf, device=cases.DEVICE))
    assert result.mean.isfinite().all()


def test_a_pair_is_one_sample() -> None:
    game = cases.game(2, 7, 5, torch.float64)
    orders = cases.permutations(3, 7)
    pairs = ops.permutation_shapley(**game, permutations=orders, antithetic=True)
    single = ops.permutation_shapley(**game, permutations=torch.cat([orders, orders.flip(1)]), antithetic=False)
    assert (pairs.count, single.count) == (3, 6)
    torch.testing.assert_close(pairs.mean, single.mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(half: torch.dtype) -> None:
    game = cases.game(2, 7, 33)
    game |= {name: game[name].to(half) for name in ("cell_logits", "base_logits")}
    raised = {name: each.float() if each.is_floating_point() else each for name, each in game.items()}
    masks = cases.integers(cases.generator(0), 2, 5, 7).to(half)
    orders = cases.permutations(33, 7)
    for value in cases.VALUES:
        scores = ops.masked_class_scores(**game, masks=masks, value=value)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, ops.masked_class_scores(**raised, masks=masks.float(), value=value))
        result = ops.permutation_shapley(**game, permutations=orders, value=value)
        assert result.mean.dtype == result.stderr.dtype == torch.float32
        assert torch.equal(result.mean, ops.permutation_shapley(**raised, permutations=orders, value=value).mean)


def test_autocast_changes_nothing() -> None:
    game = cases.game(2, 49, 33)
    masks = torch.rand(5, 49, generator=cases.generator(1)).to(cases.DEVICE)
    plain = ops.masked_class_scores(**game, masks=masks)
    with torch.autocast(cases.DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(plain, ops.masked_class_scores(**game, masks=masks))


def test_empty_in_empty_out() -> None:
    game = cases.game(0, 7, 5)
    orders = cases.permutations(33, 7)
    assert ops.masked_class_scores(**game, masks=torch.ones(3, 7, device=cases.DEVICE)).shape == (0, 3)
    result = ops.permutation_shapley(**game, permutations=orders)
    assert result.mean.shape == result.stderr.shape == (0, 7)
    assert result.count == 33
    game = cases.game(2, 7, 5)
    assert ops.masked_class_scores(**game, masks=torch.ones(0, 7, device=cases.DEVICE)).shape == (2, 0)
    mean, squares = ops.permutation_shapley_tiles(**game, permutations=orders[:0])
    assert mean.shape == squares.shape == (2, 0, 7)
    # No cells: every mask is the base.
    alone = cases.game(2, 1, 5)
    alone["cell_logits"] = alone["cell_logits"][:, :0]
    scores = ops.masked_class_scores(**alone, masks=torch.ones(3, 0, device=cases.DEVICE))
    base = torch.softmax(alone["base_logits"], 1).gather(1, alone["target"][:, None])
    torch.testing.assert_close(scores, base.expand(2, 3))


def test_small_chunks_of_the_twin_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    game = cases.game(2, 7, 5, torch.float64)
    masks = torch.rand(20, 7, generator=cases.generator(1)).to(cases.DEVICE).double()
    orders = cases.permutations(40, 7)
    scores = twin.masked_class_scores(**game, masks=masks, value="prob")
    mean, squares = twin.permutation_shapley_tiles(**game, permutations=orders, value="prob", antithetic=True)
    monkeypatch.setattr(twin, "_CHUNK", 100)
    small = twin.masked_class_scores(**game, masks=masks, value="prob")
    torch.testing.assert_close(small, scores, rtol=0, atol=1e-15)
    small_mean, small_squares = twin.permutation_shapley_tiles(
        **game, permutations=orders, value="prob", antithetic=True
    )
    assert torch.equal(small_mean, mean)
    assert torch.equal(small_squares, squares)
