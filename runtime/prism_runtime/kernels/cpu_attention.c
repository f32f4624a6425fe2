// Attention of one new token a row over keys and values that lie in blocks, for decode on a CPU: the cache is read once,
// where it lies. Copying a row's blocks together first would move every byte three times.
//
// Layouts: query [B, heads, key_width] float32; keys [blocks, BLOCK, groups, key_width] and values [blocks, BLOCK,
// groups, value_width], float32 or bfloat16 as uint16; tables [B, per_row] int64; mask [B, length] float32, added to the
// scores; sinks [heads] float32 or null, one more score a head that weighs nothing; out [B, heads, value_width] float32.
// heads is a multiple of groups: head h reads group h / (heads / groups). Sums are float32, in an order that depends on
// the row alone: a row gives the same bits in any company.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define BLOCK 16
#define MASKED -1e30f

typedef float lanes __attribute__((vector_size(64), aligned(4)));
typedef int32_t whole __attribute__((vector_size(64), aligned(4)));
typedef uint32_t words __attribute__((vector_size(64), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));

typedef struct {
    int64_t rows, heads, groups, key_width, value_width, per_row, length;
    int64_t bfloat16, threads;
    double scale;
} shape;

// Always inlined with a constant `half`, so that each type has loops of its own.
#define INLINE static inline __attribute__((always_inline))

INLINE lanes load(const void *store, int64_t at, int half) {
    if (!half) return *(const lanes *)((const float *)store + at);
    halves bits = *(const halves *)((const uint16_t *)store + at);
    return (lanes)(__builtin_convertvector(bits, words) << 16);
}

INLINE float load_one(const void *store, int64_t at, int half) {
    if (!half) return ((const float *)store)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)store)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The sums of 16 vectors as one vector: each stage adds one half of the lanes to the other, for two vectors at once.
INLINE lanes totals(lanes *v) {
    const whole low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, high8 = low8 + 8;
    const whole low4 = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}, high4 = low4 + 4;
    const whole low2 = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}, high2 = low2 + 2;
    const whole low1 = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, high1 = low1 + 1;
    for (int i = 0; i < 8; i++)
        v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], low8) + __builtin_shuffle(v[2 * i], v[2 * i + 1], high8);
    for (int i = 0; i < 4; i++)
        v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], low4) + __builtin_shuffle(v[2 * i], v[2 * i + 1], high4);
    for (int i = 0; i < 2; i++)
        v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], low2) + __builtin_shuffle(v[2 * i], v[2 * i + 1], high2);
    return __builtin_shuffle(v[0], v[1], low1) + __builtin_shuffle(v[0], v[1], high1);
}

// Scores of one head for the BLOCK tokens at `at`, `stride` elements apart.
INLINE void score_block(const float *query, const void *keys, int64_t at, int64_t stride, int64_t width, int half,
                        float scale, const float *mask, float *scores) {
    lanes sum[BLOCK] = {{0}};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        lanes q = *(const lanes *)(query + i);
        for (int t = 0; t < BLOCK; t++) sum[t] += q * load(keys, at + t * stride + i, half);
    }
    lanes result = totals(sum);
    for (; i < width; i++)
        for (int t = 0; t < BLOCK; t++) result[t] += query[i] * load_one(keys, at + t * stride + i, half);
    *(lanes *)scores = result * scale + *(const lanes *)mask;
}

// out += the BLOCK tokens' values at `at`, by their weights; `wide` vectors of them at once.
INLINE void add_columns(float *out, const float *weights, const void *values, int64_t at, int64_t stride, int half,
                        int wide) {
    lanes sum[4];
    for (int v = 0; v < wide; v++) sum[v] = *(lanes *)(out + v * LANES);
    for (int t = 0; t < BLOCK; t++, at += stride)
        for (int v = 0; v < wide; v++) sum[v] += weights[t] * load(values, at + v * LANES, half);
    for (int v = 0; v < wide; v++) *(lanes *)(out + v * LANES) = sum[v];
}

INLINE void add_block(float *out, const float *weights, const void *values, int64_t at, int64_t stride, int64_t width,
                      int half) {
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES) add_columns(out + i, weights, values, at + i, stride, half, 4);
    for (; i + 2 * LANES <= width; i += 2 * LANES) add_columns(out + i, weights, values, at + i, stride, half, 2);
    for (; i + LANES <= width; i += LANES) add_columns(out + i, weights, values, at + i, stride, half, 1);
    for (; i < width; i++)
        for (int t = 0; t < BLOCK; t++) out[i] += weights[t] * load_one(values, at + t * stride + i, half);
}

// e^x for x at most 0: 2^n by the exponent's bits, times the power series of the rest, which is at most ln(2) / 2. ln(2)
// is taken off in two parts, the first short enough for exact products with n.
INLINE lanes exponential(lanes x) {
    whole small = x < -87.0f;
    x = (lanes)(((whole)x & ~small) | ((whole)((lanes){0} - 87.0f) & small));
    lanes scaled = x * 1.44269504088896341f - 0.5f;
    whole n = __builtin_convertvector(scaled, whole); // towards 0: the nearest, for all of these are negative
    lanes whole_part = __builtin_convertvector(n, lanes);
    lanes r = x - whole_part * (45426.0f / 65536) - whole_part * 1.4286068e-6f;
    lanes p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return (lanes)((whole)p + (n << 23));
}

// Scores become weights that sum to 1, or to less where a sink takes a share. `length` is a multiple of LANES.
INLINE void soft_max(float *scores, int64_t length, const float *sink) {
    lanes high = {0};
    high += sink ? *sink : MASKED;
    for (int64_t t = 0; t < length; t += LANES) {
        lanes v = *(lanes *)(scores + t);
        whole more = v > high;
        high = (lanes)(((whole)v & more) | ((whole)high & ~more));
    }
    float most = high[0];
    for (int i = 1; i < LANES; i++) most = fmaxf(most, high[i]);
    lanes sum = {0};
    for (int64_t t = 0; t < length; t += LANES) {
        lanes weight = exponential(*(lanes *)(scores + t) - most); // of a masked one: 1e-38, and never used
        *(lanes *)(scores + t) = weight;
        sum += weight;
    }
    float all = sink ? expf(*sink - most) : 0.0f;
    for (int i = 0; i < LANES; i++) all += sum[i];
    for (int64_t t = 0; t < length; t += LANES) *(lanes *)(scores + t) /= all;
}

// Whether no token of a block may be read: padding of a short row, or outside a sliding window.
INLINE int skip(const float *mask) {
    for (int t = 0; t < BLOCK; t++)
        if (mask[t] > MASKED) return 0;
    return 1;
}

INLINE int attend(const shape *s, int half, const float *query, const void *keys, const void *values,
                  const int64_t *table, const float *mask, const float *sinks, float *out) {
    int64_t length = s->length, each = s->heads / s->groups;
    float *scores = malloc((size_t)(s->heads * length) * sizeof *scores);
    if (!scores) return 1;
    for (int64_t n = 0; n < length / BLOCK; n++) {
        int unread = skip(mask + n * BLOCK);
        for (int64_t h = 0; h < s->heads; h++) {
            float *at = scores + h * length + n * BLOCK;
            if (unread)
                *(lanes *)at = (lanes){0} + 2 * MASKED;
            else
                score_block(query + h * s->key_width, keys, (table[n] * BLOCK * s->groups + h / each) * s->key_width,
                            s->groups * s->key_width, s->key_width, half, (float)s->scale, mask + n * BLOCK, at);
        }
    }
    for (int64_t h = 0; h < s->heads; h++) soft_max(scores + h * length, length, sinks ? sinks + h : NULL);
    memset(out, 0, (size_t)(s->heads * s->value_width) * sizeof *out);
    for (int64_t n = 0; n < length / BLOCK; n++)
        for (int64_t h = 0; h < s->heads && !skip(mask + n * BLOCK); h++)
            add_block(out + h * s->value_width, scores + h * length + n * BLOCK, values,
                      (table[n] * BLOCK * s->groups + h / each) * s->value_width, s->groups * s->value_width,
                      s->value_width, half);
    free(scores);
    return 0;
}

// Returns 0, or 1 if there was no memory for the scores.
int prism_attention(const shape *s, const float *query, const void *keys, const void *values, const int64_t *tables,
                    const float *mask, const float *sinks, float *out) {
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(s->threads) reduction(| : failed) if (s->threads > 1)
    for (int64_t row = 0; row < s->rows; row++) {
        const float *q = query + row * s->heads * s->key_width;
        float *o = out + row * s->heads * s->value_width;
        const int64_t *table = tables + row * s->per_row;
        const float *m = mask + row * s->length;
        failed |= s->bfloat16 ? attend(s, 1, q, keys, values, table, m, sinks, o)
                              : attend(s, 0, q, keys, values, table, m, sinks, o);
    }
    return failed;
}
