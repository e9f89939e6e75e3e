/*
train_gpas.cu: the training of train_gpas.c on one GPU, with every layer written as kernels.

Read train_gpas.c first: it explains what GPAS is, has each layer as plain loops, and derives each
backward pass. This file computes the same layers under the same names and says how a GPU does it;
the formulas are repeated in short. Some kernels do the work of several layers: one computes the
residual sum, GPAS and RMSNorm, another the loss and its gradient. Options, data, tokenizer,
stories, checkpoints and logs come from the headers that both programs include. The training step
and main() are the same in both files.

    1  Tools         error checks, wide loads, sums over a block
    2  Layers        embedding, residual + gpas + rmsnorm in one, rope, swiglu, matmul, attention,
                     crossentropy
    3  Optimizer     AdamW, the gradient's norm
    4  Model         memory, forward, backward
    5  Training      the training step, the loop, main()

Numbers. `real` is float (--dtype fp32) or bf16 (--dtype bf16, the default): the type of
activations, of their gradients and of the matrices that are multiplied. Every kernel loads `real`,
computes in float, and rounds to the nearest `real` when it stores. Always float: the parameters as
AdamW keeps them (the matrices have a bf16 copy), their gradients and moments, norms' weights,
gates, softmax, sums and losses. fp32 matrix products are true fp32, not TF32.

Two runs with the same options give the same bits: no sum is taken by atomics, whose order changes
from run to run. A sum over rows is taken in two stages instead: each block sums its share, then the
shares are added in order.

Without a GPU the same source runs on the CPU, slowly, through dev/gpu/cuda_on_cpu.h.
*/
#include "dev/gate.h"          // defines: gate_value, gate_slope: a(g) and its derivative a'(g)
#include "dev/parameters.h"    // defines: Config, norm_comes_last, ...; TensorList, rope_angles
#include "dev/schedule.h"      // defines: learning_rate, clip_factors
#include "dev/command_line.h"  // defines: Options, parse_options
#include "dev/run.h"           // defines: Run, open_run, close_run, validate
#include "dev/logs.h"          // defines: open_logs, log_step, ..., save, sample, report
#include "dev/evaluation.h"    // defines: evaluate
#ifdef CUDA_ON_CPU
#include "dev/gpu/cuda_on_cpu.h"  // defines: what CUDA's headers and ptx.h define, for a CPU
#else
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include "dev/gpu/ptx.h"       // defines: mma_m16n8k16_bf16, ldmatrix_x4, cp_async
#endif

typedef __nv_bfloat16 bf16;

/* ------------------------------------------------------------------------------------------------
1. Tools

A GPU in ten lines. kernel<<<blocks, threads>>>(...) runs the function `kernel` once for every
thread of every block; blockIdx and threadIdx tell a thread which one it is. A block's threads run
on one of the GPU's processors (an H100 has 132) and share 48 KiB of fast memory there, declared
__shared__; __syncthreads() waits until all of them have arrived. 32 threads with neighbouring
numbers are a warp and go in step, each is a lane of it: when they load neighbouring addresses, that
is one wide access to memory, which is what counts, for memory is slow; and they can read each
other's variables by a shuffle. A thread's own variables are in registers, up to 255; what finds no
room there, or is indexed by a number not known to the compiler, spills to slow "local" memory. A
tensor core multiplies small matrices that a warp holds in its registers. Blocks run in any order:
they cannot wait for each other.
*/

#define CUDA_CHECK(call) cuda_check(call, __LINE__)
#define CUBLAS_CHECK(call) cublas_check(call, __LINE__)

static void cuda_check(cudaError_t error, int line) {
    if (error != cudaSuccess) die("CUDA: %s (train_gpas.cu:%d)", cudaGetErrorString(error), line);
}

static void cublas_check(cublasStatus_t status, int line) {
    if (status != CUBLAS_STATUS_SUCCESS)
        die("cuBLASLt: %s (train_gpas.cu:%d)", cublasLtGetStatusString(status), line);
}

// After every launch: was it possible? (What goes wrong inside shows at the next synchronization.)
#define LAUNCH_CHECK() CUDA_CHECK(cudaGetLastError())

// W neighbours in memory, moved at once. One instruction loads at most 16 bytes, so kernels take
// W = 16 / sizeof(real); floats beside bf16 then take two instructions.
template <class real, int W> struct alignas(W * sizeof(real)) Pack { real x[W]; };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline void round_to(float &to, float x) { to = x; }
__device__ inline void round_to(bf16 &to, float x) { to = __float2bfloat16_rn(x); }

template <class real, int W> __device__ inline void load(float (&to)[W], const real *from) {
    Pack<real, W> pack = *(const Pack<real, W> *)from;
    for (int i = 0; i < W; i++) to[i] = to_float(pack.x[i]);
}

template <class real, int W> __device__ inline void store(real *to, const float (&from)[W]) {
    Pack<real, W> pack;
    for (int i = 0; i < W; i++) round_to(pack.x[i], from[i]);
    *(Pack<real, W> *)to = pack;
}

// Sum, or largest, over a warp's 32 lanes; every lane gets it. Each step adds the number of the
// lane that differs in one bit: after step 1 pairs of lanes agree, after 2 fours, after 16 all.
template <class number> __device__ inline number warp_sum(number x) {
    for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int step = 1; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
    return x;
}

// The same over a block of whole warps. Ends with the shared memory free for the next call.
template <class number> __device__ inline number block_sum(number x) {
    __shared__ number sums[32];
    number total = 0;
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    for (int w = 0; w < (int)blockDim.x / 32; w++) total += sums[w];
    __syncthreads();
    return total;
}

__device__ inline float block_max(float x) {
    __shared__ float largest[32];
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = x;
    __syncthreads();
    for (int w = 0; w < (int)blockDim.x / 32; w++) x = fmaxf(x, largest[w]);
    __syncthreads();
    return x;
}

// The launchers below call a kernel with W = 16 bytes of numbers a thread where a row's width is a
// multiple of W, and with W = 1 where it is not. Threads for a row of `width`: whole warps, at most
// 256.
static int row_threads(int width, int W) { return imin(256, ((width + W - 1) / W + 31) / 32 * 32); }

// Blocks of `threads` that cover n.
static unsigned blocks_for(size_t n, int threads) {
    return (unsigned)((n + threads - 1) / threads);
}

/* ------------------------------------------------------------------------------------------------
2. Layers

A function rmsnorm_forward() etc. takes pointers to the GPU's memory and launches kernels; it
returns before they have run. Launches run one after another.
*/

// out[n,:] = weight[tokens[n],:]. One block a row. out (N,C), weight (V,C), tokens (N).
template <class real, int W>
__global__ void embedding_forward_kernel(real *out, const int *tokens, const float *weight, int C) {
    const float *row = weight + (size_t)tokens[blockIdx.x] * C;
    for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        float x[W];
        load(x, row + c);
        store(out + (size_t)blockIdx.x * C + c, x);
    }
}

template <class real>
static void embedding_forward(real *out, const int *tokens, const float *weight, int N, int C) {
    constexpr int W = 16 / sizeof(real);
    if (C % W == 0)
        embedding_forward_kernel<real, W><<<N, row_threads(C, W)>>>(out, tokens, weight, C);
    else
        embedding_forward_kernel<real, 1><<<N, row_threads(C, 1)>>>(out, tokens, weight, C);
    LAUNCH_CHECK();
}

// Given dout, wanted dweight. The host has sorted the positions by token, for atomics would add in
// any order: those of v are positions[starts[v]] up to positions[starts[v + 1] - 1]. Block
// (v, tile) of 256 threads has a tile of 32 W channels.
//   dweight[v,:] += the sum of dout[n,:] over all n with tokens[n] = v. The 8 warps take every
//   eighth position each, then their sums are added in order.
// dweight (V,C), added to; dout (N,C); positions (N); starts (V+1).
template <class real, int W>
__global__ void embedding_backward_kernel(float *dweight, const real *dout, const int *positions,
                                          const int *starts, int C) {
    __shared__ float sums[8][32 * W];
    int v = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int c = (blockIdx.y * 32 + lane) * W, end = starts[v + 1];
    if (starts[v] == end) return;
    float sum[W] = {0}, x[W];
    for (int i = starts[v] + warp; i < end && c < C; i += 8) {
        load(x, dout + (size_t)positions[i] * C + c);
        for (int k = 0; k < W; k++) sum[k] += x[k];
    }
    for (int k = 0; k < W; k++) sums[warp][lane * W + k] = sum[k];
    __syncthreads();
    for (int k = threadIdx.x; k < 32 * W; k += blockDim.x) {
        int channel = blockIdx.y * 32 * W + k;
        float total = 0;
        for (int w = 0; w < 8; w++) total += sums[w][k];
        if (channel < C) dweight[(size_t)v * C + channel] += total;
    }
}

template <class real>
static void embedding_backward(float *dweight, const real *dout, const int *positions,
                               const int *starts, int V, int C) {
    constexpr int W = 16 / sizeof(real);
    if (C % W == 0)
        embedding_backward_kernel<real, W><<<dim3(V, blocks_for(C, 32 * W)), 256>>>(
            dweight, dout, positions, starts, C);
    else
        embedding_backward_kernel<real, 1><<<dim3(V, blocks_for(C, 32)), 256>>>(
            dweight, dout, positions, starts, C);
    LAUNCH_CHECK();
}

/*
Residual sum, GPAS, RMSNorm. Between the branches of two sublayers (attention, feed-forward) stand
these three, each a few operations on numbers that take far longer to fetch. So one kernel does what
meets, and each number is read once:

    norm first (pre, lns, sandwich)    sum = inp + branch;                   out = (1 - a(g)) sum
    norm last (post, deepnorm)         sum = A (1 - a(g)) inp + branch;      out = sum
    both                               normed = weight out r,   r = 1 / sqrt(mean(out^2) + 1e-6)

Norm first, `normed` is what the next branch reads, and `out` goes on along the shortcut. Norm last,
`normed` is the sublayer's output and both. Parts may be absent: no gate, no branch, no norm; so the
same kernel is gpas, residual or rmsnorm alone.
*/
typedef struct {
    const float *gate;    // (1), NULL: no GPAS
    int act, stop_grad;   // GATE_*, 1: as in the paper; 0: a plain scale
    int norm_last;        // GPAS on the shortcut before the sum
    float alpha;          // A: DeepNorm's scale of the shortcut, else 1
} Gpas;

// One block a row. The row is computed twice, before and after its mean square is known: the second
// time its numbers come from the cache.
// In bf16 `normed` comes from the unrounded sum, while the backward pass reads it rounded: that
// moves a gradient by no more than the rounding of any other activation.
// sum, out, normed (N,C), rstd (N): written, NULL if not wanted, never the same as inp or branch;
// inp, branch (N,C); weight (C).
template <class real, int W>
__global__ void residual_gpas_rmsnorm_forward_kernel(real *sum, real *out, real *normed,
                                                     float *rstd, const real *inp,
                                                     const real *branch, const float *weight,
                                                     Gpas g, int C) {
    size_t row = (size_t)blockIdx.x * C;
    float scale = g.gate ? 1 - gate_value(*g.gate, g.act) : 1, square = 0, x[W], b[W];
    float before = g.norm_last ? g.alpha * scale : 1, after = g.norm_last ? 1 : scale;
    for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        load(x, inp + row + c);
        if (branch) load(b, branch + row + c);
        for (int i = 0; i < W; i++) x[i] = before * x[i] + (branch ? b[i] : 0);
        if (sum) store(sum + row + c, x);
        for (int i = 0; i < W; i++) x[i] *= after;
        if (out) store(out + row + c, x);
        for (int i = 0; i < W; i++) square += x[i] * x[i];
    }
    if (!normed) return;
    float r = rsqrtf(block_sum(square) / C + 1e-6f), w[W];
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
    for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        load(x, inp + row + c);
        load(w, weight + c);
        if (branch) load(b, branch + row + c);
        for (int i = 0; i < W; i++)
            x[i] = w[i] * after * (before * x[i] + (branch ? b[i] : 0)) * r;
        store(normed + row + c, x);
    }
}

template <class real>
static void residual_gpas_rmsnorm_forward(real *sum, real *out, real *normed, float *rstd,
                                          const real *inp, const real *branch, const float *weight,
                                          Gpas g, int N, int C) {
    constexpr int W = 16 / sizeof(real);
    if (C % W == 0)
        residual_gpas_rmsnorm_forward_kernel<real, W><<<N, row_threads(C, W)>>>(
            sum, out, normed, rstd, inp, branch, weight, g, C);
    else
        residual_gpas_rmsnorm_forward_kernel<real, 1><<<N, row_threads(C, 1)>>>(
            sum, out, normed, rstd, inp, branch, weight, g, C);
    LAUNCH_CHECK();
}

/*
Given dnext, the gradient that comes down the shortcut (NULL: none), and dnormed, that of `normed`,
wanted those of the branch, the shortcut, the norm's weight and the gate. Norm last, dnext and
dnormed are two gradients of the same thing and are added first.

    As in train_gpas.c, with u = weight dy and x what was normalized:

    RMSNorm    dx = r (u - x r^2 mean(u x))         dweight = sum over rows of dy x r
    GPAS       norm first:   dsum = dout            (stop_grad; else (1 - a(g)) dout),
                             where dout = dnext + the norm's dx
               norm last:    dinp = A dsum          (stop_grad; else A (1 - a(g)) dsum)
               dg = -a'(g) sum of (what was scaled) (gradient of what came out)
    residual   dbranch = dsum, and norm first dinp = dsum too: the same array

Each block takes every gridDim.x-th row, keeps its share of dweight (C) in shared memory, where each
channel belongs to one thread, and at last writes it and its share of the gate's sum as a line of
partial (blocks,C+1).
*/

// The two gradients that come in, at W places: norm last their sum in dy and 0 in d, norm first
// dnormed in dy and dnext in d.
template <class real, int W>
__device__ inline void load_gradients(float (&dy)[W], float (&d)[W], const real *dnormed,
                                      const real *dnext, size_t at, int norm_last) {
    for (int i = 0; i < W; i++) dy[i] = d[i] = 0;
    if (dnormed) load(dy, dnormed + at);
    if (dnext) load(d, dnext + at);
    for (int i = 0; i < W && norm_last; i++) dy[i] += d[i], d[i] = 0;
}

// dsum, dinp (N,C): written, dinp NULL norm first; both may be dnext or dnormed. dnext, dnormed
// (N,C): NULL stands for 0. x (N,C), rstd (N), weight (C): of the norm; weight NULL: there is none.
// scaled (N,C): what GPAS scaled, sum or inp. Norm first it may be x, GPAS's output: 1 - a(g) times
// sum, so the gate's sum is divided by that. Then nobody needs to keep or fetch `sum`.
template <class real, int W>
__global__ void residual_gpas_rmsnorm_backward_kernel(real *dsum, real *dinp, float *partial,
                                                      const real *dnext, const real *dnormed,
                                                      const real *x, const float *rstd,
                                                      const float *weight, const real *scaled,
                                                      Gpas g, int N, int C) {
    extern __shared__ float dweight[];
    float scale = g.gate ? 1 - gate_value(*g.gate, g.act) : 1, pass = g.stop_grad ? 1 : scale;
    float gate_sum = 0, dy[W], d[W], xs[W], w[W];
    for (int c = threadIdx.x * W; c < C; c += blockDim.x * W)
        for (int i = 0; i < W; i++) dweight[c + i] = 0;
    for (int n = blockIdx.x; n < N; n += gridDim.x) {
        size_t row = (size_t)n * C;
        float r = weight ? rstd[n] : 1, pull = 0;
        for (int c = threadIdx.x * W; c < C && weight; c += blockDim.x * W) {
            load_gradients(dy, d, dnormed, dnext, row + c, g.norm_last);
            load(xs, x + row + c), load(w, weight + c);
            for (int i = 0; i < W; i++) pull += w[i] * dy[i] * xs[i];
        }
        if (weight) pull = block_sum(pull) * r * r / C;  // r^2 mean(u x)
        for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
            load_gradients(dy, d, dnormed, dnext, row + c, g.norm_last);
            if (weight) load(xs, x + row + c), load(w, weight + c);
            for (int i = 0; i < W && weight; i++) {
                dweight[c + i] += dy[i] * xs[i] * r;
                dy[i] = r * (w[i] * dy[i] - xs[i] * pull);
            }
            if (g.gate) load(xs, scaled + row + c);
            for (int i = 0; i < W; i++) {
                d[i] += dy[i];  // the gradient of GPAS's output, norm last without its factor A
                if (g.gate) gate_sum += xs[i] * g.alpha * d[i];
                if (!g.norm_last) d[i] *= pass;
            }
            store(dsum + row + c, d);
            for (int i = 0; i < W; i++) d[i] *= g.alpha * pass;
            if (dinp) store(dinp + row + c, d);
        }
    }
    gate_sum = block_sum(gate_sum) / (scaled == x && !g.norm_last ? scale : 1);
    float *line = partial + (size_t)blockIdx.x * (C + 1);
    if (threadIdx.x == 0) line[C] = gate_sum;
    for (int c = threadIdx.x; c < C; c += blockDim.x) line[c] = dweight[c];
}

// The second stage: adds the lines of partial to dweight (C), the last column to the gate's
// gradient (1). Block (32,32): 32 columns, whose lines are shared out among 32 threads each.
__global__ void add_partial_kernel(float *dweight, float *dgate, const float *partial, int lines,
                                   Gpas g, int C) {
    __shared__ float sums[32][32];
    int c = blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    for (int l = threadIdx.y; l < lines && c <= C; l += 32) sum += partial[(size_t)l * (C + 1) + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0) return;
    for (int k = 1; k < 32; k++) sum += sums[k][threadIdx.x];
    if (c < C && dweight) dweight[c] += sum;
    if (c == C && dgate) *dgate -= gate_slope(*g.gate, g.act) * sum;
}

// dweight (C), dgate (1): added to, NULL if not wanted; partial (ROW_BLOCKS,C+1): scratch.
// C at most MAX_CHANNELS: 48 KiB of shared memory hold dweight and block_sum()'s 32 numbers.
// ROW_BLOCKS blocks of 64 threads, or fewer of more threads: half of what an H100 holds at once.
enum { ROW_BLOCKS = 2048, MAX_CHANNELS = 48 * 1024 / sizeof(float) - 32 };
template <class real>
static void residual_gpas_rmsnorm_backward(real *dsum, real *dinp, float *dweight, float *dgate,
                                           float *partial, const real *dnext, const real *dnormed,
                                           const real *x, const float *rstd, const float *weight,
                                           const real *scaled, Gpas g, int N, int C) {
    constexpr int W = 16 / sizeof(real);
    int threads = row_threads(C, C % W == 0 ? W : 1), bytes = C * sizeof(float);
    int blocks = imin(N, ROW_BLOCKS * 64 / imax(threads, 64));
    if (C % W == 0)
        residual_gpas_rmsnorm_backward_kernel<real, W><<<blocks, threads, bytes>>>(
            dsum, dinp, partial, dnext, dnormed, x, rstd, weight, scaled, g, N, C);
    else
        residual_gpas_rmsnorm_backward_kernel<real, 1><<<blocks, threads, bytes>>>(
            dsum, dinp, partial, dnext, dnormed, x, rstd, weight, scaled, g, N, C);
    LAUNCH_CHECK();
    add_partial_kernel<<<blocks_for(C + 1, 32), dim3(32, 32)>>>(
        weight ? dweight : NULL, g.gate ? dgate : NULL, partial, blocks, g, C);
    LAUNCH_CHECK();
}

// RoPE, in place: turns each pair of adjacent channels of the queries and keys. qkv (N,3C) with
// N = B T; table (T,hs/2,2): cosine and sine.

// One block a token; a thread has W channels of one head. direction 1 turns forward, -1 back.
template <class real, int W>
__global__ void rope_kernel(real *qkv, const float *table, int T, int C, int hs, int direction) {
    real *row = qkv + (size_t)blockIdx.x * 3 * C;
    const float *angles = table + (size_t)(blockIdx.x % T) * hs;
    for (int c = threadIdx.x * W; c < 2 * C; c += blockDim.x * W) {
        float x[W], angle[W], y[W];
        load(x, row + c), load(angle, angles + c % hs);
        for (int i = 0; i < W; i += 2) {
            float cosine = angle[i], sine = direction * angle[i + 1];
            y[i] = x[i] * cosine - x[i + 1] * sine;
            y[i + 1] = x[i] * sine + x[i + 1] * cosine;
        }
        store(row + c, y);
    }
}

template <class real>
static void rope_turn(real *qkv, const float *table, int B, int T, int C, int hs, int direction) {
    constexpr int W = 16 / sizeof(real);
    int N = B * T;
    if (hs % W == 0)
        rope_kernel<real, W><<<N, row_threads(2 * C, W)>>>(qkv, table, T, C, hs, direction);
    else
        rope_kernel<real, 2><<<N, row_threads(2 * C, 2)>>>(qkv, table, T, C, hs, direction);
    LAUNCH_CHECK();
}

template <class real>
static void rope_forward(real *qkv, const float *table, int B, int T, int C, int hs) {
    rope_turn(qkv, table, B, T, C, hs, 1);
}

// Given dy, wanted dx.
//   dx = R^T dy: the rotation back.
// dqkv (B,T,3C), in place.
template <class real>
static void rope_backward(real *dqkv, const float *table, int B, int T, int C, int hs) {
    rope_turn(dqkv, table, B, T, C, hs, -1);
}

// 1 / (1 + e^-x). __fdividef is right to two units in the last place and takes two instructions.
// The exact division takes ten, and then arithmetic, not memory, is what a kernel waits for.
__device__ inline float fast_sigmoid(float x) { return __fdividef(1, 1 + expf(-x)); }

// SwiGLU: out = silu(a) * b. One block a row. out (N,H); inp (N,2H): a row holds a, then b.
template <class real, int W>
__global__ void swiglu_forward_kernel(real *out, const real *inp, int H) {
    const real *row = inp + (size_t)blockIdx.x * 2 * H;
    for (int h = threadIdx.x * W; h < H; h += blockDim.x * W) {
        float a[W], b[W];
        load(a, row + h), load(b, row + H + h);
        for (int k = 0; k < W; k++) a[k] = a[k] * fast_sigmoid(a[k]) * b[k];
        store(out + (size_t)blockIdx.x * H + h, a);
    }
}

// Given dy, wanted da and db.
//   With s = sigmoid(a):  da = dy b (s + a s (1 - s)),  db = dy a s.
// dinp, inp (N,2H); dout (N,H).
template <class real, int W>
__global__ void swiglu_backward_kernel(real *dinp, const real *dout, const real *inp, int H) {
    size_t row = (size_t)blockIdx.x * 2 * H;
    for (int h = threadIdx.x * W; h < H; h += blockDim.x * W) {
        float a[W], b[W], dy[W], da[W], db[W];
        load(a, inp + row + h), load(b, inp + row + H + h);
        load(dy, dout + (size_t)blockIdx.x * H + h);
        for (int k = 0; k < W; k++) {
            float s = fast_sigmoid(a[k]);
            da[k] = dy[k] * b[k] * (s + a[k] * s * (1 - s));
            db[k] = dy[k] * a[k] * s;
        }
        store(dinp + row + h, da), store(dinp + row + H + h, db);
    }
}

template <class real> static void swiglu_forward(real *out, const real *inp, int N, int H) {
    constexpr int W = 16 / sizeof(real);
    if (H % W == 0) swiglu_forward_kernel<real, W><<<N, row_threads(H, W)>>>(out, inp, H);
    else swiglu_forward_kernel<real, 1><<<N, row_threads(H, 1)>>>(out, inp, H);
    LAUNCH_CHECK();
}

template <class real>
static void swiglu_backward(real *dinp, const real *dout, const real *inp, int N, int H) {
    constexpr int W = 16 / sizeof(real);
    if (H % W == 0) swiglu_backward_kernel<real, W><<<N, row_threads(H, W)>>>(dinp, dout, inp, H);
    else swiglu_backward_kernel<real, 1><<<N, row_threads(H, 1)>>>(dinp, dout, inp, H);
    LAUNCH_CHECK();
}

/*
Matrix multiplication is cuBLASLt's. It thinks in columns: a row-major (rows,cols) matrix is to it
the transpose, cols x rows with cols numbers between columns. So for out = inp weight^T we ask for
out^T = weight inp^T. To describe a product and to find the best of cuBLASLt's kernels for it takes
longer than to run a small one; so the last PLANS products are remembered. The choice is cuBLASLt's
own estimate, never a race, for a race could end differently in the next run. A sum that it splits
into parts must be put together in float.
*/
typedef struct {
    int trans_a, trans_b, m, n, k, real_size, result_size;
} Product;

typedef struct {
    Product product;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulHeuristicResult_t found;
} Plan;

enum { PLANS = 64, WORKSPACE = 32 << 20 };
static cublasLtHandle_t cublaslt;
static void *workspace;
static Plan plans[PLANS];
static int num_plans;  // ever made; the next one goes to plans[num_plans % PLANS]

static void free_plan(Plan *plan) {
    if (!plan->operation) return;
    CUBLAS_CHECK(cublasLtMatmulDescDestroy(plan->operation));
    CUBLAS_CHECK(cublasLtMatrixLayoutDestroy(plan->a));
    CUBLAS_CHECK(cublasLtMatrixLayoutDestroy(plan->b));
    CUBLAS_CHECK(cublasLtMatrixLayoutDestroy(plan->d));
    plan->operation = NULL;
}

// cuBLASLt's first choices among its kernels for a plan's product, at most `wanted`, the best by
// its own estimate first. Returns how many there are.
static int choices(const Plan *plan, cublasLtMatmulHeuristicResult_t *found, int wanted) {
    cublasLtMatmulPreference_t preference;
    size_t room = WORKSPACE;
    uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    int count = 0;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof room));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction));
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        cublaslt, plan->operation, plan->a, plan->b, plan->d, plan->d, preference, wanted, found,
        &count);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) CUBLAS_CHECK(status);
    CUBLAS_CHECK(cublasLtMatmulPreferenceDestroy(preference));
    return count;
}

static Plan *plan_for(Product p) {
    for (int i = 0; i < imin(num_plans, PLANS); i++)
        if (memcmp(&plans[i].product, &p, sizeof p) == 0) return &plans[i];
    Plan *plan = &plans[num_plans++ % PLANS];
    cublasOperation_t ops[] = {CUBLAS_OP_N, CUBLAS_OP_T};
    cudaDataType_t types[] = {CUDA_R_16BF, CUDA_R_32F};
    cudaDataType_t type = types[p.real_size == 4], result = types[p.result_size == 4];
    free_plan(plan);
    plan->product = p;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                &ops[p.trans_a], sizeof *ops));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSB,
                                                &ops[p.trans_b], sizeof *ops));
    int a_rows = p.trans_a ? p.k : p.m, b_rows = p.trans_b ? p.n : p.k;
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&plan->a, type, a_rows, p.trans_a ? p.m : p.k, a_rows));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&plan->b, type, b_rows, p.trans_b ? p.k : p.n, b_rows));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&plan->d, result, p.m, p.n, p.m));
    if (choices(plan, &plan->found, 1) == 0)
        die("cuBLASLt has no kernel for a product of %d x %d x %d; make --channels a multiple of 8",
            p.m, p.n, p.k);
    return plan;
}

// In columns: D (m,n) = A B, or D += A B. A is (m,k), or (k,m) if trans_a; B (k,n), or (n,k).
template <class result, class real>
static void gemm(result *d, const real *a, int trans_a, const real *b, int trans_b, int m, int n,
                 int k, int accumulate) {
    Product product = {trans_a, trans_b, m, n, k, sizeof(real), sizeof(result)};
    Plan *plan = plan_for(product);
    float alpha = 1, beta = accumulate ? 1 : 0;
    CUBLAS_CHECK(cublasLtMatmul(cublaslt, plan->operation, &alpha, a, plan->a, b, plan->b, &beta, d,
                                plan->d, d, plan->d, &plan->found.algo, workspace, WORKSPACE, 0));
}

// out = inp weight^T. out (N,OC), inp (N,C), weight (OC,C).
template <class real>
static void matmul_forward(real *out, const real *inp, const real *weight, int N, int C, int OC) {
    gemm(out, weight, 1, inp, 0, OC, N, C, 0);
}

// Given dout, wanted dinp and dweight, the latter summed and kept in float.
//   dinp = dout weight; dweight += dout^T inp
// dinp, inp (N,C); dout (N,OC); weight, dweight (OC,C).
template <class real>
static void matmul_backward(real *dinp, float *dweight, const real *dout, const real *inp,
                            const real *weight, int N, int C, int OC) {
    gemm(dinp, weight, 0, dout, 0, C, N, OC, 0);
    gemm(dweight, inp, 0, dout, 1, C, OC, N, 1);
}

/*
Causal attention, after FlashAttention-2 (arXiv 2307.08691); the mathematics is in train_gpas.c:

    S_ts = q_t . k_s / sqrt(hs) for s <= t    P_t = softmax over s of S_t    o_t = sum_s P_ts v_s

A block of 4 warps has 64 rows (queries, or keys going backwards), a warp 16 of them. Tiles of COLS
rows of the other side pass through shared memory; while one is multiplied, the next is on its way.
S, P and the results stay in registers (in bf16; the float version is there to be exact, and its
matrices overflow to local memory).

What multiplies is the tensor core: D (16,8) += A (16,16) B (16,8), one instruction of a whole warp,
in which each lane holds a few numbers of each matrix. With group = lane / 4 and pair = lane % 4:

    A   a[0]: row group, columns 2 pair, 2 pair + 1       a[1]: the same of row group + 8
        a[2], a[3]: as a[0], a[1], 8 columns further
    B   b[0]: column group, rows 2 pair, 2 pair + 1       b[1]: 8 rows further
    D   d[0], d[1]: row group, columns 2 pair, 2 pair + 1       d[2], d[3]: of row group + 8

Two neighbouring D lie as one A does: P = softmax(q k^T) is the next product's A as it stands.
The four lanes of a group share a row: its maximum and sum take two shuffles.
*/
enum { WARPS = 4, ROWS = 16 * WARPS };

// Blocks that are to be on a processor at once, so that one can multiply while others wait. They
// share its 65536 registers: 3 leave a thread 168.
#define BLOCKS(HS) ((HS) <= 64 ? 3 : 2)

// D += A B in bf16.
__device__ inline void mma(float (&d)[4], const Pack<bf16, 2> (&a)[4],
                           const Pack<bf16, 2> (&b)[2]) {
    mma_m16n8k16_bf16(d, (const __nv_bfloat162 *)a, (const __nv_bfloat162 *)b);
}

// D += A B in float, which tensor cores do not have: the lanes lay A and B out in shared memory.
__device__ inline void mma(float (&d)[4], const Pack<float, 2> (&a)[4],
                           const Pack<float, 2> (&b)[2]) {
    __shared__ float A[WARPS][16][16];
    __shared__ float B[WARPS][16][8];
    int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    for (int i = 0; i < 2; i++)
        for (int part = 0; part < 4; part++)
            A[warp][group + part % 2 * 8][2 * pair + part / 2 * 8 + i] = a[part].x[i];
    for (int i = 0; i < 2; i++)
        for (int part = 0; part < 2; part++) B[warp][2 * pair + part * 8 + i][group] = b[part].x[i];
    __syncwarp();
    for (int k = 0; k < 16; k++) {
        float a0 = A[warp][group][k], a1 = A[warp][group + 8][k];
        float b0 = B[warp][k][2 * pair], b1 = B[warp][k][2 * pair + 1];
        d[0] += a0 * b0, d[1] += a0 * b1, d[2] += a1 * b0, d[3] += a1 * b1;
    }
    __syncwarp();
}

// Copies BYTES (4, 8 or 16, and aligned to that) from global to shared memory; if not `valid` it
// writes zeros and reads nothing, wherever `from` is. The thread neither waits nor needs a register
// for them. They are there for it after cp_async_wait_all(), and for the others after a
// __syncthreads() too.
template <int BYTES> __device__ inline void copy_async(void *to, const void *from, int valid) {
    cp_async(to, from, BYTES, valid ? BYTES : 0);
}

// The A operands of a warp's 16 rows in global memory, `stride` apart: a (16,HS). Beyond the first
// `valid` rows and `hs` columns they are 0.
template <class real, int HS>
__device__ inline void load_rows(Pack<real, 2> (&a)[HS / 16][4], const real *rows, int stride,
                                 int valid, int hs) {
    int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    for (int k = 0; k < HS / 16; k++)
        for (int part = 0; part < 4; part++) {
            int row = group + part % 2 * 8, column = 16 * k + 2 * pair + part / 2 * 8;
            a[k][part] = Pack<real, 2>();
            if (row < valid && column < hs)
                a[k][part] = *(const Pack<real, 2> *)(rows + row * stride + column);
        }
}

// A row of a tile in shared memory. Shared memory has 32 banks, each 4 bytes wide and each serving
// one lane at a time. Rows that are 16 bytes longer than HS put the 8 rows that a warp reads at
// once into different banks (in bf16).
template <class real, int HS> struct alignas(16) Tile { real x[HS + 16 / sizeof(real)]; };

// Sends for a tile (COLS,HS): 16 bytes at once if rows begin at multiples of 16 bytes, else pairs.
// A thread stays in its columns and goes down the rows: little arithmetic for each copy.
template <class real, int HS, int COLS>
__device__ inline void load_tile(Tile<real, HS> (&tile)[COLS], const real *rows, int stride,
                                 int valid, int hs) {
    constexpr int W = 16 / sizeof(real), STEP = 32 * WARPS * W / HS;
    static_assert(COLS % STEP == 0, "the threads go through the tile in whole steps");
    int first = threadIdx.x / (HS / W), column = threadIdx.x % (HS / W) * W;
    const real *from = rows + first * stride + column;
    if (hs % W == 0)
        for (int i = 0; i < COLS / STEP; i++, from += STEP * stride) {
            int row = first + i * STEP;
            copy_async<16>(&tile[row].x[column], from, row < valid && column < hs);
        }
    else
        for (int row = first; row < COLS; row += STEP, from += STEP * stride)
            for (int c = 0; c < W; c += 2)
                copy_async<2 * sizeof(real)>(&tile[row].x[column + c], from + c,
                                             row < valid && column + c < hs);
}

// Two B operands side by side, (16,16), out of a tile: B[k][n] = tile[row + k][column + n], or
// TURNED tile[row + n][column + k]. In bf16 one instruction fetches four matrices of 8 x 8: lane l
// says where row l % 8 of matrix l / 8 begins, and gets of each matrix what a lane holds of a B.
template <int TURNED, int HS>
__device__ inline void load_b(Pack<bf16, 2> (&b)[2][2], const Tile<bf16, HS> *tile, int row,
                              int column) {
    int lane = threadIdx.x % 32, k = lane / 8 % 2 * 8, n = lane / 16 * 8;
    const bf16 *from = &tile[row + (TURNED ? n : k) + lane % 8].x[column + (TURNED ? k : n)];
    ldmatrix_x4((__nv_bfloat162 *)b, from, !TURNED);  // TURNED: rows in memory are B's columns
}

template <int TURNED, int HS>
__device__ inline void load_b(Pack<float, 2> (&b)[2][2], const Tile<float, HS> *tile, int row,
                              int column) {
    for (int i = 0; i < 8; i++) {
        int k = threadIdx.x % 4 * 2 + i % 4 / 2 * 8 + i % 2, n = threadIdx.x % 32 / 4 + i / 4 * 8;
        b[i / 4][i % 4 / 2].x[i % 2] = tile[row + (TURNED ? n : k)].x[column + (TURNED ? k : n)];
    }
}

// d (16,COLS) = a (16,HS) tile^T, of the first COLS rows of a tile.
template <class real, int HS, int COLS>
__device__ inline void multiply_transposed(float (&d)[COLS / 8][4],
                                           const Pack<real, 2> (&a)[HS / 16][4],
                                           const Tile<real, HS> *tile) {
    for (int j = 0; j < COLS / 8; j += 2) {
        for (int i = 0; i < 4; i++) d[j][i] = d[j + 1][i] = 0;
        for (int k = 0; k < HS / 16; k++) {
            Pack<real, 2> b[2][2];
            load_b<1, HS>(b, tile, 8 * j, 16 * k);
            mma(d[j], a[k], b[0]), mma(d[j + 1], a[k], b[1]);
        }
    }
}

// d (16,HS) += p (16,COLS) tile, p as a product has left it.
template <class real, int HS, int COLS>
__device__ inline void multiply_add(float (&d)[HS / 8][4], const float (&p)[COLS / 8][4],
                                    const Tile<real, HS> *tile) {
    for (int k = 0; k < COLS / 16; k++) {
        Pack<real, 2> a[4], b[2][2];
        for (int part = 0; part < 4; part++)
            for (int i = 0; i < 2; i++)
                round_to(a[part].x[i], p[2 * k + part / 2][part % 2 * 2 + i]);
        for (int j = 0; j < HS / 8; j += 2) {
            load_b<0, HS>(b, tile, 16 * k, 8 * j);
            mma(d[j], a, b[0]), mma(d[j + 1], a, b[1]);
        }
    }
}

// A warp's 16 result rows, times `scale` of each, to global memory.
template <class real, int HS>
__device__ inline void store_rows(real *rows, int stride, const float (&d)[HS / 8][4],
                                  const float (&scale)[2], int valid, int hs) {
    int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    for (int j = 0; j < HS / 8; j++)
        for (int half = 0; half < 2; half++) {
            int row = group + 8 * half, column = 8 * j + 2 * pair;
            float x[2] = {d[j][2 * half] * scale[half], d[j][2 * half + 1] * scale[half]};
            if (row < valid && column < hs) store(rows + row * stride + column, x);
        }
}

// Sum, or largest, over the four lanes of a group.
__device__ inline float group_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

__device__ inline float group_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

// e^x is 2^(x log2 e), and 2^x is what a GPU computes in one instruction: the scores' scale takes
// log2 e in.
#define LOG2_E 1.44269504f

// -infinity for scores p (16,COLS) of keys after their query. Rows are queries from row0 on and
// columns keys from column0 on, or TURNED keys and queries.
template <int TURNED, int COLS>
__device__ inline void mask_tile(float (&p)[COLS / 8][4], int row0, int column0) {
    int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    if (TURNED ? column0 >= row0 + 15 : column0 + COLS <= row0 + 1) return;
    for (int j = 0; j < COLS / 8; j++)
        for (int i = 0; i < 4; i++) {
            int row = row0 + group + i / 2 * 8, column = column0 + 8 * j + 2 * pair + i % 2;
            if (TURNED ? row > column : column > row) p[j][i] = -INFINITY;
        }
}

// Scores p (16,COLS) become 2^(scale p - m). The softmax is carried along: m is the largest scaled
// score of each row so far, l this lane's share of the sum; when a larger one turns up, l and
// o (16,HS) are corrected by 2^(m_old - m_new).
template <int HS, int COLS>
__device__ inline void softmax_tile(float (&p)[COLS / 8][4], float (&o)[HS / 8][4], float (&m)[2],
                                    float (&l)[2], float scale) {
    for (int half = 0; half < 2; half++) {
        float largest = -INFINITY;
        for (int j = 0; j < COLS / 8; j++)
            for (int i = 0; i < 2; i++) largest = fmaxf(largest, p[j][2 * half + i]);
        largest = fmaxf(m[half], group_max(largest) * scale);
        float correction = exp2f(m[half] - largest);
        m[half] = largest, l[half] *= correction;
        for (int j = 0; j < COLS / 8; j++)
            for (int i = 0; i < 2; i++)
                l[half] += p[j][2 * half + i] = exp2f(p[j][2 * half + i] * scale - largest);
        for (int j = 0; j < HS / 8; j++)
            for (int i = 0; i < 2; i++) o[j][2 * half + i] *= correction;
    }
}

// One block for 64 queries of one head. out (B,T,C); lse (B,NH,T); qkv (B,T,3C).
template <class real, int HS, int COLS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS(HS))
attention_forward_kernel(real *out, float *lse, const real *qkv, int T, int C, int NH,
                         float scale) {
    __shared__ Tile<real, HS> keys[2][COLS];
    __shared__ Tile<real, HS> values[2][COLS];
    int tiles = (T + ROWS - 1) / ROWS, hs = C / NH, b = blockIdx.x / tiles / NH;
    int h = blockIdx.x / tiles % NH;
    int first = (tiles - 1 - blockIdx.x % tiles) * ROWS;  // the last rows see most keys: they begin
    int t0 = first + threadIdx.x / 32 * 16, end = min(T, first + ROWS), now = 0;
    int stride = 3 * C;
    const real *q = qkv + (size_t)b * T * stride + h * hs;
    Pack<real, 2> queries[HS / 16][4];
    float o[HS / 8][4] = {}, m[2] = {-1e30f, -1e30f}, l[2] = {0, 0}, p[COLS / 8][4];
    auto send = [&](int s, int to) {
        const real *k = q + C + (size_t)s * stride;
        load_tile<real, HS, COLS>(keys[to], k, stride, T - s, hs);
        load_tile<real, HS, COLS>(values[to], k + C, stride, T - s, hs);
    };
    send(0, 0);
    load_rows<real, HS>(queries, q + (size_t)t0 * stride, stride, T - t0, hs);
    for (int s0 = 0; s0 < end; s0 += COLS, now ^= 1) {  // the keys at or before the queries
        cp_async_wait_all();
        __syncthreads();  // this tile is there, and nobody reads the one before it any more
        if (s0 + COLS < end) send(s0 + COLS, now ^ 1);
        if (t0 >= T || s0 >= t0 + 16) continue;  // this warp has no rows, or they see no such key
        multiply_transposed<real, HS, COLS>(p, queries, keys[now]);
        mask_tile<0, COLS>(p, t0, s0);
        softmax_tile<HS, COLS>(p, o, m, l, scale * LOG2_E);
        multiply_add<real, HS, COLS>(o, p, values[now]);
    }
    for (int half = 0; half < 2; half++) {
        int t = t0 + threadIdx.x % 32 / 4 + 8 * half;
        l[half] = group_sum(l[half]);
        if (threadIdx.x % 4 == 0 && t < T)
            lse[((size_t)b * NH + h) * T + t] = m[half] / LOG2_E + logf(l[half]);
        l[half] = 1 / l[half];
    }
    store_rows<real, HS>(out + ((size_t)b * T + t0) * C + h * hs, C, o, l, T - t0, hs);
}

// One query and key: the score s becomes P and dp = dP becomes dS, but for the factor `scale`,
// which the sums over dS get at the end.
//   P = e^(scale s - lse);   dS = scale P (dP - delta)
__device__ inline void softmax_backward(float &s, float &dp, float scale, float lse, float delta) {
    s = exp2f(s * (scale * LOG2_E) - lse * LOG2_E);
    dp = s * (dp - delta);
}

// Given dout and out, wanted dq, and delta for the kernel below. One block for 64 queries of one
// head; keys pass by.
//   delta_t = do_t . o_t, which is sum_s P_ts dP_ts
//   dq_t = sum_s dS_ts k_s. S and dP are computed here and below: the other way, adding dq up
//   across the blocks of the kernel below, would take atomics.
template <class real, int HS, int COLS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS(HS))
attention_backward_q_kernel(real *dqkv, float *delta, const real *dout, const real *out,
                            const float *lse, const real *qkv, int T, int C, int NH, float scale) {
    __shared__ Tile<real, HS> keys[2][COLS];
    __shared__ Tile<real, HS> values[2][COLS];
    int tiles = (T + ROWS - 1) / ROWS, hs = C / NH, b = blockIdx.x / tiles / NH;
    int h = blockIdx.x / tiles % NH, first = (tiles - 1 - blockIdx.x % tiles) * ROWS;
    int t0 = first + threadIdx.x / 32 * 16, end = min(T, first + ROWS), now = 0;
    int stride = 3 * C;
    size_t head = (size_t)b * T * stride + h * hs, at = ((size_t)b * T + t0) * C + h * hs;
    Pack<real, 2> q[HS / 16][4], dy[HS / 16][4];
    float dq[HS / 8][4] = {}, p[COLS / 8][4], ds[COLS / 8][4], row_lse[2], row_delta[2] = {0, 0};
    auto send = [&](int s, int to) {
        const real *k = qkv + head + C + (size_t)s * stride;
        load_tile<real, HS, COLS>(keys[to], k, stride, T - s, hs);
        load_tile<real, HS, COLS>(values[to], k + C, stride, T - s, hs);
    };
    send(0, 0);
    load_rows<real, HS>(q, out + at, C, T - t0, hs);  // o, for delta alone
    load_rows<real, HS>(dy, dout + at, C, T - t0, hs);
    for (int i = 0; i < HS / 2; i++)
        row_delta[i / 2 % 2] += to_float(q[i / 8][i / 2 % 4].x[i % 2]) *
                                to_float(dy[i / 8][i / 2 % 4].x[i % 2]);
    load_rows<real, HS>(q, qkv + head + (size_t)t0 * stride, stride, T - t0, hs);
    for (int half = 0; half < 2; half++) {
        int t = t0 + threadIdx.x % 32 / 4 + 8 * half;
        size_t row = ((size_t)b * NH + h) * T + t;
        row_delta[half] = group_sum(row_delta[half]);
        row_lse[half] = t < T ? lse[row] : 0;
        if (threadIdx.x % 4 == 0 && t < T) delta[row] = row_delta[half];
    }
    for (int s0 = 0; s0 < end; s0 += COLS, now ^= 1) {
        cp_async_wait_all();
        __syncthreads();
        if (s0 + COLS < end) send(s0 + COLS, now ^ 1);
        if (t0 >= T || s0 >= t0 + 16) continue;
        multiply_transposed<real, HS, COLS>(p, q, keys[now]);
        multiply_transposed<real, HS, COLS>(ds, dy, values[now]);
        mask_tile<0, COLS>(p, t0, s0);
        for (int j = 0; j < COLS / 8; j++)
            for (int i = 0; i < 4; i++)
                softmax_backward(p[j][i], ds[j][i], scale, row_lse[i / 2], row_delta[i / 2]);
        multiply_add<real, HS, COLS>(dq, ds, keys[now]);
    }
    const float scales[2] = {scale, scale};
    store_rows<real, HS>(dqkv + head + (size_t)t0 * stride, stride, dq, scales, T - t0, hs);
}

// Given dout and delta, wanted dk and dv. One block for 64 keys of one head; queries pass by.
//   dv_s = sum_t P_ts do_t and dk_s = sum_t dS_ts q_t. The block's rows are keys, so it needs
//   S^T = k q^T and dP^T = v do^T.
// Beyond the last query do and delta are 0: nothing is added.
template <class real, int HS, int COLS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS(HS))
attention_backward_kv_kernel(real *dqkv, const real *dout, const float *lse, const float *delta,
                             const real *qkv, int T, int C, int NH, float scale) {
    __shared__ Tile<real, HS> queries[2][COLS];
    __shared__ Tile<real, HS> douts[2][COLS];
    __shared__ float sums[2][2][COLS];  // lse, delta
    static_assert(2 * COLS <= 32 * WARPS, "each of them is fetched by a thread of its own");
    int tiles = (T + ROWS - 1) / ROWS, hs = C / NH, b = blockIdx.x / tiles / NH;
    int h = blockIdx.x / tiles % NH, first = blockIdx.x % tiles * ROWS, now = 0;
    int pair = threadIdx.x % 4, s0 = first + threadIdx.x / 32 * 16;
    int stride = 3 * C;
    size_t head = (size_t)b * T * stride + h * hs;
    const real *q = qkv + head, *dy = dout + (size_t)b * T * C + h * hs;
    Pack<real, 2> k[HS / 16][4], v[HS / 16][4];
    float dk[HS / 8][4] = {}, dv[HS / 8][4] = {}, p[2][4], ds[2][4];
    auto send = [&](int t, int to) {
        load_tile<real, HS, COLS>(queries[to], q + (size_t)t * stride, stride, T - t, hs);
        load_tile<real, HS, COLS>(douts[to], dy + (size_t)t * C, C, T - t, hs);
        int i = threadIdx.x % COLS, which = threadIdx.x / COLS;  // lse or delta of query t + i
        const float *from = (which ? delta : lse) + blockIdx.x / tiles * T + min(t + i, T - 1);
        if (which < 2) copy_async<4>(&sums[to][which][i], from, t + i < T);
    };
    send(first, 0);
    load_rows<real, HS>(k, q + C + (size_t)s0 * stride, stride, T - s0, hs);
    load_rows<real, HS>(v, q + 2 * C + (size_t)s0 * stride, stride, T - s0, hs);
    for (int t0 = first; t0 < T; t0 += COLS, now ^= 1) {
        cp_async_wait_all();
        __syncthreads();
        if (t0 + COLS < T) send(t0 + COLS, now ^ 1);
        if (s0 >= T || t0 + COLS <= s0) continue;
        for (int c = 0; c < COLS; c += 16) {  // few at once: dk and dv take half of the registers
            if (t0 + c + 16 <= s0) continue;
            multiply_transposed<real, HS, 16>(p, k, queries[now] + c);
            multiply_transposed<real, HS, 16>(ds, v, douts[now] + c);
            mask_tile<1, 16>(p, s0, t0 + c);
            for (int j = 0; j < 2; j++)
                for (int i = 0; i < 4; i++) {
                    int t = c + 8 * j + 2 * pair + i % 2;
                    softmax_backward(p[j][i], ds[j][i], scale, sums[now][0][t], sums[now][1][t]);
                }
            multiply_add<real, HS, 16>(dv, p, douts[now] + c);
            multiply_add<real, HS, 16>(dk, ds, queries[now] + c);
        }
    }
    const float one[2] = {1, 1}, scales[2] = {scale, scale};
    real *out = dqkv + head + (size_t)s0 * stride;
    store_rows<real, HS>(out + C, stride, dk, scales, T - s0, hs);
    store_rows<real, HS>(out + 2 * C, stride, dv, one, T - s0, hs);
}

enum { MAX_HEAD = 128 };  // channels of a head

// For heads of at most HS channels. A block may have 48 KiB of shared memory without asking: room
// for two tiles of 8 KiB, twice. Backwards there are more results in registers, and shorter tiles;
// but the kernel for dk and dv goes through its tile in parts.
template <class real, int HS>
static void attention_forward_sized(real *out, float *lse, const real *qkv, int B, int T, int C,
                                    int NH) {
    constexpr int COLS = HS == 32 ? 64 : 8192 / sizeof(real) / HS;
    int blocks = B * NH * ((T + ROWS - 1) / ROWS), threads = 32 * WARPS;
    float scale = 1 / sqrtf((float)C / NH);
    attention_forward_kernel<real, HS, COLS><<<blocks, threads>>>(out, lse, qkv, T, C, NH, scale);
    LAUNCH_CHECK();
}

template <class real, int HS>
static void attention_backward_sized(real *dqkv, float *delta, const real *dout, const real *out,
                                     const float *lse, const real *qkv, int B, int T, int C,
                                     int NH) {
    constexpr int COLS = HS == 128 ? 16 : 32, COLS_KV = sizeof(real) == 2 && HS < 128 ? 64 : COLS;
    int blocks = B * NH * ((T + ROWS - 1) / ROWS), threads = 32 * WARPS;
    float scale = 1 / sqrtf((float)C / NH);
    attention_backward_q_kernel<real, HS, COLS><<<blocks, threads>>>(dqkv, delta, dout, out, lse,
                                                                     qkv, T, C, NH, scale);
    LAUNCH_CHECK();
    attention_backward_kv_kernel<real, HS, COLS_KV><<<blocks, threads>>>(dqkv, dout, lse, delta,
                                                                         qkv, T, C, NH, scale);
    LAUNCH_CHECK();
}

// out (B,T,C), lse (B,NH,T), qkv (B,T,3C). C/NH even, at most MAX_HEAD.
template <class real>
static void attention_forward(real *out, float *lse, const real *qkv, int B, int T, int C, int NH) {
    if (C / NH <= 32) attention_forward_sized<real, 32>(out, lse, qkv, B, T, C, NH);
    else if (C / NH <= 64) attention_forward_sized<real, 64>(out, lse, qkv, B, T, C, NH);
    else attention_forward_sized<real, 128>(out, lse, qkv, B, T, C, NH);
}

// dqkv, qkv (B,T,3C); dout, out (B,T,C); lse, delta (B,NH,T), delta is scratch.
template <class real>
static void attention_backward(real *dqkv, float *delta, const real *dout, const real *out,
                               const float *lse, const real *qkv, int B, int T, int C, int NH) {
    if (C / NH <= 32)
        attention_backward_sized<real, 32>(dqkv, delta, dout, out, lse, qkv, B, T, C, NH);
    else if (C / NH <= 64)
        attention_backward_sized<real, 64>(dqkv, delta, dout, out, lse, qkv, B, T, C, NH);
    else
        attention_backward_sized<real, 128>(dqkv, delta, dout, out, lse, qkv, B, T, C, NH);
}

// Given logits and scale, the gradient of each loss, wanted the losses and the gradient of the
// logits, which may take their place. With lse = log sum_v e^logit_v
//   loss = lse - logit of the target
//   dlogit_v = (e^(logit_v - lse) - [v is the target]) * scale, and 0 between V and stride
// One block a row. Each thread carries the largest of its logits and the sum of e^(logit - largest)
// along. Then it reads its logits again: blocks of 1024 threads are few at a time, and their rows
// are still in the cache. So memory is read once and written once for both results.
// losses, lse (N); logits, dlogits (N,V) with rows `stride` apart; targets (N). lse, dlogits: NULL
// if not wanted.
template <class real, int W>
__global__ void __launch_bounds__(1024, 2)
crossentropy_kernel(float *losses, float *lse, real *dlogits, const real *logits,
                    const int *targets, float scale, int V, int stride) {
    size_t row = (size_t)blockIdx.x * stride;
    int target = targets[blockIdx.x];
    float target_logit = to_float(logits[row + target]), largest = -INFINITY, sum = 0, x[W];
    for (int v = threadIdx.x * W; v < V; v += blockDim.x * W) {
        float m = largest;
        load(x, logits + row + v);
        for (int i = 0; i < W; i++) x[i] = v + i < V ? x[i] : -INFINITY, m = fmaxf(m, x[i]);
        sum *= exp2f((largest - m) * LOG2_E);
        for (int i = 0; i < W; i++) sum += exp2f((x[i] - m) * LOG2_E);
        largest = m;
    }
    float m = block_max(largest);
    sum = block_sum(sum != 0 ? sum * exp2f((largest - m) * LOG2_E) : 0);  // 0: no logit
    float row_lse = m + logf(sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = row_lse - target_logit;
    if (threadIdx.x == 0 && lse) lse[blockIdx.x] = row_lse;
    for (int v = threadIdx.x * W; v < stride && dlogits; v += blockDim.x * W) {
        load(x, logits + row + v);
        for (int i = 0; i < W; i++)
            x[i] = v + i < V ? (exp2f((x[i] - row_lse) * LOG2_E) - (v + i == target)) * scale : 0;
        store(dlogits + row + v, x);
    }
}

template <class real>
static void crossentropy(float *losses, float *lse, real *dlogits, const real *logits,
                         const int *targets, float scale, int N, int V, int stride) {
    constexpr int W = 16 / sizeof(real);
    int width = stride % W == 0 ? W : 1, threads = imin(1024, (stride / width + 31) / 32 * 32);
    if (width == W)
        crossentropy_kernel<real, W><<<N, threads>>>(losses, lse, dlogits, logits, targets, scale,
                                                     V, stride);
    else
        crossentropy_kernel<real, 1><<<N, threads>>>(losses, lse, dlogits, logits, targets, scale,
                                                     V, stride);
    LAUNCH_CHECK();
}

/* ------------------------------------------------------------------------------------------------
3. Optimizer

All parameters lie in one piece of memory, gradients and moments in three more. A kernel that goes
over all of them at once must know what each number belongs to: they are cut into chunks of at most
CHUNK numbers, none across two tensors, and a block of threads takes one.
*/
enum { CHUNK = 4096 };

typedef struct {
    size_t offset;
    int size;
    int kind, layer;  // of its tensor: WQ, ..., GATE; 0, 1, ..., or -1 if it belongs to no layer
    int decays;       // 1: AdamW's weight decay applies, as it does to matrices
} Chunk;

// What AdamW needs beside its arrays, as in train_gpas.c. clip, gate_clip: factors of the gradient.
typedef struct {
    float lr, beta1, beta2, eps, weight_decay, clip, gate_clip, unbias_m, unbias_v;
    int train_gates;
} AdamW;

// The derivation is in train_gpas.c. weights: the copy that is multiplied with, rounded to `real`;
// the same array as p where real is float.
template <class real>
__global__ void adamw_kernel(real *weights, float *p, const float *grad, float *m, float *v,
                             const Chunk *chunks, AdamW a) {
    Chunk chunk = chunks[blockIdx.x];
    if (chunk.kind == GATE && !a.train_gates) return;
    float clip = chunk.kind == GATE ? a.gate_clip : a.clip;
    float decay = chunk.decays ? a.weight_decay : 0;
    for (int k = threadIdx.x; k < chunk.size; k += blockDim.x) {
        size_t i = chunk.offset + k;
        float g = grad[i] * clip, x = p[i];
        float mi = a.beta1 * m[i] + (1 - a.beta1) * g;
        float vi = a.beta2 * v[i] + (1 - a.beta2) * g * g;
        x -= a.lr * (mi * a.unbias_m / (sqrtf(vi * a.unbias_v) + a.eps) + decay * x);
        m[i] = mi, v[i] = vi, p[i] = x;
        round_to(weights[i], x);
    }
}

// t = 1, 2, ...: the step.
template <class real>
static void adamw_update(real *weights, float *p, const float *grad, float *m, float *v,
                         const Chunk *chunks, int num_chunks, AdamW a, int t) {
    a.unbias_m = (float)(1 / (1 - pow(a.beta1, t)));
    a.unbias_v = (float)(1 / (1 - pow(a.beta2, t)));
    adamw_kernel<real><<<num_chunks, 256>>>(weights, p, grad, m, v, chunks, a);
    LAUNCH_CHECK();
}

// squares[chunk] = the sum of the squares of its gradients. The host adds them up, in order.
__global__ void squares_kernel(float *squares, const float *grad, const Chunk *chunks) {
    Chunk chunk = chunks[blockIdx.x];
    float sum = 0;
    for (int k = threadIdx.x; k < chunk.size; k += blockDim.x)
        sum += grad[chunk.offset + k] * grad[chunk.offset + k];
    sum = block_sum(sum);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

// y = scale x, or y += scale x. y, x (n).
template <class to, class from>
__global__ void scale_kernel(to *y, const from *x, float scale, int add, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) round_to(y[i], scale * to_float(x[i]) + (add ? to_float(y[i]) : 0));
}

template <class to, class from>
static void scaled(to *y, const from *x, float scale, int add, size_t n) {
    scale_kernel<to, from><<<blocks_for(n, 256), 256>>>(y, x, scale, add, n);
    LAUNCH_CHECK();
}

// sums[block] = {sum of x, sum of x^2} over the block's share of x (n).
enum { MOMENT_BLOCKS = 256 };
template <class real>
__global__ void moments_kernel(Pack<double, 2> *sums, const real *x, size_t n) {
    double sum = 0, square = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        double value = to_float(x[i]);
        sum += value, square += value * value;
    }
    sum = block_sum(sum), square = block_sum(square);
    if (threadIdx.x == 0) sums[blockIdx.x].x[0] = sum, sums[blockIdx.x].x[1] = square;
}

/* ------------------------------------------------------------------------------------------------
4. Model

On the GPU H and V are rounded up to multiples of 8, so that rows begin at multiples of 16 bytes:
w1, w3 and the output matrix get more rows, w2 more columns, all 0. Their gradients are 0 too, and
AdamW leaves what has no gradient at 0: nothing else needs to know. Files have the sizes without it.
*/

// A sublayer's activations, as in train_gpas.c. With the norm first, `normed` and `rstd` are
// written by the sublayer before it; with the norm last, `out` is N(sum).
template <class real> struct Sublayer {
    real *inp, *normed;           // (B,T,C) normed is inp itself where the norm comes last
    real *qkv, *pre_act, *inner;  // (B,T,3C), (B,T,2H), (B,T,C or H)
    real *branch, *sum, *out;     // (B,T,C) norm first, only out is kept
    float *lse, *rstd, *post_rstd;  // (B,NH,T), (B,T), (B,T)
};

template <class real> struct Network {
    real *weights;               // the parameters in `real`; for fp32 the parameters themselves
    Sublayer<real> *sublayers;   // (2L)
    real *embedded, *final_normed;               // (B,T,C)
    real *logits;                                // (a part of B T,V): see output_forward()
    real *scratch, *branches, *dx, *dinp;        // (B,T,C)
    real *dinner, *dwide;        // (B,T,C or H), (B,T,3C or 2H)
};

struct Model {
    const Options *o;
    Config config;
    TensorList list;             // names, shapes and places of the parameters, as in the files
    int in_bf16;
    float *parameters, *gradients, *adam_m, *adam_v;  // on the host, as in the files; when needed
    size_t *offsets, room;       // on the GPU: see offset_of(); the length of all parameters
    int H, V;                    // rounded up
    float *p, *d, *m, *v;        // on the GPU (room): parameters, gradients, Adam's moments
    Chunk *chunks, *host_chunks;
    int num_chunks;
    float *squares, *host_squares;     // (num_chunks)
    Network<float> fp32_net;     // one of the two is in use
    Network<bf16> bf16_net;
    float *rope_table, *final_rstd, *losses, *delta, *partial, *doutput;  // doutput (V,C)
    Pack<double, 2> *moments;
    int *tokens, *targets, *positions, *starts;  // (B,T) three times, (V+1)
    int *host_order;             // (B,T) and (V+1): positions and starts
    float *host_losses, *host_logits;  // (B,T), (2V): as floats, as they were
    size_t bytes;                // on the GPU, all together
    void **pieces;               // all GPU memory, to be freed
    int num_pieces, planning;    // planning: take() only counts
    int learning, differentiated;  // between zero_gradients() and model_update(); output_forward()
};

// GPU memory for n numbers, or only its count while planning.
template <class number> static void take(Model *m, number **place, size_t n) {
    size_t bytes = (n * sizeof(number) + 255) / 256 * 256;
    if (m->planning) {
        m->bytes += bytes, *place = NULL;
        return;
    }
    CUDA_CHECK(cudaMalloc((void **)place, bytes));
    m->pieces[m->num_pieces++] = *place;
}

// Where the tensor of this kind in layer l (-1 for those of no layer) begins in m->p, m->d and the
// network's weights.
enum { KINDS = OUTPUT + 1 };
static size_t &offset_of(const Model *m, int kind, int l) {
    return m->offsets[(l + 1) * KINDS + kind];
}

// Decides where each tensor lies on the GPU: at multiples of 256 bytes in bf16 too, but wk, wv and
// w3 right behind the matrices before them, with which they are multiplied at once. Cuts all into
// chunks, which are written to m->host_chunks if that is not NULL.
static void lay_out(Model *m) {
    m->room = 0;
    m->num_chunks = 0;
    for (const Tensor *t = m->list.tensors; t < m->list.tensors + m->list.count; t++) {
        size_t rows = t->rows, cols = imax(t->cols, 1);
        int follows = t->kind == WK || t->kind == WV || t->kind == W3;
        if (t->kind == W1 || t->kind == W3) rows = m->H;
        if (t->kind == W2) cols = m->H;
        if (t->kind == OUTPUT) rows = m->V;
        if (!follows) m->room = (m->room + 127) / 128 * 128;
        offset_of(m, t->kind, t->layer) = m->room;
        for (size_t at = 0; at < rows * cols; at += CHUNK) {
            size_t left = rows * cols - at;
            int size = (int)(left < CHUNK ? left : (size_t)CHUNK);
            Chunk chunk = {m->room + at, size, t->kind, t->layer, t->cols > 0};
            if (m->host_chunks) m->host_chunks[m->num_chunks] = chunk;
            m->num_chunks++;
        }
        m->room += rows * cols;
    }
}

// The activations of N = B T tokens. Without a backward pass, or with --recompute, all layers share
// those of inner_forward().
template <class real>
static void create_sublayers(Model *m, Network<real> *net, size_t N, int training) {
    const Config *c = &m->config;
    size_t C = c->C, H = m->H;
    real *x = net->embedded;
    for (int s = 0; s < 2 * c->L; s++) {
        Sublayer<real> *a = &net->sublayers[s];
        int norm_last = norm_comes_last(c, s / 2), attention = s % 2 == 0;
        a->inp = a->normed = x;
        if (!norm_last) take(m, &a->normed, N * C);
        take(m, &a->rstd, N);
        if (attention) take(m, &a->lse, N * c->NH);
        if (s >= 2 && (m->o->recompute || !training)) {
            a->qkv = a[-2].qkv, a->pre_act = a[-2].pre_act, a->inner = a[-2].inner;
        } else {
            if (attention) take(m, &a->qkv, 3 * N * C);
            else take(m, &a->pre_act, 2 * N * H);
            take(m, &a->inner, N * (attention ? C : H));
        }
        a->branch = net->branches;
        if (has_post_norm(c)) {
            take(m, &a->branch, N * C);
            take(m, &a->post_rstd, N);
        }
        take(m, &a->out, N * C);
        a->sum = a->out;
        if (norm_last) take(m, &a->sum, N * C);
        x = a->out;
    }
}

// The logits of N tokens would be the largest array of all. They are made, turned into losses and
// gradients and left behind for this many tokens at a time. (64: so parts begin at 256 bytes.)
static int logit_rows(int N) { return imin(N, ((N + 3) / 4 + 63) / 64 * 64); }

// All GPU memory: called twice, to count it and to have it.
template <class real>
static void create_network(Model *m, Network<real> *net, int B, int training) {
    const Config *c = &m->config;
    size_t T = c->T, C = c->C, H = m->H, N = B * T;
    take(m, &m->p, m->room);
    net->weights = (real *)m->p;
    if (sizeof(real) < sizeof(float)) take(m, &net->weights, m->room);
    take(m, &net->embedded, N * C), take(m, &net->branches, N * C), take(m, &net->scratch, N * C);
    create_sublayers(m, net, N, training);
    take(m, &net->final_normed, N * C), take(m, &m->final_rstd, N);
    take(m, &net->logits, (size_t)logit_rows(N) * m->V), take(m, &m->losses, N);
    take(m, &m->rope_table, T * (C / c->NH));
    take(m, &m->moments, MOMENT_BLOCKS), take(m, &m->tokens, N), take(m, &m->targets, N);
    if (!training) return;
    take(m, &m->d, m->room), take(m, &m->m, m->room), take(m, &m->v, m->room);
    take(m, &m->chunks, m->num_chunks), take(m, &m->squares, m->num_chunks);
    take(m, &net->dx, N * C), take(m, &net->dinp, N * C), take(m, &m->doutput, m->V * C);
    take(m, &net->dinner, N * (C > H ? C : H));
    take(m, &net->dwide, N * (3 * C > 2 * H ? 3 * C : 2 * H));
    take(m, &m->delta, N * c->NH);
    take(m, &m->partial, (size_t)ROW_BLOCKS * (C + 1));
    take(m, &m->positions, N);
    take(m, &m->starts, c->V + 1);
}

static void create_memory(Model *m, int B, int training) {
    if (m->in_bf16) create_network(m, &m->bf16_net, B, training);
    else create_network(m, &m->fp32_net, B, training);
}

// The first CUDA device, cuBLASLt and its workspace: once in a program.
static void open_device(void) {
    int devices = 0;
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0)
        die("no CUDA device (%s); ./train_gpas trains on the CPU",
            error != cudaSuccess ? cudaGetErrorString(error) : "none is there");
    if (cublaslt) return;
    cudaDeviceProp device;
    CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
    if (device.major < 8)
        die("%s has compute capability %d.%d; 8.0 or newer is needed", device.name, device.major,
            device.minor);
    CUDA_CHECK(cudaSetDevice(0));
    CUBLAS_CHECK(cublasLtCreate(&cublaslt));
    CUDA_CHECK(cudaMalloc(&workspace, WORKSPACE));
}

enum { SPARE = 1 << 30 };  // bytes left to CUDA and cuBLASLt, which load kernels at their first use

// Exits if the GPU's kernels cannot compute this network.
static void check_network(const Config *c) {
    if (c->C / c->NH > MAX_HEAD)
        die("--channels %d divided by --heads %d is more than %d, the widest head on the GPU", c->C,
            c->NH, MAX_HEAD);
    if (c->gpas && c->gate_train && gate_value((float)c->gate_init, c->gate_activation) == 1)
        die("--gate-init %g makes 1 - a(g) exactly 0, by which the GPU divides; make it %g",
            c->gate_init, c->gate_init * 0.999);
    if (c->C > MAX_CHANNELS)
        die("--channels %d is more than %d, the most on the GPU", c->C, MAX_CHANNELS);
}

void model_create(Model *m, const Options *o, int B, int training) {
    memset(m, 0, sizeof *m);
    m->o = o;
    m->config = config_of(o);
    m->in_bf16 = o->dtype == DTYPE_BF16;
    const Config *c = &m->config;
    size_t N = (size_t)B * c->T, angles = (size_t)c->T * (c->C / c->NH), free_bytes, total_bytes;
    m->H = (c->H + 7) / 8 * 8;
    m->V = (c->V + 7) / 8 * 8;
    check_network(c);
    open_device();
    m->list = tensor_list(c);
    m->offsets = (size_t *)allocate((c->L + 1) * KINDS, sizeof(size_t));
    lay_out(m);  // counts the chunks
    m->host_chunks = (Chunk *)allocate(m->num_chunks, sizeof(Chunk));
    lay_out(m);  // writes them
    m->bf16_net.sublayers = (Sublayer<bf16> *)allocate(2 * c->L, sizeof(Sublayer<bf16>));
    m->fp32_net.sublayers = (Sublayer<float> *)allocate(2 * c->L, sizeof(Sublayer<float>));
    m->pieces = (void **)allocate(40 + 20 * c->L, sizeof(void *));
    m->planning = 1;
    create_memory(m, B, training);
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    size_t needed = m->bytes + SPARE;
    if (needed > free_bytes)
        die("not enough GPU memory: %zu MiB needed, %zu of %zu MiB free; lower --batch or "
            "--seq-len%s", needed >> 20, free_bytes >> 20, total_bytes >> 20,
            o->recompute || !training ? "" : ", or try --recompute on");
    m->planning = 0;
    create_memory(m, B, training);
    m->host_order = (int *)allocate(N + c->V + 1, sizeof(int));
    m->host_losses = (float *)allocate(N, sizeof(float));
    m->host_logits = (float *)allocate(2 * m->V, sizeof(float));
    m->host_squares = (float *)allocate(m->num_chunks, sizeof(float));
    float *table = (float *)allocate(angles, sizeof(float));
    rope_angles(table, c->T, c->C / c->NH);
    CUDA_CHECK(cudaMemcpy(m->rope_table, table, angles * sizeof(float), cudaMemcpyHostToDevice));
    free(table);
    CUDA_CHECK(cudaMemset(m->p, 0, m->room * sizeof(float)));
    if (training) {
        CUDA_CHECK(cudaMemset(m->m, 0, m->room * sizeof(float)));
        CUDA_CHECK(cudaMemset(m->v, 0, m->room * sizeof(float)));
        CUDA_CHECK(cudaMemcpy(m->chunks, m->host_chunks, m->num_chunks * sizeof(Chunk),
                              cudaMemcpyHostToDevice));
        zero_gradients(m);
    }
    m->parameters = (float *)allocate(m->list.size, sizeof(float));
    if (!*o->load && !*o->resume) initialize_parameters(m->parameters, &m->list, o->seed);
    model_restore(m);
}

void model_free(Model *m) {
    void *on_host[] = {
        m->parameters, m->gradients, m->adam_m, m->adam_v, m->list.tensors, m->offsets,
        m->host_chunks, m->host_squares, m->bf16_net.sublayers, m->fp32_net.sublayers, m->pieces,
        m->host_order, m->host_losses, m->host_logits,
    };
    while (m->num_pieces) CUDA_CHECK(cudaFree(m->pieces[--m->num_pieces]));
    for (void *memory : on_host) free(memory);
}

void model_device(const Model *m, char *text) {
    cudaDeviceProp device;
    CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
    snprintf(text, TEXT_SIZE, "%s, %zu MiB of its memory", device.name, m->bytes >> 20);
}

// Copies all tensors between a block on the host, laid out as in the files, and one on the GPU.
static void move_tensors(const Model *m, float *host, float *device, int to_device) {
    for (const Tensor *t = m->list.tensors; t < m->list.tensors + m->list.count; t++) {
        size_t rows = t->cols ? t->rows : 1, width = (t->cols ? t->cols : t->rows) * sizeof(float);
        size_t pitch = t->kind == W2 ? m->H * sizeof(float) : width;
        float *here = host + t->offset, *there = device + offset_of(m, t->kind, t->layer);
        float *to = to_device ? there : here, *from = to_device ? here : there;
        cudaMemcpyKind kind = to_device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
        if (pitch == width) CUDA_CHECK(cudaMemcpy(to, from, rows * width, kind));
        else
            CUDA_CHECK(cudaMemcpy2D(to, to_device ? pitch : width, from, to_device ? width : pitch,
                                    width, rows, kind));
    }
}

static void download(const Model *m, float **host, float *device) {
    if (!device) return;
    if (!*host) *host = (float *)allocate(m->list.size, sizeof(float));
    move_tensors(m, *host, device, 0);
}

Snapshot model_snapshot(Model *m) {
    download(m, &m->parameters, m->p);
    download(m, &m->gradients, m->d);
    download(m, &m->adam_m, m->m);
    download(m, &m->adam_v, m->v);
    Snapshot s = {m->o, m->list, m->parameters, m->gradients, m->adam_m, m->adam_v};
    return s;
}

void model_restore(Model *m) {
    move_tensors(m, m->parameters, m->p, 1);
    if (m->adam_m) {
        move_tensors(m, m->adam_m, m->m, 1);
        move_tensors(m, m->adam_v, m->v, 1);
    }
    if (m->in_bf16) scaled(m->bf16_net.weights, m->p, 1, 0, m->room);
}

// The parameters of layer l in `block`: m->p, m->d or the network's weights.
template <class number> struct Layer {
    number *wqkv, *wo, *w13, *w2;     // (3C,C), (C,C), (2H,C), (C,H)
    number *norm[2], *post_norm[2];   // (C)
    number *gate;                     // (1)
};

template <class number> static Layer<number> layer_at(const Model *m, number *block, int l) {
    auto at = [&](int kind) { return block + offset_of(m, kind, l); };
    Layer<number> w = {at(WQ), at(WO), at(W1), at(W2), {}, {}, NULL};
    w.norm[0] = at(ATTENTION_NORM);
    w.norm[1] = at(FFN_NORM);
    if (has_post_norm(&m->config)) {
        w.post_norm[0] = at(ATTENTION_POST_NORM);
        w.post_norm[1] = at(FFN_POST_NORM);
    }
    if (m->config.gpas) w.gate = at(GATE);
    return w;
}

static Gpas gpas_of(const Model *m, int l) {
    const Config *c = &m->config;
    Gpas g = {layer_at(m, m->p, l).gate, c->gate_activation, c->stop_grad, norm_comes_last(c, l),
              shortcut_scale(c)};
    return g;
}

static const Gpas no_gpas = {NULL, 0, 1, 0, 1};

// RMSNorm by itself.
template <class real>
static void rmsnorm_forward(real *out, float *rstd, const real *inp, const float *weight, int N,
                            int C) {
    residual_gpas_rmsnorm_forward<real>(NULL, NULL, out, rstd, inp, NULL, weight, no_gpas, N, C);
}

// dinp = dnext + the gradient that comes back through the norm. dnext NULL: 0.
template <class real>
static void rmsnorm_backward(real *dinp, float *dweight, float *partial, const real *dnext,
                             const real *dout, const real *inp, const float *weight,
                             const float *rstd, int N, int C) {
    residual_gpas_rmsnorm_backward<real>(dinp, NULL, dweight, NULL, partial, dnext, dout, inp, rstd,
                                         weight, NULL, no_gpas, N, C);
}

// The branch of sublayer s but for its last matrix: a->inner from a->normed.
template <class real>
static void inner_forward(const Model *m, const Network<real> *net, int s, int B, int T) {
    int C = m->config.C, H = m->H, NH = m->config.NH, N = B * T;
    const Sublayer<real> *a = &net->sublayers[s];
    Layer<real> w = layer_at(m, net->weights, s / 2);
    if (s % 2 == 0) {
        matmul_forward(a->qkv, a->normed, w.wqkv, N, C, 3 * C);
        rope_forward(a->qkv, m->rope_table, B, T, C, C / NH);
        attention_forward(a->inner, a->lse, a->qkv, B, T, C, NH);
    } else {
        matmul_forward(a->pre_act, a->normed, w.w13, N, C, 2 * H);
        swiglu_forward(a->inner, a->pre_act, N, H);
    }
}

// The branch f: a->branch = f(a->normed).
template <class real>
static void branch_forward(const Model *m, const Network<real> *net, int s, int B, int T) {
    int C = m->config.C, N = B * T;
    const Sublayer<real> *a = &net->sublayers[s];
    Layer<real> w = layer_at(m, net->weights, s / 2);
    inner_forward(m, net, s, B, T);
    if (s % 2 == 0) matmul_forward(a->branch, a->inner, w.wo, N, C, C);
    else matmul_forward(a->branch, a->inner, w.w2, N, m->H, C);
}

// Given dout (B,T,C), the gradient of the branch's output, leaves that of its input in net->dinp.
// With --recompute what inner_forward() wrote is there for the last layer only.
template <class real>
static void branch_backward(const Model *m, const Network<real> *net, const real *dout, int s,
                            int B, int T) {
    int C = m->config.C, H = m->H, NH = m->config.NH, N = B * T;
    const Sublayer<real> *a = &net->sublayers[s];
    Layer<real> w = layer_at(m, net->weights, s / 2);
    Layer<float> d = layer_at(m, m->d, s / 2);
    if (m->o->recompute && s < 2 * m->config.L - 2) inner_forward(m, net, s, B, T);
    if (s % 2 == 0) {
        matmul_backward(net->dinner, d.wo, dout, a->inner, w.wo, N, C, C);
        attention_backward(net->dwide, m->delta, net->dinner, a->inner, a->lse, a->qkv, B, T, C,
                           NH);
        rope_backward(net->dwide, m->rope_table, B, T, C, C / NH);
        matmul_backward(net->dinp, d.wqkv, net->dwide, a->normed, w.wqkv, N, C, 3 * C);
    } else {
        matmul_backward(net->dinner, d.w2, dout, a->inner, w.w2, N, H, C);
        swiglu_backward(net->dwide, net->dinner, a->pre_act, N, H);
        matmul_backward(net->dinp, d.w13, net->dwide, a->normed, w.w13, N, C, 2 * H);
    }
}

/*
The twelve networks are those of train_gpas.c:

    pre, lns, sandwich    x = [G](x + f(N x))             norm first; sandwich: N' f(N x)
    post, deepnorm        x = N(A [G]x + f(x))            norm last
    mix                   the first L/4 layers norm last, the others norm first

A fused kernel reaches from the end of one branch to the beginning of the next. So norm first, a
sublayer ends with the norm that the next one, or the output, begins with: norm_before(s + 1).
A norm by itself is left only where no norm-first sublayer comes before: norm_by_itself(s).
*/
template <class real> struct Norm {
    real *normed;      // (B,T,C)
    float *rstd;       // (B,T)
    size_t weight;     // its offset in m->p and m->d
};

// The norm at the beginning of sublayer s; the final norm for s = 2L.
template <class real>
static Norm<real> norm_before(const Model *m, const Network<real> *net, int s) {
    if (s == 2 * m->config.L) {
        Norm<real> norm = {net->final_normed, m->final_rstd, offset_of(m, FINAL_NORM, -1)};
        return norm;
    }
    const Sublayer<real> *a = &net->sublayers[s];
    Norm<real> norm = {a->normed, a->rstd, (size_t)(layer_at(m, m->p, s / 2).norm[s % 2] - m->p)};
    return norm;
}

// Does sublayer s, or the output matrix for s = 2L, begin with a norm that no sublayer computed?
static int norm_by_itself(const Model *m, int s) {
    int first = s == 2 * m->config.L || !norm_comes_last(&m->config, s / 2);
    return first && (s == 0 || norm_comes_last(&m->config, (s - 1) / 2));
}

template <class real>
static void sublayer_forward(const Model *m, const Network<real> *net, int s, int B, int T) {
    int C = m->config.C, N = B * T;
    const Sublayer<real> *a = &net->sublayers[s];
    Layer<float> p = layer_at(m, m->p, s / 2);
    Gpas g = gpas_of(m, s / 2);
    const real *branch = a->branch;
    branch_forward(m, net, s, B, T);
    if (has_post_norm(&m->config)) {
        rmsnorm_forward(net->scratch, a->post_rstd, a->branch, p.post_norm[s % 2], N, C);
        branch = net->scratch;
    }
    if (g.norm_last) {
        residual_gpas_rmsnorm_forward<real>(a->sum, NULL, a->out, a->rstd, a->inp, branch,
                                            p.norm[s % 2], g, N, C);
    } else {
        Norm<real> next = norm_before(m, net, s + 1);
        residual_gpas_rmsnorm_forward<real>(NULL, a->out, next.normed, next.rstd, a->inp, branch,
                                            m->p + next.weight, g, N, C);
    }
}

// The same steps backwards. dnext, dnormed: the gradients of the sublayer's output that come down
// the shortcut and out of the next branch, before the norm where there is one; NULL: 0. Leaves
// those of its input in net->dx, along the shortcut, and in net->dinp, of the branch's input.
template <class real>
static void sublayer_backward(const Model *m, const Network<real> *net, const real *dnext,
                              const real *dnormed, int s, int B, int T) {
    int C = m->config.C, N = B * T;
    const Sublayer<real> *a = &net->sublayers[s];
    Layer<float> p = layer_at(m, m->p, s / 2), d = layer_at(m, m->d, s / 2);
    Gpas g = gpas_of(m, s / 2);
    float *dgate = m->config.gate_train ? d.gate : NULL;
    real *dbranch = net->dx;
    if (g.norm_last) {
        dbranch = net->scratch;
        residual_gpas_rmsnorm_backward<real>(dbranch, net->dx, d.norm[s % 2], dgate, m->partial,
                                             dnext, dnormed, a->sum, a->rstd, p.norm[s % 2], a->inp,
                                             g, N, C);
    } else {
        Norm<real> next = norm_before(m, net, s + 1);
        residual_gpas_rmsnorm_backward<real>(net->dx, NULL, m->d + next.weight, dgate, m->partial,
                                             dnext, dnormed, a->out, next.rstd, m->p + next.weight,
                                             a->out, g, N, C);
    }
    if (has_post_norm(&m->config)) {
        dbranch = net->scratch;
        rmsnorm_backward<real>(dbranch, d.post_norm[s % 2], m->partial, NULL, net->dx, a->branch,
                               p.post_norm[s % 2], a->post_rstd, N, C);
    }
    branch_backward(m, net, dbranch, s, B, T);
}

// Sublayers and final norm of tokens (B,T) on the GPU.
template <class real>
static void network_forward(const Model *m, const Network<real> *net, int B, int T) {
    int C = m->config.C, end = 2 * m->config.L, N = B * T;
    embedding_forward(net->embedded, m->tokens, m->p, N, C);
    for (int s = 0; s <= end; s++) {
        Norm<real> norm = norm_before(m, net, s);
        const real *x = s ? net->sublayers[s - 1].out : net->embedded;
        if (norm_by_itself(m, s))
            rmsnorm_forward(norm.normed, norm.rstd, x, m->p + norm.weight, N, C);
        if (s < end) sublayer_forward(m, net, s, B, T);
    }
}

// The losses of N tokens, part by part, so that there are never the logits of all. While those of a
// part are there, all that is wanted of them must be made: so with `differentiate` the way back
// through the output matrix begins here, for losses of gradient 1: the real one comes later. It
// leaves the gradient of final_normed in net->dinp and that of the output matrix in doutput.
template <class real>
static void output_forward(Model *m, const Network<real> *net, int N, int differentiate) {
    int C = m->config.C, V = m->config.V, rows = logit_rows(N);
    const real *output = net->weights + offset_of(m, OUTPUT, -1);
    if (differentiate) CUDA_CHECK(cudaMemset(m->doutput, 0, (size_t)m->V * C * sizeof(float)));
    for (int n = 0; n < N; n += rows) {
        int part = imin(rows, N - n);
        const real *x = net->final_normed + (size_t)n * C;
        matmul_forward(net->logits, x, output, part, C, m->V);
        crossentropy<real>(m->losses + n, NULL, differentiate ? net->logits : NULL, net->logits,
                           m->targets + n, 1, part, V, m->V);
        if (differentiate)
            matmul_backward(net->dinp + (size_t)n * C, m->doutput, net->logits, x, output, part, C,
                            m->V);
    }
    m->differentiated = differentiate;
}

// From scale times what output_forward() has left back to the embedding. Two gradients of a
// sublayer's output are on their way: dnext down the shortcut, dnormed out of the branch above. A
// norm by itself makes one of them.
template <class real>
static void network_backward(Model *m, const Network<real> *net, float scale, int B, int T) {
    int C = m->config.C, V = m->config.V, end = 2 * m->config.L, N = B * T;
    const real *dnext = NULL, *dnormed = net->dinp;
    if (!m->differentiated) output_forward(m, net, N, 1);
    m->differentiated = 0;  // dinp is about to change
    scaled(net->dinp, net->dinp, scale, 0, (size_t)N * C);
    scaled(m->d + offset_of(m, OUTPUT, -1), m->doutput, scale, 1, (size_t)m->V * C);
    for (int s = end; s >= 0; s--) {
        if (s < end) {
            sublayer_backward(m, net, dnext, dnormed, s, B, T);
            dnext = net->dx, dnormed = net->dinp;
        }
        if (norm_by_itself(m, s)) {
            Norm<real> norm = norm_before(m, net, s);
            const real *x = s ? net->sublayers[s - 1].out : net->embedded;
            rmsnorm_backward(net->dx, m->d + norm.weight, m->partial, dnext, dnormed, x,
                             m->p + norm.weight, norm.rstd, N, C);
            dnext = NULL, dnormed = net->dx;
        }
    }
    if (dnext)  // norm last, x went into the shortcut and the branch as it was
        residual_gpas_rmsnorm_backward<real>(net->dx, NULL, NULL, NULL, m->partial, dnext, dnormed,
                                             NULL, NULL, NULL, NULL, no_gpas, N, C);
    embedding_backward(m->d, net->dx, m->positions, m->starts, V, C);
}

// The positions 0 .. N-1 sorted by their token, those of one token in order, by counting. positions
// (N); starts (V+1): where each token's positions begin.
static void sort_by_token(int *positions, int *starts, const int *tokens, int N, int V) {
    memset(starts, 0, (V + 1) * sizeof(int));
    for (int n = 0; n < N; n++) starts[tokens[n] + 1]++;
    for (int v = 0; v < V; v++) starts[v + 1] += starts[v];
    for (int n = 0; n < N; n++) positions[starts[tokens[n]]++] = n;
    memmove(starts + 1, starts, V * sizeof(int));  // each start has moved to the next one's place
    starts[0] = 0;
}

// What the host has to do, it does while the GPU computes, before it fetches the losses.
double model_forward(Model *m, const int *tokens, const int *targets, int B, int T) {
    int N = B * T, *positions = m->host_order;
    double sum = 0;
    CUDA_CHECK(cudaMemcpy(m->tokens, tokens, N * sizeof(int), cudaMemcpyHostToDevice));
    if (targets)
        CUDA_CHECK(cudaMemcpy(m->targets, targets, N * sizeof(int), cudaMemcpyHostToDevice));
    if (m->in_bf16) network_forward(m, &m->bf16_net, B, T);
    else network_forward(m, &m->fp32_net, B, T);
    m->differentiated = 0;
    if (!targets) return 0;
    if (m->in_bf16) output_forward(m, &m->bf16_net, N, m->learning);
    else output_forward(m, &m->fp32_net, N, m->learning);
    sort_by_token(positions, positions + N, tokens, N, m->config.V);
    CUDA_CHECK(cudaMemcpy(m->host_losses, m->losses, N * sizeof(float), cudaMemcpyDeviceToHost));
    for (int n = 0; n < N; n++) sum += m->host_losses[n];
    return sum / N;
}

// There is no cache of keys and values on the GPU, so the whole sequence is computed each time.
double model_extend(Model *m, const int *tokens, const int *targets, int first, int T) {
    double sum = 0;
    model_forward(m, tokens, targets, 1, T);
    if (!targets) return 0;
    for (int t = first; t < T; t++) sum += m->host_losses[t];
    return sum / (T - first);
}

// It needs no tokens and targets: model_forward() has sorted the tokens' positions, and the targets
// are still on the GPU.
void model_backward(Model *m, const int *, const int *, int B, int T, double scale) {
    int N = B * T, V = m->config.V, *positions = m->host_order, *starts = positions + N;
    CUDA_CHECK(cudaMemcpy(m->positions, positions, N * sizeof(int), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(m->starts, starts, (V + 1) * sizeof(int), cudaMemcpyHostToDevice));
    if (m->in_bf16) network_backward(m, &m->bf16_net, (float)scale, B, T);
    else network_backward(m, &m->fp32_net, (float)scale, B, T);
}

// Computes the logits (V) of row n of the last model_forward() and copies them to the host. Few are
// needed, so they are computed here and not in model_forward(). The row goes to net->scratch first,
// whose alignment suits cuBLASLt.
template <class real> static void logits_of(Model *m, const Network<real> *net, int n) {
    int C = m->config.C;
    real *raw = (real *)(m->host_logits + m->V);
    CUDA_CHECK(cudaMemcpy(net->scratch, net->final_normed + (size_t)n * C, C * sizeof(real),
                          cudaMemcpyDeviceToDevice));
    matmul_forward(net->logits, net->scratch, net->weights + offset_of(m, OUTPUT, -1), 1, C, m->V);
    CUDA_CHECK(cudaMemcpy(raw, net->logits, m->V * sizeof(real), cudaMemcpyDeviceToHost));
    for (int v = 0; v < m->V; v++) m->host_logits[v] = (float)raw[v];
}

const float *model_logits(Model *m, int n) {
    if (m->in_bf16) logits_of(m, &m->bf16_net, n);
    else logits_of(m, &m->fp32_net, n);
    return m->host_logits;
}

void zero_gradients(Model *m) {
    CUDA_CHECK(cudaMemset(m->d, 0, m->room * sizeof(float)));
    m->learning = 1;
}

double gradient_norms(Model *m, double *layers, double *gates) {
    double sum = 0;
    squares_kernel<<<m->num_chunks, 256>>>(m->squares, m->d, m->chunks);
    LAUNCH_CHECK();
    CUDA_CHECK(cudaMemcpy(m->host_squares, m->squares, m->num_chunks * sizeof(float),
                          cudaMemcpyDeviceToHost));
    memset(layers, 0, m->config.L * sizeof *layers);
    *gates = 0;
    for (int i = 0; i < m->num_chunks; i++) {
        const Chunk *chunk = &m->host_chunks[i];
        double square = m->host_squares[i];
        sum += square;
        if (chunk->layer >= 0) layers[chunk->layer] += square;
        if (chunk->kind == GATE) *gates += square;
    }
    for (int l = 0; l < m->config.L; l++) layers[l] = sqrt(layers[l]);
    *gates = sqrt(*gates);
    return sqrt(sum);
}

void model_update(Model *m, int t, double norm, double gate_norm) {
    const Options *o = m->o;
    double clip, gate_clip;
    clip_factors(o, norm, gate_norm, &clip, &gate_clip);
    m->learning = 0;
    AdamW a = {(float)learning_rate(o, t), 0.9f, 0.999f, 1e-8f, (float)o->weight_decay, (float)clip,
               (float)gate_clip, 0, 0, m->config.gate_train};
    if (m->in_bf16)
        adamw_update(m->bf16_net.weights, m->p, m->d, m->m, m->v, m->chunks, m->num_chunks, a,
                     t + 1);
    else
        adamw_update(m->fp32_net.weights, m->p, m->d, m->m, m->v, m->chunks, m->num_chunks, a,
                     t + 1);
}

template <class real> static double variance(const Model *m, const real *x, size_t n) {
    Pack<double, 2> sums[MOMENT_BLOCKS];
    double sum = 0, square = 0;
    moments_kernel<real><<<MOMENT_BLOCKS, 256>>>(m->moments, x, n);
    LAUNCH_CHECK();
    CUDA_CHECK(cudaMemcpy(sums, m->moments, sizeof sums, cudaMemcpyDeviceToHost));
    for (int i = 0; i < MOMENT_BLOCKS; i++) sum += sums[i].x[0], square += sums[i].x[1];
    return square / n - sum / n * (sum / n);
}

void layer_state(Model *m, int l, int B, int T, double variances[2], double *gate) {
    size_t n = (size_t)B * T * m->config.C;
    const float *g = layer_at(m, m->p, l).gate;
    float value = NAN;
    for (int s = 0; s < 2; s++)
        variances[s] = m->in_bf16 ? variance(m, m->bf16_net.sublayers[2 * l + s].out, n)
                               : variance(m, m->fp32_net.sublayers[2 * l + s].out, n);
    if (g) CUDA_CHECK(cudaMemcpy(&value, g, sizeof value, cudaMemcpyDeviceToHost));
    *gate = value;
}

/* ------------------------------------------------------------------------------------------------
5. Training
*/

const char program[] = "train_gpas_cuda", default_dtype[] = "bf16";
const int on_gpu = 1;

// One step: the gradient of the mean loss over --total-batch sequences, one micro-batch of --batch
// after the other, then an AdamW update. Returns the loss; *norm is the gradient's norm before
// clipping.
static double train_step(Run *run, double *norm) {
    const Options *o = run->o;
    Model *m = run->model;
    int B = o->batch, T = o->seq_len, micro_batches = o->total_batch / B;
    double loss = 0, gate_norm;
    current_step = run->progress.step + 1;
    zero_gradients(m);
    for (int i = 0; i < micro_batches; i++) {
        dataloader_batch(&run->train, run->progress.position, B, run->tokens, run->targets);
        loss += model_forward(m, run->tokens, run->targets, B, T) / micro_batches;
        if (!isfinite(loss)) stop_not_finite(run, loss);
        model_backward(m, run->tokens, run->targets, B, T, 1.0 / ((double)o->total_batch * T));
        run->progress.position += B;
    }
    *norm = gradient_norms(m, run->layer_norms, &gate_norm);
    if (!isfinite(*norm)) stop_not_finite(run, loss);
    model_update(m, run->progress.step, *norm, gate_norm);
    run->progress.step++;
    return loss;
}

static void train(Run *run) {
    const Options *o = run->o;
    print_configuration(run);
    catch_signals();
    if (run->progress.step == 0) {
        double val = validate(run);
        printf("step 0/%d  val %.4f\n", o->steps, val);
        fflush(stdout);
        log_step(run, NAN, val, NAN, NAN, NAN);
        log_layers(run);
    }
    run->start_time = omp_get_wtime();
    do {
        double norm, val = NAN, lr = learning_rate(o, run->progress.step), start = omp_get_wtime();
        double loss = train_step(run, &norm), ms = 1000 * (omp_get_wtime() - start);
        int step = run->progress.step, last = step == o->steps;
        if (last || (o->val_every && step % o->val_every == 0)) {
            val = validate(run);
            if (!isfinite(val)) stop_not_finite(run, val);
            log_layers(run);
        }
        log_step(run, loss, val, lr, norm, ms);
        report(run, loss, val, lr, norm, ms);
        if (last || (o->sample_every && step % o->sample_every == 0)) sample(run);
        if (last || stop_signal || (o->save_every && step % o->save_every == 0)) save(run);
    } while (run->progress.step < o->steps && !stop_signal);
    if (run->progress.step < o->steps)
        printf("\nStopped. ./%s --resume %s/ckpt_%06d.safetensors continues.\n", program, o->out,
               run->progress.step);
    else printf("Logs, stories and checkpoints are in %s.\n", o->out);
}

#ifndef TRAIN_GPAS_NO_MAIN
int main(int argc, char **argv) {
    static Options options;
    static Model model;
    static Run run;
    let_waiting_threads_sleep(argv);
    parse_options(&options, argc, argv);
    open_run(&run, &model, &options);
    if (evaluates(&options)) {
        evaluate(&run);
    } else if (*options.dump_grads) {
        dump_gradients(&run);
    } else if (options.steps > 0) {
        open_logs(&run);
        train(&run);
    } else {
        if (!*options.load && !*options.resume)
            fprintf(stderr, "%s: without --load an untrained network tells the story\n", program);
        tell_story(&model, &options, &run.tokenizer, &run.progress.rng_state, stdout);
    }
    close_run(&run);
    return stop_signal ? 128 + stop_signal : 0;
}
#endif
