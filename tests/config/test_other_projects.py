"""Configuration keys of other projects beside ours, whoever adds theirs first."""

import pytest
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model

from ghm_d2.config import add_ghm_config
from ghm_d2.errors import UsageError
from ghm_d2.modeling.build_losses import build_ghm_c, build_ghm_r, class_weights
from ghm_d2.modeling.fcos import GHMFCOS
from ghm_d2.modeling.retinanet import GHMRetinaNet
from ghm_d2.modeling.two_stage.box_head import GHMFastRCNNOutputLayers, GHMROIHeads
from ghm_d2.modeling.two_stage.rpn import GHMRPN
from ghm_d2.register import register_all


def add_adelaidet(cfg) -> None:
    """Add the AdelaiDet keys whose group has the name of one of ours."""
    cfg.MODEL.FCOS = CN()
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.FCOS.FPN_STRIDES = [8, 16, 32, 64, 128]
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    cfg.MODEL.FCOS.INFERENCE_TH_TEST = 0.05
    cfg.MODEL.FCOS.NORM = "GN"
    cfg.MODEL.FCOS.LOC_LOSS_TYPE = "giou"


def add_detic(cfg) -> None:
    """Add the Detic keys whose group has the name of one of ours, and MaskFormer's optimizer."""
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.BASE_NAME = "resnet50"
    cfg.MODEL.TIMM.FREEZE_AT = 0
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.SOLVER.OPTIMIZER = "ADAMW"


def test_keys_of_others_stay(caplog):
    cfg = get_cfg()
    add_adelaidet(cfg)
    add_detic(cfg)
    cfg.MODEL.FCOS.NUM_CLASSES = 7
    theirs = cfg.clone()
    add_ghm_config(cfg)
    assert cfg.SOLVER.OPTIMIZER == "ADAMW" and cfg.MODEL.TIMM.PRETRAINED is False
    assert cfg.MODEL.FCOS.items() >= theirs.MODEL.FCOS.items()
    assert cfg.MODEL.FCOS.CLS_LOSS_TYPE == "focal" and cfg.SOLVER.ACCUMULATE == 1
    assert "MODEL.FCOS.NUM_CLASSES 7" in caplog.text and "SOLVER.OPTIMIZER" in caplog.text
    assert "IN_FEATURES" not in caplog.text  # the same values, as a list


def test_called_twice_it_changes_nothing(caplog):
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.MODEL.FCOS.CLS_LOSS_TYPE, cfg.SOLVER.OPTIMIZER = "ghm_c", "ADAMW"
    before = cfg.clone()
    add_ghm_config(cfg)
    assert cfg == before and not caplog.records


def test_called_again_it_restores_what_another_project_removed():
    cfg, first = get_cfg(), get_cfg()
    for add in (add_ghm_config, add_adelaidet, add_detic, add_ghm_config):
        add(cfg)
    for add in (add_adelaidet, add_detic, add_ghm_config):
        add(first)
    assert cfg == first


def test_a_value_in_the_place_of_a_group():
    cfg = get_cfg()
    cfg.MODEL.SSD = False
    with pytest.raises(UsageError, match=r"MODEL\.SSD conflicts with a key of another project"):
        add_ghm_config(cfg)


def test_a_detector_whose_keys_were_removed_is_not_built():
    register_all()
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "GHMFCOS", "cpu"
    cfg.MODEL.FCOS.CLS_LOSS_TYPE = "ghm_c"
    add_adelaidet(cfg)  # which must not turn the loss back to focal
    with pytest.raises(UsageError, match=r"MODEL.FCOS.* is missing: call .*add_ghm_config\(cfg\)"):
        build_model(cfg)


def test_a_key_with_another_meaning_is_not_read():
    register_all()
    cfg = get_cfg()
    add_detic(cfg)
    add_ghm_config(cfg)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DEVICE = "build_ghm_timm_backbone", "cpu"
    with pytest.raises(UsageError, match=r"MODEL\.TIMM\.PRETRAINED is False.* set it to a str"):
        build_model(cfg)


@pytest.mark.parametrize(
    "build",
    [
        GHMRetinaNet,
        GHMFCOS,
        lambda cfg: GHMRPN(cfg, {}),
        lambda cfg: GHMROIHeads(cfg, {}),
        lambda cfg: GHMFastRCNNOutputLayers(cfg, None),
        build_ghm_c,
        build_ghm_r,
        lambda cfg: class_weights(cfg, 2, "focal"),
    ],
)
def test_without_our_keys_the_function_that_adds_them_is_named(build):
    with pytest.raises(UsageError, match=r"is missing: call ghm_d2.config.add_ghm_config\(cfg\)"):
        build(get_cfg())


@pytest.mark.parametrize("arch", ["GHMRetinaNet", "GHMFCOS", "GHMSSD", "GHMYOLOv3"])
def test_so_it_is_in_detectron2s_trainer(arch, monkeypatch):
    register_all()
    monkeypatch.setattr("detectron2.engine.defaults.setup_logger", lambda: None)
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = arch
    with pytest.raises(UsageError, match=r"call ghm_d2.config.add_ghm_config\(cfg\)"):
        DefaultTrainer(cfg)
