"""Options that several commands share."""

import re
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


def data_label(dataset: str | None, registered: str) -> str:
    """A short name of the data: the folder's, or the registered name without its split."""
    if dataset and Path(dataset).is_dir():
        return Path(dataset).resolve().name
    return re.sub(r"_(train|val|test)$", "", dataset or registered)
