"""The backend for CPUs, in C (`cpu.c`): one read of the logits forward, one read and one write
backward, from integer labels, with no temporary larger than the gradient.

float32 and float64; half precision becomes float32. The library is built when the project is
installed, where a C compiler is; `available` says whether it was.
"""

import ctypes
import functools
import hashlib
import os
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from ghm_d2.kernels import reference
from ghm_d2.kernels.reference import upcast

NAME = "c"
_REAL = {torch.float32: ("_f", ctypes.c_float), torch.float64: ("_d", ctypes.c_double)}
# of the C functions: p pointer, l int64, i int32, d double, r float or double
_ARGUMENTS = {
    "sigmoid_regions": "pplliiipp",
    "sigmoid_grad": "pplliiipp",
    "softmax_regions": "pplliipp",
    "softmax_grad": "pplliipp",
    "asl1_regions": "ppplliripp",
    "asl1_grad": "ppplliripp",
    "focal_sum": "ppllirrrp",
    "focal_grad": "ppllirrrp",
    "density": "pllppppddiiiiidp",
}
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "d": ctypes.c_double}
_PROCESS = os.getpid()
_ALONE = 1 << 16  # elements that are no work for more than one thread


def available() -> bool:
    """Whether the C library was built and loads."""
    return _library() is not None


def regions(kind, pred, target, valid, mu, bins, by_class, alpha, gamma) -> tuple[Tensor, Tensor]:
    """Counts (L, regions) int64 and sums of plain losses (L, regions) float64 of unit regions.

    Args:
        kind: of `samples.Samples`, whose other fields are `mu` (0-dim) to `gamma`.
        pred, target: a tensor a level: logits and labels, or deltas.
        valid: of deltas, bool; else empty.
        bins: unit regions of a class.
    """
    of_focal = alpha >= 0 or gamma > 0
    num_regions = bins * pred[0].shape[1] if by_class else bins
    counts = torch.empty(len(pred), num_regions, dtype=torch.int64)
    losses = torch.empty(len(pred), num_regions, dtype=torch.float64)
    options = _options(kind, mu, bins, by_class)
    for level, tensors in enumerate(_levels(pred, target, valid)):
        if of_focal:
            counts[level], losses[level] = _focal_sum(*tensors, alpha, gamma)
        else:
            _run(f"{kind}_regions", tensors, *options, num_regions, counts[level], losses[level])
    return counts, losses


def gradient(
    kind, pred, target, valid, mu, bins, by_class, alpha, gamma, weights: Tensor
) -> list[Tensor]:
    """weights[region] * dl/dx of each sample, of the shape and dtype of each `pred`.

    Args:
        weights: (L, regions); the others are as of `regions`.
    """
    options, found = _options(kind, mu, bins, by_class), []
    for level, tensors in enumerate(_levels(pred, target, valid)):
        out = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
        if alpha >= 0 or gamma > 0:
            factors = (weights[level].item() * factor for factor in _focal_factors(alpha))
            _run("focal_grad", tensors, gamma, *factors, out)
        else:
            # the region after the last is that of ignored samples
            table = torch.nn.functional.pad(weights[level].to(out.dtype), (0, 1))
            _run(f"{kind}_grad", tensors, *options, weights.shape[1], table, out)
        found.append(out.to(pred[level].dtype))
    return found


def density(
    counts, foreground, ema, num_updates, ema_foreground, momentum, prior, own, normalizer,
    ema_init, training, factor,
) -> Tensor:  # fmt: skip
    """`reference.update_density`, whose arguments these are."""
    state = ema, num_updates, ema_foreground
    if not all(t.is_contiguous() for t in state):
        options = dict(
            momentum=momentum, prior=prior, own=own, normalizer=normalizer, ema_init=ema_init,
            training=training, factor=factor,
        )  # fmt: skip
        return reference.update_density(counts, foreground, *state, **options)
    weights = torch.empty(counts.shape, dtype=ema.dtype)
    counts, foreground = counts.long().contiguous(), foreground.long().contiguous()
    arrays = (counts, *counts.shape, ema, num_updates, foreground, ema_foreground)
    divisor = ("valid_bins", "bins", "weights").index(normalizer)
    choices = own, divisor, ema_init == "first", ema_init == "debias", training
    _call("density", ema.dtype, *arrays, prior, momentum, *choices, factor, weights)
    return weights


def size_counts(pred, target, valid) -> Tensor:
    """`reference.size_counts` of all levels: foreground alone is no work for a kernel of its own."""
    found = [reference.size_counts(*tensors) for tensors in zip(pred, target, valid, strict=True)]
    return torch.stack(found).sum(0)


def _levels(pred, target, valid) -> list[tuple[Tensor, ...]]:
    """The tensors of each level, contiguous, and predictions and deltas at least float32."""
    lists = (pred, target, valid) if valid else (pred, target)
    return [tuple(upcast(t).contiguous() for t in level) for level in zip(*lists, strict=True)]


def _options(kind: str, mu: Tensor | None, bins: int, by_class: bool) -> tuple:
    """What the C functions take before the number of regions."""
    if kind == "asl1":
        return (mu.item(),)
    return (bins,) if kind == "sigmoid" else ()


def _focal_sum(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(_num_parts(logits), dtype=torch.float64)
    _run("focal_sum", (logits, labels), gamma, *_focal_factors(alpha), sums)
    return (labels >= 0).sum() * logits.shape[1], sums.sum()


def _run(name: str, inputs: tuple[Tensor, ...], *rest) -> None:
    """Calls the C function of inputs with rows and columns, shared out to threads."""
    x = inputs[0]
    _call(name, x.dtype, *inputs, *x.shape, _num_parts(x), *rest)


def _call(name: str, dtype: torch.dtype, *arguments) -> None:
    function = getattr(_library(), name + _REAL[dtype][0])
    function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


def _num_parts(x: Tensor) -> int:
    return 1 if _forked() else max(1, min(torch.get_num_threads(), x.numel() // _ALONE))


def _forked() -> bool:
    """Whether this process is a fork of another, whose threads of OpenMP it does not have."""
    return os.getpid() != _PROCESS


def _focal_factors(alpha: float) -> tuple[float, float]:
    """Of samples with target 0 and with target 1."""
    return (1 - alpha, alpha) if alpha >= 0 else (1.0, 1.0)


@functools.cache
def _library() -> ctypes.CDLL | None:
    path = Path(__file__).with_name("_cpu" + EXTENSION_SUFFIXES[0])
    source = Path(__file__).with_name("cpu.c")
    if not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
        built_from = (ctypes.c_char * 64).in_dll(library, "ghm_source").value.decode()
        if source.exists() and hashlib.sha256(source.read_bytes()).hexdigest() != built_from:
            raise OSError("it was built from another cpu.c")
    except (OSError, ValueError) as error:
        warnings.warn(f"{path.name} is not used ({error}): install ghm_d2 again", stacklevel=2)
        return None
    for name, letters in _ARGUMENTS.items():
        for suffix, real in _REAL.values():
            function = getattr(library, name + suffix)
            function.argtypes = [(_TYPES | {"r": real})[letter] for letter in letters]
            function.restype = None
    return library
