"""The subject of a report: a comparison, or a folder of runs, with all files of the runs."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ghm_d2.errors import DataError
from ghm_d2.records import (
    COMPARISON_FILE,
    FINISHED,
    TABLE_FILE,
    ComparedSide,
    Comparison,
    Pair,
    RunRecord,
    RunsTable,
    TableRow,
)
from ghm_d2.reports.runs import SeedRun, SideRuns, is_own, json_lines, read_file
from ghm_d2.run_folder import RUN_FILE

# The contents of the files that figures are drawn from, one run per line, for runs whose folders
# are not kept. The records of these runs are in a runs.jsonl
FIGURES_FILE = "figures.jsonl"


@dataclass(frozen=True)
class Study:
    """A comparison with the files of its runs; `notes` say which runs were left out."""

    comparison: Comparison
    sides: list[SideRuns]
    notes: list[str] = field(default_factory=list)

    def side(self, name: str) -> SideRuns:
        """The side of that name."""
        return next(side for side in self.sides if side.name == name)

    @property
    def unfinished(self) -> list[tuple[SideRuns, SeedRun]]:
        """The planned runs that are not done, or did not finish."""
        return [(s, r) for s in self.sides for r in s.runs if r.status != FINISHED]

    @property
    def planned(self) -> int:
        """Number of runs planned."""
        return sum(len(side.runs) for side in self.sides)


def is_comparison(folder: Path) -> bool:
    """Return whether `folder` is that of a comparison, rather than one with runs in it."""
    return (Path(folder) / COMPARISON_FILE).is_file()


def find_comparisons(folder: Path) -> list[Path]:
    """The folders of all comparisons below `folder`, in the order of their paths."""
    return sorted(file.parent for file in Path(folder).rglob(COMPARISON_FILE))


def read_study(folder: Path) -> Study:
    """The comparison in `folder`, or else the runs below it, grouped by what was trained.

    Raises:
        DataError: there is neither, or a file does not have the known format.
    """
    folder = Path(folder)
    return _compared(folder) if is_comparison(folder) else _grouped(folder)


def find_records(folder: Path) -> dict[str, RunRecord]:
    """The records of all runs below `folder`, by their paths in it, in the order of the paths.

    They are read from the runs' own folders. If there are no such folders, they are read from the
    nearest runs.jsonl, in `folder` or up to two folders above; `TableRow` says how it names runs.

    Raises:
        DataError: there is no run, or a file or row is not a valid record.
    """
    runs = sorted(file.parent for file in Path(folder).rglob(RUN_FILE))
    if runs:
        return {run.relative_to(folder).as_posix(): RunRecord.read(run) for run in runs}
    kept = _kept_records(Path(folder))
    found = {name: RunRecord.of(*kept[name]) for name in sorted(kept) if name[:2] != ".."}
    if not found:
        raise DataError(f"{folder} contains no run: there is no {RUN_FILE}")
    return found


def _kept_records(folder: Path) -> dict[str, tuple[TableRow, Path]]:
    """A run's path from `folder` -> its last row in the nearest runs.jsonl, and that file."""
    above = (folder, *folder.absolute().parents[:2])
    file = next((up / TABLE_FILE for up in above if is_own(up / TABLE_FILE)), None)
    if file is None:
        return {}
    rows = RunsTable(file).rows()
    return {os.path.relpath(file.parent / _run_folder(row), folder): (row, file) for row in rows}


def _run_folder(row: TableRow) -> str:
    """The run's folder, relative to the table's; see `TableRow`."""
    name = row["folder"]
    is_older = "/" not in name and name.endswith(f"-{row['key']}")
    return f"runs/{name}" if is_older else name


def _kept_files(folder: Path) -> dict[str, dict[str, Any]]:
    """A run's path from `folder` -> the contents of its files, from figures.jsonl in `folder`."""
    rows = read_file(folder / FIGURES_FILE, json_lines) or []
    return {str(row.get("folder")): row for row in rows if isinstance(row, dict)}


def _compared(folder: Path) -> Study:
    comparison = Comparison.read(folder)
    _check(comparison, folder / COMPARISON_FILE)
    rows, files = _kept_records(folder), _kept_files(folder)

    def run(seed: int, name: str) -> SeedRun:
        own = _beside(folder, name)
        if (own / RUN_FILE).is_file():
            return SeedRun(seed, own, RunRecord.read(own))
        kept = rows.get(os.path.normpath(name))
        return SeedRun(seed, own, RunRecord.of(*kept) if kept else None, files.get(name, {}))

    sides = []
    for side in comparison.sides:
        runs = [run(seed, name) for seed, name in zip(comparison.seeds, side.runs, strict=False)]
        runs += [SeedRun(seed, folder, None) for seed in comparison.seeds[len(runs) :]]
        sides.append(SideRuns(side.name, side.config, side.overrides, runs))
    return Study(comparison, sides)


def _beside(folder: Path, name: str) -> Path:
    """The run's folder; a mailed comparison may not name other folders of the reader."""
    run = folder / name
    if "\0" in name or not run.resolve().is_relative_to(folder.resolve().parent):
        raise DataError(
            f"{folder / COMPARISON_FILE}: the run {name!r:.120} lies outside the folder that holds "
            "the comparison"
        )
    return run


def _check(comparison: Comparison, file: Path) -> None:
    names = [side.name for side in comparison.sides]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{file}: two sides have the name {name!r}")
    for side in comparison.sides:
        if len(side.runs) > len(comparison.seeds):
            raise DataError(f"{file}: {side.name!r} has more runs than the comparison has seeds")
    for pair in comparison.pairs:
        for name in (pair.side, pair.reference):
            if name not in names:
                raise DataError(f"{file}: a pair names {name!r}, which is not a side")


def _grouped(folder: Path) -> Study:
    """Group runs into sides by their method, network, configuration and data set."""
    groups: dict[tuple[str, str, str, str], dict[int, SeedRun]] = {}
    notes, files = [], _kept_files(folder)
    for name, record in find_records(folder).items():
        runs = groups.setdefault(
            (record.method, record.network, record.config_hash, record.dataset), {}
        )
        if record.seed in runs:
            first = os.path.relpath(runs[record.seed].folder, folder)
            notes.append(f"{name}: same configuration and seed as {first}, left out")
        else:
            run = folder / name
            kept = {} if (run / RUN_FILE).is_file() else files.get(name, {})
            runs[record.seed] = SeedRun(record.seed, run, record, kept)
    names = _names(list(groups))
    by_name = zip(names, groups.values(), strict=True)
    sides = [SideRuns(name, "", [], [runs[s] for s in sorted(runs)]) for name, runs in by_name]
    datasets = list(dict.fromkeys(dataset for *_, dataset in groups))
    return Study(
        Comparison(
            name=folder.resolve().name,
            question="How do the runs in this folder compare?",
            dataset=", ".join(datasets),
            budget="",
            seeds=sorted({seed for runs in groups.values() for seed in runs}),
            sides=[ComparedSide(side.name, side.config) for side in sides],
            pairs=_against_first(names, [dataset for *_, dataset in groups]),
        ),
        sides,
        notes,
    )


def _names(keys: list[tuple[str, str, str, str]]) -> list[str]:
    """A name for each (method, network, config hash, data set), no longer than tells it apart."""
    names = []
    for method, _, config_hash, dataset in keys:
        alike = [key[3] for key in keys if key[0] == method]
        added = [config_hash] if alike.count(dataset) > 1 else []
        added += [dataset] if len(set(alike)) > 1 else []
        names.append(f"{method} ({', '.join(added)})" if added else method)
    return names


def _against_first(names: list[str], datasets: list[str]) -> list[Pair]:
    """Return the pairs of each side and the first one of the same data set."""
    pairs: list[Pair] = []
    first: dict[str, str] = {}
    for name, dataset in zip(names, datasets, strict=True):
        if dataset in first:
            pairs.append(Pair(name, first[dataset], f"on {dataset}"))
        first.setdefault(dataset, name)
    return pairs
