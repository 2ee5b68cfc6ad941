"""tools/fuzz.py, and the inputs that it has found to do harm."""

import importlib.util
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location(TOOL.stem, TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", ["coco", "voc", "yolo", "weights"])
def test_seeds_are_sound(fuzz, target, monkeypatch):
    messages = []
    monkeypatch.setattr(fuzz, "judge_message", messages.append)
    try_one = fuzz.prepare(target)
    for seed in fuzz.seeds(target):
        try_one(seed)
    assert messages == []


def test_a_finding_is_repeated_without_atheris(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['atheris'] = None")
    (tmp_path / "finding").write_bytes(b"")

    def run(*words):
        return subprocess.run(
            [sys.executable, TOOL, *words], capture_output=True, text=True, check=False,
            env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        )  # fmt: skip

    assert "nothing found" in run("voc", tmp_path / "finding").stdout
    done = run("voc", "--folder", tmp_path / "corpus")
    assert done.returncode == 1 and "pip install atheris" in done.stderr


def test_what_escapes_an_importer_is_a_finding(fuzz, monkeypatch):
    from ghm_d2.data.importing import folders
    from ghm_d2.errors import DataError

    def importer(error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(folders, "import_folder", fail)

    try_one, (seed,) = fuzz.prepare("yolo"), fuzz.seeds("yolo")
    for error in (KeyError("x"), MemoryError(), DataError("")):
        importer(error)
        with pytest.raises((KeyError, MemoryError, AssertionError)):
            try_one(seed)
    importer(DataError("one line"))
    try_one(seed)


COCO = """{"images": [{"id": 1, "file_name": "%s"}], "annotations": [],
 "categories": [{"id": 1, "name": "%s"}]}"""
XML = """<annotation><object><name>cat</name>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>"""
YAML = "names: [a]\nval: %s\n====\n\n====\n\n====\n%s"
FOUND = {
    "coco": [
        COCO.replace("1", "false", 1) % ("a.png", "cat"),
        COCO.replace("1", "-1", 1) % ("a.png", "cat"),
        COCO % (".", "cat"),
        COCO % ("a\\u001b", "cat"),
        COCO % ("a.png", "\\ud800"),
    ],
    "voc": [
        f"{XML}\n====\n{XML}\n====\na\n././/",
        f"{XML}\n====\n{XML}\n====\n\x02ba",
        XML.replace("cat", "cat\ndog"),
    ],
    "yolo": [YAML % ("val.txt", "oejb\x08<>"), YAML % ('"a\\eb"', "")],
    "weights": ["\x01\x80\x02c\x1bx\ny\n."],
}


@pytest.mark.parametrize(
    ("target", "data"), [(target, data) for target, found in FOUND.items() for data in found]
)
def test_what_was_found_is_mended(fuzz, target, data):
    fuzz.prepare(target)(data.encode("latin1"))


MEMORY = """
import resource, sys
from ghm_d2.errors import WeightsError
from ghm_d2.modeling.weights.plain_pickle import load_plain_pickle

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_plain_pickle(open(sys.argv[1], "rb"), "file")
except WeightsError:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / before)
"""


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02]r" + struct.pack("<I", 2**27) + b".",  # an object, and its number
        b"\x80\x05" + pickle.BYTEARRAY8 + struct.pack("<Q", 2**31) + b"abc.",
    ],
)
def test_a_pickle_takes_no_more_memory_than_it_has_contents(tmp_path, pickled):
    (tmp_path / "file").write_bytes(pickled)
    command = [sys.executable, "-c", MEMORY, tmp_path / "file"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2
