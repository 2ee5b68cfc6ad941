"""Matching against loops written from SSD, section 2.2."""

import pytest
import torch
from detectron2.structures import Boxes
from tiny_ssd import CLASSES, objects, tiny_ssd

from ghm_d2.modeling.dssd.labels import label_default_boxes


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def naive(boxes, gt, threshold):
    """The object of each box, None for background: best pairs first, then any good overlap."""
    table = [[iou(g, box) for box in boxes] for g in gt]
    match = [None] * len(boxes)
    left = set(range(len(gt)))
    while left:
        pairs = [(table[g][r], g, r) for g in left for r in range(len(boxes)) if match[r] is None]
        best, g, r = max(pairs, default=(0, 0, 0))
        if best <= 0:
            break
        match[r] = g
        left.remove(g)
    for r in range(len(boxes)):
        if match[r] is None:
            best = max(range(len(gt)), key=lambda g: table[g][r])
            match[r] = best if table[best][r] >= threshold else None
    return match


def assert_matches(boxes, gt, threshold):
    labels, matched = label_default_boxes(Boxes(boxes), gt, threshold, CLASSES)
    expected = naive(boxes.double().tolist(), gt.gt_boxes.tensor.double().tolist(), threshold)
    assert labels.dtype == torch.int64 and matched.shape == (len(boxes), 4)
    for r, g in enumerate(expected):
        if g is None:
            assert labels[r] == CLASSES
        else:
            assert labels[r] == gt.gt_classes[g]
            assert torch.equal(matched[r], gt.gt_boxes.tensor[g])
    return expected


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_against_the_paper(seed, threshold):
    """Crowded: most objects compete for boxes."""
    generator = torch.Generator().manual_seed(seed)
    corner = 30 * torch.rand(90, 2, generator=generator)
    boxes = torch.cat([corner, corner + 3 + 12 * torch.rand(90, 2, generator=generator)], dim=1)
    corner = 30 * torch.rand(15, 2, generator=generator)
    gt = torch.cat([corner, corner + 3 + 12 * torch.rand(15, 2, generator=generator)], dim=1)
    expected = assert_matches(boxes, objects(gt.tolist()), threshold)
    assert len({g for g in expected if g is not None}) == 15  # each has one


def test_an_object_has_its_best_box_below_the_threshold():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    labels, _ = label_default_boxes(Boxes(boxes), objects([[0, 0, 2, 2]], [1]), 0.5, CLASSES)
    assert labels.tolist() == [1, CLASSES]


def test_of_two_objects_that_want_one_box_the_worse_takes_its_next():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 40, 40], [50, 50, 60, 60]])
    gt = objects([[0, 0, 9, 9], [0, 0, 10, 10]], [2, 3])
    labels, matched = label_default_boxes(Boxes(boxes), gt, 0.5, CLASSES)
    assert labels.tolist() == [3, 2, CLASSES]
    assert matched[:2].tolist() == [[0, 0, 10, 10], [0, 0, 9, 9]]


def test_the_threshold_itself_matches():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20]])
    labels, _ = label_default_boxes(Boxes(boxes), objects([[0, 0, 10, 10]], [0]), 0.5, CLASSES)
    assert labels.tolist() == [0, 0]


def test_no_object_and_objects_that_overlap_nothing():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    for gt in (objects([]), objects([[5, 5, 5, 9], [90, 90, 99, 99]])):
        labels, matched = label_default_boxes(Boxes(boxes), gt, 0.5, CLASSES)
        assert labels.tolist() == [CLASSES, CLASSES] and matched.shape == (2, 4)


def test_more_objects_than_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10]])
    gt = objects([[0, 0, 9, 9], [0, 0, 10, 10], [1, 1, 9, 9]], [1, 2, 3])
    labels, _ = label_default_boxes(Boxes(boxes), gt, 0.5, CLASSES)
    assert labels.tolist() == [2]


def test_each_picture_of_a_batch_is_matched_alone():
    model = tiny_ssd()
    anchors = model.anchor_generator(
        [torch.zeros(1, 1, *s) for s in [(8, 12), (4, 6), (2, 3), (1, 2)]]
    )
    pictures = [objects([[3, 3, 13, 12]], [1]), objects([]), objects([[10, 0, 90, 64]], [3])]
    labels, boxes = model.label_anchors(anchors, pictures)
    assert [set(y.tolist()) for y in labels] == [{1, 4}, {4}, {3, 4}]
    assert all(y.shape == (sum(map(len, anchors)),) for y in labels)
    assert all(b.shape == (sum(map(len, anchors)), 4) for b in boxes)
