"""Runs that are killed, run out of disk, or are of several processes: the result is the same."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ITERATIONS, PERIOD = 24, 5
GROUP = ("--num-gpus", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def survivor(ghm, tiny, tmp_path_factory):
    """Runs and kills trainings of one configuration, one thread a process."""
    from ghm_d2.data.digits.dataset import DigitsSpec, write

    folder = tmp_path_factory.mktemp("survival")
    spec = DigitsSpec(train=12, val=5, image_size=(64, 80), objects=(1, 3), side=(12, 40))
    write(spec, folder / "data")
    return Survivor(folder, tiny)


class Survivor:
    def __init__(self, folder: Path, tiny: list[str]):
        self.folder, self.data = folder, folder / "data"
        own = ("SOLVER.MAX_ITER", ITERATIONS, "SOLVER.CHECKPOINT_PERIOD", PERIOD)
        own += ("SOLVER.IMS_PER_BATCH", 4, "TEST.EVAL_PERIOD", 7)
        self.settings = [*tiny, *map(str, own)]

    def start(self, output: Path, *words, data: Path | None = None, **kwargs) -> subprocess.Popen:
        """A new run into `output`."""
        new = ["--config", "configs/quick/retinanet_ghm.yaml", "--seed", "1"]
        new += ["--dataset", str(data or self.data), *self.settings, *map(str, words)]
        return self.popen(output, *new, **kwargs)

    def resume(self, output: Path, *words) -> str:
        """Resume the run in `output` to its end; its stderr."""
        process = self.popen(output, "--resume", *words)
        stderr = process.communicate(timeout=240)[1]
        assert process.returncode == 0, stderr
        return stderr

    def popen(self, output: Path, *words, **kwargs) -> subprocess.Popen:
        command = [sys.executable, "-m", "ghm_d2.cli", "train", "--output", str(output)]
        return subprocess.Popen(
            [*command, *map(str, words)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            **kwargs,
        )


def wait_for_rows(output: Path, rows: int, process: subprocess.Popen) -> None:
    """Wait until so many iterations are in metrics.jsonl."""
    file, limit = output / "metrics.jsonl", time.monotonic() + 120
    while not file.exists() or file.read_text().count("\n") < rows:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(survivor) -> Path:
    """A run of one process that nothing happened to."""
    output = survivor.folder / "whole"
    process = survivor.start(output)
    stderr = process.communicate(timeout=240)[1]
    assert process.returncode == 0, stderr
    return output


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_runs(a: Path, b: Path) -> None:
    """Weights, optimizer, schedule, moving averages and metrics are the same to the bit."""
    for name in ("metrics.jsonl", "density.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    states = [torch.load(x / "model_final.pth", weights_only=True) for x in (a, b)]
    for state in states:
        del state["trainer"]["seconds"]
    assert_same(*states)
    records = [json.loads((x / "run.json").read_text()) for x in (a, b)]
    figures = ("loss_variation", "grad_ratio_cls_box", "weight_variation")
    for key in ("status", "iterations", "metrics", "per_class", "best", *figures):
        assert records[0][key] == records[1][key], key
    assert records[0]["grad_ratio_cls_box"] > 0
    assert records[0]["weight_variation"].keys() == {"ghm_c", "ghm_r"}


def assert_same(a, b, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, where)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(survivor, whole, tmp_path):
    """By SIGKILL, with its last checkpoint spoilt, then by SIGTERM; with loading processes too."""
    process = survivor.start(tmp_path / "run", "DATALOADER.NUM_WORKERS", 1)
    wait_for_rows(tmp_path / "run", 12, process)
    process.kill()
    process.communicate()
    last = tmp_path / "run" / (tmp_path / "run" / "last_checkpoint").read_text()
    last.write_bytes(last.read_bytes()[:-1000])
    process = survivor.popen(tmp_path / "run", "--resume", "DATALOADER.NUM_WORKERS", 0)
    before = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    limit = time.monotonic() + 120
    while (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") >= before:
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.01)
    process.terminate()
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 130, stderr
    assert last.name in stderr, "that it was passed over is said"
    survivor.resume(tmp_path / "run")
    assert_same_runs(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_full_disk_is_told_and_costs_no_checkpoint(survivor, whole, tmp_path):
    limit = 2**20  # less than a checkpoint, more than all else

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = survivor.start(tmp_path / "run", preexec_fn=small_disk)
    stderr = process.communicate(timeout=240)[1]
    assert process.returncode == 2, stderr
    assert "model_0000004.pth cannot be written" in stderr and "Traceback" not in stderr
    assert not list((tmp_path / "run").glob("*.pth*"))
    survivor.resume(tmp_path / "run")
    assert_same_runs(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(survivor, whole, tmp_path):
    """Each kill costs the iterations since the last checkpoint, and no more."""
    output, dice = tmp_path / "run", random.Random(1)
    process, done = survivor.start(output), 0
    for _ in range(4):
        wait_for_rows(output, done + 2 + dice.randrange(PERIOD - 2), process)
        time.sleep(dice.uniform(0, 0.3))
        process.kill()
        process.communicate()
        done = max(iterations_of(output), default=-1) + 1
        process = survivor.popen(output, "--resume")
    stderr = process.communicate(timeout=240)[1]
    assert process.returncode == 0, stderr
    assert done - int(re.search(r"resuming after (\d+)", stderr)[1]) <= PERIOD
    assert_same_runs(output, whole)


@pytest.mark.slow
def test_a_run_whose_folder_goes_away_ends_and_can_be_resumed(survivor, whole, tmp_path):
    output = tmp_path / "run"
    process = survivor.start(output)
    wait_for_rows(output, 7, process)
    output.rename(tmp_path / "away")
    stderr = process.communicate(timeout=240)[1]
    assert process.returncode == 2 and "Traceback" not in stderr, stderr
    shutil.rmtree(output, ignore_errors=True)
    (tmp_path / "away").rename(output)
    survivor.resume(output)
    assert_same_runs(output, whole)


@pytest.mark.slow
def test_a_group_ends_with_the_process_that_started_it(survivor, tmp_path):
    """Its processes notice that it is gone, and leave no orphan behind."""
    process = survivor.start(tmp_path / "run", *GROUP)
    wait_for_rows(tmp_path / "run", 3, process)
    members = children(process.pid)
    process.kill()
    limit = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in members):
        assert time.monotonic() < limit, "the processes outlive the one that started them"
        time.sleep(0.1)
    process.communicate()
    survivor.resume(tmp_path / "run", *GROUP)


@pytest.mark.slow
def test_two_processes_train_as_one(survivor, whole, tmp_path):
    """A process that is killed makes both go on from the last checkpoint, without a person."""
    output = tmp_path / "run"
    process = survivor.start(output, *GROUP, "--max-restarts", 1)
    wait_for_rows(output, 8, process)
    (victim,) = [pid for pid in children(process.pid) if environment(pid).get("RANK") == "1"]
    os.kill(victim, signal.SIGKILL)
    stderr = process.communicate(timeout=240)[1]
    assert process.returncode == 0, stderr
    assert "resuming after" in stderr and "2 processes share each batch of 4" in stderr
    assert json.loads((output / "run.json").read_text())["world_size"] == 2
    mine, expected = rows(output), rows(whole)
    assert len(mine) == len(expected) == ITERATIONS + 1
    for a, b in zip(mine, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & {"total_loss", "loss_cls", "loss_box_reg", "grad_ratio_cls_box"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), (key, a["iteration"])


@pytest.mark.slow
def test_an_evaluation_by_two_processes_sees_each_image_once(survivor, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    survivor.resume(tmp_path / "run", *GROUP)  # nothing is left to train; five images
    assert_same_runs(tmp_path / "run", whole)


@pytest.mark.slow
def test_the_group_ends_with_the_message_of_the_one_that_failed(survivor, tmp_path):
    """And is not restarted by an error that would come again."""
    data = tmp_path / "data"
    shutil.copytree(survivor.data, data)
    for image in data.rglob("train/*.png"):
        image.write_bytes(image.read_bytes()[:100])
    process = survivor.start(tmp_path / "run", *GROUP, "--max-restarts", 2, data=data)
    stderr = process.communicate(timeout=240)[1]
    assert process.returncode == 3, stderr
    assert stderr.count("error: ") == 1 and ".png: cannot be read" in stderr
    assert stderr.count("training on") == 1 and "Traceback" not in stderr


@pytest.mark.slow
def test_a_group_stops_together_when_asked_to(survivor, whole, tmp_path):
    process = survivor.start(tmp_path / "run", *GROUP)
    wait_for_rows(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=240)[1]
    assert process.returncode == 130, stderr
    assert "--resume continues" in stderr
    survivor.resume(tmp_path / "run", "--device", "cpu")  # one process goes on
    mine, expected = rows(tmp_path / "run"), rows(whole)
    assert [x["iteration"] for x in mine] == [x["iteration"] for x in expected]
    assert mine[-2]["total_loss"] == pytest.approx(expected[-2]["total_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--num-gpus", "0"), "at least 1"),
        (("--num-machines", "2"), "--rdzv HOST:PORT"),
        (("--num-machines", "2", "--rdzv", "a:1", "--max-restarts", "1"), "--resume on each"),
        (("--on-divergence", "ignore"), "stop, skip"),
    ],
)
def test_what_makes_no_group_is_said_once(ghm, survivor, tmp_path, words, said):
    new = ["--config", "configs/quick/retinanet_ghm.yaml", "--dataset", survivor.data]
    done = ghm("train", *new, "--output", tmp_path / "run", *survivor.settings, *words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_every_process_of_a_group_refuses_is_said_once(survivor, tmp_path):
    process = survivor.start(tmp_path / "run", *GROUP, "SOLVER.IMS_PER_BATCH", "3")
    stderr = process.communicate(timeout=240)[1]
    assert process.returncode == 2, stderr
    assert "number of processes (2)" in stderr and stderr.count("error: ") == 1
    assert "Traceback" not in stderr


def iterations_of(output: Path) -> list[int]:
    """The iterations whose metrics are on the disk; the last row may be half written."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["iteration"] for line in lines if line.endswith("}")]


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def environment(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_text()
    except OSError:  # a short-lived one
        return {}
    return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)
