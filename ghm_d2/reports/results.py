"""A study's numbers: means of each side, paired differences, costs, and the weight of noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ghm_d2.records import AP_COLUMNS, LVIS_COLUMNS, Pair, RunRecord, SetFigures
from ghm_d2.reports.published import Published, published_for
from ghm_d2.reports.runs import SideRuns, part
from ghm_d2.reports.statistics.estimates import Estimate, estimate
from ghm_d2.reports.statistics.verdicts import Contrast, Verdict, judge
from ghm_d2.reports.study import Study

# kinds of spoilt annotations, and the gradients that are compared; keys as in analysis.json
NOISE_WORDS = {"class": "wrong class", "shift": "shifted box"}
NOISE_MEASURES = {"weight": "class score", "box_weight": "box"}


def _loss_share(record: RunRecord) -> float | None:
    if record.loss_ms is None or not record.s_per_iter:
        return None
    return record.loss_ms / 1000 / record.s_per_iter


COSTS: dict[str, Callable[[RunRecord], float | None]] = {
    "s_per_iter": lambda r: r.s_per_iter,
    "ms_per_image": lambda r: r.ms_per_image,
    "peak_memory_mb": lambda r: r.peak_memory_mb,
    "parameters": lambda r: r.parameters or None,
    "gflops": lambda r: r.gflops,
    "loss_ms": lambda r: r.loss_ms,
    "loss_share": _loss_share,  # of an iteration's time, 0..1
}


@dataclass(frozen=True)
class Row:
    """A side's results: an estimate for each AP figure and each of `COSTS`.

    Diverged runs count as AP 0 but not in the costs; other unfinished runs do not count at all.

    ap, published: box AP; keys `AP_COLUMNS`, and `LVIS_COLUMNS` if the data are LVIS. mask_ap: mask
    AP with the same keys; empty if the detector has no masks. other_sets: (ap, mask_ap) on each
    data set that was evaluated after the first.
    """

    side: SideRuns
    ap: dict[str, Estimate]
    cost: dict[str, Estimate]
    published: list[Published]
    mask_ap: dict[str, Estimate]
    other_sets: dict[str, tuple[dict[str, Estimate], dict[str, Estimate]]]


@dataclass(frozen=True)
class Difference:
    """A pair's paired differences for each of `AP_COLUMNS`, and the verdict on AP.

    seeds: the seeds that the verdict is based on. ap: AP has the verdict's own interval; the other
    columns have uncorrected 95% intervals over the seeds alone. finished: AP over those seeds that
    finished on both sides. diverged: how many runs of the side, and of the reference, diverged.
    """

    pair: Pair
    seeds: list[int]
    ap: dict[str, Estimate]
    verdict: Verdict
    finished: Estimate
    diverged: tuple[int, int]


@dataclass(frozen=True)
class NoiseRow:
    """The weights that a side's loss gives to annotations by kind; clean annotations are "none".

    measure: a key of `NOISE_MEASURES`. weight: effective gradient / plain gradient, over the seeds.
    ratio: weight / clean annotations' weight, over the seeds. boxes: number measured in one run.
    """

    side: SideRuns
    measure: str
    weight: dict[str, Estimate]
    ratio: dict[str, Estimate]
    boxes: dict[str, int]


def row_of(side: SideRuns) -> Row:
    """The results of `side`."""
    records = [run.record for run in side.finished if run.record]
    others = [figures for record in records for figures in record.other_sets]
    by_set = {f.dataset: [g for g in others if g.dataset == f.dataset] for f in others}
    lost = len(side.diverged)
    ap, mask_ap = _ap_of(records, lost)
    return Row(
        side,
        ap,
        {name: estimate(map(cost, records)) for name, cost in COSTS.items()},
        published_for(records[0]) if records else [],
        mask_ap,
        {name: _ap_of(figures, lost) for name, figures in by_set.items()},
    )


def _ap_of(
    found: Sequence[RunRecord | SetFigures], diverged: int
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Box AP and mask AP over the seeds; `diverged` further seeds count as AP 0."""
    boxes = [figures.metrics for figures in found]
    masks = [figures.mask_metrics for figures in found if figures.mask_metrics]
    lvis = [name for name in LVIS_COLUMNS if any(name in metrics for metrics in boxes)]
    columns = (*AP_COLUMNS, *lvis)

    def over_seeds(rows: list[dict], column: str) -> Estimate:
        known = [row[column] for row in rows if row.get(column) is not None]
        return estimate(known + [0.0] * diverged if known or not rows else [])

    return (
        {c: over_seeds(boxes, c) for c in columns},
        {c: over_seeds(masks, c) for c in columns if masks},
    )


def differences_of(study: Study) -> list[Difference]:
    """Return the difference between the sides of each pair of the comparison."""
    comparison, contrasts = study.comparison, []
    for pair in comparison.pairs:
        side, reference = study.side(pair.side), study.side(pair.reference)
        planned = {run.seed for run in reference.runs}
        seeds = [run.seed for run in side.runs if run.seed in planned]
        contrasts.append(Contrast(side.scores, reference.scores, seeds, pair.primary))
    verdicts = judge(contrasts, comparison.margin, comparison.looks)
    both = zip(comparison.pairs, contrasts, verdicts, strict=True)
    return [_difference_with(study, *one) for one in both]


def _difference_with(study: Study, pair: Pair, contrast: Contrast, verdict: Verdict) -> Difference:
    both = contrast.side.ap.keys() & contrast.reference.ap.keys()
    seeds = [seed for seed in contrast.seeds if seed in both][: verdict.effect.n]
    ap = {column: _difference(study, pair, column, seeds) for column in AP_COLUMNS[1:]}
    diverged = [study.side(name).diverged for name in (pair.side, pair.reference)]
    lost = {run.seed for runs in diverged for run in runs}
    finished = _difference(study, pair, "AP", [seed for seed in seeds if seed not in lost])
    counts = len(diverged[0]), len(diverged[1])
    return Difference(pair, seeds, {"AP": verdict.estimate} | ap, verdict, finished, counts)


def _difference(study: Study, pair: Pair, column: str, seeds: list[int]) -> Estimate:
    a, b = study.side(pair.side).values(column), study.side(pair.reference).values(column)
    return estimate(a[seed] - b[seed] for seed in seeds if seed in a and seed in b)


def noise_of(side: SideRuns) -> list[NoiseRow]:
    """Return a row for each measure of noise that the analyses of a side's runs have."""
    found = [noise for run in side.finished if (noise := part(run.analysis, "noise"))]
    kinds = ("none", *NOISE_WORDS)
    if not found:
        return []
    # the same in all runs, since a training's seed does not change the data
    boxes = {kind: part(found[0], kind, "boxes") or 0 for kind in kinds}
    rows = []
    for measure in NOISE_MEASURES:
        weight = {k: estimate(part(noise, k, measure) for noise in found) for k in kinds}
        ratio = {k: estimate(_ratio(noise, k, measure) for noise in found) for k in NOISE_WORDS}
        if any(value.n for value in ratio.values()):
            rows.append(NoiseRow(side, measure, weight, ratio, boxes))
    return rows


def _ratio(noise: dict, kind: str, measure: str) -> float | None:
    weight, clean = part(noise, kind, measure), part(noise, "none", measure)
    return weight / clean if weight is not None and clean else None
