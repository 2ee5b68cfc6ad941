"""Progress on stderr: a live display on a terminal, plain lines elsewhere."""

import os
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

from rich.markup import escape

from ghm_d2.errors import printable
from ghm_d2.progress import Progress

from .console import err
from .group import rank

PLAIN_SECONDS = 10  # between two plain lines


@contextmanager
def progress():
    """A `Progress` that suits stderr, a terminal or not; in a group only rank 0 shows it."""
    if rank() > 0:
        yield Progress()
        return
    if not _can_redraw():
        yield PlainProgress()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichBar
    from rich.table import Column

    bar = RichBar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        # the only column that shrinks on a narrow terminal
        TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True)),
        console=err,
        transient=True,
        expand=True,
    )
    with bar:
        yield LiveProgress(bar)


def _can_redraw() -> bool:
    """Return whether a line on stderr can be written over.

    A notebook keeps every state of the line. With FORCE_COLOR rich takes any file for a terminal.
    """
    return err.is_terminal and sys.stderr.isatty() and "JPY_PARENT_PID" not in os.environ


class LiveProgress(Progress):
    """A live display on a terminal."""

    def __init__(self, bar):
        self._bar = bar
        self._training = None

    def step(self, iteration, max_iter, scalars):
        if self._training is None:
            self._training = self._bar.add_task("training", total=max_iter, figures="")
        elif iteration < self._bar.tasks[self._training].completed:  # another count has begun
            self._bar.reset(self._training)
        self._bar.update(
            self._training, completed=iteration, total=max_iter, figures=figures(scalars)
        )

    def track(self, items, description, total):
        # None: unknown, so that there is no bar and no ETA
        task = self._bar.add_task(escape(description), total=total or None, figures="")
        for item in items:
            yield item
            self._bar.advance(task)
        self._bar.remove_task(task)

    def message(self, text):
        self._bar.console.print(printable(text), markup=False)


class PlainProgress(Progress):
    """Plain lines in a file or a pipe."""

    def __init__(self):
        self._last = time.monotonic()
        self._start = None
        self._latest = 0

    def step(self, iteration, max_iter, scalars):
        if self._start is None or iteration < self._latest:  # another count has begun
            self._start = (time.monotonic(), iteration - 1)
        self._latest = iteration
        if self._due() or iteration == max_iter:
            since, first = self._start
            left = (time.monotonic() - since) / (iteration - first) * (max_iter - iteration)
            eta = timedelta(seconds=round(left))
            self.message(f"iteration {iteration}/{max_iter}  ETA {eta}  {figures(scalars)}")

    def track(self, items, description, total):
        for done, item in enumerate(items):
            if done == 1:  # the first item often loads what the others need
                start = time.monotonic()
            if done and self._due():
                eta = ""
                if 1 < done < total:  # a video's number of frames may be unknown, or an estimate
                    left = (time.monotonic() - start) / (done - 1) * (total - done)
                    eta = f"  ETA {timedelta(seconds=round(left))}"
                of = f"/{total}" if done <= total else ""
                self.message(f"{description}: {done}{of}{eta}")
            yield item

    def message(self, text):
        err.print(printable(text), markup=False, highlight=False)

    def _due(self) -> bool:
        if time.monotonic() - self._last < PLAIN_SECONDS:
            return False
        self._last = time.monotonic()
        return True


def figures(scalars: dict[str, float]) -> str:
    """One line: total loss, seconds per iteration, memory, learning rate, and each loss.

    A narrow terminal cuts off the end.
    """
    shown = {
        "total_loss": "loss {:.3f}",
        "time": "{:.3f} s/iter",
        "memory_mb": "{:.0f} MB",
        "lr": "lr {:.1e}",
    }
    parts = [text.format(scalars[name]) for name, text in shown.items() if name in scalars]
    losses = (name for name in sorted(scalars) if name.startswith("loss_"))
    return "  ".join([*parts, *(f"{name} {scalars[name]:.3f}" for name in losses)])
