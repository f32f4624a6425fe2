// The sub-expert layer on a CPU, for few rows an expert: decode is bound by how fast weights stream, so each weight is
// read from memory once, in order, for all rows of an expert.
//
// Layouts as in contract.ExpertWeights: w1 [E, N, 2d, H], w2 [E, N, d, H], b1 [E, N, 2d], b2 [E, H]; all float32, or
// all bfloat16 as uint16, and so are the rows that come in and go out. Sums are float32, in an order that depends on
// the row and the weights alone: a row gives the same bits in any company and with any number of threads. H is a
// multiple of 16.
//
// One source for every processor. Vectors are as wide as its registers; where it multiplies bfloat16 itself
// (AVX512-BF16) and H is a multiple of 32, two loops of their own do so, and the activated neurons are rounded to
// bfloat16 as the model's own experts round them.

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// LANES of a vector; UP neurons of the up product at once, so that their sums of ROWS rows stay in registers
#if defined(__AVX512F__)
#define LANES 16
#define UP 2
#elif defined(__AVX__)
#define LANES 8
#define UP 1
#else
#define LANES 4
#define UP 1
#endif
#define DOWN 8  // neurons of the down product at once: outputs are read and written once for so many
#define ROWS 4
#define MOST_THREADS 64
#define THREAD_WORTH 1000000  // multiply-adds that take as long as a thread's start, about 20 us

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t whole __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));

enum { SILU = 0, CLAMPED = 1 };

typedef struct {
    int64_t tokens, top_k, experts, sub_experts, neurons, hidden;
    int64_t ranks;  // columns of `counts`
    int64_t bfloat16, activation, threads;
} shape;

// Always inlined with constants, so that each type and number of rows has loops of its own.
#define INLINE static inline __attribute__((always_inline))

// `call(rows)` with a constant for each block of at most ROWS rows from `r` of `m`.
#define EACH_BLOCK(r, m, call)                     \
    for (int64_t r = 0; r < (m); r += ROWS) {      \
        switch ((m) - r) {                         \
        case 1: call(1); break;                    \
        case 2: call(2); break;                    \
        case 3: call(3); break;                    \
        default: call(4);                          \
        }                                          \
    }

// Asks for `count` values of the weights that come next, where rows enough keep the processor busy with those at hand;
// with one or two it waits for them anyway, and asking does not help. What comes next lies behind what is at hand, so a
// loop asks for as much of it as it reads. Behind the last weights nothing is read: asking is allowed anywhere.
INLINE void ask_ahead(int rows, const void *values, int64_t at, int64_t count, int half) {
    const char *from = (const char *)values + at * (half ? 2 : 4);
    if (rows > 2)
        for (int64_t line = 0; line < count * (half ? 2 : 4); line += 64) __builtin_prefetch(from + line, 0, 2);
}

INLINE lanes load(const void *values, int64_t at, int half) {
    if (!half) return *(const lanes *)((const float *)values + at);
    halves bits = *(const halves *)((const uint16_t *)values + at);
    return (lanes)(__builtin_convertvector(bits, words) << 16);
}

INLINE float load_one(const void *values, int64_t at, int half) {
    if (!half) return ((const float *)values)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)values)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// To the nearest bfloat16, ties to even; NaN stays NaN.
INLINE void store_halves(uint16_t *to, lanes values) {
    words bits = (words)values, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    words nan = (words)(values != values);
    *(halves *)to = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), halves);
}

INLINE float total(lanes v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#endif
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) v[i] += v[i + step];
    return v[0];
}

INLINE lanes pick(whole where, lanes yes, lanes no) {
    return (lanes)((where & (whole)yes) | (~where & (whole)no));
}

INLINE lanes least(lanes v, float most) { return pick(v > most, v - v + most, v); }
INLINE lanes most(lanes v, float least) { return pick(v < least, v - v + least, v); }

// e^x by 2^n times the Taylor series of the rest, |rest| <= ln(2) / 2: wrong by 2e-7 of the value at most.
INLINE lanes exponential(lanes x) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits
    x = most(least(x, 88.0f), -87.0f);
    lanes shifted = x * 1.44269504f + shift, n = shifted - shift;
    lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    lanes p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (lanes)((whole)p + (((whole)shifted - 0x4b400000) << 23));
}

INLINE lanes activate(lanes gate, lanes up, int64_t kind) {
    if (kind == SILU) return gate / (1.0f + exponential(-gate)) * up;
    gate = least(gate, 7.0f);
    up = most(least(up, 7.0f), -7.0f);
    return (up + 1.0f) * gate / (1.0f + exponential(gate * -1.702f));
}

// -- what one thread needs -----------------------------------------------------------------------------------------

typedef struct {
    const void **x;   // rows of the sub-expert at hand: what comes in
    float **out;      // and where their outputs add up
    float *gate, *up; // [rows][padded], then `gate` holds the activated neurons
    uint16_t *pairs;  // [rows][padded], the activated neurons as bfloat16
    int64_t padded;   // d, rounded up to whole vectors
} scratch;

// -- the two products, for any processor ---------------------------------------------------------------------------

// `some` neurons from the one whose weights lie at `gate_at` and `up_at`.
INLINE void up_rows(int half, int rows, int some, int64_t width, const void *const *x, const void *w1, int64_t gate_at,
                    int64_t up_at, float *gate, float *up, int64_t stride) {
    lanes g[ROWS][UP] = {{{0}}}, u[ROWS][UP] = {{{0}}};
    for (int64_t c = 0; c < width; c += LANES) {
        lanes wg[UP], wu[UP];
        for (int k = 0; k < some; k++) {
            wg[k] = load(w1, gate_at + k * width + c, half);
            wu[k] = load(w1, up_at + k * width + c, half);
        }
        ask_ahead(rows, w1, gate_at + some * (width + c), some * LANES, half);
        ask_ahead(rows, w1, up_at + some * (width + c), some * LANES, half);
        for (int r = 0; r < rows; r++) {
            lanes v = load(x[r], c, half);
            for (int k = 0; k < some; k++) {
                g[r][k] += v * wg[k];
                u[r][k] += v * wu[k];
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < some; k++) gate[r * stride + k] = total(g[r][k]), up[r * stride + k] = total(u[r][k]);
}

// Adds `some` neurons, from the one whose weights lie at `at`, to the outputs.
INLINE void down_rows(int half, int rows, int some, int64_t width, const float *activated, int64_t stride,
                      const void *w2, int64_t at, float *const *out) {
    for (int64_t c = 0; c < width; c += LANES) {
        lanes w[DOWN];
        for (int k = 0; k < some; k++) w[k] = load(w2, at + k * width + c, half);
        ask_ahead(rows, w2, at + some * (width + c), some * LANES, half);
        for (int r = 0; r < rows; r++) {
            const float *a = activated + r * stride;
            lanes sum = *(lanes *)(out[r] + c);
            for (int k = 0; k < some; k++) sum += w[k] * a[k];
            *(lanes *)(out[r] + c) = sum;
        }
    }
}

INLINE void activate_rows(const shape *s, int64_t m, scratch *t) {
    for (int64_t i = 0; i < m * t->padded; i += LANES)
        *(lanes *)(t->gate + i) = activate(*(lanes *)(t->gate + i), *(lanes *)(t->up + i), s->activation);
}

INLINE void add_bias(const shape *s, int half, int64_t m, const void *b1, int64_t sub, scratch *t) {
    int64_t d = s->neurons;
    for (int64_t r = 0; r < m; r++)
        for (int64_t j = 0; j < d; j++) {
            t->gate[r * t->padded + j] += load_one(b1, sub * 2 * d + j, half);
            t->up[r * t->padded + j] += load_one(b1, sub * 2 * d + d + j, half);
        }
}

// One sub-expert for the `m` rows in `t`.
INLINE void run_sub(const shape *s, int half, int64_t m, const void *w1, const void *w2, const void *b1, int64_t sub,
                    scratch *t) {
    int64_t d = s->neurons, width = s->hidden, stride = t->padded;
#define UP_ROWS(rows, some)                                                                                  \
    up_rows(half, rows, some, width, t->x + r, w1, (sub * 2 * d + j) * width, (sub * 2 * d + d + j) * width, \
            t->gate + r * stride + j, t->up + r * stride + j, stride)
#define UP_SOME(rows) UP_ROWS(rows, UP)
#define UP_ONE(rows) UP_ROWS(rows, 1)
    int64_t j = 0;
    for (; j + UP <= d; j += UP) EACH_BLOCK(r, m, UP_SOME)
    for (; j < d; j++) EACH_BLOCK(r, m, UP_ONE)
    if (b1) add_bias(s, half, m, b1, sub, t);
    activate_rows(s, m, t);
#define DOWN_ROWS(rows, some)                                                                                     \
    down_rows(half, rows, some, width, t->gate + r * stride + j, stride, w2, (sub * d + j) * width, t->out + r)
#define DOWN_SOME(rows) DOWN_ROWS(rows, DOWN)
#define DOWN_ONE(rows) DOWN_ROWS(rows, 1)
    for (j = 0; j + DOWN <= d; j += DOWN) EACH_BLOCK(r, m, DOWN_SOME)
    for (; j < d; j++) EACH_BLOCK(r, m, DOWN_ONE)
}

// -- the two products, where the processor multiplies bfloat16 -------------------------------------------------------

#ifdef __AVX512BF16__
#define STEP 32  // bfloat16 values of a register
#define PAIRS (DOWN / 2)

INLINE __m512bh bits_at(const void *values, int64_t at) {
    return (__m512bh)_mm512_loadu_si512((const uint16_t *)values + at);
}

// Neurons `j` and, if `two`, `j + 1`.
INLINE void up_rows_bf16(int rows, int two, int64_t width, const void *const *x, const uint16_t *gate_row,
                         const uint16_t *up_row, float *gate, float *up, int64_t stride) {
    __m512 g[ROWS][2], u[ROWS][2];
    for (int r = 0; r < rows; r++)
        g[r][0] = g[r][1] = u[r][0] = u[r][1] = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += STEP) {
        ask_ahead(rows, gate_row, 2 * (width + c), 2 * STEP, 1);
        ask_ahead(rows, up_row, 2 * (width + c), 2 * STEP, 1);
        for (int k = 0; k < 1 + two; k++) {
            __m512bh wg = bits_at(gate_row, k * width + c), wu = bits_at(up_row, k * width + c);
            for (int r = 0; r < rows; r++) {
                __m512bh v = bits_at(x[r], c);
                g[r][k] = _mm512_dpbf16_ps(g[r][k], v, wg);
                u[r][k] = _mm512_dpbf16_ps(u[r][k], v, wu);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < 1 + two; k++) {
            gate[r * stride + k] = _mm512_reduce_add_ps(g[r][k]);
            up[r * stride + k] = _mm512_reduce_add_ps(u[r][k]);
        }
}

// Adds `pairs` pairs of neurons to the outputs. A pair's two rows of weights are interleaved, so that one instruction
// adds both neurons' parts of 16 columns. `last_alone`: the last pair is one neuron, and its partner's activation is 0.
INLINE void down_rows_bf16(int rows, int pairs, int last_alone, int64_t width, const uint16_t *activated,
                           int64_t stride, const uint16_t *w2, float *const *out) {
    static const uint16_t first[STEP] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_loadu_si512(first), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t c = 0; c < width; c += STEP) {
        __m512bh w[PAIRS][2];
        ask_ahead(rows, w2, DOWN * (width + c), DOWN * STEP, 1);
        for (int p = 0; p < pairs; p++) {
            const uint16_t *row = w2 + 2 * p * width + c, *next = last_alone && p == pairs - 1 ? row : row + width;
            __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(next);
            w[p][0] = (__m512bh)_mm512_permutex2var_epi16(a, low, b);
            w[p][1] = (__m512bh)_mm512_permutex2var_epi16(a, high, b);
        }
        for (int r = 0; r < rows; r++) {
            __m512 left = _mm512_loadu_ps(out[r] + c), right = _mm512_loadu_ps(out[r] + c + LANES);
            for (int p = 0; p < pairs; p++) {
                int32_t both;
                memcpy(&both, activated + r * stride + 2 * p, sizeof both);
                __m512bh a = (__m512bh)_mm512_set1_epi32(both);
                left = _mm512_dpbf16_ps(left, a, w[p][0]);
                right = _mm512_dpbf16_ps(right, a, w[p][1]);
            }
            _mm512_storeu_ps(out[r] + c, left);
            _mm512_storeu_ps(out[r] + c + LANES, right);
        }
    }
}

INLINE void run_sub_bf16(const shape *s, int64_t m, const uint16_t *w1, const uint16_t *w2, const uint16_t *b1,
                         int64_t sub, scratch *t) {
    int64_t d = s->neurons, width = s->hidden, stride = t->padded;
    for (int64_t j = 0; j < d; j += 2) {
        const uint16_t *gate_row = w1 + (sub * 2 * d + j) * width, *up_row = gate_row + d * width;
        float *gate = t->gate + j, *up = t->up + j;
        int two = j + 1 < d;
#define UP_BF16(rows) \
    up_rows_bf16(rows, two, width, t->x + r, gate_row, up_row, gate + r * stride, up + r * stride, stride)
        EACH_BLOCK(r, m, UP_BF16)
    }
    if (b1) add_bias(s, 1, m, b1, sub, t);
    activate_rows(s, m, t);
    for (int64_t r = 0; r < m; r++) {
        float *activated = t->gate + r * stride;
        for (int64_t j = 0; j < stride; j += LANES) store_halves(t->pairs + r * stride + j, *(lanes *)(activated + j));
        if (d < stride) memset(t->pairs + r * stride + d, 0, (stride - d) * sizeof *t->pairs);
    }
    for (int64_t j = 0; j < d; j += 2 * PAIRS) {
        const uint16_t *rows_at = w2 + (sub * d + j) * width, *activated = t->pairs + j;
        int64_t left = d - j;
        if (left >= 2 * PAIRS) {
#define DOWN_BF16(rows) \
    down_rows_bf16(rows, PAIRS, 0, width, activated + r * stride, stride, rows_at, t->out + r)
            EACH_BLOCK(r, m, DOWN_BF16)
        } else {
#define DOWN_REST(rows) \
    down_rows_bf16(rows, (int)(left + 1) / 2, left & 1, width, activated + r * stride, stride, rows_at, t->out + r)
            EACH_BLOCK(r, m, DOWN_REST)
        }
    }
}
#endif

// -- experts and threads -------------------------------------------------------------------------------------------

typedef struct {
    const shape *s;
    const void *hidden, *w1, *w2, *b1, *b2;
    const uint8_t *keep;     // [T, K, N], or null: then `limit` says how many
    const int64_t *limit;    // [T, K] first sub-experts that run
    const int64_t *start, *order, *experts;
    int64_t active, most_rows;
    float *by_slot;          // [T, K, H]
    atomic_int_fast64_t next;
    atomic_int failed;
} job;

INLINE void run_expert(const job *j, int half, int64_t expert, scratch *t) {
    const shape *s = j->s;
    const int64_t *slots = j->order + j->start[expert], count = j->start[expert + 1] - j->start[expert];
    int64_t width = s->hidden, bytes = half ? 2 : 4;
    for (int64_t i = 0; i < count; i++) {
        float *out = j->by_slot + slots[i] * width;
        if (!j->b2) memset(out, 0, width * sizeof *out);
        else
            for (int64_t c = 0; c < width; c++) out[c] = load_one(j->b2, expert * width + c, half);
    }
    for (int64_t n = 0; n < s->sub_experts; n++) {
        int64_t m = 0, sub = expert * s->sub_experts + n;
        for (int64_t i = 0; i < count; i++) {
            if (j->keep ? !j->keep[slots[i] * s->sub_experts + n] : n >= j->limit[slots[i]]) continue;
            t->x[m] = (const char *)j->hidden + slots[i] / s->top_k * width * bytes;
            t->out[m++] = j->by_slot + slots[i] * width;
        }
        if (!m) continue;
#ifdef __AVX512BF16__
        if (half && width % STEP == 0) {
            run_sub_bf16(s, m, j->w1, j->w2, j->b1, sub, t);
            continue;
        }
#endif
        run_sub(s, half, m, j->w1, j->w2, j->b1, sub, t);
    }
}

static void *work(void *argument) {
    job *j = argument;
    int64_t padded = (j->s->neurons + 15) / 16 * 16, cells = j->most_rows * padded;
    scratch t = {.padded = padded};
    t.x = malloc(j->most_rows * sizeof *t.x), t.out = malloc(j->most_rows * sizeof *t.out);
    t.gate = calloc(2 * cells, sizeof *t.gate), t.pairs = calloc(cells, sizeof *t.pairs);
    t.up = t.gate + cells;
    if (!t.x || !t.out || !t.gate || !t.pairs) j->failed = 1;
    else
        for (int64_t i; (i = j->next++) < j->active;) {
            if (j->s->bfloat16) run_expert(j, 1, j->experts[i], &t);
            else run_expert(j, 0, j->experts[i], &t);
        }
    free(t.x), free(t.out), free(t.gate), free(t.pairs);
    return 0;
}

// The calling thread works too. Threads live for one call: none waits between layers, spinning or asleep, and starting
// one costs less than THREAD_WORTH. Where none can be started, the others do its work.
static void run_all(job *j, int64_t threads) {
    pthread_t others[MOST_THREADS];
    int64_t started = 0;
    while (started < threads - 1 && started < MOST_THREADS && !pthread_create(&others[started], 0, work, j)) started++;
    work(j);
    while (started) pthread_join(others[--started], 0);
}

// How many first sub-experts a slot runs: its token's count for the rank that its expert has in the token's router.
static int64_t count_of(const shape *s, const int32_t *counts, const float *router, int64_t slot) {
    int64_t token = slot / s->top_k, rank = 0;
    if (s->ranks == 1) return counts[token];
    const float *weights = router + token * s->top_k, mine = router[slot];
    for (int64_t k = 0; k < s->top_k; k++) rank += weights[k] > mine || (weights[k] == mine && k < slot % s->top_k);
    return counts[token * s->ranks + rank];
}

INLINE void combine(const job *j, int half, const uint8_t *runs, const float *router, void *out) {
    const shape *s = j->s;
    for (int64_t token = 0; token < s->tokens; token++)
        for (int64_t c = 0; c < s->hidden; c += LANES) {
            lanes sum = {0};
            for (int64_t slot = token * s->top_k; slot < (token + 1) * s->top_k; slot++)
                if (runs[slot]) sum += *(const lanes *)(j->by_slot + slot * s->hidden + c) * router[slot];
            if (half) store_halves((uint16_t *)out + token * s->hidden + c, sum);
            else *(lanes *)((float *)out + token * s->hidden + c) = sum;
        }
}

// out [T, H] of `hidden` [T, H]. Which sub-experts run is said by `keep` [T, K, N], or, where that is null, by `counts`
// [T, ranks]: then `tally` gets how many ran and how many were routed added. `by_slot` [T, K, H] is scratch. Returns 0,
// or 1 if memory is short.
int prism_experts(const shape *s, const void *hidden, const int64_t *expert_ids, const float *router,
                  const uint8_t *keep, const int32_t *counts, const void *w1, const void *w2, const void *b1,
                  const void *b2, float *by_slot, void *out, int64_t *ran, int64_t *routed) {
    int64_t slots = s->tokens * s->top_k, cells = 0;
    // start [E + 1], next [E], experts [E], order [slots], limit [slots], runs [slots bytes]
    int64_t *start = calloc(3 * s->experts + 1 + 3 * slots + 1, sizeof *start);
    if (!start) return 1;
    int64_t *next = start + s->experts + 1, *experts = next + s->experts, *order = experts + s->experts;
    int64_t *limit = order + slots;
    uint8_t *runs = (uint8_t *)(limit + slots);
    for (int64_t i = 0; i < slots; i++) {
        if (expert_ids[i] < 0 || expert_ids[i] >= s->experts) continue;
        if (keep)
            for (int64_t n = 0; n < s->sub_experts; n++) limit[i] += keep[i * s->sub_experts + n];
        else {
            limit[i] = count_of(s, counts, router, i);
            *ran += limit[i];
            *routed += counts[i / s->top_k * s->ranks] > 0 ? s->sub_experts : 0;
        }
        cells += limit[i];
        if ((runs[i] = limit[i] > 0)) start[expert_ids[i] + 1]++;
    }
    job j = {.s = s, .hidden = hidden, .w1 = w1, .w2 = w2, .b1 = b1, .b2 = b2, .keep = keep, .limit = limit};
    j.start = start, j.order = order, j.experts = experts, j.by_slot = by_slot;
    for (int64_t e = 0; e < s->experts; e++) {
        int64_t rows = start[e + 1];
        if (rows) experts[j.active++] = e;
        if (rows > j.most_rows) j.most_rows = rows;
        start[e + 1] += start[e];
    }
    memcpy(next, start, s->experts * sizeof *next);
    for (int64_t i = 0; i < slots; i++)
        if (runs[i]) order[next[expert_ids[i]]++] = i;

    int64_t worth = cells * 3 * s->neurons * s->hidden / THREAD_WORTH, threads = s->threads;
    if (threads > j.active) threads = j.active;
    if (threads > worth) threads = worth;
    if (j.active) run_all(&j, threads);
    if (s->bfloat16) combine(&j, 1, runs, router, out);
    else combine(&j, 0, runs, router, out);
    free(start);
    return j.failed;
}
