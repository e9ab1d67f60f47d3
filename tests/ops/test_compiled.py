"""What is asked of the compiled operators alone: registration, tracing, and the same bits however the work is cut."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from finecf import _native, ops

SAMPLES: dict[str, Callable[[], list[tuple[Any, ...]]]] = {}


def sample_inputs(operator: Callable[[], list[tuple[Any, ...]]]) -> Callable[[], list[tuple[Any, ...]]]:
    SAMPLES[operator.__name__] = operator
    return operator


@sample_inputs
def masked_class_scores() -> list[tuple[Any, ...]]:
    game = tuple(cases.game().values())
    masks = torch.rand(3, 7, generator=cases.generator(0)).to(cases.DEVICE)
    return [(*game[:2], masks, game[2], value) for value in cases.VALUES]


@sample_inputs
def permutation_shapley_tiles() -> list[tuple[Any, ...]]:
    game = tuple(cases.game().values())
    return [(*game[:2], cases.permutations(33, 7), game[2], value, value != "prob") for value in cases.VALUES]


@sample_inputs
def nearest_candidates() -> list[tuple[Any, ...]]:
    rng = cases.generator(0)
    return [(cases.normal(rng, 3, 17), cases.normal(rng, 50, 17), k) for k in (1, 5)]


@sample_inputs
def best_replacement() -> list[tuple[Any, ...]]:
    arguments = tuple(cases.single(cases.search()).values())
    shortlist = cases.integers(cases.generator(0), 48, 2, 7, 5)
    used = cases.integers(cases.generator(0), 2, 2, 48).bool()
    # The order of the schema: logits come before the target.
    cell_logits, candidate_logits, similarity, target, logits, allowed, candidate_range = arguments
    given = (cell_logits, candidate_logits, similarity, logits, target, allowed, candidate_range)
    return [(*given, None, None, 1.0, 1.0), (*given, shortlist, used, 0.5, 2.0)]


@sample_inputs
def replace_until_flip() -> list[tuple[Any, ...]]:
    arguments = tuple(cases.search().values())
    shortlist = cases.integers(cases.generator(0), 48, 2, 7, 5)
    return [(*arguments, None, 7, 3, False, 1.0, 1.0), (*arguments, shortlist, 2, 0, True, 1.0, 1.0)]


@sample_inputs
def submodular_gains() -> list[tuple[Any, ...]]:
    inputs = cases.gains()
    first = [inputs[name] for name in ("insertion_logits", "deletion_logits", "image", "candidate")]
    rest = [inputs[name] for name in ("distance", "running_min", "selected", "target", "weights")]
    given = inputs["distance"][0, 0, 0].expand(len(inputs["image"])).clone()
    return [
        (*first, *rest, "entropy", None, None, True),
        (first[0], None, *first[2:], *rest, "evidential", given, given, False),
    ]


@sample_inputs
def compose_regions() -> list[tuple[Any, ...]]:
    images, labels, image, keep, baseline = cases.composition().values()
    return [
        (images, labels, image, keep, baseline, True, False),
        (images, labels, image, keep, baseline[0, :, 0, 0].clone(), False, False),
        (images, labels, image, keep, baseline, True, True),
    ]


@sample_inputs
def rank_masks() -> list[tuple[Any, ...]]:
    images, labels, image, _, baseline = cases.composition().values()
    threshold = torch.arange(len(image), dtype=torch.int32, device=cases.DEVICE)
    return [(images, labels, image, threshold, baseline, insert) for insert in (True, False)]


def test_every_operator_has_samples() -> None:
    assert set(SAMPLES) == set(_native.OPERATORS)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    """Schema (no argument is changed or returned), fake kernel, and tracing with fixed and with unknown sizes."""
    for arguments in SAMPLES[name]():
        torch.library.opcheck(getattr(torch.ops.finecf, name).default, arguments)


@pytest.mark.parametrize("name", SAMPLES)
def test_public_functions_trace_whole(name: str) -> None:
    function = getattr(ops, name)
    traced = torch.compile(function, backend="aot_eager", fullgraph=True)
    for arguments in SAMPLES[name]():
        expected, result = function(*arguments), traced(*arguments)
        if isinstance(expected, Tensor):
            expected, result = (expected,), (result,)
        assert all(torch.equal(one, two) for one, two in zip(expected, result, strict=True))


def test_permutation_shapley_traces_whole() -> None:
    traced = torch.compile(ops.permutation_shapley, backend="aot_eager", fullgraph=True)
    game, orders = cases.game(), cases.permutations(70, 7)
    first = ops.permutation_shapley(**game, permutations=orders[:32])
    for value in ("prob", "logit"):
        expected = ops.permutation_shapley(**game, permutations=orders, value=value)
        result = traced(**game, permutations=orders, value=value)
        assert torch.equal(expected.mean, result.mean)
        assert torch.equal(expected.stderr, result.stderr)
    result = traced(**game, permutations=orders[32:], state=first.state)
    assert result.count == 70
    assert torch.equal(result.mean, ops.permutation_shapley(**game, permutations=orders).mean)


@cases.compiled_implementations
@pytest.mark.parametrize("value", cases.VALUES)
def test_masks_in_chunks_on_any_number_of_threads_give_the_same_bits(value: str) -> None:
    game = cases.game(2, 49, 200)
    masks = torch.rand(100, 49, generator=cases.generator(0)).to(cases.DEVICE)
    whole = ops.masked_class_scores(**game, masks=masks, value=value)
    for threads, rows in ((1, 1), (2, 7), (3, 64)):
        torch.set_num_threads(threads)
        parts = [ops.masked_class_scores(**game, masks=part, value=value) for part in masks.split(rows)]
        assert torch.equal(torch.cat(parts, 1), whole)


@cases.compiled_implementations
def test_strides_give_the_same_bits() -> None:
    arguments = cases.search(3, 9, 33, 97)
    plain = ops.replace_until_flip(**arguments)
    views = ops.replace_until_flip(**{name: cases.strided(each) for name, each in arguments.items()})
    assert all(torch.equal(one, two) for one, two in zip(plain, views, strict=True))
    rng = cases.generator(0)
    query, bank = cases.normal(rng, 5, 33), cases.normal(rng, 97, 33)
    near = ops.nearest_candidates(query, bank, 9)
    views = ops.nearest_candidates(cases.strided(query), cases.strided(bank), 9)
    assert torch.equal(near.cosine, views.cosine)


@cases.compiled_implementations
def test_the_bank_in_chunks_gives_the_same_choice() -> None:
    """The best of the parts' best is the best of the whole, to the bit."""
    arguments = cases.single(cases.search(1, 49, 33, 1000))
    whole = ops.best_replacement(**arguments)
    parts = []
    for start in range(0, 1000, 300):
        arguments["candidate_range"] = torch.tensor([[start, min(start + 300, 1000)]], device=cases.DEVICE)
        parts.append(ops.best_replacement(**arguments))
    best = min(parts, key=lambda part: (float(part.loss), int(part.cell), int(part.candidate)))
    assert all(torch.equal(one, two) for one, two in zip(best, whole, strict=True))
    rng = cases.generator(0)
    query, bank = cases.normal(rng, 9, 33), cases.normal(rng, 5000, 33)
    near = ops.nearest_candidates(query, bank, 5)
    cosines = torch.cat([ops.nearest_candidates(query, part, 5).cosine for part in bank.split(1234)], 1)
    assert torch.equal(cosines.sort(1, descending=True).values[:, :5], near.cosine)


@cases.compiled_implementations
def test_direct_calls_are_checked_too() -> None:
    """A call past the wrappers is refused, not read out of bounds."""
    game = cases.game()
    masks = torch.ones(3, 7, device=cases.DEVICE)
    call = torch.ops.finecf.masked_class_scores
    with pytest.raises(RuntimeError, match="masks"):
        call(game["cell_logits"], game["base_logits"], masks[:, 1:], game["target"], "prob")
    with pytest.raises(RuntimeError, match="value"):
        call(game["cell_logits"], game["base_logits"], masks, game["target"], "odds")
    if cases.DEVICE.type == "cuda":
        return  # values on the device are not looked at: that would wait for it
    with pytest.raises(RuntimeError, match="target"):
        call(game["cell_logits"], game["base_logits"], masks, game["target"] + 5, "prob")
    orders = cases.permutations(3, 7)
    orders[1, 2] = 7
    with pytest.raises(RuntimeError, match="permutations"):
        torch.ops.finecf.permutation_shapley_tiles(
            game["cell_logits"], game["base_logits"], orders, game["target"], "prob", True
        )


cpu_library = pytest.mark.skipif(
    not _native.cpu_isa_levels() or cases.DEVICE.type != "cpu", reason="needs the compiled CPU library"
)


@cpu_library
@cases.compiled_implementations
def test_panels_that_are_not_kept_give_the_same_bits(implementation: str) -> None:
    """A bank whose packed factors pass a limit is packed again, panel by panel, at every edit."""
    arguments = cases.search(batch=2, cells=13, classes=33, rows=500)
    set_limit = ctypes.CDLL(_native.build_info()["cpu"]["path"]).finecf_set_packed_limit
    set_limit.argtypes, set_limit.restype = [ctypes.c_int64], ctypes.c_int64
    kept = ops.replace_until_flip(**arguments)
    before = set_limit(0)
    try:
        again = ops.replace_until_flip(**arguments)
    finally:
        set_limit(before)
    assert before > 0
    assert int(kept.n_edits.max()) > 0
    assert all(torch.equal(one, two) for one, two in zip(kept, again, strict=True))


@cpu_library
@cases.compiled_implementations
def test_rows_without_a_cosine_are_refused() -> None:
    """Past the wrapper, rows that are not finite leave too few cosines to choose from: an error, not a wild read."""
    rng = cases.generator(0)
    query, bank = cases.normal(rng, 3, 17), cases.normal(rng, 50, 17)
    bank[7, 3] = torch.nan
    with pytest.raises(RuntimeError, match="finite"):
        torch.ops.finecf.nearest_candidates(query, bank, 50)
    query[1, 0] = torch.inf
    with pytest.raises(RuntimeError, match="query 1"):
        torch.ops.finecf.nearest_candidates(query, bank[8:], 1)


@cpu_library
@cases.compiled_implementations
def test_images_of_far_classes_search_as_if_alone() -> None:
    """Only panels of some image's candidates are packed; ranges meet, overlap, begin inside panels, or are empty."""
    arguments = cases.search(batch=6, cells=13, classes=33, rows=1000)
    arguments["candidate_range"] = torch.tensor([[5, 97], [950, 1000], [40, 200], [500, 500], [200, 330], [955, 999]])
    together = ops.replace_until_flip(**arguments)
    assert int(together.n_edits.max()) > 0
    for image in range(6):
        alone = {
            name: each if name == "candidate_logits" else each[image : image + 1] for name, each in arguments.items()
        }
        for mine, theirs in zip(ops.replace_until_flip(**alone), together, strict=True):
            assert torch.equal(mine[0], theirs[image])


def growth(call: Callable[[], Any]) -> float:
    """MiB by which `call` raises the largest resident size of this process."""

    def largest() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the largest so far
    except OSError:
        pytest.skip("this system does not tell the largest resident size")
    before = largest()
    call()
    return (largest() - before) / 1024


@cpu_library
@cases.compiled_implementations
def test_memory_stays_small_where_every_pair_is_a_tie() -> None:
    torch.set_num_threads(1)
    arguments = cases.single(cases.search(1, 49, 5, 40000))
    assert growth(lambda: ops.best_replacement(**arguments, weight_sim=0.0, weight_cls=0.0)) < 40  # of 2 million pairs


@cpu_library
@cases.compiled_implementations
def test_memory_stays_small_where_classes_are_far_apart() -> None:
    torch.set_num_threads(1)
    arguments = cases.single(cases.search(2, 2, 100, 100000))
    arguments["candidate_range"] = torch.tensor([[0, 600], [99400, 100000]])
    assert growth(lambda: ops.best_replacement(**arguments)) < 20  # 0.5 for the 1,200 rows, 40 for the whole bank
