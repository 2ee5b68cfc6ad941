"""Every shipped configuration builds its model and takes one training step."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny_batch import tiny_batch

from ghm_d2.config import list_configs, load_config
from ghm_d2.engine.optimizer import build_optimizer
from ghm_d2.register import register_all


def shipped(name: str):
    cfg = load_config(f"configs/{name}")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.TIMM.PRETRAINED = ""
    return cfg


def test_both_sizes_and_both_kinds_of_detectors_are_shipped():
    names = list_configs()
    assert {"quick/retinanet_focal.yaml", "quick/retinanet_ce.yaml"} <= set(names)
    assert {"quick/retinanet_ghm_c.yaml", "quick/retinanet_ghm.yaml"} <= set(names)
    assert {"quick/faster_rcnn_sl1.yaml", "quick/faster_rcnn_ghm_r.yaml"} <= set(names)
    assert sum(name.startswith("coco/") for name in names) >= 12


@pytest.mark.parametrize("name", list_configs())
def test_a_training_step(name):
    register_all()
    cfg = shipped(name)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # gradients of an untrained ResNet-101 are that small, and slow
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    classes = cfg.MODEL.RETINANET.NUM_CLASSES
    with EventStorage(0):
        losses = model(tiny_batch(min(classes, cfg.MODEL.ROI_HEADS.NUM_CLASSES)))
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    assert losses["loss_cls"] > 0
    sum(losses.values()).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_ghm_configurations_use_ghm():
    """The names tell the truth: GHM is in the files that say so, and in no other."""
    for name in list_configs():
        cfg = shipped(name)
        two_stage = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
        keys = cfg.MODEL.ROI_BOX_HEAD if two_stage else cfg.MODEL.RETINANET
        used = {keys.CLS_LOSS_TYPE, keys.BBOX_REG_LOSS_TYPE} & {"ghm_c", "ghm_r"}
        assert bool(used) == ("ghm" in name), name
