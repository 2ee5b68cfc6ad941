"""`ghm data`: make, import, check, show and correct data sets."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from ghm_d2.errors import UsageError

from ..common.console import emit, out, tell, user_errors
from ..common.options import PASS_UNKNOWN, Json
from .suspects import suspects

app = typer.Typer(
    help="Make, import, check, show and correct data sets.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.command(
    "suspects",
    context_settings=PASS_UNKNOWN,
    epilog="Example: ghm data suspects my_folder --folds 3 --jobs 2 SOLVER.MAX_ITER 600",
)(suspects)
SHOWN = 20  # problems printed for people; --json and the report have them all

Output = Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a folder that ghm data wrote.")
]
Data = Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="digits, coco_2017, or a folder.")]


def _rate(what: str):
    return Annotated[float | None, typer.Option(help=f"Share {what}. Default: --noise / 3.")]


@app.command(epilog="Example: ghm data make --output noisy --train 400 --noise 0.3 --seed 1")
def make(
    output: Output,
    train: Annotated[int, typer.Option(help="Images in train.")] = 300,
    val: Annotated[int, typer.Option(help="Images in val.")] = 60,
    size: Annotated[tuple[int, int], typer.Option(help="Shortest and longest image side, px.")] = (
        208,
        288,
    ),
    objects: Annotated[tuple[int, int], typer.Option(help="Fewest and most digits per image.")] = (
        4,
        10,
    ),
    side: Annotated[tuple[int, int], typer.Option(help="Smallest and largest digit, px.")] = (
        16,
        112,
    ),
    clutter: Annotated[tuple[int, int], typer.Option(help="Fewest, most other shapes.")] = (3, 8),
    noise: Annotated[float, typer.Option(help="Share of train's annotations to spoil.")] = 0.0,
    noise_class: _rate("of annotations with a wrong class") = None,
    noise_shift: _rate("of annotations with a shifted box") = None,
    noise_missing: _rate("of annotations left out") = None,
    noise_val: Annotated[bool, typer.Option("--noise-val", help="Spoil val as well.")] = False,
    seed: Annotated[int, typer.Option(help="Each seed gives another data set.")] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Generate a data set of handwritten digits of many sizes on cluttered backgrounds."""
    with user_errors():
        from ghm_d2.data.coco_json import write_json
        from ghm_d2.data.digits import dataset as digits
        from ghm_d2.data.output import MAKE_REPORT, new_folder

        from ..common.progress import progress

        try:
            spec = digits.DigitsSpec(
                seed=seed, train=train, val=val, image_size=size, objects=objects, side=side,
                clutter=clutter, noise=noise, noise_class=noise_class, noise_shift=noise_shift,
                noise_missing=noise_missing, noise_val=noise_val,
            )  # fmt: skip
        except ValueError as error:
            raise UsageError(f"{error}") from None
        with new_folder(output, overwrite) as draft, progress() as shown:
            splits = digits.write(spec, draft, shown.track)
            report = {"names": list(digits.CLASSES), "splits": splits}
            write_json(draft / MAKE_REPORT, report)
        report = {"folder": str(output)} | report
        emit(report, as_json=json, human=lambda: _print_splits(report))


@app.command("import", epilog="Example: ghm data import VOC2007 --output voc")
def import_(
    source: Annotated[Path, typer.Argument(help="A COCO, Pascal VOC or YOLO folder.")],
    output: Output,
    format: Annotated[str, typer.Option(help="auto, coco, voc or yolo.")] = "auto",
    split: Annotated[float, typer.Option(help="Share for train if there is no val split.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of that split.")] = 0,
    copy: Annotated[bool, typer.Option("--copy", help="Copy images; do not link them.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop, with exit code 3, if anything would be dropped.")
    ] = False,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, if elsewhere or in several places.")
    ] = None,
    all_classes: Annotated[
        bool, typer.Option("--all-classes", help="Keep COCO classes that no annotation uses.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Convert a COCO, Pascal VOC or YOLO folder into one that ghm trains on.

    Unusable boxes and images are dropped, and listed here and in import_report.json.
    """
    with user_errors():
        from ghm_d2.data.importing.folders import import_folder

        from ..common.progress import progress

        with progress() as shown:
            report = import_folder(
                source, output, kind=format, split=split, seed=seed, copy=copy, strict=strict,
                overwrite=overwrite, image_folder=images, all_classes=all_classes,
                track=shown.track,
            )  # fmt: skip
        report = {"folder": str(output)} | report
        emit(report, as_json=json, human=lambda: _print_import(report))


@app.command(epilog="Example: ghm data check my_folder --json > problems.json")
def check(data: Data, json: Json = False) -> None:
    """Find problems that would silently ruin a training. Exit code 3 if one is an error."""
    with user_errors():
        from dataclasses import asdict

        from ghm_d2.data.catalog import locate
        from ghm_d2.data.checking.check import check
        from ghm_d2.errors import DataError

        from ..common.logs import quiet
        from ..common.progress import progress

        quiet()
        with progress() as shown:
            report = check(locate(data), shown.track)
        value = {
            "errors": len(report.errors),
            "warnings": len(report.problems) - len(report.errors),
            "problems": [
                asdict(problem) | {"severity": problem.severity} for problem in report.problems
            ],
            "splits": report.summary,
        }
        emit(value, as_json=json, human=lambda: _print_check(value))
        if report.errors:
            raise typer.Exit(DataError.exit_code)


@app.command(
    epilog="Example: ghm data clean my_folder --apply suspects/suspects.csv --output my_folder_2"
)
def clean(
    data: Data,
    apply: Annotated[
        Path,
        typer.Option(help="suspects.csv with your decisions, or Label Studio's JSON export."),
    ],
    output: Output,
    drop: Annotated[
        int, typer.Option(min=0, help="Also drop the table's first N undecided annotations.")
    ] = 0,
    add: Annotated[
        int, typer.Option(min=0, help="Also accept the first N undecided missing annotations.")
    ] = 0,
    split: Annotated[str, typer.Option(help="The split that was judged.")] = "train",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a new data set with corrected annotations; the old one does not change.

    In the first column of suspects.csv, "drop" removes an annotation, "accept" takes what the model
    sees instead, and an empty cell keeps it. Images that were finished in Label Studio get the
    boxes of its export.
    """
    with user_errors():
        from ghm_d2.data.cleaning.clean import clean

        report = clean(data, apply, output, split, drop, add, overwrite)
        report = {"folder": str(output)} | report
        emit(report, as_json=json, human=lambda: _print_cleaned(report))


@app.command(epilog="Example: ghm data show digits --split val --output digits.png")
def show(
    data: Data,
    output: Annotated[Path, typer.Option(help="The picture to write: .png or .jpg.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    count: Annotated[int, typer.Option(min=1, max=400, help="Number of images.")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the picture.")] = False,
    json: Json = False,
) -> None:
    """Draw a sheet of images with their boxes, to check them by eye."""
    with user_errors():
        from ghm_d2.data.catalog import locate
        from ghm_d2.data.show import contact_sheet, pick
        from ghm_d2.errors import DataError

        from ..common.logs import quiet

        quiet()
        if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise UsageError(f"--output is {output}; it must end in .png or .jpg")
        if output.exists() and not overwrite:
            raise UsageError(f"{output}: exists already; pass --overwrite to replace it")
        splits = locate(data)
        if split not in splits:
            raise UsageError(f"{data} has no split {split!r}, only {', '.join(splits)}")
        pictures, names = pick(*splits[split], count)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(pictures, names).save(output)
        except OSError as error:
            raise DataError(f"{output}: cannot be written ({error})") from None
        value = {"file": str(output), "images": len(pictures)}
        value["boxes"] = sum(len(boxes) for _, _, boxes in pictures)
        emit(
            value,
            as_json=json,
            human=lambda: tell(f"{output}: {len(pictures)} images, {value['boxes']} boxes"),
        )


def _print_splits(report: dict) -> None:
    from rich.table import Table

    columns = list(next(iter(report["splits"].values())))
    table = Table("split", *(column.replace("_", " ") for column in columns))
    for split, counts in report["splits"].items():
        table.add_row(split, *(str(counts[column]) for column in columns))
    out.print(table)
    names = report["names"]
    few = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    tell(f"{len(names)} classes: {few}")
    tell(f"Written to {report['folder']}: train with --dataset {report['folder']}")


def _print_import(report: dict) -> None:
    tell(f"recognised: {report['format']}: {report['layout']}")
    _print_splits(report)
    for note in report["notes"]:
        tell(f"note: {note}")
    if report["clipped"]:
        tell(f"{len(report['clipped'])} boxes clipped to their image, the first: ")
        tell(f"  {report['clipped'][0]}")
    dropped = report["dropped"]
    plural = {"image": "images", "box": "boxes", "mask": "masks", "annotation": "annotations"}
    counts = Counter(d["what"] for d in dropped)
    told = [f"{n} {plural[what] if n > 1 else what}" for what, n in counts.items()]
    tell("dropped: " + (", ".join(told) or "nothing"))
    _lines([f"{d['split']} {d['what']}: {d['file']}: {d['detail']}" for d in dropped])


def _print_cleaned(report: dict) -> None:
    counts = ", ".join(f"{report[what]} {what}" for what in ("dropped", "changed", "added"))
    tell(f"{report['split']}: {counts}")
    tell(f"Written to {report['folder']}: train with --dataset {report['folder']}")


def _print_check(value: dict) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ghm_d2.errors import printable

    splits = value["splits"]
    if splits:
        table = Table("", *splits)
        for row in ("images", "background", "boxes"):
            table.add_row(row, *(str(s[row]) for s in splits.values()))
        table.add_section()
        for size in next(iter(splits.values()))["sizes"]:
            table.add_row(f"{size} boxes", *(str(s["sizes"][size]) for s in splits.values()))
        table.add_section()
        for name in list(dict.fromkeys(n for s in splits.values() for n in s["per_class"])):
            counts = (s["per_class"].get(name, "-") for s in splits.values())
            table.add_row(escape(printable(name)), *(str(count) for count in counts))
        out.print(table)
    _lines(
        [f"{p['severity']}: {p['split']}: {p['file']}: {p['detail']}" for p in value["problems"]]
    )
    tell(f"{value['errors']} errors, {value['warnings']} warnings")


def _lines(lines: list[str]) -> None:
    for line in lines[:SHOWN]:
        tell(f"  {line}")
    if len(lines) > SHOWN:
        tell(f"  ... and {len(lines) - SHOWN} more: --json has them all")
