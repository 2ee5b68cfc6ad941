"""Files that are in order, which hostile ones take the place of."""

import io
import json
import os
import random
import warnings
from functools import cache
from pathlib import Path

from PIL import Image
from traps import Case

CONFIG = "quick/retinanet_focal.yaml"
TINY = {
    "MODEL.TIMM.NAME": "test_efficientnet",
    "MODEL.TIMM.PRETRAINED": "",
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RETINANET.NUM_CLASSES": 2,
    "DATASETS.CLASS_NAMES": ["one", "two"],
    "INPUT.MIN_SIZE_TRAIN": [32],
    "INPUT.MIN_SIZE_TEST": 32,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.IMS_PER_BATCH": 1,
    "MODEL.DEVICE": "cpu",
}
ESCAPE = "a\x1b]0;title\x07\x1b[2J"  # a terminal would take it for a command
DEEP = "[" * 10**5
TEN_KEYS = "{" + ", ".join(f"k{i}: @" for i in range(10)) + "}"
TEN_ITEMS = "[" + ", ".join(["@"] * 10) + "]"


class Evil:
    """Pickled, it is a command to make the canary."""

    def __init__(self, work: Path):
        self.canary = work.parent / "canary"

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def picture(path: Path, size: tuple[int, int] = (40, 32), seed: int = 0) -> None:
    """A PNG or JPEG of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = random.Random(seed).randbytes(size[0] * size[1] * 3)
    image = Image.frombytes("RGB", size, noise)
    image.save(path, "JPEG" if path.suffix == ".jpg" else "PNG")


def coco(name: str = "a.png", box=(2, 3, 10, 8), **more) -> dict:
    """A COCO JSON of one image; `more` goes into its annotation."""
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": list(box)}
    annotation |= {"area": 80, "iscrowd": 0} | more
    return {
        "images": [{"id": 1, "file_name": name, "width": 40, "height": 32}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }


def coco_source(work: Path, text: str | dict, images: tuple[str, ...] = ("a.png",)) -> None:
    """source/train.json and its images; text as it stands, a dict as JSON."""
    source = work / "source"
    source.mkdir(exist_ok=True)
    text = text if isinstance(text, str) else json.dumps(text)
    (source / "train.json").write_text(text, encoding="utf-8")
    for number, image in enumerate(images):
        picture(source / image, seed=number)


def data_folder(work: Path) -> None:
    """data/, as `ghm data import` leaves it."""
    for number, split in enumerate(("train", "val")):
        picture(work / f"data/images/{split}.png", seed=number)
        text = json.dumps(coco(f"{split}.png"))
        (work / f"data/{split}.json").write_text(text, encoding="utf-8")


@cache
def detector() -> tuple[str, bytes]:
    """config.yaml and model.pth of a small detector."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of torch and Detectron2
        import torch
        from detectron2.modeling import build_model

        from ghm_d2.config import config_text, load_config
        from ghm_d2.register import register_all

        register_all()
        cfg = load_config(CONFIG, [word for key in TINY for word in (key, repr(TINY[key]))])
        torch.save({"model": build_model(cfg).state_dict()}, file)
    return config_text(cfg), file.getvalue()


def trained(work: Path) -> None:
    """run/config.yaml and run/model.pth, and data/."""
    text, weights = detector()
    (work / "run").mkdir()
    (work / "run/config.yaml").write_text(text, encoding="utf-8")
    (work / "run/model.pth").write_bytes(weights)
    data_folder(work)


def laughs(first: str, more: str, levels: int = 12) -> str:
    """YAML whose aliases stand for ten to the power of `levels` things."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {more.replace('@', f'*a{i - 1}')}" for i in range(1, levels)]
    return "\n".join(lines)


def voc_object(name: str = "x", extra: str = "", box=(1, 1, 9, 9)) -> str:
    """The text of an annotation."""
    sides = "".join(
        f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return (
        f"<annotation>{extra}<object><name>{name}</name><bndbox>{sides}</bndbox></object>"
        "</annotation>"
    )


def imported(file: str, tried: str, write, says: str, exit: int = 3, slow: bool = False) -> Case:
    """A folder source/, which write(work) makes, through `ghm data import`."""
    command = ("data", "import", "source", "--output", "out", "--strict")
    return Case(file, tried, write, command, says, exit, stdout=exit == 0, slow=slow)
