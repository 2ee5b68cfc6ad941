"""Masks from the data to the drawn picture, by the commands of a user."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

COLUMNS = {"AP", "AP50", "AP75", "APs", "APm", "APl"}


@pytest.fixture(scope="module")
def masks(tiny) -> list[str]:
    """Overrides that make quick/mask_rcnn_ghm_r.yaml tiny."""
    words = ["MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"]
    words += ["MODEL.RPN.POST_NMS_TOPK_TRAIN", "30", "MODEL.RPN.POST_NMS_TOPK_TEST", "10"]
    return [*tiny, *words, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.001"]


@pytest.fixture(scope="module")
def run_folder(ghm, digits_folder, masks, tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "masks"
    words = ["--config", "configs/quick/mask_rcnn_ghm_r.yaml", "--dataset", digits_folder]
    done = ghm("train", *words, "--output", folder, "--seed", 1, *masks, "TEST.EVAL_PERIOD", 2)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_a_run_has_the_ap_of_boxes_and_of_masks(run_folder):
    run = json.loads((run_folder / "run.json").read_text())
    assert run["method"] == "Mask R-CNN CE + GHM-R (robust)"
    assert set(run["metrics"]) == set(run["mask_metrics"]) == COLUMNS
    assert 0 <= run["mask_metrics"]["AP"] <= 100
    lines = [json.loads(x) for x in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert all(x["loss_mask"] > 0 for x in lines if "loss_cls" in x)
    evaluated = [x for x in lines if "bbox/AP" in x]
    assert len(evaluated) == 2 and all("segm/AP" in x for x in evaluated)
    table = (run_folder / "stdout.txt").read_text()
    assert "(boxes)" in table and "(masks)" in table


def test_eval_prints_and_keeps_the_masks(ghm, run_folder, tmp_path):
    words = ["--weights", run_folder / "model_final.pth", "--output", tmp_path / "e"]
    done = ghm("eval", *words)
    assert done.returncode == 0, done.stderr
    assert "(boxes)" in done.stdout and "(masks)" in done.stdout
    record = json.loads((tmp_path / "e" / "eval.json").read_text())
    run = json.loads((run_folder / "run.json").read_text())
    assert record["mask_metrics"] == run["mask_metrics"]
    detections = json.loads((tmp_path / "e" / "detections.json").read_text())
    assert detections and all("segmentation" in d for d in detections)


def test_predict_draws_masks_and_prints_them(ghm, run_folder, digits_folder, tmp_path):
    image = next(Path(digits_folder).rglob("val/*.png"))
    words = ["--weights", run_folder / "model_final.pth", "--threshold", 0, "--json"]
    done = ghm("predict", *words, "--output", tmp_path, image)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with Image.open(image) as picture:
        size = [picture.height, picture.width]
    assert found and all(d["segmentation"]["size"] == size for d in found)
    assert all(coco_mask.decode(d["segmentation"]).shape == tuple(size) for d in found)
    with Image.open(tmp_path / f"{image.stem}_detections.png") as drawn:
        assert np.asarray(drawn).std() > 0


def test_data_without_masks_are_refused_before_training(ghm, digits_folder, masks, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(digits_folder, data)
    coco = json.loads((data / "train.json").read_text())
    del coco["annotations"][1]["segmentation"]
    (data / "train.json").write_text(json.dumps(coco))
    words = ["--config", "configs/quick/mask_rcnn.yaml", "--dataset", data]
    refused = ghm("train", *words, "--output", tmp_path / "run", *masks)
    assert refused.returncode == 3 and not (tmp_path / "run").exists()
    assert "annotation 2: has no segmentation" in refused.stderr
    assert "MODEL.MASK_ON False" in refused.stderr and "Traceback" not in refused.stderr
    boxes = ghm("train", *words, "--output", tmp_path / "run", *masks, "MODEL.MASK_ON", "False")
    assert boxes.returncode == 0, boxes.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["method"].startswith("Faster R-CNN") and run["mask_metrics"] == {}


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [10**9, 10**9], "counts": "PPYo0"},
        [[1, 2, 3, 4, 5, float("nan")]],
    ],
)
def test_hostile_masks_end_with_one_line(ghm, digits_folder, masks, tmp_path, mask):
    data = tmp_path / "data"
    shutil.copytree(digits_folder, data)
    coco = json.loads((data / "train.json").read_text())
    coco["annotations"][0]["segmentation"] = mask
    (data / "train.json").write_text(json.dumps(coco))
    words = ["--config", "configs/quick/mask_rcnn.yaml", "--output", tmp_path / "run", *masks]
    # a warning of the check, since detectors without masks can be trained on such data
    for code, command in ((3, ["train", "--dataset", data, *words]), (0, ["data", "check", data])):
        done = ghm(*command)
        assert done.returncode == code, done.stderr
        told = done.stdout + done.stderr
        assert "annotation 1: segmentation" in " ".join(told.split())
        assert "Traceback" not in done.stderr
    clean = ghm("data", "import", data, "--output", tmp_path / "clean")
    assert clean.returncode == 0 and "dropped: 1 mask" in clean.stdout
