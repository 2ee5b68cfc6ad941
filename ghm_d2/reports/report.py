"""A report's numbers and its answer, made from the files of its runs alone."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ghm_d2.reports import tables
from ghm_d2.reports.answer import answer, failure, outcome
from ghm_d2.reports.conditions import conditions_table
from ghm_d2.reports.page import document as documents
from ghm_d2.reports.page.document import Table
from ghm_d2.reports.results import Difference, NoiseRow, Row, differences_of, noise_of, row_of
from ghm_d2.reports.runs import checked
from ghm_d2.reports.statistics.estimates import Estimate
from ghm_d2.reports.statistics.steadiness import steadiness
from ghm_d2.reports.study import Study, read_study


@dataclass(frozen=True)
class Report:
    """The numbers of a study, what they say, and the files they were written to."""

    study: Study
    files: tuple[Path, ...] = ()  # report.html first

    @cached_property
    def rows(self) -> list[Row]:
        """One row per side."""
        return [row_of(side) for side in self.study.sides]

    @cached_property
    def differences(self) -> list[Difference]:
        """The differences in the order of the comparison's pairs."""
        return differences_of(self.study)

    @cached_property
    def noise(self) -> list[NoiseRow]:
        """A row for each side and measure, if the annotations record their own errors."""
        return checked(lambda: [row for side in self.study.sides for row in noise_of(side)])

    @cached_property
    def answer(self) -> list[str]:
        """The answer, in sentences; see `answer.answer`."""
        failures = [text for side in self.study.sides if (text := failure(side))]
        return answer(self.differences, failures, self.study.comparison)

    @property
    def shown_tables(self) -> list[Table]:
        """The tables that have rows: AP by condition, results by side, and differences by pair."""
        found = [
            conditions_table(self.rows),
            tables.results_table(self.rows),
            tables.differences_table(self.differences),
        ]
        return [table for table in found if table.rows]

    @property
    def markdown(self) -> str:
        """Return `shown_tables` as Markdown."""
        return "\n".join(map(documents.markdown_table, self.shown_tables))

    def to_json(self) -> dict[str, Any]:
        """Return the whole report as JSON-able data; AP in percent, null if undefined.

        Intervals have 95% confidence; those of a verdict on AP have 1 - "alpha".
        """
        comparison = self.study.comparison
        words = ["name", "question", "dataset", "budget", "seeds"]
        words += ["margin", "looks", "unplanned_looks"]
        return {name: getattr(comparison, name) for name in words} | {
            "planned": self.study.planned,
            "finished": self.study.planned - len(self.study.unfinished),
            "not_finished": [
                {"side": s.name, "seed": r.seed, "status": r.status, "outcome": outcome(r)}
                for s, r in self.study.unfinished
            ],
            "notes": self.study.notes,
            "answer": self.answer,
            "rows": [_row_json(row) for row in self.rows],
            "pairs": [_difference_json(d) for d in self.differences],
            "training": [{"side": s.name} | _estimates(steadiness(s)) for s in self.study.sides],
            "cost": [{"side": r.side.name} | _estimates(r.cost) for r in self.rows],
            "noise": [_noise_json(row) for row in self.noise],
            "files": [str(file) for file in self.files],
        }


def _estimates(values: dict[str, Estimate]) -> dict[str, Any]:
    return {name: asdict(value) for name, value in values.items()}


def _row_json(row: Row) -> dict[str, Any]:
    side = row.side
    other_sets = {
        name: _estimates(ap) | ({"masks": _estimates(masks)} if masks else {})
        for name, (ap, masks) in row.other_sets.items()
    }
    return {
        "side": side.name,
        "method": side.method,
        "network": side.network,
        "finished": len(side.finished),
        "planned": len(side.runs),
        **_estimates(row.ap),
        **({"masks": _estimates(row.mask_ap)} if row.mask_ap else {}),
        **({"other_sets": other_sets} if other_sets else {}),
        "published": [asdict(published) for published in row.published],
    }


def _difference_json(difference: Difference) -> dict[str, Any]:
    columns = {
        column: {"difference": value.mean, "low": value.low, "high": value.high, "n": value.n}
        for column, value in difference.ap.items()
    }
    verdict = difference.verdict
    effect, pooled = verdict.effect, verdict.pooled
    found = {
        "seeds": difference.seeds,
        **columns,
        "verdict": verdict.word,
        "p": verdict.p,
        "alpha": verdict.alpha,
        "se_seeds": effect.seeds.se if effect.seeds else None,
        "se_images": effect.images.se if effect.images else None,
        "unpaired": {"difference": pooled.mean, "low": pooled.low, "high": pooled.high},
    }
    return asdict(difference.pair) | found


def _noise_json(row: NoiseRow) -> dict[str, Any]:
    return {
        "side": row.side.name,
        "measure": row.measure,
        "boxes": row.boxes,
        "weight": _estimates(row.weight),
        "ratio": _estimates(row.ratio),
    }


def read_report(folder: Path) -> Report:
    """The numbers and the answer, without drawing or writing anything.

    Raises:
        DataError: see `study.read_study`.
    """
    return Report(read_study(folder))


def is_decided(folder: Path, look: int) -> bool:
    """Return whether a look at `look` seeds decided the primary pair of the comparison in `folder`.

    Raises:
        DataError: see `study.read_study`.
    """
    primary = [d for d in read_report(folder).differences if d.pair.primary]
    return any(d.verdict.p is not None and d.verdict.effect.n <= look for d in primary)


def by_data(reports: list[Report]) -> list[Table]:
    """Return a table for each comparison made on several data sets, with one row per data set.

    A row has the AP of each side, and the difference of the primary pair, else of the first pair.
    """
    rows: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for report in reports:
        comparison, sides = report.study.comparison, [row.side.name for row in report.rows]
        cells = [comparison.dataset, *tables.ap_cells(report.rows)]
        headers = ["AP on", *sides]
        for d in sorted(report.differences, key=lambda d: not d.pair.primary)[:1]:
            headers += [f"{d.pair.side} - {d.pair.reference}", "AP is"]
            cells += [tables.difference_with_interval(d.ap["AP"]), d.verdict.word]
        rows.setdefault((comparison.name, *headers), []).append(tuple(cells))
    return [Table(kind[1:], found) for kind, found in rows.items() if len(found) > 1]


def overview(reports: list[Report]) -> Table:
    """One row per pair of all comparisons: AP of both sides, and their difference."""
    rows: list[tuple[str, ...]] = []
    for report in reports:
        comparison = report.study.comparison
        name = f"{comparison.name} on {comparison.dataset}"
        name += ", settings searched" if comparison.search else ""
        ap = {row.side.name: tables.mean_with_n(row.ap["AP"], row.side) for row in report.rows}
        for d in report.differences:
            side, reference = d.pair.side, d.pair.reference
            difference = tables.difference_with_interval(d.ap["AP"])
            figures = (ap[side], ap[reference], difference, *tables.errors(d), str(len(d.seeds)))
            rows.append((name, side, reference, d.verdict.word, *figures))
    headers = ("Comparison", "Side", "Against", "AP is", "AP", "AP against", "Difference")
    return Table((*headers, *tables.ERROR_HEADERS, "Seeds"), rows, text_columns=4)
