"""tools/detectron2_wheel.py, and the Detectron2 installed here. Nothing uses the network."""

import importlib
import importlib.metadata
import importlib.util
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "detectron2_wheel.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("detectron2_wheel", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ours(tool):
    """Skip where someone's own Detectron2 is installed: that one need not behave as ours does."""
    if installed_version() != tool.VERSION:
        pytest.skip(f"the Detectron2 here is {installed_version()}, not the tool's {tool.VERSION}")


def installed_version() -> str | None:
    try:
        return importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:  # built in place, or on PYTHONPATH
        return None


@pytest.fixture
def visualizer(tool):
    """Detectron2's visualizer, which imports without OpenCV in our wheel only."""
    if installed_version() != tool.VERSION:
        pytest.importorskip("cv2", reason="your own Detectron2's visualizer needs OpenCV")
    return importlib.import_module("detectron2.utils.visualizer")


# --- the mends


def test_every_mend_changes_something_and_says_why(tool):
    for mend in tool.MENDS:
        assert mend.old not in ("", mend.new)
        assert len(mend.reason) > 10
        assert mend.count >= 1


def write(tree: Path, path: str, text: str) -> Path:
    file = tree / "detectron2" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_mend_replaces_every_occurrence(tool, tmp_path):
    file = write(tmp_path, "a.py", "np.int, np.int")
    tool.mend(tmp_path, [tool.Mend("a.py", "np.int", "int", "NumPy 1.24", 2)])
    assert file.read_text() == "int, int"


@pytest.mark.parametrize("text", ["np.int", "np.int, np.int, np.int", "int"])
def test_mend_that_does_not_match_is_an_error_that_names_it(tool, tmp_path, text):
    file = write(tmp_path, "a.py", text)
    with pytest.raises(tool.BuildError, match=r"mend 1 .*detectron2/a\.py.*'np\.int'.*NumPy 1\.24"):
        tool.mend(tmp_path, [tool.Mend("a.py", "np.int", "int", "NumPy 1.24", 2)])
    assert file.read_text() == text


def test_mend_of_a_missing_file_is_an_error(tool, tmp_path):
    with pytest.raises(tool.BuildError, match=r"detectron2/gone\.py"):
        tool.mend(tmp_path, [tool.Mend("gone.py", "x", "y", "some reason")])


def test_all_mends_apply_to_a_tree_that_holds_their_texts(tool, tmp_path):
    texts = {}
    for mend in tool.MENDS:
        texts[mend.path] = texts.get(mend.path, "") + f"{mend.old}\n" * mend.count
    for path, text in texts.items():
        write(tmp_path, path, text)
    tool.mend(tmp_path)


# --- unpacking, building, and when not to


def test_unpack_gives_the_folder_inside(tool, tmp_path):
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("pkg-1/setup.py")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"#\n"))
    assert (tool.unpack(archive, tmp_path) / "setup.py").read_text() == "#\n"


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python has no tar filters")
def test_unpack_refuses_a_member_outside_its_folder(tool, tmp_path):
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../escaped"))
    with pytest.raises(tarfile.FilterError):
        tool.unpack(archive, tmp_path / "inside")
    assert not (tmp_path / "escaped").exists()


def test_build_without_torch_says_what_to_install(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tool.BuildError, match=r"torch is needed first: .* -m pip install torch"):
        tool.download(tmp_path)


def test_pip_failure_carries_its_words_and_a_remedy(tool, tmp_path):
    with pytest.raises(tool.BuildError, match=r"pip install failed; check it.*\n.*nowhere"):
        tool.pip("install", "--no-index", str(tmp_path / "nowhere.whl"), remedy="check it")


@pytest.mark.parametrize(
    ("version", "outdated"), [("0.6", False), ("0.6+ghm.0", True), (None, False), ("0.7", False)]
)
def test_only_an_earlier_wheel_of_ours_is_outdated(tool, monkeypatch, version, outdated):
    def lookup(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(tool.importlib.metadata, "version", lookup)
    assert tool.is_outdated() is outdated
    monkeypatch.setattr(tool.importlib.metadata, "version", lambda name: tool.VERSION)
    assert not tool.is_outdated()


def test_an_importable_detectron2_is_left_alone(tmp_path):
    """Any that imports will do, so a stand-in on the path must stop the tool before it fetches."""
    write(tmp_path, "__init__.py", "__version__ = '9.9'\n")
    done = subprocess.run(
        [sys.executable, TOOL],
        env={"PYTHONPATH": str(tmp_path), "PIP_NO_INDEX": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "9.9" in done.stdout and "left as it is" in done.stdout


def test_a_detectron2_that_does_not_import_is_reported_not_replaced(tmp_path):
    write(tmp_path, "__init__.py", "raise ImportError('undefined symbol: x')\n")
    done = subprocess.run(
        [sys.executable, TOOL],
        env={"PYTHONPATH": str(tmp_path), "PIP_NO_INDEX": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "undefined symbol" in done.stderr and "pip uninstall detectron2" in done.stderr


# --- what is installed


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint",
        "config",
        "data",
        "engine",
        "evaluation",
        "layers",
        "model_zoo",
        "modeling",
        "solver",
        "structures",
        "utils.analysis",
        "utils.collect_env",
        "utils.events",
    ],
)
def test_package_imports(name):
    importlib.import_module(f"detectron2.{name}")


@pytest.mark.parametrize("name", ["deeplab", "point_rend"])
def test_projects_import(ours, name):
    importlib.import_module(f"detectron2.projects.{name}")


@pytest.mark.parametrize(
    "path", ["COCO-Detection/retinanet_R_50_FPN_1x.yaml", "common/models/retinanet.py"]
)
def test_model_zoo_configs_are_there(path):
    from detectron2.model_zoo import get_config_file

    assert Path(get_config_file(path)).is_file()


def test_visualizer_draws_boxes_and_its_colours_stay_in_range(visualizer):
    """Matplotlib refuses 1.0000000000000002, which Python 3.10 makes of bright colours."""
    drawn = visualizer.Visualizer(np.zeros((20, 20, 3), np.uint8))
    assert drawn.draw_box((2, 2, 10, 10), edge_color=(1.0, 0.9, 0.1)).get_image().any()
    for green, blue in np.random.default_rng(0).random((300, 2)):
        changed = drawn._change_color_brightness((1.0, green, blue), brightness_factor=0.7)
        assert all(0 <= channel <= 1 for channel in changed)


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("box_iou_rotated", lambda: rotated_boxes().pairwise_iou_rotated(*torch.ones(2, 1, 5))),
        ("nms_rotated", lambda: layers().nms_rotated(torch.ones(1, 5), torch.ones(1), 0.5)),
        (
            "roi_align_rotated_forward",
            lambda: layers().ROIAlignRotated((2, 2), 1.0, 0)(
                torch.ones(1, 1, 4, 4), torch.ones(1, 6)
            ),
        ),
    ],
)
def test_a_missing_op_is_named_with_the_way_to_get_it(ours, op, call):
    with pytest.raises(
        ImportError, match=rf"compiled op '{op}'.*build it from source.*pip install"
    ):
        call()


def layers():
    return importlib.import_module("detectron2.layers")


def rotated_boxes():
    return importlib.import_module("detectron2.layers.rotated_boxes")


def test_missing_opencv_is_named_where_it_is_used(ours, visualizer, monkeypatch):
    missing = importlib.import_module("detectron2._missing")
    stand_in = missing._Missing("OpenCV's", "Get it with: pip install opencv-python-headless")
    monkeypatch.setattr(visualizer, "cv2", stand_in)
    mask = visualizer.GenericMask(np.ones((4, 4), np.uint8), 4, 4)
    with pytest.raises(ImportError, match=r"'findContours'.*pip install opencv-python-headless"):
        _ = mask.polygons


def test_there_is_no_stub_of_the_extension(ours):
    """Code that asks whether detectron2._C exists gets a true answer."""
    assert importlib.util.find_spec("detectron2._C") is None
    from detectron2.utils.collect_env import collect_env_info

    assert "not built correctly" in collect_env_info()


def test_coco_evaluation_falls_back_to_pycocotools(tmp_path):
    """Detectron2's default evaluator, with its fast implementation asked for and not there."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, BoxMode, Instances

    name = "wheel_test"
    box = {"bbox": [10, 10, 40, 50], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": "a.png", "image_id": 1, "height": 64, "width": 64, "annotations": [box]}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=["thing"])
    try:
        evaluator = COCOEvaluator(name, ("bbox",), False, str(tmp_path), use_fast_impl=True)
        evaluator.reset()
        found = Instances((64, 64), pred_boxes=Boxes(torch.tensor([[10.0, 10, 40, 50]])))
        found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
        evaluator.process([record], [{"instances": found}])
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    "config",
    [
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    ],
)
def test_detectors_train_and_predict_without_compiled_ops(config):
    from detectron2 import model_zoo
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances, PolygonMasks
    from detectron2.utils.events import EventStorage

    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(config))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    model = build_model(cfg)
    truth = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40]])))
    truth.gt_classes = torch.tensor([3])
    truth.gt_masks = PolygonMasks([[np.array([8.0, 8, 40, 8, 40, 40])]])
    image = {"image": torch.zeros(3, 64, 64, dtype=torch.uint8), "instances": truth}
    with EventStorage():
        losses = model([image])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    with torch.no_grad():
        (prediction,) = model.eval()([image])
    assert "instances" in prediction
