/*
train_gpas.c: a LLaMA-like Transformer with GPAS, trained on the CPU. One file, no framework.

GPAS (Gradient-Preserving Activation Scaling, arXiv 2506.22049) is one learnable number per layer:

    y = x - a(g) * stop_gradient(x)         a = SiLU, g the layer's gate, 0 at the start

In a Pre-LN Transformer every layer adds to the residual stream, whose variance therefore grows with
depth until the last layers hardly change it. GPAS scales the stream down at each sum. The
stop-gradient lets the gradient through as if nothing had been scaled: the early layers lose none.

The file is a lesson, to be read from top to bottom:

    1  Tools          random numbers
    2  Layers         gpas, residual, embedding, rmsnorm, rope, swiglu, matmul, attention,
                      crossentropy: each a forward and a backward pass with its derivation
    3  Model          parameters, activations, and one block that is all twelve networks
    4  Optimizer      AdamW, clipping, the learning rate
    5  Data           token files
    6  Sampling       telling a story
    7  Training       validation, the loop, main

What teaches nothing about GPAS stands in dev/plumbing.h: options (o->batch is --batch), allocate()
(memory set to 0), die(), imin(), the tokenizer, checkpoint files; in dev/logs.h: what a run writes;
in dev/evaluation.h: perplexity, multiple choice; in dev/finite.h: the search for the operation that
made a number not finite.

Conventions. B batch, T sequence length, C channels, H feed-forward width, L layers, NH heads,
hs = C/NH, V vocabulary. Matrices are row-major; a pointer's shape stands in its comment: (B,T,C).
A backward pass is given dout = dLoss/dout. It WRITES the gradient of its input, dinp, and ADDS to
the gradients of its parameters, because those are summed over micro-batches.
No sum depends on how many threads compute it: the results are the same bit for bit.
Everything is common to C11 and C++17, so that train_gpas.cu can include this file.
*/
#ifndef TRAIN_GPAS_CUDA  // train_gpas.cu has included it already
#include "dev/plumbing.h"
#endif

/* ------------------------------------------------------------------------------------------------
1. Tools

OpenMP in five lines. `omp parallel for` shares the turns of the loop below it among the threads and
waits at its end until all are done. `simd` promises that the turns of a loop do not depend on each
other, so that the compiler may make one vector instruction of 16; reduction(+ : s) gives each lane
an s of its own and adds them up at the end. `schedule(dynamic)` gives a thread its next turn when
it is done with one. Inside `omp parallel`, where every thread runs all lines, `omp for` shares.
*/

// SplitMix64 (Steele, Lea, Flood 2014): the next 64 random bits. The state only counts, so number
// i of a stream can be had without the numbers before it: threads can share one stream.
#define RANDOM_STEP 0x9E3779B97F4A7C15u
static uint64_t random_bits(uint64_t *state) {
    uint64_t z = (*state += RANDOM_STEP);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Uniform in [0, 1), a multiple of 2^-53.
static double random_uniform(uint64_t *state) { return (random_bits(state) >> 11) / 0x1p53; }

/* ------------------------------------------------------------------------------------------------
2. Layers

Five helpers (a sum that is the same for any number of threads, a maximum, a fast exp, sigmoid,
prefetch), then GPAS first. The layers are plain loops; whatever is a product of matrices goes to
gemm(). That and attention, which is made of its parts, are what is written for speed. In
derivations dy is short for dout, x for inp, w for weight.
*/
#ifndef TRAIN_GPAS_CUDA  // train_gpas.cu has these layers as kernels

// Sum over i of a[i] * b[i], in double; b may be NULL for the plain sum. The chunks are the same
// for any number of threads, and are added in order: so is the result.
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

// The largest of x (n) and `largest`. Sixteen running maxima: the compiler makes them one vector.
static float largest_of(const float *x, int n, float largest) {
    float lane[16];
    int i = 0;
    for (int k = 0; k < 16; k++) lane[k] = largest;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 16; k++) lane[k] = x[i + k] > lane[k] ? x[i + k] : lane[k];
    for (; i < n; i++) lane[0] = x[i] > lane[0] ? x[i] : lane[0];
    for (int k = 0; k < 16; k++) largest = lane[k] > largest ? lane[k] : largest;
    return largest;
}

// e^x to about 1e-7 relative, written so that the compiler turns a loop over it into vector code:
// x = n ln2 + r with |r| <= ln2 / 2, e^r by its series, 2^n by writing n into the exponent's bits.
// Beyond what a float can hold it is 0 or 3e38. Those are chosen at the end: limits on x cost gcc
// twice as much. (The tests' finite differences build this file with float as double.)
static inline float exp_fast(float x) {
#ifdef float
    return exp(x);
#else
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
#endif
}

// Its slope is s (1 - s), with s = sigmoid(x).
static inline float sigmoid(float x) { return 1 / (1 + exp_fast(-x)); }

// Asks memory for the n numbers from x on, to have them in a cache when they are needed. Processors
// do so by themselves, but as a rule only within a page of 4 KiB. Nothing is read: an address
// beyond the array does no harm.
static inline void prefetch(const float *x, int n) {
    for (int i = 0; i < n; i += 16) __builtin_prefetch(x + i);
}

// The gate's activation a(g). SiLU: a = g sigmoid(g), so a(0) = 0: a new gate does nothing.
static float gate_value(float g, int act) {
    if (act == GATE_SILU) return g / (1 + expf(-g));
    if (act == GATE_RELU) return g > 0 ? g : 0;
    if (act == GATE_LEAKY_RELU) return g > 0 ? g : 0.01f * g;
    return act == GATE_TANH ? tanhf(g) : g;
}

// Given g, wanted the slope a'(g).
//   SiLU: a = g s with s = sigmoid(g), so a' = s + g s (1 - s). a'(0) = 1/2: a new gate can learn.
//   tanh: 1 - tanh(g)^2.
static float gate_slope(float g, int act) {
    float s = 1 / (1 + expf(-g)), th = tanhf(g);
    if (act == GATE_SILU) return s + g * s * (1 - s);
    if (act == GATE_RELU) return g > 0 ? 1 : 0;
    if (act == GATE_LEAKY_RELU) return g > 0 ? 1 : 0.01f;
    return act == GATE_TANH ? 1 - th * th : 1;
}

// GPAS, paper section 3:  y = x - a(g) sg(x), where sg() is the stop-gradient.
// Forward, sg(x) is x: the activation shrinks to (1 - a(g)) x.
// out and inp (n); gate: one number; act: GATE_*.
static void gpas_forward(float *out, const float *inp, float gate, int act, size_t n) {
    float scale = 1 - gate_value(gate, act);
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) out[i] = scale * inp[i];
}

// Given dy, wanted dx and dg.
//   dx: sg(x) is a constant to the derivative, so dy/dx = 1:    dx = dy
//       The gradient passes unscaled: this is the whole idea. It is on purpose not the derivative
//       of what the forward pass computes, the plain scale y = (1 - a) x. That is (1 - a) dy: of
//       what reaches the first of L layers unscaled, about (1 - a)^(2L) would be left.
//   dg: dy_i/dg = -a'(g) x_i for each element i, therefore      dg = -a'(g) sum_i x_i dy_i
// dinp, dout, inp (n), dinp may be dout; dgate: one number, added to, or NULL if the gate is fixed.
static void gpas_backward(float *dinp, float *dgate, const float *dout, const float *inp,
                          float gate, int act, int stop_grad, size_t n) {
    if (dgate) *dgate -= gate_slope(gate, act) * (float)dot(inp, dout, n);
    if (stop_grad && dinp == dout) return;
    float scale = stop_grad ? 1 : 1 - gate_value(gate, act);
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) dinp[i] = scale * dout[i];
}

// The residual sum: out = alpha shortcut + branch. alpha is 1 but for DeepNorm. All (n); out may be
// shortcut.
static void residual_forward(float *out, const float *shortcut, const float *branch, float alpha,
                             size_t n) {
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) out[i] = alpha * shortcut[i] + branch[i];
}

// Given dout, wanted dshortcut.
//   d(out)/d(shortcut) = alpha and d(out)/d(branch) = 1: dshortcut = alpha dout, and the gradient
//   of the branch is dout itself, the same array.
// dshortcut, dout (n), dshortcut may be dout.
static void residual_backward(float *dshortcut, const float *dout, float alpha, size_t n) {
    if (alpha == 1 && dshortcut == dout) return;
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) dshortcut[i] = alpha * dout[i];
}

// Each token's row of the table: out[n,:] = weight[tokens[n],:].
// out (N,C), weight (V,C), tokens (N).
static void embedding_forward(float *out, const int *tokens, const float *weight, int N, int C) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        memcpy(out + (size_t)n * C, weight + (size_t)tokens[n] * C, C * sizeof(float));
}

// Given dout, wanted dweight.
//   A row of the table was copied to every place its token stands at, so its gradient is the sum
//   over those places. Each thread owns some channels: no two threads add to the same number.
// dweight (V,C), added to; dout (N,C).
static void embedding_backward(float *dweight, const float *dout, const int *tokens, int N, int C) {
    enum { BLOCK = 32 };
    #pragma omp parallel for
    for (int c0 = 0; c0 < C; c0 += BLOCK)
        for (int n = 0; n < N; n++) {
            float *dw = dweight + (size_t)tokens[n] * C;
            const float *dy = dout + (size_t)n * C;
            for (int c = c0; c < imin(C, c0 + BLOCK); c++) dw[c] += dy[c];
        }
}

// RMSNorm (arXiv 1910.07467): y = w x r with r = 1 / sqrt(mean(x^2) + eps), eps = 1e-6, over the
// channels of each row. out, inp (N,C); weight (C); rstd (N) keeps r for the backward pass.
static void rmsnorm_forward(float *out, float *rstd, const float *inp, const float *weight, int N,
                            int C) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *x = inp + (size_t)n * C;
        float *y = out + (size_t)n * C, sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) sum += x[c] * x[c];
        float r = 1 / sqrtf(sum / C + 1e-6f);
        #pragma omp simd
        for (int c = 0; c < C; c++) y[c] = weight[c] * x[c] * r;
        rstd[n] = r;
    }
}

// Given dy, wanted dx and dw.
//   For a row, with m = mean(x^2) + eps and u = w dy, the gradient of x r:
//   y_c = w_c x_c r,  and r = m^(-1/2) depends on every x_c:  dr/dx_c = -1/2 m^(-3/2) 2 x_c / C
//                                                                     = -r^3 x_c / C
//   dx_c = u_c r + (sum_k u_k x_k) dr/dx_c = r (u_c - x_c r^2 mean_k(u_k x_k))
//   dw_c = sum over rows of dy_c x_c r
// dinp, dout, inp (N,C), dinp must not be dout, which is read again for dw; weight (C); rstd (N);
// dweight (C), added to.
static void rmsnorm_backward(float *dinp, float *dweight, const float *dout, const float *inp,
                             const float *weight, const float *rstd, int N, int C) {
    enum { BLOCK = 32 };
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *x = inp + (size_t)n * C, *dy = dout + (size_t)n * C;
        float *dx = dinp + (size_t)n * C, r = rstd[n], sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) sum += weight[c] * dy[c] * x[c];
        float pull = r * r * sum / C;
        #pragma omp simd
        for (int c = 0; c < C; c++) dx[c] = r * (weight[c] * dy[c] - x[c] * pull);
    }
    #pragma omp parallel for
    for (int c0 = 0; c0 < C; c0 += BLOCK)  // as in embedding_backward
        for (int n = 0; n < N; n++) {
            const float *x = inp + (size_t)n * C, *dy = dout + (size_t)n * C;
            prefetch(x + 16 * C + c0, BLOCK), prefetch(dy + 16 * C + c0, BLOCK);
            for (int c = c0; c < imin(C, c0 + BLOCK); c++) dweight[c] += dy[c] * x[c] * rstd[n];
        }
}

// RoPE (arXiv 2104.09864), in place: turns the pairs (x0, x1) of adjacent channels of every query
// and key by the angle of their position: (x0 cos - x1 sin, x0 sin + x1 cos). Turning one by a and
// the other by b changes their product as turning one by b - a does: it then depends on how far
// apart query and key stand. Values are left alone. qkv (B,T,3C);
// table (T,hs/2,2) from rope_angles(): the cosine and sine of each pair's angle at each position.

// direction 1 turns forward, -1 back.
static void rope_turn(float *qkv, const float *table, int B, int T, int C, int hs, int direction) {
    #pragma omp parallel for
    for (int n = 0; n < B * T; n++) {
        const float *angles = table + (size_t)(n % T) * hs;
        float *row = qkv + (size_t)n * 3 * C;
        prefetch(row + 3 * C, 2 * C);  // the next row
        for (int head = 0; head < 2 * C; head += hs)  // all heads of the queries, then of the keys
            for (int j = 0; j < hs; j += 2) {
                float cosine = angles[j], sine = direction * angles[j + 1];
                float x0 = row[head + j], x1 = row[head + j + 1];
                row[head + j] = x0 * cosine - x1 * sine;
                row[head + j + 1] = x0 * sine + x1 * cosine;
            }
    }
}

static void rope_forward(float *qkv, const float *table, int B, int T, int C, int hs) {
    rope_turn(qkv, table, B, T, C, hs, 1);
}

// Given dy, wanted dx.
//   y = R x with R a rotation: dx = R^T dy, and the transpose of a rotation is the rotation back.
// dqkv (B,T,3C), in place.
static void rope_backward(float *dqkv, const float *table, int B, int T, int C, int hs) {
    rope_turn(dqkv, table, B, T, C, hs, -1);
}

// SwiGLU (arXiv 2002.05202): out = silu(a) * b, silu(a) = a sigmoid(a).
// out (N,H); inp (N,2H): a row holds its H values of a = w1 x, then those of b = w3 x.
static void swiglu_forward(float *out, const float *inp, int N, int H) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *a = inp + (size_t)n * 2 * H, *b = a + H;
        float *y = out + (size_t)n * H;
        prefetch(a + 2 * H, 2 * H);  // the next row
        #pragma omp simd
        for (int i = 0; i < H; i++) y[i] = a[i] * sigmoid(a[i]) * b[i];
    }
}

// Given dy, wanted da and db.
//   With s = sigmoid(a):  db = dy silu(a) = dy a s
//                         da = dy b silu'(a) = dy b (s + a s (1 - s))
// dinp, inp (N,2H); dout (N,H).
static void swiglu_backward(float *dinp, const float *dout, const float *inp, int N, int H) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *a = inp + (size_t)n * 2 * H, *b = a + H, *dy = dout + (size_t)n * H;
        float *da = dinp + (size_t)n * 2 * H, *db = da + H;
        prefetch(a + 2 * H, 2 * H), prefetch(dy + H, H);  // the next rows
        #pragma omp simd
        for (int i = 0; i < H; i++) {
            float s = sigmoid(a[i]);
            da[i] = dy[i] * b[i] * (s + a[i] * s * (1 - s));
            db[i] = dy[i] * a[i] * s;
        }
    }
}

/*
Matrix multiplication. Nine tenths of a training step are spent here, so this is the one place that
is written for the machine. A core can do 16 multiply-adds an instruction (AVX-512), but only if its
operands are in registers; memory is a hundred times too slow. Each level below makes one move of
data serve many multiply-adds:

  registers  multiply_tile() keeps a tile of MR x NR results in registers over the whole depth k.
             Each step loads NR numbers of B and MR of A and does MR * NR multiply-adds.
  L1, L2     pack() copies A and B into panels that lie in memory in the very order in which the
             tile reads them, so every load is the next one. Depth is cut to KC: an MC x KC block of
             A, 0.4 MB, stays in the L2 cache while all panels of B pass by it.
  L3         B is cut to NC columns, so that its packed copy stays in the L3 cache.
  memory     while one part of A is multiplied, the next one is asked for, a line at a time.
  cores      B is packed once for all; then each core takes some rows of A at a time. Every result
             is summed by one thread, in the order of k: who computes it changes nothing.

The vectors are the compiler's own extension: the same lines become AVX-512, AVX2, SSE or NEON.
*/
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, MR = 12 };  // 24 of the 32 registers hold the tile
#elif defined(__AVX2__)
enum { VECTOR_BYTES = 32, MR = 6 };   // 12 of 16
#elif defined(__aarch64__)
enum { VECTOR_BYTES = 16, MR = 12 };  // 24 of 32
#else
enum { VECTOR_BYTES = 16, MR = 6 };   // 12 of 16
#endif
enum { LANES = VECTOR_BYTES / sizeof(float), NR = 2 * LANES };
enum { KC = 704, MC = 12 * MR, NC = 4096 };
typedef float Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(float)), may_alias));
typedef float Four __attribute__((vector_size(4 * sizeof(float)), aligned(sizeof(float)),
                                  may_alias));

// Memory for packed panels, one pair per thread, kept from call to call.
static float *packed[2];
static size_t packed_size[2];
#pragma omp threadprivate(packed, packed_size)

static float *packing_space(int which, size_t size) {
    if (packed_size[which] < size) {
        free(packed[which]);
        packed[which] = (float *)allocate(size, sizeof(float));
        packed_size[which] = size;
    }
    return packed[which];
}

static void free_packing_space(void) {
    #pragma omp parallel
    for (int which = 0; which < 2; which++) {
        free(packed[which]);
        packed[which] = NULL, packed_size[which] = 0;
    }
}

// Turns a square of 4 x 4 numbers, a b c d: dst[k * width + line] = src[line * line_step + k].
static inline void turn_square(float *dst, int width, const float *src, size_t line_step) {
#if defined(__clang__) || __GNUC__ >= 12
    Four line[4], pair[4];  // pairs: a0 c0 a1 c1, a2 c2 a3 c3, b0 d0 b1 d1, b2 d2 b3 d3
    for (int i = 0; i < 4; i++) line[i] = *(const Four *)(src + i * line_step);
    for (int i = 0; i < 2; i++) {
        pair[2 * i] = __builtin_shufflevector(line[i], line[i + 2], 0, 4, 1, 5);
        pair[2 * i + 1] = __builtin_shufflevector(line[i], line[i + 2], 2, 6, 3, 7);
    }
    for (int i = 0; i < 2; i++, dst += 2 * width) {
        *(Four *)dst = __builtin_shufflevector(pair[i], pair[i + 2], 0, 4, 1, 5);
        *(Four *)(dst + width) = __builtin_shufflevector(pair[i], pair[i + 2], 2, 6, 3, 7);
    }
#else
    for (int k = 0; k < 16; k++) dst[k / 4 * width + k % 4] = src[k % 4 * line_step + k / 4];
#endif
}

// Packs `lines` rows of A (width MR) or columns of B (width NR) as panels of `width` lines: number
// k of a line is src[line * line_step + k * k_step]. dst (panels,depth,width), the last panel
// filled up with zeros. Lines side by side are copied, all panels at once; others are turned.
// Always inline: the compiler makes the code for one width.
static inline __attribute__((always_inline)) void pack(float *dst, const float *src,
                                                       size_t line_step, size_t k_step, int lines,
                                                       int width, int depth) {
    int copied = line_step == 1 ? lines / width * width : 0;
    for (int k = 0; k < depth && copied; k++)
        for (int line = 0; line < copied; line += width) {
            const float *from = src + k * k_step + line;
            prefetch(from + 8 * k_step, width);
            memcpy(dst + (size_t)line * depth + k * width, from, width * sizeof(float));
        }
    for (int line = copied; line < lines; line += width) {
        float *panel = dst + (size_t)line * depth;
        const float *from = src + line * line_step;
        int full = imin(width, lines - line);
        int turned = k_step == 1 ? full / 4 * 4 : 0, turned_depth = depth / 4 * 4;
        for (int i = 0; i < turned; i++)  // the next panel's lines
            prefetch(from + (i + width) * line_step, depth);
        for (int k = 0; k < turned_depth; k += 4)
            for (int i = 0; i < turned; i += 4)
                turn_square(panel + k * width + i, width, from + i * line_step + k, line_step);
        for (int k = turned == width ? turned_depth : 0; k < depth; k++)
            for (int i = k < turned_depth ? turned : 0; i < width; i++)
                panel[k * width + i] = i < full ? from[i * line_step + k * k_step] : 0;
    }
}

// Memory that will be packed next: `rows` rows of `length` numbers, `stride` apart, from `row` on.
typedef struct { const float *row; size_t stride; int rows, length, at; } Ahead;

// Asks for the next 16 numbers of it: a line of the cache. A line in every eighth step of a tile
// does not hold the tile up, and adds up to all lines where B has six panels or more.
static inline void prefetch_line(Ahead *f) {
    if (f->rows == 0) return;
    __builtin_prefetch(f->row + f->at);
    f->at += 16;
    if (f->at >= f->length) f->at = 0, f->row += f->stride, f->rows--;
}

// C (rows,columns), with rows <= height <= MR and columns <= NR, = or += a panel of A times one of
// B, depth at least 1. ahead: what to ask memory for, or NULL. A tile that reaches over C's edge
// goes to `edge` first. Always inline: the compiler makes the code for each height, and keeps the
// tile in registers from first to last.
static inline __attribute__((always_inline)) void multiply_tile(
    int height, float *c, size_t ldc, const float *a, int a_row, size_t a_step, const float *b,
    int depth, int rows, int columns, int accumulate, Ahead *ahead) {
    int whole = rows == height && columns == NR;
    float edge[MR * NR], *out = whole ? c : edge;
    size_t out_row = whole ? ldc : (size_t)NR;
    Vector zero = {0}, tile[MR][2];
    for (int i = 0; i < height; i++) {
        tile[i][0] = tile[i][1] = zero;
        __builtin_prefetch(c + i * ldc), __builtin_prefetch(c + i * ldc + LANES);
    }
    do {
        if (ahead && depth % 8 == 0) prefetch_line(ahead);
        Vector b0 = *(const Vector *)b, b1 = *(const Vector *)(b + LANES);
        for (int i = 0; i < height; i++) {
            tile[i][0] += a[i * a_row] * b0;
            tile[i][1] += a[i * a_row] * b1;
        }
        a += a_step, b += NR;
    } while (--depth);
    for (int i = 0; i < height; i++, out += out_row) {
        Vector *c0 = (Vector *)out, *c1 = (Vector *)(out + LANES);
        if (accumulate && whole) tile[i][0] += *c0, tile[i][1] += *c1;
        *c0 = tile[i][0], *c1 = tile[i][1];
    }
    for (int i = 0; i < rows && !whole; i++, c += ldc)
        for (int j = 0; j < columns; j++) c[j] = (accumulate ? c[j] : 0) + edge[i * NR + j];
}

// C (M,N) = or += A B from panels. A (i,k) is a[i / MR * a_panel + i % MR * a_row + k * a_step].
// Packed, a_panel is MR * depth, a_row 1 and a_step MR; but a block of scores, NR wide, need not be
// packed: its transpose has a_row 1 and a_step NR, it itself a_row NR and a_step 1. B (k,j) is
// b[j / NR * b_panel + k * NR + j % NR]. The last rows may be a tile of one or two thirds: less is
// computed in vain, and nothing is read beyond the NR rows of a block's transpose. f: as `ahead`.
// Always inline: the compiler makes the code for a_row 1 and NR.
static inline __attribute__((always_inline)) void multiply_rows(
    float *c, size_t ldc, const float *a, size_t a_panel, int a_row, size_t a_step, const float *b,
    size_t b_panel, int M, int N, int depth, int add, Ahead *f) {
    enum { LOW = MR / 3, HIGH = MR - LOW };
    for (int j = 0; j < N; j += NR, b += b_panel)
        for (int i = 0; i < M; i += MR) {
            const float *from = a + i / MR * a_panel;
            float *to = c + i * ldc + j;
            int rows = imin(MR, M - i), columns = imin(NR, N - j);
            if (rows > HIGH)
                multiply_tile(MR, to, ldc, from, a_row, a_step, b, depth, rows, columns, add, f);
            else if (rows > LOW)
                multiply_tile(HIGH, to, ldc, from, a_row, a_step, b, depth, rows, columns, add, f);
            else multiply_tile(LOW, to, ldc, from, a_row, a_step, b, depth, rows, columns, add, f);
        }
}

// The same for a_row 1, with nothing to ask memory for: attention's products are small.
static void multiply(float *c, size_t ldc, const float *a, size_t a_panel, size_t a_step,
                     const float *b, size_t b_panel, int M, int N, int depth, int accumulate) {
    multiply_rows(c, ldc, a, a_panel, 1, a_step, b, b_panel, M, N, depth, accumulate, NULL);
}

// C = A B, or C += A B with accumulate. C (M,N) with rows ldc apart; A (M,K): element (i,k) is
// a[i * a_row + k * a_k]; B (K,N): element (k,j) is b[j * b_column + k * b_k]. So a transposed
// matrix is only a change of strides. M, N and K at least 1.
// For each block of NC columns and `depth` steps all threads pack B; then each takes some rows of A
// at a time, packs them for itself and multiplies; meanwhile memory is asked for those that it will
// take next if the threads go on in turn. K is cut into equal depths, at most KC, and the rows into
// equal parts, as many for each thread.
static void gemm(float *c, size_t ldc, const float *a, size_t a_row, size_t a_k, const float *b,
                 size_t b_column, size_t b_k, int M, int N, int K, int accumulate) {
    int depth = (K - 1) / ((K + KC - 1) / KC) + 1, threads = omp_get_max_threads();
    int panels = (M + MR - 1) / MR, parts = imin(panels, (M / MC / threads + 1) * threads);
    float *pb = packing_space(1, (size_t)(imin(N, NC) + NR) * depth);
    #pragma omp parallel if ((double)M * N * K > 1e5)
    for (int j0 = 0; j0 < N; j0 += NC)
        for (int k0 = 0; k0 < K; k0 += depth) {
            int columns = imin(NC, N - j0), steps = imin(depth, K - k0);
            int share = ((columns - 1) / threads / NR + 1) * NR;  // columns of B for each thread
            float *pa = packing_space(0, (MC + MR) * KC);
            #pragma omp for
            for (int j = 0; j < columns; j += share)
                pack(pb + (size_t)j * steps, b + (j0 + j) * b_column + k0 * b_k, b_column, b_k,
                     imin(share, columns - j), NR, steps);
            #pragma omp for schedule(dynamic)
            for (int part = 0; part < parts; part++) {
                int i = (int)((int64_t)panels * part / parts) * MR;
                int rows = imin(M, (int)((int64_t)panels * (part + 1) / parts) * MR) - i;
                pack(pa, a + i * a_row + k0 * a_k, a_row, a_k, rows, MR, steps);
                int next = i + rows * threads, in_rows = a_k == 1;  // or in columns
                Ahead ahead = {a + next * a_row + k0 * a_k, in_rows ? a_row : a_k,
                               in_rows ? rows : steps, in_rows ? steps : rows, 0};
                if (next >= M) ahead.rows = 0;
                multiply_rows(c + i * ldc + j0, ldc, pa, (size_t)MR * steps, 1, MR, pb,
                              (size_t)NR * steps, rows, columns, steps, accumulate || k0 > 0,
                              &ahead);
            }
        }
}

// A linear layer without bias: out = inp weight^T. out (N,OC), inp (N,C), weight (OC,C).
static void matmul_forward(float *out, const float *inp, const float *weight, int N, int C,
                           int OC) {
    gemm(out, OC, inp, C, 1, weight, C, 1, N, OC, C, 0);
}

// Given dout, wanted dinp and dweight.
//   out_no = sum_c inp_nc w_oc. Each inp_nc feeds all outputs of its row, each w_oc all rows:
//   dinp_nc = sum_o dout_no w_oc        dinp = dout weight          (N,OC) (OC,C)
//   dw_oc   = sum_n dout_no inp_nc      dweight = dout^T inp        (OC,N) (N,C)
// dinp, inp (N,C); dout (N,OC); weight, dweight (OC,C), dweight added to.
static void matmul_backward(float *dinp, float *dweight, const float *dout, const float *inp,
                            const float *weight, int N, int C, int OC) {
    gemm(dinp, C, dout, OC, 1, weight, 1, C, N, C, OC, 0);
    gemm(dweight, C, dout, 1, OC, inp, 1, C, OC, C, N, 1);
}

/*
Causal attention, each head by itself. With q_t, k_s, v_s (hs numbers each) of one head:

    S_ts = q_t . k_s / sqrt(hs) for s <= t    P_t = softmax over s of S_t    o_t = sum_s P_ts v_s

P has T x T numbers per head: too many to keep. As in FlashAttention (arXiv 2205.14135) it exists
only in blocks, NR columns wide. The softmax is carried along: after each block of keys a query
knows the largest score so far, m, and the sum of e^(S - m). When a larger score turns up, what has
been summed is corrected by e^(m_old - m_new). At the end only lse_t = m + log(sum) is kept, one
number per row, from which the backward pass gets any P_ts = e^(S_ts - lse_t) again.

The products are made of gemm's parts, pack() and multiply_rows(), so that each head's rows are
packed once for many blocks. A block of P, being NR wide, is already a panel and need not be packed
at all. Blocks that lie wholly after their queries are skipped.
*/
enum { QUERIES = 256, KEYS = 256 };  // packed at once; multiples of NR

// Key j against query i of a block: the scores S (keys,NR), without their scale, one column for
// each query, become e^(scale (S - m)). m, the largest so far, and sum (NR) are carried along;
// correction (NR) gets the factor for what has been summed so far. Key j stands after query i where
// j > i + diagonal: there P is 0.
static void softmax_block(float *score, float *m, float *sum, float *correction, int keys,
                          int diagonal, float scale) {
    float largest[NR], block[NR] = {0};
    memcpy(largest, m, sizeof largest);
    for (int j = diagonal + 1; j < keys; j++)
        for (int i = 0; i < imin(NR, j - diagonal); i++) score[j * NR + i] = -1e30f;
    for (int j = 0; j < keys; j++)
        #pragma omp simd
        for (int i = 0; i < NR; i++) {
            float s = score[j * NR + i];
            largest[i] = s > largest[i] ? s : largest[i];
        }
    for (int j = 0; j < keys; j++)
        #pragma omp simd
        for (int i = 0; i < NR; i++) {
            float p = exp_fast(scale * (score[j * NR + i] - largest[i]));
            score[j * NR + i] = p;
            block[i] += p;
        }
    for (int i = 0; i < NR; i++) {
        correction[i] = exp_fast(scale * (m[i] - largest[i]));
        sum[i] = sum[i] * correction[i] + block[i];
        m[i] = largest[i];
    }
}

// out (B,T,C); lse (B,NH,T); qkv (B,T,3C): a row holds the queries of all heads, then keys, values.
static void attention_forward(float *out, float *lse, const float *qkv, int B, int T, int C,
                              int NH) {
    int hs = C / NH, row = 3 * C, blocks = (T + QUERIES - 1) / QUERIES;
    float scale = 1 / sqrtf((float)hs);
    #pragma omp parallel for schedule(dynamic)
    for (int task = 0; task < B * NH * blocks; task++) {
        int b = task / blocks / NH, h = task / blocks % NH, t0 = task % blocks * QUERIES;
        int queries = imin(QUERIES, T - t0);
        const float *q = qkv + ((size_t)b * T + t0) * row + h * hs;
        float *o = out + ((size_t)b * T + t0) * C + h * hs;
        float score[KEYS * NR], m[QUERIES], sum[QUERIES], correction[NR];
        float *pq = packing_space(0, (size_t)QUERIES * hs);
        float *pk = packing_space(1, (size_t)(KEYS + MR) * hs + KEYS * (hs + NR));
        float *pv = pk + (size_t)(KEYS + MR) * hs;
        for (int i = 0; i < QUERIES; i++) m[i] = -1e30f, sum[i] = 0;
        pack(pq, q, row, 1, queries, NR, hs);
        for (int s0 = 0; s0 < t0 + queries; s0 += KEYS) {
            int keys = imin(KEYS, t0 + queries - s0);
            const float *k = qkv + ((size_t)b * T + s0) * row + C + h * hs, *v = k + C;
            pack(pk, k, row, 1, keys, MR, hs);
            pack(pv, v, 1, row, hs, NR, keys);
            for (int i = 0; i < queries; i += NR) {
                int rows = imin(NR, queries - i), seen = imin(keys, t0 + i + rows - s0);
                multiply(score, NR, pk, MR * hs, MR, pq + i * hs, 0, seen, NR, hs, 0);
                softmax_block(score, m + i, sum + i, correction, seen, t0 + i - s0, scale);
                for (int r = 0; r < rows && s0 > 0; r++)
                    for (int c = 0; c < hs; c++) o[(size_t)(i + r) * C + c] *= correction[r];
                multiply(o + (size_t)i * C, C, score, MR, NR, pv, (size_t)NR * keys, rows, hs,
                         seen, s0 > 0);
            }
        }
        for (int i = 0; i < queries; i++) {
            for (int c = 0; c < hs; c++) o[(size_t)i * C + c] /= sum[i];
            lse[((size_t)b * NH + h) * T + t0 + i] = scale * m[i] + logf(sum[i]);
        }
    }
}

// Given the scores S of a block, without their scale, and the gradient dP of P, wanted P and dS.
//   P_ts = e^(scale S_ts - lse_t), 0 for a key after the query
//   dS_ts = scale P_ts (dP_ts - sum_r P_tr dP_tr), the sum over r of dP_tr times the derivative of
//   P_tr by S_ts, which is scale P_tr ([r = s] - P_ts);
//   and that last sum needs no row of P: dP_tr = do_t . v_r, so it is do_t . (sum_r P_tr v_r),
//   that is do_t . o_t, called delta_t.
// p: S in, P out; ds: dP in, dS out, both (queries,NR), a column for each key; lse, delta
// (queries). Key j stands after query i where j > i + diagonal.
static void softmax_block_backward(float *p, float *ds, const float *lse, const float *delta,
                                   int queries, int diagonal, float scale) {
    for (int i = 0; i < imin(queries, NR - diagonal); i++)
        for (int j = imax(0, i + diagonal + 1); j < NR; j++) p[i * NR + j] = -1e30f;
    for (int i = 0; i < queries; i++, p += NR, ds += NR)
        #pragma omp simd
        for (int j = 0; j < NR; j++) {
            p[j] = exp_fast(p[j] * scale - lse[i]);
            ds[j] = scale * p[j] * (ds[j] - delta[i]);
        }
}

// One head's gradients from `queries` queries, of which the first stands at position t0. q (T,hs),
// keys and values C and 2C after it, and their gradients, have rows 3C apart; dy, o (queries,hs)
// rows C apart. Called for t0 = 0, QUERIES, ...: dk and dv are first written by the queries that
// stand among their keys, then added to.
static void attention_backward_block(float *dq, const float *q, const float *dy, const float *o,
                                     const float *lse, int t0, int queries, int C, int hs) {
    int row = 3 * C, wide = (hs + NR - 1) / NR * NR;
    float p[QUERIES * NR], ds[QUERIES * NR], delta[QUERIES], scale = 1 / sqrtf((float)hs);
    // As rows of A, depth hs: q, dy. As columns of B, depth queries: q, dy.
    float *rows_q = packing_space(0, (size_t)2 * QUERIES * (hs + wide) + 2 * MR * hs);
    float *rows_dy = rows_q + (size_t)(QUERIES + MR) * hs;
    float *columns_q = rows_dy + (size_t)(QUERIES + MR) * hs;
    float *columns_dy = columns_q + (size_t)QUERIES * wide;
    const float *qt = q + (size_t)t0 * row;
    pack(rows_q, qt, row, 1, queries, MR, hs), pack(columns_q, qt, 1, row, hs, NR, queries);
    pack(rows_dy, dy, C, 1, queries, MR, hs), pack(columns_dy, dy, 1, C, hs, NR, queries);
    for (int i = 0; i < queries; i++) {
        const float *oi = o + (size_t)i * C, *dyi = dy + (size_t)i * C;
        float sum = 0;
        prefetch(oi + (size_t)8 * C, hs);  // o alone was not touched by pack()
        #pragma omp simd reduction(+ : sum)
        for (int c = 0; c < hs; c++) sum += oi[c] * dyi[c];
        delta[i] = sum;
    }
    float *pk = packing_space(1, (size_t)2 * NR * hs + NR * wide);
    float *pv = pk + NR * hs, *columns_k = pv + NR * hs;
    for (int s0 = 0; s0 < t0 + queries; s0 += NR) {
        int keys = imin(NR, t0 + queries - s0);
        int first = imax(0, s0 - t0) / MR * MR, n = queries - first;  // those before see no key
        const float *k = q + (size_t)s0 * row + C, *v = k + C;
        float *dk = dq + (size_t)s0 * row + C, *dv = dk + C;
        pack(pk, k, row, 1, keys, NR, hs), pack(pv, v, row, 1, keys, NR, hs);
        pack(columns_k, k, 1, row, hs, NR, keys);
        multiply(p, NR, rows_q + first * hs, MR * hs, MR, pk, 0, n, NR, hs, 0);
        multiply(ds, NR, rows_dy + first * hs, MR * hs, MR, pv, 0, n, NR, hs, 0);
        softmax_block_backward(p, ds, lse + first, delta + first, n, t0 + first - s0, scale);
        multiply(dv, row, p, MR, NR, columns_dy + first * NR, NR * queries, keys, hs, n,
                 s0 < t0);
        multiply(dk, row, ds, MR, NR, columns_q + first * NR, NR * queries, keys, hs, n,
                 s0 < t0);
        multiply_rows(dq + (size_t)(t0 + first) * row, row, ds, MR * NR, NR, 1, columns_k,
                      NR * keys, n, hs, keys, s0 > 0, NULL);
    }
}

// Given do, wanted dq, dk, dv.
//   The chain rule, backwards through o = P v and S = q k^T, with dS as above, which has the scale
//   1 / sqrt(hs) in it already; every block of P again:
//   dv_s = sum_t P_ts do_t      dP_ts = do_t . v_s      dS as above
//   dq_t = sum_s dS_ts k_s      dk_s = sum_t dS_ts q_t
// dqkv, qkv (B,T,3C); dout, out (B,T,C); lse (B,NH,T).
static void attention_backward(float *dqkv, const float *dout, const float *out, const float *lse,
                               const float *qkv, int B, int T, int C, int NH) {
    int hs = C / NH;
    #pragma omp parallel for schedule(dynamic)
    for (int task = 0; task < B * NH; task++) {
        int b = task / NH, h = task % NH;
        size_t begin = (size_t)b * T;
        for (int t0 = 0; t0 < T; t0 += QUERIES)
            attention_backward_block(dqkv + begin * 3 * C + h * hs, qkv + begin * 3 * C + h * hs,
                                     dout + (begin + t0) * C + h * hs,
                                     out + (begin + t0) * C + h * hs, lse + (size_t)task * T + t0,
                                     t0, imin(QUERIES, T - t0), C, hs);
    }
}

// Softmax and cross-entropy in one, in nats: loss = -log softmax(logits)[target] = lse - its logit,
// with lse = log sum_v e^logit_v. losses, lse (N); logits (N,V), only read; targets (N).
static void crossentropy_forward(float *losses, float *lse, const float *logits, const int *targets,
                                 int N, int V) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *x = logits + (size_t)n * V;
        float largest = largest_of(x, V, x[0]), sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int v = 0; v < V; v++) sum += exp_fast(x[v] - largest);
        lse[n] = largest + logf(sum);
        losses[n] = lse[n] - x[targets[n]];
    }
}

// Given scale, the gradient of each loss (1/N for their mean), wanted that of the logits.
//   d(lse)/d(logit_v) = e^logit_v / sum = e^(logit_v - lse), the probability p_v, so
//   dlogit_v = (p_v - [v is the target]) * scale
// In place: logits (N,V) become their gradients. lse, targets (N).
static void crossentropy_backward(float *logits, const float *lse, const int *targets, float scale,
                                  int N, int V) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        float *x = logits + (size_t)n * V;
        #pragma omp simd
        for (int v = 0; v < V; v++) x[v] = exp_fast(x[v] - lse[n]) * scale;
        x[targets[n]] -= scale;
    }
}

#endif

/* ------------------------------------------------------------------------------------------------
3. Model

All parameters lie in one block of memory, their gradients in a second one of the same layout,
Adam's moments in two more. Every layer takes the same room: its parameters are found by arithmetic.

What comes after this section and the next uses a model only through the functions model_*() and
holdings(), zero_gradients(), gradient_norms(), layer_state(). train_gpas.cu has its own.
*/
#ifndef TRAIN_GPAS_CUDA

// Where the parameters of one layer, or their gradients, lie. Index 0: attention, 1: feed-forward.
typedef struct {
    float *wqkv, *wo;       // (3C,C): wq, wk, wv; (C,C)
    float *w13, *w2;        // (2H,C): w1, w3; (C,H)
    float *norm[2];         // (C): N
    float *branch_norm[2];  // (C): N' of sandwich
    float *gate;            // (1): with GPAS
} LayerParameters;

// What a sublayer's backward pass needs of its forward pass. With --recompute there is one qkv, one
// pre_act and one inner of each kind for all layers.
typedef struct {
    float *inp;             // (B,T,C) x, the output of the sublayer before
    float *normed;          // (B,T,C) the branch's input N(x); x itself where the norm comes last
    float *qkv;             // (B,T,3C) queries and keys after RoPE, values
    float *lse;             // (B,NH,T) log-sum-exp of each row of scores
    float *pre_act;         // (B,T,2H) w1 x, w3 x
    float *inner;           // input of wo (B,T,C) or w2 (B,T,H)
    float *branch;          // (B,T,C) f(x)
    float *sum;             // (B,T,C) shortcut + branch
    float *out;             // (B,T,C)
    float *rstd, *branch_rstd;  // (B,T) of norm and branch_norm
} Sublayer;

typedef struct {
    const Options *o;
    Tensor *tensors;
    int num_tensors, num_blocks;
    size_t num_parameters, layer_size;
    float **blocks;         // all memory below, to be freed
    float *parameters, *gradients, *adam_m, *adam_v;
    Sublayer *sublayers;    // (2L): attention, feed-forward, attention, ...
    float *embedded, *final_normed, *final_rstd;  // (B,T,C), (B,T,C), (B,T)
    float *logits, *logits_lse, *losses;          // (B,T,V), (B,T), (B,T)
    float *dx, *dinp;       // (B,T,C) gradients of the residual stream, of a branch's input
    float *dinner, *dwide;  // gradients of inner and of qkv or pre_act: (B,T,max(C,H)),
                            // (B,T,max(3C,2H))
    float *scratch;         // (B,T,C) for steps between
    float *rope_table;      // (T,hs/2,2)
} Model;
#endif

// Does the norm of layer l = 0, 1, ... come after the sum: x = N(shortcut + f(x))?
static int norm_comes_last(const Options *o, int l) {
    return o->norm == NORM_POST || o->norm == NORM_DEEPNORM ||
           (o->norm == NORM_MIX && l < o->layers / 4);
}

static int has_branch_norm(const Options *o) { return o->norm == NORM_SANDWICH; }

// DeepNorm's A (arXiv 2203.00555).
static float shortcut_scale(const Options *o) {
    return o->norm == NORM_DEEPNORM ? powf(2.0f * o->layers, 0.25f) : 1;
}

__attribute__((format(printf, 6, 7)))
static void add_tensor(Model *m, int rows, int cols, double mean, double spread, const char *name,
                       ...) {
    Tensor *t = &m->tensors[m->num_tensors++];
    va_list args;
    va_start(args, name);
    vsnprintf(t->name, sizeof t->name, name, args);
    va_end(args);
    t->rows = rows, t->cols = cols, t->mean = (float)mean, t->spread = (float)spread;
    t->offset = m->num_parameters, t->size = (size_t)rows * imax(cols, 1);
    m->num_parameters += t->size;
}

// Names, shapes, order in memory and initial values of a layer's parameters. LNS starts its norms
// at 1/sqrt(layer) (arXiv 2502.05795). DeepNorm draws from Xavier's normal, spread = gain
// sqrt(2 / (fan in + fan out)), with a small gain for all that feeds the residual sum; with GPAS
// too, where the authors' code leaves that out.
static void add_layer(Model *m, int l) {
    const Options *o = m->o;
    int C = o->channels, H = o->hidden, deep = o->norm == NORM_DEEPNORM;
    double gain = pow(8.0 * o->layers, -0.25), norm = o->norm == NORM_LNS ? 1 / sqrt(l + 1.0) : 1;
    double qk = deep ? sqrt(1.0 / C) : 0.02, vo = deep ? gain * sqrt(1.0 / C) : 0.02;
    double ffn = deep ? gain * sqrt(2.0 / (C + H)) : 0.02;
    add_tensor(m, C, C, 0, qk, "layers.%d.attention.wq.weight", l);
    add_tensor(m, C, C, 0, qk, "layers.%d.attention.wk.weight", l);
    add_tensor(m, C, C, 0, vo, "layers.%d.attention.wv.weight", l);
    add_tensor(m, C, C, 0, vo, "layers.%d.attention.wo.weight", l);
    add_tensor(m, H, C, 0, ffn, "layers.%d.feed_forward.w1.weight", l);
    add_tensor(m, H, C, 0, ffn, "layers.%d.feed_forward.w3.weight", l);
    add_tensor(m, C, H, 0, ffn, "layers.%d.feed_forward.w2.weight", l);
    add_tensor(m, C, 0, norm, 0, "layers.%d.attention_norm.weight", l);
    if (has_branch_norm(o)) add_tensor(m, C, 0, norm, 0, "layers.%d.attention_post_norm.weight", l);
    add_tensor(m, C, 0, norm, 0, "layers.%d.ffn_norm.weight", l);
    if (has_branch_norm(o)) add_tensor(m, C, 0, norm, 0, "layers.%d.ffn_post_norm.weight", l);
    if (o->gpas) add_tensor(m, 1, 0, o->gate_init, 0, "layers.%d.gate", l);
}

// The names and shapes of all parameters, in their order in memory and in a checkpoint.
static void add_tensors(Model *m) {
    int V = m->o->vocab_size, C = m->o->channels;
    m->tensors = (Tensor *)allocate(3 + 12 * m->o->layers, sizeof(Tensor));
    add_tensor(m, V, C, 0, sqrt(2.0 / 5), "tok_embeddings.weight");
    for (int l = 0; l < m->o->layers; l++) add_layer(m, l);
    m->layer_size = (m->num_parameters - (size_t)V * C) / m->o->layers;
    add_tensor(m, C, 0, 1, 0, "norm.weight");
    add_tensor(m, V, C, 0, 0.02, "output.weight");
}

// Draws the initial values. Each tensor has a stream of its own, keyed by its name, so a network
// with gates starts from the same weights as the one without.
static void initialize(Model *m) {
    for (const Tensor *t = m->tensors; t < m->tensors + m->num_tensors; t++) {
        uint64_t key = m->o->seed;
        for (const char *c = t->name; *c; c++) key ^= (unsigned char)*c, key = random_bits(&key);
        float *p = m->parameters + t->offset;
        #pragma omp parallel for
        for (size_t i = 0; i < t->size; i++) {
            // Box and Muller: of uniform u and v, sqrt(-2 log u) cos(2 pi v) is normal
            uint64_t state = key + 2 * i * RANDOM_STEP;
            double radius = sqrt(-2 * log(1 - random_uniform(&state)));
            double angle = 2 * 3.14159265358979323846 * random_uniform(&state);
            p[i] = t->mean + t->spread * (float)(radius * cos(angle));
        }
    }
}

// The angles of RoPE: at position t, pair j of a head turns by t 10000^(-2j/hs).
// table (T,hs/2,2): the cosine and sine.
static void rope_angles(float *table, int T, int hs) {
    for (int t = 0; t < T; t++)
        for (int j = 0; j < hs / 2; j++) {
            double angle = t * pow(10000, -2.0 * j / hs);
            *table++ = (float)cos(angle);
            *table++ = (float)sin(angle);
        }
}

#ifndef TRAIN_GPAS_CUDA
// block is m->parameters or m->gradients.
static LayerParameters layer_parameters(const Model *m, float *block, int l) {
    size_t C = m->o->channels, H = m->o->hidden;
    float *p = block + m->o->vocab_size * C + l * m->layer_size;
    LayerParameters w;
    memset(&w, 0, sizeof w);
    w.wqkv = p, p += 3 * C * C;
    w.wo = p, p += C * C;
    w.w13 = p, p += 2 * H * C;
    w.w2 = p, p += C * H;
    for (int s = 0; s < 2; s++) {
        w.norm[s] = p, p += C;
        if (has_branch_norm(m->o)) w.branch_norm[s] = p, p += C;
    }
    if (m->o->gpas) w.gate = p;
    return w;
}

static float *take(Model *m, size_t n) {
    return m->blocks[m->num_blocks++] = (float *)allocate(n, sizeof(float));
}

// Memory for the activations of N = B T tokens. The branches whose values no backward pass needs
// share one block, and a sum that nothing follows is itself the sublayer's output. Without a
// backward pass, or with --recompute, all layers share the largest arrays, inner_forward()'s.
static void create_sublayers(Model *m, size_t N, int training) {
    const Options *o = m->o;
    size_t C = o->channels, H = o->hidden;
    float *x = m->embedded, *shared = take(m, N * C);
    for (int s = 0; s < 2 * o->layers; s++) {
        Sublayer *a = &m->sublayers[s];
        Sublayer *lender = s >= 2 && (o->recompute || !training) ? a - 2 : NULL;
        int norm_last = norm_comes_last(o, s / 2), attention = s % 2 == 0;
        a->inp = x;
        a->normed = norm_last ? x : take(m, N * C);
        a->rstd = take(m, N);
        if (attention) a->lse = take(m, N * o->heads);
        if (attention) a->qkv = lender ? lender->qkv : take(m, 3 * N * C);
        else a->pre_act = lender ? lender->pre_act : take(m, 2 * N * H);
        a->inner = lender ? lender->inner : take(m, N * (attention ? C : H));
        a->branch = has_branch_norm(o) ? take(m, N * C) : shared;
        if (has_branch_norm(o)) a->branch_rstd = take(m, N);
        a->sum = take(m, N * C);
        a->out = x = norm_last || o->gpas ? take(m, N * C) : a->sum;
    }
}

// A network with fresh parameters, for B sequences of --seq-len tokens at once. Without `training`
// it has no room for gradients. Ends the program when memory is short.
static void model_create(Model *m, const Options *o, int B, int training) {
    size_t T = o->seq_len, C = o->channels, H = o->hidden, V = o->vocab_size, N = B * T;
    memset(m, 0, sizeof *m);
    m->o = o;
    m->sublayers = (Sublayer *)allocate(2 * o->layers, sizeof(Sublayer));
    m->blocks = (float **)allocate(20 + 20 * o->layers, sizeof(float *));
    add_tensors(m);
    m->parameters = take(m, m->num_parameters);
    m->embedded = take(m, N * C);
    create_sublayers(m, N, training);
    m->final_normed = take(m, N * C), m->final_rstd = take(m, N);
    m->logits = take(m, N * V), m->logits_lse = take(m, N), m->losses = take(m, N);
    m->scratch = take(m, N * C);
    m->rope_table = take(m, T * (C / o->heads));
    rope_angles(m->rope_table, o->seq_len, o->channels / o->heads);
    initialize(m);
    if (!training) return;
    m->gradients = take(m, m->num_parameters);
    m->adam_m = take(m, m->num_parameters), m->adam_v = take(m, m->num_parameters);
    m->dx = take(m, N * C), m->dinp = take(m, N * C), m->dinner = take(m, N * (C > H ? C : H));
    m->dwide = take(m, N * (3 * C > 2 * H ? 3 * C : 2 * H));
}

// What a checkpoint holds of the model; model_changed() is called when these numbers were replaced.
static Holdings holdings(const Model *m) {
    Holdings h = {m->o, m->tensors, m->num_tensors, m->num_parameters,
                  m->parameters, m->gradients, m->adam_m, m->adam_v};
    return h;
}

static void model_changed(const Model *m) { (void)m; }

static void zero_gradients(const Model *m) {
    memset(m->gradients, 0, m->num_parameters * sizeof(float));
}

// The logits (V) of row n of the last model_forward().
static const float *model_logits(const Model *m, int n) {
    return m->logits + (size_t)n * m->o->vocab_size;
}

// What it runs on, for the eye: written to text (TEXT_SIZE).
static void model_device(const Model *m, char *text) {
    (void)m;
    int threads = omp_get_max_threads();
    snprintf(text, TEXT_SIZE, "%d thread%s", threads, threads == 1 ? "" : "s");
}

static void model_free(Model *m) {
    while (m->num_blocks) free(m->blocks[--m->num_blocks]);
    free(m->blocks), free(m->tensors), free(m->sublayers);
    free_packing_space();
}

#include "dev/finite.h"  // the functions check_*(), for --check-finite

// The branch of sublayer s (0 attention, 1 feed-forward) but for its last matrix: a->inner from
// a->normed.
static void inner_forward(const Model *m, const Sublayer *a, LayerParameters w, int s, int B,
                          int T) {
    int C = m->o->channels, H = m->o->hidden, NH = m->o->heads, N = B * T;
    if (s == 0) {
        matmul_forward(a->qkv, a->normed, w.wqkv, N, C, 3 * C);
        rope_forward(a->qkv, m->rope_table, B, T, C, C / NH);
        attention_forward(a->inner, a->lse, a->qkv, B, T, C, NH);
    } else {
        matmul_forward(a->pre_act, a->normed, w.w13, N, C, 2 * H);
        swiglu_forward(a->inner, a->pre_act, N, H);
    }
}

// The branch f: a->branch = f(a->normed).
static void branch_forward(const Model *m, const Sublayer *a, LayerParameters w, int s, int B,
                           int T) {
    int C = m->o->channels, H = m->o->hidden, N = B * T;
    inner_forward(m, a, w, s, B, T);
    if (s == 0) matmul_forward(a->branch, a->inner, w.wo, N, C, C);
    else matmul_forward(a->branch, a->inner, w.w2, N, H, C);
}

// Given dout (B,T,C), the gradient of the branch's output, leaves that of its input in m->dinp.
static void branch_backward(const Model *m, const float *dout, const Sublayer *a, LayerParameters w,
                            LayerParameters d, int s, int B, int T) {
    int C = m->o->channels, H = m->o->hidden, NH = m->o->heads, N = B * T;
    if (m->o->check_finite) check_before_branch(m, a, dout, B, T);
    if (s == 0) {
        matmul_backward(m->dinner, d.wo, dout, a->inner, w.wo, N, C, C);
        attention_backward(m->dwide, m->dinner, a->inner, a->lse, a->qkv, B, T, C, NH);
        rope_backward(m->dwide, m->rope_table, B, T, C, C / NH);
        matmul_backward(m->dinp, d.wqkv, m->dwide, a->normed, w.wqkv, N, C, 3 * C);
    } else {
        matmul_backward(m->dinner, d.w2, dout, a->inner, w.w2, N, H, C);
        swiglu_backward(m->dwide, m->dinner, a->pre_act, N, H);
        matmul_backward(m->dinp, d.w13, m->dwide, a->normed, w.w13, N, C, 2 * H);
    }
}

/*
One sublayer of any of the twelve networks. [G] is GPAS when it is on, f the branch, N the norm:

    pre, lns    x = [G](x + f(N x))
    sandwich    x = [G](x + N' f(N x))         N' is branch_norm
    post        x = N([G]x + f(x))
    deepnorm    x = N(A [G]x + f(x))
    mix         the first L/4 layers are post, the others pre

So there are two orders, norm first and norm last; the rest are steps that may be absent.
*/
static void sublayer_forward(const Model *m, int l, int s, int B, int T) {
    const Options *o = m->o;
    LayerParameters w = layer_parameters(m, m->parameters, l);
    Sublayer *a = &m->sublayers[2 * l + s];
    int C = o->channels, N = B * T;
    size_t n = (size_t)N * C;
    const float *branch = a->branch, *shortcut = a->inp;

    if (!norm_comes_last(o, l)) {
        rmsnorm_forward(a->normed, a->rstd, a->inp, w.norm[s], N, C);
        branch_forward(m, a, w, s, B, T);
        if (has_branch_norm(o)) {
            rmsnorm_forward(m->scratch, a->branch_rstd, a->branch, w.branch_norm[s], N, C);
            branch = m->scratch;
        }
        residual_forward(a->sum, shortcut, branch, 1, n);
        if (o->gpas) gpas_forward(a->out, a->sum, *w.gate, o->gate_act, n);
    } else {
        branch_forward(m, a, w, s, B, T);
        if (o->gpas) {
            gpas_forward(m->scratch, a->inp, *w.gate, o->gate_act, n);
            shortcut = m->scratch;
        }
        residual_forward(a->sum, shortcut, branch, shortcut_scale(o), n);
        rmsnorm_forward(a->out, a->rstd, a->sum, w.norm[s], N, C);
    }
    if (o->check_finite) check_forward(m, 2 * l + s, B, T);
}

// The same steps backwards. m->dx holds the gradient of the sublayer's output on entry, that of its
// input on return. x went two ways, into the shortcut and into the branch: its gradients are added.
// With --recompute (arXiv 1604.06174) what inner_forward() wrote is there for the last layer only.
static void sublayer_backward(const Model *m, int l, int s, int B, int T) {
    const Options *o = m->o;
    LayerParameters w = layer_parameters(m, m->parameters, l);
    LayerParameters d = layer_parameters(m, m->gradients, l);
    const Sublayer *a = &m->sublayers[2 * l + s];
    int C = o->channels, N = B * T;
    size_t n = (size_t)N * C;
    float *dgate = o->gate_train ? d.gate : NULL, *dx = m->dx, *scratch = m->scratch, *dbranch = dx;

    if (o->recompute && l < o->layers - 1) inner_forward(m, a, w, s, B, T);
    if (!norm_comes_last(o, l)) {
        if (o->gpas) gpas_backward(dx, dgate, dx, a->sum, *w.gate, o->gate_act, o->stop_grad, n);
        if (has_branch_norm(o)) {
            dbranch = scratch;
            rmsnorm_backward(dbranch, d.branch_norm[s], dx, a->branch, w.branch_norm[s],
                             a->branch_rstd, N, C);
        }
        branch_backward(m, dbranch, a, w, d, s, B, T);
        rmsnorm_backward(scratch, d.norm[s], m->dinp, a->inp, w.norm[s], a->rstd, N, C);
        residual_backward(dx, dx, 1, n);          // nothing: alpha is 1
        residual_forward(dx, dx, scratch, 1, n);  // a plain sum, of two gradients
    } else {
        dbranch = scratch;
        rmsnorm_backward(dbranch, d.norm[s], dx, a->sum, w.norm[s], a->rstd, N, C);
        residual_backward(dx, dbranch, shortcut_scale(o), n);
        if (o->gpas) gpas_backward(dx, dgate, dx, a->inp, *w.gate, o->gate_act, o->stop_grad, n);
        branch_backward(m, dbranch, a, w, d, s, B, T);
        residual_forward(dx, dx, m->dinp, 1, n);
    }
    if (o->check_finite) check_backward(m, 2 * l + s, B, T);
}

// Population variance of x (n).
static double variance(const float *x, size_t n) {
    double mean = dot(x, NULL, n) / n;
    return dot(x, x, n) / n - mean * mean;
}

// The variances of what left layer l's two sublayers in the last model_forward(), and its gate; NAN
// without GPAS.
static void layer_state(const Model *m, int l, int B, int T, double variances[2], double *gate) {
    size_t n = (size_t)B * T * m->o->channels;
    const float *g = layer_parameters(m, m->parameters, l).gate;
    for (int s = 0; s < 2; s++) variances[s] = variance(m->sublayers[2 * l + s].out, n);
    *gate = g ? *g : NAN;
}

// Logits of tokens (B,T), into m->logits; with targets (B,T) also the mean loss in nats, returned.
static double model_forward(Model *m, const int *tokens, const int *targets, int B, int T) {
    int C = m->o->channels, V = m->o->vocab_size, L = m->o->layers, N = B * T;
    const float *output = m->parameters + m->tensors[m->num_tensors - 1].offset, *norm = output - C;
    embedding_forward(m->embedded, tokens, m->parameters, N, C);
    for (int s = 0; s < 2 * L; s++) sublayer_forward(m, s / 2, s % 2, B, T);
    rmsnorm_forward(m->final_normed, m->final_rstd, m->sublayers[2 * L - 1].out, norm, N, C);
    matmul_forward(m->logits, m->final_normed, output, N, C, V);
    if (targets) crossentropy_forward(m->losses, m->logits_lse, m->logits, targets, N, V);
    if (m->o->check_finite) check_logits(m, targets != NULL, N);
    return targets ? dot(m->losses, NULL, N) / N : 0;
}

// Adds to m->gradients those of scale times the sum of the losses of the last model_forward(). The
// logits become their gradients.
static void model_backward(Model *m, const int *tokens, const int *targets, int B, int T,
                           double scale) {
    int C = m->o->channels, V = m->o->vocab_size, L = m->o->layers, N = B * T;
    size_t output = m->tensors[m->num_tensors - 1].offset, norm = output - C;
    const float *w = m->parameters, *x = m->sublayers[2 * L - 1].out;
    float *d = m->gradients;
    crossentropy_backward(m->logits, m->logits_lse, targets, (float)scale, N, V);
    matmul_backward(m->dinp, d + output, m->logits, m->final_normed, w + output, N, C, V);
    rmsnorm_backward(m->dx, d + norm, m->dinp, x, w + norm, m->final_rstd, N, C);
    if (m->o->check_finite) check_head_backward(m, N);
    for (int s = 2 * L - 1; s >= 0; s--) sublayer_backward(m, s / 2, s % 2, B, T);
    embedding_backward(d, m->dx, tokens, N, C);
    if (m->o->check_finite) check_result(-1, "embedding_backward", d, (size_t)V * C);
}
#endif

/* ------------------------------------------------------------------------------------------------
4. Optimizer
*/

// Step t = 0, 1, ...: linear warm-up to the peak, then a cosine down to a tenth of it.
static double learning_rate(const Options *o, int t) {
    if (t < o->warmup) return o->lr * (t + 1) / o->warmup;
    double progress = (t - o->warmup) / (double)imax(1, o->steps - o->warmup);
    return o->lr * (0.1 + 0.9 * 0.5 * (1 + cos(3.14159265358979323846 * progress)));
}

// The factor of the gradient by the global clip, *clip, in which the gates' gradients are included;
// returns that of the gates, whose own clip follows. norm, gate_norm: before any clipping.
static double clip_factors(const Options *o, double norm, double gate_norm, double *clip) {
    *clip = o->grad_clip > 0 && norm > o->grad_clip ? o->grad_clip / norm : 1;
    return o->gate_clip > 0 && gate_norm * *clip > o->gate_clip ? o->gate_clip / gate_norm : *clip;
}

#ifndef TRAIN_GPAS_CUDA
// AdamW (arXiv 1711.05101), step t = 1, 2, ...: with g the gradient times grad_scale (clipping),
//   m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
//   p -= lr (mhat / (sqrt(vhat) + eps) + weight_decay p)
// where mhat = m / (1 - beta1^t), and vhat likewise, undo that m and v started at 0. Arrays (n).
static void adamw_update(float *p, const float *grad, float *m, float *v, size_t n, float lr,
                         float beta1, float beta2, float eps, float weight_decay, float grad_scale,
                         int t) {
    float unbias_m = (float)(1 / (1 - pow(beta1, t))), unbias_v = (float)(1 / (1 - pow(beta2, t)));
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) {
        float g = grad[i] * grad_scale;
        m[i] = beta1 * m[i] + (1 - beta1) * g;
        v[i] = beta2 * v[i] + (1 - beta2) * g * g;
        p[i] -= lr * (m[i] * unbias_m / (sqrtf(v[i] * unbias_v) + eps) + weight_decay * p[i]);
    }
}

// Norms of the gradient: returns the whole's; layers (L) gets each layer's, *gates the gates'.
static double gradient_norms(const Model *m, double *layers, double *gates) {
    const Options *o = m->o;
    size_t begin = (size_t)o->vocab_size * o->channels, end = begin + m->layer_size * o->layers;
    const float *d = m->gradients;
    double sum = dot(d, d, begin) + dot(d + end, d + end, m->num_parameters - end), gate_sum = 0;
    for (int l = 0; l < o->layers; l++) {
        LayerParameters layer = layer_parameters(m, m->gradients, l);
        double square = dot(layer.wqkv, layer.wqkv, m->layer_size);  // from wqkv on
        if (layer.gate) gate_sum += (double)*layer.gate * *layer.gate;
        layers[l] = sqrt(square);
        sum += square;
    }
    *gates = sqrt(gate_sum);
    return sqrt(sum);
}

// One AdamW step, t = 0, 1, ... Only matrices decay, not norms and gates.
static void model_update(Model *m, int t, double norm, double gate_norm) {
    const Options *o = m->o;
    double clip, gate_clip = clip_factors(o, norm, gate_norm, &clip), lr = learning_rate(o, t);
    for (const Tensor *w = m->tensors; w < m->tensors + m->num_tensors; w++) {
        int gate = w->size == 1;
        if (gate && !o->gate_train) continue;
        adamw_update(m->parameters + w->offset, m->gradients + w->offset, m->adam_m + w->offset,
                     m->adam_v + w->offset, w->size, (float)lr, 0.9f, 0.999f, 1e-8f,
                     w->cols ? (float)o->weight_decay : 0, (float)(gate ? gate_clip : clip), t + 1);
    }
    if (o->check_finite) check_result(-1, "adamw_update", m->parameters, m->num_parameters);
}
#endif

/* ------------------------------------------------------------------------------------------------
5. Data

Token files are llm.c's: 256 int32 (magic 20240520, version 1, number of tokens), then uint16
tokens. They are mapped into memory, not read. The tokenizer file is llama2.c's.
*/

// One split as windows of T + 1 tokens that do not overlap: T inputs, and as targets the same
// shifted by one. random: the state of the shuffling; a split that is not shuffled has 0 there.
typedef struct {
    const char *split;
    const uint16_t **windows;
    size_t num_windows, *order;  // order: of the windows in this epoch
    int T, V;
    int64_t epoch;
    uint64_t random;
} Loader;

// Adds the windows of one token file.
static void loader_add(Loader *loader, const char *path) {
    size_t bytes, stride = loader->T + 1, old = loader->num_windows;
    const int32_t *header = map_file(path, "token", 20240520, &bytes);
    if (header[2] < 0 || bytes != 1024 + 2 * (size_t)header[2])
        die("%s should hold %d tokens but is %zu bytes long", path, header[2], bytes);
    loader->num_windows += header[2] / stride;
    size_t room = loader->num_windows + 1;
    loader->windows =
        (const uint16_t **)realloc(loader->windows, room * sizeof *loader->windows);
    loader->order = (size_t *)realloc(loader->order, room * sizeof *loader->order);
    if (!loader->windows || !loader->order) die("not enough memory for the index of %s", path);
    for (size_t i = old; i < loader->num_windows; i++)
        loader->windows[i] = (const uint16_t *)(header + 256) + (i - old) * stride;
}

// Opens DIR/SPLIT.bin and DIR/SPLIT_000.bin and those that follow, whichever are there. random 0:
// no shuffling.
static void loader_open(Loader *loader, const char *dir, const char *split, int T, int V,
                        uint64_t random) {
    char path[2048];
    memset(loader, 0, sizeof *loader);
    loader->split = split, loader->T = T, loader->V = V, loader->random = random;
    loader->epoch = -1;
    snprintf(path, sizeof path, "%s/%s.bin", dir, split);
    if (access(path, F_OK) == 0) loader_add(loader, path);
    for (int i = 0; i < 1000; i++) {
        snprintf(path, sizeof path, "%s/%s_%03d.bin", dir, split, i);
        if (access(path, F_OK) != 0) break;
        loader_add(loader, path);
    }
    if (!loader->num_windows)
        die("%s has no %s.bin of %d tokens or more; prepro_tinystories.py --out %s writes one", dir,
            split, T + 1, dir);
}

static void loader_close(Loader *loader) { free(loader->windows), free(loader->order); }

// Shuffles the windows for an epoch (Fisher and Yates). Every epoch begins with random numbers of
// its own: a run can go on in any of them without the ones before.
static void loader_shuffle(Loader *loader, int64_t epoch) {
    uint64_t random = loader->random + ((uint64_t)epoch << 32);
    for (size_t a = 0; a < loader->num_windows; a++) loader->order[a] = a;
    for (size_t a = loader->num_windows - 1; loader->random && a > 0; a--) {
        size_t b = (size_t)(random_uniform(&random) * (a + 1)), swap = loader->order[a];
        loader->order[a] = loader->order[b], loader->order[b] = swap;
    }
    loader->epoch = epoch;
}

// Sequences position, position + 1, ... of the endless stream of epochs: tokens, targets (B,T).
static void loader_batch(Loader *loader, int64_t position, int B, int *tokens, int *targets) {
    int T = loader->T, n = B * T;
    for (int64_t i = 0; i < B; i++) {
        int64_t epoch = (position + i) / (int64_t)loader->num_windows;
        if (loader->epoch != epoch) loader_shuffle(loader, epoch);
        size_t number = loader->order[(position + i) % loader->num_windows];
        const uint16_t *window = loader->windows[number];
        for (int t = 0; t < T; t++)
            tokens[i * T + t] = window[t], targets[i * T + t] = window[t + 1];
    }
    for (int i = 0; i < n; i++)
        if (imax(tokens[i], targets[i]) >= loader->V)
            die("%s holds token %d, but the vocabulary has only %d", loader->split,
                imax(tokens[i], targets[i]), loader->V);
}

/* ------------------------------------------------------------------------------------------------
6. Sampling
*/

typedef struct { float probability; int id; } Candidate;

static int compare_candidates(const void *a, const void *b) {
    const Candidate *x = (const Candidate *)a, *y = (const Candidate *)b;
    if (x->probability != y->probability) return x->probability < y->probability ? 1 : -1;
    return x->id - y->id;
}

// Draws the next token from logits (V). Temperature divides the logits: below 1 the likely tokens
// gain, at 0 the likeliest is taken. Top-p (arXiv 1904.09751) keeps the likeliest tokens that
// together reach the probability top_p. candidates (V) is scratch.
static int sample_token(const float *logits, int V, double temperature, double top_p,
                        uint64_t *random, Candidate *candidates) {
    int likeliest = 0, kept = 0;
    double total = 0, sum = 0, all = 0;
    for (int v = 0; v < V; v++) {
        if (logits[v] > logits[likeliest]) likeliest = v;
        all += logits[v];  // finite only if each of them is
    }
    if (!isfinite(all)) die("cannot tell a story: the network's logits are not finite");
    if (temperature == 0) return likeliest;
    for (int v = 0; v < V; v++) {
        candidates[v].id = v;
        candidates[v].probability = (float)exp((logits[v] - logits[likeliest]) / temperature);
        total += candidates[v].probability;
    }
    qsort(candidates, V, sizeof *candidates, compare_candidates);
    while (kept < V && sum < top_p * total) sum += candidates[kept++].probability;
    double draw = random_uniform(random) * sum;
    for (int i = 0; i < kept - 1; i++)
        if ((draw -= candidates[i].probability) < 0) return candidates[i].id;
    return candidates[kept - 1].id;
}

// Writes the prompt and at most --length tokens that go on from it. Each token takes a forward pass
// over all before it; when all T positions are taken, the last T/2 become the new beginning.
static void tell_story(Model *m, const Tokenizer *k, uint64_t *random, FILE *file) {
    const Options *o = m->o;
    int T = o->seq_len, V = o->vocab_size, start = 0;
    int *tokens = (int *)allocate(strlen(o->prompt) + 2 + o->length, sizeof(int));
    Candidate *candidates = (Candidate *)allocate(V, sizeof(Candidate));
    int n = tokenizer_encode(k, o->prompt, tokens), end = n + o->length;
    for (int i = 1; i < n; i++) tokenizer_print(k, tokens[i - 1], tokens[i], file);
    for (; n < end; n++) {
        if (n - start > T) start = n - imax(1, T / 2);
        model_forward(m, tokens + start, NULL, 1, n - start);
        const float *logits = model_logits(m, n - start - 1);
        tokens[n] = sample_token(logits, V, o->temperature, o->top_p, random, candidates);
        if (tokens[n] == TOKEN_BOS || tokens[n] == TOKEN_EOS) break;
        tokenizer_print(k, tokens[n - 1], tokens[n], file);
        fflush(file);
    }
    fputc('\n', file);
    free(tokens), free(candidates);
}

/* ------------------------------------------------------------------------------------------------
7. Training
*/

typedef struct {
    Model model;
    Tokenizer tokenizer;
    Loader train, val;
    Progress progress;
    int *tokens, *targets;  // (B,T); tokens has room for one more, for dev/evaluation.h
    double *layer_norms;    // (L) of the last gradient
    FILE *log, *layers;
    int64_t val_windows;
    int start_step, on_terminal;
    double start_time;
} Run;

// Ends the program if the file is no checkpoint of the network that the options describe, before
// memory is taken for what a damaged one may claim.
static void check_checkpoint(const char *path, const Options *o) {
    Model m;
    memset(&m, 0, sizeof m);
    m.o = o;
    add_tensors(&m);
    Holdings h = {o, m.tensors, m.num_tensors, m.num_parameters, NULL, NULL, NULL, NULL};
    checkpoint_read(path, &h, NULL, 0);
    free(m.tensors);
}

// Prepares everything that the options ask for; sets --vocab-size from the tokenizer.
static void open_run(Run *run, Options *o) {
    int training = o->steps > 0, evaluating = evaluates(o);
    size_t N = (size_t)o->batch * o->seq_len;
    const char *checkpoint = *o->load ? o->load : o->resume;
    memset(run, 0, sizeof *run);
    signal(SIGXFSZ, SIG_IGN);  // a file that may not grow any more: an error like a full disk
    if (tokenizer_open(&run->tokenizer, o->data)) {
        if (o->vocab_size && o->vocab_size != run->tokenizer.V)
            die("--vocab-size is %d, but %s/tokenizer.bin has %d pieces", o->vocab_size, o->data,
                run->tokenizer.V);
        o->vocab_size = run->tokenizer.V;
    } else if (!(training || evaluating) || !o->vocab_size)
        die("%s/tokenizer.bin is missing; prepro_tinystories.py --out %s writes it", o->data,
            o->data);
    if (training) {
        loader_open(&run->train, o->data, "train", o->seq_len, o->vocab_size,
                    (uint64_t)o->seed + 1);
        loader_open(&run->val, o->data, "val", o->seq_len, o->vocab_size, 0);
        if (o->total_batch / 16 > (int64_t)run->train.num_windows)
            die("--total-batch %d would use each of the %zu sequences in %s over 16 times a step",
                o->total_batch, run->train.num_windows, o->data);
        int64_t windows = run->val.num_windows, limit = (int64_t)o->val_batches * o->batch;
        run->val_windows = limit && windows > limit ? limit : windows;
    }
    if (*checkpoint) check_checkpoint(checkpoint, o);
    model_create(&run->model, o, training || evaluating ? o->batch : 1, training);
    run->progress.random = o->seed;
    if (*checkpoint) {
        Holdings h = holdings(&run->model);
        checkpoint_read(checkpoint, &h, &run->progress, *o->resume && training);
        model_changed(&run->model);
    }
    if (training && run->progress.step >= o->steps)
        die("%s is at step %d; give more --steps to go on", o->resume, run->progress.step);
    run->start_step = run->progress.step;
    run->tokens = (int *)allocate(N + 1, sizeof(int));
    run->targets = (int *)allocate(N, sizeof(int));
    run->layer_norms = (double *)allocate(o->layers, sizeof(double));
    run->on_terminal = isatty(1);
    if (!training || *o->dump_grads) return;
    make_folder(o->out);
    cut_samples(o, *o->resume ? run->start_step : -1);
    run->log = open_log(o, "log.csv", run->start_step,
                        "step,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s");
    run->layers = open_log(o, "layers.csv", run->start_step,
                           "step,layer,attention_variance,mlp_variance,gate,grad_norm");
}

static void close_run(Run *run) {
    model_free(&run->model);
    tokenizer_close(&run->tokenizer);
    if (run->log) fclose(run->log), fclose(run->layers);
    loader_close(&run->train), loader_close(&run->val);
    free(run->tokens), free(run->targets), free(run->layer_norms);
}

// Mean loss over the first val_windows validation windows.
static double validate(Run *run) {
    int B = run->model.o->batch, T = run->model.o->seq_len;
    double sum = 0;
    for (int64_t w = 0; w < run->val_windows; w += B) {
        int b = run->val_windows - w < B ? (int)(run->val_windows - w) : B;
        loader_batch(&run->val, w, b, run->tokens, run->targets);
        sum += b * model_forward(&run->model, run->tokens, run->targets, b, T);
    }
    return sum / run->val_windows;
}

#include "dev/logs.h"

// One step: the gradient of the mean loss over --total-batch sequences, micro-batch by micro-batch,
// then AdamW. Returns the loss; *norm gets the gradient's norm before clipping.
static double train_step(Run *run, double *norm) {
    Model *m = &run->model;
    int B = m->o->batch, T = m->o->seq_len, micro_batches = m->o->total_batch / B;
    double loss = 0, gate_norm;
    step_now = run->progress.step + 1;
    zero_gradients(m);
    for (int i = 0; i < micro_batches; i++, run->progress.position += B) {
        loader_batch(&run->train, run->progress.position, B, run->tokens, run->targets);
        loss += model_forward(m, run->tokens, run->targets, B, T) / micro_batches;
        if (!isfinite(loss)) stop_not_finite(run, loss);
        model_backward(m, run->tokens, run->targets, B, T, 1.0 / ((double)m->o->total_batch * T));
    }
    *norm = gradient_norms(m, run->layer_norms, &gate_norm);
    if (!isfinite(*norm)) stop_not_finite(run, loss);
    model_update(m, run->progress.step++, *norm, gate_norm);
    return loss;
}

static void train(Run *run) {
    const Options *o = run->model.o;
    print_configuration(run);
    catch_signals();
    if (run->progress.step == 0) {
        double val = validate(run);
        printf("step 0/%d  val %.4f\n", o->steps, val), fflush(stdout);
        log_step(run, NAN, val, NAN, NAN, NAN);
        log_layers(run);
    }
    run->start_time = omp_get_wtime();
    do {
        double norm, val = NAN, lr = learning_rate(o, run->progress.step), start = omp_get_wtime();
        double loss = train_step(run, &norm), ms = 1000 * (omp_get_wtime() - start);
        int step = run->progress.step, last = step == o->steps;
        int validated = last || (o->val_every && step % o->val_every == 0);
        if (validated) val = validate(run);
        if (validated && !isfinite(val)) stop_not_finite(run, val);
        if (validated) log_layers(run);
        log_step(run, loss, val, lr, norm, ms);
        report(run, loss, val, lr, norm, ms);
        if (last || (o->sample_every && step % o->sample_every == 0)) sample(run);
        if (last || stop_signal || (o->save_every && step % o->save_every == 0)) save(run);
    } while (run->progress.step < o->steps && !stop_signal);
    if (run->progress.step < o->steps)
        printf("\nStopped. ./%s --resume %s/ckpt_%06d.safetensors goes on.\n", program, o->out,
               run->progress.step);
    else printf("Logs, stories and checkpoints are in %s.\n", o->out);
}

#include "dev/evaluation.h"

#ifndef TRAIN_GPAS_NO_MAIN
int main(int argc, char **argv) {
    static Options options;
    static Run run;
    parse_options(&options, argc, argv);
    open_run(&run, &options);
    if (evaluates(&options)) evaluate(&run);
    else if (*options.dump_grads) dump_gradients(&run);
    else if (options.steps > 0) train(&run);
    else {
        if (!*options.load && !*options.resume)
            fprintf(stderr, "%s: without --load an untrained network tells the story\n", program);
        tell_story(&run.model, &run.tokenizer, &run.progress.random, stdout);
    }
    close_run(&run);
    return stop_signal ? 128 + stop_signal : 0;
}
#endif
