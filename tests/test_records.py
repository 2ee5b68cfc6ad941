"""The runs table: several writers, and what a killed one leaves."""

import json
import subprocess
import sys

import pytest

from ghm_d2.errors import DataError, OutputError
from ghm_d2.records import ComparedSide, Comparison, Pair, RunRecord, RunsTable, SetFigures, Trial

WRITER = """
import sys
from ghm_d2.records import RunsTable
table = RunsTable(sys.argv[1])
for i in range(200):
    table.append({"key": f"{sys.argv[2]}-{i}", "folder": "f", "record": {"text": "x" * 5000}})
"""


def row(key: str, **record) -> dict:
    return {"key": key, "folder": key, "record": record}


def test_two_processes_lose_nothing(tmp_path):
    file = tmp_path / "runs.jsonl"
    command = [sys.executable, "-c", WRITER, str(file)]
    writers = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert len(file.read_text().splitlines()) == 400
    keys = [r["key"] for r in RunsTable(file).rows()]
    assert sorted(keys) == sorted(f"{name}-{i}" for name in "ab" for i in range(200))


def test_what_a_killed_writer_left_costs_no_other_row(tmp_path):
    table = RunsTable(tmp_path / "runs.jsonl")
    table.append(row("a"))
    with open(table.file, "ab") as file:
        file.write(json.dumps(row("cut")).encode()[:20])
    assert [r["key"] for r in table.rows()] == ["a"]
    table.append(row("b"))
    assert [r["key"] for r in table.rows()] == ["a", "b"]


@pytest.mark.parametrize("line", ["[]", "7", '{"key": "x"}', "null", "\xff", '"key"'])
def test_a_line_that_is_no_row_is_passed_over(tmp_path, line):
    table = RunsTable(tmp_path / "runs.jsonl")
    table.file.write_bytes(line.encode("latin-1") + b"\n")
    table.append(row("a"))
    assert [r["key"] for r in table.rows()] == ["a"]


def test_the_last_row_of_a_run_counts(tmp_path):
    table = RunsTable(tmp_path / "new" / "runs.jsonl")
    assert table.rows() == [] and table.latest("a") is None
    table.append(row("a", status="failed"))
    table.append(row("b", status="failed"))
    table.append(row("a", status="finished"))
    assert table.latest("a")["record"]["status"] == "finished"
    assert table.latest("c") is None


def test_a_row_that_json_does_not_know_is_refused(tmp_path):
    table = RunsTable(tmp_path / "runs.jsonl")
    with pytest.raises(ValueError):
        table.append(row("a", AP=float("nan")))
    assert table.rows() == []


APPENDS_UNDER_A_LIMIT = """
import resource, sys
from ghm_d2.errors import OutputError
from ghm_d2.records import RunsTable
table = RunsTable(sys.argv[1])
rows = [{"key": key, "folder": "f", "record": {"text": "x" * 5000}} for key in "abc"]
table.append(rows[0])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (7000, most))
try:
    table.append(rows[1])
except OutputError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
table.append(rows[2])
"""


def test_a_full_disk_costs_the_new_row_alone(tmp_path):
    """A limit on the size of files stands for the disk."""
    file = tmp_path / "runs.jsonl"
    command = [sys.executable, "-c", APPENDS_UNDER_A_LIMIT, str(file)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert f"{file} cannot be written: it would exceed" in done.stdout
    assert [r["key"] for r in RunsTable(file).rows()] == ["a", "c"]


def test_a_table_that_cannot_be_written_is_an_error_of_the_output(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        RunsTable(tmp_path / "file" / "runs.jsonl").append(row("a"))


def test_a_record_of_before_runs_counted_faults_is_read(tmp_path):
    record = RunRecord("m", "n", "d", "h", 1, skipped_steps=2, bad_images=3, world_size=4)
    record.write(tmp_path)
    assert RunRecord.read(tmp_path) == record
    old = json.loads((tmp_path / "run.json").read_text())
    for key in ("skipped_steps", "bad_images", "world_size"):
        del old[key]
    (tmp_path / "run.json").write_text(json.dumps(old))
    assert RunRecord.read(tmp_path) == RunRecord("m", "n", "d", "h", 1)


def test_a_record_of_before_there_were_masks_is_read(tmp_path):
    RunRecord("m", "n", "d", "h", 1, metrics={"AP": 1.0}).write(tmp_path)
    old = json.loads((tmp_path / "run.json").read_text())
    assert old.pop("mask_metrics") == {}
    (tmp_path / "run.json").write_text(json.dumps(old))
    assert RunRecord.read(tmp_path).mask_metrics == {}
    assert RunRecord.read(tmp_path).metrics == {"AP": 1.0}


def test_a_record_of_before_there_were_several_test_sets_is_read(tmp_path):
    others = [SetFigures("data/test", {"AP": 2.0, "APr": None}, {"cat": 2.0})]
    record = RunRecord("m", "n", "d", "h", 1, evaluated_on="data/val", other_sets=others)
    record.write(tmp_path)
    assert RunRecord.read(tmp_path) == record
    old = json.loads((tmp_path / "run.json").read_text())
    del old["evaluated_on"], old["other_sets"]
    (tmp_path / "run.json").write_text(json.dumps(old))
    assert RunRecord.read(tmp_path) == RunRecord("m", "n", "d", "h", 1)


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": None},
        {"mask_metrics": {"AP": "high"}},
        {"metrics": {"AP": "high"}},
        {"metrics": {"AP": float("nan")}},
        {"method": 3},
        {"iterations": None},
        {"s_per_iter": "fast"},
        {"packages": {"torch": 2}},
        {"unknown": 1},
        {"seed": 10**16},
        {"metrics": {"AP": 1e308}},
        {"metrics": {"AP": 10**400}},
    ],
)
def test_what_is_no_record_is_refused_by_name(tmp_path, change):
    RunRecord("m", "n", "d", "h", 1, metrics={"AP": 1, "AP50": None}).write(tmp_path)
    assert RunRecord.read(tmp_path).metrics == {"AP": 1, "AP50": None}
    record = json.loads((tmp_path / "run.json").read_text()) | change
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"run\.json"):
        RunRecord.read(tmp_path)


def test_whole_numbers_stay_whole_and_the_file_is_for_people_too(tmp_path):
    RunRecord("m", "n", "d", "h", 1, best={"AP": 2.5, "iteration": 300}).write(tmp_path)
    text = (tmp_path / "run.json").read_text()
    assert text.startswith('{\n  "method": "m",\n') and text.endswith("}\n")
    RunRecord.read(tmp_path).write(tmp_path)
    assert (tmp_path / "run.json").read_text() == text


def test_a_comparison_comes_back_as_it_was_written(tmp_path):
    comparison = Comparison(
        name="losses",
        question="which?",
        dataset="d",
        budget="quick",
        seeds=[1, 2],
        sides=[ComparedSide("a", "a.yaml", ["SEED", "1"], ["../runs/x"])],
        pairs=[Pair("a", "b", "a against b")],
        command="ghm compare losses",
        search=[Trial("a", ["SOLVER.BASE_LR", "1"], None, True)],
    )
    comparison.write(tmp_path)
    assert Comparison.read(tmp_path) == comparison


GOOD = {
    "name": "n",
    "question": "q",
    "dataset": "d",
    "budget": "quick",
    "seeds": [1],
    "sides": [{"name": "a", "config": "c"}],
    "pairs": [],
}


def test_what_the_next_ones_spoil_is_a_comparison(tmp_path):
    (tmp_path / "comparison.json").write_text(json.dumps(GOOD))
    assert Comparison.read(tmp_path).sides == [ComparedSide("a", "c")]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "null"),
        *(
            json.dumps(GOOD | change)
            for change in (
                {"sides": 1},
                {"sides": [{"no": 1}]},
                {"sides": [{"name": "a", "config": "c", "runs": [5]}]},
                {"sides": [{"name": "a", "config": "c", "overrides": None}]},
                {"seeds": None},
                {"question": None},
                {"pairs": [{"side": "a", "reference": "a", "question": None}]},
                {"search": [{"side": "a", "overrides": [], "AP": "high"}]},
                {"unknown": 1},
                {"sides": [{"name": "a", "config": "c", "unknown": 1}]},
                {"pairs": [{"side": "a", "reference": "a", "question": "q", "unknown": 1}]},
                {"search": [{"side": "a", "overrides": [], "AP": 1, "unknown": 1}]},
            )
        ),
    ],
)
def test_what_is_no_comparison_is_refused_by_name(tmp_path, text):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(DataError, match=r"comparison\.json"):
        Comparison.read(tmp_path)
