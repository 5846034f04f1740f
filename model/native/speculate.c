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

/* native_propose, and the model's own pass over each row's newest id and its guesses: position i of
 * row b comes to column[b] + i of the model's cache. `out` is its pass with everything but the
 * tokens themselves, of `rows` rows and `columns` columns; `places` has room for
 * (4, batch, k + 1) more numbers, and `memory` for the larger of both calls. */
int64_t native_feed(const struct model *m, const struct tokens *t, int64_t draft_rows,
                    int64_t draft_columns, const struct model *main, const struct tokens *out,
                    int64_t rows, int64_t columns, int64_t batch, int64_t k, const int64_t *last,
                    const int64_t *column, const float *temperature, const char *greedy,
                    const double *uniform, int64_t *id, float *logits, float *hidden,
                    int64_t *places, float *logp, char *memory) {
    const int64_t count = batch * (k + 1);
    int64_t *ids = places + 4 * batch, *row = ids + count, *at = row + count, *first = at + count;
    if (k && native_propose(m, t, draft_rows, draft_columns, batch, k, last, temperature, greedy,
                            uniform, id, logits, hidden, places, logp, memory))
        return 1;
    for (int64_t b = 0, n = 0; b < batch; b++)
        for (int64_t i = 0; i <= k; i++, n++) {
            ids[n] = i ? id[(i - 1) * batch + b] : t->ids[last[b]];
            row[n] = b, at[n] = column[b] + i, first[n] = 0;
        }
    struct tokens own = *out;
    own.count = count, own.ids = ids, own.row = row, own.column = own.position = at;
    own.first = first;
    return native_run(main, &own, rows, columns, memory);
}
