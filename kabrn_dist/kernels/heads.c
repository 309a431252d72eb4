/* Rows of heads, of any order in memory: rotation by an angle for each pair, and RMSNorm of a head; with gradients.
 *
 * Rows are numbered by batch b, head h and token t, and lie where three strides say, each with its D values together: so a
 * projection's [B,T,H·D] becomes [B,H,T,D], or the other way round, in the same pass. Values are worked on in fp32.
 */
#include <math.h>

#include "lanes.h"

/* Mirrored by kabrn_dist/kernels/heads.py. Strides in elements. */
typedef struct {
    int64_t batch, heads, time, width, threads;
    int64_t from[3], to[3], grad[3];
    float eps, direction;
} args;

INLINE char *row_of(int bf16, const void *x, const int64_t *stride, int64_t b, int64_t h, int64_t t) {
    return (char *)x + (b * stride[0] + h * stride[1] + t * stride[2]) * (bf16 ? 2 : 4);
}

/* Pair (left, right) turned by the angle of cos and sin. */
INLINE void turn(int bf16, const char *from, char *to, const float *cos, const float *sin, float direction, int64_t half,
                 int64_t v, int64_t rest) {
    int64_t right = half * (bf16 ? 2 : 4);
    vec c = load(0, cos, v, rest), s = load(0, sin, v, rest) * direction;
    vec x = load(bf16, from, v, rest), y = load(bf16, from + right, v, rest);
    store(bf16, to, v, rest, x * c - y * s);
    store(bf16, to + right, v, rest, x * s + y * c);
}

INLINE void rotate_row(int bf16, const char *from, char *to, const float *cos, const float *sin, float direction,
                       int64_t w) {
    EACH(turn(bf16, from, to, cos, sin, direction, w, v, rest));
}

INLINE float inverse_rms(int bf16, const char *from, int64_t w, float eps) {
    vec squares = {0};
    EACH(squares += load(bf16, from, v, rest) * load(bf16, from, v, rest));
    return 1.0f / sqrtf(sum(squares) / (float)w + eps);
}

INLINE void norm_row(int bf16, const char *from, char *to, int64_t w, float eps) {
    float norm = inverse_rms(bf16, from, w, eps);
    EACH(store(bf16, to, v, rest, load(bf16, from, v, rest) * norm));
}

/* Of the normalized row the gradient keeps nothing along it, but for what eps took. */
INLINE void norm_grad_row(int bf16, const char *from, const char *grad, char *to, int64_t w, float eps) {
    float norm = inverse_rms(bf16, from, w, eps);
    vec along = {0};
    EACH(along += load(bf16, grad, v, rest) * load(bf16, from, v, rest));
    float remove = norm * norm * sum(along) / (float)w;
    EACH(store(bf16, to, v, rest, norm * (load(bf16, grad, v, rest) - remove * load(bf16, from, v, rest))));
}

#define EACH_ROW(step)                                                                                              \
    _Pragma("omp parallel for collapse(2) num_threads((int)j->threads) schedule(static)")                           \
    for (int64_t b = 0; b < j->batch; b++)                                                                          \
        for (int64_t t = 0; t < j->time; t++)                                                                       \
            for (int64_t h = 0; h < j->heads; h++) step

#define AT(bf16, x, stride) row_of(bf16, x, j->stride, b, h, t)

/* cos and sin [B,T,D/2], of which direction −1 turns back. */
#define HEADS(name, bf16)                                                                                           \
    void name##_rotate(const args *j, const void *x, const float *cos, const float *sin, void *out) {               \
        int64_t half = j->width / 2;                                                                                \
        EACH_ROW(rotate_row(bf16, AT(bf16, x, from), AT(bf16, out, to), cos + (b * j->time + t) * half,                         \
                            sin + (b * j->time + t) * half, j->direction, half));                                   \
    }                                                                                                               \
    void name##_norm(const args *j, const void *x, void *out) {                                                     \
        EACH_ROW(norm_row(bf16, AT(bf16, x, from), AT(bf16, out, to), j->width, j->eps));                                       \
    }                                                                                                               \
    void name##_norm_grad(const args *j, const void *x, const void *grad, void *out) {                              \
        EACH_ROW(norm_grad_row(bf16, AT(bf16, x, from), AT(bf16, grad, grad), AT(bf16, out, to), j->width, j->eps));                  \
    }

HEADS(fp32, 0)
HEADS(bf16, 1)
