"""Reads Pascal VOC: one XML file per image, in any folder, with or without lists of splits."""

import re
from pathlib import Path, PurePosixPath
from xml.etree.ElementTree import Element, ParseError

from ghm_d2.data.importing.images import REMEDY, Images
from ghm_d2.data.importing.listing import Listing, first_bytes
from ghm_d2.data.importing.pairing import by_stem, wanted
from ghm_d2.data.importing.source import Box, Item, Source, unique_names
from ghm_d2.data.importing.splits import by_folder, by_lists, read_lines
from ghm_d2.errors import DataError

_SNIFFED = 2**16  # first bytes of a file, which hold its outermost element
_LONGEST = 2**26  # bytes; an object takes some 300
_ROOT = re.compile(rb"<annotation[\s>]")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def find_voc(listing: Listing) -> dict[str, list[str]]:
    """Return folder -> its XML files, for folders in which at least one file is an annotation."""
    folders: dict[str, list[str]] = {}
    for name in listing.of(".xml"):
        folders.setdefault(name[: name.rfind("/") + 1], []).append(name)
    return {
        folder: files
        for folder, files in folders.items()
        if any(_ROOT.search(first_bytes(listing.root / name, _SNIFFED)) for name in files)
    }


def read_voc(listing: Listing, images: Images) -> Source:
    """Read Pascal VOC annotations.

    VOC counts pixels from 1, and both corners belong to the box: (xmin - 1, ymin - 1, xmax, ymax)
    are the edges, as in Detectron2's pascal_voc.py. A box whose corners coincide or are swapped
    counts as faulty: literally it is one pixel wide, but in practice it is a mistake.
    Classes are those of `labels.txt` or `classes.txt` (one per line), or all that occur, sorted.
    Objects marked `difficult` are kept, with that mark. Splits come from the lists in
    ImageSets/Main, or from train.txt, val.txt and test.txt anywhere, or from folder names.
    An annotation belongs to the image of its own name, or else to its <filename>.
    Raises: DataError with the file (and line) for malformed XML, and if no image is found.
    """
    folders = find_voc(listing)
    parsed = {n: parse_xml(listing.root / n) for files in folders.values() for n in files}
    others = [name for name, root in parsed.items() if root.tag != "annotation"]
    for name in others:
        del parsed[name]
    objects = [obj for root in parsed.values() for obj in root.iter("object")]
    found = sorted({name for obj in objects if (name := _text(obj, "name"))})
    names = _label_file(listing) or found
    if not names:
        where = listing.root / next(iter(folders))
        raise DataError(f"{where}: none of the {len(parsed)} XML files has a named <object>")
    index = {name: i for i, name in enumerate(unique_names(names, listing.root))}
    source = Source("voc", names, {})
    source.layout = f"{len(parsed)} XML files in {', '.join(folders) or 'the folder'}"
    if others:
        source.notes.append(
            f"{len(others)} XML files are not annotations and are left out, the first: {others[0]}"
        )
    items = _items(parsed, images, index)
    if not by_lists(source, listing, items, "no annotation file {}.xml".format):
        by_folder(source, list(items.values()))
    return source


def parse_xml(path: Path) -> Element:
    """Return the outermost element. Raises: DataError with file and line; also for XML entities."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import parse

    try:
        if path.stat().st_size > _LONGEST:
            raise DataError(
                f"{path}: over {_LONGEST >> 20} MiB, too large for the annotations of one image"
            )
        return parse(path).getroot()
    except ParseError as error:
        raise DataError(f"{path}:{error.position[0]}: not valid XML ({error})") from None
    except DefusedXmlException as error:
        kind = type(error).__name__
        raise DataError(
            f"{path}: refused: it declares XML entities ({kind}); remove them"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, LookupError) as error:  # an unknown or wrong encoding
        raise DataError(f"{path}: not valid XML ({error})") from None


def _items(parsed: dict[str, Element], images: Images, index: dict[str, int]) -> dict[str, Item]:
    """Return XML file -> its image with its boxes."""
    asked, claims = [], []
    for path, root in parsed.items():
        own, claim = PurePosixPath(path).stem, _text(root, "filename")
        told = wanted(claim, path)
        # <filename> is the second choice: it is often out of date
        asked.append(by_stem(path, told.name) if own in images or not told.stem else told)
        claims.append(claim or f"{own}.jpg")
    found, ties = images.pair(asked, REMEDY, once=True)
    if not any(found):
        images.none_found(claims[0], next(iter(parsed)))
    items = {}
    for number, (path, root) in enumerate(parsed.items()):
        boxes, size = _boxes(root, index), _size(root)
        items[path] = images.item(found[number], claims[number], path, boxes, size)
        if number in ties:
            items[path].fault = ties[number].fault
    return items


def _boxes(root: Element, index: dict[str, int]) -> list[Box]:
    return [_box(obj, f"object {i}", index) for i, obj in enumerate(root.iter("object"), 1)]


def _box(obj: Element, where: str, index: dict[str, int]) -> Box:
    name = _text(obj, "name")
    box = Box(where, index.get(name, -1), [0, 0, 0, 0])
    if not name:
        box.fault = "has no <name>"
        return box
    if name not in index:
        box.fault = f"unknown category {name!r}"
    elif obj.find("bndbox") is None:
        box.fault = "has no <bndbox>"
    else:
        corners = {side: _text(obj, f"bndbox/{side}") for side in _SIDES}
        try:
            xmin, ymin, xmax, ymax = map(float, corners.values())
        except ValueError:
            side = next(side for side in _SIDES if not _is_number(corners[side]))
            box.fault = f"<bndbox/{side}> is {corners[side]!r:.40}, not a number"
            return box
        box.bbox = [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]
        if xmax <= xmin or ymax <= ymin:
            shown = ", ".join(f"{v:g}" for v in (xmin, ymin, xmax, ymax))
            box.fault = f"box (xmin, ymin, xmax, ymax) = ({shown}) is inverted or empty"
    if _text(obj, "difficult") == "1":
        box.extra["difficult"] = 1
    return box


def _text(element: Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _size(root: Element) -> tuple[int, int] | None:
    """Return the size in the file, or None: some programs write zeros for an unknown size."""
    try:
        sides = [int(float(_text(root, f"size/{side}"))) for side in ("width", "height")]
    except (ValueError, OverflowError):
        return None
    return (sides[0], sides[1]) if all(side > 0 for side in sides) else None


def _label_file(listing: Listing) -> list[str]:
    for name in ("labels.txt", "classes.txt"):
        if name in listing.files:
            lines = (line.strip() for line in read_lines(listing.root / name))
            return [line for line in lines if line]
    return []
