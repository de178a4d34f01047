/* Products of a matrix with few vectors, such as a layer's weights with the features of a batch.

The vectors are *packed*: PANEL of them side by side, one row for each of their elements, zeros where there are fewer. A
weight is read once for a whole panel, and TILE rows of weights at a time share what is read of it. Each sum is formed
in the order of the weights, so that a result depends neither on the threads nor on what else is in the panel. */
#ifndef TIMM_DYACTS_NATIVE_PRODUCTS_H
#define TIMM_DYACTS_NATIVE_PRODUCTS_H

#include "native.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

typedef REAL vector __attribute__((vector_size(VECTOR_BYTES)));
typedef vector unaligned __attribute__((aligned(sizeof(REAL)), may_alias));

enum { WIDTH = VECTOR_BYTES / sizeof(REAL), PANEL = 2 * WIDTH, TILE = 6, CHUNK = 256 };

/* ``sum + weight * x`` in one operation: the options of the compiler forbid it to join the two by itself. */
INLINE vector multiply_add(vector weight, vector x, vector sum) {
#if defined(__AVX512F__) && defined(DTYPE_float64)
    return (vector)_mm512_fmadd_pd((__m512d)weight, (__m512d)x, (__m512d)sum);
#elif defined(__AVX512F__)
    return (vector)_mm512_fmadd_ps((__m512)weight, (__m512)x, (__m512)sum);
#elif defined(__AVX2__) && defined(DTYPE_float64)
    return (vector)_mm256_fmadd_pd((__m256d)weight, (__m256d)x, (__m256d)sum);
#elif defined(__AVX2__)
    return (vector)_mm256_fmadd_ps((__m256)weight, (__m256)x, (__m256)sum);
#else
    return sum + weight * x;
#endif
}

#define EACH_ROW(each) each(0) each(1) each(2) each(3) each(4) each(5)

/* Where the numbers of a product lie. Weights are ``weight[r * row + i * step]`` for the output ``r`` and the element
   ``i``, rows of the panel are ``stride`` apart, those of the output ``to``. A sum starts with its ``bias``, or, where
   there is none, with 0, or with what ``out`` holds (``adds``). */
typedef struct {
    const REAL *weight;
    i64 row, step;
    const REAL *panel;
    i64 stride, length;
    const REAL *bias;
    REAL *out;
    i64 to;
} product;

/* TILE outputs, from ``first`` on. Sums that were an array would be kept in memory. */
INLINE void multiply_tile(product p, i64 first, const int adds) {
    const REAL *restrict weight = p.weight + first * p.row, *restrict panel = p.panel;
    REAL *restrict out = p.out + first * p.to;
#define START(r) \
    vector left##r = p.bias ? p.bias[first + r] - (vector){0} : (vector){0}, right##r = left##r; \
    if (adds) left##r = *(unaligned *)(out + r * p.to), right##r = *(unaligned *)(out + r * p.to + WIDTH);
    EACH_ROW(START)
    for (i64 i = 0; i < p.length; i++) {
        const vector left = *(const unaligned *)panel, right = *(const unaligned *)(panel + WIDTH);
#define ADD(r) { \
        const vector w = weight[r * p.row] - (vector){0}; \
        left##r = multiply_add(w, left, left##r); \
        right##r = multiply_add(w, right, right##r); }
        EACH_ROW(ADD)
        weight += p.step, panel += p.stride;
    }
#define WRITE(r) *(unaligned *)(out + r * p.to) = left##r, *(unaligned *)(out + r * p.to + WIDTH) = right##r;
    EACH_ROW(WRITE)
#undef START
#undef ADD
#undef WRITE
}

INLINE void multiply_row(product p, i64 r, const int adds) {
    REAL *restrict out = p.out + r * p.to;
    vector left = p.bias ? p.bias[r] - (vector){0} : (vector){0}, right = left;
    if (adds) left = *(unaligned *)out, right = *(unaligned *)(out + WIDTH);
    for (i64 i = 0; i < p.length; i++) {
        const vector w = p.weight[r * p.row + i * p.step] - (vector){0};
        left = multiply_add(w, *(const unaligned *)(p.panel + i * p.stride), left);
        right = multiply_add(w, *(const unaligned *)(p.panel + i * p.stride + WIDTH), right);
    }
    *(unaligned *)out = left, *(unaligned *)(out + WIDTH) = right;
}

/* Any number of outputs. */
INLINE void multiply_rows(product p, i64 rows, const int adds) {
    i64 r = 0;
    for (; r + TILE <= rows; r += TILE) multiply_tile(p, r, adds);
    for (; r < rows; r++) multiply_row(p, r, adds);
}

/* Of a layer: ``weight`` is (rows, length), the panel is packed, ``out`` is (rows, PANEL). */
static void multiply(
        const REAL *weight, const REAL *bias, const REAL *panel, i64 length, REAL *out, i64 rows) {
    multiply_rows((product){weight, length, 1, panel, PANEL, length, bias, out, PANEL}, rows, 0);
}

/* The columns of a layer's weights, with what lies beside its rows: ``weight`` is (length, columns), of which ``count``
   are taken, ``panel`` (length, width), ``out`` (count, width). ``width`` is a multiple of PANEL. */
static void multiply_columns(
        const REAL *weight, i64 columns, i64 count, const REAL *panel, i64 width, i64 length, REAL *out) {
    for (i64 begin = 0; begin < length; begin += CHUNK)
        for (i64 at = 0; at < width; at += PANEL) {
            const product p = {weight + begin * columns, 1, columns, panel + begin * width + at, width,
                               least(CHUNK, length - begin), NULL, out + at, width};
            if (begin) multiply_rows(p, count, 1);
            else multiply_rows(p, count, 0);
        }
}

/* The sums over the samples of what each row, (rows, width), and each feature have to be multiplied with each other for:
   ``out`` is (rows, features). Features are packed: PANEL of them side by side for each sample. */
static void multiply_samples(
        const REAL *rows, i64 width, i64 count, const REAL *packed, i64 samples, i64 features, REAL *out) {
    for (i64 f = 0; f < features; f += PANEL) {
        product p = {rows, width, 1, packed + f * samples, PANEL, samples, NULL, out + f, features};
        if (features - f >= PANEL) {
            multiply_rows(p, count, 0);
            continue;
        }
        for (i64 r = 0; r < count; r++) {
            REAL edge[PANEL];
            p.out = edge, p.to = 0, p.weight = rows + r * width;
            multiply_row(p, 0, 0);
            memcpy(out + r * features + f, edge, sizeof(REAL) * (size_t)(features - f));
        }
    }
}

#endif
