"""Runs in processes and jobs of their own, where they go wrong."""

import errno
import shutil

import pytest

from ghm_d2.errors import DataError, UsageError
from ghm_d2.experiments import compare
from ghm_d2.experiments.launch import LocalLauncher, SubmititLauncher, is_training
from ghm_d2.experiments.plan import make_run
from ghm_d2.progress import Progress
from ghm_d2.records import RunsTable
from ghm_d2.training.timing import time_steps


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
        LocalLauncher("cpu") if kind == "local" else SubmititLauncher(tmp_path / "jobs", 5, "cpu")
    )
    with pytest.raises(DataError, match=r"a, seed 1 failed: .*images/val/.* cannot be read"):
        compare.run_all([broken], launcher, RunsTable(tmp_path / "runs.jsonl"), Progress())
    assert not is_training(broken)


def test_a_bad_image_is_found_while_steps_are_timed(broken):
    with pytest.raises(DataError, match="images/val/"):
        time_steps(broken.build_config("cpu"))


def test_a_missing_submitit_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(UsageError, match="pip install submitit"):
        SubmititLauncher(tmp_path, 5, "cpu")


def test_each_gpu_takes_a_run(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert LocalLauncher("cuda").free == ["cuda:0", "cuda:1", "cuda:2"]
    assert LocalLauncher("cuda:1").free == ["cuda:1"]
    assert LocalLauncher("cpu").free == ["cpu"]


def test_a_file_system_without_locks_is_named_before_anything_starts(broken, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(UsageError, match=r"No locks available.*--output"):
        compare.run_all(
            [broken], LocalLauncher("cpu"), RunsTable(tmp_path / "runs.jsonl"), Progress()
        )
