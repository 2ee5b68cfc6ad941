"""The analysis of a run: its files, and that it leaves the detector alone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ghm_d2.analysis.analyse import analyse, measure_gradients
from ghm_d2.analysis.loss_inputs import capture, read_batches, training_copy, training_items
from ghm_d2.inference.evaluation.evaluate import evaluate
from ghm_d2.progress import Progress
from ghm_d2.run_folder import ANALYSIS_FILE, WORST_FILE

RETINANET = ("retinanet_ghm",)
FASTER_RCNN = ("faster_rcnn_ghm_r", "MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE", "ghm_c")
DSSD = ("dssd_ghm",)


@pytest.fixture(params=[RETINANET, FASTER_RCNN, DSSD], ids=["retinanet", "faster_rcnn", "dssd"])
def noisy(request, detector, noisy_folder):
    name, *words = request.param
    return detector(name, noisy_folder, *words)


def numbers(value):
    """Return all numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for part in value for n in numbers(part)]
    return [] if isinstance(value, str) else [value]


def test_the_files_hold_what_the_report_reads(noisy, tmp_path):
    cfg, model = noisy
    analyse(cfg, model, tmp_path, Progress())
    assert sorted(p.name for p in tmp_path.iterdir()) == [ANALYSIS_FILE, WORST_FILE]
    found = json.loads((tmp_path / ANALYSIS_FILE).read_text())
    assert all(n is None or np.isfinite(n) for n in numbers(found))

    norms = found["gradient_norms"]
    assert norms["images"] == 7
    assert norms["reg"]["mu"] == 0.02
    for kind in ("cls", "reg"):
        assert len(norms[kind]["edges"]) == len(norms[kind]["counts"]) + 1 == 101
        assert sum(norms[kind]["counts"]) > 0
    curves = found["effective_gradient"]
    assert list(curves["cls"]) == ["g", "CE", "focal", "GHM-C", "GHM-C robust"]
    assert curves["reg"].pop("mu") == cfg.MODEL.GHM.REG.MU
    assert curves["reg"].pop("mu_robust") > 0
    assert list(curves["reg"]) == ["d", "SL1", "ASL1", "GHM-R", "GHM-R robust"]
    for kind, regions in (("cls", cfg.MODEL.GHM.CLS.BINS), ("reg", 10)):
        shares = found["gradient_share"][kind]
        assert len(shares.pop("edges")) == regions + 1
        assert shares.keys() == curves[kind].keys() - {"g", "d"}
        assert [sum(s) for s in shares.values()] == pytest.approx([1] * len(shares), abs=1e-4)
    assert {len(c) for c in curves["cls"].values()} == {100}
    assert {len(c) for c in curves["reg"].values()} == {201}
    assert len(found["precision_recall"]["recall"]) == 101
    assert {len(c) for c in found["precision_recall"]["precision"].values()} == {101}
    assert list(found["precision_recall"]["precision"]) == ["0.5", "0.75"]

    confusion = found["confusion"]
    assert confusion["labels"] == [*"0123456789", "background"]
    assert np.array(confusion["matrix"]).shape == (11, 11)
    assert confusion["iou"] == 0.5 and 0 < confusion["score"] < 1
    worst = found["worst"]
    assert sorted(w["file_name"] for w in worst) == [f"val/00000{i}.png" for i in range(3)]
    errors = [w["missed"] + w["false"] for w in worst]
    assert errors == sorted(errors, reverse=True)
    with open(f"{cfg.DATASETS.TEST[0]}") as file:
        boxes = len(json.load(file)["annotations"])
    assert np.array(confusion["matrix"])[:-1].sum() == boxes
    with Image.open(tmp_path / WORST_FILE) as picture:
        assert picture.format == "JPEG"
        assert picture.width > picture.height / 2
    assert (tmp_path / WORST_FILE).stat().st_size < 250_000

    noise = found["noise"]
    with open(f"{cfg.DATASETS.TRAIN[0]}") as file:
        kinds = [a["noise"] for a in json.load(file)["annotations"]]
    assert {k: n["boxes"] for k, n in noise.items()} == {
        k: kinds.count(k) for k in ("none", "class", "shift")
    }
    assert min(n["boxes"] for n in noise.values()) > 0
    assert all(n["weight"] > 0 and n["box_weight"] > 0 for n in noise.values())
    assert len({n["weight"] for n in noise.values()}) == 3


def test_the_detector_stays_as_it_was_and_the_numbers_are_the_same_again(noisy, tmp_path):
    cfg, model = noisy
    for name, buffer in model.named_buffers():
        if name.endswith("density.ema"):
            buffer.fill_(3.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert any(k.endswith("density.ema") for k in before)
    files = []
    for training in (False, True):
        model.train(training)
        modes = [m.training for m in model.modules()]
        torch.manual_seed(training)
        folder = tmp_path / str(training)
        folder.mkdir()
        analyse(cfg, model, folder, Progress())
        files.append([(folder / name).read_bytes() for name in (ANALYSIS_FILE, WORST_FILE)])
        assert [m.training for m in model.modules()] == modes
    assert files[0] == files[1]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert "losses" not in vars(model)


def test_a_histogram_is_of_all_images(detector, digits_folder):
    cfg, model = detector("retinanet_focal", digits_folder)
    found = measure_gradients(cfg, model, Progress())
    copy, norms = training_copy(model), []
    for batch in read_batches(cfg, training_items(cfg, 6)):
        norms += capture(copy, batch).norms().tolist()
    expected, _ = np.histogram(np.float32(norms) * np.float32(100), bins=np.arange(101))
    assert found["gradient_norms"]["cls"]["counts"] == expected.tolist()


def test_box_norms_of_all_detectors_are_in_one_unit(noisy):
    cfg, model = noisy
    found = measure_gradients(cfg, model, Progress())
    copy, errors = training_copy(model), []
    for batch in read_batches(cfg, training_items(cfg, 7)):
        errors += capture(copy, batch).errors.tolist()
    retinanet = cfg.MODEL.META_ARCHITECTURE == "GHMRetinaNet"
    weights = [1, 1, 1, 1] if retinanet else [10, 10, 5, 5]
    d = np.array(errors) / weights
    expected, _ = np.histogram(np.abs(d) / np.hypot(d, 0.02), bins=100, range=(0, 1))
    counts = np.array(found["gradient_norms"]["reg"]["counts"])
    assert counts.sum() == expected.sum()
    # float32 puts a norm on an edge into one bin or the other
    assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 2


def test_noise_is_left_out_where_annotations_do_not_tell(detector, digits_folder, monkeypatch):
    cfg, model = detector("retinanet_focal", digits_folder)
    assert "noise" not in measure_gradients(cfg, model, Progress())  # none is spoilt
    items = training_items(cfg, 6)
    for item in items:
        for annotation in item["annotations"]:
            annotation["noise"] = "who knows"  # as somebody else's JSON may have it
    monkeypatch.setattr("ghm_d2.analysis.analyse.training_items", lambda *_: items)
    found = measure_gradients(cfg, model, Progress())
    assert list(found) == ["gradient_norms", "effective_gradient", "gradient_share"]


def test_an_evaluation_at_hand_is_not_run_again(detector, digits_folder, tmp_path, monkeypatch):
    cfg, model = detector("retinanet_focal", digits_folder)
    evaluation = evaluate(model, cfg, cfg.DATASETS.TEST[0], Progress())
    monkeypatch.setattr("ghm_d2.analysis.analyse.evaluate", None)
    analyse(cfg, model, tmp_path, Progress(), evaluation)
    curve = json.loads((tmp_path / ANALYSIS_FILE).read_text())["precision_recall"]
    ap50 = 100 * np.mean(curve["precision"]["0.5"])
    assert ap50 == pytest.approx(evaluation.metrics["AP50"], abs=1e-3)
    size = (tmp_path / WORST_FILE).stat().st_size
    monkeypatch.setattr("ghm_d2.analysis.analyse._SHEET_BYTES", size - 1)
    analyse(cfg, model, tmp_path, Progress(), evaluation)
    assert (tmp_path / WORST_FILE).stat().st_size < size, "the picture is made to fit"


def test_a_mask_rcnn_is_analysed_by_its_boxes(detector, noisy_folder, tmp_path):
    words = ["MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"]
    cfg, model = detector("mask_rcnn_ghm_r", noisy_folder, *words)
    evaluation = evaluate(model, cfg, cfg.DATASETS.TEST[0], Progress())
    assert evaluation.mask_metrics.keys() == evaluation.metrics.keys()
    analyse(cfg, model, tmp_path, Progress(), evaluation)
    found = json.loads((tmp_path / ANALYSIS_FILE).read_text())
    assert {"gradient_norms", "noise", "precision_recall", "confusion", "worst"} <= found.keys()
    boxes_alone, faster = detector("faster_rcnn_ghm_r", noisy_folder, *words)
    faster.load_state_dict(model.state_dict(), strict=False)
    assert measure_gradients(boxes_alone, faster, Progress())["noise"] == found["noise"]


class Blind(torch.nn.Module):
    """A detector of another kind, which finds nothing."""

    def forward(self, batch):
        from detectron2.structures import Boxes, Instances

        (item,) = batch
        found = Instances((item["height"], item["width"]))
        found.pred_boxes = Boxes(torch.zeros(0, 4))
        found.scores, found.pred_classes = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        return [{"instances": found}]


def test_another_detector_has_its_errors_alone(detector, digits_folder, tmp_path):
    cfg, _ = detector("retinanet_focal", digits_folder)
    analyse(cfg, Blind(), tmp_path, Progress())
    found = json.loads((tmp_path / ANALYSIS_FILE).read_text())
    assert list(found) == ["precision_recall", "image_bootstrap", "confusion", "worst"]
    matrix = np.array(found["confusion"]["matrix"])
    assert matrix[:, -1].sum() == matrix.sum() > 0
    assert found["confusion"]["score"] == 1.0
