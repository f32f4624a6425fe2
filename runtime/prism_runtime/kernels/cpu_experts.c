// The sub-expert layer on a CPU, for few rows: decode is bound by how fast weights stream, so each weight is read once,
// in order, for up to ROWS rows at a time.
//
// Layouts as in contract.ExpertWeights: w1 [E, N, 2d, H], w2 [E, N, d, H], b1 [E, N, 2d], b2 [E, H]; float32, or
// bfloat16 as uint16. Sums are float32, in an order that depends on the row and the weights alone: a row gives the same
// bits in any company. H is a multiple of 16.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define ROWS 4

typedef float lanes __attribute__((vector_size(64), aligned(4)));
typedef uint32_t words __attribute__((vector_size(64), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));

enum { SILU = 0, CLAMPED = 1 };

typedef struct {
    int64_t tokens, top_k, experts, sub_experts, neurons, hidden;
    int64_t bfloat16, activation, threads;
} shape;

// Always inlined with a constant `half`, so that each type has loops of its own.
#define INLINE static inline __attribute__((always_inline))

INLINE lanes load(const void *weights, int64_t at, int half) {
    if (!half) return *(const lanes *)((const float *)weights + at);
    halves bits = *(const halves *)((const uint16_t *)weights + at);
    return (lanes)(__builtin_convertvector(bits, words) << 16);
}

INLINE float load_one(const void *weights, int64_t at, int half) {
    if (!half) return ((const float *)weights)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)weights)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float total(lanes v) {
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) v[i] += v[i + step];
    return v[0];
}

INLINE float activate(float gate, float up, int64_t kind) {
    if (kind == SILU) return gate / (1.0f + expf(-gate)) * up;
    gate = fminf(gate, 7.0f);
    up = fminf(fmaxf(up, -7.0f), 7.0f);
    return (up + 1.0f) * gate / (1.0f + expf(-1.702f * gate));
}

// `activated` [rows][d] of one sub-expert for up to ROWS rows.
INLINE void up_block(const shape *s, int half, int rows, const float *const *x, const void *w1, const void *b1,
                     int64_t sub, float *activated) {
    int64_t d = s->neurons, width = s->hidden, base = sub * 2 * d * width;
    for (int64_t j = 0; j < d; j++) {
        lanes gate[ROWS] = {{0}}, up[ROWS] = {{0}};
        int64_t at_gate = base + j * width, at_up = base + (d + j) * width;
        for (int64_t c = 0; c < width; c += LANES) {
            lanes g = load(w1, at_gate + c, half), u = load(w1, at_up + c, half);
            for (int r = 0; r < rows; r++) {
                lanes v = *(const lanes *)(x[r] + c);
                gate[r] += v * g;
                up[r] += v * u;
            }
        }
        float gate_bias = b1 ? load_one(b1, sub * 2 * d + j, half) : 0.0f;
        float up_bias = b1 ? load_one(b1, sub * 2 * d + d + j, half) : 0.0f;
        for (int r = 0; r < rows; r++)
            activated[r * d + j] = activate(total(gate[r]) + gate_bias, total(up[r]) + up_bias, s->activation);
    }
}

// Adds one sub-expert's part of the output to up to ROWS rows, four neurons at a time.
INLINE void down_block(const shape *s, int half, int rows, const float *activated, const void *w2, int64_t sub,
                       float *const *out) {
    int64_t d = s->neurons, width = s->hidden, base = sub * d * width;
    for (int64_t j = 0; j < d; j += 4) {
        int some = d - j < 4 ? (int)(d - j) : 4;
        for (int64_t c = 0; c < width; c += LANES) {
            lanes w[4] = {{0}};
            for (int k = 0; k < some; k++) w[k] = load(w2, base + (j + k) * width + c, half);
            for (int r = 0; r < rows; r++) {
                const float *a = activated + r * d + j;
                lanes sum = w[0] * a[0];
                for (int k = 1; k < some; k++) sum += w[k] * a[k];
                *(lanes *)(out[r] + c) += sum;
            }
        }
    }
}

// One expert for all of its slots. `slots` are indices into [T, K]; `scratch` holds ROWS * d floats.
INLINE void run_expert(const shape *s, int half, int64_t expert, const int64_t *slots, int64_t count,
                       const float *hidden, const uint8_t *keep, const void *w1, const void *w2, const void *b1,
                       float *by_slot, float *scratch) {
    for (int64_t n = 0; n < s->sub_experts; n++) {
        int64_t sub = expert * s->sub_experts + n, i = 0;
        while (i < count) {
            const float *x[ROWS];
            float *out[ROWS];
            int rows = 0;
            for (; i < count && rows < ROWS; i++) {
                if (!keep[slots[i] * s->sub_experts + n]) continue;
                x[rows] = hidden + slots[i] / s->top_k * s->hidden;
                out[rows++] = by_slot + slots[i] * s->hidden;
            }
            switch (rows) {  // constants, so that the loops over rows unroll
            case 4:
                up_block(s, half, 4, x, w1, b1, sub, scratch), down_block(s, half, 4, scratch, w2, sub, out);
                break;
            case 3:
                up_block(s, half, 3, x, w1, b1, sub, scratch), down_block(s, half, 3, scratch, w2, sub, out);
                break;
            case 2:
                up_block(s, half, 2, x, w1, b1, sub, scratch), down_block(s, half, 2, scratch, w2, sub, out);
                break;
            case 1:
                up_block(s, half, 1, x, w1, b1, sub, scratch), down_block(s, half, 1, scratch, w2, sub, out);
            }
        }
    }
}

// `by_slot` [T, K, H] must be zero and gets every slot's output without its router weight. Returns 0, or 1 if memory is
// short; experts without work cost nothing.
int prism_experts(const shape *s, const float *hidden, const int64_t *expert_ids, const uint8_t *keep, const void *w1,
                  const void *w2, const void *b1, const void *b2, float *by_slot) {
    int64_t slots = s->tokens * s->top_k, failed = 0;
    int64_t *start = calloc(s->experts + 1, sizeof *start), *order = malloc((slots ? slots : 1) * sizeof *order);
    int64_t *next = malloc((s->experts + 1) * sizeof *next);
    uint8_t *runs = calloc(slots ? slots : 1, 1);
    if (!start || !order || !next || !runs) {
        free(start), free(order), free(next), free(runs);
        return 1;
    }
    for (int64_t i = 0; i < slots; i++) {
        if (expert_ids[i] < 0 || expert_ids[i] >= s->experts) continue;
        for (int64_t n = 0; n < s->sub_experts; n++) runs[i] |= keep[i * s->sub_experts + n];
        if (runs[i]) start[expert_ids[i] + 1]++;
    }
    for (int64_t e = 0; e < s->experts; e++) start[e + 1] += start[e];
    memcpy(next, start, (s->experts + 1) * sizeof *next);
    for (int64_t i = 0; i < slots; i++)
        if (runs[i]) order[next[expert_ids[i]]++] = i;

#pragma omp parallel for schedule(dynamic) num_threads((int)s->threads) if (s->threads > 1) reduction(| : failed)
    for (int64_t e = 0; e < s->experts; e++) {
        int64_t count = start[e + 1] - start[e];
        if (!count) continue;
        float *scratch = malloc(ROWS * s->neurons * sizeof *scratch);
        if (!scratch) {
            failed |= 1;
            continue;
        }
        const int64_t *mine = order + start[e];
        if (s->bfloat16)
            run_expert(s, 1, e, mine, count, hidden, keep, w1, w2, b1, by_slot, scratch);
        else
            run_expert(s, 0, e, mine, count, hidden, keep, w1, w2, b1, by_slot, scratch);
        if (b2)
            for (int64_t i = 0; i < count; i++)
                for (int64_t c = 0; c < s->hidden; c++)
                    by_slot[mine[i] * s->hidden + c] += load_one(b2, e * s->hidden + c, (int)s->bfloat16);
        free(scratch);
    }
    free(start), free(order), free(next), free(runs);
    return (int)failed;
}
