"""`ghm report`, as a user runs it."""

import json

from made_comparison import FOCAL, GHM, PAIRS, build, write_run

from ghm_d2.records import Comparison

AP = {FOCAL: (47.0, 49.0), GHM: (48.0, 50.1)}


def test_a_comparison_is_written_and_told(ghm, tmp_path):
    folder = build(tmp_path, AP, PAIRS[1:2], analysis=False)
    run = ghm("report", folder, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "48.0 ±" in run.stdout and "What GHM changes within each family" in run.stdout
    assert "report.html" in run.stdout.splitlines()[-1]
    assert (folder / "report.html").is_file() and (folder / "runs.csv").is_file()


def test_json_of_a_comparison_is_its_numbers_and_files(ghm, tmp_path):
    folder = build(tmp_path, AP, PAIRS[1:2], analysis=False)
    run = ghm("report", folder, "--json", "--output", "out", cwd=tmp_path)
    found = json.loads(run.stdout)
    assert found["rows"][1]["AP"]["mean"] == 49.05
    assert found["pairs"][0]["verdict"] == "higher" and 0 < found["pairs"][0]["p"] < 0.05
    assert all((tmp_path / file).is_file() for file in found["files"])
    assert (tmp_path / "out" / "report.md").is_file()
    assert not (folder / "report.md").exists()


def test_markdown_prints_the_tables_and_writes_nothing(ghm, tmp_path):
    folder = build(tmp_path, AP, PAIRS[1:2], analysis=False)
    before = sorted(tmp_path.rglob("*"))
    run = ghm("report", folder, "--markdown")
    results, differences = run.stdout.split("\n\n")
    assert results.startswith("| Method | Network | AP |") and results.count("\n") == 3
    assert differences.startswith("| Pair | Question | AP is |")
    assert sorted(tmp_path.rglob("*")) == before
    assert ghm("report", folder, "--markdown", "--json").returncode == 2


def test_several_comparisons_make_one_table_each_of_ap_and_of_differences(ghm, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        folder = build(tmp_path / name, AP, PAIRS[1:2], analysis=False)
    unsearched = Comparison.read(folder)
    unsearched.search = []
    unsearched.write(folder)
    run = ghm("report", tmp_path, "--markdown")
    assert run.returncode == 0, run.stderr
    by_data, differences = run.stdout.split("\n\n")
    assert by_data.startswith(f"| AP on | {FOCAL} | {GHM} |") and by_data.count("\n") == 3
    header, _, *rows = differences.splitlines()
    assert header.startswith("| Comparison | Side | Against | AP is | AP |")
    assert ["settings searched" in row for row in rows] == [True, False]
    assert len(rows) == 2 and all(f"| {GHM} | {FOCAL} |" in row for row in rows)
    assert all("49.0 ± 13.3" in row and "48.0 ± 12.7" in row for row in rows)
    assert not list(tmp_path.rglob("report.*"))
    run = ghm("report", tmp_path)
    assert run.returncode == 0, run.stderr
    assert len(list(tmp_path.rglob("report.html"))) == 2
    assert (tmp_path / "differences.png").read_bytes()[1:4] == b"PNG"
    assert ghm("report", tmp_path, "--output", tmp_path / "c").returncode == 2


def test_plain_runs(ghm, tmp_path):
    write_run(tmp_path / "runs/a", 0, FOCAL, 1, 47.0)
    write_run(tmp_path / "runs/b", 1, GHM, 1, 48.0)
    records = json.loads(ghm("report", "runs", "--json", cwd=tmp_path).stdout)
    assert [record["method"] for record in records] == [FOCAL, GHM]
    assert not (tmp_path / "runs/report").exists()
    run = ghm("report", "runs", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "one seed: no claim" in run.stdout
    assert (tmp_path / "runs/report/report.html").is_file()


def test_a_folder_without_runs_is_named(ghm, tmp_path):
    for words in ([], ["--markdown"], ["--json"]):
        run = ghm("report", tmp_path, *words)
        assert run.returncode == 3
        assert "no run.json" in run.stderr
