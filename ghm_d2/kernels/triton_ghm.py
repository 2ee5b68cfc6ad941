"""GHM's sums and gradients as Triton kernels: the backend for CUDA.

Each loss takes two passes. `*_regions` reads the inputs once and adds up, by unit region, the
samples and their plain losses; the density turns the counts into weights, and the loss is
`(weights * losses).sum()`. `*_grad` reads the inputs again and writes the gradient. Nothing of
the size of contiguous inputs is kept in between, and nothing waits for the device.

The arithmetic is float32, or float64 where an input is. Sums are float64 and, without atomic
operations, the same in every run. A logit or delta that is not finite makes its sample's loss and
its gradient NaN, and never an index fault; in an ignored sample it does nothing.

This module needs the package `triton`, which some platforms lack: import it only where
`importlib.util.find_spec("triton")` finds one. On CPU tensors the kernels run in Triton's
interpreter, if TRITON_INTERPRET=1 was set before Triton was imported.

Equations are those of Li, Liu and Wang, AAAI 2019, arXiv 1811.05181.
"""

import functools
import math

import torch
import triton
from torch import Tensor

from ghm_d2.kernels import reference
from ghm_d2.kernels.reference import (
    LOWEST_OCTAVE,
    SIZE_SLOTS,
    SLOTS_PER_OCTAVE,
    as_tensor,
    upcast,
)
from ghm_d2.kernels.triton_density import density_kernel
from ghm_d2.kernels.triton_samples import (
    asl1_grad_kernel,
    asl1_regions_kernel,
    sigmoid_grad_kernel,
    sigmoid_regions_kernel,
    size_counts_kernel,
    softmax_grad_kernel,
    softmax_regions_kernel,
)

NAME = "triton"
BLOCK = 1024  # samples that a program handles at a time
COMPARISONS = 16384  # at most, between a block's samples and the unit regions: registers
TILE = 2048  # logits of a softmax that a program handles at a time, or one row
PROGRAMS_PER_MULTIPROCESSOR = 12  # that add up: a multiple of the few that run at once


def available() -> bool:
    """Whether the kernels can run: on CUDA, or anywhere in Triton's interpreter."""
    return interpreted() or torch.cuda.is_available()


def sigmoid_regions(
    logits: Tensor, labels: Tensor, bins: int, alpha: float = -1.0, gamma: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Samples and losses by unit region; a sample is one (row, column) pair.

    l = BCE(x, t) and g = |p - t| (section 3.1), or focal loss (Lin et al., arXiv 1708.02002,
    equation 5).

    Args:
        logits: (N, K) floating point.
        labels: (N,) int64; 0..K-1 a class, K background, negative ignored.
        bins: number of unit regions M.
        alpha: factor of foreground, 1 - alpha that of background; negative: neither.
        gamma: at least 0.

    Returns:
        counts: (bins,) int64. losses: (bins,) float64, sums of l.
    """
    options = _sigmoid(logits, alpha, gamma)
    return _regions(sigmoid_regions_kernel, (logits, labels), logits.numel(), bins, **options)


def sigmoid_grad(
    logits: Tensor, labels: Tensor, weights: Tensor, alpha: float = -1.0, gamma: float = 0.0
) -> Tensor:
    """weights[region] * dl/dx of each sample, 0 in ignored rows.

    Args:
        logits, labels, alpha, gamma: those of `sigmoid_regions`.
        weights: (bins,) floating point, on their device.

    Returns:
        of the shape and dtype of `logits`, contiguous.
    """
    options = _sigmoid(logits, alpha, gamma)
    return _grad(sigmoid_grad_kernel, (logits, labels), logits.numel(), weights, **options)


def softmax_regions(logits: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Samples and cross entropy by unit region; a sample is one row.

    l = CE(x, y) and g = 1 - p_y, half the L1 norm of its gradient. Logits are (N, K + 1),
    labels 0..K, or negative where ignored. Otherwise as `sigmoid_regions`.
    """
    return _regions(softmax_regions_kernel, (logits, labels), len(logits), bins, **_softmax(logits))


def softmax_grad(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """weights[region] * (softmax - onehot) of each row; otherwise as `sigmoid_grad`."""
    return _grad(softmax_grad_kernel, (logits, labels), len(logits), weights, **_softmax(logits))


def asl1_regions(
    pred: Tensor, target: Tensor, valid: Tensor, mu: float | Tensor, bins: int
) -> tuple[Tensor, Tensor]:
    """Samples and ASL1 by unit region; a sample is one coordinate.

    l = sqrt(d^2 + mu^2) - mu (equation 9), g = |d| / sqrt(d^2 + mu^2), with d = pred - target.

    Args:
        pred, target: (N, 4) floating point.
        valid: (N, 4) bool. Where not, `pred` and `target` may be anything.
        mu: > 0, in the unit of `pred`; a number, or a tensor of no dimensions on its device.
        bins: number of unit regions M.

    Returns:
        counts: (bins,) int64. losses: (bins,) float64, sums of l.
    """
    tensors = pred, target, valid, as_tensor(mu, pred, torch.float64)
    return _regions(asl1_regions_kernel, tensors, pred.numel(), bins)


def asl1_grad(
    pred: Tensor, target: Tensor, valid: Tensor, mu: float | Tensor, weights: Tensor
) -> Tensor:
    """weights[region] * d / sqrt(d^2 + mu^2) of each coordinate, 0 where not valid.

    Arguments are those of `asl1_regions`; weights and result as in `sigmoid_grad`.
    """
    tensors = pred, target, valid, as_tensor(mu, pred, torch.float64)
    return _grad(asl1_grad_kernel, tensors, pred.numel(), weights)


def regions(kind, pred, target, valid, mu, bins, by_class, alpha, gamma) -> tuple[Tensor, Tensor]:
    """As `cpu.regions`; a density for each class is counted in plain PyTorch."""
    found = []
    for x, y, *others in _levels(kind, pred, target, valid):
        if kind == "sigmoid" and by_class:
            found.append(_regions_by_class(x, y, bins))
        elif kind == "sigmoid":
            found.append(sigmoid_regions(x, y, bins, alpha, gamma))
        elif kind == "softmax":
            found.append(softmax_regions(x, y, bins))
        else:
            found.append(asl1_regions(x, y, others[0], mu, bins))
    counts, losses = zip(*found, strict=True)
    return torch.stack(counts), torch.stack(losses)


def gradient(
    kind, pred, target, valid, mu, bins, by_class, alpha, gamma, weights: Tensor, scale: Tensor
) -> list[Tensor]:
    """As `cpu.gradient`."""
    found, weights = [], weights * scale
    levels = _levels(kind, pred, target, valid)
    for (x, y, *others), w in zip(levels, weights, strict=True):
        if kind == "sigmoid" and by_class:
            found.append(_grad_by_class(x, y, w, bins))
        elif kind == "sigmoid":
            found.append(sigmoid_grad(x, y, w, alpha, gamma))
        elif kind == "softmax":
            found.append(softmax_grad(x, y, w))
        else:
            found.append(asl1_grad(x, y, others[0], mu, w))
    return found


def _levels(kind: str, pred, target, valid) -> list[tuple[Tensor, ...]]:
    if kind != "asl1":
        return list(zip(pred, target, strict=True))
    valid = valid or [torch.ones_like(x, dtype=torch.bool) for x in pred]
    return list(zip(pred, target, valid, strict=True))


def _regions_by_class(logits: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    loss, norm, valid = reference.sigmoid_samples(upcast(logits), labels)
    index = reference.unit_regions(norm, valid, bins, by_class=True)
    regions = bins * logits.shape[1]
    sums = torch.zeros(regions + 1, dtype=torch.float64, device=logits.device)
    sums.scatter_add_(0, index.flatten(), loss.double().flatten())
    return reference.histogram(index, regions), sums[:regions]


def _grad_by_class(logits: Tensor, labels: Tensor, weights: Tensor, bins: int) -> Tensor:
    _, norm, valid = reference.sigmoid_samples(upcast(logits), labels)
    index = reference.unit_regions(norm, valid, bins, by_class=True)
    own = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    slope = reference.harmonized_losses(torch.where(own, -norm, norm), index, weights)
    return torch.where(valid, slope, 0).to(logits.dtype)


def size_counts(pred, target, valid) -> Tensor:
    """`reference.size_counts` of all levels."""
    scale = {"PER_OCTAVE": SLOTS_PER_OCTAVE, "LOWEST": LOWEST_OCTAVE}
    counts = [
        _regions(size_counts_kernel, level, level[0].numel(), SIZE_SLOTS, **scale)[0]
        for level in _levels("asl1", pred, target, valid)
    ]
    return torch.stack(counts).sum(0)


def density(
    counts, foreground, ema, num_updates, ema_foreground, momentum, prior, own, normalizer,
    ema_init, training, factor,
) -> Tensor:  # fmt: skip
    """`reference.update_density` in one launch; its state is contiguous."""
    levels, bins = counts.shape
    programs = levels if own else 1
    weights = torch.empty(levels, bins, dtype=torch.float64, device=ema.device)
    _launch(
        density_kernel, programs, weights, counts.contiguous(), foreground, ema, num_updates,
        ema_foreground, LEVELS=levels // programs, BINS=bins, SLOTS=triton.next_power_of_2(bins),
        MOMENTUM=momentum, LOG_MOMENTUM=math.log(momentum) if momentum else 0.0, PRIOR=float(prior),
        NORMALIZER=normalizer, EMA_INIT=ema_init, TRAINING=training, FACTOR=float(factor),
    )  # fmt: skip
    return weights


def _sigmoid(logits, alpha=-1, gamma=0):
    # floats, since 2 and 2.0 would be compiled apart
    return {"COLUMNS": logits.shape[1], "ALPHA": float(alpha), "GAMMA": float(gamma)}


def _softmax(logits):
    """A program handles whole rows, of as many columns as a power of two."""
    columns = logits.shape[1]
    width = triton.next_power_of_2(columns)
    return {
        "COLUMNS": columns,
        "WIDTH": width,
        "BLOCK": min(max(TILE // width, 1), 64),
        "num_warps": min(max(width // 1024, 4), 16),
    }


def _regions(kernel, tensors, samples, bins, **options):
    """Counts and losses of each unit region, from the partial sums of each program."""
    device = tensors[0].device
    slots = triton.next_power_of_2(bins + 1)
    # at least a sample for each of a program's 128 threads
    options.setdefault("BLOCK", min(BLOCK, max(COMPARISONS // slots, 128)))
    programs = min(triton.cdiv(samples, options["BLOCK"]), _most_programs(device))
    counts = torch.empty(programs, slots, dtype=torch.int64, device=device)
    sums = torch.empty(programs, slots, dtype=torch.float64, device=device)
    tensors = [t.contiguous() for t in tensors]
    _launch(kernel, programs, counts, sums, *tensors, samples, BINS=bins, SLOTS=slots, **options)
    return counts[:, :bins].sum(0), sums[:, :bins].sum(0)


def _grad(kernel, tensors, samples, weights, **options):
    """A gradient of the shape and dtype of the first tensor."""
    options.setdefault("BLOCK", BLOCK)
    programs = triton.cdiv(samples, options["BLOCK"])
    gradient = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    tensors = [t.contiguous() for t in (weights, *tensors)]
    _launch(kernel, programs, gradient, *tensors, samples, BINS=len(weights), **options)
    return gradient


def _launch(kernel, programs, out, *arguments, **options):
    if programs:
        with torch.cuda.device_of(out):
            kernel[(programs,)](out, *arguments, **options)


@functools.cache
def _most_programs(device):
    if interpreted():
        return 2  # so that tests meet more than one
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return PROGRAMS_PER_MULTIPROCESSOR * processors


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors too."""
    return not isinstance(density_kernel, triton.JITFunction)
