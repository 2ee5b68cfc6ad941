"""The losses that are timed: ours, and those of other projects, the peers, that do the same.

Ours take integer labels. Dense targets and weights that a peer needs are made before the clock
starts, which favours the peer. A peer that is not installed raises ImportError.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ghm_d2.losses import (
    GHMC,
    GHMR,
    SoftmaxGHMC,
    asl1_loss,
    bce_loss,
    exact_ghm_c_loss,
    focal_loss,
)

SEED = 0
FOREGROUND = 0.01  # share of the anchors
_CLS = {"bins": 30, "momentum": 0.75}  # as published
_REG = {"mu": 0.02, "bins": 10, "momentum": 0.7}
_FOCAL = {"alpha": 0.25, "gamma": 2.0, "reduction": "sum"}


@dataclass
class Inputs:
    """Inputs for the losses of one kind.

    Attributes:
        x: a leaf: logits (N, K) over sigmoids, (N, K + 1) over a softmax, or (P, 4) deltas.
        labels: (N,) int64, K for background; none is ignored, which peers could not express.
        target: (P, 4) deltas.
    """

    x: Tensor
    labels: Tensor | None = None
    target: Tensor | None = None

    @cached_property
    def one_hot(self) -> Tensor:
        """The labels as (N, K) of the dtype of `x`, made when a peer first needs them."""
        rows = torch.nonzero(self.labels < self.x.shape[1]).squeeze(1)
        dense = torch.zeros_like(self.x, requires_grad=False)
        dense[rows, self.labels[rows]] = 1
        return dense


def make_inputs(
    kind: str, samples: int, classes: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """Seeded inputs: logits of mean -3 and deviation 2, one anchor in a hundred foreground.

    Args:
        kind: "sigmoid", "softmax" or "boxes".
        samples: (anchor, class) pairs, or box coordinates; cut down to whole anchors or boxes.
    """
    random = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    if kind == "boxes":
        boxes = max(1, samples // 4)
        pred, target = normal(boxes, 4).to(dtype), normal(boxes, 4).to(dtype)
        return Inputs(pred.requires_grad_(), target=target)
    anchors = max(1, samples // classes)
    labels = torch.randint(classes, (anchors,), generator=random, device=device)
    background = torch.rand(anchors, generator=random, device=device) >= FOREGROUND
    labels[background] = classes
    logits = normal(anchors, classes + (kind == "softmax")).mul_(2).sub_(3).to(dtype)
    return Inputs(logits.requires_grad_(), labels)


Loss = Callable[[], Tensor]  # gives a scalar
Builder = Callable[[Inputs], Loss]


def _from_labels(loss: Callable, **options) -> Builder:
    return lambda inputs: partial(loss, inputs.x, inputs.labels, **options)


def _from_one_hot(loss: Callable, **options) -> Builder:
    return lambda inputs: partial(loss, inputs.x, inputs.one_hot, **options)


def _ghm_c(kind: type) -> Builder:
    return lambda inputs: partial(kind(**_CLS).to(inputs.x.device), inputs.x, inputs.labels)


def _ghm_r(inputs: Inputs) -> Loss:
    return partial(GHMR(**_REG).to(inputs.x.device), inputs.x, inputs.target)


def _asl1(inputs: Inputs) -> Loss:
    return partial(asl1_loss, inputs.x, inputs.target, reduction="sum")


def _mmdet_ghm_c(inputs: Inputs) -> Loss:
    loss = load_mmdet_losses().GHMC(**_CLS).to(inputs.x.device)
    # expanded from one weight per anchor, as in mmdet itself
    weight = torch.ones(len(inputs.x), 1, device=inputs.x.device).expand(inputs.x.shape)
    return partial(loss, inputs.x, inputs.one_hot, weight)


def _mmdet_ghm_r(inputs: Inputs) -> Loss:
    loss = load_mmdet_losses().GHMR(**_REG).to(inputs.x.device)
    return partial(loss, inputs.x, inputs.target, torch.ones_like(inputs.target))


def _fvcore_focal(name: str) -> Builder:
    def build(inputs):
        from fvcore.nn import focal_loss

        return _from_one_hot(getattr(focal_loss, name), **_FOCAL)(inputs)

    return build


def _fvcore_smooth_l1(inputs: Inputs) -> Loss:
    from fvcore.nn import smooth_l1_loss

    return partial(smooth_l1_loss, inputs.x, inputs.target, beta=0.1, reduction="sum")


def _torchvision_focal(inputs: Inputs) -> Loss:
    from torchvision.ops import sigmoid_focal_loss

    return _from_one_hot(sigmoid_focal_loss, **_FOCAL)(inputs)


def load_mmdet_losses(name: str = "ghm_loss") -> ModuleType:
    """Load mmdet's file of GHM losses, or of other losses, without the rest and without mmcv.

    The file needs only a registry and its neighbour utils.py. A stand-in replaces the registry
    while the file loads; afterwards `sys.modules` is as before.

    Raises:
        ImportError: mmdet is not installed, or has no such file.
    """
    spec = find_spec("mmdet")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("not installed: pip install --no-deps mmdet==3.3.0")
    folder = Path(spec.submodule_search_locations[0]) / "models" / "losses"
    parent = "mmdet.models.losses"
    packages = ("mmdet", "mmdet.registry", "mmdet.models", parent)
    with _stand_ins(*packages, f"{parent}.utils", f"{parent}.{name}"):
        sys.modules["mmdet.registry"].MODELS = _Registry
        _load(f"{parent}.utils", folder / "utils.py")
        return _load(f"{parent}.{name}", folder / f"{name}.py")


class _Registry:
    @staticmethod
    def register_module(*_args, **_kwargs):
        return lambda registered: registered


@contextmanager
def _stand_ins(*names: str) -> Iterator[None]:
    """Put empty modules under `names`; the modules from before come back at the end."""
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update((name, ModuleType(name)) for name in names)
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _load(name: str, file: Path) -> ModuleType:
    if not file.is_file():
        raise ImportError(f"the installed mmdet has no {file.name}")
    spec = spec_from_file_location(name, file)
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# name: (kind of inputs, builder of the loss on some inputs)
PEERS: dict[str, tuple[str, Builder]] = {
    "GHM-C": ("sigmoid", _ghm_c(GHMC)),
    "mmdet GHM-C": ("sigmoid", _mmdet_ghm_c),
    "exact GHM-C": ("sigmoid", _from_labels(exact_ghm_c_loss, epsilon=1 / 30)),
    "focal": ("sigmoid", _from_labels(focal_loss, **_FOCAL)),
    "fvcore focal": ("sigmoid", _fvcore_focal("sigmoid_focal_loss")),
    "fvcore focal jit": ("sigmoid", _fvcore_focal("sigmoid_focal_loss_jit")),
    "torchvision focal": ("sigmoid", _torchvision_focal),
    "BCE": ("sigmoid", _from_labels(bce_loss, reduction="sum")),
    "torch BCE": ("sigmoid", _from_one_hot(F.binary_cross_entropy_with_logits, reduction="sum")),
    "softmax GHM-C": ("softmax", _ghm_c(SoftmaxGHMC)),
    "torch CE": ("softmax", _from_labels(F.cross_entropy)),
    "GHM-R": ("boxes", _ghm_r),
    "mmdet GHM-R": ("boxes", _mmdet_ghm_r),
    "ASL1": ("boxes", _asl1),
    "fvcore smooth L1": ("boxes", _fvcore_smooth_l1),
}
