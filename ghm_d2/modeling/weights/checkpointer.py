"""Saving and loading checkpoints: files are read as data and written atomically."""

import os
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qs

import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import _filter_reused_missing_keys
from torch import nn

from ghm_d2.errors import WeightsError
from ghm_d2.files import write_atomically
from ghm_d2.modeling.weights import last_whole
from ghm_d2.modeling.weights.fetch import fetch
from ghm_d2.modeling.weights.mmdet_weights import from_mmdet, is_mmdet
from ghm_d2.modeling.weights.weight_files import read_weights, state_dict_of
from ghm_d2.modeling.yolov3 import darknet_weights
from ghm_d2.run_folder import LAST_CHECKPOINT

_MOST_NAMED = 12  # most tensors or modules that one line names


# errors that the unexpected contents of a readable file lead to
_MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class LoadReport(NamedTuple):
    """A report on loaded weights: which tensors fitted the model, and which did not.

    `loaded` counts the file's tensors that went into the model. `missing` are the model's names
    that the file lacks, and `unexpected` the file's names that the model lacks. `mismatched` has
    (name, shape in the file, shape in the model) for names whose shapes differ. `origin` is a line
    on weights that were converted from another project; "" for others.
    """

    path: str
    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    origin: str = ""

    def warnings(self) -> list[str]:
        """Return lines on the origin, unused keys, resized predictors and missing tensors."""
        anew = [f"{name} {theirs} -> {ours}" for name, theirs, ours in self.mismatched]
        left = "tensors of the model are missing in the file and keep their initial values"
        said = (
            _count(self.unexpected, "tensors of the file are not in the model and were not used"),
            anew and f"tensors of another shape keep their initial values: {', '.join(anew)}",
            _count(self.missing, left),
        )
        lines = [f"{self.path}: {line}" for line in said if line]
        return [self.origin, *lines] if self.origin else lines


class GHMCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with every file read as data and written atomically.

    Like Detectron2's it accepts local paths, http(s):// and detectron2:// addresses, .pkl of the
    model zoo and Caffe2, .pyth of pycls and files of `torch.save`. It also accepts .safetensors;
    darknet's .weights, .backup and .conv.74, for models with darknet's layers; and RetinaNets of
    mmdetection and GHM's authors, for a RetinaNet. Nothing in a file is executed (see
    `ghm_d2.modeling.weights.weight_files`).

    Attributes:
        report: the `LoadReport` of the last `load`, None before it.
        fallbacks: a line for each checkpoint or `last_checkpoint` file that the last call of
            `get_checkpoint_file` skipped: which, why, and what is used instead.
    """

    def __init__(self, model: nn.Module, save_dir: str | os.PathLike = "", **kwargs: Any):
        """Take Detectron2's arguments."""
        super().__init__(model, os.fspath(save_dir), **kwargs)
        self.report: LoadReport | None = None
        self.fallbacks: list[str] = []
        self._name, self._heuristics, self._origin = "", False, ""  # of the file being loaded

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint, or nothing if `path` is empty.

        Args:
            path: the file's path or address. If "?matching_heuristics=True" follows it, names
                are matched by their suffixes, as for the model zoo's backbones.
            checkpointables: names of objects to load beside the model; None: all that were added.

        Returns:
            The other contents of the file, such as "iteration".

        Raises:
            WeightsError: the file is missing, cannot be fetched, is damaged or tries to load
                anything but data, or none of its tensors fits the model.
        """
        self.report = None
        if not path:
            return super().load(path, checkpointables)
        path, self._heuristics = _split_query(path)
        self._name, self._origin = path, ""
        self._parsed_url_during_load = None  # Detectron2's main leaves it set when a load fails
        try:
            return super().load(fetch(path), checkpointables)
        except _MISFITS as error:
            reason = str(error).partition("\n")[0]
            raise WeightsError(f"{path} does not fit this run: {reason}") from error

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `name`.pth into `save_dir` atomically, and name it in `last_checkpoint`.

        Args:
            name: the file's name without folder and ending.
            **kwargs: plain data to save beside the state dicts: numbers, strings, tensors and
                containers of them. Anything else could not be loaded again.

        Raises:
            OutputError: the file cannot be written. Earlier checkpoints and `last_checkpoint` are
                unchanged.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: held.state_dict() for key, held in self.checkpointables.items()}
        self._write(name, {**states, **kwargs})
        self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **kwargs: Any) -> None:
        """Save the model alone, in a file that does not become the checkpoint to resume from."""
        if self.save_dir and self.save_to_disk:
            self._write(name, kwargs)

    def _write(self, name: str, beside: dict[str, Any]) -> None:
        if os.path.basename(name) != name:
            raise ValueError(f"the name of a checkpoint must not contain a folder: {name!r}")
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        data = {"model": self.model.state_dict(), **beside}
        self._replace(path, lambda file: torch.save(data, file))

    def _replace(self, path: str, write: Callable[[BinaryIO], Any]) -> None:
        if "://" in path:  # PathManager's remote stores cannot rename files
            with self.path_manager.open(path, "wb") as file:
                write(file)
        else:
            write_atomically(path, write)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write a checkpoint's name into `last_checkpoint`, for `get_checkpoint_file`."""
        name = last_filename_basename.encode()
        self._replace(os.path.join(self.save_dir, LAST_CHECKPOINT), lambda f: f.write(name))

    def has_checkpoint(self) -> bool:
        """Return whether `save_dir` has a checkpoint or a `last_checkpoint` file."""
        return last_whole.has_checkpoint(self.save_dir)

    def get_checkpoint_file(self) -> str:
        """Return the checkpoint in `save_dir` to resume from, "" if none; sets `fallbacks`.

        Raises:
            WeightsError: there are checkpoints or a `last_checkpoint` file, but none is intact.
        """
        self.fallbacks = []
        if not self.has_checkpoint():
            return ""
        path, self.fallbacks = last_whole.find_checkpoint(self.save_dir)
        return path

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(darknet_weights.ENDINGS):
            return {"model": darknet_weights.read_darknet_weights(filename, self.model)}
        loaded = read_weights(filename)
        if filename.endswith(".pyth"):  # pycls
            state = state_dict_of(loaded, filename, ("model_state",))
            state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
            return {"model": state, "__author__": "pycls", "matching_heuristics": True}
        zoo = isinstance(loaded, dict) and {"model", "__author__"} <= loaded.keys()
        if filename.endswith(".pkl") and not zoo:
            # from Caffe2: detection models of Detectron 1 have "blobs", its ImageNet models do not
            state = state_dict_of(loaded, filename, ("blobs",))
            state = {k: v for k, v in state.items() if not k.endswith("_momentum")}
            return {"model": state, "__author__": "Caffe2", "matching_heuristics": True}
        state = state_dict_of(loaded, filename, ("model", "state_dict"))
        if is_mmdet(state):
            state, self._origin = from_mmdet(state, loaded.get("meta"), self.model, self._name)
            return {"model": state}
        checkpoint = loaded if "model" in loaded else {"model": state}
        if self._heuristics:
            checkpoint["matching_heuristics"] = True
        return checkpoint

    def _load_model(self, checkpoint: Any):
        held = len(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        unexpected = tuple(incompatible.unexpected_keys)
        mismatched = tuple(incompatible.incorrect_shapes)
        missing = set(_filter_reused_missing_keys(self.model, incompatible.missing_keys))
        missing -= {name for name, _, _ in mismatched}
        loaded = held - len(unexpected) - len(mismatched)
        left = tuple(sorted(missing))
        self.report = LoadReport(self._name, loaded, left, unexpected, mismatched, self._origin)
        if not loaded:
            has = ", ".join([*unexpected, *(name for name, *_ in mismatched)][:3])
            raise WeightsError(
                f"{self._name} belongs to another model: none of its {held} tensors fits this one; "
                f"it has {has}, ..."
            )
        self._check_sizes(mismatched)
        return incompatible

    def _check_sizes(self, mismatched) -> None:
        """Refuse shapes that differ in more than the number of outputs, as for other classes."""
        parameters = dict(self.model.named_parameters())
        for name, theirs, ours in mismatched:
            if name in parameters and theirs[1:] != ours[1:]:
                raise WeightsError(
                    f"{self._name} belongs to another architecture: {name} is {theirs} in the "
                    f"file and {ours} in the model; use the configuration that it was trained with"
                )


def _split_query(path: str) -> tuple[str, bool]:
    """Return the path without Detectron2's query, and whether that asks for name matching."""
    bare, mark, query = path.rpartition("?")
    if not mark or os.path.exists(path):
        return path, False
    asked = parse_qs(query)
    if asked.pop("matching_heuristics", ["False"]) == ["True"] and not asked:
        return bare, True
    return path, False


def _count(names: tuple[str, ...], what: str) -> str:
    """Count and list names, or the modules that hold them if they are many; "" for none."""
    groups, depth = dict.fromkeys(names), max((name.count(".") for name in names), default=0)
    while len(groups) > _MOST_NAMED and depth:
        groups = dict.fromkeys(".".join(name.split(".")[:depth]) for name in names)
        depth -= 1
    shown = [*list(groups)[:_MOST_NAMED], *["..."] * (len(groups) > _MOST_NAMED)]
    return f"{len(names)} {what}: {', '.join(shown)}" if names else ""
