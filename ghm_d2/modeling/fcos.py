"""FCOS with a choice of losses."""

import math

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F

from ghm_d2.config.add_keys import ghm_keys
from ghm_d2.errors import UsageError
from ghm_d2.kernels.dtypes import upcast
from ghm_d2.losses import asl1_loss
from ghm_d2.losses.density.sync import sum_up, world_size
from ghm_d2.modeling.atss import label_by_atss
from ghm_d2.modeling.backbones.feature_maps import chosen_maps
from ghm_d2.modeling.backbones.top_block import fit_top_block
from ghm_d2.modeling.build_losses import loss_arguments
from ghm_d2.modeling.dense import (
    BufferedNormalizer,
    begin_ghm_c,
    count_foreground,
    normalized_cls_loss,
)
from ghm_d2.modeling.labels import label_images
from ghm_d2.modeling.loss_choice import REG_LOSSES, LossChoice, check_loss_type
from ghm_d2.modeling.norms import check_norm
from ghm_d2.modeling.trainer_check import check_trainer

CLS_LOSSES = ("focal", "ce", "qfl", "vfl", "ghm_c")
ASSIGNMENTS = ("center", "atss")
DEFAULTS = LossChoice("focal", "giou", smooth_l1_beta=0.1)
# in strides; CIoU needs an aspect ratio, which the empty box that ReLU may predict does not have
LEAST_SIDE = 0.01
_OF_0_6 = hasattr(FCOS, "match_anchors")  # Detectron2's main has `_match_anchors`
NAMES = {
    "loss_cls": "loss_fcos_cls",
    "loss_box_reg": "loss_fcos_loc",
    "loss_centerness": "loss_fcos_ctr",
}


@META_ARCH_REGISTRY.register()
class GHMFCOS(BufferedNormalizer, FCOS):
    """Detectron2's `FCOS` (Tian et al., arXiv 1904.01355) whose losses are chosen by name.

    Summed losses are divided by Detectron2's moving average of the number of foreground anchors,
    which is a buffer here; GHM losses normalise themselves. With "focal", "giou" and kernel "torch"
    a step runs Detectron2's own code. Its losses are bit-identical, under the names that all our
    detectors use. An image without objects, on which Detectron2's class fails, is background.

    Several processes train like one process with the whole batch, after one all-reduce of counts
    per step. But MODEL.GHM.CLS.DENSITY exact covers each process's own samples only. Detectron2's
    code does not synchronise, so that with MODEL.GHM.SYNC several processes run our code.
    """

    @configurable
    def __init__(
        self,
        *,
        ghm_c: nn.Module | None = None,
        ghm_r: nn.Module | None = None,
        assignment: str = "center",
        **kwargs,
    ):
        """
        Args:
            assignment: the choice of foreground locations: "center", FCOS's own, or "atss", whose
                anchors are squares of 8 strides around the locations.
            ghm_c, ghm_r: `GHMC` (or `ExactGHMC`) and `GHMR`, needed if a loss type names them.
            **kwargs: arguments of Detectron2's class, and the fields of `LossChoice`.
                `cls_loss_type` is one of `CLS_LOSSES`. `box_reg_loss_type` is "giou", "diou" or
                "ciou", computed on boxes, or "smooth_l1", "asl1" or "ghm_r", computed on the
                distances to a box's sides in strides.

        Raises:
            UsageError: an unknown loss type or assignment, a GHM loss without its module, or a
                `center_sampling_radius` that is not above 0.
        """
        choice = DEFAULTS.take(kwargs)
        super().__init__(**kwargs)
        self.loss_choice = choice
        self.assignment = check_loss_type("MODEL.FCOS.ASSIGNMENT", assignment, ASSIGNMENTS)
        modules = choice.used_modules("MODEL.FCOS", CLS_LOSSES, REG_LOSSES, ghm_c, ghm_r)
        self.ghm_c, self.ghm_r = modules
        if not self.center_sampling_radius > 0:
            raise UsageError(
                "MODEL.FCOS.CENTER_SAMPLING_RADIUS must be above 0, not "
                f"{self.center_sampling_radius:g}; 1e6 switches center sampling off"
            )
        self._start_normalizer(300.0)

    @classmethod
    def from_config(cls, cfg):
        keys = ghm_keys(cfg, "MODEL.FCOS")
        check_trainer(cfg)
        backbone = build_backbone(cfg)
        fit_top_block(backbone, cfg)
        return {
            "backbone": backbone,
            "head": _build_head(keys, backbone.output_shape()),
            "head_in_features": keys.IN_FEATURES,
            "num_classes": keys.NUM_CLASSES,
            "assignment": keys.ASSIGNMENT,
            "center_sampling_radius": keys.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": keys.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": keys.FOCAL_LOSS_GAMMA,
            "test_score_thresh": keys.SCORE_THRESH_TEST,
            "test_topk_candidates": keys.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": keys.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "smooth_l1_beta": keys.SMOOTH_L1_LOSS_BETA,
            **loss_arguments(cfg, keys, len(keys.IN_FEATURES)),
        }

    @torch.no_grad()
    def label_anchors(self, anchors, gt_instances):
        """Label locations like Detectron2's class, which in 0.6 fails on images without objects.

        An image's matched boxes are `Boxes` with Detectron2 0.6, and a tensor (R, 4) since then.
        """
        if self.assignment == "atss":
            squares = [_grown(level) for level in anchors]
            labels, boxes = label_by_atss(squares, gt_instances, self.num_classes)
            return labels, [Boxes(b) for b in boxes] if _OF_0_6 else boxes
        return label_images(lambda gt: self._label_image(anchors, gt), gt_instances)

    def _label_image(self, anchors, gt) -> tuple[Tensor, Boxes | Tensor]:
        if len(gt) or not _OF_0_6:
            (labels,), (boxes,) = super().label_anchors(anchors, [gt])
            return labels, boxes
        background = Boxes.cat(anchors)
        return gt.gt_classes.new_full((len(background),), self.num_classes), background

    def losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
    ):
        """Return `loss_cls`, `loss_box_reg` and `loss_centerness`, with Detectron2's arguments."""
        arguments = anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
        choice = self.loss_choice
        types = choice.cls_loss_type, choice.box_reg_loss_type, choice.kernel
        plain = types == ("focal", "giou", "torch") and not choice.class_weights
        if plain and not (choice.sync and world_size() > 1):
            # Detectron2's losses do not support half precision
            predicted = pred_logits, pred_anchor_deltas, pred_centerness
            logits, deltas, centerness = ([upcast(x) for x in xs] for xs in predicted)
            theirs = super().losses(anchors, logits, gt_labels, deltas, gt_boxes, centerness)
            losses = {name: theirs[their_name] for name, their_name in NAMES.items()}
        else:
            losses = self._losses(*arguments)
        losses["loss_box_reg"] = losses["loss_box_reg"] * choice.box_reg_loss_weight
        return losses

    def _losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
    ):
        gt_labels = torch.stack(gt_labels)  # (N, R)
        pos_mask = gt_labels != self.num_classes  # FCOS ignores no anchor
        deltas = [upcast(d) for d in pred_anchor_deltas]
        matched = [b.tensor for b in gt_boxes] if _OF_0_6 else gt_boxes
        boxes = anchors, self.box2box_transform, deltas, matched, pos_mask
        choice = self.loss_choice
        num_pos, ghm_r = count_foreground(pos_mask, choice.sync), None
        ghm_c = begin_ghm_c(self.ghm_c, choice, pred_logits, gt_labels)
        if self.ghm_r is not None:
            ghm_r = self.ghm_r.begin(*_foreground_deltas(*boxes))
        sum_up(num_pos, ghm_c, ghm_r)
        normalizer = self._update_normalizer(num_pos)
        centerness = upcast(torch.cat(pred_centerness, dim=1).squeeze(dim=2)[pos_mask])
        target = self.compute_ctrness_targets(anchors, gt_boxes)[pos_mask]
        loss_centerness = F.binary_cross_entropy_with_logits(centerness, target, reduction="sum")
        focal = {"alpha": self.focal_loss_alpha, "gamma": self.focal_loss_gamma}
        logits = pred_logits, gt_labels
        loss_cls = normalized_cls_loss(ghm_c, choice, *logits, boxes[:-1], normalizer, **focal)
        return {
            "loss_cls": loss_cls,
            "loss_box_reg": ghm_r.total() if ghm_r else self._box_reg_loss(*boxes) / normalizer,
            "loss_centerness": loss_centerness / normalizer,
        }

    def _box_reg_loss(self, anchors, transform, pred_deltas, gt_boxes, pos_mask) -> Tensor:
        """Return the box loss summed over foreground; GHM-R is computed elsewhere."""
        choice = self.loss_choice
        if choice.box_reg_loss_type == "asl1":
            levels = _foreground_deltas(anchors, transform, pred_deltas, gt_boxes, pos_mask)
            levels = zip(*levels, strict=True)
            return sum(asl1_loss(p, t, choice.asl1_mu, "sum") for p, t in levels)
        if choice.box_reg_loss_type == "ciou":
            pred_deltas = [d.clamp(min=LEAST_SIDE) for d in pred_deltas]
        return _dense_box_regression_loss(
            anchors,
            transform,
            pred_deltas,
            gt_boxes,
            pos_mask,
            box_reg_loss_type=choice.box_reg_loss_type,
            smooth_l1_beta=choice.smooth_l1_beta,
        )


def _grown(anchors: Boxes) -> Boxes:
    """Return squares 8 strides wide around a level's locations, from boxes one stride wide."""
    center, half = anchors.get_centers(), 4 * (anchors.tensor[:, 2:3] - anchors.tensor[:, :1])
    return Boxes(torch.cat([center - half, center + half], dim=1))


def _foreground_deltas(anchors, transform, pred_deltas, gt_boxes, pos_mask):
    """Return the predicted and the true distances of foreground locations, (P_l, 4) per level."""
    sizes = [len(a) for a in anchors]
    centres = Boxes.cat(anchors).tensor
    target = torch.stack([transform.get_deltas(centres, b) for b in gt_boxes])
    levels = zip(pred_deltas, target.split(sizes, 1), pos_mask.split(sizes, 1), strict=True)
    return zip(*((p[valid], t[valid]) for p, t, valid in levels), strict=True)


def _build_head(keys, shapes) -> FCOSHead:
    norm = group_norm if keys.NORM == "GN" else keys.NORM
    check_norm("MODEL.FCOS.NORM", norm, [1])
    if keys.NUM_CONVS < 1:
        raise UsageError(f"MODEL.FCOS.NUM_CONVS must be at least 1, not {keys.NUM_CONVS}")
    maps = chosen_maps("MODEL.FCOS.IN_FEATURES", keys.IN_FEATURES, shapes)
    return FCOSHead(
        input_shape=maps,
        num_classes=keys.NUM_CLASSES,
        conv_dims=[maps[0].channels] * keys.NUM_CONVS,
        prior_prob=keys.PRIOR_PROB,
        norm=norm,
    )


def group_norm(channels: int) -> nn.GroupNorm:
    """Build Detectron2's "GN" of 32 groups; fewer for 32 channels or if 32 does not divide them.

    Detectron2's heads build a norm of one channel to inspect it, which PyTorch refuses with 32
    groups. PyTorch also refuses to normalise a group of one channel over one location.
    """
    groups = math.gcd(32, channels)
    return nn.GroupNorm(max(1, groups // 2) if groups == channels else groups, channels)
