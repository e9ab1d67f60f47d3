"""Grading on SyntheticBirds with a net fitted in a moment: what is counted, what is paired, what repeats."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import finecf
from finecf.data import SyntheticBirds
from finecf.metrics import VISIBLE_PIXELS, grad_cam
from finecf.metrics.evaluate import ACROSS, INSIDE, BirdsEvaluation, evaluate_birds, find_mistakes

SIZE, CLASSES = 64, 8
BASELINES = ["random", "centred Gaussian", "occlusion", "Grad-CAM", "Grad-CAM of the true class"]


class Fitted(nn.Module):
    """Random filters, averaged, with a linear head fitted to the birds by ridge regression: weak, quick, repeatable."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 96, 9, stride=8, padding=4), nn.ReLU())
        with torch.no_grad():
            for parameter in self.trunk.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            cells = self.trunk(images).mean((2, 3)).double()
            cells = torch.cat([cells, torch.ones(len(cells), 1)], 1)
            wanted = nn.functional.one_hot(labels, CLASSES).double() * 12
            gram = cells.T @ cells + 1e-2 * torch.eye(cells.shape[1])
            solved = torch.linalg.solve(gram, cells.T @ wanted).float()
            self.head = nn.Linear(96, CLASSES)
            self.head.weight.copy_(solved[:-1].T)
            self.head.bias.copy_(solved[-1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(images).mean((2, 3)))


@pytest.fixture(scope="module")
def references() -> SyntheticBirds:
    return SyntheticBirds("train", size=SIZE, n=320, classes=CLASSES)


@pytest.fixture(scope="module")
def birds() -> SyntheticBirds:
    return SyntheticBirds("test", size=SIZE, n=240, classes=CLASSES)


@pytest.fixture(scope="module")
def classifier(references: SyntheticBirds) -> finecf.Classifier:
    images, labels = zip(*[references.as_tensor(i)[:2] for i in range(len(references))], strict=True)
    net = Fitted(torch.stack(images), torch.tensor(labels)).eval()
    return finecf.wrap(net, layer="trunk", class_names=references.class_names)


@pytest.fixture(scope="module")
def bank(classifier: finecf.Classifier, references: SyntheticBirds) -> finecf.CandidateBank:
    return finecf.CandidateBank.from_loader(classifier, references.tensors(), progress=False)


@pytest.fixture(scope="module")
def result(classifier, bank, birds, references) -> BirdsEvaluation:
    return evaluate_birds(classifier, bank, birds, references, mistakes=12, presets=["goyal", "fgvce", "exhaustive"])


def test_mistakes_are_mistakes_and_stop_where_asked(classifier, birds):
    found, looked_at = find_mistakes(classifier, birds, 5, batch_size=16)
    counted = [m for m in found if m.group == INSIDE and m.visible]
    assert len(counted) == 5
    assert found[-1] is counted[-1]
    again, same = find_mistakes(classifier, birds, 5, batch_size=50)
    assert (looked_at, [m.item.source for m in found]) == (same, [m.item.source for m in again])
    for mistake in found:
        predicted = int(classifier.logits(mistake.item.tensor[None]).argmax())
        assert predicted == mistake.predicted != mistake.target == mistake.item.label
        same_family = birds.family_of(mistake.predicted) == birds.family_of(mistake.target)
        assert mistake.group == (INSIDE if same_family else ACROSS)
        differing = birds.differing_parts(mistake.predicted, mistake.target)
        sizes = {part: int(mistake.item.part_masks[part].sum()) for part in differing}
        assert set(mistake.visible) == {part for part, size in sizes.items() if size >= VISIBLE_PIXELS}


def test_a_short_split_gives_what_it_has(classifier, birds):
    short = SyntheticBirds("test", size=SIZE, n=10, classes=CLASSES)
    found, looked_at = find_mistakes(classifier, short, 300)
    assert looked_at == 10
    assert len(found) <= 10


def test_every_row_has_one_value_an_image(result):
    assert result.counts["graded inside a family"] == 12
    assert result.counts["mistakes"] == sum(
        result.counts[f"{kind} {group}"] for kind in ("graded", "hidden") for group in (INSIDE, ACROSS)
    )
    for group, methods in result.scores.items():
        count = result.counts[f"graded {group}"]
        assert list(methods) == ["fgvce", "goyal", "exhaustive", "contribution map", *BASELINES, "share of the area"]
        for scores in methods.values():
            assert {len(values) for values in scores.values()} == {count}
            for name in set(scores) - {"edits", "cosine", "compactness"}:
                assert all(0 <= value <= 1 for value in scores[name])
        for preset in ("fgvce", "goyal", "exhaustive"):
            for edits, flipped in zip(methods[preset]["edits"], methods[preset]["flipped"], strict=True):
                assert 1 <= edits <= 10
                assert flipped or edits == 10


def test_a_constant_map_scores_the_area(result):
    area = result.scores[INSIDE]["share of the area"]
    assert area["energy"] == pytest.approx(area["AUPRC"])
    assert area["energy"] == pytest.approx(area["max hit"])
    random = result.scores[INSIDE]["random"]["energy"]
    assert sum(random) / len(random) == pytest.approx(sum(area["energy"]) / len(random), abs=0.1)


def test_tables_and_json(result):
    text = result.markdown()
    assert text.count("**SyntheticBirds, mistakes inside a family**") == 1
    assert "paired bootstrap" not in text  # 12 images are too few
    more = replace(result, counts=result.counts | {"graded inside a family": 20}).markdown()
    assert "twice the share of the area" in more
    assert '"fgvce" against "exhaustive": same first edit' in more
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["settings"]["max_edits"] == 10
    assert plain["tables"][0]["rows"]["fgvce"]["edits"] == pytest.approx(result.mean(INSIDE, "fgvce", "edits"))


def test_the_same_arguments_give_the_same_figures(result, classifier, bank, birds, references):
    again = evaluate_birds(
        classifier, bank, birds, references, mistakes=12, presets=["goyal", "exhaustive"], batch_size=5
    )
    for group, methods in result.scores.items():
        for method, scores in methods.items():
            for name, values in scores.items():
                assert values == pytest.approx(again.scores[group][method][name], abs=1e-4)


def test_no_visible_mistake_gets_a_sentence(classifier, bank, references):
    empty = SyntheticBirds("test", size=SIZE, n=0, classes=CLASSES)
    with pytest.raises(ValueError, match="no mistake with a visible differing part among 0 images"):
        evaluate_birds(classifier, bank, empty, references)


def test_grad_cam_is_the_class_activation_map(classifier, birds):
    images = torch.stack([birds.as_tensor(i)[0] for i in range(3)])
    target = torch.tensor([0, 3, 5])
    maps = grad_cam(classifier, images, target)
    cells = classifier.model.trunk(images)
    expected = torch.einsum("bd,bdhw->bhw", classifier.model.head.weight[target], cells).relu()
    torch.testing.assert_close(maps * cells.shape[2] * cells.shape[3], expected.detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"target must be an int or \[B\]"):
        grad_cam(classifier, images, target[:, None].expand(3, 2))
