"""The figure of AP differences with their intervals, with one line per pair."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ghm_d2.reports.figures.drawing import COLOURS, draw, legend, numbers, plain
from ghm_d2.reports.page.document import Picture
from ghm_d2.reports.report import Report
from ghm_d2.reports.results import Difference
from ghm_d2.reports.statistics.verdicts import HIGHER, LOWER, SAME, UNDECIDED
from ghm_d2.reports.wording import signed

FILE = "differences.png"
LINE_INCHES = 0.27
MARGIN_SHADE = "#F0F2F4"
WORD_COLOURS = {HIGHER: COLOURS[0], LOWER: COLOURS[1], SAME: COLOURS[2], UNDECIDED: "#8A9199"}


def differences_figure(reports: Sequence[Report]) -> Picture | None:
    """Draw one panel per comparison; None if no pair has two seeds on both sides."""
    shown = []
    for report in reports:
        comparison = report.study.comparison
        title = f"{comparison.name} on {comparison.dataset}" if comparison.dataset else ""
        found = [d for d in report.differences if d.ap["AP"].low is not None]
        shown += [(title, found, comparison.margin)] if found else []
    if not shown:
        return None

    def build() -> Figure:
        lines = [len(found) + 1.2 for _, found, _ in shown]
        figure, grid = plt.subplots(
            len(shown),
            figsize=(9.6, LINE_INCHES * sum(lines) + 0.3 * len(shown) + 0.9),
            sharex=True,
            height_ratios=lines,
            squeeze=False,
            layout="constrained",
        )
        for axis, (title, found, margin) in zip(grid.flat, shown, strict=True):
            axis.set_title(plain(title, 70), fontsize=9, loc="left")
            _draw(axis, found, margin)
        figure.supxlabel("difference of AP", fontsize=10)
        words = dict.fromkeys(d.verdict.word for _, found, _ in shown for d in found)
        legend(figure, [(word, ink(word), "-") for word in words])
        return figure

    caption = (
        "Side minus reference, paired by seed, with the interval of the verdict. The shaded "
        "differences are practically none."
    )
    return draw(FILE, "Differences of AP", caption, build)


def ink(word: str) -> str:
    """The colour of a verdict."""
    return WORD_COLOURS.get(word, COLOURS[-1])


def _draw(axis: Axes, found: Sequence[Difference], margin: float) -> None:
    axis.axvspan(-margin, margin, color=MARGIN_SHADE, zorder=0)
    axis.axvline(0, color="#333333", linewidth=1)
    for y, d in enumerate(found):
        ap, colour = d.ap["AP"], ink(d.verdict.word)
        low, mean, high = numbers([ap.low, ap.mean, ap.high])
        axis.plot([low, high], [y, y], color=colour)
        axis.plot(mean, y, "o", color=colour)
        axis.text(mean, y - 0.2, signed(ap.mean), ha="center", va="bottom", fontsize=8)
    labels = [plain(f"{d.pair.side} - {d.pair.reference}", 62) for d in found]
    axis.set_yticks(range(len(found)), labels, fontsize=8)
    axis.set_ylim(len(found) - 0.5, -0.9)
    axis.grid(visible=False, axis="y")
