"""`run_all`: trains the runs of a comparison, each as a job of a launcher."""

import json
import time
from collections import deque
from typing import Any

from ghm_d2.errors import EXIT_INTERRUPTED, DataError, RunError, UsageError
from ghm_d2.experiments.launch import BUSY, is_training
from ghm_d2.experiments.plan import PlannedRun
from ghm_d2.progress import Progress
from ghm_d2.records import RunRecord, RunsTable
from ghm_d2.run_folder import LOG_FILE, METRICS_FILE

POLL_SECONDS = 1.0
_TAIL_BYTES = 4096  # of metrics.jsonl: more than a row


def run_all(runs: list[PlannedRun], launcher, table: RunsTable, progress: Progress) -> None:
    """Train the runs that are not done; wait for those that another comparison is training."""
    watch = _Watch(runs, table, progress)
    waiting = deque(run for run in runs if run.key not in watch.done)
    jobs: list[tuple[PlannedRun, Any]] = []
    try:
        while waiting or jobs:
            for _ in range(len(waiting)):
                run = waiting.popleft()
                if run.is_done(table):  # another comparison trained it
                    watch.finished(run)
                elif launcher.free and not is_training(run):
                    jobs.append((run, launcher.start(run, table.file)))
                else:
                    waiting.append(run)
            time.sleep(POLL_SECONDS)
            for run, job in tuple(jobs):
                code = job.poll()
                if code is None:
                    continue
                jobs.remove((run, job))
                if code == BUSY:
                    waiting.append(run)
                elif code:
                    raise _failure(run, code)
                else:
                    watch.finished(run)
            watch.update([run for run, _ in jobs])
    finally:
        for _, job in jobs:
            job.stop()
        for _, job in jobs:
            job.wait()


def _failure(run: PlannedRun, code: int) -> BaseException:
    if code == EXIT_INTERRUPTED:
        return KeyboardInterrupt()
    kind = {UsageError.exit_code: UsageError, DataError.exit_code: DataError}.get(code, RunError)
    log = run.folder / LOG_FILE
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    said = [line for line in lines if line.startswith("error: ")] or [x for x in lines if x.strip()]
    last = said[-1] if said else "it left no message"
    how = f"was killed by signal {-code}" if code < 0 else "failed"
    return kind(
        f"{run.side}, seed {run.seed} {how}: {last.removeprefix('error: ')[:500]} "
        f"(see {log}); finished runs are kept, and the same command continues the comparison"
    )


class _Watch:
    """Reports the progress of all runs together, in iterations."""

    def __init__(self, runs: list[PlannedRun], table: RunsTable, progress: Progress):
        self._runs = {run.key: run for run in runs}
        self._progress = progress
        self.done = {key for key, run in self._runs.items() if run.is_done(table)}

    def finished(self, run: PlannedRun) -> None:
        """Report that a run has ended with a result."""
        self.done.add(run.key)
        record = RunRecord.read(run.folder)
        ap = record.metrics.get("AP")
        result = record.outcome or ("no AP" if ap is None else f"AP {ap:.1f}")
        self._progress.message(
            f"{len(self.done)} of {len(self._runs)} runs: {run.side}, seed {run.seed}: {result}"
        )

    def update(self, running: list[PlannedRun]) -> None:
        """Report the iterations of the finished runs and, from their folders, the running ones."""
        done = sum(self._runs[key].iterations for key in self.done)
        rows = [_last_row(run) for run in running]
        done += sum(row.get("iteration", 0) for row in rows)
        total = sum(run.iterations for run in self._runs.values())
        self._progress.step(done, total, rows[0] if rows else {})


def _last_row(run: PlannedRun) -> dict:
    """The last complete training row in a run's metrics.jsonl."""
    file = run.folder / METRICS_FILE
    if not file.is_file():
        return {}
    with open(file, "rb") as log:
        log.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        lines = log.read().splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
            if "total_loss" in row:
                return row
        except ValueError:
            continue
    return {}
