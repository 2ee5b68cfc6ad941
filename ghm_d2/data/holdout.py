"""Holds out a part of the training split, so that a search never sees the reported data."""

import os
import random
from collections.abc import Callable
from pathlib import Path

from ghm_d2.data.coco_json import load_json, write_json
from ghm_d2.data.output import new_folder
from ghm_d2.data.registered import is_lvis
from ghm_d2.errors import DataError, UsageError

SHARE = 0.2  # of the images, which become val
SEED = 0  # of the draw


def write_holdout(train_name: str, folder: Path) -> None:
    """Write a data set folder whose train and val are parts of the registered split `train_name`.

    SHARE of the images, at least one and not all, become val. The images are linked. An existing
    folder is kept; if its link is broken, it is renewed.

    Args:
        train_name: a split registered with Detectron2 that has a COCO JSON.
        folder: the output, a folder like those of `ghm data import`.

    Raises:
        UsageError: the split is of LVIS.
        DataError: no COCO JSON, or fewer than two images.
    """

    def held_out(images: list[dict]) -> list[dict]:
        return images[: min(max(1, round(SHARE * len(images))), len(images) - 1)]

    _write_part(train_name, folder, held_out)


def write_fold(train_name: str, folder: Path, fold: int, folds: int) -> None:
    """Write a folder as `write_holdout` does, with one of `folds` equal parts as val.

    An image that is listed twice stays in one part.

    Args:
        fold: 0 to `folds` - 1.
        folds: 2 or more.

    Raises:
        UsageError: the split is of LVIS.
        DataError: no COCO JSON, or fewer images than folds.
    """

    def held_out(images: list[dict]) -> list[dict]:
        names = list(dict.fromkeys(image["file_name"] for image in images))
        chosen = set(names[fold::folds])
        return [image for image in images if image["file_name"] in chosen]

    _write_part(train_name, folder, held_out, folds)


def _write_part(
    train_name: str,
    folder: Path,
    held_out: Callable[[list[dict]], list[dict]],
    fewest: int = 2,
) -> None:
    """Divide a split into train.json and val.json in `folder`.

    held_out: chooses val's images from a list of all images in random order.
    """
    from detectron2.data import MetadataCatalog

    if is_lvis(train_name):  # a folder's val is judged by COCO's AP, which is another one
        raise UsageError(
            f"{train_name} cannot be divided for a search: LVIS annotates only part of the classes "
            "in each image; search on other data with --search-on"
        )
    folder = Path(folder)
    metadata = MetadataCatalog.get(train_name)
    if (folder / "val.json").is_file():
        _link_again(folder / "images", metadata.image_root)
        return
    if metadata.get("json_file") is None:
        raise DataError(
            f"{train_name}: the data set is registered without a COCO JSON, so it cannot be split"
        )
    coco = load_json(metadata.json_file)
    images = sorted(coco["images"], key=lambda image: image["id"])
    if len(images) < fewest:
        raise DataError(
            f"{train_name}: {len(images)} images are too few to hold some out; at least {fewest} "
            "are needed"
        )
    random.Random(SEED).shuffle(images)
    val = {image["id"] for image in held_out(images)}
    try:
        with new_folder(folder) as draft:
            os.symlink(os.path.abspath(metadata.image_root), draft / "images")
            write_json(draft / "train.json", _part(coco, {i["id"] for i in images} - val))
            write_json(draft / "val.json", _part(coco, val))
    except UsageError:
        if not (folder / "val.json").is_file():
            raise
        # another process was quicker; what it wrote is the same


def _link_again(link: Path, image_root: str) -> None:
    """Renew a broken link to the images, which may have been moved since."""
    if link.exists():
        return
    unfinished = link.with_name(f".images.{os.getpid()}")
    os.symlink(os.path.abspath(image_root), unfinished)
    os.replace(unfinished, link)


def _part(coco: dict, ids: set[int]) -> dict:
    return coco | {
        "images": [image for image in coco["images"] if image["id"] in ids],
        "annotations": [a for a in coco["annotations"] if a["image_id"] in ids],
    }
