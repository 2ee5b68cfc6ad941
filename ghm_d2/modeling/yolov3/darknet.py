"""DarkNet-53 as a Detectron2 backbone (Redmon and Farhadi, arXiv 1804.02767, table 1)."""

import fvcore.nn.weight_init as weight_init
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ghm_d2.config.add_keys import ghm_keys
from ghm_d2.errors import UsageError
from ghm_d2.modeling.backbones.freeze import freeze_batch_norm
from ghm_d2.modeling.norms import check_norm

FINEST_OUTPUT = 3  # "res3", of stride 8


def conv_block(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, norm: str = "BN"
) -> Conv2d:
    """Build a convolution, a norm and LeakyReLU(0.1); it has a bias only if `norm` is ""."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=nn.LeakyReLU(0.1, inplace=True),
    )
    weight_init.c2_msra_fill(conv)
    return conv


class ResidualBlock(nn.Module):
    """A 1x1 convolution to half the channels and a 3x3 one back to all, added to the input."""

    def __init__(self, channels: int, norm: str = "BN"):
        super().__init__()
        self.conv1 = conv_block(channels, channels // 2, 1, norm=norm)
        self.conv2 = conv_block(channels // 2, channels, 3, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape of `x`, (N, C, H, W)."""
        return x + self.conv2(self.conv1(x))


class DarkNet(Backbone):
    """A stem, and stages that each halve the size and double the channels.

    Stage n has stride 2**n and is called "res<n>", as in Detectron2. The outputs are the maps of
    stride 8 and more. DarkNet-53 has "res3" (256 channels), "res4" (512) and "res5" (1024).

    The layers are defined in the order of darknet's cfg files, on which `darknet_weights` relies.
    """

    def __init__(
        self,
        in_channels: int = 3,
        stem_channels: int = 32,
        depths: tuple[int, ...] = (1, 2, 8, 8, 4),
        norm: str = "BN",
        freeze_at: int = 0,
    ):
        """
        Args:
            in_channels: channels of the images.
            stem_channels: channels of the stem; each stage doubles them.
            depths: number of residual blocks of each stage, for at least three stages.
            norm: see Detectron2's `get_norm`.
            freeze_at: number of first stages, counting the stem, whose parameters and batch
                norm statistics stay fixed.

        Raises:
            UsageError: an argument out of range, or an unknown norm.
        """
        super().__init__()
        if len(depths) < FINEST_OUTPUT or min(depths) < 0:
            raise UsageError(
                f"MODEL.DARKNET.DEPTHS must give the residual blocks of {FINEST_OUTPUT} stages or "
                f"more, such as DarkNet-53's (1, 2, 8, 8, 4), not {tuple(depths)}"
            )
        if stem_channels < 1:
            raise UsageError(f"MODEL.DARKNET.STEM_CHANNELS must be at least 1, not {stem_channels}")
        check_norm("MODEL.DARKNET.NORM", norm, [stem_channels])  # the rest are its multiples
        if freeze_at not in range(len(depths) + 2):
            raise UsageError(
                f"MODEL.DARKNET.FREEZE_AT must be 0 to {len(depths) + 1}, not {freeze_at}"
            )
        self.stem = conv_block(in_channels, stem_channels, 3, norm=norm)
        channels, self.stages = stem_channels, [f"res{i + 1}" for i in range(len(depths))]
        for name, depth in zip(self.stages, depths, strict=True):
            halving = conv_block(channels, 2 * channels, 3, stride=2, norm=norm)
            channels *= 2
            blocks = [ResidualBlock(channels, norm) for _ in range(depth)]
            self.add_module(name, nn.Sequential(halving, *blocks))
        for part in [self.stem, *(getattr(self, name) for name in self.stages)][:freeze_at]:
            freeze_batch_norm(part.requires_grad_(False))

        strides = {name: 2 ** (i + 1) for i, name in enumerate(self.stages)}
        self._out_features = self.stages[FINEST_OUTPUT - 1 :]
        self._out_feature_strides = {name: strides[name] for name in self._out_features}
        self._out_feature_channels = {
            name: stem_channels * strides[name] for name in self._out_features
        }

    @property
    def size_divisibility(self) -> int:
        """The largest stride; at other image sizes a map is not exactly twice the next one."""
        return 2 ** len(self.stages)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return maps (N, C, H / stride, W / stride) by name, from images (N, 3, H, W)."""
        x, maps = self.stem(images), {}
        for name in self.stages:
            maps[name] = x = getattr(self, name)(x)
        return {name: maps[name] for name in self._out_features}


@BACKBONE_REGISTRY.register()
def build_ghm_darknet_backbone(cfg, input_shape: ShapeSpec) -> DarkNet:
    """Build a `DarkNet` from MODEL.DARKNET.*.

    Raises:
        UsageError: see `DarkNet`.
    """
    keys = ghm_keys(cfg, "MODEL.DARKNET")
    return DarkNet(
        input_shape.channels, keys.STEM_CHANNELS, tuple(keys.DEPTHS), keys.NORM, keys.FREEZE_AT
    )
