"""Lists the files of a folder once, without those that operating systems add."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from ghm_d2.data.images import SUFFIXES
from ghm_d2.data.output import REPORTS
from ghm_d2.errors import DataError

MOST_FILES = 5_000_000
_ELSEWHERE = "__MACOSX"  # macOS adds it to archives: files with the same names that are not images


@dataclass
class Listing:
    """Every file below `root`, as sorted POSIX paths relative to it."""

    root: Path  # absolute
    files: list[str]
    images: list[str] = field(init=False)

    def __post_init__(self):
        self.images = self.of(*SUFFIXES)

    def of(self, *suffixes: str) -> list[str]:
        """The files with one of these suffixes, in upper case or lower."""
        return [name for name in self.files if name.lower().endswith(suffixes)]


def list_folder(root: Path) -> Listing:
    """List `root` without hidden files and folders, `__MACOSX`, and earlier output of `ghm data`.

    Links to folders are followed, each folder once. Pipes, devices and broken links are left out,
    except those named like images, which are reported later.
    Raises: DataError above MOST_FILES files.
    """
    files: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        ours = folder != str(root) and REPORTS & set(names)
        if (status.st_dev, status.st_ino) in seen or ours:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not _hidden(name))
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        for name in names:
            image = name.lower().endswith(SUFFIXES)
            if not _hidden(name) and (image or os.path.isfile(os.path.join(folder, name))):
                files.append(prefix + name)
        if len(files) > MOST_FILES:
            raise DataError(
                f"{root}: more than {MOST_FILES} files; pass the folder of the data set alone"
            )
    return Listing(root, sorted(files))


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first `count` bytes of a file; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == _ELSEWHERE
