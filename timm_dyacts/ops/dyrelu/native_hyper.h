/* The hyper function of Dynamic ReLU: from the means of planes to the coefficients, and back. */
#ifndef TIMM_DYACTS_DYRELU_HYPER_H
#define TIMM_DYACTS_DYRELU_HYPER_H

#include "../native_products.h"
#include "native_operands.h"

/* Sets of coefficients whose gradients are computed together: their rows are whole tiles. */
enum { SETS = 3 * LANES };

/* tanh(z / 2) = 2 sigmoid(z) - 1, to an absolute error of one rounding; exactly 0 for 0. */
INLINE REAL squashed(REAL z) {
    REAL e = EXP2((z < 0 ? z : -z) * (REAL)1.44269504088896340736);
    REAL r = (1 - e) / (1 + e);
    return z < 0 ? -r : r;
}

typedef struct {
    const operands *o;
    i64 panels;
    REAL *means, *hidden; /* packed: (panels, C, PANEL), (panels, units, PANEL) */
} hyper;

/* The samples of a panel */
#define LANES_OF(panel) least(PANEL, o->samples - (panel) * PANEL)

static int pack_means(const void *args, i64 begin, i64 end) {
    const hyper *h = args;
    const operands *o = h->o;
    const i64 C = o->channels;
    for (i64 q = 0; q < h->panels; q++) {
        const REAL *restrict means = (const REAL *)o->sums + q * PANEL * C;
        const i64 lanes = LANES_OF(q);
        for (i64 c = begin * LANES; c < least(end * LANES, C); c++) {
            REAL *restrict row = h->means + (q * C + c) * PANEL;
            for (i64 n = 0; n < PANEL; n++) row[n] = n < lanes ? means[n * C + c] : 0;
        }
    }
    return OK;
}

static int compute_hidden(const void *args, i64 begin, i64 end) {
    const hyper *h = args;
    const operands *o = h->o;
    const i64 C = o->channels, first = begin * TILE, rows = least(end * TILE, o->units) - first;
    for (i64 q = 0; q < h->panels; q++) {
        REAL *restrict panel = h->hidden + (q * o->units + first) * PANEL;
        multiply((const REAL *)o->fc1_weight + first * C, (const REAL *)o->fc1_bias + first, h->means + q * C * PANEL, C,
                 panel, rows);
        SIMD
        for (i64 i = 0; i < rows * PANEL; i++) panel[i] = panel[i] < 0 ? 0 : panel[i];
        for (i64 r = 0; r < rows; r++)
            memcpy((REAL *)o->hidden + (first + r) * o->samples + q * PANEL, panel + r * PANEL,
                   sizeof(REAL) * (size_t)LANES_OF(q));
    }
    return OK;
}

/* LANES sets of coefficients at a time: the samples of logits and residuals lie side by side, and are turned around to
   where those of the coefficients lie while they are in the cache. */
static int compute_coefficients(const void *args, i64 begin, i64 end) {
    const hyper *h = args;
    const operands *o = h->o;
    const i64 each = 2 * o->k, length = o->units;
    REAL logits[LANES * 2 * MOST_PIECES * PANEL];
    for (i64 first = begin * LANES; first < least(end * LANES, o->sets); first += LANES) {
        const i64 sets = least(LANES, o->sets - first), rows = sets * each, row = first * each;
        for (i64 q = 0; q < h->panels; q++) {
            const i64 lanes = LANES_OF(q);
            REAL *restrict residual = (REAL *)o->residual + row * o->samples + q * PANEL;
            REAL *restrict coefs = (REAL *)o->coefs + q * PANEL * each * o->sets + first;
            multiply((const REAL *)o->fc2_weight + row * length, (const REAL *)o->fc2_bias + row,
                     h->hidden + q * length * PANEL, length, logits, rows);
            SIMD
            for (i64 i = 0; i < rows * PANEL; i++) logits[i] = squashed(logits[i]);
            for (i64 r = 0; r < rows; r++)
                memcpy(residual + r * o->samples, logits + r * PANEL, sizeof(REAL) * (size_t)lanes);
            for (i64 n = 0; n < lanes; n++)
                for (i64 k = 0; k < each; k++) {
                    const REAL start = (REAL)o->starts[k], range = (REAL)o->ranges[k];
                    for (i64 c = 0; c < sets; c++)
                        coefs[(n * each + k) * o->sets + c] = start + logits[(c * each + k) * PANEL + n] * range;
                }
        }
    }
    return OK;
}

/* Coefficients that all channels share, for each of them. */
static void spread_coefficients(const operands *o) {
    const REAL *restrict coefs = o->coefs;
    REAL *restrict theta = o->theta;
    for (i64 row = 0; row < o->samples * 2 * o->k; row++)
        for (i64 c = 0; c < o->channels; c++) theta[row * o->channels + c] = coefs[row];
}

/* How many units of ``cost`` products each are worth a thread's while. */
INLINE i64 grain_of(i64 cost) { return most(1, SEGMENT / most(1, cost)); }

/* From ``sums``, the means, make what the hyper function gives: ``hidden``, ``residual``, ``coefs`` and ``theta``, which
   may be ``coefs`` where there is a set of them for each channel. */
EXPORT int NAME(dyrelu_hyper)(const operands *o) {
    const i64 panels = parts(o->samples, PANEL), each = 2 * o->k, width = panels * PANEL;
    const i64 bytes = width * (o->channels + o->units) * (i64)sizeof(REAL);
    REAL *packed = aligned_alloc(64, (size_t)(bytes / 64 + 1) * 64);
    if (!packed) return OUT_OF_MEMORY;
    hyper h = {o, panels, packed, packed + width * o->channels};
    run_job(&o->crew, pack_means, &h, parts(o->channels, LANES), grain_of(LANES * width));
    run_job(&o->crew, compute_hidden, &h, parts(o->units, TILE), grain_of(TILE * width * o->channels / 16));
    run_job(&o->crew, compute_coefficients, &h, parts(o->sets, LANES), grain_of(LANES * each * width * (o->units / 16 + 1)));
    free(packed);
    if (o->theta != o->coefs) spread_coefficients(o);
    return OK;
}

/* ---- Gradients ---- */

typedef struct {
    const operands *o;
    i64 width;
    REAL *dlogits, *dhidden, *dmeans; /* (sets, 2K, width), (units, width), (C, width) */
    REAL *hidden, *means;             /* packed by features: (parts(features, PANEL), N, PANEL) */
} hyper_gradients;

/* Lay features out PANEL at a time, with zeros behind the last: feature ``f`` of sample ``n`` is
   ``from[n * sample + f * feature]``. */
static void pack_features(const REAL *restrict from, i64 sample, i64 feature, i64 N, i64 features, REAL *restrict to) {
    for (i64 begin = 0; begin < features; begin += PANEL)
        for (i64 n = 0; n < N; n++, to += PANEL)
            for (i64 j = 0; j < PANEL; j++)
                to[j] = begin + j < features ? from[n * sample + (begin + j) * feature] : 0;
}

INLINE REAL sum_of(const REAL *restrict row, i64 count) {
    REAL sum = 0;
    for (i64 i = 0; i < count; i++) sum += row[i];
    return sum;
}

/* The gradients of the second layer's outputs, and of its weights and biases, some sets of coefficients at a time. */
static int compute_dlogits(const void *args, i64 begin, i64 end) {
    const hyper_gradients *h = args;
    const operands *o = h->o;
    const i64 sets = o->sets, N = o->samples, each = 2 * o->k, width = h->width;
    const REAL *restrict dcoefs = o->coefs;
    for (i64 first = begin * SETS; first < least(end * SETS, sets); first += SETS) {
        const i64 last = least(first + SETS, sets), row = first * each, rows = (last - first) * each;
        REAL *restrict block = h->dlogits + row * width;
        for (i64 n = 0; n < N; n++)
            for (i64 k = 0; k < each; k++)
                for (i64 c = first; c < last; c++)
                    block[((c - first) * each + k) * width + n] = dcoefs[(n * each + k) * sets + c];
        for (i64 r = 0; r < rows; r++) {
            const REAL range = (REAL)o->ranges[r % each] / 2;
            const REAL *restrict residual = (const REAL *)o->residual + (row + r) * N;
            REAL *restrict to = block + r * width;
            SIMD
            for (i64 n = 0; n < N; n++) to[n] *= range * (1 - residual[n] * residual[n]);
            for (i64 n = N; n < width; n++) to[n] = 0;
            ((REAL *)o->dfc2_bias)[row + r] = sum_of(to, N);
        }
        multiply_samples(block, width, rows, h->hidden, N, o->units,
                         (REAL *)o->dfc2_weight + row * o->units);
    }
    return OK;
}

/* The gradients of hidden units, and of the first layer. */
static int compute_dhidden(const void *args, i64 begin, i64 end) {
    const hyper_gradients *h = args;
    const operands *o = h->o;
    const i64 N = o->samples, units = o->units, width = h->width, first = begin * TILE;
    const i64 count = least(end * TILE, units) - first;
    REAL *restrict dhidden = h->dhidden + first * width;
    multiply_columns((const REAL *)o->fc2_weight + first, units, count, h->dlogits, width, o->sets * 2 * o->k, dhidden);
    for (i64 u = 0; u < count; u++) {
        const REAL *restrict hidden = (const REAL *)o->hidden + (first + u) * N;
        for (i64 n = 0; n < N; n++) dhidden[u * width + n] = hidden[n] <= 0 ? 0 : dhidden[u * width + n];
        ((REAL *)o->dfc1_bias)[first + u] = sum_of(dhidden + u * width, N);
    }
    multiply_samples(dhidden, width, count, h->means, N, o->channels, (REAL *)o->dfc1_weight + first * o->channels);
    return OK;
}

/* The gradients of the sums of planes. */
static int compute_dmeans(const void *args, i64 begin, i64 end) {
    const hyper_gradients *h = args;
    const operands *o = h->o;
    const i64 C = o->channels, width = h->width, first = begin * TILE, last = least(end * TILE, C);
    const REAL positions = (REAL)o->positions;
    REAL *restrict dmean = o->dmean;
    multiply_columns((const REAL *)o->fc1_weight + first, C, last - first, h->dhidden, width, o->units,
                     h->dmeans + first * width);
    for (i64 n = 0; n < o->samples; n++)
        for (i64 c = first; c < last; c++) dmean[n * C + c] = h->dmeans[c * width + n] / positions;
    return OK;
}

/* Run a job of products in as few pieces as there are threads: a piece goes through all of a matrix. */
INLINE void run_products(const operands *o, int (*work)(const void *, i64, i64), const void *args, i64 units, i64 cost) {
    run_job(&o->crew, work, args, units, most(parts(units, o->crew.threads), grain_of(cost)));
}

/* From the gradient of ``coefs``, in their place, make those of the layers and ``dmean``. ``sums`` are the means. */
EXPORT int NAME(dyrelu_hyper_backward)(const operands *o) {
    const i64 N = o->samples, C = o->channels, units = o->units, outputs = o->sets * 2 * o->k;
    const i64 width = parts(N, PANEL) * PANEL;
    const i64 packed = (parts(units, PANEL) + parts(C, PANEL)) * PANEL * N;
    const i64 bytes = (width * (outputs + units + C) + packed) * (i64)sizeof(REAL);
    REAL *dlogits = aligned_alloc(64, (size_t)(bytes / 64 + 1) * 64);
    if (!dlogits) return OUT_OF_MEMORY;
    REAL *dhidden = dlogits + outputs * width, *dmeans = dhidden + units * width, *hidden = dmeans + C * width;
    hyper_gradients h = {o, width, dlogits, dhidden, dmeans, hidden, hidden + parts(units, PANEL) * PANEL * N};
    pack_features(o->hidden, 1, N, N, units, h.hidden);
    pack_features(o->sums, C, 1, N, C, h.means);
    run_job(&o->crew, compute_dlogits, &h, parts(o->sets, SETS), grain_of(SETS * 2 * o->k * width * units / 16));
    run_products(o, compute_dhidden, &h, parts(units, TILE), TILE * width * (outputs + C) / 16);
    run_products(o, compute_dmeans, &h, parts(C, TILE), TILE * width * units / 16);
    free(dlogits);
    return OK;
}

#endif
