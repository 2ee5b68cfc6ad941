"""The training targets of SSD's default boxes (section 2.2, "Matching strategy")."""

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor


def label_default_boxes(
    default_boxes: Boxes, gt: Instances, iou_threshold: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """The label of each default box of an image, and the object's box that it is matched with.

    Args:
        default_boxes: R.
        gt: G objects, with `gt_boxes` and `gt_classes`.
        iou_threshold: from which a default box is an object's, whatever others are.
        num_classes: K.

    Returns:
        gt_labels (R,) int64, 0..K-1 a class, K background; gt_boxes (R, 4), which mean something
        for boxes with a class only.
    """
    if not len(gt):
        background = gt.gt_classes.new_full((len(default_boxes),), num_classes)
        return background, torch.zeros_like(default_boxes.tensor)
    iou = pairwise_iou(gt.gt_boxes, default_boxes)  # (G, R)
    best, index = iou.max(0)
    own = match_one_to_one(iou)
    index = torch.where(own >= 0, own, index)
    matched = (own >= 0) | (best >= iou_threshold)
    labels = torch.where(matched, gt.gt_classes[index], num_classes)
    return labels, gt.gt_boxes.tensor[index]


def match_one_to_one(iou: Tensor) -> Tensor:
    """A default box for each object, however small their overlap: the object's index, or -1.

    The pair with the largest IoU of all comes first, then the largest among the objects and
    boxes that are left, as in the authors' code (`MatchBBox`): of two objects that want the same
    box, the one that fits worse takes its next best. An object that overlaps nothing has none.
    Nothing here waits for the device.

    Args:
        iou: (G, R).

    Returns:
        (R,) int64.
    """
    num_objects, num_boxes = iou.shape
    # each of the others can take one box away, so that an object's G best are enough
    iou, boxes = iou.topk(min(num_objects, num_boxes), dim=1)
    rows = torch.arange(num_objects, device=iou.device)[:, None].expand_as(boxes)
    own = boxes.new_full((num_boxes + 1,), -1)  # the last place is for pairs that do not overlap
    for _ in range(num_objects):
        pair = iou.flatten().argmax(keepdim=True)
        row, box, overlap = rows.take(pair), boxes.take(pair), iou.take(pair)
        own.scatter_(0, torch.where(overlap > 0, box, num_boxes), row)
        iou = iou.masked_fill((rows == row) | (boxes == box), -1)
    return own[:num_boxes]
