"""GHM-R: box regression weighed by gradient density (paper, section 3.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ghm_d2.losses.ghm_c import CountedLoss, HarmonizedLoss
from ghm_d2.losses.reduce import check_range


class GHMR(HarmonizedLoss):
    """ASL1 weighed by gradient density: a sample is one box coordinate.

    With bins=1 and momentum=0 it is exactly the mean ASL1.

    Args:
        mu: of ASL1, > 0, in the unit of the deltas.
        bins, momentum: published as 10 and 0.7 for COCO.
        **options: `loss_weight` and `GradientDensity`'s options.
    """

    def __init__(self, mu: float = 0.02, bins: int = 10, momentum: float = 0.7, **options):
        super().__init__(bins=bins, momentum=momentum, **options)
        check_range("mu", mu, 0)
        self.mu = mu

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
        return self._begin(
            "asl1",
            [
                [x.reshape(-1, x.shape[-1]) for x in (p, t, _as_mask(v, p))]
                for p, t, v in zip(pred, target, valid, strict=True)
            ],
            self.mu,
        )

    def extra_repr(self) -> str:
        return f"mu={self.mu}, {super().extra_repr()}"


def _as_mask(valid: Tensor, pred: Tensor) -> Tensor:
    if valid.dim() < pred.dim():
        valid = valid[..., None]
    return valid.bool().expand_as(pred)
