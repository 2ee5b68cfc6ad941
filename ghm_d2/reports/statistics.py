"""What a few seeds allow one to say: means, paired differences, 95% t intervals, verdicts."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
HIGHER, LOWER, NO_DIFFERENCE = "higher", "lower", "no difference shown"
ONE_SEED, NO_SEED = "one seed: no claim", "no seed on both sides: no claim"


@dataclass(frozen=True)
class Estimate:
    """The mean of `n` values and the 95% interval of their expectation.

    mean is None for n = 0; low and high are None for n < 2, where nothing is known of the spread.
    """

    n: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half the length of the interval; None where there is none."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def estimate(values: Iterable[float | None]) -> Estimate:
    """Mean and t interval of `values`; None, a value that is not defined, is not counted in n.

    Student's t assumes about normal, independent values: seeds, not classes or images.
    """
    known = np.array([value for value in values if value is not None], dtype=float)
    if not len(known):
        return Estimate(0)
    mean = float(known.mean())
    if len(known) == 1:
        return Estimate(1, mean)
    t = stdtrit(len(known) - 1, 1 - (1 - CONFIDENCE) / 2)
    half = float(t * known.std(ddof=1) / math.sqrt(len(known)))
    return Estimate(len(known), mean, mean - half, mean + half)


def paired_difference(
    side: Mapping[int, float | None], reference: Mapping[int, float | None]
) -> Estimate:
    """`side` minus `reference`, of the seeds that both have a value of.

    Args:
        side, reference: the value by seed; None where it is not defined.
    """
    both = [(value, reference.get(seed)) for seed, value in side.items()]
    return estimate(a - b for a, b in both if a is not None and b is not None)


def verdict(difference: Estimate) -> str:
    """The claim that a difference allows: `HIGHER` or `LOWER` if its interval excludes zero."""
    if difference.low is None or difference.high is None:
        return ONE_SEED if difference.n else NO_SEED
    if difference.low > 0:
        return HIGHER
    return LOWER if difference.high < 0 else NO_DIFFERENCE
