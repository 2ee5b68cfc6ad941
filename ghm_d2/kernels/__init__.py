"""One entry to the kernels: `counted` and `focal` run the fastest backend for their tensors.

"torch" is `reference`: plain PyTorch on any device, and the definition. The backends "c" (`cpu`)
and "triton" (`triton_ghm`) read the logits once forward; backward they read them again and write
the gradient. That is enough, because

    L = sum_k w_k sum_{i in region k} l_i        (w_k = 1 / (n S_k): paper, equation 8)

needs only the counts and the sums of losses of the unit regions.
"""

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import Function

from ghm_d2.kernels import cpu, reference
from ghm_d2.kernels.reference import as_tensor, upcast, wide

KERNELS = ("auto", "torch", "c", "triton")

Weigh = Callable[[Tensor], Tensor]
Finish = Callable[[Tensor], list[Tensor]]


def harmonized(
    samples: str,
    levels: Sequence[Sequence[Tensor]],
    bins: int,
    weigh: Weigh,
    *params: float | Tensor,
    kernel: str = "auto",
) -> list[Tensor]:
    """sum_i weights[region of i] * l_i of each feature level, a differentiable scalar each.

    Args:
        weigh: from counts (L, bins) int64 to weights (L, bins), constants for the gradient.
        samples, levels, bins, *params, kernel, and errors raised: as of `counted`.
    """
    counts, finish = counted(samples, levels, bins, *params, kernel=kernel)
    with torch.no_grad():
        weights = weigh(counts)
    return finish(weights)


def counted(
    samples: str,
    levels: Sequence[Sequence[Tensor]],
    bins: int,
    *params: float | Tensor,
    kernel: str = "auto",
    by_class: bool = False,
) -> tuple[Tensor, Finish]:
    """The two halves of `harmonized`, for callers that do something between them.

    Args:
        samples: "sigmoid", "softmax" or "asl1": `reference.<samples>_samples` says what they are.
        levels: its tensors, of each level. The first is differentiated.
        bins: number of unit regions.
        params: its other arguments.
        kernel: one of `KERNELS`; "auto" is the backend for the device where there is one.
        by_class: of sigmoids: K * bins regions, those of class j from j * bins on, and as many
            counts and weights. Triton has no kernel for them: it is plain PyTorch there.

    Raises:
        ValueError: an unknown kernel; tensors whose shapes or devices do not belong together.
        RuntimeError: a kernel that is not there, or not for this device.

    Returns:
        the samples in each unit region, (L, bins) int64, and the function from weights (L, bins)
        to the loss of each level, which is not called with a gradient to the weights.
    """
    check = _checked_deltas if samples == "asl1" else _checked_logits
    levels = [check(*tensors) for tensors in levels]
    backend = _common_backend(kernel, levels)
    if by_class and backend is not cpu:
        backend = None
    if backend in (None, cpu):  # Triton's kernels read half precision as it is
        levels = [tuple(map(upcast, tensors)) for tensors in levels]
    if backend is None:
        return _counted_by_reference(samples, levels, bins, params, by_class)
    regions, gradient = getattr(backend, f"{samples}_regions"), getattr(backend, f"{samples}_grad")
    if by_class:
        regions, gradient = (functools.partial(f, by_class=True) for f in (regions, gradient))
    if backend is not cpu:  # Triton's kernels read parameters from the device: one copy for all
        params = tuple(as_tensor(x, levels[0][0], torch.float64) for x in params)
    with torch.no_grad():
        counts, losses = zip(*(regions(*t, *params, bins) for t in levels), strict=True)

    def finish(weights: Tensor) -> list[Tensor]:
        return [
            _Weighed.apply(gradient, params, loss, w, *tensors)
            for loss, w, tensors in zip(losses, weights, levels, strict=True)
        ]

    return torch.stack(counts), finish


@torch.no_grad()
def size_counts(levels: Sequence[Sequence[Tensor]], *, kernel: str = "auto") -> Tensor:
    """`reference.size_counts` of all levels' (pred, target, valid), added up."""
    levels = [_checked_deltas(*tensors) for tensors in levels]
    backend = _common_backend(kernel, levels)
    if backend in (None, cpu):  # foreground alone, on CPUs: no work for a kernel of its own
        backend = reference
    return torch.stack([backend.size_counts(*tensors) for tensors in levels]).sum(0)


def focal(
    logits: Tensor, labels: Tensor, alpha: float, gamma: float, *, kernel: str = "auto"
) -> Tensor | None:
    """The sum of the focal losses in rows that are not ignored; None where there is no backend."""
    tensors = _checked_logits(logits, labels)
    backend = _common_backend(kernel, [tensors])
    if backend is None or not gamma >= 0:
        return None
    if backend is cpu:
        tensors = upcast(tensors[0]), tensors[1]
    return _Focal.apply(backend, alpha, gamma, *tensors)


def update_density(
    counts: Tensor,
    foreground: Tensor,
    ema: Tensor,
    num_updates: Tensor,
    ema_foreground: Tensor,
    *,
    kernel: str = "auto",
    **options,
) -> Tensor | None:
    """As `cpu.update_density`; None where there is no backend for the tensors."""
    state = ema, num_updates, ema_foreground
    integers = counts, num_updates, foreground
    fits = (
        all(t.device == ema.device for t in (*state, *integers))
        and all(t.is_contiguous() for t in state)
        and all(t.dtype == torch.int64 for t in integers)
        and wide(ema.dtype) == ema.dtype == ema_foreground.dtype
        and num_updates.shape == ema.shape
        and counts.shape[1] == ema.shape[1]
    )
    backend = backend_for(kernel, ema.device) if fits else None
    if backend is None:
        return None
    return backend.update_density(counts, foreground, *state, **options)


def name_for(device: torch.device) -> str:
    """Which kernel "auto" is on a device."""
    backend = backend_for("auto", device)
    return "torch" if backend is None else "c" if backend is cpu else "triton"


def backend_for(kernel: str, device: torch.device) -> ModuleType | None:
    """The module that does what `reference` defines, if another one does.

    Raises:
        ValueError: an unknown kernel.
        RuntimeError: a kernel that is not there, or not for this device.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel is one of {', '.join(KERNELS)}, not {kernel!r}")
    backend = None
    if device.type == "cpu" and kernel in ("auto", "c") and cpu.available():
        backend = cpu
    elif (device.type == "cuda" and kernel == "auto") or kernel == "triton":
        backend = _triton()
        if device.type != "cuda" and backend is not None and not backend.interpreted():
            backend = None
    if backend is None and kernel in ("c", "triton"):
        raise RuntimeError(f"the kernel {kernel!r} is not there for {device.type}; see ghm doctor")
    return None if _is_traced() else backend


def _is_traced() -> bool:
    """Whether operations are recorded or transformed, which what is no operation escapes."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _common_backend(kernel: str, levels: Sequence[Sequence[Tensor]]) -> ModuleType | None:
    """The backend for all levels; None where a target needs a gradient or precisions are mixed."""
    backends = {backend_for(kernel, x.device) for x, *_ in levels}
    targets = [(x, t) for x, *others in levels for t in others if t.is_floating_point()]
    if any(t.requires_grad or wide(t.dtype) != wide(x.dtype) for x, t in targets):
        return None
    return backends.pop() if len(backends) == 1 else None


def _checked_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The tensors of a level, made sure that no kernel reads beyond them."""
    if labels.is_floating_point():
        raise ValueError(f"labels are integers, not {labels.dtype}")
    _check_shape("labels", labels, logits, logits.shape[:1])
    return logits, labels.long()


def _checked_deltas(pred: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_shape("targets", target, pred, pred.shape)
    _check_shape("valid", valid, pred, pred.shape)
    return pred, target if target.is_floating_point() else target.to(pred.dtype), valid.bool()


def _check_shape(name: str, given: Tensor, pred: Tensor, shape: torch.Size) -> None:
    if pred.dim() != 2 or given.shape != shape:
        raise ValueError(
            f"predictions are (N, K), not {tuple(pred.shape)} with {name} {tuple(given.shape)}"
        )
    if given.device != pred.device:
        raise ValueError(f"predictions are on {pred.device}, but {name} on {given.device}")


@functools.cache
def _triton() -> ModuleType | None:
    if find_spec("triton") is None:
        return None
    from ghm_d2.kernels import triton_ghm

    return triton_ghm if triton_ghm.available() else None


def _counted_by_reference(samples, levels, bins, params, by_class) -> tuple[Tensor, Finish]:
    of = [getattr(reference, f"{samples}_samples")(*tensors, *params) for tensors in levels]
    index = [reference.unit_regions(norm, valid, bins, by_class) for _, norm, valid in of]
    losses = [loss for loss, _, _ in of]
    if by_class:
        bins *= losses[0].shape[1]

    def finish(weights: Tensor) -> list[Tensor]:
        return [
            reference.harmonized_sum(loss, i, w)
            for loss, i, w in zip(losses, index, weights, strict=True)
        ]

    return torch.stack([reference.histogram(i, bins) for i in index]), finish


def _refuse_to_be_differentiated() -> None:
    # once_differentiable gives a constant where the incoming gradient is one
    if torch.is_grad_enabled():
        raise RuntimeError("a gradient that is to be differentiated needs kernel='torch'")


class _Weighed(Function):
    """The sum of a level's losses, weighed by unit region."""

    @staticmethod
    def forward(ctx, gradient, params, losses, weights, *tensors):
        ctx.gradient, ctx.params = gradient, params
        ctx.save_for_backward(weights, *tensors)
        return (weights * losses).sum().to(torch.promote_types(tensors[0].dtype, torch.float32))

    @staticmethod
    def backward(ctx, scale):
        _refuse_to_be_differentiated()
        weights, *tensors = ctx.saved_tensors
        # what the gradient is multiplied by goes into the weights: no pass of its own
        weights = weights.to(scale.dtype) * scale
        gradient = ctx.gradient(*tensors, *ctx.params, weights)
        return (None,) * 4 + (gradient,) + (None,) * (len(tensors) - 1)


class _Focal(Function):
    @staticmethod
    def forward(ctx, backend, alpha, gamma, logits, labels):
        ctx.backend, ctx.params = backend, (alpha, gamma)
        ctx.save_for_backward(logits, labels)
        return backend.focal_sum(logits, labels, alpha, gamma)

    @staticmethod
    def backward(ctx, scale):
        _refuse_to_be_differentiated()
        gradient = ctx.backend.focal_grad(*ctx.saved_tensors, *ctx.params, scale)
        return None, None, None, gradient, None
