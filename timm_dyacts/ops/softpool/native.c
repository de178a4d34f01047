/* The native kernels of SoftPool.

An input is (planes, D, H, W), or (N, D, H, W, C) with the channels last. All arithmetic is that of the reference: with
fractions of the input that cannot overflow (``scale``), relative to the element of each window that has the largest
weight. A negative ``beta`` has been turned into a negative ``scale`` and a positive ``sharpness``. */
#include "../native.h"

enum { CHANNELS = 256, GRAIN = 16384 };

/* The same as ``_Operands`` in native.py. Sizes are those of depth, height and width. */
typedef struct {
    i64 samples, channels, channels_last; /* without the channels last, samples are planes */
    i64 size[3], out_size[3], kernel[3], stride[3], padding[3], dilation[3];
    i64 padded;   /* whether some window has elements outside of the input */
    i64 covers;   /* whether each element of the input belongs to exactly one window */
    i64 detach;
    crew crew;
    const void *x, *dy;
    void *out; /* y, dx */
    double scale, sharpness; /* of powers of 2 */
} operands;

/* What ``beta`` is for the scaled input, in the derivative of the weights. */
INLINE REAL slope_of_weights(const operands *o) {
    return o->detach ? 0 : (REAL)(o->sharpness * 0.69314718055994530942);
}

INLINE i64 floor_div(i64 a, i64 b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

INLINE i64 volume(const i64 *size) { return size[0] * size[1] * size[2]; }

/* ---- Windows of 2x2 and 3x3 at once, without a way through memory for what is between the steps ---- */

#define WINDOW(TYPE) \
    const TYPE *restrict x0, const TYPE *restrict x1, const TYPE *restrict x2, const TYPE *restrict x3, \
    const TYPE *restrict x4, const TYPE *restrict x5, const TYPE *restrict x6, const TYPE *restrict x7, \
    const TYPE *restrict x8
#define ELEMENTS(x, at) \
    (x) + (at)[0], (x) + (at)[1], (x) + (at)[2], (x) + (at)[3], (x) + (at)[4], (x) + (at)[5], (x) + (at)[6], \
    (x) + (at)[7], (x) + (at)[8]

/* The elements of a window of ``E``. */
#define READ_WINDOW(READ) \
    REAL v0 = READ(x0[i]), v1 = READ(x1[i]), v2 = READ(x2[i]), v3 = READ(x3[i]); \
    REAL v4 = E > 4 ? READ(x4[i]) : 0, v5 = E > 4 ? READ(x5[i]) : 0, v6 = E > 4 ? READ(x6[i]) : 0; \
    REAL v7 = E > 4 ? READ(x7[i]) : 0, v8 = E > 4 ? READ(x8[i]) : 0;

/* From the elements ``v0``, ... of a window of ``E``: their ``top``, weights ``w0``, ..., the ``total`` of these, and the
   ``moment``. */
#define WEIGH_WINDOW \
    REAL top = larger(larger(larger(v0, v1), v2), v3); \
    if (E > 4) top = larger(larger(larger(larger(larger(top, v4), v5), v6), v7), v8); \
    REAL w0 = EXP2((v0 - top) * sharpness), w1 = EXP2((v1 - top) * sharpness), w2 = EXP2((v2 - top) * sharpness); \
    REAL w3 = EXP2((v3 - top) * sharpness), w4 = E > 4 ? EXP2((v4 - top) * sharpness) : 0; \
    REAL w5 = E > 4 ? EXP2((v5 - top) * sharpness) : 0, w6 = E > 4 ? EXP2((v6 - top) * sharpness) : 0; \
    REAL w7 = E > 4 ? EXP2((v7 - top) * sharpness) : 0, w8 = E > 4 ? EXP2((v8 - top) * sharpness) : 0; \
    REAL total = w0 + w1 + w2 + w3, moment = w0 * (v0 - top) + w1 * (v1 - top) + w2 * (v2 - top) + w3 * (v3 - top); \
    if (E > 4) { \
        total += w4 + w5 + w6 + w7 + w8; \
        moment += w4 * (v4 - top) + w5 * (v5 - top) + w6 * (v6 - top) + w7 * (v7 - top) + w8 * (v8 - top); \
    }

INLINE REAL larger(REAL top, REAL v) { return v > top ? v : top; }

#define PLAIN(v) (v)
#define SCALED(v) (scale * LOAD(v))

INLINE void pool_rows(WINDOW(REAL), REAL *restrict y, i64 count, REAL sharpness, const int E) {
    SIMD
    for (i64 i = 0; i < count; i++) {
        READ_WINDOW(PLAIN)
        WEIGH_WINDOW
        y[i] = top + moment / total;
    }
}

INLINE void pool_channels(WINDOW(T), T *restrict y, i64 count, REAL scale, REAL sharpness, const int E) {
    const REAL back = 1 / scale;
    SIMD
    for (i64 i = 0; i < count; i++) {
        READ_WINDOW(SCALED)
        WEIGH_WINDOW
        y[i] = STORE((top + moment / total) * back);
    }
}

/* Slopes of the four elements of a window that shares none; ``slope`` is 0 where the weights are constants. */
#define SLOPE(w, v) (w) * factor + (w) * factor * ((v) - top - mean) * slope

INLINE void slopes_of_rows(
        WINDOW(REAL), const REAL *restrict dy, REAL *restrict d0, REAL *restrict d1, REAL *restrict d2,
        REAL *restrict d3, i64 count, REAL sharpness, REAL slope) {
    enum { E = 4 };
    SIMD
    for (i64 i = 0; i < count; i++) {
        READ_WINDOW(PLAIN)
        WEIGH_WINDOW
        REAL factor = dy[i] / total, mean = moment / total;
        d0[i] = SLOPE(w0, v0), d1[i] = SLOPE(w1, v1), d2[i] = SLOPE(w2, v2), d3[i] = SLOPE(w3, v3);
    }
}

INLINE void slopes_of_channels(
        WINDOW(T), const T *restrict dy, T *restrict d0, T *restrict d1, T *restrict d2, T *restrict d3, i64 count,
        REAL scale, REAL sharpness, REAL slope) {
    enum { E = 4 };
    SIMD
    for (i64 i = 0; i < count; i++) {
        READ_WINDOW(SCALED)
        WEIGH_WINDOW
        REAL factor = LOAD(dy[i]) / total, mean = moment / total;
        d0[i] = STORE(SLOPE(w0, v0)), d1[i] = STORE(SLOPE(w1, v1));
        d2[i] = STORE(SLOPE(w2, v2)), d3[i] = STORE(SLOPE(w3, v3));
    }
}

/* ---- Pairs of rows: windows of 2x2 that share nothing, straight from the input to the output ----

A run has as many windows as there are lanes. The last one of a row ends where the row ends, and computes once more what
the one before it has: a row has at least one run, and no remainder. */

#if defined(__AVX512F__)
enum { RUN = 64 / sizeof(REAL) };
#else
enum { RUN = 32 / sizeof(REAL) };
#endif

static i64 are_pairs(const operands *o) {
    return !o->padded && o->kernel[0] == 1 && o->stride[0] == 1 && o->kernel[1] == 2 && o->kernel[2] == 2
        && o->stride[1] == 2 && o->stride[2] == 2 && o->dilation[1] == 1 && o->dilation[2] == 1
        && o->out_size[2] >= RUN;
}

/* Numbers of two bytes are converted on their way, where they lie side by side. */
enum { CONVERTS = sizeof(T) != sizeof(REAL) };

INLINE const REAL *read_run(const T *restrict x, REAL *restrict buffer, const int count) {
    if (!CONVERTS) return (const REAL *)x;
    SIMD
    for (i64 i = 0; i < count; i++) buffer[i] = LOAD(x[i]);
    return buffer;
}

INLINE void write_run(T *restrict to, const REAL *restrict buffer, const int count) {
    if (!CONVERTS) return;
    SIMD
    for (i64 i = 0; i < count; i++) to[i] = STORE(buffer[i]);
}

#define PAIRS \
    enum { E = 4 }; \
    REAL v0 = scale * x[2 * i], v1 = scale * x[2 * i + 1], v2 = scale * below[2 * i], v3 = scale * below[2 * i + 1]; \
    REAL v4 = 0, v5 = 0, v6 = 0, v7 = 0, v8 = 0;

INLINE void pool_pairs(const T *row, const T *row_below, T *out, REAL scale, REAL sharpness) {
    const REAL back = 1 / scale;
    REAL row_buffer[2 * RUN], below_buffer[2 * RUN], out_buffer[RUN];
    const REAL *restrict x = read_run(row, row_buffer, 2 * RUN);
    const REAL *restrict below = read_run(row_below, below_buffer, 2 * RUN);
    REAL *restrict y = CONVERTS ? out_buffer : (REAL *)out;
    SIMD
    for (i64 i = 0; i < RUN; i++) {
        PAIRS
        WEIGH_WINDOW
        y[i] = (top + moment / total) * back;
    }
    write_run(out, out_buffer, RUN);
}

/* The units are output rows. */
static int forward_pairs(const void *args, i64 begin, i64 end) {
    const operands *o = args;
    const i64 rows = o->out_size[1], columns = o->out_size[2], width = o->size[2];
    for (i64 row = begin; row < end; row++) {
        const T *x = (const T *)o->x + (row / rows * o->size[1] + 2 * (row % rows)) * width;
        T *y = (T *)o->out + row * columns;
        for (i64 i = 0; i < columns; i += RUN) {
            i64 at = least(i, columns - RUN);
            pool_pairs(x + 2 * at, x + width + 2 * at, y + at, (REAL)o->scale, (REAL)o->sharpness);
        }
    }
    return OK;
}

INLINE void slopes_of_pairs(
        const T *row, const T *row_below, const T *grad, T *out, T *out_below, REAL scale, REAL sharpness, REAL slope) {
    REAL row_buffer[2 * RUN], below_buffer[2 * RUN], grad_buffer[RUN], out_buffer[2 * RUN], out_below_buffer[2 * RUN];
    const REAL *restrict x = read_run(row, row_buffer, 2 * RUN);
    const REAL *restrict below = read_run(row_below, below_buffer, 2 * RUN);
    const REAL *restrict dy = read_run(grad, grad_buffer, RUN);
    REAL *restrict dx = CONVERTS ? out_buffer : (REAL *)out;
    REAL *restrict dx_below = CONVERTS ? out_below_buffer : (REAL *)out_below;
    SIMD
    for (i64 i = 0; i < RUN; i++) {
        PAIRS
        WEIGH_WINDOW
        REAL factor = dy[i] / total, mean = moment / total;
        dx[2 * i] = SLOPE(w0, v0);
        dx[2 * i + 1] = SLOPE(w1, v1);
        dx_below[2 * i] = SLOPE(w2, v2);
        dx_below[2 * i + 1] = SLOPE(w3, v3);
    }
    write_run(out, out_buffer, 2 * RUN);
    write_run(out_below, out_below_buffer, 2 * RUN);
}

/* The units are output rows. */
static int backward_pairs(const void *args, i64 begin, i64 end) {
    const operands *o = args;
    const i64 columns = o->out_size[2], width = o->size[2];
    const REAL slope = slope_of_weights(o);
    for (i64 row = begin; row < end; row++) {
        /* Each row of the input belongs to a window. */
        const T *x = (const T *)o->x + 2 * row * width, *dy = (const T *)o->dy + row * columns;
        T *dx = (T *)o->out + 2 * row * width;
        for (i64 i = 0; i < columns; i += RUN) {
            i64 at = least(i, columns - RUN);
            slopes_of_pairs(x + 2 * at, x + width + 2 * at, dy + at, dx + 2 * at, dx + width + 2 * at,
                            (REAL)o->scale, (REAL)o->sharpness, slope);
        }
    }
    return OK;
}

/* ---- Rows: the width is what lies side by side ----

A batch is a run of output rows. What their windows read is copied, for each place (kd, kh) in the window, to rows of
their own: column ``ow * stride + r`` of the input to column ``ow`` of phase ``r``. There, element ``kw`` of all windows
of a batch lies side by side, and loops run over whole batches. Behind the ``columns`` windows of a row there are some
more columns for the elements of the last ones, and as many windows that do not exist. What lies outside of the input
holds ``ABSENT``, less than any fraction of a number. */

#define ABSENT ((REAL)-0.75 * LARGEST)

typedef struct {
    const operands *o;
    i64 places;          /* kd * kh */
    i64 left, width;     /* columns before the first window, of a row */
    i64 rows;            /* of a batch */
    i64 length, phase;   /* columns of a batch; with room for the elements of the last windows */
    REAL *x, *grad;      /* (places, stride, phase) */
    REAL *top, *total, *moment, *dy, *exists; /* (length,) */
    REAL *weights;       /* (elements, length) */
    REAL *sums;          /* the gradients of a group of planes, where windows overlap */
} batch;

static i64 rows_of_batch(const operands *o, i64 width) {
    i64 most_columns = least(1024, most(64, 8192 / (o->kernel[0] * o->kernel[1] * (o->stride[2] + o->kernel[2]))));
    return most(1, most_columns / width);
}

static int make_batch(batch *b, const operands *o, i64 backward, i64 group) {
    i64 s = o->stride[2], elements = volume(o->kernel);
    i64 last = floor_div((o->kernel[2] - 1) * o->dilation[2] - o->padding[2], s);
    b->o = o;
    b->places = o->kernel[0] * o->kernel[1];
    b->left = -floor_div(-o->padding[2], s);
    b->width = b->left + o->out_size[2] + most(0, last);
    b->rows = rows_of_batch(o, b->width);
    b->length = b->rows * b->width;
    b->phase = b->length + b->width;
    i64 phases = b->places * s * b->phase, sums = backward && !o->covers ? group * volume(o->size) : 0;
    i64 needed = phases * (1 + backward) + 5 * b->length + (backward ? elements * b->length : 0) + sums;
    REAL *memory = malloc(sizeof(REAL) * (size_t)needed);
    if (!memory) return OUT_OF_MEMORY;
    b->x = memory, memory += phases;
    b->grad = memory, memory += backward ? phases : 0;
    b->top = memory, memory += b->length;
    b->total = memory, memory += b->length;
    b->moment = memory, memory += b->length;
    b->dy = memory, memory += b->length;
    b->exists = memory, memory += b->length;
    b->weights = memory, memory += backward ? elements * b->length : 0;
    b->sums = memory;
    for (i64 i = 0; i < phases; i++) b->x[i] = 0;
    for (i64 r = 0; r < b->rows; r++)
        for (i64 i = 0; i < b->width; i++) b->exists[r * b->width + i] = i < o->out_size[2];
    return OK;
}

/* The plane that an output row belongs to, and the row of the input that place (kd, kh) is in, -1 if in none. */
INLINE i64 locate(const operands *o, i64 row, i64 kd, i64 kh, i64 *plane) {
    i64 oh = row % o->out_size[1], od = row / o->out_size[1] % o->out_size[0];
    i64 d = od * o->stride[0] + kd * o->dilation[0] - o->padding[0];
    i64 h = oh * o->stride[1] + kh * o->dilation[1] - o->padding[1];
    *plane = row / (o->out_size[1] * o->out_size[0]);
    return d < 0 || d >= o->size[0] || h < 0 || h >= o->size[1] ? -1 : d * o->size[1] + h;
}

/* Of phase ``r``, the columns that lie in the input: ``begin`` to ``end``. */
INLINE void columns_of(const batch *b, i64 r, i64 *begin, i64 *end) {
    const operands *o = b->o;
    i64 s = o->stride[2];
    *begin = b->left;
    *end = most(b->left, least(b->width, b->left + (o->size[2] - r + s - 1) / s));
}

INLINE void split_row(const T *restrict x, REAL *restrict to, i64 begin, i64 end, i64 s, REAL scale) {
    SIMD
    for (i64 i = begin; i < end; i++) to[i] = scale * LOAD(x[(i - begin) * s]);
}

/* Fill the phases for output rows ``first`` to ``first + rows``. */
static void read_batch(const batch *b, i64 first, i64 rows) {
    const operands *o = b->o;
    const i64 s = o->stride[2];
    const REAL scale = (REAL)o->scale;
    for (i64 place = 0; place < b->places; place++)
        for (i64 row = 0; row < rows; row++) {
            i64 plane, line = locate(o, first + row, place / o->kernel[1], place % o->kernel[1], &plane);
            const T *x = (const T *)o->x + (plane * o->size[0] * o->size[1] + line) * o->size[2];
            for (i64 r = 0; r < s; r++) {
                REAL *to = b->x + (place * s + r) * b->phase + row * b->width;
                i64 begin = 0, end = 0;
                if (line >= 0) {
                    columns_of(b, r, &begin, &end);
                    if (s == 1) split_row(x, to, begin, end, 1, scale);
                    else if (s == 2) split_row(x + r, to, begin, end, 2, scale);
                    else split_row(x + r, to, begin, end, s, scale);
                }
                for (i64 i = 0; i < begin; i++) to[i] = ABSENT;
                for (i64 i = end; i < b->width; i++) to[i] = ABSENT;
            }
        }
}

/* Where element ``e`` of the first window lies in the phases. */
INLINE i64 offset_of(const batch *b, i64 e) {
    const operands *o = b->o;
    i64 shift = e % o->kernel[2] * o->dilation[2] - o->padding[2], q = floor_div(shift, o->stride[2]);
    return (e / o->kernel[2] * o->stride[2] + shift - q * o->stride[2]) * b->phase + b->left + q;
}

INLINE void raise_top(REAL *restrict top, const REAL *restrict x, i64 count) {
    SIMD
    for (i64 i = 0; i < count; i++) top[i] = x[i] > top[i] ? x[i] : top[i];
}

INLINE void weigh(
        const REAL *restrict x, const REAL *restrict top, REAL *restrict total, REAL *restrict moment,
        REAL *restrict weights, i64 count, REAL sharpness, const int padded, const int keep) {
    SIMD
    for (i64 i = 0; i < count; i++) {
        REAL d = x[i] - top[i], w = EXP2(d * sharpness);
        if (padded) w = x[i] == ABSENT ? 0 : w;
        total[i] += w;
        moment[i] += w * d;
        if (keep) weights[i] = w;
    }
}

/* Weigh the elements of all windows of a batch. */
INLINE void weigh_batch(const batch *b, i64 count, const int padded, const int keep) {
    const i64 elements = volume(b->o->kernel);
    memcpy(b->top, b->x + offset_of(b, 0), sizeof(REAL) * (size_t)count);
    for (i64 e = 1; e < elements; e++) raise_top(b->top, b->x + offset_of(b, e), count);
    for (i64 i = 0; i < count; i++) b->total[i] = b->moment[i] = 0;
    for (i64 e = 0; e < elements; e++)
        weigh(b->x + offset_of(b, e), b->top, b->total, b->moment, b->weights + (keep ? e * b->length : 0), count,
              (REAL)b->o->sharpness, padded, keep);
}

/* The units are output rows. */
static int forward_rows(const void *args, i64 begin, i64 end) {
    const operands *o = args;
    batch b;
    if (make_batch(&b, o, 0, 0) != OK) return OUT_OF_MEMORY;
    const i64 columns = o->out_size[2], elements = volume(o->kernel);
    const REAL scale = (REAL)(1 / o->scale);
    for (i64 first = begin; first < end; first += b.rows) {
        i64 rows = least(b.rows, end - first);
        const i64 count = rows * b.width;
        read_batch(&b, first, rows);
        if (!o->padded && (elements == 4 || elements == 9)) {
            i64 at[9] = {0};
            for (i64 e = 0; e < elements; e++) at[e] = offset_of(&b, e);
            if (elements == 4) pool_rows(ELEMENTS(b.x, at), b.top, count, (REAL)o->sharpness, 4);
            else pool_rows(ELEMENTS(b.x, at), b.top, count, (REAL)o->sharpness, 9);
            for (i64 row = 0; row < rows; row++) {
                T *restrict y = (T *)o->out + (first + row) * columns;
                const REAL *restrict from = b.top + row * b.width;
                SIMD
                for (i64 i = 0; i < columns; i++) y[i] = STORE(from[i] * scale);
            }
            continue;
        }
        if (o->padded) weigh_batch(&b, count, 1, 0);
        else weigh_batch(&b, count, 0, 0);
        for (i64 row = 0; row < rows; row++) {
            T *restrict y = (T *)o->out + (first + row) * columns;
            const REAL *restrict top = b.top + row * b.width, *restrict moment = b.moment + row * b.width;
            const REAL *restrict total = b.total + row * b.width;
            SIMD
            for (i64 i = 0; i < columns; i++) y[i] = STORE((top[i] + moment[i] / total[i]) * scale);
        }
    }
    free(b.x);
    return OK;
}

INLINE void add_slopes(
        REAL *restrict grad, const REAL *restrict x, const REAL *restrict top, const REAL *restrict weights,
        const REAL *restrict factor, const REAL *restrict mean, const REAL *restrict exists, i64 count, REAL sharpness,
        const int detach) {
    SIMD
    for (i64 i = 0; i < count; i++) {
        REAL slope = weights[i] * factor[i];
        if (!detach) slope += slope * (x[i] - top[i] - mean[i]) * sharpness;
        grad[i] += exists[i] != 0 ? slope : 0;
    }
}

INLINE void merge_row(T *restrict dx, const REAL *restrict from, i64 count, i64 s) {
    SIMD
    for (i64 i = 0; i < count; i++) dx[i * s] = STORE(from[i]);
}

INLINE void merge_pair(T *restrict dx, const REAL *restrict even, const REAL *restrict odd, i64 count) {
    SIMD
    for (i64 i = 0; i < count; i++) {
        dx[2 * i] = STORE(even[i]);
        dx[2 * i + 1] = STORE(odd[i]);
    }
}

INLINE void add_row(REAL *restrict sums, const REAL *restrict from, i64 count, i64 s) {
    SIMD
    for (i64 i = 0; i < count; i++) sums[i * s] += from[i];
}

/* Bring the gradients of a batch from the phases to the input, or to the sums that begin with plane ``origin``. */
static void write_batch(const batch *b, i64 first, i64 rows, i64 origin) {
    const operands *o = b->o;
    const i64 s = o->stride[2], lines = o->size[0] * o->size[1], columns = o->size[2];
    for (i64 place = 0; place < b->places; place++)
        for (i64 row = 0; row < rows; row++) {
            i64 plane, line = locate(o, first + row, place / o->kernel[1], place % o->kernel[1], &plane);
            if (line < 0) continue;
            const REAL *from = b->grad + place * s * b->phase + row * b->width;
            T *dx = (T *)o->out + (plane * lines + line) * columns;
            REAL *sums = b->sums + ((plane - origin) * lines + line) * columns;
            i64 done = 0;
            if (o->covers && s == 2) {
                done = columns / 2;
                merge_pair(dx, from + b->left, from + b->phase + b->left, done);
            }
            for (i64 r = 0; r < s; r++) {
                i64 begin, end;
                columns_of(b, r, &begin, &end);
                const REAL *row_from = from + r * b->phase + begin;
                if (!o->covers) {
                    if (s == 1) add_row(sums, row_from, end - begin, 1);
                    else if (s == 2) add_row(sums + r, row_from, end - begin, 2);
                    else add_row(sums + r, row_from, end - begin, s);
                } else {
                    merge_row(dx + r + done * s, row_from + done, end - begin - done, s);
                }
            }
        }
}

/* The units are planes. */
static int backward_planes(const void *args, i64 begin, i64 end) {
    const operands *o = args;
    batch b;
    if (make_batch(&b, o, 1, end - begin) != OK) return OUT_OF_MEMORY;
    const i64 lines = o->out_size[0] * o->out_size[1], columns = o->out_size[2], elements = volume(o->kernel);
    const i64 phases = b.places * o->stride[2] * b.phase, plane = volume(o->size);
    const REAL slope = slope_of_weights(o);
    if (!o->covers) memset(b.sums, 0, sizeof(REAL) * (size_t)((end - begin) * plane));
    for (i64 first = begin * lines; first < end * lines; first += b.rows) {
        i64 rows = least(b.rows, end * lines - first), count = rows * b.width;
        read_batch(&b, first, rows);
        for (i64 row = 0; row < rows; row++) {
            const T *restrict dy = (const T *)o->dy + (first + row) * columns;
            REAL *restrict to = b.dy + row * b.width;
            SIMD
            for (i64 i = 0; i < columns; i++) to[i] = LOAD(dy[i]);
            for (i64 i = columns; i < b.width; i++) to[i] = 0;
        }
        if (o->covers && !o->padded && elements == 4) {
            i64 at[9] = {0};
            for (i64 e = 0; e < elements; e++) at[e] = offset_of(&b, e);
            slopes_of_rows(ELEMENTS(b.x, at), b.dy, b.grad + at[0], b.grad + at[1], b.grad + at[2], b.grad + at[3],
                           count, (REAL)o->sharpness, slope);
            write_batch(&b, first, rows, begin);
            continue;
        }
        if (o->padded) weigh_batch(&b, count, 1, 1);
        else weigh_batch(&b, count, 0, 1);
        SIMD
        for (i64 i = 0; i < count; i++) {
            b.moment[i] /= b.total[i];
            b.dy[i] /= b.total[i];
        }
        memset(b.grad, 0, sizeof(REAL) * (size_t)phases);
        for (i64 e = 0; e < elements; e++) {
            i64 at = offset_of(&b, e);
            if (o->detach)
                add_slopes(b.grad + at, b.x + at, b.top, b.weights + e * b.length, b.dy, b.moment, b.exists, count, 0, 1);
            else
                add_slopes(b.grad + at, b.x + at, b.top, b.weights + e * b.length, b.dy, b.moment, b.exists, count,
                           slope, 0);
        }
        write_batch(&b, first, rows, begin);
    }
    if (!o->covers) {
        T *restrict dx = (T *)o->out + begin * plane;
        const REAL *restrict sums = b.sums;
        SIMD
        for (i64 i = 0; i < (end - begin) * plane; i++) dx[i] = STORE(sums[i]);
    }
    free(b.x);
    return OK;
}

/* ---- Channels last: for each window, loops over channels, a block at a time ---- */

typedef struct { i64 size; i64 *at; } elements_of_window;

/* List the elements of a window that lie in the input, by their positions. */
static i64 list_elements(const operands *o, i64 window, i64 *at) {
    i64 count = 0, od = window / o->out_size[2] / o->out_size[1], oh = window / o->out_size[2] % o->out_size[1];
    i64 ow = window % o->out_size[2];
    for (i64 kd = 0; kd < o->kernel[0]; kd++) {
        i64 d = od * o->stride[0] + kd * o->dilation[0] - o->padding[0];
        if (d < 0 || d >= o->size[0]) continue;
        for (i64 kh = 0; kh < o->kernel[1]; kh++) {
            i64 h = oh * o->stride[1] + kh * o->dilation[1] - o->padding[1];
            if (h < 0 || h >= o->size[1]) continue;
            for (i64 kw = 0; kw < o->kernel[2]; kw++) {
                i64 w = ow * o->stride[2] + kw * o->dilation[2] - o->padding[2];
                if (w >= 0 && w < o->size[2]) at[count++] = (d * o->size[1] + h) * o->size[2] + w;
            }
        }
    }
    return count;
}

INLINE void first_top(REAL *restrict top, const T *restrict x, i64 count, REAL scale) {
    SIMD
    for (i64 i = 0; i < count; i++) top[i] = scale * LOAD(x[i]);
}

INLINE void raise_top_of(REAL *restrict top, const T *restrict x, i64 count, REAL scale) {
    SIMD
    for (i64 i = 0; i < count; i++) {
        REAL v = scale * LOAD(x[i]);
        top[i] = v > top[i] ? v : top[i];
    }
}

INLINE void weigh_channels(
        const T *restrict x, const REAL *restrict top, REAL *restrict total, REAL *restrict moment,
        REAL *restrict weights, i64 count, REAL scale, REAL sharpness, const int keep) {
    SIMD
    for (i64 i = 0; i < count; i++) {
        REAL d = scale * LOAD(x[i]) - top[i], w = EXP2(d * sharpness);
        total[i] += w;
        moment[i] += w * d;
        if (keep) weights[i] = w;
    }
}

INLINE void weigh_window(
        const operands *o, const T *x, const i64 *at, i64 elements, i64 count, REAL *top, REAL *total, REAL *moment,
        REAL *weights, const int keep) {
    const i64 C = o->channels;
    const REAL scale = (REAL)o->scale, sharpness = (REAL)o->sharpness;
    first_top(top, x + at[0] * C, count, scale);
    for (i64 e = 1; e < elements; e++) raise_top_of(top, x + at[e] * C, count, scale);
    for (i64 i = 0; i < count; i++) total[i] = moment[i] = 0;
    for (i64 e = 0; e < elements; e++)
        weigh_channels(x + at[e] * C, top, total, moment, weights + (keep ? e * CHANNELS : 0), count, scale, sharpness, keep);
}

/* The units are rows of windows. */
static int forward_channels(const void *args, i64 begin, i64 end) {
    const operands *o = args;
    const i64 C = o->channels, rows = o->out_size[0] * o->out_size[1], columns = o->out_size[2];
    const REAL scale = (REAL)(1 / o->scale);
    REAL top[CHANNELS], total[CHANNELS], moment[CHANNELS];
    i64 *at = malloc(sizeof(i64) * (size_t)volume(o->kernel));
    if (!at) return OUT_OF_MEMORY;
    for (i64 row = begin; row < end; row++)
        for (i64 column = 0; column < columns; column++) {
            i64 elements = list_elements(o, row % rows * columns + column, at);
            for (i64 c = 0; c < C; c += CHANNELS) {
                i64 count = least(CHANNELS, C - c);
                const T *x = (const T *)o->x + row / rows * volume(o->size) * C + c;
                T *restrict y = (T *)o->out + (row * columns + column) * C + c;
                if (elements == 4 || elements == 9) {
                    i64 from[9] = {0};
                    for (i64 e = 0; e < elements; e++) from[e] = at[e] * C;
                    if (elements == 4)
                        pool_channels(ELEMENTS(x, from), y, count, (REAL)o->scale, (REAL)o->sharpness, 4);
                    else
                        pool_channels(ELEMENTS(x, from), y, count, (REAL)o->scale, (REAL)o->sharpness, 9);
                    continue;
                }
                weigh_window(o, x, at, elements, count, top, total, moment, NULL, 0);
                SIMD
                for (i64 i = 0; i < count; i++) y[i] = STORE((top[i] + moment[i] / total[i]) * scale);
            }
        }
    free(at);
    return OK;
}

INLINE void slopes_of(
        REAL *restrict slopes, const T *restrict x, const REAL *restrict top, const REAL *restrict weights,
        const REAL *restrict factor, const REAL *restrict mean, i64 count, REAL scale, REAL sharpness) {
    SIMD
    for (i64 i = 0; i < count; i++) {
        REAL slope = weights[i] * factor[i];
        slopes[i] = slope + slope * (scale * LOAD(x[i]) - top[i] - mean[i]) * sharpness;
    }
}

INLINE void put_slopes(T *restrict dx, const REAL *restrict slopes, i64 count) {
    SIMD
    for (i64 i = 0; i < count; i++) dx[i] = STORE(slopes[i]);
}

INLINE void add_to_sums(REAL *restrict sums, const REAL *restrict slopes, i64 count) {
    SIMD
    for (i64 i = 0; i < count; i++) sums[i] += slopes[i];
}

/* The units are blocks of channels of a sample. */
static int backward_channels(const void *args, i64 begin, i64 end) {
    const operands *o = args;
    const i64 C = o->channels, blocks = parts(C, CHANNELS), positions = volume(o->size), windows = volume(o->out_size);
    const i64 most_elements = volume(o->kernel), held = least(C, CHANNELS);
    const REAL scale = (REAL)o->scale;
    const REAL slope = slope_of_weights(o);
    REAL top[CHANNELS], total[CHANNELS], moment[CHANNELS], slopes[CHANNELS];
    i64 *at = malloc(sizeof(i64) * (size_t)most_elements);
    REAL *weights = malloc(sizeof(REAL) * (size_t)(most_elements * CHANNELS + (o->covers ? 0 : positions * held)));
    REAL *sums = weights + most_elements * CHANNELS;
    int status = at && weights ? OK : OUT_OF_MEMORY;
    for (i64 unit = begin; unit < end && status == OK; unit++) {
        i64 c = unit % blocks * CHANNELS, count = least(CHANNELS, C - c), n = unit / blocks;
        const T *x = (const T *)o->x + n * positions * C + c;
        T *dx = (T *)o->out + n * positions * C + c;
        if (!o->covers) memset(sums, 0, sizeof(REAL) * (size_t)(positions * held));
        for (i64 window = 0; window < windows; window++) {
            const T *restrict dy = (const T *)o->dy + (n * windows + window) * C + c;
            i64 elements = list_elements(o, window, at);
            if (o->covers && elements == 4) {
                i64 from[9] = {0};
                for (i64 e = 0; e < 4; e++) from[e] = at[e] * C;
                slopes_of_channels(ELEMENTS(x, from), dy, dx + from[0], dx + from[1], dx + from[2], dx + from[3], count,
                                   scale, (REAL)o->sharpness, slope);
                continue;
            }
            weigh_window(o, x, at, elements, count, top, total, moment, weights, 1);
            SIMD
            for (i64 i = 0; i < count; i++) {
                moment[i] /= total[i];
                total[i] = LOAD(dy[i]) / total[i];
            }
            for (i64 e = 0; e < elements; e++) {
                slopes_of(slopes, x + at[e] * C, top, weights + e * CHANNELS, total, moment, count, scale, slope);
                if (o->covers) put_slopes(dx + at[e] * C, slopes, count);
                else add_to_sums(sums + at[e] * held, slopes, count);
            }
        }
        if (!o->covers) for (i64 i = 0; i < positions; i++) put_slopes(dx + i * C, sums + i * held, count);
    }
    free(at);
    free(weights);
    return status;
}

EXPORT int NAME(softpool_forward)(const operands *o) {
    i64 row = o->out_size[2] * volume(o->kernel) * (o->channels_last ? o->channels : 1);
    i64 rows = o->samples * o->out_size[0] * o->out_size[1], grain = most(1, GRAIN / row);
    if (o->channels_last) return run_job(&o->crew, forward_channels, o, rows, grain);
    return run_job(&o->crew, are_pairs(o) ? forward_pairs : forward_rows, o, rows, grain);
}

EXPORT int NAME(softpool_backward)(const operands *o) {
    if (o->channels_last) return run_job(&o->crew, backward_channels, o, o->samples * parts(o->channels, CHANNELS), 1);
    if (o->covers && are_pairs(o)) {
        i64 rows = o->samples * o->out_size[0] * o->out_size[1];
        return run_job(&o->crew, backward_pairs, o, rows, most(1, GRAIN / (2 * o->size[2])));
    }
    return run_job(&o->crew, backward_planes, o, o->samples, most(1, GRAIN / volume(o->size)));
}
