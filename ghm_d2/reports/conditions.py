"""AP of each side in each condition, such as 20 % noise, for suites that repeat their sides."""

from matplotlib.figure import Figure

from ghm_d2.reports.document import Picture, Table
from ghm_d2.reports.drawing import (
    colour,
    draw,
    label_outside,
    legend,
    line_style,
    numbers,
    panels,
    plain,
)
from ghm_d2.reports.results import Row
from ghm_d2.reports.tables import ap_cells


def by_condition(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Condition -> method -> its row, where sides are named "METHOD, CONDITION".

    Empty unless at least two methods are there in at least two conditions, each in all of them.
    """
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        method, _, condition = row.side.name.rpartition(", ")
        found.setdefault(condition, {})[method] = row
    methods = [list(of_condition) for of_condition in found.values()]
    complete = len(found) > 1 and all(names == methods[0] for names in methods)
    return found if complete and len(methods[0]) > 1 else {}


def conditions_table(rows: list[Row]) -> Table:
    """A row a method, a column a condition: AP with half its interval, the best of each bold."""
    found = by_condition(rows)
    columns = [ap_cells(list(of_condition.values())) for of_condition in found.values()]
    methods = list(next(iter(found.values()), ()))
    cells = [(name, *(column[i] for column in columns)) for i, name in enumerate(methods)]
    return Table(("Method, AP", *found), cells)


def conditions_figure(rows: list[Row]) -> Picture | None:
    """AP against the condition, a line a method; None where nothing is repeated or finished."""
    found = by_condition(rows)
    if not any(row.ap["AP"].n for of_condition in found.values() for row in of_condition.values()):
        return None
    methods = list(next(iter(found.values())))

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
                linestyle=line_style(i),
                marker="o",
                markersize=5,
                capsize=3,
            )
        axis.set_xticks(range(len(found)), [plain(name, 24) for name in found])
        axis.set_ylim(bottom=0)
        legend(figure, [(name, colour(i), line_style(i)) for i, name in enumerate(methods)])
        label_outside(figure, "", "AP")
        return figure

    caption = "Mean over the seeds, with its 95% t interval; a run that diverged counts as 0."
    return draw("conditions.png", "AP by condition", caption, build)
