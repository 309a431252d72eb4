/* Operations around ternary products: rounding and packing of latents, casts of codes, scaling of results.
 *
 * Each is one pass over memory, in pieces that threads share; no sum depends on the number of threads.
 */
#include "lanes.h"

enum { PIECE = 4096, BLOCK = 4 * LANES }; /* elements; of a piece, and of one vector of packed bytes */
enum { FP32, BF16, INT32 };

typedef double wide __attribute__((vector_size(8 * LANES)));
typedef uint8_t unsigned_bytes __attribute__((vector_size(LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE int64_t pieces(int64_t n) { return (n + PIECE - 1) / PIECE; }
INLINE int64_t in_piece(int64_t n, int64_t p) { return n - p * PIECE < PIECE ? n - p * PIECE : PIECE; }
INLINE const char *at(const void *x, int64_t i, int64_t size) { return (const char *)x + i * size; }
INLINE int64_t size_of(int type) { return type == BF16 ? 2 : 4; }

INLINE vec read_as(int type, const void *from, int64_t v, int64_t rest) {
    if (type != INT32) return load(type == BF16, from, v, rest);
    ivec x = {0};
    memcpy(&x, (const int32_t *)from + v * LANES, (rest < LANES ? rest : LANES) * 4);
    return __builtin_convertvector(x, vec);
}

/* Rows times a factor each, and where there are any, columns too; rounded once. */
INLINE void scale_rows(int from, int to, const void *x, const float *factor, const float *columns, int64_t rows,
                  int64_t width, int64_t threads, void *out) {
#pragma omp parallel for collapse(2) num_threads((int)threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t p = 0; p < pieces(width); p++) {
            int64_t first = row * width + p * PIECE, n = in_piece(width, p);
            for (int64_t v = 0; v < padded(n) / LANES; v++) {
                int64_t rest = n - v * LANES;
                vec value = read_as(from, at(x, first, size_of(from)), v, rest) * factor[row];
                if (columns) value *= load(0, columns + p * PIECE, v, rest);
                store(to == BF16, (void *)at(out, first, size_of(to)), v, rest, value);
            }
        }
}

/* Σ|w| of each piece of each row: in fp64, so that it is the same however a matrix is cut. */
INLINE void abs_sums(int type, const void *latent, int64_t rows, int64_t n, int64_t threads, double *partial) {
    int64_t each = pieces(n);
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t i = 0; i < rows * each; i++) {
        int64_t p = i % each, m = in_piece(n, p);
        wide total = {0};
        for (int64_t v = 0; v < padded(m) / LANES; v++) {
            vec w = magnitude(load(type == BF16, at(latent, i / each * n + p * PIECE, size_of(type)), v, m - v * LANES));
            total += __builtin_convertvector(w, wide);
        }
        partial[i] = 0;
        for (int lane = 0; lane < LANES; lane++) partial[i] += total[lane];
    }
}

/* Codes of rows with a γ each. */
INLINE void ternarize(int type, const void *latent, const float *gamma, int64_t rows, int64_t n, int64_t threads,
                    int8_t *codes) {
    int64_t each = pieces(n);
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t i = 0; i < rows * each; i++) {
        int64_t p = i % each, m = in_piece(n, p), first = i / each * n + p * PIECE;
        for (int64_t v = 0; v < padded(m) / LANES; v++) {
            int64_t rest = m - v * LANES;
            vec code = nearest(clip(load(type == BF16, at(latent, first, size_of(type)), v, rest) / gamma[i / each]));
            bytes small = __builtin_convertvector(__builtin_convertvector(code, ivec), bytes);
            memcpy(codes + first + v * LANES, &small, rest < LANES ? rest : LANES);
        }
    }
}

INLINE void cast(int type, const int8_t *codes, int64_t n, int64_t threads, void *out) {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t p = 0; p < pieces(n); p++) {
        int64_t m = in_piece(n, p);
        for (int64_t v = 0; v < padded(m) / LANES; v++) {
            int64_t rest = m - v * LANES;
            bytes small = {0};
            memcpy(&small, codes + p * PIECE + v * LANES, rest < LANES ? rest : LANES);
            store(type == BF16, (void *)at(out, p * PIECE, size_of(type)), v, rest, __builtin_convertvector(small, vec));
        }
    }
}

/* A block of 64 codes is 16 bytes: byte i holds codes i, 16 + i, 32 + i and 48 + i, each plus 1, from its low bits up. */
void pack(const int8_t *codes, int64_t n, int64_t threads, uint8_t *packed) {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t b = 0; b < (n + BLOCK - 1) / BLOCK; b++) {
        int64_t rest = n - b * BLOCK;
        bytes part[4] = {{0}}, total = {0};
        memcpy(part, codes + b * BLOCK, rest < BLOCK ? rest : BLOCK);
        for (int i = 0; i < 4; i++) total |= (part[i] + 1) << (2 * i);
        memcpy(packed + b * LANES, &total, LANES);
    }
}

INLINE void unpack(int type, int whole, const uint8_t *packed, int64_t n, int64_t threads, void *out) {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t b = 0; b < (n + BLOCK - 1) / BLOCK; b++) {
        bytes all_four;
        memcpy(&all_four, packed + b * LANES, LANES);
        for (int i = 0; i < 4; i++) {
            int64_t rest = n - b * BLOCK - i * LANES;
            bytes code = ((all_four >> (2 * i)) & 3) - 1;
            if (rest <= 0) break;
            if (whole) memcpy((int8_t *)out + b * BLOCK + i * LANES, &code, rest < LANES ? rest : LANES);
            else store(type == BF16, (void *)at(out, b * BLOCK, size_of(type)), i, rest, __builtin_convertvector(code, vec));
        }
    }
}

void unpack_int8(const uint8_t *packed, int64_t n, int64_t threads, void *out) { unpack(FP32, 1, packed, n, threads, out); }

/* A block of 80 codes is 16 bytes: byte i is Σ (code 16·j + i, plus 1)·3^j. */
void unpack_base3(const uint8_t *packed, int64_t blocks, int64_t threads, int8_t *codes) {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        unsigned_bytes digits;
        memcpy(&digits, packed + b * LANES, LANES);
        halves left = __builtin_convertvector(digits, halves);
        for (int j = 0; j < 5; j++) {
            halves third = left * 171 >> 9; /* rounded down, of any number below 256 */
            bytes code = __builtin_convertvector(left - 3 * third - 1, bytes);
            memcpy(codes + (5 * b + j) * LANES, &code, LANES);
            left = third;
        }
    }
}

#define DTYPE(name, type)                                                                                           \
    void abs_sums_##name(const void *latent, int64_t rows, int64_t n, int64_t threads, double *partial) {             \
        abs_sums(type, latent, rows, n, threads, partial);                                                        \
    }                                                                                                               \
    void ternarize_##name(const void *latent, const float *gamma, int64_t rows, int64_t n, int64_t threads,           \
                        int8_t *codes) {                                                                            \
        ternarize(type, latent, gamma, rows, n, threads, codes);                                                      \
    }                                                                                                               \
    void cast_##name(const int8_t *codes, int64_t n, int64_t threads, void *out) { cast(type, codes, n, threads, out); } \
    void unpack_##name(const uint8_t *packed, int64_t n, int64_t threads, void *out) {                                  \
        unpack(type, 0, packed, n, threads, out);                                                                   \
    }

#define SCALE(from_name, from, to_name, to)                                                                         \
    void scale_rows_##from_name##_##to_name(const void *x, const float *factor, const float *columns, int64_t rows,      \
                                       int64_t width, int64_t threads, void *out) {                                 \
        scale_rows(from, to, x, factor, columns, rows, width, threads, out);                                             \
    }

DTYPE(fp32, FP32)
DTYPE(bf16, BF16)
SCALE(fp32, FP32, fp32, FP32)
SCALE(fp32, FP32, bf16, BF16)
SCALE(bf16, BF16, fp32, FP32)
SCALE(bf16, BF16, bf16, BF16)
SCALE(int32, INT32, fp32, FP32)
SCALE(int32, INT32, bf16, BF16)

int64_t partials(int64_t rows, int64_t n) { return rows * pieces(n); }
