"""The four words, and that they claim too much in no more than one of twenty comparisons."""

import numpy as np
import pytest
from simulate_verdicts import CASES, simulate

from ghm_d2.reports.statistics.estimates import Scores
from ghm_d2.reports.statistics.verdicts import (
    HIGHER,
    LOWER,
    NO_SEED,
    ONE_SEED,
    SAME,
    UNDECIDED,
    Contrast,
    holm,
    judge,
    spending,
)


def contrast(*differences, planned=None, primary=True) -> Contrast:
    """A pair with these differences, seeds from 1; None is a seed that is not there."""
    known = {s: d for s, d in enumerate(differences, 1) if d is not None}
    seeds = range(1, 1 + (planned or len(differences)))
    reference = Scores(dict.fromkeys(known, 50.0))
    return Contrast(Scores({s: 50 + d for s, d in known.items()}), reference, seeds, primary)


def word(*differences, margin=1.0, looks=(), **kwargs) -> str:
    return judge([contrast(*differences, **kwargs)], margin, looks)[0].word


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ((2.0, 2.1, 1.9), HIGHER),
        ((-2.0, -2.1, -1.9), LOWER),
        ((0.2, 0.1, 0.0), SAME),
        ((0.5, 0.6, 0.5), SAME),  # surely above zero, by less than anybody minds
        ((3.0, 0.0, -1.0), UNDECIDED),
        ((0.0, 0.0), SAME),
        ((30.0,), ONE_SEED),
        ((None, None), NO_SEED),
    ],
)
def test_a_word_is_where_the_interval_lies(differences, expected):
    assert word(*differences) == expected


def test_the_margin_decides_what_is_practically_the_same():
    assert word(0.5, 0.6, 0.5, margin=0.2) == HIGHER
    assert word(2.0, 2.1, 1.9, margin=3.0) == SAME


def test_there_is_no_verdict_before_all_planned_seeds_are_there():
    assert word(2.0, 2.1, 1.9, planned=6) == "interim: 3 of 6 seeds, no verdict"
    assert word(2.0, None, 1.9) == "interim: 2 of 3 seeds, no verdict"
    assert word(2.0, planned=6) == "interim: 1 of 6 seeds, no verdict"


def test_a_look_that_was_planned_decides_early_if_it_is_clear():
    (verdict,) = judge([contrast(2.0, 2.1, 1.9, planned=6)], 1.0, [3])
    assert verdict.word == HIGHER and verdict.effect.n == 3
    assert verdict.alpha == pytest.approx(spending([3], 6)[0])
    assert word(2.0, 3.0, 2.5, planned=6) == "interim: 3 of 6 seeds, no verdict"
    assert word(2.0, 3.0, 2.5, planned=6, looks=[3]) == "interim: 3 of 6 seeds, no verdict"
    assert word(2.0, 2.1, 1.9, None, 2.0, 2.0, looks=[3]) == HIGHER
    (later,) = judge([contrast(2.0, 2.1, 1.9, -50.0, 9.0, 3.0)], 1.0, [3])
    assert (later.word, later.effect.n) == (HIGHER, 3)  # a decision stands


def test_looks_share_the_5_percent():
    parts = spending([3, 6], 9)
    assert sum(parts) == pytest.approx(0.05) and parts == sorted(parts)
    assert spending([], 6) == pytest.approx([0.05])


def test_holm_is_the_textbooks():
    adjusted, alphas = holm([0.01, 0.04, 0.03, 0.005], 0.05)
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert alphas == pytest.approx([0.05 / 3, 0.05 / 2, 0.05 / 2, 0.05 / 4])


def test_the_primary_pair_is_tested_alone_and_the_others_together():
    """The same differences; p is 0.03 for each alone."""
    differences = (3.0, 0.5, 2.0, 3.5, 1.0, 0.2)
    pairs = [contrast(*differences, primary=i == 1) for i in range(4)]
    verdicts = judge(pairs, 1.0)
    alone, *others = [verdicts[1], verdicts[0], *verdicts[2:]]
    assert alone.word == HIGHER and alone.p < 0.05 and alone.alpha == 0.05
    for verdict in others:
        assert verdict.word == UNDECIDED and verdict.p == pytest.approx(3 * alone.p)
        assert verdict.estimate.low < 0 < verdict.estimate.mean


def test_an_interval_holds_zero_where_nothing_is_claimed():
    rng = np.random.default_rng(0)
    for _ in range(50):
        pairs = [contrast(*rng.normal(rng.uniform(0, 3), 1, 4), primary=False) for _ in range(4)]
        for verdict in judge(pairs, 0.0):
            claimed = verdict.word in (HIGHER, LOWER)
            assert claimed == (verdict.p <= 0.05)
            assert claimed != (verdict.estimate.low <= 0 <= verdict.estimate.high)


def test_claims_are_false_as_rarely_and_found_as_often_as_planned():
    """With 300 comparisons; three standard errors of a share of 5 % are 3.8 points."""
    shares = simulate(CASES[0], 6, 300, np.random.default_rng(0))
    for kind in ("primary", "others", "with a look", "same"):
        assert shares[kind] <= 5 + 3.8
    assert shares["found"] == pytest.approx(shares["planned"], abs=9)
    assert shares["seeds alone"] > 15  # what the error of images is counted for
