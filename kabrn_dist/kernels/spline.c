/* Operations around the products of a layer with a spline on every edge: rows x [N,I] → the values [N,K+1,I] of the K
 * B-splines and of silu, and the gradient of those values → that of x.
 *
 * Uniform knots, straight lines outside, as in ops/splines.py; int8 codes with one scale for the splines of
 * a row and one for its silu. Of the K values only p + 1 are not zero: these are computed, and put in their places by
 * comparing. A row is worked on by itself, so that the number of threads does not change results.
 */
#include <omp.h>

#include "lanes.h"
#include "sigmoid.h"

/* Mirrored by kabrn_dist/kernels/spline.py. */
#define MOST_DEGREE 7
/* Output: the value itself, its code, or its code divided by the scale. */
enum { PLAIN, CODES, VALUES };
typedef struct {
    int64_t rows, inputs, intervals, degree, threads, form;
    float low, high, per_step, peak;                         /* peak: the largest value inside the grid */
    float values[MOST_DEGREE + 1], slopes[MOST_DEGREE + 1]; /* of the first p + 1 functions at the low end, a step */
} args;

INLINE vec smaller(vec x, vec y) { return pick(x < y, x, y); }
INLINE vec where(ivec which, vec x) { return (vec)(which & (ivec)x); }

/* Where x stands: an interval, the place 0…1 in it, and how far outside the grid, in steps. */
typedef struct { ivec interval; vec place, below, above; } spot;

INLINE spot find(const args *j, vec x) {
    vec place = (x - j->low) * j->per_step, zero = {0}, end = all((float)j->intervals);
    vec inside = smaller(larger(place, zero), end), beyond = place - inside;
    ivec interval = __builtin_convertvector(inside, ivec), last = (ivec){0} + (int32_t)(j->intervals - 1);
    ivec over = interval > last;
    interval = (over & last) | (~over & interval);
    return (spot){interval, inside - __builtin_convertvector(interval, vec), smaller(beyond, zero),
                  larger(beyond, zero)};
}

/* The p + 1 B-splines that are not zero, at a place 0…1 of an interval (Cox–de Boor on unit knots). */
INLINE void nonzero(int degree, vec place, vec *w) {
    w[0] = all(1.0f);
    for (int p = 1; p <= degree; p++) {
        vec before = {0};
        for (int r = 0; r <= p; r++) {
            vec here = r < p ? w[r] : (vec){0};
            w[r] = ((place + (float)(p - r)) * before + ((float)(r + 1) - place) * here) * (1.0f / (float)p);
            before = here;
        }
    }
}

INLINE void splines(const args *j, int degree, spot at, vec *w) {
    nonzero(degree, at.place, w);
    for (int r = 0; r <= degree; r++) w[r] += at.below * j->slopes[r] - at.above * j->slopes[degree - r];
}

INLINE void splines_slopes(int degree, spot at, vec *w) {
    nonzero(degree - 1, at.place, w);
    w[degree] = w[degree - 1];
    for (int r = degree - 1; r > 0; r--) w[r] = w[r - 1] - w[r];
    w[0] = -w[0];
}

/* Of p + 1 values the one that is function k's; zero where it is none of them. */
INLINE vec chosen(int degree, const vec *w, ivec k) {
    vec x = {0};
    for (int r = 0; r <= degree; r++) x = (vec)((ivec)x | (ivec)where(k == r, w[r]));
    return x;
}

INLINE vec rounded(int64_t form, vec x, float scale, float inverse) {
    if (form == PLAIN) return x;
    x = nearest(x * scale);
    return form == CODES ? x : x * inverse;
}

INLINE void expand(int bf16, int degree, const args *j, vec x, const float *scale, int64_t v, int64_t rest, char *to) {
    vec w[MOST_DEGREE + 1];
    int64_t size = j->intervals + degree, stride = j->inputs * (bf16 ? 2 : 4);
    spot at = find(j, x);
    splines(j, degree, at, w);
    for (int r = 0; r <= degree; r++) w[r] = rounded(j->form, w[r], scale[0], 1.0f / scale[0]);
    for (int64_t k = 0; k < size; k++)
        store(bf16, to + k * stride, v, rest, chosen(degree, w, (int32_t)k - at.interval));
    store(bf16, to + size * stride, v, rest, rounded(j->form, x * sigmoid(x), scale[1], 1.0f / scale[1]));
}

INLINE void measure(const args *j, vec x, int64_t rest, vec *silu, vec *far) {
    ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    *silu = larger(magnitude(x * sigmoid(x)), *silu);
    /* Zeros past the row's end may be far outside the grid. */
    *far = larger(where(lane < (int32_t)rest, magnitude(x - 0.5f * (j->low + j->high))), *far);
}

/* Both scales of a row: 127 over what no value exceeds. */
INLINE void scales(int bf16, int degree, const args *j, const char *x, float *scale) {
    int64_t w = j->inputs;
    vec silu = all(1e-5f), far = {0};
    EACH(measure(j, load(bf16, x, v, rest), rest, &silu, &far));
    float beyond = (largest(far) - 0.5f * (j->high - j->low)) * j->per_step, most = j->peak;
    beyond = beyond > 0 ? beyond : 0;
    for (int r = 0; r <= degree; r++) {
        float value = j->values[r] - beyond * j->slopes[r];
        value = value < 0 ? -value : value;
        most = value > most ? value : most;
    }
    scale[0] = 127.0f / most;
    scale[1] = 127.0f / largest(silu);
}

INLINE void expand_row(int bf16, int degree, const args *j, int64_t row, const char *x, char *to, float *scale) {
    int64_t w = j->inputs, bytes = w * (bf16 ? 2 : 4);
    x += row * bytes, to += row * bytes * (j->intervals + degree + 1), scale += 2 * row;
    if (j->form == PLAIN) scale[0] = scale[1] = 1.0f;
    else scales(bf16, degree, j, x, scale);
    EACH(expand(bf16, degree, j, load(bf16, x, v, rest), scale, v, rest, to));
}

INLINE void gather(int bf16, int degree, const args *j, vec x, const char *grad, const float *gamma, int64_t v,
                   int64_t rest, char *to) {
    vec w[MOST_DEGREE + 1], total = {0}, share = sigmoid(x);
    int64_t size = j->intervals + degree, stride = j->inputs * (bf16 ? 2 : 4);
    spot at = find(j, x);
    splines_slopes(degree, at, w);
    for (int64_t k = 0; k < size; k++)
        total += load(bf16, grad + k * stride, v, rest) * chosen(degree, w, (int32_t)k - at.interval);
    vec silu = load(bf16, grad + size * stride, v, rest) * (share + x * share * (1.0f - share));
    store(bf16, to, v, rest, total * (j->per_step * gamma[0]) + silu * gamma[1]);
}

INLINE void gather_row(int bf16, int degree, const args *j, int64_t row, const char *x, const char *grad,
                       const float *gamma, char *to) {
    int64_t w = j->inputs, bytes = w * (bf16 ? 2 : 4);
    x += row * bytes, to += row * bytes, grad += row * bytes * (j->intervals + degree + 1);
    EACH(gather(bf16, degree, j, load(bf16, x, v, rest), grad, gamma, v, rest, to));
}

/* A loop over rows for each degree, so that the p + 1 values stay in registers. */
#define ROWS(p, step)                                                                                               \
    case p: {                                                                                                       \
        enum { degree = p };                                                                                        \
        _Pragma("omp parallel for num_threads((int)j->threads) schedule(static)")                                   \
        for (int64_t row = 0; row < j->rows; row++) step;                                                           \
    } break
#define DEGREES(step)                                                                                               \
    switch (j->degree) {                                                                                            \
        ROWS(1, step); ROWS(2, step); ROWS(3, step); ROWS(4, step); ROWS(5, step); ROWS(6, step); ROWS(7, step);    \
    }

/* x [N,I]; out and grad [N,K+1,I]; scale [N,2]; gamma [2], the factors of both parts of the gradient. */
#define SPLINE(name, bf16)                                                                                          \
    void name##_forward(const args *j, const void *x, void *out, float *scale) {                                     \
        DEGREES(expand_row(bf16, degree, j, row, x, out, scale))                                                    \
    }                                                                                                               \
    void name##_backward(const args *j, const void *x, const void *grad, const float *gamma, void *out) {            \
        DEGREES(gather_row(bf16, degree, j, row, x, grad, gamma, out))                                              \
    }

SPLINE(fp32, 0)
SPLINE(bf16, 1)
