"""GHM-C over a softmax with feature levels."""

import pytest
import torch
import torch.nn.functional as F

from ghm_d2.losses import SoftmaxGHMC

SIZES = (40, 12, 3)
CLASSES = 4


def levels(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn(n, CLASSES + 1, generator=generator) for n in SIZES]
    labels = [torch.randint(-1, CLASSES + 1, (n,), generator=generator) for n in SIZES]
    return logits, labels


def test_levels_update_one_average_in_turn():
    """The result is as if each level were a batch of its own, one after the other."""
    together, alone = SoftmaxGHMC(), SoftmaxGHMC()
    for seed in range(3):
        logits, labels = levels(seed)
        expected = [alone(x, y) for x, y in zip(logits, labels, strict=True)]
        torch.testing.assert_close(together.levels(logits, labels), expected)
    torch.testing.assert_close(together.density.ema, alone.density.ema)


def test_an_average_of_each_level():
    together = SoftmaxGHMC(scope="level_ema", num_levels=3)
    alone = [SoftmaxGHMC() for _ in SIZES]
    for seed in range(3):
        logits, labels = levels(seed)
        expected = [loss(x, y) for loss, x, y in zip(alone, logits, labels, strict=True)]
        torch.testing.assert_close(together.levels(logits, labels), expected)
    torch.testing.assert_close(together.density.ema, torch.cat([a.density.ema for a in alone]))


def test_one_density_over_all_levels():
    logits, labels = levels()
    together = sum(SoftmaxGHMC(scope="batch").levels(logits, labels))
    torch.testing.assert_close(together, SoftmaxGHMC()(torch.cat(logits), torch.cat(labels)))


@pytest.mark.parametrize("scope", ["level", "batch"])
def test_one_region_without_momentum_is_the_mean(scope):
    logits, labels = levels()
    losses = SoftmaxGHMC(bins=1, momentum=0, scope=scope).levels(logits, labels)
    if scope == "batch":
        expected = F.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=-1)
        torch.testing.assert_close(sum(losses), expected)
    else:
        pairs = zip(logits, labels, strict=True)
        expected = [F.cross_entropy(x, y, ignore_index=-1) for x, y in pairs]
        torch.testing.assert_close(losses, expected)
