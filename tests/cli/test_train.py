"""ghm train, eval and predict as a user runs them, on real files."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = "configs/quick/retinanet_ghm.yaml"
SKIP = ("--on-divergence", "skip")


@pytest.fixture(scope="module")
def run_folder(ghm, digits_folder, tiny, tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    words = ["--config", CONFIG, "--dataset", digits_folder, "--output", folder, "--seed", 3]
    done = ghm("train", *words, *tiny, "TEST.EVAL_PERIOD", 2)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_a_run_leaves_its_evidence(run_folder, digits_folder):
    present = {file.name for file in run_folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "density.jsonl", "run.json", "log.txt"} <= present
    assert {"model_final.pth", "model_best.pth", "detections.png"} <= present
    assert any(name.startswith("events.out.tfevents") for name in present)
    run = record(run_folder)
    assert run["status"] == "finished" and run["iterations"] == 4 and run["seed"] == 3
    assert run["method"] == "RetinaNet GHM-C + GHM-R (robust)"
    assert set(run["metrics"]) == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    assert set(run["per_class"]) == {str(digit) for digit in range(10)}
    images = json.loads((Path(digits_folder) / "train.json").read_text())["annotations"]
    assert sum(run["train_objects"].values()) == len(images) > 5
    assert run["train_objects"].keys() == run["per_class"].keys()
    assert run["s_per_iter"] > 0 and run["ms_per_image"] > 0 and run["parameters"] > 1000
    lines = [json.loads(x) for x in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["iteration"] for x in lines if "loss_cls" in x] == [0, 1, 2, 3]
    densities = {
        json.loads(x)["density"] for x in (run_folder / "density.jsonl").read_text().splitlines()
    }
    assert densities == {"ghm_c.density", "ghm_r.density"}


def test_a_folder_in_which_another_process_trains_is_left_alone(ghm, digits_folder, tiny, tmp_path):
    with open(tmp_path / "lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        words = ["--config", CONFIG, "--dataset", digits_folder, "--output", tmp_path, *tiny]
        result = ghm("train", *words)
    assert result.returncode == 2 and "another process is training in" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]


def test_the_table_has_the_published_columns(run_folder):
    header = next(x for x in (run_folder / "stdout.txt").read_text().splitlines() if "AP50" in x)
    columns = [cell.strip() for cell in header.strip("┃│ ").replace("│", "┃").split("┃")]
    assert columns == ["Method", "Network", "AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"]


def test_one_seed_gives_one_result(ghm, digits_folder, tiny, run_folder, tmp_path):
    words = ["--config", CONFIG, "--dataset", digits_folder, "--seed", 3]
    again = ghm("train", *words, "--output", tmp_path / "b", *tiny, "TEST.EVAL_PERIOD", 2, "--json")
    assert again.returncode == 0, again.stderr
    metrics = (tmp_path / "b" / "metrics.jsonl").read_bytes()
    assert metrics == (run_folder / "metrics.jsonl").read_bytes()
    assert json.loads(again.stdout)["metrics"] == record(run_folder)["metrics"]
    words[-1] = 4
    other = ghm("train", *words, "--output", tmp_path / "c", *tiny)
    assert other.returncode == 0, other.stderr
    assert (tmp_path / "c" / "metrics.jsonl").read_bytes() != metrics


def test_eval_finds_the_configuration_beside_the_weights(ghm, run_folder, tmp_path):
    weights = run_folder / "model_final.pth"
    done = ghm("eval", "--weights", weights, "--json", "--output", tmp_path / "e", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"] == record(run_folder)["metrics"]
    assert {f.name for f in (tmp_path / "e").iterdir()} == {
        "eval.json",
        "detections.json",
        "detections.png",
    }
    own = (run_folder / "detections.json").read_text()  # left by the training
    assert (tmp_path / "e" / "detections.json").read_text() == own and json.loads(own)


def test_eval_takes_the_split_that_is_named(ghm, run_folder, digits_folder):
    words = ["--weights", run_folder / "model_final.pth", "--json"]
    val = ghm("eval", *words, "--dataset", digits_folder)
    train = ghm("eval", *words, "--dataset", f"{digits_folder}/train.json")
    assert val.returncode == 0 and train.returncode == 0, train.stderr
    assert json.loads(val.stdout)["metrics"] == record(run_folder)["metrics"]
    assert json.loads(val.stdout)["config_hash"] == record(run_folder)["config_hash"]
    assert json.loads(train.stdout)["metrics"] != record(run_folder)["metrics"]


def test_predict_draws_and_prints_coco_json(ghm, run_folder, digits_folder, tmp_path):
    image = tmp_path / "photo.png"
    shutil.copy(next(Path(digits_folder).rglob("val/*.png")), image)
    other = tmp_path / "b" / "photo.png"
    other.parent.mkdir()
    shutil.copy(image, other)
    before = image.read_bytes()
    words = ["--weights", run_folder / "model_final.pth", "--threshold", 0, "--json"]
    done = ghm("predict", *words, "--output", tmp_path, image, other)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found and set(found[0]) >= {"image_id", "category_id", "bbox", "score", "file_name"}
    assert {f.name for f in tmp_path.glob("*.png")} == {
        "photo.png",
        "photo_detections.png",
        "photo_2_detections.png",
    }
    assert image.read_bytes() == before


def test_predict_skips_a_broken_file_unless_it_is_named(ghm, run_folder, digits_folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"no image")
    shutil.copy(next(Path(digits_folder).rglob("val/*.png")), photos / "b.png")
    words = ["--weights", run_folder / "model_final.pth", "--threshold", 0, "--json"]
    words += ["--format", "csv", "--output", tmp_path / "out"]
    done = ghm("predict", *words, photos)
    assert done.returncode == 0, done.stderr
    assert {d["file_name"] for d in json.loads(done.stdout)} == {str(photos / "b.png")}
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "b_detections.png",
        "predictions.csv",
    }
    *_, listed = done.stderr.splitlines()
    assert f"warning: {photos / 'a.png'}: cannot be decoded" in done.stderr
    assert listed == f"files skipped, because they cannot be read: {photos / 'a.png'}"
    named = ghm("predict", *words, photos, photos / "a.png")
    assert named.returncode == 3 and "error:" in named.stderr
    none = ghm("predict", *words, photos / "a*.png")
    assert none.returncode == 3 and "none of the 1 files found can be read" in none.stderr


def test_predict_tta_does_not_mirror_digits(run_folder):
    from ghm_d2.cli.predict import _predictor

    detect, _ = _predictor(run_folder / "model_final.pth", None, 0.5, 0, True, "cpu")
    assert detect._cfg.TEST.AUG.ENABLED and not detect._cfg.TEST.AUG.FLIP


def test_a_run_is_not_overwritten_unasked(ghm, digits_folder, tiny, run_folder):
    before = {f.name: f.stat().st_mtime_ns for f in run_folder.iterdir()}
    words = ["--config", CONFIG, "--dataset", digits_folder, "--output", run_folder]
    refused = ghm("train", *words, *tiny)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr and "--overwrite" in refused.stderr
    assert {f.name: f.stat().st_mtime_ns for f in run_folder.iterdir()} == before


def test_interrupted_then_resumed(ghm, digits_folder, tiny, tmp_path):
    """SIGINT saves and ends with 130; --resume runs the rest and no iteration twice."""
    folder = tmp_path / "run"
    words = ["--config", CONFIG, "--dataset", digits_folder, "--output", str(folder), "--seed", "1"]
    long = [*tiny, "SOLVER.MAX_ITER", "2000", "SOLVER.CHECKPOINT_PERIOD", "5000"]
    command = [sys.executable, "-m", "ghm_d2.cli", "train", *words, *long]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") >= 1:
            break
        time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    _, stderr = started.communicate(timeout=120)
    assert started.returncode == 130, stderr
    assert "--resume" in stderr
    assert record(folder)["status"] == "interrupted"
    done = int((folder / "last_checkpoint").read_text().removeprefix("model_").split(".")[0]) + 1
    resumed = ghm("train", "--output", folder, "--resume", "SOLVER.MAX_ITER", done + 4)
    assert resumed.returncode == 0, resumed.stderr
    assert record(folder)["iterations"] == done + 4
    lines = [json.loads(x) for x in metrics.read_text().splitlines()]
    iterations = [x["iteration"] for x in lines if "loss_cls" in x]
    assert iterations == sorted(set(iterations)) and iterations[-1] == done + 3


def test_resuming_goes_on_with_what_the_run_knows(ghm, run_folder, tmp_path):
    """Its own configuration, seed, label, best AP and measured seconds; more iterations."""
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    before = record(folder)
    before["best"] = {"AP": 99.0, "iteration": 4}
    (folder / "run.json").write_text(json.dumps(before))
    refused = ghm("train", "--output", folder, "--resume", "--config", CONFIG)
    assert refused.returncode == 2 and "--config" in refused.stderr
    done = ghm("train", "--output", folder, "--resume", "--json", "SOLVER.MAX_ITER", 6)
    assert done.returncode == 0, done.stderr
    after = json.loads(done.stdout)
    assert after["iterations"] == 6 and after["seed"] == 3 and after["dataset"] == "digits"
    assert after["best"] == {"AP": 99.0, "iteration": 4}
    assert after["train_seconds"] > before["train_seconds"]
    again = ghm("train", "--output", folder, "--resume", "--json")
    assert again.returncode == 0, again.stderr
    finished = json.loads(again.stdout)
    assert finished["iterations"] == 6 and finished["metrics"] == after["metrics"]
    assert finished["s_per_iter"] == after["s_per_iter"]


def test_an_analysis_of_over_a_twentieth_of_the_training_waits_until_asked_for(
    ghm, run_folder, tmp_path
):
    """The line about it names the command; training on takes the old analysis away."""
    assert "--resume --analyse" in (run_folder / "stderr.txt").read_text()
    assert not (run_folder / "analysis.json").exists()
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    done = ghm("train", "--output", folder, "--resume", "--analyse", "--json")
    assert done.returncode == 0, done.stderr
    analysis = json.loads((folder / "analysis.json").read_text())
    assert "gradient_norms" in analysis and len(analysis["image_bootstrap"]["AP"]) == 200
    assert (folder / "worst.jpg").is_file()
    assert json.loads(done.stdout)["gflops"] == record(folder)["gflops"] > 0
    done = ghm("train", "--output", folder, "--resume", "--json")  # nothing is left to train
    assert "--analyse" not in done.stderr and (folder / "analysis.json").is_file()
    assert json.loads(done.stdout)["gflops"] == record(folder)["gflops"] > 0
    done = ghm("train", "--output", folder, "--resume", "--no-analyse", "SOLVER.MAX_ITER", 5)
    assert done.returncode == 0 and "--analyse" not in done.stderr
    assert not (folder / "analysis.json").exists() and not (folder / "worst.jpg").exists()


@pytest.mark.parametrize("asked_for", [False, True])
def test_a_failed_analysis_fails_the_command_only_where_asked_for(asked_for, monkeypatch):
    """The run is finished and recorded by then."""
    from ghm_d2.analysis import after_training
    from ghm_d2.cli.train import _analyse
    from ghm_d2.config import get_cfg
    from ghm_d2.errors import DataError
    from ghm_d2.progress import Progress
    from ghm_d2.records import RunRecord

    def fail(*_):
        raise DataError("a.jpg: cannot be read")

    said = []
    monkeypatch.setattr(Progress, "message", lambda _, text: said.append(text))
    monkeypatch.setattr(after_training, "expected_analysis_seconds", lambda *_, evaluated: 1.0)
    monkeypatch.setattr(after_training, "analyse_run", fail)
    run = RunRecord("m", "n", "d", "0", 1, train_seconds=100.0)
    if asked_for:
        with pytest.raises(DataError):
            _analyse(get_cfg(), run, None, asked_for, Progress())
    else:
        _analyse(get_cfg(), run, None, asked_for, Progress())
        assert "the run is finished" in said[0] and "a.jpg: cannot be read" in said[0]


def test_a_run_is_not_resumed_on_other_classes(ghm, run_folder, digits_folder, tmp_path):
    folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(run_folder, folder)
    shutil.copytree(digits_folder, data)
    for split in ("train", "val"):
        coco = json.loads((data / f"{split}.json").read_text())
        coco["categories"].append({"id": 11, "name": "ten"})
        (data / f"{split}.json").write_text(json.dumps(coco))
    words = ["--output", folder, "--resume", "--dataset", data, "SOLVER.MAX_ITER", 6]
    before = (folder / "config.yaml").read_bytes()
    refused = ghm("train", *words)
    assert refused.returncode == 3 and "classes" in refused.stderr
    assert (folder / "config.yaml").read_bytes() == before


def test_a_start_that_fails_leaves_the_folder_alone(ghm, digits_folder, tiny, run_folder, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("config.yaml", "model_resnet.pth", "log.txt"):
        (folder / name).write_text("mine")
    words = ["--config", CONFIG, "--dataset", digits_folder, "--output", folder, "--overwrite"]
    refused = ghm("train", *words)
    assert refused.returncode == 2 and "no run" in refused.stderr
    assert all(file.read_text() == "mine" for file in folder.iterdir())
    shutil.copytree(run_folder, tmp_path / "run")
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "run").iterdir()}
    words[-2] = tmp_path / "run"
    weights = tmp_path / "run" / "model_final.pth"
    assert ghm("train", *words, "MODEL.GHM.CLS.BINS", 0).returncode == 2
    refused = ghm("train", *words, *tiny, "MODEL.WEIGHTS", weights)
    assert refused.returncode == 2 and "model_final.pth" in refused.stderr
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "run").iterdir()} == before


def test_divergence_is_named(ghm, digits_folder, tiny, tmp_path):
    words = ["--config", CONFIG, "--dataset", digits_folder, "--output", tmp_path / "run"]
    clip = ["SOLVER.CLIP_GRADIENTS.ENABLED", False, "SOLVER.OPTIMIZER", "SGD"]
    broken = ghm("train", *words, *tiny, "SOLVER.BASE_LR", 1e30, *clip)
    assert broken.returncode == 4, broken.stderr
    error = broken.stderr.strip().splitlines()[-1]
    assert "iteration 1" in error and "loss_cls" in error and "SOLVER.BASE_LR" in error
    assert record(tmp_path / "run")["status"] == "diverged"
    assert "Traceback" not in broken.stderr


def test_an_image_that_goes_bad_is_named_once_and_left_out(ghm, digits_folder, tiny, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(digits_folder, data)
    images = sorted(data.rglob("train/*.png"))
    images[0].write_bytes(images[0].read_bytes()[:200])
    words = ["--config", CONFIG, "--dataset", data, "--seed", 1, "--output"]
    batch = ["SOLVER.IMS_PER_BATCH", 6]
    done = ghm("train", *words, tmp_path / "run", *tiny, *batch)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(images[0].name) == 1
    assert record(tmp_path / "run")["bad_images"] == 1
    limit = ["DATALOADER.MAX_BAD_IMAGES", 0]
    stopped = ghm("train", *words, tmp_path / "strict", *tiny, *batch, *limit)
    assert stopped.returncode == 3
    assert images[0].name in stopped.stderr and "MAX_BAD_IMAGES" in stopped.stderr
    assert "Traceback" not in stopped.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--config", "configs/quick/retinanet_gmh.yaml"], 2, "retinanet_ghm.yaml"),
        (["--config", CONFIG, "SOLVER.MAX_ITR", "3"], 2, "SOLVER.MAX_ITER"),
        (["--config", CONFIG, "SOLVER.MAX_ITER"], 2, "KEY VALUE"),
        (["--config", CONFIG, "MODEL.GHM.CLS.BINS", "0"], 2, "bins"),
        (["--config", CONFIG, "MODEL.RETINANET.CLS_LOSS_TYPE", "focl"], 2, "focal"),
        (["--config", CONFIG, "--dataset", "digts"], 2, "digits"),
        (["--config", CONFIG, "--dataset", "EMPTY"], 3, "ghm data import"),
        (["--config", CONFIG, "--device", "tpu"], 2, "cuda"),
        (["--resume", "--output", "nothing"], 2, "no run to resume"),
        (["--config", CONFIG, "SOLVER.MAX_ITER", "0"], 2, "SOLVER.MAX_ITER"),
        (["--config", CONFIG, "MODEL.META_ARCHITECTURE", "RetinaNot"], 2, "RetinaNot"),
        (["--config", CONFIG, "MODEL.META_ARCHITECTURE", "RetinaNet"], 2, "GHMRetinaNet"),
        (["--config", CONFIG, "OUTPUT_DIR", "x"], 2, "--output"),
        (["--config", CONFIG, "DATASETS.TEST", "('digits_val',)"], 2, "DATASETS.TEST with the opt"),
        (["--config", CONFIG, "--seed", "3", "SEED", "5"], 2, "set SEED with the option --seed"),
        (["--config", CONFIG, *SKIP, "SOLVER.ON_DIVERGENCE", "stop"], 2, "option --on-divergence"),
        (["--config", CONFIG, "--overwite", "SEED", "3"], 2, "--overwite"),
        ([], 2, "--config"),
    ],
)
def test_mistakes_get_one_line_and_a_remedy(ghm, digits_folder, tmp_path, words, code, said):
    (tmp_path / "EMPTY").mkdir()
    data = [] if "--dataset" in words else ["--dataset", digits_folder]
    output = [] if "--output" in words else ["--output", "run"]
    done = ghm("train", *data, *output, *words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


def test_eval_refuses_an_override_that_dataset_would_replace(ghm, digits_folder, tmp_path):
    words = ("--weights", tmp_path / "none.pth", "--dataset", digits_folder)
    done = ghm("eval", *words, "DATASETS.TEST", "('digits_val',)")
    assert done.returncode == 2
    assert "set DATASETS.TEST with the option --dataset" in done.stderr


def test_eval_of_what_is_no_checkpoint(ghm, tmp_path):
    assert ghm("eval", "--weights", tmp_path / "none.pth").returncode == 3
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    page = ghm("eval", "--weights", tmp_path / "page.pth", "--config", CONFIG)
    assert page.returncode == 3, page.stderr
    assert "page.pth" in page.stderr and "Traceback" not in page.stderr


def test_eval_refuses_weights_that_would_run_code(ghm, tmp_path):
    import os
    import pickle

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'marker'}",)

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": {"head.weight": Attack()}}))
    done = ghm("eval", "--weights", tmp_path / "evil.pkl", "--config", CONFIG)
    assert done.returncode == 3, done.stderr
    assert not (tmp_path / "marker").exists()
