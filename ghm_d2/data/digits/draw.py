"""Pictures of the data set `digits`: background, clutter, then the digits on top of both."""

import math

import numpy as np
from PIL import Image, ImageDraw

_TRIES = 60  # places tried for a digit before it is left out
_GAP = 2  # px kept free between boxes
_GLYPH = 128  # px: the size at which a scan's outline is made
_INK = 0.4  # opacity from which a pixel counts as ink, and lies inside the box
_CONTRAST = 90  # least difference in grey levels between a digit and its background
_LUMA = np.array([0.299, 0.587, 0.114])


def scene(rng: np.random.Generator, spec, scans) -> tuple[np.ndarray, list[tuple]]:
    """Draw one image.

    scans: images (n, 8, 8) in 0..1, digits (n,), indices (n,).
    Returns: uint8 (height, width, 3), and for each digit (digit, scan index, (x, y, w, h), ink).
    The ink, (h, w) bool, marks the digit's pixels in its box.
    """
    low, high = spec.image_size
    width, height = (int(v) for v in rng.integers(low, high + 1, 2))
    canvas = _background(rng, width, height)
    canvas = _clutter(rng, canvas, int(rng.integers(spec.clutter[0], spec.clutter[1] + 1)), spec)
    count = int(rng.integers(spec.objects[0], spec.objects[1] + 1))
    # Large ones first: small ones still find room between them.
    sides = sorted(_log_uniform(rng, *spec.side, count), reverse=True)
    images, digits, indices = scans
    placed: list[tuple] = []
    for side in sides:
        pick = int(rng.integers(len(images)))
        alpha = _glyph(rng, images[pick], round(side))
        box = _place(rng, alpha, width, height, [p[2] for p in placed])
        if box is not None:
            _paint(rng, canvas, alpha, box)
            placed.append((int(digits[pick]), int(indices[pick]), box, alpha >= _INK))
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), placed


def _log_uniform(rng: np.random.Generator, low: float, high: float, count: int) -> np.ndarray:
    return np.exp(rng.uniform(math.log(low), math.log(high), count))


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Draw slow changes of colour, a texture of patches and a fine grain; float32 (h, w, 3)."""

    def noise(step: int, channels: int, spread: float) -> np.ndarray:
        grid = rng.normal(128, spread, (height // step + 2, width // step + 2, channels))
        small = np.clip(grid, 0, 255).astype(np.uint8)
        image = Image.fromarray(small[..., 0] if channels == 1 else small)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image, np.float32).reshape(height, width, channels) - 128

    canvas = rng.uniform(50, 205, 3).astype(np.float32) + noise(80, 3, 30)
    canvas = canvas + noise(int(rng.integers(4, 14)), 1, rng.uniform(4, 18))
    return canvas + rng.normal(0, rng.uniform(1, 5), (height, width, 1)).astype(np.float32)


def _clutter(rng: np.random.Generator, canvas: np.ndarray, count: int, spec) -> np.ndarray:
    """Draw `count` strokes, outlines, crosses, zigzags and patches: never a ring or a plain bar."""
    height, width = canvas.shape[:2]
    # Drawn at twice the size, so that the reduction smooths the edges; the background survives it.
    big = (width * 2, height * 2)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).resize(
        big, Image.Resampling.NEAREST
    )
    draw = ImageDraw.Draw(image)
    shapes = (_stroke, _polygon, _cross, _zigzag, _disc)
    for side in _log_uniform(rng, spec.side[0], spec.side[1] * 1.5, count):
        centre = rng.uniform((0, 0), big)
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        line = max(2, round(float(side * rng.uniform(0.06, 0.22))))
        shapes[int(rng.integers(len(shapes)))](rng, draw, centre, float(side), line, colour)
    return np.asarray(image.reduce(2), np.float32).copy()


def _turned(rng: np.random.Generator, points, centre, side: float) -> list[tuple[float, float]]:
    """Turn points (n, 2) in -1..1 at random, scale them by `side` and move them to `centre`."""
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return [tuple(p) for p in (np.asarray(points) @ turn * side + centre).tolist()]


def _stroke(rng, draw, centre, side, line, colour):
    """A long bent stroke (a quadratic Bezier curve)."""
    a, b, c = rng.uniform(-3, 3, (3, 2))
    t = np.linspace(0, 1, 24)[:, None]
    curve = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
    draw.line(_turned(rng, curve, centre, side), colour, max(2, line // 2), joint="curve")


def _polygon(rng, draw, centre, side, line, colour):
    corners = int(rng.integers(3, 6))
    angles = (np.arange(corners) + rng.uniform(-0.25, 0.25, corners)) * 2 * math.pi / corners
    points = _turned(rng, np.stack([np.cos(angles), np.sin(angles)], 1), centre, side)
    if rng.random() < 0.5:
        draw.polygon(points, fill=colour)
    else:
        draw.line([*points, points[0]], colour, line, joint="curve")


def _cross(rng, draw, centre, side, line, colour):
    points = _turned(rng, [(-1, 0), (1, 0), (0, -1), (0, 1)], centre, side)
    draw.line(points[:2], colour, line)
    draw.line(points[2:], colour, line)


def _zigzag(rng, draw, centre, side, line, colour):
    teeth = int(rng.integers(4, 8))
    x = np.linspace(-1, 1, teeth)
    y = np.where(np.arange(teeth) % 2, 0.5, -0.5) * rng.uniform(0.6, 1.4)
    draw.line(_turned(rng, np.stack([x, y], 1), centre, side), colour, line, joint="curve")


def _disc(rng, draw, centre, side, line, colour):
    rx, ry = side * rng.uniform(0.4, 1.0, 2)
    draw.ellipse((centre[0] - rx, centre[1] - ry, centre[0] + rx, centre[1] + ry), fill=colour)


def _glyph(rng: np.random.Generator, scan: np.ndarray, side: int) -> np.ndarray:
    """Return a scan (8, 8), slightly turned, as opacity (h, w) in 0..1; longer side `side` px."""
    grey = Image.fromarray((np.pad(scan, 3) * 255).astype(np.uint8))
    grey = grey.resize((_GLYPH, _GLYPH), Image.Resampling.BICUBIC)
    grey = grey.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC)
    # A steep ramp turns the blur of 8 x 8 scans into an outline; its place sets the pen's width.
    level = rng.uniform(0.36, 0.48)
    alpha = np.clip((np.asarray(grey, np.float32) / 255 - level) / 0.22 + 0.5, 0, 1)
    x, y, w, h = _tight(alpha)
    crop = Image.fromarray((alpha[y : y + h, x : x + w] * 255).astype(np.uint8))
    size = (max(3, round(w * side / max(w, h))), max(3, round(h * side / max(w, h))))
    # Pillow's Lanczos filter widens with the reduction, which avoids aliasing in small digits.
    small = np.asarray(crop.resize(size, Image.Resampling.LANCZOS), np.float32) / 255
    x, y, w, h = _tight(small)
    return small[y : y + h, x : x + w]


def _tight(alpha: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero((alpha >= _INK).any(1)), np.flatnonzero((alpha >= _INK).any(0))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1


def _place(rng: np.random.Generator, alpha: np.ndarray, width: int, height: int, taken: list):
    """Find a free place for the glyph: the box (x, y, w, h) of its whole array, or None."""
    h, w = alpha.shape
    if w >= width or h >= height:
        return None
    for _ in range(_TRIES):
        x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        if all(
            x + w + _GAP <= bx or bx + bw + _GAP <= x or y + h + _GAP <= by or by + bh + _GAP <= y
            for bx, by, bw, bh in taken
        ):
            return x, y, w, h
    return None


def _paint(rng: np.random.Generator, canvas: np.ndarray, alpha: np.ndarray, box: tuple) -> None:
    x, y, w, h = box
    region = canvas[y : y + h, x : x + w]
    behind = float((region @ _LUMA).mean())
    colour = rng.uniform(0, 255, 3)
    while abs(float(colour @ _LUMA) - behind) < _CONTRAST:
        colour = rng.uniform(0, 255, 3)
    opacity = (alpha * rng.uniform(0.85, 1.0))[..., None]
    region += (colour - region) * opacity
