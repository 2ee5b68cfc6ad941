"""Training: the losses, what they reach, and batches that are not like others."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from tiny_models import gradients, recorded_losses, step
from tiny_ssd import CLASSES, every_level, objects, picture, tiny_ssd

from ghm_d2.errors import UsageError
from ghm_d2.modeling.labels import box_levels

MEAN = {
    "CLS_LOSS_TYPE": "ghm_c",
    "BBOX_REG_LOSS_TYPE": "ghm_r",
    "MODEL__GHM__CLS__BINS": 1,
    "MODEL__GHM__CLS__MOMENTUM": 0.0,
    "MODEL__GHM__REG__BINS": 1,
    "MODEL__GHM__REG__MOMENTUM": 0.0,
    "MODEL__GHM__REG__LOSS_WEIGHT": 1.0,
}
PAIRS = [("mining", "smooth_l1"), ("ce", "asl1"), ("ghm_c", "ghm_r")]


def record(model, batch=None):
    """Return the inputs of the losses, and the losses."""
    (anchors, logits, labels, deltas, boxes), losses = recorded_losses(
        model, batch or every_level(), lambda inputs: step(model, inputs)
    )
    anchors = torch.cat([a.tensor for a in anchors]).double()
    logits, deltas = (torch.cat(x, dim=1).detach().double() for x in (logits, deltas))
    return anchors, logits, torch.stack(labels), deltas, torch.stack(boxes).double(), losses


def matched_deltas(anchors, labels, deltas, boxes):
    """Pairs of predicted and true deltas of all boxes with an object (SSD, equation 2, each
    divided by its variance, 0.1 or 0.2)."""
    for n, r in (labels < CLASSES).nonzero().tolist():
        (x0, y0, x1, y1), (u0, v0, u1, v1) = anchors[r].tolist(), boxes[n, r].tolist()
        w, h = x1 - x0, y1 - y0
        true = (
            ((u0 + u1) / 2 - (x0 + x1) / 2) / w / 0.1,
            ((v0 + v1) / 2 - (y0 + y1) / 2) / h / 0.1,
            math.log((u1 - u0) / w) / 0.2,
            math.log((v1 - v0) / h) / 0.2,
        )
        yield from zip(deltas[n, r].tolist(), true, strict=True)


def smooth_l1(d):
    return d * d / 2 if abs(d) < 1 else abs(d) - 0.5


def test_the_published_losses():
    """Equation 1: both sums divided by the number of matched boxes."""
    anchors, logits, labels, deltas, boxes, losses = record(tiny_ssd())
    number = int((labels < CLASSES).sum())
    assert number > 5
    cls = 0.0
    for image, gt in zip(logits, labels, strict=True):
        ce = F.cross_entropy(image, gt, reduction="none").tolist()
        of_objects = [x for x, y in zip(ce, gt.tolist(), strict=True) if y < CLASSES]
        others = sorted((x for x, y in zip(ce, gt.tolist(), strict=True) if y == CLASSES))[::-1]
        cls += sum(of_objects) + sum(others[: 3 * len(of_objects)])
    pairs = matched_deltas(anchors, labels, deltas, boxes)
    box = sum(smooth_l1(p - t) for p, t in pairs)
    assert losses["loss_cls"].item() == pytest.approx(cls / number, rel=1e-4)
    assert losses["loss_box_reg"].item() == pytest.approx(box / number, rel=1e-4)


def test_the_other_sums():
    keys = {"MODEL__GHM__REG__MU": 0.3, "BBOX_REG_LOSS_WEIGHT": 2.5}
    model = tiny_ssd(CLS_LOSS_TYPE="ce", BBOX_REG_LOSS_TYPE="asl1", **keys)
    anchors, logits, labels, deltas, boxes, losses = record(model)
    number = int((labels < CLASSES).sum())
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / number
    pairs = matched_deltas(anchors, labels, deltas, boxes)
    asl1 = sum(math.sqrt((p - t) ** 2 + 0.3**2) - 0.3 for p, t in pairs) / number
    assert losses["loss_cls"].item() == pytest.approx(ce.item(), rel=1e-4)
    assert losses["loss_box_reg"].item() == pytest.approx(2.5 * asl1, rel=1e-4)


def test_ghm_of_one_region_without_momentum_is_the_mean():
    model = tiny_ssd(**MEAN, MODEL__GHM__SCOPE="batch", MODEL__GHM__REG__MU=0.5)
    anchors, logits, labels, deltas, boxes, losses = record(model)
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    asl1 = [
        math.sqrt((p - t) ** 2 + 0.5**2) - 0.5
        for p, t in matched_deltas(anchors, labels, deltas, boxes)
    ]
    assert losses["loss_cls"].item() == pytest.approx(ce.item(), rel=1e-4)
    assert losses["loss_box_reg"].item() == pytest.approx(sum(asl1) / len(asl1), rel=1e-4)


def test_ghm_of_one_region_by_levels_is_the_sum_of_their_means():
    _, logits, labels, _, _, losses = record(tiny_ssd(**MEAN))
    sizes = [8 * n for n in (8 * 12, 4 * 6, 2 * 3, 1 * 2)]
    levels = zip(logits.split(sizes, dim=1), labels.split(sizes, dim=1), strict=True)
    expected = sum(F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in levels)
    assert losses["loss_cls"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("scope", "rows"), [("level", 1), ("level_ema", 4), ("batch", 1)])
def test_moving_averages(scope, rows):
    keys = {"CLS_LOSS_TYPE": "ghm_c", "BBOX_REG_LOSS_TYPE": "ghm_r", "MODEL__GHM__SCOPE": scope}
    model = tiny_ssd(**keys)
    step(model, every_level())
    for loss in (model.ghm_c, model.ghm_r):
        assert len(loss.density.ema) == rows
        assert (loss.density.ema.sum(1) > 0).all()


@pytest.mark.parametrize(("cls", "reg"), PAIRS)
@pytest.mark.parametrize("deconv", [0, 16])
def test_what_each_loss_reaches(cls, reg, deconv):
    """Every parameter but those of the other's predictions."""
    keys = {"DECONV_CHANNELS": deconv, "L2_NORM_SCALE": 0 if deconv else 20}
    model = tiny_ssd(CLS_LOSS_TYPE=cls, BBOX_REG_LOSS_TYPE=reg, **keys)
    for name, other in (("loss_cls", "bbox_pred"), ("loss_box_reg", "cls_score")):
        model.zero_grad()
        with EventStorage():
            model(every_level())[name].backward()
        unreached = {
            k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
        }
        assert unreached == {k for k, _ in model.named_parameters() if other in k}


@pytest.mark.parametrize(("cls", "reg"), PAIRS)
def test_no_object_at_all(cls, reg):
    """Nothing to learn from but background; with mining not even that."""
    model = tiny_ssd(CLS_LOSS_TYPE=cls, BBOX_REG_LOSS_TYPE=reg)
    batch = [{"image": picture(seed=i), "instances": objects([])} for i in range(2)]
    losses = step(model, batch)
    assert losses["loss_box_reg"] == 0
    assert (losses["loss_cls"] == 0) == (cls == "mining")
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(("cls", "reg"), PAIRS)
def test_boxes_that_are_hardly_any(cls, reg):
    """1 px wide or high, empty, beyond the picture, all of the picture, twice the same."""
    strange = [[5, 5, 6, 40], [5, 50, 60, 51], [7, 7, 7, 9], [90, 60, 120, 90], [0, 0, 96, 64]]
    batch = every_level()
    batch[0]["instances"] = objects([*strange, strange[-1]])
    model = tiny_ssd(CLS_LOSS_TYPE=cls, BBOX_REG_LOSS_TYPE=reg)
    losses = step(model, batch)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_box_of_1_px_is_learnt():
    model = tiny_ssd()
    batch = every_level()
    batch[0]["instances"] = objects([[5, 5, 6, 40]], [2])
    *_, labels, _, boxes, _ = record(model, batch)
    own = labels[0] == 2
    assert own.sum() == 1
    assert boxes[0][own].tolist() == [[5, 5, 6, 40]]


def test_pictures_of_different_sizes():
    """Padding is background."""
    batch = every_level()
    batch[1] = {"image": picture((33, 47)), "instances": objects([[2, 2, 30, 30]])}
    losses = step(tiny_ssd(), batch)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(("cls", "reg"), PAIRS)
def test_mixed_precision_keeps_losses_in_single(cls, reg):
    model = tiny_ssd(CLS_LOSS_TYPE=cls, BBOX_REG_LOSS_TYPE=reg)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(model, every_level())
    assert all(x.dtype == torch.float32 and x.isfinite() for x in losses.values())


def test_the_number_of_matched_boxes_is_logged():
    model = tiny_ssd()
    with EventStorage() as storage:
        model(every_level())
        logged = storage.latest()["num_pos_anchors"][0]
    *_, labels, _, _, _ = record(model)
    assert logged == pytest.approx(float((labels < CLASSES).sum()) / 2)


@pytest.mark.parametrize(("cls", "reg"), PAIRS)
def test_a_few_steps_fit_two_pictures(cls, reg):
    """The trained detector finds the objects of the batch again."""
    keys = {"MODEL__GHM__REG__MU": 1.0, "MODEL__BACKBONE__FREEZE_AT": 5}
    model = tiny_ssd(CLS_LOSS_TYPE=cls, BBOX_REG_LOSS_TYPE=reg, **keys)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = every_level()
    for _ in range(40):
        losses = step(model, batch)
        optimizer.step()
    assert all(loss.isfinite() for loss in losses.values())
    model.eval()
    for layer in model.modules():  # running statistics have not settled after so few steps
        layer.train(isinstance(layer, torch.nn.BatchNorm2d))
    with torch.no_grad():
        results = model([{"image": x["image"]} for x in batch])
    for x, result in zip(batch, results, strict=True):
        gt, found = x["instances"], result["instances"]
        best = found[: len(gt)]
        assert sorted(best.pred_classes.tolist()) == sorted(gt.gt_classes.tolist())
        for box, label in zip(gt.gt_boxes.tensor, gt.gt_classes, strict=True):
            nearest = best.pred_boxes.tensor[best.pred_classes == label]
            assert (nearest - box).abs().amax(1).min() < 3


@pytest.mark.parametrize(("cls", "reg"), PAIRS)
def test_the_box_loss_of_all_boxes_is_that_of_those_picked_out(cls, reg, monkeypatch):
    """On a GPU the loss is computed for all boxes, without picking any out."""
    keys = {"CLS_LOSS_TYPE": cls, "BBOX_REG_LOSS_TYPE": reg}
    picked, dense = tiny_ssd(**keys), tiny_ssd(**keys)
    expected = step(picked, every_level())["loss_box_reg"]
    of_all = lambda *args, dense: box_levels(*args, dense=True)  # noqa: E731
    monkeypatch.setattr("ghm_d2.modeling.dssd.ssd.box_levels", of_all)
    torch.testing.assert_close(step(dense, every_level())["loss_box_reg"], expected)
    theirs = gradients(picked)
    for name, gradient in gradients(dense).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


def test_batch_norm_over_a_single_value_is_refused_with_the_remedy():
    """64 x 96 px: the fifth level, of stride 128, is 1 x 1."""
    keys = {"NUM_LEVELS": 5, "MODEL__ANCHOR_GENERATOR__SIZES": [[8, 16]] * 5}
    with pytest.raises(UsageError, match="IMS_PER_BATCH"):
        step(tiny_ssd(**keys), every_level()[:1])
    step(tiny_ssd(**keys), every_level())
    wide = {"EXTRA_CHANNELS": 256, "HEAD_CHANNELS": 256, "DECONV_CHANNELS": 64}
    step(tiny_ssd(NORM="GN", **keys, **wide), every_level()[:1])
