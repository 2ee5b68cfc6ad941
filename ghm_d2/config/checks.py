"""Checks of a complete configuration: ranges, and loss types that the detector would ignore."""

from ghm_d2.config.detectors import LOSS_GROUPS, TWO_STAGE
from ghm_d2.config.renamed import current_name
from ghm_d2.errors import UsageError

TRACKERS = ("wandb", "mlflow")
# Our classes, and those of Detectron2, by the key of MODEL that chooses one
_OURS = {
    "META_ARCHITECTURE": ("GHMRetinaNet", "GHMYOLOv3", "GHMSSD", "GHMFCOS"),
    "ROI_HEADS.NAME": ("GHMROIHeads",),
    "PROPOSAL_GENERATOR.NAME": ("GHMRPN",),
}
_DETECTRON2 = {
    "META_ARCHITECTURE": (
        "RetinaNet",
        TWO_STAGE,
        "PanopticFPN",
        "SemanticSegmentor",
        "ProposalNetwork",
    ),
    "ROI_HEADS.NAME": ("StandardROIHeads", "Res5ROIHeads", "CascadeROIHeads", "RROIHeads"),
    "PROPOSAL_GENERATOR.NAME": ("RPN", "RRPN", "PrecomputedProposals"),
}
_BOX_LOSSES = ("asl1", "ghm_r")
_CLASS_LOSSES = ("ce", "ohem", "qfl", "vfl", "ghm_c")
# Values that Detectron2's own classes do not know: (group of MODEL, key, values, the key of MODEL
# that chooses the class, the class that reads them)
_READERS = [
    ("RETINANET", "CLS_LOSS_TYPE", _CLASS_LOSSES, "META_ARCHITECTURE", "GHMRetinaNet"),
    ("RETINANET", "ASSIGNMENT", ("atss",), "META_ARCHITECTURE", "GHMRetinaNet"),
    ("RETINANET", "BBOX_REG_LOSS_TYPE", _BOX_LOSSES, "META_ARCHITECTURE", "GHMRetinaNet"),
    ("ROI_BOX_HEAD", "CLS_LOSS_TYPE", ("ghm_c",), "ROI_HEADS.NAME", "GHMROIHeads"),
    ("ROI_BOX_HEAD", "BBOX_REG_LOSS_TYPE", _BOX_LOSSES, "ROI_HEADS.NAME", "GHMROIHeads"),
    ("RPN", "CLS_LOSS_TYPE", ("ghm_c",), "PROPOSAL_GENERATOR.NAME", "GHMRPN"),
    ("YOLOV3", "OBJ_LOSS_TYPE", ("ghm_c",), "META_ARCHITECTURE", "GHMYOLOv3"),
]
for _group, _arch in (("YOLOV3", "GHMYOLOv3"), ("SSD", "GHMSSD"), ("FCOS", "GHMFCOS")):
    _READERS += [
        (_group, "CLS_LOSS_TYPE", ("ghm_c",), "META_ARCHITECTURE", _arch),
        (_group, "BBOX_REG_LOSS_TYPE", _BOX_LOSSES, "META_ARCHITECTURE", _arch),
    ]

# (allowed range in words, the same as a test, keys)
_RANGES = (
    ("at least 1", lambda x: x >= 1, ("SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH")),
    ("at least 1", lambda x: x >= 1, ("SOLVER.CHECKPOINT_PERIOD", "SOLVER.ACCUMULATE")),
    ("above 0", lambda x: x > 0, ("SOLVER.BASE_LR",)),
    ("between 0 and 1", lambda x: 0 <= x <= 1, ("INPUT.MOSAIC", "INPUT.MIXUP")),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, ("SOLVER.EMA_DECAY",)),
    ("at least 0", lambda x: x >= 0, ("SOLVER.PATIENCE", "SOLVER.CHECKPOINTS_KEPT")),
    ("at least 0", lambda x: x >= 0, ("SOLVER.MAX_SKIPPED_STEPS", "DATALOADER.MAX_BAD_IMAGES")),
    ("above 0", lambda x: x > 0, ("MODEL.GHM.REG.MU", "MODEL.SSD.NEG_POS_RATIO")),
    ("at least 0", lambda x: x >= 0, [f"MODEL.{g}.BBOX_REG_LOSS_WEIGHT" for g in LOSS_GROUPS]),
    ("at least 0", lambda x: x >= 0, ("MODEL.YOLOV3.SMOOTH_L1_BETA", "MODEL.SSD.SMOOTH_L1_BETA")),
    ("at least 0", lambda x: x >= 0, ("MODEL.FCOS.SMOOTH_L1_LOSS_BETA",)),
    (
        "at least 1",
        lambda x: x >= 1,
        [f"MODEL.{g}.TOPK_CANDIDATES_TEST" for g in ("YOLOV3", "SSD")],
    ),
    ("at least 4", lambda x: x >= 4, ("MODEL.SSD.EXTRA_CHANNELS",)),
    ("0 or at least 4", lambda x: x == 0 or x >= 4, ("MODEL.SSD.HEAD_CHANNELS",)),
    (
        "above 0 and below 1",
        lambda x: 0 < x < 1,
        [f"MODEL.{g}.PRIOR_PROB" for g in ("YOLOV3", "SSD", "FCOS")],
    ),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, ("MODEL.SSD.IOU_THRESHOLD",)),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, ("MODEL.YOLOV3.IGNORE_IOU",)),
)
_CHOICES = {
    "SOLVER.AMP.DTYPE": ("", "float16", "bfloat16"),
    "SOLVER.ON_DIVERGENCE": ("stop", "skip"),
    "MODEL.CLASS_WEIGHTING": ("", "inverse", "effective", "given"),
}


def check_config(cfg) -> None:
    """Refuse values that would fail late or be ignored.

    A class of the user's own is not refused: it may be derived from one of ours, and read our keys.

    Raises:
        UsageError: a value out of range, one of our loss types for a class that does not read it,
            or keys that exclude each other.
    """
    for words, holds, keys in _RANGES:
        for key in keys:
            if not holds(_get(cfg, key)):
                raise UsageError(f"{key} must be {words}, not {_get(cfg, key)}")
    for key, choices in _CHOICES.items():
        if _get(cfg, key) not in choices:
            named = ", ".join(choice or "''" for choice in choices)
            raise UsageError(f"{key} must be one of {named}, not {_get(cfg, key)!r}")
    half_on_cpu = cfg.SOLVER.AMP.DTYPE == "float16" and not cfg.MODEL.DEVICE.startswith("cuda")
    if cfg.SOLVER.AMP.ENABLED and half_on_cpu:
        raise UsageError("SOLVER.AMP.DTYPE float16 needs a CUDA GPU; use bfloat16 on a CPU")
    if cfg.SOLVER.EMA_DECAY and cfg.TEST.PRECISE_BN.ENABLED:
        raise UsageError(
            "TEST.PRECISE_BN.ENABLED and SOLVER.EMA_DECAY exclude each other: precise BN works on "
            "the last weights, not on the averaged ones; switch one of them off"
        )
    for tracker in cfg.SOLVER.TRACKERS:
        if tracker not in TRACKERS:
            raise UsageError(
                f"each of SOLVER.TRACKERS must be one of {', '.join(TRACKERS)}, not {tracker!r}"
            )
    if cfg.SOLVER.PATIENCE and not cfg.TEST.EVAL_PERIOD:
        raise UsageError("SOLVER.PATIENCE counts evaluations; set TEST.EVAL_PERIOD above 0")
    _check_readers(cfg.MODEL)
    _check_class_weights(cfg.MODEL)
    fpn = cfg.MODEL.FPN
    ignores = _ignores(cfg.MODEL, "META_ARCHITECTURE", ("GHMRetinaNet", "GHMFCOS"))
    if ignores and (fpn.P6_INPUT or not fpn.P7_RELU):
        raise UsageError(
            f"only GHMRetinaNet and GHMFCOS read MODEL.FPN.P6_INPUT and MODEL.FPN.P7_RELU, not "
            f"{ignores}; keep the defaults '' and True"
        )


def _check_readers(model) -> None:
    two_stage = model.META_ARCHITECTURE == TWO_STAGE
    # base files set keys of both one-stage and two-stage detectors: only those in use count
    read = {"RETINANET": not two_stage, "ROI_BOX_HEAD": two_stage, "RPN": two_stage}
    for group, key, types, reader, needed in _READERS:
        value, ignores = model[group][key], _ignores(model, reader, (needed,))
        if read.get(group, True) and value in types and ignores:
            raise UsageError(
                f"MODEL.{group}.{key} {value} needs MODEL.{reader} {needed}, not {ignores}"
            )


def _check_class_weights(model) -> None:
    weighting, given = model.CLASS_WEIGHTING, bool(len(model.CLASS_WEIGHTS))
    if given != bool(weighting) and weighting not in ("inverse", "effective"):
        raise UsageError(
            f"MODEL.CLASS_WEIGHTS has {len(model.CLASS_WEIGHTS)} weights, but "
            f"MODEL.CLASS_WEIGHTING is {weighting!r}; your own weights need 'given', and 'given' "
            "needs weights"
        )
    reader = "ROI_HEADS.NAME" if model.META_ARCHITECTURE == TWO_STAGE else "META_ARCHITECTURE"
    ignores = _ignores(model, reader, _OURS[reader])
    if weighting and ignores:
        raise UsageError(
            f"MODEL.CLASS_WEIGHTING needs a GHM class as MODEL.{reader}, not {ignores}"
        )


def _ignores(model, reader: str, needed: tuple[str, ...]) -> str:
    """Return the class that MODEL.`reader` names if it is known and not in `needed`; else ""."""
    found = current_name(f"MODEL.{reader}", _get(model, reader))
    known = (*_DETECTRON2[reader], *_OURS[reader])
    return found if found in known and found not in needed else ""


def _get(node, key: str):
    """The value under a dotted key."""
    for part in key.split("."):
        node = node[part]
    return node
