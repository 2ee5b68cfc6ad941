"""Authentic smooth L1, the loss under GHM-R (paper, equation 9)."""

from torch import Tensor, nn

from ghm_d2.kernels import reference
from ghm_d2.kernels.dtypes import upcast
from ghm_d2.losses.reduce import REDUCTIONS, check_choice, check_range, reduce_loss


def asl1_loss(pred: Tensor, target: Tensor, mu: float = 0.02, reduction: str = "none") -> Tensor:
    """ASL1(d) = sqrt(d^2 + mu^2) - mu, with d = pred - target.

    The loss is about d^2 / (2 mu) for |d| much smaller than mu, and |d| - mu for |d| much larger.
    Unlike smooth L1 it has derivatives of every order, and its gradient norm tells outliers apart.

    Args:
        pred, target: tensors of the same shape.
        mu: > 0, in the unit of `pred`.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: mu out of range, or an unknown reduction.
    """
    check_range("mu", mu, 0)
    pred, target = upcast(pred), upcast(target)
    loss, _, _ = reference.asl1_samples(pred, target, pred.new_ones(()).bool(), mu)
    return reduce_loss(loss, reduction)


class ASL1(nn.Module):
    """`asl1_loss` as a module."""

    def __init__(self, mu: float = 0.02, reduction: str = "mean"):
        super().__init__()
        check_range("mu", mu, 0)
        check_choice("reduction", reduction, REDUCTIONS)
        self.mu, self.reduction = mu, reduction

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return asl1_loss(pred, target, self.mu, self.reduction)

    def extra_repr(self) -> str:
        return f"mu={self.mu}, reduction={self.reduction!r}"
