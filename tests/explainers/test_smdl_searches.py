"""SMDL's searches on their own, with scores from a table instead of a model; and the guess of the window search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from cases import DEVICE
from torch import Tensor, nn

import finecf
from finecf.explainers._subset import (
    SEARCHES,
    Answer,
    Chosen,
    Problem,
    Search,
    Trace,
    bidirectional,
    lazy,
    phases,
    prefixes,
    window,
)
from finecf.explainers._surrogate import Surrogate

Score = Callable[[frozenset[int]], float]


def problem(regions: int, guess: Callable[[Chosen, list[int]], Tensor] | None = None) -> Problem:
    return Problem(
        distance=torch.zeros(regions, regions, dtype=torch.float64),
        weights=torch.ones(4, dtype=torch.float64),
        sizes=[1] * regions,
        empty_score=0.0,
        noise=1e-9,
        max_regions=regions,
        guess=guess,
    )


def drive(search: Search, score: Score) -> int:
    """Answer a search from a set function; return how many sets it asked for."""
    asked = 0
    ask = next(search, None)
    while ask is not None:
        chosen = frozenset(ask.chosen.selected.nonzero()[:, 0].tolist())
        assert ask.candidates == sorted(ask.candidates)
        assert not chosen & set(ask.candidates)
        total = torch.tensor([score(chosen | {region}) for region in ask.candidates], dtype=torch.float64)
        asked += len(total)
        answer = Answer(
            list(ask.candidates),
            torch.zeros(len(total), 4, dtype=torch.float64),
            total,
            torch.zeros(len(total), 3, dtype=torch.float64),
            [False] * len(total),
        )
        try:
            ask = search.send(answer)
        except StopIteration:
            ask = None
    return asked


def coverage(regions: int, seed: int = 0) -> Score:
    """How much of a universe the regions cover: a submodular function."""
    generator = torch.Generator().manual_seed(seed)
    member = torch.rand(regions, 60, generator=generator) < 0.15
    value = torch.rand(60, generator=generator, dtype=torch.float64)
    return lambda chosen: float(value[member[sorted(chosen)].any(0)].sum())


def greedy_order(regions: int, score: Score) -> list[int]:
    order: list[int] = []
    while len(order) < regions:
        left = [region for region in range(regions) if region not in order]
        order.append(max(left, key=lambda region: (score(frozenset({*order, region})), -region)))
    return order


@pytest.mark.parametrize("seed", range(5))
def test_lazy_with_no_limit_is_greedy_on_a_submodular_function(seed: int) -> None:
    score = coverage(14, seed)
    trace = Trace(problem(14))
    asked = drive(lazy(trace, slack=0.0, width=1, effort=1.0), score)
    ends = next(k for k, (a, b) in enumerate(itertools.pairwise(prefix_scores(trace.order, score))) if b - a < 1e-12)
    assert trace.order[:ends] == greedy_order(14, score)[:ends]
    assert trace.violations == 0
    assert trace.uncertain == 0
    assert asked < 14 * 15 / 2


def prefix_scores(order: list[int], score: Score) -> list[float]:
    return [score(frozenset(order[:k])) for k in range(len(order) + 1)] + [score(frozenset(order))]


def test_growing_gains_are_counted() -> None:
    """A set is worth the square of its size: every gain grows by 2 at every step."""
    trace = Trace(problem(6))
    drive(SEARCHES["greedy"](trace), lambda chosen: float(len(chosen) ** 2))
    assert trace.order == list(range(6))
    assert trace.compared == trace.violations == 5 + 4 + 3 + 2 + 1
    assert trace.growth == 2
    assert trace.negative == 0
    assert trace.ties == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("regions", [3, 9, 10, 20])
def test_bidirectional_ranks_an_additive_function_exactly(regions: int) -> None:
    value = torch.randperm(regions, generator=torch.Generator().manual_seed(1)).double()
    trace = Trace(problem(regions))
    asked = drive(bidirectional(trace), lambda chosen: float(value[sorted(chosen)].sum()))
    assert trace.order == value.argsort(descending=True).tolist()
    if regions == 20:
        assert asked < regions * (regions + 1) / 2
        assert None in trace.steps
        drive(prefixes(trace), lambda chosen: float(value[sorted(chosen)].sum()))
        assert None not in trace.steps
        assert [step.total for step in trace.steps if step] == value.sort(descending=True).values.cumsum(0).tolist()


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("limit", [1, 4, 11])
def test_every_search_ranks_each_region_once_and_stops_when_told(name: str, limit: int) -> None:
    score = coverage(11)
    trace = Trace(problem(11))
    trace.problem.max_regions = limit
    drive(SEARCHES[name](trace), score)
    assert len(trace.order) == len(set(trace.order)) == limit
    assert trace.order[0] == greedy_order(11, score)[0]


def test_the_window_asks_for_the_best_guesses_and_what_it_remembers() -> None:
    value = torch.tensor([5.0, 1, 4, 2, 3, 0], dtype=torch.float64)

    def guess(_: Chosen, candidates: list[int]) -> Tensor:
        return -value[candidates]  # the worst guess there is

    trace = Trace(problem(6, guess))
    asked = drive(window(trace, guessed=2, remembered=1), lambda chosen: float(value[sorted(chosen)].sum()))
    # What is remembered of the first step saves it: additive gains do not change.
    assert trace.order == [0, 2, 4, 3, 1, 5]
    assert asked == 6 + 3 + 3 + 3 + 2 + 1


def test_phases_cost_less_than_greedy() -> None:
    score = coverage(20)
    trace = Trace(problem(20))
    assert drive(phases(trace, share=0.2, picks=0.5), score) < 0.75 * 20 * 21 / 2
    assert sorted(trace.order) == list(range(20))


class Pixelwise(nn.Module):
    """No pixel sees another before the head: features of a part of the image are those of the whole image there."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layer = nn.Conv2d(3, 6, 1)
            self.head = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4)) if hidden else nn.Linear(6, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean((2, 3)))


@pytest.mark.parametrize("hidden", [False, True], ids=["linear", "first_linear"])
@pytest.mark.parametrize("confidence", ["entropy", "evidential"])
def test_the_guess_is_exact_where_no_pixel_sees_another(hidden: bool, confidence: str) -> None:
    net = Pixelwise(hidden).double().to(DEVICE)
    clf = finecf.wrap(net, layer="layer")
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 8, 8, generator=generator, dtype=torch.float64).to(DEVICE)
    blank = torch.full_like(image, 0.3)
    labels = torch.randint(0, 5, (8, 8), generator=generator).to(torch.int32)
    labels.view(-1)[:5] = torch.arange(5)
    maps, _ = clf.features_and_logits(torch.stack([image, blank]))
    fold = clf.fold(maps)
    assert fold is not None
    assert fold.kind == ("first_linear" if hidden else "linear")
    weights = torch.tensor([1.0, 0.5, 2.0, 3.0], dtype=torch.float64)
    surrogate = Surrogate(fold, maps[0], maps[1], labels, 5, 2, weights, confidence)
    distance = torch.rand(5, 5, generator=generator, dtype=torch.float64)
    chosen = Chosen(distance + distance.T)
    for region in (3, 1):
        candidates = [each for each in range(5) if not chosen.selected[each]]
        guess = surrogate.totals(chosen, candidates)
        for candidate, got in zip(candidates, guess.tolist(), strict=True):
            kept = chosen.selected.clone()
            kept[candidate] = True
            shown = kept.to(DEVICE)[labels.to(DEVICE).long()]
            logits = clf.logits(torch.stack([torch.where(shown, image, blank), torch.where(shown, blank, image)]))
            p = logits.softmax(1)
            entropy = 1 + float((p[0] * (p[0] + 1e-7).log()).sum()) / math.log(4)
            evidence = 1 - 4 / float((logits[0].clamp(-10, 10).exp() + 1).sum())
            effectiveness = float(chosen.effectiveness([candidate]))
            want = entropy if confidence == "entropy" else evidence
            want += 0.5 * effectiveness + 2 * float(p[0, 2]) + 3 * (1 - float(p[1, 2]))
            assert got == pytest.approx(want, abs=1e-9)
        chosen.add(region)


def test_effectiveness_grows_as_its_definition_says() -> None:
    generator = torch.Generator().manual_seed(0)
    distance = torch.rand(7, 7, generator=generator, dtype=torch.float64)
    distance = distance + distance.T
    chosen = Chosen(distance)
    members: list[int] = []
    for region in (4, 0, 6, 2):
        others = [each for each in range(7) if each not in members]
        for candidate, value in zip(others, chosen.effectiveness(others).tolist(), strict=True):
            group = [*members, candidate]
            want = sum(min(float(distance[i, j]) for j in group if j != i) for i in group) if len(group) > 1 else 0.0
            assert value == pytest.approx(want, abs=1e-12)
        chosen.add(region)
        members.append(region)


def test_a_head_that_does_not_fold_is_searched_in_phases() -> None:
    class Peaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 6, 3, padding=1)
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.layer(x).amax((2, 3)))

    clf = finecf.wrap(Peaks().eval().to(DEVICE), layer="layer")
    image = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    labels = finecf.regions.grid(12, 12, 16)
    (found,) = finecf.SMDL(clf, search="window").explain(image, regions=labels)
    (whole,) = finecf.SMDL(clf).explain(image, regions=labels)
    assert sorted(found.order) == list(range(16))
    assert found.evaluations < whole.evaluations
