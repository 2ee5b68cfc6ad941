"""The tables of single runs and of a comparison; each is a `Table` that any format can show."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import rich.table
from rich.markup import escape

from ghm_d2.errors import printable
from ghm_d2.records import AP_COLUMNS, FINISHED, LVIS_COLUMNS, RunRecord, Trial
from ghm_d2.reports.page.document import Best, Table
from ghm_d2.reports.results import NOISE_MEASURES, NOISE_WORDS, Difference, NoiseRow, Row
from ghm_d2.reports.runs import SideRuns
from ghm_d2.reports.statistics.estimates import Estimate
from ghm_d2.reports.wording import (
    confidence,
    interval,
    number,
    p_value,
    signed,
    with_half_width,
)

HEADERS = ("Method", "Network", "AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")
RUN_HEADERS = (*HEADERS, "Data", "Seed", "Iterations", "Training, min", "Run")
# header, key of `results.COSTS`, factor, decimals
COST_COLUMNS = (
    ("s/iteration", "s_per_iter", 1, 3),
    ("ms/image", "ms_per_image", 1, 1),
    ("Peak memory, MB", "peak_memory_mb", 1, 0),
    ("Parameters, M", "parameters", 1e-6, 2),
    ("GFLOPs", "gflops", 1, 1),
    ("Loss, ms", "loss_ms", 1, 1),
    ("Loss, % of the iteration", "loss_share", 100, 1),
)
LVIS_HEADERS = ("AP_r", "AP_c", "AP_f")
DIFFERENCE_COLUMNS = ("AP", "AP50", "AP75")
ERROR_HEADERS = ("p", "SE seeds", "SE images")
SIZE_WORDS = {"APs": "small (AP_S)", "APm": "medium (AP_M)", "APl": "large (AP_L)"}
FEW_OBJECTS = 50
MOST_CLASSES = 100  # a terminal shows AP by class for no more than this; LVIS has 1203


def terminal_table(table: Table, title: str = "") -> rich.table.Table:
    """Return `table` in rich's form, for a terminal."""
    shown = rich.table.Table(title=escape(printable(title)) or None, title_justify="left")
    for i, header in enumerate(table.headers):
        is_text = i < table.text_columns
        shown.add_column(
            header, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text
        )
    for row in table.rows:
        cells = [(escape(printable(cell)), isinstance(cell, Best)) for cell in row]
        shown.add_row(*(f"[bold]{text}[/]" if best else text for text, best in cells))
    return shown


def run_results(record: RunRecord) -> Table:
    """One run, in the published column order; see `_run_rows`."""
    columns, headers = _columns([record])
    return Table((*HEADERS[:2], *headers), _run_rows(record, columns), text_columns=2)


def runs_table(records: Mapping[str, RunRecord]) -> Table:
    """Return `run_results` of each run, then its data, seed, iterations, time and name."""
    columns, headers = _columns(records.values())
    rows = []
    for name, record in records.items():
        minutes = None if record.train_seconds is None else record.train_seconds / 60
        facts = (record.dataset, str(record.seed), str(record.iterations), number(minutes), name)
        rows += [(*row, *facts) for row in _run_rows(record, columns)]
    headers = (*HEADERS[:2], *headers, *RUN_HEADERS[len(HEADERS) :])
    return Table(headers, rows, text_columns=len(headers))


def _columns(records: Iterable[RunRecord]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The AP columns of records, and their headers: LVIS's too if a record has them."""
    found = {name for record in records for figures in record.sets for name in figures.metrics}
    if found & {*LVIS_COLUMNS}:
        return (*AP_COLUMNS, *LVIS_COLUMNS), (*HEADERS[2:], *LVIS_HEADERS)
    return AP_COLUMNS, HEADERS[2:]


def _run_rows(record: RunRecord, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """One row per data set that the run was evaluated on, and a second one for masks."""
    rows = []
    for figures in record.sets:
        name = f"{record.method}, {figures.dataset}" if figures.dataset else record.method
        named = {name: figures.metrics}
        if figures.mask_metrics:
            named = {f"{name} (boxes)": figures.metrics, f"{name} (masks)": figures.mask_metrics}
        for words, metrics in named.items():
            rows.append((words, record.network, *(number(metrics.get(c)) for c in columns)))
    return rows


def objects_note(record: RunRecord) -> str:
    """Say how many objects each AP by size is based on, by data set; "" if it was not recorded."""
    texts = []
    for figures in record.sets:
        counts = {words: figures.objects.get(key, 0) for key, words in SIZE_WORDS.items()}
        listed = ", ".join(f"{count:,} {words}" for words, count in counts.items())
        where = f" in {figures.dataset}" if figures.dataset else ""
        texts += [f"Annotated objects{where}: {listed}."] if figures.objects else []
    few = [n for figures in record.sets for n in figures.objects.values() if 0 < n < FEW_OBJECTS]
    texts += [f"An AP of fewer than {FEW_OBJECTS} objects says little."] if few else []
    return " ".join(texts)


def per_class(record: RunRecord) -> Table:
    """AP of each class."""
    return Table(("Class", "AP"), [(name, number(ap)) for name, ap in record.per_class.items()])


def results_table(rows: list[Row]) -> Table:
    """The columns that papers report: mean and half the 95% interval; the best mean in bold.

    A side with masks has a second row with mask AP.
    """
    columns = tuple(dict.fromkeys(column for row in rows for column in row.ap))
    best = _best([row.ap for row in rows], columns)
    best_masks = _best([row.mask_ap for row in rows if row.mask_ap], columns)
    cells = []
    for row in rows:
        name = f"{row.side.name} (boxes)" if row.mask_ap else row.side.name
        cells.append(_result(name, row.side, row.ap, best))
        for published in row.published:
            values = [f"{ap:.1f}" for ap in published.ap]
            values += ["-"] * (len(columns) - len(values))
            cells.append((f"published: {published.source}", published.network, *values, "-"))
        if row.mask_ap:
            cells.append(_result(f"{row.side.name} (masks)", row.side, row.mask_ap, best_masks))
    lvis = LVIS_HEADERS if set(columns) > set(AP_COLUMNS) else ()
    return Table((*HEADERS, *lvis, "Seeds"), cells, text_columns=2)


def other_sets_tables(rows: list[Row]) -> dict[str, Table]:
    """Return `results_table` of each data set that was evaluated after the first, by its name."""
    names = dict.fromkeys(name for row in rows for name in row.other_sets)
    tables = {}
    for name in names:
        there = [(row, *row.other_sets[name]) for row in rows if name in row.other_sets]
        alone = [replace(row, ap=ap, mask_ap=masks, published=[]) for row, ap, masks in there]
        tables[name] = results_table(alone)
    return tables


def _best(rows: list[dict[str, Estimate]], columns: tuple[str, ...]) -> dict[str, str]:
    """Each column's highest mean as shown, so that equal cells rank alike; "" if all are equal."""
    means = {c: [m for ap in rows if c in ap and (m := ap[c].mean) is not None] for c in columns}
    return {
        c: number(max(values)) if len(set(map(number, values))) > 1 else ""
        for c, values in means.items()
    }


def _result(
    name: str, side: SideRuns, ap: dict[str, Estimate], best: dict[str, str]
) -> tuple[str, ...]:
    figures = []
    for column, highest in best.items():
        text = mean_with_n(ap[column], side) if column in ap else "-"
        is_best = column in ap and ap[column].n and number(ap[column].mean) == highest
        figures.append(Best(text) if is_best else text)
    done = f"{len(side.finished)} of {len(side.runs)}"
    return name, side.network or "-", *figures, done


def ap_cells(rows: list[Row]) -> list[str]:
    """The AP of each side, the best mean in bold."""
    best = _best([row.ap for row in rows], ("AP",))
    return [_result(row.side.name, row.side, row.ap, best)[2] for row in rows]


def differences_table(differences: list[Difference]) -> Table:
    """Each pair's paired differences with their intervals, and the verdict on AP."""
    rows = [
        (
            f"{d.pair.side} against {d.pair.reference}",
            d.pair.question,
            d.verdict.word,
            *(difference_with_interval(d.ap[column]) for column in DIFFERENCE_COLUMNS),
            p_value(d.verdict.p),
            str(len(d.seeds)),
        )
        for d in differences
    ]
    headers = ("Pair", "Question", "AP is", *DIFFERENCE_COLUMNS, "p", "Seeds")
    return Table(headers, rows, text_columns=3)


def errors_table(differences: list[Difference]) -> Table:
    """The parts of each pair's interval of AP, and the interval without pairing."""
    rows = [
        (
            f"{d.pair.side} against {d.pair.reference}",
            "primary" if d.pair.primary else "",
            *errors(d),
            confidence(d.verdict.alpha),
            difference_with_interval(d.ap["AP"]),
            difference_with_interval(d.verdict.pooled),
        )
        for d in differences
    ]
    headers = ("Pair", "", *ERROR_HEADERS, "Confidence", "Paired", "Unpaired")
    return Table(headers, rows, text_columns=2)


def errors(difference: Difference) -> tuple[str, ...]:
    """The p-value and the standard errors from seeds and from images: cells of `ERROR_HEADERS`."""
    effect = difference.verdict.effect
    found = (error and error.se for error in (effect.seeds, effect.images))
    return p_value(difference.verdict.p), *(number(se, ".2f") for se in found)


def costs_table(rows: list[Row]) -> Table:
    """The costs of each side: means over its finished runs."""
    cells = []
    for row in rows:
        figures = [
            "-" if (mean := row.cost[key].mean) is None else f"{mean * factor:,.{digits}f}"
            for _, key, factor, digits in COST_COLUMNS
        ]
        figures[0] = with_half_width(row.cost["s_per_iter"], ".3f")
        cells.append((row.side.name, *figures))
    return Table(("Method", *(column[0] for column in COST_COLUMNS)), cells)


def noise_table(rows: list[NoiseRow]) -> Table:
    """Mean weights of clean and of spoilt annotations, and their ratio with its interval."""
    headers = ["Method", "Gradient of", "Clean boxes", "Weight"]
    for words in NOISE_WORDS.values():
        headers += [words.capitalize(), "Weight", "Ratio to clean"]
    cells = []
    for row in rows:
        line = [row.side.name, NOISE_MEASURES[row.measure]]
        for kind in ("none", *NOISE_WORDS):
            line += [str(row.boxes[kind]), number(row.weight[kind].mean, ".3g")]
            line += [with_half_width(row.ratio[kind], ".2f")] if kind in row.ratio else []
        cells.append(tuple(line))
    return Table(tuple(headers), cells, text_columns=2)


def sides_table(sides: list[SideRuns]) -> Table:
    """Return a table of how each side was configured."""
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


def search_table(trials: list[Trial]) -> Table:
    """One row per side and tried setting: mean AP on each data set; the chosen one is marked."""
    groups: dict[tuple, list[Trial]] = {}
    for trial in trials:
        asked = (trial.side, " ".join(trial.overrides) or "as configured", trial.iterations)
        groups.setdefault(asked, []).append(trial)
    datasets = list(dict.fromkeys(trial.dataset for trial in trials))
    rows = []
    for (side, overrides, iterations), tried in groups.items():
        figures = [number(_mean_ap(tried, dataset)) for dataset in datasets]
        how = [str(iterations), str(len({trial.seed for trial in tried}))] if iterations else []
        rows.append((side, overrides, "chosen" if tried[0].chosen else "", *how, *figures))
    how = ["Iterations", "Seeds"] if any(trial.iterations for trial in trials) else []
    judged = [f"AP, trials on {name or 'training images'}" for name in datasets]
    return Table(("Side", "Overrides", "", *how, *judged), rows, text_columns=3)


def _mean_ap(trials: list[Trial], dataset: str) -> float | None:
    """The mean AP on a data set, with 0 for diverged trials; None if all trials diverged."""
    found = [trial.AP for trial in trials if trial.dataset == dataset]
    if all(ap is None for ap in found):
        return None
    return sum(ap or 0.0 for ap in found) / len(found)


def setting_table(sides: list[SideRuns], facts: list[tuple[str, str]]) -> Table:
    """Return `facts`, and the records' devices and versions; if they differ, all values."""
    records = [record for side in sides for record in side.records]
    rows = [
        *facts,
        ("Iterations", _listed(str(r.iterations) for r in records if r.status == FINISHED)),
        ("Device", _listed(r.device for r in records)),
        ("ghm_d2", _listed(r.code_version for r in records)),
    ]
    packages = sorted({name for record in records for name in record.packages})
    rows += [(n, _listed(r.packages[n] for r in records if n in r.packages)) for n in packages]
    return Table(("What", "Value"), [row for row in rows if row[1]], text_columns=2)


def mean_with_n(value: Estimate, side: SideRuns) -> str:
    """Mean and half the interval, with the number of seeds if some have no value."""
    counted = len(side.finished) + len(side.diverged)
    fewer = f" (n = {value.n})" if 0 < value.n < counted else ""
    return with_half_width(value, ".1f") + fewer


def difference_with_interval(value: Estimate) -> str:
    mean = signed(value.mean)
    return mean if value.low is None else f"{mean} ({interval(value)})"


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(v for v in values if v))
