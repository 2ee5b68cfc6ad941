"""Losses that one-stage detectors share: box losses, and classification losses over sigmoids.

A step first counts foreground anchors and the samples of GHM losses, then adds the counts up over
the processes (`sum_up`), and then computes the losses. `normalizer` is always the whole batch's
divisor, divided by the number of processes.
"""

from collections.abc import Sequence
from functools import partial

import torch
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.events import get_event_storage
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn

from ghm_d2.kernels.dtypes import upcast, wide
from ghm_d2.losses import (
    asl1_loss,
    bce_loss,
    focal_loss,
    ohem_loss,
    quality_focal_loss,
    varifocal_loss,
)
from ghm_d2.losses.density.sync import Count
from ghm_d2.losses.harmonized import CountedLoss
from ghm_d2.modeling.loss_choice import LossChoice

QUALITY_LOSSES = {"qfl": quality_focal_loss, "vfl": varifocal_loss}
LOG_PERIOD = 20  # iterations, as in Detectron2's writers


def count_foreground(pos_mask: Tensor, sync: bool) -> Count:
    """Count the foreground anchors, `pos_mask` (N, R), and log the mean over this process's images.

    On a GPU it logs only every 20 iterations, because the log waits for the device. Within
    torch.compile nothing is logged.
    """
    num_pos = pos_mask.sum()
    if torch.compiler.is_compiling():
        return Count(num_pos, sync=sync)
    storage = get_event_storage()
    if num_pos.device.type == "cpu" or storage.iter % LOG_PERIOD == 0:
        storage.put_scalar("num_pos_anchors", num_pos / len(pos_mask))  # waits for the device
    return Count(num_pos, sync=sync)


def flat_levels(pred: Sequence[Tensor], labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Flatten predictions (N, R_l, K) to (N * R_l, K), labels (N, R) to (N * R_l,) per level."""
    labels = labels.split([x.shape[1] for x in pred], dim=1)
    return [x.flatten(0, 1) for x in pred], [y.flatten() for y in labels]


def begin_ghm(ghm: nn.Module | None, *levels) -> CountedLoss | None:
    """Count the samples of a GHM loss; return None if `ghm` is None."""
    return None if ghm is None else ghm.begin(*levels)


def begin_ghm_c(
    ghm_c: nn.Module | None, choice: LossChoice, pred_logits, gt_labels: Tensor
) -> CountedLoss | None:
    """Return `begin_ghm` for the classes; the arguments are those of `cls_loss`."""
    if ghm_c is None:
        return None
    logits, labels = flat_levels(pred_logits, gt_labels)
    weights = [[choice.weight_of(y) for y in labels]] if choice.class_weights else []
    return ghm_c.begin(logits, labels, *weights)


def cls_loss(
    choice: LossChoice,
    pred_logits: Sequence[Tensor],
    gt_labels: Tensor,
    quality: Tensor | None = None,
    *,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Return the sum of the chosen classification loss over sigmoids, unless it is GHM-C.

    Args:
        pred_logits: (N, R_l, K) per level.
        gt_labels: (N, R).
        quality: (N, R), read only by quality focal and varifocal loss.
        alpha, gamma: the parameters of focal loss.
    """
    weight = choice.weight_of(gt_labels.flatten())
    if choice.cls_loss_type in (*QUALITY_LOSSES, "ohem"):
        logits = torch.cat(list(pred_logits), dim=1).flatten(0, 1)
        labels = gt_labels.flatten()
        if choice.cls_loss_type == "ohem":
            return ohem_loss(logits, labels, weight=weight)
        loss = QUALITY_LOSSES[choice.cls_loss_type]
        return loss(logits, labels, quality.flatten(), reduction="sum", weight=weight)
    if choice.cls_loss_type == "focal":
        loss = partial(focal_loss, alpha=alpha, gamma=gamma)
    else:
        loss = bce_loss
    loss = partial(loss, reduction="sum", kernel=choice.kernel)
    levels = zip(*flat_levels(pred_logits, gt_labels), strict=True)
    return sum(loss(x, y, weight=choice.weight_of(y)) for x, y in levels)


def normalized_cls_loss(
    ghm_c: CountedLoss | None,
    choice: LossChoice,
    pred_logits: Sequence[Tensor],
    gt_labels: Tensor,
    boxes: Sequence,
    normalizer: Tensor,
    **factors: float,
) -> Tensor:
    """Return `loss_cls`: GHM-C's total, or the sum of another loss divided by `normalizer`.

    Args:
        ghm_c: the result of `begin_ghm_c`, after `sum_up`; None if the loss is another one.
        pred_logits, gt_labels: see `cls_loss`.
        boxes: the arguments of `box_quality` from `anchors` on.
        factors: `alpha` and `gamma`, the parameters of focal loss.
    """
    if ghm_c is not None:
        return ghm_c.total()
    quality = box_quality(choice, *boxes)
    return cls_loss(choice, pred_logits, gt_labels, quality, **factors) / normalizer


@torch.no_grad()
def box_quality(
    choice: LossChoice,
    anchors: list[Boxes],
    transform,
    pred_deltas: Sequence[Tensor],
    gt_boxes: Sequence[Tensor],
) -> Tensor | None:
    """Return the IoU of each anchor's predicted box with its matched box, (N, R).

    The result is None if the classification loss does not use it. Values of background anchors are
    meaningless.

    Args:
        anchors: the anchors of each level.
        transform: converts between boxes and deltas.
        pred_deltas: (N, R_l, 4) per level.
        gt_boxes: (R, 4) per image.
    """
    if choice.cls_loss_type not in QUALITY_LOSSES:
        return None
    of_anchors = Boxes.cat(anchors).tensor
    found = []
    for deltas, matched in zip(upcast(torch.cat(list(pred_deltas), 1)), gt_boxes, strict=True):
        boxes = transform.apply_deltas(deltas, of_anchors)
        found.append(matched_pairwise_iou(Boxes(boxes), Boxes(matched)))
    return torch.stack(found).nan_to_num(0).clamp(0, 1)


def delta_loss(choice: LossChoice, levels: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return the sum of smooth L1 or ASL1 over the foreground boxes of all levels.

    Other boxes have neither loss nor gradient, whatever the prediction.

    Args:
        levels: the result of `labels.box_levels`.
    """
    if choice.box_reg_loss_type == "asl1":
        loss = partial(asl1_loss, mu=choice.asl1_mu, reduction="sum")
    else:
        loss = partial(smooth_l1_loss, beta=choice.smooth_l1_beta, reduction="sum")
    return sum(
        loss(torch.where(valid[..., None], p, 0), torch.where(valid[..., None], t, 0))
        for p, t, valid in levels
    )


class BufferedNormalizer:
    """A mixin, listed before Detectron2's detector class, that makes the normalizer a buffer."""

    def _start_normalizer(self, initial: float) -> None:
        """Register Detectron2's moving average of the number of foreground anchors as a buffer."""
        # MPS has no float64, the precision of Detectron2's Python number
        exact = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.register_buffer("loss_normalizer", torch.tensor(initial, dtype=exact))

    def _apply(self, fn, *args, **kwargs):
        exact = self.loss_normalizer
        super()._apply(fn, *args, **kwargs)
        now = self.loss_normalizer
        if wide(now.dtype) != now.dtype:  # half precision would lose each step's small change
            self.loss_normalizer = exact.to(now.device)
        return self

    def _ema_update(self, name, value, initial_value, momentum=0.9):
        """Override of Detectron2's method, in which the moving average is a buffer.

        The buffer is registered with its initial value, so that `initial_value` is not used.
        """
        old = getattr(self, name)
        new = old * momentum + torch.as_tensor(value, dtype=old.dtype) * (1 - momentum)
        setattr(self, name, new)
        return new if isinstance(value, Tensor) else new.item()

    def _update_normalizer(self, num_pos: Count) -> Tensor:
        """Update the moving average by this batch; return it divided by the number of processes."""
        normalizer = self._ema_update("loss_normalizer", num_pos.value.clamp(min=1), None)
        # not the logits' dtype, which may be half precision
        return normalizer.float() / num_pos.world
