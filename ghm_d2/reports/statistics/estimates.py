"""Means and differences of AP over seeds, with the errors from seeds and from test images."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

ALPHA = 0.05  # probability of claiming a difference that does not exist


@dataclass(frozen=True)
class Estimate:
    """The mean of `n` values and its confidence interval, 95% unless another is stated.

    mean is None for n = 0; low and high are None for n < 2, because the spread is unknown.
    """

    n: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half the length of the interval; None if there is none."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


class Error(NamedTuple):
    """A standard error and the noise in it.

    se: standard error, in AP. noise: se^4 / df. Noises of independent errors add up, so the df of a
    sum is its se^4 / noise (Satterthwaite).
    """

    se: float
    noise: float

    @property
    def df(self) -> float:
        """The degrees of freedom of the error (Satterthwaite)."""
        return max(1.0, self.se**4 / self.noise) if self.noise else math.inf


@dataclass(frozen=True)
class Replicates:
    """A run's AP on resamples of its test images.

    set: identifies the images; runs judged on the same set have the same resamples.
    images: number of images. ap: (B,) percentages.
    """

    set: str
    images: int
    ap: np.ndarray

    def same_images(self, other: "Replicates") -> bool:
        """Return whether `other` has the same resamples."""
        return (self.set, len(self.ap)) == (other.set, len(other.ap))


@dataclass(frozen=True)
class Scores:
    """A side's AP by seed, and the replicates of the runs that have some."""

    ap: dict[int, float]
    replicates: dict[int, Replicates] = field(default_factory=dict)

    def first(self, seeds: Sequence[int]) -> "Scores":
        """Return the scores of these seeds alone; seeds without a score are left out."""
        kept = {seed: self.ap[seed] for seed in seeds if seed in self.ap}
        return Scores(kept, {s: r for s, r in self.replicates.items() if s in kept})


@dataclass(frozen=True)
class Effect:
    """The mean difference in AP of a side and its reference over `n` seeds, and its two errors.

    mean is None for n = 0. seeds: the error from chance in training; None for n < 2. images: the
    error from the choice of test images; None if it is not known, and then not counted.
    """

    n: int
    mean: float | None = None
    seeds: Error | None = None
    images: Error | None = None

    @property
    def error(self) -> Error | None:
        """The combined error from seeds and images."""
        if self.seeds is None or self.images is None:
            return self.seeds
        se = math.hypot(self.seeds.se, self.images.se)
        return Error(se, self.seeds.noise + self.images.noise)

    @property
    def p(self) -> float | None:
        """Two-sided p-value of Student's t test that there is no difference; None for n < 2."""
        if self.mean is None or (error := self.error) is None:
            return None
        if error.se == 0:
            return float(self.mean == 0)
        return float(2 * stdtr(error.df, -abs(self.mean) / error.se))

    def estimate(self, alpha: float = ALPHA) -> Estimate:
        """The mean with its interval of confidence 1 - alpha."""
        if self.mean is None or (error := self.error) is None:
            return Estimate(self.n, self.mean)
        half = float(stdtrit(error.df, 1 - alpha / 2)) * error.se
        return Estimate(self.n, self.mean, self.mean - half, self.mean + half)


def effect_of(values: Sequence[float]) -> Effect:
    """The mean of `values`, such as paired differences, with the error from their spread."""
    n = len(values)
    if n < 2:
        return Effect(n, float(values[0]) if n else None)
    se = float(np.std(values, ddof=1)) / math.sqrt(n)
    error = Error(se, se**4 / (n - 1))
    return Effect(n, float(np.mean(values)), error)


def estimate(values: Iterable[float | None]) -> Estimate:
    """Mean and 95% t interval of `values`; undefined values, None, are not counted in n.

    Student's t assumes roughly normal, independent values: seeds, not classes or images.
    """
    return effect_of([value for value in values if value is not None]).estimate()


def paired_effect(side: Scores, reference: Scores) -> Effect:
    """Return `side` minus `reference`, paired by seed, over the seeds that both have."""
    both = [seed for seed in side.ap if seed in reference.ap]
    found = effect_of([side.ap[seed] - reference.ap[seed] for seed in both])
    return Effect(found.n, found.mean, found.seeds, _image_error(side, reference, both))


def unpaired_effect(side: Scores, reference: Scores) -> Effect:
    """Return `side` minus `reference` over all their seeds, with the pooled variance of both."""
    a, b = list(side.ap.values()), list(reference.ap.values())
    if not a or not b:
        return Effect(0)
    df, n = len(a) + len(b) - 2, min(len(a), len(b))
    mean = float(np.mean(a) - np.mean(b))
    if n < 2:
        return Effect(n, mean)
    variance = sum(float(np.var(values)) * len(values) for values in (a, b)) / df
    se = math.sqrt(variance * (1 / len(a) + 1 / len(b)))
    error = Error(se, se**4 / df)
    both = [seed for seed in side.ap if seed in reference.ap]
    return Effect(n, mean, error, _image_error(side, reference, both))


def _image_error(side: Scores, reference: Scores, seeds: Sequence[int]) -> Error | None:
    """The error from the choice of test images in the mean difference over these seeds.

    It is the spread of the mean difference over resamples of the images. The effect of images on
    single seeds is also part of the spread over seeds, so it is counted twice. Otherwise the test
    would claim a difference that does not exist in up to 6 % of cases instead of 5 % (see
    tools/simulate_verdicts.py). None without replicates of two seeds.
    """
    pairs = [
        (a, b)
        for seed in seeds
        if (a := side.replicates.get(seed)) and (b := reference.replicates.get(seed))
    ]
    if not pairs:
        return None
    first = pairs[0][0]
    pairs = [(a, b) for a, b in pairs if a.same_images(first) and b.same_images(first)]
    if len(pairs) < 2:
        return None
    differences = np.mean([a.ap - b.ap for a, b in pairs], axis=0)
    differences = differences[np.isfinite(differences)]
    resamples = len(differences)
    if resamples < 2:
        return None
    variance = float(np.var(differences, ddof=1))
    known = 1 / max(1, first.images - 1) + 1 / (resamples - 1)
    return Error(math.sqrt(variance), known * variance**2)
