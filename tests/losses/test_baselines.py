"""The losses that GHM is compared with."""

import math

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss, smooth_l1_loss

from ghm_d2.losses import (
    ASL1,
    BCE,
    OHEM,
    Focal,
    SmoothL1,
    SoftmaxCE,
    bce_loss,
    focal_loss,
    ohem_loss,
    softmax_ce_loss,
)

CLASSES = 3
REDUCTIONS = ["none", "sum", "mean"]
WITH_REDUCTION = [bce_loss, softmax_ce_loss, focal_loss]
SUMS = {
    "bce": lambda x, y: bce_loss(x, y, "sum"),
    "softmax": lambda x, y: softmax_ce_loss(x, y, "sum"),
    "focal": lambda x, y: focal_loss(x, y, reduction="sum"),
    "ohem": ohem_loss,
}


def batch(rows=40, columns=CLASSES, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, columns, generator=generator, dtype=dtype)
    labels = torch.randint(-1, CLASSES + 1, (rows,), generator=generator)
    return logits.requires_grad_(), labels


def one_hot(labels, dtype):
    """K columns; a background row is all 0."""
    return F.one_hot(labels, CLASSES + 1)[:, :-1].to(dtype)


def reduced(elements, labels, reduction):
    """`elements` of the valid rows only."""
    if reduction == "none":
        full = elements.new_zeros(len(labels), *elements.shape[1:])
        full[labels >= 0] = elements
        return full
    return getattr(elements, reduction)()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bce(reduction):
    logits, labels = batch()
    valid = labels >= 0
    target = one_hot(labels[valid], logits.dtype)
    elements = F.binary_cross_entropy_with_logits(logits[valid], target, reduction="none")
    expected = reduced(elements, labels, reduction)
    torch.testing.assert_close(bce_loss(logits, labels, reduction), expected)
    torch.testing.assert_close(BCE(reduction)(logits, labels), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_softmax_ce(reduction):
    logits, labels = batch(columns=CLASSES + 1)
    expected = F.cross_entropy(logits, labels, ignore_index=-1, reduction=reduction)
    torch.testing.assert_close(softmax_ce_loss(logits, labels, reduction), expected)
    torch.testing.assert_close(SoftmaxCE(reduction)(logits, labels), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.5), (-1, 0.0)])
def test_focal_is_fvcores(reduction, alpha, gamma):
    logits, labels = batch(dtype=torch.float32)
    valid = labels >= 0
    target = one_hot(labels[valid], logits.dtype)
    elements = sigmoid_focal_loss(logits[valid], target, alpha, gamma, "none")
    expected = reduced(elements, labels, reduction)
    loss = focal_loss(logits, labels, alpha, gamma, reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(Focal(alpha, gamma, reduction)(logits, labels), expected)
    ours, theirs = (torch.autograd.grad(v.sum(), logits)[0] for v in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def naive_ohem(logits, labels, ratio):
    """All foreground anchors, and the background anchors with the largest losses."""
    total, background, foreground = 0.0, [], 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        loss = sum(
            max(x, 0) - x * (j == label) + math.log1p(math.exp(-abs(x))) for j, x in enumerate(row)
        )
        if 0 <= label < CLASSES:
            total, foreground = total + loss, foreground + 1
        elif label >= CLASSES:
            background.append(loss)
    kept = math.ceil(ratio * max(foreground, 1))
    return total + sum(sorted(background, reverse=True)[:kept])


@pytest.mark.parametrize("ratio", [0.5, 1, 3.0, 1000])
@pytest.mark.parametrize("foreground", [0, 1, 6])
def test_ohem_is_its_definition(ratio, foreground):
    logits, labels = batch(rows=80)
    labels[:foreground] = 1
    labels[foreground:65], labels[65:70] = CLASSES, CLASSES + 3  # both are background
    labels[70:] = -1
    with torch.no_grad():
        logits[: foreground // 2] *= -10  # harder than any background, and no reason to keep less
        logits[: foreground // 2, 1] = -30
    loss = ohem_loss(logits, labels, ratio)
    assert loss.item() == pytest.approx(naive_ohem(logits, labels, ratio), rel=1e-10)
    torch.testing.assert_close(OHEM(ratio)(logits, labels), loss)


def test_ohem_gradient_reaches_the_kept_anchors_only():
    logits, labels = batch(rows=60)
    labels[:4], labels[4:50], labels[50:] = 0, CLASSES, -1
    ohem_loss(logits, labels, 2).backward()
    touched = logits.grad.abs().sum(1) > 0
    assert touched[:4].all() and touched[4:50].sum() == 8 and not touched[50:].any()
    hardest = bce_loss(logits, labels, "none").sum(1)[4:50].topk(8).indices + 4
    assert touched[hardest].all()


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_smooth_l1_is_fvcores(beta, reduction):
    pred, target = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(1)).unbind()
    expected = smooth_l1_loss(pred, target, beta, reduction)
    torch.testing.assert_close(SmoothL1(beta, reduction)(pred, target), expected)


@pytest.mark.parametrize("alpha", [0.25, -1])
def test_focal_and_smooth_l1_in_plain_pytorch_are_fvcores_to_the_bit(alpha):
    logits, labels = batch(dtype=torch.float32)
    valid = (labels >= 0)[:, None]
    target = one_hot(labels.clamp(min=0), logits.dtype)
    cases = (
        (
            focal_loss(logits, labels, alpha, 2.0, "none", kernel="torch"),
            sigmoid_focal_loss(logits, target, alpha, 2.0).where(valid, torch.tensor(0.0)),
        ),
        (
            SmoothL1(0.1, "none")(logits, target),
            smooth_l1_loss(logits, target, 0.1),
        ),
    )
    for ours, theirs in cases:
        assert torch.equal(ours, theirs)
        gradients = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs))
        assert torch.equal(*gradients)


@pytest.mark.parametrize("name", SUMS)
def test_gradcheck(name):
    logits, labels = batch(8, CLASSES + (name == "softmax"))
    assert torch.autograd.gradcheck(lambda x: SUMS[name](x, labels), (logits,))


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("rows", [0, 10])
def test_batches_without_a_valid_row(name, rows):
    logits = torch.randn(rows, CLASSES + (name == "softmax"), requires_grad=True)
    loss = SUMS[name](logits, torch.full((rows,), -1))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("loss", WITH_REDUCTION)
def test_mean_of_nothing_keeps_the_graph(loss):
    for rows in (0, 10):
        logits = torch.randn(rows, CLASSES + (loss is softmax_ce_loss), requires_grad=True)
        value = loss(logits, torch.full((rows,), -1))
        value.backward()
        assert value.item() == 0


@pytest.mark.parametrize("name", SUMS)
def test_ignored_rows_may_hold_anything(name):
    logits, labels = batch(20, CLASSES + (name == "softmax"), torch.float32)
    labels[4] = -1
    expected = SUMS[name](logits, labels)
    spoilt = logits.detach().clone()
    spoilt[4] = math.nan
    loss = SUMS[name](spoilt.requires_grad_(), labels)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(spoilt.grad, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("label", [1, CLASSES])
def test_nan_logits_give_nan(name, label):
    logits, labels = batch(20, CLASSES + (name == "softmax"), torch.float32)
    with torch.no_grad():
        logits[4, 1] = math.nan
    labels[4] = label
    assert SUMS[name](logits, labels).isnan()


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(name, dtype):
    logits, labels = batch(200, CLASSES + (name == "softmax"))
    low = logits.detach().to(dtype).requires_grad_()
    loss = SUMS[name](low, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, SUMS[name](low.float(), labels))
    loss.backward()
    assert low.grad.dtype == dtype and low.grad.isfinite().all()


@pytest.mark.parametrize("loss", WITH_REDUCTION)
def test_unknown_reduction(loss):
    logits, labels = batch(columns=CLASSES + (loss is softmax_ce_loss))
    with pytest.raises(ValueError, match="'median'"):
        loss(logits, labels, reduction="median")


@pytest.mark.parametrize("value", [0, -1, math.inf])
def test_negative_ratio_out_of_range(value):
    for build in (OHEM, lambda r: ohem_loss(*batch(), r)):
        with pytest.raises(ValueError, match=f"negative_ratio must be finite .* not {value}"):
            build(value)


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_beta_out_of_range(value):
    with pytest.raises(ValueError, match=f"beta .* not {value}"):
        SmoothL1(value)


@pytest.mark.parametrize("kind", [BCE, SoftmaxCE, Focal, SmoothL1, ASL1])
def test_an_unknown_reduction_is_refused_when_the_module_is_made(kind):
    with pytest.raises(ValueError, match="reduction must be one of none, mean, sum, not 'median'"):
        kind(reduction="median")
