"""Names and folders become Detectron2 data sets, and their classes the configuration's."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import get_cfg as detectron2_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from ghm_d2.config import add_ghm_config
from ghm_d2.data import catalog
from ghm_d2.data.catalog import apply_to_config, locate, resolve, validate
from ghm_d2.data.digits.dataset import DigitsSpec
from ghm_d2.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Tiny generated data in a cache of the test's own, and a clean catalog afterwards."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "cache"))
    tiny = DigitsSpec(train=3, val=2, image_size=(64, 64), side=(8, 20))
    monkeypatch.setattr(catalog.digits, "DigitsSpec", lambda: tiny)
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def get_cfg():
    cfg = detectron2_cfg()
    add_ghm_config(cfg)
    return cfg


def test_a_folder_is_registered_with_its_classes_and_loads(build, tmp_path):
    folder = build.data(tmp_path / "d")
    name = resolve(str(folder), "train")
    assert resolve(str(folder), "train") == name == resolve(name, "val")
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.evaluator_type == "coco"
    assert metadata.json_file == str(folder / "train.json")
    records = DatasetCatalog.get(name)
    assert [os.path.isfile(r["file_name"]) for r in records] == [True, True]
    assert [a["category_id"] for r in records for a in r["annotations"]] == [1, 0]


def test_a_folder_that_changed_is_registered_anew(build, tmp_path):
    folder = build.data(tmp_path / "d")
    name = resolve(str(folder), "train")
    more = build.coco(categories=[*build.coco()["categories"], {"id": 3, "name": "emu"}])
    build.data(folder, train=more)
    assert resolve(str(folder), "train") == name
    assert MetadataCatalog.get(name).thing_classes == ["cat", "dog", "emu"]
    assert len(DatasetCatalog.get(name)) == 2


def test_a_relative_folder_and_its_json_are_the_same_data_set(build, tmp_path, monkeypatch):
    build.data(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    assert resolve("d", "val") == resolve("d/val.json", "train") == str(tmp_path / "d/val.json")


def test_digits_are_generated_once_and_by_hash(tmp_path):
    names = [resolve("digits", split) for split in ("train", "val")]
    assert names == ["digits_train", "digits_val"]
    (folder,) = (tmp_path / "cache").iterdir()
    stamp = (folder / "train.json").stat().st_mtime_ns
    assert resolve("digits_val", "train") == "digits_val"
    assert (folder / "train.json").stat().st_mtime_ns == stamp
    record = DatasetCatalog.get("digits_train")[0]
    assert record["annotations"][0]["noise"] == "none"
    with pytest.raises(UsageError, match="no test split"):
        resolve("digits", "test")


def test_the_cache_is_the_users_where_detectron2_has_none(tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert catalog.digits_folder().parent == tmp_path / "xdg" / "ghm_d2"


def test_two_processes_may_generate_digits_at_once(tmp_path):
    code = (
        "from ghm_d2.data.catalog import digits_folder; "
        "from ghm_d2.data.digits.dataset import DigitsSpec;"
        "print(digits_folder(DigitsSpec(train=20, val=2, image_size=(64, 64), side=(8, 20))))"
    )
    jobs = [subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True) for _ in range(2)]
    folders = {job.communicate(timeout=60)[0].strip() for job in jobs}
    assert [job.returncode for job in jobs] == [0, 0] and len(folders) == 1
    content = sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert len(content) == 1 and content[0].startswith("digits-")


def test_an_unwritable_cache_is_a_data_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be written"):
        resolve("digits", "train")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digts", "nearest known name is 'digits'"),
        ("coco_2017_vall", "nearest known name is 'coco_2017_val"),
        ("nowhere/at/all", "no such folder"),
    ],
)
def test_an_unknown_name_is_a_usage_error_with_a_hint(name, words):
    with pytest.raises(UsageError, match=words):
        resolve(name, "train")


def test_registered_names_are_taken_as_they_are():
    assert resolve("coco_2017_val", "train") == "coco_2017_val"
    assert resolve("coco_2017", "val") == "coco_2017_val"


def test_a_missing_split_names_the_file_and_the_remedy(build, tmp_path):
    folder = build.data(tmp_path / "d", train=build.coco())
    with pytest.raises(DataError, match=r"d/val\.json: no such file; `ghm data import"):
        resolve(str(folder), "val")
    cfg = get_cfg()
    with pytest.raises(DataError, match=r"val\.json"):
        apply_to_config(cfg, str(folder))


def test_the_configuration_follows_the_data(build, tmp_path):
    folder = build.data(tmp_path / "d")
    cfg = get_cfg()
    apply_to_config(cfg, str(folder))
    assert list(cfg.DATASETS.TRAIN) == [str(folder / "train.json")]
    assert list(cfg.DATASETS.TEST) == [str(folder / "val.json")]
    assert cfg.MODEL.RETINANET.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    for name in ("digits", "digits_val"):
        apply_to_config(cfg, name)
        assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("digits_train",), ("digits_val",))
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 10


def test_digits_are_not_mirrored_and_other_classes_are(build, tmp_path):
    cfg = get_cfg()
    apply_to_config(cfg, str(build.data(tmp_path / "d")))
    assert cfg.INPUT.RANDOM_FLIP == "horizontal"
    apply_to_config(cfg, "digits")
    assert cfg.INPUT.RANDOM_FLIP == "none"


def test_a_saved_configuration_resolves_in_another_process(build, tmp_path):
    folder = build.data(tmp_path / "d")
    cfg = get_cfg()
    apply_to_config(cfg, str(folder))
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    again = get_cfg()
    again.DATASETS.TRAIN, again.DATASETS.TEST = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    apply_to_config(again)
    assert again.DATASETS == cfg.DATASETS


def test_evaluation_needs_no_training_data(build, tmp_path):
    folder = build.data(tmp_path / "d", val=build.coco())
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("long_gone",)
    apply_to_config(cfg, str(folder), need_train=False)
    assert list(cfg.DATASETS.TEST) == [str(folder / "val.json")]
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    cfg.DATASETS.CLASS_NAMES = ("cat", "dog", "emu")
    with pytest.raises(DataError, match="trained on have different classes: 2 and 3, 'none'"):
        apply_to_config(cfg, str(folder), need_train=False)


def test_data_sets_with_other_classes_do_not_go_together(build, tmp_path):
    other = build.coco(("v.png",), categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "cow"}])
    folder = build.data(tmp_path / "d", train=build.coco(), val=other)
    with pytest.raises(DataError, match=r"different classes: 2 and 2, '\w+' where .* '\w+'"):
        apply_to_config(get_cfg(), str(folder))


def test_no_data_set_at_all_is_a_usage_error():
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(UsageError, match="--dataset"):
        apply_to_config(cfg)


def test_validate_accepts_sound_data_and_background(build, tmp_path):
    coco = build.coco()
    coco["annotations"].pop()
    validate(resolve(str(build.data(tmp_path / "d", train=coco)), "train"))
    validate(resolve("digits", "val"))


def test_validate_names_the_file_and_the_fault(build, tmp_path):
    coco = build.coco()
    coco["annotations"][0]["bbox"] = [20, 4, -10, 10]
    coco["annotations"][1]["category_id"] = 9
    folder = build.data(tmp_path / "d", train=coco)
    (folder / "images" / "b.png").unlink()
    name = resolve(str(folder), "train")
    words = (
        r"train\.json: a\.png: annotation 1: box \[20, 4, -10, 10\] is inverted .*2 more.*import"
    )
    for call in (validate, DatasetCatalog.get):
        with pytest.raises(DataError, match=words) as error:
            call(name)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": []}, "no images"),
        ({"annotations": []}, "no annotations"),
        ({"images": [{"id": 1, "file_name": "../x.png"}]}, "leaves the image folder"),
        ({"images": [{"id": 1, "file_name": "none.png", "width": 9, "height": 9}]}, "none.png"),
    ],
)
def test_validate_refuses_what_cannot_be_trained_on(build, tmp_path, change, words):
    folder = build.data(tmp_path / "d")
    (folder / "train.json").write_text(json.dumps(build.coco(("a.png",)) | change))
    name = resolve(str(folder), "train")
    with pytest.raises(DataError, match=words):
        validate(name)


@pytest.mark.parametrize("text", ["", "{]", "[]", '{"images": 3}'])
def test_a_malformed_json_is_a_data_error_with_its_name(build, tmp_path, text):
    folder = build.data(tmp_path / "d")
    (folder / "train.json").write_text(text)
    with pytest.raises(DataError, match=r"train\.json"):
        resolve(str(folder), "train")


def test_an_evaluation_needs_a_coco_json():
    validate("voc_2007_train", "training")
    with pytest.raises(DataError, match=r"^voc_2007_test has no COCO JSON, .*`ghm data import"):
        validate("voc_2007_test", "evaluation")


def test_validate_says_so_where_a_known_data_set_is_not_there():
    remedy = r"no such file, .* coco_2017_val .* DETECTRON2_DATASETS .* --dataset FOLDER"
    with pytest.raises(DataError, match=rf"instances_val2017\.json: {remedy}"):
        validate("coco_2017_val")


def masked(build, folder, mask, split="val"):
    """A folder whose annotations have masks, the last of `split` the given one."""
    splits = {"train": build.coco(), "val": build.coco(("c.png",))}
    for coco in splits.values():
        for annotation in coco["annotations"]:
            annotation["segmentation"] = [[3, 4, 23, 4, 23, 14]]
    splits[split]["annotations"][-1]["segmentation"] = mask
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
    with pytest.raises(UsageError, match=r"b\.png: annotation 2: .* RLE.*MASK_FORMAT bitmask"):
        apply_to_config(mask_cfg("polygon"), folder)


def test_a_crowd_may_be_an_rle(build, tmp_path):
    """As in COCO itself; Detectron2 leaves crowds out of the training."""
    splits = {"train": build.coco(), "val": build.coco(("c.png",))}
    for coco in splits.values():
        for annotation in coco["annotations"]:
            annotation["segmentation"] = [[3, 4, 23, 4, 23, 14]]
    splits["train"]["annotations"][-1] |= {"segmentation": RLE, "iscrowd": 1}
    apply_to_config(mask_cfg("polygon"), str(build.data(tmp_path / "d", **splits)))


def test_an_unknown_format_of_masks_is_refused_where_there_are_masks(build, tmp_path):
    folder = masked(build, tmp_path / "d", [[3, 4, 23, 4, 23, 14]])
    with pytest.raises(UsageError, match=r"INPUT\.MASK_FORMAT is polygon or bitmask, not 'bitmap'"):
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


def test_what_detectron2_survives_is_logged_once_with_its_count(build, tmp_path, caplog):
    coco = build.coco(("a.png", "b.png", "c.png"))
    for annotation in coco["annotations"][:2]:
        annotation["bbox"] = [20, 4, 1.03, 0.0]
    coco["annotations"][2] |= {"image_id": 77}
    name = resolve(str(build.data(tmp_path / "d", train=coco)), "train")
    for _ in range(2):
        validate(name)
    empty, unknown = [record.getMessage() for record in caplog.records]
    assert re.search(r"train\.json: a\.png: annotation 1: box .*1 more such.*data check", empty)
    assert "annotation 3: no image has the id 77" in unknown
    assert [len(item["annotations"]) for item in DatasetCatalog.get(name)] == [1, 1, 0]


def test_a_test_set_without_annotations_is_evaluated_and_not_trained_on(build, tmp_path):
    coco = build.coco(("t.png",))
    del coco["annotations"]
    folder = build.data(tmp_path / "d", train=build.coco(), test=coco)
    cfg = get_cfg()
    apply_to_config(cfg, str(folder / "test.json"), need_train=False)
    (name,) = cfg.DATASETS.TEST
    validate(name, "evaluation")
    assert [item["annotations"] for item in DatasetCatalog.get(name)] == [[]]
    with pytest.raises(DataError, match=r"test\.json: no annotations, so that nothing can be"):
        validate(name)


def test_several_sets_can_be_evaluated(build, tmp_path):
    folder = build.data(tmp_path / "d", train=build.coco(), val=build.coco(("c.png",)))
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (str(folder),), (str(folder), f"{folder}/train.json")
    apply_to_config(cfg)
    assert (f"{folder}/val.json", f"{folder}/train.json") == cfg.DATASETS.TEST
    other = build.coco(("x.png",), categories=[{"id": 1, "name": "cow"}])
    cfg.DATASETS.TEST += (str(build.data(tmp_path / "other", val=other)),)
    with pytest.raises(DataError, match="different classes"):
        apply_to_config(cfg)
    same = build.data(tmp_path / "elsewhere" / "d", val=build.coco(("c.png",)))
    cfg.DATASETS.TEST = (str(folder), str(same))
    with pytest.raises(UsageError, match="holds d/val twice"):
        apply_to_config(cfg)


def test_locate_finds_the_splits_of_folders_and_names(build, tmp_path):
    folder = build.data(tmp_path / "d")
    assert locate(str(folder)) == {
        split: (str(folder / f"{split}.json"), str(folder / "images")) for split in ("train", "val")
    }
    assert set(locate("digits")) == {"train", "val"}
    assert {"train", "val"} <= set(locate("coco_2017"))
    with pytest.raises(DataError, match="holds none of"):
        locate(str(tmp_path))
