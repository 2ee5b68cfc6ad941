"""The weight that a loss leaves to noisy annotations, on samples whose weights are known."""

import math

import pytest
import torch
from detectron2.structures import Instances

from ghm_d2.analysis.loss_inputs import LossInputs
from ghm_d2.analysis.noise import NoiseWeights, foreground_gradients
from ghm_d2.losses import GHMC, GHMR, SmoothL1, bce_loss, focal_loss, ohem_loss, softmax_ce_loss

NONE, CLASS, SHIFT = 0, 1, 2
# of the true class of each foreground row, and of the background's only class
FOREGROUND, BACKGROUND = [0.9, 0.8, 0.3, 0.1], 0.2


def logit(p):
    return math.log(p / (1 - p))


def samples(cls_loss, reg_loss=None, softmax=False):
    """Four foreground anchors of one class, and two background ones."""
    scores = [logit(p) for p in (*FOREGROUND, BACKGROUND, BACKGROUND)]
    logits = torch.tensor(scores)[:, None]
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    if softmax:
        logits = torch.cat([logits, torch.zeros(6, 1)], dim=1)
    deltas = torch.tensor([0.1, 0.1, 0.1, 5.0, 0.0, 0.0])[:, None].repeat(1, 4)
    reg_loss = reg_loss or SmoothL1(0.0, "sum")

    def losses(logits, deltas):
        rows = deltas[0].reshape(-1, 4)[:4]
        return {
            "loss_cls": cls_loss(logits[0].flatten(0, -2), labels),
            "loss_box_reg": reg_loss(rows, torch.zeros_like(rows)),
        }

    parts = ([logits], [deltas]) if softmax else ([logits[None]], [deltas[None]])
    noise = torch.tensor([NONE, NONE, SHIFT, CLASS])
    return LossInputs(*parts, labels, deltas[:4], noise, losses, lambda: 1.0, softmax)


def summary(samples):
    boxes = Instances((9, 9), gt_noise=torch.tensor([NONE, NONE, SHIFT, CLASS]))
    found = NoiseWeights(beta=0.0)
    for _ in range(2):
        found.add(samples, [{"instances": boxes}])
    return found.summary()


@pytest.mark.parametrize(
    ("loss", "softmax"),
    [
        (lambda x, y: bce_loss(x, y, "sum"), False),
        (ohem_loss, False),  # keeps all foreground
        (lambda x, y: softmax_ce_loss(x, y, "sum"), True),
    ],
)
def test_cross_entropy_weighs_all_alike(loss, softmax):
    found = summary(samples(loss, softmax=softmax))
    assert [found[kind]["boxes"] for kind in ("none", "class", "shift")] == [4, 2, 2]
    for kind in ("none", "class", "shift"):
        assert found[kind]["weight"] == pytest.approx(1)
        assert found[kind]["box_weight"] == pytest.approx(1)


def test_focal_loss_by_its_derivative():
    score, plain, _ = foreground_gradients(samples(lambda x, y: focal_loss(x, y, 0.25, 2.0, "sum")))
    # d/dx of -(1 - p)^2 log p, over that of -log p
    factors = [0.25 * ((1 - p) ** 2 - 2 * (1 - p) * p * math.log(p)) for p in FOREGROUND]
    assert (score / plain).tolist() == pytest.approx(factors, rel=1e-5)
    found = summary(samples(lambda x, y: focal_loss(x, y, 0.25, 2.0, "sum")))
    norms = [1 - p for p in FOREGROUND]
    focal = [f * g for f, g in zip(factors, norms, strict=True)]
    mean = sum(focal) / sum(norms)
    clean = (focal[0] + focal[1]) / (norms[0] + norms[1])
    assert found["none"]["weight"] == pytest.approx(clean / mean, rel=1e-4)
    assert found["class"]["weight"] == pytest.approx(factors[3] / mean, rel=1e-4)
    assert found["class"]["weight"] > 2 * found["none"]["weight"], (
        "focal loss takes an outlier for a hard sample"
    )


def test_ghm_c_by_its_density():
    # norms 0.1, 0.2, 0.7, 0.9 and twice 0.2: regions of a half hold 4 and 2 of them
    score, plain, _ = foreground_gradients(samples(GHMC(bins=2, momentum=0.0)))
    assert (score / plain).tolist() == pytest.approx([1 / (2 * n) for n in (4, 4, 2, 2)])
    found = summary(samples(GHMC(bins=2, momentum=0.0)))
    mean = ((0.1 + 0.2) / 4 + (0.7 + 0.9) / 2) / (0.1 + 0.2 + 0.7 + 0.9)
    assert found["none"]["weight"] == pytest.approx(1 / 4 / mean, rel=1e-5)
    assert found["shift"]["weight"] == pytest.approx(1 / 2 / mean, rel=1e-5)


def test_robust_ghm_c_by_its_density_and_prior_count():
    # as above, and four foreground rows: c is 4, and the weights of all six samples add up to 1
    loss = GHMC(bins=2, momentum=0.0, scope="batch", normalizer="weights", prior=1.0)
    score, plain, _ = foreground_gradients(samples(loss))
    factors = [1 / 8, 1 / 8, 1 / 6, 1 / 6]
    total = 4 / 8 + 2 / 6
    assert (score / plain).tolist() == pytest.approx([f / total for f in factors])
    found = summary(samples(loss))
    norms = [0.1, 0.2, 0.7, 0.9]
    mean = sum(f * g for f, g in zip(factors, norms, strict=True)) / sum(norms)
    assert found["none"]["weight"] == pytest.approx(1 / 8 / mean, rel=1e-5)
    assert found["shift"]["weight"] == pytest.approx(1 / 6 / mean, rel=1e-5)


def test_ghm_r_by_its_share_of_the_gradient():
    # 12 coordinates of norm 0.7 and 4 of norm 1 share the gradient of their regions
    found = summary(samples(GHMC(), GHMR(mu=0.1, bins=10, momentum=0.0)))
    near, far = 0.5**0.5, 5 / math.hypot(5, 0.1)
    assert (int(10 * near), int(10 * far)) == (7, 9)
    share = far / (near + far)
    assert found["class"]["box_weight"] == pytest.approx(share / (1 / 4), rel=1e-4)
    assert found["none"]["box_weight"] == pytest.approx((1 - share) / (3 / 4), rel=1e-4)


def test_no_row_no_weight():
    found = NoiseWeights(beta=0.1).summary()
    assert found["shift"] == {"boxes": 0, "weight": None, "box_weight": None}
