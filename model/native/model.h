/* A model's weights and a call's tokens, as Python lays them out (model/native/step.py). */
#ifndef NATIVE_MODEL_H
#define NATIVE_MODEL_H

#include <stdint.h>

#include "vectors.h"

#define PANEL (2 * LANES)

/* `stride` is the distance in bytes from one expert's panels to the next one's. */
struct matrix {
    const char *panels;
    int64_t inputs, outputs, is_short, stride;
};

struct layer {
    struct matrix qkv, o, gate, w13, w2;
    const float *norm, *q_norm, *k_norm, *moe_norm, *bias;
};

struct model {
    int64_t layers, hidden, heads, kv_heads, head_dim, rotary, experts, top_k, width, vocab;
    int64_t positions;
    double eps;
    const float *embed, *turn, *norm; /* turn: cos, then sin, (positions, R/2) each */
    struct matrix head;
    const struct layer *layer;
    struct matrix eh; /* of a draft module, with its norms; no `enorm` in a model */
    const float *enorm, *hnorm;
};

/* What to run: M tokens; token m is written to `column[m]` of row `row[m]` of the cache and sees
 * columns first[m] … column[m]. Keys and values of layer l lie at keys[l], values[l]; strides in
 * numbers. `hidden` (M, H) receives the normed hidden states and, where it is given, `logits`
 * (M, V padded to whole panels) what the head makes of them. A draft module joins `given` (M, H),
 * the hidden states that it goes on from, with the tokens' embeddings; its own in `hidden` are not
 * normed. */
struct tokens {
    int64_t count, row_stride, head_stride;
    const int64_t *ids, *row, *column, *first, *position;
    float *const *keys, *const *values;
    float *hidden, *logits;
    const float *given;
};

int64_t native_run(const struct model *m, const struct tokens *t, int64_t rows, int64_t columns,
                   char *memory);
void native_head(const struct model *m, int64_t count, const float *hidden, float *logits,
                 char *memory);
void native_norm(const float *x, const float *weight, int64_t n, float eps, float *out);

/* draw.c: e^(logit / heat − most) of a row in `weight`, with zeros up to a whole block and the sum
 * up to each block in `upto`; returns the whole sum and what was the most. */
double soften_row(const float *logits, float heat, int64_t vocab, float *weight, double *upto,
                  float *most);
int64_t find_point(const float *weight, const double *upto, int64_t vocab, double point);

#endif
