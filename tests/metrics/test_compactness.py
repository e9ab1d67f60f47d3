"""Compactness: hand-computed values of the three forms, the all-zero map, ranges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finecf.metrics import compactness


def test_forms_by_hand():
    maps = torch.tensor([[[1.0, 0.6], [0.4, 0.0]]])
    assert compactness(maps, "ratio").item() == pytest.approx((1.6 / 2.0) / 0.5)
    assert compactness(maps, "area").item() == pytest.approx(0.5)
    # Rows weigh (0.8, 0.2) and columns (0.7, 0.3): variances 0.16 and 0.21; of a constant map 0.25 each.
    assert compactness(maps, "width").item() == pytest.approx(1 - ((0.16 + 0.21) / 0.5) ** 0.5)


@pytest.mark.parametrize("form", ["ratio", "area", "width"])
def test_an_all_zero_map_scores_zero_beside_others(form):
    maps = torch.stack([torch.zeros(5, 7), torch.zeros(5, 7)])
    maps[1, 2, 3] = 1
    zero, single = compactness(maps, form).tolist()
    assert zero == 0
    assert single == pytest.approx({"ratio": 35, "area": 1 - 1 / 35, "width": 1}[form])


def test_constant_map_and_empty_region():
    assert compactness(torch.ones(4, 4), "ratio").item() == pytest.approx(1)
    assert compactness(torch.ones(4, 4), "width").item() == pytest.approx(0, abs=1e-7)
    assert compactness(torch.full((4, 4), 0.3), "ratio").item() == 0
    assert compactness(torch.full((4, 4), 0.3), "area").item() == 1
    assert compactness(torch.ones(1, 1), "width").item() == 0


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), height=st.integers(1, 9), width=st.integers(2, 9))
def test_ranges_and_scale(seed, height, width):
    maps = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    area, spread = compactness(maps, "area"), compactness(maps, "width")
    ratio = compactness(maps, "ratio")
    assert ((area >= 0) & (area <= 1)).all()
    assert (spread <= 1).all()
    assert ((ratio == 0) | (ratio >= 1 - 1e-12)).all()
    torch.testing.assert_close(compactness(maps / 4, "width"), spread)
    torch.testing.assert_close(compactness(maps / 4, "ratio", threshold=0.125), ratio)


@pytest.mark.parametrize(
    ("maps", "form", "sentence"),
    [
        (torch.tensor([[-0.1, 1.0]]), "ratio", "negative values"),
        (torch.tensor([[0.0, 1.5]]), "area", r"must lie in \[0,1\]"),
        (torch.tensor([[0.0, float("inf")]]), "area", "NaN or infinite"),
        (torch.rand(3, 3), "length", '"ratio", "area" or "width"'),
        (torch.rand(2, 3, 3, 3), "ratio", r"\[B,H,W\]"),
    ],
)
def test_bad_input_gets_a_sentence(maps, form, sentence):
    with pytest.raises(ValueError, match=sentence):
        compactness(maps, form)
