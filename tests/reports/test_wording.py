"""The forms of numbers in tables and sentences."""

import pytest

from ghm_d2.reports.statistics.estimates import Estimate
from ghm_d2.reports.wording import confidence, interval, p_value, signed, with_half_width


def test_a_mean_has_half_its_interval_if_there_is_one():
    value = Estimate(3, 41.26, 40.76, 41.76)
    assert with_half_width(value, ".1f") == "41.3 ± 0.5"
    assert with_half_width(value, ".3g", ".2g") == "41.3 ± 0.5"
    assert with_half_width(value, ".0f", ".2f") == "41 ± 0.50"
    assert with_half_width(Estimate(1, 41.26), ".1f") == "41.3"
    assert with_half_width(Estimate(0), ".1f") == "-"


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (0.0, "+0.0"), (0.004, "+0.004"), (-0.06, "-0.1")]
)
def test_a_difference_has_its_sign(value, shown):
    assert signed(value) == shown


def test_intervals_and_tests():
    assert interval(Estimate(3, 1.0, 0.42, 1.96)) == "+0.4 to +2.0"
    assert [confidence(alpha) for alpha in (0.05, 0.05 / 3)] == ["95%", "98.3%"]
    assert [p_value(p) for p in (None, 0.0004, 0.0123)] == ["-", "<0.001", "0.012"]
