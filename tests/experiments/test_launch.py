"""Runs in processes and jobs of their own, where they go wrong."""

import errno
import os
import shutil
from dataclasses import replace
from unittest import mock

import pytest

from ghm_d2.errors import DataError, UsageError
from ghm_d2.experiments import run_all
from ghm_d2.experiments.launch import (
    LocalLauncher,
    SubmititLauncher,
    find_devices,
    is_training,
    train_run,
)
from ghm_d2.experiments.plan import make_run
from ghm_d2.progress import Progress
from ghm_d2.records import RunRecord, RunsTable
from ghm_d2.training.metrics.timing import time_steps


@pytest.fixture
def broken(digits_folder, tiny, tmp_path):
    """A run whose validation images are cut off."""
    data = tmp_path / "data"
    shutil.copytree(digits_folder, data)
    for image in (data / "images" / "val").iterdir():
        image.write_bytes(image.read_bytes()[:200])
    words = (*tiny, "SOLVER.MAX_ITER", "1")
    return make_run(tmp_path, "a", "quick/retinanet_ghm.yaml", words, str(data), 1, "cpu")


@pytest.mark.parametrize("kind", ["local", "submitit"])
def test_what_a_run_ended_with_is_told(broken, tmp_path, kind):
    launcher = (
        LocalLauncher(["cpu"]) if kind == "local" else SubmititLauncher(tmp_path / "jobs", 5, "cpu")
    )
    with pytest.raises(DataError, match=r"a, seed 1 failed: .*images/val/.* cannot be read"):
        run_all.run_all([broken], launcher, RunsTable(tmp_path / "runs.jsonl"), Progress())
    assert not is_training(broken)


def test_a_bad_image_is_found_while_steps_are_timed(broken):
    with pytest.raises(DataError, match="images/val/"):
        time_steps(broken.build_config("cpu"))


def test_a_missing_submitit_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(UsageError, match="pip install submitit"):
        SubmititLauncher(tmp_path, 5, "cpu")


def test_devices_are_found_and_each_takes_its_jobs(monkeypatch):
    assert find_devices("cpu") == ["cpu"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    every = ["cuda:0", "cuda:1", "cuda:2"]
    assert find_devices("cuda") == find_devices("auto") == every
    assert find_devices("cuda:2, cuda:0") == ["cuda:2", "cuda:0"]
    with pytest.raises(UsageError, match="cuda:3: the last GPU of this machine is cuda:2"):
        find_devices("cuda:1,cuda:3")
    assert LocalLauncher(every).free == every
    assert LocalLauncher(["cuda:0", "cuda:1"], jobs=2).free == ["cuda:0", "cuda:1"] * 2


def test_runs_at_once_share_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(7)), raising=False)
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="2"):
        LocalLauncher(["cpu"], jobs=2)
        assert os.environ["OMP_NUM_THREADS"] == "2" and not threads, "what the user set"
        del os.environ["OMP_NUM_THREADS"]
        LocalLauncher(["cpu"])
        assert "OMP_NUM_THREADS" not in os.environ
        LocalLauncher(["cpu"], jobs=3)
        assert os.environ["OMP_NUM_THREADS"] == "2" and threads == [2]


def test_a_file_system_without_locks_is_named_before_anything_starts(broken, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(UsageError, match=r"No locks available.*--output"):
        run_all.run_all(
            [broken], LocalLauncher(["cpu"]), RunsTable(tmp_path / "runs.jsonl"), Progress()
        )


@pytest.mark.parametrize("analyse", [True, False])
def test_the_weights_of_trials_alone_are_removed(broken, tmp_path, monkeypatch, analyse):
    run = replace(broken, analyse=analyse)  # a trial of a search is not analysed

    def train(run, device):
        RunRecord("m", "n", "d", run.config_hash, run.seed).write(run.folder)
        for name in ("model_final.pth", "model_best.pth"):
            (run.folder / name).touch()

    monkeypatch.setattr("ghm_d2.experiments.launch._train", train)
    monkeypatch.setattr("ghm_d2.experiments.launch._log_to", lambda file: None)
    table = RunsTable(tmp_path / "runs.jsonl")
    assert train_run(run, table.file, "cpu") == 0
    assert table.latest(run.key) and len(list(run.folder.glob("*.pth"))) == 2 * analyse
