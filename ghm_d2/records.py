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
# how a run ended, `RunRecord.status`
FINISHED, INTERRUPTED, DIVERGED, FAILED = "finished", "interrupted", "diverged", "failed"
AP_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
LVIS_COLUMNS = ("APr", "APc", "APf")  # AP of the rare, common and frequent classes
# Limits for untrusted files: they must not exhaust memory, and sums of numbers must stay finite
_MOST_BYTES = 2**26
_LARGEST = 10**15
Int = Annotated[int, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]
Float = Annotated[float, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]
Number = Int | Float  # a whole number stays an int
_Record = TypeVar("_Record")


@dataclass
class Schedule:
    """The length and image sizes of a training; published APs hold for one schedule only."""

    iterations: Int
    batch: Int  # images per step over all ranks
    decay: list[Int]  # iterations at which the learning rate falls
    sizes: list[Int]  # lengths of an image's shorter side in training, px


@dataclass
class SetFigures:
    """The results on a data set after the first of DATASETS.TEST.

    The fields have the same meaning as in `RunRecord`.
    """

    dataset: str  # such as "coco_2017_val", or "my_folder/test"
    metrics: dict[str, Number | None] = field(default_factory=dict)
    per_class: dict[str, Number | None] = field(default_factory=dict)
    mask_metrics: dict[str, Number | None] = field(default_factory=dict)
    objects: dict[str, Int] = field(default_factory=dict)


@dataclass
class RunRecord:
    """One training, or one evaluation, with what tables and plots need.

    APs are percentages, 0..100, or None if they are not defined, such as APs on data without
    small boxes.
    """

    method: str  # such as "RetinaNet GHM-C + GHM-R"
    network: str  # such as "ResNet-50-FPN"
    dataset: str
    config_hash: str
    seed: Int
    status: str = FINISHED  # FINISHED, INTERRUPTED, DIVERGED or FAILED
    iterations: Int = 0
    device: str = ""
    code_version: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    parameters: Int = 0
    s_per_iter: Number | None = None  # median over the training's iterations
    ms_per_image: Number | None = None  # inference alone, without loading
    peak_memory_mb: Number | None = None  # MiB on the GPU; on a CPU, of the whole process
    train_seconds: Number | None = None  # without evaluations
    # box AP on the first data set of DATASETS.TEST: keys AP_COLUMNS, for LVIS also LVIS_COLUMNS
    metrics: dict[str, Number | None] = field(default_factory=dict)
    per_class: dict[str, Number | None] = field(default_factory=dict)  # AP by class name
    # mask AP with the keys of `metrics`; empty for detectors without masks
    mask_metrics: dict[str, Number | None] = field(default_factory=dict)
    # number of annotated objects, without crowds, in the sizes of "APs", "APm" and "APl"
    objects: dict[str, Int] = field(default_factory=dict)
    # annotated objects of each class in the training data; empty in records of earlier versions
    train_objects: dict[str, Int] = field(default_factory=dict)
    best: dict[str, Number] = field(default_factory=dict)  # "AP" and "iteration" of model_best
    outcome: str = ""  # why a run did not finish: "diverged at iteration 312: ..."
    gflops: Number | None = None  # for one forward pass on one validation image (fvcore)
    loss_ms: Number | None = None  # the losses of one batch, forward and backward
    loss_variation: Number | None = None  # loss_cls: std / mean over the second half of training
    # gradient norm of the classification loss / that of the box loss, at the features that both
    # read: median over the second half of training; None if it was not measured
    grad_ratio_cls_box: Number | None = None
    # GHM loss, such as "ghm_c" -> how much a sample's weight varies from batch to batch: std / mean
    # over the second half of training
    weight_variation: dict[str, Number] = field(default_factory=dict)
    skipped_steps: Int = 0  # steps skipped because a loss or gradient was NaN or infinite
    bad_images: Int = 0  # distinct training images that could not be read, and were replaced
    world_size: Int = 1  # number of ranks
    # the configured schedule; `iterations` counts those done. None in records of earlier versions
    schedule: Schedule | None = None
    evaluated_on: str = ""  # the first data set of DATASETS.TEST; "" if it is the only one
    other_sets: list[SetFigures] = field(default_factory=list)  # in the order of DATASETS.TEST

    @property
    def sets(self) -> list[SetFigures]:
        """The results on each data set; the first has no name if it is the only one."""
        figures = self.metrics, self.per_class, self.mask_metrics, self.objects
        first = SetFigures(self.evaluated_on, *figures)
        return [first, *self.other_sets]

    def write(self, folder: Path, name: str = RUN_FILE) -> None:
        """Write run.json, or `name`, into `folder`, whole or not at all."""
        write_json(Path(folder) / name, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Read the record of the run in `folder`.

        Raises:
            DataError: the file is missing or is not the record of a run.
        """
        file = Path(folder) / RUN_FILE
        if not os.path.lexists(file):
            raise DataError(f"{folder}: no {RUN_FILE}; is this the folder of a run?")
        return _read(cls, file, "run record")

    @classmethod
    def of(cls, row: "TableRow", file: Path) -> "RunRecord":
        """Return the record in a row of the `RunsTable` in `file`.

        Raises:
            DataError: the row has no valid record.
        """
        text, where = json.dumps(row["record"]).encode(), f"{file}: {row['folder']}"
        return _decode(cls, text, where, "run record")


@dataclass
class ComparedSide:
    """One side of a comparison: a configuration that is trained once per seed."""

    name: str  # such as "GHM-C + SL1"; unique in the comparison
    config: str
    overrides: list[str] = field(default_factory=list)  # KEY VALUE in turn, including the search's
    runs: list[str] = field(default_factory=list)  # one folder a seed, relative to the comparison's
    settings_of: str = ""  # the side whose search chose the overrides, if not this one


@dataclass
class Pair:
    """A difference that a comparison measures: `side` minus `reference`, both names of sides."""

    side: str
    reference: str
    question: str  # such as "GHM within the one-stage family"
    primary: bool = False  # the pair that is tested alone, named before any run


@dataclass
class Trial:
    """One run of the search for a side's settings.

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
    margin: Number = 1.0  # AP differences up to this one count as practically none
    looks: list[Int] = field(default_factory=list)  # numbers of seeds with a planned early verdict
    # numbers of seeds whose results were known before more seeds were added or the plan was made
    unplanned_looks: list[Int] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write comparison.json into `folder`, whole or not at all."""
        write_json(Path(folder) / COMPARISON_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Comparison":
        """Read the comparison in `folder`, which may also be the comparison.json itself.

        Raises:
            DataError: the file is missing or is not a comparison.
        """
        file = Path(folder)
        file = file if file.is_file() else file / COMPARISON_FILE
        if not os.path.lexists(file):
            raise DataError(f"{folder}: no {COMPARISON_FILE}; is this the folder of a comparison?")
        return _read(cls, file, "comparison record")


def _read(kind: type[_Record], file: Path, what: str) -> _Record:
    """Read the record in `file`; errors say `what` it should be.

    Raises:
        DataError: not a plain file, over 64 MiB, not JSON, a field that is missing, unknown or of
            another type, or a number beyond 1e15.
    """
    if not file.is_file() or file.stat().st_size > _MOST_BYTES:
        raise DataError(f"{file} must be a regular file of at most {_MOST_BYTES >> 20} MiB")
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
        raise DataError(f"{where}: not a valid {what}: {error!s:.200}") from None
    return record


def _refuse_unknown(text: bytes | msgspec.Raw, record: object) -> None:
    """Refuse fields of `text` that `record` lacks: a later version or another file wrote it.

    Raises:
        ValueError: there is such a field, in the record itself or in one that it holds.
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

    folder: relative to the table's folder. In older tables of `ghm compare`, it is only the name
    of a folder in runs/, which ends in the key.
    """

    key: str
    folder: str
    record: dict[str, Any]


_ROW = msgspec.json.Decoder(TableRow)


class RunsTable:
    """An append-only table of runs, one JSON object per line; several processes may write to it."""

    def __init__(self, file: Path):
        self.file = Path(file)
        self._seen: tuple[int, int, int] | None = None  # inode, size and time of the file when read
        self._rows: list[TableRow] = []
        self._latest: dict[str, TableRow] = {}

    def append(self, row: TableRow) -> None:
        """Add one row; it is on the disk when this returns.

        Raises:
            OutputError: the file cannot be written; the earlier rows are intact.
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
                if table.read() != b"\n":  # a writer was killed in the middle of a row
                    line = b"\n" + line
            table.write(line)
            table.flush()
            os.fsync(table.fileno())

    def rows(self) -> list[TableRow]:
        """Return all rows, oldest first, without the part of a row that a killed writer left."""
        self._read()
        return list(self._rows)

    def latest(self, key: str) -> TableRow | None:
        """Return the last row of the run `key`, or None."""
        self._read()
        return self._latest.get(key)

    def _read(self) -> None:
        """Decode the file if it has changed: a comparison asks for its runs every second."""
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
