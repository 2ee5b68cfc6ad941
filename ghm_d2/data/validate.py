"""A data set's JSON judged before training, without opening an image."""

import os
from functools import lru_cache
from pathlib import Path

from ghm_d2.data.audit import audit
from ghm_d2.data.coco_json import load_json
from ghm_d2.errors import DataError

IMPORT_HINT = "`ghm data import SOURCE --output FOLDER` makes it from COCO, Pascal VOC or YOLO"


def categories_of(json_file: str) -> list[tuple[int, str]]:
    """(id, name) of a COCO JSON's categories, sorted by id. Raises DataError where malformed."""
    faults, categories, _ = _parse(json_file, stamp(json_file))
    if categories is None:
        raise DataError(faults[0])
    return categories


def validate_json(json_file: str, image_root: str) -> None:
    """Raise DataError with the first fault and how many more, in one line; see catalog.validate."""
    faults, _, names = _parse(json_file, stamp(json_file))
    paths = (os.path.join(image_root, name) for name in names)
    gone = [f"{json_file}: no such image: {path}" for path in paths if not os.path.isfile(path)]
    faults = faults + gone
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise DataError(
            f"{faults[0]}{more}; `ghm data check` lists them, `ghm data import` cleans a copy"
        )


def stamp(path: str | Path) -> tuple[int, int]:
    """When a file was written and how large it is. Raises DataError where it cannot be read."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {IMPORT_HINT}") from None
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=16)
def _parse(json_file: str, _stamp: tuple) -> tuple[list[str], list | None, list[str]]:
    """(faults, categories, image names), cached by the file's time and size: parsing takes seconds.

    categories: (id, name) sorted by id, or None where the file is too malformed to tell.
    """
    split = Path(json_file).stem
    coco = load_json(json_file)
    problems = [p for p in audit(coco, split, json_file) if p.severity == "error"]
    fatal = [p for p in problems if p.kind in ("malformed", "categories") and p.file == json_file]
    if fatal:
        return [f"{p}" for p in fatal], None, []
    faults = [f"{p}" if p.file == json_file else f"{json_file}: {p}" for p in problems]
    categories = sorted((c["id"], c["name"]) for c in coco["categories"])
    if any(p.kind == "file-name" for p in problems):  # not to be looked up
        return faults, categories, []
    return faults, categories, [image["file_name"] for image in coco["images"]]
