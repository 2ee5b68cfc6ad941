"""A quantile of the sizes of numbers, over a moving average of many batches."""

import torch
from torch import Tensor

from ghm_d2.kernels.reference import LOWEST_OCTAVE, SIZE_SLOTS, SLOTS_PER_OCTAVE
from ghm_d2.losses.reduce import check_range
from ghm_d2.losses.state import CountState


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
        moved = self.momentum * self.histogram + (1 - self.momentum) * counts
        self.histogram.copy_(torch.where(counts.sum() > 0, moved, self.histogram))

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The quantile, 0-dim."""
        # not cumsum, which has no deterministic form for CUDA
        cumulative = self.histogram.expand(SIZE_SLOTS, -1).tril().sum(1)
        total = cumulative[-1]
        slot = (cumulative < self.quantile * total).sum().clamp(max=SIZE_SLOTS - 1)
        # an index of no dimensions would wait for the device
        inside, up_to = (x.gather(0, slot[None])[0] for x in (self.histogram, cumulative))
        part = 1 - (up_to - self.quantile * total) / inside.clamp(min=1e-30)
        octave = LOWEST_OCTAVE + (slot + part.clamp(0, 1)) / SLOTS_PER_OCTAVE
        return torch.where(total > 0, octave.exp2(), self.start)
