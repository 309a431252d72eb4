/* SwiGLU's gate, RMSNorm and the absmax int8 quantizer in one pass over the rows: q(RMSNorm(silu(g·a) · (u·b))).
 *
 * Rows [N,D] of gates g and values u, each with one factor (a, b) a row. A row is worked on in fp32 in a buffer, and by
 * itself, so that the number of threads does not change results. Backward computes the gate again from g and u.
 */
#include <math.h>
#include <omp.h>

#include "lanes.h"
#include "sigmoid.h"

/* Mirrored by kabrn_dist/kernels/gate.py. */
typedef struct {
    int64_t rows, width, threads;
    const float *a, *b; /* [N] */
    int32_t quantized;
} args;

INLINE const char *row_of(const void *x, int bf16, const args *j, int64_t row) {
    return (const char *)x + row * j->width * (bf16 ? 2 : 4);
}

INLINE vec gate_of(int bf16, const char *gates, const char *values, float a, float b, int64_t v, int64_t rest) {
    vec z = load(bf16, gates, v, rest) * a;
    return z * sigmoid(z) * (load(bf16, values, v, rest) * b);
}

INLINE void measure(vec y, vec *squares, vec *most) {
    *squares += y * y;
    *most = larger(magnitude(y), *most);
}

INLINE void store_code(int bf16, void *to, int8_t *int8_codes, int64_t v, int64_t rest, vec code) {
    store(bf16, to, v, rest, code);
    store_whole(int8_codes, v, rest, code);
}

INLINE void forward_row(int bf16, const args *j, int64_t row, const void *g, const void *u, vec *y, void *out,
                        float *scale, float *rms, int8_t *int8_codes) {
    int64_t w = j->width;
    float a = j->a[row], b = j->b[row];
    const char *gates = row_of(g, bf16, j, row), *values = row_of(u, bf16, j, row);
    char *to = (char *)row_of(out, bf16, j, row);
    vec squares = {0}, most = {0};
    EACH(measure(y[v] = gate_of(bf16, gates, values, a, b, v, rest), &squares, &most));
    float norm = 1.0f / sqrtf(sum(squares) / (float)w + 1e-6f), peak = norm * largest(most);
    rms[row] = norm;
    scale[row] = j->quantized ? 127.0f / (peak < 1e-5f ? 1e-5f : peak) : 1.0f;
    float times = norm * scale[row];
    if (j->quantized) EACH(store_code(bf16, to, int8_codes + row * w, v, rest, nearest(y[v] * times)));
    else EACH(store(bf16, to, v, rest, y[v] * times));
}

/* The gate's value, and its slopes in z = g·a and in u·b. */
typedef struct { vec y, slope_z, slope_value; } slopes;

INLINE vec slopes_of(int bf16, const char *gates, const char *values, const char *grad, float a, float b, int64_t v,
                     int64_t rest, slopes *found) {
    vec z = load(bf16, gates, v, rest) * a, value = load(bf16, values, v, rest) * b;
    vec share = sigmoid(z), swish = z * share;
    *found = (slopes){swish * value, (share + swish * (1.0f - share)) * value, swish};
    return load(bf16, grad, v, rest) * found->y;
}

INLINE void store_grads(int bf16, vec grad_y, float a, float b, const slopes *s, int64_t v, int64_t rest, char *grad_g,
                        char *grad_u) {
    store(bf16, grad_g, v, rest, grad_y * s->slope_z * a);
    store(bf16, grad_u, v, rest, grad_y * s->slope_value * b);
}

INLINE void backward_row(int bf16, const args *j, int64_t row, const void *g, const void *u, const void *grad,
                         float scale, float norm, vec *scratch, void *grad_g, void *grad_u) {
    int64_t w = j->width;
    float a = j->a[row], b = j->b[row];
    const char *gates = row_of(g, bf16, j, row), *values = row_of(u, bf16, j, row), *d = row_of(grad, bf16, j, row);
    char *to_g = (char *)row_of(grad_g, bf16, j, row), *to_u = (char *)row_of(grad_u, bf16, j, row);
    slopes *s = (slopes *)scratch;
    vec along = {0};
    EACH(along += slopes_of(bf16, gates, values, d, a, b, v, rest, s + v));
    /* y·norm has a fixed length: its gradient keeps nothing along y. */
    float times = norm * scale, remove = norm * norm * sum(along) / (float)w;
    EACH(store_grads(bf16, times * (load(bf16, d, v, rest) - remove * s[v].y), a, b, s + v, v, rest, to_g, to_u));
}

/* A thread's buffer: three rows. */
int64_t scratch_floats(const args *j) { return 3 * padded(j->width); }

INLINE vec *own(const args *j, float *scratch) {
    return (vec *)(scratch + omp_get_thread_num() * scratch_floats(j));
}

/* Arguments of both: g and u [N,D], scale [N] and rms [N], which forward writes and backward reads. */
#define GATE(name, bf16)                                                                                            \
    void name##_forward(const args *j, const void *g, const void *u, float *scratch, void *out, float *scale,        \
                        float *rms, int8_t *int8_codes) {                                                                 \
        _Pragma("omp parallel for num_threads((int)j->threads) schedule(static)")                                   \
        for (int64_t row = 0; row < j->rows; row++)                                                                 \
            forward_row(bf16, j, row, g, u, own(j, scratch), out, scale, rms, int8_codes);                                \
    }                                                                                                               \
    void name##_backward(const args *j, const void *g, const void *u, const void *grad, const float *scale,          \
                         const float *rms, float *scratch, void *grad_g, void *grad_u) {                              \
        _Pragma("omp parallel for num_threads((int)j->threads) schedule(static)")                                   \
        for (int64_t row = 0; row < j->rows; row++)                                                                 \
            backward_row(bf16, j, row, g, u, grad, scale[row], rms[row], own(j, scratch), grad_g, grad_u);            \
    }

GATE(fp32, 0)
GATE(bf16, 1)

/* For its test. */
void exp_all(const float *x, int64_t n, float *out) {
    for (int64_t v = 0; v < padded(n) / LANES; v++)
        store(0, out, v, n - v * LANES, exponential(load(0, x, v, n - v * LANES)));
}
