"""The generated data set `digits`: handwritten digits at many scales on cluttered backgrounds.

Three parameters control what GHM addresses: how rare the objects are (`objects`), how much their
size varies (`side`), and how wrong the annotations are (`noise`). Image i depends only on the seed,
the split and i: never on the number of images, nor on the noise.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ghm_d2.data import masks
from ghm_d2.data.coco_json import write_json
from ghm_d2.data.digits import draw
from ghm_d2.data.digits import noise as annotation_noise

CLASSES = tuple("0123456789")
SPLITS = ("train", "val")
# Part of the specification's hash: raise it when the output changes, to generate caches anew.
VERSION = 2
# Scikit-learn's scans are ordered by writer: with the last fifth as val, most of val's writers, not
# only its scans, are absent from train.
_TRAIN_SCANS = 1437


@dataclass(frozen=True)
class DigitsSpec:
    """Parameters of a generated data set; a ValueError names a wrong field, its value and range.

    seed: 0 or more. train, val: images in each split, 0..1,000,000.
    image_size: (shortest, longest) side of the images in px, 64..4096, drawn anew for each side.
    objects: (fewest, most) digits in an image, 0..500; those that find no room are left out.
    side: (smallest, largest) longer side of a digit's box in px, 8..image_size[0] - 4, log-uniform.
    clutter: (fewest, most) shapes and strokes that are no digits, 0..500.
    noise: share of annotations spoilt in all, 0..1, a third each: wrong class, shifted box,
        missing box. noise_class, noise_shift, noise_missing replace their third.
    noise_val: spoil the annotations of val too.
    """

    seed: int = 0
    train: int = 300
    val: int = 60
    image_size: tuple[int, int] = (208, 288)
    objects: tuple[int, int] = (4, 10)
    side: tuple[int, int] = (16, 112)
    clutter: tuple[int, int] = (3, 8)
    noise: float = 0.0
    noise_class: float | None = None
    noise_shift: float | None = None
    noise_missing: float | None = None
    noise_val: bool = False

    def __post_init__(self):
        _in_range("seed", self.seed, 0, 2**63 - 1)
        _in_range("train", self.train, 0, 1_000_000)
        _in_range("val", self.val, 0, 1_000_000)
        _ordered("image_size", self.image_size, 64, 4096)
        _ordered("objects", self.objects, 0, 500)
        _ordered("side", self.side, 8, self.image_size[0] - 4)
        _ordered("clutter", self.clutter, 0, 500)
        for name, value in self.noise_rates.items():
            _in_range(f"noise_{name}", value, 0, 1)
        _in_range("noise", self.noise, 0, 1)
        _in_range("the sum of the noise rates", sum(self.noise_rates.values()), 0, 1 + 1e-9)

    @property
    def noise_rates(self) -> dict[str, float]:
        """Probability of each kind of annotation noise: "class", "shift", "missing"."""
        own = {"class": self.noise_class, "shift": self.noise_shift, "missing": self.noise_missing}
        return {kind: self.noise / 3 if rate is None else rate for kind, rate in own.items()}

    @property
    def digest(self) -> str:
        """Ten hexadecimal digits that differ if the generated data would differ."""
        text = json.dumps([VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


class Sample(NamedTuple):
    """An image, (height, width, 3) uint8 RGB, its annotations, and those that noise left out."""

    image: np.ndarray
    annotations: list[dict]
    missing: list[dict]


def generate(spec: DigitsSpec, split: str) -> Iterator[Sample]:
    """Yield the images of `split` ("train" or "val"), in order.

    Annotations have COCO's fields: segmentation, the RLE of the ink (holes excluded); bbox
    [x, y, w, h] in px, tight around it; category_id 1..10, the digit plus one; iscrowd 0; area,
    w * h. They add `scan`, the index of scikit-learn's scan, and `noise`: "none", "class" (then
    with `true_category_id`) or "shift" (with `true_bbox`).

    The area is that of the box; COCO's own annotations have that of the mask. APs, APm and APl, of
    masks too, thus go by the size of the box, as `side` and `ghm data check` do.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; digits has train and val")
    noisy = split == "train" or spec.noise_val
    for index in range(getattr(spec, split)):
        # Two random streams, so that the noise changes annotations and no image.
        key = [spec.seed, SPLITS.index(split), index]
        image, placed = draw.scene(np.random.default_rng([*key, 0]), spec, _scans(split))
        height, width = image.shape[:2]
        annotations = [_annotation(*digit, (height, width)) for digit in placed]
        if not noisy:
            yield Sample(image, annotations, [])
            continue
        rng = np.random.default_rng([*key, 1])
        spoilt = [
            annotation_noise.spoil(rng, a, spec.noise_rates, width, height) for a in annotations
        ]
        kept = [a for a in spoilt if a["noise"] != "missing"]
        yield Sample(image, kept, [a for a in spoilt if a["noise"] == "missing"])


def write(spec: DigitsSpec, folder: str | Path, track=None) -> dict[str, dict[str, int]]:
    """Write `FOLDER/{train,val}.json` and `FOLDER/images/{train,val}/*.png`.

    The same spec gives the same bytes. Boxes that noise left out are under the top-level key
    `missing_annotations`. track: as in `check.check`.
    Returns: split -> numbers of images, boxes and annotations of each kind of noise.
    """
    from PIL import Image

    folder, counts = Path(folder), {}
    for split in SPLITS:
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        coco = _empty_coco(spec, split)
        samples, total = generate(spec, split), getattr(spec, split)
        if track is not None:
            samples = track(samples, f"drawing {split}", total)
        for image_id, sample in enumerate(samples, 1):
            name = f"{split}/{image_id - 1:06d}.png"
            # PNG keeps the pixels exactly as `generate` yields them; level 1 is five times faster.
            Image.fromarray(sample.image).save(folder / "images" / name, compress_level=1)
            height, width = sample.image.shape[:2]
            image = {"id": image_id, "file_name": name, "width": width, "height": height}
            coco["images"].append(image)
            for annotation in sample.annotations:
                ids = {"id": len(coco["annotations"]) + 1, "image_id": image_id}
                coco["annotations"].append(ids | annotation)
            coco["missing_annotations"] += [{"image_id": image_id} | a for a in sample.missing]
        write_json(folder / f"{split}.json", coco)
        counts[split] = _counts(coco)
    return counts


def _empty_coco(spec: DigitsSpec, split: str) -> dict:
    return {
        "info": {"generator": "ghm data make", "version": VERSION, "split": split}
        | {"spec": asdict(spec)},
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
        "images": [],
        "annotations": [],
        "missing_annotations": [],
    }


def _counts(coco: dict) -> dict[str, int]:
    kinds = [a["noise"] for a in coco["annotations"] + coco["missing_annotations"]]
    noise = {f"noise_{kind}": kinds.count(kind) for kind in annotation_noise.KINDS}
    return {"images": len(coco["images"]), "boxes": len(coco["annotations"])} | noise


def _annotation(
    digit: int,
    scan: int,
    box: tuple[int, int, int, int],
    ink: np.ndarray,
    size: tuple[int, int],
) -> dict:
    x, y, w, h = box
    mask = np.zeros(size, bool)
    mask[y : y + h, x : x + w] = ink
    return {
        "category_id": digit + 1,
        "segmentation": masks.encode(mask),
        "bbox": [x, y, w, h],
        "area": w * h,
        "iscrowd": 0,
        "scan": scan,
        "noise": "none",
    }


@lru_cache(maxsize=2)
def _scans(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (n, 8, 8) in 0..1, their digits (n,), and their indices (n,) in scikit-learn's set."""
    from sklearn.datasets import load_digits

    data = load_digits()
    part = slice(None, _TRAIN_SCANS) if split == "train" else slice(_TRAIN_SCANS, None)
    return data.images[part] / 16, data.target[part], np.arange(len(data.target))[part]


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be from {low} to {high:g}")


def _ordered(name: str, pair: tuple[int, int], low: int, high: int) -> None:
    if not low <= pair[0] <= pair[1] <= high:
        raise ValueError(
            f"{name} is {pair[0]} {pair[1]}; it must be two numbers from {low} to {high}, "
            "the smaller first"
        )
