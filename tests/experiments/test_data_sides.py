"""Data sets as the sides of a comparison."""

import json
import shutil
from dataclasses import replace

import pytest

from ghm_d2.errors import DataError, UsageError
from ghm_d2.experiments.compare import Request, make_runs
from ghm_d2.experiments.suites import choose_sides, find_suite


def test_data_sets_are_compared_on_the_same_val(digits_folder, tiny, tmp_path):
    other = tmp_path / "mended"
    shutil.copytree(digits_folder, other)
    train = json.loads((other / "train.json").read_text())
    del train["annotations"][0]
    (other / "train.json").write_text(json.dumps(train))
    val = json.loads((other / "val.json").read_text())
    (other / "val.json").write_text(json.dumps(val, indent=1))  # the same in other words
    suite = find_suite([digits_folder, str(other)], "quick")
    request = Request(suite, None, "quick", (1, 2), tmp_path, "cpu", tuple(tiny))
    runs = make_runs(request, {})
    assert [run.dataset for run in runs[:2]] == [digits_folder, str(other)]
    assert len({run.key for run in runs}) == 4
    with pytest.raises(UsageError, match="leave out --dataset"):
        make_runs(replace(request, dataset=digits_folder), {})
    del val["annotations"][0]
    (other / "val.json").write_text(json.dumps(val))
    with pytest.raises(DataError, match="different val splits"):
        make_runs(request, {})


def test_test_data_without_annotations_are_refused(digits_folder, tiny, tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        shutil.copytree(digits_folder, folder)
        val = json.loads((folder / "val.json").read_text())
        del val["annotations"]
        (folder / "val.json").write_text(json.dumps(val))
    of_data = find_suite([str(folder) for folder in folders], "quick")
    request = Request(of_data, None, "quick", (1,), tmp_path, "cpu", tuple(tiny))
    of_losses = choose_sides(find_suite(["losses"], "quick"))
    for asked in request, replace(request, suite=of_losses, dataset=str(folders[0])):
        with pytest.raises(DataError, match="a/val has no annotations, so the comparison would"):
            make_runs(asked, {})
