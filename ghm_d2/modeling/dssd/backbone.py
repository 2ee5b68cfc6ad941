"""The feature maps that SSD predicts from: a backbone's maps, followed by smaller ones."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.resnet import (
    BasicStem,
    BottleneckBlock,
    ResNet,
    build_resnet_backbone,
)
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from ghm_d2.errors import UsageError
from ghm_d2.modeling.backbones.feature_maps import chosen_maps, require_doubling
from ghm_d2.modeling.dssd.deconvolution import DeconvolutionPath


class CaffeStem(BasicStem):
    """ResNet's stem with Caffe's pooling: 3x3 without padding, sizes rounded up.

    An image of 513 px thus has a map of 128 px here, and maps of 64 and 32 px in later stages, as
    in the DSSD paper. Detectron2's stem gives 129 px.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return features (N, C, H / 4, W / 4) of images (N, 3, H, W)."""
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, ceil_mode=True)


@BACKBONE_REGISTRY.register()
def build_ghm_ssd_resnet_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """Build Detectron2's ResNet with `CaffeStem`; MODEL.RESNETS and MODEL.BACKBONE configure it.

    DSSD uses the maps res3 and res5, with res5 at stride 16 (MODEL.RESNETS.RES5_DILATION 2).
    """
    resnet = build_resnet_backbone(cfg, input_shape)
    channels, norm = cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM
    resnet.stem = CaffeStem(input_shape.channels, channels, norm)
    if cfg.MODEL.BACKBONE.FREEZE_AT >= 1:
        resnet.stem.freeze()
    return resnet


class ProjectedBlock(BottleneckBlock):
    """A bottleneck block whose shortcut is always a convolution (`ResBody` of the authors' code).

    With stride 1 it is DSSD's prediction module (c) (figure 2): the skip has a 1x1 convolution even
    if the number of channels stays. With stride 2 it makes the next smaller map, with 2x2
    convolutions on both paths. An odd side is padded by a row of zeros, so that its last row is
    used and no map vanishes.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str = "BN"):
        """
        Args:
            in_channels, out_channels: channels of the maps; inside there are out_channels / 4.
            stride: 1 or 2; also the kernel size of the first convolution and of the shortcut.
            norm: the norm of each convolution; see Detectron2's `get_norm`.
        """
        width = out_channels // 4
        super().__init__(in_channels, out_channels, bottleneck_channels=width, norm=norm)
        self.stride = stride  # the block's stride, which Detectron2 reads
        self.conv1 = _projection(in_channels, width, stride, norm)
        self.shortcut = _projection(in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.stride, 0, -height % self.stride))
        self._check_batch_norm(x)
        return super().forward(x)

    def _check_batch_norm(self, x: Tensor) -> None:
        """Raise UsageError if batch norm would train on one value per channel."""
        values = x.shape[0] * x[0, 0].numel() // self.stride**2
        if self.training and values == 1 and isinstance(self.conv1.norm, nn.BatchNorm2d):
            raise UsageError(
                "MODEL.SSD.NORM BN cannot normalise the 1 x 1 map of a single image; raise "
                "SOLVER.IMS_PER_BATCH to two or more per rank, lower MODEL.SSD.NUM_LEVELS, or set "
                "MODEL.SSD.NORM GN"
            )


class L2Norm(nn.Module):
    """Scales each pixel's features to length 1, then by a learnt factor per channel.

    SSD applies it with an initial factor of 20 to VGG's conv4_3 (section 3.1), whose features are
    much larger than those of later maps. DSSD's authors leave it out on ResNets.
    """

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), float(scale)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised features, (N, C, H, W) like `x`."""
        return F.normalize(x, dim=1) * self.weight[:, None, None]


class SSDBackbone(Backbone):
    """A backbone's maps and smaller ones, each half the one before; stride 2**n is "p<n>"."""

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        num_levels: int,
        extra_channels: int,
        *,
        deconv_channels: int = 0,
        l2_norm_scale: float = 0.0,
        norm: str = "BN",
    ):
        """
        Args:
            bottom_up: the backbone, whose maps come first.
            in_features: names of its maps; each must have twice the stride of the one before.
            num_levels: number of maps in all; `ProjectedBlock`s make the rest (DSSD's res6 to
                res10, with 1024 channels).
            extra_channels: channels of these.
            deconv_channels: channels of DSSD's deconvolution modules; 0 omits them, as in SSD.
            l2_norm_scale: initial scale of the first map's `L2Norm`; 0 omits it.
            norm: the norm of all these layers; see Detectron2's `get_norm`.

        Raises:
            UsageError: the strides do not double, the backbone lacks a feature, or there are fewer
                levels than features.
        """
        super().__init__()
        first, channels = _check_features(bottom_up, in_features, num_levels)
        self.bottom_up, self.in_features = bottom_up, tuple(in_features)
        self.l2_norm = L2Norm(channels[0], l2_norm_scale) if l2_norm_scale else nn.Identity()
        self.extra = nn.ModuleList()
        while len(channels) < num_levels:
            self.extra.append(ProjectedBlock(channels[-1], extra_channels, stride=2, norm=norm))
            channels.append(extra_channels)
        self.deconvolution = nn.Identity()
        if deconv_channels:
            self.deconvolution = DeconvolutionPath(channels, deconv_channels, norm=norm)
            channels = self.deconvolution.out_channels
        strides = [first * 2**i for i in range(num_levels)]
        self._out_features = [f"p{s.bit_length() - 1}" for s in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides, strict=True))
        self._out_feature_channels = dict(zip(self._out_features, channels, strict=True))

    @property
    def size_divisibility(self) -> int:
        """An FPN's own, because it adds maps of two levels; 0, no padding, for other backbones."""
        return self.bottom_up.size_divisibility if isinstance(self.bottom_up, FPN) else 0

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return maps (N, C, H / stride, W / stride), rounded up, from images (N, 3, H, W)."""
        features = self.bottom_up(images)
        maps = [features[name] for name in self.in_features]
        for block in self.extra:
            maps.append(block(maps[-1]))
        maps[0] = self.l2_norm(maps[0])
        return dict(zip(self._out_features, self.deconvolution(maps), strict=True))


def _check_features(bottom_up: Backbone, names: Sequence[str], num_levels: int):
    """Return the stride of the first map, and the channels of each."""
    key = "MODEL.SSD.IN_FEATURES"
    maps = chosen_maps(key, names, bottom_up.output_shape())
    hint = " (with res3 and res5, set MODEL.RESNETS.RES5_DILATION 2)"
    require_doubling(key, names, maps, hint)
    if num_levels < len(names):
        raise UsageError(
            f"MODEL.SSD.NUM_LEVELS must be at least {len(names)}, the number of {key}, not "
            f"{num_levels}"
        )
    return maps[0].stride, [one.channels for one in maps]


def _projection(in_channels: int, out_channels: int, stride: int, norm: str) -> Conv2d:
    layer = Conv2d(
        in_channels,
        out_channels,
        kernel_size=stride,
        stride=stride,
        bias=False,
        norm=get_norm(norm, out_channels),
    )
    c2_msra_fill(layer)
    return layer
