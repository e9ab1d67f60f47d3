"""Swaps: cells and pixels, parts in cells, Near-KP and Same-KP, the share of edits on a mask."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finecf.metrics import cells_on_mask, keypoint_scores, parts_in_cell, share_on_mask


@settings(max_examples=50, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    height=st.integers(9, 40),
    width=st.integers(9, 40),
    data=st.data(),
)
def test_a_pixel_belongs_to_exactly_one_cell(grid, height, width, data):
    mask = np.zeros((height, width), bool)
    mask[data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))] = True
    holders = [
        (r, c)
        for r in range(grid[0])
        for c in range(grid[1])
        if parts_in_cell((r, c), grid, (height, width), part_masks={"eye": mask})
    ]
    assert len(holders) == 1


def test_parts_by_key_point_and_by_mask():
    mask = np.zeros((8, 8), bool)
    mask[0, 4] = True
    points = {"beak": (3.9, 0.0), "eye": (4.0, 3.0), "tail": None}
    assert parts_in_cell((0, 0), (2, 2), (8, 8), keypoints=points) == {"beak"}
    assert parts_in_cell((0, 1), (2, 2), (8, 8), keypoints=points) == {"eye"}
    assert parts_in_cell((0, 1), (2, 2), (8, 8), keypoints=points, part_masks={"wing": mask}) == {"eye", "wing"}
    assert parts_in_cell((1, 1), (2, 2), (8, 8), keypoints=points, part_masks={"wing": mask}) == set()


def test_keypoint_scores_by_hand():
    query = [{"beak"}, {"beak", "eye"}, {"wing"}, set()]
    reference = [{"beak"}, {"tail"}, set(), {"wing"}]
    scores = keypoint_scores(query, reference)
    assert (scores.near, scores.same, scores.swaps) == (0.5, 0.25, 4)
    assert keypoint_scores([], []) == keypoint_scores((), ())
    assert keypoint_scores([], []).swaps == 0


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(st.sets(st.sampled_from("abc")), st.sets(st.sampled_from("abc"))), max_size=8))
def test_same_is_at_most_near_and_order_of_sides_does_not_matter(pairs):
    query, reference = [a for a, _ in pairs], [b for _, b in pairs]
    scores = keypoint_scores(query, reference)
    assert 0 <= scores.same <= scores.near <= 1
    assert scores == keypoint_scores(reference, query)


def test_share_of_edits_on_a_mask():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, 4:] = True
    assert cells_on_mask(mask, (2, 2)).tolist() == [[False, True], [False, False]]
    assert share_on_mask([(0, 1), (1, 1), (0, 0), (0, 1)], mask, (2, 2)) == 0.5
    assert share_on_mask([], mask, (2, 2)) == 0


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match=r"cell \(2, 0\) lies outside the grid of 2 x 2"):
        parts_in_cell((2, 0), (2, 2), (8, 8), keypoints={})
    with pytest.raises(ValueError, match=r"needs keypoints= or part_masks="):
        parts_in_cell((0, 0), (2, 2), (8, 8))
    with pytest.raises(ValueError, match=r"mask of 'wing' must be \[8, 8\]"):
        parts_in_cell((0, 0), (2, 2), (8, 8), part_masks={"wing": np.zeros((4, 4), bool)})
    with pytest.raises(ValueError, match="1 swapped cells and 2 replacements"):
        keypoint_scores([set()], [set(), set()])
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        cells_on_mask(torch.rand(4, 4), (2, 2))
    with pytest.raises(ValueError, match="lies outside the grid"):
        share_on_mask([(0, 2)], torch.ones(4, 4, dtype=torch.bool), (2, 2))
