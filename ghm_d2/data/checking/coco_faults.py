"""Faults of a COCO JSON that can be found before any image is opened."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ghm_d2.data.coco_json import (
    box_fault,
    hashable,
    image_name,
    is_empty,
    is_finite,
    outside,
    safe_name,
    show_box,
)
from ghm_d2.data.masks import decoded, loaded, mask_fault
from ghm_d2.errors import DataError

# uses that a fault can stop; the uses of masks need a detector with MODEL.MASK_ON
TRAINING, EVALUATION = ("training",), ("evaluation",)
MASK_TRAINING, MASK_EVALUATION = ("mask training",), ("mask evaluation",)
POLYGON_TRAINING = ("polygon training",)  # with INPUT.MASK_FORMAT polygon
MASKS = MASK_TRAINING + MASK_EVALUATION
BOTH, NEITHER = TRAINING + EVALUATION + MASKS, ()
MASKS_ALONE = ("no-mask", "rle-mask")  # kinds that concern only detectors with masks
_NEEDED = ("images", "categories")


@dataclass(frozen=True)
class Problem:
    """One finding.

    Attributes:
        file: the image, or the JSON file if the problem concerns all of it.
        stops: the uses that the problem stops or silently falsifies.
    """

    kind: str
    split: str
    file: str
    detail: str
    stops: tuple[str, ...] = BOTH

    @property
    def severity(self) -> str:
        """Return "error" if the problem stops what the split is for, else "warning"."""
        use = "training" if self.split == "train" else "evaluation"
        return "error" if use in self.stops else "warning"

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}"


def audit(coco: Any, split: str, json_name: str) -> Iterator[Problem]:
    """Yield the problems of a parsed COCO JSON.

    split: "train", "val" or "test". json_name: the `file` of problems that concern the whole file.
    The audit covers what Detectron2's loader and COCO's evaluation need: ids, fields, categories,
    boxes, masks, and names inside the image folder. Both would fail late and name no file. Faults
    that they drop or survive stop nothing: training and AP are then those of Detectron2 and COCO.
    A test set's JSON may have no list of annotations.
    """
    try:
        yield from _problems(coco, split, json_name)
    except RecursionError:  # lists are nested just as deep as the parser allows
        yield Problem("malformed", split, json_name, "values are nested too deeply")


def _problems(coco: Any, split: str, json_name: str) -> Iterator[Problem]:
    if not isinstance(coco, dict) or not all(isinstance(coco.get(k), list) for k in _NEEDED):
        yield Problem("malformed", split, json_name, f"must have the lists {' and '.join(_NEEDED)}")
        return
    annotations = coco.get("annotations", [])
    if not isinstance(annotations, list):
        yield Problem("malformed", split, json_name, "annotations must be a list")
        return
    for key in (*_NEEDED, "annotations"):
        if not all(isinstance(entry, dict) for entry in coco.get(key, [])):
            yield Problem("malformed", split, json_name, f"{key} must be a list of objects")
            return
    if not coco["images"]:
        yield Problem("empty", split, json_name, "has no images")
    elif not annotations:
        detail = "has no annotations, so nothing can be trained and no AP can be computed"
        yield Problem("empty", split, json_name, detail, TRAINING)
    yield from _categories(coco["categories"], split, json_name)
    yield from _images(coco["images"], split, json_name)
    images = {hashable(image.get("id")): _place(image) for image in coco["images"]}
    categories = {hashable(category.get("id")) for category in coco["categories"]}
    for annotation in annotations:
        image = images.get(hashable(annotation.get("image_id")))
        yield from _annotation(annotation, image, categories, split, json_name)
    yield from _repeats(annotations, images, split, json_name)


class _Place(NamedTuple):
    """An image's name, and its (width, height) in px; None if they are not positive integers."""

    name: str
    sides: tuple[int, int] | None


def _place(image: dict) -> _Place:
    sides = image.get("width"), image.get("height")
    return _Place(str(image_name(image)), sides if all(_whole(v, 1) for v in sides) else None)


def _whole(value: Any, least: int | None = None) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and (least is None or value >= least)


def _categories(categories: list[dict], split: str, file: str) -> Iterator[Problem]:
    if not categories:
        yield Problem("categories", split, file, "has no categories")
    for category in categories:
        if not _whole(category.get("id"), 0) or not isinstance(category.get("name"), str):
            detail = f"category {category!r:.80} needs an id (an integer from 0) and a name (text)"
            yield Problem("categories", split, file, detail)
    for field in ("id", "name"):
        values = Counter(hashable(category.get(field)) for category in categories)
        for value in (v for v, count in values.items() if count > 1):
            detail = f"two categories have the {field} {value!r:.80}"
            yield Problem("categories", split, file, detail)


def _images(images: list[dict], split: str, file: str) -> Iterator[Problem]:
    for image in images:
        name = image_name(image)
        try:
            safe_name(name, file)
        except DataError as error:
            yield Problem("file-name", split, file, str(error).removeprefix(f"{file}: "))
            continue
        if not _whole(image.get("id")):
            detail = f"image id {image.get('id')!r:.40} is not an integer"
            yield Problem("malformed", split, name, detail)
        if not _whole(image.get("width"), 1) or not _whole(image.get("height"), 1):
            yield Problem("malformed", split, name, "width and height must be positive integers")
    ids = Counter(hashable(image.get("id")) for image in images)
    names = Counter(hashable(image_name(image)) for image in images)
    for image_id in (i for i, count in ids.items() if count > 1):
        yield Problem("duplicate-id", split, file, f"two images have the id {image_id}")
    for name in (n for n, count in names.items() if count > 1):
        detail = f"the image is listed {names[name]} times; keep one entry"
        yield Problem("duplicate-image", split, str(name), detail, NEITHER)


def _annotation(annotation: dict, image: _Place | None, categories: set, split: str, file: str):
    what = f"annotation {annotation.get('id')!r:.40}"
    if image is None:
        detail = f"{what}: no image has the id {annotation.get('image_id')!r:.40}"
        stops = NEITHER if "image_id" in annotation else BOTH
        yield Problem("unknown-image", split, file, detail, stops)
        return
    if hashable(annotation.get("category_id")) not in categories:
        detail = f"{what}: unknown category {annotation.get('category_id')!r:.40}"
        yield Problem("unknown-category", split, image.name, detail)
    for faults in (
        _fields(annotation),
        _mask(annotation, image.sides),
        _box(annotation, image.sides),
    ):
        for kind, detail, stops in faults:
            yield Problem(kind, split, image.name, f"{what}: {detail}", stops)


def _fields(annotation: dict) -> Iterator[tuple]:
    """Yield (kind, detail, stops) for each fault of an annotation's id, area and flags."""
    number = annotation.get("id")
    if "id" not in annotation:
        yield "missing-field", "has no id, which Detectron2 and the COCO evaluation need", BOTH
    elif not _whole(number, 0):
        yield "annotation-id", "the COCO evaluation needs a positive integer as id", EVALUATION
    if not is_finite(annotation.get("area")):
        detail = "has no area" if "area" not in annotation else "the area is not a number"
        yield "missing-field", f"{detail}; the COCO evaluation needs the area", EVALUATION
    if not is_finite(annotation.get("iscrowd", 0)):  # LVIS has no such field
        yield "crowd-flag", f"iscrowd must be 0 or 1, not {annotation['iscrowd']!r:.40}", BOTH
    if annotation.get("ignore", 0) != 0:
        yield "ignore-flag", 'Detectron2 does not support the field "ignore"', BOTH


def _box(annotation: dict, sides: tuple[int, int] | None) -> Iterator[tuple]:
    """Yield (kind, detail, stops) for a fault of a box; `sides`: (width, height) or None."""
    bbox = annotation.get("bbox")
    fault = box_fault(bbox)
    if fault and is_empty(bbox):
        yield "empty-box", f"box {show_box(bbox)} has no area and is skipped in training", NEITHER
    elif fault:
        yield "bad-box", fault, BOTH
    if fault or sides is None:
        return
    over, where = outside(bbox, *sides), f"outside the image of {sides[0]} x {sides[1]} px"
    if math.isinf(over):
        detail = f"box {show_box(bbox)} lies completely {where} and is skipped in training"
        yield "outside-box", detail, NEITHER
    elif over > 1:
        yield "outside", f"box {show_box(bbox)} reaches {over:.6g} px {where}", NEITHER


def _mask(annotation: dict, sides: tuple[int, int] | None) -> Iterator[tuple]:
    """Yield (kind, detail, stops) for a fault of a mask; `sides`: (width, height) or None."""
    if sides is None:
        return
    mask = decoded(annotation.get("segmentation"))
    crowd = annotation.get("iscrowd")  # Detectron2 leaves crowds out of training
    if not mask:  # null and [] stand for none
        stops = MASK_EVALUATION if crowd else MASKS
        yield "no-mask", "has no segmentation, which MODEL.MASK_ON True needs", stops
        return
    if isinstance(mask, dict) and not crowd:
        yield "rle-mask", "the mask is run-length encoded (RLE)", POLYGON_TRAINING
    fault = mask_fault(mask, *sides)
    if not fault:
        return
    try:
        left = loaded(mask)
    except (TypeError, ValueError, KeyError, OverflowError):
        yield "bad-mask", fault, BOTH
        return
    if not left:
        yield "lost-mask", f"{fault}; the object is skipped in training", MASK_EVALUATION
    elif mask_fault(left, *sides):
        yield "bad-mask", f"{fault}; MODEL.MASK_ON True cannot use this mask", MASKS
    else:
        yield "lost-part", f"{fault}; this part of the mask is skipped in training", MASK_EVALUATION


def _repeats(annotations: list[dict], images: dict, split: str, file: str) -> Iterator[Problem]:
    ids = Counter(hashable(annotation.get("id")) for annotation in annotations)
    for number in (i for i, count in ids.items() if count > 1):
        yield Problem("duplicate-id", split, file, f"two annotations have the id {number}")
    if 0 in ids:
        detail = "annotation id 0 means unmatched in the COCO evaluation; count ids from 1"
        yield Problem("annotation-id", split, file, detail, NEITHER)
    keys = ("image_id", "category_id", "bbox")
    same = Counter(
        tuple(hashable(annotation.get(key)) for key in keys) for annotation in annotations
    )
    for (image_id, category, bbox), count in same.items():
        if count > 1:
            detail = f"{count} annotations of category {category} have the same box {bbox:.60}"
            name = images[image_id].name if image_id in images else file
            yield Problem("duplicate-annotation", split, name, detail, NEITHER)
