"""ghm export as a user runs it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import typer

from ghm_d2.cli.export import export


@pytest.fixture(scope="module")
def weights(digits_folder, tiny, tmp_path_factory) -> Path:
    """Weights whose predictions differ as a trained one's do, beside their configuration."""
    from detectron2.modeling import build_model

    from ghm_d2.config import config_text, load_config
    from ghm_d2.data.catalog import apply_to_config
    from ghm_d2.register import register_all

    register_all()
    cfg = load_config("quick/retinanet_ghm.yaml", [*tiny, "MODEL.DEVICE", "cpu"])
    apply_to_config(cfg, digits_folder)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    model = build_model(cfg)
    for name, parameter in model.head.named_parameters():
        if "cls_score" in name or "bbox_pred" in name:
            parameter.data.normal_(0, 0.3 if parameter.dim() > 1 else 0.5)
    torch.save({"model": model.state_dict()}, folder / "model_best.pth")
    (folder / "config.yaml").write_text(config_text(cfg))
    return folder / "model_best.pth"


def run(weights: Path, **options) -> int:
    """Run the command in this process, and return its exit code."""
    try:
        export(weights, **options)
    except typer.Exit as stop:
        return stop.exit_code
    return 0


def test_onnx_beside_the_weights(ghm, weights):
    done = ghm("export", "--weights", weights, "--check", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert "exporting" in done.stderr
    told = json.loads(done.stdout)
    file = Path(told["file"])
    assert file == weights.with_suffix(".onnx") and file.stat().st_size == told["bytes"]
    assert told["format"] == "onnx" and told["input"]["name"] == "image"
    assert [x["name"] for x in told["outputs"]] == ["boxes", "scores", "classes"]
    assert told["check"]["images"] == 2 and told["check"]["source"].endswith("val.json")
    assert told["check"]["agrees"] and told["check"]["px"] < 1e-3
    assert told["check"]["detections"] >= told["check"]["compared"] > 10
    assert {f.name for f in file.parent.iterdir()} == {
        "config.yaml",
        "model_best.onnx",
        "model_best.pth",
    }


def test_a_batch_in_float16(weights, tmp_path, capfd):
    options = {"output": tmp_path / "x.onnx", "batch": True, "half": True, "as_json": True}
    assert run(weights, **options) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["input"]["shape"] == ["batch", 3, "height", "width"]
    assert [x["name"] for x in told["outputs"]][3:] == ["num_detections"]
    assert told["precision"] == "float16" and told["check"]["tolerance"]["score"] == 0.01
    assert told["check"]["images"] == 3 and told["check"]["agrees"]
    assert told["check"]["score"] > 1e-6  # float32 would be nearer


def test_torchscript_with_overrides_from_elsewhere(weights, tmp_path, capfd):
    alone = shutil.copy(weights, tmp_path / "alone.pth")
    assert run(Path(alone), form="torchscript") == 2  # no configuration
    assert "--config" in capfd.readouterr().err
    options = {"form": "torchscript", "output": tmp_path / "x.pt", "check": 1}
    options |= {"config": str(weights.parent / "config.yaml")}
    keys = ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.99"]
    assert run(Path(alone), overrides=keys, **options) == 0
    printed = capfd.readouterr()
    assert "difference" not in printed.out
    assert "nothing was detected, so the file could not be compared" in printed.err
    assert "lower the score threshold (MODEL.RETINANET.SCORE_THRESH_TEST VALUE)" in printed.err
    assert torch.jit.load(tmp_path / "x.pt")(torch.zeros(3, 40, 50))[0].shape == (0, 4)


def test_a_model_of_the_zoo_is_exported_over_its_last_export(weights, tmp_path, monkeypatch):
    """Its name is no file that the output could be."""
    from ghm_d2.inference import load

    known = load.load_detector
    monkeypatch.setattr(load, "load_detector", lambda cfg, _: known(cfg, weights))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.pt").touch()
    options = {"form": "torchscript", "config": str(weights.parent / "config.yaml"), "check": 0}
    assert run(Path("zoo:COCO-Detection/tiny"), **options) == 0
    assert (tmp_path / "tiny.pt").stat().st_size > 1000


def test_what_was_not_compared_does_not_agree(weights, tmp_path, capfd):
    keys = ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.99"]
    options = {"form": "torchscript", "output": tmp_path / "x.pt", "as_json": True}
    assert run(weights, overrides=keys, **options) == 0
    check = json.loads(capfd.readouterr().out)["check"]
    assert check["agrees"] is None and check["detections"] == check["compared"] == 0


def test_weights_of_a_run_whose_kernel_is_not_here(weights, tmp_path):
    """Triton's is for GPUs, and to detect no loss is computed."""
    from ghm_d2.config import load_config
    from ghm_d2.inference.load import load_detector

    keys = ["MODEL.GHM.KERNEL", "triton"]
    options = {"form": "torchscript", "output": tmp_path / "x.pt", "check": 0}
    assert run(weights, overrides=keys, **options) == 0
    cfg = load_config(str(weights.parent / "config.yaml"), keys)
    assert load_detector(cfg, weights).training is False
    assert cfg.MODEL.GHM.KERNEL == "triton"


def test_without_onnxruntime_it_writes_and_says_so(weights, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run(weights, output=tmp_path / "x.onnx") == 0
    said = capfd.readouterr()
    assert "onnxruntime is not installed" in said.err and "ghm_d2[export]" in said.err
    assert "difference" not in said.out
    assert (tmp_path / "x.onnx").stat().st_size > 1000


def test_a_file_that_differs_ends_with_1(weights, tmp_path, capfd, monkeypatch):
    from ghm_d2.inference.exporting import verify as exported

    nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    monkeypatch.setattr(exported, "load_exported", lambda *_: lambda image: nothing)
    assert run(weights, form="torchscript", output=tmp_path / "x.pt", as_json=True) == 1
    said = capfd.readouterr()
    assert "differ" in said.err
    check = json.loads(said.out)["check"]
    assert not check["agrees"] and check["px"] is None


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"form": "tflite"}, 2, "onnx, torchscript"),
        ({"form": "torchscript", "half": True}, 2, "--half needs --format onnx"),
        ({"output": Path("nowhere/x.onnx")}, 2, "nowhere"),
        ({"output": Path()}, 2, "is a folder"),
        ({"config": "configs/quick/faster_rcnn_ghm_r.yaml"}, 3, "belongs to another model"),
        ({"overrides": ["MODEL.NO", "1"]}, 2, "unknown key"),
        ({"overrides": ["MODEL.DEVICE", "cuda"]}, 2, "leave out MODEL.DEVICE"),
        ({"overrides": ["OUTPUT_DIR", "x"]}, 2, "set OUTPUT_DIR with the option --output"),
    ],
)
def test_what_cannot_be_done(weights, tmp_path, capfd, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    assert run(weights, **options) == code
    assert message in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_weights_are_there_and_stay(weights, capfd):
    assert run(weights.with_name("none.pth")) == 3
    before = weights.read_bytes()
    assert run(weights, output=weights) == 2
    assert "weights" in capfd.readouterr().err and weights.read_bytes() == before
