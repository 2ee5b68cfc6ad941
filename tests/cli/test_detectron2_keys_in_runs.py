"""Keys that Detectron2's DefaultTrainer heeds, in `ghm train` and `ghm eval`."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

UNEXPECTED = "[['bbox', 'AP', 99.0, 0.5]]"
KEYS = (
    "VIS_PERIOD 2",
    "CUDNN_BENCHMARK True",
    "TEST.PRECISE_BN.ENABLED True",
    "TEST.PRECISE_BN.NUM_ITER 1",
    "MODEL.TIMM.FREEZE_BN False",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0",
    "SOLVER.BASE_LR 0.0001",  # the scores are to stay above 1e-8, the lowest that are merged
)


@pytest.fixture(scope="module")
def run(ghm, tiny, digits_folder, tmp_path_factory):
    """The folder of a training, and how it ended."""
    folder = tmp_path_factory.mktemp("keys") / "run"
    words = [*tiny, *(word for key in KEYS for word in key.split())]
    words += ["TEST.EXPECTED_RESULTS", UNEXPECTED, "--no-analyse"]
    config = "configs/quick/faster_rcnn_ghm_r.yaml"
    done = ghm("train", "--config", config, "--dataset", digits_folder, "--output", folder, *words)
    return folder, done


def test_a_result_that_is_not_expected_is_an_error_of_a_finished_run(run):
    folder, done = run
    assert done.returncode == 1 and "bbox AP is " in done.stderr
    assert "requires 99.0 ± 0.5" in done.stderr
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_pictures_are_drawn_every_period(run):
    log = EventAccumulator(str(run[0]), size_guidance={"images": 0}).Reload()
    (tag,) = log.Tags()["images"]
    assert {image.step for image in log.Images(tag)} == {0, 2}


def test_batch_norm_has_the_statistics_of_the_last_weights(run):
    state = torch.load(run[0] / "model_final.pth")["model"]
    counts = [v for k, v in state.items() if k.endswith("num_batches_tracked")]
    assert counts and all(count == 5 for count in counts)  # four steps and a batch


def test_an_evaluation_on_augmented_images(ghm, run, tmp_path):
    def evaluate(name: str, *words: str):
        arguments = ["--weights", run[0] / "model_final.pth", "--output", tmp_path / name, *words]
        code = ghm("eval", *arguments).returncode
        return code, json.loads((tmp_path / name / "detections.json").read_text())

    any_ap = ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 0.0, 100.0]]"]
    code, plain = evaluate("plain")
    assert code == 1  # the run's configuration expects another AP
    copies = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64, 80)", *any_ap]
    code, augmented = evaluate("augmented", *copies)
    assert code == 0 and augmented and plain != augmented
