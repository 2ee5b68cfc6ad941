"""ghm export."""

import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ghm_d2.errors import UsageError

from .common.console import emit, err, tell, user_errors
from .common.options import Json, Overrides, check_overrides


def export(
    weights: Annotated[Path, typer.Option(help="A checkpoint, such as runs/x/model_best.pth.")],
    overrides: Overrides = None,
    form: Annotated[str, typer.Option("--format", help="onnx or torchscript.")] = "onnx",
    output: Annotated[
        Path | None, typer.Option(help="The file to write. Default: beside the weights.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Configuration; needed if no config.yaml is beside the weights."),
    ] = None,
    batch: Annotated[
        bool,
        typer.Option("--batch", help="Accept batches of equally large images (one-stage only)."),
    ] = False,
    half: Annotated[
        bool, typer.Option("--half", help="Compute the network in float16 (ONNX only).")
    ] = False,
    check: Annotated[
        int, typer.Option(min=0, help="Validation images for comparison with PyTorch; 0: none.")
    ] = 3,
    as_json: Json = False,
) -> None:
    """Write a trained detector as a file that runs without Detectron2 and ghm_d2.

    The file takes one image (3, height, width) of any size. It returns boxes, scores and classes
    after NMS with the configured thresholds, and masks for Mask R-CNN. With --batch it takes (n, 3,
    height, width); each output then has n as its first axis, padded to TEST.DETECTIONS_PER_IMAGE,
    and num_detections counts the detections without padding. The file also holds class names,
    channel order and resizing, as JSON named ghm_d2.json.
    """
    kind = {"batch": batch, "half": half}
    with user_errors():
        _export(weights, overrides or [], form, kind, output, config, check, as_json)


def _export(weights, overrides, form, kind, output, config, check, as_json) -> None:
    from .common.logs import quiet

    quiet()  # before anything that warns is imported
    from ghm_d2.files import write_atomically
    from ghm_d2.inference.exporting.export import SUFFIXES, check_format, describe, export
    from ghm_d2.inference.load import config_source, folder_of, load_detector
    from ghm_d2.training.prepare import prepare_detector

    from .common.progress import progress

    check_format(form, kind["half"])
    if "MODEL.DEVICE" in overrides[::2]:  # there is no option for it
        raise UsageError("leave out MODEL.DEVICE: ghm export always runs on the CPU")
    check_overrides(overrides)
    cfg = prepare_detector(config_source(weights, config), overrides, device="cpu")
    output = output or (folder_of(weights) / weights.name).with_suffix(SUFFIXES[form])
    _check_output(output, weights)
    model = load_detector(cfg, weights)
    with progress() as shown:
        shown.message(f"exporting to {form}, which takes some seconds")
        data = export(model, cfg, form, **kind)
        write_atomically(str(output), lambda file: file.write(data))
        agreement, source = _agreement(model, cfg, data, form, kind, check, shown)
    about = describe(model, cfg, **kind)
    result = {"file": str(output), "format": form, "bytes": len(data), **about}
    result["check"] = _plain(agreement, source)
    emit(result, as_json=as_json, human=lambda: _print(output, len(data), agreement, source))
    if agreement and agreement.holds is None:
        err.print(_nothing_compared(agreement, cfg), style="bold yellow")
    elif agreement and not agreement.holds:
        err.print(
            "the file's detections differ from PyTorch's by more than rounding errors; check them "
            "before you use the file",
            style="bold red",
        )
        raise typer.Exit(1)


def _agreement(model, cfg, data: bytes, form: str, kind: dict, count: int, shown):
    """An `Agreement` and where its images come from; (None, "") if nothing is checked."""
    from ghm_d2.inference.exporting.export import INSTALL
    from ghm_d2.inference.exporting.verify import can_run, check_images, compare, load_exported

    if not count:
        return None, ""
    if not can_run(form):
        shown.message(f"the file is not checked, because onnxruntime is not installed ({INSTALL})")
        return None, ""
    source, images = check_images(cfg, count)
    return compare(model, load_exported(data, form), images, shown, **kind), source


def _check_output(output: Path, weights: Path) -> None:
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder; give the name of a file")
    # a name in the model zoo is no file
    if output.exists() and weights.exists() and output.samefile(weights):
        raise UsageError(f"--output {output} is the weights file; choose another name")
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written: {error.strerror}") from None


def _plain(agreement, source: str) -> dict | None:
    """Return an agreement for JSON, with None for infinity, which JSON does not know."""
    if agreement is None:
        return None
    values = asdict(agreement)
    values |= {k: values[k] if math.isfinite(values[k]) else None for k in ("px", "score")}
    return {"source": source, **values, "agrees": agreement.holds}


def _print(output: Path, size: int, agreement, source: str) -> None:
    tell(f"{output}: {size / 1e6:.1f} MB")
    if agreement and agreement.holds is not None:
        tell(
            f"largest difference from PyTorch: {agreement.px:.2g} px, {agreement.score:.2g} in "
            f"score ({agreement.compared} detections on {agreement.images} images of {source})"
        )


def _nothing_compared(agreement, cfg) -> str:
    from ghm_d2.config.detectors import score_threshold_key

    key = score_threshold_key(cfg)
    if not agreement.detections:
        return (
            "nothing was detected, so the file could not be compared with PyTorch; lower the score "
            f"threshold ({key} VALUE) and export again"
        )
    return (
        "the file could not be compared with PyTorch, because rounding decides which detections "
        f"are returned: all scores are at the threshold ({key}) or equal the last one that "
        "TEST.DETECTIONS_PER_IMAGE allows"
    )
