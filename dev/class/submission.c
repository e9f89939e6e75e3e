// submission.c: the submission's layers for the grader, in the table of grade.h. Compiled with
// -DSUBMISSION='"train_gpas.c"' as C, or with -DCUDA and the .cu file as C++.
#pragma GCC diagnostic ignored "-Wunused-function"  // the grader does not call all of the program
#define TRAIN_GPAS_NO_MAIN
#include SUBMISSION
#include "grade.h"
#ifdef CUDA
#include <algorithm>
typedef float real;
namespace kernels {  // its layers take arrays on the host
#include "../test/on_gpu.h"

// adamw_update(), but the copy of p that it writes too must be p.
static void adamw_and_copy(float *p, const float *grad, float *m, float *v, size_t n, float lr,
                           float beta1, float beta2, float eps, float weight_decay,
                           float grad_scale, int t) {
    float *copy = (float *)allocate(n, sizeof *copy);
    {
        OnGpu<float> x(p, n), g(grad, n), m1(m, n), v1(v, n);
        OnGpu<real> weights(copy, n);
        Chunk one = {0, (int)n, WQ, 0, 1};
        Constants<Chunk> chunk(&one, 1);
        AdamW a = {lr, beta1, beta2, eps, weight_decay, grad_scale, 1, 0, 0, 1};
        ::adamw_update<real>(weights.p, x.p, g.p, m1.p, v1.p, chunk.p, 1, a, t);
    }
    if (memcmp(copy, p, n * sizeof *p) != 0) die("weights must hold the new p too, as real");
    free(copy);
}

static void fused_forward(float *sum, float *out, float *normed, float *rstd, const float *inp,
                          const float *branch, const float *weight, float gate, int norm_last,
                          float alpha, int N, int C) {
    size_t n = (size_t)N * C;
    OnGpu<real> s(sum, n), y(out, n), z(normed, n), x(inp, n), b(branch, n);
    OnGpu<float> r(rstd, N), w(weight, C), g((const float *)&gate, 1);
    Gpas gpas = {g.p, GATE_SILU, 1, norm_last, alpha};
    residual_gpas_rmsnorm_forward<real>(s.p, y.p, z.p, r.p, x.p, b.p, w.p, gpas, N, C);
}

static void fused_backward(float *dsum, float *dinp, float *dweight, float *dgate,
                           const float *dnext, const float *dnormed, const float *x,
                           const float *rstd, const float *weight, const float *scaled, float gate,
                           int stop_grad, int norm_last, float alpha, int N, int C) {
    size_t n = (size_t)N * C;
    OnGpu<real> ds(dsum, n), dx(dinp, n), dn(dnext, n), dz(dnormed, n), y(x, n), t(scaled, n);
    OnGpu<float> dw(dweight, C), dg(dgate, 1), r(rstd, N), w(weight, C), g((const float *)&gate, 1);
    Scratch<float> partial((size_t)ROW_BLOCKS * (C + 1));
    Gpas gpas = {g.p, GATE_SILU, stop_grad, norm_last, alpha};
    residual_gpas_rmsnorm_backward<real>(ds.p, norm_last ? dx.p : NULL, dw.p, dg.p, partial.p, dn.p,
                                         dz.p, y.p, r.p, w.p, t.p, gpas, N, C);
}
}
#define FUSED(name) kernels::name
#define LAYER(name) kernels::name
#define ADAMW kernels::adamw_and_copy
#else
#define CUDA 0
#define LAYER(name) name
#define ADAMW adamw_with_struct
#define FUSED(name) NULL

// adamw_update() with the parameters of grade.h, which does not know the submission's types.
static void adamw_with_struct(float *p, const float *grad, float *m, float *v, size_t n, float lr,
                              float beta1, float beta2, float eps, float weight_decay, float clip,
                              int t) {
    AdamW a = {.lr = lr, .beta1 = beta1, .beta2 = beta2, .eps = eps,
               .weight_decay = weight_decay, .clip = clip, .t = t};
    (&adamw_update)(p, grad, m, v, n, a);  // with &, a file without it does not compile
}
#endif

const Submission submission = {
    CUDA,
    LAYER(gpas_forward), LAYER(gpas_backward),
    LAYER(residual_forward), LAYER(residual_backward),
    LAYER(embedding_forward), LAYER(embedding_backward),
    LAYER(rmsnorm_forward), LAYER(rmsnorm_backward),
    rope_angles, LAYER(rope_forward), LAYER(rope_backward),
    LAYER(swiglu_forward), LAYER(swiglu_backward),
    LAYER(matmul_forward), LAYER(matmul_backward),
    LAYER(attention_forward), LAYER(attention_backward),
    LAYER(crossentropy_forward), LAYER(crossentropy_backward),
    ADAMW,
    FUSED(fused_forward), FUSED(fused_backward),
};
