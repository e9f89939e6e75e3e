/*
test_gpas.c: is train_gpas.c right? One line per check, `N passed, N failed` at the end.

    ./test_gpas           every layer and all twelve networks against the reference dump in
                          dev/test, which reference.py computed without knowing any derivative; then
                          threads, data, tokenizer, sampling; then the program ./train_gpas itself:
                          training, resuming, and what it says to broken files and options
    ./test_gpas_double    (compiled with -DDOUBLE) the same layers with every float a double, where
                          finite differences are exact enough to check each gradient by themselves
    ./test_gpas_cuda_fp32 PROGRAM, ./test_gpas_cuda_bf16 PROGRAM
                          (compiled as C++ with -DCUDA_REAL=float, -DCUDA_REAL=bf16) the layers and
                          networks of train_gpas.cu against the same dump, larger shapes against
                          train_gpas.c, then PROGRAM, which is train_gpas.cu on a GPU or the CPU
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <omp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef DOUBLE
#ifdef __clang__
#pragma clang diagnostic ignored "-Wkeyword-macro"
#endif
#define float double
#define expf exp
#define tanhf tanh
#define sqrtf sqrt
#define logf log
#define powf pow
#endif
#pragma GCC diagnostic ignored "-Wunused-function" // the tests do not call all of the program
#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // the same of nvcc
#endif
#define TRAIN_GPAS_NO_MAIN
#ifndef CUDA_REAL
#include "train_gpas.c"
#else
namespace cpu {
#include "train_gpas.c"
}
#ifndef TRAIN_GPAS_CU
#define TRAIN_GPAS_CU "train_gpas.cu"
#endif
#include TRAIN_GPAS_CU
typedef CUDA_REAL real;
#include <algorithm>
namespace on_gpu {  // hides the launchers of train_gpas.cu behind functions for arrays on the host
using cpu::dot;
using cpu::gate_slope;
using cpu::exp_fast;
using cpu::free_packing_space;
using cpu::gemm;
#endif

static int passed, failed;

// One check: its line, and for a failure what was seen.
__attribute__((format(printf, 3, 4))) static void check(int good, const char *name,
                                                        const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s %s", good ? "ok  " : "FAIL", name);
    if (!good) printf(": "), vprintf(format, args);
    printf("\n");
    va_end(args);
    if (good)
        passed++;
    else
        failed++;
}

// Is ||got - expected|| at most tolerance * scale? scale 0 stands for ||expected||.
static void check_close(const char *name, const float *got, const float *expected, size_t n,
                        double tolerance, double scale) {
    double difference = 0, size = 0, worst = -1;
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)got[i] - expected[i]);
        difference += d * d, size += (double)expected[i] * expected[i];
        if (!(d <= worst)) worst = d, at = i; // also true of a nan
    }
    double error = sqrt(difference) / (scale ? scale : size ? sqrt(size) : 1);
    char line[400];
    snprintf(line, sizeof line, "%s (%.1e)", name, error);
    check(error <= tolerance, line,
          "relative error %.2e over %.0e; worst element %zu: got %.9g, "
          "expected %.9g",
          error, tolerance, at, (double)got[at], (double)expected[at]);
}

static float *copy(const float *x, size_t n) {
    return (float *)memcpy(allocate(n, sizeof(float)), x, n * sizeof(float));
}

static float *random_floats(size_t n, double size, uint64_t seed) {
    float *x = (float *)allocate(n, sizeof(float));
    for (size_t i = 0; i < n; i++) x[i] = (float)(size * (2 * random_uniform(&seed) - 1));
    return x;
}

// The options of a command line written as one string.
static void options_from(Options *o, const char *line) {
    char words[1024], *argv[64];
    int argc = 1;
    snprintf(words, sizeof words, "%s", line);
    argv[0] = words;
    for (char *w = strtok(words, " "); w; w = strtok(NULL, " ")) argv[argc++] = w;
    parse_options(o, argc, argv);
#ifdef CUDA_REAL
    o->dtype = sizeof(real) == sizeof(float) ? DTYPE_FP32 : DTYPE_BF16;
#endif
}

#ifdef CUDA_REAL
#include "dev/test/on_gpu.h"
#endif

static const char *const schemes[] = {"pre", "lns", "sandwich", "post", "deepnorm", "mix"};

#ifndef DOUBLE
/* ------------------------------------------------------------------------------------------------
The reference dump
*/

enum { FORWARD, BACKWARD };
#ifdef CUDA_REAL
static const double tolerances[] = {sizeof(real) == 4 ? 1e-5 : 2e-2,
                                    sizeof(real) == 4 ? 1e-4 : 2e-2};
#else
static const double tolerances[] = {1e-5, 1e-4};
#endif
static char *dump, *dump_header;

static void open_dump(const char *path) {
    struct stat info;
    uint64_t length;
    FILE *file = fopen(path, "rb");
    if (!file || fstat(fileno(file), &info))
        die("cannot open %s: run the tests in the project's folder", path);
    dump = (char *)allocate(info.st_size + 1, 1);
    if (fread(dump, 1, info.st_size, file) != (size_t)info.st_size) die("cannot read %s", path);
    fclose(file);
    memcpy(&length, dump, 8);
    dump_header = (char *)memcpy(allocate(length + 1, 1), dump + 8, length);
    dump += 8 + length;
}

// A tensor of the dump and its shape (up to 3 numbers, the rest 1); its size in elements in *n.
static const float *tensor(const char *name, int *shape, size_t *n) {
    char key[200];
    size_t begin, end;
    int dims[3] = {1, 1, 1};
    snprintf(key, sizeof key, "\"%s\":{", name);
    const char *entry = strstr(dump_header, key);
    if (!entry) die("the dump has no tensor %s", name);
    sscanf(strstr(entry, "\"shape\":["), "\"shape\":[%d,%d,%d", &dims[0], &dims[1], &dims[2]);
    sscanf(strstr(entry, "\"data_offsets\":["), "\"data_offsets\":[%zu,%zu", &begin, &end);
    if (shape) memcpy(shape, dims, sizeof dims);
    if (n) *n = (end - begin) / 4;
    return (const float *)(dump + begin);
}

// Tensor CASE.NAME of the dump.
static const float *part(const char *of, const char *name, int *shape, size_t *n) {
    char full[200];
    snprintf(full, sizeof full, "%s.%s", of, name);
    return tensor(full, shape, n);
}

// Compares `got` with tensor CASE.NAME of the dump, by the tolerance of a forward or backward pass.
static void against_dump(const char *layer, const char *of, const char *name, const float *got,
                         int pass, double scale) {
    char line[300];
    size_t n;
    const float *expected = part(of, name, NULL, &n);
    const char *suffix = strchr(layer, ' ') ? "" : pass == FORWARD ? "_forward" : "_backward";
    snprintf(line, sizeof line, "%s%s %s: %s", layer, suffix, of, name);
    check_close(line, got, expected, n, tolerances[pass], scale);
}

// A gradient that a backward pass, called twice, has added to itself.
static const float *halved(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] /= 2;
    return x;
}

static void test_gpas(void) {
    static const char *const cases[] = {"silu",       "silu_neg",       "identity", "relu",
                                        "leaky_relu", "leaky_relu_neg", "tanh"};
    static const int acts[] = {GATE_SILU,       GATE_SILU,       GATE_IDENTITY, GATE_RELU,
                               GATE_LEAKY_RELU, GATE_LEAKY_RELU, GATE_TANH};
    for (int i = 0; i < 14; i++) {
        char of[64];
        size_t n;
        int act = acts[i / 2], stop = i % 2 == 0;
        snprintf(of, sizeof of, "gpas.%s.%s", cases[i / 2], stop ? "stop" : "nostop");
        const float *inp = part(of, "inp", NULL, &n), *dout = part(of, "dout", NULL, NULL);
        float gate = *part(of, "gate", NULL, NULL), *got = random_floats(n, 1, 1), dgate = 0;
        double scale = fabs(gate_slope(gate, act)) * sqrt(dot(inp, inp, n) * dot(dout, dout, n));
        gpas_forward(got, inp, gate, act, n);
        against_dump("gpas", of, "out", got, FORWARD, 0);
        gpas_backward(got, &dgate, dout, inp, gate, act, stop, n);
        against_dump("gpas", of, "dinp", got, BACKWARD, 0);
        against_dump("gpas", of, "dgate", &dgate, BACKWARD, scale);
        float twice = dgate;
        memcpy(got, dout, n * sizeof(float));
        gpas_backward(got, &twice, got, inp, gate, act, stop, n);
        against_dump("gpas_backward in place,", of, "dinp", got, BACKWARD, 0);
        dgate *= 2;
        check_close("gpas_backward: the gate's gradient is added to", &twice, &dgate, 1, 1e-5, 0);
        free(got);
    }
}

static void test_embedding(void) {
    int shape[3];
    size_t n;
    const int *tokens = (const int *)tensor("embedding.tokens", NULL, NULL);
    const float *weight = tensor("embedding.weight", shape, &n);
    int C = shape[1], N = 10;
    float *out = random_floats((size_t)N * C, 1, 1), *dweight = (float *)allocate(n, sizeof(float));
    embedding_forward(out, tokens, weight, N, C);
    against_dump("embedding", "embedding", "out", out, FORWARD, 0);
    for (int call = 0; call < 2; call++)
        embedding_backward(dweight, tensor("embedding.dout", NULL, NULL), tokens, N, C);
    against_dump("embedding", "embedding", "dweight", halved(dweight, n), BACKWARD, 0);
    free(out), free(dweight);
}

static void test_rmsnorm(void) {
    static const char *const cases[] = {"rmsnorm.a", "rmsnorm.b"};
    for (int i = 0; i < 2; i++) {
        int shape[3];
        size_t n;
        const float *inp = part(cases[i], "inp", shape, &n),
                    *weight = part(cases[i], "weight", NULL, NULL);
        int N = shape[0], C = shape[1];
        float *got = random_floats(n, 1, 1), *rstd = random_floats(N, 1, 1);
        float *dweight = (float *)allocate(C, sizeof(float));
        rmsnorm_forward(got, rstd, inp, weight, N, C);
        against_dump("rmsnorm", cases[i], "out", got, FORWARD, 0);
        const float *dout = part(cases[i], "dout", NULL, NULL);
        for (int call = 0; call < 2; call++)
            rmsnorm_backward(got, dweight, dout, inp, weight, rstd, N, C);
        against_dump("rmsnorm", cases[i], "dinp", got, BACKWARD, 0);
        against_dump("rmsnorm", cases[i], "dweight", halved(dweight, C), BACKWARD, 0);
        free(got), free(rstd), free(dweight);
    }
}

static void test_rope(void) {
    static const char *const cases[] = {"rope.a", "rope.b"};
    for (int i = 0; i < 2; i++) {
        int shape[3], NH = *(const int *)part(cases[i], "heads", NULL, NULL);
        size_t n;
        const float *inp = part(cases[i], "inp", shape, &n);
        int B = shape[0], T = shape[1], C = shape[2] / 3, hs = C / NH;
        float *got = copy(inp, n), *table = random_floats((size_t)T * hs, 1, 1);
        rope_angles(table, T, hs);
        rope_forward(got, table, B, T, C, hs);
        against_dump("rope", cases[i], "out", got, FORWARD, 0);
        memcpy(got, part(cases[i], "dout", NULL, NULL), n * sizeof(float));
        rope_backward(got, table, B, T, C, hs);
        against_dump("rope", cases[i], "dinp", got, BACKWARD, 0);
        free(got), free(table);
    }
}

static void test_attention(void) {
    static const char *const cases[] = {"attention.a", "attention.b", "attention.c", "attention.d"};
    for (int i = 0; i < 4; i++) {
        int shape[3], NH = *(const int *)part(cases[i], "heads", NULL, NULL);
        size_t n;
        const float *qkv = part(cases[i], "qkv", shape, &n),
                    *dout = part(cases[i], "dout", NULL, NULL);
        int B = shape[0], T = shape[1], C = shape[2] / 3;
        float *out = random_floats(n / 3, 1, 1), *lse = random_floats((size_t)B * NH * T, 1, 1);
        float *dqkv = random_floats(n, 1, 1);
        attention_forward(out, lse, qkv, 0, B, T, C, NH);
        against_dump("attention", cases[i], "out", out, FORWARD, 0);
        attention_backward(dqkv, dout, out, lse, qkv, B, T, C, NH);
        against_dump("attention", cases[i], "dqkv", dqkv, BACKWARD, 0);
        free(out), free(lse), free(dqkv);
    }
}

static void test_swiglu(void) {
    int shape[3];
    size_t n;
    const float *inp = tensor("swiglu.inp", shape, &n);
    int N = shape[0], H = shape[1] / 2;
    float *got = random_floats(n, 1, 1);
    swiglu_forward(got, inp, N, H);
    against_dump("swiglu", "swiglu", "out", got, FORWARD, 0);
    swiglu_backward(got, tensor("swiglu.dout", NULL, NULL), inp, N, H);
    against_dump("swiglu", "swiglu", "dinp", got, BACKWARD, 0);
    free(got);
}

static void test_matmul(void) {
    static const char *const cases[] = {"matmul.a", "matmul.b"};
    for (int i = 0; i < 2; i++) {
        int shape[3], out_shape[3];
        const float *inp = part(cases[i], "inp", shape, NULL),
                    *weight = part(cases[i], "weight", NULL, NULL);
        const float *dout = part(cases[i], "dout", out_shape, NULL);
        int N = shape[0], C = shape[1], OC = out_shape[1];
        float *out = random_floats((size_t)N * OC, 1, 1),
              *dinp = random_floats((size_t)N * C, 1, 1);
        float *dweight = (float *)allocate((size_t)OC * C, sizeof(float));
        matmul_forward(out, inp, weight, N, C, OC);
        against_dump("matmul", cases[i], "out", out, FORWARD, 0);
        for (int call = 0; call < 2; call++)
            matmul_backward(dinp, dweight, dout, inp, weight, N, C, OC);
        against_dump("matmul", cases[i], "dinp", dinp, BACKWARD, 0);
        against_dump("matmul", cases[i], "dweight", halved(dweight, (size_t)OC * C), BACKWARD, 0);
        free(out), free(dinp), free(dweight);
    }
}

static void test_residual(void) {
    size_t n;
    const float *shortcut = tensor("residual.shortcut", NULL, &n),
                alpha = *tensor("residual.alpha", NULL, NULL);
    float *got = random_floats(n, 1, 1);
    residual_forward(got, shortcut, tensor("residual.branch", NULL, NULL), alpha, n);
    against_dump("residual", "residual", "out", got, FORWARD, 0);
    residual_backward(got, tensor("residual.dout", NULL, NULL), alpha, n);
    against_dump("residual", "residual", "dshortcut", got, BACKWARD, 0);
    free(got);
}

static void test_crossentropy(void) {
    int shape[3];
    size_t n;
    const float *inp = tensor("crossentropy.logits", shape, &n);
    float *logits = copy(inp, n);
    const int *targets = (const int *)tensor("crossentropy.targets", NULL, NULL);
    int N = shape[0], V = shape[1];
    float *losses = random_floats(N, 1, 1), *lse = random_floats(N, 1, 1);
    crossentropy_forward(losses, lse, logits, targets, N, V);
    crossentropy_backward(logits, lse, targets, 1.0f / N, N, V);
#ifdef CUDA_REAL
    if (sizeof(real) < sizeof(float)) {  // the dump's logits are large: rounding them matters
        float *expected = copy(inp, n), *cpu_losses = copy(losses, N);
        for (size_t i = 0; i < n; i++) expected[i] = (real)inp[i];
        cpu::crossentropy_forward(cpu_losses, lse, expected, targets, N, V);
        cpu::crossentropy_backward(expected, lse, targets, 1.0f / N, N, V);
        check_close("crossentropy_forward: losses", losses, cpu_losses, N, tolerances[FORWARD], 0);
        check_close("crossentropy_backward: dlogits", logits, expected, n, tolerances[BACKWARD], 0);
        free(logits), free(losses), free(lse), free(expected), free(cpu_losses);
        return;
    }
#endif
    against_dump("crossentropy", "crossentropy", "losses", losses, FORWARD, 0);
    against_dump("crossentropy", "crossentropy", "dlogits", logits, BACKWARD, 0);
    free(logits), free(losses), free(lse);
}

static void test_adamw(void) {
    size_t n;
    const float *start = tensor("adamw.param", NULL, &n);
    float *p = copy(start, n), hyper[5];
    float *m = (float *)allocate(n, sizeof(float)), *v = (float *)allocate(n, sizeof(float));
    static const char *const names[] = {"lr", "beta1", "beta2", "eps", "weight_decay"};
    for (int i = 0; i < 5; i++) hyper[i] = *part("adamw", names[i], NULL, NULL);
    for (int t = 1; t <= 3; t++) {
        char grad[8] = "grad1", param[8] = "param1";
        grad[4] = param[5] = (char)('0' + t);
        AdamW a = {hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], 1, t};
        adamw_update(p, part("adamw", grad, NULL, NULL), m, v, n, a);
        against_dump("adamw_update step", "adamw", param, p, FORWARD, 0);
    }
    against_dump("adamw_update after three steps,", "adamw", "m3", m, FORWARD, 0);
    against_dump("adamw_update after three steps,", "adamw", "v3", v, FORWARD, 0);
    free(p), free(m), free(v);
}

/* ------------------------------------------------------------------------------------------------
The networks
*/

// All logits of the last model_forward() (n,V). The caller frees them.
static float *all_logits(Model *m, int n) {
    size_t V = m->options->vocab_size;
    float *logits = (float *)allocate(n * V, sizeof(float));
    for (int i = 0; i < n; i++) memcpy(logits + i * V, model_logits(m, i), V * sizeof(float));
    return logits;
}

// Gives a network the weights of the dump; lns has norms of its own.
static void dump_weights(Model *m) {
    for (const Tensor *t = m->list.tensors; t < m->list.tensors + m->list.count; t++) {
        char name[100], key[110];
        snprintf(name, sizeof name, "weights.lns.%s", t->name);
        snprintf(key, sizeof key, "\"%s\"", name);
        if (m->options->norm != NORM_LNS || !strstr(dump_header, key))
            snprintf(name, sizeof name, "weights.%s", t->name);
        memcpy(m->parameters + t->offset, tensor(name, NULL, NULL), t->size * sizeof(float));
    }
    model_restore(m);
}

static void dump_options(Options *o, const char *scheme, const char *options) {
    char line[512];
    snprintf(line, sizeof line,
             "--norm %s %s --layers 4 --channels 16 --hidden 21 --heads 2 --seq-len 6 "
             "--vocab-size 19 --batch 2 --lr 0.01 --warmup 0 --steps 1000000000",
             scheme, options);
    options_from(o, line);
}

#ifdef CUDA_REAL
// bf16 rounds the weights of the dump to begin with, and that is no fault of the kernels. So there
// the reference is the network of train_gpas.c, which is itself checked against the dump, with the
// rounded weights. Rounding errors grow from layer to layer: the gradient as a whole must be within
// the tolerance, each tensor within a tenth, so that a mistake is named.
static void test_rounded_network(const char *scheme, const char *kind, const char *options) {
    enum { B = 2, T = 6, V = 19 };
    Options o;
    Model m;
    cpu::Options cpu_o;
    cpu::Model c;
    char of[64], name[200];
    double norms[4], gate_norm;
    float losses[10], cpu_losses[10], *scales = NULL;
    const int *tokens = (const int *)tensor("tokens", NULL, NULL);
    const int *targets = (const int *)tensor("targets", NULL, NULL);
    dump_options(&o, scheme, options), memcpy(&cpu_o, &o, sizeof o);
    model_create(&m, &o, B, 1), cpu::model_create(&c, &cpu_o, B, 1);
    dump_weights(&m);
    for (size_t i = 0; i < m.list.size; i++) m.parameters[i] = (real)m.parameters[i];
    model_restore(&m);
    memcpy(c.parameters, m.parameters, m.list.size * sizeof(float));
    snprintf(of, sizeof of, "net.%s.%s", scheme, kind);
    if (o.gpas) scales = (float *)part(of, "gate_scale", NULL, NULL);
    for (int t = 0; t < 10; t++) {
        zero_gradients(&m), cpu::zero_gradients(&c);
        losses[t] = (float)model_forward(&m, tokens, targets, B, T);
        cpu_losses[t] = (float)cpu::model_forward(&c, tokens, targets, B, T);
        float *logits = all_logits(&m, B * T);
        snprintf(name, sizeof name, "model_forward %s: logits", of);
        if (t == 0) check_close(name, logits, c.logits, B * T * V, tolerances[FORWARD], 0);
        free(logits);
        model_backward(&m, tokens, targets, B, T, 1.0 / (B * T));
        cpu::model_backward(&c, tokens, targets, B, T, 1.0 / (B * T));
        const float *gradients = t ? NULL : model_snapshot(&m).gradients;
        for (const Tensor *w = m.list.tensors; t == 0 && w < m.list.tensors + m.list.count; w++) {
            snprintf(name, sizeof name, "model_backward %s: grad.%s", of, w->name);
            check_close(name, gradients + w->offset, c.gradients + w->offset, w->size,
                        w->size == 1 ? tolerances[BACKWARD] : 0.1,
                        w->size == 1 ? scales[atoi(w->name + 7)] : 0);
        }
        snprintf(name, sizeof name, "model_backward %s: the whole gradient", of);
        if (t == 0)
            check_close(name, gradients, c.gradients, m.list.size, tolerances[BACKWARD], 0);
        double norm = gradient_norms(&m, norms, &gate_norm);
        model_update(&m, t, norm, gate_norm);
        norm = cpu::gradient_norms(&c, norms, &gate_norm);
        cpu::model_update(&c, t, norm, gate_norm);
    }
    snprintf(name, sizeof name, "model after ten updates, %s: losses", of);
    check_close(name, losses, cpu_losses, 10, tolerances[FORWARD], 0);
    model_free(&m), cpu::model_free(&c);
}
#endif

// One network of the dump: logits, loss, every gradient, ten steps of Adam.
static void test_network(const char *scheme, const char *kind, const char *options) {
    enum { B = 2, T = 6 };
    Options o;
    Model m;
    char of[64], name[100];
    float losses[10];
    double norms[4], gate_norm;
    const int *tokens = (const int *)tensor("tokens", NULL, NULL);
    const int *targets = (const int *)tensor("targets", NULL, NULL);
#ifdef CUDA_REAL
    if (sizeof(real) < sizeof(float)) return test_rounded_network(scheme, kind, options);
#endif
    snprintf(of, sizeof of, "net.%s.%s", scheme, kind);
    dump_options(&o, scheme, options);
    model_create(&m, &o, B, 1);
    dump_weights(&m);
    for (int t = 0; t < 10; t++) {
        zero_gradients(&m);
        losses[t] = (float)model_forward(&m, tokens, targets, B, T);
        float *logits = t ? NULL : all_logits(&m, B * T);
        if (t == 0) against_dump("model", of, "logits", logits, FORWARD, 0);
        model_backward(&m, tokens, targets, B, T, 1.0 / (B * T));
        const float *gradients = t ? NULL : model_snapshot(&m).gradients;
        for (const Tensor *w = m.list.tensors; t == 0 && w < m.list.tensors + m.list.count; w++) {
            int layer = 0;
            double scale = w->size == 1 && sscanf(w->name, "layers.%d", &layer) == 1
                               ? part(of, "gate_scale", NULL, NULL)[layer]
                               : 0;
            snprintf(name, sizeof name, "grad.%s", w->name);
            against_dump("model", of, name, gradients + w->offset, BACKWARD, scale);
        }
        free(logits);
        double norm = gradient_norms(&m, norms, &gate_norm);
        model_update(&m, t, norm, gate_norm);
    }
    against_dump("model", of, "loss", losses, FORWARD, 0);
    against_dump("model after ten updates,", of, "losses", losses, FORWARD, 0);
    model_free(&m);
}

static void test_networks(void) {
    for (int i = 0; i < 6; i++) {
        test_network(schemes[i], "base", "--gpas off");
        test_network(schemes[i], "gpas", "--gpas on");
    }
    test_network("pre", "nostop", "--gpas on --stop-grad off");
    test_network("post", "nostop", "--gpas on --stop-grad off");
    test_network("sandwich", "tanh", "--gpas on --gate-act tanh");
}

// The memory that a model holds, in arrays for the C program, in bytes for the CUDA program.
static size_t memory_of(const Model *m) {
#ifdef CUDA_REAL
    return m->bytes;
#else
    return m->arrays.bytes;
#endif
}

// --recompute saves memory and changes no bit of any gradient. A model without a backward pass has
// nothing left to save.
static void test_recompute(void) {
    enum { B = 2, T = 20 };
    int tokens[B * T + 1];
    for (int i = 0; i <= B * T; i++) tokens[i] = i * i % 31;
    for (int i = 0; i < 12; i++) {
        const char *gpas = i % 2 ? "--gate-init 0.3" : "--gpas off";
        char line[512], name[100];
        float *gradients[2];
        size_t memory[2], untrained[2], n = 0;
        for (int k = 0; k < 2; k++) {
            Options o;
            Model m;
            snprintf(line, sizeof line,
                     "--norm %s %s --recompute %s --layers 4 --channels 16 --hidden 24 --heads 2 "
                     "--seq-len 20 --vocab-size 31 --batch 2",
                     schemes[i / 2], gpas, k ? "on" : "off");
            options_from(&o, line);
            model_create(&m, &o, B, 1);
            model_forward(&m, tokens, tokens + 1, B, T);
            model_backward(&m, tokens, tokens + 1, B, T, 1.0 / (B * T));
            n = m.list.size;
            gradients[k] = copy(model_snapshot(&m).gradients, n);
            memory[k] = memory_of(&m);
            model_free(&m);
            model_create(&m, &o, B, 0);
            untrained[k] = memory_of(&m);
            model_free(&m);
        }
        snprintf(name, sizeof name, "recompute: %s %s, with less memory", schemes[i / 2], gpas);
        check(!memcmp(gradients[0], gradients[1], n * sizeof(float)) && memory[1] < memory[0],
              name, "other gradients, or not less memory: %zu, without it %zu", memory[1],
              memory[0]);
        snprintf(name, sizeof name, "recompute: %s %s, nothing kept without training",
                 schemes[i / 2], gpas);
        check(untrained[0] == untrained[1] && untrained[0] < memory[1], name,
              "memory %zu, with --recompute %zu, trained %zu", untrained[0], untrained[1],
              memory[1]);
        free(gradients[0]), free(gradients[1]);
    }
}

// A small network on tokens that occur but once each: it can learn them by heart.
static void test_learning(void) {
    static const int tokens[] = {3, 7, 1, 9, 4, 12, 8, 2, 5, 11, 6, 10, 0};
    for (int i = 0; i < 12; i++) {
        Options o;
        Model m;
        char line[512], name[100];
        double loss = 0, norms[4], gate_norm;
        snprintf(line, sizeof line,
                 "--norm %s --gpas %s --layers 4 --channels 32 --hidden 48 --heads 4 "
                 "--seq-len 12 --vocab-size 13 --batch 1 --lr 0.01 --warmup 20 --steps 200",
                 schemes[i / 2], i % 2 ? "on" : "off");
        options_from(&o, line);
        model_create(&m, &o, 1, 1);
        for (int t = 0; t <= 200; t++) {
            zero_gradients(&m);
            loss = model_forward(&m, tokens, tokens + 1, 1, 12);
            model_backward(&m, tokens, tokens + 1, 1, 12, 1.0 / 12);
            double norm = gradient_norms(&m, norms, &gate_norm);
            model_update(&m, t, norm, gate_norm);
        }
        snprintf(name, sizeof name, "learning: %s, gpas %s, is below 0.05 after 200 steps",
                 schemes[i / 2], i % 2 ? "on" : "off");
        check(loss < 0.05, name, "the loss is %.4f", loss);
        model_free(&m);
    }
}

// The initial values: their spread, and that gates of 0 change nothing.
static void test_initial_values(void) {
    Options o, base;
    Model m, b;
    int tokens[20];
    for (int i = 0; i < 20; i++) tokens[i] = i * 7 % 50;
    for (int i = 0; i < 6; i++) {
        char line[512], name[100];
        snprintf(line, sizeof line,
                 "--norm %s --layers 4 --channels 64 --hidden 96 --heads 4 --seq-len 20 "
                 "--vocab-size 50 --batch 1",
                 schemes[i]);
        options_from(&o, line);
        base = o, base.gpas = 0;
        model_create(&m, &o, 1, 0), model_create(&b, &base, 1, 0);
        model_forward(&m, tokens, NULL, 1, 20), model_forward(&b, tokens, NULL, 1, 20);
        snprintf(name, sizeof name,
                 "initial values: %s with gates of 0 is its baseline, bit for bit", schemes[i]);
        float *with = all_logits(&m, 20), *without = all_logits(&b, 20);
        check(memcmp(with, without, 20 * 50 * sizeof(float)) == 0, name, "the logits differ");
        free(with), free(without);
        int good = 1;
        for (const Tensor *t = m.list.tensors; t < m.list.tensors + m.list.count; t++) {
            double want = t == m.list.tensors ? sqrt(2.0 / 5) : 0.02, gain = pow(8 * 4, -0.25), mean = 0;
            int inner = strstr(t->name, "layers.") != NULL;
            if (i == NORM_DEEPNORM && inner && t->cols)
                want = sqrt(2.0 / (t->rows + t->cols)) *
                       (strstr(t->name, "wq") || strstr(t->name, "wk") ? 1 : gain);
            if (!t->cols) want = 0, mean = t->size > 1 ? 1 : 0;
            if (i == NORM_LNS && inner && t->size > 1 && !t->cols)
                mean = 1 / sqrt(atoi(t->name + 7) + 1.0);
            double spread =
                sqrt(dot(m.parameters + t->offset, m.parameters + t->offset, t->size) / t->size -
                     (t->cols ? 0 : mean * mean));
            if (!(t->cols ? fabs(spread / want - 1) <= 0.06
                          : fabs(m.parameters[t->offset] - mean) <= 1e-6)) {
                good = 0;
                snprintf(name, sizeof name, "initial values: %s, %s", schemes[i], t->name);
                check(0, name, "spread %.4f, expected %.4f", spread, want);
            }
        }
        snprintf(name, sizeof name, "initial values: %s has the spreads of the design", schemes[i]);
        check(good, name, "see above");
        model_free(&m), model_free(&b);
    }
}

// Gradients, update and loss are the same bits for 1, 2 and 3 threads.
static void test_threads(void) {
    enum { B = 3, T = 130 };
    int *tokens = (int *)allocate(B * T, sizeof(int)), most = omp_get_max_threads();
    for (int i = 0; i < B * T; i++) tokens[i] = i * i % 97;
    for (int i = 0; i < 6; i++) {
        double loss[3], norms[5], gate_norm;
        float *weights[3];
        size_t n = 0;
        char line[512], name[100];
        for (int k = 0; k < 3; k++) {
            Options o;
            Model m;
            omp_set_num_threads(k + 1);
            snprintf(line, sizeof line,
                     "--norm %s --gate-init 0.3 --layers 5 --channels 60 --hidden 77 --heads 6 "
                     "--seq-len %d --vocab-size 97 --batch %d --warmup 0",
                     schemes[i], T, B);
            options_from(&o, line);
            model_create(&m, &o, B, 1);
            loss[k] = model_forward(&m, tokens, tokens, B, T);
            model_backward(&m, tokens, tokens, B, T, 1.0 / (B * T));
            double norm = gradient_norms(&m, norms, &gate_norm);
            model_update(&m, 0, norm, gate_norm);
            n = 2 * m.list.size;
            weights[k] = (float *)allocate(n, sizeof(float));
            memcpy(weights[k], m.parameters, n / 2 * sizeof(float));
            memcpy(weights[k] + n / 2, m.gradients, n / 2 * sizeof(float));
            model_free(&m);
        }
        snprintf(name, sizeof name, "threads: %s gives the same bits with 1, 2 and 3", schemes[i]);
        check(loss[0] == loss[1] && loss[0] == loss[2] &&
                  !memcmp(weights[0], weights[1], n * sizeof(float)) &&
                  !memcmp(weights[0], weights[2], n * sizeof(float)),
              name, "losses %.9g %.9g %.9g", loss[0], loss[1], loss[2]);
        for (int k = 0; k < 3; k++) free(weights[k]);
    }
    omp_set_num_threads(most);
    free(tokens);
}

/* ------------------------------------------------------------------------------------------------
Shapes beyond the dump: blocks and tiles that are full, cut, or several
*/

static void test_gemm(void) {
    static const int shapes[][3] = {{1, 1, 1},       {12, 32, 8},  {13, 33, 17},
                                    {100, 70, 1100}, {5, 4100, 3}, {4090, 3, 5},
                                    {1, 64, 600},    {97, 1, 31},  {24, 64, 512}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int form = 0; form < 8; form++) {
            int M = shapes[i][0], N = shapes[i][1], K = shapes[i][2], accumulate = form / 4;
            size_t a_row = form & 1 ? 1 : K, a_k = form & 1 ? M : 1, b_column = form & 2 ? 1 : K;
            size_t b_k = form & 2 ? N : 1, ldc = N + 3;
            float *a = random_floats((size_t)M * K, 1, 1), *b = random_floats((size_t)K * N, 1, 2);
            float *c = random_floats(M * ldc, 1, 3), *expected = copy(c, M * ldc);
            char name[100];
            for (int r = 0; r < M; r++)
                for (int j = 0; j < N; j++) {
                    double sum = accumulate ? c[r * ldc + j] : 0;
                    for (int k = 0; k < K; k++)
                        sum += (double)a[r * a_row + k * a_k] * b[j * b_column + k * b_k];
                    expected[r * ldc + j] = (float)sum;
                }
            Matrix ma = {a, a_row, a_k}, mb = {b, b_k, b_column};
            gemm(c, ldc, ma, mb, M, N, K, accumulate);
            snprintf(name, sizeof name, "gemm: %d x %d, depth %d, A%s B%s%s", M, N, K,
                     form & 1 ? "^T" : "", form & 2 ? "" : "^T", accumulate ? ", added to C" : "");
            check_close(name, c, expected, M * ldc, 1e-5, 0);
            free(a), free(b), free(c), free(expected);
        }
}

// Attention over several blocks of keys against its definition, in double.
static void test_long_attention(void) {
    enum { B = 1, T = 600, C = 8, NH = 2, hs = C / NH };
    float *qkv = random_floats((size_t)B * T * 3 * C, 2, 5), *out = random_floats(B * T * C, 1, 1);
    float *expected = random_floats(B * T * C, 1, 1), *lse = random_floats(NH * T, 1, 1);
    static double p[T];
    qkv[20 * 3 * C + C] = 60; // one key that stands out: a sum corrected by a large factor
    for (int h = 0; h < NH; h++)
        for (int t = 0; t < T; t++) {
            double sum = 0, largest = -1e30;
            for (int s = 0; s <= t; s++) {
                p[s] = 0;
                for (int c = 0; c < hs; c++)
                    p[s] += (double)qkv[t * 3 * C + h * hs + c] * qkv[s * 3 * C + C + h * hs + c] /
                            sqrt((double)hs);
                if (p[s] > largest) largest = p[s];
            }
            for (int s = 0; s <= t; s++) sum += p[s] = exp(p[s] - largest);
            for (int c = 0; c < hs; c++) {
                double o = 0;
                for (int s = 0; s <= t; s++) o += p[s] / sum * qkv[s * 3 * C + 2 * C + h * hs + c];
                expected[t * C + h * hs + c] = (float)o;
            }
        }
    attention_forward(out, lse, qkv, 0, B, T, C, NH);
    check_close("attention_forward: 600 positions, in blocks", out, expected, B * T * C,
                tolerances[FORWARD], 0);
    free(qkv), free(out), free(expected), free(lse);
}

// Heads wider than a panel and no multiple of one, several blocks, two sequences: both passes
// against their definition, in double.
static void test_wide_attention(void) {
    enum { B = 2, T = 290, NH = 2, hs = 70, C = NH * hs, ROW = 3 * C };
    size_t n = (size_t)B * T * C;
    float *qkv = random_floats(3 * n, 0.7, 5), *dout = random_floats(n, 1, 6);
    float *out = random_floats(n, 1, 1), *lse = random_floats(B * NH * T, 1, 1);
    float *dqkv = random_floats(3 * n, 1, 1);
    double *want = (double *)allocate(n, sizeof(double)), scale = 1 / sqrt((double)hs), p[T], dp[T];
    double *dwant = (double *)allocate(3 * n, sizeof(double));
    for (int head = 0; head < B * NH; head++)
        for (int t = 0; t < T; t++) {
            size_t begin = head / NH * T, at = (begin + t) * C + head % NH * hs;
            const float *q = qkv + (begin + t) * ROW + head % NH * hs, *dy = dout + at;
            double *dq = dwant + (begin + t) * ROW + head % NH * hs, sum = 0, delta = 0;
            for (int s = 0; s <= t; s++) {
                const float *k = qkv + (begin + s) * ROW + C + head % NH * hs;
                p[s] = dp[s] = 0;
                for (int c = 0; c < hs; c++)
                    p[s] += scale * q[c] * k[c], dp[s] += (double)dy[c] * k[C + c];
                sum += p[s] = exp(p[s]);
            }
            for (int s = 0; s <= t; s++) delta += (p[s] /= sum) * dp[s];
            for (int s = 0; s <= t; s++) {
                const float *k = qkv + (begin + s) * ROW + C + head % NH * hs;
                double *dk = dwant + (begin + s) * ROW + C + head % NH * hs;
                double ds = scale * p[s] * (dp[s] - delta);
                for (int c = 0; c < hs; c++) {
                    want[at + c] += p[s] * k[C + c], dq[c] += ds * k[c];
                    dk[c] += ds * q[c], dk[C + c] += p[s] * dy[c];
                }
            }
        }
    attention_forward(out, lse, qkv, 0, B, T, C, NH);
    attention_backward(dqkv, dout, out, lse, qkv, B, T, C, NH);
    float *expected = (float *)allocate(3 * n, sizeof(float));
    for (size_t i = 0; i < n; i++) expected[i] = (float)want[i];
    check_close("attention_forward: heads of 70 channels", out, expected, n, 1e-5, 0);
    for (size_t i = 0; i < 3 * n; i++) expected[i] = (float)dwant[i];
    check_close("attention_backward: heads of 70 channels", dqkv, expected, 3 * n, 1e-4, 0);
    free(qkv), free(dout), free(out), free(lse), free(dqkv), free(want), free(dwant);
    free(expected);
}

// Products that several threads share, with more than one block in each direction: the same bits.
static void test_gemm_threads(void) {
    enum { M = 301, N = 4200, K = 800 };
    float *a = random_floats((size_t)M * K, 1, 1), *b = random_floats((size_t)N * K, 1, 2);
    float *c[4];
    int most = omp_get_max_threads();
    for (int threads = 1; threads <= 4; threads++) {
        float *out = c[threads - 1] = random_floats((size_t)M * N, 1, 3);
        omp_set_num_threads(threads);
        gemm(out, N, matrix(a, K), transpose(matrix(b, K)), M, N, K, 0);
        gemm(out, N, transpose(matrix(a, M)), matrix(b, N), M, N, K, 1);
        free_packing_space(); // each thread's, while there are so many
    }
    omp_set_num_threads(most);
    for (int i = 1; i < 4; i++) {
        char name[100];
        snprintf(name, sizeof name, "gemm: %d threads give the bits of one", i + 1);
        check(memcmp(c[0], c[i], (size_t)M * N * sizeof(float)) == 0, name, "they do not");
    }
    for (int i = 0; i < 4; i++) free(c[i]);
    free(a), free(b);
}

static void test_exp(void) {
    double worst = 0;
    for (int i = -86000; i <= 87000; i++) {
        float x = i * 1e-3f;
        double error = fabs(exp_fast(x) / exp((double)x) - 1);
        if (!(error <= worst)) worst = error;  // nan too
        if (isnan(worst)) break;
    }
    check(worst < 3e-7, "exp_fast: relative error below 3e-7 from -86 to 87", "it is %.2e", worst);
    check(exp_fast(0) == 1 && exp_fast(-1e30f) < 1e-37f && isnan(exp_fast(NAN)),
          "exp_fast: 0, far below 0, nan", "%g %g %g", exp_fast(0), exp_fast(-1e30f),
          exp_fast(NAN));
}

/* ------------------------------------------------------------------------------------------------
Learning rate, clipping, accumulation
*/

static void test_training_rules(void) {
    Options o;
    Model m;
    double norms[2], gate_norm;
    int tokens[32], B = 4, T = 8;
    for (int i = 0; i < 32; i++) tokens[i] = i * 5 % 17;
    options_from(
        &o,
        "--layers 2 --channels 8 --hidden 12 --heads 2 --seq-len 8 --vocab-size 17 --batch 4 "
        "--gate-init 0.5 --steps 100 --warmup 10 --lr 0.5 --grad-clip 0.01 --gate-clip 0.000001");
    check(fabs(learning_rate(&o, 0) - 0.05) < 1e-12 && fabs(learning_rate(&o, 9) - 0.5) < 1e-12,
          "learning_rate: warms up from lr/warmup to lr", "%g, %g", learning_rate(&o, 0),
          learning_rate(&o, 9));
    check(fabs(learning_rate(&o, 55) - 0.275) < 1e-9 && fabs(learning_rate(&o, 100) - 0.05) < 1e-9,
          "learning_rate: a cosine down to a tenth", "%g, %g", learning_rate(&o, 55),
          learning_rate(&o, 100));
    model_create(&m, &o, 4, 1);
    model_forward(&m, tokens, tokens, B, T);
    model_backward(&m, tokens, tokens, B, T, 1.0 / (B * T));
    float *whole = copy(model_snapshot(&m).gradients, m.list.size);
    zero_gradients(&m);
    for (int half = 0; half < 2; half++) {
        model_forward(&m, tokens + half * 16, tokens + half * 16, 2, T);
        model_backward(&m, tokens + half * 16, tokens + half * 16, 2, T, 1.0 / (B * T));
    }
    check_close("model_backward: two micro-batches give the gradient of the batch",
                model_snapshot(&m).gradients, whole, m.list.size, tolerances[FORWARD], 0);
    double norm = gradient_norms(&m, norms, &gate_norm), square = 0, gates = 0;
    for (size_t i = 0; i < m.list.size; i++) square += (double)m.gradients[i] * m.gradients[i];
    for (const Tensor *t = m.list.tensors; t < m.list.tensors + m.list.count; t++)
        if (t->size == 1) gates += (double)m.gradients[t->offset] * m.gradients[t->offset];
    check(fabs(norm / sqrt(square) - 1) < 1e-6 && fabs(gate_norm / sqrt(gates) - 1) < 1e-6,
          "gradient_norms: of the whole and of the gates", "%g, %g", norm, gate_norm);
    model_update(&m, 0, norm, gate_norm); // Adam's m is now a tenth of the clipped gradient
    model_snapshot(&m);
    square = gates = 0;
    for (size_t i = 0; i < m.list.size; i++) square += 100.0 * m.adam_m[i] * m.adam_m[i];
    for (const Tensor *t = m.list.tensors; t < m.list.tensors + m.list.count; t++)
        if (t->size == 1) gates += 100.0 * m.adam_m[t->offset] * m.adam_m[t->offset];
    check(norm > 0.01 && sqrt(square) < 0.01001 && sqrt(square) > 0.0099,
          "model_update: --grad-clip limits the whole gradient", "its norm is %g", sqrt(square));
    check(gate_norm * 0.01 / norm > 0.000001 && fabs(sqrt(gates) / 0.000001 - 1) < 1e-4,
          "model_update: --gate-clip then limits the gates' gradient", "its norm is %g, was %g",
          sqrt(gates), gate_norm * 0.01 / norm);
    free(whole);
    model_free(&m);
}

/* ------------------------------------------------------------------------------------------------
Files
*/

static char folder[64] = "/tmp/test_gpas_XXXXXX";

static const char *in_folder(const char *name) {
    static char path[4][200];
    static int turn;
    char *p = path[turn++ % 4];
    snprintf(p, sizeof path[0], "%s/%s", folder, name);
    return p;
}

static void write_file(const char *name, const void *data, size_t size) {
    FILE *file = fopen(in_folder(name), "wb");
    if (!file || fwrite(data, 1, size, file) != size || fclose(file))
        die("cannot write %s", in_folder(name));
}

static char *whole_file(const char *name, size_t *size) {
    FILE *file = fopen(in_folder(name), "rb");
    if (!file) die("the test misses %s", in_folder(name));
    fseek(file, 0, SEEK_END);
    *size = ftell(file);
    rewind(file);
    char *text = (char *)allocate(*size + 1, 1);
    if (fread(text, 1, *size, file) != *size) die("cannot read %s", in_folder(name));
    fclose(file);
    return text;
}

/* ------------------------------------------------------------------------------------------------
--check-finite, and sizes beyond 2^31
*/
#if !defined(CUDA_REAL)

// The first number of a parameter, or of something else that the passes of model m read. n: the
// numbers of two such matrices, so that wq stands for wq and wk, w1 for w1 and w3.
static float *spot(Model *m, const char *name, size_t *n) {
    const struct { const char *name; float *x; } others[] = {
        {"logits_lse", m->logits_lse}, {"final_rstd", m->final_rstd}, {"gradient", m->gradients},
        {"adam_m", m->adam_m}, {"rope_table", m->rope_table}, {"lse", m->activations[2].lse},
        {"pre_act", m->activations[3].pre_act}, {"rstd", m->activations[3].rstd},
        {"post_rstd", m->activations[3].post_rstd}};
    *n = 1;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (strcmp(others[i].name, name) == 0) return others[i].x;
    for (const Tensor *t = m->list.tensors; t < m->list.tensors + m->list.count; t++)
        if (strcmp(t->name, name) == 0) return *n = 2 * t->size, m->parameters + t->offset;
    die("the test knows no %s", name);
}

// LeakSanitizer cannot look at a forked process.
static void leave_at_once(void) {
    fflush(stderr);
    _exit(1);
}

// Spoils one number, or with `fill` sets all of two, and makes a pass ('f'orward, 'b'ackward
// after a forward pass that was in order, 'u'pdate): the operation must be named.
static const struct {
    char pass;
    const char *options, *name;
    float fill;
    const char *words;
} not_finite[] = {
    {'f', "", "tok_embeddings.weight", 0, "that embedding_forward computed"},
    {'f', "", "layers.0.attention_norm.weight", 0, "rmsnorm_forward of layer 1, attention"},
    {'f', "", "layers.0.attention.wk.weight", 0, "matmul_forward (wq, wk, wv) or rope_forward of layer 1"},
    {'f', "", "rope_table", 0, "matmul_forward (wq, wk, wv) or rope_forward of layer 1"},
    {'f', "", "layers.0.attention.wq.weight", 1e30f, "attention_forward of layer 1"},
    {'f', "", "layers.1.attention.wo.weight", 0, "matmul_forward (wo) of layer 2, attention"},
    {'f', "--norm sandwich", "layers.0.attention_post_norm.weight", 0, "rmsnorm_forward (N') of layer 1, attention"},
    {'f', "--norm deepnorm", "tok_embeddings.weight", 3e38f, "residual_forward of layer 1"},
    {'f', "", "layers.1.gate", 0, "gpas_forward of layer 2, attention"},
    {'f', "--norm post", "layers.1.gate", 0, "gpas_forward of layer 2, attention"},
    {'f', "--norm post", "layers.0.ffn_norm.weight", 0, "rmsnorm_forward of layer 1, feed"},
    {'f', "", "layers.0.feed_forward.w3.weight", 0, "matmul_forward (w1, w3) of layer 1, feed"},
    {'f', "", "layers.0.feed_forward.w1.weight", 1e30f, "swiglu_forward of layer 1"},
    {'f', "", "layers.1.feed_forward.w2.weight", 0, "matmul_forward (w2) of layer 2, feed"},
    {'f', "", "norm.weight", 0, "that rmsnorm_forward (final) computed"},
    {'f', "", "output.weight", 0, "that matmul_forward (output) computed"},
    {'b', "", "logits_lse", 0, "that crossentropy_backward computed"},
    {'b', "", "output.weight", 0, "that matmul_backward (output) computed"},
    {'b', "", "final_rstd", 0, "that rmsnorm_backward (final) computed"},
    {'b', "--stop-grad off", "layers.1.gate", 0, "gpas_backward of layer 2, feed-forward"},
    {'b', "--norm sandwich", "post_rstd", 0, "rmsnorm_backward (N') of layer 2, feed"},
    {'b', "", "layers.1.feed_forward.w2.weight", 0, "matmul_backward (wo or w2) of layer 2, feed"},
    {'b', "", "pre_act", 0, "swiglu_backward of layer 2, feed-forward"},
    {'b', "", "layers.1.feed_forward.w1.weight", 0, "matmul_backward (wqkv or w13) of layer 2, feed"},
    {'b', "", "rstd", 0, "rmsnorm_backward of layer 2, feed-forward"},
    {'b', "", "layers.0.attention.wo.weight", 0, "matmul_backward (wo or w2) of layer 1, attention"},
    {'b', "", "lse", 0, "attention_backward or rope_backward of layer 2"},
    {'b', "", "rope_table", 0, "attention_backward or rope_backward of layer 2"},
    {'b', "", "layers.0.attention.wv.weight", 0, "matmul_backward (wqkv or w13) of layer 1"},
    {'b', "--norm post", "rstd", 0, "rmsnorm_backward of layer 2, feed-forward"},
    {'b', "--norm post --stop-grad off", "layers.0.gate", 0, "gpas_backward of layer 1, feed"},
    {'b', "", "gradient", 0, "the backward pass for tok_embeddings.weight computed"},
    {'u', "", "adam_m", 0, "that adamw_update computed"},
};

static void test_check_finite(void) {
    static const int text[13] = {3, 7, 0, 9, 4, 2, 8, 3, 5, 10, 6, 10, 0};
    for (size_t i = 0; i < sizeof not_finite / sizeof *not_finite; i++) {
        Options o;
        Model m;
        char line[300], name[300], errors[2000] = "";
        size_t n, size;
        snprintf(line, sizeof line, "--layers 2 --channels 8 --hidden 12 --heads 2 --seq-len 6 "
                 "--batch 2 --vocab-size 11 --check-finite on %s", not_finite[i].options);
        options_from(&o, line);
        model_create(&m, &o, 2, 1);
        model_forward(&m, text, text + 1, 2, 6);
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {  // threads do not survive a fork
            omp_set_num_threads(1), atexit(leave_at_once);
            if (!freopen(in_folder("errors"), "w", stderr)) _exit(2);
            float *x = spot(&m, not_finite[i].name, &n);
            if (not_finite[i].fill == 0) *x = NAN;
            for (size_t k = 0; k < n && not_finite[i].fill != 0; k++) x[k] = not_finite[i].fill;
            if (strstr(not_finite[i].options, "deepnorm"))  // the branch shall be 0
                memset(spot(&m, "layers.0.attention.wq.weight", &n), 0, 4 * 64 * sizeof(float));
            if (not_finite[i].pass == 'f') model_forward(&m, text, text + 1, 2, 6);
            if (not_finite[i].pass == 'b') model_backward(&m, text, text + 1, 2, 6, 1.0 / 12);
            if (not_finite[i].pass == 'u') model_update(&m, 0, 1, 1);
            _exit(0);
        }
        int status = -1;
        waitpid(child, &status, 0);
        char *said = whole_file("errors", &size);
        snprintf(errors, sizeof errors, "%s", said);
        snprintf(name, sizeof name, "check-finite: %s", not_finite[i].words);
        check(WIFEXITED(status) && WEXITSTATUS(status) == 1 && strstr(errors, not_finite[i].words),
              name, "status %d, %s", status, errors);
        free(said), model_free(&m);
    }
}

// Room for n floats of which only those that are touched take memory.
static float *far_floats(size_t n) {
    void *p = mmap(NULL, n * sizeof(float), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) die("the test cannot map %zu floats", n);
    return (float *)p;
}

// Where the last numbers of arrays of over 2^31 lie.
static void test_large_sizes(void) {
    Options o;
    Model m;
    Config config;
    memset(&m, 0, sizeof m);
    options_from(&o, "--vocab-size 32000");
    apply_preset(&o, 5);
    config = config_of(&o);
    m.list = tensor_list(&config);
    size_t C = 2048, H = 5461, V = 32000, layer = 4 * C * C + 3 * C * H + 2 * C + 1;
    check(m.list.size == 2 * V * C + 24 * layer + C, "sizes: parameters of the preset 1b",
          "%zu", m.list.size);
    free(m.list.tensors);
    memset(&m, 0, sizeof m);
    o.norm = NORM_SANDWICH, o.layers = 30, o.channels = 65536, o.hidden = 262144;
    o.vocab_size = 65536;
    m.config = config_of(&o);
    m.list = tensor_list(&m.config);
    float *base = far_floats(16);  // only differences of pointers are looked at
    int good = 1;
    for (int l = 0; l < 30; l++) {
        const Tensor *t = &m.list.tensors[1 + 12 * l];
        LayerParameters w = layer_parameters(&m, base, l);
        good = good && w.wqkv == base + t[0].offset && w.wo == base + t[3].offset &&
               w.w13 == base + t[4].offset && w.w2 == base + t[6].offset &&
               w.norm[0] == base + t[7].offset && w.post_norm[1] == base + t[10].offset &&
               w.gate == base + t[11].offset;
    }
    C = 65536, H = 262144;
    check(good && m.list.size == 2 * C * C + 30 * (4 * C * C + 3 * C * H + 4 * C + 1) + C,
          "sizes: layers lie where their tensors do, 2 T parameters", "%zu", m.list.size);
    m.logits = base;
    check(model_logits(&m, 1 << 24) == base + ((size_t)65536 << 24), "sizes: row 2^24 of logits",
          "%td", model_logits(&m, 1 << 24) - base);
    free(m.list.tensors), munmap(base, 16 * sizeof(float));
    int last = 65535;
    float *table = far_floats(C * C), *end = table + C * C - C, row[65536], *out = row;
    for (size_t c = 0; c < C; c++) end[c] = (float)c;
    embedding_forward(out, &last, table, 1, 65536);
    check(memcmp(row, end, sizeof row) == 0, "sizes: the last row of a table of 2^32", "%g",
          row[9]);
    embedding_backward(table, out, &last, 1, 65536);
    check(end[9] == 18 && end[65535] == 2 * 65535, "sizes: and its gradient", "%g", end[9]);
    munmap(table, C * C * sizeof(float));
    // A (25,5) and the result (25,70) with rows 2^28 apart, B (5,70) with columns 2^26 apart.
    size_t far = (size_t)1 << 28, near = far / 4;
    float *c = far_floats(25 * far), *a = c + 128, *b = c + 256;
    for (int k = 0; k < 5; k++) {
        for (int i = 0; i < 25; i++) a[i * far + k] = (float)(i + k);
        for (int j = 0; j < 70; j++) b[j * near + k] = (float)(j - k);
    }
    gemm(c, far, matrix(a, far), transpose(matrix(b, near)), 25, 70, 5, 0);
    good = 1;
    for (int i = 0; i < 25; i++)
        for (int j = 0; j < 70; j++) {
            float sum = 0;
            for (int k = 0; k < 5; k++) sum += (float)((i + k) * (j - k));
            good = good && c[i * far + j] == sum;
        }
    check(good, "sizes: a product of matrices whose rows lie 2^28 apart", "%g", c[24 * far + 69]);
    munmap(c, 25 * far * sizeof(float));
}
#endif

static pid_t owner;  // of the folder; a child that ends leaves it alone

static void remove_folder(void) {
    if (getpid() != owner) return;
    char command[100];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    if (system(command)) printf("%s is left behind\n", folder);
}


#ifdef CUDA_REAL
/* ------------------------------------------------------------------------------------------------
train_gpas.cu against train_gpas.c: shapes with several tiles, full, cut and odd
*/

// Compares what a kernel gave (n) with what train_gpas.c gives.
static void against_cpu(const char *what, const char *shape, const float *got,
                        const float *expected, size_t n, int pass) {
    char name[200];
    snprintf(name, sizeof name, "%s, %s, against the CPU's", what, shape);
    check_close(name, got, expected, n, tolerances[pass], 0);
}

static void test_attention_tiles(void) {
    static const int shapes[][4] = {{2, 64, 32, 1}, {1, 150, 96, 2}, {1, 130, 60, 2},
                                    {1, 100, 256, 2}, {1, 33, 20, 2}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        int B = shapes[i][0], T = shapes[i][1], C = shapes[i][2], NH = shapes[i][3];
        size_t n = (size_t)B * T * C, rows = (size_t)B * T * NH;
        float *qkv = random_floats(3 * n, 2, 5), *dout = random_floats(n, 1, 6);
        float *out = random_floats(n, 1, 1), *lse = random_floats(rows, 1, 1);
        float *cpu_out = random_floats(n, 1, 1), *cpu_lse = random_floats(rows, 1, 1);
        float *dqkv = random_floats(3 * n, 1, 1), *cpu_dqkv = random_floats(3 * n, 1, 1);
        char shape[64];
        snprintf(shape, sizeof shape, "T %d, head of %d", T, C / NH);
        attention_forward(out, lse, qkv, 0, B, T, C, NH);
        cpu::attention_forward(cpu_out, cpu_lse, qkv, B, T, C, NH);
        against_cpu("attention_forward", shape, out, cpu_out, n, FORWARD);
        against_cpu("attention_forward: lse", shape, lse, cpu_lse, rows, FORWARD);
        attention_backward(dqkv, dout, cpu_out, cpu_lse, qkv, B, T, C, NH);
        cpu::attention_backward(cpu_dqkv, dout, cpu_out, cpu_lse, qkv, B, T, C, NH);
        against_cpu("attention_backward", shape, dqkv, cpu_dqkv, 3 * n, BACKWARD);
        free(qkv), free(dout), free(out), free(lse), free(cpu_out), free(cpu_lse);
        free(dqkv), free(cpu_dqkv);
    }
}

static void test_row_tiles(void) {
    static const int shapes[][2] = {{70, 8}, {3, 1000}, {2, 2056}, {5, 301}, {2100, 4}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        int N = shapes[i][0], C = shapes[i][1], *tokens = (int *)allocate(N, sizeof(int));
        size_t n = (size_t)N * C;
        float *x = random_floats(2 * n, 1, 1), *dy = random_floats(n, 1, 2);
        float *w = random_floats(C, 1, 3), *r = random_floats(N, 1, 4), *cpu_r = copy(r, N);
        float *y = random_floats(2 * n, 1, 5), *cpu_y = random_floats(2 * n, 1, 5);
        float *dw = random_floats(7 * C, 1, 6), *cpu_dw = copy(dw, 7 * C);
        char shape[64];
        snprintf(shape, sizeof shape, "%d x %d", N, C);
        rmsnorm_forward(y, r, x, w, N, C), cpu::rmsnorm_forward(cpu_y, cpu_r, x, w, N, C);
        against_cpu("rmsnorm_forward", shape, y, cpu_y, n, FORWARD);
        rmsnorm_backward(y, dw, dy, x, w, cpu_r, N, C);
        cpu::rmsnorm_backward(cpu_y, cpu_dw, dy, x, w, cpu_r, N, C);
        against_cpu("rmsnorm_backward: dinp", shape, y, cpu_y, n, BACKWARD);
        against_cpu("rmsnorm_backward: dweight", shape, dw, cpu_dw, C, BACKWARD);
        swiglu_forward(y, x, N, C), cpu::swiglu_forward(cpu_y, x, N, C);
        against_cpu("swiglu_forward", shape, y, cpu_y, n, FORWARD);
        swiglu_backward(y, dy, x, N, C), cpu::swiglu_backward(cpu_y, dy, x, N, C);
        against_cpu("swiglu_backward", shape, y, cpu_y, 2 * n, BACKWARD);
        for (int k = 0; k < N; k++) tokens[k] = k < 40 ? 2 : k * k % 7;  // one token many times
        embedding_backward(dw, dy, tokens, N, C);
        cpu::embedding_backward(cpu_dw, dy, tokens, N, C);
        against_cpu("embedding_backward", shape, dw, cpu_dw, 3 * C, BACKWARD);
        free(tokens), free(x), free(dy), free(w), free(r), free(cpu_r), free(y), free(cpu_y);
        free(dw), free(cpu_dw);
    }
}

static void test_crossentropy_tiles(void) {
    static const int widths[] = {259, 5000, 8};
    for (int i = 0; i < 3; i++) {
        int N = 5, V = widths[i], targets[] = {0, V - 1, 3, V / 2, 7};
        size_t n = (size_t)N * V;
        float *x = random_floats(n, 4, 1), *cpu_x = copy(x, n), losses[5], lse[5], cpu_losses[5];
        float cpu_lse[5];
        char shape[64];
        snprintf(shape, sizeof shape, "V %d", V);
        memset(losses, 0, sizeof losses), memset(lse, 0, sizeof lse);
        x[n - 3] = cpu_x[n - 3] = 40;  // one that stands out
        crossentropy_forward(losses, lse, x, targets, N, V);
        cpu::crossentropy_forward(cpu_losses, cpu_lse, cpu_x, targets, N, V);
        against_cpu("crossentropy_forward", shape, losses, cpu_losses, N, FORWARD);
        crossentropy_backward(x, cpu_lse, targets, 0.2f, N, V);
        cpu::crossentropy_backward(cpu_x, cpu_lse, targets, 0.2f, N, V);
        against_cpu("crossentropy_backward", shape, x, cpu_x, n, BACKWARD);
        free(x), free(cpu_x);
    }
}

// Residual sum, GPAS and RMSNorm in one kernel against the three of train_gpas.c in a row.
static void test_fused(int norm_last, int stop_grad) {
    enum { N = 9, C = 72, n = N * C };
    float alpha = norm_last ? 1.7f : 1, gate = 0.6f, dgate = 0.3f, cpu_dgate = 0.3f;
    float *inp = random_floats(n, 1, 1), *branch = random_floats(n, 1, 2);
    float *w = random_floats(C, 1, 3);
    float *down = random_floats(n, 1, 4), *into = random_floats(n, 1, 5);
    float *sum = random_floats(n, 1, 6), *out = random_floats(n, 1, 6), *normed = copy(sum, n);
    float *s = copy(sum, n), *o = copy(sum, n), *y = copy(sum, n), *scaled = copy(sum, n);
    float *dsum = copy(sum, n), *dx = copy(sum, n), *dw = random_floats(C, 1, 7), *e = copy(dw, C);
    float rstd[N] = {0}, r[N];
    char shape[100];
    snprintf(shape, sizeof shape, "norm %s, stop-gradient %s", norm_last ? "last" : "first",
             stop_grad ? "on" : "off");
    // train_gpas.c
    int act = GATE_SILU;
    if (norm_last) {
        cpu::gpas_forward(scaled, inp, gate, act, n);
        cpu::residual_forward(s, scaled, branch, alpha, n);
        memcpy(o, s, n * sizeof *o);
    } else {
        cpu::residual_forward(s, inp, branch, 1, n);
        cpu::gpas_forward(o, s, gate, act, n);
    }
    cpu::rmsnorm_forward(y, r, o, w, N, C);
    { // train_gpas.cu
        OnGpu<real> gs(sum, n), go(out, n), gy(normed, n), gi((const float *)inp, n);
        OnGpu<real> gb((const float *)branch, n);
        OnGpu<float> gr(rstd, N), gw((const float *)w, C), gg((const float *)&gate, 1);
        Gpas g = {gg.p, act, stop_grad, norm_last, alpha};
        residual_gpas_rmsnorm_forward<real>(gs.p, go.p, gy.p, gr.p, gi.p, gb.p, gw.p, g, N, C);
    }
    against_cpu("residual_gpas_rmsnorm_forward: sum", shape, sum, s, n, FORWARD);
    against_cpu("residual_gpas_rmsnorm_forward: out", shape, out, o, n, FORWARD);
    against_cpu("residual_gpas_rmsnorm_forward: normed", shape, normed, y, n, FORWARD);
    against_cpu("residual_gpas_rmsnorm_forward: rstd", shape, rstd, r, N, FORWARD);
    { // train_gpas.cu
        OnGpu<real> gs(dsum, n), gx(dx, n), gd((const float *)down, n), gn((const float *)into, n);
        OnGpu<real> go((const float *)o, n), scale((const float *)(norm_last ? inp : s), n);
        OnGpu<float> gr((const float *)r, N), gw((const float *)w, C), gg((const float *)&gate, 1);
        OnGpu<float> gdw(dw, C), gdg(&dgate, 1);
        Scratch<float> partial(ROW_BLOCKS * (C + 1));
        Gpas g = {gg.p, act, stop_grad, norm_last, alpha};
        residual_gpas_rmsnorm_backward<real>(gs.p, norm_last ? gx.p : NULL, gdw.p, gdg.p, partial.p,
                                             gd.p, gn.p, go.p, gr.p, gw.p, scale.p, g, N, C);
    }
    // train_gpas.c: y is now the gradient of out, then of sum; o that of inp
    float *before = copy(into, n);
    for (int i = 0; i < n && norm_last; i++) before[i] += down[i];
    cpu::rmsnorm_backward(y, e, before, o, w, r, N, C);
    for (int i = 0; i < n && !norm_last; i++) y[i] += down[i];
    if (norm_last) {
        cpu::residual_backward(o, y, alpha, n);
        cpu::gpas_backward(o, &cpu_dgate, o, inp, gate, act, stop_grad, n);
        against_cpu("residual_gpas_rmsnorm_backward: dinp", shape, dx, o, n, BACKWARD);
    } else
        cpu::gpas_backward(y, &cpu_dgate, y, s, gate, act, stop_grad, n);
    against_cpu("residual_gpas_rmsnorm_backward: dsum", shape, dsum, y, n, BACKWARD);
    against_cpu("residual_gpas_rmsnorm_backward: dweight", shape, dw, e, C, BACKWARD);
    against_cpu("residual_gpas_rmsnorm_backward: dgate", shape, &dgate, &cpu_dgate, 1, BACKWARD);
    free(inp), free(branch), free(w), free(down), free(into), free(sum), free(out), free(normed);
    free(s), free(o), free(y), free(scaled), free(dsum), free(dx), free(dw), free(e), free(before);
}

// Loss and gradients of a network whose C is no multiple of 16 bytes and whose rows fill tiles,
// against the same network of train_gpas.c.
static void test_odd_networks(void) {
    enum { B = 2, T = 70 };
    int tokens[B * T + 1];
    for (int i = 0; i <= B * T; i++) tokens[i] = i * i % 61;
    for (int i = 0; i < 6; i++) {
        Options o;
        Model m;
        cpu::Options cpu_o;
        cpu::Model c;
        char line[512], name[100];
        snprintf(line, sizeof line,
                 "--norm %s --gate-init 0.3 --layers 4 --channels 36 --hidden 50 --heads 2 "
                 "--seq-len %d --vocab-size 61 --batch %d", schemes[i], T, B);
        options_from(&o, line);
        memcpy(&cpu_o, &o, sizeof o);
        model_create(&m, &o, B, 1), cpu::model_create(&c, &cpu_o, B, 1);
        for (size_t k = 0; k < m.list.size; k++)
            c.parameters[k] = m.parameters[k] = (real)m.parameters[k];
        model_restore(&m);
        float loss = (float)model_forward(&m, tokens, tokens + 1, B, T);
        float cpu_loss = (float)cpu::model_forward(&c, tokens, tokens + 1, B, T);
        model_backward(&m, tokens, tokens + 1, B, T, 1.0 / (B * T));
        cpu::model_backward(&c, tokens, tokens + 1, B, T, 1.0 / (B * T));
        snprintf(name, sizeof name, "model, %s", schemes[i]);
        against_cpu(name, "C 36, H 50, V 61: loss", &loss, &cpu_loss, 1, FORWARD);
        against_cpu(name, "C 36, H 50, V 61: gradients", model_snapshot(&m).gradients, c.gradients,
                    m.list.size, BACKWARD);
        for (int l = 0; l < 4; l++) {
            double v[2], cpu_v[2], gate, cpu_gate;
            layer_state(&m, l, B, T, v, &gate), cpu::layer_state(&c, l, B, T, cpu_v, &cpu_gate);
            snprintf(name, sizeof name, "layer_state, %s, layer %d", schemes[i], l);
            double error[2] = {fabs(v[0] / cpu_v[0] - 1), fabs(v[1] / cpu_v[1] - 1)};
            check(error[0] < tolerances[BACKWARD] && error[1] < tolerances[BACKWARD] &&
                      gate == cpu_gate, name, "%g %g %g, not %g %g %g",
                  v[0], v[1], gate, cpu_v[0], cpu_v[1], cpu_gate);
        }
        model_free(&m), cpu::model_free(&c);
    }
}

// Is it the same bits twice, and for the CPU's blocks in another order?
static void test_twice(void) {
    enum { B = 2, T = 70 };
    static const char *const orders[] = {"", "reverse", "shuffle"};
    int tokens[B * T + 1];
    float *parameters[3];
    size_t n = 0;
    for (int i = 0; i <= B * T; i++) tokens[i] = i * i % 61;
    for (int k = 0; k < 3; k++) {
        Options o;
        Model m;
        double norms[2], gate_norm;
        setenv("CUDA_ON_CPU_ORDER", orders[k], 1);
        options_from(&o, "--layers 2 --channels 32 --hidden 50 --heads 2 --seq-len 70 --batch 2 "
                         "--vocab-size 61 --gate-init 0.3 --warmup 0");
        model_create(&m, &o, B, 1);
        for (int t = 0; t < 2; t++) {
            zero_gradients(&m);
            model_forward(&m, tokens, tokens + 1, B, T);
            model_backward(&m, tokens, tokens + 1, B, T, 1.0 / (B * T));
            double norm = gradient_norms(&m, norms, &gate_norm);
            model_update(&m, t, norm, gate_norm);
        }
        n = m.list.size;
        parameters[k] = copy(model_snapshot(&m).parameters, n);
        model_free(&m);
    }
    unsetenv("CUDA_ON_CPU_ORDER");
    check(!memcmp(parameters[0], parameters[1], n * 4) &&
              !memcmp(parameters[0], parameters[2], n * 4),
          "two steps, three times: the same bits", "they differ");
    for (int k = 0; k < 3; k++) free(parameters[k]);
}

static int run_tests(const char *program) {
    open_device();
    open_dump("dev/test/reference.safetensors");
    test_gpas(), test_residual(), test_embedding(), test_rmsnorm(), test_rope(), test_swiglu();
    test_matmul(), test_attention(), test_crossentropy(), test_adamw();
    for (int k = 0; k < 4; k++) test_fused(k / 2, k % 2);
    test_attention_tiles(), test_row_tiles(), test_crossentropy_tiles();
    test_long_attention();
    test_networks(), test_recompute(), test_odd_networks(), test_initial_values();
    test_training_rules();
    test_twice();
    if (!program) return failed;
    if (!mkdtemp(folder)) die("cannot make a folder in /tmp");
    owner = getpid();
    atexit(remove_folder);
    test_gpu_program(program);
    return failed;
}
}  // namespace on_gpu

int main(int argc, char **argv) {
    int failures = on_gpu::run_tests(argc > 1 ? argv[1] : NULL);
    printf("%d passed, %d failed\n", on_gpu::passed, failures);
    return failures > 0;
}

#else
int main(void) {
    open_dump("dev/test/reference.safetensors");
    test_gpas(), test_residual(), test_embedding(), test_rmsnorm(), test_rope(), test_swiglu();
    test_matmul(), test_attention(), test_crossentropy(), test_adamw();
    test_gemm(), test_long_attention(), test_exp();
    test_wide_attention(), test_gemm_threads();
    test_networks(), test_recompute();
    test_initial_values(), test_learning(), test_threads(), test_training_rules();
    if (!mkdtemp(folder)) die("cannot make a folder in /tmp");
    atexit(remove_folder);
    owner = getpid();
    test_check_finite(), test_large_sizes();
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

#endif

#else
/* ------------------------------------------------------------------------------------------------
Finite differences

A function f of many numbers, its gradient g, any direction v: the slope of f(x + h v) at h = 0
should be g . v. It is measured from h = +-1e-4 and +-2e-4, with an error of order h^4. For a layer
f is sum(out * dout) with a random dout. Each element is a direction of its own where that is cheap,
else random directions must do.
*/

typedef double (*Function)(void *);

// Checks the gradient of f with respect to x (n), in `directions` random directions, or element by
// element with directions 0. expected_ratio is 1 but where the gradient must not agree.
static void check_gradient(const char *name, Function f, void *state, double *x,
                           const double *gradient, size_t n, int directions,
                           double expected_ratio) {
    static const double steps[] = {1e-4, -1e-4, 2e-4, -2e-4};
    double *start = copy(x, n), *v = copy(x, n), difference = 0, size = 0;
    uint64_t random = 99;
    for (size_t d = 0; d < (directions ? (size_t)directions : n); d++) {
        double values[4], slope = 0;
        for (size_t i = 0; i < n; i++) v[i] = directions ? 2 * random_uniform(&random) - 1 : i == d;
        for (int k = 0; k < 4; k++) {
            for (size_t i = 0; i < n; i++) x[i] = start[i] + steps[k] * v[i];
            values[k] = f(state);
        }
        memcpy(x, start, n * sizeof *x);
        for (size_t i = 0; i < n; i++) slope += gradient[i] * v[i];
        double measured = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * steps[0]);
        difference += (measured - expected_ratio * slope) * (measured - expected_ratio * slope);
        size += measured * measured;
    }
    double error = sqrt(difference / (size ? size : 1));
    check(error < 1e-6, name, "finite differences are %.2e away", error);
    free(start), free(v);
}

static double inner(const double *a, const double *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

enum { ROWS = 5, WIDTH = 12, OUT = 7, SIZE = 600 * 3 * 8 };
static double x[SIZE], w[SIZE], y[SIZE], dy[SIZE], dx[SIZE], dw[SIZE], rstd[SIZE], gate, dgate,
    table[SIZE];
static int act, tokens[] = {2, 0, 2, 1, 3}, time_steps;

static double gpas_sum(void *s) {
    (void)s;
    gpas_forward(y, x, gate, act, ROWS * WIDTH);
    return inner(y, dy, ROWS * WIDTH);
}

static void test_gpas(void) {
    static const char *const names[] = {"silu", "identity", "relu", "leaky_relu", "tanh"};
    char line[200];
    size_t n = ROWS * WIDTH;
    for (act = 0; act < 5; act++)
        for (int sign = 1; sign >= -1; sign -= 2) {
            gate = 0.6 * sign, dgate = 0;
            if (act == GATE_RELU && sign < 0) continue; // its gate's gradient is 0
            gpas_backward(dx, &dgate, dy, x, gate, act, 0, n);
            snprintf(line, sizeof line, "gpas_backward (%s, gate %g, no stop-gradient): dinp",
                     names[act], gate);
            check_gradient(line, gpas_sum, NULL, x, dx, n, 0, 1);
            snprintf(line, sizeof line, "gpas_backward (%s, gate %g): dgate", names[act], gate);
            check_gradient(line, gpas_sum, NULL, &gate, &dgate, 1, 0, 1);
            dgate = 0;
            gpas_backward(dx, &dgate, dy, x, gate, act, 1, n);
            snprintf(line, sizeof line,
                     "gpas_backward (%s, gate %g): dgate is the same with the stop-gradient",
                     names[act], gate);
            check_gradient(line, gpas_sum, NULL, &gate, &dgate, 1, 0, 1);
            snprintf(line, sizeof line,
                     "gpas_backward (%s, gate %g): with it dinp is dout, while differences see "
                     "(1 - a) dout",
                     names[act], gate);
            check_gradient(line, gpas_sum, NULL, x, dx, n, 0, 1 - gate_value(gate, act));
            snprintf(line, sizeof line, "gpas_backward (%s, gate %g): with it dinp is dout exactly",
                     names[act], gate);
            check(memcmp(dx, dy, n * sizeof *dx) == 0, line, "it is not");
        }
}

static double residual_sum(void *s) {
    (void)s;
    residual_forward(y, x, w, 1.7, ROWS * WIDTH);
    return inner(y, dy, ROWS * WIDTH);
}

static double embedding_sum(void *s) {
    (void)s;
    embedding_forward(y, tokens, w, ROWS, WIDTH);
    return inner(y, dy, ROWS * WIDTH);
}

static double rmsnorm_sum(void *s) {
    (void)s;
    rmsnorm_forward(y, rstd, x, w, ROWS, WIDTH);
    return inner(y, dy, ROWS * WIDTH);
}

static double rope_sum(void *s) {
    (void)s;
    memcpy(y, x, ROWS * 3 * WIDTH * sizeof *y);
    rope_forward(y, table, 1, ROWS, WIDTH, 4);
    return inner(y, dy, ROWS * 3 * WIDTH);
}

static double swiglu_sum(void *s) {
    (void)s;
    swiglu_forward(y, x, ROWS, WIDTH);
    return inner(y, dy, ROWS * WIDTH);
}

static double matmul_sum(void *s) {
    (void)s;
    matmul_forward(y, x, w, ROWS, WIDTH, OUT);
    return inner(y, dy, ROWS * OUT);
}

static double attention_sum(void *s) {
    (void)s;
    attention_forward(y, rstd, x, 0, 1, time_steps, 8, 2);
    return inner(y, dy, (size_t)time_steps * 8);
}

static double crossentropy_sum(void *s) {
    (void)s;
    crossentropy_forward(y, rstd, x, tokens, ROWS, WIDTH);
    return 0.3 * (y[0] + y[1] + y[2] + y[3] + y[4]);
}

static void test_layers(void) {
    memset(dw, 0, sizeof dw);
    residual_backward(dx, dy, 1.7, ROWS * WIDTH);
    check_gradient("residual_backward: dshortcut", residual_sum, NULL, x, dx, ROWS * WIDTH, 0, 1);
    check_gradient("residual_backward: the branch's gradient is dout", residual_sum, NULL, w, dy,
                   ROWS * WIDTH, 0, 1);
    embedding_backward(dw, dy, tokens, ROWS, WIDTH);
    check_gradient("embedding_backward: dweight", embedding_sum, NULL, w, dw, 4 * WIDTH, 0, 1);
    memset(dw, 0, sizeof dw);
    rmsnorm_forward(y, rstd, x, w, ROWS, WIDTH);
    rmsnorm_backward(dx, dw, dy, x, w, rstd, ROWS, WIDTH);
    check_gradient("rmsnorm_backward: dinp", rmsnorm_sum, NULL, x, dx, ROWS * WIDTH, 0, 1);
    check_gradient("rmsnorm_backward: dweight", rmsnorm_sum, NULL, w, dw, WIDTH, 0, 1);
    rope_angles(table, ROWS, 4);
    memcpy(dx, dy, sizeof dx);
    rope_backward(dx, table, 1, ROWS, WIDTH, 4);
    check_gradient("rope_backward: dinp", rope_sum, NULL, x, dx, ROWS * 3 * WIDTH, 0, 1);
    swiglu_backward(dx, dy, x, ROWS, WIDTH);
    check_gradient("swiglu_backward: dinp", swiglu_sum, NULL, x, dx, ROWS * 2 * WIDTH, 0, 1);
    memset(dw, 0, sizeof dw);
    matmul_backward(dx, dw, dy, x, w, ROWS, WIDTH, OUT);
    check_gradient("matmul_backward: dinp", matmul_sum, NULL, x, dx, ROWS * WIDTH, 0, 1);
    check_gradient("matmul_backward: dweight", matmul_sum, NULL, w, dw, OUT * WIDTH, 0, 1);
    for (time_steps = 9; time_steps <= 600; time_steps += 591) {
        attention_forward(y, rstd, x, 0, 1, time_steps, 8, 2);
        attention_backward(dx, dy, y, rstd, x, 1, time_steps, 8, 2);
        check_gradient(time_steps == 9 ? "attention_backward: dqkv"
                                       : "attention_backward: dqkv over several blocks",
                       attention_sum, NULL, x, dx, (size_t)time_steps * 24, time_steps == 9 ? 0 : 5,
                       1);
    }
    crossentropy_forward(y, rstd, x, tokens, ROWS, WIDTH);
    memcpy(dx, x, sizeof dx);
    crossentropy_backward(dx, rstd, tokens, 0.3, ROWS, WIDTH);
    check_gradient("crossentropy_backward: dlogits", crossentropy_sum, NULL, x, dx, ROWS * WIDTH, 0,
                   1);
}

static const int text[] = {3, 7, 1, 9, 4, 12, 8, 3, 5, 11, 6, 10, 0};
static double network_loss(void *model) {
    return model_forward((Model *)model, text, text + 1, 2, 6);
}

// Every parameter tensor of the twelve networks; with GPAS without its stop-gradient, which finite
// differences cannot know.
static void test_networks(void) {
    for (int i = 0; i < 12; i++) {
        Options o;
        Model m;
        char line[512];
        snprintf(line, sizeof line,
                 "--norm %s %s --layers 4 --channels 8 --hidden 11 --heads 2 --seq-len 6 "
                 "--vocab-size 13 --batch 2",
                 schemes[i / 2],
                 i % 2 ? "--gpas on --stop-grad off --gate-init 0.4" : "--gpas off");
        options_from(&o, line);
        model_create(&m, &o, 2, 1);
        for (size_t j = 0; j < m.list.size; j++)
            m.parameters[j] *= 0.5 + w[j % SIZE] * w[j % SIZE];
        for (const Tensor *t = m.list.tensors; t < m.list.tensors + m.list.count; t++)
            for (size_t j = 0; t->cols && j < t->size; j++)
                m.parameters[t->offset + j] = 0.6 * w[(t->offset + j) % SIZE];
        network_loss(&m);
        model_backward(&m, text, text + 1, 2, 6, 1.0 / 12);
        for (const Tensor *t = m.list.tensors; t < m.list.tensors + m.list.count; t++) {
            snprintf(line, sizeof line, "model_backward %s, gpas %s: %s", schemes[i / 2],
                     i % 2 ? "nostop" : "off", t->name);
            check_gradient(line, network_loss, &m, m.parameters + t->offset,
                           m.gradients + t->offset, t->size, 3, 1);
        }
        model_free(&m);
    }
}

int main(void) {
    uint64_t random = 5;
    double *arrays[] = {x, w, dy};
    for (int a = 0; a < 3; a++)
        for (int i = 0; i < SIZE; i++) arrays[a][i] = 2 * random_uniform(&random) - 1;
    test_gpas();
    test_layers();
    test_networks();
    free_packing_space();
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
#endif
