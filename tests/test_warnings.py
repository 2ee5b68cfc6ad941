"""A warning that is laid to a module of ours fails the ordinary run of the tests."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WARNING = """
import pytest

@pytest.mark.parametrize("category", ["DeprecationWarning", "UserWarning", "ResourceWarning"])
@pytest.mark.parametrize("module", ["ghm_d2", "ghm_d2.losses.ghm_c", "ghm_d2.cli.app", "test_it",
                                    "torch.nn", "not_ghm_d2", "latest"])
def test_it(module, category):
    code = f"import warnings; warnings.warn('text', {category})"
    exec(code, {"__name__": module})

def test_unraisable():
    class Leaves:
        def __del__(self):
            raise OSError
    Leaves()
"""


def test_warnings_laid_to_our_modules_are_errors_and_those_to_others_are_not(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(WARNING)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    failed = re.findall(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
    ours = ["ghm_d2", "ghm_d2.losses.ghm_c", "ghm_d2.cli.app", "test_it"]
    categories = ["DeprecationWarning", "UserWarning", "ResourceWarning"]
    expected = {f"test_it[{module}-{category}]" for module in ours for category in categories}
    assert set(failed) == {*expected, "test_unraisable"}, done.stdout


def test_every_module_of_the_tests_is_one_of_ours(pytestconfig):
    filters = [
        line.split(":")[3] for line in pytestconfig.getini("filterwarnings") if ":::" in line
    ]
    files = [*ROOT.glob("tests/**/*.py")]
    assert len(files) > 50
    others = [f.name for f in files if not any(re.match(pattern, f.stem) for pattern in filters)]
    assert not others, "name them in pyproject.toml's filterwarnings"
