"""GHM-R: box regression weighed by gradient density (paper, section 3.4)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ghm_d2 import kernels
from ghm_d2.kernels import DeltaSamples
from ghm_d2.losses.density.gradient_density import is_recomputing
from ghm_d2.losses.density.quantile import MovingQuantile
from ghm_d2.losses.harmonized import CountedLoss, HarmonizedLoss
from ghm_d2.losses.reduce import check_range


class GHMR(HarmonizedLoss):
    """ASL1 weighed by gradient density: a sample is one box coordinate.

    With bins=1 and momentum=0 it is exactly the mean ASL1.

    Args:
        mu: parameter of ASL1, > 0, in the unit of the deltas.
        bins, momentum: the published values for COCO are 10 and 0.7.
        mu_quantile: 0: mu is fixed. In (0, 1): mu is this quantile of |d| over the previous
            batches, averaged with `momentum`; the argument `mu` is used for the first batch.
        **options: `loss_weight`, `reduction` and the options of `GradientDensity`. The prior counts
            the valid coordinates.

    Raises:
        ValueError: an argument out of its range.
    """

    ROBUST: ClassVar[dict[str, Any]] = {**HarmonizedLoss.ROBUST, "mu_quantile": 0.5}

    def __init__(
        self,
        mu: float = 0.02,
        bins: int = 10,
        momentum: float = 0.7,
        *,
        mu_quantile: float = 0.0,
        **options,
    ):
        super().__init__(bins=bins, momentum=momentum, **options)
        check_range("mu", mu, 0)
        self._mu = float(mu)
        self.sizes = MovingQuantile(mu_quantile, momentum, self._mu)
        self._last_mu: float | Tensor = self._mu

    @property
    def mu(self) -> float | Tensor:
        """mu of the next batch: the fixed number, or a 0-dim tensor that follows the data."""
        return self.sizes(self.density.kernel) if self.sizes.quantile else self._mu

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        valid: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of one set of boxes.

        Args:
            pred, target: (..., 4) deltas.
            valid: (..., 4) or (...,) bool; None: all are valid. The target of an invalid sample
                may be anything, including NaN.
            weight: a factor on each loss, in the shape of `valid`; plain PyTorch only. A sample
                with weight 0 is not counted.

        Returns:
            a scalar; with reduction "none", the losses in the shape of `pred`.

        Raises:
            ValueError: shapes do not match.
        """
        if weight is not None:
            weight = _expanded(weight, pred)
            valid = weight > 0 if valid is None else _expanded(valid, pred).bool() & (weight > 0)
            weight = weight.reshape(-1, pred.shape[-1])
        levels = _as_rows([pred], [target], None if valid is None else [valid])
        samples, others = self._samples(levels)
        loss = self._reduced(samples, levels[0], weight, **others)
        return loss.view(pred.shape) if self.reduction == "none" else loss

    def begin(
        self,
        pred: Sequence[Tensor],
        target: Sequence[Tensor],
        valid: Sequence[Tensor] | None = None,
    ) -> CountedLoss:
        """Count the samples of several feature levels; arguments as in `forward`, one per level."""
        levels = _as_rows(pred, target, valid)
        samples, others = self._samples(levels)
        return self._begin(samples, levels, None, **others)

    def _samples(self, levels: list[list[Tensor]]) -> tuple[DeltaSamples, dict[str, Tensor]]:
        """Return the kind of sample, and the counts from which mu is updated."""
        if not self.sizes.quantile:
            return DeltaSamples(self._mu), {}
        mu = self._last_mu if is_recomputing() else self.mu
        if not torch.compiler.is_compiling():
            self._last_mu = mu
        sizes = kernels.size_counts(levels, kernel=self.density.kernel)
        return DeltaSamples(mu), {"sizes": sizes}

    def _weights(self, world: int, counts: Tensor, sizes: Tensor | None = None) -> Tensor:
        if sizes is not None and self.training and not is_recomputing():
            self.sizes.update(sizes)
        return super()._weights(world, counts)

    def extra_repr(self) -> str:
        return f"mu={self._mu}, mu_quantile={self.sizes.quantile}, {super().extra_repr()}"


def ghm_r_loss(
    pred: Tensor,
    target: Tensor,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
    **options,
) -> Tensor:
    """`GHMR` without a moving average: the density is that of this call's samples.

    Args:
        pred, target, valid, weight: as in `GHMR.forward`.
        **options: arguments of `GHMR` except `momentum` and `mu_quantile`.
    """
    return GHMR(momentum=0.0, **options)(pred, target, valid, weight)


def _as_rows(pred, target, valid) -> list[list[Tensor]]:
    """Reshape the tensors of each level to (N, 4); a level has no mask if `valid` is None."""
    levels = [[p, t] for p, t in zip(pred, target, strict=True)]
    if valid is not None:
        masks = [_expanded(v, p).bool() for p, v in zip(pred, valid, strict=True)]
        levels = [[*level, mask] for level, mask in zip(levels, masks, strict=True)]
    return [[x if x.dim() == 2 else x.reshape(-1, x.shape[-1]) for x in level] for level in levels]


def _expanded(mask: Tensor, pred: Tensor) -> Tensor:
    if mask.dim() < pred.dim():
        mask = mask[..., None]
    return mask.expand_as(pred)
