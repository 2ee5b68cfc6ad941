"""GHM in plain PyTorch, on any device: the definition that faster kernels are held to.

Each kind of loss reduces to three tensors of one shape: `loss`, the plain loss l of each sample
(differentiable); `norm`, its gradient norm g in [0, 1] (detached); and `valid`, a mask. Two
steps are common: `unit_regions` and `histogram` count samples by gradient norm, and
`harmonized_losses` weighs them. None of them waits for the device or loops over unit regions.

A logit or delta that is not finite makes its sample's loss NaN, and never an index fault. In a
softmax -inf stands for a probability of 0, as in `F.cross_entropy`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# the histogram of sizes: from 2^-16 to 2^16
SLOTS_PER_OCTAVE, LOWEST_OCTAVE, SIZE_SLOTS = 4, -16, 128


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision; others as they are (so that gradcheck works)."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def upcast(x: Tensor) -> Tensor:
    """`x` in the precision that `wide` gives."""
    return x.to(wide(x.dtype))


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def as_tensor(x: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A number as a tensor of no dimensions on the device of `like`; a tensor as it is."""
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
    # 40: where log(1 + e^s) is s in float64 too; the default, 20, is float32's
    return F.softplus(signed, threshold=40), signed.detach().sigmoid(), valid


def dense_sigmoid_samples(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`sigmoid_samples` with a target in [0, 1] for each logit, negative where ignored."""
    valid = target >= 0
    target = torch.where(valid, target, 0).to(logits)
    x = _nan_unless_finite(torch.where(valid, logits, 0))
    loss = F.softplus(x, threshold=40) - target * x
    return torch.where(valid, loss, 0), (x.detach().sigmoid() - target).abs(), valid


def _signed_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """`logits` (N, K) with the sign of each row's entry at its class turned."""
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


def asl1_samples(pred: Tensor, target: Tensor, valid: Tensor | None, mu: float | Tensor):
    """Authentic smooth L1 of each coordinate (paper, equation 9); g = |d| / sqrt(d^2 + mu^2).

    Args:
        pred, target: of one shape, floating point. Targets of invalid samples may be anything.
        valid: bool, of that shape; None: all are.
        mu: > 0, in the unit of `pred`; a number, or a tensor of no dimensions on its device.

    Returns:
        loss, norm, valid: of that shape.
    """
    if valid is None:
        valid = torch.ones_like(pred, dtype=torch.bool)
    d = _nan_unless_finite(torch.where(valid, pred - target, 0))
    mu = as_tensor(mu, d, d.dtype).to(d.dtype)
    root = torch.hypot(d, mu)
    # d^2 / (root + mu) = root - mu, without its cancellation near 0 or overflow far from it
    return d * (d / (root + mu)), (d / root).abs().detach(), valid


def size_counts(pred: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """How many |pred - target| lie in each slot of their logarithm: (SIZE_SLOTS,) int64.

    Slot k holds sizes in [2^(LOWEST_OCTAVE + k / SLOTS_PER_OCTAVE), that of the next slot); the
    first and the last hold what lies beyond them. Invalid ones and those that are not finite are
    not counted.

    Args:
        pred, target, valid: as of `asl1_samples`.
    """
    size = (upcast(pred) - upcast(target)).detach().abs()
    slot = ((size.log2() - LOWEST_OCTAVE) * SLOTS_PER_OCTAVE).clamp(0, SIZE_SLOTS - 1)
    counted = size.isfinite() if valid is None else size.isfinite() & valid
    slot = torch.where(counted, slot, SIZE_SLOTS)
    return histogram(slot.long(), SIZE_SLOTS)


@torch.no_grad()
def quantile(histogram: Tensor, quantile: float, start: float) -> Tensor:
    """The quantile of sizes, 0-dim, from averages of `size_counts`.

    Args:
        histogram: (SIZE_SLOTS,) floating point. Within a slot it is interpolated.
        quantile: in (0, 1).
        start: what it is where the histogram is empty.
    """
    # not cumsum, which has no deterministic form for CUDA
    cumulative = histogram.expand(SIZE_SLOTS, -1).tril().sum(1)
    total = cumulative[-1]
    slot = (cumulative < quantile * total).sum().clamp(max=SIZE_SLOTS - 1)
    # an index of no dimensions would wait for the device
    inside, up_to = (x.gather(0, slot[None])[0] for x in (histogram, cumulative))
    part = 1 - (up_to - quantile * total) / inside.clamp(min=1e-30)
    octave = LOWEST_OCTAVE + (slot + part.clamp(0, 1)) / SLOTS_PER_OCTAVE
    return torch.where(total > 0, octave.exp2(), start)


def _nan_unless_finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, float("nan"))


def unit_regions(norm: Tensor, valid: Tensor, bins: int, by_class: bool = False) -> Tensor:
    """The unit region of each sample: floor(g * M), the last one closed; past them where invalid.

    Args:
        norm: gradient norms in [0, 1]; NaN lands in some region.
        valid: bool, of the same shape.
        by_class: each column of (N, K) has its own M regions, one column's after another's.

    Returns:
        int64, of the same shape, in 0..bins, or 0..bins * K by class.
    """
    index = (norm * bins).long().clamp_(0, bins - 1)
    if by_class:
        index += bins * torch.arange(norm.shape[1], device=norm.device)
        bins *= norm.shape[1]
    return torch.where(valid, index, bins)


def histogram(index: Tensor, bins: int) -> Tensor:
    """How many samples each unit region holds: (bins,) int64."""
    index = index.flatten()
    if index.device.type == "cpu":
        return torch.bincount(index, minlength=bins + 1)[:bins]
    return _histogram_on_device(index, bins)


def _histogram_on_device(index: Tensor, bins: int) -> Tensor:
    # bincount waits for the device to learn its output's size; integer sums are exact in any order
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index, torch.ones_like(index))[:bins]


def harmonized_losses(loss: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """weights[index_i] * loss_i of each sample, 0 where it is not valid.

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
    """The weight beta / N of a sample in each unit region (paper, section 3.3), in float64.

    Args:
        counts: (L, bins) int64, samples by feature level, or class, and unit region.
        foreground: int64, foreground samples: 0-dim, or (L,) if `own`; not read without a prior.
        ema, num_updates, ema_foreground: (rows, bins) twice, and (2,) or (rows, 2); buffers of
            `losses.density.GradientDensity`, moved on in place if `training`.
        own: each row of the counts has its own row of them; else all update the first in turn.
        momentum, prior, normalizer, ema_init: arguments of `GradientDensity`.
        factor: on the weights.

    Returns:
        (L, bins) float64; 0 where there is no sample.
    """
    exact = exact_dtype(ema.device)
    new, present = counts.to(exact), counts > 0
    smooth = new
    if momentum > 0:
        rows = slice(len(counts)) if own else 0
        average, times, found = ema[rows].to(exact), num_updates[rows], []
        for row in [new] if own else new:  # with `own` all at once
            if training:
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
    """The average after `new` where it `moves`, and how often it has moved."""
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
    """c: `prior` times the average of the foreground samples, at least `prior`.

    Arguments as of `update_density`; of the averages of the samples and of 1, in the last
    dimension of `ema_foreground`, the second is what debiasing divides by.
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
