"""Figures of the trained models' gradients, and of how losses weight them (analysis.json)."""

from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure

from ghm_d2.reports.figures.drawing import (
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
    side_panels,
)
from ghm_d2.reports.page.document import Picture
from ghm_d2.reports.runs import SeedRun, SideRuns, part

PARTS = {"cls": "classification", "reg": "box regression"}
NORMS = {"cls": ("g", "samples"), "reg": ("g = |d| / sqrt(d² + mu²)", "box coordinates")}
# name of a loss in analysis.json -> its label, the plain loss first
LOSSES = {
    "cls": {"CE": "CE", "focal": "focal", "GHM-C": "GHM-C", "GHM-C robust": "GHM-C, robust"},
    "reg": {"SL1": "SL1", "ASL1": "ASL1", "GHM-R": "GHM-R", "GHM-R robust": "GHM-R, robust"},
}
LOSS_STYLES = ((COLOURS[6], ":"), (COLOURS[4], "--"), (COLOURS[2], "-"), (COLOURS[1], "-."))
WEIGHED_AGAINST = {
    "cls": ("g", "plain gradient norm g"),
    "reg": ("d", "distance |d|, in the head's own deltas"),
}
SHARED_BY = {"cls": "plain gradient norm g", "reg": "share of the coordinates with a smaller |d|"}
PLAIN_NORM = "g = |p - t| over sigmoids, 1 - p of the true class over a softmax."


def gradient_norms(sides: list[SideRuns], part_of: str) -> Picture | None:
    """Draw the distributions of gradient norms on the trained models; None without an analysis.

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
        "On the left are samples that the model is sure of, mostly background. On the right are "
        f"samples that it gets wrong, some of them because the annotation is wrong. {PLAIN_NORM}"
        if part_of == "cls"
        else "On the left are coordinates that fit, on the right outliers. d is in deltas without "
        f"the box coder's weights, {_mus(run for _, _, run in found)}."
    )
    title = f"Gradient norms, {PARTS[part_of]}"
    return draw(f"gradient_norms_{part_of}.png", title, caption, build)


def sample_weights(sides: list[SideRuns], part_of: str) -> Picture | None:
    """Draw a sample's weight under each loss against its gradient; None without an analysis."""
    found = _analysed(sides, "effective_gradient", part_of)
    if not found:
        return None
    losses, (x_key, x_label) = LOSSES[part_of], WEIGHED_AGAINST[part_of]
    plain_loss = next(iter(losses))

    def build() -> Figure:
        # the range of |d| depends on the units of each side's head
        figure, axes = panels([name for name, _ in found], share_x=part_of == "cls")
        for axis, (_, curves) in zip(axes, found, strict=True):
            axis.set_xlabel(_mu_words(curves), fontsize="small")
            slope = numbers(curves[plain_loss])
            for name, (shade, style) in zip(losses, LOSS_STYLES, strict=True):
                if name in curves:
                    effective = numbers(curves[name])
                    there = (slope > 0) & (effective > 0)
                    weight = np.where(there, effective / np.where(there, slope, 1), np.nan)
                    axis.plot(numbers(curves[x_key]), weight, color=shade, linestyle=style)
        log_scale(axes)
        _loss_legend(figure, losses, [curves for _, curves in found])
        label_outside(figure, x_label, f"weight, {plain_loss} = 1 (log scale)")
        return figure

    caption = (
        "The weight of a sample of these trained models (first seed that finished) under each loss "
        f"is its gradient divided by that of {plain_loss}, scaled so that the total weight of all "
        f"samples is that of {plain_loss}. "
    )
    caption += (
        "Published and robust GHM-C use the density of these samples over all feature levels, "
        "without a moving average; a training has one density per batch. With sigmoids the robust "
        "form has a density per class, and the mean over the samples of all classes is drawn. "
        f"Focal loss is that of background samples. {PLAIN_NORM}"
        if part_of == "cls"
        else "ASL1 and GHM-R have the mu of each side's configuration, even if the side does not "
        "use it. Robust GHM-R has mu from the data. Both use one density of these samples, without "
        "a moving average."
    )
    title = f"Weight of a sample, {PARTS[part_of]}"
    return draw(f"sample_weight_{part_of}.png", title, caption, build)


def gradient_shares(sides: list[SideRuns], part_of: str) -> Picture | None:
    """Draw how each loss divides the gradient among samples; None without an analysis."""
    found = _analysed(sides, "gradient_share", part_of)
    if not found:
        return None
    losses = LOSSES[part_of]

    def build() -> Figure:
        figure, axes = panels([name for name, _ in found])
        for axis, (_, shares) in zip(axes, found, strict=True):
            for name, (shade, style) in zip(losses, LOSS_STYLES, strict=True):
                if name in shares:
                    heights = 100 * numbers(shares[name])
                    axis.stairs(heights, shares["edges"], color=shade, linestyle=style)
            axis.set_ylim(bottom=0)
        _loss_legend(figure, losses, [shares for _, shares in found])
        label_outside(figure, SHARED_BY[part_of], "share of the gradient, %")
        return figure

    what = (
        "unit region (samples x weight x mean gradient norm)"
        if part_of == "cls"
        else "tenth of the box coordinates, from those that fit best to those that fit worst,"
    )
    caption = f"The share of each loss's gradient in a {what}; samples and losses are those above."
    title = f"Shares of the gradient, {PARTS[part_of]}"
    return draw(f"gradient_share_{part_of}.png", title, caption, build)


def _analysed(sides: list[SideRuns], *keys: str) -> list[tuple[str, dict]]:
    """Return (name of the side, this part of its analysis) for each side that has it."""
    return [(s.name, part(run.analysis, *keys)) for s in sides if (run := s.analysed(*keys))]


def _loss_legend(figure: Figure, losses: dict[str, str], found: list[dict]) -> None:
    """Add a legend of the losses that any analysis has; older ones lack the robust form."""
    styles = zip(losses.items(), LOSS_STYLES, strict=True)
    there = [
        (label, *style) for (name, label), style in styles if any(name in one for one in found)
    ]
    legend(figure, there)


def _mu_words(curves: dict) -> str:
    """Return mu in words, such as "mu 0.02, robust 0.31"; "" for classification."""
    if "mu" not in curves:
        return ""
    robust = f", robust {curves['mu_robust']:.2g}" if "mu_robust" in curves else ""
    return f"mu {curves['mu']:g}{robust}"


def _mus(runs: Iterable[SeedRun]) -> str:
    """Return the mu of the runs' gradient norms in words, such as "mu 0.02"."""
    found = {part(run.analysis, "gradient_norms", "reg", "mu") for run in runs}
    return f"mu {', '.join(f'{mu:g}' for mu in sorted(found))}"
