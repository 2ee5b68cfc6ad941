"""A person's decisions become a data set; what is not understood is an error that says where."""

import csv
import json
from pathlib import Path

import pytest

from ghm_d2.analysis.suspect_files import has_decisions, write_coco, write_table, write_tasks
from ghm_d2.analysis.suspects import Suspect
from ghm_d2.data.catalog import locate
from ghm_d2.data.checking.validate import validate_json
from ghm_d2.data.cleaning.clean import clean
from ghm_d2.data.cleaning.decisions import read_decisions
from ghm_d2.errors import DataError, UsageError

SQUARE = [[4, 4, 14, 4, 14, 14, 4, 14]]


def annotation(number: int, box, category: int, **fields) -> dict:
    area = box[2] * box[3]
    own = {"id": number, "image_id": 1, "category_id": category, "bbox": box, "area": area}
    return own | {"iscrowd": 0} | fields


@pytest.fixture
def coco() -> dict:
    """Two images; a class name that a spreadsheet would take for a formula."""
    images = [
        {"id": i, "file_name": f"{name}.png", "width": 100, "height": 50}
        for i, name in ((1, "a b"), (2, "c"))
    ]
    categories = [{"id": 3, "name": "=cat"}, {"id": 7, "name": "dog"}]
    annotations = [
        annotation(1, [4, 4, 10, 10], 3, segmentation=SQUARE),
        annotation(2, [30, 10, 20, 20], 7, segmentation=SQUARE),
        annotation(3, [60, 10, 20, 20], 7),
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def suspects(coco) -> list[Suspect]:
    """One of each kind."""

    def seen(box, category, image=1):
        return {"image_id": image, "category_id": category, "bbox": box, "score": 0.5}

    first, second, third = coco["annotations"]
    return [
        Suspect(1, first, "class", 0.9, seen([4.2, 4, 10, 10], 7)),
        Suspect(2, None, "missing", 0.8, seen([1.5, 2, 3, 4], 3, 2)),
        Suspect(1, second, "box", 0.7, seen([35, 12, 20, 20], 7)),
        Suspect(1, third, "extra", 0.6, None),
    ]


@pytest.fixture
def table(coco, suspects, tmp_path):
    """Writes the table, with decisions in the order of its rows."""

    def write(*decisions: str, **replaced: str) -> Path:
        file = tmp_path / "suspects.csv"
        write_table(suspects, coco, file)
        lines = file.read_text().splitlines()
        marked = [f"{d}{line}" for d, line in zip(decisions, lines[1:], strict=False)]
        text = "\n".join([lines[0], *marked, *lines[1 + len(decisions) :]]) + "\n"
        for old, new in replaced.items():
            text = text.replace(old, new)
        file.write_text(text)
        return file

    return write


def applied(file: Path, coco: dict, **options) -> list[dict]:
    return read_decisions(file, coco, Path("/images"), **options).apply(coco)["annotations"]


def test_nothing_decided_changes_nothing(table, coco):
    assert applied(table(), coco) == coco["annotations"]


def test_decisions_of_each_kind(table, coco):
    first, second, _ = coco["annotations"]
    second["noise"] = "shift"  # as the generated digits say of an error
    got = applied(table("accept", "accept", "Accept ", "drop"), coco)
    assert got[0] == first | {"category_id": 7}  # its place, and its mask, are right
    assert got[1] == annotation(2, [35, 12, 20, 20], 7)  # without the mask of the old place
    assert got[2] == annotation(4, [1.5, 2, 3, 4], 3, image_id=2)
    assert len(got) == 3
    assert first["category_id"] == 3 and second["bbox"] == [30, 10, 20, 20]  # coco is left alone


def test_the_first_ones_are_dropped_and_added_where_nothing_is_decided(table, coco):
    got = applied(table("keep"), coco, drop=1, add=5)
    assert [a["id"] for a in got] == [1, 3, 4] and got[2]["image_id"] == 2


def test_a_table_that_a_spreadsheet_saved(table, coco):
    file = table("drop")
    with_commas = file.read_text().replace(",", ";").replace(".", ",")
    file.write_text("\ufeff" + with_commas.replace("\n;missing", "\naccept;missing"))
    got = applied(file, coco)
    assert [a["id"] for a in got] == [2, 3, 4] and got[2]["bbox"] == [1.5, 2, 3, 4]


def test_decisions_are_seen_however_the_table_was_saved(table, tmp_path):
    def saved(rows, **how) -> bool:
        with open(tmp_path / "saved.csv", "w", newline="") as file:
            csv.writer(file, **how).writerows(rows)
        return has_decisions(tmp_path / "saved.csv")

    with open(table(), newline="") as file:
        undecided = list(csv.reader(file))
    decided = [undecided[0], [" drop", *undecided[1][1:]], *undecided[2:]]
    for how in ({}, {"quoting": csv.QUOTE_ALL}, {"delimiter": ";"}):
        assert saved(decided, **how) and not saved(undecided, **how)
    for unreadable in ([["choice"], ["drop"]], [["x" * 200_000]], []):
        assert saved(unreadable), "a person's work may be in it"
    assert not has_decisions(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("decisions", "change", "message"),
    [
        (("delete",), ("", ""), "suspects.csv:2: decision must be keep, drop, accept or empty"),
        (("", "", "", "accept"), ("", ""), "csv:5: seen_class is not a class"),
        (("drop",), (",1,1\n", ",1,77\n"), "csv:2: .* no such image or annotation"),
        (("", "accept"), ("1.50,2.00,3.00", "1.50,2.00,nan"), "csv:3: seen_x to seen_height"),
        (("", "accept"), ("1.50,2.00,3.00", "1.50,2.00,x"), "csv:3: seen_x, .* must be numbers"),
        ((), ("decision,", "choice,"), "lacks the column 'decision'"),
    ],
)
def test_what_is_wrong_in_a_table(table, coco, decisions, change, message):
    file = table(*decisions)
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(DataError, match=message):
        applied(file, coco)


def exported(folder: Path, change=lambda results: results) -> Path:
    """Label Studio's export after a person has accepted the predictions, but for a change."""
    tasks = json.loads((folder / "label_studio.json").read_text())
    for number, task in enumerate(tasks):
        (prediction,) = task.pop("predictions")
        results = change(prediction["result"]) if number == 0 else prediction["result"]
        task |= {"id": number, "annotations": [{"result": results, "was_cancelled": False}]}
    file = folder / "export.json"
    file.write_text(json.dumps(tasks))
    return file


def test_label_studio_there_and_back(coco, suspects, tmp_path):
    write_tasks(suspects, coco, Path("/images"), tmp_path)
    got = applied(exported(tmp_path), coco)
    assert got[:3] == coco["annotations"]  # with all that they had
    assert got[3]["bbox"] == pytest.approx([1.5, 2, 3, 4]) and got[3]["category_id"] == 3
    assert len(got) == 4


def test_label_studio_boxes_that_a_person_moved_renamed_and_removed(coco, suspects, tmp_path):
    def change(results):
        results[0]["value"]["rectanglelabels"] = ["dog"]
        results[1]["value"]["x"] = 50
        return results[:2]

    write_tasks(suspects[:1], coco, Path("/images"), tmp_path)
    got = applied(exported(tmp_path, change), coco)
    assert [a["id"] for a in got] == [4, 5]
    assert got[0]["category_id"] == 7 and got[0]["bbox"] == pytest.approx([4, 4, 10, 10])
    assert got[1]["bbox"] == pytest.approx([50, 10, 20, 20]) and got[1]["area"] == pytest.approx(
        400
    )


def test_label_studio_images_that_are_not_done_stay(coco, suspects, tmp_path):
    write_tasks(suspects, coco, Path("/images"), tmp_path)
    first, second = json.loads((tmp_path / "label_studio.json").read_text())
    done = second | {"annotations": [{"result": []}]}
    for undone in (first, first | {"annotations": [{"result": [], "was_cancelled": True}]}):
        (tmp_path / "export.json").write_text(json.dumps([undone, done]))
        assert applied(tmp_path / "export.json", coco) == coco["annotations"]
    with pytest.raises(DataError, match="no task is annotated"):
        applied(tmp_path / "label_studio.json", coco)


def test_label_studio_images_of_lvis_are_known_by_their_addresses(coco, suspects, tmp_path):
    write_tasks(suspects, coco, Path("/images/val2017"), tmp_path)
    for image in coco["images"]:
        image["coco_url"] = f"http://images.org/val2017/{image.pop('file_name')}"
    assert applied(exported(tmp_path), coco)[:3] == coco["annotations"]


def test_label_studio_boxes_that_leave_the_image_stay_as_they_are(coco, suspects, tmp_path):
    coco["annotations"][1]["bbox"] = [-5, 10, 20, 20]
    coco["annotations"][2]["bbox"] = [60, 10, 0, 20]  # which no tool can show
    write_tasks(suspects[:1], coco, Path("/images"), tmp_path)
    assert applied(exported(tmp_path), coco) == coco["annotations"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "a JSON list of tasks"),
        ([{"annotations": [{"result": []}]}], "task 0: has no image address"),
        ([{"data": {"image": 5}, "annotations": [{"result": []}]}], "has no image address"),
        ([{"data": {"image": "/x.png"}, "annotations": [{"result": []}]}], "not in the data set"),
        ([{"annotations": [{}]}], "annotations are not in the format of Label Studio"),
        ([{"annotations": 5}], "annotations are not in the format of Label Studio"),
    ],
)
def test_what_is_wrong_in_an_export(coco, tmp_path, tasks, message):
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    with pytest.raises(DataError, match=message):
        applied(tmp_path / "export.json", coco)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"rectanglelabels": ["cow"]}, "'cow' is not a class"),
        ({"rectanglelabels": []}, "a box is not in the format of Label Studio"),
        ({"width": -3}, "inverted or empty"),
        ({"x": 1e400}, "not finite"),
        ({"rotation": 30}, "rotated"),
        ({"x": "left"}, "a box is not in the format of Label Studio"),
    ],
)
def test_what_is_wrong_in_a_box_of_an_export(coco, suspects, tmp_path, value, message):
    def change(results):
        results[0]["value"] |= value
        return results

    write_tasks(suspects, coco, Path("/images"), tmp_path)
    with pytest.raises(DataError, match=message):
        applied(exported(tmp_path, change), coco)


def test_coco_file_of_the_suspects(coco, suspects, tmp_path):
    write_coco(suspects[:2], coco, tmp_path / "suspects.json")
    got = json.loads((tmp_path / "suspects.json").read_text())
    assert got["images"] == coco["images"] and got["categories"] == coco["categories"]
    kinds = {a["id"]: a.get("suspect_kind") for a in got["annotations"]}
    assert kinds == {1: "class", 2: None, 3: None, 4: "missing"}
    assert got["annotations"][3]["score"] == 0.5


def test_clean_writes_a_new_folder_and_leaves_the_old_one(digits_folder, tmp_path):
    train = json.loads((Path(digits_folder) / "train.json").read_text())
    first = train["annotations"][0]
    suspect = Suspect(first["image_id"], first, "extra", 0.5, None)
    write_table([suspect], train, tmp_path / "t.csv")
    report = clean(digits_folder, tmp_path / "t.csv", tmp_path / "new", drop=1)
    assert (report["dropped"], report["changed"], report["added"]) == (1, 0, 0)
    new = json.loads((tmp_path / "new" / "train.json").read_text())
    assert new == train | {"annotations": train["annotations"][1:]}
    assert json.loads((Path(digits_folder) / "train.json").read_text()) == train
    assert (tmp_path / "new" / "images" / train["images"][0]["file_name"]).is_file()
    val = (tmp_path / "new" / "val.json").read_text()
    assert json.loads(val) == json.loads((Path(digits_folder) / "val.json").read_text())
    with pytest.raises(UsageError, match="not empty"):
        clean(digits_folder, tmp_path / "t.csv", tmp_path / "new")
    clean(digits_folder, tmp_path / "t.csv", tmp_path / "new", overwrite=True)
    with pytest.raises(UsageError, match="contains the data set"):
        clean(str(tmp_path / "new"), tmp_path / "t.csv", tmp_path / "new", overwrite=True)
    with pytest.raises(UsageError, match="--split is 'dev'"):
        clean(digits_folder, tmp_path / "t.csv", tmp_path / "other", split="dev")


def test_clean_of_splits_whose_images_are_in_different_folders(coco_names, tmp_path):
    file, _ = locate("coco_2017")["train"]
    train = json.loads(Path(file).read_text())
    write_table([], train, tmp_path / "t.csv")
    clean("coco_2017", tmp_path / "t.csv", tmp_path / "new")
    new = json.loads((tmp_path / "new" / "train.json").read_text())
    assert all((tmp_path / "new" / "images" / i["file_name"]).is_file() for i in new["images"])
    assert new["annotations"] == train["annotations"]


def test_clean_names_the_files_of_lvis(digits_folder, tmp_path):
    """LVIS has only addresses; a folder's images are read by their file names."""
    (tmp_path / "lvis").mkdir()
    (tmp_path / "lvis" / "images").symlink_to(Path(digits_folder) / "images")
    files = {}
    for split in ("train", "val"):
        coco = json.loads((Path(digits_folder) / f"{split}.json").read_text())
        write_table([], coco, tmp_path / "t.csv")
        files[split] = [image.pop("file_name") for image in coco["images"]]
        for image, file in zip(coco["images"], files[split], strict=True):
            image |= {"coco_url": f"http://images.org/{file}", "neg_category_ids": []}
        (tmp_path / "lvis" / f"{split}.json").write_text(json.dumps(coco))
    clean(str(tmp_path / "lvis"), tmp_path / "t.csv", tmp_path / "new")
    for split in ("train", "val"):
        new = json.loads((tmp_path / "new" / f"{split}.json").read_text())
        assert [image["file_name"] for image in new["images"]] == files[split]
        validate_json(str(tmp_path / "new" / f"{split}.json"), str(tmp_path / "new" / "images"))
