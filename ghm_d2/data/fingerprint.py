"""A name for the content of a data set, wherever it lies."""

import hashlib
import os

from ghm_d2.data.coco_json import load_json


def fingerprint(name: str) -> str:
    """Twelve hexadecimal digits of a registered data set: its annotations, and its images' sizes.

    Of a data set without a COCO JSON it is the hash of its name: what it holds is unknown.

    Args:
        name: registered with Detectron2.

    Raises:
        DataError: the JSON cannot be read.
    """
    from detectron2.data import MetadataCatalog

    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file") is None:
        return hashlib.sha256(name.encode()).hexdigest()[:12]
    with open(metadata.json_file, "rb") as file:
        content = hashlib.sha256(file.read())
    for image in load_json(metadata.json_file)["images"]:
        path = os.path.join(metadata.image_root, image["file_name"])
        content.update(f"{os.path.getsize(path) if os.path.isfile(path) else -1} ".encode())
    return content.hexdigest()[:12]
