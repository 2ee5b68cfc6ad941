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

from ghm_d2.config import get_cfg, load_config
from ghm_d2.errors import UsageError
from ghm_d2.losses import GHMC, GHMR
from ghm_d2.modeling.yolov3.head import YOLOv3Head
from ghm_d2.modeling.yolov3.yolov3 import GHMYOLOv3
from ghm_d2.register import register_all
from ghm_d2.training.optimizer import build_optimizer


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


def test_the_recipe_is_that_of_the_cfg(published):
    """The [net] and [yolo] sections of yolov3.cfg; sizes: train_detector in examples/detector.c."""
    cfg = load_config("configs/coco/yolov3_darknet53.yaml", [])
    anchors = "10,13,  16,30,  33,23,  30,61,  62,45,  59,119,  116,90,  156,198,  373,326"
    for keys in (cfg.MODEL.YOLOV3, get_cfg().MODEL.YOLOV3):
        in_order = [float(side) for level in keys.ANCHORS for pair in level for side in pair]
        assert in_order == [float(side) for side in anchors.split(",")]
        assert [len(level) for level in keys.ANCHORS] == [3, 3, 3]  # mask = 0,1,2, 3,4,5, 6,7,8
        assert keys.NUM_CLASSES == 80  # classes
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MOMENTUM) == (64, 0.001, 0.9)
    assert (solver.MAX_ITER, solver.WARMUP_ITERS) == (500_200, 1000)  # max_batches, burn_in
    assert (tuple(solver.STEPS), solver.GAMMA) == ((400_000, 450_000), 0.1)  # steps, scales
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == [32 * (10 + i) for i in range(10)]
    assert cfg.INPUT.MAX_SIZE_TRAIN == 608
    groups = build_optimizer(cfg, published).param_groups
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    kernels = {m.weight for m in published.modules() if isinstance(m, nn.Conv2d)}
    assert {decays[p] for p in kernels} == {0.0005}  # decay
    assert {decay for p, decay in decays.items() if p not in kernels} == {0.0}
    losses = (cfg.MODEL.YOLOV3[f"{kind}_LOSS_TYPE"] for kind in ("OBJ", "CLS", "BBOX_REG"))
    assert tuple(losses) == ("ce", "ce", "l2")


def test_objectness_starts_low(published):
    logits = published.head.levels[0].pred.bias.view(3, 85)[:, 4]
    assert torch.allclose(logits.sigmoid(), torch.tensor(0.01))


def test_the_initial_objectness_can_be_set():
    logits = yolov3({"MODEL.YOLOV3.PRIOR_PROB": "0.2"}).head.levels[0].pred.bias.view(3, 9)
    assert torch.allclose(logits[:, 4].sigmoid(), torch.tensor(0.2))
    assert not logits[:, 5:].any()


def test_maps_of_odd_sides():
    """Detectron2's ResNet does not pad images, and rounds the sides of its maps up."""
    head = YOLOv3Head([4, 4, 4], [4, 4, 4], [1, 1, 1], num_classes=2)
    sides = [(9, 13), (5, 7), (3, 4)]
    predictions = head([torch.zeros(2, 4, *side) for side in sides])
    assert [tuple(p.shape) for p in predictions] == [(2, 7, *side) for side in sides]


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
        "MODEL.BACKBONE.NAME": "build_ghm_timm_backbone",
        "MODEL.TIMM.NAME": "test_efficientnet",
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
        ("YOLOV3.IGNORE_IOU", "1.5", "must be in"),
        ("YOLOV3.IN_FEATURES", "('res3', 'res4', 'p5')", "the backbone has res3, res4, res5"),
        ("YOLOV3.IN_FEATURES", "('res5', 'res4', 'res3')", "twice"),
        ("YOLOV3.CHANNELS", "(4, 6)", "2 levels, but IN_FEATURES has 3"),
        ("YOLOV3.ANCHORS", "(((4, 6),), ((4, 6),))", "2 levels"),
        ("YOLOV3.ANCHORS", "(((4, 6),), ((4, 0),), ((8, 8),))", "above 0"),
        ("YOLOV3.ANCHORS", "((4, 6), (4, 8), (8, 8))", r"YOLOV3.ANCHORS must have .*pairs"),
        ("YOLOV3.ANCHORS", "(((4, 6, 8),), ((4, 6),), ((8, 8),))", "ANCHORS must have .*pairs"),
        ("YOLOV3.ANCHORS", "(((4, 6),), (), ((8, 8),))", r"YOLOV3.ANCHORS .* not \(\)"),
        ("YOLOV3.ANCHORS", "(4, 6, 8)", r"YOLOV3.ANCHORS must have .*pairs"),
        ("YOLOV3.CHANNELS", "(4, 6, 0)", r"YOLOV3.CHANNELS must be at least 1, not \(4, 6, 0\)"),
        ("YOLOV3.NORM", "BNN", "MODEL.YOLOV3.NORM must be .* not 'BNN'"),
        ("YOLOV3.NORM", "GN", "MODEL.YOLOV3.NORM 'GN' does not fit 4 channels"),
        ("DARKNET.NORM", "BNN", "MODEL.DARKNET.NORM must be .* not 'BNN'"),
        ("DARKNET.STEM_CHANNELS", "0", "DARKNET.STEM_CHANNELS must be at least 1"),
        ("DARKNET.FREEZE_AT", "7", "0 to 6"),
        ("DARKNET.DEPTHS", "(1, 1)", "3 stages"),
    ],
)
def test_what_is_refused(key, value, said):
    with pytest.raises(UsageError, match=said):
        yolov3({f"MODEL.{key}": value})


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("asl1", "MODEL.GHM.REG.MU", "0.0"),
        ("asl1", "MODEL.GHM.REG.MU", "-1.0"),
        ("smooth_l1", "MODEL.YOLOV3.SMOOTH_L1_BETA", "-0.1"),
    ],
)
def test_parameters_of_box_losses_are_refused_when_the_model_is_built(kind, key, value):
    with pytest.raises(UsageError, match=f"^{key} must be .* not {value}"):
        yolov3({"MODEL.YOLOV3.BBOX_REG_LOSS_TYPE": kind, key: value})


@pytest.mark.parametrize(
    ("types", "key"),
    [
        ({"obj_loss_type": "ghm_c"}, "OBJ_LOSS_TYPE ghm_c"),
        ({"cls_loss_type": "ghm_c", "ghm_obj": GHMC()}, "MODEL.YOLOV3.CLS_LOSS_TYPE ghm_c"),
        ({"box_reg_loss_type": "ghm_r"}, "BBOX_REG_LOSS_TYPE ghm_r"),
    ],
)
def test_a_ghm_loss_needs_its_module(types, key):
    """In Python, where no configuration brings it."""
    with pytest.raises(UsageError, match=key):
        GHMYOLOv3(**GHMYOLOv3.from_config(config()) | types)


def test_ghm_modules_given_in_python_are_used():
    modules = {"ghm_obj": GHMC(), "ghm_c": GHMC(), "ghm_r": GHMR()}
    types = {"obj_loss_type": "ghm_c", "cls_loss_type": "ghm_c", "box_reg_loss_type": "ghm_r"}
    model = GHMYOLOv3(**GHMYOLOv3.from_config(config()) | types | modules).train()
    with EventStorage():
        model([picture(truth([[10, 10, 50, 60]]))])
    assert all(module.density.ema.sum() > 0 for module in modules.values())
