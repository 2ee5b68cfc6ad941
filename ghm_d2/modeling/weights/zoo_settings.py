"""Training settings of Detectron2's model zoo weights that the tensors do not show."""

import math
import re

from ghm_d2.config import load_config
from ghm_d2.config.detectors import DETECTORS
from ghm_d2.errors import UsageError

_IMAGES = (
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.RESNETS.STRIDE_IN_1X1",
)
_DETECTOR = (
    "MODEL.FPN.P6_INPUT",
    "MODEL.FPN.P7_RELU",
    "MODEL.ANCHOR_GENERATOR.OFFSET",
    "MODEL.ANCHOR_GENERATOR.SIZES",
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
)
_IMAGENET = {  # values of _IMAGES
    "MSRA": ("BGR", [103.53, 116.28, 123.675], [1.0, 1.0, 1.0], True),
    "torchvision": ("RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375], False),
}
_NAME = re.compile(
    r"(?:detectron2://|https://dl\.fbaipublicfiles\.com/detectron2/)?"
    r"(?:ImageNetPretrained/(MSRA|torchvision)/R-\d+\.pkl|(\w+-\w+/[\w-]+)(?:\.yaml|/\d+/model_\w+\.pkl))"
)


def other_settings(cfg) -> str:
    """Return a line on keys of `cfg` that differ from the training of the zoo's MODEL.WEIGHTS.

    Returns:
        the line; "" if no key differs, the weights are not the zoo's or the backbone is no ResNet.
    """
    found = _NAME.fullmatch(cfg.MODEL.WEIGHTS)
    if not found or "resnet" not in cfg.MODEL.BACKBONE.NAME:
        return ""
    imagenet, config = found.groups()
    wanted = (
        _of_config(config, cfg) if config else dict(zip(_IMAGES, _IMAGENET[imagenet], strict=True))
    )
    other = [key for key, value in wanted.items() if not _same(_value(cfg, key), value)]
    keys = " ".join(f"{key} {_word(wanted[key])}" for key in other)
    return keys and f"{cfg.MODEL.WEIGHTS} was trained with other settings; to use them, add {keys}"


def _of_config(config: str, cfg) -> dict:
    try:
        zoo = load_config(f"{config}.yaml")
    except UsageError:  # a configuration of a later Detectron2
        return {}
    of_zoo, ours = (DETECTORS.get(c.MODEL.META_ARCHITECTURE) for c in (zoo, cfg))
    alike = of_zoo is not None and of_zoo == ours  # two unknown detectors may differ
    keys = (*_IMAGES, *_DETECTOR) if alike else _IMAGES
    return {key: _value(zoo, key) for key in keys}


def _word(value) -> str:
    return str(value).replace(" ", "") or "''"


def _value(cfg, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _same(one, other) -> bool:
    """Return whether values agree to 1 %: publications round mean colours to whole numbers."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=0.01)
    return one == other
