/* Vectors of as many numbers as a register of this processor holds: the types of GCC and Clang. */
#ifndef NATIVE_VECTORS_H
#define NATIVE_VECTORS_H

#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef float vf_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
INLINE vf load(const float *p) { return *(const vf_any *)p; }
INLINE void store(float *p, vf v) { *(vf_any *)p = v; }
INLINE vf all(float x) { return x - (vf){0}; }
INLINE vf pick(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf larger(vf a, vf b) { return pick(a > b, a, b); }

/* Lane i: i, or what `merge` needs of two vectors at distance d. */
#if LANES == 16
#define EACH(f, d) {f(0, d), f(1, d), f(2, d), f(3, d), f(4, d), f(5, d), f(6, d), f(7, d), \
    f(8, d), f(9, d), f(10, d), f(11, d), f(12, d), f(13, d), f(14, d), f(15, d)}
#elif LANES == 8
#define EACH(f, d) {f(0, d), f(1, d), f(2, d), f(3, d), f(4, d), f(5, d), f(6, d), f(7, d)}
#else
#define EACH(f, d) {f(0, d), f(1, d), f(2, d), f(3, d)}
#endif
#define SELF(i, d) (i)
#define LEFT(i, d) ((i) & (d) ? LANES + (i) - (d) : (i))
#define RIGHT(i, d) ((i) & (d) ? LANES + (i) : (i) + (d))

#if defined(__clang__)
INLINE vf shuffle(vf a, vf b, vi from) {
    vf out;
    for (int i = 0; i < LANES; i++) out[i] = from[i] < LANES ? a[from[i]] : b[from[i] - LANES];
    return out;
}
#else
#define shuffle(a, b, from) __builtin_shuffle(a, b, from)
#endif
/* Adds lanes at distance d: those of a where bit d of the lane is 0, those of b where it is 1. */
#define MERGE(d, a, b) (shuffle(a, b, ((vi)EACH(LEFT, d))) + shuffle(a, b, ((vi)EACH(RIGHT, d))))

/* Rows become columns: lane j of v[i] and lane i of v[j] change places. */
INLINE void transpose(vf *v) {
    _Pragma("GCC unroll 4") for (int d = 1; d < LANES; d *= 2)
        _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) if (!(i & d)) {
            const vi all_lanes = (vi)EACH(SELF, 0), odd = (all_lanes & d) != 0;
            const vi left = (vi)((odd & (LANES + all_lanes - d)) | (~odd & all_lanes));
            const vi right = (vi)((odd & (LANES + all_lanes)) | (~odd & (all_lanes + d)));
            const vf a = v[i], b = v[i + d];
            v[i] = shuffle(a, b, left);
            v[i + d] = shuffle(a, b, right);
        }
}

/* Lane i: the sum over all lanes of v[i]. */
INLINE vf sums_of(vf *v) {
#define STAGE(d) \
    _Pragma("GCC unroll 8") for (int j = 0; j < LANES / 2 / d; j++) v[j] = MERGE(d, v[2 * j], v[2 * j + 1]);
    STAGE(1)
    STAGE(2)
#if LANES > 4
    STAGE(4)
#endif
#if LANES > 8
    STAGE(8)
#endif
#undef STAGE
    return v[0];
}

INLINE float sum_of(vf v) {
    v = MERGE(1, v, v);
    v = MERGE(2, v, v);
#if LANES > 4
    v = MERGE(4, v, v);
#endif
#if LANES > 8
    v = MERGE(8, v, v);
#endif
    return v[0];
}

/* exp by 2^n · e^r with |r| ≤ ln 2 / 2; relative error about 1e-7 (Cephes' polynomial). */
INLINE vf exp_of(vf x) {
    const vf magic = all(12582912.0f);
    x = pick(x > 88.0f, all(88.0f), x);
    x = pick(x < -87.0f, all(-87.0f), x);
    vf n = x * 1.44269504f + magic;
    vi power = ((vi)n - (vi)magic + 127) << 23;
    n -= magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (vf)power;
}

#endif
