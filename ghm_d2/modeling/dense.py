"""What one-stage detectors share: sums over boxes; over sigmoids, the classification loss too.

A step first counts foreground anchors and the samples of GHM losses, then adds the counts up over
the processes (`sum_up`), and then computes losses. `normalizer` always is what the whole batch
says to divide by, over the number of processes.
"""

from collections.abc import Sequence
from functools import partial

import torch
from detectron2.utils.events import get_event_storage
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn

from ghm_d2.losses import asl1_loss, bce_loss, focal_loss, ohem_loss
from ghm_d2.losses.harmonized import CountedLoss
from ghm_d2.losses.sync import Count
from ghm_d2.modeling.loss_choice import LossChoice

LOG_PERIOD = 20  # iterations, as Detectron2's writers


def count_foreground(pos_mask: Tensor, sync: bool) -> Count:
    """How many anchors are foreground, `pos_mask` (N, R); logs it for an image of this process.

    Within torch.compile nothing is logged.
    """
    num_pos = pos_mask.sum()
    if torch.compiler.is_compiling():
        return Count(num_pos, sync=sync)
    storage = get_event_storage()
    if num_pos.device.type == "cpu" or storage.iter % LOG_PERIOD == 0:
        storage.put_scalar("num_pos_anchors", num_pos / len(pos_mask))  # waits for the number
    return Count(num_pos, sync=sync)


def flat_levels(pred: Sequence[Tensor], labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(N * R_l, K) predictions and (N * R_l,) labels a level, of (N, R_l, K) and of (N, R)."""
    labels = labels.split([x.shape[1] for x in pred], dim=1)
    return [x.flatten(0, 1) for x in pred], [y.flatten() for y in labels]


def begin_ghm(ghm: nn.Module | None, *levels) -> CountedLoss | None:
    """Count the samples of a GHM loss; None where the loss is another."""
    return None if ghm is None else ghm.begin(*levels)


def begin_ghm_c(ghm_c: nn.Module | None, pred_logits, gt_labels: Tensor) -> CountedLoss | None:
    """`begin_ghm` of the classes; arguments as in `cls_loss`."""
    return None if ghm_c is None else ghm_c.begin(*flat_levels(pred_logits, gt_labels))


def cls_loss(
    choice: LossChoice, pred_logits: Sequence[Tensor], gt_labels: Tensor, *, alpha, gamma
) -> Tensor:
    """The sum of OHEM, focal loss or cross entropy over sigmoids.

    Args:
        pred_logits: (N, R_l, K) a level.
        gt_labels: (N, R).
        alpha, gamma: of focal loss.
    """
    if choice.cls_loss_type == "ohem":
        return ohem_loss(torch.cat(list(pred_logits), dim=1).flatten(0, 1), gt_labels.flatten())
    if choice.cls_loss_type == "focal":
        loss = partial(focal_loss, alpha=alpha, gamma=gamma)
    else:
        loss = bce_loss
    levels = zip(*flat_levels(pred_logits, gt_labels), strict=True)
    return sum(loss(x, y, reduction="sum", kernel=choice.kernel) for x, y in levels)


def delta_loss(choice: LossChoice, levels: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The sum of smooth L1 or ASL1 of all levels' boxes.

    A box that does not count has no difference, and thus no loss and gradient, whatever is
    predicted.

    Args:
        levels: as of `labels.box_levels`.
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
    """A mixin before one of Detectron2's dense detectors: its average of foreground is a buffer."""

    def _start_normalizer(self, initial: float) -> None:
        """Make Detectron2's moving average of the number of foreground anchors a buffer."""
        # MPS has no float64, the precision of Detectron2's Python number
        exact = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.register_buffer("loss_normalizer", torch.tensor(initial, dtype=exact))

    def _ema_update(self, name, value, initial_value, momentum=0.9):
        """As Detectron2's, of a buffer that already holds its initial value."""
        old = getattr(self, name)
        new = old * momentum + torch.as_tensor(value, dtype=old.dtype) * (1 - momentum)
        setattr(self, name, new)
        return new if isinstance(value, Tensor) else new.item()

    def _update_normalizer(self, num_pos: Count) -> Tensor:
        """The moving average with this batch's foreground in it, over the number of processes."""
        normalizer = self._ema_update("loss_normalizer", num_pos.value.clamp(min=1), None)
        # not the logits' dtype, which may be half precision
        return normalizer.float() / num_pos.world
