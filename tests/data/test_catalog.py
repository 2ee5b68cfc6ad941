"""Names and folders become Detectron2 data sets, and their classes the configuration's."""

import os
import subprocess
import sys

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ghm_d2.config import get_cfg
from ghm_d2.data import catalog
from ghm_d2.data.catalog import apply_to_config, locate, resolve
from ghm_d2.errors import DataError, UsageError
from ghm_d2.experiments.plan import absolute

pytestmark = pytest.mark.usefixtures("own_cache")


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


def test_a_folder_may_be_named_like_digits(build, tmp_path, monkeypatch):
    """A run in another folder is then told its absolute path."""
    build.data(tmp_path / "digits_noisy")
    monkeypatch.chdir(tmp_path)
    assert catalog.is_registered("digits_train") and not catalog.is_registered("digits_noisy")
    assert absolute("digits_noisy") == str(tmp_path / "digits_noisy")


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
        ("digts", "most similar known name is 'digits'"),
        ("coco_2017_vall", "most similar known name is 'coco_2017_val"),
        ("nowhere/at/all", "no such folder"),
    ],
)
def test_an_unknown_name_is_a_usage_error_with_a_hint(name, words):
    with pytest.raises(UsageError, match=words):
        resolve(name, "train")


def test_a_registered_name_without_the_split_is_not_suggested_to_itself():
    DatasetCatalog.register("my_train", list)
    MetadataCatalog.get("my_train")  # `own_cache` removes both
    for name in ("my", "my_train"):
        with pytest.raises(UsageError, match=r"my has no val split, only my_train; register my_v"):
            apply_to_config(get_cfg(), name)


def test_a_set_that_is_trained_and_tested_on_is_named(build, tmp_path):
    folder, cfg = build.data(tmp_path / "d"), get_cfg()
    apply_to_config(cfg, str(folder))
    assert catalog.tested_on_training(cfg) == ""
    DatasetCatalog.register("mine", list)
    MetadataCatalog.get("mine").thing_classes = ["cat"]
    apply_to_config(cfg, "mine")
    assert catalog.tested_on_training(cfg).startswith("mine is both a training and a test set")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (str(folder), f"{folder}/val.json"), (str(folder),)
    apply_to_config(cfg)
    assert catalog.tested_on_training(cfg).startswith("d/val is both")


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
    with pytest.raises(
        DataError, match=r"trained on have different classes \(2 and 3\).*'\(no class\)'"
    ):
        apply_to_config(cfg, str(folder), need_train=False)


def test_data_sets_with_other_classes_do_not_go_together(build, tmp_path):
    other = build.coco(("v.png",), categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "cow"}])
    folder = build.data(tmp_path / "d", train=build.coco(), val=other)
    with pytest.raises(DataError, match=r"different classes \(2 and 2\): .*'\w+' where .* '\w+'"):
        apply_to_config(get_cfg(), str(folder))


def test_no_data_set_at_all_is_a_usage_error():
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(UsageError, match="--dataset"):
        apply_to_config(cfg)


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
    with pytest.raises(UsageError, match="two data sets named d/val"):
        apply_to_config(cfg)


def test_locate_finds_the_splits_of_folders_and_names(build, tmp_path):
    folder = build.data(tmp_path / "d")
    assert locate(str(folder)) == {
        split: (str(folder / f"{split}.json"), str(folder / "images")) for split in ("train", "val")
    }
    assert set(locate("digits")) == {"train", "val"}
    assert {"train", "val"} <= set(locate("coco_2017"))
    with pytest.raises(DataError, match=r"has no train\.json, val\.json or test\.json"):
        locate(str(tmp_path))
