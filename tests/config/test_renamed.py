"""Classes that were renamed because other projects use their names: the old names still work."""

import logging

import pytest
from detectron2 import modeling
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from ghm_d2.config import check_config, load_config
from ghm_d2.config.renamed import REGISTRIES, RENAMED, tell_renamed
from ghm_d2.describe import experiment_hash
from ghm_d2.register import register_all

OLD = {
    "ssd": "MODEL: {META_ARCHITECTURE: SSD, BACKBONE: {NAME: build_timm_backbone}, "
    "ANCHOR_GENERATOR: {NAME: SSDDefaultBoxes}}",
    "yolov3": "MODEL: {META_ARCHITECTURE: YOLOv3, BACKBONE: {NAME: build_timm_backbone}}",
}


@pytest.fixture(autouse=True)
def registered():
    tell_renamed.cache_clear()
    register_all()
    yield
    META_ARCH_REGISTRY._obj_map.pop("SSD", None)


@pytest.fixture
def old_file(tmp_path):
    def write(name: str) -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"_BASE_: quick/{name}.yaml\n{OLD[name]}\n")
        return str(path)

    return write


@pytest.mark.parametrize("name", OLD)
def test_a_configuration_with_old_names_is_the_same(name, old_file, caplog):
    old, new = load_config(old_file(name)), load_config(f"quick/{name}.yaml")
    assert old == new
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == len(set(told)) == OLD[name].count("NAME") + 1
    assert all("is now called" in line and "until version" in line for line in told)


def test_an_old_name_as_an_override():
    words = ["MODEL.BACKBONE.NAME", "build_darknet_backbone"]
    cfg = load_config("quick/yolov3.yaml", words)
    assert cfg.MODEL.BACKBONE.NAME == "build_ghm_darknet_backbone"


def test_a_script_that_sets_an_old_name_builds_the_class(caplog):
    cfg = load_config("quick/ssd.yaml", ["MODEL.DEVICE", "cpu", "MODEL.TIMM.PRETRAINED", ""])
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ANCHOR_GENERATOR.NAME = "SSD", "SSDDefaultBoxes"
    assert type(build_model(cfg)).__name__ == "GHMSSD"
    assert "SSD is now called GHMSSD" in caplog.text


def test_an_old_name_in_a_script_reads_the_losses_of_the_class():
    cfg = load_config("quick/ssd_ghm.yaml")
    cfg.MODEL.META_ARCHITECTURE = "SSD"
    check_config(cfg)


def test_another_project_may_take_an_old_name(old_file):
    class SSD:
        pass

    META_ARCH_REGISTRY.register(SSD)  # which refuses a name that is taken
    register_all()
    assert META_ARCH_REGISTRY.get("SSD") is SSD
    assert load_config(old_file("ssd")).MODEL.META_ARCHITECTURE == "SSD"


def test_an_unknown_name_is_still_unknown():
    with pytest.raises(KeyError, match="RetinaNot"):
        META_ARCH_REGISTRY.get("RetinaNot")


@pytest.mark.parametrize("key", REGISTRIES)
def test_every_registered_name_says_whose_it_is(key):
    registry = getattr(modeling, REGISTRIES[key])
    ours = [name for name, built in registry if built.__module__.startswith("ghm_d2.")]
    assert ours and all("ghm" in name.lower() for name in ours)
    assert set(RENAMED[key].values()) <= set(ours)


def test_a_new_name_is_no_new_experiment():
    cfg = load_config("quick/ssd_ghm.yaml")
    name = experiment_hash(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SSD"
    assert experiment_hash(cfg) == name
