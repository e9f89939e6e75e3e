/*
train_gpas.c: a LLaMA-like Transformer with GPAS, trained on the CPU. One file, no framework.

Each layer of a Transformer adds something to the residual stream: x = x + f(x). In Pre-LN, the
usual kind, the input of f is normalized but its output is not. So the variance of x grows with
depth, until what the last layers add hardly changes it. GPAS (Gradient-Preserving Activation
Scaling, arXiv 2506.22049) scales x down after each sum, by one learned number g per layer, the
gate:

    y = x - a(g) sg(x)       a = SiLU, so a(0) = 0: at the start GPAS does nothing

sg() is the stop-gradient: it returns its argument, and its derivative counts as 0. Forward, y is
(1 - a(g)) x. Backward, sg(x) is a constant, so dx = dy: the gradient passes as if nothing had been
scaled. That is the whole idea, and gpas_forward() and gpas_backward() below are all of it.

A layer consists of two sublayers: f is attention in the first, a feed-forward network in the
second. Each has a GPAS, and both use the layer's gate. N and N' are norms, A is a constant:

    norm first    x ---+----------------------> (+) ---> GPAS ---> y        pre, lns, most of mix
                       |                         ^
                       +---> N ---> f -----------+

    sandwich      x ---+----------------------> (+) ---> GPAS ---> y
                       |                         ^
                       +---> N ---> f ---> N' ---+

    norm last     x ---+---> GPAS ---> A -----> (+) ---> N ------> y        post, deepnorm
                       |                         ^
                       +---> f ------------------+

    through GPAS  x =======> (1 - a(g)) x      forward: scaled
                  dx <====== dy                backward: not scaled

Contents: 1 GPAS. 2 The other layers. 3 The model: sublayers, then the network. 4 AdamW. 5 Training.
Whatever teaches nothing about GPAS is in the headers below.

Conventions. B batch, T sequence length, C channels, H feed-forward width, L layers, NH heads,
hs = C/NH, V vocabulary, N = B T rows. Arrays are row-major; comments give their shapes: (B,T,C).
dx is the gradient of the loss with respect to x. A backward pass is given dout. It WRITES the
gradient of its input, and ADDS to the gradients of its parameters, because those are summed over
micro-batches. In derivations x, y, w stand for inp, out, weight.
`omp parallel for` splits the iterations of the next loop among threads; `simd` lets the compiler do
several in one instruction. No sum depends on the number of threads, so neither does any result.
*/
#include "dev/gemm.h"          // defines: Matrix, transpose, gemm, dot, exp_fast
#include "dev/gate.h"          // defines: gate_value, gate_slope: a(g) and its derivative a'(g)
#include "dev/parameters.h"    // defines: Config, norm_comes_last, ...; TensorList, rope_angles
#include "dev/arrays.h"        // defines: Arrays, new_array, check_arrays
#include "dev/schedule.h"      // defines: learning_rate, clip_factors
#include "dev/command_line.h"  // defines: Options, parse_options
#include "dev/run.h"           // defines: Run, open_run, close_run, validate
#include "dev/logs.h"          // defines: open_logs, log_step, ..., save, sample, report
#include "dev/evaluation.h"    // defines: evaluate

/* ------------------------------------------------------------------------------------------------
1. GPAS
*/

// GPAS, paper section 3: y = x - a(g) sg(x). Forward, sg(x) is x, so y = (1 - a(g)) x.
// out, inp (n); gate: the number g; activation: which a (GATE_SILU, ...).
static void gpas_forward(float *out, const float *inp, float gate, int activation, size_t n) {
    float scale = 1 - gate_value(gate, activation);
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) out[i] = scale * inp[i];
}

// Given dy, compute dx and dg.
//   dx: sg(x) counts as a constant when we differentiate, so dy/dx = 1, and       dx = dy
//       This is deliberately not the derivative of y = (1 - a) x, which would be (1 - a) dy: with
//       that, the gradient would shrink by 1 - a at each of the 2L sites, and the first layer would
//       get only about (1 - a)^(2L) of it.
//   dg: dy_i/dg = -a'(g) x_i for each element i, so                   dg = -a'(g) sum_i x_i dy_i
//       A layer's two sites share its gate, so both add to dg.
// With stop_grad 0 there is no sg(), only a plain learned scale: then dx = (1 - a) dy, and dg is
// the same. dinp, dout, inp (n), dinp may be dout; dgate: one number, or NULL if the gate is fixed.
static void gpas_backward(float *dinp, float *dgate, const float *dout, const float *inp,
                          float gate, int activation, int stop_grad, size_t n) {
    if (dgate) *dgate -= gate_slope(gate, activation) * (float)dot(inp, dout, n);
    if (stop_grad && dinp == dout) return;  // dx = dy is already there
    float scale = stop_grad ? 1 : 1 - gate_value(gate, activation);
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) dinp[i] = scale * dout[i];  // after dot(): dinp may be dout
}

/* ------------------------------------------------------------------------------------------------
2. The other layers
*/

// The residual sum y = A x + b: x is the shortcut, b the branch. A is DeepNorm's constant, else 1.
// out, shortcut, branch (n); out may be shortcut.
static void residual_forward(float *out, const float *shortcut, const float *branch, float A,
                             size_t n) {
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) out[i] = A * shortcut[i] + branch[i];
}

// Given dy, compute dx. The gradient of the branch is dy itself.
//   dy/dx = A, dy/db = 1:  dx = A dy,  db = dy
// dshortcut, dout (n); dshortcut may be dout.
static void residual_backward(float *dshortcut, const float *dout, float A, size_t n) {
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) dshortcut[i] = A * dout[i];
}

// Looks up each token's row of the table: out[n,:] = weight[tokens[n],:].
// out (N,C); weight (V,C); tokens (N).
static void embedding_forward(float *out, const int *tokens, const float *weight, int N, int C) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        memcpy(out + (size_t)n * C, weight + (size_t)tokens[n] * C, C * sizeof(float));
}

// Given dy, compute dw.
//   A row of the table was copied to every position of its token, so its gradient is the sum over
//   those positions.
// dweight (V,C), added to; dout (N,C). Each thread owns some channels, so that no two threads add
// to the same number.
static void embedding_backward(float *dweight, const float *dout, const int *tokens, int N, int C) {
    enum { BLOCK = 32 };
    #pragma omp parallel for
    for (int c0 = 0; c0 < C; c0 += BLOCK) {
        for (int n = 0; n < N; n++) {
            float *dw = dweight + (size_t)tokens[n] * C;
            const float *dy = dout + (size_t)n * C;
            for (int c = c0; c < imin(C, c0 + BLOCK); c++) dw[c] += dy[c];
        }
    }
}

// RMSNorm (arXiv 1910.07467): y = w x r over the channels of each row, where
// r = 1 / sqrt(mean(x^2) + eps) and eps = 1e-6.
// out, inp (N,C); weight (C); rstd (N) keeps r for the backward pass.
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

// Given dy, compute dx and dw.
//   In one row let u_c = w_c dy_c, the gradient of x_c r. x_c occurs in its own y_c and, through r,
//   in every y_k. With r = (mean(x^2) + eps)^(-1/2):
//   dr/dx_c = -1/2 r^3 (2 x_c / C) = -r^3 x_c / C
//   dx_c = u_c r + sum_k u_k x_k dr/dx_c = r (u_c - x_c p),  where p = r^2 sum_k u_k x_k / C
//   dw_c = the sum over all rows of dy_c x_c r
// dinp, dout, inp (N,C); weight (C); rstd (N); dweight (C), added to. dinp must not be dout, which
// is read again for dw.
static void rmsnorm_backward(float *dinp, float *dweight, const float *dout, const float *inp,
                             const float *weight, const float *rstd, int N, int C) {
    enum { BLOCK = 32 };
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *x = inp + (size_t)n * C, *dy = dout + (size_t)n * C;
        float *dx = dinp + (size_t)n * C, r = rstd[n], sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) sum += weight[c] * dy[c] * x[c];
        float p = r * r * sum / C;
        #pragma omp simd
        for (int c = 0; c < C; c++) dx[c] = r * (weight[c] * dy[c] - x[c] * p);
    }
    #pragma omp parallel for
    for (int c0 = 0; c0 < C; c0 += BLOCK) {  // each thread owns some channels
        for (int n = 0; n < N; n++) {
            const float *x = inp + (size_t)n * C, *dy = dout + (size_t)n * C;
            for (int c = c0; c < imin(C, c0 + BLOCK); c++) dweight[c] += dy[c] * x[c] * rstd[n];
        }
    }
}

// RoPE (arXiv 2104.09864) rotates each pair (x0, x1) of adjacent channels of every query and key by
// an angle that is proportional to the position. If q is rotated by a and k by b, then q . k
// depends only on a - b, that is on how far apart the two positions are. Values are not rotated.
// qkv (B,T,3C), in place; table (T,hs/2,2) from rope_angles(): the cosine and sine of each angle.
// direction: 1, or -1 to rotate back.
static void rope_rotate(float *qkv, const float *table, int B, int T, int C, int hs,
                        int direction) {
    #pragma omp parallel for
    for (int n = 0; n < B * T; n++) {
        const float *angles = table + (size_t)(n % T) * hs;
        float *x = qkv + (size_t)n * 3 * C;
        for (int c = 0; c < 2 * C; c += hs) {  // all heads of q, then of k
            for (int j = 0; j < hs; j += 2) {
                float cosine = angles[j], sine = direction * angles[j + 1];
                float x0 = x[c + j], x1 = x[c + j + 1];
                x[c + j] = x0 * cosine - x1 * sine;
                x[c + j + 1] = x0 * sine + x1 * cosine;
            }
        }
    }
}

// y = R x for every pair x of queries and keys, R the rotation by the pair's angle.
static void rope_forward(float *qkv, const float *table, int B, int T, int C, int hs) {
    rope_rotate(qkv, table, B, T, C, hs, 1);
}

// Given dy, compute dx.
//   y = R x with a rotation R, so dx = R^T dy, and the transpose of a rotation is its inverse: the
//   rotation by the opposite angle.
// dqkv (B,T,3C), in place.
static void rope_backward(float *dqkv, const float *table, int B, int T, int C, int hs) {
    rope_rotate(dqkv, table, B, T, C, hs, -1);
}

// Returns 1 / (1 + e^-x). With s = sigmoid(x), its derivative is s (1 - s).
static inline float sigmoid(float x) { return 1 / (1 + exp_fast(-x)); }

// SwiGLU (arXiv 2002.05202): y = silu(h1) h3, where silu(x) = x sigmoid(x).
// out (N,H); inp (N,2H): a row holds the H values of h1 = w1 x, then those of h3 = w3 x.
static void swiglu_forward(float *out, const float *inp, int N, int H) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *h1 = inp + (size_t)n * 2 * H, *h3 = h1 + H;
        float *y = out + (size_t)n * H;
        #pragma omp simd
        for (int i = 0; i < H; i++) y[i] = h1[i] * sigmoid(h1[i]) * h3[i];
    }
}

// Given dy, compute dh1 and dh3.
//   With s = sigmoid(h1):  dh1 = dy h3 silu'(h1) = dy h3 (s + h1 s (1 - s))
//                          dh3 = dy silu(h1) = dy h1 s
// dinp, inp (N,2H); dout (N,H).
static void swiglu_backward(float *dinp, const float *dout, const float *inp, int N, int H) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *h1 = inp + (size_t)n * 2 * H, *h3 = h1 + H, *dy = dout + (size_t)n * H;
        float *dh1 = dinp + (size_t)n * 2 * H, *dh3 = dh1 + H;
        #pragma omp simd
        for (int i = 0; i < H; i++) {
            float s = sigmoid(h1[i]);
            dh1[i] = dy[i] * h3[i] * (s + h1[i] * s * (1 - s));
            dh3[i] = dy[i] * h1[i] * s;
        }
    }
}

/*
Matrix products. A Matrix {x, row, column} has its element (i,j) at x[i * row + j * column], so a
transpose is the same memory with the two strides swapped. gemm() computes C = A B, or C += A B.
gemm_packed() does the same on one thread, with a B that pack() has prepared. What follows says what
they compute; it is used by `make train_gpas PLAIN=1`, and then every operation of the network is in
this file. Otherwise dev/gemm.h has versions that are a hundred times faster.
*/
#ifdef PLAIN
static void gemm(float *c, size_t ldc, Matrix a, Matrix b, int M, int N, int K, int accumulate) {
    #pragma omp parallel for
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N; j++) {
            float sum = accumulate ? c[i * ldc + j] : 0;
            for (int k = 0; k < K; k++)
                sum += a.x[i * a.row + k * a.column] * b.x[k * b.row + j * b.column];
            c[i * ldc + j] = sum;
        }
    }
}

static Packed pack(int which, Matrix b, int K, int N, int rows) {
    (void)which, (void)K, (void)N, (void)rows;
    Packed unchanged = {b, NULL, 0};
    return unchanged;
}

static void gemm_packed(float *c, size_t ldc, Matrix a, Packed b, int M, int N, int K,
                        int accumulate) {
    gemm(c, ldc, a, b.b, M, N, K, accumulate);
}

static double dot(const float *a, const float *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)a[i] * (b ? b[i] : 1);
    return sum;
}

static inline float exp_fast(float x) { return expf(x); }
#endif

// A linear layer without bias: out = inp weight^T. out (N,OC); inp (N,C); weight (OC,C).
static void matmul_forward(float *out, const float *inp, const float *weight, int N, int C,
                           int OC) {
    gemm(out, OC, matrix(inp, C), transpose(matrix(weight, C)), N, OC, C, 0);
}

// Given dout, compute dinp and dweight.
//   out_no = sum_c inp_nc w_oc. Each inp_nc is used for all outputs o of its row n, and each w_oc
//   in all rows n:
//   dinp_nc = sum_o dout_no w_oc        dinp    = dout weight      (N,C) = (N,OC) (OC,C)
//   dw_oc   = sum_n dout_no inp_nc      dweight = dout^T inp       (OC,C) = (OC,N) (N,C)
// dinp, inp (N,C); dout (N,OC); weight, dweight (OC,C), dweight added to.
static void matmul_backward(float *dinp, float *dweight, const float *dout, const float *inp,
                            const float *weight, int N, int C, int OC) {
    gemm(dinp, C, matrix(dout, OC), matrix(weight, C), N, C, OC, 0);
    gemm(dweight, C, transpose(matrix(dout, OC)), matrix(inp, C), OC, C, N, 1);
}

/*
Causal attention, each head by itself. A row t of the head's queries, keys and values is q_t, k_t,
v_t (hs numbers each), and [s <= t] makes it causal:

    S_ts = scale q_t . k_s,  scale = 1/sqrt(hs)        lse_t = log sum_(s <= t) e^S_ts
    P_ts = e^(S_ts - lse_t) [s <= t], the softmax      y_t = sum_s P_ts v_s

We compute QUERIES queries at a time, so that S and P are blocks of (QUERIES,T) numbers. With the
head's keys and values as matrices K and V (T,hs): S = scale Q K^T, P the softmax of its rows, and
Y = P V.
*/
enum { QUERIES = 24 };

// Which of a thread's buffers holds what.
enum { KEYS, KEYS_T, VALUES, ROWS, SCALED_Q, SCORES, DSCORES };

// The softmax of the first n numbers of x, in place; those from n to width become 0. Returns the
// logarithm of the sum of e^x.
static float softmax_row(float *x, int n, int width) {
    float largest = x[0], sum = 0;
    #pragma omp simd reduction(max : largest)
    for (int s = 0; s < n; s++) largest = x[s] > largest ? x[s] : largest;
    #pragma omp simd reduction(+ : sum)
    for (int s = 0; s < n; s++) {
        x[s] = exp_fast(x[s] - largest);  // at most 1: it does not overflow
        sum += x[s];
    }
    for (int s = 0; s < n; s++) x[s] *= 1 / sum;
    for (int s = n; s < width; s++) x[s] = 0;
    return largest + logf(sum);
}

// A block of queries, multiplied by scale: the row-major matrix (n,hs) in this thread's buffer.
static Matrix scaled_queries(const float *q, int n, int C, int hs) {
    float *out = thread_memory(SCALED_Q, QUERIES * hs), scale = 1 / sqrtf((float)hs);
    for (int t = 0; t < n; t++) {
        for (int i = 0; i < hs; i++) out[t * hs + i] = scale * q[(size_t)t * 3 * C + i];
    }
    return matrix(out, hs);
}

// Only the queries from position `first` on; all positions have keys and values.
// qkv (B,T,3C): a row holds the queries of all heads, then their keys, then their values;
// out (B,T-first,C); lse (B,NH,T-first).
static void attention_forward(float *out, float *lse, const float *qkv, int first, int B, int T,
                              int C, int NH) {
    int hs = C / NH, rows = T - first;
    int width = T + 16;  // a power of two would make all rows compete for the same cache lines
    #pragma omp parallel for schedule(dynamic)
    for (int head = 0; head < B * NH; head++) {
        int b = head / NH, h = head % NH;
        const float *q = qkv + (size_t)b * T * 3 * C + h * hs, *k = q + C, *v = k + C;
        float *y = out + (size_t)b * rows * C + h * hs;
        float *S = thread_memory(SCORES, (size_t)QUERIES * width);
        Packed keys = pack(KEYS, transpose(matrix(k, 3 * C)), hs, T, rows);
        Packed values = pack(VALUES, matrix(v, 3 * C), T, hs, rows);
        for (int t0 = first; t0 < T; t0 += QUERIES) {
            int n = imin(QUERIES, T - t0), seen = t0 + n;  // no query sees a later key
            Matrix Q = scaled_queries(q + (size_t)t0 * 3 * C, n, C, hs);
            gemm_packed(S, width, Q, keys, n, seen, hs, 0);
            for (int t = 0; t < n; t++) {
                float *P = S + t * width;
                lse[(size_t)head * rows + t0 - first + t] = softmax_row(P, t0 + t + 1, seen);
            }
            gemm_packed(y + (size_t)(t0 - first) * C, C, matrix(S, width), values, n, hs, seen, 0);
        }
    }
}

// Given one row of S and of dP, computes P in place of S and dS in place of dP for the first n
// keys; the numbers from n to width become 0.
static void softmax_row_backward(float *S, float *dP, float lse, float delta, int n, int width) {
    #pragma omp simd
    for (int s = 0; s < n; s++) {
        S[s] = exp_fast(S[s] - lse);
        dP[s] = S[s] * (dP[s] - delta);
    }
    for (int s = n; s < width; s++) S[s] = dP[s] = 0;
}

// Given dy, compute dq, dk and dv: the chain rule, backwards through Y = P V, the softmax and S.
//   y_t  = sum_s P_ts v_s        dv_s = sum_t P_ts dy_t          dP_ts = dy_t . v_s
//   P_ts = e^(S_ts - lse_t)      d(P_tr)/d(S_ts) = P_tr ([r = s] - P_ts), so
//                                dS_ts = sum_r dP_tr P_tr ([r = s] - P_ts)
//                                      = P_ts (dP_ts - delta_t),
//                                delta_t = sum_r P_tr dP_tr = dy_t . sum_r P_tr v_r = dy_t . y_t
//   S_ts = scale q_t . k_s       dq_t = scale sum_s dS_ts k_s    dk_s = sum_t dS_ts (scale q_t)
// dqkv, qkv (B,T,3C); dout, out (B,T,C); lse (B,NH,T). P is computed again from lse. A key gets
// gradients from all later queries; we begin with the last block of them, which sees all keys.
static void attention_backward(float *dqkv, const float *dout, const float *out, const float *lse,
                               const float *qkv, int B, int T, int C, int NH) {
    int hs = C / NH, width = T + 16, last = (T - 1) / QUERIES * QUERIES;  // the last block
    float scale = 1 / sqrtf((float)hs);
    #pragma omp parallel for schedule(dynamic)
    for (int head = 0; head < B * NH; head++) {
        size_t at = (size_t)(head / NH) * T, h = head % NH;
        const float *q = qkv + at * 3 * C + h * hs, *k = q + C, *v = k + C;
        float *dq = dqkv + at * 3 * C + h * hs, *dk = dq + C, *dv = dk + C;
        float *S = thread_memory(SCORES, (size_t)QUERIES * width);
        float *dS = thread_memory(DSCORES, (size_t)QUERIES * width);
        Packed keys = pack(KEYS, matrix(k, 3 * C), T, hs, T);
        Packed keys_t = pack(KEYS_T, transpose(matrix(k, 3 * C)), hs, T, T);
        Packed values_t = pack(VALUES, transpose(matrix(v, 3 * C)), hs, T, T);
        for (int t0 = last; t0 >= 0; t0 -= QUERIES) {
            int n = imin(QUERIES, T - t0), seen = t0 + n, add = t0 < last;
            const float *dy = dout + (at + t0) * C + h * hs, *y = out + (at + t0) * C + h * hs;
            const float *block_lse = lse + (size_t)head * T + t0;
            float *block_dq = dq + (size_t)t0 * 3 * C;
            Matrix Q = scaled_queries(q + (size_t)t0 * 3 * C, n, C, hs), DY = matrix(dy, C);
            gemm_packed(S, width, Q, keys_t, n, seen, hs, 0);
            gemm_packed(dS, width, DY, values_t, n, seen, hs, 0);  // dP
            for (int t = 0; t < n; t++) {
                float delta = 0;
                for (int i = 0; i < hs; i++) delta += dy[(size_t)t * C + i] * y[(size_t)t * C + i];
                softmax_row_backward(S + t * width, dS + t * width, block_lse[t], delta, t0 + t + 1,
                                     seen);
            }
            gemm_packed(block_dq, 3 * C, matrix(dS, width), keys, n, hs, seen, 0);
            for (int t = 0; t < n; t++) {
                for (int i = 0; i < hs; i++) block_dq[(size_t)t * 3 * C + i] *= scale;
            }
            Packed packed_q = pack(ROWS, Q, n, hs, seen);
            gemm_packed(dk, 3 * C, transpose(matrix(dS, width)), packed_q, seen, hs, n, add);
            Packed packed_dy = pack(ROWS, DY, n, hs, seen);
            gemm_packed(dv, 3 * C, transpose(matrix(S, width)), packed_dy, seen, hs, n, add);
        }
    }
}

// Softmax and cross-entropy in one, in nats: loss = -log softmax(logits)[target], that is
// lse - logits[target] with lse = log sum_v e^logits[v].
// losses, lse (N); logits (N,V), only read; targets (N).
static void crossentropy_forward(float *losses, float *lse, const float *logits, const int *targets,
                                 int N, int V) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *x = logits + (size_t)n * V;
        float largest = x[0], sum = 0;  // the largest is subtracted, so that no e^x overflows
        #pragma omp simd reduction(max : largest)
        for (int v = 0; v < V; v++) largest = x[v] > largest ? x[v] : largest;
        #pragma omp simd reduction(+ : sum)
        for (int v = 0; v < V; v++) sum += exp_fast(x[v] - largest);
        lse[n] = largest + logf(sum);
        losses[n] = lse[n] - x[targets[n]];
    }
}

// Given the gradient of each loss, `scale` (1/N for their mean), compute that of the logits x.
//   d(lse)/d(x_v) = e^x_v / sum_u e^x_u = e^(x_v - lse), the probability p_v, so
//   dx_v = scale (p_v - [v is the target])        [condition] is 1 if it holds, else 0
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

/* ------------------------------------------------------------------------------------------------
3. The model

Config (dev/parameters.h) says what a network is: its sizes V, L, C, H, NH, T; norm, where the norms
are; gpas and the options of its gates.
*/

// The parameters of a layer, or their gradients. Index 0: attention, 1: feed-forward network.
typedef struct {
    float *wqkv, *wo;     // (3C,C): wq, wk, wv one below the other; (C,C)
    float *w13, *w2;      // (2H,C): w1, w3; (C,H)
    float *norm[2];       // (C) of N
    float *post_norm[2];  // (C) of N', sandwich only
    float *gate;          // (1) with GPAS only
} LayerParameters;

typedef struct {
    float *embedding;     // (V,C)
    LayerParameters *layers;  // (L)
    float *final_norm;    // (C)
    float *output;        // (V,C)
} Parameters;

// What a sublayer computes in its forward pass. Arrays that no backward pass reads are shared by
// all sublayers. With --recompute (arXiv 1604.06174) so are qkv, pre_act and hidden: the backward
// pass computes them again, which costs time and saves memory.
typedef struct {
    const float *inp;         // (B,T,C) x, the output of the sublayer before
    float *normed;            // (B,T,C) N x, the input of f; norm last: N s, the output
    float *qkv;               // (B,T,3C) attention: queries and keys after RoPE, values
    float *lse;               // (B,NH,T) attention: log sum exp of each row of scores
    float *pre_act;           // (B,T,2H) feed-forward: w1 x, w3 x
    float *hidden;            // (B,T,C) or (B,T,H): the input of wo or w2
    float *branch;            // (B,T,C) the output of f
    float *post_normed;       // (B,T,C) sandwich: N' of it
    float *sum;               // (B,T,C) s, shortcut + branch
    float *scaled;            // (B,T,C) GPAS of s; norm last: z, GPAS of x
    float *rstd, *post_rstd;  // (B,T) of N and N'
    const float *out;         // (B,T,C) y: scaled, sum or normed
} Activations;

struct Model {
    const Options *options;
    Config config;
    TensorList list;           // names, shapes and places of the parameters
    Parameters w, d;           // the parameters and their gradients: pointers into the next two
    float *parameters, *gradients, *adam_m, *adam_v;  // (list.size)
    Arrays arrays;             // all memory
    Activations *activations;  // (2L): attention, feed-forward, attention, ...
    float *embedded, *final_normed, *final_rstd;      // (B,T,C), (B,T,C), (B,T)
    float *logits, *logits_lse, *losses;              // (B,T,V), (B,T), (B,T)
    float *rope_table;         // (T,hs/2,2)
    float *dx;                 // (B,T,C) the gradient of the residual stream
    float *dsum;               // (B,T,C) of s, where the norm comes last
    float *dbranch;            // (B,T,C) of the output of f, where N' follows
    float *dhidden, *dqkv, *dpre_act;                 // of the arrays of this name
    float *dfinp;        // (B,T,C) of the input of f
    float *dx_branch;          // (B,T,C) where N comes first: of x, along the branch
    int keeps_keys;            // each layer has its own keys and values, for model_extend()
    int first;                 // the position of the first row of the last forward pass
};

// Returns where a parameter is in `block`, which is laid out as m->list says, or NULL.
static float *parameter(const Model *m, float *block, int kind, int l) {
    const Tensor *t = find_tensor(&m->list, kind, l);
    return t ? block + t->offset : NULL;
}

static LayerParameters layer_parameters(const Model *m, float *block, int l) {
    LayerParameters w = {
        .wqkv = parameter(m, block, WQ, l),
        .wo = parameter(m, block, WO, l),
        .w13 = parameter(m, block, W1, l),
        .w2 = parameter(m, block, W2, l),
        .norm = {parameter(m, block, ATTENTION_NORM, l), parameter(m, block, FFN_NORM, l)},
        .post_norm = {parameter(m, block, ATTENTION_POST_NORM, l),
                      parameter(m, block, FFN_POST_NORM, l)},
        .gate = parameter(m, block, GATE, l),
    };
    return w;
}

static Parameters all_parameters(const Model *m, float *block) {
    Parameters w = {
        .embedding = parameter(m, block, EMBEDDING, -1),
        .layers = allocate(m->config.L, sizeof(LayerParameters)),
        .final_norm = parameter(m, block, FINAL_NORM, -1),
        .output = parameter(m, block, OUTPUT, -1),
    };
    for (int l = 0; l < m->config.L; l++) w.layers[l] = layer_parameters(m, block, l);
    return w;
}

// Creates the arrays of sublayer i = 0 .. 2L-1 for N rows, in the order in which they are computed.
// Those inside the branch are the arrays of sublayer `lender`, unless that is i itself; but where
// keys and values are kept, each layer has its own.
static void create_activations(Model *m, int i, int lender, size_t N) {
    const Config *c = &m->config;
    size_t C = c->C, H = c->H;
    int attention = i % 2 == 0, last = norm_comes_last(c, i / 2), post_norm = has_post_norm(c);
    Arrays *r = &m->arrays;
    Activations *a = &m->activations[i], *first = m->activations, *from = &first[lender];
    if (!last) {
        a->rstd = new_array(r, i, "rmsnorm_forward", N, NULL);
        a->normed = new_array(r, i, "rmsnorm_forward", N * C, NULL);
    }
    if (attention) {
        float *qkv = m->keeps_keys ? NULL : from->qkv;
        a->qkv = new_array(r, i, "matmul_forward (wq, wk, wv) or rope_forward", 3 * N * C, qkv);
        a->lse = new_array(r, i, "attention_forward", N * c->NH, NULL);
        a->hidden = new_array(r, i, "attention_forward", N * C, from->hidden);
    } else {
        a->pre_act = new_array(r, i, "matmul_forward (w1, w3)", 2 * N * H, from->pre_act);
        a->hidden = new_array(r, i, "swiglu_forward", N * H, from->hidden);
    }
    a->branch = new_array(r, i, attention ? "matmul_forward (wo)" : "matmul_forward (w2)", N * C,
                          post_norm ? NULL : first->branch);
    if (post_norm) {
        a->post_rstd = new_array(r, i, "rmsnorm_forward (N')", N, NULL);
        a->post_normed = new_array(r, i, "rmsnorm_forward (N')", N * C, first->post_normed);
    }
    if (last && c->gpas) a->scaled = new_array(r, i, "gpas_forward", N * C, first->scaled);
    a->sum = new_array(r, i, "residual_forward", N * C, NULL);
    if (!last && c->gpas) a->scaled = new_array(r, i, "gpas_forward", N * C, NULL);
    if (last) {
        a->rstd = new_array(r, i, "rmsnorm_forward", N, NULL);
        a->normed = new_array(r, i, "rmsnorm_forward", N * C, NULL);
    }
}

// Creates what the backward pass needs for N rows, in the order in which it is computed.
static void create_gradients(Model *m, size_t N) {
    const Config *c = &m->config;
    size_t C = c->C, H = c->H, n = m->list.size;
    Arrays *r = &m->arrays;
    m->gradients = new_array(r, NO_CHECK, "", n, NULL);
    m->adam_m = new_array(r, NO_CHECK, "", n, NULL);
    m->adam_v = new_array(r, NO_CHECK, "", n, NULL);
    m->d = all_parameters(m, m->gradients);
    m->dfinp = new_array(r, HEAD_BACKWARD, "matmul_backward (output)", N * C, NULL);
    m->dx = new_array(r, HEAD_BACKWARD, "rmsnorm_backward (final)", N * C, NULL);
    m->dsum = new_array(r, LAYER_BACKWARD, "rmsnorm_backward", N * C, NULL);
    for (int l = 0; l < c->L && c->gpas; l++)
        new_array(r, LAYER_BACKWARD, "gpas_backward", 1, m->d.layers[l].gate);
    m->dbranch = new_array(r, LAYER_BACKWARD, "rmsnorm_backward (N')", N * C, NULL);
    m->dhidden = new_array(r, LAYER_BACKWARD, "matmul_backward (wo or w2)", N * (C > H ? C : H),
                           NULL);
    m->dqkv = new_array(r, LAYER_BACKWARD, "attention_backward or rope_backward", 3 * N * C, NULL);
    m->dpre_act = new_array(r, LAYER_BACKWARD, "swiglu_backward", 2 * N * H, NULL);
    new_array(r, LAYER_BACKWARD, "matmul_backward (wqkv or w13)", N * C, m->dfinp);
    m->dx_branch = new_array(r, LAYER_BACKWARD, "rmsnorm_backward", N * C, NULL);
    new_array(r, LAYER_BACKWARD, "residual_backward, gpas_backward or add", N * C, m->dx);
}

void model_create(Model *m, const Options *o, int B, int training) {
    memset(m, 0, sizeof *m);
    m->options = o;
    m->config = config_of(o);
    m->list = tensor_list(&m->config);
    m->keeps_keys = training ? !o->recompute : B == 1;
    const Config *c = &m->config;
    Arrays *r = &m->arrays;
    size_t C = c->C, V = c->V, N = (size_t)B * c->T;
    m->parameters = new_array(r, UPDATE, "adamw_update", m->list.size, NULL);
    if (!*o->load && !*o->resume) initialize_parameters(m->parameters, &m->list, o->seed);
    m->w = all_parameters(m, m->parameters);
    m->embedded = new_array(r, EMBED, "embedding_forward", N * C, NULL);
    m->activations = allocate(2 * c->L, sizeof(Activations));
    for (int i = 0; i < 2 * c->L; i++)
        create_activations(m, i, o->recompute || !training ? i % 2 : i, N);
    m->final_rstd = new_array(r, HEAD, "rmsnorm_forward (final)", N, NULL);
    m->final_normed = new_array(r, HEAD, "rmsnorm_forward (final)", N * C, NULL);
    m->logits = new_array(r, HEAD, "matmul_forward (output)", N * V, NULL);
    m->logits_lse = new_array(r, HEAD, "crossentropy_forward", N, NULL);
    m->losses = new_array(r, HEAD, "crossentropy_forward", N, NULL);
    m->rope_table = new_array(r, NO_CHECK, "", (size_t)c->T * (C / c->NH), NULL);
    rope_angles(m->rope_table, c->T, c->C / c->NH);
    if (training) {
        new_array(r, HEAD_BACKWARD, "crossentropy_backward", N * V, m->logits);
        create_gradients(m, N);
    }
}

void model_free(Model *m) {
    free_arrays(&m->arrays);
    free(m->list.tensors);
    free(m->w.layers);
    free(m->d.layers);
    free(m->activations);
    free_thread_memory();
}

// With --check-finite on: exits if an array or a gradient that was computed at `place` holds NaN or
// infinity.
static void check_finite(const Model *m, int place, int sublayer) {
    if (!m->options->check_finite) return;
    check_arrays(&m->arrays, place, sublayer);
    if (place <= HEAD_BACKWARD)
        check_gradients(&m->list, m->gradients, sublayer < 0 ? -1 : sublayer / 2);
}

// The branch f of layer l, attention (s 0) or the feed-forward network (s 1): out = f(inp).
// out, inp (rows,C), the rows of B sequences from position `first` to T - 1. With out NULL it stops
// before its last matrix: the backward pass needs no more.
static void branch_forward(const Model *m, int l, int s, float *out, const float *inp, int first,
                           int B, int T) {
    int C = m->config.C, H = m->config.H, NH = m->config.NH, rows = B * (T - first);
    const LayerParameters *w = &m->w.layers[l];
    const Activations *a = &m->activations[2 * l + s];
    if (s == 0) {
        float *qkv = a->qkv + (size_t)first * 3 * C;  // before it: those of earlier positions
        const float *table = m->rope_table + (size_t)first * (C / NH);
        matmul_forward(qkv, inp, w->wqkv, rows, C, 3 * C);
        rope_forward(qkv, table, B, T - first, C, C / NH);
        attention_forward(a->hidden, a->lse, a->qkv, first, B, T, C, NH);
        if (out) matmul_forward(out, a->hidden, w->wo, rows, C, C);
    } else {
        matmul_forward(a->pre_act, inp, w->w13, rows, C, 2 * H);
        swiglu_forward(a->hidden, a->pre_act, rows, H);
        if (out) matmul_forward(out, a->hidden, w->w2, rows, H, C);
    }
}

// Given dout, the gradient of the branch's output, computes dinp. dinp, dout, inp (B,T,C).
static void branch_backward(const Model *m, int l, int s, float *dinp, const float *dout,
                            const float *inp, int B, int T) {
    int C = m->config.C, H = m->config.H, NH = m->config.NH, N = B * T;
    const LayerParameters *w = &m->w.layers[l], *d = &m->d.layers[l];
    const Activations *a = &m->activations[2 * l + s];
    if (s == 0) {
        matmul_backward(m->dhidden, d->wo, dout, a->hidden, w->wo, N, C, C);
        attention_backward(m->dqkv, m->dhidden, a->hidden, a->lse, a->qkv, B, T, C, NH);
        rope_backward(m->dqkv, m->rope_table, B, T, C, C / NH);
        matmul_backward(dinp, d->wqkv, m->dqkv, inp, w->wqkv, N, C, 3 * C);
    } else {
        matmul_backward(m->dhidden, d->w2, dout, a->hidden, w->w2, N, H, C);
        swiglu_backward(m->dpre_act, m->dhidden, a->pre_act, N, H);
        matmul_backward(dinp, d->w13, m->dpre_act, inp, w->w13, N, C, 2 * H);
    }
}

/*
One sublayer of any of the twelve networks: six placements of the norm, each with GPAS or without.
[G] is GPAS if it is on, f the branch, N and N' are RMSNorms:

    pre       y = [G](x + f(N x))
    lns       as pre; the weight of each N starts at 1/sqrt(layer)
    sandwich  y = [G](x + N' f(N x))
    post      y = N([G]x + f(x))
    deepnorm  y = N(A [G]x + f(x)),  A = (2L)^(1/4)
    mix       the first L/4 layers are post, the others pre

So there are two orders, norm first and norm last, and some steps that only some networks have.
Given x, computes the output y of layer l's attention (s 0) or feed-forward network (s 1) for the
rows of B sequences from position `first` to T - 1. x and y (rows,C).
*/
static const float *sublayer_forward(const Model *m, int l, int s, const float *x, int first, int B,
                                     int T) {
    const Config *c = &m->config;
    const LayerParameters *w = &m->w.layers[l];
    Activations *a = &m->activations[2 * l + s];
    int C = c->C, rows = B * (T - first);
    size_t n = (size_t)rows * C;
    a->inp = x;
    if (!norm_comes_last(c, l)) {
        const float *b = a->branch;
        rmsnorm_forward(a->normed, a->rstd, x, w->norm[s], rows, C);                // N x
        branch_forward(m, l, s, a->branch, a->normed, first, B, T);                 // b = f(N x)
        if (has_post_norm(c)) {
            rmsnorm_forward(a->post_normed, a->post_rstd, b, w->post_norm[s], rows, C);
            b = a->post_normed;                                                     // b = N' f(N x)
        }
        residual_forward(a->sum, x, b, 1, n);                                       // s = x + b
        a->out = a->sum;
        if (c->gpas) {
            gpas_forward(a->scaled, a->sum, *w->gate, c->gate_activation, n);       // y = GPAS(s)
            a->out = a->scaled;
        }
    } else {
        const float *z = x;
        branch_forward(m, l, s, a->branch, x, first, B, T);                         // b = f(x)
        if (c->gpas) {
            gpas_forward(a->scaled, x, *w->gate, c->gate_activation, n);            // z = GPAS(x)
            z = a->scaled;
        }
        residual_forward(a->sum, z, a->branch, shortcut_scale(c), n);               // s = A z + b
        rmsnorm_forward(a->normed, a->rstd, a->sum, w->norm[s], rows, C);           // y = N s
        a->out = a->normed;
    }
    check_finite(m, 2 * l + s, 2 * l + s);
    return a->out;
}

// dx += dx_branch. Both (n).
static void add(float *dx, const float *dx_branch, size_t n) {
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) dx[i] += dx_branch[i];
}

/*
The same sublayer backwards. Given dy, compute dx. X^T v is the backward pass of X applied to v. x
goes two ways, along the shortcut and into the branch, so its two gradients are added:

    norm first   s = x + b, b = N' f(N x), y = GPAS(s)             N' only in sandwich
        ds = dy                          untouched by GPAS
        dg -= a'(g) sum s dy
        dx = ds + N^T f^T N'^T ds        along the shortcut, and through the branch

    norm last    z = GPAS(x), s = A z + f(x), y = N s
        ds = N^T dy,  dz = A ds
        dg -= a'(g) sum x dz
        dx = dz + f^T ds                 dz is untouched by GPAS

Without the stop-gradient, the gradient on its way through GPAS is multiplied by 1 - a(g).
It works in place: dx (B,T,C) is dy on entry, and is returned.
*/
static float *sublayer_backward(const Model *m, int l, int s, float *dx, int B, int T) {
    const Config *c = &m->config;
    const LayerParameters *w = &m->w.layers[l], *d = &m->d.layers[l];
    const Activations *a = &m->activations[2 * l + s];
    const float *x = a->inp, *finp = norm_comes_last(c, l) ? x : a->normed;  // finp: input of f
    int C = c->C, N = B * T, act = c->gate_activation;
    size_t n = (size_t)N * C;
    float *dgate = c->gate_train ? d->gate : NULL;
    if (m->options->recompute && l < c->L - 1)  // the last layer's arrays are still there
        branch_forward(m, l, s, NULL, finp, 0, B, T);
    if (!norm_comes_last(c, l)) {
        float *ds = dx, *db = ds;  // ds = dy: GPAS changes nothing
        if (c->gpas) gpas_backward(ds, dgate, dx, a->sum, *w->gate, act, c->stop_grad, n);
        if (has_post_norm(c)) {
            db = m->dbranch;
            rmsnorm_backward(db, d->post_norm[s], ds, a->branch, w->post_norm[s], a->post_rstd,
                             N, C);                                                 // db = N'^T ds
        }
        branch_backward(m, l, s, m->dfinp, db, finp, B, T);                         // f^T db
        rmsnorm_backward(m->dx_branch, d->norm[s], m->dfinp, x, w->norm[s], a->rstd, N, C);  // N^T
        add(dx, m->dx_branch, n);
    } else {
        float *ds = m->dsum, *dz = dx;
        rmsnorm_backward(ds, d->norm[s], dx, a->sum, w->norm[s], a->rstd, N, C);    // ds = N^T dy
        residual_backward(dz, ds, shortcut_scale(c), n);                            // dz = A ds
        if (c->gpas) gpas_backward(dx, dgate, dz, x, *w->gate, act, c->stop_grad, n);
        branch_backward(m, l, s, m->dfinp, ds, finp, B, T);                         // f^T ds
        add(dx, m->dfinp, n);
    }
    check_finite(m, LAYER_BACKWARD, 2 * l + s);
    return dx;
}

// The network on the rows of B sequences from position `first` to T - 1, up to the logits, and with
// targets to the losses. tokens, targets (rows).
static void network_forward(Model *m, const int *tokens, const int *targets, int first, int B,
                            int T) {
    int C = m->config.C, V = m->config.V, L = m->config.L, rows = B * (T - first);
    const float *x = m->embedded;
    embedding_forward(m->embedded, tokens, m->w.embedding, rows, C);
    check_finite(m, EMBED, -1);
    for (int l = 0; l < L; l++) {
        x = sublayer_forward(m, l, 0, x, first, B, T);
        x = sublayer_forward(m, l, 1, x, first, B, T);
    }
    rmsnorm_forward(m->final_normed, m->final_rstd, x, m->w.final_norm, rows, C);
    matmul_forward(m->logits, m->final_normed, m->w.output, rows, C, V);
    if (targets) crossentropy_forward(m->losses, m->logits_lse, m->logits, targets, rows, V);
    check_finite(m, HEAD, -1);
    m->first = first;
}

// The mean loss in nats of tokens (B,T), each of which should predict its target; without targets
// only the logits.
double model_forward(Model *m, const int *tokens, const int *targets, int B, int T) {
    network_forward(m, tokens, targets, 0, B, T);
    return targets ? dot(m->losses, NULL, (size_t)B * T) / (B * T) : 0;
}

// The same for positions `first` to T - 1 of one sequence whose earlier positions have been
// computed: their keys and values are still in the activations, and nothing else of them is needed.
// So each token of a story costs one row. Where layers share one qkv, everything is computed again.
double model_extend(Model *m, const int *tokens, const int *targets, int first, int T) {
    int from = m->keeps_keys ? first : 0, rows = T - first;
    network_forward(m, tokens + from, targets ? targets + from : NULL, from, 1, T);
    return targets ? dot(m->losses + first - from, NULL, rows) / rows : 0;
}

// Adds to the gradients those of scale times the sum of the losses of the last model_forward().
void model_backward(Model *m, const int *tokens, const int *targets, int B, int T, double scale) {
    int C = m->config.C, V = m->config.V, L = m->config.L, N = B * T;
    const float *x = m->activations[2 * L - 1].out;
    float *dx = m->dx;
    crossentropy_backward(m->logits, m->logits_lse, targets, (float)scale, N, V);
    matmul_backward(m->dfinp, m->d.output, m->logits, m->final_normed, m->w.output, N, C, V);
    rmsnorm_backward(dx, m->d.final_norm, m->dfinp, x, m->w.final_norm, m->final_rstd, N, C);
    check_finite(m, HEAD_BACKWARD, -1);
    for (int l = L - 1; l >= 0; l--) {
        dx = sublayer_backward(m, l, 1, dx, B, T);
        dx = sublayer_backward(m, l, 0, dx, B, T);
    }
    embedding_backward(m->d.embedding, dx, tokens, N, C);
    check_finite(m, EMBED_BACKWARD, -1);
}

// The rest of the functions that dev/model.h declares, and describes.

void zero_gradients(Model *m) { memset(m->gradients, 0, m->list.size * sizeof(float)); }

const float *model_logits(Model *m, int n) {
    return m->logits + (size_t)(n - m->first) * m->config.V;
}

Snapshot model_snapshot(Model *m) {
    Snapshot s = {m->options, m->list, m->parameters, m->gradients, m->adam_m, m->adam_v};
    return s;
}

void model_restore(Model *m) { (void)m; }  // the snapshot's arrays are the model's own

void model_device(const Model *m, char *text) {
    (void)m;
    int threads = omp_get_max_threads();
    snprintf(text, TEXT_SIZE, "%d thread%s", threads, threads == 1 ? "" : "s");
}

// Returns the population variance of x (n).
static double variance(const float *x, size_t n) {
    double mean = dot(x, NULL, n) / n;
    return dot(x, x, n) / n - mean * mean;
}

void layer_state(Model *m, int l, int B, int T, double variances[2], double *gate) {
    size_t n = (size_t)B * T * m->config.C;
    for (int s = 0; s < 2; s++) variances[s] = variance(m->activations[2 * l + s].out, n);
    *gate = m->config.gpas ? *m->w.layers[l].gate : NAN;
}

/* ------------------------------------------------------------------------------------------------
4. AdamW
*/

typedef struct {
    float lr, beta1, beta2, eps, weight_decay;
    float clip;  // the gradient is multiplied by this
    int t;       // the number of this update: 1, 2, ...
} AdamW;

// AdamW (arXiv 1711.05101). With g the clipped gradient:
//   m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
//   p -= lr (mhat / (sqrt(vhat) + eps) + weight_decay p)
// m and v start at 0; mhat = m / (1 - beta1^t), and vhat likewise, correct for that. Arrays (n).
static void adamw_update(float *p, const float *grad, float *m, float *v, size_t n, AdamW adam) {
    float unbias_m = (float)(1 / (1 - pow(adam.beta1, adam.t)));
    float unbias_v = (float)(1 / (1 - pow(adam.beta2, adam.t)));
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) {
        float g = grad[i] * adam.clip;
        m[i] = adam.beta1 * m[i] + (1 - adam.beta1) * g;
        v[i] = adam.beta2 * v[i] + (1 - adam.beta2) * g * g;
        float mhat = m[i] * unbias_m, vhat = v[i] * unbias_v;
        p[i] -= adam.lr * (mhat / (sqrtf(vhat) + adam.eps) + adam.weight_decay * p[i]);
    }
}

double gradient_norms(Model *m, double *layers, double *gates) {
    double sum = 0, gate_sum = 0;
    for (int l = 0; l < m->config.L; l++) layers[l] = 0;
    for (const Tensor *t = m->list.tensors; t < m->list.tensors + m->list.count; t++) {
        const float *d = m->gradients + t->offset;
        double square = dot(d, d, t->size);
        sum += square;
        if (t->layer >= 0) layers[t->layer] += square;
        if (t->kind == GATE) gate_sum += square;
    }
    for (int l = 0; l < m->config.L; l++) layers[l] = sqrt(layers[l]);
    *gates = sqrt(gate_sum);
    return sqrt(sum);
}

// Only matrices decay, not norms and gates. The gates have a clip of their own.
void model_update(Model *m, int t, double norm, double gate_norm) {
    const Options *o = m->options;
    double clip, gate_clip;
    clip_factors(o, norm, gate_norm, &clip, &gate_clip);
    for (const Tensor *w = m->list.tensors; w < m->list.tensors + m->list.count; w++) {
        AdamW adam = {
            .lr = learning_rate(o, t), .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f,
            .weight_decay = w->cols ? o->weight_decay : 0,
            .clip = w->kind == GATE ? gate_clip : clip,
            .t = t + 1,
        };
        if (w->kind == GATE && !m->config.gate_train) continue;
        adamw_update(m->parameters + w->offset, m->gradients + w->offset, m->adam_m + w->offset,
                     m->adam_v + w->offset, w->size, adam);
    }
    check_finite(m, UPDATE, -1);
}

/* ------------------------------------------------------------------------------------------------
5. Training
*/

const char program[] = "train_gpas", default_dtype[] = "fp32";
const int on_gpu = 0;

// One step: the gradient of the mean loss over --total-batch sequences, one micro-batch of --batch
// after the other, then an AdamW update. Returns the loss; *grad_norm is the norm of the gradient
// before clipping.
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
        double start = omp_get_wtime(), lr = learning_rate(o, run->progress.step), val = NAN;
        double grad_norm, loss = train_step(run, &grad_norm), ms = 1000 * (omp_get_wtime() - start);
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
