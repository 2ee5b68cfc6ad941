"""The effect of losses on the gradients of a detector's samples, as the paper's figures show it.

A sample's *effective gradient* is the norm of its gradient under a loss. The plain one is cross
entropy's: |p - t| for sigmoids, 1 - p_y for a softmax. For a box coordinate it is the derivative
with respect to d, the predicted minus the target delta, and the plain one is smooth L1's.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ghm_d2.kernels import reference
from ghm_d2.losses import GHMC, GHMR, GradientDensity, SmoothL1, asl1_loss, bce_loss, focal_loss

HISTOGRAM_BINS = 100
_CURVE_POINTS = 201
_AT_ONCE = 2**22  # samples processed at once; a batch of COCO has a hundred million


def smooth_l1_beta(cfg) -> float:
    """The beta of the smooth L1 loss of the detector that `cfg` describes."""
    keys = _box_keys(cfg)
    return keys.SMOOTH_L1_LOSS_BETA if "SMOOTH_L1_LOSS_BETA" in keys else keys.SMOOTH_L1_BETA


def box_coder_weights(cfg) -> tuple[float, ...]:
    """The factors on the deltas (dx, dy, dw, dh) of the detector that `cfg` describes."""
    return tuple(_box_keys(cfg).BBOX_REG_WEIGHTS)


def _box_keys(cfg):
    arch = cfg.MODEL.META_ARCHITECTURE
    if "RetinaNet" in arch:  # also custom subclasses
        return cfg.MODEL.RETINANET
    return cfg.MODEL.SSD if arch == "GHMSSD" else cfg.MODEL.ROI_BOX_HEAD


def histogram(norms: Tensor) -> dict[str, list]:
    """Return `edges` and `counts` of gradient norms of any shape, in 100 equal bins of [0, 1]."""
    return _histogram(_count(norms, HISTOGRAM_BINS))


def asl1_norms(d: Tensor, mu: float) -> Tensor:
    """Return GHM-R's gradient norm |d| / sqrt(d^2 + mu^2), in the shape of `d`."""
    _, norm, _ = reference.asl1_samples(d, torch.zeros_like(d), torch.ones_like(d).bool(), mu)
    return norm


def moving_mu(model: nn.Module) -> float | None:
    """Return mu of the model's GHM-R if it follows the data; None otherwise."""
    losses = [m for m in model.modules() if isinstance(m, GHMR) and m.sizes.quantile]
    return float(losses[0].mu) if losses else None


class ClassGradients:
    """Counts classification samples by gradient norm, and computes the effect of losses on them.

    The samples of all batches and feature levels form one set, whatever MODEL.GHM.SCOPE is, because
    the curves depend on g alone. Moving averages are not used.
    """

    def __init__(self, cfg, num_densities: int):
        """
        Args:
            cfg: the run's configuration, for MODEL.GHM.CLS and focal loss's alpha and gamma.
            num_densities: number of densities in the robust form; 1 for a softmax.
        """
        ghm, retinanet = cfg.MODEL.GHM, cfg.MODEL.RETINANET
        self.bins, self.prior = ghm.CLS.BINS, ghm.CLS.PRIOR or GHMC.ROBUST["prior"]
        self.alpha, self.gamma = retinanet.FOCAL_LOSS_ALPHA, retinanet.FOCAL_LOSS_GAMMA
        self.counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64)
        self.region_counts = torch.zeros(num_densities, self.bins, dtype=torch.int64)
        # sums of the gradients under cross entropy and focal loss
        self.region_totals = {
            name: np.zeros((num_densities, self.bins)) for name in ("CE", "focal")
        }
        self.foreground = torch.zeros(num_densities, dtype=torch.int64)
        self.batches = 0

    def add(self, norms: Tensor, foreground: Tensor) -> None:
        """Add a batch.

        Args:
            norms: (n,) or (n, K) gradient norms.
            foreground: (K,), number of foreground rows of each class.
        """
        classes, shape = len(self.foreground), self.region_counts.shape
        self.foreground += foreground.cpu() if classes > 1 else foreground.cpu().sum()
        self.batches += 1
        rows = norms.detach().cpu().view(-1, classes)
        for part in rows.split(max(1, _AT_ONCE // classes)):
            region = reference.unit_regions(part, torch.ones_like(part).bool(), self.bins, True)
            region, flat = region.flatten(), part.flatten()
            self.counts += _count(flat, HISTOGRAM_BINS)
            self.region_counts += reference.histogram(region, shape.numel()).view(shape)
            for name, slopes in (("CE", flat), ("focal", self._focal(flat))):
                # NumPy adds up in double precision
                sums = np.bincount(region, slopes, minlength=shape.numel())
                self.region_totals[name] += sums.reshape(shape)

    def histogram(self) -> dict[str, list]:
        """Return the histogram of the gradient norms, in the form of the function `histogram`."""
        return _histogram(self.counts)

    def curves(self) -> dict[str, list]:
        """Return effective gradients at the middles "g" of the histogram's bins.

        Each curve is scaled so that its total over the samples is cross entropy's. This cancels
        focal loss's alpha, which is the same for all background. The curve of focal loss is right
        for a softmax too: half the L1 norm of the gradient of a function of p_y equals a sigmoid's
        derivative. GHM-C is None in a unit region that holds no sample.
        """
        g = (_edges()[:-1] + _edges()[1:]) / 2
        region, totals = _regions(g, self.bins), self._totals()
        slopes = {
            "CE": _slope(lambda x, y: bce_loss(x, y, "sum"), g),
            "focal": self._focal(g),
            **{name: g * weights[region] for name, weights in self._weights().items()},
        }
        for name in slopes.keys() - {"CE", "focal"}:
            slopes[name][self.region_counts.sum(0)[region] == 0] = float("nan")
        wanted = totals["CE"].sum()
        scaled = {name: _scaled(x, totals[name].sum(), wanted) for name, x in slopes.items()}
        return {"g": _rounded(g), **scaled}

    def shares(self) -> dict[str, list]:
        """Return each unit region's share of each loss's gradient; "edges" bound the regions."""
        edges = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64)
        return {"edges": _rounded(edges), **_shares(self._totals())}

    def _totals(self) -> dict[str, np.ndarray]:
        """Return each loss's sums of gradients over the samples of each region."""
        totals = dict(self.region_totals)
        for name, weights in self._weights_by_class().items():
            totals[name] = totals["CE"] * weights.double().numpy()
        return {name: total.sum(0) for name, total in totals.items()}

    def _weights(self) -> dict[str, Tensor]:
        """Return a sample's weight in each region, (bins,): the mean over the classes' samples."""
        share = self.region_counts / self.region_counts.sum(0).clamp(min=1)
        return {name: (share * w).sum(0) for name, w in self._weights_by_class().items()}

    def _weights_by_class(self) -> dict[str, Tensor]:
        """Return a sample's weight by class and region, (K, bins), up to a factor."""
        together = self.region_counts.sum(0, keepdim=True)
        return {
            "GHM-C": _density_weights(together, 0.0, self.foreground.sum()),
            # a batch's foreground counts as at least 1
            "GHM-C robust": _density_weights(
                self.region_counts, self.prior, self.foreground.clamp(min=self.batches)
            ),
        }

    def _focal(self, norms: Tensor) -> Tensor:
        def loss(logits, labels):
            return focal_loss(logits, labels, self.alpha, self.gamma, "sum")

        return _slope(loss, norms)


def _slope(loss: Callable[[Tensor, Tensor], Tensor], norms: Tensor) -> Tensor:
    """Return |d loss / d logit| of background samples with these gradient norms, (n,)."""
    logits = torch.logit(norms, eps=1e-7)[:, None].requires_grad_()
    with torch.enable_grad():
        total = loss(logits, torch.ones(len(logits), dtype=torch.int64))
    (slope,) = torch.autograd.grad(total, logits)
    return slope.squeeze(1).abs()


class BoxGradients:
    """Computes the gradients of box losses at measured differences of predicted and target deltas.

    The published forms, ASL1 and "GHM-R", have the mu of `cfg`; "GHM-R robust" has its own.
    """

    def __init__(self, cfg, d: Tensor, mu_robust: float | None = None):
        """
        Args:
            cfg: the run's configuration, for MODEL.GHM.REG and smooth L1's beta.
            d: (n,) measured differences, n > 0, in the unit of the head's deltas.
            mu_robust: the current mu of a loss whose mu follows the data; None takes the quantile
                of |d| that it would follow.
        """
        keys = cfg.MODEL.GHM.REG
        self.d, self.bins, self.mu = d, keys.BINS, keys.MU
        quantile = keys.MU_QUANTILE or GHMR.ROBUST["mu_quantile"]
        least = torch.finfo(d.dtype).eps  # mu must be above 0
        self.mu_robust = mu_robust or max(float(np.quantile(d.abs().numpy(), quantile)), least)
        prior = keys.PRIOR or GHMR.ROBUST.get("prior", 0.0)
        self.losses = {
            "SL1": SmoothL1(smooth_l1_beta(cfg), "sum"),
            "ASL1": lambda x, zero: asl1_loss(x, zero, self.mu, "sum"),
            "GHM-R": self._ghm_r(self.mu, 0.0),
            "GHM-R robust": self._ghm_r(self.mu_robust, prior),
        }
        self._slopes = {name: derivative(loss, d) for name, loss in self.losses.items()}

    def curves(self) -> dict[str, list]:
        """Return effective gradients at differences "d" from 0 to nearly the largest.

        Each curve is scaled so that its total over the samples is smooth L1's. GHM-R is None in a
        unit region that holds no sample. "mu" and "mu_robust" are the values used for the curves.
        """
        grid = _difference_grid(self.d, max(self.mu, self.mu_robust))
        slopes = {name: derivative(loss, grid) for name, loss in self.losses.items()}
        for name, mu in (("GHM-R", self.mu), ("GHM-R robust", self.mu_robust)):
            counts = _count(asl1_norms(self.d, mu), self.bins)
            slopes[name][counts[_regions(asl1_norms(grid, mu), self.bins)] == 0] = float("nan")
        totals = {name: x.sum(dtype=torch.float64).item() for name, x in self._slopes.items()}
        scaled = {name: _scaled(x, totals[name], totals["SL1"]) for name, x in slopes.items()}
        found = {"d": _rounded(grid), **scaled}
        return found | {"mu": self.mu, "mu_robust": float(f"{self.mu_robust:.6g}")}

    def shares(self) -> dict[str, list]:
        """Return each tenth's share of each loss's gradient, for coordinates sorted by |d|.

        "edges" bound the tenths: shares of coordinates with a smaller |d|, from 0 to 1.
        """
        order = self.d.abs().argsort()
        totals = {
            name: np.array([part.sum() for part in np.array_split(x[order].double().numpy(), 10)])
            for name, x in self._slopes.items()
        }
        return {"edges": [k / 10 for k in range(11)], **_shares(totals)}

    def _ghm_r(self, mu: float, prior: float) -> Callable[[Tensor, Tensor], Tensor]:
        counts = _count(asl1_norms(self.d, mu), self.bins)
        weights = _density_weights(counts[None], prior, torch.tensor(self.d.numel()))[0]

        def loss(x, zero):
            region = _regions(asl1_norms(x.detach(), mu), self.bins)
            return reference.harmonized_losses(asl1_loss(x, zero, mu), region, weights).sum()

        return loss


def _density_weights(counts: Tensor, prior: float, foreground: Tensor) -> Tensor:
    """Return a sample's weight by class and unit region, (K, bins), for a batch with these counts.

    The summed counts of several batches give the weights of their mean, up to a factor.
    """
    classes, bins = counts.shape
    options = {"scope": "batch", "normalizer": "weights", "prior": prior, "sync": False}
    density = GradientDensity(bins, num_classes=classes, **options)
    if classes == 1:
        return density(counts, foreground=foreground.sum())
    return density(counts[None], foreground=foreground)[0]


def _shares(totals: dict[str, np.ndarray]) -> dict[str, list]:
    sums = {name: x.sum() for name, x in totals.items()}
    return {name: _scaled(torch.tensor(x), sums[name], 1.0) for name, x in totals.items()}


def _difference_grid(d: Tensor, mu: float) -> Tensor:
    """Return differences from 0 to the 99 % quantile of |d|, but at least to ASL1's linear part."""
    top = max(np.quantile(d.abs().numpy(), 0.99), 5 * mu)
    return torch.linspace(0, float(top), _CURVE_POINTS)


def derivative(loss: Callable[[Tensor, Tensor], Tensor], d: Tensor) -> Tensor:
    """Return |d loss / d pred| for the prediction `d` and the target 0, in the shape of `d`."""
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
    """Return the values rounded to six digits, None for NaN."""
    return [float(f"{v:.6g}") if v == v else None for v in values.tolist()]
