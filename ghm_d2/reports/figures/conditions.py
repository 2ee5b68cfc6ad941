"""The figure of AP by condition, with the marks of each method."""

import re

from matplotlib.figure import Figure

from ghm_d2.reports.conditions import by_condition
from ghm_d2.reports.figures.drawing import (
    colour,
    draw,
    label_outside,
    legend,
    line_style,
    numbers,
    panels,
    plain,
)
from ghm_d2.reports.page.document import Picture
from ghm_d2.reports.results import Row


def conditions_figure(rows: list[Row]) -> Picture | None:
    """Draw AP of each method in each condition; None without conditions or without results."""
    found = by_condition(rows)
    if not any(row.ap["AP"].n for of_condition in found.values() for row in of_condition.values()):
        return None
    methods = list(next(iter(found.values())))
    on_a_scale = all(re.search(r"\d", name) for name in found)  # only then a line means something

    def build() -> Figure:
        figure, (axis,) = panels([""], height=3.4)
        for i, method in enumerate(methods):
            ap = [of_condition[method].ap["AP"] for of_condition in found.values()]
            at = [x + 0.05 * (i - (len(methods) - 1) / 2) for x in range(len(ap))]
            axis.errorbar(
                at,
                numbers(value.mean for value in ap),
                numbers(value.half_width for value in ap),
                color=colour(i),
                linestyle=line_style(i) if on_a_scale else "none",
                marker="o",
                markersize=5,
                capsize=3,
            )
        axis.set_xticks(range(len(found)), [plain(name, 24) for name in found])
        axis.set_ylim(bottom=0)
        legend(figure, [(name, colour(i), line_style(i)) for i, name in enumerate(methods)])
        label_outside(figure, "", "AP")
        return figure

    caption = "Mean over the seeds, with its 95% t interval. A run that diverged counts as 0."
    return draw("conditions.png", "AP by condition", caption, build)
