"""Folders as tools and people leave them: what each is read as, and what is said of it."""

import json
import os
import shutil

import pytest
from PIL import Image

from ghm_d2.data.importing.folders import import_folder
from ghm_d2.errors import DataError, UsageError

WIDTH, HEIGHT = 20, 10
LABEL = "0 .5 .5 .5 .5\n"  # YOLO: the box below
BOX = [5, 2.5, 10, 5]
LABELS = {"a": LABEL, "b": LABEL + "1 .2 .2 .2 .2\n", "c": LABEL}


def voc(filename="", names=("cat",), size=True, more=""):
    objects = "".join(
        f"<object><name>{n}</name><truncated>1</truncated><bndbox><xmin>6.0</xmin>"
        "<ymin>3.5</ymin><xmax>15</xmax><ymax>7.5</ymax></bndbox></object>"
        for n in names
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>" if size else ""
    path = "<path>C:\\Users\\me\\Desktop\\x\\old.jpg</path><folder>x</folder>"
    head = f"<filename>{filename}</filename>{path}{size}{more}"
    return f"<annotation verified='yes'>{head}{objects}</annotation>"


def coco(files, categories=((1, "cat"), (2, "dog")), first=0, **more):
    """Each file with a box of the first and the last category; ids count from `first`."""
    images = [
        {"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for i, name in enumerate(files, first)
    ]
    annotations = [
        {"image_id": i["id"], "category_id": c, "bbox": BOX, "area": 50, "iscrowd": 0}
        for i in images
        for c in (categories[0][0], categories[-1][0])
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    kinds = [{"id": n, "name": name, "supercategory": "x"} for n, name in categories]
    whole = {"images": images, "annotations": annotations, "categories": kinds}
    return json.dumps(whole | more)


def roboflow(*files):
    """Class 0 is the super-category, which no annotation uses."""
    whole = json.loads(coco(files, ((1, "cat"), (2, "dog"))))
    whole["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
    return json.dumps(whole)


def lvis(*files):
    whole = json.loads(coco(files))
    for image in whole["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/{image.pop('file_name')}"
    return json.dumps(whole)


@pytest.fixture
def make(tmp_path):
    """Writes files: texts, and pictures for names without one, each of another content."""

    def write(files, folder="source"):
        root = tmp_path / folder
        for number, (name, text) in enumerate(files.items()):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is None:
                shade = (40 + 9 * number, 5 * number, 90)
                Image.new("RGB", (WIDTH, HEIGHT), shade).save(path)
            elif isinstance(text, bytes):
                path.write_bytes(text)
            else:
                path.write_text(text)
        return root

    return write


def pictures(*names):
    return dict.fromkeys(names)


def files_of(folder, suffix, texts):
    return {f"{folder}{stem}{suffix}": text for stem, text in texts.items()}


# name: files; format; split -> (images, boxes); classes; what is said, in notes or of the dropped
LAYOUTS = {
    "voc in annots/, one JPEG cut short": (
        files_of("annots/", ".xml", {s: voc(f"{s}.jpg") for s in "abcd"})
        | pictures("images/b.jpg", "images/c.jpg", "images/d.jpg")
        | {"images/a.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF", "README.md": "# x", ".idea/x.xml": "<"},
        *("voc", {"train": (2, 2), "val": (1, 1)}, ["cat"]),
        ["a.jpg: cannot be decoded", "20% of train became val"],
    ),
    "voc beside the images, of train and test, in upper case": (
        files_of("images/train/", ".xml", {"IMG_1": voc("x.jpg"), "IMG_2": voc("IMG_2")})
        | files_of("images/test/", ".xml", {"IMG_1": voc("IMG_1.png", ["dog"], size=False)})
        | pictures("images/train/IMG_1.JPG", "images/train/IMG_2.JPG", "images/test/IMG_1.JPG"),
        *("voc", {"train": (1, 1), "val": (1, 1), "test": (1, 1)}, ["cat", "dog"], []),
    ),
    "voc of other names than the images'": (
        files_of("xml/", ".xml", {"1": voc("p.jpeg"), "2": voc("q"), "3": voc("r.jpg")})
        | pictures("p.jpg", "q.png", "r.jpg"),
        *("voc", {"train": (2, 2), "val": (1, 1)}, ["cat"], []),
    ),
    "voc with lists of paths": (
        files_of("labels/", ".xml", {s: voc() for s in "abc"})
        | pictures("images/a.jpg", "images/b.jpg", "images/c.jpg")
        | {"train.txt": "./images/a.jpg ./labels/a.xml\n", "val.txt": "images\\b.jpg\nlost\n"},
        *("voc", {"train": (1, 1), "val": (1, 1)}, ["cat"]),
        ["1 annotated images belong to no split", "val.txt: no annotation file lost.xml"],
    ),
    "voc objects without a box or a name": (
        {"a.xml": voc(more="<object><name>cat</name></object><object><bndbox/></object>")}
        | {"b.xml": voc()}
        | pictures("a.png", "b.png"),
        *("voc", {"train": (1, 1), "val": (1, 1)}, ["cat"]),
        ["object 1: has no <bndbox>", "object 2: has no <name>"],
    ),
    "CVAT's Pascal VOC 1.1": (
        files_of("Annotations/", ".xml", {s: voc(f"{s}.png") for s in "ab"})
        | pictures("JPEGImages/a.png", "JPEGImages/b.png")
        | {"ImageSets/Main/default.txt": "a\nb\n", "labelmap.txt": "# label:color_rgb\n"},
        *("voc", {"train": (1, 1), "val": (1, 1)}, ["cat"], []),
    ),
    "Roboflow's COCO": (
        {"train/_annotations.coco.json": roboflow("a.jpg"), "README.roboflow.txt": "x"}
        | {"valid/_annotations.coco.json": roboflow("a.jpg")}
        | {"test/_annotations.coco.json": roboflow("a.jpg")}
        | pictures("train/a.jpg", "valid/a.jpg", "test/a.jpg"),
        *("coco", {"train": (1, 2), "val": (1, 2), "test": (1, 2)}, ["cat", "dog"]),
        ["one class that no annotation uses is left out: animals"],
    ),
    "COCO's own layout": (
        {"annotations/instances_train2017.json": coco(["1.jpg"], ((1, "person"), (90, "brush")))}
        | {"annotations/instances_val2017.json": coco(["2.jpg"], ((1, "person"), (90, "brush")))}
        | {"annotations/person_keypoints_val2017.json": coco(["2.jpg"])}
        | {"annotations/captions_val2017.json": '{"images": [], "annotations": []}'}
        | pictures("train2017/1.jpg", "val2017/2.jpg", "val2017/1.jpg"),
        *("coco", {"train": (1, 2), "val": (1, 2)}, ["person", "brush"], []),
    ),
    "LVIS, which has val images of COCO's train": (
        {"lvis_v1_train.json": lvis("train2017/1.jpg", "train2017/2.jpg")}
        | {"lvis_v1_val.json": lvis("val2017/3.jpg", "train2017/4.jpg")}
        | pictures(*(f"train2017/{i}.jpg" for i in (1, 2, 3, 4)), "val2017/3.jpg"),
        *("coco", {"train": (2, 4), "val": (2, 4)}, ["cat", "dog"], []),
    ),
    "COCO of which only val is here": (
        {"annotations/instances_train2017.json": coco(["1.jpg"])}
        | {"annotations/instances_val2017.json": coco(["2.jpg"])}
        | pictures("val2017/2.jpg"),
        *("coco", {"val": (1, 2)}, ["cat", "dog"]),
        ["instances_train2017.json is left out: none of its images (1.jpg, ...) was found"],
    ),
    "COCO with names of one's own": (
        {"annotations/custom_train.json": coco(["a.jpg"])}
        | {"annotations/custom_val.json": coco(["b.jpg"])}
        | pictures("train2017/a.jpg", "val2017/b.jpg", "val2017/a.jpg"),
        *("coco", {"train": (1, 2), "val": (1, 2)}, ["cat", "dog"], []),
    ),
    "COCO in one JSON, the images in folders of the splits": (
        {"all.json": coco(["a.jpg", "b.jpg"])} | pictures("train/a.jpg", "valid/b.jpg"),
        *("coco", {"train": (1, 2), "val": (1, 2)}, ["cat", "dog"], []),
    ),
    "Label Studio's COCO": (
        {"result.json": coco(["images\\3-a b.jpg", "/data/upload/1/b.jpg", "../old/c.jpg"])}
        | pictures("images/3-a b.jpg", "images/b.jpg", "images/c.jpg"),
        *("coco", {"train": (2, 4), "val": (1, 2)}, ["cat", "dog"], []),
    ),
    "Label Studio's COCO with addresses": (
        {"result.json": coco(["http://x:8080/data/a%20b.jpg", "/data/local-files/?d=m%2Fb.jpg"])}
        | pictures("images/a b.jpg", "images/b.jpg"),
        *("coco", {"train": (1, 2), "val": (1, 2)}, ["cat", "dog"], []),
    ),
    "COCO in one JSON and in one a split": (
        {"all.json": coco(["a.jpg", "b.jpg"]), "train.json": coco(["a.jpg"])}
        | {"val.json": coco(["b.jpg"])}
        | pictures("images/a.jpg", "images/b.jpg"),
        *("coco", {"train": (1, 2), "val": (1, 2)}, ["cat", "dog"]),
        ["all.json is left out: its name contains no split, and train.json describes the same"],
    ),
    "two tasks of CVAT's COCO 1.0": (
        {"one/annotations/instances_default.json": coco(["a.jpg", "b.jpg"], first=1)}
        | {"two/annotations/instances_default.json": coco(["a.jpg", "b.jpg"], first=1)}
        | pictures("one/images/default/a.jpg", "one/images/default/b.jpg")
        | pictures("two/images/a.jpg", "two/images/b.jpg"),
        *("coco", {"train": (3, 6), "val": (1, 2)}, ["cat", "dog"]),
        ["the image ids of the train split are replaced by 1, 2, ..."],
    ),
    "CVAT's YOLO 1.1": (
        files_of("obj_train_data/", ".txt", LABELS)
        | {"obj.names": "cat\ndog\n\n", "obj.data": "classes = 2\ntrain = data/train.txt\n"}
        | {"train.txt": "".join(f"data/obj_train_data/{s}.jpg\n" for s in "abc")}
        | pictures(*(f"obj_train_data/{s}.jpg" for s in "abc")),
        *("yolo", {"train": (2, 2), "val": (1, 2)}, ["cat", "dog"], []),
    ),
    "CVAT's Ultralytics YOLO": (
        files_of("labels/train/", ".txt", LABELS)
        | {"data.yaml": "names:\n  0: cat\n  1: dog\npath: .\ntrain: train.txt\n"}
        | {"train.txt": "".join(f"data/images/train/{s}.jpg\n" for s in "abc")}
        | pictures(*(f"images/train/{s}.jpg" for s in "abc")),
        *("yolo", {"train": (2, 2), "val": (1, 2)}, ["cat", "dog"], []),
    ),
    "Label Studio's YOLO": (
        files_of("labels/", ".txt", LABELS | {"d": ""})
        | {"classes.txt": "cat\ndog", "notes.json": '{"categories": [], "info": {}}'}
        | pictures(*(f"images/{s}.jpg" for s in "abcd"), "figures/shown.png"),
        *("yolo", {"train": (3, 4), "val": (1, 0)}, ["cat", "dog"], []),
    ),
    "labelImg's YOLO": (
        files_of("", ".txt", LABELS)
        | {"classes.txt": "cat\ndog\n", "._a.txt": b"\0\5", "__MACOSX/._a.jpg": b"\0"}
        | pictures(*(f"{s}.JPG" for s in "abcd"))
        | {"Thumbs.db": b"\0", ".DS_Store": b"\0"}
        | {"cleaned/clean_report.json": "{}", "cleaned/e.txt": LABEL}  # as `ghm data clean` leaves
        | pictures("cleaned/e.jpg"),
        *("yolo", {"train": (3, 4), "val": (1, 0)}, ["cat", "dog"]),
        ["1 images have no label file and count as background"],
    ),
    "darknet with lists": (
        files_of("data/img/", ".txt", LABELS)
        | {"cfg/coco.names": "person\ncar\n", "data/obj.names": "cat\ndog\n"}
        | {"data/train.txt": "/content/darknet/data/img/a.jpg\n/content/darknet/data/img/b.jpg"}
        | {"data/valid.txt": "data/img/c.jpg\ndata/img/gone.jpg\ndata/img/moves.gif"}
        | pictures(*(f"data/img/{s}.jpg" for s in "abc")),
        *("yolo", {"train": (2, 3), "val": (1, 1)}, ["cat", "dog"], 
        ["gone.jpg: no such image", "moves.gif: not BMP, JPEG"]),
    ),
    "YOLO in train/images": (
        files_of("train/labels/", ".txt", {"a": LABEL + "1 .1 .1 .6 .1 .6 .7\n"})
        | files_of("valid/labels/", ".txt", {"a": LABEL})
        | {"classes.txt": "cat\ndog\n", "captions/a.txt": "a cat\n"}
        | pictures("train/images/a.jpg", "valid/images/a.jpg"),
        *("yolo", {"train": (1, 2), "val": (1, 1)}, ["cat", "dog"], []),
    ),
    "Roboflow's YOLO, without the test that it names": (
        files_of("train/labels/", ".txt", {"a": LABEL})
        | files_of("valid/labels/", ".txt", {"b": LABEL})
        | {"data.yaml": "train: /content/x/train/images\nval: ../valid/images\n"
           "test: ../test/images\nnc: 2\nnames: ['cat', 'dog']\n"}
        | pictures("train/images/a.jpg", "valid/images/b.jpg"),
        *("yolo", {"train": (1, 1), "val": (1, 1)}, ["cat", "dog"]),
        ["test is '../test/images', which does not exist"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised(make, tmp_path, name):
    files, kind, splits, names, said = LAYOUTS[name]
    report = import_folder(make(files), tmp_path / "out")
    assert report["format"] == kind and report["names"] == names
    found = {s: (c["images"], c["boxes"]) for s, c in report["splits"].items()}
    assert found == splits
    for split, counts in splits.items():
        written = json.loads((tmp_path / "out" / f"{split}.json").read_text())
        ids = [{entry["id"] for entry in written[key]} for key in ("images", "annotations")]
        assert tuple(map(len, ids)) == counts, "an id occurs twice"
    told = report["notes"] + [f"{d['file']}: {d['detail']}" for d in report["dropped"]]
    for words in said:
        assert any(words in line for line in told), told
    made_val = {"the source has no val split: 20% of train became val (seed 0)"}
    assert len(set(told) - made_val) == len([w for w in said if "became val" not in w]), told


@pytest.mark.parametrize("name", ["Roboflow's COCO", "labelImg's YOLO", "COCO's own layout"])
def test_boxes_belong_to_the_images_of_their_own_folder(make, tmp_path, name):
    import_folder(make(LAYOUTS[name][0]), tmp_path / "out")
    for file in tmp_path.glob("out/*.json"):
        for image in json.loads(file.read_text()).get("images", []):
            target = (tmp_path / "out" / "images" / image["file_name"]).resolve()
            assert target == tmp_path / "source" / image["file_name"]
    boxes = json.loads((tmp_path / "out" / "train.json").read_text())["annotations"]
    assert boxes[0]["bbox"] == BOX


def test_category_ids_are_those_of_the_source(make, tmp_path):
    files = LAYOUTS["COCO's own layout"][0]
    import_folder(make(files), tmp_path / "out")
    for split in ("train", "val"):
        written = json.loads((tmp_path / "out" / f"{split}.json").read_text())
        assert [c["id"] for c in written["categories"]] == [1, 90]
        assert [a["category_id"] for a in written["annotations"]] == [1, 90]


def test_a_file_that_numbers_the_same_classes_otherwise_is_told(make, tmp_path):
    files = {"train.json": coco(["a.jpg"]), "val.json": coco(["b.jpg"], ((0, "dog"), (2, "cow")))}
    report = import_folder(make(files | pictures("a.jpg", "b.jpg")), tmp_path / "out")
    assert report["names"] == ["cat", "dog", "cow"]
    val = json.loads((tmp_path / "out" / "val.json").read_text())
    assert [a["category_id"] for a in val["annotations"]] == [2, 3]
    assert report["notes"] == [
        "val.json: class 'dog' has id 0, which becomes 2",
        "val.json: class 'cow' has id 2, which becomes 3",
    ]


def test_unused_classes_stay_if_asked(make, tmp_path):
    source = make(LAYOUTS["Roboflow's COCO"][0])
    report = import_folder(source, tmp_path / "out", all_classes=True)
    assert report["names"] == ["animals", "cat", "dog"]


TWICE = files_of("labels/", ".txt", LABELS) | files_of("old/labels/", ".txt", LABELS)
REFUSED = {
    "images of two folders": (
        {"one.json": coco(["a.jpg"])} | pictures("small/a.jpg", "large/a.jpg"),
        *(DataError, r"large/a\.jpg and small/a\.jpg both match one\.json; choose the .* --images"),
    ),
    "annotations of two folders": (
        {"old/a.xml": voc(), "new/a.xml": voc()} | pictures("images/a.jpg"),
        *(DataError, r"new/a and old/a both match images/a\.jpg"),
    ),
    "an image in two files of a split": (
        {"train.json": coco(["a.jpg"]), "train_v2.json": coco(["a.jpg"])} | pictures("a.jpg"),
        *(DataError, r"train\.json and train_v2\.json both describe a\.jpg; remove one"),
    ),
    "labels without class names": (
        files_of("labels/", ".txt", LABELS) | pictures("images/a.jpg"),
        *(DataError, r"1 YOLO label files .* to classes\.txt, one per line"),
    ),
    "labels of two sets": (
        {"one/a.txt": LABEL, "one/classes.txt": "cat", "two/b.txt": LABEL, "two/classes.txt": "dog"}
        | pictures("one/a.jpg", "two/b.jpg"),
        *(DataError, r"one/classes\.txt and two/classes\.txt name different classes"),
    ),
    "labelme's own files": (
        {"a.json": '{"version": "5", "shapes": [], "imagePath": "a.jpg"}'} | pictures("a.jpg"),
        *(DataError, r"no data set recognised; found 1 images, 1 \.json files; .*labelme2coco\.py"),
    ),
    "CVAT's own XML": (
        {"annotations.xml": "<annotations>\n<image/></annotations>"} | pictures("a.jpg"),
        *(DataError, "CVAT's own XML format; export the data as COCO 1.0"),
    ),
    "two formats": (
        {"a.xml": voc(), "a.txt": LABEL, "classes.txt": "cat"} | pictures("a.jpg"),
        *(UsageError, r"looks like yolo and voc \(yolo: a\.txt; voc: .*--format"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused_with_the_remedy(make, tmp_path, name):
    files, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        import_folder(make(files), tmp_path / "out")


def test_images_says_which_of_two_folders(make, tmp_path):
    source = make(REFUSED["images of two folders"][0])
    import_folder(source, tmp_path / "out", image_folder=source / "small")
    assert (tmp_path / "out" / "images" / "a.jpg").resolve() == source / "small" / "a.jpg"


def test_two_images_of_one_label_file_are_left_out_and_named(make, tmp_path):
    """CVAT writes one label file for a.jpg and a.png, so whose boxes they are is not known."""
    files = LAYOUTS["CVAT's YOLO 1.1"][0] | pictures("obj_train_data/a.png")
    files["train.txt"] += "data/obj_train_data/a.png\n"
    for name, text in list(files.items()):
        if name.startswith("obj_train_data"):
            files[name.replace("obj_train_data", "black and white")] = files.pop(name)
        elif isinstance(text, str):
            files[name] = text.replace("obj_train_data", "black and white")
    report = import_folder(make(files), tmp_path / "out")
    assert sum(s["images"] for s in report["splits"].values()) == 2
    same = "black and white/a.jpg and a.png have the same name; remove one"
    assert [d["detail"] for d in report["dropped"]] == [same, same]


def test_an_output_in_the_source_is_not_read_again(make, tmp_path):
    source = make(LAYOUTS["labelImg's YOLO"][0])
    for _ in range(2):
        report = import_folder(source, source / "imported", overwrite=True)
    assert sum(s["images"] for s in report["splits"].values()) == 4


def test_pipes_and_links_to_nothing_are_passed_over(make, tmp_path):
    source = make(LAYOUTS["labelImg's YOLO"][0])
    os.mkfifo(source / "d.txt")
    os.mkfifo(source / "x.json")
    (source / "y.yaml").symlink_to(tmp_path / "nothing")
    (source / "again").symlink_to(source)
    assert import_folder(source, tmp_path / "out")["splits"]["train"]["images"] == 3


def test_copies_of_a_picture_are_on_one_side_of_a_val_split_that_is_made(make, tmp_path):
    source = make(files_of("", ".xml", {s: voc() for s in "abcdefgh"}) | pictures("a.png", "b.png"))
    for number, copy in enumerate("cdefgh"):
        shutil.copy(source / ("a.png", "b.png")[number % 2], source / f"{copy}.png")
    import_folder(source, tmp_path / "out")
    sides = [json.loads((tmp_path / "out" / f"{s}.json").read_text()) for s in ("train", "val")]
    names = [{image["file_name"][0] for image in side["images"]} for side in sides]
    assert sorted(map(sorted, names)) == [["a", "c", "e", "g"], ["b", "d", "f", "h"]]
