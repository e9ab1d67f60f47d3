"""The searches of SMDL: in which order regions join the set.

A search is a generator for one image. It asks for the scores of some candidates, each added to a set of regions, and is
sent the answer; `_evaluation.py` runs the searches of many images side by side and puts their questions into common
batches. Nothing here touches an image or a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

PENDING: Final = 8
"""Candidates that the back end of the bidirectional search scores exactly (LiMA's p)."""

NOISE_FACTOR: Final = 10
"""Two scores closer than this many times the noise of the model's forward are a tie."""


class Chosen:
    """A growing set of one image's regions, and the least distance of every region to another one in it."""

    def __init__(self, distance: Tensor) -> None:
        """`distance`: float64 [m,m] on the CPU, between the features of single regions."""
        self.distance = distance
        self.selected = torch.zeros(len(distance), dtype=torch.bool)
        self.nearest = torch.full((len(distance),), math.inf, dtype=torch.float64)
        self.size = 0

    @staticmethod
    def of(distance: Tensor, regions: Sequence[int]) -> Chosen:
        """The set of these regions."""
        chosen = Chosen(distance)
        if regions:
            members = torch.as_tensor(regions)
            columns = distance[:, members]
            columns[members, torch.arange(len(members))] = math.inf
            chosen.nearest = columns.amin(1)
            chosen.selected[members] = True
            chosen.size = len(members)
        return chosen

    def add(self, region: int) -> None:
        """Put a region into the set."""
        column = self.distance[:, region].clone()
        column[region] = math.inf
        self.nearest = torch.minimum(self.nearest, column)
        self.selected[region] = True
        self.size += 1

    def effectiveness(self, candidates: Sequence[int]) -> Tensor:
        """The effectiveness term of the set with each candidate added, float64 [r]."""
        columns = torch.as_tensor(candidates)
        if self.size == 0:
            return torch.zeros(len(columns), dtype=torch.float64)
        closer = torch.minimum(self.nearest[:, None], self.distance[:, columns])
        return closer[self.selected].sum(0) + self.nearest[columns]


class Ask(NamedTuple):
    """What do these candidates (ascending) score, each added to this set?"""

    chosen: Chosen
    candidates: list[int]
    removed: bool = True
    """Whether the images with the regions removed are wanted, too: without them a candidate costs one image, and the
    collaboration term is left out."""


class AskSlopes(NamedTuple):
    """Which way would the model lean if a little more of each region were added to this set?"""

    chosen: Chosen


class Slopes(NamedTuple):
    """Derivatives by how far each region is shown, float64 [m] each.

    0 where a weight of 0 leaves them unused, NaN where the model's are no numbers.
    """

    confidence: Tensor
    """Of the confidence term."""
    kept: Tensor
    """Of the target's log odds with the set kept."""
    removed: Tensor
    """Of the target's log odds with the set removed, as a region goes."""


class Answer(NamedTuple):
    """The scores of the candidates asked about; one row each."""

    candidates: list[int]
    scores: Tensor
    """float64 [r,4]: the terms in the order of `finecf.ops.submodular.TERMS`."""
    total: Tensor
    """float64 [r]."""
    curves: Tensor
    """float64 [r,3]: p(target) with the regions kept, p(target) with them removed (NaN where it was not computed), and
    p(predicted) with them kept."""
    reached: list[bool]
    """Whether the kept regions alone are classified as the target."""

    def best(self, largest: bool = True) -> int:
        """Position of the largest (smallest) total, the first of equal ones."""
        return int((self.total if largest else -self.total).argmax())


class Step(NamedTuple):
    """The set after one more region."""

    scores: tuple[float, ...]
    total: float
    kept: float
    removed: float
    kept_predicted: float
    reached: bool


@dataclass
class Problem:
    """What a search needs to know of one image."""

    distance: Tensor
    weights: Tensor
    sizes: list[int]
    empty_score: float
    noise: float
    max_regions: int
    max_area: float = 1.0
    stop_score: float = math.inf
    guesser: Guesser | None = None

    @property
    def regions(self) -> int:
        """M."""
        return len(self.sizes)


@dataclass
class Trace:
    """The order found so far, and what was learnt on the way.

    Attributes:
        order: regions, first the one that matters most.
        steps: the set after each of them; None where that set was not scored.
        ties: steps (from 1) at which another candidate was as good within the noise.
        compared, violations, negative: how many gains were measured again after the set had grown, how many of them
            had grown beyond the noise against diminishing returns, and how many gains of all were below zero.
        growth: the most that a gain grew.
        seen: for each step, the candidates that the model was shown there, if only with their regions kept.
        uncertain: picks whose bound could not rule out a better candidate.
    """

    problem: Problem
    order: list[int] = field(default_factory=list)
    steps: list[Step | None] = field(default_factory=list)
    ties: list[int] = field(default_factory=list)
    compared: int = 0
    violations: int = 0
    negative: int = 0
    growth: float = 0.0
    seen: list[set[int]] = field(default_factory=list)
    uncertain: int = 0

    def __post_init__(self) -> None:
        self.score = self.problem.empty_score
        self.open = list(range(self.problem.regions))
        self.gains = torch.full((self.problem.regions,), math.nan, dtype=torch.float64)
        self.area = 0

    @property
    def finished(self) -> bool:
        """Whether no region is left, or enough have been ranked."""
        return not self.open or len(self.order) >= self.problem.max_regions or self.enough(self.area, self.score)

    def enough(self, area: int, score: float) -> bool:
        """Whether a set of so many pixels and this score is one to stop at."""
        return area >= self.problem.max_area * sum(self.problem.sizes) or score >= self.problem.stop_score

    def measure(self, answer: Answer) -> None:
        """Note the gains of the candidates over the present set, and how they changed since they were last measured."""
        gains = answer.total - self.score
        before = self.gains[answer.candidates]
        grown = (gains - before)[~before.isnan()]
        slack = NOISE_FACTOR * self.problem.noise
        self.look(answer)
        self.compared += len(grown)
        self.violations += int((grown > slack).sum())
        self.negative += int((gains < -slack).sum())
        if len(grown):
            self.growth = max(self.growth, float(grown.max()))
        self.gains[answer.candidates] = gains

    def look(self, answer: Answer) -> None:
        """Note that the model was shown these candidates in the present step."""
        self.seen += [set() for _ in range(len(self.order) + 1 - len(self.seen))]
        self.seen[-1].update(answer.candidates)

    def take(self, answer: Answer, position: int) -> int:
        """Rank the candidate at a position of the answer next; return its region."""
        region = answer.candidates[position]
        gap = answer.total[position] - answer.total
        if int((gap <= NOISE_FACTOR * self.problem.noise).sum()) > 1:
            self.ties.append(len(self.order) + 1)
        self.append(region, step_of(answer, position))
        return region

    def keep_scored(self) -> None:
        """Leave out what was not scored before an interruption."""
        self.cut(self.steps.index(None) if None in self.steps else len(self.steps))

    def append(self, region: int, step: Step | None) -> None:
        """Rank a region next."""
        self.order.append(region)
        self.steps.append(step)
        self.open.remove(region)
        self.area += self.problem.sizes[region]
        if step is not None:
            self.score = step.total

    def gain(self, k: int) -> float:
        """By how much the region at place k raised the score."""
        ahead, own = self.steps[k - 1] if k else None, self.steps[k]
        assert own is not None
        return own.total - (self.problem.empty_score if ahead is None else ahead.total)

    def swap(self, k: int, step: Step) -> None:
        """Rank the region at place k one place earlier; `step`: the set that it then ends."""
        order = self.order
        self.steps[k - 1] = None  # an interruption in between leaves the order whole up to here
        order[k - 1], order[k] = order[k], order[k - 1]
        self.steps[k - 1] = step
        self.seen[k - 1].add(order[k - 1])
        self.seen[k] = {order[k]}  # the others were seen beside another set
        self.ties = [tie for tie in self.ties if tie not in (k, k + 1)]

    def cut(self, end: int) -> None:
        """Leave out all places from `end` on."""
        del self.order[end:], self.steps[end:]
        self.ties = [tie for tie in self.ties if tie <= end]


Search = Generator[Ask | AskSlopes, Any, None]
"""`Ask` is sent its `Answer`; `AskSlopes` its `Slopes`, or None where the model gives no gradients."""


class Guess(NamedTuple):
    """What candidates may score, [r] each: the part that the kept regions decide, and that of the removed ones."""

    kept: Tensor
    removed: Tensor
    kept_hope: Tensor
    """With what is uncertain taken as good."""
    removed_hope: Tensor


class Guesser(Protocol):
    """Guesses scores; `_surrogate.Surrogate` is one."""

    def guess(self, chosen: Chosen, candidates: list[int], slopes: Slopes | None, /) -> Guess:
        """What the set with each candidate added may score; `slopes` are of the set."""

    def learn(self, chosen: Chosen, answer: Answer, /) -> None:
        """Take in what the model said; `chosen` without the candidates."""


def step_of(answer: Answer, position: int) -> Step:
    """The set with the candidate at a position of the answer."""
    scores, (kept, removed, own) = tuple(answer.scores[position].tolist()), answer.curves[position].tolist()
    return Step(scores, float(answer.total[position]), kept, removed, own, answer.reached[position])


def greedy(trace: Trace) -> Search:
    """Each next region is the one of the largest score, all open ones being scored (Chen et al. 2024, algorithm 1)."""
    chosen = Chosen(trace.problem.distance)
    while not trace.finished:
        answer = yield Ask(chosen, trace.open)
        trace.measure(answer)
        chosen.add(trace.take(answer, answer.best()))


def bidirectional(trace: Trace, pending: int = PENDING) -> Search:
    """The best set grows from the front and the worst from the back (LiMA, Chen et al. 2025).

    The back end scores exactly only the `pending` regions whose surrogate is lowest: the score that the front end has
    just measured, with the effectiveness term of the back end's set.
    """
    problem = trace.problem
    front, back = Chosen(problem.distance), Chosen(problem.distance)
    worst: list[int] = []
    while not trace.finished:
        answer = yield Ask(front, trace.open)
        trace.measure(answer)
        best = trace.take(answer, answer.best())
        front.add(best)
        if len(trace.open) <= pending or trace.finished:
            continue
        surrogate = answer.total - problem.weights[1] * (answer.scores[:, 1] - back.effectiveness(answer.candidates))
        kept = [position for position, region in enumerate(answer.candidates) if region != best]
        lowest = sorted(kept, key=lambda position: (float(surrogate[position]), position))[:pending]
        answer = yield Ask(back, sorted(answer.candidates[position] for position in lowest))
        region = answer.candidates[answer.best(largest=False)]
        back.add(region)
        worst.append(region)
        trace.open.remove(region)
    for region in reversed(worst):
        if len(trace.order) >= problem.max_regions:
            break
        trace.open.append(region)
        trace.append(region, None)


def lazy(trace: Trace, slack: float, width: int, effort: float) -> Search:
    """Greedy, but gains that cannot win are not measured again (CELF, Leskovec et al. 2007).

    Candidates are scored anew in falling order of their last gain, `width` at a time, until the best of the new gains
    beats every older one by `slack`, or `effort` times as many as this step may cost have been scored. Exact where no
    gain grows by more than `slack`; since SMDL's function is not submodular the growth is measured and reported.
    """
    chosen = Chosen(trace.problem.distance)
    answer = yield Ask(chosen, trace.open)
    trace.measure(answer)
    chosen.add(trace.take(answer, answer.best()))
    while not trace.finished:
        stale = sorted(trace.open, key=lambda region: (-float(trace.gains[region]), region))
        most = max(width, math.ceil(effort * len(stale)))
        fresh: list[Answer] = []
        while stale:
            room = max(1, min(width, most - sum(len(each.candidates) for each in fresh)))
            answer = yield Ask(chosen, sorted(stale[:room]))
            stale = stale[room:]
            trace.measure(answer)
            fresh.append(answer)
            best = max(float(each.total.max()) for each in fresh) - trace.score
            if not stale or best >= float(trace.gains[stale[0]]) + slack:
                break
            if sum(len(each.candidates) for each in fresh) >= most:
                trace.uncertain += 1
                break
        answer = _joined(fresh)
        chosen.add(trace.take(answer, answer.best()))


EARLY: Final = 0.3
"""The share of the regions that is ranked with more candidates, and with gradients."""
WINDOW: Final = {"early": (0.14, 0.08), "late": (0.04, 0.04)}
"""How many candidates are scored, as shares of all regions: with the regions kept alone, and both ways. What so few of
them miss, `swaps` mends for two images each."""
ONE_SIDED: Final = 8.0
"""Where the kept images tell the candidates apart by so many times more than the removed ones, they alone are run."""

TRIES: Final = 2.0
"""Swaps tried at most, for each region."""

SLOPES_COST: Final = 5
"""Images that slopes cost: two forwards and three backwards. They are not asked for where they spare no more."""


def window(trace: Trace, wider: float = 1.0) -> Search:
    """Greedy over a window of the most promising candidates of each step (the pruning is PhaseWin's idea).

    The window holds the candidates whose guessed scores (`_surrogate.py`; ours) are the highest; in the first third of
    the order it is wider, and the guess also reads the model's gradients. Where the guess says that the candidates
    hardly differ with the regions removed, more are scored with the regions kept alone, and only the best of them both
    ways. Where the head does not fold there is no guess, and phases stand in. In the end `swaps` looks for what the
    windows have missed. `wider`: how many times as many candidates as usual are scored.
    """
    if trace.problem.guesser is None:
        yield from phases(trace, share=0.2, picks=0.5)
    else:
        yield from guided(trace, trace.problem.guesser, wider)
    yield from swaps(trace)


def guided(trace: Trace, guesser: Guesser, wider: float) -> Search:
    """Greedy over windows of candidates whose guesses are the highest."""
    problem = trace.problem
    chosen = Chosen(problem.distance)
    answer: Answer
    while not trace.finished:
        # The single regions are known already: all of them are looked at in the first step.
        asked = trace.open
        if trace.order:
            wide, both = _widths(len(trace.order), problem.regions, wider)
            slopes: Slopes | None = None
            spared = 2 * (len(trace.open) - both)
            if len(trace.order) < EARLY * problem.regions and spared > SLOPES_COST:
                slopes = yield AskSlopes(chosen)
            guess = guesser.guess(chosen, trace.open, slopes)
            ranked = (guess.kept_hope + guess.removed_hope).argsort(descending=True, stable=True)
            top = ranked[:wide]
            told_apart, told_removed = (
                float(part[top].max() - part[top].min() + (hope - part)[top].mean())
                for part, hope in ((guess.kept, guess.kept_hope), (guess.removed, guess.removed_hope))
            )
            # As many candidates both ways cost no more, but where the removed images never count.
            spares = wide > both or problem.weights[3] == 0
            if len(ranked) > both and spares and told_apart > ONE_SIDED * told_removed:
                positions = top.sort().values
                answer = yield Ask(chosen, [trace.open[i] for i in positions.tolist()], removed=False)
                guesser.learn(chosen, answer)
                if problem.weights[3] == 0:  # nothing is left out of the scores
                    trace.measure(answer)
                    chosen.add(trace.take(answer, answer.best()))
                    continue
                trace.look(answer)
                best = answer.candidates[int((answer.total + guess.removed[positions]).argmax())]
                asked = [best]
            else:
                asked = sorted(trace.open[i] for i in ranked[:both].tolist())
        answer = yield Ask(chosen, asked)
        guesser.learn(chosen, answer)
        trace.measure(answer)
        chosen.add(trace.take(answer, answer.best()))


def _widths(ranked: int, regions: int, wider: float) -> tuple[int, int]:
    wide, both = WINDOW["early" if ranked < EARLY * regions else "late"]
    return max(2, round(wider * wide * regions)), max(2, round(wider * both * regions))


def swaps(trace: Trace) -> Search:
    """Rank regions earlier that the windows have missed (ours).

    A region that was not looked at in a step and is ranked in the next one, with more gain, may have been worth more in
    that step, too. Where it is, the two swap places, and the region is compared with the one before. This changes the
    set between the two alone: all other sets stay as they were scored. Where that set is one to stop at, the order ends
    with it. At most `TRIES` times as many sets are scored as there are regions.
    """
    problem = trace.problem
    slack = NOISE_FACTOR * problem.noise
    left = round(TRIES * problem.regions)
    last = 1
    while last < len(trace.order):
        for k in range(last, 0, -1):
            region, step = trace.order[k], trace.steps[k - 1]
            if step is None or region in trace.seen[k - 1] or trace.gain(k) <= trace.gain(k - 1) + slack:
                break
            if left == 0:
                return
            left -= 1
            ahead = Chosen.of(problem.distance, trace.order[: k - 1])
            answer = yield Ask(ahead, [region], removed=bool(problem.weights[3] != 0))
            more = float(answer.total[0]) - step.total
            if more <= slack:
                trace.seen[k - 1].add(region)
                if more >= -slack and k not in trace.ties:
                    trace.ties = sorted([*trace.ties, k])
                break
            trace.swap(k, step_of(answer, 0))
            area = sum(problem.sizes[each] for each in trace.order[:k])
            if trace.enough(area, float(answer.total[0])):
                trace.cut(k)
        last += 1


def phases(trace: Trace, share: float, picks: float) -> Search:
    """Phases (after PhaseWin, Chen et al. 2025): all open regions are scored, and the best of them form a window.

    Within a phase only the window is scored again. It holds `share` of the open regions, and the phase lasts until
    `picks` of the window are ranked.
    """
    chosen = Chosen(trace.problem.distance)
    while not trace.finished:
        answer = yield Ask(chosen, trace.open)
        trace.measure(answer)
        size = min(len(trace.open), max(2, math.ceil(share * len(trace.open))))
        ranked = sorted(range(len(answer.candidates)), key=lambda i: (-float(answer.total[i]), i))
        members = [answer.candidates[position] for position in ranked[:size]]
        turns = max(1, round(picks * size))
        region = trace.take(answer, ranked[0])
        chosen.add(region)
        members.remove(region)
        for _ in range(turns - 1):
            if trace.finished or not members:
                break
            answer = yield Ask(chosen, sorted(members))
            trace.measure(answer)
            region = trace.take(answer, answer.best())
            chosen.add(region)
            members.remove(region)


def _joined(answers: Sequence[Answer]) -> Answer:
    """Several answers as one, its candidates ascending."""
    candidates = [region for answer in answers for region in answer.candidates]
    order = sorted(range(len(candidates)), key=candidates.__getitem__)
    reached = [flag for answer in answers for flag in answer.reached]
    return Answer(
        [candidates[i] for i in order],
        torch.cat([answer.scores for answer in answers])[order],
        torch.cat([answer.total for answer in answers])[order],
        torch.cat([answer.curves for answer in answers])[order],
        [reached[i] for i in order],
    )


def prefixes(trace: Trace) -> Search:
    """Score the sets along an order that were not scored when it was found."""
    chosen = Chosen(trace.problem.distance)
    for k, region in enumerate(trace.order):
        known = trace.steps[k]
        if known is None or math.isnan(known.removed):
            answer = yield Ask(chosen, [region])
            trace.steps[k] = step_of(answer, 0)
        chosen.add(region)


SEARCHES: Final[dict[str, Callable[[Trace], Search]]] = {
    "greedy": greedy,
    "bidirectional": bidirectional,
    "window": window,
    "lazy": lambda trace: lazy(trace, slack=0.0, width=4, effort=0.1),
}
"""The searches by name, with the settings that docs/smdl.md measures."""
