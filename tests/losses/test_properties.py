"""Properties of every loss for any batch: any size, precision, logits and ignored rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ghm_d2.kernels import cpu
from ghm_d2.losses import (
    GHMC,
    GHMR,
    OHEM,
    GradientDensity,
    SoftmaxGHMC,
    asl1_loss,
    bce_loss,
    focal_loss,
    ohem_loss,
    softmax_ce_loss,
)
from ghm_d2.losses.density.gradient_density import EMA_INITS, NORMALIZERS, SCOPES

DTYPES = {
    torch.float64: 1e-6,  # the moving average is in float32
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}
MU = 0.02
GHM = {"sigmoid": GHMC, "softmax": SoftmaxGHMC, "asl1": GHMR}
MEANS = {  # the loss that GHM is with one unit region and no average, and its gradient norm
    "sigmoid": bce_loss,
    "softmax": softmax_ce_loss,
    "asl1": lambda pred, labels: asl1_mean(pred, labels),
}
BASELINES = {
    "bce": bce_loss,
    "focal": focal_loss,
    "focal, gamma 0": lambda x, y: focal_loss(x, y, -1, 0),
    "softmax_ce": softmax_ce_loss,
    "asl1": MEANS["asl1"],
    "ohem": ohem_loss,
    "OHEM": OHEM(1.5),
}
KERNELS = [
    "torch",
    pytest.param("c", marks=pytest.mark.skipif(not cpu.available(), reason="no C library")),
]
several = settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

values = st.one_of(
    st.floats(-8, 8, width=16),
    st.sampled_from([0.0, -0.0, 1e-7, -30.0, 30.0, 90.0, -90.0, 1e4, -1e4]),
)


@st.composite
def batches(draw, levels=(1, 4), rows=6, values=values):
    """(predictions (N, K), labels (N,)) of each level; labels are -1 (ignored) to K - 1.

    So they are right for sigmoids (where K would be background as well) and for softmaxes.
    """
    dtype = draw(st.sampled_from(list(DTYPES)))
    columns = draw(st.integers(1, 4))
    labels = draw(
        st.sampled_from([st.just(-1), st.integers(0, columns - 1), st.integers(-1, columns - 1)])
    )
    batch = []
    for _ in range(draw(st.integers(*levels))):
        shape = (draw(st.integers(0, rows)), columns)
        pred = torch.from_numpy(draw(arrays(np.float64, shape, elements=values))).to(dtype)
        chosen = draw(st.lists(labels, min_size=shape[0], max_size=shape[0]))
        batch.append((pred, torch.tensor(chosen, dtype=torch.int64)))
    return batch


one_level = batches(levels=(1, 1), rows=9)


def targets(pred, labels):
    """For box regression: the label / 2 as the target, NaN and not valid where it is ignored."""
    target = torch.where(labels >= 0, labels / 2, math.nan).to(pred.dtype)
    return target[:, None].expand_as(pred), labels >= 0


def asl1_mean(pred, labels):
    target, valid = targets(pred, labels)
    target = torch.where(valid[:, None], target, pred.detach())  # ASL1 is 0 there
    return asl1_loss(pred, target, MU, "sum") / (valid.sum() * pred.shape[1]).clamp(min=1)


def ghm(samples, batch, module=None, **options):
    """The loss of each level, of a new module where none is given."""
    if module is None:
        module = GHM[samples](**({"mu": MU} if samples == "asl1" else {}), **options)
    preds, labels = zip(*batch, strict=True)
    if samples != "asl1":
        return module.levels(preds, labels)
    pairs = [targets(*level) for level in batch]
    return module.levels(preds, *zip(*pairs, strict=True))


def loss_and_gradients(function, batch):
    """The sum of a function's losses, and the gradient of each level's predictions."""
    leaves = [pred.clone().requires_grad_() for pred, _ in batch]
    losses = function([(leaf, labels) for leaf, (_, labels) in zip(leaves, batch, strict=True)])
    loss = sum(losses)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def assert_sound(loss, gradients, batch):
    assert loss.shape == () and loss.isfinite() and loss >= 0
    for gradient, (pred, labels) in zip(gradients, batch, strict=True):
        assert gradient.shape == pred.shape and gradient.dtype == pred.dtype
        assert gradient.isfinite().all()
        assert (gradient[labels < 0] == 0).all()
    if all((labels < 0).all() for _, labels in batch):
        assert loss == 0


def norms(samples, pred, labels):
    """The gradient norms of valid samples, from the definition, in double precision."""
    pred, valid = pred.double(), labels >= 0
    if samples == "softmax":
        return 1 - pred.softmax(1)[valid].gather(1, labels[valid][:, None])
    if samples == "asl1":
        d = (pred - targets(pred, labels)[0])[valid]
        return d.abs() / torch.hypot(d, torch.tensor(MU).double())
    target = torch.nn.functional.one_hot(labels[valid], pred.shape[1])
    return (pred[valid].sigmoid() - target).abs()


def region_counts(norm, bins):
    """Samples of each unit region; assumes that rounding puts none of them in another one."""
    scaled = norm.flatten() * bins
    inner = (scaled > 0.5) & (scaled < bins - 0.5)
    assume(((scaled - scaled.round()).abs()[inner] > 1e-3 * bins).all())
    return torch.bincount(scaled.long().clamp(max=bins - 1), minlength=bins)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("samples", GHM)
@several
@given(
    batch=batches(),
    bins=st.integers(1, 40),
    momentum=st.sampled_from([0.0, 0.75, 0.999]),
    scope=st.sampled_from(SCOPES),
    ema_init=st.sampled_from(EMA_INITS),
    normalizer=st.sampled_from(NORMALIZERS),
)
def test_ghm_is_finite_and_leaves_ignored_samples_alone(kernel, samples, batch, **options):
    options |= {"num_levels": len(batch), "kernel": kernel}
    assert_sound(*loss_and_gradients(lambda b: ghm(samples, b, **options), batch), batch)


@pytest.mark.parametrize("name", BASELINES)
@several
@given(batch=one_level)
def test_baselines_are_finite_and_leave_ignored_samples_alone(name, batch):
    loss = BASELINES[name]
    assert_sound(*loss_and_gradients(lambda b: [loss(*level) for level in b], batch), batch)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("samples", GHM)
@several
@given(batch=one_level)
def test_one_unit_region_without_average_is_the_mean_loss(kernel, samples, batch):
    mine = loss_and_gradients(lambda b: ghm(samples, b, bins=1, momentum=0.0, kernel=kernel), batch)
    expected = loss_and_gradients(lambda b: [MEANS[samples](*b[0])], batch)
    assert_same(mine, expected, batch)


def assert_same(mine, expected, batch):
    tolerance = DTYPES[batch[0][0].dtype]
    wide = min(tolerance, 1e-5)  # half precision rounds gradients, not losses
    torch.testing.assert_close(mine[0].double(), expected[0].double(), rtol=wide, atol=1e-7)
    for a, b in zip(mine[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("samples", GHM)
@several
@given(batch=one_level, bins=st.integers(1, 12))
def test_weights_of_valid_samples_add_up_to_their_number(samples, batch, bins):
    """sum of beta_i = N, where beta_i = N / (S_k n): each region has the same share."""
    counts = region_counts(norms(samples, *batch[0]), bins)
    density = GHM[samples](bins=bins, momentum=0.0).density
    weights = density(counts[None])[0]
    total = counts.sum()
    beta = total * weights
    torch.testing.assert_close((beta * counts).sum(), total.double(), rtol=1e-5, atol=0)
    n = (counts > 0).sum()
    for k in range(bins):
        expected = total / (counts[k] * n) if counts[k] else torch.tensor(0.0)
        expected = expected.double()
        torch.testing.assert_close(beta[k], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("samples", GHM)
@several
@given(batch=one_level, bins=st.integers(1, 12))
def test_the_loss_is_each_samples_loss_by_its_weight(kernel, samples, batch, bins):
    """The weights are the paper's; with one sample per region the loss would be a plain mean."""
    pred, labels = batch[0]
    norm = norms(samples, pred, labels)
    counts = region_counts(norm, bins)
    n, present = (counts > 0).sum(), counts[counts > 0].double()
    plain = torch.zeros(bins, dtype=torch.float64)
    region = (norm.flatten() * bins).long().clamp(max=bins - 1)
    plain.index_add_(0, region, each_loss(samples, pred.double(), labels).flatten())
    expected = (plain[counts > 0] / present).sum() / n.clamp(min=1)
    (loss,) = ghm(samples, batch, bins=bins, momentum=0.0, kernel=kernel)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def each_loss(samples, pred, labels):
    """The plain losses of valid samples, in the order of `norms`."""
    valid = labels >= 0
    if samples == "softmax":
        return torch.nn.functional.cross_entropy(pred[valid], labels[valid], reduction="none")
    if samples == "asl1":
        d = (pred - targets(pred, labels)[0])[valid]
        return (d * d + MU * MU).sqrt() - MU
    target = torch.nn.functional.one_hot(labels[valid], pred.shape[1]).double()
    return torch.nn.functional.binary_cross_entropy_with_logits(
        pred[valid], target, reduction="none"
    )


ORDERED = {name: lambda b, f=f: [f(*level) for level in b] for name, f in BASELINES.items()}
ORDERED |= {f"GHM {name}": lambda b, name=name: ghm(name, b) for name in GHM}


@pytest.mark.parametrize("name", ORDERED)
@several
@given(batch=one_level, random=st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(name, batch, random):
    pred, labels = batch[0]
    order = list(range(len(labels)))
    random.shuffle(order)
    loss, (gradient,) = loss_and_gradients(ORDERED[name], batch)
    other, (shuffled,) = loss_and_gradients(ORDERED[name], [(pred[order], labels[order])])
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-7)
    if "ohem" not in name.lower():  # of equally hard anchors it takes any
        torch.testing.assert_close(shuffled, gradient[order], rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(not cpu.available(), reason="no C library")
@pytest.mark.parametrize("samples", [*GHM, "bce", "focal"])
@several
@given(
    batch=batches(),
    bins=st.integers(1, 12),
    scope=st.sampled_from(SCOPES),
    ema_init=st.sampled_from(EMA_INITS),
    gamma=st.sampled_from([0.0, 1.0, 2.0, 3.5]),
)
def test_kernels_agree_with_the_definition(samples, batch, bins, scope, ema_init, gamma):
    def losses(kernel):
        if samples == "bce":
            return lambda b: [bce_loss(*level, kernel=kernel) for level in b]
        if samples == "focal":
            return lambda b: [focal_loss(*level, gamma=gamma, kernel=kernel) for level in b]
        options = {"bins": bins, "scope": scope, "ema_init": ema_init, "num_levels": len(batch)}
        return lambda b: ghm(samples, b, kernel=kernel, **options)

    if samples in GHM:
        for level in batch:
            region_counts(norms(samples, *level), bins)
    assert_same(
        loss_and_gradients(losses("c"), batch), loss_and_gradients(losses("torch"), batch), batch
    )


counts = st.one_of(st.just(0), st.integers(0, 50), st.integers(0, 2**40))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ema_init", EMA_INITS)
@several
@given(
    data=st.data(),
    momentum=st.floats(0, 0.999),
    scope=st.sampled_from(SCOPES),
    normalizer=st.sampled_from(NORMALIZERS),
)
def test_weights_and_average_stay_finite_and_positive_over_many_batches(
    kernel, ema_init, data, momentum, scope, normalizer
):
    levels, bins = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    density = GradientDensity(
        bins, momentum, scope=scope, normalizer=normalizer, ema_init=ema_init,
        num_levels=levels, kernel=kernel,
    )  # fmt: skip
    batch = arrays(np.int64, (levels, bins), elements=counts)
    for training in data.draw(st.lists(st.booleans(), max_size=6)):
        held = torch.from_numpy(data.draw(batch))
        weights = density.train(training)(held)
        assert weights.isfinite().all() and (weights >= 0).all()
        there = held.sum(0, keepdim=True).expand_as(held) if scope == "batch" else held
        assert ((weights > 0) == (there > 0)).all()
        assert density.ema.isfinite().all() and (density.ema >= 0).all()


odd = st.sampled_from([math.inf, -math.inf, math.nan])


# ASL1 alone knows no ignored rows, and OHEM picks by the loss
@pytest.mark.parametrize("name", [n for n in ORDERED if n != "asl1" and "ohem" not in n.lower()])
@several
@given(batch=one_level, value=odd, row=st.integers(0, 8))
@example(batch=[(torch.zeros(2, 1), torch.tensor([0, -1]))], value=math.inf, row=0)
@example(batch=[(torch.zeros(2, 1), torch.tensor([0, -1]))], value=math.nan, row=1)
def test_what_is_not_finite_shows_where_it_counts_and_nowhere_else(name, batch, value, row):
    pred, labels = batch[0]
    assume(row < len(labels))
    changed = pred.clone()
    changed[row, 0] = value
    before, _ = loss_and_gradients(ORDERED[name], batch)
    after, (gradient,) = loss_and_gradients(ORDERED[name], [(changed, labels)])
    if labels[row] < 0:
        assert after == before and (gradient[row] == 0).all()
    elif not ("softmax" in name and value == -math.inf):  # a probability of 0
        assert not after.isfinite()
