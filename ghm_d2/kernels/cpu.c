/* The CPU backend of kernels/reference.py, called through ctypes by kernels/cpu.py.
 *
 *     cpu_numbers.h   functions of a number, half precision, looking weights up
 *     cpu_threads.h   sharing the rows out to threads, and writing to new memory
 *     cpu_passes.h    the passes over a thread's rows
 *     cpu_calls.h     what Python calls
 *
 * Rows of contiguous arrays are shared out to `parts` threads. A `_part` works through the rows of
 * one in blocks that stay in the first-level cache; half precision is converted there. "_f"
 * computes in float, "_d" in double: the last two files are compiled twice.
 * s is the signed logit: s = x where the target is 0 and -x where it is 1, so that the loss is
 * softplus(s) and the gradient norm g = sigmoid(s) for both (paper, section 3.1).
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 1024 /* elements */
#define SIZES 128  /* slots of a histogram of sizes */
#define COPIES 8   /* of the tallies, so that neighbours in one region do not wait for each other */

#ifndef SOURCE
#define SOURCE "" /* the SHA-256 of these files, from setup.py */
#endif
const char ghm_source[65] = SOURCE;

/* The widest vectors of the processor that runs it, not of the one that built it. */
#if !defined(__x86_64__) || !defined(__gnu_linux__) || (defined(__clang__) && __clang_major__ < 14)
#define CLONES
#define NOINLINE __attribute__((noinline))
#elif defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define NOINLINE /* refused beside clones, which are not inlined anyway */
#else
#if __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#define NOINLINE __attribute__((noinline))
#endif
#ifdef __clang__ /* else it reports each loop in double, which calls the C library */
#pragma clang diagnostic ignored "-Wpass-failed"
#endif
#define INLINE static inline __attribute__((always_inline))

/* How many samples a unit region holds, and the sum of their losses: added to in one instruction. */
typedef double tally __attribute__((vector_size(16)));

/* How numbers lie in memory: as those that are computed with, or in half precision. */
enum { NATIVE, BFLOAT16, FLOAT16 };

/* The arguments of a call for one feature level: `_Job` in cpu.py. The calls fill in the last three
 * fields. */
typedef struct {
    const void *x;        /* (rows, K): logits or predicted deltas */
    const void *target;   /* (rows,) int64: labels; (rows, K): deltas */
    const uint8_t *valid; /* (rows, K), of deltas; NULL: all are */
    int64_t rows, K;
    int32_t x_format, target_format;
    int32_t parts;
    int32_t bins, regions;         /* regions: bins; or bins K, a density for each class */
    double mu;                     /* of ASL1 */
    double gamma, others, targets; /* of focal loss: factors where the target is 0, and 1 */
    int64_t *counts;               /* (regions,), which a pass over the losses writes */
    double *losses;                /* (regions,), too */
    const double *weights;         /* (regions,), of a gradient */
    double scale;                  /* of a gradient */
    void *out;                     /* (rows, K): the gradient, in x_format */

    tally *tallies;   /* (parts, regions + 1, COPIES), the last region's of ignored samples */
    void *table;      /* (regions + 1,): weights times scale, and 0 for ignored samples */
    void *row_blocks; /* (parts, K): a row of half precision of each part, converted */
} job;

#include "cpu_numbers.h"
#include "cpu_threads.h"

#define JOIN_(name, suffix) name##suffix
#define JOIN(name, suffix) JOIN_(name, suffix)
#define F(name) JOIN(name, SUFFIX)

#define REAL float
#define LARGEST FLT_MAX
#define SUFFIX _f
#pragma GCC visibility push(hidden) /* as an attribute clang refuses it beside clones */
#include "cpu_passes.h"
#pragma GCC visibility pop
#include "cpu_calls.h"
#undef REAL
#undef LARGEST
#undef SUFFIX

#define REAL double
#define LARGEST DBL_MAX
#define SUFFIX _d
#pragma GCC visibility push(hidden) /* as an attribute clang refuses it beside clones */
#include "cpu_passes.h"
#pragma GCC visibility pop
#include "cpu_calls.h"
