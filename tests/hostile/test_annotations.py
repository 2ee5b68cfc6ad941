"""Annotations of strangers, for `ghm data import`: COCO, VOC and YOLO."""

import json
from pathlib import Path

import yaml
from sound_files import (
    DEEP,
    ESCAPE,
    TEN_ITEMS,
    coco,
    coco_source,
    imported,
    laughs,
    picture,
    voc_object,
)
from traps import Case, each, faults, filled


def of_coco(tried: str, text, says: str, exit: int = 3, images=("a.png",), **more) -> Case:
    """A COCO JSON."""
    return imported("COCO JSON", tried, lambda w: coco_source(w, text, images), says, exit, **more)


def voc(tried: str, xml: str, says: str, exit: int = 3, stem: str = "a") -> Case:
    """A VOC annotation; `filled` puts places into it."""

    def write(work: Path) -> None:
        picture(work / f"source/JPEGImages/{stem}.jpg")
        file = work / f"source/Annotations/{stem}.xml"
        file.parent.mkdir()
        file.write_text(filled(xml, work), encoding="utf-8")

    return imported("VOC XML", tried, write, says, exit)


def yolo(tried: str, says: str, label="0 .5 .5 .5 .5", exit=3, slow=False, **data) -> Case:
    """A YOLO folder; `data` goes into its data.yaml, or replaces it as `text`."""

    def write(work: Path) -> None:
        picture(work / "source/images/a.png")
        picture(work / "source/images/b.png", seed=1)
        (work / "source/labels").mkdir()
        for stem in "ab":
            (work / f"source/labels/{stem}.txt").write_text(label, encoding="utf-8")
        tree = {"names": ["x", "y"], "train": "images"} | data
        text = data.get("text") or yaml.safe_dump(tree)
        (work / "source/data.yaml").write_text(filled(text, work), encoding="utf-8")

    kind = "YOLO data.yaml" if data else "YOLO label"
    return imported(kind, tried, write, says, exit, slow)


def million(work: Path) -> None:
    """10^6 annotations of one image."""
    one = coco()
    one["annotations"] = [one["annotations"][0] | {"id": i + 1} for i in range(10**6)]
    coco_source(work, one)


def entities() -> str:
    """The billion laughs."""
    lines = ['<!ENTITY a0 "ha">']
    lines += [f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10)]
    return f"<!DOCTYPE annotation [{''.join(lines)}]>" + voc_object("&a9;")


def link_out(work: Path) -> None:
    """A COCO set whose image is a link to the secret."""
    coco_source(work, coco())
    (work / "source/a.png").unlink()
    (work / "source/a.png").symlink_to("../../secret.txt")


def nested_laughs() -> str:
    """A data.yaml whose class names are 10^12 aliases."""
    return laughs("[x]", TEN_ITEMS) + "\nnames: *a11\ntrain: images"


big = {"size": [10**6, 10**6], "counts": [10**12]}
turns = [v for i in range(10**6) for v in (i % 41, i % 33)]

CASES = [
    of_coco("an image ../../secret.txt", coco("../../secret.txt"), "outside the image folder"),
    of_coco("an image C:\\\\x\\\\..\\\\y", coco("C:\\x\\..\\y.png"), "outside the image folder"),
    of_coco("an image /etc/passwd", coco("/etc/passwd"), "outside the image folder"),
    of_coco("NUL in a name", coco("a\0.png"), "not a valid name of an image"),
    imported("COCO JSON", "an image that is a link to a secret text", link_out, "decoded"),
    of_coco("escape sequences in a name", coco(f"{ESCAPE}.png", (50, 50, 1, 1)),
            "outside|width|image", images=(f"{ESCAPE}.png",)),
    of_coco("escape sequences in a class",
            coco() | {"categories": [{"id": 1, "name": ESCAPE}]}, r"x1b\]0.* control"),
    of_coco("console markup in names", coco("[link=x]a[/].png", (50, 50, 1, 1))
            | {"categories": [{"id": 1, "name": "[/] [link=http://x]"}]},
            "outside", images=("[link=x]a[/].png",)),
    of_coco("a box of NaN", coco(box=(float("nan"), 1, 2, 3)), "not finite"),
    of_coco("a box of Infinity", coco(box=(1, 1, float("inf"), 3)), "not finite"),
    of_coco("a box of 1e308", coco(box=(1e308, 1e308, 1e308, 1e308)), "not finite"),
    of_coco("a box of 10^400", coco(box=(10**400, 1, 2, 3)), "not finite"),
    of_coco("ids true, \"1\" and 10^400",
            json.dumps(coco()).replace('"image_id": 1', f'"image_id": {10**400}'), "no image"),
    of_coco("a key that stands twice",
            '{"images": 3, ' + json.dumps(coco())[1:-1] + ', "images": []}', "no images"),
    of_coco("10^5 nested lists", DEEP, "not valid JSON"),
    of_coco("10^5 nested lists in a mask", json.dumps(coco(segmentation=0)).replace(
            '"segmentation": 0', '"segmentation": ' + "[" * 900 + "]" * 900), "segmentation"),
    of_coco("a mask said to be 10^6 x 10^6", coco(segmentation=big), "RLE of size"),
    of_coco("a mask with more pixels than its size",
            coco(segmentation={"size": [32, 40], "counts": [1, 10**15]}), "do not add up"),
    of_coco("a packed mask that lies",
            coco(segmentation={"size": [32, 40], "counts": "ooooooo0" * 9}), "do not add up"),
    of_coco("a polygon of 10^6 points", coco(segmentation=[turns]), "times the perimeter"),
    imported("COCO JSON", "10^6 annotations: taken", million, "1000000", 0, slow=True),
    voc("entities for 10^9 words", entities(), "refused: it declares XML entities"),
    voc("an entity that is a file", '<!DOCTYPE a [<!ENTITY x SYSTEM "file://{secret}">]>'
        + voc_object("&x;"), "refused: it declares XML entities"),
    voc("a DTD at a web address", '<!DOCTYPE a SYSTEM "{address}/x.dtd">' + voc_object("&x;"),
        "a.xml"),
    voc("a parameter entity at a web address",
        '<!DOCTYPE a [<!ENTITY % x SYSTEM "{address}/x.dtd"> %x;]>' + voc_object(),
        "refused: it declares XML entities"),
    voc("10^5 nested elements", "<a>" * 10**5 + "</a>" * 10**5, "a"),
    voc("an image ../../../secret.txt: not looked at, the image is found by its own name",
        voc_object(extra="<filename>../../../secret.txt</filename>"), "train", 0),
    voc("escape sequences in a file's name", "<a", "not valid XML", stem=ESCAPE),
    voc("a line end in a file's name", "<a", "not valid XML", stem="a\nerror: all is well"),
    voc("an escape code in a class", voc_object("&#27;[2J"), "not valid XML"),
    voc("a corner of 1e999", voc_object(box=(1, 1, "1e999", 9)), "not finite"),
    yolo("class 10^12", "unknown category", f"{10**12} .5 .5 .5 .5"),
    yolo("class 1e300", "unknown category", "1e300 .5 .5 .5 .5"),
    yolo("nan", "nan|finite", "0 nan .5 .5 .5"),
    yolo("10^6 lines: taken", "500000", "0 .5 .5 .5 .5\n" * 500_000, exit=0, slow=True),
    yolo("!!python/object/apply", "not valid YAML",
         text="names: !!python/object/apply:os.system ['touch {canary}']\ntrain: images"),
    yolo("aliases to 10^12 class names", "class names", text=nested_laughs()),
    yolo("train: ../../images: read within the folder", "train", exit=0, train="../../images"),
    yolo("train: /etc", "does not exist in the folder", train="/etc"),
    yolo("path: ../..: ignored", "train", exit=0, path="../.."),
]  # fmt: skip


@each(CASES)
def test_it_is_refused_or_harmless(case, tmp_path):
    assert faults(case, tmp_path) == []
