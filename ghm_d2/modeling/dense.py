"""What one-stage detectors share: sums over boxes; over sigmoids, the classification loss too."""

from collections.abc import Sequence
from functools import partial

import torch
from detectron2.utils.events import get_event_storage
from fvcore.nn import smooth_l1_loss
from torch import Tensor

from ghm_d2.losses import asl1_loss, bce_loss, focal_loss, ohem_loss

LOG_PERIOD = 20  # iterations, as Detectron2's writers


def delta_loss(model, levels: Sequence[tuple[Tensor, Tensor, Tensor]], normalizer) -> Tensor:
    """GHM-R, or the sum of smooth L1 or ASL1 over `normalizer`, of all levels' boxes.

    In a sum a box that does not count has no difference, and thus no loss and gradient, whatever
    is predicted.

    Args:
        model: has the attributes box_reg_loss_type, ghm_r, asl1_mu and smooth_l1_beta.
        levels: as of `labels.box_levels`.
    """
    if model.box_reg_loss_type == "ghm_r":
        return sum(model.ghm_r.levels(*zip(*levels, strict=True)))
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

    It reads the attributes cls_loss_type, ghm_c, kernel, focal_loss_alpha and focal_loss_gamma.
    """

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

    def _update_normalizer(self, pos_mask: Tensor) -> Tensor:
        """The moving average with this batch's foreground in it, `pos_mask` (N, R); logs it."""
        num_pos = pos_mask.sum()
        storage = get_event_storage()
        if num_pos.device.type == "cpu" or storage.iter % LOG_PERIOD == 0:
            storage.put_scalar("num_pos_anchors", num_pos / len(pos_mask))  # waits for the number
        normalizer = self._ema_update("loss_normalizer", num_pos.clamp(min=1), None)
        return normalizer.float()  # not the logits' dtype, which may be half precision

    def _cls_loss(self, pred_logits, gt_labels: Tensor, normalizer: Tensor) -> Tensor:
        """`pred_logits`: a (N, R_l, K) a level. `gt_labels`: (N, R)."""
        sizes = [x.shape[1] for x in pred_logits]
        labels = [y.flatten() for y in gt_labels.split(sizes, dim=1)]
        logits = [x.flatten(0, 1) for x in pred_logits]
        if self.cls_loss_type == "ghm_c":
            return sum(self.ghm_c.levels(logits, labels))
        if self.cls_loss_type == "ohem":
            logits = torch.cat(pred_logits, dim=1).flatten(0, 1)
            return ohem_loss(logits, gt_labels.flatten()) / normalizer
        if self.cls_loss_type == "focal":
            loss = partial(focal_loss, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma)
        else:
            loss = bce_loss
        levels = zip(logits, labels, strict=True)
        return sum(loss(x, y, reduction="sum", kernel=self.kernel) for x, y in levels) / normalizer
