"""Detectron2's data loaders, with bad images told by name."""

import copy

import torch
from detectron2.data import DatasetMapper, build_detection_test_loader, build_detection_train_loader
from detectron2.data.detection_utils import SizeMismatchError

from ghm_d2.errors import DataError


class GHMDatasetMapper(DatasetMapper):
    """Detectron2's mapper; an image that cannot be read becomes an entry "error".

    An exception would reach the trainer from a worker process as a traceback in a string.
    """

    def __call__(self, dataset_dict):
        try:
            return super().__call__(dataset_dict)
        except SizeMismatchError:
            error = "its size is not the one that the annotations give"
        except Exception as fault:  # image decoders raise errors of every kind on bad files
            error = f"cannot be read: {fault}"
        kept = {k: dataset_dict[k] for k in ("width", "height") if k in dataset_dict}
        return kept | {"error": f"{dataset_dict['file_name']}: {error}"}


def raise_on_bad_image(batch: list[dict]) -> list[dict]:
    """The batch, if every image in it was read.

    Raises:
        DataError: names the first one that was not.
    """
    for item in batch:
        if "error" in item:
            raise DataError(f"{item['error']}; `ghm data check` lists all such images")
    return batch


def build_train_loader(cfg):
    """An endless loader of batches from DATASETS.TRAIN."""
    return build_detection_train_loader(cfg, mapper=GHMDatasetMapper(cfg, True))


def build_test_loader(cfg, dataset_name: str, num_images: int | None = None):
    """A loader of the whole of `dataset_name`, or its first images, one image a batch."""
    mapper = GHMDatasetMapper(cfg, False)
    if num_images is None:
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)
    from detectron2.data import DatasetCatalog

    items = copy.deepcopy(DatasetCatalog.get(dataset_name)[:num_images])
    return build_detection_test_loader(items, mapper=mapper)


def tiny_batch(num_classes: int, size: tuple[int, int] = (64, 64)) -> list[dict]:
    """Two made-up images, one of them without an object: to try a model for a step."""
    from detectron2.structures import Boxes, Instances

    height, width = size
    batch = []
    for boxes in ([[4.0, 4.0, width / 2, height / 2]], []):
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        instances.gt_classes = torch.full((len(boxes),), num_classes - 1)
        image = torch.full((3, height, width), 127, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch
