"""Intervals against scipy's own, and what they allow one to claim."""

import numpy as np
import pytest
from scipy import stats

from ghm_d2.reports.statistics import (
    HIGHER,
    LOWER,
    NO_DIFFERENCE,
    NO_SEED,
    ONE_SEED,
    Estimate,
    estimate,
    paired_difference,
    verdict,
)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_the_interval_is_scipys(n):
    values = np.random.default_rng(n).normal(50, 3, n)
    found = estimate(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_paired_interval_is_scipys(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(50, 3, n), rng.normal(48, 3, n)
    found = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_value_has_no_interval_and_none_is_not_counted():
    assert estimate([3.0]) == Estimate(1, 3.0)
    assert estimate([None, 3.0, None]) == Estimate(1, 3.0)
    assert estimate([None]) == estimate([]) == Estimate(0)


def test_only_seeds_with_a_value_on_both_sides_count():
    side = {1: 50.0, 2: 52.0, 3: None, 4: 99.0}
    reference = {3: 40.0, 2: 51.0, 1: 48.0, 5: 0.0}
    found = paired_difference(side, reference)
    assert (found.n, found.mean) == (2, 1.5)


def test_pairing_shows_what_the_spread_of_seeds_hides():
    """Both sides vary by 10 from seed to seed, their difference by 0.1."""
    reference = {1: 40.0, 2: 50.0, 3: 60.0}
    side = {seed: value + 1 + seed / 20 for seed, value in reference.items()}
    assert verdict(paired_difference(side, reference)) == HIGHER
    assert estimate(side.values()).low < estimate(reference.values()).high


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Estimate(3, 1.0, 0.1, 1.9), HIGHER),
        (Estimate(3, -1.0, -1.9, -0.1), LOWER),
        (Estimate(3, 1.0, -0.1, 2.1), NO_DIFFERENCE),
        (Estimate(3, 1.0, 0.0, 2.0), NO_DIFFERENCE),
        (Estimate(2, 0.0, 0.0, 0.0), NO_DIFFERENCE),
        (Estimate(1, 30.0), ONE_SEED),
        (Estimate(0), NO_SEED),
    ],
)
def test_a_claim_needs_an_interval_without_zero(difference, words):
    assert verdict(difference) == words
