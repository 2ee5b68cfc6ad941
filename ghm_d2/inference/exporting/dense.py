"""One-stage detectors as a function from a batch of images to tensors, which `ghm export` traces.

Detectron2's own inference loops over the images and keeps as many detections as each image has.
A trace would freeze both numbers.
"""

import torch
import torch.nn.functional as F
from detectron2.modeling import RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import nms

from ghm_d2.modeling.dssd.ssd import GHMSSD
from ghm_d2.modeling.yolov3.yolov3 import GHMYOLOv3

ONE_STAGE = RetinaNet, FCOS, GHMYOLOv3, GHMSSD
Padded = tuple[Tensor, Tensor, Tensor]  # boxes (N, D, 4), scores (N, D), classes (N, D)


def detect(model: nn.Module, images: Tensor) -> Padded:
    """Return the detections of `images` (N, 3, H, W), 0 to 255, after NMS, best first.

    Returns:
        boxes (N, D, 4), XYXY in px, scores (N, D) and classes (N, D). D is the model's
        `max_detections_per_image`. Where an image has fewer, the rest has score 0, class -1 and
        boxes of zeros.
    """
    padded = model.preprocess_image([{"image": images}])  # the whole batch as one image
    features = model.backbone(padded.tensor[0])
    features = [features[name] for name in model.head_in_features]
    anchors = [level.tensor for level in model.anchor_generator(features)]
    candidates = _candidates(model, anchors, model.head(features))
    return _suppress(model, *candidates, padded.image_sizes[0])


def _candidates(model, anchors: list[Tensor], predictions) -> tuple[Tensor, Tensor, Tensor]:
    """Return the candidates for NMS: scores (N, C), classes (N, C) and boxes (N, C, 4)."""
    best_of = _best_of_level
    if isinstance(model, GHMSSD):
        best_of, anchors = _best_of_classes, [torch.cat(anchors)]
    scores, deltas = _scores_and_deltas(model, anchors, predictions)
    best = [best_of(s, model.test_topk_candidates) for s in scores]
    boxes = [
        _decode(model.box2box_transform, index, *level)
        for (_, _, index), *level in zip(best, anchors, deltas, strict=True)
    ]
    scores, classes, _ = (torch.cat(x, 1) for x in zip(*best, strict=True))
    return scores, classes, torch.cat(boxes, 1)


def _decode(transform, index: Tensor, anchors: Tensor, deltas: Tensor) -> Tensor:
    """Return boxes (N, C, 4) from anchors (R, 4) and deltas (N, R, 4), picked by `index` (N, C)."""
    deltas = deltas.gather(1, index[..., None].expand(-1, -1, 4))
    boxes = transform.apply_deltas(deltas.flatten(0, 1), anchors[index].flatten(0, 1))
    return boxes.view_as(deltas)


def _scores_and_deltas(model, anchors: list[Tensor], predictions):
    """Return lists of scores (N, R_l, K) and deltas (N, R_l, 4) by level; SSD's are joined."""
    if isinstance(model, GHMSSD):
        return [[x] for x in model.scores_and_deltas(predictions)]
    if isinstance(model, GHMYOLOv3):
        return model.scores_and_deltas(anchors, predictions)
    dims = [model.num_classes, 4, 1][: len(predictions)]  # the last is FCOS's centerness
    logits, deltas, *centerness = model._transpose_dense_predictions(predictions, dims)
    scores = [x.sigmoid() for x in logits]
    if centerness:
        pairs = zip(scores, centerness[0], strict=True)
        scores = [(s * c.sigmoid()).sqrt() for s, c in pairs]
    return scores, deltas


def _best_of_level(scores: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, classes and anchor indices, each (N, C), of the best `scores` (N, R, K)."""
    num_classes, flat = scores.shape[-1], scores.flatten(1)
    best, index = flat.topk(_at_most(flat.shape[1], most), dim=1)
    return best, index % num_classes, index // num_classes


def _best_of_classes(scores: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `_best_of_level`, with the best of each class."""
    best, index = scores.topk(_at_most(scores.shape[1], most), dim=1)
    classes = torch.arange(scores.shape[-1], device=scores.device).expand_as(index)
    return best.flatten(1), classes.flatten(1), index.flatten(1)


def _at_most(count: int | Tensor, most: int) -> Tensor:
    """Return the smaller one as a tensor, because a trace would freeze Python's `min`."""
    return torch.as_tensor(count).clamp(max=most)


def _suppress(model, scores: Tensor, classes: Tensor, boxes: Tensor, size) -> Padded:
    """Apply NMS to `_candidates` by image and class; `size` is the images' (height, width)."""
    most = model.max_detections_per_image
    scores, classes = F.pad(scores, (0, most)), F.pad(classes, (0, most))
    boxes = F.pad(boxes, (0, 0, 0, most))
    counts = scores > model.test_score_thresh
    scores, boxes = scores.where(counts, 0), boxes.where(counts[..., None], 0)
    # as in torchvision's batched_nms, boxes of different classes are shifted apart
    shift = classes * (boxes.flatten(1).amax(1, keepdim=True) + 1)
    chosen = nms_of_images(boxes + shift[..., None], scores, model.test_nms_thresh, most)
    image, index = chosen.unbind(1)
    kept = torch.zeros_like(scores).index_put((image, index), scores[image, index])
    clipped = Boxes(boxes.flatten(0, 1))
    clipped.clip(size)
    boxes = clipped.tensor.view_as(boxes)
    kept = kept.where((boxes[..., 2:] > boxes[..., :2]).all(-1), 0)
    scores, index = kept.topk(most, dim=1)
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    found = scores > 0
    classes = classes.gather(1, index).where(found, -1)
    return boxes.where(found[..., None], 0), scores, classes


def nms_of_images(boxes: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
    """Return image and index, (M, 2) int64, of the boxes that NMS keeps, at most `most` per image.

    Args:
        boxes: (N, C, 4), XYXY.
        scores: (N, C); a box whose score is 0 is left out.
        iou: the IoU above which the box with the lower score is dropped.
    """
    if torch.onnx.is_in_onnx_export():
        return _OnnxNMS.apply(boxes, scores[:, None], iou, most)
    return _nms_loop(boxes, scores, iou, most)


@torch.jit.script_if_tracing
def _nms_loop(boxes: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
    chosen = [torch.zeros((0, 2), dtype=torch.int64, device=boxes.device)]
    for i in range(boxes.shape[0]):
        counts = torch.nonzero(scores[i] > 0)[:, 0]
        kept = counts[nms(boxes[i, counts], scores[i, counts], iou)[:most]]
        chosen.append(torch.stack([torch.full_like(kept, i), kept], dim=1))
    return torch.cat(chosen)


class _OnnxNMS(torch.autograd.Function):
    """ONNX's NonMaxSuppression, which takes a batch; `scores` are (N, 1, C)."""

    @staticmethod
    def forward(_ctx, boxes: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
        return _nms_loop(boxes, scores[:, 0], iou, most)

    @staticmethod
    def symbolic(g, boxes, scores, iou: float, most: int):
        limits = torch.tensor(most), torch.tensor(iou), torch.tensor(0.0)  # score above 0
        constants = [g.op("Constant", value_t=x) for x in limits]
        chosen = g.op("NonMaxSuppression", boxes, scores, *constants)  # image, class 0, index
        return g.op("Gather", chosen, g.op("Constant", value_t=torch.tensor([0, 2])), axis_i=1)
