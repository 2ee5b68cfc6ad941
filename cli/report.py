"""ghm report."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ghm_d2.errors import UsageError

from .common.console import TABLE_WIDTH, emit, out, tell, user_errors
from .common.options import Json, make_folder


def report(
    folder: Annotated[
        Path, typer.Argument(help="A comparison's folder, or one with runs or comparisons in it.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write. Default: the comparison's, or FOLDER/report for runs."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown, write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the report of a comparison or of runs: report.html, report.md, runs.csv, pictures.

    For a folder of comparisons, write each report, and show all their differences in one table and
    one picture. A comparison made on several data sets also gets a table of its sides' AP.

    --json prints a comparison's numbers and the files written. For runs it prints only their
    records, and nothing is written without --output.
    """
    with user_errors():
        if markdown and (as_json or output is not None):
            raise UsageError("--markdown only prints tables; leave out --json and --output")
        from ghm_d2.reports.study import find_comparisons, is_comparison

        comparisons = [] if is_comparison(folder) else find_comparisons(folder)
        if comparisons and output is not None:
            raise UsageError(
                f"{folder} holds comparisons, each with its own report; leave out --output"
            )
        if markdown:
            out.print(_markdown(folder, comparisons), markup=False, highlight=False, end="")
        elif comparisons:
            _write_all(folder, comparisons, as_json)
        else:
            _write(folder, output, as_json)


def _markdown(folder: Path, comparisons: list[Path]) -> str:
    from ghm_d2.reports.page.document import markdown_table
    from ghm_d2.reports.report import by_data, overview, read_report
    from ghm_d2.reports.study import find_records, is_comparison
    from ghm_d2.reports.tables import runs_table

    if comparisons:
        reports = [read_report(f) for f in comparisons]
        return "\n".join(map(markdown_table, [*by_data(reports), overview(reports)]))
    if is_comparison(folder):
        return read_report(folder).markdown
    return markdown_table(runs_table(find_records(folder)))


def _write_all(folder: Path, comparisons: list[Path], as_json: bool) -> None:
    from ghm_d2.reports.page.write import write_overview, write_report
    from ghm_d2.reports.report import by_data, overview
    from ghm_d2.reports.tables import terminal_table

    from .common.progress import progress

    with progress() as shown:
        tracked = shown.track(comparisons, "writing reports", len(comparisons))
        written = [write_report(comparison) for comparison in tracked]
        picture = write_overview(folder, written)

    def human():
        for table in (*by_data(written), overview(written)):
            _wide().print(terminal_table(table))
        for report in written:
            tell(f"report: {report.files[0]}")
        if picture:
            tell(f"differences of all comparisons: {picture}")

    emit([report.to_json() for report in written], as_json=as_json, human=human)


def _write(folder: Path, output: Path | None, as_json: bool) -> None:
    from ghm_d2.reports.study import find_records, is_comparison

    records = None if is_comparison(folder) else [asdict(r) for r in find_records(folder).values()]
    if as_json and records is not None and output is None:
        emit(records, as_json=True, human=None)
        return
    from ghm_d2.reports.page.write import write_report  # imports matplotlib

    if output is not None:
        make_folder(output)
    written = write_report(folder, output)
    if records is None:
        show_report(written, as_json)
    else:
        emit(records, as_json=as_json, human=lambda: _show(written))


def show_report(report, as_json: bool) -> None:
    """Print a comparison's `Report`: tables, answer and the file written; or all as JSON."""
    emit(report.to_json(), as_json=as_json, human=lambda: _show(report))


def _show(report) -> None:
    from ghm_d2.reports.tables import terminal_table

    wide = _wide()
    for table in report.shown_tables:
        wide.print(terminal_table(table))
    for sentence in report.answer:
        tell(sentence)
    tell(f"report: {report.files[0]}")


def _wide() -> Console:
    # print() never exceeds its console's own width
    return Console(width=max(out.width, TABLE_WIDTH), soft_wrap=True)
