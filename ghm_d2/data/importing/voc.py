"""Pascal VOC folders: Annotations/*.xml, JPEGImages/, ImageSets/Main/*.txt where there is one."""

from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from ghm_d2.data.coco_json import SPLITS, safe_name
from ghm_d2.data.images import SUFFIXES
from ghm_d2.data.importing.source import Box, Item, Source, output_name, unique_names
from ghm_d2.errors import DataError


def find_voc(folder: Path) -> Path | None:
    """The folder with the XML files, or None."""
    for child in _folders(folder):
        if child.name.lower() == "annotations" and any(child.rglob("*.xml")):
            return child
    return None


def read_voc(folder: Path) -> Source:
    """Read a Pascal VOC folder.

    VOC counts pixels from 1 and both corners belong to the box: (xmin - 1, ymin - 1, xmax, ymax)
    are the edges, as in Detectron2's pascal_voc.py. A box whose corners coincide or are swapped is
    faulty all the same: by the letter it would be one pixel wide, in practice it is a slip.
    Classes are those of `labels.txt` or `classes.txt` (one a line), or all that occur, sorted.
    Objects marked `difficult` are kept, with that mark.
    Raises: DataError with the file (and line) for malformed XML and names that leave the folder.
    """
    annotations = find_voc(folder)
    images = _images(folder)
    parsed = {
        path.relative_to(annotations).with_suffix("").as_posix(): (path, _parse(path))
        for path in sorted(annotations.rglob("*.xml"))
    }
    found = sorted(
        {_text(obj, "name", path) for path, root in parsed.values() for obj in root.iter("object")}
    )
    names = _label_file(folder) or found
    if not names:
        raise DataError(f"{annotations}: no object in any of {len(parsed)} files")
    names = unique_names(names, annotations)
    index = {name: i for i, name in enumerate(names)}
    items = {
        stem: _item(folder, path, root, stem, images, index)
        for stem, (path, root) in parsed.items()
    }
    source = Source("voc", names, {})
    _assign(source, folder, items, images)
    return source


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir())


def _images(folder: Path) -> dict[str, Path]:
    """Every image below JPEGImages (or images) by its path without suffix, and by its name."""
    for child in _folders(folder):
        if child.name.lower() in ("jpegimages", "images"):
            files = sorted(p for p in child.rglob("*") if p.suffix.lower() in SUFFIXES)
            found = {p.relative_to(child).with_suffix("").as_posix(): p for p in files}
            return found | {p.relative_to(child).as_posix(): p for p in files}
    raise DataError(f"{folder}: no folder JPEGImages (or images) beside Annotations")


def _parse(path: Path) -> Element:
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import parse

    try:
        return parse(path).getroot()
    except ParseError as error:
        raise DataError(f"{path}:{error.position[0]}: not valid XML ({error})") from None
    except DefusedXmlException as error:
        kind = type(error).__name__
        raise DataError(f"{path}: refused: it declares XML entities ({kind})") from None
    except (ValueError, LookupError) as error:  # an unknown or wrong encoding
        raise DataError(f"{path}: not valid XML ({error})") from None


def _item(folder, path, root, stem, images, index) -> Item:
    where = str(path.relative_to(folder))
    image = images.get(stem)
    if image is None:  # the file's own word for its image is the second choice: it is often stale
        name = safe_name(root.findtext("filename") or f"{stem}.jpg", where)
        image = images.get(name) or folder / "JPEGImages" / name
    boxes = [_box(obj, f"object {i}", path, index) for i, obj in enumerate(root.iter("object"), 1)]
    size = tuple(int(_number(root, f"size/{side}", path, 0.0)) for side in ("width", "height"))
    # Writers that do not know the size put zeros there.
    return Item(image, output_name(image, folder), where, boxes, size if all(size) else None)


def _box(obj: Element, where: str, path: Path, index: dict[str, int]) -> Box:
    name = _text(obj, "name", path)
    corners = [_number(obj, f"bndbox/{side}", path) for side in ("xmin", "ymin", "xmax", "ymax")]
    xmin, ymin, xmax, ymax = corners
    box = Box(where, index.get(name, -1), [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1])
    if name not in index:
        box.fault = f"unknown category {name!r}"
    elif xmax <= xmin or ymax <= ymin:
        shown = ", ".join(f"{v:g}" for v in corners)
        box.fault = f"box (xmin, ymin, xmax, ymax) = ({shown}) is inverted or empty"
    if (obj.findtext("difficult") or "").strip() == "1":
        box.extra["difficult"] = 1
    return box


def _text(element: Element, tag: str, path: Path) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise DataError(f"{path}: an object has no <{tag}>")
    return text


def _number(element: Element, tag: str, path: Path, default: float | None = None) -> float:
    text = (element.findtext(tag) or "").strip()
    if not text and default is not None:
        return default
    try:
        value = float(text)
        return value if default is None else float(int(value))
    except (ValueError, OverflowError):
        raise DataError(f"{path}: <{tag}> is {text!r:.40}, not a number") from None


def _label_file(folder: Path) -> list[str]:
    for name in ("labels.txt", "classes.txt"):
        path = folder / name
        if path.is_file():
            lines = _lines(path)
            return unique_names([line.strip() for line in lines if line.strip()], path)
    return []


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _assign(source: Source, folder: Path, items: dict[str, Item], images: dict) -> None:
    """Put the items in the splits that ImageSets/Main names, or in one."""
    sets = folder / "ImageSets" / "Main"
    lists = {split: sets / f"{split}.txt" for split in SPLITS}
    listed = {split: path for split, path in lists.items() if path.is_file()}
    if not listed.keys() & {"train", "val"} and (sets / "trainval.txt").is_file():
        listed["train"] = sets / "trainval.txt"
    if not listed:
        source.splits[""] = list(items.values())
        return
    used = set()
    for split, path in listed.items():
        # A second column, where there is one, says whether one class occurs: not needed here.
        ids = [safe_name(line.split()[0], str(path)) for line in _lines(path) if line.strip()]
        source.splits[split] = [_listed(items, images, folder, path, i) for i in dict.fromkeys(ids)]
        used.update(ids)
    if items.keys() - used:
        source.notes.append(
            f"{len(items.keys() - used)} annotated images are in no split: left out"
        )


def _listed(items: dict[str, Item], images: dict, folder: Path, path: Path, name: str) -> Item:
    if name in items:
        return items[name]
    image = images.get(name) or folder / "JPEGImages" / f"{name}.jpg"
    fault = f"no annotation file {name}.xml"
    return Item(image, output_name(image, folder), str(path.relative_to(folder)), [], fault=fault)
