"""The command line as a process: its exit codes, and that heavy packages are imported late."""

import json
import subprocess
import sys

import pytest
import typer

from ghm_d2.cli.common.console import user_errors

HEAVY = {"torch", "torchvision", "detectron2", "fvcore", "timm", "matplotlib", "sklearn", "scipy"}


def imported_by(code: str) -> set[str]:
    """Top-level modules that a fresh Python has after `code`."""
    code += (
        "\nimport json, sys; print('\\n' + json.dumps([m.partition('.')[0] for m in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_the_app_imports_nothing_heavy():
    names = imported_by("import ghm_d2.cli.app")
    assert "typer" in names and "ghm_d2" in names
    assert not names & HEAVY


def test_help_imports_nothing_heavy():
    help_of = "import sys\nfrom ghm_d2.cli.app import app\n"
    for words in ([], ["train"], ["data", "import"]):
        call = f"try: app({[*words, '--help']!r})\nexcept SystemExit as e: assert not e.code"
        assert not imported_by(help_of + call) & HEAVY


def test_the_package_imports_nothing_heavy():
    assert not imported_by("import ghm_d2, ghm_d2.config, ghm_d2.records, ghm_d2.errors") & HEAVY


def test_registering_the_detectors_leaves_timm_to_those_who_ask_for_a_model_of_it():
    names = imported_by("from ghm_d2.register import register_all; register_all()")
    assert "detectron2" in names and "timm" not in names


def test_heavy_imports_are_seen():
    assert imported_by("import scipy.special") & HEAVY == {"scipy"}


def test_a_package_that_is_not_installed_is_one_line(capsys):
    with pytest.raises(typer.Exit) as ended, user_errors():
        import no_such_package  # noqa: F401
    assert ended.value.exit_code == 2
    assert "no_such_package is not installed; `ghm doctor`" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError), user_errors():
        import ghm_d2.no_such_module  # noqa: F401


def test_a_process_ends_with_the_exit_code_of_its_command(ghm_process, tmp_path):
    listed = ghm_process("configs", "--json", cwd=tmp_path)
    assert listed.returncode == 0 and json.loads(listed.stdout) and listed.stderr == ""
    unknown = ghm_process("configs", "--jsn", cwd=tmp_path)
    assert unknown.returncode == 2 and "--jsn" in unknown.stderr
    empty = ghm_process("report", tmp_path)
    assert empty.returncode == 3 and empty.stderr.startswith("error: ")
    assert empty.stdout == "" and len(empty.stderr.splitlines()) == 1
