"""Users run `ghm data`: exit codes, JSON on stdout, one line on stderr."""

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def data(ghm, tmp_path):
    """Runs `ghm data` in tmp_path, and expects an exit code."""

    def run(*words, code=0):
        result = ghm("data", *words, cwd=tmp_path)
        assert result.returncode == code, result.stderr + result.stdout
        return result

    return run


@pytest.fixture
def voc(tmp_path):
    """Three images; the last one's box is inverted."""
    for stem, box in (("a", (1, 1, 20, 20)), ("b", (5, 5, 30, 40)), ("c", (20, 20, 9, 9))):
        sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        corners = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        xml = (
            f"<annotation><object><name>cat</name><bndbox>{corners}</bndbox></object></annotation>"
        )
        for name in ("Annotations", "JPEGImages"):
            (tmp_path / "voc" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "voc" / "Annotations" / f"{stem}.xml").write_text(xml)
        pixels = np.random.default_rng(ord(stem)).integers(0, 255, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "voc" / "JPEGImages" / f"{stem}.jpg")
    return tmp_path / "voc"


def test_make_check_and_show(data, tmp_path):
    made = data("make", "--output", "d", "--train", 3, "--val", 2, "--noise", 0.5, "--json")
    report = json.loads(made.stdout)
    assert report["splits"]["train"]["images"] == 3
    assert (tmp_path / "d" / "val.json").is_file()
    checked = data("check", "d", "--json")
    assert json.loads(checked.stdout)["errors"] == 0
    shown = data("show", "d", "--count", 2, "--output", "sheet.png")
    assert "2 images" in shown.stdout
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 600
    again = data("make", "--output", "d", "--train", 3, "--val", 2, code=2)
    assert "not empty" in again.stderr and len(again.stderr.splitlines()) == 1
    data("make", "--output", "d", "--train", 1, "--val", 1, "--overwrite")
    assert "exists already" in data("show", "d", "--output", "sheet.png", code=2).stderr


def test_import_reports_what_it_dropped_and_strict_refuses(data, voc):
    told = data("import", "voc", "--output", "clean")
    assert "dropped: 1 box" in told.stdout
    assert "Annotations/c.xml: object 1" in told.stdout and "inverted or empty" in told.stdout
    report = json.loads(data("import", "voc", "--output", "again", "--json").stdout)
    assert report["dropped"][0]["file"] == "Annotations/c.xml"
    refused = data("import", "voc", "--output", "strict", "--strict", code=3)
    assert refused.stderr.startswith("error: Annotations/c.xml: object 1")
    assert len(refused.stderr.splitlines()) == 1 and refused.stdout == ""


def test_check_ends_with_3_on_an_error_and_lists_it(data, voc, tmp_path):
    data("import", "voc", "--output", "d", "--copy")
    coco = json.loads((tmp_path / "d" / "train.json").read_text())
    victim = coco["images"][0]["file_name"]
    path = tmp_path / "d" / "images" / victim
    path.write_bytes(path.read_bytes()[:700])
    result = data("check", "d", code=3)
    assert f"error: train: {victim}: cannot be decoded" in result.stdout
    problems = json.loads(data("check", "d", "--json", code=3).stdout)["problems"]
    assert (problems[0]["kind"], problems[0]["file"]) == ("unreadable-image", victim)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["make", "--output", "d", "--noise", "2"], 2, "noise"),
        (["make", "--output", "d", "--side", "90", "10"], 2, "side is 90 10"),
        (["import", "nowhere", "--output", "d"], 3, "nowhere: is not a folder"),
        (["import", "voc", "--output", "d", "--format", "xml"], 2, "--format is 'xml'"),
        (["import", "voc", "--output", "d", "--split", "1"], 2, "--split is 1.0"),
        (["check", "nosuchset"], 2, "unknown data set 'nosuchset'"),
        (["check", "voc"], 3, "has no train.json, val.json or test.json"),
        (["show", "voc", "--output", "x.gif"], 2, "must end in .png"),
    ],
)
def test_mistakes_end_with_one_line_and_their_exit_code(data, voc, words, code, told):
    result = data(*words, code=code)
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert told in result.stderr and result.stdout == ""


@pytest.mark.parametrize("command", ["make", "import", "check", "show"])
def test_help_has_an_example(data, command):
    assert f"Example: ghm data {command}" in data(command, "--help").stdout


def test_make_has_the_defaults_of_the_specification():
    """They stand twice because `ghm --help` must not import NumPy."""
    import inspect
    from dataclasses import asdict

    from ghm_d2.cli.data.commands import make
    from ghm_d2.data.digits.dataset import DigitsSpec

    options = {n: p.default for n, p in inspect.signature(make).parameters.items()}
    options["image_size"] = options.pop("size")
    spec = asdict(DigitsSpec())
    assert {name: options[name] for name in spec} == spec
