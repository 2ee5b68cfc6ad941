"""Losses against sums over boxes written from arXiv 1804.02767, 2.1 and 2.2; GHM's identities."""

import math

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from tiny_yolov3 import CLASSES, GHM, SIZE, STRIDES, anchors_of, picture, truth, yolov3

from ghm_d2.losses import exact_ghm_c_loss

SIZES = [SIZE, (60, 90)]  # the second is padded
BOXES = [
    [[10, 10, 20, 22], [30, 20, 70, 60], [60, 5, 80, 25], [90, 30, 102, 36], [40, 40, 41, 60]],
    [[5, 30, 33, 55]],
]
KINDS = ("l2", "smooth_l1", "asl1")
BETA, MU = 0.3, 0.05


def batch():
    objects = [truth(b, [i % CLASSES for i in range(len(b))]) for b in BOXES]
    for instances, size in zip(objects, SIZES, strict=True):
        instances._image_size = size
    return objects


def arguments(model, objects, seed=0):
    """Return arguments of `model.losses`, with random predictions in float64."""
    anchors = [Boxes(a.tensor.double()) for a in anchors_of(model)]
    labels, boxes = model.label_anchors(anchors_of(model), objects)
    generator = torch.Generator().manual_seed(seed)
    predictions = [
        torch.randn(len(objects), len(a), 5 + CLASSES, generator=generator, dtype=torch.float64)
        for a in anchors
    ]
    predictions = [(2 * p).requires_grad_() for p in predictions]
    sizes = [instances.image_size for instances in objects]
    return anchors, predictions, labels, [b.double() for b in boxes], sizes


def losses_of(model, *arguments):
    with EventStorage():
        return model.losses(*arguments)


def bce(logit, target):
    p = 1 / (1 + math.exp(-logit))
    return -math.log(p) if target else -math.log(1 - p)


def difference(kind, d):
    d = abs(d)
    if kind == "l2":
        return d * d / 2
    if kind == "asl1":
        return math.sqrt(d * d + MU * MU) - MU
    return d * d / 2 / BETA if d < BETA else d - BETA / 2


def naive_losses(kind, anchors, predictions, labels, boxes, sizes):
    """Return the losses summed over all anchors in turn, in Python's float64."""
    total = {"loss_obj": 0.0, "loss_cls": 0.0, "loss_box_reg": 0.0}
    for n, (height, width) in enumerate(sizes):
        i = 0
        for level, stride in enumerate(STRIDES):
            for r, anchor in enumerate(anchors[level].tensor.tolist()):
                p, label = predictions[level][n, r].tolist(), int(labels[n][i])
                box = boxes[n][i].tolist()
                i += 1
                if label == -1:
                    continue
                total["loss_obj"] += bce(p[4], label < CLASSES)
                if label == CLASSES:
                    continue
                total["loss_cls"] += sum(bce(p[5 + k], k == label) for k in range(CLASSES))
                w, h = box[2] - box[0], box[3] - box[1]
                column = round((anchor[0] + anchor[2]) / 2 / stride - 0.5)
                row = round((anchor[1] + anchor[3]) / 2 / stride - 0.5)
                target = (
                    min(max((box[0] + box[2]) / 2 / stride - column, 0), 1),
                    min(max((box[1] + box[3]) / 2 / stride - row, 0), 1),
                    math.log(w / (anchor[2] - anchor[0])),
                    math.log(h / (anchor[3] - anchor[1])),
                )
                values = [1 / (1 + math.exp(-p[0])), 1 / (1 + math.exp(-p[1])), p[2], p[3]]
                scale = 2 - w * h / (width * height)
                total["loss_box_reg"] += scale * sum(
                    difference(kind, v - t) for v, t in zip(values, target, strict=True)
                )
    return {name: value / len(sizes) for name, value in total.items()}


def with_boxes(kind, **keys):
    return yolov3(
        {
            "MODEL.YOLOV3.BBOX_REG_LOSS_TYPE": kind,
            "MODEL.YOLOV3.SMOOTH_L1_BETA": str(BETA),
            "MODEL.GHM.REG.MU": str(MU),
            **keys,
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_boxes(kind):
    model = with_boxes(kind)
    given = arguments(model, batch())
    positive = sum(int(((y >= 0) & (y < CLASSES)).sum()) for y in given[2])
    assert positive == 6 and any((y == -1).any() for y in given[2])
    expected = naive_losses(kind, *given)
    for name, loss in losses_of(model, *given).items():
        assert float(loss.detach()) == pytest.approx(expected[name], rel=1e-9), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_sums(kind):
    """Central differences of the sums in Python, at each number of some anchors.

    At the centre's they are of the sigmoid's value, as darknet's gradient is.
    """
    model = with_boxes(kind)
    anchors, predictions, labels, boxes, sizes = arguments(model, batch())
    losses = losses_of(model, anchors, predictions, labels, boxes, sizes)
    sum(losses.values()).backward()
    flat = torch.cat([p.grad for p in predictions], dim=1)
    rows = [(0, int(i)) for i in (labels[0] >= 0).nonzero()[:1]]
    for n, y in enumerate(labels):
        for wanted in ((y >= 0) & (y < CLASSES), y == -1):
            rows += [(n, int(i)) for i in wanted.nonzero().flatten()[:2]]
    starts = [0, len(anchors[0]), len(anchors[0]) + len(anchors[1])]
    step = 1e-6
    for n, i in rows:
        level = max(k for k in range(3) if starts[k] <= i)
        one = [anchors, predictions, labels, boxes, sizes]
        for column in range(5 + CLASSES):
            values = []
            for sign in (1, -1):
                moved = [p.detach().clone() for p in predictions]
                moved[level][n, i - starts[level], column] += sign * step
                values.append(one_anchor(kind, n, i, level, starts, [*one[:1], moved, *one[2:]]))
            slope = (values[0] - values[1]) / (2 * step)
            if column < 2:
                value = predictions[level][n, i - starts[level], column].detach().sigmoid()
                slope /= float(value * (1 - value))
            assert float(flat[n, i, column]) == pytest.approx(slope, abs=1e-6), (n, i, column)


def one_anchor(kind, n, i, level, starts, given):
    """The sum of the losses with every other anchor ignored."""
    anchors, predictions, labels, boxes, sizes = given
    alone = [torch.full_like(y, -1) for y in labels]
    alone[n][i] = labels[n][i]
    return sum(naive_losses(kind, anchors, predictions, alone, boxes, sizes).values())


FILLING, BEYOND, FAR = [0, 0, 96, 64], [-96, -64, 192, 128], [-5e19, -5e19, 5e19, 5e19]


@pytest.mark.parametrize("box", [FILLING, BEYOND, FAR], ids=["filling", "beyond", "far"])
def test_the_largest_boxes_have_the_least_weight(box):
    """1, where the smallest have 2; darknet cuts boxes off at the border, which comes to that."""
    model = with_boxes("l2")
    objects = [truth([box])]
    *given, sizes = arguments(model, objects)
    assert sizes == [SIZE]
    unbounded = [(1e25, 1e25)]
    large, small = (losses_of(model, *given, s)["loss_box_reg"] for s in (sizes, unbounded))
    assert large > 0 and float((small / large).detach()) == pytest.approx(2)
    with EventStorage():
        losses = model([picture(one) for one in objects])
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_weight_of_the_box_loss():
    light, heavy = with_boxes("l2"), with_boxes("l2", **{"MODEL.YOLOV3.BBOX_REG_LOSS_WEIGHT": "3"})
    given = arguments(light, batch())
    one, three = losses_of(light, *given), losses_of(heavy, *given)
    torch.testing.assert_close(three["loss_box_reg"], 3 * one["loss_box_reg"])
    torch.testing.assert_close(three["loss_obj"], one["loss_obj"])


@pytest.mark.parametrize("scope", ["level", "batch"])
def test_one_unit_region_without_momentum_is_the_mean(scope):
    keys = {
        **GHM,
        "MODEL.GHM.SCOPE": scope,
        "MODEL.GHM.CLS.BINS": "1",
        "MODEL.GHM.CLS.MOMENTUM": "0.0",
        "MODEL.GHM.REG.BINS": "1",
        "MODEL.GHM.REG.MOMENTUM": "0.0",
        "MODEL.GHM.REG.LOSS_WEIGHT": "1.0",
        "MODEL.GHM.REG.MU": str(MU),
    }
    model = yolov3(keys)
    anchors, predictions, labels, boxes, sizes = arguments(model, batch())
    losses = losses_of(model, anchors, predictions, labels, boxes, sizes)
    counts = [len(a) for a in anchors]
    expected = dict.fromkeys(losses, 0.0)
    spans = [[0], [1], [2]] if scope == "level" else [[0, 1, 2]]
    for span in spans:  # a mean over each
        inside = [s in span for s, c in enumerate(counts) for _ in range(c)]
        kept = [torch.where(torch.tensor(inside), y, -1) for y in labels]
        obj = sum(int((y >= 0).sum()) for y in kept)
        positive = sum(int(((y >= 0) & (y < CLASSES)).sum()) for y in kept)
        sums = naive_losses("asl1", anchors, predictions, kept, boxes, [(1e6, 1e6)] * 2)
        expected["loss_obj"] += 2 * sums["loss_obj"] / obj
        if positive:
            expected["loss_cls"] += 2 * sums["loss_cls"] / (positive * CLASSES)
            # each box counted twice: the factor 2 - w * h / (W * H) of a picture without end
            expected["loss_box_reg"] += sums["loss_box_reg"] / (positive * 4)
    for name, loss in losses.items():
        assert float(loss.detach()) == pytest.approx(expected[name], rel=1e-6), name


def test_exact_density():
    """Objectness and classes, which are sigmoids, have one per level, the default."""
    model = yolov3({**GHM, "MODEL.GHM.CLS.DENSITY": "exact"})
    anchors, predictions, labels, boxes, sizes = arguments(model, batch())
    losses = losses_of(model, anchors, predictions, labels, boxes, sizes)
    expected, start = {"loss_obj": 0.0, "loss_cls": 0.0}, 0
    for p in predictions:
        p = p.detach().flatten(0, 1)
        y = torch.cat([one[start : start + len(p) // len(labels)] for one in labels])
        start += len(p) // len(labels)
        objects = torch.where(y < 0, -1, (y == CLASSES).long())
        classes = torch.where(y < CLASSES, y, -1)
        expected["loss_obj"] += float(exact_ghm_c_loss(p[:, 4:5], objects, 1 / 30))
        expected["loss_cls"] += float(exact_ghm_c_loss(p[:, 5:], classes, 1 / 30))
    for name, loss in expected.items():
        assert float(losses[name].detach()) == pytest.approx(loss, rel=1e-9), name


def test_moving_averages_are_separate():
    model = yolov3({**GHM, "MODEL.GHM.SCOPE": "level_ema"})
    with EventStorage():
        model([picture(objects) for objects in batch()])
    averages = {n: b for n, b in model.state_dict().items() if "density" in n}
    owners = {name.split(".")[0] for name in averages}
    assert owners == {"ghm_obj", "ghm_c", "ghm_r"}
    sums = dict.fromkeys(owners, 0.0)
    for name, value in averages.items():
        sums[name.split(".")[0]] += float(value.double().sum())
    assert all(value > 0 for value in sums.values()) and len(set(sums.values())) == 3


KEYS = [{}, GHM]


@pytest.mark.parametrize("keys", KEYS, ids=["published", "ghm"])
@pytest.mark.parametrize("term", ["loss_obj", "loss_cls", "loss_box_reg"])
def test_what_each_term_reaches(keys, term):
    """Everything when there are objects on all levels; of one on the coarsest, no finer level."""
    model = yolov3(keys)
    names = {name for name, _ in model.named_parameters()}
    everywhere = [truth(BOXES[0], [0, 1, 2, 3, 0])] * 2
    assert unreached(model, term, everywhere) == set()
    coarsest = [truth([[30, 20, 70, 60]])] * 2
    finer = {n for n in names if n.startswith(("head.levels.1.", "head.levels.2."))}
    assert unreached(model, term, coarsest) == (set() if term == "loss_obj" else finer)


def unreached(model, term, objects):
    model.zero_grad()
    with EventStorage():
        losses = model([picture(one, seed) for seed, one in enumerate(objects)])
    losses[term].backward()
    return {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()}


@pytest.mark.parametrize("keys", KEYS, ids=["published", "ghm"])
def test_a_batch_without_an_object(keys):
    model = yolov3(keys)
    with EventStorage() as storage:
        losses = model([picture(truth([]), seed) for seed in range(2)])
    assert storage.latest()["num_pos_anchors"][0] == 0
    assert losses["loss_obj"] > 0 and losses["loss_cls"] == 0 and losses["loss_box_reg"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("keys", KEYS, ids=["published", "ghm"])
def test_half_precision_gives_losses_in_full(keys):
    model = yolov3(keys)
    with EventStorage() as storage, torch.autocast("cpu", torch.bfloat16):
        losses = model([picture(objects) for objects in batch()])
    assert storage.latest()["num_pos_anchors"][0] == 3
    assert all(x.dtype == torch.float32 and x.isfinite() for x in losses.values())
    sum(losses.values()).backward()


@pytest.mark.parametrize("keys", KEYS, ids=["published", "ghm"])
def test_a_few_steps_lower_every_loss(keys):
    """In part by knowing where nothing is: the boxes have to be learnt for theirs to fall."""
    model = yolov3(keys)
    images = [picture(truth(b, [1] * len(b)), seed) for seed, b in enumerate(BOXES)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    history = []
    with EventStorage():
        for _ in range(40):
            losses = model(images)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            history.append({name: float(loss.detach()) for name, loss in losses.items()})
    start, end = history[3], history[-1]  # the moving averages of GHM start at zero
    assert all(end[name] < 0.6 * start[name] for name in end), (start, end)
