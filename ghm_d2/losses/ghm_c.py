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
    SOFTMAX: ClassVar[bool]  # True if the last column of the logits is background

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
        """Count the samples of several feature levels; arguments as in `forward`, one per level."""
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
        """Return the number of foreground rows for the prior: 0-dim, or (K,) by class."""
        if not self.density.prior:
            return {}
        classes = rows[0].logits.shape[1] - self.SOFTMAX
        by_class = self.density.num_classes > 1
        return {"foreground": _count_foreground([r.target for r in rows], classes, by_class)}


class GHMC(_GHMC):
    """GHM-C over sigmoids: a sample is one (anchor, class) pair.

    With bins=1 and momentum=0 it is exactly the mean binary cross entropy.

    Args:
        bins, momentum: the published values for COCO are 30 and 0.75.
        ignore_index: a label that is ignored, besides the negative ones.
        check_labels: raise ValueError for a label outside [-1, K]; this waits for the device. If
            False, a label above K counts as background.
        **options: `loss_weight`, `reduction` and the options of `GradientDensity`. The prior counts
            the rows with a class. With `num_classes=K` each class has its own density, and a prior
            that counts its own rows.

    Raises:
        ValueError: an argument out of its range.
    """

    SOFTMAX = False

    def forward(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of one set of anchors or pixels.

        Args:
            logits: (N, K) or (N, K, d1, ...); or (N,) of one class.
            labels: (N,) or (N, d1, ...): 0..K-1 a class, K background, negative ignored.
                Or targets in [0, 1] in the shape of `logits`, negative ignored; plain PyTorch only.
                With logits (N,) they are such targets: 1 the class, 0 not, of any dtype.
            weight: a factor on each loss, in the shape of `logits` or labels; plain PyTorch only.
                A sample with weight 0 is not counted.

        Returns:
            a scalar; with reduction "none", the losses in the shape of `logits`.

        Raises:
            ValueError: shapes do not match; a label is out of range, if checked.
        """
        rows = self._rows(logits, labels, weight)
        tensors = rows.logits, rows.target
        loss = self._reduced(self._samples, tensors, rows.weight, **self._foreground([rows]))
        return rows.like_logits(loss) if self.reduction == "none" else loss


class SoftmaxGHMC(_GHMC):
    """GHM-C over a softmax: a sample is one row, and its gradient norm is 1 - p_y.

    With bins=1 and momentum=0 it is exactly the mean cross entropy.

    Args:
        bins, momentum, **options: as in `GHMC`; the prior counts the rows with a class other than
            the last, which is background.

    Raises:
        ValueError: an argument is out of range; `num_classes` above 1, which needs sigmoids.
    """

    SOFTMAX = True

    def __init__(self, bins: int = 30, momentum: float = 0.75, **options):
        super().__init__(bins, momentum, **options)
        if self.density.num_classes > 1:
            raise ValueError("SoftmaxGHMC has no density per class; leave out num_classes")

    def forward(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of one set of proposals or pixels.

        Args:
            logits: (N, K + 1) or (N, K + 1, d1, ...).
            labels: (N,) or (N, d1, ...): 0..K, negative ignored. Or probabilities t in the
                shape of `logits`; the gradient norm is then half the L1 norm of p - t.
            weight: a factor on each loss, in the shape of labels; otherwise as in `GHMC`.

        Returns:
            a scalar; with reduction "none", the losses in the shape of labels.
        """
        rows = self._rows(logits, labels, weight)
        tensors, weight = (rows.logits, rows.target), self._weight(rows)
        loss = self._reduced(self._samples, tensors, weight, **self._foreground([rows]))
        return rows.like_labels(loss) if self.reduction == "none" else loss


def ghm_c_loss(logits: Tensor, labels: Tensor, weight: Tensor | None = None, **options) -> Tensor:
    """`GHMC` without a moving average: the density is that of this call's samples.

    Args:
        logits, labels, weight: as in `GHMC.forward`.
        **options: arguments of `GHMC` except `momentum`.
    """
    return GHMC(momentum=0.0, **options)(logits, labels, weight)


def _count_foreground(targets: Sequence[Tensor], classes: int, by_class: bool) -> Tensor:
    """Return the number of foreground rows of labels or dense targets: 0-dim, or (K,) by class."""
    if targets[0].dim() > 1:
        hits = torch.cat([t[:, :classes] > 0.5 for t in targets])
        return hits.sum(0) if by_class else hits.any(1).sum()
    labels = torch.cat(list(targets))
    foreground = (labels >= 0) & (labels < classes)
    if not by_class:
        return foreground.sum()
    return reference.histogram(torch.where(foreground, labels, classes), classes)
