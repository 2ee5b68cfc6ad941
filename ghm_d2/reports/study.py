"""What a report is about: a comparison's sides and their runs, read from their folders."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from ghm_d2.errors import DataError
from ghm_d2.records import (
    COMPARISON_FILE,
    ComparedSide,
    Comparison,
    Pair,
    RunRecord,
    find_records,
)
from ghm_d2.run_folder import (
    ANALYSIS_FILE,
    DENSITY_FILE,
    METRICS_FILE,
    RUN_FILE,
    WORST_FILE,
)

FINISHED, NOT_DONE = "finished", "not done"
# A run from elsewhere must not take all memory: no training writes as much, or such numbers
LONGEST_FILE, LARGEST = 2**26, 1e15  # bytes
Made = TypeVar("Made")


@dataclass(frozen=True)
class Run:
    """One seed of a side. `record` is None where the run is planned and not done."""

    seed: int
    folder: Path | None  # None only where the run is not done
    record: RunRecord | None

    @property
    def status(self) -> str:
        """The record's status, or `NOT_DONE`."""
        return self.record.status if self.record else NOT_DONE

    @cached_property
    def analysis(self) -> dict:
        """What analysis.json holds; empty where there is none. Raises: see `_read`."""
        rows = _read(self.folder / ANALYSIS_FILE, json.loads)
        return rows if isinstance(rows, dict) else {}

    @cached_property
    def density(self) -> list[dict]:
        """The rows of density.jsonl, by iteration. Raises: see `_read`."""
        rows = _read(self.folder / DENSITY_FILE, _lines) or []
        return [row for row in rows if row.keys() >= {"iteration", "density", "ema"}]

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Iterations done and the values of `key` then, from metrics.jsonl.

        Rows without the two numbers are passed over, and numbers that no training gives.

        Raises:
            DataError: see `_read`.
        """
        rows = [r for r in self._metrics if _is_number(r.get("iteration"), r.get(key))]
        rows = [r for r in rows if r["iteration"] >= 0]
        # rows count iterations from 0, the evaluation after the last one has their number
        last = self.record.iterations if self.record else 0
        steps = [row["iteration"] + (row["iteration"] < last) for row in rows]
        return steps, [row[key] for row in rows]

    @cached_property
    def worst(self) -> bytes | None:
        """The contact sheet of the worst images, a JPEG."""
        file = self.folder / WORST_FILE
        return file.read_bytes() if _is_own(file) else None  # a link could name any picture here

    @cached_property
    def _metrics(self) -> list[dict]:
        return _read(self.folder / METRICS_FILE, _lines) or []


@dataclass(frozen=True)
class Side:
    """One side of a comparison and its runs, one a seed."""

    name: str
    config: str
    overrides: list[str]
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        """The runs that count."""
        return [run for run in self.runs if run.status == FINISHED]

    @property
    def records(self) -> list[RunRecord]:
        """Of all runs that have one, those of finished runs first."""
        runs = sorted(self.runs, key=lambda run: run.status != FINISHED)
        return [run.record for run in runs if run.record]

    @property
    def method(self) -> str:
        """As recorded, such as "RetinaNet GHM-C + GHM-R"; "" before the first run."""
        return self.records[0].method if self.records else ""

    @property
    def network(self) -> str:
        """As recorded; "" before the first run."""
        return self.records[0].network if self.records else ""

    def values(self, metric: str) -> dict[int, float | None]:
        """A metric of `AP_COLUMNS` by the seeds that finished."""
        return {run.seed: run.record.metrics.get(metric) for run in self.finished}

    def mask_values(self, metric: str) -> dict[int, float | None]:
        """As `values`, of masks; empty where the detector has none."""
        runs = [run for run in self.finished if run.record.mask_metrics]
        return {run.seed: run.record.mask_metrics.get(metric) for run in runs}

    def analysed(self, *keys: str) -> Run | None:
        """The first finished run whose analysis has `keys`, one within the other."""
        return next((run for run in self.finished if part(run.analysis, *keys)), None)


@dataclass(frozen=True)
class Study:
    """A comparison with what its runs have left; `notes` say what was left out of it."""

    comparison: Comparison
    sides: list[Side]
    notes: list[str] = field(default_factory=list)

    def side(self, name: str) -> Side:
        """The side of that name."""
        return next(side for side in self.sides if side.name == name)

    @property
    def unfinished(self) -> list[tuple[Side, Run]]:
        """Planned runs that are not done, or did not finish."""
        return [(s, r) for s in self.sides for r in s.runs if r.status != FINISHED]

    @property
    def planned(self) -> int:
        """Number of runs planned."""
        return sum(len(side.runs) for side in self.sides)


def part(tree: dict, *keys: str):
    """`tree[key][key]...`; None where a key is missing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def checked(make: Callable[[], Made], file: str = ANALYSIS_FILE) -> Made:
    """What `make` makes of the runs' `file`.

    Raises:
        DataError: one is not of the known form.
    """
    try:
        return make()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(
            f"{file} of a run is not of the known form ({error!r}); without the file the report "
            "leaves its figures out"
        ) from error


def is_comparison(folder: Path) -> bool:
    """Whether `folder` is that of a comparison, rather than one with runs in it."""
    return (Path(folder) / COMPARISON_FILE).is_file()


def find_comparisons(folder: Path) -> list[Path]:
    """The folders of all comparisons below `folder`, in the order of their paths."""
    return sorted(file.parent for file in Path(folder).rglob(COMPARISON_FILE))


def read_study(folder: Path) -> Study:
    """The comparison in `folder`; or the runs below it, grouped by what was trained.

    Raises:
        DataError: there is neither, or a file in it is not what its name says.
    """
    folder = Path(folder)
    return _compared(folder) if is_comparison(folder) else _grouped(folder)


def _compared(folder: Path) -> Study:
    comparison = Comparison.read(folder)
    _check(comparison, folder / COMPARISON_FILE)
    sides = []
    for side in comparison.sides:
        folders = [_beside(folder, name) for name in side.runs]
        runs = [_run(seed, run) for seed, run in zip_longest(comparison.seeds, folders)]
        sides.append(Side(side.name, side.config, side.overrides, runs))
    return Study(comparison, sides)


def _beside(folder: Path, name: str) -> Path:
    """The run's folder; a mailed comparison names none of the reader's own."""
    run = folder / name
    if "\0" in name or not run.resolve().is_relative_to(folder.resolve().parent):
        raise DataError(f"{folder / COMPARISON_FILE}: the run {name!r:.120} lies elsewhere")
    return run


def _check(comparison: Comparison, file: Path) -> None:
    names = [side.name for side in comparison.sides]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{file}: two sides are called {name!r}")
    for side in comparison.sides:
        if len(side.runs) > len(comparison.seeds):
            raise DataError(f"{file}: {side.name!r} has more runs than there are seeds")
    for pair in comparison.pairs:
        for name in (pair.side, pair.reference):
            if name not in names:
                raise DataError(f"{file}: a pair names {name!r}, which is no side")


def _run(seed: int, folder: Path | None) -> Run:
    done = folder is not None and (folder / RUN_FILE).is_file()
    return Run(seed, folder, RunRecord.read(folder) if done else None)


def _grouped(folder: Path) -> Study:
    """Sides are the runs with one method, network, configuration and data set."""
    find_records(folder)  # says so where there is none
    groups: dict[tuple, dict[int, Run]] = {}
    notes = []
    for file in sorted(folder.rglob(RUN_FILE)):
        record = RunRecord.read(file.parent)
        key = (record.method, record.network, record.config_hash, record.dataset)
        runs = groups.setdefault(key, {})
        if record.seed in runs:
            first = os.path.relpath(runs[record.seed].folder, folder)
            this = os.path.relpath(file.parent, folder)
            notes.append(f"{this}: same configuration and seed as {first}, left out")
        else:
            runs[record.seed] = Run(record.seed, file.parent, record)
    names = _names(list(groups))
    by_name = zip(names, groups.values(), strict=True)
    sides = [Side(name, "", [], [runs[s] for s in sorted(runs)]) for name, runs in by_name]
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
    """A name for each (method, network, config hash, data set): as much as tells it apart."""
    names = []
    for method, _, config_hash, dataset in keys:
        alike = [key[3] for key in keys if key[0] == method]
        added = [config_hash] if alike.count(dataset) > 1 else []
        added += [dataset] if len(set(alike)) > 1 else []
        names.append(f"{method} ({', '.join(added)})" if added else method)
    return names


def _against_first(names: list[str], datasets: list[str]) -> list[Pair]:
    """Each side against the first of the same data set."""
    pairs, first = [], {}
    for name, dataset in zip(names, datasets, strict=True):
        if dataset in first:
            pairs.append(Pair(name, first[dataset], f"on {dataset}"))
        first.setdefault(dataset, name)
    return pairs


def _lines(text: str) -> list[dict]:
    """The objects among the lines; a killed training leaves half a line."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def _is_number(*values) -> bool:
    return all(isinstance(v, int | float) and not abs(v) > LARGEST for v in values)


def _is_own(file: Path) -> bool:
    """Whether it is a file of the run, not too long: no link to elsewhere, no pipe, no device."""
    return file.is_file() and not file.is_symlink() and file.stat().st_size <= LONGEST_FILE


def _read(file: Path, parse):
    """What `parse` makes of the file's text; None where there is no file.

    Raises:
        DataError: it is not JSON, not a plain file, or over 64 MiB.
    """
    if not os.path.lexists(file):
        return None
    if not _is_own(file):
        raise DataError(f"{file}: a link, no plain file, or over {LONGEST_FILE >> 20} MiB")
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {error}") from None
