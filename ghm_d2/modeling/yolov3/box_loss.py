"""YOLOv3's box loss: a weighted sum over positive anchors."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from fvcore.nn import smooth_l1_loss
from torch import Tensor

from ghm_d2.errors import UsageError
from ghm_d2.losses import asl1_loss
from ghm_d2.modeling.loss_choice import LossChoice

CoordinateLoss = Callable[[Tensor, Tensor], Tensor]


def coordinate_loss(choice: LossChoice) -> CoordinateLoss | None:
    """Return the chosen loss of a coordinate: L2, smooth L1 or ASL1; None for GHM-R.

    Raises:
        UsageError: its parameter is out of range.
    """
    if choice.box_reg_loss_type == "smooth_l1":
        beta = choice.smooth_l1_beta
        if not 0 <= beta < math.inf:
            raise UsageError(f"MODEL.YOLOV3.SMOOTH_L1_BETA must be at least 0, not {beta}")
        return partial(smooth_l1_loss, beta=beta)
    if choice.box_reg_loss_type == "asl1":
        if not 0 < choice.asl1_mu < math.inf:
            raise UsageError(f"MODEL.GHM.REG.MU must be greater than 0, not {choice.asl1_mu}")
        return partial(asl1_loss, mu=choice.asl1_mu)
    return half_squared_error if choice.box_reg_loss_type == "l2" else None


def half_squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """Half the squared error, whose gradient is prediction minus truth (arXiv 1804.02767, 2.1)."""
    return 0.5 * (pred - target) ** 2


def box_loss(
    pred: Sequence[Tensor],
    target: Sequence[Tensor],
    boxes: Sequence[Tensor],
    positive: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    loss: CoordinateLoss,
) -> Tensor:
    """Return the loss summed over positive anchors, each weighted by `box_weights`.

    Args:
        pred, target: results of `past_sigmoid` and `encode_boxes`, (N, R_l, 4) per level. Targets
            of anchors that are not positive may be anything, even NaN.
        boxes: matched boxes in px, (N, R_l, 4) per level.
        positive: (N, R_l) bool per level.
        image_sizes: height and width of each image in px.
        loss: the loss of a coordinate.
    """
    # filled on the device, because copying numbers to it would wait for it
    areas = torch.stack([boxes[0].new_full((), h * w) for h, w in image_sizes])
    total = pred[0].new_zeros(())
    for p, t, b, mask in zip(pred, target, boxes, positive, strict=True):
        mask = mask[..., None]
        losses = loss(torch.where(mask, p, 0), torch.where(mask, t, 0))
        total = total + (losses * torch.where(mask, box_weights(b, areas), 0)).sum()
    return total


def box_weights(boxes: Tensor, image_areas: Tensor) -> Tensor:
    """Return darknet's weights of boxes, 2 - w * h with sides as fractions of the image, (N, R, 1).

    They lie in [1, 2]. A box larger than its image has the weight 1, like one that fills it.

    Args:
        boxes: (N, R, 4) in px.
        image_areas: (N,) in px squared.
    """
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    return (2 - area / image_areas[:, None]).clamp(min=1)[..., None]
