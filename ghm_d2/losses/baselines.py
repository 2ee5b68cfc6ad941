"""The losses GHM is compared with, from integer labels: 0..K-1 a class, K background, -1 ignored.

Focal loss without a kernel, and smooth L1, give the numbers of fvcore's, which Detectron2 uses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghm_d2 import kernels
from ghm_d2.kernels import reference
from ghm_d2.kernels.reference import upcast, wide
from ghm_d2.losses.reduce import check_range, reduce_loss


def bce_loss(
    logits: Tensor, labels: Tensor, reduction: str = "mean", *, kernel: str = "auto"
) -> Tensor:
    """Binary cross entropy of (N, K) logits; ignored rows are 0, and not counted in the mean.

    Args:
        kernel: of "mean" and "sum", one of `kernels.KERNELS`.

    Raises:
        ValueError: an unknown reduction.
    """
    if reduction in ("mean", "sum"):

        def weigh(count: Tensor) -> Tensor:
            samples = count.clamp(min=1) if reduction == "mean" else torch.ones_like(count)
            return 1 / samples.to(wide(logits.dtype))

        # one region for all
        return kernels.harmonized("sigmoid", [(logits, labels)], 1, weigh, kernel=kernel)[0]
    loss, _, valid = reference.sigmoid_samples(upcast(logits), labels)
    return reduce_loss(torch.where(valid, loss, 0), reduction)


def softmax_ce_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of (N, K + 1) logits; ignored rows are 0, and not counted in the mean.

    Raises:
        ValueError: an unknown reduction.
    """
    loss, _, valid = reference.softmax_samples(upcast(logits), labels)
    return _reduce_valid(loss, valid, reduction)


def focal_loss(
    logits: Tensor,
    labels: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "mean",
    *,
    kernel: str = "auto",
) -> Tensor:
    """Focal loss (Lin et al., arXiv 1708.02002, equation 5) of (N, K) logits.

    The mean is over the samples of rows that are not ignored. alpha < 0 means no such factor.

    Args:
        kernel: of "mean" and "sum", one of `kernels.KERNELS`.

    Raises:
        ValueError: an unknown reduction.
    """
    classes = logits.shape[1]
    if reduction in ("mean", "sum"):
        total = kernels.focal(logits, labels, alpha, gamma, kernel=kernel)
        if total is not None:
            samples = (labels >= 0).sum() * classes
            return total / samples.clamp(min=1) if reduction == "mean" else total
    logits, labels = upcast(logits), labels.long()
    valid = (labels >= 0)[:, None].expand_as(logits)
    target = F.one_hot(torch.where(labels >= 0, labels, classes), classes + 1)[:, :-1]
    loss = _focal(torch.where(valid, logits, 0), target.to(logits), alpha, gamma)
    return _reduce_valid(torch.where(valid, loss, 0), valid, reduction)


def _focal(logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """Of each element; its roundings are those of fvcore."""
    ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p = torch.sigmoid(logits)
    p_of_target = p * target + (1 - p) * (1 - target)
    loss = ce * (1 - p_of_target) ** gamma  # (5)
    return loss if alpha < 0 else (alpha * target + (1 - alpha) * (1 - target)) * loss


def ohem_loss(logits: Tensor, labels: Tensor, negative_ratio: float = 3.0) -> Tensor:
    """Online hard example mining (Shrivastava et al., arXiv 1604.03540) over anchors: a sum.

    The binary cross entropy of all foreground anchors, and of the background anchors with the
    largest losses, `negative_ratio` of them for each foreground anchor (at least that many),
    as SSD mines them. Of several processes each mines its own anchors.

    Args:
        logits: (N, K).
        labels: (N,) int64.
        negative_ratio: > 0.
    """
    check_range("negative_ratio", negative_ratio, 0)
    classes = logits.shape[1]
    per_anchor = bce_loss(logits, labels, reduction="none").sum(1)
    foreground = (labels >= 0) & (labels < classes)
    background = labels == classes
    hardness = torch.where(background, per_anchor.detach(), -1)
    rank = hardness.argsort(descending=True).argsort()
    kept = background & (rank < negative_ratio * foreground.sum().clamp(min=1))
    return torch.where(foreground | kept, per_anchor, 0).sum()


def _reduce_valid(loss: Tensor, valid: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return loss.sum() / valid.sum().clamp(min=1)
    return reduce_loss(loss, reduction)


class BCE(nn.Module):
    """`bce_loss` as a module."""

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return bce_loss(logits, labels, self.reduction)


class SoftmaxCE(nn.Module):
    """`softmax_ce_loss` as a module."""

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return softmax_ce_loss(logits, labels, self.reduction)


class Focal(nn.Module):
    """`focal_loss` as a module."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "mean"):
        super().__init__()
        self.alpha, self.gamma, self.reduction = alpha, gamma, reduction

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


class SmoothL1(nn.Module):
    """Smooth L1: d^2 / (2 beta) where |d| < beta, else |d| - beta / 2; beta = 0 is L1.

    Source: Fast R-CNN, arXiv 1504.08083, where beta is 1.
    """

    def __init__(self, beta: float = 0.1, reduction: str = "mean"):
        super().__init__()
        if not beta >= 0:
            raise ValueError(f"beta is at least 0, not {beta}")
        self.beta, self.reduction = beta, reduction

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        distance = torch.abs(upcast(pred) - upcast(target))
        if self.beta < 1e-5:  # the other branch would divide by it
            return reduce_loss(distance, self.reduction)
        inside, outside = 0.5 * distance**2 / self.beta, distance - 0.5 * self.beta
        return reduce_loss(torch.where(distance < self.beta, inside, outside), self.reduction)
