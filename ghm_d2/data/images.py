"""Decodes images from unknown sources: every fault is a DataError that names the file."""

import hashlib
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ghm_d2.errors import DataError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Without this list Pillow also guesses formats such as EPS, which it hands to Ghostscript.
# (Cameras' MPO is read as JPEG.)
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
_EXIF_ORIENTATION = 0x0112


class Probe(NamedTuple):
    """A decoded image's size in pixels as Detectron2 sees it, and its content."""

    width: int
    height: int
    rotated: bool  # an EXIF orientation swaps the sides
    mode: str  # Pillow's mode of the file
    digest: str  # hash of the decoded RGB pixels: a copy with other metadata is still a copy


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Decode `path` completely.

    Returns: uint8 RGB, (height, width, 3), turned upright by its EXIF orientation.
    Raises: DataError naming the file if it is missing, truncated, not an image, or larger than
    Pillow's `MAX_IMAGE_PIXELS`.
    """
    return np.asarray(_decode(path)[0])


def probe(path: str | os.PathLike) -> Probe:
    """Decode `path` completely and describe it. Raises as `read_image` does."""
    image, mode, rotated = _decode(path)
    content = hashlib.blake2b(np.asarray(image), digest_size=16)
    content.update(repr(image.size).encode())
    return Probe(*image.size, rotated, mode, content.hexdigest())


def in_threads(function, things: list) -> Iterator:
    """Yield `function(thing)` for each thing, in order, computed in one thread per core.

    Meant for decoding, while Pillow releases Python's lock. Closing the iterator ends the work.
    """
    pool = ThreadPoolExecutor(os.cpu_count())
    # Set once around the pool, because warning filters belong to the whole process. An image that
    # is too large is an error anyway.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            yield from pool.map(function, things)
        finally:
            pool.shutdown(cancel_futures=True)


def _decode(path: str | os.PathLike) -> tuple[Image.Image, str, bool]:
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"{path}: not a file")  # opening a pipe waits for ever
    try:
        with Image.open(path, formats=FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise DataError(
                    f"{path}: {image.width} x {image.height} px exceeds the limit of {limit} px"
                )
            mode, orientation = image.mode, image.getexif().get(_EXIF_ORIENTATION, 1)
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGB"), mode, orientation in (5, 6, 7, 8)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # on damaged files decoders raise anything, struct.error among them
        if _is_pointer(path):
            raise DataError(f"{path}: Git LFS pointer, not an image; run `git lfs pull`") from None
        raise DataError(f"{path}: cannot be decoded ({_one_line(error)})") from None


def _is_pointer(path: str | os.PathLike) -> bool:
    """Return whether the file is a Git LFS pointer in place of a large file."""
    try:
        with open(path, "rb") as file:
            return file.read(20) == b"version https://git-"
    except OSError:
        return False


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
