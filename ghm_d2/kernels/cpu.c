/* The CPU backend of kernels/reference.py, called through ctypes by kernels/cpu.py.
 *
 * Rows of contiguous arrays are shared out to `parts` threads, those of OpenMP that torch uses too,
 * so that none waits for a core that another spins on. A `_part` works through rows [begin, end) in
 * blocks that stay in the first-level cache. "_f" takes float, "_d" double: the second half of this file is compiled twice.
 * s is the signed logit: s = x where the target is 0 and -x where it is 1, so that the loss is
 * softplus(s) and the gradient norm g = sigmoid(s) for both (paper, section 3.1).
 */
#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#define BLOCK 1024 /* elements */
#define SIZES 128  /* slots of a histogram of sizes */
#define COPIES 8   /* of the tallies, so that neighbours in one region do not wait for each other */

#ifndef SOURCE
#define SOURCE "" /* this file's SHA-256, from setup.py */
#endif
const char ghm_source[65] = SOURCE;

/* The widest vectors of the processor that runs it, not of the one that built it. */
#if !defined(__x86_64__) || !defined(__gnu_linux__) || defined(__clang__)
#define CLONES
#elif __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#define HIDDEN __attribute__((visibility("hidden")))
#define INLINE static inline __attribute__((always_inline))

/* The rows of K that elements [a, a + n) belong to; `first` is where one begins, which may lie
 * before them. [FIRST, LAST) is the row's part of them. */
#define FOR_ROWS(a, n, K) \
    for (int64_t row = (a) / (K), first = row * (K) - (a); first < (n); row++, first += (K))
#define FIRST (first < 0 ? 0 : first)
#define LAST (first + K < n ? first + K : n)
/* whether the row's label is a class, whose element is one of them */
#define HAS_CLASS                                                                          \
    (labels[row] >= 0 && labels[row] < K && first + labels[row] >= 0 && first + labels[row] < n)

/* The loop over parts, and a part's rows. */
#define FOR_PARTS \
    _Pragma("omp parallel for num_threads(parts) if (parts > 1)") for (int part = 0; part < parts; part++)
#define PART rows * part / parts, rows *(part + 1) / parts

/* How many samples a unit region holds, and the sum of their losses: added to in one instruction. */
typedef double tally __attribute__((vector_size(16)));

/* e^x for x <= 0, within 2 ulp: e^r 2^n with |r| <= ln(2) / 2, polynomial of the Cephes library. */
INLINE float exp_f(float x) {
    x = x > -87.0f ? x : -87.0f; /* NaN as well */
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounds, without a call */
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return y * power;
}

/* log(1 + e) for e in [0, 1], within 2 ulp: e times a Chebyshev fit of log(1 + e) / e. */
INLINE float log1p_f(float e) {
    float y = -0.00317605701f;
    y = y * e + 0.0195425265f;
    y = y * e - 0.0563736111f;
    y = y * e + 0.105436236f;
    y = y * e - 0.152696669f;
    y = y * e + 0.196632743f;
    y = y * e - 0.249516159f;
    y = y * e + 0.333297104f;
    y = y * e - 0.499998927f;
    return (y * e + 1.0f) * e;
}

/* No vectors in double precision: it is there for checks of gradients. */
INLINE double exp_d(double x) { return exp(x); }
INLINE double log1p_d(double e) { return log1p(e); }
INLINE double root_d(double d, double mu) { return hypot(d, mu); }

/* sqrt(d^2 + mu^2), whose squares neither overflow nor vanish */
INLINE float root_f(float d, float mu) {
    float size = d > 0 ? d : -d, larger = size > mu ? size : mu, smaller = size > mu ? mu : size;
    float ratio = smaller / larger;
    return larger * sqrtf(1 + ratio * ratio);
}

/* Adds the tallies (parts, bins + 1, COPIES) up, without the ignored samples'; NaN without any. */
static void add_up(tally *tallies, int32_t parts, int32_t bins, int64_t *counts, double *losses) {
    for (int64_t k = 0; k < bins; k++) {
        tally sum = {0, tallies ? 0 : NAN}; /* there was no memory for them */
        for (int64_t part = 0; tallies && part < parts; part++)
            for (int j = 0; j < COPIES; j++) sum += tallies[(part * (bins + 1) + k) * COPIES + j];
        counts[k] = (int64_t)sum[0];
        losses[k] = sum[1];
    }
    free(tallies);
}

/* Asks for large pages: so large an array is new memory each time, and to be given it page by page
 * takes longer than to fill it. */
static void before_writing(void *out, size_t bytes) {
#ifdef MADV_HUGEPAGE
    size_t page = 2 << 20, begin = ((size_t)out + page - 1) / page * page;
    size_t end = ((size_t)out + bytes) / page * page;
    /* up to 32 MiB, malloc has memory that was written before */
    if (bytes > (32 << 20)) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)out, (void)bytes;
#endif
}

/* out = table[index] slope, of a table of 32: looked up in registers. A scalar loop takes a quarter
 * of the gradient's time. */
#define TABLE 32

static void weigh_scalar(const int32_t *index, const float *slope, int n, const float *table,
                         float *out) {
    for (int i = 0; i < n; i++) out[i] = table[index[i]] * slope[i];
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

__attribute__((target("avx2"))) static void weigh_avx2(const int32_t *index, const float *slope,
                                                       int n, const float *table, float *out) {
    __m256 t0 = _mm256_loadu_ps(table), t1 = _mm256_loadu_ps(table + 8);
    __m256 t2 = _mm256_loadu_ps(table + 16), t3 = _mm256_loadu_ps(table + 24);
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i at = _mm256_loadu_si256((const __m256i *)(index + i)); /* its low 3 bits count */
        __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)); /* as signs */
        __m256 bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(at, 27));
        __m256 low = _mm256_blendv_ps(_mm256_permutevar8x32_ps(t0, at),
                                      _mm256_permutevar8x32_ps(t1, at), bit3);
        __m256 high = _mm256_blendv_ps(_mm256_permutevar8x32_ps(t2, at),
                                       _mm256_permutevar8x32_ps(t3, at), bit3);
        __m256 weight = _mm256_blendv_ps(low, high, bit4);
        _mm256_storeu_ps(out + i, _mm256_mul_ps(weight, _mm256_loadu_ps(slope + i)));
    }
    weigh_scalar(index + i, slope + i, n - i, table, out + i);
}

__attribute__((target("avx512f"))) static void weigh_avx512(const int32_t *index,
                                                            const float *slope, int n,
                                                            const float *table, float *out) {
    __m512 low = _mm512_loadu_ps(table), high = _mm512_loadu_ps(table + 16);
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 weight = _mm512_permutex2var_ps(low, _mm512_loadu_si512(index + i), high);
        _mm512_storeu_ps(out + i, _mm512_mul_ps(weight, _mm512_loadu_ps(slope + i)));
    }
    weigh_scalar(index + i, slope + i, n - i, table, out + i);
}

static void weigh_table(const int32_t *index, const float *slope, int n, const float *table,
                        float *out) {
    if (__builtin_cpu_supports("avx512f"))
        weigh_avx512(index, slope, n, table, out);
    else if (__builtin_cpu_supports("avx2"))
        weigh_avx2(index, slope, n, table, out);
    else
        weigh_scalar(index, slope, n, table, out);
}
#else
#define weigh_table weigh_scalar
#endif

#define JOIN_(name, suffix) name##suffix
#define JOIN(name, suffix) JOIN_(name, suffix)
#define F(name) JOIN(name, SUFFIX)

#define REAL float
#define SUFFIX _f
#include "cpu.c"
#undef REAL
#undef SUFFIX
#define REAL double
#define SUFFIX _d
#include "cpu.c"

#else

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

/* Logits x (rows, K), labels (rows,): counts and sums of losses into tallies (regions + 1, COPIES),
 * of which the last region is that of ignored rows; regions is bins, or bins K by class. */
CLONES HIDDEN void F(sigmoid_regions_part)(const REAL *x, const int64_t *labels, int64_t begin, int64_t end,
                               int64_t K, int32_t bins, int32_t regions, tally *tallies) {
    REAL s[BLOCK], loss[BLOCK];
    int32_t index[BLOCK];
    for (int64_t a = begin * K; a < end * K; a += BLOCK) {
        int n = end * K - a < BLOCK ? (int)(end * K - a) : BLOCK;
        memcpy(s, x + a, n * sizeof *s);
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
CLONES HIDDEN void F(sigmoid_grad_part)(const REAL *x, const int64_t *labels, int64_t begin, int64_t end,
                            int64_t K, int32_t bins, int32_t regions, const REAL *weights,
                            REAL *out) {
    REAL s[BLOCK];
    int32_t index[BLOCK];
    for (int64_t a = begin * K; a < end * K; a += BLOCK) {
        int n = end * K - a < BLOCK ? (int)(end * K - a) : BLOCK;
        REAL *grad = out + a;
        memcpy(s, x + a, n * sizeof *s);
        F(turn)(s, labels, K, a, n);
#pragma omp simd
        for (int i = 0; i < n; i++) {
            s[i] = F(sigmoid)(s[i], F(exp_abs)(s[i]));
            index[i] = F(region)(s[i], bins);
        }
        if (regions > bins) F(separate)(index, K, a, n, bins);
        F(weigh)(index, s, n, weights, regions, grad);
        F(turn)(grad, labels, K, a, n);
        FOR_ROWS(a, n, K)
            if (labels[row] < 0)
                for (int64_t i = FIRST; i < LAST; i++) grad[i] = 0;
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

/* The sum of factor g^gamma l. */
CLONES HIDDEN double F(focal_sum_part)(const REAL *x, const int64_t *labels, int64_t begin, int64_t end,
                           int64_t K, REAL gamma, REAL others, REAL targets) {
    REAL s[BLOCK], factor[BLOCK];
    double total = 0;
    for (int64_t a = begin * K; a < end * K; a += BLOCK) {
        int n = end * K - a < BLOCK ? (int)(end * K - a) : BLOCK;
        memcpy(s, x + a, n * sizeof *s);
        F(turn)(s, labels, K, a, n);
        F(focal_factors)(labels, K, a, n, others, targets, factor, s);
#pragma omp simd reduction(+ : total)
        for (int i = 0; i < n; i++)
            total += factor[i] * F(focal)(s[i], F(exp_abs)(s[i]), gamma);
    }
    return total;
}

/* out = factor dl/dx = +-factor g^gamma (gamma (1 - g) l + g). */
CLONES HIDDEN void F(focal_grad_part)(const REAL *x, const int64_t *labels, int64_t begin, int64_t end,
                          int64_t K, REAL gamma, REAL others, REAL targets, REAL *out) {
    REAL s[BLOCK], factor[BLOCK];
    for (int64_t a = begin * K; a < end * K; a += BLOCK) {
        int n = end * K - a < BLOCK ? (int)(end * K - a) : BLOCK;
        REAL *grad = out + a;
        memcpy(s, x + a, n * sizeof *s);
        F(turn)(s, labels, K, a, n);
        F(focal_factors)(labels, K, a, n, others, -targets, factor, s);
#pragma omp simd
        for (int i = 0; i < n; i++) {
            REAL e = F(exp_abs)(s[i]), norm = F(sigmoid)(s[i], e);
            REAL power = F(exp)(-gamma * F(softplus)(-s[i], e));
            REAL slope = power * (gamma * (1 - norm) * F(softplus)(s[i], e) + norm);
            grad[i] = factor[i] * slope;
        }
    }
}

/* A row of a softmax: its largest logit, the sum of e^(x - largest) over all classes, and the norm
 * 1 - p_y. Both passes call it, so that a sample on the edge of a region is in the same one. */
CLONES HIDDEN __attribute__((noinline)) void F(softmax_row)(const REAL *x, int64_t K, int64_t y,
                                                            REAL *largest, REAL *total, REAL *norm) {
    REAL top = x[0], poison = 0, rest = 0;
#pragma omp simd reduction(max : top) reduction(+ : poison)
    for (int64_t j = 0; j < K; j++) {
        top = x[j] > top ? x[j] : top;
        poison += x[j] < (REAL)INFINITY ? 0 : (REAL)NAN; /* -inf is a probability of 0 */
    }
#pragma omp simd reduction(+ : rest)
    for (int64_t j = 0; j < K; j++) rest += j == y ? 0 : F(exp)(x[j] - top);
    if (!(top > -(REAL)INFINITY)) poison = (REAL)NAN;
    rest += poison;
    *largest = top;
    *total = rest + (x[y] > -(REAL)INFINITY ? F(exp)(x[y] - top) : 0);
    *norm = rest / *total;
}

/* Logits x (rows, K), labels (rows,): a sample is a row, l = -log(p_y), g = 1 - p_y. */
CLONES HIDDEN void F(softmax_regions_part)(const REAL *x, const int64_t *labels, int64_t begin, int64_t end,
                               int64_t K, int32_t bins, tally *tallies) {
    for (int64_t row = begin; row < end; row++) {
        int64_t y = labels[row] < K ? labels[row] : K - 1;
        if (y < 0) continue;
        const REAL *of = x + row * K;
        REAL top, total, norm;
        F(softmax_row)(of, K, y, &top, &total, &norm);
        double below = (double)of[y] - top, rest = (double)norm * total, loss;
        /* no cancellation where y is the largest, or far from it */
        loss = below == 0 ? log1p(rest) : log(total) - below;
        int32_t index = F(region)(norm, bins);
        tallies[index * COPIES + row % COPIES] += (tally){1, loss};
    }
}

/* out = weights[region] (softmax - one-hot); 0 in ignored rows. */
CLONES HIDDEN void F(softmax_grad_part)(const REAL *x, const int64_t *labels, int64_t begin, int64_t end,
                            int64_t K, int32_t bins, const REAL *weights, REAL *out) {
    for (int64_t row = begin; row < end && K; row++) {
        int64_t y = labels[row] < K ? labels[row] : K - 1;
        const REAL *of = x + row * K;
        REAL *grad = out + row * K, top, total, norm;
        if (y < 0) {
            memset(grad, 0, K * sizeof *grad);
            continue;
        }
        F(softmax_row)(of, K, y, &top, &total, &norm);
        REAL weight = weights[F(region)(norm, bins)], scale = weight / total;
#pragma omp simd
        for (int64_t j = 0; j < K; j++)
            grad[j] = of[j] > -(REAL)INFINITY ? scale * F(exp)(of[j] - top) : 0;
        grad[y] = -weight * norm;
    }
}

/* pred, target, valid (rows, K), or no valid, where all are: ASL1 and its gradient norm (paper, section 3.4). */
CLONES HIDDEN void F(asl1_regions_part)(const REAL *pred, const REAL *target, const uint8_t *valid,
                            int64_t begin, int64_t end, int64_t K, REAL mu, int32_t bins,
                            tally *tallies) {
    REAL loss[BLOCK];
    int32_t index[BLOCK];
    for (int64_t a = begin * K; a < end * K; a += BLOCK) {
        int n = end * K - a < BLOCK ? (int)(end * K - a) : BLOCK;
#pragma omp simd
        for (int i = 0; i < n; i++) {
            int ok = !valid || valid[a + i];
            REAL d = ok ? pred[a + i] - target[a + i] : 0, root = F(root)(d, mu);
            /* root - mu, without its cancellation near 0 or overflow far from it */
            loss[i] = d * (d / (root + mu)) + (d - d);
            index[i] = ok ? F(region)((d > 0 ? d : -d) / root, bins) : bins;
        }
        F(count)(index, loss, n, tallies);
    }
}

/* out = weights[region] d / root; 0 where not valid. */
CLONES HIDDEN void F(asl1_grad_part)(const REAL *pred, const REAL *target, const uint8_t *valid, int64_t begin,
                         int64_t end, int64_t K, REAL mu, int32_t bins, const REAL *weights,
                         REAL *out) {
    REAL slope[BLOCK];
    int32_t index[BLOCK];
    for (int64_t a = begin * K; a < end * K; a += BLOCK) {
        int n = end * K - a < BLOCK ? (int)(end * K - a) : BLOCK;
#pragma omp simd
        for (int i = 0; i < n; i++) {
            int ok = !valid || valid[a + i];
            REAL d = ok ? pred[a + i] - target[a + i] : 0;
            slope[i] = d / F(root)(d, mu) + (d - d);
            index[i] = ok ? F(region)(slope[i] > 0 ? slope[i] : -slope[i], bins) : bins;
        }
        F(weigh)(index, slope, n, weights, bins, out + a);
    }
}

/* Adds to counts (SIZES,), a quarter of an octave each from 2^-16 on, how many |pred - target| lie in
 * each: those beyond are in the first or last, those invalid or not finite in none. */
CLONES HIDDEN void F(asl1_sizes_part)(const REAL *pred, const REAL *target, const uint8_t *valid,
                                       int64_t size, int64_t *counts) {
    int32_t index[BLOCK];
    int64_t tallies[4][SIZES + 1] = {{0}};
    for (int64_t a = 0; a < size; a += BLOCK) {
        int n = size - a < BLOCK ? (int)(size - a) : BLOCK;
#pragma omp simd
        for (int i = 0; i < n; i++) {
            REAL d = pred[a + i] - target[a + i];
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
        for (int j = 0; j < 4; j++) counts[k] += tallies[j][k];
}

/* --- what Python calls --- */

void F(asl1_sizes)(const REAL *pred, const REAL *target, const uint8_t *valid, int64_t rows,
                    int64_t K, int64_t *counts) {
    F(asl1_sizes_part)(pred, target, valid, rows * K, counts);
}

/* `reference.quantile` of a histogram (SIZES,) of sizes. */
double F(quantile)(const REAL *histogram, double quantile, double start) {
    double total = 0, below = 0;
    int k = 0;
    for (int i = 0; i < SIZES; i++) total += histogram[i];
    if (!(total > 0)) return start;
    while (k < SIZES - 1 && below + histogram[k] < quantile * total) below += histogram[k++];
    double part = histogram[k] > 0 ? (quantile * total - below) / histogram[k] : 0;
    return exp2(-16 + (k + (part < 1 ? part : 1)) / 4);
}

/* A weight for each region, times `scale`, and 0 for the region after them, of ignored samples. */
static REAL *F(make_table)(const double *weights, int32_t regions, double scale) {
    REAL *table = calloc((size_t)(regions < TABLE ? TABLE : regions + 1), sizeof *table);
    for (int32_t k = 0; table && k < regions; k++) table[k] = (REAL)(weights[k] * scale);
    return table;
}

#define MAKE_TALLIES(regions) \
    tally *tallies = calloc((size_t)parts * (regions + 1) * COPIES, sizeof *tallies);
#define TALLIES(regions) tallies + (int64_t)part * (regions + 1) * COPIES

/* counts, losses: (regions,), bins of them or bins K, as in the part. */
void F(sigmoid_regions)(const REAL *x, const int64_t *labels, int64_t rows, int64_t K,
                        int32_t parts, int32_t bins, int32_t regions, int64_t *counts,
                        double *losses) {
    MAKE_TALLIES(regions)
    if (tallies)
        FOR_PARTS F(sigmoid_regions_part)(x, labels, PART, K, bins, regions, TALLIES(regions));
    add_up(tallies, parts, regions, counts, losses);
}

int F(sigmoid_grad)(const REAL *x, const int64_t *labels, int64_t rows, int64_t K, int32_t parts,
                    int32_t bins, int32_t regions,
                     const double *weights, double scale, REAL *out) {
    REAL *table = F(make_table)(weights, regions, scale);
    if (!table) return 1;
    before_writing(out, rows * K * sizeof *out);
    FOR_PARTS F(sigmoid_grad_part)(x, labels, PART, K, bins, regions, table, out);
    free(table);
    return 0;
}

/* sums: (parts,). */
void F(focal_sum)(const REAL *x, const int64_t *labels, int64_t rows, int64_t K, int32_t parts,
                  REAL gamma, REAL others, REAL targets, double *sums) {
    FOR_PARTS sums[part] = F(focal_sum_part)(x, labels, PART, K, gamma, others, targets);
}

int F(focal_grad)(const REAL *x, const int64_t *labels, int64_t rows, int64_t K, int32_t parts,
                  REAL gamma, REAL others, REAL targets, REAL *out) {
    before_writing(out, rows * K * sizeof *out);
    FOR_PARTS F(focal_grad_part)(x, labels, PART, K, gamma, others, targets, out);
    return 0;
}

void F(softmax_regions)(const REAL *x, const int64_t *labels, int64_t rows, int64_t K,
                        int32_t parts, int32_t bins, int64_t *counts, double *losses) {
    MAKE_TALLIES(bins)
    if (tallies) FOR_PARTS F(softmax_regions_part)(x, labels, PART, K, bins, TALLIES(bins));
    add_up(tallies, parts, bins, counts, losses);
}

int F(softmax_grad)(const REAL *x, const int64_t *labels, int64_t rows, int64_t K, int32_t parts,
                    int32_t bins,
                     const double *weights, double scale, REAL *out) {
    REAL *table = F(make_table)(weights, bins, scale);
    if (!table) return 1;
    before_writing(out, rows * K * sizeof *out);
    FOR_PARTS F(softmax_grad_part)(x, labels, PART, K, bins, table, out);
    free(table);
    return 0;
}

void F(asl1_regions)(const REAL *pred, const REAL *target, const uint8_t *valid, int64_t rows,
                     int64_t K, int32_t parts, REAL mu, int32_t bins, int64_t *counts,
                     double *losses) {
    MAKE_TALLIES(bins)
    if (tallies)
        FOR_PARTS F(asl1_regions_part)(pred, target, valid, PART, K, mu, bins, TALLIES(bins));
    add_up(tallies, parts, bins, counts, losses);
}

int F(asl1_grad)(const REAL *pred, const REAL *target, const uint8_t *valid, int64_t rows,
                 int64_t K, int32_t parts, REAL mu, int32_t bins,
                  const double *weights, double scale, REAL *out) {
    REAL *table = F(make_table)(weights, bins, scale);
    if (!table) return 1;
    before_writing(out, rows * K * sizeof *out);
    FOR_PARTS F(asl1_grad_part)(pred, target, valid, PART, K, mu, bins, table, out);
    free(table);
    return 0;
}

#undef MAKE_TALLIES
#undef TALLIES

/* c, from averages of the foreground samples and of 1, which it moves on. */
static double F(prior_count)(double foreground, REAL *average, double prior, double momentum,
                             int32_t from_first, int32_t debias, int32_t training) {
    double mean = average[0], seen = average[1];
    if (momentum > 0 && training) {
        double keep = from_first && seen == 0 ? 0 : momentum;
        average[0] = (REAL)(mean = keep * mean + (1 - keep) * foreground);
        average[1] = (REAL)(seen = keep * seen + (1 - keep));
    }
    if (momentum > 0 && seen > 0) foreground = mean / (debias ? seen : 1);
    return prior * (foreground > 1 ? foreground : 1);
}

/* S_k + c of one region after each of `levels` rows of counts, (levels, bins) with region k first;
 * its average and its number of updates move on. */
static void F(region_density)(const int64_t *counts, int64_t levels, int64_t bins, REAL *ema,
                              int64_t *updates, double c, double momentum, int32_t from_first,
                              int32_t debias, int32_t training, int32_t moves,
                              double *density) {
    double average = *ema;
    int64_t times = *updates;
    for (int64_t level = 0; level < levels; level++) {
        double new = (double)counts[level * bins], smooth = new;
        if (momentum > 0 && training && (moves || new > 0)) {
            average = from_first && times == 0 ? new : momentum * average + (1 - momentum) * new;
            times++;
        }
        if (momentum > 0 && times) /* else a region first met in evaluation */
            smooth = average / (debias ? -expm1((double)times * log(momentum)) : 1);
        density[level * bins] = smooth + c;
    }
    if (training) *ema = (REAL)average, *updates = times;
}

/* counts, weights (levels, bins): `reference.update_density`, whose arguments these are.
 * ema, updates (rows, bins), foreground (rows,) and its average (rows, 2): a row for each level
 * where `own`, else one for all; the last two are not read without a prior. `normalizer`: 0
 * valid_bins, 1 bins, 2 weights. */
void F(density)(const int64_t *counts, int64_t levels, int64_t bins, REAL *ema, int64_t *updates,
                const int64_t *foreground, REAL *ema_foreground, double prior, double momentum,
                int32_t own, int32_t normalizer, int32_t from_first, int32_t debias,
                int32_t training, double factor, double *weights) {
    for (int64_t row = 0; row < (own ? levels : 1); row++) {
        int64_t at = row * bins, rows = own ? 1 : levels;
        double c = 0;
        if (prior > 0)
            c = F(prior_count)((double)foreground[row], ema_foreground + 2 * row, prior, momentum,
                               from_first, debias, training);
        for (int64_t k = at; k < at + bins; k++)
            F(region_density)(counts + k, rows, bins, ema + k, updates + k, c, momentum, from_first,
                              debias, training, prior > 0, weights + k);
    }
    for (int64_t level = 0; level < levels; level++, counts += bins, weights += bins) {
        double total = 0;
        for (int64_t k = 0; k < bins; k++)
            if (normalizer == 1)
                total++;
            else if (counts[k] > 0)
                total += normalizer == 0 ? 1 : (double)counts[k] / weights[k];
        for (int64_t k = 0; k < bins; k++)
            weights[k] = counts[k] > 0 ? factor / (total * weights[k]) : 0;
    }
}

#endif
