"""Quality focal loss and varifocal loss: the target of a class is the IoU of the box.

Sources: Li et al., "Generalized Focal Loss", arXiv 2006.04388, equation 2; and Zhang et al.,
"VarifocalNet", arXiv 2008.13367, equation 2. Both losses use sigmoids, in plain PyTorch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ghm_d2.kernels.dtypes import upcast
from ghm_d2.losses.reduce import REDUCTIONS, check_choice


def quality_focal_loss(
    logits: Tensor,
    labels: Tensor,
    quality: Tensor,
    beta: float = 2.0,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """|y - p|^beta BCE(p, y), where y is the quality of the box at its class and 0 elsewhere.

    Args:
        logits: (N, K).
        labels: (N,) int64: 0..K-1 a class, K background, negative ignored.
        quality: (N,), in [0, 1] for rows with a class; the values of other rows have no effect.
        beta: the exponent, beta in the paper; at least 0.
        reduction: "mean" over the samples that are not ignored, "sum" or "none" (N, K).
        weight: (N,), a factor on the losses of each row; the mean leaves out rows of weight 0.

    Returns:
        the loss, in float32 for half precision.

    Raises:
        ValueError: an unknown reduction, or tensors of the wrong shape.
    """
    x, target, valid = _samples(logits, labels, quality)
    loss = (target - x.sigmoid()).abs() ** beta * _bce(x, target)
    return _reduced(loss, valid, weight, reduction)


def varifocal_loss(
    logits: Tensor,
    labels: Tensor,
    quality: Tensor,
    alpha: float = 0.75,
    gamma: float = 2.0,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """q BCE(p, q) where the target q is a box's quality, and alpha p^gamma BCE(p, 0) elsewhere.

    alpha and gamma are those of the paper. The other arguments, the result and the errors are as in
    `quality_focal_loss`. A box of quality 0 counts as background, as in the authors' code.
    """
    x, target, valid = _samples(logits, labels, quality)
    factor = torch.where(target > 0, target, alpha * x.sigmoid() ** gamma)
    return _reduced(factor * _bce(x, target), valid, weight, reduction)


def _samples(logits: Tensor, labels: Tensor, quality: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (0 where ignored), their targets and a mask of valid ones, each (N, K)."""
    if logits.dim() != 2 or {labels.shape, quality.shape} != {logits.shape[:1]}:
        raise ValueError(
            f"logits must be (N, K), labels and quality (N,), not {tuple(logits.shape)}, "
            f"{tuple(labels.shape)} and {tuple(quality.shape)}"
        )
    classes = logits.shape[1]
    valid = (labels >= 0)[:, None].expand_as(logits)
    x = torch.where(valid, upcast(logits), 0)
    column = torch.where(labels >= 0, labels, classes).clamp(max=classes)
    # background has a column of its own, which is dropped
    target = x.new_zeros(len(x), classes + 1)
    target.scatter_(1, column[:, None], quality[:, None].to(x))
    return x, target[:, :classes], valid


def _bce(x: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, target, reduction="none")


def _reduced(loss: Tensor, valid: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    check_choice("reduction", reduction, REDUCTIONS)
    if weight is not None:
        loss = loss * weight[:, None].to(loss)
        valid = valid & (weight > 0)[:, None]
    loss = torch.where(valid, loss, 0)
    if reduction == "none":
        return loss
    return loss.sum() / valid.sum().clamp(min=1) if reduction == "mean" else loss.sum()
