"""Refuse Detectron2's `DefaultTrainer` if it would ignore keys of a configuration."""

import inspect
import sys
from collections.abc import Iterator

from ghm_d2.errors import UsageError

_DETECTRON2 = "detectron2.engine.defaults"
_HOOKS = (_DETECTRON2, "ghm_d2.training.default_trainer")  # their build_hooks add none of ours


def check_trainer(cfg) -> None:
    """Check the trainer that builds a detector, ROI heads or an RPN from a configuration.

    Models are also built for prediction, for evaluation and by other training loops. Only the call
    stack shows that a `DefaultTrainer` is building this one. A derived class is responsible for the
    methods that it overrides: with its own `build_optimizer`, SOLVER.OPTIMIZER is not checked.

    Raises:
        UsageError: the trainer ignores keys that `cfg` sets; the message lists them and says how
            to change the configuration or the script.
    """
    trainer = _building_trainer()
    if trainer is None:
        return
    alone = [key for key in _keys_of_ghm_train(cfg) if _owner(trainer, "build_hooks") in _HOOKS]
    if alone:
        raise UsageError(
            f"{', '.join(alone)}: read only by `ghm train`, not by the trainer of this script; "
            "leave it out, or add a hook in build_hooks"
        )
    ignored = [key for method, key in _keys_set(cfg) if _owner(trainer, method) == _DETECTRON2]
    if ignored:
        raise UsageError(
            f"Detectron2's DefaultTrainer ignores {', '.join(ignored)}; write in your script "
            "`from ghm_d2.training.default_trainer import GHMDefaultTrainer as DefaultTrainer`"
        )


def _keys_set(cfg) -> Iterator[tuple[str, str]]:
    """List (trainer's method that should read the key, "KEY value") for each key that is set."""
    solver, clip, amp = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS, cfg.SOLVER.AMP
    clip_type = clip.CLIP_TYPE if clip.ENABLED else ""
    dtype = amp.DTYPE if amp.ENABLED else ""
    values = (  # the last: the values that Detectron2 supports
        ("build_model", "MODEL.COMPILE", cfg.MODEL.COMPILE, (False,)),
        ("build_optimizer", "SOLVER.OPTIMIZER", solver.OPTIMIZER, ("SGD",)),
        ("build_optimizer", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip_type, ("", "value", "norm")),
        ("build_train_loader", "INPUT.RESIZE", cfg.INPUT.RESIZE, ("shortest_edge",)),
        ("build_train_loader", "INPUT.AUGMENTATION", cfg.INPUT.AUGMENTATION, ("",)),
        ("build_train_loader", "INPUT.MOSAIC", cfg.INPUT.MOSAIC, (0.0,)),
        ("build_train_loader", "INPUT.MIXUP", cfg.INPUT.MIXUP, (0.0,)),
        ("run_step", "SOLVER.ACCUMULATE", solver.ACCUMULATE, (1,)),
        ("run_step", "SOLVER.AMP.DTYPE", dtype, ("", "float16")),
        ("run_step", "SOLVER.ON_DIVERGENCE", solver.ON_DIVERGENCE, ("stop",)),
    )
    for method, key, value, theirs in values:
        if value not in theirs:
            yield method, f"{key} {value}"


def _keys_of_ghm_train(cfg) -> Iterator[str]:
    """List "KEY value" for each key that is set and that only hooks of `ghm train` read."""
    for name, off in (("EMA_DECAY", 0), ("PATIENCE", 0), ("CHECKPOINTS_KEPT", 0), ("TRACKERS", ())):
        value = cfg.SOLVER[name]
        if value != off and list(value if name == "TRACKERS" else [value]):
            yield f"SOLVER.{name} {value}"


def _building_trainer():
    """Return the `DefaultTrainer` whose constructor is running; None if there is none."""
    defaults = sys.modules.get("detectron2.engine.defaults")
    frame = inspect.currentframe() if defaults else None
    while frame is not None:
        if frame.f_code is defaults.DefaultTrainer.__init__.__code__:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def _owner(trainer, method: str) -> str:
    """Return the name of the module whose class defines the trainer's method."""
    return next(base for base in type(trainer).__mro__ if method in vars(base)).__module__
