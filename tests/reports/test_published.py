"""A published row stands beside the same experiment only."""

import pytest

from ghm_d2.records import RunRecord
from ghm_d2.reports.published import published_for, published_like


def record(**changes) -> RunRecord:
    known = {
        "method": "RetinaNet GHM-C + GHM-R",
        "network": "ResNet-101-FPN",
        "dataset": "coco_2017",
        "config_hash": "abc",
        "seed": 1,
        "iterations": 87_960,
        "per_class": {f"class {i}": 40.0 for i in range(80)},
    }
    return RunRecord(**known | changes)


def test_the_same_experiment_has_its_published_rows():
    rows = published_for(record())
    assert [row.ap[0] for row in rows] == [39.9, 39.1]
    assert "paper" in rows[0].source and len(rows[0].ap) == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "bccd"},
        {"dataset": "cocoa_beans"},
        {"dataset": "my_coco"},
        {"method": "RetinaNet focal + GIoU"},
        {"network": "ResNet-18-FPN"},
        {"iterations": 300},
        {"per_class": {"RBC": 40.0}},  # a folder that is called coco
    ],
)
def test_another_experiment_has_none(changes):
    assert published_for(record(**changes)) == []


def test_the_papers_resnext_stands_beside_any_but_is_nobodys_experiment():
    method, network = "RetinaNet GHM-C + GHM-R", "ResNeXt-101-32x8d-FPN"
    assert [row.ap[0] for row in published_like(method, network)] == [41.6]
    assert [row.ap[0] for row in published_like(method, "ResNeXt-101-64x4d-FPN")] == [41.6, 41.4]
    assert published_for(record(network=network)) == []
    assert published_like(method, "DarkNet-53") == []
