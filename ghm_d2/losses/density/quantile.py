"""A quantile of absolute values, from a moving average over many batches."""

import torch
from torch import Tensor

from ghm_d2 import kernels
from ghm_d2.kernels.reference import SIZE_SLOTS
from ghm_d2.losses.density.state import CountState
from ghm_d2.losses.reduce import check_range


class MovingQuantile(CountState):
    """A quantile of sizes |d|, from a moving average of the histogram of log2 |d|.

    It is interpolated within a slot, a quarter of an octave. Nothing waits for the device.

    Args:
        quantile: in (0, 1), or 0 if the histogram is not used.
        momentum: momentum of the moving average, in [0, 1).
        start: the value before any size has been counted.

    Raises:
        ValueError: the quantile is out of range.
    """

    histogram: Tensor

    def __init__(self, quantile: float, momentum: float, start: float):
        super().__init__()
        check_range("mu_quantile", quantile, 0, 1)
        self.quantile, self.momentum, self.start = quantile, momentum, start
        self.unused = () if quantile else ("histogram",)
        self.add_counts("histogram", SIZE_SLOTS)

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """Update the average with `reference.size_counts`; a batch without sizes has no effect."""
        step = counts.any() * (1 - self.momentum)
        self.histogram.lerp_(counts.to(self.histogram.dtype), step.to(self.histogram.dtype))

    def forward(self, kernel: str = "auto") -> Tensor:
        """Return the quantile, 0-dim, computed by one of `kernels.KERNELS`."""
        return kernels.quantile(self.histogram, self.quantile, self.start, kernel=kernel)
