/* Swap searches over the partition of one expert's neurons into equal sub-experts.
 *
 * swap.py holds the same two searches in NumPy, and both give the same bits. Four rules make that so; a change here needs
 * its twin there:
 *   - rows lie in blocks of BLOCK, zero-padded, and only whole blocks are computed;
 *   - a sum over neurons runs in the order of `members`, one product rounded, then one addition rounded (compile with
 *     -ffp-contract=off and without -ffast-math);
 *   - a sum over a block's rows runs in LANES interleaved double accumulators, row by row, then over the lanes;
 *   - whatever needs a logarithm, an exponential or a random number is made once by the caller and read from an array.
 *
 * No static state: calls on different buffers may run at the same time.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 256, LANES = 16, VECTORS = BLOCK / LANES, TILE = 8 };

/* Sixteen floats as one value: the compiler keeps a tile of sums in registers, which it does not do with plain arrays. */
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef struct {
    int32_t neurons, size;  /* size: neurons a sub-expert */
    int32_t *part;          /* [neurons] sub-expert of a neuron */
    int32_t *members;       /* [neurons] neurons by sub-expert, `size` each */
    int32_t *place;         /* [neurons] where a neuron stands in `members` */
    int32_t *best;          /* [neurons] `part` of the best state seen */
} Groups;

static int groups_open(Groups *groups, const int32_t *part, int32_t neurons, int32_t sub_experts) {
    groups->neurons = neurons;
    groups->size = neurons / sub_experts;
    groups->part = malloc(4 * (size_t)neurons * sizeof(int32_t));
    if (!groups->part) return -1;
    groups->members = groups->part + neurons;
    groups->place = groups->members + neurons;
    groups->best = groups->place + neurons;
    memcpy(groups->part, part, neurons * sizeof(int32_t));
    memcpy(groups->best, part, neurons * sizeof(int32_t));
    int32_t place = 0;
    for (int32_t group = 0; group < sub_experts; group++)
        for (int32_t neuron = 0; neuron < neurons; neuron++)
            if (part[neuron] == group) {
                groups->members[place] = neuron;
                groups->place[neuron] = place++;
            }
    return 0;
}

/* The second neuron of a proposal: the `draw`-th of those outside the first one's sub-expert. */
static int32_t partner(const Groups *groups, int32_t neuron, int32_t draw) {
    int32_t first = groups->part[neuron] * groups->size;
    return groups->members[draw < first ? draw : draw + groups->size];
}

static void exchange(Groups *groups, int32_t one, int32_t other) {
    int32_t group = groups->part[one], place = groups->place[one];
    groups->part[one] = groups->part[other];
    groups->part[other] = group;
    groups->place[one] = groups->place[other];
    groups->place[other] = place;
    groups->members[groups->place[one]] = one;
    groups->members[groups->place[other]] = other;
}

/* ---- energies: sum over rows, sub-experts and limits of weight * min(b_n' G_nn b_n, limit) ---- */

typedef struct {
    const float *rows;  /* [blocks][neurons][BLOCK] */
    const float *gram;  /* [neurons][neurons], symmetric */
    const float *limit, *weight;
    int32_t limits, blocks, sub_experts;
    float *energy;      /* [sub_experts][blocks][BLOCK] */
    double *cost;       /* [sub_experts][blocks] */
} Energies;

static double energy_cost(const Energies *state, const float *energy) {
    double lane[LANES] = {0}, sum = 0;
    for (int row = 0; row < BLOCK; row += LANES)
        for (int i = 0; i < LANES; i++) {
            float cost = 0;
            for (int32_t j = 0; j < state->limits; j++) {
                float capped = energy[row + i] < state->limit[j] ? energy[row + i] : state->limit[j];
                cost += state->weight[j] * capped;
            }
            lane[i] += cost;
        }
    for (int i = 0; i < LANES; i++) sum += lane[i];
    return sum;
}

/* Energies of one sub-expert in one block after `leaves` was replaced by `enters`. */
static void exchanged_energy(const Energies *state, const Groups *groups, const float *rows, const float *energy,
                             int32_t leaves, int32_t enters, float *result) {
    const int32_t *member = groups->members + groups->part[leaves] * groups->size;
    const float *gram_leaves = state->gram + (size_t)leaves * groups->neurons;
    const float *gram_enters = state->gram + (size_t)enters * groups->neurons;
    const float leaves_leaves = gram_leaves[leaves], enters_enters = gram_enters[enters];
    const float leaves_enters = gram_leaves[enters];
    for (int tile = 0; tile < VECTORS; tile += TILE) {
        vec left[TILE], joined[TILE];
        for (int i = 0; i < TILE; i++) left[i] = joined[i] = (vec){0};
        for (int32_t x = 0; x < groups->size; x++) {
            const vec *row = (const vec *)(rows + (size_t)member[x] * BLOCK) + tile;
            const float by_leaves = gram_leaves[member[x]], by_enters = gram_enters[member[x]];
            for (int i = 0; i < TILE; i++) {
                left[i] += by_leaves * row[i];
                joined[i] += by_enters * row[i];
            }
        }
        const vec *out = (const vec *)(rows + (size_t)leaves * BLOCK) + tile;
        const vec *in = (const vec *)(rows + (size_t)enters * BLOCK) + tile;
        const vec *before = (const vec *)energy + tile;
        vec *after = (vec *)result + tile;
        for (int i = 0; i < TILE; i++) {
            vec lost = out[i] * (2.0f * left[i] - leaves_leaves * out[i]);
            vec gained = in[i] * (2.0f * (joined[i] - leaves_enters * out[i]) + enters_enters * in[i]);
            after[i] = (before[i] - lost) + gained;
        }
    }
    for (int row = 0; row < BLOCK; row++) result[row] = result[row] > 0 ? result[row] : 0;
}

/* Energies and costs from the members alone; returns the objective. Wipes what rounding added over many swaps. */
static double energies_refresh(Energies *state, const Groups *groups) {
    double objective = 0;
    for (int32_t group = 0; group < state->sub_experts; group++) {
        const int32_t *member = groups->members + group * groups->size;
        for (int32_t block = 0; block < state->blocks; block++) {
            const float *rows = state->rows + (size_t)block * groups->neurons * BLOCK;
            float *energy = state->energy + ((size_t)group * state->blocks + block) * BLOCK;
            for (int tile = 0; tile < VECTORS; tile += TILE) {
                vec total[TILE];
                for (int i = 0; i < TILE; i++) total[i] = (vec){0};
                for (int32_t x = 0; x < groups->size; x++) {
                    const float *gram = state->gram + (size_t)member[x] * groups->neurons;
                    vec product[TILE];
                    for (int i = 0; i < TILE; i++) product[i] = (vec){0};
                    for (int32_t y = 0; y < groups->size; y++) {
                        const vec *row = (const vec *)(rows + (size_t)member[y] * BLOCK) + tile;
                        for (int i = 0; i < TILE; i++) product[i] += gram[member[y]] * row[i];
                    }
                    const vec *row = (const vec *)(rows + (size_t)member[x] * BLOCK) + tile;
                    for (int i = 0; i < TILE; i++) total[i] += row[i] * product[i];
                }
                vec *result = (vec *)energy + tile;
                for (int i = 0; i < TILE; i++) result[i] = total[i];
            }
            for (int row = 0; row < BLOCK; row++) energy[row] = energy[row] > 0 ? energy[row] : 0;
            double cost = energy_cost(state, energy);
            state->cost[(size_t)group * state->blocks + block] = cost;
            objective += cost;
        }
    }
    return objective;
}

/* Returns 0, or -1 when memory is short. See swap.py, `_search_energies`, for the contract.
 *
 * pairs       [proposals][2]  a neuron, and a draw for `partner`
 * slack       [proposals]     a swap is taken if it raises the objective by less than this
 * screen      not 0: a proposal is given up at the first block after which its sum is not below its slack
 * rotate_every  proposals after which another block is the first
 * part        [neurons]       in: the start; out: the best state seen
 * objective   [2]             of the start and of the result
 * deltas      [proposals] or NULL: what every proposal would have added
 */
int prism_swap_energies(const float *rows, const float *gram, int32_t neurons, int32_t sub_experts, int32_t blocks,
                        int32_t limits, const float *limit, const float *weight, int64_t proposals,
                        const int32_t *pairs, const double *slack, int32_t screen, int32_t rotate_every,
                        int32_t refresh_every, int32_t *part, double *objective, double *deltas) {
    Groups groups;
    Energies state = {rows, gram, limit, weight, limits, blocks, sub_experts, NULL, NULL};
    size_t cells = (size_t)sub_experts * blocks, row_bytes = (size_t)blocks * BLOCK * sizeof(float);
    if (groups_open(&groups, part, neurons, sub_experts)) return -1;
    state.energy = malloc(cells * BLOCK * sizeof(float));
    state.cost = malloc(cells * sizeof(double));
    float *after = malloc(2 * row_bytes);
    double *after_cost = malloc(2 * (size_t)blocks * sizeof(double));
    int failed = !state.energy || !state.cost || !after || !after_cost;
    if (!failed) {
        double total = energies_refresh(&state, &groups), best = total;
        int32_t accepted = 0;
        objective[0] = total;
        for (int64_t k = 0; k < proposals; k++) {
            int32_t pair[2] = {pairs[2 * k], partner(&groups, pairs[2 * k], pairs[2 * k + 1])};
            int32_t group[2] = {groups.part[pair[0]], groups.part[pair[1]]};
            double delta = 0;
            for (int32_t step = 0; step < blocks; step++) {
                int32_t block = (int32_t)((k / rotate_every + step) % blocks);
                for (int side = 0; side < 2; side++) {
                    size_t cell = (size_t)group[side] * blocks + block;
                    float *result = after + ((size_t)side * blocks + block) * BLOCK;
                    exchanged_energy(&state, &groups, rows + (size_t)block * neurons * BLOCK,
                                     state.energy + cell * BLOCK, pair[side], pair[1 - side], result);
                    after_cost[side * blocks + block] = energy_cost(&state, result);
                    delta += after_cost[side * blocks + block] - state.cost[cell];
                }
                if (screen && !(delta < slack[k])) break;
            }
            if (deltas) deltas[k] = delta;
            if (!(delta < slack[k])) continue;
            for (int side = 0; side < 2; side++) {
                memcpy(state.energy + (size_t)group[side] * blocks * BLOCK, after + (size_t)side * blocks * BLOCK, row_bytes);
                memcpy(state.cost + (size_t)group[side] * blocks, after_cost + (size_t)side * blocks, blocks * sizeof(double));
            }
            exchange(&groups, pair[0], pair[1]);
            total = ++accepted % refresh_every ? total + delta : energies_refresh(&state, &groups);
            if (total < best) {
                best = total;
                memcpy(groups.best, groups.part, neurons * sizeof(int32_t));
            }
        }
        Groups result;
        failed = groups_open(&result, groups.best, neurons, sub_experts);
        if (!failed) {
            objective[1] = energies_refresh(&state, &result);
            if (objective[1] < objective[0])
                memcpy(part, groups.best, neurons * sizeof(int32_t));
            else
                objective[1] = objective[0];
            free(result.part);
        }
    }
    free(after_cost);
    free(after);
    free(state.cost);
    free(state.energy);
    free(groups.part);
    return failed ? -1 : 0;
}

/* ---- masses: sum over rows of the `off` smallest of the sub-experts' sums of magnitudes ---- */

/* One block: `mass` [sub_experts] points to rows of BLOCK. Bubbles the smallest down, one rank a pass, all rows at once. */
static double mass_cost(const double *const *mass, int32_t sub_experts, int32_t off, double *sorted) {
    double lane[LANES] = {0}, sum = 0;
    for (int32_t n = 0; n < sub_experts; n++) memcpy(sorted + (size_t)n * BLOCK, mass[n], BLOCK * sizeof(double));
    for (int32_t rank = 0; rank < off; rank++)
        for (int32_t n = sub_experts - 1; n > rank; n--) {
            double *above = sorted + (size_t)(n - 1) * BLOCK, *below = sorted + (size_t)n * BLOCK;
            for (int row = 0; row < BLOCK; row++) {
                double a = above[row], b = below[row];
                above[row] = a < b ? a : b;
                below[row] = a < b ? b : a;
            }
        }
    for (int32_t rank = 1; rank < off; rank++)
        for (int row = 0; row < BLOCK; row++) sorted[row] += sorted[(size_t)rank * BLOCK + row];
    for (int row = 0; row < BLOCK; row += LANES)
        for (int i = 0; i < LANES; i++) lane[i] += sorted[row + i];
    for (int i = 0; i < LANES; i++) sum += lane[i];
    return sum;
}

static double masses_refresh(const Groups *groups, const double *rows, int32_t sub_experts, int32_t blocks, int32_t off,
                             double *mass, double *cost, const double **view, double *sorted) {
    double objective = 0;
    for (int32_t block = 0; block < blocks; block++) {
        for (int32_t n = 0; n < sub_experts; n++) {
            double *total = mass + ((size_t)block * sub_experts + n) * BLOCK;
            memset(total, 0, BLOCK * sizeof(double));
            for (int32_t x = 0; x < groups->size; x++) {
                const double *row = rows + ((size_t)block * groups->neurons + groups->members[n * groups->size + x]) * BLOCK;
                for (int i = 0; i < BLOCK; i++) total[i] += row[i];
            }
            view[n] = total;
        }
        cost[block] = mass_cost(view, sub_experts, off, sorted);
        objective += cost[block];
    }
    return objective;
}

/* As prism_swap_energies, in float64 and never screened. rows [blocks][neurons][BLOCK], not negative. */
int prism_swap_masses(const double *rows, int32_t neurons, int32_t sub_experts, int32_t blocks, int32_t off,
                      int64_t proposals, const int32_t *pairs, const double *slack, int32_t rotate_every,
                      int32_t refresh_every, int32_t *part, double *objective, double *deltas) {
    Groups groups;
    if (groups_open(&groups, part, neurons, sub_experts)) return -1;
    double *mass = malloc((size_t)blocks * sub_experts * BLOCK * sizeof(double));
    double *after = malloc(2 * (size_t)blocks * BLOCK * sizeof(double));
    double *cost = malloc(2 * (size_t)blocks * sizeof(double)), *after_cost = cost + blocks;
    double *sorted = malloc((size_t)sub_experts * BLOCK * sizeof(double));
    const double **view = malloc(sub_experts * sizeof(double *));
    int failed = !mass || !after || !cost || !sorted || !view;
    if (!failed) {
        double total = masses_refresh(&groups, rows, sub_experts, blocks, off, mass, cost, view, sorted), best = total;
        int32_t accepted = 0;
        objective[0] = total;
        for (int64_t k = 0; k < proposals; k++) {
            int32_t one = pairs[2 * k], other = partner(&groups, one, pairs[2 * k + 1]);
            int32_t group = groups.part[one], other_group = groups.part[other];
            double delta = 0;
            for (int32_t step = 0; step < blocks; step++) {
                int32_t block = (int32_t)((k / rotate_every + step) % blocks);
                const double *out = rows + ((size_t)block * neurons + one) * BLOCK;
                const double *in = rows + ((size_t)block * neurons + other) * BLOCK;
                double *first = after + (size_t)(2 * block) * BLOCK, *second = first + BLOCK;
                for (int32_t n = 0; n < sub_experts; n++) view[n] = mass + ((size_t)block * sub_experts + n) * BLOCK;
                for (int row = 0; row < BLOCK; row++) {
                    double moved = in[row] - out[row];
                    first[row] = view[group][row] + moved;
                    second[row] = view[other_group][row] - moved;
                }
                view[group] = first;
                view[other_group] = second;
                after_cost[block] = mass_cost(view, sub_experts, off, sorted);
                delta += after_cost[block] - cost[block];
            }
            if (deltas) deltas[k] = delta;
            if (!(delta < slack[k])) continue;
            for (int32_t block = 0; block < blocks; block++) {
                double *here = mass + (size_t)block * sub_experts * BLOCK, *first = after + (size_t)(2 * block) * BLOCK;
                memcpy(here + (size_t)group * BLOCK, first, BLOCK * sizeof(double));
                memcpy(here + (size_t)other_group * BLOCK, first + BLOCK, BLOCK * sizeof(double));
                cost[block] = after_cost[block];
            }
            exchange(&groups, one, other);
            total += delta;
            if (++accepted % refresh_every == 0)
                total = masses_refresh(&groups, rows, sub_experts, blocks, off, mass, cost, view, sorted);
            if (total < best) {
                best = total;
                memcpy(groups.best, groups.part, neurons * sizeof(int32_t));
            }
        }
        Groups result;
        failed = groups_open(&result, groups.best, neurons, sub_experts);
        if (!failed) {
            objective[1] = masses_refresh(&result, rows, sub_experts, blocks, off, mass, cost, view, sorted);
            if (objective[1] < objective[0])
                memcpy(part, groups.best, neurons * sizeof(int32_t));
            else
                objective[1] = objective[0];
            free(result.part);
        }
    }
    free(view);
    free(sorted);
    free(cost);
    free(after);
    free(mass);
    free(groups.part);
    return failed ? -1 : 0;
}
