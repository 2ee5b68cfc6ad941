"""The losses that `ghm bench` times: ours, and others' that do the same.

A peer is used where it can be imported, and named with its remedy where not. What a peer wants
beside the integer labels that ours take (dense targets, weights) is made before any timing
starts, which favours the peer.
"""

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ghm_d2.errors import UsageError
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
MMDET = "--no-deps mmdet==3.3.0"
_BINS, _MOMENTUM = 30, 0.75  # of GHM-C, as published
_REG = {"mu": 0.02, "bins": 10, "momentum": 0.7}
_FOCAL = {"alpha": 0.25, "gamma": 2.0, "reduction": "sum"}


@dataclass
class Inputs:
    """What the losses of one kind get.

    Attributes:
        x: a leaf: logits (N, K) over sigmoids, (N, K + 1) over a softmax, or (P, 4) deltas.
        labels: (N,) int64, K the background; none is ignored, since others cannot say that.
        target: (P, 4), of deltas.
    """

    x: Tensor
    labels: Tensor | None = None
    target: Tensor | None = None

    @cached_property
    def one_hot(self) -> Tensor:
        """(N, K), of the dtype of `x`; made when the first peer that wants it is built."""
        rows = torch.nonzero(self.labels < self.x.shape[1]).squeeze(1)
        dense = torch.zeros_like(self.x, requires_grad=False)
        dense[rows, self.labels[rows]] = 1
        return dense


Loss = Callable[[], Tensor]  # gives a scalar
Builder = Callable[[Inputs], Loss]


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


@dataclass(frozen=True)
class Peer:
    """One loss that is timed.

    Attributes:
        name: unique; such as "mmdet GHM-C".
        kind: which inputs it takes; see `make_inputs`.
        against: the loss of ours of the same kind.
        build: makes what computes the loss of some inputs. It imports what it needs.
        install: the words after `pip install` that bring it; empty for ours.
    """

    name: str
    kind: str
    against: str
    build: Builder
    install: str = ""

    @property
    def ours(self) -> bool:
        return not self.install


class PeerMissingError(Exception):
    """A peer that cannot be used here; the message has the remedy."""


def build(peer: Peer, inputs: Inputs) -> Loss:
    """What computes the peer's loss.

    Raises:
        PeerMissingError: it is not installed, or does not import.
    """
    try:
        return peer.build(inputs)
    except ModuleNotFoundError:
        raise PeerMissingError(f"not installed: pip install {peer.install}") from None
    except ImportError as error:
        raise PeerMissingError(f"does not import ({error}): pip install {peer.install}") from None


def choose_peers(names: Sequence[str] = ()) -> tuple[Peer, ...]:
    """The peers `names`, or all.

    Raises:
        UsageError: an unknown name; the nearest known one is given.
    """
    known = [peer.name for peer in PEERS]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.0)[0]
            raise UsageError(
                f"no loss {name!r} to time; did you mean {near!r}? There are {', '.join(known)}"
            )
    return tuple(peer for peer in PEERS if not names or peer.name in names)


def load_mmdet_losses() -> ModuleType:
    """mmdet's file of GHM losses, without the rest of mmdet and without mmcv.

    The file wants a registry and its neighbour utils.py only. The registry is a stand-in while
    the file loads; afterwards `sys.modules` is as before.

    Raises:
        PeerMissingError: mmdet is not installed, or has no such file.
    """
    spec = find_spec("mmdet")
    if spec is None or not spec.submodule_search_locations:
        raise PeerMissingError(f"not installed: pip install {MMDET}")
    folder = Path(spec.submodule_search_locations[0]) / "models" / "losses"
    for file in (folder / "utils.py", folder / "ghm_loss.py"):
        if not file.is_file():
            raise PeerMissingError(f"the installed mmdet has no {file.name}: pip install {MMDET}")
    parent = "mmdet.models.losses"
    packages = ("mmdet", "mmdet.registry", "mmdet.models", parent)
    with _stand_ins(*packages, f"{parent}.utils", f"{parent}.ghm_loss"):
        sys.modules["mmdet.registry"].MODELS = _Registry
        _load(f"{parent}.utils", folder / "utils.py")
        return _load(f"{parent}.ghm_loss", folder / "ghm_loss.py")


class _Registry:
    @staticmethod
    def register_module(*_args, **_kwargs):
        return lambda registered: registered


@contextmanager
def _stand_ins(*names: str) -> Iterator[None]:
    """Empty modules under `names`; what was there before comes back at the end."""
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update((name, ModuleType(name)) for name in names)
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _load(name: str, file: Path) -> ModuleType:
    spec = spec_from_file_location(name, file)
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _ghm_c(kind: type) -> Builder:
    def build(inputs):
        loss = kind(bins=_BINS, momentum=_MOMENTUM).to(inputs.x.device)
        return partial(loss, inputs.x, inputs.labels)

    return build


def _ghm_r(inputs: Inputs) -> Loss:
    return partial(GHMR(**_REG).to(inputs.x.device), inputs.x, inputs.target)


def _from_labels(loss: Callable, **options) -> Builder:
    return lambda inputs: partial(loss, inputs.x, inputs.labels, **options)


def _mmdet_ghm_c(inputs: Inputs) -> Loss:
    loss = load_mmdet_losses().GHMC(bins=_BINS, momentum=_MOMENTUM).to(inputs.x.device)
    # expanded from a weight an anchor, as mmdet does it itself
    weight = torch.ones(len(inputs.x), 1, device=inputs.x.device).expand(inputs.x.shape)
    return partial(loss, inputs.x, inputs.one_hot, weight)


def _mmdet_ghm_r(inputs: Inputs) -> Loss:
    loss = load_mmdet_losses().GHMR(**_REG).to(inputs.x.device)
    return partial(loss, inputs.x, inputs.target, torch.ones_like(inputs.target))


def _fvcore_focal(name: str) -> Builder:
    def build(inputs):
        from fvcore.nn import focal_loss

        return partial(getattr(focal_loss, name), inputs.x, inputs.one_hot, **_FOCAL)

    return build


def _fvcore_smooth_l1(inputs: Inputs) -> Loss:
    from fvcore.nn import smooth_l1_loss

    return partial(smooth_l1_loss, inputs.x, inputs.target, beta=0.1, reduction="sum")


def _torchvision_focal(inputs: Inputs) -> Loss:
    from torchvision.ops import sigmoid_focal_loss

    return partial(sigmoid_focal_loss, inputs.x, inputs.one_hot, **_FOCAL)


def _torch_bce(inputs: Inputs) -> Loss:
    loss = F.binary_cross_entropy_with_logits
    return partial(loss, inputs.x, inputs.one_hot, reduction="sum")


def _asl1(inputs: Inputs) -> Loss:
    return partial(asl1_loss, inputs.x, inputs.target, reduction="sum")


_EXACT = _from_labels(exact_ghm_c_loss, epsilon=1 / _BINS)
_JIT = _fvcore_focal("sigmoid_focal_loss_jit")
PEERS = (
    Peer("GHM-C", "sigmoid", "GHM-C", _ghm_c(GHMC)),
    Peer("mmdet GHM-C", "sigmoid", "GHM-C", _mmdet_ghm_c, MMDET),
    Peer("exact GHM-C", "sigmoid", "GHM-C", _EXACT),
    Peer("focal", "sigmoid", "focal", _from_labels(focal_loss, **_FOCAL)),
    Peer("fvcore focal", "sigmoid", "focal", _fvcore_focal("sigmoid_focal_loss"), "fvcore"),
    Peer("fvcore focal jit", "sigmoid", "focal", _JIT, "fvcore"),
    Peer("torchvision focal", "sigmoid", "focal", _torchvision_focal, "torchvision"),
    Peer("BCE", "sigmoid", "BCE", _from_labels(bce_loss, reduction="sum")),
    Peer("torch BCE", "sigmoid", "BCE", _torch_bce, "torch"),
    Peer("softmax GHM-C", "softmax", "softmax GHM-C", _ghm_c(SoftmaxGHMC)),
    Peer("torch CE", "softmax", "softmax GHM-C", _from_labels(F.cross_entropy), "torch"),
    Peer("GHM-R", "boxes", "GHM-R", _ghm_r),
    Peer("mmdet GHM-R", "boxes", "GHM-R", _mmdet_ghm_r, MMDET),
    Peer("ASL1", "boxes", "ASL1", _asl1),
    Peer("fvcore smooth L1", "boxes", "ASL1", _fvcore_smooth_l1, "fvcore"),
)
