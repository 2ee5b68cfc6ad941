"""The C backend against plain PyTorch."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from backends import LOSSES, TOLERANCE, assert_backends_agree, batch, needs_library

from ghm_d2.kernels import cpu
from ghm_d2.losses import GHMC, GHMR, GradientDensity, SoftmaxGHMC, bce_loss, focal_loss
from ghm_d2.losses.density.gradient_density import EMA_INITS, NORMALIZERS, SCOPES

DTYPES = list(TOLERANCE)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", LOSSES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(0, 4), (1, 1), (5, 3), (257, 80), (1025, 1), (3, 1500), (2000, 81)]
)
def test_backends_agree(samples, rows, columns, dtype):
    assert_backends_agree(samples, [batch(samples, rows, columns, dtype)], momentum=0.75)


@needs_library
@pytest.mark.parametrize("samples", LOSSES)
@pytest.mark.parametrize("bins", [1, 3, 30, 1000])
def test_backends_agree_for_any_number_of_regions(samples, bins):
    assert_backends_agree(samples, [batch(samples, 500, 6)], bins=bins)


@needs_library
@pytest.mark.parametrize("samples", ["sigmoid", "asl1"])
@pytest.mark.parametrize("scope", SCOPES)
def test_backends_agree_over_levels(samples, scope):
    levels = [batch(samples, rows, 8, seed=rows) for rows in (900, 200, 0, 7)]
    assert_backends_agree(samples, levels, steps=3, scope=scope, num_levels=4)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (5, 3), (257, 80), (9000, 7), (3, 1500)])
def test_backends_agree_on_densities_of_classes(rows, columns, dtype):
    level = batch("sigmoid", rows, columns, dtype)
    make = functools.partial(GHMC.robust, num_classes=columns)
    assert_backends_agree("sigmoid", [level, level], make=make)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", LOSSES)
def test_backends_agree_on_the_robust_form(samples, dtype):
    """GHM-R's mu is that of the data from the second step."""
    level, make = batch(samples, 300, 6, dtype), LOSSES[samples].robust
    assert_backends_agree(samples, [level], steps=3, make=make, prior=0.7)


@needs_library
@pytest.mark.parametrize("samples", LOSSES)
@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e3])
def test_backends_agree_on_logits_of_any_size(samples, spread):
    assert_backends_agree(samples, [batch(samples, 400, 5, spread=spread)])


@needs_library
@pytest.mark.parametrize("samples", LOSSES)
@pytest.mark.parametrize("layout", ["transposed", "every_second", "expanded"])
def test_backends_agree_on_tensors_that_are_not_contiguous(samples, layout):
    pred, *others = batch(samples, 300, 6)
    if layout == "transposed":
        pred = pred.t().contiguous().t()
    elif layout == "every_second":
        pred = torch.stack([pred, pred], dim=2).flatten(1)[:, ::2]
    else:
        pred = pred[:1].expand(300, -1)
    assert not pred.is_contiguous()
    assert_backends_agree(samples, [[pred, *others]])


@needs_library
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("samples", LOSSES)
def test_what_is_not_finite_gives_nan_and_is_counted(samples, bad):
    level = batch(samples, 50, 4)
    if samples == "asl1":
        level[1:] = [torch.zeros(50, 4), torch.ones(50, 4, dtype=torch.bool)]
    else:
        level[1] = torch.zeros(50, dtype=torch.int64)
    level[0][3, 2] = bad
    if samples == "softmax" and bad < 0:
        level[0][3] = bad  # of a few logits it is a probability of 0
    module = LOSSES[samples](kernel="c", momentum=0.5)
    assert module(*level).isnan()
    assert 2 * module.density.ema.sum() == (50 if samples == "softmax" else 200)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.5), (1.0, 5.0), (-1, 0.0)])
@pytest.mark.parametrize("spread", [0.1, 5.0, 50.0])
def test_focal_loss_is_the_papers(alpha, gamma, spread, dtype):
    logits, labels = batch("sigmoid", 700, 9, dtype, spread=spread)
    mine, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = focal_loss(mine, labels, alpha, gamma, "sum", kernel="c")
    exact = focal_of_the_paper(theirs, labels, alpha, gamma)
    torch.testing.assert_close(loss.double(), exact, rtol=TOLERANCE[dtype], atol=0)
    (3 * loss).backward()
    (3 * exact).backward()
    largest = theirs.grad.abs().max().item()
    torch.testing.assert_close(
        mine.grad.double(), theirs.grad, rtol=1e-4, atol=TOLERANCE[dtype] * largest
    )


def focal_of_the_paper(logits, labels, alpha, gamma):
    """The sum of -alpha_t (1 - p_t)^gamma log(p_t) (arXiv 1708.02002, equation 5)."""
    valid = labels >= 0
    is_class = F.one_hot(labels[valid], 10)[:, :-1].bool()
    signed = torch.where(is_class, logits[valid], -logits[valid])
    factor = torch.where(is_class, alpha, 1 - alpha) if alpha >= 0 else 1
    return (factor * (-signed).sigmoid() ** gamma * -F.logsigmoid(signed)).sum()


@needs_library
@pytest.mark.parametrize("loss", ["bce", "focal", *LOSSES])
def test_gradcheck(loss):
    """In float64, far from the regions' edges for the step of the difference quotient."""
    samples = loss if loss in LOSSES else "sigmoid"
    pred, *others = batch(samples, 12, 3, torch.float64, spread=1.5)
    if loss == "asl1":
        others[0] = others[0].nan_to_num(0.0)
    module = LOSSES[samples](kernel="c", bins=4, momentum=0.0).double()
    function = {"bce": bce_loss, "focal": focal_loss}.get(loss, module)
    leaf = pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, *others), leaf, eps=1e-7, atol=1e-6)


@needs_library
def test_a_graph_may_be_walked_twice_and_what_it_needs_not_changed():
    logits, labels = batch("sigmoid", 20, 3)
    leaf = logits.requires_grad_()
    x = leaf * 1
    loss = GHMC(kernel="c")(x, labels)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    x.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_library
@pytest.mark.parametrize("ema_init", EMA_INITS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("scope", [*SCOPES, "batch with a prior"])
@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_densities_agree(scope, normalizer, ema_init, momentum, library):
    scope, _, prior = scope.partition(" ")
    options = {"scope": scope, "normalizer": normalizer, "ema_init": ema_init, "num_levels": 3}
    options["prior"] = 3.3 if prior else 0.0
    compiled, plain = (GradientDensity(7, momentum, **options) for _ in range(2))
    built = cpu._library()
    for step in range(6):
        counts = torch.randint(-40, 60, (3, 7), generator=torch.Generator().manual_seed(step))
        counts, foreground = counts.clamp(min=0) * (step != 4), torch.tensor(11 * step)
        for density in (compiled, plain):
            density.train(step not in (0, 3))
        mine = compiled(counts, foreground=foreground)
        library(None)
        expected = plain(counts, foreground=foreground)
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0)
        library(built)
        torch.testing.assert_close(compiled.state_dict(), plain.state_dict(), rtol=1e-6, atol=0)


def test_tensors_that_do_not_belong_together_are_refused():
    logits, labels = torch.zeros(6, 3), torch.zeros(6, dtype=torch.int64)
    others = labels[:5], labels[0], labels[:, None].expand(6, 4), labels.to("meta"), labels.float()
    for wrong in others:
        for loss in (GHMC(), SoftmaxGHMC(), bce_loss, focal_loss):
            with pytest.raises(ValueError):
                loss(logits, wrong)
    for wrong in (torch.zeros(5, 4), torch.zeros(6, 3), torch.zeros(6)):
        with pytest.raises(ValueError):
            GHMR()(torch.zeros(6, 4), wrong)
    with pytest.raises(ValueError, match="kernel must be one of auto, torch, c, triton"):
        GHMC(kernel="cuda")
    with pytest.raises(ValueError, match="kernel must be one of"):
        bce_loss(logits, labels, kernel="cuda")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_labels_and_targets_may_be_any_integers(dtype):
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 2
    for loss in (GHMC(momentum=0.0), SoftmaxGHMC(momentum=0.0), bce_loss, focal_loss):
        assert torch.equal(loss(logits, labels.to(dtype)), loss(logits, labels))
    target = labels[:, None].expand(40, 3)
    module = GHMR(momentum=0.0)
    if dtype != torch.bool:
        assert torch.equal(module(logits, target.to(dtype)), module(logits, target.float()))


def test_levels_of_several_sorts_are_all_computed_alike():
    """Precisions, and targets that want a gradient."""
    levels = [batch("asl1", 30, 4, seed=seed) for seed in (1, 2)]
    double = [[t.double() if t.is_floating_point() else t for t in levels[1]], levels[1]]
    wanted = [levels[0], [levels[1][0], levels[1][1].nan_to_num().requires_grad_(), levels[1][2]]]
    mixed = [levels[0], [levels[1][0].double(), *levels[1][1:]]]
    for given in (double, wanted, mixed):
        results = []
        for kernel in ("auto", "torch"):
            losses = GHMR(kernel=kernel).levels(*zip(*given, strict=True))
            results.append([loss.double() for loss in losses])
        torch.testing.assert_close(*results, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(GHMR().levels(*zip(*wanted, strict=True))[1], wanted[1][1])
    assert gradient.abs().sum() > 0


@needs_library
@pytest.mark.parametrize("wrong", ["bins", "dtype", "device"])
def test_densities_take_no_other_counts_than_theirs(wrong):
    density, counts = GradientDensity(5, 0.5), torch.ones(1, 5, dtype=torch.int64)
    if wrong == "bins":
        with pytest.raises(ValueError, match="counts must be"):
            density(torch.ones(1, 9, dtype=torch.int64))
    elif wrong == "dtype":
        expected = GradientDensity(5, 0.5)(counts)
        torch.testing.assert_close(density(counts.to(torch.int32)), expected)
    else:
        with pytest.raises(RuntimeError):
            density(counts.to("meta"))


@needs_library
def test_a_gradient_that_is_to_be_differentiated_is_refused():
    logits, labels = batch("sigmoid", 20, 3)
    for loss in (GHMC(), bce_loss, focal_loss):
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, labels), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="kernel='torch'"):
            gradient.sum().backward()
    (gradient,) = torch.autograd.grad(
        bce_loss(leaf, labels, kernel="torch"), leaf, create_graph=True
    )
    assert gradient.requires_grad


@pytest.mark.parametrize("samples", LOSSES)
def test_transforms_of_functions_take_plain_pytorch(samples):
    level = batch(samples, 20, 3)
    if samples == "asl1":
        level[1] = level[1].nan_to_num()
    module = LOSSES[samples](momentum=0.0, kernel="torch")
    leaf = level[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf, *level[1:]), leaf)
    mine = torch.func.grad(lambda x: module(x, *level[1:]))(level[0])
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)


@needs_library
def test_an_average_of_nearly_no_movement_is_exact():
    density = GradientDensity(2, 0.99999).double()
    for _ in range(3):
        density(torch.tensor([[1000, 0]]))
    assert density.ema[0, 0].item() == pytest.approx(1000 * (1 - 0.99999**3), rel=1e-9)


@needs_library
def test_focal_loss_hides_no_nan_behind_a_factor_of_zero():
    logits = torch.tensor([[math.nan, 0.0]])
    assert focal_loss(logits, torch.tensor([2]), alpha=1.0, kernel="c").isnan()
    assert focal_loss(logits, torch.tensor([-1]), alpha=1.0, reduction="sum", kernel="c") == 0


def test_labels_beyond_the_classes_read_nothing_beyond():
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 4, 2**62, -1, -(2**62), 2, 1])
    background = torch.where((labels < 0) | (labels > 3), labels.clamp(-1, 3), labels)
    assert torch.equal(GHMC()(logits, labels), GHMC()(logits, background))
    assert torch.equal(focal_loss(logits, labels), focal_loss(logits, background))
    assert SoftmaxGHMC()(logits, labels).isfinite()
