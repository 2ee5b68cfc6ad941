"""FCOS with a choice of losses."""

import pytest
import torch
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes, Instances
from tiny_models import (
    CLASSES,
    HEIGHT,
    TINY,
    WIDTH,
    assert_resumes_exactly,
    assert_same,
    assert_sound_step,
    gradients,
    inputs,
    recorded_losses,
    step,
)
from torch import nn
from torchvision.ops import (
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)

from ghm_d2.config import load_config
from ghm_d2.errors import UsageError
from ghm_d2.losses import GHMC, GHMR, asl1_loss, bce_loss
from ghm_d2.losses.density.gradient_density import SCOPES
from ghm_d2.modeling.fcos import CLS_LOSSES, GHMFCOS, REG_LOSSES
from ghm_d2.register import register_all

LEVELS = 5
CHANNELS = 64  # Detectron2's group norm has 32 groups
NAMES = {
    "loss_cls": "loss_fcos_cls",
    "loss_box_reg": "loss_fcos_loc",
    "loss_centerness": "loss_fcos_ctr",
}


def ghm_fcos(cls="focal", reg="giou", keys=(), size=1.0):
    """A small one whose weights are always the same. `size`: of its distances, in strides."""
    register_all()
    words = {
        **TINY,
        "MODEL.META_ARCHITECTURE": "GHMFCOS",
        "MODEL.FPN.OUT_CHANNELS": str(CHANNELS),
        "MODEL.FCOS.NUM_CLASSES": str(CLASSES),
        "MODEL.FCOS.NUM_CONVS": "1",
        "MODEL.FCOS.SCORE_THRESH_TEST": "0.0",
        "MODEL.FCOS.CLS_LOSS_TYPE": cls,
        "MODEL.FCOS.BBOX_REG_LOSS_TYPE": reg,
        **dict(keys),
    }
    cfg = load_config(
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        [word for pair in words.items() for word in pair],
    )
    torch.manual_seed(0)
    model = GHMFCOS(cfg)
    for module in (model.head.cls_score, model.head.bbox_pred, model.head.ctrness):
        nn.init.normal_(module.weight, 0, 0.05)  # predictions that differ, as a trained model's do
    model.head.bbox_pred.bias.data.fill_(size)
    return model.train()


def detectron2_fcos(like):
    """Detectron2's own class, with the same weights."""
    head = FCOSHead(
        input_shape=list(like.backbone.output_shape().values()),
        num_classes=CLASSES,
        conv_dims=[CHANNELS],
        norm=lambda channels: nn.GroupNorm(32 if channels > 1 else 1, channels),
    )
    model = FCOS(
        backbone=like.backbone,
        head=head,
        num_classes=CLASSES,
        test_score_thresh=0.0,
        max_detections_per_image=20,
        pixel_mean=like.pixel_mean.flatten().tolist(),
        pixel_std=like.pixel_std.flatten().tolist(),
    )
    missing, unexpected = model.load_state_dict(like.state_dict(), strict=False)
    assert not missing
    assert all(k == "loss_normalizer" or k.startswith("ghm_c.") for k in unexpected)
    return model.train()


@pytest.mark.parametrize(("kernel", "rtol", "atol"), [("torch", 0, 0), ("auto", 1e-4, 1e-6)])
def test_without_ghm_it_is_detectron2s_own(kernel, rtol, atol):
    """To the bit with kernel "torch"; two steps, as the second depends on the moving average."""
    ours = ghm_fcos(keys={"MODEL.GHM.KERNEL": kernel})
    theirs = detectron2_fcos(ours)
    for seed in (1, 2):
        batch = inputs((4, 3), seed)
        with torch.jit.optimized_execution(False):
            losses = step(ours, batch)
            mine = gradients(ours)
            expected = step(theirs, batch)
        assert losses.keys() == NAMES.keys() and expected.keys() == set(NAMES.values())
        for name, loss in losses.items():
            assert_same(loss, expected[NAMES[name]].to(loss.dtype), rtol, atol)
        for name, gradient in gradients(theirs).items():
            assert_same(mine[name], gradient, rtol, atol)
        assert ours.loss_normalizer.item() == pytest.approx(theirs.loss_normalizer, rel=1e-12)
    assert theirs.loss_normalizer != 300


@pytest.mark.parametrize("norm", ["GN", "", "BN"])
def test_every_parameter_is_reached(norm):
    model = ghm_fcos("ghm_c", "giou", {"MODEL.FCOS.NORM": norm, "MODEL.BACKBONE.FREEZE_AT": "0"})
    assert_sound_step(model, inputs((6, 6)), [model.head, model.backbone])


@pytest.mark.parametrize("cls", CLS_LOSSES)
@pytest.mark.parametrize("reg", REG_LOSSES)
def test_every_combination_trains(cls, reg):
    model = ghm_fcos(cls, reg)
    losses = assert_sound_step(model, inputs((4, 3)), [model.head])
    assert losses.keys() == NAMES.keys()
    assert_sound_step(model, inputs((0, 3)), [model.head])
    assert_sound_step(model, inputs((0, 0)), [model.head], reaching=False)


@pytest.mark.parametrize("size", [0.0, -1.0])  # as a training starts; no box has a size
@pytest.mark.parametrize("reg", REG_LOSSES)
def test_boxes_without_width_or_height_have_a_loss(reg, size):
    model, batch = ghm_fcos("ghm_c", reg, size=size), inputs((4, 3))
    (_, _, _, deltas, *_), _ = recorded_losses(model, batch, lambda b: step(model, b))
    sides = torch.cat(deltas, dim=1).relu()
    assert ((sides[..., 0] + sides[..., 2] == 0) & (sides[..., 1] + sides[..., 3] == 0)).any()
    assert_sound_step(model, batch, [model.head], reaching=size == 0)


def by_hand(arguments):
    """Return by level the logits, labels, and predicted and true distances to the boxes' sides.

    Each location finds its box by the paper's sections 3.1 and 3.2, one by one.
    """
    anchors, logits, labels, deltas, boxes, _ = arguments
    boxes = [getattr(b, "tensor", b) for b in boxes]  # Boxes of Detectron2 0.6
    levels, start = [], 0
    for level, anchor in enumerate(anchors):
        pred, target, stride = [], [], 8 * 2**level
        for image in range(len(labels)):
            for i, corners in enumerate(anchor.tensor.tolist()):
                x, y = (corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2
                if labels[image][start + i] == CLASSES:
                    continue
                x0, y0, x1, y1 = boxes[image][start + i].tolist()
                sides = [x - x0, y - y0, x1 - x, y1 - y]
                assert min(sides) > 0, "a location outside its box"
                assert level == 0 or max(sides) > 4 * stride
                assert level == LEVELS - 1 or max(sides) < 8 * stride
                target.append([side / stride for side in sides])
                pred.append(deltas[level][image, i])
        part = slice(start, start + len(anchor))
        start = part.stop
        levels.append(
            (
                logits[level].flatten(0, 1),
                torch.cat([y[part] for y in labels]),
                torch.stack(pred) if pred else deltas[level][:0, 0],
                torch.tensor(target).reshape(-1, 4),
            )
        )
    return levels


def larger(batch, times=4):
    """Enlarge pictures and boxes in place until several levels have objects."""
    for item in batch:
        image = item["image"].repeat_interleave(times, 1).repeat_interleave(times, 2)
        boxes = item["instances"].gt_boxes.tensor * times
        item["image"] = image
        item["instances"] = Instances(
            tuple(image.shape[1:]),
            gt_boxes=Boxes(boxes),
            gt_classes=item["instances"].gt_classes,
        )
    return batch


@pytest.mark.parametrize("scope", SCOPES)
def test_ghm_is_the_loss_modules_over_levels(scope):
    model = ghm_fcos("ghm_c", "ghm_r", {"MODEL.GHM.SCOPE": scope})
    rows = LEVELS if scope == "level_ema" else 1
    ghm_c, ghm_r = ([kind() for _ in range(rows)] for kind in (GHMC, lambda: GHMR(loss_weight=10)))
    for seed in (1, 2):
        batch = larger(inputs((6, 6), seed))
        arguments, losses = recorded_losses(model, batch, lambda b: step(model, b))
        levels = by_hand(arguments)
        assert sum(len(target) > 0 for *_, target in levels) >= 2
        if scope == "batch":
            levels = [tuple(map(torch.cat, zip(*levels, strict=True)))]
        cls = sum(ghm_c[i % rows](x, y) for i, (x, y, _, _) in enumerate(levels))
        box = sum(ghm_r[i % rows](p, t) for i, (_, _, p, t) in enumerate(levels))
        torch.testing.assert_close(losses["loss_cls"], cls)
        torch.testing.assert_close(losses["loss_box_reg"], box)
    expected = torch.cat([loss.density.ema for loss in ghm_c])
    torch.testing.assert_close(model.ghm_c.density.ema, expected)


def test_sums_are_divided_by_the_moving_average():
    keys = {"MODEL.GHM.REG.MU": "0.1", "MODEL.FCOS.BBOX_REG_LOSS_WEIGHT": "3.0"}
    model, normalizer = ghm_fcos("ce", "asl1", keys), 300.0
    for seed in (1, 2):
        batch = larger(inputs((4, 3), seed))
        arguments, losses = recorded_losses(model, batch, lambda b: step(model, b))
        levels = by_hand(arguments)
        logits, labels, pred, target = map(torch.cat, zip(*levels, strict=True))
        normalizer = 0.9 * normalizer + 0.1 * len(target)
        assert model.loss_normalizer.item() == pytest.approx(normalizer)
        torch.testing.assert_close(losses["loss_cls"], bce_loss(logits, labels, "sum") / normalizer)
        total = 3 * asl1_loss(pred, target, 0.1, "sum")
        torch.testing.assert_close(losses["loss_box_reg"], total / normalizer)
        # centerness (paper, equation 3)
        left, top, right, bottom = target.double().unbind(1)
        across = torch.minimum(left, right) / torch.maximum(left, right)
        down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
        foreground = torch.stack(arguments[2]) != CLASSES  # (N, R); levels come image by image
        order = torch.cat([p[0] for p in arguments[5]]), torch.cat([p[1] for p in arguments[5]])
        predicted, start = [], 0
        for anchor in arguments[0]:
            for image in (0, 1):
                part = slice(start, start + len(anchor))
                predicted.append(order[image][part].squeeze(1)[foreground[image, part]])
            start += len(anchor)
        centerness = bce_of(torch.cat(predicted).double(), (across * down).sqrt()) / normalizer
        torch.testing.assert_close(losses["loss_centerness"].double(), centerness)


def boxes_of(sides):
    """Return boxes around the location, from distances to their sides."""
    return torch.cat([-sides[:, :2], sides[:, 2:]], dim=1)


BOX_LOSSES = {
    "giou": (generalized_box_iou_loss, 0.0),
    "diou": (distance_box_iou_loss, 0.0),
    "ciou": (complete_box_iou_loss, 0.01),
}


@pytest.mark.parametrize("reg", BOX_LOSSES)
def test_losses_of_boxes_are_torchvisions(reg):
    loss, least = BOX_LOSSES[reg]
    model, batch = ghm_fcos("ce", reg), larger(inputs((4, 3)))
    arguments, losses = recorded_losses(model, batch, lambda b: step(model, b))
    _, _, pred, target = map(torch.cat, zip(*by_hand(arguments), strict=True))
    assert (pred < least).any() and (pred > least).sum() > 10
    total = loss(boxes_of(pred.clamp(min=least)), boxes_of(target), reduction="sum")
    normalizer = 0.9 * 300 + 0.1 * len(target)
    torch.testing.assert_close(losses["loss_box_reg"], total / normalizer)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_smooth_l1_turns_linear_at_beta(beta):
    model = ghm_fcos("ce", "smooth_l1", {"MODEL.FCOS.SMOOTH_L1_LOSS_BETA": str(beta)})
    batch = larger(inputs((4, 3)))
    arguments, losses = recorded_losses(model, batch, lambda b: step(model, b))
    _, _, pred, target = map(torch.cat, zip(*by_hand(arguments), strict=True))
    total, near = 0.0, 0
    for difference in (pred - target).abs().flatten().tolist():
        near += difference < beta
        total += difference**2 / 2 / beta if difference < beta else difference - beta / 2
    assert 0 < near < pred.numel()
    expected = total / (0.9 * 300 + 0.1 * len(target))
    assert losses["loss_box_reg"].item() == pytest.approx(expected, rel=1e-5)


def bce_of(logits, targets):
    p = logits.sigmoid()
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).sum()


def test_a_saved_model_continues_exactly(tmp_path):
    assert_resumes_exactly(lambda: ghm_fcos("ghm_c", "giou"), tmp_path)


def detections(model, batch):
    with torch.no_grad():
        return [result["instances"] for result in model.eval()(batch)]


def test_inference_is_detectron2s():
    ours = ghm_fcos("ghm_c")
    batch = inputs()
    pairs = zip(detections(ours, batch), detections(detectron2_fcos(ours), batch), strict=True)
    for mine, expected in pairs:
        assert len(mine) == len(expected) > 0
        assert torch.equal(mine.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(mine.scores, expected.scores)


@pytest.mark.parametrize("channels", ["64", "32", "48"])
def test_a_batch_finds_what_its_images_alone_do(channels):
    """All are of one size, because group norm would see the padding of smaller ones. A picture
    this small leaves one location on the coarsest level, of which no norm of one channel is."""
    model = ghm_fcos("ghm_c", keys={"MODEL.FPN.OUT_CHANNELS": channels})
    batch = inputs((1, 2, 0, 1))
    together = detections(model, batch)
    for image, found in zip(batch, together, strict=True):
        (alone,) = detections(model, [image])
        assert len(alone) > 0 and torch.equal(alone.pred_classes, found.pred_classes)
        boxes = alone.pred_boxes.tensor, found.pred_boxes.tensor
        torch.testing.assert_close(*boxes, rtol=0, atol=1e-3)
        torch.testing.assert_close(alone.scores, found.scores)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 90), (33, 65), (HEIGHT, WIDTH)])
def test_detections_are_within_pictures_of_every_size(height, width):
    model = ghm_fcos("ghm_c")
    batch = [
        {"image": torch.zeros(3, height, width, dtype=torch.uint8), "height": 60, "width": 70},
        inputs((0,))[0],
    ]
    for found, (h, w) in zip(detections(model, batch), [(60, 70), (HEIGHT, WIDTH)], strict=True):
        boxes = found.pred_boxes.tensor
        assert boxes.isfinite().all() and (boxes >= 0).all()
        assert (boxes[:, 0::2] <= w).all() and (boxes[:, 1::2] <= h).all()


def test_nothing_above_the_threshold_is_no_detection():
    model = ghm_fcos(keys={"MODEL.FCOS.SCORE_THRESH_TEST": "0.99"})
    assert [len(found) for found in detections(model, inputs())] == [0, 0]


@pytest.mark.parametrize("reg", ["giou", "ghm_r"])
def test_a_box_of_one_pixel_is_learnt_or_left_out(reg):
    """Location (12, 12) of stride 8 is in the first box; no location is in the second."""
    for corner, found in ((11.5, 1), (13.0, 0)):
        batch = inputs((1, 0))
        batch[0]["instances"].gt_boxes.tensor[:] = torch.tensor([corner, 4.0, corner + 1, 40.0])
        model = ghm_fcos("ghm_c", reg)
        arguments, losses = recorded_losses(model, batch, lambda b: step(model, b))  # noqa: B023
        labels = torch.stack(arguments[2])
        assert ((labels != CLASSES).sum() > 0) == bool(found)
        assert all(loss.isfinite() for loss in losses.values())
        assert (losses["loss_box_reg"] > 0) == bool(found)


def test_on_a_timm_backbone():
    keys = {
        "MODEL.BACKBONE.NAME": "build_ghm_timm_fpn_backbone",
        "MODEL.TIMM.NAME": "test_efficientnet",
        "MODEL.FPN.OUT_CHANNELS": "48",  # no multiple of group norm's 32
    }
    model = ghm_fcos("ghm_c", keys=keys)
    assert_sound_step(model, inputs((4, 3)), [model.head, model.backbone])
    assert all(len(found) for found in detections(model, inputs()))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"MODEL.FCOS.CLS_LOSS_TYPE": "ohem"}, "MODEL.FCOS.CLS_LOSS_TYPE must be one of focal"),
        ({"MODEL.FCOS.BBOX_REG_LOSS_TYPE": "l2"}, "MODEL.FCOS.BBOX_REG_LOSS_TYPE must be one of"),
        ({"MODEL.FCOS.IN_FEATURES": "['p2', 'p3']"}, "p2.*, but the backbone has p3"),
        ({"MODEL.FCOS.IN_FEATURES": "[]"}, r"IN_FEATURES is \(\), but the backbone has p3"),
        ({"MODEL.FCOS.NUM_CONVS": "0"}, "MODEL.FCOS.NUM_CONVS must be at least 1, not 0"),
        ({"MODEL.FCOS.NORM": "IN"}, "MODEL.FCOS.NORM must be .* not 'IN'"),
        ({"MODEL.FCOS.CENTER_SAMPLING_RADIUS": "0.0"}, "CENTER_SAMPLING_RADIUS must be .*1e6"),
        ({"MODEL.FCOS.CENTER_SAMPLING_RADIUS": "-1.0"}, "CENTER_SAMPLING_RADIUS must be .*not -1"),
        ({"MODEL.GHM.KERNEL": "cuda"}, "MODEL.GHM.KERNEL"),
    ],
)
def test_what_cannot_be_had_is_refused(keys, words):
    with pytest.raises(UsageError, match=words):
        ghm_fcos(keys=keys)


def test_a_large_radius_switches_sampling_off():
    """A box of 56 px: of stride 8, 3 x 3 locations near its centre; then the 7 x 7 in all of it."""
    for radius, found in (("1.5", 9), ("1e6", 49)):
        model = ghm_fcos(keys={"MODEL.FCOS.CENTER_SAMPLING_RADIUS": radius})
        batch = inputs((1,))
        batch[0]["instances"].gt_boxes.tensor[:] = torch.tensor([8.0, 8.0, 64.0, 64.0])
        arguments, _ = recorded_losses(model, batch, lambda b: step(model, b))  # noqa: B023
        labels = arguments[2][0][: len(arguments[0][0])]
        assert (labels != CLASSES).sum() == found


@pytest.mark.parametrize("kernel", ["torch", "auto"])
@pytest.mark.parametrize(
    ("cls", "reg"),
    [("focal", "giou"), ("ghm_c", "ciou"), ("ce", "smooth_l1"), ("qfl", "asl1"), ("vfl", "giou")],
)
def test_bfloat16_step_with_each_loss(cls, reg, kernel):
    model, exact = (ghm_fcos(cls, reg, {"MODEL.GHM.KERNEL": kernel}) for _ in range(2))
    batch = inputs((4, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(model, batch)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    exact = step(exact, batch)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, exact[name], rtol=0.1, atol=0.01)
