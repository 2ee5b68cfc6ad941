"""The error message for a folder in which no data set was recognised."""

from collections import Counter
from pathlib import PurePosixPath

from ghm_d2.data.coco_json import load_json
from ghm_d2.data.importing.images import Images
from ghm_d2.data.importing.listing import Listing, first_bytes
from ghm_d2.data.importing.pairing import split_of
from ghm_d2.data.importing.voc import parse_xml
from ghm_d2.errors import DataError

_EXPECTED = {
    "coco": "COCO JSON with images, annotations and categories",
    "voc": "Pascal VOC XML with the root element <annotation>",
    "yolo": "YOLO labels (.txt files named like the images) with data.yaml or classes.txt",
}


def nothing_found(listing: Listing, images: Images, kind: str) -> DataError:
    """Return the error for a folder without a data set: what was found, and what was expected.

    Raises: DataError if a JSON file that is named like COCO's is malformed, or an XML file that is
    named like an image.
    """
    for name in listing.of(".json"):
        if split_of(PurePosixPath(name).stem) or "instances" in name or "annotations" in name:
            load_json(listing.root / name)
    for name in listing.of(".xml"):
        if PurePosixPath(name).stem in images:
            parse_xml(listing.root / name)
    suffixes = Counter(PurePosixPath(name).suffix.lower() for name in listing.files)
    others = Counter({s: n for s, n in suffixes.items() if s in (".json", ".xml", ".txt", ".csv")})
    found = [f"{len(images.listing.images)} images"]
    found += [f"{count} {suffix} files" for suffix, count in others.most_common()]
    wanted = [_EXPECTED[kind]] if kind in _EXPECTED else list(_EXPECTED.values())
    what = f"{kind} data" if kind in _EXPECTED else "data"
    return DataError(
        f"{listing.root}: no {what} set recognised; found {', '.join(found)}; "
        + (_hint(listing) or f"expected {', or '.join(wanted)}")
    )


def _hint(listing: Listing) -> str:
    """Return advice on formats that are common and not read here; "" if the folder has none."""
    for name in listing.of(".xml")[:20]:
        if b"<annotations>" in first_bytes(listing.root / name, 2**10):
            return f"{name} has CVAT's own XML format; export the data as COCO 1.0 instead"
    for name in listing.of(".json")[:20]:
        text = first_bytes(listing.root / name, 2**16)
        if b'"shapes"' in text and b'"imagePath"' in text:
            return f"{name} has labelme's JSON format; convert it with labelme's labelme2coco.py"
        if b'"annotations"' in text and b'"from_name"' in text:
            return f"{name} has Label Studio's JSON format; export as COCO or YOLO instead"
    return ""
