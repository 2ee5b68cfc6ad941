"""The kernels as PyTorch operators, which torch.compile, torch.export and profilers see.

    ghm_d2::regions      counts and sums of losses by unit region, for all feature levels
    ghm_d2::total        the loss, given a weight for each unit region
    ghm_d2::gradient     the gradient, given a weight for each unit region
    ghm_d2::density      the weights, given the counts; updates the moving averages in place
    ghm_d2::size_counts  the histogram of |pred - target|
    ghm_d2::quantile     a quantile of |pred - target|, given an average of such histograms

Each operator runs the backend of its tensors' device: C on CPUs (`cpu`), Triton on GPUs
(`gpu.ghm`). `loss_of` is differentiable; the operators themselves have no derivative.
"""

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import Function

from ghm_d2.kernels import cpu
from ghm_d2.kernels.reference import SIZE_SLOTS
from ghm_d2.kernels.samples import Level, Samples

_SAMPLES = (
    "str kind, Tensor[] pred, Tensor[] target, Tensor[] valid, Tensor? mu, int bins, "
    "bool by_class, float alpha, float gamma"
)
_STATE = "Tensor(a!) ema, Tensor(b!) num_updates, Tensor(c!) ema_foreground"
_OPTIONS = (
    "float momentum, float prior, bool own, str normalizer, str ema_init, bool training, "
    "float factor"
)
SCHEMAS = {
    "regions": f"({_SAMPLES}) -> (Tensor counts, Tensor losses)",
    "total": f"({_SAMPLES}, Tensor weights) -> Tensor",
    "gradient": f"({_SAMPLES}, Tensor weights, Tensor scale) -> Tensor[]",
    "density": f"(Tensor counts, Tensor foreground, {_STATE}, {_OPTIONS}) -> Tensor",
    "size_counts": "(Tensor[] pred, Tensor[] target, Tensor[] valid) -> Tensor",
    "quantile": "(Tensor histogram, float quantile, float start) -> Tensor",
}


# by device type; the Triton backend is added when CUDA is first used
backends: dict[str, ModuleType | None] = {"cpu": cpu}


def backend_of(device_type: str) -> ModuleType | None:
    """Return the module with the kernels for a device type; None if there is none."""
    if device_type == "cuda" and "cuda" not in backends:
        backends["cuda"] = triton_backend()
    backend = backends.get(device_type)
    return None if backend is cpu and not cpu.available() else backend


@torch.compiler.assume_constant_result
def backend_name(device_type: str) -> str:
    """Return the name of the kernel for a device type; "torch" if there is none."""
    backend = backend_of(device_type)
    return "torch" if backend is None else backend.NAME


def triton_backend() -> ModuleType | None:
    """Return `gpu.ghm` if Triton is installed and can run, else None."""
    if find_spec("triton") is None:
        return None
    from ghm_d2.kernels.gpu import ghm

    return ghm if ghm.available() else None


def _run(name: str, device_type: str, *args):
    backend = backends.get(device_type) or backend_of(device_type)
    if backend is None:
        raise RuntimeError(f"ghm_d2::{name} has no kernel for {device_type}; see `ghm doctor`")
    return getattr(backend, name)(*args)


def _regions_fake(kind, pred, target, valid, mu, bins, by_class, alpha, gamma):
    regions = bins * pred[0].shape[1] if by_class else bins
    shape = len(pred), regions
    counts = pred[0].new_empty(shape, dtype=torch.int64)
    if pred[0].device.type != "cpu":  # the Triton backend returns no sums of losses
        shape = len(pred), 0
    return counts, pred[0].new_empty(shape, dtype=torch.float64)


def _total_fake(kind, pred, *_):
    return pred[0].new_empty((), dtype=torch.float64)


def _gradient_fake(kind, pred, *_):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in pred]


def _density_fake(counts, foreground, ema, *_):
    return torch.empty(counts.shape, dtype=torch.float64, device=ema.device)


def _size_counts_fake(pred, target, valid):
    return pred[0].new_empty(SIZE_SLOTS, dtype=torch.int64)


def _quantile_fake(histogram, *_):
    return histogram.new_empty(())


def _register() -> torch.library.Library:
    library = torch.library.Library("ghm_d2", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            library.impl(name, functools.partial(_run, name, key.lower()), key)
        # nothing to record: the result is a constant for the gradient
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        fake = globals()[f"_{name}_fake"]
        torch.library.register_fake(f"ghm_d2::{name}", fake, lib=library)
    return library


LIBRARY = _register()
regions, total, gradient, density, size_counts, quantile = (
    getattr(torch.ops.ghm_d2, name).default for name in SCHEMAS
)


def sample_arguments(samples: Samples, levels: Sequence[Level], bins: int) -> tuple:
    """The arguments that `regions` and `gradient` share."""
    pred, target, *valid = (list(tensors) for tensors in zip(*levels, strict=True))
    mu = samples.mu
    if mu is not None and not isinstance(mu, Tensor):
        mu = pred[0].new_full((), mu, dtype=torch.float64)  # new_tensor would wait for the device
    lists = pred, target, valid[0] if valid else []
    return samples.kind, *lists, mu, bins, samples.by_class, samples.alpha, samples.gamma


def loss_of(arguments: tuple, losses: Tensor, weights: Tensor) -> Tensor:
    """sum_k weights_k losses_k over all levels: a scalar, differentiable with respect to `pred`.

    Args:
        arguments: the result of `sample_arguments`.
        losses: the sums from `regions`, (L, regions); or (L, 0) if it returns none.
        weights: (L, regions), constants for the gradient.
    """
    kind, pred, target, valid, mu, *others = arguments
    if not any(x.requires_grad for x in pred):
        return _value(arguments, losses, weights)
    options = kind, len(pred), others
    return _Total.apply(options, losses, weights, mu, *pred, *target, *valid)


def _value(arguments: tuple, losses: Tensor, weights: Tensor) -> Tensor:
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in arguments[1]) else torch.float32
    if losses.shape[1]:
        return torch.dot(weights.reshape(-1), losses.reshape(-1)).to(dtype)
    return total(*arguments, weights).to(dtype)


def sums(arguments: tuple, losses: Tensor, weights: Tensor) -> list[Tensor]:
    """Return the loss of each level; arguments as in `loss_of`."""
    kind, *lists = arguments[:4]
    found = []
    for i in range(len(losses)):
        one = slice(i, i + 1)
        level = kind, *(tensors[one] for tensors in lists), *arguments[4:]
        found.append(loss_of(level, losses[one], weights[one]))
    return found


class _Total(Function):
    """`_value` with its gradient with respect to `pred`."""

    # PyTorch's form with setup_context takes 25 us more per call
    @staticmethod
    def forward(ctx, options, losses, weights, mu, *tensors):
        ctx.options = options
        ctx.save_for_backward(weights, mu, *tensors)
        return _value(_arguments(options, mu, tensors), losses, weights)

    @staticmethod
    def backward(ctx, scale):
        weights, mu, *tensors = ctx.saved_tensors
        arguments = *_arguments(ctx.options, mu, tensors), weights, scale
        pred = arguments[1]
        graph = torch.is_grad_enabled()
        found = _Gradient.apply(arguments, *pred) if graph else gradient(*arguments)
        return (None,) * 4 + (*found,) + (None,) * (len(tensors) - len(pred))


def _arguments(options: tuple, mu: Tensor | None, tensors: Sequence[Tensor]) -> tuple:
    """Rebuild the result of `sample_arguments` from the tensors that `_Total` saved."""
    kind, n, others = options
    tensors = list(tensors)
    return kind, tensors[:n], tensors[n : 2 * n], tensors[2 * n :], mu, *others


class _Gradient(Function):
    """The gradient, with an error if it is differentiated, because it would be a constant."""

    @staticmethod
    def forward(ctx, arguments, *pred):
        return tuple(gradient(*arguments))

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("a second derivative needs kernel='torch'")
