"""Trimming a counterfactual: the linear programme of a round against SciPy's, whole searches where the answer is known,
and what is promised of any."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explainers.mirror_nets import DEVICE, SIDE, GapNet, coloured, mosaic, others, pictures, wrapped
from explainers.test_mirror import CHANGE, fitted
from scipy.optimize import linprog
from torch import Tensor, nn

import finecf
from finecf.explainers import JUST_ACROSS, Trimmed, _trim, trim
from finecf.explainers._trim import cheapest_mask
from finecf.regions.baseline import gaussian_blur


def leads(classifier: finecf.Classifier, images: Tensor, target: Tensor, blur: float = 0.0) -> Tensor:
    """Of the target over the best other class."""
    said = classifier.logits(gaussian_blur(images, blur) if blur else images).double().cpu()
    wanted = target.cpu()[:, None]
    return said.gather(1, wanted)[:, 0] - said.scatter(1, wanted, -math.inf).amax(1)


def ends(classifier: finecf.Classifier, count: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Images, others that the classifier takes for something else, and what it takes them for."""
    x, y = pictures(count, seed=1), pictures(count, seed=2)
    apart = (classifier.logits(x).argmax(1) != classifier.logits(y).argmax(1)).nonzero()[:, 0]
    assert len(apart) >= count // 3
    return x[apart], y[apart], classifier.logits(y[apart]).argmax(1)


def sizes(change: Tensor) -> Tensor:
    return change.abs().mean((1, 2, 3))


# ---- the linear programme of a round


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("reach", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_round_is_the_linear_programme(views: int, reach: float, scale: float) -> None:
    draws = torch.Generator().manual_seed(views)
    rows, cells = 24, 9
    mask = torch.rand(rows, cells, generator=draws).double()
    slope = torch.randn(rows, views, cells, generator=draws).double()
    cost = torch.rand(rows, cells, generator=draws).double()
    lead = torch.randn(rows, views, generator=draws).double()
    wanted = lead + 0.5 * torch.randn(rows, views, generator=draws).double()
    sized = torch.tensor([scale, 1.0][:views], dtype=torch.float64)  # views may be of different measures
    found = cheapest_mask(mask, lead * sized, slope * sized[:, None], cost, reach, wanted * sized)
    solved = 0
    for row in range(rows):
        bounds = [(max(0, float(at) - reach), min(1, float(at) + reach)) for at in mask[row]]
        short = wanted[row] - lead[row] + (slope[row] * mask[row]).sum(1)
        best = linprog(cost[row].numpy(), -slope[row].numpy(), -short.numpy(), bounds=bounds)
        low, high = np.array(bounds).T
        own = found[row].numpy()
        assert (own >= low - 1e-12).all()
        assert (own <= high + 1e-12).all()
        if best.status == 2:  # out of reach
            continue
        solved += 1
        assert (slope[row].numpy() @ own >= short.numpy() - 1e-4).all()
        assert float(cost[row].numpy() @ own) == pytest.approx(best.fun, abs=1e-4)
    assert solved >= 8


def test_out_of_reach_a_round_goes_as_far_as_it_can() -> None:
    mask, cost = torch.full((1, 3), 0.5, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    slope = torch.tensor([[[1.0, -2.0, 0.0]]], dtype=torch.float64)
    lead, wanted = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), 9.0, dtype=torch.float64)
    found = cheapest_mask(mask, lead, slope, cost, 0.2, wanted)
    assert found[0].tolist() == pytest.approx([0.7, 0.3, 0.3])


def test_cells_without_cost_or_slope_are_no_trouble() -> None:
    mask, cost = torch.ones(1, 3, dtype=torch.float64), torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    slope = torch.tensor([[[0.0, 1.0, 1.0]]], dtype=torch.float64)
    found = cheapest_mask(mask, torch.full((1, 1), 2.0).double(), slope, cost, 1.0, torch.full((1, 1), 0.5).double())
    assert found[0].tolist() == pytest.approx([0, 0.5, 0])  # what costs nothing comes first


# ---- whole searches


def test_of_a_linear_model_the_least_change_is_found() -> None:
    """The lead is linear in the mask, and some cells change a colour that does not count."""
    classifier = mosaic()
    x, y = coloured((0.8, 0.3, 0.2), (0.3, 0.7, 0.4)), coloured((0.2, 0.9, 0.2), (0.9, 0.2, 0.4))
    y[:, 2] += torch.linspace(0.0, 0.5, SIDE, device=DEVICE)
    y[:, 2, ::2] += 0.2
    target = torch.tensor([1, 0])
    found = trim(classifier, x, y, target, grid=(4, 4), blur=0.0, margin=0.2)
    assert found.found.all()
    wanted = 0.2 * leads(classifier, y, target)
    assert (leads(classifier, found.images, target) >= wanted - 1e-5).all()
    cells = torch.eye(16).view(16, 1, 4, 4)
    enlarge = nn.functional.interpolate(cells, SIDE, mode="bilinear", align_corners=False)[:, 0].double()
    for row, (label, other) in enumerate(((1, 0), (0, 1))):
        change = (y[row] - x[row]).double().cpu()
        cost = (enlarge * change.abs().mean(0)).mean((1, 2))
        gain = 8 * (enlarge * (change[label] - change[other])).mean((1, 2))
        assert float((gain / cost).max()) > 1.2 * float((gain / cost).min())
        start = float(leads(classifier, x, target)[row] - wanted[row])
        best = linprog(cost.numpy(), -gain.numpy()[None], [start], bounds=[(0, 1)] * 16)
        assert best.status == 0
        assert float(sizes(found.images - x)[row]) == pytest.approx(best.fun, rel=1e-3)
        np.testing.assert_allclose(found.mask[row].flatten().cpu().numpy(), best.x, atol=0.02)


def test_slopes_are_those_of_the_leads_at_the_whole_change_too() -> None:
    classifier = wrapped(GapNet().double())
    x, y, target = ends(classifier)
    change = _trim._Change.of(x.double(), y.double(), (4, 4))
    for start in (1.0, 0.6, 0.0):
        mask = torch.full((len(x), 4, 4), start, dtype=torch.float64)
        at, slopes, _ = _trim._leads(classifier, change, target, mask, 0.8)
        step = -1e-6 if start else 1e-6
        for cell in (0, 6, 15):
            moved = mask.clone()
            moved.flatten(1)[:, cell] += step
            there, _, _ = _trim._leads(classifier, change, target, moved, 0.8)
            torch.testing.assert_close((there - at) / step, slopes[:, :, cell], rtol=1e-2, atol=1e-3)
        assert float(slopes.abs().amax()) > 0.05


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_the_cheapest_mask_that_was_seen_to_suffice_is_kept(margin: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    ask = _trim._leads

    def spy(classifier: finecf.Classifier, change: Any, target: Tensor, mask: Tensor, blur: float) -> Any:
        found = ask(classifier, change, target, mask, blur)
        seen.append((mask.clone(), found[0]))
        return found

    monkeypatch.setattr(_trim, "_leads", spy)
    classifier = wrapped()
    x, y, target = ends(classifier, 40)
    found = trim(classifier, x, y, target, grid=(4, 4), margin=margin, blur=0.8)
    change = _trim._Change.of(x, y, (4, 4))
    tries = seen[1:]  # the first one tells how large a graph is
    assert len(tries) == 21
    whole = tries[0][1]
    binding = whole > 0
    binding[:, 0] = True
    cost = change.costs().cpu()
    left, spent = 0, []
    for row in range(len(x)):
        enough = [
            number
            for number, (_, each) in enumerate(tries)
            if (each[row] >= margin * whole[row])[binding[row]].all() and (each[row] > 0)[binding[row]].all()
        ]
        costs = [float((tries[number][0][row].flatten() * cost[row]).sum()) for number in enough]
        spent.append(min(costs))
        left += costs[-1] > min(costs)
        best = tries[enough[costs.index(min(costs))]][0][row]
        torch.testing.assert_close(found.mask[row].cpu().double(), best, rtol=0, atol=1e-6)
    assert left  # the last one is not always it
    torch.testing.assert_close(sizes(found.images - x).cpu().double(), torch.tensor(spent).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("blur", [0.0, 0.8])
@pytest.mark.parametrize("margin", [0.0, 0.1, 0.6])
def test_what_is_kept_suffices_and_is_a_part(blur: float, margin: float) -> None:
    classifier = wrapped()
    x, y, target = ends(classifier, 24)
    found = trim(classifier, x, y, target, blur=blur, margin=margin)
    assert found.found.all()
    assert found.mask.shape == (len(x), 8, 8)
    assert 0 <= float(found.mask.min()) <= float(found.mask.max()) <= 1
    below, above = torch.minimum(x, y) - 1e-6, torch.maximum(x, y) + 1e-6
    assert bool(((found.images >= below) & (found.images <= above)).all())
    assert (leads(classifier, found.images, target) >= margin * leads(classifier, y, target) - 1e-4).all()
    assert (classifier.logits(found.images).argmax(1) == target).all()
    assert bool(found.stands.any()) == (blur > 0)
    if blur:
        assert torch.equal(found.stands.cpu(), leads(classifier, found.images, target, blur) > 0)
        stands = leads(classifier, y, target, blur) > 0
        assert (found.stands.cpu() | ~stands).all()
        own, whole = (leads(classifier, each, target, blur)[stands] for each in (found.images, y))
        assert (own >= margin * whole - 1e-4).all()
        assert (own > 0).all()
    assert float((sizes(found.images - x) / sizes(y - x)).mean()) < 0.3 + 0.6 * margin
    enlarged = nn.functional.interpolate(found.mask[:, None], SIDE, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found.images, x + enlarged * (y - x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("cells", "size", "grid"),
    [
        ((8, 8), (128, 128), (32, 32)),  # four along a cell of the map
        ((7, 7), (224, 160), (28, 28)),
        ((8, 8), (32, 32), (16, 16)),  # no cell is smaller than two pixels
        ((7, 4), (28, 64), (14, 16)),
        ((5, 5), (5, 5), (2, 2)),
        ((1, 1), (1, 3), (1, 1)),
    ],
)
def test_a_mask_has_four_cells_along_one_of_the_map_and_none_below_two_pixels(
    cells: tuple[int, int], size: tuple[int, int], grid: tuple[int, int]
) -> None:
    assert _trim.mask_grid(cells, size) == grid


def test_unless_a_grid_is_asked_for_it_is_that() -> None:
    classifier = wrapped()
    x, y, target = ends(classifier)
    assert tuple(classifier.features(x[:1]).shape[2:]) == (4, 4)
    found = trim(classifier, x, y, target)
    assert found.mask.shape == (len(x), 8, 8)
    assert torch.equal(found.images, trim(classifier, x, y, target, grid=(8, 8)).images)


def test_choosing_cells_spares_more_than_changing_evenly() -> None:
    classifier = wrapped()
    x, y, target = ends(classifier, 40)
    evenly, chosen, fine = (trim(classifier, x, y, target, grid=grid) for grid in ((1, 1), None, (SIDE, SIDE)))
    assert evenly.mask.shape == (len(x), 1, 1)
    assert fine.mask.shape == (len(x), SIDE, SIDE)
    one, some, many = (float(sizes(each.images - x).mean()) for each in (evenly, chosen, fine))
    assert many < some < 0.9 * one


def test_more_rounds_keep_less() -> None:
    classifier = wrapped()
    x, y, target = ends(classifier, 40)
    spent = [float(sizes(trim(classifier, x, y, target, rounds=rounds).images - x).mean()) for rounds in (1, 3, 20)]
    assert spent[2] < spent[1] < spent[0] <= float(sizes(y - x).mean())


def test_what_is_not_the_target_is_given_back() -> None:
    classifier = wrapped()
    x, y, target = ends(classifier)
    y[0] = x[0]
    found = trim(classifier, x, y, target)
    assert found.found.tolist() == [False] + [True] * (len(x) - 1)
    assert not found.stands[0]
    assert torch.equal(found.images[0], y[0])
    assert (found.mask[0] == 1).all()
    assert int(found.evaluations[0]) == 2


def test_where_blurring_undoes_it_the_image_alone_counts() -> None:
    class Edges(nn.Module):
        """Reads the contrast between neighbouring columns, which a blur takes away."""

        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Conv2d(1, 2, (1, 2), stride=(1, 2), bias=False)
            self.fc = nn.Linear(2, 2)
            with torch.no_grad():
                self.block.weight.copy_(torch.tensor([[0.5, 0.5], [1.0, -1.0]])[:, None, None])
                self.fc.weight.copy_(torch.tensor([[0.0, 0.0], [0.0, 10.0]]))
                self.fc.bias.copy_(torch.tensor([3.0, 0.0]))
            self.to(DEVICE).eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.block(x).mean((2, 3)))

    classifier = finecf.wrap(Edges(), layer="block")
    x = torch.full((2, 1, SIDE, SIDE), 0.5, device=DEVICE)
    y = x.clone()
    y[..., ::2] += 0.5
    y[..., 1::2] -= 0.5
    found = trim(classifier, x, y, 1, blur=2.0)
    assert found.found.all()
    assert not found.stands.any()
    assert (leads(classifier, found.images, torch.ones(2, dtype=torch.int64)) >= 0.1 * 7 - 1e-4).all()
    assert float(sizes(found.images - x).max()) == pytest.approx(0.5 * 3.7 / 10, rel=0.02)  # 10 s = 3 + 0.1 * 7


@pytest.mark.parametrize("split", [{"micro_batch": 2}, {"memory_budget": 1}])
def test_batches_and_budgets_change_nothing(split: dict[str, int]) -> None:
    classifier = wrapped(GapNet().double())
    x, y, target = (each.double() if each.is_floating_point() else each for each in ends(wrapped()))
    whole = trim(classifier, x, y, target)
    sizes_seen: list[int] = []
    handle = classifier.model.register_forward_pre_hook(lambda _, inputs: sizes_seen.append(len(inputs[0])))
    parts = trim(classifier, x, y, target, **split)
    handle.remove()
    assert max(sizes_seen) == 2 * (2 if "micro_batch" in split else 1)
    single = trim(classifier, x[1:2], y[1:2], target[1:2])
    torch.testing.assert_close(whole.images, parts.images, rtol=0, atol=1e-9)
    torch.testing.assert_close(whole.images[1:2], single.images, rtol=0, atol=1e-9)
    assert torch.equal(whole.evaluations, parts.evaluations)
    assert (whole.evaluations == 2 + 2 * 20).all()


def test_surroundings_of_the_users_change_nothing() -> None:
    classifier = wrapped()
    x, y, target = ends(classifier)
    weights = {name: each.clone() for name, each in classifier.model.state_dict().items()}
    alone = trim(classifier, x, y, target)
    with torch.inference_mode():
        inside = trim(classifier, x.clone(), y.clone(), target)
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        half = trim(classifier, x, y, target)
    for other in (inside, half):
        assert torch.equal(alone.images, other.images)
    assert all(torch.equal(weights[name], each) for name, each in classifier.model.state_dict().items())
    assert all(each.requires_grad for each in classifier.model.parameters())


def test_slopes_that_are_no_numbers_keep_what_was_found() -> None:
    class Root(GapNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * (x - x).sum((1, 2, 3), keepdim=False)[:, None].sqrt()

    classifier = wrapped(Root())
    x, y, target = ends(classifier)
    found = trim(classifier, x, y, target)
    assert found.found.all()
    assert found.images.isfinite().all()
    assert (classifier.logits(found.images).argmax(1) == target).all()
    assert float(found.mask.mean()) < 0.9


def test_a_model_that_gives_nan_is_told_of() -> None:
    class Odd(GapNet):
        def forward(self, x: Tensor) -> Tensor:
            said = super().forward(x)
            return torch.where(x.mean((1, 2, 3))[:, None] > 0.99, torch.nan, said)

    classifier = wrapped(Odd())
    x, y, target = ends(wrapped())
    y[2] = 1.0
    for size in (None, 2):  # the number is that among all images, however many are looked at together
        with pytest.raises(ValueError, match="the model gives NaN or inf for counterfactual 2 of those"):
            trim(classifier, x, y, target, micro_batch=size)


def test_where_nothing_changes_nothing_is_needed() -> None:
    classifier = wrapped()
    x = pictures(4)
    found = trim(classifier, x, x.clone(), classifier.logits(x).argmax(1))
    assert found.found.all()
    assert not found.mask.any()
    assert torch.equal(found.images, x)


def test_no_images_are_trimmed_to_none() -> None:
    none = pictures(2)[:0]
    found = trim(wrapped(), none, none, [])
    assert [len(getattr(found, field.name)) for field in dataclasses.fields(Trimmed)] == [0] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds is a whole number of at least 1; got 0"),
        ({"rounds": 2.5}, "rounds is a whole number"),
        ({"blur": -1.0}, "blur is a standard deviation in pixels, at least 0; got -1.0"),
        ({"margin": 1.0}, r"margin is a share of the lead, at least 0 and less than 1; got 1.0"),
        (
            {"grid": (0, 4)},
            r"grid is \(rows, columns\), at least one of each and at most the images' \[16, 16\] pixels",
        ),
        ({"grid": (4, 17)}, "grid is"),
        ({"grid": 4}, "grid is .*; got 4"),
        ({"grid": (4.0, 4.0)}, "grid is"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"memory_budget": 0}, "memory_budget must be a positive number"),
        ({"target": [0]}, "target must be one class, or one for each of the 3 images; got 1"),
        ({"target": "finch"}, "finch"),
        ({"counterfactuals": pictures(2)}, r"\[B,Ch,H,W\] both, as the model takes them; got \[3, 3, 16, 16\] and"),
        ({"images": pictures(3)[0]}, r"\[B,Ch,H,W\] both"),
        ({"counterfactuals": pictures(3) * math.nan}, "hold NaN or inf: leave out those that were not found"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"images": pictures(3), "counterfactuals": pictures(3, seed=4), "target": 0} | change
    with pytest.raises(ValueError, match=message):
        trim(wrapped(), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": pictures(3).byte()}, "images must be a floating tensor as the model takes it, got torch.uint8"),
        ({"counterfactuals": pictures(3).cpu().numpy()}, "counterfactuals must be a floating tensor .* got ndarray"),
    ],
)
def test_what_is_no_image_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"images": pictures(3), "counterfactuals": pictures(3, seed=4), "target": 0} | change
    with pytest.raises(TypeError, match=message):
        trim(wrapped(), **arguments)


def test_a_model_without_gradients_is_refused() -> None:
    class Cut(GapNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach()).detach()

    classifier = wrapped(Cut())
    x, y, target = ends(classifier)
    with pytest.raises(ValueError, match="found by the classifier's gradient, and this model gives none"):
        trim(classifier, x, y, target)


def test_an_explainer_says_so_before_it_draws() -> None:
    mirror, _ = fitted()
    x = pictures(4)
    target = others(mirror.classifier, x)
    with torch.inference_mode():
        classifier = wrapped(GapNet())
    still = finecf.MirrorCFE(classifier, mirror.decoder, corrections=0)
    drawn: list[int] = []
    handle = mirror.decoder.register_forward_pre_hook(lambda *_: drawn.append(1))
    with pytest.raises(ValueError, match="corrections=0 and no trim"):
        still.explain(x, target, trim=True)
    assert not drawn
    assert len(still.explain(x, target, steps=2)) == 4
    handle.remove()


# ---- of Mirror-CFE's images


@pytest.mark.parametrize("options", [{}, CHANGE])
def test_explanations_hold_what_suffices(options: dict[str, Any], tmp_path: Path) -> None:
    mirror, _ = fitted(steps=20, batch=16, learning_rate=1e-2, pairs=None, **options)
    x = pictures(24, seed=3)
    target = others(mirror.classifier, x)
    without, found = (mirror.explain(x, target, steps=3, trim=trimming) for trimming in (False, True))
    reached = [each.mirror_valid for each in found]
    assert 3 < sum(reached) < 24
    assert {(each.trimmed_margin, each.trimmed_blur) for each in found if each.mirror_valid} == {(0.1, 1.0)}
    for plain, each, valid in zip(without, found, reached, strict=True):
        assert torch.equal(plain.images, each.images)
        assert plain.trimmed_image is plain.trimmed_mask is plain.trimmed_share is plain.trimmed_stands is None
        note = "the image of k = 1 is not classified as the target, and was not trimmed"
        assert (note in each.notes) == (not valid)
        assert note not in plain.notes
        assert each.evaluations - plain.evaluations == (42 if valid else 2)
        if not valid:
            assert each.trimmed_image is each.trimmed_mask is each.trimmed_share is each.trimmed_stands is None
            assert "suffices" not in each.summary()
            continue
        one = trim(mirror.classifier, each.prepared[None].to(DEVICE), each.mirror_image[None].to(DEVICE), each.target)
        torch.testing.assert_close(each.trimmed_image, one.images[0].cpu(), rtol=0, atol=1e-4)
        torch.testing.assert_close(each.trimmed_mask, one.mask[0].cpu(), rtol=0, atol=1e-3)
        assert each.trimmed_stands == bool(one.stands[0])
        part, whole = (sizes((own - each.prepared)[None]) for own in (each.trimmed_image, each.mirror_image))
        assert each.trimmed_share == pytest.approx(float(part / whole), abs=1e-5)
        assert f"{each.trimmed_share:.1%} of the change to the image of k = 1 suffices" in each.summary()
        word = "also" if each.trimmed_stands else "but not"
        assert f"{word} where it is blurred by 1 pixels" in each.summary()
        back = finecf.load(each.save(tmp_path / "one.safetensors"))
        assert isinstance(back, finecf.MirrorExplanation)
        assert torch.equal(back.trimmed_image, each.trimmed_image)
        assert (back.trimmed_share, back.trimmed_stands) == (each.trimmed_share, each.trimmed_stands)


def test_an_explainer_takes_the_settings_of_trimming(tmp_path: Path) -> None:
    mirror, _ = fitted(steps=20, batch=16, learning_rate=1e-2, pairs=None, **CHANGE)
    x = pictures(24, seed=3)
    target = others(mirror.classifier, x)
    settings: dict[str, Any] = {"grid": (3, 5), "margin": 0.4, "blur": 0, "rounds": 6}
    every = mirror.explain(x, target, steps=2, trim=settings)
    starts, goals = (
        torch.stack([getattr(each, name) for each in every]).to(DEVICE) for name in ("prepared", "mirror_image")
    )
    together = trim(mirror.classifier, starts, goals, target, **settings)
    found = [each for each in every if each.mirror_valid]
    assert len(found) > 3
    assert [each.mirror_valid for each in every] == together.found.tolist()
    for each, image in zip(every, together.images.cpu(), strict=True):
        if not each.mirror_valid:
            continue
        torch.testing.assert_close(each.trimmed_image, image, rtol=0, atol=1e-4)
        assert each.trimmed_mask.shape == (3, 5)
        assert (each.trimmed_margin, each.trimmed_blur, each.trimmed_stands) == (0.4, 0.0, False)
        assert "suffices, mean pixel change" in each.summary()
        assert "blurred by" not in each.summary()
    back = finecf.load(found[0].save(tmp_path / "one.safetensors"))
    assert isinstance(back, finecf.MirrorExplanation)
    assert (back.trimmed_margin, back.trimmed_blur) == (0.4, 0.0)
    own, given = (mirror.explain(x[:4], target[:4], steps=2, trim=each) for each in (True, {}))
    for plain, each in zip(own, given, strict=True):
        assert (plain.trimmed_image is None) == (each.trimmed_image is None)
        if plain.trimmed_image is not None:
            assert torch.equal(plain.trimmed_image, each.trimmed_image)


def test_just_across_asks_for_less_than_the_default() -> None:
    mirror, _ = fitted(steps=20, batch=16, learning_rate=1e-2, pairs=None, **CHANGE)
    x = pictures(24, seed=3)
    target = others(mirror.classifier, x)
    every, across = (mirror.explain(x, target, steps=2, trim=each) for each in (True, JUST_ACROSS))
    changes = []
    for usual, less in zip(every, across, strict=True):
        assert (usual.trimmed_image is None) == (less.trimmed_image is None)
        if less.trimmed_image is None:
            continue
        assert int(mirror.classifier.logits(less.trimmed_image[None].to(DEVICE)).argmax()) == less.target
        assert (less.trimmed_margin, less.trimmed_blur) == (0.0, 0.0)
        changes.append([float((each.trimmed_image - each.prepared).abs().mean()) for each in (usual, less)])
    assert len(changes) > 3
    usually, less_so = torch.tensor(changes).mean(0).tolist()
    assert less_so < usually


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"sigma": 1.0, "grid": None}, ValueError, "trim has no setting sigma; it has grid, margin, blur, rounds"),
        ({"margin": 1.0}, ValueError, "margin is a share of the lead"),
        ({"grid": (0, 4)}, ValueError, r"grid is \(rows, columns\)"),
        ("yes", TypeError, "trim is True, False or settings of finecf.explainers.trim by name; got 'yes'"),
    ],
)
def test_settings_that_trimming_refuses_are_refused_before_anything_is_drawn(
    asked: Any, error: type[Exception], message: str
) -> None:
    mirror, _ = fitted()
    x = pictures(2)
    drawn: list[int] = []
    handle = mirror.decoder.register_forward_pre_hook(lambda *_: drawn.append(1))
    with pytest.raises(error, match=message):
        mirror.explain(x, others(mirror.classifier, x), trim=asked)
    handle.remove()
    assert not drawn


def test_where_a_decoder_draws_nothing_nothing_is_needed() -> None:
    mirror, _ = fitted(pairs=None, **CHANGE)
    with torch.no_grad():
        for each in mirror.decoder.parameters():
            each.zero_()
    x = pictures(3)
    predicted = mirror.classifier.logits(x).argmax(1)
    found = mirror.explain(x, predicted, steps=2, source=others(mirror.classifier, x), trim=True)
    for each in found:
        assert torch.equal(each.mirror_image, each.prepared)
        assert each.trimmed_share == 0
        assert "0.0% of the change to the image of k = 1 suffices" in each.summary()
