// random.h: defines random_bits, random_uniform.
#ifndef RANDOM_H
#define RANDOM_H
#include "utils.h"

// SplitMix64 (Steele, Lea, Flood 2014): returns the next 64 random bits. The state is a counter, so
// number i of a stream can be computed without the numbers before it, and threads can share one
// stream.
#define RANDOM_STEP 0x9E3779B97F4A7C15u
static inline uint64_t random_bits(uint64_t *state) {
    uint64_t z = (*state += RANDOM_STEP);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Returns a number uniform in [0, 1), a multiple of 2^-53.
static inline double random_uniform(uint64_t *state) {
    return (random_bits(state) >> 11) / 9007199254740992.0;
}
#endif
