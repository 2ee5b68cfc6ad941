"""ghm predict."""

from pathlib import Path
from typing import Annotated

import typer

from ghm_d2.config.detectors import num_classes
from ghm_d2.errors import DataError

from ._console import emit, tell, user_errors
from ._options import Device, Json, make_folder


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    weights: Annotated[Path, typer.Option(help="A checkpoint, such as runs/x/model_best.pth.")],
    config: Annotated[
        str | None, typer.Option(help="Needed where no config.yaml lies beside the weights.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the drawn pictures.")] = Path(
        "predictions"
    ),
    threshold: Annotated[float, typer.Option(min=0, max=1, help="The least score.")] = 0.5,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Detect objects in images: drawn pictures, and COCO's result format with --json."""
    with user_errors():
        _predict(images, weights, config, output, threshold, device, as_json)


def _predict(images, weights, config, output, threshold, device, as_json) -> None:
    missing = [image for image in images if not image.is_file()]
    if missing:
        raise DataError(f"no image {missing[0]}")
    from ._logs import quiet

    quiet()  # before anything that warns is imported
    from ghm_d2.data.show import contact_sheet
    from ghm_d2.inference.load import config_source, load_detector
    from ghm_d2.inference.predict import predict
    from ghm_d2.training.prepare import prepare_detector

    from ._progress import progress

    make_folder(output)
    cfg = prepare_detector(config_source(weights, config), device=device)
    model = load_detector(cfg, weights)
    # weights from elsewhere do not tell the names of their classes
    names = dict(enumerate(cfg.DATASETS.CLASS_NAMES or map(str, range(num_classes(cfg)))))
    with progress() as shown:
        found = predict(model, cfg, images, shown, threshold)
    for image, detections, name in zip(images, found, _picture_names(images), strict=True):
        picture = output / name
        caption = f"{image.name}: {len(detections)} detections"
        contact_sheet([(image, caption, detections)], names, columns=1, cell=1000).save(picture)

    def human():
        for image, detections in zip(images, found, strict=True):
            tell(f"{image}: {len(detections)} detections")
        tell(f"pictures: {output}")

    rows = [
        d | {"file_name": str(image), "category": names[d["category_id"]]}
        for image, detections in zip(images, found, strict=True)
        for d in detections
    ]
    emit(rows, as_json=as_json, human=human)


def _picture_names(images: list[Path]) -> list[str]:
    """A name for each drawn picture: none twice, and none that a photograph would have."""
    count: dict[str, int] = {}
    names = []
    for image in images:
        count[image.stem] = count.get(image.stem, 0) + 1
        again = f"_{count[image.stem]}" if count[image.stem] > 1 else ""
        names.append(f"{image.stem}{again}_detections.png")
    return names
