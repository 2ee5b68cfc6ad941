"""Annotations with faults, at the start of a training and of an evaluation."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def faulty(digits_folder, tmp_path) -> Path:
    """Two boxes of train.json have no height; test.json has no annotations."""
    train, test = (
        json.loads(Path(digits_folder, f"{s}.json").read_text()) for s in ("train", "val")
    )
    for annotation in train["annotations"][:2]:
        annotation["bbox"][3] = 0.0
    del test["annotations"]
    for name, coco in (("train", train), ("test", test)):
        (tmp_path / f"{name}.json").write_text(json.dumps(coco))
    for name in ("val.json", "images"):
        (tmp_path / name).symlink_to(Path(digits_folder, name))
    return tmp_path


def test_boxes_without_height_are_a_warning_with_a_count(ghm, faulty, tiny, tmp_path):
    words = ("train", "--config", "quick/retinanet_ghm.yaml", "--dataset", faulty)
    run = ghm(*words, "--output", tmp_path / "run", "--no-analyse", *tiny, "SOLVER.MAX_ITER", 2)
    assert run.returncode == 0, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("warning: ")]
    assert "has no area" in line and "1 more like it" in line
    assert "has no area" in (tmp_path / "run" / "log.txt").read_text()


def test_a_test_set_that_is_trained_on_is_a_warning(ghm, digits_folder, tiny, tmp_path):
    train = (f"{digits_folder}/train.json",)
    sets = ("DATASETS.TRAIN", train, "DATASETS.TEST", train)
    words = ("train", "--config", "quick/retinanet_ghm.yaml", "--output", tmp_path / "run")
    run = ghm(*words, "--no-analyse", *tiny, "SOLVER.MAX_ITER", 1, *sets)
    assert run.returncode == 0, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("warning: ")]
    assert "digits/train is both a training and a test set" in line
    assert line.removeprefix("warning: ") in (tmp_path / "run" / "log.txt").read_text()


def test_a_training_on_a_set_without_annotations_is_refused(ghm, faulty, tiny, tmp_path):
    words = ("train", "--config", "quick/retinanet_ghm.yaml", "--output", tmp_path / "run", *tiny)
    sets = ("DATASETS.TRAIN", f"('{faulty}/test.json',)", "DATASETS.TEST", f"('{faulty}',)")
    run = ghm(*words, *sets)
    assert run.returncode == 3
    assert "test.json: has no annotations" in run.stderr.splitlines()[-1]
