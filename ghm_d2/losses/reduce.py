"""Reductions and argument checks that the losses share."""

from collections.abc import Sequence
from numbers import Integral, Real

from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


def reduce_loss(loss: Tensor, reduction: str) -> Tensor:
    """Apply "none", "mean" or "sum". The mean of nothing is 0 and keeps the graph.

    Raises:
        ValueError: an unknown reduction.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(loss.numel(), 1)


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")


def check_range(name: str, value, low, high=None, *, integer: bool = False) -> None:
    """Raise ValueError unless low <= value < high (low < value for a float without `high`).

    NumPy scalars are accepted too.
    """
    if isinstance(value, bool) or not isinstance(value, Integral if integer else Real):
        kind = "an integer" if integer else "a number"
        raise ValueError(f"{name} must be {kind}, not {value!r}")
    if high is not None:
        if not low <= value < high:
            raise ValueError(f"{name} must lie in [{low}, {high}), not {value}")
    elif integer:
        if value < low:
            raise ValueError(f"{name} must be at least {low}, not {value}")
    elif not low < value < float("inf"):
        raise ValueError(f"{name} must be finite and greater than {low}, not {value}")
