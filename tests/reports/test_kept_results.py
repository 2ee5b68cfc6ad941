"""Reports of results that are kept without the folders of their runs: runs.jsonl, figures.jsonl."""

import json
import shutil

import pytest
from made_comparison import AP, FOCAL, GHM, PAIRS, write_run

from ghm_d2.errors import DataError
from ghm_d2.records import Comparison
from ghm_d2.reports.page.write import write_report
from ghm_d2.reports.report import read_report
from ghm_d2.reports.study import find_records


def keep(root, folder) -> None:
    """Moves what runs have left into runs.jsonl in `root` and figures.jsonl in `folder`."""
    rows, figures = [], []
    for file in sorted(root.rglob("run.json")):
        run = file.parent
        record = json.loads(file.read_text())
        rows.append({"key": run.name, "folder": str(run.relative_to(root)), "record": record})
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        figures.append({"folder": f"../runs/{run.name}", "metrics.jsonl": lines})
        if (run / "analysis.json").is_file():
            figures[-1]["analysis.json"] = json.loads((run / "analysis.json").read_text())
        shutil.rmtree(run)
    (root / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "figures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in figures))


@pytest.fixture
def small(comparison):
    return comparison({name: AP[name] for name in (FOCAL, GHM)}, PAIRS[1:2])


def test_a_kept_comparison_has_the_same_numbers_and_figures(small, tmp_path):
    before = write_report(small, tmp_path / "before")
    keep(tmp_path, small)
    after = write_report(small, tmp_path / "after")
    assert after.markdown == before.markdown and after.answer == before.answer
    for name in ("learning.png", "confusion.png", "precision_recall.png", "runs.csv"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_a_run_that_is_done_again_counts_before_what_was_kept(small, tmp_path):
    keep(tmp_path, small)
    write_run(small / "../runs/1_1", 1, GHM, 1, 0.0)
    rows = {row.side.name: row.ap["AP"] for row in read_report(small).rows}
    assert rows[GHM].mean == pytest.approx((0 + AP[GHM][1] + AP[GHM][2]) / 3)


def test_runs_without_folders_are_listed(tmp_path):
    for name in ("stability/b", "stability/a", "other/c"):
        write_run(tmp_path / name, 0, FOCAL, 1, 47.0)
    keep(tmp_path, tmp_path)
    assert list(find_records(tmp_path)) == ["other/c", "stability/a", "stability/b"]
    assert list(find_records(tmp_path / "stability")) == ["a", "b"]
    with pytest.raises(DataError, match=r"no run\.json"):
        find_records(tmp_path / "stabilit")


def test_rows_of_another_form_are_passed_over(small, tmp_path):
    keep(tmp_path, small)
    for file in (tmp_path / "runs.jsonl", small / "figures.jsonl"):
        with file.open("a") as lines:
            lines.write("\n".join(['{"folder": 7}', "7", "{" * 5000, "[" * 99_999, '"x', "{}", ""]))
    assert "6 of 6 runs finished" in (write_report(small).files[1]).read_text()


def test_a_kept_record_of_another_form_is_named(small, tmp_path):
    keep(tmp_path, small)
    name = Comparison.read(small).sides[0].runs[0].removeprefix("../")
    with (tmp_path / "runs.jsonl").open("a") as lines:
        lines.write(json.dumps({"key": "", "folder": name, "record": {"method": 1}}) + "\n")
    with pytest.raises(DataError, match=rf"runs\.jsonl: {name}: not a valid run record"):
        read_report(small)


def test_an_older_table_names_the_folders_in_runs_alone(tmp_path):
    write_run(tmp_path / "runs" / "focal-s1-0f09", 0, FOCAL, 1, 47.0)
    record = json.loads((tmp_path / "runs/focal-s1-0f09/run.json").read_text())
    shutil.rmtree(tmp_path / "runs")
    row = {"key": "0f09", "folder": "focal-s1-0f09", "record": record}
    (tmp_path / "runs.jsonl").write_text(json.dumps(row) + "\n")
    assert list(find_records(tmp_path)) == ["runs/focal-s1-0f09"]


def test_kept_figures_are_not_those_of_a_run_whose_folder_is_there(tmp_path):
    write_run(tmp_path / "a", 0, FOCAL, 1, 47.0)
    (tmp_path / "a/metrics.jsonl").unlink()
    row = {"folder": "a", "metrics.jsonl": [{"iteration": 1, "loss_cls": 0.5}]}
    (tmp_path / "figures.jsonl").write_text(json.dumps(row) + "\n")
    assert read_report(tmp_path).study.sides[0].runs[0].metrics == []
