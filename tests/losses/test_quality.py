"""Quality focal and varifocal loss against their papers' equations, and mmdetection's files."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peers import load_mmdet_losses

from ghm_d2.losses import quality_focal_loss, varifocal_loss

K = 3
LOSSES = {"qfl": quality_focal_loss, "vfl": varifocal_loss}


def batch(rows=40, dtype=torch.float64):
    random = torch.Generator().manual_seed(rows)
    logits = 3 * torch.randn(rows, K, generator=random, dtype=dtype)
    labels = torch.randint(-1, K + 1, (rows,), generator=random)
    return logits, labels, torch.rand(rows, generator=random, dtype=dtype)


def equation(name, p, y):
    """One element: p a probability, y its target."""
    bce = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    if name == "qfl":  # arXiv 2006.04388, equation 2, with beta = 2
        return abs(y - p) ** 2 * bce
    # arXiv 2008.13367, equation 2, with alpha = 0.75 and gamma = 2
    return y * bce if y > 0 else -0.75 * p**2 * np.log(1 - p)


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_papers_equation(name):
    logits, labels, quality = batch()
    expected = np.zeros(logits.shape)
    for i, k in np.ndindex(*logits.shape):
        if labels[i] >= 0:
            y = quality[i].item() if labels[i] == k else 0.0
            expected[i, k] = equation(name, 1 / (1 + np.exp(-logits[i, k].item())), y)
    each = LOSSES[name](logits, labels, quality, reduction="none")
    np.testing.assert_allclose(each.numpy(), expected, rtol=1e-10, atol=1e-15)
    total = LOSSES[name](logits, labels, quality, reduction="sum")
    torch.testing.assert_close(total, each.sum())
    mean = LOSSES[name](logits, labels, quality)
    torch.testing.assert_close(mean, each.sum() / (K * (labels >= 0).sum()))


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_ignored_may_be_anything_and_weights_are_of_rows(name):
    logits, labels, quality = batch()
    each = LOSSES[name](logits, labels, quality, reduction="none")
    logits[labels < 0] = torch.nan
    quality[(labels < 0) | (labels == K)] = torch.nan
    weight = torch.rand(len(labels), generator=torch.Generator().manual_seed(2))
    weighed = LOSSES[name](logits, labels, quality, reduction="none", weight=weight)
    torch.testing.assert_close(weighed, each * weight[:, None].double())
    weight[:5] = 0
    kept = weight > 0
    of_kept = LOSSES[name](logits[kept], labels[kept], quality[kept], weight=weight[kept])
    torch.testing.assert_close(
        LOSSES[name](logits, labels, quality, weight=weight), of_kept, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    logits, labels, quality = batch(12)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, labels, quality), logits)
    half = logits.detach().bfloat16()
    assert LOSSES[name](half, labels, quality).dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_but_background_or_nothing_at_all(name):
    logits, labels, quality = batch()
    alone = LOSSES[name](logits, torch.full_like(labels, K), quality, reduction="none")
    p = logits.sigmoid()
    factor = 0.75 if name == "vfl" else 1.0
    torch.testing.assert_close(alone, -factor * p**2 * torch.log1p(-p))
    assert LOSSES[name](logits[:0], labels[:0], quality[:0]) == 0
    with pytest.raises(ValueError, match="quality"):
        LOSSES[name](logits, labels, quality[:3])


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_mmdetections(name):
    file = {"qfl": "gfocal_loss", "vfl": "varifocal_loss"}[name]
    try:
        theirs = load_mmdet_losses(file)
    except ImportError as error:
        pytest.skip(str(error))
    logits, labels, quality = batch()
    kept = labels >= 0
    logits, labels, quality = logits[kept].requires_grad_(), labels[kept], quality[kept]
    if name == "qfl":
        loss = theirs.quality_focal_loss(logits, (labels, quality), reduction="sum")
    else:
        target = F.one_hot(labels, K + 1)[:, :K] * quality[:, None]
        loss = theirs.varifocal_loss(logits, target, reduction="sum")
    ours = LOSSES[name](logits, labels, quality, reduction="sum")
    torch.testing.assert_close(ours, loss)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (ours, loss)]
    torch.testing.assert_close(*gradients)
