"""The box loss's gradient at the raw predictions against darknet's src/yolo_layer.c."""

import math

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from tiny_yolov3 import ANCHORS, CLASSES, SIZE, STRIDES, anchors_of, truth, yolov3

IMAGES = 3
HEIGHT, WIDTH = SIZE
PRIORS = [prior for level in ANCHORS for prior in level]


def random_boxes(count, seed):
    """Return (count, 4) corners in px, of boxes from 4 px to nearly the picture's size."""
    generator = torch.Generator().manual_seed(seed)
    part = 0.04 + 0.9 * torch.rand(count, 2, generator=generator) ** 2
    size = part * torch.tensor([WIDTH, HEIGHT])
    start = torch.rand(count, 2, generator=generator) * (torch.tensor([WIDTH, HEIGHT]) - size)
    return torch.cat([start, start + size], dim=1)


def shape_iou(a, b):
    common = min(a[0], b[0]) * min(a[1], b[1])
    return common / (a[0] * a[1] + b[0] * b[1] - common)


def darknet_deltas(boxes, predictions):
    """Return `delta_yolo_box`'s deltas for one picture's boxes: minus the gradient of their sum.

    Args:
        boxes: corners in px, of a picture as large as the network's input.
        predictions: (R_l, 5 + K) a level: rows of cells, of each cell its priors.
    """
    deltas = [torch.zeros(len(p), 4, dtype=torch.float64) for p in predictions]
    for x0, y0, x1, y1 in boxes:
        x, w = (x0 + x1) / 2 / WIDTH, (x1 - x0) / WIDTH
        y, h = (y0 + y1) / 2 / HEIGHT, (y1 - y0) / HEIGHT
        best = max(range(9), key=lambda n: shape_iou(PRIORS[n], (w * WIDTH, h * HEIGHT)))
        level, prior = divmod(best, 3)
        lw, lh = WIDTH // STRIDES[level], HEIGHT // STRIDES[level]
        i, j = int(x * lw), int(y * lh)
        anchor = (j * lw + i) * 3 + prior
        raw = predictions[level][anchor, :4].tolist()
        out = [1 / (1 + math.exp(-raw[0])), 1 / (1 + math.exp(-raw[1])), raw[2], raw[3]]
        wanted = [
            x * lw - i,
            y * lh - j,
            math.log(w * WIDTH / PRIORS[best][0]),
            math.log(h * HEIGHT / PRIORS[best][1]),
        ]
        scale = 2 - w * h
        row = [scale * (t - o) for t, o in zip(wanted, out, strict=True)]
        deltas[level][anchor] = torch.tensor(row, dtype=torch.float64)  # the later box's
    return deltas


def test_gradient_is_darknets():
    """darknet adds the deltas of all pictures up and divides its steps by their number."""
    model = yolov3()
    boxes = [random_boxes(25, seed) for seed in range(IMAGES)]
    labels, matched = model.label_anchors(anchors_of(model), [truth(b.tolist()) for b in boxes])
    generator = torch.Generator().manual_seed(0)
    anchors = [Boxes(a.tensor.double()) for a in anchors_of(model)]
    predictions = [
        3 * torch.randn(IMAGES, len(a), 5 + CLASSES, generator=generator).double() for a in anchors
    ]
    expected = [
        darknet_deltas(b.double().tolist(), [p[n] for p in predictions])
        for n, b in enumerate(boxes)
    ]
    for p in predictions:
        p.requires_grad_()
    given = (anchors, predictions, labels, [b.double() for b in matched], [SIZE] * IMAGES)
    with EventStorage():
        model.losses(*given)["loss_box_reg"].backward()
    for level, p in enumerate(predictions):
        deltas = torch.stack([one[level] for one in expected])
        assert deltas.any(), f"no box on level {level}"
        torch.testing.assert_close(-p.grad[..., :4] * IMAGES, deltas, rtol=1e-12, atol=1e-12)
        without = ~deltas.any(-1)
        assert without.any() and not p.grad[..., :4][without].any()
        assert not p.grad[..., 4:].any()


@pytest.mark.parametrize("kind", ["l2", "smooth_l1", "asl1", "ghm_r"])
def test_the_gradient_does_not_vanish_where_the_sigmoid_is_flat(kind):
    model = yolov3({"MODEL.YOLOV3.BBOX_REG_LOSS_TYPE": kind})
    labels, matched = model.label_anchors(anchors_of(model), [truth([[10, 10, 20, 22]])])
    predictions = [torch.full((1, len(a), 5 + CLASSES), 30.0) for a in anchors_of(model)]
    for p in predictions:
        p.requires_grad_()
    with EventStorage():
        losses = model.losses(anchors_of(model), predictions, labels, matched, [SIZE])
    losses["loss_box_reg"].backward()
    positive = (labels[0] != CLASSES) & (labels[0] >= 0)
    gradient = torch.cat([p.grad[0] for p in predictions])[positive]
    assert gradient.shape[0] == 1 and (gradient[:, :2] > 0.05).all()
