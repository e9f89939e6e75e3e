// submission.c: the submission's layers for the grader, in the table of dev/grade.h. Compiled with
// -DSUBMISSION='"train_gpas.c"' as C, or with -DCUDA and the .cu file as C++.
#pragma GCC diagnostic ignored "-Wunused-function"  // the grader does not call all of the program
#define TRAIN_GPAS_NO_MAIN
#include SUBMISSION
#include "grade.h"
#ifdef CUDA
#include <algorithm>
typedef float real;
namespace on_gpu {
#include "on_gpu.h"
}
#define LAYER(name) on_gpu::name
#else
#define CUDA 0
#define LAYER(name) name
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
    LAYER(adamw_update),
};
