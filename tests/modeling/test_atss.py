"""ATSS against its paper's algorithm 1, step by step, and in the detectors that have it."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from tiny_models import (
    CLASSES,
    assert_sound_step,
    build,
    ghm_retinanet,
    inputs,
    recorded_losses,
    step,
)

from ghm_d2.errors import UsageError
from ghm_d2.modeling.atss import TOPK, _candidates, label_by_atss

FCOS = {"MODEL.META_ARCHITECTURE": "GHMFCOS", "MODEL.FCOS.NUM_CLASSES": str(CLASSES)}


def levels(per_location, start=0):
    """Anchors of two levels on a field of 64 px: squares and, of two a location, flat boxes too."""
    found = []
    for stride in (8, 16):
        at = torch.arange(stride / 2, 64, stride) + start
        y, x = torch.meshgrid(at, at, indexing="ij")
        center = torch.stack([x, y], -1).reshape(-1, 2).repeat_interleave(per_location, 0)
        half = torch.tensor([[4.0, 4.0], [5.0, 3.0]][:per_location]).repeat(y.numel(), 1) * stride
        found.append(Boxes(torch.cat([center - half / 2, center + half / 2], 1)))
    return found


def instances(boxes, classes):
    objects = Instances((64, 64))
    objects.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    objects.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return objects


def iou_of(a, b):
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    common = np.prod(np.clip(sides, 0, None))
    return common / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - common)


def algorithm(anchors, boxes, classes, per_location):
    """The paper's algorithm 1, an object and an anchor after another."""
    all_anchors = np.concatenate([a.tensor.numpy() for a in anchors])
    centers = (all_anchors[:, :2] + all_anchors[:, 2:]) / 2
    labels, best = np.full(len(all_anchors), CLASSES), np.zeros(len(all_anchors))
    for box, label in zip(np.array(boxes, float), classes, strict=True):
        candidates, start = [], 0
        for level in anchors:
            index = np.arange(start, start + len(level))
            distance = np.linalg.norm(centers[index] - (box[:2] + box[2:]) / 2, axis=1)
            candidates += list(index[np.argsort(distance, kind="stable")[: 9 * per_location]])
            start += len(level)
        ious = np.array([iou_of(all_anchors[i], box) for i in candidates])
        threshold = ious.mean() + ious.std(ddof=1)
        for i, iou in zip(candidates, ious, strict=True):
            inside = (centers[i] > box[:2] + 0.01).all() and (centers[i] < box[2:] - 0.01).all()
            if iou >= threshold and inside and iou > best[i]:
                labels[i], best[i] = label, iou
    return labels


# no object is as far from two anchors at the edge of its candidates
@pytest.mark.parametrize("per_location", [1, 2])
@pytest.mark.parametrize(
    "boxes",
    [
        [[9.3, 11.1, 42.9, 40.2]],
        [[9.3, 11.1, 42.9, 40.2], [13.1, 7.7, 44.2, 45.9], [40.3, 38.1, 61.7, 63.3]],
        [[30.3, 30.1, 33.9, 32.2]],
    ],
)
def test_it_is_the_papers_algorithm(boxes, per_location):
    anchors, classes = levels(per_location), list(range(len(boxes)))
    gt = instances(boxes, classes)
    (labels,), (matched,) = label_by_atss(anchors, [gt], CLASSES, per_location)
    expected = algorithm(anchors, boxes, classes, per_location)
    np.testing.assert_array_equal(labels.numpy(), expected)
    for i, label in enumerate(labels.tolist()):
        if label < CLASSES:
            assert torch.equal(matched[i], gt.gt_boxes.tensor[label])
    if len(boxes) > 1:
        assert set(expected) == {0, 1, 2, CLASSES}


def test_the_nearest_anchors_are_found_far_from_the_corner_of_a_large_image():
    """Distances from matrix products of coordinates of 6000 px would be wrong by up to 3 px."""
    fine, _ = levels(1, start=6000)
    corner = 6000 + 40 * torch.rand(10, 2, generator=torch.Generator().manual_seed(0))
    objects = Boxes(torch.cat([corner, corner + 20], 1))
    centers = (boxes.get_centers().double() for boxes in (objects, fine))
    nearest = torch.cdist(*centers).topk(TOPK, largest=False).indices
    found = _candidates([fine], objects, 1)
    assert found.gather(1, nearest).all() and (found.sum(1) == TOPK).all()


def test_without_objects_all_is_background():
    (labels,), (boxes,) = label_by_atss(levels(1), [instances([], [])], CLASSES)
    assert (labels == CLASSES).all() and boxes.shape == (len(labels), 4)


@pytest.mark.parametrize("cls", ["focal", "ghm_c", "qfl", "vfl"])
@pytest.mark.parametrize("detector", ["retinanet", "fcos"])
def test_detectors_train_with_it(detector, cls):
    if detector == "retinanet":
        model = ghm_retinanet(cls, "smooth_l1", {"MODEL.RETINANET.ASSIGNMENT": "atss"})
    else:
        keys = {"MODEL.FCOS.ASSIGNMENT": "atss", "MODEL.FCOS.CLS_LOSS_TYPE": cls}
        model = build("RetinaNet", {**FCOS, **keys})
    batch = inputs((4, 0), seed=1)
    (_, _, labels, *_), _ = recorded_losses(model, batch, lambda b: step(model, b))
    assert 0 < (labels[0] < CLASSES).sum() < len(labels[0]) and (labels[1] == CLASSES).all()
    assert_sound_step(model, batch, [model.head])


def test_an_unknown_assignment_is_named():
    with pytest.raises(UsageError, match=r"RETINANET\.ASSIGNMENT must be one of iou, atss"):
        ghm_retinanet(keys={"MODEL.RETINANET.ASSIGNMENT": "simota"})
