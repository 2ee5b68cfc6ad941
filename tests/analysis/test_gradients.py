"""Histograms and curves against definitions written down in another way."""

import math

import numpy as np
import pytest
import torch

from ghm_d2.analysis.gradients import BoxGradients, ClassGradients, asl1_norms, histogram
from ghm_d2.config import get_cfg
from ghm_d2.losses import GHMC


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "GHMRetinaNet"
    cfg.MODEL.GHM.CLS.BINS, cfg.MODEL.GHM.REG.BINS = 4, 5
    return cfg


@pytest.fixture
def norms():
    """Many easy samples, few hard ones; none in [0.5, 0.75)."""
    generator = torch.Generator().manual_seed(0)
    easy = torch.rand(5000, generator=generator) ** 4 * 0.5
    return torch.cat([easy, 0.75 + 0.25 * torch.rand(100, generator=generator)])


def measured(cfg, norms) -> ClassGradients:
    gradients = ClassGradients(cfg, 1)
    for part in norms.split(1020):
        gradients.add(part, torch.tensor([1, 3]))  # of five batches and two classes
    return gradients


def at(curves: dict, name: str) -> np.ndarray:
    return np.array(curves[name], dtype=float)  # None becomes NaN


def test_histogram_counts_each_sample_in_its_bin(cfg, norms):
    found = measured(cfg, norms).histogram()
    assert found["edges"] == [round(i / 100, 2) for i in range(101)]
    expected = [0] * 100
    for value in norms.tolist():
        expected[min(math.floor(np.float32(value) * np.float32(100)), 99)] += 1
    assert found["counts"] == expected
    assert histogram(torch.tensor([[0.0, 1.0], [0.999, 0.5]]))["counts"][-1] == 2


def test_cross_entropy_leaves_the_gradient_as_it_is(cfg, norms):
    curves = measured(cfg, norms).curves()
    assert curves["g"][:2] == [0.005, 0.015] and len(curves["g"]) == 100
    assert at(curves, "CE") == pytest.approx(at(curves, "g"), rel=1e-4)


def focal_slope(g, gamma):
    """d/dx of -(1 - p)^gamma log p with 1 - p = g, but for alpha (Lin et al., appendix A)."""
    return g**gamma * (g - gamma * (1 - g) * np.log1p(-g))


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_loss_by_its_derivative_scaled_to_the_same_total(cfg, norms, gamma):
    cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA = gamma
    curves = measured(cfg, norms).curves()
    values = norms.double().numpy()
    scale = values.sum() / focal_slope(values, gamma).sum()
    expected = scale * focal_slope(at(curves, "g"), gamma)
    assert at(curves, "focal") == pytest.approx(expected, rel=1e-3)


def test_ghm_c_divides_by_the_density_scaled_to_the_same_total(cfg, norms):
    curves = measured(cfg, norms).curves()
    values, g = norms.double().numpy(), at(curves, "g")
    counts = [np.sum((values >= k / 4) & (values < (k + 1) / 4)) for k in range(4)]
    assert counts[2] == 0 and counts[3] == 100
    totals = [values[(values >= k / 4) & (values < (k + 1) / 4)].sum() for k in range(4)]
    harmonized = sum(t / c for t, c in zip(totals, counts, strict=True) if c)
    for value, effective in zip(g, at(curves, "GHM-C"), strict=True):
        count = counts[int(value * 4)]
        expected = value / count * sum(totals) / harmonized if count else math.nan
        assert effective == pytest.approx(expected, rel=1e-3, nan_ok=True)
    assert curves["GHM-C"][60] is None, "no sample, no density"


def test_the_robust_form_adds_a_multiple_of_the_foreground_to_the_density(cfg, norms):
    cfg.MODEL.GHM.CLS.PRIOR = 10.0
    found = measured(cfg, norms)
    curves, shares, values = found.curves(), found.shares(), norms.double().numpy()
    region = np.minimum(values * 4, 3).astype(int)
    weights = 1 / (np.bincount(region, minlength=4) + 10 * 5 * 4)  # five batches of four
    expected = values.sum() / (values * weights[region]).sum()
    for g, effective in zip(at(curves, "g"), at(curves, "GHM-C robust"), strict=True):
        k = int(g * 4)
        value = math.nan if k == 2 else g * weights[k] * expected
        assert effective == pytest.approx(value, rel=1e-3, nan_ok=True)
    assert shares["edges"] == [0, 0.25, 0.5, 0.75, 1]
    totals = np.bincount(region, values * weights[region], minlength=4)
    assert at(shares, "GHM-C robust") == pytest.approx(totals / totals.sum(), rel=1e-4)
    plain = np.bincount(region, values, minlength=4)
    assert at(shares, "CE") == pytest.approx(plain / plain.sum(), rel=1e-4)


def test_the_robust_form_has_a_density_for_each_class(cfg, norms):
    """Two classes, the first with three times the foreground."""
    found = ClassGradients(cfg, 2)
    values = norms[:5100].view(-1, 2)
    for part in values.split(510):
        found.add(part, torch.tensor([3, 1]))
    region = np.minimum(values.double().numpy() * 4, 3).astype(int)
    counts = np.stack([np.bincount(region[:, k], minlength=4) for k in range(2)])
    weights = 1 / (counts + GHMC.ROBUST["prior"] * np.array([[15], [5]]))
    weights /= (weights * counts).sum(1, keepdims=True)
    mean = (weights * counts).sum(0) / np.maximum(counts.sum(0), 1)
    own = np.take_along_axis(weights.T, region, 0) * values.double().numpy()
    scale = values.double().sum().item() / own.sum()
    curves = found.curves()
    for g, effective in zip(at(curves, "g"), at(curves, "GHM-C robust"), strict=True):
        k = int(g * 4)
        value = math.nan if k == 2 else g * mean[k] * scale
        assert effective == pytest.approx(value, rel=1e-3, nan_ok=True)
    totals = np.bincount(region.flatten(), own.flatten(), minlength=4)
    assert at(found.shares(), "GHM-C robust") == pytest.approx(totals / totals.sum(), rel=1e-4)


def test_with_one_region_ghm_c_is_cross_entropy(cfg, norms):
    cfg.MODEL.GHM.CLS.BINS = 1
    curves = measured(cfg, norms).curves()
    assert at(curves, "GHM-C") == pytest.approx(at(curves, "CE"), rel=1e-5)


def test_box_losses_by_their_derivatives_scaled_to_the_same_total(cfg):
    d = torch.randn(1000, generator=torch.Generator().manual_seed(1)) ** 3 / 20
    cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA = 0.05
    mu, bins = cfg.MODEL.GHM.REG.MU, 5
    boxes, size = BoxGradients(cfg, d), d.abs().double().numpy()
    curves, median = boxes.curves(), np.median(size)
    assert curves["mu_robust"] == pytest.approx(median, rel=1e-2)
    grid = at(curves, "d")
    assert grid[0] == 0 and 0.95 < np.mean(size <= grid[-1]) < 1

    def norm(x, mu=mu):
        return x / np.sqrt(x**2 + mu**2)

    def ghm_r(x, mu=mu):
        def region(x):
            return np.minimum(np.floor(norm(x, mu) * bins), bins - 1).astype(int)

        counts = np.bincount(region(size), minlength=bins)
        assert (counts > 0).all()
        return norm(x, mu) / counts[region(x)]

    def robust(x):
        return ghm_r(x, curves["mu_robust"])

    def smooth_l1(x):
        return np.minimum(x / 0.05, 1)

    edges = [norm(grid, m) * bins for m in (mu, curves["mu_robust"])]
    away = np.all([np.abs(e - np.round(e)) > 1e-2 for e in edges], axis=0)
    slopes = {"SL1": smooth_l1, "ASL1": norm, "GHM-R": ghm_r, "GHM-R robust": robust}
    for name, slope in slopes.items():
        expected = slope(grid) * smooth_l1(size).sum() / slope(size).sum()
        assert at(curves, name)[away] == pytest.approx(expected[away], rel=1e-3), name
        tenths = [slope(part).sum() for part in np.array_split(np.sort(size), 10)]
        shares = at(boxes.shares(), name)
        assert shares == pytest.approx(np.array(tenths) / np.sum(tenths), rel=1e-2), name
    assert BoxGradients(cfg, d, mu_robust=0.3).curves()["mu_robust"] == 0.3


def test_asl1_norms():
    assert asl1_norms(torch.tensor([0.0, -0.02, 5.0]), 0.02).tolist() == pytest.approx(
        [0, 2**-0.5, 1], abs=1e-4
    )


def test_without_samples_nothing_is_known(cfg):
    found = ClassGradients(cfg, 1)
    curves = found.curves()
    assert curves["focal"] == curves["GHM-C"] == curves["GHM-C robust"] == [None] * 100
    assert found.shares()["CE"] == [None] * 4
