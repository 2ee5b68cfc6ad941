"""Hooks of the trainer, beside Detectron2's own."""

import json
import signal
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter, get_event_storage

from ghm_d2.engine.describe import peak_memory_mb
from ghm_d2.engine.progress import Progress
from ghm_d2.engine.weights import GHMCheckpointer
from ghm_d2.losses import GradientDensity
from ghm_d2.records import finite_or_none

# Seconds are kept out of metrics.jsonl, so that two runs with one seed write the same file.
WALL_CLOCK = ("time", "data_time", "rank_data_time", "eta_seconds")
SMOOTHING_WINDOW = 20  # iterations; as in Detectron2's own writers


class MetricsWriter(EventWriter):
    """Appends one JSON object a written iteration: losses (medians of 20), lr, AP.

    Lines of iterations that a resumed run will run again are dropped first.
    """

    def __init__(self, file: Path, start_iter: int = 0):
        self._file = Path(file)
        drop_lines_from(self._file, start_iter)
        self._written = start_iter - 1

    def write(self) -> None:
        rows: dict[int, dict] = {}
        latest = get_event_storage().latest_with_smoothing_hint(SMOOTHING_WINDOW)
        for name, (value, iteration) in latest.items():
            if iteration > self._written and name not in WALL_CLOCK:
                row = rows.setdefault(iteration, {"iteration": iteration})
                row[name] = finite_or_none(value)  # JSON knows no infinity
        append_lines(self._file, [rows[i] for i in sorted(rows)])
        self._written = max([self._written, *rows])


class DensityLog(HookBase):
    """Appends the moving average of every gradient density, every `period` iterations."""

    def __init__(self, file: Path, model, period: int, start_iter: int = 0):
        self._densities = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, GradientDensity)
        ]
        self._file, self._period = Path(file), period
        if self._densities:
            drop_lines_from(self._file, start_iter)

    def after_step(self):
        if (self.trainer.iter + 1) % self._period:
            return
        rows = [
            {"iteration": self.trainer.iter, "density": name, "ema": module.ema.tolist()}
            for name, module in self._densities
        ]
        if rows:
            append_lines(self._file, rows)


class ProgressHook(HookBase):
    """Reports each iteration to a `Progress`, with the peak memory so far ("memory_mb")."""

    def __init__(self, progress: Progress, device: str):
        self._progress, self._device = progress, device

    def after_step(self):
        latest = self.trainer.storage.latest_with_smoothing_hint(SMOOTHING_WINDOW)
        scalars = {name: value for name, (value, _) in latest.items()}
        scalars["memory_mb"] = peak_memory_mb(self._device)
        self._progress.step(self.trainer.iter + 1, self.trainer.max_iter, scalars)


class BestCheckpoint:
    """Keeps the weights with the largest AP as model_best.pth.

    Unlike Detectron2's hook, it goes on from an earlier leg's best, and leaves the last
    checkpoint alone: a run resumes where it stopped, not where it was best.
    """

    def __init__(self, checkpointer: GHMCheckpointer, best: dict[str, float]):
        """
        Args:
            best: {"AP": ..., "iteration": ...} so far, or empty.
        """
        self._checkpointer = checkpointer
        self.best = dict(best)

    def update(self, ap: float | None, iteration: int) -> None:
        """Compare an evaluation after `iteration` steps with the best one so far."""
        if ap is not None and ap > self.best.get("AP", -1.0):
            self.best = {"AP": ap, "iteration": iteration}
            self._checkpointer.save_weights("model_best", iteration=iteration)


class StopOnSignal(HookBase):
    """SIGINT and SIGTERM end the training after the step under way; a second one at once.

    Raises KeyboardInterrupt.
    """

    def __init__(self, progress: Progress):
        self.requested = False
        self._progress = progress
        self._previous = {}

    def install(self) -> None:
        """Take the signals over, until the training ends."""
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._request)
            except ValueError:  # not in the main thread: the caller handles signals
                return

    def _request(self, _number, _frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._progress.message("stopping after this step; once more to stop at once")

    def after_step(self):
        if self.requested:
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def append_lines(file: Path, rows: list[dict]) -> None:
    """Append `rows` to `file` as JSON lines."""
    with open(file, "a", encoding="utf-8") as out:
        out.writelines(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows)


def drop_lines_from(file: Path, iteration: int) -> None:
    """Keep the JSON lines of earlier iterations than `iteration`; a cut-off line goes too."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["iteration"] < iteration:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    file.write_text("".join(kept), encoding="utf-8")
