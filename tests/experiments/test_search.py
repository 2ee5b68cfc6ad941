"""The search: the same trials for every side, on training images alone."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from ghm_d2.errors import DataError, UsageError
from ghm_d2.experiments.search import TRIALS, SideSearch, holdout, search
from ghm_d2.records import RunRecord, RunsTable

RETINANET, FASTER = "quick/retinanet_ghm.yaml", "quick/faster_rcnn_sl1.yaml"
LR, WEIGHT = "SOLVER.BASE_LR", "MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT"


@pytest.fixture
def divided(digits_folder, tmp_path) -> str:
    return holdout(tmp_path, RETINANET, (), digits_folder, "cpu")


@pytest.fixture
def bench(tmp_path):
    """A table, and what "trains" runs on it: AP from `score(overrides)`, None for diverged."""
    table, trained = RunsTable(tmp_path / "runs.jsonl"), []

    def trainer(score):
        def run_all(runs):
            for run in runs:
                if run.is_done(table):
                    continue
                trained.append(run)
                words = run.overrides
                ap = score(dict(zip(words[::2], words[1::2], strict=True)))
                status = "diverged" if ap is None else "finished"
                record = RunRecord("m", "n", "d", "h", run.seed, status, metrics={"AP": ap})
                run.folder.mkdir(parents=True)
                record.write(run.folder)
                row = {"key": run.key, "folder": run.folder.name, "record": asdict(record)}
                table.append(row)

        return run_all

    return table, trained, trainer


def side_search(tmp_path, divided, name="a", config=RETINANET, overrides=()):
    return SideSearch(tmp_path, name, config, overrides, divided, "cpu")


def test_the_best_rate_and_then_the_best_weight(tmp_path, divided, bench):
    table, trained, trainer = bench

    def score(words):
        return 50 - abs(float(words[LR]) - 0.002) * 1e4 + 5 * float(words.get(WEIGHT, 1))

    chosen, trials = search([side_search(tmp_path, divided)], table, trainer(score))
    assert chosen == {"a": (LR, "0.002", WEIGHT, "2")}
    assert [trial.overrides for trial in trials] == [
        [LR, "0.001"],
        [LR, "0.0005"],
        [LR, "0.002"],
        [LR, "0.002", WEIGHT, "0.5"],
        [LR, "0.002", WEIGHT, "2"],
    ]
    assert [trial.chosen for trial in trials] == [False, False, False, False, True]
    assert len(trained) == TRIALS
    assert {run.iterations for run in trained} == {150}
    search([side_search(tmp_path, divided)], table, trainer(score))
    assert len(trained) == TRIALS, "finished trials ran again"


def test_equals_leave_the_first_and_divergence_loses(tmp_path, divided, bench):
    table, _, trainer = bench
    scores = {"0.001": None, "0.0005": 0.0, "0.002": 0.0}
    chosen, trials = search(
        [side_search(tmp_path, divided)], table, trainer(lambda words: scores[words[LR]])
    )
    assert chosen == {"a": (LR, "0.0005")}
    assert trials[0].AP is None


def test_the_configured_rate_wins_a_tie(tmp_path, divided, bench):
    table, _, trainer = bench
    chosen, _ = search([side_search(tmp_path, divided)], table, trainer(lambda words: 7.0))
    assert chosen == {"a": (LR, "0.001")}


def test_a_detector_without_a_weight_of_its_box_loss_is_refused(tmp_path, divided):
    with pytest.raises(UsageError, match="GHMRetinaNet"):
        side_search(tmp_path, divided, overrides=("MODEL.META_ARCHITECTURE", "RetinaNet"))


def test_data_that_cannot_be_divided_are_refused_as_in_training(tmp_path, digits_folder):
    coco = json.loads((Path(digits_folder) / "train.json").read_text())
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(json.dumps(coco))
    with pytest.raises(DataError, match="no such image"):
        holdout(tmp_path / "out", RETINANET, (), str(tmp_path), "cpu")


def test_data_are_divided_under_the_overrides_of_the_comparison(tmp_path, digits_folder):
    config = tmp_path / "half.yaml"
    config.write_text(f"_BASE_: {RETINANET}\nSOLVER: {{AMP: {{ENABLED: true, DTYPE: float16}}}}\n")
    overrides = ("SOLVER.AMP.DTYPE", "bfloat16")  # a CPU has no float16
    assert Path(holdout(tmp_path, str(config), overrides, digits_folder, "cpu")).is_dir()


def test_every_side_has_the_same_trials(tmp_path, divided, bench):
    table, _, trainer = bench
    sides = [
        side_search(tmp_path, divided, "one"),
        side_search(tmp_path, divided, "two", FASTER, ("SOLVER.BASE_LR", "0.1")),
    ]
    _, trials = search(sides, table, trainer(lambda words: 1.0))
    own = {name: [t.overrides for t in trials if t.side == name] for name in ("one", "two")}
    assert len(own["one"]) == len(own["two"]) == TRIALS
    assert own["two"][0] == [LR, "0.1"]
    assert own["two"][-1] == [LR, "0.1", "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", "2"]


def test_the_search_sees_training_images_alone(tmp_path, divided, digits_folder, bench):
    table, trained, trainer = bench
    search([side_search(tmp_path, divided)], table, trainer(lambda words: 1.0))
    files = json.loads((Path(digits_folder) / "train.json").read_text())["images"]
    training = {image["file_name"] for image in files}
    for run in trained:
        cfg = run.build_config("cpu")
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            seen = json.loads(Path(name).read_text())["images"]
            assert {image["file_name"] for image in seen} <= training
