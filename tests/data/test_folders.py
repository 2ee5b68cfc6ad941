"""Importing what others wrote: what is kept, what is dropped and named, what is refused."""

import json

import pytest
from pycocotools import mask as coco_mask

from ghm_d2.data.importing.folders import import_folder
from ghm_d2.errors import DataError, UsageError


def load(folder, split):
    coco = json.loads((folder / f"{split}.json").read_text())
    names = {i["id"]: i["file_name"] for i in coco["images"]}
    boxes = sorted(
        (names[a["image_id"]], a["category_id"], *a["bbox"]) for a in coco["annotations"]
    )
    return coco, boxes


def load_all(folder):
    """Boxes and annotations of train and val together: for tests that are not about the split."""
    splits = [s for s in ("train", "val") if (folder / f"{s}.json").exists()]
    found = [load(folder, split) for split in splits]
    annotations = [a for coco, _ in found for a in coco["annotations"]]
    return annotations, sorted(box for _, boxes in found for box in boxes)


def details(report):
    return [f"{d['file']}: {d['detail']}" for d in report["dropped"]]


@pytest.fixture
def voc(tmp_path, build):
    folder = tmp_path / "voc"
    build.voc_image(folder, "a", build.voc_object("dog", (1, 1, 10, 20)))
    build.voc_image(folder, "b", build.voc_object("cat", (5, 6, 64, 48)))
    build.voc_image(folder, "c")
    return folder


@pytest.fixture
def yolo(tmp_path, build):
    labels = {"train/a": "0 0.5 0.5 0.25 0.5\n", "train/b": "", "val/c": "1 0.1 0.1 0.1 0.1"}
    return build.yolo(tmp_path / "yolo", labels)


@pytest.fixture
def coco(tmp_path, build):
    return build.data(tmp_path / "coco")


# --- Pascal VOC ---


def test_voc_boxes_lose_one_pixel_at_the_top_left_and_classes_are_sorted(voc, tmp_path):
    report = import_folder(voc, tmp_path / "out", split=0.5)
    assert load_all(tmp_path / "out")[1] == [("a.jpg", 2, 0, 0, 10, 20), ("b.jpg", 1, 4, 5, 60, 43)]
    assert report["names"] == ["cat", "dog"]
    assert sum(s["background"] for s in report["splits"].values()) == 1
    assert "made one" in report["notes"][0]


def test_voc_splits_come_from_image_sets(voc, tmp_path):
    sets = voc / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("a\nb\n")
    (sets / "val.txt").write_text("c -1\nmissing\n")
    report = import_folder(voc, tmp_path / "out")
    assert [i["file_name"] for i in load(tmp_path / "out", "train")[0]["images"]] == [
        "a.jpg",
        "b.jpg",
    ]
    assert [i["file_name"] for i in load(tmp_path / "out", "val")[0]["images"]] == ["c.jpg"]
    assert details(report) == ["ImageSets/Main/val.txt: no annotation file missing.xml"]


def test_voc_classes_follow_a_label_file_and_others_are_unknown(voc, tmp_path):
    (voc / "labels.txt").write_text("zebra\ndog\n")
    report = import_folder(voc, tmp_path / "out")
    assert report["names"] == ["zebra", "dog"]
    assert details(report) == ["Annotations/b.xml: object 1: unknown category 'cat'"]


def test_voc_difficult_objects_keep_their_mark(voc, build, tmp_path):
    build.voc_image(voc, "d", build.voc_object("cat", more="<difficult>1</difficult>"))
    import_folder(voc, tmp_path / "out")
    marks = [a.get("difficult") for a in load_all(tmp_path / "out")[0]]
    assert sorted(marks, key=str) == [1, None, None]


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((30, 6, 20, 30), r"\(30, 6, 20, 30\) is inverted or empty"),
        ((7, 8, 7, 8), r"\(7, 8, 7, 8\) is inverted or empty"),
        (("nan", 6, 20, 30), "not finite"),
        ((5, 6, "inf", 30), "not finite"),
        ((70, 6, 90, 30), "outside the image of 64 x 48"),
    ],
)
def test_a_bad_box_is_dropped_and_named_or_refused(voc, build, tmp_path, box, words):
    build.voc_image(voc, "bad", build.voc_object("cat"), build.voc_object("dog", box))
    report = import_folder(voc, tmp_path / "out")
    (dropped,) = details(report)
    with pytest.raises(DataError, match=words):
        raise DataError(dropped)
    assert dropped.startswith("Annotations/bad.xml: object 2: ")
    assert json.loads((tmp_path / "out" / "import_report.json").read_text()) == report
    with pytest.raises(DataError, match=rf"bad\.xml: object 2: .*{words}"):
        import_folder(voc, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "bad.xml:1: not valid XML"),
        ("<annotation><object></annotation>", "bad.xml:1: not valid XML"),
        (
            '<!DOCTYPE a [<!ENTITY b "b"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>',
            "declares XML entities",
        ),
        (
            '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>',
            "declares XML entities",
        ),
        ("<?xml version='1.0' encoding='nonsense'?><a/>", "not valid XML"),
    ],
)
def test_malformed_xml_is_refused_with_its_name(voc, tmp_path, text, words):
    (voc / "Annotations" / "bad.xml").write_text(text)
    with pytest.raises(DataError) as error:
        import_folder(voc, tmp_path / "out")
    assert words in str(error.value) and "bad.xml" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["voc"]


@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/secret.jpg", "..\\secret.jpg"])
def test_voc_names_cannot_leave_the_folder(voc, build, tmp_path, name):
    path = build.voc_image(voc, "bad", image=False)
    path.write_text(path.read_text().replace("bad.jpg", name))
    build.picture(tmp_path / "secret.jpg")
    report = import_folder(voc, tmp_path / "out")
    assert "leaves the image folder" in details(report)[0] and len(details(report)) == 1


# --- YOLO ---


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
    assert report["notes"] == ["1 images have no label file: taken as background"]


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
        ("- a\n- b", "must map names"),
        ("names: {0: a, 2: b}\ntrain: images/train", "without a gap"),
        ("names: [a, a]\ntrain: images/train", "stands twice"),
        ("names: [yes, a]\ntrain: images/train", "quote yes"),
        ("names: []\ntrain: images/train", "no class names"),
        ("names: [a]\ntrain: images/none", "does not exist"),
        ("names: [a]\ntrain: ../../../../etc", "does not exist in the folder"),
        ("names: [a]\ntrain: /etc", "does not exist in the folder"),
        ("names: [a]", "names none of train, val and test"),
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
    with pytest.raises(DataError, match="class names must be texts"):
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
    assert "'../../x.png' leaves the image folder" in details(report)[0]


# --- COCO ---


def test_coco_ids_and_crowds_are_kept(build, tmp_path):
    found = build.coco(categories=[{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}])
    found["annotations"][0] |= {"category_id": 90, "iscrowd": 1, "area": 55.5, "id": 0}
    found["annotations"][1] |= {"category_id": 7}
    found["annotations"][1]["segmentation"] = [[1, 2, 3], [3, 4, 23, 4, 23, 14]]
    build.data(tmp_path / "coco", train=found, val=found)
    report = import_folder(tmp_path / "coco", tmp_path / "out")
    result, boxes = load(tmp_path / "out", "train")
    assert report["names"] == ["cat", "dog"]
    assert result["categories"] == [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}]
    assert boxes == [("a.png", 90, 3, 4, 20, 10), ("b.png", 7, 3, 4, 20, 10)]
    crowd, outlined = result["annotations"]
    assert (crowd["id"], crowd["iscrowd"], crowd["area"]) == (1, 1, 55.5)
    assert outlined["segmentation"] == [[3, 4, 23, 4, 23, 14]]
    assert [i["id"] for i in result["images"]] == [1, 2]
    told = [(d["split"], d["what"], d["detail"]) for d in report["dropped"]]
    assert [t[:2] for t in told] == [("train", "mask"), ("val", "mask")]
    assert told[0][2].startswith("annotation 2: segmentation has a polygon")


def test_coco_masks_stay_as_they_are(build, tmp_path):
    """Polygons of several parts, a list of counts, the text that stands for one, and none."""
    square = [[3, 4, 23, 4, 23, 14, 3, 14], [3.5, 4, 9, 4.25, 9, 8]]
    listed = {"size": [48, 64], "counts": [244, 10, 134, 8, 48 * 64 - 396]}
    packed = {"size": [48, 64], "counts": coco_mask.frPyObjects(listed, 48, 64)["counts"].decode()}
    found = build.coco(("a.png", "b.png", "c.png", "d.png"))
    for annotation, mask in zip(found["annotations"], (square, listed, packed, []), strict=True):
        annotation["segmentation"] = mask
    build.data(tmp_path / "coco", train=found, val=build.coco(("v.png",)))
    report = import_folder(tmp_path / "coco", tmp_path / "out")
    assert report["dropped"] == []
    kept = [a.get("segmentation") for a in load(tmp_path / "out", "train")[0]["annotations"]]
    assert kept == [square, listed, packed, None]


@pytest.mark.parametrize(
    "mask",
    [
        [[3, 4, float("nan"), 4, 23, 14]],
        [[3, 4, 1e300, 4, 23, 14]],
        [3, 4, 23, 4, 23, 14],
        {"size": [48000, 64000], "counts": "PPYo0"},
        {"size": [48, 64], "counts": "~~~~"},
        {"size": [48, 64], "counts": [48 * 64 + 5]},
        {"counts": []},
        "polygon",
    ],
)
def test_a_mask_that_is_none_is_dropped_and_its_box_kept(build, tmp_path, mask):
    found = build.coco()
    found["annotations"][1]["segmentation"] = mask
    build.data(tmp_path / "coco", train=found, val=build.coco(("v.png",)))
    report = import_folder(tmp_path / "coco", tmp_path / "out")
    assert [(d["what"], d["file"]) for d in report["dropped"]] == [("mask", "train.json")]
    boxes = load(tmp_path / "out", "train")[0]["annotations"]
    assert len(boxes) == 2 and not any("segmentation" in box for box in boxes)
    with pytest.raises(DataError, match="annotation 2: segmentation"):
        import_folder(tmp_path / "coco", tmp_path / "strict", strict=True)


def test_coco_in_its_own_layout_is_found(build, tmp_path):
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        found = build.coco((f"{split}.jpg",))
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(found))
        (folder / "annotations" / f"captions_{split}.json").write_text("{}")
        build.picture(folder / split / f"{split}.jpg")
    report = import_folder(folder, tmp_path / "out")
    assert {s: c["images"] for s, c in report["splits"].items()} == {"train": 1, "val": 1}


def test_windows_separators_and_absolute_lists_are_understood(build, yolo, tmp_path, monkeypatch):
    found = build.coco(("sub/a.png", "sub/b.png"))
    folder = build.data(tmp_path / "coco", train=found)
    for image in found["images"]:
        image["file_name"] = image["file_name"].replace("/", "\\")
    (folder / "train.json").write_text(json.dumps(found))
    import_folder(folder, tmp_path / "out")
    assert [b[0] for b in load_all(tmp_path / "out")[1]] == ["sub/a.png", "sub/b.png"]
    (yolo / "list.txt").write_text(f"{yolo}/images/train/a.png\n")
    (yolo / "data.yaml").write_text("names: [a, b]\ntrain: list.txt\nval: images/val")
    monkeypatch.chdir(tmp_path)
    assert import_folder("yolo", "out2")["splits"]["train"]["boxes"] == 1


def test_coco_images_elsewhere_need_to_be_told(build, tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "train.json").write_text(json.dumps(build.coco()))
    build.picture(tmp_path / "pictures" / "a.png")
    build.picture(tmp_path / "pictures" / "b.png")
    with pytest.raises(DataError, match=r"no image such as a\.png .*--images"):
        import_folder(tmp_path / "coco", tmp_path / "out")
    pictures = tmp_path / "pictures"
    report = import_folder(tmp_path / "coco", tmp_path / "out", image_folder=pictures, split=0.5)
    assert report["splits"]["train"]["images"] == 1


def test_coco_faults_are_dropped_and_named(build, tmp_path):
    found = build.coco(("a.png", "b.png", "gone.png", "cut.jpg", "wide.png"))
    found["annotations"][0]["bbox"] = [3, 4, float("nan"), 10]
    found["annotations"][1]["category_id"] = 5
    found["annotations"] += [{"id": 9, "image_id": 77, "category_id": 1, "bbox": [1, 1, 2, 2]}]
    found["images"][4]["width"] = 65
    folder = build.data(tmp_path / "coco", train=found, val=build.coco(("v.png",)))
    (folder / "images" / "gone.png").unlink()
    cut = folder / "images" / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:900])
    report = import_folder(folder, tmp_path / "out")
    text = "\n".join(details(report))
    for words in (
        "annotation 1: box [3, 4, nan, 10] is not finite",
        "annotation 2: unknown category 5",
        "annotation 9: no image 77",
        "gone.png: no such image",
        "cut.jpg: cannot be decoded",
        "wide.png is 64 x 48, not 65 x 48 as written",
    ):
        assert words in text
    assert len(report["dropped"]) == 6
    assert report["splits"]["train"] == {"images": 2, "boxes": 0, "background": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "same id"),
        ({"categories": [{"name": "a"}]}, "integer id"),
        ({"images": [{"id": 1, "file_name": "../b.png"}]}, "leaves the image folder"),
        ({"images": [{"id": 1, "file_name": "/etc/passwd"}]}, "leaves the image folder"),
        ({"images": [{"id": 1, "file_name": "a\0.png"}]}, "not the name of an image"),
        ({"images": []}, "no images"),
    ],
)
def test_coco_that_cannot_be_understood_is_refused(build, tmp_path, change, words):
    (tmp_path / "coco").mkdir()
    build.picture(tmp_path / "coco" / "a.png")
    (tmp_path / "coco" / "train.json").write_text(json.dumps(build.coco() | change))
    with pytest.raises(DataError, match=words):
        import_folder(tmp_path / "coco", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ('{\n"images": [,', r"train\.json:2: not valid"),
        ("[" * 99999, "not valid"),
    ],
)
def test_malformed_json_is_refused_with_its_name(tmp_path, text, words):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "train.json").write_text(text)
    with pytest.raises(DataError, match=rf"train\.json.*{words}|{words}"):
        import_folder(tmp_path / "coco", tmp_path / "out")


# --- all of them ---


def test_the_output_is_the_same_each_time_and_imports_again(coco, tmp_path):
    for name in ("one", "two"):
        import_folder(coco, tmp_path / name)
    import_folder(tmp_path / "one", tmp_path / "three")
    for split in ("train", "val"):
        texts = {(tmp_path / n / f"{split}.json").read_text() for n in ("one", "two", "three")}
        assert len(texts) == 1


def test_the_split_is_seeded_and_has_the_asked_share(build, tmp_path):
    for i in range(10):
        build.voc_image(tmp_path / "voc", f"{i}", build.voc_object())
    names = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"out{number}"
        report = import_folder(tmp_path / "voc", out, split=0.7, seed=seed)
        assert [s["images"] for s in report["splits"].values()] == [7, 3]
        names.append([i["file_name"] for i in load(out, "val")[0]["images"]])
    assert names[0] == names[1] != names[2]


def test_images_are_linked_or_copied(coco, tmp_path):
    import_folder(coco, tmp_path / "linked")
    import_folder(coco, tmp_path / "copied", copy=True)
    original = coco / "images" / "a.png"
    linked, copied = (tmp_path / f / "images" / "a.png" for f in ("linked", "copied"))
    assert linked.is_symlink() and not copied.is_symlink()
    assert linked.read_bytes() == copied.read_bytes() == original.read_bytes()


def test_boxes_are_clipped_to_the_image_and_told(build, tmp_path):
    found = build.coco()
    found["annotations"][0]["bbox"] = [-5, 40, 20, 30]
    build.data(tmp_path / "coco", train=found)
    report = import_folder(tmp_path / "coco", tmp_path / "out")
    assert load_all(tmp_path / "out")[1][0] == ("a.png", 2, 0, 40, 15, 8)
    assert report["clipped"] == ["train.json: annotation 1: box [-5, 40, 20, 30]"]


def test_an_image_that_exif_turns_must_be_annotated_as_turned(build, tmp_path):
    from PIL import Image

    folder = tmp_path / "voc"
    build.voc_image(folder, "a", build.voc_object())
    for stem in "bcde":
        build.voc_image(folder, stem, build.voc_object())
    path = folder / "JPEGImages" / "a.jpg"
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.copy().save(path, exif=exif)
    report = import_folder(folder, tmp_path / "out")
    assert "a.jpg is 48 x 64 (its EXIF orientation turns it), not 64 x 48" in details(report)[0]


@pytest.mark.parametrize("kind", ["empty", "nothing"])
def test_a_folder_without_data_is_refused(tmp_path, kind):
    folder = tmp_path / kind
    if kind == "empty":
        folder.mkdir()
    with pytest.raises(DataError, match=r"no data set in it|not a folder"):
        import_folder(folder, tmp_path / "out")


def test_a_folder_of_two_formats_needs_to_be_told_which(yolo, build, tmp_path):
    (yolo / "train.json").write_text(json.dumps(build.coco(("train/a.png",))))
    with pytest.raises(UsageError, match="looks like yolo and coco"):
        import_folder(yolo, tmp_path / "out")
    assert import_folder(yolo, tmp_path / "out", kind="yolo")["format"] == "yolo"


def test_an_import_where_nothing_is_usable_is_refused(build, tmp_path):
    build.voc_image(tmp_path / "voc", "a", build.voc_object(), image=False)
    (tmp_path / "voc" / "JPEGImages").mkdir()
    with pytest.raises(DataError, match=r"no image such as a\.jpg in .*--images says where"):
        import_folder(tmp_path / "voc", tmp_path / "out")


def test_existing_files_are_safe(coco, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        import_folder(coco, out)
    with pytest.raises(UsageError, match=r"holds thesis\.txt"):
        import_folder(coco, out, overwrite=True)
    with pytest.raises(UsageError, match="holds the source"):
        import_folder(coco / "images", coco, overwrite=True)
    import_folder(coco, tmp_path / "fine")
    with pytest.raises(UsageError, match="was not written by ghm"):
        import_folder(tmp_path / "fine", coco, overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"
    assert (coco / "images" / "a.png").is_file()


def test_overwrite_replaces_what_ghm_wrote_and_only_when_it_succeeds(coco, build, tmp_path):
    out = tmp_path / "out"
    import_folder(coco, out)
    build.voc_image(tmp_path / "voc", "x", build.voc_object("dog", (9, 9, 1, 1)))
    with pytest.raises(DataError):
        import_folder(tmp_path / "voc", out, overwrite=True, strict=True)
    assert len(load(out, "train")[0]["images"]) == 2
    import_folder(tmp_path / "voc", out, overwrite=True)
    assert [i["file_name"] for i in load(out, "train")[0]["images"]] == ["x.jpg"]
    assert not (out / "val.json").exists()


# --- real data, and a second opinion ---


def test_bccd_imports_and_its_two_bad_boxes_are_named(real_data, tmp_path):
    report = import_folder(real_data("bccd"), tmp_path / "out")
    assert report["names"] == ["Platelets", "RBC", "WBC"]
    assert {s: c["images"] for s, c in report["splits"].items()} == {
        "train": 205,
        "val": 87,
        "test": 72,
    }
    assert [d["file"] for d in report["dropped"]] == [
        "Annotations/BloodImage_00343.xml",
        "Annotations/BloodImage_00338.xml",
    ]
    assert all("inverted or empty" in detail for detail in details(report))


def test_coco128_imports_whole(real_data, tmp_path):
    report = import_folder(real_data("coco128"), tmp_path / "out")
    assert len(report["names"]) == 80 and report["names"][:2] == ["person", "bicycle"]
    assert [s["images"] for s in report["splits"].values()] == [128, 128]
    assert [s["boxes"] for s in report["splits"].values()] == [929, 898]
    assert report["dropped"] == []


@pytest.mark.filterwarnings("ignore")
def test_clean_folders_are_read_as_supervision_reads_them(voc, yolo, coco, build, tmp_path):
    supervision = pytest.importorskip("supervision")
    read = supervision.DetectionDataset
    theirs = {
        "voc": read.from_pascal_voc(str(voc / "JPEGImages"), str(voc / "Annotations")),
        "yolo": read.from_yolo(
            str(yolo / "images/train"), str(yolo / "labels/train"), str(yolo / "data.yaml")
        ),
        "coco": read.from_coco(str(coco / "images"), str(coco / "train.json")),
    }
    for name, folder in (("voc", voc), ("yolo", yolo), ("coco", coco)):
        import_folder(folder, tmp_path / f"out_{name}")
        # VOC has no split; of the others, train was read.
        out = tmp_path / f"out_{name}"
        ours = load_all(out)[1] if name == "voc" else load(out, "train")[1]
        boxes = [
            (path.split("/")[-1], theirs[name].classes[k], *xyxy)
            for path, found in theirs[name].annotations.items()
            for xyxy, k in zip(found.xyxy.tolist(), found.class_id, strict=True)
        ]
        names = ["cat", "dog"]
        corners = [
            (file.split("/")[-1], names[k - 1], x, y, x + w, y + h) for file, k, x, y, w, h in ours
        ]
        assert [b[:2] for b in sorted(boxes)] == [c[:2] for c in sorted(corners)]
        for b, c in zip(sorted(boxes), sorted(corners), strict=True):
            assert b[2:] == pytest.approx(c[2:], abs=1e-3)
