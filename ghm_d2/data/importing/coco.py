"""Reads COCO JSON: files of any name, one or more per split, with images anywhere."""

import mmap
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ghm_d2.data.coco_json import box_fault, is_finite, is_plain, load_json, safe_name
from ghm_d2.data.importing.images import REMEDY, Images
from ghm_d2.data.importing.listing import Listing
from ghm_d2.data.importing.pairing import split_of, split_of_folders, wanted
from ghm_d2.data.importing.source import Box, Dropped, Item, Source, unique_names
from ghm_d2.data.importing.splits import by_folder
from ghm_d2.errors import DataError

_KEYS = ("images", "categories")
_HIGHEST_ID = 2**31
_LAST = "toothbrush"  # the last of COCO's own 80 classes, with id 90
# files of other tasks that COCO keeps beside instances_train2017.json
_OTHER_TASKS = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")


def find_coco(listing: Listing) -> list[str]:
    """Return the JSON files whose content looks like COCO's instances.

    If a file is called instances_*, files of COCO's other tasks are left out.
    """
    found = [name for name in listing.of(".json") if _sniff(listing.root / name)]
    if any(PurePosixPath(name).name.startswith("instances_") for name in found):
        found = [n for n in found if not PurePosixPath(n).name.startswith(_OTHER_TASKS)]
    return found


def read_coco(listing: Listing, images: Images, all_classes: bool = False) -> Source:
    """Read COCO JSON files.

    Crowd flags, areas, segmentations and category ids are kept, and image ids if they are unique
    integers from 0 in their split. Classes are in the order of their ids; splits with other
    categories add theirs. Classes that no annotation uses are left out, unless `all_classes` is set
    or they are COCO's own 80. Files of one split are merged; a file that names no split is divided
    by the folders of its images.
    Raises: DataError with the file if its JSON is malformed, if two files of one split describe the
    same image, or if no image is found.
    """
    files = {name: data for name in find_coco(listing) if (data := _load(listing.root / name))}
    if not files:
        raise DataError(f"{listing.root}: no JSON file with images, annotations and categories")
    splits = {n: split_of(PurePosixPath(n).stem) or split_of_folders(n) for n in files}
    read: dict[str, dict[Any, Item]] = {}
    source = Source("coco", [], {})
    for name in sorted(files, key=lambda n: (not splits[n], splits[n] != "train", n)):
        items = _items(listing.root / name, name, files[name], images)
        fault = _left_out(name, items, splits, read)
        if fault:
            source.notes.append(f"{name} is left out: {fault}")
        else:
            read[name] = items
    if not read:
        images.none_found(next(iter(items.values())).name, name)
    source.layout = ", ".join(read)
    categories = _categories({name: files[name] for name in read}, listing.root, source)
    for name, items in read.items():
        _add_boxes(source, splits[name] or "train", name, files[name], items, categories[name])
        if splits[name]:
            source.splits.setdefault(splits[name], []).extend(items.values())
        else:
            by_folder(source, list(items.values()))
    if not all_classes:
        _leave_unused_out(source)
    return source


def _sniff(path: Path) -> bool:
    """Return whether the file contains the keys "images" and "categories" of COCO JSON."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return all(text.find(b'"%s"' % key.encode()) >= 0 for key in _KEYS)
    except (OSError, ValueError):  # ValueError: it is empty
        return False


def _load(path: Path) -> dict | None:
    data = load_json(path)
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in _KEYS):
        return None
    # image_info_test-dev2017.json has no annotations
    return data if isinstance(data.setdefault("annotations", []), list) else None


def _categories(files: dict[str, dict], root: Path, source: Source) -> dict[str, dict[int, int]]:
    """Return file -> category id -> index into the source's names, which are ordered by their ids.

    Ids are kept; if files give one name two ids, or two names one id, the first counts.
    """
    ids: dict[str, int] = {}
    own = {file: _own_categories(data, root / file) for file, data in files.items()}
    free = 1 + max((n for known in own.values() for n in known if n < _HIGHEST_ID), default=0)
    for file, known in own.items():
        for number, name in known.items():
            if name not in ids:
                usable = 0 <= number < _HIGHEST_ID and number not in ids.values()
                ids[name] = number if usable else free
                free += not usable
            if ids[name] != number:
                source.notes.append(
                    f"{file}: class {name!r:.80} has id {number!r:.20}, which becomes {ids[name]}"
                )
    source.names = sorted(ids, key=ids.__getitem__)
    source.ids = [ids[name] for name in source.names]
    index = {name: i for i, name in enumerate(source.names)}
    return {file: {n: index[name] for n, name in known.items()} for file, known in own.items()}


def _own_categories(data: dict, path: Path) -> dict[int, str]:
    entries = data["categories"]
    if not all(isinstance(c, dict) and type(c.get("id")) is int for c in entries):
        raise DataError(f"{path}: every category must have an integer id and a name")
    entries = sorted(entries, key=lambda c: c["id"])
    names = unique_names([c.get("name") for c in entries], path)
    if len({c["id"] for c in entries}) < len(entries):
        raise DataError(f"{path}: two categories have the same id")
    return {c["id"]: name for c, name in zip(entries, names, strict=True)}


def _items(path: Path, name: str, data: dict, images: Images) -> dict[Any, Item]:
    """Return image id -> item, without boxes."""
    claims: dict[Any, str] = {}
    for number, entry in enumerate(data["images"], 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int | str):
            raise DataError(f"{path}: image number {number} has no id")
        if entry["id"] in claims:
            raise DataError(f"{path}: two images have the id {entry['id']!r:.40}")
        claim = entry.get("file_name") or entry.get("coco_url")  # LVIS has only this one
        if not isinstance(claim, str) or not is_plain(claim):
            safe_name(claim, str(path))  # raises DataError
        claims[entry["id"]] = str(claim)
    if not claims:
        raise DataError(f"{path}: lists no images")
    found, ties = images.pair([wanted(claim, name) for claim in claims.values()], REMEDY)
    items = {}
    for number, (entry, place) in enumerate(zip(data["images"], found, strict=True)):
        key = entry["id"]
        items[key] = images.item(place, claims[key], name, [], _size(entry))
        if number in ties:
            items[key].fault = ties[number].fault
        # `ghm data check` would refuse other ids; True and False are ints in Python
        items[key].image_id = key if type(key) is int and key >= 0 else None
    return items


def _add_boxes(source: Source, split: str, name: str, data: dict, items: dict, categories: dict):
    for number, entry in enumerate(data["annotations"], 1):
        if not isinstance(entry, dict):
            raise DataError(f"{name}: annotation number {number} is not a JSON object")
        image_id = entry.get("image_id")
        if isinstance(image_id, int | str) and image_id in items:
            items[image_id].boxes.append(_box(entry, number, categories))
        else:
            which = f"annotation {entry.get('id', number)!r:.40}"
            detail = f"{which}: no image has the id {image_id!r:.40}"
            source.dropped.append(Dropped(split, "annotation", name, detail))


def _left_out(name: str, items: dict, splits: dict[str, str], read: dict) -> str:
    """Return why a file is left out, given the files read so far, or "".

    Raises: DataError if another file of its split describes the same image.
    """
    own = {item.place for item in items.values() if item.place}
    if not own:
        return f"none of its images ({next(iter(items.values())).name:.120}, ...) was found"
    for other, theirs in read.items():
        both = own & {item.place for item in theirs.values()}
        if both and splits[other] and not splits[name]:
            return f"its name contains no split, and {other} describes the same images"
        if both and splits[other] == splits[name]:
            raise DataError(
                f"{other} and {name} both describe {min(both)}; remove one of them, or put their "
                "splits (train, val or test) into the file names"
            )
    return ""


def _leave_unused_out(source: Source) -> None:
    boxes = [b for items in source.splits.values() for item in items for b in item.boxes]
    used = sorted({box.category for box in boxes} - {-1})
    cocos_own = [*source.ids[-1:], *source.names[:1], *source.names[-1:]] == [90, "person", _LAST]
    if not used or (cocos_own and len(source.names) == 80):
        return
    unused = [name for i, name in enumerate(source.names) if i not in {*used}]
    if not unused:
        return
    few = ", ".join(unused[:8]) + (", ..." if len(unused) > 8 else "")
    many = f"{len(unused)} classes that no annotation uses are"
    count = many if len(unused) > 1 else "one class that no annotation uses is"
    source.notes.append(f"{count} left out: {few} (--all-classes keeps unused classes)")
    index = {old: new for new, old in enumerate(used)}
    source.names = [source.names[i] for i in used]
    source.ids = [source.ids[i] for i in used]
    for box in boxes:
        box.category = index.get(box.category, -1)


def _size(entry: dict) -> tuple[int, int] | None:
    size = entry.get("width"), entry.get("height")
    return size if all(isinstance(v, int) and v > 0 for v in size) else None


def _box(entry: dict, number: int, categories: dict) -> Box:
    bbox, category = _bbox(entry), entry.get("category_id")
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


def _bbox(entry: dict) -> Any:
    """Return the box; Roboflow writes some numbers as strings."""
    bbox = entry.get("bbox")
    if isinstance(bbox, list) and len(bbox) == 4 and any(type(v) is str for v in bbox):
        with suppress(ValueError):
            return [float(v) if type(v) is str else v for v in bbox]
    return bbox
