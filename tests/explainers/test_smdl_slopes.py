"""The gradients that the window search guesses by: against differences, and where a model gives none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import DEVICE
from torch import Tensor, nn

import finecf
from finecf.explainers._evaluation import Evaluation, Group, Terms
from finecf.explainers._slopes import SHOWN, RegionSlopes
from finecf.explainers._subset import SLOPES_COST, Answer, Ask, AskSlopes, Chosen, Slopes
from finecf.explainers._surrogate import Surrogate
from finecf.models.runner import Runner


class Net(nn.Module):
    """Smooth, so that differences are derivatives."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.layer = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 8, 3, padding=1))
            self.fc = nn.Linear(8, classes)
            nn.init.normal_(self.fc.weight, std=3)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(x).mean((2, 3)))


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)


def terms(weights: tuple[float, ...] = (1, 1, 1, 1), confidence: str = "entropy") -> Terms:
    return Terms(torch.tensor(weights, dtype=torch.float64), confidence, "probability", "probability", None)


def group_of(runner: Runner, images: Tensor, counts: list[int], baseline: Tensor) -> Group:
    labels = torch.stack([finecf.regions.grid(12, 12, count) for count in counts]).to(DEVICE)
    return Group(
        images=runner.layout(images),
        baseline=baseline,
        labels=labels,
        regions=counts,
        target=torch.arange(len(images), device=DEVICE),
        whole=runner(images),
        whole_features=None,
        numbers=list(range(len(images))),
    )


def chosen_of(count: int, members: list[int]) -> Chosen:
    chosen = Chosen(torch.zeros(count, count, dtype=torch.float64))
    for member in members:
        chosen.add(member)
    return chosen


@pytest.mark.parametrize("confidence", ["entropy", "evidential"])
@pytest.mark.parametrize("one_colour", [True, False], ids=["colour", "image"])
def test_slopes_are_derivatives_by_how_far_a_region_is_shown(confidence: str, one_colour: bool) -> None:
    clf, images = finecf.wrap(Net().to(DEVICE), layer="layer"), pictures(3)
    runner = Runner(clf)
    baseline = torch.tensor([0.1, 0.4, 0.7], dtype=torch.float64, device=DEVICE)
    blank = baseline[:, None, None].expand(3, 12, 12)
    given = baseline if one_colour else torch.stack([blank] * 3)
    counts = [9, 4, 16]
    group = group_of(runner, images, counts, given)
    members = {0: [2, 5], 2: [7]}  # the second image asks nothing
    slopes = RegionSlopes(runner, terms(confidence=confidence), 8, 1 << 30)
    found = slopes(group, {b: AskSlopes(chosen_of(counts[b], own)) for b, own in members.items()})
    assert slopes.refusal is None
    assert list(found) == [0, 2]
    assert group.forwards == [1 + 5, 1, 1 + 5]  # two forwards and three backwards

    def outputs(b: int, shown: Tensor) -> tuple[float, float]:
        """Confidence and log odds of an image whose regions are shown so far."""
        part = shown.to(DEVICE)[group.labels[b].long()]
        p = clf.model((blank + part * (images[b] - blank))[None]).softmax(1)[0].detach()
        if confidence == "entropy":
            sure = 1 + float((p * (p + 1e-7).log()).sum()) / math.log(4)
        else:
            logits = clf.model((blank + part * (images[b] - blank))[None])[0].detach()
            sure = 1 - 4 / float((logits.clamp(-10, 10).exp() + 1).sum())
        return sure, float((p[b] / (1 - p[b])).log())

    for b, own in members.items():
        got = found[b]
        assert isinstance(got, Slopes)
        assert [each.shape for each in got] == [(counts[b],)] * 3
        kept = torch.full((counts[b],), SHOWN, dtype=torch.float64)
        kept[own] = 1
        removed = torch.full((counts[b],), 1 - SHOWN, dtype=torch.float64)
        removed[own] = 0
        for region in range(counts[b]):
            step = torch.zeros(counts[b], dtype=torch.float64)
            step[region] = 1e-4
            more, less = outputs(b, kept + step), outputs(b, kept - step)
            assert float(got.confidence[region]) == pytest.approx((more[0] - less[0]) / 2e-4, abs=1e-6)
            assert float(got.kept[region]) == pytest.approx((more[1] - less[1]) / 2e-4, abs=1e-6)
            gone, back = outputs(b, removed - step), outputs(b, removed + step)
            assert float(got.removed[region]) == pytest.approx((gone[1] - back[1]) / 2e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("weights", "cost", "zero"),
    [((0, 1, 1, 1), 4, [0]), ((1, 1, 0, 1), 4, [1]), ((1, 1, 1, 0), 3, [2]), ((0, 1, 0, 1), 2, [0, 1])],
)
def test_terms_of_no_weight_cost_nothing(weights: tuple[float, ...], cost: int, zero: list[int]) -> None:
    clf, images = finecf.wrap(Net().to(DEVICE), layer="layer"), pictures(1)
    runner = Runner(clf)
    group = group_of(runner, images, [9], torch.zeros(3, dtype=torch.float64, device=DEVICE))
    ask = {0: AskSlopes(chosen_of(9, [4]))}
    whole = RegionSlopes(runner, terms(), 8, 1 << 30)(group, ask)[0]
    before = group.forwards[0]
    part = RegionSlopes(runner, terms(weights), 8, 1 << 30)(group, ask)[0]
    assert group.forwards[0] - before == cost
    assert whole is not None
    assert part is not None
    for place, (all_of_it, some) in enumerate(zip(whole, part, strict=True)):
        assert bool(all_of_it.any())
        assert torch.equal(some, torch.zeros_like(some) if place in zero else all_of_it)


def test_effectiveness_alone_asks_for_no_gradient() -> None:
    clf = finecf.wrap(Net().to(DEVICE), layer="layer")
    only = {"confidence": 0.0, "consistency": 0.0, "collaboration": 0.0}
    (found,) = finecf.SMDL(clf, search="window", weights=only).explain(
        pictures(1), regions=finecf.regions.grid(12, 12, 16)
    )
    assert sorted(found.order) == list(range(16))
    assert not any("gradients" in note for note in found.notes)


def test_graphs_go_through_in_what_the_budget_holds() -> None:
    seen: list[int] = []

    class Counting(Net):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                seen.append(len(x))
            return super().forward(x)

    images = pictures(5)
    runner = Runner(finecf.wrap(Counting().to(DEVICE), layer="layer"))
    group = group_of(runner, images[:3].repeat(2, 1, 1, 1)[:5], [9] * 5, torch.zeros(3).double().to(DEVICE))
    group.target = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    asks = {b: AskSlopes(chosen_of(9, [b])) for b in range(5)}
    roomy, tight = (RegionSlopes(runner, terms(), most, budget) for most, budget in ((8, 1 << 30), (8, 1)))
    wide = roomy(group, asks)
    assert seen == [1, 1, 4, 4]  # the first image alone: it tells how large a graph is
    seen.clear()
    roomy(group, asks)
    assert seen == [5, 5]
    seen.clear()
    narrow = tight(group, asks)
    assert seen == [1] * 10
    for one, other in zip(wide.values(), narrow.values(), strict=True):
        assert one is not None
        assert other is not None
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


class NoGraph(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_context: Any, *_gradients: Any) -> Any:
        raise NotImplementedError  # with no message, as inference code is written


class OneWay(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(NoBackward.apply(x))


class Overwriting(Net):
    """Fine without gradients; with them, what the sigmoid's derivative needs is gone."""

    def forward(self, x: Tensor) -> Tensor:
        light = x.sigmoid()
        light.mul_(3)
        return super().forward(light)


@pytest.mark.parametrize(
    ("kind", "reason"), [(NoGraph, "grad"), (OneWay, "NotImplementedError"), (Overwriting, "overwritten")]
)
def test_a_model_without_gradients_is_searched_without_them_and_the_result_says_so(
    kind: type[Net], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pictures(1)[0]
    labels = finecf.regions.grid(12, 12, 16)
    results = [
        finecf.SMDL(finecf.wrap(net.to(DEVICE), layer="layer"), search="window").explain(image, regions=labels)[0]
        for net in (kind(), Net())
    ]
    assert [sorted(result.order) for result in results] == [list(range(16))] * 2
    said = [any("without the model's gradients" in note for note in result.notes) for result in results]
    assert said == [True, False]
    assert reason in " ".join(results[0].notes)
    monkeypatch.setattr("finecf.explainers._subset.SLOPES_COST", math.inf)
    (never,) = finecf.SMDL(finecf.wrap(kind().to(DEVICE), layer="layer"), search="window").explain(
        image, regions=labels
    )
    assert results[0].order == never.order
    assert 0 < results[0].evaluations - never.evaluations <= SLOPES_COST  # one attempt, and no more


def test_a_model_that_works_in_place_on_its_input_gives_gradients() -> None:
    class Shifting(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.5))

    runner = Runner(finecf.wrap(Shifting().to(DEVICE), layer="layer"))
    group = group_of(runner, pictures(1), [9], torch.zeros(3, dtype=torch.float64, device=DEVICE))
    slopes = RegionSlopes(runner, terms(), 8, 1 << 30)
    found = slopes(group, {0: AskSlopes(chosen_of(9, [4]))})[0]
    assert slopes.refusal is None
    assert found is not None
    assert all(bool((each != 0).all()) for each in found)


def test_a_gradient_that_is_no_number_is_known_as_such() -> None:
    class Trap(Net):
        """Its outputs are finite, but a dark pixel's root has no derivative."""

        def forward(self, x: Tensor) -> Tensor:
            light = x.sum(1, keepdim=True) - 0.3
            return super().forward(x + 0 * torch.where(light > 0, light.sqrt(), 0))

    runner = Runner(finecf.wrap(Trap().to(DEVICE), layer="layer"))
    bright = 0.8 + 0.2 * pictures(1)
    bright[..., :4, :] *= 0.1
    group = group_of(runner, bright, [9], torch.full((3,), 0.05, dtype=torch.float64, device=DEVICE))
    slopes = RegionSlopes(runner, terms(), 8, 1 << 30)
    found = slopes(group, {0: AskSlopes(chosen_of(9, [4]))})[0]
    assert slopes.refusal is None
    assert found is not None
    dark = [True] * 3 + [False] * 6
    assert found.confidence.isnan().tolist() == found.kept.isnan().tolist() == dark
    dark[4] = True  # removed, it shows the baseline
    assert found.removed.isnan().tolist() == dark
    maps = runner.with_maps(group.images)[1]
    fold = runner.classifier.fold(maps)
    assert fold is not None
    surrogate = Surrogate(fold, maps[0], maps[0] * 0, group.labels[0], 9, 0, terms().weights, "entropy")
    candidates = [0, 1, 5]
    plain, steep = (surrogate.guess(chosen_of(9, [4]), candidates, each) for each in (None, found))
    assert torch.equal(plain.kept[:2], steep.kept[:2])  # as if there were no gradient
    assert float(plain.kept[2]) != float(steep.kept[2])


@pytest.mark.parametrize("own", [True, False], ids=["own model", "copy"])
def test_the_model_is_left_as_it_was(own: bool) -> None:
    net = Net().to(DEVICE)
    net.fc.bias.requires_grad_(False)
    net.layer.training = True  # one module that its owner keeps so
    before = [parameter.requires_grad for parameter in net.parameters()]
    options = {"fold_batch_norm": not own, "channels_last": not own}
    labels = finecf.regions.grid(12, 12, 16)
    explainer = finecf.SMDL(finecf.wrap(net, layer="layer"), search="window", **options)
    (plain,) = explainer.explain(pictures(1), regions=labels)
    assert explainer._runner is not None
    assert (explainer._runner.model is net) == own
    assert not any("gradients" in note for note in plain.notes)
    assert [parameter.requires_grad for parameter in net.parameters()] == before
    assert net.layer.training
    assert not net.training
    with torch.inference_mode():
        again = finecf.SMDL(finecf.wrap(net, layer="layer"), search="window", **options)
        (inside,) = again.explain(pictures(1), regions=labels)
    assert inside.order == plain.order
    assert inside.evaluations == plain.evaluations


def test_weights_made_in_inference_mode_keep_their_flags() -> None:
    with torch.inference_mode():
        net = Net().to(DEVICE)
    before = [parameter.requires_grad for parameter in net.parameters()]
    labels = finecf.regions.grid(12, 12, 16)
    clf = finecf.wrap(net, layer="layer")
    explainer = finecf.SMDL(clf, search="window", fold_batch_norm=False, channels_last=False)
    (found,) = explainer.explain(pictures(1), regions=labels)
    assert [parameter.requires_grad for parameter in net.parameters()] == before
    assert any("without the model's gradients" in note for note in found.notes)


def test_slopes_make_the_guess_better() -> None:
    """What is lost by scoring only the three best guesses, over the first steps for some images."""

    class Deep(Net):
        """Looks far beyond a region, so that blended maps say little."""

        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(2)
                layers = [nn.Conv2d(c, 8, 5, padding=2) for c in (3, 8, 8)]
                for layer in layers:
                    nn.init.normal_(layer.weight, std=0.25)
            self.layer = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
            self.double()

    clf, images, count = finecf.wrap(Deep().to(DEVICE), layer="layer"), pictures(12), 16
    runner = Runner(clf)
    group = group_of(runner, images, [count] * 12, torch.zeros(3, dtype=torch.float64, device=DEVICE))
    group.target = group.whole.argmax(1)
    slopes = RegionSlopes(runner, terms(), 64, 1 << 30)
    evaluation = Evaluation(runner, terms(), 64, slopes)
    evaluation.start(group)
    maps = runner.with_maps(group.images)[1]
    blank = runner.with_maps(torch.zeros_like(group.images[:1]))[1][0]
    fold = clf.fold(maps)
    assert fold is not None
    lost: dict[bool, list[float]] = {True: [], False: []}

    def explore(b: int) -> Any:
        target = int(group.target[b])
        surrogate = Surrogate(fold, maps[b], blank, group.labels[b], count, target, terms().weights, "entropy")
        chosen, candidates = Chosen(group.distance[b].cpu()), list(range(count))
        answer = yield Ask(chosen, candidates)
        scored = candidates
        for _ in range(6):
            # As in a search, only what looked best is known.
            own = [answer.candidates[i] for i in scored]
            surrogate.learn(chosen, Answer(own, *(part[scored] for part in answer[1:4]), [False] * len(own)))
            best = answer.candidates[answer.best()]
            chosen.add(best)
            candidates.remove(best)
            steep = yield AskSlopes(chosen)
            answer = yield Ask(chosen, candidates)
            for used in (False, True):
                guess = surrogate.guess(chosen, candidates, steep if used else None)
                top = (guess.kept_hope + guess.removed_hope).topk(3).indices
                lost[used].append(float(answer.total.max() - answer.total[top].max()))
            scored = sorted({*top.tolist(), answer.best()})

    evaluation.run(group, [explore(b) for b in range(12)])
    assert len(lost[True]) == len(lost[False]) == 12 * 6
    assert sum(lost[True]) < 0.9 * sum(lost[False])
