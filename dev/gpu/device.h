// device.h: defines bf16; CUDA_CHECK, LAUNCH_CHECK, open_device; scratch, DeviceArrays, new_array,
// begin_allocating, free_arrays; Pack, load, store, with_width, thread_index, grid_threads,
// threads_for, blocks_for, LOG2_E; upload, mean, scale_array; warp_sum, warp_max, block_sum,
// block_max; variance: what the kernels and their launches are built from.
#ifndef DEVICE_H
#define DEVICE_H
#include "../utils.h"
#ifdef CUDA_ON_CPU
#include "dev/gpu/cuda_on_cpu.h"  // defines: what CUDA's headers and ptx.h define, for a CPU
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include "ptx.h"
#endif
#include <type_traits>

typedef __nv_bfloat16 bf16;  // converts from and to float; to bf16 it rounds to the nearest

// ------------------------------------------------------------------------------------------------
// Errors. A CUDA function returns an error code. A launch returns nothing, so LAUNCH_CHECK() after
// it gets the code. An error inside a kernel is only reported by a later call.

#define CUDA_CHECK(call) cuda_check(call, __FILE__, __LINE__)
#define LAUNCH_CHECK() CUDA_CHECK(cudaGetLastError())

static inline void cuda_check(cudaError_t error, const char *file, int line) {
    if (error != cudaSuccess) die("CUDA: %s (%s:%d)", cudaGetErrorString(error), file, line);
}

// Selects the first GPU. Exits if there is none, or if it is too old.
static inline void open_device(void) {
    int devices = 0;
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0)
        die("no CUDA device (%s); ./train_gpas trains on the CPU",
            error != cudaSuccess ? cudaGetErrorString(error) : "none was found");
    cudaDeviceProp device;
    CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
    if (device.major < 8)
        die("%s has compute capability %d.%d; 8.0 or higher is needed", device.name, device.major,
            device.minor);
    CUDA_CHECK(cudaSetDevice(0));
}

// Returns GPU memory for n floats, valid until the next call of scratch(). That call may come
// before the kernels that use this memory have run, because kernels run in order.
static inline float *scratch(size_t n) {
    static float *memory;
    static size_t size;
    if (n > size) {
        CUDA_CHECK(cudaFree(memory));
        CUDA_CHECK(cudaMalloc((void **)&memory, n * sizeof(float)));
        size = n;
    }
    return memory;
}

// The arrays of a model on the GPU. The caller makes all calls of new_array() twice: the first time
// they only count arrays and bytes; the second time, after begin_allocating(), they allocate.
typedef struct {
    void **allocated;  // (count) while allocating; while counting, NULL
    int count;
    size_t bytes;      // of all arrays together
} DeviceArrays;

// Sets *array to a new array of n numbers or, while counting, to NULL.
template <class number> static void new_array(DeviceArrays *r, number **array, size_t n) {
    size_t bytes = (n * sizeof(number) + 255) / 256 * 256;
    *array = NULL;
    if (r->allocated) {
        CUDA_CHECK(cudaMalloc((void **)array, bytes));
        r->allocated[r->count] = *array;
    } else {
        r->bytes += bytes;
    }
    r->count++;
}

static inline void begin_allocating(DeviceArrays *r) {
    r->allocated = (void **)allocate(r->count, sizeof(void *));
    r->count = 0;
}

static inline void free_arrays(DeviceArrays *r) {
    while (r->allocated && r->count > 0) CUDA_CHECK(cudaFree(r->allocated[--r->count]));
    free(r->allocated);
}

// ------------------------------------------------------------------------------------------------
// Wide loads. One instruction loads up to 16 bytes, so kernels are faster if each thread loads a
// pack of 16 bytes of neighbouring numbers: 8 in bf16, 4 in float.

template <class real, int W> struct alignas(W * sizeof(real)) Pack { real x[W]; };

// Loads W numbers as floats. `from` must be aligned to the size of a pack.
template <class real, int W> __device__ inline void load(float (&to)[W], const real *from) {
    Pack<real, W> pack = *(const Pack<real, W> *)from;
    for (int k = 0; k < W; k++) to[k] = pack.x[k];
}

// Rounds W floats to `real` and stores them.
template <class real, int W> __device__ inline void store(real *to, const float (&from)[W]) {
    Pack<real, W> pack;
    for (int k = 0; k < W; k++) pack.x[k] = from[k];
    *(Pack<real, W> *)to = pack;
}

// Stores two bf16 with one instruction. For a Pack, nvcc sometimes makes two, of 16 bits each.
__device__ inline void store(bf16 *to, const float (&from)[2]) {
    *(__nv_bfloat162 *)to = __floats2bfloat162_rn(from[0], from[1]);
}

// Calls launch(W), where W is how many numbers a thread loads at once from rows of n numbers: as
// many as 16 bytes hold, or 1 if n is not a multiple of that. W is a constant, so it can be a
// template argument of a kernel.
template <class real, class Launch> static inline void with_width(size_t n, Launch launch) {
    constexpr int wide = 16 / sizeof(real);
    if (n % wide == 0) launch(std::integral_constant<int, wide>());
    else launch(std::integral_constant<int, 1>());
}

// Returns the index of this thread in the grid, and how many threads the grid has.
__device__ inline size_t thread_index() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline size_t grid_threads() { return (size_t)gridDim.x * blockDim.x; }

// Returns n rounded up to whole warps, at most `most`.
static inline int threads_for(int n, int most) { return imin(most, (n + 31) / 32 * 32); }

constexpr float LOG2_E = 1.44269504f;  // e^x = 2^(x log2 e), and 2^x is a single instruction

// Returns how many blocks of `threads` threads it takes to have n threads.
static inline unsigned blocks_for(size_t n, int threads) {
    return (unsigned)((n + threads - 1) / threads);
}

// ------------------------------------------------------------------------------------------------
// Whole arrays.

// Copies n numbers from the host to the GPU.
template <class number> static inline void upload(number *device, const number *host, size_t n) {
    CUDA_CHECK(cudaMemcpy(device, host, n * sizeof(number), cudaMemcpyHostToDevice));
}

// Returns the mean of x (n), which is on the host.
static inline double mean(const float *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += x[i];
    return sum / n;
}

// Computes y = factor x, or y += factor x. y, x (n).
template <class to, class from>
__global__ void scale_kernel(to *y, const from *x, float factor, int accumulate, size_t n) {
    size_t i = thread_index();
    if (i < n) y[i] = factor * (float)x[i] + (accumulate ? (float)y[i] : 0);
}

template <class to, class from>
static void scale_array(to *y, const from *x, float factor, int accumulate, size_t n) {
    scale_kernel<to, from><<<blocks_for(n, 256), 256>>>(y, x, factor, accumulate, n);
    LAUNCH_CHECK();
}

// ------------------------------------------------------------------------------------------------
// Sums and maxima over a warp or a block. All its threads receive the result.

// Each step adds the number of the lane whose index differs in one bit. After step 1 each pair of
// lanes has its sum, after step 2 each group of four, after step 16 the whole warp. With lanes = 4
// each group of four neighbours gets a sum of its own.
template <class number> __device__ inline number warp_sum(number x, int lanes = 32) {
    for (int step = 1; step < lanes; step *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

__device__ inline float warp_max(float x, int lanes = 32) {
    for (int step = 1; step < lanes; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
    return x;
}

// Each warp adds the sums of all warps, one of them in each lane: 5 shuffles instead of 32 loads by
// each of 1024 threads. The second __syncthreads() makes sure that all threads have read `sums`
// before the next call writes to it.
template <class number> __device__ inline number block_sum(number x) {
    __shared__ number sums[32];
    int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    x = lane < warps ? sums[lane] : 0;
    __syncthreads();
    return warp_sum(x);
}

__device__ inline float block_max(float x) {
    __shared__ float largest[32];
    int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_max(x);
    if (lane == 0) largest[threadIdx.x / 32] = x;
    __syncthreads();
    if (lane < warps) x = largest[lane];
    __syncthreads();
    return warp_max(x);
}

// ------------------------------------------------------------------------------------------------
// The variance of an array, for layers.csv. It is computed in double, because it is a small
// difference of large sums.

enum { MOMENT_BLOCKS = 256 };

// Writes the sums of x and of x^2 over this block's part of x (n) to sums[blockIdx.x].
template <class real>
__global__ void moments_kernel(Pack<double, 2> *sums, const real *x, size_t n) {
    double sum = 0, square = 0;
    size_t start = thread_index(), step = grid_threads();
    for (size_t i = start; i < n; i += step) {
        double value = (float)x[i];
        sum += value;
        square += value * value;
    }
    sum = block_sum(sum);
    square = block_sum(square);
    if (threadIdx.x == 0) {
        sums[blockIdx.x].x[0] = sum;
        sums[blockIdx.x].x[1] = square;
    }
}

// Returns the population variance of x (n).
template <class real> static double variance(const real *x, size_t n) {
    Pack<double, 2> host[MOMENT_BLOCKS];
    Pack<double, 2> *sums = (Pack<double, 2> *)scratch(4 * MOMENT_BLOCKS);  // 2 doubles each
    double sum = 0, square = 0;
    moments_kernel<real><<<MOMENT_BLOCKS, 256>>>(sums, x, n);
    LAUNCH_CHECK();
    CUDA_CHECK(cudaMemcpy(host, sums, sizeof host, cudaMemcpyDeviceToHost));
    for (int i = 0; i < MOMENT_BLOCKS; i++) {
        sum += host[i].x[0];
        square += host[i].x[1];
    }
    return square / n - sum / n * (sum / n);
}
#endif
