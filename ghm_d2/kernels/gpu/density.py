"""The weights of unit regions as a Triton kernel: `reference.update_density` in one launch.

It computes a few hundred numbers at most, and saves the launches of about twenty operations.
"""

import triton
import triton.language as tl


@triton.jit
def _prior_count(
    foreground, ema_foreground, moving, MOMENTUM: tl.constexpr, PRIOR: tl.constexpr,
    EMA_INIT: tl.constexpr, TRAINING: tl.constexpr,
):  # fmt: skip
    """Return c for this row, and update the averages of the foreground samples and of 1."""
    row = tl.program_id(0) + tl.arange(0, 1)
    first = 2 * row
    number = tl.load(foreground + row).to(tl.float64)
    if MOMENTUM > 0:
        average = tl.load(ema_foreground + first).to(tl.float64)
        seen = tl.load(ema_foreground + 1 + first).to(tl.float64)
        if TRAINING:
            if EMA_INIT == "first":
                moving = tl.where(seen == 0, 1.0, moving)
            average += moving * (number - average)
            seen += moving * (1 - seen)
            tl.store(ema_foreground + first, average)
            tl.store(ema_foreground + 1 + first, seen)
        if EMA_INIT == "debias":
            average /= seen
        number = tl.where(seen == 0, number, average)
    return tl.full((1,), PRIOR, tl.float64) * tl.maximum(number, 1.0)


@triton.jit
def density_kernel(
    weights, counts, foreground, ema, num_updates, ema_foreground, LEVELS: tl.constexpr,
    BINS: tl.constexpr, SLOTS: tl.constexpr, MOMENTUM: tl.constexpr, LOG_MOMENTUM: tl.constexpr,
    PRIOR: tl.constexpr, NORMALIZER: tl.constexpr, EMA_INIT: tl.constexpr, TRAINING: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    """Each program updates one row of the average with LEVELS rows of counts in turn."""
    row, slot = tl.program_id(0), tl.arange(0, SLOTS)
    inside = slot < BINS
    state = row * BINS + slot
    # a literal would be a float32
    moving = tl.full((1,), 1 - MOMENTUM, tl.float64)
    factor = tl.full((1,), FACTOR, tl.float64)
    average = tl.load(ema + state, inside, other=0).to(tl.float64)
    updates = tl.load(num_updates + state, inside, other=0)
    c = tl.zeros((1,), tl.float64)
    if PRIOR > 0:
        c = _prior_count(foreground, ema_foreground, moving, MOMENTUM, PRIOR, EMA_INIT, TRAINING)
    for level in range(row * LEVELS, (row + 1) * LEVELS):
        new = tl.load(counts + level * BINS + slot, inside, other=0).to(tl.float64)
        present = new > 0
        smooth = new
        if MOMENTUM > 0:
            if TRAINING:
                moved = average + moving * (new - average)
                if EMA_INIT == "first":
                    moved = tl.where(updates == 0, new, moved)
                moves = inside if PRIOR > 0 else present
                average = tl.where(moves, moved, average)
                updates += moves.to(tl.int64)
            smooth = average
            if EMA_INIT == "debias":
                log_momentum = tl.full((1,), LOG_MOMENTUM, tl.float64)
                smooth /= 1 - tl.exp(log_momentum * updates.to(tl.float64))
            # a region first met in evaluation has no average yet
            smooth = tl.where(updates == 0, new, smooth)
        smooth += c
        n = BINS
        if NORMALIZER == "valid_bins":
            n = tl.maximum(tl.sum(present.to(tl.int32), axis=0), 1)
        elif NORMALIZER == "weights":
            n = tl.sum(tl.where(present, new / smooth, 0), axis=0)
        weight = tl.where(present, factor / (n * smooth), 0)
        tl.store(weights + level * BINS + slot, weight, inside)
    if TRAINING:
        tl.store(ema + state, average, inside)
        tl.store(num_updates + state, updates, inside)
