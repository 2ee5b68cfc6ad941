"""Random pictures, and the seeds of the generators that augment them."""

import numpy as np
import torch


def noise(height, width, channels=3):
    shape = (height, width, channels)[: 3 if channels > 1 else 2]
    return np.random.default_rng(height + width).integers(0, 256, shape, np.uint8)


def seed(value):
    np.random.seed(value)
    torch.manual_seed(value)
