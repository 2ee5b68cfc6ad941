"""The prior that learns an object, against loops written from the paper's section 2.1."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from tiny_yolov3 import ANCHORS, CLASSES, SIZE, STRIDES, anchors_of, truth, yolov3

from ghm_d2.modeling.yolov3.labels import anchor_deltas, box_values, encode_boxes

IGNORE_IOU = 0.5


@pytest.fixture(scope="module")
def model():
    return yolov3()


def labels_of(model, instances, size=SIZE):
    labels, boxes = model.label_anchors(anchors_of(model, size), [instances])
    return labels[0], boxes[0]


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def places(size=SIZE):
    """Yield (level, row, column, prior) of each anchor, in their order."""
    for level, stride in enumerate(STRIDES):
        for row in range(size[0] // stride):
            for column in range(size[1] // stride):
                for a in range(3):
                    yield level, row, column, a


def naive_labels(boxes, classes, size=SIZE):
    """Labels, and the index of the object of each positive anchor."""
    owners = {}
    for g, (x0, y0, x1, y1) in enumerate(boxes):
        shapes = [(level, a) for level in range(3) for a in range(3)]
        overlap = [iou((0, 0, x1 - x0, y1 - y0), (0, 0, *ANCHORS[level][a])) for level, a in shapes]
        level, a = shapes[overlap.index(max(overlap))]
        stride = STRIDES[level]
        column = min(math.floor((x0 + x1) / 2 / stride), size[1] // stride - 1)
        row = min(math.floor((y0 + y1) / 2 / stride), size[0] // stride - 1)
        owners[level, row, column, a] = g
    labels = []
    for place in places(size):
        level, row, column, a = place
        w, h = ANCHORS[level][a]
        x, y = (column + 0.5) * STRIDES[level], (row + 0.5) * STRIDES[level]
        prior = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        if place in owners:
            labels.append(classes[owners[place]])
        else:
            near = any(iou(prior, box) > IGNORE_IOU for box in boxes)
            labels.append(-1 if near else CLASSES)
    return labels, [owners.get(place) for place in places(size)]


@pytest.mark.parametrize("seed", range(5))
def test_as_in_the_paper(model, seed):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(12, 2, generator=generator) * torch.tensor([SIZE[1], SIZE[0]])
    side = 2 ** (2.5 + 3.2 * torch.rand(12, 1, generator=generator))  # 6 to 52 px
    side = side * (0.7 + 0.6 * torch.rand(12, 2, generator=generator))
    boxes = torch.cat([centre - side / 2, centre + side / 2], dim=1).tolist()
    classes = torch.randint(0, CLASSES, (12,), generator=generator).tolist()
    labels, matched = labels_of(model, truth(boxes, classes))
    expected, owners = naive_labels(boxes, classes)
    assert labels.tolist() == expected
    assert len([o for o in owners if o is not None]) >= 8
    for box, owner in zip(matched, owners, strict=True):
        if owner is not None:
            assert box.tolist() == pytest.approx(boxes[owner])


def test_priors_that_fit_but_are_not_the_best_are_ignored(model):
    """The object is the prior 20x20 at its cell, moved by a pixel: 16x22 and 22x16 overlap too."""
    labels, _ = labels_of(model, truth([[31, 30, 51, 50]], [2]))
    expected, _ = naive_labels([[31, 30, 51, 50]], [2])
    assert labels.tolist() == expected
    assert (labels == 2).sum() == 1 and (labels == -1).sum() >= 2


def test_form(model):
    labels, boxes = labels_of(model, truth([[10, 10, 20, 22]]))
    anchors = sum(len(a) for a in anchors_of(model))
    assert labels.shape == (anchors,) and labels.dtype == torch.int64
    assert boxes.shape == (anchors, 4)


def test_without_an_object_all_is_background(model):
    labels, boxes = labels_of(model, truth([]))
    assert (labels == CLASSES).all() and boxes.isfinite().all()


def test_every_object_has_one_anchor_however_odd_it_is(model):
    """None of these overlaps a prior by half."""
    boxes = [[10, 10, 11, 60], [20, 5, 90, 6], [50, 50, 50.5, 50.5]]
    labels, _ = labels_of(model, truth(boxes, [0, 1, 2]))
    assert sorted(labels[(labels >= 0) & (labels < CLASSES)].tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("box", "column", "row"),
    [
        ([90, 30, 102, 36], 11, 4),  # its centre is at the width, 96
        ([20, 59, 30, 69], 3, 7),  # and at the height, 64
        ([94, 62, 98, 66], 11, 7),
        ([-6, -6, 4, 4], 0, 0),  # its centre is outside
    ],
)
def test_a_centre_on_the_border_or_outside_is_in_the_nearest_cell(model, box, column, row):
    labels, matched = labels_of(model, truth([box], [3]))
    (index,) = (labels == 3).nonzero().flatten().tolist()
    assert list(places())[index][:3] == (0, row, column)
    anchor = anchors_of(model)[0].tensor[index]
    values = encode_boxes(anchor, matched[index], STRIDES[0])
    assert values.isfinite().all() and values[:2].min() >= 0 and values[:2].max() <= 1


def test_boxes_without_an_area_are_no_objects(model):
    sound = [10, 10, 20, 22]
    bad = [[30, 30, 30, 40], [30, 30, 40, 30], [50, 50, 40, 60], [float("nan")] * 4]
    labels, boxes = labels_of(model, truth([*bad, sound, *bad], [1] * 4 + [2] + [1] * 4))
    alone, _ = labels_of(model, truth([sound], [2]))
    assert torch.equal(labels, alone) and (alone == 2).sum() == 1
    assert boxes[labels == 2].tolist() == [sound]
    labels, _ = labels_of(model, truth(bad))
    assert (labels == CLASSES).all()


def test_of_two_objects_on_one_anchor_the_later_has_it(model):
    first, second = [10, 10, 20, 16], [10, 10.5, 20, 16.5]
    for boxes in ([first, second], [second, first]):
        labels, matched = labels_of(model, truth(boxes, [0, 1]))
        assert (labels == 1).sum() == 1 and (labels == 0).sum() == 0
        assert matched[labels == 1].tolist() == [boxes[1]]


def test_padding_is_background_and_moves_nothing(model):
    """The same picture in a batch whose other picture is larger."""
    objects = truth([[10, 10, 20, 22], [30, 20, 70, 60]], [0, 1])
    labels, _ = labels_of(model, objects)
    padded, _ = labels_of(model, objects, size=(96, 160))
    small = dict(zip(places(), labels.tolist(), strict=True))
    large = dict(zip(places((96, 160)), padded.tolist(), strict=True))
    assert all(large[place] == label for place, label in small.items())
    assert {label for place, label in large.items() if place not in small} <= {-1, CLASSES}


def test_decoding_undoes_encoding(model):
    """By the deltas and the transform of Detectron2 that the detector decodes with."""
    generator = torch.Generator().manual_seed(0)
    for level, stride in zip(anchors_of(model), STRIDES, strict=True):
        anchors = level.tensor
        cell = (anchors[:, :2] + anchors[:, 2:]) / 2 / stride - 0.5
        centre = (cell + torch.rand(len(cell), 2, generator=generator)) * stride
        side = 1 + 60 * torch.rand(len(cell), 2, generator=generator)
        boxes = torch.cat([centre - side / 2, centre + side / 2], dim=1)
        values = encode_boxes(anchors, boxes, stride)
        raw = torch.cat([values[:, :2].logit(eps=1e-6), values[:, 2:]], dim=1)
        torch.testing.assert_close(box_values(raw), values)
        decoded = Box2BoxTransform((1.0, 1.0, 1.0, 1.0)).apply_deltas(
            anchor_deltas(box_values(raw), anchors, stride), anchors
        )
        torch.testing.assert_close(decoded, boxes, rtol=1e-4, atol=1e-3)


def test_values_by_hand():
    """Equations of section 2.1: a prior of 20x10 px in cell (2, 1) of 8 px."""
    anchor = torch.tensor([20 - 10, 12 - 5, 20 + 10, 12 + 5.0])
    box = torch.tensor([18 - 20, 14 - 2.5, 18 + 20, 14 + 2.5])
    expected = [18 / 8 - 2, 14 / 8 - 1, math.log(2), math.log(0.5)]
    assert encode_boxes(anchor, box, 8).tolist() == pytest.approx(expected)
