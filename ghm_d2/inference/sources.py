"""Finds the images and videos that files, folders and patterns name."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ghm_d2.data.images import SUFFIXES
from ghm_d2.errors import DataError

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


class Sources(NamedTuple):
    """Images and videos, each once and in order; `named` are those that the user named one by one.

    The others come from folders and patterns.
    """

    images: list[Path]
    videos: list[Path]
    named: set[Path]


def find_sources(sources: Sequence[str]) -> Sources:
    """Return the images and the videos that `sources` name.

    Args:
        sources: files; folders, for the images and videos in them but not in their subfolders;
            patterns such as "photos/**/*.jpg".

    Raises:
        DataError: a source does not exist, or has no image or video.
    """
    found: list[Path] = []
    named: set[Path] = set()
    for source in sources:
        here = _files(source)
        if not here:
            raise DataError(f"no image or video found: {source}{_deeper(source)}")
        found += here
        if Path(source).is_file():
            named.add(Path(source))
    distinct = list(dict.fromkeys(found))
    videos = [file for file in distinct if file.suffix.lower() in VIDEOS]
    images = [file for file in distinct if file not in set(videos)]
    return Sources(images, videos, named)


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = sorted(path.iterdir())
    else:
        inside = sorted(Path(name) for name in glob.glob(source, recursive=True))
    return [f for f in inside if f.is_file() and f.suffix.lower() in (*SUFFIXES, *VIDEOS)]


def _deeper(source: str) -> str:
    """Return a hint at a pattern if only subfolders have images or videos, otherwise ""."""
    pattern = str(Path(glob.escape(source)) / "**")
    if not Path(source).is_dir() or not _files(pattern):
        return ""
    return f"; its subfolders contain some, which the pattern '{pattern}' finds"
