"""A detector built in Python that names a GHM loss and has no module for it."""

import pytest
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY

from ghm_d2.config import load_config
from ghm_d2.errors import UsageError
from ghm_d2.modeling.two_stage.box_head import GHMFastRCNNOutputLayers
from ghm_d2.register import register_all

DETECTORS = {
    "RETINANET": ("quick/retinanet_ghm.yaml", {"CLS": "ghm_c", "BBOX_REG": "ghm_r"}),
    "YOLOV3": ("quick/yolov3_ghm.yaml", {"OBJ": "ghm_obj", "CLS": "ghm_c", "BBOX_REG": "ghm_r"}),
    "SSD": ("quick/ssd_ghm.yaml", {"CLS": "ghm_c", "BBOX_REG": "ghm_r"}),
    "FCOS": ("quick/fcos_ghm_c.yaml", {"CLS": "ghm_c", "BBOX_REG": "ghm_r"}),
}
CASES = [
    (config, f"MODEL.{keys}.{loss}_LOSS_TYPE", module)
    for keys, (config, losses) in DETECTORS.items()
    for loss, module in losses.items()
]


@pytest.mark.parametrize(("config", "key", "module"), CASES)
def test_is_refused(config, key, module):
    register_all()
    overrides = ["MODEL.TIMM.PRETRAINED", "", "MODEL.FCOS.BBOX_REG_LOSS_TYPE", "ghm_r"]
    cfg = load_config(config, overrides)
    detector = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    arguments = detector.from_config(cfg)
    detector(**arguments)
    arguments[module] = None
    with pytest.raises(UsageError, match=f"{key} ghm_. needs a loss module"):
        detector(**arguments)


def test_is_refused_in_a_box_head():
    cfg = load_config("quick/faster_rcnn_ghm_r.yaml")
    arguments = GHMFastRCNNOutputLayers.from_config(cfg, ShapeSpec(channels=8))
    arguments["ghm_r"] = None
    with pytest.raises(UsageError, match=r"ROI_BOX_HEAD\.BBOX_REG_LOSS_TYPE ghm_r needs"):
        GHMFastRCNNOutputLayers(**arguments)
