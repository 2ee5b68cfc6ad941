"""ghm train."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ghm_d2.errors import UsageError

from ._console import emit, err, out, user_errors
from ._options import Dataset, Device, Json, Overrides, data_label, pick_device

# what a run leaves in its folder, and --overwrite removes
RUN_FILES = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "density.jsonl",
    "log.txt",
    "last_checkpoint",
    "model_*.pth",
    "events.out.tfevents.*",
    "detections.png",
)


def train(
    overrides: Overrides = None,
    config: Annotated[
        str | None, typer.Option(help="A YAML file, or the name of a shipped one.")
    ] = None,
    dataset: Dataset = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/CONFIG by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the run that is in --output first.")
    ] = False,
    device: Device = "auto",
    seed: Annotated[
        int | None, typer.Option(min=0, help="SEED; drawn and recorded if none is given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a detector, evaluate it, and draw what it finds."""
    with user_errors():
        if resume and overwrite:
            raise UsageError("--resume continues a run, --overwrite removes it: choose one")
        folder = output or _default_folder(config)
        source = _config_source(config, folder, resume)
        _train(source, overrides or [], dataset, folder, resume, overwrite, device, seed, as_json)


def _default_folder(config: str | None) -> Path:
    if config is None:
        raise UsageError("--config FILE is needed; `ghm configs` lists the shipped ones")
    return Path("runs") / Path(config).stem


def _config_source(config: str | None, folder: Path, resume: bool) -> str:
    own = folder / "config.yaml"
    if resume and not own.is_file():
        raise UsageError(f"{folder} holds no run to resume")
    if config is None and not resume:
        raise UsageError("--config FILE is needed; `ghm configs` lists the shipped ones")
    return config or str(own)


def _train(source, overrides, dataset, folder, resume, overwrite, device, seed, as_json) -> None:
    from ghm_d2.config import load_config, merge_overrides
    from ghm_d2.data.catalog import apply_to_config
    from ghm_d2.reports.tables import per_class_table, results_table

    from ._logs import log_to, quiet
    from ._progress import progress

    quiet()
    cfg = load_config(source, overrides)
    merge_overrides(cfg, ["OUTPUT_DIR", str(folder), "MODEL.DEVICE", pick_device(device)])
    if seed is not None:
        cfg.SEED = seed
    apply_to_config(cfg, dataset)
    _prepare(folder, resume, overwrite)
    log_to(folder)
    with progress() as shown:
        record = _run(cfg, data_label(dataset, cfg.DATASETS.TRAIN[0]), resume, shown)

    def human():
        out.print(results_table(record, f"{record.dataset}, {record.iterations} iterations"))
        out.print(per_class_table(record))
        if record.best:
            out.print(f"best AP {record.best['AP']:.1f} at iteration {record.best['iteration']}")
        out.print(f"{folder}: model_final.pth, model_best.pth, metrics.jsonl, detections.png")
        out.print(f"evaluate again: ghm eval --weights {folder}/model_best.pth")

    emit(asdict(record), as_json=as_json, human=human)


def _run(cfg, label, resume, shown):
    from ghm_d2.data.catalog import validate
    from ghm_d2.engine.predict import draw_beside_truth
    from ghm_d2.engine.trainer import choose_seed, train
    from ghm_d2.records import write_text

    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        validate(name)
    choose_seed(cfg)
    folder = Path(cfg.OUTPUT_DIR)
    write_text(folder / "config.yaml", cfg.dump())
    shown.message(f"training on {', '.join(cfg.DATASETS.TRAIN)} into {folder}, seed {cfg.SEED}")
    record, evaluation = train(cfg, label, resume=resume, progress=shown)
    draw_beside_truth(cfg.DATASETS.TEST[0], evaluation.detections, folder / "detections.png")
    return record


def _prepare(folder: Path, resume: bool, overwrite: bool) -> None:
    present = [file for pattern in RUN_FILES for file in folder.glob(pattern)]
    if present and overwrite:
        for file in present:
            file.unlink()
        err.print(f"removed the run in {folder}")
    elif present and not resume:
        raise UsageError(
            f"{folder} holds another run; --resume continues it, --overwrite removes it, "
            "--output DIR names another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {folder}: {error.strerror}") from None
