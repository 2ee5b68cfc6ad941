"""The CPU twins of `kernels.reference`, in C (`cpu.c`): one read of the logits forward, one read
and one write backward, from integer labels, with no temporary larger than the gradient.

Functions ending in `_regions` give a (bins,) int64 count of samples and a (bins,) float64 sum of
plain losses for each unit region; those ending in `_grad` a gradient with a weight for each region.
float32 and float64. The library is built when the project is installed, where a C compiler is;
`available` says whether it was.
"""

import ctypes
import functools
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

_SUFFIX = {torch.float32: "_f", torch.float64: "_d"}  # of the C functions
_COPIES = 8  # as in cpu.c
_ALONE = 1 << 16  # elements that are no work for more than one thread


def available() -> bool:
    """Whether the C library was built and loads."""
    return _library() is not None


def sigmoid_regions(logits: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Of (anchor, class) pairs, as `reference.sigmoid_samples` makes them: logits (N, K)."""
    return _regions("sigmoid_regions", (logits, labels), [_columns(logits)], bins)


def sigmoid_grad(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """weights[region] * (p - t), (N, K); 0 in ignored rows."""
    return _grad("sigmoid_grad", (logits, labels), [_columns(logits)], weights)


def softmax_regions(logits: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Of rows, as `reference.softmax_samples` makes them: logits (N, K + 1)."""
    return _regions("softmax_regions", (logits, labels), [_columns(logits)], bins)


def softmax_grad(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """weights[region] * (softmax - one-hot), (N, K + 1); 0 in ignored rows."""
    return _grad("softmax_grad", (logits, labels), [_columns(logits)], weights)


def asl1_regions(
    pred: Tensor, target: Tensor, valid: Tensor, mu: float, bins: int
) -> tuple[Tensor, Tensor]:
    """Of coordinates, as `reference.asl1_samples` makes them: all (N, 4)."""
    return _regions("asl1_regions", (pred, target, valid), [_columns(pred), _real(pred, mu)], bins)


def asl1_grad(pred: Tensor, target: Tensor, valid: Tensor, mu: float, weights: Tensor) -> Tensor:
    """weights[region] * d / sqrt(d^2 + mu^2), (N, 4); 0 where not valid."""
    return _grad("asl1_grad", (pred, target, valid), [_columns(pred), _real(pred, mu)], weights)


def focal_sum(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """The focal loss of all (anchor, class) pairs in rows that are not ignored, added up."""
    parameters = [_columns(logits), *_focal_parameters(logits, alpha, gamma)]
    sums = _run("focal_sum", (logits, labels), parameters)
    return torch.tensor(sum(sums), dtype=logits.dtype)


def focal_grad(logits: Tensor, labels: Tensor, alpha: float, gamma: float, scale: Tensor) -> Tensor:
    """`scale` times the gradient of `focal_sum`, (N, K)."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    parameters = _focal_parameters(logits, alpha, gamma, scale.item())
    _run("focal_grad", (logits, labels), [_columns(logits), *parameters, _pointer(out)])
    return out


def update_density(
    counts: Tensor,
    ema: Tensor,
    num_updates: Tensor,
    *,
    momentum: float,
    scope: str,
    normalizer: str,
    ema_init: str,
    training: bool,
    world: int,
) -> Tensor:
    """What `losses.density.GradientDensity` does after its counts are complete: (L, bins).

    `ema` and `num_updates` are updated in place.
    """
    counts = counts.contiguous()
    weights = torch.empty(counts.shape, dtype=ema.dtype)
    choices = (
        scope == "level_ema",
        normalizer == "bins",
        ema_init == "first",
        ema_init == "debias",
        training,
    )
    _c_function("update_density", ema)(
        _pointer(counts),
        *map(ctypes.c_int64, counts.shape),
        _pointer(ema),
        _pointer(num_updates),
        _real(ema, momentum),
        *map(ctypes.c_int32, choices),
        _real(ema, world),
        _pointer(weights),
    )
    return weights


def _regions(name: str, inputs: tuple[Tensor, ...], numbers: list, bins: int):
    def tallies(part: int) -> list:
        return [ctypes.c_int32(bins), _pointer(totals[part])]

    totals = torch.zeros(_num_parts(inputs[0]), bins + 1, _COPIES, 2, dtype=torch.float64)
    _run(name, inputs, numbers, tallies)
    count, loss = totals.sum((0, 2))[:bins].unbind(1)
    return count.long(), loss


def _grad(name: str, inputs: tuple[Tensor, ...], numbers: list, weights: Tensor) -> Tensor:
    out = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
    # the region after the last is that of ignored samples
    weights = torch.cat([weights, weights.new_zeros(1)]).to(out.dtype)
    bins = ctypes.c_int32(len(weights) - 1)
    _run(name, inputs, [*numbers, bins, _pointer(weights), _pointer(out)])
    return out


def _run(name: str, inputs: tuple[Tensor, ...], numbers: list, of_part=lambda part: ()) -> list:
    """Calls the C function with a part of the rows in each thread; gives what the calls returned.

    Its arguments are the inputs, the rows [begin, end), `numbers` and `of_part` of the part.
    """
    function = _c_function(name, inputs[0])
    inputs = [x.contiguous() for x in inputs]
    pointers = [_pointer(x) for x in inputs]
    rows, parts = len(inputs[0]), _num_parts(inputs[0])

    def call(part: int):
        begin, end = rows * part // parts, rows * (part + 1) // parts
        bounds = ctypes.c_int64(begin), ctypes.c_int64(end)
        return function(*pointers, *bounds, *numbers, *of_part(part))

    others = [_threads().submit(call, part) for part in range(1, parts)]
    return [call(0), *(other.result() for other in others)]


def _num_parts(x: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), x.numel() // _ALONE))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "ghm")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not survive a fork


@functools.cache
def _library() -> ctypes.CDLL | None:
    path = Path(__file__).with_name("_cpu" + EXTENSION_SUFFIXES[0])
    source = Path(__file__).with_name("cpu.c")
    if not path.exists():
        return None
    try:
        if source.exists() and source.stat().st_mtime > path.stat().st_mtime:
            raise OSError(f"{source.name} has changed since")
        library = ctypes.CDLL(str(path))
    except OSError as error:
        warnings.warn(f"{path.name} is not used ({error}): install ghm_d2 again", stacklevel=2)
        return None
    for suffix in _SUFFIX.values():
        getattr(library, "focal_sum" + suffix).restype = ctypes.c_double
    return library


def _c_function(name: str, like: Tensor):
    return getattr(_library(), name + _SUFFIX[like.dtype])


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _columns(x: Tensor) -> ctypes.c_int64:
    return ctypes.c_int64(x.shape[1])


def _real(like: Tensor, value: float):
    return (ctypes.c_float if like.dtype == torch.float32 else ctypes.c_double)(value)


def _focal_parameters(like: Tensor, alpha: float, gamma: float, scale: float = 1.0) -> list:
    """gamma, and the factors of samples with target 0 and 1; no alpha where it is negative."""
    others, targets = (1 - alpha, alpha) if alpha >= 0 else (1.0, 1.0)
    return [_real(like, value) for value in (gamma, scale * others, scale * targets)]
