"""Tables and records: what a person reads is what was measured."""

from pathlib import Path

import pytest

from ghm_d2.errors import DataError
from ghm_d2.records import RunRecord, SetFigures, Trial
from ghm_d2.reports.page.document import markdown_table
from ghm_d2.reports.runs import SeedRun, SideRuns
from ghm_d2.reports.statistics.learning_speed import speed_table
from ghm_d2.reports.study import find_records
from ghm_d2.reports.tables import (
    RUN_HEADERS,
    objects_note,
    run_results,
    runs_table,
    search_table,
    terminal_table,
)
from ghm_d2.run_folder import METRICS_FILE


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
    header, rule, row = markdown_table(runs_table({"runs/a": record()})).splitlines()
    assert header.startswith("| Method | Network | AP | AP50 | AP75 | AP_S | AP_M | AP_L |")
    assert rule.count("---") == len(RUN_HEADERS)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:8] == ["41.3", "70.0", "40.0", "-", "1.0", "2.0"]
    assert cells[8:] == ["cells", "5", "300", "1.5", "runs/a"]


def test_masks_have_a_row_of_their_own():
    masks = {"AP": 30.04, "AP50": 60.0, "AP75": None, "APs": None, "APm": 1.0, "APl": 2.0}
    run = record(method="Mask R-CNN CE + SL1", mask_metrics=masks)
    columns = [[*column.cells] for column in terminal_table(run_results(run)).columns]
    assert columns[0] == ["Mask R-CNN CE + SL1 (boxes)", "Mask R-CNN CE + SL1 (masks)"]
    assert columns[2:5] == [["41.3", "30.0"], ["70.0", "60.0"], ["40.0", "-"]]
    _, _, boxes, of_masks, last = markdown_table(runs_table({"a": run, "b": record()})).splitlines()
    assert "(boxes)" in boxes and "41.3" in boxes
    assert "(masks)" in of_masks and "30.0" in of_masks and "41.3" not in of_masks
    assert "(boxes)" not in last
    assert len(run_results(record()).rows) == 1


def test_says_of_how_many_objects_the_figures_by_size_are():
    assert objects_note(record()) == ""
    counts = {"APs": 0, "APm": 2100, "APl": 50}
    note = "Annotated objects: 0 small (AP_S), 2,100 medium (AP_M), 50 large (AP_L)."
    assert objects_note(record(objects=counts)) == note
    other = SetFigures("more", {"AP": 1.0}, objects=counts | {"APl": 1})
    said = objects_note(record(objects=counts, other_sets=[other]))
    assert "in more: 0 small (AP_S), 2,100 medium (AP_M), 1 large (AP_L)." in said
    assert said.endswith("An AP of fewer than 50 objects says little.")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no run\.json"):
        find_records(tmp_path)


def test_each_data_set_has_a_row_and_lvis_has_columns_of_its_own():
    lvis = {"AP": 20.0, "APr": 5.0, "APc": None, "APf": 30.0}
    others = [SetFigures("lvis_v1_val", lvis, {}, {"AP": 18.0, "APf": 28.0})]
    one = RunRecord("m", "n", "d", "h", 1, metrics={"AP": 40.0})
    several = RunRecord(
        "m", "n", "d", "h", 1, metrics={"AP": 40.0}, evaluated_on="first", other_sets=others
    )
    assert [row[0] for row in run_results(one).rows] == ["m"]
    table = run_results(several)
    assert table.headers[-3:] == ("AP_r", "AP_c", "AP_f")
    named = {row[0]: (row[2], *row[-3:]) for row in table.rows}
    assert named == {
        "m, first": ("40.0", "-", "-", "-"),
        "m, lvis_v1_val (boxes)": ("20.0", "5.0", "-", "30.0"),
        "m, lvis_v1_val (masks)": ("18.0", "-", "-", "28.0"),
    }
    table = runs_table({"a": one, "b": several})
    assert len(table.rows) == 4 and {len(row) for row in table.rows} == {len(table.headers)}


def test_trials_of_a_search_are_averaged_by_setting_and_data_set():
    rate = ["SOLVER.BASE_LR", "0.5"]
    trials = [
        Trial("a", [], 30.0, False, "cells", 0, 150),
        Trial("a", rate, 40.0, True, "cells", 0, 150),
        Trial("a", rate, 50.0, True, "cells", 0, 300),
        Trial("a", rate, None, True, "cells", 9, 300),
        Trial("a", rate, None, True, "nuclei", 0, 300),
    ]
    table = search_table(trials)
    assert table.headers[3:] == (
        "Iterations",
        "Seeds",
        "AP, trials on cells",
        "AP, trials on nuclei",
    )
    assert table.rows == [
        ("a", "as configured", "", "150", "1", "30.0", "-"),
        ("a", "SOLVER.BASE_LR 0.5", "chosen", "150", "1", "40.0", "-"),
        ("a", "SOLVER.BASE_LR 0.5", "chosen", "300", "2", "25.0", "-"),
    ]


def test_how_fast_a_side_learns():
    """By AP at evaluations after 100 and 200 of 200 iterations."""

    def side(name, *curves, diverged=0):
        once = {METRICS_FILE: [{"iteration": 99, "bbox/AP": 45}]}
        runs = [SeedRun(9, Path(name), record(status="diverged"), once)] * diverged
        for seed, curve in enumerate(curves):
            steps = zip((99, 200), curve, strict=True)
            rows = [{"iteration": i, "bbox/AP": ap} for i, ap in steps]
            kept = {METRICS_FILE: rows}
            own = record(status="finished", iterations=200, metrics={"AP": curve[-1]})
            runs.append(SeedRun(seed, Path(name), own, kept))
        return SideRuns(name, "", [], runs)

    table = speed_table([side("fast", (40, 50), (44, 50)), side("slow", (10, 30), (20, 42))])
    assert table.headers[1:3] == ("80 % of its own", "90 % of its own")
    assert table.headers[3:] == ("80 % of the best", "90 % of the best")
    cells = {row[0]: [cell.split(" ±")[0] for cell in row[1:]] for row in table.rows}
    # seed 0: 40 at 100, 45 half way to 50; seed 1: 40 at 100 x 40 / 44, 45 a sixth of the way
    assert cells["fast"] == ["95", "133", "95", "133"]
    # its own: 24 at 170 and 33.6 at 162, 27 at 185 and 37.8 at 181
    assert cells["slow"] == ["166", "183", "reached by 1 of 2", "reached by 0 of 2"]
    # neither a diverged run nor one that learns nothing is fast
    (row,) = speed_table([side("bad", (0, 0), (40, 50), diverged=1)]).rows
    assert row[1:] == ("reached by 1 of 3",) * 4
