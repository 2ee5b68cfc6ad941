"""The numbers of runs and comparisons, kept as run.json, comparison.json and runs.jsonl."""

import fcntl
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

import msgspec

from ghm_d2.errors import DataError, OutputError
from ghm_d2.files import write_json
from ghm_d2.run_folder import RUN_FILE

COMPARISON_FILE = "comparison.json"
TABLE_FILE = "runs.jsonl"  # a `RunsTable`
AP_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
LVIS_COLUMNS = ("APr", "APc", "APf")  # of its rare, common and frequent classes
# Limits of a stranger's file: it must not take all memory, and sums of its numbers must be finite
_MOST_BYTES = 2**26
_LARGEST = 10**15
Int = Annotated[int, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]
Float = Annotated[float, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]
Number = Int | Float  # a whole number stays one
_Record = TypeVar("_Record")


@dataclass
class Schedule:
    """The length of a training and its images' sizes; a published figure belongs to a schedule."""

    iterations: Int
    batch: Int  # images a step, of all processes together
    decay: list[Int]  # iterations at which the learning rate falls
    sizes: list[Int]  # lengths of an image's shorter side in training, px


@dataclass
class SetFigures:
    """The figures of an evaluation on a data set after the first of DATASETS.TEST.

    Figures are as in `RunRecord`.
    """

    dataset: str  # such as "coco_2017_val", or "my_folder/test"
    metrics: dict[str, Number | None] = field(default_factory=dict)
    per_class: dict[str, Number | None] = field(default_factory=dict)
    mask_metrics: dict[str, Number | None] = field(default_factory=dict)
    objects: dict[str, Int] = field(default_factory=dict)


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
    seed: Int
    status: str = "finished"  # "finished" | "interrupted" | "diverged" | "failed"
    iterations: Int = 0
    device: str = ""
    code_version: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    parameters: Int = 0
    s_per_iter: Number | None = None  # median over the training's iterations
    ms_per_image: Number | None = None  # inference alone, without loading
    peak_memory_mb: Number | None = None  # on the device; on a CPU of the whole process
    train_seconds: Number | None = None  # without evaluations
    # keys AP_COLUMNS, of LVIS data LVIS_COLUMNS too; of the first data set of DATASETS.TEST
    metrics: dict[str, Number | None] = field(default_factory=dict)
    per_class: dict[str, Number | None] = field(default_factory=dict)  # AP by class name
    # mask AP, keys as in `metrics`; empty for detectors without masks. `metrics` has box AP
    mask_metrics: dict[str, Number | None] = field(default_factory=dict)
    # annotated objects that APs, APm and APl are of, by these names; crowds are not counted
    objects: dict[str, Int] = field(default_factory=dict)
    # annotated objects of each class in the training data; of records of earlier versions, empty
    train_objects: dict[str, Int] = field(default_factory=dict)
    best: dict[str, Number] = field(default_factory=dict)  # "AP" and "iteration" of model_best
    outcome: str = ""  # why a run did not finish: "diverged at iteration 312: ..."
    gflops: Number | None = None  # for one forward pass on one validation image (fvcore)
    loss_ms: Number | None = None  # the losses of one batch, forward and backward
    loss_variation: Number | None = None  # loss_cls: std / mean over the second half of training
    # classification's gradient over the boxes', norms at the features that both read: the median
    # over the second half of training; None where it was not measured
    grad_ratio_cls_box: Number | None = None
    # by GHM loss, such as "ghm_c": how much a sample's weight varies from batch to batch, as
    # std / mean over the second half of training
    weight_variation: dict[str, Number] = field(default_factory=dict)
    skipped_steps: Int = 0  # steps whose loss or gradient was not finite, and that were left out
    bad_images: Int = 0  # distinct training images that could not be read, and were replaced
    world_size: Int = 1  # processes that trained together
    # as configured; `iterations` says how many were done. None in records of earlier versions
    schedule: Schedule | None = None
    evaluated_on: str = ""  # the first data set of DATASETS.TEST, where there are others
    other_sets: list[SetFigures] = field(default_factory=list)  # in the order of DATASETS.TEST

    @property
    def sets(self) -> list[SetFigures]:
        """The figures on each data set; the first has no name where it is the only one."""
        figures = self.metrics, self.per_class, self.mask_metrics, self.objects
        first = SetFigures(self.evaluated_on, *figures)
        return [first, *self.other_sets]

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
        if not os.path.lexists(file):
            raise DataError(f"{folder}: no {RUN_FILE}; is this the folder of a run?")
        return _read(cls, file, "the record of a run")

    @classmethod
    def of(cls, row: "TableRow", file: Path) -> "RunRecord":
        """The record in a row of the `RunsTable` in `file`.

        Raises:
            DataError: it is not one.
        """
        text, where = json.dumps(row["record"]).encode(), f"{file}: {row['folder']}"
        return _decode(cls, text, where, "the record of a run")


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
    primary: bool = False  # the one that is tested alone, named before anything was run


@dataclass
class Trial:
    """One run of the search for a side's setting.

    Records of earlier versions have no `dataset`, `seed` and `iterations`.
    """

    side: str
    overrides: list[str]
    AP: Number | None
    chosen: bool = False
    dataset: str = ""
    seed: Int = 0
    iterations: Int = 0


@dataclass
class Comparison:
    """A comparison's sides, seeds and pairs, kept as comparison.json in the comparison's folder."""

    name: str  # such as "two-stage vs one-stage"
    question: str
    dataset: str
    budget: str
    seeds: list[Int]
    sides: list[ComparedSide]
    pairs: list[Pair]
    command: str = ""
    search: list[Trial] = field(default_factory=list)
    margin: Number = 1.0  # differences of AP up to it are practically none
    looks: list[Int] = field(default_factory=list)  # numbers of seeds with an earlier verdict
    # numbers of seeds whose results were there to see before more were added, or before the plan
    unplanned_looks: list[Int] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write comparison.json into `folder`, whole or not at all."""
        write_json(Path(folder) / COMPARISON_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Comparison":
        """The comparison in `folder`, which may be its comparison.json too.

        Raises:
            DataError: there is none, or it is not one.
        """
        file = Path(folder)
        file = file if file.is_file() else file / COMPARISON_FILE
        if not os.path.lexists(file):
            raise DataError(f"{folder}: no {COMPARISON_FILE}")
        return _read(cls, file, "a comparison")


def _read(kind: type[_Record], file: Path, what: str) -> _Record:
    """The record in `file`; `what` it should be is told where it is something else.

    Raises:
        DataError: not a plain file, over 64 MiB, not JSON, a field that is missing, unknown or of
            another type, or a number beyond 1e15.
    """
    if not file.is_file() or file.stat().st_size > _MOST_BYTES:
        raise DataError(f"{file}: not a plain file, or over {_MOST_BYTES >> 20} MiB")
    try:
        text = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    return _decode(kind, text, file, what)


def _decode(kind: type[_Record], text: bytes, where: object, what: str) -> _Record:
    try:
        record = msgspec.json.decode(text, type=kind)
        _refuse_unknown(text, record)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not {what}: {error!s:.200}") from None
    return record


def _refuse_unknown(text: bytes | msgspec.Raw, record: object) -> None:
    """Refuse fields of `text`, a later version's or another file's, that are not in `record`.

    Raises:
        ValueError: there is one, in the record itself or in one that it holds.
    """
    if is_dataclass(record):
        known = vars(record)
        for name, value in msgspec.json.decode(text, type=dict[str, msgspec.Raw]).items():
            if name not in known:
                raise ValueError(f"unknown field {name}")
            _refuse_unknown(value, known[name])
    elif isinstance(record, list) and record and is_dataclass(record[0]):
        items = msgspec.json.decode(text, type=list[msgspec.Raw])
        for item, within in zip(items, record, strict=True):
            _refuse_unknown(item, within)


class TableRow(TypedDict):
    """A line of `RunsTable`: the run's key, its folder, and its RunRecord as a dict.

    folder: relative to the table's. In older tables of `ghm compare`, the name alone of a folder
    in runs/; it ends in the key.
    """

    key: str
    folder: str
    record: dict[str, Any]


_ROW = msgspec.json.Decoder(TableRow)


class RunsTable:
    """An append-only table of runs, a JSON object a line, that several processes may write."""

    def __init__(self, file: Path):
        self.file = Path(file)
        self._seen: tuple[int, int, int] | None = None  # inode, size and time of what was read
        self._rows: list[TableRow] = []
        self._latest: dict[str, TableRow] = {}

    def append(self, row: TableRow) -> None:
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

    def rows(self) -> list[TableRow]:
        """Return all rows, oldest first, without the part of a row that a killed writer left."""
        self._read()
        return list(self._rows)

    def latest(self, key: str) -> TableRow | None:
        """The last row of the run `key`, if there is one."""
        self._read()
        return self._latest.get(key)

    def _read(self) -> None:
        """Decode the file where it has changed: a comparison asks for its runs every second."""
        if not self.file.is_file():
            self._seen, self._rows, self._latest = None, [], {}
            return
        status = self.file.stat()
        seen = status.st_ino, status.st_size, status.st_mtime_ns
        if seen == self._seen:
            return
        rows = []
        for line in self.file.read_bytes().splitlines():
            with suppress(ValueError, RecursionError):
                rows.append(_ROW.decode(line))
        self._seen, self._rows = seen, rows
        self._latest = {row["key"]: row for row in rows}
