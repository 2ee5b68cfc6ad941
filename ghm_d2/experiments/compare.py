"""One comparison: its plan, its search, its runs, and the record of what was compared."""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ghm_d2.config import config_hash
from ghm_d2.data.checking.registered_sets import require_annotations
from ghm_d2.errors import UsageError
from ghm_d2.experiments.plan import (
    Plan,
    PlannedRun,
    absolute,
    expected_seconds,
    make_run,
    require_one_val,
    side_config,
    side_dataset,
)
from ghm_d2.experiments.run_all import POLL_SECONDS, run_all
from ghm_d2.experiments.search import Settings, SideSearch, read_settings, search, trial_data
from ghm_d2.experiments.suites import Suite, SuiteSide
from ghm_d2.locks import take
from ghm_d2.progress import Progress
from ghm_d2.records import (
    COMPARISON_FILE,
    TABLE_FILE,
    ComparedSide,
    Comparison,
    Pair,
    RunsTable,
    Trial,
)
from ghm_d2.run_folder import LOCK_FILE
from ghm_d2.training.metrics.trackers import GROUP


@dataclass(frozen=True)
class Request:
    """A comparison that a user asks for.

    root: folder shared by comparisons: the runs table, all runs, and one folder per comparison.
    overrides: KEY VALUE words for all sides.
    search: True to search settings first, on the compared data or on all of `search_on`.
    settings: comparison.json, or its folder, of the earlier search whose settings are used.
    at_once: number of runs that the launcher trains at the same time.
    margin, looks: as in `Comparison`.
    """

    suite: Suite
    dataset: str | None
    budget: str
    seeds: tuple[int, ...]
    root: Path
    device: str
    overrides: tuple[str, ...] = ()
    search: bool = False
    search_on: tuple[str, ...] = ()
    settings: Path | None = None
    command: str = ""
    margin: float | None = None  # in AP; None: an earlier call's, or 1
    looks: tuple[int, ...] | None = None  # numbers of seeds; None: an earlier call's, or none
    at_once: int = 1

    @property
    def table(self) -> RunsTable:
        """The table of all runs below `root`."""
        return RunsTable(self.root / TABLE_FILE)

    def inputs(self, side: SuiteSide) -> tuple[str, tuple[str, ...], str | None]:
        """A side's configuration, overrides and data set."""
        config, own = side_config(side, self.budget)
        return config, (*own, *self.overrides), side_dataset(side, self.dataset)

    def folder(self) -> Path:
        """The comparison's folder: suite, data and budget, then a hash of the runs and search."""
        runs = make_runs(replace(self, seeds=(1,)), {})
        words = [self.suite.name, label_of(self, runs), self.budget]
        slug = re.sub(r"[^a-z0-9.]+", "-", "-".join(words).lower()).strip("-")[:100]
        how: Any = [*self.search_on] or self.search
        if self.settings:
            how = read_settings(self.settings, self.budget)[0]
        name = config_hash(json.dumps([[run.key for run in runs], how]))
        return self.root / f"{slug}-{name[:6]}"


def make_runs(request: Request, settings: Settings) -> list[PlannedRun]:
    """The runs of a comparison, ordered by seed: first all sides with the first seed.

    Args:
        settings: the overrides that a search chose, by side.

    Raises:
        UsageError, DataError: a configuration or data set cannot be used.
    """
    require_one_val(request.suite)
    runs = []
    for seed in request.seeds:
        for side in request.suite.sides:
            config, overrides, dataset = request.inputs(side)
            chosen = settings.get(side.settings_of, settings.get(side.name, ()))
            what = (request.root, side.name, config, (*overrides, *chosen), dataset)
            runs += [make_run(*what, seed, request.device)]
            require_annotations(runs[-1].evaluated_on)
    return runs


def make_plan(request: Request, progress: Progress) -> Plan:
    """The planned runs and how long they will take; the trials of a search come first.

    Runs that depend on the results of trials are counted with the sides' own settings.

    Raises:
        UsageError: see `keep_plan`.
    """
    request = keep_plan(request)
    table = request.table
    searches = _searches(request)
    trials = [trial.run for side in searches for trial in side.trials(table)]
    later = [run for side in searches for run in side.later(table)]
    settings: Settings = {}
    if all(side.choice(table) for side in searches):
        settings, _ = _settings(request, searches, lambda runs: None)
    runs = make_runs(request, settings)
    done = {run.key for run in (*trials, *later, *runs) if run.is_done(table)}
    left = [run for run in (*trials, *later, *runs) if run.key not in done]
    seconds = expected_seconds(left, table, request.device, progress)
    label, at_once = label_of(request, runs), request.at_once
    margin, looks = request.margin or 0.0, request.looks or ()
    return Plan(request.suite, label, runs, trials, later, done, seconds, at_once, margin, looks)


def keep_plan(request: Request) -> Request:
    """Return `request` with the margin and the looks that the comparison was planned with.

    Raises:
        UsageError: the request has another margin, other looks or another primary pair. A plan
            must not change once results may be known.
    """
    others = any(request.root.glob(f"*/{COMPARISON_FILE}"))
    file = request.folder() / COMPARISON_FILE if others else None
    kept = Comparison.read(file.parent) if file and file.is_file() else None
    margin = kept.margin if kept else 1.0
    looks = tuple(kept.looks) if kept else ()
    for option, asked, planned in (
        ("--margin", request.margin, margin),
        ("--looks", request.looks, looks),
    ):
        if kept and asked is not None and asked != planned:
            shown = (", ".join(map(str, looks)) or "none") if option == "--looks" else margin
            raise UsageError(
                f"{file} was planned with another {option}, {shown}, and a plan cannot "
                f"change once it has begun; leave out {option}, or choose another --output"
            )
    if kept and _primary(kept.pairs) not in ([], _primary(request.suite.pairs)):
        raise UsageError(
            f"{file} was planned with another primary pair, {_primary(kept.pairs)[0]}, and a plan "
            "cannot change once it has begun; choose another --output"
        )
    return replace(
        request,
        margin=margin if request.margin is None else request.margin,
        looks=looks if request.looks is None else request.looks,
    )


def _primary(pairs: Sequence[Pair]) -> list[str]:
    return [f"{pair.side} against {pair.reference}" for pair in pairs if pair.primary]


def compare(
    request: Request,
    launcher,
    progress: Progress,
    is_decided: Callable[[Path, int], bool] | None = None,
) -> Path:
    """Train the runs that are not done yet, and record the comparison.

    After each planned look, `is_decided` is called with the comparison's folder and the look's
    number of seeds. If it returns True, the other seeds are not trained. With None, all are.

    Returns:
        the comparison's folder.

    Raises:
        UsageError, DataError, RunError: a run failed; the same request continues the comparison.
        KeyboardInterrupt: after Ctrl-C, once the runs have saved checkpoints.
    """
    request = keep_plan(request)
    table = request.table
    os.environ[GROUP] = request.folder().name  # inherited by the training processes
    settings, trials = _settings(
        request, _searches(request), lambda runs: run_all(runs, launcher, table, progress)
    )
    folder = request.folder()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "a") as lock:
        while not take(lock):  # another process starts other seeds of this comparison
            time.sleep(POLL_SECONDS)
        _record(request, settings, trials, folder)
    runs = make_runs(request, settings)
    for look in (*(request.looks or ()), len(request.seeds)):
        early = request.seeds[:look]
        run_all([run for run in runs if run.seed in early], launcher, table, progress)
        left = [run.seed for run in runs if run.seed not in early and not run.is_done(table)]
        if left and is_decided and is_decided(folder, look):
            listed = ", ".join(map(str, dict.fromkeys(left)))
            progress.message(
                f"the early verdict after {look} seeds decides the primary pair; seeds that are "
                f"not trained: {listed} (--all-seeds trains them)"
            )
            break
    return folder


def _settings(
    request: Request, searches: list[SideSearch], train: Callable[[list[PlannedRun]], None]
) -> tuple[Settings, list[Trial]]:
    """The settings of each side, searched or taken from an earlier search, and the trials.

    Raises:
        UsageError, DataError: the earlier search lacks a side, or cannot be used.
    """
    if request.settings is None:
        return search(searches, request.table, train)
    settings, trials = read_settings(request.settings, request.budget)
    for side in request.suite.sides:
        if side.name not in settings and side.settings_of not in settings:
            raise UsageError(
                f"--settings {request.settings} has no settings for {side.name}; leave out this "
                "side, or search again with --search"
            )
    return settings, trials


def _searches(request: Request) -> list[SideSearch]:
    """The searches, one for each side that does not share another side's search."""
    if not request.search:
        return []
    names = {side.name for side in request.suite.sides}
    found: list[SideSearch] = []
    for side in request.suite.sides:
        name = side.settings_of or side.name
        if side.settings_of in names or name in [searched.side for searched in found]:
            continue
        config, overrides, own = request.inputs(side)
        datasets: dict[str, str] = {}
        for other in map(absolute, request.search_on) if request.search_on else [None]:
            where = (request.root, config, overrides, own, request.device)
            label, data = trial_data(*where, other)
            taken = datasets.get(label, data) != data
            datasets[Path(data).name if taken else label] = data
        found += [SideSearch(request.root, name, config, overrides, datasets, request.device)]
    return found


def label_of(request: Request, runs: list[PlannedRun]) -> str:
    """The name of the comparison's data; "digits" if the suite sets the noise of each side."""
    first = request.suite.sides[0]
    label = f"val of {runs[0].label}" if first.dataset else runs[0].label
    return "digits" if first.noise is not None else label


def _record(request: Request, settings: Settings, trials: list[Trial], folder: Path) -> None:
    """Write comparison.json; it keeps the seeds of earlier calls."""
    looks: list[int] = []
    if (folder / COMPARISON_FILE).is_file():
        earlier = Comparison.read(folder)
        if len(earlier.seeds) > len(request.seeds):  # the earlier command does all runs
            request = replace(request, command=earlier.command)
        seeds = {*earlier.seeds, *request.seeds}
        request = replace(request, seeds=tuple(sorted(seeds)))
        looks = earlier.unplanned_looks
        before = [run for run in make_runs(request, settings) if run.seed in earlier.seeds]
        if len(seeds) > len(earlier.seeds) and all(run.is_done(request.table) for run in before):
            looks = [*looks, len(earlier.seeds)]
    elif all(run.is_done(request.table) for run in make_runs(request, settings)):
        looks = [len(request.seeds)]  # pairs and margin were chosen after all results
    runs, sides = make_runs(request, settings), []
    for side in request.suite.sides:
        own = [run for run in runs if run.side == side.name]
        folders = [f"../runs/{run.folder.name}" for run in own]
        shared = side.settings_of if side.settings_of in settings else ""
        sides += [ComparedSide(side.name, own[0].config, list(own[0].overrides), folders, shared)]
    Comparison(
        name=request.suite.name,
        question=request.suite.question,
        dataset=label_of(request, runs),
        budget=request.budget,
        seeds=list(request.seeds),
        sides=sides,
        pairs=list(request.suite.pairs),
        command=request.command,
        search=trials,
        margin=request.margin or 0.0,
        looks=list(request.looks or ()),
        unplanned_looks=looks,
    ).write(folder)
