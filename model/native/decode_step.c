/* The forward pass of the model on a CPU in float32, for a few dozen tokens at a time.
 *
 * Same numbers as model/transformer.py up to rounding. A token's numbers never depend on the other
 * tokens of the call: every sum runs in an order that is fixed by the model's sizes.
 *
 * Shapes as in the Python files: M tokens, H hidden, N query heads, K key heads, D head size,
 * R rotary size, E experts, k experts a token, P = M·k pairs, I expert width, V vocabulary.
 * A panel is one matrix's weights for 2·LANES outputs, input after input, so that a product reads
 * memory from its beginning to its end. Weights that bfloat16 holds exactly are kept in 16 bits and
 * widened in registers: half the memory, the same numbers.
 *
 * C11 with the vector types of GCC and Clang; no intrinsics, no libraries.
 */
#include <stdint.h>
#include <string.h>

#include "attention.h"
#include "model.h"

#define ROWS (LANES > 8 ? 8 : 6) /* of a tile: 2 accumulators each */
#define AHEAD 128 /* panel rows to fetch ahead: about a memory access's worth of work */

/* ------------------------------------------------------------------------------- products */

enum kind { STORE, ADD, SWIGLU };

/* `rows` rows times one panel. SWIGLU: the panel's halves are gate and value; `scale` a factor. */
INLINE void tile(int rows, enum kind kind, int is_short, const float *const *x, const char *panel,
                 int64_t inputs, float *const *out, const float *scale) {
    vf low[ROWS], high[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) low[m] = high[m] = (vf){0};
    const int64_t step = is_short ? LANES * 4 : PANEL * 4;
    for (int64_t i = 0; i < inputs; i++, panel += step) {
        vf a, b;
        __builtin_prefetch(panel + AHEAD * step);
        if (is_short) {
            vu both = *(const vu_any *)panel;
            a = (vf)(both << 16);
            b = (vf)(both & 0xffff0000u);
        } else {
            __builtin_prefetch(panel + AHEAD * step + LANES * 4);
            a = load((const float *)panel);
            b = load((const float *)panel + LANES);
        }
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            vf factor = all(x[m][i]);
            low[m] += factor * a;
            high[m] += factor * b;
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
        if (kind == SWIGLU) {
            vf gate = low[m] / (1.0f + exp_of(-low[m]));
            store(out[m], gate * high[m] * scale[m]);
        } else {
            vf *sums[2] = {&low[m], &high[m]};
            for (int half = 0; half < 2; half++) {
                float *place = out[m] + half * LANES;
                store(place, kind == ADD ? load(place) + *sums[half] : *sums[half]);
            }
        }
    }
}

#define TILE(n) \
    case n: \
        tile(n, kind, is_short, x, panel, inputs, out, scale); \
        break;

INLINE void any_tile(int rows, enum kind kind, int is_short, const float *const *x,
                     const char *panel, int64_t inputs, float *const *out, const float *scale) {
    switch (rows) {
        TILE(1)
        TILE(2)
        TILE(3)
        TILE(4)
        TILE(5)
        TILE(6)
#if LANES > 8
        TILE(7)
        TILE(8)
#endif
    }
}

/* out[m] (outputs, padded to whole panels) = x[m] (inputs) times a matrix; see `tile`. */
INLINE void product(enum kind kind, int is_short, const struct matrix *w, int64_t expert,
                    int64_t rows, const float *const *x, float *const *out, const float *scale) {
    const int64_t width = kind == SWIGLU ? LANES : PANEL, size = w->inputs * PANEL * (is_short ? 2 : 4);
    const int64_t panels = up(w->outputs, width) / width, tiles = up(rows, ROWS) / ROWS;
    const char *panel = w->panels + expert * w->stride;
    for (int64_t p = 0; p < panels; p++, panel += size)
        for (int64_t t = 0; t < tiles; t++) {
            int64_t begin = t * rows / tiles, end = (t + 1) * rows / tiles;
            float *place[ROWS];
            for (int64_t m = begin; m < end; m++) place[m - begin] = out[m] + p * width;
            any_tile((int)(end - begin), kind, is_short, x + begin, panel, w->inputs, place,
                     scale + (kind == SWIGLU ? begin : 0));
        }
}

#define PRODUCT(name, kind) \
    static void name(const struct matrix *w, int64_t expert, int64_t rows, const float *const *x, \
                     float *const *out, const float *scale) { \
        if (w->is_short) \
            product(kind, 1, w, expert, rows, x, out, scale); \
        else \
            product(kind, 0, w, expert, rows, x, out, scale); \
    }
PRODUCT(multiply, STORE)
PRODUCT(multiply_add, ADD)
PRODUCT(multiply_swiglu, SWIGLU)

/* ------------------------------------------------------------------------- norms and rotation */

INLINE float root_scale(const float *x, int64_t n, float eps) {
    vf sums = {0};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += load(x + i) * load(x + i);
    for (; i < n; i++) rest += x[i] * x[i];
    return 1.0f / __builtin_sqrtf((sum_of(sums) + rest) / (float)n + eps);
}

static void norm(const float *x, const float *weight, int64_t n, float eps, float *out) {
    const float scale = root_scale(x, n, eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

void native_norm(const float *x, const float *weight, int64_t n, float eps, float *out) {
    norm(x, weight, n, eps, out);
}

/* Rotates `heads` heads in place; number j of a head turns with number j + R/2. */
static void turn(float *x, int64_t heads, int64_t head_dim, int64_t half, const float *cos,
                 const float *sin) {
    for (int64_t h = 0; h < heads; h++, x += head_dim)
        for (int64_t j = 0; j < half; j++) {
            const float a = x[j], b = x[j + half];
            x[j] = a * cos[j] - b * sin[j];
            x[j + half] = b * cos[j] + a * sin[j];
        }
}

/* ------------------------------------------------------------------------------ the forward */

struct scratch {
    float *x, *normed, *joined, *qkv, *mixed, *gate, *inner, *score, *weight, *pair_weight;
    int32_t *chosen, *pair_token, *begin;
    const float **rows_in;
    float **rows_out;
    int64_t x_stride, qkv_stride, mixed_stride, gate_stride, inner_stride;
};

/* Lays the scratch memory out; returns its size in bytes (with base NULL, only that). */
static int64_t lay_out(const struct model *m, int64_t count, int64_t columns, char *base,
                       struct scratch *s) {
    char *at = base;
#define TAKE(field, type, number) \
    s->field = (type)(void *)at; \
    at = base + up(at - base + (int64_t)sizeof(*s->field) * (number), 64)
    const int64_t pairs = count * m->top_k, qkv = (m->heads + 2 * m->kv_heads) * m->head_dim;
    s->x_stride = up(m->hidden, PANEL), s->qkv_stride = up(qkv, PANEL);
    s->mixed_stride = up(m->heads * m->head_dim, PANEL), s->gate_stride = up(m->experts, PANEL);
    s->inner_stride = up(m->width, PANEL);
    TAKE(x, float *, count * s->x_stride);
    TAKE(normed, float *, count * s->x_stride);
    TAKE(joined, float *, m->enorm ? 2 * count * m->hidden : 0);
    TAKE(qkv, float *, count * s->qkv_stride);
    TAKE(mixed, float *, count * s->mixed_stride);
    TAKE(gate, float *, count * s->gate_stride);
    TAKE(inner, float *, pairs * s->inner_stride);
    TAKE(score, float *, KEYS * (count < TOKENS ? count : TOKENS) * up(columns, LANES));
    TAKE(weight, float *, pairs);
    TAKE(pair_weight, float *, pairs);
    TAKE(chosen, int32_t *, pairs);
    TAKE(pair_token, int32_t *, pairs);
    TAKE(begin, int32_t *, m->experts + 1);
    TAKE(rows_in, const float **, pairs + count);
    TAKE(rows_out, float **, pairs + count);
#undef TAKE
    return at - base;
}

static void matmul(const struct matrix *w, int64_t rows, const float *x, int64_t x_stride,
                   float *out, int64_t out_stride, int add, struct scratch *s) {
    for (int64_t m = 0; m < rows; m++)
        s->rows_in[m] = x + m * x_stride, s->rows_out[m] = out + m * out_stride;
    (add ? multiply_add : multiply)(w, 0, rows, s->rows_in, s->rows_out, NULL);
}

/* Chooses k experts by score + bias; their weights are their own scores over the scores' sum. */
static void choose(const struct model *m, const float *bias, float *score, int32_t *chosen,
                   float *weight) {
    const int64_t E = m->experts;
    for (int64_t e = 0; e < E; e += LANES)
        store(score + e, 1.0f / (1.0f + exp_of(-load(score + e))));
    float total = 0;
    for (int64_t j = 0; j < m->top_k; j++) {
        int32_t best = -1;
        float most = 0;
        for (int32_t e = 0; e < E; e++) {
            const float rank = score[e] + bias[e];
            if (best >= 0 && !(rank > most)) continue;
            int taken = 0;
            for (int64_t i = 0; i < j; i++) taken |= chosen[i] == e;
            if (!taken) best = e, most = rank;
        }
        chosen[j] = best;
        total += score[best];
    }
    for (int64_t j = 0; j < m->top_k; j++) weight[j] = score[chosen[j]] / total;
}

static void experts(const struct model *m, const struct layer *layer, int64_t count,
                    struct scratch *s) {
    const int64_t k = m->top_k, E = m->experts;
    matmul(&layer->gate, count, s->normed, s->x_stride, s->gate, s->gate_stride, 0, s);
    memset(s->begin, 0, sizeof(int32_t) * (size_t)(E + 1));
    for (int64_t t = 0; t < count; t++) {
        choose(m, layer->bias, s->gate + t * s->gate_stride, s->chosen + t * k, s->weight + t * k);
        for (int64_t j = 0; j < k; j++) s->begin[s->chosen[t * k + j] + 1]++;
    }
    for (int64_t e = 0; e < E; e++) s->begin[e + 1] += s->begin[e];
    for (int64_t p = 0; p < count * k; p++) { /* begin[e] moves to the end of expert e's pairs */
        const int32_t place = s->begin[s->chosen[p]]++;
        s->pair_token[place] = (int32_t)(p / k);
        s->pair_weight[place] = s->weight[p];
    }
    for (int64_t e = 0, from = 0; e < E; from = s->begin[e++]) {
        const int64_t rows = s->begin[e] - from;
        if (!rows) continue;
        for (int64_t r = 0; r < rows; r++) {
            s->rows_in[r] = s->normed + s->pair_token[from + r] * s->x_stride;
            s->rows_out[r] = s->inner + r * s->inner_stride;
        }
        multiply_swiglu(&layer->w13, e, rows, s->rows_in, s->rows_out, s->pair_weight + from);
        for (int64_t r = 0; r < rows; r++) {
            s->rows_in[r] = s->inner + r * s->inner_stride;
            s->rows_out[r] = s->x + s->pair_token[from + r] * s->x_stride;
        }
        multiply_add(&layer->w2, e, rows, s->rows_in, s->rows_out, NULL);
    }
}

static void mix(const struct model *m, const struct layer *layer, const struct tokens *t,
                float *keys, float *values, struct scratch *s) {
    const int64_t D = m->head_dim, queries = m->heads * D, width = m->kv_heads * D;
    const int64_t half = m->rotary / 2;
    const float eps = (float)m->eps, scale = 1.0f / __builtin_sqrtf((float)D);
    matmul(&layer->qkv, t->count, s->normed, s->x_stride, s->qkv, s->qkv_stride, 0, s);
    for (int64_t i = 0; i < t->count; i++) {
        float *query = s->qkv + i * s->qkv_stride, *key = query + queries, *value = key + width;
        const float *cos = m->turn + t->position[i] * half, *sin = cos + m->positions * half;
        norm(query, layer->q_norm, queries, eps, query);
        norm(key, layer->k_norm, width, eps, key);
        turn(query, m->heads + m->kv_heads, D, half, cos, sin);
        for (int64_t q = 0; q < queries; q++) query[q] *= scale;
        const int64_t at = t->row[i] * t->row_stride + t->column[i] * D;
        for (int64_t k = 0; k < m->kv_heads; k++) {
            memcpy(keys + at + k * t->head_stride, key + k * D, sizeof(float) * (size_t)D);
            memcpy(values + at + k * t->head_stride, value + k * D, sizeof(float) * (size_t)D);
        }
    }
    struct run r = {.query_stride = s->qkv_stride, .out_stride = s->mixed_stride, .score = s->score};
    for (int64_t i = 0; i < t->count; i += r.tokens) {
        const int64_t row = t->row[i], first = t->first[i], column = t->column[i];
        const int64_t at = row * t->row_stride + first * D, left = t->count - i;
        for (r.tokens = 1; r.tokens < (left < TOKENS ? left : TOKENS); r.tokens++) {
            const int64_t j = i + r.tokens;
            if (t->row[j] != row || t->first[j] != first || t->column[j] != column + r.tokens) break;
        }
        r.n = column + 1 - first;
        r.query = s->qkv + i * s->qkv_stride, r.out = s->mixed + i * s->mixed_stride;
        attend(m->kv_heads, m->heads / m->kv_heads, D, &r, keys + at, values + at, t->head_stride);
    }
    matmul(&layer->o, t->count, s->mixed, s->mixed_stride, s->x, s->x_stride, 1, s);
}

/* The stream's first state: embeddings or, in a draft module, what it makes of them and `given`. */
static void begin(const struct model *m, const struct tokens *t, struct scratch *s) {
    const int64_t H = m->hidden;
    for (int64_t i = 0; i < t->count; i++) {
        const float *embed = m->embed + t->ids[i] * H;
        float *joined = s->joined + 2 * i * H;
        if (m->enorm) {
            norm(embed, m->enorm, H, (float)m->eps, joined);
            norm(t->given + i * H, m->hnorm, H, (float)m->eps, joined + H);
        } else {
            memcpy(s->x + i * s->x_stride, embed, sizeof(float) * (size_t)H);
        }
    }
    if (m->enorm) matmul(&m->eh, t->count, s->joined, 2 * H, s->x, s->x_stride, 0, s);
}

/* ------------------------------------------------------------------------- what Python calls */

int64_t native_sizes(int64_t which) {
    const int64_t sizes[] = {sizeof(struct model), sizeof(struct layer), sizeof(struct tokens), LANES};
    return sizes[which];
}

int64_t native_scratch(const struct model *model, int64_t count, int64_t columns) {
    struct scratch unused;
    return lay_out(model, count, columns, NULL, &unused);
}

/* Logits (count, V padded to whole panels) of hidden states (count, H); `memory` holds 2·count
 * pointers. */
void native_head(const struct model *m, int64_t count, const float *hidden, float *logits,
                 char *memory) {
    const float **in = (const float **)(void *)memory;
    float **out = (float **)(void *)(memory + (size_t)count * sizeof(*in));
    for (int64_t i = 0; i < count; i++)
        in[i] = hidden + i * m->hidden, out[i] = logits + i * up(m->vocab, PANEL);
    multiply(&m->head, 0, count, in, out, NULL);
}

/* 0, or 1 for a token that the model or the cache (`rows`, `columns`) has no place for. */
int64_t native_run(const struct model *m, const struct tokens *t, int64_t rows, int64_t columns,
                   char *memory) {
    struct scratch s;
    for (int64_t i = 0; i < t->count; i++)
        if (t->ids[i] < 0 || t->ids[i] >= m->vocab || t->row[i] < 0 || t->row[i] >= rows ||
            t->first[i] < 0 || t->first[i] > t->column[i] || t->column[i] >= columns ||
            t->position[i] < 0 || t->position[i] >= m->positions)
            return 1;
    const float eps = (float)m->eps;
    lay_out(m, t->count, columns, memory, &s);
    begin(m, t, &s);
    for (int64_t l = 0; l < m->layers; l++) {
        const struct layer *layer = m->layer + l;
        for (int64_t i = 0; i < t->count; i++)
            norm(s.x + i * s.x_stride, layer->norm, m->hidden, eps, s.normed + i * s.x_stride);
        mix(m, layer, t, t->keys[l], t->values[l], &s);
        for (int64_t i = 0; i < t->count; i++)
            norm(s.x + i * s.x_stride, layer->moe_norm, m->hidden, eps, s.normed + i * s.x_stride);
        experts(m, layer, t->count, &s);
    }
    for (int64_t i = 0; i < t->count; i++) {
        const float *x = s.x + i * s.x_stride;
        if (m->enorm)
            memcpy(t->hidden + i * m->hidden, x, sizeof(float) * (size_t)m->hidden);
        else
            norm(x, m->norm, m->hidden, eps, t->hidden + i * m->hidden);
    }
    if (t->logits) native_head(m, t->count, t->hidden, t->logits, memory);
    return 0;
}

/* 1 where bfloat16 holds every number exactly. */
int64_t native_is_short(const uint32_t *bits, int64_t count) {
    uint32_t low = 0;
    for (int64_t i = 0; i < count; i++) low |= bits[i];
    return !(low & 0xffffu);
}

/* Lays weights out in panels: weight of output o and input i lies at source[o·by_output +
 * i·by_input]. `is_gated`: outputs are gates above values, and a panel holds LANES of each. */
void native_pack(const uint32_t *source, int64_t by_output, int64_t by_input, int64_t outputs,
                 int64_t inputs, int64_t is_gated, int64_t is_short, uint32_t *panel) {
    const int64_t each = is_gated ? outputs / 2 : outputs, width = is_gated ? LANES : PANEL;
    for (int64_t first = 0; first < each; first += width)
        for (int64_t i = 0; i < inputs; i++, panel += is_short ? LANES : PANEL)
            for (int64_t lane = 0; lane < LANES; lane++) {
                const int64_t a = first + lane, b = is_gated ? a : a + LANES;
                const int64_t from = is_gated ? each : 0;
                const uint32_t low = a < each ? source[a * by_output + i * by_input] : 0;
                const uint32_t high = b < each ? source[(from + b) * by_output + i * by_input] : 0;
                if (is_short)
                    panel[lane] = low >> 16 | (high & 0xffff0000u);
                else
                    panel[lane] = low, panel[lane + LANES] = high;
            }
}
