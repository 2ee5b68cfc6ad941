"""GHM's sums and gradients as Triton kernels: the backend for CUDA.

A loss reads its inputs three times. `regions` counts samples by unit region, and the density turns
counts into weights; `total` adds up the weighed losses; `gradient` writes the gradient. If the
inputs are contiguous, no tensor of their size is kept in between. Nothing waits for the device.

The arithmetic is float32, or float64 for float64 inputs. Sums of losses are float64 and the same in
every run, because they use no atomic operations; counts are integers. A NaN or infinite logit or
delta makes the loss and the gradient of its sample NaN, and never an index out of bounds; in an
ignored sample it has no effect.

This module needs the package `triton`, which some platforms lack: import it only where
`importlib.util.find_spec("triton")` finds one. On CPU tensors the kernels run in Triton's
interpreter, if TRITON_INTERPRET=1 was set before Triton was imported.

Equations are those of Li, Liu and Wang, AAAI 2019, arXiv 1811.05181.
"""

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from ghm_d2.kernels import reference
from ghm_d2.kernels.gpu.density import density_kernel
from ghm_d2.kernels.gpu.samples import (
    count_by_class_kernel,
    count_kernel,
    gradient_kernel,
    size_counts_kernel,
    total_kernel,
)
from ghm_d2.kernels.reference import LOWEST_OCTAVE, SIZE_SLOTS, SLOTS_PER_OCTAVE

NAME = "triton"
BLOCK = 1024  # samples that a program handles at a time
TILE = 2048  # softmax logits that a program handles at a time; at least one row
COUNTERS = 512  # counters of a program that counts by class
PROGRAMS_PER_MULTIPROCESSOR = 12  # for counts and sums; a multiple of the few that run at once


def available() -> bool:
    """Return whether the kernels can run: on CUDA, or anywhere in Triton's interpreter."""
    return interpreted() or torch.cuda.is_available()


def regions(kind, pred, target, valid, mu, bins, by_class, alpha, gamma) -> tuple[Tensor, Tensor]:
    """Return counts like `cpu.regions`, and an empty (L, 0): `total` computes the losses."""
    num_regions = bins * pred[0].shape[1] if by_class else bins
    counts = pred[0].new_zeros((len(pred), num_regions), dtype=torch.int64)
    for out, tensors in zip(counts, _levels(pred, target, valid, mu), strict=True):
        if by_class:
            _count_by_class(out, tensors[0], tensors[1], bins)
        else:
            numel, options = _samples(kind, tensors[0])
            _launch_few(
                count_kernel, out, *tensors, numel, SLOTS=_slots(bins), BINS=bins, **options
            )
    return counts, counts.new_empty((len(pred), 0), dtype=torch.float64)


def total(kind, pred, target, valid, mu, bins, by_class, alpha, gamma, weights: Tensor) -> Tensor:
    """sum_i weights[region of i] * l_i over all levels, 0-dim float64.

    The arguments are as in `gradient`.
    """
    most = _most_programs(pred[0].device)
    sums = pred[0].new_zeros((len(pred), most), dtype=torch.float64)
    options = {"BINS": bins, "BY_CLASS": by_class, "ALPHA": float(alpha), "GAMMA": float(gamma)}
    levels = _levels(pred, target, valid, mu)
    for out, w, tensors in zip(sums, weights.contiguous(), levels, strict=True):
        numel, more = _samples(kind, tensors[0])
        _launch_few(total_kernel, out, w, *tensors, numel, **options, **more)
    return sums.sum()


def gradient(
    kind, pred, target, valid, mu, bins, by_class, alpha, gamma, weights: Tensor, scale: Tensor
) -> list[Tensor]:
    """scale * weights[region] * dl/dx of each sample; arguments as in `cpu.gradient`."""
    found = []
    # floats, since 2 and 2.0 would be compiled separately
    options = {"BINS": bins, "BY_CLASS": by_class, "ALPHA": float(alpha), "GAMMA": float(gamma)}
    levels = _levels(pred, target, valid, mu)
    for w, tensors in zip(weights.contiguous(), levels, strict=True):
        out = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
        numel, more = _samples(kind, tensors[0])
        blocks = triton.cdiv(numel, more["BLOCK"])
        _launch(gradient_kernel, (blocks,), out, w, scale, *tensors, numel, **options, **more)
        found.append(out)
    return found


def size_counts(pred, target, valid) -> Tensor:
    """`reference.size_counts`, added up over all levels."""
    counts = pred[0].new_zeros(SIZE_SLOTS, dtype=torch.int64)
    options = {"BINS": SIZE_SLOTS, "SLOTS": _slots(SIZE_SLOTS), "BLOCK": BLOCK}
    scale = {"PER_OCTAVE": SLOTS_PER_OCTAVE, "LOWEST": LOWEST_OCTAVE}
    valid = valid or [torch.ones_like(x, dtype=torch.bool) for x in pred]
    for tensors in _levels(pred, target, valid, None):
        numel = tensors[0].numel()
        _launch_few(size_counts_kernel, counts, *tensors[:3], numel, **options, **scale)
    return counts


def quantile(histogram: Tensor, quantile: float, start: float) -> Tensor:
    """`reference.quantile`; its 128 numbers need no kernel."""
    return reference.quantile(histogram, quantile, start)


def density(
    counts, foreground, ema, num_updates, ema_foreground, momentum, prior, own, normalizer,
    ema_init, training, factor,
) -> Tensor:  # fmt: skip
    """`reference.update_density` in one launch; the buffers must be contiguous."""
    levels, bins = counts.shape
    programs = levels if own else 1
    weights = torch.empty(levels, bins, dtype=torch.float64, device=ema.device)
    _launch(
        density_kernel, (programs,), weights, counts.contiguous(), foreground, ema, num_updates,
        ema_foreground, LEVELS=levels // programs, BINS=bins, SLOTS=triton.next_power_of_2(bins),
        MOMENTUM=momentum, LOG_MOMENTUM=math.log(momentum) if momentum else 0.0, PRIOR=float(prior),
        NORMALIZER=normalizer, EMA_INIT=ema_init, TRAINING=training, FACTOR=float(factor),
    )  # fmt: skip
    return weights


def _levels(pred, target, valid, mu) -> list[tuple[Tensor, ...]]:
    """Return pred, target, valid and mu of each level, contiguous, for the kernels.

    A kind of sample without valid or mu gets another tensor in its place, which is not read.
    """
    if mu is not None and not valid:
        valid = [torch.ones_like(x, dtype=torch.bool) for x in pred]
    levels = zip(pred, target, valid or target, strict=True)
    return [(*(t.contiguous() for t in level), level[1] if mu is None else mu) for level in levels]


def _samples(kind: str, x: Tensor) -> tuple[int, dict[str, Any]]:
    """Return the number of samples, and the options for their blocks."""
    columns = x.shape[1]
    if kind != "softmax":
        return x.numel(), {"KIND": kind, "COLUMNS": columns, "WIDTH": 1, "BLOCK": BLOCK}
    width = triton.next_power_of_2(columns)  # whole rows
    return len(x), {
        "KIND": kind,
        "COLUMNS": columns,
        "WIDTH": width,
        "BLOCK": min(max(TILE // width, 1), 64),
        "num_warps": min(max(width // 1024, 4), 16),
    }


def _count_by_class(counts: Tensor, logits: Tensor, labels: Tensor, bins: int) -> None:
    rows, columns = logits.shape
    slots = _slots(bins)
    classes = min(max(COUNTERS // slots, 1), triton.next_power_of_2(max(columns, 1)))
    size = max(BLOCK // classes, 16)
    blocks, groups = triton.cdiv(rows, size), triton.cdiv(columns, classes)
    programs = min(blocks, triton.cdiv(_most_programs(logits.device), max(groups, 1)))
    _launch(
        count_by_class_kernel, (programs, groups), counts, logits, labels, rows, blocks,
        COLUMNS=columns, BINS=bins, ROWS=size, CLASSES=classes, SLOTS=slots,
    )  # fmt: skip


def _slots(bins: int) -> int:
    """Return the number of counters, a power of two, for the regions and the ignored samples."""
    return triton.next_power_of_2(bins + 1)


def _launch_few(kernel, out, *arguments, **options) -> None:
    """Launch at most `_most_programs` programs, each of which processes many blocks."""
    blocks = triton.cdiv(arguments[-1], options["BLOCK"])
    programs = min(blocks, _most_programs(out.device))
    _launch(kernel, (programs,), out, *arguments, blocks, **options)


def _launch(kernel, grid, out, *arguments, **options) -> None:
    if all(grid):
        with torch.cuda.device_of(out):
            kernel[grid](out, *arguments, **options)


@functools.cache
def _most_programs(device):
    if interpreted():
        return 2  # so that tests run more than one program
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return PROGRAMS_PER_MULTIPROCESSOR * processors


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on CPU tensors too."""
    return not isinstance(density_kernel, triton.JITFunction)
