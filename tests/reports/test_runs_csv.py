"""runs.csv, with a row a planned run; AP of masks there and in the results."""

import csv
import io

from made_comparison import FOCAL, GHM, GHM_R, NETWORK, SL1, write_run

from ghm_d2.records import AP_COLUMNS, RunRecord
from ghm_d2.reports.page.document import Best
from ghm_d2.reports.page.write import runs_csv
from ghm_d2.reports.report import read_report


def test_runs_csv_has_a_row_a_planned_run(comparison):
    folder = comparison({SL1: (50.0, None), "=cmd()": (52.0, 53.0)}, [], analysis=False)
    write_run(folder / "../runs/1_2", 1, "=cmd()", 2, 1.0, status="diverged", outcome="at 312")
    rows = list(csv.DictReader(io.StringIO(runs_csv(read_report(folder).study))))
    assert [(row["seed"], row["status"], row["outcome"]) for row in rows] == [
        ("1", "finished", ""),
        ("2", "not done", ""),
        ("1", "finished", ""),
        ("2", "diverged", "at 312"),
    ]
    assert (rows[0]["AP"], rows[0]["AP of WBC"], rows[1]["AP"]) == ("50.0", "50.0", "")
    assert set(AP_COLUMNS) | {"s_per_iter", "gflops", "loss_ms", "best AP"} <= set(rows[0])
    # a spreadsheet would run it
    assert rows[2]["side"] == rows[2]["method"] == "'=cmd()"


def test_a_metric_named_like_a_column_does_not_replace_it_in_runs_csv(comparison):
    folder = comparison({SL1: (50.0,)}, [], analysis=False)
    record = RunRecord.read(folder / "../runs/0_1")
    record.metrics |= {"side": 7, "seed": 7, "status": 7, "method": 7, "mask_AP": 7}
    record.mask_metrics = {"AP": 41.5}
    record.write(folder / "../runs/0_1")
    (row,) = csv.DictReader(io.StringIO(runs_csv(read_report(folder).study)))
    assert (row["side"], row["seed"], row["status"]) == (SL1, "1", "finished")
    assert (row["method"], row["AP"], row["mask_AP"]) == (record.method, "50.0", "41.5")


def with_masks(folder, side, values):
    """Gives runs of a side, one a value, an AP of masks."""
    for seed, value in enumerate(values, 1):
        run = folder / f"../runs/{side}_{seed}"
        record = RunRecord.read(run)
        record.mask_metrics = dict.fromkeys(AP_COLUMNS, value) | {"APs": None}
        record.write(run)


def test_masks_have_columns_of_their_own_in_runs_csv(comparison):
    folder = comparison({SL1: (50.0, None), FOCAL: (52.0, 53.0)}, [], analysis=False)
    assert "mask" not in runs_csv(read_report(folder).study)
    with_masks(folder, 0, [41.5])
    text = runs_csv(read_report(folder).study)
    assert "{" not in text and len({len(line) for line in csv.reader(io.StringIO(text))}) == 1
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [name for name in rows[0] if "mask" in name] == [f"mask_{c}" for c in AP_COLUMNS]
    cells = [(row["AP"], row["mask_AP"], row["mask_APs"], row["AP of WBC"]) for row in rows]
    assert cells[:2] == [("50.0", "41.5", "", "50.0"), ("", "", "", "")]
    assert cells[2:] == [("52.0", "", "", "52.0"), ("53.0", "", "", "53.0")]


def test_masks_have_a_row_of_their_own_in_the_results(comparison):
    folder = comparison(analysis=False)
    assert "(boxes)" not in read_report(folder).markdown
    with_masks(folder, 0, [41.0, 42.0, 43.0])
    with_masks(folder, 1, [40.0, 41.0])  # one run was of another version
    report = read_report(folder)
    rows = {row[0]: row[1:] for row in report.shown_tables[0].rows}
    names = [f"{SL1} (boxes)", f"{SL1} (masks)", f"{GHM_R} (boxes)", f"{GHM_R} (masks)"]
    assert list(rows) == [*names, FOCAL, GHM]
    assert rows[names[0]][1].startswith("50.5 ±") and rows[names[1]][1].startswith("42.0 ±")
    assert rows[names[1]][0] == NETWORK and rows[names[1]][-1] == "3 of 3"
    assert rows[names[1]][4] == "-" and rows[names[3]][1].endswith("(n = 2)")
    # the best of boxes among boxes, of masks among masks
    bold = {name for name, (_, ap, *_) in rows.items() if isinstance(ap, Best)}
    assert bold == {f"{GHM_R} (boxes)", f"{SL1} (masks)"}
    assert report.to_json()["rows"][0]["AP"]["mean"] == 50.5
