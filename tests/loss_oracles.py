"""GHM written down from the paper, one sample at a time, in Python's double precision."""

import math

import pytest
import torch

from ghm_d2.losses import SoftmaxGHMC

CLASSES = 4


def columns(kind):
    return CLASSES + (kind is SoftmaxGHMC)


def batch(kind, rows, generator, dtype=torch.float64, spread=3.0):
    """Logits, and labels of every sort: classes, background and ignored."""
    logits = spread * torch.randn(rows, columns(kind), generator=generator, dtype=dtype)
    labels = torch.randint(-1, CLASSES + 1, (rows,), generator=generator)
    return logits.requires_grad_(), labels


class Density:
    """S_k of each unit region, and the weight beta / N of a sample in it."""

    def __init__(self, bins, momentum, scope, normalizer, ema_init, levels, prior=0):
        self.bins, self.momentum, self.prior = bins, momentum, prior
        self.scope, self.normalizer, self.ema_init = scope, normalizer, ema_init
        self.average = [[0.0] * bins for _ in range(levels)]
        self.updates = [[0] * bins for _ in range(levels)]
        self.foreground, self.foreground_updates = 0.0, 0

    def weights(self, counts, training=True, foreground=0):
        """A weight for each level and region from the counts R of each level and region."""
        levels = len(counts)
        if self.scope == "batch":
            counts = [[sum(column) for column in zip(*counts, strict=True)]]
        c = self._prior_count(foreground, training) if self.prior else 0
        weights = [self._level(i, row, training, c) for i, row in enumerate(counts)]
        return weights * levels if self.scope == "batch" else weights

    def _level(self, level, counts, training, c):
        row = level if self.scope == "level_ema" else 0
        weights = [0.0] * self.bins
        for k in range(self.bins):
            if training and (counts[k] > 0 or self.prior):
                self._update(row, k, counts[k])
            if counts[k] > 0:
                weights[k] = 1 / (self._smooth(row, k, counts[k]) + c)
        n = {
            "bins": self.bins,
            "valid_bins": sum(count > 0 for count in counts),
            "weights": sum(w * count for w, count in zip(weights, counts, strict=True)),
        }[self.normalizer]
        return [w / n if w else 0.0 for w in weights]

    def _update(self, row, k, count):
        old, t = self.average[row][k], self.updates[row][k]
        self.average[row][k] = self._moved(old, t, count)
        self.updates[row][k] += 1

    def _smooth(self, row, k, count):
        return self._read(self.average[row][k], self.updates[row][k], count)

    def _prior_count(self, new, training):
        if training:
            self.foreground = self._moved(self.foreground, self.foreground_updates, new)
            self.foreground_updates += 1
        return self.prior * max(self._read(self.foreground, self.foreground_updates, new), 1)

    def _moved(self, old, t, new):
        if self.ema_init == "first" and t == 0:
            old = new
        return self.momentum * old + (1 - self.momentum) * new

    def _read(self, average, t, new):
        if self.momentum == 0 or t == 0:
            return new
        return average / (1 - self.momentum**t) if self.ema_init == "debias" else average


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def bce(x, t):
    return max(x, 0) - x * t + math.log1p(math.exp(-abs(x)))


def sigmoid_samples(logits, labels):
    """{(row, column): (l, g, dl/dx)} of the rows that are not ignored."""
    samples = {}
    for i, (row, label) in enumerate(zip(logits, labels, strict=True)):
        for j, x in enumerate(row):
            if label >= 0:
                t = float(label == j)
                samples[i, j] = (bce(x, t), abs(sigmoid(x) - t), {(i, j): sigmoid(x) - t})
    return samples


def softmax_samples(logits, labels):
    samples = {}
    for i, (row, label) in enumerate(zip(logits, labels, strict=True)):
        if label < 0:
            continue
        top = max(row)
        total = sum(math.exp(x - top) for x in row)
        p = [math.exp(x - top) / total for x in row]
        gradient = {(i, j): p[j] - (j == label) for j in range(len(row))}
        loss = top + math.log(total) - row[label]
        samples[i] = (loss, sum(abs(v) for v in gradient.values()) / 2, gradient)
    return samples


def asl1_samples(pred, target, valid, mu):
    samples = {}
    for i, row in enumerate(pred):
        for j, x in enumerate(row):
            if valid[i][j]:
                d = x - target[i][j]
                root = math.sqrt(d * d + mu * mu)
                samples[i, j] = (root - mu, abs(d) / root, {(i, j): d / root})
    return samples


def harmonized(levels, density, training=True, *foreground):
    """Loss and gradient ({index: value}) of each level from its samples."""
    index = [
        {key: min(math.floor(g * density.bins), density.bins - 1) for key, (_, g, _) in s.items()}
        for s in levels
    ]
    counts = [[list(i.values()).count(k) for k in range(density.bins)] for i in index]
    results = []
    for samples, regions, weights in zip(
        levels, index, density.weights(counts, training, *foreground), strict=True
    ):
        loss, gradient = 0.0, {}
        for key, (value, _, slopes) in samples.items():
            weight = weights[regions[key]]
            loss += weight * value
            for at, slope in slopes.items():
                gradient[at] = gradient.get(at, 0.0) + weight * slope
        results.append((loss, gradient))
    return results


def assert_oracle(logits, losses, expected):
    """Losses and their gradients, a level at a time."""
    for x, loss, (value, gradient) in zip(logits, losses, expected, strict=True):
        (actual,) = torch.autograd.grad(loss, x)
        dense = torch.zeros_like(x)
        for at, slope in gradient.items():
            dense[at] = slope
        assert loss.item() == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(actual, dense, rtol=1e-10, atol=1e-14)
