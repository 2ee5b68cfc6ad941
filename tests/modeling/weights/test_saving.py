"""A save is whole or not there, and a run resumes from it as it was."""

import errno
import json
import os
import stat
import subprocess
import sys
import time

import pytest
import torch
from states import assert_same, state_of
from torch import nn

from ghm_d2.errors import OutputError, WeightsError
from ghm_d2.files import write_atomically
from ghm_d2.modeling.weights.checkpointer import GHMCheckpointer


class Model(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, 2)


def run_parts(folder):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    checkpointer = GHMCheckpointer(model, folder, optimizer=optimizer, scheduler=scheduler)
    return model, optimizer, scheduler, checkpointer


def test_a_run_is_saved_and_resumed_whole(tmp_path):
    model, optimizer, scheduler, checkpointer = run_parts(tmp_path)
    for _ in range(3):
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        scheduler.step()
    checkpointer.save("model_0000002", iteration=2)
    checkpointer.save_weights("model_best")

    model2, optimizer2, scheduler2, resumed = run_parts(tmp_path)
    assert resumed.has_checkpoint()
    assert resumed.get_checkpoint_file() == str(tmp_path / "model_0000002.pth")
    left = resumed.resume_or_load("elsewhere.pth", resume=True)
    assert left == {"iteration": 2}
    assert_same(model2, model.state_dict())
    assert scheduler2.state_dict() == scheduler.state_dict()
    ours, theirs = optimizer2.state_dict()["state"], optimizer.state_dict()["state"]
    assert all(torch.equal(ours[i]["momentum_buffer"], theirs[i]["momentum_buffer"]) for i in ours)
    assert len(ours) == 4

    fresh, _, fresh_scheduler, loaded = run_parts(tmp_path / "new")
    loaded.resume_or_load(str(tmp_path / "model_0000002.pth"), resume=True)
    assert_same(fresh, model.state_dict())
    assert fresh_scheduler.last_epoch == 0, "weights start a new run"
    best = Model()
    assert GHMCheckpointer(best).load(str(tmp_path / "model_best.pth")) == {}
    assert_same(best, model.state_dict())


def test_the_state_of_another_run_is_an_error_of_the_weights(tmp_path):
    model, _, _, checkpointer = run_parts(tmp_path)
    checkpointer.save("model_0000001")
    optimizer = torch.optim.SGD([model.head.weight], lr=0.1)
    with pytest.raises(WeightsError, match="does not fit this run"):
        GHMCheckpointer(model, tmp_path, optimizer=optimizer).resume_or_load("", resume=True)


@pytest.mark.parametrize(
    ("interruption", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (RuntimeError("no fault of the disk"), RuntimeError),
    ],
)
def test_an_interrupted_save_leaves_the_old_file(interruption, raised, tmp_path, monkeypatch):
    model = Model()
    checkpointer = GHMCheckpointer(model, tmp_path)
    checkpointer.save("model_final", iteration=1)
    saved, files = state_of(model), sorted(tmp_path.iterdir())
    nn.init.ones_(model.head.weight)

    def half_a_save(data, file):
        file.write(b"PK half a file")
        raise interruption

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(raised):
        checkpointer.save("model_final", iteration=2)
    assert sorted(tmp_path.iterdir()) == files
    assert checkpointer.resume_or_load("", resume=True) == {"iteration": 1}
    assert_same(model, saved)


SAVE_UNDER_A_LIMIT = """
import json, os, resource, sys, torch
from ghm_d2.modeling.weights.checkpointer import GHMCheckpointer
from ghm_d2.errors import OutputError
folder = sys.argv[1]
checkpointer = GHMCheckpointer(torch.nn.Linear(300, 300), folder)
checkpointer.save("model_0000001", iteration=1)
size = os.path.getsize(os.path.join(folder, "model_0000001.pth"))
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in (5, 100, 5000, size // 2, size - 5000, size - 400, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        checkpointer.save("model_0000003", iteration=3)
    except OutputError as error:
        print(json.dumps([limit, error.exit_code, str(error), sorted(os.listdir(folder))]))
"""


def test_a_full_disk_costs_no_earlier_checkpoint(tmp_path):
    """A limit on the size of files stands for the disk; PyTorch has an error of its own for it."""
    command = [sys.executable, "-c", SAVE_UNDER_A_LIMIT, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 7
    for _, code, message, files in rows:
        assert code == 2 and "\n" not in message
        assert "model_0000003.pth cannot be written: it would exceed the limit" in message
        assert "files saved earlier are intact" in message and "--resume" in message
        assert files == ["last_checkpoint", "model_0000001.pth"]
    checkpointer = GHMCheckpointer(nn.Linear(300, 300), tmp_path)
    assert checkpointer.resume_or_load("", resume=True) == {"iteration": 1}


def test_a_folder_that_is_gone_is_an_error_of_the_output(tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(OutputError, match=r"gone/model_1\.pth cannot .*its folder does not exist"):
        GHMCheckpointer(Model(), gone).save("model_1")
    with pytest.raises(OutputError, match="gone/file"):
        write_atomically(str(gone / "file"), lambda file: file.write(b"new"))
    assert not gone.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_an_error_of_the_output(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permission denied"):
        GHMCheckpointer(Model(), tmp_path).save("model_1")


def test_the_bytes_are_on_the_disk_before_the_name_and_then_the_name(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(opened):
        folder = stat.S_ISDIR(os.fstat(opened).st_mode)
        steps.append(("sync", "folder" if folder else os.fstat(opened).st_size))
        fsync(opened)

    def noted_replace(old, new):
        steps.append(("replace", os.path.basename(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomically(str(tmp_path / "file"), lambda file: file.write(b"new"))
    assert steps == [("sync", 3), ("replace", "file"), ("sync", "folder")]


def test_what_killed_writers_left_goes_with_a_later_save(tmp_path):
    """But neither what another process may be writing, nor a file of somebody's."""
    kill = "os.kill(os.getpid(), 9)"
    code = "import os; from ghm_d2.files import write_atomically; "
    code += f"write_atomically({str(tmp_path / 'model.pth')!r}, lambda file: {kill})"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    old, young = tmp_path.iterdir()
    mine = tmp_path / "notes.tmp"
    mine.write_text("mine")
    for file in (old, mine):
        os.utime(file, (time.time() - 1e5,) * 2)
    write_atomically(str(tmp_path / "file"), lambda file: file.write(b"new"))
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "file", mine, young])


def test_nobody_sees_a_half_written_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")

    def write_new(opened):
        opened.write(b"new")
        opened.flush()
        assert file.read_text() == "old"

    write_atomically(str(file), write_new)
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_name_with_a_folder_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="must not contain a folder"):
        GHMCheckpointer(Model(), tmp_path).save("../model")
