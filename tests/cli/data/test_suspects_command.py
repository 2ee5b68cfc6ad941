"""`ghm data suspects` as users run it, and `ghm data clean` with what it found."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def found(ghm, digits_folder, tiny, tmp_path_factory) -> tuple[Path, dict]:
    """The folder after two trainings of a few steps, and what the command printed."""
    folder = tmp_path_factory.mktemp("suspects")
    words = ("data", "suspects", digits_folder, "--output", folder, "--folds", 2, "--most", 9)
    done = ghm(*words, "--json", *tiny)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_all_annotations_are_judged_and_the_files_are_there(found, digits_folder):
    folder, value = found
    train = json.loads((Path(digits_folder) / "train.json").read_text())
    assert value["annotations"] == len(train["annotations"])
    with open(folder / "suspects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == value["suspects"] + value["missing"] > 9
    names = {image["file_name"] for image in train["images"]}
    assert {row["file"] for row in rows} <= names
    for kinds in (("missing",), ("class", "box", "extra")):
        scores = [float(row["score"]) for row in rows if row["kind"] in kinds]
        assert scores == sorted(scores, reverse=True) and 0 < scores[0] <= 1
    page = (folder / "suspects.html").read_text()
    assert page.count("<article") == len(rows) and "<script" not in page
    with Image.open(folder / "suspects.jpg") as sheet:
        assert sheet.width > 800
    assert json.loads((folder / "label_studio.json").read_text())
    assert json.loads((folder / "suspects.json").read_text())["annotations"]


def test_the_same_command_trains_nothing_again(found, ghm, digits_folder, tiny):
    folder, value = found
    weights = sorted((folder / "runs").glob("*/run.json"))
    before = [file.stat().st_mtime_ns for file in weights]
    words = ("data", "suspects", digits_folder, "--output", folder, "--folds", 2, "--most", 9)
    again = ghm(*words, "--json", *tiny)
    assert json.loads(again.stdout) == value
    assert [file.stat().st_mtime_ns for file in weights] == before and len(before) == 2


def test_what_was_found_is_mended(found, ghm, digits_folder, tmp_path):
    folder, _ = found
    new = tmp_path / "mended"
    words = ("data", "clean", digits_folder, "--apply", folder / "suspects.csv", "--output", new)
    done = ghm(*words, "--drop", 2, "--add", 3)
    assert done.returncode == 0, done.stderr
    assert "train: 2 dropped, 0 changed, 3 added" in done.stdout
    assert ghm("data", "check", new).returncode == 0


def test_a_persons_decisions_are_not_overwritten(found, ghm, digits_folder, tiny):
    folder, _ = found
    table = folder / "suspects.csv"
    before = table.read_text()
    table.write_text(before.replace("\n,", "\ndrop,", 1))
    done = ghm("data", "suspects", digits_folder, "--output", folder, "--folds", 2, *tiny)
    table.write_text(before)
    assert done.returncode == 2 and "has decisions" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--weights", "x.pth", "SOLVER.MAX_ITER", 5), "leave out the KEY VALUE overrides"),
        (("SEED", 5), "set SEED with the option --seed"),
        (("DATASETS.TEST", "()"), "set DATASETS.TEST with the option --dataset"),
    ],
)
def test_what_would_have_no_effect_is_refused(ghm, digits_folder, tmp_path, words, message):
    done = ghm("data", "suspects", digits_folder, "--output", tmp_path / "s", *words)
    assert done.returncode == 2 and message in done.stderr
