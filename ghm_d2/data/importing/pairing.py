"""Pairs files by name: annotations with images, images with labels, lists with items.

The files are in `annots/` and `images/`, in `train/labels` and `train/images`, side by side, or
anywhere. Names may have another suffix or somebody else's absolute path, or be URLs. So a name is
looked up among all files; if several have it, the one whose folders agree best is taken. No file
outside the listing can be reached.
"""

import re
from collections import Counter, defaultdict
from contextlib import suppress
from itertools import takewhile
from pathlib import PurePosixPath
from posixpath import basename, splitext
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from ghm_d2.data.images import SUFFIXES
from ghm_d2.errors import DataError

_SPLITS = (
    ("train", re.compile(r"(?<![a-z])train(?:ing|val|set|data|images)?(?![a-z])")),
    ("val", re.compile(r"(?<![a-z])(?:mini_?)?val(?:id|idation|minusminival|set)?(?![a-z])")),
    ("test", re.compile(r"(?<![a-z])test(?:ing|set|data|images)?(?![a-z])")),
)
# folders with these names are preferred to those of masks, depth maps and drawings
_USUAL = re.compile(r"(?<![a-z])(?:jpeg)?(?:images?|imgs?|labels?)(?![a-z])")


class Wanted(NamedTuple):
    """A file that another file refers to."""

    folders: tuple[str, ...]  # folders of its path, as far as known
    stem: str
    name: str  # with its suffix; "" if that is unknown
    home: str  # path in the listing of the file (or folder, ending in /) that refers to it


class Tie(NamedTuple):
    """Two targets in one folder that fit a file equally well, such as a.jpg and a.png."""

    first: str
    second: str

    @property
    def fault(self) -> str:
        """The fault with its remedy, for the import report."""
        return f"{self.first} and {basename(self.second)} have the same name; remove one"


def split_of(text: str) -> str:
    """Return the split that a file or folder name contains, or ""."""
    return next((split for split, word in _SPLITS if word.search(text.lower())), "")


def split_of_folders(path: str) -> str:
    """Return the split in the name of the last folder of a path that has one, or ""."""
    folders = reversed(path.split("/")[:-1])
    return next((split for split in map(split_of, folders) if split), "")


def wanted(text: str, home: str) -> Wanted:
    """Parse a file name in an annotation: a path of any operating system, a URL, or a bare name."""
    path = text.replace("\\", "/")
    if "://" in path or "?" in path:
        with suppress(ValueError):  # it only looks like a URL
            parts = urlsplit(path)
            path = unquote(parse_qs(parts.query).get("d", [parts.path])[0])
    *folders, name = path.split("/")
    stem, suffix = splitext(name)
    known = suffix.lower() in SUFFIXES
    folders = tuple(part for part in folders if part not in ("", "."))
    return Wanted(folders, stem if known else name, name if known else "", home)


def by_stem(path: str, name: str = "") -> Wanted:
    """Return the file to look up for `path`, a path of the listing: same name, any suffix."""
    *folders, own = path.split("/")
    return Wanted(tuple(folders), splitext(own)[0], name, "/".join((*folders, "")))


class Finder:
    """Looks files up among `targets`, paths of one listing."""

    def __init__(self, targets: list[str]):
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        for path in targets:
            self.by_stem[splitext(basename(path))[0].lower()].append(path)
        self._kin: dict[tuple[str, str], tuple] = {}

    def __contains__(self, stem: str) -> bool:
        return stem.lower() in self.by_stem

    def pair(
        self, asked: list[Wanted], remedy: str, *, once: bool = False
    ) -> tuple[list[str | None], dict[int, Tie]]:
        """Return the target of each file, or None; and index -> tie for ambiguous files.

        A target in a folder of another split counts only if all are, or if the file names that
        folder. A file with a tie has no target.
        once: a target belongs to one file only, the one that fits it best.
        Raises: DataError, ending in `remedy`, if targets in two folders fit equally well, or, with
        `once`, if two files fit one target equally well.
        """
        ties: dict[int, Tie] = {}
        choices = [self.by_stem.get(item.stem.lower(), ()) for item in asked]
        votes: Counter = Counter()
        friendly = set()
        for item, found in zip(asked, choices, strict=True):
            for folder in {_folder(path) for path in found}:
                votes[item.home, folder] += 1
                if self._kinship(item.home, folder)[0]:
                    friendly.add(item.home)
        best: list[tuple | None] = []
        for number, (item, found) in enumerate(zip(asked, choices, strict=True)):
            if item.home in friendly:
                found = [
                    p for p in found if self._kinship(item.home, _folder(p))[0] or _tail(item, p)
                ]
            if len(found) == 1 and not once:
                best.append(((), found[0]))
                continue
            ranked = sorted(
                ((self._score(item, path, votes), path) for path in found), reverse=True
            )
            if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
                first, second = sorted((ranked[0][1], ranked[1][1]))
                if _folder(first) != _folder(second):
                    home = item.home.rstrip("/") or "the folder"
                    raise DataError(f"{first} and {second} both match {home}; {remedy}")
                ties[number] = Tie(first, second)
                ranked = []
            best.append(ranked[0] if ranked else None)
        if once:
            _leave_one(asked, best, remedy)
        return [None if choice is None else choice[1] for choice in best], ties

    def _score(self, item: Wanted, path: str, votes: Counter) -> tuple:
        name = basename(path)
        folder = _folder(path)
        kin = self._kinship(item.home, folder)
        return (
            *(name == item.name, name.lower() == item.name.lower()),
            _tail(item, path),
            *(*kin, votes[item.home, folder], splitext(name)[0] == item.stem),
        )

    def _kinship(self, home: str, folder: str) -> tuple:
        """Return a sort key for how well a folder agrees with a file; their splits count first."""
        key = home, folder
        if key not in self._kin:
            tag = PurePosixPath(home).stem if not home.endswith("/") else ""
            split = split_of(tag) or split_of_folders(home)
            other = split_of_folders(folder)
            parts, own = folder.lower().split("/")[:-1], home.lower().split("/")[:-1]
            self._kin[key] = (
                not (split and other and split != other),
                bool(split) and split == other,
                shared_folders(home, folder),
                bool(tag) and tag.lower().removeprefix("instances_") in parts,
                parts == own,
                bool(_USUAL.search(folder.lower())),
            )
        return self._kin[key]


def shared_folders(one: str, other: str) -> int:
    """Return the number of folders that two paths have in common, from the top."""
    pairs = zip(one.split("/")[:-1], other.split("/")[:-1], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), _depth(one, other))


def _depth(one: str, other: str) -> int:
    return min(one.count("/"), other.count("/"))


def _folder(path: str) -> str:
    return path[: path.rfind("/") + 1]


def _tail(item: Wanted, path: str) -> int:
    """Return the number of last folders that `path` and `item` have in common, ignoring case."""
    pairs = zip(reversed(item.folders), reversed(path.split("/")[:-1]), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0].lower() == pair[1].lower(), pairs))


def _leave_one(asked: list[Wanted], best: list[tuple | None], remedy: str) -> None:
    """Leave each target only to the item that fits it best, in place."""
    owner: dict[str, int] = {}
    for number, choice in enumerate(best):
        other = number if choice is None else owner.setdefault(choice[1], number)
        rival = best[other]
        if other == number or choice is None or rival is None:
            continue
        if rival[0] == choice[0]:
            both = sorted("/".join((*asked[i].folders, asked[i].stem)) for i in (other, number))
            raise DataError(f"{both[0]} and {both[1]} both match {choice[1]}; {remedy}")
        loser = number if rival[0] > choice[0] else other
        owner[choice[1]] = number if loser == other else other
        best[loser] = None
