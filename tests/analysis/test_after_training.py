"""The analysis of a finished run: what it leaves, and what it is expected to take."""

import json

import pytest
import torch

from ghm_d2.analysis.after_training import analyse_run, expected_analysis_seconds
from ghm_d2.describe import describe_run
from ghm_d2.errors import WeightsError
from ghm_d2.progress import Progress
from ghm_d2.records import RunRecord
from ghm_d2.run_folder import ANALYSIS_FILE, FINAL_WEIGHTS, WORST_FILE


@pytest.fixture
def finished(detector, digits_folder, tmp_path):
    """Return (cfg, record) of a run in a folder that holds its record and its weights."""
    cfg, model = detector("retinanet_ghm", digits_folder, "OUTPUT_DIR", str(tmp_path))
    record = describe_run(cfg, model, "digits")
    record.iterations, record.train_seconds, record.ms_per_image = 100, 200.0, 500.0
    record.write(tmp_path)
    torch.save({"model": model.state_dict()}, tmp_path / FINAL_WEIGHTS)
    return cfg, record


def test_the_folder_gets_the_figures_and_the_record_the_costs(finished, tmp_path):
    cfg, record = finished
    analyse_run(cfg, record, Progress())
    assert "gradient_norms" in json.loads((tmp_path / ANALYSIS_FILE).read_text())
    assert (tmp_path / WORST_FILE).is_file()
    on_disk = RunRecord.read(tmp_path)
    assert on_disk == record and on_disk.gflops > 0 and on_disk.loss_ms > 0


def test_a_failure_leaves_the_record(finished, tmp_path):
    cfg, record = finished
    (tmp_path / FINAL_WEIGHTS).unlink()
    with pytest.raises(WeightsError):
        analyse_run(cfg, record, Progress())
    assert RunRecord.read(tmp_path).train_seconds == 200


def test_an_expectation_follows_the_speed_of_the_training(finished):
    cfg, record = finished
    one = expected_analysis_seconds(cfg, record, evaluated=True)
    assert one >= 6  # six images are three steps of two seconds
    assert expected_analysis_seconds(cfg, record, evaluated=False) == pytest.approx(
        one + 1.5, abs=0.5
    )
    record.world_size = 4  # its steps took a quarter of what one process would need
    assert expected_analysis_seconds(cfg, record, evaluated=True) > 2 * one
