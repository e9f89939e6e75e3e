/*
bench.c: compares the speed of a training step with what the machine can do.

    make bench                                                      the three shapes below
    dev/tools/bench --vocab-size 259 --seq-len 8192 --batch 1 ...   other options of train_gpas
    OMP_NUM_THREADS=1 dev/tools/bench ...                           any number of threads

Prints a table for each shape: the whole step (forward, backward, update), then each kind of layer
by itself, called as often as in a step (without what --recompute computes again), with its numbers
coming from memory, not from a cache. The line below a matrix product is the same product by the
yardstick's library. At the end there is one line of JSON for each shape. Flops are what the
mathematics needs, without what is computed again: 6 for each parameter and token, except for the
embedding (a table is only read), and 6 L C T a token for causal attention.
The yardstick is sgemm at 4096 x 512 x 4096 by OpenBLAS (libopenblas.so.0) or MKL (libmkl_rt.so.3 or
.2), whichever is faster, or by our own gemm() if neither is found. `pip install mkl` puts MKL into
the folder lib of Python's prefix; LD_LIBRARY_PATH must name that folder. The yardstick and the step
alternate, so that other programs disturb both equally. Times are medians, and the share is the
median of the rounds' shares.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#pragma GCC diagnostic ignored "-Wunused-function"  // the bench does not call every function
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

// Waits until idle threads have stopped spinning, so that they do not slow down what comes next.
static void rest(void) { usleep(50000); }

static int compare_doubles(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static double median(double *x, int n) {
    qsort(x, n, sizeof *x, compare_doubles);
    return x[n / 2];
}

/* ------------------------------------------------------------------------------------------------
The yardstick
*/

// cblas_sgemm(order, transpose a, transpose b, M, N, K, alpha, a, lda, b, ldb, beta, c, ldc)
typedef void Sgemm(int, int, int, int, int, int, float, const float *, int, const float *, int,
                   float, float *, int);
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

typedef struct {
    const char *file, *name, *set_threads, *core;  // core: returns its kernel's name, or NULL
} Library;
static const Library libraries[] = {
    {"libopenblas.so.0", "OpenBLAS", "openblas_set_num_threads", "openblas_get_corename"},
    {"libmkl_rt.so.3", "MKL", "MKL_Set_Num_Threads", NULL},
    {"libmkl_rt.so.2", "MKL", "MKL_Set_Num_Threads", NULL},
};

typedef struct {
    Sgemm *sgemm;  // NULL: our gemm()
    const char *name, *core;  // core: the processor that its kernel is for, or NULL
    float *a, *b, *c;
} Yardstick;

// Takes sgemm from a library and sets it to our number of threads. Returns 0 if it is not found.
static int open_library(Yardstick *y, const Library *library) {
    void (*set_threads)(int);
    char *(*core)(void);
    void *handle = dlopen(library->file, RTLD_NOW);
    if (!handle) return 0;
    void *symbols[] = {dlsym(handle, "cblas_sgemm"), dlsym(handle, library->set_threads),
                       library->core ? dlsym(handle, library->core) : NULL};
    if (!symbols[0] || !symbols[1]) return 0;
    memcpy(&y->sgemm, &symbols[0], sizeof y->sgemm);  // C cannot cast data to a function
    memcpy(&set_threads, &symbols[1], sizeof set_threads);
    memcpy(&core, &symbols[2], sizeof core);
    set_threads(omp_get_max_threads());
    y->name = library->name;
    y->core = core ? core() : NULL;
    return 1;
}

static void yardstick_run(const Yardstick *y) {
    if (y->sgemm)
        y->sgemm(ROW_MAJOR, NO_TRANS, TRANS, M_SIZE, N_SIZE, K_SIZE, 1, y->a, K_SIZE, y->b, K_SIZE,
                 0, y->c, N_SIZE);
    else
        gemm(y->c, N_SIZE, matrix(y->a, K_SIZE), transpose(matrix(y->b, K_SIZE)), M_SIZE, N_SIZE,
             K_SIZE, 0);
}

// Finds the fastest library. Unless the environment says otherwise, OpenBLAS is told that there is
// AVX-512 (one older than the processor may choose its AVX2 kernel, which is half as fast), and MKL
// to share our OpenMP threads instead of starting its own.
static void yardstick_open(Yardstick *y) {
    double least = INFINITY;
    Yardstick candidate = {
        .name = "our gemm(), neither OpenBLAS nor MKL was found",
        .a = allocate(M_SIZE * K_SIZE, sizeof(float)),
        .b = allocate(N_SIZE * K_SIZE, sizeof(float)),
        .c = allocate((size_t)M_SIZE * N_SIZE, sizeof(float)),
    };
    for (int i = 0; i < M_SIZE * K_SIZE; i++) candidate.a[i] = candidate.b[i] = (float)(i % 7) - 3;
    *y = candidate;
#ifdef __AVX512F__
    setenv("OPENBLAS_CORETYPE", "SkylakeX", 0);
#endif
    setenv("MKL_THREADING_LAYER", "GNU", 0);
    for (size_t i = 0; i < sizeof libraries / sizeof *libraries; i++) {
        double t[ROUNDS];
        if (!open_library(&candidate, &libraries[i])) continue;
        yardstick_run(&candidate);
        for (int round = 0; round < ROUNDS; round++) {
            t[round] = omp_get_wtime();
            yardstick_run(&candidate);
            t[round] = omp_get_wtime() - t[round];
        }
        rest();
        if (median(t, ROUNDS) < least) {
            least = median(t, ROUNDS);
            *y = candidate;
        }
    }
}

/* ------------------------------------------------------------------------------------------------
The step and its parts
*/

// A network and its sizes; n = B T C.
typedef struct {
    Model m;
    int *tokens, B, T, C, H, NH, V, N, L;
    size_t n;
    double *norms;    // (L)
    Sgemm *borrowed;  // computes the linear layers while it is set
} Bench;

static void run_step(Bench *z) {
    Model *m = &z->m;
    double gates;
    zero_gradients(m);
    model_forward(m, z->tokens, z->tokens, z->B, z->T);
    model_backward(m, z->tokens, z->tokens, z->B, z->T, 1.0 / z->N);
    double norm = gradient_norms(m, z->norms, &gates);
    model_update(m, 0, norm, gates);
}

static void linear_forward(const Bench *z, float *out, const float *inp, const float *weight, int C,
                           int OC) {
    if (!z->borrowed) matmul_forward(out, inp, weight, z->N, C, OC);
    else
        z->borrowed(ROW_MAJOR, NO_TRANS, TRANS, z->N, OC, C, 1, inp, C, weight, C, 0, out, OC);
}

static void linear_backward(const Bench *z, float *dinp, float *dweight, const float *dout,
                            const float *inp, const float *weight, int C, int OC) {
    if (!z->borrowed) {
        matmul_backward(dinp, dweight, dout, inp, weight, z->N, C, OC);
    } else {
        z->borrowed(ROW_MAJOR, NO_TRANS, NO_TRANS, z->N, C, OC, 1, dout, OC, weight, C, 0, dinp, C);
        z->borrowed(ROW_MAJOR, TRANS, NO_TRANS, OC, C, z->N, 1, dout, OC, inp, C, 1, dweight, C);
    }
}

// The parts of a step: first those of the sublayers, then those that occur once.
enum { MATMUL, ATTENTION, ROPE, SWIGLU, RMSNORM, RESIDUAL, GPAS, LOGITS, CROSSENTROPY, OPTIMIZER };

// Runs the forward pass of one part: in layer l's attention (s 0) or feed-forward network (s 1), if
// sublayers have it.
static void part_forward(Bench *z, int part, int l, int s) {
    Model *m = &z->m;
    const LayerParameters *w = &m->w.layers[l];
    const Activations *a = &m->activations[2 * l + s];
    int N = z->N, B = z->B, T = z->T, C = z->C, H = z->H, NH = z->NH, V = z->V;
    if (part == MATMUL && s == 0) {
        linear_forward(z, a->qkv, a->normed, w->wqkv, C, 3 * C);
        linear_forward(z, a->branch, a->hidden, w->wo, C, C);
    } else if (part == MATMUL) {
        linear_forward(z, a->pre_act, a->normed, w->w13, C, 2 * H);
        linear_forward(z, a->branch, a->hidden, w->w2, H, C);
    }
    if (part == ATTENTION && s == 0)
        attention_forward(a->hidden, a->lse, a->qkv, 0, B, T, C, NH);
    if (part == ROPE && s == 0) rope_forward(a->qkv, m->rope_table, B, T, C, C / NH);
    if (part == SWIGLU && s == 1) swiglu_forward(a->hidden, a->pre_act, N, H);
    if (part == RMSNORM) rmsnorm_forward(a->normed, a->rstd, a->inp, w->norm[s], N, C);
    if (part == RESIDUAL) residual_forward(a->sum, a->inp, a->branch, 1, z->n);
    if (part == GPAS) gpas_forward(a->scaled, a->sum, *w->gate, GATE_SILU, z->n);
    if (part == LOGITS) linear_forward(z, m->logits, m->final_normed, m->w.output, C, V);
    if (part == CROSSENTROPY)
        crossentropy_forward(m->losses, m->logits_lse, m->logits, z->tokens, N, V);
    if (part == OPTIMIZER) {
        double gates, norm = gradient_norms(m, z->norms, &gates);
        model_update(m, 0, norm, gates);
    }
}

// Runs its backward pass. The optimizer has none; instead, the gradients are set to 0.
static void part_backward(Bench *z, int part, int l, int s) {
    Model *m = &z->m;
    const LayerParameters *w = &m->w.layers[l], *d = &m->d.layers[l];
    const Activations *a = &m->activations[2 * l + s];
    int N = z->N, B = z->B, T = z->T, C = z->C, H = z->H, NH = z->NH, V = z->V;
    if (part == MATMUL && s == 0) {
        linear_backward(z, m->dhidden, d->wo, m->dx, a->hidden, w->wo, C, C);
        linear_backward(z, m->dfinp, d->wqkv, m->dqkv, a->normed, w->wqkv, C, 3 * C);
    } else if (part == MATMUL) {
        linear_backward(z, m->dhidden, d->w2, m->dx, a->hidden, w->w2, H, C);
        linear_backward(z, m->dfinp, d->w13, m->dpre_act, a->normed, w->w13, C, 2 * H);
    }
    if (part == ATTENTION && s == 0)
        attention_backward(m->dqkv, m->dhidden, a->hidden, a->lse, a->qkv, B, T, C, NH);
    if (part == ROPE && s == 0) rope_backward(m->dqkv, m->rope_table, B, T, C, C / NH);
    if (part == SWIGLU && s == 1) swiglu_backward(m->dpre_act, m->dhidden, a->pre_act, N, H);
    if (part == RMSNORM)
        rmsnorm_backward(m->dx_branch, d->norm[s], m->dfinp, a->inp, w->norm[s], a->rstd, N, C);
    if (part == RESIDUAL) add(m->dx, m->dx_branch, z->n);
    if (part == GPAS) gpas_backward(m->dx, d->gate, m->dx, a->sum, *w->gate, GATE_SILU, 1, z->n);
    if (part == LOGITS)
        linear_backward(z, m->dfinp, m->d.output, m->logits, m->final_normed, m->w.output, C, V);
    if (part == CROSSENTROPY)
        crossentropy_backward(m->logits, m->logits_lse, z->tokens, 1.0f / N, N, V);
    if (part == OPTIMIZER) zero_gradients(m);
}

/* ------------------------------------------------------------------------------------------------
Measuring
*/

// Returns the seconds of a part's forward or backward passes in all sublayers, the median of
// several rounds.
static double seconds(Bench *z, int part, void (*pass)(Bench *, int, int, int)) {
    double t[ROUNDS];
    int sublayers = part < LOGITS ? 2 * z->L : 1;
    for (int round = 0; round < ROUNDS; round++) {
        t[round] = omp_get_wtime();
        for (int i = 0; i < sublayers; i++) pass(z, part, i / 2, i % 2);
        t[round] = omp_get_wtime() - t[round];
    }
    return median(t, ROUNDS);
}

// Prints a line of the table and returns its seconds. flops: of the forward passes; the backward
// passes have twice as many.
static double print_part(Bench *z, int part, const char *name, double flops, double step) {
    double f = seconds(z, part, part_forward), b = seconds(z, part, part_backward);
    printf("  %-24s %9.2f %9.2f %8.1f%%", name, 1e3 * f, 1e3 * b, 100 * (f + b) / step);
    if (flops > 0) printf(" %10.1f", 3e-9 * flops / (f + b));
    printf("\n");
    return f + b;
}

static void print_parts(Bench *z, const Yardstick *y, double step) {
    double sum = 0, N = z->N, L = z->L, C = z->C;
    const struct { int part; const char *name; double flops; } parts[] = {
        {MATMUL, "matmul, layers", 2 * N * L * (4 * C * C + 3 * C * z->H)},
        {LOGITS, "matmul, output", 2 * N * C * z->V},
        {ATTENTION, "attention", 2 * N * L * C * z->T},
        {ROPE, "rope", 0},
        {SWIGLU, "swiglu", 0},
        {RMSNORM, "rmsnorm", 0},
        {RESIDUAL, "residual", 0},
        {GPAS, "gpas", 0},
        {CROSSENTROPY, "crossentropy", 0},
        {OPTIMIZER, "norms, adamw; zeroing", 0},
    };
    printf("  %-24s %9s %9s %9s %10s\n", "by itself, ms", "forward", "backward", "of step",
           "GFLOP/s");
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        int part = parts[i].part;
        if (part == GPAS && !z->m.config.gpas) continue;
        sum += print_part(z, part, parts[i].name, parts[i].flops, step);
        if (y->sgemm && (part == MATMUL || part == LOGITS)) {
            char name[32];
            snprintf(name, sizeof name, "  the same by %s", y->name);
            z->borrowed = y->sgemm;
            rest();
            print_part(z, part, name, parts[i].flops, step);
            z->borrowed = NULL;
            rest();
        }
    }
    printf("  %-24s %9.2f %9s %8.1f%%\n", "all of these", 1e3 * sum, "", 100 * sum / step);
}

static void open_bench(Bench *z, const Options *o) {
    model_create(&z->m, o, o->batch, 1);
    z->B = o->batch;
    z->T = o->seq_len;
    z->C = o->channels;
    z->H = o->hidden;
    z->NH = o->heads;
    z->V = o->vocab_size;
    z->L = o->layers;
    z->N = z->B * z->T;
    z->n = (size_t)z->N * z->C;
    z->norms = (double *)allocate(z->L, sizeof(double));
    z->tokens = (int *)allocate(z->N, sizeof(int));
    for (int i = 0; i < z->N; i++) z->tokens[i] = (int)((uint64_t)i * i % z->V);
}

// Alternates between a step and as many products of the yardstick as take about as long. Writes the
// seconds of a step and of a product, and the share: flops per second of the step over those of the
// product.
static void time_step(Bench *z, const Yardstick *y, double flops, double *step, double *product,
                      double *share) {
    double s[ROUNDS], p[ROUNDS], ratio[ROUNDS];
    int products = 1;
    for (int round = -1; round < ROUNDS; round++) {  // round -1 finds how many products
        double start = omp_get_wtime();
        run_step(z);
        double took = omp_get_wtime() - start;
        rest();
        start = omp_get_wtime();
        for (int i = 0; i < products; i++) yardstick_run(y);
        double each = (omp_get_wtime() - start) / products;
        rest();
        if (round < 0) {
            products = imax(1, (int)(took / each));
        } else {
            s[round] = took;
            p[round] = each;
            ratio[round] = flops / took * each / GEMM_FLOPS;
        }
    }
    *step = median(s, ROUNDS);
    *product = median(p, ROUNDS);
    *share = median(ratio, ROUNDS);
}

// Measures one shape and prints its table; its line of JSON goes to `json`.
static void measure(const char *name, const Options *o, FILE *json) {
    static Bench z;
    static Yardstick y;
    struct rusage usage;
    double step, product, share;
    int threads = omp_get_max_threads();
    open_bench(&z, o);
    double parameters = (double)z.m.list.size, weights = parameters - (double)z.V * z.C;
    double flops = z.N * (6 * weights + 6.0 * z.L * z.C * z.T);
    run_step(&z);
    run_step(&z);
    getrusage(RUSAGE_SELF, &usage);  // before the yardstick takes memory
    yardstick_open(&y);
    time_step(&z, &y, flops, &step, &product, &share);
    double gflops = 1e-9 * flops / step, sgemm = 1e-9 * GEMM_FLOPS / product;
#ifdef __APPLE__
    double mib = usage.ru_maxrss / 1048576.0;  // there in bytes, elsewhere in KiB
#else
    double mib = usage.ru_maxrss / 1024.0;
#endif
    printf("%s: C %d, L %d, NH %d, H %d, V %d, B %d, T %d; %.1f M parameters; threads: %d\n", name,
           z.C, z.L, z.NH, z.H, z.V, z.B, z.T, 1e-6 * parameters, threads);
    printf("  a step  %.1f ms, %.0f tokens/s, %.1f GFLOP/s, peak memory %.0f MiB\n", 1e3 * step,
           z.N / step, gflops, mib);
    printf("  sgemm   %.1f GFLOP/s (%s%s%s); the step reaches %.2f of it\n", sgemm, y.name,
           y.core ? ", its kernel for " : "", y.core ? y.core : "", share);
    print_parts(&z, &y, step);
    printf("\n");
    fprintf(json, "{\"shape\": \"%s\", \"threads\": %d, \"tokens_per_s\": %.0f, \"gflops\": %.1f, "
            "\"sgemm_gflops\": %.1f, \"share\": %.3f, \"peak_mib\": %.0f}\n", name, threads,
            z.N / step, gflops, sgemm, share, mib);
}

// Measures a shape in a process of its own, because the system records the peak of memory for each
// process. A shape without a name is named after its sizes.
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
    if (status) exit(1);  // the child has said why
}

int main(int argc, char **argv) {
    FILE *json = tmpfile();
    let_waiting_threads_sleep(argv);
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
