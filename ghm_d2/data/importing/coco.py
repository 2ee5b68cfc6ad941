"""COCO folders: JSON files of instances, one a split, and the images wherever they usually are."""

import os
from pathlib import Path
from typing import Any

from ghm_d2.data.coco_json import box_fault, is_finite, load_json, safe_name
from ghm_d2.data.importing.source import (
    Box,
    Dropped,
    Item,
    Source,
    output_name,
    split_of,
    unique_names,
)
from ghm_d2.errors import DataError

_SAMPLE = 50  # images looked for when the images folder is guessed


def find_coco(folder: Path) -> list[Path]:
    """The JSON files that may hold instances: the folder's, annotations/'s, and one folder's down.

    Where files are called instances_*, the others (captions, keypoints, panoptic) are not meant.
    """
    files = sorted(folder.glob("*.json")) + sorted(folder.glob("annotations/*.json"))
    files += sorted(folder.glob("*/_annotations.coco.json"))
    instances = [f for f in files if f.name.startswith("instances_")]
    return instances or files


def read_coco(folder: Path, images: Path | None = None) -> Source:
    """Read a COCO folder; `images` says where the images are if the usual places are not it.

    Crowd flags, areas and segmentations are kept, and image ids where they are integers from 0.
    Classes are in the order of the category ids; splits with other categories add theirs.
    Raises: DataError with the file for malformed JSON, for two files of one split, for names
    that leave the folder, and where no image at all is found.
    """
    datasets: dict[str, tuple[Path, dict]] = {}
    for path in find_coco(folder):
        data = load_json(path)
        keys = ("images", "annotations", "categories")
        if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in keys):
            continue
        split = split_of(path.stem) or split_of(path.parent.name if path.parent != folder else "")
        if split in datasets:
            other = datasets[split][0]
            raise DataError(f"{path} and {other} are both {split or 'without a split'}: keep one")
        datasets[split] = path, data
    if not datasets:
        raise DataError(f"{folder}: no JSON file with images, annotations and categories")
    if "" in datasets and len(datasets) > 1:
        raise DataError(f"{datasets[''][0]}: train, val or test? Put the word in its file name")
    source = Source("coco", [], {})
    for split, (path, data) in datasets.items():
        categories = _categories(data, path, source.names)
        root = _find_images(folder, images, path, data)
        source.splits[split] = _items(folder, root, path, data)
        _add_boxes(source, folder, split, path, data, categories)
    return source


def _categories(data: dict, path: Path, names: list[str]) -> dict[Any, int]:
    """Category id -> index into `names`, which grows by the names it lacks."""
    entries = data["categories"]
    if not all(isinstance(c, dict) and isinstance(c.get("id"), int) for c in entries):
        raise DataError(f"{path}: every category must have an integer id and a name")
    entries = sorted(entries, key=lambda c: c["id"])
    own = unique_names([c.get("name") for c in entries], path)
    if len({c["id"] for c in entries}) < len(entries):
        raise DataError(f"{path}: two categories have the same id")
    names += [name for name in own if name not in names]
    return {c["id"]: names.index(name) for c, name in zip(entries, own, strict=True)}


def _find_images(folder: Path, images: Path | None, path: Path, data: dict) -> Path:
    """The folder below which the file names lead to images."""
    entries = [e for e in data["images"] if isinstance(e, dict)]
    names = [safe_name(e.get("file_name"), str(path)) for e in entries[:_SAMPLE]]
    if not names:
        raise DataError(f"{path}: no images")
    tag = path.stem.removeprefix("instances_")  # train2017
    split = split_of(path.stem)
    below = ["", tag, split]
    places = [images] if images else [path.parent]
    if images is None:
        places += [folder / s for s in below] + [folder / "images" / s for s in below]
    hits = [sum(os.path.isfile(place / name) for name in names) for place in places]
    if not max(hits):
        looked = ", ".join(dict.fromkeys(str(place) for place in places))
        raise DataError(
            f"{path}: no image such as {names[0]} in {looked}; --images says where they are"
        )
    return places[hits.index(max(hits))]


def _items(folder: Path, root: Path, path: Path, data: dict) -> list[Item]:
    items: dict[Any, Item] = {}
    for number, entry in enumerate(data["images"], 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int | str):
            raise DataError(f"{path}: image number {number} has no id")
        key = entry["id"]
        if key in items:
            raise DataError(f"{path}: two images have the id {key!r}")
        name = safe_name(entry.get("file_name"), str(path))
        image = root / name
        if image.is_relative_to(folder):
            name = output_name(image, folder)
        items[key] = Item(image, name, str(path.relative_to(folder)), [], _size(entry))
        # the others `ghm data check` would refuse; true and false are integers to Python
        items[key].image_id = key if type(key) is int and key >= 0 else None
    return list(items.values())


def _add_boxes(source: Source, folder: Path, split: str, path: Path, data: dict, categories: dict):
    where = str(path.relative_to(folder))
    by_id = {e["id"]: item for e, item in zip(data["images"], source.splits[split], strict=True)}
    for number, entry in enumerate(data["annotations"], 1):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: annotation number {number} is not an object")
        image_id = entry.get("image_id")
        if isinstance(image_id, int | str) and image_id in by_id:
            by_id[image_id].boxes.append(_box(entry, number, categories))
        else:
            detail = f"annotation {entry.get('id', number)!r:.40}: no image {image_id!r:.40}"
            source.dropped.append(Dropped(split, "annotation", where, detail))


def _size(entry: dict) -> tuple[int, int] | None:
    size = entry.get("width"), entry.get("height")
    return size if all(isinstance(v, int) and v > 0 for v in size) else None


def _box(entry: dict, number: int, categories: dict) -> Box:
    bbox, category = entry.get("bbox"), entry.get("category_id")
    known = isinstance(category, int) and category in categories
    box = Box(f"annotation {entry.get('id', number)!r:.40}", -1, bbox, box_fault(bbox))
    if not known:
        box.fault = f"unknown category {category!r:.40}"
        return box
    box.category = categories[category]
    box.extra["iscrowd"] = int(entry.get("iscrowd") in (1, True))
    area = entry.get("area")
    if is_finite(area) and area > 0:
        box.extra["area"] = area
    if entry.get("segmentation"):
        box.extra["segmentation"] = entry["segmentation"]
    return box
