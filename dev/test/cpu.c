// cpu.c: defines the table of cpu.h, from train_gpas.c. Compiled as C to build/cpu.so.
#pragma GCC diagnostic ignored "-Wunused-function"  // the table does not use every function
#define TRAIN_GPAS_NO_MAIN
#include "../../train_gpas.c"
#include "cpu.h"

struct CpuModel {
    Options options;
    Model model;
};

static CpuModel *create(const Options *o, int B) {
    CpuModel *c = (CpuModel *)allocate(1, sizeof *c);
    c->options = *o;
    model_create(&c->model, &c->options, B, 1);
    return c;
}

static void destroy(CpuModel *c) {
    model_free(&c->model);
    free(c);
}

static float *parameters(CpuModel *c) { return c->model.parameters; }
static const float *gradients(CpuModel *c) { return c->model.gradients; }
static const float *logits(CpuModel *c) { return c->model.logits; }

// The backward pass overwrites the logits, so they are computed again.
static double differentiate(CpuModel *c, const int *tokens, const int *targets, int B, int T) {
    zero_gradients(&c->model);
    model_forward(&c->model, tokens, targets, B, T);
    model_backward(&c->model, tokens, targets, B, T, 1.0 / (B * T));
    return model_forward(&c->model, tokens, targets, B, T);
}

static void update(CpuModel *c, int t) {
    double gate_norm, *norms = (double *)allocate(c->options.layers, sizeof *norms);
    double norm = gradient_norms(&c->model, norms, &gate_norm);
    model_update(&c->model, t, norm, gate_norm);
    free(norms);
}

static void state(CpuModel *c, int l, int B, int T, double variances[2], double *gate) {
    layer_state(&c->model, l, B, T, variances, gate);
}

const Cpu cpu = {
    gpas_forward, gpas_backward, residual_forward, residual_backward, embedding_backward,
    rmsnorm_forward, rmsnorm_backward, swiglu_forward, swiglu_backward, attention_forward,
    attention_backward, crossentropy_forward, crossentropy_backward, create, destroy, parameters,
    gradients, logits, differentiate, update, state,
};
