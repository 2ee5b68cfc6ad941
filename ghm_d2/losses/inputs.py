"""Convert logits and targets of all supported shapes to rows of anchors or pixels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ghm_d2.kernels.dtypes import wide


@dataclass(frozen=True)
class Rows:
    """The inputs of a classification loss, one row per anchor or pixel.

    Attributes:
        logits: (M, C).
        target: (M,) int64 labels, negative where ignored; or (M, C), a target for each logit.
        weight: (M, C) or (M, 1), a factor on each loss; None: all are 1.
        shape: the original shape of the logits.
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    shape: torch.Size

    def weight_of_rows(self) -> Tensor | None:
        """Return `weight` as (M,); ValueError if it has a value for each logit."""
        if self.weight is not None and self.weight.shape[1] != 1:
            raise ValueError(f"weights must have the shape of labels, not {tuple(self.shape)}")
        return None if self.weight is None else self.weight[:, 0]

    def like_logits(self, values: Tensor) -> Tensor:
        """Return (M, C) values in the original shape of the logits."""
        if len(self.shape) < 3:
            return values.view(self.shape)
        rows = self.shape[:1] + self.shape[2:]
        return values.view(*rows, self.shape[1]).movedim(-1, 1)

    def like_labels(self, values: Tensor) -> Tensor:
        """Return (M,) values in the shape of the labels, which lacks the logits' class axis."""
        return values.view(self.shape[:1] + self.shape[2:])


def as_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    background: bool = True,
    ignore_index: int | None = None,
    check_labels: bool = False,
) -> Rows:
    """Bring the inputs of a classification loss into rows.

    Args:
        logits: (N,), (N, C) or (N, C, d1, ...).
        target: in the shape of `logits`, probabilities, or 0 and 1 of any dtype; or else integer
            labels of shape (N,) or (N, d1, ...). Negative ones are ignored.
        weight: at least 0, in the shape of `logits` or of labels. Samples with 0 are ignored.
        background: whether C is a valid label, besides 0..C-1.
        ignore_index: another label that is ignored, such as 255.
        check_labels: raise ValueError for a label that is not valid, -1 or `ignore_index`; this
            waits for the device.

    Raises:
        ValueError: shapes or devices do not match; a label is out of range, if checked.
    """
    shape, dense = logits.shape, target.shape == logits.shape
    if not dense and (len(shape) < 2 or target.shape != shape[:1] + shape[2:]):
        raise ValueError(
            f"logits must be (N, C) with labels (N,), or with targets of the same shape, not "
            f"{tuple(shape)} with {tuple(target.shape)}"
        )
    if not dense and target.is_floating_point():
        raise ValueError(f"labels must be integers, not {target.dtype}")
    if target.device != logits.device:
        raise ValueError(f"logits are on {logits.device}, but the target is on {target.device}")
    if weight is not None:
        weight = _weight_rows(weight, shape)
    rows = _as_matrix(logits)
    if dense:
        target = _as_matrix(target)
        target = target if target.is_floating_point() else target.to(wide(logits.dtype))
    else:
        target = target.flatten().long()
    if ignore_index is not None:
        target = torch.where(target == ignore_index, -1, target)
    if check_labels and not dense:
        _check_labels(target, rows.shape[1] + background)
    if weight is not None:
        nothing = weight <= 0 if dense else (weight <= 0).all(1)
        target = torch.where(nothing, -1, target)
    return Rows(rows, target, weight, shape)


def _as_matrix(x: Tensor) -> Tensor:
    if x.dim() == 1:
        return x[:, None]
    return x if x.dim() == 2 else x.movedim(1, -1).flatten(0, -2)


def _weight_rows(weight: Tensor, shape: torch.Size) -> Tensor:
    if weight.shape == shape:
        return _as_matrix(weight)
    if weight.shape == shape[:1] + shape[2:]:
        return weight.reshape(-1, 1)
    raise ValueError(f"weights must have the shape of logits or labels, not {tuple(weight.shape)}")


def _check_labels(labels: Tensor, num_labels: int) -> None:
    if labels.numel() and (labels.max() >= num_labels or labels.min() < -1):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(
            f"labels must lie in [-1, {num_labels - 1}], not in [{low}, {high}]; mark ignored "
            "samples with -1 or `ignore_index`"
        )
