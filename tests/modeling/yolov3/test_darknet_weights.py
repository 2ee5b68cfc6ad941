"""darknet's weight files: read and written as darknet does, and nothing else is taken."""

import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from tiny_yolov3 import config, randomized, yolov3
from torch import nn

from ghm_d2.errors import WeightsError
from ghm_d2.modeling.weights.checkpointer import GHMCheckpointer
from ghm_d2.modeling.yolov3.darknet_weights import read_darknet_weights, write_darknet_weights

FULL = {
    "MODEL.DARKNET.DEPTHS": "(1, 2, 8, 8, 4)",
    "MODEL.DARKNET.STEM_CHANNELS": "32",
    "MODEL.YOLOV3.CHANNELS": "(128, 256, 512)",
    "MODEL.YOLOV3.NUM_CLASSES": "80",
}


def cfg_layers(stem, depths, channels, predictions):
    """The layers of yolov3.cfg, its numbers as parameters, in its words."""
    layers = [("conv", stem, 3, 1)]
    outputs, width = [], stem
    for depth in depths:
        width *= 2
        layers.append(("conv", width, 3, 2))
        for _ in range(depth):
            layers += [("conv", width // 2, 1, 1), ("conv", width, 3, 1), ("shortcut", -3)]
        outputs.append(len(layers) - 1)
    for level, c in reversed(list(enumerate(channels))):
        if level < len(channels) - 1:
            layers += [("route", -4), ("conv", c, 1, 1), ("upsample",)]
            layers.append(("route", -1, outputs[level + 2]))
        layers += [("conv", c, 1, 1), ("conv", 2 * c, 3, 1)] * 3
        layers += [("linear", predictions), ("yolo",)]
    return layers


def interpret(layers, numbers, x):
    """Run a cfg's layers as darknet does, taking their numbers from the file one by one."""
    taken, maps, found = 0, [], []

    def take(*shape):
        nonlocal taken
        count = int(np.prod(shape))
        taken += count
        return torch.from_numpy(numbers[taken - count : taken].copy()).view(shape)

    for kind, *values in layers:
        if kind == "conv":
            filters, size, stride = values
            bias, scale, mean, variance = (take(filters, 1, 1) for _ in range(4))
            x = F.conv2d(x, take(filters, x.shape[1], size, size), None, stride, size // 2)
            x = scale * (x - mean) / torch.sqrt(variance + 1e-5) + bias
            x = torch.where(x > 0, x, 0.1 * x)
        elif kind == "linear":
            bias = take(values[0])
            x = F.conv2d(x, take(values[0], x.shape[1], 1, 1), bias)
        elif kind == "shortcut":
            x = x + maps[len(maps) + values[0]]
        elif kind == "route":
            at = [i if i >= 0 else len(maps) + i for i in values]
            x = torch.cat([maps[i] for i in at], dim=1)
        elif kind == "upsample":
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        else:
            found.append(x)
        maps.append(x)
    assert taken == len(numbers)
    return found[::-1]


def predictions_of(model, x):
    with torch.no_grad():
        maps = model.backbone(x)
        return model.head([maps[name] for name in model.head_in_features])


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "num_batches" not in k}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in a)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A model of the published size and its file."""
    model = randomized(yolov3(FULL)).eval()
    path = str(tmp_path_factory.mktemp("darknet") / "yolov3.weights")
    write_darknet_weights(path, model, images_seen=32_013_312)
    return model, path


def test_the_file_of_the_published_model(full):
    """Its length is the published one's, and a naive darknet finds in it what the model does."""
    model, path = full
    with open(path, "rb") as file:
        data = file.read()
    assert len(data) == 248_007_048
    assert struct.unpack_from("<3iq", data) == (0, 2, 0, 32_013_312)
    layers = cfg_layers(32, (1, 2, 8, 8, 4), (128, 256, 512), 255)
    assert len(layers) == 107  # as yolov3.cfg
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected = interpret(layers, np.frombuffer(data, "<f4", offset=20), x)
    for mine, theirs in zip(predictions_of(model, x), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_round_trip_of_the_published_model(full, tmp_path):
    model, path = full
    cfg = config(FULL)
    torch.manual_seed(1)
    other = build_model(cfg)
    checkpointer = GHMCheckpointer(other)
    checkpointer.load(path)
    assert checkpointer.report.warnings() == []
    assert_same_bits(state_of(other), state_of(model))
    again = str(tmp_path / "again.weights")
    write_darknet_weights(again, other, images_seen=32_013_312)
    with open(path, "rb") as first, open(again, "rb") as second:
        assert first.read() == second.read()


@pytest.fixture
def model():
    return randomized(yolov3())


def numbers_in(part):
    kinds = ("running_mean", "running_var")
    buffers = sum(b.numel() for n, b in part.named_buffers() if n.endswith(kinds))
    return sum(p.numel() for p in part.parameters()) + buffers


@pytest.mark.parametrize("ending", ["darknet53.conv.74", "darknet53.conv.74.weights"])
def test_the_backbone_alone(model, tmp_path, ending):
    """Like darknet53.conv.74: the first 52 convolutions are loaded, the head keeps its start."""
    whole = str(tmp_path / "whole.weights")
    write_darknet_weights(whole, model)
    with open(whole, "rb") as file:
        data = file.read(20 + 4 * numbers_in(model.backbone))
    path = tmp_path / ending
    path.write_bytes(data)
    other = yolov3()
    head = state_of(other.head)
    checkpointer = GHMCheckpointer(other)
    checkpointer.load(str(path))
    assert_same_bits(state_of(other.backbone), state_of(model.backbone))
    assert_same_bits(state_of(other.head), head)
    assert all(name.startswith("head.") for name in checkpointer.report.missing)
    assert checkpointer.report.missing and not checkpointer.report.unexpected


def test_the_published_backbone_has_52_convolutions():
    backbone = yolov3(FULL).backbone
    assert sum(isinstance(m, nn.Conv2d) for m in backbone.modules()) == 52
    assert 20 + 4 * numbers_in(backbone) == 162_482_580  # bytes of darknet53.conv.74


def test_frozen_stages_are_written_and_read_as_others(model, tmp_path):
    path = str(tmp_path / "some.weights")
    write_darknet_weights(path, model)
    frozen = yolov3({"MODEL.DARKNET.FREEZE_AT": "3"})
    checkpointer = GHMCheckpointer(frozen)
    checkpointer.load(path)
    assert checkpointer.report.warnings() == []
    assert_same_bits(state_of(frozen), state_of(model))
    again = str(tmp_path / "again.weights")
    write_darknet_weights(again, frozen)
    with open(path, "rb") as first, open(again, "rb") as second:
        assert first.read() == second.read()


def test_a_checkpoint_of_darknets_training(model, tmp_path):
    """Every hundred steps it writes backup/NAME.backup, by the function that writes .weights."""
    path = str(tmp_path / "yolov3.backup")
    write_darknet_weights(path, model)
    other = yolov3()
    checkpointer = GHMCheckpointer(other)
    checkpointer.load(path)
    assert checkpointer.report.warnings() == []
    assert_same_bits(state_of(other), state_of(model))


def test_the_header_before_version_0_2_is_shorter(model, tmp_path):
    path = tmp_path / "old.weights"
    write_darknet_weights(str(path), model)
    data = path.read_bytes()
    path.write_bytes(struct.pack("<4i", 0, 1, 0, 64) + data[20:])
    other = yolov3()
    other.load_state_dict(read_darknet_weights(str(path), other), strict=True)
    assert_same_bits(state_of(other), state_of(model))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data[:-4], "found {less} numbers;"),
        (lambda data: data[:-3], "found {less} numbers and 1 bytes"),
        (lambda data: data + bytes(4), "found {more} numbers"),
        (lambda data: data[:10], "too few for its header"),
        (lambda data: b"<!DOCTYPE html><title>404</title>", "does not fit"),
        (lambda data: data[:400] + struct.pack("<f", float("nan")) + data[404:], "NaN or infinite"),
        (lambda data: data[:-4] + struct.pack("<f", float("inf")), "NaN or infinite"),
        # the stem's 4 biases, weights, means, then variances
        (lambda data: data[:68] + struct.pack("<f", -1.0) + data[72:], "below 0"),
    ],
    ids=["short", "cut", "trailing", "no header", "web page", "nan", "infinite", "variance"],
)
def test_what_is_refused(model, tmp_path, spoil, said):
    path = tmp_path / "spoilt.weights"
    write_darknet_weights(str(path), model)
    path.write_bytes(spoil(path.read_bytes()))
    count = numbers_in(model)
    said = said.format(less=f"{count - 1:,}", more=f"{count + 1:,}")
    before = state_of(model)
    with pytest.raises(WeightsError) as error:
        GHMCheckpointer(model).load(str(path))
    assert said in str(error.value) and str(path) in str(error.value)
    if "numbers" in said:
        assert f"{count:,} numbers for the whole model" in str(error.value)
    assert_same_bits(state_of(model), before)


def test_a_huge_file_is_not_read(model, tmp_path):
    path = tmp_path / "huge.weights"
    with path.open("wb") as file:
        file.write(struct.pack("<3iq", 0, 2, 0, 0))
        file.truncate(1 << 36)
    with pytest.raises(WeightsError, match="17,179,869,179 numbers"):
        GHMCheckpointer(model).load(str(path))


def test_another_number_of_classes(model, tmp_path):
    path = str(tmp_path / "four.weights")
    write_darknet_weights(path, model)
    with pytest.raises(WeightsError, match="NUM_CLASSES"):
        GHMCheckpointer(yolov3({"MODEL.YOLOV3.NUM_CLASSES": "5"})).load(path)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {
                "MODEL.BACKBONE.NAME": "build_ghm_timm_backbone",
                "MODEL.TIMM.NAME": "test_efficientnet",
            },
            "build_ghm_darknet_backbone",
        ),
        ({"MODEL.DARKNET.NORM": "GN", "MODEL.DARKNET.STEM_CHANNELS": "32"}, "GroupNorm"),
    ],
)
def test_models_with_other_layers(model, tmp_path, keys, said):
    path = str(tmp_path / "some.weights")
    write_darknet_weights(path, model)
    with pytest.raises(WeightsError, match=said):
        GHMCheckpointer(yolov3(keys)).load(path)
