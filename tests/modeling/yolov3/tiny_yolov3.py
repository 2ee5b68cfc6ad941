"""A YOLOv3 of a few thousand parameters, for pictures of 64x96 px."""

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from ghm_d2.config import get_cfg, merge_overrides
from ghm_d2.register import register_all

CLASSES = 4
SIZE = (64, 96)
STRIDES = (8, 16, 32)
ANCHORS = (
    ((6, 8), (10, 6), (9, 9)),
    ((14, 20), (22, 16), (20, 20)),
    ((40, 30), (32, 50), (60, 56)),
)
KEYS = {
    "MODEL.META_ARCHITECTURE": "GHMYOLOv3",
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.NAME": "build_ghm_darknet_backbone",
    "MODEL.PIXEL_MEAN": "[0.0, 0.0, 0.0]",
    "MODEL.PIXEL_STD": "[255.0, 255.0, 255.0]",
    "MODEL.DARKNET.DEPTHS": "(1, 1, 1, 1, 1)",
    "MODEL.DARKNET.STEM_CHANNELS": "4",
    "MODEL.YOLOV3.CHANNELS": "(4, 6, 8)",
    "MODEL.YOLOV3.ANCHORS": str(ANCHORS),
    "MODEL.YOLOV3.NUM_CLASSES": str(CLASSES),
    "INPUT.FORMAT": "RGB",
}
GHM = {
    "MODEL.YOLOV3.OBJ_LOSS_TYPE": "ghm_c",
    "MODEL.YOLOV3.CLS_LOSS_TYPE": "ghm_c",
    "MODEL.YOLOV3.BBOX_REG_LOSS_TYPE": "ghm_r",
}


def config(keys=()):
    register_all()
    cfg = get_cfg()
    merge_overrides(cfg, [word for pair in {**KEYS, **dict(keys)}.items() for word in pair])
    return cfg


def yolov3(keys=()):
    """Return a tiny YOLOv3 in training mode, its weights always the same."""
    cfg = config(keys)
    torch.manual_seed(0)
    return build_model(cfg).train()


def truth(boxes, classes=None, size=SIZE):
    """Return `Instances` with boxes given by corners in px."""
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    classes = [0] * len(boxes) if classes is None else classes
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


def picture(instances, seed=0):
    """A dict as Detectron2's loader gives: noise of the size that `instances` says."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, *instances.image_size)
    image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances}


def anchors_of(model, size=SIZE):
    """Return the anchors of a picture of that size, a level each."""
    maps = [torch.zeros(1, 1, size[0] // s, size[1] // s) for s in STRIDES]
    return model.anchor_generator(maps)


def randomized(model, seed=0):
    """Give a model batch norm statistics under which a layer out of its place shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("running_var", "norm.weight")):
            value.data.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            value.data.normal_(0, 0.3, generator=generator)
    return model
