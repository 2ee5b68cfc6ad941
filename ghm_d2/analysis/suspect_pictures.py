"""Draws suspect annotations, each beside the model's detection in its place."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ghm_d2.analysis.suspects import Suspect
from ghm_d2.data.images import read_image
from ghm_d2.data.show import draw_boxes

CELL = 200  # px, longest side of a half
_GAP = 4  # px between the halves
_ROUND = 0.75  # margin around the boxes, as a share of their longer side
_LEAST = 48  # px of the image that are shown at least
_ANNOTATED, _SEEN = (255, 176, 0), (64, 160, 255)


def side_by_side(suspect: Suspect, image: Path, names: dict[int, str]) -> Image.Image:
    """Draw the annotation on the left, and the detection that speaks against it on the right.

    Args:
        names: category id -> name.

    Raises:
        DataError: the image cannot be decoded.
    """
    picture = Image.fromarray(read_image(image))
    shown = [found for found in (suspect.annotation, suspect.proposal) if found]
    window = _window([found["bbox"] for found in shown], picture.size)
    scale = min(CELL / max(window[2] - window[0], window[3] - window[1]), 8.0)
    halves = []
    for found, colour in ((suspect.annotation, _ANNOTATED), (suspect.proposal, _SEEN)):
        # cut out and enlarged before drawing, so that lines stay thin
        size = [max(1, round(scale * (window[i + 2] - window[i]))) for i in (0, 1)]
        half = picture.resize(size, Image.Resampling.BICUBIC, box=window)
        if found:
            x, y, width, height = found["bbox"]
            moved = [scale * v for v in (x - window[0], y - window[1], width, height)]
            drawn = {k: v for k, v in found.items() if k in ("category_id", "score")}
            palette = {found["category_id"]: colour}
            draw_boxes(half, [drawn | {"bbox": moved}], names, palette)
        halves.append(half)
    width, height = halves[0].size
    both = Image.new("RGB", (2 * width + _GAP, height), (24, 26, 30))
    both.paste(halves[0], (0, 0))
    both.paste(halves[1], (width + _GAP, 0))
    return both


def as_jpeg(picture: Image.Image) -> bytes:
    """Return a picture as a JPEG file of quality 80."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _window(boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> tuple[float, ...]:
    """Return the part of the image to show, (x0, y0, x1, y1): the boxes with a margin."""
    left, top = (min(box[i] for box in boxes) for i in (0, 1))
    right, bottom = (max(box[i] + box[i + 2] for box in boxes) for i in (0, 1))
    longest = max(right - left, bottom - top)
    half = max(longest * (0.5 + _ROUND), _LEAST / 2)
    x, y = (left + right) / 2, (top + bottom) / 2
    x0, y0 = max(0.0, min(x - half, size[0] - 1)), max(0.0, min(y - half, size[1] - 1))
    return x0, y0, max(x0 + 1, min(size[0], x + half)), max(y0 + 1, min(size[1], y + half))


def sheet(pictures: Sequence[tuple[Image.Image, str]], columns: int = 4) -> Image.Image:
    """Arrange pictures of `side_by_side` in a grid, each with its caption."""
    width, height = 2 * CELL + _GAP, CELL + 18
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (width + 8) + 8, rows * (height + 8) + 8), (24, 26, 30))
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
    for i, (picture, caption) in enumerate(pictures):
        x, y = 8 + i % columns * (width + 8), 8 + i // columns * (height + 8)
        grid.paste(picture, (x + (width - picture.width) // 2, y))
        draw.text((x + width / 2, y + CELL + 2), caption, (225, 227, 232), font, anchor="ma")
    return grid
