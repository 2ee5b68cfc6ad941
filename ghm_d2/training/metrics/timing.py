"""Estimates how long a training will take, from a few of its steps."""

import statistics
import time

import torch
from detectron2.utils.events import EventStorage

from ghm_d2.data.loading.loaders import build_test_loader, raise_on_bad_image
from ghm_d2.errors import DivergedError
from ghm_d2.progress import Progress
from ghm_d2.training.train import set_up

WARM_UP, STEPS, IMAGES = 2, 3, 3


def time_steps(cfg) -> tuple[float, float]:
    """Return the seconds per iteration and per evaluated image, each the median of three.

    Nothing is written. The detector is not trained yet, so it may have more detections to sort out
    than a trained one. A training that diverges is timed until then.

    Args:
        cfg: as for `training.train.train`.

    Raises:
        UsageError, DataError, WeightsError: as training would.
    """
    trainer, *_ = set_up(cfg, resume=False, progress=Progress())
    seconds = []
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(WARM_UP + STEPS):
            start = time.perf_counter()
            try:
                trainer.run_step()
            except DivergedError:
                seconds = seconds or [time.perf_counter() - start]
                break
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:] or seconds), _seconds_per_image(trainer.model, cfg)


@torch.no_grad()
def _seconds_per_image(model, cfg) -> float:
    model.eval()
    seconds, start = [], time.perf_counter()
    for i, batch in enumerate(build_test_loader(cfg, cfg.DATASETS.TEST[0])):
        model(raise_on_bad_image(batch))
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        if i + 1 == IMAGES:
            break
    return statistics.median(seconds)
