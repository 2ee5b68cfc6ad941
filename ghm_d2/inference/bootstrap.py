"""AP on resamples of the test images: how far it hangs on which images were chosen."""

import contextlib
import hashlib
import io
import json
from collections.abc import Sequence

import numpy as np
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

REPLICATES = 200  # the standard error of a standard deviation is then 5 % of it
_DIGITS = 2


def image_bootstrap(dataset_name: str, detections: Sequence[dict]) -> dict:
    """Box AP on `REPLICATES` resamples of a data set's images, drawn with replacement.

    The resamples depend on the image ids alone, so that detectors judged on the same images share
    them: the difference of two detectors' replicates is a replicate of their difference.

    Args:
        dataset_name: registered, with a COCO JSON.
        detections: of all its images, in COCO's result format, with the data set's category ids.

    Returns:
        what analysis.json keeps: "set", a hash of the image ids; "images", how many there are;
        "AP", a percentage for each resample, or null where it has no box to find.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth = COCO(MetadataCatalog.get(dataset_name).json_file)
    ids = sorted(truth.getImgIds())
    name = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]
    rng = np.random.default_rng(int(name, 16))
    weights = rng.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), REPLICATES)
    ap = weighted_ap(truth, detections, weights)
    rounded = [None if np.isnan(value) else round(float(value), _DIGITS) for value in ap]
    return {"set": name, "images": len(ids), "AP": rounded}


def weighted_ap(truth: COCO, detections: Sequence[dict], weights: np.ndarray) -> np.ndarray:
    """COCO's box AP with each image counted as often as its weight says.

    Args:
        truth: n images.
        detections: in COCO's result format.
        weights: (B, n) integers from 0; columns in the order of the sorted image ids.

    Returns:
        (B,) percentages; NaN where the images with a weight have no box. With weights of 1 it is
        the AP of pycocotools.
    """
    found = _match(truth, detections)
    classes, images = len(found.params.catIds), len(found.params.imgIds)
    cells = np.array(found.evalImgs, dtype=object).reshape(classes, images)
    each = [_class_ap(row, weights, found.params.recThrs) for row in cells]
    there = np.stack([~np.isnan(ap) for ap in each])  # (K, B)
    total = np.nansum(np.stack(each), axis=0)
    with np.errstate(invalid="ignore"):
        return 100 * total / there.sum(axis=0)


def _match(truth: COCO, detections: Sequence[dict]) -> COCOeval:
    """pycocotools' matches of boxes of all sizes, by class and image."""
    boxes = [{k: v for k, v in d.items() if k != "segmentation"} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        found = COCOeval(truth, truth.loadRes(boxes) if boxes else COCO(), "bbox")
        found.params.areaRng, found.params.areaRngLbl = found.params.areaRng[:1], ["all"]
        found.params.maxDets = found.params.maxDets[-1:]
        found.evaluate()
    return found


def _class_ap(cells: Sequence[dict | None], weights: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """(B,) AP of a class in [0, 1], the mean over IoU thresholds; NaN without a box to find.

    Args:
        cells: pycocotools' matches in each of n images; None where there is nothing.
        weights: (B, n).
        recalls: at which precision is read.
    """
    there = [(i, cell) for i, cell in enumerate(cells) if cell is not None]
    boxes = sum(weights[:, i] * np.sum(~cell["gtIgnore"].astype(bool)) for i, cell in there)
    ap = np.full(len(weights), np.nan)
    if not np.any(boxes):
        return ap
    ap[boxes > 0] = 0
    scores = np.concatenate([cell["dtScores"] for _, cell in there])
    if not len(scores):
        return ap
    order = np.argsort(-scores, kind="mergesort")  # as pycocotools, which keeps the order of equals
    image = np.concatenate([[i] * len(cell["dtScores"]) for i, cell in there])[order].astype(int)
    matched = np.concatenate([cell["dtMatches"] for _, cell in there], axis=1)[:, order] > 0
    ignored = np.concatenate([cell["dtIgnore"] for _, cell in there], axis=1)[:, order].astype(bool)
    by_iou = [
        _average_precision(hit & ~skip, ~hit & ~skip, weights[:, image], boxes, recalls)
        for hit, skip in zip(matched, ignored, strict=True)
    ]
    return np.where(boxes > 0, np.mean(by_iou, axis=0), np.nan)


def _average_precision(
    true: np.ndarray, false: np.ndarray, counts: np.ndarray, boxes: np.ndarray, recalls: np.ndarray
) -> np.ndarray:
    """(B,) AP at one IoU threshold.

    Args:
        true, false: (D,) whether a detection is right or wrong, by falling score; neither where
            it is ignored.
        counts: (B, D) how often each is counted.
        boxes: (B,) to be found.
    """
    kept = true | false
    right = np.cumsum(counts[:, kept] * true[kept], axis=1)
    if not right.shape[1]:
        return np.zeros(len(counts))
    precision = right / (np.cumsum(counts[:, kept], axis=1) + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = right / np.maximum(boxes, 1)[:, None]
    padded = np.pad(precision, ((0, 0), (0, 1)))  # 0 at a recall that is not reached
    at = np.stack([np.searchsorted(row, recalls) for row in recall])
    return np.take_along_axis(padded, at, axis=1).mean(axis=1)
