"""ghm configs."""

import json

from ghm_d2.config import list_configs


def test_every_configuration_with_what_it_is(ghm):
    rows = {row["config"]: row for row in json.loads(ghm("configs", "--json").stdout)}
    assert list(rows) == [f"configs/{name}" for name in list_configs()]
    yolo = rows["configs/coco/yolov3_darknet53.yaml"]
    assert (yolo["method"], yolo["network"]) == ("YOLOv3 CE + L2", "DarkNet-53")
    assert yolo["parameters"] == 61_949_149
    assert yolo["published"] == [{"AP": 33.0, "source": "paper, test-dev"}]
    faster = rows["configs/coco/faster_rcnn_R_50_FPN_1x.yaml"]
    assert [p["AP"] for p in faster["published"]] == [36.4]
    (zoo,) = faster["published_otherwise"]
    assert zoo["AP"] == 37.9 and zoo["schedule"]["iterations"] == 90_000
    # 65.9 BFLOPs of 416 x 416 px, a multiply-add being two; 640 x 480 becomes 608 x 480 here
    assert abs(2 * yolo["gflops"] * 416**2 / (608 * 480) - 65.9) < 0.5
    quick = rows["configs/quick/yolov3_ghm.yaml"]
    assert quick["published"] == [] and quick["parameters"] < 10_000_000


def test_a_person_sees_all_of_it_in_80_columns(ghm):
    shown = ghm("configs")
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    # the cells fold, at a space too
    cells = [line.split("\u2502")[1] for line in lines if line.startswith("\u2502")]
    text = "".join("".join(cells).split())
    assert "coco/dssd513_R_101_ghm.yaml" in text and "DSSDGHM-C+GHM-R,ResNet-101" in text
