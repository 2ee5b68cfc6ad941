"""Find the checkpoint that a run resumes from: the last intact one in its folder."""

import math
import os
import re
import zipfile

from ghm_d2.errors import WeightsError
from ghm_d2.modeling.weights.weight_files import read_weights
from ghm_d2.run_folder import FINAL_WEIGHTS, LAST_CHECKPOINT

_LONGEST_NAME = 255
_CHECKPOINT = re.compile(r"model_(\d+|final)\.pth")  # model_best has no training state


def has_checkpoint(folder: str) -> bool:
    """Return whether a folder has a checkpoint, or a `last_checkpoint` file."""
    return os.path.exists(os.path.join(folder, LAST_CHECKPOINT)) or bool(_names_in(folder))


def find_checkpoint(folder: str) -> tuple[str, list[str]]:
    """Return the path of the checkpoint to resume from, and a line for each that was skipped.

    The checkpoint named in `last_checkpoint` is chosen if it is intact; every byte is checked.
    Otherwise the newest intact checkpoint that is not newer is chosen, or the newest of all if
    `last_checkpoint` holds no file name. A line says what was skipped, why, and what replaces it.

    Raises:
        WeightsError: no checkpoint is intact.
    """
    noted, fault = _noted(folder)
    if noted:
        fault = damage(os.path.join(folder, noted))
        if not fault:
            return os.path.join(folder, noted), []
    passed = [f"{noted or LAST_CHECKPOINT} {fault}"]
    for name in _earlier(folder, noted):
        fault = damage(os.path.join(folder, name))
        if not fault:
            used = f"{name} is used instead"
            return os.path.join(folder, name), [f"{folder}: {why}; {used}" for why in passed]
        passed.append(f"{name} {fault}")
    shown = ", ".join(passed[:3]) + (", ..." if len(passed) > 3 else "")
    raise WeightsError(
        f"{folder} has no intact checkpoint to resume from: {shown}; restore one and write its "
        f"name into {LAST_CHECKPOINT}, or start again with --overwrite"
    )


def damage(path: str) -> str:
    """Return the fault of a file of `torch.save`, such as "is empty"; "" if it is intact.

    PyTorch writes checksums, but does not check them when it reads.
    """
    if not os.path.isfile(path):
        return "is missing"
    if not os.path.getsize(path):
        return "is empty"
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except Exception as error:  # a damaged file can raise nearly anything
        return f"is damaged ({error})"
    return f"is damaged (in {bad})" if bad else ""


def _names_in(folder: str) -> list[str]:
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return [name for name in names if _CHECKPOINT.fullmatch(name)]


def _noted(folder: str) -> tuple[str, str]:
    """Return the name in `last_checkpoint` and "", or "" and the fault of that file."""
    try:
        with open(os.path.join(folder, LAST_CHECKPOINT), "rb") as file:
            name = file.read(_LONGEST_NAME + 1).decode(errors="replace").strip()
    except FileNotFoundError:
        return "", "is missing"
    except OSError as error:
        return "", f"cannot be read ({error.strerror})"
    # A folder from someone else must not lead to files outside it
    plain = name.isprintable() and len(name) <= _LONGEST_NAME and not name.startswith(".")
    if not name or not plain or os.path.basename(name) != name:
        return "", f"names {name[:80]!r}, which is not a file in this folder"
    return name, ""


def _earlier(folder: str, noted: str) -> list[str]:
    """List the other checkpoints that are not newer than `noted`, newest first; all if it is ""."""
    ages = {name: _iteration(folder, name) for name in _names_in(folder) if name != noted}
    newest = _iteration(folder, noted)
    return sorted((n for n in ages if ages[n] <= newest), key=ages.get, reverse=True)


def _iteration(folder: str, name: str) -> float:
    """Return the iteration at which a checkpoint was saved; infinity if it is unknown."""
    named = _CHECKPOINT.fullmatch(name)
    if named and name != FINAL_WEIGHTS:
        return int(named[1])
    path = os.path.join(folder, name)
    if not named or damage(path):
        return math.inf
    found = read_weights(path)  # an extended run has checkpoints newer than its first model_final
    iteration = found.get("iteration") if isinstance(found, dict) else None
    return iteration if isinstance(iteration, int) else math.inf
