"""The table of AP by class: who is rare, and how each side does there."""

from pathlib import Path

from ghm_d2.records import RunRecord
from ghm_d2.reports.classes import classes_table
from ghm_d2.reports.page.document import Best
from ghm_d2.reports.runs import SeedRun, SideRuns


def side(name, aps, objects, status="finished"):
    """A side of one run a seed, with AP by class and the training annotations by class."""
    runs = []
    for seed, per_class in enumerate(aps, 1):
        known = {"method": name, "network": "n", "dataset": "d", "config_hash": "h", "seed": seed}
        figures = {"per_class": per_class, "train_objects": objects, "status": status}
        runs.append(SeedRun(seed, Path(), RunRecord(**known, **figures)))
    return SideRuns(name, "", [], runs)


CELLS = {"RBC": 2500, "WBC": 200, "Platelets": 180}


def test_the_rarest_class_comes_first_and_the_best_mean_is_bold():
    focal = [{"RBC": 50.0, "WBC": 70.0, "Platelets": 30.0}, {"RBC": 52, "WBC": 72, "Platelets": 30}]
    ghm = [{"RBC": 49.0, "WBC": 70.0, "Platelets": 41.0}, {"RBC": 49, "WBC": 71, "Platelets": 41}]
    table = classes_table([side("focal", focal, CELLS), side("GHM", ghm, CELLS)])
    assert table.headers == ("AP of", "Platelets (180)", "WBC (200)", "RBC (2,500)")
    assert [row[0] for row in table.rows] == ["focal", "GHM"]
    assert [row[1] for row in table.rows] == ["30.0 ± 0.0", "41.0 ± 0.0"]
    bold = [[isinstance(cell, Best) for cell in row[1:]] for row in table.rows]
    assert bold == [[False, True, True], [True, False, False]]


def test_many_classes_are_thirds_rare_common_and_frequent():
    objects = {f"c{i}": 10 * (i + 1) for i in range(10)}
    aps = {f"c{i}": float(i) for i in range(10)} | {"c1": None}
    table = classes_table([side("CE", [aps], objects)])
    names = ("3 rare classes (60)", "4 common classes (220)", "3 frequent classes (270)")
    assert table.headers == ("AP of", *names)
    assert table.rows == [("CE", "1.0", "4.5", "8.0")]  # 0 and 2; 3 to 6; 7 to 9


def test_without_counts_or_with_one_class_there_is_no_table():
    assert not classes_table([side("CE", [{"cell": 3.0}], {"cell": 9})]).rows
    assert not classes_table([side("CE", [{"a": 3.0, "b": 4.0}], {})]).rows


def test_a_diverged_run_counts_as_0():
    good = side("CE", [{"a": 30.0, "b": 40.0}], {"a": 5, "b": 9})
    bad = side("CE", [{}], {}, status="diverged").runs
    table = classes_table([SideRuns("CE", "", [], good.runs + bad)])
    assert table.rows[0][1].startswith("15.0")


def test_a_diverged_run_gives_no_ap_to_a_class_without_test_boxes():
    objects = {"a": 5, "b": 9}
    good = side("CE", [{"a": None, "b": 40.0}], objects)
    bad = side("CE", [{}], objects, status="diverged").runs
    assert classes_table([SideRuns("CE", "", [], good.runs + bad)]).rows[0][1] == "-"
    assert classes_table([SideRuns("CE", "", [], bad)]).rows[0][1:] == ("0.0", "0.0")
