// Which sub-experts run for the rows of one layer, and what stands in for those that do not: `gating.cells_to_run` in
// one call, because a torch operation a line costs more than a small layer's experts save.
//
// A cell is one sub-expert of one routed expert of one row. Sums are float32, in an order that depends on the row and
// the weights alone: a row gives the same bits in any company. H is a multiple of 16.

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define SENSITIVITY_EXPONENT 0.25f
#define SENSITIVITY_LIMIT 8.0f
#define RMS_FLOOR 1e-6f

typedef float lanes __attribute__((vector_size(64), aligned(4)));

typedef struct {
    int64_t rows, top_k, experts, sub_experts, neurons, hidden;  // neurons of a sub-expert
    int64_t rank;                                                // of the compensation, 0 for none
    int64_t cap;                                                 // most cells of a row, 0 for no limit
    int64_t point, at;  // of the point, and of the point and layer, in the plan's tables
    float kappa;        // below 0 evaluates every gate output
} shape;

// Pointers may be null where the shape or the gate has no such part. Layouts as in contract.GateWeights and
// contract.CompensationWeights, all float32.
typedef struct {
    const float *weight, *bias, *mean, *deviation, *token;
    const float *a, *u, *c;
} fitted;

// The plan's tables of log thresholds, and its counters that the call adds to: see plan.PlanTensor.
typedef struct {
    const float *tau, *shift;
    int64_t *ran, *routed;
    double *extra, *spent;
} live_plan;

static float dot(const float *x, const float *w, int64_t width) {
    lanes sums = {0}, others = {0};  // two, as one would wait for its own last sum
    int64_t c = 0;
    for (; c + LANES < width; c += 2 * LANES) {
        sums += *(const lanes *)(x + c) * *(const lanes *)(w + c);
        others += *(const lanes *)(x + c + LANES) * *(const lanes *)(w + c + LANES);
    }
    if (c < width) sums += *(const lanes *)(x + c) * *(const lanes *)(w + c);
    sums += others;
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) sums[i] += sums[i + step];
    return sums[0];
}

static float log_token_factor(const fitted *f, const float *x, float rms, int64_t width) {
    rms = fmaxf(rms, RMS_FLOOR);
    float log_rms = logf(rms);
    if (!f->token) return -log_rms;
    const float *rest = f->token + width;
    float sensitivity = dot(x, f->token, width) + rms * rest[0] + log_rms * rest[1] + rest[2];
    return fminf(fmaxf(SENSITIVITY_EXPONENT * sensitivity, -SENSITIVITY_LIMIT), SENSITIVITY_LIMIT) - log_rms;
}

// Leaves the `cap` highest scores of a row in `keep`; the floor's cell counts as the highest, ties go to the lower.
static void cut_to_cap(uint8_t *keep, const float *score, int64_t floor, int64_t cells, int64_t cap) {
    for (int64_t left = cap; left; left--) {
        int64_t best = -1;
        for (int64_t i = 0; i < cells; i++)
            if (keep[i] == 1 && (best < 0 || i == floor || (best != floor && score[i] > score[best]))) best = i;
        if (best < 0) break;
        keep[best] = 2;
    }
    for (int64_t i = 0; i < cells; i++) keep[i] = keep[i] == 2;
}

static void compensate(const shape *s, const fitted *f, const float *x, const int64_t *ids, const float *router,
                       const uint8_t *keep, float *added) {
    int64_t width = s->hidden, rank = s->rank;
    float inner[rank];
    memcpy(inner, f->a + width * rank, rank * sizeof *inner);
    for (int64_t c = 0; c < width; c++)
        for (int64_t r = 0; r < rank; r++) inner[r] += x[c] * f->a[c * rank + r];
    for (int64_t k = 0; k < s->top_k; k++) {
        if (ids[k] < 0 || ids[k] >= s->experts) continue;
        for (int64_t n = 0; n < s->sub_experts; n++) {
            if (keep[k * s->sub_experts + n]) continue;
            const float *mean = f->c + (ids[k] * s->sub_experts + n) * rank;
            for (int64_t r = 0; r < rank; r++) inner[r] += router[k] * mean[r];
        }
    }
    for (int64_t r = 0; r < rank; r++)
        for (int64_t c = 0; c < width; c++) added[c] += inner[r] * f->u[r * width + c];
}

// For the `count` rows in `rows`: writes their cells of `keep` [T, K, N], adds to their rows of `added` [T, H] if there
// is a compensation, and charges what `gating.choose_cells` charges. `score` holds K * N floats.
void prism_threshold_cells(const shape *s, const fitted *f, const int64_t *rows, int64_t count, const float *hidden,
                           const int64_t *expert_ids, const float *router_weights, const float *residual_rms,
                           uint8_t *keep, float *added, float *score, const live_plan *plan) {
    int64_t subs = s->sub_experts, cells = s->top_k * subs, ran = 0, outputs = 0, routed = 0;
    float tau = plan->tau[s->at] + plan->shift[s->point];
    for (int64_t i = 0; i < count; i++) {
        int64_t row = rows[i], heaviest = -1, kept = 0, slots = 0;
        const float *x = hidden + row * s->hidden, *router = router_weights + row * s->top_k;
        const int64_t *ids = expert_ids + row * s->top_k;
        uint8_t *mine = keep + row * cells;
        float token = log_token_factor(f, x, residual_rms[row], s->hidden);
        memset(mine, 0, cells);
        for (int64_t k = 0; k < s->top_k; k++) {
            if (ids[k] < 0 || ids[k] >= s->experts) continue;
            slots++;
            if (heaviest < 0 || router[k] > router[heaviest]) heaviest = k;
            float scale = logf(router[k]) + token;
            if (scale == -INFINITY) continue;  // a router weight of zero: nothing to decide
            for (int64_t n = 0; n < subs; n++) {
                int64_t cell = ids[k] * subs + n;
                float predicted = f->mean[cell];
                if (s->kappa < 0 || fabsf(tau - scale - predicted) < s->kappa * f->deviation[cell]) {
                    predicted = f->bias[cell] + dot(x, f->weight + cell * s->hidden, s->hidden);
                    outputs++;
                }
                score[k * subs + n] = predicted + scale;
                mine[k * subs + n] = score[k * subs + n] >= tau;
                kept += mine[k * subs + n];
            }
        }
        if (heaviest >= 0 && !mine[heaviest * subs]) mine[heaviest * subs] = 1, kept++;
        if (s->cap && kept > s->cap) cut_to_cap(mine, score, heaviest * subs, cells, s->cap), kept = s->cap;
        ran += kept, routed += slots * subs;
        if (s->rank) compensate(s, f, x, ids, router, mine, added + row * s->hidden);
    }
    int64_t width = s->hidden, multiply_adds = outputs * width + s->rank * (routed - ran);
    multiply_adds += count * ((f->token != 0) + 2 * s->rank) * width;
    double extra = (double)multiply_adds / (3 * s->neurons * width);
    *plan->ran += ran, *plan->routed += routed, *plan->extra += extra;
    plan->spent[2 * s->point] += ran + extra, plan->spent[2 * s->point + 1] += routed;
}

// For every row: the first `counts` [T, R] sub-experts of its experts, by the rank of their router weight; R is K, or 1
// where all ranks get the same. Writes all of `keep`; slots of rows without sub-experts are not counted as routed.
void prism_prefix_cells(const shape *s, const int32_t *counts, int64_t ranks, const int64_t *expert_ids,
                        const float *router_weights, uint8_t *keep, const live_plan *plan) {
    for (int64_t row = 0; row < s->rows; row++) {
        const float *router = router_weights + row * s->top_k;
        const int32_t *count = counts + row * ranks;
        for (int64_t k = 0; k < s->top_k; k++) {
            int64_t slot = row * s->top_k + k, place = 0, ours = expert_ids[slot] >= 0 && expert_ids[slot] < s->experts;
            for (int64_t other = 0; ranks > 1 && other < s->top_k; other++)
                place += router[other] > router[k] || (router[other] == router[k] && other < k);
            int64_t some = ours ? count[place] : 0;
            for (int64_t n = 0; n < s->sub_experts; n++) keep[slot * s->sub_experts + n] = n < some;
            *plan->ran += some, *plan->routed += (ours && count[0] > 0) * s->sub_experts;
        }
    }
}
