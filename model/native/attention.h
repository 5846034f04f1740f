/* Attention of a few tokens over the keys and values of their row, one key head after the other.
 *
 * Each sum runs in an order that the sizes of a head fix: over the lanes of a vector two by two, over
 * the columns one by one. So a token's numbers are the same bits however many tokens it comes with.
 */
#ifndef NATIVE_ATTENTION_H
#define NATIVE_ATTENTION_H

#include <stdint.h>

#include "vectors.h"

#define KEYS 4   /* query heads that share one pass over keys and values */
#define TOKENS 8 /* of a prompt for which keys are turned once */

INLINE float dot(const float *a, const float *b, int64_t n) {
    vf sums = {0};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += load(a + i) * load(b + i);
    for (; i < n; i++) rest += a[i] * b[i];
    return sum_of(sums) + rest;
}

/* LANES scores, the last known key in the place of keys beyond `left`; see `score_keys`. */
INLINE vf score_block(int vectors, int64_t left, const float *query, const float *key) {
    vf parts[LANES];
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) {
        const float *k = key + (j < left ? j : left - 1) * vectors * LANES;
        parts[j] = load(query) * load(k);
#pragma GCC unroll 8
        for (int d = 1; d < vectors; d++) parts[j] += load(query + d * LANES) * load(k + d * LANES);
    }
    return sums_of(parts);
}

/* score[g][s] = query[g] · key[s]; `vectors` whole vectors make a head, 0 for any other size. All
 * heads look at some keys before they go on, so that these are read from memory once. */
INLINE void score_keys(int vectors, int heads, const float *query, const float *key, int64_t n,
                       int64_t head_dim, int64_t stride, float *score) {
    int64_t s = 0;
    for (; vectors && s + LANES <= n; s += LANES, key += LANES * head_dim)
#pragma GCC unroll 1
        for (int g = 0; g < heads; g++)
            store(score + g * stride + s, score_block(vectors, LANES, query + g * head_dim, key));
    for (int g = 0; g < heads && s < n; g++) {
        const float *q = query + g * head_dim;
        float *rest = score + g * stride + s;
        if (vectors)
            store(rest, score_block(vectors, n - s, q, key));
        else
            for (int64_t i = 0; i < n; i++) rest[i] = dot(q, key + i * head_dim, head_dim);
    }
}

/* `vectors` whole vectors of LANES keys, turned: vector d holds number d of every key. */
INLINE void turn_keys(int vectors, const float *key, float *turned) {
#pragma GCC unroll 1
    for (int d = 0; d < vectors; d++) {
        vf rows[LANES];
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) rows[j] = load(key + (j * vectors + d) * LANES);
        transpose(rows);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) store(turned + (d * LANES + j) * LANES, rows[j]);
    }
}

/* What `score_block` gives, bit by bit, for `heads` heads and turned keys: products of the same
 * lane are added, and then lanes as `sums_of` adds them, two by two. */
INLINE void score_turned(int vectors, int heads, const float *query, const float *turned,
                         int64_t stride, float *score) {
    vf sums[5][KEYS];
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) {
#pragma GCC unroll 4
        for (int g = 0; g < heads; g++) {
            const float *q = query + g * vectors * LANES + j;
            vf part = all(q[0]) * load(turned + j * LANES);
#pragma GCC unroll 8
            for (int d = 1; d < vectors; d++)
                part += all(q[d * LANES]) * load(turned + (d * LANES + j) * LANES);
            int level = 0;
#pragma GCC unroll 4
            for (; j >> level & 1; level++) part = sums[level][g] + part;
            sums[level][g] = part;
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < heads; g++) store(score + g * stride, sums[LANES > 8 ? 4 : LANES > 4 ? 3 : 2][g]);
}

/* scores → e^(score − largest), zeros up to the next whole vector; returns 1 / their sum. */
static float soften(float *score, int64_t n) {
    const int64_t padded = up(n, LANES);
    const vi real = (vi)EACH(SELF, 0) < (int32_t)(n - padded + LANES); /* of the last vector */
    float *last = score + padded - LANES;
    store(last, pick(real, load(last), all(-1e30f)));
    vf most = load(score), total = {0};
    for (int64_t s = LANES; s < padded; s += LANES) most = larger(load(score + s), most);
    float top = most[0];
    for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    for (int64_t s = 0; s < padded; s += LANES) {
        vf e = exp_of(load(score + s) - top);
        if (score + s == last) e = pick(real, e, (vf){0});
        total += e;
        store(score + s, e);
    }
    return 1.0f / sum_of(total);
}

/* out = scale · Σ_s weight[g][s] · value[s] for `heads` heads, `vectors` whole vectors of a value. */
INLINE void blend(int heads, int vectors, int64_t n, int64_t head_dim, int64_t stride,
                  const float *weight, const float *value, float *out, const float *scale) {
    vf sums[KEYS][2];
#pragma GCC unroll 4
    for (int g = 0; g < heads; g++) sums[g][0] = sums[g][1] = (vf){0};
    for (int64_t s = 0; s < n; s++, value += head_dim) {
        vf a = load(value), b = vectors > 1 ? load(value + LANES) : a;
#pragma GCC unroll 4
        for (int g = 0; g < heads; g++) {
            vf factor = all(weight[g * stride + s]);
            sums[g][0] += factor * a;
            if (vectors > 1) sums[g][1] += factor * b;
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < heads; g++) {
        store(out + g * head_dim, sums[g][0] * scale[g]);
        if (vectors > 1) store(out + g * head_dim + LANES, sums[g][1] * scale[g]);
    }
}

/* Tokens next to each other in one row: token t sees n + t columns. */
struct run {
    int64_t tokens, n, query_stride, out_stride;
    const float *query;
    float *score, *out;
};

/* Scores of a run's tokens for `heads` heads, at r->score[t][g]; keys that all of them see are turned
 * once for all. */
INLINE void score_run(int vectors, int heads, const struct run *r, int64_t at, const float *key,
                      int64_t head_dim, int64_t stride) {
    float turned[(vectors > 1 ? vectors : 1) * LANES * LANES];
    int64_t s = 0;
    for (; vectors > 1 && r->tokens > 1 && s + LANES <= r->n; s += LANES) {
        turn_keys(vectors, key + s * head_dim, turned);
        for (int64_t t = 0; t < r->tokens; t++)
            score_turned(vectors, heads, r->query + t * r->query_stride + at, turned, stride,
                         r->score + t * heads * stride + s);
    }
    for (int64_t t = 0; t < r->tokens; t++)
        score_keys(vectors, heads, r->query + t * r->query_stride + at, key + s * head_dim,
                   r->n + t - s, head_dim, stride, r->score + t * heads * stride + s);
}

/* Attention of up to KEYS query heads, from `at` on, that share a key head. */
INLINE void attend_heads(int heads, const struct run *r, int64_t at, const float *key,
                         const float *value, int64_t head_dim) {
    const int64_t stride = up(r->n + r->tokens - 1, LANES);
    switch (head_dim % LANES ? 0 : head_dim / LANES) {
    case 1: score_run(1, heads, r, at, key, head_dim, stride); break;
    case 2: score_run(2, heads, r, at, key, head_dim, stride); break;
    case 4: score_run(4, heads, r, at, key, head_dim, stride); break;
    case 8: score_run(8, heads, r, at, key, head_dim, stride); break;
    default: score_run(0, heads, r, at, key, head_dim, stride);
    }
    for (int64_t t = 0; t < r->tokens; t++) {
        const int64_t n = r->n + t;
        float *score = r->score + t * heads * stride, *out = r->out + t * r->out_stride + at;
        float scale[KEYS];
        for (int g = 0; g < heads; g++) scale[g] = soften(score + g * stride, n);
        int64_t d = 0;
        for (; d + 2 * LANES <= head_dim; d += 2 * LANES)
            blend(heads, 2, n, head_dim, stride, score, value + d, out + d, scale);
        for (; d + LANES <= head_dim; d += LANES)
            blend(heads, 1, n, head_dim, stride, score, value + d, out + d, scale);
        for (; d < head_dim; d++)
            for (int g = 0; g < heads; g++) {
                float sum = 0;
                for (int64_t i = 0; i < n; i++) sum += score[g * stride + i] * value[i * head_dim + d];
                out[g * head_dim + d] = sum * scale[g];
            }
    }
}

/* Attention of a run over keys and values of `kv_heads` heads, `share` query heads each. */
static void attend(int64_t kv_heads, int64_t share, int64_t D, const struct run *r,
                   const float *keys, const float *values, int64_t head_stride) {
    for (int64_t k = 0; k < kv_heads; k++)
        for (int64_t g = 0; g < share; g += KEYS) {
            const int64_t at = (k * share + g) * D, head = k * head_stride;
            const float *key = keys + head, *value = values + head;
            switch (share - g) {
            case 1: attend_heads(1, r, at, key, value, D); break;
            case 2: attend_heads(2, r, at, key, value, D); break;
            case 3: attend_heads(3, r, at, key, value, D); break;
            default: attend_heads(KEYS, r, at, key, value, D);
            }
        }
}

#endif
