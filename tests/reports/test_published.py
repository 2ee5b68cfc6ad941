"""A published row stands beside the same experiment only."""

import pytest

from ghm_d2.config import load_config
from ghm_d2.describe import method_name, network_name, schedule_of
from ghm_d2.records import RunRecord, Schedule
from ghm_d2.reports.published import published_for, published_like, published_otherwise

EPOCHS_12 = Schedule(87_960, 16, [58_640, 80_630], [800])
ZOO_1X = Schedule(90_000, 16, [60_000, 80_000], [640, 672, 704, 736, 768, 800])


def record(**changes) -> RunRecord:
    known = {
        "method": "RetinaNet GHM-C + GHM-R",
        "network": "ResNet-101-FPN",
        "dataset": "coco_2017",
        "config_hash": "abc",
        "seed": 1,
        "iterations": 87_960,
        "schedule": EPOCHS_12,
        "per_class": {f"class {i}": 40.0 for i in range(80)},
    }
    return RunRecord(**known | changes)


def of_config(name: str, *overrides: str) -> RunRecord:
    """The record of a run of a configuration that went to its end."""
    cfg = load_config(name, overrides)
    schedule = schedule_of(cfg)
    experiment = {"method": method_name(cfg), "network": network_name(cfg), "schedule": schedule}
    return record(**experiment, iterations=schedule.iterations)


def figures(rows) -> list[float]:
    return [row.ap[0] for row in rows]


def test_the_same_experiment_has_its_published_rows():
    rows = published_for(record())
    assert figures(rows) == [39.0, 39.1]
    assert [row.source for row in rows] == ["mmdetection 1.x, val2017", "mmdetection 2.x, val2017"]


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "bccd"},
        {"dataset": "cocoa_beans"},
        {"dataset": "my_coco"},
        {"method": "RetinaNet focal + GIoU"},
        {"network": "ResNet-18-FPN"},
        {"iterations": 300},  # stopped early
        {"schedule": None},  # a record of an earlier version
        {"schedule": ZOO_1X, "iterations": 90_000},
        {"schedule": Schedule(87_960, 8, [58_640, 80_630], [800])},
        {"schedule": Schedule(87_960, 16, [58_640, 80_630], [640, 800])},
        {"schedule": Schedule(87_960, 16, [60_000, 80_630], [800])},
        {"schedule": Schedule(87_960, 16, [58_640], [800])},
        {"per_class": {"RBC": 40.0}},  # a folder that is called coco
    ],
)
def test_another_experiment_has_none(changes):
    assert published_for(record(**changes)) == []


def test_a_schedule_is_counted_in_images():
    """Twice the batch in half the iterations, by `SOLVER.REFERENCE_WORLD_SIZE` for one."""
    twice = Schedule(43_980, 32, [29_320, 40_315], [800])
    assert figures(published_for(record(schedule=twice, iterations=43_980))) == [39.0, 39.1]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("coco/retinanet_R_50_FPN_1x.yaml", [35.6, 35.6]),
        ("coco/retinanet_R_50_FPN_ghm_1x.yaml", [37.0, 36.9, 37.0]),
        ("coco/faster_rcnn_R_50_FPN_1x.yaml", [36.4]),  # and not 37.9, of the model zoo's recipe
        ("coco/faster_rcnn_R_101_FPN_1x.yaml", [38.5]),  # and not 42.0, of its 3x
        ("coco/mask_rcnn_R_101_FPN_1x.yaml", [39.4]),
        ("coco/yolov3_darknet53.yaml", [33.0]),
        ("coco/ssd513_R_101.yaml", []),
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", [37.9]),
        ("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", [42.0]),
    ],
)
def test_a_recipe_has_the_figures_of_its_own_schedule(config, expected):
    assert figures(published_for(of_config(config))) == expected


def test_a_learning_rate_without_steps_is_another_schedule():
    name = "coco/faster_rcnn_R_50_FPN_1x.yaml"
    cosine = of_config(name, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR")
    assert published_for(cosine) == []


def test_what_other_schedules_gave_is_listed_apart():
    rows = published_otherwise("Faster R-CNN CE + SL1", "ResNet-50-FPN", EPOCHS_12)
    assert figures(rows) == [37.9] and rows[0].schedule == ZOO_1X
    method = "RetinaNet GHM-C + GHM-R"
    (paper,) = published_otherwise(method, "ResNeXt-101-32x8d-FPN", EPOCHS_12)
    assert paper.ap[0] == 41.6 and paper.schedule is None
    assert published_like(method, "ResNeXt-101-32x8d-FPN", EPOCHS_12) == []
    assert published_otherwise(method, "DarkNet-53", EPOCHS_12) == []
