// gemm.h: defines gemm; Packed, pack, gemm_packed.
//
// With PLAIN defined, train_gpas.c itself defines gemm, pack, gemm_packed.
#ifndef GEMM_H
#define GEMM_H
#include "matrix.h"
#include "thread_memory.h"
#include <omp.h>
#ifndef PLAIN
#include "amx.h"
#endif

// The right-hand operand of gemm_packed(). If panels is not NULL, it points to a packed copy of b.
typedef struct {
    Matrix b;
    const float *panels;
    size_t panel;  // floats in a panel
} Packed;

// C = A B, or C += A B with accumulate. C (M,N) has rows ldc apart; A (M,K); B (K,N). M, N, K > 0.
// C overlaps neither A nor B.
static void gemm(float *c, size_t ldc, Matrix a, Matrix b, int M, int N, int K, int accumulate);

// Prepares B (K,N) to be multiplied by `rows` rows of A, all in all, on this thread. For more than
// one, B is copied to thread_memory(which); the copy is valid until that buffer is used again.
static Packed pack(int which, Matrix b, int K, int N, int rows);

// As gemm(), on this thread alone, with the first K rows and N columns of B, which may have more.
static void gemm_packed(float *c, size_t ldc, Matrix a, Packed b, int M, int N, int K,
                        int accumulate);

/*
Matrix multiplication takes most of a training step. A core with AVX-512 does 32 multiply-adds in a
cycle, if their operands are in registers. In that time the L2 cache delivers about 12 numbers, and
memory 2. So each level uses a number that it has loaded for many multiply-adds:

  registers  multiply_tile() keeps MR x NR results in registers over the whole depth. For MR * NR
             multiply-adds it loads only MR numbers of A and NR of B.
  panels     B is packed: copied to panels of NR columns, which lie in memory in the order in which
             multiply_tile() reads them. A panel serves all rows of a block of A.
  L2         A is cut into blocks of MC rows and KC columns, so that a block stays in this cache
             while all panels are multiplied with it. The block is packed, too, unless its rows are
             contiguous and B is so narrow that this costs more than it saves.
  cores      The smaller operand is packed by all cores together and read by all. Of the larger one
             each core takes a part at a time, which no other core reads. One thread sums each
             result, always in the same order, so the number of threads changes no bit.

The vector types are an extension of gcc and clang. The same source compiles to AVX-512, AVX2, SSE
or NEON. Newer Intel Xeons also have a matrix unit, AMX, which amx.h uses where it can.
*/
#ifndef PLAIN
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
enum { KC = 1024, MC = 36, NC = 192 };  // a core takes about MC rows, or NC columns, at a time
typedef float Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(float)), may_alias));
#define ALWAYS_INLINE static inline __attribute__((always_inline))  // compiled for each constant

// Packs lines (rows of A or columns of B) into panels of `width` lines: element k of a line is
// x[line * line_step + k * k_step], and in its panel dst[k * width + line]. Missing lines are 0.
// Lines contiguous in memory are copied 16 at a time; more would compete for cache sets.
ALWAYS_INLINE void pack_panels(float *dst, const float *x, size_t line_step, size_t k_step,
                               int lines, int width, int depth) {
    int group = line_step == 1 ? width : imin(width, 16);
    int end = (lines + width - 1) / width * width;
    for (int line = 0; line < end; line += group, x += group * line_step) {
        float *to = dst + line / width * ((size_t)width * depth) + line % width;
        for (int k = 0; k < depth; k++, to += width) {
            const float *src = x + k * k_step;
            if (line + group > lines) {
                for (int i = 0; i < group; i++) to[i] = line + i < lines ? src[i * line_step] : 0;
            } else if (line_step == 1) {
                __builtin_prefetch(src + 16 * k_step);
                memcpy(to, src, group * sizeof(float));
            } else {
                for (int i = 0; i < group; i++) to[i] = src[i * line_step];
            }
        }
    }
}

static void pack_rows(float *dst, Matrix a, int M, int depth) {
    if (a.row == 1) pack_panels(dst, a.x, 1, a.column, M, MR, depth);
    else pack_panels(dst, a.x, a.row, 1, M, MR, depth);
}

static void pack_columns(float *dst, Matrix b, int N, int depth) {
    if (b.column == 1) pack_panels(dst, b.x, 1, b.row, N, NR, depth);
    else pack_panels(dst, b.x, b.column, 1, N, NR, depth);
}

// Computes C = A B, or C += A B, for `rows` rows of A and one panel of B. rows <= MR is a constant,
// columns <= NR, depth > 0. A tile that extends past the edge of C is computed into `edge`, and its
// valid part is copied or added.
ALWAYS_INLINE void multiply_tile(int rows, float *c, size_t ldc, Matrix a, const float *b,
                                 int depth, int columns, int accumulate) {
    float edge[MR * NR], *out = columns == NR ? c : edge;
    size_t out_row = columns == NR ? ldc : (size_t)NR;
    Vector zero = {0}, tile[MR][2];
    for (int i = 0; i < rows; i++) {
        tile[i][0] = tile[i][1] = zero;
        __builtin_prefetch(c + i * ldc);  // so that C is in the cache at the end
        __builtin_prefetch(c + i * ldc + LANES);
    }
    do {
        Vector b0 = *(const Vector *)b, b1 = *(const Vector *)(b + LANES);
        for (int i = 0; i < rows; i++) {
            tile[i][0] += a.x[i * a.row] * b0;
            tile[i][1] += a.x[i * a.row] * b1;
        }
        a.x += a.column;
        b += NR;
    } while (--depth);
    for (int i = 0; i < rows; i++, out += out_row) {
        Vector *c0 = (Vector *)out, *c1 = (Vector *)(out + LANES);
        if (accumulate && columns == NR) {
            tile[i][0] += *c0;
            tile[i][1] += *c1;
        }
        *c0 = tile[i][0];
        *c1 = tile[i][1];
    }
    for (int i = 0; i < rows && columns < NR; i++, c += ldc)
        for (int j = 0; j < columns; j++) c[j] = (accumulate ? c[j] : 0) + edge[i * NR + j];
}

// Computes the tiles of M rows and one panel of B, each tile as tall as the remaining rows allow.
// a_panel: the distance from MR rows of A, packed or not, to the next MR.
ALWAYS_INLINE void multiply_rows(float *c, size_t ldc, Matrix a, size_t a_panel, const float *b,
                                 int M, int columns, int depth, int accumulate) {
    const float *first = a.x;
    int i = 0;
#define TILES(rows) \
    for (; M - i >= (rows); i += (rows)) { \
        a.x = first + i / MR * a_panel + i % MR * a.row; \
        multiply_tile(rows, c + i * ldc, ldc, a, b, depth, columns, accumulate); \
    }
    TILES(MR) TILES(MR / 3 * 2) TILES(MR / 3) TILES(2) TILES(1)
#undef TILES
}

// Multiplies M rows of A with N columns of B, whose panels are `b_panel` numbers apart.
static void multiply_block(float *c, size_t ldc, Matrix a, size_t a_panel, const float *b,
                           size_t b_panel, int M, int N, int depth, int accumulate) {
    for (int i = 0; i < M; i += MC, c += MC * ldc, a.x += MC / MR * a_panel)
        for (int j = 0; j < N; j += NR) {
            const float *panel = b + j / NR * b_panel;
            int rows = imin(MC, M - i), columns = imin(NR, N - j);
            if (a.column == 1)  // each case is inlined with one stride known
                multiply_rows(c + j, ldc, matrix(a.x, a.row), a_panel, panel, rows, columns, depth,
                              accumulate);
            else
                multiply_rows(c + j, ldc, transpose(matrix(a.x, a.column)), a_panel, panel, rows,
                              columns, depth, accumulate);
        }
}

// Computes c (N) = a B, or c += a B, for one row a (K). B is not packed, because for a single row
// that would cost more than it saves.
static void multiply_row(float *c, const float *a, Matrix b, int N, int K, int accumulate) {
    if (!accumulate) memset(c, 0, N * sizeof(float));
    for (int j = 0; j < N && b.row == 1; j++) {
        const float *column = b.x + j * b.column;
        float sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int k = 0; k < K; k++) sum += a[k] * column[k];
        c[j] += sum;
    }
    for (int k = 0; k < K && b.row != 1; k++) {
        const float *row = b.x + k * b.row;
        #pragma omp simd
        for (int j = 0; j < N; j++) c[j] += a[k] * row[j];
    }
}

static Packed pack(int which, Matrix b, int K, int N, int rows) {
    float *panels = rows == 1 ? NULL : thread_memory(which, (size_t)K * (N + NR));
    if (panels) pack_columns(panels, b, N, K);
    Packed p = {b, panels, (size_t)K * NR};
    return p;
}

static void gemm_packed(float *c, size_t ldc, Matrix a, Packed b, int M, int N, int K,
                        int accumulate) {
    if (!b.panels && K > 1 && a.column != 1) die("gemm_packed: a row of A is not contiguous");
    for (int i = 0; i < M && !b.panels; i++)
        multiply_row(c + i * ldc, a.x + i * a.row, b.b, N, K, accumulate);
    if (b.panels) multiply_block(c, ldc, a, MR * a.row, b.panels, b.panel, M, N, K, accumulate);
}

// gemm() with the code above. If C is wider than tall, the threads share A, and each takes some
// columns of B at a time. If not, they share B, and each takes some rows of A. If B has 512 columns
// or fewer, packing the rows of A does not pay.
static void gemm_vectors(float *c, size_t ldc, Matrix a, Matrix b, int M, int N, int K,
                         int accumulate) {
    int threads = omp_get_max_threads(), depth = (K - 1) / ((K + KC - 1) / KC) + 1;
    if (M == 1 && (a.column == 1 || K == 1)) {
        int share = (N - 1) / threads + 1;
        #pragma omp parallel for
        for (int j = 0; j < N; j += share)
            multiply_row(c + j, a.x, from(b, 0, j), imin(share, N - j), K, accumulate);
        return;
    }
    int by_columns = N > M, pack_a = by_columns || a.column != 1 || N > 512;
    int small = imin(M, N), small_width = by_columns ? (int)MR : NR;
    int large = imax(M, N), large_width = by_columns ? (int)NR : MR, size = by_columns ? NC : MC;
    size_t num_panels = (large - 1) / large_width + 1;
    int parts = imin((int)num_panels, (large / size / threads + 1) * threads);
    float *shared = thread_memory(SHARED_OPERAND, (size_t)(small + small_width) * depth);
    #pragma omp parallel if ((double)M * N * K > 1e5)
    for (int k0 = 0; k0 < K; k0 += depth) {
        int steps = imin(depth, K - k0), add = accumulate || k0 > 0;
        size_t a_panel = MR * (pack_a ? (size_t)steps : a.row), b_panel = (size_t)NR * steps;
        Matrix ak = from(a, 0, k0), bk = from(b, k0, 0);
        float *own = thread_memory(OWN_OPERAND, (size_t)(NC + 2 * NR) * KC);
        #pragma omp for
        for (int i = 0; i < small; i += small_width) {
            int n = imin(small_width, small - i);
            if (by_columns) pack_rows(shared + (size_t)i * steps, from(ak, i, 0), n, steps);
            else pack_columns(shared + (size_t)i * steps, from(bk, 0, i), n, steps);
        }
        #pragma omp for schedule(dynamic)
        for (int part = 0; part < parts; part++) {
            int i = (int)(num_panels * part / parts) * large_width;
            int n = imin(large, (int)(num_panels * (part + 1) / parts) * large_width) - i;
            Matrix left = {by_columns ? shared : own, 1, MR};
            if (by_columns) pack_columns(own, from(bk, 0, i), n, steps);
            else if (pack_a) pack_rows(own, from(ak, i, 0), n, steps);
            else left = from(ak, i, 0);
            multiply_block(c + i * (by_columns ? 1 : ldc), ldc, left, a_panel,
                           by_columns ? own : shared, b_panel, by_columns ? M : n,
                           by_columns ? n : N, steps, add);
        }
    }
}

static void gemm(float *c, size_t ldc, Matrix a, Matrix b, int M, int N, int K, int accumulate) {
#ifdef AMX
    if (M >= 32 && N >= 32 && K >= 32 && allow_amx()) {  // else a block is mostly zeros
        gemm_amx(c, ldc, a, b, M, N, K, accumulate);
        return;
    }
#endif
    gemm_vectors(c, ldc, a, b, M, N, K, accumulate);
}
#endif
#endif
