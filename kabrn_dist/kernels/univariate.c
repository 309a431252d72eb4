/* One learned function per group of channels, RMSNorm and the absmax int8 quantizer in one pass over the rows.
 *
 * Rows [N,D] come sorted by expert; a group is D/G neighbouring channels. A row is worked on in fp32 in a buffer in
 * which each group is padded with zeros to whole vectors. Coefficients' gradients are summed within blocks of rows, in
 * one order, and then block by block: neither threads nor atomics change them.
 */
#include <math.h>
#include <omp.h>

#include "lanes.h"

#define MOST 10 /* coefficients of one function */
#define EPSILON 1e-6f

enum { RATIONAL, CHEBYSHEV, RELU2, IDENTITY }; /* IDENTITY: RMSNorm and quantizer alone */

/* Mirrored by kabrn_dist/kernels/functions.py. */
typedef struct {
    int64_t width, groups, experts, block, blocks, threads;
    const int64_t *counts;    /* [E] rows of each expert */
    const float *coefficients; /* [E,G,C] */
    const float *factor;      /* [N] the functions see x·factor; NULL: x itself */
    float center, reach;      /* CHEBYSHEV: its range is center ± reach */
    int32_t quantized;
} args;

INLINE int terms_of(int kind) { return kind == RATIONAL ? 10 : kind == CHEBYSHEV ? 4 : 0; }
/* One group of one row, with zeros for padding. */
INLINE void load_group(int bf16, const void *from, int64_t n, vec factor, vec *to) {
    for (int64_t v = 0; v < padded(n) / LANES; v++) to[v] = factor * load(bf16, from, v, n - v * LANES);
}

/* P(z) / Q, Q = 1 + |A(z)|: a₀…a₅ then b₁…b₄. Slopes also need sign(A) / Q, where 0 has no sign. */
INLINE vec rational(const vec *c, vec z, vec *signed_share) {
    vec p = ((((c[5] * z + c[4]) * z + c[3]) * z + c[2]) * z + c[1]) * z + c[0];
    vec inner = (((c[9] * z + c[8]) * z + c[7]) * z + c[6]) * z;
    vec share = 1.0f / (1.0f + magnitude(inner));
    if (signed_share)
        *signed_share = (vec)(((uvec)share | ((uvec)inner & 0x80000000u)) & (uvec)(inner != 0.0f));
    return p * share;
}

/* Adds to each coefficient's gradient; returns z's. */
INLINE vec rational_slope(const vec *c, vec z, vec y, vec signed_share, vec grad, vec *sums) {
    vec grad_p = grad * pick(signed_share == 0.0f, all(1.0f), magnitude(signed_share));
    vec grad_inner = -grad * y * signed_share;
    vec dp = (((5.0f * c[5] * z + 4.0f * c[4]) * z + 3.0f * c[3]) * z + 2.0f * c[2]) * z + c[1];
    vec dinner = ((4.0f * c[9] * z + 3.0f * c[8]) * z + 2.0f * c[7]) * z + c[6];
    vec power = grad_p;
    sums[0] += power;
    for (int i = 1; i < 6; i++) sums[i] += power *= z;
    power = grad_inner;
    for (int i = 6; i < 10; i++) sums[i] += power *= z;
    return grad_p * dp + grad_inner * dinner;
}

/* u within [−1,1], and what of z lies outside. */
INLINE vec inside(vec z, vec *outside) {
    vec u = clip(z);
    *outside = z - u;
    return u;
}

/* Σ cₙTₙ(u) + slope(u)·outside: beyond the range a straight line. */
INLINE vec chebyshev(const vec *c, vec z) {
    vec outside, u = inside(z, &outside);
    vec t2 = 2.0f * u * u - 1.0f, t3 = 2.0f * u * t2 - u;
    vec slope = c[1] + 4.0f * c[2] * u + c[3] * (6.0f * t2 + 3.0f);
    return c[0] + c[1] * u + c[2] * t2 + c[3] * t3 + slope * outside;
}

INLINE vec chebyshev_slope(const vec *c, vec z, vec grad, vec *sums) {
    vec outside, u = inside(z, &outside);
    vec t2 = 2.0f * u * u - 1.0f, t3 = 2.0f * u * t2 - u;
    vec dt2 = 4.0f * u, dt3 = 6.0f * t2 + 3.0f;
    sums[0] += grad;
    sums[1] += grad * z;
    sums[2] += grad * (t2 + dt2 * outside);
    sums[3] += grad * (t3 + dt3 * outside);
    return grad * (c[1] + c[2] * dt2 + c[3] * dt3);
}

/* y = φ(z) over one row, and zeros where `keep` marks padding; `share` (or NULL): see `rational`. */
INLINE void apply(int kind, const args *j, const float *coefficients, const ivec *keep, const vec *z, vec *y,
                  vec *share) {
    int terms = terms_of(kind);
    int64_t vectors = padded(j->width / j->groups) / LANES;
    for (int64_t g = 0; g < j->groups; g++, z += vectors, y += vectors) {
        vec c[MOST];
        for (int i = 0; i < terms; i++) c[i] = all(coefficients[g * terms + i]);
        for (int64_t v = 0; v < vectors; v++) {
            vec out = kind == IDENTITY   ? z[v]
                      : kind == RELU2    ? larger(z[v], all(0)) * z[v]
                      : kind == RATIONAL ? rational(c, z[v], share ? share + v : 0)
                                         : chebyshev(c, z[v]);
            y[v] = (vec)((ivec)out & keep[v]);
        }
        if (share) share += vectors;
    }
}

INLINE void mask(int64_t n, ivec *keep) {
    for (int64_t i = 0; i < padded(n); i++) ((int32_t *)keep)[i] = i < n ? -1 : 0;
}

typedef struct { int64_t expert, first, last; } span;

/* Rows of block `b`, blocks being counted expert by expert. */
static span find(const args *j, int64_t b) {
    int64_t start = 0;
    for (int64_t e = 0; e < j->experts; e++) {
        int64_t n = j->counts[e], blocks = (n + j->block - 1) / j->block;
        if (b < blocks) {
            int64_t end = (b + 1) * j->block;
            return (span){e, start + b * j->block, start + (end < n ? end : n)};
        }
        b -= blocks;
        start += n;
    }
    return (span){0, 0, 0};
}

/* What the function sees, padded; returns z / x. */
INLINE float load_row(int kind, int bf16, const args *j, const void *x, int64_t row, vec *z) {
    int64_t w = j->width / j->groups, vectors = padded(w) / LANES, size = bf16 ? 2 : 4;
    float factor = j->factor ? j->factor[row] : 1.0f;
    if (kind == CHEBYSHEV) factor = factor / j->reach;
    for (int64_t g = 0; g < j->groups; g++)
        load_group(bf16, (const char *)x + (row * j->width + g * w) * size, w, all(factor), z + g * vectors);
    if (kind == CHEBYSHEV && j->center != 0.0f)
        for (int64_t v = 0; v < vectors * j->groups; v++) z[v] -= j->center / j->reach;
    if (kind != RELU2) return factor;
    /* Normalized before it is squared too: else the 1e-6 in the norm of squares would change small rows. */
    vec squares = {0};
    for (int64_t v = 0; v < vectors * j->groups; v++) squares += z[v] * z[v];
    float norm = 1.0f / sqrtf(sum(squares) / (float)j->width + EPSILON);
    for (int64_t v = 0; v < vectors * j->groups; v++) z[v] *= norm;
    return factor * norm;
}

INLINE void forward_row(int kind, int bf16, const args *j, int64_t expert, int64_t row, const void *x, vec *scratch,
                        void *out, float *scale, float *rms, int8_t *int8_codes) {
    int64_t w = j->width / j->groups, vectors = padded(w) / LANES, n = vectors * j->groups, size = bf16 ? 2 : 4;
    ivec *keep = (ivec *)scratch;
    vec *z = scratch + vectors, *y = z + n;
    load_row(kind, bf16, j, x, row, z);
    apply(kind, j, j->coefficients + expert * j->groups * terms_of(kind), keep, z, y, 0);
    vec squares = {0}, most = {0};
    for (int64_t v = 0; v < n; v++) {
        squares += y[v] * y[v];
        most = larger(magnitude(y[v]), most);
    }
    float norm = 1.0f / sqrtf(sum(squares) / (float)j->width + EPSILON), peak = norm * largest(most);
    rms[row] = norm;
    scale[row] = j->quantized ? 127.0f / (peak < 1e-5f ? 1e-5f : peak) : 1.0f;
    float times = norm * scale[row];
    char *to = (char *)out + row * j->width * size;
    for (int64_t g = 0; g < j->groups; g++, to += w * size, y += vectors)
        for (int64_t v = 0; v < vectors; v++) {
            vec value = y[v] * times;
            int64_t rest = w - v * LANES;
            store(bf16, to, v, rest, j->quantized ? nearest(value) : value);
            if (j->quantized) store_whole(int8_codes + row * j->width + g * w, v, rest, nearest(value));
        }
}

INLINE void backward_row(int kind, int bf16, const args *j, int64_t expert, int64_t row, const void *x, const void *grad,
                         float scale, float norm, vec *scratch, vec *sums, void *out) {
    int terms = terms_of(kind);
    int64_t w = j->width / j->groups, vectors = padded(w) / LANES, n = vectors * j->groups, size = bf16 ? 2 : 4;
    ivec *keep = (ivec *)scratch;
    vec *z = scratch + vectors, *y = z + n, *d = y + n, *share = d + n;
    const float *coefficients = j->coefficients + expert * j->groups * terms;
    float grad_x = load_row(kind, bf16, j, x, row, z);
    apply(kind, j, coefficients, keep, z, y, kind == RATIONAL ? share : 0);
    for (int64_t g = 0; g < j->groups; g++)
        load_group(bf16, (const char *)grad + (row * j->width + g * w) * size, w, all(1.0f), d + g * vectors);
    vec along = {0};
    for (int64_t v = 0; v < n; v++) along += d[v] * y[v];
    /* y·norm has a fixed length: its gradient keeps nothing along y. */
    float times = norm * scale, remove = norm * norm * sum(along) / (float)j->width;
    /* RELU2's z has a fixed length too. Σ z·φ'(z)·grad_y, which a norm takes off, is 2·Σ y·grad_y, and that is what the
     * EPSILON of the norm of y leaves of Σ y·d. */
    float along_z = 2.0f * times * sum(along) * norm * norm * EPSILON / (float)j->width;
    char *to = (char *)out + row * j->width * size;
    for (int64_t g = 0; g < j->groups; g++, to += w * size, z += vectors, y += vectors, d += vectors, share += vectors) {
        vec c[MOST], s[MOST];
        for (int i = 0; i < terms; i++) c[i] = all(coefficients[g * terms + i]);
        for (int i = 0; i < terms; i++) s[i] = sums[g * terms + i];
        for (int64_t v = 0; v < vectors; v++) {
            vec grad_y = times * (d[v] - remove * y[v]);
            vec grad_z = kind == IDENTITY   ? grad_y
                        : kind == RELU2    ? 2.0f * larger(z[v], all(0)) * grad_y - along_z * z[v]
                        : kind == RATIONAL ? rational_slope(c, z[v], y[v], share[v], grad_y, s)
                                           : chebyshev_slope(c, z[v], grad_y, s);
            store(bf16, to, v, w - v * LANES, grad_z * grad_x);
        }
        for (int i = 0; i < terms; i++) sums[g * terms + i] = s[i];
    }
}

INLINE void forward_block(int kind, int bf16, const args *j, int64_t b, const void *x, vec *scratch, void *out,
                          float *scale, float *rms, int8_t *int8_codes) {
    span rows = find(j, b);
    mask(j->width / j->groups, (ivec *)scratch);
    for (int64_t row = rows.first; row < rows.last; row++)
        forward_row(kind, bf16, j, rows.expert, row, x, scratch, out, scale, rms, int8_codes);
}

INLINE void backward_block(int kind, int bf16, const args *j, int64_t b, const void *x, const void *grad,
                           const float *scale, const float *rms, vec *scratch, void *out, float *partial) {
    int64_t n = j->groups * terms_of(kind), vectors = padded(j->width / j->groups) / LANES;
    span rows = find(j, b);
    vec *sums = scratch + vectors * (1 + 4 * j->groups);
    memset(sums, 0, n * sizeof(vec));
    mask(j->width / j->groups, (ivec *)scratch);
    for (int64_t row = rows.first; row < rows.last; row++)
        backward_row(kind, bf16, j, rows.expert, row, x, grad, scale[row], rms[row], scratch, sums, out);
    for (int64_t i = 0; i < n; i++) partial[b * n + i] = sum(sums[i]);
}

/* Blocks of each expert in order, whichever threads summed them. */
static void add_blocks(const args *j, int terms, const float *partial, float *grad_coefficients) {
    int64_t n = j->groups * terms;
    for (int64_t e = 0; e < j->experts; e++, grad_coefficients += n) {
        int64_t blocks = (j->counts[e] + j->block - 1) / j->block;
        memset(grad_coefficients, 0, n * sizeof(float));
        for (int64_t b = 0; b < blocks; b++, partial += n)
            for (int64_t i = 0; i < n; i++) grad_coefficients[i] += partial[i];
    }
}

/* A thread's buffer: a mask, four rows, and sums of gradients. */
int64_t scratch_floats(const args *j) {
    return padded(j->width / j->groups) * (1 + 4 * j->groups) + j->groups * MOST * LANES;
}

INLINE vec *own(const args *j, float *scratch) {
    return (vec *)(scratch + omp_get_thread_num() * scratch_floats(j));
}

/* Arguments of both: x [N,D], scale [N] and rms [N], which forward writes and backward reads; int8_codes: codes as bytes. */
#define FORWARD(name, kind, bf16)                                                                                   \
    void name##_forward(const args *j, const void *x, float *scratch, void *out, float *scale, float *rms,           \
                        int8_t *int8_codes) {                                                                             \
        _Pragma("omp parallel for num_threads((int)j->threads) schedule(static)")                                   \
        for (int64_t b = 0; b < j->blocks; b++)                                                                     \
            forward_block(kind, bf16, j, b, x, own(j, scratch), out, scale, rms, int8_codes);                             \
    }
#define BACKWARD(name, kind, bf16)                                                                                  \
    void name##_backward(const args *j, const void *x, const void *grad, const float *scale, const float *rms,       \
                         float *scratch, float *partial, void *grad_x, float *grad_coefficients) {                    \
        _Pragma("omp parallel for num_threads((int)j->threads) schedule(static)")                                   \
        for (int64_t b = 0; b < j->blocks; b++)                                                                     \
            backward_block(kind, bf16, j, b, x, grad, scale, rms, own(j, scratch), grad_x, partial);                 \
        add_blocks(j, terms_of(kind), partial, grad_coefficients);                                                   \
    }
#define FUNCTION(name, kind, bf16) FORWARD(name, kind, bf16) BACKWARD(name, kind, bf16)

FUNCTION(rational_fp32, RATIONAL, 0)
FUNCTION(rational_bf16, RATIONAL, 1)
FUNCTION(chebyshev_fp32, CHEBYSHEV, 0)
FUNCTION(chebyshev_bf16, CHEBYSHEV, 1)
FUNCTION(relu2_fp32, RELU2, 0)
FUNCTION(relu2_bf16, RELU2, 1)
FUNCTION(identity_fp32, IDENTITY, 0)
FUNCTION(identity_bf16, IDENTITY, 1)
