"""Checks a data set's JSON before training, without opening an image.

The results for large files are cached, so that the next training does not parse them again.
"""

import hashlib
import logging
import os
from functools import lru_cache
from pathlib import Path

import msgspec

from ghm_d2.data import coco_json, masks
from ghm_d2.data.checking import coco_faults
from ghm_d2.data.checking.coco_faults import MASKS_ALONE, audit
from ghm_d2.data.checking.memo import remembered
from ghm_d2.data.coco_json import collector_off, image_name, load_outline, read_bytes
from ghm_d2.errors import DataError, UsageError
from ghm_d2.files import content_hash

logger = logging.getLogger(__name__)

IMPORT_HINT = "`ghm data import SOURCE --output FOLDER` converts COCO, Pascal VOC or YOLO data"
REMEMBERED_BYTES = 2**24  # a smaller file is checked anew each time, in under half a second
_FATAL = ("malformed", "categories")  # kinds that are fatal if they concern the whole file
_NOT_MASKS = "set MODEL.MASK_ON False for a detector of boxes only (Faster R-CNN)"


class Finding(msgspec.Struct):
    """The faults of one kind: the first one in words, the uses that they stop, and their number.

    The words leave out the name of the JSON.
    """

    kind: str
    first: str
    stops: tuple[str, ...]
    count: int = 0


class Inspection(msgspec.Struct):
    """The categories, image names and faults of a COCO JSON.

    categories: (id, name) sorted by id, or None if the file is too malformed to tell.
    images: their names; empty if one of them leaves its folder.
    """

    findings: list[Finding]
    categories: list[tuple[int, str]] | None = None
    images: list[str] = []


def categories_of(json_file: str) -> list[tuple[int, str]]:
    """Return (id, name) of a COCO JSON's categories, sorted by id.

    Raises:
        DataError: the file is malformed.
    """
    found = inspect_json(json_file)
    if found.categories is None:
        raise DataError(f"{json_file}: {found.findings[0].first}")
    return found.categories


def validate_json(json_file: str, image_root: str, use: str = "training") -> list[str]:
    """Check a COCO JSON before it is used; see `registered_sets.validate`.

    Args:
        use: "training" or "evaluation".

    Returns:
        a line for each kind of fault that does not stop the use.

    Raises:
        DataError: one line with the first fault and the number of others.
    """
    found = inspect_json(json_file)
    faults = [finding for finding in found.findings if use in finding.stops]
    firsts = [finding.first for finding in faults]
    count = sum(finding.count for finding in faults)
    if gone := missing_images(found.images, image_root):
        firsts.append(f"no such image: {os.path.join(image_root, gone[0])}")
        count += len(gone)
    if firsts:
        more = f" (and {count - 1} more)" if count > 1 else ""
        raise DataError(
            f"{json_file}: {firsts[0]}{more}; `ghm data check` lists all faults, "
            "`ghm data import` writes a clean copy"
        )
    told = [finding for finding in found.findings if finding.kind not in MASKS_ALONE]
    return [f"{json_file}: {finding.first}{_more(finding.count)}" for finding in told]


def _more(count: int) -> str:
    return f" (and {count - 1} more like it; `ghm data check` lists them)" if count > 1 else ""


def missing_images(names: list[str], root: str) -> list[str]:
    """Return the names without a file below `root`; a folder of many images is listed only once."""
    below: dict[str, list[str]] = {}
    for name in names:
        below.setdefault(os.path.dirname(name), []).append(name)
    return [name for folder, held in below.items() for name in _missing(root, folder, held)]


def _missing(root: str, folder: str, names: list[str]) -> list[str]:
    present: set[str] = set()
    if len(names) > 100:
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                present = {entry.name for entry in entries if entry.is_file()}
        except OSError:
            pass
    left = [name for name in names if os.path.basename(name) not in present]
    return [name for name in left if not os.path.isfile(os.path.join(root, name))]


def require_masks(json_file: str, mask_format: str, use: str) -> None:
    """Check that Detectron2 can train or evaluate masks.

    Args:
        json_file: a COCO JSON.
        mask_format: the configuration's INPUT.MASK_FORMAT, "polygon" or "bitmask".
        use: "training" or "evaluation".

    Raises:
        DataError: an annotation has no mask or one that cannot be used; names the first.
        UsageError: training masks are RLEs, which "polygon" cannot use.
    """
    for finding in inspect_json(json_file).findings:
        if f"mask {use}" in finding.stops:
            remedy = "`ghm data import` writes a copy without such masks"
            if finding.kind == "no-mask":
                remedy = _NOT_MASKS
            raise DataError(f"{json_file}: {finding.first}; {remedy}")
        if f"{mask_format} {use}" in finding.stops:
            raise UsageError(
                f"{json_file}: {finding.first}, which INPUT.MASK_FORMAT {mask_format} cannot use; "
                "set INPUT.MASK_FORMAT bitmask"
            )


def inspect_json(json_file: str) -> Inspection:
    """Return the `Inspection` of a COCO JSON; a large file is parsed once per content and machine.

    Raises:
        DataError: the file cannot be read, or is not JSON.
    """
    return _inspect_json(json_file, stamp(json_file))


def stamp(path: str | Path) -> tuple[int, ...]:
    """Return a value that changes whenever the file is written.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {IMPORT_HINT}") from None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


@lru_cache(maxsize=16)
def _inspect_json(json_file: str, _stamp: tuple) -> Inspection:
    """Inspect a COCO JSON; cached until the file changes, because a training asks several times."""
    if os.path.getsize(json_file) < REMEMBERED_BYTES:
        return _check(read_bytes(json_file), json_file)

    def check() -> Inspection:
        logger.info("checking the annotations of %s (the result is cached)", json_file)
        data = read_bytes(json_file)
        if hashlib.sha256(data).hexdigest() != content:
            raise DataError(f"{json_file}: changed while it was read; run the command again")
        return _check(data, json_file)

    content = content_hash(json_file).hexdigest()
    # the checks are part of the key: another version may give another result
    files = (coco_faults.__file__, coco_json.__file__, masks.__file__, __file__)
    parts = (content, *(content_hash(file).hexdigest() for file in files))
    key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
    return remembered(key, Inspection, check)


@collector_off()
def _check(data: bytes, json_file: str) -> Inspection:
    coco = load_outline(data, json_file)
    found: dict[tuple, Finding] = {}
    for p in audit(coco, "", ""):
        first = f"{p}" if p.file else p.detail
        key = (p.kind, p.stops, bool(p.file))
        found.setdefault(key, Finding(p.kind, first, p.stops)).count += 1
    fatal = [f for (kind, _, of_image), f in found.items() if kind in _FATAL and not of_image]
    if fatal:
        return Inspection(fatal)
    categories = sorted((c["id"], c["name"]) for c in coco["categories"])
    if any(finding.kind == "file-name" for finding in found.values()):  # do not look it up
        return Inspection(list(found.values()), categories)
    return Inspection(list(found.values()), categories, [image_name(i) for i in coco["images"]])
