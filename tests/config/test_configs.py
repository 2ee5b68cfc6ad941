"""Every shipped configuration builds its model and takes one training step."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny_batch import tiny_batch

from ghm_d2.config import list_configs, load_config
from ghm_d2.config.detectors import loss_keys, num_classes
from ghm_d2.describe import method_name, network_name, schedule_of
from ghm_d2.experiments.suites import find_suite
from ghm_d2.register import register_all
from ghm_d2.training.optimizer import build_optimizer

ROOT = Path(__file__).parents[2]


def shipped(name: str):
    cfg = load_config(f"configs/{name}")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.TIMM.PRETRAINED = ""
    return cfg


def assert_described(name: str, cfg, model) -> None:
    """Check the row that `ghm configs` shows, which tools/describe_configs.py writes."""
    row = json.loads((ROOT / "configs" / "catalog.json").read_text(encoding="utf-8"))[name]
    assert (row["method"], row["network"]) == (method_name(cfg), network_name(cfg))
    assert row["schedule"] == asdict(schedule_of(cfg))
    assert row["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_backbone_of_another_project_has_its_own_name():
    cfg = shipped("coco/retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.BACKBONE.NAME = "build_swin_fpn_backbone"
    assert network_name(cfg) == "build_swin_fpn_backbone"


def test_every_suite_has_both_sizes():
    names = set(list_configs())
    assert {"quick/retinanet_ce.yaml", "quick/retinanet_ghm_c.yaml"} <= names
    for budget in ("quick", "full"):
        folder = "quick/" if budget == "quick" else "coco/"
        sides = find_suite(["systems"], budget).sides
        assert len(sides) >= 14
        assert all(side.config.startswith(folder) and side.config in names for side in sides)


@pytest.fixture
def no_denormals():
    """Gradients of an untrained ResNet-101 are that small, and slow."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", list_configs())
def test_it_is_described(name):
    register_all()
    cfg = shipped(name)
    cfg.MODEL.DEVICE = "meta"  # parameters have shapes but no values, which would take time
    with torch.device("meta"):
        assert_described(name, cfg, build_model(cfg))


def slow_where_deep(name: str):
    """ResNet-101 and ResNeXt-101 take seconds; there are the same heads on smaller networks.

    The published form of a quick configuration is that of the recipe in configs/coco.
    """
    slow = "_101" in name or name.endswith("_published.yaml")
    return pytest.param(name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.usefixtures("no_denormals")
@pytest.mark.parametrize("name", [slow_where_deep(name) for name in list_configs()])
def test_a_training_step(name):
    register_all()
    cfg = shipped(name)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    with EventStorage(0):
        losses = model(tiny_batch(num_classes(cfg)))
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    assert losses["loss_cls"] > 0
    sum(losses.values()).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_ghm_configurations_use_ghm():
    """The names tell the truth: GHM is in the files that say so, and in no other."""
    for name in list_configs():
        cfg = shipped(name)
        keys = loss_keys(cfg)
        used = {keys.CLS_LOSS_TYPE, keys.BBOX_REG_LOSS_TYPE} & {"ghm_c", "ghm_r"}
        assert bool(used) == ("ghm" in name), name
