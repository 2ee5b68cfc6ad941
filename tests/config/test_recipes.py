"""The recipes of configs/coco give the losses what the publications gave theirs."""

import pytest
import torch
from detectron2.modeling import build_model

from ghm_d2.config import list_configs, load_config
from ghm_d2.losses.harmonized import HarmonizedLoss
from ghm_d2.register import register_all

# counts are of one GPU in the authors' code and in mmdetection (anchor heads and ROI heads), and
# Caffe's MultiBoxLoss divides by the matches of one GPU
BY_GPU = ("retinanet", "faster_rcnn", "mask_rcnn", "ssd513", "dssd513")
RECIPES = [name for name in list_configs() if name.startswith("coco/")]


def build(name: str):
    """The model of a recipe, without values."""
    register_all()
    with torch.device("meta"):
        return build_model(load_config(name, ["MODEL.DEVICE", "meta"]))


def ghm_losses(model) -> dict:
    return {type(m).__name__: m for m in model.modules() if isinstance(m, HarmonizedLoss)}


@pytest.mark.parametrize("name", ["R_50_FPN_ghm_1x", "R_101_FPN_ghm_1x"])
def test_retinanet_has_the_published_losses(name):
    """They are those of the authors' cfg_retinanet_ghm_r50_fpn_1x.py and losses/ghm_loss.py."""
    losses = ghm_losses(build(f"coco/retinanet_{name}.yaml"))
    expected = {"GHMC": (30, 0.75, 1.0), "GHMR": (10, 0.7, 10.0)}
    assert losses.keys() == expected.keys() and losses["GHMR"].mu == 0.02
    for kind, loss in losses.items():
        density = loss.density
        assert (density.bins, density.momentum, loss.loss_weight) == expected[kind]
        options = density.scope, density.normalizer, density.ema_init, density.sync
        assert options == ("level", "valid_bins", "zero", False)


@pytest.mark.parametrize("name", RECIPES)
def test_counts_are_of_one_gpu_where_the_publication_counted_so(name):
    model = build(name)
    sync = not name.removeprefix("coco/").startswith(BY_GPU)
    assert all(loss.density.sync == sync for loss in ghm_losses(model).values())
    if hasattr(model, "loss_choice"):  # of what focal loss, smooth L1 and the like are divided by
        assert model.loss_choice.sync == sync
