"""Detectron2's configuration keys: each one is read or refused, and none is ignored.

An entry is a key or a whole group. Keys that Detectron2's main branch has and version 0.6 lacks
are listed too.
"""

from collections.abc import Iterator

from ghm_d2.config.detectors import DETECTORS, TWO_STAGE
from ghm_d2.config.loader import flatten
from ghm_d2.errors import UsageError

READ = (
    # read by Detectron2's models, or by ours that are derived from them
    "MODEL.ANCHOR_GENERATOR",
    "MODEL.BACKBONE",
    "MODEL.DEVICE",
    "MODEL.FPN",
    "MODEL.MASK_ON",
    "MODEL.META_ARCHITECTURE",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.PROPOSAL_GENERATOR",
    "MODEL.RESNETS",
    "MODEL.RETINANET",
    "MODEL.ROI_BOX_CASCADE_HEAD",
    "MODEL.ROI_BOX_HEAD",
    "MODEL.ROI_HEADS",
    "MODEL.ROI_MASK_HEAD",
    "MODEL.RPN",
    "MODEL.WEIGHTS",
    # read by the loaders
    "DATALOADER.ASPECT_RATIO_GROUPING",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.REPEAT_SQRT",
    "DATALOADER.REPEAT_THRESHOLD",
    "DATALOADER.SAMPLER_TRAIN",
    "DATASETS.TEST",
    "DATASETS.TRAIN",
    "INPUT.CROP",
    "INPUT.FORMAT",
    "INPUT.MASK_FORMAT",
    "INPUT.MAX_SIZE_TEST",
    "INPUT.MAX_SIZE_TRAIN",
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MIN_SIZE_TRAIN",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING",
    "INPUT.RANDOM_FLIP",
    # read by the optimizer, Detectron2's learning rate schedule and the trainer
    "CUDNN_BENCHMARK",
    "FLOAT32_PRECISION",
    "OUTPUT_DIR",
    "SEED",
    "SOLVER.AMP",
    "SOLVER.BASE_LR",
    "SOLVER.BASE_LR_END",
    "SOLVER.BIAS_LR_FACTOR",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CLIP_GRADIENTS",
    "SOLVER.GAMMA",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.LR_SCHEDULER_NAME",
    "SOLVER.MAX_ITER",
    "SOLVER.MOMENTUM",
    "SOLVER.NESTEROV",
    "SOLVER.NUM_DECAYS",
    "SOLVER.REFERENCE_WORLD_SIZE",
    "SOLVER.RESCALE_INTERVAL",
    "SOLVER.STEPS",
    "SOLVER.WARMUP_FACTOR",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.WARMUP_METHOD",
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.WEIGHT_DECAY_BIAS",
    "SOLVER.WEIGHT_DECAY_NORM",
    "VIS_PERIOD",
    # read by evaluations
    "TEST.AUG",
    "TEST.DETECTIONS_PER_IMAGE",
    "TEST.EVAL_PERIOD",
    "TEST.EXPECTED_RESULTS",
    "TEST.PRECISE_BN",
)

_KEYPOINTS = "ghm_d2 has no keypoint detector; use Detectron2's tools/train_net.py"
_PROPOSALS = "Detectron2 would execute code in proposal files; use GeneralizedRCNN with its RPN"
_SEGMENTS = "ghm_d2 detects only boxes and instance masks; use Detectron2's tools/train_net.py"
# key -> why only Detectron2's default is accepted, and what to do instead
REFUSED = {
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": _PROPOSALS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": _PROPOSALS,
    "DATASETS.PROPOSAL_FILES_TEST": _PROPOSALS,
    "DATASETS.PROPOSAL_FILES_TRAIN": _PROPOSALS,
    "GLOBAL.HACK": "no code reads it; remove it",
    "MODEL.KEYPOINT_ON": _KEYPOINTS,
    "MODEL.LOAD_PROPOSALS": _PROPOSALS,
    "MODEL.PANOPTIC_FPN": _SEGMENTS,
    "MODEL.ROI_KEYPOINT_HEAD": _KEYPOINTS,
    "MODEL.SEM_SEG_HEAD": _SEGMENTS,
    "TEST.KEYPOINT_OKS_SIGMAS": _KEYPOINTS,
    "VERSION": "convert the file with detectron2.config.upgrade_config",
}
_ROTATED = "ghm_d2 neither loads nor evaluates rotated boxes; choose a class for upright boxes"
_FREEZE = "this backbone reads the number of frozen stages from MODEL.{}.FREEZE_AT; set that key"


def check_detectron2_keys(cfg) -> None:
    """Refuse values of Detectron2's keys that would have no effect.

    Raises:
        UsageError: names the key, the reason and what to do.
    """
    from detectron2.config import get_cfg

    values = flatten(cfg)
    for key, default in flatten(get_cfg()).items():
        reason = next((r for k, r in REFUSED.items() if f"{key}.".startswith(f"{k}.")), None)
        if reason and values[key] != default:
            raise UsageError(f"{key} is not supported: {reason}")
    for key, reason in _without_effect(cfg):
        raise UsageError(f"{key} {values[key]} is not supported: {reason}")


def _without_effect(cfg) -> Iterator[tuple[str, str]]:
    """Yield (key, reason) for values that would have no effect in this configuration."""
    model = cfg.MODEL
    two_stage, ours = model.META_ARCHITECTURE == TWO_STAGE, DETECTORS
    if model.META_ARCHITECTURE in ("PanopticFPN", "SemanticSegmentor", "ProposalNetwork"):
        yield "MODEL.META_ARCHITECTURE", _SEGMENTS
    if model.META_ARCHITECTURE not in ours and cfg.TEST.AUG.ENABLED:
        yield "TEST.AUG.ENABLED", f"only {', '.join(ours)} support it; set it to False"
    if model.META_ARCHITECTURE in ours and not two_stage:
        if cfg.VIS_PERIOD > 0:
            yield "VIS_PERIOD", "only GeneralizedRCNN draws pictures while it trains; set it to 0"
        if model.MASK_ON:
            yield "MODEL.MASK_ON", "only GeneralizedRCNN predicts masks; set it to False"
    for key in ("PROPOSAL_GENERATOR", "ROI_HEADS", "ANCHOR_GENERATOR"):
        if model[key].NAME in ("RRPN", "RROIHeads", "RotatedAnchorGenerator"):
            yield f"MODEL.{key}.NAME", _ROTATED
    if model.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
        yield "MODEL.PROPOSAL_GENERATOR.NAME", _PROPOSALS
    for group in ("TIMM", "DARKNET"):
        if group.lower() in model.BACKBONE.NAME and model.BACKBONE.FREEZE_AT != 2:  # the default
            yield "MODEL.BACKBONE.FREEZE_AT", _FREEZE.format(group)
    if cfg.SOLVER.NESTEROV and cfg.SOLVER.OPTIMIZER != "SGD":
        yield "SOLVER.NESTEROV", "only SOLVER.OPTIMIZER SGD uses it; set it to False"
