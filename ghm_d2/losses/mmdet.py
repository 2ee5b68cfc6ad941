"""GHM-C and GHM-R with the arguments, defaults and state of mmdetection 3.3.0.

Replace `from mmdet.models.losses import GHMC, GHMR` by the same import from `ghm_d2.losses.mmdet`.
Checkpoints load in both directions. Each process has its own density, and evaluation updates the
averages too, like in mmdetection. `docs/coming-from.md` lists the other differences.
"""

import torch
from torch import Tensor

from ghm_d2 import losses
from ghm_d2.losses.density.state import CountState
from ghm_d2.losses.reduce import REDUCTIONS, check_choice


class _MMDetGHM(CountState):
    """A GHM loss whose moving average is the buffer `acc_sum`, as in mmdetection."""

    acc_sum: Tensor
    edges: Tensor
    _loss: losses.GHMC | losses.GHMR

    def __init__(self, loss: losses.GHMC | losses.GHMR, last_edge: float):
        super().__init__()
        object.__setattr__(self, "_loss", loss)  # not a submodule: its buffers are this module's
        self.loss_weight, self.reduction = loss.loss_weight, loss.reduction
        self._last_edge = last_edge  # the last region is closed
        self.register_buffer("edges", self._edges())
        if self.momentum > 0:
            self.add_counts("acc_sum", self.bins)

    def _edges(self) -> Tensor:
        edges = torch.arange(self.bins + 1).float() / self.bins
        edges[-1] = self._last_edge
        return edges

    @property
    def bins(self) -> int:
        """Number of unit regions."""
        return self._loss.density.bins

    @property
    def momentum(self) -> float:
        """Momentum of the moving average."""
        return self._loss.density.momentum

    def reset_parameters(self) -> None:
        """Set the moving average to 0, and the edges of the unit regions."""
        self.edges.copy_(self._edges())
        if self.momentum > 0:
            self.acc_sum.zero_()

    def _run(self, reduction: str | None, *tensors: Tensor) -> Tensor:
        loss, density = self._loss, self._loss.density
        density.ema = self.acc_sum[None] if self.momentum > 0 else self.edges[None, :-1]
        density.num_updates = (density.ema > 0).long()
        density.ema_foreground = density.ema[0, :2]  # not read without a prior
        loss.loss_weight = self.loss_weight
        loss.reduction = self.reduction if reduction is None else reduction
        check_choice("reduction_override", loss.reduction, REDUCTIONS)
        return loss(*tensors)


class GHMC(_MMDetGHM):
    """mmdetection's GHM-C, over sigmoids.

    Args:
        bins, momentum, loss_weight: as in `ghm_d2.losses.GHMC`.
        use_sigmoid: must be True.
        reduction: "mean", "sum" or "none".

    Raises:
        NotImplementedError: `use_sigmoid` is False.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        bins: int = 10,
        momentum: float = 0,
        use_sigmoid: bool = True,
        loss_weight: float = 1.0,
        reduction: str = "mean",
    ):
        if not use_sigmoid:
            raise NotImplementedError("use_sigmoid=False: use ghm_d2.losses.SoftmaxGHMC instead")
        loss = losses.GHMC(bins, momentum, loss_weight=loss_weight, reduction=reduction, sync=False)
        super().__init__(loss, 1 + 1e-6)
        self.use_sigmoid = use_sigmoid

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        label_weight: Tensor,
        reduction_override: str | None = None,
        **_,
    ) -> Tensor:
        """Return the loss.

        Args:
            pred: (N, K) logits.
            target: (N,) labels, 0..K-1 a class and K background; or (N, K) of 0 and 1.
            label_weight: (N,) or (N, K); 0: ignored; above 0: used, without a factor on the loss.
            reduction_override: used instead of `reduction`.
        """
        valid = label_weight > 0
        if target.dim() == pred.dim():
            target = target.to(pred.dtype)
            valid = valid if valid.dim() == pred.dim() else valid[:, None]
        else:
            target = torch.where(target < 0, pred.shape[1], target)  # background
            valid = valid.all(1) if valid.dim() > 1 else valid
        return self._run(reduction_override, pred, torch.where(valid, target, -1))


class GHMR(_MMDetGHM):
    """mmdetection's GHM-R.

    Args:
        mu, bins, momentum, loss_weight: as in `ghm_d2.losses.GHMR`.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        mu: float = 0.02,
        bins: int = 10,
        momentum: float = 0,
        loss_weight: float = 1.0,
        reduction: str = "mean",
    ):
        loss = losses.GHMR(
            mu, bins, momentum, loss_weight=loss_weight, reduction=reduction, sync=False
        )
        super().__init__(loss, 1e3)
        self.mu = mu

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        label_weight: Tensor,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            pred, target: (N, 4) deltas.
            label_weight: (N, 4); 0: ignored; above 0: used, without a factor on the loss.
            avg_factor: not used, as in mmdetection.
            reduction_override: used instead of `reduction`.
        """
        return self._run(reduction_override, pred, target, label_weight > 0)
