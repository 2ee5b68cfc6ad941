"""Names for the content of data sets and files, wherever they lie."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from ghm_d2.data.checking.validate import judge, stamp
from ghm_d2.files import content_hash


def fingerprint(name: str) -> str:
    """Twelve hexadecimal digits of a registered data set: its annotations, and its images' sizes.

    Of a data set without a COCO JSON it is the hash of its name: what it holds is unknown.

    Args:
        name: registered with Detectron2.

    Raises:
        DataError: the JSON cannot be read.
    """
    from detectron2.data import MetadataCatalog

    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file") is None:
        return hashlib.sha256(name.encode()).hexdigest()[:12]
    return _of_coco(metadata.json_file, metadata.image_root, stamp(metadata.json_file))


def shared_images(name: str, other: str) -> int:
    """The number of images of one registered data set that another one has too, by content.

    A data set without a COCO JSON is only known to share its images with itself: 1.

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
    """Twelve hexadecimal digits of a file's content; `path` itself where there is no such file."""
    return _of_file(path, stamp(path)) if path and Path(path).is_file() else path


# a plan asks for the same files once a run; COCO's take seconds
@lru_cache(maxsize=16)
def _of_coco(json_file: str, image_root: str, _stamp: tuple) -> str:
    content = content_hash(json_file)
    for name in judge(json_file).images:
        path = os.path.join(image_root, name)
        content.update(f"{os.path.getsize(path) if os.path.isfile(path) else -1} ".encode())
    return content.hexdigest()[:12]


@lru_cache(maxsize=64)
def _count_shared(json_file: str, root: str, _stamp: tuple, *other) -> int:
    mine, theirs = _by_size(json_file, root), _by_size(*other[:2])
    sizes = mine.keys() & theirs.keys()  # the others need not be read
    known = {content_hash(path).digest() for size in sizes for path in theirs[size]}
    return sum(content_hash(path).digest() in known for size in sizes for path in mine[size])


def _by_size(json_file: str, image_root: str) -> dict[int, list[str]]:
    """The paths of a data set's image files by their sizes in bytes."""
    found: dict[int, list[str]] = {}
    for path in (os.path.join(image_root, name) for name in judge(json_file).images):
        if os.path.isfile(path):
            found.setdefault(os.path.getsize(path), []).append(path)
    return found


@lru_cache(maxsize=16)
def _of_file(path: str, _stamp: tuple) -> str:
    return content_hash(path).hexdigest()[:12]
