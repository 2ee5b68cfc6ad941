"""Counts added up over the processes of a training run, in one small all-reduce per step.

With these counts, W processes that each have a part of a batch train like one process with the
whole batch. DistributedDataParallel averages the gradients, so the loss of a process is

    W * (the sum over its own samples) / (the divisor of the whole batch)

and the mean of these losses is the loss of one process with the whole batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_is_alone = False


class Count:
    """Counts of this process, which `sum_up` replaces by the sums over all processes.

    Args:
        values: int64 tensors, whose shapes are the same in all processes.
        sync: False: `sum_up` leaves the values unchanged.
        group: the process group; None: all processes.

    Attributes:
        world: number of processes that `values` are summed over; 1 before `sum_up`.
    """

    def __init__(self, *values: Tensor, sync: bool = True, group=None):
        self.values, self.sync, self.group, self.world = values, sync, group, 1

    @property
    def value(self) -> Tensor:
        """The first of `values`."""
        return self.values[0]


def sum_up(*counts: Count | None) -> None:
    """Add up each count over its processes, in one all-reduce per process group.

    All processes must call it with the same counts in the same order. It skips None, and does
    nothing if there is one process or within `alone`.
    """
    synced = [count for count in counts if count is not None and count.sync]
    for group in dict.fromkeys(count.group for count in synced):
        if (world := world_size(group)) > 1:
            _sum_up([count for count in synced if count.group == group], world, group)


def _sum_up(counts: list[Count], world: int, group) -> None:
    together = torch.cat([value.flatten() for count in counts for value in count.values])
    dist.all_reduce(together, group=group)
    for count in counts:
        values = []
        for value in count.values:
            part, together = together.split([value.numel(), together.numel() - value.numel()])
            values.append(part.view(value.shape))
        count.values, count.world = tuple(values), world


def world_size(group=None) -> int:
    """Return the number of processes that `sum_up` adds over, which is 1 within `alone`."""
    if _is_alone or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


@contextmanager
def alone() -> Iterator[None]:
    """Compute losses in this process alone: within it `sum_up` does nothing."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before
