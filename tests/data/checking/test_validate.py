"""Checks of a data set at the start of a training or an evaluation."""

import json
import re

import pytest
from detectron2.data import DatasetCatalog

from ghm_d2.config import get_cfg
from ghm_d2.data.catalog import apply_to_config, resolve, validate
from ghm_d2.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")


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
        ({"images": [{"id": 1, "file_name": "../x.png"}]}, "points outside the image folder"),
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


def test_what_detectron2_survives_is_logged_once_with_its_count(build, tmp_path, caplog):
    coco = build.coco(("a.png", "b.png", "c.png"))
    for annotation in coco["annotations"][:2]:
        annotation["bbox"] = [20, 4, 1.03, 0.0]
    coco["annotations"][2] |= {"image_id": 77}
    name = resolve(str(build.data(tmp_path / "d", train=coco)), "train")
    for _ in range(2):
        validate(name)
    empty, unknown = [record.getMessage() for record in caplog.records]
    assert re.search(r"train\.json: a\.png: annotation 1: box .*1 more like it.*data check", empty)
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
    with pytest.raises(DataError, match=r"test\.json: has no annotations, so nothing can be"):
        validate(name)
