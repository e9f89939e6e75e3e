// amx.h: defines AMX, amx_works, gemm_amx: gemm() on the matrix unit of newer Intel Xeons.
/*
AMX multiplies matrices of 16 x 32 numbers, called tiles, and does 16 times as many multiply-adds
in a cycle as AVX-512. But the numbers are bf16, which keep 8 of a float's 24 significant bits. So
we cut each float into three bf16, x = x0 + x1 + x2, which together keep all 24. Of the nine
products of such parts we add the six largest, in float:

    x y  =  x0 y0 + x0 y1 + x1 y0 + x0 y2 + x1 y1 + x2 y0  +  less than 2^-20 x y

What is left out is 2^-24 x y on average. This is no more than what rounding a product to a float
costs, and the results are as precise as those of gemm(). So AMX could be 16/6 times as fast as
AVX-512, but cutting the operands, and loading tiles, cost a part of that.

AMX is 1 if this header defines the two functions, and 0 if the processor that we compile for has
no such unit.
*/
#ifndef AMX_H
#define AMX_H
#include "matrix.h"
#include "thread_memory.h"
#include <omp.h>
// The tests with finite differences define float as double. Then AMX cannot be used.
#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__) && !defined(PLAIN) && \
    !defined(float)
#define AMX 1
#include <immintrin.h>
#include <sys/syscall.h>

// Operands are packed in blocks: 32 lines (rows of A or columns of B) with 32 numbers of each. A
// block consists of two tiles for each of the three parts. A tile has 16 x 16 pairs of numbers, 64
// bytes in a row. In a tile of A each row belongs to a line, and in a tile of B each column.
enum { TILE = 16 * 16, BLOCK = 3 * 2 * TILE, AMX_KC = 512, AMX_LINES = 256 };
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Pairs __attribute__((vector_size(64), aligned(4), may_alias));

// Returns 1 if the Linux kernel allows this process to use tiles. Call it before the first one.
static int amx_works(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
    static int answer = -1;
    if (answer < 0) answer = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
    return answer;
}

// Transposes a tile: four times, row i is interleaved with row i + 8.
static void transpose_tile(uint32_t *tile) {
    Pairs x[16], y[16];
    memcpy(x, tile, sizeof x);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            y[2 * i] = __builtin_shufflevector(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20,
                                               5, 21, 6, 22, 7, 23);
            y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27,
                                                   12, 28, 13, 29, 14, 30, 15, 31);
        }
        memcpy(x, y, sizeof x);
    }
    memcpy(tile, x, sizeof x);
}

// Packs one block. Numbers k and k + 16 of a line become a pair: for the sum their order does not
// matter. Vectors are loaded in the direction in which the numbers are neighbours in memory. If a
// row of these tiles is not what it has to be, they are transposed.
static void pack_block(uint32_t *to, Matrix lines, int is_a) {
    int row_is_line = lines.column == 1;
    for (int i = 0; i < 32; i++) {
        int line = row_is_line ? i : i % 2 * 16, k = row_is_line ? 0 : i / 2;
        uint32_t *row = to + (row_is_line ? i * 16 : i % 2 * TILE + i / 2 * 16);
        Floats low = *(const Floats *)from(lines, line, k).x;
        Floats high = *(const Floats *)from(lines, line, k + 16).x;
        for (int part = 0; part < 3; part++, row += 2 * TILE) {
            Pairs low_bits = (Pairs)low & 0xFFFF0000, high_bits = (Pairs)high & 0xFFFF0000;
            *(Pairs *)row = low_bits >> 16 | high_bits;
            low -= (Floats)low_bits;
            high -= (Floats)high_bits;
        }
    }
    for (int i = 0; i < 6 && row_is_line != is_a; i++) transpose_tile(to + i * TILE);
}

// Packs the first 32 of `count` lines, with `depth` numbers of each. What is missing becomes 0.
static void pack_blocks(uint32_t *to, Matrix lines, int count, int depth, int is_a) {
    for (int k0 = 0; k0 < depth; k0 += 32, to += BLOCK) {
        Matrix block = from(lines, 0, k0);
        float copy[32 * 32] = {0};
        if (count < 32 || depth - k0 < 32) {
            for (int i = 0; i < imin(count, 32); i++)
                for (int k = 0; k < imin(depth - k0, 32); k++)
                    copy[i * 32 + k] = *from(block, i, k).x;
            block = matrix(copy, 32);
        }
        pack_block(to, block, is_a);
    }
}

// Adds the product of one part of A and one part of B to C, which is in tile registers 0 to 3. NULL
// stands for the part that is loaded already, that of A in registers 4 and 5, that of B in 6 and 7.
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

// Computes the first 32 rows and columns of C = A B, or C += A B, from packed lines. If `rows` or
// `columns` is less than 32, C has no more, and the product goes to `edge` first.
static void multiply_blocks(float *c, size_t ldc, const uint32_t *a, const uint32_t *b, int rows,
                            int columns, int depth, int accumulate) {
    float edge[32 * 32], *out = rows < 32 || columns < 32 ? edge : c;
    size_t half = 16 * (out == c ? ldc : 32), stride = half / 16 * sizeof(float);
    __asm__ volatile("" ::: "memory");  // gcc does not know that _tile_loadd() reads memory
    if (accumulate && out == c) {
        _tile_loadd(0, out, stride);
        _tile_loadd(1, out + 16, stride);
        _tile_loadd(2, out + half, stride);
        _tile_loadd(3, out + half + 16, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int i = 0; i < 32 && out == c; i++) {  // so that C is in the cache at the end
        __builtin_prefetch(c + i * ldc);
        __builtin_prefetch(c + i * ldc + 16);
    }
    for (int k = 0; k < depth; k += 32, a += BLOCK, b += BLOCK) {
        multiply_parts(a, b + 4 * TILE);     // x0 y2
        multiply_parts(NULL, b + 2 * TILE);  // x0 y1
        multiply_parts(a + 2 * TILE, NULL);  // x1 y1
        multiply_parts(NULL, b);             // x1 y0
        multiply_parts(a, NULL);             // x0 y0
        multiply_parts(a + 4 * TILE, NULL);  // x2 y0
    }
    _tile_stored(0, out, stride);
    _tile_stored(1, out + 16, stride);
    _tile_stored(2, out + half, stride);
    _tile_stored(3, out + half + 16, stride);
    for (int i = 0; i < imin(rows, 32) && out == edge; i++)
        for (int j = 0; j < imin(columns, 32); j++)
            c[i * ldc + j] = (accumulate ? c[i * ldc + j] : 0) + edge[i * 32 + j];
}

// Prepares this thread's tile registers: all eight hold 16 rows of 64 bytes.
static void configure_tiles(void) {
    struct __attribute__((packed)) {
        uint8_t palette, unused[15];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        tiles.bytes[i] = 64;
        tiles.rows[i] = 16;
    }
    _tile_loadconfig(&tiles);
}

// As gemm(), and shared by the threads in the same way.
static void gemm_amx(float *c, size_t ldc, Matrix a, Matrix b, int M, int N, int K,
                     int accumulate) {
    int by_columns = N > M, small = imin(M, N), large = imax(M, N), depth = imin(K, AMX_KC);
    Matrix small_lines = by_columns ? a : transpose(b), large_lines = by_columns ? transpose(b) : a;
    int threads = omp_get_max_threads(), blocks = (large - 1) / 32 + 1;
    int parts = imin(blocks, (large / AMX_LINES / threads + 1) * threads);
    size_t panel = (size_t)((depth - 1) / 32 + 1) * BLOCK;  // 32 packed lines
    size_t most = (AMX_LINES / 32 + 1) * panel;             // of a part
    float *shared = thread_memory(SHARED_OPERAND, ((small - 1) / 32 + 1) * panel);
    #pragma omp parallel if ((double)M * N * K > 1e5)
    for (int k0 = 0; k0 < K; k0 += depth) {
        int steps = imin(depth, K - k0), add = accumulate || k0 > 0;
        uint32_t *s = (uint32_t *)shared, *own = (uint32_t *)thread_memory(OWN_OPERAND, most);
        configure_tiles();
        #pragma omp for
        for (int i = 0; i < small; i += 32)
            pack_blocks(s + i / 32 * panel, from(small_lines, i, k0), small - i, steps, by_columns);
        #pragma omp for schedule(dynamic)
        for (int part = 0; part < parts; part++) {
            int begin = blocks * part / parts * 32;
            int end = imin(blocks * (part + 1) / parts * 32, large);
            for (int j = begin; j < end; j += 32)
                pack_blocks(own + (j - begin) / 32 * panel, from(large_lines, j, k0), large - j,
                            steps, !by_columns);
            for (int i = 0; i < small; i += 32) {
                for (int j = begin; j < end; j += 32) {
                    const uint32_t *x = s + i / 32 * panel, *y = own + (j - begin) / 32 * panel;
                    if (by_columns)
                        multiply_blocks(c + i * ldc + j, ldc, x, y, M - i, N - j, steps, add);
                    else
                        multiply_blocks(c + j * ldc + i, ldc, y, x, M - j, N - i, steps, add);
                }
            }
        }
        _tile_release();
    }
}
#else
#define AMX 0
#endif
#endif
