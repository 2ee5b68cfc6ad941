"""The precision in which losses and counts are computed."""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half precision, and other dtypes unchanged (so that gradcheck works)."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def upcast(x: Tensor) -> Tensor:
    """`x` in the precision that `wide` gives."""
    return x.to(wide(x.dtype))


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which does not support float64."""
    return torch.float32 if device.type == "mps" else torch.float64
