"""Counts added up over the processes of a training: one small all-reduce a step.

With them W processes, each with its part of a batch, train as one process with the whole batch.
DistributedDataParallel averages the processes' gradients, so a process's loss is

    W * (the sum over its own samples) / (what the whole batch says to divide by)

and the mean of these losses is the loss of one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_is_alone = False


class Count:
    """Integers of this process, which `sum_up` replaces by those of all processes.

    Args:
        values: int64 tensors, of shapes that are the same in all processes.
        sync: False: leave them as they are.
        group: the processes; None: all.

    Attributes:
        world: number of processes that are in `values`; 1 before `sum_up`.
    """

    def __init__(self, *values: Tensor, sync: bool = True, group=None):
        self.values, self.sync, self.group, self.world = values, sync, group, 1

    @property
    def value(self) -> Tensor:
        """The first of `values`."""
        return self.values[0]


def sum_up(*counts: Count | None) -> None:
    """Add each count up over its processes, in one all-reduce of all of a group together.

    All processes call it with the same counts, in the same order. Nothing is done for None, nor
    where there is one process, nor within `alone`.
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
    """Over how many processes `sum_up` adds: 1 where there is one, and within `alone`."""
    if _is_alone or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process's losses are its own: no other one need compute any."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before
