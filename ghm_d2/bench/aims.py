"""The ratios that sum a benchmark of the losses up, and what this project aims at for each."""

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass

HEADLINE = 8_000_000  # samples: 100,000 anchors of 80 classes
CLASSES, POSITIVES = 80, 4_000
GROWTH = (1_000_000, 100_000_000)  # samples between which time per sample is to stay the same
_MET = {"<=": operator.le, ">=": operator.ge}

# time of one over time of another: an aim, and the device that it is for ("" is any)
TIMES = (
    ("GHM-C", "fvcore focal jit", "<=", 0.10, "cpu"),
    ("GHM-C", "mmdet GHM-C", "<=", 0.08, "cpu"),
    ("fvcore focal jit", "GHM-C", ">=", 5, "cuda"),
    ("mmdet GHM-C", "GHM-C", ">=", 30, "cuda"),
    ("GHM-C", "torch BCE", "<=", 1.6, ""),
    ("exact GHM-C", "GHM-C", ">=", 16, ""),
    ("GHM-R", "mmdet GHM-R", "<=", 0.25, ""),
)


@dataclass
class Ratio:
    """One figure beside its aim.

    Attributes:
        samples: of the measurement.
        aim: such as "<= 1.6"; None where the setting is not the one that the aim is for.
        met: None without an aim.
    """

    name: str
    value: float
    samples: int
    aim: str | None = None
    met: bool | None = None


def ratios(results: Sequence, setting) -> list[dict]:
    """Those ratios whose parts were measured, at the headline's size or else the largest.

    The aims are for float32, 80 classes and 4,000 positives at 8,000,000 samples.

    Args:
        results: `bench.Result`s.
        setting: a `bench.Setting`.
    """
    by_peer = _at_one_size(results)
    device = setting.device.partition(":")[0]
    found = []
    for name, other, sign, number, only_on in TIMES:
        a, b = by_peer.get(name), by_peer.get(other)
        if a and b and only_on in ("", device):
            value = a.seconds / b.seconds
            found.append(_ratio(f"{name} / {other}, time", value, a, sign, number, setting))
    if ghm_c := by_peer.get("GHM-C"):
        name = "GHM-C, extra memory / gradient"
        found.append(_ratio(name, ghm_c.memory, ghm_c, "<=", 1.3, setting))
        if device == "cuda":
            name = "GHM-C, share of the copy's bandwidth"
            found.append(_ratio(name, ghm_c.share_of_copy, ghm_c, ">=", 0.70, setting))
    return [asdict(ratio) for ratio in (*found, *_growth(results, setting))]


def _at_one_size(results) -> dict:
    """The result of each peer at the headline's size, or at the largest that was measured."""
    measured = sorted((r for r in results if r.seconds), key=lambda r: r.samples)
    sizes = {r.samples for r in measured if r.kind != "boxes"}
    size = HEADLINE if HEADLINE in sizes else max(sizes, default=None)
    return {r.peer: r for r in measured if r.kind == "boxes" or r.samples == size}


def _ratio(name, value, result, sign, number, setting) -> Ratio:
    boxes = result.kind == "boxes"
    at = result.samples == (4 * POSITIVES if boxes else HEADLINE)
    if not (at and setting.dtype == "float32" and setting.classes == CLASSES):
        return Ratio(name, value, result.samples)
    return Ratio(name, value, result.samples, f"{sign} {number}", _MET[sign](value, number))


def _growth(results, setting) -> list[Ratio]:
    """The largest time per sample of GHM-C over the smallest, among the sizes in GROWTH."""
    low, high = GROWTH
    of_ours = [r for r in results if r.peer == "GHM-C" and r.seconds and low <= r.samples <= high]
    if len(of_ours) < 2:
        return []
    each = [r.seconds / r.elements for r in of_ours]
    sizes = [r.samples for r in of_ours]
    name = f"GHM-C, growth of time per sample, {min(sizes):,} to {max(sizes):,} samples"
    ratio = Ratio(name, max(each) / min(each), max(sizes))
    if {low, high} <= set(sizes) and setting.dtype == "float32" and setting.classes == CLASSES:
        ratio.aim, ratio.met = "<= 1.2", ratio.value <= 1.2
    return [ratio]
