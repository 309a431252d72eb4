/* Damaged model files, adapters and states for the runtime, in one process, to be compiled with
 * -fsanitize=address,undefined:
 *
 *     fuzz SEED COUNT FILE…     COUNT inputs, each a model with up to 8 changes
 *
 * An adapter among the files belongs to the model before it, which is used with a changed adapter if it was accepted.
 * The sha256 is not checked, and most changes hit what is read as numbers: the header, the tables, the tokenizer. */
#define MIXKABRN_LIBRARY
#include "mixkabrn.c"

#include <signal.h>

enum { MOST_MODELS = 64, SECONDS = 30 };

typedef struct {
    unsigned char *bytes;
    size_t size, model; /* its number */
} adapter_bytes;

static adapter_bytes adapters[MOST_MODELS];
static size_t num_adapters, fuzz_model;
static unsigned long adapters_used;

static uint64_t fuzz_state;
static unsigned long fuzz_number;

static uint64_t draw(uint64_t below) {
    uint64_t z = fuzz_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (z ^ z >> 31) % below;
}

static void on_alarm(int number) {
    (void)number;
    fprintf(stderr, "error: input %lu hangs\n", fuzz_number);
    _exit(3);
}

static uint64_t interesting(uint64_t now, size_t size) {
    static const uint64_t values[] = {0, 1, 2, 3, 7, 8, 15, 16, 63, 64, 255, 1023, 65535, 65536, 1u << 18, 1u << 24};
    switch (draw(8)) {
    case 0: return values[draw(sizeof values / sizeof *values)];
    case 1: return now + 1 - 2 * draw(2);
    case 2: return now + 64 - 128 * draw(2);
    case 3: return now << draw(8);
    case 4: return ~(uint64_t)0 >> draw(64);
    case 5: return size - draw(130);
    case 6: return (uint64_t)1 << draw(64);
    }
    return draw(UINT64_MAX);
}

static void change_number(unsigned char *p, size_t size, int wide) {
    if (wide) write_u64(p, interesting(read_u64(p), size));
    else write_u32(p, (uint32_t)interesting(read_u32(p), size));
}

/* One of the model's floats as what computing may stumble over. */
static void change_float(unsigned char *p) {
    static const uint32_t bits[] = {0x7f800000, 0xff800000, 0x7fc00000, 0x7f7fffff, 0x00000001, 0x80000000, 0x3f800000};
    write_u32(p, bits[draw(sizeof bits / sizeof *bits)]);
}

static void change_model(unsigned char *file, size_t size) {
    uint64_t table = read_u64(file + 216), tokenizer = read_u64(file + 240);
    uint32_t records = read_u32(file + 200);
    unsigned char *record = NULL;
    if (table < size && records && records <= (size - table) / 64) record = file + table + 64 * draw(records);
    switch (draw(10)) {
    case 0: change_number(file + 88 + 4 * draw(30), size, 0); return;
    case 1: change_number(file + 8 + 8 * draw(33), size, 1); return;
    case 2:
    case 3: if (record) change_number(record + 4 * draw(6), size, 0); return;
    case 4: if (record) change_number(record + 24 + 8 * draw(4), size, 1); return;
    case 5: if (record) memcpy(record, file + table + 64 * draw(records), 64); return;
    case 6: if (tokenizer + 64 < size) change_number(file + tokenizer + 4 * draw(8), size, 0); return;
    case 7:
        if (tokenizer + 64 < size) change_number(file + tokenizer + 4 * draw((size - tokenizer) / 4), size, 0);
        return;
    case 8: change_float(file + 4 * draw(size / 4)); return;
    }
    file[draw(size)] = (unsigned char)draw(256);
}

static void use_state(mkb_context *c, const mkb_info *info, float *logits, char *error) {
    size_t size = mkb_state_bytes(c), cut = draw(4) ? size : draw(size + 1);
    unsigned char *state = malloc(size);
    uint32_t token = (uint32_t)draw(info->vocab_size);
    if (!state) return;
    if (!mkb_state_get(c, state, size, error)) {
        for (uint64_t i = draw(4); i; i--) {
            if (draw(2)) state[draw(MIN(size, 256))] = (unsigned char)draw(256);
            else change_number(state + draw(MIN(size - 8, 200)), size, draw(2) > 0);
        }
        /* Else the checksum would hide what lies behind it. */
        if (draw(4)) write_u64(state + 96, checksum(state + 104, size - 104) ^ read_u64(state + 88));
        unsigned char *part = malloc(cut + 1);
        if (part) memcpy(part, state, cut), mkb_state_set(c, part, cut, error);
        free(part);
        mkb_decode(c, &token, 1, logits, error);
        mkb_sample(c, logits);
    }
    free(state);
}

static void change_adapter(unsigned char *file, size_t size) {
    uint64_t table = read_u64(file + 112);
    uint32_t records = read_u32(file + 108);
    unsigned char *record = NULL;
    if (table < size && records && records <= (size - table) / 64) record = file + table + 64 * draw(records);
    switch (draw(8)) {
    case 0: change_number(file + 8 + 4 * draw(40), size, 0); return;
    case 1:
    case 2: if (record) change_number(record + 4 * draw(6), size, 0); return;
    case 3: if (record) change_number(record + 24 + 8 * draw(5), size, 1); return;
    case 4: if (record) memcpy(record, file + table + 64 * draw(records), 64); return;
    case 5: change_float(file + 4 * draw(size / 4)); return;
    }
    file[draw(size)] = (unsigned char)draw(256);
}

/* As it would have to be for what lies behind the hashes to be read. */
static void sign_adapter(const mkb_model *m, unsigned char *file, size_t size) {
    sha256_state s;
    if (draw(8)) write_u64(file + 16, size);
    if (draw(8)) memcpy(file + 56, m->codes_sha256, 32);
    memset(file + 24, 0, 32);
    sha256_begin(&s);
    sha256_add(&s, file, size);
    if (draw(8)) sha256_end(&s, file + 24);
}

static void use_adapter(const mkb_model *m, mkb_context *c, const adapter_bytes *from, char *error) {
    size_t size = draw(20) ? from->size : draw(from->size + 1);
    unsigned char *file = malloc(size + 1);
    mkb_adapter *opened = NULL;
    if (!file) return;
    memcpy(file, from->bytes, size);
    if (size >= 256) {
        for (uint64_t i = draw(4); i; i--) change_adapter(file, size);
        sign_adapter(m, file, size);
    }
    if (mkb_adapter_open_memory(m, file, size, &opened, error)) {
        if (!*error || strchr(error, '\n')) fprintf(stderr, "error: no line of explanation\n"), exit(4);
    } else {
        mkb_adapter *const twice[2] = {opened, opened};
        const float weights[2] = {1.0f, draw(2) ? 1.0f : -0.5f};
        adapters_used += !mkb_context_set_adapters(c, twice, weights, 1 + draw(2), error);
    }
    free(file);
    mkb_adapter_close(opened);
}

static void use_context(mkb_model *m, const mkb_info *info) {
    char error[MKB_ERROR_BYTES];
    mkb_context *c = NULL;
    float *logits = malloc((size_t)info->vocab_size * sizeof *logits);
    mkb_sampling sampling = {draw(2) ? 0.0f : 1.0f, (uint32_t)draw(3) * 20, 1.0f - 0.25f * (float)draw(3), 0.0f,
                             draw(2) ? 1.0f : 1.5f, 64, draw(UINT64_MAX)};
    if (logits && !mkb_context_create(m, 1, 64, &c, error)) {
        uint32_t tokens[3];
        mkb_sampling_set(c, &sampling, error);
        for (size_t i = 0; i < num_adapters; i++)
            if (adapters[i].model == fuzz_model && draw(2)) use_adapter(m, c, &adapters[i], error);
        for (int i = 0; i < 3; i++) tokens[i] = (uint32_t)draw(info->vocab_size + draw(2));
        if (!mkb_decode(c, tokens, 2, logits, error) && !mkb_decode(c, tokens + 2, 1, logits, error)) mkb_sample(c, logits);
        use_state(c, info, logits, error);
    }
    mkb_context_destroy(c);
    free(logits);
}

static void use_tokenizer(mkb_model *m, const mkb_info *info) {
    uint32_t ids[64];
    char text[64];
    size_t bytes = draw(sizeof text + 1), size;
    for (size_t i = 0; i < bytes; i++) text[i] = draw(3) ? (char)("aeinrst \n1.,'<|>"[draw(16)]) : (char)draw(256);
    mkb_tokenize(m, text, bytes, (int)draw(2), ids, draw(65));
    for (int i = 0; i < 4; i++) {
        const char *token = mkb_token_bytes(m, (uint32_t)draw((uint64_t)info->vocab_size + 2), &size);
        volatile char sink = 0;
        for (size_t n = 0; n < size; n++) sink = (char)(sink + token[n]);
    }
}

/* Returns whether the file was accepted. */
static int use_file(const unsigned char *file, size_t size) {
    char error[MKB_ERROR_BYTES] = "";
    mkb_model *m;
    mkb_info info;
    if (mkb_model_open_memory(file, size, 0, &m, error)) {
        if (!*error || strchr(error, '\n')) fprintf(stderr, "error: no line of explanation\n"), exit(4);
        return 0;
    }
    mkb_model_info(m, &info);
    use_tokenizer(m, &info);
    use_context(m, &info);
    mkb_model_close(m);
    return 1;
}

static unsigned char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    unsigned char *bytes = malloc(1 << 24);
    *size = file && bytes ? fread(bytes, 1, 1 << 24, file) : 0;
    if (file) fclose(file);
    return bytes;
}

int main(int argc, char **argv) {
    unsigned char *models[MOST_MODELS];
    size_t sizes[MOST_MODELS], files = (size_t)argc - 3, count = 0;
    unsigned long inputs, accepted = 0;
    if (argc < 4 || files > MOST_MODELS) return 2;
    fuzz_state = strtoull(argv[1], NULL, 10), inputs = strtoul(argv[2], NULL, 10);
    for (size_t i = 0; i < files; i++) {
        size_t size;
        unsigned char *bytes = read_file(argv[i + 3], &size);
        if (size > 3 && bytes[3] == 'A') adapters[num_adapters++] = (adapter_bytes){bytes, size, count - 1};
        else models[count] = bytes, sizes[count++] = size;
    }
    signal(SIGALRM, on_alarm);
    for (fuzz_number = 0; fuzz_number < inputs; fuzz_number++) {
        uint64_t which = draw(count);
        size_t size = draw(20) ? sizes[which] : draw(sizes[which] + 1);
        unsigned char *file = malloc(size + 1);
        if (!file) return 5;
        memcpy(file, models[which], size);
        if (size >= 512) {
            if (draw(4)) write_u64(file + 16, size);
            for (uint64_t i = 1 + draw(8) * draw(2); i; i--) change_model(file, size);
        }
        alarm(SECONDS);
        fuzz_model = which;
        accepted += (unsigned long)use_file(file, size);
        alarm(0);
        free(file);
    }
    for (size_t i = 0; i < count; i++) free(models[i]);
    for (size_t i = 0; i < num_adapters; i++) free(adapters[i].bytes);
    printf("%lu inputs, %lu accepted, %lu adapters used\n", inputs, accepted, adapters_used);
    return 0;
}
