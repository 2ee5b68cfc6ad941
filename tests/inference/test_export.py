"""An exported detector finds what the detector finds, without Detectron2 and this project."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ghm_d2.errors import UsageError
from ghm_d2.inference.exporting import export as export_module
from ghm_d2.inference.exporting import verify
from ghm_d2.inference.exporting.export import METADATA, describe, detections_of, export
from ghm_d2.inference.exporting.verify import check_images, compare, load_exported, noise
from ghm_d2.progress import Progress

SIZES = [(64, 80), (80, 64), (96, 96), (65, 97), (127, 33), (31, 31), (150, 200), (1, 9), (224, 64)]
LOW = {  # thresholds that the predictions of random weights pass
    "retinanet_ghm": (),
    "fcos": ("MODEL.FCOS.SCORE_THRESH_TEST", "0.05"),
    "yolov3": ("MODEL.YOLOV3.SCORE_THRESH_TEST", "0.05"),
    "dssd": ("MODEL.SSD.SCORE_THRESH_TEST", "0.05", "MODEL.SSD.TOPK_CANDIDATES_TEST", "50"),
    "faster_rcnn_ghm_r": (),
    "mask_rcnn": (),
}


@pytest.fixture(scope="session")
def pictures(digits_folder) -> list[torch.Tensor]:
    """Digits, of ten sizes: multiples of 32 and not, smaller and larger than the example."""
    files = sorted(Path(digits_folder).rglob("*.png"))
    as_it_is = pil_to_tensor(Image.open(files[0]).convert("RGB"))
    resized = [
        pil_to_tensor(Image.open(files[i % len(files)]).convert("RGB").resize((w, h)))
        for i, (h, w) in enumerate(SIZES)
    ]
    return [image.float() for image in (as_it_is, *resized)]


@pytest.fixture
def built(detector, digits_folder):
    """(cfg, model) of a quick configuration, with predictions that differ as a trained one's do."""

    def build(name: str, *words: str):
        words = (*LOW[name], "MODEL.TIMM.FREEZE_BN", "False", *words)
        cfg, model = detector(name, digits_folder, *words)
        generator = torch.Generator().manual_seed(1)
        heads = getattr(model, "head", None) or torch.nn.ModuleList(
            [model.proposal_generator, model.roi_heads]
        )
        for key, parameter in heads.named_parameters():
            if key.endswith("bias"):  # no prior of the background
                parameter.data.zero_()
            elif parameter.dim() > 1:  # outputs of about the inputs' spread
                spread = parameter[0].numel() ** -0.5
                parameter.data.normal_(0, spread, generator=generator)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in norms:  # without their statistics what is left after many layers is ties
            norm.train().momentum = 1.0
        with torch.no_grad():
            model.backbone(torch.randn(2, 3, 256, 256, generator=generator))
        return cfg, model.eval()

    return build


def in_both_forms(*names: str) -> list:
    """Each detector in each form; TorchScript is slow but for RetinaNet, since ONNX is made from
    the same trace with more steps."""
    return [
        pytest.param(
            name,
            form,
            marks=[] if form == "onnx" or name == "retinanet_ghm" else [pytest.mark.slow],
        )
        for name in names
        for form in ("onnx", "torchscript")
    ]


@pytest.mark.parametrize(("name", "form"), in_both_forms(*LOW))
def test_the_file_finds_what_pytorch_finds(built, pictures, name, form):
    cfg, model = built(name)
    run = load_exported(export(model, cfg, form), form)
    agreement = compare(model, run, pictures, Progress())
    assert agreement.compared > len(pictures)
    assert agreement.px < 1e-3 and agreement.score < 1e-3, agreement
    boxes, scores, classes = run(pictures[0])[:3]
    assert boxes.shape == (len(scores), 4) and classes.dtype == torch.int64
    assert scores.shape == classes.shape and boxes.dtype == scores.dtype == torch.float32
    assert (scores.diff() <= 0).all()


@pytest.mark.parametrize(("name", "form"), in_both_forms("retinanet_ghm", "fcos", "yolov3", "dssd"))
def test_a_batch_has_the_detections_of_each_image(built, pictures, name, form):
    """Three images at once, then one; the trace saw two, of another size."""
    cfg, model = built(name)
    run = load_exported(export(model, cfg, form, batch=True), form)
    agreement = compare(model, run, pictures[:4], Progress(), batch=True)
    assert agreement.images == 4 and agreement.compared > 4
    assert agreement.px < 1e-3 and agreement.score < 1e-3, agreement


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_a_batch_is_padded_after_the_last_detection_of_each_image(built, form):
    cfg, model = built("retinanet_ghm", "TEST.DETECTIONS_PER_IMAGE", "20")
    images = [torch.zeros(3, 64, 80), noise(cfg, 1)[0]]
    best = [detections_of(model, image)[1].max().item() for image in images]
    model.test_score_thresh = sum(best) / 2  # one image is left without detections
    data = export(model, cfg, form, batch=True)
    boxes, scores, classes, counts = load_exported(data, form)(torch.stack(images))
    assert boxes.shape == (2, 20, 4) and scores.shape == classes.shape == (2, 20)
    assert counts.tolist() == [len(detections_of(model, image)[1]) for image in images]
    assert counts.dtype == classes.dtype == torch.int64 and counts.min() == 0 < counts.max()
    there = torch.arange(20) < counts[:, None]
    assert (scores[there] > 0).all() and (scores.diff() <= 0).all()
    assert not scores[~there].any() and not boxes[~there].any() and (classes[~there] == -1).all()


@pytest.mark.parametrize(
    "name",
    ["fcos", *(pytest.param(n, marks=pytest.mark.slow) for n in ("yolov3", "faster_rcnn_ghm_r"))],
)
def test_half_has_weights_of_float16_and_inputs_and_outputs_of_float32(built, pictures, name):
    import onnx

    cfg, model = built(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = export(model, cfg, "onnx", half=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    graph = onnx.load_model_from_string(data).graph
    halves = [x for x in graph.initializer if x.data_type == onnx.TensorProto.FLOAT16]
    assert len(halves) > 0.9 * len(graph.initializer)
    found = load_exported(data, "onnx")(pictures[0])
    assert found[0].dtype == found[1].dtype == torch.float32
    expected = detections_of(model, pictures[0])
    torch.testing.assert_close(found[1][:5], expected[1][:5], atol=0.01, rtol=0)
    if name != "faster_rcnn_ghm_r":  # of random proposals rounding decides which ones NMS keeps
        run = load_exported(data, "onnx")
        assert compare(model, run, pictures[:3], Progress(), half=True).holds


def test_what_has_no_batch_or_no_half(built):
    cfg, model = built("faster_rcnn_ghm_r")
    with pytest.raises(UsageError, match="works only for one-stage detectors, not Faster R-CNN"):
        export(model, cfg, "onnx", batch=True)
    with pytest.raises(UsageError, match="--half needs --format onnx"):
        export(model, cfg, "torchscript", half=True)


@pytest.mark.parametrize("form", ["onnx", pytest.param("torchscript", marks=pytest.mark.slow)])
def test_nothing_is_frozen_at_what_the_example_shows(built, monkeypatch, form):
    """The trace sees fewer candidates than are kept at most; what it is used on has more."""
    words = ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", "1500", "TEST.DETECTIONS_PER_IMAGE", "9000")
    words += ("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.RETINANET.NMS_THRESH_TEST", "0.9")
    cfg, model = built("retinanet_ghm", *words)
    monkeypatch.setattr(export_module, "example_size", lambda cfg: (32, 32))  # 1440 on p3
    run = load_exported(export(model, cfg, form), form)
    large = noise(cfg, 1)[0].repeat(1, 2, 2)
    agreement = compare(model, run, [large], Progress())
    assert agreement.detections > 1500 and agreement.compared > 1000
    assert agreement.px < 1e-3 and agreement.score < 1e-3, agreement


@pytest.mark.parametrize(
    ("form", "seen"), [("onnx", True), ("onnx", False), ("torchscript", False)]
)
def test_images_without_a_detection(built, monkeypatch, form, seen):
    """The example of the trace may have detections or none."""
    cfg, model = built("retinanet_ghm")
    dark, bright = torch.zeros(3, 64, 80), noise(cfg, 1)[0]
    best = [model([{"image": x}])[0]["instances"].scores.max().item() for x in (dark, bright)]
    model.test_score_thresh = sum(best) / 2
    found, empty = (bright, dark) if best[1] > best[0] else (dark, bright)
    example = found if seen else empty
    monkeypatch.setattr(export_module, "_example", lambda cfg: example)
    run = load_exported(export(model, cfg, form), form)
    assert [len(x) for x in run(empty)] == [0, 0, 0]
    agreement = compare(model, run, [empty], Progress())
    assert agreement.holds is None and agreement.compared == 0
    expected = model([{"image": found}])[0]["instances"]
    assert len(run(found)[0]) == len(expected) > 0


def test_torchscript_runs_where_detectron2_is_not(built, pictures, tmp_path):
    """In a process that cannot import it, nor this project; torchvision has the operator nms."""
    cfg, model = built("retinanet_ghm")
    (tmp_path / "m.pt").write_bytes(export(model, cfg, "torchscript"))
    code = f"""
import json, sys
for name in ("detectron2", "ghm_d2", "fvcore", "timm"):
    sys.modules[name] = None  # an import raises ImportError
import torch, torchvision
extra = {{{METADATA!r}: ""}}
detect = torch.jit.load("m.pt", _extra_files=extra)
image = torch.load("image.pt")
print(json.dumps([len(json.loads(extra[{METADATA!r}])["class_names"])]))
print(json.dumps([x.tolist() for x in detect(image)]))
print(json.dumps([x.tolist() for x in detect(image.byte())]))
"""
    torch.save(pictures[3], tmp_path / "image.pt")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names, *both = map(json.loads, done.stdout.splitlines())
    assert names == [10]
    for found in both:  # of float32 and uint8
        boxes, scores, classes = map(torch.tensor, found)
        expected = model([{"image": pictures[3]}])[0]["instances"]
        assert len(boxes) > 0
        torch.testing.assert_close(boxes, expected.pred_boxes.tensor, rtol=0, atol=1e-3)
        torch.testing.assert_close(scores, expected.scores, rtol=0, atol=1e-3)
        assert classes.tolist() == expected.pred_classes.tolist()


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("name", ["retinanet_ghm", "fcos"])
def test_openvino_finds_it_too_once_it_knows_the_size(built, pictures, name, batch):
    openvino = pytest.importorskip("openvino", reason="needs: pip install openvino")
    cfg, model = built(name)
    core = openvino.Core()
    network = core.read_model(export(model, cfg, "onnx", batch=batch))
    images = [pictures[0], pictures[0].flip(-1)] if batch else pictures[:1]
    network.reshape([*([2] if batch else []), *pictures[0].shape])
    full = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(network, "CPU", full)

    def run(image):
        found = compiled(image.numpy())
        return tuple(torch.from_numpy(x.copy()) for x in found.values())

    agreement = compare(model, run, images, Progress(), batch=batch)
    assert agreement.compared > 1 and agreement.px < 1e-2 and agreement.score < 1e-3, agreement


def test_the_file_tells_how_to_run_it(built):
    import onnx

    cfg, model = built("retinanet_ghm")
    about = describe(model, cfg)
    assert about["class_names"] == list("0123456789") and about["input"]["format"] == "RGB"
    assert about["resize"] == {
        "RESIZE": "shortest_edge",
        "MIN_SIZE_TEST": 64,
        "MAX_SIZE_TEST": 400,
    }
    proto = onnx.load_model_from_string(export(model, cfg, "onnx"))
    assert {p.key: json.loads(p.value) for p in proto.metadata_props} == {METADATA: about}
    assert [x.name for x in proto.graph.input] == [about["input"]["name"]]
    assert [x.name for x in proto.graph.output] == [x["name"] for x in about["outputs"]]
    onnx.checker.check_model(proto)
    about_batch = describe(model, cfg, batch=True)
    graph = onnx.load_model_from_string(export(model, cfg, "onnx", batch=True)).graph
    for x, told in zip(
        [*graph.input, *graph.output], [about_batch["input"], *about_batch["outputs"]], strict=True
    ):
        dims = [dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim]
        assert (x.name, dims) == (told["name"], told["shape"])
    extra = {METADATA: ""}
    torch.jit.load(io.BytesIO(export(model, cfg, "torchscript")), _extra_files=extra)
    assert json.loads(extra[METADATA]) == about


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_exporting_leaves_the_model_as_it_was(built, pictures, form):
    cfg, model = built("retinanet_ghm")
    before, attributes = model([{"image": pictures[0]}])[0]["instances"], set(vars(model))
    export(model, cfg, form)
    assert set(vars(model)) == attributes
    assert not any(module.training for module in model.modules())
    after = model([{"image": pictures[0]}])[0]["instances"]
    assert torch.equal(before.pred_boxes.tensor, after.pred_boxes.tensor)


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_masks_are_exported_too(built, pictures, form):
    cfg, model = built("mask_rcnn")
    run = load_exported(export(model, cfg, form), form)
    assert [output["name"] for output in describe(model, cfg)["outputs"]][3:] == ["masks"]
    for picture in (pictures[0], pictures[2]):
        expected, found = detections_of(model, picture), run(picture)
        assert found[3].shape == (len(found[1]), 1, 28, 28) and len(found[1]) > 0
        torch.testing.assert_close(found[3], expected[3], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("name", "form"), in_both_forms("mask_rcnn"))
def test_two_stages_may_find_nothing(built, pictures, monkeypatch, name, form):
    cfg, model = built(name)
    scores = [detections_of(model, picture)[1].max().item() for picture in pictures[:2]]
    model.roi_heads.box_predictor.test_score_thresh = sum(scores) / 2
    low, high = (pictures[i] for i in sorted((0, 1), key=lambda i: scores[i]))
    monkeypatch.setattr(export_module, "_example", lambda cfg: high)
    run = load_exported(export(model, cfg, form), form)
    assert [len(x) for x in run(low)] == [0] * 4
    assert len(run(high)[0]) == len(detections_of(model, high)[0]) > 0


def test_an_unknown_detector_is_refused_by_name(tiny):
    from ghm_d2.config import load_config

    cfg = load_config("quick/mask_rcnn.yaml", tiny)
    with pytest.raises(UsageError, match=r"Mask R-CNN .GeneralizedRCNN. cannot be exported"):
        export(torch.nn.Identity(), cfg, "torchscript")


def test_unknown_format_and_missing_package(monkeypatch, built):
    cfg, model = built("retinanet_ghm")
    with pytest.raises(UsageError, match="onnx, torchscript, not 'tflite'"):
        export(model, cfg, "tflite")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=r"pip install 'ghm_d2\[export\]'"):
        export(model, cfg, "onnx")


def detections(*rows):
    boxes = torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([row[1] for row in rows], dtype=torch.float32)
    return boxes, scores, torch.tensor([row[2] for row in rows], dtype=torch.int64)


def differences(expected, found, least: float = -math.inf) -> tuple[float, float]:
    """The largest distances, px and score, of a detection above `least` to its counterpart."""
    return verify._largest(verify._distances(expected, found, least))


def test_differences():
    a, b = ([0, 0, 10, 10], 0.75, 0), ([5, 5, 20, 20], 0.5, 1)
    assert differences(detections(a, b), detections(b, a)) == (0, 0)  # the order does not count
    assert differences(detections(), detections()) == (0, 0)
    moved = ([5, 5, 20, 20.5], 0.25, 1)
    assert differences(detections(a, b), detections(a, moved)) == (0.5, 0.25)
    for other in (detections(), detections(a), detections(a, (*b[:2], 2))):
        assert differences(detections(a, b), other) == (math.inf, math.inf)
        assert differences(other, detections(a, b)) == (math.inf, math.inf)
    assert differences(detections(a, b), detections(a), least=0.5) == (0, 0)
    assert differences(detections(a), detections(a, b), least=0.5) == (0, 0)
    assert differences(detections(b, a), detections(b), least=0.5) == (math.inf, math.inf)


def test_what_nothing_can_be_compared_on(built):
    """Detections at the threshold alone tell nothing; those of one side alone tell enough."""
    cfg, model = built("retinanet_ghm")
    image = noise(cfg, 1)[0]
    instances = model([{"image": image}])[0]["instances"]
    same = (instances.pred_boxes.tensor, instances.scores, instances.pred_classes)
    nothing = detections()
    assert compare(model, lambda _: same, [image], Progress()).holds is True
    assert compare(model, lambda _: nothing, [image], Progress()).holds is False
    model.test_score_thresh = instances.scores.max().item() - 0.0005
    agreement = compare(model, lambda _: nothing, [image], Progress())
    assert agreement.detections > 0 and agreement.holds is None
    model.test_score_thresh = 1.0
    assert compare(model, lambda _: nothing, [image], Progress()).holds is None
    above = (same[0][:1], torch.tensor([1.5]), same[2][:1])
    assert compare(model, lambda _: above, [image], Progress()).holds is False


@pytest.fixture
def absent_data():
    """A data set that is registered, but whose files are not there, as COCO's often are."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    name = "absent_val"
    classes = [f"class {i}" for i in range(10)]
    register_coco_instances(name, {"thing_classes": classes}, "/nowhere/val.json", "/nowhere")
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_registered_data_whose_files_are_absent(built, absent_data):
    """Noise is there in any case; and the classes are known."""
    cfg, model = built("retinanet_ghm")
    cfg.DATASETS.TEST, cfg.DATASETS.CLASS_NAMES = (absent_data,), ()
    source, images = check_images(cfg, 2)
    assert source == "noise" and len(images) == 2
    assert describe(model, cfg)["class_names"] == [f"class {i}" for i in range(10)]
    cfg.MODEL.RETINANET.NUM_CLASSES = 3  # then these are other classes
    assert describe(model, cfg)["class_names"] == ["0", "1", "2"]
    cfg.DATASETS.TEST = ("/nowhere/val.json",)
    assert describe(model, cfg)["class_names"] == ["0", "1", "2"]


def test_check_images_are_those_of_validation_or_noise(built, digits_folder):
    cfg, _ = built("retinanet_ghm")
    source, images = check_images(cfg, 2)
    assert source == f"{digits_folder}/val.json"
    assert len(images) == 2 and all(min(x.shape[1:]) == 64 for x in images)
    assert all(x.dtype == torch.float32 and x.max() > 1 for x in images)
    cfg.DATASETS.TEST = ("/nowhere/val.json",)
    source, images = check_images(cfg, 2)
    assert source == "noise" and len({x.shape for x in images}) == 2
