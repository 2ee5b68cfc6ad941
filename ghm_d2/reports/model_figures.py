"""Figures of the trained models, from the analyses of their runs (analysis.json)."""

from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure

from ghm_d2.reports.document import Picture
from ghm_d2.reports.drawing import (
    COLOURS,
    MOST_LINES,
    colour,
    draw,
    label_outside,
    legend,
    line_style,
    log_scale,
    numbers,
    panels,
    plain,
    side_panels,
)
from ghm_d2.reports.results import NOISE_MEASURES, NOISE_WORDS, NoiseRow
from ghm_d2.reports.runs import SeedRun, SideRuns, part

PARTS = {"cls": "classification", "reg": "box regression"}
NORMS = {"cls": ("g", "samples"), "reg": ("g = |d| / sqrt(d² + mu²)", "box coordinates")}
# the losses, the plain one first; and the key and label of what they are drawn against
CURVES = {
    "cls": (("CE", "focal", "GHM-C"), "g", "plain gradient norm g"),
    "reg": (("SL1", "ASL1", "GHM-R"), "d", "distance |d|, in the head's own deltas"),
}
LOSS_COLOURS, LOSS_LINES = (COLOURS[6], COLOURS[4], COLOURS[2]), (":", "--", "-")
PRECISION_AT = ("0.5", "0.75")
PLAIN_NORM = "g = |p - t| over sigmoids, 1 - p of the true class over a softmax."
MOST_CLASSES = 12  # a confusion matrix of more has no room for its numbers


def gradient_norms(sides: list[SideRuns], part_of: str) -> Picture | None:
    """How gradient norms are distributed on the trained models; None where no analysis says.

    Args:
        part_of: "cls" or "reg".
    """
    keys = "gradient_norms", part_of
    found = [(i, s, run) for i, s in enumerate(sides) if (run := s.analysed(*keys))]
    if not found:
        return None

    def build() -> Figure:
        figure, axes = side_panels([(i, side.name) for i, side, _ in found], height=2.4)
        for axis, (i, _, run) in zip(axes, found, strict=True):
            norms = part(run.analysis, *keys)
            counts = numbers(norms["counts"])
            counts[counts <= 0] = np.nan
            style = line_style(i) if len(found) <= MOST_LINES else "-"
            axis.stairs(counts, norms["edges"], color=colour(i), linestyle=style, linewidth=1.6)
        log_scale(axes)
        what, unit = NORMS[part_of]
        label_outside(figure, f"gradient norm {what}", f"{unit} (log scale)")
        return figure

    images = part(found[0][2].analysis, "gradient_norms", "images")
    of = f"on {images} training images" if images else "on training images"
    caption = f"The trained models (first seed that finished) {of}, without augmentation. " + (
        "Left: what the model is sure of, mostly background. Right: what it gets wrong, among "
        f"it the annotations that are themselves wrong. {PLAIN_NORM}"
        if part_of == "cls"
        else "Left: coordinates that fit. Right: outliers. d in deltas without the box coder's "
        f"weights, {_mus(run for _, _, run in found)}."
    )
    title = f"Gradient norms, {PARTS[part_of]}"
    return draw(f"gradient_norms_{part_of}.png", title, caption, build)


def effective_gradients(sides: list[SideRuns], part_of: str) -> Picture | None:
    """What each loss makes of the plain gradient; None where no analysis says."""
    keys = "effective_gradient", part_of
    found = [(s.name, part(run.analysis, *keys)) for s in sides if (run := s.analysed(*keys))]
    if not found:
        return None
    names, x_key, x_label = CURVES[part_of]

    def build() -> Figure:
        # how far |d| goes hangs on the head's units: a side's own
        titles = [name + (f", mu {c['mu']:g}" if "mu" in c else "") for name, c in found]
        figure, axes = panels(titles, share_x=part_of == "cls")
        for axis, (_, curves) in zip(axes, found, strict=True):
            for name, shade, style in zip(names, LOSS_COLOURS, LOSS_LINES, strict=True):
                if name in curves:
                    y = numbers(curves[name])
                    y[y <= 0] = np.nan
                    axis.plot(numbers(curves[x_key]), y, color=shade, linestyle=style)
        log_scale(axes)
        legend(figure, list(zip(names, LOSS_COLOURS, LOSS_LINES, strict=True)))
        label_outside(figure, x_label, "effective gradient (log scale)")
        return figure

    caption = (
        f"What each loss would make of one sample's gradient on these trained models (first seed "
        f"that finished), scaled so that all samples together weigh as with {names[0]}. Above "
        f"{names[0]}'s line a sample counts for more than with {names[0]}, below it for less. "
    )
    caption += (
        "GHM-C by one density of these samples, all feature levels together and without moving "
        "average, where a training has one a batch; focal loss of background samples. "
        f"{PLAIN_NORM}"
        if part_of == "cls"
        else "ASL1 and GHM-R with the mu of each side's configuration, used by it or not; GHM-R "
        "by one density of these samples, without moving average."
    )
    title = f"Effective gradient of a sample, {PARTS[part_of]}"
    return draw(f"effective_gradient_{part_of}.png", title, caption, build)


def _mus(runs: Iterable[SeedRun]) -> str:
    """Such as "mu 0.02"."""
    found = {part(run.analysis, "gradient_norms", "reg", "mu") for run in runs}
    return f"mu {', '.join(f'{mu:g}' for mu in sorted(found))}"


def precision_recall(sides: list[SideRuns]) -> Picture | None:
    """Precision against recall at two IoU thresholds; None where no analysis says."""
    found = []
    for i, side in enumerate(sides):
        curves = [c for run in side.finished if (c := part(run.analysis, "precision_recall"))]
        if curves:
            found.append((i, side, curves))
    if not found:
        return None

    def build() -> Figure:
        figure, axes = panels([f"IoU {float(iou):.2f}" for iou in PRECISION_AT])
        many = len(found) > MOST_LINES
        for axis, iou in zip(axes, PRECISION_AT, strict=True):
            for i, _, curves in found:
                mean = np.mean([numbers(c["precision"][iou]) for c in curves], axis=0)
                axis.plot(
                    numbers(curves[0]["recall"]),
                    mean,
                    color=colour(i),
                    linestyle=line_style(i),
                    linewidth=1.1 if many else 1.7,
                )
            axis.set(xlim=(0, 1), ylim=(0, 1.02))
        legend(figure, [(side.name, colour(i), line_style(i)) for i, side, _ in found])
        label_outside(figure, "recall", "precision")
        return figure

    caption = "Mean over classes and over the seeds that finished, on the validation images."
    return draw("precision_recall.png", "Precision and recall", caption, build)


def confusion(sides: list[SideRuns]) -> Picture | None:
    """What was taken for what, a panel a side; None where no analysis says."""
    found = [(s, run) for s in sides if (run := s.analysed("confusion", "matrix"))]
    if not found:
        return None
    classes = max(len(part(run.analysis, "confusion", "labels")) for _, run in found)

    def build() -> Figure:
        columns = 3 if classes <= 6 else 2
        height = 3.2 if columns == 3 else 4.2
        titles = [side.name for side, _ in found]
        figure, axes = panels(titles, height=height, share_x=False, share_y=False, columns=columns)
        for axis, (_, run) in zip(axes, found, strict=True):
            data = run.analysis["confusion"]
            _draw_confusion(axis, data)
            axis.set_xlabel(f"scores from {data['score']:.2f}", fontsize=8)
        label_outside(figure, "predicted", "truth")
        return figure

    iou = found[0][1].analysis["confusion"]["iou"]
    caption = (
        f"Number of boxes (first seed that finished) at IoU {iou:g}, from the score on that the "
        "panel names; shade: share of the row. Last column: missed. Last row: detections of what "
        "is not there."
    )
    return draw("confusion.png", "Confusion matrix", caption, build)


def _draw_confusion(axis, data: dict) -> None:
    matrix = np.stack([numbers(row) for row in data["matrix"]])
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axis.grid(False)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    labels = [plain(label, 14) for label in data["labels"]]
    if len(labels) > MOST_CLASSES:
        axis.set(xticks=[], yticks=[])
        return
    axis.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=8)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    for (row, column), count in np.ndenumerate(matrix):
        ink = "white" if share[row, column] > 0.55 else "#333333"
        axis.text(column, row, f"{count:.0f}", ha="center", va="center", color=ink, fontsize=8)


def noise_weights(rows: list[NoiseRow]) -> Picture:
    """How much spoilt annotations weigh against clean ones; a panel for each measure."""
    names = list(dict.fromkeys(row.side.name for row in rows))
    measures = [m for m in NOISE_MEASURES if any(row.measure == m for row in rows)]

    def build() -> Figure:
        titles = [f"gradient of the {NOISE_MEASURES[measure]}" for measure in measures]
        figure, axes = panels(titles, height=0.45 * len(names) + 1.6, share_x=False)
        for axis, measure in zip(axes, measures, strict=True):
            for row in rows:
                if row.measure == measure:
                    _draw_ratios(axis, names.index(row.side.name), row)
            axis.axvline(1, color="#333333", linewidth=1, linestyle="--")
        axes[0].set_yticks(range(len(names)), [plain(name, 34) for name in names])
        axes[0].set_ylim(len(names) - 0.5, -0.5)
        figure.supxlabel("weight of spoilt annotations / weight of clean ones", fontsize=10)
        legend(figure, [(words, colour(k), "-") for k, words in enumerate(NOISE_WORDS.values())])
        return figure

    caption = (
        "Mean over the seeds that finished, with its 95% t interval. Left of 1 (dashed): the loss "
        "makes less of the plain gradient (cross entropy's, smooth L1's) of spoilt annotations "
        "than of that of clean ones."
    )
    return draw("noise.png", "Weight of spoilt annotations", caption, build)


def _draw_ratios(axis, y: int, row: NoiseRow) -> None:
    for k, kind in enumerate(NOISE_WORDS):
        value, at = row.ratio[kind], y + (k - 0.5) * 0.24
        if value.low is not None:
            axis.plot([value.low, value.high], [at, at], color=colour(k), linewidth=1.4)
        if value.n:
            axis.plot(value.mean, at, "os"[k], color=colour(k), markersize=6)
