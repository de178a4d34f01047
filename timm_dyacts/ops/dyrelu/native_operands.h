/* What the native kernels of Dynamic ReLU are given, and the sizes of their blocks. */
#ifndef TIMM_DYACTS_DYRELU_OPERANDS_H
#define TIMM_DYACTS_DYRELU_OPERANDS_H

#include "../native.h"

enum { BLOCK = 1024, ROWS = 64, SEGMENT = 32768, MOST_PIECES = 2, LANES = 16, TURNED = 64 };

/* The same as ``_Operands`` in native.py. */
typedef struct {
    i64 samples, channels, positions, channels_last, k;
    crew crew;
    const void *x, *dy;
    void *out;          /* y, dx */
    void *theta;        /* (N, 2K, C) */
    const void *pi;     /* (N, P), or NULL */
    const void *weight; /* (C,), or NULL: of the attention */
    void *dmean;        /* (N, C), or NULL: gradient of the sum of each plane */
    const void *dlogits; /* (N, P), or NULL */
    void *sums;         /* (N, rows, C), see each kernel */
    void *per_position; /* (N, P): logits, dpi */
    double max_value;   /* NaN: none */
    /* The hyper function: a set of coefficients for all channels, or one for each. */
    i64 units, sets;    /* of the hidden layer; 1 or C */
    const void *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
    void *hidden;       /* (units, N) */
    void *residual;     /* (sets, 2K, N) */
    void *coefs;        /* (N, 2K, sets) */
    void *dfc1_weight, *dfc1_bias, *dfc2_weight, *dfc2_bias; /* gradients */
    double starts[2 * MOST_PIECES], ranges[2 * MOST_PIECES]; /* of the coefficients */
} operands;

#endif
