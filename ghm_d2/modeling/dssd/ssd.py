"""SSD and DSSD with a choice of losses."""

from dataclasses import replace

import torch
from detectron2.config import configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ghm_d2.config.add_keys import ghm_keys
from ghm_d2.kernels.dtypes import upcast
from ghm_d2.losses.density.sync import sum_up
from ghm_d2.modeling.build_losses import loss_arguments
from ghm_d2.modeling.dense import begin_ghm, begin_ghm_c, count_foreground, delta_loss
from ghm_d2.modeling.dssd.backbone import SSDBackbone
from ghm_d2.modeling.dssd.default_boxes import check_sizes
from ghm_d2.modeling.dssd.head import SSDHead
from ghm_d2.modeling.dssd.labels import label_default_boxes
from ghm_d2.modeling.dssd.mining import mined_ce_loss
from ghm_d2.modeling.labels import box_levels, label_images
from ghm_d2.modeling.loss_choice import LossChoice
from ghm_d2.modeling.norms import check_norm
from ghm_d2.modeling.trainer_check import check_trainer

CLS_LOSSES = ("mining", "ce", "ghm_c")
REG_LOSSES = ("smooth_l1", "asl1", "ghm_r")
DEFAULTS = LossChoice("mining", "smooth_l1", smooth_l1_beta=1.0)  # as published


@META_ARCH_REGISTRY.register()
class GHMSSD(DenseDetector):
    """SSD (arXiv 1512.02325), and DSSD (arXiv 1701.06659) on a backbone with deconvolution.

    Summed losses (mining, cross entropy, smooth L1, ASL1) are divided by the number of default
    boxes that are matched with objects (SSD, equation 1), at least 1. GHM losses normalise
    themselves. Losses are computed in at least float32. Mining is done per image. Several processes
    train like one process with the whole batch, after one all-reduce of counts per step.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: SSDBackbone,
        head: SSDHead,
        anchor_generator: nn.Module,
        box2box_transform: Box2BoxTransform,
        num_classes: int,
        pixel_mean,
        pixel_std,
        iou_threshold: float = 0.5,
        neg_pos_ratio: float = 3.0,
        ghm_c: nn.Module | None = None,
        ghm_r: nn.Module | None = None,
        test_score_thresh: float = 0.01,
        test_topk_candidates: int = 400,
        test_nms_thresh: float = 0.45,
        max_detections_per_image: int = 200,
        **losses,
    ):
        """
        Args:
            backbone, head, anchor_generator: maps, predictions and default boxes of each level.
            box2box_transform: converts between boxes and deltas.
            num_classes: K.
            pixel_mean, pixel_std: mean and standard deviation of each channel.
            iou_threshold: see `label_default_boxes`.
            neg_pos_ratio: see `mined_ce_loss`.
            ghm_c, ghm_r: `SoftmaxGHMC` and `GHMR`, needed if a loss type names them.
            test_score_thresh, test_topk_candidates: select the boxes of a class that go into NMS.
            test_nms_thresh: IoU above which NMS removes the lower scored box of a class.
            max_detections_per_image: most detections after NMS.
            **losses: the fields of `LossChoice`. `cls_loss_type` is "mining", "ce" (all boxes) or
                "ghm_c"; `box_reg_loss_type` is "smooth_l1", "asl1" or "ghm_r".

        Raises:
            UsageError: an unknown loss type, or a GHM loss without its module.
        """
        super().__init__(backbone, head, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.loss_choice = choice = replace(DEFAULTS, **losses)
        modules = choice.used_modules("MODEL.SSD", CLS_LOSSES, REG_LOSSES, ghm_c, ghm_r)
        self.ghm_c, self.ghm_r = modules
        self.anchor_generator, self.box2box_transform = anchor_generator, box2box_transform
        self.num_classes = num_classes
        self.iou_threshold, self.neg_pos_ratio = iou_threshold, neg_pos_ratio
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

    @classmethod
    def from_config(cls, cfg):
        keys = ghm_keys(cfg, "MODEL.SSD")
        check_trainer(cfg)
        _check_norm(keys)
        backbone = SSDBackbone(
            build_backbone(cfg),
            keys.IN_FEATURES,
            keys.NUM_LEVELS,
            keys.EXTRA_CHANNELS,
            deconv_channels=keys.DECONV_CHANNELS,
            l2_norm_scale=keys.L2_NORM_SCALE,
            norm=keys.NORM,
        )
        shapes = list(backbone.output_shape().values())
        check_sizes(cfg.MODEL.ANCHOR_GENERATOR.SIZES, len(shapes))
        anchor_generator = build_anchor_generator(cfg, shapes)
        head = SSDHead(
            shapes,
            keys.NUM_CLASSES,
            anchor_generator.num_anchors,
            channels=keys.HEAD_CHANNELS,
            norm=keys.NORM,
            # mining starts from equal scores, as published; from these, losses over all boxes
            # would be dominated by the background at first
            prior_prob=0.0 if keys.CLS_LOSS_TYPE == "mining" else keys.PRIOR_PROB,
        )
        return {
            "backbone": backbone,
            "head": head,
            "anchor_generator": anchor_generator,
            "box2box_transform": Box2BoxTransform(weights=keys.BBOX_REG_WEIGHTS),
            "num_classes": keys.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "test_score_thresh": keys.SCORE_THRESH_TEST,
            "test_topk_candidates": keys.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": keys.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "iou_threshold": keys.IOU_THRESHOLD,
            "neg_pos_ratio": keys.NEG_POS_RATIO,
            "smooth_l1_beta": keys.SMOOTH_L1_BETA,
            **loss_arguments(cfg, keys, len(shapes), softmax=True),
        }

    def forward_training(self, images, features, predictions, gt_instances) -> dict[str, Tensor]:
        """Return `loss_cls` and `loss_box_reg`; `DenseDetector.forward` passes the arguments."""
        anchors = self.anchor_generator(features)
        pred_logits, pred_deltas = self._transpose(predictions)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, pred_logits, gt_labels, pred_deltas, gt_boxes)

    @torch.no_grad()
    def label_anchors(self, anchors: list[Boxes], gt_instances: list[Instances]):
        """Return labels (R,) int64 and boxes (R, 4) of each image: see `label_default_boxes`."""
        boxes, arguments = Boxes.cat(anchors), (self.iou_threshold, self.num_classes)
        return label_images(lambda gt: label_default_boxes(boxes, gt, *arguments), gt_instances)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Return the scalars `loss_cls` and `loss_box_reg`.

        Args:
            anchors: default boxes of each level, R in all.
            pred_logits: (N, R_l, K + 1) per level, background last.
            gt_labels: (R,) per image.
            pred_anchor_deltas: (N, R_l, 4) per level.
            gt_boxes: (R, 4) per image.
        """
        gt_labels = torch.stack(gt_labels)
        pos_mask = gt_labels != self.num_classes
        pred_logits = [upcast(x) for x in pred_logits]
        boxes = [upcast(x) for x in pred_anchor_deltas], gt_boxes, pos_mask
        dense = pos_mask.device.type != "cpu"
        levels = box_levels(anchors, self.box2box_transform, *boxes, dense=dense)
        choice = self.loss_choice
        num_pos = count_foreground(pos_mask, choice.sync)
        ghm_c = begin_ghm_c(self.ghm_c, choice, pred_logits, gt_labels)
        ghm_r = begin_ghm(self.ghm_r, *zip(*levels, strict=True))
        sum_up(num_pos, ghm_c, ghm_r)
        normalizer = num_pos.value.clamp(min=1) / num_pos.world
        loss_cls = ghm_c.total() if ghm_c else self._cls_loss(pred_logits, gt_labels) / normalizer
        loss_box_reg = ghm_r.total() if ghm_r else delta_loss(choice, levels) / normalizer
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg * choice.box_reg_loss_weight}

    def _cls_loss(self, pred_logits, gt_labels: Tensor) -> Tensor:
        """Return the classification loss summed over boxes; GHM-C is computed elsewhere."""
        logits, choice = torch.cat(pred_logits, dim=1), self.loss_choice
        weight = None
        if choice.class_weights:
            weight = choice.class_and_background_weights(logits.device).to(logits)
        if choice.cls_loss_type == "mining":
            return mined_ce_loss(logits, gt_labels, self.neg_pos_ratio, weight)
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), gt_labels.flatten(), weight, reduction="sum"
        )

    def forward_inference(self, images, features, predictions) -> list[Instances]:
        """Return `pred_boxes`, `scores` and `pred_classes` of each image, best first."""
        boxes = Boxes.cat(self.anchor_generator(features)).tensor
        arguments = zip(*self.scores_and_deltas(predictions), images.image_sizes, strict=True)
        return [self._infer_image(boxes, s, d, size) for s, d, size in arguments]

    def scores_and_deltas(self, predictions) -> tuple[Tensor, Tensor]:
        """Return scores (N, R, K) and deltas (N, R, 4) of all levels of the predictions."""
        logits, deltas = (torch.cat(levels, dim=1) for levels in self._transpose(predictions))
        return upcast(logits).softmax(-1)[..., :-1], upcast(deltas)

    def _infer_image(self, boxes: Tensor, scores: Tensor, deltas: Tensor, size) -> Instances:
        """Detect like SSD's DetectionOutput, from boxes (R, 4), scores (R, K), deltas (R, 4)."""
        scores, index = scores.topk(min(len(scores), self.test_topk_candidates), dim=0)
        candidate, classes = (scores > self.test_score_thresh).nonzero().unbind(1)
        scores, index = scores[candidate, classes], index[candidate, classes]
        boxes = self.box2box_transform.apply_deltas(deltas[index], boxes[index])
        keep = batched_nms(boxes, scores, classes, self.test_nms_thresh)
        keep = keep[: self.max_detections_per_image]
        return Instances(
            size, pred_boxes=Boxes(boxes[keep]), scores=scores[keep], pred_classes=classes[keep]
        )

    def _transpose(self, predictions) -> list[list[Tensor]]:
        return self._transpose_dense_predictions(predictions, [self.num_classes + 1, 4])


def _check_norm(keys) -> None:
    """Check MODEL.SSD.NORM with the channels of the layers that have a norm."""
    extra = keys.EXTRA_CHANNELS if len(keys.IN_FEATURES) < keys.NUM_LEVELS else 0
    blocks = [size for out in (extra, keys.HEAD_CHANNELS) for size in (out // 4, out)]
    check_norm("MODEL.SSD.NORM", keys.NORM, filter(None, [keys.DECONV_CHANNELS, *blocks]))
