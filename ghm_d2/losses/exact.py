"""GHM-C with the exact density, a reference for unit regions (paper, section 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ghm_d2.kernels import Counted, reference
from ghm_d2.kernels.dtypes import exact_dtype, upcast
from ghm_d2.losses.harmonized import CountedLoss
from ghm_d2.losses.reduce import check_choice, check_range


def exact_gradient_density(norm: Tensor, epsilon: float) -> Tensor:
    """GD(g) of each sample by the definition (paper, equations 5-7), in O(N log N).

    GD(g) is the number of samples with a gradient norm in [g - epsilon/2, g + epsilon/2),
    divided by the length of the part of that interval inside [0, 1].

    Args:
        norm: gradient norms in [0, 1], any shape.
        epsilon: length of the interval, in (0, 1].

    Returns:
        the densities in the shape of `norm`, all positive.

    Raises:
        ValueError: epsilon out of range.
    """
    _check_epsilon(epsilon)
    # float64, so that even a small epsilon moves the ends of the interval away from g
    exact = norm.contiguous().to(exact_dtype(norm.device))
    ordered = exact.flatten().sort().values
    low, high = exact - epsilon / 2, exact + epsilon / 2
    # the default side, "left", counts low <= x < high
    count = torch.searchsorted(ordered, high) - torch.searchsorted(ordered, low)
    # if epsilon is below float64's spacing the interval is empty, but a sample counts itself
    return (count.clamp(min=1) / _length(low, high, epsilon)).to(norm.dtype)


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon must lie in (0, 1], not {epsilon}")


def _length(low: Tensor, high: Tensor, epsilon: float) -> Tensor:
    """Length of the interval inside [0, 1]; subtracting the parts outside avoids cancellation."""
    return epsilon - (high - 1).clamp(min=0) - (-low).clamp(min=0)


def exact_ghm_c_loss(logits: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """GHM-C with the exact density (paper, equation 8 with 5-7), a reference for `GHMC`.

    Unlike `GHMC`, it selects the valid samples by a mask, which waits for the device.

    Args:
        logits: (N, K).
        labels: (N,) int64; 0..K-1 a class, K background, -1 ignored.
        epsilon: length of the region around each gradient norm; 1 / M to compare with M bins.

    Returns:
        a scalar; if no anchor is valid, a 0 that has a gradient.

    Raises:
        ValueError: epsilon out of range.
    """
    loss, norm, valid = reference.sigmoid_samples(upcast(logits), labels)
    density = exact_gradient_density(norm[valid], epsilon)
    return (loss[valid] / density).sum()


class ExactGHMC(nn.Module):
    """`exact_ghm_c_loss` as a replacement for `GHMC`: no unit regions and no moving average.

    Each process uses the density of its own samples.

    Args:
        epsilon: length of the region around each gradient norm, in (0, 1].
        loss_weight: factor on the loss, > 0.
        scope: "level": one density per feature level; "batch": one density over all levels.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, epsilon: float, *, loss_weight: float = 1.0, scope: str = "level"):
        super().__init__()
        _check_epsilon(epsilon)
        check_range("loss_weight", loss_weight, 0)
        check_choice("scope", scope, ("level", "batch"))
        self.epsilon, self.loss_weight, self.scope = epsilon, loss_weight, scope

    def levels(self, logits: Sequence[Tensor], labels: Sequence[Tensor]) -> list[Tensor]:
        """The losses of several feature levels, to be added up; arguments as in `GHMC.begin`."""
        return self.begin(logits, labels).losses()

    def begin(self, logits: Sequence[Tensor], labels: Sequence[Tensor]) -> CountedLoss:
        """Like `GHMC.begin`, with no counts to add up over processes."""
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
