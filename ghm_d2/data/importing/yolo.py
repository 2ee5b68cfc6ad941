"""YOLO folders: data.yaml with the class names, labels/**/*.txt beside images/**."""

import math
import os
from pathlib import Path

from ghm_d2.data.coco_json import SPLITS
from ghm_d2.data.images import SUFFIXES
from ghm_d2.data.importing.source import Box, Item, Source, output_name, unique_names
from ghm_d2.errors import DataError


def find_yolo(folder: Path) -> Path | None:
    """The YAML file that names the classes: data.yaml, or the only other one with `names`."""
    if (folder / "data.yaml").is_file():
        return folder / "data.yaml"
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    named = [f for f in files if b"names" in f.read_bytes()]
    return named[0] if len(named) == 1 else None


def read_yolo(folder: Path) -> Source:
    """Read a YOLO folder.

    Lines are `class x y w h` in fractions of the image, with or without a confidence, or
    `class x1 y1 x2 y2 x3 y3 ...`, an outline, which becomes its box and a segmentation. Of pose
    labels (`kpt_shape` in the YAML) only the box is read. An image without a label file, or with
    an empty one, is background. Splits are the folders or .txt lists that the YAML names; its
    `path`, and `../` before a split, are ignored where they lead out of this folder.
    Raises: DataError with file and line for malformed YAML, labels, and names outside the folder.
    """
    path = find_yolo(folder)
    data = _load_yaml(path)
    names = _names(data.get("names"), path)
    base = _base(folder, data.get("path"))
    source = Source("yolo", names, {})
    for split in SPLITS:
        # Roboflow and others write "valid".
        entry = data.get(split, data.get("valid") if split == "val" else None)
        if entry:
            files = _images(folder, base, entry, path, split)
            source.splits[split] = [_item(folder, f, names, "kpt_shape" in data) for f in files]
    if not source.splits:
        raise DataError(f"{path}: names none of train, val and test")
    bare = sum(
        not os.path.isfile(_label_path(item.image)) for s in source.splits.values() for item in s
    )
    if bare:
        source.notes.append(f"{bare} images have no label file: taken as background")
    return source


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
        raise DataError(f"{path}: must map names, train and val to values")
    return data


def _names(names, path: Path) -> list[str]:
    if isinstance(names, dict):
        keys = {int(k) if str(k).isdecimal() else -1: v for k, v in names.items()}
        if sorted(keys) != list(range(len(names))):
            raise DataError(f"{path}: names must be numbered 0 to {len(names) - 1} without a gap")
        names = [keys[i] for i in range(len(keys))]
    if not isinstance(names, list):
        raise DataError(f"{path}: names must list the classes")
    return unique_names(names, path)


def _inside(folder: Path, path: Path) -> bool:
    root = folder.absolute()
    return ".." not in path.parts and path.absolute().is_relative_to(root)


def _base(folder: Path, entry) -> Path:
    base = folder / entry if isinstance(entry, str) and "\0" not in entry else folder
    return base if _inside(folder, base) and os.path.isdir(base) else folder


def _images(folder: Path, base: Path, entry, where: Path, split: str) -> list[Path]:
    """All image files that one split's entry names, sorted."""
    found: set[Path] = set()
    for name in entry if isinstance(entry, list) else [entry]:
        if not isinstance(name, str) or "\0" in name:
            raise DataError(f"{where}: {split} must be a folder, a .txt list, or a list of them")
        path = base / name
        while not _inside(folder, path) and name.startswith("../"):
            name = name[3:]
            path = base / name
        if not _inside(folder, path):
            raise DataError(f"{where}: {split} {name!r:.120} leads out of the folder")
        if os.path.isdir(path):
            found.update(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.suffix == ".txt" and os.path.isfile(path):
            found.update(_listed(folder, base, path))
        else:
            raise DataError(f"{where}: {split} names {name!r:.120}, which does not exist")
    return sorted(found)


def _listed(folder: Path, base: Path, path: Path) -> list[Path]:
    files = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            name = line.strip().replace("\\", "/").removeprefix("./")
            file = base / name
            if "\0" in name or not _inside(folder, file):
                raise DataError(f"{path}:{number}: {name!r:.120} leads out of the folder")
            files.append(file)
    return files


def _label_path(image: Path) -> Path:
    """The last folder called `images` becomes `labels`; without one, the label lies beside."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def _item(folder: Path, image: Path, names: list[str], pose: bool) -> Item:
    label = _label_path(image)
    item = Item(image, output_name(image, folder), str(image.relative_to(folder)), [], None, True)
    if os.path.isfile(label):
        item.where = str(label.relative_to(folder))
        for number, line in enumerate(_lines(label), 1):
            if line.strip():
                item.boxes.append(_box(line.split(), number, label, names, pose))
    return item


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _box(words: list[str], number: int, label: Path, names: list[str], pose: bool) -> Box:
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise DataError(f"{label}:{number}: {' '.join(words)!r:.60} is not numbers") from None
    if len(values) < 5 or not values[0].is_integer():
        raise DataError(f"{label}:{number}: must be `class x y w h`, is {' '.join(words)!r:.60}")
    where, category = f"line {number}", int(values[0])
    if len(values) <= 6 or pose:
        x, y, w, h = values[1:5]
        box = Box(where, category, [x - w / 2, y - h / 2, w, h])
    else:
        outline = values[1 : len(values) - (len(values) + 1) % 2]  # an odd one out: a confidence
        xs, ys = outline[::2], outline[1::2]
        box = Box(where, category, [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)])
        box.extra["segmentation"] = [outline]
    if not 0 <= category < len(names):
        box.fault = f"unknown category {category}: there are {len(names)} classes"
    elif any(v > 1.5 for v in values[1:5] if math.isfinite(v)):
        box.fault = "values above 1: YOLO's are fractions of the image"
    return box
