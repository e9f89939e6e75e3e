// gemm.h: defines Matrix, matrix, transpose, gemm; Packed, pack, gemm_packed; dot, max_of,
// exp_fast; thread_memory, free_thread_memory. Most code that is tuned for the CPU is here.
//
// With PLAIN defined, train_gpas.c itself defines gemm, pack, gemm_packed, dot, max_of, exp_fast.
#ifndef GEMM_H
#define GEMM_H
#include "utils.h"
#include <math.h>
#include <omp.h>

// A matrix in memory: element (i,j) is x[i * row + j * column].
typedef struct {
    const float *x;
    size_t row, column;
} Matrix;

// Returns the row-major matrix at x whose rows are `row` numbers apart.
static inline Matrix matrix(const float *x, size_t row) {
    Matrix a = {x, row, 1};
    return a;
}

// Returns the transpose: the same memory with the two strides swapped.
static inline Matrix transpose(Matrix a) {
    Matrix t = {a.x, a.column, a.row};
    return t;
}

// The right-hand operand of gemm_packed(). Where `panels` is not NULL, they hold a copy of it.
typedef struct {
    Matrix b;
    const float *panels;
    size_t panel;  // the size of a panel
} Packed;

// C = A B, or C += A B with accumulate. C (M,N) has rows ldc apart; A (M,K); B (K,N). M, N, K > 0.
static void gemm(float *c, size_t ldc, Matrix a, Matrix b, int M, int N, int K, int accumulate);

// Prepares B (K,N) to be multiplied by about `rows` rows of A on this thread. If this copies B, the
// copy is in thread_memory(which) and stays valid until that buffer is used again.
static Packed pack(int which, Matrix b, int K, int N, int rows);

// As gemm(), on this thread alone, with the first K rows and N columns of B, which may have more.
static void gemm_packed(float *c, size_t ldc, Matrix a, Packed b, int M, int N, int K,
                        int accumulate);

// Returns the sum over i of a[i] * b[i], in double; with b NULL the sum of a. The result does not
// depend on the number of threads.
static double dot(const float *a, const float *b, size_t n);

// Returns the largest of x (n).
static float max_of(const float *x, int n);

// Returns e^x with a relative error of about 1e-7.
static inline float exp_fast(float x);

// Returns room for n floats that belongs to the calling thread: its buffer number `which`, kept
// from call to call. Buffers 8 and 9 belong to gemm().
enum { THREAD_BUFFERS = 10, PACKED_A = 8, PACKED_B = 9 };
static float *thread_buffer[THREAD_BUFFERS];
static size_t thread_buffer_size[THREAD_BUFFERS];
#pragma omp threadprivate(thread_buffer, thread_buffer_size)

static inline float *thread_memory(int which, size_t n) {
    if (thread_buffer_size[which] < n) {
        free(thread_buffer[which]);
        thread_buffer[which] = (float *)allocate(n, sizeof(float));
        thread_buffer_size[which] = n;
    }
    return thread_buffer[which];
}

static inline void free_thread_memory(void) {
    #pragma omp parallel
    for (int which = 0; which < THREAD_BUFFERS; which++) {
        free(thread_buffer[which]);
        thread_buffer[which] = NULL;
        thread_buffer_size[which] = 0;
    }
}

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

// Sixteen running maxima, which the compiler keeps in vectors.
static float max_of(const float *x, int n) {
    float lane[16], largest = x[0];
    int i = 0;
    for (int k = 0; k < 16; k++) lane[k] = largest;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 16; k++) lane[k] = x[i + k] > lane[k] ? x[i + k] : lane[k];
    for (; i < n; i++) lane[0] = x[i] > lane[0] ? x[i] : lane[0];
    for (int k = 0; k < 16; k++) largest = lane[k] > largest ? lane[k] : largest;
    return largest;
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

/*
Matrix multiplication takes nine tenths of a training step. A core can do 16 multiply-adds in one
instruction (AVX-512), but only if the operands are in registers; memory is a hundred times too
slow. Each level below makes one move of data serve many multiply-adds:

  registers  multiply_tile() keeps a tile of MR x NR results in registers over the whole depth.
             Each step loads NR numbers of B and MR of A and does MR * NR multiply-adds.
  L1, L2     A and B are packed: copied to panels that lie in memory in the very order in which the
             tile reads them, so all loads are sequential. Depth is cut to KC: an MC x KC block of
             A, 0.4 MB, stays in the L2 cache while it is multiplied with all panels of B.
  L3         B is cut to NC columns, so that its packed copy stays in the L3 cache.
  memory     While one block of A is multiplied, the next one is prefetched, a line at a time.
  cores      B is packed once, for all cores. Then each core takes some rows of A at a time. Every
             result is summed by one thread, in the order of k, so the number of threads does not
             change its bits.

Vectors are an extension of gcc and clang. The same lines become AVX-512, AVX2, SSE or NEON.
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
#define ALWAYS_INLINE static inline __attribute__((always_inline))  // compiled for each constant

// Transposes 4 x 4 numbers: dst[k * width + line] = src[line * line_step + k].
static inline void transpose_4x4(float *dst, int width, const float *src, size_t line_step) {
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

static inline void prefetch(const float *x, int n) {
    for (int i = 0; i < n; i += 16) __builtin_prefetch(x + i);
}

// Packs `lines` rows of A (width MR) or columns of B (width NR) as panels of `width` lines: number
// k of a line is src[line * line_step + k * k_step]. dst (panels,depth,width), the last panel
// filled up with zeros. If the lines are adjacent in memory (line_step 1), number k of all lines is
// copied at once; if not, each panel is transposed.
ALWAYS_INLINE void pack_panels(float *dst, const float *src, size_t line_step, size_t k_step,
                               int lines, int width, int depth) {
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
        int squares = k_step == 1 ? full / 4 * 4 : 0, square_depth = depth / 4 * 4;
        for (int i = 0; i < squares; i++)  // the next panel's lines
            prefetch(from + (i + width) * line_step, depth);
        for (int k = 0; k < square_depth; k += 4)
            for (int i = 0; i < squares; i += 4)
                transpose_4x4(panel + k * width + i, width, from + i * line_step + k, line_step);
        for (int k = squares == width ? square_depth : 0; k < depth; k++)
            for (int i = k < square_depth ? squares : 0; i < width; i++)
                panel[k * width + i] = i < full ? from[i * line_step + k * k_step] : 0;
    }
}

// The block of A that will be packed next: `rows` rows of `length` numbers, `stride` apart.
typedef struct {
    const float *row;
    size_t stride;
    int rows, length, at;
} Prefetch;

// Prefetches the next cache line (16 floats) of that block. Called in every eighth step of a tile,
// it costs nothing, and over six or more panels of B it covers the whole block.
static inline void prefetch_next_line(Prefetch *p) {
    if (p->rows == 0) return;
    __builtin_prefetch(p->row + p->at);
    p->at += 16;
    if (p->at >= p->length) {
        p->at = 0;
        p->row += p->stride;
        p->rows--;
    }
}

// Computes C = A B, or C += A B, for `rows` rows of A and one panel of B. rows <= MR is a constant,
// columns <= NR, depth > 0. A tile that extends past the edge of C is computed into `edge`, and its
// valid part copied. next: what to prefetch, or NULL.
ALWAYS_INLINE void multiply_tile(int rows, float *c, size_t ldc, Matrix a, const float *b,
                                 int depth, int columns, int accumulate, Prefetch *next) {
    float edge[MR * NR], *out = columns == NR ? c : edge;
    size_t out_row = columns == NR ? ldc : (size_t)NR;
    Vector zero = {0}, tile[MR][2];
    for (int i = 0; i < rows; i++) {
        tile[i][0] = tile[i][1] = zero;
        __builtin_prefetch(c + i * ldc);
        __builtin_prefetch(c + i * ldc + LANES);
    }
    do {
        if (next && depth % 8 == 0) prefetch_next_line(next);
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

// Computes the tiles of M rows, each as tall as the remaining rows allow.
ALWAYS_INLINE void multiply_rows(float *c, size_t ldc, Matrix a, size_t a_panel, const float *b,
                                 int M, int columns, int depth, int accumulate, Prefetch *next) {
    const float *panel = a.x;
    int i = 0;
#define TILES(rows) \
    for (; M - i >= (rows); i += (rows)) { \
        a.x = panel + i / MR * a_panel + i % MR * a.row; \
        multiply_tile(rows, c + i * ldc, ldc, a, b, depth, columns, accumulate, next); \
    }
    TILES(MR) TILES(MR / 3 * 2) TILES(MR / 3) TILES(2) TILES(1)
#undef TILES
}

// Computes c (N) = a B, or c += a B, for one row a (K). B is not packed, because for a single row
// that would cost more than it saves. B's columns, or else its rows, are contiguous.
static void multiply_row(float *c, const float *a, Matrix b, int N, int K, int accumulate) {
    for (int j = 0; j < N && !accumulate; j++) c[j] = 0;
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

// Can a row of A be multiplied with B by multiply_row()?
static inline int contiguous(Matrix a, Matrix b) {
    return a.column == 1 && (b.row == 1 || b.column == 1);
}

static Packed pack(int which, Matrix b, int K, int N, int rows) {
    Packed p = {b, NULL, (size_t)K * NR};
    if (rows == 1) return p;
    float *panels = thread_memory(which, (size_t)K * ((N + NR - 1) / NR * NR));
    pack_panels(panels, b.x, b.column, b.row, N, NR, K);
    p.panels = panels;
    return p;
}

static void gemm_packed(float *c, size_t ldc, Matrix a, Packed b, int M, int N, int K,
                        int accumulate) {
    if (!b.panels && K > 1 && !contiguous(a, b.b))
        die("gemm_packed: a row of A is not contiguous");
    for (int i = 0; i < M && !b.panels; i++)
        multiply_row(c + i * ldc, a.x + i * a.row, b.b, N, K, accumulate);
    for (int j = 0; j < N && b.panels; j += NR) {
        const float *panel = b.panels + j / NR * b.panel;
        int columns = imin(NR, N - j);
        if (a.column == 1)  // each case is inlined with one stride known
            multiply_rows(c + j, ldc, matrix(a.x, a.row), MR * a.row, panel, M, columns, K,
                          accumulate, NULL);
        else if (a.row == 1)
            multiply_rows(c + j, ldc, transpose(matrix(a.x, a.column)), MR, panel, M, columns, K,
                          accumulate, NULL);
        else die("gemm_packed: one stride of A must be 1");
    }
}

// For each block of NC columns and `depth` steps all threads together pack B. Then each thread
// takes a block of rows of A, packs it and multiplies. Meanwhile it prefetches the block that it
// will probably take next. K is split into equal depths of at most KC, and the rows into equal
// blocks, the same number for each thread.
static void gemm(float *c, size_t ldc, Matrix a, Matrix b, int M, int N, int K, int accumulate) {
    int depth = (K - 1) / ((K + KC - 1) / KC) + 1, threads = omp_get_max_threads();
    int panels = (M + MR - 1) / MR, blocks = imin(panels, (M / MC / threads + 1) * threads);
    if (M == 1 && contiguous(a, b)) {
        int share = (N - 1) / threads + 1;
        #pragma omp parallel for
        for (int j = 0; j < N; j += share) {
            Matrix columns = {b.x + j * b.column, b.row, b.column};
            multiply_row(c + j, a.x, columns, imin(share, N - j), K, accumulate);
        }
        return;
    }
    float *pb = thread_memory(PACKED_B, (size_t)(imin(N, NC) + NR) * depth);
    #pragma omp parallel if ((double)M * N * K > 1e5)
    for (int j0 = 0; j0 < N; j0 += NC)
        for (int k0 = 0; k0 < K; k0 += depth) {
            int columns = imin(NC, N - j0), steps = imin(depth, K - k0);
            int share = ((columns - 1) / threads / NR + 1) * NR;  // columns of B for each thread
            float *pa = thread_memory(PACKED_A, (MC + MR) * KC);
            #pragma omp for
            for (int j = 0; j < columns; j += share)
                pack_panels(pb + (size_t)j * steps, b.x + (j0 + j) * b.column + k0 * b.row,
                            b.column, b.row, imin(share, columns - j), NR, steps);
            #pragma omp for schedule(dynamic)
            for (int block = 0; block < blocks; block++) {
                int i = (int)((int64_t)panels * block / blocks) * MR;
                int rows = imin(M, (int)((int64_t)panels * (block + 1) / blocks) * MR) - i;
                pack_panels(pa, a.x + i * a.row + k0 * a.column, a.row, a.column, rows, MR, steps);
                int next = i + rows * threads, in_rows = a.column == 1;  // or in columns
                Prefetch p = {a.x + next * a.row + k0 * a.column, in_rows ? a.row : a.column,
                              in_rows ? rows : steps, in_rows ? steps : rows, 0};
                if (next >= M) p.rows = 0;
                for (int j = 0; j < columns; j += NR) {
                    Matrix packed = {pa, 1, MR};
                    multiply_rows(c + i * ldc + j0 + j, ldc, packed, (size_t)MR * steps,
                                  pb + (size_t)j * steps, rows, imin(NR, columns - j), steps,
                                  accumulate || k0 > 0, &p);
                }
            }
        }
}
#endif
#endif
