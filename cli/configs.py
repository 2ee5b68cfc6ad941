"""ghm configs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .common.console import emit, out, tell, user_errors
from .common.options import Json

HEADERS = ("Configuration", "Method", "Network", "Params, M", "GFLOPs", "Published", "Here")


def configs(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: Json = False,
) -> None:
    """List the shipped configurations with their cost and their AP.

    GFLOPs are for one picture of 640 x 480 px, resized as configured; a multiply-add counts as one.
    "Published" is the COCO AP of the same method, network and schedule; --json adds the sources and
    results with other schedules. "Here" is the AP measured with the unchanged configuration on the
    named data.
    """
    with user_errors():
        rows = _rows()
        emit(rows, as_json=as_json, human=lambda: (_print_markdown if markdown else _print)(rows))


def _rows() -> list[dict]:
    from ghm_d2 import configs as shipped
    from ghm_d2.config import list_configs
    from ghm_d2.records import Schedule
    from ghm_d2.reports.published import published_like, published_otherwise

    catalog = json.loads((Path(shipped.__file__).parent / "catalog.json").read_text("utf-8"))
    rows = []
    for name in list_configs():
        row = {"config": f"configs/{name}", **catalog.get(name, {})}
        published, otherwise = [], []
        if name.startswith("coco/") and "method" in row:
            experiment = row["method"], row["network"], Schedule(**row["schedule"])
            published, otherwise = published_like(*experiment), published_otherwise(*experiment)
        row["published"] = [{"AP": p.ap[0], "source": p.source} for p in published]
        row["published_otherwise"] = [
            {"AP": p.ap[0], "source": p.source, "schedule": p.schedule and asdict(p.schedule)}
            for p in otherwise
        ]
        rows.append(row)
    return rows


def _print(rows: list[dict]) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("Configuration", overflow="fold")
    for header in HEADERS[3:]:
        table.add_column(header, justify="right", overflow="fold")
    for row in rows:
        name, method, network, *numbers = _cells(row)
        table.add_row(f"{name}\n  [dim]{method}, {network}[/]", *numbers)
    out.print(table)
    out.print("to train one: ghm train --config configs/quick/retinanet_ghm.yaml", highlight=False)


def _print_markdown(rows: list[dict]) -> None:
    tell("| " + " | ".join(HEADERS) + " |")
    tell("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        tell("| " + " | ".join(_cells(row)) + " |")


def _cells(row: dict) -> tuple[str, ...]:
    if "method" not in row:  # a configuration that tools/describe_configs.py has not seen
        return (row["config"].removeprefix("configs/"), *["-"] * 6)
    here = ", ".join(f"{m['dataset']} {m['AP']:.1f}" for m in row["measured"]) or "-"
    return (
        row["config"].removeprefix("configs/"),
        row["method"],
        row["network"],
        f"{row['parameters'] / 1e6:.1f}",
        f"{row['gflops']:.1f}",
        f"{row['published'][0]['AP']:.1f}" if row["published"] else "-",
        here,
    )
