"""How much gradient a loss leaves to annotations that are known to be wrong."""

import numpy as np
import torch
from torch import Tensor

from ghm_d2.engine.gradients import derivative
from ghm_d2.engine.samples import NOISE_KINDS, Samples
from ghm_d2.losses import SmoothL1


class NoiseWeights:
    """How much of a box's gradient a loss leaves, by what ails the box, batch after batch.

    The loss is the one that the detector was trained with, its moving averages going on from
    where the training left them.
    """

    def __init__(self, beta: float):
        """
        Args:
            beta: of the smooth L1 that the boxes' gradient is compared with.
        """
        self._smooth_l1 = SmoothL1(beta, "sum")
        self._boxes = np.zeros(len(NOISE_KINDS), dtype=int)
        # by kind: rows, and sums over them
        self._rows = np.zeros(len(NOISE_KINDS))
        self._weights = np.zeros(len(NOISE_KINDS))
        self._box_gradient = np.zeros(len(NOISE_KINDS))
        self._smooth_l1_gradient = np.zeros(len(NOISE_KINDS))

    def add(self, samples: Samples, batch: list[dict]) -> None:
        """Take in the foreground rows of a batch, and the boxes of its images."""
        for item in batch:
            self._boxes += self._sums(item["instances"].gt_noise)
        if not len(samples.noise):
            return
        weights, box = effective_over_plain(samples)
        plain = derivative(self._smooth_l1, samples.errors).sum(1)
        known = weights.isfinite()
        self._rows += self._sums(samples.noise[known])
        self._weights += self._sums(samples.noise[known], weights[known])
        self._box_gradient += self._sums(samples.noise, box)
        self._smooth_l1_gradient += self._sums(samples.noise, plain)

    def summary(self) -> dict[str, dict]:
        """For each kind of noise the numbers below; None where no row was matched to such a box.

        boxes: in the images measured. weight: mean, over the rows matched to such boxes, of the
        effective gradient of the score of the box's class over cross entropy's, divided by the
        mean over all foreground rows. box_weight: their share of the gradient of the boxes over
        their share of smooth L1's.
        """
        mean = self._weights.sum() / max(self._rows.sum(), 1)
        box = self._box_gradient / (self._box_gradient.sum() or 1)
        plain = self._smooth_l1_gradient / (self._smooth_l1_gradient.sum() or 1)
        return {
            kind: {
                "boxes": int(self._boxes[i]),
                "weight": _ratio(self._weights[i], self._rows[i] * mean),
                "box_weight": _ratio(box[i], plain[i]),
            }
            for i, kind in enumerate(NOISE_KINDS)
        }

    def _sums(self, kinds: Tensor, values: Tensor | None = None) -> np.ndarray:
        values = None if values is None else values.double().cpu().numpy()
        return np.bincount(kinds.cpu().numpy(), values, minlength=len(NOISE_KINDS))


def effective_over_plain(samples: Samples) -> tuple[Tensor, Tensor]:
    """Of the foreground rows under the detector's own losses.

    Returns:
        (F,) the effective gradient of the score of the row's class over that of cross entropy,
        normalised as the detector normalises a sum: 1 for cross entropy itself. NaN where the
        plain gradient is 0.
        (F,) the L1 norm of the gradient by the row's deltas, normalised likewise.
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

    weights = at_class(losses["loss_cls"]) * samples.normalizer() / at_class(plain)
    box = samples.rows(torch.autograd.grad(losses["loss_box_reg"], deltas))
    return weights, box[samples.foreground].abs().sum(1) * samples.normalizer()


def _ratio(value: float, by: float) -> float | None:
    return float(f"{value / by:.6g}") if by > 0 else None
