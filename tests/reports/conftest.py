"""Comparisons to report on, and the report of one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from made_comparison import AP, HOSTILE, PAIRS, build

from ghm_d2.reports.page.write import write_report
from ghm_d2.reports.report import Report


@pytest.fixture
def comparison(tmp_path) -> Callable[..., Path]:
    """Return `build` for the test's own folder."""
    return partial(build, tmp_path)


@pytest.fixture(scope="session")
def full_report(tmp_path_factory) -> Report:
    """A report with every section, all of whose names are hostile."""
    ap = {f"{name} {HOSTILE}": values for name, values in AP.items()}
    pairs = [(f"{a} {HOSTILE}", f"{b} {HOSTILE}", f"{q} {HOSTILE}") for a, b, q in PAIRS]
    folder = build(
        tmp_path_factory.mktemp("full"),
        ap,
        pairs,
        noise=True,
        labels=(f"RBC {HOSTILE}", "$\\frac{1$", "_x"),
        name=f"two-stage {HOSTILE}",
        dataset=f"cells {HOSTILE}",
        question=f"Is it so? {HOSTILE}",
        command=f"ghm compare {HOSTILE}",
    )
    return write_report(folder)
