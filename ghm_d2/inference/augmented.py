"""Test-time augmentation (TEST.AUG): detections on resized and mirrored copies, merged by NMS."""

import torch
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference_single_image
from torch import Tensor

from ghm_d2.config.detectors import DETECTORS, TWO_STAGE

BATCH = 3  # copies that go through the network together, as in Detectron2
LOWEST_SCORE = 1e-8  # as in Detectron2: the detector itself has applied its threshold to each copy


def enable_augmentation(cfg) -> None:
    """Set TEST.AUG.ENABLED, without mirrored copies for a detector trained without flips."""
    cfg.TEST.AUG.ENABLED = True
    cfg.TEST.AUG.FLIP = cfg.TEST.AUG.FLIP and cfg.INPUT.RANDOM_FLIP != "none"


def with_augmentation(model, cfg):
    """Wrap a detector so that it follows TEST.AUG; its arguments and results stay the same.

    Two-stage detectors, masks included, get Detectron2's own class; the others get `DenseWithTTA`.
    """
    if not cfg.TEST.AUG.ENABLED:
        return model
    two_stage = cfg.MODEL.META_ARCHITECTURE == TWO_STAGE
    return (GeneralizedRCNNWithTTA if two_stage else DenseWithTTA)(cfg, model)


class DenseWithTTA:
    """A one-stage detector whose boxes on all copies of an image go through NMS together.

    NMS has the detector's threshold and keeps at most TEST.DETECTIONS_PER_IMAGE boxes.
    """

    def __init__(self, cfg, model):
        self._model, self._copies_of = model, DatasetMapperTTA(cfg)
        detector = DETECTORS[cfg.MODEL.META_ARCHITECTURE]
        self._num_classes = cfg.MODEL[detector.classes].NUM_CLASSES
        self._nms_thresh = cfg.MODEL[detector.group].NMS_THRESH_TEST
        self._most = cfg.TEST.DETECTIONS_PER_IMAGE

    def __call__(self, batched_inputs: list[dict]) -> list[dict]:
        return [{"instances": self._detect(item)} for item in batched_inputs]

    def _detect(self, item: dict):
        copies = self._copies_of(item)
        found = []
        for start in range(0, len(copies), BATCH):
            # without the image's own size the boxes stay in the copy's pixels
            inputs = [{"image": copy["image"]} for copy in copies[start : start + BATCH]]
            found += [output["instances"] for output in self._model(inputs)]
        pairs = zip(copies, found, strict=True)
        boxes = torch.cat([_original(copy, f.pred_boxes) for copy, f in pairs])
        scores, classes = (torch.cat([f.get(n) for f in found]) for n in ("scores", "pred_classes"))
        return self._merge(boxes, scores, classes, (item["height"], item["width"]))

    def _merge(self, boxes: Tensor, scores: Tensor, classes: Tensor, size: tuple[int, int]):
        by_class = scores.new_zeros(len(scores), self._num_classes + 1)  # background comes last
        by_class[torch.arange(len(scores), device=scores.device), classes] = scores
        merged, _ = fast_rcnn_inference_single_image(
            boxes, by_class, size, LOWEST_SCORE, self._nms_thresh, self._most
        )
        return merged


def _original(copy: dict, boxes) -> Tensor:
    """Convert boxes (N, 4) from a copy's pixels to those of the image."""
    moved = copy["transforms"].inverse().apply_box(boxes.tensor.cpu().numpy())
    return torch.from_numpy(moved).to(boxes.tensor)
