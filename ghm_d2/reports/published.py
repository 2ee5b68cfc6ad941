"""Published results on COCO, shown only beside a run of the same experiment.

The same experiment means the same method, network and schedule; a row without a known schedule is
shown beside no run. The paper does not give the cardinality of its ResNeXt-101. Its network is
called "ResNeXt-101-FPN" here, a name that no run has.
"""

import re
from dataclasses import dataclass, replace

from ghm_d2.records import RunRecord, Schedule

COCO_CLASSES = 80
TOLERANCE = 0.01  # as a share of all images in a schedule


@dataclass(frozen=True)
class Published:
    """One published row; `ap` in the order of `AP_COLUMNS`, as far as it was published."""

    method: str  # as in `RunRecord`
    network: str
    ap: tuple[float, ...]
    source: str  # with the split
    schedule: Schedule | None = None  # None: not known here


# mmdetection's 1x, and the authors': 12 epochs, learning rate divided by 10 after 8 and after 11
_EPOCHS_12 = Schedule(87_960, 16, [58_640, 80_630], [800])
_JITTER = [640, 672, 704, 736, 768, 800]
_ZOO_1X = Schedule(90_000, 16, [60_000, 80_000], _JITTER)
_ZOO_3X = Schedule(270_000, 16, [210_000, 250_000], _JITTER)
_MASK_RCNN = Schedule(160_000, 16, [120_000], [800])  # He et al., section 3.1; ResNeXt's batch is 8
_YOLOV3 = Schedule(500_200, 64, [400_000, 450_000], list(range(320, 609, 32)))  # yolov3.cfg
_PAPER = "paper, test-dev"
_FOCAL_PAPER = "focal loss paper, test-dev"
_AUTHORS = "authors' code, minival"
_MMDET_1, _MMDET_2 = "mmdetection 1.x, val2017", "mmdetection 2.x, val2017"
_ZOO = "Detectron2's model zoo, val2017"
_FOCAL, _GHM_C, _GHM = (f"RetinaNet {x}" for x in ("focal + SL1", "GHM-C + SL1", "GHM-C + GHM-R"))
_FASTER, _MASK = "Faster R-CNN CE + SL1", "Mask R-CNN CE + SL1"
_R50, _R101 = "ResNet-50-FPN", "ResNet-101-FPN"
_X101 = "ResNeXt-101-FPN"
_X32, _X64 = "ResNeXt-101-32x4d-FPN", "ResNeXt-101-64x4d-FPN"

PUBLISHED = (
    Published(_FASTER, _R101, (36.2, 59.1, 39.0, 18.2, 39.0, 48.2), _PAPER),
    Published(_MASK, _R101, (38.2, 60.3, 41.7, 20.1, 41.1, 50.2), _PAPER, _MASK_RCNN),
    Published(_MASK, _X101, (39.8, 62.3, 43.4, 22.1, 43.2, 51.2), _PAPER),
    Published(
        "YOLOv3 CE + L2", "DarkNet-53", (33.0, 57.9, 34.4, 18.3, 35.4, 41.9), _PAPER, _YOLOV3
    ),
    Published("DSSD mining + SL1", "ResNet-101", (33.2, 53.3, 35.2, 13.0, 35.4, 51.1), _PAPER),
    Published("SSD mining + SL1", "ResNet-101", (31.2, 50.4, 33.3, 10.2, 34.5, 49.8), _FOCAL_PAPER),
    Published(_FOCAL, _R101, (39.1, 59.1, 42.3, 21.8, 42.7, 50.2), _PAPER),
    Published(_FOCAL, _X101, (40.8, 61.1, 44.1, 24.1, 44.2, 51.2), _PAPER),
    Published(_GHM, _R101, (39.9, 60.8, 42.5, 20.3, 43.6, 54.1), _PAPER),
    Published(_GHM, _X101, (41.6, 62.8, 44.2, 22.3, 45.1, 55.3), _PAPER),
    Published(_FOCAL, _R50, (35.6,), _AUTHORS, _EPOCHS_12),
    Published(_GHM_C, _R50, (35.8,), _AUTHORS, _EPOCHS_12),
    Published(_GHM, _R50, (37.0,), _AUTHORS, _EPOCHS_12),
    Published(_GHM, _R50, (36.9,), _MMDET_1, _EPOCHS_12),
    Published(_GHM, _R101, (39.0,), _MMDET_1, _EPOCHS_12),
    Published(_GHM, _X32, (40.5,), _MMDET_1, _EPOCHS_12),
    Published(_GHM, _X64, (41.6,), _MMDET_1, _EPOCHS_12),
    Published(_GHM, _R50, (37.0,), _MMDET_2, _EPOCHS_12),
    Published(_GHM, _R101, (39.1,), _MMDET_2, _EPOCHS_12),
    Published(_GHM, _X32, (40.7,), _MMDET_2, _EPOCHS_12),
    Published(_GHM, _X64, (41.4,), _MMDET_2, _EPOCHS_12),
    # version 2 uses L1 instead of smooth L1, which is another method
    Published(_FOCAL, _R50, (35.6,), _MMDET_1, _EPOCHS_12),
    Published(_FOCAL, _R101, (37.7,), _MMDET_1, _EPOCHS_12),
    Published(_FOCAL, _X32, (39.0,), _MMDET_1, _EPOCHS_12),
    Published(_FOCAL, _X64, (40.0,), _MMDET_1, _EPOCHS_12),
    Published(_FASTER, _R50, (36.4,), _MMDET_1, _EPOCHS_12),
    Published(_FASTER, _R101, (38.5,), _MMDET_1, _EPOCHS_12),
    Published(_MASK, _R101, (39.4,), _MMDET_1, _EPOCHS_12),
    Published(_MASK, _X64, (42.1,), _MMDET_1, _EPOCHS_12),
    Published(_FOCAL, _R50, (37.4,), f"{_ZOO}, 1x", _ZOO_1X),
    Published(_FOCAL, _R101, (40.4,), f"{_ZOO}, 3x", _ZOO_3X),
    Published(_FASTER, _R50, (37.9,), f"{_ZOO}, 1x", _ZOO_1X),
    Published(_FASTER, _R101, (42.0,), f"{_ZOO}, 3x", _ZOO_3X),
    Published(_FASTER, "ResNeXt-101-32x8d-FPN", (43.0,), f"{_ZOO}, 3x", _ZOO_3X),
)


def published_for(record: RunRecord) -> list[Published]:
    """The published results of the experiment that `record` repeats, on COCO.

    The number of classes is checked too, since any folder may be called coco. A run that stopped
    early is compared with the iterations that it has done.
    """
    is_coco = re.fullmatch(r"coco(_20\d\d)?(_\w*(val|train)\w*)?", record.dataset)
    if not is_coco or len(record.per_class) != COCO_CLASSES or record.schedule is None:
        return []
    done = replace(record.schedule, iterations=record.iterations)
    return published_like(record.method, record.network, done)


def published_like(method: str, network: str, schedule: Schedule) -> list[Published]:
    """The published results of a method and network that were trained by `schedule`."""
    return [
        row
        for row in PUBLISHED
        if (row.method, row.network) == (method, network)
        and row.schedule is not None
        and is_same(schedule, row.schedule)
    ]


def published_otherwise(method: str, network: str, schedule: Schedule) -> list[Published]:
    """The method's published results on the network with another or an unknown schedule.

    The paper's ResNeXt-101 counts as any ResNeXt-101.
    """
    same = published_like(method, network, schedule)
    networks = {network, _X101 if network.startswith("ResNeXt-101") else network}
    return [
        row
        for row in PUBLISHED
        if row.method == method and row.network in networks and row not in same
    ]


def is_same(mine: Schedule, theirs: Schedule) -> bool:
    """Return whether both see equally many images, and lower the learning rate after as many.

    They are counted in images, since a schedule with half the batch has twice the iterations.
    """
    points = [[step * s.batch for step in (s.iterations, *sorted(s.decay))] for s in (mine, theirs)]
    if len(points[0]) != len(points[1]) or set(mine.sizes) != set(theirs.sizes):
        return False
    margin = TOLERANCE * points[1][0]
    return all(abs(a - b) <= margin for a, b in zip(*points, strict=True))
