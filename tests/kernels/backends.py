"""The backends of the kernels side by side, on samples of every loss."""

import math

import pytest
import torch

from ghm_d2.kernels import cpu
from ghm_d2.losses import GHMC, GHMR, SoftmaxGHMC

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
LOSSES = {"sigmoid": GHMC, "softmax": SoftmaxGHMC, "asl1": GHMR}

needs_library = pytest.mark.skipif(not cpu.available(), reason="the C library is not built")


def batch(samples, rows, columns, dtype=torch.float32, seed=0, spread=4.0):
    """Tensors of one level: predictions first, with labels or valid masks of every sort."""
    random = torch.Generator().manual_seed(seed)
    pred = spread * torch.randn(rows, columns, generator=random, dtype=dtype)
    if samples == "asl1":
        target = torch.randn(rows, columns, generator=random, dtype=dtype)
        valid = torch.rand(rows, columns, generator=random) < 0.8
        return [pred, torch.where(valid, target, math.nan), valid]
    classes = columns - (samples == "softmax")
    return [pred, torch.randint(-1, classes + 1, (rows,), generator=random)]


def run(samples, kernel, levels, steps=2, make=None, **options):
    """Losses, gradients and moving average after some steps on the same levels."""
    module = (make or LOSSES[samples])(kernel=kernel, **options)
    if levels[0][0].dtype == torch.float64:
        module.double()
    for _ in range(steps):
        leaves = [level[0].detach().requires_grad_() for level in levels]
        others = [level[1:] for level in levels]
        if samples == "softmax":
            losses = [module(leaves[0], *others[0])]
        else:
            losses = module.levels(leaves, *zip(*others, strict=True))
        gradients = torch.autograd.grad(sum(losses), leaves)
    return losses, gradients, module.density.ema


def assert_backends_agree(samples, levels, **options):
    tolerance = TOLERANCE[levels[0][0].dtype]
    mine, expected = (run(samples, kernel, levels, **options) for kernel in ("c", "torch"))
    for a, b in zip(mine[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-12)
    for a, b in zip(mine[1], expected[1], strict=True):
        largest = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)
    torch.testing.assert_close(mine[2], expected[2], rtol=1e-6, atol=0)
