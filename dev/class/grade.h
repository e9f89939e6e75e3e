/*
grade.h: what stands between the grader and a submission. submission.c compiles the submission
(train_gpas.c as C, or train_gpas.cu as C++) and puts its layers in this table; grade.c calls
them by it and knows nothing else of them. So nothing that a submission defines can get in the
grader's way, and a layer whose parameters were changed is an error of the compiler.
*/
#include <stddef.h>

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
    // Of train_gpas.cu it is called with first = 0 alone.
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
    // train_gpas.cu alone: residual, gpas and rmsnorm in one kernel.
    void (*fused_forward)(float *sum, float *out, float *normed, float *rstd, const float *inp,
                          const float *branch, const float *weight, float gate, int norm_last,
                          float A, int N, int C);
    void (*fused_backward)(float *dsum, float *dinp, float *dweight, float *dgate,
                           const float *dnext, const float *dnormed, const float *x,
                           const float *rstd, const float *weight, const float *scaled, float gate,
                           int stop_grad, int norm_last, float A, int N, int C);
} Submission;

#ifdef __cplusplus
extern "C"
#else
extern
#endif
const Submission submission;
