"""Counts added up over processes: W of them train as one process with the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ghm_d2.losses import GHMC, GHMR, SoftmaxGHMC
from ghm_d2.losses.density import SCOPES

WORLD, STEPS, FEATURES, CLASSES = 2, 3, 5, 4
SIZES = (30, 8)  # rows of two feature levels, in each process
CASES = [*(f"ghm_c-{scope}" for scope in SCOPES), "softmax", *(f"ghm_r-{s}" for s in SCOPES)]


def build(case, sync):
    kind, _, scope = case.partition("-")
    options = {"sync": sync, "momentum": 0.6}
    if kind == "softmax":
        return SoftmaxGHMC(**options).double()
    loss = {"ghm_c": GHMC, "ghm_r": GHMR}[kind]
    return loss(scope=scope, num_levels=len(SIZES), **options).double()


def data(rank, step):
    """Features, labels and targets of each level; the last process has nothing in step 1."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    levels = []
    for rows in SIZES:
        features = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)
        labels = torch.randint(-1, CLASSES + 1, (rows,), generator=generator)
        target = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
        if step == 1 and rank == WORLD - 1:
            labels.fill_(-1)
        levels.append((features, labels, target))
    return levels


def train(case, sync, ranks):
    """Loss and gradient of each step, and the average at the end, of one process with `ranks`."""
    module = build(case, sync)
    kind = case.partition("-")[0]
    columns = {"ghm_c": CLASSES, "softmax": CLASSES + 1, "ghm_r": 4}[kind]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(FEATURES, columns, generator=generator, dtype=torch.float64)
    weight.requires_grad_()
    steps = []
    for step in range(STEPS):
        parts = zip(*(data(rank, step) for rank in ranks), strict=True)
        levels = [[torch.cat(x) for x in zip(*part, strict=True)] for part in parts]
        features, labels, target = zip(*levels, strict=True)
        pred = [x @ weight for x in features]
        if kind == "softmax":
            loss = module(torch.cat(pred), torch.cat(labels))
        elif kind == "ghm_c":
            loss = sum(module.levels(pred, labels))
        else:
            loss = sum(module.levels(pred, target, [(y >= 0) & (y < CLASSES) for y in labels]))
        steps.append((loss.detach(), torch.autograd.grad(loss, weight)[0]))
    return steps, module.density.ema


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    results = {(case, sync): train(case, sync, [rank]) for case in CASES for sync in (True, False)}
    torch.save(results, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_averaged_gradients_are_those_of_one_process(processes, case):
    steps, average = train(case, True, range(WORLD))
    for step, (loss, gradient) in enumerate(steps):
        of_ranks = [p[case, True][0][step] for p in processes]
        for mine, expected in zip(zip(*of_ranks, strict=True), (loss, gradient), strict=True):
            mean = torch.stack(mine).mean(0)
            torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-12)
    for p in processes:
        torch.testing.assert_close(p[case, True][1], average, rtol=1e-14, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_without_sync_each_process_is_alone(processes, case):
    for rank, p in enumerate(processes):
        steps, average = train(case, False, [rank])
        assert torch.equal(p[case, False][1], average)
        for (loss, gradient), expected in zip(p[case, False][0], steps, strict=True):
            torch.testing.assert_close((loss, gradient), expected, rtol=1e-12, atol=0)
