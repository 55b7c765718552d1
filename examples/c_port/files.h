/* What block.c reads and writes. Files are little-endian, and so must be the machine. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void fail(const char *problem, const char *name) {
    fprintf(stderr, "block: %s %s\n", problem, name);
    exit(1);
}

static FILE *open_file(const char *folder, const char *name, const char *mode) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, mode);
    if (!file) fail("cannot open", path);
    return file;
}

/* Returns the content of a file, with a 0 behind it, so that a text is a string; *size is its number of bytes. */
static char *read_file(const char *folder, const char *name, size_t *size) {
    FILE *file = open_file(folder, name, "rb");
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    char *content = calloc(*size + 1, 1);
    if (!content || fread(content, 1, *size, file) != *size) fail("cannot read", name);
    fclose(file);
    return content;
}

/* Returns a weight of block 0 in model.safetensors, which is the length of a header in 8 bytes, the header in JSON, and
   the numbers. Each tensor has an entry: "h.0.ln_1.bias":{"dtype":"F32","shape":[192],"data_offsets":[0,768]}. */
static const float *weight(char *safetensors, const char *name) {
    char key[64];
    uint64_t header;
    memcpy(&header, safetensors, 8);
    snprintf(key, sizeof key, "\"h.0.%s\":{\"dtype\":\"F32\"", name);
    char *entry = strstr(safetensors + 8, key);
    if (!entry) fail("model.safetensors has no float32 tensor h.0.", name);
    char *offset = strchr(strstr(entry, "\"data_offsets\""), '[') + 1;
    return (const float *)(safetensors + 8 + header + strtoull(offset, NULL, 10));
}

static const char *output_folder;
static FILE *manifest;

/* Begins manifest.json with the ids. */
static void begin_manifest(const char *folder, const int64_t *ids, int T) {
    output_folder = folder;
    manifest = open_file(folder, "manifest.json", "w");
    fprintf(manifest, "{\"token_ids\": [");
    for (int t = 0; t < T; t++) fprintf(manifest, "%s%lld", t ? ", " : "", (long long)ids[t]);
    fprintf(manifest, "],\n \"arrays\": [");
}

/* Writes a stage [a, b, c] of block 0 as a file of its own, with an entry in manifest.json. */
static void write_stage(const char *name, const float *x, int a, int b, int c) {
    static int count = 0;
    char file_name[64];
    snprintf(file_name, sizeof file_name, "h.0%s%s.bin", *name ? "." : "", name);
    FILE *file = open_file(output_folder, file_name, "wb");
    size_t n = (size_t)a * b * c;
    if (fwrite(x, sizeof(float), n, file) != n || fclose(file)) fail("cannot write", file_name);
    fprintf(manifest, "%s\n  {\"name\": \"%.*s\", \"dtype\": \"float32\", \"shape\": [%d, %d, %d], \"file\": \"%s\"}",
            count++ ? "," : "", (int)strlen(file_name) - 4, file_name, a, b, c, file_name);
}

static void end_manifest(void) {
    fprintf(manifest, "\n]}\n");
    if (fclose(manifest)) fail("cannot write", "manifest.json");
}
