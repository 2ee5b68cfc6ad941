"""What a run leaves behind as numbers: `RunRecord`, kept as run.json in the run's folder."""

import fcntl
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from ghm_d2.errors import DataError, OutputError
from ghm_d2.files import write_json
from ghm_d2.run_folder import RUN_FILE

COMPARISON_FILE = "comparison.json"
# What a stranger's run may not exceed: it must not take all memory, and its sums must be finite
_LONGEST_FILE, _LARGEST = 2**26, 1e15  # bytes
AP_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass
class RunRecord:
    """One training, or one evaluation, as tables and plots need it.

    AP figures are percentages, 0..100; None where they are not defined, such as APs on data
    without a small box.
    """

    method: str  # such as "RetinaNet GHM-C + GHM-R"
    network: str  # such as "ResNet-50-FPN"
    dataset: str
    config_hash: str
    seed: int
    status: str = "finished"  # "finished" | "interrupted" | "diverged" | "failed"
    iterations: int = 0
    device: str = ""
    code_version: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    s_per_iter: float | None = None  # median over the training's iterations
    ms_per_image: float | None = None  # inference alone, without loading
    peak_memory_mb: float | None = None  # on the device; on a CPU of the whole process
    train_seconds: float | None = None  # without evaluations
    metrics: dict[str, float | None] = field(default_factory=dict)  # keys AP_COLUMNS
    per_class: dict[str, float | None] = field(default_factory=dict)  # AP by class name
    # of masks, keys AP_COLUMNS; empty where the detector has none, and the others are of boxes
    mask_metrics: dict[str, float | None] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)  # "AP" and "iteration" of model_best
    outcome: str = ""  # what a run that did not finish says: "diverged at iteration 312: ..."
    gflops: float | None = None  # of one forward pass of one validation image (fvcore)
    loss_ms: float | None = None  # the losses of one batch, forward and backward
    loss_variation: float | None = None  # loss_cls: std / mean over the second half of training
    skipped_steps: int = 0  # steps whose loss or gradient was not finite, and that were left out
    bad_images: int = 0  # distinct training images that could not be read, and were replaced
    world_size: int = 1  # processes that trained together

    def write(self, folder: Path, name: str = RUN_FILE) -> None:
        """Write run.json, or `name`, into `folder`, whole or not at all."""
        write_json(Path(folder) / name, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """The record of the run in `folder`.

        Raises:
            DataError: there is none, or it is not one.
        """
        file = Path(folder) / RUN_FILE
        try:
            return _typed(cls, _json(file))
        except FileNotFoundError:
            raise DataError(f"{folder}: no {RUN_FILE}; is this the folder of a run?") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{file}: not the record of a run: {error!s:.200}") from None


@dataclass
class ComparedSide:
    """One side of a comparison: a configuration that is trained once a seed."""

    name: str  # such as "GHM-C + SL1"; unique in the comparison
    config: str
    overrides: list[str] = field(default_factory=list)  # KEY VALUE in turn, the search's included
    runs: list[str] = field(default_factory=list)  # a folder a seed, relative to the comparison's
    settings_of: str = ""  # the side whose search chose the overrides, where it was not its own


@dataclass
class Pair:
    """A difference a comparison is about: `side` minus `reference`, by side names."""

    side: str
    reference: str
    question: str  # such as "GHM within the one-stage family"


@dataclass
class Trial:
    """One run of the search for a side's setting, on a part of the training split."""

    side: str
    overrides: list[str]
    AP: float | None
    chosen: bool = False


@dataclass
class Comparison:
    """What was compared, kept as comparison.json in the comparison's folder."""

    name: str  # such as "two-stage vs one-stage"
    question: str
    dataset: str
    budget: str
    seeds: list[int]
    sides: list[ComparedSide]
    pairs: list[Pair]
    command: str = ""
    search: list[Trial] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write comparison.json into `folder`, whole or not at all."""
        write_json(Path(folder) / COMPARISON_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Comparison":
        """The comparison in `folder`.

        Raises:
            DataError: there is none, or it is not one.
        """
        file = Path(folder) / COMPARISON_FILE
        try:
            return _typed(cls, _json(file))
        except FileNotFoundError:
            raise DataError(f"{folder}: no {COMPARISON_FILE}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{file}: not a comparison: {error!s:.200}") from None


def _json(file: Path):
    """What `file` holds. Raises ValueError where it is no JSON, no plain file, or too long."""
    if not os.path.lexists(file):
        raise FileNotFoundError
    if not file.is_file() or file.stat().st_size > _LONGEST_FILE:
        raise ValueError(f"no plain file, or over {_LONGEST_FILE >> 20} MiB")
    return json.loads(file.read_text(encoding="utf-8"))


def _typed(kind, value, where: str = ""):
    """`value`, as JSON gave it, as `kind`: a dataclass, or a type of a dataclass's field.

    Raises:
        TypeError: it is something else; `where` it stands is named.
    """
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"{where or 'the whole'} is no object")
        kinds = get_type_hints(kind)
        return kind(**{k: _typed(kinds.get(k, object), v, k) for k, v in value.items()})
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        if isinstance(value, list):
            return [_typed(item, v, where) for v in value]
    elif get_origin(kind) is dict:
        _, item = get_args(kind)
        if isinstance(value, dict):
            return {k: _typed(item, v, where) for k, v in value.items()}
    elif not isinstance(value, int | float) or -_LARGEST < value < _LARGEST:
        number = kind in (float, float | None) and isinstance(value, int)
        if number or isinstance(value, kind):
            return value
    raise TypeError(f"{where} is {value!r:.40}")


class RunsTable:
    """An append-only table of runs, a JSON object a line, that several processes may write.

    A row: {"key": of the run, "folder": its name, "record": a RunRecord as a dict}.
    """

    def __init__(self, file: Path):
        self.file = Path(file)

    def append(self, row: dict) -> None:
        """Add one row; it is on the disk when this returns.

        Raises:
            OutputError: the file cannot be written; the rows before are whole.
        """
        line = json.dumps(row, sort_keys=True, allow_nan=False).encode() + b"\n"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._append(line)
        except OSError as error:
            raise OutputError.of(self.file, error) from error

    def _append(self, line: bytes) -> None:
        with open(self.file, "ab+") as table:
            fcntl.flock(table, fcntl.LOCK_EX)  # until it is closed
            if table.seek(0, os.SEEK_END):
                table.seek(-1, os.SEEK_END)
                if table.read() != b"\n":  # a writer was killed within its row
                    line = b"\n" + line
            table.write(line)
            table.flush()
            os.fsync(table.fileno())

    def rows(self) -> list[dict]:
        """All rows, oldest first; what a killed writer left of one is passed over."""
        if not self.file.is_file():
            return []
        rows = []
        for line in self.file.read_bytes().splitlines():
            try:
                row = json.loads(line)
                rows += [row] if {"key", "folder", "record"} <= row.keys() else []
            except (ValueError, AttributeError):
                continue
        return rows

    def latest(self, key: str) -> dict | None:
        """The last row of the run `key`, if there is one."""
        return next((row for row in reversed(self.rows()) if row["key"] == key), None)


def find_records(folder: Path) -> dict[str, RunRecord]:
    """The records of all runs below `folder`, by their paths in it and in the order of these.

    Raises:
        DataError: there is none, or a run.json that is not one.
    """
    folders = sorted(file.parent for file in Path(folder).rglob(RUN_FILE))
    if not folders:
        raise DataError(f"{folder}: no run in it: no {RUN_FILE}")
    return {run.relative_to(folder).as_posix(): RunRecord.read(run) for run in folders}


def config_hash(text: str) -> str:
    """A short name of a configuration's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def finite_or_none(value: float) -> float | None:
    """`value`, or None for the NaN that stands for "not defined", which JSON does not know."""
    return float(value) if math.isfinite(value) else None
