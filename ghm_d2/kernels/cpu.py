"""The CPU backend, in C (`cpu.c`): one read of the logits forward, one read and one write backward,
from integer labels, with no temporary larger than the gradient.

Functions ending in `_regions` give a (bins,) int64 count of samples and a (bins,) float64 sum of
plain losses for each unit region; those ending in `_grad` a gradient with a weight for each region.
float32 and float64. The library is built when the project is installed, where a C compiler is;
`available` says whether it was.
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
    "update_density": "pllppppddiiiiirp",
}
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "d": ctypes.c_double}
_PROCESS = os.getpid()
_ALONE = 1 << 16  # elements that are no work for more than one thread


def available() -> bool:
    """Whether the C library was built and loads."""
    return _library() is not None


def sigmoid_regions(
    logits: Tensor, labels: Tensor, bins: int, by_class: bool = False
) -> tuple[Tensor, Tensor]:
    """Of (anchor, class) pairs, as `reference.sigmoid_samples` makes them: logits (N, K).

    By class there are K * bins regions, of one class after another.
    """
    regions = bins * logits.shape[1] if by_class else bins
    return _regions("sigmoid_regions", (logits, labels), (bins,), regions)


def sigmoid_grad(logits: Tensor, labels: Tensor, weights: Tensor, by_class: bool = False) -> Tensor:
    """weights[region] * (p - t), (N, K); 0 in ignored rows."""
    bins = len(weights) // logits.shape[1] if by_class else len(weights)
    return _grad("sigmoid_grad", (logits, labels), (bins,), weights)


def softmax_regions(logits: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Of rows, as `reference.softmax_samples` makes them: logits (N, K + 1)."""
    return _regions("softmax_regions", (logits, labels), (), bins)


def softmax_grad(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """weights[region] * (softmax - one-hot), (N, K + 1); 0 in ignored rows."""
    return _grad("softmax_grad", (logits, labels), (), weights)


def asl1_regions(
    pred: Tensor, target: Tensor, valid: Tensor, mu: float | Tensor, bins: int
) -> tuple[Tensor, Tensor]:
    """Of coordinates, as `reference.asl1_samples` makes them: all (N, 4)."""
    return _regions("asl1_regions", (pred, target, valid), (float(mu),), bins)


def asl1_grad(
    pred: Tensor, target: Tensor, valid: Tensor, mu: float | Tensor, weights: Tensor
) -> Tensor:
    """weights[region] * d / sqrt(d^2 + mu^2), (N, 4); 0 where not valid."""
    return _grad("asl1_grad", (pred, target, valid), (float(mu),), weights)


def focal_sum(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """The focal loss of all (anchor, class) pairs in rows that are not ignored, added up.

    gamma is at least 0; alpha below 0 means no such factor.
    """
    sums = torch.zeros(_num_parts(logits), dtype=torch.float64)
    _run("focal_sum", (logits, labels), gamma, *_focal_factors(alpha), sums)
    return sums.sum().to(logits.dtype)


def focal_grad(logits: Tensor, labels: Tensor, alpha: float, gamma: float, scale: Tensor) -> Tensor:
    """`scale` times the gradient of `focal_sum`, (N, K)."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    factors = (scale.item() * factor for factor in _focal_factors(alpha))
    _run("focal_grad", (logits, labels), gamma, *factors, out)
    return out


def update_density(
    counts: Tensor,
    foreground: Tensor,
    ema: Tensor,
    num_updates: Tensor,
    ema_foreground: Tensor,
    *,
    momentum: float,
    prior: float,
    own: bool,
    normalizer: str,
    ema_init: str,
    training: bool,
    factor: float,
) -> Tensor:
    """What `losses.density.GradientDensity` does after its counts are complete: (rows, bins).

    `ema`, `num_updates` and `ema_foreground` (contiguous) are updated in place; `own` says that
    each row of the counts has its own. `factor` is one on the weights.
    """
    weights = torch.empty(counts.shape, dtype=ema.dtype)
    state = (counts.contiguous(), *counts.shape, ema, num_updates, foreground, ema_foreground)
    starts = ema_init == "first", ema_init == "debias"
    divisor = ("valid_bins", "bins", "weights").index(normalizer)
    choices = (own, divisor, *starts, training)
    _call("update_density", ema.dtype, *state, prior, momentum, *choices, factor, weights)
    return weights


def _regions(
    name: str, inputs: tuple[Tensor, ...], params: tuple, bins: int
) -> tuple[Tensor, Tensor]:
    counts = torch.empty(bins, dtype=torch.int64)
    losses = torch.empty(bins, dtype=torch.float64)
    _run(name, inputs, *params, bins, counts, losses)
    return counts, losses


def _grad(name: str, inputs: tuple[Tensor, ...], params: tuple, weights: Tensor) -> Tensor:
    out = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
    # the region after the last is that of ignored samples
    table = torch.cat([weights, weights.new_zeros(1)]).to(out.dtype)
    _run(name, inputs, *params, len(weights), table, out)
    return out


def _run(name: str, inputs: tuple[Tensor, ...], *rest) -> None:
    """Calls the C function of inputs with rows and columns, shared out to threads."""
    x = inputs[0]
    contiguous = (t.contiguous() for t in inputs)
    _call(name, x.dtype, *contiguous, *x.shape, _num_parts(x), *rest)


def _call(name: str, dtype: torch.dtype, *arguments) -> None:
    function = getattr(_library(), name + _REAL[dtype][0])
    function(*(_address(a) if isinstance(a, Tensor) else a for a in arguments))


def _address(x: Tensor) -> int:
    address = x.data_ptr()
    if not address and x.numel():
        raise RuntimeError(f"{type(x).__name__} has no memory: use kernel='torch'")
    return address


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
