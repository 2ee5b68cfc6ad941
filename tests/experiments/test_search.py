"""The search: the same trials for every side, on training images alone."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from ghm_d2.errors import DataError, UsageError
from ghm_d2.experiments.search import (
    GRID,
    SEEDS,
    SideSearch,
    read_settings,
    search,
    trial_data,
)
from ghm_d2.records import Comparison, RunRecord, RunsTable, Trial

RETINANET, FASTER = "quick/retinanet_ghm.yaml", "quick/faster_rcnn_sl1.yaml"
LR, WEIGHT = "SOLVER.BASE_LR", "MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT"


@pytest.fixture
def divided(digits_folder, tmp_path) -> str:
    return trial_data(tmp_path, RETINANET, (), digits_folder, "cpu")[1]


@pytest.fixture
def bench(tmp_path):
    """A table, and what "trains" runs on it: AP from `score(overrides, run)`, None for diverged."""
    table, trained = RunsTable(tmp_path / "runs.jsonl"), []

    def trainer(score):
        def run_all(runs):
            for run in runs:
                if run.is_done(table):
                    continue
                trained.append(run)
                words = run.overrides
                ap = score(dict(zip(words[::2], words[1::2], strict=True)), run)
                status = "diverged" if ap is None else "finished"
                record = RunRecord("m", "n", "d", "h", run.seed, status, metrics={"AP": ap})
                run.folder.mkdir(parents=True)
                record.write(run.folder)
                row = {"key": run.key, "folder": run.folder.name, "record": asdict(record)}
                table.append(row)

        return run_all

    return table, trained, trainer


def side_search(tmp_path, divided, name="a", config=RETINANET, overrides=()):
    datasets = divided if isinstance(divided, dict) else {"digits": divided}
    return SideSearch(tmp_path, name, config, overrides, datasets, "cpu")


def rate(words) -> float:
    return float(words.get(LR, 0.001))


def weight(words) -> float:
    return float(words.get(WEIGHT, 1))


def test_the_grid_then_the_finalists_at_full_length(tmp_path, divided, bench):
    table, trained, trainer = bench

    def score(words, run):
        return 50 + 5 * (weight(words) == 2) + 3 * (rate(words) == 0.0005)

    chosen, trials = search([side_search(tmp_path, divided)], table, trainer(score))
    assert chosen == {"a": (LR, "0.0005", WEIGHT, "2")}
    best, past = [LR, "0.0005", WEIGHT, "2"], [LR, "0.00025", WEIGHT, "2"]
    assert [trial.overrides for trial in trials] == [
        [],
        [LR, "0.0005"],
        [LR, "0.002"],
        [WEIGHT, "0.5"],
        [WEIGHT, "2"],
        best,
        [LR, "0.002", WEIGHT, "0.5"],
        past,
        *([], []),
        *(best, best),
    ]
    assert [trial.chosen for trial in trials] == [trial.overrides == best for trial in trials]
    assert [trial.iterations for trial in trials] == [150] * 8 + [300] * 4
    assert [trial.seed for trial in trials] == [SEEDS[0]] * 8 + [*SEEDS] * 2
    assert {trial.dataset for trial in trials} == {"digits"}
    assert sum(run.iterations for run in trained) == 8 * 300, "more than eight full runs"
    search([side_search(tmp_path, divided)], table, trainer(score))
    assert len(trained) == 12, "finished trials ran again"


def test_a_best_rate_at_the_edge_extends_the_grid_once(tmp_path, divided, bench):
    table, trained, trainer = bench
    chosen, _ = search(
        [side_search(tmp_path, divided)], table, trainer(lambda words, _: 1e4 * rate(words))
    )
    assert chosen == {"a": (LR, "0.004")}
    assert max(rate(dict(zip(*[iter(run.overrides)] * 2, strict=True))) for run in trained) == 0.004


@pytest.mark.parametrize(
    ("gains", "kept"),
    [
        ((2.0, 1.0), False),
        ((0.4, 0.4), True),  # below half an AP
        ((8.0, -4.0), True),  # within one standard error
        ((None, 9.0), True),  # one diverged: 40 AP lost
    ],
)
def test_the_configured_setting_is_kept_within_the_noise(tmp_path, divided, bench, gains, kept):
    """Whatever is ahead in the first rung, by however much."""
    table, _, trainer = bench
    at = dict(zip(SEEDS, gains, strict=True))

    def score(words, run):
        gain = at[run.seed] if run.iterations == 300 else 20.0
        if weight(words) != 2 or LR in words:
            return 40.0
        return None if gain is None else 40.0 + gain

    chosen, trials = search([side_search(tmp_path, divided)], table, trainer(score))
    assert chosen == {"a": () if kept else (WEIGHT, "2")}
    assert [trial.overrides for trial in trials if trial.chosen] == [list(chosen["a"])] * 3
    assert any(trial.AP is None for trial in trials) == (None in gains)


def test_a_configured_setting_that_wins_the_first_rung_is_chosen(tmp_path, divided, bench):
    table, trained, trainer = bench
    chosen, trials = search([side_search(tmp_path, divided)], table, trainer(lambda *_: 7.0))
    assert chosen == {"a": ()} and len(trained) == len(trials) == len(GRID)


def test_several_data_sets_choose_one_setting_by_their_mean(tmp_path, divided, bench):
    table, trained, trainer = bench
    other = tmp_path / "other"
    shutil.copytree(divided, other, symlinks=True)
    coco = json.loads((other / "train.json").read_text())
    (other / "train.json").write_text(json.dumps(coco | {"info": {"of": "another set"}}))

    def score(words, run):
        if run.label == "other":
            return 10.0 + 6 * (weight(words) == 2) - 20 * (rate(words) == 0.0005)
        return 50.0 + 1 * (weight(words) == 2) + 9 * (rate(words) == 0.0005)

    both = {"digits": divided, "other": str(other)}
    chosen, trials = search([side_search(tmp_path, both)], table, trainer(score))
    assert chosen == {"a": (WEIGHT, "2")}
    assert len(trials) == 2 * (len(GRID) + 4) == len(trained)
    assert [t.AP for t in trials if t.dataset == "other" and not t.overrides] == [10.0] * 3


def test_a_detector_without_a_weight_of_its_box_loss_is_refused(tmp_path, divided):
    with pytest.raises(UsageError, match="GHMRetinaNet"):
        side_search(tmp_path, divided, overrides=("MODEL.META_ARCHITECTURE", "RetinaNet"))


def test_data_that_cannot_be_divided_are_refused_as_in_training(tmp_path, digits_folder):
    coco = json.loads((Path(digits_folder) / "train.json").read_text())
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(json.dumps(coco))
    with pytest.raises(DataError, match="no such image"):
        trial_data(tmp_path / "out", RETINANET, (), str(tmp_path), "cpu")


def test_other_data_are_judged_on_their_own_val_unless_the_comparison_is(
    tmp_path, digits_folder, noisy_folder
):
    """A part of a noisy training split would reward a side that learns its errors."""
    where, other = (tmp_path, RETINANET, (), digits_folder, "cpu"), tmp_path / "other"
    shutil.copytree(noisy_folder, other)
    for file in other.glob("images/val/*"):  # digits of one seed have the same val
        file.write_bytes(file.read_bytes() + b"\0")
    assert trial_data(*where, other=str(other)) == ("other", str(other))
    assert trial_data(*where, other=digits_folder) == trial_data(*where)
    assert trial_data(*where)[1] != digits_folder
    linked = tmp_path / "linked"
    linked.symlink_to(digits_folder)
    assert trial_data(*where, other=str(linked))[1] != str(linked)
    assert Path(trial_data(*where, other=noisy_folder)[1]).parent == tmp_path / "data"
    leak = Path(shutil.copytree(digits_folder, tmp_path / "leak"))
    shutil.copy(leak / "val.json", leak / "train.json")
    with pytest.raises(UsageError, match="judged on 3 of its training images"):
        trial_data(*where, other=str(leak))


def test_data_are_divided_under_the_overrides_of_the_comparison(tmp_path, digits_folder):
    config = tmp_path / "half.yaml"
    config.write_text(f"_BASE_: {RETINANET}\nSOLVER: {{AMP: {{ENABLED: true, DTYPE: float16}}}}\n")
    overrides = ("SOLVER.AMP.DTYPE", "bfloat16")  # a CPU has no float16
    _, folder = trial_data(tmp_path, str(config), overrides, digits_folder, "cpu")
    assert Path(folder).is_dir()


def test_every_side_has_the_same_trials(tmp_path, divided, bench):
    table, _, trainer = bench
    sides = [
        side_search(tmp_path, divided, "one"),
        side_search(tmp_path, divided, "two", FASTER, ("SOLVER.BASE_LR", "0.1")),
    ]
    _, trials = search(sides, table, trainer(lambda *_: 1.0))
    own = {name: [t.overrides for t in trials if t.side == name] for name in ("one", "two")}
    assert len(own["one"]) == len(own["two"]) == len(GRID)
    assert own["two"][0] == []
    assert own["two"][-1] == [LR, "0.2", "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", "0.5"]


def test_a_search_that_is_under_way_tells_what_may_follow(tmp_path, divided, bench):
    table, _, trainer = bench
    side = side_search(tmp_path, divided)
    assert [run.iterations for run in side.later(table)] == [300] * 4
    assert side.choice(table) is None
    trainer(lambda words, _: weight(words))([trial.run for trial in side.trials(table)])
    assert side.later(table) == [] and side.choice(table) is None
    assert [trial.run.iterations for trial in side.trials(table)] == [150] * 7 + [300] * 4


def test_the_search_sees_training_images_alone(tmp_path, divided, digits_folder, bench):
    table, trained, trainer = bench
    search([side_search(tmp_path, divided)], table, trainer(lambda *_: 1.0))
    files = json.loads((Path(digits_folder) / "train.json").read_text())["images"]
    training = {image["file_name"] for image in files}
    for run in trained:
        cfg = run.build_config("cpu")
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            seen = json.loads(Path(name).read_text())["images"]
            assert {image["file_name"] for image in seen} <= training


def comparison(folder: Path, *trials: Trial) -> Path:
    folder.mkdir(exist_ok=True)
    Comparison("n", "q", "d", "quick", [1], [], [], search=list(trials)).write(folder)
    return folder


def test_settings_of_an_earlier_search_are_read(tmp_path):
    trials = [
        Trial("a", [LR, "0.5"], 1.0, False),
        Trial("a", [], 2.0, True),
        Trial("b", [LR, "0.5", WEIGHT, "2"], 2.0, True),
        Trial("b", [LR, "0.5", WEIGHT, "2"], 3.0, True),
    ]
    folder = comparison(tmp_path / "earlier", *trials)
    for file in (folder, folder / "comparison.json"):
        settings, read = read_settings(file, "quick")
        assert settings == {"a": (), "b": (LR, "0.5", WEIGHT, "2")} and read == trials


@pytest.mark.parametrize(
    ("trial", "budget", "error", "says"),
    [
        (Trial("a", [LR, "1"], 1.0, False), "quick", UsageError, "no settings were searched"),
        (Trial("a", [LR, "1"], 1.0, True), "full", UsageError, "--budget quick, not full"),
        (Trial("a", ["OUTPUT_DIR", "/"], 1.0, True), "quick", DataError, "no search chooses"),
        (Trial("a", [LR], 1.0, True), "quick", DataError, "no search chooses"),
    ],
)
def test_what_no_search_has_chosen_is_refused(tmp_path, trial, budget, error, says):
    with pytest.raises(error, match=says):
        read_settings(comparison(tmp_path / "earlier", trial), budget)
