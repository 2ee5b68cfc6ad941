"""What is wrong with a COCO JSON as such, before any image is opened."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ghm_d2.data.coco_json import box_fault, hashable, outside, safe_name, show_box
from ghm_d2.data.masks import mask_fault, usable_polygons
from ghm_d2.errors import DataError


@dataclass(frozen=True)
class Problem:
    """One finding. An "error" stops a training or falsifies it; a "warning" is worth a look."""

    kind: str
    split: str
    file: str  # the image, or the JSON file where it concerns the whole
    detail: str
    severity: str = "error"

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}"


def audit(coco: Any, split: str, json_name: str) -> Iterator[Problem]:
    """Yield the problems of a parsed COCO JSON.

    split: "train", "val" or "test": the latter may have no annotations.
    json_name: what problems of the whole file are filed under.
    Covers what Detectron2's loader and COCO's evaluation need, which both fail late and without
    a file name: ids, fields, categories, boxes, masks, names that leave the image folder.
    """
    lists = ("images", "annotations", "categories")
    if not isinstance(coco, dict) or not all(isinstance(coco.get(key), list) for key in lists):
        yield Problem("malformed", split, json_name, f"lacks one of the lists {', '.join(lists)}")
        return
    for key in lists:
        if not all(isinstance(entry, dict) for entry in coco[key]):
            yield Problem("malformed", split, json_name, f"{key} must hold objects only")
            return
    if not coco["images"]:
        yield Problem("empty", split, json_name, "no images")
    elif not coco["annotations"]:
        severity = "warning" if split == "test" else "error"
        yield Problem("empty", split, json_name, "no annotations", severity)
    yield from _categories(coco["categories"], split, json_name)
    yield from _images(coco["images"], split, json_name)
    images = {hashable(image.get("id")): image for image in coco["images"]}
    categories = {hashable(category.get("id")) for category in coco["categories"]}
    for annotation in coco["annotations"]:
        image = images.get(hashable(annotation.get("image_id")))
        yield from _annotation(annotation, image, categories, split, json_name)
    yield from _repeats(coco["annotations"], images, split, json_name)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _categories(categories: list[dict], split: str, file: str) -> Iterator[Problem]:
    if not categories:
        yield Problem("categories", split, file, "no categories")
    for category in categories:
        if not _whole(category.get("id"), 0) or not isinstance(category.get("name"), str):
            detail = f"category {category!r:.80} needs an integer id and a name"
            yield Problem("categories", split, file, detail)
    for field in ("id", "name"):
        values = Counter(hashable(category.get(field)) for category in categories)
        for value in (v for v, count in values.items() if count > 1):
            detail = f"two categories have the {field} {value!r:.80}"
            yield Problem("categories", split, file, detail)


def _images(images: list[dict], split: str, file: str) -> Iterator[Problem]:
    for image in images:
        name = image.get("file_name")
        try:
            safe_name(name, file)
        except DataError as error:
            yield Problem("file-name", split, file, str(error).removeprefix(f"{file}: "))
            continue
        if not _whole(image.get("id"), 0):
            yield Problem("malformed", split, name, f"image id {image.get('id')!r:.40}: no integer")
        if not _whole(image.get("width"), 1) or not _whole(image.get("height"), 1):
            yield Problem("malformed", split, name, "width and height must be positive integers")
    ids = Counter(hashable(image.get("id")) for image in images)
    names = Counter(hashable(image.get("file_name")) for image in images)
    for image_id in (i for i, count in ids.items() if count > 1):
        yield Problem("duplicate-id", split, file, f"two images have the id {image_id}")
    for name in (n for n, count in names.items() if count > 1):
        yield Problem("duplicate-image", split, str(name), f"is listed {names[name]} times")


def _annotation(annotation: dict, image, categories: set, split: str, file: str):
    what = f"annotation {annotation.get('id')!r:.40}"
    if image is None:
        detail = f"{what}: no image has the id {annotation.get('image_id')!r:.40}"
        yield Problem("unknown-image", split, file, detail)
        return
    name = str(image.get("file_name"))
    if hashable(annotation.get("category_id")) not in categories:
        detail = f"{what}: unknown category {annotation.get('category_id')!r:.40}"
        yield Problem("unknown-category", split, name, detail)
    lacking = [key for key in ("id", "area", "iscrowd") if key not in annotation]
    if lacking:
        detail = f"{what}: lacks {', '.join(lacking)}, which COCO evaluation needs"
        yield Problem("missing-field", split, name, detail)
    if annotation.get("ignore"):
        yield Problem("ignore-flag", split, name, f'{what}: Detectron2 refuses "ignore"')
    bbox = annotation.get("bbox")
    fault = box_fault(bbox)
    if fault:
        yield Problem("bad-box", split, name, f"{what}: {fault}")
    if not _whole(image.get("width"), 1) or not _whole(image.get("height"), 1):
        return
    sides = image["width"], image["height"]
    if not fault:
        over = outside(bbox, *sides)
        if over > 1:
            size = f"{sides[0]} x {sides[1]}"
            wholly = math.isinf(over)
            by = "wholly" if wholly else f"by {over:.6g} px"
            detail = f"{what}: box {show_box(bbox)} is {by} outside the image of {size}"
            yield Problem("outside", split, name, detail, "error" if wholly else "warning")
    mask = annotation.get("segmentation")
    fault = mask_fault(mask, *sides) if mask else None  # [] and null stand for none
    if fault and _is_partly_usable(mask, *sides):
        detail = f"{what}: {fault}, beside parts that can be used; MODEL.MASK_ON refuses it"
        yield Problem("bad-mask", split, name, detail, "warning")
    elif fault:
        yield Problem("bad-mask", split, name, f"{what}: {fault}")


def _is_partly_usable(mask, width: int, height: int) -> bool:
    """Whether Detectron2 loads a mask with a fault, and its box with it.

    Its loader takes the length of every part, and drops an object that has no polygon.
    """
    if not isinstance(mask, list) or not all(isinstance(part, list) for part in mask):
        return False
    return bool(usable_polygons(mask, width, height))


def _repeats(annotations: list[dict], images: dict, split: str, file: str) -> Iterator[Problem]:
    ids = Counter(hashable(annotation.get("id")) for annotation in annotations)
    for number in (i for i, count in ids.items() if count > 1):
        yield Problem("duplicate-id", split, file, f"two annotations have the id {number}")
    if 0 in ids:
        detail = "annotation id 0: COCO's evaluation takes it for unmatched; count from 1"
        yield Problem("annotation-id", split, file, detail, "warning")
    keys = ("image_id", "category_id", "bbox")
    same = Counter(
        tuple(hashable(annotation.get(key)) for key in keys) for annotation in annotations
    )
    for (image_id, category, bbox), count in same.items():
        if count > 1:
            detail = f"{count} annotations of category {category} with the same box {bbox:.60}"
            name = str(images.get(image_id, {}).get("file_name", file))
            yield Problem("duplicate-annotation", split, name, detail, "warning")
