// schedule.h: defines learning_rate, clip_factors.
#ifndef SCHEDULE_H
#define SCHEDULE_H
#include "options.h"

// Returns the learning rate of step t = 0, 1, ...: linear warm-up to the peak --lr, then a cosine
// down to a tenth of it.
static inline double learning_rate(const Options *o, int t) {
    if (t < o->warmup) return o->lr * (t + 1) / o->warmup;
    double progress = (t - o->warmup) / (double)imax(1, o->steps - o->warmup);
    return o->lr * (0.1 + 0.9 * 0.5 * (1 + cos(3.14159265358979323846 * progress)));
}

// Computes two factors for gradients. *clip, for all parameters but the gates, limits the norm of
// the whole gradient, gates included, to --grad-clip. *gate_clip, for the gates, is *clip, reduced
// further if need be so that their joint norm is at most --gate-clip. norm and gate_norm are those
// before any clipping.
static inline void clip_factors(const Options *o, double norm, double gate_norm, double *clip,
                                double *gate_clip) {
    *clip = o->grad_clip > 0 && norm > o->grad_clip ? o->grad_clip / norm : 1;
    int too_large = o->gate_clip > 0 && gate_norm * *clip > o->gate_clip;
    *gate_clip = too_large ? o->gate_clip / gate_norm : *clip;
}
#endif
