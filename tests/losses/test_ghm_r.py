"""GHM-R."""

import math

import pytest
import torch
from device_route import never_waiting
from loss_oracles import Density, asl1_samples, assert_oracle, harmonized

from ghm_d2.losses import GHMR, asl1_loss
from ghm_d2.losses.density.gradient_density import EMA_INITS, NORMALIZERS, SCOPES

MU = 0.02
SIZES = (20, 6, 2)  # boxes of three feature levels


def batch(rows, generator, dtype=torch.float64):
    """Deltas from far below mu to far above it, and a mask that is per coordinate."""
    target = torch.randn(rows, 4, generator=generator, dtype=dtype)
    scale = 10 ** (4 * torch.rand(rows, 4, generator=generator, dtype=dtype) - 3)
    pred = target + scale * torch.randn(rows, 4, generator=generator, dtype=dtype)
    valid = torch.rand(rows, 4, generator=generator) < 0.7
    return pred.requires_grad_(), target, valid


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("ema_init", EMA_INITS)
def test_levels_against_the_paper(scope, normalizer, ema_init, momentum):
    generator = torch.Generator().manual_seed(1)
    options = {"scope": scope, "normalizer": normalizer, "ema_init": ema_init}
    module = GHMR(mu=MU, bins=10, momentum=momentum, num_levels=3, **options).double()
    oracle = Density(10, momentum, levels=3, **options)
    for step in range(4):
        training = step != 2
        batches = [batch(rows, generator) for rows in SIZES]
        samples = [asl1_samples(p.tolist(), t.tolist(), v.tolist(), MU) for p, t, v in batches]
        pred, target, valid = zip(*batches, strict=True)
        losses = module.train(training).levels(pred, target, valid)
        expected = harmonized(samples, oracle, training)
        assert_oracle(pred, losses, expected)


@pytest.mark.parametrize("mu", [1e-3, 0.02, 2.0])
def test_one_region_is_the_mean_asl1(mu):
    pred, target, valid = batch(30, torch.Generator().manual_seed(2))
    loss = GHMR(mu=mu, bins=1, momentum=0.0).double()(pred, target, valid)
    expected = ((pred - target)[valid] ** 2 + mu**2).sqrt().sub(mu).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    free = asl1_loss(pred, target, mu)[valid].mean()
    torch.testing.assert_close(loss, free, rtol=1e-13, atol=0)


def test_valid_by_box_by_coordinate_and_none():
    pred, target, _ = batch(30, torch.Generator().manual_seed(3))
    rows = torch.rand(30, generator=torch.Generator().manual_seed(4)) < 0.5

    def loss(*arguments):
        return GHMR().double()(*arguments)

    kept = loss(pred[rows], target[rows])
    torch.testing.assert_close(loss(pred, target, rows), kept)
    torch.testing.assert_close(loss(pred, target, rows[:, None].expand(-1, 4)), kept)
    everything = loss(pred, target)
    torch.testing.assert_close(loss(pred, target, torch.ones(30, dtype=torch.bool)), everything)
    assert not torch.isclose(everything, kept)


def test_scope_batch_is_the_concatenated_input():
    generator = torch.Generator().manual_seed(5)
    levels, whole = GHMR(scope="batch", num_levels=3).double(), GHMR().double()
    for _ in range(3):
        parts = list(zip(*(batch(rows, generator) for rows in SIZES), strict=True))
        together = whole(*(torch.cat(p) for p in parts))
        torch.testing.assert_close(sum(levels.levels(*parts)), together, rtol=1e-13, atol=0)


def test_debias_and_first_begin_as_without_an_average():
    inputs = batch(30, torch.Generator().manual_seed(6))
    expected = GHMR(momentum=0.0).double()(*inputs)
    for ema_init in ("debias", "first"):
        loss = GHMR(momentum=0.7, ema_init=ema_init).double()(*inputs)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    zero = GHMR(momentum=0.75, ema_init="zero").double()(*inputs)
    torch.testing.assert_close(zero, 4 * expected, rtol=1e-13, atol=0)


def test_outliers_are_turned_down_and_easy_boxes_too():
    """GHM-R gives the many easy and the many outlying boxes less weight, the few others more."""
    d = torch.cat([torch.full((90,), 1e-4), torch.full((4,), 0.015), torch.full((6,), 5.0)])
    pred = d[:, None].repeat(1, 4).requires_grad_()
    loss = GHMR(momentum=0.0)(pred, torch.zeros_like(pred))
    (harmonised,) = torch.autograd.grad(loss, pred)
    (ordinary,) = torch.autograd.grad(asl1_loss(pred, torch.zeros_like(pred), MU, "mean"), pred)
    share = (harmonised / harmonised.sum())[:, 0] / (ordinary / ordinary.sum())[:, 0]
    assert share[92] > 1 > share[97] > share[0]


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_gradcheck(momentum):
    pred, target, valid = batch(8, torch.Generator().manual_seed(7))
    module = GHMR(mu=0.3, bins=5, momentum=momentum).double()
    module(pred, target, valid)
    assert torch.autograd.gradcheck(module.eval(), (pred, target, valid), eps=1e-7, atol=1e-6)


def test_gradient_at_a_perfect_box_is_zero():
    pred = torch.zeros(3, 4, requires_grad=True)
    GHMR()(pred, torch.zeros(3, 4)).backward()
    assert torch.equal(pred.grad, torch.zeros(3, 4))


def test_grad_output_and_loss_weight_scale():
    inputs = batch(20, torch.Generator().manual_seed(8))
    loss = GHMR(momentum=0.0).double()(*inputs)
    (once,) = torch.autograd.grad(loss, inputs[0], retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, inputs[0], torch.tensor(-2.5, dtype=loss.dtype))
    torch.testing.assert_close(scaled, -2.5 * once)
    weighted = GHMR(momentum=0.0, loss_weight=10.0).double()(*inputs)
    torch.testing.assert_close(weighted, 10 * loss)


def test_layout_does_not_matter():
    pred, target, valid = batch(20, torch.Generator().manual_seed(9))
    expected = GHMR().double()(pred, target, valid)
    (gradient,) = torch.autograd.grad(expected, pred)
    x = pred.detach().t().contiguous().t().requires_grad_()
    y = torch.stack([target] * 2, dim=2)[..., 1]
    assert not x.is_contiguous() and not y.is_contiguous()
    loss = GHMR().double()(x, y, valid.t().contiguous().t())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], gradient)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-6), (torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
)
def test_precision(dtype, tolerance):
    pred, target, valid = batch(1000, torch.Generator().manual_seed(10))
    low, low_target = pred.detach().to(dtype).requires_grad_(), target.to(dtype)
    exact = low.detach().double().requires_grad_()
    loss = GHMR(momentum=0.0)(low, low_target, valid)
    expected = GHMR(momentum=0.0).double()(exact, low_target.double(), valid)
    assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(
        expected.item(), rel=1e-6 if dtype == torch.float64 else 1e-3
    )
    loss.backward()
    expected.backward()
    assert low.grad.dtype == dtype
    close = torch.isclose(low.grad.double(), exact.grad, rtol=tolerance, atol=1e-7)
    assert close.double().mean() > 0.99


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("rows", [0, 20])
def test_batches_without_a_valid_box(momentum, rows):
    pred = torch.randn(rows, 4, requires_grad=True)
    module = GHMR(momentum=momentum)
    loss = module(pred, torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(pred.grad, torch.zeros(rows, 4))
    assert not module.density.ema.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["pred", "target"])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_numbers_that_are_not_finite_give_nan(bad, which, momentum):
    pred, target, valid = batch(20, torch.Generator().manual_seed(11), torch.float32)
    valid[5, 2] = True
    with torch.no_grad():
        (pred if which == "pred" else target)[5, 2] = bad
    loss = GHMR(momentum=momentum)(pred, target, valid)
    loss.backward()
    assert loss.isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_invalid_boxes_may_hold_anything(bad):
    pred, target, valid = batch(20, torch.Generator().manual_seed(12))
    valid[[3, 7]] = False
    clean, dirty = GHMR().double(), GHMR().double()
    expected = clean(pred, target, valid)
    (gradient,) = torch.autograd.grad(expected, pred)
    spoilt, spoilt_target = pred.detach().clone(), target.clone()
    spoilt[3] = bad
    spoilt_target[7] = bad
    loss = dirty(spoilt.requires_grad_(), spoilt_target, valid)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(spoilt.grad, gradient)
    assert torch.equal(dirty.density.ema, clean.density.ema)


def test_huge_and_tiny_differences_are_finite_and_exact():
    d = torch.tensor([[1e30, -1e30, 1e-30, -3e-8]])
    pred = d.clone().requires_grad_()
    GHMR(momentum=0.0)(pred, torch.zeros_like(pred)).backward()
    assert pred.grad.isfinite().all()
    loss = asl1_loss(d, torch.zeros_like(d), MU)
    expected = [math.hypot(v, MU) - MU if abs(v) > 1 else v * v / (2 * MU) for v in d[0].tolist()]
    assert loss[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_evaluation_does_not_update_and_state_dict_continues():
    generator = torch.Generator().manual_seed(13)
    module, resumed = GHMR(), GHMR()
    module(*batch(20, generator, torch.float32))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module.eval()(*batch(20, generator, torch.float32))
    assert before and all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    resumed.load_state_dict(before)
    inputs = batch(20, generator, torch.float32)
    assert torch.equal(module.train()(*inputs), resumed(*inputs))
    assert not torch.equal(module.density.ema, before["density.ema"])


@pytest.mark.parametrize("mu", [0, -0.02, math.inf, math.nan, "0.02", None])
def test_mu_out_of_range(mu):
    with pytest.raises(ValueError, match="mu must be") as error:
        GHMR(mu=mu)
    assert repr(mu) in str(error.value)


@pytest.mark.parametrize("ema_init", EMA_INITS)
@pytest.mark.parametrize("scope", SCOPES)
def test_step_never_waits_for_the_device(ema_init, scope):
    with never_waiting() as device:
        module = GHMR(ema_init=ema_init, scope=scope, num_levels=2).to(device)
        pred = torch.randn(20, 4, device=device, requires_grad=True)
        target = torch.zeros(20, 4, device=device)
        valid = torch.ones(20, dtype=torch.bool, device=device)
        sum(module.levels([pred] * 2, [target] * 2, [valid] * 2)).backward()
        assert pred.grad.shape == pred.shape


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("size", [1e15, 2e34, 1e38])
def test_differences_whose_square_overflows(size, kernel):
    pred = torch.tensor([[size, 0.0, 0.0, 0.0]]).requires_grad_()
    loss = GHMR(bins=1, momentum=0.0, kernel=kernel)(pred, torch.zeros(1, 4))
    assert loss.item() == pytest.approx(size / 4, rel=1e-6)
    loss.backward()
    assert pred.grad[0, 0].item() == pytest.approx(0.25)
