"""The meta-architectures that commands know, and where their configuration keys are."""

from dataclasses import dataclass

from ghm_d2.errors import UsageError

TWO_STAGE = "GeneralizedRCNN"


@dataclass(frozen=True)
class Detector:
    """One value of MODEL.META_ARCHITECTURE.

    group: the group of MODEL with CLS_LOSS_TYPE, BBOX_REG_LOSS_TYPE and BBOX_REG_LOSS_WEIGHT.
    classes: the group of MODEL with NUM_CLASSES and SCORE_THRESH_TEST.
    """

    name: str
    group: str
    classes: str


DETECTORS = {
    "RetinaNet": Detector("RetinaNet", "RETINANET", "RETINANET"),
    "GHMRetinaNet": Detector("RetinaNet", "RETINANET", "RETINANET"),
    TWO_STAGE: Detector("Faster R-CNN", "ROI_BOX_HEAD", "ROI_HEADS"),
    "GHMYOLOv3": Detector("YOLOv3", "YOLOV3", "YOLOV3"),
    "GHMSSD": Detector("SSD", "SSD", "SSD"),
    "GHMFCOS": Detector("FCOS", "FCOS", "FCOS"),
}

LOSS_GROUPS = tuple(dict.fromkeys(detector.group for detector in DETECTORS.values()))


def loss_keys(cfg):
    """Return the `CfgNode` with the detector's loss types; None if META_ARCHITECTURE is unknown."""
    detector = DETECTORS.get(cfg.MODEL.META_ARCHITECTURE)
    return cfg.MODEL[detector.group] if detector else None


def score_threshold_key(cfg) -> str:
    """Return the key of the lowest score of a detection; UsageError for an unknown detector."""
    arch = cfg.MODEL.META_ARCHITECTURE
    if arch not in DETECTORS:
        raise UsageError(
            f"the score threshold key of MODEL.META_ARCHITECTURE {arch} is not known; use one of "
            f"{', '.join(DETECTORS)}"
        )
    return f"MODEL.{DETECTORS[arch].classes}.SCORE_THRESH_TEST"


def detector_name(cfg) -> str:
    """Return the name for tables, such as "Mask R-CNN"; an unknown META_ARCHITECTURE as it is."""
    arch = cfg.MODEL.META_ARCHITECTURE
    if with_masks(cfg):
        return "Mask R-CNN"
    if arch == "GHMSSD" and cfg.MODEL.SSD.DECONV_CHANNELS:
        return "DSSD"
    return DETECTORS[arch].name if arch in DETECTORS else arch


def with_masks(cfg) -> bool:
    """Return whether the detector is Mask R-CNN, which learns and predicts masks."""
    return cfg.MODEL.META_ARCHITECTURE == TWO_STAGE and cfg.MODEL.MASK_ON


def set_num_classes(cfg, number: int) -> None:
    """Set the number of classes under every key that a detector reads, in place."""
    for group in {detector.classes for detector in DETECTORS.values()}:
        cfg.MODEL[group].NUM_CLASSES = number


def num_classes(cfg) -> int:
    """Return the detector's number of classes; the largest of all keys for an unknown detector."""
    detector = DETECTORS.get(cfg.MODEL.META_ARCHITECTURE)
    groups = [detector.classes] if detector else {d.classes for d in DETECTORS.values()}
    return max(cfg.MODEL[group].NUM_CLASSES for group in groups)
