/* The runtime's program with one more command, for tests on other machines:
 *
 *     probe logits MODEL…     for each model lines of 24 greedy and of 24 drawn ids, and of hashes of logits and state;
 *                             and the same with its adapters, MODEL.lora.mka and so on
 *
 * Compile with -I of the runtime's sources. */
#define main mixkabrn_main
#include "mixkabrn.c"
#undef main

enum { PROMPT = 37, GREEDY = 24 };

static uint64_t hash_floats(const float *values, size_t count) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, 4);
        hash = (hash ^ bits) * 0x100000001b3u;
    }
    return hash;
}

static int write_tokens(mkb_context *c, const mkb_info *info, float *logits, char *error) {
    uint32_t tokens[PROMPT];
    for (size_t i = 0; i < PROMPT; i++) tokens[i] = (uint32_t)(i * 7919 % info->vocab_size);
    int status = mkb_decode(c, tokens, PROMPT, logits, error);
    uint64_t hash = hash_floats(logits, info->vocab_size);
    for (int i = 0; i < 2 * GREEDY && !status; i++) {
        const mkb_sampling sampling = {i < GREEDY ? 0.0f : 1.0f, 50, 0.95f, 0.01f, 1.1f, 64, 7};
        if (i % GREEDY == 0) status = mkb_sampling_set(c, &sampling, error);
        tokens[0] = mkb_sample(c, logits);
        printf("%lu ", (unsigned long)tokens[0]);
        if (!status) status = mkb_decode(c, tokens, 1, logits, error);
    }
    printf("\n%016llx %016llx", (unsigned long long)hash, (unsigned long long)hash_floats(logits, info->vocab_size));
    for (size_t i = 0; i < 8 && i < info->vocab_size; i++) printf(" %.9g", (double)logits[i]);
    putchar('\n');
    return status;
}

static int write_state(mkb_context *c, char *error) {
    size_t size = mkb_state_bytes(c);
    unsigned char *state = malloc(size);
    uint64_t hash = 0xcbf29ce484222325u;
    int status = state ? mkb_state_get(c, state, size, error) : MKB_ERROR_MEMORY;
    for (size_t i = 0; i < size && !status; i++) hash = (hash ^ state[i]) * 0x100000001b3u;
    if (!status) status = mkb_state_set(c, state, size, error);
    free(state);
    printf("%016llx\n", (unsigned long long)hash);
    return status;
}

static int use_all_adapters(const mkb_model *m, mkb_context *c, const char *path, char *error) {
    static const char *const methods[3] = {"lora", "state", "ternary_lora"};
    const float weights[3] = {0.5f, -2.0f, 1.0f};
    mkb_adapter *opened[3] = {NULL, NULL, NULL};
    char name[4096];
    int status = MKB_OK;
    for (int i = 0; i < 3 && !status; i++) {
        snprintf(name, sizeof name, "%s.%s.mka", path, methods[i]);
        status = mkb_adapter_open(m, name, &opened[i], error);
    }
    if (!status) status = mkb_context_set_adapters(c, opened, weights, 3, error);
    for (int i = 0; i < 3; i++) mkb_adapter_close(opened[i]);
    return status;
}

static int probe(const char *path) {
    char error[MKB_ERROR_BYTES] = "no memory";
    mkb_model *m = NULL;
    mkb_context *c = NULL;
    mkb_info info;
    int status = mkb_model_open(path, 1, &m, error);
    if (!status) status = mkb_context_create(m, 1, PROMPT + 2 * GREEDY, &c, error);
    if (!status) {
        mkb_model_info(m, &info);
        float *logits = malloc(info.vocab_size * sizeof *logits);
        status = logits ? write_tokens(c, &info, logits, error) : MKB_ERROR_MEMORY;
        if (!status) status = write_state(c, error);
        if (!status) status = use_all_adapters(m, c, path, error);
        if (!status) status = write_tokens(c, &info, logits, error);
        if (!status) status = write_state(c, error);
        free(logits);
    }
    if (status) fprintf(stderr, "error: %s\n", error);
    mkb_context_destroy(c);
    mkb_model_close(m);
    return status != 0;
}

int main(int argc, char **argv) {
    int status = 0;
    if (argc < 3 || strcmp(argv[1], "logits")) return mixkabrn_main(argc, argv);
    for (int i = 2; i < argc && !status; i++) status = probe(argv[i]);
    return status;
}
