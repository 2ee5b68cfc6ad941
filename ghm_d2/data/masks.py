"""Instance masks: COCO's `segmentation`, judged before any C code gets to see it.

It is a list of polygons, each x, y, x, y, ... in px; or an RLE, a run-length encoding {"size":
[height, width], "counts"}. The counts are pixels outside and inside the mask in turn, column by
column from the upper left corner: a list of them, or the text that pycocotools packs them into
(rleToString in its maskApi.c). Anything decoded here must have passed `mask_fault`: the C code
trusts sizes and lengths.
"""

import json
import math
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from ghm_d2.data.coco_json import is_finite

# Rasterising takes memory by an outline's length and by the image's size. No real image or outline
# comes near these: JPEG's longest side, 2**28 px in all, and a hundred times around the image.
_LONGEST_SIDE, _MOST_PIXELS, _TIMES_AROUND = 65535, 2**28, 100
_LONGEST_COUNT = 7  # characters of five bits
_POLYGONS = msgspec.json.Decoder(list[list[float]])


def encode(mask: np.ndarray) -> dict:
    """The RLE of a mask, (height, width) bool, its counts as ASCII text, ready for JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """The mask, (height, width) bool, of a segmentation without fault."""
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
        return f"segmentation in an image of {width} x {height} px, which is too large for masks"
    if isinstance(segmentation, dict):
        return _rle_fault(segmentation, width, height)
    if not isinstance(segmentation, list) or not segmentation:
        return "segmentation is neither a list of polygons nor an RLE"
    faults = (polygon_fault(polygon, width, height) for polygon in segmentation)
    return next((fault for fault in faults if fault), None)


def decoded(segmentation: Any) -> Any:
    """A segmentation as such, where `coco_json.load_outline` has left its text."""
    if not isinstance(segmentation, msgspec.Raw):
        return segmentation
    try:
        return _POLYGONS.decode(segmentation)  # much faster than anything else, and it is the rule
    except msgspec.MsgspecError:
        with suppress(RecursionError):
            return json.loads(bytes(segmentation))
    return True  # nested so deep that nobody can read it: no mask


def polygon_fault(polygon: Any, width: int, height: int) -> str | None:
    """Return why a polygon is not valid in an image of `width` x `height` px, or None.

    It may leave the image by the image's own size.
    """
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return "segmentation has a polygon that is not x, y of three points or more"
    # a data set has a million polygons: NumPy is for the few that may be at fault
    try:
        low, high, total = min(polygon), max(polygon), sum(polygon)
        finite = math.isfinite(total) and is_finite(low) and is_finite(high)
    except (TypeError, OverflowError):  # no numbers, or an integer of a thousand digits
        finite = False
    if not finite:
        return "segmentation has a polygon that is not of finite numbers"
    shorter, longest = min(width, height), _TIMES_AROUND * 2 * (width + height)
    if low < -shorter or high > 2 * shorter:
        for values, side in ((polygon[::2], width), (polygon[1::2], height)):
            if min(values) < -side or max(values) > 2 * side:
                return f"segmentation has a polygon far outside the image of {width} x {height}"
    if len(polygon) * (high - low) > longest:
        points = np.array(polygon, float)
        length = np.abs(points[2:] - points[:-2]).sum()
        if length > longest:
            return (
                f"segmentation has a polygon of {length:.6g} px, {_TIMES_AROUND} times the image's"
            )
    return None


def usable_polygons(segmentation: Any, width: int, height: int) -> list:
    """The parts of an object that can be used, where some of them cannot; empty where none can.

    Args:
        segmentation: one with a fault, of an image of `width` x `height` px.
    """
    if not isinstance(segmentation, list):
        return []
    usable = [polygon for polygon in segmentation if not polygon_fault(polygon, width, height)]
    return [] if mask_fault(usable, width, height) else usable


def loaded(segmentation: Any) -> Any:
    """Return a faulty mask as Detectron2's loader keeps it; it drops an object without a polygon.

    It looks at the lengths of polygons alone, and packs the counts of an RLE that are a list.

    Raises:
        TypeError, ValueError, KeyError, OverflowError: it fails.
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
        return f"segmentation is an RLE of size {size!r:.40}, not [{height}, {width}]"
    if isinstance(counts, list):
        runs = counts if all(type(run) is int for run in counts) else None
    else:
        runs = _unpack(counts)
    if not runs or min(runs) < 0 or sum(runs) != width * height:
        return "segmentation is an RLE whose counts do not add up to its size"
    return None if any(runs[1::2]) else "segmentation is an RLE without a pixel"


def _unpack(counts: Any) -> list[int] | None:
    """The run lengths that a text stands for; None where it is damaged.

    A character holds five bits and whether more follow, the lowest first. From the fourth on a
    number is the difference to the run of the same kind before it.
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
    """The RLE whose box is `to`, by the shift and the scaling that take `box` there.

    box, to: [x, y, w, h] in whole px, `box` tight around the mask; so is `to` around the result.
    """
    height, width = segmentation["size"]
    x, y, w, h = box
    mask = decode(segmentation, height, width)[y : y + h, x : x + w]
    x, y, new_w, new_h = to
    rows, columns = ((np.arange(n) + 0.5) * old // n for n, old in ((new_h, h), (new_w, w)))
    new = mask[np.ix_(rows.astype(int), columns.astype(int))]
    # where it shrinks no pixel of ink may get lost, or the box would not be tight
    ink_rows, ink_columns = np.nonzero(mask)
    new[
        ((ink_rows + 0.5) * new_h // h).astype(int), ((ink_columns + 0.5) * new_w // w).astype(int)
    ] = True
    whole = np.zeros((height, width), bool)
    whole[y : y + new_h, x : x + new_w] = new
    return encode(whole)
