"""Draws a contact sheet of images with their boxes, to check by eye."""

import colorsys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ghm_d2.data import images
from ghm_d2.data.checking.coco_faults import audit
from ghm_d2.data.coco_json import box_fault, hashable, image_name, load_json
from ghm_d2.data.masks import decode, mask_fault
from ghm_d2.errors import DataError

_PAPER, _INK = (24, 26, 30), (225, 227, 232)
_MARGIN, _CAPTION = 8, 18
_FILL = 110  # opacity of a mask, of 255


def colours(count: int) -> list[tuple[int, int, int]]:
    """Return `count` RGB colours; neighbours in the list are easy to tell apart."""
    golden = 0.61803398875  # steps of the golden ratio never fall on the same hue twice
    hues = [(0.02 + i * golden) % 1.0 for i in range(count)]
    return [
        tuple(round(255 * v) for v in colorsys.hsv_to_rgb(h, 0.85 if i % 2 else 0.65, 1.0))
        for i, h in enumerate(hues)
    ]


def contact_sheet(
    pictures: Iterable[tuple[Path, str, list[dict]]],
    names: dict[int, str],
    columns: int = 4,
    cell: int = 320,
) -> Image.Image:
    """Draw a grid of pictures.

    pictures: (file, caption, COCO annotations with `bbox` in px and `category_id`). A
        `segmentation` is filled in. Labels tell the kind of generated noise; boxes that it left
        out are drawn in white.
    names: category id -> name. cell: longest side of a picture on the sheet, in px.
    Raises: DataError naming the file of a picture that cannot be decoded.
    """
    palette = dict(zip(sorted(names), colours(len(names)), strict=True))
    tiles = [_tile(*picture, names, palette, cell) for picture in pictures]
    columns = max(1, min(columns, len(tiles)))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = Image.new(
        "RGB",
        (columns * (cell + _MARGIN) + _MARGIN, sum(heights) + _MARGIN * (len(rows) + 1)),
        _PAPER,
    )
    y = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for i, tile in enumerate(row):
            sheet.paste(tile, (_MARGIN + i * (cell + _MARGIN) + (cell - tile.width) // 2, y))
        y += height + _MARGIN
    return sheet


def pick(json_file: str, root: str, count: int) -> tuple[list, dict[int, str]]:
    """Return up to `count` images spread evenly over a split, and the category names, for a sheet.

    Annotations without a valid box are left out. Raises: DataError if the JSON is malformed.
    """
    coco = load_json(json_file)
    for problem in audit(coco, "test", json_file):
        if problem.kind in ("malformed", "categories", "file-name"):
            raise DataError(f"{json_file}: {problem.detail}")
    entries = coco["images"]
    step = max(1.0, len(entries) / count)
    chosen = [entries[int(i * step)] for i in range(min(count, len(entries)))]
    boxes: dict[int, list[dict]] = {image["id"]: [] for image in chosen}
    for annotation in coco.get("annotations", []) + coco.get("missing_annotations", []):
        image_id, category = annotation.get("image_id"), hashable(annotation.get("category_id"))
        if hashable(image_id) in boxes and not box_fault(annotation.get("bbox")):
            boxes[image_id].append(annotation | {"category_id": category})
    named = [(image_name(image), boxes[image["id"]]) for image in chosen]
    pictures = [(Path(root) / name, name, own) for name, own in named]
    return pictures, {c["id"]: c["name"] for c in coco["categories"]}


def _tile(path, caption, annotations, names, palette, cell) -> Image.Image:
    picture = Image.fromarray(images.read_image(path))
    scale = min(cell / max(picture.size), 4.0)
    original = picture.size
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    draw_boxes(picture, annotations, names, palette, original)
    font = ImageFont.load_default(11)
    tile = Image.new("RGB", (max(size[0], cell // 2), size[1] + _CAPTION), _PAPER)
    tile.paste(picture, ((tile.width - size[0]) // 2, 0))
    line = ImageDraw.Draw(tile)
    while caption and line.textlength(caption, font=font) > tile.width - 4:
        caption = caption[1:]  # the end of a path says more than its start
    line.text((tile.width / 2, size[1] + 3), caption, _INK, font, anchor="ma")
    return tile


def draw_boxes(
    picture: Image.Image,
    annotations: list[dict],
    names: dict[int, str],
    palette: dict[int, tuple[int, int, int]] | None = None,
    original: tuple[int, int] | None = None,
) -> None:
    """Draw annotations, or detections, into a picture.

    Args:
        annotations, names: as in `contact_sheet`.
        palette: colours by category id.
        original: (width, height) of the annotated picture, if this one is a resized copy.
    """
    palette = palette or dict(zip(sorted(names), colours(len(names)), strict=True))
    original, size = original or picture.size, picture.size
    scale = size[0] / original[0], size[1] / original[1]
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    labels = []
    for annotation in sorted(annotations, key=lambda a: -a["bbox"][2] * a["bbox"][3]):
        colour = palette.get(annotation["category_id"], _INK)
        if annotation.get("noise") == "missing":
            colour = (255, 255, 255)
        _fill(picture, annotation.get("segmentation"), original, colour)
        x, y, w, h = (v * scale[i % 2] for i, v in enumerate(annotation["bbox"]))
        # Never inverted, however small the box becomes; thin lines leave small objects visible.
        frame = (x, y, max(x, x + w - 1), max(y, y + h - 1))
        draw.rectangle(frame, outline=colour, width=2 if min(w, h) > 40 else 1)
        labels.append((_text(annotation, names), (x, y), colour))
    for label in labels:  # over all frames, to stay legible
        _label(draw, font, *label, size)


def _fill(picture: Image.Image, mask, original: tuple[int, int], colour) -> None:
    """Tint a mask; skip one that is not valid in an image of size `original`."""
    if not mask or mask_fault(mask, *original):
        return
    opacity = Image.fromarray(decode(mask, original[1], original[0]) * np.uint8(_FILL))
    picture.paste(colour, (0, 0), opacity.resize(picture.size, Image.Resampling.NEAREST))


def _label(draw, font, text, corner, colour, size) -> None:
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(0, corner[0]), max(0, size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 110
    draw.text((x + 2 - left, y + 2 - top), text, (255, 255, 255) if dark else (0, 0, 0), font)


def _text(annotation: dict, names: dict[int, str]) -> str:
    name = names.get(annotation["category_id"], "?")
    if "score" in annotation:  # a detection
        return f"{name} {annotation['score']:.2f}"
    kind = annotation.get("noise", "none")
    if kind == "class":
        return f"{name} (is {names.get(annotation.get('true_category_id'), '?')})"
    if annotation.get("iscrowd"):
        return f"{name} crowd"
    return name if kind == "none" else f"{name} {kind}"
