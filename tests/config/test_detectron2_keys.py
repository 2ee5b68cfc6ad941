"""Every key of Detectron2 is read here or refused: none is ignored."""

import re
from functools import cache
from pathlib import Path

import detectron2
import pytest
from detectron2.config import get_cfg as detectron2_defaults

import ghm_d2
from ghm_d2.config import check_detectron2_keys, get_cfg, load_config
from ghm_d2.config.detectron2_keys import READ, REFUSED
from ghm_d2.config.loader import flatten
from ghm_d2.errors import UsageError
from ghm_d2.training.prepare import prepare_detector

# keys of Detectron2's main that version 0.6 does not have
NEWER = {
    "DATALOADER.REPEAT_SQRT",
    "FLOAT32_PRECISION",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES",
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS",
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE",
    "SOLVER.BASE_LR_END",
    "SOLVER.NUM_DECAYS",
    "SOLVER.RESCALE_INTERVAL",
}
KEYS = sorted(flatten(detectron2_defaults()))
# what reads a configuration on the way of `ghm`: Detectron2's DefaultTrainer is not on it
SOURCES = [
    *(Path(detectron2.__file__).parent / part for part in ("modeling", "data", "solver", "engine")),
    Path(ghm_d2.__file__).parent,
]


def classes_of(key: str) -> list[str]:
    return [known for known in (*READ, *REFUSED) if f"{key}.".startswith(f"{known}.")]


@pytest.mark.parametrize("key", sorted({*KEYS, *NEWER}))
def test_a_key_is_read_or_refused(key):
    assert len(classes_of(key)) == 1


def test_no_class_is_of_a_key_that_detectron2_does_not_have():
    unknown = {k for k in (*READ, *REFUSED) if not any(k in classes_of(x) for x in KEYS)}
    assert unknown <= NEWER


@cache
def source() -> str:
    files = (file for part in SOURCES for file in part.rglob("*.py"))
    skipped = ("config/", "engine/defaults.py")
    read = (f for f in files if not any(part in f.as_posix() for part in skipped))
    return "\n".join(file.read_text(encoding="utf-8") for file in read)


def test_what_is_read_has_a_reader():
    names = {key.rpartition(".")[2] for key in KEYS if classes_of(key)[0] in READ}
    # Detectron2's auto_scale_workers, which prepare.py calls
    names -= {"REFERENCE_WORLD_SIZE"}
    known = set(re.findall(r"\w+", source()))
    assert not names - known


@pytest.mark.parametrize("known", REFUSED)
def test_what_is_refused_is_refused_with_the_reason(known):
    cfg = get_cfg()
    check_detectron2_keys(cfg)
    key = next(key for key in KEYS if known in classes_of(key))
    *groups, last = key.split(".")
    node = cfg
    for group in groups:
        node = node[group]
    node[last] = "another"
    with pytest.raises(UsageError, match=f"{key} is not supported: {re.escape(REFUSED[known])}"):
        check_detectron2_keys(cfg)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("quick/retinanet_ghm.yaml", "VIS_PERIOD 20"),
        ("quick/yolov3.yaml", "MODEL.MASK_ON True"),
        ("quick/retinanet_ghm.yaml", "MODEL.META_ARCHITECTURE PanopticFPN"),
        ("quick/retinanet_ghm.yaml", "TEST.AUG.ENABLED True MODEL.META_ARCHITECTURE Another"),
        ("quick/faster_rcnn_sl1.yaml", "MODEL.PROPOSAL_GENERATOR.NAME RRPN"),
        ("quick/faster_rcnn_sl1.yaml", "MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals"),
        ("quick/retinanet_ghm.yaml", "MODEL.BACKBONE.FREEZE_AT 3"),
        ("coco/yolov3_darknet53.yaml", "MODEL.BACKBONE.FREEZE_AT 3"),
        ("quick/ssd.yaml", "SOLVER.NESTEROV True SOLVER.OPTIMIZER ADAMW"),
    ],
)
def test_values_without_effect_beside_others(config, words):
    key = words.partition(" ")[0]
    with pytest.raises(UsageError, match=rf"{key} \w+ is not supported: "):
        prepare_detector(config, words.split())


def test_the_pictures_of_two_stage_detectors_are_supported():
    words = ["VIS_PERIOD", "20", "MODEL.BACKBONE.FREEZE_AT", "3"]
    check_detectron2_keys(load_config("coco/faster_rcnn_R_50_FPN_1x.yaml", words))
