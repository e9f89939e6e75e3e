/* cuda_on_cpu.h - run CUDA C++ kernels on a machine without a GPU and without the CUDA Toolkit.
 *
 * A .cu file includes this header instead of CUDA's when CUDA_ON_CPU is defined. C++ lacks three
 * pieces of CUDA's syntax. Three sed -E rules rewrite them as calls, line by line:
 *
 *   s/(\w+(<[^<>]*>)?)<<<(.*)>>>\(/launch("\1", \1, \3)(/
 *   s/extern __shared__ (.*) (\w+)\[\];/auto *\2 = dynamic_shared<\1>();/
 *   s/__shared__ (.*) (\w+)((\[[^]]*\])*);/auto \&\2 = shared_array<\1 \3>("\2", []{});/
 *
 * So a line may contain one launch, up to the "(" after its >>>, or one shared array. A launch must
 * spell out its template arguments and pass all arguments of the kernel, and it cannot name a
 * stream. The header has the part of CUDA that a training program needs. The functions of a warp
 * work only if all its lanes take part.
 *
 * How it runs: OpenMP distributes the blocks of a grid over the cores. The threads of a block are
 * fibers (contexts with their own stacks, switched by hand) on one core. Each runs until it must
 * wait for others in __syncthreads(), __syncwarp(), a shuffle or a product of the tensor core. A
 * launch returns when the grid is done. CUDA_ON_CPU_ORDER=reverse or =shuffle in the environment
 * runs blocks and threads in another order; a correct kernel gives the same result.
 *
 * What it reports, as one line on stderr and exit status 1:
 *
 *   always    barriers that some threads never reach; host pointers passed to kernels; accesses
 *             to freed memory, to the inaccessible pages around each cudaMalloc, or beyond the end
 *             of a stack; copies, fills and products with wrong pointers, sizes or directions
 *   checked   every access of a kernel that is out of bounds, if only by a byte or two, or is
 *             misaligned, or reads what nothing has written, or races with an access of another
 *             thread; host code that touches device memory
 *
 * The plain build:    g++ -std=c++17 -g -O2 -fopenmp -U_FORTIFY_SOURCE -DCUDA_ON_CPU
 * The checked build:  the same with -O1 -fno-tree-sra -fno-ipa-sra -fsanitize=thread, but linked
 *                     without -fsanitize=thread; g++ only. See the last section.
 *
 * What it does not see: host pointers in structs passed to a kernel; faults in local arrays; races
 * on single bytes; in a kernel, what memcpy() and memset() touch, and a struct that a function
 * returns straight into memory. It reports a race where accesses are ordered only by atomics.
 */
#ifndef CUDA_ON_CPU_H
#define CUDA_ON_CPU_H

#include <link.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <algorithm>
#include <functional>
#include <utility>
#include <vector>
#include <omp.h>

#ifdef __SANITIZE_THREAD__
#define CUDA_ON_CPU_CHECKED 1
#else
#define CUDA_ON_CPU_CHECKED 0
#endif

// Marks the functions of this header, whose memory accesses the compiler must not check.
#define RUNTIME inline __attribute__((no_sanitize("thread")))

// ------------------------------------------------------------------------------------------------
// Types, and what else a kernel's source needs to compile.

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local uint3 threadIdx, blockIdx;  // of the fiber that is running on this core
inline thread_local dim3 blockDim, gridDim;

inline int min(int a, int b) { return a < b ? a : b; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }

// A bf16 is the upper half of a float. To round to nearest, ties to even, we add just under half of
// the last bit that stays, plus that bit, and cut. That could turn a NaN into infinity, so a NaN
// becomes 7fff, as in CUDA. INLINE makes a store of the result an access of the caller, which the
// checked build sees.
#define INLINE inline __attribute__((always_inline))
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    INLINE __nv_bfloat16(float f) {
        uint32_t wide;
        memcpy(&wide, &f, 4);
        bits = (f == f ? wide + 0x7fff + (wide >> 16 & 1) : 0x7fff0000) >> 16;
    }
    INLINE operator float() const {
        uint32_t wide = (uint32_t)bits << 16;
        float f;
        memcpy(&f, &wide, 4);
        return f;
    }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
INLINE __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
INLINE __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
INLINE float __bfloat162float(__nv_bfloat16 b) { return b; }

enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
};

// ------------------------------------------------------------------------------------------------
// The state. One arena of addresses holds all device memory, followed by the shared memory of each
// worker (a core and what it needs to run blocks). No device address is handed out twice, so that a
// use after cudaFree is always detected.

namespace on_cpu {
constexpr size_t SLOT = 64 << 10;                   // whole pages, whatever their size
constexpr size_t DEVICE_BYTES = (size_t)256 << 30;  // of addresses, not of memory
constexpr size_t SHARED_BYTES = 2 * SLOT;           // a worker's, with gaps; then a guard as large
constexpr size_t SHARED_MOST = 48 << 10;            // what a block may have
constexpr size_t STACK_GUARD = SLOT, STACK_BYTES = SLOT, STACK_STRIDE = 2 * SLOT;
constexpr int MAX_WORKERS = 28;                     // Linux allows 65530 mappings, a fiber takes 2
constexpr int MAX_THREADS = 1024, MAX_ARRAYS = 100;
constexpr size_t ARENA_BYTES = DEVICE_BYTES + MAX_WORKERS * 2 * SHARED_BYTES;

struct Range {                  // a cudaMalloc or a shared array
    char *start;
    size_t size;
    bool live;
    const char *name;           // of a shared array
    const void *key;            // tells shared arrays apart
};
struct Site { const char *name; int line; bool block; };  // a barrier, of a block or of a warp
struct Barrier { int arrived, first; Site site; };        // how many wait in it, and who came first
struct Fiber { jmp_buf context; ucontext_t start; bool started; };
struct Thread {
    uint3 index;
    Site waits;                 // name is null when the thread has returned
    Fiber *fiber;               // null unless it has begun and not yet returned
};
struct Deposit { uint64_t value[32]; float a[16][16], b[8][16]; };  // what lanes show each other
struct Copy { char *to, data[16]; int bytes; };  // asynchronous: written when waited for
struct Warp { Barrier barrier; Deposit deposits[2]; };
struct Worker {
    const char *kernel;
    const std::function<void()> *body;  // runs a thread of the kernel
    int threads, alive, current, ready[MAX_THREADS], ready_count;
    Thread thread[MAX_THREADS];
    Warp warps[32];
    Barrier barrier;
    uint64_t clock, clocks[32]; // barriers counted: at the last __syncthreads(), and by each warp
    uint64_t serial, launch;    // the block's number, and that of the first block of the launch
    uint64_t self;              // the current thread's stamp, see the last section
    const void *pc;             // the address after the access to report
    Fiber home, fibers[MAX_THREADS], *idle[MAX_THREADS];  // home: of run_block()
    int fibers_made, idle_fibers;
    char *stacks, *shared, fault_stack[SLOT];
    std::vector<Copy> copies[MAX_THREADS];  // on their way
    size_t shared_used, shared_sum;
    Range arrays[MAX_ARRAYS];
    int arrays_used;
};

struct Cell { uint64_t writer, reader; };  // of two bytes of the arena: see the last section
enum : uint64_t { NOWHERE = 0, UNSET = 1, HOST = 2 };  // writers that are not threads

inline thread_local Worker *worker;        // null outside kernels
inline Worker workers[MAX_WORKERS];
inline std::vector<Range> ranges;          // all cudaMallocs, by address
inline size_t device_used;                 // addresses that have been handed out
inline uint32_t next_serial = 1;
inline cudaError_t last_error;             // of a launch or a function, for cudaGetLastError()

RUNTIME char *reserve(size_t bytes, int protection) {
    void *p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) perror("cuda_on_cpu: reserving addresses"), _exit(1);
    return (char *)p;
}

inline char *const arena = reserve(ARENA_BYTES, PROT_NONE);
inline Cell *const shadow =
    CUDA_ON_CPU_CHECKED ? (Cell *)reserve(ARENA_BYTES * 8, PROT_READ | PROT_WRITE) : nullptr;
RUNTIME size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
RUNTIME bool in_arena(const void *p) { return (size_t)((const char *)p - arena) < ARENA_BYTES; }
RUNTIME bool on_device(const void *p) { return (size_t)((const char *)p - arena) < DEVICE_BYTES; }
RUNTIME Cell *cell(const char *p) { return shadow + (p - arena) / 2; }
RUNTIME void mark(const char *p, size_t n, uint64_t writer) {
    if (shadow) std::fill(cell(p), cell(p + n + 1), Cell{writer, 0});
}

// ------------------------------------------------------------------------------------------------
// Reports.

// Prints one line and ends the process, even from inside a fiber. who: what is at fault, or null
// for the running kernel; then addr2line, of binutils, adds the place in the source to the line.
[[noreturn]] RUNTIME void report(const char *who, const char *format, ...) {
    static int reported;
    if (__atomic_exchange_n(&reported, 1, __ATOMIC_SEQ_CST)) for (;;) pause();
    char command[200];
    size_t load_address;        // of the program
    va_list list;
    va_start(list, format);
    fflush(stdout);
    fprintf(stderr, "cuda_on_cpu: %s: ", who ? who : worker->kernel);
    vfprintf(stderr, format, list);
    if (!who)
        fprintf(stderr, ", block (%u,%u,%u) thread (%u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z,
                threadIdx.x, threadIdx.y, threadIdx.z);
    if (who || !worker->pc) _exit(fprintf(stderr, "\n"));
    auto first = [](dl_phdr_info *i, size_t, void *p) { return *(size_t *)p = i->dlpi_addr, 1; };
    dl_iterate_phdr(first, &load_address);
    snprintf(command, sizeof command, "{ addr2line -s -i -e /proc/%d/exe %zx 2>&- || echo; } | "
             "sed 's/ (disc.*//' | paste -s -d '<' | sed 's/</, called from /g' >&2",
             getpid(), (size_t)worker->pc - 1 - load_address);
    fprintf(stderr, ", ");
    _exit(system(command) | 1);
}

// Says where p is: "byte 404 of a cudaMalloc of 400 bytes".
RUNTIME const char *place(const char *p) {
    static thread_local char text[200];
    const Range *r = nullptr, *end = nullptr;  // the candidates, of which the nearest is named
    if (on_device(p)) r = ranges.data(), end = r + ranges.size();
    else if (worker && in_arena(p)) r = worker->arrays, end = r + worker->arrays_used;
    r = std::min_element(r, end, [p](const Range &a, const Range &b) {
        auto gap = [p](auto &r) { return std::max(r.start - p, p - r.start - (long)r.size); };
        return gap(a) < gap(b);
    });
    if (r == end) snprintf(text, sizeof text, "address %p, which is not device memory", p);
    else snprintf(text, sizeof text, "byte %td of %s%s of %zu bytes", p - r->start,
                  r->name ? "shared memory " : r->live ? "a " : "a freed ",
                  r->name ? r->name : "cudaMalloc", r->size);
    return text;
}

// Runs on a stack of its own, because the stack of a fiber may be what has overflowed.
RUNTIME void on_fault(int, siginfo_t *info, [[maybe_unused]] void *interrupted) {
    const char *p = (const char *)info->si_addr;
    if (!worker) report("host code", "segmentation fault at %s", place(p));
#ifdef __x86_64__
    worker->pc = (const void *)(((ucontext_t *)interrupted)->uc_mcontext.gregs[REG_RIP] + 1);
#endif
    size_t offset = p - worker->stacks;
    if (offset < MAX_THREADS * STACK_STRIDE && offset % STACK_STRIDE < STACK_GUARD)
        report(nullptr, "stack overflow: a thread has %zu KiB", STACK_BYTES >> 10);
    report(nullptr, "segmentation fault at %s", place(p));
}

// ------------------------------------------------------------------------------------------------
// Fibers. A thread of a block that must wait saves its registers with _setjmp and jumps with
// _longjmp to the next thread that can run; these two make no system call. A fiber whose thread has
// returned is used again for a new thread, so that a kernel without barriers never switches.

inline const char *const order = getenv("CUDA_ON_CPU_ORDER") ?: "";

// Returns which of n threads or blocks comes i-th.
RUNTIME uint32_t ordered(uint64_t i, uint64_t n) {
    constexpr uint64_t prime = 4294967311;  // coprime to n < 2^32, so this is a permutation
    return *order == 'r' ? n - 1 - i : *order == 's' ? i * prime % n : i;
}

// Puts n threads on the stack of those that can run. As it is a stack, they run before all others.
RUNTIME void make_ready(Worker &w, int first, int n, int except) {
    for (int i = n - 1; i >= 0; i--) {
        int thread = first + ordered(i, n);
        if (thread != except) w.ready[w.ready_count++] = thread;
    }
}

// Reports that thread a waits at a barrier that thread b will not reach.
[[noreturn]] RUNTIME void report_missed(const Worker &w, int a, int b) {
    Site s = w.thread[a].waits, t = w.thread[b].waits;
    uint3 i = w.thread[b].index;
    char there[100] = "has returned";
    if (t.name) snprintf(there, sizeof there, "waits in %s() on line %d", t.name, t.line);
    threadIdx = w.thread[a].index;
    report(nullptr, "waits for every thread of the %s in %s() on line %d, but thread (%u,%u,%u) %s",
           s.block ? "block" : "warp", s.name, s.line, i.x, i.y, i.z, there);
}

// Called when no thread can run, but not all have returned. Names one that waits, and one that it
// waits for.
RUNTIME void report_stuck(const Worker &w) {
    for (int a = 0; a < w.threads; a++)
        for (int b = 0; b < w.threads; b++) {
            Site s = w.thread[a].waits, t = w.thread[b].waits;
            bool together = t.name && t.line == s.line && t.block == s.block;
            if (s.name && (s.block || a / 32 == b / 32) && !together) report_missed(w, a, b);
        }
}

// Saves where this fiber is and continues with another. Returns when somebody switches back.
RUNTIME __attribute__((noinline)) void switch_fibers(Fiber &from, Fiber &to) {
    if (&from == &to) return;
    from.started = true;
    if (_setjmp(from.context)) return;
    if (to.started) _longjmp(to.context, 1);
    setcontext(&to.start);
}

RUNTIME void fiber_main();
RUNTIME Fiber *idle_fiber(Worker &w) {
    if (w.idle_fibers) return w.idle[--w.idle_fibers];
    getcontext(&w.fibers[w.fibers_made].start);
    int i = w.fibers_made++;
    char *stack = w.stacks + i * STACK_STRIDE;
    mprotect(stack, STACK_GUARD, PROT_NONE);
    w.fibers[i].start.uc_stack.ss_sp = stack + STACK_GUARD;
    w.fibers[i].start.uc_stack.ss_size = STACK_BYTES - i % 16 * 256;  // to use all cache sets
    makecontext(&w.fibers[i].start, fiber_main, 0);
    return &w.fibers[i];
}

// Called when the current thread cannot continue. Makes the next one that can run the current
// thread, or returns false if all have returned.
RUNTIME bool next_thread(Worker &w) {
    if (w.ready_count == 0 && w.alive) report_stuck(w);
    if (w.ready_count == 0) return false;
    w.current = w.ready[--w.ready_count];
    return true;
}

// Continues with the current thread, on its fiber, or on an idle one if it has not begun.
RUNTIME void switch_to_current(Worker &w, Fiber &from) {
    Thread &t = w.thread[w.current];
    if (!t.fiber) t.fiber = idle_fiber(w);
    switch_fibers(from, *t.fiber);
}

// Called when a thread begins, or continues after a barrier. Its stamp: see the last section.
RUNTIME void resume(Worker &w) {
    uint64_t warp = w.current / 32, lane = w.current % 32;
    threadIdx = w.thread[w.current].index;
    w.self = w.serial << 32 | (w.clocks[warp] & 0x7ffff) << 13 | warp << 7 | lane << 1;
}

RUNTIME void fiber_main() {
    Worker &w = *worker;
    Fiber *self = w.thread[w.current].fiber;
    for (;;) {
        resume(w);
        (*w.body)();
        w.copies[w.current].clear();
        w.thread[w.current].waits.name = nullptr;
        w.thread[w.current].fiber = nullptr;
        w.alive--;
        w.idle[w.idle_fibers++] = self;
        if (next_thread(w)) switch_to_current(w, *self);
        else switch_fibers(*self, w.home);
    }
}

// ------------------------------------------------------------------------------------------------
// Barriers, shuffles and the tensor core. Macros pass the line number, so that we notice a thread
// that waits in another __syncthreads() than the rest of its block.

// Returns true to the last of `expected` threads. The others wait for it, and get false.
RUNTIME bool arrive(Worker &w, Barrier &b, Site site, int expected) {
    Thread &t = w.thread[w.current];
    t.waits = site;
    if (b.arrived == 0) b.site = site, b.first = w.current;
    if (b.site.line != site.line) report_missed(w, b.first, w.current);
    if (++b.arrived == expected) return b.arrived = 0, true;
    next_thread(w);
    switch_to_current(w, *t.fiber);
    resume(w);
    return false;
}

RUNTIME void block_barrier(Site site) {
    Worker &w = *worker;
    if (!arrive(w, w.barrier, site, w.threads)) return;
    w.clock = *std::max_element(w.clocks, w.clocks + 32) + 1;
    std::fill_n(w.clocks, 32, w.clock);
    make_ready(w, 0, w.threads, w.current);
    resume(w);
}

RUNTIME void warp_barrier(Site site) {
    Worker &w = *worker;
    int first = w.current / 32 * 32, lanes = std::min(w.threads - first, 32);
    if (!arrive(w, w.warps[first / 32].barrier, site, lanes)) return;
    w.clocks[first / 32]++;
    make_ready(w, first, lanes, w.current);
    resume(w);
}

// A warp uses its two deposits alternately, so each exchange needs only one barrier: nobody can
// overwrite a deposit before all have read it and reached the barrier of the next exchange.
RUNTIME Deposit &deposit(Worker &w) {
    int warp = w.current / 32;
    return w.warps[warp].deposits[w.clocks[warp] % 2];
}

// Returns the value of lane `source`.
template <class T> RUNTIME T shuffle(Site site, T value, unsigned source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t *values = deposit(*worker).value;
    memcpy(&values[worker->current % 32], &value, sizeof(T));
    warp_barrier(site);
    memcpy(&value, &values[source % 32], sizeof(T));
    return value;
}

// A warp computes C += A B, in the layout of mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32.
// With g = lane / 4 and t = lane % 4, a lane holds
//     of A  the pairs of columns that begin at 2t and 2t + 8, in rows g and g + 8
//     of B  the pairs of rows that begin at 2t and 2t + 8, in column g
//     of C  columns 2t and 2t + 1 of rows g and g + 8
// All lanes deposit their parts of A and B as floats, then each computes its 4 sums.
RUNTIME void mma(Site site, float c[4], const __nv_bfloat162 a[4], const __nv_bfloat162 b[2]) {
    Deposit &p = deposit(*worker);
    int g = worker->current % 32 / 4, t = worker->current % 4;
    for (int i = 0; i < 4; i++) {
        float *pair = &p.a[g + i % 2 * 8][2 * t + i / 2 * 8];
        pair[0] = a[i].x, pair[1] = a[i].y;
    }
    for (int i = 0; i < 2; i++) {
        float *pair = &p.b[g][2 * t + i * 8];
        pair[0] = b[i].x, pair[1] = b[i].y;
    }
    warp_barrier(site);
    for (int i = 0; i < 4; i++) {
        const float *row = p.a[g + i / 2 * 8], *column = p.b[2 * t + i % 2];
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += row[k] * column[k];
        c[i] += sum;
    }
}

#define CUDA_ON_CPU_SHUFFLE(name, value, lane) on_cpu::shuffle({name, __LINE__, false}, value, lane)
#define __shfl_sync(mask, v, lane) CUDA_ON_CPU_SHUFFLE("__shfl_sync", v, lane)
#define __shfl_xor_sync(mask, v, bits) \
    CUDA_ON_CPU_SHUFFLE("__shfl_xor_sync", v, on_cpu::worker->current % 32 ^ (bits))
#define mma_m16n8k16_bf16(c, a, b) on_cpu::mma({"mma_m16n8k16_bf16", __LINE__, false}, c, a, b)
#define __syncwarp() on_cpu::warp_barrier({"__syncwarp", __LINE__, false})
#define __syncthreads() on_cpu::block_barrier({"__syncthreads", __LINE__, true})

// ------------------------------------------------------------------------------------------------
// Shared memory. An array gets its place when a thread first reaches its declaration, and keeps it
// for the launch. As on a GPU, a block finds in it whatever the previous block left there.

RUNTIME char *find_array(const void *key, const char *name, size_t size) {
    Worker &w = *worker;
    for (int i = 0; i < w.arrays_used; i++) if (w.arrays[i].key == key) return w.arrays[i].start;
    if ((w.shared_sum += size) > SHARED_MOST || w.arrays_used == MAX_ARRAYS)
        report(nullptr, "%zu bytes of shared memory with %s, more than the %zu of a block",
               w.shared_sum, name, SHARED_MOST);
    char *start = w.shared + w.shared_used;
    mark(start, size, UNSET);
    w.shared_used += round_up(size, 256) + 256;
    w.arrays[w.arrays_used++] = {start, size, true, name, key};
    return start;
}

// ------------------------------------------------------------------------------------------------
// Launches. As in CUDA a launch returns nothing and leaves its error for cudaGetLastError().

// Returns the worker with this thread's number in OpenMP. The OS thread behind that number may
// differ from launch to launch.
RUNTIME Worker &get_worker() {
    Worker &w = workers[omp_get_thread_num()];
    if (!w.stacks) {
        w.stacks = reserve(MAX_THREADS * STACK_STRIDE, PROT_READ | PROT_WRITE);
        w.shared = arena + DEVICE_BYTES + (&w - workers) * 2 * SHARED_BYTES;
        mprotect(w.shared, SHARED_BYTES, PROT_READ | PROT_WRITE);
    }
    stack_t stack = {w.fault_stack, 0, sizeof w.fault_stack};
    sigaltstack(&stack, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    return *(worker = &w);
}

RUNTIME void run_block(Worker &w, uint32_t number, uint32_t serial) {
    blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
    w.serial = serial;
    w.alive = w.threads;
    w.clock = 0;
    std::fill_n(w.clocks, 32, 0);
    make_ready(w, 0, w.threads, -1);
    next_thread(w);
    switch_to_current(w, w.home);
}

RUNTIME void run_grid(const char *kernel, dim3 grid, dim3 block, size_t shared,
                      const std::function<void()> &body) {
    uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    uint64_t threads = (uint64_t)block.x * block.y * block.z;
    cudaError_t error = shared > SHARED_MOST ? cudaErrorInvalidValue : cudaSuccess;
    if (blocks == 0 || blocks >> 31 || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
        threads > MAX_THREADS || block.z > 64) error = cudaErrorInvalidConfiguration;
    if (error != cudaSuccess) { last_error = error; return; }
    uint32_t launch = next_serial;
    next_serial += blocks + 1;  // one more, which no block gets: see the last section
    #pragma omp parallel num_threads(std::min(omp_get_max_threads(), MAX_WORKERS)) if (blocks > 1)
    {
        Worker &w = get_worker();
        w.kernel = kernel;
        w.body = &body;
        w.launch = launch;
        w.threads = threads;
        gridDim = grid;
        blockDim = block;
        for (unsigned t = 0; t < threads; t++)
            w.thread[t].index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
        for (int i = 0; i < w.arrays_used; i++) mark(w.arrays[i].start, w.arrays[i].size, NOWHERE);
        w.arrays_used = w.shared_used = w.shared_sum = 0;
        find_array(nullptr, "(dynamic)", shared);
        #pragma omp for schedule(dynamic)
        for (uint64_t i = 0; i < blocks; i++) run_block(w, ordered(i, blocks), launch + i);
        worker = nullptr;
    }
}

// Returns the live allocation that holds all n bytes at p, or null.
RUNTIME Range *find_range(const char *p, size_t n) {
    for (Range *r = ranges.data() + ranges.size(); r-- != ranges.data(); )
        if (r->live && p >= r->start && p + n <= r->start + r->size) return r;
    return nullptr;
}

// Checks a read or write by the host, or by cuBLASLt, of n bytes of device memory.
RUNTIME void touch(const char *who, const void *pointer, size_t n, bool write) {
    const char *p = (const char *)pointer;
    if (n && !find_range(p, n))
        report(who, "out of bounds: %s %zu bytes at %s", write ? "writes" : "reads", n, place(p));
    for (size_t i = 0; shadow && i < n; i++) {
        if (write) *cell(p + i) = {HOST, 0};
        else if (cell(p + i)->writer == UNSET)
            report(who, "nothing has written this: reads %s", place(p + i));
    }
}

}  // namespace on_cpu

// Key is the type of a lambda, which differs for each declaration and each template instance.
template <class T, class Key> RUNTIME T &shared_array(const char *name, Key) {
    static char key;
    return *(T *)on_cpu::find_array(&key, name, sizeof(T));
}
template <class T> RUNTIME T *dynamic_shared() { return (T *)on_cpu::worker->arrays[0].start; }

template <class... P>
RUNTIME auto launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block,
                    size_t shared_bytes = 0) {
    return [=](P... args) {
        int number = 0;
        [[maybe_unused]] auto check = [&](auto arg) {
            number++;
            if constexpr (std::is_pointer_v<decltype(arg)>)
                if (arg && !on_cpu::on_device((const void *)arg))
                    on_cpu::report(name, "argument %d is a host pointer", number);
        };
        (check(args), ...);
        on_cpu::run_grid(name, grid, block, shared_bytes, [&] { kernel(args...); });
    };
}

// ------------------------------------------------------------------------------------------------
// Memory. An allocation lies as close to the end of its slots as a start at a multiple of 256
// allows, and the slots around them are inaccessible. It is filled with 0xff, which is NaN in
// floats, because new memory on a GPU need not be 0 either.

enum cudaMemcpyKind {
    cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3,
};

RUNTIME cudaError_t cudaMalloc(void **pointer, size_t size) {
    using namespace on_cpu;
    size_t bytes = round_up(size, SLOT);
    char *slots = arena + SLOT + device_used, *start = slots + bytes - round_up(size, 256);
    *pointer = nullptr;
    if (size == 0) return cudaSuccess;
    if (size > DEVICE_BYTES || device_used + bytes + 2 * SLOT > DEVICE_BYTES ||
        mprotect(slots, bytes, PROT_READ | PROT_WRITE))
        return last_error = cudaErrorMemoryAllocation;
    memset(start, 0xff, size);
    mark(start, size, UNSET);
    ranges.push_back({start, size, true, nullptr, nullptr});
    device_used += bytes + SLOT;
    *pointer = start;
    return cudaSuccess;
}
template <class T> cudaError_t cudaMalloc(T **p, size_t n) { return cudaMalloc((void **)p, n); }

RUNTIME cudaError_t cudaFree(void *pointer) {
    using namespace on_cpu;
    Range *r = find_range((char *)pointer, 1);
    if (!pointer) return cudaSuccess;
    if (!r || r->start != pointer)
        report("cudaFree", "not the start of a live cudaMalloc: %s", place((char *)pointer));
    size_t bytes = round_up(r->size, SLOT);
    char *slots = r->start + round_up(r->size, 256) - bytes;
    mprotect(slots, bytes, PROT_NONE);
    madvise(slots, bytes, MADV_DONTNEED);  // frees the memory; the shadow becomes 0: NOWHERE
    if (shadow) madvise(cell(slots), bytes * 8, MADV_DONTNEED);
    r->live = false;
    return cudaSuccess;
}

RUNTIME cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                                 size_t width, size_t height, cudaMemcpyKind kind) {
    using namespace on_cpu;
    bool to_device = on_device(to), from_device = on_device(from);
    if (width > to_pitch || width > from_pitch) return last_error = cudaErrorInvalidValue;
    if (to_device == (kind == cudaMemcpyDeviceToHost) ||
        from_device == (kind == cudaMemcpyHostToDevice))
        report("cudaMemcpy", "the direction is not the pointers', from %s to %s memory",
               from_device ? "device" : "host", to_device ? "device" : "host");
    for (size_t y = 0; y < height; y++) {
        char *target = (char *)to + y * to_pitch;
        const char *source = (const char *)from + y * from_pitch;
        if (from_device) touch("cudaMemcpy", source, width, false);
        if (to_device) touch("cudaMemcpy", target, width, true);
        memmove(target, source, width);
    }
    return cudaSuccess;
}

RUNTIME cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind kind) {
    return cudaMemcpy2D(to, n, from, n, n, 1, kind);
}

RUNTIME cudaError_t cudaMemset(void *p, int value, size_t n) {
    on_cpu::touch("cudaMemset", p, n, true);
    memset(p, value, n);
    return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------
// The device and its errors.

struct cudaDeviceProp { char name[256]; int major, minor; };
RUNTIME cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
RUNTIME cudaError_t cudaSetDevice(int) { return cudaSuccess; }
RUNTIME cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    return *p = {"the CPU (cuda_on_cpu.h)", 9, 0}, cudaSuccess;
}
RUNTIME cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *free = *total = (size_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    return cudaSuccess;
}
RUNTIME cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
RUNTIME cudaError_t cudaGetLastError() { return std::exchange(on_cpu::last_error, cudaSuccess); }
RUNTIME const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess ? "no error" : e == cudaErrorInvalidValue ? "invalid argument" :
        e == cudaErrorMemoryAllocation ? "out of memory" : "invalid configuration argument";
}

// ------------------------------------------------------------------------------------------------
// cuBLASLt: D = alpha op(A) op(B) + beta C of column-major matrices; op(X) is X or its transpose.
// Each sum is taken in order of k, so the result does not depend on the number of cores.

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15,
};
enum cudaDataType_t { CUDA_R_32F, CUDA_R_16BF };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasLtMatmulDescAttributes_t { CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB };
enum { CUBLAS_COMPUTE_32F, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE };
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
};
struct cublasLtMatmulHeuristicResult_t { int algo; };

// A product's description, a matrix, or an object that needs no content here.
struct cublasLtObject {
    cublasOperation_t op[2];    // of A and B
    cudaDataType_t type;
    size_t rows, cols, ld;      // ld: numbers from a column's start to the next one's
    RUNTIME float at(const void *p, size_t row, size_t col) const {
        size_t i = col * ld + row;
        return type == CUDA_R_32F ? ((float *)p)[i] : (float)((__nv_bfloat16 *)p)[i];
    }
    RUNTIME void touch(const void *p, bool write) const {
        size_t numbers = (cols - 1) * ld + rows, size = type == CUDA_R_32F ? 4 : 2;
        on_cpu::touch("cublasLtMatmul", p, numbers * size, write);
    }
};
typedef cublasLtObject *cublasLtHandle_t, *cublasLtMatmulDesc_t, *cublasLtMatrixLayout_t,
    *cublasLtMatmulPreference_t;
inline const char *cublasLtGetStatusString(cublasStatus_t s) { return s ? "bad value" : "success"; }
// The arguments of types T are those that cuBLASLt needs and a plain loop does not.
template <class... T> cublasStatus_t cublasLtCreate(cublasLtObject **p, T...) {
    *p = new cublasLtObject();
    return CUBLAS_STATUS_SUCCESS;
}
#define cublasLtMatmulDescCreate cublasLtCreate
#define cublasLtMatmulPreferenceCreate cublasLtCreate
RUNTIME cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtObject **p, cudaDataType_t type,
                                                  uint64_t rows, uint64_t cols, int64_t ld) {
    *p = new cublasLtObject{{}, type, rows, cols, (size_t)ld};
    return ld < (int64_t)rows ? CUBLAS_STATUS_INVALID_VALUE : CUBLAS_STATUS_SUCCESS;
}
template <class T> cublasStatus_t cublasLtDestroy(T *p) { return delete p, CUBLAS_STATUS_SUCCESS; }
#define cublasLtMatmulDescDestroy cublasLtDestroy
#define cublasLtMatmulPreferenceDestroy cublasLtDestroy
#define cublasLtMatrixLayoutDestroy cublasLtDestroy
RUNTIME cublasStatus_t cublasLtMatmulDescSetAttribute(
    cublasLtObject *p, cublasLtMatmulDescAttributes_t which, const void *value, size_t) {
    p->op[which] = *(const cublasOperation_t *)value;
    return CUBLAS_STATUS_SUCCESS;
}
template <class... T> cublasStatus_t cublasLtMatmulPreferenceSetAttribute(T...) {
    return CUBLAS_STATUS_SUCCESS;
}
RUNTIME cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int wanted,
    cublasLtMatmulHeuristicResult_t *found, int *count) {
    if (wanted < 1) return CUBLAS_STATUS_INVALID_VALUE;
    found[0].algo = 0, *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}

RUNTIME cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha_pointer, const void *A,
    cublasLtMatrixLayout_t la, const void *B, cublasLtMatrixLayout_t lb, const void *beta_pointer,
    const void *C, cublasLtMatrixLayout_t lc, void *D, cublasLtMatrixLayout_t ld,
    const int *, void *, size_t, void *) {
    float alpha = *(const float *)alpha_pointer, beta = *(const float *)beta_pointer;
    bool ta = desc->op[0] == CUBLAS_OP_T, tb = desc->op[1] == CUBLAS_OP_T;
    size_t m = ld->rows, n = ld->cols, k = ta ? la->rows : la->cols;
    if ((ta ? la->cols : la->rows) != m || (tb ? lb->rows : lb->cols) != n || lc->cols != n ||
        (tb ? lb->cols : lb->rows) != k || lc->rows != m) return CUBLAS_STATUS_INVALID_VALUE;
    la->touch(A, false);
    lb->touch(B, false);
    if (beta != 0) lc->touch(C, false);
    std::vector<float> columns(m * k);  // of op(A)
    float *a = columns.data();
    #pragma omp parallel for
    for (size_t kk = 0; kk < k; kk++)
        for (size_t i = 0; i < m; i++)
            a[kk * m + i] = ta ? la->at(A, kk, i) : la->at(A, i, kk);
    #pragma omp parallel for
    for (size_t j = 0; j < n; j++) {
        std::vector<float> sums(m);
        float *sum = sums.data();
        for (size_t kk = 0; kk < k; kk++) {
            float b = tb ? lb->at(B, j, kk) : lb->at(B, kk, j);
            #pragma omp simd
            for (size_t i = 0; i < m; i++) sum[i] += a[kk * m + i] * b;
        }
        for (size_t i = 0; i < m; i++) {
            float d = alpha * sum[i] + (beta != 0 ? beta * lc->at(C, i, j) : 0);
            if (ld->type == CUDA_R_32F) ((float *)D)[j * ld->ld + i] = d;
            else ((__nv_bfloat16 *)D)[j * ld->ld + i] = d;
        }
    }
    ld->touch(D, true);
    return CUBLAS_STATUS_SUCCESS;
}

// ------------------------------------------------------------------------------------------------
// The checked build. g++ -fsanitize=thread makes the compiler call __tsan_read4(address) before
// each read of 4 bytes, and so on. These functions usually come from ThreadSanitizer; here we
// define our own.
//
// Every two bytes of the arena have a Cell that says who wrote and who read them last. Its stamps:
//
//   serial of the block : 32 | clock : 19 | warp : 6 | lane : 6 | by an atomic function : 1
//
// A warp's clock advances at each of its barriers. At a __syncthreads() all clocks of the block are
// set to one value that none had before. So an earlier access happened before this one if it comes
// from an earlier launch (with shared memory: an earlier block), or from this block with a clock
// below that of the last __syncthreads(), or from this warp with a clock below its present one,
// or from this very thread. If not, and if one of the two is a write, they race.
//
// After several concurrent reads, `reader` is nobody in particular: lane 32 of the warp, warp 32 of
// the block, or the serial of the launch that no block has. So whoever writes next, before a
// barrier, is not the reader, and they race.

namespace on_cpu {
enum Access { READ, WRITE, ATOMIC };
constexpr uint64_t LANE = 63 << 1, WARP = 63 << 7, LANES = 32 << 1, WARPS = 32 << 7;

// Returns true if the access with the stamp `who` did not happen before what this thread does now.
// start: the first stamp of the launch or, with shared memory, of the block.
RUNTIME bool concurrent(const Worker &w, uint64_t who, uint64_t start) {
    if (who < start || who - (w.serial << 32) < w.clock << 13) return false;
    if ((who ^ w.self) >> 32 || (who ^ w.self) & WARP) return true;
    return who >> 13 == w.self >> 13 && (who ^ w.self) & LANE;
}

// Returns the stamp that represents both this thread and `who` as concurrent readers.
RUNTIME uint64_t several(const Worker &w, uint64_t who) {
    if ((who ^ w.self) >> 32) return (w.launch + (uint64_t)gridDim.x * gridDim.y * gridDim.z) << 32;
    if ((who ^ w.self) & WARP) return (w.self & ~WARP) | WARPS;
    return (w.self & ~LANE) | LANES;
}

[[noreturn]] RUNTIME void report_access(const char *fault, const char *p, size_t n, Access access,
                                        const void *pc) {
    if (!worker) report("host code", "touches %zu bytes at %s", n, place(p));
    worker->pc = pc;
    report(nullptr, "%s: %s %zu bytes at %s", fault, access ? "writes" : "reads", n, place(p));
}

[[noreturn]] RUNTIME void report_race(uint64_t who, const char *p, size_t n, Access access,
                                      const void *pc) {
    uint64_t differs = who ^ worker->self;
    report_access(differs >> 32 ? "race with another block" :
                  differs & WARP ? "race with another warp, no __syncthreads() between" :
                  "race with another lane of the warp, no __syncwarp() between", p, n, access, pc);
}

RUNTIME __attribute__((always_inline)) void check(const char *p, size_t n, Access access,
                                                  const void *pc) {
    if (!worker) report_access("", p, n, access, pc);
    const Worker &w = *worker;
    bool shared = !on_device(p);
    uint64_t start = (shared ? w.serial : w.launch) << 32, written = shared ? start : HOST;
    for (const char *q = p - (uintptr_t)p % 2; q < p + n; q += 2) {
        Cell *c = cell(q);
        uint64_t writer = __atomic_load_n(&c->writer, __ATOMIC_RELAXED);
        uint64_t reader = __atomic_load_n(&c->reader, __ATOMIC_RELAXED);
        if (writer == NOWHERE) report_access("out of bounds", p, n, access, pc);
        if (writer < written && access != WRITE)
            report_access("nothing has written this", p, n, access, pc);
        if (q < p || q + 2 > p + n) {  // one byte of the two: the other may be another thread's
            if (writer < written) __atomic_store_n(&c->writer, w.self, __ATOMIC_RELAXED);
            continue;
        }
        bool atomics = access == ATOMIC && writer & 1, read = concurrent(w, reader, start);
        if (!atomics && concurrent(w, writer, start)) report_race(writer, p, n, access, pc);
        if (read && access != READ) report_race(reader, p, n, access, pc);
        uint64_t stamp = read ? several(w, reader) : w.self | (access == ATOMIC);
        uint64_t *record = access == READ ? &c->reader : &c->writer;
        if (*record != stamp) __atomic_store_n(record, stamp, __ATOMIC_RELAXED);
    }
}

}  // namespace on_cpu

// Other blocks run on other cores, so this must be a real atomic operation.
template <class T> RUNTIME T atomicAdd(T *p, std::common_type_t<T> v) {
    if (on_cpu::shadow && on_cpu::in_arena(p))
        on_cpu::check((char *)p, sizeof(T), on_cpu::ATOMIC, __builtin_return_address(0));
    T old, next;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do next = old + v;
    while (!__atomic_compare_exchange(p, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

// cp.async: copies 4, 8 or 16 bytes from global to shared memory, of which the first `valid` are
// read and the others become 0. Until the thread waits for its copies, the destination counts as
// unwritten.
RUNTIME void cp_async(void *to, const void *from, int bytes, int valid) {
    using namespace on_cpu;
    const void *pc = __builtin_return_address(0);
    Copy copy = {(char *)to, {}, bytes};
    if ((uintptr_t)to % bytes) report_access("misaligned", copy.to, bytes, WRITE, pc);
    if ((uintptr_t)from % bytes) report_access("misaligned", (char *)from, bytes, READ, pc);
    if (shadow && valid) check((const char *)from, valid, READ, pc);
    if (shadow) check(copy.to, bytes, WRITE, pc);
    mark(copy.to, bytes, UNSET);
    memset(to, 0xff, bytes);
    memcpy(copy.data, from, valid);
    worker->copies[worker->current].push_back(copy);
}

RUNTIME void cp_async_wait_all() {
    using namespace on_cpu;
    for (Copy &copy : worker->copies[worker->current]) {
        if (shadow) check(copy.to, copy.bytes, WRITE, __builtin_return_address(0));
        memcpy(copy.to, copy.data, copy.bytes);
    }
    worker->copies[worker->current].clear();
}

// ldmatrix.x4 loads four matrices of 8 x 8. Lane l passes the address of row l % 8 of matrix l / 8.
// With g = l / 4 and t = l % 4 it gets columns 2t and 2t + 1 of row g of each matrix, or,
// transposed, rows 2t and 2t + 1 of column g.
RUNTIME void ldmatrix_x4(on_cpu::Site site, __nv_bfloat162 to[4], const void *row,
                         bool transposed) {
    using namespace on_cpu;
    const void *pc = __builtin_return_address(0);
    uint64_t *rows = deposit(*worker).value;
    int lane = worker->current % 32, g = lane / 4, t = lane % 4;
    if ((uintptr_t)row % 16) report_access("misaligned", (const char *)row, 16, READ, pc);
    rows[lane] = (uint64_t)row;
    warp_barrier(site);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 2; k++) {
            __nv_bfloat16 *from = (__nv_bfloat16 *)rows[8 * i + (transposed ? 2 * t + k : g)];
            from += transposed ? g : 2 * t + k;
            if (shadow) check((const char *)from, 2, READ, pc);
            (k ? to[i].y : to[i].x) = *from;
        }
}
#define ldmatrix_x4(to, row, transposed) \
    ldmatrix_x4({"ldmatrix_x4", __LINE__, false}, to, row, transposed)

#if CUDA_ON_CPU_CHECKED
#define HOOK extern "C" __attribute__((used)) RUNTIME
#define HOOK_ACCESS(name, n, access) HOOK void name(char *p) { \
    if (!on_cpu::in_arena(p)) return; \
    const void *pc = __builtin_return_address(0); \
    if ((uintptr_t)p % n) on_cpu::report_access("misaligned", p, n, on_cpu::access, pc); \
    on_cpu::check((char *)__builtin_assume_aligned(p, n), n, on_cpu::access, pc); }
#define HOOK_RANGE(name, access) HOOK void name(char *p, long n) { \
    if (on_cpu::in_arena(p)) on_cpu::check(p, n, on_cpu::access, __builtin_return_address(0)); }
HOOK_ACCESS(__tsan_read1, 1, READ) HOOK_ACCESS(__tsan_write1, 1, WRITE)
HOOK_ACCESS(__tsan_read2, 2, READ) HOOK_ACCESS(__tsan_write2, 2, WRITE)
HOOK_ACCESS(__tsan_read4, 4, READ) HOOK_ACCESS(__tsan_write4, 4, WRITE)
HOOK_ACCESS(__tsan_read8, 8, READ) HOOK_ACCESS(__tsan_write8, 8, WRITE)
HOOK_ACCESS(__tsan_read16, 16, READ) HOOK_ACCESS(__tsan_write16, 16, WRITE)
HOOK_RANGE(__tsan_read_range, READ) HOOK_RANGE(__tsan_write_range, WRITE)
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void *) {}
HOOK void __tsan_func_exit() {}
#endif

#endif
