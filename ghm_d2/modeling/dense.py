"""What one-stage detectors share: sums over boxes; over sigmoids, the classification loss too.

A step first counts, foreground anchors and the samples of GHM losses, then adds the counts up over
the processes (`sum_up`), and then computes losses. `normalizer` always is what the whole batch
says to divide by, over the number of processes.
"""

from collections.abc import Sequence
from functools import partial

import torch
from detectron2.utils.events import get_event_storage
from fvcore.nn import smooth_l1_loss
from torch import Tensor

from ghm_d2.losses import asl1_loss, bce_loss, focal_loss, ohem_loss
from ghm_d2.losses.ghm_c import CountedLoss
from ghm_d2.losses.sync import Count, world_size

LOG_PERIOD = 20  # iterations, as Detectron2's writers


def count_foreground(pos_mask: Tensor, sync: bool) -> Count:
    """How many anchors are foreground, `pos_mask` (N, R); logs it for an image of this process."""
    num_pos = pos_mask.sum()
    storage = get_event_storage()
    if num_pos.device.type == "cpu" or storage.iter % LOG_PERIOD == 0:
        storage.put_scalar("num_pos_anchors", num_pos / len(pos_mask))  # waits for the number
    return Count(num_pos, sync)


def flat_levels(pred: Sequence[Tensor], labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(N * R_l, K) predictions and (N * R_l,) labels a level, of (N, R_l, K) and of (N, R)."""
    labels = labels.split([x.shape[1] for x in pred], dim=1)
    return [x.flatten(0, 1) for x in pred], [y.flatten() for y in labels]


def begin_ghm_r(model, levels: Sequence[tuple[Tensor, Tensor, Tensor]]) -> CountedLoss | None:
    """GHM-R of all levels' boxes, of `labels.box_levels`; None where the loss is another."""
    if model.box_reg_loss_type != "ghm_r":
        return None
    return model.ghm_r.begin(*zip(*levels, strict=True))


def delta_loss(model, levels: Sequence[tuple[Tensor, Tensor, Tensor]], normalizer) -> Tensor:
    """The sum of smooth L1 or ASL1 over `normalizer`, of all levels' boxes.

    A box that does not count has no difference, and thus no loss and gradient, whatever is
    predicted.

    Args:
        model: has the attributes box_reg_loss_type, asl1_mu and smooth_l1_beta.
        levels: as of `labels.box_levels`.
    """
    if model.box_reg_loss_type == "asl1":
        loss = partial(asl1_loss, mu=model.asl1_mu, reduction="sum")
    else:
        loss = partial(smooth_l1_loss, beta=model.smooth_l1_beta, reduction="sum")
    total = sum(
        loss(torch.where(valid[..., None], p, 0), torch.where(valid[..., None], t, 0))
        for p, t, valid in levels
    )
    return total / normalizer


class SigmoidLosses:
    """A mixin before one of Detectron2's dense detectors.

    It reads the attributes sync, cls_loss_type, ghm_c, kernel, focal_loss_alpha and
    focal_loss_gamma.
    """

    def _is_synced(self) -> bool:
        """Whether a step adds counts up over processes, which Detectron2's own code does not."""
        return self.sync and world_size() > 1

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

    def _begin_ghm_c(self, pred_logits, gt_labels: Tensor) -> CountedLoss | None:
        """Arguments as of `_cls_loss`; None where the loss is another."""
        if self.cls_loss_type != "ghm_c":
            return None
        return self.ghm_c.begin(*flat_levels(pred_logits, gt_labels))

    def _cls_loss(self, pred_logits, gt_labels: Tensor, normalizer: Tensor) -> Tensor:
        """All but GHM-C. `pred_logits`: a (N, R_l, K) a level. `gt_labels`: (N, R)."""
        logits, labels = flat_levels(pred_logits, gt_labels)
        if self.cls_loss_type == "ohem":
            logits = torch.cat(pred_logits, dim=1).flatten(0, 1)
            return ohem_loss(logits, gt_labels.flatten()) / normalizer
        if self.cls_loss_type == "focal":
            loss = partial(focal_loss, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma)
        else:
            loss = bce_loss
        levels = zip(logits, labels, strict=True)
        return sum(loss(x, y, reduction="sum", kernel=self.kernel) for x, y in levels) / normalizer
