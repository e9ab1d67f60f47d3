"""Label maps: what comes out of each division, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finecf.regions import check_labels, from_masks, grid, region_sizes, saliency_patches, slico


def labels_of(map_: torch.Tensor) -> list[int]:
    return map_.unique().tolist()


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), count=st.integers(2, 60))
def test_a_grid_covers_the_image_with_rectangles(height: int, width: int, count: int) -> None:
    if height * width < 2 or count > height * width:
        return
    labels = grid(height, width, count)
    regions = int(labels.max()) + 1
    assert labels.shape == (height, width)
    assert labels.dtype == torch.int32
    assert labels_of(labels) == list(range(regions))
    for region in range(regions):
        rows, columns = (labels == region).nonzero(as_tuple=True)
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert int(box) == len(rows)


@pytest.mark.parametrize(("count", "got"), [(49, 49), (50, 49), (25, 25), (2, 2), (7, 6)])
def test_a_grid_comes_near_the_number_asked_for(count: int, got: int) -> None:
    assert int(grid(224, 224, count).max()) + 1 == got


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_slico_gives_connected_regions_and_about_as_many_as_asked(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, channels, 6, 6, generator=generator)
    image = torch.nn.functional.interpolate(coarse, 96, mode="bicubic")[0]
    labels = slico(image, 49)
    regions = int(labels.max()) + 1
    assert 30 <= regions <= 70
    assert labels_of(labels) == list(range(regions))
    assert torch.equal(labels, slico(image, 49))
    assert torch.equal(labels, slico(image * 7 - 3, 49))  # the range of the image is of no matter


def test_a_flat_image_is_still_divided() -> None:
    labels = slico(torch.full((3, 64, 64), 0.5), 16)
    assert 8 <= int(labels.max()) + 1 <= 24


def test_saliency_patches_are_ordered_and_lose_nothing() -> None:
    saliency = torch.arange(16.0).view(4, 4)
    labels = saliency_patches(saliency, (8, 8), side=4, per_region=3)
    assert labels_of(labels) == list(range(5))
    means = [float(saliency.repeat_interleave(2, 0).repeat_interleave(2, 1)[labels == r].mean()) for r in range(5)]
    assert means == sorted(means, reverse=True)
    assert region_sizes(labels, 5).tolist() == [12, 12, 12, 12, 16]  # the patch left over joins the last region
    assert int(saliency_patches(torch.rand(7, 7), (112, 112), side=28, per_region=8).max()) + 1 == 98
    assert int(saliency_patches(torch.rand(7, 7), (224, 224)).max()) + 1 == 25


def test_of_equal_patches_the_first_comes_first() -> None:
    labels = saliency_patches(torch.zeros(2, 2), (4, 4), side=2, per_region=1)
    assert labels.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


def test_masks_smallest_on_top_and_the_rest_a_region() -> None:
    masks = torch.zeros(3, 6, 6, dtype=torch.bool)
    masks[0, :4] = True
    masks[1, 1:3, 1:3] = True
    masks[2, 3:5, 3:] = True
    labels = from_masks(masks)
    assert labels_of(labels) == [0, 1, 2, 3]
    assert bool((labels[1:3, 1:3] == 1).all())
    assert bool((labels[3:5, 3:] == 2).all())
    assert bool((labels[5] == 3).all())
    assert int((labels == 0).sum()) == 24 - 4 - 3
    assert torch.equal(labels, from_masks([mask.numpy() for mask in masks]))
    assert torch.equal(labels, from_masks(np.asarray(masks)))


def test_a_mask_that_is_hidden_is_dropped() -> None:
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[0, :2] = masks[1, :2] = True
    masks[2, 2:] = True
    assert labels_of(from_masks(masks)) == [0, 1]
    assert bool((from_masks(masks)[:2] == 0).all())


def test_overlaps_can_be_refused_by_name() -> None:
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[0, 0], masks[1, 0, :2], masks[2, 3] = True, True, True
    with pytest.raises(ValueError, match=r"masks overlap in 2 pixels: 0 and 1; give each pixel to one mask"):
        from_masks(masks, overlaps="refuse")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: from_masks(torch.zeros(2, 4, 4)), TypeError, r"must be boolean \[n,H,W\]; got torch.float32"),
        (lambda: from_masks(torch.ones(1, 4, 4, dtype=torch.bool)), ValueError, r"holds one region"),
        (lambda: from_masks(torch.ones(4, 4, dtype=torch.bool)), ValueError, r"with n at least 1; got \[4, 4\]"),
        (lambda: from_masks(torch.ones(1, 4, 4).bool(), overlaps="x"), ValueError, r"'smallest' or 'refuse'; got 'x'"),
        (lambda: grid(4, 4, 1), ValueError, r"regions must be from 2 to the number of pixels, 16; got 1"),
        (lambda: slico(torch.rand(3, 4, 4), 17), ValueError, r"from 2 to the number of pixels, 16; got 17"),
        (lambda: saliency_patches(torch.rand(4, 4), (8, 8), 9), ValueError, r"side must be from 1 to 8"),
        (lambda: saliency_patches(torch.rand(4, 4), (8, 8), 2, 4), ValueError, r"at least two regions; got 2\^2 / 4"),
        (lambda: saliency_patches(torch.full((4, 4), torch.nan), (8, 8)), ValueError, r"finite map \[h,w\]"),
        (lambda: check_labels(torch.eye(4).bool(), (4, 4)), TypeError, r"divide by masks with finecf.regions"),
        (lambda: check_labels([[0, 9], [1, 2]], (2, 2)), ValueError, r"label 9 is above the number of pixels"),
        (lambda: check_labels([[0, 3], [0, 3]], (2, 2)), ValueError, r"of 0\.\.3 no pixel has 1, 2: renumber"),
    ],
)
def test_what_is_refused(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


def test_any_integers_will_do_as_labels() -> None:
    for dtype in (np.uint8, np.int64, np.int16):
        labels = check_labels(np.array([[0, 1], [1, 2]], dtype=dtype), (2, 2))
        assert labels.dtype == torch.int32
        assert labels.tolist() == [[0, 1], [1, 2]]
