"""COCO as it is: a small folder of its exact layout, and what is started on it by its names."""

import json
import os
import re
from pathlib import Path

import pytest
from coco_folder import registered_at
from pycocotools.coco import COCO

# of any recipe, for images of 64 px and two steps, with detections although nothing is learnt
SMALL = {
    "SOLVER.MAX_ITER": 2,
    "SOLVER.IMS_PER_BATCH": 2,
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.NORM": "BN",  # a ResNet of random weights explodes without it
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    "MODEL.FCOS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.SSD.SCORE_THRESH_TEST": 0.0,
    "MODEL.YOLOV3.SCORE_THRESH_TEST": 0.0,
}
TINY = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
TINY |= {"MODEL.FPN.OUT_CHANNELS": 32}
SETS = ("coco_2017_test-dev", "coco_2017_val", "coco_2017_train")
RECIPES = sorted(
    file.stem
    for file in (Path(__file__).parents[2] / "configs" / "coco").glob("*.yaml")
    if not file.stem.startswith("Base")
)
DEV_IMAGES = {16, 57}


def start(ghm, recipe: str, output: Path, **overrides):
    options = ("--device", "cpu", "--seed", 1, "--no-analyse", "--output", output)
    words = [word for pair in (SMALL | overrides).items() for word in pair]
    return ghm("train", "--config", f"coco/{recipe}.yaml", *options, *words)


def rows_of(files: list, coco_root: Path) -> list[dict]:
    """The rows of results files, which pycocotools takes for test-dev's with COCO's own ids."""
    dev = COCO(str(coco_root / "coco/annotations/image_info_test-dev2017.json"))
    rows = []
    for file in files:
        found = dev.loadRes(str(file))
        rows += list(found.anns.values())
    assert {row["category_id"] for row in rows} <= set(dev.getCatIds())
    assert {row["image_id"] for row in rows} == DEV_IMAGES
    return rows


@pytest.fixture(scope="module")
def run_folder(ghm, coco_root, tmp_path_factory) -> Path:
    """A recipe's run that is evaluated on several sets, one of them without annotations."""
    folder = tmp_path_factory.mktemp("runs") / "retinanet_ghm"
    with registered_at(coco_root):
        words = TINY | {"DATASETS.TEST": SETS}
        done = start(ghm, "retinanet_R_50_FPN_ghm_1x", folder, **words)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_a_recipe_trains_on_coco_and_is_evaluated_on_each_set(run_folder, coco_root):
    run = json.loads((run_folder / "run.json").read_text())
    assert (run["dataset"], run["evaluated_on"]) == ("coco_2017", "coco_2017_val")
    assert len(run["per_class"]) == 80 and run["metrics"]["AP"] >= 0
    (train,) = run["other_sets"]
    assert train["dataset"] == "coco_2017_train" and train["metrics"]["AP"] >= 0
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    (evaluated,) = [row for row in rows if "bbox/AP" in row]
    assert evaluated["bbox/AP"] == evaluated["coco_2017_val/bbox/AP"] == run["metrics"]["AP"]
    assert evaluated["coco_2017_train/bbox/AP"] == train["metrics"]["AP"]
    stdout = (run_folder / "stdout.txt").read_text()
    assert "coco_2017_val" in stdout and "coco_2017_train" in stdout
    assert "test-dev" not in stdout
    rows_of([run_folder / "detections_test-dev2017_retinanet-ghm_results.json"], coco_root)


def test_a_report_has_the_figures_of_each_set(ghm, run_folder, tmp_path):
    done = ghm("report", run_folder.parent, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "On coco_2017_train:" in (tmp_path / "report.md").read_text()
    assert "coco_2017_train AP50" in (tmp_path / "runs.csv").read_text()
    assert "coco_2017_train" in ghm("report", run_folder.parent, "--markdown").stdout


def test_eval_on_test_dev_writes_what_the_server_takes(ghm, run_folder, coco_names, tmp_path):
    words = ("--weights", run_folder / "model_final.pth", "--dataset", "coco_2017_test-dev")
    done = ghm("eval", *words, "--device", "cpu", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "detections_test-dev2017_retinanet-ghm_results.json"
    said = " ".join(done.stdout.split())
    assert "no annotations, so it gets no AP" in said and file.name in said and ".zip" in said
    assert not re.search(r"AP50|AP_S", said)
    rows = rows_of([file], coco_names)
    assert {"image_id", "category_id", "bbox", "score"} <= rows[0].keys()
    done = ghm("eval", *words, "--device", "cpu", "--json")  # beside the weights
    found = json.loads(done.stdout)
    assert found["metrics"] == {} and found["results_files"] == [str(run_folder / file.name)]
    assert (run_folder / file.name).read_bytes() == file.read_bytes()


def test_eval_on_several_sets(ghm, run_folder, coco_names, tmp_path):
    words = ("--weights", run_folder / "model_final.pth", "--output", tmp_path / "e")
    done = ghm("eval", *words, "--device", "cpu", "DATASETS.TEST", SETS)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "e" / "eval.json").read_text())
    run = json.loads((run_folder / "run.json").read_text())
    assert found["metrics"].keys() == run["metrics"].keys()  # AP of random weights jumps
    ((train,), (expected,)) = found["other_sets"], run["other_sets"]
    assert train["dataset"] == expected["dataset"] and train["metrics"]["AP"] >= 0
    assert train["per_class"].keys() == expected["per_class"].keys()
    assert "coco_2017_train" in done.stdout and "test-dev2017" in done.stdout
    for folder, image in (("", 139), ("coco_2017_train/", 200365)):
        detections = json.loads((tmp_path / "e" / folder / "detections.json").read_text())
        assert image in {d["image_id"] for d in detections}
    assert list((tmp_path / "e").glob("detections_test-dev2017_*_results.json"))


@pytest.mark.slow
def test_two_processes_evaluate_as_one(ghm_process, run_folder, coco_root, tmp_path):
    environment = os.environ | {"DETECTRON2_DATASETS": str(coco_root)}
    found = {}
    for number in (1, 2):
        words = ("--weights", run_folder / "model_final.pth", "--output", tmp_path / str(number))
        group = ("--num-gpus", number, "--device", "cpu")
        done = ghm_process("eval", *words, *group, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("no annotations, so it gets no AP") == 1
        found[number] = {
            name: json.loads((tmp_path / str(number) / f"{name}.json").read_text())
            for name in ("eval", "detections", "coco_2017_train/detections")
        }
    one, two = found[1], found[2]
    assert two["eval"]["metrics"] == pytest.approx(one["eval"]["metrics"], abs=1e-6)
    for name in ("detections", "coco_2017_train/detections"):
        assert len(one[name]) == len(two[name]) > 0
        for a, b in zip(one[name], two[name], strict=True):
            assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
            assert [*a["bbox"], a["score"]] == pytest.approx([*b["bbox"], b["score"]], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_starts_on_coco_and_ends_with_results_for_the_server(
    ghm, coco_names, recipe, tmp_path
):
    done = start(ghm, recipe, tmp_path / recipe)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / recipe / "run.json").read_text())
    assert run["status"] == "finished" and len(run["per_class"]) == 80
    words = ("--weights", tmp_path / recipe / "model_final.pth", "--device", "cpu", "--json")
    done = ghm("eval", *words, "--dataset", "coco_2017_test-dev")
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout)["results_files"]
    assert len(files) == (2 if recipe.startswith("mask_rcnn") else 1)
    rows_of(files, coco_names)
