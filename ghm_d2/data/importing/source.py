"""The output of the readers of COCO, VOC and YOLO folders: raw annotations, not yet checked.

The readers are our own. The loaders of `supervision` were tried first: they do not name what they
skip, put the corners of inverted VOC boxes in order (BCCD's empty boxes become 1 x 1 boxes), drop
VOC's `difficult`, decode every image to learn its size, and let a file name leave its folder. Tests
check that both give the same for clean folders.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ghm_d2.data.coco_json import is_plain
from ghm_d2.errors import DataError


@dataclass
class Box:
    """One annotation, as its file has it."""

    where: str  # "line 3", "object 2", "annotation 17": for reports
    category: int  # index into Source.names
    bbox: list[float]  # [x, y, w, h]: px, or fractions of the image if Item.relative
    fault: str | None = None  # why it cannot be used, if the reader already knows
    extra: dict = field(default_factory=dict)  # iscrowd, area, segmentation, difficult


@dataclass
class Item:
    """One image with its annotations."""

    image: Path  # where it should be; it may be missing
    name: str  # its path below the images folder of the output
    where: str  # the annotation file, for reports
    boxes: list[Box]
    size: tuple[int, int] | None = None  # (width, height) that the annotations claim
    relative: bool = False
    image_id: int | None = None
    fault: str | None = None
    place: str = ""  # the image's path in the listing it was found in


class Dropped(NamedTuple):
    """One thing left out: `what` is "box", "mask", "image" or "annotation"; fix it in `file`."""

    split: str
    what: str
    file: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}"


@dataclass
class Source:
    """A whole folder. Keys of `splits`: "train", "val", "test"; "" for images without a split."""

    kind: str  # "coco" | "voc" | "yolo"
    names: list[str]
    splits: dict[str, list[Item]]
    layout: str = ""  # what was recognised, in a few words
    ids: list[int] = field(default_factory=list)  # category ids; 1, 2, ... unless given
    notes: list[str] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)

    def __post_init__(self):
        self.ids = self.ids or list(range(1, len(self.names) + 1))

    def drop_image(self, split: str, file: str, why: str) -> None:
        """Record that an image that `file` refers to is left out."""
        self.dropped.append(Dropped(split, "image", file, why))


def unique_names(names: list, where: Path) -> list[str]:
    """Return class names as text. Raises DataError unless they are distinct, non-empty scalars."""
    for name in names:
        # Lists are refused, not printed: a few YAML aliases can nest to billions of elements.
        if isinstance(name, bool) or not isinstance(name, str | int | float) or not str(name):
            raise DataError(f"{where}: class names must be text (in YAML, quote yes, no and null)")
    texts = [str(name) for name in names]
    if not texts:
        raise DataError(f"{where}: has no class names")
    odd = next((text for text in texts if not is_plain(text)), None)
    if odd is not None:
        raise DataError(f"{where}: the class name {odd!r:.80} has control characters; rename it")
    double = sorted({t for t in texts if texts.count(t) > 1}) if len(texts) < 10_000 else []
    if double:
        raise DataError(f"{where}: the class name {double[0]!r} occurs twice; rename one")
    return texts
