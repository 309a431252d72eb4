/* Cross-entropy of rows of logits, and its gradient in their place.
 *
 * Rows [N,C] of logits, each with a target, or IGNORED. Forward reads a row twice, from the cache the second time; backward
 * once. Sums are fp32, and a row's are its own, so that the number of threads does not change results.
 */
#include <math.h>

#include "lanes.h"
#include "sigmoid.h"

#define IGNORED -100
/* A probability of e⁻⁸⁰ is none; smaller ones would be subnormal, and slow. */
#define LEAST -80.0f

/* Mirrored by kabrn_dist/kernels/cross_entropy.py. */
typedef struct {
    int64_t rows, width, threads;
    const int64_t *targets; /* [N] */
} args;

/* x where a vector's lane is in use, `otherwise` beyond. */
INLINE vec used(vec x, int64_t rest, float otherwise) {
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return rest >= LANES ? x : pick(lane < (int32_t)rest, x, all(otherwise));
}

INLINE float element(int bf16, const char *row, int64_t i) { return load(bf16, row + i * (bf16 ? 2 : 4), 0, 1)[0]; }

INLINE void forward_row(int bf16, const args *j, const char *logits, int64_t row, float *nats, float *log_sum) {
    int64_t w = j->width, target = j->targets[row];
    const char *from = logits + row * w * (bf16 ? 2 : 4);
    vec most = all(-INFINITY), total = {0};
    EACH(most = larger(used(load(bf16, from, v, rest), rest, -INFINITY), most));
    float peak = largest(most);
    EACH(total += used(exponential(load(bf16, from, v, rest) - peak), rest, 0));
    float above = logf(sum(total));
    log_sum[row] = peak + above;
    nats[row] = target == IGNORED ? 0.0f : peak - element(bf16, from, target) + above;
}

INLINE void backward_row(int bf16, const args *j, char *logits, int64_t row, const float *log_sum, const float *grad) {
    int64_t w = j->width, target = j->targets[row];
    char *to = logits + row * w * (bf16 ? 2 : 4);
    if (target == IGNORED) {
        memset(to, 0, w * (bf16 ? 2 : 4));
        return;
    }
    float lower = log_sum[row], times = grad[row], own = element(bf16, to, target) - lower;
    EACH(store(bf16, to, v, rest, times * exponential(larger(load(bf16, to, v, rest) - lower, all(LEAST)))));
    store(bf16, to + target * (bf16 ? 2 : 4), 0, 1, all(times * expm1f(own)));
}

#define CROSS_ENTROPY(name, bf16)                                                                                   \
    void name##_forward(const args *j, const char *logits, float *nats, float *log_sum) {                            \
        _Pragma("omp parallel for num_threads((int)j->threads) schedule(static)")                                   \
        for (int64_t row = 0; row < j->rows; row++) forward_row(bf16, j, logits, row, nats, log_sum);                \
    }                                                                                                               \
    void name##_backward(const args *j, char *logits, const float *log_sum, const float *grad) {                     \
        _Pragma("omp parallel for num_threads((int)j->threads) schedule(static)")                                   \
        for (int64_t row = 0; row < j->rows; row++) backward_row(bf16, j, logits, row, log_sum, grad);               \
    }

CROSS_ENTROPY(fp32, 0)
CROSS_ENTROPY(bf16, 1)
