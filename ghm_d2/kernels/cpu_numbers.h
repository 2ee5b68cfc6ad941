/* Functions of a number, half precision, and looking weights up. */

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

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Half precision, without a branch or a subnormal float, which flush to 0 in some programs. To the
 * nearest, ties to even, as PyTorch rounds. */
INLINE float from_bfloat16(uint16_t half) { return float_of((uint32_t)half << 16); }

INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded); /* NaN stays NaN */
}

/* float16 has 5 bits of an exponent and 10 of a fraction: its exponent is moved to float's, and
 * the product takes the difference of their biases away, which leaves infinity and NaN. */
INLINE float from_float16(uint16_t half) {
    uint32_t size = half & 0x7fffu, sign = (half & 0x8000u) << 16;
    float normal = float_of((size << 13) + (0xe0u << 23)) * 0x1p-112f;
    float subnormal = float_of(size | 126u << 23) - 0.5f; /* size units of 2^-24 */
    return float_of(sign | bits_of(size < 0x400 ? subnormal : normal));
}

/* The addend has the exponent at which the sum rounds to the 10 bits of a float16, or to the fewer
 * of a subnormal. From 2^16 on the first product is infinite, and so is the result. */
INLINE uint16_t to_float16(float x) {
    uint32_t size = bits_of(x) & 0x7fffffff, sign = bits_of(x) >> 16 & 0x8000;
    float scaled = float_of(size) * 0x1p112f * 0x1p-110f;
    uint32_t exponent = size & 0x7f800000;
    exponent = exponent > 0x38800000 ? exponent : 0x38800000; /* 2^-14, the least normal */
    uint32_t sum = bits_of(scaled + float_of(exponent + 0x07800000));
    uint32_t rounded = (sum >> 13 & 0x7c00) + (sum & 0xfff);
    return (uint16_t)(sign | (size > 0x7f800000 ? 0x7e00 : rounded));
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
