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
        mu: of ASL1, > 0, in the unit of the deltas.
        bins, momentum: published as 10 and 0.7 for COCO.
        mu_quantile: 0: mu is fixed. In (0, 1): mu follows the data, as this quantile of |d| over
            the batches before (by `momentum`), and the argument `mu` is that of the first batch.
        **options: `loss_weight` and `GradientDensity`'s options; its prior is of the valid
            coordinates.
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
        """mu of the next batch: the number that it is fixed at, or a 0-dim tensor."""
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
            valid: (..., 4) or (...,) bool, all where None. The target of an invalid sample may be
                anything, NaN included.
            weight: a factor on each loss, of the shape of `valid`; a sample that weighs 0 is not
                counted. Plain PyTorch computes it.

        Returns:
            a scalar; of the shape of `pred` with reduction "none".
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
        """Count the samples of several feature levels; arguments as in `forward`, a level each."""
        levels = _as_rows(pred, target, valid)
        samples, others = self._samples(levels)
        return self._begin(samples, levels, None, **others)

    def _samples(self, levels: list[list[Tensor]]) -> tuple[DeltaSamples, dict[str, Tensor]]:
        """What a sample is, and the counts that mu is to follow."""
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
        pred, target, valid, weight: as of `GHMR.forward`.
        **options: arguments of `GHMR` without `momentum` and `mu_quantile`.
    """
    return GHMR(momentum=0.0, **options)(pred, target, valid, weight)


def _as_rows(pred, target, valid) -> list[list[Tensor]]:
    """(N, 4) each, of every level; without a mask where all are valid."""
    levels = [[p, t] for p, t in zip(pred, target, strict=True)]
    if valid is not None:
        masks = [_expanded(v, p).bool() for p, v in zip(pred, valid, strict=True)]
        levels = [[*level, mask] for level, mask in zip(levels, masks, strict=True)]
    return [[x if x.dim() == 2 else x.reshape(-1, x.shape[-1]) for x in level] for level in levels]


def _expanded(mask: Tensor, pred: Tensor) -> Tensor:
    if mask.dim() < pred.dim():
        mask = mask[..., None]
    return mask.expand_as(pred)
