/* Drawing the next tokens, for rows of which nothing limits the choice (model/sampling.py). */
#include <stddef.h>
#include <stdint.h>

#include "vectors.h"

#define BLOCK 64 /* tokens of the vocabulary that are searched as one first */

/* Draws a token a row, as Sampler.draw does where nothing limits the choice: the first whose
 * cumulative weight exceeds uniform · total; greedy rows take the first of the largest logits.
 * `logp` is the token's log-prob at the row's temperature. `memory`: V weights, whole vectors, then
 * V / BLOCK sums, rounded up. */
void native_draw(int64_t count, int64_t vocab, int64_t stride, const float *logits,
                 const float *temperature, const char *greedy, const double *uniform, int64_t *id,
                 float *logp, char *memory) {
    const int64_t whole = vocab / LANES * LANES, blocks = up(vocab, BLOCK) / BLOCK;
    float *weight = (float *)(void *)memory;
    double *upto = (double *)(void *)(memory + sizeof(float) * (size_t)up(vocab, BLOCK));
    for (int64_t m = 0; m < count; m++, logits += stride) {
        const float heat = temperature[m];
        vf tops = all(logits[0] / heat);
        int64_t v = 0, best = 0;
        for (; v < whole; v += LANES) {
            vf x = load(logits + v) / heat;
            store(weight + v, x);
            tops = larger(x, tops);
        }
        float most = tops[0];
        for (int i = 1; i < LANES; i++) most = tops[i] > most ? tops[i] : most;
        for (; v < vocab; v++) {
            weight[v] = logits[v] / heat;
            most = weight[v] > most ? weight[v] : most;
        }
        for (; v < up(vocab, BLOCK); v++) weight[v] = most;
        if (greedy[m])
            while (best < vocab - 1 && weight[best] != most) best++;
        double total = 0;
        for (int64_t b = 0; b < blocks; b++) {
            float *part = weight + b * BLOCK;
            double sums[8] = {0};
            for (int i = 0; i < BLOCK; i += LANES) store(part + i, exp_of(load(part + i) - most));
            for (int64_t i = vocab - b * BLOCK; i < BLOCK; i++) part[i] = 0;
            for (int i = 0; i < BLOCK; i += 8)
                for (int j = 0; j < 8; j++) sums[j] += (double)part[i + j];
            for (int j = 0; j < 8; j++) total += sums[j];
            upto[b] = total;
        }
        if (!greedy[m]) {
            const double point = uniform[m] * total;
            int64_t b = 0;
            while (b < blocks - 1 && !(upto[b] > point)) b++;
            double sum = b ? upto[b - 1] : 0;
            for (v = best = b * BLOCK; v < vocab && v < (b + 1) * BLOCK; v++) {
                sum += (double)weight[v];
                if (weight[v] > 0) best = v; /* the block's last, should rounding pass its end */
                if (sum > point) break;
            }
        }
        id[m] = best;
        logp[m] = logits[best] / heat - most - (float)__builtin_log(total);
    }
}
