"""The two passes of the Triton kernels, a function at a time."""

import dataclasses
import math

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss
from triton_interpreter import (
    ASL1,
    DEVICE,
    INF,
    NAN,
    SIGMOID,
    SOFTMAX,
    T,
    every_kind,
    generator,
    interpreter,  # noqa: F401
    make_sigmoid,
    make_weights,
    quiet,
    wide,
)

from ghm_d2.kernels import reference

pytestmark = quiet
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
ONE = torch.ones((), device=DEVICE)


def assert_matches(kind, tensors, bins):
    """All passes against the reference; gives what they gave."""
    x = tensors[0]
    weights = make_weights(bins, wide(x).dtype)
    counts, total = kind.counts(tensors, bins), kind.total(tensors, weights)
    gradient = kind.grad(tensors, weights)
    expected_counts, expected_total, expected_gradient = kind.expected(tensors, weights)

    assert counts.dtype == torch.int64 and counts.tolist() == expected_counts.tolist()
    rtol = TOLERANCES[wide(x).dtype]  # inputs have half precision, but not the arithmetic
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, expected_total, rtol=rtol, atol=rtol / 1000)
    assert gradient.dtype == x.dtype and gradient.is_contiguous()
    rtol = TOLERANCES[x.dtype]
    torch.testing.assert_close(wide(gradient), expected_gradient, rtol=rtol, atol=rtol / 10)
    return counts, total, gradient


@every_kind
@every_dtype
def test_sums_and_gradient_are_the_references(kind, dtype):
    counts, _, _ = assert_matches(kind, kind.make(61, 37, 10, dtype), 10)
    assert (counts > 0).all()


@every_kind
@pytest.mark.parametrize(
    ("rows", "columns", "bins"), [(1, 1, 1), (5, 1, 3), (4, 1027, 100), (1031, 2, 30)]
)
def test_any_numbers_of_samples_and_unit_regions(kind, rows, columns, bins):
    assert_matches(kind, kind.make(rows, columns, bins), bins)


@every_kind
def test_any_strides(kind):
    tensors = kind.make(53, 31, 5)
    strided = [t.repeat_interleave(2, t.dim() - 1)[..., ::2] for t in tensors]
    assert not any(t.is_contiguous() for t in strided)
    assert_matches(kind, strided, 5)
    weights = make_weights(10)[::2]
    expected = kind.grad(tensors, weights.contiguous())
    assert torch.equal(kind.grad(tensors, weights), expected)


@every_kind
def test_no_samples_are_zeros_and_no_launch(kind, monkeypatch):
    for name in vars(T):
        if name.endswith("_kernel"):
            monkeypatch.setattr(T, name, None)
    tensors = kind.make(0, 5, 4)
    assert kind.counts(tensors, 4).tolist() == [0] * 4
    assert kind.total(tensors, make_weights(4)) == 0
    assert kind.grad(tensors, make_weights(4)).shape == (0, 5)


@pytest.mark.parametrize("kind", [SIGMOID, SOFTMAX], ids=["sigmoid", "softmax"])
@pytest.mark.parametrize("label", [0, 5, -1, -100])
def test_all_rows_of_one_label(kind, label):
    """5 is the background of the sigmoid, and one past the last column of the softmax."""
    logits, labels = kind.make(30, 5, 1)
    assert_matches(kind, (logits, torch.full_like(labels, label)), 1)


@every_kind
def test_what_is_ignored_may_hold_anything(kind):
    tensors = kind.make(40, 6, 10)
    spoilt = [t.clone() for t in tensors]
    ignored = ~tensors[2] if kind is ASL1 else (tensors[1] < 0)[:, None].expand_as(tensors[0])
    values = torch.tensor([NAN, INF, -INF, 1e30], device=DEVICE, dtype=torch.float64)
    for x in spoilt:
        if x.is_floating_point():
            x[ignored] = values.repeat(x.numel())[: int(ignored.sum())]
    assert_matches(kind, spoilt, 10)
    weights = make_weights(10)
    for run, last in ((kind.counts, 10), (kind.total, weights), (kind.grad, weights)):
        torch.testing.assert_close(run(spoilt, last), run(tensors, last), rtol=0, atol=0)


@every_kind
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_valid_sample_that_is_not_finite_is_nan_alone(kind, value, dtype):
    """Its unit region is the first, so that the counts still add up."""
    x, *rest = kind.make(20, 6, 10, dtype)
    if kind is ASL1:
        rest[1].fill_(True)
    else:
        rest[0].fill_(2)
    spoilt = x.clone()
    spoilt[7, 3] = value
    assert kind.counts((spoilt, *rest), 10).sum() == (20 if kind is SOFTMAX else 120)
    weights = make_weights(10)
    total = kind.total((spoilt, *rest), weights)
    gradient, before = kind.grad((spoilt, *rest), weights), kind.grad((x, *rest), weights)
    if kind is SOFTMAX and value == -INF:  # a probability of 0
        assert total.isfinite() and gradient.isfinite().all() and gradient[7, 3] == 0
        return
    assert total.isnan()
    before[7, slice(None) if kind is SOFTMAX else 3] = NAN
    torch.testing.assert_close(gradient, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("s", [-80.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 40.0, 1e4])
def test_cross_entropy_is_accurate_relative_to_its_value(s):
    expected = max(s, 0) + math.log1p(math.exp(-abs(s)))
    # exp(s) of a device is as accurate as s / log(2) is a float32
    tolerance = 1e-6 + max(-s, 0) * 1e-7
    for label, x in ((0, -s), (1, s)):  # of one class, so that 1 is background
        logits, labels = torch.tensor([[x]], device=DEVICE), torch.tensor([label], device=DEVICE)
        assert SIGMOID.total((logits, labels), ONE[None]).item() == pytest.approx(
            expected, rel=tolerance
        )


def test_a_gradient_norm_of_one_is_in_the_last_region():
    for x, label in ((40.0, 1), (-40.0, 0)):
        logits, labels = torch.tensor([[x]], device=DEVICE), torch.tensor([label], device=DEVICE)
        assert SIGMOID.counts((logits, labels), 30).tolist() == [0] * 29 + [1]
        gradient = SIGMOID.grad((logits, labels), torch.arange(30.0, device=DEVICE))
        assert gradient.item() == pytest.approx(math.copysign(29, x), rel=1e-6)
    logits = torch.tensor([[200.0, -200.0]], device=DEVICE)
    counts = SOFTMAX.counts((logits, torch.tensor([1], device=DEVICE)), 4)
    assert counts.tolist() == [0, 0, 0, 1]
    pred, target = torch.full((1, 4), 1e30, device=DEVICE), torch.zeros(1, 4, device=DEVICE)
    counts = ASL1.counts((pred, target, target == 0), 5)
    assert counts.tolist() == [0, 0, 0, 0, 4]


def test_softmax_does_not_cancel_in_a_sure_row():
    logits = torch.tensor([[30.0, 1.0, 0.5]], device=DEVICE)
    labels = torch.tensor([0], device=DEVICE)
    others = math.exp(-29) + math.exp(-29.5)
    loss = SOFTMAX.total((logits, labels), ONE[None])
    assert loss.item() == pytest.approx(others, rel=1e-5)
    gradient = SOFTMAX.grad((logits, labels), ONE[None])
    expected = torch.tensor([[-others, math.exp(-29), math.exp(-29.5)]], device=DEVICE)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)


def test_softmax_of_a_single_column_is_sure():
    logits = torch.tensor([[3.0], [-1e30]], device=DEVICE)
    labels = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    assert SOFTMAX.counts((logits, labels), 2).tolist() == [2, 0]
    assert SOFTMAX.total((logits, labels), make_weights(2)) == 0
    assert not SOFTMAX.grad((logits, labels), make_weights(2)).any()


@pytest.mark.parametrize("mu", [1e-6, 0.02, 1.0])
@pytest.mark.parametrize("d", [0.0, 1e-12, 1e-7, 1e-3, 1.0, 1e25, -1e30])
def test_asl1_of_any_size(d, mu):
    pred, target = torch.full((1, 1), d, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    kind, tensors = dataclasses.replace(ASL1, params=(mu,)), (pred, target, target == 0)
    loss, gradient = kind.total(tensors, ONE[None]), kind.grad(tensors, ONE[None])
    d, root = pred.item(), math.hypot(pred.item(), mu)
    assert loss.item() == pytest.approx(d * (d / (root + mu)), rel=2e-6)
    assert gradient.item() == pytest.approx(d / root, rel=2e-6)


def test_sums_of_float32_losses_are_not_float32():
    """Integers large enough to be their own softplus; a block's sum of them is still exact."""
    logits = torch.randint(4096, 16384, (20_000, 1), generator=generator(1)).to(DEVICE)
    labels = torch.ones(len(logits), dtype=torch.int64, device=DEVICE)
    loss = SIGMOID.total((logits.float(), labels), ONE[None])
    assert loss.item() == logits.sum().item()


FOCAL = [(0.25, 2.0), (-1, 2), (0.25, 1.5), (0.5, 0.0), (1, 5)]
every_focal = pytest.mark.parametrize(("alpha", "gamma"), FOCAL)


def focal_sum(logits, labels, alpha, gamma):
    return SIGMOID.total((logits, labels), ONE[None], alpha=alpha, gamma=gamma)


def focal_grad(logits, labels, alpha, gamma, scale):
    options = {"alpha": alpha, "gamma": gamma, "scale": scale.item()}
    return SIGMOID.grad((logits, labels), ONE[None], **options)


@every_focal
@every_dtype
def test_focal_loss_is_fvcores(alpha, gamma, dtype):
    """The arithmetic of fvcore's loss is float32."""
    logits, labels = make_sigmoid(40, 23, 10, dtype)
    scale = ONE / 2
    loss = focal_sum(logits, labels, alpha, gamma)
    gradient = focal_grad(logits, labels, alpha, gamma, scale)

    x = wide(logits).requires_grad_()
    target = (labels[:, None] == torch.arange(23, device=DEVICE)).to(x)
    losses = sigmoid_focal_loss(x, target, alpha, gamma)
    expected = losses[labels >= 0].sum()
    (expected_gradient,) = torch.autograd.grad(expected, x, scale)

    torch.testing.assert_close(loss.float(), expected.float(), rtol=1e-5, atol=0)
    assert gradient.dtype == dtype and gradient.is_contiguous()
    rtol = max(TOLERANCES[dtype], 1e-5)
    torch.testing.assert_close(wide(gradient), expected_gradient, rtol=rtol, atol=rtol / 10)


@every_focal
def test_focal_loss_of_extreme_logits_is_finite_and_of_others_is_not(alpha, gamma):
    labels = torch.tensor([0, 1], device=DEVICE)
    logits = torch.tensor([[1e4], [-1e4]], device=DEVICE)  # right
    assert focal_sum(logits, labels, alpha, gamma).item() == 0
    assert not focal_grad(logits, labels, alpha, gamma, ONE).any()
    alphas = (alpha, 1 - alpha) if alpha >= 0 else (1, 1)
    loss = focal_sum(-logits, labels, alpha, gamma).item()  # wrong
    assert loss == pytest.approx(1e4 * sum(alphas))
    gradient = focal_grad(-logits, labels, alpha, gamma, ONE)
    assert gradient.flatten().tolist() == pytest.approx([-alphas[0], alphas[1]])
    logits[0, 0] = NAN
    assert focal_sum(logits, labels, alpha, gamma).isnan()
    assert focal_grad(logits, labels, alpha, gamma, ONE).isnan().tolist() == [[1], [0]]


@every_dtype
@pytest.mark.parametrize(
    ("rows", "columns", "bins"), [(61, 37, 10), (1, 1, 1), (5, 80, 30), (700, 3, 100), (0, 4, 5)]
)
def test_densities_of_classes_are_the_references(rows, columns, bins, dtype):
    logits, labels = make_sigmoid(rows, columns, bins, dtype)
    weights = make_weights(bins * columns)
    x = wide(logits).detach().clone().requires_grad_()
    loss, norm, valid = reference.sigmoid_samples(x, labels)
    index = reference.unit_regions(norm, valid, bins, by_class=True)
    expected = reference.harmonized_losses(loss, index, weights).sum()
    (expected_gradient,) = torch.autograd.grad(expected, x)

    arguments = SIGMOID.arguments((logits, labels), bins, by_class=True)
    counts = T.regions(*arguments)[0][0]
    assert counts.tolist() == reference.histogram(index, bins * columns).tolist()
    total = T.total(*arguments, weights[None])
    rtol = TOLERANCES[wide(logits).dtype]
    torch.testing.assert_close(total, expected.detach().double(), rtol=rtol, atol=rtol / 1000)
    gradient = T.gradient(*arguments, weights[None], ONE)[0]
    rtol = TOLERANCES[dtype]
    torch.testing.assert_close(wide(gradient), expected_gradient, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("rows", [(0, 900, 7), (400, 0, 300), (5, 600, 0)], ids=str)
@pytest.mark.parametrize(
    ("kind", "by_class"),
    [(SIGMOID, False), (SIGMOID, True), (SOFTMAX, False), (ASL1, False)],
    ids=["sigmoid", "by class", "softmax", "asl1"],
)
def test_a_launch_of_several_levels_is_one_launch_for_each(monkeypatch, kind, by_class, rows):
    monkeypatch.setattr(T, "_most_programs", lambda device: 8)  # several for a level
    levels = [kind.make(n, 6, 10, seed=n) for n in rows]
    name, _, _, _, mu, *options = kind.arguments(levels[0], 10, by_class=by_class)
    weights = torch.stack([make_weights(60 if by_class else 10) * (i + 1) for i in range(3)])
    several = [list(x) for x in zip(*levels, strict=True)]

    def run(what, lists, *given):
        return what(name, *lists[:2], lists[2] if mu is not None else [], mu, *options, *given)

    counts, _ = run(T.regions, several)
    total, gradients = run(T.total, several, weights), run(T.gradient, several, weights, 2 * ONE)
    each = []
    for i, level in enumerate(levels):
        alone, own = [[t] for t in level], weights[i : i + 1]
        assert torch.equal(counts[i], run(T.regions, alone)[0][0])
        assert torch.equal(gradients[i], run(T.gradient, alone, own, 2 * ONE)[0])
        each.append(run(T.total, alone, own))
    torch.testing.assert_close(total, sum(each))


def test_levels_of_several_dtypes_are_computed_in_the_widest():
    levels = [make_sigmoid(20, 6, 10, dtype) for dtype in (torch.float32, torch.bfloat16)]
    logits, labels = (list(tensors) for tensors in zip(*levels, strict=True))
    arguments = SIGMOID.arguments((logits[0], labels[0]), 10)
    arguments = arguments[0], logits, labels, *arguments[3:]
    as_float = arguments[0], [x.float() for x in logits], labels, *arguments[3:]
    weights = torch.stack([make_weights(10)] * 2)
    assert torch.equal(T.regions(*arguments)[0], T.regions(*as_float)[0])
    found = T.gradient(*arguments, weights, ONE), T.gradient(*as_float, weights, ONE)
    for x, mine, expected in zip(logits, *found, strict=True):
        assert mine.dtype == x.dtype and torch.equal(mine, expected.to(x.dtype))
