/*
grade.h: what stands between the grader and a submission. submission.c compiles the submission
(train_gpas.c as C, or train_gpas.cu as C++) and calls its layers; grade.c calls them through this
table and knows nothing else of them. So nothing that a submission defines can get in its way.
*/
#include <stddef.h>

// AdamW's numbers, and of which kind the parameters are. Only a kernel knows other kinds.
enum { MATRIX, NORM, LEARNED_GATE, FIXED_GATE };
typedef struct {
    float lr, beta1, beta2, eps, weight_decay, clip;
    int t, kind;
} AdamWNumbers;

// What a layer gets: arrays, in the order of the tables at the end of grade.c, and sizes.
typedef struct {
    float *const *in, *const *out, *const *grad, *dout;
    float *dfinp, *dx;     // of the fused kernels
    const int *tokens;     // or targets
    int B, T, C, NH, V, first;
    int stride;            // of the rows of logits: above V in train_gpas.cu alone
    int act, stop_grad, norm_last, gated;
    float factor;          // A, scale
    float gate, gates[2];  // gates: of the fused kernels, that with a gradient and the other
    AdamWNumbers adam;
} Arguments;

enum { LAYERS = 11 };
typedef struct {
    int cuda;  // 1: train_gpas.cu
    void (*forward[LAYERS])(const Arguments *a);
    void (*backward[LAYERS])(const Arguments *a);
} Submission;

#ifdef __cplusplus
extern "C"
#else
extern
#endif
const Submission submission;
