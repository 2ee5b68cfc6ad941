"""Hashes of the content of data sets and files, independent of where they are stored."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from ghm_d2.data.checking.validate import inspect_json, stamp
from ghm_d2.files import content_hash


def fingerprint(name: str) -> str:
    """Return a hash, twelve hexadecimal digits, of a data set's JSON and image file sizes.

    A data set without a COCO JSON has unknown content: its name is hashed instead.

    Args:
        name: a name registered with Detectron2.

    Raises:
        DataError: the JSON cannot be read.
    """
    from detectron2.data import MetadataCatalog

    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file") is None:
        return hashlib.sha256(name.encode()).hexdigest()[:12]
    return _of_coco(metadata.json_file, metadata.image_root, stamp(metadata.json_file))


def shared_images(name: str, other: str) -> int:
    """Count the images of one registered data set that another one has too, by content.

    Without a COCO JSON the images are unknown: the result is 1 if both names are equal, else 0.

    Raises:
        DataError: a JSON cannot be read.
    """
    from detectron2.data import MetadataCatalog

    places = []
    for metadata in map(MetadataCatalog.get, (name, other)):
        if metadata.get("json_file") is None:
            return int(name == other)
        places += [metadata.json_file, metadata.image_root, stamp(metadata.json_file)]
    return _count_shared(*places)


def file_fingerprint(path: str) -> str:
    """Return a hash, twelve hexadecimal digits, of a file; `path` itself if it does not exist."""
    return _of_file(path, stamp(path)) if path and Path(path).is_file() else path


# a plan asks for the same files once per run, and COCO's take seconds
@lru_cache(maxsize=16)
def _of_coco(json_file: str, image_root: str, _stamp: tuple) -> str:
    content = content_hash(json_file)
    for name in inspect_json(json_file).images:
        path = os.path.join(image_root, name)
        content.update(f"{os.path.getsize(path) if os.path.isfile(path) else -1} ".encode())
    return content.hexdigest()[:12]


@lru_cache(maxsize=64)
def _count_shared(json_file: str, root: str, _stamp: tuple, *other) -> int:
    mine, theirs = _by_size(json_file, root), _by_size(*other[:2])
    sizes = mine.keys() & theirs.keys()  # files of other sizes need not be read
    known = {content_hash(path).digest() for size in sizes for path in theirs[size]}
    return sum(content_hash(path).digest() in known for size in sizes for path in mine[size])


def _by_size(json_file: str, image_root: str) -> dict[int, list[str]]:
    """Return size in bytes -> the paths of a data set's image files with that size."""
    found: dict[int, list[str]] = {}
    for path in (os.path.join(image_root, name) for name in inspect_json(json_file).images):
        if os.path.isfile(path):
            found.setdefault(os.path.getsize(path), []).append(path)
    return found


@lru_cache(maxsize=16)
def _of_file(path: str, _stamp: tuple) -> str:
    return content_hash(path).hexdigest()[:12]
