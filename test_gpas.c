/*
test_gpas.c: tests the layers and networks of train_gpas.c and train_gpas.cu. Prints a line for each
check, then `N passed, N failed`.

    ./test_gpas           Compares every layer and all twelve networks with the reference dump in
                          dev/test, which reference.py computes without knowing the derivative of
                          any layer. Then tests what the dump does not contain: larger shapes,
                          stories, training rules, threads, --check-finite, sizes beyond 2^31.
    ./test_gpas_double    (compiled with -DDOUBLE) The same layers with every float a double, which
                          makes finite differences exact enough to check each gradient.
    ./test_gpas_cuda_fp32, ./test_gpas_cuda_bf16
                          (compiled as C++ with -DCUDA_REAL=float, -DCUDA_REAL=bf16) Compares the
                          layers and networks of train_gpas.cu with the same dump, and larger shapes
                          with train_gpas.c, which is loaded from build/cpu.so.
*/
#ifdef DOUBLE
#include "dev/test/double.h"  // from here on float is double
#endif
#define TRAIN_GPAS_NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function"  // the tests do not call every function
#include "dev/utils.h"
#include "dev/test/check.h"
#ifdef CUDA_REAL
#include TRAIN_GPAS_CU
#include <algorithm>
#include <dlfcn.h>
#include "dev/test/cpu.h"
typedef CUDA_REAL real;
enum { DTYPE = sizeof(real) == sizeof(float) ? DTYPE_FP32 : DTYPE_BF16 };
static size_t memory_of(const Model *m) { return m->arrays.bytes; }
namespace kernels {  // its layers take arrays on the host and shadow those of train_gpas.cu
#include "dev/test/on_gpu.h"
// adamw_update() with the hyperparameters in an array: lr, beta1, beta2, eps, weight decay.
static void adamw(float *p, const float *grad, float *m, float *v, size_t n, const float *h,
                  int t) {
    adamw_update(p, grad, m, v, n, h[0], h[1], h[2], h[3], h[4], 1, t);
}
#else
#include <sys/wait.h>
#include "train_gpas.c"
typedef float real;
enum { DTYPE = DTYPE_FP32 };
static size_t memory_of(const Model *m) { return m->arrays.bytes; }
static void adamw(float *p, const float *grad, float *m, float *v, size_t n, const float *h,
                  int t) {
    AdamW a = {h[0], h[1], h[2], h[3], h[4], 1, t};
    adamw_update(p, grad, m, v, n, a);
}
#endif

static const char *const schemes[] = {"pre", "lns", "sandwich", "post", "deepnorm", "mix"};

/* ------------------------------------------------------------------------------------------------
Arrays and options
*/

// The arrays of a test. free_floats() frees them all.
static float *arrays[256];
static int num_arrays;

static float *zeros(size_t n) {
    if (num_arrays == 256) die("a test allocates too many arrays");
    return arrays[num_arrays++] = (float *)allocate(n, sizeof(float));
}

static float *copy(const float *x, size_t n) {
    return (float *)memcpy(zeros(n), x, n * sizeof(float));
}

// Returns n numbers, uniform between -size and size.
static float *random_floats(size_t n, double size, uint64_t seed) {
    float *x = zeros(n);
    for (size_t i = 0; i < n; i++) x[i] = (float)(size * (2 * random_uniform(&seed) - 1));
    return x;
}

static void free_floats(void) {
    while (num_arrays > 0) free(arrays[--num_arrays]);
}

// Are the bits of a and b the same?
static int same(const float *a, const float *b, size_t n) {
    return memcmp(a, b, n * sizeof(float)) == 0;
}

static double norm_of(const float *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sqrt(sum);
}

// Checks that ||got - expected|| <= tolerance * scale. If scale is 0 it is ||expected||.
static void check_close(const char *name, const float *got, const float *expected, size_t n,
                        double tolerance, double scale) {
    double difference = 0, worst = -1, size = norm_of(expected, n);
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)got[i] - expected[i]);
        difference += d * d;
        if (!(d <= worst)) {  // also true for NaN
            worst = d;
            at = i;
        }
    }
    double error = sqrt(difference) / (scale ? scale : size ? size : 1);
    char line[400];
    snprintf(line, sizeof line, "%s (%.1e)", name, error);
    check(error <= tolerance, line,
          "relative error %.2e exceeds %.0e; worst element %zu: got %.9g, expected %.9g", error,
          tolerance, at, (double)got[at], (double)expected[at]);
}

// Parses the options of a command line, given as one string.
__attribute__((format(printf, 2, 3)))
static void options_from(Options *o, const char *format, ...) {
    char words[1024], *argv[64];
    int argc = 1;
    va_list args;
    va_start(args, format);
    vsnprintf(words, sizeof words, format, args);
    va_end(args);
    argv[0] = words;
    for (char *w = strtok(words, " "); w; w = strtok(NULL, " ")) argv[argc++] = w;
    parse_options(o, argc, argv);
    o->dtype = DTYPE;
}

#ifndef DOUBLE
/* ------------------------------------------------------------------------------------------------
The reference dump
*/

enum { FORWARD, BACKWARD };
static const double tolerances[] = {sizeof(real) == 4 ? 1e-5 : 2e-2,
                                    sizeof(real) == 4 ? 1e-4 : 2e-2};
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

// Returns a tensor of the dump. Writes its shape (3), padded with ones, and its size to *n.
static const float *tensor(const char *name, int *shape, size_t *n) {
    char key[200];
    size_t begin, end;
    int dims[3] = {1, 1, 1};
    snprintf(key, sizeof key, "\"%s\":{", name);
    const char *entry = strstr(dump_header, key);
    if (!entry) die("the dump has no tensor %s", name);
    if (strstr(entry + 1, key)) die("the dump has the tensor %s twice", name);
    sscanf(strstr(entry, "\"shape\":["), "\"shape\":[%d,%d,%d", &dims[0], &dims[1], &dims[2]);
    sscanf(strstr(entry, "\"data_offsets\":["), "\"data_offsets\":[%zu,%zu", &begin, &end);
    if (shape) memcpy(shape, dims, sizeof dims);
    if (n) *n = (end - begin) / 4;
    return (const float *)(dump + begin);
}

// Returns tensor CASE.NAME of the dump.
static const float *part(const char *of, const char *name, int *shape, size_t *n) {
    char full[200];
    snprintf(full, sizeof full, "%s.%s", of, name);
    return tensor(full, shape, n);
}

// Compares `got` with tensor CASE.NAME of the dump, with the tolerance of a forward or a backward
// pass. layer: "rmsnorm" is printed as rmsnorm_forward or rmsnorm_backward, words with a space as
// they are.
static void against_dump(const char *layer, const char *of, const char *name, const float *got,
                         int pass, double scale) {
    char line[300];
    size_t n;
    const float *expected = part(of, name, NULL, &n);
    const char *suffix = strchr(layer, ' ') ? "" : pass == FORWARD ? "_forward" : "_backward";
    snprintf(line, sizeof line, "%s%s %s: %s", layer, suffix, of, name);
    check_close(line, got, expected, n, tolerances[pass], scale);
}

/* ------------------------------------------------------------------------------------------------
The layers. A backward pass that adds to a gradient is called twice, and the gradient halved.
*/

static const float *halved(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] /= 2;
    return x;
}

static void test_gpas_case(const char *name, int activation, int stop_grad) {
    char of[64];
    size_t n;
    snprintf(of, sizeof of, "gpas.%s.%s", name, stop_grad ? "stop" : "nostop");
    const float *inp = part(of, "inp", NULL, &n), *dout = part(of, "dout", NULL, NULL);
    float gate = *part(of, "gate", NULL, NULL), *got = random_floats(n, 1, 1), dgate = 0;
    double scale = fabs(gate_slope(gate, activation)) * norm_of(inp, n) * norm_of(dout, n);
    gpas_forward(got, inp, gate, activation, n);
    against_dump("gpas", of, "out", got, FORWARD, 0);
    gpas_backward(got, &dgate, dout, inp, gate, activation, stop_grad, n);
    against_dump("gpas", of, "dinp", got, BACKWARD, 0);
    against_dump("gpas", of, "dgate", &dgate, BACKWARD, scale);
    float twice = dgate, once = dgate;
    memcpy(got, dout, n * sizeof(float));
    gpas_backward(got, &twice, got, inp, gate, activation, stop_grad, n);
    against_dump("gpas_backward in place,", of, "dinp", got, BACKWARD, 0);
    once *= 2;
    check_close("gpas_backward: adds to the gate's gradient", &twice, &once, 1, 1e-5, 0);
}

static void test_gpas(void) {
    static const struct {
        const char *name;
        int activation;
    } cases[] = {{"silu", GATE_SILU}, {"silu_neg", GATE_SILU}, {"identity", GATE_IDENTITY},
                 {"relu", GATE_RELU}, {"leaky_relu", GATE_LEAKY_RELU},
                 {"leaky_relu_neg", GATE_LEAKY_RELU}, {"tanh", GATE_TANH}};
    for (int i = 0; i < 7; i++) {
        test_gpas_case(cases[i].name, cases[i].activation, 1);
        test_gpas_case(cases[i].name, cases[i].activation, 0);
    }
}

static void test_residual(void) {
    size_t n;
    const float *shortcut = tensor("residual.shortcut", NULL, &n);
    const float *branch = tensor("residual.branch", NULL, NULL);
    const float *dout = tensor("residual.dout", NULL, NULL);
    float A = *tensor("residual.alpha", NULL, NULL), *got = random_floats(n, 1, 1);
    residual_forward(got, shortcut, branch, A, n);
    against_dump("residual", "residual", "out", got, FORWARD, 0);
    memcpy(got, shortcut, n * sizeof(float));
    residual_forward(got, got, branch, A, n);
    against_dump("residual_forward in place,", "residual", "out", got, FORWARD, 0);
    residual_backward(got, dout, A, n);
    against_dump("residual", "residual", "dshortcut", got, BACKWARD, 0);
    memcpy(got, dout, n * sizeof(float));
    residual_backward(got, got, A, n);
    against_dump("residual_backward in place,", "residual", "dshortcut", got, BACKWARD, 0);
}

static void test_embedding(void) {
    int shape[3];
    size_t n;
    const int *tokens = (const int *)tensor("embedding.tokens", NULL, NULL);
    const float *weight = tensor("embedding.weight", shape, &n);
    const float *dout = tensor("embedding.dout", NULL, NULL);
    int C = shape[1], N = 10;
    float *out = random_floats((size_t)N * C, 1, 1), *dweight = zeros(n);
    embedding_forward(out, tokens, weight, N, C);
    against_dump("embedding", "embedding", "out", out, FORWARD, 0);
    for (int call = 0; call < 2; call++) embedding_backward(dweight, dout, tokens, N, C);
    against_dump("embedding", "embedding", "dweight", halved(dweight, n), BACKWARD, 0);
}

static void test_rmsnorm(void) {
    static const char *const cases[] = {"rmsnorm.a", "rmsnorm.b"};
    for (int i = 0; i < 2; i++) {
        int shape[3];
        size_t n;
        const float *inp = part(cases[i], "inp", shape, &n);
        const float *weight = part(cases[i], "weight", NULL, NULL);
        const float *dout = part(cases[i], "dout", NULL, NULL);
        int N = shape[0], C = shape[1];
        float *got = random_floats(n, 1, 1), *rstd = random_floats(N, 1, 1), *dweight = zeros(C);
        float *expected = zeros(N);
        char name[100];
        rmsnorm_forward(got, rstd, inp, weight, N, C);
        against_dump("rmsnorm", cases[i], "out", got, FORWARD, 0);
        for (int k = 0; k < N; k++) {
            double size = norm_of(inp + k * C, C);
            expected[k] = (float)(1 / sqrt(size * size / C + 1e-6));
        }
        snprintf(name, sizeof name, "rmsnorm_forward %s: rstd", cases[i]);
        check_close(name, rstd, expected, N, tolerances[FORWARD], 0);
        for (int call = 0; call < 2; call++)
            rmsnorm_backward(got, dweight, dout, inp, weight, rstd, N, C);
        against_dump("rmsnorm", cases[i], "dinp", got, BACKWARD, 0);
        against_dump("rmsnorm", cases[i], "dweight", halved(dweight, C), BACKWARD, 0);
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
}

static void test_matmul(void) {
    static const char *const cases[] = {"matmul.a", "matmul.b"};
    for (int i = 0; i < 2; i++) {
        int shape[3], out_shape[3];
        const float *inp = part(cases[i], "inp", shape, NULL);
        const float *weight = part(cases[i], "weight", NULL, NULL);
        const float *dout = part(cases[i], "dout", out_shape, NULL);
        int N = shape[0], C = shape[1], OC = out_shape[1];
        float *out = random_floats((size_t)N * OC, 1, 1), *dweight = zeros((size_t)OC * C);
        float *dinp = random_floats((size_t)N * C, 1, 1);
        matmul_forward(out, inp, weight, N, C, OC);
        against_dump("matmul", cases[i], "out", out, FORWARD, 0);
        for (int call = 0; call < 2; call++)
            matmul_backward(dinp, dweight, dout, inp, weight, N, C, OC);
        against_dump("matmul", cases[i], "dinp", dinp, BACKWARD, 0);
        against_dump("matmul", cases[i], "dweight", halved(dweight, (size_t)OC * C), BACKWARD, 0);
    }
}

// Computes attention by its definition, in double: out (B,T,C), lse (B,NH,T) and, unless dqkv is
// NULL, the gradient dqkv (B,T,3C) for dout (B,T,C).
static void define_attention(float *out, float *lse, float *dqkv, const float *dout,
                             const float *qkv, int B, int T, int C, int NH) {
    int hs = C / NH;
    size_t n = (size_t)B * T * C, row = 3 * C;
    double scale = 1 / sqrt((double)hs);
    double *y = (double *)allocate(n, sizeof(double));
    double *dx = (double *)allocate(3 * n, sizeof(double));
    double *p = (double *)allocate(T, sizeof(double)), *dp = (double *)allocate(T, sizeof(double));
    for (int i = 0; i < B * NH * T; i++) {  // each query of each head
        int t = i % T, head = i / T % NH;
        size_t begin = (size_t)(i / T / NH) * T, at = (begin + t) * C + head * hs;
        const float *q = qkv + (begin + t) * row + head * hs;
        const float *k = qkv + begin * row + C + head * hs;
        double sum = 0, delta = 0, largest = -1e300, *dq = dx + (q - qkv), *dk = dx + (k - qkv);
        for (int s = 0; s <= t; s++) {
            p[s] = dp[s] = 0;
            for (int c = 0; c < hs; c++) p[s] += scale * q[c] * k[s * row + c];
            for (int c = 0; c < hs && dqkv; c++) dp[s] += (double)dout[at + c] * k[s * row + C + c];
            largest = fmax(largest, p[s]);
        }
        for (int s = 0; s <= t; s++) sum += p[s] = exp(p[s] - largest);
        for (int s = 0; s <= t; s++) delta += (p[s] /= sum) * dp[s];
        for (int s = 0; s <= t; s++) {
            double ds = scale * p[s] * (dp[s] - delta);
            for (int c = 0; c < hs; c++) {
                y[at + c] += p[s] * k[s * row + C + c];
                dq[c] += ds * k[s * row + c];
                dk[s * row + c] += ds * q[c];
                if (dqkv) dk[s * row + C + c] += p[s] * dout[at + c];
            }
        }
        lse[i] = (float)(largest + log(sum));
    }
    for (size_t i = 0; i < n; i++) out[i] = (float)y[i];
    for (size_t i = 0; i < 3 * n && dqkv; i++) dqkv[i] = (float)dx[i];
    free(y);
    free(dx);
    free(p);
    free(dp);
}

static void test_attention(void) {
    static const char *const cases[] = {"attention.a", "attention.b", "attention.c", "attention.d"};
    for (int i = 0; i < 4; i++) {
        int shape[3], NH = *(const int *)part(cases[i], "heads", NULL, NULL);
        size_t n;
        char name[100];
        const float *qkv = part(cases[i], "qkv", shape, &n);
        const float *dout = part(cases[i], "dout", NULL, NULL);
        int B = shape[0], T = shape[1], C = shape[2] / 3, rows = B * NH * T;
        float *out = random_floats(n / 3, 1, 1), *lse = random_floats(rows, 1, 1);
        float *dqkv = random_floats(n, 1, 1), *defined = zeros(n / 3), *expected = zeros(rows);
        define_attention(defined, expected, NULL, NULL, qkv, B, T, C, NH);
        attention_forward(out, lse, qkv, 0, B, T, C, NH);
        against_dump("attention", cases[i], "out", out, FORWARD, 0);
        snprintf(name, sizeof name, "attention_forward %s: lse", cases[i]);
        check_close(name, lse, expected, rows, tolerances[FORWARD], 0);
        attention_backward(dqkv, dout, out, lse, qkv, B, T, C, NH);
        against_dump("attention", cases[i], "dqkv", dqkv, BACKWARD, 0);
    }
}

static void test_long_attention(void) {
    enum { B = 1, T = 600, C = 8, NH = 2, n = B * T * C };
    float *qkv = random_floats(3 * n, 2, 5), *out = random_floats(n, 1, 1), *expected = zeros(n);
    float *lse = random_floats(B * NH * T, 1, 1), *expected_lse = zeros(B * NH * T);
    qkv[20 * 3 * C + C] = 60;  // one dominant key
    define_attention(expected, expected_lse, NULL, NULL, qkv, B, T, C, NH);
    attention_forward(out, lse, qkv, 0, B, T, C, NH);
    check_close("attention_forward: 600 positions, one dominant key", out, expected, n,
                tolerances[FORWARD], 0);
    check_close("attention_forward: 600 positions, lse", lse, expected_lse, B * NH * T,
                tolerances[FORWARD], 0);
}

// The queries from position `first` on must give the last rows of what all queries give.
static void test_attention_extended(void) {
    static const struct { int B, T, first, hs; } cases[] = {
        {1, 9, 4, 10},     {2, 9, 8, 10},    {1, 70, 1, 32},  {2, 70, 64, 48},
        {3, 40, 39, 6},    {1, 300, 256, 10}, {2, 300, 130, 64}, {1, 600, 599, 10},
        {1, 64, 63, 100},  {2, 65, 64, 128}, {1, 129, 0, 10}, {2, 150, 37, 70},
        {1, 200, 135, 36}, {2, 130, 66, 16},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int B = cases[i].B, T = cases[i].T, first = cases[i].first, NH = 2, C = NH * cases[i].hs;
        int rows = T - first;
        size_t n = (size_t)B * rows * C, lse_n = (size_t)B * NH * rows;
        char name[100];
        float *qkv = random_floats((size_t)B * T * 3 * C, 2, 5);
        float *out = random_floats((size_t)B * T * C, 1, 1);
        float *lse = random_floats((size_t)B * NH * T, 1, 1);
        float *expected = zeros(n), *expected_lse = zeros(lse_n);
        float *got = random_floats(n, 1, 2), *got_lse = random_floats(lse_n, 1, 2);
        attention_forward(out, lse, qkv, 0, B, T, C, NH);
        for (int b = 0; b < B; b++)
            memcpy(expected + (size_t)b * rows * C, out + ((size_t)b * T + first) * C,
                   (size_t)rows * C * sizeof(float));
        for (int h = 0; h < B * NH; h++)
            memcpy(expected_lse + (size_t)h * rows, lse + (size_t)h * T + first,
                   rows * sizeof(float));
        attention_forward(got, got_lse, qkv, first, B, T, C, NH);
        snprintf(name, sizeof name, "attention_forward: B %d, queries %d to %d, head of %d", B,
                 first, T - 1, cases[i].hs);
        check_close(name, got, expected, n, 2e-6, 0);
        strcat(name, ", lse");
        check_close(name, got_lse, expected_lse, lse_n, 2e-6, 0);
        free_floats();
    }
}

// The dump's logits are large, so rounding them to bf16 changes the result. Therefore the reference
// is the definition, applied to the rounded logits, and only in fp32 also the dump.
static void test_crossentropy(void) {
    int shape[3];
    size_t n;
    const float *logits = tensor("crossentropy.logits", shape, &n);
    const int *targets = (const int *)tensor("crossentropy.targets", NULL, NULL);
    int N = shape[0], V = shape[1];
    float *got = copy(logits, n), *expected = zeros(n), *expected_losses = zeros(N);
    float *losses = random_floats(N, 1, 1), *lse = random_floats(N, 1, 1), *expected_lse = zeros(N);
    for (int i = 0; i < N; i++) {
        double sum = 0;
        for (int v = 0; v < V; v++) sum += exp((double)(float)(real)logits[i * V + v]);
        for (int v = 0; v < V; v++) {
            double x = (float)(real)logits[i * V + v];
            expected[i * V + v] = (float)((exp(x) / sum - (v == targets[i])) / N);
            if (v == targets[i]) expected_losses[i] = (float)(log(sum) - x);
        }
        expected_lse[i] = (float)log(sum);
    }
    crossentropy_forward(losses, lse, got, targets, N, V);
    check(same(got, logits, n), "crossentropy_forward: does not change the logits", "it does");
    check_close("crossentropy_forward: lse", lse, expected_lse, N, tolerances[FORWARD], 0);
    check_close("crossentropy_forward: losses", losses, expected_losses, N, tolerances[FORWARD], 0);
    if (sizeof(real) == sizeof(float))
        against_dump("crossentropy", "crossentropy", "losses", losses, FORWARD, 0);
    crossentropy_backward(got, lse, targets, 1.0f / N, N, V);
    check_close("crossentropy_backward: dlogits, in place", got, expected, n, tolerances[BACKWARD],
                0);
    if (sizeof(real) == sizeof(float))
        against_dump("crossentropy", "crossentropy", "dlogits", got, BACKWARD, 0);
}

static void test_adamw(void) {
    static const char *const names[] = {"lr", "beta1", "beta2", "eps", "weight_decay"};
    size_t n;
    const float *start = tensor("adamw.param", NULL, &n);
    float *p = copy(start, n), *m = zeros(n), *v = zeros(n), hyper[5];
    for (int i = 0; i < 5; i++) hyper[i] = *part("adamw", names[i], NULL, NULL);
    for (int t = 1; t <= 3; t++) {
        char grad[8] = "grad1", param[8] = "param1";
        grad[4] = param[5] = (char)('0' + t);
        adamw(p, part("adamw", grad, NULL, NULL), m, v, n, hyper, t);
        against_dump("adamw_update step", "adamw", param, p, FORWARD, 0);
    }
    against_dump("adamw_update after three steps,", "adamw", "m3", m, FORWARD, 0);
    against_dump("adamw_update after three steps,", "adamw", "v3", v, FORWARD, 0);
}

/* ------------------------------------------------------------------------------------------------
The networks
*/

// Returns all logits of the last model_forward() (n,V).
static float *all_logits(Model *m, int n) {
    size_t V = m->config.V;
    float *logits = zeros(n * V);
    for (int i = 0; i < n; i++) memcpy(logits + i * V, model_logits(m, i), V * sizeof(float));
    return logits;
}

// One training step on one batch (B,T). Returns the loss before the update.
static double step(Model *m, int t, const int *tokens, const int *targets, int B, int T) {
    double norms[16], gate_norm;
    zero_gradients(m);
    double loss = model_forward(m, tokens, targets, B, T);
    model_backward(m, tokens, targets, B, T, 1.0 / (B * T));
    double norm = gradient_norms(m, norms, &gate_norm);
    model_update(m, t, norm, gate_norm);
    return loss;
}

static void dump_options(Options *o, const char *scheme, const char *options) {
    options_from(o, "--norm %s %s --layers 4 --channels 16 --hidden 21 --heads 2 --seq-len 6 "
                 "--vocab-size 19 --batch 2 --lr 0.01 --warmup 0 --steps 1000000000", scheme,
                 options);
}

// Gives a network the weights of the dump. The norms of lns have weights of their own.
static void dump_weights(Model *m) {
    Snapshot s = model_snapshot(m);
    for (const Tensor *t = s.list.tensors; t < s.list.tensors + s.list.count; t++) {
        char name[100], key[110];
        snprintf(name, sizeof name, "weights.lns.%s", t->name);
        snprintf(key, sizeof key, "\"%s\"", name);
        if (m->config.norm != NORM_LNS || !strstr(dump_header, key))
            snprintf(name, sizeof name, "weights.%s", t->name);
        memcpy(s.parameters + t->offset, tensor(name, NULL, NULL), t->size * sizeof(float));
    }
    model_restore(m);
}

// Compares a network with the dump: its logits, its loss, every gradient, ten steps of AdamW. The
// gradients are compared in the order of the backward pass, the last tensor first, so the first
// failure shows which layer is wrong. A gate's gradient is a sum whose terms may cancel, so its
// error is measured against the size of the terms.
static void test_network(const char *scheme, const char *kind, const char *options) {
    enum { B = 2, T = 6 };
    Options o;
    Model m;
    char of[64], name[100];
    float losses[10];
    const int *tokens = (const int *)tensor("tokens", NULL, NULL);
    const int *targets = (const int *)tensor("targets", NULL, NULL);
    snprintf(of, sizeof of, "net.%s.%s", scheme, kind);
    dump_options(&o, scheme, options);
    model_create(&m, &o, B, 1);
    dump_weights(&m);
    model_forward(&m, tokens, targets, B, T);
    against_dump("model", of, "logits", all_logits(&m, B * T), FORWARD, 0);
    for (int t = 0; t < 10; t++) {
        losses[t] = (float)step(&m, t, tokens, targets, B, T);
        if (t > 0) continue;
        Snapshot s = model_snapshot(&m);
        for (int i = s.list.count - 1; i >= 0; i--) {
            const Tensor *w = &s.list.tensors[i];
            int gate = w->kind == GATE;
            double scale = gate ? part(of, "gate_scale", NULL, NULL)[w->layer] : 0;
            snprintf(name, sizeof name, "grad.%s", w->name);
            against_dump("model", of, name, s.gradients + w->offset, BACKWARD, scale);
        }
    }
    against_dump("model", of, "loss", losses, FORWARD, 0);
    against_dump("model after ten updates,", of, "losses", losses, FORWARD, 0);
    model_free(&m);
}

// Calls test(scheme, kind, options) for each network of the dump.
static void for_each_network(void (*test)(const char *, const char *, const char *)) {
    for (int i = 0; i < 6; i++) {
        test(schemes[i], "base", "--gpas off");
        test(schemes[i], "gpas", "--gpas on");
    }
    test("pre", "nostop", "--gpas on --stop-grad off");
    test("post", "nostop", "--gpas on --stop-grad off");
    test("sandwich", "tanh", "--gpas on --gate-act tanh");
}

// --recompute saves memory and changes no bit of any gradient. For a model without a backward pass
// it changes nothing.
static void test_recompute(void) {
    enum { B = 2, T = 20 };
    int tokens[B * T + 1];
    for (int i = 0; i <= B * T; i++) tokens[i] = i * i % 31;
    for (int i = 0; i < 12; i++) {
        const char *gpas = i % 2 ? "--gate-init 0.3" : "--gpas off";
        char name[100];
        float *gradients[2];
        size_t memory[2], untrained[2], n = 0;
        for (int k = 0; k < 2; k++) {
            Options o;
            Model m;
            options_from(&o, "--norm %s %s --recompute %s --layers 4 --channels 16 --hidden 24 "
                         "--heads 2 --seq-len 20 --vocab-size 31 --batch 2", schemes[i / 2], gpas,
                         k ? "on" : "off");
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
        snprintf(name, sizeof name, "recompute: %s %s, the same gradients with less memory",
                 schemes[i / 2], gpas);
        check(same(gradients[0], gradients[1], n) && memory[1] < memory[0], name,
              "gradients differ, or memory is not less: %zu, without it %zu", memory[1], memory[0]);
        snprintf(name, sizeof name, "recompute: %s %s, no effect on memory without training",
                 schemes[i / 2], gpas);
        check(untrained[0] == untrained[1] && untrained[0] < memory[1], name,
              "memory %zu, with --recompute %zu, trained %zu", untrained[0], untrained[1],
              memory[1]);
    }
}

// Compares the mean, the standard deviation and the kurtosis of a tensor with those of the normal
// distribution from which it should be drawn. Prints a line if they differ.
static int has_initial_values(const Config *c, const Tensor *t, const float *x) {
    double mean = 0, std = 0.02, gain = pow(8.0 * c->L, -0.25), sum[3] = {0};
    if (t->kind == EMBEDDING) std = sqrt(2.0 / 5);
    if (c->norm == NORM_DEEPNORM && t->cols && t->layer >= 0)
        std = sqrt(2.0 / (t->rows + t->cols)) * (t->kind == WQ || t->kind == WK ? 1 : gain);
    if (t->kind == GATE) mean = c->gate_init;
    else if (!t->cols) mean = c->norm == NORM_LNS && t->layer >= 0 ? 1 / sqrt(t->layer + 1.0) : 1;
    if (!t->cols) std = 0;
    for (size_t i = 0; i < t->size; i++) {
        double d = x[i] - mean;
        sum[0] += d / t->size;
        sum[1] += d * d / t->size;
        sum[2] += d * d * d * d / t->size;
    }
    double got = sqrt(sum[1]), kurtosis = sum[2] / (sum[1] * sum[1]);
    int good = t->cols ? fabs(got / std - 1) < 0.06 && fabs(sum[0] / std) < 5 / sqrt(t->size) &&
                             fabs(kurtosis - 3) < 0.6
                       : got < 1e-6;
    char name[200];
    snprintf(name, sizeof name, "initial values: %s", t->name);
    if (!good)
        check(0, name, "mean %.4f, std %.4f, kurtosis %.2f; expected %.4f, %.4f, 3", mean + sum[0],
              got, kurtosis, mean, std);
    return good;
}

static void test_initial_values(void) {
    for (int i = 0; i < 6; i++) {
        Options o;
        Model m;
        char name[100];
        int good = 1;
        options_from(&o, "--norm %s --layers 4 --channels 64 --hidden 96 --heads 4 --seq-len 20 "
                     "--vocab-size 50 --batch 1 --gate-init %g", schemes[i], i == 2 ? 0.25 : 0);
        model_create(&m, &o, 1, 0);
        Snapshot s = model_snapshot(&m);
        Config config = config_of(&o);
        for (const Tensor *t = s.list.tensors; t < s.list.tensors + s.list.count; t++)
            good = has_initial_values(&config, t, s.parameters + t->offset) && good;
        snprintf(name, sizeof name, "initial values: %s, all tensors", schemes[i]);
        check(good, name, "see above");
        model_free(&m);
    }
}

// With gates of 0 a network starts as its baseline. A tensor's random numbers depend on its name
// and on the seed.
static void test_initial_streams(void) {
    int tokens[20];
    for (int i = 0; i < 20; i++) tokens[i] = i * 7 % 50;
    for (int i = 0; i < 6; i++) {
        Options o, base, other;
        Model m, b, seeded;
        char name[100];
        int distinct = 1;
        options_from(&o, "--norm %s --layers 4 --channels 64 --hidden 96 --heads 4 --seq-len 20 "
                     "--vocab-size 50 --batch 1", schemes[i]);
        base = other = o;
        base.gpas = 0;
        other.seed = 2;
        model_create(&m, &o, 1, 0);
        model_create(&b, &base, 1, 0);
        model_create(&seeded, &other, 1, 0);
        model_forward(&m, tokens, NULL, 1, 20);
        model_forward(&b, tokens, NULL, 1, 20);
        snprintf(name, sizeof name,
                 "initial values: %s with gates of 0 equals its baseline, bit for bit", schemes[i]);
        check(same(all_logits(&m, 20), all_logits(&b, 20), 20 * 50), name, "the logits differ");
        Snapshot s = model_snapshot(&m), u = model_snapshot(&seeded);
        const Tensor *end = s.list.tensors + s.list.count;
        for (const Tensor *t = s.list.tensors; t < end; t++) {
            if (!t->cols) continue;
            distinct = distinct && s.parameters[t->offset] != u.parameters[t->offset];
            for (const Tensor *w = s.list.tensors; w < t; w++)
                distinct = distinct && s.parameters[t->offset] / (t->std) !=
                                           s.parameters[w->offset] / (w->std);
        }
        snprintf(name, sizeof name, "initial values: %s, different for each tensor and seed",
                 schemes[i]);
        check(distinct, name, "two are the same");
        model_free(&m);
        model_free(&b);
        model_free(&seeded);
    }
}

/* ------------------------------------------------------------------------------------------------
Stories: model_extend() computes a text piece by piece
*/

enum { STORY = 20, STORY_VOCABULARY = 31 };

// Replaces all parameters, the matrices by large random numbers, so that mistakes show.
static void large_parameters(Model *m) {
    Snapshot s = model_snapshot(m);
    uint64_t state = 9;
    for (const Tensor *t = s.list.tensors; t < s.list.tensors + s.list.count; t++) {
        for (size_t i = 0; i < t->size; i++) {
            double u = 2 * random_uniform(&state) - 1;
            s.parameters[t->offset + i] = (float)(t->cols ? 0.5 * u : t->size > 1 ? 1 + u / 2 : u);
        }
    }
    model_restore(m);
}

// Returns the mean of the losses of positions first to T - 1, given all logits (T,V).
static double mean_loss(const float *logits, const int *targets, int first, int T) {
    double loss = 0;
    for (int t = first; t < T; t++) {
        const float *x = logits + t * STORY_VOCABULARY;
        double sum = 0;
        for (int v = 0; v < STORY_VOCABULARY; v++) sum += exp((double)x[v]);
        loss += (log(sum) - x[targets[t]]) / (T - first);
    }
    return loss;
}

static int likeliest(const float *logits) {
    int best = 0;
    for (int v = 1; v < STORY_VOCABULARY; v++)
        if (logits[v] > logits[best]) best = v;
    return best;
}

// Compares the logits of model_extend(), called for pieces of 1 position or of 3, 1, 7, ...
// positions, with the logits (T,V) of one model_forward().
static void test_pieces(Model *m, const int *text, const float *expected, const char *what) {
    static const int ends[] = {3, 4, 11, 12, STORY};
    const int V = STORY_VOCABULARY;
    char name[200];
    float *got = zeros(STORY * V), losses[5], expected_losses[5];
    for (int t = 0; t < STORY; t++) {
        model_extend(m, text, NULL, t, t + 1);
        memcpy(got + t * V, model_logits(m, t), V * sizeof(float));
    }
    snprintf(name, sizeof name, "model_extend: %s, position by position", what);
    check_close(name, got, expected, STORY * V, tolerances[FORWARD], 0);
    memset(got, 0, STORY * V * sizeof(float));
    for (int i = 0, first = 0; i < 5; first = ends[i++]) {
        losses[i] = (float)model_extend(m, text, text + 1, first, ends[i]);
        expected_losses[i] = (float)mean_loss(expected, text + 1, first, ends[i]);
        for (int t = first; t < ends[i]; t++)
            memcpy(got + t * V, model_logits(m, t), V * sizeof(float));
    }
    snprintf(name, sizeof name, "model_extend: %s, several positions at once", what);
    check_close(name, got, expected, STORY * V, tolerances[FORWARD], 0);
    snprintf(name, sizeof name, "model_extend: %s, the losses", what);
    check_close(name, losses, expected_losses, 5, tolerances[FORWARD], 0);
}

// Extends 5 tokens to 20 by the likeliest ones, computed by model_extend(), or by model_forward()
// over the whole text for each token.
static void greedy(Model *m, int *text, int extend) {
    for (int n = 5, computed = 0; n < STORY; computed = n++) {
        if (extend) model_extend(m, text, NULL, computed, n);
        else model_forward(m, text, NULL, 1, n);
        text[n] = likeliest(model_logits(m, n - 1));
    }
}

// A model for stories keeps the keys and values of each layer, as does a model in training without
// --recompute. The others recompute all positions.
static const struct {
    const char *name;
    int B, training, recompute;
} story_models[] = {{" for stories", 1, 0, 0}, {" for two sequences", 2, 0, 0},
                    {" in training", 2, 1, 0}, {" in training with --recompute", 2, 1, 1}};

static void story_model(Model *m, Options *o, const char *scheme, int gpas, int kind) {
    int B = story_models[kind].B;
    options_from(o, "--norm %s --gpas %s --recompute %s --layers 4 --channels 16 --hidden 24 "
                 "--heads 2 --seq-len %d --vocab-size %d --batch %d", scheme, gpas ? "on" : "off",
                 story_models[kind].recompute ? "on" : "off", STORY, STORY_VOCABULARY, B);
    model_create(m, o, B, story_models[kind].training);
    large_parameters(m);
}

static void test_story(const char *scheme, int gpas) {
    int text[2 * STORY], expected_story[STORY], story[STORY];
    float *expected = NULL;
    for (int i = 0; i < 2 * STORY; i++) text[i] = i * i % STORY_VOCABULARY;
    for (int k = 0; k < 4; k++) {
        Options o;
        Model m;
        char what[100], name[200];
        story_model(&m, &o, scheme, gpas, k);
        if (k == 0) {
            model_forward(&m, text, NULL, 1, STORY);
            expected = all_logits(&m, STORY);
            memcpy(expected_story, text, sizeof story);
            greedy(&m, expected_story, 0);
        }
        if (story_models[k].training) {  // leaves its keys and values where the story's belong
            model_forward(&m, text, text + 1, 2, STORY - 1);
            model_backward(&m, text, text + 1, 2, STORY - 1, 1);
        }
        snprintf(what, sizeof what, "%s, gpas %s, a model%s", scheme, gpas ? "on" : "off",
                 story_models[k].name);
        test_pieces(&m, text, expected, what);
        memcpy(story, text, sizeof story);
        greedy(&m, story, 1);
        snprintf(name, sizeof name, "model_extend: %s, the likeliest continuation", what);
        if (sizeof(real) == sizeof(float))
            check(memcmp(story, expected_story, sizeof story) == 0, name, "other tokens");
        model_free(&m);
    }
}

static void test_stories(void) {
    for (int i = 0; i < 12; i++) test_story(schemes[i / 2], i % 2);
}

/* ------------------------------------------------------------------------------------------------
The optimizer: which parameters are changed, and by how much
*/

enum { RULE_B = 4, RULE_T = 8, RULE_V = 17 };
static const int rule_tokens[] = {0, 5, 10, 15, 3, 8, 13, 1, 6, 11, 16, 4, 9, 14, 2, 7, 12,
                                  0, 5, 10, 15, 3, 8, 13, 1, 6, 11, 16, 4, 9, 14, 2};

// Creates a small network and computes its gradient.
static void rule_model(Model *m, Options *o, const char *options) {
    options_from(o, "--layers 2 --channels 8 --hidden 12 --heads 2 --seq-len 8 --vocab-size 17 "
                 "--batch 4 --gate-init 0.5 --steps 100 --warmup 10 --lr 0.5 %s", options);
    model_create(m, o, RULE_B, 1);
    model_forward(m, rule_tokens, rule_tokens, RULE_B, RULE_T);
    model_backward(m, rule_tokens, rule_tokens, RULE_B, RULE_T, 1.0 / (RULE_B * RULE_T));
}

static void test_micro_batches(void) {
    enum { half = RULE_B / 2 };
    Options o;
    Model m;
    rule_model(&m, &o, "");
    float *whole = copy(model_snapshot(&m).gradients, m.list.size);
    zero_gradients(&m);
    for (int i = 0; i < 2; i++) {
        const int *tokens = rule_tokens + i * half * RULE_T;
        model_forward(&m, tokens, tokens, half, RULE_T);
        model_backward(&m, tokens, tokens, half, RULE_T, 1.0 / (RULE_B * RULE_T));
    }
    check_close("model_backward: two micro-batches give the gradient of the batch",
                model_snapshot(&m).gradients, whole, m.list.size, tolerances[FORWARD], 0);
    model_free(&m);
}

static void test_gradient_norms(void) {
    Options o;
    Model m;
    double norms[2], gate_norm, squares[2] = {0, 0}, gates = 0;
    rule_model(&m, &o, "--norm post");
    large_parameters(&m);  // so that the gates' part of the whole gradient is not too small to see
    zero_gradients(&m);
    model_forward(&m, rule_tokens, rule_tokens, RULE_B, RULE_T);
    model_backward(&m, rule_tokens, rule_tokens, RULE_B, RULE_T, 1.0 / (RULE_B * RULE_T));
    double norm = gradient_norms(&m, norms, &gate_norm);
    Snapshot s = model_snapshot(&m);
    for (const Tensor *t = s.list.tensors; t < s.list.tensors + s.list.count; t++) {
        double size = norm_of(s.gradients + t->offset, t->size);
        if (t->layer >= 0) squares[t->layer] += size * size;
        if (t->kind == GATE) gates += size * size;
    }
    check(fabs(norm / norm_of(s.gradients, s.list.size) - 1) < 1e-6,
          "gradient_norms: of the whole gradient", "%g", norm);
    check(fabs(gate_norm / sqrt(gates) - 1) < 1e-6, "gradient_norms: of the gates", "%g, not %g",
          gate_norm, sqrt(gates));
    check(fabs(norms[0] / sqrt(squares[0]) - 1) < 1e-6 &&
              fabs(norms[1] / sqrt(squares[1]) - 1) < 1e-6,
          "gradient_norms: of each layer", "%g %g, not %g %g", norms[0], norms[1],
          sqrt(squares[0]), sqrt(squares[1]));
    model_free(&m);
}

// In the first update Adam's m becomes a tenth of the clipped gradient, and v a thousandth of its
// square, so both show the clip factor.
static void test_clipping(double norm, double gate_norm, double clip, double gate_clip) {
    Options o;
    Model m;
    char name[120];
    rule_model(&m, &o, "--grad-clip 1 --gate-clip 0.01");
    size_t n = m.list.size;
    float *expected = copy(model_snapshot(&m).gradients, n), *expected_v = zeros(n);
    model_update(&m, 0, norm, gate_norm);
    Snapshot s = model_snapshot(&m);
    for (const Tensor *t = s.list.tensors; t < s.list.tensors + s.list.count; t++) {
        for (size_t i = t->offset; i < t->offset + t->size; i++)
            expected[i] *= (float)(0.1 * (t->kind == GATE ? gate_clip : clip));
    }
    snprintf(name, sizeof name, "model_update: a gradient of norm %g, gates %g, is clipped", norm,
             gate_norm);
    check_close(name, s.adam_m, expected, n, 1e-5, 0);
    for (size_t i = 0; i < n; i++) expected_v[i] = 0.1f * expected[i] * expected[i];
    strcat(name, ", in v too");
    check_close(name, s.adam_v, expected_v, n, 1e-4, 0);
    for (const Tensor *t = s.list.tensors; t < s.list.tensors + s.list.count; t++) {
        if (t->kind != GATE) continue;
        snprintf(name, sizeof name, "model_update: the gradient of %s is clipped", t->name);
        check_close(name, s.adam_m + t->offset, expected + t->offset, 1, 1e-5, 0);
    }
    model_free(&m);
}

// Without gradients only the weight decay is left: each matrix shrinks by the same factor, while
// norms and gates keep their bits.
static void test_weight_decay(void) {
    static const int times[] = {4, 55};  // in the warm-up, and after the rate has fallen
    for (int i = 0; i < 2; i++) {
        Options o;
        Model m;
        int kept = 1;
        rule_model(&m, &o, "--weight-decay 0.1");
        zero_gradients(&m);
        Snapshot s = model_snapshot(&m);
        float *before = copy(s.parameters, s.list.size), *expected = zeros(s.list.size);
        float *matrices = zeros(s.list.size);
        model_update(&m, times[i], 0, 0);
        s = model_snapshot(&m);
        for (const Tensor *t = s.list.tensors; t < s.list.tensors + s.list.count; t++) {
            const float *p = s.parameters + t->offset, *q = before + t->offset;
            if (!t->cols) kept = kept && same(p, q, t->size);
            for (size_t k = 0; t->cols && k < t->size; k++) {
                expected[t->offset + k] = (float)(q[k] * (1 - 0.1 * learning_rate(&o, times[i])));
                matrices[t->offset + k] = p[k];
            }
        }
        check_close(i ? "model_update: weight decay follows the learning rate"
                      : "model_update: weight decay shrinks the matrices",
                    matrices, expected, s.list.size, 1e-7, 0);
        check(kept, "model_update: norms and gates do not decay", "they change");
        model_free(&m);
    }
}

// Adam's first update moves each parameter by the learning rate, whatever the size of its gradient.
// That holds only if the bias correction of the moments is right.
static void test_first_update(void) {
    Options o;
    Model m;
    double smallest = 9, largest = 0;
    rule_model(&m, &o, "");
    Snapshot s = model_snapshot(&m);
    float *before = copy(s.parameters, s.list.size), *gradients = copy(s.gradients, s.list.size);
    model_update(&m, 0, 1, 1);
    s = model_snapshot(&m);
    for (size_t i = 0; i < s.list.size; i++) {
        if (fabs(gradients[i]) < 1e-5) continue;  // not much larger than eps
        double moved = (before[i] - s.parameters[i]) / learning_rate(&o, 0);
        if (gradients[i] < 0) moved = -moved;
        smallest = fmin(smallest, moved);
        largest = fmax(largest, moved);
    }
    check(smallest > 0.99 && largest < 1.01,
          "model_update: the first update moves each parameter by the learning rate",
          "by %g to %g of it", smallest, largest);
    model_free(&m);
}

// Fixed gates do not move even if they have moments from steps in which they were trained.
static void test_fixed_gates(void) {
    Options o;
    Model m;
    double norms[2], gate_norm;
    int good = 1;
    rule_model(&m, &o, "--gate-train off --weight-decay 0.1");
    gradient_norms(&m, norms, &gate_norm);
    check(gate_norm == 0, "--gate-train off: the gates have no gradient", "its norm is %g",
          gate_norm);
    Snapshot s = model_snapshot(&m);
    const Tensor *gates[] = {find_tensor(&m.list, GATE, 0), find_tensor(&m.list, GATE, 1)};
    for (int l = 0; l < 2; l++) s.adam_m[gates[l]->offset] = s.adam_v[gates[l]->offset] = 0.25f;
    model_restore(&m);
    for (int t = 0; t < 3; t++) step(&m, t, rule_tokens, rule_tokens, RULE_B, RULE_T);
    s = model_snapshot(&m);
    for (int l = 0; l < 2; l++) {
        size_t at = gates[l]->offset;
        good = good && s.parameters[at] == 0.5f && s.adam_m[at] == 0.25f && s.adam_v[at] == 0.25f;
    }
    check(good, "--gate-train off: the gates and their moments keep their bits", "they change");
    model_free(&m);
}

static void test_optimizer(void) {
    test_micro_batches();
    test_gradient_norms();
    test_clipping(10, 0.05, 0.1, 0.1);
    test_clipping(10, 0.5, 0.1, 0.02);
    test_clipping(0.5, 0.005, 1, 1);
    test_weight_decay();
    test_first_update();
    test_fixed_gates();
}

#ifdef CUDA_REAL
/* ------------------------------------------------------------------------------------------------
train_gpas.cu against train_gpas.c: shapes with several tiles, full and partial, and odd sizes
*/

static const Cpu *cpu;

// Loads the layers of train_gpas.c.
static void open_cpu(void) {
    void *library = dlopen("build/cpu.so", RTLD_NOW);
    if (library) cpu = (const Cpu *)dlsym(library, "cpu");
    if (!cpu) die("%s: run the tests in the project's folder, after make build/cpu.so", dlerror());
}

// Compares the result of a kernel (n) with that of train_gpas.c.
static void against_cpu(const char *what, const char *shape, const float *got,
                        const float *expected, size_t n, int pass) {
    char name[300];
    snprintf(name, sizeof name, "%s, %s, against the CPU", what, shape);
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
        cpu->attention_forward(cpu_out, cpu_lse, qkv, 0, B, T, C, NH);
        against_cpu("attention_forward", shape, out, cpu_out, n, FORWARD);
        against_cpu("attention_forward: lse", shape, lse, cpu_lse, rows, FORWARD);
        attention_backward(dqkv, dout, cpu_out, cpu_lse, qkv, B, T, C, NH);
        cpu->attention_backward(cpu_dqkv, dout, cpu_out, cpu_lse, qkv, B, T, C, NH);
        against_cpu("attention_backward", shape, dqkv, cpu_dqkv, 3 * n, BACKWARD);
    }
}

static void test_row_tiles(void) {
    static const int shapes[][2] = {{70, 8}, {70, 5}, {3, 1000}, {2, 2056}, {5, 301}, {2100, 4}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        int N = shapes[i][0], C = shapes[i][1], tokens[2100];
        size_t n = (size_t)N * C;
        float *x = random_floats(2 * n, 1, 1), *dy = random_floats(n, 1, 2);
        float *w = random_floats(C, 1, 3), *r = random_floats(N, 1, 4), *cpu_r = copy(r, N);
        float *y = random_floats(2 * n, 1, 5), *cpu_y = random_floats(2 * n, 1, 5);
        float *dw = random_floats(7 * C, 1, 6), *cpu_dw = copy(dw, 7 * C);
        char shape[64];
        snprintf(shape, sizeof shape, "%d x %d", N, C);
        rmsnorm_forward(y, r, x, w, N, C);
        cpu->rmsnorm_forward(cpu_y, cpu_r, x, w, N, C);
        against_cpu("rmsnorm_forward", shape, y, cpu_y, n, FORWARD);
        rmsnorm_backward(y, dw, dy, x, w, cpu_r, N, C);
        cpu->rmsnorm_backward(cpu_y, cpu_dw, dy, x, w, cpu_r, N, C);
        against_cpu("rmsnorm_backward: dinp", shape, y, cpu_y, n, BACKWARD);
        against_cpu("rmsnorm_backward: dweight", shape, dw, cpu_dw, C, BACKWARD);
        swiglu_forward(y, x, N, C);
        cpu->swiglu_forward(cpu_y, x, N, C);
        against_cpu("swiglu_forward", shape, y, cpu_y, n, FORWARD);
        swiglu_backward(y, dy, x, N, C);
        cpu->swiglu_backward(cpu_y, dy, x, N, C);
        against_cpu("swiglu_backward", shape, y, cpu_y, 2 * n, BACKWARD);
        for (int k = 0; k < N; k++) tokens[k] = k < 40 ? 2 : k * k % 7;  // one token many times
        embedding_backward(dw, dy, tokens, N, C);
        cpu->embedding_backward(cpu_dw, dy, tokens, N, C);
        against_cpu("embedding_backward", shape, dw, cpu_dw, 7 * C, BACKWARD);
    }
}

// More numbers than a launch has threads, so that a thread takes several, and the second stage of
// the gate's gradient adds more partial sums than its block has threads.
static void test_many_numbers(void) {
    enum { N = MOST_BLOCKS * 256 + 300, M = MOMENT_BLOCKS * 256 + 300 };
    const float gate = 0.6f;
    float *x = random_floats(N, 1, 1), *dy = random_floats(N, 1, 2), dgate = 0, cpu_dgate = 0;
    float *y = zeros(N), *cpu_y = zeros(N);
    double mean = 0, square = 0, got;
    for (int i = 0; i < N; i++) dy[i] += 0.1f * x[i];  // so that dgate does not cancel
    gpas_forward(y, x, gate, GATE_SILU, N);
    cpu->gpas_forward(cpu_y, x, gate, GATE_SILU, N);
    against_cpu("gpas_forward", "more numbers than threads", y, cpu_y, N, FORWARD);
    gpas_backward(y, &dgate, dy, x, gate, GATE_SILU, 1, N);
    cpu->gpas_backward(cpu_y, &cpu_dgate, dy, x, gate, GATE_SILU, 1, N);
    against_cpu("gpas_backward: dinp", "more numbers than threads", y, cpu_y, N, BACKWARD);
    against_cpu("gpas_backward: dgate", "more numbers than threads", &dgate, &cpu_dgate, 1,
                BACKWARD);
    for (int i = 0; i < M; i++) {
        x[i] = (float)(real)(x[i] + i % 2 + 0.5f);
        mean += (double)x[i] / M;
        square += (double)x[i] * x[i] / M;
    }
    {
        OnGpu<real> on_gpu((const float *)x, M);
        got = variance(on_gpu.p, M);
    }
    check(fabs(got / (square - mean * mean) - 1) < 1e-6, "variance: more numbers than threads",
          "%g, not %g", got, square - mean * mean);
}

// Rows so wide that the threads of a block loop twice: of the embedding, and of queries and keys.
static void test_wide_rows(void) {
    enum { N = 2, C = 2056, HS = 8, T = 2 };
    static const int tokens[N] = {1, 0};
    float *weight = random_floats(2 * C, 1, 1), *out = zeros(N * C), *expected = zeros(3 * N * C);
    float *qkv = random_floats(3 * N * C, 1, 2), *table = zeros(T * HS);
    for (int n = 0; n < N; n++) memcpy(expected + n * C, weight + tokens[n] * C, C * sizeof(float));
    embedding_forward(out, tokens, weight, N, C);
    check_close("embedding_forward: rows of 2056", out, expected, N * C, tolerances[FORWARD], 0);
    rope_angles(table, T, HS);
    memcpy(expected, qkv, 3 * N * C * sizeof(float));
    for (int i = 0; i < N * C; i++) {  // each pair of queries and keys
        float *x = expected + i / C * 3 * C + i % C * 2, x0 = x[0];
        const float *angle = table + i / C % T * HS + i % C * 2 % HS;
        x[0] = x0 * angle[0] - x[1] * angle[1];
        x[1] = x0 * angle[1] + x[1] * angle[0];
    }
    rope_forward(qkv, table, 1, T, C, HS);
    check_close("rope_forward: rows of 3 x 2056", qkv, expected, 3 * N * C, tolerances[FORWARD], 0);
}

// The positions of each token must come in order, whatever the arrays held before. The segments of
// token 3, which has several, must come first.
static void test_sort_by_token(void) {
    enum { N = 2 * SEGMENT + 6, V = 5 };
    static const int first_tokens[7] = {3, 0, 4, 3, 0, 1, 4};
    static const int first_positions[6] = {1, 4, 5, 0, 3, 7};
    static const Segment expected[6] = {
        {3, 3, SEGMENT + 3, 3}, {3, SEGMENT + 3, 2 * SEGMENT + 3, 0},
        {3, 2 * SEGMENT + 3, N - 2, 0}, {0, 0, 2, 1}, {1, 2, 3, 1}, {4, N - 2, N, 1}};
    int tokens[N], positions[N];
    Segment segments[N];
    Occurrences o = {positions, segments, 9, 9, 9};
    for (int i = 0; i < N; i++) tokens[i] = i < 7 ? first_tokens[i] : 3;
    memset(positions, 9, sizeof positions);
    memset(segments, 9, sizeof segments);
    sort_by_token(&o, tokens, N, V);
    check(memcmp(positions, first_positions, sizeof first_positions) == 0 &&
          positions[N - 3] == N - 1 && positions[N - 2] == 2 && positions[N - 1] == 6,
          "sort_by_token: the positions of four tokens", "the last is %d", positions[N - 1]);
    check(o.num_positions == N && o.num_segments == 6 && o.num_partial == 3 &&
          memcmp(segments, expected, sizeof expected) == 0,
          "sort_by_token: the segments of four tokens", "%d, %d of them partial",
          o.num_segments, o.num_partial);
}

// Three products that differ only in which matrices are transposed. gemm() must not use the plan of
// one for another.
static void test_square_matmul(void) {
    enum { N = 16, n = N * N };
    float *x = random_floats(n, 1, 1), *w = random_floats(n, 1, 2), *dy = random_floats(n, 1, 3);
    float *got[3], *expected[3];
    static const char *const names[] = {"forward: out", "backward: dinp", "backward: dweight"};
    for (int k = 0; k < 3; k++) {
        got[k] = zeros(n);
        expected[k] = zeros(n);
    }
    for (int i = 0; i < n * N; i++) {
        int row = i / n, column = i / N % N, k = i % N;
        expected[0][row * N + column] += x[row * N + k] * w[column * N + k];
        expected[1][row * N + column] += dy[row * N + k] * w[k * N + column];
        expected[2][row * N + column] += dy[k * N + row] * x[k * N + column];
    }
    matmul_forward(got[0], x, w, N, N, N);
    matmul_backward(got[1], got[2], dy, x, w, N, N, N);
    for (int k = 0; k < 3; k++) {
        char name[100];
        snprintf(name, sizeof name, "matmul_%s, all matrices 16 x 16", names[k]);
        check_close(name, got[k], expected[k], n, tolerances[k > 0], 0);
    }
}

static void test_alignment_of(void) {
    static const uintptr_t cases[][4] = {{512, 512, 512, 256}, {528, 512, 256, 16},
                                         {512, 520, 256, 8}, {256, 512, 768 + 32, 32}};
    for (int i = 0; i < 4; i++) {
        const uintptr_t *c = cases[i];
        int got = alignment_of((void *)c[0], (void *)c[1], (void *)c[2]);
        check(got == (int)c[3], "alignment_of three addresses", "%d, not %d", got, (int)c[3]);
    }
}

// Each number of each tensor must be in exactly one chunk, even if a tensor has several.
static void test_chunks(void) {
    Options o;
    int good = 1;
    options_from(&o, "--layers 2 --channels 68 --hidden 90 --heads 2 --vocab-size 131");
    Config c = config_of(&o);
    Layout layout = lay_out(&c);
    char *times = (char *)allocate(layout.size, 1);
    for (int i = 0; i < layout.num_chunks; i++) {
        const Chunk *chunk = &layout.chunks[i];
        for (int k = 0; k < chunk->size; k++) times[chunk->offset + k]++;
    }
    const Tensor *end = layout.list.tensors + layout.list.count;
    for (const Tensor *t = layout.list.tensors; t < end; t++) {
        const char *first = times + offset_of(&layout, t->kind, t->layer);
        for (size_t k = 0; k < t->size; k++) good = good && first[k] == 1;
    }
    check(good, "lay_out: each parameter is in one chunk", "in none, or in several");
    free(times);
    free_layout(&layout);
}

static void test_crossentropy_tiles(void) {
    static const int widths[] = {259, 5000, 5001, 8};  // 5001: each thread sees several logits
    for (int i = 0; i < 4; i++) {
        int N = 5, V = widths[i], targets[] = {0, V - 1, 3, V / 2, 7};
        size_t n = (size_t)N * V;
        float *x = random_floats(n, 4, 1), *losses = zeros(N), *lse = zeros(N);
        float *cpu_losses = zeros(N), *cpu_lse = zeros(N);
        char shape[64];
        snprintf(shape, sizeof shape, "V %d", V);
        x[n - 3] = 40;  // one large logit
        float *cpu_x = copy(x, n);
        crossentropy_forward(losses, lse, x, targets, N, V);
        cpu->crossentropy_forward(cpu_losses, cpu_lse, cpu_x, targets, N, V);
        against_cpu("crossentropy_forward", shape, losses, cpu_losses, N, FORWARD);
        crossentropy_backward(x, cpu_lse, targets, 0.2f, N, V);
        cpu->crossentropy_backward(cpu_x, cpu_lse, targets, 0.2f, N, V);
        against_cpu("crossentropy_backward", shape, x, cpu_x, n, BACKWARD);
    }
}

// Rows of logits may be longer than V. The rest must be ignored, and its gradient must be 0.
static void test_crossentropy_padding(void) {
    enum { N = 3, V = 19, STRIDE = 24 };
    static const int targets[N] = {18, 0, 7};
    float *x = random_floats(N * STRIDE, 4, 1), *cpu_x = zeros(N * V);
    float *losses = zeros(N), *cpu_losses = zeros(N), *cpu_lse = zeros(N), *dx = zeros(N * V);
    int clean = 1;
    for (int n = 0; n < N; n++) {
        for (int v = V; v < STRIDE; v++) x[n * STRIDE + v] = 50;
        memcpy(cpu_x + n * V, x + n * STRIDE, V * sizeof(float));
    }
    {
        OnGpu<real> logits(x, N * STRIDE);
        OnGpu<float> e(losses, N);
        Constants<int> t(targets, N);
        crossentropy<real>(e.p, logits.p, t.p, 0.2f, N, V, STRIDE);
    }
    cpu->crossentropy_forward(cpu_losses, cpu_lse, cpu_x, targets, N, V);
    cpu->crossentropy_backward(cpu_x, cpu_lse, targets, 0.2f, N, V);
    for (int n = 0; n < N; n++) {
        memcpy(dx + n * V, x + n * STRIDE, V * sizeof(float));
        for (int v = V; v < STRIDE; v++) clean = clean && x[n * STRIDE + v] == 0;
    }
    against_cpu("crossentropy", "rows of 24 with V 19, losses", losses, cpu_losses, N, FORWARD);
    against_cpu("crossentropy", "rows of 24 with V 19, dlogits", dx, cpu_x, N * V, BACKWARD);
    check(clean, "crossentropy: the gradient beyond V is 0", "it is not");
}

// A residual sum, GPAS and RMSNorm of N rows of C channels, and their gradients.
typedef struct {
    int N, C, norm_last, stop_grad, activation;
    float A, inp_gate, sum_gate;              // sum_gate is not used with the norm last
    float *inp, *branch, *weight;             // given
    float *sum, *normed, *rstd;               // the forward pass
    float *dx, *dfinp;                        // given; dx is overwritten
    float *dsum, *dweight, dgate;             // the backward pass
    double dgate_scale;                       // a'(g) ||x|| ||dy||, to which its error is relative
} Operations;

static double gate_scale(float gate, int activation, const float *x, const float *dy, size_t n) {
    return fabs(gate_slope(gate, activation)) * norm_of(x, n) * norm_of(dy, n);
}

static Operations operations(int N, int C, int norm_last, int stop_grad, int zero) {
    size_t n = (size_t)N * C;
    Operations f;
    f.N = N;
    f.C = C;
    f.norm_last = norm_last;
    f.stop_grad = stop_grad;
    f.activation = zero ? GATE_IDENTITY : GATE_SILU;
    f.A = norm_last ? 1.7f : 1;
    f.inp_gate = norm_last && zero ? 1 : 0.6f;  // 1 - a(1) is exactly 0
    f.sum_gate = zero ? 1 : -0.4f;
    f.inp = random_floats(n, 1, 1);
    f.branch = random_floats(n, 1, 2);
    f.weight = random_floats(C, 1, 3);
    f.sum = random_floats(n, 1, 4);
    f.normed = random_floats(n, 1, 4);
    f.rstd = random_floats(N, 1, 4);
    f.dx = random_floats(n, 1, 5);
    for (size_t i = 0; i < n; i++) f.dx[i] += f.inp[i];  // so that the sum for dgate is large
    f.dfinp = random_floats(n, 1, 6);
    f.dsum = random_floats(n, 1, 4);
    f.dweight = random_floats(C, 1, 7);
    f.dgate = 0.3f;
    return f;
}

// Runs the plain kernels, one after the other.
static void run_plain(Operations *f) {
    int N = f->N, C = f->C;
    size_t n = (size_t)N * C;
    float *x = zeros(n), *y = zeros(n), *g = zeros(n);
    gpas_forward(x, f->inp, f->inp_gate, f->activation, n);
    residual_forward(f->sum, x, f->branch, f->A, n);
    if (f->norm_last) {
        rmsnorm_forward(f->normed, f->rstd, f->sum, f->weight, N, C);
        residual_forward(y, f->dfinp, f->dx, 1, n);  // dy
        rmsnorm_backward(f->dsum, f->dweight, y, f->sum, f->weight, f->rstd, N, C);
        residual_backward(g, f->dsum, f->A, n);
        f->dgate_scale = gate_scale(f->inp_gate, f->activation, f->inp, g, n);
        gpas_backward(f->dx, &f->dgate, g, f->inp, f->inp_gate, f->activation, f->stop_grad, n);
        return;
    }
    gpas_forward(y, f->sum, f->sum_gate, f->activation, n);
    rmsnorm_forward(f->normed, f->rstd, y, f->weight, N, C);
    rmsnorm_backward(g, f->dweight, f->dfinp, y, f->weight, f->rstd, N, C);
    residual_forward(g, g, f->dx, 1, n);
    f->dgate_scale = gate_scale(f->sum_gate, f->activation, f->sum, g, n);
    gpas_backward(f->dx, &f->dgate, g, f->sum, f->sum_gate, f->activation, f->stop_grad, n);
}

// Runs a fused kernel for each pass. The backward one gets what the plain forward pass computed.
static void run_fused(Operations *f, const Operations *plain) {
    int N = f->N, C = f->C;
    size_t n = (size_t)N * C;
    float *sum = copy(plain->sum, n);
    OnGpu<float> inp_gate((const float *)&f->inp_gate, 1), sum_gate((const float *)&f->sum_gate, 1);
    OnGpu<float> w((const float *)f->weight, C);
    OnGpu<real> x((const float *)f->inp, n), b((const float *)f->branch, n);
    Fused<real> a = {};
    a.N = N;
    a.C = C;
    a.weight = w.p;
    a.A = f->A;
    a.inp_gate = inp_gate.p;
    a.sum_gate = f->norm_last ? NULL : sum_gate.p;
    a.activation = f->activation;
    a.stop_grad = f->stop_grad;
    a.inp = x.p;
    a.branch = b.p;
    {
        OnGpu<real> s(f->sum, n), normed(f->normed, n);
        OnGpu<float> rstd(f->rstd, N);
        a.sum = s.p;
        a.normed = normed.p;
        a.rstd = rstd.p;
        residual_gpas_rmsnorm_forward<real>(a);
    }
    OnGpu<real> s((const float *)sum, n), dx(f->dx, n), dfinp((const float *)f->dfinp, n);
    OnGpu<real> dsum(f->dsum, n);
    OnGpu<float> rstd((const float *)plain->rstd, N), dw(f->dweight, C), dg(&f->dgate, 1);
    a.sum = s.p;
    a.rstd = rstd.p;
    a.dx = dx.p;
    a.dsum = dsum.p;
    a.dfinp = dfinp.p;
    a.dweight = dw.p;
    a.dgate = dg.p;
    residual_gpas_rmsnorm_backward<real>(a, f->norm_last);
}

// With `zero` GPAS multiplies by exactly 0. The gate's gradient must still be right.
static void test_fused_kernels(int N, int C, int norm_last, int stop_grad, int zero) {
    Operations f = operations(N, C, norm_last, stop_grad, zero);
    Operations p = operations(N, C, norm_last, stop_grad, zero);
    int n = N * C;
    const struct {
        const char *name;
        float *got, *expected;
        int n, pass;
    } results[] = {
        {"forward: sum", f.sum, p.sum, n, FORWARD},
        {"forward: normed", f.normed, p.normed, n, FORWARD},
        {"forward: rstd", f.rstd, p.rstd, N, FORWARD},
        {"backward: dx", f.dx, p.dx, n, BACKWARD},
        {"backward: dweight", f.dweight, p.dweight, C, BACKWARD},
        {"backward: dgate", &f.dgate, &p.dgate, 1, BACKWARD},
        {"backward: dsum", f.dsum, p.dsum, norm_last ? n : 0, BACKWARD},
    };
    run_plain(&p);
    run_fused(&f, &p);
    for (size_t i = 0; i < sizeof results / sizeof *results && results[i].n; i++) {
        char name[200];
        snprintf(name, sizeof name, "%s_%s, %d x %d, stop-gradient %s%s, against the plain kernels",
                 norm_last && i > 2 ? "gpas_residual_rmsnorm" : "residual_gpas_rmsnorm",
                 results[i].name, N, C, stop_grad ? "on" : "off", zero ? ", 1 - a(g) = 0" : "");
        check_close(name, results[i].got, results[i].expected, results[i].n,
                    tolerances[results[i].pass],
                    results[i].got == &f.dgate ? p.dgate_scale : 0);
    }
    free_floats();
}

// Each function must request enough memory from scratch() for its kernels. This memory never
// shrinks, so this test comes first, and each call needs more than the calls before it. The checked
// build detects an access beyond the end.
static void test_scratch(void) {
    enum { T = 9, C = 8, NH = 2, n = T * C, WIDE = 1000 };
    static const int tokens[SEGMENT + 1] = {0};
    float *qkv = random_floats(3 * n, 1, 1), *dqkv = zeros(3 * n), *dout = random_floats(n, 1, 2);
    float *out = zeros(n), *lse = zeros(NH * T), dgate = 0;
    float *dy = random_floats((SEGMENT + 1) * WIDE, 1, 3), *dweight = zeros(WIDE);
    gpas_backward(out, &dgate, dout, qkv, 0.5f, GATE_SILU, 1, n);
    attention_forward(out, lse, qkv, 0, 1, T, C, NH);
    attention_backward(dqkv, dout, out, lse, qkv, 1, T, C, NH);
    {
        OnGpu<real> x((const float *)qkv, n);
        variance(x.p, n);
    }
    embedding_backward(dweight, dy, tokens, SEGMENT + 1, WIDE);
    test_fused_kernels(2100, 12, 0, 1, 0);
}

static void test_fused(void) {
    static const int shapes[][2] = {{9, 72}, {5, 301}, {2100, 8}};
    for (int i = 0; i < 3; i++) {
        for (int k = 0; k < 8; k++)
            test_fused_kernels(shapes[i][0], shapes[i][1], k / 4, k / 2 % 2, k % 2);
    }
}

// Gives both networks the parameters of m, rounded to `real`.
static void share_parameters(Model *m, CpuModel *c) {
    Snapshot s = model_snapshot(m);
    float *parameters = cpu->parameters(c);
    for (size_t i = 0; i < s.list.size; i++)
        parameters[i] = s.parameters[i] = (float)(real)s.parameters[i];
    model_restore(m);
}

// In bf16 the weights of the dump are rounded before any kernel runs. So the reference is the
// network of train_gpas.c, itself checked against the dump, with the rounded weights. Rounding
// errors grow from layer to layer, so each tensor need only be within 0.1. The error of the whole
// gradient depends on chance in so small a network (other weights can double it), so
// test_odd_network() compares it in a larger one.
static void test_rounded_network(const char *scheme, const char *kind, const char *options) {
    enum { B = 2, T = 6, V = 19 };
    Options o;
    Model m;
    char of[64], name[200];
    float losses[10], cpu_losses[10];
    const int *tokens = (const int *)tensor("tokens", NULL, NULL);
    const int *targets = (const int *)tensor("targets", NULL, NULL);
    dump_options(&o, scheme, options);
    model_create(&m, &o, B, 1);
    CpuModel *c = cpu->create(&o, B);
    dump_weights(&m);
    share_parameters(&m, c);
    snprintf(of, sizeof of, "net.%s.%s", scheme, kind);
    model_forward(&m, tokens, targets, B, T);
    float *logits = all_logits(&m, B * T);
    for (int t = 0; t < 10; t++) {
        losses[t] = (float)step(&m, t, tokens, targets, B, T);
        cpu_losses[t] = (float)cpu->differentiate(c, tokens, targets, B, T);
        if (t == 0) {
            Snapshot s = model_snapshot(&m);
            const float *gradients = cpu->gradients(c);
            snprintf(name, sizeof name, "model_forward %s: logits", of);
            check_close(name, logits, cpu->logits(c), B * T * V, tolerances[FORWARD], 0);
            for (int i = s.list.count - 1; i >= 0; i--) {
                const Tensor *w = &s.list.tensors[i];
                int gate = w->kind == GATE;
                double scale = gate ? part(of, "gate_scale", NULL, NULL)[w->layer] : 0;
                snprintf(name, sizeof name, "model_backward %s: grad.%s", of, w->name);
                check_close(name, s.gradients + w->offset, gradients + w->offset, w->size,
                            gate ? tolerances[BACKWARD] : 0.1, scale);
            }
        }
        cpu->update(c, t);
    }
    snprintf(name, sizeof name, "model after ten updates, %s: losses", of);
    check_close(name, losses, cpu_losses, 10, tolerances[FORWARD], 0);
    model_free(&m);
    cpu->destroy(c);
}

// Compares the gradients of a network with the CPU's: all together and, in fp32, those of the
// gates, which are small next to the others and too inaccurate in bf16. The backward pass begins
// with the last tensors of the list, so the last wrong one shows which layer is wrong.
static void gradients_against_cpu(const char *what, const TensorList *list, const float *got,
                                  const float *expected) {
    double tolerance = tolerances[BACKWARD], sum = 0, size = 0, gate_sum = 0, gate_size = 0;
    const char *wrong = "a gate";
    char name[300];
    for (const Tensor *t = list->tensors; t < list->tensors + list->count; t++) {
        double square = 0, own = norm_of(expected + t->offset, t->size);
        for (size_t i = t->offset; i < t->offset + t->size; i++)
            square += ((double)got[i] - expected[i]) * ((double)got[i] - expected[i]);
        sum += square;
        size += own * own;
        if (t->kind == GATE) {
            gate_sum += square;
            gate_size += own * own;
        } else if (!(sqrt(square) <= 5 * tolerance * own)) {  // also true for NaN
            wrong = t->name;
        }
    }
    double error = sqrt(sum / size), gate_error = gate_size ? sqrt(gate_sum / gate_size) : 0;
    snprintf(name, sizeof name, "%s: gradients, against the CPU (%.1e)", what, error);
    check(error <= tolerance, name, "exceeds %.0e; the last wrong tensor is %s", tolerance, wrong);
    if (sizeof(real) < sizeof(float) || !gate_size) return;
    snprintf(name, sizeof name, "%s: the gates' gradients, against the CPU (%.1e)", what,
             gate_error);
    check(gate_error <= tolerance, name, "exceeds %.0e", tolerance);
}

// Tests a network with more rows than a tile has, each not a multiple of 16 bytes long.
// Compares its loss, its gradients and its numbers for layers.csv with the same network of
// train_gpas.c, and its last logits from model_extend() in two pieces with those from one pass.
static void test_odd_network(const char *scheme, const char *options, int fused) {
    enum { B = 2, T = 70 };
    int tokens[B * T + 1];
    Options o;
    Model m;
    char name[200];
    const char *gates = strstr(options, "--gpas off") || strstr(options, "--gate-init")
                            ? "" : "--gate-init 0.3";
    for (int i = 0; i <= B * T; i++) tokens[i] = i * i % 61;
    options_from(&o, "--norm %s %s %s --layers 4 --channels 36 --hidden 50 --heads 2 --fused %s "
                 "--seq-len %d --vocab-size 61 --batch %d", scheme, options, gates,
                 fused ? "on" : "off", T, B);
    model_create(&m, &o, B, 1);
    CpuModel *c = cpu->create(&o, B);
    share_parameters(&m, c);
    float loss = (float)model_forward(&m, tokens, tokens + 1, B, T);
    float cpu_loss = (float)cpu->differentiate(c, tokens, tokens + 1, B, T);
    model_backward(&m, tokens, tokens + 1, B, T, 1.0 / (B * T));
    snprintf(name, sizeof name, "model, %s %s%s", scheme, options, fused ? "" : " --fused off");
    against_cpu(name, "C 36, H 50, V 61: loss", &loss, &cpu_loss, 1, FORWARD);
    strcat(name, ", C 36, H 50, V 61");
    gradients_against_cpu(name, &m.list, model_snapshot(&m).gradients, cpu->gradients(c));
    for (int l = 0; l < 4; l++) {
        double v[2], cpu_v[2], gate, cpu_gate;
        layer_state(&m, l, B, T, v, &gate);
        cpu->layer_state(c, l, B, T, cpu_v, &cpu_gate);
        snprintf(name, sizeof name, "layer_state, %s %s%s, layer %d", scheme, options,
                 fused ? "" : " --fused off", l);
        check(fabs(v[0] / cpu_v[0] - 1) < tolerances[BACKWARD] &&
                  fabs(v[1] / cpu_v[1] - 1) < tolerances[BACKWARD] &&
                  (gate == cpu_gate || isnan(gate + cpu_gate)),
              name, "%g %g %g, not %g %g %g", v[0], v[1], gate, cpu_v[0], cpu_v[1], cpu_gate);
    }
    model_forward(&m, tokens, NULL, 1, T);
    float *logits = copy(model_logits(&m, T - 1), 61);
    model_extend(&m, tokens, NULL, 0, 41);
    model_extend(&m, tokens, NULL, 41, T);
    snprintf(name, sizeof name, "model_extend, %s %s%s", scheme, options,
             fused ? "" : " --fused off");
    check_close(name, model_logits(&m, T - 1), logits, 61, tolerances[FORWARD], 0);
    model_free(&m);
    cpu->destroy(c);
}

static void test_odd_kernels(const char *scheme, const char *, const char *options) {
    test_odd_network(scheme, options, 1);
    test_odd_network(scheme, options, 0);
}

static void test_odd_networks(void) {
    for_each_network(test_odd_kernels);
    test_odd_kernels("post", "", "--gate-act identity --gate-init 1");  // GPAS multiplies by 0
}

// Only model_backward() may begin the backward pass, because zero_gradients() may be called after
// model_forward().
static void test_late_backward(void) {
    Options o;
    Model m;
    float *gradients[2];
    rule_model(&m, &o, "");
    model_update(&m, 0, 1, 1);
    for (int early = 0; early < 2; early++) {
        if (early) zero_gradients(&m);
        model_forward(&m, rule_tokens, rule_tokens, RULE_B, RULE_T);
        if (!early) zero_gradients(&m);
        model_backward(&m, rule_tokens, rule_tokens, RULE_B, RULE_T, 1.0 / (RULE_B * RULE_T));
        gradients[early] = copy(model_snapshot(&m).gradients, m.list.size);
    }
    check(same(gradients[0], gradients[1], m.list.size),
          "model_backward: the same bits with zero_gradients() before or after model_forward()",
          "they differ");
    model_free(&m);
}

// Two steps give the same bits each time, whatever the order in which the CPU runs the blocks.
static void test_order_of_blocks(void) {
    enum { B = 2, T = 70 };
    static const char *const orders[] = {"", "reverse", "shuffle"};
    int tokens[B * T + 1];
    float *parameters[3];
    size_t n = 0;
    for (int i = 0; i <= B * T; i++) tokens[i] = i * i % 61;
    for (int k = 0; k < 3; k++) {
        Options o;
        Model m;
        setenv("CUDA_ON_CPU_ORDER", orders[k], 1);
        options_from(&o, "--layers 2 --channels 32 --hidden 50 --heads 2 --seq-len 70 --batch 2 "
                     "--vocab-size 61 --gate-init 0.3 --warmup 0");
        model_create(&m, &o, B, 1);
        for (int t = 0; t < 2; t++) step(&m, t, tokens, tokens + 1, B, T);
        n = m.list.size;
        parameters[k] = copy(model_snapshot(&m).parameters, n);
        model_free(&m);
    }
    unsetenv("CUDA_ON_CPU_ORDER");
    check(same(parameters[0], parameters[1], n) && same(parameters[0], parameters[2], n),
          "two steps give the same bits in any order of the blocks", "they differ");
}

static void test_all_networks(void) {
    for_each_network(sizeof(real) == sizeof(float) ? test_network : test_rounded_network);
}

static int run_tests(void) {
    static void (*const tests[])(void) = {
        test_scratch, test_gpas, test_residual, test_embedding, test_rmsnorm, test_rope,
        test_swiglu, test_matmul, test_attention, test_crossentropy, test_adamw, test_square_matmul,
        test_alignment_of, test_chunks, test_row_tiles, test_many_numbers, test_wide_rows,
        test_sort_by_token, test_fused, test_attention_tiles, test_crossentropy_tiles,
        test_crossentropy_padding, test_long_attention, test_attention_extended, test_optimizer,
        test_late_backward, test_all_networks, test_recompute, test_odd_networks, test_stories,
        test_initial_values, test_initial_streams, test_order_of_blocks,
    };
    open_device();
    open_cpu();
    open_dump("dev/test/reference.safetensors");
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        tests[i]();
        free_floats();
    }
    return summary();
}
}  // namespace kernels

int main() { return kernels::run_tests(); }

#else
/* ------------------------------------------------------------------------------------------------
train_gpas.c alone: learning, shapes, threads
*/

static void test_networks(void) { for_each_network(test_network); }

// A small network can memorize a text in which each token occurs only once.
static void test_learning(void) {
    static const int tokens[] = {3, 7, 1, 9, 4, 12, 8, 2, 5, 11, 6, 10, 0};
    int threads = omp_get_max_threads();
    omp_set_num_threads(1);  // threads would wait for each other more than they compute
    for (int i = 0; i < 12; i++) {
        Options o;
        Model m;
        char name[100];
        double loss = 0;
        options_from(&o, "--norm %s --gpas %s --layers 4 --channels 32 --hidden 48 --heads 4 "
                     "--seq-len 12 --vocab-size 13 --batch 1 --lr 0.01 --warmup 20 --steps 200",
                     schemes[i / 2], i % 2 ? "on" : "off");
        model_create(&m, &o, 1, 1);
        for (int t = 0; t <= 200; t++) loss = step(&m, t, tokens, tokens + 1, 1, 12);
        snprintf(name, sizeof name, "learning: %s, gpas %s, the loss is below 0.05 after 200 steps",
                 schemes[i / 2], i % 2 ? "on" : "off");
        check(loss < 0.05, name, "the loss is %.4f", loss);
        model_free(&m);
    }
    omp_set_num_threads(threads);
}

// Heads of 70 channels are wider than a panel, and not a multiple of its width.
static void test_wide_attention(void) {
    enum { B = 2, T = 290, NH = 2, C = NH * 70, n = B * T * C };
    float *qkv = random_floats(3 * n, 0.7, 5), *dout = random_floats(n, 1, 6);
    float *out = random_floats(n, 1, 1), *lse = random_floats(B * NH * T, 1, 1);
    float *dqkv = random_floats(3 * n, 1, 1), *expected = zeros(n), *dexpected = zeros(3 * n);
    float *expected_lse = zeros(B * NH * T);
    define_attention(expected, expected_lse, dexpected, dout, qkv, B, T, C, NH);
    attention_forward(out, lse, qkv, 0, B, T, C, NH);
    attention_backward(dqkv, dout, out, lse, qkv, B, T, C, NH);
    check_close("attention_forward: heads of 70 channels", out, expected, n, 1e-5, 0);
    check_close("attention_backward: heads of 70 channels", dqkv, dexpected, 3 * n, 1e-4, 0);
}

// Lengths around the numbers of queries and keys in a block.
static void test_attention_lengths(void) {
    static const int lengths[] = {1, 2, 63, 64, 65, 127, 128, 129, 200, 256, 257, 320};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        int B = 2, T = lengths[i], NH = 3, C = 3 * 6;
        size_t n = (size_t)B * T * C;
        char name[100];
        float *qkv = random_floats(3 * n, 2, 5), *dout = random_floats(n, 1, 6);
        float *out = random_floats(n, 1, 1), *lse = random_floats((size_t)B * NH * T, 1, 1);
        float *dqkv = random_floats(3 * n, 1, 1), *expected = zeros(n), *dexpected = zeros(3 * n);
        float *expected_lse = zeros((size_t)B * NH * T);
        define_attention(expected, expected_lse, dexpected, dout, qkv, B, T, C, NH);
        attention_forward(out, lse, qkv, 0, B, T, C, NH);
        attention_backward(dqkv, dout, out, lse, qkv, B, T, C, NH);
        snprintf(name, sizeof name, "attention_forward: %d positions", T);
        check_close(name, out, expected, n, 1e-5, 0);
        snprintf(name, sizeof name, "attention_backward: %d positions", T);
        check_close(name, dqkv, dexpected, 3 * n, 1e-4, T == 1 ? norm_of(dout, n) : 0);
        free_floats();
    }
}

// Compares C = A B or C += A B, with A or B transposed or not, by gemm() and by gemm_packed(), with
// three plain loops. pack() is told to expect one row of A, which must not be transposed then, or
// many. It packs one row and one column of B more than gemm_packed() needs. The tolerance is less
// than 2^-16, so that none of the six products in amx.h may be missing.
static void test_product(int M, int N, int K, int transpose_a, int transpose_b, int accumulate) {
    size_t ldc = N + 3, n = M * ldc;
    float *a = random_floats((size_t)M * K, 1, 1);
    float *b = random_floats((size_t)(K + 1) * (N + 1), 1, 2);
    float *c = random_floats(n, 1, 3), *expected = copy(c, n), *got = copy(c, n);
    Matrix A = transpose_a ? transpose(matrix(a, M)) : matrix(a, K);
    Matrix B = transpose_b ? transpose(matrix(b, K + 1)) : matrix(b, N + 1);
    char name[200], what[100];
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N; j++) {
            double sum = accumulate ? c[i * ldc + j] : 0;
            for (int k = 0; k < K; k++)
                sum += (double)A.x[i * A.row + k * A.column] * B.x[k * B.row + j * B.column];
            expected[i * ldc + j] = (float)sum;
        }
    }
    snprintf(what, sizeof what, "%d x %d, depth %d, A%s B%s%s", M, N, K, transpose_a ? "^T" : "",
             transpose_b ? "^T" : "", accumulate ? ", added to C" : "");
    gemm(got, ldc, A, B, M, N, K, accumulate);
    snprintf(name, sizeof name, "gemm: %s", what);
    check_close(name, got, expected, n, 2e-6, 0);
#ifdef AMX  // gemm() is gemm_amx() then, where Linux allows it
    memcpy(got, c, n * sizeof(float));
    gemm_vectors(got, ldc, A, B, M, N, K, accumulate);
    snprintf(name, sizeof name, "gemm_vectors: %s", what);
    check_close(name, got, expected, n, 2e-6, 0);
#endif
    for (int rows = transpose_a ? 1000 : 1; rows <= 1000; rows += 999) {
        memcpy(got, c, n * sizeof(float));
        gemm_packed(got, ldc, A, pack(0, B, K + 1, N + 1, rows), M, N, K, accumulate);
        snprintf(name, sizeof name, "gemm_packed for %d rows: %s", rows, what);
        check_close(name, got, expected, n, 2e-6, 0);
    }
    free_floats();
}

static void test_gemm(void) {
    static const int shapes[][3] = {{1, 1, 1},       {12, 32, 8},  {13, 33, 17},
                                    {100, 70, 1100}, {5, 4100, 3}, {4090, 3, 5},
                                    {1, 64, 600},    {97, 1, 31},  {24, 64, 512},
                                    {600, 520, 40},  {50, 400, 1100}, {32, 33, 513}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const int *n = shapes[i];
        for (int form = 0; form < 8; form++)
            test_product(n[0], n[1], n[2], form & 1, !(form & 2), form / 4);
    }
}

static void test_sums(void) {
    static const int sizes[] = {1, 63, 64, 65, 1000, 100003};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        int n = sizes[i];
        float *a = random_floats(n, 1, 1), *b = random_floats(n, 1, 2);
        double sum = 0, product = 0;
        char name[100];
        for (int k = 0; k < n; k++) {
            sum += a[k];
            product += (double)a[k] * b[k];
        }
        snprintf(name, sizeof name, "dot: the sum of %d products, and of their first factors", n);
        check(fabs(dot(a, b, n) - product) < 1e-9 && fabs(dot(a, NULL, n) - sum) < 1e-9, name,
              "%g and %g, not %g and %g", dot(a, b, n), dot(a, NULL, n), product, sum);
        for (int k = 0; k < n; k++) a[k] = -2 - fabsf(a[k]);
        a[n - 1] = -1;  // the largest is the last number, then the first
        int last = max_of(a, n) == -1;
        a[0] = -0.5f;
        snprintf(name, sizeof name, "max_of: the last and the first of %d negative numbers", n);
        check(last && max_of(a, n) == -0.5f, name, "%g", max_of(a, n));
    }
}

typedef void Gemm(float *, size_t, Matrix, Matrix, int, int, int, int);

// Products of several blocks in each direction have the same bits with any number of threads.
static void check_gemm_threads(Gemm *multiply, const char *function) {
    enum { M = 301, N = 4200, K = 800 };
    float *a = random_floats((size_t)M * K, 1, 1), *b = random_floats((size_t)N * K, 1, 2);
    float *c[4];
    int most = omp_get_max_threads();
    for (int threads = 1; threads <= 4; threads++) {
        float *out = c[threads - 1] = random_floats((size_t)M * N, 1, 3);
        omp_set_num_threads(threads);
        multiply(out, N, matrix(a, K), transpose(matrix(b, K)), M, N, K, 0);
        multiply(out, N, transpose(matrix(a, M)), matrix(b, N), M, N, K, 1);
        free_thread_memory();  // of each of these threads, while they exist
    }
    omp_set_num_threads(most);
    for (int i = 1; i < 4; i++) {
        char name[100];
        snprintf(name, sizeof name, "%s: %d threads give the same bits as one", function, i + 1);
        check(same(c[0], c[i], (size_t)M * N), name, "they do not");
    }
}

static void test_gemm_threads(void) {
    check_gemm_threads(gemm, "gemm");
#ifdef AMX
    check_gemm_threads(gemm_vectors, "gemm_vectors");
#endif
}

static void test_exp(void) {
    double worst = 0;
    for (int i = -86000; i <= 87000; i++) {
        float x = i * 1e-3f;
        double error = fabs(exp_fast(x) / exp((double)x) - 1);
        if (!(error <= worst)) worst = error;  // also if NaN
        if (isnan(worst)) break;
    }
    check(worst < 3e-7, "exp_fast: relative error below 3e-7 from -86 to 87", "it is %.2e", worst);
    check(exp_fast(0) == 1 && exp_fast(-1e30f) < 1e-37f && isnan(exp_fast(NAN)),
          "exp_fast: 0, far below 0, NaN", "%g %g %g", exp_fast(0), exp_fast(-1e30f),
          exp_fast(NAN));
}

// Loss, gradients and update have the same bits with 1, 2 and 3 threads.
static void test_threads(void) {
    enum { B = 3, T = 130 };
    int tokens[B * T], most = omp_get_max_threads();
    for (int i = 0; i < B * T; i++) tokens[i] = i * i % 97;
    for (int i = 0; i < 6; i++) {
        double loss[3];
        float *parameters[3], *gradients[3];
        size_t n = 0;
        char name[100];
        for (int k = 0; k < 3; k++) {
            Options o;
            Model m;
            omp_set_num_threads(k + 1);
            options_from(&o, "--norm %s --gate-init 0.3 --layers 5 --channels 60 --hidden 77 "
                         "--heads 6 --seq-len %d --vocab-size 97 --batch %d --warmup 0",
                         schemes[i], T, B);
            model_create(&m, &o, B, 1);
            loss[k] = step(&m, 0, tokens, tokens, B, T);
            n = m.list.size;
            parameters[k] = copy(m.parameters, n);
            gradients[k] = copy(m.gradients, n);
            model_free(&m);
        }
        omp_set_num_threads(most);
        snprintf(name, sizeof name, "threads: %s gives the same bits with 1, 2 and 3", schemes[i]);
        check(loss[0] == loss[1] && loss[0] == loss[2] && same(gradients[0], gradients[1], n) &&
                  same(gradients[0], gradients[2], n) && same(parameters[0], parameters[1], n) &&
                  same(parameters[0], parameters[2], n),
              name, "losses %.9g %.9g %.9g", loss[0], loss[1], loss[2]);
        free_floats();
    }
}

// The variances in layers.csv are those of the sublayers' outputs, each the next sublayer's input.
static void test_layer_state(void) {
    enum { B = 2, T = 20 };
    int tokens[B * T];
    for (int i = 0; i < B * T; i++) tokens[i] = i * i % STORY_VOCABULARY;
    for (int i = 0; i < 12; i++) {
        Options o;
        Model m;
        char name[100];
        int good = 1;
        options_from(&o, "--norm %s --gpas %s --layers 4 --channels 16 --hidden 24 --heads 2 "
                     "--seq-len %d --vocab-size %d --batch %d", schemes[i / 2],
                     i % 2 ? "on" : "off", T, STORY_VOCABULARY, B);
        model_create(&m, &o, B, 1);
        large_parameters(&m);
        model_forward(&m, tokens, NULL, B, T);
        for (int s = 0; s < 2 * o.layers - 1; s++) {
            const float *x = m.activations[s + 1].inp;
            size_t n = (size_t)B * T * o.channels;
            double mean = 0, variance = 0, variances[2], gate;
            for (size_t k = 0; k < n; k++) mean += (double)x[k] / n;
            for (size_t k = 0; k < n; k++) variance += (x[k] - mean) * (x[k] - mean) / n;
            layer_state(&m, s / 2, B, T, variances, &gate);
            good = good && fabs(variances[s % 2] / variance - 1) < 1e-5;
            good = good && (i % 2 ? gate == *m.w.layers[s / 2].gate : isnan(gate));
        }
        snprintf(name, sizeof name, "layer_state: %s, gpas %s", schemes[i / 2],
                 i % 2 ? "on" : "off");
        check(good, name, "wrong variance or gate");
        model_free(&m);
    }
}

// A model that keeps its keys and values computes only the new positions.
static void test_positions_computed(void) {
    for (size_t k = 0; k < sizeof story_models / sizeof *story_models; k++) {
        Options o;
        Model m;
        char name[100];
        const int text[STORY] = {0};
        int keeps = k % 2 == 0;
        story_model(&m, &o, "pre", 1, k);
        model_extend(&m, text, NULL, 0, 5);
        model_extend(&m, text, NULL, 5, 7);
        snprintf(name, sizeof name, "model_extend: a model%s computes %s positions",
                 story_models[k].name, keeps ? "only the new" : "all");
        check(m.first == (keeps ? 5 : 0), name, "from position %d on", m.first);
        model_free(&m);
    }
}

/* ------------------------------------------------------------------------------------------------
--check-finite
*/

// Returns a parameter, its gradient, or something else that the passes of model m read. *n becomes
// the size of two such matrices, because wk lies behind wq, and w3 behind w1.
static float *spot(Model *m, const char *name, size_t *n) {
    const struct {
        const char *name;
        float *x;
    } others[] = {
        {"logits_lse", m->logits_lse},        {"final_rstd", m->final_rstd},
        {"adam_m", m->adam_m},                {"rope_table", m->rope_table},
        {"lse", m->activations[2].lse},       {"pre_act", m->activations[3].pre_act},
        {"rstd", m->activations[3].rstd},     {"post_rstd", m->activations[3].post_rstd},
    };
    int gradient = strncmp(name, "gradient of ", 12) == 0;
    *n = 1;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (strcmp(others[i].name, name) == 0) return others[i].x;
    for (const Tensor *t = m->list.tensors; t < m->list.tensors + m->list.count; t++) {
        if (strcmp(t->name, name + (gradient ? 12 : 0)) != 0) continue;
        *n = 2 * t->size;
        return (gradient ? m->gradients : m->parameters) + t->offset;
    }
    die("the test knows no %s", name);
}

// One number is set to NaN or, if `fill` is not 0, all numbers of two matrices are set to `fill`.
// Then a pass runs ('f' forward, 'b' backward after a good forward pass, 'u' update). The message
// must name the operation.
typedef struct {
    char pass;
    const char *options, *name;
    float fill;
    const char *words;
} NotFinite;

static const NotFinite not_finite[] = {
    {'f', "", "tok_embeddings.weight", 0, ": embedding_forward computed"},
    {'f', "", "layers.0.attention_norm.weight", 0, "rmsnorm_forward of layer 1, attention"},
    {'f', "", "layers.0.attention.wk.weight", 0,
     "matmul_forward (wq, wk, wv) or rope_forward of layer 1, attention"},
    {'f', "", "rope_table", 0, "matmul_forward (wq, wk, wv) or rope_forward of layer 1, attention"},
    {'f', "", "layers.0.attention.wq.weight", 1e30f, "attention_forward of layer 1, attention"},
    {'f', "", "layers.1.attention.wo.weight", 0, "matmul_forward (wo) of layer 2, attention"},
    {'f', "--norm sandwich", "layers.0.attention_post_norm.weight", 0,
     "rmsnorm_forward (post_norm) of layer 1, attention"},
    {'f', "--norm sandwich", "layers.1.ffn_post_norm.weight", 0,
     "rmsnorm_forward (post_norm) of layer 2, feed-forward"},
    {'f', "--norm deepnorm", "tok_embeddings.weight", 3e38f,
     "residual_forward of layer 1, attention"},
    {'f', "", "layers.1.gate", 0, "gpas_forward of layer 2, attention"},
    {'f', "--norm post", "layers.1.gate", 0, "gpas_forward of layer 2, attention"},
    {'f', "--norm post", "layers.0.ffn_norm.weight", 0, "rmsnorm_forward of layer 1, feed-forward"},
    {'f', "", "layers.0.feed_forward.w3.weight", 0,
     "matmul_forward (w1, w3) of layer 1, feed-forward"},
    {'f', "", "layers.0.feed_forward.w1.weight", 1e30f, "swiglu_forward of layer 1, feed-forward"},
    {'f', "", "layers.1.feed_forward.w2.weight", 0, "matmul_forward (w2) of layer 2, feed-forward"},
    {'f', "", "norm.weight", 0, ": rmsnorm_forward (final) computed"},
    {'f', "", "output.weight", 0, ": matmul_forward (output) computed"},
    {'b', "", "logits_lse", 0, ": crossentropy_backward computed"},
    {'b', "", "output.weight", 0, ": matmul_backward (output) computed"},
    {'b', "", "final_rstd", 0, ": rmsnorm_backward (final) computed"},
    {'b', "--stop-grad off", "layers.1.gate", 0, "gpas_backward of layer 2, feed-forward"},
    {'b', "--norm sandwich", "post_rstd", 0,
     "rmsnorm_backward (post_norm) of layer 2, feed-forward"},
    {'b', "", "layers.1.feed_forward.w2.weight", 0,
     "matmul_backward (wo or w2) of layer 2, feed-forward"},
    {'b', "", "pre_act", 0, "swiglu_backward of layer 2, feed-forward"},
    {'b', "", "layers.1.feed_forward.w1.weight", 0,
     "matmul_backward (wqkv or w13) of layer 2, feed-forward"},
    {'b', "", "rstd", 0, "rmsnorm_backward of layer 2, feed-forward"},
    {'b', "", "layers.0.attention.wo.weight", 0,
     "matmul_backward (wo or w2) of layer 1, attention"},
    {'b', "", "lse", 0, "attention_backward or rope_backward of layer 2, attention"},
    {'b', "", "rope_table", 0, "attention_backward or rope_backward of layer 2, attention"},
    {'b', "", "layers.0.attention.wv.weight", 0,
     "matmul_backward (wqkv or w13) of layer 1, attention"},
    {'b', "--norm post", "rstd", 0, "rmsnorm_backward of layer 2, feed-forward"},
    {'b', "--norm post --gpas off", "rstd", 0, "rmsnorm_backward of layer 2, feed-forward"},
    {'b', "--norm post --stop-grad off", "layers.0.gate", 0,
     "gpas_backward of layer 1, feed-forward"},
    {'b', "--norm post --stop-grad off --gate-train off", "layers.0.gate", 0,
     "residual_backward, gpas_backward or add of layer 1, feed-forward"},
    {'b', "--norm post", "layers.0.feed_forward.w2.weight", 0,
     "matmul_backward (wo or w2) of layer 1, feed-forward"},
    {'b', "", "gradient of tok_embeddings.weight", 0,
     "the backward pass for tok_embeddings.weight computed"},
    {'b', "", "gradient of layers.1.attention.wk.weight", 0,
     "the backward pass for layers.1.attention.wk.weight computed"},
    {'b', "--norm post", "gradient of layers.0.ffn_norm.weight", 0,
     "the backward pass for layers.0.ffn_norm.weight computed"},
    {'u', "", "adam_m", 0, ": adamw_update computed"},
};

static const int finite_text[13] = {3, 7, 0, 9, 4, 2, 8, 3, 5, 10, 6, 10, 0};

// Plants the NaN in the forked child's memory and runs the pass. stderr goes to `said`.
static void compute_not_finite(Model *m, const NotFinite *row, FILE *said) {
    size_t n;
    dup2(fileno(said), 2);
    omp_set_num_threads(1);  // threads do not survive a fork
    float *x = spot(m, row->name, &n);
    if (row->fill == 0) *x = NAN;
    for (size_t k = 0; k < n && row->fill != 0; k++) x[k] = row->fill;
    if (strstr(row->options, "deepnorm"))  // makes the branch 0
        memset(spot(m, "layers.0.attention.wq.weight", &n), 0, 4 * 64 * sizeof(float));
    if (row->pass == 'f') model_forward(m, finite_text, finite_text + 1, 2, 6);
    if (row->pass == 'b') model_backward(m, finite_text, finite_text + 1, 2, 6, 1.0 / 12);
    if (row->pass == 'u') model_update(m, 0, 1, 1);
    _exit(0);
}

// LeakSanitizer cannot check a forked process.
static pid_t parent;
static void leave_at_once(void) {
    if (getpid() != parent) _exit(1);
}

static void test_check_finite(void) {
    parent = getpid();
    atexit(leave_at_once);
    for (size_t i = 0; i < sizeof not_finite / sizeof *not_finite; i++) {
        const NotFinite *row = &not_finite[i];
        Options o;
        Model m;
        char name[300], errors[2000] = "";
        int status = -1;
        FILE *said = tmpfile();
        options_from(&o, "--layers 2 --channels 8 --hidden 12 --heads 2 --seq-len 6 --batch 2 "
                     "--vocab-size 11 --check-finite on %s", row->options);
        model_create(&m, &o, 2, 1);
        model_forward(&m, finite_text, finite_text + 1, 2, 6);
        pid_t child = fork();
        if (child == 0) compute_not_finite(&m, row, said);
        waitpid(child, &status, 0);
        rewind(said);
        if (fread(errors, 1, sizeof errors - 1, said) == 0) strcpy(errors, "no message");
        fclose(said);
        snprintf(name, sizeof name, "check-finite: %s, %s: %s", row->options, row->name,
                 row->words);
        check(WIFEXITED(status) && WEXITSTATUS(status) == 1 && strstr(errors, row->words), name,
              "status %d, %s", status, errors);
        model_free(&m);
    }
}

/* ------------------------------------------------------------------------------------------------
Sizes beyond 2^31
*/

// Reserves room for n floats, of which only those that are touched take memory.
static float *far_floats(size_t n) {
    void *p = mmap(NULL, n * sizeof(float), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) die("the test cannot map %zu floats", n);
    return (float *)p;
}

static void test_large_models(void) {
    Options o;
    Model m;
    size_t C = 2048, H = 5461, V = 32000, layer = 4 * C * C + 3 * C * H + 2 * C + 1;
    float *base = far_floats(16);  // only differences of pointers are checked
    int good = 1;
    options_from(&o, "--vocab-size 32000");
    apply_preset(&o, 5);
    Config config = config_of(&o);
    TensorList list = tensor_list(&config);
    check(list.size == 2 * V * C + 24 * layer + C, "sizes: parameters of the preset 1b", "%zu",
          list.size);
    free(list.tensors);
    memset(&m, 0, sizeof m);
    o.norm = NORM_SANDWICH;
    o.layers = 30;
    o.channels = o.vocab_size = 65536;
    o.hidden = 262144;
    m.config = config_of(&o);
    m.list = tensor_list(&m.config);
    for (int l = 0; l < 30; l++) {
        const Tensor *t = &m.list.tensors[1 + 12 * l];
        LayerParameters w = layer_parameters(&m, base, l);
        good = good && w.wqkv == base + t[0].offset && w.wo == base + t[3].offset &&
               w.w13 == base + t[4].offset && w.w2 == base + t[6].offset &&
               w.norm[0] == base + t[7].offset && w.post_norm[0] == base + t[8].offset &&
               w.norm[1] == base + t[9].offset && w.post_norm[1] == base + t[10].offset &&
               w.gate == base + t[11].offset;
    }
    C = 65536;
    H = 262144;
    check(good && m.list.size == 2 * C * C + 30 * (4 * C * C + 3 * C * H + 4 * C + 1) + C,
          "sizes: layers are where their tensors are, 2 T parameters", "%zu", m.list.size);
    m.logits = base;
    check(model_logits(&m, 1 << 24) == base + ((size_t)65536 << 24), "sizes: row 2^24 of logits",
          "%td", model_logits(&m, 1 << 24) - base);
    free(m.list.tensors);
    munmap(base, 16 * sizeof(float));
}

static void test_large_arrays(void) {
    size_t C = 65536, far = (size_t)1 << 28, near = far / 4;
    int last = 65535, good = 1;
    float *table = far_floats(C * C), *end = table + C * C - C, *row = zeros(C);
    for (size_t c = 0; c < C; c++) end[c] = (float)c;
    embedding_forward(row, &last, table, 1, 65536);
    check(same(row, end, C), "sizes: the last row of a table of 2^32", "%g", row[9]);
    embedding_backward(table, row, &last, 1, 65536);
    check(end[9] == 18 && end[65535] == 2 * 65535, "sizes: the gradient of that row", "%g", end[9]);
    munmap(table, C * C * sizeof(float));
    // A (25,5) and the result (25,70) with rows 2^28 apart, B (5,70) with columns 2^26 apart.
    float *c = far_floats(25 * far), *a = c + 128, *b = c + 256;
    for (int k = 0; k < 5; k++) {
        for (int i = 0; i < 25; i++) a[i * far + k] = (float)(i + k);
        for (int j = 0; j < 70; j++) b[j * near + k] = (float)(j - k);
    }
    gemm(c, far, matrix(a, far), transpose(matrix(b, near)), 25, 70, 5, 0);
    for (int i = 0; i < 25; i++) {
        for (int j = 0; j < 70; j++) {
            float sum = 0;
            for (int k = 0; k < 5; k++) sum += (float)((i + k) * (j - k));
            good = good && c[i * far + j] == sum;
        }
    }
    check(good, "sizes: a product of matrices whose rows are 2^28 apart", "%g", c[24 * far + 69]);
    munmap(c, 25 * far * sizeof(float));
}

int main(void) {
    static void (*const tests[])(void) = {
        test_sums, test_gpas, test_residual, test_embedding, test_rmsnorm, test_rope, test_exp,
        test_swiglu, test_gemm, test_matmul, test_attention, test_crossentropy, test_adamw,
        test_long_attention, test_wide_attention, test_attention_lengths,
        test_attention_extended, test_networks, test_recompute, test_stories,
        test_positions_computed, test_optimizer, test_initial_values, test_initial_streams,
        test_layer_state, test_learning, test_gemm_threads, test_threads, test_check_finite,
        test_large_models, test_large_arrays,
    };
    open_dump("dev/test/reference.safetensors");
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        tests[i]();
        free_floats();
    }
    return summary();
}
#endif  // CUDA_REAL

#else
/* ------------------------------------------------------------------------------------------------
Finite differences

If g is the gradient of f at x, then for any direction v the slope of f(x + h v) at h = 0 is g . v.
We measure it with h = +-1e-4 and +-2e-4, with an error of order h^4. For a layer f is
sum(out * dout) with a random dout. Where it is cheap, every element is a direction; elsewhere a few
random directions are enough.
*/

typedef double (*Function)(void *);

// Checks the gradient of f with respect to x (n) in `directions` random directions, or element by
// element if directions is 0. expected_ratio is 1 except where the gradient must not agree.
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
        double error = measured - expected_ratio * slope;
        difference += error * error;
        size += measured * measured;
    }
    double error = sqrt(difference / (size ? size : 1));
    check(error < 1e-6, name, "differs from finite differences by %.2e", error);
    free_floats();
}

static double inner(const double *a, const double *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

enum { HEIGHT = 5, WIDTH = 12, OUT = 7, SIZE = 600 * 3 * 8 };
static double x[SIZE], w[SIZE], y[SIZE], dy[SIZE], dx[SIZE], dw[SIZE], rstd[SIZE], gate, dgate,
    table[SIZE];
static int activation, tokens[] = {2, 0, 2, 1, 3}, time_steps;
static const char *const activations[] = {"silu", "identity", "relu", "leaky_relu", "tanh"};

static double gate_at(void *s) {
    (void)s;
    return gate_value(gate, activation);
}

// a(0) is 0 for all five. At 0 relu and leaky_relu have no derivative; we use that of the negative
// side.
static void test_gates(void) {
    static const double points[] = {-3, -0.7, -0.1, 0.1, 0.7, 3};
    static const double at_zero[] = {0.5, 1, 0, 0.01, 1};
    char line[200];
    for (activation = 0; activation < 5; activation++) {
        for (int i = 0; i < 6; i++) {
            gate = points[i];
            double slope = gate_slope(gate, activation);
            snprintf(line, sizeof line, "gate_slope: %s at %g", activations[activation], gate);
            check_gradient(line, gate_at, NULL, &gate, &slope, 1, 0, 1);
        }
        double slope = gate_slope(0, activation), value = gate_value(0, activation);
        snprintf(line, sizeof line, "gate_value, gate_slope: %s at 0", activations[activation]);
        check(value == 0 && fabs(slope - at_zero[activation]) < 1e-8, line, "%g, %g", value, slope);
    }
}

static double gpas_sum(void *s) {
    (void)s;
    gpas_forward(y, x, gate, activation, HEIGHT * WIDTH);
    return inner(y, dy, HEIGHT * WIDTH);
}

// With the stop-gradient, dx must be dy, while finite differences give (1 - a) dy. dg must agree
// with them, because the stop-gradient does not change it.
static void test_gpas(void) {
    char line[200];
    size_t n = HEIGHT * WIDTH;
    for (int i = 0; i < 10; i++) {
        const char *name = activations[activation = i / 2];
        gate = i % 2 ? -0.6 : 0.6;
        dgate = 0;
        if (activation == GATE_RELU && gate < 0) continue;  // its gate's gradient is 0
        gpas_backward(dx, &dgate, dy, x, gate, activation, 0, n);
        snprintf(line, sizeof line, "gpas_backward (%s, gate %g, no stop-gradient): dinp", name,
                 gate);
        check_gradient(line, gpas_sum, NULL, x, dx, n, 0, 1);
        snprintf(line, sizeof line, "gpas_backward (%s, gate %g): dgate", name, gate);
        check_gradient(line, gpas_sum, NULL, &gate, &dgate, 1, 0, 1);
        dgate = 0;
        gpas_backward(dx, &dgate, dy, x, gate, activation, 1, n);
        snprintf(line, sizeof line,
                 "gpas_backward (%s, gate %g): dgate is the same with the stop-gradient", name,
                 gate);
        check_gradient(line, gpas_sum, NULL, &gate, &dgate, 1, 0, 1);
        snprintf(line, sizeof line, "gpas_backward (%s, gate %g, stop-gradient): finite "
                 "differences give (1 - a) dinp", name, gate);
        check_gradient(line, gpas_sum, NULL, x, dx, n, 0, 1 - gate_value(gate, activation));
        snprintf(line, sizeof line,
                 "gpas_backward (%s, gate %g, stop-gradient): dinp is exactly dout", name, gate);
        check(memcmp(dx, dy, n * sizeof *dx) == 0, line, "it is not");
    }
}

static double residual_sum(void *s) {
    (void)s;
    residual_forward(y, x, w, 1.7, HEIGHT * WIDTH);
    return inner(y, dy, HEIGHT * WIDTH);
}

static double embedding_sum(void *s) {
    (void)s;
    embedding_forward(y, tokens, w, HEIGHT, WIDTH);
    return inner(y, dy, HEIGHT * WIDTH);
}

static double rmsnorm_sum(void *s) {
    (void)s;
    rmsnorm_forward(y, rstd, x, w, HEIGHT, WIDTH);
    return inner(y, dy, HEIGHT * WIDTH);
}

static double rope_sum(void *s) {
    (void)s;
    memcpy(y, x, HEIGHT * 3 * WIDTH * sizeof *y);
    rope_forward(y, table, 1, HEIGHT, WIDTH, 4);
    return inner(y, dy, HEIGHT * 3 * WIDTH);
}

static double swiglu_sum(void *s) {
    (void)s;
    swiglu_forward(y, x, HEIGHT, WIDTH);
    return inner(y, dy, HEIGHT * WIDTH);
}

static double matmul_sum(void *s) {
    (void)s;
    matmul_forward(y, x, w, HEIGHT, WIDTH, OUT);
    return inner(y, dy, HEIGHT * OUT);
}

static double attention_sum(void *s) {
    (void)s;
    attention_forward(y, rstd, x, 0, 1, time_steps, 8, 2);
    return inner(y, dy, (size_t)time_steps * 8);
}

static double crossentropy_sum(void *s) {
    (void)s;
    crossentropy_forward(y, rstd, x, tokens, HEIGHT, WIDTH);
    return 0.3 * (y[0] + y[1] + y[2] + y[3] + y[4]);
}

static void test_layers(void) {
    const int n = HEIGHT * WIDTH;
    residual_backward(dx, dy, 1.7, n);
    check_gradient("residual_backward: dshortcut", residual_sum, NULL, x, dx, n, 0, 1);
    check_gradient("residual_backward: the branch's gradient is dout", residual_sum, NULL, w, dy, n,
                   0, 1);
    memset(dw, 0, sizeof dw);
    embedding_backward(dw, dy, tokens, HEIGHT, WIDTH);
    check_gradient("embedding_backward: dweight", embedding_sum, NULL, w, dw, 4 * WIDTH, 0, 1);
    memset(dw, 0, sizeof dw);
    rmsnorm_forward(y, rstd, x, w, HEIGHT, WIDTH);
    rmsnorm_backward(dx, dw, dy, x, w, rstd, HEIGHT, WIDTH);
    check_gradient("rmsnorm_backward: dinp", rmsnorm_sum, NULL, x, dx, n, 0, 1);
    check_gradient("rmsnorm_backward: dweight", rmsnorm_sum, NULL, w, dw, WIDTH, 0, 1);
    rope_angles(table, HEIGHT, 4);
    memcpy(dx, dy, sizeof dx);
    rope_backward(dx, table, 1, HEIGHT, WIDTH, 4);
    check_gradient("rope_backward: dinp", rope_sum, NULL, x, dx, 3 * n, 0, 1);
    swiglu_backward(dx, dy, x, HEIGHT, WIDTH);
    check_gradient("swiglu_backward: dinp", swiglu_sum, NULL, x, dx, 2 * n, 0, 1);
    memset(dw, 0, sizeof dw);
    matmul_backward(dx, dw, dy, x, w, HEIGHT, WIDTH, OUT);
    check_gradient("matmul_backward: dinp", matmul_sum, NULL, x, dx, n, 0, 1);
    check_gradient("matmul_backward: dweight", matmul_sum, NULL, w, dw, OUT * WIDTH, 0, 1);
    crossentropy_forward(y, rstd, x, tokens, HEIGHT, WIDTH);
    memcpy(dx, x, sizeof dx);
    crossentropy_backward(dx, rstd, tokens, 0.3, HEIGHT, WIDTH);
    check_gradient("crossentropy_backward: dlogits", crossentropy_sum, NULL, x, dx, n, 0, 1);
}

static void test_attention(void) {
    static const struct {
        int T, directions;
    } cases[] = {{9, 0}, {70, 5}, {600, 5}};
    for (int i = 0; i < 3; i++) {
        char line[100];
        time_steps = cases[i].T;
        attention_forward(y, rstd, x, 0, 1, time_steps, 8, 2);
        attention_backward(dx, dy, y, rstd, x, 1, time_steps, 8, 2);
        snprintf(line, sizeof line, "attention_backward: dqkv, %d positions", time_steps);
        check_gradient(line, attention_sum, NULL, x, dx, (size_t)time_steps * 24,
                       cases[i].directions, 1);
    }
}

static const int text[] = {3, 7, 1, 9, 4, 12, 8, 3, 5, 11, 6, 10, 0};
static double network_loss(void *model) {
    return model_forward((Model *)model, text, text + 1, 2, 6);
}

// Checks every parameter tensor of the twelve networks, with GPAS without its stop-gradient, which
// finite differences cannot see.
static void test_networks(void) {
    for (int i = 0; i < 12; i++) {
        Options o;
        Model m;
        char line[200];
        options_from(&o, "--norm %s %s --layers 4 --channels 8 --hidden 11 --heads 2 --seq-len 6 "
                     "--vocab-size 13 --batch 2", schemes[i / 2],
                     i % 2 ? "--gpas on --stop-grad off --gate-init 0.4" : "--gpas off");
        model_create(&m, &o, 2, 1);
        const Tensor *end = m.list.tensors + m.list.count;
        for (const Tensor *t = m.list.tensors; t < end; t++) {
            for (size_t j = t->offset; j < t->offset + t->size; j++) {
                double u = w[j % SIZE];
                m.parameters[j] = t->cols ? 0.6 * u : m.parameters[j] * (0.5 + u * u);
            }
        }
        network_loss(&m);
        model_backward(&m, text, text + 1, 2, 6, 1.0 / 12);
        for (const Tensor *t = m.list.tensors; t < end; t++) {
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
    double *start[] = {x, w, dy};
    for (int a = 0; a < 3; a++) {
        for (int i = 0; i < SIZE; i++) start[a][i] = 2 * random_uniform(&random) - 1;
    }
    test_gates();
    test_gpas();
    test_layers();
    test_attention();
    test_networks();
    return summary();
}
#endif  // DOUBLE
