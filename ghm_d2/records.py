"""What a run leaves behind as numbers: `RunRecord`, kept as run.json in the run's folder."""

import hashlib
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ghm_d2.errors import DataError

RUN_FILE = "run.json"
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
    best: dict[str, float] = field(default_factory=dict)  # "AP" and "iteration" of model_best

    def write(self, folder: Path) -> None:
        """Write run.json into `folder`, whole or not at all."""
        write_json(Path(folder) / RUN_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """The record of the run in `folder`.

        Raises:
            DataError: there is none, or it is not one.
        """
        file = Path(folder) / RUN_FILE
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise DataError(f"{folder}: no {RUN_FILE}; is this the folder of a run?") from None
        except (ValueError, TypeError) as error:
            raise DataError(f"{file}: not the record of a run: {error}") from None


def find_records(folder: Path) -> list[RunRecord]:
    """The records of all runs below `folder`, in the order of their paths.

    Raises:
        DataError: there is none, or a run.json that is not one.
    """
    files = sorted(Path(folder).rglob(RUN_FILE))
    if not files:
        raise DataError(f"{folder}: no run in it: no {RUN_FILE}")
    return [RunRecord.read(file.parent) for file in files]


def write_json(file: Path, value) -> None:
    """Write `value` as JSON, whole or not at all.

    Raises:
        ValueError: it holds a NaN or an infinity, which JSON does not know.
    """
    write_text(file, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write `text` to a temporary file beside `file`, then rename it."""
    file = Path(file)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def config_hash(text: str) -> str:
    """A short name of a configuration's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def finite_or_none(value: float) -> float | None:
    """`value`, or None for the NaN that stands for "not defined", which JSON does not know."""
    return float(value) if math.isfinite(value) else None
