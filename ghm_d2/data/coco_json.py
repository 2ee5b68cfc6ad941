"""Reads COCO JSON whose names and boxes may be hostile; shared by all modules here."""

import gc
import json
import math
import re
import unicodedata
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

import msgspec

from ghm_d2.errors import DataError

SPLITS = ("train", "val", "test")
_SIMPLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # most file names match this


def load_json(path: str | Path) -> Any:
    """Parse a JSON file. Raises DataError with the file's name and, where known, the line."""
    return _parse(read_bytes(path), path)


def load_outline(data: bytes, path: str | Path) -> Any:
    """Parse a COCO JSON that may be large, for checks alone; raises as `load_json`.

    It keeps only the known fields of images and annotations, and leaves a segmentation as text,
    which `masks.decoded` parses. This takes an eighth of the time and the memory. A JSON of another
    form is parsed as by `load_json`.
    """
    try:
        return _OUTLINE.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return _parse(data, path)


class _Image(TypedDict, total=False):
    id: Any
    file_name: Any
    coco_url: Any
    neg_category_ids: Any
    width: Any
    height: Any


class _Annotation(TypedDict, total=False):
    id: Any
    image_id: Any
    category_id: Any
    bbox: Any
    area: Any
    iscrowd: Any
    ignore: Any
    segmentation: msgspec.Raw


class _Outline(TypedDict, total=False):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[dict]


_OUTLINE = msgspec.json.Decoder(_Outline)


@contextmanager
def collector_off():
    """Switch off Python's garbage collector: it would scan all parsed objects again and again.

    Parsed JSON has no cycles for it to find.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a file. Raises DataError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(text: bytes, path: str | Path) -> Any:
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, absurd numbers, absurd nesting
        raise DataError(f"{path}: not valid JSON ({str(error)[:80]})") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write compact JSON; the same value gives the same bytes.

    Raises: DataError if the value has NaN or infinities, or text that cannot be encoded.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        content = (text + "\n").encode()
    except ValueError as error:
        raise DataError(f"{path}: cannot be written ({error})") from None
    Path(path).write_bytes(content)


def by_image(entries: Iterable[dict]) -> dict[Any, list[dict]]:
    """Group annotations, or detections, by the id of their image."""
    found: dict[Any, list[dict]] = {}
    for entry in entries:
        found.setdefault(entry["image_id"], []).append(entry)
    return found


def image_root(folder: str | Path) -> Path:
    """The folder that `file_name` is relative to: FOLDER/images, or FOLDER if there is none."""
    images = Path(folder) / "images"
    return images if images.is_dir() else Path(folder)


def is_plain(text: str) -> bool:
    """Return whether a text can be encoded, and printed on one line.

    Control characters, line ends and surrogates (Python's form of file names that are not UTF-8)
    are not plain. The spaces and joiners that occur in people's file names are.
    """
    return text.isprintable() or not any(
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text
    )


def image_name(image: dict) -> Any:
    """Return an image's `file_name`; for LVIS the end of its `coco_url`, as in Detectron2."""
    address = image.get("coco_url")
    if isinstance(address, str) and ("file_name" not in image or "neg_category_ids" in image):
        return "/".join(address.split("/")[-2:])
    return image.get("file_name")


def safe_name(name: Any, where: str) -> str:
    """Return a relative image name in POSIX form. Raises DataError if it would leave its folder.

    Backslashes count as separators: data sets written on Windows have them.
    """
    if isinstance(name, str) and _SIMPLE.fullmatch(name):
        return name
    path = PurePosixPath(name.replace("\\", "/") if isinstance(name, str) else "")
    if not path.name.strip() or not is_plain(name):
        raise DataError(f"{where}: {name!r:.80} is not a valid name of an image file")
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise DataError(f"{where}: the image name {name!r:.120} points outside the image folder")
    return str(path)


def is_finite(value: Any) -> bool:
    """Return whether a parsed JSON value is a number between -1e9 and 1e9, ample for pixels.

    The value is compared and not converted, because an integer of a thousand digits has no float.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -1e9 < value < 1e9


def box_fault(box: Any) -> str | None:
    """Return why an [x, y, w, h] box in px is not valid, or None."""
    if not isinstance(box, list | tuple) or len(box) != 4:
        return "bbox is not a list of four numbers"
    if not all(map(is_finite, box)):
        if not all(isinstance(v, int | float) for v in box):
            return "bbox is not a list of four numbers"
        return f"box {show_box(box)} has values that are not finite"
    if box[2] <= 0 or box[3] <= 0:
        return f"box {show_box(box)} is inverted or empty"
    return None


def is_empty(box: Any) -> bool:
    """Return whether the only fault of a faulty box is that its width or height is 0."""
    return (
        isinstance(box, list | tuple)
        and len(box) == 4
        and all(is_finite(v) for v in box)
        and min(box[2], box[3]) == 0
    )


def iou(a: list[float], b: list[float]) -> float:
    """Return the intersection over union of two [x, y, w, h] boxes."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / (a[2] * a[3] + b[2] * b[3] - w * h)


def clipped(box: list[float], width: float, height: float) -> list[float] | None:
    """Return the part of an [x, y, w, h] box inside the image, or None if there is none."""
    x0, y0 = max(box[0], 0.0), max(box[1], 0.0)
    x1, y1 = min(box[0] + box[2], width), min(box[1] + box[3], height)
    return [x0, y0, x1 - x0, y1 - y0] if x1 > x0 and y1 > y0 else None


def outside(box: list[float], width: float, height: float) -> float:
    """Return by how many px an [x, y, w, h] box leaves the image; infinity if wholly outside."""
    x, y, w, h = box
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return math.inf
    return max(-x, -y, x + w - width, y + h - height, 0.0)


def hashable(value: Any) -> Any:
    """Return a dict key for any parsed JSON value: its `repr`, unless it is a number or text."""
    return value if isinstance(value, int | float | str) else repr(value)


def show_box(box) -> str:
    """Format a box for messages, as four short numbers."""
    return "[" + ", ".join(f"{v:.6g}" if is_finite(v) else f"{v!r:.12}" for v in box) + "]"
