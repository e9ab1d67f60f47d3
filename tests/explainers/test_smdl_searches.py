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
    Ask,
    AskSlopes,
    Chosen,
    Guess,
    Guesser,
    Problem,
    Search,
    Slopes,
    Step,
    Trace,
    bidirectional,
    guided,
    lazy,
    phases,
    prefixes,
    swaps,
    window,
)
from finecf.explainers._surrogate import Residuals, Surrogate

Score = Callable[[frozenset[int]], float]


def problem(regions: int, guesser: Guesser | None = None) -> Problem:
    return Problem(
        distance=torch.zeros(regions, regions, dtype=torch.float64),
        weights=torch.ones(4, dtype=torch.float64),
        sizes=[1] * regions,
        empty_score=0.0,
        noise=1e-9,
        max_regions=regions,
        guesser=guesser,
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


class Table(Guesser):
    """Guesses from two columns of values, and notes what it is taught."""

    def __init__(self, kept: list[float], removed: list[float]) -> None:
        self.kept, self.removed = (torch.tensor(each, dtype=torch.float64) for each in (kept, removed))
        self.learnt: list[tuple[int, list[int]]] = []
        self.slopes: list[bool] = []

    def guess(self, chosen: Chosen, candidates: list[int], slopes: Slopes | None, /) -> Guess:
        assert slopes is None or slopes is SLOPES
        self.slopes.append(slopes is not None)
        kept, removed = self.kept[candidates], self.removed[candidates]
        return Guess(kept, removed, kept, removed)

    def learn(self, chosen: Chosen, answer: Answer, /) -> None:
        self.learnt.append((chosen.size, answer.candidates))


SLOPES = Slopes(*torch.zeros(3, 20, dtype=torch.float64))


def asks_of(trace: Trace, value: Tensor) -> list[Ask]:
    """What the window search asks for, answered from additive values."""
    return answered(window(trace), value)


def answered(search: Search, value: Tensor) -> list[Ask]:
    asks = []
    ask = next(search, None)
    while ask is not None:
        if isinstance(ask, AskSlopes):
            ask = search.send(SLOPES)
            continue
        asks.append(Ask(ask.chosen, list(ask.candidates), ask.removed))
        total = value[ask.candidates] + value[ask.chosen.selected].sum()
        count = len(ask.candidates)
        answer = Answer(
            list(ask.candidates),
            torch.zeros(count, 4, dtype=torch.float64),
            total,
            torch.zeros(count, 3, dtype=torch.float64),
            [False] * count,
        )
        try:
            ask = search.send(answer)
        except StopIteration:
            break
    return asks


def test_the_window_scores_the_best_guesses() -> None:
    m = 50
    value = torch.arange(m, dtype=torch.float64)
    guesser = Table(value.tolist(), (3 * value).tolist())
    trace = Trace(problem(m, guesser))
    asks = asks_of(trace, value)
    assert trace.order == list(range(m - 1, -1, -1))
    assert len(asks[0].candidates) == m
    assert [len(ask.candidates) for ask in asks[1:]] == [4] * 14 + [2] * 34 + [1]
    assert guesser.slopes == [True] * 14 + [False] * 35  # of sets of less than a third of the regions
    assert all(ask.removed for ask in asks)
    assert guesser.learnt == [(step, ask.candidates) for step, ask in enumerate(asks)]


def test_gradients_are_asked_for_where_they_spare_more_than_they_cost() -> None:
    """Of m - 1 open regions two are scored: the gradients cost five images, each region left out spares two."""
    for m, asked in ((5, 0), (6, 1), (7, 2)):
        value = torch.arange(m, dtype=torch.float64)
        guesser = Table(value.tolist(), (3 * value).tolist())
        asks_of(Trace(problem(m, guesser)), value)
        assert sum(guesser.slopes) == asked


def test_bad_guesses_are_mended_by_swaps() -> None:
    value = torch.arange(8, dtype=torch.float64)
    trace = Trace(problem(8, Table((-value).tolist(), (-3 * value).tolist())))
    search = guided(trace, trace.problem.guesser, 1.0)
    answered(search, value)
    assert trace.order[0] == 7
    assert trace.order[1] == 1  # the better of the two that look best
    answered(swaps(trace), value)
    assert trace.order == list(range(7, -1, -1))


def test_the_window_runs_kept_images_alone_where_the_removed_ones_say_little() -> None:
    m = 20
    value = torch.arange(m, dtype=torch.float64)
    trace = Trace(problem(m, Table(value.tolist(), (0.1 * value).tolist())))
    asks = asks_of(trace, value)
    assert trace.order == list(range(m - 1, -1, -1))
    sides = [(ask.removed, len(ask.candidates)) for ask in asks[1:5]]
    assert sides == [(False, 3), (True, 1), (False, 3), (True, 1)]


def test_the_window_needs_no_second_look_without_the_collaboration_term() -> None:
    m = 20
    value = torch.arange(m, dtype=torch.float64)
    trace = Trace(problem(m, Table(value.tolist(), [0.0] * m)))
    trace.problem.weights[3] = 0
    asks = asks_of(trace, value)
    assert trace.order == list(range(m - 1, -1, -1))
    assert [len(ask.candidates) for ask in asks[1:4]] == [3, 3, 3]
    assert not any(ask.removed for ask in asks[1:18])
    assert len(asks) == m


@pytest.mark.parametrize("members", [[], [3], [5, 0, 2, 6]])
def test_a_set_is_the_same_made_at_once(members: list[int]) -> None:
    distance = torch.rand(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = distance.clone()
    grown, made = Chosen(distance), Chosen.of(distance, members)
    for region in members:
        grown.add(region)
    assert made.size == grown.size
    for name in ("selected", "nearest", "distance"):
        assert torch.equal(getattr(made, name), getattr(grown, name))
    assert torch.equal(distance, before)


def ranked(order: list[int], score: Score, seen: list[set[int]]) -> Trace:
    """A search that has ended, with what it looked at in each step beside what it took."""
    trace = Trace(problem(len(order)))
    for place, region in enumerate(order):
        total = score(frozenset(order[: place + 1]))
        trace.seen.append({region, *seen[place]})
        trace.append(region, Step((0.0,) * 4, total, 0.0, 0.0, 0.0, False))
    return trace


def totals(trace: Trace) -> list[float]:
    return [step.total for step in trace.steps if step is not None]


def test_regions_that_the_windows_missed_move_to_where_they_belong() -> None:
    value = torch.tensor([9.0, 7.0, 5.0, 3.0, 1.0], dtype=torch.float64)

    def score(chosen: frozenset[int]) -> float:
        return float(value[sorted(chosen)].sum())

    trace = ranked([1, 2, 4, 0, 3], score, [set()] * 5)
    trace.ties = [1, 4]
    asked = drive(swaps(trace), score)
    assert trace.order == [0, 1, 2, 3, 4]
    assert totals(trace) == [9, 16, 21, 24, 25]
    assert asked == 4  # 0 past 4, 2 and 1; 3 past 4; nothing else gained more than the one before
    assert trace.ties == []


def test_what_was_a_candidate_before_is_not_tried_again() -> None:
    def score(chosen: frozenset[int]) -> float:
        return float(sum(chosen))

    trace = ranked([0, 2, 1], score, [{1, 2}, set(), set()])
    assert drive(swaps(trace), score) == 0
    assert trace.order == [0, 2, 1]


def test_a_swap_that_scores_no_more_is_not_made() -> None:
    """The gain of 1 is due to 0: alone it is worth nothing."""

    def score(chosen: frozenset[int]) -> float:
        return 1.0 * (0 in chosen) + 5.0 * ({0, 1} <= chosen)

    trace = ranked([0, 1], score, [set(), set()])
    assert drive(swaps(trace), score) == 1
    assert trace.order == [0, 1]
    assert trace.seen == [{0, 1}, {1}]
    noisy = ranked([0, 1], lambda chosen: sum(chosen) + 1.0, [set(), set()])
    noisy.problem.noise = 0.2
    drive(swaps(noisy), lambda chosen: sum(chosen) + 1.0)
    assert noisy.order == [0, 1]  # a gain of 1 more is less than ten times the noise
    assert noisy.seen == [{0}, {1}]


def test_a_swap_within_the_noise_is_a_tie() -> None:
    """Region 1 gains 5 beside 0, and alone nearly as much as 0."""

    def score(chosen: frozenset[int]) -> float:
        return {frozenset({0}): 2.0, frozenset({1}): 1.5}.get(chosen, 7.0)

    trace = ranked([0, 1], score, [set(), set()])
    trace.problem.noise = 0.1
    assert drive(swaps(trace), score) == 1
    assert trace.order == [0, 1]
    assert trace.ties == [1]


def test_swaps_are_tried_twice_for_each_region_at_most() -> None:
    def score(chosen: frozenset[int]) -> float:
        return float(sum(chosen))

    trace = ranked(list(range(12)), score, [set()] * 12)
    assert drive(swaps(trace), score) == 24
    assert trace.order == [6, 5, 4, 3, 7, 2, 1, 0, 8, 9, 10, 11]  # 21 tries, and three more for region 7
    assert totals(trace) == [score(frozenset(trace.order[:k])) for k in range(1, 13)]


@pytest.mark.parametrize("seed", range(5))
def test_swaps_lower_no_score_along_the_order_and_leave_the_other_sets(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    worth: dict[frozenset[int], float] = {}

    def score(chosen: frozenset[int]) -> float:
        return worth.setdefault(chosen, float(torch.rand((), generator=generator)) + len(chosen))

    order = torch.randperm(9, generator=generator).tolist()
    trace = ranked(order, score, [set()] * 9)
    before = totals(trace)
    drive(swaps(trace), score)
    assert sorted(trace.order) == sorted(order)
    assert all(after >= own for after, own in zip(totals(trace), before, strict=True))
    assert totals(trace) == [score(frozenset(trace.order[:k])) for k in range(1, 10)]


def test_swaps_that_reach_the_score_that_stops_end_the_order_there() -> None:
    def score(chosen: frozenset[int]) -> float:
        return float(sum(chosen) + len(chosen))

    trace = ranked([0, 1, 2], score, [set()] * 3)
    trace.problem.stop_score = 5.0
    trace.ties = [1, 3]
    drive(swaps(trace), score)
    assert trace.order == [2, 1]
    assert totals(trace) == [3, 5]
    assert trace.ties == []


def test_swaps_that_reach_the_area_that_stops_end_the_order_there() -> None:
    def score(chosen: frozenset[int]) -> float:
        return float(sum(chosen))

    trace = ranked([0, 1, 2], score, [set()] * 3)
    trace.problem.sizes = [2, 1, 6]
    trace.problem.max_area = 7 / 9
    drive(swaps(trace), score)
    assert trace.order == [2, 1]


def test_the_window_finds_late_what_it_guessed_low() -> None:
    """Region 18 is guessed last: it is met in the last step, and moves to where it belongs."""
    value = torch.arange(20, dtype=torch.float64)
    guess = value.clone()
    guess[18] = -1
    trace = Trace(problem(20, Table(guess.tolist(), (3 * guess).tolist())))
    asks_of(trace, value)
    assert trace.order == list(range(19, -1, -1))


def test_residuals_are_known_where_they_were_learnt_and_forgotten_far_away() -> None:
    generator = torch.Generator().manual_seed(0)
    residuals = Residuals(40, 2)
    sets = torch.rand(12, 40, generator=generator) < 0.3
    values = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    assert not residuals.predict(sets).mean.any()
    residuals.learn(sets, values)
    known = residuals.predict(sets)
    torch.testing.assert_close(known.mean, values, atol=0.02, rtol=0)
    assert float(known.deviation.max()) < 0.1
    far = residuals.predict(~sets[:1])
    assert float(far.mean.abs().max()) < 0.3 * float(values.abs().max())
    assert float(far.deviation.min()) > 0.5
    near = sets[:1].clone()
    near[0, 0] = ~near[0, 0]
    assert float((residuals.predict(near).mean - values[:1]).abs().max()) < 0.5


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
        guess = surrogate.guess(chosen, candidates)
        assert torch.equal(guess.kept, guess.kept_hope)  # nothing was learnt yet
        for candidate, got in zip(candidates, (guess.kept + guess.removed).tolist(), strict=True):
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


def test_the_guess_learns_from_what_the_model_said() -> None:
    class Blurry(nn.Module):
        """Pixels see their neighbours, so that blended maps misjudge the borders."""

        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(1)
                self.layer = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2))
                self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return 30 * self.fc(self.layer(x).mean((2, 3)))

    clf = finecf.wrap(Blurry().double().eval().to(DEVICE), layer="layer")
    image = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    blank = torch.zeros_like(image)
    labels = finecf.regions.grid(12, 12, 16)
    maps, _ = clf.features_and_logits(torch.stack([image, blank]))
    fold = clf.fold(maps)
    assert fold is not None
    weights = torch.ones(4, dtype=torch.float64)
    surrogate = Surrogate(fold, maps[0], maps[1], labels, 16, 2, weights, "entropy")
    chosen = Chosen(torch.zeros(16, 16, dtype=torch.float64))

    def said(candidates: list[int]) -> Answer:
        sets = chosen.selected.repeat(len(candidates), 1)
        sets[torch.arange(len(candidates)), torch.tensor(candidates)] = True
        shown = sets.to(DEVICE)[:, labels.to(DEVICE).long()][:, None]
        kept = clf.logits(torch.where(shown, image, blank)).softmax(1).cpu()
        gone = clf.logits(torch.where(shown, blank, image)).softmax(1)[:, 2].cpu()
        confidence = 1 + (kept * (kept + 1e-7).log()).sum(1) / math.log(4)
        nothing = torch.zeros_like(gone)
        scores = torch.stack([confidence, nothing, kept[:, 2], 1 - gone], 1)
        curves = torch.stack([kept[:, 2], gone, nothing], 1)
        return Answer(candidates, scores, scores.sum(1), curves, [False] * len(candidates))

    def error(candidates: list[int]) -> float:
        guess = surrogate.guess(chosen, candidates)
        return float((guess.kept + guess.removed - said(candidates).total).abs().mean())

    for region in (5, 6):
        chosen.add(region)
    candidates = [0, 1, 2, 9, 10, 11, 14, 15]
    seen = said(candidates)
    only_kept = said([8])._replace(curves=torch.full((1, 3), 0.5, dtype=torch.float64))
    only_kept.curves[:, 1] = math.nan
    chosen.add(7)
    before = error(candidates)
    chosen.selected[7] = False
    surrogate.learn(chosen, seen)
    chosen.selected[7] = True
    after = error(candidates)
    assert after < 0.75 * before
    surrogate.learn(chosen, only_kept)  # nothing is learnt of the removed half
    assert math.isfinite(error([10]))
