"""Annotation noise that keeps the truth beside it, to measure the weight of noise in a loss."""

import numpy as np

from ghm_d2.data import masks
from ghm_d2.data.coco_json import iou

KINDS = ("class", "shift", "missing")
# A shifted box still touches its object, and no evaluation at IoU 0.5 would call it a hit.
_SHIFTED_IOU = (0.1, 0.5)


def spoil(rng: np.random.Generator, annotation: dict, rates: dict, width: int, height: int) -> dict:
    """Return the annotation with at most one kind of noise, drawn with probabilities `rates`.

    Every call draws one number from `rng`, so the rates do not change what is drawn for the other
    annotations of an image. A shifted box takes its mask along, shifted and scaled in the same way;
    its area is that of the new box. A wrong class keeps its mask.
    """
    own = np.random.default_rng(rng.integers(2**63))
    draw, kind = own.random(), "none"
    for name in KINDS:
        if draw < rates[name]:
            kind = name
            break
        draw -= rates[name]
    if kind == "class":
        true = annotation["category_id"]
        wrong = (true - 1 + int(own.integers(1, 10))) % 10 + 1
        return annotation | {"category_id": wrong, "true_category_id": true, "noise": kind}
    if kind == "shift":
        box = _shifted(own, annotation["bbox"], width, height)
        return annotation | {
            "bbox": box,
            "area": box[2] * box[3],
            "true_bbox": annotation["bbox"],
            "segmentation": masks.moved(annotation["segmentation"], annotation["bbox"], box),
            "noise": kind,
        }
    return annotation | {"noise": kind}


def _shifted(rng: np.random.Generator, box: list[int], width: int, height: int) -> list[int]:
    x, y, w, h = box
    nearest = None
    for _ in range(50):
        dx, dy = rng.uniform(-0.7, 0.7, 2)
        scale = rng.uniform(0.7, 1.4, 2)
        new_w, new_h = max(round(w * scale[0]), 2), max(round(h * scale[1]), 2)
        left = np.clip(round(x + w / 2 + dx * w - new_w / 2), 0, width - 2)
        top = np.clip(round(y + h / 2 + dy * h - new_h / 2), 0, height - 2)
        moved = [
            int(left),
            int(top),
            int(min(new_w, width - left)),
            int(min(new_h, height - top)),
        ]
        overlap = iou(box, moved)
        if _SHIFTED_IOU[0] <= overlap < _SHIFTED_IOU[1]:
            return moved
        if nearest is None or abs(overlap - 0.3) < abs(iou(box, nearest) - 0.3):
            nearest = moved
    return nearest
