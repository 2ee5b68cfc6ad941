"""Lines of progress where stderr is no terminal."""

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


def test_items_have_an_eta_too(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    progress = _progress.PlainProgress()
    monkeypatch.setattr(progress, "message", lines.append)
    for _ in progress.track(range(10), "trying", 10):
        now[0] += 12
    assert lines[0] == "trying: 1/10  ETA 0:01:48"
