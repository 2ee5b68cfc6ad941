"""ghm predict."""

from pathlib import Path
from typing import Annotated

import typer

from ghm_d2.errors import DataError, UsageError, printable
from ghm_d2.inference.formats import FORMATS, OF_FRAMES, distinct_stem

from .common.console import emit, err, tell, user_errors
from .common.options import Device, Json, make_folder


def predict(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="Images, videos, folders of them, or quoted patterns."
        ),
    ],
    weights: Annotated[
        Path,
        typer.Option(
            help="A checkpoint, such as runs/x/model_best.pth, or one of Detectron2's model zoo, "
            "such as zoo:COCO-Detection/retinanet_R_50_FPN_1x."
        ),
    ],
    config: Annotated[
        str | None,
        typer.Option(help="Configuration; needed if no config.yaml is beside the weights."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for pictures and files.")] = Path(
        "predictions"
    ),
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Lowest score to keep.")] = 0.5,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help=f"File for other tools: {', '.join(FORMATS)}. Repeatable."),
    ] = None,
    side: Annotated[
        int, typer.Option("--slice", min=0, help="Also detect on slices of N px (needs sahi).")
    ] = 0,
    tta: Annotated[
        bool, typer.Option("--tta", help="Also detect on resized and mirrored copies (TEST.AUG).")
    ] = False,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw a picture of each image.")
    ] = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Detect objects in images and videos; write pictures, videos and files for other tools."""
    with user_errors():
        _check_formats(formats or [])
        options = {"threshold": threshold, "side": side, "tta": tta, "device": device}
        images, names, skipped = _predict(
            sources, weights, config, output, pictures, formats or [], options
        )

    def human():
        for image in images[:20]:
            tell(f"{image.file}: {len(image.detections)} detections")
        if len(images) > 20:
            tell(f"... {len(images)} images and frames in all")
        tell(f"written to {output}")

    rows = [
        d | {"image_id": i, "file_name": str(image.file), "category": names[d["category_id"]]}
        for i, image in enumerate(images)
        for d in image.detections
    ]
    emit(rows, as_json=as_json, human=human)
    _tell_skipped(skipped)


def _predict(sources, weights, config, output: Path, pictures: bool, formats, options: dict):
    """A `Found` for each image, then for each video frame; the classes' names; skipped files.

    A file that the user named must be readable; one from a folder or a pattern is skipped if it is
    not.
    """
    from ghm_d2.inference.sources import find_sources

    found, skipped = find_sources(sources), []
    from .common.logs import quiet

    quiet()  # before anything that warns is imported
    from ghm_d2.inference.video import predict_videos

    from .common.progress import progress

    make_folder(output)
    detect, names = _predictor(weights, config, **options)
    with progress() as shown:

        def skip(file, error):
            if file in found.named:
                raise error
            shown.message(f"warning: {error}; the file is skipped")
            skipped.append(file)

        images = _predict_images(detect, found, names, output if pictures else None, shown, skip)
        frames = predict_videos(detect, found.videos, output, names, shown, skip)
    if len(skipped) == len(found.images) + len(found.videos):
        raise DataError(f"none of the {len(skipped)} files found can be read")
    for name in formats:
        FORMATS[name](images + frames if name in OF_FRAMES else images, names, output)
    return images + frames, names, skipped


def _predict_images(detect, sources, names, output: Path | None, shown, skip):
    """A `Found` for each image, drawn into `output` at once; `skip` is told of unreadable ones."""
    from ghm_d2.inference.predict import draw_detections, predict

    images, used = [], set()
    for image in predict(detect, sources.images, shown, skip):
        images.append(image)
        if output:
            stem = distinct_stem(image.file, used)
            draw_detections(image, names, output / f"{stem}_detections.png")
    return images


def _check_formats(formats: list[str]) -> None:
    if unknown := [name for name in formats if name not in FORMATS]:
        raise UsageError(f"--format must be one of {', '.join(FORMATS)}, not {unknown[0]!r}")


def _tell_skipped(skipped: list[Path], most: int = 20) -> None:
    more = f" and {len(skipped) - most} more" if len(skipped) > most else ""
    listed = ", ".join(map(str, skipped[:most]))
    if skipped:  # on stderr, because stdout may be JSON
        text = f"files skipped, because they cannot be read: {listed}{more}"
        err.print(printable(text), markup=False, highlight=False)


def _predictor(weights, config, threshold: float, side: int, tta: bool, device: str):
    """The detector as a function, and the names of its classes."""
    from ghm_d2.inference.augmented import enable_augmentation
    from ghm_d2.inference.load import class_names, config_source, load_detector
    from ghm_d2.inference.predict import Predictor
    from ghm_d2.inference.slices import SlicedPredictor
    from ghm_d2.training.prepare import prepare_detector

    cfg = prepare_detector(config_source(weights, config), device=device)
    if tta:
        enable_augmentation(cfg)
    names = class_names(cfg)
    detect = Predictor(load_detector(cfg, weights), cfg, threshold)
    return SlicedPredictor(detect, side, names, threshold) if side else detect, names
