"""Figures of the second half of a training, read from its log files."""

import json
import statistics
from pathlib import Path

import numpy as np

from ghm_d2.run_folder import DENSITY_FILE, METRICS_FILE
from ghm_d2.training.metrics.gradient_ratio import GRADIENT_RATIO


def gradient_ratio(folder: Path, max_iter: int) -> float | None:
    """Return the median gradient ratio, classification over boxes, in metrics.jsonl, or None."""
    rows = _late_rows(folder / METRICS_FILE, max_iter)
    values = [row[GRADIENT_RATIO] for row in rows if row.get(GRADIENT_RATIO) is not None]
    return float(f"{statistics.median(values):.6g}") if values else None


def weight_variation(folder: Path, max_iter: int) -> dict[str, float]:
    """Return how much a sample's weight varies from batch to batch, by the density's name.

    For each unit region it is the standard deviation of a sample's weight, divided by its mean,
    over the logged batches with samples there. The regions (of all logged classes, if each has a
    density) are averaged by their share of the gradient: samples x weight x the region's middle.
    Densities with fewer than two batches are left out.
    """
    rows = [row for row in _late_rows(folder / DENSITY_FILE, max_iter) if "weights" in row]
    found = {}
    for name in dict.fromkeys(row["density"] for row in rows):
        own = [row for row in rows if row["density"] == name]
        value = _variation(*(np.array([row[key] for row in own]) for key in ("counts", "weights")))
        if value is not None:
            found[name.removesuffix(".density")] = float(f"{value:.6g}")
    return found


def _variation(counts: np.ndarray, weights: np.ndarray) -> float | None:
    """Compute `weight_variation` of one density, from arrays (batches, classes, regions)."""
    variations, shares = [], []
    for j, k in np.ndindex(counts.shape[1:]):
        there = weights[counts[:, j, k] > 0, j, k]
        if len(there) > 1:
            variations.append(there.std(ddof=1) / there.mean())
            shares.append((counts[:, j, k] * weights[:, j, k]).sum() * (k + 0.5))
    return float(np.average(variations, weights=shares)) if variations else None


def _late_rows(file: Path, max_iter: int) -> list[dict]:
    if not file.is_file():
        return []
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if 2 * row["iteration"] >= max_iter]
