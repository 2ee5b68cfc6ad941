"""Adaptive training sample selection (ATSS): each object sets its own IoU threshold.

Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training
Sample Selection", arXiv 1912.02424, algorithm 1.
"""

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from ghm_d2.modeling.labels import all_background, label_images

TOPK = 9  # candidates per object, level and anchor of a location; the paper's k
_INSIDE = 0.01  # px that a centre must be inside an object's sides, as in the authors' code


def label_by_atss(
    anchors: list[Boxes], gt_instances: list[Instances], num_classes: int, per_location: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each anchor's label and the box that it is matched with, for each image.

    Args:
        anchors: the anchors of each feature level, R in all.
        gt_instances: the objects of each image.
        num_classes: K.
        per_location: anchors at each location of a feature map.

    Returns:
        gt_labels, (R,) int64 per image: 0..K-1 a class, K background; and gt_boxes, (R, 4) per
        image, which are meaningful for foreground anchors only.
    """
    return label_images(
        lambda gt: _label_image(anchors, gt, num_classes, per_location), gt_instances
    )


def _label_image(anchors, gt, num_classes: int, per_location: int) -> tuple[Tensor, Tensor]:
    all_anchors = Boxes.cat(anchors)
    if not len(gt):
        return all_background(all_anchors, gt, num_classes)
    iou = pairwise_iou(gt.gt_boxes, all_anchors)  # (G, R)
    candidate = _candidates(anchors, gt.gt_boxes, per_location)
    foreground = candidate & (iou >= _threshold(iou, candidate)) & _inside(all_anchors, gt.gt_boxes)
    best, index = torch.where(foreground, iou, -1).max(0)  # the object of the largest IoU
    labels = torch.where(best >= 0, gt.gt_classes[index], num_classes)
    return labels, gt.gt_boxes.tensor[index]


def _candidates(anchors: list[Boxes], objects: Boxes, per_location: int) -> Tensor:
    """Return a mask (G, R) of the anchors of each level with centres nearest to the object's."""
    levels = []
    for level in anchors:
        centers = objects.get_centers(), level.get_centers()
        # the form by matrix products, PyTorch's choice for many rows, is inexact in float32
        distance = torch.cdist(*centers, compute_mode="donot_use_mm_for_euclid_dist")  # (G, R_l)
        k = min(TOPK * per_location, len(level))
        nearest = distance.topk(k, dim=1, largest=False).indices
        levels.append(torch.zeros_like(distance, dtype=torch.bool).scatter_(1, nearest, True))
    return torch.cat(levels, dim=1)


def _threshold(iou: Tensor, candidate: Tensor) -> Tensor:
    """Return the mean plus the standard deviation of the candidates' IoU, (G, 1)."""
    number = candidate.sum(1, keepdim=True)
    mean = torch.where(candidate, iou, 0).sum(1, keepdim=True) / number
    squares = torch.where(candidate, iou - mean, 0).square().sum(1, keepdim=True)
    return mean + (squares / (number - 1).clamp(min=1)).sqrt()


def _inside(anchors: Boxes, objects: Boxes) -> Tensor:
    """Return whether each anchor's centre is inside each object: (G, R) bool."""
    centers = anchors.get_centers()
    corner, end = objects.tensor[:, None, :2], objects.tensor[:, None, 2:]
    return torch.cat([centers - corner, end - centers], dim=-1).amin(-1) > _INSIDE
