/*
grade.h: what stands between the grader and a submission. submission.c compiles the submission
(train_gpas.c as C, or train_gpas.cu as C++) and puts its layers in this table; grade.c calls
them by it and knows nothing else of them. So nothing that a submission defines can get in the
grader's way, and a layer whose parameters were changed is an error of the compiler.
*/
#include <stddef.h>

// What the fused kernels of train_gpas.cu get, as in its struct Fused.
typedef struct {
    int N, C, norm_last, stop_grad;
    float A, inp_gate, sum_gate;  // norm last, there is no sum_gate
    float *inp, *branch, *weight, *sum, *normed, *rstd, *dfinp, *dx, *dsum, *dweight, *dgate;
} FusedArrays;

typedef struct {
    int cuda;  // 1: train_gpas.cu
    void (*gpas_forward)(float *out, const float *inp, float gate, int activation, size_t n);
    void (*gpas_backward)(float *dinp, float *dgate, const float *dout, const float *inp,
                          float gate, int activation, int stop_grad, size_t n);
    void (*residual_forward)(float *out, const float *shortcut, const float *branch, float A,
                             size_t n);
    void (*residual_backward)(float *dshortcut, const float *dout, float A, size_t n);
    void (*embedding_forward)(float *out, const int *tokens, const float *weight, int N, int C);
    void (*embedding_backward)(float *dweight, const float *dout, const int *tokens, int N, int C);
    void (*rmsnorm_forward)(float *out, float *rstd, const float *inp, const float *weight, int N,
                            int C);
    void (*rmsnorm_backward)(float *dinp, float *dweight, const float *dout, const float *inp,
                             const float *weight, const float *rstd, int N, int C);
    void (*rope_angles)(float *table, int T, int hs);
    void (*rope_forward)(float *qkv, const float *table, int B, int T, int C, int hs);
    void (*rope_backward)(float *dqkv, const float *table, int B, int T, int C, int hs);
    void (*swiglu_forward)(float *out, const float *inp, int N, int H);
    void (*swiglu_backward)(float *dinp, const float *dout, const float *inp, int N, int H);
    void (*matmul_forward)(float *out, const float *inp, const float *weight, int N, int C, int OC);
    void (*matmul_backward)(float *dinp, float *dweight, const float *dout, const float *inp,
                            const float *weight, int N, int C, int OC);
    void (*attention_forward)(float *out, float *lse, const float *qkv, int first, int B, int T,
                              int C, int NH);
    void (*attention_backward)(float *dqkv, const float *dout, const float *out, const float *lse,
                               const float *qkv, int B, int T, int C, int NH);
    void (*crossentropy_forward)(float *losses, float *lse, const float *logits, const int *targets,
                                 int N, int V);
    void (*crossentropy_backward)(float *logits, const float *lse, const int *targets, float scale,
                                  int N, int V);
    void (*adamw_update)(float *p, const float *grad, float *m, float *v, size_t n, float lr,
                         float beta1, float beta2, float eps, float weight_decay, float clip,
                         int t);
    void (*fused)(const FusedArrays *arrays, int backward);  // train_gpas.cu alone
} Submission;

#ifdef __cplusplus
extern "C"
#else
extern
#endif
const Submission submission;
