"""ROI heads whose box predictor can use GHM."""

import torch
from detectron2.config import configurable
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, _log_classification_stats
from torch import Tensor, nn

from ghm_d2.config.add_keys import ghm_keys
from ghm_d2.errors import UsageError
from ghm_d2.losses import asl1_loss, softmax_ce_loss
from ghm_d2.losses.density.sync import sum_up
from ghm_d2.modeling.build_losses import class_weights, ghm_modules
from ghm_d2.modeling.loss_choice import REG_LOSSES, LossChoice, check_loss_type, used_module
from ghm_d2.modeling.trainer_check import check_trainer

CLS_LOSSES = ("ce", "ghm_c")


class GHMFastRCNNOutputLayers(FastRCNNOutputLayers):
    """Detectron2's box predictor that can use GHM-R for boxes and GHM-C for classes.

    Without GHM its results are those of Detectron2's class. GHM losses normalise themselves and,
    like the other losses, are then multiplied by `loss_weight`. All losses convert autocast's half
    precision to float32.

    Several processes compute GHM losses like one process with all proposals, after one all-reduce
    of counts per step. Detectron2's losses and ASL1 are means over each process's own proposals.
    """

    @configurable
    def __init__(
        self,
        input_shape,
        *,
        ghm_c: nn.Module | None = None,
        ghm_r: nn.Module | None = None,
        asl1_mu: float = 0.02,
        class_weights: tuple[float, ...] = (),
        **kwargs,
    ):
        """
        Args:
            ghm_c: `SoftmaxGHMC`, which replaces cross entropy; None keeps it.
            ghm_r: `GHMR`, needed if `box_reg_loss_type` is "ghm_r".
            asl1_mu: mu of ASL1, used if `box_reg_loss_type` is "asl1".
            class_weights: see `LossChoice`.

        Raises:
            UsageError: an unknown loss type, "ghm_r" without its module, or `ghm_c` or
                `class_weights` with Detectron2's `use_sigmoid_ce`.
        """
        super().__init__(input_shape, **kwargs)
        self.ghm_c, self.asl1_mu = ghm_c, asl1_mu
        self.loss_choice = LossChoice(
            "ghm_c" if ghm_c else "ce", self.box_reg_loss_type, class_weights=class_weights
        )
        reg_key = "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE"
        self.ghm_r = used_module(reg_key, self.box_reg_loss_type, REG_LOSSES, ghm_r)
        of_softmax = ghm_c is not None or class_weights
        if of_softmax and getattr(self, "use_sigmoid_ce", False):  # not in Detectron2 0.6
            raise UsageError(
                "MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE ghm_c and MODEL.CLASS_WEIGHTS need a softmax; "
                "set MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE False"
            )

    @classmethod
    def from_config(cls, cfg, input_shape):
        keys = ghm_keys(cfg, "MODEL.ROI_BOX_HEAD")
        check_loss_type("MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE", keys.CLS_LOSS_TYPE, CLS_LOSSES)
        ret = super().from_config(cfg, input_shape)
        ret["asl1_mu"] = ghm_keys(cfg, "MODEL.GHM.REG").MU
        ret["class_weights"] = class_weights(
            cfg, cfg.MODEL.ROI_HEADS.NUM_CLASSES, keys.CLS_LOSS_TYPE
        )
        return ret | ghm_modules(cfg, keys, softmax=True)

    def losses(self, predictions, proposals):
        """Return `loss_cls` and `loss_box_reg`; the arguments are those of Detectron2's class."""
        scores, deltas = predictions
        if self.ghm_c is None:
            losses = super().losses(predictions, proposals)
            return losses | self._weighted_ce_loss(scores, proposals)
        labels, *boxes = _concatenated(proposals, deltas)
        boxes = *boxes, deltas, labels
        _log_classification_stats(scores, labels)
        ghm_c, ghm_r = self.ghm_c.begin([scores], [labels], self._weights(labels)), None
        if self.ghm_r is not None:
            ghm_r = self.ghm_r.begin(*([x] for x in self._foreground_deltas(*boxes)))
        sum_up(ghm_c, ghm_r)
        losses = {
            "loss_cls": ghm_c.total(),
            "loss_box_reg": ghm_r.total() if ghm_r else self.box_reg_loss(*boxes),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def _weights(self, labels: Tensor) -> list[Tensor] | None:
        weight = self.loss_choice.weight_of(labels)
        return None if weight is None else [weight]

    def _weighted_ce_loss(self, scores: Tensor, proposals) -> dict[str, Tensor]:
        """Return `loss_cls` with class weights, a mean over all proposals; {} without weights."""
        if not self.loss_choice.class_weights:
            return {}
        labels, *_ = _concatenated(proposals, scores)
        loss = softmax_ce_loss(scores, labels, weight=self.loss_choice.weight_of(labels))
        return {"loss_cls": loss * self.loss_weight.get("loss_cls", 1.0)}

    def box_reg_loss(self, proposal_boxes, gt_boxes, pred_deltas, gt_classes, *args, **kwargs):
        """Return the box loss of R proposals; the arguments are those of Detectron2's class."""
        arguments = proposal_boxes, gt_boxes, pred_deltas, gt_classes
        if self.box_reg_loss_type not in ("asl1", "ghm_r"):
            return super().box_reg_loss(*arguments, *args, **kwargs)
        pred, target = self._foreground_deltas(*arguments)
        if self.ghm_r is not None:
            return self.ghm_r(pred, target)
        loss = asl1_loss(pred, target, self.asl1_mu, "sum")
        return loss / max(gt_classes.numel(), 1)  # as Detectron2 divides smooth L1

    def _foreground_deltas(self, proposal_boxes, gt_boxes, pred_deltas, gt_classes):
        """Return the predicted and the true deltas of foreground proposals, (P, 4) each."""
        box_dim = proposal_boxes.shape[1]
        # select rows first, because get_deltas may refuse the box of a background proposal
        foreground = ((gt_classes >= 0) & (gt_classes < self.num_classes)).nonzero().squeeze(1)
        if pred_deltas.shape[1] == box_dim:
            pred = pred_deltas[foreground]
        else:  # one box per class: take the true class's box
            by_class = pred_deltas.view(-1, self.num_classes, box_dim)
            pred = by_class[foreground, gt_classes[foreground]]
        target = self.box2box_transform.get_deltas(proposal_boxes[foreground], gt_boxes[foreground])
        return pred, target


def _concatenated(proposals, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels (R,), proposed boxes and matched boxes (R, 4) of all images."""
    if not proposals:
        return deltas.new_empty(0).long(), deltas.new_empty(0, 4), deltas.new_empty(0, 4)
    # an image without objects has no matched boxes; its proposals stand in and are never read
    matched = [p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes for p in proposals]
    return (
        torch.cat([p.gt_classes for p in proposals]),
        torch.cat([p.proposal_boxes.tensor for p in proposals]),
        torch.cat([boxes.tensor for boxes in matched]),
    )


@ROI_HEADS_REGISTRY.register()
class GHMROIHeads(StandardROIHeads):
    """Detectron2's `StandardROIHeads` with `GHMFastRCNNOutputLayers`."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ghm_keys(cfg, "MODEL.ROI_BOX_HEAD")
        check_trainer(cfg)
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictor"] = GHMFastRCNNOutputLayers(cfg, ret["box_head"].output_shape)
        return ret
