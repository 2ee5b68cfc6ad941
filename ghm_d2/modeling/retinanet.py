"""RetinaNet with a choice of losses."""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.box_regression import _dense_box_regression_loss
from torch import nn

from ghm_d2.config.add_keys import ghm_keys
from ghm_d2.losses.density.sync import sum_up, world_size
from ghm_d2.modeling.atss import label_by_atss
from ghm_d2.modeling.backbones.top_block import fit_top_block
from ghm_d2.modeling.build_losses import loss_arguments
from ghm_d2.modeling.dense import (
    BufferedNormalizer,
    begin_ghm,
    begin_ghm_c,
    count_foreground,
    delta_loss,
    normalized_cls_loss,
)
from ghm_d2.modeling.labels import box_levels, label_anchors
from ghm_d2.modeling.loss_choice import (
    DETECTRON2_REG_LOSSES,
    IOU_LOSSES,
    REG_LOSSES,
    LossChoice,
    check_loss_type,
)
from ghm_d2.modeling.trainer_check import check_trainer

CLS_LOSSES = ("focal", "ce", "ohem", "qfl", "vfl", "ghm_c")
ASSIGNMENTS = ("iou", "atss")
DEFAULTS = LossChoice("focal", "smooth_l1")


@META_ARCH_REGISTRY.register()
class GHMRetinaNet(BufferedNormalizer, RetinaNet):
    """Detectron2's `RetinaNet` whose losses are chosen by name.

    Summed losses (focal, cross entropy, OHEM, smooth L1 and others) are divided by Detectron2's
    moving average of the number of foreground anchors. That average is a buffer here, so that a
    resumed run continues with it. GHM losses normalise themselves.

    Several processes train like one process with the whole batch, after one all-reduce of counts
    per step. But OHEM takes each process's own hardest anchors, and MODEL.GHM.CLS.DENSITY exact
    covers each process's own samples only.

    With "focal", one of Detectron2's box losses and kernel "torch", a step runs Detectron2's own
    code, bit-identically. With our kernels the losses agree within rounding, and nothing waits for
    the device but the IoU losses and the log of the foreground anchors every 20 iterations.
    Detectron2's code does not synchronise: with MODEL.GHM.SYNC several processes run our code.
    """

    @configurable
    def __init__(
        self,
        *,
        ghm_c: nn.Module | None = None,
        ghm_r: nn.Module | None = None,
        assignment: str = "iou",
        **kwargs,
    ):
        """
        Args:
            assignment: the choice of foreground anchors: "iou", Detectron2's matcher, or "atss".
            ghm_c, ghm_r: `GHMC` (or `ExactGHMC`) and `GHMR`, needed if a loss type names them.
            **kwargs: arguments of Detectron2's class, and the fields of `LossChoice`.
                `cls_loss_type` is one of `CLS_LOSSES`, `box_reg_loss_type` one of `REG_LOSSES`.

        Raises:
            UsageError: an unknown loss type or assignment, or a GHM loss without its module.
        """
        choice = DEFAULTS.take(kwargs)
        super().__init__(
            box_reg_loss_type=choice.box_reg_loss_type,
            smooth_l1_beta=choice.smooth_l1_beta,
            **kwargs,
        )
        self.loss_choice = choice
        self.assignment = check_loss_type("MODEL.RETINANET.ASSIGNMENT", assignment, ASSIGNMENTS)
        modules = choice.used_modules("MODEL.RETINANET", CLS_LOSSES, REG_LOSSES, ghm_c, ghm_r)
        self.ghm_c, self.ghm_r = modules
        self._start_normalizer(100.0)

    @classmethod
    def from_config(cls, cfg):
        keys = ghm_keys(cfg, "MODEL.RETINANET")
        check_trainer(cfg)
        arguments = super().from_config(cfg)
        fit_top_block(arguments["backbone"], cfg)
        arguments["assignment"] = keys.ASSIGNMENT
        return arguments | loss_arguments(cfg, keys, len(keys.IN_FEATURES))

    @torch.no_grad()
    def label_anchors(self, anchors, gt_instances):
        """Label anchors like Detectron2's class; "iou" gives the same labels."""
        if self.assignment == "atss":
            per_location = self.anchor_generator.num_anchors[0]
            return label_by_atss(anchors, gt_instances, self.num_classes, per_location)
        return label_anchors(anchors, gt_instances, self.anchor_matcher, self.num_classes)

    def losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes):
        """Return `loss_cls` and `loss_box_reg`; the arguments are those of Detectron2's class."""
        arguments = anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes
        choice = self.loss_choice
        of_detectron2 = (
            choice.cls_loss_type == "focal" and choice.box_reg_loss_type in DETECTRON2_REG_LOSSES
        )
        plain = choice.kernel == "torch" and not choice.class_weights
        if of_detectron2 and plain and not (choice.sync and world_size() > 1):
            losses = super().losses(*arguments)
        else:
            losses = self._losses(*arguments)
        losses["loss_box_reg"] = losses["loss_box_reg"] * choice.box_reg_loss_weight
        return losses

    def _losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes):
        gt_labels = torch.stack(gt_labels)  # (N, R)
        pos_mask = (gt_labels >= 0) & (gt_labels != self.num_classes)
        boxes = anchors, self.box2box_transform, pred_anchor_deltas, gt_boxes, pos_mask
        choice = self.loss_choice
        of_deltas = choice.box_reg_loss_type not in IOU_LOSSES
        dense = pos_mask.device.type != "cpu" or torch.compiler.is_compiling()
        levels = box_levels(*boxes, dense=dense) if of_deltas else []
        num_pos = count_foreground(pos_mask, choice.sync)
        ghm_c = begin_ghm_c(self.ghm_c, choice, pred_logits, gt_labels)
        ghm_r = begin_ghm(self.ghm_r, *zip(*levels, strict=True))
        sum_up(num_pos, ghm_c, ghm_r)
        normalizer = self._update_normalizer(num_pos)
        focal = {"alpha": self.focal_loss_alpha, "gamma": self.focal_loss_gamma}
        logits = pred_logits, gt_labels
        loss_cls = normalized_cls_loss(ghm_c, choice, *logits, boxes[:-1], normalizer, **focal)
        if ghm_r is not None:
            loss_box_reg = ghm_r.total()
        elif of_deltas:
            loss_box_reg = delta_loss(choice, levels) / normalizer
        else:
            total = _dense_box_regression_loss(*boxes, box_reg_loss_type=choice.box_reg_loss_type)
            loss_box_reg = total / normalizer
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg}
