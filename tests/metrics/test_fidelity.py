"""mu-fidelity, the highest confidence, RISE and region-wise curves: by hand, and against captum."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr  # scikit-image brings scipy
from torch import Tensor

from finecf.metrics import highest_confidence, insertion_deletion, mu_fidelity, rise
from finecf.regions import grid


def smooth(weight: Tensor):
    """Logits of three classes from weighted pixels, so that every subset of pixels matters."""
    rows = torch.stack([weight, weight.flip(0), weight.flip(1)])
    return lambda images: torch.einsum("bhw,chw->bc", images[:, 0], rows)


def setting(side: int = 12, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(side, side, generator=generator) / side
    return (
        weight,
        torch.rand(batch, 1, side, side, generator=generator),
        torch.rand(batch, side, side, generator=generator),
    )


def ablate(classify, image: Tensor, group: Tensor, target: int, baseline: Tensor) -> float:
    """captum: how far the class's probability falls when a group of pixels shows the baseline."""
    captum = pytest.importorskip("captum.attr", reason="captum is not installed (pip install finecf[test])")
    ablation = captum.FeatureAblation(lambda x: classify(x).double().softmax(1))
    found = ablation.attribute(image[None], target=target, feature_mask=group.long()[None, None], baselines=baseline)
    return float(found[0, 0][group].flatten()[0]) if bool(group.any()) else 0.0


def test_curves_agree_with_captums_ablation():
    weight, images, maps = setting()
    classify = smooth(weight)
    baseline = torch.full((1, 1, 12, 12), 0.3)
    curves = insertion_deletion(classify, images, maps, 1, baseline=baseline[0], step=0.1)
    for b in range(3):
        order = maps[b].flatten().argsort(descending=True, stable=True)
        whole = float(classify(images[b : b + 1]).double().softmax(1)[0, 1])
        for k, share in enumerate(curves.share[b].tolist()):
            first = torch.zeros(144, dtype=torch.bool)
            first[order[: round(share * 144)]] = True
            first = first.view(12, 12)
            deleted = whole - ablate(classify, images[b], first, 1, baseline)
            inserted = whole - ablate(classify, images[b], ~first, 1, baseline)
            assert float(curves.deletion[b, k, 0]) == pytest.approx(deleted, abs=1e-6)
            assert float(curves.insertion[b, k, 0]) == pytest.approx(inserted, abs=1e-6)


@pytest.mark.parametrize("rank", [False, True])
def test_mu_fidelity_agrees_with_captums_ablation(rank: bool):
    weight, images, maps = setting()
    classify = smooth(weight)
    found = mu_fidelity(classify, images, maps, 2, subsets=40, share=0.25, cells=4, rank=rank, baseline="black")
    labels = grid(12, 12, 16)
    order = torch.rand(40, 16, generator=torch.Generator().manual_seed(0)).argsort(1)
    for b in range(3):
        sums, drops = [], []
        for chosen in order < 4:
            group = chosen[labels.long()]
            sums.append(float(maps[b][group].double().sum()))
            drops.append(ablate(classify, images[b], group, 2, torch.zeros(1, 1, 12, 12)))
        expected = (spearmanr if rank else pearsonr)(sums, drops).statistic
        assert float(found[b]) == pytest.approx(expected, abs=1e-6)


def test_mu_fidelity_of_the_true_contributions_is_nearly_one():
    weight, images, _ = setting()
    small = lambda x: torch.stack([(x[:, 0] * weight).sum((1, 2)) * 0.01, torch.zeros(len(x))], 1)  # noqa: E731
    ideal = images[:, 0] * weight
    assert mu_fidelity(small, images, ideal, 0, cells=6, baseline="black").min() > 0.999
    assert mu_fidelity(small, images, -ideal, 0, cells=6, baseline="black").max() < -0.999
    assert mu_fidelity(small, images, torch.zeros(3, 12, 12), 0, cells=6).tolist() == [0, 0, 0]


def test_mu_fidelity_does_not_depend_on_the_batch():
    weight, images, maps = setting()
    classify = smooth(weight)
    together = mu_fidelity(classify, images, maps, torch.tensor([0, 1, 2]), cells=5, baseline="blur")
    for b in range(3):
        alone = mu_fidelity(classify, images[b], maps[b], b, cells=5, baseline="blur", batch_size=7)
        torch.testing.assert_close(together[b], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsets": 1}, "needs subsets >= 2"),
        ({"share": 1.0}, r"a share in \(0, 1\)"),
        ({"cells": 13}, r"cells in 2\.\.12"),
    ],
)
def test_mu_fidelity_refuses(options, message):
    weight, images, maps = setting()
    with pytest.raises(ValueError, match=message):
        mu_fidelity(smooth(weight), images, maps, 0, **options)
    with pytest.raises(ValueError, match="one map an image: got 2 maps for 3 images"):
        mu_fidelity(smooth(weight), images, maps[:2], 0)


def test_highest_confidence_by_hand():
    curves = insertion_deletion(
        lambda x: torch.stack([x[:, 0].sum((1, 2)), torch.zeros(len(x))], 1),
        torch.tensor([[1.0, -3.0], [2.0, 0.5]])[None, None],
        torch.tensor([[4.0, 2.0], [3.0, 1.0]]),
        0,
        baseline="black",
        step=0.25,
    )
    logits = torch.tensor([0, 1, 3, 0, 0.5])
    torch.testing.assert_close(curves.insertion[0, :, 0], logits.double().sigmoid())
    best = highest_confidence(curves, (0.25, 0.5, 0.75, 1.0))[0, 0]
    torch.testing.assert_close(best, torch.tensor([1.0, 3, 3, 3]).double().sigmoid())
    with pytest.raises(ValueError, match=r"shares must lie in \(0, 1\]"):
        highest_confidence(curves, (0.0,))


def test_regions_as_the_grid():
    weight, images, maps = setting()
    classify = smooth(weight)
    labels = grid(12, 12, 9).expand(3, -1, -1)
    curves = insertion_deletion(classify, images, maps, 0, baseline="black", regions=labels)
    assert curves.share.shape == (3, 10)
    for b in range(3):
        means = torch.stack([maps[b][labels[b] == region].double().mean() for region in range(9)])
        order = means.argsort(descending=True).tolist()
        for k in range(10):
            shown = torch.isin(labels[b], torch.tensor(order[:k], dtype=torch.int32))
            for curve, keep in ((curves.insertion, shown), (curves.deletion, ~shown)):
                wanted = classify(images[b : b + 1] * keep).double().softmax(1)[0, 0]
                assert float(curve[b, k, 0]) == pytest.approx(float(wanted), abs=1e-6)
    with pytest.raises(ValueError, match="leave out step"):
        insertion_deletion(classify, images, maps, 0, regions=labels, step=0.1)
    with pytest.raises(ValueError, match=r"regions must be integer label maps \[3, 12, 12\]"):
        insertion_deletion(classify, images, maps, 0, regions=labels[:1])


def test_rise_finds_the_bright_corner():
    def corner(images: Tensor) -> Tensor:
        return torch.stack([8 * images[:, 0, :4, :4].mean((1, 2)) - 4, torch.zeros(len(images))], 1)

    images = torch.ones(2, 1, 16, 16)
    found = rise(corner, images, 0, masks=300, cells=4, baseline="black")
    assert found.shape == (2, 16, 16)
    assert torch.equal(found[0], found[1])
    inside = found[:, :4, :4].mean()
    assert inside > found[:, 8:, 8:].mean() + 0.1
    # Its expectation is the probability given that the pixel is shown: between the least and the largest there is.
    assert found.max() <= 1.35 * float(torch.tensor(4.0).sigmoid())
    with pytest.raises(ValueError, match="RISE needs masks >= 1"):
        rise(corner, images, 0, masks=0)


def test_quantus_flips_pixels_to_the_same_curve():
    """Where quantus is installed (it needs OpenCV, so it is no requirement): its deletion curve is ours."""
    quantus = pytest.importorskip("quantus", reason="quantus is not installed (pip install quantus)")
    weight, images, maps = setting()
    classify = smooth(weight)

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return classify(x)

    flipping = quantus.PixelFlipping(
        features_in_step=12, perturb_baseline=0.3, normalise=False, abs=False, disable_warnings=True
    )
    theirs = flipping(Net().eval(), images.numpy(), np.array([1, 1, 1]), a_batch=maps[:, None].numpy(), softmax=True)
    ours = insertion_deletion(classify, images, maps, 1, baseline=torch.full((1, 12, 12), 0.3), step=1 / 12)
    np.testing.assert_allclose(ours.deletion[:, 1:, 0].numpy(), np.array(theirs), atol=1e-6)
