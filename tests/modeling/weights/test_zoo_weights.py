"""Weights of Detectron2's model zoo, trained on COCO, start a training on other classes."""

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

from ghm_d2.config import load_config
from ghm_d2.errors import WeightsError
from ghm_d2.inference.load import config_source, zoo_name
from ghm_d2.modeling.weights import fetch as fetching
from ghm_d2.modeling.weights.checkpointer import GHMCheckpointer
from ghm_d2.modeling.weights.zoo_settings import other_settings
from ghm_d2.register import register_all

TINY = {
    "MODEL.RESNETS.DEPTH": "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
    "MODEL.FPN.OUT_CHANNELS": "16",
    "MODEL.RETINANET.NUM_CONVS": "1",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "16",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "16",
}
TRAINING = {
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": "64",
    "SOLVER.MAX_ITER": "2",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.BASE_LR": "1e-12",  # all stay what they started as
    "SOLVER.CHECKPOINT_PERIOD": "2",
    "DATALOADER.NUM_WORKERS": "0",
}
# our recipe, the zoo's configuration and its predictors, with their outputs for ten classes
RETINANET = (
    "coco/retinanet_R_50_FPN_ghm_1x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    {"head.cls_score": 90},
)
MASK_RCNN = (
    "coco/mask_rcnn_R_101_FPN_ghm_r_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    {
        "roi_heads.box_predictor.cls_score": 11,
        "roi_heads.box_predictor.bbox_pred": 40,
        "roi_heads.mask_head.predictor": 10,
    },
)


def words(keys):
    return [word for pair in keys.items() for word in pair]


def zoo_weights(config, file):
    """A file as the zoo's, of Detectron2's own detector with random weights; its tensors."""
    register_all()
    model = build_model(load_config(config, words(TINY | {"MODEL.DEVICE": "cpu"})))
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    content = {"model": state, "__author__": "Detectron2 Model Zoo"}
    file.write_bytes(pickle.dumps(content, protocol=2))
    return state


@pytest.mark.parametrize(
    ("recipe", "zoo", "predictors"), [RETINANET, pytest.param(*MASK_RCNN, marks=pytest.mark.slow)]
)
def test_all_but_the_predictors_is_loaded(recipe, zoo, predictors, ghm, digits_folder, tmp_path):
    state = zoo_weights(zoo, tmp_path / "model_final.pkl")
    keys = TINY | TRAINING | {"MODEL.WEIGHTS": str(tmp_path / "model_final.pkl")}
    run = ["--dataset", digits_folder, "--output", tmp_path / "run"]
    done = ghm("train", "--config", recipe, *run, *words(keys))
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "tensors of another shape" in line)
    anew = {f"{name}.{kind}" for name in predictors for kind in ("weight", "bias")}
    trained = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"]
    for name, tensor in state.items():
        if name in anew:
            assert name in line
            assert len(trained[name]) == predictors[name.rpartition(".")[0]]
        else:
            assert name not in line
            torch.testing.assert_close(trained[name], torch.as_tensor(tensor), rtol=0, atol=1e-6)
    assert "not used" not in done.stderr


ZOO = "COCO-Detection/retinanet_R_50_FPN_1x"
TORCHVISION = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
MMDET = ("MODEL.RESNETS.STRIDE_IN_1X1", "False", "MODEL.ANCHOR_GENERATOR.OFFSET", "0.5")


@pytest.mark.parametrize(
    ("weights", "keys", "said"),
    [
        (f"{ZOO}.yaml", (), ""),
        (f"detectron2://{ZOO}/190397773/model_final_bfca0b.pkl", MMDET, "1X1 True MODEL.ANCHOR_"),
        (f"{ZOO}.yaml", ("MODEL.FPN.P7_RELU", "False"), "to use them, add MODEL.FPN.P7_RELU True"),
        (f"{ZOO}.yaml", MMDET, "add MODEL.RESNETS.STRIDE_IN_1X1 True MODEL.ANCHOR_GENERATOR."),
        (TORCHVISION, (), "add INPUT.FORMAT RGB MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL."),
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", (), ""),
        ("detectron2://No-Such/model/1/model_final_0.pkl", MMDET, ""),
        ("path/model_final.pkl", MMDET, ""),
    ],
)
def test_settings_that_a_zoos_weights_were_not_trained_with_are_told(weights, keys, said):
    cfg = load_config("coco/retinanet_R_50_FPN_1x.yaml", ["MODEL.WEIGHTS", weights, *keys])
    assert said in other_settings(cfg)
    assert bool(said) == bool(other_settings(cfg))


def test_two_detectors_that_are_not_known_are_not_taken_for_one():
    keys = ["MODEL.WEIGHTS", "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", *MMDET]
    keys += ["MODEL.META_ARCHITECTURE", "MyDetector"]
    told = other_settings(load_config("coco/retinanet_R_50_FPN_1x.yaml", keys))
    assert "STRIDE_IN_1X1 True" in told and "ANCHOR_GENERATOR" not in told


def test_detectron2s_fcos_is_loaded_whole_where_p6_comes_from_p5(tmp_path):
    lazy = model_zoo.get_config("common/models/fcos.py").model
    lazy.backbone.bottom_up.stages.depth = 18
    del lazy.backbone.bottom_up.stages.stride_in_1x1
    lazy.backbone.out_channels = lazy.backbone.top_block.in_channels = 64
    lazy.backbone.top_block.out_channels = 64
    lazy.head.input_shape = [ShapeSpec(channels=64)] * 5
    lazy.head.conv_dims, lazy.head.norm = [64], ""
    torch.manual_seed(0)
    theirs = instantiate(lazy).eval()
    torch.save({"model": theirs.state_dict()}, tmp_path / "fcos.pth")
    register_all()
    keys = {
        **TINY,
        "MODEL.DEVICE": "cpu",
        "MODEL.FPN.OUT_CHANNELS": "64",
        "MODEL.FCOS.NUM_CONVS": "1",
        "MODEL.FCOS.NORM": "",
        "MODEL.FCOS.SCORE_THRESH_TEST": "0.0",
    }
    theirs.test_score_thresh = 0.0
    with pytest.raises(WeightsError, match=r"another architecture: backbone\.top_block\.p6"):
        other = build_fcos(keys | {"MODEL.FPN.P6_INPUT": ""})
        GHMCheckpointer(other).load(str(tmp_path / "fcos.pth"))
    ours = build_fcos(keys)
    checkpointer = GHMCheckpointer(ours)
    checkpointer.load(str(tmp_path / "fcos.pth"))
    assert checkpointer.report.missing == ("loss_normalizer",)
    image = torch.randint(0, 256, (3, 64, 96))
    with torch.no_grad():
        found, expected = (m([{"image": image}])[0]["instances"] for m in (ours, theirs))
    assert len(found) == len(expected) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def build_fcos(keys):
    return build_model(load_config("coco/fcos_R_50_FPN_1x.yaml", words(keys))).eval()


def test_a_zoo_model_is_named_and_its_file_checked(tmp_path, monkeypatch):
    data = b"weights" * 9
    right = hashlib.md5(data).hexdigest()[:6]  # as MODEL_ZOO.md says
    address = f"https://dl.fbaipublicfiles.com/detectron2/x/model_final_{right}.pkl"
    local = tmp_path / f"model_final_{right}.pkl"
    local.write_bytes(data)
    monkeypatch.setattr(fetching.model_zoo, "get_checkpoint_url", lambda name: address)
    monkeypatch.setattr(fetching.PathManager, "get_local_path", lambda path: str(local))
    weights = Path("zoo:COCO-Detection/retinanet_R_50_FPN_1x")
    name = config_source(weights, None)
    assert name == zoo_name(weights) == "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    assert fetching.fetch(name) == str(local)
    local.write_bytes(data + b"!")
    with pytest.raises(WeightsError, match="delete it to fetch it again"):
        fetching.fetch(name)
