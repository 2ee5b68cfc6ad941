"""GHM in plain PyTorch, on any device: the definition that faster kernels are held to.

Each kind of loss reduces to three tensors of one shape: `loss`, the plain loss l of each sample
(differentiable); `norm`, its gradient norm g in [0, 1] (detached); and `valid`, a mask. Two
steps are common: `unit_regions` and `histogram` count samples by gradient norm, and
`harmonized_sum` weighs them. None of them waits for the device or loops over unit regions.

A logit or delta that is not finite makes its sample's loss NaN, and never an index fault.
"""

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
    logits = _nan_unless_finite(torch.where(valid[:, None], logits, 0))
    loss = F.cross_entropy(logits, labels.clamp(0, logits.shape[1] - 1), reduction="none")
    return torch.where(valid, loss, 0), -torch.expm1(-loss.detach()), valid


def asl1_samples(pred: Tensor, target: Tensor, valid: Tensor, mu: float | Tensor):
    """Authentic smooth L1 of each coordinate (paper, equation 9); g = |d| / sqrt(d^2 + mu^2).

    Args:
        pred, target: of one shape, floating point. Targets of invalid samples may be anything.
        valid: bool, of that shape.
        mu: > 0, in the unit of `pred`; a number, or a tensor of no dimensions on its device.

    Returns:
        loss, norm, valid: of that shape.
    """
    d = _nan_unless_finite(torch.where(valid, pred - target, 0))
    mu = as_tensor(mu, d, d.dtype).to(d.dtype)
    root = torch.hypot(d, mu)
    # d^2 / (root + mu) = root - mu, without its cancellation near 0 or overflow far from it
    return d * (d / (root + mu)), (d / root).abs().detach(), valid


def size_counts(pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """How many |pred - target| lie in each slot of their logarithm: (SIZE_SLOTS,) int64.

    Slot k holds sizes in [2^(LOWEST_OCTAVE + k / SLOTS_PER_OCTAVE), that of the next slot); the
    first and the last hold what lies beyond them. Invalid ones and those that are not finite are
    not counted.

    Args:
        pred, target, valid: as of `asl1_samples`.
    """
    size = (upcast(pred) - upcast(target)).detach().abs()
    slot = ((size.log2() - LOWEST_OCTAVE) * SLOTS_PER_OCTAVE).clamp(0, SIZE_SLOTS - 1)
    slot = torch.where(valid & size.isfinite(), slot, SIZE_SLOTS)
    return histogram(slot.long(), SIZE_SLOTS)


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


def harmonized_sum(loss: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """sum_i weights[index_i] * loss_i over the valid samples: a scalar.

    Args:
        loss: plain losses, any shape.
        index: their unit regions, as `unit_regions` gives them.
        weights: (bins,), a constant for the gradient.
    """
    table = torch.cat([weights, weights.new_zeros(1)]).to(loss.dtype)
    return (loss * table[index]).sum()
