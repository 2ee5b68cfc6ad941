#!/usr/bin/env python3
"""Tests the statistics of `ghm compare` on simulated comparisons with known true differences.

    python tools/simulate_verdicts.py            # two thousand comparisons a row; minutes
    python tools/simulate_verdicts.py --trials 200

AP of each side, seed and test image is a sum: the side's level, a deviation of the seed, one of the
image that all seeds of a side share, and one of seed and image together. A run's AP is the mean
over its images, and its replicates are means over resamples of them. The project's own functions
judge them. The table in docs/compare.md shows the output, results/simulation/verdicts.json.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ghm_d2.files import write_text
from ghm_d2.reports.statistics.estimates import Effect, Replicates, Scores
from ghm_d2.reports.statistics.power import Spread
from ghm_d2.reports.statistics.verdicts import HIGHER, LOWER, SAME, Contrast, judge

FILE = Path(__file__).parents[1] / "results" / "simulation" / "verdicts.json"
IMAGES, RESAMPLES, SIDES = 60, 200, 6
MARGIN, DIFFERENCE = 1.0, 2.0  # AP
SEEDS = (3, 6, 10)
LOOK = 3  # seeds at an early look, if more are planned


@dataclass(frozen=True)
class Chance:
    """Standard deviations of a run's AP: by seed, by the choice of images, by both together."""

    name: str
    seed: float
    images: float
    both: float
    heavy: bool = False  # seeds have Student's t distribution with 3 degrees of freedom

    def spread(self, seeds: int) -> Spread:
        """The spread of a difference of two sides, as a plan estimates it from this many seeds."""
        sd = math.hypot(self.seed, self.both)
        images = math.hypot(self.images, self.both / math.sqrt(seeds))
        return Spread(math.sqrt(2) * sd, math.sqrt(2) * images, IMAGES, "")


CASES = (
    Chance("seeds and images alike", 0.5, 0.4, 0.5),
    Chance("as on BCCD", 0.9, 0.3, 0.6),
    Chance("mostly images", 0.3, 1.0, 0.5),
    Chance("heavy tails of seeds", 0.9, 0.3, 0.6, heavy=True),
)


def draw(rng: np.random.Generator, chance: Chance, seeds: int, weights: np.ndarray) -> list[Scores]:
    """Draw the scores of `SIDES` sides that do not truly differ.

    Args:
        weights: (RESAMPLES, IMAGES) how often each resample has each image.
    """
    noise = rng.normal(size=(SIDES, seeds, 1))
    if chance.heavy:
        noise = rng.standard_t(3, size=(SIDES, seeds, 1)) / math.sqrt(3)
    of_image = rng.normal(size=(SIDES, 1, IMAGES)) * chance.images
    of_both = rng.normal(size=(SIDES, seeds, IMAGES)) * chance.both
    ap = 50 + chance.seed * noise + math.sqrt(IMAGES) * (of_image + of_both)
    replicates = np.round(ap @ weights.T / IMAGES, 2)
    found = []
    for k in range(SIDES):
        own = {s: Replicates("", IMAGES, replicates[k, s]) for s in range(seeds)}
        found.append(Scores({s: float(ap[k, s].mean()) for s in range(seeds)}, own))
    return found


def raised(scores: Scores, difference: float) -> Scores:
    """The scores with every AP higher by `difference`."""
    ap = {seed: value + difference for seed, value in scores.ap.items()}
    own = {s: Replicates(r.set, r.images, r.ap + difference) for s, r in scores.replicates.items()}
    return Scores(ap, own)


def simulate(chance: Chance, seeds: int, trials: int, rng: np.random.Generator) -> dict:
    """Return percentages of `trials` comparisons, by name.

    Comparisons that claim a difference that does not exist: "primary" in the primary pair, "others"
    in any other pair, "with a look" in the primary pair with an early look, "seeds alone" in the
    primary pair without the error from images. "found": find a true difference of 2 AP; "planned":
    as often as the plan predicts. "same": call a difference of the margin practically the same.
    """
    weights = rng.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), RESAMPLES).astype(float)
    order, counts = range(seeds), dict.fromkeys(("primary", "others", "with a look"), 0)
    counts |= dict.fromkeys(("seeds alone", "found", "same"), 0)
    claims = (HIGHER, LOWER)
    for _ in range(trials):
        reference, first, *rest = draw(rng, chance, seeds, weights)
        pair = Contrast(first, reference, order, True)
        others = [Contrast(side, reference, order) for side in rest]
        verdict, *words = [v.word for v in judge([pair, *others], MARGIN)]
        counts["primary"] += verdict in claims
        counts["others"] += any(word in claims for word in words)
        counts["with a look"] += judge([pair], MARGIN, [LOOK])[0].word in claims
        effect = pair.effect(seeds)
        counts["seeds alone"] += Effect(effect.n, effect.mean, effect.seeds).p <= 0.05
        for name, difference, word in (("found", DIFFERENCE, HIGHER), ("same", MARGIN, SAME)):
            better = Contrast(raised(first, difference), reference, order, True)
            counts[name] += judge([better], MARGIN)[0].word == word
    shares = {name: 100 * count / trials for name, count in counts.items()}
    return shares | {"planned": 100 * chance.spread(seeds).power(DIFFERENCE, seeds)}


def main() -> None:
    """Simulate every case with every number of seeds, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=2000)
    trials = parser.parse_args().trials
    rows = []
    for number, chance in enumerate(CASES):
        for seeds in SEEDS:
            shares = simulate(chance, seeds, trials, np.random.default_rng([number, seeds]))
            row = {name: round(share, 1) for name, share in shares.items()}
            rows.append({"case": chance.name, "seeds": seeds} | row)
            print(rows[-1], flush=True)
    cases = {c.name: {"seed": c.seed, "images": c.images, "both": c.both} for c in CASES}
    found = {"trials": trials, "images": IMAGES, "standard deviations": cases, "rows": rows}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    write_text(FILE, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
