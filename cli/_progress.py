"""Progress on stderr: a live display on a terminal, plain lines elsewhere."""

import time
from contextlib import contextmanager
from datetime import timedelta

from rich.markup import escape

from ghm_d2.engine.progress import Progress

from ._console import err

PLAIN_SECONDS = 10  # between two plain lines


@contextmanager
def progress():
    """A `Progress` that suits where stderr goes."""
    if not err.is_terminal:
        yield PlainProgress()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichBar

    bar = RichBar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=err,
        transient=True,
    )
    with bar:
        yield LiveProgress(bar)


class LiveProgress(Progress):
    """On a terminal."""

    def __init__(self, bar):
        self._bar = bar
        self._training = None

    def step(self, iteration, max_iter, scalars):
        if self._training is None:
            self._training = self._bar.add_task("training", total=max_iter, figures="")
        self._bar.update(self._training, completed=iteration, figures=figures(scalars))

    def track(self, items, description, total):
        task = self._bar.add_task(escape(description), total=total, figures="")
        for item in items:
            yield item
            self._bar.advance(task)
        self._bar.remove_task(task)

    def message(self, text):
        self._bar.console.print(text, markup=False)


class PlainProgress(Progress):
    """Into a file or a pipe."""

    def __init__(self):
        self._last = time.monotonic()
        self._start = None

    def step(self, iteration, max_iter, scalars):
        self._start = self._start or (time.monotonic(), iteration - 1)
        if self._due() or iteration == max_iter:
            since, first = self._start
            left = (time.monotonic() - since) / (iteration - first) * (max_iter - iteration)
            eta = timedelta(seconds=round(left))
            self.message(f"iteration {iteration}/{max_iter}  ETA {eta}  {figures(scalars)}")

    def track(self, items, description, total):
        for done, item in enumerate(items):
            if done and self._due():
                self.message(f"{description}: {done}/{total}")
            yield item

    def message(self, text):
        err.print(text, markup=False, highlight=False)

    def _due(self) -> bool:
        if time.monotonic() - self._last < PLAIN_SECONDS:
            return False
        self._last = time.monotonic()
        return True


def figures(scalars: dict[str, float]) -> str:
    """Losses, learning rate, seconds an iteration and memory, in a line."""
    losses = [f"{k} {v:.3f}" for k, v in sorted(scalars.items()) if "loss" in k]
    parts = [*losses, f"lr {scalars['lr']:.1e}"] if "lr" in scalars else losses
    if "time" in scalars:
        parts.append(f"{scalars['time']:.3f} s/iter")
    if "memory_mb" in scalars:
        parts.append(f"{scalars['memory_mb']:.0f} MB")
    return "  ".join(parts)
