"""Where a step's time goes: each part is timed, and the training stays the same."""

import json

import pytest

from ghm_d2.progress import Progress
from ghm_d2.training.metrics.profiling import PARTS
from ghm_d2.training.prepare import prepare
from ghm_d2.training.train import train


class Said(Progress):
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


@pytest.mark.parametrize(
    "config", ["retinanet_ghm", pytest.param("faster_rcnn_ghm_r", marks=pytest.mark.slow)]
)
def test_each_part_of_a_step_is_timed(config, tiny, digits_folder, tmp_path):
    words = [*tiny, "SOLVER.MAX_ITER", "8", "TEST.EVAL_PERIOD", "0"]
    said, rows = Said(), []
    for name in ("profiled", "plain"):
        folder = tmp_path / name
        folder.mkdir()
        source, options = f"quick/{config}.yaml", {"seed": 1, "device": "cpu", "output": folder}
        cfg = prepare(source, words, dataset=digits_folder, **options)
        train(cfg, "digits", progress=said, profiled=name == "profiled")
        rows.append((folder / "metrics.jsonl").read_bytes())
    assert rows[0] == rows[1]
    found = json.loads((tmp_path / "profiled" / "profile.json").read_text())
    assert tuple(found["ms"]) == PARTS and all(ms > 0 for ms in found["ms"].values())
    assert found["steps"] == 3  # those after the warm-up
    events = json.loads((tmp_path / "profiled" / "trace.json").read_text())["traceEvents"]
    assert {f"ghm_d2 {name}" for name in PARTS} <= {event.get("name") for event in events}
    (line,) = [line for line in said.lines if line.startswith("a step takes")]
    assert "losses" in line and "trace.json" in line
    assert not (tmp_path / "plain" / "profile.json").exists()
