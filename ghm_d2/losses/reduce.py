"""What every loss here does with reductions and with arguments."""

from torch import Tensor


def reduce_loss(loss: Tensor, reduction: str) -> Tensor:
    """Apply "none", "mean" or "sum". The mean of nothing is 0 and keeps the graph.

    Raises:
        ValueError: another reduction.
    """
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / max(loss.numel(), 1)
    raise ValueError(f'reduction is "none", "mean" or "sum", not {reduction!r}')


def check_range(name: str, value, low, high=None, *, integer: bool = False) -> None:
    """Raise ValueError unless low <= value < high (low < value for a float without `high`)."""
    kind = isinstance(value, int) if integer else isinstance(value, (int, float))
    if isinstance(value, bool) or not kind:
        raise ValueError(f"{name} is {'an integer' if integer else 'a number'}, not {value!r}")
    if high is not None:
        if not low <= value < high:
            raise ValueError(f"{name} lies in [{low}, {high}), not {value}")
    elif integer:
        if value < low:
            raise ValueError(f"{name} is at least {low}, not {value}")
    elif not low < value < float("inf"):
        raise ValueError(f"{name} is finite and greater than {low}, not {value}")
