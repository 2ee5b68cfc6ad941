"""How steadily each side trains: balance of gradients, variation of weights and of the loss."""

from ghm_d2.reports.page.document import Table
from ghm_d2.reports.runs import SideRuns, kind_of
from ghm_d2.reports.statistics.estimates import Estimate, estimate
from ghm_d2.reports.wording import with_half_width

RATIO, LOSS = "grad_ratio_cls_box", "loss_variation"  # fields of a run's record
HEADERS = {RATIO: "Gradient, classes / boxes", LOSS: "Variation of loss_cls"}


def steadiness(side: SideRuns) -> dict[str, Estimate]:
    """Estimates over the finished seeds; keys: RATIO, LOSS, and GHM losses such as "GHM-C"."""
    records = [run.record for run in side.finished if run.record]
    densities = dict.fromkeys(name for record in records for name in record.weight_variation)
    weights = {
        "".join(kind_of(f"{name}.density")): estimate(r.weight_variation.get(name) for r in records)
        for name in densities
    }
    ratio, loss = (estimate(getattr(r, field) for r in records) for field in (RATIO, LOSS))
    return {RATIO: ratio, **weights, LOSS: loss}


def steadiness_table(sides: list[SideRuns]) -> Table:
    """One row per side; no rows if no run has a figure."""
    found = {side.name: steadiness(side) for side in sides}
    names = {name for values in found.values() for name, value in values.items() if value.n}
    weights = sorted(names - HEADERS.keys())
    columns = [name for name in (RATIO, *weights, LOSS) if name in names]
    headers = [HEADERS.get(name, f"Variation of weights, {name}") for name in columns]
    rows = [
        (side, *(with_half_width(values.get(c, Estimate(0)), ".3g", ".2g") for c in columns))
        for side, values in found.items()
    ]
    return Table(("Method", *headers), rows if columns else [])
