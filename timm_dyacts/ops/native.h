/* What the native kernels share: threads, dtypes, vector arithmetic. C11; no header of PyTorch or Python.

Each ``<operator>/native.c`` is compiled once for each dtype, with one of the macros ``DTYPE_...`` below defined, and for
each level of instructions (``native_build.py``). */
#ifndef TIMM_DYACTS_NATIVE_H
#define TIMM_DYACTS_NATIVE_H

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define SIMD _Pragma("omp simd")
/* Multiply and add: in one instruction where there is one, and never through a function of libm. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FMAF(a, b, c) __builtin_fmaf(a, b, c)
#define FMAD(a, b, c) __builtin_fma(a, b, c)
#else
#define FMAF(a, b, c) ((a) * (b) + (c))
#define FMAD(a, b, c) ((a) * (b) + (c))
#endif

enum { OK = 0, OUT_OF_MEMORY = 1 };

typedef int64_t i64;

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 parts(i64 size, i64 part) { return (size + part - 1) / part; }

/* ---- Threads ----

Each thread has a share of the units of a job, the same one as PyTorch's own loops would give it: what it finds in the
cache of its core is what it wrote there before. It computes ``grain`` units at a time, and when it is through, helps with
the shares of others. What a unit computes does not depend on who computes it, nor do results, then, on the number of
threads. */

/* How PyTorch's own OpenMP runtime starts its team, and which thread of it this is: the signatures of ``GOMP_parallel``
   and ``omp_get_thread_num``. */
typedef void (*start_team)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*thread_number)(void);

typedef struct {
    i64 threads;
    start_team team; /* NULL: threads of our own, for this call only */
    thread_number number;
} crew;

enum { MOST_SHARES = 64 };

/* The next unit of a share, on a cache line of its own. */
typedef struct { _Alignas(64) _Atomic i64 next; } share;

typedef struct {
    int (*work)(const void *args, i64 begin, i64 end);
    const void *args;
    i64 units, grain, shares;
    thread_number number;
    _Atomic int status, numbers;
    share share[MOST_SHARES];
} job;

INLINE i64 share_begin(const job *j, i64 index) {
    return least(parts(j->units, j->shares) * index, j->units);
}

static void take_share(job *j, i64 index) {
    const i64 end = share_begin(j, index + 1);
    for (;;) {
        i64 begin = atomic_fetch_add_explicit(&j->share[index].next, j->grain, memory_order_relaxed);
        if (begin >= end) return;
        int status = j->work(j->args, begin, least(begin + j->grain, end));
        if (status != OK) atomic_store(&j->status, status);
    }
}

static void take_part(void *data) {
    job *j = data;
    i64 mine = j->number ? j->number() : atomic_fetch_add(&j->numbers, 1);
    for (i64 i = 0; i < j->shares; i++) take_share(j, (mine + i) % j->shares);
}

static void *take_part_as_thread(void *data) {
    take_part(data);
    return NULL;
}

static int run_job(const crew *c, int (*work)(const void *, i64, i64), const void *args, i64 units, i64 grain) {
    i64 threads = least(c->threads, parts(units, grain));
    if (units <= 0) return OK;
    if (threads <= 1) return work(args, 0, units);
    job j = {work, args, units, grain, least(threads, MOST_SHARES), c->team ? c->number : NULL, OK, 0, {{0}}};
    for (i64 i = 0; i < j.shares; i++) atomic_init(&j.share[i].next, share_begin(&j, i));
    if (c->team) {
        /* Always the number of PyTorch's threads: another one would have the runtime stop and start threads. */
        c->team(take_part, &j, (unsigned)c->threads, 0);
    } else {
        pthread_t others[MOST_SHARES];
        int started = 0;
        while (started < j.shares - 1
               && !pthread_create(&others[started], NULL, take_part_as_thread, &j)) started++;
        take_part(&j);
        for (int i = 0; i < started; i++) pthread_join(others[i], NULL);
    }
    return atomic_load(&j.status);
}

/* ---- Numbers of two bytes ---- */

INLINE float float_of(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
INLINE uint32_t bits_of(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

INLINE float load_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }
INLINE uint16_t store_bf16(float f) {
    uint32_t u = bits_of(f);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u | ((u >> 16) & 0x8000u) : rounded);
}

INLINE float load_fp16(uint16_t h) {
    uint32_t u = (uint32_t)(h & 0x7fffu) << 13, exponent = u & 0x0f800000u;
    u += 112u << 23;
    uint32_t infinite = u + (112u << 23);
    float subnormal = float_of(u + (1u << 23)) - float_of(113u << 23);
    u = exponent == 0x0f800000u ? infinite : exponent == 0 ? bits_of(subnormal) : u;
    return float_of(u | (uint32_t)(h & 0x8000u) << 16);
}
INLINE uint16_t store_fp16(float f) {
    uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    const uint32_t magic = (112u + 14u) << 23;
    uint32_t subnormal = bits_of(float_of(u) + float_of(magic)) - magic;
    uint32_t normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
    uint32_t special = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return (uint16_t)(sign | (u >= 143u << 23 ? special : u < 113u << 23 ? subnormal : normal));
}

/* ---- Exponentials ----

2^f for f in [-1/2, 1/2] as a polynomial, and the whole part in the exponent. Relative errors, measured over [-125, 0]:
7.1e-8 in fp32 and 2.3e-16 in fp64. Below 2^-125 (2^-1021) the result is 0: beside the largest weight of a window, which
is 1, that is nothing. NaN gives NaN. */

INLINE float exp2_float(float t) {
    float bounded = t < -126.0f ? -126.0f : t;
    float shifted = bounded + 12582912.0f; /* 1.5 * 2^23: the whole part, in the lowest bits */
    float f = bounded - (shifted - 12582912.0f);
    float p = 1.5252734e-5f;
    p = FMAF(p, f, 1.5403530e-4f);
    p = FMAF(p, f, 1.3333558e-3f);
    p = FMAF(p, f, 9.6181291e-3f);
    p = FMAF(p, f, 5.5504109e-2f);
    p = FMAF(p, f, 2.4022651e-1f);
    p = FMAF(p, f, 6.9314718e-1f);
    p = FMAF(p, f, 1.0f);
    p *= float_of((bits_of(shifted) - 0x4b400000u + 127u) << 23);
    return t < -125.0f ? 0.0f : p;
}

INLINE double exp2_double(double t) {
    double bounded = t < -1022.0 ? -1022.0 : t;
    double shifted = bounded + 6755399441055744.0; /* 1.5 * 2^52 */
    double f = (bounded - (shifted - 6755399441055744.0)) * 0.69314718055994530942;
    double p = 1.0 / 6227020800.0;
    p = FMAD(p, f, 1.0 / 479001600.0);
    p = FMAD(p, f, 1.0 / 39916800.0);
    p = FMAD(p, f, 1.0 / 3628800.0);
    p = FMAD(p, f, 1.0 / 362880.0);
    p = FMAD(p, f, 1.0 / 40320.0);
    p = FMAD(p, f, 1.0 / 5040.0);
    p = FMAD(p, f, 1.0 / 720.0);
    p = FMAD(p, f, 1.0 / 120.0);
    p = FMAD(p, f, 1.0 / 24.0);
    p = FMAD(p, f, 1.0 / 6.0);
    p = FMAD(p, f, 0.5);
    p = FMAD(p, f, 1.0);
    p = FMAD(p, f, 1.0);
    uint64_t u;
    memcpy(&u, &shifted, 8);
    u = (u - 0x4338000000000000u + 1023u) << 52;
    double scale;
    memcpy(&scale, &u, 8);
    return t < -1021.0 ? 0.0 : p * scale;
}

/* ---- The dtype ----

``T`` is the type in memory and ``REAL`` that of the arithmetic, ``INT`` an integer as wide; ``NAME(f)`` is
``f_<dtype>``. */
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(f) JOIN(f, SUFFIX)

#ifdef DTYPE_float64
#define REAL double
#define INT int64_t
#define EXP2 exp2_double
#define FMA FMAD
#define LARGEST 1.7976931348623157e308
#else
#define REAL float
#define INT int32_t
#define EXP2 exp2_float
#define FMA FMAF
#define LARGEST 3.4028234663852886e38f
#endif

#if defined(DTYPE_float32)
#define T float
#define SUFFIX float32
#define LOAD(v) (v)
#define STORE(v) (v)
#elif defined(DTYPE_float64)
#define T double
#define SUFFIX float64
#define LOAD(v) (v)
#define STORE(v) (v)
#elif defined(DTYPE_bfloat16)
#define T uint16_t
#define SUFFIX bfloat16
#define LOAD(v) load_bf16(v)
#define STORE(v) store_bf16(v)
#elif defined(DTYPE_float16)
#define T uint16_t
#define SUFFIX float16
#define LOAD(v) load_fp16(v)
#define STORE(v) store_fp16(v)
#else
#error "one of DTYPE_float32, DTYPE_float64, DTYPE_bfloat16, DTYPE_float16 has to be defined"
#endif

#endif
