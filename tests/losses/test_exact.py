"""GHM-C with the exact density."""

import math

import pytest
import torch
from loss_oracles import CLASSES, batch, sigmoid_samples

from ghm_d2.losses import GHMC, ExactGHMC, exact_ghm_c_loss, exact_gradient_density


def test_exact_loss_is_the_papers_equation():
    logits, labels = batch(GHMC, 40, torch.Generator().manual_seed(16))
    samples = sigmoid_samples(logits.tolist(), labels.tolist())
    norms = torch.tensor([g for _, g, _ in samples.values()], dtype=torch.float64)
    density = exact_gradient_density(norms, 0.1).tolist()
    expected, dense = 0.0, torch.zeros_like(logits)
    for (at, (loss, _, slopes)), gd in zip(samples.items(), density, strict=True):
        expected += loss / gd
        dense[at] = slopes[at] / gd
    loss = exact_ghm_c_loss(logits, labels, 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], dense)


def test_exact_density_with_the_whole_interval_is_the_mean():
    """Every gradient norm lies within 1/2 of every other: the density is N at most."""
    logits = torch.zeros(6, CLASSES, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, CLASSES, CLASSES, -1])
    loss = exact_ghm_c_loss(logits, labels, 1.0)
    assert loss.item() == pytest.approx(math.log(2))


def test_unit_regions_approximate_the_exact_density():
    """The smoother the density looks within a region, the better."""
    generator = torch.Generator().manual_seed(17)
    logits = torch.randn(20_000, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES + 1, (20_000,), generator=generator)
    gaps = []
    for bins in (3, 30, 300):
        exact = exact_ghm_c_loss(logits, labels, 1 / bins).item()
        regions = GHMC(bins=bins, momentum=0.0, normalizer="bins").double()(logits, labels).item()
        gaps.append(abs(regions / exact - 1))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[1] < 0.06 and gaps[2] < 0.01


@pytest.mark.parametrize("rows", [0, 5])
def test_exact_loss_of_nothing_keeps_the_graph(rows):
    logits = torch.randn(rows, CLASSES, requires_grad=True)
    loss = exact_ghm_c_loss(logits, torch.full((rows,), -1), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_exact_loss_of_nan_is_nan():
    logits = torch.zeros(5, CLASSES)
    logits[2, 1] = math.nan
    assert exact_ghm_c_loss(logits, torch.zeros(5, dtype=torch.int64), 0.1).isnan()


@pytest.mark.parametrize("epsilon", [0.0, 1.5, math.nan])
def test_an_epsilon_out_of_range_is_refused_when_the_module_is_made(epsilon):
    with pytest.raises(ValueError, match="epsilon must lie in"):
        ExactGHMC(epsilon)
