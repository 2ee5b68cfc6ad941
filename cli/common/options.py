"""Options that several commands share."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ghm_d2.errors import UsageError

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY VALUE]...", help="Configuration keys to set, and their values."),
]
Dataset = Annotated[
    str | None,
    typer.Option(help="A registered data set, such as digits, or a folder from ghm data import."),
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:N or mps; auto uses cuda if possible.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
NumGPUs = Annotated[
    int, typer.Option(help="Processes on this machine: one per GPU, or any number on a CPU.")
]
NumMachines = Annotated[int, typer.Option(help="Machines in all; start this command on each one.")]
Rdzv = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="HOST:PORT of one machine that all others can reach."),
]
OF_DATA = {"DATASETS.TRAIN": "--dataset", "DATASETS.TEST": "--dataset"}
# so that negative values of overrides are not taken for options
PASS_UNKNOWN = {"ignore_unknown_options": True}


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
        raise UsageError(f"{option} {folder} cannot be written: {error.strerror}") from None


def check_overrides(overrides: Sequence[str], **others: str) -> None:
    """Refuse overrides of keys that options set: MODEL.DEVICE, OUTPUT_DIR and `others`.

    Raises:
        UsageError: there is one.
    """
    options = {"MODEL.DEVICE": "--device", "OUTPUT_DIR": "--output"} | others
    for key in overrides[::2]:
        if key in options:
            raise UsageError(f"set {key} with the option {options[key]}")
