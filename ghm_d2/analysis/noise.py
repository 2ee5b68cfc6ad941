"""The share of the gradient that a loss leaves to annotations that are known to be wrong."""

import numpy as np
import torch
from torch import Tensor

from ghm_d2.analysis.gradients import derivative
from ghm_d2.analysis.loss_inputs import NOISE_LABELS, LossInputs
from ghm_d2.losses import SmoothL1


class NoiseWeights:
    """Sums up, over batches, the share of the gradient that a loss leaves to each kind of noise.

    The loss is the one that the detector was trained with. Its moving averages continue from where
    the training left them.
    """

    def __init__(self, beta: float):
        """
        Args:
            beta: beta of the smooth L1 loss whose gradient is the plain gradient of boxes.
        """
        self._smooth_l1 = SmoothL1(beta, "sum")
        self._boxes = np.zeros(len(NOISE_LABELS), dtype=int)
        # by kind of noise: sums of the loss's own gradients, and of the plain ones
        self._effective = {name: np.zeros(len(NOISE_LABELS)) for name in ("weight", "box_weight")}
        self._plain = {name: np.zeros(len(NOISE_LABELS)) for name in self._effective}

    def add(self, samples: LossInputs, batch: list[dict]) -> None:
        """Add the foreground rows of a batch, and the boxes of its images."""
        for item in batch:
            self._boxes += _sums(item["instances"].gt_noise)
        if not len(samples.noise):
            return
        score, plain_score, box = foreground_gradients(samples)
        self._effective["weight"] += _sums(samples.noise, score)
        self._plain["weight"] += _sums(samples.noise, plain_score)
        self._effective["box_weight"] += _sums(samples.noise, box)
        plain_box = derivative(self._smooth_l1, samples.errors).sum(1)
        self._plain["box_weight"] += _sums(samples.noise, plain_box)

    def summary(self) -> dict[str, dict]:
        """Return "boxes", "weight" and "box_weight" for each kind of noise.

        boxes: their number in the images. weight: the share of rows matched to such boxes in the
        gradient of the annotated class's score, over their share in cross entropy's. box_weight:
        the same for the gradient of the boxes, over smooth L1's. Both are a row's mean weight, with
        rows counted by their plain gradient and 1 the mean of all rows; None without such rows.
        """
        shares = {}
        for name, effective in self._effective.items():
            plain = self._plain[name] / (self._plain[name].sum() or 1)
            shares[name] = effective / (effective.sum() or 1), plain
        return {
            kind: {"boxes": int(self._boxes[i])}
            | {name: _ratio(own[i], plain[i]) for name, (own, plain) in shares.items()}
            for i, kind in enumerate(NOISE_LABELS)
        }


def foreground_gradients(samples: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of each foreground row, under losses summed over samples.

    Returns:
        (F,) the absolute gradient of the score of the row's class under the detector's own loss,
        (F,) that under cross entropy, and (F,) the L1 norm of the gradient of the row's deltas.
    """
    logits = [x.detach().requires_grad_() for x in samples.logits]
    deltas = [x.detach().requires_grad_() for x in samples.deltas]
    with torch.enable_grad():
        losses = samples.losses(logits, deltas)
        plain = samples.cross_entropy(logits)
    column = samples.labels[samples.foreground][:, None]

    def at_class(loss):
        rows = samples.rows(torch.autograd.grad(loss, logits))
        return rows[samples.foreground].gather(1, column).squeeze(1).abs()

    score = at_class(losses["loss_cls"]) * samples.normalizer()
    box = samples.rows(torch.autograd.grad(losses["loss_box_reg"], deltas))
    return score, at_class(plain), box[samples.foreground].abs().sum(1) * samples.normalizer()


def _sums(kinds: Tensor, values: Tensor | None = None) -> np.ndarray:
    values = None if values is None else values.double().cpu().numpy()
    return np.bincount(kinds.cpu().numpy(), values, minlength=len(NOISE_LABELS))


def _ratio(value: float, by: float) -> float | None:
    return float(f"{value / by:.6g}") if by > 0 else None
