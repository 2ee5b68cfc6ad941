"""Cross entropy with SSD's hard negative mining (section 2.2, "Hard negative mining")."""

import torch.nn.functional as F
from torch import Tensor

from ghm_d2.kernels.dtypes import upcast


def mined_ce_loss(
    logits: Tensor, labels: Tensor, neg_pos_ratio: float, weight: Tensor | None = None
) -> Tensor:
    """Return the cross entropy summed over foreground boxes and each image's hard negatives.

    Hard negatives are the background boxes with the largest losses. An image has `neg_pos_ratio`
    times as many of them as foreground boxes, rounded down, and thus none without an object (as in
    the authors' code, `MineHardExamples`).

    Args:
        logits: (N, R, K + 1).
        labels: (N, R) int64, 0..K-1 a class, K background.
        neg_pos_ratio: 3 in the paper.
        weight: (K + 1,), the factor on the losses of each label.

    Returns:
        a scalar, float32 for half precision.
    """
    logits = upcast(logits)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight, reduction="none")
    loss = loss.view(labels.shape)
    foreground = labels != logits.shape[-1] - 1
    hardness = loss.detach().masked_fill(foreground, -1)
    rank = hardness.argsort(dim=1, descending=True).argsort(dim=1)
    num_mined = (foreground.sum(1, keepdim=True) * neg_pos_ratio).long()
    mined = (rank < num_mined) & ~foreground
    return (loss * (foreground | mined)).sum()
