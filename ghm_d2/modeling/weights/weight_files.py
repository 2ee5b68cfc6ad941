"""Weight files read as data: nothing in them is executed, whatever their name."""

import mmap
import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from ghm_d2.errors import WeightsError
from ghm_d2.modeling.weights.plain_pickle import load_plain_pickle


def _forget(self, *values) -> None:
    """Ignore the arguments that a file gives to an object that is not a tensor."""


# Endings of files that torch.save did not write: pickled NumPy arrays, and safetensors
_PICKLED_ARRAYS = ".pkl"
_SAFETENSORS = ".safetensors"
# A function that torch.load allows, under the two names that a pickle may use for it
_BYTEARRAY = re.compile(rb"c(?:builtins|__builtin__)\nbytearray\n")
# Stand-ins for classes that mmdetection and others save beside the weights, such as histories of
# losses: each accepts any arguments and keeps none
_STAND_INS = [
    type(name, (), {"__module__": module, "__init__": _forget, "__setstate__": _forget})
    for module, name in (
        ("mmengine.logging.history_buffer", "HistoryBuffer"),
        ("mmengine.config.config", "ConfigDict"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("builtins", "getattr"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    )
]
_NOT_WEIGHTS = {
    b"<": "a web page; download the file itself",
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` to get the file",
}


def read_weights(path: str) -> Any:
    """Return the contents of a weight file, on the CPU.

    Args:
        path: a local file. ".pkl" is read as a pickle of NumPy arrays (Detectron2's model zoo,
            Caffe2), ".safetensors" as that format, anything else as a file of `torch.save`.

    Returns:
        The saved object: usually a dict of tensors (for ".pkl", of NumPy arrays), or a dict whose
        "model" is such a dict.

    Raises:
        WeightsError: the file is missing, empty, damaged or not a weight file, or it tries to load
            anything but arrays and plain containers. Nothing in it is ever executed.
    """
    path = os.fspath(path)
    _check_start(path)
    if path.endswith(_PICKLED_ARRAYS):
        with open(path, "rb") as file:
            return load_plain_pickle(file, path)
    if path.endswith(_SAFETENSORS):
        return _read_safetensors(path)
    return _read_torch(path)


def state_dict_of(loaded: Any, path: str, keys: tuple[str, ...] = ("model",)) -> dict[str, Any]:
    """Return the dict of names to tensors or arrays in the result of `read_weights`.

    Args:
        loaded: that result. If it has none of the `keys`, it must itself be the dict.
        path: the file's path, for error messages.
        keys: keys that may hold the state dict, in order of preference.

    Raises:
        WeightsError: there is no such dict.
    """
    if isinstance(loaded, Mapping):
        loaded = next((loaded[key] for key in keys if key in loaded), loaded)
    if not isinstance(loaded, dict) or not loaded:
        raise WeightsError(f"{path} has no weights: it must be a dict of names to tensors")
    for name, value in loaded.items():
        if not isinstance(name, str) or not hasattr(value, "shape"):
            raise WeightsError(
                f"{path} has no weights: {name!r} is of type {type(value).__name__}, not a tensor"
            )
    return loaded


def _check_start(path: str) -> None:
    if not os.path.isfile(path):
        raise WeightsError(f"there is no weight file {path}")
    try:
        with open(path, "rb") as file:
            start = file.read(256).lstrip()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise WeightsError(f"{path} is empty: its download or save was interrupted; get it again")
    for prefix, what in _NOT_WEIGHTS.items():
        # A safetensors file starts with a length of eight bytes, which may look like a prefix
        if start.startswith(prefix) and not path.endswith(_SAFETENSORS):
            raise WeightsError(f"{path} is not a weight file but {what}")


def _check_bombs(path: str) -> None:
    """Refuse contents that make torch.load allocate without limit; torch.save writes none."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                packed = [m for m in file.infolist() if m.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise WeightsError(
                    f"{path} was refused: its parts are compressed and may unpack to any size; "
                    "torch.save never compresses"
                )
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if _BYTEARRAY.search(data):
                raise WeightsError(
                    f"{path} was refused: it tries to load a builtins.bytearray of any length; "
                    "nothing in it was executed"
                )
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path} is truncated or not a weight file ({_reason(error)})") from None


def _read_torch(path: str) -> Any:
    _check_bombs(path)
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        asked_for = re.search(r"GLOBAL (\S+)|unrecognized \w+ (.+)", str(error))
        if asked_for:
            raise WeightsError(
                f"{path} was refused: it tries to load {_plain(asked_for[1] or asked_for[2])}, but "
                "weights must be tensors and plain containers; nothing in it was executed"
            ) from None
        raise WeightsError(f"{path} is truncated or not a weight file ({_reason(error)})") from None


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsError(
            f"{path} is truncated or not a safetensors file ({_reason(error)})"
        ) from None


def _reason(error: Exception) -> str:
    # leave out the text before it: torch.load's advice to allow the execution of code
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    lines = (line.strip() for line in text.splitlines())
    return _plain(next(filter(None, lines), type(error).__name__))


def _plain(text: str) -> str:
    """Escape and shorten a text for the terminal, because parts of it come from a file."""
    return ascii(text)[1:-1][:200]
