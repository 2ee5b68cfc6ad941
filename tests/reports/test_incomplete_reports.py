"""Reports of runs that are not done or lack files, and errors for files that cannot be trusted."""

import json

import pytest
from made_comparison import FOCAL, GHM, SMALL, SMALL_PAIRS, text_of

from ghm_d2.errors import DataError, UsageError
from ghm_d2.records import Comparison, Pair
from ghm_d2.reports.page.write import write_report
from ghm_d2.reports.report import read_report
from ghm_d2.reports.statistics.verdicts import NO_SEED


@pytest.mark.parametrize(
    ("ap", "told"),
    [
        (
            {FOCAL: (47.0, 49.0, None), GHM: (48.0, None, None)},
            ("3 of 6 runs finished", f"Not finished: {FOCAL}, seed 3: not done", "interim: 1 of 3"),
        ),
        (
            {FOCAL: (None, None), GHM: (None, None)},
            ("0 of 4 runs finished", "No learning curves", NO_SEED),
        ),
    ],
)
def test_a_comparison_that_is_not_done_is_reported_as_far_as_it_is(comparison, ap, told):
    report = write_report(comparison(ap, SMALL_PAIRS, analysis=False))
    text = text_of(report, "report.md")
    for words in (*told, "The same command again trains the missing runs."):
        assert words in text
    json.dumps(report.to_json(), allow_nan=False)


def test_what_no_analysis_has_is_left_out_in_one_line(comparison):
    report = write_report(comparison(SMALL, SMALL_PAIRS, analysis=False))
    assert {file.name for file in report.files[3:]} == {
        *("differences.png", "learning.png", "loss.png", "gradient_ratio.png"),
        *("density_ghm_c.png", "density_ghm_r.png"),
    }
    text = text_of(report, "report.md")
    assert "Not drawn, because no run's analysis.json has it: gradient norms" in text
    assert "No run has left pictures of its worst images." in text
    assert "## Annotation noise" not in text


def test_an_analysis_without_boxes_is_drawn_without_them(comparison):
    folder = comparison(SMALL, SMALL_PAIRS)
    for file in folder.parent.glob("runs/*/analysis.json"):
        found = json.loads(file.read_text())
        for name in ("gradient_norms", "effective_gradient", "gradient_share"):
            del found[name]["reg"]
        file.write_text(json.dumps(found))
    report = write_report(folder)
    names = {file.name for file in report.files}
    assert "gradient_norms_cls.png" in names and "gradient_norms_reg.png" not in names


def test_results_of_an_earlier_version_are_drawn_without_what_they_lack(comparison):
    folder = comparison(SMALL, SMALL_PAIRS)
    for file in folder.parent.glob("runs/*/analysis.json"):
        found = json.loads(file.read_text())
        del found["gradient_share"], found["effective_gradient"]["reg"]["mu_robust"]
        for part in found["effective_gradient"].values():
            for name in [name for name in part if "robust" in name]:
                del part[name]
        file.write_text(json.dumps(found))
    for file in folder.parent.glob("runs/*/run.json"):
        record = json.loads(file.read_text())
        del record["grad_ratio_cls_box"], record["weight_variation"]
        file.write_text(json.dumps(record))
    names = {file.name for file in write_report(folder).files}
    assert {"sample_weight_cls.png", "sample_weight_reg.png"} <= names
    assert "gradient_share_cls.png" not in names
    assert "| Method | Variation of loss_cls |" in (folder / "report.md").read_text()


def test_no_average_no_picture_of_it(comparison):
    folder = comparison(SMALL, SMALL_PAIRS)
    row = {"iteration": 0, "density": "ghm_c.density", "ema": [[0.0, 0.0]]}
    for file in folder.glob("../runs/*/density.jsonl"):
        file.write_text(json.dumps(row) + "\n")  # as momentum 0 leaves it
    write_report(folder)
    assert not list(folder.glob("density_*.png"))


def test_half_a_line_that_a_killed_training_left_is_passed_over(comparison):
    folder = comparison(SMALL, SMALL_PAIRS, analysis=False)
    before = write_report(folder).files
    for run in (folder / "../runs").iterdir():
        with open(run / "metrics.jsonl", "a") as file:
            file.write('7\n{"iteration": 300, "bbox/A')
    assert write_report(folder).files == before


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("analysis.json", "{"),
        ("analysis.json", '{"confusion": {"matrix": [[1, 2]]}}'),
        ("analysis.json", '{"noise": {"none": {"weight": "x"}, "class": {"weight": 1}}}'),
        ("density.jsonl", '{"iteration": 1, "density": "ghm_c.density", "ema": 7}'),
        ("run.json", '{"method": 3}'),
    ],
)
def test_a_file_of_another_form_is_named(comparison, file, text):
    folder = comparison(SMALL, SMALL_PAIRS)
    for run in (folder / "../runs").iterdir():
        (run / file).write_text(text + "\n")
    with pytest.raises(DataError, match=file.replace(".", r"\.")):
        write_report(folder)


@pytest.mark.parametrize("name", ["/etc", "../../elsewhere", "../../../../etc"])
def test_runs_that_lie_elsewhere_are_not_read(comparison, name):
    folder = comparison(SMALL, SMALL_PAIRS, analysis=False)
    found = Comparison.read(folder)
    found.sides[0].runs[0] = name
    found.write(folder)
    with pytest.raises(DataError, match="lies outside"):
        read_report(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pairs.append(Pair("no such side", FOCAL, "")), "no such side"),
        (lambda c: c.sides.append(c.sides[0]), "two sides"),
        (lambda c: c.seeds.pop(), "more runs"),
    ],
)
def test_a_comparison_that_contradicts_itself_is_named(comparison, change, words):
    folder = comparison(SMALL, SMALL_PAIRS, analysis=False)
    found = Comparison.read(folder)
    change(found)
    found.write(folder)
    with pytest.raises(DataError, match=words):
        read_report(folder)


def test_where_nothing_can_be_written_is_named(comparison, tmp_path):
    folder = comparison(SMALL, SMALL_PAIRS, analysis=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file/report cannot be created"):
        write_report(folder, tmp_path / "file" / "report")
