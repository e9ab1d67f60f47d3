"""SMDL against a transcription of its formula, one image and one set at a time, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import DEVICE
from torch import Tensor, nn

import finecf
from finecf.explainers import Interrupted
from finecf.explainers._subset import NOISE_FACTOR
from finecf.training import load_birds_net

TERMS = ("confidence", "effectiveness", "consistency", "collaboration")


class Net(nn.Module):
    """A small convolutional net with batch norms, in eval mode; `seed` draws its weights."""

    def __init__(self, seed: int = 0, classes: int = 5) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.block = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.fc = nn.Linear(16, classes)
            for norm in (self.stem[1], self.block[1]):
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.normal_(norm.bias)
                nn.init.normal_(norm.running_mean, std=0.3)
                nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(self.fc.weight)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


def classifier(seed: int = 0, classes: int = 5, double: bool = True) -> Any:
    net = Net(seed, classes)
    return finecf.wrap((net.double() if double else net).to(DEVICE))


def pictures(count: int = 2, size: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


class Formula:
    """F(S) as the methods page writes it, for one image."""

    def __init__(self, clf: Any, image: Tensor, labels: Tensor, target: int, black: Tensor, **options: Any) -> None:
        self.clf, self.image, self.target = clf, image, target
        self.labels, self.black = labels.to(image.device), black.to(image)
        self.weights = dict.fromkeys(TERMS, 1.0) | options.get("weights", {})
        self.confidence = options.get("confidence", "entropy")
        self.variant = {name: options.get(name, "probability") for name in ("consistency", "collaboration")}
        self.regions = int(labels.max()) + 1
        self.known: dict[frozenset, Tensor] = {}
        self.alone = [self.run({region})[1] for region in range(self.regions)]
        self.whole = self.run(set(range(self.regions)))[1]

    def run(self, kept: set[int]) -> tuple[Tensor, Tensor]:
        key = frozenset(kept)
        if key not in self.known:
            shown = torch.zeros_like(self.labels, dtype=torch.bool)
            for region in kept:
                shown |= self.labels == region
            x = torch.where(shown, self.image, self.black[:, None, None])[None]
            features, logits = self.clf.features_and_logits(x)
            self.known[key] = logits[0].double(), features.double().mean((2, 3))[0]
        return self.known[key]

    def terms(self, chosen: set[int]) -> dict[str, float]:
        logits, features = self.run(chosen)
        rest_logits, rest_features = self.run(set(range(self.regions)) - chosen)
        p, classes = logits.softmax(0), len(logits)
        if self.confidence == "entropy":
            confidence = 1 + sum(float(x) * math.log(float(x) + 1e-7) for x in p) / math.log(classes)
        else:
            evidence = [math.exp(min(max(float(z), -10), 10)) for z in logits]
            confidence = 1 - classes / sum(e + 1 for e in evidence)
        effectiveness = 0.0
        if len(chosen) > 1:
            for i in chosen:
                effectiveness += min(self.angle(self.alone[i], self.alone[j]) for j in chosen if j != i)
        cosine = nn.functional.cosine_similarity
        kept = {"probability": float(p[self.target]), "cosine": float(cosine(features, self.whole, dim=0))}
        gone = {
            "probability": float(rest_logits.softmax(0)[self.target]),
            "cosine": float(cosine(rest_features, self.whole, dim=0)),
        }
        return {
            "confidence": confidence,
            "effectiveness": effectiveness,
            "consistency": kept[self.variant["consistency"]],
            "collaboration": 1 - gone[self.variant["collaboration"]],
        }

    def score(self, chosen: set[int]) -> float:
        return sum(self.weights[name] * value for name, value in self.terms(chosen).items() if self.weights[name])

    @staticmethod
    def angle(a: Tensor, b: Tensor) -> float:
        return math.acos(min(1.0, max(-1.0, float(a @ b / (a.norm() * b.norm()))))) / math.pi

    def greedy(self) -> tuple[list[int], list[float], list[float]]:
        """The order, the score of every prefix, and by how much each pick beat the next best."""
        order: list[int] = []
        scores, gaps = [], []
        while len(order) < self.regions:
            tried = {r: self.score({*order, r}) for r in range(self.regions) if r not in order}
            falling = sorted(tried.items(), key=lambda item: (-item[1], item[0]))
            order.append(falling[0][0])
            scores.append(falling[0][1])
            gaps.append(falling[0][1] - falling[1][1] if len(falling) > 1 else math.inf)
        return order, scores, gaps


OPTIONS = {
    "defaults": {},
    "evidential": {"confidence": "evidential"},
    "cosines": {"consistency": "cosine", "collaboration": "cosine"},
    "weighted": {"weights": {"confidence": 0.05, "effectiveness": 0.05, "consistency": 20, "collaboration": 5}},
    "consistency alone": {"weights": {"confidence": 0, "effectiveness": 0, "collaboration": 0}},
    "collaboration alone": {"weights": {"confidence": 0, "effectiveness": 0, "consistency": 0}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_is_the_formula(seed: int, options: dict[str, Any]) -> None:
    clf, images = classifier(seed), pictures(3, seed=seed)
    labels = finecf.regions.grid(12, 12, 9)
    black = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    found = finecf.SMDL(clf, micro_batch=7, baseline=black, **options).explain(images, regions=labels)
    for image, result in zip(images, found, strict=True):
        formula = Formula(clf, image, labels, result.target, black, **options)
        order, scores, gaps = formula.greedy()
        assert min(gaps) > 1e-9  # no tie in these data: the orders must agree to the last rank
        assert result.order == order
        torch.testing.assert_close(result.total, torch.tensor(scores, dtype=torch.float64), rtol=0, atol=1e-9)
        assert result.tied_steps == []
        assert result.empty_score == pytest.approx(formula.score(set()), abs=1e-9)
        for k in range(9):
            terms = formula.terms(set(order[: k + 1]))
            wanted = [terms[name] for name in TERMS]
            unweighted = [name for name in TERMS if not result.weights[name]]
            computed = dict(zip(TERMS, result.scores[k].tolist(), strict=True))
            for name, value in zip(TERMS, wanted, strict=True):
                if name not in unweighted:
                    assert computed[name] == pytest.approx(value, abs=1e-9)


def test_the_curves_are_the_models_probabilities() -> None:
    clf, images = classifier(2), pictures(1)
    labels = finecf.regions.grid(12, 12, 6)
    for weights in ({}, {"collaboration": 0}):
        (result,) = finecf.SMDL(clf, weights=weights).explain(images, target=3, regions=labels)
        formula = Formula(clf, images[0], labels, 3, torch.zeros(3, dtype=torch.float64))
        for k in range(7):
            kept = set(result.order[:k])
            rest = set(range(6)) - kept
            assert float(result.insertion[k]) == pytest.approx(float(formula.run(kept)[0].softmax(0)[3]), abs=1e-9)
            assert float(result.deletion[k]) == pytest.approx(float(formula.run(rest)[0].softmax(0)[3]), abs=1e-9)
        assert result.best_prefix == int(result.total.argmax()) + 1
        sufficient = [k for k in range(1, 7) if int(formula.run(set(result.order[:k]))[0].argmax()) == 3]
        assert result.sufficient_prefix == (sufficient[0] if sufficient else None)


def test_the_trained_net_gives_the_formulas_order() -> None:
    net, _ = load_birds_net()
    drawn = finecf.data.SyntheticBirds("test", n=2)
    images = torch.stack([drawn.tensors()[i][0] for i in range(2)])
    images, clf = images.to(DEVICE), finecf.wrap(net.to(DEVICE))
    labels = finecf.regions.grid(128, 128, 9)
    found = finecf.SMDL(clf, baseline="mean").explain(images, regions=labels)
    for image, result in zip(images, found, strict=True):
        order, _, gaps = Formula(clf, image, labels, result.target, image.mean((1, 2))).greedy()
        clear = [k for k, gap in enumerate(gaps) if gap <= NOISE_FACTOR * result.noise]
        end = clear[0] if clear else len(order)
        assert end > 0
        assert result.order[:end] == order[:end]
        assert result.noise < 1e-4


@pytest.mark.parametrize("search", ["greedy", "bidirectional", "window", "lazy"])
def test_batches_and_budgets_do_not_show(search: str) -> None:
    clf, images = classifier(4), pictures(5)
    maps = [finecf.regions.grid(12, 12, count) for count in (4, 9, 16, 12, 6)]
    alone = [
        finecf.SMDL(clf, search=search, micro_batch=1).explain(image, regions=labels)[0]
        for image, labels in zip(images, maps, strict=True)
    ]
    for options in ({"micro_batch": 5}, {"micro_batch": 64}, {"memory_budget": 20_000}, {}):
        together = finecf.SMDL(clf, search=search, **options).explain(images, regions=maps)
        for one, other in zip(alone, together, strict=True):
            assert one.order == other.order
            torch.testing.assert_close(one.total, other.total, rtol=0, atol=1e-9)
            assert sorted(one.order) == list(range(one.region_count))


def test_a_greedy_ranking_costs_what_the_methods_page_counts_and_less() -> None:
    clf, images = classifier(), pictures(1)
    m = 36
    (result,) = finecf.SMDL(clf, micro_batch=4).explain(images, regions=finecf.regions.grid(12, 12, m))
    assert m * (m + 1) - 10 < result.evaluations <= m * (m + 1) + m + 1
    (result,) = finecf.SMDL(clf, search="lazy").explain(images, regions=finecf.regions.grid(12, 12, m))
    assert result.evaluations < m * (m + 1) / 3


def test_the_users_model_is_not_changed() -> None:
    net = Net().to(DEVICE).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.warns(UserWarning, match="train mode"):
        finecf.SMDL(finecf.wrap(net, layer="block")).explain(
            pictures(1).float(), regions=finecf.regions.grid(12, 12, 4)
        )
    assert net.training
    assert net.block.training
    assert isinstance(net.stem[1], nn.BatchNorm2d)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_changed_model_is_copied_again() -> None:
    clf, images = classifier(), pictures(1)
    labels = finecf.regions.grid(12, 12, 6)
    explainer = finecf.SMDL(clf)
    explainer.explain(images, regions=labels)
    with torch.no_grad():
        clf.model.fc.weight.neg_()
    (again,), (fresh,) = (each.explain(images, regions=labels) for each in (explainer, finecf.SMDL(clf)))
    assert again.order == fresh.order
    assert torch.equal(again.total, fresh.total)


def test_stopping_early_is_a_prefix() -> None:
    clf, images = classifier(5), pictures(1)
    labels = finecf.regions.grid(12, 12, 16)
    (whole,) = finecf.SMDL(clf).explain(images, regions=labels)
    (few,) = finecf.SMDL(clf, max_regions=5).explain(images, regions=labels)
    assert few.order == whole.order[:5]
    (half,) = finecf.SMDL(clf, max_area=0.5).explain(images, regions=labels)
    assert half.order == whole.order[:8]
    stop = float(whole.total[2])
    (scored,) = finecf.SMDL(clf, stop_score=stop).explain(images, regions=labels)
    assert scored.order == whole.order[: 1 + int((whole.total >= stop).nonzero()[0])]
    assert few.evaluations < whole.evaluations
    assert few.maps["saliency"].unique().numel() == 6  # five that were ranked, and the rest


def test_the_saliency_keeps_the_order() -> None:
    (result,) = finecf.SMDL(classifier(6)).explain(pictures(1), regions=finecf.regions.grid(12, 12, 16))
    saliency, labels = result.maps["saliency"], result.maps["regions"]
    values = [float(saliency[labels == region].unique()) for region in result.order]
    assert values[0] == 1
    assert values[-1] == 0
    assert all(one > two for one, two in itertools.pairwise(values))


def test_what_a_result_holds_is_kept_in_its_file(tmp_path: Any) -> None:
    (result,) = finecf.SMDL(classifier()).explain(
        pictures(1), regions=finecf.regions.grid(12, 12, 9), sources=["one.png"]
    )
    again = finecf.load(result.save(tmp_path / "one.safetensors"))
    assert isinstance(again, finecf.SMDLExplanation)
    assert again.summary() == result.summary()
    assert again.order == result.order
    for name in ("scores", "total", "insertion", "deletion"):
        assert torch.equal(getattr(again, name), getattr(result, name))
    assert torch.equal(again.maps["saliency"], result.maps["saliency"])


# ---- bad input


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return torch.where((x[:, 0, 0, 0] == 0)[:, None] & (x[:, 0, -1, -1] == 0)[:, None], math.nan, logits)


def test_nan_logits_name_step_and_region() -> None:
    clf = finecf.wrap(Broken().to(DEVICE), layer="block")
    images = pictures(2, dtype=torch.float32) + 0.1
    with pytest.raises(ValueError, match=r"NaN or inf logits for image 0 with 0 of its regions kept"):
        finecf.SMDL(clf).explain(images, regions=finecf.regions.grid(12, 12, 4))


class Twice(Net):
    """Gives NaN where exactly the first, second and third quarter of the image are shown."""

    def forward(self, x: Tensor) -> Tensor:
        shown = (x.mean(1)[:, [0, 0, -1, -1], [0, -1, 0, -1]] != 0).tolist()
        bad = torch.tensor([quarters == [True, True, False, False] for quarters in shown], device=x.device)
        return torch.where(bad[:, None], math.nan, super().forward(x))


def test_nan_in_the_middle_of_a_search_names_the_region() -> None:
    clf = finecf.wrap(Twice().to(DEVICE), layer="block")
    with pytest.raises(
        ValueError, match=r"image 0 with 2 of its regions (kept|removed), region \d being tried .*step 2"
    ):
        finecf.SMDL(clf, micro_batch=1).explain(
            pictures(1, dtype=torch.float32) + 0.1, regions=finecf.regions.grid(12, 12, 4)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"consistancy": 1}}, r"unknown weight 'consistancy': did you mean 'consistency'"),
        ({"weights": {"confidence": -1}}, r"weight 'confidence' must be a number of at least 0, got -1: every term"),
        ({"weights": dict.fromkeys(TERMS, 0)}, r"all weights are 0"),
        ({"search": "beam"}, r"search must be one of greedy, bidirectional, window, lazy; got 'beam'"),
        ({"regions": "voronoi"}, r"regions must be one of slico, grid, saliency; got 'voronoi'"),
        ({"confidence": "dirichlet"}, r"confidence must be one of entropy, evidential; got 'dirichlet'"),
        ({"max_area": 1.5}, r"max_area is a share of the image and must lie in \(0, 1\]"),
        ({"max_regions": 0}, r"max_regions must be at least 1"),
        ({"micro_batch": 0}, r"micro_batch must be at least 1"),
        ({"memory_budget": 0}, r"memory_budget must be a positive number"),
        ({"precision": "int8"}, r"precision must be one of float32, bfloat16, float16"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finecf.SMDL(classifier(), **options)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(12, 12, dtype=torch.int32), r"holds one region; a ranking needs at least two"),
        (torch.full((12, 12), 2) * torch.eye(12, dtype=torch.int64), r"of 0\.\.2 no pixel has 1: renumber"),
        (torch.eye(12, dtype=torch.int64) - 1, r"132 pixels have negative labels, the lowest -1"),
        (torch.zeros(6, 12, dtype=torch.int32), r"image's size \[12, 12\]; got \[6, 12\]; resize it with nearest"),
        (torch.zeros(3, 12, 12, dtype=torch.int32), r"one for each of the 1 images; got 3"),
    ],
)
def test_bad_label_maps(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finecf.SMDL(classifier()).explain(pictures(1), regions=labels)
    with pytest.raises(TypeError, match=r"must hold integers.*got torch.float32"):
        finecf.SMDL(classifier()).explain(pictures(1), regions=torch.zeros(12, 12))


def test_a_black_image_is_ranked_by_its_regions() -> None:
    """The share of the area is that of the regions, not of the pixels that are not black; all scores are ties."""
    (result,) = finecf.SMDL(classifier(), max_area=0.5).explain(
        torch.zeros(3, 12, 12, dtype=torch.float64, device=DEVICE), regions=finecf.regions.grid(12, 12, 4)
    )
    assert result.order == [0, 1]
    assert result.tied_steps == [1, 2]
    assert torch.isfinite(result.total).all()
    assert torch.isfinite(result.maps["saliency"]).all()


def test_an_empty_batch_gives_no_result() -> None:
    explainer = finecf.SMDL(classifier())
    assert explainer.explain(pictures(0)) == []
    assert explainer.attribute(pictures(0)).shape == (0, 1, 12, 12)


class Interrupting(Net):
    """Ctrl-C after some forwards."""

    left = 10**9

    def forward(self, x: Tensor) -> Tensor:
        Interrupting.left -= len(x)
        if Interrupting.left < 0:
            raise KeyboardInterrupt
        return super().forward(x)


def test_ctrl_c_keeps_what_is_done() -> None:
    clf, images = finecf.wrap(Interrupting().to(DEVICE), layer="block"), pictures(9, dtype=torch.float32)
    labels = finecf.regions.grid(12, 12, 9)
    explainer = finecf.SMDL(clf, micro_batch=4)
    whole = explainer.explain(images, regions=labels)
    Interrupting.left = sum(result.evaluations for result in whole[:8]) + 40
    with pytest.raises(Interrupted, match=r"after 9 of 9 images") as caught:
        explainer.explain(images, regions=labels)
    Interrupting.left = 10**9
    kept = caught.value.explanations
    assert [result.order for result in kept[:8]] == [result.order for result in whole[:8]]
    assert 0 < len(kept[8].order) < 9
    assert kept[8].order == whole[8].order[: len(kept[8].order)]
    assert any("interrupted after" in note for note in kept[8].notes)


class Around(Net):
    """Its logits are no function of the block's map alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean((1, 2, 3))[:, None] * torch.arange(5, device=x.device)


def test_a_window_search_does_without_guesses_where_something_goes_around_the_layer() -> None:
    clf = finecf.wrap(Around().to(DEVICE), layer="block")
    (result,) = finecf.SMDL(clf, search="window").explain(
        pictures(1, dtype=torch.float32), regions=finecf.regions.grid(12, 12, 16)
    )
    assert sorted(result.order) == list(range(16))
    (note,) = (note for note in result.notes if "not guessed" in note)
    assert "goes around the layer" in note


def test_ctrl_c_while_a_window_search_swaps_keeps_the_whole_order() -> None:
    clf, image = finecf.wrap(Interrupting().to(DEVICE), layer="block"), pictures(1, dtype=torch.float32)
    labels = finecf.regions.grid(12, 12, 36)
    explainer = finecf.SMDL(clf, search="window", micro_batch=4)
    explainer.explain(image, regions=labels)  # the first call also runs an image for the head
    (whole,), began = explainer.explain(image, regions=labels), Interrupting.left
    explainer.explain(image, regions=labels)
    Interrupting.left = began - Interrupting.left - 1
    with pytest.raises(Interrupted) as caught:
        explainer.explain(image, regions=labels)
    Interrupting.left = 10**9
    (kept,) = caught.value.explanations
    assert sorted(kept.order) == list(range(36))
    assert kept.order != whole.order  # it was ranked, and not yet swapped throughout
    assert any("perhaps before the search was done" in note for note in kept.notes)
    assert float(kept.total.mean()) < float(whole.total.mean())


def test_the_progress_bar_counts_regions(capsys: pytest.CaptureFixture[str]) -> None:
    finecf.SMDL(classifier(), region_count=9, progress=True).explain(
        pictures(2), regions=finecf.regions.grid(12, 12, 9)
    )
    assert "18/18" in capsys.readouterr().err
