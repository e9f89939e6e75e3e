// amx.h: defines AMX, allow_amx, gemm_amx: gemm() on AMX, the matrix unit of newer Intel Xeons. If
// the processor that we compile for has none, it defines nothing.
/*
One instruction of AMX multiplies a 16 x 32 matrix by a 32 x 16 matrix and adds the product to a
16 x 16 matrix of floats, in 16 cycles. Per cycle that is 16 times as many multiply-adds as with
AVX-512. But the factors are bf16, which keep 8 of a float's 24 significant bits. So we cut each
float into three bf16, x = x0 + x1 + x2: x0 is the upper half of the bits of x, x1 is that of
x - x0, and x2 is the rest, exactly. Of the nine products of such parts we add the six largest:

    x y  =  x0 y0 + x0 y1 + x1 y0 + x0 y2 + x1 y1 + x2 y0  +  less than 2^-21 x y

What is left out is about 2^-24.6 x y on average, less than what rounding the sums costs. So AMX
could be 16/6 times as fast. It is about 1.5 times (make bench, with and without -mno-amx-bf16),
because the operands have to be cut and the tiles loaded.

Parts below 2^-126 count as 0, so factors below 2^-103 may lose bits. An infinity gives NaN.
*/
#ifndef AMX_H
#define AMX_H
#include "matrix.h"
#include "thread_memory.h"
#include <omp.h>
// The tests with finite differences define float as double, for which AMX is of no use.
#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__) && !defined(float)
#define AMX
#include <immintrin.h>
#include <sys/syscall.h>

// Each of the eight tile registers holds a matrix with 16 rows of 64 bytes: 16 floats, or 16 pairs
// of bf16. Operands are packed in blocks of 32 lines (rows of A or columns of B) x 32 numbers. A
// block has two tiles, of 16 lines each, for x0, two for x1 and two for x2. A row of a tile of A is
// a line; a column of a tile of B is a line.
enum { TILE = 16 * 16, BLOCK = 3 * 2 * TILE };  // in pairs
enum { AMX_KC = 512, AMX_LINES = 256 };         // as KC and MC in gemm.h: 768 KiB when packed
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Pairs __attribute__((vector_size(64), aligned(4), may_alias));

// Asks Linux to let this process use the tile registers. Returns 1 if it may.
static int allow_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

// Packs a block. x: 32 rows of 32 numbers, `step` apart; a line is a row for A, a column for B.
// Numbers k and k + 16 of a line become a pair. Any pairing will do if A and B use the same.
static void pack_block(uint32_t *to, const float *x, size_t step, int for_a) {
    size_t second_tile = for_a ? 16 * step : 16, k_plus_16 = for_a ? 16 : 16 * step;
    for (int i = 0; i < 32; i++) {
        const float *row = x + i / 16 * second_tile + i % 16 * step;
        Floats low = *(const Floats *)row, high = *(const Floats *)(row + k_plus_16);
        for (int part = 0; part < 3; part++) {
            Pairs low_bits = (Pairs)low & 0xFFFF0000, high_bits = (Pairs)high & 0xFFFF0000;
            *(Pairs *)(to + part * 2 * TILE + i * 16) = (low_bits >> 16) | high_bits;
            low -= (Floats)low_bits;
            high -= (Floats)high_bits;
        }
    }
}

// Writes x[0], x[512], x[1], x[513], ... to `to`. Doing this five times transposes 32 x 32 numbers.
static void interleave(float *restrict to, const float *restrict x) {
    for (int i = 0; i < 512; i++) {
        to[2 * i] = x[i];
        to[2 * i + 1] = x[i + 512];
    }
}

// Writes the transpose of a 32 x 32 matrix, whose rows are `step` apart, to `to`.
static void transpose_block(float *to, const float *x, size_t step) {
    float other[32 * 32];
    for (int i = 0; i < 32; i++) memcpy(other + i * 32, x + i * step, 32 * sizeof(float));
    interleave(to, other);
    interleave(other, to);
    interleave(to, other);
    interleave(other, to);
    interleave(to, other);
}

// Packs `depth` numbers of each of the first 32 of `count` lines, which are the rows of `lines`. If
// there are fewer lines, or depth is not a multiple of 32, the rest is filled with 0.
static void pack_lines(uint32_t *to, Matrix lines, int count, int depth, int for_a) {
    for (int k = 0; k < depth; k += 32, to += BLOCK) {
        Matrix block = for_a ? from(lines, 0, k) : transpose(from(lines, 0, k));
        int rows = imin(32, for_a ? count : depth - k);
        int columns = imin(32, for_a ? depth - k : count);
        float copy[32 * 32];
        if (rows < 32 || columns < 32) {
            memset(copy, 0, sizeof copy);
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < columns; j++) copy[i * 32 + j] = *from(block, i, j).x;
            block = matrix(copy, 32);
        } else if (block.column != 1) {
            transpose_block(copy, block.x, block.column);
            block = matrix(copy, 32);
        }
        pack_block(to, block.x, block.row, for_a);
    }
}

// Adds the product of a part of A (registers 4 and 5) and a part of B (6 and 7) to C (0 to 3: upper
// left, upper right, lower left, lower right). NULL: the part is in its registers already.
static inline void multiply_parts(const uint32_t *a, const uint32_t *b) {
    if (a) {
        _tile_loadd(4, a, 64);
        _tile_loadd(5, a + TILE, 64);
    }
    if (b) {
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + TILE, 64);
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// Computes 32 x 32 elements of C = A B, or C += A B, from packed lines. rows, columns: how many C
// has from c on. If either is below 32, the product goes to `edge`, and from there to C.
static void multiply_lines(float *c, size_t ldc, const uint32_t *a, const uint32_t *b, int rows,
                           int columns, int depth, int accumulate) {
    float edge[32 * 32], *out = rows < 32 || columns < 32 ? edge : c;
    size_t width = out == c ? ldc : 32, lower = 16 * width, stride = width * sizeof(float);
    __asm__ volatile("" ::: "memory");  // gcc does not know that _tile_loadd() reads memory
    if (accumulate && out == c) {
        _tile_loadd(0, out, stride);
        _tile_loadd(1, out + 16, stride);
        _tile_loadd(2, out + lower, stride);
        _tile_loadd(3, out + lower + 16, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int i = 0; i < 32 && out == c && !accumulate; i++) {  // so that the stores find it cached
        __builtin_prefetch(c + i * ldc);
        __builtin_prefetch(c + i * ldc + 16);
    }
    for (int k = 0; k < depth; k += 32, a += BLOCK, b += BLOCK) {
        multiply_parts(a, b + 4 * TILE);     // x0 y2; in this order only x0 is loaded twice
        multiply_parts(NULL, b + 2 * TILE);  // x0 y1
        multiply_parts(a + 2 * TILE, NULL);  // x1 y1
        multiply_parts(NULL, b);             // x1 y0
        multiply_parts(a, NULL);             // x0 y0
        multiply_parts(a + 4 * TILE, NULL);  // x2 y0
    }
    _tile_stored(0, out, stride);
    _tile_stored(1, out + 16, stride);
    _tile_stored(2, out + lower, stride);
    _tile_stored(3, out + lower + 16, stride);
    for (int i = 0; i < imin(rows, 32) && out == edge; i++)
        for (int j = 0; j < imin(columns, 32); j++)
            c[i * ldc + j] = (accumulate ? c[i * ldc + j] : 0) + edge[i * 32 + j];
}

// As gemm_vectors(), and shared among the threads in the same way.
static void gemm_amx(float *c, size_t ldc, Matrix a, Matrix b, int M, int N, int K,
                     int accumulate) {
    static const uint8_t eight_tiles[64] = {  // 0: palette; 16 on: bytes in a row; 48 on: rows
        1, [16] = 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,
        [48] = 16, 16, 16, 16, 16, 16, 16, 16};
    int by_columns = N > M, small = imin(M, N), large = imax(M, N), threads = omp_get_max_threads();
    Matrix small_lines = by_columns ? a : transpose(b), large_lines = by_columns ? transpose(b) : a;
    int blocks = (K - 1) / 32 + 1, depth = ((blocks - 1) / ((K - 1) / AMX_KC + 1) + 1) * 32;
    size_t num_panels = (large - 1) / 32 + 1, panel = (size_t)depth / 32 * BLOCK;  // of 32 lines
    int shares = imin((int)num_panels, (large / AMX_LINES / threads + 1) * threads);
    float *shared = thread_memory(SHARED_OPERAND, ((small - 1) / 32 + 1) * panel);
    #pragma omp parallel if ((double)M * N * K > 1e5)
    for (int k0 = 0; k0 < K; k0 += depth) {
        int steps = imin(depth, K - k0), add = accumulate || k0 > 0;
        uint32_t *all = (uint32_t *)shared;
        uint32_t *own = (uint32_t *)thread_memory(OWN_OPERAND, AMX_LINES / 32 * panel);
        _tile_loadconfig(eight_tiles);
        #pragma omp for
        for (int i = 0; i < small; i += 32)
            pack_lines(all + i / 32 * panel, from(small_lines, i, k0), small - i, steps,
                       by_columns);
        #pragma omp for schedule(dynamic)
        for (int share = 0; share < shares; share++) {
            int begin = (int)(num_panels * share / shares) * 32;
            int end = imin(large, (int)(num_panels * (share + 1) / shares) * 32);
            for (int j = begin; j < end; j += 32)
                pack_lines(own + (j - begin) / 32 * panel, from(large_lines, j, k0), large - j,
                           steps, !by_columns);
            for (int i = 0; i < small; i += 32) {
                for (int j = begin; j < end; j += 32) {
                    const uint32_t *x = all + i / 32 * panel, *y = own + (j - begin) / 32 * panel;
                    int row = by_columns ? i : j, column = by_columns ? j : i;
                    multiply_lines(c + row * ldc + column, ldc, by_columns ? x : y,
                                   by_columns ? y : x, M - row, N - column, steps, add);
                }
            }
        }
        _tile_release();
    }
}
#endif
#endif
