"""Unit regions' moving average and weights, and the exact density."""

from contextlib import nullcontext

import pytest
import torch
from loss_oracles import Density
from torch.utils.checkpoint import checkpoint

from ghm_d2.config import get_cfg
from ghm_d2.errors import UsageError
from ghm_d2.kernels import reference
from ghm_d2.losses import GHMC, GHMR, GradientDensity, exact_gradient_density, recomputing
from ghm_d2.losses.density.gradient_density import EMA_INITS, NORMALIZERS, SCOPES
from ghm_d2.modeling.build_losses import build_ghm_c, build_softmax_ghm_c


def random_counts(generator, levels=3, bins=6, high=50):
    """Counts with empty regions in every row, and now and then an empty row."""
    counts = torch.randint(0, high, (levels, bins), generator=generator)
    counts *= torch.rand(levels, bins, generator=generator) < 0.6
    return counts * (torch.rand(levels, 1, generator=generator) < 0.9)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("ema_init", EMA_INITS)
def test_weights_and_average_over_steps(scope, normalizer, ema_init, momentum):
    generator = torch.Generator().manual_seed(1)
    options = {"scope": scope, "normalizer": normalizer, "ema_init": ema_init}
    module = GradientDensity(6, momentum, num_levels=3, **options).double()
    oracle = Density(6, momentum, levels=3, **options)
    for step in range(12):
        training = step % 4 != 3
        counts = random_counts(generator)
        weights = module.train(training)(counts)
        expected = torch.tensor(oracle.weights(counts.tolist(), training), dtype=torch.float64)
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
    if momentum > 0:
        rows = 3 if scope == "level_ema" else 1
        average = torch.tensor(oracle.average[:rows], dtype=torch.float64)
        torch.testing.assert_close(module.ema, average, rtol=1e-12, atol=0)


def test_level_scope_shares_one_average_and_level_ema_does_not():
    counts = torch.tensor([[8, 0], [0, 4], [2, 0]])
    shared = GradientDensity(2, 0.5, scope="level", num_levels=3)
    shared(counts)
    assert shared.ema.tolist() == [[0.5 * 4 + 0.5 * 2, 2]]
    apart = GradientDensity(2, 0.5, scope="level_ema", num_levels=3)
    apart(counts)
    assert apart.ema.tolist() == [[4, 0], [0, 2], [1, 0]]


def test_batch_scope_is_one_row_of_all_counts():
    generator = torch.Generator().manual_seed(2)
    together = GradientDensity(6, 0.5, scope="batch")
    alone = GradientDensity(6, 0.5)
    for _ in range(3):
        counts = random_counts(generator)
        weights = together(counts)
        assert weights.shape == (3, 6)
        assert torch.equal(weights, alone(counts.sum(0, keepdim=True)).expand(3, -1))


@pytest.mark.parametrize("scope", SCOPES)
def test_valid_samples_weigh_one_in_all(scope):
    """The sum of beta over the N valid samples is N, without a moving average."""
    counts = torch.tensor([[3, 0, 9, 1], [0, 0, 7, 2]])
    weights = GradientDensity(4, 0.0, scope=scope, num_levels=2)(counts)
    total = (counts * weights).sum(1)
    if scope == "batch":
        assert total.sum().item() == pytest.approx(1)
    else:
        assert total.tolist() == pytest.approx([1, 1])


def test_zero_start_makes_first_weights_too_large_and_the_others_do_not():
    counts = torch.tensor([[10, 0, 5]])
    exact = GradientDensity(3, 0.0)(counts)
    assert torch.allclose(GradientDensity(3, 0.75)(counts), 4 * exact)
    assert torch.allclose(GradientDensity(3, 0.75, ema_init="first")(counts), exact)
    assert torch.allclose(GradientDensity(3, 0.75, ema_init="debias")(counts), exact)


def test_debias_recovers_a_constant_count():
    module = GradientDensity(2, 0.9, ema_init="debias")
    for _ in range(5):
        weights = module(torch.tensor([[7, 0]]))
    assert weights[0].tolist() == pytest.approx([1 / 7, 0])


def test_empty_regions_keep_their_average():
    module = GradientDensity(3, 0.5)
    module(torch.tensor([[4, 8, 0]]))
    before = module.ema.clone()
    module(torch.tensor([[4, 0, 0]]))
    assert module.ema[0, 0] != before[0, 0]
    assert torch.equal(module.ema[0, 1:], before[0, 1:])


def test_no_sample_at_all_changes_nothing():
    module = GradientDensity(3, 0.5)
    module(torch.tensor([[4, 8, 0]]))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert module(torch.zeros(1, 3, dtype=torch.int64)).tolist() == [[0, 0, 0]]
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_evaluation_uses_the_average_and_does_not_update_it():
    module = GradientDensity(3, 0.5)
    module(torch.tensor([[4, 8, 0]]))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    weights = module.eval()(torch.tensor([[100, 0, 6]]))
    # region 0 by its average 2, region 2, never trained on, by its count
    assert weights[0].tolist() == pytest.approx([1 / (2 * 2), 0, 1 / (2 * 6)])
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("ema_init", EMA_INITS)
@pytest.mark.parametrize("scope", SCOPES)
def test_state_dict_continues_exactly(scope, ema_init, tmp_path):
    generator = torch.Generator().manual_seed(3)

    def build():
        return GradientDensity(6, 0.7, scope=scope, ema_init=ema_init, num_levels=3)

    module, resumed = build(), build()
    for _ in range(3):
        module(random_counts(generator))
    torch.save(module.state_dict(), tmp_path / "density.pth")
    resumed.load_state_dict(torch.load(tmp_path / "density.pth", weights_only=True))
    for _ in range(3):
        counts = random_counts(generator)
        assert torch.equal(module(counts), resumed(counts))
    assert torch.equal(module.ema, resumed.ema)


@pytest.mark.parametrize("convert", ["half", "bfloat16"])
def test_half_precision_keeps_counts(convert):
    """65504 is float16's largest number; a feature level has millions of samples."""
    counts = torch.tensor([[9_000_001, 3, 0]])
    module, half = GradientDensity(3, 0.5), GradientDensity(3, 0.5)
    for density in (module, half):
        density(counts)
    getattr(torch.nn.Sequential(half), convert)()  # as the part of a model
    assert torch.equal(half.ema, module.ema)
    assert torch.equal(half(counts), module(counts))


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16])
def test_state_is_exact_whatever_the_default_precision(default):
    logits = torch.zeros(70_000, 1)
    labels = torch.ones(70_000, dtype=torch.int64)
    expected = GHMC(momentum=0.5, ema_init="first")(logits, labels)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        module = GHMC(momentum=0.5, ema_init="first")
        assert module.density.ema.dtype == torch.float32
        assert torch.equal(module(logits, labels), expected)
    finally:
        torch.set_default_dtype(before)


def test_a_module_that_was_built_without_memory_starts_at_zero():
    with torch.device("meta"):
        module = GHMR.robust()
    module.to_empty(device="cpu")
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert not any(buffer.any() for buffer in module.buffers())


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_in_half_precision_is_taken_as_float32(assign):
    density = GradientDensity(2, 0.5)
    density(torch.tensor([[1000, 3]]))
    state = {k: v.half() if v.is_floating_point() else v for k, v in density.state_dict().items()}
    resumed = GradientDensity(2, 0.5)
    resumed.load_state_dict(state, assign=assign)
    assert resumed.ema.dtype == torch.float32 and torch.equal(resumed.ema, density.ema)
    assert state["ema"].dtype == torch.float16  # the caller's own stays


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_an_average_of_nearly_no_movement_is_debiased(kernel):
    density = GradientDensity(2, 1 - 1e-7, ema_init="debias", kernel=kernel)
    weights = density(torch.tensor([[1000, 0]]))
    assert weights[0, 0].item() == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("make", [GHMR.robust, lambda: GHMR(momentum=0.5, scope="level")])
def test_activation_checkpointing_moves_averages_once(make):
    generator = torch.Generator().manual_seed(5)
    pred = torch.randn(3, 20, 4, generator=generator)
    plain, checkpointed = make(), make()

    def context_fn():
        return nullcontext(), recomputing()

    for _ in range(3):
        gradients = []
        for module in (plain, checkpointed):
            x = pred.clone().requires_grad_()

            def loss(x, module=module, target=pred * 0):
                return sum(module.levels(list(x * 1.5), list(target)))

            if module is checkpointed:
                value = checkpoint(loss, x, use_reentrant=False, context_fn=context_fn)
            else:
                value = loss(x)
            gradients += torch.autograd.grad(value, x)
        assert torch.equal(*gradients)
        pred = pred * 0.7
    for name, buffer in plain.state_dict().items():
        assert torch.equal(buffer, checkpointed.state_dict()[name]), name


def test_a_loss_is_computed_once():
    """Twice would move its average on twice."""
    counted = GHMC().begin([torch.zeros(3, 2)], [torch.zeros(3, dtype=torch.int64)])
    counted.total()
    with pytest.raises(RuntimeError, match="already computed"):
        counted.losses()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bins": 0}, ["bins", "1", "0"]),
        ({"bins": -3}, ["bins", "1", "-3"]),
        ({"bins": 2.5}, ["bins", "integer", "2.5"]),
        ({"bins": True}, ["bins", "integer", "True"]),
        ({"momentum": 1.0}, ["momentum", "[0, 1)", "1.0"]),
        ({"momentum": -0.1}, ["momentum", "[0, 1)", "-0.1"]),
        ({"momentum": float("nan")}, ["momentum", "[0, 1)", "nan"]),
        ({"momentum": "0.5"}, ["momentum", "number", "'0.5'"]),
        ({"scope": "image"}, ["scope", *SCOPES, "'image'"]),
        ({"normalizer": "all"}, ["normalizer", *NORMALIZERS, "'all'"]),
        ({"ema_init": "one"}, ["ema_init", *EMA_INITS, "'one'"]),
        ({"num_levels": 0}, ["num_levels", "1", "0"]),
    ],
)
@pytest.mark.parametrize("module", [GradientDensity, GHMC, GHMR])
def test_argument_out_of_range(module, options, words):
    with pytest.raises(ValueError) as error:
        module(**{"bins": 10, "momentum": 0.5, **options})
    for word in words:
        assert word in str(error.value)


def test_more_levels_than_averages():
    density = GradientDensity(2, 0.5, scope="level_ema", num_levels=2)
    with pytest.raises(ValueError, match="num_levels is 2, but the input has 3 levels"):
        density(torch.ones(3, 2, dtype=torch.int64))


def naive_density(norms, epsilon):
    """Equations 5-7: the count in [g - e/2, g + e/2) over the part of it inside [0, 1]."""
    densities = []
    for g in norms:
        low, high = g - epsilon / 2, g + epsilon / 2
        count = sum(1 for other in norms if low <= other < high)
        densities.append(count / (min(high, 1) - max(low, 0)))
    return densities


@pytest.mark.parametrize("epsilon", [1.0, 1 / 3, 1 / 30, 1e-3])
def test_exact_density_is_its_definition(epsilon):
    generator = torch.Generator().manual_seed(4)
    norm = torch.rand(300, generator=generator, dtype=torch.float64) ** 4
    norm = torch.cat([norm, norm.new_tensor([0.0, 0.0, 1.0, 0.5, 0.5, 0.5])])
    norm = norm[torch.randperm(len(norm), generator=generator)]
    expected = norm.new_tensor(naive_density(norm.tolist(), epsilon))
    torch.testing.assert_close(exact_gradient_density(norm, epsilon), expected, rtol=1e-12, atol=0)
    grid = exact_gradient_density(norm.view(2, -1).t(), epsilon)
    torch.testing.assert_close(grid, expected.view(2, -1).t(), rtol=1e-12, atol=0)


def test_exact_density_of_a_uniform_distribution_is_its_size():
    norm = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    torch.testing.assert_close(
        exact_gradient_density(norm, 0.1), torch.full_like(norm, 10_000), rtol=0.002, atol=0
    )


def test_exact_density_of_nothing():
    assert exact_gradient_density(torch.zeros(0), 0.1).shape == (0,)


def test_exact_density_of_an_interval_below_float32s_spacing():
    norm = torch.tensor([0.25, 0.5, 0.5, 0.75])
    density = exact_gradient_density(norm, 1e-8)
    torch.testing.assert_close(density, torch.tensor([1e8, 2e8, 2e8, 1e8]))


@pytest.mark.parametrize("epsilon", [0, -0.1, 1.5, float("nan")])
def test_exact_density_epsilon_out_of_range(epsilon):
    with pytest.raises(ValueError, match=r"epsilon must lie in \(0, 1\], not"):
        exact_gradient_density(torch.rand(5), epsilon)


def test_both_ways_to_count_agree():
    """The one for accelerators, which does not wait for the device, runs on a CPU too."""
    index = torch.randint(0, 31, (7, 501), generator=torch.Generator().manual_seed(0))
    counts = reference.histogram(index, 30)
    assert counts.tolist() == [(index == k).sum().item() for k in range(30)]
    assert torch.equal(reference._histogram_on_device(index.flatten(), 30), counts)


def test_exact_density_of_a_softmax_is_refused():
    cfg = get_cfg()
    cfg.MODEL.GHM.CLS.DENSITY = "exact"
    assert build_ghm_c(cfg).scope == "level"
    with pytest.raises(UsageError, match=r"exact needs sigmoids .*YOLOv3.* set it to unit_regions"):
        build_softmax_ghm_c(cfg)
    cfg.MODEL.GHM.CLS.DENSITY = "exakt"
    with pytest.raises(UsageError, match="one of unit_regions, exact, not 'exakt'"):
        build_softmax_ghm_c(cfg)


def test_foreground_of_any_numbers():
    counts = torch.tensor([[5, 0, 3, 1]])
    expected = GradientDensity(4, 0.5, scope="batch", prior=3.0)
    weights = expected(counts, foreground=torch.tensor(5))
    for dtype in (torch.int32, torch.float32):
        density = GradientDensity(4, 0.5, scope="batch", prior=3.0)
        assert torch.equal(density(counts, foreground=torch.tensor(5, dtype=dtype)), weights)
        assert torch.equal(density.prior_count, expected.prior_count)


def test_averages_of_several_precisions_are_no_work_for_the_kernel():
    density = GradientDensity(4, 0.5, scope="batch", prior=3.0)
    density.ema = density.ema.double()
    density(torch.tensor([[5, 0, 3, 1]]), foreground=torch.tensor(5))
    assert density.ema_foreground.tolist() == [2.5, 0.5]


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_recomputing_is_of_the_whole_batch(reduction, monkeypatch):
    """The samples of another process, whose counts are added up in the first call alone, count."""
    import ghm_d2.losses.harmonized as harmonized

    def with_another_process(count):
        if count.sync:
            count.values, count.world = tuple(3 * value for value in count.values), 2

    monkeypatch.setattr(harmonized, "sum_up", with_another_process)
    logits, labels = torch.randn(8, 2), torch.randint(-1, 3, (8,))
    loss = GHMC.robust(num_classes=2, reduction=reduction)
    first = loss(logits, labels)
    with recomputing():
        torch.testing.assert_close(loss(logits, labels), first)


def test_recomputing_repeats_a_call_and_there_has_to_be_one():
    with recomputing(), pytest.raises(RuntimeError, match="needs an earlier call"):
        GHMC()(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
