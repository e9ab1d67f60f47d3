"""The geometry of Mirror-CFE against its formulas; no decoder takes part."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from explainers.mirror_nets import DEVICE, GapNet, coloured, mosaic, others, pictures, wrapped
from explainers.nets import images, network
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import finecf
from finecf.explainers._reflection import BEYOND, REFLECTIONS, GapHead, Reflected, linear_flip, map_steps, shifted_maps
from finecf.models.decoder import PRIOR_RANGE, activation_prior, contrast_prior
from finecf.training import load_birds_net, load_digits_net

HEADS = st.tuples(st.integers(0, 10_000), st.integers(2, 7), st.integers(1, 12))
"""Seed, classes and features."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def problem(seed: int, classes: int, depth: int, count: int = 5) -> tuple[GapHead, Tensor, Tensor, Tensor]:
    """A random head, latents, and for each of them two classes."""
    head = GapHead.linear(normal(classes, depth, seed=seed), normal(classes, seed=seed + 1))
    generator = torch.Generator().manual_seed(seed + 2)
    source = torch.randint(classes, (count,), generator=generator)
    target = (source + 1 + torch.randint(classes - 1, (count,), generator=generator)) % classes
    return head, normal(count, depth, seed=seed + 3), source.to(DEVICE), target.to(DEVICE)


def margin(logits: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The logit of the target less that of the source; logits [B,...,C]."""
    chosen = [each.view(-1, *[1] * (logits.ndim - 1)).expand(*logits.shape[:-1], 1) for each in (source, target)]
    return (logits.gather(-1, chosen[1]) - logits.gather(-1, chosen[0]))[..., 0]


def swapped(logits: Tensor, source: Tensor, target: Tensor) -> Tensor:
    result = logits.clone()
    for row, (s, t) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        result[row, s], result[row, t] = logits[row, t], logits[row, s]
    return result


def mirrored(head: GapHead, found: Reflected) -> Tensor:
    return head.logits(found.start + found.step)


def shipped(name: str) -> tuple[finecf.Classifier, Tensor]:
    """A net that ships with finecf, and images that it was not trained on."""
    if name == "digits":
        net, meta = load_digits_net()
        x = finecf.data.digits("test").batch()[:12]
    else:
        net, meta = load_birds_net()
        x = torch.stack([image for image, *_ in finecf.data.SyntheticBirds("test", n=6).tensors()])
    return finecf.wrap(net.to(DEVICE), class_names=meta["classes"]), x.to(DEVICE)


# ---- the reflection


@settings(deadline=None, max_examples=40)
@given(HEADS)
def test_the_two_class_mirror_is_equation_1(sizes: tuple[int, int, int]) -> None:
    head, z, source, target = problem(*sizes)
    found = head.reflect(z, source, target, "two_class")
    for row, (s, t) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        normal, offset = head.weight[t] - head.weight[s], head.bias[t] - head.bias[s]
        wanted = z[row] - 2 * (normal @ z[row] + offset) * normal / (normal @ normal)
        torch.testing.assert_close(found.start[row] + found.step[row], wanted, rtol=1e-9, atol=1e-9)
    twice = head.reflect(found.start + found.step, source, target, "two_class")
    # Between two classes of nearly equal weights the mirror is far away, and what is rounded there is as much larger.
    far = max(1.0, float(found.step.abs().max()))
    torch.testing.assert_close(twice.start + twice.step, z, rtol=0, atol=1e-9 * far)


@settings(deadline=None, max_examples=40)
@given(HEADS, st.sampled_from(["closed_form", "two_class"]))
def test_the_margin_falls_linearly_and_turns_its_sign(sizes: tuple[int, int, int], reflection: str) -> None:
    head, z, source, target = problem(*sizes)
    if reflection == "closed_form" and sizes[1] > sizes[2]:
        return  # the logits cannot all be kept: see below
    assume(float(torch.linalg.cond(head.weight)) < 1e4)
    found = head.reflect(z, source, target, reflection)
    before = margin(head.logits(z), source, target)
    for k in (0.0, 0.25, 0.5, 0.9, 1.0):
        after = margin(head.logits(z + k * found.step), source, target)
        torch.testing.assert_close(after, (1 - 2 * k) * before, rtol=1e-7, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(0, 6))
def test_the_closed_form_swaps_two_logits_and_leaves_the_others(seed: int, classes: int, more: int) -> None:
    head, z, source, target = problem(seed, classes, classes + more)
    assume(float(torch.linalg.cond(head.weight)) < 1e4)
    assert head.rank == classes
    found = head.reflect(z, source, target, "closed_form")
    before = head.logits(z)
    torch.testing.assert_close(mirrored(head, found), swapped(before, source, target), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.logits, before)
    torch.testing.assert_close(found.slope, head.logits(z + found.step) - before, rtol=1e-7, atol=1e-7)
    # Of all latents with these logits it is the nearest: the way there lies in the span of the head's rows.
    _, _, rows = torch.linalg.svd(head.weight, full_matrices=False)
    torch.testing.assert_close((found.step @ rows.T) @ rows, found.step, rtol=1e-7, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 4))
def test_with_more_classes_than_features_it_is_the_least_squares_point(seed: int, depth: int, more: int) -> None:
    head, z, source, target = problem(seed, depth + more, depth)
    assume(float(torch.linalg.cond(head.weight)) < 1e4)
    assert head.rank == depth
    found = head.reflect(z, source, target, "closed_form")
    missed = mirrored(head, found) - swapped(head.logits(z), source, target)
    torch.testing.assert_close(missed @ head.weight, torch.zeros_like(z), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("classes", "depth"), [(2, 2), (4, 9), (6, 6), (7, 3), (5, 40)])
@pytest.mark.parametrize("seed", [0, 1])
def test_lbfgs_ends_at_the_closed_form(seed: int, classes: int, depth: int) -> None:
    head, z, source, target = problem(seed, classes, depth, count=9)
    searched, exact = (mirrored(head, head.reflect(z, source, target, how)) for how in ("lbfgs", "closed_form"))
    torch.testing.assert_close(searched, exact, rtol=0, atol=1e-4)


def test_a_head_of_two_equal_classes_has_no_boundary_between_them() -> None:
    """The pseudo-inverse knows the rank; a normal of length zero is no direction."""
    weight = normal(4, 6, seed=0)
    weight[2] = weight[1]
    head = GapHead.linear(weight, normal(4, seed=1))
    assert head.rank == 3
    z, source, target = normal(3, 6, seed=2), torch.full((3,), 1), torch.full((3,), 2)
    for reflection in ("closed_form", "two_class"):
        found = head.reflect(z, source.to(DEVICE), target.to(DEVICE), reflection)
        torch.testing.assert_close(found.step, torch.zeros_like(z), rtol=0, atol=1e-9)
        torch.testing.assert_close(found.slope, torch.zeros_like(found.logits), rtol=0, atol=1e-9)


# ---- on the map


@pytest.mark.parametrize("reflection", ["closed_form", "two_class"])
@pytest.mark.parametrize("cells", [(1, 1), (3, 5)])
def test_both_shifts_have_the_moved_latent_as_their_mean(reflection: str, cells: tuple[int, int]) -> None:
    head, _, source, target = problem(3, 4, 6)
    maps = normal(5, 6, *cells, seed=8)
    found = head.reflect(maps.mean((2, 3)), source, target, reflection)
    k = torch.tensor([0.0, 0.3, 0.5, 0.8, 1.0], dtype=torch.float64, device=DEVICE)
    wanted = found.start + k[:, None] * found.step
    uniform = shifted_maps(maps, map_steps(head, found, maps, source, target, "uniform", reflection), k)
    torch.testing.assert_close(uniform.mean((2, 3)), wanted)
    torch.testing.assert_close(uniform - uniform.mean((2, 3), keepdim=True), maps - maps.mean((2, 3), keepdim=True))
    steps = map_steps(head, found, maps, source, target, "per_cell", reflection)
    torch.testing.assert_close(shifted_maps(maps, steps, k).mean((2, 3)), wanted)


@pytest.mark.parametrize("reflection", ["closed_form", "two_class"])
def test_cells_mirrored_by_themselves_have_the_mirrored_mean(reflection: str) -> None:
    """GAP(per-cell reflection) = reflection of GAP."""
    head, _, source, target = problem(5, 4, 6)
    maps = normal(5, 6, 3, 4, seed=9)
    found = head.reflect(maps.mean((2, 3)), source, target, reflection)
    steps = map_steps(head, found, maps, source, target, "per_cell", reflection)
    whole = shifted_maps(maps, steps, maps.new_ones(5))
    for row in range(5):
        cells = maps[row].flatten(1).T
        own = head.reflect(cells, source[row].expand(12), target[row].expand(12), reflection)
        torch.testing.assert_close(whole[row].flatten(1).T, own.start + own.step)
    torch.testing.assert_close(whole.mean((2, 3)), found.start + found.step)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 6))
def test_the_spatial_prior_never_shrinks_as_k_grows(seed: int, height: int, width: int) -> None:
    cams = normal(2, 1, height, width, seed=seed)
    for prior in (activation_prior, contrast_prior):
        last = torch.zeros(1, height, width, device=DEVICE)
        for k in torch.linspace(0, 1, 21):
            mask = prior(cams[0], cams[1], k[None].to(DEVICE))
            assert set(mask.unique().tolist()) <= {0.0, 1.0}
            assert bool((mask >= last).all())
            last = mask


def test_the_contrast_prior_is_where_the_source_is_more_active_than_the_target() -> None:
    source = torch.tensor([[[1.0, 5.0, 3.0, 0.0]], [[1.0, 1.0, 1.0, 1.0]]], device=DEVICE)
    target = torch.tensor([[[1.0, 1.0, 1.0, 9.0]], [[1.0, 2.0, 1.0, 1.0]]], device=DEVICE)
    for k, wanted in ((0.0, [0, 1, 0, 0]), (0.55, [0, 1, 1, 0]), (1.0, [0, 1, 1, 0])):
        mask = contrast_prior(source, target, torch.full((2,), k, device=DEVICE), (0.1, 0.6))
        assert mask.tolist() == [[wanted], [[0, 0, 0, 0]]]  # nowhere where the target is as active everywhere


@pytest.mark.parametrize("least_and_largest", [PRIOR_RANGE, (0.4, 0.7)])
def test_the_spatial_prior_is_equation_13(least_and_largest: tuple[float, float]) -> None:
    cams = normal(2, 4, 3, 5, seed=1)
    cams[0, 3] = -1  # a class without evidence marks nothing
    places = [0.1, 0.55, 0.7, 1.0]
    masks = activation_prior(cams[0], cams[1], torch.tensor(places, device=DEVICE), least_and_largest)
    for b, k in enumerate(places):
        rho = min(max(1 - k, least_and_largest[0]), least_and_largest[1])
        for row in range(3):
            for column in range(5):
                shares = [
                    max(float(cam[b, row, column]), 0) / float(cam[b].max()) for cam in cams if float(cam[b].max()) > 0
                ]
                assert bool(masks[b, row, column]) == any(share > rho for share in shares)
    assert PRIOR_RANGE == (0.1, 0.5)
    assert float(activation_prior(-cams[0].abs(), -cams[1].abs(), torch.ones(4, device=DEVICE)).sum()) == 0


# ---- where the target wins


def scanned(logits: Tensor, slope: Tensor, target: int, points: int = 10_000) -> float | None:
    """The first k of a fine grid at which the target's logit is the largest."""
    k = torch.linspace(0, 1, points + 1, dtype=torch.float64)[:, None]
    won = (logits + k * slope).argmax(1) == target
    return float(k[int(won.int().argmax())]) if bool(won.any()) else None


@settings(deadline=None, max_examples=60)
@given(HEADS, st.sampled_from(["closed_form", "two_class"]))
def test_k_star_is_that_of_a_scan(sizes: tuple[int, int, int], reflection: str) -> None:
    head, z, source, target = problem(*sizes)
    found = head.reflect(z, source, target, reflection)
    stars = head.first_flip(found, target).tolist()
    for row, star in enumerate(stars):
        logits, slope, t = found.logits[row].cpu(), found.slope[row].cpu(), int(target[row])
        first = scanned(logits, slope, t)
        if math.isnan(star):
            assert first is None
            continue
        assert int((logits + star * slope).argmax()) == t
        assert first is None or first >= star - 2 * BEYOND
        if star > 2 * BEYOND:
            assert int((logits + (star - 2 * BEYOND) * slope).argmax()) != t
        assert first is not None or star > 1 - 1e-4 or int((logits + (star + 1e-4) * slope).argmax()) != t


@pytest.mark.parametrize(
    ("logits", "source", "wanted"),
    [
        ([2.0, 0.0, -1.0], 0, 0.5),
        ([2.0, 0.0, 0.9], 0, 0.5),  # the third class stays below the crossing
        ([2.0, 0.0, 1.5], 0, 0.75),  # the third class wins near 1/2
        ([2.0, 0.0, 1.9], 0, 0.95),
        ([2.0, 0.0, 3.0], 0, None),  # the source is not the prediction
        ([2.0, 0.0, 2.0], 0, None),  # a tie at the end
        ([0.0, 2.0, 1.0], 0, 0.0),  # the target is the prediction already
        ([0.0, 2.0, 3.0], 0, None),  # and here it falls
    ],
)
def test_k_star_of_the_closed_form_by_hand(logits: list[float], source: int, wanted: float | None) -> None:
    head = GapHead.linear(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    chosen = torch.tensor([source]), torch.tensor([1])
    found = head.reflect(torch.tensor([logits], dtype=torch.float64), *chosen, "closed_form")
    star = float(head.first_flip(found, chosen[1]))
    if wanted is None:
        assert math.isnan(star)
    else:
        assert star == pytest.approx(wanted + (BEYOND if wanted else 0), abs=1e-12)


LOGITS = st.lists(st.integers(-3, 3), min_size=3, max_size=3)


@settings(deadline=None, max_examples=300)
@given(LOGITS, LOGITS, st.integers(0, 2))
def test_linear_flip_is_exact_where_lines_are_parallel_or_meet(
    logits: list[int], slope: list[int], target: int
) -> None:
    lower, upper, never = Fraction(-10), Fraction(10), False
    for other in range(3):
        ahead, gain = logits[target] - logits[other], slope[target] - slope[other]
        if other == target:
            continue
        if gain > 0:
            lower = max(lower, Fraction(-ahead, gain))
        elif gain < 0:
            upper = min(upper, Fraction(-ahead, gain))
        else:
            never |= ahead <= 0
    found = float(
        linear_flip(
            torch.tensor(logits, dtype=torch.float64), torch.tensor(slope, dtype=torch.float64), torch.tensor(target)
        )
    )
    if never or lower >= upper or lower >= 1 or upper <= 0:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(0 if lower < 0 else float(lower) + BEYOND, abs=1e-12)


# ---- the path of a classifier


@pytest.mark.parametrize("name", ["digits", "birds"])
def test_the_shipped_nets_have_mirrors(name: str) -> None:
    classifier, x = shipped(name)
    target = others(classifier, x)
    logits = classifier.logits(x).double()
    source = logits.argmax(1)
    paths = {how: finecf.MirrorCFE(classifier, reflection=how).latent_path(x, target, 11) for how in REFLECTIONS}
    for path in paths.values():
        assert path.notes == []
        assert torch.equal(path.source, source)
        assert torch.equal(path.target, target)
        torch.testing.assert_close(path.logits[:, 0], logits, rtol=0, atol=1e-4)
        before, along = margin(path.logits[:, 0], source, target), margin(path.logits, source, target)
        torch.testing.assert_close(along, (1 - 2 * path.k) * before[:, None], rtol=0, atol=2e-4)
    exact, searched = paths["closed_form"], paths["lbfgs"]
    wanted = swapped(exact.logits[:, 0], source, target)
    torch.testing.assert_close(exact.logits[:, -1], wanted, rtol=0, atol=1e-8)
    torch.testing.assert_close(searched.logits, exact.logits, rtol=0, atol=1e-4)
    assert float(exact.residual.max()) < 1e-8
    assert float(paths["two_class"].residual.max()) > 1e-2
    for path in (exact, paths["two_class"]):
        for row in range(len(x)):
            ends = path.logits[row, 0].cpu(), (path.logits[row, -1] - path.logits[row, 0]).cpu()
            first, star = scanned(*ends, int(target[row])), float(path.k_star[row])
            assert (first is None) == math.isnan(star)
            if first is not None:
                assert star - 2 * BEYOND <= first <= star + 1e-4
    # What the head says of maps with these means is what the path says.
    features = classifier.features(x)
    for place in (0, 3, 10):
        moved = features + (exact.latents[:, place] - exact.latents[:, 0])[:, :, None, None]
        torch.testing.assert_close(classifier.logits_from(moved).double(), exact.logits[:, place], rtol=0, atol=1e-3)


def test_first_flip_and_confidences_are_read_off_the_logits() -> None:
    classifier, x = wrapped(), pictures(6)
    path = finecf.MirrorCFE(classifier).latent_path(x, others(classifier, x), 40)  # 1/2 is not among them
    torch.testing.assert_close(path.probabilities.sum(-1), torch.ones_like(path.probabilities[..., 0]))
    for row in range(6):
        s, t = int(path.source[row]), int(path.target[row])
        torch.testing.assert_close(path.confidences[row], path.probabilities[row][:, [s, t]])
        won = [float(k) for k, logits in zip(path.k, path.logits[row], strict=True) if int(logits.argmax()) == t]
        assert float(path.first_flip[row]) == won[0]
        assert path.k_star[row] <= won[0] < path.k_star[row] + 1 / 39
    early = finecf.MirrorCFE(classifier).latent_path(x, others(classifier, x), [0.0, 0.2])
    assert early.first_flip.isnan().all()
    assert early.k.tolist() == [0.0, 0.2]


def test_results_do_not_depend_on_the_batch() -> None:
    classifier, x = wrapped(GapNet().double()), pictures(7).double()
    target = others(classifier, x)
    for reflection in ("closed_form", "two_class"):
        explainer = finecf.MirrorCFE(classifier, reflection=reflection)
        together = explainer.latent_path(x, target)
        distances = explainer.class_distances(x)
        for row in range(7):
            alone = explainer.latent_path(x[row], int(target[row]))
            for name in ("latents", "logits", "k_star", "residual"):
                one, several = getattr(alone, name)[0], getattr(together, name)[row]
                torch.testing.assert_close(one, several, rtol=0, atol=1e-12, equal_nan=True)
            own = explainer.class_distances(x[row])
            torch.testing.assert_close(own.distance[0], distances.distance[row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("reflection", ["closed_form", "two_class"])
@pytest.mark.parametrize("classes", [5, 16])
def test_class_distances_agree_with_the_path_target_by_target(reflection: str, classes: int) -> None:
    classifier, x = wrapped(GapNet(classes=classes).double()), pictures(6).double()
    found = finecf.MirrorCFE(classifier, reflection=reflection, memory_budget=30_000).class_distances(x)
    free = finecf.MirrorCFE(classifier, reflection=reflection)
    torch.testing.assert_close(free.class_distances(x).distance, found.distance)
    assert torch.equal(found.source, classifier.logits(x).argmax(1))
    for row in range(6):
        own = int(found.source[row])
        assert float(found.distance[row, own]) == 0
        assert math.isnan(float(found.k_star[row, own]))
        for other in set(range(classes)) - {own}:
            path = free.latent_path(x[row], other, [0.0, 1.0])
            torch.testing.assert_close(found.k_star[row, other], path.k_star[0], equal_nan=True)
            if path.k_star.isnan():
                assert float(found.distance[row, other]) == math.inf
            else:
                length = float((path.latents[0, 1] - path.latents[0, 0]).norm() * path.k_star[0])
                assert float(found.distance[row, other]) == pytest.approx(length, rel=1e-9)
        ranked = sorted(set(range(classes)) - {own}, key=lambda c: (float(found.distance[row, c]), c))
        assert found.nearest(3)[row].tolist() == ranked[:3]
        assert found.nearest(99)[row].tolist() == ranked


def test_distances_from_another_source_than_the_prediction() -> None:
    explainer = finecf.MirrorCFE(mosaic())
    found = explainer.class_distances(coloured((0.3, 0.2, 0.9)), source="red")
    assert found.distance[0, 0] == 0
    assert found.distance[0, 1] == math.inf  # blue wins all the way
    assert found.distance[0, 2] == 0
    assert found.k_star[0, 2] == 0
    (path,) = [explainer.latent_path(coloured((0.3, 0.2, 0.9)), "green", source="red")]
    assert path.k_star.isnan().all()
    assert path.first_flip.isnan().all()


def test_classes_of_equal_logits_are_nowhere_rather_than_nan() -> None:
    net = GapNet()
    with torch.no_grad():
        net.fc.weight[1] = net.fc.weight[0]
        net.fc.bias[1] = net.fc.bias[0]
    for reflection in ("closed_form", "two_class"):
        found = finecf.MirrorCFE(wrapped(net), reflection=reflection).class_distances(pictures(6), source=0)
        assert (found.distance[:, 1] == math.inf).all()
        assert found.k_star[:, 1].isnan().all()
        assert not found.distance.isnan().any()


def test_more_classes_than_features_are_told() -> None:
    classifier, x = wrapped(GapNet(classes=16).double()), pictures(4).double()
    path = finecf.MirrorCFE(classifier).latent_path(x, others(classifier, x))
    wanted = swapped(path.logits[:, 0], path.source, path.target)
    torch.testing.assert_close(path.residual, (path.logits[:, -1] - wanted).abs().amax(1))
    (note,) = path.notes
    assert note.startswith("the head's weight has rank 12 for 16 classes: the logits cannot all be kept")
    assert f"miss the swapped ones by up to {float(path.residual.max()):.2g}" in note
    assert float(path.residual.max()) > 0.01


# ---- heads that are not linear


def test_a_head_that_is_not_linear_is_searched() -> None:
    classifier, x = wrapped(GapNet(hidden=10).double()), pictures(5).double()
    target = others(classifier, x)
    path = finecf.MirrorCFE(classifier, reflection="lbfgs").latent_path(x, target, 5)
    assert float(path.residual.max()) < 1e-3
    step = path.latents[:, -1] - path.latents[:, 0]

    def at(row: int, k: Tensor) -> Tensor:
        """Whether the model's own layers call the latent at k the target."""
        with torch.no_grad():
            return classifier.model.fc(path.latents[row, 0] + k[:, None] * step[row]).argmax(1) == target[row]

    with torch.no_grad():
        torch.testing.assert_close(path.logits, classifier.model.fc(path.latents), rtol=0, atol=1e-9)
    grid = torch.linspace(0, 1, 5001, dtype=torch.float64, device=DEVICE)
    for row in range(5):
        won = at(row, grid)
        star = path.k_star[row]
        assert bool(won.any()) == (not math.isnan(float(star)))
        first = grid[int(won.int().argmax())]
        assert star - 2 * BEYOND <= first <= star + 1 / 5000
        assert bool(at(row, star[None]))
        assert not bool(at(row, star[None] - 3 * BEYOND))


def test_no_flip_is_found_where_a_head_that_is_not_linear_has_none() -> None:
    classifier, x = wrapped(GapNet(hidden=10).double()), pictures(8).double()
    order = classifier.logits(x).argsort(1)
    path = finecf.MirrorCFE(classifier, reflection="lbfgs").latent_path(x, order[:, 0], 501, source=order[:, 1])
    assert (path.logits.argmax(-1) != path.target[:, None]).all()
    assert path.k_star.isnan().all()


@pytest.mark.parametrize("reflection", ["closed_form", "two_class"])
def test_a_head_that_is_not_linear_needs_lbfgs(reflection: str) -> None:
    explainer = finecf.MirrorCFE(wrapped(GapNet(hidden=10)), reflection=reflection)
    for call in (lambda: explainer.latent_path(pictures(2), 0), lambda: explainer.class_distances(pictures(2))):
        with pytest.raises(
            ValueError, match=rf'reflection \'{reflection}\' needs a linear head.*use reflection="lbfgs"'
        ):
            call()


@pytest.mark.parametrize("kind", ["first_linear", "generic"])
@pytest.mark.parametrize("reflection", ["closed_form", "lbfgs"])
def test_a_model_without_average_pooling_is_refused(kind: str, reflection: str) -> None:
    explainer = finecf.MirrorCFE(finecf.wrap(network(kind), layer="trunk"), reflection=reflection)
    with pytest.raises(
        ValueError, match=r"layer 'trunk' reads more than the mean over cells.*finecf\.FGVCE and finecf\.SMDL explain"
    ):
        explainer.latent_path(images(2), 0)


@pytest.mark.parametrize(("hidden", "reflection"), [(0, "closed_form"), (0, "lbfgs"), (10, "lbfgs")])
def test_a_model_in_train_mode_is_mirrored_as_in_eval_mode(hidden: int, reflection: str) -> None:
    """Dropout in the head draws nothing, and no statistics move."""
    net, x = GapNet(hidden=hidden), pictures(4)
    target = others(wrapped(net), x)
    wanted = finecf.MirrorCFE(wrapped(net), reflection=reflection).latent_path(x, target)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    classifier = wrapped(net)
    with pytest.warns(UserWarning, match="train mode"):
        found = finecf.MirrorCFE(classifier, reflection=reflection).latent_path(x, target)
    assert torch.equal(found.logits, wanted.logits)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_changed_model_is_read_again() -> None:
    net, x = GapNet(), pictures(3)
    classifier = wrapped(net)
    explainer = finecf.MirrorCFE(classifier)
    explainer.latent_path(x, others(classifier, x))
    with torch.no_grad():
        net.fc.weight.neg_()
    target = others(classifier, x)
    again, fresh = (each.latent_path(x, target) for each in (explainer, finecf.MirrorCFE(wrapped(net))))
    assert torch.equal(again.logits, fresh.logits)


# ---- what is given


def test_classes_by_name_index_tensor_and_one_for_all() -> None:
    explainer, x = finecf.MirrorCFE(mosaic()), coloured((0.6, 0.3, 0.2), (0.6, 0.4, 0.3))
    wanted = explainer.latent_path(x, torch.tensor([1, 1]))
    for target in (1, "green", ["green", "green"], ["green", 1], [1, 1]):
        assert torch.equal(explainer.latent_path(x, target).logits, wanted.logits)
    alone = explainer.latent_path(x[0], "green")
    torch.testing.assert_close(alone.logits, wanted.logits[:1])
    assert torch.equal(explainer.latent_path(x, "green", source="red").logits, wanted.logits)


def test_an_empty_batch_has_an_empty_path() -> None:
    for hidden, reflection in [(0, "closed_form"), (0, "two_class"), (0, "lbfgs"), (10, "lbfgs")]:
        explainer = finecf.MirrorCFE(wrapped(GapNet(hidden=hidden)), reflection=reflection)
        path = explainer.latent_path(pictures(0), [], 3)
        assert path.logits.shape == (0, 3, 4)
        assert path.latents.shape == (0, 3, 12)
        assert path.k_star.shape == path.residual.shape == (0,)
    explainer = finecf.MirrorCFE(finecf.wrap(network("generic"), layer="trunk"), reflection="lbfgs")
    assert explainer.latent_path(images(0), []).logits.shape == (0, 11, 5)
    with pytest.raises(ValueError, match=r"reads more than the mean over cells"):  # no image has shown it before
        explainer.latent_path(images(2), 0)
    found = finecf.MirrorCFE(wrapped(GapNet(classes=16))).class_distances(pictures(0))
    assert found.distance.shape == (0, 16)
    assert found.nearest().shape == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": "greem"}, ValueError, r"unknown class 'greem': did you mean 'green'"),
        ({"target": 3}, ValueError, r"class index 3 is out of range; the classifier has classes 0\.\.2"),
        ({"target": [1, 2, 1]}, ValueError, r"one for each of the 2 images; got 3"),
        ({"target": 1.5}, TypeError, r"not iterable|expected its index or its name"),
        ({"target": [1, "red"]}, ValueError, r"predicted class of image 1 are the same, 'red': there is no boundary"),
        ({"target": 1, "source": [1, 0]}, ValueError, r"target and source of image 0 are the same, 'green'"),
        ({"target": 1, "steps": 1}, ValueError, r"steps must be at least 2.*got 1"),
        ({"target": 1, "steps": [0.0, 1.2]}, ValueError, r"steps must be a number, or k between 0 and 1; got"),
        ({"target": 1, "steps": [math.nan]}, ValueError, r"steps must be a number, or k between 0 and 1; got"),
        ({"target": 1, "steps": []}, ValueError, r"steps must be a number, or k between 0 and 1; got"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    x = coloured((0.6, 0.3, 0.2), (0.6, 0.4, 0.3))
    with pytest.raises(error, match=message):
        finecf.MirrorCFE(mosaic()).latent_path(x, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reflection": "newton"}, r"reflection must be one of closed_form, lbfgs, two_class; got 'newton'"),
        ({"shift": "random"}, r"shift must be one of uniform, per_cell; got 'random'"),
        ({"shift": "per_cell", "reflection": "lbfgs"}, r'shift="per_cell" needs a reflection.*not "lbfgs"'),
        ({"untrained_pairs": "allow"}, r"untrained_pairs must be one of warn, refuse; got 'allow'"),
        ({"resolution": 0}, r"resolution is a step of k and must lie in \(0, 0\.5\]; got 0"),
        ({"resolution": 0.6}, r"resolution is a step of k and must lie in \(0, 0\.5\]; got 0\.6"),
        ({"micro_batch": 0}, r"micro_batch must be at least 1, or None; got 0"),
        ({"memory_budget": 0}, r"memory_budget must be a positive number"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finecf.MirrorCFE(mosaic(), **options)


def test_distances_are_not_searched() -> None:
    with pytest.raises(ValueError, match=r"class_distances needs a reflection without a search"):
        finecf.MirrorCFE(mosaic(), reflection="lbfgs").class_distances(coloured((0.6, 0.3, 0.2)))


def test_a_head_given_as_a_function_is_searched() -> None:
    net = GapNet()
    given_head = finecf.wrap(net, layer="block", head=lambda maps: net.fc(maps.mean((2, 3))))
    x = pictures(3)
    target = others(given_head, x)
    found = finecf.MirrorCFE(given_head, reflection="lbfgs").latent_path(x, target)
    exact = finecf.MirrorCFE(wrapped(net)).latent_path(x, target)
    torch.testing.assert_close(found.logits, exact.logits, rtol=0, atol=1e-3)
    assert isinstance(net.fc, nn.Linear)
    with pytest.raises(ValueError, match=r"a function given by the user.*use reflection=\"lbfgs\""):
        finecf.MirrorCFE(given_head).latent_path(x, target)
