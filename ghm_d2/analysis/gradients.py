"""What losses do with the gradients of a detector's samples, as the paper's figures show it.

A sample's *effective gradient* is the norm of its gradient under a loss, where the plain one is
cross entropy's: |p - t| over sigmoids, 1 - p_y over a softmax. For a box coordinate it is the
derivative by d, the difference of predicted and target delta, beside smooth L1's.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ghm_d2.kernels import reference
from ghm_d2.losses import GradientDensity, SmoothL1, asl1_loss, bce_loss, focal_loss

HISTOGRAM_BINS = 100
_CURVE_POINTS = 201
_AT_ONCE = 2**22  # samples; a batch of COCO has a hundred million


def smooth_l1_beta(cfg) -> float:
    """Of the detector that `cfg` describes."""
    keys = _box_keys(cfg)
    return keys.SMOOTH_L1_LOSS_BETA if "SMOOTH_L1_LOSS_BETA" in keys else keys.SMOOTH_L1_BETA


def box_coder_weights(cfg) -> tuple[float, ...]:
    """What the deltas (dx, dy, dw, dh) of the detector that `cfg` describes are multiplied by."""
    return tuple(_box_keys(cfg).BBOX_REG_WEIGHTS)


def _box_keys(cfg):
    arch = cfg.MODEL.META_ARCHITECTURE
    if "RetinaNet" in arch:  # somebody's own too
        return cfg.MODEL.RETINANET
    return cfg.MODEL.SSD if arch == "GHMSSD" else cfg.MODEL.ROI_BOX_HEAD


def histogram(norms: Tensor) -> dict[str, list]:
    """`edges` and `counts` of 100 equal bins in [0, 1], of gradient norms of any shape."""
    return _histogram(_count(norms, HISTOGRAM_BINS))


def asl1_norms(d: Tensor, mu: float) -> Tensor:
    """|d| / sqrt(d^2 + mu^2), of the shape of `d`."""
    _, norm, _ = reference.asl1_samples(d, torch.zeros_like(d), torch.ones_like(d).bool(), mu)
    return norm


class ClassGradients:
    """Classification samples by gradient norm, batch after batch, and what losses do to them.

    The samples of all batches and feature levels are one set here, whatever MODEL.GHM.SCOPE is:
    a curve against g alone has no other way. No moving average takes part.
    """

    def __init__(self, cfg):
        ghm, retinanet = cfg.MODEL.GHM, cfg.MODEL.RETINANET
        self.bins, self.normalizer = ghm.CLS.BINS, ghm.NORMALIZER
        self.alpha, self.gamma = retinanet.FOCAL_LOSS_ALPHA, retinanet.FOCAL_LOSS_GAMMA
        self.counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64)
        self.region_counts = torch.zeros(self.bins, dtype=torch.int64)
        self.region_totals = np.zeros(self.bins)  # sums of gradient norms
        self.focal_total = 0.0

    def add(self, norms: Tensor) -> None:
        """Take in the gradient norms (n,) of a batch."""
        for part in norms.detach().cpu().split(_AT_ONCE):
            region = _regions(part, self.bins)
            self.counts += _count(part, HISTOGRAM_BINS)
            self.region_counts += reference.histogram(region, self.bins)
            # NumPy adds up in double precision
            self.region_totals += np.bincount(region, part, minlength=self.bins)
            self.focal_total += self._focal(part).sum(dtype=torch.float64).item()

    def histogram(self) -> dict[str, list]:
        """As the function of this name."""
        return _histogram(self.counts)

    def curves(self) -> dict[str, list]:
        """Effective gradients at the middles "g" of the histogram's bins.

        Each is scaled so that its total over the samples is cross entropy's. Focal loss's alpha,
        the same for all background, thereby drops out. It is the focal loss of a softmax too: a
        function of p_y alone has half the L1 norm of its gradient where a sigmoid has its
        derivative. GHM-C is None in a unit region that holds no sample.
        """
        g = (_edges()[:-1] + _edges()[1:]) / 2
        total = self.region_totals.sum()
        density = GradientDensity(self.bins, normalizer=self.normalizer, sync=False)
        (weights,) = density(self.region_counts[None])
        region = _regions(g, self.bins)

        def ghm_c(logits, labels):
            loss = bce_loss(logits, labels, "none")
            return reference.harmonized_sum(loss, region[:, None], weights)

        harmonized = _slope(ghm_c, g)
        harmonized[self.region_counts[region] == 0] = float("nan")
        return {
            "g": _rounded(g),
            "CE": _rounded(_slope(lambda x, y: bce_loss(x, y, "sum"), g)),
            "focal": _scaled(self._focal(g), self.focal_total, total),
            "GHM-C": _scaled(harmonized, weights.double().numpy() @ self.region_totals, total),
        }

    def _focal(self, norms: Tensor) -> Tensor:
        def loss(logits, labels):
            return focal_loss(logits, labels, self.alpha, self.gamma, "sum")

        return _slope(loss, norms)


def _slope(loss: Callable[[Tensor, Tensor], Tensor], norms: Tensor) -> Tensor:
    """|d loss / d logit| of background samples with these gradient norms, (n,)."""
    logits = torch.logit(norms, eps=1e-7)[:, None].requires_grad_()
    with torch.enable_grad():
        total = loss(logits, torch.ones(len(logits), dtype=torch.int64))
    (slope,) = torch.autograd.grad(total, logits)
    return slope.squeeze(1).abs()


def box_curves(cfg, d: Tensor) -> dict[str, list]:
    """Effective gradients of box losses at differences "d" from 0 to nearly the largest.

    Args:
        cfg: for MODEL.GHM and smooth L1's beta.
        d: (n,) measured, n > 0. Curves are scaled to smooth L1's total over them.
    """
    mu, bins = cfg.MODEL.GHM.REG.MU, cfg.MODEL.GHM.REG.BINS
    counts = _count(asl1_norms(d, mu), bins)
    density = GradientDensity(bins, normalizer=cfg.MODEL.GHM.NORMALIZER, sync=False)
    (weights,) = density(counts[None])

    def ghm_r(x, zero):
        region = _regions(asl1_norms(x.detach(), mu), bins)
        return reference.harmonized_sum(asl1_loss(x, zero, mu), region, weights)

    def asl1(x, zero):
        return asl1_loss(x, zero, mu, "sum")

    grid = _difference_grid(d, mu)
    losses = {"SL1": SmoothL1(smooth_l1_beta(cfg), "sum"), "ASL1": asl1, "GHM-R": ghm_r}
    totals = {k: derivative(f, d).sum(dtype=torch.float64).item() for k, f in losses.items()}
    slopes = {name: derivative(loss, grid) for name, loss in losses.items()}
    slopes["GHM-R"][counts[_regions(asl1_norms(grid, mu), bins)] == 0] = float("nan")
    scaled = {k: _scaled(x, totals[k], totals["SL1"]) for k, x in slopes.items()}
    return {"d": _rounded(grid), **scaled}


def _difference_grid(d: Tensor, mu: float) -> Tensor:
    """From 0 to where 99 % of the differences lie below, and to ASL1's linear part at least."""
    top = max(np.quantile(d.abs().numpy(), 0.99), 5 * mu)
    return torch.linspace(0, float(top), _CURVE_POINTS)


def derivative(loss: Callable[[Tensor, Tensor], Tensor], d: Tensor) -> Tensor:
    """|d loss / d pred| where pred is `d` and the target 0; of the shape of `d`."""
    d = d.detach().clone().requires_grad_()
    with torch.enable_grad():
        total = loss(d, torch.zeros_like(d))
    (slope,) = torch.autograd.grad(total, d)
    return slope.abs()


def _histogram(counts: Tensor) -> dict[str, list]:
    return {"edges": _rounded(_edges()), "counts": counts.tolist()}


def _edges() -> Tensor:
    return torch.linspace(0, 1, HISTOGRAM_BINS + 1, dtype=torch.float64)


def _regions(norms: Tensor, bins: int) -> Tensor:
    return reference.unit_regions(norms, torch.ones_like(norms).bool(), bins)


def _count(norms: Tensor, bins: int) -> Tensor:
    return reference.histogram(_regions(norms, bins), bins)


def _scaled(values: Tensor, total: float, wanted: float) -> list[float | None]:
    if not total > 0:
        return [None] * len(values)
    return _rounded(values * (wanted / total))


def _rounded(values: Tensor) -> list[float | None]:
    """Six digits of each, None for NaN."""
    return [float(f"{v:.6g}") if v == v else None for v in values.tolist()]
