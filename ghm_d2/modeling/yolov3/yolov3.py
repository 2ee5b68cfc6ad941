"""YOLOv3 (Redmon and Farhadi, arXiv 1804.02767) with a choice of losses."""

from dataclasses import replace
from functools import partial

import torch
from detectron2.config import configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ghm_d2.config.add_keys import ghm_keys
from ghm_d2.errors import UsageError
from ghm_d2.kernels.dtypes import upcast
from ghm_d2.losses import bce_loss
from ghm_d2.losses.density.sync import Count, sum_up
from ghm_d2.modeling.build_losses import build_ghm_c, loss_arguments
from ghm_d2.modeling.dense import begin_ghm, count_foreground, flat_levels
from ghm_d2.modeling.loss_choice import LossChoice, used_module
from ghm_d2.modeling.trainer_check import check_trainer
from ghm_d2.modeling.yolov3.box_loss import box_loss, coordinate_loss
from ghm_d2.modeling.yolov3.head import BOX_AND_OBJECTNESS, YOLOv3Head, check_levels
from ghm_d2.modeling.yolov3.labels import (
    PriorGenerator,
    anchor_deltas,
    box_values,
    encode_boxes,
    label_priors,
    past_sigmoid,
)

CLS_LOSSES = ("ce", "ghm_c")  # also for objectness
REG_LOSSES = ("l2", "smooth_l1", "asl1", "ghm_r")
DEFAULTS = LossChoice("ce", "l2", smooth_l1_beta=0.1)


@META_ARCH_REGISTRY.register()
class GHMYOLOv3(DenseDetector):
    """YOLOv3 on any backbone whose maps' strides double.

    The losses "ce", "l2", "smooth_l1" and "asl1" are sums divided by the number of images, as in
    darknet; GHM losses normalise themselves. Labels and losses do not wait for the device, except
    to log the number of positive anchors every 20 iterations.

    Several processes train like one process with the whole batch, after one all-reduce of counts
    per step. But MODEL.GHM.CLS.DENSITY exact covers each process's own samples only.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        anchor_generator: PriorGenerator,
        num_classes: int,
        pixel_mean,
        pixel_std,
        ignore_iou: float = 0.5,
        obj_loss_type: str = "ce",
        ghm_obj: nn.Module | None = None,
        ghm_c: nn.Module | None = None,
        ghm_r: nn.Module | None = None,
        test_score_thresh: float = 0.005,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.45,
        max_detections_per_image: int = 100,
        **losses,
    ):
        """
        Args:
            backbone, head_in_features: the maps that feed the head, the finest first.
            head: returns (N, A * (5 + K), H, W) per level; see `YOLOv3Head`.
            anchor_generator: the priors of each level.
            num_classes: K.
            pixel_mean, pixel_std: mean and standard deviation of each channel.
            ignore_iou: see `label_priors`.
            obj_loss_type: "ce" or "ghm_c".
            ghm_obj, ghm_c, ghm_r: `GHMC` for objectness, `GHMC` for classes and `GHMR`, needed if
                a loss type names them.
            test_score_thresh: threshold of objectness times class probability.
            test_topk_candidates: most candidates per level before non-maximum suppression (NMS).
            test_nms_thresh: IoU threshold of NMS.
            max_detections_per_image: most detections after NMS.
            **losses: the fields of `LossChoice`. `cls_loss_type` is "ce" or "ghm_c".
                `box_reg_loss_type` is "l2", "smooth_l1", "asl1" or "ghm_r". `smooth_l1_beta` and
                `asl1_mu` are in cells for centres and in logarithms for sides.

        Raises:
            UsageError: an unknown loss type, a GHM loss without its module, or `ignore_iou` or
                the parameter of the box loss out of range.
        """
        super().__init__(
            backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.loss_choice = choice = replace(DEFAULTS, **losses)
        obj_key = "MODEL.YOLOV3.OBJ_LOSS_TYPE"
        self.ghm_obj = used_module(obj_key, obj_loss_type, CLS_LOSSES, ghm_obj)
        modules = choice.used_modules("MODEL.YOLOV3", CLS_LOSSES, REG_LOSSES, ghm_c, ghm_r)
        self.ghm_c, self.ghm_r = modules
        if not 0 <= ignore_iou <= 1:
            raise UsageError(f"MODEL.YOLOV3.IGNORE_IOU must be in [0, 1], not {ignore_iou}")
        self.anchor_generator, self.num_classes = anchor_generator, num_classes
        self.ignore_iou = ignore_iou
        self.box_loss = coordinate_loss(choice)
        self.box2box_transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
        self.test_score_thresh, self.test_topk_candidates = test_score_thresh, test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

    @classmethod
    def from_config(cls, cfg):
        keys = ghm_keys(cfg, "MODEL.YOLOV3")
        check_trainer(cfg)
        backbone = build_backbone(cfg)
        strides, in_channels = check_levels(keys, backbone.output_shape())
        generator = PriorGenerator(keys.ANCHORS, strides)
        levels = len(strides)
        return {
            "backbone": backbone,
            "head": YOLOv3Head(
                in_channels,
                keys.CHANNELS,
                generator.num_anchors,
                keys.NUM_CLASSES,
                keys.NORM,
                keys.PRIOR_PROB,
            ),
            "head_in_features": keys.IN_FEATURES,
            "anchor_generator": generator,
            "num_classes": keys.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "ignore_iou": keys.IGNORE_IOU,
            "obj_loss_type": keys.OBJ_LOSS_TYPE,
            "smooth_l1_beta": keys.SMOOTH_L1_BETA,
            "ghm_obj": build_ghm_c(cfg, levels) if keys.OBJ_LOSS_TYPE == "ghm_c" else None,
            **loss_arguments(cfg, keys, levels),
            "test_score_thresh": keys.SCORE_THRESH_TEST,
            "test_topk_candidates": keys.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": keys.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward_training(self, images, features, predictions, gt_instances) -> dict[str, Tensor]:
        """Return `loss_obj`, `loss_cls` and `loss_box_reg`."""
        predictions, anchors = self._by_anchor(predictions), self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, predictions, gt_labels, gt_boxes, images.image_sizes)

    def label_anchors(self, anchors: list[Boxes], gt_instances: list[Instances]):
        """Return labels (R,) and matched boxes (R, 4) of each image; see `label_priors`."""
        generator = self.anchor_generator
        return label_priors(anchors, generator, gt_instances, self.num_classes, self.ignore_iou)

    def losses(
        self,
        anchors: list[Boxes],
        predictions: list[Tensor],
        gt_labels: list[Tensor],
        gt_boxes: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """Return the losses of arXiv 1804.02767, sections 2.1 and 2.2.

        Args:
            anchors: R_l anchors per level, R in all.
            predictions: (N, R_l, 5 + K) per level.
            gt_labels, gt_boxes: (R,) and (R, 4) per image, from `label_anchors`.
            image_sizes: height and width in px of each image, without its padding.
        """
        choice, background = self.loss_choice, self.num_classes
        labels = torch.stack(gt_labels)  # (N, R)
        positive = (labels >= 0) & (labels != background)
        count_foreground(positive, choice.sync)  # only for the log
        predictions = [upcast(p) for p in predictions]
        objects = torch.where(labels < 0, -1, (labels == background).long())  # 0 object, 1 none
        classes = torch.where(positive, labels, -1)
        obj = flat_levels([p[..., 4:BOX_AND_OBJECTNESS] for p in predictions], objects)
        cls = flat_levels([p[..., BOX_AND_OBJECTNESS:] for p in predictions], classes)
        target, boxes, positive = self._box_levels(anchors, gt_boxes, positive)
        pred = [past_sigmoid(p) for p in predictions]
        images = Count(labels.new_full((), len(labels)), sync=choice.sync)
        given = [[choice.weight_of(y) for y in cls[1]]] if choice.class_weights else []
        ghm_obj, ghm_c = begin_ghm(self.ghm_obj, *obj), begin_ghm(self.ghm_c, *cls, *given)
        ghm_r = begin_ghm(self.ghm_r, pred, target, positive)
        sum_up(images, ghm_obj, ghm_c, ghm_r)
        share = images.value / images.world
        if ghm_r is not None:
            loss_box_reg = ghm_r.total()
        else:
            total = box_loss(pred, target, boxes, positive, image_sizes, self.box_loss)
            loss_box_reg = total / share
        return {
            "loss_obj": ghm_obj.total() if ghm_obj else self._ce_loss(*obj) / share,
            "loss_cls": ghm_c.total() if ghm_c else self._ce_loss(*cls, *given) / share,
            "loss_box_reg": loss_box_reg * choice.box_reg_loss_weight,
        }

    def _ce_loss(
        self, logits: list[Tensor], labels: list[Tensor], weights: list[Tensor] | None = None
    ) -> Tensor:
        """Return the sum of the weighted binary cross entropies of the results of `flat_levels`."""
        loss = partial(bce_loss, reduction="sum", kernel=self.loss_choice.kernel)
        levels = zip(logits, labels, weights or [None] * len(logits), strict=True)
        return sum(loss(x, y, weight=weight) for x, y, weight in levels)

    def _box_levels(self, anchors, gt_boxes, positive):
        """Return encoded boxes, matched boxes and the mask of positive anchors, per level."""
        sizes = [len(a) for a in anchors]
        boxes = torch.stack(gt_boxes).split(sizes, dim=1)
        levels = zip(anchors, boxes, self.anchor_generator.strides, strict=True)
        target = [encode_boxes(a.tensor.expand_as(b), b, stride) for a, b, stride in levels]
        return target, boxes, positive.split(sizes, dim=1)

    def forward_inference(self, images, features, predictions) -> list[Instances]:
        """Return `pred_boxes`, `scores` and `pred_classes` of each image, at its original size."""
        anchors = self.anchor_generator(features)
        scores, deltas = self.scores_and_deltas([a.tensor for a in anchors], predictions)
        return [
            self.inference_single_image(
                anchors, [s[i] for s in scores], [d[i] for d in deltas], image_size
            )
            for i, image_size in enumerate(images.image_sizes)
        ]

    def scores_and_deltas(
        self, anchors: list[Tensor], predictions: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return scores (N, R_l, K) and deltas (N, R_l, 4) of each level of the predictions."""
        predictions = [upcast(p) for p in self._by_anchor(predictions)]
        scores = [
            p[..., 4:5].sigmoid() * p[..., BOX_AND_OBJECTNESS:].sigmoid() for p in predictions
        ]
        levels = zip(predictions, anchors, self.anchor_generator.strides, strict=True)
        deltas = [anchor_deltas(box_values(p), a, stride) for p, a, stride in levels]
        return scores, deltas

    def inference_single_image(
        self,
        anchors: list[Boxes],
        scores: list[Tensor],
        deltas: list[Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """Detect like Detectron2's `RetinaNet`: scores (R_l, K) and deltas (R_l, 4) per level."""
        pred = self._decode_multi_level_predictions(
            anchors, scores, deltas, self.test_score_thresh, self.test_topk_candidates, image_size
        )
        keep = batched_nms(
            pred.pred_boxes.tensor, pred.scores, pred.pred_classes, self.test_nms_thresh
        )
        return pred[keep[: self.max_detections_per_image]]

    def _by_anchor(self, predictions: list[Tensor]) -> list[Tensor]:
        """Rearrange each level's predictions (N, A * (5 + K), H, W) to (N, H * W * A, 5 + K)."""
        size = BOX_AND_OBJECTNESS + self.num_classes
        return self._transpose_dense_predictions([predictions], [size])[0]
