"""The training targets of SSD's default boxes (section 2.2, "Matching strategy")."""

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from ghm_d2.modeling.labels import all_background


def label_default_boxes(
    default_boxes: Boxes, gt: Instances, iou_threshold: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Return the label and the matched object's box of each default box of an image.

    Args:
        default_boxes: R default boxes.
        gt: G objects, with `gt_boxes` and `gt_classes`.
        iou_threshold: IoU from which a default box is matched, however many others are.
        num_classes: K.

    Returns:
        gt_labels (R,) int64, 0..K-1 a class, K background; and gt_boxes (R, 4), which are
        meaningful for foreground boxes only.
    """
    if not len(gt):
        return all_background(default_boxes, gt, num_classes)
    iou = pairwise_iou(gt.gt_boxes, default_boxes)  # (G, R)
    best, index = iou.max(0)
    own = match_one_to_one(iou)
    index = torch.where(own >= 0, own, index)
    matched = (own >= 0) | (best >= iou_threshold)
    labels = torch.where(matched, gt.gt_classes[index], num_classes)
    return labels, gt.gt_boxes.tensor[index]


def match_one_to_one(iou: Tensor) -> Tensor:
    """Match each object with one default box, however small their overlap.

    The pair with the largest IoU is matched first, then the best pair of the remaining objects and
    boxes, as in the authors' code (`MatchBBox`). If two objects want the same box, the one with the
    smaller IoU takes its next best. An object that overlaps no box has none. Nothing here waits for
    the device.

    Args:
        iou: (G, R).

    Returns:
        (R,) int64, the index of each box's object, or -1.
    """
    num_objects, num_boxes = iou.shape
    # each other object can take only one box, so that an object's G best boxes are enough
    iou, boxes = iou.topk(min(num_objects, num_boxes), dim=1)
    rows = torch.arange(num_objects, device=iou.device)[:, None].expand_as(boxes)
    own = boxes.new_full((num_boxes + 1,), -1)  # the last place is for pairs that do not overlap
    for _ in range(num_objects):
        pair = iou.flatten().argmax(keepdim=True)
        row, box, overlap = rows.take(pair), boxes.take(pair), iou.take(pair)
        own.scatter_(0, torch.where(overlap > 0, box, num_boxes), row)
        iou = iou.masked_fill((rows == row) | (boxes == box), -1)
    return own[:num_boxes]
