"""A report as a folder that can be mailed: report.html, report.md, runs.csv and the pictures."""

import csv
import io
from dataclasses import fields
from operator import methodcaller
from pathlib import Path
from typing import Any

from ghm_d2.errors import UsageError
from ghm_d2.files import spreadsheet_cell, write_atomically, write_text
from ghm_d2.records import AP_COLUMNS, LVIS_COLUMNS, RunRecord
from ghm_d2.reports.figures.differences import differences_figure
from ghm_d2.reports.page import document as documents
from ghm_d2.reports.page.contents import document_of
from ghm_d2.reports.report import Report, read_report
from ghm_d2.reports.study import Study, is_comparison

HTML_FILE, MARKDOWN_FILE, RUNS_FILE = "report.html", "report.md", "runs.csv"
# fields of a record that runs.csv has in other columns, or not at all
APART = (
    *("seed", "status", "outcome", "packages", "metrics", "mask_metrics", "per_class", "best"),
    *("evaluated_on", "other_sets", "objects", "train_objects", "weight_variation"),
)
RECORD_FIELDS = [field.name for field in fields(RunRecord) if field.name not in APART]


def write_report(folder: Path, output: Path | None = None) -> Report:
    """Write report.html, report.md, runs.csv and the pictures, each whole or not at all.

    The same records give the same bytes.

    Args:
        folder: a comparison's folder (with comparison.json), finished or not, or a folder of runs,
            which are then grouped by what was trained.
        output: where to write; by default the comparison's folder, or FOLDER/report.

    Raises:
        DataError: `folder` has neither, or a file does not have the known format.
        UsageError, OutputError: `output` cannot be written.
    """
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
    except OSError as error:
        raise UsageError(f"{output} cannot be created: {error.strerror}") from None
    for picture in document.pictures:
        write_atomically(str(output / picture.file), methodcaller("write", picture.data))
    for name, text in texts.items():
        write_text(output / name, text)
    names = [*texts, *(picture.file for picture in document.pictures)]
    return Report(report.study, tuple(output / name for name in names))


def write_overview(folder: Path, reports: list[Report]) -> Path | None:
    """Draw the differences of all comparisons into a picture in `folder`; None without any.

    Raises:
        OutputError: `folder` cannot be written.
    """
    picture = differences_figure(reports)
    if picture is None:
        return None
    write_atomically(str(folder / picture.file), methodcaller("write", picture.data))
    return folder / picture.file


def runs_csv(study: Study) -> str:
    """One row per planned run: side, seed, status, outcome, and the numbers in its record."""
    runs = [(side, run) for side in study.sides for run in side.runs]
    records = [run.record for _, run in runs if run.record]
    classes = sorted({name for record in records for name in record.per_class})
    header = ["side", "seed", "status", "outcome", *RECORD_FIELDS, *AP_COLUMNS]
    figures = [name for record in records for name in _figures(record)]
    header += [name for name in dict.fromkeys(figures) if name not in AP_COLUMNS]
    losses = sorted({name for record in records for name in record.weight_variation})
    header += [f"weight variation of {name}" for name in losses]
    header += ["best AP", "best iteration", *(f"AP of {name}" for name in classes)]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(map(spreadsheet_cell, header))
    writer = csv.DictWriter(out, header, extrasaction="ignore", lineterminator="\n")
    for side, run in runs:
        row = {**_numbers(run.record), "side": side.name, "seed": run.seed, "status": run.status}
        writer.writerow({name: spreadsheet_cell(cell) for name, cell in row.items()})
    return out.getvalue()


def _numbers(record: RunRecord | None) -> dict[str, Any]:
    if record is None:
        return {}
    return {
        **{f"AP of {name}": ap for name, ap in record.per_class.items()},
        **{f"weight variation of {name}": v for name, v in record.weight_variation.items()},
        **{f"best {name}": value for name, value in record.best.items()},
        **_figures(record),
        **{name: getattr(record, name) for name in (*RECORD_FIELDS, "outcome")},
    }


def _figures(record: RunRecord) -> dict[str, float | None]:
    """Return box AP, mask AP as mask_AP, and both on further data sets, prefixed by their names."""
    found: dict[str, float | None] = {}
    for number, figures in enumerate(record.sets):
        before = f"{figures.dataset} " if number else ""
        for mask, metrics in (("", figures.metrics), ("mask_", figures.mask_metrics)):
            known = [name for name in (*AP_COLUMNS, *LVIS_COLUMNS) if name in metrics]
            found |= {f"{before}{mask}{name}": metrics[name] for name in known}
    return found
