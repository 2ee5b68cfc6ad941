"""Counts added up over processes: W of them train as one process with the whole batch."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ghm_d2.kernels.reference import SIZE_SLOTS
from ghm_d2.losses import GHMC, GHMR, GradientDensity, SoftmaxGHMC
from ghm_d2.losses.density.gradient_density import SCOPES
from ghm_d2.losses.density.sync import Count, alone, sum_up, world_size

STEPS, FEATURES, CLASSES = 4, 5, 4
SIZES = (30, 8)  # rows of two feature levels, in the first process
KINDS = {"ghm_c": (GHMC, CLASSES), "softmax": (SoftmaxGHMC, CLASSES + 1), "ghm_r": (GHMR, 4)}
CASES = [f"{kind}-{scope}" for kind in KINDS for scope in (*SCOPES, "robust")]
# float32: the averages of millions of counts keep it, and so do sums of a few dozen losses
TOLERANCE = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 1e-6)}
WORLDS = (2, pytest.param(4, marks=pytest.mark.slow))


def build(case, dtype, **options):
    kind, _, scope = case.partition("-")
    if scope == "robust":
        options |= {"num_classes": CLASSES} if kind == "ghm_c" else {}
        return KINDS[kind][0].robust(prior=2.0, **options).to(dtype)
    options = {"momentum": 0.6, "scope": scope, "num_levels": len(SIZES), **options}
    return KINDS[kind][0](**options).to(dtype)


def data(rank, world, step, dtype):
    """Features, labels and targets of each level, fewer in each process than in the one before.

    The last process has no valid sample in step 1, and no row in step 2.
    """
    generator = torch.Generator().manual_seed(100 * step + rank)
    last = rank == world - 1
    levels = []
    for rows in SIZES:
        rows = 0 if last and step == 2 else rows // (rank + 1)
        features = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)
        labels = torch.randint(-1, CLASSES + 1, (rows,), generator=generator)
        target = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
        if last and step == 1:
            labels.fill_(-1)
        levels.append((features.to(dtype), labels, target.to(dtype)))
    return levels


def weight_of(case, dtype):
    generator = torch.Generator().manual_seed(1)
    columns = KINDS[case.partition("-")[0]][1]
    return torch.randn(FEATURES, columns, generator=generator).to(dtype).requires_grad_()


def begin(case, module, weight, levels):
    features, labels, target = zip(*levels, strict=True)
    pred = [x @ weight for x in features]
    if case.startswith("ghm_r"):
        return module.begin(pred, target, [(y >= 0) & (y < CLASSES) for y in labels])
    return module.begin(pred, labels)


def train(cases, ranks, world, dtype, **options):
    """Return for each case the loss and gradient of each step, and the buffers at the end.

    The cases' losses share an all-reduce. `ranks`: whose data this process has.
    """
    modules = {case: build(case, dtype, **options) for case in cases}
    weights = {case: weight_of(case, dtype) for case in cases}
    steps = {case: [] for case in cases}
    for step in range(STEPS):
        parts = zip(*(data(rank, world, step, dtype) for rank in ranks), strict=True)
        levels = [[torch.cat(x) for x in zip(*part, strict=True)] for part in parts]
        begun = {case: begin(case, modules[case], weights[case], levels) for case in cases}
        sum_up(*begun.values())
        for case in cases:
            loss = begun[case].total()
            steps[case].append((loss.detach(), torch.autograd.grad(loss, weights[case])[0]))
    return {case: (steps[case], modules[case].state_dict()) for case in cases}


def count_calls(action):
    """Return the result of `action()`, and how often it waited for the other processes."""
    sizes, original = [], dist.all_reduce

    def all_reduce(tensor, *arguments, **options):
        sizes.append((tensor.numel(), tensor.dtype))
        return original(tensor, *arguments, **options)

    dist.all_reduce = all_reduce
    try:
        return action(), sizes
    finally:
        dist.all_reduce = original


def calls_of_single_losses(rank):
    """Without `sum_up` each loss and density has an all-reduce of its own."""
    logits, labels = torch.randn(6, CLASSES), torch.zeros(6, dtype=torch.int64)
    deltas, counts = torch.randn(6, 4), torch.tensor([[rank, 1]])
    density = GradientDensity(2, 0.0)
    actions = (
        lambda: GHMC()(logits, labels),
        lambda: GHMR()(deltas, 2 * deltas),
        lambda: density(counts),
    )
    calls = [len(count_calls(action)[1]) for action in actions]
    assert counts.tolist() == [[rank, 1]]  # the caller's own stay
    return calls


def calls_of_evaluation_and_groups(rank, world):
    """How often rank 0 waits for the others, which do not compute a loss at all."""
    alone_group = dist.new_group([0])
    if rank:
        return []
    logits, labels = torch.randn(6, CLASSES), torch.zeros(6, dtype=torch.int64)
    deltas = torch.randn(6, 4)
    evaluated = [GHMC().eval(), GHMC.robust().eval(), GradientDensity(2, 0.0).eval()]
    losses = [
        lambda: evaluated[0](logits, labels),
        lambda: evaluated[1](logits, labels),
        lambda: evaluated[2](torch.tensor([[1, 2]])),
        lambda: GHMR.robust().eval()(deltas, 2 * deltas),
        lambda: GHMC(process_group=alone_group)(logits, labels),
    ]
    return [len(count_calls(loss)[1]) for loss in losses]


def reduced(rank, world):
    """The terms and the sum of a loss whose beta is 1, of 10 and of 1000 samples."""
    logits = torch.zeros((10, 1000)[rank > 0], 1)
    labels = torch.ones(len(logits), dtype=torch.int64)
    found = {}
    for reduction in ("none", "sum"):
        module = GHMC(bins=1, momentum=0.0, reduction=reduction)
        found[reduction] = module(logits, labels).sum() / len(logits)
    return found


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    results = {}
    for dtype in TOLERANCE:
        joint = lambda dtype=dtype: train(CASES, [rank], world, dtype)  # noqa: E731
        results[dtype], results["calls", dtype] = count_calls(joint)
    results["single"] = calls_of_single_losses(rank)
    unsynced = lambda: train(CASES, [rank], world, torch.float64, sync=False)  # noqa: E731
    results["unsynced"], results["unsynced calls"] = count_calls(unsynced)
    if rank == 0:  # the others do not take part, and would be waited for
        with alone(), alone():
            pass
        with alone():
            results["alone"], results["alone calls"] = count_calls(
                lambda: train(CASES, [rank], world, torch.float64)
            )
    results["reduced"] = reduced(rank, world)
    results["evaluation"] = calls_of_evaluation_and_groups(rank, world)
    results["world"] = world_size()
    torch.save(results, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=WORLDS)
def processes(request, tmp_path_factory):
    world, folder = request.param, tmp_path_factory.mktemp("sync")
    mp.spawn(work, (world, str(folder)), nprocs=world)
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_averaged_gradients_are_those_of_one_process(processes, case, dtype):
    world = len(processes)
    rtol, atol = TOLERANCE[dtype]
    steps, state = train([case], range(world), world, dtype)[case]
    for step, expected in enumerate(steps):
        of_ranks = [p[dtype][case][0][step] for p in processes]
        for mine, one in zip(zip(*of_ranks, strict=True), expected, strict=True):
            assert one.isfinite().all() and one.any()
            torch.testing.assert_close(torch.stack(mine).mean(0), one, rtol=rtol, atol=atol)
    for p in processes:
        for name, buffer in p[dtype][case][1].items():
            assert torch.equal(buffer, state[name]), name  # to the bit, on all processes


def test_all_densities_of_a_step_share_one_small_all_reduce(processes):
    densities = [build(case, torch.float64).density for case in CASES]
    numbers = sum(len(SIZES) * d.num_classes * d.bins for d in densities)
    # the foreground of both forms of GHM-C, and GHM-R's differences
    numbers += CLASSES + 1 + SIZE_SLOTS
    for p in processes:
        for dtype in TOLERANCE:
            assert p["calls", dtype] == [(numbers, torch.int64)] * STEPS
        assert p["single"] == [1, 1, 1]


@pytest.mark.parametrize("case", CASES)
def test_without_sync_each_process_is_alone(processes, case):
    for rank, p in enumerate(processes):
        own = train([case], [rank], len(processes), torch.float64)[case]
        assert_same(p["unsynced"][case], own)
        assert p["unsynced calls"] == []


@pytest.mark.parametrize("case", CASES)
def test_alone_a_process_waits_for_no_other(processes, case):
    first = processes[0]
    assert_same(first["alone"][case], train([case], [0], len(processes), torch.float64)[case])
    assert first["alone calls"] == [] and first["world"] == len(processes)  # and then again


def test_single_losses_and_sums_are_those_of_one_process(processes):
    for p in processes:
        for mean in p["reduced"].values():
            torch.testing.assert_close(mean, torch.tensor(2.0).log())


def test_evaluation_and_a_group_of_one_wait_for_no_other(processes):
    """The other ranks compute nothing: a call would wait for them for ever."""
    assert processes[0]["evaluation"] == [0] * 5


def assert_same(mine, expected):
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("context", [nullcontext, alone])
def test_one_process_keeps_its_counts(context):
    numbers = torch.tensor([[1, 2], [3, 4]])
    count = Count(numbers)
    with context():
        sum_up(count, None, Count(numbers, sync=False))
        assert world_size() == 1
    assert count.value is numbers and count.world == 1
