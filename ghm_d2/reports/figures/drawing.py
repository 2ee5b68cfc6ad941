"""The look of all figures: one style, one colour per side, panels, and PNGs without a date."""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # nothing here opens a window

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from PIL import Image

from ghm_d2.reports.page.document import Picture

# Okabe and Ito's palette, which the colour-blind can tell apart; their yellow is too pale on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":")
OTHERS = "#C8CDD2"  # the colour of other sides' lines in a side's panel
# with more sides than this, each gets its own panel, since their lines could not be told apart
MOST_LINES = 6
COLUMNS = 3
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figures everywhere
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E9EC",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "figure.dpi": 130,
    "figure.facecolor": "white",
}


def colour(index: int) -> str:
    """Return the colour of the side, or loss, with that index."""
    return COLOURS[index % len(COLOURS)]


def line_style(index: int) -> Any:
    """Return the style of a side's lines, so that sides of one colour differ."""
    return LINES[index // len(COLOURS) % len(LINES)]


def plain(text: str, longest: int = 44) -> str:
    """Return `text` on one line, shortened, with nothing that matplotlib would interpret."""
    line = " ".join(text.split())
    line = line if len(line) <= longest else line[: longest - 3] + "..."
    return line.replace("$", r"\$")


def draw(file: str, title: str, caption: str, build: Callable[[], Figure]) -> Picture:
    """The figure that `build` makes, as a PNG.

    The file's bytes depend only on the figure: the same records give the same file.
    """
    with matplotlib.rc_context(STYLE):
        figure = build()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # savefig would draw twice
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        plt.close(figure)
    # a palette instead of 32 bits per pixel: a third of the size, and no visible difference
    png = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(png, format="png", optimize=True)
    return Picture(file, png.getvalue(), title, caption)


def panels(
    titles: Sequence[str],
    *,
    height: float = 2.5,
    share_x: bool = True,
    share_y: bool = True,
    columns: int = COLUMNS,
) -> tuple[Figure, list[Axes]]:
    """A grid of panels, one per title; with one or two columns the panels are larger."""
    if len(titles) in (2, 4):
        columns = 2
    columns = max(1, min(columns, len(titles)))
    rows = math.ceil(len(titles) / columns)
    width = {1: 6.4, 2: 8.2}.get(columns, 9.6)
    if columns < 3:
        height = max(height, 3.4)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(width, height * rows + 0.4),
        sharex=share_x,
        sharey=share_y,
        squeeze=False,
        layout="constrained",
    )
    axes = list(grid.flat)
    for axis, title in zip(axes, titles, strict=False):
        longest = 34 if columns == 3 else 50
        axis.set_title(plain(title, longest), fontsize=8.5 if columns == 3 else 10)
        axis.tick_params(labelbottom=True)
    for axis in axes[len(titles) :]:
        axis.remove()
    return figure, axes[: len(titles)]


def side_panels(sides: Sequence[tuple[int, str]], height: float) -> tuple[Figure, Sequence[Axes]]:
    """An axis per side (index, name): the same for all, or a panel each if over MOST_LINES."""
    if len(sides) > MOST_LINES:
        return panels([name for _, name in sides], height=min(height, 2.5))
    figure, axes = panels([""], height=height)
    legend(figure, [(name, colour(i), line_style(i)) for i, name in sides])
    return figure, axes * len(sides)


def log_scale(axes: Sequence[Axes]) -> None:
    """Give the y axes one logarithmic scale, with ticks at 1, 2 and 5 if it spans under 1:1000."""
    for axis in axes:
        axis.set_yscale("log")
    low, high = axes[0].get_ylim()
    axes[0].yaxis.set_minor_locator(NullLocator())
    if low > 0 and high / low < 1000:
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def label_outside(figure: Figure, x: str, y: str) -> None:
    """Label the axes of all panels once."""
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)


def legend(figure: Figure, labels: Sequence[tuple[str, str, Any]]) -> None:
    """Add a legend of (text, colour, line style) above the panels."""
    handles = [Line2D([], [], color=c, linestyle=s) for _, c, s in labels]
    texts = [plain(text) for text, _, _ in labels]
    widest = max(map(len, texts), default=1)
    figure.legend(
        handles,
        texts,
        loc="outside upper center",
        ncols=max(1, min(len(texts), int(figure.get_figwidth() * 11 / (widest + 6)))),
        fontsize=9,
    )


def numbers(values: Iterable[float | None]) -> np.ndarray:
    """A float array; None becomes NaN, which is not drawn."""
    return np.array([np.nan if v is None else v for v in values], dtype=float)
