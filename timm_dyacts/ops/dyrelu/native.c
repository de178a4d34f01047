/* The native kernels of Dynamic ReLU.

An input is (N, C, P), or (N, P, C) with the channels last; coefficients are (N, 2K, C). Work is cut into tiles: some
channels and some positions of a sample, a *segment* of the positions in them. A tile writes sums of its own, one for each
of its channels, which ``combine`` adds up in the order of the segments.

Loops run along what lies side by side: positions, or channels. Of a plane, what is left over behind whole vectors is
computed together with some positions before it, which are computed twice. Planes smaller than a vector are turned
around, some channels at a time, and computed as if their channels were last. */
#include "native_hyper.h"
#include "native_operands.h"

typedef struct {
    const operands *o;
    i64 group, groups, segment, segments; /* channels and positions of a tile; how many of both there are */
    i64 rows;       /* sums that a tile forms for each channel */
    void *partial;  /* (N, segments, rows, C) */
    double divisor; /* of the sums */
    int turned;     /* whether planes are turned around */
} plan;

typedef struct { i64 n, c0, c1, p0, p1, at; } tile;

static plan make_plan(const operands *o, i64 rows, int all_channels) {
    plan p = {o, 0, 0, 0, 0, rows, NULL, 1, !o->channels_last && o->positions < LANES && !o->weight && !o->pi};
    if (o->channels_last) {
        p.group = o->channels;
        p.segment = least(o->positions, most(ROWS, BLOCK / o->channels));
    } else {
        p.segment = least(o->positions, all_channels ? BLOCK : SEGMENT);
        p.group = all_channels ? o->channels : least(o->channels, most(1, SEGMENT / p.segment));
    }
    p.groups = parts(o->channels, p.group);
    p.segments = parts(o->positions, p.segment);
    return p;
}

INLINE tile tile_of(const plan *p, i64 unit) {
    const operands *o = p->o;
    i64 s = unit % p->segments, g = unit / p->segments % p->groups, n = unit / p->segments / p->groups;
    tile t = {n, g * p->group, least((g + 1) * p->group, o->channels), s * p->segment,
              least((s + 1) * p->segment, o->positions), (n * p->segments + s) * p->rows * o->channels};
    return t;
}

static int run_tiles(const plan *p, int (*work)(const void *, i64, i64)) {
    i64 units = p->o->samples * p->groups * p->segments;
    return run_job(&p->o->crew, work, p, units, most(1, SEGMENT / (p->group * p->segment)));
}

#define TILES(name) \
    static int name(const void *args, i64 begin, i64 end) { \
        const plan *p = args; \
        for (i64 unit = begin; unit < end; unit++) { \
            int status = name##_tile(p, tile_of(p, unit)); \
            if (status != OK) return status; \
        } \
        return OK; \
    }

/* The samples of a job: the sums of all segments. */
static int combine_samples(const void *args, i64 begin, i64 end) {
    const plan *p = args;
    i64 size = p->rows * p->o->channels;
    for (i64 n = begin; n < end; n++) {
        const REAL *partial = (const REAL *)p->partial + n * p->segments * size;
        REAL *sums = (REAL *)p->o->sums + n * size;
        for (i64 i = 0; i < size; i += BLOCK) {
            i64 count = least(BLOCK, size - i);
            double total[BLOCK] = {0};
            for (i64 s = 0; s < p->segments; s++) {
                const REAL *part = partial + s * size + i;
                SIMD
                for (i64 j = 0; j < count; j++) total[j] += part[j];
            }
            SIMD
            for (i64 j = 0; j < count; j++) sums[i + j] = (REAL)(total[j] / p->divisor);
        }
    }
    return OK;
}

/* Run the tiles of a plan, and add up their sums. */
static int run_sums(plan *p, int (*work)(const void *, i64, i64)) {
    const operands *o = p->o;
    i64 size = p->rows * o->channels;
    int in_place = p->segments == 1;
    if (in_place) p->partial = o->sums;
    else if (!(p->partial = malloc(sizeof(REAL) * (size_t)(o->samples * p->segments * size)))) return OUT_OF_MEMORY;
    int status = run_tiles(p, work);
    if (status == OK && !in_place)
        status = run_job(&o->crew, combine_samples, p, o->samples, most(1, SEGMENT / (p->segments * size)));
    if (!in_place) free(p->partial);
    return status;
}

/* What the sums of a tile are divided by: where there are several segments, ``combine`` does it. */
INLINE double divisor_of(const plan *p) { return p->segments == 1 ? p->divisor : 1; }

/* From ``begin`` to ``end``, run a loop over whole vectors, and then over the last vector: ``new`` tells the elements that
   the first loop has not seen. */
#define OVER_PLANE(pragma, begin, end, ...) { \
    const i64 whole = (end) - (begin) < LANES ? (end) : (begin) + ((end) - (begin)) / LANES * LANES; \
    { const int new = 1; (void)new; pragma for (i64 i = (begin); i < whole; i++) { __VA_ARGS__ } } \
    if (whole < (end)) { \
        pragma for (i64 j = 0; j < LANES; j++) { \
            const i64 i = (end) - LANES + j; \
            const int new = i >= whole; \
            (void)new; \
            __VA_ARGS__ } } }
#define ADDING(...) DO_PRAGMA(omp simd reduction(+:__VA_ARGS__))
#define DO_PRAGMA(text) _Pragma(#text)

/* Lay the planes of up to TURNED channels out by positions, with the channels of each side by side; and back. */
INLINE void turn(const T *restrict planes, T *restrict rows, i64 channels, i64 P) {
    for (i64 c = 0; c < channels; c++)
        for (i64 i = 0; i < P; i++) rows[i * TURNED + c] = planes[c * P + i];
}
INLINE void turn_back(const T *restrict rows, T *restrict planes, i64 channels, i64 P) {
    for (i64 c = 0; c < channels; c++)
        for (i64 i = 0; i < P; i++) planes[c * P + i] = rows[i * TURNED + c];
}
/* Each block of channels of a tile whose planes are turned around: the first of them, how many, where their planes are */
#define TURNED_BLOCKS(c, count, at) \
    for (i64 c = t.c0, count = least(TURNED, t.c1 - c), at = (t.n * C + c) * P; c < t.c1; \
         c += TURNED, count = least(TURNED, t.c1 - c), at = (t.n * C + c) * P)

/* ---- The mean of each plane, and the product with the weight of the attention ---- */

/* Add up rows of channels, ``stride`` apart. */
INLINE void add_rows(const T *restrict x, i64 rows, i64 stride, i64 count, REAL *restrict sums) {
    for (i64 i = 0; i < rows; i++) {
        const T *restrict row = x + i * stride;
        SIMD
        for (i64 c = 0; c < count; c++) sums[c] += LOAD(row[c]);
    }
}

INLINE void statistics_channels_last(const plan *p, tile t, REAL *restrict sums, REAL *restrict logits) {
    const operands *o = p->o;
    const i64 C = o->channels;
    const REAL *restrict weight = o->weight;
    const T *restrict x = (const T *)o->x + (t.n * o->positions + t.p0) * C;
    for (i64 c = 0; c < C; c++) sums[c] = 0;
    if (!weight) add_rows(x, t.p1 - t.p0, C, C, sums);
    else
        for (i64 i = t.p0; i < t.p1; i++, x += C) {
            double logit = 0;
            for (i64 b = 0; b < C; b += BLOCK) {
                i64 end = least(b + BLOCK, C);
                REAL part = 0;
                ADDING(part)
                for (i64 c = b; c < end; c++) {
                    REAL v = LOAD(x[c]);
                    sums[c] += v;
                    part += v * weight[c];
                }
                logit += part;
            }
            logits[i] = (REAL)logit;
        }
    const REAL divisor = (REAL)divisor_of(p);
    SIMD
    for (i64 c = 0; c < C; c++) sums[c] /= divisor;
}

INLINE void statistics_turned(const plan *p, tile t, REAL *restrict sums) {
    const operands *o = p->o;
    const i64 C = o->channels, P = o->positions;
    const REAL divisor = (REAL)divisor_of(p);
    T x[LANES * TURNED];
    TURNED_BLOCKS(c, count, at) {
        REAL total[TURNED] = {0};
        turn((const T *)o->x + at, x, count, P);
        add_rows(x, P, TURNED, count, total);
        for (i64 i = 0; i < count; i++) sums[c + i] = total[i] / divisor;
    }
}

static int statistics_tile(const plan *p, tile t) {
    const operands *o = p->o;
    const i64 C = o->channels, P = o->positions;
    const REAL *restrict weight = o->weight;
    REAL *restrict sums = (REAL *)p->partial + t.at;
    REAL *restrict logits = (REAL *)o->per_position + (weight ? t.n * P : 0);
    if (o->channels_last) return statistics_channels_last(p, t, sums, logits), OK;
    if (p->turned) return statistics_turned(p, t, sums), OK;
    double products[BLOCK] = {0};
    for (i64 c = t.c0; c < t.c1; c++) {
        const T *restrict x = (const T *)o->x + (t.n * C + c) * P;
        double sum = 0;
        for (i64 b = t.p0; b < t.p1; b += BLOCK) {
            const i64 end = least(b + BLOCK, t.p1);
            REAL part = 0;
            OVER_PLANE(ADDING(part), b, end, part += new ? LOAD(x[i]) : 0;)
            sum += part;
        }
        sums[c] = (REAL)(sum / divisor_of(p));
        if (weight) {
            double w = weight[c];
            SIMD
            for (i64 i = 0; i < t.p1 - t.p0; i++) products[i] += w * LOAD(x[t.p0 + i]);
        }
    }
    if (weight) for (i64 i = t.p0; i < t.p1; i++) logits[i] = (REAL)products[i - t.p0];
    return OK;
}
TILES(statistics)

/* ``sums``: (N, 1, C), the means. */
EXPORT int NAME(dyrelu_statistics)(const operands *o) {
    plan p = make_plan(o, 1, o->weight != NULL);
    p.divisor = (double)o->positions;
    return run_sums(&p, statistics);
}

/* ---- The output ---- */

/* Of pieces that tie, the last wins; NaN wins over everything. */
#define WINS(piece, y) (!(((y) > (piece)) | ((y) != (y))))

/* The slopes lie ``step`` apart, the intercepts behind them. No loops, arrays or structures in what vectorised loops call:
   compilers fail at the former and keep the latter in memory. */
INLINE REAL piece_at(REAL x, const REAL *coefs, i64 step, const int k, const int K) {
    return x * coefs[k * step] + coefs[(K + k) * step];
}

INLINE REAL larger(REAL y, REAL piece) { return WINS(piece, y) ? piece : y; }

/* The largest of the first ``count`` of ``K`` pieces. */
INLINE REAL largest_of(REAL x, const REAL *coefs, i64 step, const int count, const int K) {
    REAL y = piece_at(x, coefs, step, 0, K);
    if (count > 1) y = larger(y, piece_at(x, coefs, step, 1, K));
    return y;
}

INLINE REAL largest(REAL x, const REAL *coefs, i64 step, const int K) { return largest_of(x, coefs, step, K, K); }

/* Rows of channels, ``stride`` apart; the coefficients lie ``C`` apart. ``out`` may be ``x``. */
INLINE void apply_rows(
        const T *x, T *out, const REAL *restrict theta, const REAL *restrict pi, i64 rows, i64 stride,
        i64 count, i64 C, REAL bound, const int K) {
    for (i64 i = 0; i < rows; i++) {
        const T *row = x + i * stride;
        T *to = out + i * stride;
        const REAL share = pi ? pi[i] : 1;
        SIMD
        for (i64 c = 0; c < count; c++) {
            REAL y = largest(LOAD(row[c]), theta + c, C, K);
            y = y > bound ? bound : y;
            to[c] = STORE(y * share);
        }
    }
}

/* Positions of a plane. ``out`` may be ``x``: the last vector is computed before the others are written. */
INLINE void apply_plane(
        const T *x, T *out, i64 count, const REAL *coefs, const REAL *restrict pi, REAL bound, const int K) {
    const i64 whole = count < LANES ? count : count / LANES * LANES, left = count - whole;
    T last[LANES];
#define APPLY(to, i) \
    REAL y = largest(LOAD(x[i]), coefs, 1, K); \
    y = y > bound ? bound : y; \
    to = STORE(pi ? y * pi[i] : y);
    if (left) {
        SIMD
        for (i64 j = 0; j < LANES; j++) { APPLY(last[j], count - LANES + j) }
    }
    SIMD
    for (i64 i = 0; i < whole; i++) { APPLY(out[i], i) }
#undef APPLY
    if (left) memcpy(out + whole, last + LANES - left, sizeof(T) * (size_t)left);
}

INLINE void apply_tile_k(const plan *p, tile t, const int K) {
    const operands *o = p->o;
    const i64 C = o->channels, P = o->positions;
    const REAL bound = (REAL)o->max_value;
    const REAL *restrict theta = (const REAL *)o->theta + t.n * 2 * K * C;
    const REAL *restrict pi = o->pi ? (const REAL *)o->pi + t.n * P : NULL;
    if (o->channels_last) {
        const i64 at = (t.n * P + t.p0) * C;
        apply_rows((const T *)o->x + at, (T *)o->out + at, theta, pi ? pi + t.p0 : NULL, t.p1 - t.p0, C, C, C, bound, K);
        return;
    }
    if (p->turned) {
        T x[LANES * TURNED], out[LANES * TURNED];
        TURNED_BLOCKS(c, count, at) {
            turn((const T *)o->x + at, x, count, P);
            apply_rows(x, out, theta + c, NULL, P, TURNED, count, C, bound, K);
            turn_back(out, (T *)o->out + at, count, P);
        }
        return;
    }
    for (i64 c = t.c0; c < t.c1; c++) {
        const T *x = (const T *)o->x + (t.n * C + c) * P;
        T *out = (T *)o->out + (t.n * C + c) * P;
        REAL coefs[2 * MOST_PIECES];
        for (int k = 0; k < 2 * K; k++) coefs[k] = theta[k * C + c];
        if (pi) apply_plane(x + t.p0, out + t.p0, t.p1 - t.p0, coefs, pi + t.p0, bound, K);
        else apply_plane(x + t.p0, out + t.p0, t.p1 - t.p0, coefs, NULL, bound, K);
    }
}

#define EACH_K(call) switch (p->o->k) { \
    case 1: call(1); break; \
    default: call(2); }

static int apply_tile(const plan *p, tile t) {
#define CALL(K) apply_tile_k(p, t, K)
    EACH_K(CALL)
#undef CALL
    return OK;
}
TILES(apply)

EXPORT int NAME(dyrelu_apply)(const operands *o) {
    plan p = make_plan(o, 0, 0);
    return run_tiles(&p, apply);
}

/* ---- All of the forward pass, without attention ---- */

/* Fields as for the three steps. */
EXPORT int NAME(dyrelu_forward)(const operands *o) {
    int status = NAME(dyrelu_statistics)(o);
    if (status == OK) status = NAME(dyrelu_hyper)(o);
    return status == OK ? NAME(dyrelu_apply)(o) : status;
}

/* ---- Gradients of the coefficients and of the weights of positions ---- */

/* Whether piece ``k`` is larger than all before it, or as large. */
INLINE int wins(REAL x, const REAL *coefs, i64 step, const int k, const int K) {
    REAL before = largest_of(x, coefs, step, k, K);
    return WINS(piece_at(x, coefs, step, k, K), before);
}

/* The gradient that piece ``k`` gets of ``g``: all of it, or none. The last piece takes it or leaves it to those before;
   numbers of the winners, to be compared with, would end up as branches. */
INLINE REAL share_of(REAL x, REAL g, const REAL *coefs, i64 step, const int k, const int K) {
    REAL rest = g;
    if (K > 1 && k < 1) rest = wins(x, coefs, step, 1, K) ? 0 : rest;
    return k == 0 ? rest : wins(x, coefs, step, k, K) ? rest : 0;
}

/* The slope of the largest piece. */
INLINE REAL slope_of(REAL x, const REAL *coefs, i64 step, const int K) {
    REAL slope = coefs[0];
    if (K > 1) slope = wins(x, coefs, step, 1, K) ? coefs[step] : slope;
    return slope;
}

/* Add to the gradients of the coefficients of piece ``k`` what an element gives; the sums lie ``step`` apart. */
INLINE void add_share(
        REAL *sums, i64 sums_step, REAL x, REAL g, const REAL *coefs, i64 step, const int k, const int K) {
    REAL share = share_of(x, g, coefs, step, k, K);
    sums[k * sums_step] += share * x;
    sums[(K + k) * sums_step] += share;
}

/* Rows as in ``apply_rows``; the sums lie ``sums_step`` apart. */
INLINE void reduce_rows(
        const T *restrict x, const T *restrict dy, const REAL *restrict theta, const REAL *restrict pi,
        REAL *restrict dpi, REAL *restrict sums, i64 sums_step, i64 rows, i64 stride, i64 count, i64 C, REAL bound,
        const int K) {
    for (i64 i = 0; i < rows; i++) {
        const T *restrict row = x + i * stride, *restrict dout_row = dy + i * stride;
        const REAL share = pi ? pi[i] : 1;
        double total = 0;
        for (i64 begin = 0; begin < count; begin += BLOCK) {
            i64 end = least(begin + BLOCK, count);
            REAL part = 0;
            ADDING(part)
            for (i64 c = begin; c < end; c++) {
                REAL v = LOAD(row[c]), dout = LOAD(dout_row[c]), g = dout * share;
                REAL y = largest(v, theta + c, C, K);
                part += dout * (y > bound ? bound : y);
                REAL won = y >= bound ? 0 : g;
                add_share(sums + c, sums_step, v, won, theta + c, C, 0, K);
                if (K > 1) add_share(sums + c, sums_step, v, won, theta + c, C, 1, K);
            }
            total += part;
        }
        if (pi) dpi[i] = (REAL)total;
    }
}

INLINE void reduce_turned(const plan *p, tile t, const REAL *restrict theta, REAL *restrict sums, const int K) {
    const operands *o = p->o;
    const i64 C = o->channels, P = o->positions;
    T x[LANES * TURNED], dy[LANES * TURNED];
    TURNED_BLOCKS(c, count, at) {
        REAL totals[2 * MOST_PIECES * TURNED] = {0};
        turn((const T *)o->x + at, x, count, P);
        turn((const T *)o->dy + at, dy, count, P);
        reduce_rows(x, dy, theta + c, NULL, NULL, totals, TURNED, P, TURNED, count, C, (REAL)o->max_value, K);
        for (int k = 0; k < 2 * K; k++) memcpy(sums + k * C + c, totals + k * TURNED, sizeof(REAL) * (size_t)count);
    }
}

INLINE void reduce_tile_k(const plan *p, tile t, const int K) {
    const operands *o = p->o;
    const i64 C = o->channels, P = o->positions;
    const REAL bound = (REAL)o->max_value;
    const REAL *restrict theta = (const REAL *)o->theta + t.n * 2 * K * C;
    const REAL *restrict pi = o->pi ? (const REAL *)o->pi + t.n * P : NULL;
    REAL *restrict dpi = (REAL *)o->per_position + (pi ? t.n * P : 0);
    REAL *restrict sums = (REAL *)p->partial + t.at;
    if (o->channels_last) {
        const i64 at = (t.n * P + t.p0) * C;
        for (i64 c = 0; c < 2 * K * C; c++) sums[c] = 0;
        reduce_rows((const T *)o->x + at, (const T *)o->dy + at, theta, pi ? pi + t.p0 : NULL, dpi + t.p0, sums, C,
                    t.p1 - t.p0, C, C, C, bound, K);
        return;
    }
    if (p->turned) {
        reduce_turned(p, t, theta, sums, K);
        return;
    }
    double products[BLOCK] = {0};
    for (i64 c = t.c0; c < t.c1; c++) {
        const T *restrict x = (const T *)o->x + (t.n * C + c) * P;
        const T *restrict dy = (const T *)o->dy + (t.n * C + c) * P;
        REAL coefs[2 * MOST_PIECES];
        double totals[2 * MOST_PIECES] = {0};
        for (int k = 0; k < 2 * K; k++) coefs[k] = theta[k * C + c];
        for (i64 begin = t.p0; begin < t.p1; begin += BLOCK) {
            const i64 end = least(begin + BLOCK, t.p1);
            REAL s0 = 0, s1 = 0, r0 = 0, r1 = 0;
#define ADD_UP(share) \
            REAL v = LOAD(x[i]), dout = new ? LOAD(dy[i]) : 0, g = dout * (share); \
            REAL y = largest(v, coefs, 1, K), won = y >= bound ? 0 : g; \
            REAL mine = share_of(v, won, coefs, 1, 0, K); \
            s0 += mine * v, r0 += mine; \
            if (K > 1) mine = share_of(v, won, coefs, 1, 1, K), s1 += mine * v, r1 += mine;
            if (pi) {
                OVER_PLANE(
                    ADDING(s0, s1, r0, r1), begin, end,
                    ADD_UP(pi[i])
                    products[i - begin] += dout * (y > bound ? bound : y);)
            } else {
                OVER_PLANE(ADDING(s0, s1, r0, r1), begin, end, ADD_UP(1))
            }
#undef ADD_UP
            const REAL slopes[2] = {s0, s1}, intercepts[2] = {r0, r1};
            for (int k = 0; k < K; k++) totals[k] += slopes[k], totals[K + k] += intercepts[k];
        }
        for (int k = 0; k < 2 * K; k++) sums[k * C + c] = (REAL)totals[k];
    }
    if (pi) for (i64 i = t.p0; i < t.p1; i++) dpi[i] = (REAL)products[i - t.p0];
}

static int reduce_tile(const plan *p, tile t) {
#define CALL(K) reduce_tile_k(p, t, K)
    EACH_K(CALL)
#undef CALL
    return OK;
}
TILES(reduce)

/* ``sums``: (N, 2K, C), the gradient of the coefficients; ``per_position``: that of ``pi``. */
EXPORT int NAME(dyrelu_reduce)(const operands *o) {
    plan p = make_plan(o, 2 * o->k, o->pi != NULL);
    return run_sums(&p, reduce);
}

/* ---- The gradient of the input ---- */

/* Rows as in ``apply_rows``. ``dmean`` may be NULL; ``dlogits`` too, and with it ``weight`` and ``sums``. */
INLINE void finish_rows(
        const T *restrict x, const T *restrict dy, T *restrict out, const REAL *restrict theta,
        const REAL *restrict pi, const REAL *restrict dmean, const REAL *restrict dlogits, const REAL *restrict weight,
        REAL *restrict sums, i64 rows, i64 stride, i64 count, i64 C, REAL bound, const int K) {
    for (i64 i = 0; i < rows; i++) {
        const T *restrict row = x + i * stride, *restrict dout_row = dy + i * stride;
        T *restrict to = out + i * stride;
        const REAL share = pi ? pi[i] : 1;
#define GRADIENT(rest) \
        REAL v = LOAD(row[c]), g = LOAD(dout_row[c]) * share; \
        REAL won = largest(v, theta + c, C, K) >= bound ? 0 : g; \
        to[c] = STORE(won * slope_of(v, theta + c, C, K) + (rest));
        if (dlogits) {
            const REAL dlogit = dlogits[i];
            SIMD
            for (i64 c = 0; c < count; c++) {
                GRADIENT(dmean[c] + weight[c] * dlogit)
                sums[c] += v * dlogit;
            }
        } else if (dmean) {
            SIMD
            for (i64 c = 0; c < count; c++) { GRADIENT(dmean[c]) }
        } else {
            SIMD
            for (i64 c = 0; c < count; c++) { GRADIENT(0) }
        }
#undef GRADIENT
    }
}

INLINE void finish_turned(const plan *p, tile t, const REAL *theta, const REAL *dmean, const int K) {
    const operands *o = p->o;
    const i64 C = o->channels, P = o->positions;
    T x[LANES * TURNED], dy[LANES * TURNED], out[LANES * TURNED];
    TURNED_BLOCKS(c, count, at) {
        turn((const T *)o->x + at, x, count, P);
        turn((const T *)o->dy + at, dy, count, P);
        finish_rows(x, dy, out, theta + c, NULL, dmean ? dmean + c : NULL, NULL, NULL, NULL, P, TURNED, count, C,
                    (REAL)o->max_value, K);
        turn_back(out, (T *)o->out + at, count, P);
    }
}

INLINE void finish_tile_k(const plan *p, tile t, const int K) {
    const operands *o = p->o;
    const i64 C = o->channels, P = o->positions;
    const REAL bound = (REAL)o->max_value;
    const REAL *restrict theta = (const REAL *)o->theta + t.n * 2 * K * C;
    const REAL *restrict pi = o->pi ? (const REAL *)o->pi + t.n * P : NULL;
    const REAL *restrict dmean = o->dmean ? (const REAL *)o->dmean + t.n * C : NULL;
    const REAL *restrict dlogits = o->dlogits ? (const REAL *)o->dlogits + t.n * P : NULL;
    const REAL *restrict weight = o->weight;
    REAL *restrict sums = (REAL *)p->partial + (dlogits ? t.at : 0);
    if (o->channels_last) {
        const i64 at = (t.n * P + t.p0) * C;
        if (dlogits) for (i64 c = 0; c < C; c++) sums[c] = 0;
        finish_rows((const T *)o->x + at, (const T *)o->dy + at, (T *)o->out + at, theta, pi ? pi + t.p0 : NULL, dmean,
                    dlogits ? dlogits + t.p0 : NULL, weight, sums, t.p1 - t.p0, C, C, C, bound, K);
        return;
    }
    if (p->turned) {
        finish_turned(p, t, theta, dmean, K);
        return;
    }
    for (i64 c = t.c0; c < t.c1; c++) {
        const T *restrict x = (const T *)o->x + (t.n * C + c) * P;
        const T *restrict dy = (const T *)o->dy + (t.n * C + c) * P;
        T *restrict out = (T *)o->out + (t.n * C + c) * P;
        REAL coefs[2 * MOST_PIECES];
        for (int k = 0; k < 2 * K; k++) coefs[k] = theta[k * C + c];
        const REAL mean = dmean ? dmean[c] : 0, w = dlogits ? weight[c] : 0;
#define GRADIENT(share, rest) \
        REAL v = LOAD(x[i]), g = LOAD(dy[i]) * (share); \
        REAL won = largest(v, coefs, 1, K) >= bound ? 0 : g; \
        out[i] = STORE(won * slope_of(v, coefs, 1, K) + (rest));
        if (dlogits) {
            double total = 0;
            for (i64 begin = t.p0; begin < t.p1; begin += BLOCK) {
                const i64 end = least(begin + BLOCK, t.p1);
                REAL part = 0;
                OVER_PLANE(
                    ADDING(part), begin, end,
                    GRADIENT(pi[i], mean + w * dlogits[i])
                    part += new ? v * dlogits[i] : 0;)
                total += part;
            }
            sums[c] = (REAL)total;
        } else if (pi) {
            OVER_PLANE(SIMD, t.p0, t.p1, GRADIENT(pi[i], mean))
        } else {
            OVER_PLANE(SIMD, t.p0, t.p1, GRADIENT(1, mean))
        }
#undef GRADIENT
    }
}

static int finish_tile(const plan *p, tile t) {
#define CALL(K) finish_tile_k(p, t, K)
    EACH_K(CALL)
#undef CALL
    return OK;
}
TILES(finish)

/* With ``dlogits``, there are ``pi``, ``weight`` and ``dmean`` too, and ``sums`` is (N, 1, C), the gradient of the weight
   from each sample. */
EXPORT int NAME(dyrelu_finish)(const operands *o) {
    plan p = make_plan(o, 1, 0);
    return o->dlogits ? run_sums(&p, finish) : run_tiles(&p, finish);
}
