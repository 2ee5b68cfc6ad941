"""The tables of a report, from a study's numbers."""

from collections.abc import Iterable

from ghm_d2.records import AP_COLUMNS, Trial
from ghm_d2.reports.answer import interval, signed
from ghm_d2.reports.document import Best, Table
from ghm_d2.reports.results import NOISE_KINDS, NOISE_MEASURES, Difference, NoiseRow, Row
from ghm_d2.reports.runs import SideRuns
from ghm_d2.reports.statistics import Estimate
from ghm_d2.reports.summary import Summary
from ghm_d2.reports.tables import HEADERS

# header, key of `results.COSTS`, factor, decimals
COST_COLUMNS = (
    ("s/iteration", "s_per_iter", 1, 3),
    ("ms/image", "ms_per_image", 1, 1),
    ("Peak memory, MB", "peak_memory_mb", 1, 0),
    ("Parameters, M", "parameters", 1e-6, 2),
    ("GFLOPs", "gflops", 1, 1),
    ("Loss, ms", "loss_ms", 1, 1),
    ("Loss, % of the iteration", "loss_share", 100, 1),
    ("Variation of loss_cls", "loss_variation", 1, 3),
)
DIFFERENCE_COLUMNS = ("AP", "AP50", "AP75")


def results_of(rows: list[Row]) -> Table:
    """The published columns: mean and half the 95% interval; the best mean in bold.

    A side with masks has a second row, of their AP.
    """
    best = _best([row.ap for row in rows])
    best_masks = _best([row.mask_ap for row in rows if row.mask_ap])
    cells = []
    for row in rows:
        name = row.side.name
        cells.append(_result(f"{name} (boxes)" if row.mask_ap else name, row.side, row.ap, best))
        for published in row.published:
            values = [f"{ap:.1f}" for ap in published.ap]
            values += ["-"] * (len(AP_COLUMNS) - len(values))
            cells.append((f"published: {published.source}", published.network, *values, "-"))
        if row.mask_ap:
            cells.append(_result(f"{name} (masks)", row.side, row.mask_ap, best_masks))
    return Table((*HEADERS, "Seeds"), cells, text_columns=2)


def _best(rows: list[dict[str, Estimate]]) -> dict[str, str | None]:
    """The highest mean of each column, as it is shown: what looks alike is equally good."""
    best = {}
    for column in AP_COLUMNS:
        means = [ap[column].mean for ap in rows if ap[column].mean is not None]
        best[column] = f"{max(means):.1f}" if len(means) > 1 else None
    return best


def _result(name: str, side: SideRuns, ap: dict[str, Estimate], best: dict) -> tuple[str, ...]:
    figures = [_percent(ap[c], len(side.finished), best[c]) for c in AP_COLUMNS]
    done = f"{len(side.finished)} of {len(side.runs)}"
    return name, side.network or "-", *figures, done


def differences_of(differences: list[Difference]) -> Table:
    """Each pair's paired differences with their 95% intervals, and the verdict on AP."""
    rows = [
        (
            f"{d.pair.side} against {d.pair.reference}",
            d.pair.question,
            d.verdict,
            *(_signed(d.ap[column]) for column in DIFFERENCE_COLUMNS),
            str(len(d.seeds)),
        )
        for d in differences
    ]
    headers = ("Pair", "Question", "AP is", *DIFFERENCE_COLUMNS, "Seeds")
    return Table(headers, rows, text_columns=3)


def overview_of(summaries: Iterable[Summary]) -> Table:
    """A row for each pair of several comparisons: AP of both sides, and their difference."""
    rows = []
    for summary in summaries:
        comparison = summary.study.comparison
        name = f"{comparison.name} on {comparison.dataset}"
        name += ", settings searched" if comparison.search else ""
        ap = {
            row.side.name: _percent(row.ap["AP"], len(row.side.finished), None)
            for row in summary.rows
        }
        for d in summary.differences:
            side, reference = d.pair.side, d.pair.reference
            cells = (name, side, reference, d.verdict)
            figures = (ap[side], ap[reference], _signed(d.ap["AP"]), str(len(d.seeds)))
            rows.append((*cells, *figures))
    headers = ("Comparison", "Side", "Against", "AP is", "AP", "AP against", "Difference", "Seeds")
    return Table(headers, rows, text_columns=4)


def costs_of(rows: list[Row]) -> Table:
    """What each side costs: means over its finished runs."""
    cells = []
    for row in rows:
        means = [(row.cost[key].mean, factor, n) for _, key, factor, n in COST_COLUMNS]
        figures = ["-" if m is None else f"{m * factor:,.{n}f}" for m, factor, n in means]
        figures[0] = _with_half_width(row.cost["s_per_iter"], 3)
        cells.append((row.side.name, *figures))
    return Table(("Method", *(column[0] for column in COST_COLUMNS)), cells)


def noise_of(rows: list[NoiseRow]) -> Table:
    """Mean weights of clean and of spoilt annotations, and their ratio with its interval."""
    headers = ["Method", "Gradient of", "Clean boxes", "Weight"]
    for words in NOISE_KINDS.values():
        headers += [words.capitalize(), "Weight", "Ratio to clean"]
    cells = []
    for row in rows:
        line = [row.side.name, NOISE_MEASURES[row.measure]]
        line += [str(row.boxes["none"]), _weight(row.weight["none"])]
        for kind in NOISE_KINDS:
            line += [str(row.boxes[kind]), _weight(row.weight[kind])]
            line.append(_with_half_width(row.ratio[kind], 2))
        cells.append(tuple(line))
    return Table(tuple(headers), cells, text_columns=2)


def sides_of(sides: list[SideRuns]) -> Table:
    """How each side was configured."""
    rows = [
        (
            side.name,
            side.method or "-",
            side.config or "-",
            " ".join(side.overrides) or "-",
            _listed(record.config_hash for record in side.records),
        )
        for side in sides
    ]
    headers = ("Side", "Method as recorded", "Configuration", "Overrides", "Configuration's hash")
    return Table(headers, rows, text_columns=5)


def search_of(trials: list[Trial]) -> Table:
    """What was tried for each side's setting, and what was chosen."""
    rows = [
        (
            trial.side,
            " ".join(trial.overrides) or "as configured",
            "chosen" if trial.chosen else "",
            "-" if trial.AP is None else f"{trial.AP:.1f}",
        )
        for trial in trials
    ]
    return Table(("Side", "Overrides", "", "AP, held-out training images"), rows, text_columns=3)


def setting_of(sides: list[SideRuns], facts: list[tuple[str, str]]) -> Table:
    """`facts`, and what the records say of machine and versions; all values where they differ."""
    records = [record for side in sides for record in side.records]
    rows = [
        *facts,
        ("Iterations", _listed(str(r.iterations) for r in records if r.status == "finished")),
        ("Device", _listed(r.device for r in records)),
        ("ghm_d2", _listed(r.code_version for r in records)),
    ]
    packages = sorted({name for record in records for name in record.packages})
    rows += [(n, _listed(r.packages[n] for r in records if n in r.packages)) for n in packages]
    return Table(("What", "Value"), [row for row in rows if row[1]], text_columns=2)


def _percent(value: Estimate, finished: int, best: str | None) -> str:
    text = _with_half_width(value, 1)
    if value.n and value.n < finished:
        text += f" (n = {value.n})"
    return Best(text) if value.mean is not None and f"{value.mean:.1f}" == best else text


def _with_half_width(value: Estimate, digits: int) -> str:
    if value.mean is None:
        return "-"
    text = f"{value.mean:.{digits}f}"
    return text if value.half_width is None else f"{text} ± {value.half_width:.{digits}f}"


def _signed(value: Estimate) -> str:
    if value.low is None:
        return signed(value.mean)
    return f"{signed(value.mean)} ({interval(value)})"


def _weight(value: Estimate) -> str:
    return "-" if value.mean is None else f"{value.mean:.3g}"


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(v for v in values if v))
