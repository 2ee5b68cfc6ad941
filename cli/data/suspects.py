"""ghm data suspects."""

from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated

import typer

from ghm_d2.errors import UsageError
from ghm_d2.experiments.suites import DATA_CONFIG

from ..common.console import emit, tell, user_errors
from ..common.options import OF_DATA, Device, Json, Overrides, check_overrides, make_folder

PAGE_FILE, SHEET_FILE = "suspects.html", "suspects.jpg"
ON_PAGE, ON_SHEET = 200, 24  # suspects
BY_FOLDS = "Each image is judged by one of {folds} models, which was not trained on it."
BY_WEIGHTS = "Judged by a given model, which may have learnt errors that it was trained on."


def suspects(
    data: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="The data set to judge.")],
    overrides: Overrides = None,
    output: Annotated[
        Path, typer.Option(help="Results and trainings go there; the same command continues them.")
    ] = Path("suspects"),
    split: Annotated[str, typer.Option(help="The split to judge: train, val or test.")] = "train",
    config: Annotated[
        str | None,
        typer.Option(
            help=f"Configuration to train. Default: {DATA_CONFIG}. With --weights, needed if no "
            "config.yaml lies beside them."
        ),
    ] = None,
    folds: Annotated[
        int,
        typer.Option(min=2, help="Parts of the split; a model trained on the others judges each."),
    ] = 3,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Judge by this checkpoint, or zoo:NAME, instead of training; it should not have "
            "seen the split."
        ),
    ] = None,
    most: Annotated[
        int, typer.Option(min=1, help="Maximum number of suspect annotations, and of missing ones.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the trainings.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time on each device.")] = 1,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find annotations that are likely to be wrong, and objects without an annotation.

    Each image is judged by a model that was not trained on it. The result is an HTML page, a table,
    and tasks for Label Studio, with the most suspect annotations first. After an interruption the
    same command continues.
    """
    with user_errors():
        if weights and overrides:
            raise UsageError("--weights needs no training; leave out the KEY VALUE overrides")
        from ghm_d2.analysis.suspect_files import SUSPECTS_TABLE, has_decisions

        from ..common.logs import quiet

        quiet()  # before anything that warns is imported
        check_overrides(overrides or [], SEED="--seed", **OF_DATA)
        if has_decisions(output / SUSPECTS_TABLE):
            raise UsageError(
                f"{output / SUSPECTS_TABLE} has decisions, or cannot be read, and would be "
                "overwritten; rename it, or choose another --output"
            )
        make_folder(output)
        if weights:
            detect, note = _by_weights(weights, config, device), BY_WEIGHTS
        else:
            words = overrides or []
            detect = _by_folds(config or DATA_CONFIG, words, folds, seed, jobs, device)
            note = BY_FOLDS.format(folds=folds)
        value = _find(detect, note, data, split, output, most)
    emit(value, as_json=as_json, human=lambda: _print(value))


def _by_folds(config: str, overrides: list[str], folds: int, seed: int, jobs: int, device: str):
    """A function that detects on a registered split by trainings on its parts."""

    def detect(name: str, output: Path, shown):
        from ghm_d2.experiments.detections import CrossValidation
        from ghm_d2.experiments.launch import LocalLauncher, find_devices
        from ghm_d2.experiments.plan import portable_config

        source, devices = portable_config(config), find_devices(device)
        root, words = output.resolve(), tuple(overrides)
        validation = CrossValidation(root, source, words, name, folds, seed, devices[0])
        validation.train(LocalLauncher(devices, jobs), shown)
        return validation.detections()

    return detect


def _by_weights(weights: Path, config: str | None, device: str):
    """A function that detects on a registered split by a checkpoint."""

    def detect(name: str, output: Path, shown):
        from ghm_d2.experiments.detections import detections_by_weights

        return detections_by_weights(weights, config, name, device, shown)

    return detect


def _find(detect, note: str, data: str, split: str, output: Path, most: int) -> dict:
    from detectron2.data import MetadataCatalog

    from ghm_d2.analysis.suspect_files import (
        SUSPECTS_COCO,
        SUSPECTS_TABLE,
        write_coco,
        write_table,
        write_tasks,
    )
    from ghm_d2.analysis.suspects import find_suspects
    from ghm_d2.data.catalog import resolve, validate
    from ghm_d2.data.coco_json import load_json
    from ghm_d2.data.registered import is_lvis, set_name
    from ghm_d2.experiments.detections import json_file

    from ..common.progress import progress

    name = resolve(data, split)
    if is_lvis(name):
        raise UsageError(
            f"{name} cannot be judged: LVIS annotates only part of the classes in each image"
        )
    file, root = json_file(name), Path(MetadataCatalog.get(name).image_root)
    validate(name, "training")
    number = len(load_json(file)["images"])  # keep no more in memory while detectors train
    with progress() as shown:
        images = shown.track(detect(name, output, shown), "judging", number)
        annotated, missing = find_suspects(images, most)
        coco, total = load_json(file), len(annotated)
        found = _in_turn(annotated[:most], missing)
        write_table(found, coco, output / SUSPECTS_TABLE)
        write_coco(found, coco, output / SUSPECTS_COCO)
        write_tasks(found, coco, root.absolute(), output)
        _write_pictures(found, coco, root, set_name(name), note, output, shown)
    return {
        "folder": str(output),
        "annotations": total,
        "suspects": len(annotated[:most]),
        "missing": len(missing),
        "page": str(output / PAGE_FILE),
        "table": str(output / SUSPECTS_TABLE),
    }


def _in_turn(annotated: list, missing: list) -> list:
    """Merge both lists, a suspect of each in turn, since their scores are not comparable."""
    return [s for s in chain(*zip_longest(annotated, missing)) if s is not None]


def _write_pictures(found, coco, root: Path, name: str, note: str, output: Path, shown) -> None:
    from ghm_d2.analysis.suspect_pictures import as_jpeg, sheet, side_by_side
    from ghm_d2.files import write_atomically, write_text
    from ghm_d2.reports.page.suspects import Card, page

    files = {image["id"]: image["file_name"] for image in coco["images"]}
    names = {category["id"]: category["name"] for category in coco["categories"]}
    cards, pictures = [], []
    worst = list(enumerate(found[:ON_PAGE], 1))
    for number, suspect in shown.track(worst, "drawing", len(worst)):
        picture = side_by_side(suspect, root / files[suspect.image_id], names)
        seen = suspect.proposal
        pictures.append((picture, f"{number}. {suspect.kind}"))
        cards.append(
            Card(
                number=number,
                kind=suspect.kind,
                class_name=names[(suspect.annotation or seen)["category_id"]],
                score=suspect.score,
                seen=f"{names[seen['category_id']]}, score {seen['score']:.2f}" if seen else "",
                file=files[suspect.image_id],
                jpeg=as_jpeg(picture),
            )
        )
    notes = [note, "Left the annotation, right what the model sees. Decide in suspects.csv."]
    write_text(output / PAGE_FILE, page(f"Suspects in {name}", notes, cards))
    if pictures:
        picture = as_jpeg(sheet(pictures[:ON_SHEET]))
        write_atomically(str(output / SHEET_FILE), lambda file: file.write(picture))


def _print(value: dict) -> None:
    tell(f"{value['annotations']} annotations judged")
    tell(f"the {value['suspects']} most suspect, and {value['missing']} that may be missing:")
    tell(f"  to look at: {value['page']}")
    tell(f"  to decide in: {value['table']}; then ghm data clean")
    tell(f"  for Label Studio: {value['folder']}/label_studio.json, label_config.xml")
