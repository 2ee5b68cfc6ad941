"""Figures of what the trained models detect and miss, from their runs' analyses (analysis.json)."""

import numpy as np
from matplotlib.figure import Figure

from ghm_d2.reports.figures.drawing import (
    MOST_LINES,
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
from ghm_d2.reports.results import NOISE_MEASURES, NOISE_WORDS, NoiseRow
from ghm_d2.reports.runs import SideRuns, part

PRECISION_AT = ("0.5", "0.75")
MOST_CLASSES = 12  # a confusion matrix of more has no room for its numbers


def precision_recall(sides: list[SideRuns]) -> Picture | None:
    """Draw precision against recall at two IoU thresholds; None without an analysis."""
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

    caption = "Mean over the classes and over the seeds that finished, on the validation images."
    return draw("precision_recall.png", "Precision and recall", caption, build)


def confusion(sides: list[SideRuns]) -> Picture | None:
    """Draw each side's confusion matrix; None without an analysis."""
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
        f"Number of boxes (first seed that finished) at IoU {iou:g}, with the lowest score that "
        "the panel names. The shade is the share of the row. The last column counts missed "
        "objects, the last row false detections."
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
    """Draw the weight of spoilt annotations against clean ones, a panel for each measure."""
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
        "Mean over the seeds that finished, with its 95% t interval. Left of the dashed line at 1, "
        "the loss reduces the gradient of spoilt annotations more than that of clean ones, "
        "compared with cross entropy or smooth L1."
    )
    return draw("noise.png", "Weight of spoilt annotations", caption, build)


def _draw_ratios(axis, y: int, row: NoiseRow) -> None:
    for k, kind in enumerate(NOISE_WORDS):
        value, at = row.ratio[kind], y + (k - 0.5) * 0.24
        if value.low is not None:
            axis.plot([value.low, value.high], [at, at], color=colour(k), linewidth=1.4)
        if value.n:
            axis.plot(value.mean, at, "os"[k], color=colour(k), markersize=6)
