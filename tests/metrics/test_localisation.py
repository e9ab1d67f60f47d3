"""Localisation: hand-computed scores, a perfect map against its reverse, scikit-learn's average precision, dilation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finecf.metrics import area_before, auprc, dilate_masks, energy_share, max_hit, resize_maps

MAP = torch.tensor([[[0.5, 0.2], [0.3, 0.0]]])
MASK = torch.tensor([[[False, True], [True, False]]])


def test_scores_by_hand():
    assert energy_share(MAP, MASK).item() == pytest.approx(0.5)
    assert max_hit(MAP, MASK).item() == 0
    # Falling order: miss, hit (precision 1/2), hit (2/3), miss.
    assert auprc(MAP, MASK).item() == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_ties_and_all_zero_maps():
    flat = torch.full((1, 2, 2), 0.4)
    assert energy_share(flat, MASK).item() == pytest.approx(0.5)
    assert max_hit(flat, MASK).item() == pytest.approx(0.5)
    assert auprc(flat, MASK).item() == pytest.approx(0.5)
    zero = torch.zeros(1, 2, 2)
    assert energy_share(zero, MASK).item() == 0
    assert max_hit(zero, MASK).item() == 0
    assert auprc(zero, MASK).item() == pytest.approx(0.5)


def test_area_before_counts_what_a_map_ranks_before_the_mask():
    # Falling order: miss, hit, hit, miss; a pixel itself counts half.
    assert area_before(MAP, MASK).item() == pytest.approx((1.5 / 4 + 2.5 / 4) / 2)
    assert area_before(torch.full((1, 2, 2), 0.4), MASK).item() == pytest.approx(0.5)
    first = torch.tensor([[[0.0, 0.9], [0.9, 0.0]]])
    assert area_before(first, MASK).item() == pytest.approx(0.25)
    assert area_before(-first, MASK).item() == pytest.approx(0.75)


def test_perfect_map_and_its_reverse():
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, 2:4, 3:6] = True
    perfect = masks.float()
    assert [score(perfect, masks).item() for score in (energy_share, max_hit, auprc)] == [1, 1, 1]
    assert [score(1 - perfect, masks).item() for score in (energy_share, max_hit)] == [0, 0]
    assert auprc(1 - perfect, masks).item() == pytest.approx(6 / 64)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.integers(1, 30), side=st.integers(2, 9))
def test_auprc_is_average_precision(seed, levels, side):
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, levels, (2, side, side), generator=generator).float() - 3
    masks = torch.rand(2, side, side, generator=generator) < 0.3
    masks[:, 0, 0] = True
    ours = auprc(maps, masks)
    for b in range(2):
        theirs = average_precision_score(masks[b].flatten().numpy(), maps[b].flatten().numpy())
        assert ours[b].item() == pytest.approx(theirs)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), side=st.integers(2, 12), batch=st.integers(1, 4))
def test_batched_equals_one_by_one_and_scale_does_not_matter(seed, side, batch):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(batch, side, side, generator=generator)
    masks = torch.rand(batch, side, side, generator=generator) < 0.4
    masks[:, -1, -1] = True
    for score in (energy_share, max_hit, auprc):
        together = score(maps, masks)
        assert ((together >= 0) & (together <= 1)).all()
        torch.testing.assert_close(score(maps * 8, masks), together)
        for b in range(batch):
            assert score(maps[b], masks[b]).item() == pytest.approx(together[b].item())


def test_dilation_grows_by_half_a_cell_on_every_side():
    mask = torch.zeros(16, 32, dtype=torch.bool)
    mask[8, 16] = True
    grown = dilate_masks(mask, (4, 4))  # cells of 4 x 8 pixels
    rows, columns = grown.nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 10, 12, 20)
    assert grown.sum() == 5 * 9
    assert torch.equal(dilate_masks(mask[None], (16, 32))[0], mask)  # half a cell of one pixel rounds to none
    assert dilate_masks(torch.zeros(2, 8, 8, dtype=torch.bool), (2, 2)).sum() == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), cells=st.integers(1, 6), scale=st.integers(1, 6))
def test_dilation_holds_the_mask_and_joins_over_unions(seed, cells, scale):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.rand(2, cells * scale, cells * scale, generator=generator) < 0.1
    grid = (cells, cells)
    grown = dilate_masks(first | second, grid)
    assert grown[first].all()
    assert torch.equal(grown, dilate_masks(first, grid) | dilate_masks(second, grid))


def test_resize_is_bilinear_between_cell_centres():
    wide = resize_maps(torch.tensor([[0.0, 1.0]]), (1, 4))
    torch.testing.assert_close(wide, torch.tensor([[[0.0, 0.25, 0.75, 1.0]]]))


@pytest.mark.parametrize("score", [energy_share, max_hit, auprc])
def test_bad_input_gets_a_sentence(score):
    with pytest.raises(ValueError, match=r"masks \[1\] hold no pixel"):
        score(MAP.expand(2, 2, 2), torch.stack([MASK[0], torch.zeros(2, 2, dtype=torch.bool)]))
    with pytest.raises(ValueError, match=r"finecf\.metrics\.resize_maps"):
        score(torch.rand(1, 4, 4), MASK)
    with pytest.raises(TypeError, match=r"bool tensor, got torch\.float32"):
        score(MAP, MASK.float())
    with pytest.raises(ValueError, match="NaN or infinite"):
        score(MAP * np.nan, MASK)


@pytest.mark.parametrize("score", [energy_share, max_hit])
def test_mass_must_not_be_negative(score):
    with pytest.raises(ValueError, match=r"negative values .*clamp_min"):
        score(MAP - 0.1, MASK)


def test_bad_dilation_gets_a_sentence():
    with pytest.raises(TypeError, match="masks must be a bool tensor"):
        dilate_masks(torch.rand(4, 4), (2, 2))
    with pytest.raises(ValueError, match="grid must have at least one"):
        dilate_masks(MASK, (0, 2))
    with pytest.raises(ValueError, match="at most"):
        dilate_masks(MASK, (4, 2))
