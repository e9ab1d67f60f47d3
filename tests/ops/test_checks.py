"""Bad arguments get a sentence: which argument, what was expected, what came, what to do."""

from __future__ import annotations

import math
import re
from typing import Any

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finecf import ops


def good_arguments() -> dict[str, dict[str, Any]]:
    rng = cases.generator(0)
    game, search = cases.game(2, 7, 5), cases.search(2, 7, 5, 48)
    single = cases.single(cases.search(2, 7, 5, 48))
    shortlist = cases.integers(rng, 48, 2, 7, 3)
    return {
        "masked_class_scores": game | {"masks": torch.ones(3, 7, device=cases.DEVICE)},
        "permutation_shapley_tiles": game | {"permutations": cases.permutations(3, 7)},
        "permutation_shapley": game | {"permutations": cases.permutations(3, 7)},
        "nearest_candidates": {"query": cases.normal(rng, 3, 6), "bank": cases.normal(rng, 9, 6), "k": 4},
        "best_replacement": single
        | {"shortlist": shortlist, "used": torch.zeros(2, 48, dtype=torch.bool, device=cases.DEVICE)},
        "replace_until_flip": search | {"shortlist": shortlist},
    }


def refusal(name: str, arguments: dict[str, Any]) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        getattr(ops, name)(**arguments)
    return str(caught.value)


ARGUMENTS = [
    (operator, name)
    for operator, arguments in good_arguments().items()
    for name, value in arguments.items()
    if isinstance(value, Tensor)
]
FLOATING = [(operator, name) for operator, name in ARGUMENTS if good_arguments()[operator][name].is_floating_point()]


def set_at(value: Tensor, place: float, number: float) -> Tensor:
    value = value.clone()
    value.view(-1)[int(place * (value.numel() - 1))] = number
    return value


def grown(value: Tensor, axis: int) -> Tensor:
    return torch.cat([value, value.narrow(axis, 0, 1)], axis)


@settings(max_examples=60, deadline=None)
@given(which=st.sampled_from(FLOATING), place=st.floats(0, 1), number=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_nan_and_infinity(which: tuple[str, str], place: float, number: float) -> None:
    operator, name = which
    arguments = good_arguments()[operator]
    arguments[name] = set_at(arguments[name], place, number)
    message = refusal(operator, arguments)
    assert message.startswith(f"finecf.ops.{operator}: {name} must be finite, got NaN or infinity in 1 of ")
    assert "; " in message


@settings(max_examples=60, deadline=None)
@given(which=st.sampled_from(ARGUMENTS), data=st.data())
def test_wrong_rank(which: tuple[str, str], data: st.DataObject) -> None:
    operator, name = which
    arguments = good_arguments()[operator]
    value = arguments[name]
    arguments[name] = data.draw(
        st.sampled_from([value[None], value[0], value.flatten()[0], value.flatten()[None, None]])
    )
    if arguments[name].ndim == value.ndim:
        return
    message = refusal(operator, arguments)
    came = re.escape(str([*arguments[name].shape]))
    assert re.match(rf"finecf\.ops\.{operator}: {name} must have shape \[.*\], got {came}; ", message)


@settings(max_examples=80, deadline=None)
@given(which=st.sampled_from(ARGUMENTS), data=st.data())
def test_sizes_that_do_not_fit(which: tuple[str, str], data: st.DataObject) -> None:
    operator, name = which
    arguments = good_arguments()[operator]
    axis = data.draw(st.integers(0, arguments[name].ndim - 1))
    free = {("masks", 0), ("permutations", 0), ("shortlist", 2), ("query", 0), ("bank", 0)}
    if (name, axis) in free:
        return
    arguments[name] = grown(arguments[name], axis)
    message = refusal(operator, arguments)
    assert re.match(rf"finecf\.ops\.{operator}: \w+ must have shape \[.*\] with .* = \d+.*, got \[.*\]; ", message)


@pytest.mark.parametrize(("operator", "name"), ARGUMENTS)
def test_wrong_kind(operator: str, name: str) -> None:
    arguments = good_arguments()[operator]
    value = arguments[name]
    arguments[name] = value.tolist()
    assert refusal(operator, arguments).startswith(f"finecf.ops.{operator}: {name} must be a tensor, got list; ")
    wrong = value.int() if value.is_floating_point() else value.double()
    arguments[name] = wrong
    message = refusal(operator, arguments)
    assert re.match(rf"finecf\.ops\.{operator}: {name} must hold .*, got torch\..*; use {name}\.", message)
    arguments[name] = torch.complex(value.double(), value.double())
    assert f"{name} must hold" in refusal(operator, arguments)
    arguments[name] = value.to_sparse()
    assert f"{name} must be a dense tensor" in refusal(operator, arguments)


@pytest.mark.parametrize(("operator", "name"), FLOATING)
def test_gradients_are_refused(operator: str, name: str) -> None:
    arguments = good_arguments()[operator]
    arguments[name] = arguments[name].requires_grad_()
    assert f"{name} requires grad" in refusal(operator, arguments)
    with torch.no_grad():
        assert f"use {name}.detach()" in refusal(operator, arguments)
    arguments[name] = arguments[name].detach()
    getattr(ops, operator)(**arguments)


@pytest.mark.parametrize(("operator", "name"), ARGUMENTS)
def test_devices_that_differ(operator: str, name: str) -> None:
    arguments = good_arguments()[operator]
    arguments[name] = arguments[name].to("meta")
    assert re.search(r"\w+ must be on .* like \w+, got .*; move it with", refusal(operator, arguments))


@pytest.mark.parametrize("operator", [name for name in good_arguments() if name != "nearest_candidates"])
@settings(max_examples=15, deadline=None)
@given(bad=st.one_of(st.integers(-(2**40), -1), st.integers(5, 2**40)))
def test_target_out_of_range(operator: str, bad: int) -> None:
    arguments = good_arguments()[operator]
    arguments["target"] = torch.tensor([1, bad], device=cases.DEVICE)
    assert f"target must lie in 0..4 (5 classes), got {bad}; " in refusal(operator, arguments)


def test_fewer_than_two_classes() -> None:
    for operator, arguments in good_arguments().items():
        if operator == "nearest_candidates":
            continue
        for name in ("cell_logits", "base_logits", "candidate_logits", "logits"):
            if name in arguments:
                arguments[name] = arguments[name][..., :1]
        assert "cell_logits must hold at least 2 classes, got 1; " in refusal(operator, arguments)


@pytest.mark.parametrize("operator", ["permutation_shapley", "permutation_shapley_tiles"])
@settings(max_examples=30, deadline=None)
@given(row=st.lists(st.integers(-3, 9), min_size=7, max_size=7).filter(lambda row: sorted(row) != list(range(7))))
def test_rows_that_are_no_permutation(operator: str, row: list[int]) -> None:
    arguments = good_arguments()[operator]
    arguments["permutations"][1] = torch.tensor(row)
    assert "permutations must hold each cell 0..6 once in every row" in refusal(operator, arguments)


def test_unknown_value() -> None:
    for operator in ("masked_class_scores", "permutation_shapley", "permutation_shapley_tiles"):
        message = refusal(operator, good_arguments()[operator] | {"value": "odds"})
        assert "value must be one of 'prob', 'log_prob', 'log_odds', 'logit', got 'odds'; " in message


def test_states_that_do_not_fit() -> None:
    arguments = good_arguments()["permutation_shapley"]
    nothing = arguments | {"permutations": arguments["permutations"][:0]}
    assert "permutations must hold at least one row, got 0; " in refusal("permutation_shapley", nothing)
    other = ops.permutation_shapley(**cases.game(2, 6, 5), permutations=cases.permutations(3, 6)).state
    assert "state.mean must have shape [B, P] with P = 7" in refusal(
        "permutation_shapley", arguments | {"state": other}
    )
    whole = ops.permutation_shapley(**arguments)
    assert "state must be the state of an earlier result" in refusal(
        "permutation_shapley", arguments | {"state": whole}
    )


@settings(max_examples=30, deadline=None)
@given(pair=st.tuples(st.integers(-60, 60), st.integers(-60, 60)).filter(lambda p: not 0 <= p[0] <= p[1] <= 48))
def test_candidate_range_out_of_bounds(pair: tuple[int, int]) -> None:
    for operator in ("best_replacement", "replace_until_flip"):
        arguments = good_arguments()[operator]
        arguments["candidate_range"] = torch.tensor([[0, 48], list(pair)], device=cases.DEVICE)
        message = refusal(operator, arguments)
        assert "candidate_range must hold pairs 0 <= start <= stop <= 48" in message
        assert f"got {list(pair)} for image 1; " in message


BAD_NUMBERS = [
    ("nearest_candidates", "k", [0, -1, 10, 2.0, True, None]),
    ("replace_until_flip", "top_cells", [0, -1, 1.5, True]),
    ("replace_until_flip", "max_edits", [-1, 1.5, True]),
    *[
        (operator, name, [-0.1, math.nan, math.inf, -math.inf, "1", None, True])
        for operator in ("best_replacement", "replace_until_flip")
        for name in ("weight_sim", "weight_cls")
    ],
]


@pytest.mark.parametrize(("operator", "name", "bad"), [(a, b, each) for a, b, bad in BAD_NUMBERS for each in bad])
def test_numbers_out_of_range(operator: str, name: str, bad: object) -> None:
    message = refusal(operator, good_arguments()[operator] | {name: bad})
    assert re.match(rf"finecf\.ops\.{operator}: {name} must be a (whole )?number (at least|from) .*, got .*; ", message)


def test_an_empty_bank_has_no_nearest() -> None:
    message = refusal("nearest_candidates", {"query": torch.ones(2, 3), "bank": torch.ones(0, 3), "k": 1})
    assert "bank must hold at least 1 rows, got 0" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_whose_sums_overflow(dtype: torch.dtype) -> None:
    for operator, arguments in good_arguments().items():
        if operator == "nearest_candidates":
            continue
        arguments["cell_logits"] = arguments["cell_logits"].to(dtype) * 1e37
        assert "must stay below 1e+30 in every sum over cells" in refusal(operator, arguments)


def test_mixed_precision_takes_the_wider() -> None:
    game = cases.game(2, 7, 5)
    masks = torch.rand(3, 7, generator=cases.generator(0), dtype=torch.float64).to(cases.DEVICE)
    scores = ops.masked_class_scores(**game, masks=masks)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, cases.exact_scores(**game, masks=masks, value="prob"), rtol=0, atol=1e-12)


def test_narrow_integers_serve() -> None:
    """Indices of any integer type: the answer is the one of int64."""
    for operator, arguments in good_arguments().items():
        expected = getattr(ops, operator)(**arguments)
        for change in (Tensor.int, Tensor.short):
            narrow = {
                name: change(each) if isinstance(each, Tensor) and each.dtype in (torch.int32, torch.int64) else each
                for name, each in arguments.items()
            }
            result = getattr(ops, operator)(**narrow)
            parts = (expected, result) if isinstance(expected, tuple) else ((expected,), (result,))
            assert all(torch.equal(one, two) for one, two in zip(*parts, strict=True) if isinstance(one, Tensor))


def test_arguments_are_left_alone() -> None:
    for operator, arguments in good_arguments().items():
        before = {name: each.clone() for name, each in arguments.items() if isinstance(each, Tensor)}
        getattr(ops, operator)(**arguments)
        assert all(torch.equal(arguments[name], each) for name, each in before.items())


def test_integers_too_large_for_the_kernels_are_refused() -> None:
    """2^32 would become the cell 0 when it is narrowed."""
    orders = torch.tensor([[0, 1, 2], [2, 1, 2**32]])
    game = cases.game(cells=3)
    with pytest.raises(ValueError, match=r"fit torch\.int32"):
        ops.permutation_shapley(**game, permutations=orders.to(cases.DEVICE))
