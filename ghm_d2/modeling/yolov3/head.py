"""YOLOv3's predictions at several scales (arXiv 1804.02767, section 2.3; darknet's yolov3.cfg)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from torch import Tensor, nn

from ghm_d2.errors import UsageError
from ghm_d2.modeling.backbones.feature_maps import chosen_maps, require_doubling
from ghm_d2.modeling.norms import check_norm
from ghm_d2.modeling.yolov3.darknet import conv_block

BOX_AND_OBJECTNESS = 5  # x, y, w, h and objectness, before the classes


class YOLOv3Head(nn.Module):
    """Predicts from the coarsest map to the finest; each level passes features to the next.

    The layers are defined in the order of yolov3.cfg, on which `darknet_weights` relies.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: Sequence[int],
        num_anchors: Sequence[int],
        num_classes: int,
        norm: str = "BN",
        prior_prob: float = 0.01,
    ):
        """
        Args:
            in_channels: channels of the backbone's maps, the finest first, as in the next two.
            channels: C of each level; its 1x1 convolutions have C, its 3x3 convolutions 2C.
            num_anchors: A, the number of priors of each level.
            num_classes: K.
            norm: see Detectron2's `get_norm`.
            prior_prob: initial objectness, 0.01 as in RetinaNet. darknet's 0.5 makes the first
                losses of the many background priors some hundred times as large.

        Raises:
            UsageError: `channels` below 1, or an unknown norm.
        """
        super().__init__()
        if min(channels) < 1:
            raise UsageError(f"MODEL.YOLOV3.CHANNELS must be at least 1, not {tuple(channels)}")
        check_norm("MODEL.YOLOV3.NORM", norm, channels)
        levels, routed = [], 0
        sizes = list(zip(in_channels, channels, num_anchors, strict=True))
        for map_channels, c, a in reversed(sizes):
            levels.append(_Level(map_channels, routed, c, a, num_classes, norm, prior_prob))
            routed = c
        self.levels = nn.ModuleList(levels)  # the coarsest first

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return predictions (N, A * (5 + K), H, W) from maps (N, C, H, W), the finest level first.

        A prior's channels are in darknet's order: x, y (before the sigmoid), w, h, objectness and
        class logits.
        """
        predictions, coarser = [], None
        for level, x in zip(self.levels, reversed(features), strict=True):
            prediction, coarser = level(x, coarser)
            predictions.append(prediction)
        return predictions[::-1]


def check_levels(keys, shapes: dict[str, ShapeSpec]) -> tuple[list[int], list[int]]:
    """Return the strides and channels of the maps that `keys`, MODEL.YOLOV3, names.

    Raises:
        UsageError: the backbone lacks a map, lists differ in length, strides do not double, a
            level has no priors, or a prior is not a pair of sides above 0.
    """
    names = list(keys.IN_FEATURES)
    maps = chosen_maps("MODEL.YOLOV3.IN_FEATURES", names, shapes)
    for key in ("CHANNELS", "ANCHORS"):
        if len(keys[key]) != len(names):
            raise UsageError(
                f"MODEL.YOLOV3.{key} has {len(keys[key])} levels, but IN_FEATURES has "
                f"{len(names)}; give one entry per feature, the finest first"
            )
    require_doubling("MODEL.YOLOV3.IN_FEATURES", names, maps)
    for level in keys.ANCHORS:
        if not _is_list(level) or not level or not all(map(_is_prior, level)):
            raise UsageError(
                "MODEL.YOLOV3.ANCHORS must have one or more pairs (width, height) for each level, "
                f"in px and above 0, not {level!r}"
            )
    return [one.stride for one in maps], [one.channels for one in maps]


def _is_list(value) -> bool:
    return isinstance(value, (list, tuple))


def _is_prior(shape) -> bool:
    if not _is_list(shape) or len(shape) != 2:
        return False
    return all(isinstance(side, (int, float)) and 0 < side < math.inf for side in shape)


class _Level(nn.Module):
    """One level; `routed` is the number of channels from the coarser level, 0 for the coarsest."""

    def __init__(self, map_channels, routed, c, num_anchors, num_classes, norm, prior_prob):
        super().__init__()
        self.route = conv_block(routed, c, 1, norm=norm) if routed else None
        convs = [conv_block(map_channels + (c if routed else 0), c, 1, norm=norm)]
        for _ in range(2):
            convs += [conv_block(c, 2 * c, 3, norm=norm), conv_block(2 * c, c, 1, norm=norm)]
        self.convs = nn.Sequential(*convs)
        self.branch = conv_block(c, 2 * c, 3, norm=norm)
        size = BOX_AND_OBJECTNESS + num_classes
        self.pred = Conv2d(2 * c, num_anchors * size, kernel_size=1)
        nn.init.normal_(self.pred.weight, std=0.01)
        nn.init.zeros_(self.pred.bias)
        with torch.no_grad():
            bias = self.pred.bias.view(num_anchors, size)
            bias[:, BOX_AND_OBJECTNESS - 1] = -math.log((1 - prior_prob) / prior_prob)

    def forward(self, x: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the predictions, and the features that the next finer level reads."""
        if coarser is not None:
            # not scale_factor=2: an odd side of a map is rounded up in the coarser one
            upsampled = F.interpolate(self.route(coarser), size=x.shape[-2:], mode="nearest")
            x = torch.cat([upsampled, x], dim=1)
        x = self.convs(x)
        return self.pred(self.branch(x)), x
