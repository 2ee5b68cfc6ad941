"""RetinaNet checkpoints of mmdetection and of GHM's authors give their own network's outputs."""

import re
import sys
import types

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from torch import nn
from torch.nn import functional as F

from ghm_d2.config import load_config
from ghm_d2.errors import WeightsError
from ghm_d2.modeling.weights.checkpointer import GHMCheckpointer
from ghm_d2.modeling.weights.mmdet_weights import from_mmdet
from ghm_d2.modeling.weights.weight_files import read_weights
from ghm_d2.register import register_all

CLASSES, WIDTH = 4, 16
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
STRIDES = (8, 16, 32, 64, 128)
KEYS = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.RETINANET.NUM_CLASSES": str(CLASSES),
    "MODEL.RETINANET.NUM_CONVS": "2",
    "MODEL.FPN.OUT_CHANNELS": str(WIDTH),
}
THEIRS = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": "[123.675,116.28,103.53]",
    "MODEL.PIXEL_STD": "[58.395,57.12,57.375]",
    "MODEL.FPN.P7_RELU": "False",
    "MODEL.RESNETS.STRIDE_IN_1X1": "False",
}
CONFIG = """
model = dict(
    backbone=dict(type='ResNet', depth=50, style='pytorch'),
    bbox_head=dict(type='RetinaHead', anchor_generator=dict(
        type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3,
        ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128])))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
"""


class Convolution(nn.Module):
    """Keeps its layer under the name `conv`, as their modules do."""

    def __init__(self, channels, kernel, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, WIDTH, kernel, stride, kernel // 2)

    def forward(self, x):
        return self.conv(x)


class Neck(nn.Module):
    def __init__(self):
        super().__init__()
        self.lateral_convs = nn.ModuleList(Convolution(c, 1) for c in (512, 1024, 2048))
        same = [Convolution(WIDTH, 3) for _ in range(3)]
        self.fpn_convs = nn.ModuleList(
            [*same, Convolution(2048, 3, stride=2), Convolution(WIDTH, 3, stride=2)]
        )

    def forward(self, maps):
        c3, c4, c5 = (conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True))
        c4 = c4 + F.interpolate(c5, size=c4.shape[2:])
        c3 = c3 + F.interpolate(c4, size=c3.shape[2:])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, (c3, c4, c5), strict=False)]
        levels.append(self.fpn_convs[3](maps[-1]))
        return [*levels, self.fpn_convs[4](levels[-1])]


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_convs = nn.ModuleList(Convolution(WIDTH, 3) for _ in range(2))
        self.reg_convs = nn.ModuleList(Convolution(WIDTH, 3) for _ in range(2))
        self.retina_cls = nn.Conv2d(WIDTH, 9 * CLASSES, 3, padding=1)
        self.retina_reg = nn.Conv2d(WIDTH, 9 * 4, 3, padding=1)

    def forward(self, x):
        cls, reg = x, x
        for convs in zip(self.cls_convs, self.reg_convs, strict=True):
            cls, reg = convs[0](cls).relu(), convs[1](reg).relu()
        return self.retina_cls(cls), self.retina_reg(reg)


class Theirs(nn.Module):
    """mmdetection's RetinaNet by its published layout; torchvision's ResNet has its names."""

    def __init__(self):
        super().__init__()
        self.backbone = torchvision.models.resnet50()
        del self.backbone.fc
        self.neck, self.bbox_head = Neck(), Head()

    def forward(self, image):
        """Logits (R, CLASSES) and boxes (R, 4) of an RGB image (3, H, W), 0 to 255."""
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        net = self.backbone
        x = ((image - mean[:, None, None]) / std[:, None, None])[None]
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        maps = []
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            maps.append(x)
        logits, boxes = [], []
        for stride, level in zip(STRIDES, self.neck(maps[1:]), strict=True):
            cls, reg = self.bbox_head(level)
            logits.append(cls.permute(0, 2, 3, 1).reshape(-1, CLASSES))
            boxes.append(decoded(reg.permute(0, 2, 3, 1).reshape(*reg.shape[2:], 9, 4), stride))
        return torch.cat(logits), torch.cat(boxes)


def decoded(deltas, stride):
    """Boxes (H * W * 9, 4) of (H, W, 9, 4): at a location ratio by ratio, each at three scales."""
    height, width = deltas.shape[:2]
    scales = [stride * 4 * 2 ** (octave / 3) for octave in range(3)]
    sides = torch.tensor([(s / r**0.5, s * r**0.5) for r in (0.5, 1.0, 2.0) for s in scales])
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    corners = stride * torch.stack([x, y], dim=-1)[:, :, None]
    centres = corners + deltas[..., :2] * sides
    halves = sides * deltas[..., 2:].exp() / 2
    return torch.cat([centres - halves, centres + halves], dim=-1).reshape(-1, 4)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = Theirs().eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif "bn3.weight" in name:
            tensor.fill_(0.3)  # so that sixteen blocks do not add up to too much
    return model


def ours(keys):
    register_all()
    words = [word for pair in {**KEYS, **keys}.items() for word in pair]
    return build_model(load_config("coco/retinanet_R_50_FPN_ghm_1x.yaml", words)).eval()


@pytest.fixture(scope="module")
def model():
    return ours(THEIRS)


def write(folder, state, **meta):
    file = folder / "epoch_12.pth"
    torch.save({"meta": {"epoch": 12, **meta}, "state_dict": state, "optimizer": {}}, file)
    return str(file)


def our_order(rows):
    """Theirs, anchor by anchor at each location, in our order: scale by scale."""
    return rows.view(-1, 3, 3, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def test_logits_and_boxes_are_the_same(theirs, model, tmp_path):
    checkpointer = GHMCheckpointer(model)
    checkpointer.load(write(tmp_path, theirs.state_dict(), mmdet_version="2.3.0", config=CONFIG))
    assert "RetinaNet of mmdetection 2.3.0; trained with" in checkpointer.report.warnings()[0]
    image = torch.randint(0, 256, (3, 64, 96)).float()
    with torch.no_grad():
        logits, boxes = theirs(image)
        features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
        features = [features[name] for name in model.head_in_features]
        anchors = model.anchor_generator(features)
        cls, deltas = model._transpose_dense_predictions(model.head(features), [CLASSES, 4])
        found = [
            model.box2box_transform.apply_deltas(d[0], a.tensor)
            for d, a in zip(deltas, anchors, strict=True)
        ]
    assert logits.std() > 0.01
    torch.testing.assert_close(torch.cat(cls, dim=1)[0], our_order(logits), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(found), our_order(boxes), rtol=1e-4, atol=1e-2)


def refusal(state, model, **meta):
    with pytest.raises(WeightsError) as caught:
        from_mmdet(state, meta, model, "epoch_12.pth")
    return str(caught.value)


def test_a_model_that_would_read_them_otherwise_is_refused_with_the_keys(theirs):
    said = refusal(theirs.state_dict(), ours({}), config=CONFIG)
    assert "RetinaNet of mmdetection (unknown version) was trained with" in said
    words = said.partition("; add ")[2].split()
    assert dict(zip(words[::2], words[1::2], strict=True)) == THEIRS


def test_a_caffe_style_configuration_and_version_1_ask_for_other_keys(theirs, model):
    config = CONFIG.replace("pytorch", "caffe").replace("to_rgb=True", "to_rgb=False")
    said = refusal(theirs.state_dict(), model, mmdet_version="1.0rc1+be06992", config=config)
    assert said.partition("; add ")[2] == (
        "INPUT.FORMAT BGR MODEL.ANCHOR_GENERATOR.OFFSET 0.5 MODEL.RESNETS.STRIDE_IN_1X1 True"
    )


@pytest.mark.parametrize(
    "meta", [{"CLASSES": ("dog", "cat\x1b")}, {"dataset_meta": {"classes": ["dog", "cat\x1b"]}}]
)
def test_the_order_of_its_classes_is_told(meta, theirs, model):
    _, said = from_mmdet(theirs.state_dict(), {"config": CONFIG, **meta}, model, "epoch_12.pth")
    assert re.search(r"; its classes, in this order: dog, cat[^\x1b]*$", said)


@pytest.mark.parametrize("odd", [7, "dog", [["dog"], 3], {"a": 1}])
def test_odd_classes_are_passed_over(odd, theirs, model):
    meta = {"config": CONFIG, "CLASSES": odd, "dataset_meta": odd}
    assert "dog" not in from_mmdet(theirs.state_dict(), meta, model, "epoch_12.pth")[1]


def test_other_classes_start_anew(theirs, tmp_path):
    other = ours({**THEIRS, "MODEL.RETINANET.NUM_CLASSES": "2"})
    checkpointer = GHMCheckpointer(other)
    checkpointer.load(write(tmp_path, theirs.state_dict()))
    assert checkpointer.report.mismatched == (
        ("head.cls_score.weight", (36, WIDTH, 3, 3), (18, WIDTH, 3, 3)),
        ("head.cls_score.bias", (36,), (18,)),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bbox_head.retina_cls.weight"), "only RetinaNet can be loaded"),
        (lambda s: s.pop("neck.fpn_convs.4.conv.bias"), "it lacks backbone.top_block.p7.bias"),
        (lambda s: s.update({"backbone.stem.0.weight": torch.ones(2)}), "it has backbone.stem.0"),
        (
            lambda s: s.update({"bbox_head.retina_reg.bias": torch.ones(7)}),
            "does not fit 9 anchors",
        ),
    ],
)
def test_other_networks_are_refused(change, message, theirs, model):
    state = dict(theirs.state_dict())
    change(state)
    assert message in refusal(state, model)


def test_other_anchors_are_refused(theirs, model):
    config = CONFIG.replace("octave_base_scale=4", "octave_base_scale=2")
    said = refusal(theirs.state_dict(), model, config=config)
    assert "ratios [0.5,1,2], sizes [2,2.51984,3.1748] times the stride" in said


def test_anchors_in_another_order_on_one_level_are_refused(theirs):
    ratios = str([[0.5, 1.0, 2.0]] * 4 + [[2.0, 1.0, 0.5]])
    model = ours({**THEIRS, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": ratios})
    assert "in another order on each level" in refusal(theirs.state_dict(), model)


@pytest.mark.parametrize(
    "odd", ["target_stds=[0, 0, 0, 0]", "scales_per_octave=99999", "octave_base_scale=0"]
)
def test_an_odd_configuration_in_it_is_no_traceback(odd, theirs, model):
    assert refusal(theirs.state_dict(), model, config=odd)


def test_a_history_beside_the_weights_is_passed_over_and_never_made(tmp_path, monkeypatch):
    class HistoryBuffer:
        """A copy of mmengine's class, whose state has arrays and methods in it."""

        def __init__(self):
            self.values, self.methods = np.ones(3), {"min": HistoryBuffer.least}

        def least(self):
            """Never called."""

        def __setstate__(self, state):
            raise AssertionError("the file made an object")

    name = "mmengine.logging.history_buffer"
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = name, "HistoryBuffer"
    HistoryBuffer.least.__module__, HistoryBuffer.least.__qualname__ = name, "HistoryBuffer.least"
    for part in ("mmengine", "mmengine.logging", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].HistoryBuffer = HistoryBuffer
    file = write(tmp_path, {"a": torch.ones(2)}, loss=HistoryBuffer(), best=np.float64(1))
    loaded = read_weights(file)
    assert loaded["state_dict"]["a"].tolist() == [1, 1]
    assert not isinstance(loaded["meta"]["loss"], HistoryBuffer)
