"""DSSD's deconvolution modules (arXiv 1701.06659, "Deconvolution module", figure 3)."""

from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.layers import Conv2d, ConvTranspose2d, get_norm
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn


class DeconvolutionModule(nn.Module):
    """A map of the way up, made of the next smaller one there and SSD's map of its own size."""

    def __init__(self, in_channels: int, lateral_channels: int, channels: int, *, norm: str = "BN"):
        """
        Args:
            in_channels: of the smaller map.
            lateral_channels: of SSD's map.
            channels: of all layers here; published as 512.
            norm: of the 3x3 convolutions, as `get_norm` has it.
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
        """Return a map (N, channels, H, W) of `x`, of half the size, and of `lateral` (N, C, H, W).

        Where H or W is odd, `x` is of half the size rounded up, and its last row falls away.
        """
        x, (height, width) = self.deconv(x), lateral.shape[-2:]
        # a padding below 0 crops; above 0 it helps backbones that round sizes down
        x = F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))
        return F.relu(self.conv(x) * self.lateral(lateral))


class DeconvolutionPath(nn.Module):
    """Goes from the smallest map up to the largest, with a `DeconvolutionModule` for each step."""

    def __init__(self, in_channels: Sequence[int], channels: int, *, norm: str = "BN"):
        """
        Args:
            in_channels: of SSD's maps, the largest map first.
            channels, norm: of the modules.
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
    """Start a layer with a norm near 1: as a factor of a product it lets the other factor through.

    The authors start from a trained SSD instead. From a backbone's weights alone, products of
    six factors that are all about 0 learn slowly.
    """
    if isinstance(getattr(layer.norm, "bias", None), nn.Parameter):
        nn.init.constant_(layer.norm.weight, 0.1)
        nn.init.ones_(layer.norm.bias)
