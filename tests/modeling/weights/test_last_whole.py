"""A run resumes from the last checkpoint that is whole, and says which it passed over."""

import os

import numpy as np
import pytest
import torch
from torch import nn

from ghm_d2.errors import WeightsError
from ghm_d2.modeling.weights.checkpointer import GHMCheckpointer


@pytest.fixture
def run(tmp_path):
    """A folder with checkpoints after steps 2, 4 and 6, whose weight is the step's number."""
    save(tmp_path, 1, 3, 5)
    return tmp_path


def save(folder, *iterations, name="model_{:07d}"):
    folder.mkdir(exist_ok=True)
    model = nn.Linear(1000, 1)
    checkpointer = GHMCheckpointer(model, folder)
    for iteration in iterations:
        nn.init.constant_(model.weight, iteration)
        checkpointer.save(name.format(iteration), iteration=iteration)
    checkpointer.save_weights("model_best", iteration=99)


def resume(folder) -> tuple[int, list[str]]:
    """The iteration of the checkpoint that was loaded, and what it was taken in the place of."""
    model = nn.Linear(1000, 1)
    checkpointer = GHMCheckpointer(model, folder)
    assert checkpointer.has_checkpoint()
    found = checkpointer.resume_or_load("elsewhere.pth", resume=True)
    assert set(model.weight.flatten().tolist()) == {float(found["iteration"])}
    assert all("\n" not in line and str(folder) in line for line in checkpointer.fallbacks)
    return found["iteration"], checkpointer.fallbacks


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def inside_the_weights(file) -> int:
    return file.read_bytes().index(np.float32([5, 5, 5, 5]).tobytes())


def test_a_whole_checkpoint_is_taken_as_noted(run):
    assert resume(run) == (5, [])
    (run / "last_checkpoint").write_text("model_0000003.pth\n")
    assert resume(run) == (3, [])


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_passed_over(run, part):
    last = run / "model_0000005.pth"
    last.write_bytes(last.read_bytes()[: int(part * last.stat().st_size)])
    iteration, (line,) = resume(run)
    assert iteration == 3
    assert "model_0000005.pth is " + ("damaged" if part else "empty") in line
    assert line.endswith("model_0000003.pth is used instead")
    assert (run / "last_checkpoint").read_text() == "model_0000005.pth", "noted at the next save"


def test_a_flipped_bit_is_found_that_pytorch_would_load(run):
    last = run / "model_0000005.pth"
    flip(last, inside_the_weights(last) + 1000)
    state = torch.load(last, weights_only=True)["model"]
    assert state["weight"].unique().numel() == 2
    iteration, (line,) = resume(run)
    assert iteration == 3 and "model_0000005.pth is damaged" in line


def test_all_that_is_damaged_is_named(run):
    (run / "model_0000005.pth").unlink()
    (run / "model_0000003.pth").write_bytes(b"")
    iteration, (first, second) = resume(run)
    assert iteration == 1
    assert "model_0000005.pth is missing; model_0000001.pth is used instead" in first
    assert "model_0000003.pth is empty; model_0000001.pth is used instead" in second


HOSTILE = [
    "../secret.pth",
    "/etc/passwd",
    "sub/model.pth",
    "..",
    "",
    ".",
    "a\nb",
    "a" * 300,
    "h://x",
]


@pytest.mark.parametrize("note", HOSTILE)
def test_a_note_of_no_file_of_the_folder_leads_nowhere(note, tmp_path):
    save(tmp_path, 7, name="secret")
    save(tmp_path / "run", 1, 3)
    (tmp_path / "run" / "last_checkpoint").write_text(note)
    iteration, (line,) = resume(tmp_path / "run")
    assert iteration == 3 and "last_checkpoint names" in line
    for file in (tmp_path / "run").glob("model_0*"):
        file.unlink()
    with pytest.raises(WeightsError, match=r"no intact checkpoint.*last_checkpoint names"):
        resume(tmp_path / "run")


def test_without_a_note_the_newest_is_taken(run):
    (run / "last_checkpoint").unlink()
    iteration, (line,) = resume(run)
    assert iteration == 5 and "last_checkpoint is missing; model_0000005.pth" in line
    (run / "last_checkpoint").mkdir()
    iteration, (line,) = resume(run)
    assert iteration == 5 and "last_checkpoint cannot be read" in line


def test_the_final_checkpoint_counts_by_its_iteration(run):
    """One run ended at 4 and was prolonged; another has ended at 7."""
    save(run, 4, name="model_final")
    (run / "last_checkpoint").write_text("model_0000005.pth")
    (run / "model_0000005.pth").write_bytes(b"")
    assert resume(run)[0] == 4
    save(run, 7, name="model_final")
    assert resume(run) == (7, [])
    (run / "last_checkpoint").write_text("model_0000005.pth")
    assert resume(run)[0] == 3, "the final one is newer than the one noted"
    (run / "last_checkpoint").unlink()
    assert resume(run)[0] == 7
    (run / "last_checkpoint").write_text("model_final.pth")
    (run / "model_final.pth").write_bytes(b"PK")
    assert resume(run)[0] == 3


def test_where_nothing_is_whole_it_says_so(run):
    for file in run.glob("model_0*"):
        os.truncate(file, 300)
    with pytest.raises(WeightsError) as caught:
        resume(run)
    message = str(caught.value)
    for name in ("model_0000005.pth is damaged", "model_0000003.pth", "model_0000001.pth"):
        assert name in message
    assert "--overwrite" in message and "\n" not in message
    for file in run.glob("model_0*"):
        file.unlink()
    with pytest.raises(WeightsError, match=r"model_0000005\.pth is missing"):
        resume(run)


def test_the_best_weights_are_nothing_to_resume_from(tmp_path):
    save(tmp_path)
    checkpointer = GHMCheckpointer(nn.Linear(1000, 1), tmp_path)
    assert (tmp_path / "model_best.pth").is_file()
    assert not checkpointer.has_checkpoint() and checkpointer.get_checkpoint_file() == ""
    absent = GHMCheckpointer(nn.Linear(1000, 1), tmp_path / "absent")
    assert not absent.has_checkpoint() and absent.get_checkpoint_file() == ""
