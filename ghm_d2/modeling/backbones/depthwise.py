"""Depthwise convolutions under autocast on a CPU."""

import types

import torch
from torch import Tensor, nn


def keep_depthwise_in_float32(module: nn.Module) -> None:
    """Make the depthwise convolutions of `module` ignore autocast on a CPU, in place.

    PyTorch's backward pass of a depthwise convolution in bfloat16 is about ten times slower on a
    CPU than in float32, and takes more time than bfloat16 saves in all other layers.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels > 1:
            conv.forward = types.MethodType(_forward_in_float32, conv)


def _forward_in_float32(conv: nn.Conv2d, x: Tensor) -> Tensor:
    forward = type(conv).forward  # timm's convolutions override it
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return forward(conv, x)
    with torch.autocast("cpu", enabled=False):
        return forward(conv, x.float())
