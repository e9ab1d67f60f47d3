"""Bootstrap intervals: known cases, seeds, pairing, coverage, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finecf.metrics import bootstrap as module
from finecf.metrics import bootstrap_mean, paired_bootstrap


def test_constant_values_have_no_width():
    interval = bootstrap_mean([2.5] * 7)
    assert (interval.mean, interval.low, interval.high, interval.count) == (2.5, 2.5, 2.5, 7)
    assert interval.excludes_zero


def test_width_is_that_of_the_normal_law():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    interval = bootstrap_mean(values, resamples=4000)
    expected = 2 * 1.96 * values.std().item() / math.sqrt(400)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.08)
    assert interval.low < interval.mean < interval.high


def test_pairing_removes_what_the_images_share():
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(100, generator=generator) * 10
    first, second = image + 0.1, image + 0.01 * torch.randn(100, generator=generator)
    assert paired_bootstrap(first, second).excludes_zero
    assert not bootstrap_mean(first).excludes_zero


def test_same_seed_same_bits_and_the_global_generator_is_untouched():
    values = torch.rand(50)
    before = torch.get_rng_state()
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert torch.equal(before, torch.get_rng_state())
    other = bootstrap_mean(values, generator=torch.Generator().manual_seed(9))
    assert other == bootstrap_mean(values, generator=torch.Generator().manual_seed(9))
    assert other != bootstrap_mean(values)


def test_resamples_in_pieces_are_as_many(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 64)
    interval = module.bootstrap_mean(torch.arange(10.0), resamples=100)
    assert 2 < interval.low < 4.5 < interval.high < 7


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_interval_lies_within_the_values(values):
    interval = bootstrap_mean(values, resamples=200)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack
    assert str(interval).startswith(f"{interval.mean:.3f} [")


@pytest.mark.parametrize(
    ("values", "rest", "sentence"),
    [
        ([], {}, r"N >= 1, got \[0\]"),
        ([[1.0]], {}, r"got \[1, 1\]"),
        ([float("nan")], {}, "NaN or infinite"),
        ([1.0], {"level": 1.0}, r"level must lie in \(0, 1\)"),
        ([1.0], {"resamples": 1}, "at least 2, got 1"),
    ],
)
def test_bad_input_gets_a_sentence(values, rest, sentence):
    with pytest.raises(ValueError, match=sentence):
        bootstrap_mean(values, **rest)


def test_unequal_pairs_are_refused():
    with pytest.raises(ValueError, match=r"equal lengths: got \[2\] and \[3\]"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0, 3.0])
