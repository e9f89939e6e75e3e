/*
bench.cu: how fast train_gpas.cu trains. One line for each preset: tokens/s, milliseconds a step,
the share of the GPU's matrix rate that the model's arithmetic comes to, and the memory it takes.

    ./bench_cuda                            all presets, in bf16, sequences of 256 and 1024 tokens
    ./bench_cuda PRESET B T [bf16|fp32 [recompute]]     one of them, perhaps with --recompute on
    ./bench_cuda kernels PRESET B T         of one, in bf16, the milliseconds of each kernel; what
                                            dev/gpu/roofline.py --measured FILE PRESET B T reads
    ./bench_cuda choices PRESET B T         of its matrix products, in bf16, the time of cuBLASLt's
                                            first choice and of the fastest of eight

A step is forward, backward and AdamW update of B sequences of T random tokens, V 32000. Shown is
the median of five after two that do not count. Arithmetic is counted as is usual: 6 for each
parameter and token, but for the embedding, and 6 L C T a token for causal attention. The matrix
rate is that of one large cuBLASLt product, 8192 x 8192 x 8192 in the same type, on the same GPU.
*/
#include <algorithm>
#include <functional>
#define TRAIN_GPAS_NO_MAIN
#ifndef TRAIN_GPAS_CU
#define TRAIN_GPAS_CU "../../train_gpas.cu"
#endif
#include TRAIN_GPAS_CU
#include <sys/wait.h>

// The rate of one large matrix product, in FLOP/s: the best of five.
template <class real> static double matrix_rate(void) {
#ifdef CUDA_ON_CPU
    enum { SIZE = 512 };  // 8192 would take minutes
#else
    enum { SIZE = 8192 };
#endif
    size_t n = (size_t)SIZE * SIZE;
    float *host = (float *)allocate(n, sizeof(float)), *random;
    real *matrix[3];
    uint64_t state = 1;
    double best = 1e30;
    for (size_t i = 0; i < n; i++) host[i] = (float)random_uniform(&state) - 0.5f;
    CUDA_CHECK(cudaMalloc((void **)&random, n * sizeof(float)));
    CUDA_CHECK(cudaMemcpy(random, host, n * sizeof(float), cudaMemcpyHostToDevice));
    for (int i = 0; i < 3; i++) {
        CUDA_CHECK(cudaMalloc((void **)&matrix[i], n * sizeof(real)));
        scaled(matrix[i], random, 1, 0, n);
    }
    for (int i = 0; i < 6; i++) {
        CUDA_CHECK(cudaDeviceSynchronize());
        double start = omp_get_wtime();
        matmul_forward(matrix[2], matrix[0], matrix[1], SIZE, SIZE, SIZE);
        CUDA_CHECK(cudaDeviceSynchronize());
        if (i > 0) best = fmin(best, omp_get_wtime() - start);
    }
    for (int i = 0; i < 3; i++) CUDA_CHECK(cudaFree(matrix[i]));
    CUDA_CHECK(cudaFree(random));
    free(host);
    return 2.0 * n * SIZE / best;
}

// One step, as train_step() makes it. Returns its seconds.
static double step_time(Model *m, const int *tokens, int B, int T, int t) {
    double *layers = (double *)allocate(m->o->layers, sizeof(double)), gate_norm;
    double start = omp_get_wtime();
    zero_gradients(m);
    model_forward(m, tokens, tokens + 1, B, T);
    model_backward(m, tokens, tokens + 1, B, T, 1.0 / ((double)B * T));
    double norm = gradient_norms(m, layers, &gate_norm);
    model_update(m, t, norm, gate_norm);
    CUDA_CHECK(cudaDeviceSynchronize());
    free(layers);
    return omp_get_wtime() - start;
}

// A line "name;calls in a step;milliseconds of all of them", from ten calls in a row.
static void time_kernel(const char *name, int calls, const std::function<void()> &call) {
    enum { TIMES = 10 };
    call();
    CUDA_CHECK(cudaDeviceSynchronize());
    double start = omp_get_wtime();
    for (int i = 0; i < TIMES; i++) call();
    CUDA_CHECK(cudaDeviceSynchronize());
    printf("%s;%d;%.4f\n", name, calls, (omp_get_wtime() - start) / TIMES * calls * 1e3);
}

// The kernels of a step, under the names of roofline.py, on the arrays of a model that has made
// one: those of the first layer stand for all. First the matrix products.
static void time_products(Model *m, const Network<bf16> *net, int N) {
    int C = m->o->channels, H = m->H, L = m->o->layers, V = m->V;
    int rows = logit_rows(N), parts = (N + rows - 1) / rows;
    const Sublayer<bf16> *a = &net->sublayers[0], *f = &net->sublayers[1];
    Layer<bf16> w = layer_at(m, net->weights, 0);
    Layer<float> d = layer_at(m, m->d, 0);
    const struct {
        const char *name;
        bf16 *out, *inp, *weight;
        float *gradient;
        int C, OC;
    } products[] = {{"qkv", a->qkv, a->normed, w.wqkv, d.wqkv, C, 3 * C},
                    {"wo", a->branch, a->inner, w.wo, d.wo, C, C},
                    {"w13", f->pre_act, f->normed, w.w13, d.w13, C, 2 * H},
                    {"w2", f->branch, f->inner, w.w2, d.w2, H, C}};
    const bf16 *output = net->weights + offset_of(m, OUTPUT, -1);
    char name[64];
    for (auto &x : products) {
        snprintf(name, sizeof name, "matmul_forward %s", x.name);
        time_kernel(name, L, [&] { matmul_forward(x.out, x.inp, x.weight, N, x.C, x.OC); });
        snprintf(name, sizeof name, "matmul_backward %s", x.name);
        time_kernel(name, L, [&] {
            matmul_backward(net->dinner, x.gradient, net->dwide, x.inp, x.weight, N, x.C, x.OC);
        });
    }
    time_kernel("matmul_forward output", parts, [&] {
        matmul_forward(net->logits, net->final_normed, output, rows, C, V);
    });
    time_kernel("matmul_backward output", parts, [&] {
        matmul_backward(net->dinp, m->doutput, net->logits, net->final_normed, output, rows, C, V);
    });
}

static void time_layers(Model *m, const Network<bf16> *net, int B, int T) {
    int C = m->o->channels, H = m->H, L = m->o->layers, NH = m->o->heads, N = B * T, V = m->V;
    int rows = logit_rows(N), parts = (N + rows - 1) / rows;
    const Sublayer<bf16> *a = &net->sublayers[0], *f = &net->sublayers[1];
    Layer<float> p = layer_at(m, m->p, 0), d = layer_at(m, m->d, 0);
    Gpas g = gpas_of(m, 0);
    time_kernel("embedding_forward", 1,
                [&] { embedding_forward(net->embedded, m->tokens, m->p, N, C); });
    time_kernel("residual_gpas_rmsnorm_forward", 2 * L, [&] {
        residual_gpas_rmsnorm_forward<bf16>(NULL, a->out, f->normed, f->rstd, a->inp, a->branch,
                                            p.norm[1], g, N, C);
    });
    time_kernel("rope_forward", L, [&] { rope_forward(a->qkv, m->rope_table, B, T, C, C / NH); });
    time_kernel("attention_forward", L,
                [&] { attention_forward(a->inner, a->lse, a->qkv, B, T, C, NH); });
    time_kernel("swiglu_forward", L, [&] { swiglu_forward(f->inner, f->pre_act, N, H); });
    time_kernel("crossentropy", parts, [&] {
        crossentropy<bf16>(m->losses, NULL, net->logits, net->logits, m->targets, 1, rows,
                           m->o->vocab_size, V);
    });
    time_kernel("scaled: two gradients", 1, [&] {
        scaled(net->dinp, net->dinp, 1, 0, (size_t)N * C);
        scaled(m->d + offset_of(m, OUTPUT, -1), m->doutput, 1, 1, (size_t)V * C);
    });
    time_kernel("residual_gpas_rmsnorm_backward", 2 * L, [&] {
        residual_gpas_rmsnorm_backward<bf16>(net->dx, NULL, d.norm[1], d.gate, m->partial, net->dx,
                                             net->dinp, a->out, f->rstd, p.norm[1], a->out, g, N,
                                             C);
    });
    time_kernel("swiglu_backward", L,
                [&] { swiglu_backward(net->dwide, net->dinner, f->pre_act, N, H); });
    time_kernel("attention_backward", L, [&] {
        attention_backward(net->dwide, m->delta, net->dinner, a->inner, a->lse, a->qkv, B, T, C,
                           NH);
    });
    time_kernel("rope_backward", L,
                [&] { rope_backward(net->dwide, m->rope_table, B, T, C, C / NH); });
    time_kernel("embedding_backward", 1, [&] {
        embedding_backward(m->d, net->dx, m->positions, m->starts, m->o->vocab_size, C);
    });
    double *layers = (double *)allocate(L, sizeof(double)), gate_norm;
    time_kernel("gradients: zero, squares", 1,
                [&] { zero_gradients(m), gradient_norms(m, layers, &gate_norm); });
    time_kernel("adamw", 1, [&] { model_update(m, 0, 1, 1); });
    free(layers);
}

// For each product of the last steps, the milliseconds of the kernel that cuBLASLt takes for the
// best and of the best in fact: what a table of choices could gain. Each is timed on arrays of its
// own, ten calls in a row, the faster of two turns.
static void time_choices(void) {
    enum { WANTED = 8, TIMES = 10 };
    double first_sum = 0, best_sum = 0;
    printf("%6s %6s %6s %5s %7s %9s %9s %7s\n", "m", "n", "k", "trans", "result", "first, ms",
           "best, ms", "choice");
    for (Plan *plan = plans; plan < plans + imin(num_plans, PLANS); plan++) {
        cublasLtMatmulHeuristicResult_t found[WANTED];
        Product p = plan->product;
        size_t bytes[] = {(size_t)p.m * p.k * p.real_size, (size_t)p.k * p.n * p.real_size,
                          (size_t)p.m * p.n * p.result_size};
        void *array[3];
        float alpha = 1, beta = p.result_size > p.real_size;  // a gradient is added to
        double ms[WANTED] = {0};
        int count = choices(plan, found, WANTED), best = 0;
        for (int i = 0; i < 3; i++) {
            CUDA_CHECK(cudaMalloc(&array[i], bytes[i]));
            CUDA_CHECK(cudaMemset(array[i], 0x3c, bytes[i]));  // 0.011 in both types
        }
        for (int i = 0; i < 2 * count; i++) {
            double start = 0;
            for (int k = -1; k < TIMES; k++) {
                CUBLAS_CHECK(cublasLtMatmul(cublaslt, plan->operation, &alpha, array[0], plan->a,
                                            array[1], plan->b, &beta, array[2], plan->d, array[2],
                                            plan->d, &found[i / 2].algo, workspace, WORKSPACE, 0));
                if (k < 0) CUDA_CHECK(cudaDeviceSynchronize()), start = omp_get_wtime();
            }
            CUDA_CHECK(cudaDeviceSynchronize());
            double each = (omp_get_wtime() - start) / TIMES * 1e3;
            ms[i / 2] = i % 2 ? fmin(ms[i / 2], each) : each;
        }
        for (int i = 1; i < count; i++) best = ms[i] < ms[best] ? i : best;
        first_sum += ms[0], best_sum += ms[best];
        printf("%6d %6d %6d %3s%2s %7s %9.4f %9.4f %4d/%d\n", p.m, p.n, p.k, p.trans_a ? "T" : "N",
               p.trans_b ? "T" : "N", p.result_size == 4 ? "fp32" : "bf16", ms[0], ms[best],
               best + 1, count);
        for (int i = 0; i < 3; i++) CUDA_CHECK(cudaFree(array[i]));
    }
    printf("one of each: %.4f ms by the first choice, %.4f by the best\n", first_sum, best_sum);
}

enum Report { SPEED, KERNELS, CHOICES };

static void bench(const char *preset, const char *batch, const char *length, const char *dtype,
                  const char *recompute, Report report) {
    const char *arguments[] = {"bench_cuda", "--preset", preset, "--batch", batch, "--total-batch",
                               batch, "--seq-len", length, "--vocab-size", "32000", "--dtype",
                               dtype, "--recompute", recompute};
    Options o;
    Model m;
    enum { STEPS = 5 };
    double seconds[STEPS];
    uint64_t state = 7;
    parse_options(&o, sizeof arguments / sizeof *arguments, (char **)arguments);
    open_device();
    int N = o.batch * o.seq_len;
    double rate = 1;  // before the model takes its memory
    if (report == SPEED) rate = o.dtype == DTYPE_BF16 ? matrix_rate<bf16>() : matrix_rate<float>();
    model_create(&m, &o, o.batch, 1);
    int *tokens = (int *)allocate(N + 1, sizeof(int));
    for (int i = 0; i <= N; i++) tokens[i] = (int)(random_uniform(&state) * o.vocab_size);
    for (int t = 0; t < 2 + STEPS; t++) {
        double s = step_time(&m, tokens, o.batch, o.seq_len, t);
        if (t >= 2) seconds[t - 2] = s;
    }
    if (report == KERNELS)
        time_products(&m, &m.bf16_net, N), time_layers(&m, &m.bf16_net, o.batch, o.seq_len);
    if (report == CHOICES) time_choices();
    if (report != SPEED) return;
    std::sort(seconds, seconds + STEPS);
    double step = seconds[STEPS / 2], C = o.channels;
    double flops = N * (6 * (m.list.size - o.vocab_size * C) + 6.0 * o.layers * C * o.seq_len);
    printf("%-6s %5d %5d %5s %10.0f %9.1f %8.1f %8.1f %6.1f%% %8.2f\n", preset, o.batch, o.seq_len,
           dtype, N / step, step * 1e3, flops / step / 1e12, rate / 1e12, 100 * flops / step / rate,
           (m.bytes + WORKSPACE) / 1073741824.0);
    free(tokens);
    model_free(&m);
}

// In a process of its own: what does not fit ends that one with a line, and the table goes on.
static int bench_apart(const char *preset, const char *batch, const char *length,
                       const char *dtype, const char *recompute, Report report) {
    int status = 0;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        bench(preset, batch, length, dtype, recompute, report);
        fflush(stdout);
        _exit(0);
    }
    if (child < 0 || waitpid(child, &status, 0) != child) die("cannot start a process");
    return status != 0;
}

int main(int argc, char **argv) {
    static const char *const rows[][3] = {
        {"toy", "8", "128"},    {"71m", "256", "256"},  {"130m", "256", "256"},
        {"250m", "128", "256"}, {"350m", "128", "256"}, {"1b", "64", "256"},
        {"71m", "64", "1024"},  {"130m", "64", "1024"}, {"250m", "32", "1024"},
        {"350m", "32", "1024"}, {"1b", "16", "1024"}};
    int failures = 0;
    Report report = SPEED;
    if (argc == 5 && strcmp(argv[1], "kernels") == 0) report = KERNELS;
    if (argc == 5 && strcmp(argv[1], "choices") == 0) report = CHOICES;
    int recompute = argc == 6 && strcmp(argv[5], "recompute") == 0;
    if (argc != 1 && argc != 4 && argc != 5 && !recompute)
        die("usage: ./bench_cuda [[kernels|choices] PRESET BATCH LENGTH [bf16|fp32 [recompute]]]");
    if (report != SPEED) return bench_apart(argv[2], argv[3], argv[4], "bf16", "off", report);
    printf("%-6s %5s %5s %5s %10s %9s %8s %8s %7s %8s\n", "preset", "B", "T", "dtype", "tokens/s",
           "ms/step", "TFLOP/s", "matmul", "share", "GiB");
    if (argc > 1)
        return bench_apart(argv[1], argv[2], argv[3], argc > 4 ? argv[4] : "bf16",
                           recompute ? "on" : "off", SPEED);
    for (auto &row : rows) failures += bench_apart(row[0], row[1], row[2], "bf16", "off", SPEED);
    return failures > 0;
}
