"""TEST.PRECISE_BN: recomputes batch norm's statistics before each evaluation."""

from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from fvcore.nn.precise_bn import get_bn_modules

from ghm_d2.data.loading.loaders import build_train_loader, raise_on_bad_image, take_faults


class SeededPreciseBN(hooks.PreciseBN):
    """Detectron2's hook, whose result depends only on the weights, SEED and the iteration.

    A resumed run therefore computes the same statistics. The batches are those that training would
    see next. Other buffers that a forward pass changes, such as GHM's moving averages, are
    restored.
    """

    def __init__(self, cfg, model):
        """
        Args:
            cfg: gives SEED, the training data, TEST.EVAL_PERIOD and TEST.PRECISE_BN.
            model: in training mode.
        """
        super().__init__(cfg.TEST.EVAL_PERIOD, model, None, cfg.TEST.PRECISE_BN.NUM_ITER)
        self._cfg = cfg.clone()
        self._cfg.defrost()
        self._cfg.DATALOADER.NUM_WORKERS = 0  # as Detectron2 does, to save memory

    def after_step(self):
        """Compute the statistics if an evaluation follows."""
        if not self._disabled:  # a disabled hook of Detectron2 has no period
            super().after_step()

    def update_stats(self):
        """Compute the statistics; a model without batch norm in training mode is left alone."""
        if self._disabled:
            return
        done = self.trainer.iter + 1
        self._data_loader = self._data_loader or build_train_loader(self._cfg)
        self._data_iter = map(_readable, self._data_loader.after(done))
        norms = {id(b) for module in get_bn_modules(self._model) for b in module.buffers()}
        named = self._model.named_buffers()
        others = {name: b.clone() for name, b in named if id(b) not in norms}
        seed_all_rng(self._cfg.SEED + done + comm.get_rank())
        super().update_stats()
        for name, buffer in self._model.named_buffers():  # some are new tensors now
            if name in others:
                buffer.copy_(others[name])


def _readable(batch: list[dict]) -> list[dict]:
    take_faults(raise_on_bad_image(batch))
    return batch
