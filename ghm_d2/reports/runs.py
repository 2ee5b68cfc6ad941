"""A side's runs and their files: records, curves, analyses and pictures."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ghm_d2.errors import DataError
from ghm_d2.records import DIVERGED, FINISHED, RunRecord
from ghm_d2.reports.statistics.estimates import Replicates, Scores
from ghm_d2.run_folder import ANALYSIS_FILE, DENSITY_FILE, METRICS_FILE, WORST_FILE

NOT_DONE = "not done"
# Limits for runs from elsewhere, which must not take all memory: no training exceeds them
LONGEST_FILE, LARGEST = 2**26, 1e15  # bytes
Made = TypeVar("Made")


@dataclass(frozen=True)
class SeedRun:
    """One seed of a side. `record` is None if the run is planned but not done.

    kept: the contents of files by name, if they are kept apart from the run's folder.
    """

    seed: int
    folder: Path
    record: RunRecord | None
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """The record's status, or `NOT_DONE`."""
        return self.record.status if self.record else NOT_DONE

    @cached_property
    def analysis(self) -> dict:
        """The contents of analysis.json; empty if there is none. Raises: see `read_file`."""
        found = self._contents(ANALYSIS_FILE, json.loads)
        return found if isinstance(found, dict) else {}

    @cached_property
    def density(self) -> list[dict]:
        """The rows of density.jsonl, by iteration. Raises: see `read_file`."""
        rows = _objects(self._contents(DENSITY_FILE, json_lines))
        return [row for row in rows if row.keys() >= {"iteration", "density", "ema"}]

    @cached_property
    def metrics(self) -> list[dict]:
        """The rows of metrics.jsonl. Raises: see `read_file`."""
        return _objects(self._contents(METRICS_FILE, json_lines))

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Return iterations and the values of `key` after them, from metrics.jsonl.

        Rows that lack either number, or have one beyond LARGEST, are skipped.

        Raises:
            DataError: see `read_file`.
        """
        rows = [r for r in self.metrics if _is_number(r.get("iteration"), r.get(key))]
        rows = [r for r in rows if r["iteration"] >= 0]
        # rows count iterations from 0, but the last evaluation has the number of iterations
        last = self.record.iterations if self.record else 0
        steps = [row["iteration"] + (row["iteration"] < last) for row in rows]
        return steps, [row[key] for row in rows]

    @cached_property
    def worst(self) -> bytes | None:
        """The contact sheet of the worst images, a JPEG."""
        file = self.folder / WORST_FILE
        return file.read_bytes() if is_own(file) else None  # a link could name any picture here

    @cached_property
    def replicates(self) -> Replicates | None:
        """AP on resamples of the test images; None if analysis.json has none.

        Raises:
            DataError: they do not have the known format.
        """
        found = self.analysis.get("image_bootstrap")
        return checked(lambda: _replicates(found)) if found else None

    def _contents(self, name: str, parse: Callable[[str], Any]) -> Any:
        return self.kept[name] if name in self.kept else read_file(self.folder / name, parse)


@dataclass(frozen=True)
class SideRuns:
    """One side of a comparison and its runs, one per seed."""

    name: str
    config: str
    overrides: list[str]
    runs: list[SeedRun]

    @property
    def finished(self) -> list[SeedRun]:
        """The runs that finished."""
        return [run for run in self.runs if run.status == FINISHED]

    @property
    def diverged(self) -> list[SeedRun]:
        """The runs that diverged, whose AP counts as 0."""
        return [run for run in self.runs if run.status == DIVERGED]

    @property
    def records(self) -> list[RunRecord]:
        """The records of all runs that have one, those of finished runs first."""
        runs = sorted(self.runs, key=lambda run: run.status != FINISHED)
        return [run.record for run in runs if run.record]

    @property
    def method(self) -> str:
        """The recorded method, such as "RetinaNet GHM-C + GHM-R"; "" before the first run."""
        return self.records[0].method if self.records else ""

    @property
    def network(self) -> str:
        """The recorded network; "" before the first run."""
        return self.records[0].network if self.records else ""

    def values(self, metric: str) -> dict[int, float]:
        """A metric of `AP_COLUMNS` by seed, where it is defined; 0 for runs that diverged."""
        found = {r.seed: r.record.metrics.get(metric) for r in self.finished if r.record}
        known = {seed: value for seed, value in found.items() if value is not None}
        if known or not found:
            known |= {run.seed: 0.0 for run in self.diverged}
        return {run.seed: known[run.seed] for run in self.runs if run.seed in known}

    @property
    def scores(self) -> Scores:
        """AP by seed, with the replicates of the runs."""
        there = {run.seed: run.replicates for run in self.finished}
        known = {seed: found for seed, found in there.items() if found}
        for like in list(known.values())[:1]:
            zero = Replicates(like.set, like.images, 0 * like.ap)
            known |= {run.seed: zero for run in self.diverged}
        return Scores(self.values("AP"), known)

    def analysed(self, *keys: str) -> SeedRun | None:
        """The first finished run whose analysis has `keys`, nested in that order."""
        return next((run for run in self.finished if part(run.analysis, *keys)), None)


def kind_of(name: str) -> tuple[str, str]:
    """Split a name such as "proposal_generator.ghm_c.density" into a loss and its place."""
    kind = name.split(".")[-2] if "." in name else name
    where = ", RPN" if "proposal_generator" in name else ""
    return {"ghm_c": "GHM-C", "ghm_r": "GHM-R"}.get(kind, kind), where


def part(tree: Any, *keys: str) -> Any:
    """Return `tree[key][key]...`; None if a key is missing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def checked(make: Callable[[], Made], file: str = ANALYSIS_FILE) -> Made:
    """The result of `make`, which uses the runs' `file`.

    Raises:
        DataError: a file does not have the known format.
    """
    try:
        return make()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(
            f"{file} of a run has an unknown format ({error!r}); remove the file to get a report "
            "without its figures"
        ) from error


def read_file(file: Path, parse: Callable[[str], Made]) -> Made | None:
    """The file's text, parsed by `parse`; None if there is no file.

    Raises:
        DataError: it is not JSON, not a plain file, or over 64 MiB.
    """
    if not os.path.lexists(file):
        return None
    if not is_own(file):
        raise DataError(
            f"{file} must be a regular file of at most {LONGEST_FILE >> 20} MiB, not a link"
        )
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON: {error}") from None


def json_lines(text: str) -> list:
    """The value on each line; invalid lines, such as a killed training leaves, are skipped."""
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return rows


def _replicates(found: dict) -> Replicates:
    ap = [np.nan if value is None else value for value in found["AP"]]
    if not all(_is_number(value) for value in (found["images"], *ap)):
        raise ValueError("a bootstrap replicate of AP is not a number")
    return Replicates(str(found["set"]), int(found["images"]), np.array(ap, dtype=float))


def _objects(rows: Any) -> list[dict]:
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _is_number(*values) -> bool:
    return all(isinstance(v, int | float) and not abs(v) > LARGEST for v in values)


def is_own(file: Path) -> bool:
    """Return whether `file` is a plain file, not too long: no link, pipe or device."""
    return file.is_file() and not file.is_symlink() and file.stat().st_size <= LONGEST_FILE
