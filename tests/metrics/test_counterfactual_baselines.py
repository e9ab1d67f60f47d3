"""PGD and interpolation between latents: what they promise, against closed forms and slow transcriptions."""

import math

import pytest
import torch
from explainers.nets import DEVICE, images, network
from torch import Tensor, nn

import finecf
from finecf.data import digits
from finecf.metrics import counterfactual_scores, latent_interpolation, nearest_unlike_neighbour, pgd
from finecf.models.decoder import MirrorDecoder, Shape, activation_prior, shape_of
from finecf.regions.baseline import gaussian_blur
from finecf.training import load_digits_net

# PGD


@pytest.fixture(scope="module")
def reader() -> finecf.Classifier:
    return finecf.wrap(load_digits_net()[0].to(DEVICE), class_names=[str(digit) for digit in range(10)])


@pytest.fixture(scope="module")
def shown(reader) -> tuple[Tensor, Tensor]:
    """Digits that are recognised, and the second most probable class of each."""
    data = digits("test")
    x, labels = data.batch()[:60].to(DEVICE), torch.as_tensor(data.labels[:60]).to(DEVICE)
    order = reader.logits(x).argsort(1, descending=True)
    right = order[:, 0] == labels
    return x[right], order[right, 1]


class Dot(nn.Module):
    """[B,1,2,2] -> `keep`, the same again -> two logits, +-(weight . x)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.keep = nn.Conv2d(1, 1, 1, bias=False)
        self.register_buffer("weight", weight)
        nn.init.ones_(self.keep.weight)

    def forward(self, x: Tensor) -> Tensor:
        dot = (self.keep(x) * self.weight).sum((1, 2, 3))
        return torch.stack([dot, -dot], 1)


def dotted(*weight: float) -> finecf.Classifier:
    flat = lambda maps: (maps * torch.tensor(weight).view(2, 2)).sum((1, 2, 3))  # noqa: E731
    return finecf.wrap(
        Dot(torch.tensor(weight).view(2, 2)).eval(),
        layer="keep",
        head=lambda maps: torch.stack([flat(maps), -flat(maps)], 1),
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_flips_nearly_all_digits(reader, shown, norm):
    x, target = shown
    attack = pgd(reader, x, target, norm=norm, batch_size=50)
    assert attack.found.double().mean() > 0.95
    assert torch.equal(reader.logits(attack.images).argmax(1)[attack.found], target[attack.found])
    assert 0 <= float(attack.images.min()) <= float(attack.images.max()) <= 1
    change = (attack.images - x).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    radius, step = (0.3, 0.3 * 2.5 / 40) if norm == "linf" else (3, 3 * 2.5 / 40)
    assert (size <= torch.clamp(attack.steps * step, max=radius) + 1e-5).all()
    scores = counterfactual_scores(reader, x, attack.images, target, found=attack.found)
    assert scores.means()["valid"] == pytest.approx(float(attack.found.double().mean()))
    assert (scores.l1[attack.found.cpu()] > 0).all()


def test_stopping_keeps_the_change_small_and_a_margin_makes_it_larger(reader, shown):
    x, target = shown[0][:12], shown[1][:12]
    first, sure, whole = (
        pgd(reader, x, target, **options) for options in ({}, {"margin": 4.0}, {"stop": False, "steps": 20})
    )
    lengths = [(each.images - x).abs().mean((1, 2, 3)) for each in (first, sure, whole)]
    assert (lengths[0] <= lengths[1] + 1e-6).all()
    assert (first.steps <= sure.steps).all()
    assert torch.equal(first.steps < sure.steps, first.margin < 4)
    assert (sure.margin[sure.steps < 40] >= 4).all()
    assert (whole.steps == 20).all()
    assert (whole.margin > sure.margin).all()
    logits = reader.logits(whole.images).double()
    others = logits.scatter(1, target[:, None], -math.inf).amax(1)
    torch.testing.assert_close(whole.margin, logits.gather(1, target[:, None])[:, 0] - others, rtol=0, atol=1e-4)


def test_steps_of_pgd_by_hand():
    """For a linear net every step goes the same way: the change, the ball and the range can be written down."""
    classifier, x = dotted(1.0, -2.0, 0.5, 4.0), torch.tensor([0.5, 0.5, 0.05, 0.5]).view(1, 1, 2, 2)
    cube = pgd(classifier, x, 1, radius=0.2, step=0.08, steps=4, stop=False)
    expected = torch.tensor([0.3, 0.7, 0.0, 0.3]).view(1, 1, 2, 2)  # the third pixel meets the range first
    torch.testing.assert_close(cube.images, expected)
    ball = pgd(classifier, x, 1, norm="l2", radius=0.2, step=0.15, steps=1, stop=False)
    direction = -torch.tensor([1.0, -2.0, 0.5, 4.0]) / torch.tensor([1.0, -2.0, 0.5, 4.0]).norm()
    torch.testing.assert_close(ball.images, x + 0.15 * direction.view(1, 1, 2, 2))
    edge = pgd(classifier, x, 1, norm="l2", radius=0.2, step=0.15, steps=5, stop=False)
    torch.testing.assert_close(edge.images, (x + 0.2 * direction.view(1, 1, 2, 2)).clamp(0, 1))
    dot = lambda image: float((image * torch.tensor([1.0, -2.0, 0.5, 4.0]).view(2, 2)).sum())  # noqa: E731
    for attack in (cube, ball, edge):
        assert float(attack.margin) == pytest.approx(-2 * dot(attack.images[0, 0]), abs=1e-5)
        assert attack.found.tolist() == [dot(attack.images[0, 0]) < 0]


def test_an_attack_that_must_stand_a_blur_does(reader, shown):
    x, target = shown[0][:40], shown[1][:40]
    plain, standing = (pgd(reader, x, target, blur=blur, batch_size=16) for blur in (0.0, 1.0))
    kept = [counterfactual_scores(reader, x, each.images, target).means() for each in (plain, standing)]
    assert standing.found.all()
    assert kept[1]["valid"] == kept[1]["denoised_valid"] == 1
    assert kept[0]["denoised_valid"] < 0.5
    assert kept[1]["l1"] > kept[0]["l1"]
    blurred = reader.logits(gaussian_blur(standing.images, 1.0)).double()
    gaps = [
        logits.gather(1, target[:, None])[:, 0] - logits.scatter(1, target[:, None], -math.inf).amax(1)
        for logits in (blurred, reader.logits(standing.images).double())
    ]
    torch.testing.assert_close(standing.margin, torch.minimum(*gaps), rtol=0, atol=1e-4)
    # Of a small ball some reach the target sharp and not blurred: these are not found.
    small = pgd(reader, x, target, blur=1.0, radius=0.12)
    sharp, soft = (
        reader.logits(images).argmax(1) == target for images in (small.images, gaussian_blur(small.images, 1.0))
    )
    assert torch.equal(small.found, sharp & soft)
    assert (sharp & ~soft).any()


def test_the_step_of_an_attack_that_must_stand_a_blur_by_hand():
    """Of two logits that are each other's opposite the cross-entropy falls along the weights, by p of the other class;
    the blurred image's along the weights blurred, as its borders are repeated."""
    weight, x = torch.tensor([1.0, -2.0, 0.5, 4.0]).view(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)
    attack = pgd(dotted(*weight.flatten().tolist()), x, 1, norm="l2", radius=1.0, step=0.1, steps=1, blur=0.5)
    pixels = x.clone().requires_grad_()
    both = sum((shown * weight).sum() for shown in (pixels, gaussian_blur(pixels, 0.5)))
    (direction,) = torch.autograd.grad(both, pixels)  # a constant image is its own blur: both weigh the same
    torch.testing.assert_close(attack.images, x - 0.1 * direction / direction.norm())


def test_an_image_that_is_of_the_target_stays_as_it_is():
    classifier, x = dotted(1.0, 1.0, 1.0, 1.0), torch.rand(3, 1, 2, 2)
    attack = pgd(classifier, x, 0)
    assert torch.equal(attack.images, x)
    assert (attack.found.tolist(), attack.steps.tolist()) == ([True] * 3, [0] * 3)
    out_of_reach = pgd(classifier, x + 0.1, 1, radius=0.01, steps=3, image_range=(0.0, 1.2))
    assert (out_of_reach.found.tolist(), out_of_reach.steps.tolist()) == ([False] * 3, [3] * 3)
    assert (out_of_reach.margin < 0).all()
    torch.testing.assert_close(out_of_reach.images, x + 0.1 - 0.012)  # a share of the range


def test_the_attack_does_not_depend_on_the_scaling_or_the_batch(reader, shown):
    x, target = shown[0][:10], shown[1][:10]
    mean = torch.tensor([0.3, 0.4, 0.2], device=DEVICE).view(3, 1, 1)
    deviation = torch.tensor([0.25, 1.0, 0.1], device=DEVICE).view(3, 1, 1)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = reader.model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * deviation + mean)

    plain = pgd(reader, x, target, norm="l2", batch_size=3)
    scaled = pgd(
        finecf.wrap(Scaled().eval()),
        (x - mean) / deviation,
        target,
        norm="l2",
        image_range=(-mean / deviation, (1 - mean) / deviation),
    )
    assert (plain.steps - scaled.steps).abs().max() <= 1
    same = plain.steps == scaled.steps
    assert same.sum() >= 8
    torch.testing.assert_close(plain.images[same], (scaled.images * deviation + mean)[same], rtol=0, atol=1e-3)


def test_pgd_leaves_the_model_as_it_was(reader, shown):
    net = reader.model
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.requires_grad_(True)
    net.train()
    try:
        with torch.no_grad(), pytest.warns(UserWarning, match="train mode"):
            attack = pgd(finecf.wrap(net), shown[0][:3], shown[1][:3])
        assert net.training
        assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    finally:
        net.requires_grad_(False)
        net.eval()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not attack.images.requires_grad
    assert attack.found.all()


def test_pgd_of_no_images(reader):
    attack = pgd(reader, torch.empty(0, 3, 32, 32), 0)
    assert attack.images.shape == (0, 3, 32, 32)
    assert attack.found.shape == attack.margin.shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"norm": "l1"}, ValueError, "norm must be one of linf, l2; got 'l1'"),
        ({"steps": 0}, ValueError, "steps >= 1"),
        ({"radius": 0.0}, ValueError, "radius > 0"),
        ({"margin": -1.0}, ValueError, "margin >= 0"),
        ({"margin": math.nan}, ValueError, "margin >= 0"),
        ({"step": -0.1}, ValueError, "step must be positive"),
        ({"blur": -1.0}, ValueError, "blur is a standard deviation in pixels, at least 0; got -1.0"),
        ({"blur": math.inf}, ValueError, "blur is a standard deviation"),
        ({"target": 10}, ValueError, r"target classes must lie in 0\.\.9, got 10"),
        ({"target": torch.tensor([1, 2, 3])}, ValueError, "with B = 2"),
        ({"images": torch.full((2, 3, 32, 32), math.nan)}, ValueError, "images hold NaN"),
        ({"images": torch.full((2, 3, 32, 32), 1.5)}, ValueError, r"reach from 1.5 to 1.5, beyond image_range"),
        ({"image_range": (0.2, 1.0)}, ValueError, "beyond image_range"),
        ({"classifier": lambda x: x}, TypeError, "pgd needs a finecf.wrap classifier"),
    ],
)
def test_bad_attacks_get_a_sentence(reader, change, error, sentence):
    arguments = {"classifier": reader, "images": torch.zeros(2, 3, 32, 32), "target": 0}
    with pytest.raises(error, match=sentence):
        pgd(**{**arguments, **change})


# Interpolation


class Cells(nn.Module):
    """[B,3,32,32] -> means over cells `trunk` [B,3,4,4] -> [B,4] by a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.AvgPool2d(8)
        self.fc = nn.Linear(3, 4)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0], [0.0, 0, 0]]))
            self.fc.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x).mean((2, 3)))


class Painter(MirrorDecoder):
    """Draws each cell as a square of its three values: the classifier sees in it the very map it was drawn from."""

    def forward(self, features: Tensor, skips=(), prepared=(), prior=None) -> Tensor:
        return features.repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.fixture(scope="module")
def painting() -> finecf.MirrorCFE:
    shape = Shape((3, 4, 4), (3, 32, 32), ())
    return finecf.MirrorCFE(
        finecf.wrap(Cells().to(DEVICE).eval(), layer="trunk"), Painter(shape, width=4), micro_batch=3
    )


def test_interpolation_flips_where_the_closed_form_says(painting):
    classifier = painting.classifier
    x, references = images(8), images(80, seed=7)
    predicted = classifier.logits(x).argmax(1)
    target = (predicted + 1) % 3
    found = latent_interpolation(painting, x, target, references, 5, resolution=0.01)
    assert found.found.all()
    known = classifier.features(references).mean((2, 3)).double()
    classes = classifier.logits(references).argmax(1)
    weight, bias = (each.detach().double() for each in (classifier.model.fc.weight, classifier.model.fc.bias))
    for b in range(8):
        z = classifier.features(x[b : b + 1]).mean((2, 3)).double()[0]
        members = (classes == target[b]).nonzero()[:, 0].tolist()
        nearest = min(members, key=lambda n: float((known[n] - z).norm()))
        assert int(found.reference[b]) == nearest
        assert float(found.distance[b]) == pytest.approx(float((known[nearest] - z).norm()), rel=1e-6)
        start, end = (weight @ each + bias for each in (z, known[nearest]))
        ahead = [float(start[target[b]] - start[c]) for c in range(4) if c != target[b]]
        gain = [float((end - start)[target[b]] - (end - start)[c]) for c in range(4) if c != target[b]]
        flip = max(-a / g for a, g in zip(ahead, gain, strict=True) if a < 0)
        assert flip <= float(found.k[b]) <= flip + 0.01 + 1e-6
        step = (known[nearest] - z).to(x)
        for place, k in enumerate(found.places.tolist()):
            expected = classifier.features(x[b : b + 1])[0] + k * step[:, None, None]
            torch.testing.assert_close(found.strip[b, place, :, ::8, ::8], expected, rtol=0, atol=1e-5)
    said = classifier.logits(found.images)
    assert torch.equal(said.argmax(1), target)
    torch.testing.assert_close(found.strip_logits[:, 0].float(), classifier.logits(x), rtol=0, atol=1e-4)


def test_interpolation_of_maps_ends_at_the_reference(painting):
    classifier = painting.classifier
    x, references = images(4), images(40, seed=7)
    target = (classifier.logits(x).argmax(1) + 1) % 3
    maps, latents = (latent_interpolation(painting, x, target, references, space=space) for space in ("map", "latent"))
    assert torch.equal(maps.reference, latents.reference)
    ends = classifier.features(references[maps.reference])
    torch.testing.assert_close(maps.strip[:, -1, :, ::8, ::8], ends, rtol=0, atol=1e-5)
    # The head reads the mean alone, so both flip at the same place; where things are differs.
    torch.testing.assert_close(maps.k, latents.k)
    assert (maps.strip[:, -1] - latents.strip[:, -1]).abs().max() > 0.05
    means = [each.strip[:, -1].mean((2, 3)) for each in (maps, latents)]
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-5)


def test_labels_restrict_the_references(painting):
    classifier, references = painting.classifier, images(40, seed=7)
    x = images(1)
    target = (int(classifier.logits(x).argmax()) + 1) % 3
    free = latent_interpolation(painting, x, target, references)
    labels = classifier.logits(references).argmax(1)
    assert torch.equal(latent_interpolation(painting, x, target, references, labels=labels).reference, free.reference)
    labels[free.reference] = (target + 1) % 3
    second = latent_interpolation(painting, x, target, references, labels=labels)
    assert int(second.reference) != int(free.reference)
    assert float(second.distance) >= float(free.distance)


def test_a_path_on_which_nothing_flips_ends_at_one():
    """A decoder that draws the same whatever the map is."""

    class Grey(Painter):
        def forward(self, features: Tensor, skips=(), prepared=(), prior=None) -> Tensor:
            return torch.zeros(len(features), 3, 32, 32, device=features.device)

    classifier = finecf.wrap(Cells().to(DEVICE).eval(), layer="trunk")
    mirror = finecf.MirrorCFE(classifier, Grey(Shape((3, 4, 4), (3, 32, 32), ()), width=4))
    x, references = images(3), images(40, seed=7)
    target = (classifier.logits(x).argmax(1) + 1) % 3
    found = latent_interpolation(mirror, x, target, references, [0.5], resolution=0.25)
    assert not found.found.any()
    assert found.k.isnan().all()
    assert torch.equal(found.images, torch.zeros_like(x))
    assert found.strip.shape == (3, 1, 3, 32, 32)


def test_a_decoder_of_changes_starts_from_the_image():
    classifier = finecf.wrap(network(), layer="trunk")
    for skips in (False, True):
        torch.manual_seed(2)
        decoder = MirrorDecoder(shape_of(classifier, images(1)[0], skips), width=8, output="change", editor="replace")
        torch.nn.init.normal_(decoder.to_image.weight, std=1e3)  # an untrained decoder hardly sees what it is given
        x, references = images(5), images(60, seed=2)
        target = classifier.logits(x).argsort(1, descending=True)[:, 1]
        found = latent_interpolation(finecf.MirrorCFE(classifier, decoder), x, target, references, 3)
        torch.testing.assert_close(found.strip[:, 0], x)
        assert float((found.strip[:, 2] - x).abs().max()) > 1e-3


def test_changes_are_softened_as_those_of_mirror_cfe():
    classifier = finecf.wrap(network(), layer="trunk")
    torch.manual_seed(2)
    decoder = MirrorDecoder(shape_of(classifier, images(1)[0]), width=8, output="change")
    torch.nn.init.normal_(decoder.to_image.weight, std=40.0)
    x, references = 0.4 + 0.2 * images(5), images(60, seed=2)  # no pixel reaches an end of the range
    target = classifier.logits(x).argsort(1, descending=True)[:, 1]
    sharp, soft = (
        latent_interpolation(finecf.MirrorCFE(classifier, decoder, soften=sigma), x, target, references, 2).strip
        for sigma in (0.0, 1.5)
    )
    assert 1e-3 < float((sharp[:, 1] - x).abs().max()) < 0.4
    torch.testing.assert_close(soft[:, 1], x + gaussian_blur(sharp[:, 1] - x, 1.5), rtol=0, atol=1e-5)
    assert float((soft - sharp).abs().max()) > 1e-4


def test_skips_and_the_spatial_prior_are_those_of_the_decoder():
    classifier = finecf.wrap(network(), layer="trunk")
    torch.manual_seed(2)
    decoder = MirrorDecoder(shape_of(classifier, images(1)[0], skips=True), width=8, editor="replace")
    mirror = finecf.MirrorCFE(classifier, decoder)
    x, references = images(5), images(60, seed=2)
    order = classifier.logits(x).argsort(1, descending=True)
    source, target = order[:, 0], order[:, 1]
    found = latent_interpolation(mirror, x, target, references, [0.0, 0.6], resolution=0.2)
    *skips, features = classifier.pyramid(x)
    assert len(skips) == 2
    reference = classifier.features(references[found.reference]).mean((2, 3))
    step = (reference - features.mean((2, 3)))[:, :, None, None]

    def slowly(k: float, masked: bool = True) -> Tensor:
        moved = features + k * step
        places = torch.full((5,), k, device=x.device)
        prior = activation_prior(classifier.cam(moved, source), classifier.cam(moved, target), places)
        with torch.no_grad():
            return decoder(moved, skips, decoder.prepare(skips), prior if masked else None)

    for place, k in enumerate((0.0, 0.6)):
        torch.testing.assert_close(found.strip[:, place], slowly(k), rtol=0, atol=1e-5)
        assert float((slowly(k) - slowly(k, masked=False)).abs().max()) > 1e-4
    said = torch.stack([classifier.logits(slowly(k)).argmax(1) for k in (0.2, 0.4, 0.6, 0.8, 1.0)], 1)
    hits = said == target[:, None]
    first = torch.where(hits.any(1), 0.2 * (hits.int().argmax(1) + 1), math.nan)
    torch.testing.assert_close(found.k.float(), first.float(), equal_nan=True)
    assert torch.equal(found.found, hits.any(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_of_another_precision_are_interpolated(dtype):
    classifier = finecf.wrap(network(), layer="trunk")
    torch.manual_seed(2)
    decoder = MirrorDecoder(shape_of(classifier, images(1)[0]), width=8)
    mirror = finecf.MirrorCFE(classifier, decoder)
    x, references = images(5).to(dtype), images(60, seed=2).to(dtype)
    target = classifier.logits(x).argsort(1, descending=True)[:, 1]
    found = latent_interpolation(mirror, x, target, references, 3)
    plain = latent_interpolation(mirror, x.float(), target, references.float(), 3)
    torch.testing.assert_close(found.images.float(), plain.images, rtol=0, atol=1e-3)
    assert torch.equal(found.found, plain.found)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"space": "pixels"}, 'space must be "latent" or "map"'),
        ({"resolution": 0.0}, r"must lie in \(0, 1\]"),
        ({"k": 1}, "k must be at least 2, from k = 0 to k = 1"),
        ({"k": [0.5, 1.5]}, "k must be a number, or k between 0 and 1"),
        ({"images": torch.rand(2, 3, 16, 16)}, r"images are \[3, 16, 16\]; the decoder draws \[3, 32, 32\]"),
        ({"references": torch.rand(2, 3, 16, 16)}, r"references are \[3, 16, 16\]"),
        ({"references": torch.empty(0, 3, 32, 32)}, "references is empty"),
        ({"images": torch.full((2, 3, 32, 32), math.nan)}, "images hold NaN"),
        ({"target": 4}, r"target classes must lie in 0\.\.3, got 4"),
        ({"target": 3}, "no reference is recognised as class 3"),
        ({"target": 0}, "target and predicted class of an image are the same, '0'"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "with B = 10"),
    ],
)
def test_bad_interpolations_get_a_sentence(painting, change, sentence):
    red = torch.zeros(2, 3, 32, 32)
    red[:, 0] = 1
    arguments = {"images": red, "target": 1, "references": red.flip(1).repeat(5, 1, 1, 1)}
    with pytest.raises(ValueError, match=sentence):
        latent_interpolation(painting, **{**arguments, **change})
    with pytest.raises(ValueError, match="there is none: fit or load one"):
        latent_interpolation(finecf.MirrorCFE(painting.classifier), **arguments)


def test_interpolation_of_no_images(painting):
    found = latent_interpolation(painting, torch.empty(0, 3, 32, 32), 1, images(4), 3)
    assert found.images.shape == (0, 3, 32, 32)
    assert found.strip.shape == (0, 3, 3, 32, 32)
    assert found.reference.shape == found.k.shape == (0,)


def test_the_nearest_unlike_neighbour_is_that_of_a_slow_search(painting):
    classifier = painting.classifier
    x, references = images(6), images(50, seed=7)
    target = (classifier.logits(x).argmax(1) + 1) % 3
    found = nearest_unlike_neighbour(classifier, x, target, references, batch_size=7)
    said = classifier.logits(references).argmax(1)
    for b in range(6):
        apart = {n: float((references[n] - x[b]).double().abs().mean()) for n in range(50) if said[n] == target[b]}
        nearest = min(apart, key=apart.__getitem__)
        assert int(found.reference[b]) == nearest
        assert float(found.distance[b]) == pytest.approx(apart[nearest], rel=1e-6)
        assert torch.equal(found.images[b], references[nearest])
    assert torch.equal(classifier.logits(found.images).argmax(1), target)
    labels = said.clone()
    labels[found.reference] = -1
    other = nearest_unlike_neighbour(classifier, x, target, references, labels=labels)
    assert not torch.isin(other.reference, found.reference).any()
    assert bool((other.distance >= found.distance).all())


def test_the_first_of_equally_near_neighbours_and_no_images(painting):
    red = torch.zeros(3, 3, 32, 32, device=DEVICE)
    red[:, 0] = 1
    found = nearest_unlike_neighbour(painting.classifier, red[0], 0, red, batch_size=1)
    assert found.reference.tolist() == [0]
    assert found.distance.tolist() == [0.0]
    none = nearest_unlike_neighbour(painting.classifier, red[:0], 0, red)
    assert none.images.shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"references": torch.rand(2, 3, 16, 16)}, r"references are \[3, 16, 16\], the images \[3, 32, 32\]"),
        ({"references": torch.empty(0, 3, 32, 32)}, "references is empty"),
        ({"images": torch.full((2, 3, 32, 32), math.nan)}, "images hold NaN"),
        ({"target": 3}, "no reference is recognised as class 3"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "with B = 2"),
        ({"labels": torch.ones(2, dtype=torch.int64)}, "no reference is recognised as class 0"),
        ({"target": -1, "labels": torch.ones(2, dtype=torch.int64)}, "no reference is recognised as class -1"),
    ],
)
def test_bad_neighbours_get_a_sentence(painting, change, sentence):
    red = torch.zeros(2, 3, 32, 32)
    red[:, 0] = 1
    with pytest.raises(ValueError, match=sentence):
        nearest_unlike_neighbour(painting.classifier, **{"images": red, "target": 0, "references": red, **change})
