"""Masks are checked before a training or an evaluation that needs them, and only then."""

import pytest
from detectron2.data import DatasetCatalog

from ghm_d2.config import get_cfg
from ghm_d2.data.catalog import apply_to_config, resolve, validate
from ghm_d2.errors import DataError, UsageError

pytestmark = pytest.mark.usefixtures("own_cache")


def masked(build, folder, mask, split="val", **more):
    """Build a folder whose annotations have masks, the last of `split` the given one and `more`."""
    splits = {"train": build.coco(), "val": build.coco(("c.png",))}
    for coco in splits.values():
        for annotation in coco["annotations"]:
            annotation["segmentation"] = [[3, 4, 23, 4, 23, 14]]
    splits[split]["annotations"][-1] |= {"segmentation": mask, **more}
    return str(build.data(folder, **splits))


def mask_cfg(mask_format="bitmask"):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_ON = "GeneralizedRCNN", True
    cfg.INPUT.MASK_FORMAT = mask_format
    return cfg


RLE = {"size": [48, 64], "counts": [500, 20, 48 * 64 - 520]}


@pytest.mark.parametrize("mask", [[], None, {}])
@pytest.mark.parametrize(
    ("split", "first"), [("train", "b.png: annotation 2"), ("val", "c.png: annotation 1")]
)
def test_masks_that_are_not_there_are_named_before_training(build, tmp_path, mask, split, first):
    folder = masked(build, tmp_path / "d", mask, split)
    words = rf"{split}\.json: {first}: has no segmentation.*MODEL.MASK_ON False"
    with pytest.raises(DataError, match=words):
        apply_to_config(mask_cfg(), folder)
    cfg = mask_cfg()
    cfg.MODEL.MASK_ON = False
    apply_to_config(cfg, folder)
    cfg = mask_cfg()
    cfg.MODEL.META_ARCHITECTURE = "GHMRetinaNet"  # which has no masks, whatever MASK_ON says
    apply_to_config(cfg, folder)


def test_evaluation_needs_masks_of_the_data_it_is_about(build, tmp_path):
    folder = masked(build, tmp_path / "d", None, "train")
    apply_to_config(mask_cfg(), folder, need_train=False)
    with pytest.raises(DataError, match=r"train\.json"):
        apply_to_config(mask_cfg(), f"{folder}/train.json", need_train=False)


def test_polygons_go_with_either_format_and_an_rle_with_one(build, tmp_path):
    for mask_format in ("polygon", "bitmask"):
        polygons = masked(build, tmp_path / mask_format, [[1, 2, 30, 4, 5, 30]])
        apply_to_config(mask_cfg(mask_format), polygons)
    folder = masked(build, tmp_path / "rle", RLE, "train")
    apply_to_config(mask_cfg(), folder)
    with pytest.raises(UsageError, match=r"b\.png: annotation 2: .*RLE.*MASK_FORMAT bitmask"):
        apply_to_config(mask_cfg("polygon"), folder)


def test_a_crowd_may_be_an_rle(build, tmp_path):
    """COCO itself has such crowds, and Detectron2 leaves them out of the training."""
    folder = masked(build, tmp_path / "d", RLE, "train", iscrowd=1)
    apply_to_config(mask_cfg("polygon"), folder)


def test_an_unknown_format_of_masks_is_refused_where_there_are_masks(build, tmp_path):
    folder = masked(build, tmp_path / "d", [[3, 4, 23, 4, 23, 14]])
    with pytest.raises(
        UsageError, match=r"INPUT\.MASK_FORMAT must be polygon or bitmask, not 'bitmap'"
    ):
        apply_to_config(mask_cfg("bitmap"), folder)
    cfg = mask_cfg("bitmap")
    cfg.MODEL.MASK_ON = False
    apply_to_config(cfg, folder)


def test_a_part_that_the_loader_drops_stops_the_evaluation_of_masks_alone(build, tmp_path):
    for split in ("train", "val"):
        folder = masked(build, tmp_path / split, [[3, 4, 23, 4, 23, 14], [1, 2]], split)
        if split == "val":
            with pytest.raises(DataError, match=r"val\.json: c\.png: annotation 1: .*three points"):
                apply_to_config(mask_cfg(), folder)
        else:
            apply_to_config(mask_cfg(), folder)


@pytest.mark.parametrize("part", [[1, 2, 3, 4, 5, float("nan")], [1, 2, 3, 4, 5, 1e6]])
def test_a_part_that_is_no_polygon_stops_masks_alone(build, tmp_path, part):
    folder = masked(build, tmp_path / "d", [[3, 4, 23, 4, 23, 14], part], "train")
    with pytest.raises(DataError, match=r"train\.json: b\.png: annotation 2: segmentation has a"):
        apply_to_config(mask_cfg(), folder)
    cfg = mask_cfg()
    cfg.MODEL.MASK_ON = False
    apply_to_config(cfg, folder)
    items = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    assert [len(item["annotations"]) for item in items] == [1, 1]


def test_a_hostile_mask_stops_masks_alone(build, tmp_path):
    folder = masked(build, tmp_path / "d", {"size": [10**6, 10**6], "counts": "x"})
    validate(resolve(folder, "val"), "evaluation")
    with pytest.raises(DataError, match=r"c\.png: annotation 1: segmentation is an RLE of size"):
        apply_to_config(mask_cfg(), folder)
