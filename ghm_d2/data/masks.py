"""Instance masks: COCO's `segmentation`, checked before any C code reads it.

A segmentation is a list of polygons, each x, y, x, y, ... in px, or an RLE, a run-length encoding
{"size": [height, width], "counts"}. The counts are numbers of pixels outside and inside the mask in
turn, column by column from the upper left corner: a list, or the text into which pycocotools packs
them (rleToString in its maskApi.c). Anything decoded here must have passed `mask_fault`, because
the C code trusts sizes and lengths.
"""

import json
import math
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from ghm_d2.data.coco_json import is_finite

# Rasterising takes memory in proportion to the outline's length and the image's area. Real data are
# far below these limits: JPEG's longest side, 2**28 px in all, and 100 perimeters of the image.
_LONGEST_SIDE, _MOST_PIXELS, _TIMES_AROUND = 65535, 2**28, 100
_LONGEST_COUNT = 7  # characters of five bits in one count
_POLYGONS = msgspec.json.Decoder(list[list[float]])


def encode(mask: np.ndarray) -> dict:
    """Return the RLE of a mask, (height, width) bool, with its counts as ASCII text for JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Return the mask, (height, width) bool, of a segmentation without fault."""
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    return coco_mask.decode(rle).astype(bool)


def mask_fault(segmentation: Any, width: int, height: int) -> str | None:
    """Return why a segmentation is not valid in an image of `width` x `height` px, or None."""
    if max(width, height) > _LONGEST_SIDE or width * height > _MOST_PIXELS:
        return f"segmentation of an image of {width} x {height} px, which is too large for masks"
    if isinstance(segmentation, dict):
        return _rle_fault(segmentation, width, height)
    if not isinstance(segmentation, list) or not segmentation:
        return "segmentation is neither a list of polygons nor an RLE"
    faults = (polygon_fault(polygon, width, height) for polygon in segmentation)
    return next((fault for fault in faults if fault), None)


def decoded(segmentation: Any) -> Any:
    """Parse a segmentation that `coco_json.load_outline` left as text; return others unchanged."""
    if not isinstance(segmentation, msgspec.Raw):
        return segmentation
    try:
        return _POLYGONS.decode(segmentation)  # the usual form, and by far the fastest parser
    except msgspec.MsgspecError:
        with suppress(RecursionError):
            return json.loads(bytes(segmentation))
    return True  # nested too deeply to be parsed: True is no mask


def polygon_fault(polygon: Any, width: int, height: int) -> str | None:
    """Return why a polygon is not valid in an image of `width` x `height` px, or None.

    A polygon may leave the image on each side by up to the image's own width or height.
    """
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return "segmentation has a polygon that is not a list of x, y for at least three points"
    # a data set may have a million polygons: NumPy is only used for the few that may be faulty
    try:
        low, high, total = min(polygon), max(polygon), sum(polygon)
        finite = math.isfinite(total) and is_finite(low) and is_finite(high)
    except (TypeError, OverflowError):  # no numbers, or an integer of a thousand digits
        finite = False
    if not finite:
        return "segmentation has a polygon with values that are not finite numbers"
    shorter, longest = min(width, height), _TIMES_AROUND * 2 * (width + height)
    if low < -shorter or high > 2 * shorter:
        for values, side in ((polygon[::2], width), (polygon[1::2], height)):
            if min(values) < -side or max(values) > 2 * side:
                return f"segmentation has a polygon far outside the image of {width} x {height} px"
    if len(polygon) * (high - low) > longest:
        points = np.array(polygon, float)
        length = np.abs(points[2:] - points[:-2]).sum()
        if length > longest:
            return (
                f"segmentation has a polygon {length:.6g} px long, more than {_TIMES_AROUND} times "
                "the perimeter of the image"
            )
    return None


def usable_polygons(segmentation: Any, width: int, height: int) -> list:
    """Return the valid polygons of an object that has faulty ones too; empty if none is valid.

    Args:
        segmentation: a faulty segmentation in an image of `width` x `height` px.
    """
    if not isinstance(segmentation, list):
        return []
    usable = [polygon for polygon in segmentation if not polygon_fault(polygon, width, height)]
    return [] if mask_fault(usable, width, height) else usable


def loaded(segmentation: Any) -> Any:
    """Return what Detectron2's loader keeps of a faulty mask; if nothing, it drops the object.

    The loader checks only the lengths of polygons, and packs an RLE's counts if they are a list.

    Raises:
        TypeError, ValueError, KeyError, OverflowError: the loader would fail.
    """
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            height, width = segmentation["size"]
            runs = np.array(segmentation["counts"], np.uint32)
            if type(height) is not int or type(width) is not int or runs.ndim != 1:
                raise TypeError
        return segmentation
    return [p for p in segmentation if len(p) % 2 == 0 and len(p) >= 6]


def _rle_fault(rle: dict, width: int, height: int) -> str | None:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width] or any(type(side) is not int for side in size):
        return f"segmentation is an RLE of size {size!r:.40}, but the image has [{height}, {width}]"
    if isinstance(counts, list):
        runs = counts if all(type(run) is int for run in counts) else None
    else:
        runs = _unpack(counts)
    if not runs or min(runs) < 0 or sum(runs) != width * height:
        return "segmentation is an RLE whose counts do not add up to its size"
    return None if any(runs[1::2]) else "segmentation is an RLE that covers no pixel"


def _unpack(counts: Any) -> list[int] | None:
    """Return the run lengths packed into a text, or None if it is damaged.

    A character holds five bits, the lowest first, and a flag for more to follow. From the fourth
    number on, each is the difference from the previous run of the same kind.
    """
    try:
        text = counts.encode("ascii") if isinstance(counts, str) else counts
        codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    except (UnicodeEncodeError, TypeError, ValueError):
        return None
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    last = np.flatnonzero(codes & 32 == 0)
    first = np.append(0, last[:-1] + 1)
    lengths = last - first + 1
    if lengths.max() > _LONGEST_COUNT:
        return None
    place = 5 * (np.arange(len(codes)) - np.repeat(first, lengths))
    runs = np.add.reduceat((codes & 31) << place, first)
    runs -= np.where(codes[last] & 16, 1 << 5 * lengths, 0)  # the sign
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs.tolist()


def moved(segmentation: dict, box: list[int], to: list[int]) -> dict:
    """Return the RLE shifted and scaled so that `box` becomes `to`.

    box, to: [x, y, w, h] in whole px; `box` is tight around the mask, and `to` around the result.
    """
    height, width = segmentation["size"]
    x, y, w, h = box
    mask = decode(segmentation, height, width)[y : y + h, x : x + w]
    x, y, new_w, new_h = to
    rows, columns = ((np.arange(n) + 0.5) * old // n for n, old in ((new_h, h), (new_w, w)))
    new = mask[np.ix_(rows.astype(int), columns.astype(int))]
    # shrinking must not lose a pixel of ink, or the box would not be tight
    ink_rows, ink_columns = np.nonzero(mask)
    new[
        ((ink_rows + 0.5) * new_h // h).astype(int), ((ink_columns + 0.5) * new_w // w).astype(int)
    ] = True
    whole = np.zeros((height, width), bool)
    whole[y : y + new_h, x : x + new_w] = new
    return encode(whole)
