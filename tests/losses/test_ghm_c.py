"""GHM-C over sigmoids and over a softmax."""

import math

import pytest
import torch
import torch.nn.functional as F
from device_route import never_waiting
from loss_oracles import (
    CLASSES,
    Density,
    assert_oracle,
    batch,
    columns,
    harmonized,
    sigmoid_samples,
    softmax_samples,
)

from ghm_d2.losses import (
    GHMC,
    SoftmaxGHMC,
    bce_loss,
    softmax_ce_loss,
)
from ghm_d2.losses.density.gradient_density import EMA_INITS, NORMALIZERS, SCOPES

KINDS = [GHMC, SoftmaxGHMC]
SIZES = (40, 12, 3)  # rows of three feature levels


def plain(kind, logits, labels):
    """PyTorch's own loss, the mean over valid samples."""
    if kind is SoftmaxGHMC:
        return F.cross_entropy(logits, labels, ignore_index=-1)
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    target = F.one_hot(labels, CLASSES + 1)[:, :-1].to(logits)
    return F.binary_cross_entropy_with_logits(logits, target)


@pytest.mark.parametrize("momentum", [0.0, 0.75])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("ema_init", EMA_INITS)
def test_levels_against_the_paper(scope, normalizer, ema_init, momentum):
    generator = torch.Generator().manual_seed(1)
    options = {"scope": scope, "normalizer": normalizer, "ema_init": ema_init}
    module = GHMC(bins=10, momentum=momentum, num_levels=3, **options).double()
    oracle = Density(10, momentum, levels=3, **options)
    for step in range(4):
        training = step != 2
        batches = [batch(GHMC, rows, generator) for rows in SIZES]
        logits, labels = zip(*batches, strict=True)
        samples = [sigmoid_samples(x.tolist(), y.tolist()) for x, y in batches]
        losses = module.train(training).levels(logits, labels)
        assert_oracle(logits, losses, harmonized(samples, oracle, training))


@pytest.mark.parametrize("momentum", [0.0, 0.75])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("ema_init", EMA_INITS)
def test_softmax_against_the_paper(normalizer, ema_init, momentum):
    generator = torch.Generator().manual_seed(2)
    options = {"normalizer": normalizer, "ema_init": ema_init}
    module = SoftmaxGHMC(bins=10, momentum=momentum, **options).double()
    oracle = Density(10, momentum, scope="level", levels=1, **options)
    for step in range(4):
        training = step != 2
        logits, labels = batch(SoftmaxGHMC, 60, generator)
        samples = softmax_samples(logits.tolist(), labels.tolist())
        loss = module.train(training)(logits, labels)
        assert_oracle([logits], [loss], harmonized([samples], oracle, training))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.1, 3.0, 15.0])
def test_one_region_is_the_mean_cross_entropy(kind, spread):
    logits, labels = batch(kind, 50, torch.Generator().manual_seed(3), spread=spread)
    loss = kind(bins=1, momentum=0.0).double()(logits, labels)
    expected = plain(kind, logits, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    ours, theirs = (torch.autograd.grad(v, logits)[0] for v in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-16)
    free = bce_loss if kind is GHMC else softmax_ce_loss
    torch.testing.assert_close(free(logits, labels), expected, rtol=1e-13, atol=0)


def test_scope_batch_is_the_concatenated_input():
    generator = torch.Generator().manual_seed(4)
    levels, whole = GHMC(scope="batch", num_levels=3).double(), GHMC().double()
    for _ in range(3):
        logits, labels = zip(*(batch(GHMC, rows, generator) for rows in SIZES), strict=True)
        together = whole(torch.cat(logits), torch.cat(labels))
        apart = sum(levels.levels(logits, labels))
        torch.testing.assert_close(apart, together, rtol=1e-13, atol=0)
        for x in logits:
            ours, theirs = (torch.autograd.grad(v, x, retain_graph=True) for v in (apart, together))
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_debias_and_first_begin_as_without_an_average(kind):
    logits, labels = batch(kind, 50, torch.Generator().manual_seed(5))
    expected = kind(momentum=0.0).double()(logits, labels)
    for ema_init in ("debias", "first"):
        loss = kind(momentum=0.75, ema_init=ema_init).double()(logits, labels)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    zero = kind(momentum=0.75, ema_init="zero").double()(logits, labels)
    torch.testing.assert_close(zero, 4 * expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_gradcheck(kind, momentum):
    """In evaluation the density is fixed, so the numeric gradient meets the same weights."""
    logits, labels = batch(kind, 12, torch.Generator().manual_seed(6))
    module = kind(bins=5, momentum=momentum).double()
    module(logits, labels)
    assert torch.autograd.gradcheck(module.eval(), (logits, labels), eps=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_grad_output_and_loss_weight_scale(kind):
    logits, labels = batch(kind, 30, torch.Generator().manual_seed(7))
    module = kind(momentum=0.0).double()
    loss = module(logits, labels)
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, logits, torch.tensor(-2.5, dtype=loss.dtype))
    torch.testing.assert_close(scaled, -2.5 * once)
    weighted = kind(momentum=0.0, loss_weight=3.0).double()(logits, labels)
    torch.testing.assert_close(weighted, 3 * loss)


@pytest.mark.parametrize("kind", KINDS)
def test_layout_does_not_matter(kind):
    generator = torch.Generator().manual_seed(8)
    logits, labels = batch(kind, 30, generator)
    expected = kind(momentum=0.0).double()(logits, labels)
    (gradient,) = torch.autograd.grad(expected, logits)
    transposed = logits.detach().t().contiguous().t().requires_grad_()
    strided = torch.stack([logits.detach()] * 2, dim=2)[..., 0].requires_grad_()
    for x in (transposed, strided):
        assert not x.is_contiguous()
        y = torch.stack([labels] * 2, dim=1)[:, 0]
        loss = kind(momentum=0.0).double()(x, y)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
)
def test_precision(kind, dtype, tolerance):
    """Half precision is computed in single; the gradient comes back in the input's dtype."""
    logits, labels = batch(kind, 2000, torch.Generator().manual_seed(9))
    low = logits.detach().to(dtype).requires_grad_()
    exact = low.detach().double().requires_grad_()
    loss = kind(momentum=0.0)(low, labels)
    expected = kind(momentum=0.0).double()(exact, labels)
    assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(
        expected.item(), rel=1e-3 if dtype != torch.float64 else 1e-6
    )
    loss.backward()
    expected.backward()
    assert low.grad.dtype == dtype
    # a sample on a region's edge may change sides in lower precision: nearly all agree
    close = torch.isclose(low.grad.double(), exact.grad, rtol=tolerance, atol=1e-7)
    assert close.double().mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.0, 0.75])
@pytest.mark.parametrize("case", ["empty", "ignored", "background"])
def test_batches_without_samples_or_positives(kind, momentum, case):
    rows = 0 if case == "empty" else 20
    label = CLASSES if case == "background" else -1
    logits = torch.randn(rows, columns(kind), generator=torch.Generator().manual_seed(10))
    logits.requires_grad_()
    module = kind(momentum=momentum)
    loss = module(logits, torch.full((rows,), label))
    loss.backward()
    assert loss.shape == ()
    if case == "background":
        assert 0 < loss.item() < math.inf
        assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
    else:
        assert loss.item() == 0
        assert torch.equal(logits.grad, torch.zeros_like(logits))
        assert not module.density.ema.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.0, 0.75])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("label", [1, CLASSES])
def test_logits_that_are_not_finite_give_nan(kind, momentum, bad, label):
    logits, labels = batch(kind, 20, torch.Generator().manual_seed(11), torch.float32)
    with torch.no_grad():
        logits[7, 1] = bad
    labels[7] = label
    loss = kind(momentum=momentum)(logits, labels)
    loss.backward()
    if kind is SoftmaxGHMC and bad < 0:  # a probability of 0, of another class or of its own
        assert loss.isfinite() if label != 1 else loss == math.inf
    else:
        assert loss.isnan()


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_masked_classes_are_those_of_cross_entropy(kernel):
    """Logits of -inf, by which people leave classes out."""
    logits, labels = batch(SoftmaxGHMC, 20, torch.Generator().manual_seed(18))
    masked = logits.detach().clone()
    masked[:, 1], labels[labels == 1] = -math.inf, 2
    mine, theirs = masked.clone().requires_grad_(), masked.clone().requires_grad_()
    loss = SoftmaxGHMC(bins=1, momentum=0.0, kernel=kernel).double()(mine, labels)
    expected = F.cross_entropy(theirs, labels, ignore_index=-1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.autograd.backward([loss, expected])
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_ignored_rows_may_hold_anything(kind, bad):
    logits, labels = batch(kind, 20, torch.Generator().manual_seed(12))
    labels[[3, 7]] = -1
    clean, dirty = kind().double(), kind().double()
    expected = clean(logits, labels)
    (gradient,) = torch.autograd.grad(expected, logits)
    spoilt = logits.detach().clone()
    spoilt[[3, 7]] = bad
    loss = dirty(spoilt.requires_grad_(), labels)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(spoilt.grad, gradient)
    assert torch.equal(spoilt.grad[[3, 7]], torch.zeros_like(spoilt[[3, 7]]))
    assert torch.equal(dirty.density.ema, clean.density.ema)


@pytest.mark.parametrize("kind", KINDS)
def test_huge_logits_are_finite(kind):
    logits, labels = batch(kind, 20, torch.Generator().manual_seed(13), torch.float32, spread=1e30)
    labels[0] = 0
    loss = kind(momentum=0.0)(logits, labels)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_does_not_update(kind):
    generator = torch.Generator().manual_seed(14)
    module = kind()
    logits, labels = batch(kind, 30, generator, torch.float32)
    module(logits, labels)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module.eval()(*batch(kind, 30, generator, torch.float32))
    assert before and all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    module.train()(logits, labels)
    assert not torch.equal(module.density.ema, before["density.ema"])


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_continues_exactly(kind):
    generator = torch.Generator().manual_seed(15)
    module, resumed = kind(), kind()
    for _ in range(3):
        module(*batch(kind, 30, generator, torch.float32))
    resumed.load_state_dict(module.state_dict())
    logits, labels = batch(kind, 30, generator, torch.float32)
    assert torch.equal(module(logits, labels), resumed(logits, labels))
    assert not torch.equal(module(logits, labels), kind()(logits, labels))


@pytest.mark.parametrize("kind", KINDS)
def test_half_module_counts_millions(kind):
    """One region of a level can hold more samples than float16 can count."""
    rows = 70_000
    logits, labels = torch.zeros(rows, columns(kind)), torch.full((rows,), CLASSES)
    module = kind(momentum=0.5, ema_init="first").half()
    for _ in range(2):
        loss = module(logits.half(), labels)
    expected = -math.log(0.5 if kind is GHMC else 1 / columns(kind))
    assert loss.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "1"])
def test_loss_weight_out_of_range(kind, value):
    with pytest.raises(ValueError, match="loss_weight") as error:
        kind(loss_weight=value)
    assert repr(value) in str(error.value) or str(value) in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ema_init", EMA_INITS)
def test_step_never_waits_for_the_device(kind, ema_init):
    with never_waiting() as device:
        module = kind(ema_init=ema_init).to(device)
        logits = torch.randn(20, columns(kind), device=device, requires_grad=True)
        labels = torch.zeros(20, dtype=torch.int64, device=device)
        module(logits, labels).backward()
        assert logits.grad.shape == logits.shape
        if kind is GHMC:
            sum(GHMC(scope="batch").to(device).levels([logits] * 2, [labels] * 2)).backward()


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.bincount(x.long()),
        lambda x: x.cpu(),
        lambda x: x.new_tensor(0.5),
        lambda x: torch.tensor(0.5, device=x.device),
    ],
)
def test_waiting_is_seen(waits):
    with never_waiting() as device, pytest.raises((RuntimeError, NotImplementedError)):
        waits(torch.ones(5, device=device))


@pytest.mark.parametrize(
    ("classes", "prior"), [(2, p) for p in (0.3, 0.4, 0.6, 0.7)] + [(81, 0.8), (81, 0.5)]
)
@pytest.mark.parametrize("bins", [10, 30])
def test_rows_on_the_edge_of_a_region_are_in_one_region_in_both_passes(classes, prior, bins):
    """All rows of a batch with one norm: a head's first step, whose bias says the background."""
    logits = torch.zeros(50, classes)
    logits[:, -1] = math.log(prior * (classes - 1) / (1 - prior))
    logits.requires_grad_()
    loss = SoftmaxGHMC(bins=bins, momentum=0.0)(logits, torch.full((50,), classes - 1))
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(prior), rel=1e-5)
    slopes = logits.grad[:, -1]
    torch.testing.assert_close(slopes, torch.full((50,), (prior - 1) / 50), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_is_weighed_in_the_region_that_it_was_counted_in(kind):
    """Many norms lie on edges; counted in another region, such a sample would weigh nothing."""
    generator = torch.Generator().manual_seed(19)
    logits = torch.randn(20_000, columns(kind), generator=generator).mul_(2).requires_grad_()
    labels = torch.randint(0, CLASSES + 1, (20_000,), generator=generator)
    for bins in (7, 30, 1000):
        kind(bins=bins, momentum=0.0)(logits, labels).backward()
        slopes = logits.grad.abs() if kind is GHMC else logits.grad.abs().sum(1)
        assert (slopes > 0).all()
        logits.grad = None
