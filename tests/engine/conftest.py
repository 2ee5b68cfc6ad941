"""Detectors of random weights with predictions that differ, and data with known noise."""

import pytest
import torch


@pytest.fixture(scope="session")
def noisy_folder(tmp_path_factory) -> str:
    """Seven training pictures of digits; a third of the annotations of each kind of noise."""
    from ghm_d2.data.digits import DigitsSpec, write

    folder = tmp_path_factory.mktemp("data") / "noisy"
    spec = DigitsSpec(
        train=7,
        val=3,
        image_size=(64, 80),
        objects=(1, 3),
        side=(12, 40),
        noise_class=0.33,
        noise_shift=0.33,
        noise_missing=0.0,  # no picture is left without a box
    )
    write(spec, folder)
    return str(folder)


@pytest.fixture(scope="session")
def detector(tiny):
    """Builds (cfg, model) from the name of a quick configuration, a folder and KEY VALUE words."""
    from detectron2.modeling import build_model

    from ghm_d2.config import load_config
    from ghm_d2.data.catalog import apply_to_config
    from ghm_d2.register import register_all

    def build(name: str, folder: str, *words: str):
        register_all()
        cfg = load_config(f"quick/{name}.yaml", [*tiny, "MODEL.DEVICE", "cpu", *words])
        apply_to_config(cfg, folder)
        torch.manual_seed(0)
        model = build_model(cfg)
        for key, parameter in model.named_parameters():
            if "cls_score" in key or "bbox_pred" in key:
                parameter.data.normal_(0, 0.3 if parameter.dim() > 1 else 0.5)
        return cfg, model.eval()

    return build
