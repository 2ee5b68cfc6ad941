"""Tables and records: what a person reads is what was measured."""

import json

import pytest

from ghm_d2.errors import DataError
from ghm_d2.files import write_json
from ghm_d2.records import RunRecord
from ghm_d2.reports.study import find_records
from ghm_d2.reports.tables import RUN_HEADERS, results_table, runs_markdown


def record(**changes) -> RunRecord:
    known = {
        "method": "RetinaNet GHM-C + GHM-R",
        "network": "ResNet-50-FPN",
        "dataset": "cells",
        "config_hash": "abc",
        "seed": 5,
        "iterations": 300,
        "train_seconds": 90.0,
        "metrics": {"AP": 41.26, "AP50": 70.0, "AP75": 40.0, "APs": None, "APm": 1.0, "APl": 2.0},
    }
    return RunRecord(**known | changes)


def test_markdown_has_the_published_columns_first():
    header, rule, row = runs_markdown({"runs/a": record()}).splitlines()
    assert header.startswith("| Method | Network | AP | AP50 | AP75 | AP_S | AP_M | AP_L |")
    assert rule.count("---") == len(RUN_HEADERS)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:8] == ["41.3", "70.0", "40.0", "-", "1.0", "2.0"]
    assert cells[8:] == ["cells", "5", "300", "1.5", "runs/a"]


def test_masks_have_a_row_of_their_own():
    masks = {"AP": 30.04, "AP50": 60.0, "AP75": None, "APs": None, "APm": 1.0, "APl": 2.0}
    run = record(method="Mask R-CNN CE + SL1", mask_metrics=masks)
    columns = [[*column.cells] for column in results_table(run).columns]
    assert columns[0] == ["Mask R-CNN CE + SL1 (boxes)", "Mask R-CNN CE + SL1 (masks)"]
    assert columns[2:5] == [["41.3", "30.0"], ["70.0", "60.0"], ["40.0", "-"]]
    _, _, boxes, of_masks, last = runs_markdown({"a": run, "b": record()}).splitlines()
    assert "(boxes)" in boxes and "41.3" in boxes
    assert "(masks)" in of_masks and "30.0" in of_masks and "41.3" not in of_masks
    assert "(boxes)" not in last
    assert len(results_table(record()).rows) == 1


def test_records_survive_the_disk(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        record(method=name).write(tmp_path / name)
    found = find_records(tmp_path)
    assert list(found) == ["a", "b"]
    assert found["a"] == record(method="a")


@pytest.mark.parametrize("text", ["", "[]", '{"method": 1}', '{"unknown": 2}'])
def test_what_is_no_record_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DataError, match=r"run\.json"):
        find_records(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no run\.json"):
        find_records(tmp_path)


def test_json_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "run.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError):
        write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["run.json"]
