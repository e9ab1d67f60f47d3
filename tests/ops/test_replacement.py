"""Nearest candidates and replacements, of every implementation, against their definitions.

Where two pairs are nearly equal, rounding may choose either, so it is the loss of the chosen pair that is compared.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import cases
import pytest
import sizes
import torch
from torch import Tensor

from finecf import ops
from finecf.reference import replacement as twin

pytestmark = cases.every_implementation

FLOATS = (torch.float32, torch.float64)
each_size = pytest.mark.parametrize(("cells", "classes", "rows"), sizes.REPLACEMENT, ids=sizes.names(sizes.REPLACEMENT))


def check_best(arguments: dict[str, Any], result: ops.Replacement) -> None:
    """Every image's pair is permitted, its loss is as reported, and no permitted pair is better."""
    sim, cls = arguments.get("weight_sim", 1.0), arguments.get("weight_cls", 1.0)
    bound = rounding(arguments, arguments["logits"])
    for image, (cell, row, loss) in enumerate(zip(*(part.tolist() for part in result), strict=True)):
        used = None if arguments.get("used") is None else arguments["used"][image]
        pairs = cases.permitted(arguments, image, arguments["allowed"][image], used)
        if not pairs.any():
            assert (cell, row, loss) == (-1, -1, math.inf)
            continue
        assert pairs[cell, row]
        exact = cases.exact_losses(arguments, image, arguments["logits"][image], sim, cls)
        assert loss == pytest.approx(float(exact[cell, row]), rel=1e-6, abs=bound)
        assert exact[cell, row] <= exact[pairs].min() + bound


def rounding(arguments: dict[str, Any], *more: Tensor) -> float:
    weights = arguments.get("weight_sim", 1.0) + arguments.get("weight_cls", 1.0)
    return max(1.0, weights) * cases.rounding(arguments, *more)


def check_edits(arguments: dict[str, Any], result: ops.Replacements) -> None:
    """Each edit is the best there is given those before it, and the search ends when it should."""
    cells_of, rows_of, losses, path, n_edits, flipped = result
    batch, cells, _ = arguments["cell_logits"].shape
    bank = arguments["candidate_logits"]
    top = arguments.get("top_cells") or cells
    steps = cells if arguments.get("max_edits") is None else arguments["max_edits"]
    sim, cls = arguments.get("weight_sim", 1.0), arguments.get("weight_cls", 1.0)
    assert cells_of.shape == rows_of.shape == losses.shape == (batch, steps)
    assert path.shape == (batch, steps + 1, bank.shape[1])
    assert cells_of.dtype == rows_of.dtype == n_edits.dtype == torch.int64
    assert flipped.dtype == torch.bool
    bound = rounding(arguments, path)
    sums = arguments["base_logits"].double() + arguments["cell_logits"].double().sum(1)
    torch.testing.assert_close(path[:, 0].double(), sums, rtol=0, atol=cells * bound)
    for image in range(batch):
        target = int(arguments["target"][image])
        order = arguments["cell_scores"][image].sort(descending=True, stable=True).indices.tolist()
        used = torch.zeros(bank.shape[0], dtype=torch.bool, device=cases.DEVICE)
        edited: list[int] = []
        count = int(n_edits[image])
        for step in range(steps + 1):
            logits = path[image, step]
            open_cells = [cell for cell in order if cell not in edited][:top]
            allowed = torch.zeros(cells, dtype=torch.bool, device=cases.DEVICE)
            allowed[open_cells] = True
            pairs = cases.permitted(arguments, image, allowed, None if arguments.get("reuse_candidates") else used)
            if step == count:  # why did it end here?
                assert int(logits.argmax()) == target or not pairs.any() or step == steps
                break
            assert int(logits.argmax()) != target
            cell, row = int(cells_of[image, step]), int(rows_of[image, step])
            assert pairs[cell, row]
            exact = cases.exact_losses(arguments, image, logits, sim, cls)
            assert float(losses[image, step]) == pytest.approx(float(exact[cell, row]), rel=1e-6, abs=bound)
            assert exact[cell, row] <= exact[pairs].min() + bound
            after = logits.double() - arguments["cell_logits"][image, cell].double() + bank[row].double()
            torch.testing.assert_close(path[image, step + 1].double(), after, rtol=0, atol=bound)
            edited.append(cell)
            used[row] = True
        assert bool(flipped[image]) == (int(path[image, count].argmax()) == target)
        assert (cells_of[image, count:] == -1).all()
        assert (rows_of[image, count:] == -1).all()
        assert (losses[image, count:] == math.inf).all()
        assert torch.equal(path[image, count:], path[image, count].expand(steps + 1 - count, -1))


def assert_same_search(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    """The same choices; torch sums in another order where the strides differ, so the last place may differ."""
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-5 if mine.is_floating_point() else 0)


# ---- nearest_candidates


def exact_cosines(query: Tensor, bank: Tensor) -> Tensor:
    """[P,N] in float64; rows are scaled first, so that no length over- or underflows."""

    def unit(rows: Tensor) -> Tensor:
        rows = rows.double()
        rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(1e-300)
        return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)

    return unit(query) @ unit(bank).T


def check_nearest(query: Tensor, bank: Tensor, k: int, result: ops.Nearest) -> None:
    exact = exact_cosines(query, bank)
    bound = 32 * torch.finfo(query.dtype).eps
    assert result.cosine.shape == result.index.shape == (query.shape[0], k)
    assert result.index.dtype == torch.int64
    torch.testing.assert_close(result.cosine.double(), exact.gather(1, result.index), rtol=0, atol=bound)
    torch.testing.assert_close(result.cosine.double(), exact.topk(k).values, rtol=0, atol=bound)
    assert (result.cosine.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == k for row in result.index.tolist())


def test_a_row_is_never_nearer_to_itself_than_one() -> None:
    rows = cases.normal(cases.generator(3), 200, 2048).abs().bfloat16()
    assert float(ops.nearest_candidates(rows, rows, 1).cosine.max()) <= 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("cells", "channels", "rows"), sizes.NEAREST, ids=sizes.names(sizes.NEAREST))
def test_nearest_are_the_nearest(cells: int, channels: int, rows: int, dtype: torch.dtype) -> None:
    rng = cases.generator(0)
    query = cases.normal(rng, cells, channels, dtype=dtype)
    bank = cases.normal(rng, rows, channels, dtype=dtype)
    for k in sizes.kept(rows):
        check_nearest(query, bank, k, ops.nearest_candidates(query, bank, k))


def test_equal_cosines_come_in_the_order_of_the_bank() -> None:
    """Rows of sixteen signs have length 4, so their cosines are exact and many are equal."""
    rng = cases.generator(0)
    query = cases.integers(rng, 2, 9, 16).float() * 2 - 1
    bank = cases.integers(rng, 2, 500, 16).float() * 2 - 1
    exact = query @ bank.T / 16
    order = exact.sort(dim=1, descending=True, stable=True)
    for k in (1, 7, 50, 500):
        result = ops.nearest_candidates(query, bank, k)
        assert torch.equal(result.index, order.indices[:, :k])
        torch.testing.assert_close(result.cosine, order.values[:, :k], rtol=0, atol=1e-6)


def test_zero_rows_have_cosine_zero() -> None:
    rng = cases.generator(0)
    query = cases.normal(rng, 3, 16)
    query[1] = 0
    bank = cases.normal(rng, 20, 16)
    bank[[0, 7, 19]] = 0
    result = ops.nearest_candidates(query, bank, 20)
    assert torch.equal(result.cosine[1], torch.zeros(20, device=cases.DEVICE))
    assert result.index[1].tolist() == list(range(20))
    zero = (result.index == 0) | (result.index == 7) | (result.index == 19)
    assert (result.cosine[zero] == 0).all()
    check_nearest(query, bank, 20, result)
    nothing = ops.nearest_candidates(torch.zeros_like(query), torch.zeros_like(bank), 2)
    assert nothing.cosine.count_nonzero() == 0


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_cosines_do_not_depend_on_length(size: float) -> None:
    rng = cases.generator(0)
    query, bank = cases.normal(rng, 5, 33), cases.normal(rng, 97, 33)
    check_nearest(query, bank, 9, ops.nearest_candidates(query * size, bank, 9))
    check_nearest(query, bank, 9, ops.nearest_candidates(query, bank * size, 9))


def test_nearest_of_strided_half_and_empty() -> None:
    rng = cases.generator(0)
    query, bank = cases.normal(rng, 5, 33), cases.normal(rng, 97, 33)
    plain = ops.nearest_candidates(query, bank, 9)
    views = ops.nearest_candidates(cases.strided(query), cases.strided(bank), 9)
    assert torch.equal(plain.index, views.index)
    torch.testing.assert_close(plain.cosine, views.cosine, rtol=0, atol=1e-6)
    half = ops.nearest_candidates(query.half(), bank.half(), 9)
    raised = ops.nearest_candidates(query.half().float(), bank.half().float(), 9)
    assert half.cosine.dtype == torch.float32
    torch.testing.assert_close(half.cosine, raised.cosine, rtol=0, atol=1e-6)
    with torch.autocast(cases.DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(ops.nearest_candidates(query, bank, 9).cosine, plain.cosine)
    nothing = ops.nearest_candidates(query[:0], bank, 9)
    assert nothing.cosine.shape == nothing.index.shape == (0, 9)


# ---- best_replacement


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_size
def test_best_pair_is_the_best(cells: int, classes: int, rows: int, dtype: torch.dtype) -> None:
    arguments = cases.single(cases.search(2, cells, classes, rows, dtype=dtype))
    result = ops.best_replacement(**arguments)
    assert result.loss.dtype == dtype
    check_best(arguments, result)


@pytest.mark.parametrize("scale", sizes.SPREADS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_best_pair_at_any_spread(dtype: torch.dtype, scale: float) -> None:
    for seed in range(4):
        arguments = cases.single(cases.search(4, 7, 33, 97, scale=scale, dtype=dtype, seed=seed))
        check_best(arguments, ops.best_replacement(**arguments))


def test_products_that_lose_their_digits() -> None:
    """Every product of exponentials is near the smallest float32, the losses are not: a factorised sum alone is lost.

    After the edit the logits are (-g, -g, -u - v) with g about 100 and u + v on both sides of it, so the sum of the
    shifted exponentials is about e^-100 (a subnormal number, or 0) where its loss is log(1 + 2 e^(u + v - g)).
    """
    rng = cases.generator(7)
    for gap in (70.0, 85.0, 95.0, 100.0, 104.0, 120.0):
        u = torch.rand(5, 16, generator=rng) * 4 + gap / 2 - 2
        v = torch.rand(96, generator=rng) * 4 + gap / 2 - 2
        rest = torch.stack([torch.zeros_like(u), torch.full_like(u, -gap), -u], dim=2).to(cases.DEVICE)
        bank = torch.stack([torch.full_like(v, -gap), torch.zeros_like(v), -v], dim=1).to(cases.DEVICE)
        arguments = {
            "cell_logits": -rest,
            "candidate_logits": bank,
            "similarity": torch.rand(5, 16, 96, generator=rng).to(cases.DEVICE),
            "logits": torch.zeros(5, 3, device=cases.DEVICE),
            "target": torch.full((5,), 2, device=cases.DEVICE),
            "allowed": torch.ones(5, 16, dtype=torch.bool, device=cases.DEVICE),
            "candidate_range": torch.tensor([[0, 96]] * 5, device=cases.DEVICE),
        }
        for weight in (1.0, 0.0, 0.01):
            weighted = arguments | {"weight_sim": weight}
            check_best(weighted, ops.best_replacement(**weighted))
            single = {"logits", "allowed"}
            edits = {name: each for name, each in weighted.items() if name not in single} | {
                "base_logits": -arguments["cell_logits"].sum(1),
                "cell_scores": torch.zeros(5, 16, device=cases.DEVICE),
                "max_edits": 2,
            }
            check_edits(edits, ops.replace_until_flip(**edits))


@pytest.mark.parametrize("weights", sizes.WEIGHTS, ids=str)
def test_weights(weights: tuple[float, float]) -> None:
    arguments = cases.single(cases.search(3, 7, 33, 97, scale=4.0))
    arguments |= {"weight_sim": weights[0], "weight_cls": weights[1]}
    result = ops.best_replacement(**arguments)
    check_best(arguments, result)
    if weights == (0.0, 0.0):
        assert result.cell.tolist() == result.candidate.tolist() == [0, 0, 0]


def test_only_what_is_allowed() -> None:
    rng = cases.generator(2)
    arguments = cases.single(cases.search(6, 33, 17, 150))
    arguments["allowed"] = cases.integers(rng, 2, 6, 33).bool()
    arguments["allowed"][1] = False
    arguments["candidate_range"] = torch.tensor(
        [[0, 150], [0, 150], [40, 110], [50, 51], [30, 30], [149, 150]], device=cases.DEVICE
    )
    arguments["used"] = cases.integers(rng, 2, 6, 150).bool()
    arguments["used"][5] = True
    result = ops.best_replacement(**arguments)
    check_best(arguments, result)
    assert result.cell.tolist()[1] == result.cell.tolist()[4] == result.cell.tolist()[5] == -1
    # What may not be chosen must not be looked at either: with poor values there the answer stays.
    poor = {name: each.clone() for name, each in arguments.items()}
    poor["similarity"][2, :, :40] = 1e6
    poor["similarity"][2, :, 110:] = 1e6
    poor["similarity"].masked_fill_(~arguments["allowed"][:, :, None], 1e6)
    again = ops.best_replacement(**poor)
    assert torch.equal(again.cell[2], result.cell[2])
    assert torch.equal(again.candidate[2], result.candidate[2])
    assert torch.equal(again.loss[2], result.loss[2])


def test_shortlist() -> None:
    rng = cases.generator(5)
    arguments = cases.single(cases.search(4, 9, 33, 97))
    arguments["candidate_range"] = torch.tensor([[0, 97], [20, 70], [5, 5], [90, 97]], device=cases.DEVICE)
    for width in (0, 1, 5, 50):
        arguments["shortlist"] = cases.integers(
            rng, 130, 4, 9, width, low=-30
        )  # repeats, negative ones, too large ones
        check_best(arguments, ops.best_replacement(**arguments))
    whole = {name: each for name, each in arguments.items() if name != "shortlist"}
    plain = ops.best_replacement(**whole)
    every = torch.randperm(97, generator=rng).to(cases.DEVICE).expand(4, 9, -1)
    listed = ops.best_replacement(**whole, shortlist=every)
    assert torch.equal(plain.cell, listed.cell)
    assert torch.equal(plain.candidate, listed.candidate)
    torch.testing.assert_close(plain.loss, listed.loss, rtol=1e-6, atol=1e-5)
    narrow = ops.best_replacement(**whole, shortlist=every.to(torch.int32))
    assert torch.equal(narrow.candidate, listed.candidate)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_equal_takes_the_first(dtype: torch.dtype) -> None:
    arguments = cases.single(cases.search(3, 17, 33, 97, dtype=dtype))
    for name in ("cell_logits", "candidate_logits", "logits"):
        arguments[name].zero_()
    arguments["similarity"].fill_(0.5)
    arguments["candidate_range"] = torch.tensor([[0, 97], [50, 97], [96, 97]], device=cases.DEVICE)
    arguments["allowed"][1, :13] = False
    result = ops.best_replacement(**arguments)
    assert result.cell.tolist() == [0, 13, 0]
    assert result.candidate.tolist() == [0, 50, 96]
    torch.testing.assert_close(result.loss, torch.full((3,), 0.5 + math.log(33), dtype=dtype, device=cases.DEVICE))


@pytest.mark.parametrize("listed", [False, True], ids=["range", "shortlist"])
def test_equal_pairs_take_the_lowest_cell_then_candidate(listed: bool) -> None:
    """The best pair, copied to other cells and rows on both sides of every tile border, is found where it is lowest."""
    arguments = cases.single(cases.search(1, 49, 33, 200, seed=3))
    if listed:
        arguments["shortlist"] = torch.arange(200, device=cases.DEVICE).flip(0).expand(1, 49, -1)
    best = ops.best_replacement(**arguments)
    cell, row = int(best.cell), int(best.candidate)
    for cells, rows in itertools.product(
        [(0, 48), (7, 8), (3, 31, 32)], [(0, 199), (47, 48), (15, 63, 64, 128), (198,)]
    ):
        copied = {name: each.clone() for name, each in arguments.items()}
        for other in cells:
            copied["cell_logits"][0, other] = arguments["cell_logits"][0, cell]
            copied["similarity"][0, other] = arguments["similarity"][0, cell]
        for other in rows:
            copied["candidate_logits"][other] = arguments["candidate_logits"][row]
            copied["similarity"][0, :, other] = copied["similarity"][0, :, row]
        copied["allowed"][0, cell] = cell in cells
        result = ops.best_replacement(**copied)
        assert (int(result.cell), int(result.candidate)) == (cells[0], min(row, *rows))
        assert torch.equal(result.loss, best.loss)


@pytest.mark.parametrize("doubtful", [False, True], ids=["ties", "lost products"])
def test_more_pairs_to_settle_than_a_list_holds(doubtful: bool) -> None:
    """147,000 pairs of which none can be ruled out: all tie, or the product of each underflows."""
    arguments = cases.single(cases.search(1, 49, 5, 3000, scale=0.1))
    arguments["candidate_range"] = torch.tensor([[3, 2999]], device=cases.DEVICE)
    if doubtful:
        # Rows of cells and of candidates peak at different classes, 100 above the others.
        arguments["cell_logits"][..., 1] -= 100
        arguments["candidate_logits"][..., 2] += 100
        arguments["logits"] = arguments["cell_logits"][:, 7]
        check_best(arguments, ops.best_replacement(**arguments))
    else:
        arguments["similarity"].fill_(0.25)
        result = ops.best_replacement(**arguments, weight_cls=0.0)
        assert [part.item() for part in result] == [0, 3, 0.75]


def test_best_of_strided_half_and_autocast() -> None:
    arguments = cases.single(cases.search(3, 9, 33, 97))
    arguments["used"] = cases.integers(cases.generator(1), 2, 3, 97).bool()
    arguments["shortlist"] = cases.integers(cases.generator(1), 97, 3, 9, 40)
    for left_out in ("shortlist", "used"):
        given = {name: each for name, each in arguments.items() if name != left_out}
        plain = ops.best_replacement(**given)
        check_best(given, plain)
        assert_same_search(plain, ops.best_replacement(**{name: cases.strided(each) for name, each in given.items()}))
        with torch.autocast(cases.DEVICE.type, dtype=torch.bfloat16):
            assert_same_search(plain, ops.best_replacement(**given))
    half = {name: each.half() if each.is_floating_point() else each for name, each in arguments.items()}
    raised = {name: each.float() if each.is_floating_point() else each for name, each in half.items()}
    result = ops.best_replacement(**half)
    assert result.loss.dtype == torch.float32
    check_best(raised, result)


def test_best_of_nothing() -> None:
    result = ops.best_replacement(**cases.single(cases.search(0, 7, 5, 48)))
    assert [part.shape for part in result] == [(0,), (0,), (0,)]
    result = ops.best_replacement(**cases.single(cases.search(2, 7, 5, 0)))
    assert (result.cell.tolist(), result.candidate.tolist(), result.loss.tolist()) == (
        [-1] * 2,
        [-1] * 2,
        [math.inf] * 2,
    )


# ---- replace_until_flip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_size
def test_each_edit_is_the_best(cells: int, classes: int, rows: int, dtype: torch.dtype) -> None:
    arguments = cases.search(2, cells, classes, rows, scale=2 / cells**0.5, dtype=dtype)
    arguments["max_edits"] = 4
    result = ops.replace_until_flip(**arguments)
    assert result.losses.dtype == result.logits.dtype == dtype
    check_edits(arguments, result)


@pytest.mark.parametrize("scale", sizes.SPREADS, ids=str)
def test_edits_at_any_spread(scale: float) -> None:
    for seed in range(3):
        arguments = cases.search(3, 9, 33, 97, scale=scale, seed=seed)
        arguments["candidate_logits"][torch.arange(97), cases.integers(cases.generator(seed), 33, 97)] -= 2 * scale
        check_edits(arguments, ops.replace_until_flip(**arguments))


@pytest.mark.parametrize("options", sizes.SEARCH_OPTIONS, ids=str)
def test_options(options: dict[str, Any]) -> None:
    arguments = cases.search(4, 17, 20, 150, scale=0.5, seed=1) | options
    arguments["candidate_range"] = torch.tensor([[0, 150], [10, 80], [55, 58], [150, 150]], device=cases.DEVICE)
    result = ops.replace_until_flip(**arguments)
    check_edits(arguments, result)
    assert int(result.n_edits[3]) == 0
    if "reuse_candidates" not in options:
        assert int(result.n_edits[2]) <= 3


def test_edits_from_a_shortlist() -> None:
    rng = cases.generator(4)
    arguments = cases.search(4, 9, 20, 60, scale=0.7, seed=1)
    arguments["candidate_range"] = torch.tensor([[0, 60], [10, 40], [55, 58], [60, 60]], device=cases.DEVICE)
    for width in (0, 1, 8):
        arguments["shortlist"] = cases.integers(rng, 80, 4, 9, width, low=-10)
        check_edits(arguments, ops.replace_until_flip(**arguments))


def test_already_the_target() -> None:
    arguments = cases.search(3, 9, 20, 60)
    arguments["target"] = (arguments["base_logits"] + arguments["cell_logits"].sum(1)).argmax(1)
    result = ops.replace_until_flip(**arguments)
    assert result.n_edits.tolist() == [0, 0, 0]
    assert result.flipped.all()
    check_edits(arguments, result)


def test_a_tie_of_classes_goes_to_the_lowest() -> None:
    arguments = cases.search(2, 4, 3, 5)
    for name in ("cell_logits", "candidate_logits", "base_logits"):
        arguments[name].zero_()
    arguments["target"] = torch.tensor([0, 1], device=cases.DEVICE)
    result = ops.replace_until_flip(**arguments)
    assert result.flipped.tolist() == [True, False]
    assert result.n_edits.tolist() == [0, 4]


def test_equal_scores_and_equal_pairs_take_the_lowest() -> None:
    arguments = cases.search(1, 9, 3, 8)
    for name in ("cell_logits", "candidate_logits", "cell_scores"):
        arguments[name].zero_()
    arguments["similarity"].fill_(0.25)
    arguments["base_logits"] = torch.tensor([[5.0, 0.0, 0.0]], device=cases.DEVICE)
    arguments["target"] = torch.tensor([1], device=cases.DEVICE)
    arguments["candidate_range"] = torch.tensor([[2, 8]], device=cases.DEVICE)
    result = ops.replace_until_flip(**arguments, top_cells=3)
    assert result.cells.tolist() == [[0, 1, 2, 3, 4, 5, -1, -1, -1]]
    assert result.candidates.tolist() == [[2, 3, 4, 5, 6, 7, -1, -1, -1]]
    reused = ops.replace_until_flip(**arguments, top_cells=3, reuse_candidates=True)
    assert reused.cells.tolist() == [list(range(9))]
    assert reused.candidates.tolist() == [[2] * 9]
    assert not reused.flipped.any()


def test_edits_of_strided_and_half() -> None:
    arguments = cases.search(3, 9, 33, 97)
    plain = ops.replace_until_flip(**arguments)
    assert_same_search(plain, ops.replace_until_flip(**{name: cases.strided(each) for name, each in arguments.items()}))
    with torch.autocast(cases.DEVICE.type, dtype=torch.bfloat16):
        assert_same_search(plain, ops.replace_until_flip(**arguments))
    half = {name: each.bfloat16() if each.is_floating_point() else each for name, each in arguments.items()}
    raised = {name: each.float() if each.is_floating_point() else each for name, each in half.items()}
    result = ops.replace_until_flip(**half)
    assert result.logits.dtype == torch.float32
    check_edits(raised, result)


def test_searches_of_images_do_not_mix() -> None:
    arguments = cases.search(4, 25, 33, 97, scale=0.5)
    arguments["candidate_range"] = torch.tensor([[0, 97], [13, 40], [13, 14], [60, 90]], device=cases.DEVICE)
    together = ops.replace_until_flip(**arguments)
    for image in range(4):
        alone = {
            name: each if name == "candidate_logits" else each[image : image + 1] for name, each in arguments.items()
        }
        for one, all_of_them in zip(ops.replace_until_flip(**alone), together, strict=True):
            assert torch.equal(one[0], all_of_them[image])


def test_threads_give_the_same_bits(implementation: str) -> None:
    """But for the reference, whose matrix products are torch's: on some processors they are cut by thread."""
    arguments = cases.search(2, 49, 17, 300, scale=0.7) | {"max_edits": 4}
    rng = cases.generator(0)
    query, bank = cases.normal(rng, 9, 16), cases.normal(rng, 5000, 16)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((*ops.replace_until_flip(**arguments), *ops.nearest_candidates(query, bank, 5)))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            if implementation == "reference" and one.is_floating_point():
                torch.testing.assert_close(two, one, rtol=0, atol=2e-6)
            else:
                assert torch.equal(one, two)


def test_edits_of_nothing() -> None:
    result = ops.replace_until_flip(**cases.search(0, 7, 5, 48), max_edits=3)
    assert [tuple(part.shape) for part in result] == [(0, 3), (0, 3), (0, 3), (0, 4, 5), (0,), (0,)]
    arguments = cases.search(2, 7, 5, 0)
    check_edits(arguments, ops.replace_until_flip(**arguments))


# ---- the twins


def as_twin(arguments: dict[str, Any]) -> dict[str, Any]:
    cells = arguments["cell_logits"].shape[1]
    given = {"shortlist": None, "top_cells": cells, "max_edits": cells, "reuse_candidates": False}
    return given | {"weight_sim": 1.0, "weight_cls": 1.0} | arguments


@pytest.mark.parametrize("scale", [0.7, 8.0, 27.0], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_both_twins_agree(dtype: torch.dtype, scale: float) -> None:
    """The direct search is the oracle; the factorised one, which serves, makes the same edits."""
    for seed in range(3):
        arguments = as_twin(cases.search(2, 9, 33, 97, scale=scale, dtype=dtype, seed=seed))
        direct = twin.replace_until_flip(**arguments)
        factorised = twin.replace_until_flip_factorised(**arguments)
        assert torch.equal(direct[0], factorised[0])
        assert torch.equal(direct[1], factorised[1])
        torch.testing.assert_close(direct[2], factorised[2], rtol=1e-6, atol=cases.rounding(arguments))
        for one, two in zip(direct[3:], factorised[3:], strict=True):
            assert torch.equal(one, two)


def test_small_chunks_of_the_twins_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = as_twin(cases.search(2, 9, 33, 97, scale=2.0))
    listed = arguments | {"shortlist": cases.integers(cases.generator(0), 97, 2, 9, 20)}
    rng = cases.generator(0)
    query, bank = cases.normal(rng, 9, 17, dtype=torch.float64), cases.normal(rng, 97, 17, dtype=torch.float64)

    def results() -> list[Tensor]:
        searches = [twin.replace_until_flip, twin.replace_until_flip_factorised]
        edits = [part for search in searches for given in (arguments, listed) for part in search(**given)]
        return [*edits, twin.nearest_candidates(query, bank, 9)[1]]

    whole = results()
    monkeypatch.setattr(twin, "_CHUNK", 33 * 9 * 4)
    assert all(torch.equal(one, two) for one, two in zip(whole, results(), strict=True))
