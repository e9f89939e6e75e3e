// gate.h: defines gate_value a(g) and gate_slope a'(g), the gate's activation and its derivative.
#ifndef GATE_H
#define GATE_H
#include "utils.h"
#include <math.h>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

// SiLU is the paper's choice; the others are for experiments.
enum { GATE_SILU, GATE_IDENTITY, GATE_RELU, GATE_LEAKY_RELU, GATE_TANH };

// The gate's activation a(g). For SiLU a(g) = g sigmoid(g), so a(0) = 0: a new gate does nothing.
HOST_DEVICE static inline float gate_value(float g, int activation) {
    if (activation == GATE_SILU) return g / (1 + expf(-g));
    if (activation == GATE_RELU) return g > 0 ? g : 0;
    if (activation == GATE_LEAKY_RELU) return g > 0 ? g : 0.01f * g;
    return activation == GATE_TANH ? tanhf(g) : g;
}

// Its derivative a'(g).
//   SiLU: a = g s with s = sigmoid(g) and s' = s (1 - s), so a' = s + g s (1 - s).
//         a'(0) = 1/2: a new gate can learn.
//   tanh: a' = 1 - tanh(g)^2
HOST_DEVICE static inline float gate_slope(float g, int activation) {
    float s = 1 / (1 + expf(-g)), th = tanhf(g);
    if (activation == GATE_SILU) return s + g * s * (1 - s);
    if (activation == GATE_RELU) return g > 0 ? 1 : 0;
    if (activation == GATE_LEAKY_RELU) return g > 0 ? 1 : 0.01f;
    return activation == GATE_TANH ? 1 - th * th : 1;
}
#endif
