"""Insertion and deletion: hand-computed curves, order and ties, batching, the raster form, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finecf.metrics import insertion_deletion


def corner(images: Tensor) -> Tensor:
    """Logits of two classes whose odds grow with the brightness of the top left pixel alone."""
    return torch.stack([4 * images[:, 0, 0, 0] - 2, torch.zeros(len(images))], 1)


def weighted(weight: Tensor):
    """Logits that add up weighted pixels: the ideal order of pixels is known."""
    return lambda images: torch.stack([(images[:, 0] * weight).sum((1, 2)), torch.zeros(len(images))], 1)


def test_curves_of_two_by_two_pixels_by_hand():
    image = torch.ones(1, 1, 2, 2)
    on, off = torch.tensor([2.0, -2.0]).double().sigmoid().tolist()
    curves = insertion_deletion(corner, image, torch.tensor([[0.9, 0.1], [0.2, 0.3]]), 0, baseline="black", step=0.25)
    assert curves.share.tolist() == [[0, 0.25, 0.5, 0.75, 1]]
    torch.testing.assert_close(curves.insertion[0, :, 0], torch.tensor([off, on, on, on, on]).double())
    torch.testing.assert_close(curves.deletion[0, :, 0], torch.tensor([on, off, off, off, off]).double())
    assert curves.insertion_auc.item() == pytest.approx(off / 8 + on * 7 / 8)
    assert curves.deletion_auc.item() == pytest.approx(on / 8 + off * 7 / 8)


def test_last_step_is_shorter_and_reaches_the_whole_image():
    curves = insertion_deletion(corner, torch.rand(1, 1, 10, 10), torch.rand(1, 10, 10), 0)
    assert curves.share.shape == (1, 35)  # 0, 33 steps of 3 %, 100 %
    assert curves.share[0, 1].item() == pytest.approx(0.03)
    assert curves.share[0, -2].item() == pytest.approx(0.99)
    assert curves.share[0, -1].item() == 1


def test_ties_go_in_reading_order():
    seen = []

    def record(images: Tensor) -> Tensor:
        seen.append(images[:, 0].clone())
        return corner(images)

    insertion_deletion(record, torch.ones(1, 1, 2, 2), torch.zeros(1, 2, 2), 0, baseline="black", step=0.25)
    inserted = torch.cat(seen)[:5].flatten(1).int().tolist()
    assert inserted == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_shared_end_points_are_run_once():
    runs = 0

    def count(images: Tensor) -> Tensor:
        nonlocal runs
        runs += len(images)
        return corner(images)

    insertion_deletion(count, torch.rand(3, 1, 10, 10), torch.rand(3, 10, 10), 0, step=0.1)
    assert runs == 3 * (2 * 11 - 2)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), side=st.integers(2, 9), batch=st.integers(1, 4), rows=st.integers(1, 9))
def test_batched_equals_one_by_one(seed, side, batch, rows):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(side, side, generator=generator)
    images = torch.rand(batch, 3, side, side, generator=generator)
    maps = torch.randint(0, 4, (batch, side, side), generator=generator).float()
    target = torch.randint(0, 2, (batch,), generator=generator)
    colour = torch.tensor([0.2, 0.4, 0.6])
    together = insertion_deletion(weighted(weight), images, maps, target, mean_colour=colour, batch_size=rows)
    for b in range(batch):
        alone = insertion_deletion(weighted(weight), images[b], maps[b], int(target[b]), mean_colour=colour)
        torch.testing.assert_close(together.insertion[b], alone.insertion[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(together.deletion[b], alone.deletion[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(together.insertion_auc[b], alone.insertion_auc[0], atol=1e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), side=st.integers(2, 8))
def test_no_order_beats_the_perfect_map_and_none_loses_to_its_reverse(seed, side):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(side, side, generator=generator)
    image = torch.ones(1, 1, side, side)
    rest = {"baseline": "black", "step": 1 / side**2}
    perfect = insertion_deletion(weighted(weight), image, weight, 0, **rest)
    other = insertion_deletion(weighted(weight), image, torch.rand(side, side, generator=generator), 0, **rest)
    reverse = insertion_deletion(weighted(weight), image, -weight, 0, **rest)
    assert perfect.insertion_auc >= other.insertion_auc - 1e-9
    assert other.insertion_auc >= reverse.insertion_auc - 1e-9
    assert perfect.deletion_auc <= other.deletion_auc + 1e-9
    assert other.deletion_auc <= reverse.deletion_auc + 1e-9
    torch.testing.assert_close(perfect.insertion, reverse.deletion.flip(1), atol=1e-6, rtol=0)


def test_several_classes_share_the_forwards():
    images, maps = torch.rand(2, 1, 4, 4), torch.rand(2, 4, 4)
    both = insertion_deletion(corner, images, maps, torch.tensor([[0, 1], [0, 1]]))
    assert both.insertion.shape == (2, 35 - 18, 2)  # 16 pixels: steps of 3 % that add no pixel are run once
    torch.testing.assert_close(both.insertion.sum(2), torch.ones_like(both.insertion[..., 0]))
    torch.testing.assert_close(both.insertion_auc[:, 1:], insertion_deletion(corner, images, maps, 1).insertion_auc)


def test_cell_maps_are_brought_to_image_size():
    images, coarse = torch.rand(1, 1, 8, 8), torch.rand(1, 2, 2)
    fine = torch.nn.functional.interpolate(coarse[:, None], size=(8, 8), mode="bilinear")[:, 0]
    first, second = (insertion_deletion(corner, images, m, 0) for m in (coarse, fine))
    assert torch.equal(first.insertion, second.insertion)


def test_baselines():
    ends = {}
    image = torch.rand(1, 3, 12, 12)

    def keep(name):
        def run(images: Tensor) -> Tensor:
            ends.setdefault(name, images[0].clone())  # the first row of an insertion is the baseline
            return images.sum((2, 3))

        return run

    other = torch.rand(3, 12, 12)
    for name, baseline in {"mean": "mean", "black": "black", "blur": "blur", "image": other}.items():
        insertion_deletion(keep(name), image, torch.rand(12, 12), 0, baseline=baseline)
    insertion_deletion(keep("colour"), image, torch.rand(12, 12), 0, mean_colour=torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(ends["mean"], image[0].mean((1, 2), keepdim=True).expand(3, 12, 12))
    assert not ends["black"].any()
    torch.testing.assert_close(ends["colour"][:, 3, 5], torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(ends["image"], other)
    assert ends["blur"].std() < image.std() / 2
    torch.testing.assert_close(ends["blur"].mean(), image.mean(), atol=0.05, rtol=0)


def test_raster_form_by_hand():
    image = torch.ones(1, 1, 2, 2)
    maps = torch.tensor([[0.6, 0.2], [0.9, 0.5]])  # above 0.5: the first pixel, then the third
    curves = insertion_deletion(corner, image, maps, 0, baseline="black", order="raster", threshold=0.5)
    on, off = torch.tensor([2.0, -2.0]).double().sigmoid().tolist()
    assert curves.share.tolist() == [[0, 0.5, 1]]
    torch.testing.assert_close(curves.insertion[0, :, 0], torch.tensor([off, on, on]).double())
    torch.testing.assert_close(curves.deletion[0, :, 0], torch.tensor([on, off, off]).double())


def test_raster_regions_of_different_size_in_one_batch():
    images = torch.ones(3, 1, 2, 2)
    maps = torch.tensor([[[1.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    together = insertion_deletion(corner, images, maps, 0, baseline="black", order="raster")
    for b in range(3):
        alone = insertion_deletion(corner, images[b], maps[b], 0, baseline="black", order="raster")
        torch.testing.assert_close(together.insertion_auc[b], alone.insertion_auc[0])
        torch.testing.assert_close(together.deletion_auc[b], alone.deletion_auc[0])
    off, on = torch.tensor([-2.0, 2.0]).double().sigmoid()
    assert together.insertion_auc[2, 0] == off  # an empty region inserts nothing
    assert together.deletion_auc[2, 0] == on


def test_memory_budget_bounds_the_rows():
    largest = 0

    def watch(images: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(images))
        return corner(images)

    image, one = torch.rand(2, 1, 8, 8), 8 * 8 * 4 * 4
    insertion_deletion(watch, image, torch.rand(2, 8, 8), 0, memory_budget=3 * one)
    assert largest == 3
    with pytest.raises(ValueError, match=f"one composed image needs {one}"):
        insertion_deletion(watch, image, torch.rand(2, 8, 8), 0, memory_budget=one - 1)


def test_empty_batch():
    curves = insertion_deletion(corner, torch.empty(0, 3, 4, 4), torch.empty(0, 4, 4), 0)
    assert curves.insertion_auc.shape == (0, 1)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"maps": torch.full((1, 4, 4), float("nan"))}, ValueError, "maps holds NaN"),
        ({"maps": torch.rand(1, 2, 4, 4)}, ValueError, r"maps must be \[H,W\]"),
        ({"maps": [[0.0]]}, TypeError, "maps must be a tensor, got list"),
        ({"maps": torch.rand(2, 4, 4)}, ValueError, "2 maps for 1 images"),
        ({"images": torch.full((1, 1, 4, 4), float("inf"))}, ValueError, "images hold NaN or infinite"),
        ({"images": torch.zeros(1, 1, 4, 4, dtype=torch.uint8)}, ValueError, r"floating \[B,C,H,W\]"),
        ({"target": 2}, ValueError, r"target classes must lie in 0\.\.1, got 2"),
        ({"target": 0.5}, TypeError, "class indices"),
        ({"target": torch.tensor([0, 1])}, ValueError, r"target must be an int, \[B\]"),
        ({"baseline": "grey"}, ValueError, "baseline must be"),
        ({"baseline": torch.rand(2)}, ValueError, r"a colour \[1\]"),
        ({"baseline": torch.rand(3, 1, 4, 4)}, ValueError, "must have 1 images, got 3"),
        ({"baseline": torch.tensor([float("nan")])}, ValueError, "baseline holds NaN"),
        ({"step": 0.0}, ValueError, r"\(0, 1\], got 0.0"),
        ({"order": "rising"}, ValueError, '"falling" or "raster"'),
        ({"threshold": 0.5}, ValueError, 'threshold belongs to order="raster"'),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"classifier": 3}, TypeError, "finecf.wrap classifier or a callable"),
        ({"classifier": lambda x: x}, ValueError, "must return logits"),
        ({"classifier": lambda x: x.flatten(1) * float("nan")}, ValueError, "NaN or infinite logits"),
    ],
)
def test_bad_input_gets_a_sentence(change, error, sentence):
    arguments = {"classifier": corner, "images": torch.rand(1, 1, 4, 4), "maps": torch.rand(1, 4, 4), "target": 0}
    with pytest.raises(error, match=sentence):
        insertion_deletion(**(arguments | change))
