"""GHM-C with the exact density, the yardstick for unit regions (paper, section 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ghm_d2.kernels import Counted, reference
from ghm_d2.kernels.reference import upcast
from ghm_d2.losses.harmonized import CountedLoss
from ghm_d2.losses.reduce import check_choice, check_range


def exact_gradient_density(norm: Tensor, epsilon: float) -> Tensor:
    """GD(g) of each sample by the definition (paper, equations 5-7), in O(N log N).

    The number of samples with a gradient norm in [g - epsilon/2, g + epsilon/2), divided by
    the length of the part of that interval inside [0, 1].

    Args:
        norm: gradient norms in [0, 1], any shape.
        epsilon: length of the interval, in (0, 1].

    Returns:
        of the shape of `norm`, all positive.

    Raises:
        ValueError: epsilon out of range.
    """
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon lies in (0, 1], not {epsilon}")
    # in float64, where even a small epsilon moves the interval's ends away from g
    exact = norm.contiguous().to(reference.exact_dtype(norm.device))
    ordered = exact.flatten().sort().values
    low, high = exact - epsilon / 2, exact + epsilon / 2
    # side "left" on both: low <= x < high
    count = torch.searchsorted(ordered, high) - torch.searchsorted(ordered, low)
    # below float64's spacing the interval is empty; a sample is in its own one
    return (count.clamp(min=1) / _length(low, high, epsilon)).to(norm.dtype)


def _length(low: Tensor, high: Tensor, epsilon: float) -> Tensor:
    """Of the interval's part inside [0, 1], from what lies outside: nothing cancels."""
    return epsilon - (high - 1).clamp(min=0) - (-low).clamp(min=0)


def exact_ghm_c_loss(logits: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """GHM-C with the exact density (paper, equation 8 with 5-7): the yardstick for `GHMC`.

    Unlike `GHMC`, it takes the valid samples out of the batch, which waits for the device.

    Args:
        logits: (N, K).
        labels: (N,) int64; 0..K-1 a class, K background, -1 ignored.
        epsilon: length of the region around each gradient norm; 1 / M compares with M bins.

    Returns:
        a scalar, 0 with a graph where no anchor is valid.

    Raises:
        ValueError: epsilon out of range.
    """
    loss, norm, valid = reference.sigmoid_samples(upcast(logits), labels)
    density = exact_gradient_density(norm[valid], epsilon)
    return (loss[valid] / density).sum()


class ExactGHMC(nn.Module):
    """`exact_ghm_c_loss` in `GHMC`'s place: neither unit regions nor a moving average.

    Of several processes each has the density of its own samples.

    Args:
        epsilon: length of the region around each gradient norm.
        loss_weight: factor on the loss, > 0.
        scope: "level": a density a feature level; "batch": one over all.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, epsilon: float, *, loss_weight: float = 1.0, scope: str = "level"):
        super().__init__()
        check_range("loss_weight", loss_weight, 0)
        check_choice("scope", scope, ("level", "batch"))
        self.epsilon, self.loss_weight, self.scope = epsilon, loss_weight, scope

    def levels(self, logits: Sequence[Tensor], labels: Sequence[Tensor]) -> list[Tensor]:
        """The losses of several feature levels, to be added up; arguments as in `GHMC.begin`."""
        return self.begin(logits, labels).losses()

    def begin(self, logits: Sequence[Tensor], labels: Sequence[Tensor]) -> CountedLoss:
        """As `GHMC.begin`, of a loss that has nothing to add up."""
        none = labels[0].new_empty(0)

        def sums(_: Tensor) -> list[Tensor]:
            return self._levels(logits, labels)

        counted = Counted(none, lambda weights: torch.stack(sums(weights)).sum(), sums, sums)
        return CountedLoss(counted, lambda *_, **__: none, {"none": none}, sync=False)

    def _levels(self, logits: Sequence[Tensor], labels: Sequence[Tensor]) -> list[Tensor]:
        if self.scope == "batch":
            logits, labels = [torch.cat(list(logits))], [torch.cat(list(labels))]
        return [
            self.loss_weight * exact_ghm_c_loss(x, y, self.epsilon)
            for x, y in zip(logits, labels, strict=True)
        ]
