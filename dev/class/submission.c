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

static void fused(const FusedArrays *a, int backward) {
    size_t n = (size_t)a->N * a->C;
    OnGpu<real> inp(a->inp, n), branch(a->branch, n), sum(a->sum, n), normed(a->normed, n);
    OnGpu<real> dfinp(a->dfinp, n), dx(a->dx, n), dsum(a->dsum, n);
    OnGpu<float> weight(a->weight, a->C), rstd(a->rstd, a->N), dweight(a->dweight, a->C);
    OnGpu<float> dgate(a->dgate, 1), inp_gate(&a->inp_gate, 1), sum_gate(&a->sum_gate, 1);
    Fused<real> f = {
        .N = a->N, .C = a->C, .weight = weight.p, .A = a->A,
        .inp_gate = inp_gate.p, .sum_gate = a->norm_last ? NULL : sum_gate.p,
        .activation = GATE_SILU, .stop_grad = a->stop_grad,
        .inp = inp.p, .branch = branch.p, .sum = sum.p, .normed = normed.p, .rstd = rstd.p,
        .dfinp = dfinp.p, .dx = dx.p, .dsum = dsum.p, .dweight = dweight.p, .dgate = dgate.p,
        .partial = NULL, .gate_partial = NULL};
    if (backward) residual_gpas_rmsnorm_backward(f, a->norm_last);
    else residual_gpas_rmsnorm_forward(f);
}
}
#define LAYER(name) kernels::name
#define FUSED kernels::fused
#define ADAMW kernels::adamw_update
#else
#define CUDA 0
#define LAYER(name) name
#define ADAMW adamw_with_struct
#define FUSED NULL

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
    FUSED,
};
