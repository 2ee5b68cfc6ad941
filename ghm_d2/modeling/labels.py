"""Training targets of RetinaNet's anchors: Detectron2's, without its waits for the device.

`label_images` and `all_background` serve the other detectors too.
"""

from collections.abc import Callable

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor


def label_anchors(
    anchors: list[Boxes], gt_instances: list[Instances], matcher: Matcher, num_classes: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each anchor's label and the box that it is matched with, for each image.

    Args:
        anchors: the anchors of each feature level, R in all.
        gt_instances: the objects of each image.
        matcher: sets the thresholds, their labels and whether low-quality matches count.
        num_classes: K.

    Returns:
        gt_labels, (R,) int64 per image: 0..K-1 a class, K background, -1 ignored; and gt_boxes,
        (R, 4) per image, which are meaningful for foreground anchors only.
    """
    every = Boxes.cat(anchors)
    return label_images(lambda gt: _label_image(every, gt, matcher, num_classes), gt_instances)


def label_images(
    label_image: Callable[[Instances], tuple], gt_instances: list[Instances]
) -> tuple[list, list]:
    """Return the labels and the matched boxes of each image, from a function that labels one."""
    labels, boxes = zip(*map(label_image, gt_instances), strict=True)
    return list(labels), list(boxes)


def all_background(anchors: Boxes, gt: Instances, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return labels (R,), all K, and boxes (R, 4) of zeros, for an image without objects."""
    labels = gt.gt_classes.new_full((len(anchors),), num_classes)
    return labels, torch.zeros_like(anchors.tensor)


def _label_image(anchors, gt, matcher, num_classes) -> tuple[Tensor, Tensor]:
    if not len(gt):
        return all_background(anchors, gt, num_classes)
    iou = pairwise_iou(gt.gt_boxes, anchors)  # (G, R)
    best, index = iou.max(0)
    matched = _match_labels(iou, best, matcher)
    labels = torch.where(matched == 0, num_classes, gt.gt_classes[index])
    return torch.where(matched == -1, -1, labels), gt.gt_boxes.tensor[index]


def _match_labels(iou: Tensor, best: Tensor, matcher: Matcher) -> Tensor:
    """Return the labels (R,): 1 foreground, 0 background, -1 ignored.

    Detectron2's matcher waits for the device to check that no IoU is negative, and to list the
    low-quality matches.
    """
    labels = torch.ones_like(best, dtype=torch.int8)
    bounds = zip(matcher.labels, matcher.thresholds[:-1], matcher.thresholds[1:], strict=True)
    for label, low, high in bounds:
        labels.masked_fill_((best >= low) & (best < high), label)
    if matcher.allow_low_quality_matches:
        nearest = (iou == iou.max(1, keepdim=True).values).any(0)
        labels.masked_fill_(nearest, 1)
    return labels


def box_levels(
    anchors: list[Boxes],
    transform: Box2BoxTransform,
    pred_deltas: list[Tensor],
    gt_boxes: list[Tensor],
    pos_mask: Tensor,
    *,
    dense: bool,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return predicted deltas, true deltas and a mask of the foreground for each feature level.

    Selecting the foreground anchors waits for the device. With `dense` all anchors are returned;
    true deltas of background anchors may then be NaN or infinite.

    Args:
        anchors: the anchors of each level.
        transform: converts between boxes and deltas.
        pred_deltas: (N, R_l, 4) per level.
        gt_boxes: (R, 4) per image.
        pos_mask: (N, R) bool, whether an anchor is foreground.
        dense: return all anchors instead of selecting the foreground.

    Returns:
        pred, target (..., 4) and valid (...) of each level.
    """
    sizes = [len(a) for a in anchors]
    boxes = torch.stack(gt_boxes).split(sizes, dim=1)
    levels = []
    for a, p, b, valid in zip(anchors, pred_deltas, boxes, pos_mask.split(sizes, 1), strict=True):
        a = a.tensor.expand_as(b)
        if not dense:
            a, p, b, valid = a[valid], p[valid], b[valid], valid[valid]
        levels.append((p, _deltas(a, b, transform.weights), valid))
    return levels


def _deltas(anchors: Tensor, boxes: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Compute `Box2BoxTransform.get_deltas` without its width check, which waits for the device."""
    corner, end = anchors.unflatten(-1, (2, 2)).unbind(-2)
    gt_corner, gt_end = boxes.unflatten(-1, (2, 2)).unbind(-2)
    size, gt_size = end - corner, gt_end - gt_corner
    shift = (gt_corner + 0.5 * gt_size - (corner + 0.5 * size)) / size
    (wx, wy, ww, wh), (dx, dy), (dw, dh) = (
        weights,
        shift.unbind(-1),
        (gt_size / size).log().unbind(-1),
    )
    return torch.stack((wx * dx, wy * dy, ww * dw, wh * dh), dim=-1)
