"""Imports go downwards only:

cli -> experiments, reports -> analysis -> training, inference -> modeling, data -> losses
-> kernels

config, records, files, locks, progress, run_folder and errors are leaves that anyone may import;
register imports modeling; describe reads a cfg and a model for a record; training may import
inference, never the other way round; reports see records only, and neither torch nor Detectron2.
Only the figures of a report and its page load matplotlib: plans and tables do without it.
"""

import ast
import graphlib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"version", "config", "configs", "records", "files", "locks", "errors", "progress"}
LEAVES |= {"run_folder"}
MODELS = {"modeling", "data", "losses", "kernels", "register", "describe"}
ALLOWED = {
    "cli": {
        "reports",
        "experiments",
        "analysis",
        "training",
        "inference",
        *MODELS,
        *LEAVES,
    },
    "reports": {"records", "files", "errors", "run_folder"},
    "experiments": {"analysis", "training", "inference", *MODELS, *LEAVES},
    "analysis": {"training", "inference", *MODELS, *LEAVES},
    "training": {"inference", *MODELS, *LEAVES},
    "inference": {*MODELS, *LEAVES},
    "describe": LEAVES,
    "register": {"modeling", *LEAVES},
    "modeling": {"losses", "kernels", *LEAVES},
    "data": {"losses", "kernels", *LEAVES},
    "losses": {"kernels", *LEAVES},
    "kernels": LEAVES,
    "config": {"configs", "errors"},
    "records": {"files", "errors", "run_folder"},
    "files": {"errors"},
    "locks": {"errors", "run_folder"},
    "progress": set(),
    "configs": set(),
    "run_folder": set(),
    "errors": set(),
    "version": set(),
}
HEAVY = {"torch", "torchvision", "detectron2", "fvcore"}
DRAWN = ("ghm_d2.reports.figures", "ghm_d2.reports.page.contents", "ghm_d2.reports.page.write")
LIGHT_LAYERS = {"reports", "records", "files", "errors", "version", "configs", "run_folder"}


def layer(module: str) -> str:
    """ "losses" of "ghm_d2.losses.ghm_c"; the package itself holds the version."""
    return module.split(".")[1] if "." in module else "version"


def sources() -> dict[Path, str]:
    """The text of every module of the package by its path from the root.

    The files of configs/lazy are no modules: Detectron2's LazyConfig runs them.
    """
    files = [
        file for folder in ("ghm_d2", "cli", "configs") for file in ROOT.glob(f"{folder}/**/*.py")
    ]
    files = [file for file in files if file.parent != ROOT / "configs" / "lazy"]
    return {file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in files}


def module_name(file: Path) -> str:
    """The name that the module of a path from the root is imported by."""
    parts = file.with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts if parts[0] == "ghm_d2" else ("ghm_d2", *parts))


@cache
def imports(file: Path, text: str) -> frozenset[str]:
    """Return all names a module imports, within functions too; "a.b.c" for `from a.b import c`."""
    module = module_name(file)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.rsplit(".", node.level - 1)[0]
                base = f"{parent}.{base}".rstrip(".")
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            name = getattr(node.args[0], "value", None)
            if called in ("import_module", "__import__") and isinstance(name, str):
                names.add(name)
    return frozenset(names)


def import_graph(texts: dict[Path, str]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Return for each module of ours the imported ones of ours, and others' top-level names."""
    known = {module_name(file): file for file in texts}
    ours, others = {}, {}
    for module, file in known.items():
        ours[module], others[module] = set(), set()
        for name in imports(file, texts[file]):
            if name.partition(".")[0] != "ghm_d2":
                others[module].add(name.partition(".")[0])
                continue
            while name not in known and "." in name:  # a function or class: its module
                name = name.rpartition(".")[0]
            ours[module].add(name)
    return ours, others


def drawing(ours: dict[str, set[str]], others: dict[str, set[str]]) -> set[str]:
    """Return the modules that import matplotlib, directly or through other modules of ours."""
    found: set[str] = set()
    added = {module for module, imported in others.items() if "matplotlib" in imported}
    while added - found:
        found |= added
        added = {module for module, imported in ours.items() if imported & found}
    return found


def violations(texts: dict[Path, str]) -> list[str]:
    ours, others = import_graph(texts)
    found = []
    for module, imported in ours.items():
        allowed = ALLOWED.get(layer(module))
        if allowed is None:
            found.append(f"{module} is in no layer")
            continue
        for name in imported:
            if layer(name) != layer(module) and layer(name) not in allowed:
                found.append(f"{module} imports {name}")
    for module, imported in others.items():
        if layer(module) in LIGHT_LAYERS:
            found += [f"{module} imports {name}" for name in imported & HEAVY]
    # commands draw too; they import the page in their bodies
    drawn = {name for name in drawing(ours, others) if layer(name) != "cli"}
    found += [f"{name} loads matplotlib" for name in drawn if not name.startswith(DRAWN)]
    try:
        graphlib.TopologicalSorter(ours).prepare()
    except graphlib.CycleError as error:
        found.append(f"cycle: {' -> '.join(error.args[1])}")
    return found


def test_imports_go_downwards():
    assert violations(sources()) == []


def test_the_walk_sees_the_project():
    ours, others = import_graph(sources())
    assert "ghm_d2.kernels.reference" in ours["ghm_d2.losses.ghm_c"]
    assert "ghm_d2.modeling.retinanet" in ours["ghm_d2.register"]  # within a function
    assert "ghm_d2.cli.train" in ours["ghm_d2.cli.app"]  # relative
    assert "detectron2" in others["ghm_d2.config.loader"]
    assert {layer(module) for module in ours} >= {"cli", "training", "data", "reports"}


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ghm_d2/kernels/reference.py", "import ghm_d2.losses.reduce"),
        ("ghm_d2/losses/density/gradient_density.py", "from ghm_d2.modeling import retinanet"),
        (
            "ghm_d2/losses/density/gradient_density.py",
            "from ..modeling.two_stage.rpn import GHMRPN",
        ),
        ("ghm_d2/modeling/two_stage/rpn.py", "from ghm_d2.data.digits import draw"),
        ("ghm_d2/modeling/two_stage/rpn.py", "from ghm_d2 import register"),
        ("ghm_d2/data/digits/draw.py", "from ghm_d2.modeling import rpn"),
        ("ghm_d2/data/masks.py", "from ..training import trainer"),
        ("ghm_d2/training/hooks.py", "from ghm_d2.cli.common.console import out"),
        ("ghm_d2/training/hooks.py", "from ghm_d2.reports import tables"),
        ("ghm_d2/training/hooks.py", "importlib.import_module('ghm_d2.reports.tables')"),
        ("ghm_d2/reports/tables.py", "import torch.nn"),
        ("ghm_d2/reports/tables.py", "from detectron2.structures import Boxes"),
        ("ghm_d2/reports/runs.py", "import matplotlib.pyplot"),
        (
            "ghm_d2/reports/statistics/steadiness.py",
            "from ghm_d2.reports.figures.training import kind_of",
        ),
        ("ghm_d2/reports/tables.py", "from ghm_d2.config import load_config"),
        ("ghm_d2/reports/tables.py", "from ghm_d2.training import hooks"),
        ("ghm_d2/inference/load.py", "from ghm_d2.training import trainer"),
        ("ghm_d2/training/train.py", "from ghm_d2.analysis import analyse"),
        ("ghm_d2/records.py", "import torch"),
        ("ghm_d2/records.py", "from ghm_d2 import config"),
        ("ghm_d2/errors.py", "from ghm_d2 import files"),
        ("ghm_d2/config/keys.py", "from ghm_d2.losses import GHMC"),
        ("ghm_d2/__init__.py", "from ghm_d2.losses import GHMC"),
        ("ghm_d2/extras.py", ""),
        ("ghm_d2/losses/reduce.py", "from ghm_d2.losses import asl1"),
    ],
)
def test_forbidden_import_is_found(file, line):
    texts = sources()
    texts[Path(file)] = texts.get(Path(file), "") + f"\n\ndef _added():\n    {line or 'pass'}\n"
    assert set(violations(texts)) - set(violations(sources()))
