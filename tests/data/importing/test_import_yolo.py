"""YOLO folders: what an import keeps, drops by name, and refuses."""

import pytest
from import_judge import details, load

from ghm_d2.data.importing.folders import import_folder
from ghm_d2.errors import DataError


def test_yolo_fractions_become_pixels_and_splits_are_kept(yolo, tmp_path):
    report = import_folder(yolo, tmp_path / "out")
    assert load(tmp_path / "out", "train")[1] == [("train/a.png", 1, 24, 12, 16, 24)]
    assert load(tmp_path / "out", "val")[1] == [("val/c.png", 2, 3.2, 2.4, 6.4, 4.8)]
    assert report["splits"]["train"] == {"images": 2, "boxes": 1, "background": 1}
    assert report["dropped"] == []


def test_yolo_outlines_become_boxes_and_pose_labels_keep_theirs(build, tmp_path):
    labels = {"train/a": "0 0.25 0.5 0.5 0.5 0.5 0.75\n", "val/b": ""}
    build.yolo(tmp_path / "outline", labels)
    import_folder(tmp_path / "outline", tmp_path / "out")
    found, boxes = load(tmp_path / "out", "train")
    assert boxes == [("train/a.png", 1, 16, 24, 16, 12)]
    assert found["annotations"][0]["segmentation"] == [[16.0, 24.0, 32.0, 24.0, 32.0, 36.0]]
    yaml = "names: [cat]\ntrain: images/train\nval: images/val\nkpt_shape: [1, 3]"
    build.yolo(tmp_path / "pose", {"train/a": "0 .5 .5 .5 .5 0 0 2", "val/b": ""}, yaml=yaml)
    import_folder(tmp_path / "pose", tmp_path / "posed")
    assert load(tmp_path / "posed", "train")[1] == [("train/a.png", 1, 16, 12, 32, 24)]


def test_yolo_faults_are_dropped_with_file_and_line(build, tmp_path):
    text = "0 .5 .5 .2 .2\n7 .5 .5 .2 .2\n0 nan .5 .2 .2\n0 .5 .5 -.2 .2\n0 32 24 10 10\n"
    build.yolo(tmp_path / "yolo", {"train/a": text, "val/b": None})
    report = import_folder(tmp_path / "yolo", tmp_path / "out")
    assert len(load(tmp_path / "out", "train")[1]) == 1
    words = ["unknown category 7", "not finite", "inverted or empty", "fractions of the image"]
    for line, (detail, word) in enumerate(zip(details(report), words, strict=True), 2):
        assert detail.startswith(f"labels/train/a.txt: line {line}: ") and word in detail
    assert report["notes"] == ["1 images have no label file and count as background"]


@pytest.mark.parametrize("text", ["0 .5 .5 .2\n", "cat .5 .5 .2 .2", "0 .5 .5 .2 x", "0.5 1 1 1 1"])
def test_malformed_labels_are_refused_with_file_and_line(build, tmp_path, text):
    build.yolo(tmp_path / "yolo", {"train/a": "0 .5 .5 .2 .2\n" + text})
    with pytest.raises(DataError, match=r"a\.txt:2: "):
        import_folder(tmp_path / "yolo", tmp_path / "out")


def test_labels_that_are_not_text_are_refused(yolo, tmp_path):
    (yolo / "labels" / "train" / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a\.txt: cannot be read as UTF-8"):
        import_folder(yolo, tmp_path / "out")


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("names: [a\ntrain: x", r"data\.yaml:2: not valid YAML"),
        ("- a\n- b", "must be a mapping with the keys names"),
        ("names: {0: a, 2: b}\ntrain: images/train", "without a gap"),
        ("names: [a, a]\ntrain: images/train", "occurs twice"),
        ("names: [yes, a]\ntrain: images/train", "quote yes"),
        ("names: []\ntrain: images/train", "no class names"),
        ("names: [a]\ntrain: images/none", "does not exist"),
        ("names: [a]\ntrain: ../../../../etc", "does not exist in the folder"),
        ("names: [a]\ntrain: /etc", "does not exist in the folder"),
        ("names: [a]", "defines none of the splits"),
        ("names: !!python/object/apply:os.system [touch hacked]\ntrain: x", "not valid YAML"),
    ],
)
def test_a_bad_data_yaml_is_refused(yolo, tmp_path, yaml, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (yolo / "data.yaml").write_text(yaml)
    with pytest.raises(DataError, match=words):
        import_folder(yolo, tmp_path / "out")
    assert not (tmp_path / "hacked").exists()


def test_a_yaml_bomb_is_refused_in_no_time(yolo, tmp_path):
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    (yolo / "data.yaml").write_text(
        "\n".join([*lines, "names: [*a39, *a39]", "train: images/train"])
    )
    with pytest.raises(DataError, match="class names must be text"):
        import_folder(yolo, tmp_path / "out")


def test_roboflow_paths_and_a_stale_path_are_understood(build, tmp_path):
    folder = tmp_path / "robo"
    build.picture(folder / "train" / "images" / "a.jpg")
    build.picture(folder / "valid" / "images" / "a.jpg", seed=9)
    (folder / "train" / "labels").mkdir()
    (folder / "train" / "labels" / "a.txt").write_text("0 .5 .5 .5 .5")
    yaml = "path: /not/here\ntrain: ../train/images\nval: ../valid/images\nnames: ['no']"
    (folder / "data.yaml").write_text(yaml)
    report = import_folder(folder, tmp_path / "out")
    assert report["names"] == ["no"]
    assert load(tmp_path / "out", "train")[1] == [("train/images/a.jpg", 1, 16, 12, 32, 24)]
    assert report["splits"]["val"]["images"] == 1


def test_a_list_of_images_cannot_leave_the_folder(yolo, build, tmp_path):
    (yolo / "train.txt").write_text("./images/train/a.png\n../../x.png\n")
    (yolo / "data.yaml").write_text("names: [a, b]\ntrain: train.txt")
    build.picture(tmp_path.parent / "x.png")
    report = import_folder(yolo, tmp_path / "out")
    assert report["splits"]["train"]["images"] == 1
    assert "'../../x.png' points outside the image folder" in details(report)[0]
