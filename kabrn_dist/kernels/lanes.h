/* Vectors of 16 fp32 lanes, and rows of fp32 or bf16 in memory.
 *
 * They are GCC's and Clang's vector types: the compiler splits them where the machine's are shorter, so that no result
 * depends on the machine's width.
 */
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_uvec __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
/* As they lie in memory: at any address. */
typedef vec loose_vec __attribute__((aligned(4)));
typedef half_uvec loose_half_uvec __attribute__((aligned(2)));
typedef bytes loose_bytes __attribute__((aligned(1)));

INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec magnitude(vec x) { return (vec)((uvec)x & 0x7fffffffu); }
INLINE vec pick(ivec which, vec x, vec y) { return (vec)((which & (ivec)x) | (~which & (ivec)y)); }
INLINE vec larger(vec x, vec y) { return pick(x > y, x, y); }
/* To [−1,1]. NaN stays. */
INLINE vec clip(vec x) { return pick(x > 1.0f, all(1.0f), pick(x < -1.0f, all(-1.0f), x)); }
/* The whole number next to |x| < 2²², half to even: fp32 has no room for a fraction beside 1.5·2²³. */
INLINE vec nearest(vec x) { return (x + 12582912.0f) - 12582912.0f; }

INLINE float sum(vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

INLINE float largest(vec x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

INLINE vec from_bf16(half_uvec x) { return (vec)(__builtin_convertvector(x, uvec) << 16); }

INLINE half_uvec to_bf16(vec x) {
    uvec bits = (uvec)x, even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    uvec nan = (uvec)(x != x); /* rounding could carry one out of its exponent */
    return __builtin_convertvector((nan & 0x7fc0u) | (~nan & even), half_uvec);
}

/* Vector `v` of a row, of which `rest` lanes are left; zeros beyond them. */
INLINE vec load(int bf16, const void *from, int64_t v, int64_t rest) {
    if (rest >= LANES) return bf16 ? from_bf16(((const loose_half_uvec *)from)[v]) : ((const loose_vec *)from)[v];
    vec x = {0};
    half_uvec bits = {0};
    if (bf16) memcpy(&bits, (const uint16_t *)from + v * LANES, rest * 2);
    else memcpy(&x, (const float *)from + v * LANES, rest * 4);
    return bf16 ? from_bf16(bits) : x;
}

INLINE void store(int bf16, void *to, int64_t v, int64_t rest, vec x) {
    half_uvec bits = to_bf16(x);
    if (rest >= LANES && bf16) ((loose_half_uvec *)to)[v] = bits;
    else if (rest >= LANES) ((loose_vec *)to)[v] = x;
    else if (bf16) memcpy((uint16_t *)to + v * LANES, &bits, rest * 2);
    else memcpy((float *)to + v * LANES, &x, rest * 4);
}

/* Whole numbers −128…127 as bytes. */
INLINE void store_whole(int8_t *to, int64_t v, int64_t rest, vec x) {
    bytes small = __builtin_convertvector(__builtin_convertvector(x, ivec), bytes);
    if (rest >= LANES) ((loose_bytes *)to)[v] = small;
    else memcpy(to + v * LANES, &small, rest);
}

/* For each vector of a row of width w: `rest` of its lanes are in use. Only the last can be short, and it has its own
 * copy of the step, for the others to keep their vectors in registers, which a call of memcpy would push out. */
#define EACH(step)                                                                                                  \
    do {                                                                                                            \
        int64_t v = 0, rest = LANES;                                                                                \
        for (; v < w / LANES; v++) step;                                                                            \
        rest = w % LANES;                                                                                           \
        if (rest) step;                                                                                             \
    } while (0)
