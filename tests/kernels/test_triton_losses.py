"""The losses with the Triton kernels, and their gradient density."""

from functools import partial

import pytest
import torch
from device_route import never_waiting
from triton_interpreter import (
    CUDA,
    DEVICE,
    INF,
    NAN,
    T,
    generator,
    interpreter,  # noqa: F401
    make_asl1,
    make_sigmoid,
    make_softmax,
    quiet,
    wide,
)

from ghm_d2 import losses
from ghm_d2.kernels import operators, reference
from ghm_d2.losses.density.gradient_density import EMA_INITS, NORMALIZERS, GradientDensity

pytestmark = quiet
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
ROWS = 40
MAKE = {
    "GHMC": make_sigmoid,
    "SoftmaxGHMC": make_softmax,
    "GHMR": make_asl1,
    "bce_loss": make_sigmoid,
    "focal_loss": make_sigmoid,
}
every_loss = pytest.mark.parametrize("name", MAKE)


def make_loss(name, kernel, device=DEVICE, dtype=torch.float32, **options):
    """A function of tensors, and the module that it is of."""
    make = getattr(losses, name)
    if name.endswith("_loss"):
        return partial(make, kernel=kernel), None
    module = make(bins=10, kernel=kernel, **options).to(device, dtype)

    def of_levels(*tensors):
        counted = module.begin(*([t[:25], t[25:]] for t in tensors))
        losses.sum_up(counted)
        return counted.total()

    return of_levels, module


def loss_and_gradient(loss, tensors):
    x, *rest = tensors
    x = x.detach().requires_grad_()
    value = loss(x, *rest)
    (gradient,) = torch.autograd.grad(2 * value, x)
    return value.detach(), gradient


@every_loss
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)],
    ids=["float64", "float32", "bfloat16"],
)
def test_losses_are_those_of_plain_pytorch(name, dtype, rtol):
    if name == "focal_loss":  # fvcore's is float32
        rtol = max(rtol, 1e-5)
    # the average in float64 where the losses are
    average = torch.promote_types(dtype, torch.float32)
    actual, module = make_loss(name, "triton", dtype=average)
    expected, plain = make_loss(name, "torch", dtype=average)
    for step in range(3):
        tensors = MAKE[name](ROWS, 8, 10, dtype, seed=10 * step)
        loss, gradient = loss_and_gradient(actual, tensors)
        expected_loss, expected_gradient = loss_and_gradient(expected, tensors)
        assert loss.dtype == wide(tensors[0]).dtype and gradient.dtype == dtype
        loss_rtol = min(rtol, 1e-5)  # whatever the inputs, losses are float32
        torch.testing.assert_close(loss, expected_loss.to(loss), rtol=loss_rtol, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=rtol, atol=rtol / 100)
        if module is not None:
            torch.testing.assert_close(module.state_dict(), plain.state_dict())


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_gradcheck(gamma):
    logits, labels = make_sigmoid(3, 4, 5)

    def loss(x):
        return losses.focal_loss(x, labels, gamma=gamma, kernel="triton")

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


LEVELS, BINS = 3, 7


def make_density(dtype=torch.float64, **options):
    options = {"num_levels": LEVELS, "kernel": "torch", **options}
    module = GradientDensity(BINS, **options).to(DEVICE, dtype)
    return module, [module.ema.clone(), module.num_updates.clone(), module.ema_foreground.clone()]


def make_counts(step):
    shape = LEVELS, BINS
    counts = torch.randint(1, 1000, shape, generator=generator(step))
    return (counts * (torch.rand(shape, generator=generator(step + 9)) > 0.4)).to(DEVICE)


def update_density(module, counts, state, world=1, foreground=None):
    names = "momentum", "prior", "own", "normalizer", "ema_init", "training"
    options = [getattr(module, name) for name in names]
    foreground = counts.sum() if foreground is None else foreground
    return T.density(counts, foreground, *state, *options, world / module.num_classes)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("ema_init", EMA_INITS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("scope", ["level", "level_ema"])
def test_density_is_that_of_plain_pytorch(scope, normalizer, ema_init, momentum):
    options = {"momentum": momentum, "normalizer": normalizer, "ema_init": ema_init}
    module, state = make_density(scope=scope, **options)
    for step in range(4):
        module.train(step not in (0, 3))
        counts = make_counts(step)
        weights = update_density(module, counts, state)
        torch.testing.assert_close(weights, module(counts), rtol=1e-12, atol=0)
        torch.testing.assert_close(state, list(module.buffers()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("ema_init", EMA_INITS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_density_with_a_prior_is_that_of_plain_pytorch(normalizer, ema_init, momentum):
    options = {"momentum": momentum, "normalizer": normalizer, "ema_init": ema_init}
    module, state = make_density(scope="batch", prior=3.3, **options)
    for step in range(4):
        module.train(step not in (0, 3))
        counts = make_counts(step)[:1] * (step != 2)
        foreground = counts.sum() // 9
        weights = update_density(module, counts, state, 2, foreground)
        expected = module(counts, 2, foreground)
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(state, list(module.buffers()), rtol=1e-12, atol=0)


def test_densities_of_classes_are_those_of_plain_pytorch():
    options = losses.GHMC.ROBUST | {"num_classes": LEVELS}
    module, state = make_density(**options)
    for step in range(4):
        module.train(step not in (0, 3))
        counts, foreground = make_counts(step), (make_counts(step + 50) // 9)[:, 0]
        assert not foreground.is_contiguous()
        weights = update_density(module, counts, state, 2, foreground)
        expected = module(counts[None], 2, foreground)[0]
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(state, list(module.buffers()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sizes_are_counted_as_plain_pytorch_does(dtype):
    pred, target, valid = make_asl1(531, 4, 10, dtype)
    pred[:8] = torch.tensor([0, 1e-30, 1e30, NAN, INF, -INF, 0.25, 1e9], dtype=dtype)[:, None]
    target[:8], valid[:6] = 0, True
    counts = T.size_counts([pred], [target], [valid])
    assert torch.equal(counts, reference.size_counts(pred, target, valid))
    assert counts.sum() == valid.sum() - 3 * 4
    assert torch.equal(T.size_counts([pred] * 2, [target] * 2, [valid] * 2), 2 * counts)
    assert not T.size_counts([pred[:0]], [target[:0]], [valid[:0]]).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_robust_forms_are_those_of_plain_pytorch(dtype):
    for name in ("GHMC", "SoftmaxGHMC", "GHMR"):
        options = getattr(losses, name).ROBUST
        actual, module = make_loss(name, "triton", dtype=dtype, **options)
        expected, plain = make_loss(name, "torch", dtype=dtype, **options)
        for step in range(3):
            tensors = MAKE[name](ROWS, 8, 10, dtype, seed=10 * step)
            results = loss_and_gradient(actual, tensors), loss_and_gradient(expected, tensors)
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(module.state_dict(), plain.state_dict())


def test_density_weights_grow_with_the_processes():
    counts = make_counts(1)
    strided = counts.repeat_interleave(2, 1)[:, ::2]
    results = []
    for world, counts_of_any_strides in ((1, counts), (4, strided)):
        module, state = make_density(torch.float32, momentum=0.5)
        results.append(update_density(module, counts_of_any_strides, state, world))
    assert torch.equal(results[1], 4 * results[0])


def every_step(device, momentum):
    """Runs each loss and its backward on inputs made beforehand."""
    inputs = {name: [t.to(device) for t in make(ROWS, 8, 10)] for name, make in MAKE.items()}
    run = [
        (make_loss(name, "triton", device, **({} if "_" in name else {"momentum": momentum}))[0], x)
        for name, x in inputs.items()
    ]
    return lambda: [t for loss, tensors in run for t in loss_and_gradient(loss, tensors)], inputs


def test_nothing_reads_a_number_from_the_device(monkeypatch):
    launches = []

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(grid)

    for name in vars(T):
        if name.endswith("_kernel"):
            monkeypatch.setattr(T, name, Launch())
    monkeypatch.setattr(T, "_most_programs", lambda device: 4)
    monkeypatch.setitem(operators.backends, "meta", T)
    for name in operators.SCHEMAS:  # the operators themselves do nothing on such tensors
        monkeypatch.setattr(operators, name, getattr(T, name))
    module, state = make_density(momentum=0.5, ema_init="debias")
    state, counts = [t.to("meta") for t in state], make_counts(1).to("meta")
    run, _ = every_step("meta", 0.75)
    robust, _ = make_loss("GHMR", "triton", "meta", **losses.GHMR.ROBUST)
    boxes = [x.to("meta") for x in make_asl1(ROWS, 4, 10)]
    with never_waiting():
        assert all(x.is_meta for x in [*run(), update_density(module, counts, state)])
        # three passes over all levels, and a density in three of the five losses
        assert len(launches) == 3 * 5 + 3 + 1
        assert all(x.is_meta for x in loss_and_gradient(robust, boxes))
        assert len(launches) == 3 * 5 + 3 + 1 + 3 + 1 + 1  # the sizes too


@needs_gpu
def test_nothing_waits_for_cuda():
    run, _ = every_step("cuda", 0.75)
    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_cuda_graph_replays_on_other_numbers():
    run, inputs = every_step("cuda", momentum=0.0)  # no average that moves on
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x, *_ in inputs.values():
        x.mul_(1.1)
    graph.replay()
    for actual, expected in zip(captured, run(), strict=True):
        assert torch.equal(actual, expected)
