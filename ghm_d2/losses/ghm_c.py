"""GHM-C: classification losses weighed by gradient density (paper, equation 8)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ghm_d2.kernels import SigmoidSamples, SoftmaxSamples, reference
from ghm_d2.losses.harmonized import CountedLoss, HarmonizedLoss
from ghm_d2.losses.inputs import Rows, as_rows


class _GHMC(HarmonizedLoss):
    ROBUST: ClassVar[dict[str, Any]] = {**HarmonizedLoss.ROBUST, "prior": 3.0}
    SOFTMAX: ClassVar[bool]  # whether the last column of the logits is background

    def __init__(
        self,
        bins: int = 30,
        momentum: float = 0.75,
        *,
        ignore_index: int | None = None,
        check_labels: bool = False,
        **options,
    ):
        super().__init__(bins=bins, momentum=momentum, **options)
        self.ignore_index, self.check_labels = ignore_index, check_labels

    def begin(
        self,
        logits: Sequence[Tensor],
        labels: Sequence[Tensor],
        weight: Sequence[Tensor] | None = None,
    ) -> CountedLoss:
        """Count the samples of several feature levels; arguments as in `forward`, a level each."""
        of_levels: Sequence[Tensor | None] = weight or [None] * len(logits)
        rows = [self._rows(*level) for level in zip(logits, labels, of_levels, strict=True)]
        weights = [w for r in rows if (w := self._weight(r)) is not None] or None
        tensors = [(r.logits, r.target) for r in rows]
        return self._begin(self._samples, tensors, weights, **self._foreground(rows))

    @property
    def _samples(self) -> SigmoidSamples | SoftmaxSamples:
        if self.SOFTMAX:
            return SoftmaxSamples()
        return SigmoidSamples(by_class=self.density.num_classes > 1)

    def _rows(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Rows:
        return as_rows(
            logits,
            target,
            weight,
            background=not self.SOFTMAX,
            ignore_index=self.ignore_index,
            check_labels=self.check_labels,
        )

    def _weight(self, rows: Rows) -> Tensor | None:
        return rows.weight_of_rows() if self.SOFTMAX else rows.weight

    def _foreground(self, rows: Sequence[Rows]) -> dict[str, Tensor]:
        """How many rows have a class that is not background, 0-dim or (K,), for the prior."""
        if not self.density.prior:
            return {}
        classes = rows[0].logits.shape[1] - self.SOFTMAX
        by_class = self.density.num_classes > 1
        return {"foreground": _count_foreground([r.target for r in rows], classes, by_class)}


class GHMC(_GHMC):
    """GHM-C over sigmoids: a sample is one (anchor, class) pair.

    With bins=1 and momentum=0 it is exactly the mean binary cross entropy.

    Args:
        bins, momentum: published as 30 and 0.75 for COCO.
        ignore_index: a label that is ignored, as negative ones are.
        check_labels: raise ValueError at a label beyond K; it waits for the device. Without it a
            label beyond K is background.
        **options: `loss_weight`, `reduction` and `GradientDensity`'s options; its prior is of the
            rows with a class. With `num_classes=K` each class has its own density, and prior by
            its own rows.
    """

    SOFTMAX = False

    def forward(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of one set of anchors or pixels.

        Args:
            logits: (N, K); (N,) of one class; or (N, K, d1, ...).
            labels: (N,) or (N, d1, ...): 0..K-1 a class, K background, negative ignored.
                Or targets of the shape of `logits`, in [0, 1], negative ignored: plain PyTorch.
            weight: a factor on each loss, of the shape of `logits` or labels; a sample that weighs
                0 is not counted. Plain PyTorch computes it.

        Returns:
            a scalar; of the shape of `logits` with reduction "none".

        Raises:
            ValueError: shapes that do not belong together; a label out of range, if checked.
        """
        rows = self._rows(logits, labels, weight)
        tensors = rows.logits, rows.target
        loss = self._reduced(self._samples, tensors, rows.weight, **self._foreground([rows]))
        return rows.like_logits(loss) if self.reduction == "none" else loss


class SoftmaxGHMC(_GHMC):
    """GHM-C over a softmax: a sample is one row, its gradient norm 1 - p_y.

    With bins=1 and momentum=0 it is exactly the mean cross entropy.

    Args:
        bins, momentum, **options: as of `GHMC`; its prior is of the rows with a class other than
            background, the last.

    Raises:
        ValueError: an argument out of its range; `num_classes`, which is of sigmoids.
    """

    SOFTMAX = True

    def __init__(self, bins: int = 30, momentum: float = 0.75, **options):
        super().__init__(bins, momentum, **options)
        if self.density.num_classes > 1:
            raise ValueError("a density for each class is of sigmoids; leave out num_classes")

    def forward(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of one set of proposals or pixels.

        Args:
            logits: (N, K + 1) or (N, K + 1, d1, ...).
            labels: (N,) or (N, d1, ...): 0..K, negative ignored. Or probabilities of the
                shape of `logits`, whose gradient norm is half the L1 norm of p - t.
            weight: a factor on each loss, of the shape of labels; else as of `GHMC`.

        Returns:
            a scalar; of the shape of labels with reduction "none".
        """
        rows = self._rows(logits, labels, weight)
        tensors, weight = (rows.logits, rows.target), self._weight(rows)
        loss = self._reduced(self._samples, tensors, weight, **self._foreground([rows]))
        return rows.like_labels(loss) if self.reduction == "none" else loss


def ghm_c_loss(logits: Tensor, labels: Tensor, weight: Tensor | None = None, **options) -> Tensor:
    """`GHMC` without a moving average: the density is that of this call's samples.

    Args:
        logits, labels, weight: as of `GHMC.forward`.
        **options: arguments of `GHMC` without `momentum`.
    """
    return GHMC(momentum=0.0, **options)(logits, labels, weight)


def _count_foreground(targets: Sequence[Tensor], classes: int, by_class: bool) -> Tensor:
    """The rows with a class that is not background, 0-dim or (K,), of labels or dense targets."""
    if targets[0].dim() > 1:
        hits = torch.cat([t[:, :classes] > 0.5 for t in targets])
        return hits.sum(0) if by_class else hits.any(1).sum()
    labels = torch.cat(list(targets))
    foreground = (labels >= 0) & (labels < classes)
    if not by_class:
        return foreground.sum()
    return reference.histogram(torch.where(foreground, labels, classes), classes)
