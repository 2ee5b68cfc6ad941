"""Reads YOLO: text files of boxes, named like their images, and a file with the class names."""

import math
import re
from pathlib import Path, PurePosixPath

from ghm_d2.data.coco_json import SPLITS, load_json
from ghm_d2.data.importing.images import REMEDY, Images, missing
from ghm_d2.data.importing.listing import Listing, first_bytes
from ghm_d2.data.importing.pairing import by_stem, shared_folders, split_of, wanted
from ghm_d2.data.importing.source import Box, Item, Source, unique_names
from ghm_d2.data.importing.splits import by_folder, by_lists, read_lines
from ghm_d2.errors import DataError

_SNIFFED = 2**12  # bytes of a label file
_YAML_SNIFFED = 2**20
# files that name the classes without a data.yaml, in order of preference
_NAMES = ("classes.txt", "obj.names", "*.names", "_darknet.labels", "notes.json")
_NUMBER = re.compile(r"\d{1,9}")
_SPLIT_KEY = re.compile(rb"^\s*['\"]?(train|val|valid|test)['\"]?\s*:", re.MULTILINE)


def find_yolo(listing: Listing, images: Images) -> list[str]:
    """Return the YAML files that name classes and splits, or else the label files."""
    return _yaml_files(listing) or _labels(listing, images)


def read_yolo(listing: Listing, images: Images) -> Source:
    """Read a YOLO folder.

    A line is `class x y w h` in fractions of the image, with or without a confidence, or
    `class x1 y1 x2 y2 x3 y3 ...`, an outline, which becomes a box and a segmentation. Only the box
    of pose labels (`kpt_shape` in the YAML) is read. An image without a label file, or with an
    empty one, is background.

    A data.yaml gives the classes, and the splits as folders or .txt lists; the longest end of such
    a path that exists here is used. Without one, the classes come from classes.txt, *.names
    (darknet, CVAT), _darknet.labels or notes.json, and the splits from train.txt, valid.txt and
    test.txt, or from folder names; unlabelled images in the folders of labelled ones are read too.
    Raises: DataError with file and line for malformed YAML and labels.
    """
    files = _yaml_files(listing)
    return _read_yaml(listing, images, files) if files else _read_folders(listing, images)


def _read_yaml(listing: Listing, images: Images, files: list[str]) -> Source:
    if len(files) > 1:
        raise DataError(
            f"{files[0]} and {files[1]} in {listing.root} both define splits; remove one of them"
        )
    path = listing.root / files[0]
    data = _load_yaml(path)
    source = Source("yolo", _names(data.get("names"), path), {}, f"{files[0]}, with class names")
    splits: dict[str, list[str]] = {}
    for split in SPLITS:
        # Roboflow and others write "valid".
        entry = data.get(split, data.get("valid") if split == "val" else None)
        if entry:
            splits[split] = _entry_images(source, listing, images, entry, files[0], split)
    if not splits:
        raise DataError(f"{path}: defines none of the splits train, val and test")
    if not any(splits.values()):
        raise DataError(
            f"{listing.root}: {source.notes[0]}" if source.notes else f"{path}: lists no image"
        )
    names = sorted({name for found in splits.values() for name in found})
    texts = set(listing.of(".txt"))
    labels = {name: label for name in names if (label := _label_path(name)) in texts}
    if not labels:
        labels, _ = _pair(images, _labels(listing, images))
    for split, found in splits.items():
        if found:
            pose = "kpt_shape" in data
            source.splits[split] = [
                _item(listing, images, n, labels.get(n), source.names, pose) for n in found
            ]
    _tell_bare(source)
    return source


def _read_folders(listing: Listing, images: Images) -> Source:
    labels = _labels(listing, images)
    if not labels:
        raise DataError(f"{listing.root}: has no data.yaml, and no label file named like an image")
    where, names = _class_names(listing, labels)
    source = Source("yolo", names, {})
    folders = sorted({_folder(label) or "the folder" for label in labels})
    source.layout = f"{len(labels)} label files in {', '.join(folders)}, class names in {where}"
    known, ties = _pair(images, labels)
    beside = {_folder(name) for name in known}
    items = {
        name: _item(listing, images, name, known.get(name), names, False)
        for name in images.listing.images
        if _folder(name) in beside
    }
    for name, item in items.items():  # two images share this label file
        item.fault = ties.get(str(PurePosixPath(name).with_suffix("")))
    if not by_lists(source, listing, items, missing):
        by_folder(source, list(items.values()))
    _tell_bare(source)
    return source


def _yaml_files(listing: Listing) -> list[str]:
    """Return data.yaml, or else the YAML files of any name that list classes and splits."""
    if "data.yaml" in listing.files:
        return ["data.yaml"]
    files = listing.of(".yaml", ".yml")
    found = []
    for name in files:
        text = first_bytes(listing.root / name, _YAML_SNIFFED)
        if b"names" in text and _SPLIT_KEY.search(text):
            found.append(name)
    return [n for n in found if n.endswith("data.yaml")] or found


def _load_yaml(path: Path) -> dict:
    import yaml

    try:
        data = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise DataError(f"{path}{line}: not valid YAML ({problem})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid YAML ({str(error)[:80]})") from None
    if not isinstance(data, dict):
        raise DataError(f"{path}: must be a mapping with the keys names, train and val")
    return data


def _names(names, path: Path) -> list[str]:
    if isinstance(names, dict):
        keys = {int(k) if _NUMBER.fullmatch(str(k)) else -1: v for k, v in names.items()}
        if sorted(keys) != list(range(len(names))):
            raise DataError(f"{path}: names must be numbered 0 to {len(names) - 1} without a gap")
        names = [keys[i] for i in range(len(keys))]
    if not isinstance(names, list):
        raise DataError(f"{path}: names must be a list of the class names")
    return unique_names(names, path)


def _entry_images(source, listing, images, entry, file: str, split: str) -> list[str]:
    """Return the images that a split's entry names; a missing path is noted, or fatal in train."""
    found: set[str] = set()
    for name in entry if isinstance(entry, list) else [entry]:
        if not isinstance(name, str) or "\0" in name:
            where = f"{listing.root / file}: {split}"
            raise DataError(f"{where} must be a folder, a .txt list, or a list of them")
        path = PurePosixPath(name.replace("\\", "/"))
        if path.suffix == ".txt" and (place := _ending(path, listing.of(".txt"), file)):
            found.update(_list_images(source, listing, images, place, split))
        elif (place := _ending(path, images.folders, file)) is not None:
            below = f"{place}/" if place else ""
            found.update(n for n in images.listing.images if n.startswith(below))
        else:
            fault = f"{split} is {name!r:.120}, which does not exist in the folder"
            if split == "train":
                raise DataError(f"{listing.root / file}: {fault}")
            source.notes.append(f"{file}: {fault} and is left out")
    return sorted(found)


def _ending(path: PurePosixPath, places: list[str], file: str) -> str | None:
    """Return the place that matches the longest end of the path; its start may be elsewhere.

    places: POSIX paths; file: the file that has the path; places near it are preferred.
    """
    parts = [part for part in path.parts if part not in ("..", "/", ".")]
    if not parts:
        return "" if "" in places and ".." not in path.parts and path.parts != ("/",) else None
    # without a folder test, the `images` of ../test/images could be any folder
    fewest = 1 if path.is_absolute() or path.suffix else min(len(parts), 2)
    while len(parts) >= fewest:
        end = "/".join(parts)
        found = [place for place in places if place == end or place.endswith(f"/{end}")]
        if found:
            return min(found, key=lambda p: (-shared_folders(p, file), p.count("/"), p))
        if split_of(parts.pop(0)):
            return None
    return None


def _list_images(source, listing, images, file: str, split: str) -> list[str]:
    rows = [line.strip() for line in read_lines(listing.root / file) if line.strip()]
    found, _ = images.pair([wanted(row, file) for row in rows], REMEDY)
    for row, name in zip(rows, found, strict=True):
        if name is None:
            source.drop_image(split, file, missing(row))
    return [name for name in found if name]


def _labels(listing: Listing, images: Images) -> list[str]:
    """Return the text files named like images, in folders with at least one label file."""
    folders: dict[str, list[str]] = {}
    for name in listing.of(".txt"):
        pure = PurePosixPath(name)
        if pure.stem in images and pure.name != "classes.txt":
            folders.setdefault(_folder(name), []).append(name)
    return [
        name
        for files in folders.values()
        if any(_is_label(listing.root / file) for file in files)
        for name in files
    ]


def _is_label(path: Path) -> bool:
    """Return whether the first non-empty line of a file is a class and at least four numbers."""
    lines = first_bytes(path, _SNIFFED).splitlines()
    words = next((words for line in lines if (words := line.split())), [])
    try:
        return len(words) >= 5 and words[0].isdigit() and all(map(math.isfinite, map(float, words)))
    except ValueError:
        return False


def _class_names(listing: Listing, labels: list[str]) -> tuple[str, list[str]]:
    """Return the file that names the classes, and the names; each label folder takes the nearest.

    Raises: DataError if there is none, or if the nearest files of two folders differ.
    """
    files = [
        (rank, name)
        for rank, pattern in enumerate(_NAMES)
        for name in listing.files
        if PurePosixPath(name.lower()).match(pattern)
    ]
    found: dict[str, list[str]] = {}
    for folder in sorted({_folder(label) for label in labels}):
        for _, _, name in sorted((-shared_folders(n, folder), rank, n) for rank, n in files):
            if names := found.get(name) or _read_names(listing, name):
                found[name] = names
                break
    if not found:
        raise DataError(
            f"{listing.root}: {len(labels)} YOLO label files ({labels[0]}, ...), but no file with "
            "the class names; write them to classes.txt, one per line"
        )
    first, names = next(iter(found.items()))
    other = next((name for name in found if found[name] != names), None)
    if other:
        raise DataError(f"{first} and {other} name different classes; import one folder at a time")
    return first, names


def _read_names(listing: Listing, name: str) -> list[str]:
    path = listing.root / name
    if path.suffix == ".json":  # from Label Studio; its ids are indices
        data = load_json(path)
        entries = data.get("categories") if isinstance(data, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            return []
        return _names({str(e.get("id")): e.get("name") for e in entries}, path) if entries else []
    lines = [line.strip() for line in read_lines(path)]
    return unique_names("\n".join(lines).rstrip("\n").split("\n"), path)


def _pair(images: Images, labels: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return image -> label file, and image without suffix -> why its label file is ambiguous."""
    found, ties = images.pair([by_stem(label) for label in labels], REMEDY, once=True)
    twins = {tie.first: tie.fault for tie in ties.values()}
    pairs = {name: label for name, label in zip(found, labels, strict=True) if name}
    return pairs, {str(PurePosixPath(name).with_suffix("")): t for name, t in twins.items()}


def _folder(name: str) -> str:
    return name[: name.rfind("/") + 1]


def _label_path(image: str) -> str:
    """Return an image's label path: its last folder `images` becomes `labels`, if there is one."""
    parts = list(PurePosixPath(image).parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return PurePosixPath(*parts).with_suffix(".txt").as_posix()


def _item(listing, images, name: str, label: str | None, names: list[str], pose: bool) -> Item:
    item = images.item(name, name, label or name, [], relative=True)
    if label:
        path = listing.root / label
        for number, line in enumerate(read_lines(path), 1):
            if line.strip():
                item.boxes.append(_box(line.split(), number, path, names, pose))
    return item


def _tell_bare(source: Source) -> None:
    items = [item for items in source.splits.values() for item in items if not item.fault]
    bare = sum(item.where == item.place for item in items)
    if bare:
        source.notes.append(f"{bare} images have no label file and count as background")


def _box(words: list[str], number: int, label: Path, names: list[str], pose: bool) -> Box:
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise DataError(f"{label}:{number}: must be numbers, not {' '.join(words)!r:.60}") from None
    if len(values) < 5 or not values[0].is_integer():
        raise DataError(f"{label}:{number}: must be `class x y w h`, not {' '.join(words)!r:.60}")
    where, category = f"line {number}", int(values[0])
    if len(values) <= 6 or pose:
        x, y, w, h = values[1:5]
        box = Box(where, category, [x - w / 2, y - h / 2, w, h])
    else:
        outline = values[1 : len(values) - (len(values) + 1) % 2]  # drops a confidence at the end
        xs, ys = outline[::2], outline[1::2]
        box = Box(where, category, [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)])
        box.extra["segmentation"] = [outline]
    if not 0 <= category < len(names):
        box.fault = f"unknown category {category}: there are {len(names)} classes"
    elif any(v > 1.5 for v in values[1:5] if math.isfinite(v)):
        box.fault = "has values above 1; YOLO coordinates are fractions of the image size"
    return box
