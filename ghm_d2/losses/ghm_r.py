"""GHM-R: box regression weighed by gradient density (paper, section 3.4)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ghm_d2 import kernels
from ghm_d2.losses.ghm_c import CountedLoss, HarmonizedLoss
from ghm_d2.losses.quantile import MovingQuantile
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
        self._mu = mu
        self.sizes = MovingQuantile(mu_quantile, momentum, mu)

    @property
    def mu(self) -> float | Tensor:
        """mu of the next batch: the number that it is fixed at, or a 0-dim tensor."""
        return self.sizes() if self.sizes.quantile else self._mu

    def forward(self, pred: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        """The loss of one set of boxes, a scalar.

        Args:
            pred, target: (N, 4) deltas.
            valid: (N, 4) or (N,) bool, all where None. The target of an invalid sample may be
                anything, NaN included.
        """
        return self.levels([pred], [target], None if valid is None else [valid])[0]

    def begin(
        self,
        pred: Sequence[Tensor],
        target: Sequence[Tensor],
        valid: Sequence[Tensor] | None = None,
    ) -> CountedLoss:
        """Count the samples of several feature levels; arguments as in `forward`, a level each.

        Leading dimensions may be several.
        """
        if valid is None:
            valid = [torch.ones_like(p, dtype=torch.bool) for p in pred]
        levels = [
            [x.reshape(-1, x.shape[-1]) for x in (p, t, _as_mask(v, p))]
            for p, t, v in zip(pred, target, valid, strict=True)
        ]
        others = {}
        if self.sizes.quantile:
            others["sizes"] = kernels.size_counts(levels, kernel=self.density.kernel)
        return self._begin("asl1", levels, self.mu, **others)

    def _weights(self, world: int, counts: Tensor, sizes: Tensor | None = None) -> Tensor:
        if sizes is not None and self.training:
            self.sizes.update(sizes)
        return super()._weights(world, counts)

    def extra_repr(self) -> str:
        return f"mu={self._mu}, mu_quantile={self.sizes.quantile}, {super().extra_repr()}"


def _as_mask(valid: Tensor, pred: Tensor) -> Tensor:
    if valid.dim() < pred.dim():
        valid = valid[..., None]
    return valid.bool().expand_as(pred)
