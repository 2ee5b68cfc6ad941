"""Published results on COCO, to stand beside a run of the same experiment and no other.

The paper does not give its ResNeXt-101's cardinality: its network is "ResNeXt-101-FPN" here, which
no run's is, since none is known to be the same experiment.
"""

import re
from dataclasses import dataclass

from ghm_d2.records import RunRecord

COCO_CLASSES = 80
# 12 epochs at 16 images a step, the shortest published schedule, are about 88,000 steps
SHORTEST_SCHEDULE = 80_000


@dataclass(frozen=True)
class Published:
    """One published row; `ap` in the order of `AP_COLUMNS`, as far as it was published."""

    method: str  # as in `RunRecord`
    network: str
    ap: tuple[float, ...]
    source: str


_PAPER = "paper, test-dev"
_FOCAL_PAPER = "focal loss paper, test-dev"
_AUTHORS = "authors' code, minival"
_MMDET = "mmdetection, val"
_ZOO = "Detectron2's model zoo, val"
_FOCAL, _GHM_C, _GHM = (f"RetinaNet {x}" for x in ("focal + SL1", "GHM-C + SL1", "GHM-C + GHM-R"))
_FASTER = "Faster R-CNN CE + SL1"
_R50, _R101 = "ResNet-50-FPN", "ResNet-101-FPN"
_X101 = "ResNeXt-101-FPN"
_X32, _X64 = "ResNeXt-101-32x4d-FPN", "ResNeXt-101-64x4d-FPN"

PUBLISHED = (
    Published(_FASTER, _R101, (36.2, 59.1, 39.0, 18.2, 39.0, 48.2), _PAPER),
    Published("Mask R-CNN CE + SL1", _R101, (38.2, 60.3, 41.7, 20.1, 41.1, 50.2), _PAPER),
    Published("Mask R-CNN CE + SL1", _X101, (39.8, 62.3, 43.4, 22.1, 43.2, 51.2), _PAPER),
    Published("YOLOv3 CE + L2", "DarkNet-53", (33.0, 57.9, 34.4, 18.3, 35.4, 41.9), _PAPER),
    Published("DSSD mining + SL1", "ResNet-101", (33.2, 53.3, 35.2, 13.0, 35.4, 51.1), _PAPER),
    Published("SSD mining + SL1", "ResNet-101", (31.2, 50.4, 33.3, 10.2, 34.5, 49.8), _FOCAL_PAPER),
    Published(_FOCAL, _R101, (39.1, 59.1, 42.3, 21.8, 42.7, 50.2), _PAPER),
    Published(_FOCAL, _X101, (40.8, 61.1, 44.1, 24.1, 44.2, 51.2), _PAPER),
    Published(_GHM, _R101, (39.9, 60.8, 42.5, 20.3, 43.6, 54.1), _PAPER),
    Published(_GHM, _X101, (41.6, 62.8, 44.2, 22.3, 45.1, 55.3), _PAPER),
    Published(_FOCAL, _R50, (35.6,), _AUTHORS),
    Published(_GHM_C, _R50, (35.8,), _AUTHORS),
    Published(_GHM, _R50, (37.0,), _AUTHORS),
    Published(_GHM, _R50, (37.0,), _MMDET),
    Published(_GHM, _R101, (39.1,), _MMDET),
    Published(_GHM, _X32, (40.7,), _MMDET),
    Published(_GHM, _X64, (41.4,), _MMDET),
    Published(_FOCAL, _R50, (36.5,), _MMDET),
    Published(_FOCAL, _R101, (38.5,), _MMDET),
    Published(_FOCAL, _X32, (39.9,), _MMDET),
    Published(_FOCAL, _X64, (41.0,), _MMDET),
    Published(_FOCAL, _R50, (37.4,), f"{_ZOO}, 1x"),
    Published(_FOCAL, _R101, (40.4,), f"{_ZOO}, 3x"),
    Published(_FASTER, _R50, (37.9,), f"{_ZOO}, 1x"),
    Published(_FASTER, _R101, (42.0,), f"{_ZOO}, 3x"),
    Published(_FASTER, "ResNeXt-101-32x8d-FPN", (43.0,), f"{_ZOO}, 3x"),
)


def published_for(record: RunRecord) -> list[Published]:
    """The published results of the experiment that `record` repeats.

    That is the same method and network, on COCO, over a published schedule. The label of the
    data alone would not do: anyone's folder may be called coco; the number of classes tells more.
    """
    is_coco = re.fullmatch(r"coco(_20\d\d)?(_\w*(val|train)\w*)?", record.dataset)
    if not is_coco or len(record.per_class) != COCO_CLASSES:
        return []
    if record.iterations < SHORTEST_SCHEDULE:
        return []
    same = (record.method, record.network)
    return [row for row in PUBLISHED if (row.method, row.network) == same]


def published_like(method: str, network: str) -> list[Published]:
    """The published results of a method and network, with the paper's ResNeXt-101 for any."""
    networks = {network, _X101 if network.startswith("ResNeXt-101") else network}
    return [row for row in PUBLISHED if row.method == method and row.network in networks]
