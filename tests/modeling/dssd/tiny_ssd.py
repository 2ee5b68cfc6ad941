"""A small DSSD on a ResNet-18, GHM as published, and batches with objects for each level."""

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from ghm_d2.config import load_config
from ghm_d2.register import register_all

CLASSES = 4
HEIGHT, WIDTH = 64, 96
STRIDES = (8, 16, 32, 64)
SIZES = [[8, 16], [16, 32], [32, 64], [64, 90]]
RATIOS = [1.6, 2.0, 3.0]
TINY = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.NAME": "build_ghm_ssd_resnet_backbone",
    "MODEL.BACKBONE.FREEZE_AT": "0",
    "MODEL.RESNETS.DEPTH": "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
    "MODEL.RESNETS.OUT_FEATURES": "['res3', 'res4', 'res5']",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.ANCHOR_GENERATOR.SIZES": str(SIZES),
    "MODEL.SSD.CLS_LOSS_TYPE": "mining",
    "MODEL.SSD.BBOX_REG_LOSS_TYPE": "smooth_l1",
    "MODEL.SSD.NUM_CLASSES": str(CLASSES),
    "MODEL.SSD.NUM_LEVELS": str(len(STRIDES)),
    "MODEL.SSD.EXTRA_CHANNELS": "32",
    "MODEL.SSD.DECONV_CHANNELS": "16",
    "MODEL.SSD.HEAD_CHANNELS": "32",
    "MODEL.SSD.SCORE_THRESH_TEST": "0.0",
    "TEST.DETECTIONS_PER_IMAGE": "20",
}


def tiny_config(**keys):
    """Return a tiny configuration with `keys` of MODEL.SSD, or of others as MODEL__GHM__SCOPE."""
    named = {(k.replace("__", ".") if "__" in k else f"MODEL.SSD.{k}"): v for k, v in keys.items()}
    register_all()
    words = [str(word) for pair in {**TINY, **named}.items() for word in pair]
    return load_config("configs/quick/dssd_ghm_published.yaml", words)


def tiny_ssd(**keys):
    """Return a tiny SSD in training mode, its weights always the same."""
    torch.manual_seed(0)
    return build_model(tiny_config(**keys)).train()


def objects(boxes, classes=None, size=(HEIGHT, WIDTH)) -> Instances:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    gt = Instances(size)
    gt.gt_boxes = Boxes(boxes)
    gt.gt_classes = torch.tensor(classes or [i % CLASSES for i in range(len(boxes))]).long()
    return gt


def picture(size=(HEIGHT, WIDTH), seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)


def every_level():
    """Two pictures whose objects are of each level's size."""
    first = objects([[3, 3, 13, 12], [20, 6, 42, 30], [30, 10, 75, 58]])
    second = objects([[10, 0, 90, 64], [50, 20, 59, 30]], [3, 1])
    return [
        {"image": picture(seed=1), "instances": first},
        {"image": picture(seed=2), "instances": second},
    ]
