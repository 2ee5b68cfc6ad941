"""The robust form: a prior count in each unit region, and GHM-R's mu from the data."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from device_route import never_waiting
from loss_oracles import Density, assert_oracle, harmonized, sigmoid_samples

from ghm_d2.config import get_cfg, load_config
from ghm_d2.errors import UsageError
from ghm_d2.losses import GHMC, GHMR, GradientDensity, SoftmaxGHMC, asl1_loss
from ghm_d2.losses.density.gradient_density import EMA_INITS, NORMALIZERS
from ghm_d2.modeling.build_losses import build_ghm_c, build_ghm_r, build_softmax_ghm_c

K = 4
LOSSES = {"sigmoid": GHMC, "softmax": SoftmaxGHMC, "asl1": GHMR}
every_loss = pytest.mark.parametrize("samples", LOSSES)


def batch(samples, rows=60, seed=0, dtype=torch.float64, spread=2.0):
    """One level's tensors: most rows are background, some ignored."""
    random = torch.Generator().manual_seed(seed)
    columns = {"sigmoid": K, "softmax": K + 1, "asl1": 4}[samples]
    pred = spread * torch.randn(rows, columns, generator=random, dtype=dtype)
    if samples == "asl1":
        target = torch.randn(rows, 4, generator=random, dtype=dtype)
        return pred.requires_grad_(), target, torch.rand(rows, 4, generator=random) < 0.7
    labels = torch.randint(-1, 4 * K, (rows,), generator=random).clamp(max=K)
    return pred.requires_grad_(), labels


def num_foreground(samples, labels):
    return int(labels.sum()) if samples == "asl1" else int(((labels >= 0) & (labels < K)).sum())


def mean_loss(samples, pred, *others):
    """The mean over the samples that count, by PyTorch's own functions."""
    if samples == "asl1":
        return asl1_loss(pred, others[0])[others[1]].mean()
    labels = others[0]
    kept, labels = pred[labels >= 0], labels[labels >= 0]
    if samples == "softmax":
        return F.cross_entropy(kept, labels)
    return F.binary_cross_entropy_with_logits(kept, F.one_hot(labels, K + 1)[:, :K].to(pred))


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("ema_init", EMA_INITS)
def test_density_over_steps(normalizer, ema_init, momentum):
    random = torch.Generator().manual_seed(1)
    options = {"scope": "batch", "normalizer": normalizer, "ema_init": ema_init, "prior": 3.0}
    module = GradientDensity(6, momentum, **options).double()
    oracle = Density(6, momentum, levels=1, **options)
    for step in range(8):
        training = step not in (0, 4)
        counts = torch.randint(-30, 50, (3, 6), generator=random).clamp(min=0)
        counts *= step != 5  # a batch without a sample
        foreground = int(counts.sum()) // 10
        weights = module.train(training)(counts, foreground=torch.tensor(foreground))
        expected = oracle.weights(counts.tolist(), training, foreground)
        torch.testing.assert_close(weights, weights.new_tensor(expected), rtol=1e-12, atol=0)
    if momentum:
        assert module.ema[0].tolist() == pytest.approx(oracle.average[0])
        expected = oracle._prior_count(0, training=False)
        assert module.prior_count.item() == pytest.approx(expected)


def test_loss_and_gradient_over_steps_are_the_formulas():
    """DESIGN: w_k = 1 / (S_k + c), and the loss is the sum of w l over the sum of w."""
    module = GHMC.robust().double()
    names = "bins", "momentum", "scope", "normalizer", "ema_init", "prior"
    oracle = Density(**{name: getattr(module.density, name) for name in names}, levels=1)
    for step in range(4):
        levels = [batch("sigmoid", rows, seed=10 * step + rows) for rows in (40, 15)]
        logits, labels = zip(*levels, strict=True)
        losses = module.train(step != 2).levels(logits, labels)
        foreground = sum(num_foreground("sigmoid", y) for y in labels)
        samples = [sigmoid_samples(x.tolist(), y.tolist()) for x, y in levels]
        assert_oracle(logits, losses, harmonized(samples, oracle, step != 2, foreground))


@every_loss
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_prior_without_bounds_is_the_mean_loss(samples, momentum):
    fixed = {"mu_quantile": 0.0} if samples == "asl1" else {}
    module = LOSSES[samples].robust(prior=1e12, momentum=momentum, **fixed)
    for seed in range(3):
        pred, *others = batch(samples, seed=seed)
        loss, expected = module.double()(pred, *others), mean_loss(samples, pred, *others)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        gradients = [torch.autograd.grad(x, pred)[0] for x in (loss, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-15)


@every_loss
def test_the_loss_is_continuous_in_the_prior_down_to_ghm_over_the_batch(samples):
    inputs = batch(samples)
    options = {"scope": "batch", "momentum": 0.0}
    published = LOSSES[samples](**options).double()(*inputs)
    without = LOSSES[samples](**options, normalizer="weights").double()(*inputs)
    torch.testing.assert_close(without, published, rtol=1e-12, atol=0)

    def loss(prior):
        module = LOSSES[samples](**options, normalizer="weights", prior=prior)
        return module.double()(*inputs).item()

    assert loss(1e-9) == pytest.approx(published.item(), rel=1e-6)
    priors = np.geomspace(1e-4, 1e4, 60)
    values = np.array([loss(prior) for prior in priors])
    assert np.abs(np.diff(values)).max() < 0.1 * (values.max() - values.min())
    assert loss(1.0) == pytest.approx(loss(1 + 1e-9), rel=1e-7)


@pytest.mark.parametrize("kernel", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_densities_of_classes_are_those_of_losses_of_one_class_each(kernel, dtype):
    """The loss is their mean; a class without foreground has the prior of one sample."""
    together = GHMC.robust(num_classes=K, kernel=kernel).to(dtype)
    apart = [GHMC.robust(kernel=kernel).to(dtype) for _ in range(K)]
    for step in range(3):
        levels = [batch("sigmoid", 60 - 20 * i, seed=7 * step + i, dtype=dtype) for i in range(2)]
        levels[1][1][levels[1][1] == 2] = K
        levels[0][1][levels[0][1] == 2] = K
        logits, labels = zip(*levels, strict=True)
        losses = together.levels(logits, labels)
        gradients = torch.autograd.grad(sum(losses), logits)
        expected = []
        for k, module in enumerate(apart):
            own = [torch.where(y < 0, -1, (y != k).long()) for y in labels]
            expected.append(module.levels([x[:, k : k + 1] for x in logits], own))
        means = [sum(of_level) / K for of_level in zip(*expected, strict=True)]
        tolerance = {"rtol": 1e-11 if dtype == torch.float64 else 1e-5, "atol": 1e-8}
        torch.testing.assert_close(losses, means, **tolerance)
        torch.testing.assert_close(gradients, torch.autograd.grad(sum(means), logits), **tolerance)
    c = torch.stack([module.density.prior_count for module in apart])
    torch.testing.assert_close(together.density.prior_count, c)
    assert c[2] == together.density.prior


@pytest.mark.parametrize("prior", [0.0, 0.5, 100.0])
def test_the_mean_of_beta_is_one(prior):
    density = GradientDensity(5, 0.9, scope="batch", normalizer="weights", prior=prior)
    random = torch.Generator().manual_seed(2)
    for _ in range(5):
        counts = torch.randint(-20, 60, (3, 5), generator=random).clamp(min=0)
        assert (density(counts) * counts).sum().item() == pytest.approx(1)


@every_loss
@pytest.mark.parametrize("rows", [0, 12])
def test_batches_without_samples_or_foreground(samples, rows):
    """Finite, without gradient where nothing counts, and the next batch goes on."""
    module = LOSSES[samples].robust().double()
    pred, *others = batch(samples)
    for empty in (False, True, False):
        x, *rest = (t[:rows].detach() for t in (pred, *others)) if empty else (pred, *others)
        rest[-1] = torch.full_like(rest[-1], samples != "asl1" and -1) if empty else rest[-1]
        loss = module(x.requires_grad_(), *rest)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.isfinite() and gradient.isfinite().all()
        assert empty == (not gradient.any())
    if samples != "asl1":
        background = torch.full_like(others[0], K)
        loss = LOSSES[samples].robust().double()(pred, background)
        assert loss.isfinite() and torch.autograd.grad(loss, pred)[0].any()


def sizes(median, rows=5000, seed=3):
    """Boxes whose differences have a log-normal size with this median."""
    random = torch.Generator().manual_seed(seed)
    d = torch.randn(rows, 4, generator=random) * 0.8
    target = torch.randn(rows, 4, generator=random)
    sign = 1 - 2 * torch.randint(2, (rows, 4), generator=random)
    return target + sign * median * d.exp(), target


SLOT = 2**0.25  # the width of a slot of the histogram


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("median", [1e-3, 0.2, 30.0])
def test_mu_is_the_quantile_of_the_batch_before(quantile, median):
    pred, target = sizes(median)
    valid = torch.arange(len(pred)) % 3 > 0
    module = GHMR.robust(mu=0.07, mu_quantile=quantile, momentum=0.0)
    first = module(pred, target, valid)
    expected = GHMR.robust(mu=0.07, mu_quantile=0.0, momentum=0.0)(pred, target, valid)
    assert torch.equal(first, expected)  # mu 0.07 at first
    exact = float(np.quantile((pred - target)[valid].abs().numpy(), quantile))
    assert exact / SLOT < module.mu.item() < exact * SLOT
    assert module.mu.item() == pytest.approx(exact, rel=0.02)  # it interpolates
    second = module(pred, target, valid)
    fixed = GHMR.robust(mu=exact, mu_quantile=0.0, momentum=0.0)
    assert second.item() == pytest.approx(fixed(pred, target, valid).item(), rel=0.1)


def test_mu_follows_a_change_and_only_in_training():
    module = GHMR.robust(momentum=0.8)
    seen = []
    for step in range(24):
        module.train(step < 20)
        module(*sizes(0.3 if step < 4 else 0.02, seed=step))
        seen.append(module.mu.item())
    assert seen[3] == pytest.approx(0.3, rel=0.05)
    assert seen[19] == pytest.approx(0.02, rel=0.1)
    assert seen[4:20] == sorted(seen[4:20], reverse=True)
    assert seen[20:] == [seen[19]] * 4
    module.train()(torch.zeros(0, 4), torch.zeros(0, 4))
    assert module.mu.item() == seen[19]


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_mu_of_sizes_beyond_the_histogram_is_finite_and_positive(size):
    module = GHMR.robust()
    for _ in range(2):
        loss = module(torch.full((3, 4), size), torch.zeros(3, 4))
        assert loss.isfinite() and 0 < module.mu.item() < 1e5


def test_numbers_that_are_not_finite_do_not_move_mu():
    pred, target = sizes(0.1)
    module, clean = GHMR.robust(), GHMR.robust()
    clean(pred, target)
    valid = torch.ones(len(pred) + 3, dtype=torch.bool)
    bad = torch.tensor([[torch.nan], [torch.inf], [-torch.inf]]).expand(-1, 4)
    assert module(torch.cat([pred, bad]), torch.cat([target, 0 * bad]), valid).isnan()
    assert module.mu.item() == clean.mu.item()


@every_loss
def test_step_never_waits_for_the_device(samples):
    with never_waiting() as device:
        module = LOSSES[samples].robust(prior=2.0).to(device)
        pred, *others = (x.detach().to(device) for x in batch(samples, dtype=torch.float32))
        loss = sum(module.levels(*([x] * 2 for x in (pred.requires_grad_(), *others))))
        loss.backward()
        assert pred.grad.shape == pred.shape and module.density.prior_count.shape == ()


@every_loss
def test_gradcheck(samples):
    """Both tensors, and a mu from the data, are checked; the weights and mu are constants."""
    module = LOSSES[samples].robust(bins=4, kernel="torch").double()
    pred, *others = batch(samples, 10, spread=1.0)
    module(pred, *others)
    assert torch.autograd.gradcheck(module.eval(), (pred, *others), eps=1e-7, atol=1e-6)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(samples, dtype):
    """Predictions, and the module as a part of a model, may be half; averages stay float32."""
    pred, *others = batch(samples)
    others = [x.to(dtype) if x.is_floating_point() else x for x in others]
    module, half = LOSSES[samples].robust(), LOSSES[samples].robust()
    for _ in range(2):
        x, y = (pred.detach().to(dtype).requires_grad_() for _ in range(2))
        losses = module(x, *others), half(y, *others)
        sum(losses).backward()
        assert losses[0].dtype == torch.float32 and x.grad.dtype == dtype
        assert torch.equal(*losses) and torch.equal(x.grad, y.grad)
        torch.nn.Sequential(half).to(dtype)
    wide = [x.double() if x.is_floating_point() else x for x in (x.detach(), *others)]
    exact = LOSSES[samples].robust().double()
    assert losses[0].item() == pytest.approx([exact(*wide) for _ in range(2)][1].item(), rel=1e-3)


@every_loss
def test_training_resumes_exactly_from_a_checkpoint(samples, tmp_path):
    module, resumed = LOSSES[samples].robust(), LOSSES[samples].robust()
    for seed in range(3):
        module(*batch(samples, seed=seed, dtype=torch.float32))
    torch.save(module.state_dict(), tmp_path / "loss.pth")
    resumed.load_state_dict(torch.load(tmp_path / "loss.pth", weights_only=True))
    for seed in range(3, 6):
        inputs = batch(samples, seed=seed, dtype=torch.float32)
        assert torch.equal(module(*inputs), resumed(*inputs))


@every_loss
def test_checkpoints_from_before_the_prior_load_where_it_is_not_used(samples):
    old = LOSSES[samples]().state_dict()
    old = {name: old[name] + 1 for name in ("density.ema", "density.num_updates")}
    module = LOSSES[samples]()
    assert module.load_state_dict(old).missing_keys == []
    assert torch.equal(module.density.ema, old["density.ema"])
    robust = LOSSES[samples].robust()
    assert robust.load_state_dict(old, strict=False).missing_keys
    loss = robust(*batch(samples, dtype=torch.float32))
    assert loss.isfinite() and loss > 0


def test_a_prior_counts_from_where_it_begins():
    """A run that goes on with PRIOR set has an average of regions, but none of foreground."""
    density = GradientDensity(2, 0.9, scope="batch", ema_init="debias", prior=2.0)
    density.ema += 50
    density.num_updates += 40
    density(torch.tensor([[40, 60]]), foreground=torch.tensor(7))
    assert density.prior_count.item() == pytest.approx(2 * 7)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (GHMC, {"prior": -1.0, "scope": "batch"}, ["prior", "greater than 0", "-1.0"]),
        (GHMC, {"prior": float("nan"), "scope": "batch"}, ["prior", "nan"]),
        (GHMC, {"prior": "3", "scope": "batch"}, ["prior", "a number", "'3'"]),
        (SoftmaxGHMC, {"prior": 3.0}, ["prior", "scope batch", "level"]),
        (GHMC, {"num_classes": 3}, ["num_classes above 1", "scope batch", "level"]),
        (GHMC, {"num_classes": 0, "scope": "batch"}, ["num_classes", "0"]),
        (GHMR, {"mu_quantile": 1.0}, ["mu_quantile", "[0, 1)", "1.0"]),
        (GHMR, {"mu_quantile": -0.5}, ["mu_quantile", "[0, 1)", "-0.5"]),
    ],
)
def test_arguments_out_of_range(make, options, words):
    with pytest.raises(ValueError) as error:
        make(**options)
    for word in words:
        assert word in str(error.value)


def test_the_keys_build_the_robust_form():
    cfg = get_cfg()
    ghm = cfg.MODEL.GHM
    ghm.CLS.PRIOR = 3.0
    with pytest.raises(UsageError, match=r"MODEL\.GHM\.CLS: a prior above 0 needs scope batch"):
        build_ghm_c(cfg)
    ghm.SCOPE, ghm.NORMALIZER, ghm.EMA_INIT = "batch", "weights", "debias"
    ghm.CLS.MOMENTUM = ghm.REG.MOMENTUM = 0.9
    ghm.REG.MU_QUANTILE, ghm.REG.MU, ghm.REG.PRIOR = 0.5, 0.1, 0.25
    for built, made in (
        (build_ghm_c(cfg), GHMC.robust()),
        (build_softmax_ghm_c(cfg), SoftmaxGHMC.robust()),
        (build_ghm_r(cfg), GHMR.robust(mu=0.1, prior=0.25, loss_weight=10.0)),
    ):
        assert repr(built) == repr(made)
    quick = load_config("quick/retinanet_ghm.yaml")
    ghm_c, ghm_r = build_ghm_c(quick), build_ghm_r(quick)
    assert repr(ghm_c) == repr(GHMC.robust(loss_weight=ghm_c.loss_weight))
    scale = {"mu": quick.MODEL.GHM.REG.MU, "loss_weight": ghm_r.loss_weight}
    assert repr(ghm_r) == repr(GHMR.robust(**scale))
    assert build_ghm_c(quick, num_classes=3).density.num_classes == 3
    quick.MODEL.GHM.CLS.PER_CLASS = False
    assert build_ghm_c(quick, num_classes=3).density.num_classes == 1
    ghm.CLS.DENSITY = "exact"
    with pytest.raises(
        UsageError, match=r"exact does not support MODEL.GHM.CLS.PRIOR and PER_CLASS"
    ):
        build_ghm_c(cfg)
    ghm.CLS.PRIOR = 0.0
    assert build_ghm_c(cfg).scope == "batch"


def test_a_density_for_each_class_is_of_sigmoids_with_as_many_classes():
    with pytest.raises(ValueError, match="no density per class"):
        SoftmaxGHMC.robust(num_classes=K + 1)(*batch("softmax"))
    with pytest.raises(ValueError, match=rf"counts must be \(L, 3, 30\), not \(1, {K}, 30\)"):
        GHMC.robust(num_classes=3)(*batch("sigmoid"))
    density = GHMC.robust(num_classes=3).density
    with pytest.raises(ValueError, match=r"foreground must have the shape \(3,\), not \(\)"):
        density(torch.ones(1, 3, 30, dtype=torch.int64), foreground=torch.tensor(5))
