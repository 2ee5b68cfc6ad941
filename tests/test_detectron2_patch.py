"""The Detectron2 that tools/detectron2_wheel.py installed is the one that its patch describes."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import detectron2
import pytest

PATCH = (Path(__file__).parents[1] / "tools/detectron2.patch").read_text(encoding="utf-8")
VERSION = re.search(r'(?m)^\+version = "(.*)"', PATCH).group(1)


def hunks() -> list[tuple[str, int, list[str]]]:
    """Return (file of the package, first line, lines after the change) of every hunk."""
    found = []
    for part in PATCH.split("\ndiff --git ")[1:]:
        file = re.search(r"(?m)^\+\+\+ b/(.*)$", part).group(1)
        for start, body in re.findall(r"(?ms)^@@ .*?\+(\d+)[^\n]*\n(.*?)(?=^@@ |\Z)", part):
            lines = [line[1:] for line in body.splitlines() if line[:1] in ("+", " ")]
            found.append((file, int(start), lines))
    return [hunk for hunk in found if hunk[0].startswith("detectron2/")]


def test_the_installed_files_hold_every_change():
    if importlib.util.find_spec("detectron2._missing") is None:
        pytest.skip("the Detectron2 here is your own")
    assert importlib.metadata.version("detectron2") == VERSION, "run make setup again"
    root = Path(detectron2.__file__).parents[1]
    for file, start, lines in hunks():
        installed = (root / file).read_text(encoding="utf-8").splitlines()
        assert installed[start - 1 : start - 1 + len(lines)] == lines, (file, start)
