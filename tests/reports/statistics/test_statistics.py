"""Intervals against scipy's own, and the errors that seeds and test images leave."""

import math

import numpy as np
import pytest
from scipy import stats

from ghm_d2.reports.statistics.estimates import (
    Effect,
    Error,
    Estimate,
    Replicates,
    Scores,
    estimate,
    paired_effect,
    unpaired_effect,
)


def scores(values, replicates=None) -> Scores:
    """Seeds from 0; replicates: (n, B)."""
    own = {s: Replicates("set", 60, row) for s, row in enumerate(replicates or [])}
    return Scores(dict(enumerate(values)), own)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_the_interval_is_scipys(n):
    values = np.random.default_rng(n).normal(50, 3, n)
    found = estimate(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_paired_test_is_scipys(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(50, 3, n), rng.normal(48, 3, n)
    found, expected = paired_effect(scores(a), scores(b)), stats.ttest_rel(a, b)
    low, high = expected.confidence_interval(0.98)
    assert found.p == pytest.approx(expected.pvalue)
    interval = found.estimate(alpha=0.02)
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_the_unpaired_test_is_scipys_with_pooled_variance():
    """It uses all seeds of both sides, even if the other side lacks them."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(50, 3, 4), rng.normal(48, 3, 6)
    found = unpaired_effect(scores(a), scores(b))
    assert found.p == pytest.approx(stats.ttest_ind(a, b).pvalue)


def test_one_value_has_no_interval_and_none_is_not_counted():
    assert estimate([3.0]) == Estimate(1, 3.0)
    assert estimate([None, 3.0, None]) == Estimate(1, 3.0)
    assert estimate([None]) == estimate([]) == Estimate(0)


def test_only_seeds_with_a_value_on_both_sides_are_paired():
    side, reference = Scores({1: 50.0, 2: 52.0, 4: 99.0}), Scores({3: 40.0, 2: 51.0, 1: 48.0})
    found = paired_effect(side, reference)
    assert (found.n, found.mean) == (2, 1.5)


def test_pairing_shows_what_the_spread_of_seeds_hides():
    """Both sides vary by 10 from seed to seed, their difference by 0.1."""
    side, reference = scores([41.05, 51.1, 61.15]), scores([40.0, 50.0, 60.0])
    assert paired_effect(side, reference).p < 0.01
    assert unpaired_effect(side, reference).p > 0.5


def test_images_count_as_they_move_the_mean_over_seeds():
    """Their effect on each seed alone averages out, like the chance of the seeds."""
    rng = np.random.default_rng(1)
    alike, own = rng.normal(0, 2, 4000), rng.normal(0, 3, (5, 4000))
    reference = scores(rng.normal(50, 1, 5), [np.full(4000, 50.0)] * 5)
    values = rng.normal(50, 1, 5)
    found = paired_effect(scores(values, list(50 + alike + own)), reference)
    assert found.images.se == pytest.approx(math.hypot(2, 3 / math.sqrt(5)), rel=0.05)
    assert found.error.se == pytest.approx(np.hypot(found.seeds.se, found.images.se))
    own_alone = paired_effect(scores(values, list(50 + own)), reference).images.se
    assert own_alone == pytest.approx(3 / math.sqrt(5), rel=0.05)


def test_what_images_do_to_both_sides_cancels():
    rng = np.random.default_rng(2)
    replicates = list(50 + rng.normal(0, 3, 100) + np.zeros((3, 1)))
    found = paired_effect(scores([1, 2, 3], replicates), scores([1, 2, 4], replicates))
    assert found.images.se == 0


def test_replicates_of_other_images_are_not_compared():
    rng = np.random.default_rng(3)
    one, other = (list(rng.normal(50, 1, (3, 100))) for _ in range(2))
    side, reference = scores([1, 2, 3], one), scores([1, 3, 5], other)
    assert paired_effect(side, reference).images is not None
    elsewhere = {s: Replicates("other", 60, r.ap) for s, r in reference.replicates.items()}
    assert paired_effect(side, Scores(reference.ap, elsewhere)).images is None


def test_degrees_of_freedom_are_between_those_of_the_parts():
    """Satterthwaite's, of a mean of six seeds and an error of images known with 50."""
    both = Effect(6, 1.0, Error(1.0, 1 / 5), Error(1.0, 1 / 50)).error
    assert both.df == pytest.approx(4 / (1 / 5 + 1 / 50))
    assert Error(2.0, 16 / 5).df == pytest.approx(5)


def test_sides_that_never_differ():
    same = scores([50.0, 50.0])
    assert paired_effect(same, same).p == 1
    assert paired_effect(scores([51.0, 51.0]), same).p == 0
