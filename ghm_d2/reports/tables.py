"""Tables of run records, for a terminal or as Markdown."""

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from ghm_d2.errors import printable
from ghm_d2.records import AP_COLUMNS, RunRecord
from ghm_d2.reports import document
from ghm_d2.reports.document import Best

HEADERS = ("Method", "Network", "AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")
RUN_HEADERS = (*HEADERS, "Data", "Seed", "Iterations", "Training, min", "Run")


def results_table(record: RunRecord, title: str | None = None) -> Table:
    """One run, in the published column order; a second row has the masks where there are some."""
    return _table(HEADERS, _results(record), title, text_columns=2)


def runs_markdown(records: Mapping[str, RunRecord]) -> str:
    """A row a run, as Markdown: the published columns, then data, seed, iterations, time, name.

    A run with masks has a second row, of their AP.
    """
    rows = [map(document.escape, (*row, name)) for name, r in records.items() for row in _run(r)]
    lines = [RUN_HEADERS, ["---"] * len(RUN_HEADERS), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def report_table(table: document.Table) -> Table:
    """A report's table for a terminal."""
    return _table(table.headers, table.rows, None, table.text_columns)


def per_class_table(record: RunRecord) -> Table:
    """AP of each class."""
    rows = [(name, _percent(ap)) for name, ap in record.per_class.items()]
    return _table(("Class", "AP"), rows, None, text_columns=1)


def _results(r: RunRecord) -> list[tuple[str, ...]]:
    rows = [(r.method, r.metrics)]
    if r.mask_metrics:
        rows = [(f"{r.method} (boxes)", r.metrics), (f"{r.method} (masks)", r.mask_metrics)]
    return [(name, r.network, *(_percent(m.get(c)) for c in AP_COLUMNS)) for name, m in rows]


def _run(r: RunRecord) -> list[tuple[str, ...]]:
    minutes = "-" if r.train_seconds is None else f"{r.train_seconds / 60:.1f}"
    return [(*row, r.dataset, str(r.seed), str(r.iterations), minutes) for row in _results(r)]


def _table(headers, rows, title, text_columns: int) -> Table:
    table = Table(title=title and escape(printable(title)), title_justify="left")
    for i, header in enumerate(headers):
        is_text = i < text_columns
        justify = "left" if is_text else "right"
        table.add_column(header, justify=justify, overflow="fold", no_wrap=not is_text)
    for row in rows:
        table.add_row(*map(_cell, row))
    return table


def _cell(cell: str) -> str:
    shown = escape(printable(cell))
    return f"[bold]{shown}[/]" if isinstance(cell, Best) else shown


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
