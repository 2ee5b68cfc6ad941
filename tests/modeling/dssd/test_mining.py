"""Hard negative mining against a loop written from SSD, section 2.2."""

import math

import pytest
import torch

from ghm_d2.modeling.dssd.mining import mined_ce_loss

CLASSES = 3


def cross_entropy(row, label):
    return math.log(sum(math.exp(x) for x in row)) - row[label]


def naive(logits, labels, ratio):
    total = 0.0
    for image, gt in zip(logits.tolist(), labels.tolist(), strict=True):
        losses = [cross_entropy(row, label) for row, label in zip(image, gt, strict=True)]
        objects = [x for x, label in zip(losses, gt, strict=True) if label < CLASSES]
        others = [x for x, label in zip(losses, gt, strict=True) if label == CLASSES]
        hardest = sorted(others, reverse=True)[: int(len(objects) * ratio)]
        total += sum(objects) + sum(hardest)
    return total


def batch(images=4, boxes=60, seed=0):
    """The second image has no object, the third hardly anything else."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, boxes, CLASSES + 1, generator=generator, dtype=torch.float64)
    labels = torch.full((images, boxes), CLASSES)
    for image, number in enumerate([5, 0, boxes - 3, 7][:images]):
        labels[image, :number] = torch.randint(0, CLASSES, (number,), generator=generator)
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("ratio", [3.0, 1.0, 0.5, 0.0, 1000.0])
@pytest.mark.parametrize("seed", range(3))
def test_against_the_paper(ratio, seed):
    logits, labels = batch(seed=seed)
    loss = mined_ce_loss(logits, labels, ratio)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(naive(logits, labels, ratio), rel=1e-12)


def test_gradients_are_of_the_chosen_boxes_alone():
    logits, labels = batch()
    mined_ce_loss(logits, labels, 3.0).backward()
    used = logits.grad.abs().sum(-1) > 0
    foreground = labels < CLASSES
    assert used[foreground].all()
    assert (used & ~foreground).sum(1).tolist() == [15, 0, 3, 21]


def test_half_precision_is_computed_in_single():
    logits, labels = batch()
    half = logits.detach().to(torch.bfloat16)
    loss = mined_ce_loss(half, labels, 3.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive(half.double(), labels, 3.0), rel=1e-5)
