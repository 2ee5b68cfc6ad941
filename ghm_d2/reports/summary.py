"""The numbers of a study and what they say, for the report, the terminal and machines."""

from dataclasses import asdict, dataclass
from functools import cached_property

from ghm_d2.reports.answer import answer, failure, outcome
from ghm_d2.reports.results import (
    Difference,
    NoiseRow,
    Row,
    difference_of,
    noise_of,
    row_of,
)
from ghm_d2.reports.runs import checked
from ghm_d2.reports.study import Study


@dataclass(frozen=True)
class Summary:
    """The numbers of a study, and what they say."""

    study: Study

    @cached_property
    def rows(self) -> list[Row]:
        """A row a side."""
        return [row_of(side) for side in self.study.sides]

    @cached_property
    def differences(self) -> list[Difference]:
        """In the order of the comparison's pairs."""
        return [difference_of(self.study, pair) for pair in self.study.comparison.pairs]

    @cached_property
    def noise(self) -> list[NoiseRow]:
        """A row for each measure of each side whose annotations say what is wrong with them."""
        return checked(lambda: [row for side in self.study.sides for row in noise_of(side)])

    @cached_property
    def failures(self) -> list[str]:
        """For each side with runs that ended without a result: how many, and how they ended."""
        return [text for side in self.study.sides if (text := failure(side))]

    @cached_property
    def verdict(self) -> list[str]:
        """See `answer.answer`."""
        return answer(self.differences, self.failures)

    def to_json(self) -> dict:
        """All of it as JSON-able data; AP in percent, intervals of 95%, null where undefined."""
        comparison = self.study.comparison
        return {
            "name": comparison.name,
            "question": comparison.question,
            "dataset": comparison.dataset,
            "budget": comparison.budget,
            "seeds": comparison.seeds,
            "planned": self.study.planned,
            "finished": self.study.planned - len(self.study.unfinished),
            "not_finished": [
                {"side": s.name, "seed": r.seed, "status": r.status, "outcome": outcome(r)}
                for s, r in self.study.unfinished
            ],
            "notes": self.study.notes,
            "verdict": self.verdict,
            "rows": [_row_json(row) for row in self.rows],
            "pairs": [_difference_json(d) for d in self.differences],
            "cost": [
                {"side": row.side.name} | {k: asdict(v) for k, v in row.cost.items()}
                for row in self.rows
            ],
            "noise": [_noise_json(row) for row in self.noise],
        }


def _row_json(row: Row) -> dict:
    side = row.side
    return {
        "side": side.name,
        "method": side.method,
        "network": side.network,
        "finished": len(side.finished),
        "planned": len(side.runs),
        **{column: asdict(value) for column, value in row.ap.items()},
        **({"masks": {c: asdict(v) for c, v in row.mask_ap.items()}} if row.mask_ap else {}),
        "published": [asdict(published) for published in row.published],
    }


def _difference_json(difference: Difference) -> dict:
    columns = {}
    for column, value in difference.ap.items():
        columns[column] = {
            "difference": value.mean,
            "low": value.low,
            "high": value.high,
            "n": value.n,
        }
    return {
        **asdict(difference.pair),
        "seeds": difference.seeds,
        **columns,
        "verdict": difference.verdict,
    }


def _noise_json(row: NoiseRow) -> dict:
    return {
        "side": row.side.name,
        "measure": row.measure,
        "boxes": row.boxes,
        "weight": {kind: asdict(value) for kind, value in row.weight.items()},
        "ratio": {kind: asdict(value) for kind, value in row.ratio.items()},
    }
