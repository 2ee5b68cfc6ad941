"""The shapes, targets, weights and labels that the classification losses take."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ghm_d2.losses import (
    GHMC,
    GHMR,
    SoftmaxGHMC,
    bce_loss,
    focal_loss,
    ghm_c_loss,
    ghm_r_loss,
    softmax_ce_loss,
)

K = 4


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(rows=40, columns=K, seed=0):
    logits = 2 * torch.randn(rows, columns, generator=random(seed), dtype=torch.float64)
    labels = torch.randint(-1, K + 1, (rows,), generator=random(seed + 1))
    return logits.requires_grad_(), labels


def one_hot(labels):
    dense = F.one_hot(labels.clamp(min=0), K + 1)[:, :-1].double()
    return torch.where(labels[:, None] < 0, -1.0, dense)


def ghm(logits, target, **options):
    return GHMC(bins=10, momentum=0.0, **options).double()(logits, target)


SIGMOID = {"ghm": ghm, "bce": bce_loss, "focal": focal_loss}
every_loss = pytest.mark.parametrize("loss", SIGMOID.values(), ids=SIGMOID)


def assert_same(mine, expected, logits):
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=0)
    a, b = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (mine, expected))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_targets_of_each_logit_say_the_same_as_labels(loss, reduction):
    logits, labels = batch()
    mine = loss(logits, one_hot(labels), reduction=reduction)
    assert_same(mine, loss(logits, labels, reduction=reduction), logits)


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_pixels_are_rows(loss, reduction):
    logits, labels = batch(24)
    image = logits.view(2, 3, 4, K).movedim(-1, 1)  # (N, C, H, W)
    mine = loss(image, labels.view(2, 3, 4), reduction=reduction)
    expected = loss(logits, labels, reduction=reduction)
    if reduction == "none":
        assert mine.shape == image.shape
        mine = mine.movedim(1, -1).reshape(24, K)
    assert_same(mine, expected, logits)
    dense = one_hot(labels).view(2, 3, 4, K).movedim(-1, 1)
    torch.testing.assert_close(loss(image, dense), loss(logits, labels))


@every_loss
def test_one_class_needs_no_second_dimension(loss):
    logits, _ = batch(30, 1)
    truth = torch.rand(30, generator=random()) < 0.3
    background = torch.where(truth, 0, 1)
    for target in (truth, truth.int(), truth.double()):
        assert_same(loss(logits[:, 0], target), loss(logits, background), logits)
    assert loss(logits[:, 0], truth, reduction="none").shape == (30,)


@every_loss
def test_sum_is_the_mean_times_the_valid_samples_and_none_its_terms(loss):
    logits, labels = batch()
    samples = (labels >= 0).sum() * K
    each = loss(logits, labels, reduction="none")
    assert not each[labels < 0].any()
    assert_same(each.sum() / samples, loss(logits, labels), logits)
    assert_same(loss(logits, labels, reduction="sum") / samples, loss(logits, labels), logits)


def test_soft_targets_of_cross_entropy_are_pytorchs():
    logits, _ = batch()
    target = torch.rand(40, K, generator=random(3), dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(logits, target)
    assert_same(bce_loss(logits, target), expected, logits)
    target = target / target.sum(1, keepdim=True)
    assert_same(softmax_ce_loss(logits, target), F.cross_entropy(logits, target), logits)


def test_soft_targets_of_ghm_are_weighed_by_the_distance_from_them():
    logits, _ = batch()
    target = torch.rand(40, K, generator=random(3), dtype=torch.float64)
    region = ((logits.sigmoid() - target).abs() * 10).long().clamp(max=9)
    counts = torch.bincount(region.flatten(), minlength=10)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    expected = (each / counts[region]).sum() / (counts > 0).sum()
    assert_same(ghm(logits, target), expected, logits)
    soft = target / target.sum(1, keepdim=True)
    region = ((logits.softmax(1) - soft).abs().sum(1) * 5).long().clamp(max=9)
    counts = torch.bincount(region, minlength=10)
    each = F.cross_entropy(logits, soft, reduction="none")
    expected = (each / counts[region]).sum() / (counts > 0).sum()
    module = SoftmaxGHMC(bins=10, momentum=0.0).double()
    assert_same(module(logits, soft), expected, logits)


@pytest.mark.parametrize("name", [*SIGMOID, "softmax", "softmax ghm"])
def test_weights_are_factors_and_what_weighs_nothing_is_not_counted(name):
    logits, labels = batch(40, K + ("softmax" in name))
    loss = {
        **SIGMOID,
        "softmax": softmax_ce_loss,
        "softmax ghm": lambda *x, reduction="mean", weight=None: SoftmaxGHMC(
            momentum=0.0, reduction=reduction
        ).double()(*x, weight=weight),
    }[name]
    if name == "ghm":
        loss = lambda *x, reduction="mean", weight=None: (  # noqa: E731
            GHMC(momentum=0.0, reduction=reduction).double()(*x, weight=weight)
        )
    weight = torch.rand(40, generator=random(5), dtype=torch.float64)
    weight[::3] = 0
    ignored = torch.where(weight > 0, labels, -1)
    each = loss(logits, ignored, reduction="none")
    factor = weight[:, None] if each.dim() > 1 else weight
    assert_same(loss(logits, labels, weight=weight, reduction="none"), each * factor, logits)
    valid = (ignored >= 0).sum() * (1 if each.dim() == 1 else K)
    assert_same(loss(logits, labels, weight=weight), (each * factor).sum() / valid, logits)


def test_weights_of_boxes():
    pred = torch.randn(20, 4, generator=random(), dtype=torch.float64).requires_grad_()
    target = torch.zeros_like(pred)
    weight = torch.rand(20, generator=random(1), dtype=torch.float64)
    weight[:5] = 0
    options = {"mu": 0.5, "momentum": 0.0, "reduction": "none"}
    each = GHMR(**options).double()(pred, target, weight > 0)
    weighed = GHMR(**options).double()(pred, target, weight=weight)
    assert each.shape == pred.shape
    assert_same(weighed, each * weight[:, None], pred)
    total = ghm_r_loss(pred, target, weight > 0, mu=0.5, reduction="sum")
    torch.testing.assert_close(total, each.sum().to(total))


@pytest.mark.parametrize("columns", [K, K + 1])
def test_another_label_to_be_ignored(columns):
    logits, labels = batch(40, columns)
    void = torch.where(labels < 0, 255, labels)
    if columns == K:
        for loss in (bce_loss, focal_loss):
            assert_same(loss(logits, void, ignore_index=255), loss(logits, labels), logits)
    else:
        assert_same(
            softmax_ce_loss(logits, void, ignore_index=255), softmax_ce_loss(logits, labels), logits
        )
    module = GHMC if columns == K else SoftmaxGHMC
    mine = module(momentum=0.0, ignore_index=255).double()(logits, void)
    assert_same(mine, module(momentum=0.0).double()(logits, labels), logits)


@pytest.mark.parametrize("wrong", [K + 1, 255, -2])
def test_labels_out_of_range_are_an_error_where_they_are_checked(wrong):
    logits, labels = batch()
    labels[7] = wrong
    words = rf"labels must lie in \[-1, {K}\], not in .*{wrong}.*ignore_index"
    for loss in (bce_loss, focal_loss, lambda *x, **o: GHMC(**o)(*x)):
        assert loss(logits, labels).isfinite()
        with pytest.raises(ValueError, match=words):
            loss(logits, labels, check_labels=True)
    logits, labels = batch(40, K + 1)
    assert SoftmaxGHMC(check_labels=True)(logits, labels).isfinite()
    labels[7] = wrong
    for loss in (softmax_ce_loss, lambda *x, **o: SoftmaxGHMC(**o)(*x)):
        with pytest.raises(ValueError, match=words):
            loss(logits, labels, check_labels=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
def test_labels_of_any_integers(dtype):
    logits, labels = batch(40, K + 1)
    small = labels.clamp(min=0)
    for loss in (bce_loss, focal_loss, softmax_ce_loss):
        for reduction in ("mean", "none"):
            mine = loss(logits, small.to(dtype), reduction=reduction)
            assert torch.equal(mine, loss(logits, small, reduction=reduction))


def test_numbers_of_numpy_are_numbers():
    module = GHMC(bins=np.int64(10), momentum=np.float32(0.5), loss_weight=np.float64(2))
    assert GHMR(mu=np.float32(0.25)).mu == 0.25
    expected = GHMC(bins=10, momentum=0.5, loss_weight=2.0)
    logits, labels = batch()
    assert torch.equal(module(logits, labels), expected(logits, labels))


def test_functions_are_modules_without_an_average():
    logits, labels = batch()
    for _ in range(2):
        mine = ghm_c_loss(logits, labels, bins=10)
        torch.testing.assert_close(mine, ghm(logits, labels), rtol=1e-6, atol=0)


def test_what_was_counted_and_weighed_last_can_be_logged():
    logits, labels = batch()
    module = GHMC(bins=10, momentum=0.5).double()
    module(logits, labels)
    counts, weights = module.density.last_counts, module.density.last_weights
    assert counts.sum() == K * (labels >= 0).sum() and counts.shape == weights.shape == (1, 10)
    expected = 2 / (counts[counts > 0] * (counts > 0).sum())
    torch.testing.assert_close(weights[counts > 0], expected.double())


def test_a_compiled_kernel_that_cannot_do_it_says_so():
    logits, labels = batch()
    with pytest.raises(RuntimeError, match="supports only integer labels"):
        bce_loss(logits, one_hot(labels), kernel="c")
    with pytest.raises(RuntimeError, match="supports only integer labels"):
        bce_loss(logits, labels, weight=torch.ones(40), kernel="c")


@pytest.mark.parametrize("kernel", ["c", "torch"])
def test_a_target_of_more_precision_is_not_rounded(kernel):
    pred = torch.zeros(3, 4, requires_grad=True)
    target = torch.full((3, 4), 1 + 1e-12, dtype=torch.float64)
    loss = GHMR(mu=1e-6, momentum=0.0, kernel=kernel).double()(pred, target)
    assert loss.item() == pytest.approx(math.hypot(1 + 1e-12, 1e-6) - 1e-6, abs=2e-13)
    loss.backward()
    assert pred.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("logits", "target"),
    [((5, 4), (4, 5)), ((5,), (4,)), ((2, 4, 3, 3), (2, 3, 4)), ((5, 4, 3), (5, 4))],
)
def test_shapes_that_do_not_belong_together_are_named(logits, target):
    with pytest.raises(ValueError, match="targets of the same shape"):
        bce_loss(torch.zeros(logits), torch.zeros(target, dtype=torch.int64))


def test_the_loss_may_be_changed_in_place():
    logits, labels = batch()
    for loss in (GHMC(), bce_loss, focal_loss):
        value = loss(logits, labels)
        value *= 2
        value += 1
        value.backward()


@pytest.mark.parametrize("margin", [-3.3672957, -2.1972246, 1.3862944])
def test_single_losses_are_weighed_as_they_were_counted(margin):
    """Norms on the edge of a region, which two kernels round to different sides."""
    logits = torch.tensor([[0.0, margin]]).repeat(20, 1)
    labels = torch.zeros(20, dtype=torch.int64)
    for make in (SoftmaxGHMC, GHMC):
        for bins in (10, 30):
            each = make(bins=bins, momentum=0.0, reduction="none")(logits, labels)
            total = make(bins=bins, momentum=0.0, reduction="sum")(logits, labels)
            torch.testing.assert_close(each.sum(), total, rtol=1e-4, atol=0)


@every_loss
def test_integer_targets_of_each_logit_may_have_a_value_to_be_ignored(loss):
    logits, labels = batch()
    dense = one_hot(labels)
    small = torch.where(dense < 0, 255, dense).to(torch.uint8)
    assert_same(loss(logits, small, ignore_index=255), loss(logits, dense), logits)


@pytest.mark.parametrize("make", [GHMC.robust, SoftmaxGHMC.robust])
def test_what_weighs_nothing_is_no_foreground(make):
    logits, labels = batch(40, K + (make == SoftmaxGHMC.robust))
    weight = torch.ones(40)
    weight[::2] = 0
    mine, expected = make(), make()
    expected.density.kernel = "torch"
    loss = mine(logits, labels, weight)
    torch.testing.assert_close(loss, expected(logits, torch.where(weight > 0, labels, -1)))
    assert torch.equal(mine.density.ema_foreground, expected.density.ema_foreground)


def test_what_weighs_nothing_moves_no_mu():
    pred = torch.randn(20, 4, generator=random())
    weight = torch.ones(20)
    weight[:10], pred[:10] = 0, 100.0
    mine, expected = GHMR.robust(), GHMR.robust()
    for module, words in ((mine, {"weight": weight}), (expected, {"valid": weight > 0})):
        module(pred, torch.zeros(20, 4), **words)
    assert mine.mu == expected.mu < 10


def test_a_negative_label_to_be_ignored_is_known():
    logits, labels = batch()
    pytorchs = torch.where(labels < 0, -100, labels)
    mine = bce_loss(logits, pytorchs, ignore_index=-100, check_labels=True)
    assert_same(mine, bce_loss(logits, labels), logits)


def test_no_rows_of_pixels():
    logits, labels = torch.zeros(0, K, 2, 2), torch.zeros(0, 2, 2, dtype=torch.int64)
    assert bce_loss(logits, labels, "none").shape == logits.shape
    assert softmax_ce_loss(logits, labels, "none").shape == labels.shape


@pytest.mark.parametrize("loss", [bce_loss, focal_loss, softmax_ce_loss])
def test_an_unknown_kernel_or_shape_is_named_whatever_else_is_asked(loss):
    logits, labels = batch()
    with pytest.raises(ValueError, match="kernel must be one of"):
        loss(logits, labels, reduction="none", kernel="bogus")
    with pytest.raises(ValueError, match="of the same shape"):
        loss(logits[:, 0], labels[:5])
    with pytest.raises(RuntimeError, match="supports only integer labels"):
        loss(logits, labels, weight=torch.ones(40), kernel="c")
