"""The Triton kernels as these tests run them: on CUDA where it is, else in Triton's interpreter."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ghm_d2.kernels import gpu, operators, reference

# before the kernels are, so that other tests find a Triton that compiles
triton = pytest.importorskip("triton", reason="no Triton for this platform")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MU = 0.02
NAN, INF = float("nan"), float("inf")
# NumPy warns of numbers that are not finite, which the interpreter computes with
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def _load():
    """`gpu.ghm`; without a GPU a copy that Triton interprets, which no other test sees."""
    if CUDA:
        return importlib.import_module("ghm_d2.kernels.gpu.ghm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for path in Path(gpu.__file__).parent.glob("[!_]*.py"):
            patch.setattr(gpu, path.stem, None, raising=False)
            patch.setitem(sys.modules, f"ghm_d2.kernels.gpu.{path.stem}", None)
            del sys.modules[f"ghm_d2.kernels.gpu.{path.stem}"]
        return importlib.import_module("ghm_d2.kernels.gpu.ghm")


T = _load()


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """Triton's own functions, made for the compiler, are interpreted too, in a module that
    imports this; and `kernel="triton"` runs `T`."""
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            patch.setitem(operators.backends, "cpu", T)
        if not CUDA:
            _interpret_language(patch)
        yield


def _interpret_language(patch):
    from triton import language
    from triton.runtime.interpreter import InterpretedFunction

    patch.setenv("TRITON_INTERPRET", "1")
    for owner in (language, language.standard):
        for name, function in vars(owner).items():
            if isinstance(function, triton.JITFunction):
                patch.setattr(owner, name, InterpretedFunction(function.fn))
    for name, value in vars(language.core).items():
        patch.setattr(language.core, name, value)  # the interpreter does not put them all back


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def norms(shape, bins, seed):
    """Gradient norms of every unit region, none so near an edge that rounding decides."""
    region = torch.randint(bins, shape, generator=generator(seed))
    place = 0.2 + 0.6 * torch.rand(shape, generator=generator(seed + 1), dtype=torch.float64)
    return (region + place) / bins


def _labels(rows, classes, seed):
    """Labels of every sort: classes, background and ignored."""
    return torch.randint(-1, classes + 1, (rows,), generator=generator(seed + 2))


def make_sigmoid(rows, columns, bins, dtype=torch.float64, seed=1):
    labels = _labels(rows, columns, seed)
    s = norms((rows, columns), bins, seed).logit()
    own = labels[:, None] == torch.arange(columns)
    return torch.where(own, -s, s).to(DEVICE, dtype), labels.to(DEVICE)


def make_softmax(rows, columns, bins, dtype=torch.float64, seed=1):
    labels = _labels(rows, columns - 1, seed)
    logits = torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)
    s = norms((rows,), bins, seed).logit()
    own = labels.clamp(min=0)[:, None] == torch.arange(columns)
    others = logits.masked_fill(own, -INF).logsumexp(1)
    others = others.where(others.isfinite(), 0)  # one column
    logits = torch.where(own, (others - s)[:, None], logits)
    return logits.to(DEVICE, dtype), labels.to(DEVICE)


def make_asl1(rows, columns, bins, dtype=torch.float64, seed=1):
    g = norms((rows, columns), bins, seed)
    d = MU * g / (1 - g * g).sqrt()
    sign = 1 - 2 * torch.randint(2, d.shape, generator=generator(seed + 3))
    target = torch.randn(d.shape, generator=generator(seed + 4), dtype=torch.float64) / 1000
    valid = torch.rand(d.shape, generator=generator(seed + 5)) > 0.3
    pred, target = (target + sign * d).to(DEVICE, dtype), target.to(DEVICE, dtype)
    return pred, target, valid.to(DEVICE)


@dataclass
class Kind:
    """A loss: its kernels, its reference, and inputs of any unit regions."""

    name: str
    make: Callable  # (rows, columns, bins, dtype, seed) -> tensors; the first is differentiated
    params: tuple = ()

    def arguments(self, tensors, bins, alpha=-1.0, gamma=0.0, by_class=False):
        x, target, *valid = tensors
        mu = torch.tensor(self.params[0], dtype=torch.float64, device=DEVICE) if valid else None
        return self.name, [x], [target], valid, mu, bins, by_class, alpha, gamma

    def counts(self, tensors, bins, **options):
        return T.regions(*self.arguments(tensors, bins, **options))[0][0]

    def total(self, tensors, weights, **options):
        return T.total(*self.arguments(tensors, len(weights), **options), weights[None])

    def grad(self, tensors, weights, scale=1.0, **options):
        scale = torch.tensor(scale, device=DEVICE)
        arguments = self.arguments(tensors, len(weights), **options)
        return T.gradient(*arguments, weights[None], scale)[0]

    def expected(self, tensors, weights):
        """Counts, loss and gradient, through autograd."""
        bins = len(weights)
        x, *rest = (wide(t) if t.is_floating_point() else t for t in tensors)
        x = x.detach().clone().requires_grad_()
        loss, norm, valid = getattr(reference, f"{self.name}_samples")(x, *rest, *self.params)
        index = reference.unit_regions(norm, valid, bins)
        total = reference.harmonized_losses(loss, index, weights).sum()
        (gradient,) = torch.autograd.grad(total, x)
        return reference.histogram(index, bins), total.detach().double(), gradient


SIGMOID, SOFTMAX = Kind("sigmoid", make_sigmoid), Kind("softmax", make_softmax)
ASL1 = Kind("asl1", make_asl1, (MU,))
every_kind = pytest.mark.parametrize("kind", [SIGMOID, SOFTMAX, ASL1], ids=lambda kind: kind.name)


def make_weights(bins, dtype=torch.float64):
    weights = 0.5 + torch.rand(bins, generator=generator(7), dtype=torch.float64)
    return weights.to(DEVICE, dtype)
