"""AP of each side in each condition, such as 20 % noise, for suites that repeat their sides."""

from ghm_d2.reports.page.document import Table
from ghm_d2.reports.results import Row
from ghm_d2.reports.tables import ap_cells


def by_condition(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Return condition -> method -> row for sides that are named "METHOD, CONDITION".

    Empty unless there are at least two conditions, all with the same two or more methods.
    """
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        method, _, condition = row.side.name.rpartition(", ")
        found.setdefault(condition, {})[method] = row
    methods = [list(of_condition) for of_condition in found.values()]
    complete = len(found) > 1 and all(names == methods[0] for names in methods)
    return found if complete and len(methods[0]) > 1 else {}


def conditions_table(rows: list[Row]) -> Table:
    """One row per method, one column per condition: AP with half its interval, the best in bold."""
    found = by_condition(rows)
    columns = [ap_cells(list(of_condition.values())) for of_condition in found.values()]
    methods = list(next(iter(found.values()), ()))
    cells = [(name, *(column[i] for column in columns)) for i, name in enumerate(methods)]
    return Table(("Method, AP", *found), cells)
