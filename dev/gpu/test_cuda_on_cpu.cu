/* test_cuda_on_cpu.cu - tests cuda_on_cpu.h: correct programs must give correct results, and each
 * planted fault must be reported in one line that names the kernel. Each case runs in a child
 * process. Built twice: checked, with every memory access of a kernel watched, and plain, which
 * leaves out the faults that only the checked build can see. */
#include "dev/gpu/cuda_on_cpu.h"
#include <sys/wait.h>

typedef __nv_bfloat16 bf16;
#define FULL 0xffffffff

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

static float *unset(size_t n) {
    float *p;
    cudaMalloc(&p, n * sizeof(float));
    return p;
}

static float *zeros(size_t n) { return on_gpu(std::vector<float>(n)); }

template <class T> std::vector<T> random_numbers(size_t n) {
    static uint32_t state = 1;
    std::vector<T> numbers(n);
    for (T &x : numbers) {
        state = state * 1664525 + 1013904223;
        x = (float)(state >> 8) / (1 << 23) - 1;
    }
    return numbers;
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
    reduce<THREADS><<<5, THREADS>>>(out, on_gpu(in), 3000);
    REQUIRE(cudaGetLastError() == cudaSuccess);
    auto sums = from_gpu(out, 5);
    for (int i = 0; i < 5 * 3000; i++) sums[i / 3000] -= in[i];
    for (double rest : sums) REQUIRE(rest == 0);
}

static void reductions() {
    run_reduce<32>();
    run_reduce<1024>();
    omp_set_num_threads(7);
    run_reduce<64>();
}

__global__ void number_all(int *out) {
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * (int)(blockDim.x * blockDim.y * blockDim.z) + thread] = block * 1000 + thread;
}

static void grids() {
    int *out;
    cudaMalloc(&out, 60 * 42 * sizeof(int));
    number_all<<<dim3(3, 4, 5), dim3(2, 7, 3)>>>(out);
    auto a = from_gpu(out, 60 * 42);
    for (int i = 0; i < 60 * 42; i++) REQUIRE(a[i] == i / 42 * 1000 + i % 42);
}

__global__ void shuffle_kernel(int *out) {
    int t = threadIdx.x, last = t < 64 ? 31 : (int)blockDim.x - 65;
    double other = __shfl_xor_sync(FULL, t + 0.5, 3);
    out[t * 2] = other == (t ^ 3) + 0.5;
    out[t * 2 + 1] = __shfl_sync(FULL, (float)t, last) == t / 32 * 32 + last;
    __syncwarp();
}

static void shuffles() {  // the last warp has 12 lanes
    int *out;
    cudaMalloc(&out, 76 * 2 * sizeof(int));
    shuffle_kernel<<<1, 76>>>(out);
    for (int ok : from_gpu(out, 76 * 2)) REQUIRE(ok);
}

__global__ void count(int *ints, float *sum, double *wide) {
    __shared__ int here;
    if (threadIdx.x == 0) here = 0;
    __syncthreads();
    atomicAdd(&here, 1);
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(ints, here);
    atomicAdd(sum, 0.5f);
    atomicAdd(wide, 1);
}

static void atomics() {
    int *ints = on_gpu<int>({0});
    float *sum = zeros(1);
    double *wide = on_gpu<double>({0});
    for (int i = 0; i < 2; i++) count<<<100, 96>>>(ints, sum, wide);
    REQUIRE(from_gpu(ints, 1)[0] == 19200 && from_gpu(sum, 1)[0] == 9600);
    REQUIRE(from_gpu(wide, 1)[0] == 19200);
}

// Each template instance must have its own arrays. Also tests the forms that sed must rewrite.
template <class real, int N, int WHICH> __device__ real turn(real v) {
    __shared__ real line[N][(2)];
    line[threadIdx.x][1] = v;
    __syncthreads();
    return line[N - 1 - threadIdx.x][1];
}

template <class real> __global__ void arrays(real *out) {
    extern __shared__ real buffer[];
    __shared__ unsigned int single;
    const int N = 48;
    if (threadIdx.x == 0) single = 5;
    buffer[threadIdx.x] = turn<real, N, 1>((real)threadIdx.x);
    real twice = turn<real, N, 2>((real)threadIdx.x);
    __syncthreads();
    out[blockIdx.x * N + threadIdx.x] = buffer[N - 1 - threadIdx.x] + twice * single;
}

template <class real> static void run_arrays() {
    real *out;
    cudaMalloc(&out, 4 * 48 * sizeof(real));
    if (out) arrays<real><<<(5 + 3) / 2, (31 + 65) / 2, sizeof(real) * 48>>>(out);
    else arrays<real><<<1, 1>>>(out);
    REQUIRE(from_gpu(out, 48)[13] == 13 + 5 * 34);
}

static void shared_arrays() {
    run_arrays<float>();
    run_arrays<double>();
}

// Rounding to bf16: no other bf16 may be nearer, and a tie goes to the even one. An infinity counts
// as 2^128.
static double as_double(uint16_t bits) {
    bf16 b;
    b.bits = bits;
    return isinf((float)b) ? copysign(ldexp(1, 128), (float)b) : (float)b;
}

static void bf16_rounding() {
    for (uint32_t i = 0; i < 400000; i++) {
        uint32_t bits = i < 200000 ? i * 32768 : i * 2654435769u;
        float f;
        memcpy(&f, &bits, 4);
        uint16_t got = __float2bfloat16_rn(f).bits, down = bits >> 16;
        if (f != f) REQUIRE(isnan((float)__float2bfloat16_rn(f)));
        if (f != f || isinf(f)) continue;
        double below = fabs(f - as_double(down)), above = fabs(f - as_double(down + 1));
        REQUIRE(got == down + (above < below || (above == below && down % 2)));
    }
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

static void tensor_core() {
    const int warps = 3, steps = 5;
    auto a = random_numbers<bf16>(warps * steps * 256);
    auto b = random_numbers<bf16>(warps * steps * 128);
    auto c = random_numbers<float>(warps * 128);
    float *d = on_gpu(c);
    multiply_tiles<<<1, warps * 32>>>(d, on_gpu(a), on_gpu(b), steps);
    auto got = from_gpu(d, c.size());
    for (int i = 0; i < warps * 128; i++) {
        double sum = c[i];
        for (int k = 0; k < steps * 16; k++)
            sum += (double)(float)(a[(i / 128 * steps + k / 16) * 256 + i % 128 / 8 * 16 + k % 16])
                * (float)(b[i / 128 * steps * 128 + k * 8 + i % 8]);
        REQUIRE(fabs(sum - got[i]) < 1e-5);
    }
}

// Copies a tile (16,16) by cp.async, 16 bytes at a time; its last row is cut off after 6 numbers.
// out (2,16,16): the tile, loaded by ldmatrix without and with transposition.
__global__ void tile_kernel(bf16 *out, const bf16 *in) {
    __shared__ bf16 tile[16][24];
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    cp_async(&tile[lane / 2][lane % 2 * 8], in + lane * 8, 16, lane < 30 ? 16 : lane < 31 ? 12 : 0);
    cp_async_wait_all();
    __syncthreads();
    for (int turned = 0; turned < 2; turned++) {
        __nv_bfloat162 m[4];
        ldmatrix_x4(m, &tile[lane % 16][lane / 16 * 8], turned);
        for (int i = 0; i < 4; i++)  // matrix i is 8 rows further for odd i, 8 columns for i > 1
            for (int k = 0; k < 2; k++) {
                int row = i % 2 * 8 + (turned ? 2 * t + k : g);
                int column = i / 2 * 8 + (turned ? g : 2 * t + k);
                out[turned * 256 + row * 16 + column] = k ? m[i].y : m[i].x;
            }
    }
}

static void tiles() {
    auto in = random_numbers<bf16>(256);
    bf16 *out = (bf16 *)zeros(256);
    tile_kernel<<<1, 32>>>(out, on_gpu(in));
    auto got = from_gpu(out, 512);
    for (int i = 0; i < 512; i++)
        REQUIRE((float)got[i] == (i % 256 < 246 ? (float)in[i % 256] : 0));
}

template <class In, class Out>
static cublasStatus_t matmul(bool ta, bool tb, const In *a, const In *b, Out *d, int m, int n,
                             int k, float beta, int wrong = 0) {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t la, lb, ld;
    cublasOperation_t ops[] = {CUBLAS_OP_N, CUBLAS_OP_T};
    cudaDataType_t in = sizeof(In) == 2 ? CUDA_R_16BF : CUDA_R_32F;
    cudaDataType_t out = sizeof(Out) == 2 ? CUDA_R_16BF : CUDA_R_32F;
    float alpha = 0.5f;
    cublasLtCreate(&handle);
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &ops[ta], sizeof *ops);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &ops[tb], sizeof *ops);
    cublasLtMatrixLayoutCreate(&la, in, ta ? k : m, ta ? m : k, (ta ? k : m) + 1);
    cublasLtMatrixLayoutCreate(&lb, in, tb ? n : k, (tb ? k : n) + wrong, (tb ? n : k) + 2);
    cublasLtMatrixLayoutCreate(&ld, out, m, n, m + 3);
    return cublasLtMatmul(handle, desc, &alpha, a, la, b, lb, &beta, d, ld, d, ld, nullptr,
                          nullptr, 0, nullptr);
}

template <class In, class Out> static void check_matmul(bool ta, bool tb, float beta) {
    const int m = 21, n = 14, k = 37, lda = (ta ? k : m) + 1, ldb = (tb ? n : k) + 2, ldd = m + 3;
    auto a = random_numbers<In>(lda * (ta ? m : k)), b = random_numbers<In>(ldb * (tb ? k : n));
    auto c = random_numbers<Out>(ldd * n);
    if (beta == 0) for (Out &x : c) x = NAN;
    Out *d = on_gpu(c);
    REQUIRE(matmul(ta, tb, on_gpu(a), on_gpu(b), d, m, n, k, beta) == CUBLAS_STATUS_SUCCESS);
    auto got = from_gpu(d, c.size());
    for (int j = 0; j < n; j++)
        for (int i = 0; i < m; i++) {
            double sum = 0;
            for (int kk = 0; kk < k; kk++)
                sum += 0.5 * (float)(a[ta ? i * lda + kk : kk * lda + i]) *
                    (float)(b[tb ? kk * ldb + j : j * ldb + kk]);
            if (beta != 0) sum += beta * (float)(c[j * ldd + i]);
            double tolerance = 1e-5 + (sizeof(Out) == 2 ? 4e-3 * fabs(sum) : 0);
            REQUIRE(fabs(sum - (float)(got[j * ldd + i])) <= tolerance);
        }
}

static void cublas() {
    for (int i = 0; i < 8; i++) {
        check_matmul<float, float>(i & 1, i & 2, i / 4);
        check_matmul<bf16, bf16>(i & 1, i & 2, i / 4 * 0.5f);
        check_matmul<bf16, float>(i & 1, i & 2, i / 4);
    }
    float *x = zeros(2000);
    REQUIRE(matmul(false, false, x, x, x, 8, 8, 8, 0, 1) == CUBLAS_STATUS_INVALID_VALUE);
}

__global__ void double_all(float *p, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) p[i] *= 2;
}

static void launch_errors() {
    double_all<<<1, 1025>>>(nullptr, 0);
    REQUIRE(cudaGetLastError() == cudaErrorInvalidConfiguration);
    REQUIRE(cudaGetLastError() == cudaSuccess);
    double_all<<<0, 32>>>(nullptr, 0);
    REQUIRE(cudaGetLastError() == cudaErrorInvalidConfiguration);
    double_all<<<1, 32, (48 << 10) + 1>>>(nullptr, 0);
    REQUIRE(cudaGetLastError() == cudaErrorInvalidValue);
    double_all<<<dim3(2, 2), dim3(8, 8, 16), 48 << 10>>>(nullptr, 0);
    REQUIRE(cudaGetLastError() == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess);
    void *p;
    REQUIRE(cudaMalloc(&p, (size_t)1 << 60) == cudaErrorMemoryAllocation && !p);
    REQUIRE(!strcmp(cudaGetErrorString(cudaGetLastError()), "out of memory"));
}

static void memory() {
    float *d = zeros(100), h[40], in[16];
    for (int i = 0; i < 16; i++) in[i] = i;
    cudaMemcpy(d, in, 64, cudaMemcpyHostToDevice);
    cudaMemcpy(d + 50, d, 64, cudaMemcpyDeviceToDevice);
    for (int i = 0; i < 3; i++) double_all<<<4, 25>>>(d, 100);
    cudaMemcpy2D(h, 80, d + 50, 16, 12, 2, cudaMemcpyDeviceToHost);
    REQUIRE(h[0] == 0 && h[2] == 16 && h[20] == 32 && h[22] == 48);
    cudaMemset(d, 0, 8);
    REQUIRE(from_gpu(d, 3)[1] == 0 && from_gpu(d, 3)[2] == 16);
    REQUIRE((uintptr_t)d % 256 == 0 && cudaFree(d) == cudaSuccess);
    REQUIRE(cudaFree(nullptr) == cudaSuccess);
}

// Nothing here is a fault, though a careless checker might think so.
struct alignas(16) Four { float x, y, z, w; };
__global__ void innocent(bf16 *out, Four *wide, unsigned char *bytes) {
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
    out[blockIdx.x * 64 + t] = __float2bfloat16_rn(x[63 - t]);  // neighbours, by different threads
    Four v = {1, 2, 3, all};
    wide[blockIdx.x * 64 + t] = v;
    v = wide[blockIdx.x * 64 + t];
    bytes[blockIdx.x * 64 + t] = v.y;      // single bytes too
    __syncthreads();
    bytes[blockIdx.x * 64 + (t ^ 1)]++;
    __syncthreads();
    atomicAdd(&x[0], v.x);
}

static void no_false_alarm() {
    bf16 *out;
    Four *wide;
    unsigned char *bytes;
    cudaMalloc(&out, 10 * 64 * 2);
    cudaMalloc(&wide, 10 * 64 * 16);
    cudaMalloc(&bytes, 10 * 64);
    for (int i = 0; i < 3; i++) innocent<<<10, 64>>>(out, wide, bytes);
    REQUIRE(from_gpu(bytes, 640)[639] == 3 && from_gpu(wide, 1)[0].w == 65);
    REQUIRE((float)(from_gpu(out, 640)[639]) == 65);
}

// ------------------------------------------------------------------------------------------------
// Kernels with faults that both builds report

__global__ void some_return() { if (threadIdx.x == 40) return; __syncthreads(); }
__global__ void other_line(int n) {
    if ((int)threadIdx.x < n)
        __syncthreads();
    else
        __syncthreads();
}
__global__ void half_a_warp() { if (threadIdx.x % 32 < 16) __syncwarp(); }
__global__ void half_mma() {
    float c[4] = {};
    __nv_bfloat162 a[4] = {}, b[2] = {};
    if (threadIdx.x > 3) mma_m16n8k16_bf16(c, a, b);
}
__global__ void half_ldmatrix(float *in) {
    __nv_bfloat162 m[4];
    if (threadIdx.x > 3) ldmatrix_x4(m, in, false);
}
__global__ void copy_from(float *in) {
    __shared__ float tile[4];
    cp_async(tile, in, 16, 16);
    cp_async_wait_all();
}
__global__ void crossed() {
    if (threadIdx.x == 3)
        __syncthreads();
    else
        __syncwarp();
    __syncthreads();
}
__global__ void write_at(char *p, long i) { p[i] = 1; }
__device__ int deep(int n, volatile int *p) {
    volatile int pad[1000];
    pad[n % 1000] = n;
    return n ? deep(n - 1, pad) + p[0] * 0 + pad[n % 1000] : 0;
}
__global__ void recurse(int n) { volatile int x = 0; x = deep(n, &x); }
__global__ void too_much_shared() {
    extern __shared__ float dynamic[];
    __shared__ float big[1000];
    big[0] = dynamic[0] = 0;
}

// ------------------------------------------------------------------------------------------------
// Kernels with faults that only the checked build reports

__global__ void shared_at(float *p, int i, int j) {
    __shared__ float tile[20];
    if (threadIdx.x < 10) tile[threadIdx.x] = 1;
    __syncthreads();
    tile[i] = 1;
    *p = tile[j];
}
__global__ void shared_stale(float *p) {
    __shared__ float tile[20];
    if (blockIdx.x == 0) tile[0] = 1;
    p[blockIdx.x] = tile[0];
}
__global__ void copy(float *out, const float *in) { out[threadIdx.x] = in[threadIdx.x]; }
__global__ void move_four(Four *out, const float *in) { *out = *(const Four *)in; }
__global__ void write_read(float *p, bool sync_warp) {
    __shared__ float x[64];
    x[63 - threadIdx.x] = 0;
    __syncthreads();
    x[threadIdx.x] = 1;
    if (sync_warp) __syncwarp();
    p[threadIdx.x] = x[63 - threadIdx.x];
}
__global__ void copied(float *out, const float *in, int wait, int sync) {
    __shared__ float tile[64];
    cp_async(&tile[threadIdx.x], in + threadIdx.x, 4, 4);
    if (wait) cp_async_wait_all();
    if (sync) __syncthreads();
    out[threadIdx.x] = tile[63 - threadIdx.x];
}
__global__ void in_a_warp(float *p) {
    __shared__ float x[32];
    x[threadIdx.x ^ 3] = 0;
    __syncthreads();
    x[threadIdx.x] = 1;
    p[threadIdx.x] = x[threadIdx.x ^ 1];
}
__global__ void many_readers(float *p) {
    __shared__ float x[1];
    if (threadIdx.x == 0) x[0] = 1;
    __syncthreads();
    p[threadIdx.x] = x[0];
    if (threadIdx.x == 5) x[0] = 2;
}
__global__ void bf16_neighbours(bf16 *p) { p[threadIdx.x].bits = p[threadIdx.x + 2].bits = 1; }
__global__ void blocks_write(float *p) { *p = 1; }
__global__ void blocks_read_write(float *p) { if (blockIdx.x) p[blockIdx.x] = p[0]; else p[0] = 1; }
__global__ void plain_and_atomic(float *p) { if (threadIdx.x) atomicAdd(p, 1.0f); else *p = 1; }

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
#define CORRECT(test) run(#test, test)
#define FAULT(who, words, ...) run(who ": " words, [] { __VA_ARGS__; }, who, words)

static float host[1000];

static void faults_of_both() {
    FAULT("some_return", "(40,0,0) has returned", some_return<<<3, 64>>>());
    FAULT("other_line", "in __syncthreads() on line", other_line<<<1, 64>>>(20));
    FAULT("half_a_warp", "every thread of the warp in __syncwarp()", half_a_warp<<<3, 64>>>());
    FAULT("half_mma", "in mma_m16n8k16_bf16()", half_mma<<<3, 64>>>());
    FAULT("half_ldmatrix", "in ldmatrix_x4()", half_ldmatrix<<<1, 32>>>(zeros(64)));
    FAULT("copy_from", "misaligned: reads 16 bytes at byte 8", copy_from<<<1, 1>>>(zeros(64) + 2));
    FAULT("crossed", "waits in __sync", crossed<<<1, 64>>>());
    FAULT("write_at", "byte 90000 of a cudaMalloc", write_at<<<1, 1>>>((char *)zeros(64), 90000));
    FAULT("write_at", "byte -70000 of a cudaMalloc", write_at<<<1, 1>>>((char *)zeros(64), -70000));
    FAULT("double_all", "not device memory", double_all<<<1, 32>>>(nullptr, 1));
    FAULT("double_all", "argument 1 is a host pointer", double_all<<<1, 32>>>(host, 1));
    FAULT("double_all", "byte 0 of a freed cudaMalloc of 256 bytes",
          float *p = zeros(64); cudaFree(p); double_all<<<1, 32>>>(p, 1));
    FAULT("recurse", "stack overflow", recurse<<<1, 1>>>(100));
    FAULT("too_much_shared", "50080 bytes of shared memory", too_much_shared<<<1, 1, 46080>>>());
    FAULT("cudaMemcpy", "writes 36 bytes", cudaMemcpy(zeros(8), host, 36, cudaMemcpyHostToDevice));
    FAULT("cudaMemcpy", "to device", cudaMemcpy(zeros(8), host, 32, cudaMemcpyDeviceToHost));
    FAULT("cudaMemcpy", "from host", cudaMemcpy(host, host, 32, cudaMemcpyDeviceToHost));
    FAULT("cudaMemcpy", "a freed cudaMalloc of 32 bytes",
          float *p = zeros(8); cudaFree(p); cudaMemcpy(host, p, 32, cudaMemcpyDeviceToHost));
    FAULT("cudaMemset", "byte 16 of a cudaMalloc of 32 bytes", cudaMemset(zeros(8) + 4, 0, 32));
    FAULT("cudaFree", "a freed cudaMalloc", float *p = zeros(8); cudaFree(p); cudaFree(p));
    FAULT("cudaFree", "byte 4", cudaFree(zeros(8) + 1));
    FAULT("cublasLtMatmul", "byte 0 of a cudaMalloc of 300 bytes",
          float *x = zeros(1000); matmul(false, false, x, x, zeros(75), 8, 8, 8, 0));
}

static void faults_of_checked() {
    FAULT("write_at", "byte -1 of a cudaMalloc of 4", write_at<<<1, 1>>>((char *)zeros(1), -1));
    FAULT("write_at", "byte 4 of a cudaMalloc of 4", write_at<<<1, 1>>>((char *)zeros(1), 4));
    FAULT("copy", "out of bounds: reads 4 bytes at byte 4 of a cudaMalloc of 6 bytes",
          copy<<<1, 1>>>(zeros(1), (float *)on_gpu(std::vector<char>(6)) + 1));
    FAULT("shared_at", "writes 4 bytes at byte 80 of shared memory tile of 80 bytes",
          shared_at<<<1, 1>>>(zeros(1), 20, 0));
    FAULT("shared_at", "out of bounds: reads 4 bytes at byte 84 of shared memory tile",
          shared_at<<<1, 1>>>(zeros(1), 0, 21));
    FAULT("shared_at", "nothing has written this: reads 4 bytes at byte 60 of shared memory tile",
          shared_at<<<1, 1>>>(zeros(1), 0, 15));
    FAULT("shared_stale", "nothing has written this",
          omp_set_num_threads(1); shared_stale<<<2, 1>>>(zeros(2)));
    FAULT("copy", "nothing has written this: reads 4 bytes at byte 0 of a cudaMalloc of 4 bytes",
          copy<<<1, 1>>>(zeros(1), unset(1)));
    FAULT("cudaMemcpy", "nothing has written this", from_gpu(unset(8), 8));
    FAULT("cublasLtMatmul", "nothing has written this",
          float *x = zeros(1000); matmul(false, false, x, unset(1000), x, 8, 8, 8, 0));
    FAULT("move_four", "misaligned: reads 16 bytes at byte 8",
          move_four<<<1, 1>>>((Four *)zeros(4), zeros(100) + 2));
    FAULT("move_four", "misaligned: writes 16 bytes at byte 4",
          move_four<<<1, 1>>>((Four *)(zeros(100) + 1), zeros(100)));
    FAULT("write_read", "no __syncthreads() between", write_read<<<1, 64>>>(zeros(64), false));
    FAULT("write_read", "no __syncthreads() between", write_read<<<1, 64>>>(zeros(64), true));
    FAULT("in_a_warp", "no __syncwarp() between", in_a_warp<<<1, 32>>>(zeros(32)));
    FAULT("many_readers", "race with another", many_readers<<<1, 64>>>(zeros(64)));
    FAULT("bf16_neighbours", "writes 2 bytes", bf16_neighbours<<<1, 64>>>((bf16 *)zeros(64)));
    FAULT("copied", "nothing has written this", copied<<<1, 64>>>(zeros(64), zeros(64), 0, 1));
    FAULT("copied", "nothing has written this", copied<<<1, 64>>>(zeros(64), zeros(64), 1, 0));
    FAULT("blocks_write", "race with another block", blocks_write<<<9, 1>>>(zeros(1)));
    FAULT("blocks_read_write", "race with another block", blocks_read_write<<<9, 1>>>(zeros(9)));
    FAULT("plain_and_atomic", "race with another", plain_and_atomic<<<1, 64>>>(zeros(1)));
    FAULT("host code", "touches 4 bytes at byte 4", volatile float *p = zeros(8); p[1] = 2);
}

int main() {
    CORRECT(reductions);
    CORRECT(grids);
    CORRECT(shuffles);
    CORRECT(atomics);
    CORRECT(shared_arrays);
    CORRECT(bf16_rounding);
    CORRECT(tensor_core);
    CORRECT(tiles);
    CORRECT(cublas);
    CORRECT(launch_errors);
    CORRECT(memory);
    CORRECT(no_false_alarm);
    faults_of_both();
    if (CUDA_ON_CPU_CHECKED) faults_of_checked();
    printf("%d passed, %d failed\n", passed, failures);
    return failures != 0;
}
