"""Maps to compare with: shapes, symmetry, seeds, occlusion by hand, and what a real Grad-CAM call receives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finecf.metrics import centred_gaussian, occlusion, random_maps


def corner(images: Tensor) -> Tensor:
    return torch.stack([4 * images[:, 0, 0, 0] - 2, torch.zeros(len(images))], 1)


def test_random_maps_follow_their_generator():
    first, second = random_maps(2, (3, 4)), random_maps(2, (3, 4))
    assert first.shape == (2, 3, 4)
    assert torch.equal(first, second)
    other = random_maps(2, (3, 4), generator=torch.Generator().manual_seed(1))
    assert not torch.equal(first, other)
    assert ((first >= 0) & (first < 1)).all()


def test_centred_gaussian_is_centred_and_symmetric():
    maps = centred_gaussian(2, (5, 8), sigma=0.25)
    assert maps.shape == (2, 5, 8)
    torch.testing.assert_close(maps, maps.flip(1))
    torch.testing.assert_close(maps, maps.flip(2))
    assert maps.argmax() in (2 * 8 + 3, 2 * 8 + 4)
    assert maps[0, 2, 3].item() == pytest.approx(torch.tensor(-(0.0625**2) / 0.125).exp().item())


def test_occlusion_by_hand():
    image = torch.ones(1, 1, 4, 4)
    on, off = torch.tensor([2.0, -2.0]).sigmoid().tolist()
    tiles = occlusion(corner, image, 0, window=2, stride=2, baseline="black")
    expected = torch.zeros(1, 4, 4)
    expected[0, :2, :2] = on - off
    torch.testing.assert_close(tiles, expected)
    # Overlapping windows: a pixel holds the mean of the windows over it, and only the first covers the corner.
    overlapping = occlusion(corner, image, 0, window=2, stride=1, baseline="black")
    assert overlapping[0, 0, 0].item() == pytest.approx(on - off)
    assert overlapping[0, 0, 1].item() == pytest.approx((on - off) / 2)
    assert overlapping[0, 1, 1].item() == pytest.approx((on - off) / 4)
    # Class 1 gains from the same windows: its map is the negative.
    torch.testing.assert_close(occlusion(corner, image, 1, window=2, stride=2, baseline="black"), -expected)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000), height=st.integers(4, 9), width=st.integers(4, 9), window=st.integers(1, 4),
    batch=st.integers(1, 3), rows=st.integers(1, 7), data=st.data(),
)  # fmt: skip
def test_occlusion_covers_every_pixel_and_batches_do_not_matter(seed, height, width, window, batch, rows, data):
    stride = data.draw(st.integers(1, window))
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 1, height, width, generator=generator)
    weight = torch.rand(height, width, generator=generator) + 0.1

    def additive(x: Tensor) -> Tensor:
        return torch.stack([(x[:, 0] * weight).sum((1, 2)), torch.zeros(len(x))], 1)

    rest = {"window": window, "stride": stride, "baseline": "black"}
    together = occlusion(additive, images, 0, batch_size=rows, **rest)
    assert together.isfinite().all()
    assert (together > 0).all()  # every pixel is covered, and covering always hurts here
    for b in range(batch):
        torch.testing.assert_close(occlusion(additive, images[b], 0, **rest)[0], together[b], atol=1e-6, rtol=0)


def test_occlusion_defaults_and_empty_batch():
    assert occlusion(corner, torch.rand(1, 3, 17, 23), 0).shape == (1, 17, 23)
    assert occlusion(corner, torch.empty(0, 1, 4, 4), 0, baseline="black").shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("rest", "sentence"),
    [
        ({"window": 5}, "stride <= window <= 4 pixels, got window 5"),
        ({"window": 2, "stride": 3}, "got window 2, stride 3"),
        ({"target": torch.tensor([[0, 1]])}, r"target must be an int or \[B\]"),
        ({"memory_budget": 10}, "one composed image needs 256"),
    ],
)
def test_bad_occlusion_gets_a_sentence(rest, sentence):
    with pytest.raises(ValueError, match=sentence):
        occlusion(**({"classifier": corner, "images": torch.rand(1, 1, 4, 4), "target": 0} | rest))


def test_bad_gaussian_gets_a_sentence():
    with pytest.raises(ValueError, match="sigma is a share of the side"):
        centred_gaussian(1, (3, 3), sigma=0)
