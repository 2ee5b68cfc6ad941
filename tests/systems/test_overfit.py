"""Every detector learns a few pictures by heart: what is wired wrongly does not."""

import json
import shutil
from pathlib import Path

import pytest

from ghm_d2.data.digits.dataset import DigitsSpec, write

SYSTEMS = (
    "faster_rcnn_sl1",
    "faster_rcnn_ghm_r",
    "mask_rcnn",
    "mask_rcnn_ghm_r",
    "yolov3",
    "yolov3_ghm",
    "ssd",
    "ssd_ghm",
    "dssd",
    "dssd_ghm",
    "retinanet_focal",
    "retinanet_ghm",
    "fcos",
    "fcos_ghm_c",
)
SHORT = {
    "SOLVER.MAX_ITER": 120,
    "SOLVER.WARMUP_ITERS": 20,
    "SOLVER.CHECKPOINT_PERIOD": 1000,
    "TEST.EVAL_PERIOD": 0,
    "INPUT.MIN_SIZE_TRAIN": "(160,)",
    "INPUT.MIN_SIZE_TEST": 160,
    "INPUT.AUGMENTATION": "''",
}
SHORTER = {
    "SOLVER.MAX_ITER": 60,
    "SOLVER.WARMUP_ITERS": 10,
    "SOLVER.IMS_PER_BATCH": 2,
    "INPUT.MIN_SIZE_TRAIN": "(96,)",
    "INPUT.MIN_SIZE_TEST": 96,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Makes a folder whose val split is its train split, from so many pictures."""

    def make(count: int, **sizes) -> Path:
        folder = tmp_path_factory.mktemp("data") / str(count)
        write(DigitsSpec(train=count, val=1, objects=(2, 4), clutter=(0, 3), **sizes), folder)
        shutil.copy(folder / "train.json", folder / "val.json")
        return folder

    return make


def assert_learns(ghm, name: str, data: Path, output: Path, keys: dict) -> None:
    words = [word for pair in keys.items() for word in pair]
    options = ["--dataset", data, "--output", output, "--seed", 1, "--json"]
    trained = ghm("train", "--config", f"configs/quick/{name}.yaml", *options, *words)
    assert trained.returncode == 0, trained.stderr
    record = json.loads(trained.stdout)
    assert record["metrics"]["AP50"] >= 90
    if name.startswith("mask"):
        assert record["mask_metrics"]["AP50"] >= 90


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_eight_pictures_are_learnt(ghm, pictures, tmp_path, name):
    data = pictures(8, image_size=(120, 160), side=(24, 72))
    assert_learns(ghm, name, data, tmp_path / "run", SHORT)


def test_four_small_pictures_are_learnt(ghm, pictures, tmp_path):
    data = pictures(4, image_size=(96, 128), side=(24, 64))
    assert_learns(ghm, "retinanet_ghm", data, tmp_path / "run", SHORT | SHORTER)
