"""A save is whole or not there, and a run resumes from it as it was."""

import pytest
import torch
from torch import nn

from ghm_d2.engine.weights import GHMCheckpointer
from ghm_d2.errors import WeightsError
from ghm_d2.records import write_atomically


class Model(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, 2)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model, state):
    for key, value in model.state_dict().items():
        assert torch.equal(value, torch.as_tensor(state[key])), key


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


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_the_old_file(interruption, tmp_path, monkeypatch):
    model = Model()
    checkpointer = GHMCheckpointer(model, tmp_path)
    checkpointer.save("model_final", iteration=1)
    saved, files = state_of(model), sorted(tmp_path.iterdir())
    nn.init.ones_(model.head.weight)

    def half_a_save(data, file):
        file.write(b"PK half a file")
        raise interruption

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(interruption):
        checkpointer.save("model_final", iteration=2)
    assert sorted(tmp_path.iterdir()) == files
    assert checkpointer.resume_or_load("", resume=True) == {"iteration": 1}
    assert_same(model, saved)


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
    with pytest.raises(ValueError, match="no folder"):
        GHMCheckpointer(Model(), tmp_path).save("../model")


@pytest.mark.parametrize(
    "note",
    ["../secret.pth", "/etc/passwd", "sub/model.pth", "..", "", ".", "a\nb", "a" * 300, "http://x"],
)
def test_the_note_of_the_last_checkpoint_stays_in_its_folder(note, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"model": Model().state_dict()}, tmp_path / "secret.pth")
    (run / "last_checkpoint").write_text(note)
    checkpointer = GHMCheckpointer(Model(), run)
    with pytest.raises(WeightsError, match="last_checkpoint"):
        checkpointer.resume_or_load("", resume=True)


def test_a_noted_checkpoint_that_is_gone_is_named(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth\n")
    with pytest.raises(WeightsError, match=r"no weight file .*model_0000009\.pth"):
        GHMCheckpointer(Model(), tmp_path).resume_or_load("", resume=True)
