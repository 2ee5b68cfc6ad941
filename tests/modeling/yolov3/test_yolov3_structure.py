"""YOLOv3 with DarkNet-53 against published figures, and what its configuration refuses.

Figures: darknet's cfg/yolov3.cfg and what darknet prints for it (65.86 BFLOPs at 416x416), and
the length of the published yolov3.weights, 248,007,048 bytes.
"""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis
from tiny_yolov3 import config, picture, truth, yolov3
from torch import nn

from ghm_d2.config import load_config
from ghm_d2.errors import UsageError
from ghm_d2.register import register_all


class Network(nn.Module):
    """Backbone and head, without what is around them."""

    def __init__(self, model):
        super().__init__()
        self.backbone, self.head, self.names = model.backbone, model.head, model.head_in_features

    def forward(self, x):
        maps = self.backbone(x)
        return self.head([maps[name] for name in self.names])


@pytest.fixture(scope="module")
def published():
    register_all()
    cfg = load_config("configs/coco/yolov3_darknet53.yaml", ["MODEL.DEVICE", "cpu"])
    return build_model(cfg).eval()


def test_the_number_of_parameters(published):
    trained = sum(p.numel() for p in published.parameters() if p.requires_grad)
    statistics = sum(b.numel() for n, b in published.named_buffers() if "running" in n)
    assert (trained, statistics) == (61_949_149, 52_608)
    assert 20 + 4 * (trained + statistics) == 248_007_048


def test_convolutions_of_the_backbone(published):
    assert sum(isinstance(m, nn.Conv2d) for m in published.backbone.modules()) == 52
    shapes = published.backbone.output_shape()
    described = {name: (shape.stride, shape.channels) for name, shape in shapes.items()}
    assert described == {"res3": (8, 256), "res4": (16, 512), "res5": (32, 1024)}


def test_operations_and_shapes_at_416(published):
    network, picture = Network(published), torch.zeros(1, 3, 416, 416)
    with torch.no_grad():
        predictions = network(picture)
    assert [tuple(p.shape) for p in predictions] == [(1, 255, n, n) for n in (52, 26, 13)]
    assert sum(len(a) for a in published.anchor_generator(predictions)) == 10_647
    counted = FlopCountAnalysis(network, picture).unsupported_ops_warnings(False)
    # a multiplication and an addition are two operations for darknet and one for fvcore
    assert 2 * counted.total() == pytest.approx(65.86e9, rel=0.005)


def test_a_few_layers_are_where_the_cfg_has_them(published):
    """Convolutions of cfg layers 0, 1, 75, 81, 84, 87 and 105: (in, out, size, stride)."""
    convolutions = [m for m in published.modules() if isinstance(m, nn.Conv2d)]
    shape = [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in convolutions]
    assert len(shape) == 75
    assert shape[:2] == [(3, 32, 3, 1), (32, 64, 3, 2)]
    assert shape[52:53] + shape[58:61] == [
        (1024, 512, 1, 1),
        (1024, 255, 1, 1),
        (512, 256, 1, 1),
        (768, 256, 1, 1),
    ]
    assert shape[-1] == (256, 255, 1, 1)


def test_objectness_starts_low(published):
    logits = published.head.levels[0].pred.bias.view(3, 85)[:, 4]
    assert torch.allclose(logits.sigmoid(), torch.tensor(0.01))


def test_first_stages_can_be_frozen():
    model = yolov3({"MODEL.DARKNET.FREEZE_AT": "2"})
    parts = [model.backbone.stem, model.backbone.res1]
    assert all(not p.requires_grad for part in parts for p in part.parameters())
    frozen = [m for part in parts for m in part.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(frozen) == 4
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in model.backbone.res2.modules())
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    with EventStorage():
        losses = model([picture(truth([[10, 10, 50, 60]]))] * 2)
    sum(losses.values()).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    after = model.backbone.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"res2", "res3", "res4", "res5"}


def test_other_numbers_of_levels():
    model = yolov3(
        {
            "MODEL.YOLOV3.IN_FEATURES": "('res4', 'res5')",
            "MODEL.YOLOV3.CHANNELS": "(6, 8)",
            "MODEL.YOLOV3.ANCHORS": "(((10, 14),), ((23, 27), (37, 58)))",
        }
    )
    maps = Network(model)(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 9, 4, 6), (1, 18, 2, 3)]
    with EventStorage():
        losses = model([picture(truth([[10, 10, 50, 60]]))])
    assert all(loss.isfinite() for loss in losses.values())


def test_a_timm_backbone():
    keys = {
        "MODEL.BACKBONE.NAME": "build_timm_backbone",
        "MODEL.TIMM.NAME": "mobilenetv3_small_050",
    }
    backbone = build_backbone(config(keys))
    assert backbone.size_divisibility == 32
    assert list(backbone.output_shape()) == ["res3", "res4", "res5"]
    model = yolov3(keys)
    with EventStorage():  # of a size that no stride divides
        losses = model([picture(truth([[10, 10, 50, 60]], size=(70, 101)))])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("YOLOV3.OBJ_LOSS_TYPE", "focal", "one of ce, ghm_c"),
        ("YOLOV3.CLS_LOSS_TYPE", "focal", "one of ce, ghm_c"),
        ("YOLOV3.BBOX_REG_LOSS_TYPE", "giou", "one of l2, smooth_l1, asl1, ghm_r"),
        ("YOLOV3.IGNORE_IOU", "1.5", "lies in"),
        ("YOLOV3.IN_FEATURES", "('res3', 'res4', 'p5')", "the backbone gives res3, res4, res5"),
        ("YOLOV3.IN_FEATURES", "('res5', 'res4', 'res3')", "twice"),
        ("YOLOV3.CHANNELS", "(4, 6)", "2 levels and IN_FEATURES 3"),
        ("YOLOV3.ANCHORS", "(((4, 6),), ((4, 6),))", "2 levels"),
        ("YOLOV3.ANCHORS", "(((4, 6),), ((4, 0),), ((8, 8),))", "above 0"),
        ("DARKNET.FREEZE_AT", "7", "0 to 6"),
        ("DARKNET.DEPTHS", "(1, 1)", "3 stages"),
    ],
)
def test_what_is_refused(key, value, said):
    with pytest.raises(UsageError, match=said):
        yolov3({f"MODEL.{key}": value})
