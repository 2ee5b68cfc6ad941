"""Progress on a terminal, and lines of progress elsewhere."""

import io
import sys

import pytest

from ghm_d2.cli.common import progress as _progress


@pytest.fixture
def told(monkeypatch):
    """Lines of a `PlainProgress` whose clock is `at(seconds)`."""
    now, lines = [0.0], []
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    progress = _progress.PlainProgress()
    monkeypatch.setattr(progress, "message", lines.append)

    def at(seconds, iteration, max_iter):
        now[0] = seconds
        progress.step(iteration, max_iter, {})
        return lines[-1] if lines else ""

    return at


def test_the_eta_follows_the_speed(told):
    assert told(0, 1, 100) == ""
    assert told(20, 11, 100).startswith("iteration 11/100  ETA 0:02:42")  # 11 took 20 s


def test_the_eta_of_a_second_count_is_its_own(told):
    told(0, 1, 100)
    told(1000, 100, 100)
    told(1001, 0, 50)
    assert told(1021, 9, 50).startswith("iteration 9/50  ETA 0:01:22")  # 10 took 20 s


def test_items_have_an_eta_too_which_leaves_out_the_slow_first_one(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    progress = _progress.PlainProgress()
    monkeypatch.setattr(progress, "message", lines.append)
    for item in progress.track(range(10), "trying", 10):
        now[0] += 12 if item else 600
    assert lines[:2] == ["trying: 1/10", "trying: 2/10  ETA 0:01:36"]


def test_items_of_unknown_or_underestimated_number_have_no_eta(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    progress = _progress.PlainProgress()
    monkeypatch.setattr(progress, "message", lines.append)
    for total in (0, 2):
        for _ in progress.track(range(4), "reading", total):
            now[0] += 12
    assert lines[:3] == ["reading: 1", "reading: 2", "reading: 3"]
    assert lines[3:] == ["reading: 1/2", "reading: 2/2", "reading: 3"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stderr", "environment", "live"),
    [
        (Terminal, {}, True),
        (Terminal, {"JPY_PARENT_PID": "1"}, False),  # a notebook would keep each state of the line
        (io.StringIO, {}, False),
        (io.StringIO, {"FORCE_COLOR": "1"}, False),  # the log of a CI run
    ],
)
def test_only_a_terminal_gets_a_live_display(monkeypatch, stderr, environment, live):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", stderr())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with _progress.progress() as shown:
        assert isinstance(shown, _progress.LiveProgress) == live
