/* Guesses at the next tokens by one draft module that goes on from its own output
 * (model/speculative.py, model/native/draft.py). */
#include <string.h>

#include "model.h"

void native_draw(int64_t count, int64_t vocab, int64_t stride, const float *logits,
                 const float *temperature, const char *greedy, const double *uniform, int64_t *id,
                 float *logp, char *memory);

/* k guesses for each of `batch` rows. `t` holds the columns since the last call, whose hidden
 * states are known; `last` (batch) says which of them is each row's newest. `uniform` and `id` are
 * (k, batch), `logits` (k, batch) rows of V padded to whole panels. `hidden` (2, batch, H),
 * `places` (4, batch) and `logp` (batch) are work space, as is `memory`: what native_scratch says of
 * the larger count, and what native_draw needs.
 * Returns what native_run does. */
int64_t native_propose(const struct model *m, const struct tokens *t, int64_t rows, int64_t columns,
                       int64_t batch, int64_t k, const int64_t *last, const float *temperature,
                       const char *greedy, const double *uniform, int64_t *id, float *logits,
                       float *hidden, int64_t *places, float *logp, char *memory) {
    const int64_t H = m->hidden, stride = up(m->vocab, PANEL);
    int64_t *row = places, *column = row + batch, *first = column + batch;
    int64_t *position = first + batch;
    float *normed = hidden + batch * H;
    if (native_run(m, t, rows, columns, memory)) return 1;
    for (int64_t b = 0; b < batch; b++) {
        memcpy(hidden + b * H, t->hidden + last[b] * H, sizeof(float) * (size_t)H);
        row[b] = t->row[last[b]], column[b] = t->column[last[b]], first[b] = t->first[last[b]];
        position[b] = t->position[last[b]];
    }
    struct tokens own = *t;
    own.count = batch, own.row = row, own.column = column;
    own.first = first, own.position = position;
    own.given = own.hidden = hidden;
    for (int64_t d = 0; d < k; d++) {
        if (d) {
            own.ids = id + (d - 1) * batch;
            for (int64_t b = 0; b < batch; b++) column[b]++, position[b]++;
            if (native_run(m, &own, rows, columns, memory)) return 1;
        }
        for (int64_t b = 0; b < batch; b++)
            native_norm(hidden + b * H, m->norm, H, (float)m->eps, normed + b * H);
        float *out = logits + d * batch * stride;
        native_head(m, batch, normed, out, memory);
        native_draw(batch, m->vocab, stride, out, temperature, greedy, uniform + d * batch,
                    id + d * batch, logp, memory);
    }
    return 0;
}
