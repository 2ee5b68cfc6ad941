"""ghm compare as a user runs it: subprocesses that are killed, restarted and run side by side."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOSSES = ("losses", "--side", "focal + SL1", "--side", "GHM-C + SL1 (robust)")
# long enough to be killed on the way
LONGER = ("--set", "SOLVER.MAX_ITER", "40", "--set", "SOLVER.CHECKPOINT_PERIOD", "10")
LONGER += ("--set", "TEST.EVAL_PERIOD", "20")


@pytest.fixture(scope="module")
def words(digits_folder, tiny):
    """Words of a comparison of seconds, into a folder."""

    def make(output, *what, seeds=1):
        pairs = list(zip(tiny[::2], tiny[1::2], strict=True))
        sets = [word for pair in (*pairs, ("TEST.EVAL_PERIOD", "2")) for word in ("--set", *pair)]
        common = ["--dataset", digits_folder, "--output", output, "--seeds", seeds, *sets]
        return [str(word) for word in ("compare", *what, *common)]

    return make


def start(words, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "ghm_d2.cli", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **kwargs)


def table(output: Path) -> list[dict]:
    file = output / "runs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(what, process=None, seconds=200):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return found


def is_alive(pid: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return listed.stdout.strip()[:1] not in ("", "Z")


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    return [child for child, parent in pairs if parent == pid]


@pytest.fixture(scope="module")
def killed(words, tmp_path_factory) -> Path:
    """The folder of a comparison that was killed in its second run and then run to its end."""
    output = tmp_path_factory.mktemp("killed")
    more = (*LONGER, "--json")
    first = start([*words(output, *LOSSES), *more])
    rows = wait_for(lambda: table(output), first)
    wait_for(lambda: list((output / "runs").glob("*ghm-c*/model_0000009.pth")), first)
    below = children(first.pid)
    assert below, "the run is no process of its own"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    wait_for(lambda: not any(is_alive(pid) for pid in below))
    assert len(table(output)) == 1, "the comparison was over before it was killed"
    done = output / rows[0]["folder"] / "model_final.pth"
    (output / "before.json").write_text(json.dumps(done.stat().st_mtime_ns))
    again = start([*words(output, *LOSSES), *more])
    stdout, stderr = again.communicate(timeout=300)
    assert again.returncode == 0, stderr
    (output / "stdout.json").write_text(stdout)
    return output


def test_a_killed_comparison_repeats_no_finished_run(killed):
    rows = table(killed)
    assert len(rows) == 2 and len({row["key"] for row in rows}) == 2
    before = json.loads((killed / "before.json").read_text())
    final = killed / rows[0]["folder"] / "model_final.pth"
    assert final.stat().st_mtime_ns == before


def test_a_killed_run_is_resumed(killed):
    log = (killed / table(killed)[1]["folder"] / "metrics.jsonl").read_text()
    iterations = [json.loads(line)["iteration"] for line in log.splitlines()]
    assert iterations == sorted(iterations)
    record = table(killed)[1]["record"]
    assert record["status"] == "finished" and record["iterations"] == 40
    said = (killed / table(killed)[1]["folder"] / "log.txt").read_text()
    assert re.search(r"resuming after [1-9]\d* iterations", said)


def test_the_end_is_a_report(killed):
    folder = next(killed.glob("losses-*"))
    assert {"comparison.json", "report.html", "report.md", "runs.csv"} <= set(os.listdir(folder))
    assert list(folder.glob("*.png"))
    value = json.loads((killed / "stdout.json").read_text())
    assert "one seed" in json.dumps(value).lower()
    record = table(killed)[0]["record"]
    assert record["gflops"] > 0 and record["loss_ms"] > 0 and record["parameters"] > 0
    assert record["s_per_iter"] > 0 and record["ms_per_image"] > 0 and record["peak_memory_mb"] > 0


@pytest.mark.slow  # tests/experiments have a run that another process trains
def test_two_comparisons_at_once_share_their_runs(words, tmp_path):
    both = [start([*words(tmp_path, *LOSSES), "--json"]) for _ in range(2)]
    ends = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert ends[0][0] == ends[1][0]
    keys = [row["key"] for row in table(tmp_path)]
    assert len(keys) == len(set(keys)) == 2


@pytest.mark.slow  # tests/experiments start one run so
def test_jobs_of_submitit(ghm, words, tmp_path):
    done = ghm(*words(tmp_path, *LOSSES), "--launcher", "submitit", "--json")
    assert done.returncode == 0, done.stderr
    assert len(table(tmp_path)) == 2
    assert list((tmp_path / "submitit").glob("*_result.pkl"))


@pytest.mark.slow  # tests/experiments have a run that diverged
def test_a_diverged_side_is_a_result(ghm, words, tmp_path):
    """Though it comes first, and diverges within the steps that are timed for the plan."""
    for name, rate in ("steady", "0.001"), ("wild", "1e30"):
        text = f"_BASE_: quick/retinanet_focal.yaml\nSOLVER: {{BASE_LR: {rate}}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    sides = (tmp_path / "wild.yaml", "vs", tmp_path / "steady.yaml")
    done = ghm(*words(tmp_path / "out", *sides))
    assert done.returncode == 0, done.stderr
    statuses = [row["record"]["status"] for row in table(tmp_path / "out")]
    assert statuses == ["diverged", "finished"]
    assert "diverged at iteration" in " ".join(done.stdout.split())


@pytest.mark.slow  # tests/cli/test_train.py interrupts a training
def test_ctrl_c_saves_all_checkpoints_and_leaves_nothing_running(words, tmp_path):
    asked = [*words(tmp_path, *LOSSES), *LONGER, "--jobs", "2"]
    process = start(asked, start_new_session=True)
    wait_for(lambda: len(list(tmp_path.glob("runs/*/model_0000009.pth"))) == 2, process)
    below = children(process.pid)
    for pid in (process.pid, *below):  # as a terminal does, to all that have not left its group
        if os.getpgid(pid) == process.pid:
            os.kill(pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr and "Traceback" not in stderr
    wait_for(lambda: not any(is_alive(pid) for pid in below))
    folders = list(tmp_path.glob("runs/*"))
    assert len(folders) == 2
    for folder in folders:
        record = json.loads((folder / "run.json").read_text())
        assert record["status"] == "interrupted"
        last = f"model_{record['iterations'] - 1:07d}.pth"
        assert (folder / "last_checkpoint").read_text() == last


def test_the_plan_is_json(ghm, words, tmp_path):
    done = ghm(*words(tmp_path, "losses", seeds=2), "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["comparison"] == "losses" and plan["expected_seconds"] > 0
    assert [pair["side"] for pair in plan["primary"]] == ["GHM-C + SL1 (robust)"]
    assert plan["power"]["detectable"] > 2 and "assumed" in plan["power"]["source"]
    assert plan["power"]["seeds_for"]["2"] < plan["power"]["seeds_for"]["1"]
    assert [run["seed"] for run in plan["runs"]] == [1] * 5 + [2] * 5
    assert {run["iterations"] for run in plan["runs"]} == {4}
    assert not any(run["done"] for run in plan["runs"])
    assert all(run["expected_seconds"] > 0 for run in plan["runs"])
    assert not (tmp_path / "runs").exists(), "a dry run trains nothing"


def test_a_plan_tells_what_is_done(ghm, words, killed):
    done = ghm(*words(killed, *LOSSES, seeds=2), *LONGER, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "SL1" in line and "│" in line]
    assert len(lines) == 2
    assert all([c.strip() for c in line.split("│")][2:4] == ["2", "1"] for line in lines)
    assert "Primary pair: GHM-C + SL1 (robust) against focal + SL1" in done.stdout
    assert "in 4 of 5 cases: 2 seeds find" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("what", "nearest"),
    [
        (["lossess"], "losses"),
        (["two-stage", "vs", "one-stag"], "one-stage"),
        (["losses", "--dataset", "digit"], "digits"),
        (["losses", "--side", "focal"], "focal + SL1"),
        (["quick/retinanet_focl.yaml", "vs", "quick/retinanet_ghm.yaml"], "retinanet_focal.yaml"),
        (["losses", "--set", "MODEL.GHM.SCOPES", "batch"], "MODEL.GHM.SCOPE"),
        (["losses", "--budget", "quik"], "quick"),
        (["losses", "--launcher", "slurm"], "submitit"),
        (["losses", "--launcher", "submitit", "--jobs", "2"], "each run is a job"),
        (["losses", "--device", "cpu,gpu"], "not 'gpu'"),
        (["losses", "--search", "--settings", "earlier"], "leave out --search"),
        (["losses", "--search-on", "digit"], "digits"),
        (["noise", "--dataset", "coco_2017"], "digits"),
        (["losses", "--set", "SEED", "3"], "--seeds"),
        (["losses", "--set", "SEED=3", "--set", "SOLVER.BASE_LR", "1"], "set SEED with"),
        (["losses", "--set", "MODEL.DEVICE", "cuda"], "--device"),
    ],
)
def test_what_is_unknown_names_the_nearest(ghm, tmp_path, what, nearest):
    done = ghm("compare", *what, "--output", tmp_path, "--dry-run", "--json")
    assert done.returncode == 2, done.stderr
    assert nearest in done.stderr and done.stdout == ""
