"""ghm eval."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ghm_d2.run_folder import DETECTIONS_FILE, EVALUATION_FILE, PICTURE_FILE

from ._console import emit, out, tell, user_errors
from ._options import Dataset, Device, Json, Overrides, check_overrides, make_folder


def evaluate(
    weights: Annotated[Path, typer.Option(help="A checkpoint, such as runs/x/model_final.pth.")],
    overrides: Overrides = None,
    config: Annotated[
        str | None, typer.Option(help="Needed where no config.yaml lies beside the weights.")
    ] = None,
    dataset: Dataset = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the record, the detections and pictures.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Evaluate a trained detector with COCO's AP."""
    with user_errors():
        _evaluate(weights, overrides or [], config, dataset, output, device, as_json)


def _evaluate(weights, overrides, config, dataset, output, device, as_json) -> None:
    from ._logs import quiet

    quiet()  # before anything that warns is imported
    from ghm_d2.data.catalog import data_label
    from ghm_d2.describe import describe_run, peak_memory_mb
    from ghm_d2.files import write_json
    from ghm_d2.inference.evaluate import evaluate
    from ghm_d2.inference.load import config_source, load_detector
    from ghm_d2.inference.predict import draw_beside_truth
    from ghm_d2.reports.tables import per_class, run_results, terminal_table
    from ghm_d2.training.prepare import prepare_evaluation

    from ._progress import progress

    check_overrides(overrides)
    if output:
        make_folder(output)
    source = config_source(weights, config)
    cfg = prepare_evaluation(source, overrides, dataset=dataset, device=device)
    name = cfg.DATASETS.TEST[0]
    model = load_detector(cfg, weights)
    with progress() as shown:
        result = evaluate(model, cfg, name, shown)
    record = describe_run(cfg, model, data_label(name))
    record.metrics, record.per_class = result.metrics, result.per_class
    record.mask_metrics = result.mask_metrics
    record.ms_per_image = result.ms_per_image
    record.peak_memory_mb = peak_memory_mb(cfg.MODEL.DEVICE)
    if output:
        record.write(output, EVALUATION_FILE)
        write_json(output / DETECTIONS_FILE, result.detections)
        draw_beside_truth(name, result.detections, output / PICTURE_FILE)

    def human():
        out.print(
            terminal_table(run_results(record), f"{name}, {record.ms_per_image:.1f} ms/image")
        )
        out.print(terminal_table(per_class(record)))
        if output:
            tell(f"{output}: {EVALUATION_FILE}, {DETECTIONS_FILE}, {PICTURE_FILE}")

    emit(asdict(record), as_json=as_json, human=human)
