"""The device code of `triton_ghm`'s losses: one sample, a block of samples, and both passes.

A `*_block` gives each of its samples' unit region, loss l and gradient; `*_regions_kernel` adds
the first two up, and `*_grad_kernel` writes the third. Tensors are contiguous.
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
    # log(1 + e) = 2 artanh(z), z in [0, 1/3], since 1 + e would lose what a small e holds
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
    """l, g = |p - t| and dl/dx, where `own` is t: focal loss, which is cross entropy without
    its factors (ALPHA < 0, GAMMA = 0)."""
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
    """l (equation 9) and dl/dd, whose size is g."""
    d = _nan_unless_finite(d)
    size, mu = tl.abs(d), mu.to(d.dtype)
    ratio = tl.minimum(size, mu) / tl.maximum(size, mu)
    root = tl.maximum(size, mu) * tl.sqrt(1 + ratio * ratio)  # d * d may overflow
    return d * (d / (root + mu)), d / root


@triton.jit
def _unit_region(g, valid, BINS: tl.constexpr):
    """floor(g * M), the last one closed (section 3.3); the first for NaN, M where not valid."""
    scaled = tl.where(g == g, g * BINS, 0)  # NaN is no integer in particular
    return tl.where(valid, tl.minimum(scaled.to(tl.int32), BINS - 1), BINS)


# --- a block of samples: their offset and presence, unit region, l and gradient ---


@triton.jit
def _sigmoid_block(
    block, logits, labels, numel, COLUMNS: tl.constexpr, BINS: tl.constexpr,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = block * BLOCK
    offset = first + tl.arange(0, BLOCK)
    inside = offset < numel
    row = first // COLUMNS
    # only scalars are divided in 64 bits
    within = (first - row * COLUMNS).to(tl.int32) + tl.arange(0, BLOCK)
    label = tl.load(labels + (row + within // COLUMNS), inside, other=-1)
    own = within % COLUMNS == label
    loss, g, slope = _sigmoid_sample(_load(logits + offset, inside), own, ALPHA, GAMMA)
    return offset, inside, _unit_region(g, label >= 0, BINS), loss, slope


@triton.jit
def _differences(block, pred, target, valid, numel, BLOCK: tl.constexpr):
    """Offset and presence of a block of coordinates, which of them count, and pred - target."""
    offset = block * BLOCK + tl.arange(0, BLOCK)
    inside = offset < numel
    counted = tl.load(valid + offset, inside, other=0) != 0
    return offset, inside, counted, _load(pred + offset, inside) - _load(target + offset, inside)


@triton.jit
def _asl1_block(block, pred, target, valid, mu, numel, BINS: tl.constexpr, BLOCK: tl.constexpr):
    offset, inside, counted, d = _differences(block, pred, target, valid, numel, BLOCK)
    loss, slope = _asl1_sample(d, tl.load(mu))
    return offset, inside, _unit_region(tl.abs(slope), counted, BINS), loss, slope


@triton.jit
def _softmax_block(
    block, logits, labels, rows, COLUMNS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Unit region and l are those of rows, the others those of logits."""
    row, column = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)[None, :]
    label = tl.load(labels + row, row < rows, other=-1)
    own = column == tl.minimum(label, COLUMNS - 1)[:, None]
    offset = row[:, None] * COLUMNS + column
    inside = (row < rows)[:, None] & (column < COLUMNS)
    x = _load(logits + offset, inside)
    finite = x < float("inf")  # -inf is a probability of 0
    x = tl.where(finite, x, 0)
    # With s the log-sum-exp of the other logits minus the label's own, l is softplus(s) and
    # 1 - p_y sigmoid(s): nothing cancels, however sure the row is.
    others = tl.where(inside & ~own, x, -float("inf"))
    top = tl.max(others, axis=1)
    e = tl.where(others > -float("inf"), tl.exp(others - top[:, None]), 0)
    total = tl.sum(e, axis=1)  # at least 1, or 0 where there is no other class
    own_x = tl.sum(tl.where(own, x, 0), axis=1)
    s = top - own_x + tl.log(total)
    # no other class: a loss of 0, unless there is no class at all
    s = tl.where(total > 0, s, tl.where(own_x > -float("inf"), -1e9, float("nan")))
    s = tl.where(tl.min(finite.to(tl.int32), axis=1) > 0, s, float("nan"))
    loss, g, _ = _logistic(s)
    slope = g[:, None] * tl.where(own, -1, e / total[:, None])
    return offset, inside, _unit_region(g, label >= 0, BINS), loss, slope


@triton.jit
def _tally(counts, sums, region, loss, SLOTS: tl.constexpr, HISTOGRAM: tl.constexpr):
    """Add a block's samples and losses to those of each unit region; the last slot is spare."""
    hit = region[:, None] == tl.arange(0, SLOTS)[None, :]
    if HISTOGRAM:
        counts += tl.histogram(region, SLOTS)
    else:  # slower, but also right for what a reduction left, where some Tritons count twice
        counts += tl.sum(hit.to(tl.int32), axis=0)
    sums += tl.sum(tl.where(hit, loss[:, None], 0), axis=0)
    return counts, sums


@triton.jit
def _store_tally(counts, sums, counts_out, sums_out, SLOTS: tl.constexpr):
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    tl.store(counts_out + slot, counts)
    tl.store(sums_out + slot, sums)


@triton.jit
def _store_gradient(gradient, weights, offset, inside, region, slope, BINS: tl.constexpr):
    weight = tl.load(weights + region, region < BINS, other=0).to(slope.dtype)
    # of an ignored sample, the slope may be NaN
    tl.store(gradient + offset, tl.where(region < BINS, weight * slope, 0), inside)


# --- kernels: pass 1 with a limited number of programs, pass 2 with one a block ---


@triton.jit
def sigmoid_regions_kernel(
    counts_out, sums_out, logits, labels, numel, COLUMNS: tl.constexpr, BINS: tl.constexpr,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    counts, sums = tl.zeros((SLOTS,), tl.int64), tl.zeros((SLOTS,), tl.float64)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
        _, _, region, loss, _ = _sigmoid_block(
            block, logits, labels, numel, COLUMNS, BINS, ALPHA, GAMMA, BLOCK
        )
        counts, sums = _tally(counts, sums, region, loss, SLOTS, True)
    _store_tally(counts, sums, counts_out, sums_out, SLOTS)


@triton.jit
def sigmoid_grad_kernel(
    gradient, weights, logits, labels, numel, COLUMNS: tl.constexpr, BINS: tl.constexpr,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    offset, inside, region, _, slope = _sigmoid_block(
        block, logits, labels, numel, COLUMNS, BINS, ALPHA, GAMMA, BLOCK
    )
    _store_gradient(gradient, weights, offset, inside, region, slope, BINS)


@triton.jit
def softmax_regions_kernel(
    counts_out, sums_out, logits, labels, rows, COLUMNS: tl.constexpr, BINS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    counts, sums = tl.zeros((SLOTS,), tl.int64), tl.zeros((SLOTS,), tl.float64)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, BLOCK), tl.num_programs(0)):
        _, _, region, loss, _ = _softmax_block(
            block, logits, labels, rows, COLUMNS, BINS, BLOCK, WIDTH
        )
        counts, sums = _tally(counts, sums, region, loss, SLOTS, False)
    _store_tally(counts, sums, counts_out, sums_out, SLOTS)


@triton.jit
def softmax_grad_kernel(
    gradient, weights, logits, labels, rows, COLUMNS: tl.constexpr, BINS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    offset, inside, region, _, slope = _softmax_block(
        block, logits, labels, rows, COLUMNS, BINS, BLOCK, WIDTH
    )
    _store_gradient(gradient, weights, offset, inside, region[:, None], slope, BINS)


@triton.jit
def asl1_regions_kernel(
    counts_out, sums_out, pred, target, valid, mu, numel, BINS: tl.constexpr, BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    counts, sums = tl.zeros((SLOTS,), tl.int64), tl.zeros((SLOTS,), tl.float64)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
        _, _, region, loss, _ = _asl1_block(block, pred, target, valid, mu, numel, BINS, BLOCK)
        counts, sums = _tally(counts, sums, region, loss, SLOTS, True)
    _store_tally(counts, sums, counts_out, sums_out, SLOTS)


@triton.jit
def asl1_grad_kernel(
    gradient, weights, pred, target, valid, mu, numel, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    offset, inside, region, _, slope = _asl1_block(
        block, pred, target, valid, mu, numel, BINS, BLOCK
    )
    _store_gradient(gradient, weights, offset, inside, region, slope, BINS)


@triton.jit
def size_counts_kernel(
    counts_out, sums_out, pred, target, valid, numel, BINS: tl.constexpr, PER_OCTAVE: tl.constexpr,
    LOWEST: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    counts, sums = tl.zeros((SLOTS,), tl.int64), tl.zeros((SLOTS,), tl.float64)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
        _, _, counted, d = _differences(block, pred, target, valid, numel, BLOCK)
        size = tl.abs(d)
        slot = (tl.log2(size) - LOWEST) * PER_OCTAVE
        slot = tl.minimum(tl.maximum(slot, 0), BINS - 1).to(tl.int32)
        slot = tl.where(counted & (size < float("inf")), slot, BINS)
        counts += tl.histogram(slot, SLOTS)
    _store_tally(counts, sums, counts_out, sums_out, SLOTS)
