"""ghm eval."""

import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from ghm_d2.errors import RunError, UsageError
from ghm_d2.run_folder import DETECTIONS_FILE, EVALUATION_FILE, PICTURE_FILE

from .common.console import emit, show_error, tell, user_errors
from .common.group import Group, launch, rank
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


def evaluate(
    weights: Annotated[Path, typer.Option(help="A checkpoint, such as runs/x/model_final.pth.")],
    overrides: Overrides = None,
    config: Annotated[
        str | None,
        typer.Option(help="Configuration; needed if no config.yaml is beside the weights."),
    ] = None,
    dataset: Dataset = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the record, detections and pictures. By default none is written, but "
            "results for a data set without annotations go beside the weights."
        ),
    ] = None,
    device: Device = "auto",
    num_gpus: NumGPUs = 1,
    num_machines: NumMachines = 1,
    rdzv: Rdzv = None,
    as_json: Json = False,
) -> None:
    """Evaluate a trained detector with COCO's AP, on each data set of DATASETS.TEST.

    For a data set without annotations, such as coco_2017_test-dev, it writes the results file for
    COCO's server. On LVIS it computes LVIS's AP.
    """
    with user_errors():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, from the start
        group = Group(num_gpus, num_machines, rdzv)
        if group.wanted:
            launch(group, show_error, "run the command again")
            return
        done = _evaluate(weights, overrides or [], config, dataset, output, device)
        if done:
            _show(done, output, as_json)
            if done.unexpected:
                raise done.unexpected


@dataclass
class _Done:
    """An evaluation's outcome; `results` has a line and files for each set without annotations."""

    record: object
    name: str  # the first data set's
    results: list[tuple[str, list[Path]]] = field(default_factory=list)
    unexpected: Exception | None = None  # set if the figures do not meet TEST.EXPECTED_RESULTS
    written: list[str] = field(default_factory=list)


def _evaluate(weights, overrides, config, dataset, output, device) -> _Done | None:
    """Evaluate on each data set; returns None on ranks other than 0."""
    from .common.logs import quiet
    from .common.progress import progress

    quiet()  # before anything that warns is imported
    from ghm_d2.data.catalog import data_label
    from ghm_d2.data.registered import has_annotations, set_name
    from ghm_d2.describe import describe_run, peak_memory_mb
    from ghm_d2.inference.evaluation.evaluate import evaluate
    from ghm_d2.inference.evaluation.expected import check_expected
    from ghm_d2.inference.load import config_source, folder_of, load_detector
    from ghm_d2.training.distributed import lost_peers, process_group
    from ghm_d2.training.prepare import pick_device, prepare_evaluation

    check_overrides(overrides, **(OF_DATA if dataset is not None else {}))
    if output:
        make_folder(output)
    source = config_source(weights, config)
    with progress() as shown, process_group(pick_device(device)):
        cfg = prepare_evaluation(source, overrides, dataset=dataset, device=device)
        names = cfg.DATASETS.TEST
        if not output and rank() == 0 and not all(map(has_annotations, names)):
            make_folder(folder_of(weights), "--output is not given, and the weights' folder")
        model = load_detector(cfg, weights)
        with lost_peers():
            found = {name: evaluate(model, cfg, name, shown) for name in names}
    if rank() > 0:
        return None
    first, *others = names
    record = describe_run(cfg, model, data_label(first))
    found[first].write_into(record)
    record.peak_memory_mb = peak_memory_mb(cfg.MODEL.DEVICE)
    if others:
        record.evaluated_on = set_name(first)
        record.other_sets = [found[n].figures(n) for n in others if found[n].metrics]
    done = _written(record, found, weights, output)
    try:
        check_expected(cfg, found[first])
    except (RunError, UsageError) as error:
        done.unexpected = error
    return done


def _written(record, found, weights: Path, output: Path | None) -> _Done:
    """Write the files of an evaluation, and return its outcome.

    Args:
        found: an `Evaluation` by data set; the first one's files go into `output` itself.
    """
    from ghm_d2.data.registered import set_name
    from ghm_d2.inference.evaluation.results_file import (
        keep_detections,
        submission_hint,
        write_results,
    )
    from ghm_d2.inference.load import folder_of
    from ghm_d2.inference.predict import draw_beside_truth

    done = _Done(record, set_name(next(iter(found))))
    for number, (name, result) in enumerate(found.items()):
        if not result.metrics:
            label = weights.resolve().parent.name
            files = write_results(output or folder_of(weights), name, label, result.detections)
            done.results.append((submission_hint(name, files), files))
        elif output:
            below = f"{set_name(name)}/" if number else ""
            make_folder(output / below)
            keep_detections(output / below, result.detections, masks=True)
            draw_beside_truth(name, result.detections, output / below / PICTURE_FILE)
            done.written += [below + DETECTIONS_FILE, below + PICTURE_FILE]
    if output:
        record.write(output, EVALUATION_FILE)
        done.written.insert(0, EVALUATION_FILE)
    return done


def _show(done: _Done, output: Path | None, as_json: bool) -> None:
    record = done.record

    def human():
        if record.metrics or record.other_sets:
            show_record(record, f"{done.name}, {record.ms_per_image:.1f} ms/image")
        for line, _ in done.results:
            tell(line)
        if output:
            tell(f"{output}: {', '.join(done.written)}")

    files = [str(file) for _, files in done.results for file in files]
    emit(asdict(record) | {"results_files": files}, as_json=as_json, human=human)
