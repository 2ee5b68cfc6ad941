"""RetinaNet checkpoints of mmdetection (1, 2 and 3), and of GHM's authors, who built on it.

Names and the order of anchors are converted here; other differences from Detectron2's networks are
matters of configuration. Settings that no tensor shows, such as the order of colours, are compared
with the model's, and the weights are refused if they differ.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling import RetinaNet
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet
from torch import Tensor, nn

from ghm_d2.errors import WeightsError, printable
from ghm_d2.modeling.backbones.top_block import PlainP6P7

_RETINANET = "bbox_head.retina_cls.weight"
_MMDET = ("neck.lateral_convs.", "neck.fpn_convs.", "bbox_head.", "rpn_head.rpn_", "roi_head.")
# not loaded: counters, averages of losses, and mean colours, which are compared instead
_UNUSED = re.compile(r".+\.num_batches_tracked|bbox_head\.loss_\w+\..+|data_preprocessor\..+")
_PARTS = {
    "backbone.conv1.": "backbone.bottom_up.stem.conv1.",
    "backbone.bn1.": "backbone.bottom_up.stem.conv1.norm.",
    "bbox_head.retina_cls.": "head.cls_score.",
    "bbox_head.retina_reg.": "head.bbox_pred.",
}
_BLOCK, _OUR_BLOCK = r"backbone\.layer(\d)\.(\d+)\.", "backbone.bottom_up.res{}.{}."
_NUMBERED = (  # their name, our name, a, b: their first number n becomes a * n + b in ours
    (_BLOCK + r"conv(\d)\.(.+)", _OUR_BLOCK + "conv{}.{}", 1, 1),
    (_BLOCK + r"bn(\d)\.(.+)", _OUR_BLOCK + "conv{}.norm.{}", 1, 1),
    (_BLOCK + r"downsample\.0\.(.+)", _OUR_BLOCK + "shortcut.{}", 1, 1),
    (_BLOCK + r"downsample\.1\.(.+)", _OUR_BLOCK + "shortcut.norm.{}", 1, 1),
    (r"neck\.lateral_convs\.(\d)\.conv\.(.+)", "backbone.fpn_lateral{}.{}", 1, 3),
    (r"neck\.fpn_convs\.([0-2])\.conv\.(.+)", "backbone.fpn_output{}.{}", 1, 3),
    (r"neck\.fpn_convs\.([34])\.conv\.(.+)", "backbone.top_block.p{}.{}", 1, 3),
    (r"bbox_head\.cls_convs\.(\d+)\.conv\.(.+)", "head.cls_subnet.{}.{}", 2, 0),
    (r"bbox_head\.reg_convs\.(\d+)\.conv\.(.+)", "head.bbox_subnet.{}.{}", 2, 0),
)
_COLOURS = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # mean and std of R, G, B
_IS = r"['\"]?\s*[=:]\s*"
_MOST = 50  # longest list to read: an untrusted text must not use up the memory
_NEAR = {"rtol": 0.0, "atol": 1e-3}


def is_mmdet(state: Mapping[str, Any]) -> bool:
    """Return whether a state dict has mmdetection's names, for any detector."""
    return any(name.startswith(_MMDET) for name in state)


def from_mmdet(
    state: Mapping[str, Tensor], meta: Any, model: nn.Module, path: str
) -> tuple[dict[str, Tensor], str]:
    """Return the state dict under Detectron2's names, and a line on its origin.

    Args:
        state: a state dict that mmdetection saved.
        meta: the checkpoint's "meta": mmdetection's version and configuration, if present. Missing
            settings default to those of its retinanet_r50_fpn and of the authors' experiments.
        model: the RetinaNet that the weights are for; it is not changed.
        path: the file's path, for messages.

    Raises:
        WeightsError: the weights are of another detector or for other anchors, or the model has
            other settings than they were trained with; then the message lists the keys to set.
    """
    if _RETINANET not in state:
        raise WeightsError(f"{path}: of mmdetection's detectors, only RetinaNet can be loaded")
    bottom_up = getattr(getattr(model, "backbone", None), "bottom_up", None)
    if not (isinstance(model, RetinaNet) and isinstance(model.backbone, FPN)):
        raise WeightsError(
            f"{path} is mmdetection's RetinaNet, but this model is not a RetinaNet with an FPN"
        )
    if not isinstance(bottom_up, ResNet):
        raise WeightsError(f"{path} has a ResNet, but this model has another backbone")
    facts = _Facts(meta if isinstance(meta, dict) else {})
    line = f"{path}: RetinaNet of mmdetection {facts.version or '(unknown version)'}"
    settings = _settings(facts, model)
    wrong = [f"{key} {value}" for key, value, is_so in settings if not is_so]
    if wrong:
        raise WeightsError(f"{line} was trained with other settings; add {' '.join(wrong)}")
    order = _anchor_order(facts, model, path)
    renamed = {}
    for name, tensor in state.items():
        if not _UNUSED.fullmatch(name):
            if name.startswith(("bbox_head.retina_cls.", "bbox_head.retina_reg.")):
                tensor = _reorder(tensor, order, name, path)
            renamed[_rename(name)] = tensor
    _check_parts(renamed, model, path)
    known = "trained with" if facts.text else "its settings are not recorded and assumed to be"
    line += f"; {known} {' '.join(f'{key} {value}' for key, value, _ in settings)}"
    if facts.classes:
        line += f"; its classes, in this order: {facts.classes}"
    return renamed, line


class _Facts:
    """The version, configuration text and classes that a checkpoint's `meta` holds."""

    def __init__(self, meta: Mapping[str, Any]):
        version = meta.get("mmdet_version", "3" if "mmengine_version" in meta else "")
        self.version = printable(version[:20]) if isinstance(version, str) else ""
        self.legacy = self.version.startswith(("0.", "1."))
        texts = (meta.get(key) for key in ("config", "cfg"))
        self.text = "\n".join(text for text in texts if isinstance(text, str))
        data = meta.get("dataset_meta")  # of version 3
        named = data if isinstance(data, dict) else {}
        self.classes = _some(meta.get("CLASSES") or named.get("classes"))

    def numbers(self, key: str, default: Sequence[float]) -> list[float]:
        """Return the list of numbers that follows `key`, or `default`."""
        found = re.search(rf"\b{key}{_IS}[\[(]([\d\s.,eE+-]*)[\])]", self.text)
        try:
            numbers = [float(word) for word in re.split(r"[\s,]+", found[1]) if word]
        except (TypeError, ValueError):
            numbers = []
        return numbers if 0 < len(numbers) <= _MOST else list(default)

    def number(self, key: str, default: float) -> float:
        """Return the number that follows `key`, or `default`."""
        found = re.search(rf"\b{key}{_IS}(\d{{1,5}}(?:\.\d+)?)\b", self.text)
        return float(found[1]) if found else default

    def says(self, key: str, value: str) -> bool:
        """Return whether `key` is followed by this value somewhere in the text."""
        return bool(re.search(rf"\b{key}{_IS}['\"]?{value}\b", self.text))


def _settings(facts: _Facts, model: nn.Module) -> list[tuple[str, str, bool]]:
    """List (key, value that the weights were trained with, whether the model has that value)."""
    colours = "BGR" if facts.says("(?:bgr_)?to_rgb", "False") else "RGB"
    mean, std = facts.numbers("mean", _COLOURS[0]), facts.numbers("std", _COLOURS[1])
    relu = facts.says("relu_before_extra_convs", "True")
    held = float(model.anchor_generator.offset)
    # version 1 centred anchors in their cells, 2 and 3 at the cells' corners
    offset = 0.5 if facts.legacy else facts.number("center_offset", 0.0)
    if not facts.version and held in (0.0, 0.5):
        offset = held
    weights = [1 / max(d, 1e-6) for d in facts.numbers("target_stds", [1.0] * 4)]
    caffe = facts.says("style", "caffe")
    block, top = model.backbone.bottom_up.stages[1][0], model.backbone.top_block
    settings = [
        ("INPUT.FORMAT", colours, model.input_format == colours),
        ("MODEL.PIXEL_MEAN", _listed(mean), _same(model.pixel_mean, mean)),
        ("MODEL.PIXEL_STD", _listed(std), _same(model.pixel_std, std)),
        ("MODEL.FPN.P7_RELU", str(relu), isinstance(top, PlainP6P7) != relu),
        (
            "MODEL.ANCHOR_GENERATOR.OFFSET",
            str(offset),
            abs(held - offset) < 1e-6,
        ),
        (
            "MODEL.RETINANET.BBOX_REG_WEIGHTS",
            _listed(weights),
            _same(torch.tensor(model.box2box_transform.weights), weights),
        ),
    ]
    if isinstance(block, BottleneckBlock):
        in_1x1 = block.conv1.stride != (1, 1)
        settings.append(("MODEL.RESNETS.STRIDE_IN_1X1", str(caffe), in_1x1 == caffe))
    return settings


def _listed(numbers: Sequence[float]) -> str:
    return f"[{','.join(f'{number:g}' for number in numbers)}]"


def _some(names: Any) -> str:
    """Return the first five of a list of names; "" for anything else."""
    if not isinstance(names, list | tuple):
        return ""
    shown = ", ".join(printable(f"{name:.40}") for name in names[:5] if isinstance(name, str))
    return f"{shown}, ... ({len(names)})" if len(names) > 5 else shown


def _same(held: Tensor, wanted: Sequence[float]) -> bool:
    held = held.detach().flatten().cpu()
    return held.numel() == len(wanted) and torch.allclose(held, torch.tensor(wanted), **_NEAR)


def _anchor_order(facts: _Facts, model: nn.Module, path: str) -> list[int]:
    """Return mmdetection's index of each of our anchors at a location."""
    ratios = torch.tensor(facts.numbers("(?:anchor_)?ratios", (0.5, 1.0, 2.0)))
    octaves = min(int(facts.number("scales_per_octave", 3)), _MOST)
    scales = facts.number("octave_base_scale", 4) * 2 ** (torch.arange(octaves) / octaves)
    orders = set()
    generator = model.anchor_generator
    for stride, anchors in zip(generator.strides, generator.cell_anchors, strict=True):
        height, width = (f[:, None] * scales * stride for f in (ratios.sqrt(), 1 / ratios.sqrt()))
        theirs = torch.stack([width.flatten(), height.flatten()], dim=1)
        ours = anchors.cpu()[:, 2:] - anchors.cpu()[:, :2]
        same = ((ours[:, None] / theirs - 1).abs() < 1e-3).all(dim=2)
        if len(ours) != len(theirs) or not (same.sum(dim=1) == 1).all():
            raise WeightsError(
                f"{path} was trained with other anchors than those of MODEL.ANCHOR_GENERATOR: "
                f"ratios {_listed(ratios.tolist())}, sizes {_listed(scales.tolist())} times the "
                "stride"
            )
        orders.add(tuple(same.int().argmax(dim=1).tolist()))
    if len(orders) > 1:
        raise WeightsError(
            f"{path} lists the anchors of a location in another order on each level; set the same "
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS and number of SIZES for all levels"
        )
    return list(orders.pop())


def _check_parts(state: Mapping[str, Tensor], model: nn.Module, path: str) -> None:
    extra = [name for name in state if name not in model.state_dict()]
    lacking = [name for name, _ in model.named_parameters() if name not in state]
    if extra or lacking:
        which = f"it has {extra[0]}" if extra else f"it lacks {lacking[0]}"
        raise WeightsError(
            f"{path} has another architecture than this model: {which} ({len(extra)} tensors too "
            f"many, {len(lacking)} missing); check keys such as MODEL.RESNETS.DEPTH"
        )


def _reorder(tensor: Tensor, order: list[int], name: str, path: str) -> Tensor:
    """Reorder mmdetection's outputs, which are grouped by anchor, to our order of anchors."""
    if not tensor.dim() or len(tensor) % len(order):
        raise WeightsError(
            f"{path}: {name} of shape {tuple(tensor.shape)} does not fit {len(order)} anchors"
        )
    return tensor.unflatten(0, (len(order), -1))[order].flatten(0, 1)


def _rename(name: str) -> str:
    """Return Detectron2's name for a name of mmdetection; the same name if no rule matches."""
    for theirs, ours in _PARTS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    for pattern, ours, factor, first in _NUMBERED:
        found = re.fullmatch(pattern, name)
        if found:
            number, *rest = found.groups()
            return ours.format(factor * int(number) + first, *rest)
    return name
