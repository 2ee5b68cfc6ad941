"""ghm report."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ._console import emit, out, user_errors
from ._options import Json

TABLE_WIDTH = 150  # characters; in less the names break into syllables


def report(
    folder: Annotated[Path, typer.Argument(help="A folder with runs in it, however deep.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Print the table of all runs below a folder, from their run.json."""
    with user_errors():
        from ghm_d2.records import find_records
        from ghm_d2.reports.tables import runs_markdown, runs_table

        records = find_records(folder)

        def human():
            if markdown:
                out.print(runs_markdown(records), markup=False, highlight=False, end="")
            else:
                # print() never goes beyond its console's own width
                wide = Console(width=max(out.width, TABLE_WIDTH), soft_wrap=True)
                wide.print(runs_table(records))

        emit([asdict(record) for record in records], as_json=as_json, human=human)
