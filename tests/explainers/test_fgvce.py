"""FG-VCE's search: every edit is the best one, every flip is real, and the presets do what they say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from explainers.nets import CLASSES, GRID, images, network, other_classes, setting, stretch
from torch import Tensor, nn

import finecf
from finecf.explainers import PRESETS, FGVCEExplanation
from finecf.explainers.fgvce import HEAD_CANDIDATES

KINDS = ("linear", "first_linear", "generic")
CELLS = GRID[0] * GRID[1]


def edited_map(classifier: finecf.Classifier, bank: finecf.CandidateBank, x: Tensor, edits: list) -> Tensor:
    """The feature map [1,D,H,W] of an image after edits, made by hand."""
    features = classifier.features(x[None]).clone()
    for edit in edits:
        features[0, :, edit.cell[0], edit.cell[1]] = bank.rows(edit.candidate_row, edit.candidate_row + 1)[0]
    return features


def pair_losses(
    classifier: finecf.Classifier, bank: finecf.CandidateBank, x: Tensor, result: FGVCEExplanation, done: int
) -> Tensor:
    """Loss [P,N] of every pair after `done` edits, each pair through the model's own head; inf where not allowed."""
    features = edited_map(classifier, bank, x, result.edits[:done])
    start, stop = bank.class_range(result.target)
    rows = bank.rows(start, stop).to(features.device)
    cells = features[0].flatten(1).T
    cosine = nn.functional.normalize(cells, dim=1) @ nn.functional.normalize(rows, dim=1).T
    losses = torch.full((CELLS, len(rows)), math.inf, device=features.device)
    for cell in range(CELLS):
        if divmod(cell, GRID[1]) in [edit.cell for edit in result.edits[:done]]:
            continue
        maps = features.expand(len(rows), -1, -1, -1).flatten(2).clone()
        maps[:, :, cell] = rows
        logits = classifier.logits_from(maps.unflatten(2, GRID))
        weight_sim, weight_cls = result.weights
        losses[cell] = weight_sim * (1 - cosine[cell]) - weight_cls * logits.log_softmax(1)[:, result.target]
    for edit in result.edits[:done]:
        losses[:, edit.candidate_row - start] = math.inf
    return losses


@pytest.mark.parametrize("preset", ["fgvce", "exhaustive", "goyal"])
def test_every_edit_is_the_best_of_all_pairs_through_the_real_head(preset: str) -> None:
    classifier, bank = setting()
    x = images(4)
    explainer = finecf.FGVCE(classifier, bank, preset=preset, top_cells="all")
    for image, result in zip(x, explainer.explain(x, other_classes(classifier, bank, x, far=True)), strict=True):
        assert result.edits
        for done, edit in enumerate(result.edits):
            losses = pair_losses(classifier, bank, image, result, done)
            assert edit.loss == pytest.approx(float(losses.amin()), abs=2e-5)
            row = edit.candidate_row - bank.class_range(result.target)[0]
            cell = edit.cell[0] * GRID[1] + edit.cell[1]
            assert float(losses[cell, row]) == pytest.approx(float(losses.amin()), abs=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_cells_of_high_contribution_are_edited(kind: str) -> None:
    classifier, bank = setting(kind)
    x = images(3)
    explainer = finecf.FGVCE(classifier, bank, top_cells=3, max_edits=2)
    for result in explainer.explain(x, other_classes(classifier, bank, x, far=True)):
        ranked = result.maps["contribution"].flatten()
        for done, edit in enumerate(result.edits):
            better = int((ranked > ranked[edit.cell[0] * GRID[1] + edit.cell[1]]).sum())
            assert better < 3 + done


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_flip_is_a_flip_of_the_real_head(kind: str, preset: str) -> None:
    classifier, bank = setting(kind)
    x = images(4)
    targets = other_classes(classifier, bank, x)
    flips = 0
    for image, result in zip(x, finecf.FGVCE(classifier, bank, preset=preset).explain(x, targets), strict=True):
        logits = classifier.logits_from(edited_map(classifier, bank, image, result.edits))
        assert torch.allclose(logits[0], result.logits_path[-1], atol=1e-4)
        assert result.flipped == (int(logits.argmax()) == result.target)
        assert len(result.logits_path) == len(result.edits) + 1
        flips += result.flipped
        if not result.flipped:
            assert any("no solution" in note for note in result.notes)
        start, stop = bank.class_range(result.target)
        assert all(start <= edit.candidate_row < stop for edit in result.edits)
        rows = [edit.candidate_row for edit in result.edits]
        assert len(set(rows)) == len(rows)
        assert len({edit.cell for edit in result.edits}) == len(result.edits)
    if preset != "vandenhende":
        assert flips


def test_presets_weigh_and_choose_as_they_say() -> None:
    classifier, bank = setting()
    rules = {name: finecf.FGVCE(classifier, bank, preset=name).rules for name in PRESETS}
    assert (rules["fgvce"].top_cells, rules["fgvce"].top_candidates) == (20, None)
    assert (rules["paper"].top_cells, rules["paper"].top_candidates, rules["paper"].weight_sim) == (20, 50, 1.0)
    assert rules["exhaustive"].top_cells is None
    assert (rules["goyal"].top_cells, rules["goyal"].weight_sim, rules["goyal"].reuse_candidates) == (None, 0.0, False)
    assert (rules["vandenhende"].weight_sim, rules["vandenhende"].temperature) == (0.4, 0.1)
    given = finecf.FGVCE(classifier, bank, preset="paper", weight_sim=0.25, top_cells=7, top_candidates="all").rules
    assert (given.weight_sim, given.top_cells, given.top_candidates) == (0.25, 7, None)


def test_paper_preset_takes_the_most_similar_candidates() -> None:
    classifier, bank = setting()
    x = images(3)
    targets = other_classes(classifier, bank, x)
    for image, result in zip(x, finecf.FGVCE(classifier, bank, preset="paper").explain(x, targets), strict=True):
        start, stop = bank.class_range(result.target)
        cells = classifier.features(image[None])[0].flatten(1).T
        cosine = (
            nn.functional.normalize(cells, dim=1)
            @ nn.functional.normalize(bank.rows(start, stop).to(x.device), dim=1).T
        )
        for edit in result.edits:
            own = cosine[edit.cell[0] * GRID[1] + edit.cell[1]]
            assert int((own > edit.similarity + 1e-5).sum()) < 50
            assert edit.similarity == pytest.approx(float(own[edit.candidate_row - start]), abs=1e-5)


def test_balanced_weight_lets_the_span_of_the_cosine_cost_half_of_the_best_gain() -> None:
    classifier, bank = setting()
    x = images(2)
    targets = other_classes(classifier, bank, x)
    explainer = finecf.FGVCE(classifier, bank, preset="exhaustive")
    for image, result in zip(x, explainer.explain(x, targets), strict=True):
        pure = replace(result, weights=(0.0, 1.0))
        best = float(pair_losses(classifier, bank, image, pure, 0).amin())
        now = -float(result.logits_path[0].log_softmax(0)[result.target])
        cells = nn.functional.normalize(classifier.features(image[None])[0].flatten(1).T, dim=1)
        cosine = cells @ nn.functional.normalize(bank.rows(*bank.class_range(result.target)).to(x.device), dim=1).T
        span = float(cosine.amax() - cosine.amin())
        assert result.weights[0] == pytest.approx(0.5 * (now - best) / span, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_each_image_gives_alone(kind: str) -> None:
    classifier, bank = setting(kind)
    x = images(5)
    targets = other_classes(classifier, bank, x, far=True)
    assert len(set(targets)) > 1
    explainer = finecf.FGVCE(classifier, bank, minimal=True)
    together = explainer.explain(x, targets)
    for image, target, result in zip(x, targets, together, strict=True):
        (alone,) = explainer.explain(image, target)
        assert [(e.cell, e.candidate_row) for e in alone.edits] == [(e.cell, e.candidate_row) for e in result.edits]
        assert torch.allclose(alone.logits_path, result.logits_path, atol=1e-4)
        for name in alone.maps:
            assert torch.allclose(alone.maps[name].float(), result.maps[name].float(), atol=1e-3), name


def test_small_memory_gives_the_same_edits() -> None:
    classifier, bank = setting()
    x = images(3)
    targets = other_classes(classifier, bank, x, far=True)
    roomy = finecf.FGVCE(classifier, bank).explain(x, targets)
    tight = finecf.FGVCE(classifier, bank, memory_budget=40_000).explain(x, targets)
    for one, other in zip(roomy, tight, strict=True):
        assert [(e.cell, e.candidate_row) for e in one.edits] == [(e.cell, e.candidate_row) for e in other.edits]


@pytest.mark.parametrize("kind", KINDS)
def test_minimal_edits_flip_and_none_of_them_can_go(kind: str) -> None:
    classifier, bank = setting(kind)
    x = images(6)
    targets = other_classes(classifier, bank, x, far=True)
    # A candidate for every cell but little choice of cells: early edits are often made superfluous by later ones.
    explainer = finecf.FGVCE(classifier, bank, weight_sim=1.0, minimal=True)
    for image, result in zip(x, explainer.explain(x, targets), strict=True):
        if not result.flipped:
            continue
        kept = result.minimal_edits
        logits = classifier.logits_from(edited_map(classifier, bank, image, kept))
        assert int(logits.argmax()) == result.target
        assert float(logits.softmax(1)[0, result.target]) == pytest.approx(result.minimal_probability, abs=1e-4)
        for left_out in range(len(kept)):
            rest = kept[:left_out] + kept[left_out + 1 :]
            assert int(classifier.logits_from(edited_map(classifier, bank, image, rest)).argmax()) != result.target


def test_no_solution_is_a_result_with_the_whole_trace() -> None:
    classifier, bank = setting()
    x = images(6)
    targets = other_classes(classifier, bank, x, far=True)
    results = finecf.FGVCE(classifier, bank, preset="vandenhende", max_edits=1).explain(x, targets)
    failed = [result for result in results if not result.flipped]
    assert failed
    assert all(len(result.edits) == 1 and result.minimal_edits == result.edits for result in failed)
    assert all("max_edits was reached" in " ".join(result.notes) for result in failed)
    assert "not flipped" in failed[0].summary()


@pytest.mark.parametrize("kind", KINDS)
def test_refreshed_contributions_are_those_of_the_edited_map(kind: str) -> None:
    classifier, bank = setting(kind)
    x = images(4)
    targets = other_classes(classifier, bank, x, far=True)
    explainer = finecf.FGVCE(classifier, bank, top_cells=1, max_edits=3, refresh_contributions=1, weight_sim=1.0)
    several = 0
    for image, result in zip(x, explainer.explain(x, targets), strict=True):
        for done, edit in enumerate(result.edits):
            features = edited_map(classifier, bank, image, result.edits[:done])
            raw = contributions_by_hand(classifier, features, result.predicted)
            for earlier in result.edits[:done]:
                raw[earlier.cell] = -math.inf
            assert float(raw[edit.cell]) == pytest.approx(float(raw.amax()), abs=1e-5)
            several += done > 0
    assert several


def contributions_by_hand(classifier: finecf.Classifier, features: Tensor, index: int, sigma: float = 0.8) -> Tensor:
    """phi_raw [H,W] of the method page, mask by mask through the real head."""
    rows, columns = torch.meshgrid(*(torch.arange(n, device=features.device) for n in GRID), indexing="ij")
    whole = classifier.logits_from(features).softmax(1)[0, index]
    raw = torch.empty(GRID, device=features.device)
    for i in range(GRID[0]):
        for j in range(GRID[1]):
            gauss = torch.exp(-((rows - i) ** 2 + (columns - j) ** 2) / (2 * sigma**2))
            raw[i, j] = whole - classifier.logits_from(features * (1 - gauss)).softmax(1)[0, index]
    return raw


@pytest.mark.parametrize("kind", KINDS)
def test_maps_follow_their_formulas(kind: str) -> None:
    classifier, bank = setting(kind)
    x = images(2)
    targets = other_classes(classifier, bank, x, far=True)

    for image, result in zip(x, finecf.FGVCE(classifier, bank).explain(x, targets), strict=True):
        before, after = classifier.features(image[None]), edited_map(classifier, bank, image, result.edits)
        p, q = result.predicted, result.target
        phi_before = stretch(contributions_by_hand(classifier, before, p).relu())
        phi_after = stretch(contributions_by_hand(classifier, after, q).relu())
        cam_before = stretch(classifier.cam(before, p)[0])
        cam_after = stretch(classifier.cam(after, q)[0])
        m_before, m_after = stretch(phi_before * cam_before), stretch(phi_after * cam_after)
        expected = {
            "contribution": phi_before,
            "cam_predicted": cam_before,
            "cam_target": cam_after,
            "before": m_before,
            "after": m_after,
            "dominant": stretch((m_after - m_before).relu()),
            "invariant": stretch((m_before - m_after).relu()),
        }
        for name, values in expected.items():
            assert torch.allclose(result.maps[name], values, atol=2e-3), name
            assert result.upsampled(name).shape == image.shape[1:]


def test_parity_switches_change_the_maps_they_name() -> None:
    classifier, bank = setting()
    x = images(6)
    targets = other_classes(classifier, bank, x)
    cams = classifier.cam(classifier.features(x), torch.tensor(targets))

    def maps(*parity: str) -> list[finecf.explainers.Maps]:
        return [result.maps for result in finecf.FGVCE(classifier, bank, parity=parity).explain(x, targets)]

    plain, before, unedited = maps(), maps("before_target"), maps("cam_unedited")
    assert any(not torch.equal(one["before"], other["before"]) for one, other in zip(plain, before, strict=True))
    assert any(
        not torch.equal(one["cam_target"], other["cam_target"]) for one, other in zip(plain, unedited, strict=True)
    )
    for own, cam in zip(unedited, cams, strict=True):
        assert torch.allclose(own["cam_target"], stretch(cam), atol=1e-5)
    for own in maps("cam_difference"):
        assert torch.allclose(own["dominant"], stretch((own["cam_target"] - own["before"]).relu()), atol=1e-5)
        assert torch.allclose(own["invariant"], stretch((own["before"] - own["cam_target"]).relu()), atol=1e-5)


def test_candidates_may_come_from_other_classes() -> None:
    classifier, bank = setting()
    x = images(3)
    targets = other_classes(classifier, bank, x)
    everything = finecf.FGVCE(classifier, bank, preset="goyal", candidate_classes="all", max_edits=1).explain(
        x, targets
    )
    own = finecf.FGVCE(classifier, bank, preset="goyal", max_edits=1).explain(x, targets)
    named = [classifier.class_name(c) for c in bank.classes]
    listed = finecf.FGVCE(classifier, bank, preset="goyal", candidate_classes=named, max_edits=1).explain(x, targets)
    for wide, narrow, same in zip(everything, own, listed, strict=True):
        assert wide.edits[0].loss <= narrow.edits[0].loss + 1e-6
        assert wide.edits[0].candidate_row == same.edits[0].candidate_row


def test_an_image_is_not_repaired_with_its_own_cells() -> None:
    classifier, bank = setting()
    x = images(60, seed=2)  # the bank's own images
    targets = other_classes(classifier, bank, x[:4])
    names = [f"image {i}" for i in range(4)]
    assert set(names) <= set(bank.sources)
    explainer = finecf.FGVCE(
        classifier, bank, preset="exhaustive", candidate_classes="all", weight_sim=50.0, max_edits=2
    )
    free = explainer.explain(x[:4], targets)
    barred = explainer.explain(x[:4], targets, sources=names)
    assert any(edit.reference_source == names[i] for i, result in enumerate(free) for edit in result.edits)
    for name, result in zip(names, barred, strict=True):
        assert all(edit.reference_source != name for edit in result.edits)


def test_heads_that_are_not_linear_get_a_shortlist_and_say_so() -> None:
    classifier, bank = setting("generic")
    x = images(1)
    (result,) = finecf.FGVCE(classifier, bank).explain(x, other_classes(classifier, bank, x))
    assert any("generic" in note for note in result.notes)
    assert any(str(HEAD_CANDIDATES) in note for note in result.notes)
    assert result.evaluations <= CELLS + 1 + len(result.edits) * CELLS * HEAD_CANDIDATES


def test_a_tie_is_reported_and_goes_to_the_lowest_row() -> None:
    classifier, bank = setting()
    x = images(1)
    target = other_classes(classifier, bank, x)[0]
    start, stop = bank.class_range(target)
    twice = torch.cat([bank.rows(start, stop), bank.rows(start, stop)])
    count = (stop - start) // bank.cells
    doubled = finecf.CandidateBank(twice, [target] * (2 * count), bank.grid)
    (result,) = finecf.FGVCE(classifier, doubled).explain(x, target)
    assert result.edits[0].candidate_row < stop - start
    assert 1 in result.tied_edits
    assert "as good" in result.summary()
    stepwise = finecf.FGVCE(classifier, doubled, refresh_contributions=100).explain(x, target)[0]
    assert stepwise.edits[0].candidate_row == result.edits[0].candidate_row
    assert 1 in stepwise.tied_edits


def test_both_searches_of_a_linear_head_agree() -> None:
    classifier, bank = setting()
    x = images(6)
    targets = other_classes(classifier, bank, x, far=True)
    whole = finecf.FGVCE(classifier, bank, preset="paper").explain(x, targets)
    steps = finecf.FGVCE(classifier, bank, preset="paper", refresh_contributions=100).explain(x, targets)
    for one, other in zip(whole, steps, strict=True):
        assert [(e.cell, e.candidate_row) for e in one.edits] == [(e.cell, e.candidate_row) for e in other.edits]
        assert one.evaluations <= CELLS + 1 + CELLS * 50 * max(len(one.edits), 1)


def test_a_changed_head_is_noticed() -> None:
    classifier, bank = setting()
    x = images(4)
    targets = other_classes(classifier, bank, x)
    explainer = finecf.FGVCE(classifier, bank)
    explainer.explain(x, targets)
    with torch.no_grad():
        classifier.model.fc.weight.copy_(network(seed=9).fc.weight)
    targets = other_classes(classifier, bank, x)
    for image, result in zip(x, explainer.explain(x, targets), strict=True):
        logits = classifier.logits_from(edited_map(classifier, bank, image, result.edits))
        assert torch.allclose(logits[0], result.logits_path[-1], atol=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    classifier, bank = setting()
    model = classifier.model.train()
    model.trunk[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    x = images(2)
    with pytest.warns(UserWarning, match="train mode"):
        targets = other_classes(classifier, bank, x)
    explainer = finecf.FGVCE(classifier, bank)
    explainer.explain(x, targets)
    with pytest.raises(ValueError, match="already classified"):
        explainer.explain(x, classifier.logits(x).argmax(1))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_features_computed_before_are_used() -> None:
    classifier, bank = setting()
    x = images(3)
    targets = other_classes(classifier, bank, x)
    explainer = finecf.FGVCE(classifier, bank)
    given = explainer.explain(x, targets, features=classifier.features(x))
    own = explainer.explain(x, targets)
    for one, other in zip(given, own, strict=True):
        assert [(e.cell, e.candidate_row) for e in one.edits] == [(e.cell, e.candidate_row) for e in other.edits]


def test_numbers_of_numpy_are_targets_too() -> None:
    classifier, bank = setting()
    x = images(2)
    labels = np.asarray(other_classes(classifier, bank, x))
    explainer = finecf.FGVCE(classifier, bank, max_edits=2)
    wanted = [result.target for result in explainer.explain(x, labels)]
    assert wanted == labels.tolist()
    assert explainer.explain(x[0], labels[0])[0].target == wanted[0]


def test_a_float64_model_is_folded_and_explained() -> None:
    net = network("linear").double()
    classifier = finecf.wrap(net, layer="trunk")
    x = images(40).double()
    predicted = net(x).argmax(1)
    bank = finecf.CandidateBank.from_loader(classifier, [(x, predicted)], keep_images=False)
    target = other_classes(classifier, bank, x[:1])
    (result,) = finecf.FGVCE(classifier, bank).explain(x[:1], target)
    assert classifier.fold_reason.startswith("linear")
    assert result.flipped
    logits = classifier.logits_from(edited_map(classifier, bank, x[0], result.edits))
    assert int(logits.argmax()) == result.target


def test_class_names_stand_for_their_indices() -> None:
    classifier, bank = setting()
    x = images(2)
    targets = other_classes(classifier, bank, x)
    explainer = finecf.FGVCE(classifier, bank)
    by_name = explainer.explain(x, [classifier.class_name(c) for c in targets])
    by_tensor = explainer.explain(x, torch.tensor(targets))
    assert [result.target for result in by_name] == [result.target for result in by_tensor] == targets
    assert by_name[0].target_name == f"class {targets[0]}"
    assert max(targets) < CLASSES


@pytest.mark.realdata
def test_real_mistakes_flip(realdata) -> None:
    import importlib.util

    from finecf.data import ImageFolderDataset

    spec = importlib.util.spec_from_file_location("realdata_model", realdata / "mobilenet_v2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = ImageFolderDataset(realdata / "birds" / "images")
    classifier = finecf.wrap(module.build_model(), class_names=folder.class_names)
    mistakes = {"Bohemian_Waxwing/0002.jpg": "Cedar_Waxwing", "Bohemian_Waxwing/0025.jpg": "Cedar_Waxwing"}
    label = folder.class_names.index("Bohemian_Waxwing")
    references = [i for i, own in enumerate(folder.labels) if own == label][:12]
    batches = [folder[i] for i in references]
    bank = finecf.CandidateBank.from_loader(classifier, batches, keep_images=False, progress=False)
    paths = {"/".join(path.parts[-2:]): i for i, path in enumerate(folder.paths)}
    x = folder.images([paths[name] for name in mistakes])
    for result, taken_for in zip(finecf.FGVCE(classifier, bank).explain(x, label), mistakes.values(), strict=True):
        assert result.predicted_name == taken_for
        assert result.flipped
        assert len(result.edits) <= 10
        assert result.edits[0].reference_image is not None
