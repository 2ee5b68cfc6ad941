"""A trained detector as one file that runs without Detectron2 and this project: ONNX, TorchScript.

Both are traced (`torch.onnx.export` with dynamo=False): `torch.export` cannot follow Detectron2's
padding, whose size depends on the picture's.
"""

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ghm_d2.config.detectors import detector_name, with_masks
from ghm_d2.errors import UsageError
from ghm_d2.inference.load import class_names

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt"}  # of each format's files
METADATA = "ghm_d2.json"  # the key in ONNX's metadata, and TorchScript's extra file
INPUT = "image"
INSTALL = "pip install 'ghm_d2[export]'"
OPSET = 17


def check_format(form: str) -> None:
    """Raises: UsageError where there is no such format, or what writes it is not installed."""
    if form not in SUFFIXES:
        raise UsageError(f"--format is one of {', '.join(SUFFIXES)}, not {form!r}")
    if form == "onnx":
        try:
            import onnx  # noqa: F401
        except ImportError:
            raise UsageError(f"--format onnx needs the package onnx: {INSTALL}") from None


def export(model: nn.Module, cfg, form: str) -> bytes:
    """The file of `model`, in evaluation mode and on a CPU, in the format "onnx" or "torchscript".

    Its graph takes one image, (3, H, W) of any height and width, in INPUT.FORMAT, of 0 to 255 and
    resized as `ghm predict` does; it scales values and pads by itself. ONNX takes float32,
    TorchScript uint8 too. It gives, best first and after NMS, boxes (n, 4), XYXY in px of that
    image, scores (n,) in [0, 1] and classes (n,), int64; of Mask R-CNN masks too, (n, 1, 28, 28)
    probabilities within the box. `describe` is in the file, as JSON.

    Thresholds are those of `model`. NMS shifts the classes apart and takes them together, as
    torchvision does up to 1000 boxes; it takes more of them class by class, so that float32's
    rounding can decide otherwise there where boxes are thousands of px large.

    Raises:
        UsageError: an unknown format, `onnx` is not installed, or a detector that is not known.
    """
    check_format(form)
    if not isinstance(model, DenseDetector | GeneralizedRCNN):
        raise UsageError(
            f"{detector_name(cfg)} ({cfg.MODEL.META_ARCHITECTURE}) cannot be exported: RetinaNet, "
            "YOLOv3, SSD, DSSD, FCOS, Faster R-CNN and Mask R-CNN can"
        )
    example, metadata = _example(cfg), json.dumps(describe(model, cfg))
    outputs = [output["name"] for output in describe(model, cfg)["outputs"]]
    write = partial(_onnx, outputs=outputs) if form == "onnx" else _torchscript
    with torch.no_grad(), warnings.catch_warnings(), _traceable(model):
        warnings.simplefilter("ignore")  # of the tracer, on Python numbers that do not vary
        return write(_ImageToDetections(model).eval(), example, metadata)


def example_size(cfg) -> tuple[int, int]:
    """Height and width in px of a picture as INPUT.* resizes it."""
    height = cfg.INPUT.MIN_SIZE_TEST or 256  # 0 stands for "as it is"
    return height, height if cfg.INPUT.RESIZE == "square" else height * 5 // 4


def _example(cfg) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the same file for the same weights
    return torch.randint(0, 256, (3, *example_size(cfg)), generator=generator).float()


def describe(model: nn.Module, cfg) -> dict:
    """What somebody who has only the file must know to run it."""
    sizes = ("RESIZE", "MIN_SIZE_TEST", "MAX_SIZE_TEST")
    return {
        "detector": detector_name(cfg),
        "class_names": class_names(cfg),
        "input": {
            "name": INPUT,
            "shape": [3, "height", "width"],
            "dtype": "float32",
            "format": cfg.INPUT.FORMAT,
            "range": [0, 255],
        },
        "resize": {key: cfg.INPUT[key] for key in sizes},
        "size_divisibility": model.backbone.size_divisibility,  # the graph pads to it
        "outputs": [
            {"name": "boxes", "shape": ["n", 4], "dtype": "float32", "format": "XYXY in px"},
            {"name": "scores", "shape": ["n"], "dtype": "float32"},
            {"name": "classes", "shape": ["n"], "dtype": "int64"},
            *([_MASKS] if with_masks(cfg) else []),
        ],
    }


_MASKS = {
    "name": "masks",
    "shape": ["n", 1, 28, 28],
    "dtype": "float32",
    "format": "probabilities within the box, to be resized to it",
}


def detections_of(model: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    """Boxes, scores and classes, and the masks in their boxes where there are some."""
    if isinstance(model, GeneralizedRCNN):
        found = model.inference([{"image": image}], do_postprocess=False)[0]
    else:
        found = model([{"image": image}])[0]["instances"]
    masks = (found.pred_masks,) if found.has("pred_masks") else ()
    return found.pred_boxes.tensor, found.scores, found.pred_classes, *masks


class _ImageToDetections(nn.Module):
    """Tensors in the place of Detectron2's dicts and `Instances`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return detections_of(self.model, image)


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """`model` with those methods replaced whose trace would hold for the example alone."""
    if isinstance(model, GeneralizedRCNN):
        heads = model.roi_heads
        predictor = heads.box_predictor
        replaced = [(predictor, "predict_boxes", _boxes_of_one)]
        replaced += [(predictor, "predict_probs", _probabilities_of_one)]
        replaced += [(heads.mask_head, "forward", _masks_of_one)] if heads.mask_on else []
    else:
        replaced = [(model, "_decode_per_level_predictions", _decode_per_level_predictions)]
    for module, name, method in replaced:
        setattr(module, name, MethodType(method, module))
    try:
        yield
    finally:
        for module, name, _ in replaced:
            delattr(module, name)


# Detectron2's split what they predict by the number of each image's proposals, a Python number
def _boxes_of_one(self, predictions, proposals) -> list[Tensor]:
    """`FastRCNNOutputLayers.predict_boxes` of one image."""
    _, deltas = predictions
    return [self.box2box_transform.apply_deltas(deltas, proposals[0].proposal_boxes.tensor)]


def _probabilities_of_one(self, predictions, _proposals) -> list[Tensor]:
    """`FastRCNNOutputLayers.predict_probs` of one image."""
    scores, _ = predictions
    return [scores.sigmoid() if getattr(self, "use_sigmoid_ce", False) else scores.softmax(-1)]


def _masks_of_one(self, features: Tensor, instances: list[Instances]) -> list[Instances]:
    """A mask head's `forward` in evaluation, of one image."""
    logits = self.layers(features)
    if logits.shape[1] > 1:  # else one mask for all classes
        index = instances[0].pred_classes.view(-1, 1, 1, 1).expand(-1, 1, *logits.shape[2:])
        logits = logits.gather(1, index)
    instances[0].pred_masks = logits.sigmoid()
    return instances


def _decode_per_level_predictions(
    self, anchors, pred_scores, pred_deltas, score_thresh, topk_candidates, image_size
) -> Instances:
    """As `DenseDetector`'s, without the Python number min(topk_candidates, candidates)."""
    keep = pred_scores > score_thresh
    scores, order = pred_scores[keep].sort(descending=True)
    anchor, classes = keep.nonzero()[order[:topk_candidates]].unbind(1)
    boxes = self.box2box_transform.apply_deltas(pred_deltas[anchor], anchors.tensor[anchor])
    return Instances(
        image_size, pred_boxes=Boxes(boxes), scores=scores[:topk_candidates], pred_classes=classes
    )


def _torchscript(module: nn.Module, example: Tensor, metadata: str) -> bytes:
    file = io.BytesIO()
    traced = torch.jit.trace(module, example, check_trace=False)
    torch.jit.save(traced, file, _extra_files={METADATA: metadata})
    return file.getvalue()


def _onnx(module: nn.Module, example: Tensor, metadata: str, outputs: list[str]) -> bytes:
    import onnx

    file = io.BytesIO()
    torch.onnx.export(
        module,
        (example,),
        file,
        dynamo=False,
        input_names=[INPUT],
        output_names=outputs,
        dynamic_axes={INPUT: {1: "height", 2: "width"}} | {name: {0: "n"} for name in outputs},
        opset_version=OPSET,
    )
    proto = onnx.load_model_from_string(file.getvalue())
    onnx.helper.set_model_props(proto, {METADATA: metadata})
    return proto.SerializeToString()
