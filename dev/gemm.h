// gemm.h: all code that is written for the machine (stage 1)
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

// The row-major matrix at x whose rows are `row` numbers apart.
static inline Matrix matrix(const float *x, size_t row) {
    Matrix a = {x, row, 1};
    return a;
}

// Its transpose is the same memory with the two strides swapped.
static inline Matrix transpose(Matrix a) {
    Matrix t = {a.x, a.column, a.row};
    return t;
}

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

// Asks memory for the n numbers from x on, to have them in a cache when they are needed. Processors
// do so by themselves, but as a rule only within a page of 4 KiB. Nothing is read: an address
// beyond the array does no harm.
static inline void prefetch(const float *x, int n) {
    for (int i = 0; i < n; i += 16) __builtin_prefetch(x + i);
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
static void gemm(float *c, size_t ldc, Matrix ma, Matrix mb, int M, int N, int K, int accumulate) {
    const float *a = ma.x, *b = mb.x;
    size_t a_row = ma.row, a_k = ma.column, b_k = mb.row, b_column = mb.column;
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

#endif
