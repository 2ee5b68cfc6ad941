"""Checks of a complete configuration: ranges, and loss types that their detector would ignore."""

from ghm_d2.config.detectors import LOSS_GROUPS, TWO_STAGE
from ghm_d2.errors import UsageError

_OF_OURS = ("asl1", "ghm_r")
# (group and key of a loss type, its values of ours, what must have which value to read them)
_READERS = (
    ("RETINANET", "CLS_LOSS_TYPE", ("ce", "ohem", "ghm_c"), "META_ARCHITECTURE", "GHMRetinaNet"),
    ("RETINANET", "BBOX_REG_LOSS_TYPE", _OF_OURS, "META_ARCHITECTURE", "GHMRetinaNet"),
    ("ROI_BOX_HEAD", "CLS_LOSS_TYPE", ("ghm_c",), "ROI_HEADS.NAME", "GHMROIHeads"),
    ("ROI_BOX_HEAD", "BBOX_REG_LOSS_TYPE", _OF_OURS, "ROI_HEADS.NAME", "GHMROIHeads"),
    ("RPN", "CLS_LOSS_TYPE", ("ghm_c",), "PROPOSAL_GENERATOR.NAME", "GHMRPN"),
    ("YOLOV3", "OBJ_LOSS_TYPE", ("ghm_c",), "META_ARCHITECTURE", "YOLOv3"),
    *(
        row
        for group, arch in (("YOLOV3", "YOLOv3"), ("SSD", "SSD"), ("FCOS", "GHMFCOS"))
        for row in (
            (group, "CLS_LOSS_TYPE", ("ghm_c",), "META_ARCHITECTURE", arch),
            (group, "BBOX_REG_LOSS_TYPE", _OF_OURS, "META_ARCHITECTURE", arch),
        )
    ),
)

# (what a number must be, in words and as a test, keys of MODEL)
_RANGES = (
    ("above 0", lambda x: x > 0, ("GHM.REG.MU", "SSD.NEG_POS_RATIO")),
    ("at least 0", lambda x: x >= 0, [f"{group}.BBOX_REG_LOSS_WEIGHT" for group in LOSS_GROUPS]),
    ("at least 0", lambda x: x >= 0, ("YOLOV3.SMOOTH_L1_BETA", "SSD.SMOOTH_L1_BETA")),
    ("at least 0", lambda x: x >= 0, ("FCOS.SMOOTH_L1_LOSS_BETA",)),
    ("at least 1", lambda x: x >= 1, ("YOLOV3.TOPK_CANDIDATES_TEST", "SSD.TOPK_CANDIDATES_TEST")),
    ("at least 4", lambda x: x >= 4, ("SSD.EXTRA_CHANNELS",)),
    ("0 or at least 4", lambda x: x == 0 or x >= 4, ("SSD.HEAD_CHANNELS",)),
    ("between 0 and 1", lambda x: 0 < x < 1, ("SSD.PRIOR_PROB", "FCOS.PRIOR_PROB")),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, ("SSD.IOU_THRESHOLD", "YOLOV3.IGNORE_IOU")),
)


def check_config(cfg) -> None:
    """Find what would fail late or be ignored.

    Raises:
        UsageError: a value out of range, or one of our loss types for a class that does not
            read it.
    """
    solver = cfg.SOLVER
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD", "ACCUMULATE"):
        if solver[key] < 1:
            raise UsageError(f"SOLVER.{key} is at least 1, not {solver[key]}")
    if not solver.BASE_LR > 0:
        raise UsageError(f"SOLVER.BASE_LR is above 0, not {solver.BASE_LR}")
    _check_steps(cfg)
    model = cfg.MODEL
    for words, holds, keys in _RANGES:
        for key in keys:
            if not holds(get_key(model, key)):
                raise UsageError(f"MODEL.{key} is {words}, not {get_key(model, key)}")
    two_stage = model.META_ARCHITECTURE == TWO_STAGE
    # one stage may carry the settings of two and the other way round, as bases do
    read = {"RETINANET": not two_stage, "ROI_BOX_HEAD": two_stage, "RPN": two_stage}
    for group, key, types, reader, needed in _READERS:
        value, found = model[group][key], get_key(model, reader)
        if read.get(group, True) and value in types and found != needed:
            raise UsageError(
                f"MODEL.{group}.{key} {value} needs MODEL.{reader} {needed}, not {found}"
            )


def _check_steps(cfg) -> None:
    """What a step is, beyond Detectron2's own keys."""
    solver, dtype = cfg.SOLVER, cfg.SOLVER.AMP.DTYPE
    choices = (
        ("AMP.DTYPE", dtype, ("", "float16", "bfloat16")),
        ("ON_DIVERGENCE", solver.ON_DIVERGENCE, ("stop", "skip")),
    )
    for key, value, known in choices:
        if value not in known:
            named = ", ".join(x or "''" for x in known)
            raise UsageError(f"SOLVER.{key} is one of {named}, not {value!r}")
    if solver.AMP.ENABLED and dtype == "float16" and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise UsageError("SOLVER.AMP.DTYPE float16 is for GPUs; a CPU takes bfloat16")
    for key, value in (
        ("SOLVER.MAX_SKIPPED_STEPS", solver.MAX_SKIPPED_STEPS),
        ("DATALOADER.MAX_BAD_IMAGES", cfg.DATALOADER.MAX_BAD_IMAGES),
    ):
        if value < 0:
            raise UsageError(f"{key} is at least 0, not {value}")


def get_key(node, key: str):
    """The value under a dotted key."""
    for part in key.split("."):
        node = node[part]
    return node
