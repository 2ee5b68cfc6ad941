"""Every detector learns eight pictures by heart: what is wired wrongly does not."""

import json
import shutil

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


@pytest.fixture(scope="module")
def eight_pictures(tmp_path_factory) -> str:
    """A folder whose val split is its train split."""
    folder = tmp_path_factory.mktemp("data") / "eight"
    sizes = {"image_size": (120, 160), "objects": (2, 4), "side": (24, 72), "clutter": (0, 3)}
    write(DigitsSpec(train=8, val=1, **sizes), folder)
    shutil.copy(folder / "train.json", folder / "val.json")
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_eight_pictures_are_learnt(ghm, eight_pictures, tmp_path, name):
    words = [str(word) for pair in SHORT.items() for word in pair]
    options = ["--dataset", eight_pictures, "--output", tmp_path, "--seed", 1, "--json"]
    trained = ghm("train", "--config", f"configs/quick/{name}.yaml", *options, *words)
    assert trained.returncode == 0, trained.stderr
    record = json.loads(trained.stdout)
    assert record["metrics"]["AP50"] >= 90
    if name.startswith("mask"):
        assert record["mask_metrics"]["AP50"] >= 90
