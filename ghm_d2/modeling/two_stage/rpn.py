"""A region proposal network whose classifier can use GHM-C."""

import torch
from detectron2.config import configurable
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from torch import nn

from ghm_d2.config.add_keys import ghm_keys
from ghm_d2.losses import sum_up
from ghm_d2.modeling.build_losses import build_ghm_c
from ghm_d2.modeling.dense import flat_levels
from ghm_d2.modeling.loss_choice import check_loss_type
from ghm_d2.modeling.trainer_check import check_trainer

CLS_LOSSES = ("ce", "ghm_c")


@PROPOSAL_GENERATOR_REGISTRY.register()
class GHMRPN(RPN):
    """Detectron2's `RPN` whose classifier can use GHM-C on the sampled anchors.

    With a large MODEL.RPN.BATCH_SIZE_PER_IMAGE, GHM-C covers all labelled anchors.

    Several processes compute GHM-C like one process with the whole batch. GHM-C has its own
    all-reduce of counts, because the box head's counts do not exist yet. Detectron2's losses are
    divided by the number of anchors that a process may sample, which is the same in processes with
    equally many images. Each process draws its own sample.
    """

    @configurable
    def __init__(self, *, ghm_c: nn.Module | None = None, **kwargs):
        """
        Args:
            ghm_c: `GHMC`, which replaces binary cross entropy; None keeps it.
        """
        super().__init__(**kwargs)
        self.ghm_c = ghm_c

    @classmethod
    def from_config(cls, cfg, input_shape):
        keys = ghm_keys(cfg, "MODEL.RPN")
        check_trainer(cfg)
        ret = super().from_config(cfg, input_shape)
        cls_type = check_loss_type("MODEL.RPN.CLS_LOSS_TYPE", keys.CLS_LOSS_TYPE, CLS_LOSSES)
        if cls_type == "ghm_c":
            ret["ghm_c"] = build_ghm_c(cfg, len(keys.IN_FEATURES))
        return ret

    def losses(self, anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes):
        """Return `loss_rpn_cls` and `loss_rpn_loc`; the arguments are Detectron2's."""
        losses = super().losses(
            anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        if self.ghm_c is not None:
            labels = torch.stack(gt_labels)  # 1 object, 0 background, -1 ignored
            labels = torch.where(labels >= 0, 1 - labels, -1)  # class 0 is "object"
            logits = [x[..., None] for x in pred_objectness_logits]
            counted = self.ghm_c.begin(*flat_levels(logits, labels.long()))
            sum_up(counted)
            losses["loss_rpn_cls"] = counted.total() * self.loss_weight.get("loss_rpn_cls", 1.0)
        return losses
