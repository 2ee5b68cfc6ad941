"""The weights of unit regions as a Triton kernel: `losses.density.GradientDensity` in one launch.

A few hundred numbers at most: what it saves are the launches of some twenty operations.
"""

import triton
import triton.language as tl


@triton.jit
def density_kernel(
    weights, counts, ema, num_updates, LEVELS: tl.constexpr, BINS: tl.constexpr,
    SLOTS: tl.constexpr, MOMENTUM: tl.constexpr, LOG_MOMENTUM: tl.constexpr,
    NORMALIZER: tl.constexpr, EMA_INIT: tl.constexpr, TRAINING: tl.constexpr, WORLD: tl.constexpr,
):  # fmt: skip
    """A program updates one row of the average with LEVELS rows of counts in turn."""
    row, slot = tl.program_id(0), tl.arange(0, SLOTS)
    inside = slot < BINS
    state = row * BINS + slot
    # written out, a number would be a float32
    moving = tl.full((1,), 1 - MOMENTUM, tl.float64)
    average = tl.load(ema + state, inside, other=0).to(tl.float64)
    updates = tl.load(num_updates + state, inside, other=0)
    for level in range(row * LEVELS, (row + 1) * LEVELS):
        new = tl.load(counts + level * BINS + slot, inside, other=0).to(tl.float64)
        present = new > 0
        smooth = new
        if MOMENTUM > 0:
            if TRAINING:
                moved = average + moving * (new - average)
                if EMA_INIT == "first":
                    moved = tl.where(updates == 0, new, moved)
                average = tl.where(present, moved, average)
                updates += present.to(tl.int64)
            smooth = average
            if EMA_INIT == "debias":
                log_momentum = tl.full((1,), LOG_MOMENTUM, tl.float64)
                smooth /= 1 - tl.exp(log_momentum * updates.to(tl.float64))
            # a region first met in evaluation has no average yet
            smooth = tl.where(updates == 0, new, smooth)
        n = BINS
        if NORMALIZER == "valid_bins":
            n = tl.maximum(tl.sum(present.to(tl.int32), axis=0), 1)
        weight = tl.where(present, WORLD / (n * smooth), 0)
        tl.store(weights + level * BINS + slot, weight, inside)
    if TRAINING:
        tl.store(ema + state, average, inside)
        tl.store(num_updates + state, updates, inside)
