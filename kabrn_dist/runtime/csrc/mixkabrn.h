/* MixKABRN runtime: models of Kolmogorov-Arnold Bit Retentive Networks on any CPU, from one mapped file.
 *
 * Functions return 0, or a negative number of `enum mkb_status` with one line of explanation in `error`.
 * A model is read-only and may be shared by threads; a context, with its state and buffers, belongs to one thread at a
 * time. Nothing is allocated while tokens are read. */
#ifndef MIXKABRN_H
#define MIXKABRN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Of the package that this file belongs to. */
#define MKB_VERSION "0.2.0"

#define MKB_ERROR_BYTES 256
/* What mkb_sample returns if no logit is a number, and mkb_tokenize for 4 GiB or without memory. */
#define MKB_NO_TOKEN UINT32_MAX
#define MKB_NO_COUNT SIZE_MAX

enum mkb_status {
    MKB_OK = 0,
    MKB_ERROR_FILE = -1,     /* cannot be opened, read, mapped or written */
    MKB_ERROR_FORMAT = -2,   /* damaged, foreign or of a newer version */
    MKB_ERROR_MEMORY = -3,
    MKB_ERROR_ARGUMENT = -4,
    MKB_ERROR_MISMATCH = -5, /* a state of another model, tokenizer or adapters; an adapter of another model */
    MKB_ERROR_FULL = -6      /* the cache of softmax attention layers, or the caller's buffer, is full */
};

typedef struct mkb_model mkb_model;
typedef struct mkb_context mkb_context;
typedef struct mkb_adapter mkb_adapter;

typedef struct {
    uint32_t vocab_size, tokenizer_size, document_token, hidden_size, num_layers;
    uint64_t step, file_bytes, parameters, active_parameters;
    uint64_t state_bytes;        /* of a saved state, without attention layers' caches */
    uint64_t bytes_per_token;    /* weights read for one token of decoding */
    uint32_t attention_layers;   /* their caches grow with the length */
    unsigned char sha256[32], tokenizer_sha256[32];
} mkb_info;

typedef struct {
    float temperature;           /* 0: always the likeliest token */
    uint32_t top_k;              /* 0: off */
    float top_p;                 /* 1: off */
    float min_p;                 /* 0: off */
    float repetition_penalty;    /* 1: off */
    uint32_t repetition_window;  /* last tokens that are penalized, those of prompts too; up to 1,024 */
    uint64_t seed;
} mkb_sampling;

/* What an adapter says about itself. */
typedef struct {
    char name[64];               /* for people; ends in 0 */
    uint32_t method, rank;       /* 0: low-rank factors, 1: flipped codes, 2: initial states */
    uint64_t steps, file_bytes;
    unsigned char sha256[32], base_sha256[32]; /* of its file, and of the codes of its model */
} mkb_adapter_details;

/* Open and check a model file. `verify` also checks its sha256, which reads all of it. */
int mkb_model_open(const char *path, int verify, mkb_model **model, char error[MKB_ERROR_BYTES]);
/* The same from memory that stays the caller's and must outlive the model; 8-byte aligned (for WebAssembly). */
int mkb_model_open_memory(const void *bytes, size_t size, int verify, mkb_model **model, char error[MKB_ERROR_BYTES]);
void mkb_model_close(mkb_model *model);
/* Whether its file changed since it was opened. 0: no; 1: overwritten or cut in place, so that reading it may crash;
 * 2: the name leads to another file or to none, and the opened one can still be used. */
int mkb_model_changed(const mkb_model *model);
void mkb_model_info(const mkb_model *model, mkb_info *info);
/* Text parts of the file; not terminated by 0. */
const char *mkb_model_config(const mkb_model *model, size_t *bytes);
const char *mkb_model_template(const mkb_model *model, size_t *bytes);

/* `threads` ≥ 1, and `max_tokens` of the caches of attention layers (ignored without any). */
int mkb_context_create(const mkb_model *model, int threads, uint32_t max_tokens, mkb_context **context,
                       char error[MKB_ERROR_BYTES]);
void mkb_context_destroy(mkb_context *context);

/* Open and check an adapter of this model, a file that `mixkabrn adapter pack` wrote. It is read-only and may be shared by
 * contexts; one that a context uses stays until the context has others or is destroyed. The model must outlive it. */
int mkb_adapter_open(const mkb_model *model, const char *path, mkb_adapter **adapter, char error[MKB_ERROR_BYTES]);
/* The same from memory, which is not needed afterwards. */
int mkb_adapter_open_memory(const mkb_model *model, const void *bytes, size_t size, mkb_adapter **adapter,
                            char error[MKB_ERROR_BYTES]);
void mkb_adapter_close(mkb_adapter *adapter);
void mkb_adapter_info(const mkb_adapter *adapter, mkb_adapter_details *details);

/* Use these adapters, with a weight each, in place of those before; 0 of them is the model alone. At most one may flip
 * codes, with the weight 1. The state becomes the one after nothing: what was read was read by another model. After an
 * error nothing has changed. */
int mkb_context_set_adapters(mkb_context *context, mkb_adapter *const *adapters, const float *weights, size_t count,
                             char error[MKB_ERROR_BYTES]);

/* Read tokens on top of the state. `logits`, if not NULL, gets the last token's [vocab_size]. */
int mkb_decode(mkb_context *context, const uint32_t *tokens, size_t count, float *logits,
               char error[MKB_ERROR_BYTES]);
/* The state after nothing. */
void mkb_reset(mkb_context *context);
/* Tokens read so far. */
uint64_t mkb_position(const mkb_context *context);

/* The state as bytes, with a header that names model, tokenizer, adapters, position and sampler. */
size_t mkb_state_bytes(const mkb_context *context);
int mkb_state_get(const mkb_context *context, void *bytes, size_t size, char error[MKB_ERROR_BYTES]);
int mkb_state_set(mkb_context *context, const void *bytes, size_t size, char error[MKB_ERROR_BYTES]);
int mkb_state_save(const mkb_context *context, const char *path, char error[MKB_ERROR_BYTES]);
int mkb_state_load(mkb_context *context, const char *path, char error[MKB_ERROR_BYTES]);

/* Sampling belongs to the context: settings, random numbers and the window of the penalty are part of its state. Setting
 * it begins the random numbers anew. */
int mkb_sampling_set(mkb_context *context, const mkb_sampling *sampling, char error[MKB_ERROR_BYTES]);
/* Draw a token from `logits` [vocab_size], which are changed; MKB_NO_TOKEN if none of them is a number. */
uint32_t mkb_sample(mkb_context *context, float *logits);

/* Ids of a text, which may hold invalid UTF-8 and zeros; no document token is added. Returns their number, which may
 * exceed `room`; only `room` ids are written then. Special tokens are not recognized unless `special`. No text has more
 * ids than bytes. */
size_t mkb_tokenize(const mkb_model *model, const char *text, size_t bytes, int special, uint32_t *ids, size_t room);
/* Bytes of a token, not terminated by 0. */
const char *mkb_token_bytes(const mkb_model *model, uint32_t id, size_t *bytes);

/* Name of the kernels in use, such as "avx512vnni"; MIXKABRN_KERNELS forces one. */
const char *mkb_kernels(void);
const char *mkb_version(void);

#ifdef __cplusplus
}
#endif
#endif
