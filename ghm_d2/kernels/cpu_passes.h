/* The passes over a thread's rows, for REAL and SUFFIX. */

/* The rows of K that elements [a, a + n) belong to; `first` is where one begins, which may lie
 * before them. [FIRST, LAST) is the row's part of them. */
#ifndef FOR_ROWS
#define FOR_ROWS(a, n, K) \
    for (int64_t row = (a) / (K), first = row * (K) - (a); first < (n); row++, first += (K))
#define FIRST (first < 0 ? 0 : first)
#define LAST (first + K < n ? first + K : n)
/* whether the row's label is a class, whose element is one of them */
#define HAS_CLASS                                                                          \
    (labels[row] >= 0 && labels[row] < K && first + labels[row] >= 0 && first + labels[row] < n)
#endif

/* Elements [a, a + n) of an array in some format: as they lie there, or converted into `block`. */
INLINE const REAL *F(view)(const void *data, int32_t format, int64_t a, int64_t n, REAL *block) {
    const uint16_t *half = (const uint16_t *)data + a;
    if (format == NATIVE) return (const REAL *)data + a;
    if (format == BFLOAT16) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) block[i] = from_bfloat16(half[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) block[i] = from_float16(half[i]);
    }
    return block;
}

/* Copies elements [a, a + n) of an array in some format into `block`, converted. */
INLINE void F(read)(const void *data, int32_t format, int64_t a, int64_t n, REAL *block) {
    const REAL *there = F(view)(data, format, a, n, block);
    if (there != block) memcpy(block, there, n * sizeof *block);
}

/* Where elements from `a` on are computed: in their array, or in `block`, which `write` converts. */
INLINE REAL *F(place)(void *data, int32_t format, int64_t a, REAL *block) {
    return format == NATIVE ? (REAL *)data + a : block;
}

INLINE void F(write)(const REAL *block, void *data, int32_t format, int64_t a, int64_t n) {
    uint16_t *half = (uint16_t *)data + a;
    if (format == BFLOAT16) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) half[i] = to_bfloat16((float)block[i]);
    } else if (format == FLOAT16) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) half[i] = to_float16((float)block[i]);
    }
}

/* The unit region of a gradient norm: floor(g M), the last one closed; 0 for NaN. */
INLINE int32_t F(region)(REAL g, int32_t bins) {
    REAL at = g * (REAL)bins;
    at = at > 0 ? at : 0;
    return at < (REAL)(bins - 1) ? (int32_t)at : bins - 1;
}

/* p = sigmoid(s); NaN where s is not finite. */
INLINE REAL F(sigmoid)(REAL s, REAL e) {
    return (s > 0 ? (REAL)1 : e) / (1 + e) + (s - s);
}

/* softplus(s); NaN where s is not finite. */
INLINE REAL F(softplus)(REAL s, REAL e) {
    return (s > 0 ? s : 0) + F(log1p)(e) + (s - s);
}

/* e^-|s|, of which both are made */
INLINE REAL F(exp_abs)(REAL s) {
    return F(exp)(s > 0 ? -s : s);
}

/* Turns the sign of elements [a, a + n) of (rows, K) at their row's class. */
INLINE void F(turn)(REAL *s, const int64_t *labels, int64_t K, int64_t a, int n) {
    FOR_ROWS(a, n, K)
        if (HAS_CLASS) s[first + labels[row]] = -s[first + labels[row]];
}

/* Adds n samples to tallies (bins + 1, COPIES). */
INLINE void F(count)(const int32_t *index, const REAL *loss, int n, tally *tallies) {
    int i = 0;
    for (; i + COPIES <= n; i += COPIES)
#pragma GCC unroll 8
        for (int j = 0; j < COPIES; j++)
            tallies[index[i + j] * COPIES + j] += (tally){1, loss[i + j]};
    for (; i < n; i++) tallies[index[i] * COPIES] += (tally){1, loss[i]};
}

/* out = weights[index] slope, of `regions` weights and one more. */
INLINE void F(weigh)(const int32_t *index, const REAL *slope, int n, const REAL *weights,
                     int32_t regions, REAL *out) {
    if (sizeof(REAL) == sizeof(float) && regions < TABLE) {
        weigh_table(index, (const float *)slope, n, (const float *)weights, (float *)out);
        return;
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) out[i] = weights[index[i]] * slope[i];
}

/* From regions of all classes together to regions of each class: those of class j begin at j bins. */
INLINE void F(separate)(int32_t *index, int64_t K, int64_t a, int n, int32_t bins) {
    FOR_ROWS(a, n, K)
        for (int64_t i = FIRST; i < LAST; i++) index[i] += (int32_t)(i - first) * bins;
}

/* Counts and sums of losses into the part's tallies. */
CLONES void F(sigmoid_regions_part)(const job *j, int part) {
    const int64_t K = j->K, begin = first_row(j, part), end = first_row(j, part + 1);
    const int64_t *labels = j->target;
    const int32_t bins = j->bins, regions = j->regions;
    tally *tallies = tallies_of(j, part);
    REAL s[BLOCK], loss[BLOCK];
    int32_t index[BLOCK];
    for (int64_t a = begin * K; a < end * K; a += BLOCK) {
        int n = end * K - a < BLOCK ? (int)(end * K - a) : BLOCK;
        F(read)(j->x, j->x_format, a, n, s);
        F(turn)(s, labels, K, a, n);
#pragma omp simd
        for (int i = 0; i < n; i++) {
            REAL e = F(exp_abs)(s[i]);
            loss[i] = F(softplus)(s[i], e);
            index[i] = F(region)(F(sigmoid)(s[i], e), bins);
        }
        if (regions > bins) F(separate)(index, K, a, n, bins);
        FOR_ROWS(a, n, K)
            if (labels[row] < 0)
                for (int64_t i = FIRST; i < LAST; i++) index[i] = regions;
        F(count)(index, loss, n, tallies);
    }
}

/* out = weights[region] (p - t); 0 in ignored rows. */
CLONES void F(sigmoid_grad_part)(const job *j, int part) {
    const int64_t K = j->K, begin = first_row(j, part), end = first_row(j, part + 1);
    const int64_t *labels = j->target;
    const int32_t bins = j->bins, regions = j->regions;
    REAL s[BLOCK];
    int32_t index[BLOCK];
    for (int64_t a = begin * K; a < end * K; a += BLOCK) {
        int n = end * K - a < BLOCK ? (int)(end * K - a) : BLOCK;
        REAL *grad = F(place)(j->out, j->x_format, a, s);
        F(read)(j->x, j->x_format, a, n, s);
        F(turn)(s, labels, K, a, n);
#pragma omp simd
        for (int i = 0; i < n; i++) {
            s[i] = F(sigmoid)(s[i], F(exp_abs)(s[i]));
            index[i] = F(region)(s[i], bins);
        }
        if (regions > bins) F(separate)(index, K, a, n, bins);
        F(weigh)(index, s, n, j->table, regions, grad);
        F(turn)(grad, labels, K, a, n);
        FOR_ROWS(a, n, K)
            if (labels[row] < 0)
                for (int64_t i = FIRST; i < LAST; i++) grad[i] = 0;
        F(write)(grad, j->out, j->x_format, a, n);
    }
}

/* The factor of each sample in focal loss: of targets, of others, 0 in ignored rows, whose
 * logits become 0 too: they may be no numbers. */
INLINE void F(focal_factors)(const int64_t *labels, int64_t K, int64_t a, int n, REAL others,
                             REAL targets, REAL *factor, REAL *s) {
    for (int i = 0; i < n; i++) factor[i] = others;
    FOR_ROWS(a, n, K) {
        if (HAS_CLASS) factor[first + labels[row]] = targets;
        if (labels[row] < 0)
            for (int64_t i = FIRST; i < LAST; i++) factor[i] = s[i] = 0;
    }
}

/* g^gamma softplus(s), where log(g) = -softplus(-s) */
INLINE REAL F(focal)(REAL s, REAL e, REAL gamma) {
    return F(exp)(-gamma * F(softplus)(-s, e)) * F(softplus)(s, e);
}

/* Into the part's tallies of one region: samples, and the sum of factor g^gamma l. */
CLONES void F(focal_regions_part)(const job *j, int part) {
    const int64_t K = j->K, begin = first_row(j, part), end = first_row(j, part + 1);
    const int64_t *labels = j->target;
    const REAL gamma = (REAL)j->gamma, others = (REAL)j->others, targets = (REAL)j->targets;
    REAL s[BLOCK], factor[BLOCK];
    double total = 0;
    int64_t counted = 0;
    for (int64_t a = begin * K; a < end * K; a += BLOCK) {
        int n = end * K - a < BLOCK ? (int)(end * K - a) : BLOCK;
        F(read)(j->x, j->x_format, a, n, s);
        F(turn)(s, labels, K, a, n);
        F(focal_factors)(labels, K, a, n, others, targets, factor, s);
#pragma omp simd reduction(+ : total)
        for (int i = 0; i < n; i++)
            total += factor[i] * F(focal)(s[i], F(exp_abs)(s[i]), gamma);
    }
    for (int64_t row = begin; row < end; row++) counted += labels[row] >= 0 ? K : 0;
    *tallies_of(j, part) = (tally){(double)counted, total};
}

/* out = factor dl/dx = +-factor g^gamma (gamma (1 - g) l + g). */
CLONES void F(focal_grad_part)(const job *j, int part) {
    const int64_t K = j->K, begin = first_row(j, part), end = first_row(j, part + 1);
    const int64_t *labels = j->target;
    const double weight = j->weights[0] * j->scale;
    const REAL gamma = (REAL)j->gamma, others = (REAL)(weight * j->others);
    const REAL targets = (REAL)(weight * j->targets);
    REAL s[BLOCK], factor[BLOCK];
    for (int64_t a = begin * K; a < end * K; a += BLOCK) {
        int n = end * K - a < BLOCK ? (int)(end * K - a) : BLOCK;
        REAL *grad = F(place)(j->out, j->x_format, a, s);
        F(read)(j->x, j->x_format, a, n, s);
        F(turn)(s, labels, K, a, n);
        F(focal_factors)(labels, K, a, n, others, -targets, factor, s);
#pragma omp simd
        for (int i = 0; i < n; i++) {
            REAL e = F(exp_abs)(s[i]), norm = F(sigmoid)(s[i], e);
            REAL power = F(exp)(-gamma * F(softplus)(-s[i], e));
            REAL slope = power * (gamma * (1 - norm) * F(softplus)(s[i], e) + norm);
            grad[i] = factor[i] * slope;
        }
        F(write)(grad, j->out, j->x_format, a, n);
    }
}

/* A row of a softmax: its largest logit, the sum of e^(x - largest) over all classes, and the norm
 * 1 - p_y. Both passes call it, so that a sample on the edge of a region is in the same one. */
CLONES NOINLINE void F(softmax_row)(const REAL *x, int64_t K, int64_t y, REAL *largest, REAL *total,
                                    REAL *norm) {
    REAL top = x[0], poison = 0, rest = 0;
#pragma omp simd reduction(max : top) reduction(+ : poison)
    for (int64_t j = 0; j < K; j++) {
        top = x[j] > top ? x[j] : top;
        poison += x[j] < (REAL)INFINITY ? 0 : (REAL)NAN; /* -inf is a probability of 0 */
    }
    if (!(top > -LARGEST)) { /* where clang's reduction begins; is any of them finite? */
        top = x[0];
        for (int64_t j = 0; j < K; j++) top = x[j] > top ? x[j] : top;
        if (!(top > -(REAL)INFINITY)) poison = (REAL)NAN;
    }
#pragma omp simd reduction(+ : rest)
    for (int64_t j = 0; j < K; j++) rest += j == y ? 0 : F(exp)(x[j] - top);
    rest += poison;
    *largest = top;
    *total = rest + (x[y] > -(REAL)INFINITY ? F(exp)(x[y] - top) : 0);
    *norm = rest / *total;
}

/* A sample is a row, l = -log(p_y), g = 1 - p_y. */
CLONES void F(softmax_regions_part)(const job *j, int part) {
    const int64_t K = j->K, begin = first_row(j, part), end = first_row(j, part + 1);
    const int64_t *labels = j->target;
    REAL *block = (REAL *)j->row_blocks + part * K;
    tally *tallies = tallies_of(j, part);
    for (int64_t row = begin; row < end; row++) {
        int64_t y = labels[row] < K ? labels[row] : K - 1;
        if (y < 0) continue;
        const REAL *of = F(view)(j->x, j->x_format, row * K, K, block);
        REAL top, total, norm;
        F(softmax_row)(of, K, y, &top, &total, &norm);
        double below = (double)of[y] - top, rest = (double)norm * total, loss;
        /* no cancellation where y is the largest, or far from it */
        loss = below == 0 ? log1p(rest) : log(total) - below;
        int32_t index = F(region)(norm, j->bins);
        tallies[index * COPIES + row % COPIES] += (tally){1, loss};
    }
}

/* out = weights[region] (softmax - one-hot); 0 in ignored rows. */
CLONES void F(softmax_grad_part)(const job *j, int part) {
    const int64_t K = j->K, begin = first_row(j, part), end = first_row(j, part + 1);
    const int64_t *labels = j->target;
    REAL *block = (REAL *)j->row_blocks + part * K;
    const REAL *weights = j->table;
    for (int64_t row = begin; row < end && K; row++) {
        int64_t y = labels[row] < K ? labels[row] : K - 1;
        const REAL *of = F(view)(j->x, j->x_format, row * K, K, block);
        REAL *grad = F(place)(j->out, j->x_format, row * K, block), top, total, norm;
        if (y < 0) {
            memset(grad, 0, K * sizeof *grad);
            F(write)(grad, j->out, j->x_format, row * K, K);
            continue;
        }
        F(softmax_row)(of, K, y, &top, &total, &norm);
        REAL weight = weights[F(region)(norm, j->bins)], scale = weight / total;
#pragma omp simd
        for (int64_t k = 0; k < K; k++)
            grad[k] = of[k] > -(REAL)INFINITY ? scale * F(exp)(of[k] - top) : 0;
        grad[y] = -weight * norm;
        F(write)(grad, j->out, j->x_format, row * K, K);
    }
}

/* ASL1 and its gradient norm (paper, section 3.4). */
CLONES void F(asl1_regions_part)(const job *j, int part) {
    const int64_t K = j->K, begin = first_row(j, part), end = first_row(j, part + 1);
    const uint8_t *valid = j->valid;
    const int32_t bins = j->bins;
    const REAL mu = (REAL)j->mu;
    tally *tallies = tallies_of(j, part);
    REAL x_block[BLOCK], target_block[BLOCK], loss[BLOCK];
    int32_t index[BLOCK];
    for (int64_t a = begin * K; a < end * K; a += BLOCK) {
        int n = end * K - a < BLOCK ? (int)(end * K - a) : BLOCK;
        const REAL *pred = F(view)(j->x, j->x_format, a, n, x_block);
        const REAL *target = F(view)(j->target, j->target_format, a, n, target_block);
#pragma omp simd
        for (int i = 0; i < n; i++) {
            int ok = !valid || valid[a + i];
            REAL d = ok ? pred[i] - target[i] : 0, root = F(root)(d, mu);
            /* root - mu, without its cancellation near 0 or overflow far from it */
            loss[i] = d * (d / (root + mu)) + (d - d);
            index[i] = ok ? F(region)((d > 0 ? d : -d) / root, bins) : bins;
        }
        F(count)(index, loss, n, tallies);
    }
}

/* out = weights[region] d / root; 0 where not valid. */
CLONES void F(asl1_grad_part)(const job *j, int part) {
    const int64_t K = j->K, begin = first_row(j, part), end = first_row(j, part + 1);
    const uint8_t *valid = j->valid;
    const int32_t bins = j->bins;
    const REAL mu = (REAL)j->mu;
    REAL slope[BLOCK], target_block[BLOCK];
    int32_t index[BLOCK];
    for (int64_t a = begin * K; a < end * K; a += BLOCK) {
        int n = end * K - a < BLOCK ? (int)(end * K - a) : BLOCK;
        const REAL *pred = F(view)(j->x, j->x_format, a, n, slope);
        const REAL *target = F(view)(j->target, j->target_format, a, n, target_block);
        REAL *grad = F(place)(j->out, j->x_format, a, slope);
#pragma omp simd
        for (int i = 0; i < n; i++) {
            int ok = !valid || valid[a + i];
            REAL d = ok ? pred[i] - target[i] : 0;
            slope[i] = d / F(root)(d, mu) + (d - d);
            index[i] = ok ? F(region)(slope[i] > 0 ? slope[i] : -slope[i], bins) : bins;
        }
        F(weigh)(index, slope, n, j->table, bins, grad);
        F(write)(grad, j->out, j->x_format, a, n);
    }
}

/* Adds to counts (SIZES,), a quarter of an octave each from 2^-16 on, how many |pred - target| lie in
 * each: those beyond are in the first or last, those invalid or not finite in none. */
CLONES void F(asl1_sizes_part)(const job *j, int part) {
    const int64_t K = j->K, begin = first_row(j, part), end = first_row(j, part + 1);
    const uint8_t *valid = j->valid;
    REAL x_block[BLOCK], target_block[BLOCK];
    int32_t index[BLOCK];
    int64_t tallies[4][SIZES + 1] = {{0}};
    for (int64_t a = begin * K; a < end * K; a += BLOCK) {
        int n = end * K - a < BLOCK ? (int)(end * K - a) : BLOCK;
        const REAL *pred = F(view)(j->x, j->x_format, a, n, x_block);
        const REAL *target = F(view)(j->target, j->target_format, a, n, target_block);
#pragma omp simd
        for (int i = 0; i < n; i++) {
            REAL d = pred[i] - target[i];
            int ok = (!valid || valid[a + i]) && d - d == 0;
            float length = (float)(d > 0 ? d : -d);
            int32_t bits, slot, part;
            memcpy(&bits, &length, sizeof bits);
            part = bits & 0x7fffff; /* against 2^(1/4), 2^(1/2) and 2^(3/4) */
            slot = ((bits >> 23) - 127 + 16) * 4 + (part > 0x1837f0) + (part > 0x3504f3) +
                   (part > 0x5744fc);
            slot = slot < 0 ? 0 : slot < SIZES ? slot : SIZES - 1;
            index[i] = ok ? slot : SIZES;
        }
        for (int i = 0; i < n; i++) tallies[i % 4][index[i]]++;
    }
    for (int k = 0; k < SIZES; k++)
        for (int copy = 0; copy < 4; copy++) j->counts[k] += tallies[copy][k];
}
