"""Detectors of Detectron2's model zoo, made so small that a step takes a fraction of a second."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn

from ghm_d2.config import load_config
from ghm_d2.register import register_all

CLASSES = 4
HEIGHT, WIDTH = 64, 96
TINY = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.PIXEL_STD": "[57.4, 57.1, 58.4]",
    "MODEL.BACKBONE.FREEZE_AT": "5",  # only FPN and heads are trained
    "MODEL.BACKBONE.NAME": "build_tiny_fpn_backbone",
    "MODEL.FPN.OUT_CHANNELS": "32",
    "MODEL.ANCHOR_GENERATOR.SIZES": "[[8], [16], [32], [64], [128]]",
    "MODEL.RETINANET.NUM_CLASSES": str(CLASSES),
    "MODEL.RETINANET.NUM_CONVS": "1",
    "MODEL.RETINANET.SCORE_THRESH_TEST": "0.0",
    "MODEL.ROI_HEADS.NUM_CLASSES": str(CLASSES),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "32",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.0",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "32",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": "100",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": "100",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "50",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "50",
    "TEST.DETECTIONS_PER_IMAGE": "20",
}
# of the quick configurations, whatever the detector
QUICK_TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.TIMM.PRETRAINED": "",
    "MODEL.TIMM.NAME": "test_efficientnet",
    "MODEL.FPN.OUT_CHANNELS": "16",
    "MODEL.SSD.EXTRA_CHANNELS": "16",
    "MODEL.SSD.HEAD_CHANNELS": "16",
}
FILES = {
    "RetinaNet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "GeneralizedRCNN": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
}
GHM_RCNN = {"MODEL.ROI_HEADS.NAME": "GHMROIHeads", "MODEL.PROPOSAL_GENERATOR.NAME": "GHMRPN"}


class TinyBackbone(Backbone):
    """A convolution a stage, with the names and strides of a ResNet's."""

    CHANNELS = 16

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, self.CHANNELS, 7, stride=4, padding=3)
        self.stages = nn.ModuleList(
            nn.Conv2d(self.CHANNELS, self.CHANNELS, 3, stride=stride, padding=1)
            for stride in (1, 2, 2, 2)
        )
        for conv in (self.stem, *self.stages):
            c2_msra_fill(conv)  # activations as large as those of the images

    def forward(self, x):
        x = self.stem(x)
        features = {}
        for number, stage in enumerate(self.stages, start=2):
            features[f"res{number}"] = x = stage(x).relu()
        return features

    def output_shape(self):
        return {
            f"res{number}": ShapeSpec(channels=self.CHANNELS, stride=2**number)
            for number in range(2, 6)
        }


@BACKBONE_REGISTRY.register()
def build_tiny_fpn_backbone(cfg, input_shape):
    """The pyramid of Detectron2's RetinaNet, or of its R-CNNs where that takes res2."""
    out = cfg.MODEL.FPN.OUT_CHANNELS
    two_stage = "res2" in cfg.MODEL.FPN.IN_FEATURES
    top = LastLevelMaxPool() if two_stage else LastLevelP6P7(TinyBackbone.CHANNELS, out, "res5")
    bottom_up = TinyBackbone().requires_grad_(cfg.MODEL.BACKBONE.FREEZE_AT == 0)
    return FPN(bottom_up, cfg.MODEL.FPN.IN_FEATURES, out, top_block=top)


def build(file: str, keys=()):
    """A model whose weights are always the same."""
    register_all()
    words = [word for pair in {**TINY, **dict(keys)}.items() for word in pair]
    torch.manual_seed(0)
    model = build_model(load_config(FILES[file], words))
    for name, parameter in model.named_parameters():
        if "cls_score" in name or "bbox_pred" in name:
            parameter.data.normal_(0, 0.05)  # predictions that differ, as a trained model's do
    return model.train()


def retinanet(**keys):
    """Detectron2's own class."""
    return build("RetinaNet", keys)


def ghm_retinanet(cls="focal", reg="smooth_l1", keys=()):
    types = {
        "MODEL.META_ARCHITECTURE": "GHMRetinaNet",
        "MODEL.RETINANET.CLS_LOSS_TYPE": cls,
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": reg,
    }
    return build("RetinaNet", {**types, **dict(keys)})


def faster_rcnn(keys=()):
    """Detectron2's own class."""
    return build("GeneralizedRCNN", keys)


def ghm_faster_rcnn(cls="ce", reg="smooth_l1", rpn="ce", keys=()):
    types = {
        "MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE": cls,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": reg,
        "MODEL.RPN.CLS_LOSS_TYPE": rpn,
    }
    return build("GeneralizedRCNN", {**GHM_RCNN, **types, **dict(keys)})


def inputs(boxes=(3, 2), seed=0):
    """A batch of noise with that many boxes in each image."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for count in boxes:
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH / 2, HEIGHT / 2])
        octave = 2.5 + 3 * torch.rand(count, 1, generator=generator)  # 6 to 45 px: many levels
        size = 2**octave * (0.8 + 0.4 * torch.rand(count, 2, generator=generator))
        instances = Instances((HEIGHT, WIDTH))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.randint(0, CLASSES, (count,), generator=generator)
        image = torch.randint(0, 256, (3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def step(model, batch, seed=0):
    """Losses of one iteration, their gradients left in the parameters."""
    torch.manual_seed(seed)  # Detectron2 samples anchors and proposals
    model.zero_grad()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    return losses


def gradients(model):
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def assert_same_training(ours, theirs, batches, **tolerance):
    """Check that losses and gradients agree step after step of gradient descent.

    They agree bit for bit, or within `tolerance`, `torch.testing.assert_close`'s.

    fvcore's focal loss is TorchScript, whose first runs round otherwise than the optimised ones.
    """
    _, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected
    for i, batch in enumerate(batches):
        with torch.jit.optimized_execution(False):
            mine, expected = step(ours, batch, seed=i), step(theirs, batch, seed=i)
        assert mine.keys() == expected.keys()
        for name, loss in mine.items():
            assert_same(loss, expected[name].to(loss.dtype), **tolerance)
        mine, expected = gradients(ours), gradients(theirs)
        assert mine.keys() == expected.keys() and mine
        for name, gradient in mine.items():
            assert_same(gradient, expected[name], **tolerance)
        for model in (ours, theirs):
            torch.optim.SGD(model.parameters(), lr=0.01).step()


def assert_same(mine, expected, rtol=0.0, atol=0.0):
    torch.testing.assert_close(mine, expected, rtol=rtol, atol=atol)


def assert_same_inference(ours, theirs):
    ours.load_state_dict(theirs.state_dict(), strict=False)
    batch = inputs()
    with torch.no_grad():
        pairs = zip(ours.eval()(batch), theirs.eval()(batch), strict=True)
    for mine, expected in pairs:
        mine, expected = mine["instances"], expected["instances"]
        assert len(mine) == len(expected) > 0
        assert torch.equal(mine.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(mine.scores, expected.scores)
        assert torch.equal(mine.pred_classes, expected.pred_classes)


def assert_resumes_exactly(make_model, folder):
    """A model that loads a saved one's state goes on with its losses and gradients."""
    model, resumed = make_model(), make_model()
    step(model, inputs(seed=1))
    torch.save(model.state_dict(), folder / "model.pth")
    resumed.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
    losses, expected = step(resumed, inputs(seed=2)), step(model, inputs(seed=2))
    assert all(torch.equal(loss, expected[name]) for name, loss in losses.items())
    theirs = gradients(model)
    assert all(torch.equal(g, theirs[name]) for name, g in gradients(resumed).items())


def assert_sound_step(model, batch, heads, reaching=True):
    """Finite losses and gradients; `reaching`: to every parameter of the heads."""
    losses = step(model, batch)
    assert losses and all(loss.isfinite() and loss.requires_grad for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    parameters = [item for head in heads for item in head.named_parameters()]
    assert parameters
    for name, parameter in parameters:
        assert parameter.grad is not None, name
        assert not reaching or parameter.grad.abs().sum() > 0, name
    return losses


def recorded_losses(module, batch, run):
    """The arguments that `module.losses` got while `run(batch)` ran, and what it gave."""
    calls, original = [], module.losses

    def losses(*arguments):
        calls.append((arguments, original(*arguments)))
        return calls[-1][1]

    module.losses = losses
    try:
        run(batch)
    finally:
        del module.losses
    (call,) = calls
    return call
