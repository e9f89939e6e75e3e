// submission.c: the submission's layers for the grader, in the table of grade.h. Compiled with
// -DSUBMISSION='"train_gpas.c"' as C, or with -DCUDA and the .cu file as C++.
#pragma GCC diagnostic ignored "-Wunused-function"  // the grader does not call all of the program
#define TRAIN_GPAS_NO_MAIN
#include SUBMISSION
#include "grade.h"
#ifdef CUDA
#include <algorithm>
#include <vector>
typedef float real;
namespace kernels {  // its layers take arrays on the host
#include "../test/on_gpu.h"
}
#define LAYER(name) kernels::name
enum { IS_CUDA = 1 };
#else
#define LAYER(name) name
enum { IS_CUDA = 0 };

// A layer must have the parameters that it was given: C would call it with others, too.
#define CHECK(name, ...) _Static_assert( \
    __builtin_types_compatible_p(__typeof__(&name), void (*)(__VA_ARGS__)), \
    "the parameters of " #name " or their types are not those that were given")
typedef const float *In;
typedef float *Out;
CHECK(gpas_forward, Out, In, float, int, size_t);
CHECK(gpas_backward, Out, Out, In, In, float, int, int, size_t);
CHECK(residual_forward, Out, In, In, float, size_t);
CHECK(residual_backward, Out, In, float, size_t);
CHECK(embedding_forward, Out, const int *, In, int, int);
CHECK(embedding_backward, Out, In, const int *, int, int);
CHECK(rmsnorm_forward, Out, Out, In, In, int, int);
CHECK(rmsnorm_backward, Out, Out, In, In, In, In, int, int);
CHECK(rope_forward, Out, In, int, int, int, int);
CHECK(rope_backward, Out, In, int, int, int, int);
CHECK(swiglu_forward, Out, In, int, int);
CHECK(swiglu_backward, Out, In, In, int, int);
CHECK(matmul_forward, Out, In, In, int, int, int);
CHECK(matmul_backward, Out, Out, In, In, In, int, int, int);
CHECK(attention_forward, Out, Out, In, int, int, int, int, int);
CHECK(attention_backward, Out, In, In, In, In, int, int, int, int);
CHECK(crossentropy_forward, Out, Out, In, const int *, int, int);
CHECK(crossentropy_backward, Out, In, const int *, float, int, int);
CHECK(adamw_update, Out, In, Out, Out, size_t, AdamW);
#endif

// The passes: each calls the layer with what it needs of the arguments a.
#define PASS(name) static void call_##name(const Arguments *a)
PASS(gpas_forward) { LAYER(gpas_forward)(a->out[0], a->in[0], a->gate, a->act, a->C); }
PASS(gpas_backward) {
    LAYER(gpas_backward)(a->grad[0], a->gated ? a->grad[1] : NULL, a->dout, a->in[0], a->gate,
                         a->act, a->stop_grad, a->C);
}
PASS(residual_forward) {
    LAYER(residual_forward)(a->out[0], a->in[0], a->in[1], a->factor, a->C);
}
PASS(residual_backward) { LAYER(residual_backward)(a->grad[0], a->dout, a->factor, a->C); }
PASS(embedding_forward) {
    LAYER(embedding_forward)(a->out[0], a->tokens, a->in[0], a->T, a->C);
}
PASS(embedding_backward) {
    LAYER(embedding_backward)(a->grad[0], a->dout, a->tokens, a->T, a->C);
}
PASS(rmsnorm_forward) {
    LAYER(rmsnorm_forward)(a->out[0], a->out[1], a->in[0], a->in[1], a->T, a->C);
}
PASS(rmsnorm_backward) {
    LAYER(rmsnorm_backward)(a->grad[0], a->grad[1], a->dout, a->in[0], a->in[1], a->out[1], a->T,
                            a->C);
}
PASS(rope_forward) { LAYER(rope_forward)(a->out[0], a->in[1], a->B, a->T, a->C, a->C / a->NH); }
PASS(rope_backward) { LAYER(rope_backward)(a->grad[0], a->in[1], a->B, a->T, a->C, a->C / a->NH); }
PASS(swiglu_forward) { LAYER(swiglu_forward)(a->out[0], a->in[0], a->T, a->C); }
PASS(swiglu_backward) { LAYER(swiglu_backward)(a->grad[0], a->dout, a->in[0], a->T, a->C); }
PASS(matmul_forward) { LAYER(matmul_forward)(a->out[0], a->in[0], a->in[1], a->T, a->C, a->V); }
PASS(matmul_backward) {
    LAYER(matmul_backward)(a->grad[0], a->grad[1], a->dout, a->in[0], a->in[1], a->T, a->C, a->V);
}
PASS(attention_forward) {
    LAYER(attention_forward)(a->out[0], a->out[1], a->in[0], a->first, a->B, a->T, a->C, a->NH);
}
PASS(attention_backward) {
    LAYER(attention_backward)(a->grad[0], a->dout, a->out[0], a->out[1], a->in[0], a->B, a->T,
                              a->C, a->NH);
}
#ifdef CUDA

// The kernel computes no lse that one could read. Rows of logits are padded to `stride`.
static void cross(const Arguments *a, float *losses, float *logits, float scale) {
    kernels::OnGpu<float> e(losses, a->T);
    kernels::OnGpu<real> x(logits, (size_t)a->T * a->stride);
    kernels::Constants<int> t(a->tokens, a->T);
    crossentropy<real>(e.p, x.p, t.p, scale, a->T, a->V, a->stride);
}
PASS(crossentropy_forward) { cross(a, a->out[0], a->in[0], 0); }
PASS(crossentropy_backward) {
    std::vector<float> losses(a->T);
    cross(a, losses.data(), a->grad[0], a->factor);
}

// In two chunks, so that their offsets count. The factor of clipping that does not apply is -7.
PASS(adamw_update) {
    AdamWNumbers n = a->adam;
    int first = a->C / 2, is_gate = n.kind == LEARNED_GATE || n.kind == FIXED_GATE;
    int kind = n.kind == MATRIX ? WQ : is_gate ? GATE : FFN_NORM, decays = n.kind == MATRIX;
    kernels::OnGpu<float> p(a->out[0], a->C), m(a->out[1], a->C), v(a->out[2], a->C);
    kernels::OnGpu<float> grad((const float *)a->in[3], a->C);
    kernels::OnGpu<real> weights(a->out[3], a->C);
    Chunk two[] = {{0, first, kind, 0, decays}, {(size_t)first, a->C - first, kind, 0, decays}};
    kernels::Constants<Chunk> chunks(two, 2);
    AdamW adam = {n.lr, n.beta1, n.beta2, n.eps, n.weight_decay, is_gate ? -7 : n.clip,
                  is_gate ? n.clip : -7, 0, 0, n.kind != FIXED_GATE};
    adamw_update<real>(weights.p, p.p, grad.p, m.p, v.p, chunks.p, 2, adam, n.t);
}

static void fused(const Arguments *a, int backward) {
    size_t n = (size_t)a->T * a->C;
    std::vector<float> none(n);  // in place of arrays that the forward pass does not have
    auto some = [&](float *array) { return array ? array : none.data(); };
    float inp_gate = a->gates[!a->norm_last], sum_gate = a->gates[0];
    kernels::OnGpu<real> inp(a->in[0], n), branch(a->in[1], n), sum(a->out[0], n);
    kernels::OnGpu<real> normed(a->out[2], n), dfinp(some(a->dfinp), n), dx(some(a->dx), n);
    kernels::OnGpu<real> dsum(some(a->grad[1]), n);
    kernels::OnGpu<float> weight(a->in[2], a->C), rstd(a->out[3], a->T);
    kernels::OnGpu<float> dweight(some(a->grad[2]), a->C), dgate(some(a->grad[3]), 1);
    kernels::OnGpu<float> gate1(&inp_gate, 1), gate2(&sum_gate, 1);
    Fused<real> f = {
        .N = a->T, .C = a->C, .weight = weight.p, .A = a->factor,
        .inp_gate = a->gated ? gate1.p : NULL,
        .sum_gate = a->gated && !a->norm_last ? gate2.p : NULL,
        .activation = GATE_SILU, .stop_grad = a->stop_grad,
        .inp = inp.p, .branch = branch.p, .sum = sum.p, .normed = normed.p, .rstd = rstd.p,
        .dfinp = dfinp.p, .dx = dx.p, .dsum = dsum.p, .dweight = dweight.p,
        .dgate = a->gated ? dgate.p : NULL, .partial = NULL, .gate_partial = NULL};
    if (backward) residual_gpas_rmsnorm_backward(f, a->norm_last);
    else residual_gpas_rmsnorm_forward(f);
}
PASS(fused_forward) { fused(a, 0); }
PASS(fused_backward) { fused(a, 1); }
#else

PASS(crossentropy_forward) {
    crossentropy_forward(a->out[0], a->out[1], a->in[0], a->tokens, a->T, a->V);
}
PASS(crossentropy_backward) {
    crossentropy_backward(a->grad[0], a->out[1], a->tokens, a->factor, a->T, a->V);
}
PASS(adamw_update) {
    AdamWNumbers n = a->adam;
    AdamW adam = {.lr = n.lr, .beta1 = n.beta1, .beta2 = n.beta2, .eps = n.eps,
                  .weight_decay = n.weight_decay, .clip = n.clip, .t = n.t};
    adamw_update(a->out[0], a->in[3], a->out[1], a->out[2], a->C, adam);
}
#define call_fused_forward NULL
#define call_fused_backward NULL
#endif

const Submission submission = {
    IS_CUDA,
    {call_gpas_forward, call_residual_forward, call_embedding_forward, call_rmsnorm_forward,
     call_rope_forward, call_swiglu_forward, call_matmul_forward, call_attention_forward,
     call_crossentropy_forward, call_adamw_update, call_fused_forward},
    {call_gpas_backward, call_residual_backward, call_embedding_backward, call_rmsnorm_backward,
     call_rope_backward, call_swiglu_backward, call_matmul_backward, call_attention_backward,
     call_crossentropy_backward, call_adamw_update, call_fused_backward}};
