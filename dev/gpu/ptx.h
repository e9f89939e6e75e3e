// ptx.h: defines mma_m16n8k16_bf16, ldmatrix_x4, cp_async, cp_async_wait_all: single instructions
// of the GPU, written in PTX, NVIDIA's assembly language. cuda_on_cpu.h defines the same functions
// for a CPU.
#ifndef PTX_H
#define PTX_H
#include <cuda_bf16.h>

// A warp computes D += A B with its tensor core: D (16,8) in float, A (16,16) and B (16,8) in bf16.
// Each lane holds four numbers of D, four pairs of A and two pairs of B.
__device__ inline void mma_m16n8k16_bf16(float d[4], const __nv_bfloat162 a[4],
                                         const __nv_bfloat162 b[2]) {
    const unsigned *A = (const unsigned *)a, *B = (const unsigned *)b;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B[0]), "r"(B[1]));
}

// A warp loads four matrices of 8 x 8 from shared memory. Lane l passes the address of row l % 8 of
// matrix l / 8. With g = l / 4 and t = l % 4 it gets columns 2t and 2t + 1 of row g of each matrix,
// or, transposed, rows 2t and 2t + 1 of column g.
__device__ inline void ldmatrix_x4(__nv_bfloat162 to[4], const void *row, bool transposed) {
    unsigned *x = (unsigned *)to, address = (unsigned)__cvta_generic_to_shared(row);
    if (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address));
}

// Starts a copy of 4, 8 or 16 bytes from global to shared memory, of which the first `valid` are
// read and the others become 0. The instruction needs the size as a constant.
__device__ inline void cp_async(void *to, const void *from, int bytes, int valid) {
    unsigned address = (unsigned)__cvta_generic_to_shared(to);
    if (bytes == 16)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;"
                     :: "r"(address), "l"(from), "r"(valid) : "memory");
    if (bytes == 8)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                     :: "r"(address), "l"(from), "r"(valid) : "memory");
    if (bytes == 4)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                     :: "r"(address), "l"(from), "r"(valid) : "memory");
}

// Waits until the copies that this thread started have arrived.
__device__ inline void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif
