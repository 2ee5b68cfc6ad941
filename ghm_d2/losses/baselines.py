"""The baseline losses; integer labels are 0..K-1 for a class, K for background, -1 for ignored.

`GHMC.forward` describes the shapes, targets, weights and labels. Focal loss in plain PyTorch and
smooth L1 give the same numbers as fvcore's losses, which Detectron2 uses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghm_d2 import kernels
from ghm_d2.kernels import Samples, SigmoidSamples, SoftmaxSamples
from ghm_d2.kernels.dtypes import exact_dtype, upcast
from ghm_d2.losses.inputs import Rows, as_rows
from ghm_d2.losses.reduce import REDUCTIONS, check_choice, check_range, reduce_loss


def bce_loss(
    logits: Tensor,
    labels: Tensor,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    check_labels: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """Binary cross entropy; ignored samples have loss 0 and do not count in the mean.

    Args:
        logits, labels, weight, ignore_index, check_labels: as in `GHMC`.
        reduction: "mean", "sum", or "none", which keeps the shape of `logits`.
        kernel: one of `kernels.KERNELS`.

    Raises:
        ValueError: an unknown reduction, or inputs that `GHMC` rejects.
    """
    rows = as_rows(logits, labels, weight, ignore_index=ignore_index, check_labels=check_labels)
    check_choice("reduction", reduction, REDUCTIONS)
    loss = _reduced(SigmoidSamples(), rows, rows.weight, reduction, kernel)
    return rows.like_logits(loss) if reduction == "none" else loss


def softmax_ce_loss(
    logits: Tensor,
    labels: Tensor,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    check_labels: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """Cross entropy of (N, K + 1) logits; ignored rows have loss 0 and do not count in the mean.

    Arguments and errors are as in `bce_loss`; "none" keeps the shape of the labels.
    """
    rows = as_rows(
        logits,
        labels,
        weight,
        background=False,
        ignore_index=ignore_index,
        check_labels=check_labels,
    )
    check_choice("reduction", reduction, REDUCTIONS)
    loss = _reduced(SoftmaxSamples(), rows, rows.weight_of_rows(), reduction, kernel)
    return rows.like_labels(loss) if reduction == "none" else loss


def focal_loss(
    logits: Tensor,
    labels: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    check_labels: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """Focal loss (Lin et al., arXiv 1708.02002, equation 5).

    The mean is over the samples that are not ignored. alpha < 0 leaves out the alpha factor.

    The other arguments and the errors are as in `bce_loss`.
    """
    rows = as_rows(logits, labels, weight, ignore_index=ignore_index, check_labels=check_labels)
    check_choice("reduction", reduction, REDUCTIONS)
    labels, classes = rows.target, rows.logits.shape[1]
    simple = labels.dim() == 1 and weight is None and gamma >= 0 and reduction != "none"
    if kernels.compiled(kernel, rows.logits.device) and simple:
        samples = SigmoidSamples(alpha=float(alpha), gamma=float(gamma))
        return _reduced(samples, rows, None, reduction, kernel)
    if kernel not in ("auto", "torch"):
        raise RuntimeError(
            f"the kernel {kernel!r} supports only integer labels without weights, gamma >= 0, and "
            "the reductions mean and sum; use kernel='auto'"
        )
    dense = labels
    if labels.dim() == 1:
        one_hot = F.one_hot(labels.clamp(0, classes), classes + 1)[:, :-1]
        dense = torch.where(labels[:, None] >= 0, one_hot, -1)
    valid = dense >= 0 if rows.weight is None else (dense >= 0) & (rows.weight > 0)
    x = torch.where(valid, upcast(rows.logits), 0)
    loss = torch.where(valid, _focal(x, torch.where(valid, dense, 0).to(x), alpha, gamma), 0)
    loss = loss if rows.weight is None else loss * rows.weight
    if reduction == "none":
        return rows.like_logits(loss)
    return loss.sum() / valid.sum().clamp(min=1) if reduction == "mean" else loss.sum()


def _reduced(
    samples: Samples, rows: Rows, weight: Tensor | None, reduction: str, kernel: str
) -> Tensor:
    """Return the loss without a density, with one unit region for all samples."""
    weights = None if weight is None else [weight]
    kernel = "torch" if reduction == "none" and kernel == "auto" else kernel
    tensors = rows.logits, rows.target
    counted = kernels.counted(samples, [tensors], 1, weights, kernel=kernel)
    one = torch.ones_like(counted.counts, dtype=exact_dtype(rows.logits.device))
    if reduction == "none":
        return counted.each(one)[0]
    return counted.total(one / counted.counts.clamp(min=1) if reduction == "mean" else one)


def _focal(logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the focal loss of each element, rounded as in fvcore."""
    ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p = torch.sigmoid(logits)
    p_of_target = p * target + (1 - p) * (1 - target)
    loss = ce * (1 - p_of_target) ** gamma  # (5)
    return loss if alpha < 0 else (alpha * target + (1 - alpha) * (1 - target)) * loss


def ohem_loss(
    logits: Tensor, labels: Tensor, negative_ratio: float = 3.0, *, weight: Tensor | None = None
) -> Tensor:
    """Online hard example mining (Shrivastava et al., arXiv 1604.03540) over anchors, summed.

    The sum of the binary cross entropy over all foreground anchors and the background anchors with
    the largest losses: `negative_ratio` for each foreground anchor, as in SSD, and at least
    `negative_ratio` in total. Each process mines its own anchors.

    Args:
        logits: (N, K).
        labels: (N,) int64.
        negative_ratio: > 0.
        weight: (N,), a factor on the losses of each anchor.

    Raises:
        ValueError: negative_ratio out of range, or shapes that do not match.
    """
    check_range("negative_ratio", negative_ratio, 0)
    classes = logits.shape[1]
    per_anchor = bce_loss(logits, labels, reduction="none", weight=weight).sum(1)
    foreground = (labels >= 0) & (labels < classes)
    background = labels >= classes
    hardness = torch.where(background, per_anchor.detach(), -1)
    rank = hardness.argsort(descending=True).argsort()
    kept = background & (rank < negative_ratio * foreground.sum().clamp(min=1))
    return torch.where(foreground | kept, per_anchor, 0).sum()


class _Reduced(nn.Module):
    def __init__(self, reduction: str = "mean"):
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        self.reduction = reduction


class BCE(_Reduced):
    """`bce_loss` as a module."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return bce_loss(logits, labels, self.reduction)


class SoftmaxCE(_Reduced):
    """`softmax_ce_loss` as a module."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return softmax_ce_loss(logits, labels, self.reduction)


class Focal(_Reduced):
    """`focal_loss` as a module."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "mean"):
        super().__init__(reduction)
        self.alpha, self.gamma = alpha, gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return focal_loss(logits, labels, self.alpha, self.gamma, self.reduction)


class OHEM(nn.Module):
    """`ohem_loss` as a module."""

    def __init__(self, negative_ratio: float = 3.0):
        super().__init__()
        check_range("negative_ratio", negative_ratio, 0)
        self.negative_ratio = negative_ratio

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return ohem_loss(logits, labels, self.negative_ratio)


class SmoothL1(_Reduced):
    """Smooth L1: d^2 / (2 beta) where |d| < beta, else |d| - beta / 2; beta = 0 is L1.

    Source: Fast R-CNN, arXiv 1504.08083, where beta is 1.
    """

    def __init__(self, beta: float = 0.1, reduction: str = "mean"):
        super().__init__(reduction)
        if not beta >= 0:
            raise ValueError(f"beta must be at least 0, not {beta}")
        self.beta = beta

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        distance = torch.abs(upcast(pred) - upcast(target))
        if self.beta < 1e-5:  # the other branch would divide by beta
            return reduce_loss(distance, self.reduction)
        inside, outside = 0.5 * distance**2 / self.beta, distance - 0.5 * self.beta
        return reduce_loss(torch.where(distance < self.beta, inside, outside), self.reduction)
