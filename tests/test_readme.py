"""What the README says is so."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from ghm_d2.config import get_cfg, merge_overrides
from ghm_d2.reports.document import escape
from ghm_d2.reports.report import read_report, runs_csv
from ghm_d2.reports.study import find_comparisons

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_key_of_ours_is_in_the_table():
    from detectron2.config import get_cfg as detectron2_defaults

    def keys(node, prefix=""):
        for key, value in node.items():
            name = prefix + key
            yield from keys(value, name + ".") if isinstance(value, dict) and value else [name]

    ours = set(keys(get_cfg())) - set(keys(detectron2_defaults()))
    assert ours >= {"MODEL.GHM.CLS.BINS", "MODEL.TIMM.NAME"}
    assert {key for key in ours if f"`{key}`" not in README} == set()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_the_code_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_the_commands_exist(ghm):
    named = set(re.findall(r"^    ghm (data \w+|\w+)", README, re.M))
    assert {"train", "eval", "predict", "data import"} <= named
    for command in sorted(named):
        shown = ghm(*command.split(), "--help")
        assert shown.returncode == 0, command
        assert "Example" in shown.stdout, f"ghm {command} --help has no example"


def test_overrides_shown_are_accepted():
    for line in re.findall(r"^    ghm train .*$", README, re.M):
        words = re.findall(r"\b([A-Z]+(?:\.[A-Z_]+)+) (\S+)", line)
        merge_overrides(get_cfg(), [word for pair in words for word in pair])


@pytest.mark.parametrize("folder", ["results", "results/stability"])
def test_the_tables_of_measurements_are_the_records(ghm, folder):
    """Every figure comes from results/ by the command that the README names."""
    command = f"ghm report {folder} --markdown"
    assert command in README
    printed = ghm(*command.split()[1:], cwd=ROOT)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.count("\n") >= 6
    assert printed.stdout in README


@pytest.mark.parametrize("folder", find_comparisons(ROOT / "results"), ids=lambda f: f.name)
def test_reports_are_of_the_records(folder):
    """`ghm report` of the folder would write these numbers and this answer again."""
    report, text = read_report(folder), (folder / "report.md").read_text(encoding="utf-8")
    assert all(table in text for table in report.markdown.split("\n\n"))
    assert all(escape(sentence) in text for sentence in report.verdict)
    assert (folder / "runs.csv").read_text(encoding="utf-8") == runs_csv(report.summary.study)
    assert f"results/comparisons/{folder.name}/report.md" in README


def test_the_table_of_configurations_is_the_commands(ghm):
    shown = ghm("configs", "--markdown")
    assert shown.stdout.count("\n") > 40 and shown.stdout in README


def test_what_was_measured_with_a_configuration_is_in_results():
    catalog = json.loads((ROOT / "configs" / "catalog.json").read_text(encoding="utf-8"))
    measured = describe_configs().measured_ap(ROOT / "results" / "comparisons")
    assert {name: row["measured"] for name, row in catalog.items() if row["measured"]} == measured


def describe_configs():
    path = ROOT / "tools" / "describe_configs.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
