"""AP by class, ordered by the number of training annotations, the rarest class first."""

from collections.abc import Sequence
from itertools import pairwise

from ghm_d2.records import RunRecord
from ghm_d2.reports.page.document import Best, Table
from ghm_d2.reports.runs import SideRuns
from ghm_d2.reports.statistics.estimates import Estimate, estimate
from ghm_d2.reports.wording import with_half_width

MOST_COLUMNS = 8  # more classes than this are grouped in thirds
FORM = ".1f"  # of an AP
GROUPS = ("rare", "common", "frequent")


def classes_table(sides: list[SideRuns]) -> Table:
    """One row per side: the mean over its seeds of AP by class, or by thirds of the classes.

    It has no rows unless some record counts the annotations of two or more classes.
    """
    counts = _counts([record for side in sides for record in side.records])
    groups = _groups(counts)
    headers = tuple(f"{name} ({number:,})" for name, (number, _) in groups.items())
    found = [(side.name, [_ap(side, names) for _, names in groups.values()]) for side in sides]
    best = [_largest(values) for values in zip(*(values for _, values in found), strict=True)]
    rows = []
    for name, values in found:
        cells = [with_half_width(v, FORM) for v in values]
        rows.append((name, *(Best(c) if c == b else c for c, b in zip(cells, best, strict=True))))
    return Table(("AP of", *headers), rows if groups else [])


def _counts(records: Sequence[RunRecord]) -> dict[str, int]:
    """Return the annotations per class, rarest first, from the first record that counts them."""
    counts = next((r.train_objects for r in records if len(r.train_objects) > 1), {})
    return dict(sorted(counts.items(), key=lambda item: (item[1], item[0])))


def _groups(counts: dict[str, int]) -> dict[str, tuple[int, list[str]]]:
    """Name of a column -> its number of annotations, and its classes."""
    if len(counts) <= MOST_COLUMNS:
        return {name: (number, [name]) for name, number in counts.items()}
    names = list(counts)
    bounds = [round(len(names) * i / len(GROUPS)) for i in range(len(GROUPS) + 1)]
    parts = [names[low:high] for low, high in pairwise(bounds)]
    return {
        f"{len(part)} {group} classes": (sum(counts[name] for name in part), part)
        for group, part in zip(GROUPS, parts, strict=True)
    }


def _ap(side: SideRuns, names: list[str]) -> Estimate:
    """Estimate the classes' mean AP over seeds; diverged runs count 0, as in `SideRuns.values`.

    A class without test boxes has no AP in any finished run, so diverged runs give it none either.
    """
    values = []
    for run in side.finished:
        aps = [run.record.per_class.get(name) for name in names] if run.record else []
        known = [ap for ap in aps if ap is not None]
        values += [sum(known) / len(known)] if known else []
    is_defined = values or not side.finished
    return estimate(values + [0.0] * len(side.diverged) if is_defined else [])


def _largest(values: Sequence[Estimate]) -> str:
    """The cell of the largest mean; "" without any."""
    known = [value for value in values if value.mean is not None]
    return with_half_width(max(known, key=lambda value: value.mean or 0), FORM) if known else ""
