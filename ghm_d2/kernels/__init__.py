"""The inner loops of the losses: count samples by gradient norm, then weigh them.

`reference` defines the computation in plain PyTorch. `operators` does the same faster on devices
with a backend. Forward it reads the logits once on CPUs and twice on GPUs; backward it reads them
again and writes the gradient. This is enough, because the loss

    L = sum_k w_k sum_{i in region k} l_i        (w_k = 1 / (n S_k): paper, equation 8)

needs only the count and the sum of losses of each unit region.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghm_d2.kernels import operators, reference
from ghm_d2.kernels.dtypes import upcast, wide
from ghm_d2.kernels.samples import (
    DeltaSamples,
    Level,
    Samples,
    SigmoidSamples,
    SoftmaxSamples,
    check_deltas,
)

__all__ = [
    "KERNELS",
    "Counted",
    "DeltaSamples",
    "Samples",
    "SigmoidSamples",
    "SoftmaxSamples",
    "compiled",
    "counted",
    "name_for",
    "quantile",
    "size_counts",
    "update_density",
]
KERNELS = ("auto", "torch", "c", "triton")


@dataclass(frozen=True)
class Counted:
    """Samples counted by unit region, ready to be weighed.

    Attributes:
        counts: (L, regions) int64, one row per level.
        total: returns the loss, a differentiable scalar, for float64 weights of that shape, which
            are constants for the gradient: sum_i weights[region of i] * l_i.
        sums: returns this sum for each level.
        each: returns the terms of this sum, one tensor per level; 0 where not valid.
    """

    counts: Tensor
    total: Callable[[Tensor], Tensor]
    sums: Callable[[Tensor], list[Tensor]]
    each: Callable[[Tensor], list[Tensor]]


def counted(
    samples: Samples,
    levels: Sequence[Sequence[Tensor]],
    bins: int,
    weights: Sequence[Tensor] | None = None,
    *,
    kernel: str = "auto",
) -> Counted:
    """Count samples by gradient norm.

    Args:
        samples: the kind of sample.
        levels: the tensors of each level. The first is differentiated.
        bins: number of unit regions; with `samples.by_class`, for each class.
        weights: for each level, a factor on each loss; samples are counted if it is above 0.
        kernel: one of `KERNELS`; "auto" is the compiled kernel of the device, if there is one. It
            is plain PyTorch for `weights`, targets in place of labels, and targets that need a
            gradient, which compiled kernels do not support.

    Raises:
        ValueError: an unknown kernel; tensors whose shapes or devices do not match.
        RuntimeError: the kernel is not available, or does not support these inputs.
    """
    checked = [samples.check(*tensors) for tensors in levels]
    by_reference = functools.partial(_count_by_reference, samples, checked, bins, weights)
    if not _all_compiled(kernel, checked, samples, weights):
        return by_reference()
    arguments = operators.sample_arguments(samples, checked, bins)
    with torch.no_grad():
        counts, losses = operators.regions(*arguments)
    total = functools.partial(operators.loss_of, arguments, losses)
    sums = functools.partial(operators.sums, arguments, losses)
    return Counted(counts, total, sums, lambda weights: by_reference().each(weights))


@torch.no_grad()
def size_counts(levels: Sequence[Sequence[Tensor]], *, kernel: str = "auto") -> Tensor:
    """Add up `reference.size_counts` over all levels, each (pred, target, valid)."""
    checked = [check_deltas(*tensors) for tensors in levels]
    if not _all_compiled(kernel, checked):
        return torch.stack([reference.size_counts(*tensors) for tensors in checked]).sum(0)
    pred, target, *valid = (list(tensors) for tensors in zip(*checked, strict=True))
    return operators.size_counts(pred, target, valid[0] if valid else [])


@torch.no_grad()
def quantile(histogram: Tensor, quantile: float, start: float, *, kernel: str = "auto") -> Tensor:
    """`reference.quantile`; on CPUs it takes one call instead of twenty small ones."""
    usual = histogram.dtype == wide(histogram.dtype) and histogram.is_contiguous()
    if compiled(kernel, histogram.device) and usual:
        return operators.quantile(histogram, quantile, start)
    return reference.quantile(histogram, quantile, start)


def update_density(
    counts: Tensor,
    foreground: Tensor,
    ema: Tensor,
    num_updates: Tensor,
    ema_foreground: Tensor,
    *,
    kernel: str = "auto",
    **options,
) -> Tensor:
    """`reference.update_density`; `ema`, `num_updates` and `ema_foreground` are updated in place.

    Raises:
        RuntimeError: the kernel is not available; the tensors are on several devices.
    """
    state = ema, num_updates, ema_foreground
    arguments = counts.long(), foreground.long(), *state
    devices = {t.device for t in arguments}
    if len(devices) > 1:
        raise RuntimeError(
            f"counts and averages must be on one device, not on {sorted(map(str, devices))}"
        )
    usual = (
        ema.dtype == wide(ema.dtype) == ema_foreground.dtype
        and num_updates.dtype == torch.int64
        and all(t.is_contiguous() for t in state)
    )
    if compiled(kernel, ema.device) and usual:
        return operators.density(*arguments, **options)
    return reference.update_density(*arguments, **options)


def name_for(device: torch.device) -> str:
    """Return the name of the kernel that "auto" selects on a device."""
    return operators.backend_name(device.type)


def compiled(kernel: str, device: torch.device) -> bool:
    """Return whether a compiled kernel runs on a device; False means plain PyTorch.

    Raises:
        ValueError: an unknown kernel.
        RuntimeError: the kernel is not available for this device.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, not {kernel!r}")
    name = "torch" if kernel == "torch" else operators.backend_name(device.type)
    if kernel not in ("auto", name):
        raise RuntimeError(
            f"the kernel {kernel!r} is not available for {device.type}; see `ghm doctor`"
        )
    return name != "torch"


def _all_compiled(kernel: str, levels, samples: Samples | None = None, weights=None) -> bool:
    """Return whether compiled kernels run all levels; RuntimeError if a requested one cannot."""
    found = [compiled(kernel, device) for device in {x.device for x, *_ in levels}]
    targets = [t for _, *others in levels for t in others]
    dense = samples is not None and samples.mu is None and any(t.dim() > 1 for t in targets)
    able = not (dense or weights or any(t.requires_grad for t in targets))
    if kernel in ("c", "triton") and not able:
        raise RuntimeError(
            f"the kernel {kernel!r} supports only integer labels or box targets without gradient, "
            "and no weights; use kernel='auto'"
        )
    return found == [True] and able


def _count_by_reference(
    samples: Samples, levels: Sequence[Level], bins: int, weights: Sequence[Tensor] | None
) -> Counted:
    regions = samples.num_regions(levels[0][0], bins)
    losses, index = [], []
    for i, tensors in enumerate(levels):
        loss, norm, valid = samples.plain(*map(upcast, tensors))
        if weights:
            weight = weights[i]  # one per loss, or (N, 1): one per row
            loss, valid = torch.where(weight > 0, loss * weight, 0), valid & (weight > 0)
        losses.append(loss)
        index.append(reference.unit_regions(norm, valid, bins, samples.by_class))

    def each(weights: Tensor) -> list[Tensor]:
        of = zip(losses, index, weights, strict=True)
        return [reference.harmonized_losses(loss, i, w) for loss, i, w in of]

    def sums(weights: Tensor) -> list[Tensor]:
        return [x.sum() for x in each(weights)]

    def total(weights: Tensor) -> Tensor:
        first, *others = sums(weights)
        return sum(others, first)

    counts = torch.stack([reference.histogram(i, regions) for i in index])
    return Counted(counts, total, sums, each)
