"""AP on resamples of the test images: how much it depends on the choice of images."""

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
_BLOCK = 2**20  # counts of detections that are processed at once


def image_bootstrap(dataset_name: str, detections: Sequence[dict]) -> dict:
    """Return box AP on `REPLICATES` resamples of a data set's images, drawn with replacement.

    The resamples depend on the image ids alone, so detectors evaluated on the same images share
    them: the difference of two detectors' replicates is a replicate of their difference.
    It takes a second for 60 images, and half a minute of one core for COCO's 5,000.

    Args:
        dataset_name: registered, with a COCO JSON.
        detections: of all its images, in COCO's result format, with the data set's category ids.

    Returns:
        the entry of analysis.json: "set", a hash of the image ids; "images", their number; "AP",
        a percentage for each resample, or null for a resample without a box.
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
    """Return COCO's box AP with each image counted as often as its weight says.

    Args:
        truth: the ground truth of n images.
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
    """Return pycocotools' matches of boxes of all sizes, by class and image."""
    boxes = [{k: v for k, v in d.items() if k != "segmentation"} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        found = COCOeval(truth, truth.loadRes(boxes) if boxes else COCO(), "bbox")
        found.params.areaRng, found.params.areaRngLbl = found.params.areaRng[:1], ["all"]
        found.params.maxDets = found.params.maxDets[-1:]
        found.evaluate()
    return found


def _class_ap(cells: Sequence[dict | None], weights: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Return a class's AP in [0, 1], (B,), the mean over IoU thresholds; NaN without a box to find.

    Args:
        cells: pycocotools' matches in each of n images; None for an image without boxes.
        weights: (B, n).
        recalls: the recalls at which precision is read.
    """
    there = [(i, cell) for i, cell in enumerate(cells) if cell is not None]
    boxes = np.zeros(len(weights), int)
    for i, cell in there:
        boxes += weights[:, i] * np.sum(~cell["gtIgnore"].astype(bool))
    ap = np.where(boxes > 0, 0.0, np.nan)
    scores = np.concatenate([cell["dtScores"] for _, cell in there]) if there else np.zeros(0)
    if not len(scores) or not boxes.any():
        return ap
    order = np.argsort(-scores, kind="mergesort")  # stable, like pycocotools
    image = np.concatenate([[i] * len(cell["dtScores"]) for i, cell in there])[order].astype(int)
    matched = np.concatenate([cell["dtMatches"] for _, cell in there], axis=1)[:, order] > 0
    ignored = np.concatenate([cell["dtIgnore"] for _, cell in there], axis=1)[:, order].astype(bool)
    rows = max(1, _BLOCK // len(order))
    for start in range(0, len(weights), rows):
        block = slice(start, start + rows)
        counts = weights[block, image].astype(np.int32)
        by_iou = _average_precision(matched, ignored, counts, boxes[block], recalls)
        ap[block] = np.where(boxes[block] > 0, by_iou.mean(axis=0), np.nan)
    return ap


def _average_precision(
    matched: np.ndarray,
    ignored: np.ndarray,
    counts: np.ndarray,
    boxes: np.ndarray,
    recalls: np.ndarray,
) -> np.ndarray:
    """Return AP at each of T IoU thresholds, (T, B).

    Precision is computed only at correct detections, where it has its maxima and recall its steps.

    Args:
        matched, ignored: (T, D), for detections in order of falling score.
        counts: (B, D), how often each detection is counted.
        boxes: (B,), number of boxes to find.
    """
    all_seen = np.cumsum(counts, axis=1)
    ap = np.zeros((len(matched), len(counts)))
    for t, (hit, skip) in enumerate(zip(matched, ignored, strict=True)):
        seen = np.cumsum(counts * ~skip, axis=1) if skip.any() else all_seen
        true = np.flatnonzero(hit & ~skip)
        right = np.cumsum(counts[:, true], axis=1)
        precision = np.zeros((len(counts), len(true) + 1))  # 0 at a recall that is not reached
        precision[:, :-1] = right / (seen[:, true] + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = right / np.maximum(boxes, 1)[:, None]
        at = np.stack([np.searchsorted(row, recalls) for row in recall])
        ap[t] = np.take_along_axis(precision, at, axis=1).mean(axis=1)
    return ap
