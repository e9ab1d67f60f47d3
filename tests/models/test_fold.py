"""Head folding on torchvision's families: which kind, and that the sum over cells is the head."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from models.small_nets import DEVICE, Flat, PooledNet, images, seeded
from torch import Tensor, nn

import finecf
from finecf.models import Classifier, HeadFold

torchvision = pytest.importorskip("torchvision")


def lively(model: nn.Module) -> nn.Module:
    """Random weights whose maps neither die out nor blow up, so that a wrong fold cannot pass for rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
                module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))
                module.momentum = None
                module.reset_running_stats()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
            model(torch.randn(4, 3, 64, 64, generator=generator))
    return model.eval().to(DEVICE)


def family(name: str) -> nn.Module:
    torch.manual_seed(0)
    extra = {"dropout": 0.0} if name.startswith("vgg") else {}
    return lively(getattr(torchvision.models, name)(weights=None, num_classes=7, **extra))


def mixed_maps(features: Tensor) -> Tensor:
    """Maps with cells scaled and cells of other images, as explainers make them."""
    generator = torch.Generator().manual_seed(3)
    masks, swap = (torch.rand(len(features), 1, *features.shape[2:], generator=generator).to(DEVICE) for _ in range(2))
    return torch.where(swap < 0.3, features.flip(0, 2), features * masks)


def folded(clf: Classifier, fold: HeadFold, features: Tensor) -> Tensor:
    if fold.kind == "linear":
        return fold.base_logits(len(features)) + fold.cell_logits(features).sum(1)
    return fold.tail(fold.bias + fold.cell_preactivations(features).sum(1))


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("resnet18", "layer4", "linear"),
        ("efficientnet_b0", "features", "linear"),
        ("mobilenet_v2", "features", "linear"),
        ("densenet121", "features", "linear"),
        ("swin_t", "permute", "linear"),
        ("mobilenet_v3_small", "features", "first_linear"),
        ("convnext_tiny", "features", "none"),
    ],
)
def test_family(name: str, layer: str, kind: str) -> None:
    clf = finecf.wrap(family(name))
    assert clf.layer_name == layer
    x = images(3, 64)
    features, logits = clf.features_and_logits(x)
    torch.testing.assert_close(clf.logits_from(features), logits)
    fold = clf.fold(features)
    if kind == "none":
        assert fold is None
        assert clf.fold_reason.startswith("none: ")
        return
    assert fold is not None, clf.fold_reason
    assert fold.kind == kind
    assert clf.fold_reason.startswith(kind)
    spread = float(logits.std())
    assert spread > 1e-3
    maps = mixed_maps(features)
    torch.testing.assert_close(folded(clf, fold, maps), clf.logits_from(maps), atol=1e-4 * spread, rtol=1e-4)
    assert fold.max_error < 1e-3 * spread
    maps = clf.pyramid(x)
    assert len(maps) >= 3
    assert all(a.shape[2] > b.shape[2] for a, b in pairwise(maps))


@pytest.fixture(scope="module")
def small_vgg() -> nn.Module:
    """VGG's own forward, features and pooling to 7 x 7, with a narrow classifier."""
    torch.manual_seed(0)
    model = torchvision.models.vgg11(weights=None, num_classes=6, init_weights=False)
    model.classifier = nn.Sequential(
        nn.Linear(512 * 49, 40), nn.ReLU(True), nn.Dropout(), nn.Linear(40, 30), nn.ReLU(True), nn.Linear(30, 6)
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
    return model.eval().to(DEVICE)


@pytest.mark.parametrize("side", [64, 96])
def test_vgg_pool5_folds_to_its_first_linear_layer(small_vgg: nn.Module, side: int) -> None:
    """At 2 x 2 and 3 x 3 cells the adaptive pooling enlarges the map to 7 x 7, unevenly."""
    clf = finecf.wrap(small_vgg, layer="pool5")
    features = clf.features(images(3, side))
    fold = clf.fold(features)
    assert fold is not None, clf.fold_reason
    assert fold.kind == "first_linear"
    maps = mixed_maps(features)
    want = clf.logits_from(maps)
    torch.testing.assert_close(folded(clf, fold, maps), want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="needs a fold of kind 'linear'"):
        fold.cell_logits(features)


def test_vgg_at_seven_by_seven_cells_replaces_a_cell_exactly(small_vgg: nn.Module) -> None:
    clf = finecf.wrap(small_vgg)
    clf.features(images(1, 64))
    generator = torch.Generator().manual_seed(2)
    maps, rows = (torch.rand(size, generator=generator).to(DEVICE) for size in ((2, 512, 7, 7), (3, 512)))
    fold = clf.fold(maps)
    assert fold is not None, clf.fold_reason
    cells = fold.cell_preactivations(maps)
    total = fold.bias + cells.sum(1)
    index = torch.tensor([0, 17, 48])
    new = fold.candidate_preactivations(rows, index)
    torch.testing.assert_close(new[1:2], fold.candidate_preactivations(rows[1:2], 17))
    for row, cell in enumerate(index.tolist()):
        edited = maps[:1].clone()
        edited[0, :, cell // 7, cell % 7] = rows[row]
        got = fold.tail(total[:1] - cells[:1, cell] + new[row])
        torch.testing.assert_close(got, clf.logits_from(edited), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fold.base_logits(1), clf.logits_from(torch.zeros_like(maps[:1])), atol=1e-5, rtol=1e-4)


def test_vgg_relu5_3_has_a_reason_why_not() -> None:
    torch.manual_seed(0)
    model = torchvision.models.vgg16(weights=None, num_classes=4, init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 8), nn.ReLU(True), nn.Linear(8, 4))
    clf = finecf.wrap(model.eval(), layer="relu5_3")
    assert clf.layer_name == "features.29"
    features = clf.features(images(1, 64))
    assert features.shape == (1, 512, 4, 4)
    assert clf.fold(features) is None
    assert "'classifier.0' is not a fixed weighted sum of the cells" in clf.fold_reason


class ConvHead(PooledNet):
    """Class maps by a 1 x 1 convolution, then pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(self.trunk(x)).mean((2, 3))


class MaxHead(PooledNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x).amax((2, 3)))


class FunctionalHead(PooledNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x).mean((2, 3)) @ self.fc.weight.T


class Squared(PooledNet):
    """Not linear in the cells, though the pooled map reaches a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x).square().mean((2, 3)))


@pytest.mark.parametrize(
    ("net", "kind", "reason"),
    [
        (ConvHead, "linear", "'maps'"),
        (Flat, "first_linear", "'fc'"),
        (MaxHead, None, "not a fixed weighted sum"),
        (Squared, None, "not a fixed weighted sum"),
        (FunctionalHead, None, "no linear layer was called"),
    ],
)
def test_users_heads(net: type[nn.Module], kind: str | None, reason: str) -> None:
    clf = finecf.wrap(seeded(net), layer="body")
    features = clf.features(images(3))
    fold = clf.fold(features)
    assert (fold.kind if fold else None) == kind
    assert reason in clf.fold_reason
    if fold is not None:
        maps = mixed_maps(features)
        torch.testing.assert_close(folded(clf, fold, maps), clf.logits_from(maps))


def test_fold_follows_the_weights() -> None:
    model = seeded(PooledNet)
    clf = finecf.wrap(model)
    features = clf.features(images(2))
    assert clf.fold(features) is not None
    with torch.no_grad():
        model.fc.weight.mul_(3)
    fold = clf.fold(features)
    assert fold is not None
    torch.testing.assert_close(folded(clf, fold, features), clf.logits_from(features))


def test_first_linear_fold_follows_the_weights() -> None:
    model = seeded(Flat)
    clf = finecf.wrap(model, layer="body")
    features = clf.features(images(2))
    assert clf.fold(features) is not None
    with torch.no_grad():
        model.fc.weight.mul_(3)
    fold = clf.fold(features)
    assert fold is not None
    torch.testing.assert_close(folded(clf, fold, features), clf.logits_from(features))


def test_named_head_is_where_the_linear_layer_is_sought() -> None:
    clf = finecf.wrap(seeded(ConvHead), layer="body", head="maps")
    assert clf.fold(clf.features(images(1))) is not None
    clf = finecf.wrap(seeded(ConvHead), layer="body", head="fc")
    assert clf.fold(clf.features(images(1))) is None
    assert "in 'fc'" in clf.fold_reason


def test_candidate_logits_are_divided_by_the_cells() -> None:
    clf = finecf.wrap(seeded(PooledNet))
    features = clf.features(images(1))
    fold = clf.fold(features)
    assert fold is not None
    rows = features[0].flatten(1).T
    torch.testing.assert_close(fold.candidate_logits(rows), fold.cell_logits(features)[0])
    torch.testing.assert_close(fold.candidate_logits(rows, cells=16), 4 * fold.cell_logits(features)[0])


@pytest.mark.realdata
def test_users_own_model_file(realdata) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("users_model", realdata / "mobilenet_v2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    clf = finecf.wrap(module.build_model())
    features, logits = clf.features_and_logits(images(1, 224))
    assert clf.layer_name == "features"
    assert features.shape == (1, 1280, 7, 7)
    torch.testing.assert_close(clf.logits_from(features), logits)
    fold = clf.fold(features)
    assert fold is not None
    assert fold.kind == "linear"
