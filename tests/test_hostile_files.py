"""Every hostile file of tools/hostile_cases.py is refused or made harmless by `ghm`."""

import importlib.util
import pickle
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def tool(name: str):
    """A module of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


hostile_cases = tool("hostile_cases")
hostile_files = tool("hostile_files")


@pytest.mark.slow
@pytest.mark.parametrize("case", hostile_cases.CASES, ids=lambda case: case.name)
def test_it_is_refused_or_made_harmless(case, tmp_path):
    result = hostile_files.run_case(case, tmp_path)
    assert result.faults == [], f"{result.out}\n{result.err}"


CARELESS = {
    "executed": "import pickle; pickle.load(open('w.pkl', 'rb'))",
    "written outside": "open('../elsewhere', 'w').close()",
    "leaked": "print(open('../secret.txt').read())",
    "network": "import urllib.request as r\ntry: r.urlopen('{address}/x')\nexcept OSError: pass",
    "GiB of memory": "bytearray(4 << 30)",
    "control characters": "print('\\x1b[2J')",
    "a traceback": "1 / 0",
    "exit code 0, not 3": "pass",
    "error lines": "import sys; print('a\\nb', file=sys.stderr); sys.exit(3)",
}


@pytest.mark.parametrize("fault", CARELESS)
def test_each_trap_shuts_on_a_careless_program(fault, tmp_path, monkeypatch):
    """In the place of ghm: what unpickles, writes, asks or prints as the file says."""

    def write(work, address):
        (work / "w.pkl").write_bytes(pickle.dumps(hostile_cases.Evil(work)))
        program = CARELESS[fault].replace("{address}", address)
        (work / "careless.py").write_text(program, encoding="utf-8")

    monkeypatch.setattr(hostile_files, "COMMAND", [sys.executable, "careless.py"])
    case = hostile_cases.Case("w.pkl", fault, write, (), "")
    result = hostile_files.run_case(case, tmp_path)
    assert any(fault in said for said in result.faults), result
