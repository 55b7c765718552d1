/* The first block of GPT-2 in C. README.md says how to run it and how npgpt checks it.

   Names follow npgpt/model.py: T tokens, C n_embd, H n_head, D = C / H. Arrays are float32 in C order.
   Compile with -DMISTAKE=1, 2 or 3 for a common mistake. */

#include <math.h>

#include "files.h"

#ifndef MISTAKE
#define MISTAKE 0
#endif

static float *zeros(size_t n) {
    float *x = calloc(n, sizeof(float));
    if (!x) fail("no memory for", "a stage");
    return x;
}

/* x [T, C], weight and bias [C] -> [T, C] */
static float *layer_norm(const float *x, const float *weight, const float *bias, int T, int C) {
    float *y = zeros((size_t)T * C);
    for (int t = 0; t < T; t++, x += C) {
        double mean = 0, squares = 0;
        for (int c = 0; c < C; c++) mean += x[c] / (double)C;
        for (int c = 0; c < C; c++) squares += (x[c] - mean) * (x[c] - mean);
        double variance = squares / (MISTAKE == 1 ? C - 1 : C); /* not the sample variance */
        for (int c = 0; c < C; c++)
            y[t * C + c] = (float)(weight[c] * (x[c] - mean) / sqrt(variance + 1e-5) + bias[c]);
    }
    return y;
}

/* x [T, in], weight [in, out], bias [out] -> [T, out] */
static float *linear(const float *x, const float *weight, const float *bias, int T, int in, int out) {
    float *y = zeros((size_t)T * out);
    for (int t = 0; t < T; t++) {
        for (int o = 0; o < out; o++) y[t * out + o] = bias[o];
        for (int i = 0; i < in; i++)
            for (int o = 0; o < out; o++) y[t * out + o] += x[t * in + i] * weight[i * out + o];
    }
    return y;
}

/* c_attn [T, 3C] -> [H, T, D]: part 0 is q, 1 k, 2 v; head h has columns h D to (h + 1) D of each token. */
static float *split_heads(const float *c_attn, int part, int T, int H, int D) {
    float *y = zeros((size_t)T * H * D);
    int C = H * D;
    for (int h = 0; h < H; h++)
        for (int t = 0; t < T; t++)
            for (int d = 0; d < D; d++) {
                int n = (h * T + t) * D + d; /* where the number is in y */
                int token = MISTAKE == 2 ? n / C : t, column = MISTAKE == 2 ? n % C : h * D + d; /* not just a reshape */
                y[n] = c_attn[token * 3 * C + part * C + column];
            }
    return y;
}

/* x [H, T, D] -> [T, C], the inverse of split_heads */
static float *merge_heads(const float *x, int T, int H, int D) {
    float *y = zeros((size_t)T * H * D);
    for (int h = 0; h < H; h++)
        for (int t = 0; t < T; t++) memcpy(y + (t * H + h) * D, x + (h * T + t) * D, D * sizeof(float));
    return y;
}

/* q, k and v [H, T, D] -> [H, T, D]: each token attends to itself and those before it. */
static float *attention(const float *q, const float *k, const float *v, int T, int H, int D) {
    float *y = zeros((size_t)H * T * D), *weights = zeros((size_t)T);
    for (int h = 0; h < H; h++, q += T * D, k += T * D, v += T * D)
        for (int t = 0; t < T; t++) {
            float largest = -INFINITY, sum = 0;
            for (int s = 0; s <= t; s++) {
                weights[s] = 0;
                for (int d = 0; d < D; d++) weights[s] += q[t * D + d] * k[s * D + d] / sqrtf((float)D);
                largest = fmaxf(largest, weights[s]);
            }
            for (int s = 0; s <= t; s++) sum += weights[s] = expf(weights[s] - largest);
            for (int s = 0; s <= t; s++)
                for (int d = 0; d < D; d++) y[(h * T + t) * D + d] += weights[s] / sum * v[s * D + d];
        }
    free(weights);
    return y;
}

static float *gelu(const float *x, size_t n) {
    float *y = zeros(n);
    for (size_t i = 0; i < n; i++) {
        float tanh_form = tanhf(sqrtf(2 / 3.14159265f) * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
        y[i] = 0.5f * x[i] * (1 + (MISTAKE == 3 ? erff(x[i] / sqrtf(2)) : tanh_form)); /* not the exact form */
    }
    return y;
}

static float *add(const float *x, const float *y, size_t n) {
    float *sum = zeros(n);
    for (size_t i = 0; i < n; i++) sum[i] = x[i] + y[i];
    return sum;
}

int main(int argc, char **argv) {
    if (argc != 4) fail("usage:", "block MODEL TRACE OUTPUT, three folders");
    size_t size, ids_size, x_size;
    char *w = read_file(argv[1], "model.safetensors", &size);
    char *heads_of_config = strstr(read_file(argv[1], "config.json", &size), "\"n_head\":");
    if (!heads_of_config) fail("config.json has no", "n_head");
    const int64_t *ids = (const int64_t *)read_file(argv[2], "token_ids.bin", &ids_size);
    const float *x = (const float *)read_file(argv[2], "embedding.bin", &x_size);
    int T = (int)(ids_size / sizeof(int64_t)), C = (int)(x_size / sizeof(float) / T);
    int H = atoi(heads_of_config + strlen("\"n_head\":")), D = C / H, F = 4 * C;
    begin_manifest(argv[3], ids, T);

    float *h = layer_norm(x, weight(w, "ln_1.weight"), weight(w, "ln_1.bias"), T, C);
    write_stage("ln_1", h, 1, T, C);
    h = linear(h, weight(w, "attn.c_attn.weight"), weight(w, "attn.c_attn.bias"), T, C, 3 * C);
    write_stage("attn.c_attn", h, 1, T, 3 * C);
    float *q = split_heads(h, 0, T, H, D), *k = split_heads(h, 1, T, H, D), *v = split_heads(h, 2, T, H, D);
    write_stage("attn.q", q, H, T, D);
    write_stage("attn.k", k, H, T, D);
    write_stage("attn.v", v, H, T, D);
    h = attention(q, k, v, T, H, D);
    write_stage("attn.heads", h, H, T, D);
    h = linear(merge_heads(h, T, H, D), weight(w, "attn.c_proj.weight"), weight(w, "attn.c_proj.bias"), T, C, C);
    write_stage("attn.c_proj", h, 1, T, C);
    x = add(x, h, (size_t)T * C);
    write_stage("attn.residual", x, 1, T, C);
    h = layer_norm(x, weight(w, "ln_2.weight"), weight(w, "ln_2.bias"), T, C);
    write_stage("ln_2", h, 1, T, C);
    h = linear(h, weight(w, "mlp.c_fc.weight"), weight(w, "mlp.c_fc.bias"), T, C, F);
    write_stage("mlp.c_fc", h, 1, T, F);
    h = gelu(h, (size_t)T * F);
    write_stage("mlp.act", h, 1, T, F);
    h = linear(h, weight(w, "mlp.c_proj.weight"), weight(w, "mlp.c_proj.bias"), T, F, C);
    write_stage("mlp.c_proj", h, 1, T, C);
    write_stage("", add(x, h, (size_t)T * C), 1, T, C);
    end_manifest();
    return 0; /* the system frees the memory */
}
