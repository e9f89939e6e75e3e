/*
on_gpu.h: the layers of train_gpas.cu, called like those of train_gpas.c. Each copies its arrays to
the GPU, rounded to `real` where the kernels need that, launches the kernel, and copies back what
may have changed. Included inside a namespace, after train_gpas.cu and <algorithm>, with `real`
defined.
*/

// A copy of n numbers on the GPU. The destructor copies them back, unless they are const.
template <class number> struct OnGpu {
    number *p;
    float *host;
    size_t n;
    OnGpu(const float *from, size_t n) : p(NULL), host(NULL), n(n) { upload(from); }
    OnGpu(float *from, size_t n) : p(NULL), host(from), n(n) { upload(from); }
    OnGpu(const OnGpu &) = delete;
    void upload(const float *from) {
        number *rounded = (number *)allocate(n, sizeof(number));
        for (size_t i = 0; i < n; i++) rounded[i] = from[i];
        CUDA_CHECK(cudaMalloc((void **)&p, n * sizeof(number)));
        CUDA_CHECK(cudaMemcpy(p, rounded, n * sizeof(number), cudaMemcpyHostToDevice));
        free(rounded);
    }
    ~OnGpu() {
        number *back = (number *)allocate(n, sizeof(number));
        if (host) CUDA_CHECK(cudaMemcpy(back, p, n * sizeof(number), cudaMemcpyDeviceToHost));
        for (size_t i = 0; host && i < n; i++) host[i] = back[i];
        CUDA_CHECK(cudaFree(p));
        free(back);
    }
};

// A copy of integers or chunks on the GPU.
template <class item> struct Constants {
    item *p;
    Constants(const item *from, size_t n) {
        CUDA_CHECK(cudaMalloc((void **)&p, n * sizeof(item)));
        CUDA_CHECK(cudaMemcpy(p, from, n * sizeof(item), cudaMemcpyHostToDevice));
    }
    Constants(const Constants &) = delete;
    ~Constants() { CUDA_CHECK(cudaFree(p)); }
};

// Uninitialized memory on the GPU.
template <class number> struct Scratch {
    number *p;
    Scratch(size_t n) { CUDA_CHECK(cudaMalloc((void **)&p, n * sizeof(number))); }
    Scratch(const Scratch &) = delete;
    ~Scratch() { CUDA_CHECK(cudaFree(p)); }
};

static void gpas_forward(float *out, const float *inp, float gate, int activation, size_t n) {
    OnGpu<real> y(out, n), x(inp, n);
    OnGpu<float> g((const float *)&gate, 1);
    Gate on_gpu = {g.p, activation, 1};
    ::gpas_forward<real>(y.p, x.p, on_gpu, n);
}

static void gpas_backward(float *dinp, float *dgate, const float *dout, const float *inp,
                          float gate, int activation, int stop_grad, size_t n) {
    OnGpu<real> dx(dinp, n), dy(dout, n), x(inp, n);
    float unused = 0;
    OnGpu<float> g((const float *)&gate, 1), dg(dgate ? dgate : &unused, 1);
    Gate on_gpu = {g.p, activation, stop_grad};
    ::gpas_backward<real>(dx.p, dgate ? dg.p : NULL, dinp == dout ? dx.p : dy.p, x.p,
                          on_gpu, n);
}

static void residual_forward(float *out, const float *shortcut, const float *branch, float A,
                             size_t n) {
    OnGpu<real> y(out, n), x(shortcut, n), b(branch, n);
    ::residual_forward<real>(y.p, out == shortcut ? y.p : x.p, b.p, A, n);
}

static void residual_backward(float *dshortcut, const float *dout, float A, size_t n) {
    OnGpu<real> dx(dshortcut, n), dy(dout, n);
    ::residual_backward<real>(dx.p, dshortcut == dout ? dx.p : dy.p, A, n);
}

static void rmsnorm_forward(float *out, float *rstd, const float *inp, const float *weight, int N,
                            int C) {
    OnGpu<real> y(out, (size_t)N * C), x(inp, (size_t)N * C);
    OnGpu<float> r(rstd, N), w(weight, C);
    ::rmsnorm_forward<real>(y.p, r.p, x.p, w.p, N, C);
}

static void rmsnorm_backward(float *dinp, float *dweight, const float *dout, const float *inp,
                             const float *weight, const float *rstd, int N, int C) {
    size_t n = (size_t)N * C;
    OnGpu<real> dx(dinp, n), dy(dout, n), x(inp, n);
    OnGpu<float> dw(dweight, C), w(weight, C), r(rstd, N);
    ::rmsnorm_backward<real>(dx.p, dw.p, dy.p, x.p, w.p, r.p, N, C);
}

static void embedding_forward(float *out, const int *tokens, const float *weight, int N, int C) {
    OnGpu<real> y(out, (size_t)N * C);
    OnGpu<float> w(weight, (*std::max_element(tokens, tokens + N) + 1) * (size_t)C);
    Constants<int> t(tokens, N);
    ::embedding_forward<real>(y.p, t.p, w.p, N, C);
}

static void embedding_backward(float *dweight, const float *dout, const int *tokens, int N, int C) {
    int V = *std::max_element(tokens, tokens + N) + 1;
    Occurrences host = {(int *)allocate(N, sizeof(int)),
                        (Segment *)allocate(N, sizeof(Segment)), 0, 0, 0};
    sort_by_token(&host, tokens, N, V);
    OnGpu<real> dy(dout, (size_t)N * C);
    OnGpu<float> dw(dweight, (size_t)V * C);
    Scratch<int> positions(N);
    Scratch<Segment> segments(N);
    Occurrences o = {positions.p, segments.p, 0, 0, 0};
    upload_occurrences(&o, &host);
    ::embedding_backward<real>(dw.p, dy.p, o, C);
    free(host.positions);
    free(host.segments);
}

static void rope_forward(float *qkv, const float *table, int B, int T, int C, int hs) {
    OnGpu<real> x(qkv, (size_t)B * T * 3 * C);
    OnGpu<float> angles(table, (size_t)T * hs);
    ::rope_forward<real>(x.p, angles.p, B, T, C, hs);
}

static void rope_backward(float *dqkv, const float *table, int B, int T, int C, int hs) {
    OnGpu<real> dx(dqkv, (size_t)B * T * 3 * C);
    OnGpu<float> angles(table, (size_t)T * hs);
    ::rope_backward<real>(dx.p, angles.p, B, T, C, hs);
}

static void swiglu_forward(float *out, const float *inp, int N, int H) {
    OnGpu<real> y(out, (size_t)N * H), x(inp, (size_t)N * 2 * H);
    ::swiglu_forward<real>(y.p, x.p, N, H);
}

static void swiglu_backward(float *dinp, const float *dout, const float *inp, int N, int H) {
    OnGpu<real> dx(dinp, (size_t)N * 2 * H), dy(dout, (size_t)N * H), x(inp, (size_t)N * 2 * H);
    ::swiglu_backward<real>(dx.p, dy.p, x.p, N, H);
}

static void matmul_forward(float *out, const float *inp, const float *weight, int N, int C,
                           int OC) {
    OnGpu<real> y(out, (size_t)N * OC), x(inp, (size_t)N * C), w(weight, (size_t)OC * C);
    ::matmul_forward<real>(y.p, x.p, w.p, N, C, OC);
}

static void matmul_backward(float *dinp, float *dweight, const float *dout, const float *inp,
                            const float *weight, int N, int C, int OC) {
    OnGpu<real> dx(dinp, (size_t)N * C), dy(dout, (size_t)N * OC), x(inp, (size_t)N * C);
    OnGpu<real> w(weight, (size_t)OC * C);
    OnGpu<float> dw(dweight, (size_t)OC * C);
    ::matmul_backward<real>(dx.p, dw.p, dy.p, x.p, w.p, N, C, OC);
}

static void attention_forward(float *out, float *lse, const float *qkv, int first, int B, int T,
                              int C, int NH) {
    size_t rows = (size_t)B * (T - first);
    OnGpu<real> y(out, rows * C), x(qkv, (size_t)B * T * 3 * C);
    OnGpu<float> l(lse, rows * NH);
    ::attention_forward<real>(y.p, l.p, x.p, first, B, T, C, NH);
}

// Called again with RoPE's table, the kernels must store the same dq and dk, but rotated back.
static void attention_backward(float *dqkv, const float *dout, const float *out, const float *lse,
                               const float *qkv, int B, int T, int C, int NH) {
    int hs = C / NH;
    size_t n = (size_t)B * T * C, rows = (size_t)B * NH * T;
    float *table = (float *)allocate((size_t)T * hs, sizeof(float));
    float *rotated = (float *)allocate(3 * n, sizeof(float));
    rope_angles(table, T, hs);
    {
        OnGpu<real> dx(dqkv, 3 * n), back(rotated, 3 * n), dy(dout, n), y(out, n), x(qkv, 3 * n);
        OnGpu<float> l(lse, rows), angles((const float *)table, (size_t)T * hs);
        ::attention_backward<real>(dx.p, dy.p, y.p, l.p, x.p, NULL, B, T, C, NH);
        ::attention_backward<real>(back.p, dy.p, y.p, l.p, x.p, angles.p, B, T, C, NH);
    }
    for (size_t row = 0; row < (size_t)B * T; row++) {
        for (int c = 0; c < 2 * C; c += 2) {
            const float *dx = dqkv + row * 3 * C + c, *x = rotated + row * 3 * C + c;
            const float *angle = table + row % T * hs + c % hs;
            float bound = (sizeof(real) == 4 ? 1e-4f : 4e-2f) * hypotf(dx[0], dx[1]) + 1e-6f;
            float error0 = x[0] - dx[0] * angle[0] - dx[1] * angle[1];
            float error1 = x[1] - dx[1] * angle[0] + dx[0] * angle[1];
            int written = x[0] != 0 || x[1] != 0;  // else the kernel is still empty
            if (written && fmaxf(fabsf(error0), fabsf(error1)) > bound)
                die("attention_backward: with table, dq and dk must be rotated (rotate_back)");
        }
    }
    free(table);
    free(rotated);
}

// The kernel does not store lse, which is the loss plus the target's logit.
static void crossentropy_forward(float *losses, float *lse, const float *logits, const int *targets,
                                 int N, int V) {
    {
        OnGpu<float> e(losses, N);
        OnGpu<real> x(logits, (size_t)N * V);
        Constants<int> t(targets, N);
        crossentropy<real>(e.p, x.p, t.p, 0, N, V, V);
    }
    for (int n = 0; n < N; n++) {
        real logit = logits[(size_t)n * V + targets[n]];
        lse[n] = losses[n] + (float)logit;
    }
}

// The kernel computes lse again.
static void crossentropy_backward(float *logits, const float *, const int *targets, float scale,
                                  int N, int V) {
    OnGpu<real> x(logits, (size_t)N * V);
    Scratch<float> e(N);
    Constants<int> t(targets, N);
    crossentropy<real>(e.p, x.p, t.p, scale, N, V, V);
}

// The kernel also writes a copy of p, which must be p, rounded.
static void adamw_update(float *p, const float *grad, float *m, float *v, size_t n, float lr,
                         float beta1, float beta2, float eps, float weight_decay, float clip,
                         int t) {
    float *copy = (float *)allocate(n, sizeof(float));
    {
        OnGpu<float> x(p, n), g(grad, n), m1(m, n), v1(v, n);
        OnGpu<real> weights(copy, n);
        Chunk one = {0, (int)n, WQ, 0, 1};
        Constants<Chunk> chunk(&one, 1);
        AdamW a = {lr, beta1, beta2, eps, weight_decay, clip, 1, 0, 0, 1};
        ::adamw_update<real>(weights.p, x.p, g.p, m1.p, v1.p, chunk.p, 1, a, t);
    }
    for (size_t i = 0; i < n; i++)
        if (fabsf(copy[i] - (float)(real)p[i]) > 0) die("weights must be p, rounded");
    free(copy);
}
