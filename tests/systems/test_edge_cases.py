"""Pictures and boxes at the edge of what there is, in every detector."""

import copy
from functools import cache

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from ghm_d2.config import load_config
from ghm_d2.register import register_all

PUBLISHED = ("retinanet_focal", "faster_rcnn_sl1", "mask_rcnn", "yolov3", "ssd", "dssd", "fcos")
WITH_GHM = (
    "retinanet_ghm",
    "faster_rcnn_ghm_r",
    "mask_rcnn_ghm_r",
    "yolov3_ghm",
    "ssd_ghm",
    "dssd_ghm",
    "fcos_ghm_c",
)
# so that a detector that has learnt nothing finds something
LOOSE = {
    "RETINANET": 0.0,
    "ROI_HEADS": 0.0,
    "YOLOV3": 0.0,
    "SSD": 0.0,
    "FCOS": 0.0,
}


@pytest.fixture(scope="module")
def build():
    """Makes the detector of a quick configuration, the same each time."""
    register_all()

    @cache
    def build_once(name: str):
        words = ["MODEL.DEVICE", "cpu", "TEST.DETECTIONS_PER_IMAGE", "20"]
        words += ["MODEL.TIMM.NAME", "test_efficientnet", "MODEL.TIMM.PRETRAINED", ""]
        for group, score in LOOSE.items():
            words += [f"MODEL.{group}.SCORE_THRESH_TEST", str(score)]
        torch.manual_seed(0)
        model = build_model(load_config(f"quick/{name}.yaml", words))
        for key, parameter in model.named_parameters():
            if ("cls_score" in key or "bbox_pred" in key) and parameter.dim() > 1:
                parameter.data.normal_(0, 0.3)  # scores that rounding does not reorder
        return model

    return lambda name: copy.deepcopy(build_once(name))


def picture(height: int, width: int, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "height": height, "width": width}


@torch.no_grad()
def detect(model, items: list[dict]) -> list[Instances]:
    return [output["instances"] for output in model.eval()(items)]


def assert_within(instances: Instances, item: dict) -> None:
    boxes = instances.pred_boxes.tensor
    assert boxes.isfinite().all() and instances.scores.isfinite().all()
    assert instances.image_size == (item["height"], item["width"])
    assert (boxes >= 0).all()
    assert (boxes[:, 0::2] <= item["width"]).all() and (boxes[:, 1::2] <= item["height"]).all()
    assert ((instances.scores >= 0) & (instances.scores <= 1)).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_batch_of_different_sizes(build, name):
    items = [picture(64, 96), picture(130, 70, seed=1), picture(97, 200, seed=2)]
    found = detect(build(name), items)
    assert any(len(instances) for instances in found)
    for instances, item in zip(found, items, strict=True):
        assert_within(instances, item)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_same_boxes_alone_and_in_a_batch(build, name):
    model, items = build(name), [picture(96, 128, seed) for seed in range(4)]
    for together, item in zip(detect(model, items), items, strict=True):
        (alone,) = detect(model, [item])
        assert len(alone) == len(together) > 0
        torch.testing.assert_close(alone.scores, together.scores, rtol=1e-4, atol=1e-6)
        alone, together = (
            i.pred_boxes.tensor[i.scores.argsort(descending=True)] for i in (alone, together)
        )
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_panorama(build, name):
    item = picture(120, 2000)
    (instances,) = detect(build(name), [item])
    assert len(instances)
    assert_within(instances, item)


def annotated(boxes: list[list[float]], size: int = 128, seed: int = 0) -> dict:
    instances = Instances((size, size))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    instances.gt_masks = BitMasks(torch.ones(len(boxes), size, size, dtype=torch.bool))
    return picture(size, size, seed) | {"instances": instances}


@pytest.mark.parametrize("name", PUBLISHED + WITH_GHM)
@pytest.mark.parametrize(
    "boxes",
    [
        [[], []],
        [[[20, 20, 90, 100]], []],
        [[[50, 10, 51, 110]], [[0, 0, 1, 1]]],  # a pixel wide
        [[[0, 0, 128, 128]], [[127, 127, 128, 128], [40, 40, 80, 80], [40, 40, 80, 80]]],
    ],
    ids=["no object", "half without", "a pixel wide", "border, and one box twice"],
)
def test_a_training_step_is_finite(build, name, boxes):
    model = build(name).train()
    with EventStorage():
        losses = model([annotated(b, seed=i) for i, b in enumerate(boxes)])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()), losses
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
