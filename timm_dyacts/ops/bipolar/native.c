/* The native kernels of the bipolar activations: one read of each operand, one write.

An input is (N, C, P), or (N, P, C) with the channels last. Comparisons are written so that NaN falls through. */
#include "../native.h"

enum { RELU, ELU, LEAKY, BLOCK = 32768 };

/* The same as ``_Operands`` in native.py. */
typedef struct {
    i64 samples, channels, positions, channels_last; /* small planes: their elements are the channels */
    i64 kind;
    crew crew;
    const void *x;      /* its input; of the backward pass of ReLU, the output */
    const void *dy;
    void *out;          /* y, dx; may be x */
    const void *signs;  /* (C,): 1 and -1 */
    const void *slopes; /* (C,): of the negative part */
    void *sums;         /* (N, C), or NULL: gradients of the slopes */
    double scale, parameter; /* the bound of ReLU, NaN if it has none; alpha of ELU */
} operands;

/* e^u - less for u <= 0 and ``less`` of 0 or 1: with 1, to a relative error, measured, of 8.6e-8 in fp32 and 2.3e-16 in
   fp64. Below 2^-125 (2^-1021), e^u is 0. */
INLINE REAL exp_less(REAL u, const int less) {
    const REAL whole = (REAL)(sizeof(REAL) == 4 ? 12582912.0 : 6755399441055744.0);
    const REAL lowest = (REAL)(sizeof(REAL) == 4 ? -87.0 : -708.0);
    REAL bounded = u < lowest ? lowest : u;
    REAL n = (bounded * (REAL)1.44269504088896340736 + whole) - whole;
    REAL r = bounded - n * (REAL)0.693145751953125;
    r -= n * (REAL)1.42860682030941723212e-6;
    REAL p = (REAL)(1.0 / 5040.0);
    if (sizeof(REAL) == 8) {
        p = (REAL)(1.0 / 87178291200.0);
        p = FMA(p, r, (REAL)(1.0 / 6227020800.0));
        p = FMA(p, r, (REAL)(1.0 / 479001600.0));
        p = FMA(p, r, (REAL)(1.0 / 39916800.0));
        p = FMA(p, r, (REAL)(1.0 / 3628800.0));
        p = FMA(p, r, (REAL)(1.0 / 362880.0));
        p = FMA(p, r, (REAL)(1.0 / 40320.0));
        p = FMA(p, r, (REAL)(1.0 / 5040.0));
    }
    p = FMA(p, r, (REAL)(1.0 / 720.0));
    p = FMA(p, r, (REAL)(1.0 / 120.0));
    p = FMA(p, r, (REAL)(1.0 / 24.0));
    p = FMA(p, r, (REAL)(1.0 / 6.0));
    p = FMA(p, r, (REAL)0.5);
    p = p * r * r + r;
    REAL power = EXP2(n);
    return power * p + (power - less);
}

INLINE REAL plain(REAL u, REAL slope, REAL scale, REAL parameter, const int kind) {
    if (kind == RELU) {
        REAL y = u <= 0 ? 0 : u;
        return y > parameter ? parameter : y;
    }
    if (kind == ELU) return scale * (u <= 0 ? parameter * exp_less(u, 1) : u);
    return u > 0 ? u : u * slope;
}

/* The gradient of ``u``, of which ReLU gets its output, with either sign. */
INLINE REAL plain_gradient(REAL dy, REAL u, REAL slope, REAL scale, REAL parameter, const int kind) {
    if (kind == RELU) {
        REAL size = u < 0 ? -u : u;
        return size == 0 || size >= parameter ? 0 : dy;
    }
    if (kind == ELU) return scale * dy * (u <= 0 ? parameter * exp_less(u, 0) : 1);
    return u > 0 ? dy : dy * slope;
}

INLINE void apply_run(
        const T *x, T *out, i64 count, const REAL *signs, const REAL *slopes, i64 step, const operands *o,
        const int kind) {
    const REAL scale = (REAL)o->scale, parameter = (REAL)o->parameter;
    SIMD
    for (i64 i = 0; i < count; i++) {
        REAL s = signs[i * step];
        out[i] = STORE(s * plain(s * LOAD(x[i]), slopes[i * step], scale, parameter, kind));
    }
}

INLINE void differentiate_run(
        const T *restrict dy, const T *restrict x, T *restrict out, i64 count, const REAL *signs, const REAL *slopes,
        i64 step, const operands *o, const int kind) {
    const REAL scale = (REAL)o->scale, parameter = (REAL)o->parameter;
    SIMD
    for (i64 i = 0; i < count; i++) {
        REAL u = signs[i * step] * LOAD(x[i]);
        out[i] = STORE(plain_gradient(LOAD(dy[i]), u, slopes[i * step], scale, parameter, kind));
    }
}

/* The units are planes; with the channels last, positions. */
INLINE void run_units(const operands *o, i64 begin, i64 end, const int backward, const int kind) {
    const i64 length = o->channels_last ? o->channels : o->positions;
    const REAL *signs = o->signs, *slopes = o->slopes;
    for (i64 unit = begin; unit < end; unit++) {
        const T *x = (const T *)o->x + unit * length, *dy = (const T *)o->dy + (backward ? unit * length : 0);
        T *out = (T *)o->out + unit * length;
        i64 c = o->channels_last ? 0 : unit % o->channels;
        if (o->channels_last) {
            if (backward) differentiate_run(dy, x, out, length, signs, slopes, 1, o, kind);
            else apply_run(x, out, length, signs, slopes, 1, o, kind);
        } else {
            if (backward) differentiate_run(dy, x, out, length, signs + c, slopes + c, 0, o, kind);
            else apply_run(x, out, length, signs + c, slopes + c, 0, o, kind);
        }
    }
}

static int apply_units(const void *args, i64 begin, i64 end) {
    const operands *o = args;
    switch (o->kind) {
        case RELU: run_units(o, begin, end, 0, RELU); break;
        case ELU: run_units(o, begin, end, 0, ELU); break;
        default: run_units(o, begin, end, 0, LEAKY);
    }
    return OK;
}

static int differentiate_units(const void *args, i64 begin, i64 end) {
    const operands *o = args;
    switch (o->kind) {
        case RELU: run_units(o, begin, end, 1, RELU); break;
        case ELU: run_units(o, begin, end, 1, ELU); break;
        default: run_units(o, begin, end, 1, LEAKY);
    }
    return OK;
}

static int run(const operands *o, int (*work)(const void *, i64, i64)) {
    i64 length = o->channels_last ? o->channels : o->positions;
    return run_job(&o->crew, work, o, o->samples * o->channels * o->positions / length, most(1, BLOCK / length));
}

EXPORT int NAME(bipolar_forward)(const operands *o) { return run(o, apply_units); }

EXPORT int NAME(bipolar_backward)(const operands *o) { return run(o, differentiate_units); }

/* ---- Gradients of slopes: the units are samples ---- */

static int slope_units(const void *args, i64 begin, i64 end) {
    const operands *o = args;
    const i64 C = o->channels, P = o->positions;
    const REAL *restrict signs = o->signs;
    for (i64 n = begin; n < end; n++) {
        REAL *restrict sums = (REAL *)o->sums + n * C;
        const T *restrict x = (const T *)o->x + n * C * P, *restrict dy = (const T *)o->dy + n * C * P;
        for (i64 c = 0; c < C; c++) sums[c] = 0;
        if (o->channels_last) {
            double *totals = calloc((size_t)C, sizeof(double));
            if (!totals) return OUT_OF_MEMORY;
            for (i64 i = 0; i < P; i++) {
                SIMD
                for (i64 c = 0; c < C; c++) {
                    REAL u = signs[c] * LOAD(x[i * C + c]);
                    totals[c] += u > 0 ? 0 : signs[c] * LOAD(dy[i * C + c]) * u;
                }
            }
            for (i64 c = 0; c < C; c++) sums[c] = (REAL)totals[c];
            free(totals);
            continue;
        }
        for (i64 c = 0; c < C; c++) {
            double total = 0;
            _Pragma("omp simd reduction(+:total)")
            for (i64 i = 0; i < P; i++) {
                REAL u = signs[c] * LOAD(x[c * P + i]);
                total += u > 0 ? 0 : signs[c] * LOAD(dy[c * P + i]) * u;
            }
            sums[c] = (REAL)total;
        }
    }
    return OK;
}

EXPORT int NAME(bipolar_slopes)(const operands *o) { return run_job(&o->crew, slope_units, o, o->samples, 1); }

/* ---- Max pooling: the largest element of each window, or the smallest where the sign is negative ---- */

enum { CHANNELS = 64, MOST_ELEMENTS = 127, WORK = 16384 };

/* The same as ``_Pooling`` in native.py. Sizes are those of height and width. */
typedef struct {
    i64 samples, channels, channels_last;
    i64 size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2];
    crew crew;
    const void *x;     /* its input, or the gradient of its output */
    const void *signs; /* (C,): 1 and -1 */
    void *out;         /* y, dx */
    int8_t *winner;    /* the number of the element that has won, for each window */
} pooling;

/* Columns of a row, ``step`` apart: element ``e`` takes the place of what has won so far if it is larger, or the first, or
   not a number. */
INLINE void raise_columns(
        const T *restrict x, i64 step, i64 count, REAL s, REAL *restrict best, INT *restrict number, INT e) {
    SIMD
    for (i64 i = 0; i < count; i++) {
        REAL v = s * LOAD(x[i * step]);
        INT wins = (number[i] < 0) | (v > best[i]) | (v != v);
        best[i] = wins ? v : best[i];
        number[i] = wins ? e : number[i];
    }
}

INLINE void raise_channels(
        const T *restrict x, i64 count, const REAL *restrict signs, REAL *restrict best, INT *restrict number, INT e) {
    SIMD
    for (i64 c = 0; c < count; c++) {
        REAL v = signs[c] * LOAD(x[c]);
        INT wins = (number[c] < 0) | (v > best[c]) | (v != v);
        best[c] = wins ? v : best[c];
        number[c] = wins ? e : number[c];
    }
}

/* Where an element of a window lies in the input: its row or column, less than 0 or beyond the size if in none. */
INLINE i64 place_of(const pooling *o, int dim, i64 window, i64 element) {
    return window * o->stride[dim] + element * o->dilation[dim] - o->padding[dim];
}

/* The units are planes. */
static int pool_planes(const void *args, i64 begin, i64 end) {
    const pooling *o = args;
    const i64 W = o->size[1], columns = o->out_size[1], s = o->stride[1];
    REAL *best = malloc((sizeof(REAL) + sizeof(INT)) * (size_t)columns);
    if (!best) return OUT_OF_MEMORY;
    INT *number = (INT *)(best + columns);
    for (i64 row = begin * o->out_size[0]; row < end * o->out_size[0]; row++) {
        const i64 plane = row / o->out_size[0], oh = row % o->out_size[0];
        const REAL sign = ((const REAL *)o->signs)[plane % o->channels];
        for (i64 i = 0; i < columns; i++) best[i] = 0, number[i] = -1;
        for (i64 kh = 0; kh < o->kernel[0]; kh++) {
            const i64 h = place_of(o, 0, oh, kh);
            if (h < 0 || h >= o->size[0]) continue;
            for (i64 kw = 0; kw < o->kernel[1]; kw++) {
                const i64 first = place_of(o, 1, 0, kw); /* column of the first window */
                const i64 from = first < 0 ? parts(-first, s) : 0;
                const i64 to = first >= W ? 0 : least(columns, (W - 1 - first) / s + 1);
                const T *x = (const T *)o->x + (plane * o->size[0] + h) * W + first + from * s;
                const INT e = (INT)(kh * o->kernel[1] + kw);
                if (s == 1) raise_columns(x, 1, to - from, sign, best + from, number + from, e);
                else if (s == 2) raise_columns(x, 2, to - from, sign, best + from, number + from, e);
                else raise_columns(x, s, to - from, sign, best + from, number + from, e);
            }
        }
        T *restrict y = (T *)o->out + row * columns;
        int8_t *restrict winner = o->winner + row * columns;
        for (i64 i = 0; i < columns; i++) y[i] = STORE(sign * best[i]), winner[i] = (int8_t)number[i];
    }
    free(best);
    return OK;
}

/* The units are windows. */
static int pool_channels(const void *args, i64 begin, i64 end) {
    const pooling *o = args;
    const i64 C = o->channels, windows = o->out_size[0] * o->out_size[1];
    REAL best[CHANNELS];
    INT number[CHANNELS];
    for (i64 window = begin; window < end; window++) {
        const i64 n = window / windows, oh = window % windows / o->out_size[1], ow = window % o->out_size[1];
        for (i64 c = 0; c < C; c += CHANNELS) {
            const i64 count = least(CHANNELS, C - c);
            const REAL *restrict signs = (const REAL *)o->signs + c;
            for (i64 i = 0; i < count; i++) best[i] = 0, number[i] = -1;
            for (i64 e = 0; e < o->kernel[0] * o->kernel[1]; e++) {
                const i64 h = place_of(o, 0, oh, e / o->kernel[1]), w = place_of(o, 1, ow, e % o->kernel[1]);
                if (h < 0 || h >= o->size[0] || w < 0 || w >= o->size[1]) continue;
                raise_channels((const T *)o->x + ((n * o->size[0] + h) * o->size[1] + w) * C + c, count, signs, best,
                               number, (INT)e);
            }
            T *restrict y = (T *)o->out + window * C + c;
            int8_t *restrict winner = o->winner + window * C + c;
            SIMD
            for (i64 i = 0; i < count; i++) y[i] = STORE(signs[i] * best[i]), winner[i] = (int8_t)number[i];
        }
    }
    return OK;
}

/* The units are planes; with the channels last, blocks of channels of a sample. */
static int unpool(const void *args, i64 begin, i64 end) {
    const pooling *o = args;
    const i64 C = o->channels_last ? o->channels : 1, blocks = parts(C, CHANNELS), held = least(C, CHANNELS);
    const i64 positions = o->size[0] * o->size[1], windows = o->out_size[0] * o->out_size[1];
    i64 shift[MOST_ELEMENTS]; /* of an element from the first one of its window */
    for (i64 e = 0; e < o->kernel[0] * o->kernel[1]; e++)
        shift[e] = e / o->kernel[1] * o->dilation[0] * o->size[1] + e % o->kernel[1] * o->dilation[1];
    REAL *sums = malloc(sizeof(REAL) * (size_t)(positions * held));
    if (!sums) return OUT_OF_MEMORY;
    for (i64 unit = begin; unit < end; unit++) {
        const i64 n = unit / blocks, c = unit % blocks * CHANNELS, count = least(CHANNELS, C - c);
        memset(sums, 0, sizeof(REAL) * (size_t)(positions * held));
        for (i64 window = 0; window < windows; window++) {
            const i64 first = place_of(o, 0, window / o->out_size[1], 0) * o->size[1]
                + place_of(o, 1, window % o->out_size[1], 0);
            const i64 at = (n * windows + window) * C + c;
            const T *dy = (const T *)o->x + at;
            for (i64 i = 0; i < count; i++) sums[(first + shift[o->winner[at + i]]) * held + i] += LOAD(dy[i]);
        }
        for (i64 p = 0; p < positions; p++) {
            T *restrict dx = (T *)o->out + (n * positions + p) * C + c;
            const REAL *restrict from = sums + p * held;
            SIMD
            for (i64 i = 0; i < count; i++) dx[i] = STORE(from[i]);
        }
    }
    free(sums);
    return OK;
}

EXPORT int NAME(bipolar_max_pool)(const pooling *o) {
    const i64 elements = o->kernel[0] * o->kernel[1], windows = o->out_size[0] * o->out_size[1];
    if (o->channels_last)
        return run_job(&o->crew, pool_channels, o, o->samples * windows, most(1, WORK / (o->channels * elements)));
    return run_job(&o->crew, pool_planes, o, o->samples * o->channels, most(1, WORK / (windows * elements)));
}

EXPORT int NAME(bipolar_max_pool_backward)(const pooling *o) {
    const i64 positions = o->size[0] * o->size[1];
    if (o->channels_last) return run_job(&o->crew, unpool, o, o->samples * parts(o->channels, CHANNELS), 1);
    return run_job(&o->crew, unpool, o, o->samples * o->channels, most(1, WORK / positions));
}
