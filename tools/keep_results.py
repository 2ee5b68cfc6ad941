#!/usr/bin/env python3
"""Keeps what reports need from runs: their records, and thinned data for the figures.

    python tools/keep_results.py runs results/exploration    # what `ghm compare --output runs` left
    python tools/keep_results.py my-runs results             # a folder of other runs
    python tools/keep_results.py results/exploration         # write the reports again

Records go to results/runs.jsonl. Each comparison, or the folder of other runs, becomes a folder of
the same name below the second argument, with comparison.json and figures.jsonl. A comparison also
gets its report.md, with the figures that answer its question and those that the documentation
shows.
"""

import json
import math
import os
import shutil
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

from ghm_d2.files import write_text
from ghm_d2.records import COMPARISON_FILE, TABLE_FILE, RunRecord, RunsTable
from ghm_d2.reports.page.contents import document_of
from ghm_d2.reports.page.document import Document, Picture, Section, markdown
from ghm_d2.reports.page.write import MARKDOWN_FILE, write_overview
from ghm_d2.reports.report import read_report
from ghm_d2.reports.runs import SeedRun, SideRuns
from ghm_d2.reports.study import (
    FIGURES_FILE,
    find_comparisons,
    find_records,
    read_study,
)
from ghm_d2.run_folder import ANALYSIS_FILE, DENSITY_FILE, METRICS_FILE

RESULTS = Path(__file__).parents[1] / "results"
CURVES = ("loss_cls", "grad_ratio_cls_box", "bbox/AP")
MOST_ROWS = 20  # kept of a density's moving average
# parts of an analysis; the figures show the other parts for one seed only
OF_EACH_SEED = ("precision_recall", "noise", "image_bootstrap")
DIGITS = 4
FIGURES = ("conditions.png", "differences.png", "learning.png", "noise.png")


def main(source: Path, output: Path) -> None:
    """Keep the finished comparisons, or the runs, of `source` in folders below `output`."""
    folders = find_comparisons(source) or [source]
    runs = {f: [run for side in read_study(f).sides for run in side.runs] for f in folders}
    done = [folder for folder in folders if all(run.record for run in runs[folder])]
    for folder in folders:
        if folder not in done:
            print(f"left out until its runs are done: {folder}")
    keep_records(source, output, {run.folder.name for folder in done for run in runs[folder]})
    for folder in done:
        kept = output / folder.name
        kept.mkdir(parents=True, exist_ok=True)
        if (folder / COMPARISON_FILE).is_file():
            shutil.copy(folder / COMPARISON_FILE, kept)
        rows = [row for side in read_study(folder).sides for row in figures_data(side, folder)]
        lines = [json.dumps(rounded(row), separators=(",", ":")) + "\n" for row in rows]
        write_text(kept / FIGURES_FILE, "".join(lines))
    write_reports(output)


def keep_records(source: Path, output: Path, names: set[str]) -> None:
    """Add the records of the runs `names` in `source` to the table, unless it has the same ones."""
    table = RunsTable(RESULTS / TABLE_FILE)
    keys = {Path(row["folder"]).name: row["key"] for row in RunsTable(source / TABLE_FILE).rows()}
    place = (output if keys else output / source.name).resolve().relative_to(RESULTS)
    known = {row["folder"]: RunRecord.of(row, table.file) for row in table.rows()}
    for name, record in find_records(source).items():
        folder = (place / name).as_posix()
        if Path(name).name in names and known.get(folder) != record:
            key = keys.get(Path(name).name, f"{record.config_hash}-s{record.seed}")
            table.append({"key": key, "folder": folder, "record": asdict(record)})


def figures_data(side: SideRuns, folder: Path) -> list[dict]:
    """One row per run of `side` with data for figures: the contents of its files by name."""
    rows = []
    for run in side.runs:
        first = run in side.finished[:1]
        files = {
            METRICS_FILE: curves(run),
            DENSITY_FILE: density(run) if first else [],
            ANALYSIS_FILE: {
                name: found
                for name, found in run.analysis.items()
                if name in OF_EACH_SEED or (first and name != "worst")
            },
        }
        name = Path(os.path.relpath(run.folder, folder)).as_posix()
        rows += [{"folder": name} | {file: found for file, found in files.items() if found}]
    return [row for row in rows if len(row) > 1]


def curves(run: SeedRun) -> list[dict]:
    """The rows of metrics.jsonl with the keys that figures are drawn from."""
    found = []
    for row in run.metrics:
        wanted = {key: row[key] for key in CURVES if key in row}
        found += [{"iteration": row["iteration"]} | wanted] if wanted else []
    return found


def density(run: SeedRun) -> list[dict]:
    """Some rows of density.jsonl, summed over feature levels, as the figure shows them."""
    found = []
    for name in dict.fromkeys(row["density"] for row in run.density):
        rows = [row for row in run.density if row["density"] == name]
        for row in rows[:: -math.ceil(len(rows) / MOST_ROWS)][::-1]:  # including the last
            levels = [[value or 0 for value in level] for level in row["ema"]]
            ema = [[sum(values) for values in zip(*levels, strict=True)]]
            found.append({"iteration": row["iteration"], "density": name, "ema": ema})
    return found


def write_reports(folder: Path) -> None:
    """Write report.md of each comparison in `folder`, and the picture of all their differences."""
    reports = []
    for kept in find_comparisons(folder):
        reports.append(read_report(kept))
        document = with_few_figures(document_of(reports[-1]), kept)
        for file in kept.glob("*.png"):
            file.unlink()
        for picture in document.pictures:
            (kept / picture.file).write_bytes(picture.data)
        write_text(kept / MARKDOWN_FILE, markdown(document))
    if len(reports) > 1:
        write_overview(folder, reports)


def with_few_figures(document: Document, folder: Path) -> Document:
    """Return `document` with FIGURES and those that the documentation shows, and no others."""
    name = folder.resolve().relative_to(RESULTS.parent).as_posix()

    def is_kept(block) -> bool:
        if not isinstance(block, Picture):
            return True
        return block.file in FIGURES or f"{name}/{block.file}" in documentation()

    sections = [
        Section(section.title, [block for block in section.blocks if is_kept(block)])
        for section in document.sections
    ]
    shown = [section for section in sections if section.blocks]
    return Document(document.title, document.question, document.answer, shown)


@cache
def documentation() -> str:
    """Return the text of README.md and of all pages."""
    root = RESULTS.parent
    return "".join(file.read_text() for file in [root / "README.md", *root.glob("docs/*.md")])


def rounded(value):
    """Return `value` with its floats rounded to DIGITS significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    if len(sys.argv) == 2:
        write_reports(Path(sys.argv[1]))
    elif len(sys.argv) == 3:
        main(*map(Path, sys.argv[1:]))
    else:
        sys.exit(__doc__)
