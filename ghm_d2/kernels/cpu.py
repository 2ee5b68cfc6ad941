"""The backend for CPUs, in C (`cpu.c`).

Forward it reads the logits once; backward it reads them once and writes the gradient. Labels stay
integers, and no temporary is larger than the gradient. It computes in float32 or float64, and
converts half precision a block at a time. The library is built with the project if there is a C
compiler; `available` returns whether it was.
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

from ghm_d2.kernels.dtypes import wide
from ghm_d2.kernels.reference import SIZE_SLOTS

NAME = "c"
# suffix of the C functions for each dtype: "_f" computes in float32, "_d" in float64
_SUFFIXES = {torch.float32: "_f", torch.float64: "_d", torch.bfloat16: "_f", torch.float16: "_f"}
_FORMATS = {torch.bfloat16: 1, torch.float16: 2}
_KINDS = ("sigmoid", "softmax", "asl1", "focal")
_PASSES = [f"{kind}_{of}" for kind in _KINDS for of in ("regions", "grad")] + ["asl1_sizes"]
# argument types of the other C functions: p pointer, l int64, i int32, d double
_ARGUMENTS = {"quantile": "pdd", "density": "pllppppddiiiiidp"}
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "d": ctypes.c_double}
_NORMALIZERS = {"valid_bins": 0, "bins": 1, "weights": 2}
_PROCESS = os.getpid()
_MIN_PER_THREAD = 1 << 16  # elements


class _Job(ctypes.Structure):
    """The struct `job` of cpu.c, which describes the fields."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "target", "valid")),
        *((name, ctypes.c_int64) for name in ("rows", "K")),
        *((name, ctypes.c_int32) for name in ("x_format", "target_format", "parts")),
        *((name, ctypes.c_int32) for name in ("bins", "regions")),
        *((name, ctypes.c_double) for name in ("mu", "gamma", "others", "targets")),
        *((name, ctypes.c_void_p) for name in ("counts", "losses", "weights")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("out", "tallies", "table", "row_blocks")),
    )


def available() -> bool:
    """Return whether the C library was built and loads."""
    return _library() is not None


def regions(kind, pred, target, valid, mu, bins, by_class, alpha, gamma) -> tuple[Tensor, Tensor]:
    """Return the int64 counts and the float64 sums of plain losses of unit regions: (L, regions).

    Args:
        kind, mu, by_class, alpha, gamma: fields of `samples.Samples`; mu is 0-dim.
        pred, target: one tensor per level: logits and labels, or deltas.
        valid: bool masks of deltas, one per level; empty if all are valid.
        bins: number of unit regions; with `by_class`, for each class.
    """
    num_regions = bins * pred[0].shape[1] if by_class else bins
    counts = torch.empty(len(pred), num_regions, dtype=torch.int64)
    losses = torch.empty(len(pred), num_regions, dtype=torch.float64)
    name, options = _options(kind, mu, bins, num_regions, alpha, gamma)
    to_counts, to_losses, step = counts.data_ptr(), losses.data_ptr(), 8 * num_regions
    for i in range(len(pred)):
        into = {"counts": to_counts + i * step, "losses": to_losses + i * step}
        _call(f"{name}_regions", pred, target, valid, i, **options, **into)
    return counts, losses


def total(kind, pred, target, valid, mu, bins, by_class, alpha, gamma, weights: Tensor) -> Tensor:
    """sum_i weights[region of i] * l_i of all levels, 0-dim float64; arguments as in `gradient`."""
    _, losses = regions(kind, pred, target, valid, mu, bins, by_class, alpha, gamma)
    return torch.dot(weights.reshape(-1), losses.reshape(-1))


def gradient(
    kind, pred, target, valid, mu, bins, by_class, alpha, gamma, weights: Tensor, scale: Tensor
) -> list[Tensor]:
    """scale * weights[region] * dl/dx of each sample, in the shape and dtype of each `pred`.

    Args:
        weights: (L, regions) float64.
        scale: 0-dim. The other arguments are as in `regions`.
    """
    weights, found = weights.double().contiguous(), []
    to_weights, num_regions = weights.data_ptr(), weights.shape[1]
    name, options = _options(kind, mu, bins, num_regions, alpha, gamma)
    options["scale"] = scale.item()
    for i, x in enumerate(pred):
        out = torch.empty(x.shape, dtype=x.dtype if x.dtype in _SUFFIXES else torch.float32)
        into = {"weights": to_weights + 8 * i * num_regions, "out": out.data_ptr()}
        _call(f"{name}_grad", pred, target, valid, i, **options, **into)
        found.append(out if out.dtype == x.dtype else out.to(x.dtype))
    return found


def density(
    counts, foreground, ema, num_updates, ema_foreground, momentum, prior, own, normalizer,
    ema_init, training, factor,
) -> Tensor:  # fmt: skip
    """`reference.update_density` with the same arguments; the buffers must be contiguous."""
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
    """`reference.size_counts`, added up over all levels."""
    counts = torch.zeros(SIZE_SLOTS, dtype=torch.int64)
    for i in range(len(pred)):
        _call("asl1_sizes", pred, target, valid, i, parts=1, counts=counts.data_ptr())
    return counts


def quantile(histogram: Tensor, quantile: float, start: float) -> Tensor:
    """`reference.quantile` with the same arguments."""
    function = _functions()["quantile", histogram.dtype]
    return histogram.new_full((), function(histogram.data_ptr(), quantile, start))


def _call(name: str, pred, target, valid, i: int, **fields) -> None:
    """Run a C function on level `i`; `fields` are the other fields of its `_Job`."""
    x, y = pred[i], target[i]
    if x.dtype not in _SUFFIXES:
        x = x.float()
    if name.startswith("asl1"):
        y = y if y.dtype in _FORMATS else y.to(wide(x.dtype))
    elif y.dtype != torch.int64 or len(y) != len(x):
        raise TypeError(f"labels must be int64 (N,), not {y.dtype} {tuple(y.shape)}")
    x, y = x.contiguous(), y.contiguous()
    mask = valid[i].contiguous() if valid else None
    pointers = x.data_ptr(), y.data_ptr(), None if mask is None else mask.data_ptr()
    formats = _FORMATS.get(x.dtype, 0), _FORMATS.get(y.dtype, 0)
    job = _Job(*pointers, *x.shape, *formats, **{"parts": _num_parts(x), **fields})
    if _functions()[name, x.dtype](ctypes.byref(job)):
        raise MemoryError(f"out of memory in the C function {name}")


def _options(kind: str, mu: Tensor | None, bins: int, num_regions: int, alpha: float, gamma: float):
    """Return the name prefix of the C functions for these samples, and their options."""
    name = "focal" if alpha >= 0 or gamma > 0 else kind
    options = {"bins": bins, "regions": num_regions, "gamma": gamma}
    options["others"], options["targets"] = (1 - alpha, alpha) if alpha >= 0 else (1.0, 1.0)
    if mu is not None:
        options["mu"] = mu.item()
    return name, options


def _num_parts(x: Tensor) -> int:
    elements = x.numel()
    if elements < 2 * _MIN_PER_THREAD or _forked():
        return 1
    return min(torch.get_num_threads(), elements // _MIN_PER_THREAD)


def _forked() -> bool:
    """Return whether this process is a fork, which lacks the OpenMP threads of its parent."""
    return os.getpid() != _PROCESS


def _functions() -> dict[tuple[str, torch.dtype], Callable]:
    """Return the C functions by name and dtype."""
    functions = _library()
    if functions is None:
        raise RuntimeError("the C library was not built; see `ghm doctor`")
    return functions


@functools.cache
def _library() -> dict[tuple[str, torch.dtype], Callable] | None:
    path = Path(__file__).with_name("_cpu" + EXTENSION_SUFFIXES[0])
    sources = sorted(path.parent.glob("cpu*.[ch]"))  # a wheel has none
    if not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
        built_from = (ctypes.c_char * 64).in_dll(library, "ghm_source").value.decode()
        source = b"".join(source.read_bytes() for source in sources)
        if source and hashlib.sha256(source).hexdigest() != built_from:
            raise OSError("it was built from other source files")
    except (OSError, ValueError) as error:
        warnings.warn(
            f"the C library {path.name} is not used ({error}); reinstall ghm_d2", stacklevel=2
        )
        return None
    functions = {}
    for dtype, suffix in _SUFFIXES.items():
        for name in _PASSES if dtype in _FORMATS else (*_PASSES, *_ARGUMENTS):
            functions[name, dtype] = function = getattr(library, name + suffix)
            letters = _ARGUMENTS.get(name, "p")
            function.argtypes = [_TYPES[letter] for letter in letters]
            function.restype = ctypes.c_double if name == "quantile" else ctypes.c_int
    return functions
