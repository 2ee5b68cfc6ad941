"""Data sets as the sides of a comparison."""

import json
import shutil
from dataclasses import replace

import pytest

from ghm_d2.errors import DataError, UsageError
from ghm_d2.experiments.compare import Request, make_runs
from ghm_d2.experiments.suites import find_suite


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
