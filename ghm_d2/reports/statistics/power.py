"""The difference that a number of seeds can show, and the seeds that a difference needs."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.special import nctdtr, stdtrit

from ghm_d2.errors import DataError
from ghm_d2.reports.runs import SideRuns
from ghm_d2.reports.statistics.estimates import ALPHA, Effect, Error, paired_effect
from ghm_d2.reports.statistics.verdicts import spending
from ghm_d2.reports.study import read_study

POWER = 0.8
MOST_SEEDS = 100
EXPECTED = 2.0  # a difference of AP that people hope for
# In AP, if nothing was measured: a run's standard deviation, the median of 26 configurations on
# BCCD at 300 iterations; and roughly the error of a difference due to 60 to 100 test images
ASSUMED_SD, ASSUMED_IMAGE_SE, ASSUMED_IMAGES = 0.9, 0.3, 60


@dataclass(frozen=True)
class Spread:
    """The random error of a paired difference of AP. source: where the values come from.

    sd: standard deviation over seeds. image_se: standard error of the mean difference from the
    choice of `images` test images, which more seeds do not reduce. diverged: number of
    runs left out, because they diverged.
    """

    sd: float
    image_se: float
    images: int
    source: str
    diverged: int = 0

    def power(self, difference: float, seeds: int, alpha: float = ALPHA) -> float:
        """The probability that a test at alpha finds a true difference; `seeds` is 2 or more."""
        se = self.sd / math.sqrt(seeds)
        images = Error(self.image_se, self.image_se**4 / max(1, self.images - 1))
        error = Effect(seeds, 0.0, Error(se, se**4 / (seeds - 1)), images).error
        if error is None or error.se == 0:
            return float(difference != 0)
        limit = stdtrit(error.df, 1 - alpha / 2)
        return float(1 - nctdtr(error.df, abs(difference) / error.se, limit))

    def detectable(self, seeds: int, alpha: float = ALPHA) -> float | None:
        """The difference that the seeds find with 80 % power; None for one seed."""
        if seeds < 2:
            return None
        low, high = 0.0, 100.0
        for _ in range(30):
            middle = (low + high) / 2
            if self.power(middle, seeds, alpha) < POWER:
                low = middle
            else:
                high = middle
        return high

    def seeds_for(self, difference: float, alpha: float = ALPHA) -> int | None:
        """The fewest seeds that find a difference with 80 % power at alpha; None if over 100."""
        counts = range(2, MOST_SEEDS + 1)
        return next((n for n in counts if self.power(difference, n, alpha) >= POWER), None)

    def can_show(self, difference: float, alpha: float = ALPHA) -> bool:
        """Return whether any number of seeds finds a difference with 80 % power.

        With many seeds only the error from the test images remains.
        """
        return replace(self, sd=0.0).power(difference, MOST_SEEDS, alpha) >= POWER


def read_spread(folder: Path, datasets: Collection[str], iterations: Collection[int]) -> Spread:
    """The spread of the finished runs below `folder` on these data with these iterations.

    Values are assumed if no side has several seeds, or if the runs have no replicates.
    """
    try:
        sides = [s for s in read_study(folder).sides if _is_like(s, datasets, iterations)]
    except DataError:
        sides = []
    # a diverged run's AP of 0 would say nothing about the spread of runs that learn
    scores = [side.scores.first([run.seed for run in side.finished]) for side in sides]
    values = [list(found.ap.values()) for found in scores if len(found.ap) > 1]
    df = sum(len(found) - 1 for found in values)
    sd = ASSUMED_SD
    source = "assumed, because too few finished runs differ only in their seeds"
    if df > 1:
        sd = math.sqrt(sum(float(np.var(found)) * len(found) for found in values) / df)
        source = f"estimated from {df + len(values)} finished runs on these data"
    effects = [paired_effect(a, b) for a, b in combinations(scores, 2)]
    errors = [effect.images.se for effect in effects if effect.images]
    images = [r.images for found in scores for r in found.replicates.values()] or [ASSUMED_IMAGES]
    image_se = math.sqrt(np.mean(np.square(errors))) if errors else ASSUMED_IMAGE_SE
    diverged = sum(len(side.diverged) for side in sides)
    return Spread(math.sqrt(2) * sd, image_se, images[0], source, diverged)


def _is_like(side: SideRuns, datasets: Collection[str], iterations: Collection[int]) -> bool:
    found = [run.record for run in side.finished if run.record]
    return any(r.dataset in datasets and r.iterations in iterations for r in found)


@dataclass(frozen=True)
class PlannedPower:
    """The difference of the primary pair that a plan's seeds can show."""

    spread: Spread
    seeds: int
    margin: float
    looks: Sequence[int] = ()

    @property
    def alpha(self) -> float:
        """The part of 5 % that the last test may use; earlier looks use the rest."""
        return spending([look for look in self.looks if look < self.seeds], self.seeds)[-1]

    def as_dict(self) -> dict:
        """Return the figures of the plan's JSON; differences and standard deviations are in AP.

        "seeds_for" is null for differences that need over 100 seeds, or that none can show.
        """
        return {
            "detectable": self.spread.detectable(self.seeds, self.alpha),
            "sd": self.spread.sd,
            "image_se": self.spread.image_se,
            "source": self.spread.source,
            "diverged": self.spread.diverged,
            "seeds_for": {
                f"{wanted:g}": self.spread.seeds_for(wanted, self.alpha)
                for wanted in sorted({self.margin, EXPECTED})
            },
        }

    def __str__(self) -> str:
        found = self.as_dict()
        text = "one seed cannot show a difference"
        if found["detectable"] is not None:
            text = f"{self.seeds} seeds find {found['detectable']:.1f} AP"
        needs = "; ".join(self._need(*item) for item in found["seeds_for"].items())
        diverged = self.spread.diverged
        lost = f"; diverged runs left out: {diverged}" if diverged else ""
        return (
            f"Power to find a difference in 4 of 5 cases: {text}; {needs}. (Standard deviation of "
            f"a difference between seeds {found['sd']:.2f} AP, {found['source']}{lost}; standard "
            f"error from the test images {found['image_se']:.2f} AP.)"
        )

    def _need(self, wanted: str, seeds: int | None) -> str:
        if seeds is None and not self.spread.can_show(float(wanted), self.alpha):
            return f"{wanted} AP cannot be shown by any number of seeds with these test images"
        return f"{wanted} AP would need {seeds or f'more than {MOST_SEEDS}'} seeds"
