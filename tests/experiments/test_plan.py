"""Runs get names, and a changed input makes another run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ghm_d2.config import config_hash, get_cfg, load_config
from ghm_d2.data.digits.dataset import DigitsSpec, write
from ghm_d2.data.fingerprint import fingerprint
from ghm_d2.describe import experiment_hash
from ghm_d2.errors import UsageError
from ghm_d2.experiments.plan import make_run, scaled_schedule, side_dataset
from ghm_d2.experiments.suites import SuiteSide

CONFIG = "quick/retinanet_ghm.yaml"


@pytest.fixture
def run_of(digits_folder, tiny, tmp_path):
    def make(*overrides, root="a", dataset=digits_folder, seed=1, side="x", device="cpu"):
        words = (*tiny, *overrides)
        return make_run(tmp_path / root, side, CONFIG, words, dataset, seed, device)

    return make


def test_a_run_is_its_configuration_data_and_seed(run_of, tmp_path):
    run = run_of()
    write(DigitsSpec(train=2, val=1), tmp_path / "other")
    others = [
        run_of("SOLVER.BASE_LR", "0.5"),
        run_of("MODEL.GHM.SCOPE", "level"),
        run_of("MODEL.WEIGHTS", "model.pth"),
        run_of(seed=2),
        run_of(dataset=str(tmp_path / "other")),
    ]
    assert len({run.key, *(other.key for other in others)}) == 6
    assert run.key in run.folder.name and run.folder.parent == tmp_path / "a" / "runs"


def test_a_run_is_not_judged_on_what_it_trains_on(run_of, digits_folder):
    register_coco_instances("mine", {}, f"{digits_folder}/train.json", f"{digits_folder}/images")
    MetadataCatalog.get("mine").thing_classes = [str(digit) for digit in range(10)]
    try:
        with pytest.raises(UsageError, match=r"mine is both .* NAME_train and NAME_val registered"):
            run_of(dataset="mine")
    finally:
        DatasetCatalog.remove("mine")
        MetadataCatalog.remove("mine")


def test_where_it_runs_and_what_it_is_called_do_not_matter(run_of, monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    run = run_of()
    same = run_of("OUTPUT_DIR", "elsewhere", root="b", side="y", device="mps")
    assert same.key == run.key and same.folder.name == run.folder.name


def test_yolov3_with_the_box_gradients_of_before_is_another_run(digits_folder, tmp_path):
    run = make_run(tmp_path, "x", "quick/yolov3.yaml", ["SEED", "1"], digits_folder, 1, "cpu")
    cfg = run.build_config("cpu")
    data = [fingerprint(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
    assert run.key != config_hash(json.dumps([run.config_hash, "", data, 1]))


def test_a_default_spelt_out_changes_no_name():
    cfg = get_cfg()
    name = experiment_hash(cfg)
    cfg.MODEL.GHM.CLS.BINS = 30
    assert experiment_hash(cfg) == name
    cfg.NEW_KEY = 1  # one that a later version adds
    added = experiment_hash(cfg)
    assert added != name
    del cfg["NEW_KEY"]
    assert experiment_hash(cfg) == name


def test_settings_of_losses_that_are_not_used_change_no_name():
    focal, ghm = (load_config(f"quick/retinanet_{name}.yaml") for name in ("focal", "ghm"))
    names = [experiment_hash(cfg) for cfg in (focal, ghm)]
    for cfg in (focal, ghm):
        cfg.MODEL.GHM.SCOPE, cfg.MODEL.GHM.CLS.PRIOR = "level", 7.0
    assert experiment_hash(focal) == names[0] and experiment_hash(ghm) != names[1]


def test_the_command_trains_the_same_by_hand(run_of, digits_folder):
    words = run_of("MODEL.TIMM.PRETRAINED", "").command
    assert words.startswith(f"ghm train --config {CONFIG} --dataset {digits_folder} --seed 1 ")
    assert words.endswith("MODEL.TIMM.PRETRAINED ''")


def test_a_schedule_is_scaled_as_a_whole():
    cfg = get_cfg()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = 900, (600, 800), 0
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 100, 0
    words = scaled_schedule(cfg, 1 / 3)
    assert dict(zip(words[::2], words[1::2], strict=True)) == {
        "SOLVER.MAX_ITER": "300",
        "SOLVER.WARMUP_ITERS": "0",
        "SOLVER.CHECKPOINT_PERIOD": "33",
        "TEST.EVAL_PERIOD": "0",
        "SOLVER.STEPS": "(200, 267)",
    }
    assert scaled_schedule(cfg, 1.0) == ()


def test_noise_is_of_the_generated_digits(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr("ghm_d2.experiments.plan.DigitsSpec", lambda seed, noise: DigitsSpec(
        seed=seed, train=2, val=1, noise=noise
    ))  # fmt: skip
    side = SuiteSide("a", CONFIG, noise=0.4)
    clean = replace(side, noise=0.0)
    folder = Path(side_dataset(side, None))
    assert (folder / "train.json").is_file()
    assert side_dataset(side, "digits") == str(folder) != side_dataset(clean, "digits")
    with pytest.raises(UsageError, match="leave out --dataset"):
        side_dataset(side, "coco_2017")


def test_noise_may_be_of_one_kind(monkeypatch):
    monkeypatch.setattr("ghm_d2.experiments.plan.digits_folder", lambda spec: spec.noise_rates)
    rates = side_dataset(SuiteSide("a", CONFIG, noise={"shift": 0.2}), None)
    assert rates == "{'class': 0.0, 'shift': 0.2, 'missing': 0.0}"
