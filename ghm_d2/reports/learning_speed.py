"""How fast each side learns: the iterations after which AP reaches a share of a final one."""

from itertools import pairwise

from ghm_d2.reports.document import Table
from ghm_d2.reports.runs import SeedRun, SideRuns
from ghm_d2.reports.statistics import estimate

SHARES = (0.8, 0.9)


def iterations_to(run: SeedRun, ap: float) -> float | None:
    """Iterations until an evaluation first reaches `ap`, linear between evaluations and from 0.

    None where none does.
    """
    steps, values = run.curve("bbox/AP")
    points = [(0, 0.0), *zip(steps, values, strict=True)]
    for (before, low), (after, high) in pairwise(points):
        if high >= ap:
            return before + (after - before) * max(0.0, ap - low) / max(high - low, 1e-9)
    return None


def speed_table(sides: list[SideRuns]) -> Table:
    """A row a side whose runs were evaluated in the course of their training; maybe none."""
    finals = {side.name: estimate(_finals(side)).mean for side in sides}
    best = max((ap for ap in finals.values() if ap is not None), default=None)
    shares = [f"{share:.0%} of" for share in SHARES]
    headers = [f"{share} its own" for share in shares] + [f"{share} the best" for share in shares]
    rows = [
        (side.name, *_cells(side, None), *_cells(side, best))
        for side in sides
        if any(len(run.curve("bbox/AP")[0]) > 1 for run in side.finished)
    ]
    return Table(("Iterations to", *(h.replace("%", " %") for h in headers)), rows)


def _finals(side: SideRuns) -> list[float]:
    return [values[-1] for run in side.finished if (values := run.curve("bbox/AP")[1])]


def _cells(side: SideRuns, best: float | None) -> list[str]:
    """A cell a share of `best`, or of each run's own final AP."""
    cells = []
    for share in SHARES:
        finals = [(run, values[-1]) for run in side.finished if (values := run.curve("bbox/AP")[1])]
        needed = [iterations_to(run, share * (best or own)) for run, own in finals]
        value, reached = estimate(needed), sum(n is not None for n in needed)
        if reached < len(needed) or value.mean is None:
            cells.append(f"reached by {reached} of {len(needed)}")
        elif value.half_width is None:
            cells.append(f"{value.mean:.0f}")
        else:
            cells.append(f"{value.mean:.0f} ± {value.half_width:.0f}")
    return cells
