"""The claims of README.md and docs/ hold."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from ghm_d2.config import get_cfg, merge_overrides
from ghm_d2.reports.page.document import escape
from ghm_d2.reports.report import read_report
from ghm_d2.reports.study import find_comparisons

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {file.name: file.read_text(encoding="utf-8") for file in FILES}
TEXT = "\n".join(PAGES.values())


def load_tool(name: str):
    path = ROOT / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = load_tool("docs_tables")
GENERATED = [name for name, text in PAGES.items() if TABLES.PART.search(text)]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tables_are_what_their_commands_print(name):
    page = PAGES[name]
    assert len(TABLES.PART.findall(page)) == page.count("<!-- generated:")
    parts = page.split("<!-- generated:")[1:]
    assert all(part.count("\n| ") >= 3 for part in parts if not part.startswith(' "AP on"'))
    assert TABLES.generate(page) == page, "run python tools/docs_tables.py"


def test_the_tables_of_numbers_are_generated():
    assert {"README.md", "compare.md", "configuration.md", "results.md"} <= set(GENERATED)
    judged = [read_report(f) for f in find_comparisons(ROOT / "results" / "confirmation")]
    rows = re.findall(r"^\| (\w+) \| \d", PAGES["README.md"], re.M)
    assert rows and rows == [report.study.comparison.dataset for report in judged]


def test_every_key_of_ours_is_in_the_tables():
    from detectron2.config import get_cfg as detectron2_defaults

    def keys(node, prefix=""):
        for key, value in node.items():
            name = prefix + key
            yield from keys(value, name + ".") if isinstance(value, dict) and value else [name]

    ours = set(keys(get_cfg())) - set(keys(detectron2_defaults()))
    assert ours >= {"MODEL.GHM.CLS.BINS", "MODEL.TIMM.NAME"}
    rows = re.findall(
        r"^\| `([A-Z0-9_.]+)` \| `(.+?)` \| (.+) \|$", PAGES["configuration.md"], re.M
    )
    assert ours - {key for key, _, _ in rows} == set()
    assert [key for key, _, meaning in rows if not meaning.strip()] == []


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.S))
def test_the_code_runs(code):
    exec(compile(code, "docs", "exec"), {})


def shell_lines() -> list[str]:
    """The lines of the blocks of commands."""
    return "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.S)).replace("\\\n", " ").splitlines()


def test_the_commands_exist(ghm):
    lines = "\n".join(shell_lines())
    named = set(re.findall(r"^ghm (data \w+|\w+)", lines, re.M))
    assert {"train", "eval", "predict", "data import", "compare", "export"} <= named
    for command in sorted(named):
        shown = ghm(*command.split(), "--help")
        assert shown.returncode == 0, command
        assert "Example" in shown.stdout, f"ghm {command} --help has no example"


def test_the_files_named_are_there():
    places = "benchmarks|cli|configs|docs|ghm_d2|tests|tools"
    text = TEXT + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(rf"`((?:{places})/[\w./-]*)`", text))
    named |= set(re.findall(r"\bconfigs/\w+/\w+\.yaml|\btools/\w+\.py", text))
    assert {"tools/docs_tables.py", "configs/quick/retinanet_ghm.yaml", "ghm_d2/losses"} <= named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_overrides_shown_are_accepted():
    shown = [line for line in shell_lines() if line.startswith("ghm train")]
    override = re.compile(r"\b([A-Z]+(?:\.[A-Z0-9_]+)+) \"?([^\s\"]+)")
    pairs = [override.findall(line) for line in shown]
    assert any(pairs)
    for words in pairs:
        merge_overrides(get_cfg(), [word for pair in words for word in pair])


@pytest.mark.parametrize("folder", find_comparisons(ROOT / "results"), ids=lambda f: f.name)
def test_reports_are_of_the_records(folder):
    """`ghm report` of the folder would write these numbers and this answer again."""
    report, text = read_report(folder), (folder / "report.md").read_text(encoding="utf-8")
    assert all(table in text for table in report.markdown.split("\n\n"))
    assert all(escape(sentence) in text for sentence in report.answer)
    assert f"../{folder.relative_to(ROOT).as_posix()}/report.md" in TEXT


def test_what_was_measured_with_a_configuration_is_in_results():
    catalog = json.loads((ROOT / "configs" / "catalog.json").read_text(encoding="utf-8"))
    measured = load_tool("describe_configs").measured_ap(ROOT / "results")
    assert {name: row["measured"] for name, row in catalog.items() if row["measured"]} == measured
