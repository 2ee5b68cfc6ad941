"""ghm doctor, here and in environments that lack something."""

import importlib
import importlib.metadata as metadata
import json
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from ghm_d2.cli import doctor
from ghm_d2.cli.app import app
from ghm_d2.kernels import cpu


def report():
    """The exit code and, by name, the findings."""
    result = CliRunner().invoke(app, ["doctor", "--json"])
    return result.exit_code, {f["name"]: f for f in json.loads(result.stdout)["findings"]}


@pytest.fixture
def without(monkeypatch):
    """Lets importing a module raise an error, or its metadata give another version."""
    load, version = importlib.import_module, metadata.version

    def pretend(name, error=None, having=None):
        def fail(module):
            if module == name and error:
                raise error
            return load(module)

        # of the command alone: other modules import what they need at any time
        monkeypatch.setattr(doctor, "importlib", SimpleNamespace(import_module=fail))
        if having:
            lookup = lambda package: having if package == name else version(package)  # noqa: E731
            monkeypatch.setattr(doctor.metadata, "version", lookup)

    return pretend


def test_a_complete_environment_passes_and_names_what_it_has():
    code, found = report()
    assert code == 0 and {"Python", "torchvision", "timm", "safetensors"} <= set(found)
    assert found["torch"]["version"] == metadata.version("torch") and found["torch"]["detail"]
    assert found["loss kernels"]["detail"].startswith("C on cpu") or not cpu.available()
    text = CliRunner().invoke(app, ["doctor"])
    assert metadata.version("torch") in text.stdout and "is installed." in text.stdout


@pytest.mark.parametrize(("version", "status"), [("2.4.1+cu121", "too old"), ("2.10.0", "ok")])
def test_versions_are_compared_as_numbers(without, version, status):
    without("torch", having=version)
    code, found = report()
    assert found["torch"]["status"] == status and code == (2 if status == "too old" else 0)
    if code:
        text = CliRunner().invoke(app, ["doctor"])
        assert "-m pip install 'torch>=2.6'\n" in text.stdout and "missing" in text.stderr


@pytest.mark.parametrize(
    ("module", "error", "status", "mend"),
    [
        ("detectron2", ModuleNotFoundError(name="detectron2"), "missing", "detectron2_wheel.py"),
        ("detectron2", ModuleNotFoundError("fvcore", name="fvcore"), "broken", "uninstall"),
        ("detectron2", ImportError("_C.so: undefined symbol: x\nmore"), "broken", "uninstall"),
        ("detectron2.model_zoo", ModuleNotFoundError("pkg_resources"), "broken", "setuptools<81"),
        ("torchvision", RuntimeError("operator torchvision::nms"), "broken", "torch torchvision"),
    ],
)
def test_what_does_not_import_is_named_with_the_command_that_mends_it(
    without, module, error, status, mend
):
    without(module, error)
    code, found = report()
    finding = found[module.partition(".")[0]]
    assert code == 2 and finding["status"] == status and mend in finding["mend"]
    assert str(error).partition("\n")[0] in finding["detail"]
    assert "more" not in finding["detail"]


def test_a_detectron2_without_metadata_tells_its_own_version(monkeypatch):
    known = doctor.version_of
    monkeypatch.setattr(
        doctor, "version_of", lambda name: None if name == "detectron2" else known(name)
    )
    code, found = report()
    assert code == 0 and found["detectron2"]["version"][0].isdigit()


@pytest.mark.parametrize(("python", "status"), [((3, 13), "ok"), ((3, 14), "untested")])
def test_a_python_that_is_not_tested_is_told_and_no_failure(monkeypatch, python, status):
    monkeypatch.setattr(sys, "version_info", (*python, 0))
    finding = doctor.check_python()
    assert finding.status == status and not finding.fatal


def test_kernels_that_were_not_compiled_are_slower_and_no_failure(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    code, found = report()
    finding = found["loss kernels"]
    assert code == 0 and finding["status"] == "missing" and "plain PyTorch" in finding["detail"]
    assert "gcc" in finding["detail"] and "install --no-deps" in finding["mend"]
