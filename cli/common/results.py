"""The results of a run or an evaluation, for a person."""

from .console import out, tell


def show_record(record, title: str) -> None:
    """Print a `RunRecord`'s table under `title`, a note on its objects, and the AP of each class.

    The classes are left out if they are many.
    """
    from ghm_d2.reports.tables import (
        MOST_CLASSES,
        objects_note,
        per_class,
        run_results,
        terminal_table,
    )

    out.print(terminal_table(run_results(record), title))
    if note := objects_note(record):
        tell(note)
    if 0 < len(record.per_class) <= MOST_CLASSES:
        out.print(terminal_table(per_class(record)))
