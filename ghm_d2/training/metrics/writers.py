"""Hooks and writers for metrics.jsonl, density.jsonl, TensorBoard and the progress display."""

import json
import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from detectron2.engine import HookBase, hooks
from detectron2.utils.events import EventWriter, TensorboardXWriter, get_event_storage
from torch import Tensor

from ghm_d2.describe import peak_memory_mb
from ghm_d2.errors import OutputError
from ghm_d2.files import finite_or_none, write_text
from ghm_d2.losses import GradientDensity
from ghm_d2.progress import Progress

# Seconds are kept out of metrics.jsonl, so that two runs with one seed write the same file.
WALL_CLOCK = ("time", "data_time", "rank_data_time", "eta_seconds")
SMOOTHING_WINDOW = 20  # iterations; as in Detectron2's own writers


class MetricsWriter(EventWriter):
    """Appends a JSON object for each logged iteration: losses (medians of 20), lr, AP.

    Lines of iterations that a resumed run will repeat are deleted first.
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
                row[name] = finite_or_none(value)  # JSON has no infinity
        append_lines(self._file, [rows[i] for i in sorted(rows)])
        self._written = max([self._written, *rows])


class EventsWriter(TensorboardXWriter):
    """Detectron2's TensorBoard writer, which turns failures of its thread into OutputError.

    Raises:
        OutputError: by `write` and `close`, if the thread could not write.
    """

    def __init__(self, folder: Path, start_iter: int = 0):
        super().__init__(str(folder), purge_step=start_iter)
        self._folder = folder

    def write(self) -> None:
        with self._output_errors():
            super().write()

    def close(self) -> None:
        with self._output_errors():
            super().close()

    @contextmanager
    def _output_errors(self):
        try:
            yield
        except OSError as error:
            raise OutputError.of(self._folder, error) from error


class WholeStepsWriter(hooks.PeriodicWriter):
    """Detectron2's `PeriodicWriter`, which writes nothing when a run is cut short.

    A resumed run therefore writes the same lines as an uninterrupted one. Evaluations between two
    periods are written too.
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


MOST_CLASSES = 10  # classes with their own rows in the log, so that it stays small


class DensityLog(HookBase):
    """Appends the state of every gradient density, every `period` iterations.

    "ema" is the moving average, one row per feature level, or one row summed over the classes.
    "counts" are the batch's samples in each unit region and "weights" their mean weight, up to a
    common factor. Both cover all levels together and have one row per class with its own density,
    at most MOST_CLASSES. Under SOLVER.ACCUMULATE they are those of the last part. "prior_count" is
    the number of samples added to each unit region (mean over classes) and "mu" that of GHM-R;
    both are logged only if they follow the data.
    """

    def __init__(self, file: Path, model, period: int, start_iter: int = 0):
        self._densities = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, GradientDensity)
        ]
        self._losses = {
            name: model.get_submodule(name.rpartition(".")[0]) for name, _ in self._densities
        }
        self._file, self._period = Path(file), period
        self._handles, self._seen = [], {}
        if self._densities:
            drop_lines_from(self._file, start_iter)

    def before_step(self):
        if (self.trainer.iter + 1) % self._period == 0:
            self._handles = [
                module.register_forward_hook(partial(self._see, name))
                for name, module in self._densities
            ]

    def after_step(self):
        for handle in self._handles:
            handle.remove()
        rows = []
        for name, module in self._densities if self._handles else ():
            ema = module.ema if module.num_classes == 1 else module.ema.sum(0, keepdim=True)
            row = {"iteration": self.trainer.iter, "density": name, "ema": ema.tolist()}
            rows.append(row | self._seen.pop(name, {}) | self._following(name, module))
        self._handles = []
        if rows:
            append_lines(self._file, rows)

    def _following(self, name: str, density: GradientDensity) -> dict:
        """Return "prior_count" and "mu", each only if it follows the data."""
        follows = density.prior and density.momentum  # else each batch has its own prior count
        found = {"prior_count": density.prior_count.mean().item()} if follows else {}
        mu = getattr(self._losses[name], "mu", None)
        return found | {"mu": mu.item()} if isinstance(mu, Tensor) else found

    def _see(self, name: str, density, arguments: tuple, weights: Tensor) -> None:
        shape = -1, density.num_classes, density.bins
        counts, weights = arguments[0].reshape(shape), weights.reshape(shape)
        total = counts.sum(0)[:MOST_CLASSES]
        mean = (counts * weights).sum(0)[:MOST_CLASSES] / total.clamp(min=1)
        rounded = [[float(f"{w:.6g}") for w in row] for row in mean.tolist()]
        self._seen[name] = {"counts": total.tolist(), "weights": rounded}


class ProgressHook(HookBase):
    """Reports each iteration to a `Progress`, with the peak memory so far ("memory_mb")."""

    def __init__(self, progress: Progress, device: str):
        self._progress, self._device = progress, device

    def after_step(self):
        latest = self.trainer.storage.latest_with_smoothing_hint(SMOOTHING_WINDOW)
        scalars = {name: value for name, (value, _) in latest.items()}
        scalars["memory_mb"] = peak_memory_mb(self._device)
        self._progress.step(self.trainer.iter + 1, self.trainer.max_iter, scalars)


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
    """Drop the JSON lines of `iteration` and later ones, and any line that is not whole."""
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
