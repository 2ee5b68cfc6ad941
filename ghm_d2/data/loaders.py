"""Detectron2's data loaders, with bad images told by name."""

import itertools

import numpy as np
from detectron2.config import configurable
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import SizeMismatchError, filter_empty_instances
from detectron2.data.samplers import TrainingSampler

from ghm_d2.data.augment import AugmentationsWithBoxes, boxes_of, build_augmentations, centred
from ghm_d2.detectors import with_masks
from ghm_d2.errors import DataError


class GHMDatasetMapper(DatasetMapper):
    """Detectron2's mapper, with three differences.

    It augments as `build_augmentations` says; of SSD's crop only objects whose centre is inside
    stay. An image that cannot be read becomes an entry "error": an exception would reach the
    trainer from a worker process as a traceback in a string. Boxes and polygons of whole numbers
    are scaled as others are: Detectron2's resizing cuts their fractions off, so that targets are up
    to a pixel small.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations,
        centred_only: bool = False,
        tight_boxes: bool = False,
        **kwargs,
    ):
        """
        Args:
            centred_only: drop what `centred` leaves out.
            tight_boxes: boxes are those of what is left of the masks.
            augmentations, **kwargs: those of Detectron2's class.
        """
        super().__init__(is_train, augmentations=augmentations, **kwargs)
        self.augmentations = AugmentationsWithBoxes(augmentations)
        self.centred_only = centred_only
        self.tight_boxes = tight_boxes

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        ret = super().from_config(cfg, is_train)
        masks = with_masks(cfg)
        ret["use_instance_mask"] = masks
        ret["augmentations"] = build_augmentations(cfg, is_train)
        ret["centred_only"] = is_train and cfg.INPUT.AUGMENTATION == "ssd"
        # as after Detectron2's own crop, whose way of it fails where no object is left
        recompute = ret.pop("recompute_boxes")
        ret["tight_boxes"] = masks and (recompute or ret["centred_only"])
        return ret

    def __call__(self, dataset_dict):
        annotations = [self._exact(a) for a in dataset_dict.get("annotations", ())]
        if annotations:
            dataset_dict = dataset_dict | {"annotations": annotations}
        try:
            if self.is_train:
                objects = [a for a in annotations if not a.get("iscrowd", 0)]
                self.augmentations.boxes = boxes_of(objects)
            return super().__call__(dataset_dict)
        except SizeMismatchError:
            error = "its size is not the one that the annotations give"
        except Exception as fault:  # image decoders raise errors of every kind on bad files
            error = f"cannot be read: {fault}"
        kept = {k: dataset_dict[k] for k in ("width", "height") if k in dataset_dict}
        return kept | {"error": f"{dataset_dict['file_name']}: {error}"}

    def _exact(self, annotation: dict) -> dict:
        """The annotation with coordinates that are no integers."""
        exact = {}
        if "bbox" in annotation:
            exact["bbox"] = [float(v) for v in annotation["bbox"]]
        mask = annotation.get("segmentation")
        if self.use_instance_mask and isinstance(mask, list):
            exact["segmentation"] = [np.array(polygon, float) for polygon in mask]
        return annotation | exact

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        if self.centred_only:
            inside = centred(dataset_dict["annotations"], transforms, image_shape)
            dataset_dict["annotations"] = inside
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        instances = dataset_dict["instances"]
        if self.tight_boxes and instances.has("gt_masks"):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
            dataset_dict["instances"] = filter_empty_instances(instances)


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
