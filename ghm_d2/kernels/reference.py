"""GHM in plain PyTorch, on any device: the definition that faster kernels must match.

Each kind of loss gives three tensors of the same shape: `loss`, the plain loss l of each sample
(differentiable); `norm`, its gradient norm g in [0, 1] (detached); and `valid`, a mask. The next
steps are the same for all: `unit_regions` and `histogram` count samples by gradient norm, and
`harmonized_losses` weighs them. No step waits for the device or loops over unit regions.

A NaN or infinite logit or delta makes the loss of its sample NaN, and never an index out of bounds.
In a softmax, -inf is a probability of 0, as in `F.cross_entropy`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ghm_d2.kernels.dtypes import exact_dtype, upcast

# the histogram of sizes: from 2^-16 to 2^16
SLOTS_PER_OCTAVE, LOWEST_OCTAVE, SIZE_SLOTS = 4, -16, 128


def as_tensor(x: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a number as a 0-dim tensor on the device of `like`, and a tensor unchanged."""
    # new_tensor would wait for the device
    return x if isinstance(x, Tensor) else like.new_full((), x, dtype=dtype)


def sigmoid_samples(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Binary cross entropy of each (anchor, class) pair; g = |p - t| (paper, section 3.1).

    Args:
        logits: (N, K) floating point.
        labels: (N,) int64; 0..K-1 a class, K background, -1 ignored.

    Returns:
        loss, norm: (N, K). valid: (N, K) bool.
    """
    valid = (labels >= 0)[:, None].expand_as(logits)
    signed = _signed_logits(logits, labels)
    # With s = x for t = 0 and s = -x for t = 1, BCE(x, t) = softplus(s) and |p - t| = sigmoid(s).
    signed = _nan_unless_finite(torch.where(valid, signed, 0))
    # above 40, log(1 + e^s) is s in float64 too; the default, 20, is for float32
    return F.softplus(signed, threshold=40), signed.detach().sigmoid(), valid


def dense_sigmoid_samples(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`sigmoid_samples` with a target in [0, 1] for each logit, negative where ignored."""
    valid = target >= 0
    target = torch.where(valid, target, 0).to(logits)
    x = _nan_unless_finite(torch.where(valid, logits, 0))
    loss = F.softplus(x, threshold=40) - target * x
    return torch.where(valid, loss, 0), (x.detach().sigmoid() - target).abs(), valid


def _signed_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `logits` (N, K) with the entry at the class of each row negated."""
    classes = logits.shape[1]
    if not logits.numel():
        return logits
    column = labels.clamp(0, classes - 1)[:, None]
    foreground = ((labels >= 0) & (labels < classes))[:, None]
    at_class = logits.gather(1, column)
    return logits.scatter(1, column, torch.where(foreground, -at_class, at_class))


def softmax_samples(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of each row; g = 1 - p_y, half the L1 norm of its gradient.

    Args:
        logits: (N, K + 1) floating point.
        labels: (N,) int64; 0..K, -1 ignored.

    Returns:
        loss, norm: (N,). valid: (N,) bool.
    """
    valid = labels >= 0
    logits = torch.where(valid[:, None], logits, 0)
    logits = torch.where(logits < math.inf, logits, math.nan)  # -inf is a probability of 0
    loss = F.cross_entropy(logits, labels.clamp(0, logits.shape[1] - 1), reduction="none")
    return torch.where(valid, loss, 0), -torch.expm1(-loss.detach()), valid


def dense_softmax_samples(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_samples` with probabilities (N, K + 1); rows with a negative one are ignored."""
    valid = (target >= 0).all(1)
    target = torch.where(valid[:, None], target, 0).to(logits)
    logits = torch.where(valid[:, None], logits, 0)
    logits = torch.where(logits < math.inf, logits, math.nan)
    log_p = logits.log_softmax(1)
    loss = -torch.where(target > 0, target * log_p, 0).sum(1)
    norm = (log_p.detach().exp() - target).abs().sum(1) / 2
    return torch.where(valid, loss, 0), norm, valid


def asl1_samples(
    pred: Tensor, target: Tensor, valid: Tensor | None, mu: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Authentic smooth L1 of each coordinate (paper, equation 9); g = |d| / sqrt(d^2 + mu^2).

    Args:
        pred, target: floating point, same shape. Targets of invalid samples may be anything.
        valid: bool, of that shape; None: all are valid.
        mu: > 0, in the unit of `pred`; a number, or a 0-dim tensor on its device.

    Returns:
        loss, norm, valid: of that shape.
    """
    if valid is None:
        valid = torch.ones_like(pred, dtype=torch.bool)
    d = _nan_unless_finite(torch.where(valid, pred - target, 0))
    mu = as_tensor(mu, d, d.dtype).to(d.dtype)
    root = torch.hypot(d, mu)
    # d^2 / (root + mu) = root - mu, without cancellation near 0 or overflow for a large d
    return d * (d / (root + mu)), (d / root).abs().detach(), valid


def size_counts(pred: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the histogram of log2 |pred - target|: (SIZE_SLOTS,) int64.

    Slot k counts sizes from 2^(LOWEST_OCTAVE + k / SLOTS_PER_OCTAVE) up to the start of slot k + 1.
    The first and last slots also count the sizes beyond them. Invalid samples, and sizes that are
    NaN or infinite, are not counted.

    Args:
        pred, target, valid: as in `asl1_samples`.
    """
    size = (upcast(pred) - upcast(target)).detach().abs()
    slot = ((size.log2() - LOWEST_OCTAVE) * SLOTS_PER_OCTAVE).clamp(0, SIZE_SLOTS - 1)
    counted = size.isfinite() if valid is None else size.isfinite() & valid
    slot = torch.where(counted, slot, SIZE_SLOTS)
    return histogram(slot.long(), SIZE_SLOTS)


@torch.no_grad()
def quantile(histogram: Tensor, quantile: float, start: float) -> Tensor:
    """Return a quantile of sizes, 0-dim, interpolated within a slot.

    Args:
        histogram: (SIZE_SLOTS,) floating point, an average of `size_counts`.
        quantile: in (0, 1).
        start: the result if the histogram is empty.
    """
    # not cumsum, which has no deterministic form for CUDA
    cumulative = histogram.expand(SIZE_SLOTS, -1).tril().sum(1)
    total = cumulative[-1]
    slot = (cumulative < quantile * total).sum().clamp(max=SIZE_SLOTS - 1)
    # indexing with a 0-dim tensor would wait for the device
    inside, up_to = (x.gather(0, slot[None])[0] for x in (histogram, cumulative))
    part = 1 - (up_to - quantile * total) / inside.clamp(min=1e-30)
    octave = LOWEST_OCTAVE + (slot + part.clamp(0, 1)) / SLOTS_PER_OCTAVE
    return torch.where(total > 0, octave.exp2(), start)


def _nan_unless_finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, float("nan"))


def unit_regions(norm: Tensor, valid: Tensor, bins: int, by_class: bool = False) -> Tensor:
    """Return each sample's unit region: floor(g * M), the last one closed; past all if invalid.

    Args:
        norm: gradient norms in [0, 1]; NaN lands in some region.
        valid: bool, of the same shape.
        by_class: each column of (N, K) has its own M regions; those of column j start at j * M.

    Returns:
        int64, of the same shape, in 0..bins, or 0..bins * K by class.
    """
    index = (norm * bins).long().clamp_(0, bins - 1)
    if by_class:
        index += bins * torch.arange(norm.shape[1], device=norm.device)
        bins *= norm.shape[1]
    return torch.where(valid, index, bins)


def histogram(index: Tensor, bins: int) -> Tensor:
    """Return the number of samples in each unit region: (bins,) int64."""
    index = index.flatten()
    if index.device.type == "cpu":
        return torch.bincount(index, minlength=bins + 1)[:bins]
    return _histogram_on_device(index, bins)


def _histogram_on_device(index: Tensor, bins: int) -> Tensor:
    # bincount waits for the device to learn its output's size; integer sums are exact in any order
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index, torch.ones_like(index))[:bins]


def harmonized_losses(loss: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return weights[index_i] * loss_i of each sample, 0 where it is not valid.

    Args:
        loss: plain losses, any shape.
        index: their unit regions, as `unit_regions` gives them.
        weights: (bins,), a constant for the gradient.
    """
    table = torch.cat([weights, weights.new_zeros(1)]).to(loss.dtype)
    return loss * table[index]


@torch.no_grad()
def update_density(
    counts: Tensor,
    foreground: Tensor,
    ema: Tensor,
    num_updates: Tensor,
    ema_foreground: Tensor,
    *,
    momentum: float,
    prior: float,
    own: bool,
    normalizer: str,
    ema_init: str,
    training: bool,
    factor: float,
) -> Tensor:
    """Return the weight beta / N of a sample in each unit region (paper, section 3.3).

    Args:
        counts: (L, bins) int64, samples by feature level (or class) and unit region.
        foreground: int64, number of foreground samples: 0-dim, or (L,) if `own`; for the prior.
        ema, num_updates, ema_foreground: the buffers of `GradientDensity`: (rows, bins),
            (rows, bins), and (2,) or (rows, 2). They are updated in place if `training`.
        own: each row of the counts has its own row of buffers; else all update row 0 in turn.
        momentum, prior, normalizer, ema_init: arguments of `GradientDensity`.
        factor: a factor on the weights.

    Returns:
        (L, bins) float64; 0 where there is no sample.
    """
    exact = exact_dtype(ema.device)
    new, present = counts.to(exact), counts > 0
    smooth = new
    if momentum > 0:
        rows = slice(len(counts)) if own else 0
        average, times, found = ema[rows].to(exact), num_updates[rows], []
        for row in [new] if own else new:  # with `own`, all rows at once
            if training:
                # without a prior, an average near 0 would give an unlimited weight
                moves = torch.ones_like(row) if prior else row > 0
                average, times = _moved(average, times, row, moves, momentum, ema_init)
            smooth = average
            if ema_init == "debias":
                smooth = average / -torch.expm1(times.clamp(min=1).to(exact) * math.log(momentum))
            # a region first met in evaluation has no average yet
            found += [torch.where(times == 0, row, smooth)]
        smooth = found[0] if own else torch.stack(found)
        if training:
            ema[rows], num_updates[rows] = average.to(ema.dtype), times
    if prior:
        options = momentum, prior, ema_init, training
        smooth = smooth + prior_count(foreground, ema_foreground, *options).view(-1, 1)
    if normalizer == "weights":
        n = torch.where(present, new / smooth, 0).sum(1, keepdim=True)
    elif normalizer == "bins":
        n = new.new_full((), counts.shape[1])
    else:
        n = present.sum(1, keepdim=True)
    return torch.where(present, factor / (n * smooth), 0)


def _moved(average, times, new, moves, momentum: float, ema_init: str) -> tuple[Tensor, Tensor]:
    """Return the average, updated with `new` where `moves`, and the number of its updates."""
    moved = momentum * average + (1 - momentum) * new
    if ema_init == "first":
        moved = torch.where(times == 0, new, moved)
    return torch.where(moves > 0, moved, average), times + (moves > 0)


@torch.no_grad()
def prior_count(
    foreground: Tensor,
    ema_foreground: Tensor,
    momentum: float,
    prior: float,
    ema_init: str,
    training: bool,
) -> Tensor:
    """Return c: `prior` times the average number of foreground samples, at least `prior`.

    Arguments as in `update_density`. The last dimension of `ema_foreground` holds the averages of
    the number of foreground samples and of 1; debiasing divides by the second.
    """
    new = foreground.to(exact_dtype(foreground.device))
    if momentum > 0:
        average = ema_foreground.to(new.dtype)
        if training:
            now = torch.stack([new, torch.ones_like(new)], -1)
            average, _ = _moved(average, average[..., 1:], now, now[..., 1:], momentum, ema_init)
            ema_foreground.copy_(average)
        seen = average[..., 1]
        smooth = average[..., 0] / seen if ema_init == "debias" else average[..., 0]
        new = torch.where(seen == 0, new, smooth)
    return prior * new.clamp(min=1)
