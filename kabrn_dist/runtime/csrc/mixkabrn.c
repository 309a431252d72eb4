/* MixKABRN runtime, in C99: libc, libm and threads only.
 *
 *     cc -O2 mixkabrn.c -o mixkabrn -lm -lpthread
 *
 * Parts: 1 bytes and errors, 2 sha256, 3 model file, 4 kernels, 5 threads, 6 forward pass, 7 adapters, 8 state,
 * 9 tokenizer, 10 sampling, 11 command line. Docs: docs/model_file.md, docs/adapter_file.md, docs/runtime.md.
 *
 * For GCC and Clang, whose vector types and target attributes it uses. Macros:
 *     MIXKABRN_LIBRARY     without main, for a shared library
 *     MIXKABRN_NO_THREADS  without pthreads: every context has one thread
 *     MIXKABRN_NO_MMAP     model files are read into memory instead of being mapped */
/* Section 4 includes this file again, for its float kernels alone. */
#ifndef KIND
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700 /* realpath */
#endif

/* One rounding an operation on every machine: a fused multiply-add would make results depend on the kernels in use. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif
/* Vectors wider than the machine's are only passed to functions that are inlined. */
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__i386__) && !defined(__SSE2__)
/* The x87 unit rounds to 64 bits where this file counts on 24. SSE is in every Pentium III and Athlon XP. Without SSE2 on
 * the command line, headers of AVX fail. */
#ifndef __clang__
#pragma GCC target("sse,fpmath=sse")
#endif
#define SSE_ONLY 1
#endif

#if defined(__wasm__)
#define MIXKABRN_NO_THREADS
#define MIXKABRN_NO_MMAP
#endif

#include "mixkabrn.h"

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#ifndef MIXKABRN_LIBRARY
#include <signal.h>
#include <sys/select.h>
#endif
#ifndef MIXKABRN_NO_MMAP
#include <sys/mman.h>
#endif
#ifndef MIXKABRN_NO_THREADS
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#define ON_X86 1
#ifdef SSE_ONLY
#include <tmmintrin.h>
#else
#define HAS_AVX2 1
#include <cpuid.h>
#include <immintrin.h>
#endif
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNUSED __attribute__((unused))
/* Small loops over registers: arrays of vectors stay in registers only if their loops vanish. */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* ---- 1 bytes and errors ---- */

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
enum { BIG_ENDIAN_HOST = 1 };
#else
enum { BIG_ENDIAN_HOST = 0 };
#endif

/* Write one line into `error` (or nowhere, if it is NULL) and return `status`. */
static int fail(char *error, int status, const char *format, ...) __attribute__((format(printf, 3, 4)));
static int fail(char *error, int status, const char *format, ...) {
    va_list arguments;
    if (!error) return status;
    va_start(arguments, format);
    vsnprintf(error, MKB_ERROR_BYTES, format, arguments);
    va_end(arguments);
    /* A path may hold anything, but the message stays one line. */
    for (char *c = error; *c; c++)
        if ((unsigned char)*c < 32 || *c == 127) *c = '?';
    return status;
}

static uint32_t read_u32(const unsigned char *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t read_u64(const unsigned char *p) { return read_u32(p) | (uint64_t)read_u32(p + 4) << 32; }

static float read_f32(const unsigned char *p) {
    uint32_t bits = read_u32(p);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void write_u32(unsigned char *p, uint32_t value) {
    for (int i = 0; i < 4; i++) p[i] = (unsigned char)(value >> 8 * i);
}

static void write_u64(unsigned char *p, uint64_t value) {
    write_u32(p, (uint32_t)value);
    write_u32(p + 4, (uint32_t)(value >> 32));
}

/* Numbers of 4 bytes between memory and a file; little-endian machines copy. */
static void copy_words(void *to, const void *from, size_t count) {
    if (!BIG_ENDIAN_HOST) {
        memcpy(to, from, count * 4);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        uint32_t word = read_u32((const unsigned char *)from + 4 * i);
        memcpy((unsigned char *)to + 4 * i, &word, 4);
    }
}

static size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

__attribute__((unused)) static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Memory at an address that is a multiple of 64; NULL if there is none, also for a size that overflows. */
static void *allocate(uint64_t count, uint64_t size) {
    uint64_t bytes = count * size;
    void *memory = NULL;
    if ((count && bytes / count != size) || bytes > SIZE_MAX / 2) return NULL;
    if (posix_memalign(&memory, 64, round_up((size_t)bytes + 1, 64))) return NULL;
    return memory;
}

/* ---- 2 sha256 ---- */

typedef struct {
    uint32_t hash[8];
    uint64_t bytes;
    unsigned char block[64];
} sha256_state;

static const uint32_t SHA256_ROUNDS[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static void sha256_begin(sha256_state *s) {
    static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(s->hash, start, sizeof start);
    s->bytes = 0;
}

INLINE uint32_t turn(uint32_t x, int bits) { return x >> bits | x << (32 - bits); }

/* One round; the caller names the eight words in turned order instead of moving them. */
#define SHA256_ROUND(a, b, c, d, e, f, g, h, i)                                                                        \
    do {                                                                                                               \
        uint32_t t = h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + (g ^ (e & (f ^ g))) + SHA256_ROUNDS[i] + w[i];      \
        d += t;                                                                                                        \
        h = t + (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) | (c & (a | b)));                                  \
    } while (0)

static void sha256_block(uint32_t *hash, const unsigned char *p) {
    uint32_t w[64], a = hash[0], b = hash[1], c = hash[2], d = hash[3];
    uint32_t e = hash[4], f = hash[5], g = hash[6], h = hash[7];
    for (int i = 0; i < 16; i++, p += 4)
        w[i] = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | (uint32_t)p[3];
    for (int i = 16; i < 64; i++) {
        uint32_t x = w[i - 15], y = w[i - 2];
        w[i] = w[i - 16] + w[i - 7] + (turn(x, 7) ^ turn(x, 18) ^ x >> 3) + (turn(y, 17) ^ turn(y, 19) ^ y >> 10);
    }
    for (int i = 0; i < 64; i += 8) {
        SHA256_ROUND(a, b, c, d, e, f, g, h, i);
        SHA256_ROUND(h, a, b, c, d, e, f, g, i + 1);
        SHA256_ROUND(g, h, a, b, c, d, e, f, i + 2);
        SHA256_ROUND(f, g, h, a, b, c, d, e, i + 3);
        SHA256_ROUND(e, f, g, h, a, b, c, d, i + 4);
        SHA256_ROUND(d, e, f, g, h, a, b, c, i + 5);
        SHA256_ROUND(c, d, e, f, g, h, a, b, i + 6);
        SHA256_ROUND(b, c, d, e, f, g, h, a, i + 7);
    }
    hash[0] += a, hash[1] += b, hash[2] += c, hash[3] += d;
    hash[4] += e, hash[5] += f, hash[6] += g, hash[7] += h;
}

static void sha256_add(sha256_state *s, const void *data, size_t size) {
    const unsigned char *p = data;
    while (size) {
        size_t filled = (size_t)(s->bytes % 64), part = MIN(size, 64 - filled);
        if (part == 64) {
            sha256_block(s->hash, p);
        } else {
            memcpy(s->block + filled, p, part);
            if (filled + part == 64) sha256_block(s->hash, s->block);
        }
        s->bytes += part, p += part, size -= part;
    }
}

static void sha256_end(sha256_state *s, unsigned char *digest) {
    static const unsigned char padding[64] = {128};
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)(s->bytes * 8 >> (56 - 8 * i));
    sha256_add(s, padding, (size_t)(119 - s->bytes % 64) % 64 + 1);
    sha256_add(s, length, 8);
    for (int i = 0; i < 32; i++) digest[i] = (unsigned char)(s->hash[i / 4] >> (24 - 8 * (i % 4)));
}

/* ---- 3 model file ---- */

/* What runs once a file need not be fast, and the program is to be small. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("Os")
#endif

enum {
    HEADER_BYTES = 512,
    RECORD_BYTES = 64,
    FORMAT_VERSION = 1,
    TILE = 16,        /* rows and columns of a tile */
    TILE_BYTES = 64,
    MAX_DEGREE = 16,  /* of splines */
    MAX_COLUMNS = 1 << 18 /* of a ternary matrix: int32 sums of all kernels hold 64·2·128 for each fourth column */
};

enum { RATIONAL, CHEBYSHEV, HAT, BSPLINE, SWIGLU, RELU2, EXPERT_TYPES };
enum { FP32, FP16, INT8, TERNARY, BASE3, DTYPES };
/* Matrices of an expert. */
enum { UP, DOWN, GATE, INNER_BASE, INNER_SPLINE, OUTER_BASE, OUTER_SPLINE, INNER = 8, OUTER = 9, EXPERT_PARTS = 10 };
/* Tensors of a layer, in a table without the gaps of the file's roles. */
enum {
    MIXER_QUERY, MIXER_KEY, MIXER_VALUE, MIXER_GATE, MIXER_OUT, MIXER_CONVOLUTION, CONVOLUTION, ROUTER_WEIGHT,
    ROUTER_BIAS, ROUTED, SHARED = ROUTED + EXPERT_PARTS, LAYER_TENSORS = SHARED + EXPERT_PARTS
};
/* Tensors of the whole model. */
enum { EMBEDDING, HEAD, LOG_DECAY, MODEL_TENSORS };

typedef struct {
    const unsigned char *values; /* NULL: the model has no such tensor */
    const float *scales;         /* [count][scale_count] */
    uint64_t stride;             /* bytes from one matrix to the next */
    uint32_t dtype, count, rows, columns, scale_count;
} tensor;

typedef struct {
    int attention, mixture;
    tensor tensors[LAYER_TENSORS];
} layer;

typedef struct {
    uint32_t vocab_size, tokenizer_size, document_token, hidden, layers, heads, key_dim, value_dim, taps;
    uint32_t expert_type, experts, shared, top_k, expert_hidden, dense_hidden, softmax, normalize_weights;
    uint32_t groups, top_groups, function_groups, intervals, degree, quantized, scale_group;
    float low, high;
} settings;

/* Tables of the file's tokenizer section, and what is found in them by hashing; see section 9. */
typedef struct {
    uint32_t kind, pre_tokenizer, tokens, merges, flags, added[2], first_bytes[2][8], merge_mask, word_mask;
    const unsigned char *starts, *marks, *byte_ids, *merge_table, *added_ids, *bytes;
    uint32_t *merge_slots, *word_slots;
} tokenizer_tables;

struct mkb_model {
    settings set;
    tokenizer_tables tables;
    tensor tensors[MODEL_TENSORS];
    layer *layers;
    const unsigned char *bytes; /* the whole file */
    uint64_t size, step;
    const unsigned char *tokenizer, *config, *template_text;
    uint64_t tokenizer_bytes, config_bytes, template_bytes;
    uint64_t parameters, active_parameters, bytes_per_token, state_bytes;
    unsigned char sha256[32], tokenizer_sha256[32], codes_sha256[32];
    char name[128];     /* for messages */
    void *mapped;       /* to be unmapped or freed; NULL for the caller's memory */
    int is_mapped;
    char *path;         /* NULL: opened from memory */
    struct stat opened; /* of the file, when it was opened */
    void **copies;      /* what had to be converted */
    size_t num_copies, room_for_copies;
};

/* Section 9 checks the tables inside the tokenizer's part of the file, which lies within it, and indexes them. */
static int tokenizer_check(mkb_model *m, char *error);
static void tokenizer_close(tokenizer_tables *t);

static int refuse(const mkb_model *m, char *error, const char *what, uint64_t value, const char *remedy) {
    return fail(error, MKB_ERROR_FORMAT, "%s: %s %llu %s", m->name, what, (unsigned long long)value, remedy);
}

typedef struct {
    const char *name;
    uint32_t offset, least, most;
    size_t place; /* in `settings` */
} field;

#define FIELD(name, offset, least, most, member) {name, offset, least, most, offsetof(settings, member)}

static const field FIELDS[] = {
    FIELD("vocab_size", 96, 1, 1u << 24, vocab_size),
    FIELD("tokenizer_size", 100, 1, 1u << 24, tokenizer_size),
    FIELD("document_token", 104, 0, 1u << 24, document_token),
    FIELD("hidden_size", 108, 1, 1u << 16, hidden),
    FIELD("num_layers", 112, 1, 10000, layers),
    FIELD("num_heads", 116, 1, 1u << 16, heads),
    FIELD("key_dim", 120, 2, 1u << 14, key_dim),
    FIELD("value_dim", 124, 1, 1u << 14, value_dim),
    FIELD("short_conv_size", 128, 0, 1024, taps),
    FIELD("expert_type", 132, 0, EXPERT_TYPES - 1, expert_type),
    FIELD("num_experts", 136, 0, 1u << 16, experts),
    FIELD("num_shared_experts", 140, 0, 1024, shared),
    FIELD("top_k", 144, 0, 1024, top_k),
    FIELD("expert_hidden_size", 148, 0, MAX_COLUMNS, expert_hidden),
    FIELD("dense_hidden_size", 152, 0, MAX_COLUMNS, dense_hidden),
    FIELD("score_func", 156, 0, 1, softmax),
    FIELD("norm_topk_prob", 160, 0, 1, normalize_weights),
    FIELD("n_group", 164, 0, 1u << 16, groups),
    FIELD("topk_group", 168, 0, 1u << 16, top_groups),
    FIELD("function_groups", 172, 0, 1u << 16, function_groups),
    FIELD("grid_size", 176, 0, 1u << 12, intervals),
    FIELD("spline_degree", 180, 0, MAX_DEGREE, degree),
    FIELD("quantized", 184, 0, 1, quantized),
    FIELD("scale_group_size", 188, 0, 1u << 24, scale_group),
};

static int read_settings(mkb_model *m, char *error) {
    for (size_t i = 0; i < sizeof FIELDS / sizeof *FIELDS; i++) {
        uint32_t value = read_u32(m->bytes + FIELDS[i].offset);
        if (value < FIELDS[i].least || value > FIELDS[i].most)
            return fail(error, MKB_ERROR_FORMAT, "%s: %s is %lu, which is not within %lu and %lu; pack the model again",
                        m->name, FIELDS[i].name, (unsigned long)value, (unsigned long)FIELDS[i].least,
                        (unsigned long)FIELDS[i].most);
        memcpy((char *)&m->set + FIELDS[i].place, &value, 4);
    }
    m->set.taps = m->set.taps ? m->set.taps - 1 : 0;
    m->set.low = read_f32(m->bytes + 192);
    m->set.high = read_f32(m->bytes + 196);
    m->step = read_u64(m->bytes + 88);
    memcpy(m->sha256, m->bytes + 24, 32);
    memcpy(m->tokenizer_sha256, m->bytes + 56, 32);
    memcpy(m->codes_sha256, m->bytes + 272, 32);
    return MKB_OK;
}

static int has_splines(const settings *s) { return s->expert_type == HAT || s->expert_type == BSPLINE; }
static int has_functions(const settings *s) { return s->expert_type == RATIONAL || s->expert_type == CHEBYSHEV; }
/* Basis functions of an input. */
static uint32_t basis_size(const settings *s) { return s->intervals + s->degree; }

static int check_experts(const mkb_model *m, uint32_t hidden, char *error) {
    const settings *s = &m->set;
    if (!hidden) return fail(error, MKB_ERROR_FORMAT, "%s: an expert's hidden size is 0; pack the model again", m->name);
    if (has_functions(s) && (!s->function_groups || hidden % s->function_groups || s->hidden % s->function_groups))
        return refuse(m, error, "function_groups", s->function_groups, "does not divide every width; pack it again");
    if (!has_splines(s)) return MKB_OK;
    if (s->intervals < 1 || s->degree < 1 || !(s->low < s->high) || !(s->high - s->low < 1e30f) || s->scale_group)
        return fail(error, MKB_ERROR_FORMAT, "%s: the splines' grid has no meaning; pack the model again", m->name);
    if ((uint64_t)MAX(hidden, s->hidden) * basis_size(s) > MAX_COLUMNS)
        return refuse(m, error, "grid_size", s->intervals, "makes matrices too wide; use a coarser grid");
    return MKB_OK;
}

static int check_mixture(const mkb_model *m, char *error) {
    const settings *s = &m->set;
    if (!s->experts || !s->top_k || s->top_k > s->experts)
        return refuse(m, error, "top_k", s->top_k, "does not fit the number of experts; pack the model again");
    if (!s->groups || s->experts % s->groups || s->top_groups > s->groups ||
        (s->top_groups && (uint64_t)s->top_groups * (s->experts / s->groups) < s->top_k))
        return refuse(m, error, "n_group", s->groups, "does not fit the experts; pack the model again");
    return check_experts(m, s->expert_hidden, error);
}

/* Bytes of the state: heads' matrices and the inputs that convolutions remember, of all layers. */
static int check_state(mkb_model *m, char *error) {
    const settings *s = &m->set;
    uint64_t head = (uint64_t)s->key_dim * round_up(s->value_dim, TILE) * 4, total = 0;
    for (uint32_t i = 0; i < s->layers; i++)
        total += (m->layers[i].attention ? 0 : head * s->heads) + 2ull * s->taps * s->hidden * 4;
    m->state_bytes = total;
    /* A context would ask for so much, whatever the file holds. */
    if (total > MAX(1ull << 30, 16 * m->size))
        return refuse(m, error, "a state of", total >> 30, "GiB is not plausible; pack it again");
    return MKB_OK;
}

static int check_settings(mkb_model *m, char *error) {
    const settings *s = &m->set;
    int any_dense = 0, any_mixture = 0, status = MKB_OK;
    for (uint32_t i = 0; i < s->layers; i++) *(m->layers[i].mixture ? &any_mixture : &any_dense) = 1;
    if (s->tokenizer_size > s->vocab_size || s->document_token >= s->tokenizer_size)
        return refuse(m, error, "tokenizer_size", s->tokenizer_size, "does not fit vocab_size or document_token");
    if (s->key_dim % 2) return refuse(m, error, "key_dim", s->key_dim, "is odd; pack the model again");
    if ((uint64_t)s->heads * MAX(s->key_dim, s->value_dim) > MAX_COLUMNS)
        return refuse(m, error, "num_heads", s->heads, "makes matrices too wide; pack the model again");
    if (any_mixture) status = check_mixture(m, error);
    if (!status && any_dense) status = check_experts(m, s->dense_hidden, error);
    return status ? status : check_state(m, error);
}

/* What the settings say about one tensor; dtypes is a set of bits, 0 if the model has no such tensor. */
typedef struct { uint32_t count, rows, columns, dtypes; } shape;

static shape matrix_shape(const settings *s, uint32_t count, uint32_t rows, uint32_t columns) {
    return (shape){count, rows, columns, s->quantized ? 1u << TERNARY | 1u << BASE3 : 1u << FP32 | 1u << FP16};
}

static shape expert_shape(const settings *s, int part, uint32_t count, uint32_t inner) {
    static const shape none = {0, 0, 0, 0};
    uint32_t d = s->hidden, k = basis_size(s), terms = s->expert_type == RATIONAL ? 10 : 4;
    if (!count) return none;
    if (part == INNER || part == OUTER)
        return has_functions(s) ? (shape){count, s->function_groups, terms, 1u << FP32} : none;
    if (has_splines(s)) {
        if (part == INNER_BASE) return matrix_shape(s, count, inner, d);
        if (part == INNER_SPLINE) return matrix_shape(s, count, inner, d * k);
        if (part == OUTER_BASE) return matrix_shape(s, count, d, inner);
        return part == OUTER_SPLINE ? matrix_shape(s, count, d, inner * k) : none;
    }
    if (part == UP || (part == GATE && s->expert_type == SWIGLU)) return matrix_shape(s, count, inner, d);
    return part == DOWN ? matrix_shape(s, count, d, inner) : none;
}

static shape layer_shape(const settings *s, const layer *l, int which) {
    shape none = {0, 0, 0, 0}, taps = {1, s->taps, s->hidden, 1u << FP32};
    uint32_t keys = s->heads * s->key_dim, values = s->heads * s->value_dim;
    switch (which) {
    case MIXER_QUERY:
    case MIXER_KEY: return matrix_shape(s, 1, keys, s->hidden);
    case MIXER_VALUE:
    case MIXER_GATE: return matrix_shape(s, 1, values, s->hidden);
    case MIXER_OUT: return matrix_shape(s, 1, s->hidden, values);
    case MIXER_CONVOLUTION:
    case CONVOLUTION: return s->taps ? taps : none;
    case ROUTER_WEIGHT: return l->mixture ? (shape){1, s->experts, s->hidden, 1u << FP32} : none;
    case ROUTER_BIAS: return l->mixture ? (shape){1, 1, s->experts, 1u << FP32} : none;
    }
    if (which < SHARED) return expert_shape(s, which - ROUTED, l->mixture ? s->experts : 0, s->expert_hidden);
    if (l->mixture) return expert_shape(s, which - SHARED, s->shared, s->expert_hidden);
    return expert_shape(s, which - SHARED, 1, s->dense_hidden);
}

static shape model_shape(const settings *s, int which) {
    if (which == LOG_DECAY) return (shape){1, 1, s->heads, 1u << FP32};
    return (shape){1, s->vocab_size, s->hidden, 1u << FP32 | 1u << FP16 | 1u << INT8};
}

/* Place of a file's role in the table of a layer, or −1. */
static int layer_tensor(uint32_t role) {
    if (role >= 16 && role <= 22) return MIXER_QUERY + (int)(role - 16);
    if (role == 32 || role == 33) return ROUTER_WEIGHT + (int)(role - 32);
    if (role >= 48 && role < 48 + EXPERT_PARTS) return ROUTED + (int)(role - 48);
    if (role >= 64 && role < 64 + EXPERT_PARTS) return SHARED + (int)(role - 64);
    return -1;
}

static uint64_t tiles_of(uint32_t n) { return ((uint64_t)n + TILE - 1) / TILE; }

static uint64_t matrix_bytes(uint32_t dtype, uint32_t rows, uint32_t columns) {
    uint64_t values = (uint64_t)rows * columns;
    switch (dtype) {
    case FP32: return values * 4;
    case FP16: return values * 2;
    case INT8: return values;
    case TERNARY: return tiles_of(rows) * tiles_of(columns) * TILE_BYTES;
    }
    return (values + 4) / 5;
}

static uint32_t scales_of(const settings *s, uint32_t dtype, uint32_t rows) {
    if (dtype == INT8) return rows;
    if (dtype != TERNARY && dtype != BASE3) return 0;
    return s->scale_group ? (rows + s->scale_group - 1) / s->scale_group : 1;
}

/* Is [offset, offset + bytes) inside the file and behind its header, and does it begin at a multiple of 64? */
static int inside(const mkb_model *m, uint64_t offset, uint64_t bytes) {
    return offset % 64 == 0 && offset >= HEADER_BYTES && offset <= m->size && bytes <= m->size - offset;
}

/* Keep memory that is freed with the model. */
static void *keep_copy(mkb_model *m, uint64_t bytes) {
    void *memory;
    if (m->num_copies == m->room_for_copies) {
        size_t room = m->room_for_copies * 2 + 16;
        void **grown = realloc(m->copies, room * sizeof *grown);
        if (!grown) return NULL;
        m->copies = grown, m->room_for_copies = room;
    }
    memory = allocate(bytes, 1);
    if (memory) m->copies[m->num_copies++] = memory;
    return memory;
}

/* Put row-major codes in base 3 into tiles. */
static void expand_base3(const unsigned char *from, uint32_t rows, uint32_t columns, unsigned char *to) {
    static const unsigned power[5] = {1, 3, 9, 27, 81};
    size_t across = (size_t)tiles_of(columns), i = 0;
    memset(to, 0x55, (size_t)tiles_of(rows) * across * TILE_BYTES);
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < columns; c++, i++) {
            unsigned code = from[i / 5] / power[i % 5] % 3, shift = 2 * (unsigned)(c % TILE / 4);
            unsigned char *byte = to + ((r / TILE * across + c / TILE) * TILE + r % TILE) * 4 + c % 4;
            *byte = (unsigned char)((*byte & ~(3u << shift)) | code << shift);
        }
}

static int expand_tensor(mkb_model *m, tensor *t, char *error) {
    uint64_t bytes = matrix_bytes(TERNARY, t->rows, t->columns);
    unsigned char *tiles = keep_copy(m, bytes * t->count);
    if (!tiles) return fail(error, MKB_ERROR_MEMORY, "%s: no memory to expand a matrix", m->name);
    for (uint32_t i = 0; i < t->count; i++)
        expand_base3(t->values + i * t->stride, t->rows, t->columns, tiles + i * bytes);
    t->values = tiles, t->stride = bytes, t->dtype = TERNARY;
    return MKB_OK;
}

/* Numbers as this machine reads them: those of the file, but for big-endian machines. */
static int convert_tensor(mkb_model *m, tensor *t, char *error) {
    uint64_t bytes = matrix_bytes(t->dtype, t->rows, t->columns), scales = (uint64_t)t->count * t->scale_count;
    if (!BIG_ENDIAN_HOST) return MKB_OK;
    if (scales) {
        float *copy = keep_copy(m, scales * 4);
        if (!copy) return fail(error, MKB_ERROR_MEMORY, "%s: no memory to convert scales", m->name);
        copy_words(copy, t->scales, (size_t)scales);
        t->scales = copy;
    }
    if (t->dtype != FP32 && t->dtype != FP16) return MKB_OK;
    unsigned char *copy = keep_copy(m, bytes * t->count);
    if (!copy) return fail(error, MKB_ERROR_MEMORY, "%s: no memory to convert a matrix", m->name);
    for (uint64_t i = 0, unit = t->dtype == FP32 ? 4 : 2; i < bytes * t->count; i++)
        copy[i] = t->values[i / bytes * t->stride + (i % bytes) / unit * unit + (unit - 1 - i % unit)];
    t->values = copy, t->stride = bytes;
    return MKB_OK;
}

/* Check a record against the shape that the settings ask for, and fill in `t`. */
static int read_tensor(mkb_model *m, const unsigned char *record, shape want, tensor *t, char *error) {
    uint32_t role = read_u32(record) & 0xffff, dtype = read_u32(record) >> 16, scales = read_u32(record + 20);
    uint64_t offset = read_u64(record + 24), stride = read_u64(record + 32), bytes = read_u64(record + 48);
    uint64_t scales_offset = read_u64(record + 40), unit = dtype == FP32 ? 4 : dtype == FP16 ? 2 : 1;
    if (t->values) return refuse(m, error, "the tensor of role", role, "appears twice; pack the model again");
    if (!want.dtypes) return refuse(m, error, "the tensor of role", role, "does not belong to this model; pack it again");
    if (dtype >= DTYPES || !(want.dtypes >> dtype & 1))
        return refuse(m, error, "a tensor has dtype", dtype, "which its role does not allow; pack the model again");
    if (read_u32(record + 8) != want.count || read_u32(record + 12) != want.rows || read_u32(record + 16) != want.columns)
        return refuse(m, error, "the shape of the tensor of role", role, "does not fit the settings; pack it again");
    if (scales != scales_of(&m->set, dtype, want.rows) || bytes != matrix_bytes(dtype, want.rows, want.columns))
        return refuse(m, error, "the size of the tensor of role", role, "does not fit its shape; pack it again");
    if (want.count > 1 && (stride < bytes || stride % unit || stride > m->size / (want.count - 1)))
        return refuse(m, error, "the stride of the tensor of role", role, "does not fit its size; pack it again");
    if (!inside(m, offset, stride * (want.count - 1) + bytes) ||
        (scales && !inside(m, scales_offset, (uint64_t)want.count * scales * 4)))
        return refuse(m, error, "the tensor of role", role, "lies outside the file; copy or pack it again");
    *t = (tensor){m->bytes + offset, NULL, stride, dtype, want.count, want.rows, want.columns, scales};
    if (scales) t->scales = (const float *)(const void *)(m->bytes + scales_offset);
    int status = convert_tensor(m, t, error);
    return status || dtype != BASE3 ? status : expand_tensor(m, t, error);
}

static int read_record(mkb_model *m, const unsigned char *record, char *error) {
    uint32_t role = read_u32(record) & 0xffff, number = read_u32(record + 4);
    int which = layer_tensor(role);
    if (role < MODEL_TENSORS && number == 0)
        return read_tensor(m, record, model_shape(&m->set, (int)role), &m->tensors[role], error);
    if (which < 0 || number >= m->set.layers)
        return refuse(m, error, "a tensor has the unknown role", role, "or layer; get a newer runtime or pack it again");
    layer *l = &m->layers[number];
    return read_tensor(m, record, layer_shape(&m->set, l, which), &l->tensors[which], error);
}

static int check_complete(const mkb_model *m, char *error) {
    for (int which = 0; which < MODEL_TENSORS; which++)
        if (!m->tensors[which].values)
            return refuse(m, error, "the model's tensor", (uint64_t)which, "is missing; pack the model again");
    for (uint32_t i = 0; i < m->set.layers; i++)
        for (int which = 0; which < LAYER_TENSORS; which++)
            if (!m->layers[i].tensors[which].values && layer_shape(&m->set, &m->layers[i], which).dtypes)
                return refuse(m, error, "a tensor is missing in layer", i, "; pack the model again");
    return MKB_OK;
}

static uint64_t bytes_with_scales(const tensor *t) {
    return matrix_bytes(t->dtype, t->rows, t->columns) + (uint64_t)t->scale_count * 4;
}

/* Parameters, and those that one token uses: of the embedding that is one row. */
static void count_parameters(mkb_model *m) {
    const settings *s = &m->set;
    uint64_t head = (uint64_t)s->vocab_size * s->hidden;
    m->parameters = 2 * head, m->active_parameters = head + s->hidden;
    m->bytes_per_token = bytes_with_scales(&m->tensors[HEAD]);
    for (uint32_t i = 0; i < s->layers; i++)
        for (int which = 0; which < LAYER_TENSORS; which++) {
            const tensor *t = &m->layers[i].tensors[which];
            uint64_t each = (uint64_t)t->rows * t->columns;
            uint64_t used = which >= ROUTED && which < SHARED ? s->top_k : t->count;
            /* The biases of routers are no parameters: nothing is trained in them by gradient. */
            if (!t->values || which == ROUTER_BIAS) continue;
            m->parameters += each * t->count, m->active_parameters += each * used;
            m->bytes_per_token += bytes_with_scales(t) * used;
        }
}

static int read_tensors(mkb_model *m, char *error) {
    uint32_t count = read_u32(m->bytes + 200);
    uint64_t offset = read_u64(m->bytes + 216);
    if (!inside(m, offset, (uint64_t)count * RECORD_BYTES))
        return refuse(m, error, "the table of tensors at", offset, "lies outside the file; copy or pack it again");
    for (uint32_t i = 0; i < count; i++) {
        int status = read_record(m, m->bytes + offset + (uint64_t)i * RECORD_BYTES, error);
        if (status) return status;
    }
    int status = check_complete(m, error);
    if (!status) count_parameters(m);
    return status;
}

static int read_layers(mkb_model *m, char *error) {
    enum { LEAST_TENSORS = 7 }; /* of a layer: five matrices of its mixer, two of its feed-forward */
    uint64_t offset = read_u64(m->bytes + 208);
    if (!inside(m, offset, m->set.layers) || m->size / RECORD_BYTES / LEAST_TENSORS < m->set.layers)
        return refuse(m, error, "the table of layers at", offset, "lies outside the file; copy or pack it again");
    m->layers = calloc(m->set.layers, sizeof *m->layers);
    if (!m->layers) return fail(error, MKB_ERROR_MEMORY, "%s: no memory for the table of layers", m->name);
    for (uint32_t i = 0; i < m->set.layers; i++) {
        unsigned flags = m->bytes[offset + i];
        if (flags > 3) return refuse(m, error, "a layer has the unknown kind", flags, "; get a newer runtime");
        m->layers[i].attention = flags & 1, m->layers[i].mixture = flags >> 1;
    }
    return MKB_OK;
}

static int read_part(const mkb_model *m, size_t at, const char *what, const unsigned char **part, uint64_t *size,
                     char *error) {
    uint64_t offset = read_u64(m->bytes + at), bytes = read_u64(m->bytes + at + 8);
    *part = m->bytes, *size = bytes;
    if (!bytes) return MKB_OK;
    if (!inside(m, offset, bytes)) return refuse(m, error, what, offset, "lies outside the file; copy or pack it again");
    *part = m->bytes + offset;
    return MKB_OK;
}

static int check_header(const mkb_model *m, char *error) {
    static const unsigned char magic[8] = {0x89, 'M', 'K', 'B', '\r', '\n', 0x1a, '\n'};
    size_t compared = (size_t)MIN(m->size, 8);
    if (!m->size || memcmp(m->bytes, magic, compared))
        return fail(error, MKB_ERROR_FORMAT, "%s is not a model file of MixKABRN; make one with `mixkabrn pack`", m->name);
    if (m->size < HEADER_BYTES)
        return refuse(m, error, "the file ends after", m->size, "bytes, within its header; copy it again");
    if (read_u32(m->bytes + 8) != FORMAT_VERSION)
        return refuse(m, error, "the format's version is", read_u32(m->bytes + 8), "and this runtime reads 1; update it");
    if (read_u32(m->bytes + 12) != HEADER_BYTES)
        return refuse(m, error, "the header's size is", read_u32(m->bytes + 12), "instead of 512; copy the file again");
    if (read_u64(m->bytes + 16) != m->size)
        return fail(error, MKB_ERROR_FORMAT, "%s has %llu bytes, but its header says %llu; copy it again", m->name,
                    (unsigned long long)m->size, (unsigned long long)read_u64(m->bytes + 16));
    return MKB_OK;
}

static int check_sha256(const mkb_model *m, char *error) {
    static const unsigned char zeros[32];
    unsigned char digest[32];
    sha256_state s;
    sha256_begin(&s);
    sha256_add(&s, m->bytes, 24);
    sha256_add(&s, zeros, 32);
    sha256_add(&s, m->bytes + 56, (size_t)m->size - 56);
    sha256_end(&s, digest);
    if (!memcmp(digest, m->sha256, 32)) return MKB_OK;
    return fail(error, MKB_ERROR_FORMAT, "%s is damaged: its sha256 differs from the one in its header; copy it again",
                m->name);
}

static int read_model(mkb_model *m, int verify, char *error) {
    int status = check_header(m, error);
    if (!status) status = read_settings(m, error);
    if (!status && verify) status = check_sha256(m, error);
    if (!status) status = read_layers(m, error);
    if (!status) status = check_settings(m, error);
    if (!status) status = read_part(m, 224, "the configuration at", &m->config, &m->config_bytes, error);
    if (!status) status = read_part(m, 240, "the tokenizer at", &m->tokenizer, &m->tokenizer_bytes, error);
    if (!status) status = read_part(m, 256, "the chat template at", &m->template_text, &m->template_bytes, error);
    if (!status) status = read_tensors(m, error);
    return status ? status : tokenizer_check(m, error);
}

static int read_whole_file(mkb_model *m, int file, char *error) {
    uint64_t done = 0;
    unsigned char *bytes = m->mapped = allocate(m->size, 1);
    if (!bytes) return fail(error, MKB_ERROR_MEMORY, "%s: no memory for %llu bytes", m->name, (unsigned long long)m->size);
    while (done < m->size) {
        ssize_t got = read(file, bytes + done, (size_t)MIN(m->size - done, 1u << 30));
        if (got <= 0) return fail(error, MKB_ERROR_FILE, "%s: cannot be read: %s", m->name, strerror(errno));
        done += (uint64_t)got;
    }
    m->bytes = bytes;
    return MKB_OK;
}

static int map_file(mkb_model *m, int file, char *error) {
#ifndef MIXKABRN_NO_MMAP
    void *mapped = mmap(NULL, (size_t)m->size, PROT_READ, MAP_PRIVATE, file, 0);
    if (mapped != MAP_FAILED) {
        m->mapped = mapped, m->is_mapped = 1, m->bytes = mapped;
        return MKB_OK;
    }
#endif
    return read_whole_file(m, file, error);
}

/* Open a regular file for reading, or say why not and return −1. Others are not waited for: a FIFO may never be written. */
static int open_regular(const char *path, const char *name, const char *wanted, struct stat *about, char *error) {
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) return fail(error, -1, "%s: cannot be opened: %s", name, strerror(errno));
    if (!fstat(file, about) && S_ISREG(about->st_mode)) return file;
    close(file);
    return fail(error, -1, "%s is not a file that can be read; name %s", name, wanted);
}

static int open_file(mkb_model *m, const char *path, char *error) {
    struct stat about;
    int file = open_regular(path, m->name, "a model file", &about, error), status = MKB_OK;
    if (file < 0) return MKB_ERROR_FILE;
    m->opened = about;
    if ((uint64_t)about.st_size > SIZE_MAX / 2)
        status = fail(error, MKB_ERROR_FILE, "%s is too large for a 32-bit machine", m->name);
    else if (!about.st_size)
        status = fail(error, MKB_ERROR_FORMAT, "%s is empty; copy or pack it again", m->name);
    else
        m->size = (uint64_t)about.st_size, status = map_file(m, file, error);
    close(file);
    return status;
}

static mkb_model *new_model(const char *path) {
    mkb_model *m = calloc(1, sizeof *m);
    if (!m) return NULL;
    size_t length = strlen(path), shown = MIN(length, sizeof m->name - 1);
    /* The end of a long path says more than its beginning. */
    memcpy(m->name, path + length - shown, shown);
    return m;
}

void mkb_model_close(mkb_model *m) {
    if (!m) return;
    for (size_t i = 0; i < m->num_copies; i++) free(m->copies[i]);
    free(m->copies);
    free(m->layers);
    free(m->path);
    tokenizer_close(&m->tables);
#ifndef MIXKABRN_NO_MMAP
    if (m->is_mapped) munmap(m->mapped, (size_t)m->size);
#endif
    if (!m->is_mapped) free(m->mapped);
    free(m);
}

static int finish_open(mkb_model *m, int status, mkb_model **model) {
    *model = status ? NULL : m;
    if (status) mkb_model_close(m);
    return status;
}

static int choose_kernels(char *error);

int mkb_model_open(const char *path, int verify, mkb_model **model, char error[MKB_ERROR_BYTES]) {
    *model = NULL;
    int status = choose_kernels(error);
    if (status) return status;
    mkb_model *m = new_model(path);
    if (!m) return fail(error, MKB_ERROR_MEMORY, "no memory for a model");
    m->path = strdup(path);
    status = m->path ? open_file(m, path, error) : fail(error, MKB_ERROR_MEMORY, "no memory for a model");
    return finish_open(m, status ? status : read_model(m, verify, error), model);
}

int mkb_model_open_memory(const void *bytes, size_t size, int verify, mkb_model **model, char error[MKB_ERROR_BYTES]) {
    *model = NULL;
    int status = choose_kernels(error);
    if (status) return status;
    if (!bytes || (uintptr_t)bytes % 8) return fail(error, MKB_ERROR_ARGUMENT, "the model's memory is not 8-byte aligned");
    mkb_model *m = new_model("the model in memory");
    if (!m) return fail(error, MKB_ERROR_MEMORY, "no memory for a model");
    m->bytes = bytes, m->size = size;
    return finish_open(m, read_model(m, verify, error), model);
}

static long nanoseconds_of(const struct stat *about) {
#ifdef __APPLE__
    return about->st_mtimensec;
#else
    return about->st_mtim.tv_nsec;
#endif
}

int mkb_model_changed(const mkb_model *m) {
    struct stat now;
    if (!m->path) return 0;
    if (stat(m->path, &now) || now.st_ino != m->opened.st_ino || now.st_dev != m->opened.st_dev) return 2;
    return now.st_size != m->opened.st_size || now.st_mtime != m->opened.st_mtime ||
           nanoseconds_of(&now) != nanoseconds_of(&m->opened);
}

void mkb_model_info(const mkb_model *m, mkb_info *info) {
    memset(info, 0, sizeof *info);
    info->vocab_size = m->set.vocab_size, info->tokenizer_size = m->set.tokenizer_size;
    info->document_token = m->set.document_token, info->hidden_size = m->set.hidden, info->num_layers = m->set.layers;
    info->step = m->step, info->file_bytes = m->size;
    info->parameters = m->parameters, info->active_parameters = m->active_parameters;
    info->state_bytes = m->state_bytes, info->bytes_per_token = m->bytes_per_token;
    for (uint32_t i = 0; i < m->set.layers; i++) info->attention_layers += (uint32_t)m->layers[i].attention;
    memcpy(info->sha256, m->sha256, 32);
    memcpy(info->tokenizer_sha256, m->tokenizer_sha256, 32);
}

const char *mkb_model_config(const mkb_model *m, size_t *bytes) {
    *bytes = (size_t)m->config_bytes;
    return (const char *)m->config;
}

const char *mkb_model_template(const mkb_model *m, size_t *bytes) {
    *bytes = (size_t)m->template_bytes;
    return (const char *)m->template_text;
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

/* ---- 4 kernels ---- */

/* Sums of floats have one order on all machines: 16 lanes, which are added up at the end. */
enum { LANES = 16 };

/* A row on its way into a product: normalized, and rounded to int8 codes if the model is quantized. */
typedef struct {
    int8_t *codes;  /* padded with zeros to a multiple of 16; NULL for plain models */
    float *values;  /* normalized, not rounded; NULL if nobody reads them */
    float scale;    /* a value is its code / scale */
    int32_t total;  /* of the codes */
} row_out;

/* Of a row: its squares' sum and its largest magnitude. */
typedef struct { float squares, most; } row_size;

/* A learned function of each group of channels, of codes·factor or of values·factor. */
typedef struct {
    uint32_t kind, groups; /* RATIONAL, CHEBYSHEV, or RELU2 in one group */
    const float *coefficients;
    const int8_t *codes;
    const float *values;
    float factor, center, reach;
} row_function;

/* B-splines on a uniform grid, continued in straight lines outside it. */
typedef struct {
    uint32_t intervals, degree;
    float low, high, per_step, peak;                     /* peak: the largest value inside the grid */
    float values[MAX_DEGREE + 1], slopes[MAX_DEGREE + 1]; /* of the first functions at the low end, a step */
} spline_grid;

/* Expanded inputs of a layer of splines: silu of each, and its K basis functions side by side. */
typedef struct { row_out base, splines; } spline_out;

/* One head over some tokens: S ← decay·S + kᵀv, out = q·S. The state [V/16][K][16] stays in registers while tokens
 * pass, four keys at a time, so that one token and many give the same bits. */
typedef struct {
    float *state, *out;
    const float *q, *k, *v;
    size_t key, value, tokens, key_stride, value_stride; /* strides from token to token */
    float decay;
} retention_job;

/* Softmax attention of one query over `seen` keys, in blocks of which the largest score is found first. */
typedef struct {
    const float *q, *k, *v;
    float *out;
    size_t key, value, seen, key_stride, value_stride;
} attention_job;

enum { ATTENTION_BLOCK = 64 };

/* Sums of tiles → results: (sum − total of the codes)·factor of each token, by the rows' scales if there are several;
 * stored, or added with a weight. */
enum { MOST_TOKENS = 64 };
typedef struct {
    const int32_t *sums; /* [tiles][tokens][16] */
    size_t tiles, tokens, rows;
    int32_t totals[MOST_TOKENS];
    float factors[MOST_TOKENS], weights[MOST_TOKENS];
    float *out[MOST_TOKENS];
    const float *scales;         /* of rows from `first_row` on, `scale_group` rows each; NULL: one for all */
    size_t first_row, scale_group;
    int add;
} sums_job;

typedef struct {
    void (*norm_row)(const float *x, size_t n, row_out *out);
    void (*gate_row)(const float *gate, const float *up, size_t n, float *y, row_out *out);
    void (*function_row)(const row_function *f, size_t n, float *y, row_out *out);
    void (*spline_row)(const spline_grid *g, const float *x, size_t n, spline_out *out);
    void (*retention)(const retention_job *job);
    void (*attention)(const attention_job *job);
    void (*norm_head)(float *x, size_t n, float eps, float times);
    void (*rotate)(float *x, const float *cosine, const float *sine, size_t half, float times);
    void (*convolve)(float *y, const float *const *inputs, const float *weights, size_t taps, size_t n);
    void (*finish_sums)(const sums_job *job);
    void (*plain_dots)(const void *weights, int halves, size_t n, const float *const *x, size_t count, float *out);
    void (*add_columns)(float *y, const float *columns, size_t stride, const float *x, size_t count, size_t n);
} float_kernels;

/* The one order of a sum. */
static float sum_lanes(const float *lanes) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += lanes[i];
    return total;
}

#endif /* KIND */
#ifdef KIND


/* The float kernels, compiled once for each kind of machine: KIND is its name, WIDTH the floats in one of its registers,
 * TARGET what its functions are compiled for. All names that depend on these end in the kind, by the macros that stand
 * where this part is included. Vectors longer than registers would be simpler, but GCC keeps those in memory. */
typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(16)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(16)));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH), aligned(16)));
typedef uint16_t hvec __attribute__((vector_size(2 * WIDTH)));

/* Vectors are passed by address: GCC has a remark on every build for those that are wider than registers. Inlined it is
 * the same. */
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec magnitude_of(const vec *x_) {
    vec x = *x_;
    return (vec)((uvec)x & 0x7fffffffu);
}
INLINE vec pick_of(const ivec *which_, const vec *x_, const vec *y_) {
    ivec which = *which_;
    vec x = *x_, y = *y_;
    return (vec)((which & (ivec)x) | (~which & (ivec)y));
}
INLINE vec larger_of(const vec *x_, const vec *y_) {
    vec x = *x_, y = *y_;
    return pick(x > y, x, y);
}
INLINE vec smaller_of(const vec *x_, const vec *y_) {
    vec x = *x_, y = *y_;
    return pick(x < y, x, y);
}
/* The whole number next to |x| < 2²², half to even: fp32 has no room for a fraction beside 1.5·2²³. */
INLINE vec nearest_of(const vec *x_) {
    vec x = *x_;
    return (x + 12582912.0f) - 12582912.0f;
}

INLINE int32_t whole_sum_of(const ivec *x_) {
    ivec x = *x_;
    int32_t part[WIDTH], total = 0;
    memcpy(part, &x, sizeof part);
    for (int i = 0; i < WIDTH; i++) total += part[i];
    return total;
}

INLINE float largest_of(const vec *x_) {
    vec x = *x_;
    float most = x[0];
    UNROLL
    for (int i = 1; i < WIDTH; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* Up to WIDTH numbers of a row of which `rest` are left; zeros behind them. */
INLINE vec load(const float *from, size_t rest) {
    vec x = {0};
    if (rest >= WIDTH) memcpy(&x, from, sizeof x);
    else memcpy(&x, from, rest * 4);
    return x;
}

INLINE void store_of(float *to, size_t rest, const vec *x_) {
    vec x = *x_;
    if (rest >= WIDTH) memcpy(to, &x, sizeof x);
    else memcpy(to, &x, rest * 4);
}

/* fp16 as its bits say; no model holds infinities. */
INLINE vec load_halves(const uint16_t *from, size_t rest) {
    hvec x = {0};
    if (rest >= WIDTH) memcpy(&x, from, sizeof x);
    else memcpy(&x, from, rest * 2);
    uvec bits = __builtin_convertvector(x, uvec);
    vec value = (vec)((bits & 0x7fffu) << 13) * 5.192296858534828e33f; /* 2¹¹², the difference of the exponents */
    return (vec)((uvec)value | (bits & 0x8000u) << 16);
}

/* Weights of a plain model. */
INLINE vec load_weights(const void *weights, int halves, size_t i, size_t rest) {
    return halves ? load_halves((const uint16_t *)weights + i, rest) : load((const float *)weights + i, rest);
}

/* eˣ for x within ±87, and that of the nearer end beyond, to 1.5 units in the last place. NaN stays. */
INLINE vec exponential_of(const vec *x_) {
    vec x = *x_;
    x = pick(x > 87.0f, all(87.0f), pick(x < -87.0f, all(-87.0f), x));
    /* eˣ = 2ⁿ·eʳ, |r| ≤ ln 2 / 2. ln 2 is taken off in two parts, of which the first makes an exact product. */
    vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = (((((r * (1.0f / 720) + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6) * r + 0.5f) * r + 1.0f) * r + 1.0f;
    /* n stands in the last bits beside 1.5·2²³; from there it is moved to an exponent's place. */
    return (vec)((uvec)p + ((uvec)shifted << 23));
}

INLINE vec sigmoid_of(const vec *x_) {
    vec x = *x_;
    return 1.0f / (1.0f + exponential(-x));
}

/* Codes of numbers that are scaled. NaN becomes 0; the row's scale says that it was there. */
INLINE ivec codes_of(const vec *x_) {
    vec x = *x_;
    vec code = nearest(pick(x > 127.0f, all(127.0f), pick(x < -128.0f, all(-128.0f), pick(x == x, x, all(0)))));
    return __builtin_convertvector(code, ivec);
}

/* Write codes of up to 16 numbers times `times`, and zeros behind them; returns the codes' sum, lane by lane. They are
 * made bytes in a loop because compilers take vectors of fewer than 16 bytes apart. */
INLINE ivec write_codes(int8_t *to, const float *x, size_t rest, float times) {
    int32_t whole[LANES];
    ivec total = {0};
    UNROLL
    for (size_t at = 0; at < LANES; at += WIDTH) {
        ivec some = codes(load(x + at, rest > at ? rest - at : 0) * times);
        memcpy(whole + at, &some, sizeof some);
        total += some;
    }
    for (size_t lane = 0; lane < LANES; lane++) to[lane] = (int8_t)whole[lane];
    return total;
}

/* Add the products of a row to 16 sums: inputs i, i + 16, i + 32 … to sum i. */
INLINE void add_products_body(float *lanes, const void *weights, int halves, const float *x, size_t n) {
    enum { PARTS = LANES / WIDTH };
    vec total[PARTS];
    size_t i = 0;
    memcpy(total, lanes, sizeof total);
    for (; i + LANES <= n; i += LANES)
        UNROLL
        for (size_t p = 0; p < PARTS; p++)
            total[p] += load_weights(weights, halves, i + p * WIDTH, WIDTH) * load(x + i + p * WIDTH, WIDTH);
    memcpy(lanes, total, sizeof total);
    for (size_t lane = 0; i < n; i++, lane++) lanes[lane] += (load_weights(weights, halves, i, 1) * x[i])[0];
}

TARGET static __attribute__((noinline)) void add_products(float *lanes, const float *x, const float *y, size_t n) {
    add_products_body(lanes, x, 0, y, n);
}

TARGET static float dot(const float *x, const float *y, size_t n) {
    float lanes[LANES] = {0};
    add_products(lanes, x, y, n);
    return sum_lanes(lanes);
}

TARGET static __attribute__((noinline)) float largest_magnitude(const float *x, size_t n) {
    vec most = {0};
    EACH(i, rest, n, most = larger(magnitude(load(x + i, rest)), most));
    return largest(most);
}

/* RMSNorm and the absmax quantizer of y [n]. */
TARGET static __attribute__((noinline)) void finish_row(const float *y, size_t n, row_size size, row_out *out) {
    float norm = 1.0f / sqrtf(size.squares / (float)n + 1e-6f), peak = norm * size.most;
    out->scale = out->codes ? 127.0f / (peak < 1e-5f ? 1e-5f : peak) : 1.0f;
    if (out->values) EACH(i, rest, n, store(out->values + i, rest, load(y + i, rest) * norm));
    if (!out->codes) return;
    float times = norm * out->scale;
    ivec total = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) total += write_codes(out->codes + i, y + i, LANES, times);
    if (i < n) total += write_codes(out->codes + i, y + i, n - i, times);
    out->total = whole_sum(total);
}

TARGET static void NAMED(norm_row)(const float *x, size_t n, row_out *out) {
    row_size size = {dot(x, x, n), largest_magnitude(x, n)};
    finish_row(x, n, size, out);
}

/* silu(gate)·up, normalized. */
TARGET static void NAMED(gate_row)(const float *gate, const float *up, size_t n, float *y, row_out *out) {
    EACH_ONCE(i, rest, n, {
        vec z = load(gate + i, rest);
        store(y + i, rest, z * sigmoid(z) * load(up + i, rest));
    });
    NAMED(norm_row)(y, n, out);
}

INLINE vec rational_of(const float *c, const vec *z_) {
    vec z = *z_;
    vec p = ((((c[5] * z + c[4]) * z + c[3]) * z + c[2]) * z + c[1]) * z + c[0];
    vec inner = (((c[9] * z + c[8]) * z + c[7]) * z + c[6]) * z;
    return p * (1.0f / (1.0f + magnitude(inner)));
}

/* Σ cₙTₙ(u), and beyond the range a straight line. */
INLINE vec chebyshev_of(const float *c, const vec *z_) {
    vec z = *z_;
    vec u = pick(z > 1.0f, all(1.0f), pick(z < -1.0f, all(-1.0f), z)), outside = z - u;
    vec t2 = 2.0f * u * u - 1.0f, t3 = 2.0f * u * t2 - u;
    vec slope = c[1] + 4.0f * c[2] * u + c[3] * (6.0f * t2 + 3.0f);
    return c[0] + c[1] * u + c[2] * t2 + c[3] * t3 + slope * outside;
}

/* Codes as numbers; by a loop of 16 for the same reason as in write_codes. */
INLINE void spread_codes(const int8_t *from, size_t n, float *to) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        int32_t whole[LANES];
        for (size_t lane = 0; lane < LANES; lane++) whole[lane] = from[i + lane];
        UNROLL
        for (size_t at = 0; at < LANES; at += WIDTH) {
            ivec some;
            memcpy(&some, whole + at, sizeof some);
            store(to + i + at, WIDTH, __builtin_convertvector(some, vec));
        }
    }
    for (; i < n; i++) to[i] = (float)from[i];
}

INLINE vec function_of(const row_function *f, const float *c, const vec *z_) {
    vec z = *z_;
    if (f->kind == RATIONAL) return rational(c, z);
    if (f->kind == CHEBYSHEV) return chebyshev(c, z - f->center / f->reach);
    return larger(z, all(0)) * z;
}

/* RELU2 squares a normalized row: else the 1e-6 in the norm of the squares would change small ones. Uses y. */
INLINE float function_factor(const row_function *f, const float *x, size_t n, float *y) {
    if (f->kind == CHEBYSHEV) return f->factor / f->reach;
    if (f->kind != RELU2) return f->factor;
    EACH_ONCE(i, rest, n, store(y + i, rest, load(x + i, rest) * f->factor));
    float squares = dot(y, y, n);
    if (f->codes) spread_codes(f->codes, n, y); /* which were x */
    return f->factor * (1.0f / sqrtf(squares / (float)n + 1e-6f));
}

TARGET static void NAMED(function_row)(const row_function *f, size_t n, float *y, row_out *out) {
    size_t width = n / f->groups, terms = f->kind == RATIONAL ? 10 : f->kind == CHEBYSHEV ? 4 : 0;
    const float *x = f->codes ? y : f->values;
    if (f->codes) spread_codes(f->codes, n, y);
    float factor = function_factor(f, x, n, y), lanes[LANES] = {0};
    for (size_t g = 0; g < f->groups; g++) {
        const float *c = f->coefficients + g * terms;
        size_t first = g * width;
        EACH_ONCE(i, rest, width, store(y + first + i, rest, function(f, c, load(x + first + i, rest) * factor)));
        add_products(lanes, y + first, y + first, width);
    }
    row_size size = {sum_lanes(lanes), largest_magnitude(y, n)};
    finish_row(y, n, size, out);
}

/* The degree + 1 B-splines that are not zero, at a place 0…1 of an interval (Cox–de Boor on unit knots). */
INLINE void nonzero_splines_of(uint32_t degree, const vec *place_, vec *w) {
    vec place = *place_;
    w[0] = all(1.0f);
    for (uint32_t p = 1; p <= degree; p++) {
        vec before = {0};
        for (uint32_t r = 0; r <= p; r++) {
            vec here = r < p ? w[r] : all(0);
            w[r] = ((place + (float)(p - r)) * before + ((float)(r + 1) - place) * here) * (1.0f / (float)p);
            before = here;
        }
    }
}

/* The values at WIDTH inputs, and the interval of each. */
INLINE ivec splines_at_of(const spline_grid *g, const vec *x_, vec *w) {
    vec x = *x_;
    vec place = (x - g->low) * g->per_step, zero = {0};
    vec within = smaller(larger(place, zero), all((float)g->intervals)), beyond = place - within;
    ivec interval = __builtin_convertvector(within, ivec), last = (ivec){0} + (int32_t)(g->intervals - 1);
    ivec over = interval > last;
    interval = (over & last) | (~over & interval);
    nonzero_splines(g->degree, within - __builtin_convertvector(interval, vec), w);
    vec below = smaller(beyond, zero), above = larger(beyond, zero);
    for (uint32_t r = 0; r <= g->degree; r++) w[r] += below * g->slopes[r] - above * g->slopes[g->degree - r];
    return interval;
}

/* What no spline of the row exceeds; outside the grid the tangents decide. */
INLINE float spline_bound(const spline_grid *g, float farthest) {
    float beyond = (farthest - 0.5f * (g->high - g->low)) * g->per_step, most = g->peak;
    beyond = beyond > 0 ? beyond : 0;
    for (uint32_t r = 0; r <= g->degree; r++) {
        float value = fabsf(g->values[r] - beyond * g->slopes[r]);
        most = value > most ? value : most;
    }
    return most;
}

INLINE void spline_scales(const spline_grid *g, const float *x, size_t n, spline_out *out) {
    vec silu = all(1e-5f), far = {0};
    out->base.scale = out->splines.scale = 1.0f;
    if (!out->base.codes) return;
    EACH_ONCE(i, rest, n, {
        vec z = load(x + i, rest), distance = magnitude(z - 0.5f * (g->low + g->high));
        float kept[WIDTH] = {0};
        silu = larger(magnitude(z * sigmoid(z)), silu);
        store(kept, rest, distance); /* zeros behind the row's end may be far outside the grid */
        far = larger(load(kept, WIDTH), far);
    });
    out->splines.scale = 127.0f / spline_bound(g, largest(far));
    out->base.scale = 127.0f / largest(silu);
}

/* Codes of a vector, and their sum. */
INLINE void put_codes_of(int8_t *to, const ivec *whole_, int32_t *total) {
    ivec whole = *whole_;
    int32_t code[WIDTH];
    memcpy(code, &whole, sizeof code);
    for (size_t lane = 0; lane < WIDTH; lane++) to[lane] = (int8_t)code[lane];
    *total += whole_sum(whole);
}

/* Function k of input i stands at i·K + k; only degree + 1 of an input's K are not zero. */
INLINE void put_splines_of(size_t size, const ivec *interval_, uint32_t r, const vec *value_, size_t i, size_t lanes,
                           row_out *to) {
    ivec interval = *interval_;
    vec value = *value_;
    ivec whole = codes(value * to->scale);
    int32_t code[WIDTH], at[WIDTH];
    float values[WIDTH];
    memcpy(code, &whole, sizeof code);
    memcpy(at, &interval, sizeof at);
    memcpy(values, &value, sizeof values);
    for (size_t lane = 0; lane < lanes; lane++) {
        size_t place = (i + lane) * size + (size_t)at[lane] + r;
        if (to->codes) to->codes[place] = (int8_t)code[lane], to->total += code[lane];
        else to->values[place] = values[lane];
    }
}

INLINE void expand_inputs_of(const spline_grid *g, const vec *x_, size_t i, size_t rest, spline_out *out) {
    vec x = *x_;
    vec w[MAX_DEGREE + 1], silu = x * sigmoid(x);
    ivec interval = splines_at(g, x, w);
    for (uint32_t r = 0; r <= g->degree; r++)
        put_splines(g->intervals + g->degree, interval, r, w[r], i, MIN(rest, (size_t)WIDTH), &out->splines);
    if (out->base.values) store(out->base.values + i, rest, silu);
    else put_codes(out->base.codes + i, codes(silu * out->base.scale), &out->base.total);
}

TARGET static void NAMED(spline_row)(const spline_grid *g, const float *x, size_t n, spline_out *out) {
    size_t size = g->intervals + g->degree;
    spline_scales(g, x, n, out);
    if (out->splines.codes) memset(out->splines.codes, 0, n * size);
    else memset(out->splines.values, 0, n * size * 4);
    out->base.total = out->splines.total = 0;
    EACH_ONCE(i, rest, n, expand_inputs(g, load(x + i, rest), i, rest, out));
    /* Whole vectors were written. */
    if (out->base.codes) memset(out->base.codes + round_up(n, WIDTH), 0, round_up(n, LANES) - round_up(n, WIDTH));
}

/* Registers of values that tokens pass at a time: two share the broadcasts of keys and queries where they are short. */
#define ABREAST (WIDTH < LANES ? 2 : 1)

INLINE void retain_keys(const retention_job *j, vec (*s)[ABREAST], size_t keys, size_t i, size_t at, size_t rest) {
    for (size_t t = 0; t < j->tokens; t++) {
        const float *q = j->q + t * j->key_stride + i, *k = j->k + t * j->key_stride + i;
        const float *v = j->v + t * j->value_stride + at;
        float *out = j->out + t * j->value_stride + at;
        UNROLL
        for (size_t a = 0; a < ABREAST; a++) {
            size_t from = a * WIDTH, left = rest > from ? rest - from : 0;
            vec value = load(v + from, left), part[4];
            UNROLL
            for (size_t n = 0; n < keys; n++) {
                s[n][a] = s[n][a] * j->decay + k[n] * value;
                part[n] = q[n] * s[n][a];
            }
            vec total = keys == 4 ? (part[0] + part[1]) + (part[2] + part[3]) : part[0] + part[1];
            store(out + from, left, i ? load(out + from, left) + total : total);
        }
    }
}

/* The states of some keys in and out of registers; 16 values of one key are neighbors. */
INLINE void retain_some(const retention_job *j, float *state, size_t keys, size_t i, size_t at, size_t rest) {
    vec s[4][ABREAST];
    state += i * LANES;
    UNROLL
    for (size_t n = 0; n < keys; n++)
        UNROLL
        for (size_t a = 0; a < ABREAST; a++) s[n][a] = load(state + n * LANES + a * WIDTH, WIDTH);
    retain_keys(j, s, keys, i, at, rest);
    UNROLL
    for (size_t n = 0; n < keys; n++)
        UNROLL
        for (size_t a = 0; a < ABREAST; a++) store(state + n * LANES + a * WIDTH, WIDTH, s[n][a]);
}

INLINE void retain_block(const retention_job *j, size_t at, size_t rest) {
    float *state = j->state + at / LANES * LANES * j->key + at % LANES;
    size_t i = 0;
    for (; i + 4 <= j->key; i += 4) retain_some(j, state, 4, i, at, rest);
    if (i < j->key) retain_some(j, state, 2, i, at, rest);
}

TARGET static void NAMED(retention)(const retention_job *j) {
    size_t at = 0;
    for (; at + ABREAST * WIDTH <= j->value; at += ABREAST * WIDTH) retain_block(j, at, ABREAST * WIDTH);
    if (at < j->value) retain_block(j, at, j->value - at);
}

INLINE float attention_scores(const attention_job *j, size_t first, size_t count, float *score, float most) {
    float scale = 1.0f / sqrtf((float)j->key);
    for (size_t i = 0; i < count; i++) {
        score[i] = dot(j->q, j->k + (first + i) * j->key_stride, j->key) * scale;
        most = score[i] > most ? score[i] : most;
    }
    return most;
}

TARGET static void NAMED(attention)(const attention_job *j) {
    float score[ATTENTION_BLOCK], most = -INFINITY, total = 0;
    memset(j->out, 0, j->value * sizeof *j->out);
    for (size_t first = 0; first < j->seen; first += ATTENTION_BLOCK) {
        size_t count = MIN((size_t)ATTENTION_BLOCK, j->seen - first);
        float before = most;
        most = attention_scores(j, first, count, score, most);
        float shrink = before == -INFINITY ? 0.0f : expf(before - most);
        total *= shrink;
        for (size_t i = 0; i < count; i++) total += score[i] = expf(score[i] - most);
        EACH(at, rest, j->value, {
            vec out = load(j->out + at, rest) * shrink;
            for (size_t i = 0; i < count; i++) out += score[i] * load(j->v + (first + i) * j->value_stride + at, rest);
            store(j->out + at, rest, out);
        });
    }
    for (size_t i = 0; i < j->value; i++) j->out[i] *= 1.0f / total;
}

/* Divide by the root mean square and multiply by `times`, in place. */
TARGET static void NAMED(norm_head)(float *x, size_t n, float eps, float times) {
    float norm = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps) * times;
    EACH(i, rest, n, store(x + i, rest, load(x + i, rest) * norm));
}

/* Turn each pair (first half, second half) by its angle, times a factor, in place. */
TARGET static void NAMED(rotate)(float *x, const float *cosine, const float *sine, size_t half, float times) {
    EACH(i, rest, half, {
        vec left = load(x + i, rest), right = load(x + half + i, rest);
        vec c = load(cosine + i, rest), s = load(sine + i, rest);
        store(x + i, rest, (left * c - right * s) * times);
        store(x + half + i, rest, (left * s + right * c) * times);
    });
}

/* y += Σ w·x over the taps of a convolution. */
TARGET static void NAMED(convolve)(float *y, const float *const *inputs, const float *weights, size_t taps, size_t n) {
    EACH_ONCE(i, rest, n, {
        vec total = load(y + i, rest);
        for (size_t j = 0; j < taps; j++) total += load(inputs[j] + i, rest) * load(weights + j * n + i, rest);
        store(y + i, rest, total);
    });
}

/* `rest` rows of a tile, or all. */
INLINE void finish_tile(const sums_job *j, size_t tile, size_t rest, const float *scales) {
    const int32_t *from = j->sums + tile * j->tokens * TILE;
    for (size_t t = 0; t < j->tokens; t++, from += TILE) {
        float *out = j->out[t] + tile * TILE;
        EACH_ONCE(r, left, rest, {
            ivec sums;
            memcpy(&sums, from + r, sizeof sums);
            vec value = __builtin_convertvector(sums - j->totals[t], vec) * j->factors[t];
            if (scales) value *= load(scales + r, WIDTH);
            if (j->add) value = load(out + r, left) + j->weights[t] * value;
            store(out + r, left, value);
        });
    }
}

TARGET static void NAMED(finish_sums)(const sums_job *j) {
    for (size_t tile = 0; tile < j->tiles; tile++) {
        size_t rest = MIN(j->rows - tile * TILE, (size_t)TILE);
        float scales[TILE] = {0};
        for (size_t r = 0; j->scales && r < rest; r++)
            scales[r] = j->scales[(j->first_row + tile * TILE + r) / j->scale_group];
        finish_tile(j, tile, rest, j->scales ? scales : NULL);
    }
}

/* Σ w·x in fp32 for four inputs at a time, so that the weights are read, and converted, once. */
INLINE void four_dots(const void *weights, int halves, size_t n, const float *const *x, float *out) {
    float lanes[4][LANES];
    for (size_t first = 0; first < LANES; first += WIDTH) {
        vec total[4] = {{0}};
        for (size_t i = first; i < n; i += LANES) {
            size_t rest = n - i;
            vec w = load_weights(weights, halves, i, rest);
            UNROLL
            for (int t = 0; t < 4; t++) total[t] += w * load(x[t] + i, rest);
        }
        UNROLL
        for (int t = 0; t < 4; t++) memcpy(lanes[t] + first, &total[t], sizeof total[t]);
    }
    for (int t = 0; t < 4; t++) out[t] = sum_lanes(lanes[t]);
}

TARGET static void NAMED(plain_dots)(const void *weights, int halves, size_t n, const float *const *x, size_t count,
                              float *out) {
    for (; count >= 4; count -= 4, x += 4, out += 4) four_dots(weights, halves, n, x, out);
    for (; count; count--, x++, out++) {
        float lanes[LANES] = {0};
        if (halves) add_products_body(lanes, weights, 1, *x, n);
        else add_products(lanes, weights, *x, n);
        *out = sum_lanes(lanes);
    }
}

/* y += Σ x·column over the columns of a matrix, one after another. */
TARGET static void NAMED(add_columns)(float *y, const float *columns, size_t stride, const float *x, size_t count,
                                      size_t n) {
    EACH(i, rest, n, {
        vec total = load(y + i, rest);
        for (size_t r = 0; r < count; r++) total += x[r] * load(columns + r * stride + i, rest);
        store(y + i, rest, total);
    });
}

static const float_kernels NAMED(FLOATS) = {
    NAMED(norm_row),  NAMED(gate_row), NAMED(function_row), NAMED(spline_row),  NAMED(retention), NAMED(attention),
    NAMED(norm_head), NAMED(rotate),   NAMED(convolve),     NAMED(finish_sums), NAMED(plain_dots),
    NAMED(add_columns)};

#endif /* KIND */

#ifndef KIND

/* What ends in the kind. */
#define NAMED_AS(name, kind) name##_##kind
#define NAMED_FOR(name, kind) NAMED_AS(name, kind)
#define NAMED(name) NAMED_FOR(name, KIND)
#define vec NAMED(vec)
#define ivec NAMED(ivec)
#define uvec NAMED(uvec)
#define hvec NAMED(hvec)
#define all NAMED(all)
#define magnitude_of NAMED(magnitude_of)
#define pick_of NAMED(pick_of)
#define larger_of NAMED(larger_of)
#define smaller_of NAMED(smaller_of)
#define nearest_of NAMED(nearest_of)
#define whole_sum_of NAMED(whole_sum_of)
#define largest_of NAMED(largest_of)
#define load NAMED(load)
#define store_of NAMED(store_of)
#define spread_codes NAMED(spread_codes)
#define load_halves NAMED(load_halves)
#define load_weights NAMED(load_weights)
#define exponential_of NAMED(exponential_of)
#define sigmoid_of NAMED(sigmoid_of)
#define codes_of NAMED(codes_of)
#define put_codes_of NAMED(put_codes_of)
#define write_codes NAMED(write_codes)
#define add_products_body NAMED(add_products_body)
#define add_products NAMED(add_products)
#define dot NAMED(dot)
#define largest_magnitude NAMED(largest_magnitude)
#define finish_row NAMED(finish_row)
#define rational_of NAMED(rational_of)
#define chebyshev_of NAMED(chebyshev_of)
#define function_of NAMED(function_of)
#define function_factor NAMED(function_factor)
#define nonzero_splines_of NAMED(nonzero_splines_of)
#define splines_at_of NAMED(splines_at_of)
#define spline_bound NAMED(spline_bound)
#define spline_scales NAMED(spline_scales)
#define put_splines_of NAMED(put_splines_of)
#define expand_inputs_of NAMED(expand_inputs_of)
#define retain_keys NAMED(retain_keys)
#define retain_some NAMED(retain_some)
#define retain_block NAMED(retain_block)
#define attention_scores NAMED(attention_scores)
#define finish_tile NAMED(finish_tile)
#define four_dots NAMED(four_dots)

#define magnitude(x) magnitude_of((vec[]){x})
#define pick(which, x, y) pick_of((ivec[]){which}, (vec[]){x}, (vec[]){y})
#define larger(x, y) larger_of((vec[]){x}, (vec[]){y})
#define smaller(x, y) smaller_of((vec[]){x}, (vec[]){y})
#define nearest(x) nearest_of((vec[]){x})
#define whole_sum(x) whole_sum_of((ivec[]){x})
#define largest(x) largest_of((vec[]){x})
#define store(to, rest, x) store_of(to, rest, (vec[]){x})
#define exponential(x) exponential_of((vec[]){x})
#define sigmoid(x) sigmoid_of((vec[]){x})
#define codes(x) codes_of((vec[]){x})
#define put_codes(to, whole, total) put_codes_of(to, (ivec[]){whole}, total)
#define rational(c, z) rational_of(c, (vec[]){z})
#define chebyshev(c, z) chebyshev_of(c, (vec[]){z})
#define function(f, c, z) function_of(f, c, (vec[]){z})
#define nonzero_splines(degree, place, w) nonzero_splines_of(degree, (vec[]){place}, w)
#define splines_at(g, x, w) splines_at_of(g, (vec[]){x}, w)
#define put_splines(size, interval, r, value, i, lanes, to) \
    put_splines_of(size, (ivec[]){interval}, r, (vec[]){value}, i, lanes, to)
#define expand_inputs(g, x, i, rest, out) expand_inputs_of(g, (vec[]){x}, i, rest, out)

/* For each vector of a row of n; only the last can be short, and it has its own copy of the step. */
#define EACH(i, rest, n, ...)                                                                                         \
    do {                                                                                                               \
        size_t i = 0, rest = WIDTH;                                                                                    \
        for (; i + WIDTH <= (n); i += WIDTH) __VA_ARGS__;                                                              \
        rest = (n) - i;                                                                                                \
        if (rest) __VA_ARGS__;                                                                                         \
    } while (0)

/* The same with one copy of a step that is large. */
#define EACH_ONCE(i, rest, n, ...)                                                                                     \
    for (size_t i = 0, rest = (n); i < (n); i += WIDTH, rest = (n) - i) __VA_ARGS__

#ifdef HAS_AVX2
#define TARGET_AVX2 __attribute__((target("avx2")))
#define TARGET_AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512dq")))
#define KIND avx512
#define WIDTH 16
#define TARGET TARGET_AVX512
#include "mixkabrn.c"
#undef KIND
#undef WIDTH
#undef TARGET
#define KIND avx2
#define WIDTH 8
#define TARGET TARGET_AVX2
#include "mixkabrn.c"
#undef KIND
#undef WIDTH
#undef TARGET
#endif

/* Registers of four floats, or what the compiler makes of them. */
#define WIDTH 4
#if defined(__SSE2__) || !defined(ON_X86)
#define FLOATS_sse2 FLOATS_any
#else
#define KIND sse2
#define TARGET __attribute__((target("sse2")))
#include "mixkabrn.c"
#undef KIND
#undef TARGET
#endif
/* The last kind's names are those of the sections below. */
#define KIND any
#define TARGET
#include "mixkabrn.c"

/* Products of ternary tiles with int8 codes: out[(tile·tokens + t)·16 + r] = Σ stored·code over the columns, where a
 * stored value is the ternary one plus 1; the caller takes Σ code off. A row of codes is padded to whole tiles with
 * zeros. Sums are int32 and whole, so all kernels agree. */
typedef void ternary_kernel(const unsigned char *tiles, size_t across, size_t row_tiles, const int8_t *const *x,
                            size_t tokens, int32_t *out);

/* A vector as whole numbers that three products of bytes or two of 16-bit numbers make up: x·scale is
 * 2¹⁶·high + 2⁸·middle + low, and 2¹²·upper + lower. That is fp32's precision, in sums without rounding. */
typedef struct {
    size_t size, padded; /* padded with zeros to a multiple of 64 */
    int8_t *high, *middle, *low;
    int16_t *upper, *lower;
    int32_t sums[3];     /* of high, middle and low */
    double unit;         /* of the whole numbers */
} split_vector;

/* out[row] = Σ weight·x, whole. */
typedef void bytes_kernel(const int8_t *weights, size_t rows, const split_vector *x, int64_t *out);

enum { LARGEST_SPLIT = 127 * 65536 };

static void split_value(split_vector *x, size_t i, int32_t value) {
    int32_t low = (int8_t)(value & 0xff), middle = (int8_t)((value - low) / 256 & 0xff);
    int32_t lower = (value + 2048) & 0xfff;
    x->low[i] = (int8_t)low, x->middle[i] = (int8_t)middle, x->high[i] = (int8_t)((value - low - middle * 256) / 65536);
    x->lower[i] = (int16_t)(lower - 2048), x->upper[i] = (int16_t)((value - (lower - 2048)) / 4096);
    x->sums[0] += x->high[i], x->sums[1] += middle, x->sums[2] += low;
}

static void split(split_vector *x, const float *values) {
    float most = 0;
    for (size_t i = 0; i < x->size; i++) most = fabsf(values[i]) > most ? fabsf(values[i]) : most;
    /* Infinities and NaN become zeros times NaN. */
    int finite = most <= 3e38f;
    double scale = most > 1e-30f && finite ? LARGEST_SPLIT / (double)most : 1.0;
    memset(x->sums, 0, sizeof x->sums);
    for (size_t i = 0; i < x->size; i++) {
        finite = finite && values[i] == values[i];
        split_value(x, i, finite ? (int32_t)rint(values[i] * scale) : 0);
    }
    x->unit = finite ? 1.0 / scale : (double)NAN;
}

static void ternary_scalar(const unsigned char *tiles, size_t across, size_t row_tiles, const int8_t *const *x,
                           size_t tokens, int32_t *out) {
    for (size_t i = 0; i < row_tiles * tokens; i++, out += TILE) {
        const unsigned char *tile = tiles + i / tokens * across * TILE_BYTES;
        const int8_t *code = x[i % tokens];
        memset(out, 0, TILE * sizeof *out);
        for (size_t c = 0; c < across; c++, code += TILE)
            for (size_t r = 0; r < TILE; r++)
                for (size_t j = 0; j < 4; j++) {
                    int b = *tile++;
                    out[r] += (b & 3) * code[j] + (b >> 2 & 3) * code[4 + j] + (b >> 4 & 3) * code[8 + j] +
                              (b >> 6) * code[12 + j];
                }
    }
}

static int64_t split_dot(const int8_t *weights, const split_vector *x, size_t first) {
    int64_t upper = 0, lower = 0;
    for (size_t i = first; i < x->size; i++) {
        upper += weights[i] * x->upper[i];
        lower += weights[i] * x->lower[i];
    }
    return upper * 4096 + lower;
}

static void bytes_scalar(const int8_t *weights, size_t rows, const split_vector *x, int64_t *out) {
    for (size_t r = 0; r < rows; r++) out[r] = split_dot(weights + r * x->size, x, 0);
}

#if defined(HAS_AVX2) || defined(__ARM_NEON)
INLINE int32_t four_codes(const int8_t *code) {
    int32_t word;
    memcpy(&word, code, 4);
    return word;
}
#endif

#ifdef ON_X86

/* SSE2: bytes of even and of odd columns as 16-bit numbers, four rows at a time, for pmaddwd. A field is multiplied
 * where it stands, and the sum moved to its place at the end. */
#define TARGET_SSE2 __attribute__((target("sse2")))

TARGET_SSE2 static inline __attribute__((always_inline)) __m128i field_product(__m128i even, __m128i odd, int mask,
                                                                              __m128i x_even, __m128i x_odd) {
    __m128i keep = _mm_set1_epi16((short)mask);
    return _mm_add_epi32(_mm_madd_epi16(_mm_and_si128(even, keep), x_even),
                         _mm_madd_epi16(_mm_and_si128(odd, keep), x_odd));
}

TARGET_SSE2 static void ternary_sse2(const unsigned char *tiles, size_t across, size_t row_tiles,
                                     const int8_t *const *x, size_t tokens, int32_t *out) {
    for (size_t i = 0; i < row_tiles * tokens * 4; i++) {
        size_t pass = i / 4;
        const unsigned char *tile = tiles + pass / tokens * across * TILE_BYTES + i % 4 * 16;
        const int8_t *code = x[pass % tokens];
        __m128i sums[4] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
        for (size_t c = 0; c < across; c++, tile += TILE_BYTES, code += TILE) {
            __m128i w = _mm_loadu_si128((const __m128i *)(const void *)tile), odd = _mm_srli_epi16(w, 8);
            __m128i codes = _mm_loadu_si128((const __m128i *)(const void *)code), odds = _mm_srai_epi16(codes, 8);
            __m128i evens = _mm_srai_epi16(_mm_slli_epi16(codes, 8), 8);
#define SSE2_FIELD(f)                                                                                                  \
    sums[f] = _mm_add_epi32(sums[f], field_product(w, odd, 3 << 2 * f, _mm_shuffle_epi32(evens, 0x55 * f),             \
                                                   _mm_shuffle_epi32(odds, 0x55 * f)))
            SSE2_FIELD(0);
            SSE2_FIELD(1);
            SSE2_FIELD(2);
            SSE2_FIELD(3);
        }
        __m128i low = _mm_add_epi32(sums[0], _mm_srai_epi32(sums[1], 2));
        __m128i high = _mm_add_epi32(_mm_srai_epi32(sums[2], 4), _mm_srai_epi32(sums[3], 6));
        _mm_storeu_si128((__m128i *)(void *)(out + i * 4), _mm_add_epi32(low, high));
    }
}

TARGET_SSE2 static int64_t lanes_sse2(__m128i x) {
    int32_t lane[4];
    memcpy(lane, &x, sizeof lane);
    return (int64_t)lane[0] + lane[1] + lane[2] + lane[3];
}

TARGET_SSE2 static void bytes_sse2(const int8_t *weights, size_t rows, const split_vector *x, int64_t *out) {
    size_t whole = x->size / 16 * 16;
    for (size_t r = 0; r < rows; r++, weights += x->size) {
        __m128i upper = _mm_setzero_si128(), lower = upper;
        for (size_t i = 0; i < whole; i += 8) {
            __m128i w = _mm_loadl_epi64((const __m128i *)(const void *)(weights + i));
            w = _mm_srai_epi16(_mm_unpacklo_epi8(w, w), 8);
            upper = _mm_add_epi32(upper, _mm_madd_epi16(w, *(const __m128i *)(const void *)(x->upper + i)));
            lower = _mm_add_epi32(lower, _mm_madd_epi16(w, *(const __m128i *)(const void *)(x->lower + i)));
        }
        out[r] = lanes_sse2(upper) * 4096 + lanes_sse2(lower) + split_dot(weights, x, whole);
    }
}

/* SSSE3 and AVX2: pmaddubsw multiplies unsigned weights by signed codes into 16 bits. Fields 0 and 2 add at most 2·2·128
 * a step to `ones`, fields 1 and 3 four times that to `fours`, so that seven tiles fit before sums are widened. */
enum { NARROW_TILES = 7 };

#define TARGET_SSSE3 __attribute__((target("ssse3")))

TARGET_SSSE3 static inline __attribute__((always_inline)) __m128i widen_ssse3(__m128i total, __m128i ones,
                                                                             __m128i fours) {
    total = _mm_add_epi32(total, _mm_madd_epi16(ones, _mm_set1_epi16(1)));
    return _mm_add_epi32(total, _mm_madd_epi16(_mm_srai_epi16(fours, 2), _mm_set1_epi16(1)));
}

/* All 16 rows of a tile for one token; the broadcasts of its codes serve four registers. */
TARGET_SSSE3 static void tile_row_ssse3(const unsigned char *tile, size_t across, const int8_t *code, int32_t *out) {
    __m128i zero = _mm_setzero_si128(), total[4] = {zero, zero, zero, zero}, three = _mm_set1_epi8(3);
    __m128i twelve = _mm_set1_epi8(12);
    size_t step = across * TILE_BYTES;
    while (across) {
        size_t tiles = MIN(across, (size_t)NARROW_TILES);
        __m128i ones[4] = {zero, zero, zero, zero}, fours[4] = {zero, zero, zero, zero};
        across -= tiles;
        for (; tiles; tiles--, tile += TILE_BYTES, code += TILE) {
            __m128i x = _mm_loadu_si128((const __m128i *)(const void *)code);
            __builtin_prefetch(tile + 2 * step); /* the rows that come next but one */
            __m128i x0 = _mm_shuffle_epi32(x, 0x00), x1 = _mm_shuffle_epi32(x, 0x55);
            __m128i x2 = _mm_shuffle_epi32(x, 0xaa), x3 = _mm_shuffle_epi32(x, 0xff);
#define SSSE3_QUARTER(n)                                                                                               \
    do {                                                                                                               \
        __m128i w = _mm_loadu_si128((const __m128i *)(const void *)(tile + 16 * n)), v = _mm_srli_epi16(w, 4);         \
        ones[n] = _mm_add_epi16(ones[n], _mm_maddubs_epi16(_mm_and_si128(w, three), x0));                              \
        fours[n] = _mm_add_epi16(fours[n], _mm_maddubs_epi16(_mm_and_si128(w, twelve), x1));                           \
        ones[n] = _mm_add_epi16(ones[n], _mm_maddubs_epi16(_mm_and_si128(v, three), x2));                              \
        fours[n] = _mm_add_epi16(fours[n], _mm_maddubs_epi16(_mm_and_si128(v, twelve), x3));                           \
    } while (0)
            SSSE3_QUARTER(0);
            SSSE3_QUARTER(1);
            SSSE3_QUARTER(2);
            SSSE3_QUARTER(3);
        }
        UNROLL
        for (int n = 0; n < 4; n++) total[n] = widen_ssse3(total[n], ones[n], fours[n]);
    }
    UNROLL
    for (int n = 0; n < 4; n++) _mm_storeu_si128((__m128i *)(void *)(out + 4 * n), total[n]);
}

TARGET_SSSE3 static void ternary_ssse3(const unsigned char *tiles, size_t across, size_t row_tiles,
                                       const int8_t *const *x, size_t tokens, int32_t *out) {
    for (size_t i = 0; i < row_tiles * tokens; i++)
        tile_row_ssse3(tiles + i / tokens * across * TILE_BYTES, across, x[i % tokens], out + i * TILE);
}

#ifdef HAS_AVX2
TARGET_AVX2 static inline __attribute__((always_inline)) __m256i widen_avx2(__m256i total, __m256i ones,
                                                                           __m256i fours) {
    total = _mm256_add_epi32(total, _mm256_madd_epi16(ones, _mm256_set1_epi16(1)));
    return _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_srai_epi16(fours, 2), _mm256_set1_epi16(1)));
}

/* Two rows of tiles for one token, or one if `next` is the same. */
TARGET_AVX2 static void tile_rows_avx2(const unsigned char *tile, const unsigned char *next, size_t across,
                                       const int8_t *code, int32_t *out, int32_t *next_out) {
    __m256i zero = _mm256_setzero_si256(), total[4] = {zero, zero, zero, zero}, three = _mm256_set1_epi8(3);
    __m256i twelve = _mm256_set1_epi8(12);
    size_t step = across * TILE_BYTES;
    while (across) {
        size_t tiles = MIN(across, (size_t)NARROW_TILES);
        __m256i ones[4] = {zero, zero, zero, zero}, fours[4] = {zero, zero, zero, zero};
        across -= tiles;
        for (; tiles; tiles--, tile += TILE_BYTES, next += TILE_BYTES, code += TILE) {
            /* The rows that come next. */
            __builtin_prefetch(next + step);
            __builtin_prefetch(next + 2 * step);
            __m256i x0 = _mm256_set1_epi32(four_codes(code)), x1 = _mm256_set1_epi32(four_codes(code + 4));
            __m256i x2 = _mm256_set1_epi32(four_codes(code + 8)), x3 = _mm256_set1_epi32(four_codes(code + 12));
#define AVX2_HALF(n, from)                                                                                             \
    do {                                                                                                               \
        __m256i w = _mm256_loadu_si256((const __m256i *)(const void *)(from)), v = _mm256_srli_epi16(w, 4);            \
        ones[n] = _mm256_add_epi16(ones[n], _mm256_maddubs_epi16(_mm256_and_si256(w, three), x0));                     \
        fours[n] = _mm256_add_epi16(fours[n], _mm256_maddubs_epi16(_mm256_and_si256(w, twelve), x1));                  \
        ones[n] = _mm256_add_epi16(ones[n], _mm256_maddubs_epi16(_mm256_and_si256(v, three), x2));                     \
        fours[n] = _mm256_add_epi16(fours[n], _mm256_maddubs_epi16(_mm256_and_si256(v, twelve), x3));                  \
    } while (0)
            AVX2_HALF(0, tile);
            AVX2_HALF(1, tile + 32);
            AVX2_HALF(2, next);
            AVX2_HALF(3, next + 32);
        }
        UNROLL
        for (int n = 0; n < 4; n++) total[n] = widen_avx2(total[n], ones[n], fours[n]);
    }
    UNROLL
    for (int n = 0; n < 2; n++) _mm256_storeu_si256((__m256i *)(void *)(out + 8 * n), total[n]);
    UNROLL
    for (int n = 0; n < 2; n++) _mm256_storeu_si256((__m256i *)(void *)(next_out + 8 * n), total[2 + n]);
}

/* 8 rows of a row of tiles for four tokens: fields are taken apart once. */
TARGET_AVX2 static void four_tokens_avx2(const unsigned char *tile, size_t across, const int8_t *const *x, int32_t *out) {
    __m256i zero = _mm256_setzero_si256(), total[4] = {zero, zero, zero, zero}, three = _mm256_set1_epi8(3);
    __m256i twelve = _mm256_set1_epi8(12);
    for (size_t c = 0; c < across;) {
        size_t end = MIN(across, c + NARROW_TILES);
        __m256i ones[4] = {zero, zero, zero, zero}, fours[4] = {zero, zero, zero, zero};
        for (; c < end; c++, tile += TILE_BYTES) {
            __m256i w = _mm256_loadu_si256((const __m256i *)(const void *)tile), v = _mm256_srli_epi16(w, 4);
            __m256i field[4] = {_mm256_and_si256(w, three), _mm256_and_si256(w, twelve), _mm256_and_si256(v, three),
                                _mm256_and_si256(v, twelve)};
            UNROLL
            for (int t = 0; t < 4; t++) {
                const int8_t *code = x[t] + c * TILE;
                __m256i x0 = _mm256_set1_epi32(four_codes(code)), x1 = _mm256_set1_epi32(four_codes(code + 4));
                __m256i x2 = _mm256_set1_epi32(four_codes(code + 8)), x3 = _mm256_set1_epi32(four_codes(code + 12));
                ones[t] = _mm256_add_epi16(ones[t], _mm256_maddubs_epi16(field[0], x0));
                fours[t] = _mm256_add_epi16(fours[t], _mm256_maddubs_epi16(field[1], x1));
                ones[t] = _mm256_add_epi16(ones[t], _mm256_maddubs_epi16(field[2], x2));
                fours[t] = _mm256_add_epi16(fours[t], _mm256_maddubs_epi16(field[3], x3));
            }
        }
        UNROLL
        for (int t = 0; t < 4; t++) total[t] = widen_avx2(total[t], ones[t], fours[t]);
    }
    UNROLL
    for (int t = 0; t < 4; t++) _mm256_storeu_si256((__m256i *)(void *)(out + t * TILE), total[t]);
}

TARGET_AVX2 static void ternary_avx2(const unsigned char *tiles, size_t across, size_t row_tiles,
                                     const int8_t *const *x, size_t tokens, int32_t *out) {
    size_t row = across * TILE_BYTES, fours = tokens / 4 * 4;
    /* Tiles of some rows stay in the nearest cache while tokens pass. */
    for (size_t t = 0; t < fours; t += 4)
        for (size_t i = 0; i < 2 * row_tiles; i++)
            four_tokens_avx2(tiles + i / 2 * row + i % 2 * 32, across, x + t, out + (i / 2 * tokens + t) * TILE + i % 2 * 8);
    for (size_t i = 0; i < row_tiles; i += 2) {
        size_t next = i + 1 < row_tiles ? i + 1 : i;
        for (size_t t = fours; t < tokens; t++)
            tile_rows_avx2(tiles + i * row, tiles + next * row, across, x[t], out + (i * tokens + t) * TILE,
                           out + (next * tokens + t) * TILE);
    }
}

TARGET_AVX2 static int64_t lanes_avx2(__m256i x) {
    int32_t lane[8];
    int64_t total = 0;
    memcpy(lane, &x, sizeof lane);
    UNROLL
    for (int i = 0; i < 8; i++) total += lane[i];
    return total;
}

TARGET_AVX2 static void bytes_avx2(const int8_t *weights, size_t rows, const split_vector *x, int64_t *out) {
    size_t whole = x->size / 16 * 16;
    for (size_t r = 0; r < rows; r++, weights += x->size) {
        __m256i upper = _mm256_setzero_si256(), lower = upper;
        for (size_t i = 0; i < whole; i += 16) {
            __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(weights + i)));
            __builtin_prefetch(weights + i + 4096);
            upper = _mm256_add_epi32(upper,
                                     _mm256_madd_epi16(w, *(const __m256i *)(const void *)(x->upper + i)));
            lower = _mm256_add_epi32(lower,
                                     _mm256_madd_epi16(w, *(const __m256i *)(const void *)(x->lower + i)));
        }
        out[r] = lanes_avx2(upper) * 4096 + lanes_avx2(lower) + split_dot(weights, x, whole);
    }
}

#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define HAS_AVXVNNI 1
#define TARGET_AVXVNNI __attribute__((target("avx2,avxvnni")))

/* vpdpbusd adds four products of bytes to an int32; a field is multiplied where it stands. */
TARGET_AVXVNNI static void half_tile_avxvnni(const unsigned char *tile, size_t across, const int8_t *code,
                                             int32_t *out) {
    __m256i zero = _mm256_setzero_si256(), sums[4] = {zero, zero, zero, zero};
    for (size_t c = 0; c < across; c++, tile += TILE_BYTES, code += TILE) {
        __m256i w = _mm256_loadu_si256((const __m256i *)(const void *)tile);
        UNROLL
        for (int f = 0; f < 4; f++)
            sums[f] = _mm256_dpbusd_avx_epi32(sums[f], _mm256_and_si256(w, _mm256_set1_epi8((char)(3 << 2 * f))),
                                              _mm256_set1_epi32(four_codes(code + 4 * f)));
    }
    __m256i low = _mm256_add_epi32(sums[0], _mm256_srai_epi32(sums[1], 2));
    __m256i high = _mm256_add_epi32(_mm256_srai_epi32(sums[2], 4), _mm256_srai_epi32(sums[3], 6));
    _mm256_storeu_si256((__m256i *)(void *)out, _mm256_add_epi32(low, high));
}

TARGET_AVXVNNI static void ternary_avxvnni(const unsigned char *tiles, size_t across, size_t row_tiles,
                                           const int8_t *const *x, size_t tokens, int32_t *out) {
    for (size_t i = 0; i < row_tiles * tokens * 2; i++)
        half_tile_avxvnni(tiles + i / 2 / tokens * across * TILE_BYTES + i % 2 * 32, across, x[i / 2 % tokens],
                          out + i * 8);
}
#endif

#if defined(HAS_AVX2) && ((defined(__clang__) && __clang_major__ >= 8) || (!defined(__clang__) && __GNUC__ >= 9))
#define HAS_AVX512VNNI 1
#define TARGET_VNNI512 __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define VNNI512_INLINE TARGET_VNNI512 static inline __attribute__((always_inline))

VNNI512_INLINE __m512i join_fields(const __m512i *sums) {
    __m512i low = _mm512_add_epi32(sums[0], _mm512_srai_epi32(sums[1], 2));
    return _mm512_add_epi32(low,
                            _mm512_add_epi32(_mm512_srai_epi32(sums[2], 4), _mm512_srai_epi32(sums[3], 6)));
}

/* One token: `rows` rows of tiles at a time, so that a broadcast serves all; a register holds one tile. */
VNNI512_INLINE void one_token_vnni512(const unsigned char *tiles, size_t across, const int8_t *code, size_t rows,
                                      int32_t *out) {
    __m512i sums[4][4];
    UNROLL
    for (size_t r = 0; r < rows; r++)
        UNROLL
        for (int f = 0; f < 4; f++) sums[r][f] = _mm512_setzero_si512();
    for (size_t c = 0; c < across; c++, tiles += TILE_BYTES, code += TILE) {
        __m512i x[4];
        UNROLL
        for (int f = 0; f < 4; f++) x[f] = _mm512_set1_epi32(four_codes(code + 4 * f));
        UNROLL
        for (size_t r = 0; r < rows; r++) {
            const unsigned char *tile = tiles + r * across * TILE_BYTES;
            __m512i w = _mm512_loadu_si512(tile);
            /* The rows that come next; the machine's own prefetching loses its way among so many short streams. */
            __builtin_prefetch(tile + rows * across * TILE_BYTES);
            UNROLL
            for (int f = 0; f < 4; f++)
                sums[r][f] = _mm512_dpbusd_epi32(sums[r][f],
                                                 _mm512_and_si512(w, _mm512_set1_epi8((char)(3 << 2 * f))), x[f]);
        }
    }
    UNROLL
    for (size_t r = 0; r < rows; r++) _mm512_storeu_si512(out + r * TILE, join_fields(sums[r]));
}

/* Many tokens: a tile's fields are taken apart once, for `count` sums of tokens in as many registers. */
VNNI512_INLINE void tokens_vnni512(const unsigned char *tiles, size_t across, const int8_t *const *x, size_t count,
                                   int32_t *out) {
    __m512i sums[12], three = _mm512_set1_epi8(3);
    UNROLL
    for (size_t t = 0; t < count; t++) sums[t] = _mm512_setzero_si512();
    for (size_t c = 0; c < across; c++) {
        __m512i w = _mm512_loadu_si512(tiles + c * TILE_BYTES), field[4];
        field[0] = _mm512_and_si512(w, three);
        field[1] = _mm512_and_si512(_mm512_srli_epi32(w, 2), three);
        field[2] = _mm512_and_si512(_mm512_srli_epi32(w, 4), three);
        field[3] = _mm512_and_si512(_mm512_srli_epi32(w, 6), three);
        UNROLL
        for (int f = 0; f < 4; f++)
            UNROLL
            for (size_t t = 0; t < count; t++)
                sums[t] = _mm512_dpbusd_epi32(sums[t], field[f],
                                              _mm512_set1_epi32(four_codes(x[t] + c * TILE + 4 * f)));
    }
    UNROLL
    for (size_t t = 0; t < count; t++) _mm512_storeu_si512(out + t * TILE, sums[t]);
}

TARGET_VNNI512 static void ternary_vnni512(const unsigned char *tiles, size_t across, size_t row_tiles,
                                           const int8_t *const *x, size_t tokens, int32_t *out) {
    size_t i = 0, row = across * TILE_BYTES;
    if (tokens == 1) {
        for (; i + 4 <= row_tiles; i += 4) one_token_vnni512(tiles + i * row, across, *x, 4, out + i * TILE);
        for (; i < row_tiles; i++) one_token_vnni512(tiles + i * row, across, *x, 1, out + i * TILE);
        return;
    }
    for (; i < row_tiles; i++, tiles += row, out += tokens * TILE) {
        size_t t = 0;
        for (; t + 12 <= tokens; t += 12) tokens_vnni512(tiles, across, x + t, 12, out + t * TILE);
        for (; t + 4 <= tokens; t += 4) tokens_vnni512(tiles, across, x + t, 4, out + t * TILE);
        for (; t < tokens; t++) tokens_vnni512(tiles, across, x + t, 1, out + t * TILE);
    }
}

/* Sums of the lanes of four registers. */
VNNI512_INLINE __m128i four_totals(const __m512i *x) {
    __m256i half[4];
    UNROLL
    for (int i = 0; i < 4; i++)
        half[i] = _mm256_add_epi32(_mm512_castsi512_si256(x[i]), _mm512_extracti64x4_epi64(x[i], 1));
    __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(half[0], half[1]), _mm256_hadd_epi32(half[2], half[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

/* Weights as unsigned bytes, 128 more than they are; what that adds is taken off at the end. */
VNNI512_INLINE void four_rows_vnni512(const int8_t *weights, const split_vector *x, int64_t *out) {
    __m512i sums[3][4], flip = _mm512_set1_epi8((char)128);
    int32_t total[3][4];
    UNROLL
    for (int p = 0; p < 3; p++)
        UNROLL
        for (int r = 0; r < 4; r++) sums[p][r] = _mm512_setzero_si512();
    for (size_t i = 0; i < x->size; i += 64) {
        __m512i high = _mm512_load_si512(x->high + i), middle = _mm512_load_si512(x->middle + i);
        __m512i low = _mm512_load_si512(x->low + i);
        __mmask64 present = x->size - i >= 64 ? ~0ull : (1ull << (x->size - i)) - 1;
        UNROLL
        for (int r = 0; r < 4; r++) {
            __builtin_prefetch(weights + (size_t)(r + 8) * x->size + i);
            __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(present, weights + (size_t)r * x->size + i), flip);
            sums[0][r] = _mm512_dpbusd_epi32(sums[0][r], w, high);
            sums[1][r] = _mm512_dpbusd_epi32(sums[1][r], w, middle);
            sums[2][r] = _mm512_dpbusd_epi32(sums[2][r], w, low);
        }
    }
    UNROLL
    for (int p = 0; p < 3; p++) _mm_storeu_si128((__m128i *)(void *)total[p], four_totals(sums[p]));
    UNROLL
    for (int r = 0; r < 4; r++)
        out[r] = ((int64_t)total[0][r] - 128ll * x->sums[0]) * 65536 +
                 ((int64_t)total[1][r] - 128ll * x->sums[1]) * 256 + ((int64_t)total[2][r] - 128ll * x->sums[2]);
}

TARGET_VNNI512 static void bytes_vnni512(const int8_t *weights, size_t rows, const split_vector *x, int64_t *out) {
    size_t r = 0;
    for (; r + 4 <= rows; r += 4) four_rows_vnni512(weights + r * x->size, x, out + r);
    bytes_avx2(weights + r * x->size, rows - r, x, out + r);
}
#endif

#ifdef HAS_AVXVNNI
static int cpu_has_avxvnni(void) {
    unsigned a = 0, b, c, d;
    if (!__builtin_cpu_supports("avx2") || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return 0;
    return a >> 4 & 1;
}
#endif
#ifdef HAS_AVX512VNNI
static int cpu_has_vnni512(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
#endif
static int cpu_has_avx2(void) { return __builtin_cpu_supports("avx2") != 0; }
#endif /* HAS_AVX2 */

static int cpu_has_sse2(void) { return __builtin_cpu_supports("sse2") != 0; }
static int cpu_has_ssse3(void) { return __builtin_cpu_supports("ssse3") != 0; }
#endif /* ON_X86 */

#if defined(__ARM_NEON)

/* Four rows a register. 16-bit lanes hold 2·128 for each field of 31 tiles before they are widened. */
static void ternary_neon(const unsigned char *tiles, size_t across, size_t row_tiles, const int8_t *const *x,
                         size_t tokens, int32_t *out) {
    for (size_t i = 0; i < row_tiles * tokens * 4; i++) {
        const unsigned char *tile = tiles + i / 4 / tokens * across * TILE_BYTES + i % 4 * 16;
        const int8_t *code = x[i / 4 % tokens];
        int32x4_t first = vdupq_n_s32(0), second = first;
        for (size_t left = across; left;) {
            size_t some = MIN(left, 31);
            int16x8_t a = vdupq_n_s16(0), b = a;
            for (left -= some; some; some--, tile += TILE_BYTES, code += TILE) {
                uint8x16_t w = vld1q_u8(tile);
#define NEON_FIELD(f, value)                                                                                           \
    do {                                                                                                               \
        int8x16_t v = vreinterpretq_s8_u8(value);                                                                      \
        int8x8_t c = vreinterpret_s8_s32(vdup_n_s32(four_codes(code + 4 * f)));                                        \
        a = vmlal_s8(a, vget_low_s8(v), c);                                                                            \
        b = vmlal_s8(b, vget_high_s8(v), c);                                                                           \
    } while (0)
                NEON_FIELD(0, vandq_u8(w, vdupq_n_u8(3)));
                NEON_FIELD(1, vandq_u8(vshrq_n_u8(w, 2), vdupq_n_u8(3)));
                NEON_FIELD(2, vandq_u8(vshrq_n_u8(w, 4), vdupq_n_u8(3)));
                NEON_FIELD(3, vshrq_n_u8(w, 6));
            }
            first = vpadalq_s16(first, a), second = vpadalq_s16(second, b);
        }
        vst1_s32(out + i * 4, vpadd_s32(vget_low_s32(first), vget_high_s32(first)));
        vst1_s32(out + i * 4 + 2, vpadd_s32(vget_low_s32(second), vget_high_s32(second)));
    }
}

static void bytes_neon(const int8_t *weights, size_t rows, const split_vector *x, int64_t *out) {
    size_t whole = x->size / 8 * 8;
    for (size_t r = 0; r < rows; r++, weights += x->size) {
        int32x4_t upper = vdupq_n_s32(0), lower = upper;
        int64x2_t total = vdupq_n_s64(0), fine = total;
        for (size_t i = 0; i < whole; i += 8) {
            int16x8_t w = vmovl_s8(vld1_s8(weights + i)), u = vld1q_s16(x->upper + i), l = vld1q_s16(x->lower + i);
            upper = vmlal_s16(vmull_s16(vget_low_s16(w), vget_low_s16(u)), vget_high_s16(w), vget_high_s16(u));
            lower = vmlal_s16(vmull_s16(vget_low_s16(w), vget_low_s16(l)), vget_high_s16(w), vget_high_s16(l));
            total = vpadalq_s32(total, upper), fine = vpadalq_s32(fine, lower);
        }
        out[r] = (vgetq_lane_s64(total, 0) + vgetq_lane_s64(total, 1)) * 4096 + vgetq_lane_s64(fine, 0) +
                 vgetq_lane_s64(fine, 1) + split_dot(weights, x, whole);
    }
}

static int cpu_has_neon(void) { return 1; }

#if defined(__aarch64__) && defined(__linux__)
#define HAS_DOTPROD 1
#define TARGET_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
TARGET_DOTPROD static void ternary_dotprod(const unsigned char *tiles, size_t across, size_t row_tiles,
                                           const int8_t *const *x, size_t tokens, int32_t *out) {
    uint8x16_t three = vdupq_n_u8(3);
    for (size_t i = 0; i < row_tiles * tokens; i++) {
        const unsigned char *tile = tiles + i / tokens * across * TILE_BYTES;
        const int8_t *code = x[i % tokens];
        int32x4_t sums[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
        for (size_t c = 0; c < across; c++, tile += TILE_BYTES, code += TILE) {
            int8x16_t v = vld1q_s8(code);
            for (int n = 0; n < 4; n++) {
                uint8x16_t w = vld1q_u8(tile + 16 * n);
                sums[n] = vdotq_laneq_s32(sums[n], vreinterpretq_s8_u8(vandq_u8(w, three)), v, 0);
                sums[n] = vdotq_laneq_s32(sums[n], vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(w, 2), three)), v, 1);
                sums[n] = vdotq_laneq_s32(sums[n], vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(w, 4), three)), v, 2);
                sums[n] = vdotq_laneq_s32(sums[n], vreinterpretq_s8_u8(vshrq_n_u8(w, 6)), v, 3);
            }
        }
        for (int n = 0; n < 4; n++) vst1q_s32(out + i * TILE + 4 * n, sums[n]);
    }
}

TARGET_DOTPROD static void bytes_dotprod(const int8_t *weights, size_t rows, const split_vector *x, int64_t *out) {
    size_t whole = x->size / 16 * 16;
    for (size_t r = 0; r < rows; r++, weights += x->size) {
        int32x4_t high = vdupq_n_s32(0), middle = high, low = high;
        for (size_t i = 0; i < whole; i += 16) {
            int8x16_t w = vld1q_s8(weights + i);
            high = vdotq_s32(high, w, vld1q_s8(x->high + i));
            middle = vdotq_s32(middle, w, vld1q_s8(x->middle + i));
            low = vdotq_s32(low, w, vld1q_s8(x->low + i));
        }
        out[r] = vaddlvq_s32(high) * 65536 + vaddlvq_s32(middle) * 256 + vaddlvq_s32(low) + split_dot(weights, x, whole);
    }
}

static int cpu_has_dotprod(void) { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; } /* HWCAP_ASIMDDP */
#endif
#endif /* __ARM_NEON */

#if defined(__wasm_simd128__)

/* As SSE2: even and odd columns as 16-bit numbers, four rows a register. */
static void ternary_wasm(const unsigned char *tiles, size_t across, size_t row_tiles, const int8_t *const *x,
                         size_t tokens, int32_t *out) {
    for (size_t i = 0; i < row_tiles * tokens * 4; i++) {
        const unsigned char *tile = tiles + i / 4 / tokens * across * TILE_BYTES + i % 4 * 16;
        const int8_t *code = x[i / 4 % tokens];
        v128_t sums[4] = {wasm_i32x4_splat(0), wasm_i32x4_splat(0), wasm_i32x4_splat(0), wasm_i32x4_splat(0)};
        for (size_t c = 0; c < across; c++, tile += TILE_BYTES, code += TILE) {
            v128_t w = wasm_v128_load(tile), odd = wasm_u16x8_shr(w, 8), codes = wasm_v128_load(code);
            v128_t odds = wasm_i16x8_shr(codes, 8), evens = wasm_i16x8_shr(wasm_i16x8_shl(codes, 8), 8);
#define WASM_FIELD(f)                                                                                                  \
    do {                                                                                                               \
        v128_t keep = wasm_i16x8_splat(3 << 2 * f);                                                                    \
        v128_t even_part = wasm_i32x4_dot_i16x8(wasm_v128_and(w, keep), wasm_i32x4_shuffle(evens, evens, f, f, f, f)); \
        v128_t odd_part = wasm_i32x4_dot_i16x8(wasm_v128_and(odd, keep), wasm_i32x4_shuffle(odds, odds, f, f, f, f));  \
        sums[f] = wasm_i32x4_add(sums[f], wasm_i32x4_add(even_part, odd_part));                                        \
    } while (0)
            WASM_FIELD(0);
            WASM_FIELD(1);
            WASM_FIELD(2);
            WASM_FIELD(3);
        }
        v128_t low = wasm_i32x4_add(sums[0], wasm_i32x4_shr(sums[1], 2));
        v128_t high = wasm_i32x4_add(wasm_i32x4_shr(sums[2], 4), wasm_i32x4_shr(sums[3], 6));
        wasm_v128_store(out + i * 4, wasm_i32x4_add(low, high));
    }
}

#ifdef __wasm_relaxed_simd__
/* Products of four bytes: weights of 0 to 2 leave the instruction none of its freedom. */
static void ternary_relaxed(const unsigned char *tiles, size_t across, size_t row_tiles, const int8_t *const *x,
                            size_t tokens, int32_t *out) {
    v128_t three = wasm_i8x16_splat(3);
    for (size_t i = 0; i < row_tiles * tokens; i++) {
        const unsigned char *tile = tiles + i / tokens * across * TILE_BYTES;
        const int8_t *code = x[i % tokens];
        v128_t sums[4] = {wasm_i32x4_splat(0), wasm_i32x4_splat(0), wasm_i32x4_splat(0), wasm_i32x4_splat(0)};
        for (size_t c = 0; c < across; c++, tile += TILE_BYTES, code += TILE) {
            v128_t v = wasm_v128_load(code), v0 = wasm_i32x4_shuffle(v, v, 0, 0, 0, 0);
            v128_t v1 = wasm_i32x4_shuffle(v, v, 1, 1, 1, 1), v2 = wasm_i32x4_shuffle(v, v, 2, 2, 2, 2);
            v128_t v3 = wasm_i32x4_shuffle(v, v, 3, 3, 3, 3);
            for (int n = 0; n < 4; n++) {
                v128_t w = wasm_v128_load(tile + 16 * n), s = sums[n];
                s = wasm_i32x4_relaxed_dot_i8x16_i7x16_add(v0, wasm_v128_and(w, three), s);
                s = wasm_i32x4_relaxed_dot_i8x16_i7x16_add(v1, wasm_v128_and(wasm_u16x8_shr(w, 2), three), s);
                s = wasm_i32x4_relaxed_dot_i8x16_i7x16_add(v2, wasm_v128_and(wasm_u16x8_shr(w, 4), three), s);
                sums[n] = wasm_i32x4_relaxed_dot_i8x16_i7x16_add(v3, wasm_v128_and(wasm_u16x8_shr(w, 6), three), s);
            }
        }
        for (int n = 0; n < 4; n++) wasm_v128_store(out + i * TILE + 4 * n, sums[n]);
    }
}
#endif

static int64_t lanes_wasm(v128_t x) {
    return (int64_t)wasm_i32x4_extract_lane(x, 0) + wasm_i32x4_extract_lane(x, 1) + wasm_i32x4_extract_lane(x, 2) +
           wasm_i32x4_extract_lane(x, 3);
}

static void bytes_wasm(const int8_t *weights, size_t rows, const split_vector *x, int64_t *out) {
    size_t whole = x->size / 16 * 16;
    for (size_t r = 0; r < rows; r++, weights += x->size) {
        v128_t upper = wasm_i32x4_splat(0), lower = upper;
        for (size_t i = 0; i < whole; i += 8) {
            v128_t w = wasm_i16x8_load8x8(weights + i);
            upper = wasm_i32x4_add(upper, wasm_i32x4_dot_i16x8(w, wasm_v128_load(x->upper + i)));
            lower = wasm_i32x4_add(lower, wasm_i32x4_dot_i16x8(w, wasm_v128_load(x->lower + i)));
        }
        out[r] = lanes_wasm(upper) * 4096 + lanes_wasm(lower) + split_dot(weights, x, whole);
    }
}

static int cpu_has_wasm(void) { return 1; }
#endif

typedef struct {
    const char *name;
    int (*supported)(void);
    ternary_kernel *ternary;
    bytes_kernel *bytes;
    const float_kernels *floats;
} kernel_set;

static int always(void) { return 1; }

/* The fastest first. */
static const kernel_set KERNELS[] = {
#ifdef HAS_AVX512VNNI
    {"avx512vnni", cpu_has_vnni512, ternary_vnni512, bytes_vnni512, &FLOATS_avx512},
#endif
#ifdef HAS_AVXVNNI
    {"avxvnni", cpu_has_avxvnni, ternary_avxvnni, bytes_avx2, &FLOATS_avx2},
#endif
#ifdef HAS_AVX2
    {"avx2", cpu_has_avx2, ternary_avx2, bytes_avx2, &FLOATS_avx2},
#endif
#ifdef ON_X86
    {"ssse3", cpu_has_ssse3, ternary_ssse3, bytes_sse2, &FLOATS_sse2},
    {"sse2", cpu_has_sse2, ternary_sse2, bytes_sse2, &FLOATS_sse2},
#endif
#ifdef HAS_DOTPROD
    {"dotprod", cpu_has_dotprod, ternary_dotprod, bytes_dotprod, &FLOATS_any},
#endif
#ifdef __ARM_NEON
    {"neon", cpu_has_neon, ternary_neon, bytes_neon, &FLOATS_any},
#endif
#ifdef __wasm_relaxed_simd__
    {"wasm-relaxed", cpu_has_wasm, ternary_relaxed, bytes_wasm, &FLOATS_any},
#endif
#ifdef __wasm_simd128__
    {"wasm", cpu_has_wasm, ternary_wasm, bytes_wasm, &FLOATS_any},
#endif
    {"scalar", always, ternary_scalar, bytes_scalar, &FLOATS_any},
};
enum { NUM_KERNELS = sizeof KERNELS / sizeof *KERNELS };

static const kernel_set *chosen_kernels;

static void list_kernels(char *text, size_t room) {
    size_t used = 0;
    for (int i = 0; i < NUM_KERNELS; i++)
        if (KERNELS[i].supported() && used < room)
            used += (size_t)snprintf(text + used, room - used, "%s%s", used ? ", " : "", KERNELS[i].name);
}

/* The fastest that this machine supports, or those that MIXKABRN_KERNELS names. */
static int choose_kernels(char *error) {
    const char *name = getenv("MIXKABRN_KERNELS");
    char list[128] = "";
    for (int i = 0; i < NUM_KERNELS; i++) {
        if (!KERNELS[i].supported() || (name && *name && strcmp(name, KERNELS[i].name))) continue;
        chosen_kernels = &KERNELS[i];
        return MKB_OK;
    }
    list_kernels(list, sizeof list);
    return fail(error, MKB_ERROR_ARGUMENT, "MIXKABRN_KERNELS=%.40s is not among this machine's kernels: %s", name, list);
}

const char *mkb_kernels(void) {
    if (!chosen_kernels && choose_kernels(NULL)) return "none";
    return chosen_kernels->name;
}

const char *mkb_version(void) { return MKB_VERSION; }

/* ---- 5 threads ---- */

/* Work on units [first, last), with the thread's own number. */
typedef void work_function(void *argument, int thread, size_t first, size_t last);

typedef struct worker worker;

/* Threads that wait for work: spinning at first, since the next part comes within microseconds, then asleep: another
 * process may need the core. Whoever comes first takes the next share, so a thread without a core holds nothing up. */
typedef struct {
    int threads;
    work_function *work;
    void *argument;
    size_t units;
#ifndef MIXKABRN_NO_THREADS
    worker *workers;
    int running; /* workers that were started */
    unsigned ticket;  /* generation of the work, and the number of the share that is to be taken next */
    unsigned pending; /* shares that are not done */
    unsigned asleep, waiting, stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
#endif
} thread_pool;

#ifdef MIXKABRN_NO_THREADS

static int pool_start(thread_pool *p, int threads) {
    (void)threads;
    p->threads = 1;
    return 0;
}

static void pool_stop(thread_pool *p) { (void)p; }

static void pool_run(thread_pool *p, work_function *work, void *argument, size_t units) {
    (void)p;
    work(argument, 0, 0, units);
}

#else

enum { MAX_THREADS = 256, TICKET_BITS = 9, SHARE_MASK = (1 << TICKET_BITS) - 1, YIELDS = 4 };
#define SPIN_SECONDS 30e-6

struct worker {
    thread_pool *pool;
    pthread_t thread;
    int number;
};

INLINE void pause_briefly(void) {
#if defined(ON_X86)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static void do_share(thread_pool *p, int thread, unsigned share) {
    size_t first = p->units * (size_t)share / (size_t)p->threads;
    size_t last = p->units * ((size_t)share + 1) / (size_t)p->threads;
    if (first < last) p->work(p->argument, thread, first, last);
    if (__atomic_sub_fetch(&p->pending, 1, __ATOMIC_SEQ_CST) || !__atomic_load_n(&p->waiting, __ATOMIC_SEQ_CST)) return;
    pthread_mutex_lock(&p->mutex);
    pthread_cond_signal(&p->done);
    pthread_mutex_unlock(&p->mutex);
}

/* Do the shares that nobody has taken. The work cannot change while a share of it is taken and not done. */
static void do_shares(thread_pool *p, int thread) {
    unsigned ticket = __atomic_load_n(&p->ticket, __ATOMIC_ACQUIRE);
    while ((ticket & SHARE_MASK) < (unsigned)p->threads) {
        if (!__atomic_compare_exchange_n(&p->ticket, &ticket, ticket + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) continue;
        do_share(p, thread, ticket & SHARE_MASK);
        ticket = __atomic_load_n(&p->ticket, __ATOMIC_ACQUIRE);
    }
}

static int has_work(thread_pool *p) {
    unsigned ticket = __atomic_load_n(&p->ticket, __ATOMIC_SEQ_CST);
    return (ticket & SHARE_MASK) < (unsigned)p->threads || __atomic_load_n(&p->stop, __ATOMIC_ACQUIRE);
}

static int is_done(thread_pool *p) { return !__atomic_load_n(&p->pending, __ATOMIC_SEQ_CST); }

/* Wait for what comes within microseconds; 0 if it did not. */
static int spin(thread_pool *p, int (*ready)(thread_pool *p)) {
    double end = seconds_now() + SPIN_SECONDS;
    do
        for (int i = 0; i < 16; i++) {
            if (ready(p)) return 1;
            pause_briefly();
        }
    while (seconds_now() < end);
    /* Where threads share a core, the one that is waited for needs it. */
    for (int i = 0; i < YIELDS; i++) {
        sched_yield();
        if (ready(p)) return 1;
    }
    return 0;
}

static void await_work(thread_pool *p) {
    if (spin(p, has_work)) return;
    pthread_mutex_lock(&p->mutex);
    for (;;) {
        __atomic_store_n(&p->asleep, 1, __ATOMIC_SEQ_CST);
        if (has_work(p)) break;
        pthread_cond_wait(&p->wake, &p->mutex);
    }
    pthread_mutex_unlock(&p->mutex);
}

static void *run_worker(void *argument) {
    worker *w = argument;
    while (!__atomic_load_n(&w->pool->stop, __ATOMIC_ACQUIRE)) {
        await_work(w->pool);
        do_shares(w->pool, w->number);
    }
    return NULL;
}

static void wake_workers(thread_pool *p) {
    if (!__atomic_load_n(&p->asleep, __ATOMIC_SEQ_CST)) return;
    pthread_mutex_lock(&p->mutex);
    __atomic_store_n(&p->asleep, 0, __ATOMIC_SEQ_CST);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
}

static void await_shares(thread_pool *p) {
    if (is_done(p) || spin(p, is_done)) return;
    pthread_mutex_lock(&p->mutex);
    __atomic_store_n(&p->waiting, 1, __ATOMIC_SEQ_CST);
    while (!is_done(p)) pthread_cond_wait(&p->done, &p->mutex);
    __atomic_store_n(&p->waiting, 0, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&p->mutex);
}

static void pool_run(thread_pool *p, work_function *work, void *argument, size_t units) {
    if (p->threads == 1 || units == 1) {
        work(argument, 0, 0, units);
        return;
    }
    p->work = work, p->argument = argument, p->units = units;
    __atomic_store_n(&p->pending, (unsigned)p->threads, __ATOMIC_RELAXED);
    __atomic_store_n(&p->ticket, ((p->ticket >> TICKET_BITS) + 1) << TICKET_BITS, __ATOMIC_SEQ_CST);
    wake_workers(p);
    do_shares(p, 0);
    await_shares(p);
}

static void pool_stop(thread_pool *p) {
    if (!p->workers) return;
    __atomic_store_n(&p->stop, 1, __ATOMIC_SEQ_CST);
    wake_workers(p);
    for (int i = 0; i < p->running; i++) pthread_join(p->workers[i].thread, NULL);
    pthread_cond_destroy(&p->done);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->mutex);
    free(p->workers);
}

/* Returns 0, or the reason why a thread could not be started. */
static int pool_start(thread_pool *p, int threads) {
    p->threads = MIN(threads, MAX_THREADS);
    if (p->threads == 1) return 0;
    p->workers = calloc((size_t)p->threads, sizeof *p->workers);
    if (!p->workers) return ENOMEM;
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->done, NULL);
    p->ticket = (unsigned)p->threads; /* no share to take yet */
    for (; p->running + 1 < p->threads; p->running++) {
        worker *w = &p->workers[p->running];
        *w = (worker){.pool = p, .number = p->running + 1};
        int status = pthread_create(&w->thread, NULL, run_worker, w);
        if (status) return status;
    }
    return 0;
}
#endif

/* ---- 6 forward pass ---- */

/* Shapes: T tokens that are read together, D hidden size, H heads, K and V widths of a head's keys and values,
 * E routed experts, S slots: a slot is one token in one expert, U hidden units of an expert, B basis functions of an
 * input. Rows of numbers are padded with zeros to a multiple of 16. */

enum {
    SUMS_TILES = 512,  /* tiles of int32 sums that a thread keeps at a time */
    HEAD_ROWS = 64     /* rows of the head at a time */
};

/* From row to row: padded, and never a power of two, at which the rows of many tokens would share places of the cache. */
static size_t row_stride(size_t n) { return round_up(n, LANES) + LANES; }

/* Rows on their way into products: int8 codes with a scale each, or plain values. */
typedef struct {
    int8_t *codes;
    float *values, *scales;
    int32_t *totals;
    size_t stride;
} row_set;

/* Products of one matrix with some rows: row i is rows[index[i]], its result goes to out[target[i]], either stored or
 * added with a weight. */
typedef struct {
    const tensor *weights;
    size_t matrix, count, stride;
    const row_set *rows;
    const uint32_t *index, *target;
    const float *weight; /* NULL: 1 */
    float *out;
    int add;
} product;

/* The tokens that visit one expert, neighbors among the slots. */
typedef struct { uint32_t expert, first, count; } visit;

/* A product of two thin matrices beside one of the model's: W·x becomes W·x + B·(A·x), R rows of A. */
typedef struct {
    uint32_t rank;         /* R; 0: none */
    size_t columns, stride;
    const int8_t *a;       /* [count][R][columns], of int8 inputs */
    const float *a_scales; /* [count][R] */
    const float *a_values; /* [count][R][columns], of inputs that are not rounded */
    const float *b;        /* [count][R][stride], the columns of B */
} low_rank;

/* Read-only, and shared by contexts, which count as users. Tables are of [layers·LAYER_TENSORS] or [layers]; NULL: none. */
struct mkb_adapter {
    const mkb_model *model;
    mkb_adapter_details details;
    low_rank *low_ranks; /* and one more, of the head */
    tensor *patched;
    float **states;      /* initial ones, as contexts hold them */
    uint32_t rank;       /* the largest */
    size_t columns;      /* the widest */
    int users;
    void *blocks;        /* of memory, each with the address of the next */
};

enum { MOST_ADAPTERS = 16 };

/* What a thread needs for A·x. */
typedef struct {
    split_vector row;
    int64_t *sums;   /* [R] */
    float *hidden;   /* [R] of all adapters */
    double *exact;   /* the same of the router */
} rank_scratch;

/* Random numbers, settings and the last tokens of section 10; a part of the saved state. */
enum { SAMPLER_WINDOW = 1024 };
typedef struct {
    uint64_t random[4];
    mkb_sampling settings;
    uint32_t window[SAMPLER_WINDOW]; /* a ring */
    uint32_t window_count;           /* tokens in it */
    uint32_t window_next;            /* where the next one goes */
    uint32_t drawn;                  /* 1 + a token that was drawn and not read; 0: none */
} sampler_state;

/* As `mixkabrn generate` has them. */
static const mkb_sampling DEFAULT_SAMPLING = {0.8f, 50, 1.0f, 0.0f, 1.0f, 64, 0};

struct mkb_context {
    const mkb_model *model;
    const kernel_set *kernels;
    thread_pool pool;
    uint64_t position;
    uint32_t chunk, max_tokens; /* most tokens that are read together, and room of the caches */
    size_t width, keys, values, hidden; /* D, H·K, H·V and U, padded */
    float **states;      /* of each layer: heads' matrices, or cached keys and values; NULL without */
    float **recent;      /* [2][taps][D] of each layer: inputs of the two convolutions, oldest first */
    float *state_memory; /* all of it but caches */
    size_t state_floats;
    float *stream, *mixed_in, *q, *k, *v, *gate, *mixed, *normed, *added; /* rows of tokens */
    float *up, *expert_gate;     /* [S][U] */
    float *cosine, *sine;        /* [T][K/2] */
    double *frequencies;         /* [K/2] */
    float *scores;               /* [threads][5·E], of the router */
    row_set inputs, heads, inner, hidden_rows, inner_splines, hidden_splines;
    uint32_t *choice;            /* [T][top_k] */
    float *choice_weight;
    uint32_t *slot_token, *identity;
    float *slot_weight;
    visit *visits;
    uint32_t *expert_counts;
    size_t num_slots, num_visits;
    product *products;
    size_t num_products;
    int32_t *sums;               /* [threads][SUMS_TILES·16] */
    float *scratch;              /* [threads][the widest row] */
    size_t scratch_row;
    split_vector last;           /* what the head reads */
    float *logits;               /* where the head writes */
    spline_grid grid;
    const mkb_adapter *adapters[MOST_ADAPTERS];
    float adapter_weights[MOST_ADAPTERS];
    size_t num_adapters;
    unsigned char adapters_mark[16]; /* a hash of them and their weights; zeros: none */
    rank_scratch *ranks;             /* [threads]; NULL: no low-rank factors */
    void *rank_memory;
    layer *patched;                  /* [layers]; NULL: no patch */
    const layer *layers;             /* those, or the model's */
    sampler_state sampler;
    uint32_t *candidates;        /* [tokenizer_size], of sampling */
    uint64_t *weights;           /* of each token */
    /* What the parts that threads work on read. */
    size_t tokens;
    uint32_t layer_number;
    const layer *layer;
    const uint32_t *ids;
    float *caches;
    void **memory;
    size_t num_memory;
};

static const float_kernels *floats_of(const mkb_context *c) { return c->kernels->floats; }

/* Where row i of a set is finished; codes or values, as the model wants it. */
static row_out row_at(const row_set *rows, size_t i) {
    row_out out = {rows->codes ? rows->codes + i * rows->stride : NULL,
                   rows->values ? rows->values + i * rows->stride : NULL, 1.0f, 0};
    return out;
}

static void keep_row(const row_set *rows, size_t i, const row_out *out) {
    rows->scales[i] = out->scale, rows->totals[i] = out->total;
}

/* What is the same for all tiles of a product. */
static void begin_sums(const mkb_context *c, const product *p, size_t at, sums_job *job) {
    const tensor *w = p->weights;
    const float *scales = w->scales + p->matrix * w->scale_count;
    job->tokens = MIN(p->count - at, (size_t)MOST_TOKENS), job->add = p->add;
    job->scales = w->scale_count > 1 ? scales : NULL, job->scale_group = c->model->set.scale_group;
    for (size_t t = 0; t < job->tokens; t++) {
        size_t from = p->index[at + t];
        job->totals[t] = p->rows->totals[from], job->factors[t] = 1.0f / p->rows->scales[from];
        if (w->scale_count == 1) job->factors[t] *= scales[0];
        /* What a function reads is divided by a scale. */
        if (p->out == c->up || p->out == c->expert_gate) job->factors[t] = 1.0f / (1.0f / job->factors[t]);
        job->weights[t] = p->weight ? p->weight[at + t] : 1.0f;
    }
}

/* 16-row tiles [first, last) of a ternary product, some at a time. */
static void run_ternary(const mkb_context *c, int thread, const product *p, size_t first, size_t last) {
    const tensor *w = p->weights;
    size_t across = (size_t)tiles_of(w->columns);
    const unsigned char *tiles = w->values + p->matrix * w->stride;
    int32_t *sums = c->sums + (size_t)thread * SUMS_TILES * TILE;
    for (size_t at = 0; at < p->count; at += MOST_TOKENS) {
        const int8_t *x[MOST_TOKENS];
        sums_job job;
        job.sums = sums;
        begin_sums(c, p, at, &job);
        for (size_t t = 0; t < job.tokens; t++) x[t] = p->rows->codes + p->index[at + t] * p->rows->stride;
        for (size_t tile = first, step = SUMS_TILES / job.tokens; tile < last; tile += step) {
            job.tiles = MIN(step, last - tile), job.first_row = tile * TILE, job.rows = w->rows - job.first_row;
            for (size_t t = 0; t < job.tokens; t++) job.out[t] = p->out + p->target[at + t] * p->stride + job.first_row;
            c->kernels->ternary(tiles + tile * across * TILE_BYTES, across, job.tiles, x, job.tokens, sums);
            floats_of(c)->finish_sums(&job);
        }
    }
}

static void run_plain(const mkb_context *c, const product *p, size_t first, size_t last) {
    const tensor *w = p->weights;
    size_t size = w->dtype == FP16 ? 2 : 4, rows = MIN(last * TILE, w->rows);
    const unsigned char *values = w->values + p->matrix * w->stride;
    for (size_t at = 0; at < p->count; at += MOST_TOKENS) {
        size_t count = MIN(p->count - at, (size_t)MOST_TOKENS);
        const float *x[MOST_TOKENS];
        float out[MOST_TOKENS];
        for (size_t t = 0; t < count; t++) x[t] = p->rows->values + p->index[at + t] * p->rows->stride;
        for (size_t r = first * TILE; r < rows; r++) {
            floats_of(c)->plain_dots(values + r * w->columns * size, size == 2, w->columns, x, count, out);
            for (size_t t = 0; t < count; t++) {
                float *to = p->out + p->target[at + t] * p->stride + r;
                *to = p->add ? *to + (p->weight ? p->weight[at + t] : 1.0f) * out[t] : out[t];
            }
        }
    }
}

/* --- low-rank factors --- */

static const low_rank *find_low_rank(const mkb_context *c, size_t adapter, size_t place) {
    const low_rank *all_of = c->adapters[adapter]->low_ranks;
    return all_of && all_of[place].rank ? &all_of[place] : NULL;
}

/* Where a tensor's factors are in an adapter's table. */
static size_t place_of(const mkb_context *c, const tensor *t) {
    return (size_t)c->layer_number * LAYER_TENSORS + (size_t)(t - c->layer->tensors);
}

/* weight·A·x of a row of codes, whole until it is scaled. */
static void reduce_codes(const mkb_context *c, rank_scratch *s, const low_rank *f, size_t matrix, const row_set *rows,
                         size_t i, float weight) {
    const int8_t *codes = rows->codes + i * rows->stride;
    const float *scales = f->a_scales + matrix * f->rank;
    size_t filled = round_up(f->columns, LANES);
    s->row.size = f->columns, s->row.sums[2] = rows->totals[i];
    memcpy(s->row.low, codes, filled);
    memset(s->row.low + filled, 0, round_up(filled, 64) - filled);
    for (size_t at = 0; at < filled; at += LANES)
        for (size_t lane = 0; lane < LANES; lane++) s->row.lower[at + lane] = codes[at + lane];
    c->kernels->bytes(f->a + matrix * f->rank * f->columns, f->rank, &s->row, s->sums);
    weight /= rows->scales[i];
    for (size_t r = 0; r < f->rank; r++) s->hidden[r] = (float)s->sums[r] * (scales[r] * weight);
}

/* The same of values. */
static void reduce_values(const mkb_context *c, const low_rank *f, size_t matrix, const float *x, float weight,
                          float *hidden) {
    const float *a = f->a_values + matrix * f->rank * f->columns;
    for (size_t r = 0; r < f->rank; r++) {
        floats_of(c)->plain_dots(a + r * f->columns, 0, f->columns, &x, 1, &hidden[r]);
        hidden[r] *= weight;
    }
}

static void add_low_ranks(const mkb_context *c, int thread, const product *p, size_t first, size_t last) {
    rank_scratch *s = &c->ranks[thread];
    size_t place = place_of(c, p->weights), begin = first * TILE, rows = MIN(last * TILE, (size_t)p->weights->rows) - begin;
    for (size_t i = 0; i < c->num_adapters; i++) {
        const low_rank *f = find_low_rank(c, i, place);
        for (size_t t = 0; f && t < p->count; t++) {
            float weight = c->adapter_weights[i] * (p->weight ? p->weight[t] : 1.0f);
            size_t row = p->index[t];
            if (f->a) reduce_codes(c, s, f, p->matrix, p->rows, row, weight);
            else reduce_values(c, f, p->matrix, p->rows->values + row * p->rows->stride, weight, s->hidden);
            floats_of(c)->add_columns(p->out + p->target[t] * p->stride + begin,
                                      f->b + p->matrix * f->rank * f->stride + begin, f->stride, s->hidden, f->rank, rows);
        }
    }
}

static void run_product(const mkb_context *c, int thread, const product *p, size_t first, size_t last) {
    if (p->weights->dtype == TERNARY) run_ternary(c, thread, p, first, last);
    else run_plain(c, p, first, last);
    if (c->ranks) add_low_ranks(c, thread, p, first, last);
}

/* Units are tiles of all products, one product after the other. */
static void products_work(void *argument, int thread, size_t first, size_t last) {
    const mkb_context *c = argument;
    size_t begin = 0;
    for (size_t i = 0; i < c->num_products && begin < last; i++) {
        size_t tiles = (size_t)tiles_of(c->products[i].weights->rows), end = begin + tiles;
        if (first < end) {
            size_t from = first > begin ? first - begin : 0;
            run_product(c, thread, &c->products[i], from, MIN(last, end) - begin);
        }
        begin = end;
    }
}

static void run_products(mkb_context *c) {
    size_t units = 0;
    for (size_t i = 0; i < c->num_products; i++) units += (size_t)tiles_of(c->products[i].weights->rows);
    if (units) pool_run(&c->pool, products_work, c, units);
    c->num_products = 0;
}

/* Units are tiles of D, of all products that add to the same rows, so that sums have one order. */
static void down_work(void *argument, int thread, size_t first, size_t last) {
    const mkb_context *c = argument;
    size_t begin = first * TILE, end = last * TILE;
    for (size_t t = 0; t < c->tokens; t++) memset(c->added + t * c->width + begin, 0, (end - begin) * 4);
    for (size_t i = 0; i < c->num_products; i++) run_product(c, thread, &c->products[i], first, last);
    for (size_t t = 0; t < c->tokens; t++)
        for (size_t i = t * c->width + begin; i < t * c->width + end; i++) c->stream[i] += c->added[i];
}

static void run_down(mkb_context *c) {
    pool_run(&c->pool, down_work, c, (size_t)tiles_of(c->model->set.hidden));
    c->num_products = 0;
}

static void add_product(mkb_context *c, const tensor *weights, const row_set *rows, float *out, size_t stride, int add) {
    c->products[c->num_products++] = (product){weights, 0, c->tokens, stride, rows, c->identity, c->identity, NULL, out, add};
}

/* --- inputs of a mixer or a feed-forward --- */

/* The input j tokens before token t: among these tokens, or one that is remembered. */
static const float *input_before(const mkb_context *c, const float *recent, size_t t, size_t j) {
    const settings *s = &c->model->set;
    return t >= j ? c->stream + (t - j) * c->width : recent + (s->taps + t - j) * s->hidden;
}

static const float *convolved(const mkb_context *c, const float *recent, const tensor *weights, size_t t) {
    const settings *s = &c->model->set;
    float *y = c->mixed_in + t * c->width;
    const float *inputs[1024];
    size_t taps = MIN((uint64_t)s->taps, c->position + t);
    if (!s->taps) return c->stream + t * c->width;
    for (size_t j = 0; j < taps; j++) inputs[j] = input_before(c, recent, t, j + 1);
    memcpy(y, c->stream + t * c->width, c->width * 4);
    floats_of(c)->convolve(y, inputs, (const float *)(const void *)weights->values, taps, s->hidden);
    return y;
}

/* Remember the last inputs of a convolution; afterwards, when no token needs the older ones. */
static void remember_inputs(mkb_context *c, float *recent) {
    const settings *s = &c->model->set;
    size_t row = s->hidden, kept = c->tokens < s->taps ? s->taps - c->tokens : 0, fresh = s->taps - kept;
    memmove(recent, recent + (s->taps - kept) * row, kept * row * 4);
    for (size_t i = 0; i < fresh; i++)
        memcpy(recent + (kept + i) * row, c->stream + (c->tokens - fresh + i) * c->width, row * 4);
}

static float *recent_inputs(const mkb_context *c, int feed_forward) {
    const settings *s = &c->model->set;
    return s->taps ? c->recent[c->layer_number] + (feed_forward ? (size_t)s->taps * s->hidden : 0) : NULL;
}

static void norm_input(const mkb_context *c, size_t t, int feed_forward) {
    const tensor *taps = &c->layer->tensors[feed_forward ? CONVOLUTION : MIXER_CONVOLUTION];
    const float *x = convolved(c, recent_inputs(c, feed_forward), taps, t);
    row_out out = row_at(&c->inputs, t);
    /* Routers read what is not rounded. */
    if (feed_forward && c->layer->mixture && !out.values) out.values = c->normed + t * c->width;
    floats_of(c)->norm_row(x, c->model->set.hidden, &out);
    keep_row(&c->inputs, t, &out);
}

static void mixer_input_work(void *argument, int thread, size_t first, size_t last) {
    (void)thread;
    for (size_t t = first; t < last; t++) norm_input(argument, t, 0);
}

/* --- mixers --- */

static void mix_retention(const mkb_context *c, size_t head) {
    const settings *s = &c->model->set;
    const float *log_decay = (const float *)(const void *)c->model->tensors[LOG_DECAY].values;
    size_t state = s->key_dim * round_up(s->value_dim, LANES);
    retention_job job = {c->states[c->layer_number] + head * state, c->mixed + head * s->value_dim,
                         c->q + head * s->key_dim, c->k + head * s->key_dim, c->v + head * s->value_dim,
                         s->key_dim, s->value_dim, c->tokens, c->keys, c->values, (float)exp((double)log_decay[head])};
    floats_of(c)->retention(&job);
}

/* The cache holds [max_tokens][H·K] keys, then [max_tokens][H·V] values. */
static void mix_attention(const mkb_context *c, size_t head) {
    const settings *s = &c->model->set;
    size_t keys = (size_t)s->heads * s->key_dim, values = (size_t)s->heads * s->value_dim, first = (size_t)c->position;
    float *k = c->states[c->layer_number] + head * s->key_dim;
    float *v = c->states[c->layer_number] + c->max_tokens * keys + head * s->value_dim;
    for (size_t t = 0; t < c->tokens; t++) {
        memcpy(k + (first + t) * keys, c->k + t * c->keys + head * s->key_dim, s->key_dim * 4);
        memcpy(v + (first + t) * values, c->v + t * c->values + head * s->value_dim, s->value_dim * 4);
        floats_of(c)->norm_head(k + (first + t) * keys, s->key_dim, 1e-6f, 1.0f);
    }
    for (size_t t = 0; t < c->tokens; t++) {
        float *q = c->q + t * c->keys + head * s->key_dim;
        floats_of(c)->norm_head(q, s->key_dim, 1e-6f, 1.0f);
        attention_job job = {q, k, v, c->mixed + t * c->values + head * s->value_dim, s->key_dim, s->value_dim,
                             first + t + 1, keys, values};
        floats_of(c)->attention(&job);
    }
}

/* Units are heads. */
static void mix_work(void *argument, int thread, size_t first, size_t last) {
    const mkb_context *c = argument;
    const settings *s = &c->model->set;
    size_t half = s->key_dim / 2;
    int attention = c->layer->attention;
    float scale = attention ? 1.0f : (float)(1.0 / sqrt((double)s->key_dim));
    (void)thread;
    for (size_t head = first; head < last; head++) {
        for (size_t t = 0; t < c->tokens; t++) {
            size_t at = t * c->keys + head * s->key_dim;
            floats_of(c)->rotate(c->q + at, c->cosine + t * half, c->sine + t * half, half, scale);
            floats_of(c)->rotate(c->k + at, c->cosine + t * half, c->sine + t * half, half, 1.0f);
        }
        if (attention) mix_attention(c, head);
        else mix_retention(c, head);
        for (size_t t = 0; t < c->tokens; t++)
            floats_of(c)->norm_head(c->mixed + t * c->values + head * s->value_dim, s->value_dim,
                                    attention ? 1e-6f : 1e-2f, 1.0f);
    }
}

static void gate_heads_work(void *argument, int thread, size_t first, size_t last) {
    mkb_context *c = argument;
    const settings *s = &c->model->set;
    for (size_t t = first; t < last; t++) {
        row_out out = row_at(&c->heads, t);
        floats_of(c)->gate_row(c->gate + t * c->values, c->mixed + t * c->values, (size_t)s->heads * s->value_dim,
                               c->scratch + (size_t)thread * c->scratch_row, &out);
        keep_row(&c->heads, t, &out);
    }
}

static void run_mixer(mkb_context *c) {
    const tensor *w = c->layer->tensors;
    pool_run(&c->pool, mixer_input_work, c, c->tokens);
    if (c->model->set.taps) remember_inputs(c, recent_inputs(c, 0));
    add_product(c, &w[MIXER_QUERY], &c->inputs, c->q, c->keys, 0);
    add_product(c, &w[MIXER_KEY], &c->inputs, c->k, c->keys, 0);
    add_product(c, &w[MIXER_VALUE], &c->inputs, c->v, c->values, 0);
    add_product(c, &w[MIXER_GATE], &c->inputs, c->gate, c->values, 0);
    run_products(c);
    pool_run(&c->pool, mix_work, c, c->model->set.heads);
    pool_run(&c->pool, gate_heads_work, c, c->tokens);
    add_product(c, &w[MIXER_OUT], &c->heads, c->stream, c->width, 1);
    run_products(c);
}

/* --- routers --- */

/* The first of the largest among those that are still allowed (> −∞, or not a number at all). */
static uint32_t first_largest(const float *score, const unsigned char *taken, uint32_t count) {
    uint32_t best = count;
    for (uint32_t e = 0; e < count; e++)
        if (!taken[e] && (best == count || score[e] > score[best])) best = e;
    return best;
}

static float group_rating(const settings *s, const float *score) {
    uint32_t size = s->experts / s->groups, best = MIN(MAX(1, s->top_k / s->top_groups), size);
    float total = 0, last = INFINITY;
    /* The best few, from the largest down; equal ones count as often as they occur. */
    for (uint32_t found = 0; found < best;) {
        float next = -INFINITY;
        uint32_t times = 0;
        for (uint32_t e = 0; e < size; e++)
            if (score[e] < last && score[e] > next) next = score[e];
        for (uint32_t e = 0; e < size; e++) times += score[e] == next;
        if (!times) break;
        for (; times && found < best; times--, found++) total += next;
        last = next;
    }
    return total;
}

/* Mark the experts outside the best groups as taken. */
static void limit_groups(const settings *s, const float *score, unsigned char *taken, float *rating) {
    uint32_t size = s->experts / s->groups;
    unsigned char *chosen = taken + s->experts;
    if (!s->top_groups || s->top_groups >= s->groups) return;
    memset(chosen, 0, s->groups);
    for (uint32_t g = 0; g < s->groups; g++) rating[g] = group_rating(s, score + g * size);
    for (uint32_t n = 0; n < s->top_groups; n++) chosen[first_largest(rating, chosen, s->groups)] = 1;
    for (uint32_t e = 0; e < s->experts; e++) taken[e] = !chosen[e / size];
}

/* In fp64, so that no order of the sum shows in fp32. */
static double exact_dot(const float *x, const float *y, size_t n) {
    double part[4] = {0};
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        UNROLL
        for (size_t lane = 0; lane < 4; lane++) part[lane] += (double)x[i + lane] * (double)y[i + lane];
    UNROLL
    for (size_t lane = 0; lane < 3; lane++)
        if (i + lane < n) part[lane] += (double)x[i + lane] * (double)y[i + lane];
    return (part[0] + part[1]) + (part[2] + part[3]);
}

/* weight·A·x of the router, for all adapters. */
static void reduce_router(const mkb_context *c, const float *x, double *exact) {
    for (size_t i = 0; i < c->num_adapters; i++) {
        const low_rank *f = find_low_rank(c, i, place_of(c, &c->layer->tensors[ROUTER_WEIGHT]));
        for (size_t r = 0; f && r < f->rank; r++)
            *exact++ = (double)c->adapter_weights[i] * exact_dot(f->a_values + r * f->columns, x, f->columns);
    }
}

static double router_logit(const mkb_context *c, int thread, const float *x, uint32_t e) {
    const tensor *weights = &c->layer->tensors[ROUTER_WEIGHT];
    size_t n = weights->columns;
    double logit = exact_dot((const float *)(const void *)weights->values + e * n, x, n);
    const double *exact = c->ranks ? c->ranks[thread].exact : NULL;
    for (size_t i = 0; exact && i < c->num_adapters; i++) {
        const low_rank *f = find_low_rank(c, i, place_of(c, weights));
        for (size_t r = 0; f && r < f->rank; r++) logit += *exact++ * (double)f->b[r * f->stride + e];
    }
    return logit;
}

/* Scores are rounded once, from fp64, as PyTorch's inference does. */
static void score_experts(const mkb_context *c, int thread, const float *x, float *score) {
    const settings *s = &c->model->set;
    double most = -INFINITY, total = 0;
    if (c->ranks) reduce_router(c, x, c->ranks[thread].exact);
    for (uint32_t e = 0; s->softmax && e < s->experts; e++) most = MAX(most, router_logit(c, thread, x, e));
    for (uint32_t e = 0; s->softmax && e < s->experts; e++) total += exp(router_logit(c, thread, x, e) - most);
    for (uint32_t e = 0; e < s->experts; e++) {
        double logit = router_logit(c, thread, x, e);
        score[e] = (float)(s->softmax ? exp(logit - most) / total : 1.0 / (1.0 + exp(-logit)));
    }
}

static void choose_experts(const mkb_context *c, int thread, size_t t) {
    const settings *s = &c->model->set;
    const float *bias = (const float *)(const void *)c->layer->tensors[ROUTER_BIAS].values;
    /* Scores, biased scores, ratings of groups, and marks of experts and of groups. */
    float *score = c->scores + (size_t)thread * 5 * s->experts, *biased = score + s->experts;
    float *weight = c->choice_weight + t * s->top_k, total = 0;
    unsigned char *taken = (unsigned char *)(biased + 2 * s->experts);
    score_experts(c, thread, c->inputs.values ? c->inputs.values + t * c->inputs.stride : c->normed + t * c->width, score);
    for (uint32_t e = 0; e < s->experts; e++) biased[e] = score[e] + bias[e];
    memset(taken, 0, s->experts);
    limit_groups(s, biased, taken, biased + s->experts);
    for (uint32_t n = 0; n < s->top_k; n++) {
        uint32_t e = first_largest(biased, taken, s->experts);
        taken[e] = 1, c->choice[t * s->top_k + n] = e, total += weight[n] = score[e];
    }
    if (s->normalize_weights)
        for (uint32_t n = 0; n < s->top_k; n++) weight[n] /= total;
}

/* Sort the tokens by expert into slots; shared experts come last, and a dense network is one of them. */
static void fill_slots(mkb_context *c) {
    const settings *s = &c->model->set;
    uint32_t routed = c->layer->mixture ? s->experts : 0, shared = c->layer->mixture ? s->shared : 1;
    uint32_t choices = c->layer->mixture ? (uint32_t)c->tokens * s->top_k : 0, *count = c->expert_counts, at = 0;
    memset(count, 0, ((size_t)routed + shared) * sizeof *count);
    for (uint32_t i = 0; i < choices; i++) count[c->choice[i]]++;
    for (uint32_t e = routed; e < routed + shared; e++) count[e] = (uint32_t)c->tokens;
    c->num_visits = 0;
    for (uint32_t e = 0; e < routed + shared; e++) {
        if (count[e]) c->visits[c->num_visits++] = (visit){e, at, count[e]};
        at += count[e], count[e] = at - count[e];
    }
    c->num_slots = at;
    for (uint32_t i = 0; i < choices; i++) {
        uint32_t slot = count[c->choice[i]]++;
        c->slot_token[slot] = i / s->top_k, c->slot_weight[slot] = c->choice_weight[i];
    }
    for (uint32_t e = routed; e < routed + shared; e++)
        for (uint32_t t = 0; t < c->tokens; t++) c->slot_token[count[e] + t] = t, c->slot_weight[count[e] + t] = 1.0f;
}

/* --- experts --- */

/* A matrix of an expert, by its number among routed and then shared ones. */
static const tensor *expert_part(const mkb_context *c, uint32_t expert, int part, size_t *matrix) {
    uint32_t routed = c->layer->mixture ? c->model->set.experts : 0;
    *matrix = expert < routed ? expert : expert - routed;
    return &c->layer->tensors[(expert < routed ? ROUTED : SHARED) + part];
}

static uint32_t hidden_units(const mkb_context *c) {
    return c->layer->mixture ? c->model->set.expert_hidden : c->model->set.dense_hidden;
}

static uint32_t expert_of_slot(const mkb_context *c, size_t slot) {
    size_t low = 0, high = c->num_visits;
    while (high - low > 1) *(c->visits[(low + high) / 2].first <= slot ? &low : &high) = (low + high) / 2;
    return c->visits[low].expert;
}

/* One product for each expert that is visited. */
static void add_expert_products(mkb_context *c, int part, const row_set *rows, int by_token, float *out, size_t stride,
                                int add) {
    for (size_t i = 0; i < c->num_visits; i++) {
        visit v = c->visits[i];
        product *p = &c->products[c->num_products++];
        int down = out == c->added;
        size_t matrix;
        const tensor *weights = expert_part(c, v.expert, part, &matrix);
        *p = (product){weights, matrix, v.count, stride, rows, (by_token ? c->slot_token : c->identity) + v.first,
                       (down ? c->slot_token : c->identity) + v.first, down ? c->slot_weight + v.first : NULL, out, add};
    }
}

static row_function learned_function(const mkb_context *c, size_t slot, int part) {
    const settings *s = &c->model->set;
    row_function f = {s->expert_type, 1, NULL, NULL, NULL, 1.0f, 0.5f * (s->low + s->high), 0.5f * (s->high - s->low)};
    size_t matrix;
    if (!has_functions(s)) return f;
    const tensor *t = expert_part(c, expert_of_slot(c, slot), part, &matrix);
    f.groups = s->function_groups;
    f.coefficients = (const float *)(const void *)(t->values + matrix * t->stride);
    return f;
}

/* The first functions of rational and Chebyshev experts. Units are slots. */
static void inner_work(void *argument, int thread, size_t first, size_t last) {
    mkb_context *c = argument;
    for (size_t slot = first; slot < last; slot++) {
        size_t t = c->slot_token[slot];
        row_function f = learned_function(c, slot, INNER);
        row_out out = row_at(&c->inner, slot);
        if (c->inputs.codes) f.codes = c->inputs.codes + t * c->inputs.stride, f.factor = 1.0f / c->inputs.scales[t];
        else f.values = c->inputs.values + t * c->inputs.stride;
        floats_of(c)->function_row(&f, c->model->set.hidden, c->scratch + (size_t)thread * c->scratch_row, &out);
        keep_row(&c->inner, slot, &out);
    }
}

/* What stands between the first and the last product of an expert. Units are slots. */
static void outer_work(void *argument, int thread, size_t first, size_t last) {
    mkb_context *c = argument;
    float *scratch = c->scratch + (size_t)thread * c->scratch_row;
    for (size_t slot = first; slot < last; slot++) {
        const float *up = c->up + slot * c->hidden;
        row_out out = row_at(&c->hidden_rows, slot);
        if (c->model->set.expert_type == SWIGLU) {
            floats_of(c)->gate_row(c->expert_gate + slot * c->hidden, up, hidden_units(c), scratch, &out);
        } else {
            row_function f = learned_function(c, slot, OUTER);
            f.values = up;
            floats_of(c)->function_row(&f, hidden_units(c), scratch, &out);
        }
        keep_row(&c->hidden_rows, slot, &out);
    }
}

static void run_simple_experts(mkb_context *c) {
    const settings *s = &c->model->set;
    int functions = has_functions(s);
    if (functions) pool_run(&c->pool, inner_work, c, c->num_slots);
    add_expert_products(c, UP, functions ? &c->inner : &c->inputs, !functions, c->up, c->hidden, 0);
    if (s->expert_type == SWIGLU) add_expert_products(c, GATE, &c->inputs, 1, c->expert_gate, c->hidden, 0);
    run_products(c);
    pool_run(&c->pool, outer_work, c, c->num_slots);
    add_expert_products(c, DOWN, &c->hidden_rows, 0, c->added, c->width, 1);
    run_down(c);
}

static void expand_row(const mkb_context *c, const row_set *base, const row_set *splines, size_t i, const float *x, size_t n) {
    spline_out out = {row_at(base, i), row_at(splines, i)};
    floats_of(c)->spline_row(&c->grid, x, n, &out);
    keep_row(base, i, &out.base);
    keep_row(splines, i, &out.splines);
}

/* Splines of the inputs; all experts share the grid, so units are tokens. */
static void inner_spline_work(void *argument, int thread, size_t first, size_t last) {
    mkb_context *c = argument;
    size_t n = c->model->set.hidden;
    float *x = c->scratch + (size_t)thread * c->scratch_row;
    for (size_t t = first; t < last; t++) {
        if (c->inputs.codes)
            for (size_t i = 0; i < n; i++) x[i] = (float)c->inputs.codes[t * c->inputs.stride + i] / c->inputs.scales[t];
        else
            memcpy(x, c->inputs.values + t * c->inputs.stride, n * 4);
        expand_row(c, &c->inner, &c->inner_splines, t, x, n);
    }
}

static void outer_spline_work(void *argument, int thread, size_t first, size_t last) {
    mkb_context *c = argument;
    size_t n = hidden_units(c);
    (void)thread;
    for (size_t slot = first; slot < last; slot++) {
        float *x = c->up + slot * c->hidden;
        floats_of(c)->norm_head(x, n, 1e-6f, 1.0f);
        expand_row(c, &c->hidden_rows, &c->hidden_splines, slot, x, n);
    }
}

static void run_spline_experts(mkb_context *c) {
    pool_run(&c->pool, inner_spline_work, c, c->tokens);
    add_expert_products(c, INNER_BASE, &c->inner, 1, c->up, c->hidden, 0);
    run_products(c);
    add_expert_products(c, INNER_SPLINE, &c->inner_splines, 1, c->up, c->hidden, 1);
    run_products(c);
    pool_run(&c->pool, outer_spline_work, c, c->num_slots);
    add_expert_products(c, OUTER_BASE, &c->hidden_rows, 0, c->added, c->width, 1);
    add_expert_products(c, OUTER_SPLINE, &c->hidden_splines, 0, c->added, c->width, 1);
    run_down(c);
}

/* The input of the feed-forward, and the experts that each token visits. Units are tokens. */
static void route_work(void *argument, int thread, size_t first, size_t last) {
    const mkb_context *c = argument;
    for (size_t t = first; t < last; t++) {
        norm_input(c, t, 1);
        if (c->layer->mixture) choose_experts(c, thread, t);
    }
}

static void run_feed_forward(mkb_context *c) {
    pool_run(&c->pool, route_work, c, c->tokens);
    if (c->model->set.taps) remember_inputs(c, recent_inputs(c, 1));
    fill_slots(c);
    if (has_splines(&c->model->set)) run_spline_experts(c);
    else run_simple_experts(c);
}

/* --- embedding, head, and all between --- */

static void embed(const mkb_context *c, uint32_t id, float *x) {
    const tensor *t = &c->model->tensors[EMBEDDING];
    size_t n = t->columns, at = (size_t)id * n;
    if (t->dtype == FP32) memcpy(x, t->values + at * 4, n * 4);
    else if (t->dtype == FP16) EACH(i, rest, n, store(x + i, rest, load_halves((const uint16_t *)(const void *)t->values + at + i, rest)));
    else for (size_t i = 0; i < n; i++) x[i] = (float)(int8_t)t->values[at + i] * t->scales[id];
}

static void set_angles(mkb_context *c, size_t t) {
    size_t half = c->model->set.key_dim / 2;
    for (size_t i = 0; i < half; i++) {
        double angle = (double)(c->position + t) * c->frequencies[i];
        c->cosine[t * half + i] = (float)cos(angle), c->sine[t * half + i] = (float)sin(angle);
    }
}

/* Add the low-rank factors' part of rows of the head, whose A·x is known. */
static void add_head_ranks(const mkb_context *c, size_t row, size_t count) {
    const float *hidden = c->ranks[0].hidden;
    for (size_t i = 0; i < c->num_adapters; i++) {
        const low_rank *f = find_low_rank(c, i, (size_t)c->model->set.layers * LAYER_TENSORS);
        if (!f) continue;
        floats_of(c)->add_columns(c->logits + row, f->b + row, f->stride, hidden, f->rank, count);
        hidden += f->rank;
    }
}

/* Units are tiles of the vocabulary. */
static void head_work(void *argument, int thread, size_t first, size_t last) {
    const mkb_context *c = argument;
    const tensor *t = &c->model->tensors[HEAD];
    size_t end = MIN(last * TILE, t->rows), size = t->dtype == FP16 ? 2 : 4;
    const float *x = c->normed;
    (void)thread;
    for (size_t row = first * TILE; row < end; row += HEAD_ROWS) {
        size_t count = MIN((size_t)HEAD_ROWS, end - row);
        int64_t sums[HEAD_ROWS];
        if (t->dtype == INT8) {
            c->kernels->bytes((const int8_t *)t->values + row * t->columns, count, &c->last, sums);
            for (size_t i = 0; i < count; i++)
                c->logits[row + i] = (float)((double)sums[i] * (t->scales[row + i] * c->last.unit));
        } else {
            for (size_t i = row; i < row + count; i++)
                floats_of(c)->plain_dots(t->values + i * t->columns * size, size == 2, t->columns, &x, 1, &c->logits[i]);
        }
        if (c->ranks) add_head_ranks(c, row, count);
    }
}

static void run_head(mkb_context *c, float *logits) {
    row_out out = {NULL, c->normed, 1.0f, 0};
    floats_of(c)->norm_row(c->stream + (c->tokens - 1) * c->width, c->model->set.hidden, &out);
    if (c->model->tensors[HEAD].dtype == INT8) split(&c->last, c->normed);
    c->logits = logits;
    float *hidden = c->ranks ? c->ranks[0].hidden : NULL;
    for (size_t i = 0; hidden && i < c->num_adapters; i++) {
        const low_rank *f = find_low_rank(c, i, (size_t)c->model->set.layers * LAYER_TENSORS);
        if (f) reduce_values(c, f, 0, c->normed, c->adapter_weights[i], hidden), hidden += f->rank;
    }
    pool_run(&c->pool, head_work, c, (size_t)tiles_of(c->model->set.vocab_size));
}

static void run_tokens(mkb_context *c, const uint32_t *ids, size_t count) {
    c->tokens = count;
    for (size_t t = 0; t < count; t++) {
        embed(c, ids[t], c->stream + t * c->width);
        set_angles(c, t);
    }
    for (uint32_t i = 0; i < c->model->set.layers; i++) {
        c->layer_number = i, c->layer = &c->layers[i];
        run_mixer(c);
        run_feed_forward(c);
    }
    c->position += count;
}

static int has_attention(const mkb_model *m) {
    for (uint32_t i = 0; i < m->set.layers; i++)
        if (m->layers[i].attention) return 1;
    return 0;
}

static void note_tokens(sampler_state *s, const uint32_t *tokens, size_t count);

int mkb_decode(mkb_context *c, const uint32_t *tokens, size_t count, float *logits, char error[MKB_ERROR_BYTES]) {
    if (!count && logits) return fail(error, MKB_ERROR_ARGUMENT, "no tokens to read; pass one or more");
    for (size_t i = 0; i < count; i++)
        if (tokens[i] >= c->model->set.vocab_size)
            return fail(error, MKB_ERROR_ARGUMENT, "token %lu is not among the model's %lu; use its own tokenizer",
                        (unsigned long)tokens[i], (unsigned long)c->model->set.vocab_size);
    if (has_attention(c->model) && (c->position > c->max_tokens || count > c->max_tokens - c->position))
        return fail(error, MKB_ERROR_FULL, "the caches have room for %lu tokens; create the context with a larger max_tokens",
                    (unsigned long)c->max_tokens);
    note_tokens(&c->sampler, tokens, count);
    while (count) {
        size_t some = MIN(count, c->chunk);
        run_tokens(c, tokens, some);
        tokens += some, count -= some;
    }
    if (logits) run_head(c, logits);
    return MKB_OK;
}

/* --- contexts --- */

/* Memory of the context; `missing` counts what there was no memory for. */
static void *own_memory(mkb_context *c, uint64_t count, uint64_t size, int *missing) {
    enum { MOST_BLOCKS = 64 };
    void *memory = c->num_memory < MOST_BLOCKS ? allocate(count, size) : NULL;
    if (memory) memset(memory, 0, (size_t)(count * size));
    if (!c->memory) c->memory = calloc(MOST_BLOCKS, sizeof *c->memory);
    if (!memory || !c->memory) {
        free(memory);
        ++*missing;
        return NULL;
    }
    return c->memory[c->num_memory++] = memory;
}

static void own_rows(mkb_context *c, row_set *rows, uint64_t count, uint64_t columns, int *missing) {
    int quantized = c->model->set.quantized != 0;
    rows->stride = quantized ? round_up((size_t)columns, LANES) + 64 : row_stride((size_t)columns);
    if (quantized) rows->codes = own_memory(c, count, rows->stride, missing);
    else rows->values = own_memory(c, count * rows->stride, 4, missing);
    rows->scales = own_memory(c, count, 4, missing);
    rows->totals = own_memory(c, count, 4, missing);
}

static void own_split(mkb_context *c, int *missing) {
    split_vector *x = &c->last;
    x->size = c->model->set.hidden, x->padded = round_up(x->size, 64);
    x->high = own_memory(c, x->padded, 1, missing);
    x->middle = own_memory(c, x->padded, 1, missing);
    x->low = own_memory(c, x->padded, 1, missing);
    x->upper = own_memory(c, x->padded, 2, missing);
    x->lower = own_memory(c, x->padded, 2, missing);
}

/* Slots of one token in its busiest layer, and the widest hidden layer. */
static void measure_experts(const mkb_model *m, uint64_t *slots, uint64_t *hidden) {
    *slots = 1, *hidden = 1;
    for (uint32_t i = 0; i < m->set.layers; i++) {
        int mixture = m->layers[i].mixture;
        *slots = MAX(*slots, mixture ? (uint64_t)m->set.top_k + m->set.shared : 1);
        *hidden = MAX(*hidden, mixture ? m->set.expert_hidden : m->set.dense_hidden);
    }
}

static void own_token_rows(mkb_context *c, int *missing) {
    const settings *s = &c->model->set;
    uint64_t tokens = c->chunk;
    c->stream = own_memory(c, tokens * c->width, 4, missing);
    c->mixed_in = own_memory(c, s->taps ? tokens * c->width : 1, 4, missing);
    c->normed = own_memory(c, tokens * c->width, 4, missing);
    c->added = own_memory(c, tokens * c->width, 4, missing);
    c->q = own_memory(c, tokens * c->keys, 4, missing);
    c->k = own_memory(c, tokens * c->keys, 4, missing);
    c->v = own_memory(c, tokens * c->values, 4, missing);
    c->gate = own_memory(c, tokens * c->values, 4, missing);
    c->mixed = own_memory(c, tokens * c->values, 4, missing);
    c->cosine = own_memory(c, tokens * s->key_dim / 2, 4, missing);
    c->sine = own_memory(c, tokens * s->key_dim / 2, 4, missing);
    c->frequencies = own_memory(c, s->key_dim / 2, sizeof(double), missing);
    own_rows(c, &c->inputs, tokens, s->hidden, missing);
    own_rows(c, &c->heads, tokens, (uint64_t)s->heads * s->value_dim, missing);
}

static void own_expert_rows(mkb_context *c, uint64_t slots, uint64_t hidden, int *missing) {
    const settings *s = &c->model->set;
    uint64_t tokens = c->chunk, experts = (uint64_t)s->experts + MAX(s->shared, 1);
    int splines = has_splines(s);
    slots *= tokens;
    c->up = own_memory(c, slots * c->hidden, 4, missing);
    c->expert_gate = own_memory(c, s->expert_type == SWIGLU ? slots * c->hidden : 1, 4, missing);
    own_rows(c, &c->hidden_rows, slots, hidden, missing);
    own_rows(c, &c->inner, splines ? tokens : has_functions(s) ? slots : 1, s->hidden, missing);
    own_rows(c, &c->inner_splines, splines ? tokens : 1, splines ? (uint64_t)s->hidden * basis_size(s) : 1, missing);
    own_rows(c, &c->hidden_splines, splines ? slots : 1, splines ? hidden * basis_size(s) : 1, missing);
    c->scores = own_memory(c, (uint64_t)c->pool.threads * 5 * experts, 4, missing);
    c->choice = own_memory(c, tokens * MAX(s->top_k, 1), sizeof *c->choice, missing);
    c->choice_weight = own_memory(c, tokens * MAX(s->top_k, 1), 4, missing);
    c->slot_token = own_memory(c, slots, sizeof *c->slot_token, missing);
    c->slot_weight = own_memory(c, slots, 4, missing);
    c->identity = own_memory(c, slots, sizeof *c->identity, missing);
    c->visits = own_memory(c, experts, sizeof *c->visits, missing);
    c->expert_counts = own_memory(c, experts, sizeof *c->expert_counts, missing);
    c->products = own_memory(c, 2 * experts + 4, sizeof *c->products, missing);
    for (uint64_t i = 0; c->identity && i < slots; i++) c->identity[i] = (uint32_t)i;
}

/* Caches are written before they are read: untouched pages of theirs take no memory. */
static float *own_caches(mkb_context *c, uint64_t count, int *missing) {
    float *caches = c->caches = allocate(count, 4);
    if (!caches) ++*missing;
    return caches;
}

/* States of all layers in one piece, and the caches of attention. */
static void own_states(mkb_context *c, int *missing) {
    const mkb_model *m = c->model;
    const settings *s = &m->set;
    uint64_t head = (uint64_t)s->key_dim * round_up(s->value_dim, LANES), taps = 2ull * s->taps * s->hidden;
    uint64_t cache = (uint64_t)s->heads * ((uint64_t)s->key_dim + s->value_dim), caches = 0;
    c->state_floats = (size_t)(m->state_bytes / 4);
    c->state_memory = own_memory(c, m->state_bytes, 1, missing);
    c->states = own_memory(c, s->layers, sizeof *c->states, missing);
    c->recent = own_memory(c, s->layers, sizeof *c->recent, missing);
    for (uint32_t i = 0; i < s->layers; i++) caches += (uint64_t)m->layers[i].attention;
    if (*missing || (caches && cache * c->max_tokens > SIZE_MAX / 8 / caches)) {
        ++*missing;
        return;
    }
    float *next = c->state_memory, *next_cache = own_caches(c, caches * c->max_tokens * cache, missing);
    for (uint32_t i = 0; i < s->layers && next_cache; i++) {
        c->states[i] = m->layers[i].attention ? next_cache : next;
        if (m->layers[i].attention) next_cache += cache * c->max_tokens;
        else next += head * s->heads;
        c->recent[i] = next, next += taps;
    }
}

/* Fewer tokens at a time where their rows would take more than some megabytes. */
static uint32_t plan_chunk(const settings *s, uint64_t slots, uint64_t hidden) {
    uint64_t basis = has_splines(s) ? basis_size(s) : 1, most = 6u << 20;
    uint64_t row = 20ull * s->hidden + 8ull * s->heads * ((uint64_t)s->key_dim + 2 * s->value_dim);
    row += slots * (hidden * (8 + basis * (s->quantized ? 1 : 4)) + s->hidden) + s->hidden * basis;
    uint32_t chunk = MOST_TOKENS;
    while (chunk > 4 && row * chunk > most) chunk /= 2;
    return chunk;
}

static void set_grid(mkb_context *c) {
    const settings *s = &c->model->set;
    vec w[MAX_DEGREE + 1], lower[MAX_DEGREE + 2] = {{0}};
    spline_grid *g = &c->grid;
    if (!has_splines(s)) return;
    *g = (spline_grid){.intervals = s->intervals, .degree = s->degree, .low = s->low, .high = s->high};
    g->per_step = (float)(1.0 / (((double)s->high - s->low) / s->intervals));
    nonzero_splines(s->degree, all(s->degree % 2 ? 0.0f : 0.5f), w);
    for (uint32_t r = 0; r <= s->degree; r++) g->peak = MAX(g->peak, w[r][0]);
    nonzero_splines(s->degree, all(0), w);
    nonzero_splines(s->degree - 1, all(0), lower + 1);
    lower[s->degree + 1] = all(0);
    for (uint32_t r = 0; r <= s->degree; r++) g->values[r] = w[r][0], g->slopes[r] = lower[r][0] - lower[r + 1][0];
}

static void own_everything(mkb_context *c, int *missing) {
    const settings *s = &c->model->set;
    uint64_t slots, hidden, threads = (uint64_t)c->pool.threads;
    measure_experts(c->model, &slots, &hidden);
    c->chunk = plan_chunk(s, slots, hidden);
    c->width = row_stride(s->hidden), c->hidden = row_stride((size_t)hidden);
    c->keys = row_stride((size_t)s->heads * s->key_dim), c->values = row_stride((size_t)s->heads * s->value_dim);
    c->scratch_row = MAX(MAX(c->width, c->hidden), MAX(c->keys, c->values));
    own_token_rows(c, missing);
    own_expert_rows(c, slots, hidden, missing);
    own_split(c, missing);
    c->sums = own_memory(c, threads * SUMS_TILES * TILE, sizeof *c->sums, missing);
    c->scratch = own_memory(c, threads * c->scratch_row, 4, missing);
    own_states(c, missing);
    c->candidates = own_memory(c, s->tokenizer_size, sizeof *c->candidates, missing);
    c->weights = own_memory(c, s->tokenizer_size, sizeof *c->weights, missing);
    if (*missing) return;
    mkb_sampling_set(c, &DEFAULT_SAMPLING, NULL);
    for (size_t i = 0; i < s->key_dim / 2; i++) c->frequencies[i] = pow(10000.0, -(double)i / (s->key_dim / 2));
    set_grid(c);
}

int mkb_context_create(const mkb_model *model, int threads, uint32_t max_tokens, mkb_context **context,
                       char error[MKB_ERROR_BYTES]) {
    int missing = 0, status = choose_kernels(error);
    *context = NULL;
    if (status) return status;
    if (threads < 1) return fail(error, MKB_ERROR_ARGUMENT, "%d threads; use 1 or more", threads);
    if (!max_tokens && has_attention(model))
        return fail(error, MKB_ERROR_ARGUMENT, "%s has softmax attention layers; set max_tokens to 1 or more", model->name);
    mkb_context *c = calloc(1, sizeof *c);
    if (!c) return fail(error, MKB_ERROR_MEMORY, "no memory for a context");
    c->model = model, c->layers = model->layers, c->kernels = chosen_kernels, c->max_tokens = max_tokens;
    status = pool_start(&c->pool, threads);
    if (status) status = fail(error, MKB_ERROR_MEMORY, "a thread cannot be started: %s; use fewer", strerror(status));
    if (!status) own_everything(c, &missing);
    if (missing) status = fail(error, MKB_ERROR_MEMORY, "%s: no memory for a context of %lu tokens; use fewer", model->name,
                               (unsigned long)max_tokens);
    if (status) mkb_context_destroy(c);
    else *context = c;
    return status;
}

static void drop_adapters(mkb_context *c);

void mkb_context_destroy(mkb_context *c) {
    if (!c) return;
    pool_stop(&c->pool);
    drop_adapters(c);
    for (size_t i = 0; i < c->num_memory; i++) free(c->memory[i]);
    free(c->memory);
    free(c->caches);
    free(c);
}

/* ---- 7 adapters ---- */

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("Os")
#endif

enum {
    ADAPTER_HEADER = 256,
    ADAPTER_VERSION = 1,
    MOST_RANK = 4096,
    MOST_GAP = 255 /* between flips: so many codes are passed, and none is flipped */
};
enum { LOW_RANK, PATCH, INITIAL_STATE, ADAPTER_KINDS };

/* A file while it is read. */
typedef struct {
    mkb_adapter *adapter;
    const unsigned char *bytes;
    uint64_t size;
    const char *name;
    char *error;
} adapter_file;

static int refuse_adapter(const adapter_file *f, const char *what, uint64_t value) {
    return fail(f->error, MKB_ERROR_FORMAT, "%s: %s %llu does not fit; copy it again, or pack the adapter again", f->name,
                what, (unsigned long long)value);
}

/* Memory of zeros that is freed with the adapter. */
static void *keep_block(mkb_adapter *a, uint64_t count, uint64_t size) {
    unsigned char *block = count <= UINT64_MAX / 2 / size ? allocate(1, 64 + count * size) : NULL;
    if (!block) return NULL;
    memset(block, 0, (size_t)(64 + count * size));
    *(void **)(void *)block = a->blocks;
    a->blocks = block;
    return block + 64;
}

/* The bytes that word `at` of a record leads to; NULL if they lie outside the file. */
static const unsigned char *part_of(const adapter_file *f, const unsigned char *record, size_t at, uint64_t bytes) {
    uint64_t offset = read_u64(record + at);
    return offset >= ADAPTER_HEADER && offset <= f->size && bytes <= f->size - offset ? f->bytes + offset : NULL;
}

static float *keep_floats(mkb_adapter *a, const unsigned char *from, uint64_t count) {
    float *kept = keep_block(a, count, 4);
    if (kept) copy_words(kept, from, (size_t)count);
    return kept;
}

static int no_adapter_memory(const adapter_file *f) {
    return fail(f->error, MKB_ERROR_MEMORY, "%s: no memory for an adapter of %llu bytes", f->name,
                (unsigned long long)f->size);
}

/* int8 rows of A, for inputs of codes as they are, and for others as values. */
static int keep_a(const adapter_file *f, low_rank *l, uint64_t rows, const unsigned char *codes,
                  const unsigned char *scales, int plain) {
    float *values = NULL;
    int8_t *kept = NULL;
    l->a_scales = keep_floats(f->adapter, scales, rows);
    if (plain) l->a_values = values = keep_block(f->adapter, rows, l->columns * 4);
    else l->a = kept = keep_block(f->adapter, rows, l->columns);
    if (!l->a_scales || (!values && !kept)) return no_adapter_memory(f);
    if (kept) memcpy(kept, codes, (size_t)rows * l->columns);
    for (size_t i = 0; values && i < (size_t)rows * l->columns; i++)
        values[i] = (float)(int8_t)codes[i] * l->a_scales[i / l->columns];
    return MKB_OK;
}

/* int8 rows of B become columns of values. */
static int keep_b(const adapter_file *f, low_rank *l, uint64_t count, size_t rows, const unsigned char *codes,
                  const unsigned char *scales) {
    float *b;
    l->stride = round_up(rows, LANES);
    l->b = b = keep_block(f->adapter, count * l->rank, l->stride * 4);
    if (!b) return no_adapter_memory(f);
    for (size_t i = 0; i < (size_t)count * rows; i++, codes += l->rank)
        for (size_t r = 0; r < l->rank; r++)
            b[(i / rows * l->rank + r) * l->stride + i % rows] = (float)(int8_t)codes[r] * read_f32(scales + 4 * i);
    return MKB_OK;
}

static int read_low_rank(const adapter_file *f, const unsigned char *record, size_t place, const tensor *t) {
    mkb_adapter *a = f->adapter;
    const settings *s = &a->model->set;
    size_t places = (size_t)s->layers * LAYER_TENSORS + 1, which = place % LAYER_TENSORS;
    uint64_t rank = read_u32(record + 20), rows = rank * t->count;
    int plain = !s->quantized || place == places - 1 || which == ROUTER_WEIGHT;
    const unsigned char *part[4];
    if (!rank || rank > MIN(MIN(t->rows, t->columns), MOST_RANK)) return refuse_adapter(f, "a rank of", rank);
    part[0] = part_of(f, record, 24, rows * t->columns), part[1] = part_of(f, record, 32, rows * 4);
    part[2] = part_of(f, record, 40, rows * t->rows), part[3] = part_of(f, record, 48, (uint64_t)t->count * t->rows * 4);
    for (int i = 0; i < 4; i++)
        if (!part[i]) return refuse_adapter(f, "the place of factors of rank", rank);
    if (!a->low_ranks) a->low_ranks = keep_block(a, places, sizeof *a->low_ranks);
    if (!a->low_ranks) return no_adapter_memory(f);
    low_rank *l = &a->low_ranks[place];
    if (l->rank) return refuse_adapter(f, "a second pair of factors for role", read_u32(record) & 0xffff);
    l->rank = (uint32_t)rank, l->columns = t->columns;
    a->rank = MAX(a->rank, l->rank), a->columns = MAX(a->columns, l->columns);
    int status = keep_a(f, l, rows, part[0], part[1], plain);
    return status ? status : keep_b(f, l, t->count, t->rows, part[2], part[3]);
}

/* Flip the codes of tiles: gaps lead from one to the next, and a bit of `steps` says how far each is turned. */
static int flip_codes(const adapter_file *f, const unsigned char *gaps, uint64_t num_gaps, const unsigned char *steps,
                      uint64_t flips, const tensor *t) {
    size_t across = (size_t)tiles_of(t->columns), r = 0, c = 0, matrix = 0;
    uint64_t done = 0;
    for (uint64_t i = 0; i < num_gaps; i++) {
        for (c += gaps[i]; c >= t->columns; c -= t->columns)
            if (++r == t->rows) r = 0, matrix++;
        if (gaps[i] == MOST_GAP) continue;
        if (matrix >= t->count || done == flips) return refuse_adapter(f, "a flip after", done);
        unsigned char *byte = (unsigned char *)(uintptr_t)t->values + matrix * t->stride +
                              ((r / TILE * across + c / TILE) * TILE + r % TILE) * 4 + c % 4;
        unsigned shift = 2 * (unsigned)(c % TILE / 4), code = *byte >> shift & 3;
        code = (code + 1 + (steps[done / 8] >> done % 8 & 1)) % 3;
        *byte = (unsigned char)((*byte & ~(3u << shift)) | code << shift);
        c++, done++;
    }
    return done == flips ? MKB_OK : refuse_adapter(f, "a number of flips of", flips);
}

static int read_patch(const adapter_file *f, const unsigned char *record, size_t place, const tensor *t) {
    mkb_adapter *a = f->adapter;
    uint64_t bytes = matrix_bytes(TERNARY, t->rows, t->columns), scales = (uint64_t)t->count * t->scale_count;
    uint64_t flips = read_u64(record + 48), num_gaps = read_u64(record + 56);
    if (t->dtype != TERNARY || read_u32(record + 20) != t->scale_count)
        return refuse_adapter(f, "a patch of role", read_u32(record) & 0xffff);
    const unsigned char *gaps = part_of(f, record, 24, num_gaps);
    const unsigned char *steps = flips <= num_gaps ? part_of(f, record, 32, (flips + 7) / 8) : NULL;
    const unsigned char *fresh = part_of(f, record, 40, scales * 4);
    if (!gaps || !steps || !fresh) return refuse_adapter(f, "the place of a patch with a number of flips of", flips);
    if (!a->patched) a->patched = keep_block(a, (uint64_t)a->model->set.layers * LAYER_TENSORS, sizeof *a->patched);
    if (!a->patched) return no_adapter_memory(f);
    tensor *to = &a->patched[place];
    if (to->values) return refuse_adapter(f, "a second patch of role", read_u32(record) & 0xffff);
    unsigned char *tiles = keep_block(a, t->count, bytes);
    *to = *t;
    to->values = tiles, to->stride = bytes, to->scales = keep_floats(a, fresh, scales);
    if (!tiles || !to->scales) return no_adapter_memory(f);
    for (uint32_t i = 0; i < t->count; i++) memcpy(tiles + i * bytes, t->values + i * t->stride, (size_t)bytes);
    return flip_codes(f, gaps, num_gaps, steps, flips, to);
}

/* Σ key ⊗ value, in the order of a context's state: 16 values of one key are neighbors. */
static int read_initial_state(const adapter_file *f, const unsigned char *record, uint32_t number) {
    mkb_adapter *a = f->adapter;
    const settings *s = &a->model->set;
    size_t keys = s->key_dim, values = s->value_dim, size = keys * round_up(values, LANES);
    uint64_t rank = read_u32(record + 20), rows = rank * s->heads;
    if (number >= s->layers || a->model->layers[number].attention) return refuse_adapter(f, "a state of layer", number);
    if (read_u32(record + 8) != s->heads || read_u32(record + 12) != keys || read_u32(record + 16) != values || !rank ||
        rank > MOST_RANK)
        return refuse_adapter(f, "the shape of the state of layer", number);
    const unsigned char *key = part_of(f, record, 24, rows * keys * 4), *value = part_of(f, record, 32, rows * values * 4);
    if (!key || !value) return refuse_adapter(f, "the place of the state of layer", number);
    if (!a->states) a->states = keep_block(a, s->layers, sizeof *a->states);
    if (!a->states) return no_adapter_memory(f);
    if (a->states[number]) return refuse_adapter(f, "a second state of layer", number);
    float *state = a->states[number] = keep_block(a, s->heads, size * 4);
    if (!state) return no_adapter_memory(f);
    for (size_t h = 0; h < s->heads; h++, state += size, key += rank * keys * 4, value += rank * values * 4)
        for (size_t i = 0; i < keys * values; i++) {
            size_t k = i / values, v = i % values;
            double total = 0;
            for (size_t r = 0; r < rank; r++)
                total += (double)read_f32(key + 4 * (r * keys + k)) * (double)read_f32(value + 4 * (r * values + v));
            state[(v / LANES * keys + k) * LANES + v % LANES] = (float)total;
        }
    return MKB_OK;
}

static int read_adapter_record(const adapter_file *f, const unsigned char *record) {
    const mkb_model *m = f->adapter->model;
    uint32_t role = read_u32(record) & 0xffff, kind = read_u32(record) >> 16, number = read_u32(record + 4);
    int which = layer_tensor(role), part = which < SHARED ? which - ROUTED : which - SHARED;
    int matrix = which >= ROUTED ? part < INNER : which == ROUTER_WEIGHT || (which >= 0 && which <= MIXER_OUT);
    size_t place = (size_t)number * LAYER_TENSORS + (size_t)MAX(which, 0);
    const tensor *t = NULL;
    if (kind == INITIAL_STATE) return read_initial_state(f, record, number);
    if (role == HEAD && !number) t = &m->tensors[HEAD], place = (size_t)m->set.layers * LAYER_TENSORS;
    else if (matrix && number < m->set.layers) t = &m->layers[number].tensors[which];
    if (kind >= ADAPTER_KINDS || !t || !t->values) return refuse_adapter(f, "a part for role", role);
    if (read_u32(record + 8) != t->count || read_u32(record + 12) != t->rows || read_u32(record + 16) != t->columns)
        return refuse_adapter(f, "the shape of the part for role", role);
    return kind == PATCH ? read_patch(f, record, place, t) : read_low_rank(f, record, place, t);
}

static int check_adapter_base(const adapter_file *f) {
    static const unsigned char zeros[32];
    const unsigned char *wanted = f->bytes + 56, *has = f->adapter->model->codes_sha256;
    if (!memcmp(has, zeros, 32))
        return fail(f->error, MKB_ERROR_MISMATCH, "%s: packed by an earlier version, which adapters cannot tell from others; "
                    "pack it again", f->adapter->model->name);
    if (!memcmp(has, wanted, 32)) return MKB_OK;
    return fail(f->error, MKB_ERROR_MISMATCH, "%s belongs to the model %02x%02x%02x%02x, and %s is %02x%02x%02x%02x; use its own",
                f->name, wanted[0], wanted[1], wanted[2], wanted[3], f->adapter->model->name, has[0], has[1], has[2], has[3]);
}

static int check_adapter_header(const adapter_file *f) {
    static const unsigned char magic[8] = {0x89, 'M', 'K', 'A', '\r', '\n', 0x1a, '\n'}, zeros[32];
    unsigned char digest[32];
    sha256_state s;
    if (!f->size || memcmp(f->bytes, magic, (size_t)MIN(f->size, 8)))
        return fail(f->error, MKB_ERROR_FORMAT, "%s is not an adapter of the runtime; make one with `mixkabrn adapter pack`",
                    f->name);
    if (f->size < ADAPTER_HEADER) return refuse_adapter(f, "a size of", f->size);
    if (read_u32(f->bytes + 8) != ADAPTER_VERSION)
        return fail(f->error, MKB_ERROR_FORMAT, "%s has the version %lu, and this runtime reads 1; update it", f->name,
                    (unsigned long)read_u32(f->bytes + 8));
    if (read_u32(f->bytes + 12) != ADAPTER_HEADER || read_u64(f->bytes + 16) != f->size)
        return refuse_adapter(f, "a size of", f->size);
    sha256_begin(&s);
    sha256_add(&s, f->bytes, 24);
    sha256_add(&s, zeros, 32);
    sha256_add(&s, f->bytes + 56, (size_t)f->size - 56);
    sha256_end(&s, digest);
    if (!memcmp(digest, f->bytes + 24, 32)) return check_adapter_base(f);
    return fail(f->error, MKB_ERROR_FORMAT, "%s is damaged: its sha256 differs from the one in its header; copy it again",
                f->name);
}

static int read_adapter(const adapter_file *f) {
    mkb_adapter_details *d = &f->adapter->details;
    uint64_t count, offset;
    int status = check_adapter_header(f);
    if (status) return status;
    count = read_u32(f->bytes + 108), offset = read_u64(f->bytes + 112);
    d->method = read_u32(f->bytes + 88), d->rank = read_u32(f->bytes + 92), d->steps = read_u64(f->bytes + 96);
    d->file_bytes = f->size;
    memcpy(d->sha256, f->bytes + 24, 32);
    memcpy(d->base_sha256, f->bytes + 56, 32);
    memcpy(d->name, f->bytes + 128, sizeof d->name - 1);
    for (char *c = d->name; *c; c++)
        if ((unsigned char)*c < 32 || *c == 127) *c = '?';
    if (d->method >= ADAPTER_KINDS) return refuse_adapter(f, "the method", d->method);
    if (offset < ADAPTER_HEADER || offset > f->size || count * RECORD_BYTES > f->size - offset)
        return refuse_adapter(f, "the table at", offset);
    for (uint64_t i = 0; i < count && !status; i++) status = read_adapter_record(f, f->bytes + offset + i * RECORD_BYTES);
    return status;
}

void mkb_adapter_close(mkb_adapter *a) {
    if (!a || __atomic_sub_fetch(&a->users, 1, __ATOMIC_ACQ_REL)) return;
    for (void *block = a->blocks, *next; block; block = next) {
        next = *(void **)block;
        free(block);
    }
    free(a);
}

static int open_adapter(const mkb_model *model, const void *bytes, uint64_t size, const char *name, mkb_adapter **adapter,
                        char *error) {
    mkb_adapter *a = calloc(1, sizeof *a);
    adapter_file f = {a, bytes, size, name, error};
    if (!a) return no_adapter_memory(&f);
    a->model = model, a->users = 1;
    int status = read_adapter(&f);
    if (status) mkb_adapter_close(a);
    else *adapter = a;
    return status;
}

int mkb_adapter_open_memory(const mkb_model *model, const void *bytes, size_t size, mkb_adapter **adapter,
                            char error[MKB_ERROR_BYTES]) {
    *adapter = NULL;
    return open_adapter(model, bytes, size, "the adapter", adapter, error);
}

static int read_sized_file(const char *path, const char *wanted, unsigned char **bytes, size_t *size, char *error);

int mkb_adapter_open(const mkb_model *model, const char *path, mkb_adapter **adapter, char error[MKB_ERROR_BYTES]) {
    unsigned char *bytes = NULL;
    size_t size = 0;
    *adapter = NULL;
    int status = read_sized_file(path, "a file that `mixkabrn adapter pack` wrote", &bytes, &size, error);
    if (!status) status = open_adapter(model, bytes, size, path, adapter, error);
    free(bytes);
    return status;
}

void mkb_adapter_info(const mkb_adapter *a, mkb_adapter_details *details) { *details = a->details; }

/* --- adapters of a context --- */

static int check_adapters(const mkb_context *c, const mkb_adapter *const *adapters, const float *weights, size_t count,
                          char *error) {
    size_t patches = 0;
    if (count > MOST_ADAPTERS)
        return fail(error, MKB_ERROR_ARGUMENT, "%lu adapters at once; use up to %d", (unsigned long)count, MOST_ADAPTERS);
    for (size_t i = 0; i < count; i++) {
        const mkb_adapter *a = adapters[i];
        if (!a || a->model != c->model)
            return fail(error, MKB_ERROR_ARGUMENT, "an adapter was not opened for this model; open it for this one");
        patches += a->patched != NULL;
        if (!(fabsf(weights[i]) <= 1e6f)) return fail(error, MKB_ERROR_ARGUMENT, "an adapter's weight is no number; use 1");
        if (a->patched && (weights[i] != 1.0f || patches > 1))
            return fail(error, MKB_ERROR_ARGUMENT, "%s flips codes: of such adapters one can be used, with the weight 1",
                        *a->details.name ? a->details.name : "an adapter");
    }
    return MKB_OK;
}

/* One piece of memory for all threads' scratch; NULL without. */
static rank_scratch *make_scratch(int threads, size_t ranks, size_t columns, void **memory) {
    size_t row = round_up(columns, 64), each = row * 3 + round_up(ranks * 4, 64) + round_up(ranks * 8, 64) * 2;
    size_t head = round_up((size_t)threads * sizeof(rank_scratch), 64);
    unsigned char *next = *memory = allocate(1, head + row * 2 + (uint64_t)each * (uint64_t)threads), *zeros;
    if (!next) return NULL;
    memset(next, 0, head + row * 2 + each * (size_t)threads);
    rank_scratch *all_of = (rank_scratch *)(void *)next;
    zeros = next + head, next = zeros + row * 2;
    for (int i = 0; i < threads; i++, next += each) {
        unsigned char *whole = next + row * 3;
        all_of[i].row = (split_vector){.high = (int8_t *)zeros, .middle = (int8_t *)zeros, .low = (int8_t *)next,
                                       .upper = (int16_t *)(void *)zeros, .lower = (int16_t *)(void *)(next + row)};
        all_of[i].sums = (int64_t *)(void *)whole;
        all_of[i].exact = (double *)(void *)(whole + round_up(ranks * 8, 64));
        all_of[i].hidden = (float *)(void *)(whole + 2 * round_up(ranks * 8, 64));
    }
    return all_of;
}

/* The model's layers with some tensors in place of others. */
static layer *patch_layers(const mkb_model *m, const mkb_adapter *patch) {
    layer *layers = malloc(m->set.layers * sizeof *layers);
    if (!layers) return NULL;
    memcpy(layers, m->layers, m->set.layers * sizeof *layers);
    for (size_t i = 0; i < (size_t)m->set.layers * LAYER_TENSORS; i++)
        if (patch->patched[i].values) layers[i / LAYER_TENSORS].tensors[i % LAYER_TENSORS] = patch->patched[i];
    return layers;
}

/* What saved states are told apart by. */
static void mark_adapters(mkb_context *c) {
    unsigned char digest[32] = {0}, weight[4];
    sha256_state s;
    sha256_begin(&s);
    for (size_t i = 0; i < c->num_adapters; i++) {
        sha256_add(&s, c->adapters[i]->details.sha256, 32);
        copy_words(weight, &c->adapter_weights[i], 1);
        sha256_add(&s, weight, 4);
    }
    if (c->num_adapters) sha256_end(&s, digest);
    memcpy(c->adapters_mark, digest, sizeof c->adapters_mark);
}

static void drop_adapters(mkb_context *c) {
    for (size_t i = 0; i < c->num_adapters; i++) mkb_adapter_close((mkb_adapter *)(uintptr_t)c->adapters[i]);
    free(c->rank_memory);
    free(c->patched);
    c->num_adapters = 0, c->ranks = NULL, c->rank_memory = NULL, c->patched = NULL, c->layers = c->model->layers;
}

int mkb_context_set_adapters(mkb_context *c, mkb_adapter *const *adapters, const float *weights, size_t count,
                             char error[MKB_ERROR_BYTES]) {
    const mkb_adapter *patch = NULL;
    size_t ranks = 0, columns = 0;
    int status = check_adapters(c, (const mkb_adapter *const *)adapters, weights, count, error);
    if (status) return status;
    for (size_t i = 0; i < count; i++) {
        ranks += adapters[i]->rank, columns = MAX(columns, adapters[i]->columns);
        if (adapters[i]->patched) patch = adapters[i];
    }
    void *memory = NULL;
    rank_scratch *scratch = ranks ? make_scratch(c->pool.threads, ranks, columns, &memory) : NULL;
    layer *layers = patch ? patch_layers(c->model, patch) : NULL;
    if ((ranks && !scratch) || (patch && !layers)) {
        free(memory);
        free(layers);
        return fail(error, MKB_ERROR_MEMORY, "no memory to use an adapter");
    }
    for (size_t i = 0; i < count; i++) __atomic_add_fetch(&adapters[i]->users, 1, __ATOMIC_RELAXED);
    drop_adapters(c);
    for (size_t i = 0; i < count; i++) c->adapters[i] = adapters[i], c->adapter_weights[i] = weights[i];
    c->num_adapters = count, c->ranks = scratch, c->rank_memory = memory, c->patched = layers;
    if (layers) c->layers = layers;
    mark_adapters(c);
    mkb_reset(c);
    return MKB_OK;
}

/* The weighted sum of the adapters' states. */
static void begin_states(const mkb_context *c) {
    const settings *s = &c->model->set;
    size_t size = (size_t)s->heads * s->key_dim * round_up(s->value_dim, LANES);
    for (size_t i = 0; i < c->num_adapters; i++)
        for (uint32_t number = 0; c->adapters[i]->states && number < s->layers; number++) {
            const float *from = c->adapters[i]->states[number];
            for (size_t at = 0; from && at < size; at++) c->states[number][at] += c->adapter_weights[i] * from[at];
        }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

/* ---- 8 state ---- */

/* A saved state, little-endian: header, sampler, then numbers: heads' matrices and remembered inputs layer by layer, and
 * keys and values of the tokens in attention layers' caches. */
enum {
    STATE_HEADER = 128,
    STATE_SAMPLER = 76 + 4 * SAMPLER_WINDOW,
    STATE_BEGIN = (STATE_HEADER + STATE_SAMPLER + 63) / 64 * 64,
    STATE_VERSION = 1, /* 2 with adapters, of which older runtimes know nothing */
    STATE_MARK = 104   /* of the adapters */
};
static const unsigned char STATE_MAGIC[8] = {0x89, 'M', 'K', 'S', '\r', '\n', 0x1a, '\n'};

void mkb_reset(mkb_context *c) {
    memset(c->state_memory, 0, c->state_floats * 4);
    begin_states(c);
    memset(c->sampler.window, 0, sizeof c->sampler.window);
    c->sampler.window_count = c->sampler.window_next = c->sampler.drawn = 0;
    c->position = 0;
}

uint64_t mkb_position(const mkb_context *c) { return c->position; }

/* Numbers of a token in all caches. */
static uint64_t cache_floats(const mkb_model *m) {
    uint64_t layers = 0;
    for (uint32_t i = 0; i < m->set.layers; i++) layers += (uint64_t)m->layers[i].attention;
    return layers * m->set.heads * ((uint64_t)m->set.key_dim + m->set.value_dim);
}

static uint64_t state_bytes_at(const mkb_model *m, uint64_t position) {
    return STATE_BEGIN + m->state_bytes + cache_floats(m) * position * 4;
}

size_t mkb_state_bytes(const mkb_context *c) { return (size_t)state_bytes_at(c->model, c->position); }

/* Tells damage, not malice. Four sums side by side, since one would wait for its multiplications. */
static uint64_t checksum(const unsigned char *bytes, size_t size) {
    uint64_t lane[4] = {1, 2, 3, 4}, total = size;
    for (; size >= 32; bytes += 32, size -= 32)
        for (int i = 0; i < 4; i++) lane[i] = (lane[i] ^ read_u64(bytes + 8 * i)) * 0x9e3779b97f4a7c15u;
    for (; size; bytes++, size--) lane[0] = (lane[0] ^ *bytes) * 0x9e3779b97f4a7c15u;
    for (int i = 0; i < 4; i++) total = (total ^ lane[i] ^ lane[i] >> 29) * 0x9e3779b97f4a7c15u;
    return total;
}

static void write_sampler(unsigned char *to, const sampler_state *s) {
    const mkb_sampling *set = &s->settings;
    const float numbers[4] = {set->temperature, set->top_p, set->min_p, set->repetition_penalty};
    for (int i = 0; i < 4; i++) write_u64(to + 8 * i, s->random[i]);
    copy_words(to + 32, numbers, 4);
    write_u32(to + 48, set->top_k);
    write_u32(to + 52, set->repetition_window);
    write_u64(to + 56, set->seed);
    write_u32(to + 64, s->window_count);
    write_u32(to + 68, s->window_next);
    copy_words(to + 72, s->window, SAMPLER_WINDOW);
    write_u32(to + 72 + 4 * SAMPLER_WINDOW, s->drawn);
}

static void read_sampler(const unsigned char *from, sampler_state *s) {
    float numbers[4];
    copy_words(numbers, from + 32, 4);
    for (int i = 0; i < 4; i++) s->random[i] = read_u64(from + 8 * i);
    s->settings = (mkb_sampling){.temperature = numbers[0],
                                 .top_k = read_u32(from + 48),
                                 .top_p = numbers[1],
                                 .min_p = numbers[2],
                                 .repetition_penalty = numbers[3],
                                 .repetition_window = read_u32(from + 52),
                                 .seed = read_u64(from + 56)};
    s->window_count = read_u32(from + 64), s->window_next = read_u32(from + 68);
    copy_words(s->window, from + 72, SAMPLER_WINDOW);
    s->drawn = read_u32(from + 72 + 4 * SAMPLER_WINDOW);
}

/* Copy the numbers between the context and a saved state. */
static void copy_state(const mkb_context *c, unsigned char *bytes, uint64_t position, int out) {
    const settings *s = &c->model->set;
    size_t width[2] = {(size_t)s->heads * s->key_dim, (size_t)s->heads * s->value_dim};
    copy_words(out ? (void *)bytes : c->state_memory, out ? (void *)c->state_memory : bytes, c->state_floats);
    bytes += c->state_floats * 4;
    for (uint32_t i = 0; i < s->layers; i++)
        for (int part = 0; part < 2 && c->model->layers[i].attention; part++) {
            float *cache = c->states[i] + (part ? (size_t)c->max_tokens * width[0] : 0);
            size_t count = (size_t)position * width[part];
            copy_words(out ? (void *)bytes : cache, out ? (void *)cache : bytes, count);
            bytes += count * 4;
        }
}

int mkb_state_get(const mkb_context *c, void *memory, size_t size, char error[MKB_ERROR_BYTES]) {
    unsigned char *bytes = memory;
    size_t needed = mkb_state_bytes(c);
    if (size < needed)
        return fail(error, MKB_ERROR_FULL, "a state takes %llu bytes, and there is room for %llu",
                    (unsigned long long)needed, (unsigned long long)size);
    memset(bytes, 0, STATE_BEGIN);
    memcpy(bytes, STATE_MAGIC, 8);
    write_u32(bytes + 8, STATE_VERSION + (c->num_adapters > 0));
    write_u32(bytes + 12, STATE_BEGIN);
    write_u64(bytes + 16, needed);
    memcpy(bytes + 24, c->model->sha256, 32);
    memcpy(bytes + 56, c->model->tokenizer_sha256, 32);
    write_u64(bytes + 88, c->position);
    memcpy(bytes + STATE_MARK, c->adapters_mark, sizeof c->adapters_mark);
    write_sampler(bytes + STATE_HEADER, &c->sampler);
    copy_state(c, bytes + STATE_BEGIN, c->position, 1);
    write_u64(bytes + 96, checksum(bytes + 104, needed - 104) ^ c->position);
    return MKB_OK;
}

static int check_sampling(const mkb_sampling *s, char *error);

/* What its first STATE_HEADER bytes say of a state of `size` bytes, before memory is asked for because of them. */
static int check_state_header(const mkb_model *m, const unsigned char *bytes, uint64_t size, const char *name, char *error) {
    uint64_t position, expected, a_token = cache_floats(m) * 4;
    if (!size || memcmp(bytes, STATE_MAGIC, (size_t)MIN(size, 8)))
        return fail(error, MKB_ERROR_FORMAT, "%s is not a saved state of MixKABRN; name one, or begin without", name);
    expected = size >= 24 ? read_u64(bytes + 16) : STATE_BEGIN;
    if (size < STATE_BEGIN || expected != size)
        return fail(error, MKB_ERROR_FORMAT, "%s is cut off or damaged: %llu bytes expected, %llu found; use another copy",
                    name, (unsigned long long)expected, (unsigned long long)size);
    if (read_u32(bytes + 8) - STATE_VERSION > 1 || read_u32(bytes + 12) != STATE_BEGIN)
        return fail(error, MKB_ERROR_FORMAT, "%s has the version %lu, and this runtime reads 1 and 2; use the one that wrote it",
                    name, (unsigned long)read_u32(bytes + 8));
    if (memcmp(bytes + 24, m->sha256, 32) || memcmp(bytes + 56, m->tokenizer_sha256, 32))
        return fail(error, MKB_ERROR_MISMATCH,
                    "%s belongs to another model or to another packing of it (embedding or ternary option) than %s", name,
                    m->name);
    position = read_u64(bytes + 88);
    if (a_token && position > size / a_token)
        return fail(error, MKB_ERROR_FORMAT, "%s is damaged: %llu tokens do not fit its %llu bytes; use another copy", name,
                    (unsigned long long)position, (unsigned long long)size);
    expected = state_bytes_at(m, position);
    if (expected == size) return MKB_OK;
    return fail(error, MKB_ERROR_FORMAT, "%s is cut off or damaged: %llu bytes expected, %llu found; use another copy", name,
                (unsigned long long)expected, (unsigned long long)size);
}

/* All that can be wrong with a state, before anything of the context changes. */
static int check_state_bytes(const mkb_context *c, const unsigned char *bytes, size_t size, const char *name, char *error) {
    sampler_state sampler;
    uint64_t position, most = has_attention(c->model) ? c->max_tokens : UINT64_MAX;
    int status = check_state_header(c->model, bytes, size, name, error);
    if (status) return status;
    if (memcmp(bytes + STATE_MARK, c->adapters_mark, sizeof c->adapters_mark))
        return fail(error, MKB_ERROR_MISMATCH, "%s was made %s in use; use the same ones, or begin without it", name,
                    read_u32(bytes + 8) > STATE_VERSION ? "with other adapters than those" : "without the adapters");
    position = read_u64(bytes + 88);
    if (position > most)
        return fail(error, MKB_ERROR_FULL, "%s holds %llu tokens, and the caches have room for %llu; use a larger max_tokens",
                    name, (unsigned long long)position, (unsigned long long)most);
    if (read_u64(bytes + 96) != (checksum(bytes + 104, size - 104) ^ position) ||
        read_u32(bytes + STATE_HEADER + 64) > SAMPLER_WINDOW || read_u32(bytes + STATE_HEADER + 68) >= SAMPLER_WINDOW)
        return fail(error, MKB_ERROR_FORMAT, "%s is damaged: its checksum differs; use another copy", name);
    read_sampler(bytes + STATE_HEADER, &sampler);
    if (check_sampling(&sampler.settings, NULL))
        return fail(error, MKB_ERROR_FORMAT, "%s holds settings of sampling without meaning; begin without it", name);
    return MKB_OK;
}

static int set_state(mkb_context *c, unsigned char *bytes, size_t size, const char *name, char *error) {
    int status = check_state_bytes(c, bytes, size, name, error);
    if (status) return status;
    c->position = read_u64(bytes + 88);
    read_sampler(bytes + STATE_HEADER, &c->sampler);
    copy_state(c, bytes + STATE_BEGIN, c->position, 0);
    return MKB_OK;
}

int mkb_state_set(mkb_context *c, const void *bytes, size_t size, char error[MKB_ERROR_BYTES]) {
    return set_state(c, (unsigned char *)(uintptr_t)bytes, size, "the state", error);
}

#ifdef __wasi__
static long process_number(void) { return 1; }
#else
static long process_number(void) { return (long)getpid(); }
#endif

static int write_whole(int file, const unsigned char *bytes, size_t size) {
    while (size) {
        ssize_t done = write(file, bytes, MIN(size, (size_t)1 << 30));
        if (done <= 0 && errno != EINTR) return -1;
        if (done > 0) bytes += done, size -= (size_t)done;
    }
    return 0;
}

/* A file that is there is replaced only if it is a saved state, or empty. */
static int check_replaceable(const char *path, char *error) {
    unsigned char magic[8];
    struct stat about;
    int file = open_regular(path, path, "a new file to save to", &about, error);
    if (file < 0) return MKB_ERROR_FILE;
    int ours = !about.st_size || (read(file, magic, 8) == 8 && !memcmp(magic, STATE_MAGIC, 8));
    close(file);
    return ours ? MKB_OK : fail(error, MKB_ERROR_FILE, "%s is there and is not a saved state; save under another name", path);
}

/* Where a state given this name is written, in memory that is the caller's: links are followed. NULL says why not. A new
 * file is private, since it holds what was said; another keeps its mode. */
static char *find_target(const char *path, mode_t *mode, char *error) {
    struct stat about;
    char *target = NULL;
    *mode = 0600;
    if (!lstat(path, &about)) {
        if (check_replaceable(path, error)) return NULL;
        if (!stat(path, &about)) *mode = about.st_mode & 0777;
#ifndef __wasi__
        target = realpath(path, NULL);
#endif
    }
    if (!target) target = strdup(path);
    if (!target) fail(error, MKB_ERROR_MEMORY, "%s: no memory to save", path);
    return target;
}

#ifndef MIXKABRN_LIBRARY
/* Whether a state can be saved there, asked before long work. */
static int check_target(const char *path, char *error) {
    mode_t mode;
    char *target = find_target(path, &mode, error), *slash;
    int bad;
    if (!target) return MKB_ERROR_FILE;
    slash = strrchr(target, '/');
    if (slash) slash[slash == target] = 0;
    bad = access(slash ? target : ".", W_OK | X_OK);
    free(target);
    return bad ? fail(error, MKB_ERROR_FILE, "%s: cannot be written: %s", path, strerror(errno)) : MKB_OK;
}
#endif

/* 0, or the error's number. */
static int write_new_file(const char *path, mode_t mode, const unsigned char *bytes, size_t size) {
    int file, reason = 0;
    unlink(path);
    file = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file < 0) return errno;
    if (write_whole(file, bytes, size) || fsync(file)) reason = errno;
#ifndef __wasi__
    if (!reason && fchmod(file, mode)) reason = errno;
#else
    (void)mode;
#endif
    if (close(file) && !reason) reason = errno;
    return reason;
}

/* Write under another name first, so that the file appears whole or not at all. */
static int replace_file(const char *path, const unsigned char *bytes, size_t size, char *error) {
    mode_t mode;
    char *target = find_target(path, &mode, error), *beside;
    if (!target) return MKB_ERROR_FILE;
    size_t room = strlen(target) + 32;
    int reason = ENOMEM;
    beside = malloc(room);
    if (beside) {
        snprintf(beside, room, "%s.%ld.part", target, process_number());
        reason = write_new_file(beside, mode, bytes, size);
        if (!reason && rename(beside, target)) reason = errno;
        if (reason) unlink(beside);
    }
    free(beside);
    free(target);
    return reason ? fail(error, MKB_ERROR_FILE, "%s: cannot be written: %s", path, strerror(reason)) : MKB_OK;
}

int mkb_state_save(const mkb_context *c, const char *path, char error[MKB_ERROR_BYTES]) {
    size_t size = mkb_state_bytes(c);
    unsigned char *bytes = malloc(size);
    if (!bytes) return fail(error, MKB_ERROR_MEMORY, "%s: no memory to save %llu bytes", path, (unsigned long long)size);
    int status = mkb_state_get(c, bytes, size, error);
    if (!status) status = replace_file(path, bytes, size, error);
    free(bytes);
    return status;
}

static int fill_bytes(int file, const char *path, unsigned char *bytes, size_t size, char *error) {
    for (size_t done = 0; done < size;) {
        ssize_t got = read(file, bytes + done, MIN(size - done, (size_t)1 << 30));
        if (got <= 0) return fail(error, MKB_ERROR_FILE, "%s: cannot be read: %s", path, strerror(errno));
        done += (size_t)got;
    }
    return MKB_OK;
}

/* All of a regular file, in memory that is the caller's, also after an error. `wanted` says what it should be. */
static int read_sized_file(const char *path, const char *wanted, unsigned char **bytes, size_t *size, char *error) {
    struct stat about;
    int file = open_regular(path, path, wanted, &about, error), status;
    if (file < 0) return MKB_ERROR_FILE;
    *size = (size_t)about.st_size;
    *bytes = (uint64_t)about.st_size <= SIZE_MAX / 2 ? malloc(*size + 1) : NULL;
    if (*bytes) status = fill_bytes(file, path, *bytes, *size, error);
    else status = fail(error, MKB_ERROR_MEMORY, "%s: no memory for %llu bytes", path, (unsigned long long)about.st_size);
    close(file);
    return status;
}

int mkb_state_load(mkb_context *c, const char *path, char error[MKB_ERROR_BYTES]) {
    unsigned char *bytes = NULL;
    size_t size = 0;
    int status = read_sized_file(path, "a saved state", &bytes, &size, error);
    if (!status) status = set_state(c, bytes, size, path, error);
    free(bytes);
    return status;
}

/* ---- 9 tokenizer ----
 *
 * A text is divided at added tokens, the rest into words, and the bytes of each word are merged. All tables are read
 * where they lie in the file; two hash tables of 32-bit numbers are made when it is opened. */

enum { TOKENIZER_HEADER = 32, TOKENIZER_IGNORE_MERGES = 1, TOKENIZER_SINGLE_DIGITS = 2 };
enum { MARK_SPECIAL = 1, MARK_ADDED = 2, MARK_WHOLE_WORD = 4 };
enum { WORDS_NONE, WORDS_GPT2, WORDS_CL100K, WORDS_QWEN2 };

#define NO_RANK UINT32_MAX

/* Classes of characters: letters \p{L}, numbers \p{N}, blanks \s, and numbers of newer Unicode that only single digits
 * know. Each entry is the first code point of a range × 8 + its class. From `python -m
 * kabrn_dist.runtime.unicode_classes`, which asks the library that the trainer uses. */
enum { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_BLANK, CLASS_DIGIT };
static const uint32_t character_classes[] = {
    0x0, 0x4b, 0x70, 0x103, 0x108, 0x182, 0x1d0, 0x209, 0x2d8, 0x309, 0x3d8, 0x42b, 0x430, 0x503, 0x508, 0x551,
    0x558, 0x592, 0x5a0, 0x5a9, 0x5b0, 0x5ca, 0x5d1, 0x5d8, 0x5e2, 0x5f8, 0x601, 0x6b8, 0x6c1, 0x7b8, 0x7c1, 0x1610,
    0x1631, 0x1690, 0x1701, 0x1728, 0x1761, 0x1768, 0x1771, 0x1778, 0x1b81, 0x1ba8, 0x1bb1, 0x1bc0, 0x1bd1, 0x1bf0,
    0x1bf9, 0x1c00, 0x1c31, 0x1c38, 0x1c41, 0x1c58, 0x1c61, 0x1c68, 0x1c71, 0x1d10, 0x1d19, 0x1fb0, 0x1fb9, 0x2410,
    0x2451, 0x2980, 0x2989, 0x2ab8, 0x2ac9, 0x2ad0, 0x2b01, 0x2c48, 0x2e81, 0x2f58, 0x2f79, 0x2f98, 0x3101, 0x3258,
    0x3302, 0x3350, 0x3371, 0x3380, 0x3389, 0x36a0, 0x36a9, 0x36b0, 0x3729, 0x3738, 0x3771, 0x3782, 0x37d1, 0x37e8,
    0x37f9, 0x3800, 0x3881, 0x3888, 0x3891, 0x3980, 0x3a69, 0x3d30, 0x3d89, 0x3d90, 0x3e02, 0x3e51, 0x3f58, 0x3fa1,
    0x3fb0, 0x3fd1, 0x3fd8, 0x4001, 0x40b0, 0x40d1, 0x40d8, 0x4121, 0x4128, 0x4141, 0x4148, 0x4201, 0x42c8, 0x4301,
    0x4358, 0x4381, 0x4440, 0x4449, 0x4478, 0x4501, 0x4650, 0x4821, 0x49d0, 0x49e9, 0x49f0, 0x4a81, 0x4a88, 0x4ac1,
    0x4b10, 0x4b32, 0x4b80, 0x4b89, 0x4c08, 0x4c29, 0x4c68, 0x4c79, 0x4c88, 0x4c99, 0x4d48, 0x4d51, 0x4d88, 0x4d91,
    0x4d98, 0x4db1, 0x4dd0, 0x4de9, 0x4df0, 0x4e71, 0x4e78, 0x4ee1, 0x4ef0, 0x4ef9, 0x4f10, 0x4f32, 0x4f81, 0x4f90,
    0x4fa2, 0x4fd0, 0x4fe1, 0x4fe8, 0x5029, 0x5058, 0x5079, 0x5088, 0x5099, 0x5148, 0x5151, 0x5188, 0x5191, 0x51a0,
    0x51a9, 0x51b8, 0x51c1, 0x51d0, 0x52c9, 0x52e8, 0x52f1, 0x52f8, 0x5332, 0x5380, 0x5391, 0x53a8, 0x5429, 0x5470,
    0x5479, 0x5490, 0x5499, 0x5548, 0x5551, 0x5588, 0x5591, 0x55a0, 0x55a9, 0x55d0, 0x55e9, 0x55f0, 0x5681, 0x5688,
    0x5701, 0x5710, 0x5732, 0x5780, 0x57c9, 0x57d0, 0x5829, 0x5868, 0x5879, 0x5888, 0x5899, 0x5948, 0x5951, 0x5988,
    0x5991, 0x59a0, 0x59a9, 0x59d0, 0x59e9, 0x59f0, 0x5ae1, 0x5af0, 0x5af9, 0x5b10, 0x5b32, 0x5b80, 0x5b89, 0x5b92,
    0x5bc0, 0x5c19, 0x5c20, 0x5c29, 0x5c58, 0x5c71, 0x5c88, 0x5c91, 0x5cb0, 0x5cc9, 0x5cd8, 0x5ce1, 0x5ce8, 0x5cf1,
    0x5d00, 0x5d19, 0x5d28, 0x5d41, 0x5d58, 0x5d71, 0x5dd0, 0x5e81, 0x5e88, 0x5f32, 0x5f98, 0x6029, 0x6068, 0x6071,
    0x6088, 0x6091, 0x6148, 0x6151, 0x61d0, 0x61e9, 0x61f0, 0x62c1, 0x62d8, 0x62e9, 0x62f0, 0x6301, 0x6310, 0x6332,
    0x6380, 0x63c2, 0x63f8, 0x6401, 0x6408, 0x6429, 0x6468, 0x6471, 0x6488, 0x6491, 0x6548, 0x6551, 0x65a0, 0x65a9,
    0x65d0, 0x65e9, 0x65f0, 0x66e9, 0x66f8, 0x6701, 0x6710, 0x6732, 0x6780, 0x6789, 0x6798, 0x6821, 0x6868, 0x6871,
    0x6888, 0x6891, 0x69d8, 0x69e9, 0x69f0, 0x6a71, 0x6a78, 0x6aa1, 0x6ab8, 0x6ac2, 0x6af9, 0x6b10, 0x6b32, 0x6bc8,
    0x6bd1, 0x6c00, 0x6c29, 0x6cb8, 0x6cd1, 0x6d90, 0x6d99, 0x6de0, 0x6de9, 0x6df0, 0x6e01, 0x6e38, 0x6f32, 0x6f80,
    0x7009, 0x7188, 0x7191, 0x71a0, 0x7201, 0x7238, 0x7282, 0x72d0, 0x7409, 0x7418, 0x7421, 0x7428, 0x7431, 0x7458,
    0x7461, 0x7520, 0x7529, 0x7530, 0x7539, 0x7588, 0x7591, 0x75a0, 0x75e9, 0x75f0, 0x7601, 0x7628, 0x7631, 0x7638,
    0x7682, 0x76d0, 0x76e1, 0x7700, 0x7801, 0x7808, 0x7902, 0x79a0, 0x7a01, 0x7a40, 0x7a49, 0x7b68, 0x7c41, 0x7c68,
    0x8001, 0x8158, 0x81f9, 0x8202, 0x8250, 0x8281, 0x82b0, 0x82d1, 0x82f0, 0x8309, 0x8310, 0x8329, 0x8338, 0x8371,
    0x8388, 0x83a9, 0x8410, 0x8471, 0x8478, 0x8482, 0x84d0, 0x8501, 0x8630, 0x8639, 0x8640, 0x8669, 0x8670, 0x8681,
    0x87d8, 0x87e1, 0x9248, 0x9251, 0x9270, 0x9281, 0x92b8, 0x92c1, 0x92c8, 0x92d1, 0x92f0, 0x9301, 0x9448, 0x9451,
    0x9470, 0x9481, 0x9588, 0x9591, 0x95b0, 0x95c1, 0x95f8, 0x9601, 0x9608, 0x9611, 0x9630, 0x9641, 0x96b8, 0x96c1,
    0x9888, 0x9891, 0x98b0, 0x98c1, 0x9ad8, 0x9b4a, 0x9be8, 0x9c01, 0x9c80, 0x9d01, 0x9fb0, 0x9fc1, 0x9ff0, 0xa009,
    0xb368, 0xb379, 0xb403, 0xb409, 0xb4d8, 0xb501, 0xb758, 0xb772, 0xb789, 0xb7c8, 0xb801, 0xb890, 0xb8f9, 0xb990,
    0xba01, 0xba90, 0xbb01, 0xbb68, 0xbb71, 0xbb88, 0xbc01, 0xbda0, 0xbeb9, 0xbec0, 0xbee1, 0xbee8, 0xbf02, 0xbf50,
    0xbf82, 0xbfd0, 0xc082, 0xc0d0, 0xc101, 0xc3c8, 0xc401, 0xc428, 0xc439, 0xc548, 0xc551, 0xc558, 0xc581, 0xc7b0,
    0xc801, 0xc8f8, 0xca32, 0xca81, 0xcb70, 0xcb81, 0xcba8, 0xcc01, 0xcd60, 0xcd81, 0xce50, 0xce82, 0xced8, 0xd001,
    0xd0b8, 0xd101, 0xd2a8, 0xd402, 0xd450, 0xd482, 0xd4d0, 0xd539, 0xd540, 0xd829, 0xd9a0, 0xda29, 0xda68, 0xda82,
    0xdad0, 0xdc19, 0xdd08, 0xdd71, 0xdd82, 0xddd1, 0xdf30, 0xe001, 0xe120, 0xe202, 0xe250, 0xe269, 0xe282, 0xe2d1,
    0xe3f0, 0xe401, 0xe458, 0xe481, 0xe5d8, 0xe5e9, 0xe600, 0xe749, 0xe768, 0xe771, 0xe7a0, 0xe7a9, 0xe7b8, 0xe7d1,
    0xe7d8, 0xe801, 0xee00, 0xf001, 0xf8b0, 0xf8c1, 0xf8f0, 0xf901, 0xfa30, 0xfa41, 0xfa70, 0xfa81, 0xfac0, 0xfac9,
    0xfad0, 0xfad9, 0xfae0, 0xfae9, 0xfaf0, 0xfaf9, 0xfbf0, 0xfc01, 0xfda8, 0xfdb1, 0xfde8, 0xfdf1, 0xfdf8, 0xfe11,
    0xfe28, 0xfe31, 0xfe68, 0xfe81, 0xfea0, 0xfeb1, 0xfee0, 0xff01, 0xff68, 0xff91, 0xffa8, 0xffb1, 0xffe8, 0x10003,
    0x10058, 0x10143, 0x10150, 0x1017b, 0x10180, 0x102fb, 0x10300, 0x10382, 0x10389, 0x10390, 0x103a2, 0x103d0,
    0x103f9, 0x10402, 0x10450, 0x10481, 0x104e8, 0x10811, 0x10818, 0x10839, 0x10840, 0x10851, 0x108a0, 0x108a9,
    0x108b0, 0x108c9, 0x108f0, 0x10921, 0x10928, 0x10931, 0x10938, 0x10941, 0x10948, 0x10951, 0x10970, 0x10979,
    0x109d0, 0x109e1, 0x10a00, 0x10a29, 0x10a50, 0x10a71, 0x10a78, 0x10a82, 0x10c19, 0x10c2a, 0x10c50, 0x12302,
    0x124e0, 0x12752, 0x12800, 0x13bb2, 0x13ca0, 0x16001, 0x16728, 0x16759, 0x16778, 0x16791, 0x167a0, 0x167ea,
    0x167f0, 0x16801, 0x16930, 0x16939, 0x16940, 0x16969, 0x16970, 0x16981, 0x16b40, 0x16b79, 0x16b80, 0x16c01,
    0x16cb8, 0x16d01, 0x16d38, 0x16d41, 0x16d78, 0x16d81, 0x16db8, 0x16dc1, 0x16df8, 0x16e01, 0x16e38, 0x16e41,
    0x16e78, 0x16e81, 0x16eb8, 0x16ec1, 0x16ef8, 0x17179, 0x17180, 0x18003, 0x18008, 0x18029, 0x1803a, 0x18040,
    0x1810a, 0x18150, 0x18189, 0x181b0, 0x181c2, 0x181d9, 0x181e8, 0x18209, 0x184b8, 0x184e9, 0x18500, 0x18509,
    0x187d8, 0x187e1, 0x18800, 0x18829, 0x18980, 0x18989, 0x18c78, 0x18c92, 0x18cb0, 0x18d01, 0x18e00, 0x18f81,
    0x19000, 0x19102, 0x19150, 0x19242, 0x19280, 0x1928a, 0x19300, 0x19402, 0x19450, 0x1958a, 0x19600, 0x1a001,
    0x26e00, 0x27001, 0x52468, 0x52681, 0x527f0, 0x52801, 0x53068, 0x53081, 0x53102, 0x53151, 0x53160, 0x53201,
    0x53378, 0x533f9, 0x534f0, 0x53501, 0x53732, 0x53780, 0x538b9, 0x53900, 0x53911, 0x53c48, 0x53c59, 0x53e70,
    0x53e81, 0x53e90, 0x53e99, 0x53ea0, 0x53ea9, 0x53ee8, 0x53f91, 0x54010, 0x54019, 0x54030, 0x54039, 0x54058,
    0x54061, 0x54118, 0x54182, 0x541b0, 0x54201, 0x543a0, 0x54411, 0x545a0, 0x54682, 0x546d0, 0x54791, 0x547c0,
    0x547d9, 0x547e0, 0x547e9, 0x547f8, 0x54802, 0x54851, 0x54930, 0x54981, 0x54a38, 0x54b01, 0x54be8, 0x54c21,
    0x54d98, 0x54e79, 0x54e82, 0x54ed0, 0x54f01, 0x54f28, 0x54f31, 0x54f82, 0x54fd1, 0x54ff8, 0x55001, 0x55148,
    0x55201, 0x55218, 0x55221, 0x55260, 0x55282, 0x552d0, 0x55301, 0x553b8, 0x553d1, 0x553d8, 0x553f1, 0x55580,
    0x55589, 0x55590, 0x555a9, 0x555b8, 0x555c9, 0x555f0, 0x55601, 0x55608, 0x55611, 0x55618, 0x556d9, 0x556f0,
    0x55701, 0x55758, 0x55791, 0x557a8, 0x55809, 0x55838, 0x55849, 0x55878, 0x55889, 0x558b8, 0x55901, 0x55938,
    0x55941, 0x55978, 0x55981, 0x55ad8, 0x55ae1, 0x55b50, 0x55b81, 0x55f18, 0x55f82, 0x55fd0, 0x56001, 0x6bd20,
    0x6bd81, 0x6be38, 0x6be59, 0x6bfe0, 0x7c801, 0x7d370, 0x7d381, 0x7d6d0, 0x7d801, 0x7d838, 0x7d899, 0x7d8c0,
    0x7d8e9, 0x7d8f0, 0x7d8f9, 0x7d948, 0x7d951, 0x7d9b8, 0x7d9c1, 0x7d9e8, 0x7d9f1, 0x7d9f8, 0x7da01, 0x7da10,
    0x7da19, 0x7da28, 0x7da31, 0x7dd90, 0x7de99, 0x7e9f0, 0x7ea81, 0x7ec80, 0x7ec91, 0x7ee40, 0x7ef81, 0x7efe0,
    0x7f381, 0x7f3a8, 0x7f3b1, 0x7f7e8, 0x7f882, 0x7f8d0, 0x7f909, 0x7f9d8, 0x7fa09, 0x7fad8, 0x7fb31, 0x7fdf8,
    0x7fe11, 0x7fe40, 0x7fe51, 0x7fe80, 0x7fe91, 0x7fec0, 0x7fed1, 0x7fee8, 0x80001, 0x80060, 0x80069, 0x80138,
    0x80141, 0x801d8, 0x801e1, 0x801f0, 0x801f9, 0x80270, 0x80281, 0x802f0, 0x80401, 0x807d8, 0x8083a, 0x809a0,
    0x80a02, 0x80bc8, 0x80c52, 0x80c60, 0x81401, 0x814e8, 0x81501, 0x81688, 0x8170a, 0x817e0, 0x81801, 0x81902,
    0x81920, 0x81969, 0x81a0a, 0x81a11, 0x81a52, 0x81a58, 0x81a81, 0x81bb0, 0x81c01, 0x81cf0, 0x81d01, 0x81e20,
    0x81e41, 0x81e80, 0x81e8a, 0x81eb0, 0x82001, 0x824f0, 0x82502, 0x82550, 0x82581, 0x826a0, 0x826c1, 0x827e0,
    0x82801, 0x82940, 0x82981, 0x82b20, 0x82b81, 0x82bd8, 0x82be1, 0x82c58, 0x82c61, 0x82c98, 0x82ca1, 0x82cb0,
    0x82cb9, 0x82d10, 0x82d19, 0x82d90, 0x82d99, 0x82dd0, 0x82dd9, 0x82de8, 0x82e01, 0x82fa0, 0x83001, 0x839b8,
    0x83a01, 0x83ab0, 0x83b01, 0x83b40, 0x83c01, 0x83c30, 0x83c39, 0x83d88, 0x83d91, 0x83dd8, 0x84001, 0x84030,
    0x84041, 0x84048, 0x84051, 0x841b0, 0x841b9, 0x841c8, 0x841e1, 0x841e8, 0x841f9, 0x842b0, 0x842c2, 0x84301,
    0x843b8, 0x843ca, 0x84401, 0x844f8, 0x8453a, 0x84580, 0x84701, 0x84798, 0x847a1, 0x847b0, 0x847da, 0x84801,
    0x848b2, 0x848e0, 0x84901, 0x849d0, 0x84c01, 0x84dc0, 0x84de2, 0x84df1, 0x84e02, 0x84e80, 0x84e92, 0x85001,
    0x85008, 0x85081, 0x850a0, 0x850a9, 0x850c0, 0x850c9, 0x851b0, 0x85202, 0x85248, 0x85301, 0x853ea, 0x853f8,
    0x85401, 0x854ea, 0x85500, 0x85601, 0x85640, 0x85649, 0x85728, 0x8575a, 0x85780, 0x85801, 0x859b0, 0x85a01,
    0x85ab0, 0x85ac2, 0x85b01, 0x85b98, 0x85bc2, 0x85c01, 0x85c90, 0x85d4a, 0x85d80, 0x86001, 0x86248, 0x86401,
    0x86598, 0x86601, 0x86798, 0x867d2, 0x86801, 0x86920, 0x86982, 0x869d0, 0x86a02, 0x86a51, 0x86b30, 0x86b79,
    0x86c30, 0x87302, 0x873f8, 0x87401, 0x87550, 0x87581, 0x87590, 0x87611, 0x87628, 0x87801, 0x878ea, 0x87939,
    0x87940, 0x87981, 0x87a30, 0x87a8a, 0x87aa8, 0x87b81, 0x87c10, 0x87d81, 0x87e2a, 0x87e60, 0x87f01, 0x87fb8,
    0x88019, 0x881c0, 0x88292, 0x88380, 0x88389, 0x88398, 0x883a9, 0x883b0, 0x88419, 0x88580, 0x88681, 0x88748,
    0x88782, 0x887d0, 0x88819, 0x88938, 0x889b2, 0x88a00, 0x88a21, 0x88a28, 0x88a39, 0x88a40, 0x88a81, 0x88b98,
    0x88bb1, 0x88bb8, 0x88c19, 0x88d98, 0x88e09, 0x88e28, 0x88e82, 0x88ed1, 0x88ed8, 0x88ee1, 0x88ee8, 0x88f0a,
    0x88fa8, 0x89001, 0x89090, 0x89099, 0x89160, 0x891f9, 0x89208, 0x89401, 0x89438, 0x89441, 0x89448, 0x89451,
    0x89470, 0x89479, 0x894f0, 0x894f9, 0x89548, 0x89581, 0x896f8, 0x89782, 0x897d0, 0x89829, 0x89868, 0x89879,
    0x89888, 0x89899, 0x89948, 0x89951, 0x89988, 0x89991, 0x899a0, 0x899a9, 0x899d0, 0x899e9, 0x899f0, 0x89a81,
    0x89a88, 0x89ae9, 0x89b10, 0x89c01, 0x89c50, 0x89c59, 0x89c60, 0x89c71, 0x89c78, 0x89c81, 0x89db0, 0x89db9,
    0x89dc0, 0x89e89, 0x89e90, 0x89e99, 0x89ea0, 0x8a001, 0x8a1a8, 0x8a239, 0x8a258, 0x8a282, 0x8a2d0, 0x8a2f9,
    0x8a310, 0x8a401, 0x8a580, 0x8a621, 0x8a630, 0x8a639, 0x8a640, 0x8a682, 0x8a6d0, 0x8ac01, 0x8ad78, 0x8aec1,
    0x8aee0, 0x8b001, 0x8b180, 0x8b221, 0x8b228, 0x8b282, 0x8b2d0, 0x8b401, 0x8b558, 0x8b5c1, 0x8b5c8, 0x8b602,
    0x8b650, 0x8b682, 0x8b720, 0x8b801, 0x8b8d8, 0x8b982, 0x8b9e0, 0x8ba01, 0x8ba38, 0x8c001, 0x8c160, 0x8c501,
    0x8c702, 0x8c798, 0x8c7f9, 0x8c838, 0x8c849, 0x8c850, 0x8c861, 0x8c8a0, 0x8c8a9, 0x8c8b8, 0x8c8c1, 0x8c980,
    0x8c9f9, 0x8ca00, 0x8ca09, 0x8ca10, 0x8ca82, 0x8cad0, 0x8cd01, 0x8cd40, 0x8cd51, 0x8ce88, 0x8cf09, 0x8cf10,
    0x8cf19, 0x8cf20, 0x8d001, 0x8d008, 0x8d059, 0x8d198, 0x8d1d1, 0x8d1d8, 0x8d281, 0x8d288, 0x8d2e1, 0x8d450,
    0x8d4e9, 0x8d4f0, 0x8d581, 0x8d7c8, 0x8de01, 0x8df08, 0x8df82, 0x8dfd0, 0x8e001, 0x8e048, 0x8e051, 0x8e178,
    0x8e201, 0x8e208, 0x8e282, 0x8e368, 0x8e391, 0x8e480, 0x8e801, 0x8e838, 0x8e841, 0x8e850, 0x8e859, 0x8e988,
    0x8ea31, 0x8ea38, 0x8ea82, 0x8ead0, 0x8eb01, 0x8eb30, 0x8eb39, 0x8eb48, 0x8eb51, 0x8ec50, 0x8ecc1, 0x8ecc8,
    0x8ed02, 0x8ed50, 0x8ef04, 0x8ef50, 0x8f701, 0x8f798, 0x8f811, 0x8f818, 0x8f821, 0x8f888, 0x8f891, 0x8f9a0,
    0x8fa82, 0x8fad0, 0x8fd81, 0x8fd88, 0x8fe02, 0x8fea8, 0x90001, 0x91cd0, 0x92002, 0x92378, 0x92401, 0x92a20,
    0x97c81, 0x97f88, 0x98001, 0x9a180, 0x9a209, 0x9a238, 0x9a301, 0xa1fd8, 0xa2001, 0xa3238, 0xb0801, 0xb08f0,
    0xb0982, 0xb09d0, 0xb4001, 0xb51c8, 0xb5201, 0xb52f8, 0xb5302, 0xb5350, 0xb5381, 0xb55f8, 0xb5602, 0xb5650,
    0xb5681, 0xb5770, 0xb5801, 0xb5980, 0xb5a01, 0xb5a20, 0xb5a82, 0xb5ad0, 0xb5ada, 0xb5b10, 0xb5b19, 0xb5bc0,
    0xb5be9, 0xb5c80, 0xb6a01, 0xb6b68, 0xb6b82, 0xb6bd0, 0xb7201, 0xb7402, 0xb74b8, 0xb7801, 0xb7a58, 0xb7a81,
    0xb7a88, 0xb7c99, 0xb7d00, 0xb7f01, 0xb7f10, 0xb7f19, 0xb7f20, 0xb7fa4, 0xb7fb8, 0xb8001, 0xc3fc0, 0xc4001,
    0xc66b0, 0xc67f9, 0xc6848, 0xd7f81, 0xd7fa0, 0xd7fa9, 0xd7fe0, 0xd7fe9, 0xd7ff8, 0xd8001, 0xd8918, 0xd8991,
    0xd8998, 0xd8a81, 0xd8a98, 0xd8aa9, 0xd8ab0, 0xd8b21, 0xd8b40, 0xd8b81, 0xd97e0, 0xde001, 0xde358, 0xde381,
    0xde3e8, 0xde401, 0xde448, 0xde481, 0xde4d0, 0xe6782, 0xe67d0, 0xe9602, 0xe96a0, 0xe9702, 0xe97a0, 0xe9b02,
    0xe9bc8, 0xea001, 0xea2a8, 0xea2b1, 0xea4e8, 0xea4f1, 0xea500, 0xea511, 0xea518, 0xea529, 0xea538, 0xea549,
    0xea568, 0xea571, 0xea5d0, 0xea5d9, 0xea5e0, 0xea5e9, 0xea620, 0xea629, 0xea830, 0xea839, 0xea858, 0xea869,
    0xea8a8, 0xea8b1, 0xea8e8, 0xea8f1, 0xea9d0, 0xea9d9, 0xea9f8, 0xeaa01, 0xeaa28, 0xeaa31, 0xeaa38, 0xeaa51,
    0xeaa88, 0xeaa91, 0xeb530, 0xeb541, 0xeb608, 0xeb611, 0xeb6d8, 0xeb6e1, 0xeb7d8, 0xeb7e1, 0xeb8a8, 0xeb8b1,
    0xeb9a8, 0xeb9b1, 0xeba78, 0xeba81, 0xebb78, 0xebb81, 0xebc48, 0xebc51, 0xebd48, 0xebd51, 0xebe18, 0xebe21,
    0xebe60, 0xebe72, 0xec000, 0xef801, 0xef8f8, 0xef929, 0xef958, 0xf0181, 0xf0370, 0xf0801, 0xf0968, 0xf09b9,
    0xf09f0, 0xf0a02, 0xf0a50, 0xf0a71, 0xf0a78, 0xf1481, 0xf1570, 0xf1601, 0xf1760, 0xf1782, 0xf17d0, 0xf2681,
    0xf2760, 0xf2782, 0xf27d0, 0xf2e81, 0xf2f70, 0xf2f81, 0xf2f8a, 0xf2fd8, 0xf3f01, 0xf3f38, 0xf3f41, 0xf3f60,
    0xf3f69, 0xf3f78, 0xf3f81, 0xf3ff8, 0xf4001, 0xf4628, 0xf463a, 0xf4680, 0xf4801, 0xf4a20, 0xf4a59, 0xf4a60,
    0xf4a82, 0xf4ad0, 0xf638a, 0xf6560, 0xf656a, 0xf6580, 0xf658a, 0xf65a8, 0xf680a, 0xf6970, 0xf697a, 0xf69f0,
    0xf7001, 0xf7020, 0xf7029, 0xf7100, 0xf7109, 0xf7118, 0xf7121, 0xf7128, 0xf7139, 0xf7140, 0xf7149, 0xf7198,
    0xf71a1, 0xf71c0, 0xf71c9, 0xf71d0, 0xf71d9, 0xf71e0, 0xf7211, 0xf7218, 0xf7239, 0xf7240, 0xf7249, 0xf7250,
    0xf7259, 0xf7260, 0xf7269, 0xf7280, 0xf7289, 0xf7298, 0xf72a1, 0xf72a8, 0xf72b9, 0xf72c0, 0xf72c9, 0xf72d0,
    0xf72d9, 0xf72e0, 0xf72e9, 0xf72f0, 0xf72f9, 0xf7300, 0xf7309, 0xf7318, 0xf7321, 0xf7328, 0xf7339, 0xf7358,
    0xf7361, 0xf7398, 0xf73a1, 0xf73c0, 0xf73c9, 0xf73e8, 0xf73f1, 0xf73f8, 0xf7401, 0xf7450, 0xf7459, 0xf74e0,
    0xf7509, 0xf7520, 0xf7529, 0xf7550, 0xf7559, 0xf75e0, 0xf8802, 0xf8868, 0xfdf82, 0xfdfd0, 0x100001, 0x153700,
    0x153801, 0x15b9d0, 0x15ba01, 0x15c0f0, 0x15c101, 0x167510, 0x167581, 0x175f08, 0x175f81, 0x1772f0, 0x17c001,
    0x17d0f0, 0x180001, 0x189a58, 0x189a81, 0x191d80
};

static int class_of(uint32_t point) {
    size_t low = 0, high = sizeof character_classes / sizeof *character_classes;
    if (point < 0x80) {
        if ((point | 0x20) - 'a' < 26) return CLASS_LETTER;
        if (point - '0' < 10) return CLASS_NUMBER;
        return point == ' ' || point - '\t' < 5 ? CLASS_BLANK : CLASS_OTHER;
    }
    if (point > 0x10ffff) return CLASS_OTHER;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (character_classes[middle] >> 3 <= point) low = middle;
        else high = middle;
    }
    return (int)(character_classes[low] & 7);
}

/* The code point at the start of `text`, and its size. A byte that begins no valid character is one by itself. */
static uint32_t read_character(const unsigned char *text, size_t bytes, size_t *size) {
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    uint32_t point = text[0];
    size_t length = point < 0x80 ? 1 : point < 0xc0 ? 0 : point < 0xe0 ? 2 : point < 0xf0 ? 3 : point < 0xf8 ? 4 : 0;
    *size = 1;
    if (length == 1) return point;
    if (length == 0 || length > bytes) return UINT32_MAX;
    point &= 0x7fu >> length;
    for (size_t i = 1; i < length; i++) {
        if ((text[i] & 0xc0) != 0x80) return UINT32_MAX;
        point = point << 6 | (text[i] & 0x3f);
    }
    if (point < least[length] || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) return UINT32_MAX;
    *size = length;
    return point;
}

static int read_class(const unsigned char *text, size_t bytes, size_t *size) {
    return class_of(read_character(text, bytes, size));
}

/* Where the run of characters of a class that begins at `at` ends, after at most `limit` of them. */
static size_t skip_class(const unsigned char *text, size_t bytes, size_t at, int class, size_t limit) {
    size_t size;
    while (at < bytes && limit-- > 0) {
        int found = read_class(text + at, bytes - at, &size);
        if ((found == CLASS_DIGIT ? CLASS_OTHER : found) != class) break;
        at += size;
    }
    return at;
}

/* The class of the character at `at`; that of no character at the end. */
static int class_at(const unsigned char *text, size_t bytes, size_t at) {
    size_t size;
    int class = at < bytes ? read_class(text + at, bytes - at, &size) : -1;
    return class == CLASS_DIGIT ? CLASS_OTHER : class;
}

/* Size of 's, 't, 're, 've, 'm, 'll or 'd at the start of the text, or 0. */
static size_t match_contraction(const unsigned char *text, size_t bytes, int any_case) {
    unsigned char first, second;
    if (bytes < 2 || text[0] != '\'') return 0;
    /* The long s is an s in another case. */
    if (any_case && bytes > 2 && text[1] == 0xc5 && text[2] == 0xbf) return 3;
    first = text[1];
    second = bytes > 2 ? text[2] : 0;
    if (any_case && first >= 'A' && first <= 'Z') first = (unsigned char)(first + 32);
    if (any_case && second >= 'A' && second <= 'Z') second = (unsigned char)(second + 32);
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
    if ((first == 'r' || first == 'v') && second == 'e') return 3;
    return first == 'l' && second == 'l' ? 3 : 0;
}

/* Blanks up to the end of the text, or all but the last of them, which belongs to what follows, or a single one. */
static size_t match_blanks(const unsigned char *text, size_t bytes) {
    size_t end = 0, last = 0, size;
    while (end < bytes && read_class(text + end, bytes - end, &size) == CLASS_BLANK) {
        last = end;
        end += size;
    }
    return end == bytes || last == 0 ? end : last;
}

/* Size of the first word by '…| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
static size_t match_gpt2(const unsigned char *text, size_t bytes) {
    size_t start = text[0] == ' ', size = match_contraction(text, bytes, 0);
    int class = class_at(text, bytes, start);
    if (size) return size;
    if (class < 0 || class == CLASS_BLANK) return match_blanks(text, bytes);
    return skip_class(text, bytes, start, class, SIZE_MAX);
}

static int is_line_end(unsigned char byte) { return byte == '\r' || byte == '\n'; }

/* Size of blanks up to the last line end among them, or 0. */
static size_t match_lines(const unsigned char *text, size_t bytes) {
    size_t at = 0, end = 0, size;
    while (at < bytes && read_class(text + at, bytes - at, &size) == CLASS_BLANK) {
        at += size;
        if (is_line_end(text[at - 1])) end = at;
    }
    return end;
}

/* Size of the first word by (?i:'…)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+
 * |\s+(?!\S)|\s+ */
static size_t match_cl100k(const unsigned char *text, size_t bytes, size_t digits) {
    size_t first, start = text[0] == ' ', end, size = match_contraction(text, bytes, 1);
    int class = read_class(text, bytes, &first);
    if (class == CLASS_DIGIT) class = CLASS_OTHER;
    if (size) return size;
    if (class == CLASS_LETTER) return skip_class(text, bytes, first, CLASS_LETTER, SIZE_MAX);
    if (class == CLASS_NUMBER) return skip_class(text, bytes, first, CLASS_NUMBER, digits - 1);
    if (!is_line_end(text[0]) && class_at(text, bytes, first) == CLASS_LETTER)
        return skip_class(text, bytes, first, CLASS_LETTER, SIZE_MAX);
    if (class_at(text, bytes, start) == CLASS_OTHER) {
        end = skip_class(text, bytes, start, CLASS_OTHER, SIZE_MAX);
        while (end < bytes && is_line_end(text[end])) end++;
        return end;
    }
    end = match_lines(text, bytes);
    return end ? end : match_blanks(text, bytes);
}

static size_t match_word(const tokenizer_tables *t, const unsigned char *text, size_t bytes) {
    switch (t->pre_tokenizer) {
    case WORDS_GPT2: return match_gpt2(text, bytes);
    case WORDS_CL100K: return match_cl100k(text, bytes, 3);
    case WORDS_QWEN2: return match_cl100k(text, bytes, 1);
    default: return bytes;
    }
}

static const unsigned char *find_token_bytes(const tokenizer_tables *t, uint32_t id, size_t *size) {
    uint32_t start = read_u32(t->starts + 4 * (size_t)id);
    *size = read_u32(t->starts + 4 * (size_t)id + 4) - start;
    return t->bytes + start;
}

static uint32_t hash_pair(uint32_t left, uint32_t right) {
    uint64_t product = ((uint64_t)left << 32 | right) * 0x9e3779b97f4a7c15u;
    return (uint32_t)(product >> 32) ^ (uint32_t)(product >> 15);
}

static uint32_t hash_bytes(const unsigned char *bytes, size_t size) {
    uint32_t hash = 2166136261u;
    for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * 16777619u;
    return hash ^ hash >> 15;
}

/* Rank of the merge of a pair, or NO_RANK. A slot holds a rank + 1, or 0. */
static uint32_t find_merge(const tokenizer_tables *t, uint32_t left, uint32_t right) {
    if (t->merges == 0) return NO_RANK;
    for (uint32_t slot = hash_pair(left, right);; slot++) {
        uint32_t rank = t->merge_slots[slot & t->merge_mask];
        const unsigned char *merge;
        if (rank == 0) return NO_RANK;
        merge = t->merge_table + 12 * (size_t)(rank - 1);
        if (read_u32(merge) == left && read_u32(merge + 4) == right) return rank - 1;
    }
}

static uint32_t find_merged(const tokenizer_tables *t, uint32_t rank) {
    return read_u32(t->merge_table + 12 * (size_t)rank + 8);
}

/* Whether a word is a token without merges. A slot holds an id + 1, or 0. */
static int find_whole_word(const tokenizer_tables *t, const unsigned char *word, size_t bytes, uint32_t *id) {
    if (!t->word_slots) return 0;
    for (uint32_t slot = hash_bytes(word, bytes);; slot++) {
        uint32_t found = t->word_slots[slot & t->word_mask];
        size_t size;
        const unsigned char *token;
        if (found == 0) return 0;
        token = find_token_bytes(t, found - 1, &size);
        if (size == bytes && memcmp(token, word, bytes) == 0) return *id = found - 1, 1;
    }
}

/* A text on its way to ids. The buffers are for long words and grow with the longest. */
typedef struct {
    const tokenizer_tables *tables;
    int special, failed;
    uint32_t *ids;
    size_t room, count;
    uint32_t *symbols, *before, *after;
    uint64_t *heap;
    size_t capacity, waiting;
} encoding;

static void add_id(encoding *e, uint32_t id) {
    if (e->count < e->room) e->ids[e->count] = id;
    e->count++;
}

/* Words up to this size are merged by looking at all pairs each time, which takes no buffers. */
#define SHORT_WORD 48

static void merge_short_word(encoding *e, const unsigned char *word, size_t bytes) {
    const tokenizer_tables *t = e->tables;
    uint32_t symbols[SHORT_WORD], ranks[SHORT_WORD];
    size_t count = bytes;
    for (size_t i = 0; i < bytes; i++) symbols[i] = read_u32(t->byte_ids + 4 * (size_t)word[i]);
    for (size_t i = 0; i + 1 < count; i++) ranks[i] = find_merge(t, symbols[i], symbols[i + 1]);
    while (count > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < count; i++)
            if (ranks[i] < ranks[best]) best = i;
        if (ranks[best] == NO_RANK) break;
        symbols[best] = find_merged(t, ranks[best]);
        count--;
        for (size_t i = best + 1; i < count; i++) {
            symbols[i] = symbols[i + 1];
            ranks[i - 1] = ranks[i];
        }
        if (best + 1 < count) ranks[best] = find_merge(t, symbols[best], symbols[best + 1]);
        if (best > 0) ranks[best - 1] = find_merge(t, symbols[best - 1], symbols[best]);
    }
    for (size_t i = 0; i < count; i++) add_id(e, symbols[i]);
}

/* The heap holds rank × 2³² + position of merges, the lowest first, and has four children a node: less memory is
 * visited. */
static void sink_merge(encoding *e, size_t at) {
    uint64_t moved = e->heap[at];
    for (size_t child = 4 * at + 1; child < e->waiting; child = 4 * at + 1) {
        size_t end = child + 4 < e->waiting ? child + 4 : e->waiting, best = child;
        for (size_t i = child + 1; i < end; i++)
            if (e->heap[i] < e->heap[best]) best = i;
        if (e->heap[best] >= moved) break;
        e->heap[at] = e->heap[best];
        at = best;
    }
    e->heap[at] = moved;
}

static void push_merge(encoding *e, uint32_t rank, uint32_t position) {
    uint64_t added = (uint64_t)rank << 32 | position;
    size_t at = e->waiting;
    if (rank == NO_RANK) return;
    e->waiting++;
    for (; at > 0 && added < e->heap[(at - 1) / 4]; at = (at - 1) / 4) e->heap[at] = e->heap[(at - 1) / 4];
    e->heap[at] = added;
}

static uint64_t pop_merge(encoding *e) {
    uint64_t first = e->heap[0];
    e->heap[0] = e->heap[--e->waiting];
    if (e->waiting) sink_merge(e, 0);
    return first;
}

static int reserve_word(encoding *e, size_t bytes) {
    if (bytes <= e->capacity) return 1;
    free(e->symbols);
    free(e->heap);
    e->capacity = 0;
    e->heap = NULL;
    /* A merge takes one entry of the heap and adds at most two, so it never holds more than 2 × bytes. */
    e->symbols = bytes <= SIZE_MAX / 16 ? malloc(bytes * 3 * sizeof *e->symbols) : NULL;
    if (e->symbols) e->heap = malloc(bytes * 2 * sizeof *e->heap);
    if (!e->heap) return e->failed = 1, 0;
    e->capacity = bytes;
    return 1;
}

static uint32_t rank_at(const encoding *e, uint32_t position, uint32_t end) {
    if (position >= end || e->after[position] >= end) return NO_RANK;
    return find_merge(e->tables, e->symbols[position], e->symbols[e->after[position]]);
}

/* Merge the pair at a position with its right neighbor, which is then no symbol any more: its `after` is itself. */
static void merge_at(encoding *e, uint32_t left, uint32_t rank, uint32_t end) {
    uint32_t right = e->after[left], next = e->after[right];
    e->symbols[left] = find_merged(e->tables, rank);
    e->after[left] = next;
    e->after[right] = right;
    if (next < end) e->before[next] = left;
    push_merge(e, rank_at(e, left, end), left);
    if (left > 0) push_merge(e, rank_at(e, e->before[left], end), e->before[left]);
}

/* The same in O(n log n) with a linked list and a heap. Entries that other merges have outdated are passed over. */
static void merge_long_word(encoding *e, const unsigned char *word, size_t bytes) {
    uint32_t end = (uint32_t)bytes;
    if (!reserve_word(e, bytes)) return;
    e->before = e->symbols + bytes;
    e->after = e->before + bytes;
    e->waiting = 0;
    for (uint32_t i = 0; i < end; i++) {
        e->symbols[i] = read_u32(e->tables->byte_ids + 4 * (size_t)word[i]);
        e->before[i] = i - 1;
        e->after[i] = i + 1;
    }
    for (uint32_t i = 0; i + 1 < end; i++) {
        uint32_t rank = rank_at(e, i, end);
        e->heap[e->waiting] = (uint64_t)rank << 32 | i;
        if (rank != NO_RANK) e->waiting++;
    }
    for (size_t i = e->waiting / 4 + 1; i-- > 0;)
        if (i < e->waiting) sink_merge(e, i);
    while (e->waiting) {
        uint64_t merge = pop_merge(e);
        uint32_t position = (uint32_t)merge, rank = (uint32_t)(merge >> 32);
        if (e->after[position] != position && rank_at(e, position, end) == rank) merge_at(e, position, rank, end);
    }
    for (uint32_t i = 0; i < end; i = e->after[i]) add_id(e, e->symbols[i]);
}

static void encode_word(encoding *e, const unsigned char *word, size_t bytes) {
    uint32_t id;
    if (find_whole_word(e->tables, word, bytes, &id)) add_id(e, id);
    else if (e->tables->merges == 0)
        for (size_t i = 0; i < bytes; i++) add_id(e, read_u32(e->tables->byte_ids + 4 * (size_t)word[i]));
    else if (bytes <= SHORT_WORD) merge_short_word(e, word, bytes);
    else merge_long_word(e, word, bytes);
}

static void encode_words(encoding *e, const unsigned char *text, size_t bytes) {
    while (bytes > 0) {
        size_t size = match_word(e->tables, text, bytes);
        encode_word(e, text, size);
        text += size;
        bytes -= size;
    }
}

/* Each digit apart, and what is between digits in words of its own. */
static void encode_digits(encoding *e, const unsigned char *text, size_t bytes) {
    size_t start = 0, at = 0, size;
    for (; at < bytes; at += size) {
        int class = read_class(text + at, bytes - at, &size);
        if (class != CLASS_NUMBER && class != CLASS_DIGIT) continue;
        encode_words(e, text + start, at - start);
        encode_words(e, text + at, size);
        start = at + size;
    }
    encode_words(e, text + start, bytes - start);
}

/* The first of the added tokens `low` to `high` − 1, which agree in `depth` bytes, whose next byte is not below. */
static uint32_t find_bound(const tokenizer_tables *t, uint32_t low, uint32_t high, size_t depth, unsigned int byte) {
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        size_t size;
        const unsigned char *token = find_token_bytes(t, read_u32(t->added_ids + 4 * (size_t)middle), &size);
        if (token[depth] < byte) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* Size of the longest added token of a group at the start of a text, or 0. */
static size_t find_added(const tokenizer_tables *t, int group, const unsigned char *text, size_t bytes, uint32_t *id) {
    uint32_t low = group ? t->added[0] : 0, high = low + t->added[group];
    size_t found = 0;
    if (!(t->first_bytes[group][text[0] / 32] >> text[0] % 32 & 1)) return 0;
    for (size_t depth = 0; low < high; depth++) {
        size_t size;
        uint32_t first = read_u32(t->added_ids + 4 * (size_t)low);
        find_token_bytes(t, first, &size);
        if (size == depth) {
            /* Tokens are in the order of their bytes, so the one that ends here is the first. */
            *id = first;
            found = depth;
            low++;
        }
        if (depth == bytes) break;
        low = find_bound(t, low, high, depth, text[depth]);
        high = find_bound(t, low, high, depth, text[depth] + 1u);
    }
    return found;
}

/* Divide a text at added tokens of a group, what is left at those of the next, and the rest into words. */
static void encode_part(encoding *e, const unsigned char *text, size_t bytes, int group) {
    const tokenizer_tables *t = e->tables;
    size_t start = 0, at = 0, size;
    uint32_t id;
    if (group == 2) {
        if (t->flags & TOKENIZER_SINGLE_DIGITS) encode_digits(e, text, bytes);
        else encode_words(e, text, bytes);
        return;
    }
    while (at < bytes && t->added[group]) {
        size = find_added(t, group, text + at, bytes - at, &id);
        if (size && (e->special || !(t->marks[id] & MARK_SPECIAL))) {
            encode_part(e, text + start, at - start, group + 1);
            add_id(e, id);
            start = at + size;
        }
        at += size ? size : 1;
    }
    encode_part(e, text + start, bytes - start, group + 1);
}

static size_t encode_text(const tokenizer_tables *t, const char *text, size_t bytes, int special, uint32_t *ids,
                          size_t room) {
    encoding e;
    memset(&e, 0, sizeof e);
    e.tables = t;
    e.special = special;
    e.ids = ids;
    e.room = room;
    /* Positions in a word have 32 bits. */
    if (bytes >= UINT32_MAX) return MKB_NO_COUNT;
    encode_part(&e, (const unsigned char *)text, bytes, 0);
    free(e.symbols);
    free(e.heap);
    return e.failed ? MKB_NO_COUNT : e.count;
}

size_t mkb_tokenize(const mkb_model *model, const char *text, size_t bytes, int special, uint32_t *ids, size_t room) {
    return encode_text(&model->tables, text, bytes, special, ids, room);
}

const char *mkb_token_bytes(const mkb_model *model, uint32_t id, size_t *bytes) {
    *bytes = 0;
    if (id >= model->tables.tokens) return "";
    return (const char *)find_token_bytes(&model->tables, id, bytes);
}

/* Find the tables of a section, whose sizes its header says, or say what is wrong. */
static int tokenizer_locate(tokenizer_tables *t, const unsigned char *bytes, size_t size, char *error) {
    uint64_t marks, byte_ids, merges, added, end;
    if (size < TOKENIZER_HEADER) return fail(error, MKB_ERROR_FORMAT, "%lu bytes are too few", (unsigned long)size);
    t->kind = read_u32(bytes);
    t->pre_tokenizer = read_u32(bytes + 4);
    t->tokens = read_u32(bytes + 8);
    t->merges = read_u32(bytes + 12);
    t->flags = read_u32(bytes + 16);
    t->added[0] = read_u32(bytes + 20);
    t->added[1] = read_u32(bytes + 24);
    if (t->kind > 1 || t->pre_tokenizer > WORDS_QWEN2 || t->flags > 3 || read_u32(bytes + 28))
        return fail(error, MKB_ERROR_FORMAT, "kind %u, pre-tokenizer %u or flags %u are unknown",
                    (unsigned)t->kind, (unsigned)t->pre_tokenizer, (unsigned)t->flags);
    marks = TOKENIZER_HEADER + 4 * ((uint64_t)t->tokens + 1);
    byte_ids = marks + ((uint64_t)t->tokens + 3) / 4 * 4;
    merges = byte_ids + 1024;
    added = merges + 12 * (uint64_t)t->merges;
    end = added + 4 * ((uint64_t)t->added[0] + t->added[1]);
    if (end > size || (uint64_t)t->added[0] + t->added[1] > t->tokens)
        return fail(error, MKB_ERROR_FORMAT, "%u tokens and %u merges do not fit into its %lu bytes",
                    (unsigned)t->tokens, (unsigned)t->merges, (unsigned long)size);
    t->starts = bytes + TOKENIZER_HEADER;
    t->marks = bytes + marks;
    t->byte_ids = bytes + byte_ids;
    t->merge_table = bytes + merges;
    t->added_ids = bytes + added;
    t->bytes = bytes + end;
    return MKB_OK;
}

/* Check what the tables say of tokens. `rest`: bytes after the tables. */
static int check_tokens(const tokenizer_tables *t, uint64_t rest, char *error) {
    uint32_t last = read_u32(t->starts);
    size_t size;
    if (last != 0) return fail(error, MKB_ERROR_FORMAT, "token 0 begins at byte %u", (unsigned)last);
    for (size_t id = 0; id < t->tokens; id++) {
        uint32_t next = read_u32(t->starts + 4 * id + 4);
        if (next < last || next > rest)
            return fail(error, MKB_ERROR_FORMAT, "token %lu ends outside of its bytes", (unsigned long)id);
        if (t->marks[id] > 7)
            return fail(error, MKB_ERROR_FORMAT, "token %lu has mark %u", (unsigned long)id, t->marks[id]);
        last = next;
    }
    for (unsigned byte = 0; byte < 256; byte++) {
        uint32_t id = read_u32(t->byte_ids + 4 * (size_t)byte);
        const unsigned char *token = id < t->tokens ? find_token_bytes(t, id, &size) : NULL;
        if (!token || size != 1 || token[0] != byte)
            return fail(error, MKB_ERROR_FORMAT, "byte %u has no token", byte);
    }
    return MKB_OK;
}

static int is_added(const tokenizer_tables *t, uint32_t id) {
    return id < t->tokens && t->marks[id] & (MARK_SPECIAL | MARK_ADDED);
}

static int compare_tokens(const tokenizer_tables *t, uint32_t left, uint32_t right) {
    size_t left_size, right_size;
    const unsigned char *a = find_token_bytes(t, left, &left_size), *b = find_token_bytes(t, right, &right_size);
    int order = memcmp(a, b, left_size < right_size ? left_size : right_size);
    return order ? order : (left_size > right_size) - (left_size < right_size);
}

/* Check the added tokens, and note the bytes with which those of each group begin. */
static int check_added(tokenizer_tables *t, char *error) {
    for (uint32_t i = 0; i < t->added[0] + t->added[1]; i++) {
        uint32_t id = read_u32(t->added_ids + 4 * (size_t)i);
        int group = i >= t->added[0];
        size_t size = 0;
        const unsigned char *token = is_added(t, id) ? find_token_bytes(t, id, &size) : NULL;
        if (size == 0) return fail(error, MKB_ERROR_FORMAT, "added token %u is none", (unsigned)id);
        if (i != 0 && i != t->added[0] && compare_tokens(t, read_u32(t->added_ids + 4 * (size_t)i - 4), id) >= 0)
            return fail(error, MKB_ERROR_FORMAT, "added token %u is out of order", (unsigned)id);
        t->first_bytes[group][token[0] / 32] |= (uint32_t)1 << token[0] % 32;
    }
    return MKB_OK;
}

/* A hash table of at most half-filled slots, all 0. */
static uint32_t *create_slots(uint32_t entries, uint32_t *mask) {
    uint64_t slots = 2;
    while (slots < 2 * (uint64_t)entries) slots *= 2;
    *mask = (uint32_t)(slots - 1);
    return slots <= SIZE_MAX / sizeof(uint32_t) ? calloc((size_t)slots, sizeof(uint32_t)) : NULL;
}

static int index_merges(tokenizer_tables *t, char *error) {
    t->merge_slots = create_slots(t->merges, &t->merge_mask);
    if (!t->merge_slots) return fail(error, MKB_ERROR_MEMORY, "no memory for %u merges", (unsigned)t->merges);
    for (uint32_t rank = 0; rank < t->merges; rank++) {
        const unsigned char *merge = t->merge_table + 12 * (size_t)rank;
        uint32_t left = read_u32(merge), right = read_u32(merge + 4), slot = hash_pair(left, right);
        if (left >= t->tokens || right >= t->tokens || read_u32(merge + 8) >= t->tokens)
            return fail(error, MKB_ERROR_FORMAT, "merge %u is of tokens that do not exist", (unsigned)rank);
        if (find_merge(t, left, right) != NO_RANK)
            return fail(error, MKB_ERROR_FORMAT, "merge %u is there twice", (unsigned)rank);
        while (t->merge_slots[slot & t->merge_mask]) slot++;
        t->merge_slots[slot & t->merge_mask] = rank + 1;
    }
    return MKB_OK;
}

static int index_words(tokenizer_tables *t, char *error) {
    if (!(t->flags & TOKENIZER_IGNORE_MERGES)) return MKB_OK;
    t->word_slots = create_slots(t->tokens, &t->word_mask);
    if (!t->word_slots) return fail(error, MKB_ERROR_MEMORY, "no memory for %u tokens", (unsigned)t->tokens);
    for (uint32_t id = 0; id < t->tokens; id++) {
        size_t size;
        const unsigned char *token = find_token_bytes(t, id, &size);
        uint32_t slot = hash_bytes(token, size);
        if (!(t->marks[id] & MARK_WHOLE_WORD)) continue;
        while (t->word_slots[slot & t->word_mask]) slot++;
        t->word_slots[slot & t->word_mask] = id + 1;
    }
    return MKB_OK;
}

static void tokenizer_close(tokenizer_tables *t) {
    free(t->merge_slots);
    free(t->word_slots);
    memset(t, 0, sizeof *t);
}

static int read_tables(mkb_model *m, char *error) {
    tokenizer_tables *t = &m->tables;
    int status = tokenizer_locate(t, m->tokenizer, (size_t)m->tokenizer_bytes, error);
    if (status) return status;
    if (t->tokens != m->set.tokenizer_size)
        return fail(error, MKB_ERROR_FORMAT, "%lu tokens, the header says %lu", (unsigned long)t->tokens,
                    (unsigned long)m->set.tokenizer_size);
    status = check_tokens(t, m->tokenizer_bytes - (uint64_t)(t->bytes - m->tokenizer), error);
    if (status) return status;
    if (!(t->marks[m->set.document_token] & MARK_SPECIAL))
        return fail(error, MKB_ERROR_FORMAT, "document_token %lu is no special token", (unsigned long)m->set.document_token);
    if ((status = check_added(t, error)) || (status = index_merges(t, error))) return status;
    return index_words(t, error);
}

static int tokenizer_check(mkb_model *m, char *error) {
    char reason[MKB_ERROR_BYTES];
    int status = read_tables(m, reason);
    if (!status) return MKB_OK;
    return fail(error, status, "%s: tokenizer: %s%s", m->name, reason,
                status == MKB_ERROR_FORMAT ? "; copy or pack the model again" : "");
}

/* ---- 10 sampling ----
 *
 * Weights of tokens are whole numbers, exp((logit − highest) / temperature) × 2³⁸: their sums have no rounding and no
 * order, so two machines whose exp() differs in the last bit practically always draw the same token. */

#define WEIGHT_ONE ((uint64_t)1 << 38)
/* exp(−27) × 2³⁸ rounds to 0. */
#define WEIGHT_RANGE 27.0

static uint64_t rotate(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

/* xoshiro256**: 64 random bits. */
static uint64_t draw_bits(sampler_state *s) {
    uint64_t *r = s->random, result = rotate(r[1] * 5, 7) * 9, kept = r[1] << 17;
    r[2] ^= r[0];
    r[3] ^= r[1];
    r[1] ^= r[2];
    r[0] ^= r[3];
    r[2] ^= kept;
    r[3] = rotate(r[3], 45);
    return result;
}

/* The state of the random numbers is filled by splitmix64, so that no seed gives zeros alone. */
static void seed_sampler(sampler_state *s, uint64_t seed) {
    for (int i = 0; i < 4; i++) {
        uint64_t x = seed += 0x9e3779b97f4a7c15u;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        s->random[i] = x ^ x >> 31;
    }
}

/* A number below `total`, each as likely as the others. */
static uint64_t draw_below(sampler_state *s, uint64_t total) {
    uint64_t mask = total, number;
    for (int bits = 1; bits < 64; bits *= 2) mask |= mask >> bits;
    do number = draw_bits(s) >> 1 & mask;
    while (number >= total);
    return number;
}

static int check_sampling(const mkb_sampling *s, char *error) {
    if (!(s->temperature == 0 || (s->temperature >= 1e-4f && s->temperature <= 1e4f)))
        return fail(error, MKB_ERROR_ARGUMENT, "temperature %g: use 0 for the likeliest token, or 0.0001 to 10000",
                    (double)s->temperature);
    if (!(s->top_p > 0 && s->top_p <= 1))
        return fail(error, MKB_ERROR_ARGUMENT, "top_p %g: use more than 0, up to 1, which is off", (double)s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1))
        return fail(error, MKB_ERROR_ARGUMENT, "min_p %g: use 0, which is off, to 1", (double)s->min_p);
    if (!(s->repetition_penalty >= 0.01f && s->repetition_penalty <= 100))
        return fail(error, MKB_ERROR_ARGUMENT, "repetition_penalty %g: use 0.01 to 100; 1 is off",
                    (double)s->repetition_penalty);
    if (s->repetition_window > SAMPLER_WINDOW)
        return fail(error, MKB_ERROR_ARGUMENT, "repetition_window %lu: use 0 to %d", (unsigned long)s->repetition_window,
                    SAMPLER_WINDOW);
    return MKB_OK;
}

int mkb_sampling_set(mkb_context *c, const mkb_sampling *sampling, char error[MKB_ERROR_BYTES]) {
    int status = check_sampling(sampling, error);
    if (status) return status;
    c->sampler.settings = *sampling;
    seed_sampler(&c->sampler, sampling->seed);
    return MKB_OK;
}

static void note_tokens(sampler_state *s, const uint32_t *tokens, size_t count) {
    if (count) s->drawn = 0;
    for (size_t i = count > SAMPLER_WINDOW ? count - SAMPLER_WINDOW : 0; i < count; i++) {
        s->window[s->window_next] = tokens[i];
        s->window_next = (s->window_next + 1) % SAMPLER_WINDOW;
        if (s->window_count < SAMPLER_WINDOW) s->window_count++;
    }
}

/* Make recent tokens less likely, each once however often it is there. */
static void penalize(mkb_context *c, float *logits) {
    const sampler_state *s = &c->sampler;
    uint32_t size = c->model->set.tokenizer_size, count = MIN(s->settings.repetition_window, s->window_count);
    float penalty = s->settings.repetition_penalty;
    if (!(penalty > 0) || penalty == 1) return;
    for (int pass = 0; pass < 2; pass++)
        for (uint32_t i = 1; i <= count; i++) {
            uint32_t id = s->window[(s->window_next + SAMPLER_WINDOW - i) % SAMPLER_WINDOW];
            if (id >= size) continue;
            if (pass == 0) {
                c->weights[id] = 0;
            } else if (c->weights[id] == 0) {
                logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
                c->weights[id] = 1;
            }
        }
}

/* Id of the highest logit, the lowest of equal ones, or MKB_NO_TOKEN if none is a number. Others become the lowest. */
static uint32_t find_likeliest(float *logits, uint32_t count) {
    uint32_t best = MKB_NO_TOKEN;
    for (uint32_t i = 0; i < count; i++) {
        if (!(logits[i] >= -FLT_MAX)) continue;
        if (logits[i] > FLT_MAX) logits[i] = FLT_MAX;
        if (best == MKB_NO_TOKEN || logits[i] > logits[best]) best = i;
    }
    return best;
}

static int is_likelier(const float *logits, uint32_t a, uint32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
}

/* Restore a heap of ids below `at`. Its root is the likeliest, or, for `least`, the least likely. */
static void sink_candidate(const float *logits, uint32_t *heap, size_t count, size_t at, int least) {
    uint32_t moved = heap[at];
    for (size_t child = 2 * at + 1; child < count; child = 2 * at + 1) {
        if (child + 1 < count && is_likelier(logits, heap[child + 1], heap[child]) != least) child++;
        if (is_likelier(logits, heap[child], moved) == least) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = moved;
}

/* Move the `most` likeliest of `count` candidates to the front, in no order. */
static size_t keep_likeliest(const float *logits, uint32_t *ids, size_t count, uint32_t most) {
    if (most == 0 || most >= count) return count;
    for (size_t i = most / 2 + 1; i-- > 0;) sink_candidate(logits, ids, most, i, 1);
    for (size_t i = most; i < count; i++) {
        if (!is_likelier(logits, ids[i], ids[0])) continue;
        ids[0] = ids[i];
        sink_candidate(logits, ids, most, 0, 1);
    }
    return most;
}

static uint64_t sum_weights(const mkb_context *c, const uint32_t *ids, size_t count) {
    uint64_t total = 0;
    for (size_t i = 0; i < count; i++) total += c->weights[ids[i]];
    return total;
}

/* Keep the likeliest candidates that have together at least the part `top_p` of the weight, at the end of `ids`. */
static size_t keep_mass(const mkb_context *c, const float *logits, uint32_t *ids, size_t count, float top_p) {
    uint64_t needed = (uint64_t)((double)top_p * (double)sum_weights(c, ids, count)), mass = 0;
    size_t left = count;
    for (size_t i = count / 2 + 1; i-- > 0;) sink_candidate(logits, ids, count, i, 0);
    while (left > 0 && (mass < needed || left == count)) {
        uint32_t likeliest = ids[0];
        mass += c->weights[likeliest];
        ids[0] = ids[--left];
        ids[left] = likeliest;
        if (left) sink_candidate(logits, ids, left, 0, 0);
    }
    return count - left;
}

/* Candidates that are not practically impossible. */
static size_t list_candidates(mkb_context *c, const float *logits, float highest) {
    uint32_t size = c->model->set.tokenizer_size;
    double lowest = (double)highest - WEIGHT_RANGE * (double)c->sampler.settings.temperature;
    size_t count = 0;
    for (uint32_t i = 0; i < size; i++)
        if (logits[i] >= lowest) c->candidates[count++] = i;
    return count;
}

static uint32_t draw_candidate(mkb_context *c, const float *logits, float highest) {
    const mkb_sampling *set = &c->sampler.settings;
    uint32_t *ids = c->candidates;
    size_t count = keep_likeliest(logits, ids, list_candidates(c, logits, highest), set->top_k), kept = 0;
    uint64_t number, least = set->min_p > 0 ? (uint64_t)(MIN(set->min_p, 1) * (double)WEIGHT_ONE) : 0;
    for (size_t i = 0; i < count; i++) {
        double distance = ((double)logits[ids[i]] - (double)highest) / (double)set->temperature;
        c->weights[ids[i]] = (uint64_t)(exp(distance) * (double)WEIGHT_ONE + 0.5);
    }
    if (set->top_p > 0 && set->top_p < 1) {
        size_t some = keep_mass(c, logits, ids, count, set->top_p);
        ids += count - some;
        count = some;
    }
    for (size_t i = 0; i < count; i++)
        if (c->weights[ids[i]] >= least) ids[kept++] = ids[i];
    number = draw_below(&c->sampler, sum_weights(c, ids, kept));
    for (size_t i = 0; i < kept; i++) {
        if (number < c->weights[ids[i]]) return ids[i];
        number -= c->weights[ids[i]];
    }
    return MKB_NO_TOKEN;
}

uint32_t mkb_sample(mkb_context *c, float *logits) {
    uint32_t id;
    penalize(c, logits);
    id = find_likeliest(logits, c->model->set.tokenizer_size);
    if (id != MKB_NO_TOKEN && c->sampler.settings.temperature > 0) id = draw_candidate(c, logits, logits[id]);
    c->sampler.drawn = id + 1;
    return id;
}

/* ---- 11 command line ---- */

/* What runs once a line of a person's need not be fast, and the program is to be small. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Os")
#endif

#ifndef MIXKABRN_LIBRARY

/* --- selftest --- */

typedef struct { uint64_t state; } test_random;

/* splitmix64 (Steele, Lea and Flood 2014). */
static uint64_t next_random(test_random *r) {
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static size_t random_below(test_random *r, size_t n) { return (size_t)(next_random(r) % n); }

enum { TEST_CASES = 10000, TEST_TOKENS = 30, TEST_ROW_TILES = 6, TEST_ACROSS = 40, TEST_BYTE_ROWS = 9 };

typedef struct {
    unsigned char *tiles;
    int8_t *codes, *weights;
    int32_t *want, *got;
    int64_t *want_sums, *got_sums;
    float *values;
    size_t across;   /* the widest case */
    uint64_t digest; /* of all sums, to compare machines */
} test_buffers;

/* FNV-1a, by whole numbers. */
static void digest_sum(test_buffers *b, int64_t sum) { b->digest = (b->digest ^ (uint64_t)sum) * 0x100000001b3u; }

/* Codes of all sizes, only the extreme ones, or all alike. */
static int8_t random_code(test_random *r, size_t kind) {
    static const int8_t extreme[4] = {-128, 127, -127, 0};
    return kind == 0 ? -128 : kind == 1 ? 127 : kind == 2 ? extreme[random_below(r, 4)] : (int8_t)next_random(r);
}

static unsigned char random_weights(test_random *r, size_t kind) {
    unsigned byte = 0;
    for (int i = 0; i < 4; i++) byte = byte << 2 | (kind == 0 ? 2u : (unsigned)random_below(r, 3));
    return (unsigned char)byte;
}

static int test_ternary(const kernel_set *k, test_buffers *b, test_random *r, size_t across, size_t rows, size_t tokens) {
    const int8_t *x[TEST_TOKENS];
    size_t kind = random_below(r, 8), columns = across * TILE, sums = rows * tokens * TILE;
    size_t used = columns - random_below(r, TILE);
    for (size_t i = 0; i < rows * across * TILE_BYTES; i++) b->tiles[i] = random_weights(r, kind);
    for (size_t t = 0; t < tokens; t++) {
        int8_t *row = b->codes + t * columns;
        for (size_t i = 0; i < columns; i++) row[i] = i < used ? random_code(r, kind) : 0;
        x[t] = row;
    }
    ternary_scalar(b->tiles, across, rows, x, tokens, b->want);
    for (size_t i = 0; i < sums; i++) digest_sum(b, b->want[i]);
    if (k->ternary == ternary_scalar) return 0;
    memset(b->got, 0xff, sums * sizeof *b->got);
    k->ternary(b->tiles, across, rows, x, tokens, b->got);
    return memcmp(b->want, b->got, sums * sizeof *b->got) != 0;
}

static int test_bytes(const kernel_set *k, test_buffers *b, split_vector *x, test_random *r, size_t columns, size_t rows) {
    size_t kind = random_below(r, 8);
    x->size = columns;
    memset(x->high, 0, x->padded), memset(x->middle, 0, x->padded), memset(x->low, 0, x->padded);
    for (size_t i = 0; i < columns; i++)
        b->values[i] = kind < 2 ? (kind ? -1.0f : 1.0f) : (float)((double)(next_random(r) >> 40) * 0x1p-20 - 8);
    for (size_t i = 0; i < rows * columns; i++) b->weights[i] = random_code(r, kind);
    split(x, b->values);
    bytes_scalar(b->weights, rows, x, b->want_sums);
    for (size_t i = 0; i < rows; i++) digest_sum(b, b->want_sums[i]);
    if (k->bytes == bytes_scalar) return 0;
    memset(b->got_sums, 0xff, rows * sizeof *b->got_sums);
    k->bytes(b->weights, rows, x, b->got_sums);
    return memcmp(b->want_sums, b->got_sums, rows * sizeof *b->got_sums) != 0;
}

/* Compare a set of kernels with the scalar ones; returns the number of cases that differ. */
static size_t test_kernels(const kernel_set *k, test_buffers *b, split_vector *x, long cases) {
    test_random r = {1};
    size_t wrong = 0;
    b->digest = 0xcbf29ce484222325u;
    for (long i = 0; i < cases; i++) {
        size_t tokens = i % 4 ? 1 + random_below(&r, TEST_TOKENS) : 1, across = 1 + random_below(&r, TEST_ACROSS);
        size_t row_tiles = 1 + random_below(&r, TEST_ROW_TILES), columns = 1 + random_below(&r, TEST_ACROSS * TILE);
        size_t rows = 1 + random_below(&r, TEST_BYTE_ROWS);
        wrong += (size_t)test_ternary(k, b, &r, across, row_tiles, tokens);
        wrong += (size_t)test_bytes(k, b, x, &r, columns, rows);
    }
    for (int i = 0; i < 4; i++) wrong += (size_t)test_ternary(k, b, &r, b->across, 1, 1 + (size_t)i % 2);
    return wrong;
}

static int start_test(test_buffers *b, split_vector *x) {
    size_t most = MAX((size_t)TEST_TOKENS * TEST_ACROSS, 2 * (b->across = MAX_COLUMNS / TILE));
    x->padded = round_up(TEST_ACROSS * TILE, 64);
    b->tiles = allocate(most, TILE_BYTES), b->codes = allocate(most, TILE);
    b->weights = allocate(TEST_BYTE_ROWS, TEST_ACROSS * TILE), b->values = allocate(TEST_ACROSS * TILE, 4);
    b->want = allocate(TEST_TOKENS * TEST_ROW_TILES * TILE, 4), b->got = allocate(TEST_TOKENS * TEST_ROW_TILES * TILE, 4);
    b->want_sums = allocate(TEST_BYTE_ROWS, 8), b->got_sums = allocate(TEST_BYTE_ROWS, 8);
    x->high = allocate(x->padded, 1), x->middle = allocate(x->padded, 1), x->low = allocate(x->padded, 1);
    x->upper = allocate(x->padded, 2), x->lower = allocate(x->padded, 2);
    return b->tiles && b->codes && b->weights && b->values && b->want && b->got && b->want_sums && b->got_sums && x->high &&
           x->middle && x->low && x->upper && x->lower;
}

static void end_test(test_buffers *b, split_vector *x) {
    void *all_of[] = {b->tiles, b->codes,   b->weights, b->values, b->want,  b->got, b->want_sums,
                      b->got_sums, x->high, x->middle,  x->low,    x->upper, x->lower};
    for (size_t i = 0; i < sizeof all_of / sizeof *all_of; i++) free(all_of[i]);
}

static long parse_count(const char *text, long least, long most);

static int command_selftest(int count, char **arguments) {
    long cases = count ? parse_count(arguments[0], 1, 1000000000) : TEST_CASES;
    test_buffers b = {0};
    split_vector x = {0};
    if (cases < 0 || count > 1) {
        fprintf(stderr, "usage: mixkabrn selftest [CASES]\n");
        return 2;
    }
    int status = !start_test(&b, &x);
    if (status) fprintf(stderr, "error: no memory for the test\n");
    for (int i = 0; i < NUM_KERNELS && b.across && !status; i++) {
        const kernel_set *k = &KERNELS[i];
        if (!k->supported()) {
            printf("%-11s not supported by this machine\n", k->name);
            continue;
        }
        size_t wrong = test_kernels(k, &b, &x, cases);
        printf("%-11s %s: %ld random cases, %lu differ from scalar\n", k->name, wrong ? "WRONG" : "ok", 2 * cases + 4,
               (unsigned long)wrong);
        status |= wrong != 0;
    }
    if (b.digest) printf("digest of the sums, the same on all machines: %016llx\n", (unsigned long long)b.digest);
    end_test(&b, &x);
    return status;
}

/* --- bench --- */

typedef struct {
    const char *path;
    int threads, json;
    size_t tokens;
} bench_options;

typedef struct {
    double bandwidth, prefill, decode, late, open_seconds, gemv[NUM_KERNELS];
    long resident;
    mkb_info info;
} bench_result;

/* Bytes a second of the fastest of some passes over more memory than caches hold. */
static double measure_bandwidth(void) {
    enum { BLOCK = 64 << 20, PASSES = 6 };
    unsigned char *memory = allocate(BLOCK, 1);
    double best = 0;
    volatile uint64_t sink = 0;
    if (!memory) return 0;
    memset(memory, 1, BLOCK);
    for (int pass = 0; pass < PASSES; pass++) {
        double begin = seconds_now();
        uint64_t total[8] = {0};
        for (size_t i = 0; i < BLOCK; i += 64)
            for (int n = 0; n < 8; n++) {
                uint64_t word;
                memcpy(&word, memory + i + 8 * n, 8);
                total[n] += word;
            }
        for (int n = 0; n < 8; n++) sink = sink + total[n];
        best = MAX(best, BLOCK / (seconds_now() - begin));
    }
    free(memory);
    return best;
}

/* Weights a second of products of one token with a matrix that stays in the cache. */
static double measure_gemv(const kernel_set *k) {
    enum { ROW_TILES = 32, ACROSS = 64, WEIGHTS = ROW_TILES * ACROSS * TILE * TILE };
    unsigned char *tiles = allocate(ROW_TILES * ACROSS, TILE_BYTES);
    int8_t *codes = allocate(ACROSS, TILE);
    const int8_t *row = codes;
    int32_t out[ROW_TILES * TILE];
    double best = 0;
    for (int trial = 0; tiles && codes && trial < 5; trial++) {
        int times = 0;
        double begin = seconds_now(), passed;
        memset(tiles, 0x55, (size_t)ROW_TILES * ACROSS * TILE_BYTES);
        memset(codes, 1, (size_t)ACROSS * TILE);
        do {
            k->ternary(tiles, ACROSS, ROW_TILES, &row, 1, out);
            times++, passed = seconds_now() - begin;
        } while (passed < 0.02);
        best = MAX(best, times * (double)WEIGHTS / passed);
    }
    free(tiles);
    free(codes);
    return best;
}

/* Memory of the process in use, in KiB; 0 where the system does not tell. */
static long resident_memory(void) {
    char line[256];
    long found = 0;
    FILE *file = fopen("/proc/self/status", "r");
    while (file && !found && fgets(line, sizeof line, file)) sscanf(line, "VmRSS: %ld", &found);
    if (file) fclose(file);
    return found;
}

/* Tokens a second, reading `count` tokens `chunk` at a time. */
static double measure_tokens(mkb_context *c, size_t count, size_t chunk, float *logits, char *error) {
    uint32_t tokens[512];
    double begin = seconds_now();
    for (size_t done = 0; done < count; done += chunk) {
        for (size_t i = 0; i < chunk; i++) tokens[i] = (uint32_t)((done + i) * 7919 % c->model->set.vocab_size);
        if (mkb_decode(c, tokens, chunk, logits, error)) return -1;
    }
    return (double)count / (seconds_now() - begin);
}

static int measure_model(const bench_options *o, bench_result *r, char *error) {
    mkb_model *m = NULL;
    mkb_context *c = NULL;
    size_t prefill = round_up(o->tokens, 512);
    double begin = seconds_now();
    int status = mkb_model_open(o->path, 0, &m, error);
    float *logits = status ? NULL : malloc(m->set.vocab_size * sizeof *logits);
    if (!status && !logits) status = fail(error, MKB_ERROR_MEMORY, "no memory for logits");
    if (!status) status = mkb_context_create(m, o->threads, (uint32_t)(2 * (o->tokens + prefill)), &c, error);
    if (!status) {
        const uint32_t first = 0;
        status = mkb_decode(c, &first, 1, logits, error);
        r->open_seconds = seconds_now() - begin;
    }
    if (!status) {
        r->prefill = measure_tokens(c, prefill, 512, logits, error);
        mkb_reset(c);
        r->decode = measure_tokens(c, o->tokens, 1, logits, error);
        r->resident = resident_memory();
        mkb_model_info(m, &r->info);
        status = r->prefill < 0 || r->decode < 0 ? MKB_ERROR_FULL : MKB_OK;
    }
    if (!status && !has_attention(m)) {
        c->position = 100000;
        r->late = measure_tokens(c, o->tokens, 1, logits, error);
    }
    mkb_context_destroy(c);
    free(logits);
    mkb_model_close(m);
    return status;
}

/* The share of the read bandwidth that decoding uses, states being read and written. */
static double bandwidth_share(const bench_result *r) {
    double bytes = (double)r->info.bytes_per_token + 2.0 * (double)r->info.state_bytes;
    return r->bandwidth > 0 ? r->decode * bytes / r->bandwidth : 0;
}

static void print_bench(const bench_options *o, const bench_result *r) {
    printf("kernels              %s, %d thread%s\n", mkb_kernels(), o->threads, o->threads == 1 ? "" : "s");
    printf("parameters           %.1f M, of which a token uses %.1f M\n", 1e-6 * (double)r->info.parameters,
           1e-6 * (double)r->info.active_parameters);
    printf("file, state          %.1f MB, %.2f MB\n", 1e-6 * (double)r->info.file_bytes, 1e-6 * (double)r->info.state_bytes);
    printf("read bandwidth       %.1f GB/s\n", 1e-9 * r->bandwidth);
    for (int i = 0; i < NUM_KERNELS; i++)
        if (r->gemv[i] > 0) printf("in cache %-11s %.1f Gweights/s\n", KERNELS[i].name, 1e-9 * r->gemv[i]);
    printf("open to first token  %.1f ms\n", 1e3 * r->open_seconds);
    printf("prefill              %.0f tokens/s\n", r->prefill);
    /* More than memory gives comes from the cache. */
    if (bandwidth_share(r) > 1) printf("decode               %.0f tokens/s, in cache\n", r->decode);
    else printf("decode               %.0f tokens/s, %.0f %% of the read bandwidth\n", r->decode, 100 * bandwidth_share(r));
    if (r->late > 0) printf("decode at 100,000    %.0f tokens/s\n", r->late);
    if (r->resident) printf("memory               %.1f MB\n", (double)r->resident * 1.024e-3);
}

static void print_bench_json(const bench_options *o, const bench_result *r) {
    int first = 1;
    printf("{\"kernels\": \"%s\", \"threads\": %d, \"tokens\": %lu, \"parameters\": %llu, \"active_parameters\": %llu, ",
           mkb_kernels(), o->threads, (unsigned long)o->tokens, (unsigned long long)r->info.parameters,
           (unsigned long long)r->info.active_parameters);
    printf("\"file_bytes\": %llu, \"state_bytes\": %llu, \"bytes_per_token\": %llu, \"gweights_per_second\": {",
           (unsigned long long)r->info.file_bytes, (unsigned long long)r->info.state_bytes,
           (unsigned long long)r->info.bytes_per_token);
    for (int i = 0; i < NUM_KERNELS; i++)
        if (r->gemv[i] > 0) printf("%s\"%s\": %.2f", first ? "" : ", ", KERNELS[i].name, 1e-9 * r->gemv[i]), first = 0;
    printf("}, \"read_bytes_per_second\": %.0f, \"first_token_seconds\": %.6f, \"prefill_tokens_per_second\": %.2f, ",
           r->bandwidth, r->open_seconds, r->prefill);
    printf("\"decode_tokens_per_second\": %.2f, \"late_tokens_per_second\": %.2f, \"bandwidth_share\": %.4f, ", r->decode,
           r->late, bandwidth_share(r));
    printf("\"resident_bytes\": %ld}\n", r->resident * 1024);
}

/* A whole number from `least` to `most`, or −1. */
static long parse_count(const char *text, long least, long most) {
    char *end;
    long value;
    errno = 0;
    value = text ? strtol(text, &end, 10) : -1;
    return !text || errno || end == text || *end || value < least || value > most ? -1 : value;
}

static int bench_usage(void) {
    fprintf(stderr, "usage: mixkabrn bench MODEL [--threads N] [--tokens N] [--json]\n");
    return 2;
}

static int parse_bench(int count, char **arguments, bench_options *o) {
    for (int i = 0; i < count; i++) {
        const char *value = i + 1 < count ? arguments[i + 1] : NULL;
        long number = 0;
        if (!strcmp(arguments[i], "--json")) o->json = 1;
        else if (!strcmp(arguments[i], "--threads")) number = parse_count(value, 1, 256), o->threads = (int)number, i++;
        else if (!strcmp(arguments[i], "--tokens")) number = parse_count(value, 1, 10000000), o->tokens = (size_t)number, i++;
        else if (arguments[i][0] == '-' || o->path) return -1;
        else o->path = arguments[i];
        if (number < 0) return -1;
    }
    return o->path ? 0 : -1;
}

static int command_bench(int count, char **arguments) {
    bench_options o = {NULL, 1, 0, 512};
    bench_result r = {0};
    char error[MKB_ERROR_BYTES];
    if (parse_bench(count, arguments, &o)) return bench_usage();
    if (measure_model(&o, &r, error)) {
        fprintf(stderr, "error: %s\n", error);
        return 1;
    }
    r.bandwidth = measure_bandwidth();
    for (int i = 0; i < NUM_KERNELS; i++)
        if (KERNELS[i].supported()) r.gemv[i] = measure_gemv(&KERNELS[i]);
    if (o.json) print_bench_json(&o, &r);
    else print_bench(&o, &r);
    return 0;
}

/* --- text on its way to people --- */

/* 16 of the command line, and those of turns. */
enum { MOST_STOPS = 18, STOP_BYTES = 256 };

/* Bytes of tokens become whole characters, and what may become a stop string is held back. */
typedef struct {
    FILE *file;
    int for_terminal, trim, failed, stopped;
    unsigned char character[4], low, high;
    size_t have, missing;
    const char *stops[MOST_STOPS];
    size_t num_stops, stop_bytes; /* of the one that was found */
    char held[STOP_BYTES + 4];
    size_t num_held;
    uint64_t taken; /* bytes of tokens, up to the end of the stop string */
} text_writer;

/* A terminal would obey control characters; a file or a program gets the text as it is. */
static void show(text_writer *w, const char *text, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) {
        unsigned char c = (unsigned char)text[i];
        int second = c == 0xc2 && i + 1 < bytes && (unsigned char)text[i + 1] < 0xa0;
        if (w->trim && (c == ' ' || c == '\n' || c == '\t')) continue;
        w->trim = 0;
        if (w->for_terminal && (second || c == 127 || (c < 32 && c != '\n' && c != '\t'))) {
            fputs("\302\267", w->file);
            i += (size_t)second;
        } else {
            putc(c, w->file);
        }
    }
    w->failed |= ferror(w->file) != 0;
}

static int ends_with(const text_writer *w, const char *stop, size_t bytes) {
    return bytes <= w->num_held && !memcmp(w->held + w->num_held - bytes, stop, bytes);
}

/* Hold one character, and show what can belong to no stop string any more. */
static void write_character(text_writer *w, const void *character, size_t bytes) {
    size_t keep = 0;
    memcpy(w->held + w->num_held, character, bytes);
    w->num_held += bytes;
    w->stop_bytes = 0;
    for (size_t i = 0; i < w->num_stops; i++) {
        size_t length = strlen(w->stops[i]);
        if (ends_with(w, w->stops[i], length)) w->stop_bytes = MAX(w->stop_bytes, length);
        for (size_t part = MIN(length - 1, w->num_held); part > keep; part--)
            if (ends_with(w, w->stops[i], part)) keep = part;
    }
    w->stopped = w->stop_bytes > 0;
    if (w->stopped) keep = w->stop_bytes;
    show(w, w->held, w->num_held - keep);
    memmove(w->held, w->held + w->num_held - keep, keep);
    w->num_held = w->stopped ? 0 : keep;
}

static void write_replacement(text_writer *w) {
    w->have = w->missing = 0;
    write_character(w, "\357\277\275", 3);
}

static void write_byte(text_writer *w, unsigned char c) {
    if (w->missing) {
        if (c < w->low || c > w->high) {
            write_replacement(w);
            if (!w->stopped) write_byte(w, c);
            return;
        }
        w->low = 0x80, w->high = 0xbf;
        w->character[w->have++] = c;
        if (--w->missing) return;
        write_character(w, w->character, w->have);
        w->have = 0;
    } else if (c < 0x80) {
        write_character(w, &c, 1);
    } else if (c < 0xc2 || c > 0xf4) {
        write_replacement(w);
    } else {
        w->missing = c < 0xe0 ? 1 : c < 0xf0 ? 2 : 3;
        w->low = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
        w->high = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
        w->character[0] = c;
        w->have = 1;
    }
}

static void write_token(text_writer *w, const char *bytes, size_t size) {
    for (size_t i = 0; i < size && !w->stopped; i++, w->taken++) write_byte(w, (unsigned char)bytes[i]);
    w->failed |= fflush(w->file) != 0;
}

/* Show what was held back at the end. */
static void finish_text(text_writer *w) {
    if (w->missing && !w->stopped) write_replacement(w);
    if (!w->stopped) show(w, w->held, w->num_held);
    w->failed |= fflush(w->file) != 0;
}

static void begin_text(text_writer *w, int trim) {
    w->trim = trim;
    w->failed = w->stopped = 0;
    w->have = w->missing = w->num_held = 0;
    w->taken = 0;
}

/* --- options of commands that read or write text --- */

enum { FOR_GENERATE = 1, FOR_CHAT = 2, FOR_TOKENIZE = 4, FOR_ALL = 7, FOR_BOTH = 3 };
enum { TAKES_NOTHING, TAKES_TEXT, TAKES_COUNT, TAKES_NUMBER, TAKES_SEED, TAKES_STOP, TAKES_ADAPTER };
enum { SHOWN_HELP = -1, WRONG_USAGE = 2, INTERRUPTED = 130 };

typedef struct {
    const char *model, *prompt, *prompt_file, *state_in, *state_out, *user, *assistant, *system;
    mkb_sampling sampling;
    uint32_t tokens, context, threads;
    int verify, quiet, special, from_stdin;
    const char *stops[MOST_STOPS];
    size_t num_stops;
    const char *adapters[MOST_ADAPTERS];
    float adapter_weights[MOST_ADAPTERS];
    size_t num_adapters;
    uint32_t given; /* a bit for each option of the table */
} text_options;

typedef struct {
    const char *name;
    int takes, commands;
    size_t place;
    uint32_t least, most;
} option_rule;

#define RULE(name, takes, commands, member, least, most) \
    {name, takes, commands, offsetof(text_options, member), least, most}
static const option_rule OPTION_RULES[] = {
    RULE("--prompt", TAKES_TEXT, FOR_GENERATE | FOR_TOKENIZE, prompt, 0, 0),
    RULE("--prompt-file", TAKES_TEXT, FOR_GENERATE | FOR_TOKENIZE, prompt_file, 0, 0),
    RULE("--special", TAKES_NOTHING, FOR_TOKENIZE, special, 0, 0),
    RULE("--tokens", TAKES_COUNT, FOR_BOTH, tokens, 1, 1u << 30),
    RULE("--temperature", TAKES_NUMBER, FOR_BOTH, sampling.temperature, 0, 0),
    RULE("--top-k", TAKES_COUNT, FOR_BOTH, sampling.top_k, 0, UINT32_MAX),
    RULE("--top-p", TAKES_NUMBER, FOR_BOTH, sampling.top_p, 0, 0),
    RULE("--min-p", TAKES_NUMBER, FOR_BOTH, sampling.min_p, 0, 0),
    RULE("--repetition-penalty", TAKES_NUMBER, FOR_BOTH, sampling.repetition_penalty, 0, 0),
    RULE("--repetition-window", TAKES_COUNT, FOR_BOTH, sampling.repetition_window, 0, SAMPLER_WINDOW),
    RULE("--seed", TAKES_SEED, FOR_BOTH, sampling.seed, 0, 0),
    RULE("--stop", TAKES_STOP, FOR_BOTH, stops, 0, 0),
    RULE("--adapter", TAKES_ADAPTER, FOR_BOTH, adapters, 0, 0),
    RULE("--threads", TAKES_COUNT, FOR_BOTH, threads, 1, 256),
    RULE("--context", TAKES_COUNT, FOR_BOTH, context, 1, 1u << 30),
    RULE("--state-in", TAKES_TEXT, FOR_BOTH, state_in, 0, 0),
    RULE("--state-out", TAKES_TEXT, FOR_BOTH, state_out, 0, 0),
    RULE("--user-prefix", TAKES_TEXT, FOR_CHAT, user, 0, 0),
    RULE("--assistant-prefix", TAKES_TEXT, FOR_CHAT, assistant, 0, 0),
    RULE("--system", TAKES_TEXT, FOR_CHAT, system, 0, 0),
    RULE("--verify", TAKES_NOTHING, FOR_ALL, verify, 0, 0),
    RULE("--quiet", TAKES_NOTHING, FOR_BOTH, quiet, 0, 0),
};
enum { NUM_RULES = sizeof OPTION_RULES / sizeof *OPTION_RULES };

static const char SAMPLING_HELP[] =
    "  --tokens N                at most N tokens (generate: 200, chat: 512)\n"
    "  --temperature T           0 always takes the likeliest token (0.8)\n"
    "  --top-k K                 draw among the K likeliest; 0: among all (50)\n"
    "  --top-p P                 draw among the likeliest that have together the probability P; 1: all (1)\n"
    "  --min-p P                 none whose probability is below P times the likeliest one's (0)\n"
    "  --repetition-penalty R    makes recent tokens less likely; 1: off (1)\n"
    "  --repetition-window N     how many recent tokens, up to 1024 (64)\n"
    "  --seed N                  of the random numbers (0)\n"
    "  --stop S                  end before the text S; up to 16 times\n"
    "  --adapter F[=W]           use an adapter of the model, a file .mka, with the weight W (1); up to 16 times\n"
    "  --threads N               (1)\n"
    "  --context N               tokens that the caches of softmax attention layers have room for\n"
    "  --state-in F, --state-out F   continue from a saved state; save the state at the end\n"
    "  --verify                  check the model file's sha256 first\n";

static const char GENERATE_HELP[] =
    "usage: mixkabrn generate MODEL [--prompt T | --prompt-file F | -] [options]\n\n"
    "Continues a text, or begins a new document. `-` reads the prompt from standard input.\n\n"
    "  mixkabrn generate tiny.mkb --prompt \"def \"\n"
    "  mixkabrn generate tiny.mkb --prompt-file story.txt --tokens 1000 --temperature 0\n"
    "  mixkabrn generate tiny.mkb --prompt \"One\" --state-out one.mks\n"
    "  mixkabrn generate tiny.mkb --state-in one.mks --tokens 50      # goes on where it ended\n\n"
    "  --quiet                   print neither the prompt nor the speed\n";

static const char CHAT_HELP[] =
    "usage: mixkabrn chat MODEL [options]\n\n"
    "Talks to a model. The history is a state of fixed size: a turn costs only its own tokens.\n"
    "Models whose chat template has <|im_start|> get turns in ChatML, others this text, which ends before \"\\nUser:\":\n\n"
    "  User: what you say\n"
    "  Assistant: what the model says\n\n"
    "  mixkabrn chat tiny.mkb\n"
    "  mixkabrn chat tiny.mkb --user-prefix \"Q:\" --assistant-prefix \"A:\" --temperature 0.5\n"
    "  mixkabrn chat tiny.mkb --state-in talk.mks --state-out talk.mks\n\n"
    "  --user-prefix P, --assistant-prefix P   in place of \"User:\" and \"Assistant:\"\n"
    "  --system T                text at the beginning\n"
    "  --quiet                   print answers alone\n";

static const char CHAT_COMMANDS[] =
    "/regenerate, /r   another answer\n"
    "/edit TEXT        say TEXT in place of the last turn\n"
    "/undo             take the last turn back\n"
    "/reset            forget everything but the system text\n"
    "/system TEXT      begin anew with this text at the beginning\n"
    "/temperature X    0 always takes the likeliest token\n"
    "/adapter FILE W   use this adapter, with the weight W (1); /adapter off: none; /adapters: which are in use\n"
    "/file NAME        say what a text file holds\n"
    "/save FILE        save the state;  /load FILE  continue from one\n"
    "/quit             end; so does Ctrl-D. Ctrl-C ends an answer, or drops a line.\n"
    "A line that ends in \\ goes on in the next one; // at the beginning says a /.\n";

static const char TOKENIZE_HELP[] =
    "usage: mixkabrn tokenize MODEL [--prompt T | --prompt-file F | -] [--special]\n\n"
    "Prints the ids of a text. --special: text that spells a special token is one.\n\n"
    "  mixkabrn tokenize tiny.mkb --prompt \"def \"\n";

static int complain(const char *format, const char *name, const char *value) {
    fprintf(stderr, "error: ");
    fprintf(stderr, format, name, value);
    fputc('\n', stderr);
    return WRONG_USAGE;
}

/* A whole number without sign, or 0 and `errno`. */
static uint64_t parse_whole(const char *text) {
    char *end;
    unsigned long long value;
    errno = 0;
    value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end) errno = EINVAL;
    return errno ? 0 : value;
}

static int add_stop(text_options *o, const char *text) {
    size_t length = strlen(text), size;
    if (length == 0 || length > STOP_BYTES) return complain("%s: use a text of 1 to 256 bytes%s", "--stop", "");
    if (o->num_stops == MOST_STOPS - 2) return complain("%s: %s is one too many", "--stop", text);
    for (size_t i = 0; i < length; i += size)
        if (read_character((const unsigned char *)text + i, length - i, &size) == UINT32_MAX)
            return complain("%s: not UTF-8, so no text can contain it%s", "--stop", "");
    o->stops[o->num_stops++] = text;
    return MKB_OK;
}

/* A number that is all of a text. */
static int parse_number(const char *text, float *number) {
    char *end;
    *number = strtof(text, &end);
    return end != text && !*end;
}

/* FILE or FILE=WEIGHT; the text is cut where the name ends. */
static int add_adapter(text_options *o, const char *text) {
    char *equals = strrchr(text, '=');
    float *weight = &o->adapter_weights[o->num_adapters];
    if (o->num_adapters == MOST_ADAPTERS) return complain("%s: %s is one too many", "--adapter", text);
    o->adapters[o->num_adapters++] = text;
    if (equals && parse_number(equals + 1, weight)) *equals = 0;
    else *weight = 1.0f;
    return MKB_OK;
}

static int take_value(text_options *o, const option_rule *rule, const char *value) {
    char *place = (char *)o + rule->place;
    uint64_t whole;
    switch (rule->takes) {
    case TAKES_TEXT: memcpy(place, &value, sizeof value); break;
    case TAKES_STOP: return add_stop(o, value);
    case TAKES_ADAPTER: return add_adapter(o, value);
    case TAKES_NUMBER: {
        float number;
        if (!parse_number(value, &number)) return complain("%s %s: use a number such as 0.8", rule->name, value);
        memcpy(place, &number, sizeof number);
        break;
    }
    default:
        whole = parse_whole(value);
        if (errno || (rule->takes == TAKES_COUNT && (whole < rule->least || whole > rule->most))) {
            fprintf(stderr, "error: %s %s: use a whole number from %lu to %llu\n", rule->name, value,
                    (unsigned long)rule->least, rule->takes == TAKES_SEED ? (unsigned long long)UINT64_MAX : rule->most);
            return WRONG_USAGE;
        }
        if (rule->takes == TAKES_SEED) {
            memcpy(place, &whole, sizeof whole);
        } else {
            uint32_t count = (uint32_t)whole;
            memcpy(place, &count, sizeof count);
        }
    }
    return MKB_OK;
}

/* Take one option, as `--name value` or `--name=value`. */
static int take_option(text_options *o, int command, int *at, int count, char **arguments) {
    const char *name = arguments[*at], *equals = strchr(name, '=');
    size_t length = equals ? (size_t)(equals - name) : strlen(name);
    for (size_t i = 0; i < NUM_RULES; i++) {
        const option_rule *rule = &OPTION_RULES[i];
        if (!(rule->commands & command) || strlen(rule->name) != length || strncmp(rule->name, name, length)) continue;
        o->given |= (uint32_t)1 << i;
        if (rule->takes == TAKES_NOTHING) {
            const int yes = 1;
            if (equals) return complain("%s takes no value%s", rule->name, "");
            memcpy((char *)o + rule->place, &yes, sizeof yes);
            return MKB_OK;
        }
        if (!equals && *at + 1 >= count) return complain("%s needs a value%s", rule->name, "");
        return take_value(o, rule, equals ? equals + 1 : arguments[++*at]);
    }
    return complain("%s is no option here; --help lists them%s", name, "");
}

static int take_argument(text_options *o, int command, int *at, int count, char **arguments) {
    const char *text = arguments[*at];
    if (!strcmp(text, "-") && command != FOR_CHAT) return o->from_stdin = 1, MKB_OK;
    if (text[0] == '-') return take_option(o, command, at, count, arguments);
    if (o->model) return complain("%s: one model file is enough; put a text after --prompt%s", text, "");
    o->model = text;
    return MKB_OK;
}

/* Fill the options, or say what is wrong with them. */
static int parse_text_options(text_options *o, int command, int count, char **arguments) {
    static const char *const helps[5] = {NULL, GENERATE_HELP, CHAT_HELP, NULL, TOKENIZE_HELP};
    char error[MKB_ERROR_BYTES];
    int status = MKB_OK;
    memset(o, 0, sizeof *o);
    o->sampling = DEFAULT_SAMPLING;
    o->tokens = command == FOR_CHAT ? 512 : 200;
    o->threads = 1;
    o->user = "User:";
    o->assistant = "Assistant:";
    for (int i = 0; i < count && !status; i++) {
        if (!strcmp(arguments[i], "--help") || !strcmp(arguments[i], "-h")) {
            fputs(helps[command], stdout);
            if (command != FOR_TOKENIZE) fputs(SAMPLING_HELP, stdout);
            if (command == FOR_CHAT) printf("\nWhile it runs:\n%s", CHAT_COMMANDS);
            return SHOWN_HELP;
        }
        status = take_argument(o, command, &i, count, arguments);
    }
    if (status) return status;
    if (!o->model) return fputs(helps[command], stderr), WRONG_USAGE;
    if ((o->prompt != NULL) + (o->prompt_file != NULL) + o->from_stdin > 1)
        return complain("%s, --prompt-file and -: give one of them%s", "--prompt", "");
    return check_sampling(&o->sampling, error) ? complain("%s%s", error, "") : MKB_OK;
}

/* --- a model that reads and writes text --- */

static volatile sig_atomic_t was_interrupted;

static void note_interrupt(int signal_number) {
    (void)signal_number;
    was_interrupted = 1;
}

typedef struct {
    const text_options *options;
    mkb_model *model;
    mkb_context *context;
    float *logits;
    text_writer writer;
    uint64_t tokens_read, answer_read; /* in all; bytes of the answer's tokens that have been read */
    uint32_t answer_tokens, last_token;
    double read_seconds, write_seconds;
    int keeps_history, history_lost; /* lost: what a saved state has read */
    uint32_t *history;               /* the tokens that the state has read, of chats */
    size_t history_room;
    char error[MKB_ERROR_BYTES];
} session;

static void set_handler(int signal_number, void (*handler)(int), int flags) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    action.sa_handler = handler;
    action.sa_flags = flags;
    sigaction(signal_number, &action, NULL);
}

/* Notice Ctrl-C from now on. What is being written goes on; the reading of a line ends if `while_reading`. */
static void catch_interrupts(int while_reading) { set_handler(SIGINT, note_interrupt, while_reading ? 0 : SA_RESTART); }

#ifdef SIGBUS
/* A mapped file that became shorter has no bytes to read any more. */
static void tell_changed_file(int signal_number) {
    static const char line[] = "error: the model file was changed or cut while in use; start again; replace files by renaming\n";
    (void)signal_number;
    if (write(2, line, sizeof line - 1) < 0) _exit(2);
    _exit(1);
}
#endif

/* What these commands need of the process: no death by a closed pipe, and no file under 0, 1 or 2. */
static void prepare_process(void) {
    for (int i = 0; i < 3; i++)
        if (fcntl(i, F_GETFD) < 0 && open("/dev/null", O_RDWR) < 0) return;
    set_handler(SIGPIPE, SIG_IGN, 0);
#ifdef SIGXFSZ
    /* A file that may not grow is an error of write(). */
    set_handler(SIGXFSZ, SIG_IGN, 0);
#endif
#ifdef SIGBUS
    set_handler(SIGBUS, tell_changed_file, 0);
#endif
}

/* Tokens of a saved state, to make room for them, once its header is known to be sound. */
static int peek_position(const mkb_model *m, const char *path, uint64_t *position, char *error) {
    unsigned char head[STATE_HEADER] = {0};
    struct stat about;
    int file = open_regular(path, path, "a saved state", &about, error), status;
    if (file < 0) return MKB_ERROR_FILE;
    if (read(file, head, sizeof head) < 0) status = fail(error, MKB_ERROR_FILE, "%s: cannot be read: %s", path, strerror(errno));
    else status = check_state_header(m, head, (uint64_t)about.st_size, path, error);
    close(file);
    *position = read_u64(head + 88);
    return status;
}

/* Settings that were given on the command line replace those of a saved state. */
static void override_sampling(session *s) {
    const text_options *o = s->options;
    size_t begin = offsetof(text_options, sampling);
    for (size_t i = 0; i < NUM_RULES; i++) {
        const option_rule *rule = &OPTION_RULES[i];
        char *settings = (char *)&s->context->sampler.settings;
        if (!(o->given >> i & 1) || rule->place < begin || rule->place >= begin + sizeof o->sampling) continue;
        memcpy(settings + (rule->place - begin), (const char *)o + rule->place, rule->takes == TAKES_SEED ? 8 : 4);
        if (rule->takes == TAKES_SEED) seed_sampler(&s->context->sampler, o->sampling.seed);
    }
}

/* Open adapters and use them in place of those before. The context keeps what it needs of them. */
static int use_adapters(session *s, const char *const *paths, const float *weights, size_t count) {
    mkb_adapter *opened[MOST_ADAPTERS];
    size_t number = 0;
    int status = MKB_OK;
    while (number < count && !(status = mkb_adapter_open(s->model, paths[number], &opened[number], s->error))) number++;
    if (!status) status = mkb_context_set_adapters(s->context, opened, weights, count, s->error);
    while (number) mkb_adapter_close(opened[--number]);
    return status;
}

/* Create the context with room for `tokens`, and load the state. */
static int open_context(session *s, uint64_t tokens) {
    const text_options *o = s->options;
    uint64_t position = 0;
    int status = o->state_out ? check_target(o->state_out, s->error) : MKB_OK;
    if (!status && o->state_in) status = peek_position(s->model, o->state_in, &position, s->error);
    if (status) return status;
    tokens += MIN(position, UINT32_MAX);
    if (o->context) tokens = o->context;
    status = mkb_context_create(s->model, (int)o->threads, (uint32_t)MIN(tokens, UINT32_MAX), &s->context, s->error);
    if (status) return status;
    s->logits = malloc(s->model->set.vocab_size * sizeof *s->logits);
    if (!s->logits) return fail(s->error, MKB_ERROR_MEMORY, "no memory for logits");
    s->writer.file = stdout;
    s->writer.for_terminal = isatty(1);
    memcpy(s->writer.stops, o->stops, sizeof o->stops);
    s->writer.num_stops = o->num_stops;
    status = mkb_sampling_set(s->context, &o->sampling, s->error);
    if (!status && o->num_adapters) status = use_adapters(s, o->adapters, o->adapter_weights, o->num_adapters);
    if (status || !o->state_in) return status;
    s->history_lost = 1;
    status = mkb_state_load(s->context, o->state_in, s->error);
    if (!status) override_sampling(s);
    return status;
}

static void close_session(session *s) {
    mkb_context_destroy(s->context);
    mkb_model_close(s->model);
    free(s->logits);
    free(s->history);
}

/* Remember tokens that are read next, so that another adapter can read them too. */
static void note_history(session *s, const uint32_t *ids, size_t count) {
    size_t at = (size_t)s->context->position;
    if (!at) s->history_lost = 0;
    if (!s->keeps_history || s->history_lost) return;
    if (at + count > s->history_room) {
        size_t room = 2 * (at + count) + 1024;
        uint32_t *larger = room < SIZE_MAX / 8 ? realloc(s->history, room * sizeof *larger) : NULL;
        s->history_lost = !larger;
        if (!larger) return;
        s->history = larger, s->history_room = room;
    }
    memmove(s->history + at, ids, count * sizeof *ids);
}

/* Read tokens, some at a time so that Ctrl-C is noticed. */
static int read_tokens(session *s, const uint32_t *ids, size_t count, int logits) {
    enum { SOME = 256 };
    double begin = seconds_now();
    int status = MKB_OK;
    s->tokens_read += count;
    while (count && !status && !was_interrupted) {
        size_t some = MIN(count, (size_t)SOME);
        note_history(s, ids, some);
        status = mkb_decode(s->context, ids, some, logits && some == count ? s->logits : NULL, s->error);
        ids += some, count -= some;
    }
    s->read_seconds += seconds_now() - begin;
    return status ? status : count ? INTERRUPTED : MKB_OK;
}

/* The ids of a text, in memory that is the caller's, after room for `before` more. */
static uint32_t *list_ids(session *s, const char *text, size_t bytes, int special, size_t before, size_t *count) {
    uint32_t *ids = bytes < SIZE_MAX / 8 ? malloc((bytes + before + 1) * sizeof *ids) : NULL;
    *count = ids ? mkb_tokenize(s->model, text, bytes, special, ids + before, bytes) : MKB_NO_COUNT;
    if (*count != MKB_NO_COUNT) return ids;
    fail(s->error, MKB_ERROR_MEMORY, "no memory for a text of %llu bytes", (unsigned long long)bytes);
    free(ids);
    return NULL;
}

/* Draw and show tokens until the document ends, a stop string is found, `limit` are drawn or Ctrl-C is pressed. The last
 * one is not read unless the answer was interrupted. */
static int write_answer(session *s, uint32_t limit, int trim) {
    double begin = seconds_now();
    int status = MKB_OK;
    begin_text(&s->writer, trim);
    s->answer_tokens = 0, s->answer_read = 0;
    while (!status && s->answer_tokens < limit && !was_interrupted) {
        size_t size;
        uint32_t id = s->last_token = mkb_sample(s->context, s->logits);
        if (id == MKB_NO_TOKEN)
            return fail(s->error, MKB_ERROR_ARGUMENT,
                        "the model's outputs are not finite: its training has diverged; pack an earlier checkpoint");
        if (id == s->model->set.document_token) break;
        s->answer_tokens++;
        const char *bytes = mkb_token_bytes(s->model, id, &size);
        write_token(&s->writer, bytes, size);
        if (s->writer.stopped || s->writer.failed || s->answer_tokens == limit) break;
        note_history(s, &id, 1);
        status = mkb_decode(s->context, &id, 1, s->logits, s->error);
        s->answer_read += size;
    }
    finish_text(&s->writer);
    s->write_seconds = seconds_now() - begin;
    if (s->writer.failed && !status)
        status = fail(s->error, MKB_ERROR_FILE, "the text cannot be written: %s", strerror(errno ? errno : EPIPE));
    return status;
}

static double rate_of(uint64_t count, double seconds) { return seconds > 0 ? (double)count / seconds : 0; }

static void print_error(const session *s, int status) {
    if (status == MKB_ERROR_FULL && s->context)
        fprintf(stderr, "error: %s has room for %lu tokens in its attention layers; use a larger --context\n",
                s->model->name, (unsigned long)s->context->max_tokens);
    else fprintf(stderr, "error: %s\n", s->error);
}

static int report_status(const session *s, int status) {
    if (status == INTERRUPTED) fprintf(stderr, "\ninterrupted\n");
    else if (status) print_error(s, status);
    return status == INTERRUPTED || status == MKB_OK ? status : 1;
}

/* --- generate and tokenize --- */

/* All of a file, whose size need not be known. */
static int read_all(FILE *file, const char *name, char **text, size_t *bytes, char *error) {
    size_t room = 0, got = 1;
    *text = NULL;
    *bytes = 0;
    while (got) {
        if (*bytes == room) {
            char *larger = room < SIZE_MAX / 4 ? realloc(*text, room = room ? 2 * room : 1 << 16) : NULL;
            if (!larger) return fail(error, MKB_ERROR_MEMORY, "%s: no memory for a text of this size", name);
            *text = larger;
        }
        got = fread(*text + *bytes, 1, room - *bytes, file);
        *bytes += got;
    }
    return ferror(file) ? fail(error, MKB_ERROR_FILE, "%s: cannot be read: %s", name, strerror(errno)) : MKB_OK;
}

static int read_prompt(const text_options *o, char **text, size_t *bytes, char *error) {
    FILE *file = o->from_stdin ? stdin : o->prompt_file ? fopen(o->prompt_file, "rb") : NULL;
    const char *prompt = o->prompt ? o->prompt : "";
    int status;
    *text = NULL;
    if (o->prompt_file && !file)
        return fail(error, MKB_ERROR_FILE, "%s: cannot be opened: %s", o->prompt_file, strerror(errno));
    if (file) {
        status = read_all(file, o->from_stdin ? "standard input" : o->prompt_file, text, bytes, error);
        if (!o->from_stdin) fclose(file);
        return status;
    }
    *bytes = strlen(prompt);
    *text = malloc(*bytes + 1);
    if (!*text) return fail(error, MKB_ERROR_MEMORY, "no memory for the prompt");
    memcpy(*text, prompt, *bytes + 1);
    return MKB_OK;
}

/* A rate with commas between its thousands. */
static void write_rate(char text[40], uint64_t count, double seconds) {
    char digits[32];
    size_t length = (size_t)snprintf(digits, sizeof digits, "%.0f", MIN(rate_of(count, seconds), 1e15));
    for (size_t i = 0; i < length; i++) {
        if (i && (length - i) % 3 == 0) *text++ = ',';
        *text++ = digits[i];
    }
    *text = 0;
}

/* What was read and written since the last time, and how fast. */
static void print_rates(session *s) {
    char reading[40], writing[40];
    write_rate(reading, s->tokens_read, s->read_seconds);
    write_rate(writing, s->answer_tokens, s->write_seconds);
    fprintf(stderr, "[%llu token%s read at %s tokens/s, %lu written at %s tokens/s]\n", (unsigned long long)s->tokens_read,
            s->tokens_read == 1 ? "" : "s", reading, (unsigned long)s->answer_tokens, writing);
}

static void print_speed(session *s) {
    const mkb_model *m = s->model;
    if (s->options->quiet) {
        if (s->writer.for_terminal) putchar('\n');
        return;
    }
    fprintf(stderr, "\n%s at step %llu\n", m->name, (unsigned long long)m->step);
    print_rates(s);
}

/* What is read before the answer: the token that a saved state left unread, or the document token; then the prompt. */
static int read_generate_prompt(session *s, uint32_t *ids, size_t count) {
    uint32_t drawn = s->context->sampler.drawn;
    if (drawn || s->context->position == 0) {
        ids[0] = drawn ? drawn - 1 : s->model->set.document_token;
        count++;
    } else {
        ids++;
    }
    if (count == 0)
        return fail(s->error, MKB_ERROR_ARGUMENT, "%s ends where nothing was begun; say how to go on with --prompt", s->options->state_in);
    return read_tokens(s, ids, count, 1);
}

static int generate_text(session *s, const char *prompt, size_t bytes) {
    const text_options *o = s->options;
    size_t count;
    uint32_t *ids = list_ids(s, prompt, bytes, 0, 1, &count);
    int status = ids ? open_context(s, (uint64_t)count + 1 + o->tokens) : MKB_ERROR_MEMORY;
    catch_interrupts(0);
    if (!status && !o->quiet) {
        show(&s->writer, prompt, bytes);
        fflush(stdout);
    }
    if (!status) status = read_generate_prompt(s, ids, count);
    free(ids);
    if (!status) status = write_answer(s, o->tokens, 0);
    if (status) return status;
    print_speed(s);
    if (o->state_out) status = mkb_state_save(s->context, o->state_out, s->error);
    return status ? status : was_interrupted ? INTERRUPTED : MKB_OK;
}

static int command_generate(int count, char **arguments) {
    text_options o;
    session s;
    char *prompt = NULL;
    size_t bytes = 0;
    int status = parse_text_options(&o, FOR_GENERATE, count, arguments);
    if (status) return status == SHOWN_HELP ? 0 : status;
    prepare_process();
    memset(&s, 0, sizeof s);
    s.options = &o;
    status = read_prompt(&o, &prompt, &bytes, s.error);
    if (!status) status = mkb_model_open(o.model, o.verify, &s.model, s.error);
    if (!status) status = generate_text(&s, prompt, bytes);
    status = report_status(&s, status);
    close_session(&s);
    free(prompt);
    return status;
}

static int command_tokenize(int count, char **arguments) {
    text_options o;
    session s;
    char *prompt = NULL;
    size_t bytes = 0, found = 0;
    uint32_t *ids = NULL;
    int status = parse_text_options(&o, FOR_TOKENIZE, count, arguments);
    if (status) return status == SHOWN_HELP ? 0 : status;
    prepare_process();
    memset(&s, 0, sizeof s);
    s.options = &o;
    status = read_prompt(&o, &prompt, &bytes, s.error);
    if (!status) status = mkb_model_open(o.model, o.verify, &s.model, s.error);
    if (!status) status = (ids = list_ids(&s, prompt, bytes, o.special, 0, &found)) ? MKB_OK : MKB_ERROR_MEMORY;
    for (size_t i = 0; i < found && !status; i++) printf("%s%lu", i ? " " : "", (unsigned long)ids[i]);
    if (!status && (putchar('\n') == EOF || fflush(stdout)))
        status = fail(s.error, MKB_ERROR_FILE, "the ids cannot be written: %s", strerror(errno));
    status = report_status(&s, status);
    close_session(&s);
    free(ids);
    free(prompt);
    return status;
}

/* --- chat --- */

enum { CHAT_TURNS = 32, MARKUP_BYTES = 640, TERMINAL_LINE = 4095 /* most bytes of a line that Linux passes on */ };

/* A state at the beginning of a turn, and what was said in it. */
typedef struct {
    unsigned char *state;
    size_t state_bytes, text_bytes;
    char *text;
} chat_turn;

/* Between turns the state has read everything up to where the user's text begins. */
typedef struct {
    session s;
    int chatml, failed;
    char opening[MARKUP_BYTES], lead[MARKUP_BYTES], closing[MARKUP_BYTES], stop[MARKUP_BYTES];
    char *system;
    chat_turn turns[CHAT_TURNS];
    size_t num_turns;
    chat_turn asked;        /* the state before the last token of the last turn's markup; no text */
    uint32_t asked_token;
} chat;

/* opening: before the first turn; lead: between turns; closing: between what the user and what the assistant says. */
static int choose_markup(chat *c) {
    const text_options *o = c->s.options;
    size_t bytes = 0;
    const char *template_text = mkb_model_template(c->s.model, &bytes);
    static const char mark[] = "<|im_start|>";
    for (size_t i = 0; !c->chatml && i + sizeof mark - 1 <= bytes; i++)
        c->chatml = !memcmp(template_text + i, mark, sizeof mark - 1);
    if (strlen(o->user) > STOP_BYTES - 1 || strlen(o->assistant) > STOP_BYTES || !*o->user || !*o->assistant)
        return complain("%s and --assistant-prefix: use 1 to 255 bytes%s", "--user-prefix", "");
    if (c->chatml) {
        strcpy(c->opening, "<|im_start|>user\n");
        strcpy(c->lead, "<|im_end|>\n<|im_start|>user\n");
        strcpy(c->closing, "<|im_end|>\n<|im_start|>assistant\n");
        strcpy(c->stop, "<|im_end|>");
    } else {
        snprintf(c->opening, MARKUP_BYTES, "%s", o->user);
        snprintf(c->lead, MARKUP_BYTES, "\n%s", o->user);
        snprintf(c->closing, MARKUP_BYTES, "\n%s", o->assistant);
        snprintf(c->stop, MARKUP_BYTES, "\n%s", o->user);
    }
    return MKB_OK;
}

static void add_chat_stops(chat *c) {
    text_writer *w = &c->s.writer;
    w->stops[w->num_stops++] = c->stop;
    if (c->chatml) w->stops[w->num_stops++] = "<|im_start|>";
}

static void free_turn(chat_turn *turn) {
    free(turn->state);
    free(turn->text);
    memset(turn, 0, sizeof *turn);
}

static void forget_turns(chat *c) {
    while (c->num_turns) free_turn(&c->turns[--c->num_turns]);
    free_turn(&c->asked);
}

static int keep_state(chat *c, chat_turn *turn) {
    mkb_context *context = c->s.context;
    turn->state_bytes = mkb_state_bytes(context);
    free(turn->state);
    turn->state = malloc(turn->state_bytes);
    /* Before the turn has read anything, its state is that of now. */
    if (!turn->state) return fail(c->s.error, MKB_ERROR_MEMORY, "no memory to remember a turn; use /reset");
    return mkb_state_get(context, turn->state, turn->state_bytes, c->s.error);
}

/* Go back, but with the settings of now, and random numbers that have not been used. */
static int restore_state(chat *c, const chat_turn *turn) {
    sampler_state now = c->s.context->sampler;
    int status = mkb_state_set(c->s.context, turn->state, turn->state_bytes, c->s.error);
    if (status) return status;
    c->s.context->sampler.settings = now.settings;
    memcpy(c->s.context->sampler.random, now.random, sizeof now.random);
    return MKB_OK;
}

/* Read a text. Only the program's own markup may hold special tokens. With `ask`, logits follow, and the state before
 * the last token is kept, so that another answer reads but that one. */
static int read_text(chat *c, const char *text, size_t bytes, int special, int ask) {
    size_t count;
    uint32_t *ids = list_ids(&c->s, text, bytes, special, 0, &count);
    int status = ids ? MKB_OK : MKB_ERROR_MEMORY;
    if (!status && ask && count) {
        c->asked_token = ids[--count];
        status = read_tokens(&c->s, ids, count, 0);
        if (!status) status = keep_state(c, &c->asked);
        if (!status) status = read_tokens(&c->s, &c->asked_token, 1, 1);
    } else if (!status) {
        status = read_tokens(&c->s, ids, count, 0);
    }
    free(ids);
    return status;
}

static int read_markup(chat *c, const char *text) { return read_text(c, text, strlen(text), 1, 0); }

/* Do the last tokens spell this text? */
static int has_just_read(const chat *c, const char *text) {
    const sampler_state *s = &c->s.context->sampler;
    size_t left = strlen(text), size;
    for (uint32_t i = 1; left && i <= s->window_count; i++) {
        const char *bytes = mkb_token_bytes(c->s.model, s->window[(s->window_next + SAMPLER_WINDOW - i) % SAMPLER_WINDOW], &size);
        size_t shared = MIN(size, left);
        if (!bytes || memcmp(bytes + size - shared, text + left - shared, shared)) return 0;
        left -= shared;
    }
    return !left;
}

/* A state of `generate` ends within a text, often before a token that was drawn and not read: a turn begins after it. */
static int join_text(chat *c) {
    const uint32_t drawn = c->s.context->sampler.drawn, last = drawn - 1;
    int status = MKB_OK;
    if (!drawn && has_just_read(c, c->opening)) return MKB_OK;
    if (drawn && last != c->s.model->set.document_token) status = read_tokens(&c->s, &last, 1, 0);
    return status ? status : read_markup(c, c->lead);
}

/* The document token, the system text, and where the user's text begins. */
static int begin_chat(chat *c) {
    int status;
    if (c->s.context->position) return join_text(c);
    status = read_tokens(&c->s, &c->s.model->set.document_token, 1, 0);
    if (c->system) {
        if (!status && c->chatml) status = read_markup(c, "<|im_start|>system\n");
        if (!status) status = read_text(c, c->system, strlen(c->system), 0, 0);
        if (!status) status = read_markup(c, c->chatml ? "<|im_end|>\n" : "\n\n");
    }
    if (!status) status = read_markup(c, c->opening);
    if (status) mkb_reset(c->s.context);
    return status;
}

/* After an answer, read what of its last token belongs to it, and the markup up to the user's next text, of which the
 * model may have written a part. */
static int end_answer(chat *c) {
    session *s = &c->s;
    const text_writer *w = &s->writer;
    uint64_t end = w->taken - w->stop_bytes;
    size_t skip = 0, size;
    int status = MKB_OK;
    const char *bytes = mkb_token_bytes(s->model, s->last_token, &size);
    if (!w->stopped) {
        /* The last token at the limit was drawn, but not read; that of the document's end stays so. */
        if (s->context->sampler.drawn && s->last_token != s->model->set.document_token)
            status = read_tokens(s, &s->last_token, 1, 0);
    } else if (end > s->answer_read) {
        status = read_text(c, bytes, (size_t)MIN(end - s->answer_read, size), 0, 0);
    } else {
        skip = (size_t)(s->answer_read - end);
        /* Another stop string than the turn's own has nothing in common with the markup. */
        if (skip > strlen(c->lead) || w->stop_bytes < skip || memcmp(w->held, c->lead, skip)) skip = 0;
    }
    /* So few tokens are read in one piece: when Ctrl-C came before them, they are read all the same. */
    while (!status && (status = read_markup(c, c->lead + skip)) == INTERRUPTED) status = was_interrupted = 0;
    return status;
}

/* Remember where a turn begins; the oldest is forgotten when there are too many. */
static int add_turn(chat *c, char *text, size_t bytes) {
    chat_turn *turn;
    if (c->num_turns == CHAT_TURNS) {
        free_turn(&c->turns[0]);
        memmove(c->turns, c->turns + 1, (CHAT_TURNS - 1) * sizeof *c->turns);
        c->num_turns--;
        memset(&c->turns[c->num_turns], 0, sizeof *c->turns);
    }
    turn = &c->turns[c->num_turns++];
    turn->text = text;
    turn->text_bytes = bytes;
    return keep_state(c, turn);
}

static int take_back(chat *c) {
    chat_turn *turn = &c->turns[c->num_turns - 1];
    int status = turn->state ? restore_state(c, turn) : MKB_OK;
    free_turn(turn);
    free_turn(&c->asked);
    c->num_turns--;
    return status;
}

/* Write an answer to what has been read. Ctrl-C ends it, but not the chat; after an error, such as full caches, the turn
 * is taken back. */
static int answer(chat *c) {
    session *s = &c->s;
    int status = write_answer(s, s->options->tokens, 1);
    putchar('\n');
    fflush(stdout);
    was_interrupted = 0;
    if (!status && !s->options->quiet) print_rates(s);
    s->tokens_read = 0, s->read_seconds = 0;
    if (!status) status = end_answer(c);
    if (status) take_back(c);
    return status;
}

/* Read what the user says and answer. `text` is kept. */
static int say(chat *c, char *text, size_t bytes) {
    int status = begin_chat(c);
    if (status) return free(text), status;
    status = add_turn(c, text, bytes);
    if (!status) status = read_text(c, text, bytes, 0, 0);
    if (!status) status = read_text(c, c->closing, strlen(c->closing), 1, 1);
    if (!status) return answer(c);
    /* Nothing of a turn that cannot be read stays: the caches are full, or Ctrl-C was pressed. */
    was_interrupted = 0;
    take_back(c);
    return status;
}

static char *copy_text(const char *text, size_t bytes) {
    char *copy = malloc(bytes + 1);
    if (!copy) return NULL;
    memcpy(copy, text, bytes);
    copy[bytes] = 0;
    return copy;
}

/* Words of most tokenizers hold the blank before them, so it is a part of what the user says. */
static int say_copy(chat *c, const char *text, size_t bytes) {
    size_t blank = !c->chatml;
    char *copy = malloc(bytes + 2);
    if (!copy) return fail(c->s.error, MKB_ERROR_MEMORY, "no memory for a text of this size");
    copy[0] = ' ';
    memcpy(copy + blank, text, bytes);
    return say(c, copy, bytes + blank);
}

/* --- commands of the chat --- */

static int remark(const char *text) {
    fprintf(stderr, "%s\n", text);
    return MKB_OK;
}

static int chat_regenerate(chat *c, const char *rest) {
    (void)rest;
    if (!c->num_turns) return remark("no turn that could be answered again; say something first");
    if (c->asked.state) {
        int status = restore_state(c, &c->asked);
        if (!status) status = read_tokens(&c->s, &c->asked_token, 1, 1);
        return status ? status : answer(c);
    }
    chat_turn *last = &c->turns[c->num_turns - 1];
    char *text = last->text;
    size_t bytes = last->text_bytes;
    last->text = NULL;
    if (take_back(c)) return free(text), MKB_ERROR_MISMATCH;
    return say(c, text, bytes);
}

static int chat_edit(chat *c, const char *rest) {
    int status;
    if (!c->num_turns) return remark("no turn to edit; say something first");
    if (!*rest) return remark("/edit needs the new text: /edit TEXT");
    status = take_back(c);
    return status ? status : say_copy(c, rest, strlen(rest));
}

/* Say that a command was obeyed. */
static int confirm(const chat *c, const char *text) { return c->s.options->quiet ? MKB_OK : remark(text); }

/* A text file as what the user says: terminals cut long lines. */
static int chat_file(chat *c, const char *rest) {
    struct stat about;
    char *text = NULL;
    size_t bytes = 0;
    if (!*rest) return remark("/file needs a file: /file question.txt");
    int number = open_regular(rest, rest, "a text file", &about, c->s.error), status;
    if (number < 0) return remark(c->s.error);
    FILE *file = fdopen(number, "rb");
    if (!file) return close(number), remark("no memory to read a file");
    status = read_all(file, rest, &text, &bytes, c->s.error);
    fclose(file);
    while (bytes && (text[bytes - 1] == '\n' || text[bytes - 1] == '\r')) bytes--;
    if (status) remark(c->s.error), status = MKB_OK;
    else if (!bytes) remark("the file is empty");
    else status = say_copy(c, text, bytes);
    free(text);
    return status;
}

static int chat_undo(chat *c, const char *rest) {
    (void)rest;
    if (!c->num_turns) return remark("no turn to take back");
    int status = take_back(c);
    return status ? status : confirm(c, "the last turn is taken back");
}

static int chat_reset(chat *c, const char *rest) {
    (void)rest;
    forget_turns(c);
    mkb_reset(c->s.context);
    return confirm(c, c->system ? "all forgotten but the system text" : "all forgotten; there is no system text");
}

static int chat_system(chat *c, const char *rest) {
    free(c->system);
    c->system = *rest ? copy_text(rest, strlen(rest)) : NULL;
    return chat_reset(c, rest);
}

static int chat_temperature(chat *c, const char *rest) {
    mkb_sampling *now = &c->s.context->sampler.settings, wanted = *now;
    char *end;
    wanted.temperature = strtof(rest, &end);
    if (end == rest || *end) return remark("/temperature needs a number, such as 0.8");
    if (check_sampling(&wanted, c->s.error)) return remark(c->s.error);
    *now = wanted;
    if (!c->s.options->quiet) fprintf(stderr, "temperature %g\n", (double)wanted.temperature);
    return MKB_OK;
}

static int chat_save(chat *c, const char *rest) {
    int status;
    if (!*rest) return remark("/save needs a file: /save talk.mks");
    status = begin_chat(c);
    if (!status) status = mkb_state_save(c->s.context, rest, c->s.error);
    if (status) return remark(c->s.error);
    fprintf(stderr, "%s: %llu tokens\n", rest, (unsigned long long)c->s.context->position);
    return MKB_OK;
}

static int chat_load(chat *c, const char *rest) {
    if (!*rest) return remark("/load needs a file: /load talk.mks");
    if (mkb_state_load(c->s.context, rest, c->s.error)) return remark(c->s.error);
    c->s.history_lost = 1;
    forget_turns(c);
    fprintf(stderr, "%s: %llu tokens, temperature %g\n", rest, (unsigned long long)c->s.context->position,
            (double)c->s.context->sampler.settings.temperature);
    return MKB_OK;
}

/* Read the tokens of the chat again, as the adapters of now do, and keep the turns' states anew. */
static int read_again(chat *c, uint64_t end) {
    const uint64_t *position = &c->s.context->position;
    int status = MKB_OK;
    for (size_t i = 0; i <= c->num_turns && !status; i++) {
        chat_turn *turn = i < c->num_turns ? &c->turns[i] : &c->asked;
        uint64_t until = turn->state ? read_u64(turn->state + 88) : 0;
        if (until < *position || !turn->state) continue;
        status = read_tokens(&c->s, c->s.history + *position, (size_t)(until - *position), 0);
        if (!status) status = keep_state(c, turn);
    }
    return status ? status : read_tokens(&c->s, c->s.history + *position, (size_t)(end - *position), 0);
}

static int chat_adapters(chat *c, const char *rest) {
    static const char *const methods[] = {"low-rank factors", "flipped codes", "initial states"};
    const mkb_context *context = c->s.context;
    (void)rest;
    for (size_t i = 0; i < context->num_adapters; i++) {
        const mkb_adapter_details *d = &context->adapters[i]->details;
        fprintf(stderr, "%s: %s of rank %lu after %llu steps, weight %g\n", d->name, methods[d->method],
                (unsigned long)d->rank, (unsigned long long)d->steps, (double)context->adapter_weights[i]);
    }
    return context->num_adapters ? MKB_OK : remark("no adapter is in use");
}

/* Other adapters in place of those in use: the model reads anew what was said so far. */
static int change_adapters(chat *c, const char *path, float weight) {
    session *s = &c->s;
    uint64_t end = s->context->position;
    int lost = s->history_lost && end, status;
    if (use_adapters(s, &path, &weight, path != NULL)) return remark(s->error);
    if (lost) {
        forget_turns(c);
        return remark("what the saved state had read is not known, so the chat begins anew");
    }
    status = read_again(c, end);
    if (status) {
        forget_turns(c);
        mkb_reset(s->context);
        return status == INTERRUPTED ? remark("interrupted; all forgotten but the system text") : status;
    }
    if (!s->options->quiet && end) fprintf(stderr, "%llu tokens read again\n", (unsigned long long)end);
    return MKB_OK;
}

static int chat_adapter(chat *c, const char *rest) {
    char *path = copy_text(rest, strlen(rest)), *blank = path ? strrchr(path, ' ') : NULL;
    float weight = 1.0f;
    int status;
    if (!path || !*path) return free(path), remark("/adapter needs a file: /adapter style.mka, or /adapter off");
    if (blank && parse_number(blank + 1, &weight)) *blank = 0;
    else weight = 1.0f;
    status = change_adapters(c, strcmp(path, "off") ? path : NULL, weight);
    free(path);
    return status ? status : c->s.options->quiet ? MKB_OK : chat_adapters(c, "");
}

static int chat_help(chat *c, const char *rest) {
    (void)c, (void)rest;
    fputs(CHAT_COMMANDS, stderr);
    return MKB_OK;
}

static const struct {
    const char *name;
    int (*act)(chat *c, const char *rest);
} CHAT_ACTIONS[] = {
    {"/regenerate", chat_regenerate}, {"/r", chat_regenerate}, {"/edit", chat_edit}, {"/undo", chat_undo},
    {"/reset", chat_reset}, {"/system", chat_system}, {"/temperature", chat_temperature}, {"/save", chat_save},
    {"/load", chat_load}, {"/file", chat_file}, {"/help", chat_help}, {"/adapter", chat_adapter}, {"/adapters", chat_adapters},
};

static int obey(chat *c, const char *line) {
    size_t length = strcspn(line, " ");
    const char *rest = line + length + strspn(line + length, " ");
    for (size_t i = 0; i < sizeof CHAT_ACTIONS / sizeof *CHAT_ACTIONS; i++)
        if (strlen(CHAT_ACTIONS[i].name) == length && !strncmp(CHAT_ACTIONS[i].name, line, length))
            return CHAT_ACTIONS[i].act(c, rest);
    return remark("no such command; /help lists them, and // at the beginning says a /");
}

/* The terminal's next line, as getline() gives it. Ctrl-C is held back until the wait begins: caught between the prompt
 * and read(), it would be noticed only after the next line. */
static ssize_t await_line(char **part, size_t *room) {
    sigset_t interrupt, before;
    fd_set input;
    if (isatty(0)) {
        sigemptyset(&interrupt);
        sigaddset(&interrupt, SIGINT);
        sigprocmask(SIG_BLOCK, &interrupt, &before);
        FD_ZERO(&input);
        FD_SET(0, &input);
        if (!was_interrupted) pselect(1, &input, NULL, NULL, NULL, &before);
        sigprocmask(SIG_SETMASK, &before, NULL);
        if (was_interrupted) return -1;
    }
    return getline(part, room, stdin);
}

/* A line, or several of which all but the last end in a backslash; −1 at the end. */
static long read_line(char **line, size_t *room) {
    static char *part;
    static size_t part_room;
    size_t length = 0;
    ssize_t got = await_line(&part, &part_room);
    if (got < 0) return free(part), part = NULL, -1;
    for (;;) {
        int goes_on;
        if (got && part[got - 1] == '\n') got--;
        if (got && part[got - 1] == '\r') got--;
        goes_on = got && part[got - 1] == '\\';
        if (length + (size_t)got + 2 > *room) {
            char *larger = realloc(*line, *room = 2 * (length + (size_t)got + 2));
            if (!larger) return -1;
            *line = larger;
        }
        memcpy(*line + length, part, (size_t)got);
        length += (size_t)got;
        if (goes_on) (*line)[length - 1] = '\n', got = await_line(&part, &part_room);
        if (goes_on && got < 0 && was_interrupted) return -1;
        if (!goes_on || got < 0) break;
    }
    (*line)[length] = 0;
    return (long)length;
}

/* Errors that end the chat are those of its output; others are told, and it goes on. */
static int run_chat(chat *c) {
    char *line = NULL;
    size_t room = 0;
    int on_terminal = isatty(0), status = MKB_OK, interrupts = 0;
    while (!c->failed) {
        long length;
        if (on_terminal) fputs("> ", stderr), fflush(stderr);
        catch_interrupts(1);
        length = read_line(&line, &room);
        catch_interrupts(0);
        if (length < 0 && on_terminal && was_interrupted) {
            was_interrupted = 0;
            clearerr(stdin);
            remark(interrupts++ ? "\nCtrl-D or /quit ends the chat" : "");
            continue;
        }
        if (length < 0 || !strcmp(line, "/quit")) break;
        was_interrupted = interrupts = 0;
        if (length == 0) continue;
        if (on_terminal && length == TERMINAL_LINE) {
            remark("the terminal cut this line after 4,095 bytes, so it is not used; put the text in a file: /file NAME");
            continue;
        }
        if (line[0] == '/' && line[1] != '/') status = obey(c, line);
        else status = say_copy(c, line + (line[0] == '/'), (size_t)length - (line[0] == '/'));
        c->s.tokens_read = 0;
        was_interrupted = 0;
        c->failed = c->s.writer.failed;
        if (status == INTERRUPTED) remark("interrupted; the turn is taken back");
        else if (status) print_error(&c->s, status);
    }
    if (on_terminal && !c->failed) fputc('\n', stderr);
    free(line);
    return c->failed ? 1 : 0;
}

static int open_chat(chat *c) {
    session *s = &c->s;
    const text_options *o = s->options;
    int status = mkb_model_open(o->model, o->verify, &s->model, s->error);
    if (status) return report_status(s, status);
    if ((status = choose_markup(c))) return status;
    if ((status = open_context(s, 8192))) return report_status(s, status);
    add_chat_stops(c);
    s->keeps_history = 1;
    c->system = o->system ? copy_text(o->system, strlen(o->system)) : NULL;
    if (o->quiet) return MKB_OK;
    fprintf(stderr, "%s: %.1f M parameters, step %llu. ", s->model->name, 1e-6 * (double)s->model->parameters,
            (unsigned long long)s->model->step);
    if (c->chatml) fprintf(stderr, "Turns in ChatML, as its chat template has them.");
    else fprintf(stderr, "Turns as \"%s\" and \"%s\".", o->user, o->assistant);
    fprintf(stderr, " /help lists commands.\n");
    if (s->context->num_adapters) chat_adapters(c, "");
    if (!c->chatml && s->model->template_bytes)
        remark("the model's chat template is not used here, as it is not ChatML; `mixkabrn serve` uses it");
    return MKB_OK;
}

static int command_chat(int count, char **arguments) {
    text_options o;
    chat *c;
    int status = parse_text_options(&o, FOR_CHAT, count, arguments);
    if (status) return status == SHOWN_HELP ? 0 : status;
    prepare_process();
    c = calloc(1, sizeof *c);
    if (!c) return complain("%s: no memory%s", o.model, ""), 1;
    c->s.options = &o;
    status = open_chat(c);
    if (!status) status = run_chat(c);
    if (!status && o.state_out) status = report_status(&c->s, mkb_state_save(c->s.context, o.state_out, c->s.error));
    forget_turns(c);
    close_session(&c->s);
    free(c->system);
    free(c);
    return status;
}

typedef struct {
    const char *name, *does;
    int (*run)(int count, char **arguments);
} program_command;

static const program_command COMMANDS[] = {
    {"generate", "continues a text, or begins a document", command_generate},
    {"chat", "talks to a model", command_chat},
    {"tokenize", "prints the ids of a text", command_tokenize},
    {"bench", "measures speed and memory", command_bench},
    {"selftest", "compares this machine's kernels with the plain ones", command_selftest},
};
enum { NUM_COMMANDS = sizeof COMMANDS / sizeof *COMMANDS };

static void print_help(FILE *file) {
    fprintf(file, "usage: mixkabrn COMMAND ...\n\n");
    for (int i = 0; i < NUM_COMMANDS; i++) fprintf(file, "  %-10s%s\n", COMMANDS[i].name, COMMANDS[i].does);
    fprintf(file, "\n  mixkabrn generate tiny.mkb --prompt \"Once\"\n  mixkabrn chat tiny.mkb\n  mixkabrn bench tiny.mkb --threads 2\n\n"
                  "mixkabrn COMMAND --help tells more. Version %s, kernels %s.\n", mkb_version(), mkb_kernels());
}

/* Letters that the beginnings and the ends of two words share. */
static size_t likeness(const char *a, const char *b) {
    size_t first = 0, last = 0, m = strlen(a), n = strlen(b);
    while (first < MIN(m, n) && a[first] == b[first]) first++;
    while (first + last < MIN(m, n) && a[m - 1 - last] == b[n - 1 - last]) last++;
    return first + last;
}

static int refuse_command(const char *name) {
    int best = 0;
    for (int i = 1; i < NUM_COMMANDS; i++)
        if (likeness(name, COMMANDS[i].name) > likeness(name, COMMANDS[best].name)) best = i;
    fprintf(stderr, "error: %s is no command", name);
    if (likeness(name, COMMANDS[best].name) >= 2) fprintf(stderr, "; did you mean %s?", COMMANDS[best].name);
    fprintf(stderr, " --help lists them\n");
    return 2;
}

int main(int argc, char **argv) {
    const char *command = argc > 1 ? argv[1] : "";
    if (!strcmp(command, "--help") || !strcmp(command, "-h")) return print_help(stdout), 0;
    if (!strcmp(command, "--version")) return printf("mixkabrn %s\n", mkb_version()) < 0;
    if (!*command) return print_help(stderr), 2;
    for (int i = 0; i < NUM_COMMANDS; i++)
        if (!strcmp(command, COMMANDS[i].name)) return COMMANDS[i].run(argc - 2, argv + 2);
    return refuse_command(command);
}
#endif

#endif /* KIND */
