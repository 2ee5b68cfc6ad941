"""The loaders for training and evaluation, which report bad images by name."""

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import SizeMismatchError, filter_empty_instances
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler

from ghm_d2.config.detectors import with_masks
from ghm_d2.data.checking.registered_sets import tell_large
from ghm_d2.data.class_weights import count_objects
from ghm_d2.data.coco_json import collector_off
from ghm_d2.data.loading.augment import (
    AugmentationsWithBoxes,
    boxes_of,
    build_augmentations,
    centred,
    visible,
)
from ghm_d2.data.loading.mixing import LAST_SHARE, Mixing
from ghm_d2.data.loading.stream import SeededImages, TrainingBatches, TrainingLoader
from ghm_d2.errors import DataError, UsageError


class GHMDatasetMapper(DatasetMapper):
    """Detectron2's mapper, with three differences.

    It applies `build_augmentations` to the `visible` annotations, and keeps only objects whose
    centre is inside SSD's crop. An image that cannot be read becomes an entry "error": an exception
    in a worker process would reach the trainer as a traceback in a string. Integer boxes and
    polygons are scaled as floats: Detectron2's resizing truncates them, which makes targets up to a
    pixel too small.
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
            centred_only: keep only the objects that `centred` returns.
            tight_boxes: compute the boxes from what is left of the masks.
            augmentations, **kwargs: arguments of Detectron2's class.
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
        # Detectron2 does so after its own crop, but fails if no object is left
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
                if "width" in dataset_dict and "height" in dataset_dict:
                    objects = visible(objects, dataset_dict["width"], dataset_dict["height"])
                if annotations:
                    dataset_dict["annotations"] = objects
                self.augmentations.boxes = boxes_of(objects)
            return super().__call__(dataset_dict)
        except SizeMismatchError:
            error = "the image size differs from the width and height in the annotations"
        except Exception as fault:  # image decoders raise errors of every kind on bad files
            error = f"cannot be read: {fault}"
        kept = {k: dataset_dict[k] for k in ("width", "height") if k in dataset_dict}
        return kept | {"error": f"{dataset_dict['file_name']}: {error}"}

    def _exact(self, annotation: dict) -> dict:
        """Return the annotation with float coordinates."""
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
    """Return the batch if every image in it was read.

    Raises:
        DataError: names the first unreadable image.
    """
    for item in batch:
        if "error" in item:
            raise DataError(f"{item['error']}; `ghm data check` lists all such images")
    return batch


def take_faults(batch: list[dict]) -> dict[str, str]:
    """Return file -> fault for the unreadable images that were replaced in a training batch.

    The entries "faults" are removed from the batch, in place.
    """
    return {file: fault for item in batch for file, fault in item.pop("faults", {}).items()}


def build_train_loader(cfg, start_iter: int = 0) -> TrainingLoader:
    """Build the loader of this rank's share of the endless batches of DATASETS.TRAIN.

    The first batch is the one that follows `start_iter` steps.

    Batches are a function of SEED and the iteration: a resumed run gets the same, with any number
    of workers. The shares of all ranks together, in the order of the ranks, are the batches of a
    single process. An image that cannot be read is replaced: see `SeededImages`.

    Raises:
        UsageError: SOLVER.IMS_PER_BATCH is not a multiple of the number of ranks; an unknown
            DATALOADER.SAMPLER_TRAIN or a RANDOM_SUBSET_RATIO that leaves no image; or
            ASPECT_RATIO_GROUPING with images of unknown size.
        RunError: raised by the loader when one of its workers has died.
    """
    tell_large(cfg.DATASETS.TRAIN)
    with collector_off():
        images = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
    objects = count_objects(images)
    images, sampler = _sampled(cfg, images)
    wide = _are_wide(images) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None
    batches = TrainingBatches(sampler, cfg.SOLVER.IMS_PER_BATCH, wide, start_iter)
    mapper = GHMDatasetMapper(cfg, True)
    dataset = SeededImages(DatasetFromList(images), mapper, cfg.SEED, *_mixing(cfg))
    return TrainingLoader(dataset, batches, cfg.DATALOADER.NUM_WORKERS, objects)


def _mixing(cfg) -> tuple[Mixing | None, int]:
    """Return the `Mixing`, if any, and the number of images, from the start, that it applies to."""
    mosaic, mixup = cfg.INPUT.MOSAIC, cfg.INPUT.MIXUP
    if not (mosaic or mixup):
        return None, 0
    steps = round((1 - LAST_SHARE) * cfg.SOLVER.MAX_ITER)
    return Mixing(mosaic, mixup, tuple(cfg.MODEL.PIXEL_MEAN)), steps * cfg.SOLVER.IMS_PER_BATCH


def _sampled(cfg, images: list[dict]):
    """Return the images that training may see, and Detectron2's sampler over them."""
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "RepeatFactorTrainingSampler":
        keys = cfg.DATALOADER
        # Detectron2 0.6 lacks this key
        root = {"sqrt": keys.REPEAT_SQRT} if "REPEAT_SQRT" in keys else {}
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            images, keys.REPEAT_THRESHOLD, **root
        )
        return images, RepeatFactorTrainingSampler(factors, seed=cfg.SEED)
    if name == "RandomSubsetTrainingSampler":
        images = _random_subset(images, cfg.DATALOADER.RANDOM_SUBSET_RATIO, cfg.SEED)
    elif name != "TrainingSampler":
        raise UsageError(
            "DATALOADER.SAMPLER_TRAIN must be TrainingSampler, RepeatFactorTrainingSampler or "
            f"RandomSubsetTrainingSampler, not {name!r}"
        )
    return images, TrainingSampler(len(images), seed=cfg.SEED)


def _random_subset(images: list[dict], ratio: float, seed: int) -> list[dict]:
    """Return the subset that Detectron2's RandomSubsetTrainingSampler draws.

    Images of the subset, never of the rest, then replace unreadable images.
    """
    size = int(len(images) * ratio)
    if not 0 < size <= len(images):
        raise UsageError(
            f"DATALOADER.RANDOM_SUBSET_RATIO {ratio} selects {size} of {len(images)} images; it "
            "must be above 0 and at most 1, and select at least one image"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return [images[i] for i in order[:size].tolist()]


def _are_wide(images: list[dict]) -> list[bool]:
    """Return for each image whether it is wider than high, as Detectron2 groups them."""
    try:
        return [image["width"] > image["height"] for image in images]
    except KeyError as error:
        raise UsageError(
            f"DATALOADER.ASPECT_RATIO_GROUPING needs the {error} of every image, which the "
            "training data lack; set it to False"
        ) from None


def build_test_loader(cfg, dataset_name: str):
    """Return a loader of all images of `dataset_name`, one per batch."""
    return build_detection_test_loader(cfg, dataset_name, mapper=GHMDatasetMapper(cfg, False))
