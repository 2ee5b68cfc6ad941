"""The files that a training writes while it runs."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage

from ghm_d2.errors import OutputError
from ghm_d2.losses import GHMC, GHMR
from ghm_d2.training.metrics.second_half import weight_variation
from ghm_d2.training.metrics.writers import DensityLog, EventsWriter


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
        with pytest.raises(OutputError, match="run cannot be written: its folder does not exist"):
            writer.write()
            writer.close()


def test_the_log_of_densities_has_the_prior_count_and_mu_that_follow_the_data(tmp_path):
    losses = {"ghm_c": GHMC.robust(prior=3.0), "ghm_r": GHMR.robust(prior=0.5), "published": GHMR()}
    losses["ghm_c"](torch.randn(90, 4), torch.arange(90) % 9)  # 40 of 90 rows have a class
    boxes = torch.arange(1.0, 102)[:, None].expand(-1, 4), torch.zeros(101, 4)
    losses["ghm_r"](*boxes), losses["published"](*boxes)
    log = DensityLog(tmp_path / "density.jsonl", torch.nn.ModuleDict(losses), period=1)
    log.trainer = SimpleNamespace(iter=7)
    log.before_step()
    log.after_step()
    lines = (tmp_path / "density.jsonl").read_text().splitlines()
    ghm_c, ghm_r, published = map(json.loads, lines)
    assert ghm_c["iteration"] == 7 and ghm_c["density"] == "ghm_c.density"
    assert len(ghm_c["ema"][0]) == 30 and "mu" not in ghm_c
    assert ghm_c["prior_count"] == pytest.approx(3 * 40)
    assert ghm_r["prior_count"] == pytest.approx(0.5 * 404)
    assert ghm_r["mu"] == pytest.approx(51, rel=0.05)
    assert published.keys() == {"iteration", "density", "ema"}


@pytest.mark.parametrize("classes", [2, 12])
def test_the_log_and_the_steadiness_of_weights_tell_classes_apart(tmp_path, classes):
    """Two classes whose numbers vary against each other: together they hardly vary."""
    loss = GHMC.robust(num_classes=classes, momentum=0.0)
    log = DensityLog(tmp_path / "density.jsonl", torch.nn.ModuleDict({"ghm_c": loss}), period=1)
    for step in range(4):
        log.trainer = SimpleNamespace(iter=step)
        log.before_step()
        labels = torch.full((400,), classes)
        labels[: 5 + 90 * (step % 2)], labels[100 : 195 - 90 * (step % 2)] = 0, 1
        loss(torch.randn(400, classes, generator=torch.Generator().manual_seed(0)), labels)
        log.after_step()
    rows = [json.loads(line) for line in (tmp_path / "density.jsonl").read_text().splitlines()]
    assert {len(row["ema"]) for row in rows} == {1}, "classes together"
    for key in ("weights", "counts"):
        assert {len(row[key]) for row in rows} == {min(classes, 10)}
    of_class = [row["weights"][0][15] for row in rows]
    assert max(of_class) > 1.2 * min(of_class)
    if classes == 2:
        assert weight_variation(tmp_path, 4)["ghm_c"] > 0.05
