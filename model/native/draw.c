/* Drawing the next tokens, for rows of which nothing limits the choice (model/sampling.py), and
 * judging guesses at them (model/speculative.py). */
#include <stddef.h>
#include <stdint.h>

#include "model.h"

#define BLOCK 64 /* tokens of the vocabulary that are searched as one first */

static double sum_block(const float *part) {
    double sums[8] = {0}, total = 0;
    for (int i = 0; i < BLOCK; i += 8)
        for (int j = 0; j < 8; j++) sums[j] += (double)part[i + j];
    for (int j = 0; j < 8; j++) total += sums[j];
    return total;
}

double soften_row(const float *logits, float heat, int64_t vocab, float *weight, double *upto,
                  float *most) {
    const int64_t whole = vocab / LANES * LANES, blocks = up(vocab, BLOCK) / BLOCK;
    vf tops = all(logits[0] / heat);
    int64_t v = 0;
    for (; v < whole; v += LANES) {
        vf x = load(logits + v) / heat;
        store(weight + v, x);
        tops = larger(x, tops);
    }
    float top = tops[0];
    for (int i = 1; i < LANES; i++) top = tops[i] > top ? tops[i] : top;
    for (; v < vocab; v++) {
        weight[v] = logits[v] / heat;
        top = weight[v] > top ? weight[v] : top;
    }
    for (; v < up(vocab, BLOCK); v++) weight[v] = top;
    double total = 0;
    for (int64_t b = 0; b < blocks; b++) {
        float *part = weight + b * BLOCK;
        for (int i = 0; i < BLOCK; i += LANES) store(part + i, exp_of(load(part + i) - top));
        for (int64_t i = vocab - b * BLOCK; i < BLOCK; i++) part[i] = 0;
        total += sum_block(part);
        upto[b] = total;
    }
    *most = top;
    return total;
}

/* The first token whose cumulative weight exceeds `point`. */
int64_t find_point(const float *weight, const double *upto, int64_t vocab, double point) {
    const int64_t blocks = up(vocab, BLOCK) / BLOCK;
    int64_t b = 0, best;
    while (b < blocks - 1 && !(upto[b] > point)) b++;
    double sum = b ? upto[b - 1] : 0;
    best = b * BLOCK;
    for (int64_t v = best; v < vocab && v < (b + 1) * BLOCK; v++) {
        sum += (double)weight[v];
        if (weight[v] > 0) best = v; /* the block's last, should rounding pass its end */
        if (sum > point) break;
    }
    return best;
}

/* The first of the largest logits, of which `most` is the largest divided by the temperature. */
static int64_t likeliest(const float *logits, float heat, int64_t vocab, float most) {
    int64_t best = 0;
    while (best < vocab - 1 && logits[best] / heat != most) best++;
    return best;
}

/* Draws a token a row, as Sampler.draw does where nothing limits the choice: the first whose
 * cumulative weight exceeds uniform · total; greedy rows take the first of the largest logits.
 * `logp` is the token's log-prob at the row's temperature. `memory`: V weights, whole blocks, then
 * V / BLOCK sums, rounded up. */
void native_draw(int64_t count, int64_t vocab, int64_t stride, const float *logits,
                 const float *temperature, const char *greedy, const double *uniform, int64_t *id,
                 float *logp, char *memory) {
    float *weight = (float *)(void *)memory;
    double *upto = (double *)(void *)(memory + sizeof(float) * (size_t)up(vocab, BLOCK));
    for (int64_t m = 0; m < count; m++, logits += stride) {
        float most;
        const double total = soften_row(logits, temperature[m], vocab, weight, upto, &most);
        if (greedy[m])
            id[m] = likeliest(logits, temperature[m], vocab, most);
        else
            id[m] = find_point(weight, upto, vocab, uniform[m] * total);
        logp[m] = logits[id[m]] / temperature[m] - most - (float)__builtin_log(total);
    }
}

/* Judges k guesses a row by rejection, as `accept` of model/speculative.py. `policy` (B, k + 1) and
 * `draft` (k, B) rows of logits, so far apart; `guess` and `chance` (B, k), `final` (B, k + 1).
 * `count` (B) guesses stand and `next` (B) follows them; `logp` (B, k + 1). `memory`: twice that of
 * native_draw. */
void native_judge(int64_t batch, int64_t k, int64_t vocab, int64_t policy_stride,
                  int64_t draft_stride, const float *policy, const float *draft, const float *temperature, const char *greedy,
                  const int64_t *guess, const double *chance, const double *final, int64_t *count,
                  int64_t *next, float *logp, char *memory) {
    const int64_t padded = up(vocab, BLOCK), blocks = padded / BLOCK;
    double *upto = (double *)(void *)memory, *rest_upto = upto + blocks;
    float *p = (float *)(void *)(rest_upto + blocks), *q = p + padded;
    for (int64_t b = 0; b < batch; b++) {
        const float heat = temperature[b];
        int64_t n = 0;
        for (;; n++) {
            const float *row = policy + (b * (k + 1) + n) * policy_stride;
            const int64_t g = n < k ? guess[b * k + n] : 0;
            float most, draft_most;
            double total = soften_row(row, heat, vocab, p, upto, &most), rest = 0;
            const float base = most + (float)__builtin_log(total);
            if (n < k && greedy[b]) {
                if (g == likeliest(row, heat, vocab, most)) {
                    logp[b * (k + 1) + n] = row[g] / heat - base;
                    continue;
                }
            } else if (n < k) {
                const float *from = draft + (n * batch + b) * draft_stride;
                const double drafts = soften_row(from, heat, vocab, q, rest_upto, &draft_most);
                if (chance[b * k + n] * ((double)q[g] / drafts) < (double)p[g] / total) {
                    logp[b * (k + 1) + n] = row[g] / heat - base;
                    continue;
                }
                const float by_p = (float)(1 / total), by_q = (float)(1 / drafts);
                for (int64_t i = 0; i < blocks; i++) {
                    for (int64_t v = i * BLOCK; v < (i + 1) * BLOCK; v += LANES) {
                        vf more = load(p + v) * by_p - load(q + v) * by_q;
                        store(q + v, larger(more, (vf){0}));
                    }
                    rest += sum_block(q + i * BLOCK);
                    rest_upto[i] = rest;
                }
            }
            int64_t id;
            const double point = final[b * (k + 1) + n];
            if (greedy[b])
                id = likeliest(row, heat, vocab, most);
            else if (rest > 0)
                id = find_point(q, rest_upto, vocab, point * rest);
            else
                id = find_point(p, upto, vocab, point * total);
            count[b] = n, next[b] = id;
            logp[b * (k + 1) + n] = row[id] / heat - base;
            break;
        }
    }
}
