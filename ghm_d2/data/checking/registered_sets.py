"""Checks of data sets that are registered with Detectron2, at the start of a training."""

import logging
import os
from collections.abc import Sequence

from ghm_d2.data.checking.validate import (
    IMPORT_HINT,
    REMEMBERED_BYTES,
    inspect_json,
    require_masks,
    validate_json,
)
from ghm_d2.data.registered import is_lvis, require_lvis, set_name
from ghm_d2.errors import DataError, UsageError

logger = logging.getLogger(__name__)

MASK_FORMATS = ("polygon", "bitmask")
_told: set[str] = set()  # warnings that this process has logged


def validate(name: str, use: str = "training") -> None:
    """Check a registered data set before its use, without opening an image.

    Faults that Detectron2 and COCO's evaluation drop or survive are logged, one line per kind with
    their number, and the data are not changed. Images without annotations are background. A data
    set without a COCO JSON can be trained on; there is nothing to check here.

    Args:
        use: "training" or "evaluation"; the latter needs no annotations.

    Raises:
        DataError: one line with the first fault and the number of others: the JSON is missing,
            malformed or empty; Detectron2 or COCO's evaluation cannot use a category, box or field;
            an image is missing or outside the folder; or an evaluation has no JSON.
    """
    from detectron2.data import MetadataCatalog

    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if json_file is None:
        if use == "evaluation":
            raise DataError(f"{name} has no COCO JSON, which the evaluation needs; {IMPORT_HINT}")
        return
    _require_file(name, json_file)
    if is_lvis(name):
        require_lvis(name)
    for line in validate_json(json_file, metadata.get("image_root", ""), use):
        if line not in _told:
            logger.warning(line)
        _told.add(line)


def _require_file(name: str, json_file: str) -> None:
    if not name.endswith(".json") and not os.path.isfile(json_file):
        raise DataError(
            f"{json_file}: no such file, but the data set {name} is registered with it; set the "
            "environment variable DETECTRON2_DATASETS to the folder with Detectron2's data sets "
            "(it contains coco/), or pass --dataset FOLDER for other data"
        )


def require_annotations(name: str) -> None:
    """Check that a registered data set, which has passed `validate`, can judge a comparison.

    Raises:
        DataError: its COCO JSON has no annotations.
    """
    from detectron2.data import MetadataCatalog

    findings = inspect_json(MetadataCatalog.get(name).json_file).findings
    if any(finding.kind == "empty" for finding in findings):
        raise DataError(
            f"{set_name(name)} has no annotations, so the comparison would have no AP; choose test "
            "data with annotations"
        )


def require_masks_of(names: Sequence[str], mask_format: str, use: str) -> None:
    """Check that registered data sets have masks; arguments and errors as in `require_masks`."""
    from detectron2.data import MetadataCatalog

    if mask_format not in MASK_FORMATS:
        raise UsageError(
            f"INPUT.MASK_FORMAT must be {' or '.join(MASK_FORMATS)}, not {mask_format!r}"
        )
    for name in names:
        json_file = MetadataCatalog.get(name).get("json_file")
        if json_file is not None:
            require_masks(json_file, mask_format, use)


def tell_large(names: Sequence[str]) -> None:
    """Log a line for each registered data set whose JSON takes seconds to load."""
    from detectron2.data import MetadataCatalog

    for name in names:
        json_file = MetadataCatalog.get(name).get("json_file")
        size = os.path.getsize(json_file) if json_file and os.path.isfile(json_file) else 0
        if size >= REMEMBERED_BYTES:
            logger.info("loading %s (%.0f MB)", json_file, size / 1e6)
