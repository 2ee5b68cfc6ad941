"""A suite that repeats its sides in several conditions is shown by condition."""

from ghm_d2.reports.page.contents import document_of
from ghm_d2.reports.page.document import Best, Picture
from ghm_d2.reports.report import read_report

NOISE = {
    "focal, 0 % noise": (60.0, 61.0),
    "GHM, 0 % noise": (62.0, 62.0),
    "focal, 20 % noise": (40.0, 50.0),
    "GHM, 20 % noise": (30.0, 31.0),
}


def results_of(folder):
    return document_of(read_report(folder)).sections[0].blocks


def test_ap_is_shown_by_condition(comparison):
    table, picture, *_ = results_of(comparison(NOISE, [], analysis=False))
    assert table.headers == ("Method, AP", "0 % noise", "20 % noise")
    focal, ghm = table.rows
    assert focal[0] == "focal" and focal[1].startswith("60.5 ±")
    assert ghm[0] == "GHM" and ghm[2].startswith("30.5 ±")
    best = [[isinstance(cell, Best) for cell in row] for row in table.rows]
    assert best == [[False, False, True], [False, True, False]]
    assert isinstance(picture, Picture) and picture.file == "conditions.png"


def test_the_terminal_and_markdown_begin_with_it(comparison):
    report = read_report(comparison(NOISE, [], analysis=False))
    assert report.shown_tables[0].headers == ("Method, AP", "0 % noise", "20 % noise")
    assert report.markdown.startswith("| Method, AP | 0 % noise | 20 % noise |")


def test_only_a_complete_repetition_is(comparison):
    """A comma in one side's name is not a condition, nor are sides that differ from one to next."""
    for left_out in NOISE:
        sides = {name: ap for name, ap in NOISE.items() if name != left_out}
        first, *_ = results_of(comparison(sides, [], analysis=False))
        assert first.headers[0] == "Method"
    alone = {"focal, 0 % noise": (60.0,), "focal, 20 % noise": (40.0,)}
    assert results_of(comparison(alone, [], analysis=False))[0].headers[0] == "Method"


def test_runs_that_are_not_done_leave_gaps(comparison):
    waiting = dict.fromkeys(NOISE, (None, None))
    assert results_of(comparison(waiting, [], analysis=False))[0].headers[0] == "Method"
    begun = waiting | {"GHM, 20 % noise": (30.0, None)}
    table, *_ = results_of(comparison(begun, [], analysis=False))
    assert table.rows == [("focal", "-", "-"), ("GHM", "-", "30.0")]
