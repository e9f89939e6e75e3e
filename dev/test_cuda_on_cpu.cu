/* test_cuda_on_cpu.cu - tests cuda_on_cpu.h: correct programs must give correct results, and each
 * planted fault must be reported in one line that names the kernel. Each case runs in a child
 * process. Built twice (see build.mk): checked, with every memory access of a kernel watched, and
 * plain, which leaves out the faults that only the checked build can see. */
#include "dev/cuda_on_cpu.h"
#include <sys/wait.h>

typedef __nv_bfloat16 bf16;
constexpr unsigned FULL = 0xffffffff;

static void require(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "%s\n", what);
    _exit(2);
}
#define REQUIRE(condition) require(condition, #condition)

template <class T> T *on_gpu(const std::vector<T> &host) {
    T *p;
    REQUIRE(cudaMalloc(&p, host.size() * sizeof(T)) == cudaSuccess);
    cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice);
    return p;
}

template <class T> std::vector<T> from_gpu(const T *p, size_t n) {
    std::vector<T> host(n);
    cudaMemcpy(host.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost);
    return host;
}

static float *floats(size_t n) {
    float *p;
    cudaMalloc(&p, n * sizeof(float));
    return p;
}

static float *zeros(size_t n) { return on_gpu(std::vector<float>(n)); }

static float random_float() {
    static uint32_t state = 1;
    state = state * 1664525 + 1013904223;
    return (float)(state >> 8) / (1 << 23) - 1;
}

// ------------------------------------------------------------------------------------------------
// Correct programs

__device__ float warp_sum(float v) {
    for (int bits = 16; bits; bits /= 2) v += __shfl_xor_sync(FULL, v, bits);
    return v;
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS) reduce(double *out, const float *in, int n) {
    __shared__ float sums[THREADS / 32];
    float v = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) v += in[blockIdx.x * n + i];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        v = warp_sum(threadIdx.x < THREADS / 32 ? sums[threadIdx.x] : 0.0f);
        if (threadIdx.x == 0) out[blockIdx.x] = v;
    }
}

template <int THREADS> static void run_reduce() {
    std::vector<float> in(5 * 3000);
    for (size_t i = 0; i < in.size(); i++) in[i] = i % 7;
    double *out;
    cudaMalloc(&out, 5 * sizeof(double));
    float *d_in = on_gpu(in);
    for (int repeat = 0; repeat < 3; repeat++) {
        reduce<THREADS><<<5, THREADS>>>(out, d_in, 3000);
        REQUIRE(cudaGetLastError() == cudaSuccess);
        auto sums = from_gpu(out, 5);
        for (int b = 0; b < 5; b++) {
            double sum = 0;
            for (int i = 0; i < 3000; i++) sum += in[b * 3000 + i];
            REQUIRE(sums[b] == sum);
        }
    }
}
static void reductions() {
    run_reduce<32>();
    run_reduce<256>();
    run_reduce<1024>();
    run_reduce<64>();
}

__global__ void number_all(int *out) {
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * (int)(blockDim.x * blockDim.y * blockDim.z) + thread] = block * 1000 + thread;
}
static void grids() {
    int *out;
    cudaMalloc(&out, 3 * 4 * 5 * 2 * 7 * 3 * sizeof(int));
    number_all<<<dim3(3, 4, 5), dim3(2, 7, 3)>>>(out);
    auto a = from_gpu(out, 60 * 42);
    for (int i = 0; i < 60 * 42; i++) REQUIRE(a[i] == i / 42 * 1000 + i % 42);
}

__global__ void shuffles(int *out) {
    int t = threadIdx.x, lanes = t < 64 ? 32 : (int)blockDim.x - 64;
    unsigned up = __shfl_up_sync(FULL, (unsigned)t, 1);
    double down = __shfl_down_sync(FULL, t + 0.5, 2, 4);
    out[t * 3] = up == (unsigned)(t % 32 ? t - 1 : t);
    out[t * 3 + 1] = down == ((t & 3) < 2 ? t + 2.5 : t + 0.5);
    out[t * 3 + 2] = __shfl_sync(FULL, (float)t, lanes - 1) == t / 32 * 32 + lanes - 1;
    __syncwarp();
}
static void partial_warps() {
    int *out;
    cudaMalloc(&out, 76 * 3 * sizeof(int));
    shuffles<<<1, 76>>>(out);
    for (int ok : from_gpu(out, 76 * 3)) REQUIRE(ok);
}

__global__ void count(int *ints, unsigned *most, float *sum, double *wide) {
    __shared__ int here;
    if (threadIdx.x == 0) here = 0;
    __syncthreads();
    atomicAdd(&here, 1);
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(ints, here);
    atomicMax(most, blockIdx.x * blockDim.x + threadIdx.x);
    atomicAdd(sum, 0.5f);
    atomicAdd(wide, 1);
}
static void atomics() {
    int *ints = on_gpu<int>({0});
    unsigned *most = on_gpu<unsigned>({0});
    float *sum = zeros(1);
    double *wide = on_gpu<double>({0});
    for (int i = 0; i < 2; i++) count<<<100, 96>>>(ints, most, sum, wide);
    REQUIRE(from_gpu(ints, 1)[0] == 19200 && from_gpu(most, 1)[0] == 9599);
    REQUIRE(from_gpu(sum, 1)[0] == 9600 && from_gpu(wide, 1)[0] == 19200);
}

template <class real, int N, int WHICH> __device__ real turn(real v) {
    __shared__ real line[N][2];
    line[threadIdx.x][1] = v;
    __syncthreads();
    return line[N - 1 - threadIdx.x][1];
}
template <class real> __global__ void arrays(real *out) {
    extern __shared__ __align__(16) real buffer[];
    __shared__ unsigned int single;
    const int N = 48;
    if (threadIdx.x == 0) single = 5;
    buffer[threadIdx.x] = turn<real, N, 1>((real)threadIdx.x);
    real twice = turn<real, N, 2>((real)threadIdx.x);
    __syncthreads();
    out[blockIdx.x * N + threadIdx.x] =
        (real)((float)buffer[N - 1 - threadIdx.x] + (float)twice * single);
}
template <class real> static void run_arrays() {
    real *out;
    cudaMalloc(&out, 4 * 48 * sizeof(real));
    arrays<real><<<4, 48, 48 * sizeof(real)>>>(out);
    auto a = from_gpu(out, 4 * 48);
    for (int i = 0; i < 4 * 48; i++)
        REQUIRE((float)a[i] == (float)(real)(float)(i % 48 + 5 * (47 - i % 48)));
}
__global__ void fill_dynamic(int *out, int n) {
    extern __shared__ int all[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) all[i] = i;
    __syncthreads();
    if (threadIdx.x == 0) *out = all[n - 1];
}
static void shared_arrays() {
    run_arrays<float>();
    run_arrays<bf16>();
    int *out, n = (227 << 10) / 4;
    cudaMalloc(&out, sizeof(int));
    REQUIRE(cudaFuncSetAttribute(fill_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, n * 4)
            == cudaSuccess);
    fill_dynamic<<<1, 64, n * 4>>>(out, n);
    REQUIRE(cudaGetLastError() == cudaSuccess && from_gpu(out, 1)[0] == n - 1);
}

// bf16: the nearest of the two neighbours, by distance in double
static void bf16_rounding() {
    uint32_t state = 1;
    for (int i = 0; i < 400000; i++) {
        uint32_t bits = i < 200000 ? (uint32_t)i * 32768 : (state = state * 1664525 + 1013904223);
        float f, low, high;
        memcpy(&f, &bits, 4);
        uint16_t got = __float2bfloat16(f).bits;
        if (f != f) {
            REQUIRE(isnan((float)__float2bfloat16_rn(f)));
            continue;
        }
        uint32_t cut = bits & 0xffff0000, next = cut + 0x10000;
        memcpy(&low, &cut, 4);
        memcpy(&high, &next, 4);
        double up = isinf(high) ? copysign(ldexp(1, 128), high) : high;
        double below = fabs((double)f - low), above = fabs(up - (double)f);
        bool even = (cut >> 16) % 2 == 0;
        bool stay = isinf(f) || below < above || (below == above && even);
        REQUIRE(got == (stay ? cut : next) >> 16);
    }
    __nv_bfloat162 pair = __floats2bfloat162_rn(1, -2.5f);
    REQUIRE(__low2float(pair) == 1 && __high2float(pair) == -2.5f);
    REQUIRE(__bfloat1622float2(pair).y == -2.5f && __bfloat162float(bf16(3.0f)) == 3);
    bf16 zero = 0, half = 0.5;
    REQUIRE(zero + half == 0.5f && sizeof(pair) == 4 && sizeof(half) == 2);
}

__global__ void multiply_tiles(float *d, const bf16 *a, const bf16 *b, int steps) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    a += warp * steps * 256, b += warp * steps * 128, d += warp * 128;
    float c[4];
    for (int i = 0; i < 4; i++) c[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    for (int s = 0; s < steps; s++, a += 256, b += 128) {
        __nv_bfloat162 fa[4], fb[2];
        for (int i = 0; i < 4; i++)
            fa[i] = *(const __nv_bfloat162 *)&a[(g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8];
        for (int i = 0; i < 2; i++)
            fb[i] = {b[(2 * t + i * 8) * 8 + g], b[(2 * t + i * 8 + 1) * 8 + g]};
        mma_m16n8k16_bf16(c, fa, fb);
    }
    for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}
static void mma() {
    const int warps = 3, steps = 5;
    std::vector<bf16> a(warps * steps * 256), b(warps * steps * 128);
    std::vector<float> c(warps * 128);
    for (bf16 &x : a) x = random_float();
    for (bf16 &x : b) x = random_float();
    for (float &x : c) x = random_float();
    float *d = on_gpu(c);
    multiply_tiles<<<1, warps * 32>>>(d, on_gpu(a), on_gpu(b), steps);
    auto got = from_gpu(d, c.size());
    for (int w = 0; w < warps; w++)
        for (int i = 0; i < 128; i++) {
            double sum = c[w * 128 + i];
            for (int k = 0; k < steps * 16; k++)
                sum += (double)(float)a[w * steps * 256 + k / 16 * 256 + i / 8 * 16 + k % 16] *
                    (float)b[w * steps * 128 + k * 8 + i % 8];
            REQUIRE(fabs(sum - got[w * 128 + i]) < 1e-5);
        }
}

static cublasStatus_t matmul(bool ta, bool tb, const void *a, const void *b, void *d,
                             cudaDataType_t in, cudaDataType_t out, int m, int n, int k,
                             float beta, int wrong = 0) {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t la = nullptr, lb = nullptr, ld = nullptr;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t result;
    cublasOperation_t T = CUBLAS_OP_T;
    size_t workspace = 0;
    int found = 0;
    float alpha = 0.5f;
    cublasLtCreate(&handle);
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (ta) cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &T, sizeof T);
    if (tb) cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &T, sizeof T);
    cublasLtMatrixLayoutCreate(&la, in, ta ? k : m, ta ? m : k, (ta ? k : m) + 1);
    cublasLtMatrixLayoutCreate(&lb, in, tb ? n : k, (tb ? k : n) + wrong, (tb ? n : k) + 2);
    cublasLtMatrixLayoutCreate(&ld, out, m, n, m + 3);
    cublasLtMatmulPreferenceCreate(&preference);
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                         &workspace, sizeof workspace);
    cublasLtMatmulAlgoGetHeuristic(handle, desc, la, lb, ld, ld, preference, 1, &result, &found);
    REQUIRE(found == 1 && result.workspaceSize == 0);
    return cublasLtMatmul(handle, desc, &alpha, a, la, b, lb, &beta, d, ld, d, ld, &result.algo,
                          nullptr, 0, nullptr);
}

template <class In, class Out> static void check_matmul(bool ta, bool tb, float beta) {
    const int m = 21, n = 14, k = 37, lda = (ta ? k : m) + 1, ldb = (tb ? n : k) + 2, ldd = m + 3;
    std::vector<In> a(lda * (ta ? m : k)), b(ldb * (tb ? k : n));
    std::vector<Out> c(ldd * n);
    for (In &x : a) x = random_float();
    for (In &x : b) x = random_float();
    for (Out &x : c) x = beta ? random_float() : NAN;
    Out *d = on_gpu(c);
    auto in = sizeof(In) == 2 ? CUDA_R_16BF : CUDA_R_32F;
    auto out = sizeof(Out) == 2 ? CUDA_R_16BF : CUDA_R_32F;
    REQUIRE(matmul(ta, tb, on_gpu(a), on_gpu(b), d, in, out, m, n, k, beta)
            == CUBLAS_STATUS_SUCCESS);
    auto got = from_gpu(d, c.size());
    for (int j = 0; j < n; j++)
        for (int i = 0; i < m; i++) {
            double sum = 0;
            for (int kk = 0; kk < k; kk++)
                sum += (double)(float)a[ta ? i * lda + kk : kk * lda + i] *
                    (float)b[tb ? kk * ldb + j : j * ldb + kk];
            sum *= 0.5;
            if (beta) sum += beta * (double)(float)c[j * ldd + i];
            double tolerance = 1e-5 + (sizeof(Out) == 2 ? 4e-3 * fabs(sum) : 0);
            REQUIRE(fabs(sum - (float)got[j * ldd + i]) <= tolerance);
        }
}
static void cublas() {
    for (int i = 0; i < 8; i++) {
        check_matmul<float, float>(i & 1, i & 2, i / 4);
        check_matmul<bf16, bf16>(i & 1, i & 2, i / 4 * 0.5f);
        check_matmul<bf16, float>(i & 1, i & 2, i / 4);
        check_matmul<float, bf16>(i & 1, i & 2, i / 4);
    }
    float *x = zeros(2000);
    REQUIRE(matmul(false, false, x, x, x, CUDA_R_32F, CUDA_R_32F, 8, 8, 8, 0, 1)
            == CUBLAS_STATUS_INVALID_VALUE);
}

// The forms that the sed rules must rewrite
namespace inner {
template <class T, class U, int N> __global__ void forms(T *p, U v) {
    static __shared__ alignas(16) T a[N][(N + 1)];
    __shared__ unsigned long long big; __shared__ const float *pointers[2];
    if (threadIdx.x) return;
    a[0][0] = (T)v;
    big = 1;
    pointers[1] = p;
    *p = a[0][0] + big + (pointers[1] == p);
}
}
template <class T> struct Pair { T a, b; };
template <class T> __global__ void swap_lanes(Pair<T> q, T *p) {
    extern __shared__ __align__(16) unsigned char raw[];
    T *values = (T *)raw;
    values[threadIdx.x] = q.a + q.b * threadIdx.x;
    __syncwarp(FULL);
    p[threadIdx.x] = values[threadIdx.x ^ 1];
}
template <class T> static void launch_forms(T *p) {
    cudaStream_t stream;
    cudaStreamCreate(&stream);
    swap_lanes<T><<<1, dim3(32), 32 * sizeof(T), stream>>>({1, 2}, p);
    REQUIRE(from_gpu(p, 32)[6] == 15);
    cudaMemset(p, 0, 32 * sizeof(T));
    swap_lanes<T> <<<(31 + 32) / 63, 1 << 5, sizeof(T) << 5>>> (Pair<T>{1, 2}, p);
    REQUIRE(from_gpu(p, 32)[6] == 15);
    if (p) inner::forms<T, double, (4)><<<dim3(1, 1), 32, 0, stream>>>(p, 3);
    REQUIRE(from_gpu(p, 1)[0] == 5);
}
static void syntax() { launch_forms(zeros(32)); }

__global__ void double_all(float *p, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) p[i] *= 2;
}

__global__ void nothing() {}
static void thread_counts() {
    float *p = on_gpu(std::vector<float>(640, 1));
    for (int i = 0; i < 200; i++) {
        omp_set_num_threads(1 + i % 8);
        double_all<<<20, 32>>>(p, i < 100 ? 640 : 0);
    }
    REQUIRE(from_gpu(p, 640)[639] == ldexpf(1, 100));
}

static void launch_errors() {
    nothing<<<1, 1025>>>();
    REQUIRE(cudaPeekAtLastError() == cudaErrorInvalidConfiguration);
    REQUIRE(cudaGetLastError() == cudaErrorInvalidConfiguration);
    REQUIRE(cudaGetLastError() == cudaSuccess);
    nothing<<<0, 32>>>();
    REQUIRE(cudaGetLastError() == cudaErrorInvalidConfiguration);
    nothing<<<1, 32, (48 << 10) + 1>>>();
    REQUIRE(cudaGetLastError() == cudaErrorInvalidValue);
    const int too_much = (227 << 10) + 1;
    REQUIRE(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, too_much)
            == cudaErrorInvalidValue && cudaGetLastError() == cudaErrorInvalidValue);
    nothing<<<dim3(2, 2), dim3(8, 8, 16), 48 << 10, nullptr>>>();
    REQUIRE(cudaGetLastError() == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess);
    void *p;
    REQUIRE(cudaMalloc(&p, (size_t)1 << 60) == cudaErrorMemoryAllocation && !p);
    REQUIRE(!strcmp(cudaGetErrorString(cudaGetLastError()), "out of memory"));
}

static void host_api() {
    float *pinned, *d = zeros(100), h[40], ms;
    cudaMallocHost(&pinned, 64);
    for (int i = 0; i < 16; i++) pinned[i] = i;
    cudaMemcpyAsync(d, pinned, 64, cudaMemcpyHostToDevice, nullptr);
    cudaMemcpy(d + 50, d, 64, cudaMemcpyDeviceToDevice);
    cudaEvent_t a, b;
    cudaEventCreate(&a);
    cudaEventCreate(&b);
    cudaEventRecord(a);
    for (int i = 0; i < 3; i++) double_all<<<4, 25>>>(d, 100);
    double_all<<<1, 16>>>(pinned, 16);
    cudaEventRecord(b);
    cudaEventElapsedTime(&ms, a, b);
    cudaMemcpy2D(h, 80, d + 50, 16, 12, 2, cudaMemcpyDeviceToHost);
    REQUIRE(ms >= 0 && h[0] == 0 && h[2] == 16 && h[20] == 32 && h[22] == 48 && pinned[15] == 30);
    cudaMemset(d, 0, 8);
    REQUIRE(from_gpu(d, 3)[1] == 0 && from_gpu(d, 3)[2] == 16);
    cudaDeviceProp prop;
    size_t free_bytes, total;
    REQUIRE(cudaGetDeviceProperties(&prop, 0) == cudaSuccess && prop.warpSize == 32);
    REQUIRE(cudaMemGetInfo(&free_bytes, &total) == cudaSuccess && total - free_bytes == 400);
    REQUIRE((uintptr_t)d % 256 == 0 && cudaFree(d) == cudaSuccess);
    REQUIRE(cudaFreeHost(pinned) == cudaSuccess);
}

// Nothing here is a fault, though a careless checker might think so.
__global__ void innocent(bf16 *out, float4 *wide, unsigned char *bytes) {
    __shared__ float x[64];
    int t = threadIdx.x;
    x[t] = t;
    __syncwarp();
    float neighbour = x[t ^ 1];            // the same warp's
    __syncwarp();
    x[t] = neighbour + 1;
    __syncthreads();
    float all = x[0] + x[63];              // many readers, then a barrier, then a writer
    __syncthreads();
    x[63 - t] = all;
    out[blockIdx.x * 64 + t] = x[63 - t];  // bf16 neighbours by several threads and blocks
    float4 v = make_float4(1, 2, 3, all);
    wide[blockIdx.x * 64 + t] = v;
    v = wide[blockIdx.x * 64 + t];
    bytes[blockIdx.x * 64 + t] = v.y;      // bytes likewise
    __syncthreads();
    bytes[blockIdx.x * 64 + (t ^ 1)]++;
    __syncthreads();
    atomicAdd(&x[0], __ldg(&v.x));
}
static void no_false_alarm() {
    bf16 *out;
    float4 *wide;
    unsigned char *bytes;
    cudaMalloc(&out, 10 * 64 * 2);
    cudaMalloc(&wide, 10 * 64 * 16);
    cudaMalloc(&bytes, 10 * 64);
    for (int i = 0; i < 3; i++) innocent<<<10, 64>>>(out, wide, bytes);
    REQUIRE(from_gpu(bytes, 640)[639] == 3 && from_gpu(wide, 1)[0].w == 65);
    REQUIRE((float)from_gpu(out, 640)[639] == 65);
}

// ------------------------------------------------------------------------------------------------
// Faults that both builds report

__global__ void some_return() { if (threadIdx.x == 40) return; __syncthreads(); }
__global__ void other_line(int n) {
    if ((int)threadIdx.x < n)
        __syncthreads();
    else
        __syncthreads();
}
__global__ void half_a_warp() { if (threadIdx.x % 32 < 16) __syncwarp(); }
__global__ void half_shuffles(int *p) { if (threadIdx.x < 16) *p = __shfl_sync(FULL, 1, 0); }
__global__ void half_mma() {
    float c[4] = {};
    __nv_bfloat162 a[4] = {}, b[2] = {};
    if (threadIdx.x > 3) mma_m16n8k16_bf16(c, a, b);
}
__global__ void crossed() {
    if (threadIdx.x == 3)
        __syncthreads();
    else
        __syncwarp();
    __syncthreads();
}
__global__ void no_such_lane(int *p) { p[threadIdx.x] = __shfl_down_sync(FULL, 1, 16); }
__global__ void far_write(float *p) { if (threadIdx.x == 2) p[100000] = 1; }
__global__ void far_before(float *p) { if (threadIdx.x == 2) p[-20000] = 1; }
__global__ void write_at(char *p, int i) { p[i] = 1; }
__global__ void read_from(float *p, float **q) { *p = **q; }
__device__ int deep(int n, volatile int *p) {
    volatile int pad[1000];
    pad[n % 1000] = n;
    return n ? deep(n - 1, pad) + p[0] * 0 + pad[n % 1000] : 0;
}
__global__ void recurse(int n) { volatile int x = 0; x = deep(n, &x); }
__global__ void shared_overflow(int n) {
    __shared__ int tile[20];
    tile[n] = 1;
}
__global__ void too_much_shared() {
    extern __shared__ float dynamic[];
    __shared__ float big[1000];
    big[0] = dynamic[0] = 0;
}

static void fault_host_pointer() { float x; double_all<<<1, 32>>>(&x, 1); }
static void fault_other_line() { other_line<<<1, 64>>>(20); }
static void fault_some_return() { some_return<<<3, 64>>>(); }
static void fault_half_a_warp() { half_a_warp<<<3, 64>>>(); }
static void fault_half_shuffles() { half_shuffles<<<3, 64>>>((int *)zeros(1)); }
static void fault_half_mma() { half_mma<<<3, 64>>>(); }
static void fault_crossed() { crossed<<<1, 64>>>(); }
static void fault_no_such_lane() { no_such_lane<<<1, 24>>>((int *)zeros(24)); }
static void fault_far_write() { far_write<<<1, 32>>>(zeros(100)); }
static void fault_far_before() { far_before<<<1, 32>>>(zeros(100)); }
static void fault_null() { double_all<<<1, 32>>>(nullptr, 1); }
static void fault_after_free() { float *p = zeros(64); cudaFree(p); double_all<<<1, 32>>>(p, 1); }
static void fault_past_end() { write_at<<<1, 1>>>((char *)zeros(1), 4); }
static void fault_before_start() { write_at<<<1, 1>>>((char *)zeros(64), -1); }
static void fault_bad_pointer() { read_from<<<1, 1>>>(zeros(1), on_gpu<float *>({nullptr})); }
static void fault_recursion() { recurse<<<1, 1>>>(100); }
static void fault_shared_overflow() { shared_overflow<<<1, 1>>>(20); }
static void fault_too_much_shared() { too_much_shared<<<1, 1, 45 << 10>>>(); }
static float host[1000];
static void fault_memcpy_size() { cudaMemcpy(zeros(8), host, 36, cudaMemcpyHostToDevice); }
static void fault_memcpy_direction() { cudaMemcpy(zeros(8), host, 32, cudaMemcpyDeviceToHost); }
static void fault_memcpy_source() { cudaMemcpy(host, host, 32, cudaMemcpyDeviceToHost); }
static void fault_memset() { cudaMemset(zeros(8) + 4, 0, 32); }
static void fault_memcpy_freed() {
    float *p = zeros(8);
    cudaFree(p);
    cudaMemcpy(host, p, 32, cudaMemcpyDeviceToHost);
}
static void fault_double_free() { float *p = zeros(8); cudaFree(p); cudaFree(p); }
static void fault_free_middle() { cudaFree(zeros(8) + 1); }
static void fault_free_host() { cudaFreeHost(malloc(8)); }
static void fault_matmul_size() {
    float *x = zeros(1000);
    matmul(false, false, x, x, zeros(75), CUDA_R_32F, CUDA_R_32F, 8, 8, 8, 0);
}

// ------------------------------------------------------------------------------------------------
// Faults that only the checked build reports

__global__ void read_at(float *out, const char *p, int i) { *out = p[i]; }
__global__ void shared_read(float *p, int i) {
    __shared__ float tile[20];
    tile[threadIdx.x] = 1;
    *p = tile[i];
}
__global__ void use(float *out, const float *in) { out[threadIdx.x] = in[threadIdx.x]; }
__global__ void shared_unset(float *p, int i) {
    __shared__ float tile[20];
    if (threadIdx.x < 10) tile[threadIdx.x] = 1;
    __syncthreads();
    *p = tile[i];
}
__global__ void shared_stale(float *p) {
    __shared__ float tile[20];
    if (blockIdx.x == 0) tile[0] = 1;
    p[blockIdx.x] = tile[0];
}
__global__ void read_float4(float *out, const float *in) {
    float4 v = *(const float4 *)(in + 2);
    *out = v.x + v.w;
}
__global__ void write_float2(float *out) { *(float2 *)(out + 1) = make_float2(1, 2); }
__global__ void both_write() { __shared__ int x; x = threadIdx.x; }
__global__ void write_read(float *p) {
    __shared__ float x[64];
    x[63 - threadIdx.x] = 0;
    __syncthreads();
    x[threadIdx.x] = 1;
    p[threadIdx.x] = x[63 - threadIdx.x];
}
__global__ void read_write(float *p) {
    __shared__ float x[64];
    x[threadIdx.x] = 1;
    __syncthreads();
    x[threadIdx.x] = x[threadIdx.x ^ 32];
}
__global__ void in_a_warp(float *p) {
    __shared__ float x[32];
    x[threadIdx.x ^ 3] = 0;
    __syncthreads();
    x[threadIdx.x] = 1;
    p[threadIdx.x] = x[threadIdx.x ^ 1];
}
__global__ void warps_after_syncwarp(float *p) {
    __shared__ float x[64];
    x[63 - threadIdx.x] = 0;
    __syncthreads();
    x[threadIdx.x] = 1;
    __syncwarp();
    p[threadIdx.x] = x[63 - threadIdx.x];
}
__global__ void after_many_readers(float *p) {
    __shared__ float x;
    if (threadIdx.x == 0) x = 1;
    __syncthreads();
    p[threadIdx.x] = x;
    if (threadIdx.x == 5) x = 2;
}
__global__ void bf16_neighbours(bf16 *p) { p[threadIdx.x] = 1.0f; p[threadIdx.x + 2] = 1.0f; }
__global__ void blocks_write(float *p) { *p = 1; }
__global__ void blocks_read_write(float *p) { if (blockIdx.x) p[blockIdx.x] = p[0]; else p[0] = 1; }
__global__ void block_sums(float *p) { *p += 1; }
__global__ void plain_and_atomic(float *p) { if (threadIdx.x) atomicAdd(p, 1.0f); else *p = 1; }
__global__ void atomic_unset(float *p) { atomicAdd(p, 1.0f); }

static void fault_read_past() { read_at<<<1, 1>>>(zeros(1), (char *)zeros(65), 260); }
static void fault_read_before() { read_at<<<1, 1>>>(zeros(1), (char *)zeros(65), -1); }
static void fault_reach_past() {
    char *six = on_gpu(std::vector<char>(6));
    use<<<1, 1>>>(zeros(1), (float *)(six + 4));
}
static void fault_shared_read() { shared_read<<<1, 1>>>(zeros(1), 21); }
static void fault_unset() { use<<<1, 1>>>(zeros(1), floats(1)); }
static void fault_shared_unset() { shared_unset<<<1, 32>>>(zeros(1), 15); }
static void fault_shared_stale() { omp_set_num_threads(1); shared_stale<<<2, 1>>>(zeros(2)); }
static void fault_float4() { read_float4<<<1, 1>>>(zeros(1), zeros(100)); }
static void fault_float2() { write_float2<<<1, 1>>>(zeros(100)); }
static void fault_both_write() { both_write<<<1, 64>>>(); }
static void fault_write_read() { write_read<<<1, 64>>>(zeros(64)); }
static void fault_read_write() { read_write<<<1, 64>>>(zeros(64)); }
static void fault_in_a_warp() { in_a_warp<<<1, 32>>>(zeros(32)); }
static void fault_warps() { warps_after_syncwarp<<<1, 64>>>(zeros(64)); }
static void fault_many_readers() { after_many_readers<<<1, 64>>>(zeros(64)); }
static void fault_bf16() { bf16_neighbours<<<1, 64>>>((bf16 *)zeros(64)); }
static void fault_blocks_write() { blocks_write<<<9, 1>>>(zeros(1)); }
static void fault_blocks_read() { blocks_read_write<<<9, 1>>>(zeros(9)); }
static void fault_block_sums() { block_sums<<<1, 64>>>(zeros(1)); }
static void fault_plain_and_atomic() { plain_and_atomic<<<1, 64>>>(zeros(1)); }
static void fault_atomic_unset() { atomic_unset<<<1, 64>>>(floats(1)); }
static void fault_memcpy_unset() { from_gpu(floats(8), 8); }
static void fault_memcpy_copied() {
    float *p = zeros(8);
    cudaMemcpy(p, floats(8), 32, cudaMemcpyDeviceToDevice);
    from_gpu(p, 8);
}
static void fault_matmul_unset() {
    float *x = zeros(1000);
    matmul(false, false, x, floats(1000), x, CUDA_R_32F, CUDA_R_32F, 8, 8, 8, 0);
}
static void fault_host_reads() { volatile float *p = zeros(8); p[1] = 2; }

// ------------------------------------------------------------------------------------------------

static int passed, failures;

// Runs a case in a child. Without `who` it must succeed in silence, else it must report one line,
// "cuda_on_cpu: <who>: ..." with the words somewhere in it.
static void run(const char *name, void (*test)(), const char *who = nullptr,
                const char *words = "") {
    int ends[2], status = 0;
    char text[3000], start[100];
    size_t n = 0;
    fflush(stdout);
    if (pipe(ends)) return;
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        alarm(60);
        test();
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t got; (got = read(ends[0], text + n, sizeof text - 1 - n)) > 0; ) n += got;
    text[n] = 0;
    close(ends[0]);
    waitpid(child, &status, 0);
    snprintf(start, sizeof start, "cuda_on_cpu: %s: ", who ? who : "");
    bool one_line = n > 0 && strchr(text, '\n') == text + n - 1;
    bool ok = !who ? status == 0 && n == 0 : WIFEXITED(status) && WEXITSTATUS(status) == 1 &&
        one_line && !strncmp(text, start, strlen(start)) && strstr(text, words);
    if (ok && getenv("VERBOSE")) printf("%s", text);
    if (ok) printf("ok   %s\n", name);
    else printf("FAIL %s: wait status %x, %s\n", name, status, n ? text : "nothing on stderr");
    ok ? passed++ : failures++;
}
#define RUN(test, ...) run(#test, test, ##__VA_ARGS__)

static void run_faults_of_both() {
    RUN(fault_some_return, "some_return", "(40,0,0) has returned");
    RUN(fault_other_line, "other_line", "__syncthreads() on line");
    RUN(fault_half_a_warp, "half_a_warp", "every thread of the warp in __syncwarp()");
    RUN(fault_half_shuffles, "half_shuffles", "every thread of the warp in __shfl_sync()");
    RUN(fault_half_mma, "half_mma", "every thread of the warp in mma_m16n8k16_bf16()");
    RUN(fault_crossed, "crossed", "waits in __sync");
    RUN(fault_no_such_lane, "no_such_lane", "which this warp does not have");
    RUN(fault_far_write, "far_write", "past the end of a cudaMalloc of 400 bytes");
    RUN(fault_far_before, "far_before", "before the start of a cudaMalloc of 400 bytes");
    RUN(fault_null, "double_all", CUDA_ON_CPU_CHECKED ? "no device memory" : "segmentation fault");
    RUN(fault_after_free, "double_all", "of a freed cudaMalloc of 256 bytes");
    RUN(fault_past_end, "write_at", "past the end of a cudaMalloc of 4 bytes");
    RUN(fault_before_start, "write_at", "before the start");
    RUN(fault_bad_pointer, "read_from", "no device memory");
    RUN(fault_host_pointer, "double_all", "argument 1 is a host pointer");
    RUN(fault_recursion, "recurse", "stack overflow");
    RUN(fault_shared_overflow, "shared_overflow", "past the end of shared memory tile of 80 bytes");
    RUN(fault_too_much_shared, "too_much_shared", "50080 bytes of shared memory with big");
    RUN(fault_memcpy_size, "cudaMemcpy", "up to 4 past the end of a cudaMalloc of 32 bytes");
    RUN(fault_memcpy_direction, "cudaMemcpy", "the destination is device memory");
    RUN(fault_memcpy_source, "cudaMemcpy", "the source is host memory");
    RUN(fault_memcpy_freed, "cudaMemcpy", "a freed cudaMalloc of 32 bytes");
    RUN(fault_memset, "cudaMemset", "up to 16 past the end of a cudaMalloc of 32 bytes");
    RUN(fault_double_free, "cudaFree", "a freed cudaMalloc");
    RUN(fault_free_middle, "cudaFree", "not the start");
    RUN(fault_free_host, "cudaFreeHost", "not the start");
    RUN(fault_matmul_size, "cublasLtMatmul", "past the end of a cudaMalloc of 300 bytes");
}

static void run_faults_of_checked() {
    RUN(fault_read_past, "read_at", "reads 1 bytes, 0 past the end of a cudaMalloc of 260 bytes");
    RUN(fault_read_before, "read_at", "reads 1 bytes, 1 before the start of a cudaMalloc of 260");
    RUN(fault_reach_past, "use", "reads 4 bytes, up to 2 past the end of a cudaMalloc of 6 bytes");
    RUN(fault_shared_read, "shared_read", "reads 4 bytes, 4 past the end of shared memory tile");
    RUN(fault_unset, "use", "nothing has written yet, at byte 0 of a cudaMalloc of 4 bytes");
    RUN(fault_shared_unset, "shared_unset", "has written yet, at byte 60 of shared memory tile");
    RUN(fault_shared_stale, "shared_stale", "has written yet, at byte 0 of shared memory tile");
    RUN(fault_float4, "read_float4", "misaligned: reads 16 bytes, at byte 8");
    RUN(fault_float2, "write_float2", "misaligned: writes 8 bytes, at byte 4");
    RUN(fault_both_write, "both_write", "wrote with no __sync");
    RUN(fault_write_read, "write_read", "race: ");
    RUN(fault_read_write, "read_write", "with no __syncthreads() between");
    RUN(fault_in_a_warp, "in_a_warp", "no __syncwarp() between");
    RUN(fault_warps, "warps_after_syncwarp", "no __syncthreads() between");
    RUN(fault_many_readers, "after_many_readers", "race: ");
    RUN(fault_bf16, "bf16_neighbours", "race: writes 2 bytes");
    RUN(fault_blocks_write, "blocks_write", "wrote in the same launch");
    RUN(fault_blocks_read, "blocks_read_write", "in the same launch");
    RUN(fault_block_sums, "block_sums", "race: ");
    RUN(fault_plain_and_atomic, "plain_and_atomic", "race: ");
    RUN(fault_atomic_unset, "atomic_unset", "nothing has written");
    RUN(fault_memcpy_unset, "cudaMemcpy", "reads what nothing has written");
    RUN(fault_memcpy_copied, "cudaMemcpy", "reads what nothing has written");
    RUN(fault_matmul_unset, "cublasLtMatmul", "reads what nothing has written");
    RUN(fault_host_reads, "host code", "touches 4 bytes of device memory, at byte 4");
}

int main() {
    RUN(reductions);
    RUN(grids);
    RUN(partial_warps);
    RUN(atomics);
    RUN(shared_arrays);
    RUN(bf16_rounding);
    RUN(mma);
    RUN(cublas);
    RUN(thread_counts);
    RUN(syntax);
    RUN(launch_errors);
    RUN(host_api);
    RUN(no_false_alarm);
    run_faults_of_both();
    if (CUDA_ON_CPU_CHECKED) run_faults_of_checked();
    printf("%d passed, %d failed\n", passed, failures);
    return failures != 0;
}
