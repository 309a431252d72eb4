/* A short causal depthwise convolution over the tokens of packed documents, and its gradients.
 *
 * Rows x [B,T,D] with J earlier tokens in front of each row of the batch, `before` [B,J,D], and a weight [J,D] for each
 * distance: y_t = x_t + Σ_j w_j·x_{t−j}, for j up to t's position in its document. Sums are fp32. Gradients of weights
 * are summed over blocks of tokens that do not depend on the number of threads.
 */
#include <stddef.h>

#include "lanes.h"

#define BLOCK 256 /* tokens */
#define MAX_TAPS 64

/* Mirrored by kabrn_dist/kernels/short_conv.py. */
typedef struct {
    int64_t batch, time, width, taps, threads;
    const float *weight;      /* [J,D] */
    const int64_t *positions; /* [B,T] */
} args;

INLINE int64_t bytes_of(int bf16, int64_t n) { return n * (bf16 ? 2 : 4); }

/* Input k tokens before t of row b. */
INLINE const char *earlier(int bf16, const args *j, const char *x, const char *before, int64_t b, int64_t t, int64_t k) {
    int64_t at = t - k;
    return at >= 0 ? x + bytes_of(bf16, (b * j->time + at) * j->width)
                   : before + bytes_of(bf16, (b * j->taps + j->taps + at) * j->width);
}

INLINE int64_t reach(const args *j, int64_t b, int64_t t) {
    int64_t position = j->positions[b * j->time + t];
    return position < j->taps ? position : j->taps;
}

INLINE vec mixed(int bf16, const char *own, const char *const *sources, const float *const *weights, int64_t count,
                 int64_t v, int64_t rest) {
    vec y = {0};
    if (own) y = load(bf16, own, v, rest);
    for (int64_t k = 0; k < count; k++) y += load(bf16, sources[k], v, rest) * load(0, weights[k], v, rest);
    return y;
}

INLINE void forward_token(int bf16, const args *j, const char *x, const char *before, char *out, int64_t b, int64_t t) {
    int64_t w = j->width, count = reach(j, b, t), place = bytes_of(bf16, (b * j->time + t) * w);
    const char *sources[MAX_TAPS];
    const float *weights[MAX_TAPS];
    for (int64_t k = 0; k < count; k++) {
        sources[k] = earlier(bf16, j, x, before, b, t, k + 1);
        weights[k] = j->weight + k * w;
    }
    EACH(store(bf16, out + place, v, rest, mixed(bf16, x + place, sources, weights, count, v, rest)));
}

/* The gradient of the input at `at` (negative: in front of the row), from those of the tokens that read it. */
INLINE void backward_input(int bf16, const args *j, const char *grad, char *out, int64_t b, int64_t at) {
    int64_t w = j->width, count = 0, row = b * j->time;
    const char *sources[MAX_TAPS];
    const float *weights[MAX_TAPS];
    for (int64_t k = at < 0 ? -at : 1; k <= j->taps && at + k < j->time; k++) {
        if (reach(j, b, at + k) < k) continue;
        sources[count] = grad + bytes_of(bf16, (row + at + k) * w);
        weights[count++] = j->weight + (k - 1) * w;
    }
    const char *own = at < 0 ? NULL : grad + bytes_of(bf16, (row + at) * w);
    EACH(store(bf16, out, v, rest, mixed(bf16, own, sources, weights, count, v, rest)));
}

INLINE void add_weight_grad(int bf16, const args *j, const char *x, const char *before, const char *grad, float *sums,
                            int64_t b, int64_t t) {
    int64_t w = j->width, count = reach(j, b, t);
    const char *own = grad + bytes_of(bf16, (b * j->time + t) * w);
    for (int64_t k = 0; k < count; k++) {
        const char *source = earlier(bf16, j, x, before, b, t, k + 1);
        float *to = sums + k * w;
        EACH(store(0, to, v, rest, load(0, to, v, rest) + load(bf16, own, v, rest) * load(bf16, source, v, rest)));
    }
}

int64_t blocks(int64_t time) { return (time + BLOCK - 1) / BLOCK; }

/* Arguments of both: x [B,T,D] and before [B,J,D]. Sums [B,blocks,J,D] are of each block's own tokens. */
#define SHORT_CONV(name, bf16)                                                                                      \
    void name##_forward(const args *j, const char *x, const char *before, char *out) {                              \
        _Pragma("omp parallel for num_threads((int)j->threads) schedule(static)")                                   \
        for (int64_t row = 0; row < j->batch * j->time; row++)                                                      \
            forward_token(bf16, j, x, before, out, row / j->time, row % j->time);                                   \
    }                                                                                                               \
    void name##_backward(const args *j, const char *x, const char *before, const char *grad, char *grad_x,          \
                         char *grad_before, float *sums) {                                                          \
        int64_t each = blocks(j->time), w = j->width;                                                               \
        _Pragma("omp parallel for num_threads((int)j->threads) schedule(static)")                                   \
        for (int64_t block = 0; block < j->batch * each; block++) {                                                 \
            int64_t b = block / each, first = block % each * BLOCK;                                                 \
            int64_t end = first + BLOCK < j->time ? first + BLOCK : j->time;                                        \
            float *own = sums + block * j->taps * w;                                                                \
            memset(own, 0, j->taps * w * sizeof(float));                                                            \
            for (int64_t t = first; t < end; t++) {                                                                 \
                backward_input(bf16, j, grad, grad_x + bytes_of(bf16, (b * j->time + t) * w), b, t);                \
                add_weight_grad(bf16, j, x, before, grad, own, b, t);                                               \
            }                                                                                                       \
            for (int64_t i = 0; first == 0 && i < j->taps; i++)                                                     \
                backward_input(bf16, j, grad, grad_before + bytes_of(bf16, (b * j->taps + i) * w), b, i - j->taps); \
        }                                                                                                           \
    }

SHORT_CONV(fp32, 0)
SHORT_CONV(bf16, 1)
