"""The kinds of samples: the tensors of a level, and the arguments for the operators."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ghm_d2.kernels import reference
from ghm_d2.kernels.dtypes import wide

Level = tuple[Tensor, ...]


class Samples:
    """The samples of one kind of loss; the first tensor of a level is differentiated."""

    kind: str
    mu: float | Tensor | None = None
    by_class: bool = False
    alpha: float = -1.0
    gamma: float = 0.0

    def check(self, *level: Tensor) -> Level:
        """Return the tensors of a level as the kernels take them.

        Raises:
            ValueError: shapes, devices or dtypes do not match.
        """
        return _check_logits(*level)

    def plain(self, *level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, gradient norm and validity of each sample, in plain PyTorch."""
        raise NotImplementedError

    def num_regions(self, pred: Tensor, bins: int) -> int:
        """Return the number of unit regions of all classes."""
        return bins * pred.shape[1] if self.by_class else bins


@dataclass(frozen=True)
class SigmoidSamples(Samples):
    """(anchor, class) pairs of logits (N, K) with labels (N,): `reference.sigmoid_samples`; or with
    targets (N, K), in plain PyTorch only: `reference.dense_sigmoid_samples`.

    Args:
        by_class: use K * bins regions; those of class j start at j * bins.
        alpha, gamma: parameters of focal loss, which only compiled kernels compute; the defaults
            give cross entropy.
    """

    kind = "sigmoid"
    by_class: bool = False
    alpha: float = -1.0
    gamma: float = 0.0

    def plain(self, *level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if level[1].dim() > 1:
            return reference.dense_sigmoid_samples(*level)
        return reference.sigmoid_samples(*level)


@dataclass(frozen=True)
class SoftmaxSamples(Samples):
    """Rows of logits (N, K + 1) with labels (N,): `reference.softmax_samples`; or with targets
    (N, K + 1), in plain PyTorch only: `reference.dense_softmax_samples`.
    """

    kind = "softmax"

    def plain(self, *level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if level[1].dim() > 1:
            return reference.dense_softmax_samples(*level)
        return reference.softmax_samples(*level)


@dataclass(frozen=True)
class DeltaSamples(Samples):
    """Coordinates of predicted and true deltas, (N, 4) each: `reference.asl1_samples`.

    Each level has a mask of that shape too. If no level has one, all coordinates are valid.

    Args:
        mu: parameter of ASL1; a number, or a 0-dim tensor.
    """

    kind = "asl1"
    mu: float | Tensor = 0.02

    def check(self, *level: Tensor) -> Level:
        return check_deltas(*level)

    def plain(self, *level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pred, target, *valid = level
        return reference.asl1_samples(pred, target, valid[0] if valid else None, self.mu)


def _check_logits(logits: Tensor, labels: Tensor) -> Level:
    if labels.shape == logits.shape and labels.dim() == 2:
        return logits, labels
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers, not {labels.dtype}")
    _check_shape("labels", labels, logits, logits.shape[:1])
    return logits, labels.long()


def check_deltas(pred: Tensor, target: Tensor, valid: Tensor | None = None) -> Level:
    """`DeltaSamples.check` as a function."""
    _check_shape("targets", target, pred, pred.shape)
    if valid is not None:
        _check_shape("valid", valid, pred, pred.shape)
    if not target.is_floating_point():
        target = target.to(wide(pred.dtype))
    elif target.dtype == torch.float64:  # keep the precision of the target
        pred = pred.double()
    level = pred, target
    return level if valid is None else (*level, valid.bool())


def _check_shape(name: str, given: Tensor, pred: Tensor, shape: torch.Size) -> None:
    if pred.dim() != 2 or given.shape != shape:
        raise ValueError(
            f"predictions must be (N, K) and match {name}, not {tuple(pred.shape)} with {name} "
            f"{tuple(given.shape)}"
        )
    if given.device != pred.device:
        raise ValueError(f"predictions are on {pred.device}, but {name} are on {given.device}")
