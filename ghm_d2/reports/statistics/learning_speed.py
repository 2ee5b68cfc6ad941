"""The speed at which each side learns: iterations until AP reaches a share of a final AP."""

from itertools import pairwise

from ghm_d2.reports.page.document import Table
from ghm_d2.reports.runs import SeedRun, SideRuns
from ghm_d2.reports.statistics.estimates import estimate
from ghm_d2.reports.wording import with_half_width

SHARES = (0.8, 0.9)


def iterations_to(run: SeedRun, ap: float) -> float | None:
    """Iterations until an evaluation first reaches `ap`, linear between evaluations and from 0.

    None if no evaluation does, or if `ap` is not above 0.
    """
    steps, values = run.curve("bbox/AP")
    points = [(0, 0.0), *zip(steps, values, strict=True)]
    for (before, low), (after, high) in pairwise(points):
        if high >= ap > low:
            return before + (after - before) * (ap - low) / (high - low)
    return None


def speed_table(sides: list[SideRuns]) -> Table:
    """One row per side whose runs were also evaluated during training; possibly no rows."""
    finals = [estimate(side.values("AP").values()).mean for side in sides]
    best = max((ap for ap in finals if ap is not None), default=None)
    shares = [f"{100 * share:.0f} % of" for share in SHARES]
    headers = [f"{share} its own" for share in shares] + [f"{share} the best" for share in shares]
    rows = [
        (side.name, *_cells(side, None), *_cells(side, best))
        for side in sides
        if any(len(run.curve("bbox/AP")[0]) > 1 for run in side.finished)
    ]
    return Table(("Iterations to", *headers), rows)


def _cells(side: SideRuns, best: float | None) -> list[str]:
    """One cell per share of `best`, or of each run's own final AP, which is 0 if it diverged."""
    finals = side.values("AP")
    goals = {seed: best if best and final else final for seed, final in finals.items()}
    runs = [(run, goals[run.seed]) for run in side.runs if run.seed in goals]
    return [_cell([iterations_to(run, share * ap) for run, ap in runs]) for share in SHARES]


def _cell(needed: list[float | None]) -> str:
    value, reached = estimate(needed), sum(n is not None for n in needed)
    if reached < len(needed) or value.mean is None:
        return f"reached by {reached} of {len(needed)}"
    return with_half_width(value, ".0f")
