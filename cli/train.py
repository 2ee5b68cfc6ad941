"""ghm train."""

import logging
import signal
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ghm_d2.errors import UsageError
from ghm_d2.run_folder import (
    ANALYSIS_FILE,
    BEST_WEIGHTS,
    CONFIG_FILE,
    FINAL_WEIGHTS,
    METRICS_FILE,
    PICTURE_FILE,
    RUN_FILE,
    RUN_MARKS,
    WRITTEN_BY_TRAINING,
)

from .common.console import emit, show_error, tell, user_errors
from .common.group import Group, end_if_hopeless, launch, leave_launch_id, rank, was_begun
from .common.options import (
    OF_DATA,
    Dataset,
    Device,
    Json,
    NumGPUs,
    NumMachines,
    Overrides,
    Rdzv,
    check_overrides,
    make_folder,
)
from .common.results import show_record


def train(
    overrides: Overrides = None,
    config: Annotated[
        str | None, typer.Option(help="A YAML file, or a shipped configuration's name.")
    ] = None,
    dataset: Dataset = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run. Default: runs/CONFIG.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="First remove the run that is in --output.")
    ] = False,
    device: Device = "auto",
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**32 - 1, help="Sets SEED; if neither is given, one is drawn and recorded."
        ),
    ] = None,
    on_divergence: Annotated[
        str | None,
        typer.Option(
            help="What to do when a loss or gradient is NaN or infinite: stop the run, or skip "
            "the step; SOLVER.ON_DIVERGENCE."
        ),
    ] = None,
    analyse: Annotated[
        bool | None,
        typer.Option(
            "--analyse/--no-analyse",
            help="Write analysis.json, from which ghm report draws figures. Default: if that "
            "takes less than 5 % of the training time.",
        ),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Profile ten steps: print times, write trace.json.")
    ] = False,
    auto_batch: Annotated[
        bool,
        typer.Option(
            "--auto-batch",
            help="Find the largest batch that fits into GPU memory and leaves at least 1,000 "
            "iterations; scale the learning rate and the schedule to it.",
        ),
    ] = False,
    num_gpus: NumGPUs = 1,
    num_machines: NumMachines = 1,
    rdzv: Rdzv = None,
    max_restarts: Annotated[
        int, typer.Option(help="Times to restart from the last checkpoint if a process is killed.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Train a detector, evaluate it, draw its detections, and analyse its gradients.

    --num-gpus N is the same as `torchrun --nproc-per-node N -m ghm_d2.cli train ...`.
    """
    with user_errors():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, from the start
        group = Group(num_gpus, num_machines, rdzv, max_restarts)
        if group.wanted:
            launch(group, show_error)
            return
        end_if_hopeless()
        if resume and overwrite:
            raise UsageError("--resume continues a run, --overwrite removes it: choose one")
        if resume and (config is not None or seed is not None):
            raise UsageError(
                "--resume uses the run's own config.yaml and seed; leave out --config and --seed "
                "(KEY VALUE overrides are possible)"
            )
        if resume and auto_batch:
            raise UsageError("--auto-batch works only for a new run; leave it out with --resume")
        if config is None and not resume:
            raise UsageError("--config FILE is needed; `ghm configs` lists the shipped ones")
        folder = output or Path("runs") / Path(config or "").stem
        if was_begun(folder):
            # config.yaml has them
            resume, overwrite, auto_batch, seed, overrides = True, False, False, None, None
        if resume:
            config = _own_config(folder)
        overrides = list(overrides or [])
        if on_divergence is not None and not was_begun(folder):
            check_overrides(overrides, **{"SOLVER.ON_DIVERGENCE": "--on-divergence"})
            overrides += ["SOLVER.ON_DIVERGENCE", on_divergence]
        options = {"dataset": dataset, "device": device, "seed": seed, "output": folder}
        how = {"resume": resume, "overwrite": overwrite, "profiled": profile}
        record = _train(config, overrides, options, analyse, auto_batch=auto_batch, **how)
        if record:
            _show(record, folder, as_json)


def _check_overrides(overrides: list[str], dataset: str | None, seed: int | None) -> None:
    """Refuse overrides of keys that the given options set: one of the two would have no effect."""
    given = OF_DATA if dataset is not None else {}
    check_overrides(overrides, **given, **({"SEED": "--seed"} if seed is not None else {}))


def _own_config(folder: Path) -> str:
    own = folder / CONFIG_FILE
    if not own.is_file():
        raise UsageError(f"{folder} holds no run to resume; name the run's folder with --output")
    return str(own)


def _train(
    source,
    overrides,
    options: dict,
    analyse: bool | None,
    *,
    resume: bool,
    overwrite: bool,
    profiled: bool,
    auto_batch: bool,
):
    """The record of the trained run; None on ranks other than 0.

    Args:
        options: dataset, device, seed and output, as for `prepare`.
    """
    from .common.logs import quiet
    from .common.progress import progress

    quiet()  # before anything that warns is imported
    from ghm_d2.data.catalog import tested_on_training
    from ghm_d2.inference.predict import draw_beside_truth
    from ghm_d2.training.auto_batch import fit_batch
    from ghm_d2.training.distributed import process_group
    from ghm_d2.training.prepare import pick_device, prepare, scale_to_group

    _check_overrides(overrides, options["dataset"], options["seed"])
    folder = options["output"]
    if not resume and rank() == 0:
        _check_folder(folder, overwrite)
    with progress() as shown, ExitStack() as held:
        with process_group(pick_device(options["device"])):
            cfg = prepare(source, overrides, resume=resume, **options)
            if line := tested_on_training(cfg):
                logging.getLogger("ghm_d2").warning(line)
            cfg, scaling = scale_to_group(cfg, resume)
            if auto_batch:
                cfg, fitted = fit_batch(cfg, shown)
                scaling = "; ".join(line for line in (scaling, fitted) if line)
            how = {"resume": resume, "overwrite": overwrite, "profiled": profiled}
            record, evaluation = _run(cfg, scaling, shown, held, **how)
        if rank() > 0:
            return None
        # after the group has ended: nothing below waits for another rank
        draw_beside_truth(cfg.DATASETS.TEST[0], evaluation.detections, folder / PICTURE_FILE)
        kept = (folder / ANALYSIS_FILE).is_file()  # from these weights: more training removes it
        if analyse or (analyse is None and not kept):
            _analyse(cfg, record, evaluation, analyse is True, shown)
    return record


def _run(cfg, scaling: str, shown, held: ExitStack, *, resume, overwrite, profiled):
    """The record and the last evaluation; `held` keeps the lock on the run's folder."""
    from ghm_d2.data.catalog import data_label
    from ghm_d2.locks import training_in
    from ghm_d2.training.train import train

    from .common.logs import log_to

    folder = Path(cfg.OUTPUT_DIR)

    def on_start():
        make_folder(folder)
        held.enter_context(training_in(folder))
        if overwrite:
            _remove_run(folder, cfg)
        leave_launch_id(folder)
        log_to(folder)
        what = "resuming" if resume else "training"
        shown.message(f"{what} on {', '.join(cfg.DATASETS.TRAIN)} into {folder}, seed {cfg.SEED}")
        if scaling:
            logging.getLogger("ghm_d2").info(scaling)
            shown.message(scaling)

    label = data_label(cfg.DATASETS.TRAIN[0])
    options = {"resume": resume, "progress": shown, "profiled": profiled}
    return train(cfg, label, on_start=on_start, **options)


def _analyse(cfg, record, evaluation, asked_for: bool, shown) -> None:
    """Analyse a finished run; unless asked for, only if it is quick, and failures are logged."""
    from ghm_d2.analysis.after_training import LARGEST_SHARE, analyse_run, expected_analysis_seconds

    command = f"ghm train --resume --analyse --output {cfg.OUTPUT_DIR}"
    try:
        seconds = 0 if asked_for else expected_analysis_seconds(cfg, record, evaluated=True)
        if seconds > LARGEST_SHARE * record.train_seconds:
            shown.message(
                f"{ANALYSIS_FILE} is not written, because it would take about {seconds:.0f} s, "
                f"over {LARGEST_SHARE:.0%} of the training time; to write it, run: {command}"
            )
            return
        analyse_run(cfg, record, shown, evaluation)
    except KeyboardInterrupt:
        shown.message(
            f"the run is finished, but its analysis is not; to analyse it, run: {command}"
        )
        raise
    except Exception as error:
        if asked_for:
            raise
        logging.getLogger("ghm_d2").exception("the analysis failed")
        reason = str(error).partition("\n")[0] or type(error).__name__
        shown.message(
            f"the run is finished, but its analysis failed: {reason}; to try again, run: {command}"
        )


def _show(record, folder: Path, as_json: bool) -> None:
    def human():
        show_record(record, f"{record.dataset}, {record.iterations} iterations")
        best = FINAL_WEIGHTS
        if record.best:
            best = BEST_WEIGHTS
            tell(f"best AP {record.best['AP']:.1f} at iteration {record.best['iteration']}")
        present = (RUN_FILE, METRICS_FILE, PICTURE_FILE, ANALYSIS_FILE)
        names = [name for name in present if (folder / name).is_file()]
        tell(f"{folder}: checkpoints, {', '.join(names)}")
        tell(f"to evaluate again: ghm eval --weights {folder / best}")

    emit(asdict(record), as_json=as_json, human=human)


def _find(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [file for pattern in patterns for file in folder.glob(pattern)]


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse to overwrite the files in `folder`."""
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
            raise UsageError(
                f"--overwrite would remove {weights}, from which the new run starts; choose "
                "another --output"
            )
    for file in _find(folder, WRITTEN_BY_TRAINING):
        file.unlink()
