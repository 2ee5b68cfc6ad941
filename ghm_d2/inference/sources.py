"""Finds the images and videos that files, folders and patterns name."""

import glob
from collections.abc import Sequence
from pathlib import Path

from ghm_d2.errors import DataError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


def find_sources(sources: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Return the images and the videos that `sources` name, each once, in order.

    Args:
        sources: files; folders, for the images and videos in them but not in their subfolders;
            patterns such as "photos/**/*.jpg".

    Raises:
        DataError: a source does not exist, or has no image or video.
    """
    found: list[Path] = []
    for source in sources:
        here = _files(source)
        if not here:
            raise DataError(f"no image or video found: {source}{_deeper(source)}")
        found += here
    distinct = list(dict.fromkeys(found))
    videos = [file for file in distinct if file.suffix.lower() in VIDEOS]
    return [file for file in distinct if file not in set(videos)], videos


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = sorted(path.iterdir())
    else:
        inside = sorted(Path(name) for name in glob.glob(source, recursive=True))
    return [f for f in inside if f.is_file() and f.suffix.lower() in (*IMAGES, *VIDEOS)]


def _deeper(source: str) -> str:
    """Return a hint at a pattern if only subfolders have images or videos, otherwise ""."""
    pattern = str(Path(glob.escape(source)) / "**")
    if not Path(source).is_dir() or not _files(pattern):
        return ""
    return f"; its subfolders contain some, which the pattern '{pattern}' finds"
