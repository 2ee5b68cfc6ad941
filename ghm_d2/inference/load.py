"""Loads a trained detector from its weights and the configuration beside them."""

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

ZOO = "zoo:"  # the prefix of a model's name in Detectron2's zoo


def config_source(weights: Path, config: str | None) -> str:
    """Return the file or the name of the configuration that `weights` were trained with.

    Args:
        weights: a file; or "zoo:NAME" for Detectron2's model zoo, such as
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
        raise WeightsError(f"no weights file {weights}")
    if config is None and not beside.is_file():
        raise UsageError(f"no {CONFIG_FILE} beside {weights}; name one with --config FILE")
    return config or str(beside)


def folder_of(weights: Path) -> Path:
    """Return the folder for output about `weights`: theirs, or the current one for "zoo:NAME"."""
    return Path() if str(weights).startswith(ZOO) else weights.parent


def class_names(cfg) -> list[str]:
    """Return the classes' names in the training data, else in DATASETS.TEST, else numbers."""
    known, number = MetadataCatalog.list(), num_classes(cfg)
    candidates = [cfg.DATASETS.CLASS_NAMES]
    for data in cfg.DATASETS.TEST:
        if data in known:
            candidates.append(MetadataCatalog.get(data).get("thing_classes", ()))
    fitting = (list(names) for names in candidates if len(names) == number)
    return next(fitting, [str(i) for i in range(number)])


def zoo_name(weights: Path) -> str:
    """Return the name of the configuration for "zoo:NAME"."""
    return f"{str(weights).removeprefix(ZOO).removesuffix('.yaml')}.yaml"


def load_detector(cfg, weights: Path):
    """Return the model of `cfg` with `weights`, a file or "zoo:NAME", in evaluation mode.

    Raises:
        WeightsError: the weights cannot be read, or lack a tensor of the model.
    """
    register_all()
    cfg = cfg.clone()
    cfg.MODEL.TIMM.PRETRAINED = ""  # `weights` include the backbone's
    cfg.MODEL.GHM.KERNEL = "auto"  # no loss is computed, and the configured kernel may be missing
    model = build_model(cfg)
    checkpointer = GHMCheckpointer(model)
    source = zoo_name(weights) if str(weights).startswith(ZOO) else str(weights)
    checkpointer.load(source, checkpointables=[])
    report = checkpointer.report
    if report.origin:
        logging.getLogger("ghm_d2").warning(report.origin)
    # detection does not need the losses' state
    densities = [n for n, m in model.named_modules() if isinstance(m, GradientDensity)]
    excused = ("loss_normalizer", *(f"{name}." for name in densities))
    wrong = [*report.missing, *(name for name, *_ in report.mismatched)]
    if bad := [name for name in wrong if not name.startswith(excused)]:
        more = f"and {len(bad) - 1} more tensors are" if len(bad) > 1 else "is"
        raise WeightsError(
            f"{weights} does not fit the model of this configuration: {bad[0]} {more} missing or "
            "of another shape; name the configuration of the weights with --config"
        )
    return model.eval()
