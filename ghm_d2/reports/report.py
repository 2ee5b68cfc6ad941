"""A report: a folder that can be mailed, made from the records of runs alone."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from operator import methodcaller
from pathlib import Path
from typing import Any

from ghm_d2.errors import UsageError
from ghm_d2.files import write_atomically, write_text
from ghm_d2.records import AP_COLUMNS, RunRecord
from ghm_d2.reports import document as documents
from ghm_d2.reports import tables
from ghm_d2.reports.answer import answer, failure, outcome
from ghm_d2.reports.document import Table
from ghm_d2.reports.results import Difference, NoiseRow, Row, difference_of, noise_of, row_of
from ghm_d2.reports.runs import SeedRun, checked
from ghm_d2.reports.statistics import Estimate
from ghm_d2.reports.study import Study, is_comparison, read_study

HTML_FILE, MARKDOWN_FILE, RUNS_FILE = "report.html", "report.md", "runs.csv"
# what runs.csv has in columns of its own, or not at all
APART = ("seed", "status", "outcome", "packages", "metrics", "mask_metrics", "per_class", "best")
RECORD_FIELDS = [field.name for field in fields(RunRecord) if field.name not in APART]


@dataclass(frozen=True)
class Report:
    """The numbers of a study, what they say, and the files they were written to."""

    study: Study
    files: tuple[Path, ...] = ()  # report.html first

    @cached_property
    def rows(self) -> list[Row]:
        """A row a side."""
        return [row_of(side) for side in self.study.sides]

    @cached_property
    def differences(self) -> list[Difference]:
        """In the order of the comparison's pairs."""
        return [difference_of(self.study, pair) for pair in self.study.comparison.pairs]

    @cached_property
    def noise(self) -> list[NoiseRow]:
        """A row for each measure of each side whose annotations say what is wrong with them."""
        return checked(lambda: [row for side in self.study.sides for row in noise_of(side)])

    @cached_property
    def verdict(self) -> list[str]:
        """The answer, in sentences; see `answer.answer`."""
        failures = [text for side in self.study.sides if (text := failure(side))]
        return answer(self.differences, failures)

    @property
    def tables(self) -> list[Table]:
        """The results, a row a side, and the differences, a row a pair, where there are any."""
        found = [tables.results_of(self.rows), tables.differences_of(self.differences)]
        return [table for table in found if table.rows]

    @property
    def markdown(self) -> str:
        """`tables` as Markdown."""
        return "\n".join(map(documents.markdown_table, self.tables))

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON-able data; AP in percent, intervals of 95%, null where undefined."""
        comparison = self.study.comparison
        words = ("name", "question", "dataset", "budget", "seeds")
        return {name: getattr(comparison, name) for name in words} | {
            "planned": self.study.planned,
            "finished": self.study.planned - len(self.study.unfinished),
            "not_finished": [
                {"side": s.name, "seed": r.seed, "status": r.status, "outcome": outcome(r)}
                for s, r in self.study.unfinished
            ],
            "notes": self.study.notes,
            "verdict": self.verdict,
            "rows": [_row_json(row) for row in self.rows],
            "pairs": [_difference_json(d) for d in self.differences],
            "cost": [{"side": r.side.name} | _estimates(r.cost) for r in self.rows],
            "noise": [_noise_json(row) for row in self.noise],
            "files": [str(file) for file in self.files],
        }


def _estimates(values: dict[str, Estimate]) -> dict[str, Any]:
    return {name: asdict(value) for name, value in values.items()}


def _row_json(row: Row) -> dict[str, Any]:
    side = row.side
    return {
        "side": side.name,
        "method": side.method,
        "network": side.network,
        "finished": len(side.finished),
        "planned": len(side.runs),
        **_estimates(row.ap),
        **({"masks": _estimates(row.mask_ap)} if row.mask_ap else {}),
        "published": [asdict(published) for published in row.published],
    }


def _difference_json(difference: Difference) -> dict[str, Any]:
    columns = {
        column: {"difference": value.mean, "low": value.low, "high": value.high, "n": value.n}
        for column, value in difference.ap.items()
    }
    verdict = {"seeds": difference.seeds, **columns, "verdict": difference.verdict}
    return asdict(difference.pair) | verdict


def _noise_json(row: NoiseRow) -> dict[str, Any]:
    return {
        "side": row.side.name,
        "measure": row.measure,
        "boxes": row.boxes,
        "weight": _estimates(row.weight),
        "ratio": _estimates(row.ratio),
    }


def read_report(folder: Path) -> Report:
    """The numbers and the answer alone, without drawing or writing anything.

    Raises:
        DataError: see `study.read_study`.
    """
    return Report(read_study(folder))


def overview(reports: list[Report]) -> Table:
    """A row for each pair of several comparisons: AP of both sides, and their difference."""
    rows: list[tuple[str, ...]] = []
    for report in reports:
        comparison = report.study.comparison
        name = f"{comparison.name} on {comparison.dataset}"
        name += ", settings searched" if comparison.search else ""
        ap = {row.side.name: tables.mean_with_n(row.ap["AP"], row.side) for row in report.rows}
        for d in report.differences:
            side, reference = d.pair.side, d.pair.reference
            difference = tables.difference_with_interval(d.ap["AP"])
            figures = (ap[side], ap[reference], difference, str(len(d.seeds)))
            rows.append((name, side, reference, d.verdict, *figures))
    headers = ("Comparison", "Side", "Against", "AP is", "AP", "AP against", "Difference", "Seeds")
    return Table(headers, rows, text_columns=4)


def write_report(folder: Path, output: Path | None = None) -> Report:
    """Write report.html, report.md, runs.csv and the pictures, each whole or not at all.

    The same records give the same bytes.

    Args:
        folder: of a comparison (comparison.json), finished or not; or one with runs in it, which
            are then grouped by what was trained.
        output: where to write; by default the comparison's folder, or FOLDER/report.

    Raises:
        DataError: there is neither in `folder`, or a file is not what its name says.
        UsageError: `output` cannot be written.
    """
    from ghm_d2.reports.contents import document_of  # matplotlib takes a second

    folder = Path(folder)
    report = read_report(folder)
    document = document_of(report)
    if output is None:
        output = folder if is_comparison(folder) else folder / "report"
    texts = {
        HTML_FILE: documents.html(document),
        MARKDOWN_FILE: documents.markdown(document),
        RUNS_FILE: runs_csv(report.study),
    }
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        for picture in document.pictures:
            write_atomically(str(output / picture.file), methodcaller("write", picture.data))
        for name, text in texts.items():
            write_text(output / name, text)
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror}") from None
    names = [*texts, *(picture.file for picture in document.pictures)]
    return Report(report.study, tuple(output / name for name in names))


def runs_csv(study: Study) -> str:
    """A row a planned run: side, seed, status, outcome, and the numbers of its record."""
    runs = [(side, run) for side in study.sides for run in side.runs]
    records = [run.record for _, run in runs if run.record]
    classes = sorted({name for record in records for name in record.per_class})
    masks = AP_COLUMNS if any(record.mask_metrics for record in records) else ()
    header = ["side", "seed", "status", "outcome", *RECORD_FIELDS, *AP_COLUMNS]
    header += [f"mask_{column}" for column in masks]
    header += ["best AP", "best iteration", *(f"AP of {name}" for name in classes)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_harmless, header))
    for side, run in runs:
        cells = [side.name, run.seed, run.status, *_numbers(run, masks, classes)]
        writer.writerow(map(_harmless, cells))
    return out.getvalue()


def _numbers(run: SeedRun, masks: Sequence[str], classes: list[str]) -> list:
    record = run.record
    if record is None:
        columns = (*RECORD_FIELDS, *AP_COLUMNS, *masks, *classes)
        return [""] * (1 + len(columns) + 2)
    return [
        record.outcome,
        *(getattr(record, name) for name in RECORD_FIELDS),
        *(record.metrics.get(column) for column in AP_COLUMNS),
        *(record.mask_metrics.get(column) for column in masks),
        record.best.get("AP"),
        record.best.get("iteration"),
        *(record.per_class.get(name) for name in classes),
    ]


def _harmless(cell):
    """A spreadsheet takes text that starts with one of these for a formula, and runs it."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in tuple("=+-@\t\r") else cell
