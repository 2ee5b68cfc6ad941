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
from itertools import accumulate
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
PROGRAMS_PER_MULTIPROCESSOR = 12  # a multiple of the few that run at once


def available() -> bool:
    """Return whether the kernels can run: on CUDA, or anywhere in Triton's interpreter.

    Triton must be 3.3 or newer, whose kernels take tuples.
    """
    return hasattr(triton.language.core, "tuple") and (interpreted() or torch.cuda.is_available())


def regions(kind, pred, target, valid, mu, bins, by_class, alpha, gamma) -> tuple[Tensor, Tensor]:
    """Return counts like `cpu.regions`, and an empty (L, 0): `total` computes the losses."""
    num_regions = bins * pred[0].shape[1] if by_class else bins
    counts = pred[0].new_zeros((len(pred), num_regions), dtype=torch.int64)
    inputs = _inputs(pred, target, valid, mu)
    if by_class:
        _count_by_class(counts, inputs[0], inputs[1], bins)
    else:
        options = _options(kind, pred)
        places = _places(pred, options)
        _launch(count_kernel, counts, *inputs, *places, SLOTS=_slots(bins), BINS=bins, **options)
    return counts, counts.new_empty((len(pred), 0), dtype=torch.float64)


def total(kind, pred, target, valid, mu, bins, by_class, alpha, gamma, weights: Tensor) -> Tensor:
    """sum_i weights[region of i] * l_i over all levels, 0-dim float64.

    The arguments are as in `gradient`.
    """
    options = _options(kind, pred, bins, by_class, alpha, gamma)
    rows, starts = _places(pred, options)
    sums = pred[0].new_empty(starts[-1] // 16, dtype=torch.float64)
    inputs = _inputs(pred, target, valid, mu)
    _launch(total_kernel, sums, weights.contiguous(), *inputs, rows, starts, **options)
    return sums.sum()


def gradient(
    kind, pred, target, valid, mu, bins, by_class, alpha, gamma, weights: Tensor, scale: Tensor
) -> list[Tensor]:
    """scale * weights[region] * dl/dx of each sample; arguments as in `cpu.gradient`."""
    options = _options(kind, pred, bins, by_class, alpha, gamma)
    inputs = _inputs(pred, target, valid, mu)
    found = tuple(torch.empty_like(x) for x in inputs[0])
    places = _places(pred, options)
    _launch(gradient_kernel, found, weights.contiguous(), scale, *inputs, *places, **options)
    return [x.to(p.dtype) for x, p in zip(found, pred, strict=True)]


def size_counts(pred, target, valid) -> Tensor:
    """`reference.size_counts`, added up over all levels."""
    counts = pred[0].new_zeros(SIZE_SLOTS, dtype=torch.int64)
    valid = valid or [torch.ones_like(x, dtype=torch.bool) for x in pred]
    *inputs, _ = _inputs(pred, target, valid, None)
    options = _level_options(pred, pred[0].shape[1])
    places = _places(pred, options)
    _launch(
        size_counts_kernel, counts, *inputs, *places, **options, BINS=SIZE_SLOTS,
        SLOTS=_slots(SIZE_SLOTS), PER_OCTAVE=SLOTS_PER_OCTAVE, LOWEST=LOWEST_OCTAVE,
    )  # fmt: skip
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
    with torch.cuda.device_of(weights):
        density_kernel[(programs,)](
            weights, counts.contiguous(), foreground.contiguous(), ema, num_updates, ema_foreground,
            LEVELS=levels // programs, BINS=bins, SLOTS=triton.next_power_of_2(bins),
            MOMENTUM=momentum, LOG_MOMENTUM=math.log(momentum) if momentum else 0.0,
            PRIOR=float(prior), NORMALIZER=normalizer, EMA_INIT=ema_init, TRAINING=training,
            FACTOR=float(factor),
        )  # fmt: skip
    return weights


def _inputs(pred, target, valid, mu) -> tuple:
    """Return pred, target and valid of all levels, and mu, as the kernels take them.

    The tensors of an argument are contiguous and of one dtype. A kind of sample without valid or mu
    gets another tensor in its place, which is not read.

    Raises:
        ValueError: levels differ in their number of classes.
    """
    if len({x.shape[1] for x in pred}) > 1:
        raise ValueError("all feature levels must have the same number of classes")
    if mu is not None and not valid:
        valid = [torch.ones_like(x, dtype=torch.bool) for x in pred]
    levels = (_alike(tensors) for tensors in (pred, target, valid or target))
    return *levels, target[0] if mu is None else mu


def _alike(tensors) -> tuple[Tensor, ...]:
    """Return the tensors in their widest dtype, contiguous, each from a multiple of 16 bytes on.

    Triton would compile a kernel again for each choice of tensors that begin elsewhere.
    """
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    ready = (t.to(dtype).contiguous() for t in tensors)
    return tuple(t if t.data_ptr() % 16 == 0 else t.clone() for t in ready)


def _options(kind: str, pred, bins=None, by_class=False, alpha=-1.0, gamma=0.0) -> dict[str, Any]:
    """Return the options for blocks of samples; with `bins`, those for losses too."""
    columns = pred[0].shape[1]
    options = _level_options(pred, 1 if kind == "softmax" else columns)
    options |= {"KIND": kind, "COLUMNS": columns, "WIDTH": 1}
    if kind == "softmax":
        width = triton.next_power_of_2(columns)  # whole rows
        options |= {"WIDTH": width, "BLOCK": min(max(TILE // width, 1), 64)}
        options |= {"num_warps": min(max(width // 1024, 4), 16)}
    if bins is not None:
        # floats, since 2 and 2.0 would be compiled separately
        options |= {"BINS": bins, "BY_CLASS": by_class}
        options |= {"ALPHA": float(alpha), "GAMMA": float(gamma)}
    return options


def _level_options(pred, per_row: int) -> dict[str, Any]:
    """Return the options of levels whose rows are `per_row` samples each."""
    aligned = all(len(x) * per_row % 16 == 0 for x in pred)
    return {"LEVELS": len(pred), "ALIGNED": aligned, "PER_ROW": per_row, "BLOCK": BLOCK}


def _places(pred, options, groups: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the rows of each level; and the first program of each, and the number of all.

    A level gets a program for each block, or its share of the most programs and at least one. All
    numbers are multiplied by 16, because Triton compiles a kernel again for a number in a tuple
    that is 1, or that 16 divides or not.
    """
    rows = [len(x) for x in pred]
    blocks = [triton.cdiv(n * options["PER_ROW"], options["BLOCK"]) for n in rows]
    every, most = sum(blocks), triton.cdiv(_most_programs(pred[0].device), groups)
    if every > most:
        blocks = [min(n, max(most * n // every, 1)) for n in blocks]
    starts = accumulate(blocks, initial=0)
    return tuple(16 * n for n in rows), tuple(16 * n for n in starts)


def _count_by_class(counts: Tensor, logits, labels, bins: int) -> None:
    columns, slots = logits[0].shape[1], _slots(bins)
    classes = min(max(COUNTERS // slots, 1), triton.next_power_of_2(max(columns, 1)))
    size, groups = max(BLOCK // classes, 16), max(triton.cdiv(columns, classes), 1)
    places = _places(logits, {"PER_ROW": 1, "BLOCK": size}, groups)
    _launch(
        count_by_class_kernel, counts, logits, labels, *places, groups=groups,
        LEVELS=len(logits), COLUMNS=columns, BINS=bins, ROWS=size, CLASSES=classes, SLOTS=slots,
    )  # fmt: skip


def _slots(bins: int) -> int:
    """Return the number of counters, a power of two, for the regions and the ignored samples."""
    return triton.next_power_of_2(bins + 1)


def _launch(kernel, out, *arguments, groups: int = 1, **options) -> None:
    """Launch a kernel whose last argument is `starts`, with a program for each of `groups` too."""
    programs = arguments[-1][-1] // 16
    if programs:
        with torch.cuda.device_of(out if isinstance(out, Tensor) else out[0]):
            kernel[programs, groups](out, *arguments, **options)


@functools.cache
def _most_programs(device):
    if interpreted():
        return 2  # so that tests run more than one program
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return PROGRAMS_PER_MULTIPROCESSOR * processors


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on CPU tensors too."""
    return not isinstance(density_kernel, triton.JITFunction)
