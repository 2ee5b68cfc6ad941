"""RetinaNet with a choice of losses."""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.box_regression import _dense_box_regression_loss
from torch import nn

from ghm_d2.losses.sync import sum_up
from ghm_d2.modeling.build_losses import (
    build_ghm_c,
    build_ghm_r,
    check_ghm,
    check_kernel,
    check_loss_type,
)
from ghm_d2.modeling.dense import SigmoidLosses, begin_ghm_r, count_foreground, delta_loss
from ghm_d2.modeling.labels import box_levels, label_anchors

CLS_LOSSES = ("focal", "ce", "ohem", "ghm_c")
IOU_LOSSES = ("giou", "diou", "ciou")
DETECTRON2_REG_LOSSES = ("smooth_l1", *IOU_LOSSES)
REG_LOSSES = (*DETECTRON2_REG_LOSSES, "asl1", "ghm_r")


@META_ARCH_REGISTRY.register()
class GHMRetinaNet(SigmoidLosses, RetinaNet):
    """Detectron2's `RetinaNet` whose losses are chosen by name.

    Sums (focal, cross entropy, OHEM, smooth L1 and the others) are divided by Detectron2's
    moving average of the number of foreground anchors; GHM losses normalise themselves. That
    average is a buffer here, so that a resumed run continues with it.

    Several processes train as one with the whole batch, after one all-reduce of counts a step.
    But OHEM takes each process's own hardest anchors, and MODEL.GHM.CLS.DENSITY exact is of its
    own samples.

    With "focal", one of Detectron2's box losses and kernel "torch", a step is Detectron2's own
    code and gives its numbers to the bit; with our kernels they agree within rounding. Then
    nothing waits for the device, but GIoU and its kind, and the number of foreground anchors that
    is logged every 20 iterations. Detectron2's code knows one process: several use ours.
    """

    @configurable
    def __init__(
        self,
        *,
        cls_loss_type: str = "focal",
        ghm_c: nn.Module | None = None,
        ghm_r: nn.Module | None = None,
        asl1_mu: float = 0.02,
        box_reg_loss_weight: float = 1.0,
        kernel: str = "auto",
        sync: bool = True,
        **kwargs,
    ):
        """
        Args:
            cls_loss_type: "focal", "ce", "ohem" or "ghm_c".
            ghm_c, ghm_r: `GHMC` (or `ExactGHMC`) and `GHMR`, where a loss type names them.
            asl1_mu: mu of ASL1, where `box_reg_loss_type` is "asl1".
            box_reg_loss_weight: factor on `loss_box_reg`.
            kernel: of focal loss and cross entropy, one of `kernels.KERNELS`.
            sync: divide by the foreground of all processes; GHM losses have a `sync` of their own.
            **kwargs: those of Detectron2's class; `box_reg_loss_type` may also be "asl1" or
                "ghm_r".

        Raises:
            UsageError: an unknown loss type, or a GHM loss without its module.
        """
        super().__init__(**kwargs)
        check_loss_type("MODEL.RETINANET.CLS_LOSS_TYPE", cls_loss_type, CLS_LOSSES)
        check_loss_type("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", self.box_reg_loss_type, REG_LOSSES)
        check_ghm(cls_loss_type, ghm_c, "MODEL.RETINANET.CLS_LOSS_TYPE")
        check_ghm(self.box_reg_loss_type, ghm_r, "MODEL.RETINANET.BBOX_REG_LOSS_TYPE")
        self.cls_loss_type = cls_loss_type
        self.ghm_c = ghm_c
        self.ghm_r = ghm_r
        self.asl1_mu = asl1_mu
        self.box_reg_loss_weight = box_reg_loss_weight
        self.kernel, self.sync = kernel, sync
        self._start_normalizer(100.0)

    @classmethod
    def from_config(cls, cfg):
        ret = super().from_config(cfg)
        levels = len(cfg.MODEL.RETINANET.IN_FEATURES)
        ret["cls_loss_type"] = cfg.MODEL.RETINANET.CLS_LOSS_TYPE
        ret["asl1_mu"] = cfg.MODEL.GHM.REG.MU
        ret["box_reg_loss_weight"] = cfg.MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT
        ret["kernel"] = check_kernel(cfg)
        ret["sync"] = cfg.MODEL.GHM.SYNC
        if cfg.MODEL.RETINANET.CLS_LOSS_TYPE == "ghm_c":
            ret["ghm_c"] = build_ghm_c(cfg, levels)
        if cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE == "ghm_r":
            ret["ghm_r"] = build_ghm_r(cfg, levels)
        return ret

    @torch.no_grad()
    def label_anchors(self, anchors, gt_instances):
        """Arguments and result as in Detectron2's class, with which it agrees."""
        return label_anchors(anchors, gt_instances, self.anchor_matcher, self.num_classes)

    def losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes):
        """`loss_cls` and `loss_box_reg`; arguments as in Detectron2's class."""
        arguments = anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes
        of_detectron2 = (
            self.cls_loss_type == "focal" and self.box_reg_loss_type in DETECTRON2_REG_LOSSES
        )
        if of_detectron2 and self.kernel == "torch" and not self._is_synced():
            losses = super().losses(*arguments)
        else:
            losses = self._losses(*arguments)
        losses["loss_box_reg"] = losses["loss_box_reg"] * self.box_reg_loss_weight
        return losses

    def _losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes):
        gt_labels = torch.stack(gt_labels)  # (N, R)
        pos_mask = (gt_labels >= 0) & (gt_labels != self.num_classes)
        boxes = anchors, self.box2box_transform, pred_anchor_deltas, gt_boxes, pos_mask
        of_deltas = self.box_reg_loss_type not in IOU_LOSSES
        levels = box_levels(*boxes, dense=pos_mask.device.type != "cpu") if of_deltas else []
        num_pos = count_foreground(pos_mask, self.sync)
        ghm_c, ghm_r = self._begin_ghm_c(pred_logits, gt_labels), begin_ghm_r(self, levels)
        sum_up(num_pos, ghm_c, ghm_r)
        normalizer = self._update_normalizer(num_pos)
        if ghm_r is not None:
            loss_box_reg = ghm_r.total()
        elif of_deltas:
            loss_box_reg = delta_loss(self, levels, normalizer)
        else:
            total = _dense_box_regression_loss(*boxes, box_reg_loss_type=self.box_reg_loss_type)
            loss_box_reg = total / normalizer
        loss_cls = ghm_c.total() if ghm_c else self._cls_loss(pred_logits, gt_labels, normalizer)
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg}
