"""Detectron2's data loaders, with bad images told by name."""

import itertools

from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import TrainingSampler

from ghm_d2.errors import DataError


class GHMDatasetMapper(DatasetMapper):
    """Detectron2's mapper, with two differences.

    An image that cannot be read becomes an entry "error": an exception would reach the trainer
    from a worker process as a traceback in a string. Boxes of whole numbers are scaled as others
    are: Detectron2's resizing cuts their fractions off, so that targets are up to a pixel small.
    """

    def __call__(self, dataset_dict):
        annotations = [
            a | {"bbox": [float(v) for v in a["bbox"]]} if "bbox" in a else a
            for a in dataset_dict.get("annotations", ())
        ]
        if annotations:
            dataset_dict = dataset_dict | {"annotations": annotations}
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


class SkippingSampler(TrainingSampler):
    """Detectron2's endless sampler, from somewhere along its sequence of images."""

    def __init__(self, size: int, seed: int, skip: int):
        """
        Args:
            size: images of the data set.
            skip: images, over all processes, that a run has seen already.
        """
        super().__init__(size, seed=seed)
        self._skip = skip

    def __iter__(self):
        yield from itertools.islice(super().__iter__(), self._skip // self._world_size, None)


def build_train_loader(cfg, start_iter: int = 0):
    """An endless loader of batches from DATASETS.TRAIN, as they follow after `start_iter` steps."""
    mapper = GHMDatasetMapper(cfg, True)
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        return build_detection_train_loader(cfg, mapper=mapper)
    dataset = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    sampler = SkippingSampler(len(dataset), cfg.SEED, start_iter * cfg.SOLVER.IMS_PER_BATCH)
    return build_detection_train_loader(cfg, mapper=mapper, dataset=dataset, sampler=sampler)


def build_test_loader(cfg, dataset_name: str):
    """A loader of the whole of `dataset_name`, one image a batch."""
    return build_detection_test_loader(cfg, dataset_name, mapper=GHMDatasetMapper(cfg, False))
