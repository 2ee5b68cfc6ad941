"""Authentic smooth L1."""

import math

import pytest
import torch

from ghm_d2.losses import ASL1, asl1_loss


def pairs(generator=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    pred = 3 * torch.randn(25, 4, generator=generator, dtype=dtype)
    return pred.requires_grad_(), torch.randn(25, 4, generator=generator, dtype=dtype)


@pytest.mark.parametrize("mu", [1e-3, 0.02, 1.0])
def test_equation_9(mu):
    pred, target = pairs()
    loss = asl1_loss(pred, target, mu)
    for i, j in torch.cartesian_prod(torch.arange(25), torch.arange(4)).tolist():
        d = pred[i, j].item() - target[i, j].item()
        assert loss[i, j].item() == pytest.approx(math.sqrt(d * d + mu * mu) - mu, rel=1e-9)
    assert torch.autograd.gradcheck(lambda p, t: asl1_loss(p, t, mu), (pred, target))


def test_limits_are_quadratic_and_linear():
    small, large = torch.tensor([1e-5]), torch.tensor([1e4])
    zero = torch.zeros(1)
    assert asl1_loss(small, zero, 0.02).item() == pytest.approx(1e-10 / 0.04, rel=1e-5)
    assert asl1_loss(large, zero, 0.02).item() == pytest.approx(1e4 - 0.02, rel=1e-6)
    assert asl1_loss(zero, zero, 0.02).item() == 0


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_and_module(reduction):
    pred, target = pairs()
    elements = ((pred - target) ** 2 + 0.25).sqrt() - 0.5
    expected = elements if reduction == "none" else getattr(elements, reduction)()
    torch.testing.assert_close(asl1_loss(pred, target, 0.5, reduction), expected)
    torch.testing.assert_close(ASL1(0.5, reduction)(pred, target), expected)
    assert "0.5" in repr(ASL1(0.5, reduction)) and reduction in repr(ASL1(0.5, reduction))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    pred, target = (x.detach().to(dtype) for x in pairs())
    loss = asl1_loss(pred.requires_grad_(), target, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, asl1_loss(pred.float(), target.float(), reduction="sum"))
    loss.backward()
    assert pred.grad.dtype == dtype


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_nothing_is_zero_with_a_graph(reduction):
    pred = torch.zeros(0, 4, requires_grad=True)
    loss = asl1_loss(pred, torch.zeros(0, 4), reduction=reduction)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_is_nan(bad):
    loss = asl1_loss(torch.tensor([bad, 1.0]), torch.zeros(2))
    assert loss[0].isnan() and loss[1].isfinite()


@pytest.mark.parametrize("mu", [0, -1.0, math.inf, math.nan])
def test_mu_out_of_range(mu):
    for build in (ASL1, lambda mu: asl1_loss(torch.zeros(1), torch.zeros(1), mu)):
        with pytest.raises(ValueError, match=f"mu must be finite and greater than 0, not {mu}"):
            build(mu)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="'median'"):
        asl1_loss(torch.zeros(1), torch.zeros(1), reduction="median")
