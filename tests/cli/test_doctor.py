"""ghm doctor, here and in environments that lack something."""

import importlib
import importlib.metadata
import json
import sys
import types

import pytest
import typer
from typer.testing import CliRunner

from ghm_d2.cli import doctor

app = typer.Typer()
app.command()(doctor.doctor)


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def report():
    result = run("--json")
    return result.exit_code, {f["name"]: f for f in json.loads(result.stdout)["findings"]}


@pytest.fixture
def versions(monkeypatch):
    """Pretend versions: a dict to fill, None standing for a package that is not installed."""
    pretend = {}
    real = importlib.metadata.version

    def lookup(name):
        version = pretend[name] if name in pretend else real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(doctor.metadata, "version", lookup)
    return pretend


@pytest.fixture
def modules(monkeypatch):
    """Pretend modules: a dict to fill with what importing a name gives, or raises."""
    pretend = {}
    real = importlib.import_module

    def load(name):
        value = pretend[name] if name in pretend else real(name)
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(doctor.importlib, "import_module", load)
    return pretend


def absent(name):
    return ModuleNotFoundError(f"No module named '{name}'", name=name)


def test_a_complete_environment_passes():
    code, found = report()
    assert code == 0
    for name in ("Python", "torch", "torchvision", "detectron2", "timm", "rich"):
        assert found[name]["status"] in ("ok", "untested"), found[name]
        assert found[name]["version"]
    assert found["torch"]["detail"]


def test_the_text_names_versions_and_ends_with_the_verdict():
    result = run()
    assert result.exit_code == 0
    assert importlib.metadata.version("torch").split("+")[0] in result.stdout
    assert result.stdout.strip().endswith("is there.")


def test_everything_that_we_require_is_examined():
    assert {"torch", "torchvision", "timm", "safetensors", "pillow"} <= set(doctor.requirements())
    assert doctor.requirements()["torch"] == "2.6"
    assert "pytest" not in doctor.requirements()


@pytest.mark.parametrize(
    ("version", "status"), [(None, "missing"), ("2.4.1+cu121", "too old"), ("2.10.0", "ok")]
)
def test_versions_are_compared_as_numbers(versions, version, status):
    versions["torch"] = version
    finding = doctor.look_up("torch", "2.6")
    assert finding.status == status
    assert (finding.mend is None) == (status == "ok")


def test_missing_torch_is_reported_with_the_command(versions, modules):
    versions.update({"torch": None, "torchvision": None, "detectron2": None})
    for name in ("torch", "torchvision", "torchvision.ops", "detectron2"):
        modules[name] = absent(name)
    code, found = report()
    assert code == 2
    assert found["torch"]["status"] == "missing"
    assert found["torch"]["mend"].endswith("-m pip install 'torch>=2.6'")
    assert found["detectron2"]["mend"].endswith("tools/detectron2_wheel.py")


def test_the_commands_are_printed_whole(versions):
    versions["timm"] = None
    result = run()
    assert result.exit_code == 2
    assert any(line.endswith("-m pip install timm") for line in result.stdout.splitlines())
    assert "missing or broken" in result.stderr


def test_missing_optional_packages_are_no_failure(versions):
    versions.update(dict.fromkeys(doctor.OPENCV))
    code, found = report()
    assert code == 0
    assert found["opencv-python-headless"]["status"] == "missing"
    assert found["opencv-python-headless"]["mend"]


def test_loss_kernels_that_were_not_built_are_no_failure(modules):
    cpu = types.SimpleNamespace(available=lambda: False)
    modules["ghm_d2.kernels"] = types.SimpleNamespace(cpu=cpu)
    code, found = report()
    finding = found["loss kernels"]
    assert code == 0 and finding["status"] == "missing"
    assert "gcc" in finding["detail"] and "install --no-deps" in finding["mend"]


def test_opencv_counts_under_any_of_its_names(versions):
    versions.update({**dict.fromkeys(doctor.OPENCV), "opencv-python": "4.12"})
    assert doctor.look_up_optional("opencv-python-headless", "masks").version == "4.12"


def test_torchvision_for_another_torch_is_broken(modules):
    def nms(*_):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    modules["torchvision.ops"] = types.SimpleNamespace(nms=nms)
    finding = doctor.Finding("torchvision", "0.1")
    doctor.check_torchvision(finding)
    assert finding.fatal and "torchvision::nms" in finding.detail and "more" not in finding.detail
    assert "torch torchvision" in finding.mend


def detectron2(version="0.6"):
    return types.SimpleNamespace(__version__=version, __file__="/d2/detectron2/__init__.py")


@pytest.mark.parametrize(
    ("extension", "status", "words"),
    [
        (types.SimpleNamespace(), "ok", "with compiled ops"),
        (absent("detectron2._C"), "ok", "no compiled ops"),
        (ImportError("_C.so: undefined symbol: x"), "broken", "undefined symbol"),
    ],
)
def test_the_compiled_ops_of_detectron2(modules, versions, extension, status, words):
    versions["detectron2"] = "0.6"
    modules.update({"detectron2": detectron2(), "detectron2._C": extension})
    modules["detectron2.model_zoo"] = types.SimpleNamespace()
    finding = doctor.check_detectron2()
    assert finding.status == status and words in finding.detail
    assert (finding.mend is None) == (status == "ok")


def test_a_detectron2_that_fails_to_import_is_broken_and_not_missing(modules):
    modules["detectron2"] = absent("fvcore")
    finding = doctor.check_detectron2()
    assert finding.status == "broken" and "fvcore" in finding.detail
    assert "pip uninstall detectron2" in finding.mend


def test_a_detectron2_that_needs_an_older_setuptools(modules):
    modules["detectron2"] = detectron2()
    modules["detectron2.model_zoo"] = absent("pkg_resources")
    finding = doctor.check_detectron2()
    assert finding.status == "broken" and finding.mend.endswith("pip install 'setuptools<81'")


def test_a_folder_called_detectron2_is_not_detectron2(modules):
    modules["detectron2"] = types.SimpleNamespace(__path__=["/somewhere/detectron2"])
    finding = doctor.check_detectron2()
    assert finding.status == "broken" and "/somewhere/detectron2" in finding.detail


@pytest.mark.parametrize(
    ("direct_url", "words"),
    [
        (
            '{"url": "https://x/d2.git", "vcs_info": {"commit_id": "0123456789abcdef"}}',
            "https://x/d2.git at 0123456789",
        ),
        (None, "/d2/detectron2"),
    ],
)
def test_where_detectron2_came_from(monkeypatch, direct_url, words):
    distribution = types.SimpleNamespace(read_text=lambda name: direct_url)
    monkeypatch.setattr(doctor.metadata, "distribution", lambda name: distribution)
    assert words in doctor.detectron2_origin("0.6", detectron2())
    assert "tools/detectron2_wheel.py" in doctor.detectron2_origin("0.6+ghm.1", detectron2())


@pytest.mark.parametrize(("python", "status"), [((3, 12), "ok"), ((3, 14), "untested")])
def test_python_version(monkeypatch, python, status):
    monkeypatch.setattr(sys, "version_info", (*python, 0))
    assert doctor.check_python().status == status
