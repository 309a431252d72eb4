/* What a ternary product needs around the multiplication: rows scaled, latents rounded, signs widened.
 *
 * Each is one pass over memory, in pieces that threads share; no sum depends on their number.
 */
#include "lanes.h"

enum { PIECE = 4096 }; /* elements */

INLINE int64_t pieces(int64_t n) { return (n + PIECE - 1) / PIECE; }
INLINE int64_t in_piece(int64_t n, int64_t p) { return n - p * PIECE < PIECE ? n - p * PIECE : PIECE; }
INLINE const char *at(const void *x, int64_t i, int64_t size) { return (const char *)x + i * size; }

INLINE void scale(int bf16, const void *x, const float *factor, int64_t rows, int64_t width, int64_t threads, void *out) {
    int64_t size = bf16 ? 2 : 4;
#pragma omp parallel for collapse(2) num_threads((int)threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t p = 0; p < pieces(width); p++) {
            int64_t first = row * width + p * PIECE, n = in_piece(width, p);
            for (int64_t v = 0; v < padded(n) / LANES; v++) {
                vec value = load(bf16, at(x, first, size), v, n - v * LANES) * factor[row];
                store(bf16, (void *)at(out, first, size), v, n - v * LANES, value);
            }
        }
}

/* Σ|w| of each piece, then γ of each matrix, then its codes twice: for the product, and as bytes to keep. */
INLINE void ternary(int bf16, const void *latent, int64_t matrices, int64_t n, int64_t threads, float *partial,
                    float *gamma, void *codes, int8_t *kept) {
    int64_t size = bf16 ? 2 : 4, each = pieces(n);
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t i = 0; i < matrices * each; i++) {
        int64_t p = i % each, m = in_piece(n, p);
        vec total = {0};
        for (int64_t v = 0; v < padded(m) / LANES; v++)
            total += magnitude(load(bf16, at(latent, i / each * n + p * PIECE, size), v, m - v * LANES));
        partial[i] = sum(total);
    }
    for (int64_t e = 0; e < matrices; e++) {
        double total = 0;
        for (int64_t p = 0; p < each; p++) total += partial[e * each + p];
        float mean = (float)(total / (double)n);
        gamma[e] = mean < 1e-5f ? 1e-5f : mean;
    }
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t i = 0; i < matrices * each; i++) {
        int64_t p = i % each, m = in_piece(n, p), first = i / each * n + p * PIECE;
        for (int64_t v = 0; v < padded(m) / LANES; v++) {
            int64_t rest = m - v * LANES;
            vec code = nearest(clip(load(bf16, at(latent, first, size), v, rest) / gamma[i / each]));
            bytes small = __builtin_convertvector(__builtin_convertvector(code, ivec), bytes);
            store(bf16, (void *)at(codes, first, size), v, rest, code);
            memcpy(kept + first + v * LANES, &small, rest < LANES ? rest : LANES);
        }
    }
}

INLINE void widen(int bf16, const int8_t *codes, int64_t n, int64_t threads, void *out) {
    int64_t size = bf16 ? 2 : 4;
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t p = 0; p < pieces(n); p++) {
        int64_t m = in_piece(n, p);
        for (int64_t v = 0; v < padded(m) / LANES; v++) {
            int64_t rest = m - v * LANES;
            bytes small = {0};
            memcpy(&small, codes + p * PIECE + v * LANES, rest < LANES ? rest : LANES);
            store(bf16, (void *)at(out, p * PIECE, size), v, rest, __builtin_convertvector(small, vec));
        }
    }
}

#define DTYPE(name, bf16)                                                                                           \
    void scale_##name(const void *x, const float *factor, int64_t rows, int64_t width, int64_t threads, void *out) {    \
        scale(bf16, x, factor, rows, width, threads, out);                                                          \
    }                                                                                                               \
    void ternary_##name(const void *latent, int64_t matrices, int64_t n, int64_t threads, float *partial, float *gamma, \
                        void *codes, int8_t *kept) {                                                                \
        ternary(bf16, latent, matrices, n, threads, partial, gamma, codes, kept);                                   \
    }                                                                                                               \
    void widen_##name(const int8_t *codes, int64_t n, int64_t threads, void *out) { widen(bf16, codes, n, threads, out); }

DTYPE(fp32, 0)
DTYPE(bf16, 1)

int64_t partials(int64_t matrices, int64_t n) { return matrices * pieces(n); }
