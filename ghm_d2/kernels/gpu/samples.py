"""The device code of the losses in `ghm.py`: one sample, a block of samples, and the passes.

`_block` gives the unit region, loss l and gradient of each sample in a block. The kernels count the
regions, add up the weighed losses, or write the gradients. Tensors are contiguous.

One launch covers all feature levels: an argument of which each level has its own is a tuple, and
each program works on one level.
"""

import triton
import triton.language as tl

# --- one sample ---


@triton.jit
def _load(address, mask):
    x = tl.load(address, mask, other=0)
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def _nan_unless_finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, float("nan"))


@triton.jit
def _logistic(s):
    """softplus(s), sigmoid(s) and sigmoid(-s), each accurate relative to its value."""
    e = tl.exp(-tl.abs(s))
    # log(1 + e) = 2 artanh(z), z in [0, 1/3], since 1 + e would round a small e away
    z = e / (2 + e)
    series = tl.zeros_like(z)
    if z.dtype == tl.float64:
        for k in tl.static_range(17):
            series = series * (z * z) + 1.0 / (33 - 2 * k)
    else:
        for k in tl.static_range(8):
            series = series * (z * z) + 1.0 / (15 - 2 * k)
    larger, smaller = 1 / (1 + e), e / (1 + e)
    negative = s < 0
    softplus = tl.maximum(s, 0) + 2 * z * series
    return softplus, tl.where(negative, smaller, larger), tl.where(negative, larger, smaller)


@triton.jit
def _sigmoid_sample(x, own, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    """Return l, g = |p - t| and dl/dx of focal loss, where `own` is t; ALPHA < 0 and GAMMA = 0
    make it cross entropy."""
    # with s = x for t = 0 and s = -x for t = 1, BCE is softplus(s) and |p - t| is sigmoid(s)
    s = _nan_unless_finite(tl.where(own, -x, x))
    loss, g, rest = _logistic(s)
    slope = g
    if GAMMA > 0:
        factor = g * g
        if GAMMA != 2:
            factor = tl.exp(GAMMA * (s - loss))  # g^GAMMA, as log(g) = s - softplus(s)
        slope = factor * (GAMMA * rest * loss + g)
        loss = factor * loss
    if ALPHA >= 0:
        alpha, others = tl.full((1,), ALPHA, s.dtype), tl.full((1,), 1 - ALPHA, s.dtype)
        factor = tl.where(own, alpha, others)
        loss, slope = factor * loss, factor * slope
    return loss, g, tl.where(own, -slope, slope)


@triton.jit
def _asl1_sample(d, mu):
    """Return l (equation 9) and dl/dd, whose absolute value is g."""
    d = _nan_unless_finite(d)
    size, mu = tl.abs(d), mu.to(d.dtype)
    ratio = tl.minimum(size, mu) / tl.maximum(size, mu)
    root = tl.maximum(size, mu) * tl.sqrt(1 + ratio * ratio)  # d * d may overflow
    return d * (d / (root + mu)), d / root


@triton.jit
def _unit_region(g, valid, BINS: tl.constexpr):
    """floor(g * M), the last region closed (section 3.3); 0 for NaN, and M where not valid."""
    scaled = tl.where(g == g, g * BINS, 0)  # NaN has no defined integer value
    return tl.where(valid, tl.minimum(scaled.to(tl.int32), BINS - 1), BINS)


# --- a block of samples: offset and mask of its elements; unit region, l and gradient ---


@triton.jit
def _block(
    block, x, target, valid, mu, numel, KIND: tl.constexpr, COLUMNS: tl.constexpr,
    BINS: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the column of each sample too. A softmax sample is a row of elements."""
    if KIND == "softmax":
        offset, inside, region, loss, slope = _softmax_block(
            block, x, target, numel, COLUMNS, BINS, BLOCK, WIDTH
        )
        column = region * 0
    elif KIND == "sigmoid":
        offset, inside, column, region, loss, slope = _sigmoid_block(
            block, x, target, numel, COLUMNS, BINS, ALPHA, GAMMA, BLOCK
        )
    else:
        offset, inside, counted, d = _differences(block, x, target, valid, numel, BLOCK)
        loss, slope = _asl1_sample(d, tl.load(mu))
        region = _unit_region(tl.abs(slope), counted, BINS)
        column = region * 0
    return offset, inside, column, region, loss, slope


@triton.jit
def _sigmoid_block(
    block, logits, labels, numel, COLUMNS: tl.constexpr, BINS: tl.constexpr,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.cast(block, tl.int64) * BLOCK
    offset = first + tl.arange(0, BLOCK)
    inside = offset < numel
    row = first // COLUMNS
    # only scalars are divided in 64 bits
    within = (first - row * COLUMNS).to(tl.int32) + tl.arange(0, BLOCK)
    label = tl.load(labels + (row + within // COLUMNS), inside, other=-1)
    column = within % COLUMNS
    own = column == label
    loss, g, slope = _sigmoid_sample(_load(logits + offset, inside), own, ALPHA, GAMMA)
    return offset, inside, column, _unit_region(g, label >= 0, BINS), loss, slope


@triton.jit
def _differences(block, pred, target, valid, numel, BLOCK: tl.constexpr):
    """Return offset and mask of a block of coordinates, their validity, and pred - target."""
    offset = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < numel
    counted = tl.load(valid + offset, inside, other=0) != 0
    return offset, inside, counted, _load(pred + offset, inside) - _load(target + offset, inside)


@triton.jit
def _softmax_block(
    block, logits, labels, rows, COLUMNS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Unit region and l are per row, the other results per logit."""
    row = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)[None, :]
    label = tl.load(labels + row, row < rows, other=-1)
    own = column == tl.minimum(label, COLUMNS - 1)[:, None]
    offset = row[:, None] * COLUMNS + column
    inside = (row < rows)[:, None] & (column < COLUMNS)
    x = _load(logits + offset, inside)
    finite = x < float("inf")  # -inf is a probability of 0
    x = tl.where(finite, x, 0)
    # Let s be the log-sum-exp of the other logits minus the label's logit. Then l = softplus(s)
    # and 1 - p_y = sigmoid(s), without cancellation even if p_y is near 1.
    others = tl.where(inside & ~own, x, -float("inf"))
    top = tl.max(others, axis=1)
    e = tl.where(others > -float("inf"), tl.exp(others - top[:, None]), 0)
    total = tl.sum(e, axis=1)  # at least 1, or 0 if there is no other class
    own_x = tl.sum(tl.where(own, x, 0), axis=1)
    s = top - own_x + tl.log(total)
    # without another class the loss is 0, or NaN if the label's logit is -inf too
    s = tl.where(total > 0, s, tl.where(own_x > -float("inf"), -1e9, float("nan")))
    s = tl.where(tl.min(finite.to(tl.int32), axis=1) > 0, s, float("nan"))
    loss, g, _ = _logistic(s)
    slope = g[:, None] * tl.where(own, -1, e / total[:, None])
    return offset, inside, _unit_region(g, label >= 0, BINS), loss, slope


# --- the level of a program ---


@triton.jit
def _place(starts, LEVELS: tl.constexpr):
    """Return the level of this program, its index among the level's programs, and their number.

    starts: the first program of each level, and the number of all programs, times 16.
    """
    program = tl.program_id(0)
    level = 0
    for i in tl.static_range(1, LEVELS):
        level += (program >= (starts[i] >> 4)).to(tl.int32)
    first, end = starts[0] >> 4, starts[1] >> 4
    for i in tl.static_range(1, LEVELS):
        first = tl.where(level == i, starts[i] >> 4, first)
        end = tl.where(level == i, starts[i + 1] >> 4, end)
    return level, program - first, end - first


@triton.jit
def _select_level(level, values, LEVELS: tl.constexpr):
    """Return the value of a level, a number or a pointer."""
    found = values[0]
    for i in tl.static_range(1, LEVELS):
        found = tl.where(level == i, values[i], found)
    return found


@triton.jit
def _inputs(
    level, x, target, valid, rows, LEVELS: tl.constexpr, PER_ROW: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return the tensors of a level, and the number of its samples, PER_ROW times its rows.

    The compiler loads several numbers at a time only if it knows that the number of samples is a
    multiple of so many: because of PER_ROW, or if ALIGNED.
    """
    numel = tl.cast(_select_level(level, rows, LEVELS) >> 4, tl.int64) * PER_ROW
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
    return (
        _select_level(level, x, LEVELS),
        _select_level(level, target, LEVELS),
        _select_level(level, valid, LEVELS),
        numel,
    )


# --- kernels: a few programs, each of which processes many blocks of its level ---


@triton.jit
def count_kernel(
    counts, x, target, valid, mu, rows, starts, LEVELS: tl.constexpr, ALIGNED: tl.constexpr,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, PER_ROW: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Adds to counts (LEVELS, BINS)."""
    level, first, step = _place(starts, LEVELS)
    x, target, valid, numel = _inputs(level, x, target, valid, rows, LEVELS, PER_ROW, ALIGNED)
    slot = tl.arange(0, SLOTS)
    found = tl.zeros((SLOTS,), tl.int64)
    for block in range(first, tl.cdiv(numel, BLOCK).to(tl.int32), step):
        _, _, _, region, _, _ = _block(
            block, x, target, valid, mu, numel, KIND, COLUMNS, BINS, -1.0, 0.0, BLOCK, WIDTH
        )
        if KIND == "softmax":  # some Triton versions count the result of a reduction twice
            found += tl.sum((region[:, None] == slot[None, :]).to(tl.int32), axis=0)
        else:
            found += tl.histogram(region, SLOTS)
    # integers: the same sum in any order
    tl.atomic_add(counts + level * BINS + slot, found, slot < BINS)


@triton.jit
def count_by_class_kernel(
    counts, logits, labels, rows, starts, LEVELS: tl.constexpr, COLUMNS: tl.constexpr,
    BINS: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Adds to counts (LEVELS, COLUMNS, BINS); a program handles CLASSES columns."""
    level, first, step = _place(starts, LEVELS)
    logits, labels = _select_level(level, logits, LEVELS), _select_level(level, labels, LEVELS)
    rows = _select_level(level, rows, LEVELS) >> 4
    column = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    slot = tl.arange(0, CLASSES * SLOTS)
    found = tl.zeros((CLASSES * SLOTS,), tl.int64)
    for block in range(first, tl.cdiv(rows, ROWS), step):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        label = tl.load(labels + row, row < rows, other=-1)[:, None]
        inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
        x = _load(logits + row[:, None] * COLUMNS + column[None, :], inside)
        _, g, _ = _sigmoid_sample(x, column[None, :] == label, -1.0, 0.0)
        region = _unit_region(g, inside & (label >= 0), BINS)
        region += tl.arange(0, CLASSES)[None, :] * SLOTS
        found += tl.histogram(tl.reshape(region, (ROWS * CLASSES,)), CLASSES * SLOTS)
    of, region = tl.program_id(1) * CLASSES + slot // SLOTS, slot % SLOTS
    counts += (level * COLUMNS + of) * BINS + region
    tl.atomic_add(counts, found, (of < COLUMNS) & (region < BINS))


@triton.jit
def total_kernel(
    sums, weights, x, target, valid, mu, rows, starts, LEVELS: tl.constexpr,
    ALIGNED: tl.constexpr, KIND: tl.constexpr, COLUMNS: tl.constexpr, PER_ROW: tl.constexpr,
    BINS: tl.constexpr, BY_CLASS: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the sum of weights[region] * l over the samples of each program."""
    level, first, step = _place(starts, LEVELS)
    x, target, valid, numel = _inputs(level, x, target, valid, rows, LEVELS, PER_ROW, ALIGNED)
    weights += level * BINS * (COLUMNS if BY_CLASS else 1)
    found = tl.zeros((1,), tl.float64)
    for block in range(first, tl.cdiv(numel, BLOCK).to(tl.int32), step):
        _, _, column, region, loss, _ = _block(
            block, x, target, valid, mu, numel, KIND, COLUMNS, BINS, ALPHA, GAMMA, BLOCK, WIDTH
        )
        weight = _weight(weights, column, region, BINS, BY_CLASS).to(loss.dtype)
        found += tl.sum(tl.where(region < BINS, weight * loss, 0), axis=0)
    tl.store(sums + tl.program_id(0) + tl.arange(0, 1), found)


@triton.jit
def gradient_kernel(
    gradient, weights, scale, x, target, valid, mu, rows, starts, LEVELS: tl.constexpr,
    ALIGNED: tl.constexpr, KIND: tl.constexpr, COLUMNS: tl.constexpr, PER_ROW: tl.constexpr,
    BINS: tl.constexpr, BY_CLASS: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    level, first, step = _place(starts, LEVELS)
    x, target, valid, numel = _inputs(level, x, target, valid, rows, LEVELS, PER_ROW, ALIGNED)
    gradient = _select_level(level, gradient, LEVELS)
    weights += level * BINS * (COLUMNS if BY_CLASS else 1)
    factor = tl.load(scale).to(tl.float64)
    for block in range(first, tl.cdiv(numel, BLOCK).to(tl.int32), step):
        offset, inside, column, region, _, slope = _block(
            block, x, target, valid, mu, numel, KIND, COLUMNS, BINS, ALPHA, GAMMA, BLOCK, WIDTH
        )
        weight = (_weight(weights, column, region, BINS, BY_CLASS) * factor).to(slope.dtype)
        counted = region < BINS
        if KIND == "softmax":
            weight, counted = weight[:, None], counted[:, None]
        # the slope of an ignored sample may be NaN
        tl.store(gradient + offset, tl.where(counted, weight * slope, 0), inside)


@triton.jit
def _weight(weights, column, region, BINS: tl.constexpr, BY_CLASS: tl.constexpr):
    index = region
    if BY_CLASS:
        index += column * BINS
    return tl.load(weights + index, region < BINS, other=0)


@triton.jit
def size_counts_kernel(
    counts, pred, target, valid, rows, starts, LEVELS: tl.constexpr, ALIGNED: tl.constexpr,
    PER_ROW: tl.constexpr, BINS: tl.constexpr, PER_OCTAVE: tl.constexpr, LOWEST: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Adds to counts (BINS,)."""
    level, first, step = _place(starts, LEVELS)
    pred, target, valid, numel = _inputs(level, pred, target, valid, rows, LEVELS, PER_ROW, ALIGNED)
    found = tl.zeros((SLOTS,), tl.int64)
    for block in range(first, tl.cdiv(numel, BLOCK).to(tl.int32), step):
        _, _, counted, d = _differences(block, pred, target, valid, numel, BLOCK)
        size = tl.abs(d)
        slot = (tl.log2(size) - LOWEST) * PER_OCTAVE
        slot = tl.minimum(tl.maximum(slot, 0), BINS - 1).to(tl.int32)
        slot = tl.where(counted & (size < float("inf")), slot, BINS)
        found += tl.histogram(slot, SLOTS)
    tl.atomic_add(counts + tl.arange(0, SLOTS), found, tl.arange(0, SLOTS) < BINS)
