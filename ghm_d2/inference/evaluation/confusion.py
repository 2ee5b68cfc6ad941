"""The confusion matrix: objects that a detector misses, invents or takes for another class."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from detectron2.structures import BoxMode
from faster_coco_eval.core import mask

IOU = 0.5


@dataclass
class ImageErrors:
    """The numbers of `missed` objects and of `false` detections in one image.

    A false detection matches no object, or an object of another class.
    """

    item: dict = field(repr=False)  # the data set dict
    missed: int
    false: int


def best_detections(items: Sequence[dict], detections: Sequence[dict]) -> list[dict]:
    """Return as many of a data set's best detections as it has boxes, best first.

    The level of a detector's scores depends on its training loss, so one score threshold would
    not be fair to all detectors.

    Args:
        items: all data set dicts, with annotations.
        detections: in COCO's result format.
    """
    boxes = sum(not a.get("iscrowd", 0) for item in items for a in item["annotations"])
    return sorted(detections, key=lambda d: -d["score"])[:boxes]


def confuse(
    items: Sequence[dict], detections: Sequence[dict], classes: dict[int, int]
) -> tuple[np.ndarray, list[ImageErrors]]:
    """Return the confusion matrix of `detections`, and the errors of each image.

    In order of falling score, each detection takes one object: the one that it overlaps most, of
    any class, among the objects not yet taken with an IoU of 0.5 or more. A detection in a region
    annotated as a crowd is no error.

    Args:
        items: data set dicts with annotations.
        detections: in COCO's result format.
        classes: category id of a detection -> class of an annotation, 0..K-1.

    Returns:
        (K + 1, K + 1) int64: rows are the true classes, columns the detected ones. The last ones
        are background, so the last column counts missed objects, the last row invented ones.
        Then the errors of each image, in the order of `items`.
    """
    background = len(classes)
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    by_image: dict = {item["image_id"]: [] for item in items}
    for detection in sorted(detections, key=lambda d: -d["score"]):
        by_image[detection["image_id"]].append(detection)
    errors = []
    for item in items:
        found = by_image[item["image_id"]]
        taken = _match(item["annotations"], found)
        objects = [i for i, a in enumerate(item["annotations"]) if not a.get("iscrowd", 0)]
        truth = [a["category_id"] for a in item["annotations"]] + [background]
        false = 0
        for detection, index in zip(found, taken, strict=True):
            if index is not None:
                column = classes[detection["category_id"]]
                matrix[truth[index], column] += 1
                false += truth[index] != column
        missed = set(objects) - set(taken)
        for index in missed:
            matrix[truth[index], background] += 1
        errors.append(ImageErrors(item, missed=len(missed), false=false))
    return matrix, errors


def worst_images(errors: Sequence[ImageErrors], count: int = 10) -> list[ImageErrors]:
    """Return the images with the most errors, worst first; ties in order of file name."""
    return sorted(errors, key=lambda e: (-e.missed - e.false, e.item["file_name"]))[:count]


def _match(annotations: Sequence[dict], found: Sequence[dict]) -> list[int | None]:
    """Return for each detection the index of its annotation, -1 for none, None for a crowd."""
    if not annotations:
        return [-1] * len(found)
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS) for a in annotations]
    crowd = np.array([a.get("iscrowd", 0) for a in annotations], dtype=bool)
    overlaps = np.asarray(
        mask.iou(
            np.array([d["bbox"] for d in found], dtype=float).reshape(-1, 4),
            np.array(boxes, dtype=float),
            crowd.astype(int).tolist(),
        )
    ).reshape(len(found), len(boxes))
    free, taken = ~crowd, []
    for overlap in overlaps:
        best = int(np.where(free, overlap, -1).argmax())
        if free[best] and overlap[best] >= IOU:
            free[best] = False
            taken.append(best)
        else:
            taken.append(None if (overlap[crowd] >= IOU).any() else -1)
    return taken
