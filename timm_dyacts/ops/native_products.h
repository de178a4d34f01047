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

enum { WIDTH = VECTOR_BYTES / sizeof(REAL), PANEL = 2 * WIDTH, TILE = 6 };

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

/* The products of TILE rows of weights, ``length`` long, with a panel, and the biases added. ``out`` is (TILE, PANEL).
   Sums that were an array would be kept in memory. */
INLINE void multiply_tile(
        const REAL *restrict weight, const REAL *restrict bias, const REAL *restrict panel, i64 length,
        REAL *restrict out) {
#define START(r) vector left##r = bias[r] - (vector){0}, right##r = left##r;
    EACH_ROW(START)
    for (i64 i = 0; i < length; i++) {
        const vector left = *(const unaligned *)(panel + i * PANEL), right = *(const unaligned *)(panel + i * PANEL + WIDTH);
#define ADD(r) { \
        const vector w = weight[r * length + i] - (vector){0}; \
        left##r = multiply_add(w, left, left##r); \
        right##r = multiply_add(w, right, right##r); }
        EACH_ROW(ADD)
    }
#define WRITE(r) *(unaligned *)(out + r * PANEL) = left##r, *(unaligned *)(out + r * PANEL + WIDTH) = right##r;
    EACH_ROW(WRITE)
#undef START
#undef ADD
#undef WRITE
}

INLINE void multiply_row(
        const REAL *restrict weight, REAL bias, const REAL *restrict panel, i64 length, REAL *restrict out) {
    vector left = bias - (vector){0}, right = left;
    for (i64 i = 0; i < length; i++) {
        const vector w = weight[i] - (vector){0};
        left = multiply_add(w, *(const unaligned *)(panel + i * PANEL), left);
        right = multiply_add(w, *(const unaligned *)(panel + i * PANEL + WIDTH), right);
    }
    *(unaligned *)out = left, *(unaligned *)(out + WIDTH) = right;
}

/* Any number of rows. */
static void multiply(
        const REAL *restrict weight, const REAL *restrict bias, const REAL *restrict panel, i64 length,
        REAL *restrict out, i64 rows) {
    i64 r = 0;
    for (; r + TILE <= rows; r += TILE)
        multiply_tile(weight + r * length, bias + r, panel, length, out + r * PANEL);
    for (; r < rows; r++) multiply_row(weight + r * length, bias[r], panel, length, out + r * PANEL);
}

#endif
