"""A trained detector from its weights: the configuration is found beside them."""

import logging
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from ghm_d2.config.detectors import num_classes
from ghm_d2.errors import UsageError, WeightsError
from ghm_d2.losses import GradientDensity
from ghm_d2.modeling.weights.checkpointer import GHMCheckpointer
from ghm_d2.register import register_all
from ghm_d2.run_folder import CONFIG_FILE

ZOO = "zoo:"  # before the name of a model of Detectron2's zoo


def config_source(weights: Path, config: str | None) -> str:
    """The name of the configuration that `weights` were trained with.

    Args:
        weights: a file; or "zoo:NAME" of Detectron2's model zoo, such as
            "zoo:COCO-Detection/retinanet_R_50_FPN_1x", whose configuration has the same name.
        config: a YAML file, or the name of a shipped one; None takes config.yaml beside `weights`.

    Raises:
        WeightsError: there are no such weights.
        UsageError: no configuration is given or found.
    """
    if str(weights).startswith(ZOO):
        return config or zoo_name(weights)
    beside = weights.parent / CONFIG_FILE
    if not weights.is_file():
        raise WeightsError(f"no weights {weights}")
    if config is None and not beside.is_file():
        raise UsageError(f"no {CONFIG_FILE} beside {weights}; name one with --config FILE")
    return config or str(beside)


def folder_of(weights: Path) -> Path:
    """The folder for what is written about weights: their own; for the model zoo's, this one."""
    return Path() if str(weights).startswith(ZOO) else weights.parent


def class_names(cfg) -> list[str]:
    """Names of the training data's classes; else of DATASETS.TEST's, if known; else numbers."""
    known, number = MetadataCatalog.list(), num_classes(cfg)
    candidates = [cfg.DATASETS.CLASS_NAMES]
    for data in cfg.DATASETS.TEST:
        if data in known:
            candidates.append(MetadataCatalog.get(data).get("thing_classes", ()))
    fitting = (list(names) for names in candidates if len(names) == number)
    return next(fitting, [str(i) for i in range(number)])


def zoo_name(weights: Path) -> str:
    """The configuration that "zoo:NAME" names."""
    return f"{str(weights).removeprefix(ZOO).removesuffix('.yaml')}.yaml"


def load_detector(cfg, weights: Path):
    """The model of `cfg` with `weights`, a file or "zoo:NAME", in evaluation mode.

    Raises:
        WeightsError: they cannot be read, or lack a tensor of the model.
    """
    register_all()
    cfg = cfg.clone()
    cfg.MODEL.TIMM.PRETRAINED = ""  # the weights bring the backbone's
    cfg.MODEL.GHM.KERNEL = "auto"  # no loss is computed, and training's may not be here
    model = build_model(cfg)
    checkpointer = GHMCheckpointer(model)
    source = zoo_name(weights) if str(weights).startswith(ZOO) else str(weights)
    checkpointer.load(source, checkpointables=[])
    report = checkpointer.report
    if report.origin:
        logging.getLogger("ghm_d2").warning(report.origin)
    # without the losses' state a detector detects as well
    densities = [n for n, m in model.named_modules() if isinstance(m, GradientDensity)]
    excused = ("loss_normalizer", *(f"{name}." for name in densities))
    wrong = [*report.missing, *(name for name, *_ in report.mismatched)]
    if bad := [name for name in wrong if not name.startswith(excused)]:
        raise WeightsError(
            f"{weights}: not of this configuration's model: {bad[0]} and {len(bad) - 1} more "
            "tensors are missing or of another shape"
        )
    return model.eval()
