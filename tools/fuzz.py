#!/usr/bin/env python3
"""Feeds damaged files to the importers and to the readers of weights, and looks at what comes out.

    python tools/fuzz.py coco --seconds 300    # or voc, yolo, weights
    python tools/fuzz.py coco FILE...          # repeat findings, without Atheris

An input is the annotation files of a small folder, with a line of ==== between them, or one weight
file after a byte for its kind. Right are a data set that `ghm data check` and Detectron2 accept,
and an error of ours in one line. Anything else is a finding, as is an input that takes 20 s or
3 GB: Atheris stops, and leaves it as a file, crash-*, timeout-* or oom-*, beside the corpus.
Needs Atheris 3 (`pip install atheris`), which Linux and macOS have.
"""

import argparse
import io
import pickle
import sys
import tempfile
from pathlib import Path

TARGETS = ("coco", "voc", "yolo", "weights")
LIMITS = ("-timeout=20", "-rss_limit_mb=3072", "-max_len=8192", "-len_control=0")
# What is wrong with the pictures or in having no boxes, which no importer can mend.
OF_THE_DATA = {"leakage", "empty"}
PICTURES = {"coco": "images", "voc": "JPEGImages", "yolo": "images"}
SOUND = {
    "coco": {
        "train.json": """{"images": [
  {"id": 1, "file_name": "a.png", "width": 16, "height": 12},
  {"id": 2, "file_name": "b.png", "width": 16, "height": 12}],
 "annotations": [
  {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 5, 6], "area": 30, "iscrowd": 0,
   "segmentation": [[1, 2, 6, 2, 6, 8]]},
  {"id": 2, "image_id": 2, "category_id": 2, "bbox": [0.5, 1e0, 9, 9], "iscrowd": 1,
   "segmentation": {"size": [12, 16], "counts": [20, 30, 142]}},
  {"id": 3, "image_id": 2, "category_id": 2, "bbox": [1, 2, 3, 4],
   "segmentation": {"size": [12, 16], "counts": "d0n0^4"}}],
 "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog", "supercategory": "pet"}]}""",
    },
    "voc": {
        "Annotations/a.xml": """<annotation><filename>a.png</filename>
<size><width>16</width><height>12</height><depth>3</depth></size>
<object><name>cat</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8.5</ymax></bndbox></object>
</annotation>""",
        "Annotations/b.xml": """<?xml version="1.0" encoding="utf-8"?>
<annotation><object><name>dog</name>
<bndbox><xmin>3</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>
</annotation>""",
        "ImageSets/Main/train.txt": "a\nb -1\n",
        "labels.txt": "cat\ndog\n",
    },
    "yolo": {
        "data.yaml": """path: .
train: images
val: [val.txt]
nc: 2
names: {0: cat, 1: "dog"}
""",
        "labels/a.txt": "0 0.5 0.5 0.25 0.5\n1 .5 .5 .25 .5 .9\n",
        "labels/b.txt": "1 0.1 0.1 0.6 0.1 0.6 0.7\n",
        "val.txt": "./images/a.png\nimages\\b.png\n",
    },
}
SEPARATOR = b"\n====\n"
WORDS = (
    *("null", "true", "NaN", "-Infinity", "1e999", "-1", "0", "9" * 400, "[]", "{}", "[[[[", '""'),
    *('"\\ud800"', '"\\u0000"', '"\\u001b[2J"', "../x", "/x", ".", "..\\", "\\n", "&amp;", "&#0;"),
    *("<!DOCTYPE a>", "<![CDATA[", "encoding='utf-16'", "<object>", "</object>", "!!python/none"),
    *("&a [*a, *a]", "<<: *a", "? ", "kpt_shape", "valid", "inf", "nan", "\0", "1_0", "\u0661"),
)


def main() -> None:
    """Fuzz one target, or repeat the inputs in files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("files", nargs="*", type=Path, help="findings to repeat")
    parser.add_argument("--seconds", type=int, default=300, help="default 300")
    parser.add_argument("--folder", type=Path, help="of the corpus and the findings")
    chosen = parser.parse_args()
    if chosen.files:
        try_one = prepare(chosen.target)
        for file in chosen.files:
            try_one(file.read_bytes())
            print(f"{file}: nothing found")
        return
    folder = chosen.folder or Path(tempfile.gettempdir()) / "ghm_fuzz"
    fuzz(chosen.target, folder.absolute() / chosen.target, chosen.seconds)


def fuzz(target: str, folder: Path, seconds: int) -> None:
    """Run Atheris, which ends the process. The corpus in `folder` is kept and grows."""
    try:
        import atheris
    except ImportError:
        sys.exit("error: fuzzing needs Atheris; install it with: pip install atheris")
    with atheris.instrument_imports(include=["ghm_d2", "yaml"]):
        try_one = prepare(target)
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(target)):
        (corpus / f"seed{number}").write_bytes(seed)
    escaped = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in WORDS)
    (folder / "words").write_text("".join(f'"{word}"\n' for word in escaped))
    options = (f"-max_total_time={seconds}", f"-artifact_prefix={folder}/", f"-dict={folder}/words")
    atheris.Setup([sys.argv[0], *LIMITS, *options, "-print_final_stats=1", str(corpus)], try_one)
    atheris.Fuzz()


def prepare(target: str):
    """The function that takes an input, after importing what it needs."""
    work = Path(tempfile.mkdtemp(prefix=f"ghm_fuzz_{target}_"))
    if target == "weights":
        readers = weight_readers()
        return lambda data: judge_weights(data, readers, work)

    # all that an import needs: now, and not in the time of the first input
    import detectron2.data.datasets  # noqa: F401

    from ghm_d2.data.importing import folders  # noqa: F401

    return lambda data: try_import(target, data, work)


def seeds(target: str) -> list[bytes]:
    """Sound inputs."""
    if target == "weights":
        return [bytes([i]) + content for i, content in enumerate(sound_weights())]
    return [SEPARATOR.join(text.encode() for text in SOUND[target].values())]


# --- importers ---


def try_import(kind: str, data: bytes, work: Path) -> None:
    """Import a folder with the files in `data`, of which the last may be missing, and judge it."""
    contents = zip(SOUND[kind], data.split(SEPARATOR, len(SOUND[kind]) - 1), strict=False)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        judge_import(make_folder(kind, Path(folder) / "source", dict(contents)), kind)


def make_folder(kind: str, folder: Path, contents: dict[str, bytes]) -> Path:
    """A folder with two pictures of 16 x 12 px, and files of these contents."""
    from PIL import Image

    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / PICTURES[kind]).mkdir()
    for name, shade in (("a", 60), ("b", 200)):
        Image.new("RGB", (16, 12), (shade, 0, 0)).save(folder / PICTURES[kind] / f"{name}.png")
    return folder


def judge_import(source: Path, kind: str) -> bool:
    """Import `source` to beside it. Returns whether that went well.

    Raises: AssertionError, or what the importer let through, where neither a sound data set nor an
    error of ours in one line comes of it, or a file elsewhere.
    """
    from detectron2.data.datasets import load_coco_json

    from ghm_d2.data.checking.check import check
    from ghm_d2.data.checking.validate import validate_json
    from ghm_d2.data.coco_json import SPLITS, is_plain
    from ghm_d2.data.importing.folders import import_folder
    from ghm_d2.errors import DataError, UsageError

    before, output = files_below(source.parent), source.parent / "out"
    try:
        names = import_folder(source, output, kind=kind)["names"]
    except (DataError, UsageError) as error:
        judge_message(error)
        assert files_below(source.parent) == before, "a refused import left files"
        return False
    assert all(map(is_plain, names)), f"class names that are no plain text: {names}"
    written = {path for path in files_below(source.parent) if path.is_relative_to(output)}
    assert files_below(source.parent) - written == before, "a file outside the output"
    assert all(p.resolve().is_relative_to(source.parent) for p in written), "a link to elsewhere"
    images = output / "images"
    splits = {s: (output / f"{s}.json", images) for s in SPLITS if output / f"{s}.json" in written}
    assert splits, "no split"
    errors = check(splits).errors
    assert {e.kind for e in errors} <= OF_THE_DATA, f"errors in the output: {errors}"
    for split in splits.keys() - {e.split for e in errors if e.kind == "empty"}:
        validate_json(str(splits[split][0]), str(images))
        load_coco_json(str(splits[split][0]), str(images))
    return True


def files_below(folder: Path) -> set[Path]:
    """Everything in a folder that is not a folder."""
    return {path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def judge_message(error: Exception) -> None:
    """One line, that nothing in the files can turn into a command to the terminal."""
    from ghm_d2.data.coco_json import is_plain

    assert str(error) and is_plain(str(error)), f"not one plain line: {str(error)!r}"


# --- weights ---


def weight_readers() -> list:
    """(suffix, function from path to state dict) of each kind of weight file."""
    from torch import nn

    from ghm_d2.modeling.weights.weight_files import read_weights, state_dict_of
    from ghm_d2.modeling.yolov3.darknet_weights import read_darknet_weights

    model = nn.Module()
    model.backbone = tiny_darknet()

    def read(path: str) -> dict:
        return state_dict_of(read_weights(path), path)

    suffixes = [(suffix, read) for suffix in (".pkl", ".pth", ".safetensors")]
    return [*suffixes, (".weights", lambda path: read_darknet_weights(path, model))]


def tiny_darknet():
    """A DarkNet of 465 parameters and statistics."""
    from ghm_d2.modeling.yolov3.darknet import DarkNet

    return DarkNet(stem_channels=1, depths=(0, 0, 0))


def sound_weights() -> list[bytes]:
    """A file of each kind that `weight_readers` gives, in its order."""
    import torch
    from safetensors.torch import save
    from torch import nn

    from ghm_d2.modeling.yolov3.darknet_weights import write_darknet_weights

    state = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    saved, model = io.BytesIO(), nn.Module()
    torch.save({"model": state, "iteration": 3}, saved)
    model.backbone = tiny_darknet()
    with tempfile.TemporaryDirectory() as folder:
        write_darknet_weights(f"{folder}/a.weights", model)
        darknet = Path(folder, "a.weights").read_bytes()
    return [pickle.dumps({"model": arrays}), saved.getvalue(), save(state), darknet]


def judge_weights(data: bytes, readers: list, work: Path) -> None:
    """Read one weight file. Raises what the reader let through."""
    from ghm_d2.errors import WeightsError

    if not data:
        return
    suffix, read = readers[data[0] % len(readers)]
    path = work / f"file{suffix}"
    path.write_bytes(data[1:])
    try:
        read(str(path))
    except WeightsError as error:
        judge_message(error)


if __name__ == "__main__":
    main()
