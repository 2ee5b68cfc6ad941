"""Faster R-CNN's box head with GHM."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tiny_models import (
    CLASSES,
    assert_resumes_exactly,
    assert_same_inference,
    assert_same_training,
    assert_sound_step,
    faster_rcnn,
    ghm_faster_rcnn,
    inputs,
    step,
)

from ghm_d2.config import get_cfg
from ghm_d2.errors import UsageError
from ghm_d2.losses import GHMR, SoftmaxGHMC, asl1_loss
from ghm_d2.modeling.loss_choice import REG_LOSSES
from ghm_d2.modeling.two_stage.box_head import GHMFastRCNNOutputLayers

CHANNELS = 6
TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))


def predictor(kind=GHMFastRCNNOutputLayers, cls="ce", reg="smooth_l1", keys=()):
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
    cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE = cls
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE = reg
    cfg.merge_from_list(list(keys))
    torch.manual_seed(0)
    return kind(cfg, ShapeSpec(channels=CHANNELS)).train()


def proposals(rows=(20, 12), seed=1, foreground=True):
    """Sampled proposals of two images, and a feature for each of them."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for count in rows:
        image = Instances((100, 100))
        corner, size = 40 * torch.rand(2, count, 2, generator=generator) + 5
        boxes = torch.cat([corner, corner + size], dim=1)
        image.proposal_boxes = Boxes(boxes)
        image.gt_classes = torch.randint(0, CLASSES + 1, (count,), generator=generator)
        if foreground:
            moved = boxes + torch.rand(count, 4, generator=generator)
            image.gt_boxes = Boxes(moved)
        else:  # as Detectron2 leaves an image without objects
            image.gt_classes.fill_(CLASSES)
        images.append(image)
    return images, torch.randn(sum(rows), CHANNELS, generator=generator)


def losses_of(model, images, features):
    predictions = model(features)
    with EventStorage():
        return predictions, model.losses(predictions, images)


def foreground_deltas(images, predictions, agnostic=False):
    """Predicted and true deltas of the foreground proposals, one at a time."""
    pred, target, row = [], [], 0
    for image in images:
        for i in range(len(image)):
            label = image.gt_classes[i].item()
            if label < CLASSES:
                first = 0 if agnostic else 4 * label
                pred.append(predictions[1][row, first : first + 4])
                pair = image.proposal_boxes.tensor[i : i + 1], image.gt_boxes.tensor[i : i + 1]
                target.append(TRANSFORM.get_deltas(*pair)[0])
            row += 1
    return torch.stack(pred), torch.stack(target)


@pytest.mark.parametrize("reg", ["smooth_l1", "giou"])
@pytest.mark.parametrize("agnostic", ["False", "True"])
def test_without_ghm_it_is_detectron2s_own(reg, agnostic):
    keys = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic]
    keys += ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", "2.5"]
    images, features = proposals()
    _, ours = losses_of(predictor(reg=reg, keys=keys), images, features)
    _, theirs = losses_of(predictor(FastRCNNOutputLayers, reg=reg, keys=keys), images, features)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(loss, theirs[name]) for name, loss in ours.items())


@pytest.mark.parametrize("agnostic", [False, True])
def test_ghm_is_the_loss_modules(agnostic):
    keys = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", str(agnostic)]
    keys += ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", "2.5", "MODEL.GHM.REG.MU", "0.1"]
    model = predictor(cls="ghm_c", reg="ghm_r", keys=keys)
    ghm_c, ghm_r = SoftmaxGHMC(), GHMR(mu=0.1, loss_weight=10.0)
    for seed in (1, 2):
        images, features = proposals(seed=seed)
        predictions, losses = losses_of(model, images, features)
        labels = torch.cat([image.gt_classes for image in images])
        torch.testing.assert_close(losses["loss_cls"], ghm_c(predictions[0], labels))
        expected = 2.5 * ghm_r(*foreground_deltas(images, predictions, agnostic))
        torch.testing.assert_close(losses["loss_box_reg"], expected)
    torch.testing.assert_close(model.ghm_c.density.ema, ghm_c.density.ema)
    torch.testing.assert_close(model.ghm_r.density.ema, ghm_r.density.ema)


def test_asl1_is_divided_as_detectron2_divides():
    """By the number of all proposals, so that a foreground proposal always weighs the same."""
    model = predictor(reg="asl1", keys=["MODEL.GHM.REG.MU", "0.1"])
    images, features = proposals()
    predictions, losses = losses_of(model, images, features)
    expected = asl1_loss(*foreground_deltas(images, predictions), 0.1, "sum") / 32
    torch.testing.assert_close(losses["loss_box_reg"], expected)
    labels = torch.cat([image.gt_classes for image in images])
    torch.testing.assert_close(losses["loss_cls"], F.cross_entropy(predictions[0], labels))


@pytest.mark.parametrize("cls", ["ce", "ghm_c"])
@pytest.mark.parametrize("reg", REG_LOSSES)
@pytest.mark.parametrize("case", ["some", "no object", "no proposal"])
def test_every_combination_and_kind_of_batch(cls, reg, case):
    model = predictor(cls=cls, reg=reg)
    rows = (0, 0) if case == "no proposal" else (20, 12)
    images, features = proposals(rows, foreground=case == "some")
    _, losses = losses_of(model, images, features)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if case != "some":
        assert losses["loss_box_reg"] == 0 and not model.bbox_pred.weight.grad.any()
    if case != "no proposal":
        assert model.cls_score.weight.grad.any()


@pytest.mark.parametrize("reg", ["smooth_l1", "asl1", "ghm_r"])
def test_background_proposal_without_width(reg):
    """Detectron2 never asks for the deltas of a background proposal; nor do we."""
    images, features = proposals()
    model = predictor(reg=reg)
    _, expected = losses_of(model, images, features)
    clean = [loss.item() for loss in expected.values()]
    background = (images[0].gt_classes == CLASSES).nonzero()[0, 0]
    boxes = images[0].proposal_boxes.tensor
    boxes[background, 2] = boxes[background, 0]
    _, losses = losses_of(predictor(reg=reg), images, features)
    assert [loss.item() for loss in losses.values()] == clean


def test_detector_without_ghm_is_detectron2s_own():
    """The whole detector, with GHMROIHeads and GHMRPN, against StandardROIHeads and RPN."""
    batches = [inputs(seed=1), inputs((0, 4), seed=2)]
    assert_same_training(ghm_faster_rcnn(), faster_rcnn(), batches)


@pytest.mark.parametrize(
    ("cls", "reg", "rpn"),
    [
        ("ce", "ghm_r", "ce"),
        ("ghm_c", "ghm_r", "ghm_c"),
        ("ce", "asl1", "ce"),
        ("ghm_c", "giou", "ce"),
    ],
)
def test_detector_trains(cls, reg, rpn):
    model = ghm_faster_rcnn(cls, reg, rpn)
    heads = [model.roi_heads, model.proposal_generator]
    names = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert assert_sound_step(model, inputs((4, 3)), heads).keys() == names
    assert_sound_step(model, inputs((0, 3)), heads)
    assert_sound_step(model, inputs((0, 0)), heads, reaching=False)


@pytest.mark.parametrize(
    ("cls", "reg", "rpn"), [("ce", "smooth_l1", "ce"), ("ghm_c", "ghm_r", "ghm_c")]
)
def test_inference_is_unchanged(cls, reg, rpn):
    assert_same_inference(ghm_faster_rcnn(cls, reg, rpn), faster_rcnn())


def test_detectron2_weights_load():
    model = ghm_faster_rcnn("ghm_c", "ghm_r", "ghm_c")
    missing, unexpected = model.load_state_dict(faster_rcnn().state_dict(), strict=False)
    assert not unexpected
    box = "roi_heads.box_predictor"
    modules = [f"{box}.ghm_c", f"{box}.ghm_r", "proposal_generator.ghm_c"]
    expected = {f"{m}.density.{b}" for m in modules for b in ("ema", "num_updates")}
    assert set(missing) == expected
    assert ghm_faster_rcnn().state_dict().keys() == faster_rcnn().state_dict().keys()


def test_a_saved_model_continues_exactly(tmp_path):
    assert_resumes_exactly(lambda: ghm_faster_rcnn("ghm_c", "ghm_r", "ghm_c"), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("CLS_LOSS_TYPE", "focal"), ("BBOX_REG_LOSS_TYPE", "l2")]
)
def test_unknown_loss_type(key, value):
    with pytest.raises(
        UsageError, match=f"MODEL.ROI_BOX_HEAD.{key} must be one of .*ghm_.*, not '{value}'"
    ):
        predictor(keys=[f"MODEL.ROI_BOX_HEAD.{key}", value])


@pytest.mark.skipif(
    "USE_SIGMOID_CE" not in get_cfg().MODEL.ROI_BOX_HEAD, reason="Detectron2 0.6 has a softmax only"
)
def test_softmax_ghm_c_refuses_sigmoids():
    """Inference would take sigmoids of what was trained as a softmax."""
    with pytest.raises(UsageError, match="USE_SIGMOID_CE"):
        predictor(cls="ghm_c", keys=["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True])
    predictor(cls="ce", keys=["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True])


def test_bfloat16_step():
    model = ghm_faster_rcnn("ghm_c", "ghm_r", "ghm_c")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(model, inputs((4, 3)))
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_exact_density_is_refused():
    with pytest.raises(UsageError, match="DENSITY"):
        predictor(cls="ghm_c", keys=["MODEL.GHM.CLS.DENSITY", "exact"])
