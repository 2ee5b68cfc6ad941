"""Configuration files: data that execute nothing, and mistakes that get one clear line."""

import difflib
from pathlib import Path

import pytest
import torch

from ghm_d2.config import check_config, get_cfg, list_configs, load_config, merge_overrides
from ghm_d2.errors import UsageError
from ghm_d2.modeling.build_losses import build_ghm_c, build_ghm_r, build_softmax_ghm_c

ZOO_RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


@pytest.fixture
def write(tmp_path):
    def file(text, name="config.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return file


def message(*arguments) -> str:
    """The one line that the user gets."""
    with pytest.raises(UsageError) as error:
        load_config(*arguments)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


def test_published_settings_are_the_defaults():
    cfg = get_cfg()
    c, r = build_ghm_c(cfg, 5), build_ghm_r(cfg, 5)
    assert (c.density.bins, c.density.momentum, c.loss_weight) == (30, 0.75, 1)
    assert (r.density.bins, r.density.momentum, r.loss_weight, r.mu) == (10, 0.7, 10, 0.02)
    for density in (c.density, r.density):
        assert (density.scope, density.normalizer, density.ema_init) == (
            "level",
            "valid_bins",
            "zero",
        )
        assert density.sync


def test_every_ghm_key_reaches_the_losses(write):
    file = write(
        """
        MODEL:
          GHM:
            SCOPE: level_ema
            NORMALIZER: bins
            EMA_INIT: debias
            SYNC: false
            CLS: {BINS: 7, MOMENTUM: 0.1, LOSS_WEIGHT: 2.5}
            REG: {BINS: 3, MOMENTUM: 0.2, LOSS_WEIGHT: 1.5, MU: 0.3}
        """
    )
    cfg = load_config(file)
    c, softmax, r = build_ghm_c(cfg, 4), build_softmax_ghm_c(cfg), build_ghm_r(cfg, 4)
    for loss in (c, softmax):
        assert (loss.density.bins, loss.density.momentum, loss.loss_weight) == (7, 0.1, 2.5)
    assert (r.density.bins, r.density.momentum, r.loss_weight, r.mu) == (3, 0.2, 1.5, 0.3)
    assert c.density.ema.shape == (4, 7) and r.density.ema.shape == (4, 3)
    for loss in (c, softmax, r):
        density = loss.density
        assert (density.scope, density.normalizer) == ("level_ema", "bins")
        assert density.ema_init == "debias" and not density.sync
        loss(torch.zeros(2, 4), torch.zeros(2, 4) if loss is r else torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("CLS.BINS", "0", ["MODEL.GHM.CLS", "bins", "at least 1", "0"]),
        ("CLS.MOMENTUM", "1.0", ["MODEL.GHM.CLS", "momentum", "[0, 1)", "1.0"]),
        ("REG.MU", "0.0", ["MODEL.GHM.REG", "mu", "0.0"]),
        ("REG.LOSS_WEIGHT", "-1.0", ["MODEL.GHM.REG", "loss_weight", "-1.0"]),
        ("SCOPE", "image", ["scope", "level_ema", "'image'"]),
    ],
)
def test_value_out_of_range(write, key, value, words):
    cfg = load_config(write("{}"), [f"MODEL.GHM.{key}", value])
    with pytest.raises(UsageError) as error:
        build_ghm_c(cfg)
        build_ghm_r(cfg)
    for word in words:
        assert word in str(error.value)


def test_values_merge_in_order(write):
    write("MODEL: {GHM: {CLS: {BINS: 5, MOMENTUM: 0.5}}}\nSEED: 1", "base.yaml")
    write("_BASE_: ../base.yaml\nMODEL: {GHM: {CLS: {BINS: 6}}}\nSEED: 2", "sub/middle.yaml")
    file = write("_BASE_: sub/middle.yaml\nSEED: 3")
    cfg = load_config(file, ["SEED", "4", "MODEL.WEIGHTS", "a.pth"])
    assert (cfg.MODEL.GHM.CLS.BINS, cfg.MODEL.GHM.CLS.MOMENTUM, cfg.SEED) == (6, 0.5, 4)
    assert cfg.MODEL.WEIGHTS == "a.pth"
    assert load_config(file).SEED == 3


def test_of_several_bases_the_later_one_counts(write):
    write("SEED: 1\nMODEL: {GHM: {CLS: {BINS: 6}}}", "a.yaml")
    write("SEED: 2", "b.yaml")
    cfg = load_config(write("_BASE_: [a.yaml, b.yaml]"))
    assert (cfg.SEED, cfg.MODEL.GHM.CLS.BINS) == (2, 6)


def test_bases_that_double_at_each_step_are_refused(write):
    for i in range(30):
        file = write(f"_BASE_: [{i - 1}.yaml, {i - 1}.yaml]" if i else "SEED: 1", f"{i}.yaml")
    assert "more than 20 files" in message(file)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_base_cycle(write, length):
    for i in range(length):
        file = write(f"_BASE_: {(i + 1) % length}.yaml", f"{i}.yaml")
    assert "_BASE_ includes the file itself" in message(file)


def test_base_that_is_not_there(write):
    assert "nowhere.yaml" in message(write("_BASE_: nowhere.yaml"))


def test_mistake_in_a_base_is_reported(write):
    write("MODEL: {GHM: {CLS: {BINZ: 5}}}", "base.yaml")
    assert "MODEL.GHM.CLS.BINZ" in message(write("_BASE_: base.yaml"))


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("MODEL: {GHM: {CLS: {BIN: 5}}}", "MODEL.GHM.CLS.BIN", "MODEL.GHM.CLS.BINS"),
        ("MODEL: {RETINANET: {CLS_LOSS: x}}", "MODEL.RETINANET.CLS_LOSS", "CLS_LOSS_TYPE"),
        ("SOLVER: {MAXITER: 5}", "SOLVER.MAXITER", "SOLVER.MAX_ITER"),
        ("{1: 2}", "1", ""),
    ],
)
def test_unknown_key_names_the_nearest(write, text, unknown, nearest):
    line = message(write(text, "mine.yaml"))
    assert "mine.yaml" in line and f"unknown key {unknown}" in line
    assert f"did you mean {nearest}" in line or nearest in line
    assert nearest == "" or "did you mean" in line


def test_unknown_override_names_the_nearest(write):
    line = message(write("{}"), ["MODEL.GHM.REG.MOMENTUMM", "0.5"])
    assert "MODEL.GHM.REG.MOMENTUMM; did you mean MODEL.GHM.REG.MOMENTUM?" in line


def test_odd_overrides(write):
    line = message(write("{}"), ["SEED", "1", "MODEL.GHM.CLS.BINS"])
    assert "KEY VALUE" in line and "'MODEL.GHM.CLS.BINS' has no value" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.GHM.CLS.BINS", "many"),
        ("MODEL.GHM.CLS.BINS", "3.5"),
        ("MODEL.GHM.SYNC", "3"),
        ("MODEL.GHM.REG.MU", "[1, 2]"),
        ("MODEL.GHM.REG.MU", "true"),
        ("SOLVER.STEPS", "{[]: 1}"),
    ],
)
def test_wrong_type(write, key, value):
    assert key in message(write("{}"), [key, value])
    if "{" not in value:
        group, _, leaf = key.rpartition(".")
        text = f"{leaf}: {value}"
        for part in reversed(group.split(".")):
            text = f"{part}: {{{text}}}"
        line = message(write(text, "mine.yaml"))
        assert "mine.yaml" in line and key in line


@pytest.mark.parametrize("text", ["MODEL: 3", "MODEL:", "MODEL: {GHM: focal}"])
def test_group_given_a_value(write, text):
    assert "is a group of keys" in message(write(text))
    assert "is a group of keys" in message(write("{}"), ["MODEL.GHM", "3"])


def test_an_empty_group_changes_nothing_and_is_no_value(write):
    assert load_config(write("SOLVER: {}")).SOLVER == get_cfg().SOLVER
    for text, key in ("SOLVER: {BASE_LR: {}}", "SOLVER.BASE_LR"), ("NOPE: {}", "unknown key NOPE"):
        assert key in message(write(text))


def test_a_file_may_have_dotted_keys(write):
    file = write("MODEL.GHM.CLS.BINS: 5\nMODEL: {GHM: {CLS: {MOMENTUM: 0.5}}}")
    cfg = load_config(file)
    assert (cfg.MODEL.GHM.CLS.BINS, cfg.MODEL.GHM.CLS.MOMENTUM) == (5, 0.5)


def test_numbers_and_truths_as_people_write_them(write):
    """YAML's 1 for 1.0, 1e-3, and true; a shell's true for True."""
    text = "MODEL: {GHM: {SYNC: false, REG: {LOSS_WEIGHT: 1}}}\nSOLVER: {BASE_LR: 1e-3}"
    cfg = load_config(write(text))
    assert cfg.MODEL.GHM.REG.LOSS_WEIGHT == 1 and isinstance(cfg.MODEL.GHM.REG.LOSS_WEIGHT, float)
    assert cfg.SOLVER.BASE_LR == 0.001 and cfg.MODEL.GHM.SYNC is False
    merge_overrides(cfg, ["MODEL.GHM.REG.LOSS_WEIGHT", "2", "MODEL.GHM.SYNC", "true"])
    assert cfg.MODEL.GHM.REG.LOSS_WEIGHT == 2.0 and cfg.MODEL.GHM.SYNC is True
    merge_overrides(cfg, ["MODEL.GHM.SYNC", "False", "SOLVER.STEPS", "(3, 4)"])
    assert cfg.MODEL.GHM.SYNC is False and cfg.SOLVER.STEPS == (3, 4)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {marker}']",
        "!!python/object/apply:subprocess.check_call [[touch, '{marker}']]",
        "!!python/object/new:os.system ['touch {marker}']",
        "!!python/name:os.system",
        "!!python/tuple [1, 2]",
    ],
)
@pytest.mark.parametrize("where", ["value", "base", "root"])
def test_python_tags_execute_nothing(write, tmp_path, tag, where):
    marker = tmp_path / "executed"
    tag = tag.format(marker=marker)
    text = tag if where == "root" else f"MODEL: {{WEIGHTS: {tag}}}"
    file = write(text, "hostile.yaml")
    if where == "base":
        file = write("_BASE_: hostile.yaml")
    assert "not a plain YAML file" in message(file)
    assert not marker.exists()


def test_an_override_executes_nothing(write, tmp_path):
    marker = tmp_path / "executed"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    for value in (code, f"!!python/object/apply:os.system ['touch {marker}']"):
        cfg = load_config(write("{}"), ["MODEL.WEIGHTS", value])
        loaded = cfg.MODEL.WEIGHTS
        assert loaded == value
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    ["MODEL: [1,", "- a\n- b", "", "just words", "&A {MODEL: *A}", "MODEL: {WEIGHTS: 2020-01-01}"],
)
def test_files_that_are_no_configuration(write, text):
    assert "broken.yaml" in message(write(text, "broken.yaml"))


def test_file_that_is_not_text(tmp_path):
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF")
    assert "image.yaml" in message(str(tmp_path / "image.yaml"))


def test_model_zoo_loads():
    """Its RetinaNet base computes its anchors, which the safe loader refuses."""
    cfg = load_config(ZOO_RETINANET, ["MODEL.RETINANET.CLS_LOSS_TYPE", "ghm_c"])
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0] == pytest.approx(
        [32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)]
    )
    assert cfg.MODEL.RETINANET.CLS_LOSS_TYPE == "ghm_c"


def test_model_zoo_as_a_base(write):
    cfg = load_config(write(f"_BASE_: {ZOO_RETINANET}\nSEED: 5"))
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == 5 and cfg.SEED == 5


def test_a_copy_of_the_zoos_base_is_not_trusted(write):
    """Only the files inside the installed Detectron2 may compute."""
    import detectron2

    base = Path(detectron2.__file__).parent / "model_zoo" / "configs" / "Base-RetinaNet.yaml"
    assert "not a plain YAML file" in message(write(base.read_text(encoding="utf-8")))


def test_shipped_configurations_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = list_configs()
    assert any(name.startswith("quick/") for name in names)
    for name in names:
        assert load_config(name) == load_config(f"configs/{name}")


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = list_configs()[0]
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text("SEED: 77")
    assert load_config(name).SEED == 77


@pytest.mark.parametrize("prefix", ["", "configs/"])
def test_missing_file_names_the_nearest(tmp_path, monkeypatch, prefix):
    monkeypatch.chdir(tmp_path)
    names = list_configs()
    assert names
    for name in names:
        wrong = name.replace(".yaml", "s.yaml")
        nearest = difflib.get_close_matches(wrong, names, n=1)[0]
        line = message(prefix + wrong)
        assert prefix + wrong in line and f"did you mean configs/{nearest}?" in line
    line = message("nothing-like-it.json")
    assert "nothing-like-it.json" in line and "did you mean" not in line


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        ("quick/retinanet_focal.yaml", "MODEL.GHM.REG.MU", "0"),
        ("quick/faster_rcnn_sl1.yaml", "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", "-1"),
        ("quick/ssd.yaml", "MODEL.SSD.NEG_POS_RATIO", "-1"),
        ("quick/ssd.yaml", "MODEL.SSD.IOU_THRESHOLD", "-1"),
        ("quick/ssd.yaml", "MODEL.SSD.PRIOR_PROB", "1"),
        ("quick/ssd.yaml", "MODEL.SSD.EXTRA_CHANNELS", "2"),
        ("quick/ssd.yaml", "MODEL.SSD.HEAD_CHANNELS", "3"),
        ("quick/yolov3.yaml", "MODEL.YOLOV3.IGNORE_IOU", "nan"),
        ("quick/yolov3.yaml", "MODEL.YOLOV3.PRIOR_PROB", "0"),
        ("quick/fcos.yaml", "MODEL.FCOS.SMOOTH_L1_LOSS_BETA", "-1"),
    ],
)
def test_a_number_out_of_range_is_told_before_anything_is_built(config, key, value):
    cfg = load_config(config)
    check_config(cfg)
    merge_overrides(cfg, [key, value])
    with pytest.raises(UsageError, match=key):
        check_config(cfg)


@pytest.mark.parametrize(
    ("config", "group", "arch"),
    [
        ("quick/retinanet_focal.yaml", "SSD", "GHMSSD"),
        ("quick/ssd.yaml", "YOLOV3", "GHMYOLOv3"),
        ("quick/yolov3.yaml", "FCOS", "GHMFCOS"),
        ("quick/fcos.yaml", "RETINANET", "GHMRetinaNet"),
    ],
)
def test_a_loss_type_that_the_detector_does_not_read(config, group, arch):
    cfg = load_config(config, [f"MODEL.{group}.CLS_LOSS_TYPE", "ghm_c"])
    with pytest.raises(UsageError, match=f"META_ARCHITECTURE {arch}"):
        check_config(cfg)


def test_class_weights_are_for_those_who_read_them():
    words = ["MODEL.CLASS_WEIGHTING", "inverse"]
    check_config(load_config("quick/faster_rcnn_sl1.yaml", words))
    cfg = load_config("quick/fcos.yaml", ["MODEL.CLASS_WEIGHTS", "(1.0, 2.0)"])
    with pytest.raises(UsageError, match="your own weights need 'given'"):
        check_config(cfg)
    cfg = load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml", words)
    with pytest.raises(UsageError, match="META_ARCHITECTURE, not RetinaNet"):
        check_config(cfg)


HARMFUL = {
    "aliases to 10^12 values": (
        "a0: &a0 {x: 1}\n"
        + "\n".join(
            f"a{i}: &a{i} {{{', '.join(f'k{k}: *a{i - 1}' for k in range(10))}}}"
            for i in range(1, 12)
        ),
        "more than 20000 values",
    ),
    "proposals, which Detectron2 unpickles": ("MODEL: {LOAD_PROPOSALS: true}", "LOAD_PROPOSALS"),
    "a number that exhausts memory": (
        "MODEL: {GHM: {CLS: {BINS: 1000000000}}}",
        "MODEL.GHM.CLS.BINS must be at most 1000000",
    ),
    "a month that is none": ("SEED: 2020-99-99", "not a plain YAML file"),
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_what_would_harm_is_refused_in_one_line(kind, tmp_path):
    text, says = HARMFUL[kind]
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=says) as caught:
        load_config(str(file))
    assert str(caught.value).isprintable()


def test_overrides_are_held_to_the_same_limits():
    cfg = get_cfg()
    with pytest.raises(UsageError, match="LOAD_PROPOSALS"):
        merge_overrides(cfg, ["MODEL.LOAD_PROPOSALS", "True"])
