"""The ResNet and ResNeXt recipes are the networks that they are named after.

Detectron2's tests/test_model_analysis.py gives the parameters of its R-50 detectors and the
operations of their convolutions at 800 x 800 px; torchvision's own ResNets tell what another
backbone changes. Detectron2's batch norm is frozen and has no parameters.
"""

import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis

from ghm_d2.config import list_configs, load_config
from ghm_d2.register import register_all

R_50 = {"retinanet": 37_915_572, "faster_rcnn": 41_699_936}
# what a mask head adds (arXiv 1703.06870, figure 4): four 3x3 convolutions of 256 channels, a
# 2x2 deconvolution, 80 masks
MASK_HEAD = 4 * (9 * 256 * 256 + 256) + (4 * 256 * 256 + 256) + (256 * 80 + 80)
BACKBONES = {
    "R_50": torchvision.models.resnet50,
    "R_101": torchvision.models.resnet101,
    "X_101_32x8d": torchvision.models.resnext101_32x8d,
    "X_101_64x4d": torchvision.models.resnext101_64x4d,
}
RECIPES = [
    name
    for name in list_configs()
    if name.startswith(("coco/retinanet_", "coco/faster_rcnn_", "coco/mask_rcnn_"))
]


def built(name: str, device: str = "meta"):
    """Build a recipe's model; on "meta" parameters have shapes but no values, which take time."""
    register_all()
    cfg = load_config(name, ["MODEL.WEIGHTS", "", "MODEL.DEVICE", device])
    with torch.device(device):
        return build_model(cfg).eval()


def convolutions(backbone: str) -> int:
    """Parameters of torchvision's network without its batch norm and classifier."""
    with torch.device("meta"):
        network = BACKBONES[backbone]()
    return sum(
        sum(p.numel() for p in module.parameters())
        for module in network.modules()
        if isinstance(module, torch.nn.Conv2d)
    )


def test_all_recipes_are_looked_at():
    assert len(RECIPES) == 8 + 4 + 6


@pytest.mark.parametrize("name", RECIPES)
def test_parameters(name):
    detector = next(d for d in ("retinanet", "faster_rcnn", "mask_rcnn") if d in name)
    backbone = next(b for b in BACKBONES if b in name)
    expected = R_50["retinanet" if detector == "retinanet" else "faster_rcnn"]
    expected += convolutions(backbone) - convolutions("R_50")
    expected += MASK_HEAD if detector == "mask_rcnn" else 0
    assert sum(p.numel() for p in built(name).parameters()) == expected


@pytest.mark.slow  # seconds each, for networks that Detectron2 builds
@pytest.mark.parametrize(
    ("name", "billions"),
    [("coco/retinanet_R_50_FPN_1x.yaml", 146), ("coco/faster_rcnn_R_50_FPN_1x.yaml", 117)],
)
def test_operations_of_the_convolutions(name, billions):
    inputs = [{"image": torch.rand(3, 800, 800)}]
    count = FlopCountAnalysis(built(name, "cpu"), (inputs,))
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    assert int(count.by_operator()["conv"] / 1e9) == billions


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (
            "coco/retinanet_R_101_FPN_ghm_1x.yaml",
            {"p3": (32, 40), "p4": (16, 20), "p5": (8, 10), "p6": (4, 5), "p7": (2, 3)},
        ),
        (
            "coco/faster_rcnn_R_101_FPN_ghm_r_1x.yaml",
            {"p2": (64, 80), "p3": (32, 40), "p4": (16, 20), "p5": (8, 10), "p6": (4, 5)},
        ),
    ],
)
def test_feature_maps(name, sizes):
    """FPN, arXiv 1612.03144, section 3; its P6 and P7 in RetinaNet, arXiv 1708.02002, section 4."""
    with torch.no_grad():
        maps = built(name).backbone(torch.zeros(1, 3, 256, 320, device="meta"))
    assert {k: tuple(x.shape) for k, x in maps.items()} == {
        k: (1, 256, *size) for k, size in sizes.items()
    }
