"""Keys of ours for a user's own class, which may be derived from one of ours, or for another."""

import pytest
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)

from ghm_d2.config import check_config, load_config
from ghm_d2.config.checks import _DETECTRON2, _OURS
from ghm_d2.errors import UsageError
from ghm_d2.register import register_all

ARCH, HEADS = "MODEL.META_ARCHITECTURE", "MODEL.ROI_HEADS.NAME"
RPN = ("MODEL.RPN.CLS_LOSS_TYPE", "ghm_c", "MODEL.PROPOSAL_GENERATOR.NAME")
WEIGHTS = ("MODEL.CLASS_WEIGHTING", "inverse")
PLAIN_P7 = ("MODEL.FPN.P7_RELU", "False")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("retinanet_ghm", (ARCH, "MyRetinaNet", *WEIGHTS, *PLAIN_P7)),
        ("retinanet_ghm", (ARCH, "MyRetinaNet", "MODEL.RETINANET.ASSIGNMENT", "atss")),
        ("yolov3_ghm", (ARCH, "MyYOLOv3")),
        ("faster_rcnn_ghm_r", (HEADS, "MyROIHeads", *WEIGHTS, *RPN, "MyRPN")),
        ("faster_rcnn_ghm_r", (ARCH, "MyRCNN", *WEIGHTS)),
    ],
)
def test_a_class_of_ones_own_may_read_them(config, words):
    check_config(load_config(f"quick/{config}.yaml", words))


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        ("retinanet_ghm", (ARCH, "RetinaNet"), "META_ARCHITECTURE GHMRetinaNet, not RetinaNet"),
        ("retinanet_ghm", (ARCH, "GHMFCOS"), "META_ARCHITECTURE GHMRetinaNet, not GHMFCOS"),
        ("ssd", PLAIN_P7, "only GHMRetinaNet and GHMFCOS read .*not GHMSSD"),
        ("faster_rcnn_sl1", PLAIN_P7, "only GHMRetinaNet and GHMFCOS .*not GeneralizedRCNN"),
        ("faster_rcnn_ghm_r", (HEADS, "CascadeROIHeads"), "ROI_HEADS.NAME GHMROIHeads, not Casc"),
        ("faster_rcnn_sl1", (HEADS, "StandardROIHeads", *WEIGHTS), "NAME, not StandardROIHeads"),
        ("faster_rcnn_sl1", (*RPN, "RPN"), "PROPOSAL_GENERATOR.NAME GHMRPN, not RPN"),
    ],
)
def test_a_class_that_is_known_to_ignore_them_is_refused(config, words, said):
    with pytest.raises(UsageError, match=said):
        check_config(load_config(f"quick/{config}.yaml", words))


def test_the_known_classes_are_those_of_detectron2_and_ours():
    register_all()
    registries = {
        "META_ARCHITECTURE": META_ARCH_REGISTRY,
        "ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
        "PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    }
    for key, registry in registries.items():
        for project, known in (("detectron2", _DETECTRON2), ("ghm_d2", _OURS)):
            names = {name for name, c in registry if c.__module__.split(".")[0] == project}
            assert names == set(known[key]) - {"PrecomputedProposals"}  # a name without a class
