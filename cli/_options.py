"""Options that several commands share."""

import re
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ghm_d2.errors import UsageError

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY VALUE]...", help="Configuration keys and their values."),
]
Dataset = Annotated[
    str | None,
    typer.Option(help="A registered data set, such as digits, or a folder from ghm data import."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps; auto takes a GPU if it can.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
# so that negative values of overrides are not taken for options
PASS_UNKNOWN = {"ignore_unknown_options": True}


def pick_device(device: str) -> str:
    """The torch device that `device` stands for.

    Raises:
        UsageError: it is unknown, or not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise UsageError(f"--device is auto, cpu, cuda or mps, not {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("no CUDA device here; use --device auto, and see ghm doctor")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("no MPS device here; use --device auto, and see ghm doctor")
    return device


def make_folder(folder: Path, option: str = "--output") -> None:
    """Make `folder` and try to write into it.

    Raises:
        UsageError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{option} {folder}: {error.strerror}") from None


def set_device(cfg, device: str, overrides: list[str]) -> None:
    """Enter --device into MODEL.DEVICE, which no override may name too.

    Raises:
        UsageError: one does; or the device is unknown or not there.
    """
    for key, option in (("MODEL.DEVICE", "--device"), ("OUTPUT_DIR", "--output")):
        if key in overrides[::2]:
            raise UsageError(f"{key} is what the option {option} sets")
    cfg.MODEL.DEVICE = pick_device(device)
