"""Hooks of the trainer, beside Detectron2's own."""

import json
import math
import os
import signal
from pathlib import Path

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage

from ghm_d2.describe import peak_memory_mb
from ghm_d2.errors import DivergedError, OutputError
from ghm_d2.files import finite_or_none, write_text
from ghm_d2.losses import GradientDensity
from ghm_d2.modeling.weights.checkpointer import GHMCheckpointer
from ghm_d2.progress import Progress
from ghm_d2.run_folder import BEST_WEIGHTS
from ghm_d2.training.divergence import REMEDY, is_finite

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


class WholeStepsWriter(hooks.PeriodicWriter):
    """Detectron2's, but with nothing of its own at the end of a run that was cut short.

    What is written then depends on no interruption: a resumed run goes on with the same file as
    one that was left alone.
    """

    def after_step(self):
        latest = self.trainer.storage.latest()
        evaluated = latest.get("bbox/AP", (None, -1))[1] == self.trainer.iter
        if evaluated and (self.trainer.iter + 1) % self._period:
            for writer in self._writers:
                writer.write()
        super().after_step()

    def after_train(self):
        for writer in self._writers:
            if self.trainer.iter >= self.trainer.max_iter:
                writer.write()
            writer.close()


class LossHistory(HookBase):
    """What a resumed run needs to know of the losses before, as part of the checkpoint.

    The last values of each, of which metrics.jsonl has medians; and the mean and the variance of
    loss_cls in the second half of the training.
    """

    def __init__(self):
        self._recent: dict[str, list[list[float]]] = {}
        self._late = (0, 0.0, 0.0)  # values, their mean, sum of squared differences from it
        self._max_iter: int | None = None

    def before_train(self):
        storage = self.trainer.storage
        for name, values in self._recent.items():
            for value, iteration in values:
                storage.iter = iteration
                storage.put_scalar(name, value)
        storage.iter = self.trainer.start_iter
        if self._max_iter != self.trainer.max_iter:  # another second half
            started_late = 2 * self.trainer.start_iter > self.trainer.max_iter
            self._late = (-1, 0.0, 0.0) if started_late else (0, 0.0, 0.0)
            self._max_iter = self.trainer.max_iter

    def after_step(self):
        trainer = self.trainer
        value, iteration = trainer.storage.latest().get("loss_cls", (0.0, -1))
        if iteration != trainer.iter or 2 * iteration < trainer.max_iter or self._late[0] < 0:
            return
        count, mean, squares = self._late  # Welford's way, which needs no list
        step = value - mean
        mean += step / (count + 1)
        self._late = (count + 1, mean, squares + step * (value - mean))

    @property
    def variation(self) -> float | None:
        """Standard deviation over mean of loss_cls in the second half of the training.

        None where not all of it was seen, as where MAX_ITER was changed late.
        """
        count, mean, squares = self._late
        return math.sqrt(squares / (count - 1)) / mean if count > 1 and mean > 0 else None

    def state_dict(self):
        storage, done = self.trainer.storage, self.trainer.done
        recent = {}
        for name, smooth in storage.smoothing_hints().items():
            if smooth and name not in WALL_CLOCK:  # a step that was cut off may have left some
                values = [list(x) for x in storage.history(name).values() if x[1] < done]
                recent[name] = values[-SMOOTHING_WINDOW:]
        return {"recent": recent, "late": list(self._late), "max_iter": self._max_iter}

    def load_state_dict(self, state_dict):
        self._recent, self._late = state_dict["recent"], tuple(state_dict["late"])
        self._max_iter = state_dict["max_iter"]


class WholeRunsEvalHook(hooks.EvalHook):
    """Detectron2's, but without an evaluation, in which processes meet, after a failure."""

    def after_train(self):
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class FiniteCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's `PeriodicCheckpointer`, which writes no weights that are not finite."""

    def after_step(self):
        """Raises DivergedError instead of writing such weights."""
        iteration = self.trainer.iter
        due = (iteration + 1) % self.period == 0 or iteration >= self.max_iter - 1
        if due and not is_finite(self.trainer.detector):
            what = f"iteration {iteration}: the weights are not finite"
            raise DivergedError(f"{what}; the last checkpoint is of before; {REMEDY}", what)
        super().after_step()


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


class BestCheckpoint(HookBase):
    """Keeps the weights with the largest AP as model_best.pth.

    Unlike Detectron2's hook, it leaves the last checkpoint alone: a run resumes where it stopped,
    not where it was best.

    Attributes:
        best: {"AP": ..., "iteration": ...} so far, or empty; part of the checkpoint.
    """

    def __init__(self, checkpointer: GHMCheckpointer):
        self._checkpointer = checkpointer
        self.best: dict[str, float] = {}

    def update(self, ap: float | None, iteration: int) -> None:
        """Compare an evaluation after `iteration` steps with the best one so far."""
        better = ap is not None and ap > self.best.get("AP", -1.0)
        if better and is_finite(self._checkpointer.model):
            self.best = {"AP": ap, "iteration": iteration}
            self._checkpointer.save_weights(BEST_WEIGHTS.removesuffix(".pth"), iteration=iteration)

    def state_dict(self):
        return {"best": self.best}

    def load_state_dict(self, state_dict):
        self.best = dict(state_dict["best"])


class StopOnSignal(HookBase):
    """SIGINT and SIGTERM end the training after the step under way; a second one at once.

    All processes of a group end after the same step. Raises KeyboardInterrupt.
    """

    def __init__(self, progress: Progress):
        self._progress = progress
        self._previous = {}
        self.requested = False

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

    def before_step(self):
        self.trainer.stop_requested = self.requested

    def after_step(self):
        alone = comm.get_world_size() == 1
        if self.requested if alone else self.trainer.stopping:
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def append_lines(file: Path, rows: list[dict]) -> None:
    """Append `rows` to `file` as JSON lines; they are on the disk when this returns.

    Raises:
        OutputError: they cannot be written.
    """
    lines = [json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows]
    try:
        with open(file, "a", encoding="utf-8") as out:
            out.writelines(lines)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise OutputError.of(file, error) from error


def drop_lines_from(file: Path, iteration: int) -> None:
    """Keep the JSON lines of earlier iterations than `iteration`; a cut-off line goes too."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["iteration"] < iteration:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(file, "".join(kept))
