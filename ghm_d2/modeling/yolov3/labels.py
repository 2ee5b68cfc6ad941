"""YOLOv3's priors, their training targets, and the encoding of boxes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from ghm_d2.modeling.labels import all_background, label_images


class PriorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchor generator with given widths and heights, centred in each cell.

    Args:
        shapes: (width, height) in px of each level's priors.
        strides: px per cell of each level.
    """

    def __init__(self, shapes: Sequence[Sequence[Sequence[float]]], strides: Sequence[int]):
        super().__init__(sizes=shapes, aspect_ratios=[[1.0]], strides=list(strides), offset=0.5)

    def generate_cell_anchors(self, sizes, aspect_ratios) -> Tensor:
        """Return (A, 4) boxes around (0, 0) from pairs `sizes`; `aspect_ratios` is not used."""
        half = torch.tensor(sizes, dtype=torch.float32) / 2
        return torch.cat([-half, half], dim=1)


class _Priors(NamedTuple):
    """The P priors of all levels; each field has one row per prior."""

    shape: Tensor  # (P, 2) width and height in px
    stride: Tensor  # (P, 1) px per cell of its level
    grid: Tensor  # (P, 2) columns and rows of its level
    step: Tensor  # (P,) anchors per cell of its level
    first: Tensor  # (P,) index of its first anchor, among all R


@torch.no_grad()
def label_priors(
    anchors: list[Boxes],
    generator: PriorGenerator,
    gt_instances: list[Instances],
    num_classes: int,
    ignore_iou: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each anchor's label and the box that it is matched with, for each image.

    Each object has one positive anchor (arXiv 1804.02767, section 2.1). It belongs to the prior, of
    all levels, whose shape overlaps the object's the most, and lies in the cell of the object's
    centre. Other anchors that overlap an object by more than `ignore_iou` are ignored, and the rest
    are background. "Overlap" is that of the anchor, as in the paper ("if the bounding box prior is
    not the best but does overlap..."). darknet's code uses the predicted box instead. Labels then
    change with the weights, and two losses could not be compared on the same targets.

    If two objects share an anchor, the later object gets it, as in darknet. A centre on the border
    or outside belongs to the nearest cell. Boxes without an area do not count as objects.

    Args:
        anchors: the anchors of each level of `generator`, R in all.
        gt_instances: the objects of each image.
        num_classes: K.
        ignore_iou: at most 1.

    Returns:
        gt_labels, (R,) int64 per image: 0..K-1 a class, K background, -1 ignored; and gt_boxes,
        (R, 4) per image, which are meaningful for positive anchors only.
    """
    priors, every = _priors(anchors, generator), Boxes.cat(anchors)
    return label_images(lambda gt: _label(every, priors, gt, num_classes, ignore_iou), gt_instances)


def _priors(anchors: list[Boxes], generator: PriorGenerator) -> _Priors:
    rows, first = [], 0
    for level, stride, a in zip(anchors, generator.strides, generator.num_anchors, strict=True):
        corner, end = level.tensor[:a].split(2, dim=1)
        # the last anchor's centre gives the number of cells without waiting for the device
        last = level.tensor[-1].view(2, 2).mean(0)
        grid = (last / stride + 0.5).round().long()
        index = torch.arange(a, device=corner.device)
        column = corner.new_full((a, 1), stride)
        rows.append((end - corner, column, grid.expand(a, 2), index * 0 + a, first + index))
        first += len(level)
    return _Priors(*(torch.cat(field) for field in zip(*rows, strict=True)))


def _label(anchors, priors, gt, num_classes, ignore_iou) -> tuple[Tensor, Tensor]:
    if not len(gt):
        return all_background(anchors, gt, num_classes)
    boxes = gt.gt_boxes.tensor
    size = boxes[:, 2:] - boxes[:, :2]
    valid = (size > 0).all(1) & boxes.isfinite().all(1)  # (G,)
    slot = _anchor_of(boxes, size, priors)
    slot = torch.where(valid, slot, len(anchors))  # an extra row takes objects without an anchor
    owner = slot.new_full((len(anchors) + 1,), -1)
    objects = torch.arange(len(gt), device=slot.device)
    owner = owner.scatter_reduce(0, slot, objects, "amax")[:-1]  # (R,) the last object, or -1

    iou = torch.where(valid[:, None], pairwise_iou(gt.gt_boxes, anchors), 0)  # (G, R)
    others = torch.where(iou.amax(0) > ignore_iou, -1, num_classes)
    index = owner.clamp(min=0)
    return torch.where(owner >= 0, gt.gt_classes[index], others), boxes[index]


def _anchor_of(boxes: Tensor, size: Tensor, priors: _Priors) -> Tensor:
    """Return the index of each box's anchor, (G,), for boxes (G, 4)."""
    common = torch.minimum(size[:, None], priors.shape).prod(-1)  # (G, P), same centre
    union = size.prod(1)[:, None] + priors.shape.prod(1) - common
    best = (common / union).argmax(1)
    centre = boxes.view(-1, 2, 2).mean(1)
    cell = (centre / priors.stride[best]).floor().long().clamp(min=0)
    cell = torch.minimum(cell, priors.grid[best] - 1)
    column, row = cell.unbind(1)
    return priors.first[best] + (row * priors.grid[best, 0] + column) * priors.step[best]


def box_values(predictions: Tensor) -> Tensor:
    """Return sigma(tx), sigma(ty), tw, th, (..., 4), from raw predictions (..., 4 or more)."""
    return torch.cat([predictions[..., :2].sigmoid(), predictions[..., 2:4]], dim=-1)


def past_sigmoid(predictions: Tensor) -> Tensor:
    """Return `box_values` whose gradient reaches the raw predictions unchanged, as darknet's does.

    The gradient leaves out the sigmoid's slope, which is at most 1/4 and near 0 where the sigmoid
    is flat. A squared error then has the gradient of cross entropy. GHM-R then goes
    by the gradient at the network's raw output, as in other detectors.
    """
    raw = predictions[..., :4]
    return raw - raw.detach() + box_values(predictions).detach()


def encode_boxes(anchors: Tensor, boxes: Tensor, stride: int) -> Tensor:
    """Return the targets of `box_values`, (..., 4) (arXiv 1804.02767, section 2.1).

    Args:
        anchors, boxes: (..., 4) in px. A box without an area gives NaN or infinite targets.
        stride: px per cell.

    Returns:
        the centre relative to the cell, in cells and clamped to [0, 1]; and the logarithms of
        width and height divided by the anchor's.
    """
    size = anchors[..., 2:] - anchors[..., :2]
    cell = anchors.unflatten(-1, (2, 2)).mean(-2) / stride - 0.5
    centre = boxes.unflatten(-1, (2, 2)).mean(-2) / stride
    gt_size = boxes[..., 2:] - boxes[..., :2]
    return torch.cat([(centre - cell).clamp(0, 1), (gt_size / size).log()], dim=-1)


def anchor_deltas(values: Tensor, anchors: Tensor, stride: int) -> Tensor:
    """Convert `box_values` (..., 4) to deltas of Detectron2's `Box2BoxTransform` with weights 1.

    It clamps the logarithms at log(1000 / 16), so that a box has at most 62.5 times the prior's
    sides.
    """
    size = anchors[..., 2:] - anchors[..., :2]
    return torch.cat([(values[..., :2] - 0.5) * stride / size, values[..., 2:]], dim=-1)
