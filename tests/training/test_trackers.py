"""Weights & Biases and MLflow, each with its own store on this machine; skipped where missing."""

import json
import sys
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage

from ghm_d2.config import check_config, load_config
from ghm_d2.errors import UsageError
from ghm_d2.training.metrics.trackers import GROUP, trackers_of


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setenv(GROUP, "claim-on-cells")
    found = load_config("quick/retinanet_ghm.yaml")
    found.OUTPUT_DIR = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    return found


def log(cfg, start: int, end: int) -> None:
    """Log like a training from iteration `start` to `end`, and close the writers."""
    with EventStorage(start) as storage:
        writers = trackers_of(cfg, start)
        for i in range(start, end):
            storage.iter = i
            storage.put_scalar("lr", 0.5 + i, smoothing_hint=False)
            if i == 1:
                storage.put_scalar("bbox/AP", 31.5, smoothing_hint=False)
            for writer in writers:
                writer.write()
        for writer in writers:
            writer.close()


def test_mlflow_has_each_value_once_and_a_resumed_run_in_one_entry(cfg, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (ghm_d2[trackers])")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    cfg.SOLVER.TRACKERS = ("mlflow",)
    log(cfg, 0, 3)
    log(cfg, 3, 5)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("ghm_d2")
    (run,) = client.search_runs([experiment.experiment_id])
    history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "lr")]
    assert history == [(i, 0.5 + i) for i in range(5)]
    assert run.data.metrics["bbox/AP"] == 31.5
    assert run.info.run_name == "run" and run.data.tags["group"] == "claim-on-cells"


def test_wandb_has_each_value_and_a_resumed_run_in_one_entry(cfg, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (ghm_d2[trackers])")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sent, init = [], wandb.init

    def watched(**options):
        run = init(**options)
        sent.append((options["id"], options["group"], run.id))
        return run

    monkeypatch.setattr(wandb, "init", watched)
    cfg.SOLVER.TRACKERS = ("wandb",)
    log(cfg, 0, 3)
    log(cfg, 3, 5)
    (first, group, run_id), (again, *_) = sent
    assert first is None and again == run_id and group == "claim-on-cells"
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and b"bbox/AP" in b"".join(file.read_bytes() for file in files)


def test_what_is_unknown_or_not_installed_is_told(cfg, monkeypatch):
    cfg.SOLVER.TRACKERS = ("comet",)
    with pytest.raises(UsageError, match="wandb, mlflow, not 'comet'"):
        check_config(cfg)
    cfg.SOLVER.TRACKERS = ("wandb",)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        trackers_of(cfg)


class Refusal(Exception):
    """Stands for MLflow's exception."""


def mlflow_with(start_run) -> SimpleNamespace:
    names = ("set_experiment", "set_tag", "log_text", "log_metrics", "end_run")
    does_nothing = {name: lambda *_, **__: None for name in names}
    return SimpleNamespace(MlflowException=Refusal, start_run=start_run, **does_nothing)


def test_a_resumed_run_goes_on_in_the_entries_of_two_trackers(cfg, monkeypatch):
    begun = []

    def begin(kind, given):
        begun.append((kind, given))
        return given or f"{kind}{len(begun)}"

    def init(**options):
        return SimpleNamespace(
            id=begin("w", options["id"]), log=lambda *_, **__: None, finish=lambda: None
        )

    def start_run(run_id, run_name):
        return SimpleNamespace(info=SimpleNamespace(run_id=begin("m", run_id)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow_with(start_run))
    cfg.SOLVER.TRACKERS = ("wandb", "mlflow")
    log(cfg, 0, 2)
    log(cfg, 2, 3)
    log(cfg, 0, 1)  # a run begun anew has entries of its own
    assert begun == [("w", None), ("m", None), ("w", "w1"), ("m", "m2"), ("w", None), ("m", None)]


def test_a_server_that_refuses_is_an_error_of_one_line(cfg, monkeypatch):
    def start_run(**_):
        raise Refusal("no database here\nand a long explanation")

    monkeypatch.setitem(sys.modules, "mlflow", mlflow_with(start_run))
    cfg.SOLVER.TRACKERS = ("mlflow",)
    with pytest.raises(UsageError, match=r"MLflow: no database here; check .* MLFLOW_TRACKING_URI"):
        trackers_of(cfg)


def test_a_server_that_is_lost_ends_no_training(cfg, monkeypatch, caplog):
    sent = []

    def log_metrics(values, iteration):
        sent.append(iteration)
        if iteration == 1:
            raise ConnectionError("no route to host")

    entry = SimpleNamespace(info=SimpleNamespace(run_id="a1"))
    fake = mlflow_with(lambda **_: entry)
    fake.log_metrics = log_metrics
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    cfg.SOLVER.TRACKERS = ("mlflow",)
    log(cfg, 0, 4)
    assert sent == [0, 1]
    assert [r.getMessage() for r in caplog.records if "mlflow" in r.getMessage()] == [
        "mlflow: no route to host; nothing more of this run is sent to it"
    ]


def test_any_tracker_is_an_event_writer(cfg, monkeypatch):
    """With a package that stands for MLflow: what a training gives it, and in which order."""
    calls = []

    def note(name, result=None):
        return lambda *args, **kwargs: calls.append((name, *args, *kwargs.values())) or result

    entry = SimpleNamespace(info=SimpleNamespace(run_id="a1"))
    names = ("set_experiment", "set_tag", "log_text", "log_metrics", "end_run")
    fake = SimpleNamespace(start_run=note("start_run", entry), **{n: note(n) for n in names})
    fake.MlflowException = Refusal
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    cfg.SOLVER.TRACKERS = ("mlflow",)
    log(cfg, 0, 2)
    assert ("start_run", None, "run") in calls and ("set_tag", "group", "claim-on-cells") in calls
    sent = [call[1:] for call in calls if call[0] == "log_metrics"]
    assert sent == [({"lr": 0.5}, 0), ({"lr": 1.5, "bbox/AP": 31.5}, 1)]
    assert calls[-1] == ("end_run",)
    with open(f"{cfg.OUTPUT_DIR}/trackers.json") as file:
        assert json.load(file) == {"mlflow": "a1"}
    log(cfg, 2, 3)
    assert ("start_run", "a1", None) in calls
