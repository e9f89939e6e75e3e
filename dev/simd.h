// simd.h: defines dot, max_of, exp_fast: loops that the compiler turns into vector instructions.
//
// With PLAIN defined, train_gpas.c itself defines them.
#ifndef SIMD_H
#define SIMD_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// Returns the sum over i of a[i] * b[i], in double; with b NULL the sum of a. The result does not
// depend on the number of threads.
static double dot(const float *a, const float *b, size_t n);

// Returns the largest of x (n).
static float max_of(const float *x, int n);

// Returns e^x with a relative error of about 1e-7.
static inline float exp_fast(float x);

#ifndef PLAIN
// The n numbers are summed in 64 chunks, and then the chunks in order: neither depends on the
// number of threads.
static double dot(const float *a, const float *b, size_t n) {
    enum { CHUNKS = 64 };
    double part[CHUNKS], sum = 0;
    #pragma omp parallel for
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        size_t begin = n * chunk / CHUNKS, end = n * (chunk + 1) / CHUNKS;
        double s = 0;
        #pragma omp simd reduction(+ : s)
        for (size_t i = begin; i < end; i++) s += (double)a[i] * (b ? b[i] : 1);
        part[chunk] = s;
    }
    for (int chunk = 0; chunk < CHUNKS; chunk++) sum += part[chunk];
    return sum;
}

// Sixteen running maxima, which the compiler keeps in vectors. The last sixteen may overlap
// those before.
static float max_of(const float *x, int n) {
    float lane[16];
    for (int k = 0; k < 16; k++) lane[k] = x[k < n ? k : 0];
    for (int i = 16; i < n; i += 16) {
        const float *next = x + (i + 16 <= n ? i : n - 16);
        for (int k = 0; k < 16; k++) lane[k] = next[k] > lane[k] ? next[k] : lane[k];
    }
    for (int half = 8; half > 0; half /= 2)
        for (int k = 0; k < half; k++)
            lane[k] = lane[k + half] > lane[k] ? lane[k + half] : lane[k];
    return lane[0];
}

// Written so that the compiler can vectorize a loop over it. With x = n ln2 + r and |r| <= ln2 / 2,
// e^r is computed by its series, and 2^n by writing n into the bits of the exponent. Underflow
// gives 0, overflow 3e38. These are selected last, because gcc's code is twice as slow if x is
// clamped first.
// (The tests with finite differences compile this with float defined as double.)
static inline float exp_fast(float x) {
    if (sizeof x > 4) return exp(x);
    float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln2 in two parts keeps r exact
    float e = 1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720));
    e = 1 + r * (1 + r * (1.0f / 2 + r * (1.0f / 6 + r * e)));
    uint32_t bits;  // the low bits of `shifted` are n
    float power;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    memcpy(&power, &bits, sizeof power);
    e = x > 88.0f ? 3e38f : e * power;
    return x < -87.0f ? 0 : e;
}
#endif
#endif
