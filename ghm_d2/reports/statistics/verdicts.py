"""The verdict on each difference: one of four words, corrected for multiple tests.

A comparison's primary pair is tested alone at 5 %, its other pairs together at 5 % (Holm). Planned
looks at fewer seeds share the 5 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from ghm_d2.reports.statistics.estimates import (
    ALPHA,
    Effect,
    Estimate,
    Scores,
    paired_effect,
    unpaired_effect,
)

HIGHER, LOWER, SAME = "higher", "lower", "practically the same"
UNDECIDED, INTERIM = "undecided", "interim"
ONE_SEED, NO_SEED = "one seed: no claim", "no seed on both sides: no claim"
ENOUGH_SEEDS = 6  # with fewer, no two-sided sign-flip test reaches 5 %: exploration only


@dataclass(frozen=True)
class Contrast:
    """A pair to be judged. seeds: all planned seeds, in the order in which they are run."""

    side: Scores
    reference: Scores
    seeds: Sequence[int]
    primary: bool = False

    def effect(self, count: int) -> Effect:
        """The paired difference over the first `count` planned seeds."""
        seeds = self.seeds[:count]
        return paired_effect(self.side.first(seeds), self.reference.first(seeds))


@dataclass(frozen=True)
class Verdict:
    """The verdict on a pair.

    word: one of the constants above; until all seeds are done, INTERIM and their number.
    effect: the difference over all finished seeds, or over those of the look that decided.
    p: the p-value, corrected for the other pairs and looks; None without a test.
    alpha: the interval in `estimate` has confidence 1 - alpha, and holds zero unless p <= 5 %.
    pooled: the same interval without pairing, from the pooled variance of both sides.
    """

    word: str
    effect: Effect
    p: float | None
    alpha: float
    pooled: Estimate

    @property
    def estimate(self) -> Estimate:
        """The mean difference and its interval."""
        return self.effect.estimate(self.alpha)


def judge(contrasts: Sequence[Contrast], margin: float, looks: Sequence[int] = ()) -> list[Verdict]:
    """The verdicts on the pairs of one comparison.

    Args:
        margin: differences in AP up to this size are practically none.
        looks: planned numbers of seeds after which an early verdict is possible.
    """
    first = [contrast for contrast in contrasts if contrast.primary]
    others = [contrast for contrast in contrasts if not contrast.primary]
    found = {True: iter(_family(first, margin, looks)), False: iter(_family(others, margin, looks))}
    return [next(found[contrast.primary]) for contrast in contrasts]


def spending(looks: Sequence[int], seeds: int) -> list[float]:
    """The parts of 5 % that each of `looks`, rising and below `seeds`, and the last test may use.

    Early looks get little, as with O'Brien and Fleming (the spending function of Lan and DeMets).
    The parts add up to 5 %, so the limit holds however the looks are correlated.
    """
    spent = [2 * float(ndtr(ndtri(ALPHA / 2) / math.sqrt(look / seeds))) for look in looks]
    return np.diff([0.0, *spent, ALPHA]).tolist()


def holm(p: Sequence[float], alpha: float) -> tuple[list[float], list[float]]:
    """Holm's adjusted p-values, and the alpha of an interval that agrees with each test."""
    m, order = len(p), np.argsort(p, kind="stable")
    factors = np.arange(m, 0, -1)
    adjusted = np.minimum(1, np.maximum.accumulate(np.array(p)[order] * factors))
    rejected = int((adjusted <= alpha).sum())
    factors[rejected:] = m - rejected
    by_pair = np.argsort(order)
    return adjusted[by_pair].tolist(), (alpha / factors)[by_pair].tolist()


def _family(family: Sequence[Contrast], margin: float, looks: Sequence[int]) -> list[Verdict]:
    """The verdicts on pairs corrected for each other, each from the first look that decides it."""
    found: dict[int, Verdict] = {}
    seeds = max((len(contrast.seeds) for contrast in family), default=0)
    planned = sorted({look for look in looks if 1 < look < seeds})
    for look, alpha in zip([*planned, seeds], spending(planned, seeds), strict=True):
        effects = [contrast.effect(look) for contrast in family]
        tests = [_p_if_complete(*both, look) for both in zip(family, effects, strict=True)]
        adjusted, levels = holm([1.0 if p is None else p for p in tests], alpha)
        for i, contrast in enumerate(family):
            if tests[i] is not None and i not in found:
                at_5 = min(1.0, adjusted[i] * ALPHA / alpha)
                if verdict := _decided(contrast, effects[i], at_5, levels[i], margin):
                    found[i] = verdict
    return [found.get(i) or _so_far(contrast) for i, contrast in enumerate(family)]


def _p_if_complete(contrast: Contrast, effect: Effect, look: int) -> float | None:
    """Return the p-value of the effect; None unless all seeds of the look are finished."""
    return effect.p if effect.n == min(look, len(contrast.seeds)) else None


def _decided(
    contrast: Contrast, effect: Effect, p: float, alpha: float, margin: float
) -> Verdict | None:
    """Return a look's verdict; None if it leaves the pair undecided and more seeds are planned."""
    found, word = effect.estimate(alpha), UNDECIDED
    assert found.mean is not None and found.low is not None and found.high is not None
    if max(-found.low, found.high) <= margin:
        word = SAME
    elif p <= ALPHA:
        word = HIGHER if found.mean > 0 else LOWER
    elif effect.n < len(contrast.seeds):
        return None
    seeds = contrast.seeds[: effect.n]
    pooled = unpaired_effect(contrast.side.first(seeds), contrast.reference.first(seeds))
    return Verdict(word, effect, p, alpha, pooled.estimate(alpha))


def _so_far(contrast: Contrast) -> Verdict:
    """Return a verdict without a claim, on the seeds that are finished."""
    planned = len(contrast.seeds)
    effect = contrast.effect(planned)
    word = f"{INTERIM}: {effect.n} of {planned} seeds, no verdict"
    if effect.n == 0:
        word = NO_SEED
    elif planned == 1:
        word = ONE_SEED
    pooled = unpaired_effect(contrast.side, contrast.reference)
    return Verdict(word, effect, None, ALPHA, pooled.estimate())
