"""A quantile of the sizes of numbers, over a moving average of many batches."""

import torch
from torch import Tensor

from ghm_d2 import kernels
from ghm_d2.kernels.reference import SIZE_SLOTS
from ghm_d2.losses.density.state import CountState
from ghm_d2.losses.reduce import check_range


class MovingQuantile(CountState):
    """The quantile of sizes |d| from a moving average of their histogram over log2 |d|.

    Within a slot, a quarter of an octave, it is interpolated. Nothing waits for the device.

    Args:
        quantile: in (0, 1); or 0, where the histogram is not used.
        momentum: of the moving average, in [0, 1).
        start: the value before any size has been counted.

    Raises:
        ValueError: the quantile out of its range.
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
        """Move the average on by `reference.size_counts`; a batch without sizes changes nothing."""
        step = counts.any() * (1 - self.momentum)
        self.histogram.lerp_(counts.to(self.histogram.dtype), step.to(self.histogram.dtype))

    def forward(self, kernel: str = "auto") -> Tensor:
        """The quantile, 0-dim, by one of `kernels.KERNELS`."""
        return kernels.quantile(self.histogram, self.quantile, self.start, kernel=kernel)
