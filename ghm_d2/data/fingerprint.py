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


def image_fingerprints(name: str) -> frozenset[str]:
    """Of the content of each image of a registered data set; empty without a COCO JSON.

    Raises:
        DataError: the JSON cannot be read.
    """
    from detectron2.data import MetadataCatalog

    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file") is None:
        return frozenset()
    return _of_images(metadata.json_file, metadata.image_root, stamp(metadata.json_file))


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


@lru_cache(maxsize=16)
def _of_images(json_file: str, image_root: str, _stamp: tuple) -> frozenset[str]:
    paths = (os.path.join(image_root, name) for name in judge(json_file).images)
    return frozenset(content_hash(path).hexdigest() for path in paths if os.path.isfile(path))


@lru_cache(maxsize=16)
def _of_file(path: str, _stamp: tuple) -> str:
    return content_hash(path).hexdigest()[:12]
