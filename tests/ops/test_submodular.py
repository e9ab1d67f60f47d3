"""What SMDL's set function gains, of every implementation, against its definition over whole sets.

The oracle here knows sets alone: the effectiveness of a set is found from its distances, not from running minima.
"""

from __future__ import annotations

import math
import re
from typing import Any

import cases
import pytest
import sizes
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from finecf import _native, ops

pytestmark = cases.every_implementation

FLOATS = (torch.float32, torch.float64)
CONFIDENCES = ("entropy", "evidential")
ROWWISE = ("insertion_logits", "deletion_logits", "image", "candidate", "consistency", "collaboration")


def nearest(distance: Tensor, selected: Tensor) -> Tensor:
    """The least distance [B,m] from each region to another selected one."""
    own = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    return distance.masked_fill(~selected[:, None] | own, torch.inf).amin(2)


def problem(
    rows: int = 23,
    images: int = 3,
    regions: int = 7,
    classes: int = 5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """`cases.gains` with distances that differ by direction, and poison on the diagonal, which is not to be read."""
    gains: dict[str, Any] = cases.gains(rows, images, regions, classes, dtype, seed)
    gains["distance"] = cases.normal(cases.generator(seed + 1), images, regions, regions, dtype=torch.float64).abs()
    gains["distance"].diagonal(dim1=1, dim2=2).fill_(-1e9)
    gains["running_min"] = nearest(gains["distance"], gains["selected"])
    return gains


def effectiveness(distance: Tensor, chosen: list[int]) -> float:
    """sum_{i in S} min_{j in S, j != i} distance[i,j], of one image; 0 where S has one region."""
    if len(chosen) < 2:
        return 0.0
    among = distance[chosen][:, chosen].cpu().fill_diagonal_(math.inf)
    return math.fsum(among.amin(1).tolist())


def probabilities(logits: Tensor) -> Tensor:
    shares = (logits.double() - logits.double().amax(1, keepdim=True)).exp()
    return shares / shares.sum(1, keepdim=True)


def exact_scores(arguments: dict[str, Any]) -> Tensor:
    """The four terms [R,4] by their definitions."""
    logits, deletion = arguments["insertion_logits"].double(), arguments["deletion_logits"]
    rows, classes = logits.shape
    image, candidate = arguments["image"].tolist(), arguments["candidate"].tolist()
    selected = arguments["selected"].tolist()
    target = arguments["target"][arguments["image"].long()].long()[:, None]
    kept = probabilities(logits)
    if arguments.get("confidence", "entropy") == "entropy":
        confidence = 1 + (kept * (kept + 1e-7).log()).sum(1) / math.log(classes)
    else:
        confidence = 1 - classes / (1 + logits.clamp(-10, 10).exp()).sum(1)
    effects = []
    for r in range(rows):
        chosen = sorted({i for i, is_in in enumerate(selected[image[r]]) if is_in} | {candidate[r]})
        effects.append(effectiveness(arguments["distance"][image[r]], chosen))
    consistency = arguments.get("consistency")
    if consistency is None:
        consistency = kept.gather(1, target)[:, 0]
    collaboration = arguments.get("collaboration")
    if collaboration is None and deletion is None:
        collaboration = torch.zeros(rows, dtype=torch.float64, device=logits.device)
    elif collaboration is None:
        collaboration = 1 - probabilities(deletion).gather(1, target)[:, 0]
    columns = [confidence, torch.tensor(effects, dtype=torch.float64, device=logits.device), consistency, collaboration]
    return torch.stack([column.double() for column in columns], 1)


def exact_best(arguments: dict[str, Any], totals: Tensor) -> list[int]:
    """The best row of each image by these totals: ties to the lowest candidate, then to the lowest row."""
    sign = -1 if arguments.get("largest", True) else 1
    keys: dict[int, list[tuple[float, int, int]]] = {}
    columns = zip(arguments["image"].tolist(), totals.tolist(), arguments["candidate"].tolist(), strict=True)
    for row, (image, total, candidate) in enumerate(columns):
        keys.setdefault(image, []).append((sign * total, candidate, row))
    return [min(keys[image])[2] if image in keys else -1 for image in range(len(arguments["target"]))]


def check(arguments: dict[str, Any], rtol: float = 1e-12, atol: float = 1e-13) -> ops.Gains:
    """Scores as defined, totals as their weighted sum, and the best rows by these very totals."""
    result = ops.submodular_gains(**arguments)
    rows = len(arguments["image"])
    assert result.scores.shape == (rows, 4)
    assert result.total.shape == (rows,)
    assert result.scores.dtype == result.total.dtype == torch.float64
    assert result.best.dtype == torch.int64
    torch.testing.assert_close(result.scores, exact_scores(arguments), rtol=rtol, atol=atol)
    weights = torch.as_tensor(arguments.get("weights", [1.0] * 4), dtype=torch.float64)
    used = [i for i, weight in enumerate(weights.tolist()) if weight != 0]
    sums = result.scores[:, used] @ weights[used].to(result.scores.device)
    torch.testing.assert_close(result.total, sums, rtol=1e-14, atol=1e-15)
    assert result.best.tolist() == exact_best(arguments, result.total)
    return result


def same(one: ops.Gains, other: ops.Gains) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


# ---- the terms


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("size", sizes.SUBMODULAR, ids=sizes.names(sizes.SUBMODULAR))
def test_scores_match_their_definition(size: sizes.Gains, confidence: str, dtype: torch.dtype) -> None:
    rows, regions, classes = size
    for seed in range(2):
        arguments = problem(rows, 3, regions, classes, dtype, seed) | {"confidence": confidence}
        result = check(arguments | {"largest": seed == 0})
        assert result.best[2] == -1
        if rows == 0:
            assert result.best.tolist() == [-1, -1, -1]


def test_sets_of_none_one_and_all() -> None:
    """Effectiveness at both ends: a set of one region has none, whatever its running minima say."""
    arguments = problem(14, 2, 7, 5)
    arguments["image"] = torch.arange(14, device=cases.DEVICE) // 7
    arguments["candidate"] = torch.arange(14, device=cases.DEVICE) % 7
    arguments["selected"] = torch.zeros(2, 7, dtype=torch.bool, device=cases.DEVICE)
    for garbage in (math.inf, 3.0, -3.0):
        arguments["running_min"] = torch.full((2, 7), garbage, dtype=torch.float64, device=cases.DEVICE)
        assert check(arguments).scores[:, 1].tolist() == [0.0] * 14
    # One region: its nearest is the candidate, and the other way round.
    arguments["selected"][0, 3] = arguments["selected"][1, 0] = True
    arguments["running_min"] = nearest(arguments["distance"], arguments["selected"])
    assert arguments["running_min"][0, 3] == math.inf
    result = check(arguments)
    distance = arguments["distance"][0]
    assert result.scores[1, 1].item() == pytest.approx((distance[3, 1] + distance[1, 3]).item(), rel=1e-14)
    # All but the candidate.
    arguments["selected"] = torch.ones(2, 7, dtype=torch.bool, device=cases.DEVICE)
    arguments["image"], arguments["candidate"] = arguments["image"][6:8] * 1, torch.tensor([4, 2], device=cases.DEVICE)
    arguments["insertion_logits"] = arguments["insertion_logits"][:2]
    arguments["deletion_logits"] = arguments["deletion_logits"][:2]
    arguments["selected"][0, 4] = arguments["selected"][1, 2] = False
    arguments["running_min"] = nearest(arguments["distance"], arguments["selected"])
    assert check(arguments).scores[:, 1].min() > 0


def test_a_candidate_that_is_selected_already_changes_nothing() -> None:
    arguments = problem(14, 2, 7, 5)
    arguments["image"] = torch.arange(14, device=cases.DEVICE) // 7
    arguments["candidate"] = torch.arange(14, device=cases.DEVICE) % 7
    arguments["selected"] = torch.ones(2, 7, dtype=torch.bool, device=cases.DEVICE)
    arguments["selected"][1] = torch.arange(7, device=cases.DEVICE) == 2
    arguments["running_min"] = nearest(arguments["distance"], arguments["selected"])
    scores = check(arguments).scores
    whole = effectiveness(arguments["distance"][0], list(range(7)))
    assert scores[:7, 1].tolist() == pytest.approx([whole] * 7, rel=1e-14)
    assert scores[7 + 2, 1] == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("regions", [2, 9, 33])
def test_running_minima_give_the_sets_of_a_whole_greedy_chain(regions: int, seed: int) -> None:
    """Picks update the minima with their column of distances; at every step the scores and the pick are those of the
    definition over the set, and so is the order in which the regions come.
    """
    rng = cases.generator(seed)
    images, classes = 2, 4
    distance = cases.normal(rng, images, regions, regions, dtype=torch.float64).abs()
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)  # so that a pick is not the nearest to itself
    given_logits = cases.normal(rng, images, regions, classes, scale=2)
    target = cases.integers(rng, classes, images)
    selected = torch.zeros(images, regions, dtype=torch.bool, device=cases.DEVICE)
    running_min = torch.full((images, regions), torch.inf, dtype=torch.float64, device=cases.DEVICE)
    for _ in range(regions):
        image, candidate = (~selected).nonzero().unbind(1)
        arguments = {
            "insertion_logits": given_logits[image, candidate],
            "deletion_logits": None,
            "image": image,
            "candidate": candidate,
            "distance": distance,
            "running_min": running_min,
            "selected": selected,
            "target": target,
        }
        result = ops.submodular_gains(**arguments)
        exact = exact_scores(arguments)
        torch.testing.assert_close(result.scores, exact, rtol=1e-12, atol=1e-13)
        assert result.best.tolist() == exact_best(arguments, exact.sum(1))  # no two totals are nearly equal here
        for b, row in enumerate(result.best.tolist()):
            pick = int(candidate[row])
            assert int(image[row]) == b
            running_min[b] = torch.minimum(running_min[b], distance[b, :, pick])
            selected[b, pick] = True
    assert selected.all()
    torch.testing.assert_close(running_min, nearest(distance, selected), rtol=0, atol=0)


def test_without_deletion_logits_the_last_term_is_nothing() -> None:
    arguments = problem()
    result = check(arguments | {"deletion_logits": None})
    assert result.scores[:, 3].tolist() == [0.0] * 23
    assert torch.equal(result.scores[:, :3], ops.submodular_gains(**arguments).scores[:, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("deletion", [False, True], ids=["kept", "both"])
def test_numbers_that_are_given_are_taken(deletion: bool, dtype: torch.dtype) -> None:
    rng = cases.generator(2)
    arguments = problem()
    if not deletion:
        arguments["deletion_logits"] = None
    numbers = {name: cases.normal(rng, 23, dtype=dtype) for name in ("consistency", "collaboration")}
    for given_names in (["consistency"], ["collaboration"], ["consistency", "collaboration"]):
        scores = check(arguments | {name: numbers[name] for name in given_names}).scores
        if "consistency" in given_names:
            assert torch.equal(scores[:, 2], numbers["consistency"].double())
        if "collaboration" in given_names:
            assert torch.equal(scores[:, 3], numbers["collaboration"].double())


def test_terms_of_weight_zero_are_left_out() -> None:
    """An infinite distance must not make NaN of a sum that does not count it."""
    arguments = problem()
    arguments["distance"] = torch.full_like(arguments["distance"], torch.inf)
    arguments["selected"][:] = True
    arguments["selected"][:, 0] = False
    arguments["running_min"] = nearest(arguments["distance"], arguments["selected"])
    for left_out in ([1.0, 0.0, 2.0, 0.5], [0.0, 0.0, 0.0, 0.0]):
        arguments["weights"] = torch.tensor(left_out, dtype=torch.float64, device=cases.DEVICE)
        result = check(arguments)
        assert torch.equal(result.scores[:, 1], torch.full((23,), torch.inf, device=cases.DEVICE).double())
        assert result.total.isfinite().all()
    assert result.total.count_nonzero() == 0
    # Where it counts, every total is +inf: a tie, whichever end is asked for.
    arguments["weights"] = [1.0, 1.0, 1.0, 1.0]
    for largest in (True, False):
        result = ops.submodular_gains(**arguments, largest=largest)
        assert result.total.tolist() == [math.inf] * 23
        assert result.best.tolist() == exact_best(arguments, torch.zeros(23))


def test_weights_scale_their_own_term() -> None:
    arguments = problem()
    for term in range(4):
        weights = [0.0] * 4
        weights[term] = 0.25
        result = check(arguments | {"weights": weights})
        assert torch.equal(result.total, result.scores[:, term] * 0.25)
    alike = ops.submodular_gains(**arguments | {"weights": (1, 1, 1, 1)})
    del arguments["weights"]
    assert same(alike, check(arguments))


# ---- logits


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("size", [50.0, 200.0], ids=str)
def test_large_logits(size: float, confidence: str, dtype: torch.dtype) -> None:
    """Probabilities down to e^-400 keep their relative precision."""
    rng = cases.generator(3)
    for classes in (2, 33):
        arguments = problem(17, 3, 7, classes, dtype) | {"confidence": confidence}
        for name in ("insertion_logits", "deletion_logits"):
            arguments[name] = (cases.integers(rng, 3, 17, classes) - 1).to(dtype) * size
        result = check(arguments, rtol=1e-12, atol=1e-13)
        wanted = arguments["target"][arguments["image"]][:, None]
        logits = arguments["insertion_logits"].double()
        log_probability = logits.gather(1, wanted)[:, 0] - logits.logsumexp(1)
        torch.testing.assert_close(result.scores[:, 2].log(), log_probability, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1e4, 1e30, 1e300], ids=str)
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_no_nan_at_any_size(confidence: str, size: float) -> None:
    dtype = torch.float32 if size < 1e38 else torch.float64
    for classes in (2, 33):
        arguments = problem(17, 3, 7, classes, dtype) | {"confidence": confidence}
        for name in ("insertion_logits", "deletion_logits"):
            arguments[name] = arguments[name].sign() * size
            arguments[name][0] = size
            arguments[name][1] = -size
        result = check(arguments)
        assert result.scores.isfinite().all()
        assert result.scores[:, 2:].min() >= 0
        assert result.scores[:, 2:].max() <= 1
        for level in (0, 1):  # all classes alike
            assert result.scores[level, 2].item() == pytest.approx(1 / classes, rel=1e-14)


@pytest.mark.parametrize("classes", [2, 5, 33, 1000])
def test_ends_of_the_confidence(classes: int) -> None:
    arguments = problem(2, 1, 3, classes, torch.float64)
    arguments["insertion_logits"][0] = 0
    arguments["insertion_logits"][1] = -500
    arguments["insertion_logits"][1, 1] = 500
    entropy = check(arguments).scores[:, 0]
    # Of equal probabilities 0 but for the 1e-7 in the logarithm, of a certain class 1.
    assert entropy[0].item() == pytest.approx(1 + math.log(1 / classes + 1e-7) / math.log(classes), abs=1e-14)
    assert entropy[1].item() == pytest.approx(1 + math.log(1 + 1e-7) / math.log(classes), abs=1e-14)
    evidential = check(arguments | {"confidence": "evidential"}).scores[:, 0]
    assert evidential[0].item() == pytest.approx(0.5, abs=1e-15)
    evidence = math.exp(10) + (classes - 1) * math.exp(-10)
    assert evidential[1].item() == pytest.approx(evidence / (evidence + classes), rel=1e-14)


def test_evidence_is_clamped() -> None:
    """Beyond 10 nothing changes, up to 10 everything does; the other terms know no clamp."""
    arguments = problem(23, dtype=torch.float64) | {"confidence": "evidential"}
    arguments["insertion_logits"] = arguments["insertion_logits"] * 6
    clamped = arguments | {"insertion_logits": arguments["insertion_logits"].clamp(-10, 10)}
    assert not torch.equal(arguments["insertion_logits"], clamped["insertion_logits"])
    plain, other = check(arguments).scores, check(clamped).scores
    assert torch.equal(plain[:, 0], other[:, 0])
    assert not torch.equal(plain[:, 2], other[:, 2])
    inside = arguments | {"insertion_logits": arguments["insertion_logits"].clamp(-9.999, 9.999)}
    assert not torch.equal(plain[:, 0], check(inside).scores[:, 0])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_loses_nothing_more(half: torch.dtype) -> None:
    arguments = problem()
    arguments |= {name: arguments[name].to(half) for name in ("insertion_logits", "deletion_logits")}
    raised = arguments | {name: arguments[name].float() for name in ("insertion_logits", "deletion_logits")}
    assert same(check(arguments), ops.submodular_gains(**raised))
    for dtype in (torch.float32, torch.float64):  # the wider of two types serves both
        mixed = arguments | {"deletion_logits": arguments["deletion_logits"].to(dtype)}
        torch.testing.assert_close(check(mixed).scores, check(raised).scores, rtol=1e-13, atol=1e-14)


def test_distances_in_any_precision() -> None:
    """They are raised to float64 before anything is added."""
    arguments = problem()
    for dtype in (torch.float32, torch.float16):
        lower = {name: arguments[name].to(dtype) for name in ("distance", "running_min")}
        lower["running_min"] = nearest(lower["distance"].double(), arguments["selected"]).to(dtype)
        check(arguments | lower)


# ---- the best row


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("rows", [2, 33, 200])
def test_exact_ties_go_to_the_lowest_candidate_then_row(rows: int, largest: bool) -> None:
    for seed in range(5):
        rng = cases.generator(seed)
        arguments = problem(rows, 3, 33, 2, seed=seed) | {"largest": largest, "weights": [0, 0, 1, 0]}
        arguments["consistency"] = cases.integers(rng, 2, rows).double() / 4  # two totals, many of each
        result = check(arguments)
        arguments["consistency"] = arguments["consistency"] * 0  # one total
        check(arguments)
        arguments["candidate"] = arguments["candidate"] * 0 + 3  # and one candidate: the first row of each image
        result = check(arguments)
        image = arguments["image"].tolist()
        assert result.best.tolist() == [image.index(b) if b in image else -1 for b in range(3)]


def test_ties_of_whole_rows() -> None:
    """Rows that are the same but for their candidate, the highest first, and distances all alike."""
    arguments = problem(12, 1, 12, 5)
    for name in ("insertion_logits", "deletion_logits"):
        arguments[name] = arguments[name][:1].expand(12, -1)
    arguments["image"] = torch.zeros(12, dtype=torch.int64, device=cases.DEVICE)
    arguments["candidate"] = torch.arange(11, -1, -1, device=cases.DEVICE)
    arguments["distance"] = torch.full_like(arguments["distance"], 0.25)
    arguments["selected"] = torch.zeros_like(arguments["selected"])
    arguments["running_min"] = nearest(arguments["distance"], arguments["selected"])
    for largest in (True, False):
        result = check(arguments | {"largest": largest})
        assert len(set(result.total.tolist())) == 1
        assert result.best.tolist() == [11]


def test_largest_and_smallest() -> None:
    arguments = problem(50)
    most, least = check(arguments), check(arguments | {"largest": False})
    assert torch.equal(most.total, least.total)
    for image in range(2):
        own = most.total[arguments["image"] == image]
        assert most.total[most.best[image]] == own.max()
        assert least.total[least.best[image]] == own.min()
    assert (most.best[:2] != least.best[:2]).all()


def test_images_without_rows_have_no_best() -> None:
    arguments = problem(9, 70, 3, 4)
    arguments["image"] = torch.tensor([69, 0, 31, 32, 33, 0, 69, 2, 31], device=cases.DEVICE)
    best = check(arguments).best
    assert (best >= 0).nonzero()[:, 0].tolist() == [0, 2, 31, 32, 33, 69]
    assert set(best.tolist()) <= {*range(9), -1}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_small_problems_of_every_shape(data: st.DataObject) -> None:
    """Few different values, so that ties, empty images, empty and whole sets all come up."""
    images, regions, classes = (data.draw(st.integers(low, high)) for low, high in ((1, 3), (1, 5), (2, 6)))
    rows = data.draw(st.integers(0, 7))

    def draw(values: list[Any], *shape: int) -> Tensor:
        count = math.prod(shape)
        drawn = data.draw(st.lists(st.sampled_from(values), min_size=count, max_size=count))
        kind = {bool: torch.bool, int: torch.int64, float: torch.float64}[type(values[0])]
        return torch.tensor(drawn, dtype=kind).reshape(shape).to(cases.DEVICE)

    logits = [0.0, 1.0, -20.0, 300.0]
    dtype = data.draw(st.sampled_from(FLOATS))
    arguments: dict[str, Any] = {
        "insertion_logits": draw(logits, rows, classes).to(dtype),
        "deletion_logits": data.draw(st.sampled_from([None, draw(logits, rows, classes).to(dtype)])),
        "image": draw([*range(images)], rows),
        "candidate": draw([*range(regions)], rows),
        "distance": draw([0.0, 0.25, 0.5], images, regions, regions),
        "selected": draw([False, True], images, regions),
        "target": draw([*range(classes)], images),
        "weights": draw([0.0, 1.0, 0.5], 4),
        "confidence": data.draw(st.sampled_from(CONFIDENCES)),
        "largest": data.draw(st.booleans()),
    }
    arguments["running_min"] = nearest(arguments["distance"], arguments["selected"])
    for name in ("consistency", "collaboration"):
        arguments[name] = data.draw(st.sampled_from([None, draw([0.0, -0.5, 0.75], rows)]))
    # The definition of a set of one region has no minimum that could be infinite; of larger sets neither.
    check(arguments)


# ---- the same bits


def reordered(arguments: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Those rows alone, in that order."""
    return {name: each[rows] if name in ROWWISE and each is not None else each for name, each in arguments.items()}


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_rows_in_any_company_on_any_number_of_threads_give_the_same_bits(confidence: str) -> None:
    arguments = problem(100, 3, 33, 33) | {"confidence": confidence}
    whole = ops.submodular_gains(**arguments)
    order = torch.randperm(100, generator=cases.generator(5)).to(cases.DEVICE)
    for threads, count in ((1, 100), (2, 7), (3, 1)):
        torch.set_num_threads(threads)
        assert same(whole, ops.submodular_gains(**arguments))
        for rows in order.split(count):
            part = ops.submodular_gains(**reordered(arguments, rows))
            assert torch.equal(part.scores, whole.scores[rows])
            assert torch.equal(part.total, whole.total[rows])


def test_the_order_of_rows_does_not_change_what_wins() -> None:
    arguments = problem(60, 2, 40, 5)
    arguments["candidate"] = torch.arange(60, device=cases.DEVICE) % 40
    arguments["image"] = torch.arange(60, device=cases.DEVICE) // 40
    arguments |= {"weights": [0, 0, 1, 0], "consistency": cases.integers(cases.generator(0), 3, 60).double()}
    expected = arguments["candidate"][ops.submodular_gains(**arguments).best]
    for seed in range(4):
        mixed = reordered(arguments, torch.randperm(60, generator=cases.generator(seed)).to(cases.DEVICE))
        assert torch.equal(mixed["candidate"][ops.submodular_gains(**mixed).best], expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides_do_not_matter(implementation: str, dtype: torch.dtype) -> None:
    arguments = problem(33, 3, 9, 33, dtype)
    rng = cases.generator(1)
    arguments |= {name: cases.normal(rng, 33, dtype=torch.float64) for name in ("consistency", "collaboration")}
    views = {name: cases.strided(each) for name, each in arguments.items()}
    for confidence in CONFIDENCES:
        plain = ops.submodular_gains(**arguments, confidence=confidence)
        other = ops.submodular_gains(**views, confidence=confidence)
        if implementation == "reference":  # torch adds in another order where the strides differ
            torch.testing.assert_close(plain.scores, other.scores, rtol=1e-14, atol=1e-15)
            assert torch.equal(plain.best, other.best)
        else:
            assert same(plain, other)
    # One image's distances, repeated without being copied, and one row's logits.
    once = {name: each[:1] for name, each in arguments.items() if name in ("distance", "running_min", "selected")}
    repeated = {name: each.expand(3, *each.shape[1:]) for name, each in once.items()}
    repeated["insertion_logits"] = arguments["insertion_logits"][:1].expand(33, -1)
    copied = {name: each.contiguous() for name, each in repeated.items()}
    one, two = (ops.submodular_gains(**arguments | each) for each in (repeated, copied))
    torch.testing.assert_close(one.scores, two.scores, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("integer", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_integers_of_any_width(integer: torch.dtype) -> None:
    arguments = problem()
    narrow = {name: arguments[name].to(integer) for name in ("image", "candidate", "target")}
    assert same(ops.submodular_gains(**arguments | narrow), check(arguments))


def test_arguments_are_left_as_they_are() -> None:
    arguments = problem()
    copies = {name: each.clone() for name, each in arguments.items()}
    ops.submodular_gains(**arguments)
    assert all(torch.equal(arguments[name], each) for name, each in copies.items())


def test_autocast_changes_nothing() -> None:
    arguments = problem()
    plain = ops.submodular_gains(**arguments)
    with torch.autocast(cases.DEVICE.type, dtype=torch.bfloat16):
        assert same(plain, ops.submodular_gains(**arguments))


def test_empty_in_empty_out() -> None:
    for images, regions in ((0, 7), (3, 7), (3, 0), (0, 0)):
        nothing = {
            "insertion_logits": torch.zeros(0, 5),
            "deletion_logits": torch.zeros(0, 5),
            "image": torch.zeros(0, dtype=torch.int64),
            "candidate": torch.zeros(0, dtype=torch.int64),
            "distance": torch.zeros(images, regions, regions, dtype=torch.float64),
            "running_min": torch.zeros(images, regions, dtype=torch.float64),
            "selected": torch.zeros(images, regions, dtype=torch.bool),
            "target": torch.zeros(images, dtype=torch.int64),
        }
        result = ops.submodular_gains(**{name: each.to(cases.DEVICE) for name, each in nothing.items()})
        assert result.scores.shape == (0, 4)
        assert result.total.shape == (0,)
        assert result.best.tolist() == [-1] * images


# ---- bad arguments


def refusal(changes: dict[str, Any], kind: type[Exception] = ValueError) -> str:
    arguments = problem(rows=6) | {name: torch.zeros(6).double() for name in ("consistency", "collaboration")}
    with pytest.raises(kind) as caught:
        ops.submodular_gains(**arguments | changes)
    message = str(caught.value)
    assert message.startswith("finecf.ops.submodular_gains: ")
    assert "; " in message
    return message.removeprefix("finecf.ops.submodular_gains: ")


TENSORS = {
    "insertion_logits": "R, C",
    "deletion_logits": "R, C",
    "image": "R",
    "candidate": "R",
    "distance": "B, M, M",
    "running_min": "B, M",
    "selected": "B, M",
    "target": "B",
    "weights": "4",
    "consistency": "R",
    "collaboration": "R",
}
SHAPES = {"R": 6, "C": 5, "B": 3, "M": 7, "4": 4}


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_shapes_are_refused(name: str) -> None:
    axes = TENSORS[name].split(", ")
    sizes = [SHAPES[axis] for axis in axes]
    good: Any = (problem(rows=6) | dict.fromkeys(("consistency", "collaboration"), torch.zeros(6).double()))[name]
    for shape in ([1, *sizes], sizes[1:]):
        came = good.new_zeros(shape)
        message = refusal({name: came})
        assert message.startswith(f"{name} must have shape [{TENSORS[name]}], got {shape}; ")
    for axis in range(len(axes)):
        if name == "insertion_logits" or (name, axis) == ("distance", 0):
            continue  # the first tensor with an axis tells its size: those after it are refused
        shape = [size + (axis == at) for at, size in enumerate(sizes)]
        message = refusal({name: good.new_zeros(shape)})
        wanted = rf"{name} must have shape \[{TENSORS[name]}\] with \w = \d+.*, got {re.escape(str(shape))}; "
        assert re.match(wanted, message)
    assert "deletion_logits must have shape [R, C] with R = 7 (R as in insertion_logits), got [6, 5]; " in refusal(
        {"insertion_logits": torch.zeros(7, 5)}
    )


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_kinds_are_refused(name: str) -> None:
    arguments = problem(rows=6) | {key: torch.zeros(6).double() for key in ("consistency", "collaboration")}
    good: Tensor = arguments[name]
    if name != "weights":
        assert refusal({name: good.tolist()}, TypeError).startswith(f"{name} must be a tensor, got list; ")
        wrong = good.long() if good.is_floating_point() else good.double()
        kind = {torch.bool: "booleans", torch.int64: "integers"}.get(good.dtype, "floating-point numbers")
        assert refusal({name: wrong}, TypeError).startswith(f"{name} must hold {kind}, got {wrong.dtype}; use {name}.")
        elsewhere = refusal({name: good.to("meta")})
        assert re.search(r"\w+ must be on .* like \w+, got .*; move it with", elsewhere)
    if good.is_floating_point():
        message = refusal({name: good.clone().requires_grad_()})
        assert message.startswith(f"{name} requires grad, but no gradient flows through this operator; use {name}.det")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["insertion_logits", "deletion_logits", "consistency", "collaboration"])
def test_numbers_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    arguments = problem(rows=6) | {key: torch.zeros(6).double() for key in ("consistency", "collaboration")}
    value = arguments[name].clone()
    value[-1] = bad
    assert refusal({name: value}).startswith(f"{name} must be finite, got NaN or infinity in {value[-1].numel()} of ")


def test_distances_that_are_no_numbers_are_refused() -> None:
    for name in ("distance", "running_min"):
        value = problem(rows=6)[name].clone()
        value[-1, -1] = math.nan
        assert refusal({name: value}).startswith("distance and running_min must hold no NaN; ")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_values_out_of_range_are_refused(data: st.DataObject) -> None:
    name, size, what = data.draw(
        st.sampled_from([("image", 3, "images"), ("candidate", 7, "regions"), ("target", 5, "classes")])
    )
    bad = data.draw(st.one_of(st.integers(-(2**40), -1), st.integers(size, 2**40)))
    value = problem(rows=6)[name].clone()
    value[data.draw(st.integers(0, len(value) - 1))] = bad
    assert refusal({name: value}).startswith(f"{name} must lie in 0..{size - 1} ({size} {what}), got {bad}; ")


def test_bad_weights_are_refused() -> None:
    message = refusal({"weights": [1.0, -0.5, 1.0, 1.0]})
    assert message.startswith("weights must be at least 0, got [1.0, -0.5, 1.0, 1.0]; leave a term out with 0")
    assert refusal({"weights": [1.0, 1.0, 1.0]}).startswith("weights must have shape [4] with 4 = 4, got [3]; ")
    for bad in (math.nan, math.inf):
        message = refusal({"weights": [1.0, bad, 1.0, 1.0]})
        assert message.startswith("weights must be finite, got NaN or infinity in 1 of 4 places")


def test_other_bad_arguments_are_refused() -> None:
    assert refusal({"confidence": "margin"}).startswith(
        "confidence must be one of 'entropy', 'evidential', got 'margin'; "
    )
    one_class = {name: torch.zeros(6, 1) for name in ("insertion_logits", "deletion_logits")}
    assert refusal(one_class).startswith("insertion_logits must hold at least 2 classes, got 1; ")


def test_direct_calls_are_checked_too(implementation: str) -> None:
    """A call past the wrapper is refused, not read out of bounds."""
    if implementation == "reference":
        pytest.skip("about the compiled operator")
    arguments = problem(rows=6) | {"confidence": "entropy", "consistency": None, "collaboration": None, "largest": True}
    call = torch.ops.finecf.submodular_gains
    assert len(call(**arguments)) == 3
    changes: list[tuple[str, Any]] = [
        ("confidence", "margin"),
        ("insertion_logits", arguments["insertion_logits"].half() if cases.DEVICE.type == "cpu" else torch.zeros(6, 5)),
        ("insertion_logits", arguments["insertion_logits"][0]),
        ("insertion_logits", arguments["insertion_logits"][:, :1]),
        ("deletion_logits", arguments["deletion_logits"].double()),
        ("deletion_logits", arguments["deletion_logits"][1:]),
        ("image", arguments["image"].int()),
        ("image", arguments["image"][1:]),
        ("candidate", arguments["candidate"][1:]),
        ("distance", arguments["distance"].float()),
        ("distance", arguments["distance"][:, 1:]),
        ("running_min", arguments["running_min"][:, 1:]),
        ("selected", arguments["selected"].int()),
        ("target", arguments["target"][1:]),
        ("weights", arguments["weights"][1:]),
        ("consistency", torch.zeros(5).double().to(cases.DEVICE)),
        ("collaboration", torch.zeros(6).to(cases.DEVICE)),
    ]
    if cases.DEVICE.type == "cpu":  # values on a device are not looked at past the wrapper
        changes += [(name, arguments[name] + 100) for name in ("image", "candidate", "target")]
        changes += [(name, arguments[name] - 100) for name in ("image", "candidate", "target")]
    for name, bad in changes:
        with pytest.raises(RuntimeError, match=f"submodular_gains: {name} must"):
            call(**arguments | {name: bad})
    assert _native.backend() == "native"
