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
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from ghm_d2.kernels.reference import SIZE_SLOTS, wide

NAME = "c"
_REAL = {torch.float32: ("_f", ctypes.c_float), torch.float64: ("_d", ctypes.c_double)}
# of the C functions: p pointer, l int64, i int32, d double, r float or double
_ARGUMENTS = {
    "sigmoid_regions": "pplliiipp",
    "sigmoid_grad": "pplliiipdp",
    "softmax_regions": "pplliipp",
    "softmax_grad": "pplliipdp",
    "asl1_regions": "ppplliripp",
    "asl1_grad": "ppplliripdp",
    "focal_sum": "ppllirrrp",
    "focal_grad": "ppllirrrp",
    "asl1_sizes": "pppllp",
    "quantile": "pdd",
    "density": "pllppppddiiiiidp",
}
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "d": ctypes.c_double}
_RESULTS = {"grad": ctypes.c_int, "quantile": ctypes.c_double}
_NORMALIZERS = {"valid_bins": 0, "bins": 1, "weights": 2}
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
        valid: of deltas, bool; empty where all are valid.
        bins: unit regions of a class.
    """
    num_regions = bins * pred[0].shape[1] if by_class else bins
    counts = torch.empty(len(pred), num_regions, dtype=torch.int64)
    losses = torch.empty(len(pred), num_regions, dtype=torch.float64)
    if alpha >= 0 or gamma > 0:
        for i, (x, y) in enumerate(zip(pred, target, strict=True)):
            counts[i], losses[i] = _focal_sum(x, y, alpha, gamma)
        return counts, losses
    options = _options(kind, mu, bins)
    to_counts, to_losses, step = counts.data_ptr(), losses.data_ptr(), 8 * num_regions
    for i in range(len(pred)):
        function, inputs, _ = _level(f"{kind}_regions", pred, target, valid, i)
        function(*inputs, *options, num_regions, to_counts + i * step, to_losses + i * step)
    return counts, losses


def total(kind, pred, target, valid, mu, bins, by_class, alpha, gamma, weights: Tensor) -> Tensor:
    """sum_i weights[region of i] * l_i of all levels, 0-dim float64; arguments of `gradient`."""
    _, losses = regions(kind, pred, target, valid, mu, bins, by_class, alpha, gamma)
    return torch.dot(weights.reshape(-1), losses.reshape(-1))


def gradient(
    kind, pred, target, valid, mu, bins, by_class, alpha, gamma, weights: Tensor, scale: Tensor
) -> list[Tensor]:
    """scale * weights[region] * dl/dx of each sample, of the shape and dtype of each `pred`.

    Args:
        weights: (L, regions) float64.
        scale: 0-dim. The others are as of `regions`.
    """
    focal, found = alpha >= 0 or gamma > 0, []
    options, factor = _options(kind, mu, bins), scale.item()
    weights = weights.double().contiguous()
    to_weights, num_regions = weights.data_ptr(), weights.shape[1]
    for i, x in enumerate(pred):
        out = torch.empty(x.shape, dtype=wide(x.dtype))
        name = "focal_grad" if focal else f"{kind}_grad"
        function, inputs, _kept = _level(name, pred, target, valid, i)
        if focal:
            weight = weights[i].item() * factor
            factors = (weight * f for f in _focal_factors(alpha))
            failed = function(*inputs, gamma, *factors, out.data_ptr())
        else:
            at = to_weights + 8 * i * num_regions
            failed = function(*inputs, *options, num_regions, at, factor, out.data_ptr())
        if failed:
            raise MemoryError
        found.append(out if out.dtype == x.dtype else out.to(x.dtype))
    return found


def density(
    counts, foreground, ema, num_updates, ema_foreground, momentum, prior, own, normalizer,
    ema_init, training, factor,
) -> Tensor:  # fmt: skip
    """`reference.update_density`, whose arguments these are; its state is contiguous."""
    weights = torch.empty(counts.shape, dtype=torch.float64)
    counts, foreground = counts.contiguous(), foreground.contiguous()
    levels, bins = counts.shape
    _functions()["density", ema.dtype](
        counts.data_ptr(), levels, bins, ema.data_ptr(), num_updates.data_ptr(),
        foreground.data_ptr(), ema_foreground.data_ptr(), prior, momentum, own,
        _NORMALIZERS[normalizer], ema_init == "first", ema_init == "debias", training, factor,
        weights.data_ptr(),
    )  # fmt: skip
    return weights


def size_counts(pred, target, valid) -> Tensor:
    """`reference.size_counts` of all levels, added up."""
    counts = torch.zeros(SIZE_SLOTS, dtype=torch.int64)
    for i in range(len(pred)):
        function, inputs, _kept = _level("asl1_sizes", pred, target, valid, i)
        function(*inputs[:-1], counts.data_ptr())
    return counts


def quantile(histogram: Tensor, quantile: float, start: float) -> Tensor:
    """`reference.quantile`, whose arguments these are."""
    function = _functions()["quantile", histogram.dtype]
    return histogram.new_full((), function(histogram.data_ptr(), quantile, start))


def _level(name: str, pred, target, valid, i: int):
    """The C function of a level's precision, its first arguments, and the tensors behind them."""
    x, y = pred[i], target[i]
    if x.dtype not in _REAL:
        x = x.float()
    if name.startswith("asl1"):
        y = y.to(x.dtype)
    elif y.dtype != torch.int64 or len(y) != len(x):
        raise TypeError(f"labels are int64 (N,), not {y.dtype} {tuple(y.shape)}")
    kept = [x, y]
    kept += [valid[i]] if valid else []
    kept = [t if t.is_contiguous() else t.contiguous() for t in kept]
    pointers = [t.data_ptr() for t in kept]
    if name.startswith("asl1") and not valid:
        pointers.append(None)
    return _functions()[name, x.dtype], (*pointers, *x.shape, _num_parts(x)), kept


def _options(kind: str, mu: Tensor | None, bins: int) -> tuple:
    """The arguments of the C functions before the number of regions."""
    if mu is not None:
        return (mu.item(),)
    return (bins,) if kind == "sigmoid" else ()


def _focal_sum(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(_num_parts(logits), dtype=torch.float64)
    function, inputs, _ = _level("focal_sum", [logits], [labels], [], 0)
    function(*inputs, gamma, *_focal_factors(alpha), sums.data_ptr())
    return (labels >= 0).sum() * logits.shape[1], sums.sum()


def _num_parts(x: Tensor) -> int:
    elements = x.numel()
    if elements < 2 * _ALONE or _forked():
        return 1
    return min(torch.get_num_threads(), elements // _ALONE)


def _forked() -> bool:
    """Whether this process is a fork of another, whose threads of OpenMP it does not have."""
    return os.getpid() != _PROCESS


def _focal_factors(alpha: float) -> tuple[float, float]:
    """The factors of samples with target 0 and with target 1."""
    return (1 - alpha, alpha) if alpha >= 0 else (1.0, 1.0)


def _functions() -> dict[tuple[str, torch.dtype], Callable]:
    """The C functions by name and precision."""
    functions = _library()
    if functions is None:
        raise RuntimeError("the C library was not built; see ghm doctor")
    return functions


@functools.cache
def _library() -> dict[tuple[str, torch.dtype], Callable] | None:
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
    functions = {}
    for name, letters in _ARGUMENTS.items():
        for dtype, (suffix, real) in _REAL.items():
            function = getattr(library, name + suffix)
            function.argtypes = [(_TYPES | {"r": real})[letter] for letter in letters]
            function.restype = _RESULTS.get(name.rpartition("_")[2])
            functions[name, dtype] = function
    return functions
