"""Every loss term of every detector reaches the parameters that it should train, and no others."""

import re

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from ghm_d2.config import load_config
from ghm_d2.register import register_all

# By loss term, the parameters that it does not train, as a regular expression
TERMS = {
    "RetinaNet": {
        "loss_cls": r"head\.bbox_",
        "loss_box_reg": r"head\.cls_",
    },
    "FCOS": {  # whose p7 is for distances from 512 px, which no box here has
        "loss_cls": r"head\.(bbox_|ctrness)",
        "loss_box_reg": r"head\.(cls_|ctrness)|top_block\.p7",
        "loss_centerness": r"head\.(cls_|bbox_pred)|top_block\.p7",
    },
    "YOLOv3": {
        "loss_obj": r"$^",
        "loss_cls": r"$^",
        "loss_box_reg": r"$^",
    },
    "SSD": {
        "loss_cls": r"head\.bbox_pred",
        "loss_box_reg": r"head\.cls_score",
    },
    "R-CNN": {
        "loss_rpn_cls": r"roi_heads|rpn_head\.anchor_deltas",
        "loss_rpn_loc": r"roi_heads|rpn_head\.objectness_logits",
        "loss_cls": r"proposal_generator|bbox_pred|mask_head",
        "loss_box_reg": r"proposal_generator|cls_score|mask_head",
        "loss_mask": r"proposal_generator|box_head|box_predictor",
    },
}
SYSTEMS = {
    "retinanet_focal": "RetinaNet",
    "retinanet_ghm": "RetinaNet",
    "fcos": "FCOS",
    "fcos_ghm_c": "FCOS",
    "yolov3": "YOLOv3",
    "yolov3_ghm": "YOLOv3",
    "ssd": "SSD",
    "ssd_ghm": "SSD",
    "dssd": "SSD",
    "dssd_ghm": "SSD",
    "faster_rcnn_sl1": "R-CNN",
    "faster_rcnn_ghm_r": "R-CNN",
    "mask_rcnn": "R-CNN",
    "mask_rcnn_ghm_r": "R-CNN",
}
SIDE = 512  # px: the coarsest level of Faster R-CNN is for boxes from 448 px
# (x, y, width and height): sizes for every level of every detector
BOXES = [
    (4 + 36 * i, 4 + 30 * j, side, side * ratio)
    for i, side in enumerate((12, 20, 30, 42))
    for j, ratio in enumerate((1.0, 1.7))
]
BOXES += [(200, 8, 64, 60), (190, 80, 110, 100), (60, 190, 180, 170), (250, 250, 254, 254)]
BOXES += [(100, 100, 360, 350), (8, 8, 480, 490), (30, 140, 460, 300)]


def batch() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor(BOXES, dtype=torch.float32)
    boxes[:, 2:] = (boxes[:, :2] + boxes[:, 2:]).clamp(max=SIDE)
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0 : (x0 + x1) // 2] = True
    instances = Instances((SIDE, SIDE))
    instances.gt_boxes, instances.gt_masks = Boxes(boxes), BitMasks(masks)
    instances.gt_classes = torch.randint(0, 10, (len(boxes),), generator=generator)
    image = torch.randint(0, 256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return [{"image": image, "instances": instances}]


@pytest.mark.parametrize(("name", "kind"), SYSTEMS.items())
def test_each_loss_reaches_what_it_trains(name, kind):
    register_all()
    words = ["MODEL.DEVICE", "cpu", "MODEL.TIMM.NAME", "test_efficientnet"]
    words += ["MODEL.TIMM.PRETRAINED", "", "MODEL.TIMM.FREEZE_BN", "False"]
    torch.manual_seed(0)
    model = build_model(load_config(f"quick/{name}.yaml", words)).train()
    with EventStorage():
        losses = model(batch())
    expected = dict(TERMS[kind])
    if not name.startswith("mask"):
        expected.pop("loss_mask", None)
    assert losses.keys() == expected.keys()
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    for term, not_trained in expected.items():
        gradients = torch.autograd.grad(
            losses[term], list(named.values()), retain_graph=True, allow_unused=True
        )
        without = {
            name
            for name, gradient in zip(named, gradients, strict=True)
            if gradient is None or not gradient.abs().sum() > 0
        }
        assert without == {k for k in named if re.search(not_trained, k)}, term
