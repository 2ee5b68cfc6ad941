"""`GHMDefaultTrainer`: for training scripts that are written for Detectron2's `DefaultTrainer`."""

import logging
import weakref

from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer

from ghm_d2.config import check_config
from ghm_d2.data.loading.loaders import GHMDatasetMapper, build_train_loader, raise_on_bad_image
from ghm_d2.modeling.weights.checkpointer import GHMCheckpointer
from ghm_d2.training.optimizer import build_optimizer
from ghm_d2.training.prepare import choose_seed, scale_to_group, speed_up
from ghm_d2.training.trainer import GHMTrainer


class GHMDefaultTrainer(DefaultTrainer):
    """Detectron2's `DefaultTrainer` with the steps, optimizer, loaders and weights of `ghm train`.

    A script changes one line, whether it uses the class or derives one from it:

        from ghm_d2.training.default_trainer import GHMDefaultTrainer as DefaultTrainer

    Hooks, logs and evaluation stay Detectron2's. A resumed run restarts the order of its images, as
    in Detectron2; `ghm train --resume` continues it.
    """

    def __init__(self, cfg):
        """
        Args:
            cfg: Detectron2's keys and ours; it is not changed.

        Raises:
            UsageError: a value that `check_config` refuses, or a batch that cannot be divided
                among the processes and SOLVER.ACCUMULATE.
        """
        check_config(cfg)
        cfg = cfg.clone()
        cfg.defrost()
        choose_seed(cfg)
        cfg, _ = scale_to_group(cfg)
        super().__init__(cfg)
        loader, optimizer = self.data_loader, self.optimizer
        tell = logging.getLogger("detectron2").warning
        self._trainer = GHMTrainer(cfg, self.model, loader, optimizer, tell=tell)

    def run_step(self):
        """Run one step of `GHMTrainer`."""
        self._trainer.iter, self._trainer.storage = self.iter, self.storage
        self._trainer.run_step()
        self._trainer.step_done()

    def build_hooks(self):
        """Build Detectron2's hooks, with a checkpointer that reads files as data."""
        self.checkpointer = GHMCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        return super().build_hooks()

    @classmethod
    def build_model(cls, cfg):
        """Build the model and apply `speed_up` like `ghm train`, so that rounding is the same."""
        return speed_up(super().build_model(cfg), cfg)

    @classmethod
    def build_optimizer(cls, cfg, model):
        """Build the optimizer that SOLVER.OPTIMIZER and SOLVER.CLIP_GRADIENTS name."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        """Build the training loader, with INPUT.RESIZE and INPUT.AUGMENTATION."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        """Build the test loader; an image that cannot be read raises DataError."""
        mapper = GHMDatasetMapper(cfg, False)
        return build_detection_test_loader(
            cfg, dataset_name, mapper=mapper, collate_fn=raise_on_bad_image
        )

    def state_dict(self):
        return super().state_dict() | {"_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if "_trainer" in state_dict:  # not in a checkpoint of Detectron2 0.6
            self._trainer.load_state_dict(state_dict["_trainer"])
