"""The C backend on half precision, which it converts itself: bit for bit as a float32 copy."""

import math

import pytest
import torch
from backends import LOSSES, batch, needs_library, run
from measure import peak_bytes

from ghm_d2.kernels import operators
from ghm_d2.losses import GHMR, bce_loss, focal_loss

pytestmark = needs_library
HALF = [torch.bfloat16, torch.float16]


def bits(x):
    """The bits of each number, so that -0 differs from 0; all NaNs are equal."""
    return torch.where(x.isnan(), 0, x.view(torch.int16)), x.isnan()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("samples", LOSSES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(0, 4), (1, 1), (257, 80), (1025, 1), (3, 1500), (20_001, 8)]
)
@pytest.mark.parametrize("make", ["published", "robust"])
def test_results_are_those_of_a_copy(samples, rows, columns, dtype, make):
    pred, *others = batch(samples, rows, columns)
    pred, make = pred.to(dtype), LOSSES[samples] if make == "published" else LOSSES[samples].robust
    losses, gradients, ema = run(samples, "c", [[pred, *others]], make=make)
    expected = run(samples, "c", [[pred.float(), *others]], make=make)
    assert torch.equal(losses[0], expected[0][0]) and torch.equal(ema, expected[2])
    assert gradients[0].dtype == dtype
    assert all(map(torch.equal, bits(gradients[0]), bits(expected[1][0].to(dtype))))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_targets_of_boxes_have_their_own_precision(dtype, target):
    pred, true, valid = batch("asl1", 300, 4)
    pred, true = pred.to(dtype), true.to(target)
    for given in (pred, pred.float(), pred.double()):
        mine, theirs = given.clone().requires_grad_(), given.clone().requires_grad_()
        exact = true if target == torch.float64 else true.float()
        losses = GHMR(kernel="c")(mine, true, valid), GHMR(kernel="c")(theirs, exact, valid)
        assert torch.equal(*losses)
        gradients = map(torch.autograd.grad, losses, (mine, theirs))
        assert torch.equal(*(gradient for (gradient,) in gradients))


def differences(pred, target):
    """pred - target, as a gradient: mu is so large that ASL1's is the difference over mu."""
    mu, weights = torch.tensor(2.0**80, dtype=torch.float64), torch.ones(1, 1)
    given = "asl1", [pred], [target], [], mu, 1, False, -1.0, 0.0
    return operators.gradient(*given, weights, mu)[0]


def numbers(dtype):
    """All numbers of a type, (N, 1), that `differences` computes exactly, and those not finite."""
    found = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    size = found.float().abs()
    return found[(size == 0) | ((size >= 2.0**-40) & (size < 2.0**60)) | ~size.isfinite(), None]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_number_is_read(dtype):
    """Subnormal ones among them; what is not finite has a gradient of NaN."""
    target = numbers(dtype)
    expected = torch.where(target.isfinite(), -target.float(), math.nan)
    found = differences(torch.zeros(target.shape), target)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_are_rounded_to_the_nearest_even(dtype):
    """At every number of the type, half-way to the next, and just beside that."""
    number = numbers(dtype).float().abs().unique()
    number = number[number.isfinite()]
    half_way = (number[:-1] + number[1:]) / 2
    beside = [half_way.nextafter(torch.tensor(way)) for way in (0.0, math.inf)]
    number = torch.cat([number, half_way, *beside, torch.tensor([65519.9, 65520.0, 1e5])])
    number = number[number > 0, None]
    number = torch.cat([number, -number])
    gradient = differences(torch.zeros(number.shape, dtype=dtype), -number)
    assert all(map(torch.equal, bits(gradient), bits(number.to(dtype))))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", [bce_loss, focal_loss])
def test_what_is_not_finite_is_nan_in_the_gradient_alone_there(loss, bad, dtype):
    logits, labels = batch("sigmoid", 50, 4)
    logits[3, 2], labels[3] = bad, 1
    leaf = logits.to(dtype).requires_grad_()
    loss(leaf, labels, reduction="sum", kernel="c").backward()
    assert leaf.grad.isnan().nonzero().tolist() == [[3, 2]]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("samples", LOSSES)
def test_no_memory_beyond_the_gradient_is_taken(samples, dtype):
    pred, *others = batch(samples, 20_000, 80)
    module, leaf = LOSSES[samples](kernel="c"), pred.to(dtype).requires_grad_()
    peak = peak_bytes(lambda: torch.autograd.grad(module(leaf, *others), leaf), leaf.device)
    assert peak <= 1.05 * leaf.nbytes
    assert peak_bytes(lambda: module(leaf.detach(), *others), leaf.device) <= 0.05 * leaf.nbytes
