"""Exports a detector as an ONNX or TorchScript file that runs without Detectron2 and this project.

Both are traced (`torch.onnx.export` with dynamo=False): `torch.export` cannot follow Detectron2's
padding, whose size depends on the picture's.
"""

import copy
import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from torch import Tensor, nn

from ghm_d2.config.detectors import detector_name, with_masks
from ghm_d2.errors import UsageError
from ghm_d2.inference.exporting.dense import ONE_STAGE, detect
from ghm_d2.inference.load import class_names

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt"}  # format -> suffix of its files
METADATA = "ghm_d2.json"  # the key in ONNX's metadata, and TorchScript's extra file
INPUT, BATCH_INPUT = "image", "images"
INSTALL = "pip install 'ghm_d2[export]'"
OPSET = 17


def check_format(form: str, half: bool = False) -> None:
    """Raise UsageError for an unknown format, a missing package, or float16 in TorchScript."""
    if form not in SUFFIXES:
        raise UsageError(f"--format must be one of {', '.join(SUFFIXES)}, not {form!r}")
    if half and form != "onnx":
        raise UsageError(
            "--half needs --format onnx: a TorchScript file runs on the CPU it was traced on, "
            "where float16 is slower than float32"
        )
    if form == "onnx":
        try:
            import onnx  # noqa: F401
        except ImportError:
            raise UsageError(f"--format onnx needs the package onnx: {INSTALL}") from None


def export(model: nn.Module, cfg, form: str, *, batch: bool = False, half: bool = False) -> bytes:
    """Return `model`, in evaluation mode on a CPU, as a file in the format "onnx" or "torchscript".

    The graph takes one image (3, H, W) of any height and width, in INPUT.FORMAT, values 0 to
    255, resized as by `ghm predict`; it normalises and pads the image itself. ONNX takes float32,
    TorchScript also uint8. After NMS and best first, it returns boxes (n, 4), XYXY in px of that
    image, scores (n,) in [0, 1] and classes (n,), int64; for Mask R-CNN also masks (n, 1, 28, 28),
    probabilities within the box. The file contains the result of `describe` as JSON.

    Thresholds are those of `model`. NMS takes all classes together, with their boxes shifted apart.
    torchvision does this for up to 1000 boxes and takes the classes one by one for more. Its result
    can then differ by float32's rounding if boxes are thousands of px large.

    Args:
        batch: the graph takes images (N, 3, H, W) of one size, for any N, and returns boxes
            (N, D, 4), scores (N, D), classes (N, D) and num_detections (N,), int64. D is
            TEST.DETECTIONS_PER_IMAGE; an image's unused rows are zeros, with class -1.
        half: weights and network are float16; inputs, outputs and the decoding of boxes float32.

    Raises:
        UsageError: the format or the detector is unknown, `onnx` is not installed, `batch` is set
            for a two-stage detector, or `half` for TorchScript.
    """
    check_format(form, half)
    if not isinstance(model, (*ONE_STAGE, GeneralizedRCNN)):
        raise UsageError(
            f"{detector_name(cfg)} ({cfg.MODEL.META_ARCHITECTURE}) cannot be exported; only "
            "RetinaNet, YOLOv3, SSD, DSSD, FCOS, Faster R-CNN and Mask R-CNN can"
        )
    if batch and isinstance(model, GeneralizedRCNN):
        raise UsageError(
            f"--batch works only for one-stage detectors, not {detector_name(cfg)}, whose second "
            "stage has proposals for each image; leave it out and run the file once per image"
        )
    about, example = describe(model, cfg, batch=batch, half=half), _example(cfg)
    if half:  # PyTorch's float16 is slow on a CPU
        example = example[:, :128, :160]
    if batch:  # two images: the trace would broadcast an axis of length 1
        example = torch.stack([example, example.flip(-1)])
    module = _Graph(_halved(model) if half else model, batch)
    write = _onnx if form == "onnx" else _torchscript
    with torch.no_grad(), warnings.catch_warnings(), _traceable(module.model):
        warnings.simplefilter("ignore")  # the tracer warns of Python numbers, which do not vary
        return write(module.eval(), example, about)


def example_size(cfg) -> tuple[int, int]:
    """Return height and width in px of an example picture, resized as INPUT.* says."""
    height = cfg.INPUT.MIN_SIZE_TEST or 256  # 0 stands for no resizing
    return height, height if cfg.INPUT.RESIZE == "square" else height * 5 // 4


def _example(cfg) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the same file for the same weights
    return torch.randint(0, 256, (3, *example_size(cfg)), generator=generator).float()


def describe(model: nn.Module, cfg, *, batch: bool = False, half: bool = False) -> dict:
    """Return what one needs to know to run the file; the arguments are those of `export`."""
    sizes = ("RESIZE", "MIN_SIZE_TEST", "MAX_SIZE_TEST")
    images = ["batch"] if batch else []
    many = [*images, cfg.TEST.DETECTIONS_PER_IMAGE] if batch else ["n"]  # detections
    outputs = [
        {"name": "boxes", "shape": [*many, 4], "dtype": "float32", "format": "XYXY in px"},
        {"name": "scores", "shape": many, "dtype": "float32"},
        {"name": "classes", "shape": many, "dtype": "int64"},
    ]
    outputs += [_MASKS] if with_masks(cfg) else []
    outputs += [{"name": "num_detections", "shape": images, "dtype": "int64"}] if batch else []
    return {
        "detector": detector_name(cfg),
        "class_names": class_names(cfg),
        "precision": "float16" if half else "float32",  # of the network alone
        "input": {
            "name": BATCH_INPUT if batch else INPUT,
            "shape": [*images, 3, "height", "width"],
            "dtype": "float32",
            "format": cfg.INPUT.FORMAT,
            "range": [0, 255],
            "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),  # what to pad images of a batch with
        },
        "resize": {key: cfg.INPUT[key] for key in sizes},
        "size_divisibility": model.backbone.size_divisibility,  # the graph pads to multiples of it
        "outputs": outputs,
    }


_MASKS = {
    "name": "masks",
    "shape": ["n", 1, 28, 28],
    "dtype": "float32",
    "format": "probabilities within the box, to be resized to it",
}


def detections_of(model: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    """Return an image's boxes, scores, classes and, if any, masks within the boxes."""
    if isinstance(model, GeneralizedRCNN):
        found = model.inference([{"image": image}], do_postprocess=False)[0]
    else:
        found = model([{"image": image}])[0]["instances"]
    masks = (found.pred_masks,) if found.has("pred_masks") else ()
    return found.pred_boxes.tensor, found.scores, found.pred_classes, *masks


class _Graph(nn.Module):
    """The graph of `export`: `model` with tensors instead of Detectron2's dicts and `Instances`."""

    def __init__(self, model: nn.Module, batch: bool):
        super().__init__()
        self.model, self.batch = model, batch

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.model, GeneralizedRCNN):
            return detections_of(self.model, images)
        boxes, scores, classes = detect(self.model, images if self.batch else images[None])
        found = scores > 0
        if self.batch:
            return boxes, scores, classes, found.sum(1)
        return boxes[found], scores[found], classes[found]


def _halved(model: nn.Module) -> nn.Module:
    """Return a copy with float16 layers between float32 inputs and outputs.

    The box predictor and the mask head of two-stage detectors stay float32: they are small, and
    their inputs are float32.
    """
    model = copy.deepcopy(model)
    if isinstance(model, GeneralizedRCNN):
        parts = [model.backbone, model.proposal_generator.rpn_head, model.roi_heads.box_head]
    else:
        parts = [model.backbone, model.head]
    for part in parts:
        part.half()
        part.register_forward_pre_hook(lambda _, inputs: _cast(inputs, torch.float16))
        part.register_forward_hook(lambda _, _inputs, outputs: _cast(outputs, torch.float32))
    return model


def _cast(x, dtype: torch.dtype):
    """Cast a tensor, or all tensors in nested dicts, lists and tuples, to `dtype`."""
    if isinstance(x, dict):
        return {key: _cast(value, dtype) for key, value in x.items()}
    return x.to(dtype) if isinstance(x, Tensor) else type(x)(_cast(value, dtype) for value in x)


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Replace, within the context, methods of a two-stage `model` that a trace would freeze."""
    replaced = []
    if isinstance(model, GeneralizedRCNN):
        heads = model.roi_heads
        predictor = heads.box_predictor
        replaced += [(predictor, "predict_boxes", _boxes_of_one)]
        replaced += [(predictor, "predict_probs", _probabilities_of_one)]
        replaced += [(heads.mask_head, "forward", _masks_of_one)] if heads.mask_on else []
    for module, name, method in replaced:
        setattr(module, name, MethodType(method, module))
    try:
        yield
    finally:
        for module, name, _ in replaced:
            delattr(module, name)


# Detectron2's methods split predictions by the images' numbers of proposals, which a trace freezes
def _boxes_of_one(self, predictions, proposals) -> list[Tensor]:
    """`FastRCNNOutputLayers.predict_boxes` for one image."""
    _, deltas = predictions
    return [self.box2box_transform.apply_deltas(deltas, proposals[0].proposal_boxes.tensor)]


def _probabilities_of_one(self, predictions, _proposals) -> list[Tensor]:
    """`FastRCNNOutputLayers.predict_probs` for one image."""
    scores, _ = predictions
    return [scores.sigmoid() if getattr(self, "use_sigmoid_ce", False) else scores.softmax(-1)]


def _masks_of_one(self, features: Tensor, instances: list[Instances]) -> list[Instances]:
    """A mask head's `forward` in evaluation, for one image."""
    logits = self.layers(features)
    if logits.shape[1] > 1:  # else one mask for all classes
        index = instances[0].pred_classes.view(-1, 1, 1, 1).expand(-1, 1, *logits.shape[2:])
        logits = logits.gather(1, index)
    instances[0].pred_masks = logits.sigmoid()
    return instances


def _torchscript(module: nn.Module, example: Tensor, about: dict) -> bytes:
    file = io.BytesIO()
    traced = torch.jit.trace(module, example, check_trace=False)
    torch.jit.save(traced, file, _extra_files={METADATA: json.dumps(about)})
    return file.getvalue()


def _onnx(module: nn.Module, example: Tensor, about: dict) -> bytes:
    import onnx

    file, tensors = io.BytesIO(), [about["input"], *about["outputs"]]
    torch.onnx.export(
        module,
        (example,),
        file,
        dynamo=False,
        input_names=[about["input"]["name"]],
        output_names=[output["name"] for output in about["outputs"]],
        dynamic_axes={
            x["name"]: {i: n for i, n in enumerate(x["shape"]) if isinstance(n, str)}
            for x in tensors
        },
        opset_version=OPSET,
    )
    proto = onnx.load_model_from_string(file.getvalue())
    for value, output in zip(proto.graph.output, about["outputs"], strict=True):
        for dim, n in zip(value.type.tensor_type.shape.dim, output["shape"], strict=True):
            if isinstance(n, int):  # the exporter does not always know it
                dim.dim_value = n
    onnx.helper.set_model_props(proto, {METADATA: json.dumps(about)})
    return proto.SerializeToString()
