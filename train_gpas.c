/*
train_gpas.c: trains a LLaMA-like Transformer with GPAS on the CPU, without any framework.

A Transformer is a stack of layers. Each has two sublayers, attention and a feed-forward network,
which add something to the residual stream x: x = x + f(norm(x)). In this usual arrangement, Pre-LN,
the input of f is normalized, but its output is not. As a result the variance of x grows with depth,
until what the last layers add hardly changes it. GPAS (Gradient-Preserving Activation Scaling,
arXiv 2506.22049) holds back this growth: in each sublayer it multiplies the stream by a learned
factor, after the sum x + f(norm(x)), or before the sum where the norm comes last:

    y = x - a(g) sg(x)

The gate g is one learned number per layer. a() is its activation function, by default SiLU, which
is g sigmoid(g). A gate starts at 0, and a(0) = 0, so at first GPAS does nothing. sg() is the
stop-gradient: it returns its argument, but is treated as a constant when we differentiate. So the
forward pass computes y = (1 - a(g)) x, while the backward pass gives dx = dy: the gradient passes
GPAS unscaled. That is the whole idea, and gpas_forward() and gpas_backward() below implement it.

Each sublayer applies GPAS once, and the two sublayers of a layer share its gate. There are three
arrangements:

    norm first    x ---+-----------------------------------> (+) ---> GPAS ---> y       pre, lns
                       |                                      ^
                       +---> norm ---> f ---------------------+

    sandwich      x ---+-----------------------------------> (+) ---> GPAS ---> y
                       |                                      ^
                       +---> norm ---> f ---> post_norm ------+

    norm last     x ---+---> GPAS ---> times A ------------> (+) ---> norm ---> y       post,
                       |                                      ^                         deepnorm
                       +---> f -------------------------------+

A is a constant of deepnorm, and 1 in post. In mix, the first L/4 layers are norm last and the
others norm first.

Contents: 1 GPAS. 2 The other operations. 3 The model. 4 AdamW. 5 Training. The headers of dev/ hold
what supports them: file formats, options, logs, fast matrix products.

Conventions. B batch, T sequence length, C channels, H feed-forward width, L layers, NH heads,
hs = C/NH, V vocabulary, N = B T rows. Arrays are row-major; comments give their shapes: (B,T,C).
dx is the gradient of the loss with respect to x, with every sg() treated as a constant. Unless it
says otherwise, a backward function takes dout, OVERWRITES dinp, and ADDS to the gradients of
parameters, which are summed over micro-batches. In derivations x, y, w mean inp, out, weight.
`omp parallel for` splits the iterations of a loop among threads; `simd` lets the compiler compute
several in one instruction. The order of every sum is the same for any number of threads, and
therefore so are the results.
*/
#include "dev/gemm.h"          // defines: Matrix, gemm, Packed, pack, gemm_packed
#include "dev/simd.h"          // defines: dot, max_of, exp_fast
#include "dev/gate.h"          // defines: gate_value, gate_slope, which are a(g) and a'(g)
#include "dev/parameters.h"    // defines: Config, norm_comes_last, TensorList, rope_angles, ...
#include "dev/arrays.h"        // defines: Arrays, new_array, check_arrays
#include "dev/model.h"         // declares: Model, Snapshot and the functions of a model
#include "dev/schedule.h"      // defines: learning_rate, clip_factors
#include "dev/command_line.h"  // defines: Options, parse_options
#include "dev/run.h"           // defines: Run, open_run, close_run, validate
#include "dev/logs.h"          // defines: open_logs, log_step, report, sample, save, ...
#include "dev/evaluation.h"    // defines: evaluate

/* ------------------------------------------------------------------------------------------------
1. GPAS
*/

// Applies GPAS (section 3 of the paper), y = x - a(g) sg(x). Its value is (1 - a(g)) x.
// out, inp: n numbers; gate: g; activation: which function a() is (GATE_SILU, ...). gate_value()
// computes a(g), and gate_slope() a'(g).
static void gpas_forward(float *out, const float *inp, float gate, int activation, size_t n) {
    float scale = 1 - gate_value(gate, activation);
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) out[i] = scale * inp[i];
}

// Given dy, compute dx and dg.
//   dx: sg(x) is treated as a constant, so the derivative of y with respect to x is 1, and
//           dx = dy
//       The true derivative of y = (1 - a) x would give dx = (1 - a) dy. Then each of the network's
//       2L GPAS sites would multiply the gradient of the stream by its 1 - a, and with equal gates
//       the first layer would get about (1 - a)^(2L) of what reaches the last.
//   dg: the derivative of y_i with respect to g is -a'(g) x_i for each of the n elements i, so
//           dg = -a'(g) sum_i x_i dy_i
//       For SiLU, a'(0) = 1/2, so a gate can learn from the start. The two sites of a layer share
//       its gate, so both add to dg.
// With stop_grad = 0, for comparison, there is no sg(), and 1 - a(g) is an ordinary learned scale.
// Then dx = (1 - a) dy; dg is the same in both cases.
// dinp, dout, inp: n numbers; dinp and dout may be the same array. dgate: one number, added to, or
// NULL.
static void gpas_backward(float *dinp, float *dgate, const float *dout, const float *inp,
                          float gate, int activation, int stop_grad, size_t n) {
    if (dgate) *dgate -= gate_slope(gate, activation) * (float)dot(inp, dout, n);
    if (stop_grad) {
        if (dinp != dout) memcpy(dinp, dout, n * sizeof(float));  // dx = dy
        return;
    }
    float scale = 1 - gate_value(gate, activation);
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) dinp[i] = scale * dout[i];
}

/* ------------------------------------------------------------------------------------------------
2. The other operations
*/

// The residual sum y = A x + b, where x is the shortcut and b the branch. A is DeepNorm's constant,
// and 1 otherwise. out, shortcut, branch: n numbers; out and shortcut may be the same array.
static void residual_forward(float *out, const float *shortcut, const float *branch, float A,
                             size_t n) {
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) out[i] = A * shortcut[i] + branch[i];
}

// Given dy, compute dx.
//   y = A x + b: dx = A dy, and db = dy, for which there is nothing to compute.
// dshortcut, dout: n numbers; they may be the same array.
static void residual_backward(float *dshortcut, const float *dout, float A, size_t n) {
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) dshortcut[i] = A * dout[i];
}

// Looks up each token's row in the table: row n of out is row tokens[n] of weight.
// out (N,C); weight (V,C); tokens (N).
static void embedding_forward(float *out, const int *tokens, const float *weight, int N, int C) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        memcpy(out + (size_t)n * C, weight + (size_t)tokens[n] * C, C * sizeof(float));
}

// Given dy, compute dw.
//   A row of the table was copied to every position where its token occurs, so its gradient is the
//   sum over those positions.
// dweight (V,C), added to; dout (N,C). Each thread owns BLOCK channels at a time, so that no two
// threads add to the same number.
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

// RMSNorm (arXiv 1910.07467): y_c = w_c x_c r in each row, where r = 1 / sqrt(mean_c(x_c^2) + eps)
// and eps = 1e-6. out, inp (N,C); weight (C); rstd (N) keeps r for the backward pass.
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
//   In one row let u_c = w_c dy_c, the gradient of the product x_c r. x_c affects its own y_c and,
//   through r, every y_k. The derivative of r = (mean + eps)^(-1/2) with respect to x_c is
//   -r^3 x_c / C, so
//       dx_c = u_c r - sum_k u_k x_k r^3 x_c / C = r (u_c - x_c p),  p = r^2 sum_k u_k x_k / C
//       dw_c = the sum over all rows of dy_c x_c r
// dinp, dout, inp (N,C); weight (C); rstd (N); dweight (C), added to. dinp and dout are never the
// same array.
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
    for (int c0 = 0; c0 < C; c0 += BLOCK) {  // as in embedding_backward()
        for (int n = 0; n < N; n++) {
            const float *x = inp + (size_t)n * C, *dy = dout + (size_t)n * C;
            for (int c = c0; c < imin(C, c0 + BLOCK); c++) dweight[c] += dy[c] * x[c] * rstd[n];
        }
    }
}

// RoPE (arXiv 2104.09864) rotates each pair (x0, x1) of adjacent channels of every query and key to
// (x0 cos - x1 sin, x0 sin + x1 cos), by an angle proportional to the position of that query or
// key. (Each pair of a head has its own frequency.) The product q . k then depends on the two
// positions only through their distance. Values are not rotated. qkv (B,T,3C), in place; table
// (T,hs/2,2) from rope_angles(): the cosine and sine of each angle. direction: 1, or -1 to rotate
// back.
static void rope_rotate(float *qkv, const float *table, int B, int T, int C, int hs,
                        int direction) {
    #pragma omp parallel for
    for (int n = 0; n < B * T; n++) {
        const float *cos_sin = table + (size_t)(n % T) * hs;
        float *x = qkv + (size_t)n * 3 * C;
        for (int c = 0; c < 2 * C; c += hs) {  // all heads of q, then of k
            for (int j = 0; j < hs; j += 2) {
                float cosine = cos_sin[j], sine = direction * cos_sin[j + 1];
                float x0 = x[c + j], x1 = x[c + j + 1];
                x[c + j] = x0 * cosine - x1 * sine;
                x[c + j + 1] = x0 * sine + x1 * cosine;
            }
        }
    }
}

// Computes y = R x for every pair x, where R is the rotation by the angle of the pair.
static void rope_forward(float *qkv, const float *table, int B, int T, int C, int hs) {
    rope_rotate(qkv, table, B, T, C, hs, 1);
}

// Given dy, compute dx.
//   y = R x, so dx = R^T dy. The transpose of a rotation is the rotation by the opposite angle.
// dqkv (B,T,3C), in place.
static void rope_backward(float *dqkv, const float *table, int B, int T, int C, int hs) {
    rope_rotate(dqkv, table, B, T, C, hs, -1);
}

// Returns s = 1 / (1 + e^-x). Its derivative is s (1 - s).
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
Matrix products. A Matrix {x, row, column} has its element (i,j) at x[i * row + j * column]; so its
transpose is the same memory with the two strides swapped. gemm() (general matrix multiplication)
computes the product of a (M,K) and b (K,N), and stores it in c, whose rows are ldc numbers apart,
or adds it to c. gemm_packed() does the same on one thread, with a b that pack() has prepared. The
simple versions below specify the results, and `make train_gpas PLAIN=1` builds with them. The
default versions, in dev/gemm.h and dev/simd.h, are about a hundred times faster.
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

static float max_of(const float *x, int n) {
    float largest = x[0];
    for (int i = 1; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

static inline float exp_fast(float x) { return expf(x); }
#endif

// A linear layer without bias: out = inp weight^T. out (N,OC), for OC output channels; inp (N,C);
// weight (OC,C).
static void matmul_forward(float *out, const float *inp, const float *weight, int N, int C,
                           int OC) {
    gemm(out, OC, matrix(inp, C), transpose(matrix(weight, C)), N, OC, C, 0);
}

// Given dout, compute dinp and dweight.
//   y_no = sum_c x_nc w_oc. Each x_nc is used for all outputs o of its row n, and each w_oc is used
//   in all rows n, so their gradients are sums over o and over n:
//       dx_nc = sum_o dy_no w_oc        dinp    = dout weight      (N,C) = (N,OC) (OC,C)
//       dw_oc = sum_n dy_no x_nc        dweight = dout^T inp       (OC,C) = (OC,N) (N,C)
// dinp, inp (N,C); dout (N,OC); weight, dweight (OC,C), dweight added to.
static void matmul_backward(float *dinp, float *dweight, const float *dout, const float *inp,
                            const float *weight, int N, int C, int OC) {
    gemm(dinp, C, matrix(dout, OC), matrix(weight, C), N, C, OC, 0);
    gemm(dweight, C, transpose(matrix(dout, OC)), matrix(inp, C), OC, C, N, 1);
}

/*
Causal attention. Each head is computed by itself; its query, key and value at position t are q_t,
k_t and v_t, hs numbers each. Position t sees the positions s <= t. [condition] is 1 or 0:

    S_ts = scale q_t . k_s                  the scores, with scale = 1/sqrt(hs)
    P_ts = [s <= t] e^(S_ts - lse_t)        their softmax, with lse_t = log sum_(s <= t) e^S_ts
    y_t  = sum_s P_ts v_s

In matrices: S = scale Q K^T, P is the softmax of the rows of S, and Y = P V. We compute them for a
block of QUERY_BLOCK queries at a time, so that S and P need (QUERY_BLOCK,T) numbers, not (T,T).
*/
enum { QUERY_BLOCK = 24 };  // a few tiles of the fast gemm; 24 to 64 are about equally fast

// The names of a thread's buffers.
enum { KEYS, KEYS_T, VALUES, BLOCK_ROWS, SCALED_Q, SCORES, DSCORES };

// Replaces x[0 .. n-1] with their softmax and x[n .. seen-1] with 0. Returns log sum_(i < n) e^x_i.
static float softmax_row(float *x, int n, int seen) {
    for (int s = n; s < seen; s++) x[s] = -INFINITY;  // e^-infinity is 0
    float largest = max_of(x, seen), sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int s = 0; s < seen; s++) {
        x[s] = exp_fast(x[s] - largest);  // at most 1, so it does not overflow
        sum += x[s];
    }
    for (int s = 0; s < seen; s++) x[s] *= 1 / sum;
    return largest + logf(sum);
}

// Returns a copy of n queries (n,hs), multiplied by scale. Rows of q are 3C apart.
static Matrix scaled_queries(const float *q, int n, int C, int hs) {
    float *out = thread_memory(SCALED_Q, QUERY_BLOCK * hs), scale = 1 / sqrtf((float)hs);
    for (int t = 0; t < n; t++) {
        for (int i = 0; i < hs; i++) out[t * hs + i] = scale * q[(size_t)t * 3 * C + i];
    }
    return matrix(out, hs);
}

// Computes y for the positions from `first` to T - 1, which see the keys from position 0 on. first
// is above 0 when a story is continued.
// qkv (B,T,3C): a row holds the queries of all heads, then their keys, then their values;
// out (B,T-first,C); lse (B,NH,T-first).
static void attention_forward(float *out, float *lse, const float *qkv, int first, int B, int T,
                              int C, int NH) {
    int hs = C / NH, rows = T - first;
    int stride = T + 16;  // with a power of two, rows would compete for the same cache sets
    #pragma omp parallel for schedule(dynamic)
    for (int head = 0; head < B * NH; head++) {
        int b = head / NH, h = head % NH;
        const float *q = qkv + (size_t)b * T * 3 * C + h * hs, *k = q + C, *v = k + C;
        float *y = out + (size_t)b * rows * C + h * hs;
        float *S = thread_memory(SCORES, (size_t)QUERY_BLOCK * stride);
        Packed keys_t = pack(KEYS_T, transpose(matrix(k, 3 * C)), hs, T, rows);
        Packed values = pack(VALUES, matrix(v, 3 * C), T, hs, rows);
        for (int t0 = first; t0 < T; t0 += QUERY_BLOCK) {
            int n = imin(QUERY_BLOCK, T - t0), seen = t0 + n;  // these n queries see `seen` keys
            Matrix scaled_q = scaled_queries(q + (size_t)t0 * 3 * C, n, C, hs);
            gemm_packed(S, stride, scaled_q, keys_t, n, seen, hs, 0);
            for (int i = 0; i < n; i++) {  // position t = t0 + i; S becomes P
                float row_lse = softmax_row(S + i * stride, t0 + i + 1, seen);
                lse[(size_t)head * rows + t0 - first + i] = row_lse;
            }
            float *block_y = y + (size_t)(t0 - first) * C;
            gemm_packed(block_y, C, matrix(S, stride), values, n, hs, seen, 0);
        }
    }
}

// Overwrites a row of S with P, and a row of dP with dS, for the first n keys. The others, up to
// `seen`, become 0.
static void softmax_row_backward(float *S, float *dP, float lse, float delta, int n, int seen) {
    for (int s = n; s < seen; s++) S[s] = -INFINITY;
    #pragma omp simd
    for (int s = 0; s < seen; s++) {
        S[s] = exp_fast(S[s] - lse);
        dP[s] = S[s] * (dP[s] - delta);
    }
}

// Given dy, compute dq, dk and dv: the chain rule, backwards through Y = P V, the softmax and S.
//   The derivative of lse_t with respect to S_ts is P_ts, so that of P_tr is P_tr ([r = s] - P_ts),
//   for positions r and s up to t. Line by line:
//   y_t  = sum_s P_ts v_s        dv_s = sum_t P_ts dy_t          dP_ts = dy_t . v_s
//   P_ts = e^(S_ts - lse_t)      dS_ts = sum_r dP_tr P_tr ([r = s] - P_ts)
//                                      = P_ts (dP_ts - delta_t),  delta_t = sum_r P_tr dP_tr
//   S_ts = scale q_t . k_s       dq_t = scale sum_s dS_ts k_s    dk_s = sum_t dS_ts (scale q_t)
//   delta_t needs no P: it is sum_r P_tr (dy_t . v_r) = dy_t . sum_r P_tr v_r = dy_t . y_t.
// dqkv, qkv (B,T,3C); dout, out (B,T,C); lse (B,NH,T). S is computed again, and P from S and lse.
// All queries at or after a key contribute to its dk and dv. We begin with the last block, which
// sees every key: it writes dk and dv, and the other blocks add to them.
static void attention_backward(float *dqkv, const float *dout, const float *out, const float *lse,
                               const float *qkv, int B, int T, int C, int NH) {
    int hs = C / NH, stride = T + 16, last = (T - 1) / QUERY_BLOCK * QUERY_BLOCK;
    float scale = 1 / sqrtf((float)hs);
    #pragma omp parallel for schedule(dynamic)
    for (int head = 0; head < B * NH; head++) {
        size_t row = (size_t)(head / NH) * T, h = head % NH;  // row of position 0
        const float *q = qkv + row * 3 * C + h * hs, *k = q + C, *v = k + C;
        float *dq = dqkv + row * 3 * C + h * hs, *dk = dq + C, *dv = dk + C;
        float *S = thread_memory(SCORES, (size_t)QUERY_BLOCK * stride);
        float *dS = thread_memory(DSCORES, (size_t)QUERY_BLOCK * stride);
        Packed keys = pack(KEYS, matrix(k, 3 * C), T, hs, T);
        Packed keys_t = pack(KEYS_T, transpose(matrix(k, 3 * C)), hs, T, T);
        Packed values_t = pack(VALUES, transpose(matrix(v, 3 * C)), hs, T, T);
        for (int t0 = last; t0 >= 0; t0 -= QUERY_BLOCK) {
            int n = imin(QUERY_BLOCK, T - t0), seen = t0 + n, accumulate = t0 < last;
            const float *dy = dout + (row + t0) * C + h * hs, *y = out + (row + t0) * C + h * hs;
            float *block_dq = dq + (size_t)t0 * 3 * C;
            Matrix scaled_q = scaled_queries(q + (size_t)t0 * 3 * C, n, C, hs);
            gemm_packed(S, stride, scaled_q, keys_t, n, seen, hs, 0);        // S = scale Q K^T
            gemm_packed(dS, stride, matrix(dy, C), values_t, n, seen, hs, 0);  // dP = dY V^T
            for (int i = 0; i < n; i++) {
                float delta = 0;
                #pragma omp simd reduction(+ : delta)
                for (int c = i * C; c < i * C + hs; c++) delta += dy[c] * y[c];
                softmax_row_backward(S + i * stride, dS + i * stride,
                                     lse[(size_t)head * T + t0 + i], delta, t0 + i + 1, seen);
            }
            gemm_packed(block_dq, 3 * C, matrix(dS, stride), keys, n, hs, seen, 0);  // dS K
            for (int i = 0; i < n; i++) {                                   // dQ = scale dS K
                for (int c = 0; c < hs; c++) block_dq[(size_t)i * 3 * C + c] *= scale;
            }
            Packed rows = pack(BLOCK_ROWS, scaled_q, n, hs, seen);          // dK += dS^T (scale Q)
            gemm_packed(dk, 3 * C, transpose(matrix(dS, stride)), rows, seen, hs, n, accumulate);
            rows = pack(BLOCK_ROWS, matrix(dy, C), n, hs, seen);            // dV += P^T dY
            gemm_packed(dv, 3 * C, transpose(matrix(S, stride)), rows, seen, hs, n, accumulate);
        }
    }
}

// Softmax and cross-entropy combined, in nats: loss = -log softmax(x)_target = lse - x_target,
// where x are the logits of a row and lse = log sum_v e^x_v. losses, lse (N); logits (N,V), only
// read; targets (N).
static void crossentropy_forward(float *losses, float *lse, const float *logits, const int *targets,
                                 int N, int V) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *x = logits + (size_t)n * V;
        float largest = max_of(x, V), sum = 0;  // it is subtracted, so that no e^x overflows
        #pragma omp simd reduction(+ : sum)
        for (int v = 0; v < V; v++) sum += exp_fast(x[v] - largest);
        lse[n] = largest + logf(sum);
        losses[n] = lse[n] - x[targets[n]];
    }
}

// Given `scale`, the weight of each loss in the total (1/N for the mean), compute dx.
//   The derivative of lse with respect to x_v is e^x_v / sum_u e^x_u = e^(x_v - lse), which is the
//   probability p_v, so
//       dx_v = scale (p_v - [v is the target])
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

A Config (dev/parameters.h) says what a network is. Its fields are the sizes V, L, C, H, NH and T;
norm, one of the six values of --norm; gpas, 0 or 1; and the options of the gates.
*/

// The parameters of a layer, or their gradients. norm[0] is attention's, norm[1] the feed-forward
// network's.
typedef struct {
    float *wqkv, *wo;         // (3C,C): wq, wk and wv stacked; (C,C)
    float *w13, *w2;          // (2H,C): w1 and w3 stacked; (C,H)
    float *norm[2];           // (C) the weights of norm
    float *post_norm[2];      // (C) the weights of post_norm, in sandwich only
    float *gate;              // (1) g, with GPAS only
} LayerParameters;

// All parameters of a network, or their gradients.
typedef struct {
    float *embedding;         // (V,C)
    LayerParameters *layers;  // (L)
    float *final_norm;        // (C)
    float *output;            // (V,C)
} Parameters;

// What a sublayer computes in its forward pass. Arrays that no backward pass reads are shared by
// all sublayers. With --recompute (arXiv 1604.06174) all attention sublayers also share one qkv and
// one hidden, and all feed-forward sublayers one pre_act and one hidden: the backward pass computes
// them again, trading time for memory. Without training they are shared too.
typedef struct {
    const float *inp;         // (B,T,C) x, the output of the sublayer before
    float *normed;            // (B,T,C) norm(x); norm last: norm(s), the output
    float *qkv;               // (B,T,3C) attention: queries and keys after RoPE, values
    float *lse;               // (B,NH,T) attention: log sum exp of each row of scores
    float *pre_act;           // (B,T,2H) feed-forward: w1 x and w3 x
    float *hidden;            // (B,T,C) or (B,T,H) the input of wo or of w2
    float *branch;            // (B,T,C) the output of f
    float *post_normed;       // (B,T,C) sandwich: post_norm of branch
    float *sum;               // (B,T,C) s = A shortcut + branch
    float *scaled;            // (B,T,C) GPAS(s); norm last: GPAS(x)
    float *rstd, *post_rstd;  // (B,T) of norm and post_norm
    const float *out;         // (B,T,C) y, which is scaled, sum or normed
} Activations;

struct Model {
    const Options *options;
    Config config;
    TensorList list;           // the names, shapes and places of the parameters
    float *parameters, *gradients, *adam_m, *adam_v;  // (list.size)
    Parameters w, d;           // pointers to each tensor in parameters and in gradients
    Arrays arrays;             // all memory
    Activations *activations;  // (2L): attention, feed-forward, attention, ...
    float *embedded, *final_normed, *final_rstd;      // (B,T,C), (B,T,C), (B,T)
    float *logits, *logits_lse, *losses;              // (B,T,V), (B,T), (B,T)
    float *rope_table;         // (T,hs/2,2)
    int keeps_keys;            // every layer has its own qkv, so that model_extend() can continue
    int first;                 // the position of the first row of the last forward pass
    // The gradients with respect to:
    float *dx;                 // (B,T,C) the residual stream
    float *dsum;               // (B,T,C) s, where the norm comes last
    float *dbranch;            // (B,T,C) the output of f, where a post_norm follows it
    float *dhidden, *dqkv, *dpre_act;  // as hidden, qkv and pre_act
    float *dfinp;              // (B,T,C) the input of f
    float *dx_branch;          // (B,T,C) the branch's part of dx, where the norm comes first
};

// Returns a pointer to a tensor in `block`, which has the layout of m->list; NULL if the network
// has no such tensor.
static float *parameter(const Model *m, float *block, int kind, int l) {
    const Tensor *t = find_tensor(&m->list, kind, l);
    return t ? block + t->offset : NULL;
}

static LayerParameters layer_parameters(const Model *m, float *block, int l) {
    LayerParameters w = {
        .wqkv = parameter(m, block, WQ, l),  // wk and wv follow wq in memory
        .wo = parameter(m, block, WO, l),
        .w13 = parameter(m, block, W1, l),   // w3 follows w1
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
// The last argument of new_array() is an array to share; NULL creates a new one. If lender < i,
// this sublayer shares the arrays inside lender's branch. If lender = i, its own pointers are still
// NULL.
static void create_activations(Model *m, int i, int lender, size_t N) {
    const Config *c = &m->config;
    size_t C = c->C, H = c->H;
    int attention = i % 2 == 0, norm_last = norm_comes_last(c, i / 2), post_norm = has_post_norm(c);
    Arrays *r = &m->arrays;
    Activations *a = &m->activations[i], *shared = m->activations, *from = &m->activations[lender];
    if (!norm_last) {
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
                          post_norm ? NULL : shared->branch);
    if (post_norm) {
        a->post_rstd = new_array(r, i, "rmsnorm_forward (post_norm)", N, NULL);
        a->post_normed = new_array(r, i, "rmsnorm_forward (post_norm)", N * C, shared->post_normed);
    }
    if (norm_last && c->gpas) a->scaled = new_array(r, i, "gpas_forward", N * C, shared->scaled);
    a->sum = new_array(r, i, "residual_forward", N * C, NULL);
    if (!norm_last && c->gpas) a->scaled = new_array(r, i, "gpas_forward", N * C, NULL);
    if (norm_last) {
        a->rstd = new_array(r, i, "rmsnorm_forward", N, NULL);
        a->normed = new_array(r, i, "rmsnorm_forward", N * C, NULL);
    }
}

// Creates the gradients for N rows, in the order in which they are computed, and Adam's moments.
// Arrays that are computed twice, or in two places, are listed twice.
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
    m->dbranch = new_array(r, LAYER_BACKWARD, "rmsnorm_backward (post_norm)", N * C, NULL);
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
    m->keeps_keys = training ? !o->recompute : B == 1;  // else the layers share one qkv
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

// With --check-finite on, exits if an array or a gradient that is computed at `place` (0 .. 2L-1, a
// sublayer's forward pass; or EMBED, HEAD, ...) holds NaN or infinity.
static void check_finite(const Model *m, int place, int sublayer) {
    if (!m->options->check_finite) return;
    check_arrays(&m->arrays, place, sublayer);
    if (place <= HEAD_BACKWARD)  // one of the places in the backward pass
        check_gradients(&m->list, m->gradients, sublayer < 0 ? -1 : sublayer / 2);
}

// Computes the branch f of layer l, attention (sub = 0) or the feed-forward network (sub = 1):
// out = f(inp), for the positions from `first` to T - 1 of B sequences. B must be 1 if first > 0.
// out, inp (rows,C). With out = NULL it stops before the last matrix: the backward pass only needs
// what comes before.
static void branch_forward(const Model *m, int l, int sub, float *out, const float *inp, int first,
                           int B, int T) {
    int C = m->config.C, H = m->config.H, NH = m->config.NH, rows = B * (T - first);
    const LayerParameters *w = &m->w.layers[l];
    const Activations *a = &m->activations[2 * l + sub];
    if (sub == 0) {
        float *qkv = a->qkv + (size_t)first * 3 * C;  // the rows before hold earlier positions
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

// Given dout, the gradient of the branch's output, computes dinp, that of its input. All (B,T,C).
static void branch_backward(const Model *m, int l, int sub, float *dinp, const float *dout,
                            const float *inp, int B, int T) {
    int C = m->config.C, H = m->config.H, NH = m->config.NH, N = B * T;
    const LayerParameters *w = &m->w.layers[l], *d = &m->d.layers[l];
    const Activations *a = &m->activations[2 * l + sub];
    if (sub == 0) {
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
One sublayer of any of the twelve networks: six values of --norm, each with GPAS or without. G is
GPAS if it is on, else it is left out; f is the branch:

    pre       y = G(x + f(norm(x)))
    lns       as pre; in layer l = 0, 1, ... the weights of the norms start at 1/sqrt(l + 1)
    sandwich  y = G(x + post_norm(f(norm(x))))
    post      y = norm(G(x) + f(x))
    deepnorm  y = norm(A G(x) + f(x)),  A = (2L)^(1/4)
    mix       the first L/4 layers are post, the others pre

So there are two orders, norm first (sandwich adds post_norm) and norm last. This function computes
the output y of layer l's attention (sub = 0) or feed-forward network (sub = 1) from its input x,
for the positions from `first` to T - 1 of B sequences. x and y (rows,C).
*/
static const float *sublayer_forward(const Model *m, int l, int sub, const float *x, int first,
                                     int B, int T) {
    const Config *c = &m->config;
    const LayerParameters *w = &m->w.layers[l];
    Activations *a = &m->activations[2 * l + sub];
    int C = c->C, rows = B * (T - first);
    size_t n = (size_t)rows * C;
    a->inp = x;
    if (!norm_comes_last(c, l)) {
        rmsnorm_forward(a->normed, a->rstd, x, w->norm[sub], rows, C);         // norm(x)
        branch_forward(m, l, sub, a->branch, a->normed, first, B, T);          // b = f(norm(x))
        const float *b = a->branch;
        if (has_post_norm(c)) {                                                // b = post_norm(b)
            rmsnorm_forward(a->post_normed, a->post_rstd, b, w->post_norm[sub], rows, C);
            b = a->post_normed;
        }
        residual_forward(a->sum, x, b, 1, n);                                  // s = x + b
        a->out = a->sum;
        if (c->gpas) {                                                         // y = GPAS(s)
            gpas_forward(a->scaled, a->sum, *w->gate, c->gate_activation, n);
            a->out = a->scaled;
        }
    } else {
        branch_forward(m, l, sub, a->branch, x, first, B, T);                  // b = f(x)
        const float *z = x;
        if (c->gpas) {                                                         // z = GPAS(x)
            gpas_forward(a->scaled, x, *w->gate, c->gate_activation, n);
            z = a->scaled;
        }
        residual_forward(a->sum, z, a->branch, shortcut_scale(c), n);          // s = A z + b
        rmsnorm_forward(a->normed, a->rstd, a->sum, w->norm[sub], rows, C);    // y = norm(s)
        a->out = a->normed;
    }
    check_finite(m, 2 * l + sub, 2 * l + sub);
    return a->out;
}

// x += y, for n numbers.
static void add(float *x, const float *y, size_t n) {
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

/*
The same sublayer backwards. Given dy, compute dx. For an operation F, F^T v denotes its transposed
Jacobian applied to v, which is what F's backward function computes. x takes two paths, along the
shortcut and into the branch, so dx is the sum of two gradients:

    norm first   s = x + b,  b = post_norm(f(norm(x))),  y = GPAS(s)
        ds = dy                                  GPAS lets it pass unscaled
        dg -= a'(g) sum_i s_i dy_i
        dx = ds + norm^T f^T post_norm^T ds      shortcut + branch; post_norm only in sandwich

    norm last    z = GPAS(x),  s = A z + f(x),  y = norm(s)
        ds = norm^T dy
        dz = A ds
        dg -= a'(g) sum_i x_i dz_i
        dx = dz + f^T ds                         shortcut + branch; GPAS lets dz pass unscaled

The gradient of the stream stays in one array, dx (B,T,C): it holds dy on entry, then ds (norm
first) or dz (norm last), and dx in the end, when it is returned. The branch has arrays of its own.
(Without the stop-gradient, GPAS multiplies what is in dx by 1 - a(g).)
*/
static float *sublayer_backward(const Model *m, int l, int sub, float *dx, int B, int T) {
    const Config *c = &m->config;
    const LayerParameters *w = &m->w.layers[l], *d = &m->d.layers[l];
    const Activations *a = &m->activations[2 * l + sub];
    const float *x = a->inp, *finp = norm_comes_last(c, l) ? x : a->normed;  // finp: the input of f
    int C = c->C, N = B * T, activation = c->gate_activation;
    size_t n = (size_t)N * C;
    float *dgate = c->gate_train ? d->gate : NULL;
    if (m->options->recompute && l < c->L - 1)  // no later layer overwrote the last one's
        branch_forward(m, l, sub, NULL, finp, 0, B, T);
    if (!norm_comes_last(c, l)) {
        if (c->gpas)                                                           // dg; ds = dy
            gpas_backward(dx, dgate, dx, a->sum, *w->gate, activation, c->stop_grad, n);
        float *db = dx;                                       // db = ds, if there is no post_norm
        if (has_post_norm(c)) {                                                // post_norm^T ds
            db = m->dbranch;
            rmsnorm_backward(db, d->post_norm[sub], dx, a->branch, w->post_norm[sub], a->post_rstd,
                             N, C);
        }
        branch_backward(m, l, sub, m->dfinp, db, finp, B, T);                  // dfinp = f^T db
        rmsnorm_backward(m->dx_branch, d->norm[sub], m->dfinp, x, w->norm[sub], a->rstd, N, C);
        add(dx, m->dx_branch, n);                                              // ds + norm^T dfinp
    } else {
        float *ds = m->dsum;
        rmsnorm_backward(ds, d->norm[sub], dx, a->sum, w->norm[sub], a->rstd, N, C);
        residual_backward(dx, ds, shortcut_scale(c), n);                       // dz = A ds
        if (c->gpas)                                                           // dg; dz stays
            gpas_backward(dx, dgate, dx, x, *w->gate, activation, c->stop_grad, n);
        branch_backward(m, l, sub, m->dfinp, ds, finp, B, T);                  // dfinp = f^T ds
        add(dx, m->dfinp, n);                                                  // dz + dfinp
    }
    check_finite(m, LAYER_BACKWARD, 2 * l + sub);
    return dx;
}

// Runs the whole network on the positions from `first` to T - 1 of B sequences: computes the logits
// and, given targets, the losses. tokens, targets (rows). B must be 1 if first > 0.
static void network_forward(Model *m, const int *tokens, const int *targets, int first, int B,
                            int T) {
    int C = m->config.C, V = m->config.V, L = m->config.L, rows = B * (T - first);
    embedding_forward(m->embedded, tokens, m->w.embedding, rows, C);
    check_finite(m, EMBED, -1);
    const float *x = m->embedded;
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

// Computes the logits of tokens (B,T). With targets (B,T) returns the mean loss in nats, else 0.
double model_forward(Model *m, const int *tokens, const int *targets, int B, int T) {
    network_forward(m, tokens, targets, 0, B, T);
    return targets ? dot(m->losses, NULL, (size_t)B * T) / (B * T) : 0;
}

// The same for the positions from `first` to T - 1 of one sequence whose earlier positions have
// been computed: attention needs their keys and values, which are still in qkv, and nothing else of
// them. So a story is told by computing each new position once. Where the layers share one qkv, all
// positions are computed again.
double model_extend(Model *m, const int *tokens, const int *targets, int first, int T) {
    int from = m->keeps_keys ? first : 0, rows = T - first;
    network_forward(m, tokens + from, targets ? targets + from : NULL, from, 1, T);
    return targets ? dot(m->losses + first - from, NULL, rows) / rows : 0;
}

// Adds to the gradients those of scale times the sum of all losses of the last model_forward(),
// which must have had these tokens and targets.
void model_backward(Model *m, const int *tokens, const int *targets, int B, int T, double scale) {
    int C = m->config.C, V = m->config.V, L = m->config.L, N = B * T;
    const float *x = m->activations[2 * L - 1].out;
    float *dx = m->dx;
    // In place, the logits become their gradients. dfinp is free here; it gets that of
    // final_normed.
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

// Small functions that dev/model.h declares and describes.

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
    float clip;  // a factor for the gradient
    int t;       // the number of this update: 1, 2, ...
} AdamW;

// AdamW (arXiv 1711.05101). For each parameter p, with its gradient dp after clipping:
//   m = beta1 m + (1 - beta1) dp       v = beta2 v + (1 - beta2) dp^2
//   p -= lr (mhat / (sqrt(vhat) + eps) + weight_decay p)
// m and v start at 0, for which mhat = m / (1 - beta1^t) and vhat = v / (1 - beta2^t) compensate.
// p, grad, m, v: n numbers.
static void adamw_update(float *p, const float *grad, float *m, float *v, size_t n, AdamW adam) {
    float unbias_m = (float)(1 / (1 - pow(adam.beta1, adam.t)));
    float unbias_v = (float)(1 / (1 - pow(adam.beta2, adam.t)));
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) {
        float dp = grad[i] * adam.clip;
        m[i] = adam.beta1 * m[i] + (1 - adam.beta1) * dp;
        v[i] = adam.beta2 * v[i] + (1 - adam.beta2) * dp * dp;
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

// Makes the AdamW update of one step; steps count from 0. Weight decay applies to matrices only,
// not to the weights of norms and gates. Gates are clipped by their own factor.
void model_update(Model *m, int step, double grad_norm, double gate_norm) {
    const Options *o = m->options;
    double clip, gate_clip;
    clip_factors(o, grad_norm, gate_norm, &clip, &gate_clip);
    AdamW adam = {.lr = learning_rate(o, step), .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f,
                  .t = step + 1};
    for (int i = 0; i < m->list.count; i++) {
        const Tensor *t = &m->list.tensors[i];
        int is_gate = t->kind == GATE, is_matrix = t->cols > 0;
        size_t at = t->offset;
        if (is_gate && !m->config.gate_train) continue;
        adam.weight_decay = is_matrix ? o->weight_decay : 0;
        adam.clip = is_gate ? gate_clip : clip;
        adamw_update(m->parameters + at, m->gradients + at, m->adam_m + at, m->adam_v + at, t->size,
                     adam);
    }
    check_finite(m, UPDATE, -1);
}

/* ------------------------------------------------------------------------------------------------
5. Training
*/

const char program[] = "train_gpas", default_dtype[] = "fp32";
const int on_gpu = 0;

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
