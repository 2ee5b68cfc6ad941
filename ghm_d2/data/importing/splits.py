"""Assigns images to the splits train, val and test."""

import os
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ghm_d2.data.coco_json import SPLITS
from ghm_d2.data.importing.listing import Listing, first_bytes
from ghm_d2.data.importing.pairing import Finder, split_of_folders, wanted
from ghm_d2.data.importing.source import Item, Source
from ghm_d2.errors import DataError

_LIST = re.compile(r"(train|val|valid|validation|test|trainval)\.txt")
_COMPARED = 2**16  # first bytes of two files that are compared
_MAIN = "ImageSets/Main/"


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file. Raises: DataError if it is not UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def find_lists(listing: Listing) -> dict[str, list[str]]:
    """Return split -> the text files that list its images: those in ImageSets/Main, else all.

    trainval.txt is for training, and read only if there is neither train.txt nor val.txt.
    """
    found = [f for f in listing.of(".txt") if _LIST.fullmatch(PurePosixPath(f).name.lower())]
    found = [f for f in found if _MAIN in f] or found
    lists: dict[str, list[str]] = {}
    for name in found:
        stem = PurePosixPath(name).stem.lower()
        lists.setdefault("val" if stem.startswith("valid") else stem, []).append(name)
    both = lists.pop("trainval", None)
    if both and not lists.keys() & {"train", "val"}:
        lists["train"] = both
    return {split: lists[split] for split in SPLITS if split in lists}


def by_lists(
    source: Source, listing: Listing, items: dict[str, Item], lost: Callable[[str], str]
) -> bool:
    """Put items in the splits whose lists name their keys; return whether any list does.

    lost: returns the message for a listed name that belongs to no item.
    """
    finder = Finder(list(items))
    used: set[str] = set()
    for split, files in find_lists(listing).items():
        rows = [(f, line.strip()) for f in files for line in read_lines(listing.root / f)]
        asked = []
        for file, line in dict.fromkeys(row for row in rows if row[1]):
            item = wanted(line, file)
            # A second column, if any, says whether one class occurs; it is not needed here.
            asked.append(item if item.stem in finder else wanted(line.split()[0], file))
        found, _ = finder.pair(asked, "remove one of them")
        if not any(found):
            continue
        held = {name: items[name] for name in found if name}
        source.splits[split] = list(held.values())
        used.update(held)
        for item, name in zip(asked, found, strict=True):
            if not name:
                source.drop_image(split, item.home, lost(item.name or item.stem))
    left = sum(item.where != item.place for name, item in items.items() if name not in used)
    if used and left:
        source.notes.append(f"{left} annotated images belong to no split and are left out")
    return bool(used)


def by_folder(source: Source, items: list[Item]) -> None:
    """Put items in the splits named by the folders of their images, or else of their files."""
    for item in items:
        split = split_of_folders(item.place) or split_of_folders(item.where)
        source.splits.setdefault(split, []).append(item)


def settle(source: Source) -> None:
    """Put the images without a split in train, in place, or leave them out if train exists."""
    whole = source.splits.pop("", None)
    if whole and "train" in source.splits:
        source.notes.append(f"{len(whole)} images belong to no split and are left out")
    elif whole is not None:
        source.splits["train"] = whole
    source.splits = {s: source.splits[s] for s in SPLITS if s in source.splits}


def with_val(source: Source, share: float, seed: int) -> None:
    """Draw a missing val from train, in place; `share` of the images stay in train.

    Each of the two gets at least one image. The draw is from the sorted image names with `seed`, so
    the same folder is split in the same way everywhere. Copies of one file stay together, because
    val would otherwise hold images that were trained on.
    """
    settle(source)
    if "val" in source.splits or "train" not in source.splits:
        return
    items = sorted(source.splits["train"], key=lambda item: item.name)
    if len(items) < 2:
        source.notes.append("the source has no val split, and too few images to draw one")
        return
    chosen = list(range(len(items)))
    random.Random(seed).shuffle(chosen)
    cut = min(max(round(len(items) * share), 1), len(items) - 1)
    copies: dict[int, list[int]] = {}
    first = _first_copies(items)
    for i, of in enumerate(first):
        copies.setdefault(of, []).append(i)
    val: set[int] = set()
    for i in reversed(chosen):
        if len(val) < len(items) - cut and len(val) + len(copies[first[i]]) < len(items):
            val.update(copies[first[i]])
    val = val or set(chosen[cut:])  # all are copies of one
    source.splits["train"] = [item for i, item in enumerate(items) if i not in val]
    source.splits["val"] = [item for i, item in enumerate(items) if i in val]
    source.splits = {s: source.splits[s] for s in SPLITS if s in source.splits}
    source.notes.append(
        f"the source has no val split: {1 - share:.0%} of train became val (seed {seed})"
    )


def _first_copies(items: list[Item]) -> list[int]:
    """Return for each item the index of the first with the same file size and first bytes."""
    sizes = [0 if item.fault else _size(item.image) for item in items]
    several = {size for size, count in Counter(sizes).items() if count > 1}
    seen: dict[object, int] = {}
    first = []
    for number, (item, size) in enumerate(zip(items, sizes, strict=True)):
        same = size and size in several
        key = (size, hash(first_bytes(item.image, _COMPARED))) if same else number
        first.append(seen.setdefault(key, number))
    return first


def _size(path: Path) -> int:
    """Return the file's size in bytes; 0 if it is no file."""
    try:
        return os.path.getsize(path) if os.path.isfile(path) else 0
    except OSError:
        return 0
