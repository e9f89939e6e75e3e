/*
bench.cu: measures how fast train_gpas.cu trains.

    ./bench_cuda                        all presets in bf16, with sequences of 256 and 1024 tokens
    ./bench_cuda PRESET B T [bf16|fp32 [recompute]]
                                        one of them, optionally with --recompute on
    ./bench_cuda kernels PRESET B T     the time of each kernel of a step in bf16, in the format
                                        that `roofline.py --measured FILE PRESET B T` reads
    ./bench_cuda choices PRESET B T     for each matrix product of a step in bf16, the time of the
                                        kernel that cuBLASLt ranks first, and of the fastest of
                                        the eight that it ranks highest

The first two print one line for each preset: tokens/s, the milliseconds of a step, its arithmetic
in TFLOP/s, the TFLOP/s of a large matrix product, the first as a share of the second, and the GPU
memory.

A step is the forward pass, the backward pass and the AdamW update, for B sequences of T random
tokens out of a vocabulary of 32000. Its time is the median of five steps, after two that are not
counted. Its arithmetic is counted in the usual way: each token takes 6 operations for every
parameter outside the embedding, and 6 L C T for causal attention. The large matrix product has the
same type, and all its matrices are 8192 x 8192.
*/
#include <algorithm>      // defines: std::sort
#pragma GCC diagnostic ignored "-Wunused-function"  // not all of the program is called here
#define TRAIN_GPAS_NO_MAIN
#ifndef TRAIN_GPAS_CU
#define TRAIN_GPAS_CU "../../train_gpas.cu"
#endif
#include TRAIN_GPAS_CU
#include <sys/wait.h>     // defines: waitpid

static double now_ms(void) { return omp_get_wtime() * 1e3; }

// Waits until the GPU has finished all work.
static void wait_for_gpu(void) { CUDA_CHECK(cudaDeviceSynchronize()); }

// Returns how many operations per second the GPU reaches in a large matrix product, the best of
// five.
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
    double best = INFINITY;
    for (size_t i = 0; i < n; i++) host[i] = (float)random_uniform(&state) - 0.5f;
    CUDA_CHECK(cudaMalloc((void **)&random, n * sizeof(float)));
    CUDA_CHECK(cudaMemcpy(random, host, n * sizeof(float), cudaMemcpyHostToDevice));
    for (int i = 0; i < 3; i++) {
        CUDA_CHECK(cudaMalloc((void **)&matrix[i], n * sizeof(real)));
        scale_array(matrix[i], random, 1, 0, n);
    }
    for (int i = 0; i < 6; i++) {
        wait_for_gpu();
        double start = now_ms();
        matmul_forward(matrix[2], matrix[0], matrix[1], SIZE, SIZE, SIZE);
        wait_for_gpu();
        if (i > 0) best = fmin(best, now_ms() - start);  // the first product loads the kernel
    }
    for (int i = 0; i < 3; i++) CUDA_CHECK(cudaFree(matrix[i]));
    CUDA_CHECK(cudaFree(random));
    free(host);
    return 2.0 * n * SIZE / (best / 1e3);
}

// Makes one step like train_step(), on the same tokens each time. Returns its milliseconds.
static double step_time(Model *m, const int *tokens, int B, int T, int step) {
    double *layers = (double *)allocate(m->config.L, sizeof(double)), gate_norm;
    double start = now_ms();
    zero_gradients(m);
    model_forward(m, tokens, tokens + 1, B, T);
    model_backward(m, tokens, tokens + 1, B, T, 1.0 / ((double)B * T));
    double norm = gradient_norms(m, layers, &gate_norm);
    model_update(m, step, norm, gate_norm);
    wait_for_gpu();
    double ms = now_ms() - start;
    free(layers);
    return ms;
}

// Prints the line "name;calls;milliseconds", where `calls` is how often a step makes this call, and
// the milliseconds are those of all these calls. The call is made ten times in a row.
template <class Call> static void time_kernel(const char *name, int calls, Call call) {
    enum { TIMES = 10 };
    call();
    wait_for_gpu();
    double start = now_ms();
    for (int i = 0; i < TIMES; i++) call();
    wait_for_gpu();
    printf("%s;%d;%.4f\n", name, calls, (now_ms() - start) / TIMES * calls);
}

/*
The kernels of a step, under the names that roofline.py gives them. They run on the arrays of a
model that has made a step. Those of layer 0 stand for the arrays of all layers.
*/

// The matrix products.
static void time_products(Model *m, const Network<bf16> *net, int N) {
    int C = m->config.C, H = m->H, L = m->config.L, V = m->V;
    int rows = logit_rows(N), parts = (N + rows - 1) / rows;
    const Activations<bf16> *attention = &net->activations[0], *ffn = &net->activations[1];
    LayerParameters<bf16> w = layer_parameters(m, net->weights, 0);
    LayerParameters<float> d = layer_parameters(m, m->gradients, 0);
    const struct {
        const char *name;
        bf16 *out, *inp, *weight;
        float *dweight;
        int C, OC;
    } products[] = {
        {"qkv", attention->qkv, attention->normed, w.wqkv, d.wqkv, C, 3 * C},
        {"wo", attention->branch, attention->hidden, w.wo, d.wo, C, C},
        {"w13", ffn->pre_act, ffn->normed, w.w13, d.w13, C, 2 * H},
        {"w2", ffn->branch, ffn->hidden, w.w2, d.w2, H, C},
    };
    char name[64];
    for (auto &p : products) {
        snprintf(name, sizeof name, "matmul_forward %s", p.name);
        time_kernel(name, L, [&] { matmul_forward(p.out, p.inp, p.weight, N, p.C, p.OC); });
        snprintf(name, sizeof name, "matmul_backward %s", p.name);
        time_kernel(name, L, [&] {
            matmul_backward(net->dhidden, p.dweight, net->dqkv, p.inp, p.weight, N, p.C, p.OC);
        });
    }
    const bf16 *output = parameter(m, net->weights, OUTPUT, -1);
    const bf16 *final_normed = net->activations[2 * L].normed;
    time_kernel("matmul_forward output", parts, [&] {
        matmul_forward(net->logits, final_normed, output, rows, C, V);
    });
    time_kernel("matmul_backward output", parts, [&] {
        matmul_backward(net->dfinp, m->doutput, net->logits, final_normed, output, rows, C, V);
    });
}

// Returns the arguments of the fused kernels of layer 0's feed-forward sublayer.
static Fused<bf16> fused_example(Model *m, const Network<bf16> *net, int N) {
    Fused<bf16> f = fused_arguments(m, net, 0, 1, N);
    f.branch = net->activations[1].branch;
    f.normed = net->activations[2].normed;  // Its norm is that of the next sublayer.
    f.dfinp = net->dfinp;
    f.dx = net->dx;
    f.dweight = norm_weight(m, m->gradients, 2);
    f.dgate = parameter(m, m->gradients, GATE, 0);
    return f;
}

// The other kernels of the forward pass.
static void time_forward(Model *m, const Network<bf16> *net, int B, int T) {
    int C = m->config.C, H = m->H, L = m->config.L, NH = m->config.NH, N = B * T;
    int rows = logit_rows(N), parts = (N + rows - 1) / rows;
    const Activations<bf16> *attention = &net->activations[0], *ffn = &net->activations[1];
    const float *embedding = parameter(m, m->parameters, EMBEDDING, -1);
    Fused<bf16> fused = fused_example(m, net, N);
    time_kernel("embedding_forward", 1, [&] {
        embedding_forward(net->embedded, m->tokens, embedding, N, C);
    });
    time_kernel("residual_gpas_rmsnorm_forward", 2 * L, [&] {
        residual_gpas_rmsnorm_forward(fused);
    });
    time_kernel("rope_forward", L, [&] {
        rope_forward(attention->qkv, m->rope_table, B, T, C, C / NH);
    });
    time_kernel("attention_forward", L, [&] {
        attention_forward(attention->hidden, attention->lse, attention->qkv, 0, B, T, C, NH);
    });
    time_kernel("swiglu_forward", L, [&] { swiglu_forward(ffn->hidden, ffn->pre_act, N, H); });
    time_kernel("crossentropy", parts, [&] {
        crossentropy(m->losses, net->logits, m->targets, 1, rows, m->config.V, m->V);
    });
}

// The other kernels of the backward pass, and the update.
static void time_backward(Model *m, const Network<bf16> *net, int B, int T) {
    int C = m->config.C, H = m->H, L = m->config.L, NH = m->config.NH, N = B * T;
    const Activations<bf16> *attention = &net->activations[0], *ffn = &net->activations[1];
    float *dembedding = parameter(m, m->gradients, EMBEDDING, -1);
    float *doutput = parameter(m, m->gradients, OUTPUT, -1);
    Fused<bf16> fused = fused_example(m, net, N);
    double *layers = (double *)allocate(L, sizeof(double)), gate_norm;
    time_kernel("scale_array: two gradients", 1, [&] {
        scale_array(net->dfinp, net->dfinp, 1, 0, (size_t)N * C);
        scale_array(doutput, m->doutput, 1, 1, (size_t)m->V * C);
    });
    time_kernel("residual_gpas_rmsnorm_backward", 2 * L, [&] {
        residual_gpas_rmsnorm_backward(fused, 0);
    });
    time_kernel("swiglu_backward", L, [&] {
        swiglu_backward(net->dpre_act, net->dhidden, ffn->pre_act, N, H);
    });
    time_kernel("attention_backward", L, [&] {
        attention_backward(net->dqkv, net->dhidden, attention->hidden, attention->lse,
                           attention->qkv, m->rope_table, B, T, C, NH);
    });
    time_kernel("embedding_backward", 1, [&] {
        embedding_backward(dembedding, net->dx, m->occurrences, C);
    });
    time_kernel("gradients: zero, squares", 1, [&] {
        zero_gradients(m);
        gradient_norms(m, layers, &gate_norm);
    });
    time_kernel("adamw", 1, [&] { model_update(m, 0, 1, 1); });
    free(layers);
}

// What --fused off runs as separate kernels, and the step above as part of fused ones. These times
// are not part of the step; beside it, they show what fusing saves.
static void time_unfused(Model *m, const Network<bf16> *net, int B, int T) {
    int C = m->config.C, L = m->config.L, N = B * T;
    size_t n = (size_t)N * C;
    Gate gate = layer_gate(m, 0);
    Fused<bf16> f = fused_example(m, net, N);
    bf16 *y = net->dhidden;  // The model has no array for y, because it runs the fused kernels.
    time_kernel("residual_forward, gpas_forward, rmsnorm_forward", 2 * L, [&] {
        residual_forward(f.sum, f.inp, f.branch, 1, n);
        gpas_forward(y, f.sum, gate, n);
        rmsnorm_forward(f.normed, f.rstd, y, f.weight, N, C);
    });
    time_kernel("rmsnorm_backward, residual_forward, gpas_backward", 2 * L, [&] {
        rmsnorm_backward(net->dx_branch, f.dweight, net->dfinp, y, f.weight, f.rstd, N, C);
        residual_forward(f.dx, f.dx, net->dx_branch, 1, n);
        gpas_backward(f.dx, f.dgate, f.dx, f.sum, gate, n);
    });
    time_kernel("rope_backward", L, [&] {
        rope_backward(net->dqkv, m->rope_table, B, T, C, C / m->config.NH);
    });
}

// Returns the milliseconds that a plan's product takes with one of its kernels: the mean of ten
// calls in a row. beta: 1 if the result is added to d, 0 if it replaces d.
static double kernel_time(const Plan *plan, const cublasLtMatmulHeuristicResult_t *kernel,
                          const void *a, const void *b, void *d, float beta) {
    enum { TIMES = 10 };
    float alpha = 1;
    double start = 0;
    for (int i = -1; i < TIMES; i++) {
        CUBLAS_CHECK(cublasLtMatmul(cublaslt, plan->operation, &alpha, a, plan->a, b, plan->b,
                                    &beta, d, plan->d, d, plan->d, &kernel->algo, workspace,
                                    WORKSPACE, 0));
        if (i >= 0) continue;
        wait_for_gpu();
        start = now_ms();  // The first call is not counted.
    }
    wait_for_gpu();
    return (now_ms() - start) / TIMES;
}

// Returns a new matrix for a product, full of small numbers.
static void *new_operand(int rows, int cols, int number_size) {
    size_t bytes = (size_t)rows * cols * number_size;
    void *matrix;
    CUDA_CHECK(cudaMalloc(&matrix, bytes));
    CUDA_CHECK(cudaMemset(matrix, 0x3c, bytes));  // 0.011 in fp32 and in bf16
    return matrix;
}

// Prints for a plan's product the times of the kernel that cuBLASLt ranks first, and of the fastest
// of eight. Adds them to sums. Each kernel is timed twice, and the shorter time counts.
static void time_plan(const Plan *plan, double sums[2]) {
    enum { WANTED = 8 };
    cublasLtMatmulHeuristicResult_t found[WANTED];
    Product p = plan->product;
    void *a = new_operand(p.m, p.k, p.real_size), *b = new_operand(p.k, p.n, p.real_size);
    void *d = new_operand(p.m, p.n, p.result_size);
    float beta = p.result_size > p.real_size;  // in bf16: 1 for an fp32 gradient
    double ms[WANTED] = {0};
    int count = find_kernels(plan, found, WANTED), best = 0;
    for (int i = 0; i < count; i++) {
        double first_turn = kernel_time(plan, &found[i], a, b, d, beta);
        ms[i] = fmin(first_turn, kernel_time(plan, &found[i], a, b, d, beta));
        if (ms[i] < ms[best]) best = i;
    }
    printf("%6d %6d %6d %3s%2s %7s %9.4f %9.4f %4d/%d\n", p.m, p.n, p.k, p.trans_a ? "T" : "N",
           p.trans_b ? "T" : "N", p.result_size == 4 ? "fp32" : "bf16", ms[0], ms[best], best + 1,
           count);
    sums[0] += ms[0];
    sums[1] += ms[best];
    CUDA_CHECK(cudaFree(a));
    CUDA_CHECK(cudaFree(b));
    CUDA_CHECK(cudaFree(d));
}

// Times the plans of all products of a step. A program that chose its kernels by measured times
// could gain the difference of the two sums.
static void time_choices(void) {
    double sums[2] = {0, 0};
    printf("%6s %6s %6s %5s %7s %9s %9s %7s\n", "m", "n", "k", "trans", "result", "first, ms",
           "best, ms", "choice");
    for (int i = 0; i < imin(num_plans, PLANS); i++) time_plan(&plans[i], sums);
    printf("one of each: %.4f ms with the first choice, %.4f with the best\n", sums[0], sums[1]);
}

enum Report { SPEED, KERNELS, CHOICES };

// What to measure. The values are those of options of train_gpas_cuda.
struct Row {
    const char *preset, *batch, *length, *dtype = "bf16", *recompute = "off";
};

// Prints a line of the speed table. ms: the time of a step. rate: the operations per second that
// matrix_rate() found.
static void print_speed(const Model *m, Row row, double ms, double rate) {
    const Options *o = m->options;
    double C = m->config.C, L = m->config.L, T = o->seq_len, N = o->batch * T;
    double parameters = m->list.size - m->config.V * C;  // without the embedding
    double speed = N * (6 * parameters + 6 * L * C * T) / (ms / 1e3);
    printf("%-6s %5d %5d %5s %10.0f %9.1f %8.1f %8.1f %6.1f%% %8.2f\n", row.preset, o->batch,
           o->seq_len, row.dtype, N / (ms / 1e3), ms, speed / 1e12, rate / 1e12, 100 * speed / rate,
           (m->arrays.bytes + WORKSPACE) / 1073741824.0);
}

static void bench(Row row, Report report) {
    const char *arguments[] = {
        "bench_cuda",  "--preset",   row.preset,     "--batch", row.batch, "--total-batch",
        row.batch,     "--seq-len",  row.length,     "--vocab-size", "32000", "--dtype",
        row.dtype,     "--recompute", row.recompute,
    };
    enum { UNCOUNTED = 2, STEPS = 5 };
    Options o;
    Model m;
    double ms[UNCOUNTED + STEPS], rate = 0;
    uint64_t state = 7;
    parse_options(&o, sizeof arguments / sizeof *arguments, (char **)arguments);
    open_device();
    int B = o.batch, T = o.seq_len, N = B * T;
    if (report == SPEED)  // before the model takes the memory
        rate = o.dtype == DTYPE_BF16 ? matrix_rate<bf16>() : matrix_rate<float>();
    model_create(&m, &o, B, 1);
    int *tokens = (int *)allocate(N + 1, sizeof(int));
    for (int i = 0; i <= N; i++) tokens[i] = (int)(random_uniform(&state) * m.config.V);
    for (int i = 0; i < UNCOUNTED + STEPS; i++) ms[i] = step_time(&m, tokens, B, T, i);
    if (report == SPEED) {
        std::sort(ms + UNCOUNTED, ms + UNCOUNTED + STEPS);
        print_speed(&m, row, ms[UNCOUNTED + STEPS / 2], rate);
    } else if (report == KERNELS) {
        const Network<bf16> *net = (const Network<bf16> *)m.network;
        time_products(&m, net, N);
        time_forward(&m, net, B, T);
        time_backward(&m, net, B, T);
        time_unfused(&m, net, B, T);
    } else {
        time_choices();
    }
    free(tokens);
    model_free(&m);
}

// Runs bench() in a process of its own. If a network does not fit into the memory, only that
// process exits, after it has said why, and the table continues. Returns 1 if it failed, else 0.
static int bench_apart(Row row, Report report) {
    int status = 0;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        bench(row, report);
        fflush(stdout);
        _exit(0);
    }
    if (child < 0 || waitpid(child, &status, 0) != child) die("cannot start a process");
    return status != 0;
}

int main(int argc, char **argv) {
    static const Row rows[] = {
        {"toy", "8", "128"},    {"71m", "256", "256"},  {"130m", "256", "256"},
        {"250m", "128", "256"}, {"350m", "128", "256"}, {"1b", "64", "256"},
        {"71m", "64", "1024"},  {"130m", "64", "1024"}, {"250m", "32", "1024"},
        {"350m", "32", "1024"}, {"1b", "16", "1024"},
    };
    int kernels = argc == 5 && strcmp(argv[1], "kernels") == 0;
    int choices = argc == 5 && strcmp(argv[1], "choices") == 0;
    int recompute = argc == 6 && strcmp(argv[5], "recompute") == 0, failures = 0;
    if (argc != 1 && argc != 4 && argc != 5 && !recompute)
        die("usage: ./bench_cuda [[kernels|choices] PRESET B T | PRESET B T [bf16|fp32 "
            "[recompute]]]");
    if (kernels || choices) {
        Row row = {argv[2], argv[3], argv[4]};
        return bench_apart(row, kernels ? KERNELS : CHOICES);
    }
    printf("%-6s %5s %5s %5s %10s %9s %8s %8s %7s %8s\n", "preset", "B", "T", "dtype", "tokens/s",
           "ms/step", "TFLOP/s", "matmul", "share", "GiB");
    if (argc > 1) {
        Row row = {argv[1], argv[2], argv[3]};
        if (argc > 4) row.dtype = argv[4];
        if (recompute) row.recompute = "on";
        return bench_apart(row, SPEED);
    }
    for (const Row &row : rows) failures += bench_apart(row, SPEED);
    return failures > 0;
}
