"""A data set's JSON judged before training, without opening an image."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ghm_d2.data.checking.coco_faults import Problem, audit
from ghm_d2.data.coco_json import load_json
from ghm_d2.errors import DataError, UsageError

IMPORT_HINT = "`ghm data import SOURCE --output FOLDER` makes it from COCO, Pascal VOC or YOLO"


def categories_of(json_file: str) -> list[tuple[int, str]]:
    """(id, name) of a COCO JSON's categories, sorted by id. Raises DataError where malformed."""
    parsed = _parse(json_file, stamp(json_file))
    if parsed.categories is None:
        raise DataError(parsed.findings[0].first)
    return parsed.categories


def validate_json(json_file: str, image_root: str, use: str = "training") -> list[str]:
    """Check a COCO JSON before it is used; see catalog.validate.

    Args:
        use: "training" or "evaluation".

    Returns:
        a line for each kind of fault that stops neither.

    Raises:
        DataError: the first fault and how many more, in one line.
    """
    parsed = _parse(json_file, stamp(json_file))
    paths = (os.path.join(image_root, name) for name in parsed.images)
    gone = [f"{json_file}: no such image: {path}" for path in paths if not os.path.isfile(path)]
    faults = [finding for finding in parsed.findings if use in finding.stops]
    firsts = [finding.first for finding in faults] + gone
    if firsts:
        count = sum(finding.count for finding in faults) + len(gone)
        more = f" (and {count - 1} more)" if count > 1 else ""
        raise DataError(
            f"{firsts[0]}{more}; `ghm data check` lists them, `ghm data import` cleans a copy"
        )
    return [finding.line for finding in parsed.findings]


def require_masks(json_file: str, mask_format: str) -> None:
    """Check that Detectron2 can train and evaluate masks.

    Args:
        json_file: a COCO JSON.
        mask_format: the configuration's INPUT.MASK_FORMAT, "polygon" or "bitmask".

    Raises:
        DataError: an annotation has none, or one that is not usable in all its parts: the first
            is named.
        UsageError: masks are RLEs, which "polygon" cannot take.
    """
    parsed = _parse(json_file, stamp(json_file))
    if parsed.without_mask:
        raise DataError(
            f"{json_file}: {parsed.without_mask} has no segmentation, which MODEL.MASK_ON needs; "
            "MODEL.MASK_ON False makes a Faster R-CNN of it, for boxes alone"
        )
    if parsed.bad_mask:
        raise DataError(f"{json_file}: {parsed.bad_mask}; `ghm data import` leaves such parts out")
    if parsed.with_rle and mask_format != "bitmask":
        raise UsageError(
            f"{json_file}: the mask of {parsed.with_rle} is an RLE, which needs "
            f"INPUT.MASK_FORMAT bitmask, not {mask_format}"
        )


def stamp(path: str | Path) -> tuple[int, int]:
    """When a file was written and how large it is. Raises DataError where it cannot be read."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {IMPORT_HINT}") from None
    return status.st_mtime_ns, status.st_size


@dataclass
class Finding:
    """The faults of one kind: the first one in words, what they stop, and how many there are."""

    kind: str
    first: str
    stops: tuple[str, ...]
    count: int = 0

    @property
    def line(self) -> str:
        """A line for a log."""
        more = f" (and {self.count - 1} more such; `ghm data check` lists them)"
        return self.first + (more if self.count > 1 else "")


class _Parsed(NamedTuple):
    """What a COCO JSON tells.

    categories: (id, name) sorted by id, or None where the file is too malformed to tell.
    images: their names. without_mask, with_rle: the first annotation of the kind and its image,
    in words; "" where there is none. bad_mask: the first mask with a fault in a part.
    """

    findings: list[Finding]
    categories: list[tuple[int, str]] | None = None
    images: tuple[str, ...] = ()
    without_mask: str = ""
    with_rle: str = ""
    bad_mask: str = ""


@lru_cache(maxsize=16)
def _parse(json_file: str, _stamp: tuple) -> _Parsed:
    """Cached by the file's time and size: parsing takes seconds."""
    coco = load_json(json_file)
    problems = list(audit(coco, "", json_file))
    fatal = [p for p in problems if p.kind in ("malformed", "categories") and p.file == json_file]
    if fatal:
        return _Parsed(_counted(fatal, json_file))
    findings = _counted(problems, json_file)
    categories = sorted((c["id"], c["name"]) for c in coco["categories"])
    if any(p.kind == "file-name" for p in problems):  # not to be looked up
        return _Parsed(findings, categories)
    images = tuple(image["file_name"] for image in coco["images"])
    masks = [(a, a.get("segmentation")) for a in coco.get("annotations", [])]
    without = next((a for a, mask in masks if not mask), None)
    # a crowd's is one in COCO itself, and Detectron2 leaves crowds out of the training
    rle = (a for a, mask in masks if isinstance(mask, dict) and not a.get("iscrowd"))
    bad = next((f"{p}" for p in problems if p.kind in ("bad-mask", "lost-mask")), "")
    firsts = _what(without, coco), _what(next(rle, None), coco), bad
    return _Parsed(findings, categories, images, *firsts)


def _counted(problems: list[Problem], json_file: str) -> list[Finding]:
    """A finding for each kind, in the order of the first ones."""
    found: dict[tuple, Finding] = {}
    for p in problems:
        first = f"{p}" if p.file == json_file else f"{json_file}: {p}"
        found.setdefault((p.kind, p.stops), Finding(p.kind, first, p.stops)).count += 1
    return list(found.values())


def _what(annotation: dict | None, coco: dict) -> str:
    if annotation is None:
        return ""
    image_id = annotation.get("image_id")
    name = next((i["file_name"] for i in coco["images"] if i.get("id") == image_id), "no image")
    return f"annotation {annotation.get('id')!r:.40} of {name}"
