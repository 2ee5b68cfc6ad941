#!/usr/bin/env python3
"""Gathers what benchmarks/gpu.py needs on a machine without a network, into build/gpu-pack/.

    python benchmarks/gpu_pack.py

That machine must have Linux on x86_64, Python 3.12, and torch 2.11 with torchvision, triton, timm,
typer and rich; the wheels hold the rest. Run there, in a copy of this repository with the pack:

    sh build/gpu-pack/install.sh
    python3 benchmarks/gpu.py
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / "build" / "gpu-pack"
PYTHON, MOST_MB = "3.12", 40
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
DOWNLOADED = (
    "cloudpickle", "defusedxml", "faster-coco-eval", "hypothesis", "iniconfig", "msgspec",
    "omegaconf", "packaging", "pluggy", "portalocker", "pycocotools", "pygments", "pytest",
    "pyyaml", "safetensors", "sortedcontainers", "tabulate", "termcolor", "tqdm", "yacs",
    "mmdet==3.3.0",  # its file of GHM losses is timed; the rest needs mmcv, and is not imported
)  # fmt: skip
# pure Python, but on PyPI only as sources
BUILT = ("antlr4-python3-runtime", "fvcore", "iopath")
INSTALL = """\
#!/bin/sh
# Installs missing packages and leaves the others unchanged. All arguments are passed to pip.
# usage: sh install.sh [--target DIR | --user | --break-system-packages ...]
set -e
here=$(dirname "$0")
pip() {{ python3 -m pip install --quiet --no-index --no-deps --find-links "$here" "$@"; }}
pip "$@" {names}
pip --force-reinstall "$@" "$here"/detectron2-*.whl "$here"/ghm_d2-*.whl
python3 -c 'import torch, detectron2, ghm_d2; print("ready: torch", torch.__version__)'
"""


def pip(*words: str) -> None:
    constraints = os.environ | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, env=constraints)


def download() -> None:
    target = ["--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:"]
    for platform in PLATFORMS:
        target += ["--platform", platform]
    pip("download", "--quiet", "--no-deps", "--dest", str(PACK), *target, *DOWNLOADED)


def build() -> None:
    """Build the wheels that cannot be downloaded; none has compiled code."""
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(PACK), *BUILT)
    tool = ROOT / "tools" / "detectron2_wheel.py"
    subprocess.run([sys.executable, str(tool), "--wheel-dir", str(PACK)], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(PACK), str(_sources(Path(scratch))))


def _sources(folder: Path) -> Path:
    """Copy the project without its C library, with which the wheel would fit only this Python."""
    for name in ("ghm_d2", "cli", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "_cpu.*", "cpu*.[ch]")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def main() -> None:
    shutil.rmtree(PACK, ignore_errors=True)
    PACK.mkdir(parents=True)
    download()
    build()
    names = " ".join((*DOWNLOADED, *BUILT))
    (PACK / "install.sh").write_text(INSTALL.format(names=names), encoding="utf-8")
    megabytes = sum(file.stat().st_size for file in PACK.iterdir()) / 1e6
    print(f"{PACK}: {len(list(PACK.glob('*.whl')))} wheels, {megabytes:.1f} MB")
    if megabytes > MOST_MB:
        sys.exit(f"error: the pack is larger than {MOST_MB} MB; leave packages out")


if __name__ == "__main__":
    main()
