"""ghm doctor: what is installed, what is missing, and the command that mends it."""

import importlib
import importlib.metadata as metadata
import json
import platform
import re
import shlex
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from ._console import emit, err, out, user_errors
from ._options import Json

# What each is good for; none of them is needed to train and evaluate.
OPTIONAL = {
    "opencv-python-headless": "drawing masks with Detectron2's visualizer",
    "triton": "the fused loss kernels on CUDA",
    "pytest": "the tests",
    "supervision": "the tests",
    "ruff": "the linter",
}
OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python")
DETECTRON2_SOURCE = "git+https://github.com/facebookresearch/detectron2.git"
TESTED_PYTHONS = ((3, 10), (3, 13))


@dataclass
class Finding:
    """One line of the report. `status` is ok, missing, too old, broken or untested."""

    name: str
    version: str | None
    status: str = "ok"
    needed: bool = True
    detail: str = ""
    mend: str | None = None

    @property
    def fatal(self) -> bool:
        return self.needed and self.status in ("missing", "too old", "broken")


def doctor(as_json: Json = False) -> None:
    """Show what is installed, what is missing and the command that mends it."""
    with user_errors():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            findings = examine()
        report = {
            "ok": not any(finding.fatal for finding in findings),
            "platform": platform.platform(),
            "python": sys.executable,
            "findings": [asdict(finding) for finding in findings],
        }
        emit(report, as_json=as_json, human=lambda: show(findings))
        if not report["ok"]:
            raise typer.Exit(2)


def examine() -> list[Finding]:
    """Look at everything, most fundamental first."""
    required = requirements()
    packages = {name: look_up(name, minimum) for name, minimum in required.items()}
    special = {"torch": check_torch, "torchvision": check_torchvision}
    for name, check in special.items():
        if packages[name].status == "ok":
            check(packages[name])
    detectron2 = check_detectron2()
    optional = [look_up_optional(name, use) for name, use in OPTIONAL.items()]
    first = [packages.pop(name) for name in special]
    kernels = check_kernels()
    return [check_python(), *first, detectron2, kernels, *packages.values(), *optional]


def requirements() -> dict[str, str | None]:
    """Every package that ours requires, with the least version, as its own metadata has it."""
    found = {}
    for line in metadata.requires("ghm_d2") or []:
        if "extra ==" in line:
            continue
        name = re.match(r"[\w.-]+", line).group()
        minimum = re.search(r">=\s*([\d.]+)", line)
        found[name] = minimum.group(1) if minimum else None
    return found


def look_up(name: str, minimum: str | None = None) -> Finding:
    """A package's version, from its metadata: it need not import for that."""
    mend = pip("install", f"{name}>={minimum}" if minimum else name)
    version = version_of(name)
    if version is None:
        return Finding(name, None, "missing", mend=mend)
    if minimum and release(version) < release(minimum):
        return Finding(name, version, "too old", detail=f"needs {minimum} or newer", mend=mend)
    return Finding(name, version)


def look_up_optional(name: str, use: str) -> Finding:
    names = OPENCV if name in OPENCV else (name,)
    version = next(filter(None, map(version_of, names)), None)
    if version:
        return Finding(name, version, needed=False, detail=f"for {use}")
    return Finding(name, None, "missing", False, f"optional: for {use}", pip("install", name))


def check_python() -> Finding:
    finding = Finding("Python", platform.python_version(), detail=sys.executable)
    oldest, newest = TESTED_PYTHONS
    if not oldest <= sys.version_info[:2] <= newest:
        finding.status = "untested"
        finding.mend = "make distclean setup PYTHON=python3.12"
    return finding


def check_torch(finding: Finding) -> None:
    """Whether torch imports, and the devices that it sees."""
    torch = try_import("torch", finding)
    if torch is None:
        finding.mend = pip("install", "--force-reinstall", "torch", "torchvision")
        return
    with warnings.catch_warnings(record=True) as caught:  # such as: the driver is too old
        warnings.simplefilter("always")
        cuda = torch.cuda.is_available()
    if cuda:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        finding.detail = f"CUDA {torch.version.cuda}: {', '.join(names)}"
    elif torch.backends.mps.is_available():
        finding.detail = "MPS"
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU"
        reason = "".join(f"; {first_line(warning.message)}" for warning in caught[:1])
        finding.detail = f"CPU only here ({built}{reason})"


def check_torchvision(finding: Finding) -> None:
    """Whether its compiled ops load: they do not when it was built for another torch."""
    finding.mend = pip("install", "--upgrade", "torch", "torchvision")
    ops = try_import("torchvision.ops", finding)
    if ops is None:
        return
    try:
        import torch

        ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:
        finding.status = "broken"
        finding.detail = f"does not fit this torch: {first_line(error)}"
    else:
        finding.mend = None


def check_detectron2() -> Finding:
    """Its version, origin and compiled ops; any build that imports will do."""
    finding = Finding("detectron2", version_of("detectron2"), mend=detectron2_command())
    module = try_import("detectron2", finding)
    if module is None:
        if finding.status == "broken":
            finding.mend = f"{pip('uninstall', 'detectron2')} && {finding.mend}"
        return finding
    if not hasattr(module, "__version__"):  # any folder of that name imports
        finding.status, finding.detail = "broken", f"{list(module.__path__)} is not Detectron2"
        return finding
    finding.version = finding.version or module.__version__
    if try_import("detectron2.model_zoo", finding) is None:  # which imports nearly all of it
        if "pkg_resources" in finding.detail:
            finding.mend = pip("install", "setuptools<81")
        return finding
    finding.mend = None
    finding.detail = f"{detectron2_origin(finding.version, module)}; {compiled_ops(finding)}"
    return finding


def check_kernels() -> Finding:
    """Whether the C library of the losses was built."""
    finding = Finding("loss kernels", None, needed=False)
    kernels = try_import("ghm_d2.kernels", finding)
    if kernels is None:
        return finding
    finding.detail = "C on the CPU"
    if not kernels.cpu.available():
        finding.status = "missing"
        finding.detail = "not built, which takes gcc or clang: plain PyTorch instead, slower"
        finding.mend = install_again()
    return finding


def install_again() -> str:
    """How to install ghm_d2 anew, from a checkout where this is one."""
    root = Path(__file__).resolve().parents[1]
    words = ["--editable", str(root)] if (root / "setup.py").is_file() else ["ghm_d2"]
    return pip("install", "--no-deps", "--force-reinstall", *words)


def compiled_ops(finding: Finding) -> str:
    """Whether Detectron2's extension is there; having none is fine, one that fails is not."""
    try:
        importlib.import_module("detectron2._C")
    except ModuleNotFoundError:
        return "no compiled ops"
    except ImportError as error:
        finding.status = "broken"
        finding.mend = pip("install", "--force-reinstall", "--no-deps", *source_build())
        return f"its compiled ops do not load: {first_line(error)}"
    return "with compiled ops"


def detectron2_origin(version: str, module) -> str:
    """Where the installed Detectron2 came from, as far as it can be told."""
    if "+ghm." in version:
        return "by tools/detectron2_wheel.py"
    try:
        source = json.loads(metadata.distribution("detectron2").read_text("direct_url.json") or "")
    except (metadata.PackageNotFoundError, ValueError):
        return f"in {Path(module.__file__).parent}"
    commit = source.get("vcs_info", {}).get("commit_id", "")
    return f"from {source['url']}" + (f" at {commit[:10]}" if commit else "")


def detectron2_command() -> str:
    """How to get a Detectron2: this checkout's tool, or a build from source without a checkout."""
    tool = Path(__file__).resolve().parents[1] / "tools" / "detectron2_wheel.py"
    if tool.is_file():
        return shlex.join([sys.executable, str(tool)])
    return pip("install", *source_build())


def source_build() -> list[str]:
    return ["--no-build-isolation", DETECTRON2_SOURCE]


def try_import(name: str, finding: Finding):
    """Import a module; when that fails, say so in `finding` and return None."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken native library raises OSError, RuntimeError, ...
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        finding.status = "missing" if absent else "broken"
        finding.detail = "" if absent else first_line(error)
        return None


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: 2.14.1+cu130 is (2, 14, 1)."""
    return tuple(map(int, re.match(r"\d+(?:\.\d+)*", version).group().split(".")))


def pip(*arguments: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", *arguments])


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def show(findings: list[Finding]) -> None:
    """The findings, then the commands, each on a line of its own to copy."""
    if out.is_terminal:
        show_table(findings)
    else:
        for f in findings:
            line = f"{f.name:34}{f.version or '-':20}{f.status:10}{f.detail}".rstrip()
            out.print(line, markup=False, highlight=False)
    for heading, fatal in (("To mend this:", True), ("Optional:", False)):
        commands = [f.mend for f in findings if f.mend and f.fatal == fatal]
        if commands:
            out.print(heading)
            for command in dict.fromkeys(commands):
                out.print(f"  {command}", markup=False, highlight=False)
    if any(finding.fatal for finding in findings):
        err.print("Something that training needs is missing or broken, see above.")
    else:
        out.print("All that training and evaluation need is there.")


def show_table(findings: list[Finding]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "version", "status"):
        table.add_column(column, no_wrap=True)
    table.add_column(overflow="fold")
    for f in findings:
        colour = "red" if f.fatal else "green" if f.status == "ok" else "yellow"
        table.add_row(f.name, f.version or "-", f"[{colour}]{f.status}[/]", escape(f.detail))
    out.print(table)
