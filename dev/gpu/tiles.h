// tiles.h: defines WARPS, THREADS, ROWS, BLOCKS, MAX_HEAD, with_head; Rows, Operand, Accumulator,
// Tile; load_rows, store_rows, load_tile, copy_async; multiply_transposed, multiply_add; row_of,
// column_of, dot_rows. The code for tensor cores and asynchronous copies is here and in ptx.h.
//
// Attention multiplies small matrices. A warp computes 16 rows of a product and keeps them in its
// registers. The left-hand operand is in registers too; the right-hand operand is a tile in shared
// memory, which all warps of the block use.
//
// The products are computed by tensor cores. One instruction computes D (16,8) += A (16,16) B
// (16,8). The 32 lanes of a warp execute it together, and each lane holds a few elements of every
// matrix. With group = lane / 4 and pair = lane % 4 these are:
//
//     A   a[0], a[1]  columns 2 pair and 2 pair + 1 of row group, and of row group + 8
//         a[2], a[3]  the same, 8 columns further to the right
//     B   b[0], b[1]  rows 2 pair and 2 pair + 1 of column group, and the same, 8 rows further down
//     D   d[0], d[1]  columns 2 pair and 2 pair + 1 of row group
//         d[2], d[3]  the same columns of row group + 8
//
// Two adjacent matrices D are distributed over the lanes in the same way as one A. So a
// product can be the left-hand operand of the next product without any exchange between lanes.
// A row of D belongs to the four lanes of a group, so its sum takes only two shuffles.
#ifndef TILES_H
#define TILES_H
#include "device.h"

// The block of a kernel: 4 warps with 16 rows each.
enum { WARPS = 4, THREADS = 32 * WARPS, ROWS = 16 * WARPS };

// How many blocks are to share a processor, so that one computes while another waits. They share
// its 65536 registers, so 3 blocks of 128 threads leave 168 for each thread.
template <int HS> constexpr int BLOCKS = HS <= 64 ? 3 : 2;

enum { MAX_HEAD = 128 };  // the most channels (hs) that a head may have

// Calls launch(HS), where HS is the width of the kernels that compute heads of hs channels. HS is a
// constant, so it can be a template argument.
template <class Launch> static void with_head(int hs, Launch launch) {
    if (hs <= 32) launch(std::integral_constant<int, 32>());
    else if (hs <= 64) launch(std::integral_constant<int, 64>());
    else launch(std::integral_constant<int, MAX_HEAD>());
}

// A matrix (count,hs) in global memory, whose rows begin `stride` numbers apart.
template <class real> struct Rows {
    real *x;
    int stride, count, hs;
};

// A left-hand operand (16,K) in the registers of a warp: K / 16 matrices A.
template <class real, int K> struct Operand { Pack<real, 2> a[K / 16][4]; };

// A product (16,N) in the registers of a warp: N / 8 matrices D.
template <int N> struct Accumulator { float d[N / 8][4]; };

// Element d[j][i] of an Accumulator is in row row_of(i / 2) and column column_of(j, i).
__device__ inline int row_of(int half) { return threadIdx.x % 32 / 4 + 8 * half; }
__device__ inline int column_of(int j, int i) { return 8 * j + 2 * (threadIdx.x % 4) + i % 2; }

// ---- The tensor core.

// Computes D += A B in bf16.
__device__ inline void mma(float (&d)[4], const Pack<bf16, 2> (&a)[4],
                           const Pack<bf16, 2> (&b)[2]) {
    mma_m16n8k16_bf16(d, (const __nv_bfloat162 *)a, (const __nv_bfloat162 *)b);
}

// Computes D += A B in float. Tensor cores cannot do that exactly, so the lanes write A and B to
// shared memory, and each computes its four elements of D from there.
__device__ inline void mma(float (&d)[4], const Pack<float, 2> (&a)[4],
                           const Pack<float, 2> (&b)[2]) {
    __shared__ float A[WARPS][16][16];
    __shared__ float B[WARPS][16][8];
    int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    for (int i = 0; i < 2; i++) {
        for (int part = 0; part < 4; part++)
            A[warp][group + part % 2 * 8][2 * pair + part / 2 * 8 + i] = a[part].x[i];
        for (int part = 0; part < 2; part++) B[warp][2 * pair + part * 8 + i][group] = b[part].x[i];
    }
    __syncwarp();
    for (int k = 0; k < 16; k++) {
        for (int i = 0; i < 4; i++)
            d[i] += A[warp][row_of(i / 2)][k] * B[warp][k][column_of(0, i)];
    }
    __syncwarp();  // Every lane has read A and B.
}

// ---- Between memory and registers.

// Loads 16 rows, from row t0 on, as a left-hand operand. What is outside of the matrix becomes 0.
template <class real, int HS>
__device__ inline void load_rows(Operand<real, HS> &to, Rows<const real> from, int t0) {
    for (int k = 0; k < HS / 16; k++) {
        for (int part = 0; part < 4; part++) {
            int t = t0 + row_of(part % 2), column = 16 * k + 8 * (part / 2) + column_of(0, 0);
            to.a[k][part] = Pack<real, 2>();
            if (t < from.count && column < from.hs)
                to.a[k][part] = *(const Pack<real, 2> *)(from.x + (size_t)t * from.stride + column);
        }
    }
}

// Stores a product as 16 rows, from row t0 on. A lane holds parts of two rows, and passes in
// scale[0] and scale[1] the factors by which they are multiplied.
template <class real, int HS>
__device__ inline void store_rows(Rows<real> to, int t0, const Accumulator<HS> &from,
                                  const float (&scale)[2]) {
    for (int j = 0; j < HS / 8; j++) {
        for (int half = 0; half < 2; half++) {
            int t = t0 + row_of(half), column = column_of(j, 0);
            const float *d = &from.d[j][2 * half];
            float x[2] = {d[0] * scale[half], d[1] * scale[half]};
            if (t < to.count && column < to.hs) store(to.x + (size_t)t * to.stride + column, x);
        }
    }
}

// ---- From global to shared memory.

// Starts to copy BYTES (4, 8 or 16, and aligned to that). The thread does not wait for the copy,
// and the data does not pass through its registers. It has arrived for this thread after
// cp_async_wait_all(), and for the other threads after a __syncthreads() that follows. If `valid`
// is 0, the destination becomes 0, and `from` is not read: it may point anywhere.
template <int BYTES> __device__ inline void copy_async(void *to, const void *from, int valid) {
    cp_async(to, from, BYTES, valid ? BYTES : 0);
}

// A row of a tile in shared memory, with 16 bytes of padding. Shared memory consists of 32 banks:
// consecutive words of 4 bytes are in consecutive banks, and each bank delivers one word at a time.
// A warp reads 16 bytes from each of 8 rows at once. Without the padding, a bf16 row of 64 or 128
// numbers would begin in the same bank as all others, and the reads would have to queue. With it,
// each row begins 4 banks after the row above it, and the 8 rows use all 32 banks.
template <class real, int HS> struct alignas(16) Tile { real x[HS + 16 / sizeof(real)]; };

// Starts to copy COLS rows, from row t0 on, to a tile. What is outside of the matrix becomes 0. One
// copy moves 16 bytes if all rows begin at multiples of 16 bytes, and otherwise two numbers. A
// thread copies the same columns of every STEP-th row: its next address is one addition away.
template <class real, int HS, int COLS>
__device__ inline void load_tile(Tile<real, HS> (&tile)[COLS], Rows<const real> rows, int t0) {
    constexpr int W = 16 / sizeof(real), STEP = THREADS * W / HS;
    static_assert(COLS % STEP == 0, "the block copies STEP rows at a time");
    int first = threadIdx.x / (HS / W), column = threadIdx.x % (HS / W) * W;
    int count = rows.count - t0;
    const real *from = rows.x + (size_t)t0 * rows.stride + first * rows.stride + column;
    if (rows.hs % W == 0) {
        for (int i = 0; i < COLS / STEP; i++) {
            int row = first + i * STEP;
            copy_async<16>(&tile[row].x[column], from, row < count && column < rows.hs);
            from += STEP * rows.stride;
        }
    } else {
        for (int row = first; row < COLS; row += STEP) {
            for (int c = 0; c < W; c += 2)
                copy_async<2 * sizeof(real)>(&tile[row].x[column + c], from + c,
                                             row < count && column + c < rows.hs);
            from += STEP * rows.stride;
        }
    }
}

// ---- Products.

// Loads two matrices B that are next to each other, (16,16), from a tile:
// B[k][n] = tile[row + k][column + n], or, transposed, tile[row + n][column + k].
// In bf16 one instruction loads four matrices of 8 x 8 where single loads would take 8. Lane l
// passes the address of row l % 8 of matrix l / 8, and receives its elements of all four.
template <bool transposed, int HS>
__device__ inline void load_b(Pack<bf16, 2> (&b)[2][2], const Tile<bf16, HS> *tile, int row,
                              int column) {
    int lane = threadIdx.x % 32, k = lane / 8 % 2 * 8, n = lane / 16 * 8;
    const bf16 *from =
        &tile[row + (transposed ? n : k) + lane % 8].x[column + (transposed ? k : n)];
    ldmatrix_x4((__nv_bfloat162 *)b, from, !transposed);  // It expects B's columns as rows.
}

template <bool transposed, int HS>
__device__ inline void load_b(Pack<float, 2> (&b)[2][2], const Tile<float, HS> *tile, int row,
                              int column) {
    for (int i = 0; i < 8; i++) {
        int k = threadIdx.x % 4 * 2 + i % 4 / 2 * 8 + i % 2, n = threadIdx.x % 32 / 4 + i / 4 * 8;
        b[i / 4][i % 4 / 2].x[i % 2] =
            tile[row + (transposed ? n : k)].x[column + (transposed ? k : n)];
    }
}

// Computes product (16,N) = a (16,HS) tile^T, with the first N rows of a tile.
template <class real, int HS, int N>
__device__ inline void multiply_transposed(Accumulator<N> &product, const Operand<real, HS> &a,
                                           const Tile<real, HS> *tile) {
    product = {};
    for (int j = 0; j < N / 8; j += 2) {
        for (int k = 0; k < HS / 16; k++) {
            Pack<real, 2> b[2][2];
            load_b<true>(b, tile, 8 * j, 16 * k);
            mma(product.d[j], a.a[k], b[0]);
            mma(product.d[j + 1], a.a[k], b[1]);
        }
    }
}

// Computes sum (16,HS) += p (16,K) tile, where p is a product, rounded to `real`.
template <class real, int HS, int K>
__device__ inline void multiply_add(Accumulator<HS> &sum, const Accumulator<K> &p,
                                    const Tile<real, HS> *tile) {
    for (int k = 0; k < K / 16; k++) {
        Pack<real, 2> a[4], b[2][2];
        for (int part = 0; part < 4; part++) {
            for (int i = 0; i < 2; i++)
                a[part].x[i] = p.d[2 * k + part / 2][part % 2 * 2 + i];
        }
        for (int j = 0; j < HS / 8; j += 2) {
            load_b<false>(b, tile, 16 * k, 8 * j);
            mma(sum.d[j], a, b[0]);
            mma(sum.d[j + 1], a, b[1]);
        }
    }
}

// ---- Sums over rows.

// Computes dot[half], the dot product of row row_of(half) of x with that of y.
template <class real, int HS>
__device__ inline void dot_rows(float (&dot)[2], const Operand<real, HS> &x,
                                const Operand<real, HS> &y) {
    dot[0] = dot[1] = 0;
    for (int k = 0; k < HS / 16; k++) {
        for (int part = 0; part < 4; part++) {
            for (int i = 0; i < 2; i++)
                dot[part % 2] += (float)x.a[k][part].x[i] * (float)y.a[k][part].x[i];
        }
    }
    for (int half = 0; half < 2; half++) dot[half] = warp_sum(dot[half], 4);
}
#endif
