"""DSSD's deconvolution modules (arXiv 1701.06659, "Deconvolution module", figure 3)."""

from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.layers import Conv2d, ConvTranspose2d, get_norm
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn


class DeconvolutionModule(nn.Module):
    """Combines the next smaller deconvolved map with SSD's map of the output's size."""

    def __init__(self, in_channels: int, lateral_channels: int, channels: int, *, norm: str = "BN"):
        """
        Args:
            in_channels: channels of the smaller map.
            lateral_channels: channels of SSD's map.
            channels: channels of all layers here; 512 in the paper.
            norm: the norm of the 3x3 convolutions; see Detectron2's `get_norm`.
        """
        super().__init__()
        self.deconv = ConvTranspose2d(in_channels, channels, kernel_size=2, stride=2)
        nn.init.xavier_uniform_(self.deconv.weight)
        nn.init.zeros_(self.deconv.bias)
        self.conv = _conv3x3(channels, channels, norm)
        self.lateral = nn.Sequential(
            _conv3x3(lateral_channels, channels, norm, activation=F.relu_),
            _conv3x3(channels, channels, norm),
        )
        _start_near_one(self.conv)

    def forward(self, x: Tensor, lateral: Tensor) -> Tensor:
        """Return a map (N, channels, H, W) from `x`, of half the size, and `lateral` (N, C, H, W).

        If H or W is odd, the size of `x` is rounded up, and the enlarged map is cropped.
        """
        x, (height, width) = self.deconv(x), lateral.shape[-2:]
        # negative padding crops; positive padding is for backbones that round sizes down
        x = F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))
        return F.relu(self.conv(x) * self.lateral(lateral))


class DeconvolutionPath(nn.Module):
    """Goes from the smallest map up to the largest, with a `DeconvolutionModule` for each step."""

    def __init__(self, in_channels: Sequence[int], channels: int, *, norm: str = "BN"):
        """
        Args:
            in_channels: channels of SSD's maps, the largest map first.
            channels, norm: see `DeconvolutionModule`.
        """
        super().__init__()
        *laterals, smallest = in_channels
        below = [*[channels] * (len(laterals) - 1), smallest][-len(laterals) :]
        self.modules_by_level = nn.ModuleList(
            DeconvolutionModule(b, c, channels, norm=norm)
            for b, c in zip(below, laterals, strict=True)
        )
        self.out_channels = [*[channels] * len(laterals), smallest]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return maps of the same sizes; the smallest stays as it is, as in figure 1."""
        out = [maps[-1]]
        for module, lateral in zip(reversed(self.modules_by_level), maps[-2::-1], strict=True):
            out.insert(0, module(out[0], lateral))
        return out


def _conv3x3(in_channels: int, out_channels: int, norm: str, activation=None) -> Conv2d:
    layer = Conv2d(
        in_channels,
        out_channels,
        kernel_size=3,
        padding=1,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=activation,
    )
    c2_msra_fill(layer)
    return layer


def _start_near_one(layer: Conv2d) -> None:
    """Start a normed layer's outputs near 1, so that a product passes its other factor on.

    The authors start from a trained SSD instead. If only the backbone is pretrained, products
    of six factors near 0 learn slowly.
    """
    if isinstance(getattr(layer.norm, "bias", None), nn.Parameter):
        nn.init.constant_(layer.norm.weight, 0.1)
        nn.init.ones_(layer.norm.bias)
