"""The tutorial notebook runs from top to bottom, and its kept outputs are those of a whole run."""

import json
import re
import runpy
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


def text_of(cell) -> str:
    """The printed output of a code cell."""
    streams = [out["text"] for out in cell["outputs"] if out["output_type"] == "stream"]
    return "".join("".join(text) for text in streams)


def check(cells) -> None:
    """Fail unless the outputs tell what the text around them promises."""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    printed = "\n".join(text_of(cell) for cell in code)
    assert "error:" not in printed
    assert "0 errors" in printed and "best AP" in printed and "report.html" in printed
    in_all, *in_first = [int(share) for share in re.findall(r": (\d+)%", printed)]
    assert len(in_first) == 3 and min(in_first) > in_all
    assert "largest difference from PyTorch" in printed and "digit " in printed
    pictures = [out for cell in code for out in cell["outputs"] if "data" in out]
    assert len(pictures) == 4


def test_the_outputs_are_kept():
    check(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"])
    assert NOTEBOOK.stat().st_size < 2**20
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="make test-all installs the extra notebook")
    pytest.importorskip("nbclient", reason="make test-all installs the extra notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    runpy.run_path(str(NOTEBOOK.parents[1] / "tools" / "run_tutorial.py"))["run"](
        notebook, tmp_path
    )
    check(notebook.cells)
