"""ghm train."""

import logging
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ghm_d2.errors import UsageError
from ghm_d2.run_folder import (
    BEST_WEIGHTS,
    CONFIG_FILE,
    FINAL_WEIGHTS,
    METRICS_FILE,
    PICTURE_FILE,
    RUN_FILE,
    RUN_MARKS,
    WRITTEN_BY_TRAINING,
)

from ._console import emit, out, show_error, tell, user_errors
from ._group import Group, end_if_hopeless, launch, leave_launch_id, rank, was_begun
from ._options import Dataset, Device, Json, Overrides, check_overrides, make_folder


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
        int | None,
        typer.Option(min=0, max=2**32 - 1, help="SEED; drawn and recorded if none is given."),
    ] = None,
    on_divergence: Annotated[
        str | None,
        typer.Option(
            help="stop or skip: what a step that is not finite does; SOLVER.ON_DIVERGENCE."
        ),
    ] = None,
    num_gpus: Annotated[
        int, typer.Option(help="Processes on this machine, one a GPU; with --device cpu on cores.")
    ] = 1,
    num_machines: Annotated[int, typer.Option(help="Start the same command on each.")] = 1,
    rdzv: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where machines meet: on one of them.")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(help="Times to go on from the last checkpoint when a process is killed.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Train a detector, evaluate it, and draw what it finds.

    `torchrun --nproc-per-node N -m ghm_d2.cli train ...` does what --num-gpus N does.
    """
    with user_errors():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C from the start on
        group = Group(num_gpus, num_machines, rdzv, max_restarts)
        if group.wanted:
            launch(group, show_error)
            return
        end_if_hopeless()
        if resume and overwrite:
            raise UsageError("--resume continues a run, --overwrite removes it: choose one")
        if resume and (config is not None or seed is not None):
            raise UsageError(
                "--resume goes on with the run's own config.yaml and seed: leave out "
                "--config and --seed; KEY VALUE overrides apply"
            )
        if config is None and not resume:
            raise UsageError("--config FILE is needed; `ghm configs` lists the shipped ones")
        folder = output or Path("runs") / Path(config or "").stem
        if was_begun(folder):
            resume, overwrite, seed, overrides = True, False, None, None  # config.yaml has them
        if resume:
            config = _own_config(folder)
        overrides = list(overrides or [])
        if on_divergence is not None and not was_begun(folder):
            overrides += ["SOLVER.ON_DIVERGENCE", on_divergence]
        _train(config, overrides, dataset, folder, resume, overwrite, device, seed, as_json)


def _own_config(folder: Path) -> str:
    own = folder / CONFIG_FILE
    if not own.is_file():
        raise UsageError(f"{folder} holds no run to resume")
    return str(own)


def _train(source, overrides, dataset, folder, resume, overwrite, device, seed, as_json) -> None:
    from ._logs import quiet
    from ._progress import progress

    quiet()  # before anything that warns is imported
    from ghm_d2.inference.predict import draw_beside_truth
    from ghm_d2.training.distributed import process_group
    from ghm_d2.training.prepare import pick_device, prepare

    check_overrides(overrides)
    if not resume and rank() == 0:
        _check_folder(folder, overwrite)
    device = pick_device(device)
    with progress() as shown:
        with process_group(device):
            cfg, scaling = prepare(
                source,
                overrides,
                dataset=dataset,
                device=device,
                seed=seed,
                output=folder,
                resume=resume,
            )
            record, evaluation = _run(cfg, scaling, resume, overwrite, shown)
        if rank() > 0:
            return
        draw_beside_truth(cfg.DATASETS.TEST[0], evaluation.detections, folder / PICTURE_FILE)
    _show(record, folder, as_json)


def _run(cfg, scaling: str, resume: bool, overwrite: bool, shown):
    from ghm_d2.data.catalog import data_label
    from ghm_d2.training.train import train

    from ._logs import log_to

    folder = Path(cfg.OUTPUT_DIR)

    def on_start():
        if overwrite:
            _remove_run(folder, cfg)
        make_folder(folder)
        leave_launch_id(folder)
        log_to(folder)
        what = "resuming" if resume else "training"
        shown.message(f"{what} on {', '.join(cfg.DATASETS.TRAIN)} into {folder}, seed {cfg.SEED}")
        if scaling:
            logging.getLogger("ghm_d2").info(scaling)
            shown.message(scaling)

    label = data_label(cfg.DATASETS.TRAIN[0])
    return train(cfg, label, resume=resume, progress=shown, on_start=on_start)


def _show(record, folder: Path, as_json: bool) -> None:
    from ghm_d2.reports.tables import per_class_table, results_table

    def human():
        out.print(results_table(record, f"{record.dataset}, {record.iterations} iterations"))
        out.print(per_class_table(record))
        best = FINAL_WEIGHTS
        if record.best:
            best = BEST_WEIGHTS
            tell(f"best AP {record.best['AP']:.1f} at iteration {record.best['iteration']}")
        tell(f"{folder}: checkpoints, {RUN_FILE}, {METRICS_FILE}, {PICTURE_FILE}")
        tell(f"evaluate again: ghm eval --weights {folder / best}")

    emit(asdict(record), as_json=as_json, human=human)


def _find(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [file for pattern in patterns for file in folder.glob(pattern)]


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse to write over what is in `folder`."""
    present = _find(folder, WRITTEN_BY_TRAINING)
    if present and not overwrite:
        raise UsageError(
            f"{folder} holds another run; --resume continues it, --overwrite removes it, "
            "--output DIR names another folder"
        )
    if present and not _find(folder, RUN_MARKS):
        raise UsageError(
            f"{folder} holds {present[0].name} but no run, and --overwrite removes only runs; "
            "name another folder with --output DIR"
        )


def _remove_run(folder: Path, cfg) -> None:
    for weights in (cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED):
        if weights and Path(weights).resolve().parent == folder.resolve():
            raise UsageError(f"--overwrite would remove {weights}, which the new run starts from")
    for file in _find(folder, WRITTEN_BY_TRAINING):
        file.unlink()
