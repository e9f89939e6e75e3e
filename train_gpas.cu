/*
train_gpas.cu: the training of train_gpas.c on one GPU.

Read train_gpas.c first: it explains what GPAS is and derives every backward pass. This file has the
same sections and, with few exceptions, the same functions. It shows how a GPU computes them. Its
comments give the formulas without the derivation. In short, GPAS scales the residual stream by a
learned factor in the forward pass, and lets the gradient pass unscaled:

    y = (1 - a(g)) x      dx = dy      dg = -a'(g) sum_i x_i dy_i

Contents: 1 GPAS. 2 The other operations. 3 The model. 4 AdamW. 5 Training. The headers in dev/gpu/
support the kernels. The headers that this file includes from dev/ are shared with train_gpas.c.

A GPU in ten lines. The host, which is the CPU, launches kernel<<<blocks, threads>>>(...): the GPU
runs this function once for every thread of every block of the grid, and blockIdx and threadIdx tell
a thread which one it is. The threads of a block run on the same processor of the GPU (an H100 has
132). They share up to 48 KiB of fast memory, declared __shared__, and wait for each other at
__syncthreads(). Blocks run in any order and cannot wait for each other. 32 neighbouring threads,
called lanes, form a warp and execute the same instruction together. When they load neighbouring
numbers, memory delivers all of them in one wide access. That matters because most kernels do little
arithmetic and mostly wait for memory. A shuffle instruction lets lanes read each other's variables.
A thread keeps its own variables in registers, of which it has up to 255. A tensor core multiplies
small matrices that the lanes of a warp hold.

A launch returns at once, and the GPU runs the kernels in the order of their launches. Pointers are
to the GPU's memory unless a comment says `host`.

Numbers. `real`, a template parameter, is float (--dtype fp32) or bf16 (--dtype bf16, the default):
the type of activations, of their gradients, and of the matrices in products. Kernels load `real`,
compute in float, and round to the nearest `real` when they store. The following are always float:
the parameters that AdamW updates (in bf16 the matrix products use a rounded copy), gradients of
parameters, Adam's moments, and sums. In fp32 the inputs of products are not rounded to TF32.

The same options give the same bits in every run on the same GPU. Atomic additions would not,
because their order changes. Therefore a sum over the whole grid takes two stages: each block writes
its part, and a second kernel adds the parts in order.

Without a GPU the same source runs on the CPU, slowly, through dev/gpu/cuda_on_cpu.h.
*/
#include "dev/gpu/device.h"    // defines: bf16, CUDA_CHECK, new_array, load, store, with_width, ...
#include "dev/gpu/cublaslt.h"  // defines: gemm
#include "dev/gpu/layout.h"    // defines: Layout, Chunk, lay_out, offset_of, copy_tensors
#include "dev/gpu/segments.h"  // defines: Occurrences, Segment, sort_by_token, ...
#include "dev/gpu/tiles.h"     // defines: Tile, load_tile, multiply_transposed, multiply_add, ...
#include "dev/gate.h"          // defines: gate_value, gate_slope, which are a(g) and a'(g)
#include "dev/parameters.h"    // defines: Config, norm_comes_last, TensorList, rope_angles, ...
#include "dev/model.h"         // declares: Model, Snapshot and the functions of a model
#include "dev/schedule.h"      // defines: learning_rate, clip_factors
#include "dev/command_line.h"  // defines: Options, parse_options
#include "dev/run.h"           // defines: Run, open_run, close_run, validate
#include "dev/logs.h"          // defines: open_logs, log_step, report, sample, save, ...
#include "dev/evaluation.h"    // defines: evaluate

/* ------------------------------------------------------------------------------------------------
1. GPAS
*/

// The GPAS of one layer.
typedef struct {
    const float *g;  // (1) the gate, or NULL without GPAS
    int activation;  // which function a() is: GATE_SILU, ...
    int stop_grad;   // 0 leaves out the stop-gradient, for comparison
} Gate;

// Computes y = (1 - a(g)) x in a grid-stride loop: in a grid of K threads, thread i computes
// elements i, i + K, i + 2K, and so on. out, inp (n).
template <class real>
__global__ void gpas_forward_kernel(real *out, const real *inp, Gate gate, size_t n) {
    float scale = 1 - gate_value(*gate.g, gate.activation);
    size_t start = thread_index(), step = grid_threads();
    for (size_t i = start; i < n; i += step) out[i] = scale * (float)inp[i];
}

// Given dy, compute dx, and the first stage of dg.
//   dx = dy, or (1 - a(g)) dy without the stop-gradient
//   dg = -a'(g) sum_i x_i dy_i
// Each block writes its part of the sum to partial (gridDim.x).
// dinp, dout, inp (n); dinp and dout may be the same array.
template <class real>
__global__ void gpas_backward_kernel(real *dinp, float *partial, const real *dout, const real *inp,
                                     Gate gate, size_t n) {
    float scale = gate.stop_grad ? 1 : 1 - gate_value(*gate.g, gate.activation), sum = 0;
    size_t start = thread_index(), step = grid_threads();
    for (size_t i = start; i < n; i += step) {
        float dy = dout[i];
        sum += (float)inp[i] * dy;
        dinp[i] = scale * dy;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// Given partial (count), compute dg: the second stage of the sum, in one block.
//   dg -= a'(g) times the sum of partial
// dgate (1), added to.
__global__ void gpas_add_partial_kernel(float *dgate, const float *partial, int count, Gate gate) {
    float sum = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *dgate -= gate_slope(*gate.g, gate.activation) * sum;
}

enum { MOST_BLOCKS = 2048 };  // for a kernel that loops over numbers or rows

template <class real>
static void gpas_forward(real *out, const real *inp, Gate gate, size_t n) {
    int blocks = imin(blocks_for(n, 256), MOST_BLOCKS);
    gpas_forward_kernel<real><<<blocks, 256>>>(out, inp, gate, n);
    LAUNCH_CHECK();
}

// dgate: one number, added to, or NULL.
template <class real>
static void gpas_backward(real *dinp, float *dgate, const real *dout, const real *inp, Gate gate,
                          size_t n) {
    int blocks = imin(blocks_for(n, 256), MOST_BLOCKS);
    float *partial = scratch(blocks);
    gpas_backward_kernel<real><<<blocks, 256>>>(dinp, partial, dout, inp, gate, n);
    LAUNCH_CHECK();
    if (!dgate) return;
    gpas_add_partial_kernel<<<1, 256>>>(dgate, partial, blocks, gate);
    LAUNCH_CHECK();
}

/* ------------------------------------------------------------------------------------------------
2. The other operations
*/

// Computes y = A x + b, with one thread for each number. out, shortcut, branch (n).
template <class real>
__global__ void residual_forward_kernel(real *out, const real *shortcut, const real *branch,
                                        float A, size_t n) {
    size_t i = thread_index();
    if (i < n) out[i] = A * (float)shortcut[i] + (float)branch[i];
}

template <class real>
static void residual_forward(real *out, const real *shortcut, const real *branch, float A,
                             size_t n) {
    residual_forward_kernel<real><<<blocks_for(n, 256), 256>>>(out, shortcut, branch, A, n);
    LAUNCH_CHECK();
}

// Given dy, compute dx.
//   dx = A dy, and db = dy, for which there is nothing to compute.
// dshortcut, dout (n); they may be the same array.
template <class real>
static void residual_backward(real *dshortcut, const real *dout, float A, size_t n) {
    scale_array(dshortcut, dout, A, 0, n);
}

// Row n of out is row tokens[n] of weight. There is one block for each row, and a thread loads W
// numbers at once: see with_width(). Here W is 4 or 1, in bf16 too, because weight is in float.
// out (N,C); weight (V,C); tokens (N).
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
    with_width<float>(C, [&](auto W) {
        int threads = threads_for(C / W, 256);
        embedding_forward_kernel<real, W><<<N, threads>>>(out, tokens, weight, C);
    });
    LAUNCH_CHECK();
}

// Given dy, compute dw.
//   The gradient of a token's row is the sum of dy over the positions where the token occurs.
// The host has sorted the positions by token, and has cut those of each token into segments. Each
// block sums one segment, so a frequent token does not keep one block busy long after all others.
// If the segment is its token's only one, the sum is added to dw. The first num_partial segments
// belong to tokens that have several; their sums become rows of partial, for the next kernel.
// dweight (V,C), added to; partial (num_partial,C); dout (N,C); positions (N); segments (gridDim.x)
template <class real, int W>
__global__ void embedding_backward_kernel(float *dweight, float *partial, const real *dout,
                                          const int *positions, const Segment *segments, int C) {
    Segment s = segments[blockIdx.x];
    bool only = s.count == 1;
    float *row = only ? dweight + (size_t)s.token * C : partial + (size_t)blockIdx.x * C;
    for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        float sum[W] = {0}, dy[W];
        if (only) load(sum, row + c);
        for (int i = s.begin; i < s.end; i++) {
            load(dy, dout + (size_t)positions[i] * C + c);
            for (int k = 0; k < W; k++) sum[k] += dy[k];
        }
        store(row + c, sum);
    }
}

// The second stage: block i, if segment i is its token's first, adds the sums of all the token's
// segments, in order, to its row of dweight (V,C). partial (gridDim.x,C); segments (gridDim.x).
__global__ void embedding_add_partial_kernel(float *dweight, const float *partial,
                                             const Segment *segments, int C) {
    Segment s = segments[blockIdx.x];
    if (s.count == 0) return;
    const float *rows = partial + (size_t)blockIdx.x * C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = 0;
        for (int i = 0; i < s.count; i++) sum += rows[(size_t)i * C + c];
        dweight[(size_t)s.token * C + c] += sum;
    }
}

template <class real>
static void embedding_backward(float *dweight, const real *dout, Occurrences o, int C) {
    float *partial = scratch((size_t)most_partial(o.num_positions) * C);  // alike in each step
    with_width<float>(C, [&](auto W) {  // dweight is in float
        int threads = threads_for(C / W, 256);
        embedding_backward_kernel<real, W><<<o.num_segments, threads>>>(
            dweight, partial, dout, o.positions, o.segments, C);
    });
    LAUNCH_CHECK();
    if (o.num_partial == 0) return;
    embedding_add_partial_kernel<<<o.num_partial, threads_for(C, 256)>>>(
        dweight, partial, o.segments, C);
    LAUNCH_CHECK();
}

/*
RMSNorm. A block computes one row at a time. Thread i keeps channels i W to i W + W - 1 in
registers, so that each number is loaded once. Threads beyond the last channel hold zeros: they take
part in the sums over the block, and store nothing. A block has at most 1024 threads, or 512 if W is
8, because each of 1024 threads could have only 64 registers.
*/
#define ROW_THREADS(W) ((W) == 8 ? 512 : 1024)

// Returns r = 1 / sqrt(mean_c(x_c^2) + 1e-6) of a row.
template <int W> __device__ inline float row_rstd(const float (&x)[W], int C) {
    float sum = 0;
    for (int k = 0; k < W; k++) sum += x[k] * x[k];
    return rsqrtf(block_sum(sum) / C + 1e-6f);
}

// y_c = w_c x_c r with r = 1 / sqrt(mean_c(x_c^2) + 1e-6), one block for each row.
// out, inp (N,C); weight (C); rstd (N) keeps r.
template <class real, int W>
__global__ void __launch_bounds__(ROW_THREADS(W))
rmsnorm_forward_kernel(real *out, float *rstd, const real *inp, const float *weight, int C) {
    int c = threadIdx.x * W;
    size_t at = (size_t)blockIdx.x * C + c;
    float x[W] = {0}, w[W] = {0};
    if (c < C) {
        load(x, inp + at);
        load(w, weight + c);
    }
    float r = row_rstd(x, C);
    for (int k = 0; k < W; k++) x[k] = w[k] * x[k] * r;
    if (c < C) store(out + at, x);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

// Given dy of one row, compute dx in its place, and add to dw.
//   With u_c = w_c dy_c and p = r^2 sum_k u_k x_k / C:
//       dx_c = r (u_c - x_c p)
//       dw_c = dy_c x_c r, summed over all rows
template <int W>
__device__ inline void rmsnorm_backward_row(float (&dy)[W], float (&dw)[W], const float (&x)[W],
                                            const float (&w)[W], float r, int C) {
    float sum = 0;
    for (int k = 0; k < W; k++) sum += w[k] * dy[k] * x[k];
    float p = block_sum(sum) * r * r / C;
    for (int k = 0; k < W; k++) {
        dw[k] += dy[k] * x[k] * r;
        dy[k] = r * (w[k] * dy[k] - x[k] * p);
    }
}

// Given dy, compute dx, and the first stage of dw.
// Each block takes rows blockIdx.x, blockIdx.x + gridDim.x, ..., and writes its part of dw to a row
// of partial.
// dinp, dout, inp (N,C); weight (C); rstd (N); partial (gridDim.x,C).
template <class real, int W>
__global__ void __launch_bounds__(ROW_THREADS(W))
rmsnorm_backward_kernel(real *dinp, float *partial, const real *dout, const real *inp,
                        const float *weight, const float *rstd, int N, int C) {
    int c = threadIdx.x * W;
    float w[W] = {0}, dw[W] = {0};
    if (c < C) load(w, weight + c);
    for (int n = blockIdx.x; n < N; n += gridDim.x) {
        size_t at = (size_t)n * C + c;
        float x[W] = {0}, d[W] = {0};
        if (c < C) {
            load(x, inp + at);
            load(d, dout + at);
        }
        rmsnorm_backward_row(d, dw, x, w, rstd[n], C);
        if (c < C) store(dinp + at, d);
    }
    if (c < C) store(partial + (size_t)blockIdx.x * C + c, dw);
}

// The second stage: adds the rows of partial (rows,C) to dweight (C). A block of (32,32) threads
// sums 32 columns, with 32 threads for each.
__global__ void add_partial_kernel(float *dweight, const float *partial, int rows, int C) {
    __shared__ float sums[32][32];
    int c = blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    for (int i = threadIdx.y; i < rows && c < C; i += 32) sum += partial[(size_t)i * C + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0) return;
    for (int k = 1; k < 32; k++) sum += sums[k][threadIdx.x];
    if (c < C) dweight[c] += sum;
}

static void add_partial(float *dweight, const float *partial, int rows, int C) {
    add_partial_kernel<<<blocks_for(C, 32), dim3(32, 32)>>>(dweight, partial, rows, C);
    LAUNCH_CHECK();
}

template <class real>
static void rmsnorm_forward(real *out, float *rstd, const real *inp, const float *weight, int N,
                            int C) {
    with_width<real>(C, [&](auto W) {
        int threads = threads_for(C / W, ROW_THREADS(W));
        rmsnorm_forward_kernel<real, W><<<N, threads>>>(out, rstd, inp, weight, C);
    });
    LAUNCH_CHECK();
}

// Returns how many blocks share N rows of a backward pass. MOST_BLOCKS blocks of 64 threads are
// half of what an H100 can run at once. Of larger blocks we launch fewer.
static int row_blocks(int N, int threads) { return imin(N, MOST_BLOCKS * 64 / imax(threads, 64)); }

// dweight (C), added to.
template <class real>
static void rmsnorm_backward(real *dinp, float *dweight, const real *dout, const real *inp,
                             const float *weight, const float *rstd, int N, int C) {
    int blocks = 0;
    float *partial = scratch((size_t)MOST_BLOCKS * C);
    with_width<real>(C, [&](auto W) {
        int threads = threads_for(C / W, ROW_THREADS(W));
        blocks = row_blocks(N, threads);
        rmsnorm_backward_kernel<real, W><<<blocks, threads>>>(
            dinp, partial, dout, inp, weight, rstd, N, C);
    });
    LAUNCH_CHECK();
    add_partial(dweight, partial, blocks, C);
}

/*
Residual sum, GPAS and RMSNorm fused. Each of the three computes little and waits for memory. With
the norm first, three separate kernels move 7 arrays of (N,C) in the forward pass and 9 in the
backward pass. A single kernel, which keeps the numbers in registers, moves 4 and 4. It begins where
a branch ends, and stops where the next one begins:

    norm first   s = x + b,        y = GPAS(s),  normed = norm(y)   the norm of the next sublayer
    norm last    s = A GPAS(x) + b,              normed = norm(s)   the norm of this sublayer

Where the norm comes first, y = GPAS(s) is not stored. Each kernel that reads s multiplies it by
1 - a(g) itself: this one for its norm, and that of the next sublayer, whose x is y. So only s is
stored, which the gate's gradient needs anyway.
*/
template <class real> struct Fused {
    int N, C;
    const float *weight;        // (C) of the norm
    float A;                    // DeepNorm's constant, or 1
    const float *inp_gate;      // (1) the gate of the GPAS that the kernel applies to inp, or NULL
    const float *sum_gate;      // (1) the same for sum
    int activation, stop_grad;  // as in Gate
    // The forward pass. Given:
    const real *inp, *branch;   // (N,C) x, before the GPAS of inp_gate; b
    // Computed:
    real *sum, *normed;         // (N,C) s, before the GPAS of sum_gate; the norm's output
    float *rstd;                // (N)
    // The backward pass. Given: the gradient of y along the shortcut, in dx, and the gradient of
    // the input of the next branch:
    const real *dfinp;          // (N,C)
    // Computed:
    real *dx;                   // (N,C) the gradient of s (norm first) or of x (norm last)
    real *dsum;                 // (N,C) norm last: the gradient of s
    float *dweight, *dgate;     // (C), (1): added to; dgate NULL: not computed
    float *partial;             // (gridDim.x,C) the first stage of dweight
    float *gate_partial;        // (gridDim.x) the first stage of dgate
};

// Returns 1 - a(g), or 1 without GPAS.
__device__ inline float gpas_scale(const float *gate, int activation) {
    return 1 - gate_value(gate ? *gate : 0, activation);  // a(0) is 0
}

// A block takes four rows, for which it loads the weights once: in fp32 they are as many bytes as
// two rows in bf16. The norm is computed from s before s is rounded to bf16.
template <class real, int W>
__global__ void __launch_bounds__(ROW_THREADS(W))
residual_gpas_rmsnorm_forward_kernel(Fused<real> f) {
    int N = f.N, C = f.C, c = threadIdx.x * W;
    const real *inp = f.inp + c, *branch = f.branch + c;
    const float *weight = f.weight + c, *sum_gate = f.sum_gate;
    real *sum = f.sum + c, *normed = f.normed + c;
    float *rstd = f.rstd, inp_scale = f.A * gpas_scale(f.inp_gate, f.activation);
    float sum_scale = gpas_scale(sum_gate, f.activation), w[W] = {0};
    if (c < C) load(w, weight);
    for (int n = blockIdx.x; n < N; n += gridDim.x) {
        size_t row = (size_t)n * C;
        float x[W] = {0}, b[W] = {0};
        if (c < C) {
            load(x, inp + row);
            load(b, branch + row);
        }
        for (int k = 0; k < W; k++) x[k] = inp_scale * x[k] + b[k];  // s
        if (c < C) store(sum + row, x);
        for (int k = 0; k < W; k++) x[k] *= sum_scale;               // y
        float r = row_rstd(x, C);
        for (int k = 0; k < W; k++) x[k] = w[k] * x[k] * r;          // norm(y)
        if (c < C) store(normed + row, x);
        if (threadIdx.x == 0) rstd[n] = r;
    }
}

// Given dx, the gradient of y along the shortcut, and dfinp, compute ds in place of dx, and the
// first stages of dw and dg, where the norm comes first.
//   dy = dx + norm^T dfinp
//   ds = dy, or (1 - a(g)) dy without the stop-gradient
//   dg = -a'(g) sum_i s_i dy_i
template <class real, int W>
__global__ void __launch_bounds__(ROW_THREADS(W))
residual_gpas_rmsnorm_backward_kernel(Fused<real> f) {
    int N = f.N, C = f.C, stop_grad = f.stop_grad, c = threadIdx.x * W;
    const real *sum = f.sum + c, *dfinp = f.dfinp + c;
    const float *weight = f.weight + c, *rstd = f.rstd;
    real *dx = f.dx + c;
    float *partial = f.partial + (size_t)blockIdx.x * C + c, *gate_partial = f.gate_partial;
    float y_scale = gpas_scale(f.sum_gate, f.activation), dy_scale = stop_grad ? 1 : y_scale;
    float w[W] = {0}, dw[W] = {0}, gate_sum = 0;
    if (c < C) load(w, weight);
    for (int n = blockIdx.x; n < N; n += gridDim.x) {
        float s[W] = {0}, y[W], d[W] = {0}, dn[W] = {0};
        if (c < C) {
            load(s, sum + (size_t)n * C);
            load(d, dx + (size_t)n * C);
            load(dn, dfinp + (size_t)n * C);
        }
        for (int k = 0; k < W; k++) y[k] = y_scale * s[k];
        rmsnorm_backward_row(dn, dw, y, w, rstd[n], C);  // norm^T dfinp
        for (int k = 0; k < W; k++) {
            float dy = d[k] + dn[k];
            gate_sum += s[k] * dy;
            d[k] = dy_scale * dy;
        }
        if (c < C) store(dx + (size_t)n * C, d);
    }
    if (c < C) store(partial, dw);
    gate_sum = block_sum(gate_sum);
    if (threadIdx.x == 0) gate_partial[blockIdx.x] = gate_sum;
}

// Given dx and dfinp, whose sum is dy, compute ds in dsum, the gradient of x in place of dx, and
// the first stages of dw and dg, where the norm comes last.
//   ds = norm^T dy
//   dz = A ds for z = GPAS(x)
//   dx = dz, or (1 - a(g)) dz without the stop-gradient
//   dg = -a'(g) sum_i x_i dz_i
template <class real, int W>
__global__ void __launch_bounds__(ROW_THREADS(W))
gpas_residual_rmsnorm_backward_kernel(Fused<real> f) {
    int N = f.N, C = f.C, stop_grad = f.stop_grad, c = threadIdx.x * W;
    const real *inp = f.inp + c, *sum = f.sum + c, *dfinp = f.dfinp + c;
    const float *weight = f.weight + c, *rstd = f.rstd;
    real *dx = f.dx + c, *dsum = f.dsum + c;
    float *partial = f.partial + (size_t)blockIdx.x * C + c, *gate_partial = f.gate_partial;
    float A = f.A, z_scale = gpas_scale(f.inp_gate, f.activation);
    float dz_scale = stop_grad ? 1 : z_scale, w[W] = {0}, dw[W] = {0}, gate_sum = 0;
    if (c < C) load(w, weight);
    for (int n = blockIdx.x; n < N; n += gridDim.x) {
        float x[W] = {0}, s[W] = {0}, d[W] = {0}, ds[W] = {0};
        if (c < C) {
            load(x, inp + (size_t)n * C);
            load(s, sum + (size_t)n * C);
            load(d, dx + (size_t)n * C);
            load(ds, dfinp + (size_t)n * C);
        }
        for (int k = 0; k < W; k++) ds[k] += d[k];       // dy
        rmsnorm_backward_row(ds, dw, s, w, rstd[n], C);  // norm^T dy
        if (c < C) store(dsum + (size_t)n * C, ds);
        for (int k = 0; k < W; k++) {
            float dz = A * ds[k];
            gate_sum += x[k] * dz;
            d[k] = dz_scale * dz;
        }
        if (c < C) store(dx + (size_t)n * C, d);
    }
    if (c < C) store(partial, dw);
    gate_sum = block_sum(gate_sum);
    if (threadIdx.x == 0) gate_partial[blockIdx.x] = gate_sum;
}

template <class real> static void residual_gpas_rmsnorm_forward(Fused<real> f) {
    with_width<real>(f.C, [&](auto W) {
        int threads = threads_for(f.C / W, ROW_THREADS(W));
        residual_gpas_rmsnorm_forward_kernel<real, W><<<blocks_for(f.N, 4), threads>>>(f);
    });
    LAUNCH_CHECK();
}

template <class real> static void residual_gpas_rmsnorm_backward(Fused<real> f, int norm_last) {
    Gate gate = {norm_last ? f.inp_gate : f.sum_gate, f.activation, f.stop_grad};
    int blocks = 0;
    f.gate_partial = scratch((size_t)MOST_BLOCKS * (f.C + 1));
    f.partial = f.gate_partial + MOST_BLOCKS;
    with_width<real>(f.C, [&](auto W) {
        int threads = threads_for(f.C / W, ROW_THREADS(W));
        blocks = row_blocks(f.N, threads);
        if (norm_last) gpas_residual_rmsnorm_backward_kernel<real, W><<<blocks, threads>>>(f);
        else residual_gpas_rmsnorm_backward_kernel<real, W><<<blocks, threads>>>(f);
    });
    LAUNCH_CHECK();
    add_partial(f.dweight, f.partial, blocks, f.C);
    if (!f.dgate) return;
    gpas_add_partial_kernel<<<1, 256>>>(f.dgate, f.gate_partial, blocks, gate);
    LAUNCH_CHECK();
}

// Rotates (x0, x1) by an angle, given its cosine and sine.
__device__ inline void rotate(float &x0, float &x1, float cosine, float sine) {
    float x = x0;
    x0 = x * cosine - x1 * sine;
    x1 = x * sine + x1 * cosine;
}

// RoPE (arXiv 2104.09864) rotates each pair (x0, x1) of adjacent channels of the queries and keys,
// in place. One block rotates one position, and each thread W channels of one head at a time.
// qkv (B,T,3C); table (T,hs/2,2): cosine and sine. direction: 1, or -1 to rotate back.
template <class real, int W>
__global__ void rope_kernel(real *qkv, const float *table, int T, int C, int hs, int direction) {
    real *row = qkv + (size_t)blockIdx.x * 3 * C;
    const float *cos_sin = table + (size_t)(blockIdx.x % T) * hs;
    for (int c = threadIdx.x * W; c < 2 * C; c += blockDim.x * W) {
        float x[W], angle[W];
        load(x, row + c);
        load(angle, cos_sin + c % hs);
        for (int k = 0; k < W; k += 2) rotate(x[k], x[k + 1], angle[k], direction * angle[k + 1]);
        store(row + c, x);
    }
}

template <class real>
static void rope_rotate(real *qkv, const float *table, int B, int T, int C, int hs,
                        int direction) {
    int N = B * T;
    with_width<real>(hs, [&](auto width) {
        constexpr int W = width == 1 ? 2 : width;  // at least a pair; hs is even
        int threads = threads_for(2 * C / W, 256);
        rope_kernel<real, W><<<N, threads>>>(qkv, table, T, C, hs, direction);
    });
    LAUNCH_CHECK();
}

template <class real>
static void rope_forward(real *qkv, const float *table, int B, int T, int C, int hs) {
    rope_rotate(qkv, table, B, T, C, hs, 1);
}

// Given dy, compute dx.
//   dx = R^T dy, the rotation by the opposite angle.
// dqkv (B,T,3C), in place.
template <class real>
static void rope_backward(real *dqkv, const float *table, int B, int T, int C, int hs) {
    rope_rotate(dqkv, table, B, T, C, hs, -1);
}

// Returns 1 / (1 + e^-x). An ordinary division takes 10 instructions, enough to make the kernels
// below wait for arithmetic and not for memory. __fdividef takes 2, and errs by at most two units
// in the last place.
__device__ inline float sigmoid(float x) { return __fdividef(1, 1 + expf(-x)); }

// Computes SwiGLU, y = silu(h1) h3, with one block for each row.
// out (N,H); inp (N,2H): a row holds the H values of h1, then those of h3.
template <class real, int W>
__global__ void swiglu_forward_kernel(real *out, const real *inp, int H) {
    const real *row = inp + (size_t)blockIdx.x * 2 * H;
    for (int i = threadIdx.x * W; i < H; i += blockDim.x * W) {
        float h1[W], h3[W], y[W];
        load(h1, row + i);
        load(h3, row + H + i);
        for (int k = 0; k < W; k++) y[k] = h1[k] * sigmoid(h1[k]) * h3[k];
        store(out + (size_t)blockIdx.x * H + i, y);
    }
}

// Given dy, compute dh1 and dh3.
//   With s = sigmoid(h1):  dh1 = dy h3 (s + h1 s (1 - s)),  dh3 = dy h1 s
// dinp, inp (N,2H); dout (N,H).
template <class real, int W>
__global__ void swiglu_backward_kernel(real *dinp, const real *dout, const real *inp, int H) {
    size_t row = (size_t)blockIdx.x * 2 * H;
    for (int i = threadIdx.x * W; i < H; i += blockDim.x * W) {
        float h1[W], h3[W], dy[W], dh1[W], dh3[W];
        load(h1, inp + row + i);
        load(h3, inp + row + H + i);
        load(dy, dout + (size_t)blockIdx.x * H + i);
        for (int k = 0; k < W; k++) {
            float s = sigmoid(h1[k]);
            dh1[k] = dy[k] * h3[k] * (s + h1[k] * s * (1 - s));
            dh3[k] = dy[k] * h1[k] * s;
        }
        store(dinp + row + i, dh1);
        store(dinp + row + H + i, dh3);
    }
}

template <class real> static void swiglu_forward(real *out, const real *inp, int N, int H) {
    with_width<real>(H, [&](auto W) {
        int threads = threads_for(H / W, 256);
        swiglu_forward_kernel<real, W><<<N, threads>>>(out, inp, H);
    });
    LAUNCH_CHECK();
}

template <class real>
static void swiglu_backward(real *dinp, const real *dout, const real *inp, int N, int H) {
    with_width<real>(H, [&](auto W) {
        int threads = threads_for(H / W, 256);
        swiglu_backward_kernel<real, W><<<N, threads>>>(dinp, dout, inp, H);
    });
    LAUNCH_CHECK();
}

// A linear layer without bias: out = inp weight^T. out (N,OC); inp (N,C); weight (OC,C).
// gemm() takes column-major matrices, and a row-major matrix read as column-major is its transpose.
// So it computes out^T = weight inp^T.
template <class real>
static void matmul_forward(real *out, const real *inp, const real *weight, int N, int C, int OC) {
    gemm(out, weight, 1, inp, 0, OC, N, C, 0);
}

// Given dout, compute dinp and dweight.
//   dinp = dout weight, dweight = dout^T inp
// dinp, inp (N,C); dout (N,OC); weight, dweight (OC,C), dweight added to.
template <class real>
static void matmul_backward(real *dinp, float *dweight, const real *dout, const real *inp,
                            const real *weight, int N, int C, int OC) {
    gemm(dinp, weight, 0, dout, 0, C, N, OC, 0);
    gemm(dweight, inp, 0, dout, 1, C, OC, N, 1);
}

/*
Causal attention. Each head is computed by itself. train_gpas.c derives the formulas:

    S_ts = scale q_t . k_s                  the scores, with scale = 1/sqrt(hs)
    P_ts = [s <= t] e^(S_ts - lse_t)        their softmax, with lse_t = log sum_(s <= t) e^S_ts
    y_t  = sum_s P_ts v_s

The CPU stores the scores of a block of queries and then computes their softmax. Here the scores
never go to memory, as in FlashAttention-2 (arXiv 2307.08691), because writing and reading (T,T)
numbers for each head would take longer than computing them. A block of threads computes y for 64
queries. The keys and values pass through its shared memory in tiles, and the scores for a tile
exist only in registers. Therefore the softmax has to begin before all scores of a query are known.
This online softmax keeps three things for each query t: the largest score m so far, the sum l of
e^(S_ts - m), and y, not yet divided by l. A tile of keys s updates them to

    m' = max(m, max_s S_ts)
    l' = e^(m - m') l + sum_s e^(S_ts - m')
    y' = e^(m - m') y + sum_s e^(S_ts - m') v_s

where e^(m - m') corrects the old terms for the new maximum. After the last tile, y / l is the
output, and lse = m + log l. The backward pass computes S again, and P from S and lse.

dev/gpu/tiles.h defines the operations on tiles. The matrix products run on tensor cores, and tiles
are copied asynchronously: while the warps multiply one tile, the next one is being copied, so they
seldom wait for memory. With float the same kernels run without tensor cores, which would round to
TF32. This is slow, and meant for checking.
*/

// The shape of the arrays and of a launch. A launch has one block for every 64 rows of every head:
// block i belongs to head i / head_blocks. Head b NH + h is head h of sequence b.
struct AttentionShape {
    int T, C, NH, hs;
    int head_blocks;  // blocks for each head
    float scale;      // 1/sqrt(hs)
};

static AttentionShape attention_shape(int rows, int T, int C, int NH) {
    int hs = C / NH;
    return {T, C, NH, hs, (rows + ROWS - 1) / ROWS, 1 / sqrtf((float)hs)};
}

// Returns the part of x (B,T,stride) that belongs to this block's head, (T,hs). x points to the
// first head of out, or to that of the queries, keys or values in qkv.
template <class number>
__device__ inline Rows<number> head_of(number *x, int T, int stride, AttentionShape shape) {
    int head = blockIdx.x / shape.head_blocks, b = head / shape.NH, h = head % shape.NH;
    return {x + (size_t)b * T * stride + h * shape.hs, stride, T, shape.hs};
}

// Sets the scores of keys that come after the query to -infinity, so that P becomes 0. The rows of
// S (16,COLS) are queries from row0 on, and its columns are keys from column0 on; or, transposed,
// the rows are keys and the columns are queries. Most tiles have no such key and stay as they are.
template <bool transposed, int COLS>
__device__ inline void mask_tile(Accumulator<COLS> &S, int row0, int column0) {
    int first_query = transposed ? column0 : row0;
    int last_key = transposed ? row0 + 15 : column0 + COLS - 1;
    if (last_key <= first_query) return;
    for (int j = 0; j < COLS / 8; j++) {
        for (int i = 0; i < 4; i++) {
            int row = row0 + row_of(i / 2), column = column0 + column_of(j, i);
            if (transposed ? row > column : column > row) S.d[j][i] = -INFINITY;
        }
    }
}

// Computes RoPE's backward pass for 16 rows of dq or dk, positions t0 on. A warp holds the rows in
// registers, both channels of a pair in the same lane. Without a table it does nothing. What lies
// beyond T and hs is not stored, so any angle will do there.
template <int HS>
__device__ inline void rotate_back(Accumulator<HS> &dx, const float *table, int t0, int T, int hs) {
    for (int half = 0; half < 2 && table; half++) {
        int t = min(t0 + row_of(half), T - 1);
        for (int j = 0; j < HS / 8; j++) {
            float angle[2];
            load(angle, table + (size_t)t * hs + min(column_of(j, 0), hs - 2));
            rotate(dx.d[j][2 * half], dx.d[j][2 * half + 1], angle[0], -angle[1]);
        }
    }
}

// Takes one step of the online softmax. S (16,COLS) holds q_t . k_s and becomes e^(S_ts - m'). m
// and l are updated; y (16,HS) is multiplied by e^(m - m'), and still lacks the terms of this tile.
// A lane holds parts of two of the 16 rows, hence m[2] and l[2]. To save multiplications, m is
// stored multiplied by log2 e. To save shuffles, each of the four lanes that share a row has an l
// of its own, the sum over its columns, and the caller adds the four after the last tile.
template <int HS, int COLS>
__device__ inline void softmax_tile(Accumulator<COLS> &S, Accumulator<HS> &y, float (&m)[2],
                                    float (&l)[2], float scale) {
    scale *= LOG2_E;
    for (int half = 0; half < 2; half++) {
        float largest = -INFINITY;
        for (int j = 0; j < COLS / 8; j++) {
            for (int i = 2 * half; i < 2 * half + 2; i++) largest = fmaxf(largest, S.d[j][i]);
        }
        largest = fmaxf(m[half], warp_max(largest, 4) * scale);
        float correction = exp2f(m[half] - largest);
        m[half] = largest;
        l[half] *= correction;
        for (int j = 0; j < COLS / 8; j++) {
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                S.d[j][i] = exp2f(S.d[j][i] * scale - largest);
                l[half] += S.d[j][i];
            }
        }
        for (int j = 0; j < HS / 8; j++) {
            for (int i = 2 * half; i < 2 * half + 2; i++) y.d[j][i] *= correction;
        }
    }
}

// A block computes y for 64 positions of one head, from block_t0 on, and each warp for 16 of them,
// from t0 on. Positions before `first` are not computed. While the warps multiply the tiles
// keys[now] and values[now], the next ones are copied to the other buffers.
// out (B,T-first,C); lse (B,NH,T-first); qkv (B,T,3C).
template <class real, int HS>
__global__ void __launch_bounds__(THREADS, BLOCKS<HS>)
attention_forward_kernel(real *out, float *lse, const real *qkv, int first, AttentionShape shape) {
    constexpr int COLS = HS == 32 ? 64 : 8192 / sizeof(real) / HS;  // 4 tiles of <= 8 KiB + padding
    __shared__ Tile<real, HS> keys[2][COLS];
    __shared__ Tile<real, HS> values[2][COLS];
    int T = shape.T, C = shape.C;
    // The last queries see the most keys. Their blocks start first: a long block that starts late
    // would run alone in the end.
    int block_t0 = first + (shape.head_blocks - 1 - blockIdx.x % shape.head_blocks) * ROWS;
    int t0 = block_t0 + threadIdx.x / 32 * 16, seen = min(T, block_t0 + ROWS);
    Rows<const real> q = head_of(qkv, T, 3 * C, shape);
    Rows<const real> k = head_of(qkv + C, T, 3 * C, shape);
    Rows<const real> v = head_of(qkv + 2 * C, T, 3 * C, shape);
    Operand<real, HS> warp_q;
    Accumulator<COLS> S;
    Accumulator<HS> y = {};
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
    load_tile(keys[0], k, 0);
    load_tile(values[0], v, 0);
    load_rows(warp_q, q, t0);
    for (int s0 = 0; s0 < seen; s0 += COLS) {
        int now = s0 / COLS % 2;
        cp_async_wait_all();
        __syncthreads();  // All copies have arrived, and no warp still reads the previous tiles.
        if (s0 + COLS < seen) {
            load_tile(keys[now ^ 1], k, s0 + COLS);
            load_tile(values[now ^ 1], v, s0 + COLS);
        }
        if (t0 >= T || s0 >= t0 + 16) continue;  // no query of this warp sees any of these keys
        multiply_transposed(S, warp_q, keys[now]);      // S = Q K^T, to be scaled
        mask_tile<false>(S, t0, s0);
        softmax_tile(S, y, m, l, shape.scale);          // S becomes P, to be divided by l
        multiply_add(y, S, values[now]);                // Y += P V
    }
    size_t head_row = (size_t)(blockIdx.x / shape.head_blocks) * (T - first);
    for (int half = 0; half < 2; half++) {
        int t = t0 + row_of(half);
        l[half] = warp_sum(l[half], 4);
        if (threadIdx.x % 4 == 0 && t < T)
            lse[head_row + t - first] = m[half] / LOG2_E + logf(l[half]);
        l[half] = 1 / l[half];
    }
    store_rows(head_of(out, T - first, C, shape), t0 - first, y, l);
}

// For one query t and one key s, replaces S = q_t . k_s by P_ts, and dP_ts by dS_ts. The factor
// `scale` of dq and dk is applied when they are stored.
__device__ inline void softmax_backward(float &S, float &dP, float scale, float lse, float delta) {
    S = exp2f(S * (scale * LOG2_E) - lse * LOG2_E);
    dP = S * (dP - delta);
}

// Given dy, compute dq, and delta for the next kernel.
//   dP_ts = dy_t . v_s    dS_ts = P_ts (dP_ts - delta_t)    dq_t = scale sum_s dS_ts k_s
//   delta_t = sum_r P_tr dP_tr = dy_t . y_t
// The loop is that of the forward pass. The next kernel computes S and dP again for dk and dv. If
// this one computed dk and dv, blocks with different queries would add to the same numbers in
// memory, in an order that varies from run to run. Given a table, rotate_back() rotates dq, too.
// dqkv, qkv (B,T,3C); dout, out (B,T,C); lse, delta (B,NH,T).
template <class real, int HS>
__global__ void __launch_bounds__(THREADS, BLOCKS<HS>)
attention_backward_q_kernel(real *dqkv, float *delta, const real *dout, const real *out,
                            const float *lse, const real *qkv, const float *table,
                            AttentionShape shape) {
    constexpr int COLS = HS == 128 ? 16 : 32;  // smaller, because S and dS share the registers
    __shared__ Tile<real, HS> keys[2][COLS];
    __shared__ Tile<real, HS> values[2][COLS];
    int T = shape.T, C = shape.C;
    int block_t0 = (shape.head_blocks - 1 - blockIdx.x % shape.head_blocks) * ROWS;
    int t0 = block_t0 + threadIdx.x / 32 * 16, seen = min(T, block_t0 + ROWS);
    Rows<const real> q = head_of(qkv, T, 3 * C, shape);
    Rows<const real> k = head_of(qkv + C, T, 3 * C, shape);
    Rows<const real> v = head_of(qkv + 2 * C, T, 3 * C, shape);
    Operand<real, HS> warp_q, warp_y, warp_dy;
    Accumulator<COLS> S, dS;
    Accumulator<HS> dq = {};
    load_tile(keys[0], k, 0);
    load_tile(values[0], v, 0);
    load_rows(warp_y, head_of(out, T, C, shape), t0);
    load_rows(warp_dy, head_of(dout, T, C, shape), t0);
    load_rows(warp_q, q, t0);
    float row_lse[2], row_delta[2];
    size_t head_row = (size_t)(blockIdx.x / shape.head_blocks) * T;
    dot_rows(row_delta, warp_dy, warp_y);
    for (int half = 0; half < 2; half++) {
        int t = t0 + row_of(half);
        row_lse[half] = t < T ? lse[head_row + t] : 0;
        if (threadIdx.x % 4 == 0 && t < T) delta[head_row + t] = row_delta[half];
    }
    for (int s0 = 0; s0 < seen; s0 += COLS) {
        int now = s0 / COLS % 2;
        cp_async_wait_all();
        __syncthreads();
        if (s0 + COLS < seen) {
            load_tile(keys[now ^ 1], k, s0 + COLS);
            load_tile(values[now ^ 1], v, s0 + COLS);
        }
        if (t0 >= T || s0 >= t0 + 16) continue;
        multiply_transposed(S, warp_q, keys[now]);      // S = Q K^T, to be scaled
        multiply_transposed(dS, warp_dy, values[now]);  // dP = dY V^T
        mask_tile<false>(S, t0, s0);
        for (int j = 0; j < COLS / 8; j++) {
            for (int i = 0; i < 4; i++)
                softmax_backward(S.d[j][i], dS.d[j][i], shape.scale, row_lse[i / 2],
                                 row_delta[i / 2]);
        }
        multiply_add(dq, dS, keys[now]);                // dQ += dS K, to be scaled
    }
    rotate_back(dq, table, t0, T, shape.hs);
    store_rows(head_of(dqkv, T, 3 * C, shape), t0, dq, {shape.scale, shape.scale});
}

// Given dy and delta, compute dk and dv.
//   dv_s = sum_t P_ts dy_t    dk_s = scale sum_t dS_ts q_t
//   A warp's rows are keys here, so it computes S and dP transposed, S^T = K Q^T and dP^T = V dY^T,
//   and then dV = P^T dY and dK = scale dS^T Q.
// A block has 64 keys. The queries pass through shared memory, with their dy, lse and delta. Beyond
// the last query dy and delta are 0, so nothing is added. rotate_back() treats dk as it does dq.
template <class real, int HS>
__global__ void __launch_bounds__(THREADS, BLOCKS<HS>)
attention_backward_kv_kernel(real *dqkv, const real *dout, const float *lse, const float *delta,
                             const real *qkv, const float *table, AttentionShape shape) {
    constexpr int COLS = HS == 128 ? 16 : sizeof(real) == 2 ? 64 : 32;
    __shared__ Tile<real, HS> queries[2][COLS];
    __shared__ Tile<real, HS> dys[2][COLS];
    __shared__ float lse_delta[2][2][COLS];
    static_assert(2 * COLS <= THREADS, "each thread copies one number of lse or delta");
    int T = shape.T, C = shape.C;
    int block_s0 = blockIdx.x % shape.head_blocks * ROWS, s0 = block_s0 + threadIdx.x / 32 * 16;
    Rows<const real> q = head_of(qkv, T, 3 * C, shape), dy = head_of(dout, T, C, shape);
    Rows<const real> k = head_of(qkv + C, T, 3 * C, shape);
    Rows<const real> v = head_of(qkv + 2 * C, T, 3 * C, shape);
    size_t head_row = (size_t)(blockIdx.x / shape.head_blocks) * T;
    Operand<real, HS> warp_k, warp_v;
    Accumulator<16> S, dS;
    Accumulator<HS> dk = {}, dv = {};
    auto load_queries = [&](int t, int to) {  // starts to copy what belongs to queries from t on
        load_tile(queries[to], q, t);
        load_tile(dys[to], dy, t);
        int i = threadIdx.x % COLS, which = threadIdx.x / COLS;
        const float *from = (which ? delta : lse) + head_row + min(t + i, T - 1);
        if (which < 2) copy_async<4>(&lse_delta[to][which][i], from, t + i < T);
    };
    load_rows(warp_k, k, s0);
    load_rows(warp_v, v, s0);
    load_queries(block_s0, 0);
    int now = 0;
    for (int t0 = block_s0; t0 < T; t0 += COLS, now ^= 1) {  // no earlier query sees these keys
        cp_async_wait_all();
        __syncthreads();
        if (t0 + COLS < T) load_queries(t0 + COLS, now ^ 1);
        if (s0 >= T) continue;
        for (int c = 0; c < COLS; c += 16) {  // beside dk and dv, 16 queries fit in registers
            if (t0 + c + 16 <= s0) continue;  // none of them sees a key of this warp
            multiply_transposed(S, warp_k, queries[now] + c);  // S^T = K Q^T, to be scaled
            multiply_transposed(dS, warp_v, dys[now] + c);     // dP^T = V dY^T
            mask_tile<true>(S, s0, t0 + c);
            for (int j = 0; j < 2; j++) {
                for (int i = 0; i < 4; i++) {
                    int t = c + column_of(j, i);
                    softmax_backward(S.d[j][i], dS.d[j][i], shape.scale, lse_delta[now][0][t],
                                     lse_delta[now][1][t]);
                }
            }
            multiply_add(dv, S, dys[now] + c);                 // dV += P^T dY
            multiply_add(dk, dS, queries[now] + c);            // dK += dS^T Q, to be scaled
        }
    }
    rotate_back(dk, table, s0, T, shape.hs);
    store_rows(head_of(dqkv + C, T, 3 * C, shape), s0, dk, {shape.scale, shape.scale});
    store_rows(head_of(dqkv + 2 * C, T, 3 * C, shape), s0, dv, {1, 1});
}

// As in train_gpas.c. out (B,T-first,C); lse (B,NH,T-first); qkv (B,T,3C). hs is even, and at most
// MAX_HEAD.
template <class real>
static void attention_forward(real *out, float *lse, const real *qkv, int first, int B, int T,
                              int C, int NH) {
    AttentionShape shape = attention_shape(T - first, T, C, NH);
    int blocks = B * NH * shape.head_blocks;
    with_head(C / NH, [&](auto HS) {
        attention_forward_kernel<real, HS><<<blocks, THREADS>>>(out, lse, qkv, first, shape);
    });
    LAUNCH_CHECK();
}

// table (T,hs/2,2) is RoPE's, or NULL. With it the kernels also rotate dq and dk back before they
// store them, which saves a kernel that reads and writes both.
// dqkv, qkv (B,T,3C); dout, out (B,T,C); lse (B,NH,T).
template <class real>
static void attention_backward(real *dqkv, const real *dout, const real *out, const float *lse,
                               const real *qkv, const float *table, int B, int T, int C, int NH) {
    AttentionShape shape = attention_shape(T, T, C, NH);
    int blocks = B * NH * shape.head_blocks;
    float *delta = scratch((size_t)B * NH * T);
    with_head(C / NH, [&](auto HS) {
        attention_backward_q_kernel<real, HS><<<blocks, THREADS>>>(
            dqkv, delta, dout, out, lse, qkv, table, shape);
        LAUNCH_CHECK();
        attention_backward_kv_kernel<real, HS><<<blocks, THREADS>>>(
            dqkv, dout, lse, delta, qkv, table, shape);
    });
    LAUNCH_CHECK();
}

// Computes the cross-entropy of the softmax and the gradient of the logits, with one block for each
// row. With lse = log sum_v e^x_v:
//     loss = lse - x_target      dx_v = scale (e^(x_v - lse) - [v is the target])
// A separate backward pass would load the logits from memory again. Here the second loop finds them
// in the cache, because few blocks of 1024 threads run at a time.
// In the first loop each thread keeps the largest logit it has seen, and the sum of
// e^(x_v - largest), and rescales this sum when it finds a larger logit. To save instructions, for
// which this kernel waits, only a row's last pack is checked, and the target comes after the loop.
// losses (N); logits (N,V), rows `stride` apart; targets (N). scale is the weight of each loss. The
// gradients overwrite the logits, and are 0 from V on. With scale = 0 the logits are only read.
template <class real, int W>
__global__ void __launch_bounds__(1024, 2)
crossentropy_kernel(float *losses, real *logits, const int *targets, float scale, int V,
                    int stride) {
    real *row = logits + (size_t)blockIdx.x * stride;
    int target = targets[blockIdx.x];
    float target_logit = row[target], largest = -INFINITY, sum = 0, x[W];
    for (int v = threadIdx.x * W; v < V; v += blockDim.x * W) {
        float before = largest;
        load(x, row + v);
        if (v + W > V)
            for (int k = 0; k < W; k++) x[k] = v + k < V ? x[k] : -INFINITY;
        for (int k = 0; k < W; k++) largest = fmaxf(largest, x[k]);
        sum *= exp2f((before - largest) * LOG2_E);
        for (int k = 0; k < W; k++) sum += exp2f(fmaf(x[k], LOG2_E, -largest * LOG2_E));
    }
    float row_largest = block_max(largest);
    sum = block_sum(sum * exp2f((largest - row_largest) * LOG2_E));
    float lse = row_largest + logf(sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = lse - target_logit;
    if (scale == 0) return;
    for (int v = threadIdx.x * W; v < stride; v += blockDim.x * W) {
        load(x, row + v);
        for (int k = 0; k < W; k++) x[k] = scale * exp2f(fmaf(x[k], LOG2_E, -lse * LOG2_E));
        if (v + W > V)
            for (int k = 0; k < W; k++) x[k] = v + k < V ? x[k] : 0;
        store(row + v, x);
    }
    if (threadIdx.x == target / W % blockDim.x)  // this thread has stored the pack of the target
        row[target] = scale * (exp2f(fmaf(target_logit, LOG2_E, -lse * LOG2_E)) - 1);
}

template <class real>
static void crossentropy(float *losses, real *logits, const int *targets, float scale, int N,
                         int V, int stride) {
    with_width<real>(stride, [&](auto W) {
        int threads = threads_for(stride / W, 1024);
        crossentropy_kernel<real, W><<<N, threads>>>(losses, logits, targets, scale, V, stride);
    });
    LAUNCH_CHECK();
}

/* ------------------------------------------------------------------------------------------------
3. The model

The struct Model holds what does not depend on `real`, and Network<real> the rest. H and V are
rounded up to multiples of 8; dev/gpu/layout.h says why that changes no result.
*/

// The parameters of a layer, or their gradients.
template <class number> struct LayerParameters {
    number *wqkv, *wo;         // (3C,C), (C,C)
    number *w13, *w2;          // (2H,C), (C,H)
    number *norm[2];           // (C)
    number *post_norm[2];      // (C) in sandwich only
    number *gate;              // (1) with GPAS only
};

// What a sublayer computes in its forward pass. As in train_gpas.c, sublayers share `branch` if no
// backward pass reads it. With --recompute or without training they also share `hidden`, `pre_act`
// and `qkv` (but see keeps_keys).
template <class real> struct Activations {
    const real *inp;           // (B,T,C) x, the output of the sublayer before
    real *normed;              // (B,T,C) norm(x); norm last: norm(s), the output
    real *qkv;                 // (B,T,3C) attention: queries and keys after RoPE, values
    float *lse;                // (B,NH,T) attention: log sum exp of each row of scores
    real *pre_act;             // (B,T,2H) feed-forward: w1 x and w3 x
    real *hidden;              // (B,T,C) or (B,T,H) the input of wo or of w2
    real *branch;              // (B,T,C) the output of f
    real *sum;                 // (B,T,C) s = A shortcut + branch
    real *scaled;              // (B,T,C) with --fused off: GPAS(s); norm last: GPAS(x)
    float *rstd, *post_rstd;   // (B,T) of norm and post_norm
    const real *out;           // (B,T,C) y: scaled, sum or normed. Fused, norm first: s, not y
};

template <class real> struct Network {
    real *weights;                   // the parameters as `real`; in fp32 the parameters themselves
    Activations<real> *activations;  // (2L + 1); the last holds normed and rstd of the final norm
    real *embedded;                  // (B,T,C)
    real *post_normed;               // (B,T,C) sandwich: post_norm of branch
    real *logits;                    // (logit_rows(B T),V)
    // The gradients with respect to:
    real *dx;                        // (B,T,C) the residual stream
    real *dsum;                      // (B,T,C) s, where the norm comes last
    real *dbranch;                   // (B,T,C) the output of f, where a post_norm follows it
    real *dhidden;                   // as hidden
    real *dqkv, *dpre_act;           // as qkv and pre_act; both use the same memory
    real *dfinp;                     // (B,T,C) the input of f
    real *dx_branch;                 // (B,T,C) the branch's part of dx, where the norm comes first
};

struct Model {
    const Options *options;
    Config config;
    TensorList list;             // the names and shapes of the parameters, as in files
    Layout layout;               // where the parameters lie on the GPU
    Snapshot host;               // the state in the layout of files, for model_snapshot()
    int H, V;                    // rounded up
    float *parameters, *gradients, *adam_m, *adam_v;    // (layout.size)
    void *network;               // Network<float> or Network<bf16>, see with_network()
    float *rope_table;           // (T,hs/2,2)
    float *losses, *host_losses;                        // (B,T)
    float *doutput;              // (V,C) see output_forward()
    float *host_logits;          // (2V) a row as float and as `real`
    int *tokens, *targets;       // (B,T)
    Occurrences occurrences, host_occurrences;          // of the tokens
    Chunk *chunks;               // (layout.num_chunks) for AdamW
    float *squares, *host_squares;                      // (layout.num_chunks)
    int keeps_keys, first;       // as in train_gpas.c
    int learning;                // 1 between zero_gradients() and model_update()
    int backward_begun;          // 1: output_forward() has begun the backward pass
    DeviceArrays arrays;         // those of the arrays above that are on the GPU
};

// Calls f with the model's network, which is a Network<bf16> or a Network<float>.
template <class Function> static auto with_network(const Model *m, Function f) {
    if (m->options->dtype == DTYPE_BF16) return f((Network<bf16> *)m->network);
    return f((Network<float> *)m->network);
}

// Returns a tensor's place in `block`, an array of all tensors, or NULL if the network lacks it.
template <class number> static number *parameter(const Model *m, number *block, int kind, int l) {
    size_t offset = offset_of(&m->layout, kind, l);
    return offset == ABSENT ? NULL : block + offset;
}

// Returns the weight of the norm of sublayer i, or of the final norm if i = 2L, in `block`.
static float *norm_weight(const Model *m, float *block, int i) {
    if (i == 2 * m->config.L) return parameter(m, block, FINAL_NORM, -1);
    return parameter(m, block, i % 2 == 0 ? ATTENTION_NORM : FFN_NORM, i / 2);
}

template <class number>
static LayerParameters<number> layer_parameters(const Model *m, number *block, int l) {
    auto at = [&](int kind) { return parameter(m, block, kind, l); };
    return {at(WQ), at(WO), at(W1), at(W2), {at(ATTENTION_NORM), at(FFN_NORM)},
            {at(ATTENTION_POST_NORM), at(FFN_POST_NORM)}, at(GATE)};
}

static Gate layer_gate(const Model *m, int l) {
    return {parameter(m, m->parameters, GATE, l), m->config.gate_activation, m->config.stop_grad};
}

// Creates the arrays of sublayer i = 0 .. 2L-1 for N tokens. If `lender` is another sublayer, i
// shares its hidden, pre_act and, unless m->keeps_keys, qkv.
template <class real>
static void create_activations(Model *m, Network<real> *net, int i, int lender, size_t N) {
    const Config *c = &m->config;
    DeviceArrays *r = &m->arrays;
    size_t C = c->C, H = m->H;
    Activations<real> *a = &net->activations[i];
    *a = net->activations[lender];
    new_array(r, &a->rstd, N);
    new_array(r, &a->normed, N * C);
    new_array(r, &a->sum, N * C);
    if (i % 2 == 0) new_array(r, &a->lse, N * c->NH);
    if (i % 2 == 0 && (lender == i || m->keeps_keys)) new_array(r, &a->qkv, 3 * N * C);
    if (i % 2 == 1 && lender == i) new_array(r, &a->pre_act, 2 * N * H);
    if (lender == i) new_array(r, &a->hidden, N * (i % 2 ? H : C));
    if (i == 0 || has_post_norm(c)) new_array(r, &a->branch, N * C);
    else a->branch = net->activations->branch;
    if (has_post_norm(c)) new_array(r, &a->post_rstd, N);
    if (c->gpas && !m->options->fused) new_array(r, &a->scaled, N * C);
}

// The logits of N tokens would be the largest array of all, so they are computed for a quarter of
// the tokens at a time. Returns this number, rounded up to a multiple of 64.
static int logit_rows(int N) { return imin(N, ((N + 3) / 4 + 63) / 64 * 64); }

// Creates all arrays for B sequences. Called twice: to count their bytes, and to allocate them.
template <class real>
static void create_arrays(Model *m, Network<real> *net, int B, int training) {
    const Config *c = &m->config;
    DeviceArrays *r = &m->arrays;
    size_t T = c->T, C = c->C, H = m->H, N = B * T;
    int share = m->options->recompute || !training;
    new_array(r, &m->parameters, m->layout.size);
    net->weights = (real *)m->parameters;
    if (sizeof(real) < sizeof(float)) new_array(r, &net->weights, m->layout.size);
    new_array(r, &net->embedded, N * C);
    for (int i = 0; i < 2 * c->L; i++) create_activations(m, net, i, share ? i % 2 : i, N);
    if (has_post_norm(c)) new_array(r, &net->post_normed, N * C);
    new_array(r, &net->activations[2 * c->L].normed, N * C);
    new_array(r, &net->activations[2 * c->L].rstd, N);
    new_array(r, &net->logits, (size_t)logit_rows(N) * m->V);
    new_array(r, &m->losses, N);
    new_array(r, &m->rope_table, T * (C / c->NH));
    new_array(r, &m->tokens, N);
    new_array(r, &m->targets, N);
    if (!training) return;
    new_array(r, &m->gradients, m->layout.size);
    new_array(r, &m->adam_m, m->layout.size);
    new_array(r, &m->adam_v, m->layout.size);
    new_array(r, &m->chunks, m->layout.num_chunks);
    new_array(r, &m->squares, m->layout.num_chunks);
    new_array(r, &m->doutput, m->V * C);
    new_array(r, &m->occurrences.positions, N);
    new_array(r, &m->occurrences.segments, N);
    new_array(r, &net->dx, N * C);
    if (norm_comes_last(c, 0)) new_array(r, &net->dsum, N * C);
    if (has_post_norm(c)) new_array(r, &net->dbranch, N * C);
    new_array(r, &net->dhidden, N * (C > H ? C : H));
    new_array(r, &net->dqkv, N * (3 * C > 2 * H ? 3 * C : 2 * H));
    net->dpre_act = net->dqkv;
    new_array(r, &net->dfinp, N * C);
    if (!norm_comes_last(c, c->L - 1)) new_array(r, &net->dx_branch, N * C);
}

// Counts the GPU memory, exits if there is too little, and allocates it.
template <class real>
static void create_network(Model *m, Network<real> *net, int B, int training) {
    enum { SPARE = 1 << 30 };  // bytes for CUDA and cuBLASLt, which load their kernels on first use
    size_t free_bytes, total_bytes;
    net->activations = (Activations<real> *)allocate(2 * m->config.L + 1,
                                                     sizeof(Activations<real>));
    create_arrays(m, net, B, training);
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    size_t needed = m->arrays.bytes + SPARE;
    if (needed > free_bytes)
        die("not enough GPU memory: %zu MiB needed, %zu of %zu MiB free; lower --batch or "
            "--seq-len%s", needed >> 20, free_bytes >> 20, total_bytes >> 20,
            m->options->recompute || !training ? "" : ", or try --recompute on");
    begin_allocating(&m->arrays);
    create_arrays(m, net, B, training);
}

// Exits if the kernels cannot compute this network.
static void check_network(const Config *c, int dtype) {
    int wide = dtype == DTYPE_BF16 ? 8 : 4, W = c->C % wide ? 1 : wide, most = ROW_THREADS(W) * W;
    if (c->C / c->NH > MAX_HEAD)
        die("--channels %d divided by --heads %d is more than %d, the widest head on the GPU", c->C,
            c->NH, MAX_HEAD);
    if (c->C > most)
        die("--channels %d is more than %d, the most on the GPU for a number that is%s a multiple "
            "of %d", c->C, most, W == 1 ? " not" : "", wide);
}

void model_create(Model *m, const Options *o, int B, int training) {
    memset(m, 0, sizeof *m);
    m->options = o;
    m->config = config_of(o);
    m->keeps_keys = training ? !o->recompute : B == 1;  // else the layers share one qkv
    const Config *c = &m->config;
    size_t N = (size_t)B * c->T, angles = (size_t)c->T * (c->C / c->NH);
    check_network(c, o->dtype);
    open_device();
    m->layout = lay_out(c);
    m->list = m->layout.list;
    m->H = m->layout.H;
    m->V = m->layout.V;
    m->network = allocate(1, sizeof(Network<float>));  // Network<bf16> has the same size
    with_network(m, [&](auto *net) { create_network(m, net, B, training); });
    m->host_occurrences.positions = (int *)allocate(N, sizeof(int));
    m->host_occurrences.segments = (Segment *)allocate(N, sizeof(Segment));
    m->host_losses = (float *)allocate(N, sizeof(float));
    m->host_logits = (float *)allocate(2 * m->V, sizeof(float));
    m->host_squares = (float *)allocate(m->layout.num_chunks, sizeof(float));
    float *table = (float *)allocate(angles, sizeof(float));
    rope_angles(table, c->T, c->C / c->NH);
    upload(m->rope_table, table, angles);
    free(table);
    if (training) upload(m->chunks, m->layout.chunks, m->layout.num_chunks);
    for (float *block : {m->parameters, m->gradients, m->adam_m, m->adam_v})
        if (block) CUDA_CHECK(cudaMemset(block, 0, m->layout.size * sizeof(float)));
    m->host.o = o;
    m->host.list = m->list;
    m->host.parameters = (float *)allocate(m->list.size, sizeof(float));
    if (!*o->load && !*o->resume) initialize_parameters(m->host.parameters, &m->list, o->seed);
    model_restore(m);
}

void model_free(Model *m) {
    free_arrays(&m->arrays);
    with_network(m, [](auto *net) { free(net->activations); });
    free_layout(&m->layout);
    void *on_host[] = {
        m->host.parameters, m->host.gradients, m->host.adam_m, m->host.adam_v, m->host_losses,
        m->host_logits, m->host_occurrences.positions, m->host_occurrences.segments,
        m->host_squares, m->network,
    };
    for (void *memory : on_host) free(memory);
}

void model_device(const Model *m, char *text) {
    cudaDeviceProp device;
    CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
    snprintf(text, TEXT_SIZE, "%s, %zu MiB of memory used", device.name, m->arrays.bytes >> 20);
}

Snapshot model_snapshot(Model *m) {
    float **host[] = {&m->host.parameters, &m->host.gradients, &m->host.adam_m, &m->host.adam_v};
    float *device[] = {m->parameters, m->gradients, m->adam_m, m->adam_v};
    for (int i = 0; i < 4 && device[i]; i++) {
        if (!*host[i]) *host[i] = (float *)allocate(m->list.size, sizeof(float));
        copy_tensors(&m->layout, *host[i], device[i], cudaMemcpyDeviceToHost);
    }
    return m->host;
}

void model_restore(Model *m) {
    copy_tensors(&m->layout, m->host.parameters, m->parameters, cudaMemcpyHostToDevice);
    if (m->host.adam_m) {
        copy_tensors(&m->layout, m->host.adam_m, m->adam_m, cudaMemcpyHostToDevice);
        copy_tensors(&m->layout, m->host.adam_v, m->adam_v, cudaMemcpyHostToDevice);
    }
    with_network(m, [&](auto *net) {
        if ((void *)net->weights == m->parameters) return;  // in fp32
        scale_array(net->weights, m->parameters, 1, 0, m->layout.size);
    });
}

// Computes the branch f of layer l, attention (sub = 0) or the feed-forward network (sub = 1):
// out = f(inp), for the positions from `first` to T - 1 of B sequences, as in train_gpas.c.
// out, inp (rows,C). With out = NULL it stops before the last matrix.
template <class real>
static void branch_forward(const Model *m, const Network<real> *net, int l, int sub, real *out,
                           const real *inp, int first, int B, int T) {
    int C = m->config.C, H = m->H, NH = m->config.NH, rows = B * (T - first);
    LayerParameters<real> w = layer_parameters(m, net->weights, l);
    const Activations<real> *a = &net->activations[2 * l + sub];
    if (sub == 0) {
        real *qkv = a->qkv + (size_t)first * 3 * C;  // the rows before hold earlier positions
        const float *table = m->rope_table + (size_t)first * (C / NH);
        matmul_forward(qkv, inp, w.wqkv, rows, C, 3 * C);
        rope_forward(qkv, table, B, T - first, C, C / NH);
        attention_forward(a->hidden, a->lse, a->qkv, first, B, T, C, NH);
        if (out) matmul_forward(out, a->hidden, w.wo, rows, C, C);
    } else {
        matmul_forward(a->pre_act, inp, w.w13, rows, C, 2 * H);
        swiglu_forward(a->hidden, a->pre_act, rows, H);
        if (out) matmul_forward(out, a->hidden, w.w2, rows, H, C);
    }
}

// Given dout, the gradient of the branch's output, computes dinp, that of its input. All (B,T,C).
template <class real>
static void branch_backward(const Model *m, const Network<real> *net, int l, int sub, real *dinp,
                            const real *dout, const real *inp, int B, int T) {
    int C = m->config.C, H = m->H, NH = m->config.NH, N = B * T;
    LayerParameters<real> w = layer_parameters(m, net->weights, l);
    LayerParameters<float> d = layer_parameters(m, m->gradients, l);
    const Activations<real> *a = &net->activations[2 * l + sub];
    if (sub == 0) {
        matmul_backward(net->dhidden, d.wo, dout, a->hidden, w.wo, N, C, C);
        const float *table = m->options->fused ? m->rope_table : NULL;  // off: rope_backward
        attention_backward(net->dqkv, net->dhidden, a->hidden, a->lse, a->qkv, table, B, T, C, NH);
        if (!table) rope_backward(net->dqkv, m->rope_table, B, T, C, C / NH);
        matmul_backward(dinp, d.wqkv, net->dqkv, inp, w.wqkv, N, C, 3 * C);
    } else {
        matmul_backward(net->dhidden, d.w2, dout, a->hidden, w.w2, N, H, C);
        swiglu_backward(net->dpre_act, net->dhidden, a->pre_act, N, H);
        matmul_backward(dinp, d.w13, net->dpre_act, inp, w.w13, N, C, 2 * H);
    }
}

/*
How the fused kernels fit together. Sublayer i is 2 l + sub. The final norm and the output matrix
count as the norm and the branch of sublayer 2L. At the end of a norm-first sublayer i, the kernel
also computes the norm of sublayer i + 1. In the backward pass, the kernel of sublayer i begins by
adding to dx the gradient that comes back from the branch of sublayer i + 1.
*/

// Returns 1 if sublayer i ends with the fused kernel that computes the next norm.
static int computes_next_norm(const Model *m, int i) {
    return m->options->fused && i >= 0 && !norm_comes_last(&m->config, i / 2);
}

// Returns 1 if the fused backward kernel of sublayer i adds the gradient from the next branch to
// dx. Otherwise the next sublayer has added it.
static int adds_next_branch(const Model *m, int i) {
    const Config *c = &m->config;
    int next_norm_last = i + 1 < 2 * c->L && norm_comes_last(c, (i + 1) / 2);
    return computes_next_norm(m, i) || (m->options->fused && i >= 0 && next_norm_last);
}

// Returns the arguments of the fused kernels of layer l, except for what only one of them needs.
template <class real>
static Fused<real> fused_arguments(const Model *m, const Network<real> *net, int l, int sub,
                                   int N) {
    const Config *c = &m->config;
    int i = 2 * l + sub, norm_last = norm_comes_last(c, l), norm_at = norm_last ? i : i + 1;
    Gate gate = layer_gate(m, l);
    Fused<real> f = {};
    f.N = N;
    f.C = c->C;
    f.weight = norm_weight(m, m->parameters, norm_at);
    f.A = shortcut_scale(c);
    // With the norm first, x still lacks the GPAS of sublayer i - 1, if that was norm first too.
    if (norm_last) f.inp_gate = gate.g;
    else if (computes_next_norm(m, i - 1)) f.inp_gate = layer_gate(m, (i - 1) / 2).g;
    if (!norm_last) f.sum_gate = gate.g;
    f.activation = gate.activation;
    f.stop_grad = gate.stop_grad;
    f.inp = net->activations[i].inp;
    f.sum = net->activations[i].sum;
    f.normed = net->activations[norm_at].normed;
    f.rstd = net->activations[norm_at].rstd;
    return f;
}

/*
One sublayer of any of the twelve networks, as in train_gpas.c. G is GPAS if it is on:

    pre, lns, sandwich    y = G(x + f(norm(x)))       norm first; sandwich: post_norm(f(norm(x)))
    post, deepnorm        y = norm(A G(x) + f(x))     norm last
    mix                   the first L/4 layers norm last, the others norm first

Computes y from x for the positions from `first` to T - 1 of B sequences. x and y (rows,C). With
--fused on it returns s instead of y where the norm comes first.
*/
template <class real>
static const real *sublayer_forward(const Model *m, const Network<real> *net, int l, int sub,
                                    const real *x, int first, int B, int T) {
    const Config *c = &m->config;
    int C = c->C, i = 2 * l + sub, rows = B * (T - first), norm_last = norm_comes_last(c, l);
    size_t n = (size_t)rows * C;
    Activations<real> *a = &net->activations[i];
    LayerParameters<float> w = layer_parameters(m, m->parameters, l);
    a->inp = x;
    if (!norm_last && !computes_next_norm(m, i - 1))
        rmsnorm_forward(a->normed, a->rstd, x, w.norm[sub], rows, C);          // norm(x)
    branch_forward(m, net, l, sub, a->branch, norm_last ? x : a->normed, first, B, T);
    const real *b = a->branch;                                                 // b = f(...)
    if (has_post_norm(c)) {                                                    // b = post_norm(b)
        rmsnorm_forward(net->post_normed, a->post_rstd, b, w.post_norm[sub], rows, C);
        b = net->post_normed;
    }
    if (m->options->fused) {                                                   // all three
        Fused<real> f = fused_arguments(m, net, l, sub, rows);
        f.branch = b;
        residual_gpas_rmsnorm_forward(f);
        a->out = norm_last ? a->normed : a->sum;
    } else if (!norm_last) {
        residual_forward(a->sum, x, b, 1, n);                                  // s = x + b
        a->out = a->sum;
        if (c->gpas) {                                                         // y = GPAS(s)
            gpas_forward(a->scaled, a->sum, layer_gate(m, l), n);
            a->out = a->scaled;
        }
    } else {
        if (c->gpas) gpas_forward(a->scaled, x, layer_gate(m, l), n);          // z = GPAS(x)
        residual_forward(a->sum, c->gpas ? a->scaled : x, b, shortcut_scale(c), n);  // s = A z + b
        rmsnorm_forward(a->normed, a->rstd, a->sum, w.norm[sub], rows, C);     // y = norm(s)
        a->out = a->normed;
    }
    return a->out;
}

/*
The same sublayer backwards. Given dy, compute dx. train_gpas.c has the derivation; in short:

    norm first    ds = dy,         dg -= a'(g) sum_i s_i dy_i,   dx = ds + norm^T f^T post_norm^T ds
    norm last     ds = norm^T dy,  dz = A ds,  dg -= a'(g) sum_i x_i dz_i,        dx = dz + f^T ds

The gradient of the stream stays in one array, dx: it holds dy on entry and dx at the end, when it
is returned. But if the fused kernel of sublayer i - 1 adds the gradient from this branch, we return
only ds or dz. If not, we add this gradient here, and set dfinp to 0, because the fused kernel of
sublayer i - 1 would otherwise add it again.
*/
template <class real>
static real *sublayer_backward(const Model *m, const Network<real> *net, int l, int sub, real *dx,
                               int B, int T) {
    const Config *c = &m->config;
    int C = c->C, i = 2 * l + sub, N = B * T, norm_last = norm_comes_last(c, l);
    size_t n = (size_t)N * C;
    LayerParameters<float> w = layer_parameters(m, m->parameters, l);
    LayerParameters<float> d = layer_parameters(m, m->gradients, l);
    const Activations<real> *a = &net->activations[i];
    const real *x = a->inp, *finp = norm_last ? x : a->normed;  // finp: the input of f
    real *db = norm_last ? net->dsum : dx;                      // db = ds
    float *dgate = c->gate_train ? d.gate : NULL;
    if (m->options->recompute && l < c->L - 1)  // the arrays of the last layer are still there
        branch_forward<real>(m, net, l, sub, NULL, finp, 0, B, T);
    if (m->options->fused) {                                    // dg; ds; norm last: dz
        Fused<real> f = fused_arguments(m, net, l, sub, N);
        f.dfinp = net->dfinp;
        f.dx = dx;
        f.dsum = net->dsum;
        f.dweight = norm_weight(m, m->gradients, norm_last ? i : i + 1);
        f.dgate = dgate;
        residual_gpas_rmsnorm_backward(f, norm_last);
    } else {
        if (norm_last) {
            rmsnorm_backward(db, d.norm[sub], dx, a->sum, w.norm[sub], a->rstd, N, C);
            residual_backward(dx, db, shortcut_scale(c), n);                   // dz = A ds
        }
        if (c->gpas)                                                           // dg; ds or dz stays
            gpas_backward(dx, dgate, dx, norm_last ? x : a->sum, layer_gate(m, l), n);
    }
    if (has_post_norm(c)) {                                                    // post_norm^T ds
        rmsnorm_backward(net->dbranch, d.post_norm[sub], db, a->branch, w.post_norm[sub],
                         a->post_rstd, N, C);
        db = net->dbranch;
    }
    branch_backward(m, net, l, sub, net->dfinp, db, finp, B, T);               // dfinp = f^T db
    if (adds_next_branch(m, i - 1)) return dx;
    if (norm_last) {
        residual_forward(dx, dx, net->dfinp, 1, n);                            // dz + dfinp
    } else {
        rmsnorm_backward(net->dx_branch, d.norm[sub], net->dfinp, x, w.norm[sub], a->rstd, N, C);
        residual_forward(dx, dx, net->dx_branch, 1, n);                        // ds + norm^T dfinp
    }
    if (m->options->fused) CUDA_CHECK(cudaMemset(net->dfinp, 0, n * sizeof(real)));
    return dx;
}

// Computes the output of the final norm for the positions from `first` to T - 1 of B sequences,
// whose tokens (rows) are in m->tokens.
template <class real>
static void network_forward(Model *m, const Network<real> *net, int first, int B, int T) {
    int C = m->config.C, L = m->config.L, rows = B * (T - first);
    embedding_forward(net->embedded, m->tokens, parameter(m, m->parameters, EMBEDDING, -1), rows,
                      C);
    const real *x = net->embedded;
    for (int l = 0; l < L; l++) {
        x = sublayer_forward(m, net, l, 0, x, first, B, T);
        x = sublayer_forward(m, net, l, 1, x, first, B, T);
    }
    Activations<real> *end = &net->activations[2 * L];
    if (!computes_next_norm(m, 2 * L - 1))
        rmsnorm_forward(end->normed, end->rstd, x, norm_weight(m, m->parameters, 2 * L), rows, C);
    m->first = first;
    m->backward_begun = 0;
}

// Computes the logits and losses of N tokens, part by part. Whatever needs the logits must be done
// before the next part takes their place. So if `learning` is set, the backward pass through the
// output matrix is done here. The weight of the losses is not known yet, so it is taken to be 1.
// Later network_backward() multiplies the results by the weight: net->dfinp, the gradient of the
// final norm's output, and m->doutput, that of the output matrix.
template <class real>
static void output_forward(Model *m, const Network<real> *net, int N, int learning) {
    int C = m->config.C, V = m->config.V, rows = logit_rows(N);
    const real *output = parameter(m, net->weights, OUTPUT, -1);
    const real *final_normed = net->activations[2 * m->config.L].normed;
    if (learning) CUDA_CHECK(cudaMemset(m->doutput, 0, (size_t)m->V * C * sizeof(float)));
    for (int n = 0; n < N; n += rows) {
        int part = imin(rows, N - n);
        const real *x = final_normed + (size_t)n * C;
        real *dx = net->dfinp + (size_t)n * C;
        matmul_forward(net->logits, x, output, part, C, m->V);
        crossentropy(m->losses + n, net->logits, m->targets + n, learning ? 1 : 0, part, V, m->V);
        if (learning) matmul_backward(dx, m->doutput, net->logits, x, output, part, C, m->V);
    }
    m->backward_begun = learning;
}

// The backward pass from the losses, each with weight `scale`, to the embedding.
template <class real>
static void network_backward(Model *m, const Network<real> *net, float scale, int B, int T) {
    int C = m->config.C, L = m->config.L, N = B * T;
    size_t n = (size_t)N * C;
    real *dx = net->dx;
    if (!m->backward_begun) output_forward(m, net, N, 1);
    m->backward_begun = 0;  // dfinp is about to change
    scale_array(net->dfinp, net->dfinp, scale, 0, n);
    scale_array(parameter(m, m->gradients, OUTPUT, -1), m->doutput, scale, 1, (size_t)m->V * C);
    if (adds_next_branch(m, 2 * L - 1)) {
        CUDA_CHECK(cudaMemset(dx, 0, n * sizeof(real)));  // the fused kernel adds to it
    } else {
        rmsnorm_backward(dx, norm_weight(m, m->gradients, 2 * L), net->dfinp,
                         net->activations[2 * L - 1].out, norm_weight(m, m->parameters, 2 * L),
                         net->activations[2 * L].rstd, N, C);
        CUDA_CHECK(cudaMemset(net->dfinp, 0, n * sizeof(real)));  // it is in dx now
    }
    for (int l = L - 1; l >= 0; l--) {
        dx = sublayer_backward(m, net, l, 1, dx, B, T);
        dx = sublayer_backward(m, net, l, 0, dx, B, T);
    }
    embedding_backward(parameter(m, m->gradients, EMBEDDING, -1), dx, m->occurrences, C);
}

// Runs the network on the positions from `first` to T - 1 of B sequences. With targets, it writes
// their losses to m->host_losses. tokens, targets (rows), on the host.
static void forward(Model *m, const int *tokens, const int *targets, int first, int B, int T) {
    int rows = B * (T - first);
    upload(m->tokens, tokens, rows);
    with_network(m, [&](auto *net) { network_forward(m, net, first, B, T); });
    if (!targets) return;
    upload(m->targets, targets, rows);
    with_network(m, [&](auto *net) { output_forward(m, net, rows, m->learning); });
    // The host sorts while the GPU computes. The next copy waits for the GPU.
    if (m->gradients) sort_by_token(&m->host_occurrences, tokens, rows, m->config.V);
    CUDA_CHECK(cudaMemcpy(m->host_losses, m->losses, rows * sizeof(float), cudaMemcpyDeviceToHost));
}

double model_forward(Model *m, const int *tokens, const int *targets, int B, int T) {
    forward(m, tokens, targets, 0, B, T);
    return targets ? mean(m->host_losses, B * T) : 0;
}

// As in train_gpas.c, the keys and values of the positions before `first` are still in qkv.
double model_extend(Model *m, const int *tokens, const int *targets, int first, int T) {
    int from = m->keeps_keys ? first : 0;
    forward(m, tokens + from, targets ? targets + from : NULL, from, 1, T);
    return targets ? mean(m->host_losses + first - from, T - first) : 0;
}

// It does not need tokens and targets, because forward() has sorted the positions by token, and the
// targets are on the GPU.
void model_backward(Model *m, const int *, const int *, int B, int T, double scale) {
    upload_occurrences(&m->occurrences, &m->host_occurrences);
    with_network(m, [&](auto *net) { network_backward(m, net, (float)scale, B, T); });
}

// Computes the logits of one row again: only those of the last part are still in memory.
template <class real> static void logits_of(const Model *m, const Network<real> *net, int row) {
    int C = m->config.C;
    real *rounded = (real *)(m->host_logits + m->V);  // on the host
    const real *x = net->activations[2 * m->config.L].normed + (size_t)row * C;
    matmul_forward(net->logits, x, parameter(m, net->weights, OUTPUT, -1), 1, C, m->V);
    CUDA_CHECK(cudaMemcpy(rounded, net->logits, m->V * sizeof(real), cudaMemcpyDeviceToHost));
    for (int v = 0; v < m->V; v++) m->host_logits[v] = rounded[v];
}

const float *model_logits(Model *m, int n) {
    with_network(m, [&](auto *net) { logits_of(m, net, n - m->first); });
    return m->host_logits;
}

void zero_gradients(Model *m) {
    CUDA_CHECK(cudaMemset(m->gradients, 0, m->layout.size * sizeof(float)));
    m->learning = 1;
}

void layer_state(Model *m, int l, int B, int T, double variances[2], double *gate) {
    size_t n = (size_t)B * T * m->config.C;
    Gate g = layer_gate(m, l);
    float value = NAN, scale = 1;
    if (g.g) CUDA_CHECK(cudaMemcpy(&value, g.g, sizeof value, cudaMemcpyDeviceToHost));
    if (g.g && computes_next_norm(m, 2 * l))  // `out` is s, which GPAS has not scaled yet
        scale = 1 - gate_value(value, g.activation);
    with_network(m, [&](auto *net) {
        for (int s = 0; s < 2; s++)
            variances[s] = variance(net->activations[2 * l + s].out, n) * scale * scale;
    });
    *gate = value;
}

/* ------------------------------------------------------------------------------------------------
4. AdamW

The tensors lie in one array, and one kernel updates all of them, because a launch takes longer than
the update of a small tensor. They are cut into chunks of at most CHUNK numbers, none of which spans
two tensors, and each block takes a chunk.
*/

typedef struct {
    float lr, beta1, beta2, eps, weight_decay;
    float clip, gate_clip;     // factors for the gradient, the second one for gates
    float unbias_m, unbias_v;  // 1 / (1 - beta1^t), 1 / (1 - beta2^t)
    int train_gates;
} AdamW;

// Makes the update of train_gpas.c. weights: the copy for matrix products, rounded to `real`; in
// fp32 it is the same array as p.
template <class real>
__global__ void adamw_kernel(real *weights, float *p, const float *grad, float *m, float *v,
                             const Chunk *chunks, AdamW adam) {
    Chunk chunk = chunks[blockIdx.x];
    if (chunk.kind == GATE && !adam.train_gates) return;
    float clip = chunk.kind == GATE ? adam.gate_clip : adam.clip;
    float decay = chunk.decays ? adam.weight_decay : 0;
    for (int k = threadIdx.x; k < chunk.size; k += blockDim.x) {
        size_t i = chunk.offset + k;
        float dp = grad[i] * clip, x = p[i];
        float mi = adam.beta1 * m[i] + (1 - adam.beta1) * dp;
        float vi = adam.beta2 * v[i] + (1 - adam.beta2) * dp * dp;
        float mhat = mi * adam.unbias_m, vhat = vi * adam.unbias_v;
        x -= adam.lr * (mhat / (sqrtf(vhat) + adam.eps) + decay * x);
        m[i] = mi;
        v[i] = vi;
        p[i] = x;
        weights[i] = x;
    }
}

// t = 1, 2, ...: the number of this update, from which the fields unbias_m and unbias_v follow.
template <class real>
static void adamw_update(real *weights, float *p, const float *grad, float *m, float *v,
                         const Chunk *chunks, int num_chunks, AdamW adam, int t) {
    adam.unbias_m = (float)(1 / (1 - pow(adam.beta1, t)));
    adam.unbias_v = (float)(1 / (1 - pow(adam.beta2, t)));
    adamw_kernel<real><<<num_chunks, 256>>>(weights, p, grad, m, v, chunks, adam);
    LAUNCH_CHECK();
}

// Computes squares[i], the sum of the squared gradients in chunk i.
__global__ void squares_kernel(float *squares, const float *grad, const Chunk *chunks) {
    Chunk chunk = chunks[blockIdx.x];
    float sum = 0;
    for (int k = threadIdx.x; k < chunk.size; k += blockDim.x)
        sum += grad[chunk.offset + k] * grad[chunk.offset + k];
    sum = block_sum(sum);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

double gradient_norms(Model *m, double *layers, double *gates) {
    double sum = 0, gate_sum = 0;
    squares_kernel<<<m->layout.num_chunks, 256>>>(m->squares, m->gradients, m->chunks);
    LAUNCH_CHECK();
    CUDA_CHECK(cudaMemcpy(m->host_squares, m->squares, m->layout.num_chunks * sizeof(float),
                          cudaMemcpyDeviceToHost));
    for (int l = 0; l < m->config.L; l++) layers[l] = 0;
    for (int i = 0; i < m->layout.num_chunks; i++) {
        const Chunk *chunk = &m->layout.chunks[i];
        double square = m->host_squares[i];
        sum += square;
        if (chunk->layer >= 0) layers[chunk->layer] += square;
        if (chunk->kind == GATE) gate_sum += square;
    }
    for (int l = 0; l < m->config.L; l++) layers[l] = sqrt(layers[l]);
    *gates = sqrt(gate_sum);
    return sqrt(sum);
}

// Makes the AdamW update of one step; steps count from 0. Weight decay applies to matrices only.
// Gates are clipped by their own factor.
void model_update(Model *m, int step, double grad_norm, double gate_norm) {
    const Options *o = m->options;
    double clip, gate_clip;
    clip_factors(o, grad_norm, gate_norm, &clip, &gate_clip);
    AdamW adam = {.lr = (float)learning_rate(o, step), .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f,
                  .weight_decay = (float)o->weight_decay, .clip = (float)clip,
                  .gate_clip = (float)gate_clip, .unbias_m = 0, .unbias_v = 0,
                  .train_gates = m->config.gate_train};
    with_network(m, [&](auto *net) {
        adamw_update(net->weights, m->parameters, m->gradients, m->adam_m, m->adam_v, m->chunks,
                     m->layout.num_chunks, adam, step + 1);
    });
    m->learning = 0;
}

/* ------------------------------------------------------------------------------------------------
5. Training
*/

const char program[] = "train_gpas_cuda", default_dtype[] = "bf16";
const int on_gpu = 1;

// Makes one training step: computes the gradient of the mean loss over --total-batch sequences, in
// micro-batches of --batch, and updates the parameters. Returns the loss, and writes the norm of
// the gradient before clipping to *grad_norm.
static double train_step(Run *run, double *grad_norm) {
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
    *grad_norm = gradient_norms(m, run->layer_norms, &gate_norm);
    if (!isfinite(*grad_norm)) stop_not_finite(run, loss);
    model_update(m, run->progress.step, *grad_norm, gate_norm);
    run->progress.step++;
    return loss;
}

// Trains for --steps steps, or until a signal asks it to stop.
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
        double grad_norm, val = NAN, lr = learning_rate(o, run->progress.step);
        double start = omp_get_wtime();
        double loss = train_step(run, &grad_norm);
        double ms = 1000 * (omp_get_wtime() - start);
        int step = run->progress.step, last = step == o->steps;
        if (last || (o->val_every && step % o->val_every == 0)) {
            val = validate(run);
            if (!isfinite(val)) stop_not_finite(run, val);
            log_layers(run);
        }
        log_step(run, loss, val, lr, grad_norm, ms);
        report(run, loss, val, lr, grad_norm, ms);
        if (last || (o->sample_every && step % o->sample_every == 0)) sample(run);
        if (last || stop_signal || (o->save_every && step % o->save_every == 0)) save(run);
    } while (run->progress.step < o->steps && !stop_signal);
    if (run->progress.step < o->steps)
        printf("\nStopped. To continue: ./%s --resume %s/ckpt_%06d.safetensors\n", program, o->out,
               run->progress.step);
    else printf("Logs, stories and checkpoints are in %s.\n", o->out);
}

#ifndef TRAIN_GPAS_NO_MAIN
int main(int argc, char **argv) {
    static Options options;
    static Model model;
    static Run run;
    open_standard_files();
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
            fprintf(stderr, "%s: without --load the story is an untrained network's\n", program);
        tell_story(&model, &options, &run.tokenizer, &run.progress.rng_state, stdout);
    }
    close_run(&run);
    if (stop_signal) return 128 + stop_signal;
    finish_output();
    return 0;
}
#endif
