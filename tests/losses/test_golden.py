"""Parity with the implementation that gave the published results, step by step."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ghm_d2.losses import GHMC, GHMR

CASES = np.load(Path(__file__).parents[1] / "golden" / "ghm_reference.npz")
META = json.loads(str(CASES["meta"]))
TOLERANCE = 1e-5


def stored(*path) -> torch.Tensor:
    return torch.from_numpy(CASES["/".join(map(str, path))])


def assert_step(module, inputs, loss, path):
    loss.backward()
    expected = stored(*path, "loss").item()
    assert loss.item() == pytest.approx(expected, rel=TOLERANCE, abs=1e-12)

    gradient = stored(*path, "grad")
    largest = gradient.abs().max().item() if gradient.numel() else 0.0
    torch.testing.assert_close(inputs.grad, gradient, rtol=0, atol=TOLERANCE * largest)

    if module.density.momentum > 0:
        torch.testing.assert_close(
            module.density.ema[0], stored(*path, "ema").float(), rtol=TOLERANCE, atol=0
        )


@pytest.mark.parametrize("case", META["ghm_c"])
def test_ghm_c(case):
    options = META["ghm_c"][case]
    module = GHMC(bins=options["bins"], momentum=options["momentum"])
    for step in range(options["steps"]):
        path = ("c", case, step)
        logits = stored(*path, "logits").requires_grad_()
        assert_step(module, logits, module(logits, stored(*path, "labels")), path)


@pytest.mark.parametrize("case", META["ghm_r"])
def test_ghm_r(case):
    options = META["ghm_r"][case]
    module = GHMR(mu=options["mu"], bins=options["bins"], momentum=options["momentum"])
    for step in range(options["steps"]):
        path = ("r", case, step)
        pred = stored(*path, "pred").requires_grad_()
        loss = module(pred, stored(*path, "target"), stored(*path, "valid"))
        assert_step(module, pred, loss, path)


def test_five_levels_at_once_are_five_steps():
    """`levels` with the default scope does what ten calls in turn do."""
    options = META["ghm_c"]["coco_levels"]
    module = GHMC(bins=options["bins"], momentum=options["momentum"])
    for iteration in range(2):
        paths = [("c", "coco_levels", 5 * iteration + level) for level in range(5)]
        losses = module.levels(
            [stored(*path, "logits") for path in paths], [stored(*path, "labels") for path in paths]
        )
        expected = [stored(*path, "loss").item() for path in paths]
        assert [loss.item() for loss in losses] == pytest.approx(expected, rel=TOLERANCE)
