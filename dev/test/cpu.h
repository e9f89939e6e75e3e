// cpu.h: defines Cpu, the layers and networks of train_gpas.c as a table of functions, to which the
// kernels' tests compare the kernels.
//
// build/cpu.so holds the table `cpu`. It is loaded when a test starts, not linked, because
// train_gpas.c and train_gpas.cu define the same names.
#ifndef CPU_H
#define CPU_H
#include <stddef.h>
#include "../options.h"

typedef struct CpuModel CpuModel;

typedef struct {
    void (*gpas_forward)(float *out, const float *inp, float gate, int activation, size_t n);
    void (*gpas_backward)(float *dinp, float *dgate, const float *dout, const float *inp,
                          float gate, int activation, int stop_grad, size_t n);
    void (*residual_forward)(float *out, const float *shortcut, const float *branch, float A,
                             size_t n);
    void (*residual_backward)(float *dshortcut, const float *dout, float A, size_t n);
    void (*embedding_backward)(float *dweight, const float *dout, const int *tokens, int N, int C);
    void (*rmsnorm_forward)(float *out, float *rstd, const float *inp, const float *weight, int N,
                            int C);
    void (*rmsnorm_backward)(float *dinp, float *dweight, const float *dout, const float *inp,
                             const float *weight, const float *rstd, int N, int C);
    void (*swiglu_forward)(float *out, const float *inp, int N, int H);
    void (*swiglu_backward)(float *dinp, const float *dout, const float *inp, int N, int H);
    void (*attention_forward)(float *out, float *lse, const float *qkv, int first, int B, int T,
                              int C, int NH);
    void (*attention_backward)(float *dqkv, const float *dout, const float *out, const float *lse,
                               const float *qkv, int B, int T, int C, int NH);
    void (*crossentropy_forward)(float *losses, float *lse, const float *logits, const int *targets,
                                 int N, int V);
    void (*crossentropy_backward)(float *logits, const float *lse, const int *targets, float scale,
                                  int N, int V);

    // A network in training, and its arrays: parameters and gradients, laid out as its TensorList
    // says, and the logits (B,T,V) of the last forward pass.
    CpuModel *(*create)(const Options *o, int B);
    void (*destroy)(CpuModel *c);
    float *(*parameters)(CpuModel *c);
    const float *(*gradients)(CpuModel *c);
    const float *(*logits)(CpuModel *c);
    // Computes the gradients of the mean loss, from zero, and returns this loss.
    double (*differentiate)(CpuModel *c, const int *tokens, const int *targets, int B, int T);
    void (*update)(CpuModel *c, int t);
    void (*layer_state)(CpuModel *c, int l, int B, int T, double variances[2], double *gate);
} Cpu;
#endif
