"""What a training writes as it goes."""

import threading

import pytest
from detectron2.utils.events import EventStorage

from ghm_d2.errors import OutputError
from ghm_d2.training.writers import EventsWriter


def test_events_that_cannot_be_written_are_an_output_error(tmp_path, monkeypatch):
    """TensorBoard writes in a thread, whose failure comes up when it is next waited for."""
    monkeypatch.setattr(threading, "excepthook", lambda failed: None)
    with EventStorage(0) as storage:
        storage.put_scalar("total_loss", 1.0)
        writer = EventsWriter(tmp_path / "run")
        writer.write()
        (tmp_path / "run").rename(tmp_path / "away")
        storage.step()
        storage.put_scalar("total_loss", 2.0)
        with pytest.raises(OutputError, match="run cannot be written: its folder is not there"):
            writer.write()
            writer.close()
