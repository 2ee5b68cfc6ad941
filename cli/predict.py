"""ghm predict."""

from pathlib import Path
from typing import Annotated

import typer

from ghm_d2.errors import DataError

from ._console import emit, out, user_errors
from ._options import Device, Json, pick_device


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
    from ghm_d2.config import merge_overrides
    from ghm_d2.data.show import contact_sheet
    from ghm_d2.engine.load import config_for, load_detector
    from ghm_d2.engine.predict import predict

    from ._logs import quiet
    from ._progress import progress

    quiet()
    cfg = config_for(weights, config, [])
    merge_overrides(cfg, ["MODEL.DEVICE", pick_device(device)])
    model = load_detector(cfg, weights)
    names = dict(enumerate(cfg.DATASETS.CLASS_NAMES)) or {i: str(i) for i in range(1000)}
    with progress() as shown:
        found = predict(model, cfg, images, shown, threshold)
    output.mkdir(parents=True, exist_ok=True)
    for image, detections in zip(images, found, strict=True):
        picture = output / f"{image.stem}.png"
        caption = f"{image.name}: {len(detections)} detections"
        contact_sheet([(image, caption, detections)], names, columns=1, cell=1000).save(picture)

    def human():
        for image, detections in zip(images, found, strict=True):
            out.print(f"{image}: {len(detections)} detections", highlight=False)
        out.print(f"pictures: {output}", highlight=False)

    rows = [
        d | {"file_name": str(image), "category": names[d["category_id"]]}
        for image, detections in zip(images, found, strict=True)
        for d in detections
    ]
    emit(rows, as_json=as_json, human=human)
