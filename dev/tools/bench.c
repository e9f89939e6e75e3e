/*
bench.c: how fast is a training step, beside what the machine can do?

    make bench                                                the three shapes below
    dev/tools/bench --vocab-size 259 --seq-len 8192 --batch 1 ...   any other: options of train_gpas
    OMP_NUM_THREADS=1 dev/tools/bench ...                           any number of threads

For each shape a table: the whole step (forward, backward, update), then every kind of layer by
itself, as often as the step has it (what --recompute does again is left out), its numbers coming
from memory, not from a cache; under the matrix products the same by OpenBLAS. At the end one line
of JSON per shape. Flops are 6 for each parameter and token, without the embedding (a table is only
read), and 6 L C T a token for causal attention: what the mathematics needs, not what is computed
again.
The yardstick is OpenBLAS's sgemm at 4096 x 512 x 4096 if libopenblas.so.0 is found, else gemm() of
train_gpas.c. It and the step take turns, so that other programs disturb both alike; times are
medians, and the share is the median of each turn's share.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#pragma GCC diagnostic ignored "-Wunused-function"  // the bench does not call all of the program
#define TRAIN_GPAS_NO_MAIN
#include "../../train_gpas.c"

enum { ROUNDS = 7, M_SIZE = 4096, K_SIZE = 512, N_SIZE = 4096 };
#define GEMM_FLOPS (2.0 * M_SIZE * K_SIZE * N_SIZE)

static const char *const shapes[][2] = {
    {"c256", "--channels 256 --layers 12 --heads 8 --hidden 688 --vocab-size 4096 --batch 8 "
             "--seq-len 256"},
    {"71m", "--preset 71m --vocab-size 32000 --batch 4 --total-batch 4"},
    {"toy", "--preset toy --vocab-size 259"},
};

// A network and its sizes; n = B T C.
typedef struct {
    Model m;
    int *tokens, B, T, C, H, NH, V, N, L;
    size_t n;
    double *norms;  // (L)
} Bench;

/* ------------------------------------------------------------------------------------------------
The yardstick
*/

// cblas_sgemm(order, transpose a, transpose b, M, N, K, alpha, a, lda, b, ldb, beta, c, ldc)
typedef void Sgemm(int, int, int, int, int, int, float, const float *, int, const float *, int,
                   float, float *, int);
typedef struct { Sgemm *sgemm; char name[64]; float *a, *b, *c; } Yardstick;

// An OpenBLAS older than the processor may take its AVX2 kernel: it is told that AVX-512 is there,
// or the yardstick would be half as long. A choice in the environment stands.
static void yardstick_open(Yardstick *y) {
#ifdef __AVX512F__
    setenv("OPENBLAS_CORETYPE", "SkylakeX", 0);
#endif
    void *library = dlopen("libopenblas.so.0", RTLD_NOW);
    y->a = (float *)allocate(M_SIZE * K_SIZE, sizeof(float));
    y->b = (float *)allocate(N_SIZE * K_SIZE, sizeof(float));
    y->c = (float *)allocate((size_t)M_SIZE * N_SIZE, sizeof(float));
    for (int i = 0; i < M_SIZE * K_SIZE; i++) y->a[i] = y->b[i] = (float)(i % 7) - 3;
    snprintf(y->name, sizeof y->name, "gemm of train_gpas.c, no libopenblas.so.0 found");
    if (!library) return;
    void *symbols[] = {dlsym(library, "cblas_sgemm"), dlsym(library, "openblas_set_num_threads"),
                       dlsym(library, "openblas_get_corename")};
    void (*set_threads)(int);
    char *(*core)(void);
    if (!symbols[0] || !symbols[1] || !symbols[2]) return;
    memcpy(&y->sgemm, &symbols[0], sizeof y->sgemm);  // C cannot cast data to a function
    memcpy(&set_threads, &symbols[1], sizeof set_threads), memcpy(&core, &symbols[2], sizeof core);
    set_threads(omp_get_max_threads());
    snprintf(y->name, sizeof y->name, "OpenBLAS, its kernel for %s", core());
}

static void yardstick_run(const Yardstick *y) {
    if (!y->sgemm) gemm(y->c, N_SIZE, y->a, K_SIZE, 1, y->b, K_SIZE, 1, M_SIZE, N_SIZE, K_SIZE, 0);
    else y->sgemm(101, 111, 112, M_SIZE, N_SIZE, K_SIZE, 1, y->a, K_SIZE, y->b, K_SIZE, 0, y->c,
                  N_SIZE);
}

/* ------------------------------------------------------------------------------------------------
Layers by themselves. Each function does all of one kind that a forward or a backward pass has.
*/

static void run_step(Bench *z) {
    Model *m = &z->m;
    double gates;
    memset(m->gradients, 0, m->num_parameters * sizeof(float));
    model_forward(m, z->tokens, z->tokens, z->B, z->T);
    model_backward(m, z->tokens, z->tokens, z->B, z->T, 1.0 / z->N);
    double norm = gradient_norms(m, z->norms, &gates);
    model_update(m, 0, norm, gates);
}

// matmul_forward() and matmul_backward(), or the same products by OpenBLAS while `borrowed` is set.
static Sgemm *borrowed;

static void linear_forward(float *out, const float *inp, const float *weight, int N, int C,
                           int OC) {
    if (!borrowed) matmul_forward(out, inp, weight, N, C, OC);
    else borrowed(101, 111, 112, N, OC, C, 1, inp, C, weight, C, 0, out, OC);
}

static void linear_backward(float *dinp, float *dweight, const float *dout, const float *inp,
                            const float *weight, int N, int C, int OC) {
    if (!borrowed) {
        matmul_backward(dinp, dweight, dout, inp, weight, N, C, OC);
    } else {
        borrowed(101, 111, 111, N, C, OC, 1, dout, OC, weight, C, 0, dinp, C);
        borrowed(101, 112, 111, OC, C, N, 1, dout, OC, inp, C, 1, dweight, C);
    }
}

// Layer l's parts: weights w, their gradients d, attention a, feed-forward f.
#define EACH_LAYER(z) \
    Model *m = &z->m; \
    for (int l = 0; l < z->L; l++) { \
        LayerParameters w = layer_parameters(m, m->parameters, l); \
        LayerParameters d = layer_parameters(m, m->gradients, l); \
        Sublayer *a = &m->sublayers[2 * l], *f = a + 1; \
        (void)w, (void)d, (void)a, (void)f;
#define END }

static void matmuls_forward(Bench *z) {
    EACH_LAYER(z)
        linear_forward(a->qkv, a->normed, w.wqkv, z->N, z->C, 3 * z->C);
        linear_forward(a->branch, a->inner, w.wo, z->N, z->C, z->C);
        linear_forward(f->pre_act, f->normed, w.w13, z->N, z->C, 2 * z->H);
        linear_forward(f->branch, f->inner, w.w2, z->N, z->H, z->C);
    END
}

static void matmuls_backward(Bench *z) {
    EACH_LAYER(z)
        linear_backward(m->dinner, d.wo, m->dx, a->inner, w.wo, z->N, z->C, z->C);
        linear_backward(m->dinp, d.wqkv, m->dwide, a->normed, w.wqkv, z->N, z->C, 3 * z->C);
        linear_backward(m->dinner, d.w2, m->dx, f->inner, w.w2, z->N, z->H, z->C);
        linear_backward(m->dinp, d.w13, m->dwide, f->normed, w.w13, z->N, z->C, 2 * z->H);
    END
}

static void output_forward(Bench *z) {
    Model *m = &z->m;
    linear_forward(m->logits, m->final_normed, m->parameters, z->N, z->C, z->V);
}

static void output_backward(Bench *z) {
    Model *m = &z->m;
    linear_backward(m->dinp, m->gradients, m->logits, m->final_normed, m->parameters, z->N, z->C,
                    z->V);
}

static void attentions_forward(Bench *z) {
    EACH_LAYER(z) attention_forward(a->inner, a->lse, a->qkv, z->B, z->T, z->C, z->NH); END
}

static void attentions_backward(Bench *z) {
    EACH_LAYER(z)
        attention_backward(m->dwide, m->dinner, a->inner, a->lse, a->qkv, z->B, z->T, z->C, z->NH);
    END
}

static void ropes_forward(Bench *z) {
    EACH_LAYER(z) rope_forward(a->qkv, m->rope_table, z->B, z->T, z->C, z->C / z->NH); END
}

static void ropes_backward(Bench *z) {
    EACH_LAYER(z) rope_backward(m->dwide, m->rope_table, z->B, z->T, z->C, z->C / z->NH); END
}

static void swiglus_forward(Bench *z) {
    EACH_LAYER(z) swiglu_forward(f->inner, f->pre_act, z->N, z->H); END
}

static void swiglus_backward(Bench *z) {
    EACH_LAYER(z) swiglu_backward(m->dwide, m->dinner, f->pre_act, z->N, z->H); END
}

static void norms_forward(Bench *z) {
    EACH_LAYER(z)
        rmsnorm_forward(a->normed, a->rstd, a->inp, w.norm[0], z->N, z->C);
        rmsnorm_forward(f->normed, f->rstd, f->inp, w.norm[1], z->N, z->C);
    END
}

static void norms_backward(Bench *z) {
    EACH_LAYER(z)
        rmsnorm_backward(m->scratch, d.norm[0], m->dinp, a->inp, w.norm[0], a->rstd, z->N, z->C);
        rmsnorm_backward(m->scratch, d.norm[1], m->dinp, f->inp, w.norm[1], f->rstd, z->N, z->C);
    END
}

static void residuals_forward(Bench *z) {
    EACH_LAYER(z)
        residual_forward(a->sum, a->inp, a->branch, 1, z->n);
        residual_forward(f->sum, f->inp, f->branch, 1, z->n);
    END
}

static void residuals_backward(Bench *z) {
    EACH_LAYER(z)
        residual_forward(m->dx, m->dx, m->scratch, 1, z->n);
        residual_forward(m->dx, m->dx, m->scratch, 1, z->n);
    END
}

static void gates_forward(Bench *z) {
    EACH_LAYER(z)
        gpas_forward(a->out, a->sum, *w.gate, GATE_SILU, z->n);
        gpas_forward(f->out, f->sum, *w.gate, GATE_SILU, z->n);
    END
}

static void gates_backward(Bench *z) {
    EACH_LAYER(z)
        gpas_backward(m->dx, d.gate, m->dx, a->sum, *w.gate, GATE_SILU, 1, z->n);
        gpas_backward(m->dx, d.gate, m->dx, f->sum, *w.gate, GATE_SILU, 1, z->n);
    END
}

static void loss_forward(Bench *z) {
    Model *m = &z->m;
    crossentropy_forward(m->losses, m->logits_lse, m->logits, z->tokens, z->N, z->V);
}

static void loss_backward(Bench *z) {
    Model *m = &z->m;
    crossentropy_backward(m->logits, m->logits_lse, z->tokens, 1.0f / z->N, z->N, z->V);
}

static void update(Bench *z) {
    double gates, norm = gradient_norms(&z->m, z->norms, &gates);
    model_update(&z->m, 0, norm, gates);
}

static void part_zero_gradients(Bench *z) {
    memset(z->m.gradients, 0, z->m.num_parameters * sizeof(float));
}

/* ------------------------------------------------------------------------------------------------
Measuring
*/

static int compare_doubles(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static double median(double *x, int n) {
    qsort(x, n, sizeof *x, compare_doubles);
    return x[n / 2];
}

// Seconds of one call, the median of several.
static double seconds(void (*layer)(Bench *), Bench *z) {
    double t[ROUNDS];
    if (!layer) return 0;
    for (int i = 0; i < ROUNDS; i++) {
        t[i] = omp_get_wtime();
        layer(z);
        t[i] = omp_get_wtime() - t[i];
    }
    return median(t, ROUNDS);
}

// A line of the table. flops: of the forward pass; the backward pass has twice as many.
static void print_layer(const char *name, void (*forward)(Bench *), void (*backward)(Bench *),
                        Bench *z, double flops, double step, double *sum) {
    double f = seconds(forward, z), b = seconds(backward, z);
    *sum += f + b;
    printf("  %-22s %9.2f %9.2f %8.1f%%", name, 1e3 * f, 1e3 * b, 100 * (f + b) / step);
    if (flops) printf(" %10.1f", 3e-9 * flops / (f + b));
    printf("\n");
}

// The layers' products by train_gpas.c, and under them by OpenBLAS, which is no part of the sum.
static void print_products(const char *name, void (*forward)(Bench *), void (*backward)(Bench *),
                           Bench *z, const Yardstick *y, double flops, double step, double *sum) {
    double apart = 0;
    print_layer(name, forward, backward, z, flops, step, sum);
    if (!y->sgemm) return;
    borrowed = y->sgemm;
    usleep(50000);
    print_layer("  the same by OpenBLAS", forward, backward, z, flops, step, &apart);
    borrowed = NULL;
    usleep(50000);
}

static void print_layers(Bench *z, const Yardstick *y, double step) {
    double sum = 0, N = z->N, C = z->C;
    printf("  %-22s %9s %9s %9s %10s\n", "by itself, ms", "forward", "backward", "of step",
           "GFLOP/s");
    print_products("matmul, layers", matmuls_forward, matmuls_backward, z, y,
                   2 * N * z->L * (4 * C * C + 3 * C * z->H), step, &sum);
    print_products("matmul, output", output_forward, output_backward, z, y, 2 * N * C * z->V, step,
                   &sum);
    print_layer("attention", attentions_forward, attentions_backward, z, 2 * N * z->L * C * z->T,
                step, &sum);
    print_layer("rope", ropes_forward, ropes_backward, z, 0, step, &sum);
    print_layer("swiglu", swiglus_forward, swiglus_backward, z, 0, step, &sum);
    print_layer("rmsnorm", norms_forward, norms_backward, z, 0, step, &sum);
    print_layer("residual", residuals_forward, residuals_backward, z, 0, step, &sum);
    if (z->m.o->gpas) print_layer("gpas", gates_forward, gates_backward, z, 0, step, &sum);
    print_layer("crossentropy", loss_forward, loss_backward, z, 0, step, &sum);
    print_layer("norms, adamw; zeroing", update, part_zero_gradients, z, 0, step, &sum);
    printf("  %-22s %9.2f %9s %8.1f%%\n", "all of these", 1e3 * sum, "", 100 * sum / step);
}

static void open_bench(Bench *z, const Options *o) {
    model_create(&z->m, o, o->batch, 1);
    z->B = o->batch, z->T = o->seq_len, z->C = o->channels, z->H = o->hidden, z->NH = o->heads;
    z->V = o->vocab_size, z->L = o->layers, z->N = z->B * z->T, z->n = (size_t)z->N * z->C;
    z->norms = (double *)allocate(z->L, sizeof(double));
    z->tokens = (int *)allocate(z->N, sizeof(int));
    for (int i = 0; i < z->N; i++) z->tokens[i] = (int)((uint64_t)i * i % z->V);
}

// The step and the yardstick in turns, about as long each. Seconds of a step, of a product, and the
// share: the step's flops a second over the product's.
static void take_turns(Bench *z, const Yardstick *y, double flops, double *step, double *product,
                       double *share) {
    double s[ROUNDS], p[ROUNDS], ratio[ROUNDS];
    int products = 1;
    for (int round = -1; round < ROUNDS; round++) {
        double start = omp_get_wtime();
        run_step(z);
        double took = omp_get_wtime() - start;
        usleep(50000);  // until the threads that wait have stopped spinning
        start = omp_get_wtime();
        for (int i = 0; i < products; i++) yardstick_run(y);
        double each = (omp_get_wtime() - start) / products;
        usleep(50000);
        if (round < 0) products = imax(1, (int)(took / each));
        else s[round] = took, p[round] = each, ratio[round] = flops / took * each / GEMM_FLOPS;
    }
    *step = median(s, ROUNDS), *product = median(p, ROUNDS), *share = median(ratio, ROUNDS);
}

// Measures one shape and prints its table; its line of JSON goes to `json`.
static void measure(const char *name, const Options *o, FILE *json) {
    static Bench z;
    static Yardstick y;
    struct rusage usage;
    double step, product, share;
    int threads = omp_get_max_threads();
    open_bench(&z, o);
    double weights = (double)z.m.num_parameters - (double)z.V * z.C;
    double flops = z.N * (6 * weights + 6.0 * z.L * z.C * z.T);
    run_step(&z), run_step(&z);
    getrusage(RUSAGE_SELF, &usage);  // before the yardstick takes memory
    yardstick_open(&y);
    take_turns(&z, &y, flops, &step, &product, &share);
    double gflops = 1e-9 * flops / step, sgemm = 1e-9 * GEMM_FLOPS / product;
#ifdef __APPLE__
    double mib = usage.ru_maxrss / 1048576.0;  // there in bytes, elsewhere in KiB
#else
    double mib = usage.ru_maxrss / 1024.0;
#endif
    printf("%s: C %d, L %d, NH %d, H %d, V %d, B %d, T %d; %.1f M parameters; threads: %d\n", name,
           z.C, z.L, z.NH, z.H, z.V, z.B, z.T, 1e-6 * z.m.num_parameters, threads);
    printf("  a step  %.1f ms, %.0f tokens/s, %.1f GFLOP/s, peak memory %.0f MiB\n", 1e3 * step,
           z.N / step, gflops, mib);
    printf("  sgemm   %.1f GFLOP/s (%s); the step reaches %.2f of it\n", sgemm, y.name, share);
    print_layers(&z, &y, step);
    printf("\n");
    fprintf(json, "{\"shape\": \"%s\", \"threads\": %d, \"tokens_per_s\": %.0f, \"gflops\": %.1f, "
            "\"sgemm_gflops\": %.1f, \"share\": %.3f, \"peak_mib\": %.0f}\n", name, threads,
            z.N / step, gflops, sgemm, share, mib);
}

// A process of its own for each shape: the system keeps the peak of memory by process. A shape
// without a name gets its sizes as one.
static void measure_apart(const char *name, int argc, char **argv, FILE *json) {
    int status;
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        Options o;
        char sizes[100];
        parse_options(&o, argc, argv);
        if (o.vocab_size == 0) die("the bench reads no data: give --vocab-size");
        snprintf(sizes, sizeof sizes, "C%d L%d NH%d H%d V%d B%d T%d", o.channels, o.layers, o.heads,
                 o.hidden, o.vocab_size, o.batch, o.seq_len);
        measure(name ? name : sizes, &o, json);
        fflush(NULL);
        _exit(0);
    }
    if (child < 0 || waitpid(child, &status, 0) < 0) die("cannot start: %s", strerror(errno));
    if (WIFSIGNALED(status)) die("the measuring process ended by signal %d", WTERMSIG(status));
    if (status) exit(1);  // it has said why
}

int main(int argc, char **argv) {
    FILE *json = tmpfile();
    if (!json) die("no temporary file: %s", strerror(errno));
    if (argc > 1) measure_apart(NULL, argc, argv, json);
    for (size_t i = 0; argc == 1 && i < sizeof shapes / sizeof *shapes; i++) {
        char line[256], *words[32];
        int n = 1;
        snprintf(line, sizeof line, "%s", shapes[i][1]);
        words[0] = argv[0];
        for (char *w = strtok(line, " "); w; w = strtok(NULL, " ")) words[n++] = w;
        measure_apart(shapes[i][0], n, words, json);
    }
    rewind(json);
    for (int c; (c = getc(json)) != EOF;) putchar(c);
    return 0;
}
