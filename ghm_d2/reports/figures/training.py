"""Figures of how the sides trained: AP, the classification loss, the density's moving average."""

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ghm_d2.records import FINISHED
from ghm_d2.reports.figures.drawing import (
    COLUMNS,
    MOST_LINES,
    OTHERS,
    colour,
    draw,
    label_outside,
    line_style,
    log_scale,
    numbers,
    panels,
    side_panels,
)
from ghm_d2.reports.page.document import Picture
from ghm_d2.reports.runs import SideRuns, kind_of

Curve = tuple[list[int], list[float]]


def learning_curves(sides: list[SideRuns]) -> Picture | None:
    """AP against iteration; None if no run was evaluated."""
    caption = (
        "The line is the mean over the seeds that finished. The band reaches from the lowest to "
        "the highest of them; it is not a confidence interval."
    )
    title = "AP on the validation images"
    return _curves(sides, "bbox/AP", "AP", "learning.png", title, caption)


def loss_curves(sides: list[SideRuns]) -> Picture | None:
    """The classification loss against iteration; None if none was written."""
    caption = (
        "loss_cls on a logarithmic scale; each point is the median of 20 iterations, line and band "
        "are as above. The losses are different functions: compare how they fall and how steady "
        "they are, not their values."
    )
    title = "Classification loss in training"
    return _curves(sides, "loss_cls", "loss_cls", "loss.png", title, caption, log=True)


def gradient_ratios(sides: list[SideRuns]) -> Picture | None:
    """Classification gradient / box gradient against iteration; None if none was measured."""
    caption = (
        "Ratio of the L2 norms of the classification gradient and the box gradient at the features "
        "that both heads read, for one batch about every 20 iterations, on a logarithmic scale; "
        "line and band are as above. At 1 both gradients are equally large there."
    )
    title = "Gradient of classification over that of boxes"
    key = "grad_ratio_cls_box"
    return _curves(sides, key, "ratio of norms", "gradient_ratio.png", title, caption, log=True)


def _curves(
    sides: list[SideRuns],
    key: str,
    label: str,
    file: str,
    title: str,
    caption: str,
    log: bool = False,
) -> Picture | None:
    found = [(i, side.name, _by_seed(side, key)) for i, side in enumerate(sides)]
    found = [(i, name, curves) for i, name, curves in found if curves]
    if not found:
        return None
    if any(status != FINISHED for *_, curves in found for status, _ in curves):
        caption += " Thin dotted lines are runs that did not finish."

    def build() -> Figure:
        figure, axes = side_panels([(i, name) for i, name, _ in found], height=3.8)
        for axis, (i, _, curves) in zip(axes, found, strict=True):
            if len(found) > MOST_LINES:
                for _, _, others in found:
                    steps, _, mean, _ = _spread(others)
                    axis.plot(steps, mean, color=OTHERS, linewidth=0.8)
            _draw_side(axis, curves, colour(i), "-" if len(found) > MOST_LINES else line_style(i))
        if log:
            log_scale(axes)
        label_outside(figure, "iteration", label)
        return figure

    if len(found) > MOST_LINES:
        caption += " Grey lines are the means of the other sides."
    return draw(file, title, caption, build)


def _by_seed(side: SideRuns, key: str) -> list[tuple[str, Curve]]:
    """Return (status, curve) of each run that has a curve of `key`."""
    curves = [(run.status, run.curve(key)) for run in side.runs if run.record]
    return [(status, curve) for status, curve in curves if curve[0]]


def _draw_side(axis, curves: list[tuple[str, Curve]], shade: str, style: str) -> None:
    steps, low, mean, high = _spread(curves)
    marker = "o" if len(steps) < 20 else None
    axis.fill_between(steps, low, high, color=shade, alpha=0.18, linewidth=0)
    axis.plot(steps, mean, color=shade, linestyle=style, marker=marker, markersize=3.5)
    for status, curve in curves:
        if status != FINISHED:
            axis.plot(*curve, color=shade, linestyle=":", linewidth=1)


def _spread(curves: list[tuple[str, Curve]]) -> tuple[list[int], list, list, list]:
    """Iterations, and the lowest, mean and highest value of the finished runs at each of them."""
    values: dict[int, list[float]] = {}
    for status, (steps, points) in curves:
        if status == FINISHED:
            for step, point in zip(steps, points, strict=True):
                values.setdefault(step, []).append(point)
    steps = sorted(values)
    rows = [values[step] for step in steps]
    return steps, [min(r) for r in rows], [sum(r) / len(r) for r in rows], [max(r) for r in rows]


def density_figures(sides: list[SideRuns]) -> list[Picture]:
    """The moving average over time of each side with a GHM loss; one picture per kind of loss."""
    kinds: dict[str, list[tuple[str, np.ndarray, np.ndarray]]] = {}
    for side in sides:
        rows_of_side = next((run.density for run in side.finished if run.density), [])
        for name in dict.fromkeys(row["density"] for row in rows_of_side):
            rows = [row for row in rows_of_side if row["density"] == name]
            steps = np.array([row["iteration"] + 1 for row in rows])
            # (T, M); one moving average per feature level is summed up
            ema = np.stack([np.nansum([numbers(level) for level in r["ema"]], 0) for r in rows])
            kind, where = kind_of(name)
            if ema.any():  # momentum 0 averages nothing
                kinds.setdefault(kind, []).append((side.name + where, steps, ema))
    return [_density_figure(kind, kinds[kind]) for kind in sorted(kinds)]


def _density_figure(kind: str, found: list[tuple[str, np.ndarray, np.ndarray]]) -> Picture:
    top = max(ema.max() for _, _, ema in found)
    lowest = max(top / 1e6, 0.1)
    norm = LogNorm(lowest, max(top, 1.0))

    def build() -> Figure:
        figure, axes = panels([name for name, _, _ in found])
        for axis, (_, steps, ema) in zip(axes, found, strict=True):
            axis.grid(False)
            edges = np.concatenate([[0], steps])
            bins = np.linspace(0, 1, ema.shape[1] + 1)
            shown = np.ma.masked_less(ema.T, lowest)
            drawn = axis.pcolormesh(edges, bins, shown, norm=norm, cmap="viridis")
        height = 20 * -(-len(found) // COLUMNS)
        label = "samples in the unit region, moving average"
        bar = figure.colorbar(drawn, ax=axes, label=label, pad=0.02, aspect=height)
        bar.minorticks_off()
        label_outside(figure, "iteration", "gradient norm")
        return figure

    caption = (
        f"{kind}: the moving average of the number of samples by gradient norm, after the last "
        "feature level of each batch, from the first iteration (left) to the last, for the first "
        "seed that finished. White means none, or too few to draw. The brighter a row, the less "
        "each of its samples weighs."
    )
    slug = "".join(c if c.isascii() and c.isalnum() else "_" for c in kind.lower())
    title = f"The density's moving average over time, {kind}"
    return draw(f"density_{slug}.png", title, caption, build)
